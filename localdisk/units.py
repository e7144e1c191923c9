"""Sizes, amounts, percentages and durations: parses the configuration's texts, and formats values for people.

Sizes are bytes in binary units, durations are whole seconds.  The patterns in `schema/localdisk.schema.json`
decide which texts the configuration may have; this module parses all of them.
"""

from __future__ import annotations

import re

from localdisk.frozen import frozen

MAX_DISK = 64 << 40  # bytes; the largest virtual disk that is accepted, far larger than real local disks

_SIZE_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_DURATION_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SHOWN_SIZES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SHOWN_DURATIONS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))

# Texts, not compiled patterns: that would be done in each run, and few runs read any of these.
_SIZE = r"([0-9]{1,19})([KMGT]iB)?"
_PERCENTAGE = r"([0-9]{1,3}(?:\.[0-9]{1,3})?)%"
_DURATION = r"([0-9]{1,9})([smhd])"


def parse_size(text: str | int) -> int:
    """Bytes, from a number of bytes or from `4KiB`, `512MiB`, `10GiB`, `1TiB`; else ValueError."""
    match = re.fullmatch(_SIZE, str(text))
    if not match:
        raise ValueError(f"'{text}' is not a size: give bytes, or a number with KiB, MiB, GiB or TiB")
    return int(match[1]) * _SIZE_UNITS[match[2] or ""]


def parse_percentage(text: str) -> float:
    """0..100, from `90%` or `2.5%` (at most three decimals); else ValueError."""
    match = re.fullmatch(_PERCENTAGE, text)
    if not match or float(match[1]) > 100:
        raise ValueError(f"'{text}' is not a percentage from 0% to 100%")
    return float(match[1])


def parse_duration(text: str) -> int:
    """Seconds, from `90s`, `15m`, `12h` or `7d`; else ValueError."""
    match = re.fullmatch(_DURATION, text)
    if not match:
        raise ValueError(f"'{text}' is not a duration: give a number with s, m, h or d")
    return int(match[1]) * _DURATION_UNITS[match[2]]


@frozen
class Amount:
    """A number of bytes, or a percentage of something: exactly one of the two is set."""

    bytes: int | None = None
    percent: float | None = None

    @classmethod
    def parse(cls, text: str | int) -> Amount:
        """The amount in a text that `parse_size` or `parse_percentage` accepts; else ValueError."""
        if isinstance(text, str) and text.endswith("%"):
            return cls(percent=parse_percentage(text))
        return cls(bytes=parse_size(text))

    def of(self, total: int) -> int:
        """The amount in bytes, if 100% is `total` bytes; rounded up to whole bytes."""
        if self.percent is None:
            return self.bytes or 0
        # In whole thousandths of a percent: for a large total, float arithmetic would be wrong by some bytes.
        return -(-total * round(self.percent * 1000) // 100_000)


def format_size(size: int) -> str:
    """`size` bytes (0 or more) for a reader: `0 B`, `512 MiB`, `1.5 GiB`; at most one decimal."""
    value, unit = float(size), 0
    while round(value, 1) >= 1024 and unit < len(_SHOWN_SIZES) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f}".removesuffix(".0") + f" {_SHOWN_SIZES[unit]}"


def format_duration(seconds: int) -> str:
    """`seconds` (0 or more) for a reader: `41 s`, `3 min 20 s`, `4 d 2 h`; the rest is cut off."""
    for (unit, length), (smaller, part) in zip(_SHOWN_DURATIONS, _SHOWN_DURATIONS[1:]):
        count, rest = divmod(seconds, length)
        if count:
            return f"{count} {unit} {rest // part} {smaller}" if rest >= part else f"{count} {unit}"
    return f"{seconds} s"
