"""Marks kept disks as stale: their VM starts here from shared storage, so the image there will change.

`kept.py` records the images first.  If the process is killed before the disks are marked, the next start or
gc finds the record, and marks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from localdisk import kept, libvirt, lock, log
from localdisk.config import Config
from localdisk.errors import LibvirtSilent
from localdisk.lock import Pause
from localdisk.volumes import lvm
from localdisk.volumes.local_disk import STALE, LocalDisk, local_disks
from localdisk.volumes.lvm import VolumeGroup


def mark(config: Config, vm_id: str, images: Sequence[str], pause: Pause) -> None:
    """Mark the VM's kept disks of these images (`kept.EVERY`: of all its images), and what was in doubt.

    Raises LVM's errors.  If a group cannot be read, its disks are marked later.
    """
    doubts = kept.doubt(vm_id, images)
    groups, failures = lvm.read_all(config.volume_groups)
    for vg in groups:
        _mark(vg, vm_id, kept.images_in(doubts, vg.vg_name), pause)
    kept.settle(vm_id, doubts, unread=config.volume_groups.keys() - {vg.vg_name for vg in groups})
    if failures:
        raise failures[0]


def is_usable(disk: LocalDisk) -> bool:
    """Whether the disk's own tags allow a start to use it again: it is complete and not stale."""
    return disk.is_complete and not disk.is_stale


def _mark(vg: VolumeGroup, vm_id: str, images: frozenset[str], pause: Pause) -> None:
    with ExitStack() as locks:
        found = [disk.volume_id for disk in _usable(vg, vm_id, images)]
        for name in found:
            locks.enter_context(lock.holding(lock.disk_lock(name), pause))
        again = VolumeGroup.read(vg.vg_name, vg.devices) if found else vg
        disks = [disk for disk in _usable(again, vm_id, images) if disk.volume_id in found]
        names = [disk.volume_id for disk in disks]
        if names:
            again.require_usable()
            boots = frozenset[str]().union(*(disk.boot_tags for disk in disks))
            again.mark(*names, add=frozenset({STALE}), remove=frozenset(), spare=boots)
            log.event("kept disks are stale, the VM starts without them", vm=vm_id, disks=" ".join(names))


def _usable(vg: VolumeGroup, vm_id: str, images: frozenset[str]) -> Iterator[LocalDisk]:
    own = [disk for disk in local_disks(vg) if disk.vm_id == vm_id and is_usable(disk)]
    own = [disk for disk in own if kept.EVERY in images or disk.image_id in images]
    runs = any(disk.is_open for disk in own) and _runs(vm_id)
    return (disk for disk in own if not (disk.is_open and runs))


def _runs(vm_id: str) -> bool:
    """Whether the VM runs, or may run: then its open disk is not changed."""
    try:
        return vm_id in libvirt.active()
    except LibvirtSilent:
        return True
