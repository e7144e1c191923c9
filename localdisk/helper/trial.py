"""The helper's half of the trial that `check` runs: makes a tiny volume as a start makes a disk.

`hook/rehearsal.py` is the hook's half, and writes to the volume.  The volume has the tags of an unfinished
disk of a VM that does not exist, and its lock is held: if `check` is killed, gc removes the volume as it
removes every unfinished disk.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from localdisk import lock
from localdisk.config import Policy
from localdisk.errors import NoSpace, ThinPoolAtThreshold, ThinPoolFull
from localdisk.helper.new_volume import NewVolume
from localdisk.ids import NOBODY, new_uuid
from localdisk.protocol import Device
from localdisk.volumes import local_disk, room
from localdisk.volumes.local_disk import LocalDisk
from localdisk.volumes.lvm import VolumeGroup
from localdisk.volumes.removal import remove_or_set_aside
from localdisk.volumes.room import Need, NewLv

SIZE = 1 << 20  # bytes; LVM rounds up to one extent
_TAGS = local_disk.new_tags(NOBODY, NOBODY, "0" * 32, SIZE)


class Trial:
    """The volume of one trial, in the volume group and with the backend of a policy."""

    def __init__(self, policy: Policy, pause: lock.Pause) -> None:
        self._policy = policy
        self._pause = pause
        name = new_uuid()
        with ExitStack() as stack:
            held = stack.enter_context(lock.holding(lock.disk_lock(name), pause))
            self._new_volume = NewVolume(name, policy, held, stack.pop_all(), vm=NOBODY, image=NOBODY)
        self._new_volume.begin_phase()

    def make(self) -> Device | None:
        """Make the volume.

        None if there is no room, but volumes that a start would remove for room: a trial removes nothing.
        Raises the errors that a start would raise.
        """
        name, policy = self._new_volume.lv_name, self._policy
        need = Need(policy, (NewLv(SIZE, SIZE),), is_trial=True)
        try:
            vg = self._new_volume.make(need, _TAGS, self._create, self._pause)
        except (NoSpace, ThinPoolFull, ThinPoolAtThreshold):
            if room.can_be_made(self._read(), need):
                return None
            raise
        return Device(vg.path(name), vg.dm_uuid(name))

    def _create(self, vg: VolumeGroup) -> None:
        name = self._new_volume.lv_name
        if self._policy.pool:
            vg.create_thin(name, SIZE, self._policy.pool, _TAGS)
        else:
            vg.create_thick(name, SIZE, _TAGS)

    def remove(self) -> None:
        """Remove the volume.  Raises DiskBusy, CommandFailed."""
        vg = self._read()
        found = self._find(vg)
        if found and self._new_volume.is_ours(vg, found.lv):
            remove_or_set_aside(vg, found, "none", time.sleep)
        self._new_volume.end_turn()

    def close(self) -> None:
        """Remove the volume if `remove` has not, and release its lock; if that fails, gc removes it."""
        self._new_volume.remove_unfinished(self._find)
        self._new_volume.release()

    def _read(self) -> VolumeGroup:
        return VolumeGroup.read(self._policy.volume_group, self._policy.devices)

    def _find(self, vg: VolumeGroup) -> LocalDisk | None:
        lv = vg.find(self._new_volume.lv_name)
        return LocalDisk.from_lv(lv) if lv else None
