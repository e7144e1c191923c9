"""Erase and remove one local disk: the only place that takes data away."""

from __future__ import annotations

from collections.abc import Callable

from localdisk.disk import LocalDisk
from localdisk.errors import CommandFailed, DiskBusy
from localdisk.lvm import VolumeGroup

TRIES = 20  # a writer that was just killed, or udev, may have it open for a moment
PAUSE = 0.5  # seconds


def remove(vg: VolumeGroup, disk: LocalDisk, erase: str, pause: Callable[[float], None]) -> None:
    """Erase as `retention.erase` says, then remove, a disk whose lock is held.

    LVM refuses to remove what is open; a moment's use by others is waited out with `pause(seconds)`.
    Raises DiskBusy, CommandFailed.
    """
    if disk.is_open:
        _give_time(vg, disk, pause)
    if erase != "none":
        vg.activate(disk.volume_id)
        {"discard": vg.discard, "zero": vg.zero}[erase](disk.volume_id)
    for _ in range(TRIES):
        try:
            vg.remove(disk.volume_id)
            return
        except CommandFailed as error:
            if "in use" not in error.stderr and "used by another device" not in error.stderr:
                raise
        pause(PAUSE)
    raise DiskBusy(vg=vg.vg_name, lv=disk.volume_id, state=disk.state.value)


def _give_time(vg: VolumeGroup, disk: LocalDisk, pause: Callable[[float], None]) -> None:
    """Wait until an open disk is closed: it must not be erased under whoever has it open."""
    for _ in range(TRIES):
        pause(PAUSE)
        lv = VolumeGroup.read(vg.vg_name, vg.devices).find(disk.volume_id)
        if lv is None or not lv.lv_device_open:
            return
    raise DiskBusy(vg=vg.vg_name, lv=disk.volume_id, state=disk.state.value)
