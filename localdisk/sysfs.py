"""Active logical volumes as anyone can see them, in /sys: LVM itself needs root."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

from localdisk.frozen import frozen
from localdisk.ids import is_uuid

BLOCK = "/sys/block"
NUMBERS = "/sys/dev/block"
_SECTOR = 512  # bytes; `size` counts these, whatever the device's own are
_TARGET_NAME = re.compile(r"((?:[^-]|--)+)-((?:[^-]|--)+)")  # VG-LV, dashes inside doubled


@frozen
class Volume:
    vg_name: str
    lv_name: str
    size: int


def logical_volumes(vg_names: Iterable[str]) -> Iterator[Volume]:
    """Those of the volume groups that have a UUID as their name."""
    wanted = frozenset(vg_names)
    try:
        devices = sorted(name for name in os.listdir(BLOCK) if name.startswith("dm-"))
    except OSError:
        return
    for device in devices:
        try:
            match = _TARGET_NAME.fullmatch(_read(device, "dm", "name"))
            size = int(_read(device, "size")) * _SECTOR
        except (OSError, ValueError):  # it has just gone
            continue
        if match:
            vg_name, lv_name = (part.replace("--", "-") for part in match.groups())
            if vg_name in wanted and is_uuid(lv_name):
                yield Volume(vg_name, lv_name, size)


def can_discard(path: str) -> bool:
    """Whether the block device at `path` discards what it is told to; False if it cannot be looked at."""
    try:
        device = os.stat(path).st_rdev
        place = os.path.realpath(f"{NUMBERS}/{os.major(device)}:{os.minor(device)}")
        if not os.path.isdir(f"{place}/queue"):  # a partition
            place = os.path.dirname(place)
        with open(f"{place}/queue/discard_max_bytes", encoding="ascii") as file:
            return int(file.read()) > 0
    except (OSError, ValueError):
        return False


def _read(*parts: str) -> str:
    with open(os.path.join(BLOCK, *parts), encoding="ascii", errors="replace") as file:
        return file.read().strip()
