"""Kept disks that a start replaces: removed when the new disk is complete, or if it needs their room.

If a kept disk has the name that the new disk gets, it is renamed just before the new disk is made.  Its owner
and its source are in its tags, and a start looks for kept disks by their image.  So if a process is killed
before the new disk is complete, the next start finds the kept disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from localdisk import lock, log
from localdisk.config import Policy
from localdisk.errors import Error
from localdisk.frozen import replace
from localdisk.ids import new_uuid
from localdisk.lock import Pause
from localdisk.volumes.local_disk import LocalDisk, require_alone
from localdisk.volumes.lvm import VolumeGroup
from localdisk.volumes.removal import remove_or_set_aside


class Replaced:
    """Kept disks of one image; `resources` holds their locks."""

    def __init__(
        self,
        disks: Sequence[LocalDisk],
        policy: Policy,
        pause: Pause,
        resources: ExitStack,
    ) -> None:
        self.disks = disks
        self._policy = policy
        self._pause = pause
        self._resources = resources

    def free_name(self, vg: VolumeGroup, name: str) -> None:
        """If one of the kept disks has this name, rename it.  Raises DependentVolumes."""
        for disk in self.disks:
            lv = vg.find(name)
            if lv and lv.lv_uuid == disk.lv.lv_uuid:
                require_alone(replace(disk, lv=lv), vg.vg_name)
                new_name = new_uuid()
                self._resources.enter_context(lock.holding(lock.disk_lock(new_name), self._pause))
                vg.rename(name, new_name)
                log.event("kept disk renamed", vm=disk.vm_id, disk=name, to=new_name)

    def remove(self) -> None:
        """Remove them: the new disk is complete.  A failure is logged; the next start or gc tries again."""
        for disk in self.disks:
            try:
                for vg, found in self._found(disk):
                    remove_or_set_aside(vg, found, self._policy.retention.erase, self._pause)
                    log.event("replaced disk removed", vm=found.vm_id, disk=found.volume_id)
            except Error as error:
                log.problem("replaced disk is left", vm=disk.vm_id, disk=disk.volume_id, why=error)

    def _found(self, disk: LocalDisk) -> Iterator[tuple[VolumeGroup, LocalDisk]]:
        """The disk as it is now, under its present name, with its group; nothing if it no longer exists."""
        vg = VolumeGroup.read(self._policy.volume_group, self._policy.devices)
        for lv in vg.lvs:
            found = LocalDisk.from_lv(lv) if lv.lv_uuid == disk.lv.lv_uuid else None
            if found and (found.vm_id, found.image_id) == (disk.vm_id, disk.image_id):
                yield vg, found
