from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdisk.units import (
    Amount,
    format_duration,
    format_size,
    parse_duration,
    parse_percentage,
    parse_size,
)
from tests.examples import examples

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

quick = settings(max_examples=examples(100))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        (1 << 60, 1 << 60),
        ("0", 0),
        ("4096", 4096),
        ("4KiB", 4 * KIB),
        ("512MiB", 512 * MIB),
        ("10GiB", 10 * GIB),
        ("1TiB", TIB),
    ],
)
def test_parse_size(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "10 GiB",
        "10GB",
        "10G",
        "10gib",
        "1.5GiB",
        "-1",
        -1,
        "+1",
        "0x10",
        "1_000",
        "5%",
        "10GiB\n",
        "١",
    ],
)
def test_parse_size_refuses(text: str | int) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "percent"),
    [("0%", 0.0), ("5%", 5.0), ("2.5%", 2.5), ("99.999%", 99.999), ("100%", 100.0)],
)
def test_parse_percentage(text: str, percent: float) -> None:
    assert parse_percentage(text) == percent


@pytest.mark.parametrize(
    "text", ["", "%", "5", "5 %", "-5%", "100.1%", "101%", "999%", ".5%", "1.2345%", "5%\n"]
)
def test_parse_percentage_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is not a percentage"):
        parse_percentage(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0s", 0), ("90s", 90), ("15m", 900), ("12h", 43200), ("7d", 604800)],
)
def test_parse_duration(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "90", "1.5h", "-1s", "1w", "1h30m", "1:30", "15M", "7 d", "7d\n"])
def test_parse_duration_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "total", "size"),
    [
        (0, 10 * GIB, 0),
        (4096, 0, 4096),
        ("1GiB", 10 * GIB, GIB),
        ("0%", 10 * GIB, 0),
        ("5%", 100, 5),
        ("5%", 101, 6),
        ("2.5%", 1000, 25),
        ("0.001%", 1, 1),
        ("50%", 0, 0),
        ("100%", (1 << 60) + 1, (1 << 60) + 1),
        ("99.999%", 100_000 * TIB, 99_999 * TIB),
    ],
)
def test_amount_of(text: str | int, total: int, size: int) -> None:
    assert Amount.parse(text).of(total) == size


def test_amount_keeps_which_of_the_two_it_is() -> None:
    assert Amount.parse("5%") == Amount(percent=5.0)
    assert Amount.parse("5KiB") == Amount(bytes=5120)


@pytest.mark.parametrize("text", ["101%", "%", "5GB", ""])
def test_amount_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        Amount.parse(text)


@quick
@given(st.integers(0, 1 << 62), st.integers(0, 100_000))
def test_percentage_is_never_rounded_down_nor_by_more_than_a_byte(total: int, thousandths: int) -> None:
    size = Amount.parse(f"{thousandths // 1000}.{thousandths % 1000:03}%").of(total)
    assert 0 <= size * 100_000 - total * thousandths < 100_000


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (MIB - 1, "1 MiB"),
        (512 * MIB, "512 MiB"),
        (GIB + GIB // 2, "1.5 GiB"),
        (10 * GIB + 1, "10 GiB"),
        (1023 * GIB, "1023 GiB"),
        (TIB, "1 TiB"),
        (1 << 50, "1 PiB"),
        (1 << 63, "8 EiB"),
        (1 << 73, "8192 EiB"),
    ],
)
def test_format_size(size: int, shown: str) -> None:
    assert format_size(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (41, "41 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (3601, "1 h"),
        (5400, "1 h 30 min"),
        (7 * 86400, "7 d"),
        (7 * 86400 + 59 * 60, "7 d"),
        (4 * 86400 + 2 * 3600 + 59 * 60, "4 d 2 h"),
        (400 * 86400, "400 d"),
    ],
)
def test_format_duration(seconds: int, shown: str) -> None:
    assert format_duration(seconds) == shown


def is_parsed(parse: Callable[[str], object], text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


@quick
@given(st.text("0123456789.%KMGTiBsmhd +-_x\n\0", max_size=12))
def test_parsers_raise_nothing_but_value_error(text: str) -> None:
    understood = [is_parsed(parse, text) for parse in (parse_size, parse_percentage, parse_duration)]
    assert sum(understood) <= 1
    assert is_parsed(Amount.parse, text) == (understood[0] or understood[1])
