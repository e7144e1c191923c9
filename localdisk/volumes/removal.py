"""Removes local disks, erased as `retention.erase` demands: the only module that removes or overwrites data.

A disk that must be erased first is set aside: two LVM commits free its name, so that neither a stop nor a new
start waits for the erase.  gc erases and removes it later.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from localdisk import device_mapper, holders, lock
from localdisk.config import Settings
from localdisk.errors import (
    CannotDiscard,
    CommandFailed,
    DependentVolumes,
    EraseFailed,
    Error,
)
from localdisk.frozen import frozen, replace
from localdisk.ids import new_uuid
from localdisk.volumes.local_disk import LocalDisk, aside_tags, busy, require_alone
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup

TRIES = 20  # a writer that was just killed, or udev, may have the volume open for a moment
PAUSE = 0.5  # seconds between two tries
ERASER = "erase.lock"  # held by the process that erases

_MIB = 1 << 20
_STEP = 64 * _MIB  # bytes that are zeroed at once
_DISCARDED = 1024 * _MIB  # bytes that are discarded at once
_BLKDISCARD = 0x1277  # linux/fs.h; takes offset and length in bytes
_BLOCK = 64 << 10  # bytes; the smallest block of a thin pool: a larger step would write into holes

Pause = Callable[[float], None]


def remove_or_set_aside(vg: VolumeGroup, disk: LocalDisk, erase: str, pause: Pause) -> str:
    """Free the name of a disk that no VM needs and whose lock is held: remove it, or set it aside.

    `erase` is a value of `retention.erase`; if the disk was already set aside, the tag ERASE wins.  Returns
    the new name of a disk that was set aside, which `erase_and_remove` must remove later; "" if the disk was
    removed.  If the disk is open, tries again for 10 seconds with `pause(seconds)`.
    Raises DependentVolumes, DiskBusy, CommandFailed.
    """
    erase = disk.erase or erase
    if erase != "none":
        return set_aside(vg, disk, erase, pause)
    _wait_until_free(vg, disk, pause)
    _remove(vg, disk, pause)
    return ""


def remove_all(vg: VolumeGroup, disks: Sequence[LocalDisk], pause: Pause) -> Mapping[str, Error]:
    """Remove disks whose locks are held and that need no erase, with one LVM command if possible.

    Returns the errors of the disks that were not removed, by name.  A disk that cannot be removed does not
    keep the others: if one volume is in use, LVM removes none of them (tried with 2.03.16), so the closed
    disks are tried again without it.
    """
    failures: dict[str, Error] = {}
    left: dict[str, LocalDisk] = {}
    for disk in disks:
        try:
            require_alone(disk, vg.vg_name)
            left[disk.volume_id] = disk
        except DependentVolumes as error:
            failures[disk.volume_id] = error
    try:
        for _ in range(TRIES):
            failures.update(_remove_closed(vg, left))
            left = {name: disk for name, disk in left.items() if name not in failures}
            if not left:
                return failures
            pause(PAUSE)
            vg = VolumeGroup.read(vg.vg_name, vg.devices)
            left = dict(_still_there(vg, left.values()))
    except Error as error:
        return {**failures, **dict.fromkeys(left, error)}
    return {**failures, **{name: holders.busy(busy(disk, vg.vg_name)) for name, disk in left.items()}}


def require_erasable(vg: VolumeGroup, disk: LocalDisk, erase: str) -> None:
    """Raise CannotDiscard, with the disk unchanged, if a discard would leave its bytes on the device."""
    pool = vg.find(disk.lv.pool_lv) if disk.lv.pool_lv else None
    if (disk.erase or erase) != "discard" or (pool and not pool_keeps_bytes(pool)):
        return
    vg.activate(disk.volume_id)
    try:
        _require_discard(vg, disk)
    except CannotDiscard:
        if not (disk.lv.lv_active or disk.lv.dependents):  # LVM would deactivate its snapshots, too
            vg.deactivate(disk.volume_id)
        raise


def _remove_closed(vg: VolumeGroup, left: dict[str, LocalDisk]) -> Mapping[str, Error]:
    """Remove the closed disks of `left`, and delete them from `left`; returns the errors that are final.

    A disk that was opened meanwhile is still in `left`, to be tried again.
    """
    names = [name for name, disk in left.items() if not disk.is_open]
    try:
        if names:
            vg.remove(*names)
    except CommandFailed as error:
        if _is_in_use(error):
            return {}
        if len(names) == 1:
            return {names[0]: error}
        return _remove_each(vg, left, names)
    for name in names:
        del left[name]
    return {}


def _remove_each(vg: VolumeGroup, left: dict[str, LocalDisk], names: Iterable[str]) -> Mapping[str, Error]:
    failures: dict[str, Error] = {}
    there = dict(_still_there(VolumeGroup.read(vg.vg_name, vg.devices), left.values()))
    for name in names:
        one = {name: there[name]} if name in there else {}
        failures.update(_remove_closed(vg, one))
        if not one:
            del left[name]
    return failures


def _still_there(vg: VolumeGroup, disks: Iterable[LocalDisk]) -> Iterator[tuple[str, LocalDisk]]:
    """Those of the disks that still exist under their name, as they are now, by name."""
    lvs = {lv.lv_uuid: lv for lv in vg.lvs}
    for disk in disks:
        lv = lvs.get(disk.lv.lv_uuid)
        if lv and lv.lv_name == disk.volume_id:
            yield disk.volume_id, replace(disk, lv=lv)


def _is_in_use(error: CommandFailed) -> bool:
    return "in use" in error.stderr or "used by another device" in error.stderr


def set_aside(vg: VolumeGroup, disk: LocalDisk, erase: str, pause: Pause) -> str:
    """Remove the owner's tags of a disk that must be erased, and rename it; returns its new name.

    If the process is killed between these two commits, the disk has no owner but keeps its old name; the next
    start or gc renames it.  Raises DependentVolumes, DiskBusy, CommandFailed.
    """
    name = disk.aside_name if disk.is_aside else ""
    if name == disk.volume_id:
        return name
    _wait_until_free(vg, disk, pause)
    if not name:
        name = new_uuid()
        add, remove = aside_tags(disk, erase, name)
        vg.change_tags(disk.volume_id, add=add, remove=remove)
    vg.rename(disk.volume_id, name)
    return name


def erase_aside(vg: VolumeGroup, name: str, settings: Settings, pause: Pause) -> bool:
    """Erase and remove a disk that is set aside under `name`; False if another process works on it.

    One process of this host erases at a time; the others wait for it with `pause(seconds)`.
    Raises as `erase_and_remove`.
    """
    eraser = lock.holding(os.path.join(lock.RUN, ERASER), pause)
    with eraser, lock.trying(lock.disk_lock(name)) as held:
        now = VolumeGroup.read(vg.vg_name, vg.devices)
        lv = now.find(name)
        disk = LocalDisk.from_lv(lv) if lv else None
        if held and disk and disk.waits_for_erase:
            finish(now, disk, settings, pause)
        return held is not None


def finish(vg: VolumeGroup, disk: LocalDisk, settings: Settings, pause: Pause) -> None:
    """Erase a disk as it was decided when it was set aside, and remove it.

    If it was to be discarded and its device cannot discard, zeros are written once `retention.erase` is zero.
    Raises as `erase_and_remove`.
    """
    pace = Pace(settings.copy.bandwidth, pause)
    try:
        erase_and_remove(vg, disk, disk.erase or "none", pace)
    except CannotDiscard:
        if settings.retention.erase != "zero":
            raise
        erase_and_remove(vg, disk, "zero", pace)


@frozen
class Pace:
    """How fast zeros are written: `bandwidth` in bytes per second, None: as fast as the device can."""

    bandwidth: int | None
    pause: Pause

    @property
    def step(self) -> int:
        """Bytes to write at once, in whole MiB: at most as many as `bandwidth` allows in a second."""
        return min(_STEP, max(_MIB, (self.bandwidth or _STEP) // _MIB * _MIB))

    def keep(self, written: int, began: float) -> None:
        """Wait until `written` bytes since `began`, time.monotonic(), are no faster than `bandwidth`."""
        left = written / self.bandwidth - (time.monotonic() - began) if self.bandwidth else 0
        if left > 0:
            self.pause(left)


def erase_and_remove(vg: VolumeGroup, disk: LocalDisk, erase: str, pace: Pace) -> None:
    """Erase and remove a disk that was set aside and whose lock is held; it may be partly erased already.

    It is erased in steps: a process that gets a signal ends after a step.  `pace` limits zeros; discards have
    no limit.  Raises DependentVolumes, DiskBusy, CommandFailed, CannotDiscard, EraseFailed.
    """
    _wait_until_free(vg, disk, pace.pause)
    if erase != "none":
        if disk.lv.lv_permissions == "read-only":  # a template LV, which the kernel would not erase
            vg.set_writable(disk.volume_id)
        vg.activate(disk.volume_id)
        _erase(vg, disk, erase, pace)
    _remove(vg, disk, pace.pause)


def _erase(vg: VolumeGroup, disk: LocalDisk, erase: str, pace: Pace) -> None:
    size = disk.lv.lv_size
    if erase == "discard":
        _require_discard(vg, disk)
        for start in range(0, size, _DISCARDED):
            vg.discard(disk.volume_id, start, min(_DISCARDED, size - start))
    elif not disk.lv.pool_lv:
        for start in range(0, size, pace.step):
            began, length = time.monotonic(), min(pace.step, size - start)
            vg.zero(disk.volume_id, start, length)
            pace.keep(length, began)
    else:
        _zero_thin_data(vg.path(disk.volume_id), pace)


def _require_discard(vg: VolumeGroup, disk: LocalDisk) -> None:
    """Raise CannotDiscard if a discard would leave the bytes of an active disk on the device."""
    if disk.lv.pool_lv:
        pool = VolumeGroup.read(vg.vg_name, vg.devices).find(disk.lv.pool_lv)  # it is active, as the disk is
        problem = pool_keeps_bytes(pool) if pool else ""
    else:
        problem = "" if device_mapper.can_discard(vg.path(disk.volume_id)) else "its device cannot discard"
    if problem:
        raise CannotDiscard(vg=vg.vg_name, lv=disk.volume_id, problem=problem)


def pool_keeps_bytes(pool: LogicalVolume) -> str:
    """Why discarded bytes of a thin pool stay on its device, "" if they do not.

    The kernel's report decides, not the pool's setting: the kernel passes no discards to a device that cannot
    discard.
    """
    if pool.kernel_discards == "passdown":
        return ""
    how = pool.kernel_discards or "it is not active"
    return f"thin pool {pool.lv_name} passes no discards to its device ({how})"


def _zero_thin_data(path: str, pace: Pace) -> None:
    """Write zeros over the data of a thin volume step by step, and discard each step's blocks.

    A zero in a hole, or over a block shared with a template LV, makes the pool allocate a new block, and so
    could fill it.  So holes are left, and each step is discarded.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            size = os.lseek(fd, 0, os.SEEK_END)
            for start in range(0, size, pace.step):
                began, length = time.monotonic(), min(pace.step, size - start)
                written = _zero_data(fd, start, start + length)
                if written:
                    os.fsync(fd)
                    with contextlib.suppress(OSError):  # a pool may ignore discards
                        fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", start, length))
                    pace.keep(written, began)
        finally:
            os.close(fd)
    except OSError as error:
        raise EraseFailed(path=path, problem=error.strerror) from None


