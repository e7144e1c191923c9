"""Remove one local disk, erased as `retention.erase` says: the only place that takes data away.

What must be erased first is set aside: two LVM commits give its name back, so that neither a stop nor a new
start waits for the erase, and gc does the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
from collections.abc import Callable

from localdisk import device_mapper, holders
from localdisk.errors import CannotDiscard, CommandFailed, EraseFailed
from localdisk.ids import new_uuid
from localdisk.volumes.disk import LocalDisk, aside_tags, busy, require_alone
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup

TRIES = 20  # a writer that was just killed, or udev, may have it open for a moment
PAUSE = 0.5  # seconds

_STEP = 64 << 20  # bytes that are given back at once
_BLKDISCARD = 0x1277  # linux/fs.h; takes offset and length in bytes
_BLOCK = 64 << 10  # bytes; the smallest block of a thin pool, so that no hole beside data is filled

Pause = Callable[[float], None]


def take_away(vg: VolumeGroup, disk: LocalDisk, erase: str, pause: Pause) -> str:
    """Free the name of a disk that nobody needs and whose lock is held.

    One that is set aside already is erased as was decided then.  Returns the name of the volume that is left
    to `erase_and_remove`, "" where nothing is left.  LVM refuses to remove what is open; a moment's use by
    others is waited out with `pause(seconds)`.  Raises DependentVolumes, DiskBusy, CommandFailed.
    """
    _wait_until_free(vg, disk, pause)
    erase = disk.erase or erase
    if erase == "none":
        _remove(vg, disk, pause)
        return ""
    return _set_aside(vg, disk, erase)


def erase_and_remove(vg: VolumeGroup, disk: LocalDisk, erase: str, pause: Pause) -> None:
    """Erase and remove a disk that was set aside and whose lock is held; it may have begun before.

    Raises DependentVolumes, DiskBusy, CommandFailed, CannotDiscard, EraseFailed.
    """
    _wait_until_free(vg, disk, pause)
    if erase != "none":
        if disk.lv.lv_permissions == "read-only":  # a template LV; the kernel discards and zeroes none
            vg.set_writable(disk.volume_id)
        vg.activate(disk.volume_id)
        _erase(vg, disk, erase)
    _remove(vg, disk, pause)


def finish(vg: VolumeGroup, disk: LocalDisk, configured: str, pause: Pause) -> None:
    """`erase_and_remove` as was promised when the disk was set aside.

    If it was to be discarded and that would do nothing, zeros do it once `configured`, the value of
    `retention.erase`, is zero.
    """
    try:
        erase_and_remove(vg, disk, disk.erase or "none", pause)
    except CannotDiscard:
        if configured != "zero":
            raise
        erase_and_remove(vg, disk, "zero", pause)


def require_erasable(vg: VolumeGroup, disk: LocalDisk, erase: str) -> None:
    """Raise CannotDiscard, the disk as it was, if erasing it would leave its bytes on the device."""
    pool = vg.find(disk.lv.pool_lv) if disk.lv.pool_lv else None
    if (disk.erase or erase) != "discard" or (pool and not pool_keeps_bytes(pool)):
        return
    vg.activate(disk.volume_id)
    try:
        _require_discard(vg, disk)
    except CannotDiscard:
        if not (disk.lv.lv_active or disk.lv.dependents):  # LVM deactivates snapshots along with it
            vg.deactivate(disk.volume_id)
        raise


def _set_aside(vg: VolumeGroup, disk: LocalDisk, erase: str) -> str:
    """Killed between the two commits, it is nobody's under its old name; whoever comes next renames it."""
    name = disk.aside_name or new_uuid()
    if not (disk.is_aside and disk.aside_name):
        add, remove = aside_tags(disk, erase, name)
        vg.change_tags(disk.volume_id, add=add, remove=remove)
    vg.rename(disk.volume_id, name)
    return name


def _erase(vg: VolumeGroup, disk: LocalDisk, erase: str) -> None:
    if erase == "discard":
        _require_discard(vg, disk)
        vg.discard(disk.volume_id)
    elif disk.backend == "lvm":
        vg.zero(disk.volume_id)
    else:
        _zero_what_is_not(vg.path(disk.volume_id))


def _require_discard(vg: VolumeGroup, disk: LocalDisk) -> None:
    """Raise CannotDiscard if a discard would leave the bytes of an active disk on the device."""
    if disk.lv.pool_lv:
        pool = VolumeGroup.read(vg.vg_name, vg.devices).find(disk.lv.pool_lv)  # active with the disk by now
        problem = pool_keeps_bytes(pool) if pool else ""
    else:
        problem = "" if device_mapper.can_discard(vg.path(disk.volume_id)) else "its device cannot discard"
    if problem:
        raise CannotDiscard(vg=vg.vg_name, lv=disk.volume_id, problem=problem)


def pool_keeps_bytes(pool: LogicalVolume) -> str:
    """Why a thin pool leaves the bytes on its device that are discarded in it, "" if it does not.

    The kernel's word counts, not the pool's setting: it passes nothing down to a device that cannot discard.
    """
    if pool.kernel_discards == "passdown":
        return ""
    how = pool.kernel_discards or "it is not active"
    return f"thin pool {pool.lv_name} passes no discards to its device ({how})"


def _zero_what_is_not(path: str) -> None:
    """Write zeros over the data of a thin volume, and give the blocks back as it goes.

    Zeros everywhere would make the pool provide a block for every hole, and could fill it; so could zeros
    over what is shared with a template LV, which the pool provides anew.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            size = os.lseek(fd, 0, os.SEEK_END)
            for start in range(0, size, _STEP):
                if _zero_data(fd, start, min(start + _STEP, size)):
                    os.fsync(fd)
                    with contextlib.suppress(OSError):  # a pool may ignore discards
                        fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", start, min(_STEP, size - start)))
        finally:
            os.close(fd)
    except OSError as error:
        raise EraseFailed(path=path, problem=error.strerror) from None


def _zero_data(fd: int, start: int, end: int) -> bool:
    """Write zeros over what is not zero from `start` to `end`; False where all of it was."""
    zeros, buffer = bytes(_BLOCK), mmap.mmap(-1, _BLOCK)  # page-aligned, as O_DIRECT wants it
    offset, any_data = start, False
    while offset < end and (size := os.preadv(fd, [buffer], offset)):  # 0: it has become smaller
        if buffer[:size] != zeros[:size]:
            buffer[:size] = zeros[:size]
            size = os.pwritev(fd, [memoryview(buffer)[:size]], offset)
            any_data = True
        offset += size
    return any_data


def _remove(vg: VolumeGroup, disk: LocalDisk, pause: Pause) -> None:
    for _ in range(TRIES):
        try:
            vg.remove(disk.volume_id)
            return
        except CommandFailed as error:
            if "in use" not in error.stderr and "used by another device" not in error.stderr:
                raise
        pause(PAUSE)
    raise holders.busy(busy(disk, vg.vg_name))


def _wait_until_free(vg: VolumeGroup, disk: LocalDisk, pause: Pause) -> None:
    """Wait until an open disk is closed: it must not be erased under whoever has it open.

    Raises DependentVolumes at once if other volumes would be changed or removed along with it.
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
