"""The one door to /sys: what the kernel knows of block devices and device-mapper; everybody may read it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator

from localdisk.errors import DeviceNotReady
from localdisk.frozen import frozen
from localdisk.ids import is_uuid

BLOCK = "/sys/block"
NUMBERS = "/sys/dev/block"
NAMES = "/sys/class/block"  # with partitions, which BLOCK does not have
_SECTOR = 512  # bytes; the unit of `size`, even if the device has other sectors
_TARGET_NAME = r"((?:[^-]|--)+)-((?:[^-]|--)+)"  # VG-LV; dashes inside of names are doubled


@frozen
class Volume:
    vg_name: str
    lv_name: str
    size: int


def logical_volumes(vg_names: Iterable[str]) -> Iterator[Volume]:
    """The active logical volumes of these volume groups that have a UUID as their name."""
    wanted = frozenset(vg_names)
    try:
        devices = sorted(name for name in os.listdir(BLOCK) if name.startswith("dm-"))
    except OSError:
        return
    for device in devices:
        try:
            match = re.fullmatch(_TARGET_NAME, _read(device, "dm", "name"))
            size = int(_read(device, "size")) * _SECTOR
        except (OSError, ValueError):  # the device was just removed
            continue
        if match:
            vg_name, lv_name = (part.replace("--", "-") for part in match.groups())
            if vg_name in wanted and is_uuid(lv_name):
                yield Volume(vg_name, lv_name, size)


def can_discard(path: str) -> bool:
    """Whether the block device at `path` supports discards; False if it cannot be read."""
    try:
        device = os.stat(path).st_rdev
        place = os.path.realpath(_at(device))
        if not os.path.isdir(f"{place}/queue"):  # a partition
            place = os.path.dirname(place)
        with open(f"{place}/queue/discard_max_bytes", encoding="ascii") as file:
            return int(file.read()) > 0
    except (OSError, ValueError):
        return False


def read_uuid(device: int) -> str:
    """The device-mapper UUID of a device number.  Raises OSError if device-mapper has no such device."""
    with open(f"{_at(device)}/dm/uuid", encoding="ascii") as file:
        return file.read().strip()


def uuid_at(path: str) -> str:
    """The device-mapper UUID of the device at a path.  Raises OSError if there is no such device."""
    return read_uuid(os.stat(path).st_rdev)


def read_name(device: int) -> str:
    """The device-mapper name of a device number; "" if device-mapper has no such device."""
    try:
        with open(f"{_at(device)}/dm/name", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def devices_below(path: str) -> list[str]:
    """The paths of the devices directly below the device at `path`.  Raises OSError."""
    return [f"/dev/{name}" for name in os.listdir(f"{_at(os.stat(path).st_rdev)}/slaves")]


def multipath_devices() -> Iterator[str]:
    """The paths of all multipath devices of this host.  Raises OSError."""
    for name in sorted(os.listdir(BLOCK)):
        with contextlib.suppress(OSError):
            if _read(name, "dm", "uuid").startswith("mpath-"):
                yield f"/dev/{name}"


def name_and_uuid(name: str) -> tuple[str, str]:
    """Device-mapper name and UUID of the device that the kernel calls `name`, such as dm-3; else "" twice."""
    try:
        return _read(name, "dm", "name", under=NAMES), _read(name, "dm", "uuid", under=NAMES)
    except OSError:
        return "", ""


def holders(name: str) -> list[str]:
    """The kernel's names of the devices directly above the device of this name."""
    return _related(name, "holders")


def slaves(name: str) -> list[str]:
    """The kernel's names of the devices directly below the device of this name."""
    return _related(name, "slaves")


def is_read_only(path: str) -> bool:
    """Whether the block device at `path` is read-only for the kernel; False if that cannot be read."""
    try:
        return _read(_at(os.stat(path).st_rdev), "ro") == "1"
    except OSError:
        return False


NO_NODE = (
    "check that udev runs (systemctl status systemd-udevd), "
    "then udevadm trigger --settle --subsystem-match=block"
)
_NOT_OURS = (
    "localdisk install brings back its udev rule; if it is there, look for one that takes the device away "
    "from vdsm (grep -rE 'OWNER|GROUP|MODE|chown|chmod' /etc/udev/rules.d)"
)
_IS_READ_ONLY = "take the volume group out of activation/read_only_volume_list in lvm.conf"


def not_ready(path: str, error: OSError) -> DeviceNotReady:
    """The error that the device node of a local disk cannot be opened, with what to do about it."""
    if error.errno == errno.ENOENT:
        fix = NO_NODE
    elif error.errno in (errno.EACCES, errno.EPERM):
        fix = _IS_READ_ONLY if is_read_only(path) else _NOT_OURS
    else:
        fix = "look at the device in the system log of this host (dmesg)"
    return DeviceNotReady(path=path, problem=error.strerror, fix=fix)


def require_no_file(path: str) -> None:
    """Raise DeviceNotReady if a file is where the device node of a local disk will be.

    Who writes, as root, to a device that is not there makes such a file, and udev leaves it.
    """
    try:
        is_file = stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return
    if is_file:
        problem = "it is a file in /dev, not a device"
        raise DeviceNotReady(path=path, problem=problem, fix=f"if nobody needs the file: rm {path}")


def another_device(path: str, whose: str) -> DeviceNotReady:
    """The error if the node of a local disk is another device's; `whose`: more about that device."""
    problem = f"it is another device {whose}"
    return DeviceNotReady(path=path, problem=problem, fix=NO_NODE)


def numbers_of(path: str) -> str:
    """`MAJOR:MINOR` of the device at a path, "" if there is none."""
    try:
        return _numbers(os.stat(path).st_rdev)
    except OSError:
        return ""


def number(name: str) -> str:
    """`MAJOR:MINOR` of the device of this name, "" if there is none."""
    try:
        return _read(name, "dev", under=NAMES)
    except OSError:
        return ""


def devices_above(numbers: str) -> Iterator[str]:
    """The kernel's names of what lies on the device `MAJOR:MINOR`, partitions and loop devices among them."""
    place = f"{NUMBERS}/{numbers}"
    yield from _names(f"{place}/holders")
    yield from (name for name in _names(place) if os.path.exists(f"{place}/{name}/partition"))
    for name in _names(NAMES):
        with contextlib.suppress(OSError):
            if numbers_of(_read(name, "loop", "backing_file", under=NAMES)) == numbers:
                yield name


def kind(name: str) -> str:
    """`loop`, `md` or `partition`, "" for another device."""
    kinds = ("loop", "md", "partition")
    return next((each for each in kinds if os.path.exists(f"{NAMES}/{name}/{each}")), "")


def _related(name: str, relation: str) -> list[str]:
    return _names(f"{NAMES}/{name}/{relation}")


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _at(device: int) -> str:
    return f"{NUMBERS}/{_numbers(device)}"


def _numbers(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _read(*parts: str, under: str = "") -> str:
    with open(os.path.join(under or BLOCK, *parts), encoding="ascii", errors="replace") as file:
        return file.read().strip()
