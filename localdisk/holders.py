"""Finds what holds a block device open, and how to end that.

`lsof` and `fuser` show only processes.  A loop device, a device-mapper device (of kpartx, a guest's own
volume group, an overlay), a RAID, a mount and swap hold a device without a process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from localdisk import device_mapper
from localdisk.errors import DiskBusy, plain
from localdisk.frozen import frozen

PROC = "/proc"
_DEPTH = 8  # at most so many devices on top of each other


@frozen
class Holder:
    """`what` holds the device; the command that `end`s it, "" for a process: a human must decide about it."""

    what: str
    end: str = ""


def holders(path: str) -> tuple[Holder, ...]:
    """What holds the block device open, in the order in which it must end; as far as this user can see."""
    numbers = device_mapper.numbers_of(path)
    return tuple(dict.fromkeys(_of_device(numbers, path, _DEPTH))) if numbers else ()


def described(path: str) -> tuple[str, str]:
    """What holds the device open, and how to end that, as two texts."""
    found = holders(path)
    who = ", ".join(each.what for each in found) or "something that neither /proc nor /sys shows"
    ends = [each.end for each in found if each.end]
    if any(not each.end for each in found) or not ends:
        ends.append(f"end what fuser -v {path} and lsblk {path} show")
    return who, "; ".join(ends)


def busy(error: DiskBusy) -> DiskBusy:
    """The same error, with the names of what holds the disk open, and how to end that."""
    vg, lv = error.fields["vg"], error.fields["lv"]
    users, fix = described(f"/dev/{vg}/{lv}")
    return DiskBusy(vg=vg, lv=lv, state=error.fields["state"], users=users, fix=fix)


def _of_device(numbers: str, path: str, depth: int) -> Iterator[Holder]:
    if not depth:
        return
    for above in device_mapper.devices_above(numbers):
        yield from _of_device(device_mapper.number(above), f"/dev/{above}", depth - 1)
        yield _device(above, path)
    yield from _mounts(numbers)
    for pid in filter(str.isdigit, _names(PROC)):
        if numbers in _open_devices(pid):
            yield Holder(f"{command(pid)} ({pid})")


def _device(name: str, path: str) -> Holder:
    """The device of this name, which is on top of the device `path`."""
    mapping, uuid = device_mapper.name_and_uuid(name)
    shown = plain(mapping)
    if re.match("part[0-9]+-", uuid):
        return Holder(f"partition {shown}", f"kpartx -d {path}")
    if uuid.startswith("LVM-"):  # not lvchange: LVM usually does not scan logical volumes, nor see that group
        return Holder(f"logical volume {shown} of a group in it", f"dmsetup remove {shown}")
    if mapping:
        return Holder(f"device-mapper device {shown}", f"dmsetup remove {shown}")
    return {
        "loop": Holder(f"loop device {name}", f"losetup -d /dev/{name}"),
        "md": Holder(f"RAID {name}", f"mdadm --stop /dev/{name}"),
        "partition": Holder(f"partition {name}", f"partx -d {path}"),
    }.get(device_mapper.kind(name), Holder(f"device {name}"))


def _mounts(numbers: str) -> Iterator[Holder]:
    """Where a device is mounted, in our mount namespace or one of another process (a container, a snap)."""
    for place in _places("self", numbers):
        yield Holder(f"a mount at {place}", f"umount {place}")
    for pid in _namespaces():
        for place in _places(pid, numbers):
            what = f"a mount at {place} in the mount namespace of {command(pid)} ({pid})"
            yield Holder(what, f"nsenter --mount --target {pid} umount {place}")


def _places(pid: str, numbers: str) -> Iterator[str]:
    """Where a process sees a device mounted, the last mount first (proc_pid_mountinfo(5))."""
    for line in reversed(_read(f"{PROC}/{pid}/mountinfo").splitlines()):
        words = line.split()
        if len(words) > 4 and words[2] == numbers:
            yield plain(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[4]))


def _namespaces() -> Iterator[str]:
    """A process of each mount namespace but ours, as far as this user can see."""
    seen = {_namespace("self"), ""}
    for pid in filter(str.isdigit, _names(PROC)):
        if _namespace(pid) not in seen:
            seen.add(_namespace(pid))
            yield pid


def _namespace(pid: str) -> str:
    try:
        return os.readlink(f"{PROC}/{pid}/ns/mnt")
    except OSError:
        return ""


def _open_devices(pid: str) -> Iterator[str]:
    directory = f"{PROC}/{pid}/fd"
    for fd in _names(directory):
        yield device_mapper.numbers_of(os.path.join(directory, fd))


def of_lock(path: str) -> str:
    """The process that holds a lock on the file at `path`, "" if there is none (proc_locks(5))."""
    try:
        inode = str(os.stat(path).st_ino)
    except OSError:
        return ""
    for line in _read(f"{PROC}/locks").splitlines():
        words = line.split()
        # 1: FLOCK  ADVISORY  WRITE 2423 00:1a:345 0 EOF; behind `->` who waits
        if len(words) == 8 and words[5].rpartition(":")[2] == inode and words[4].isdigit():
            return words[4]
    return ""


def command(pid: str) -> str:
    """The name of a process."""
    return plain(_read(f"{PROC}/{pid}/comm") or "?")


def _names(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