def _zero_data(fd: int, start: int, end: int) -> int:
    """Write zeros over all blocks from `start` to `end` that have other bytes; returns the bytes written."""
    zeros, buffer = bytes(_BLOCK), mmap.mmap(-1, _BLOCK)  # page-aligned, as O_DIRECT wants it
    offset, written = start, 0
    while offset < end and (size := os.preadv(fd, [buffer], offset)):  # 0: the volume was shrunk
        if buffer[:size] != zeros[:size]:
            buffer[:size] = zeros[:size]
            size = os.pwritev(fd, [memoryview(buffer)[:size]], offset)
            written += size
        offset += size
    return written


def _remove(vg: VolumeGroup, disk: LocalDisk, pause: Pause) -> None:
    for _ in range(TRIES):
        try:
            vg.remove(disk.volume_id)
            return
        except CommandFailed as error:
            if not _is_in_use(error):
                raise
        pause(PAUSE)
    raise holders.busy(busy(disk, vg.vg_name))


def _wait_until_free(vg: VolumeGroup, disk: LocalDisk, pause: Pause) -> None:
    """Wait until an open disk is closed: it must not be erased while a process uses it.

    Raises DiskBusy if it stays open; DependentVolumes, without a wait, if other volumes depend on it.
    """
    require_alone(disk, vg.vg_name)
    if not disk.is_open:
        return
    for _ in range(TRIES):
        pause(PAUSE)
        lv = VolumeGroup.read(vg.vg_name, vg.devices).find(disk.volume_id)
        if lv is None or not lv.lv_device_open:
            return
    raise holders.busy(busy(disk, vg.vg_name))
