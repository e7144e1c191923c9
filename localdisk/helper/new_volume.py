"""A logical volume that a helper makes: its lock, its turn to copy, its space, its progress, its end.

Local disks and template LVs are made the same way: under the lock of their name, UPDATING from the commit
that creates them to the one that says that the copy is complete.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from localdisk import lock, log
from localdisk.config import Policy
from localdisk.errors import Error
from localdisk.frozen import replace
from localdisk.lock import Pause
from localdisk.protocol import Target
from localdisk.units import format_duration, format_size
from localdisk.volumes.disk import LocalDisk, State
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup
from localdisk.volumes.progress import COPYING, PREPARING, STALLED, WAITING, Progress
from localdisk.volumes.removal import remove_or_set_aside


class NewVolume:
    """One volume of the name whose lock is held, for a disk of a VM or for a template."""

    def __init__(
        self, lv_name: str, policy: Policy, held: lock.Lock, resources: ExitStack, **ids: str
    ) -> None:
        """`resources` has the lock; `ids` are those of Progress: vm and image, or template."""
        self.lv_name = lv_name
        self.policy = policy
        self._ids = ids
        self._lock = held
        self._resources = resources
        self._turn = resources.enter_context(ExitStack())
        self._ticket = ""  # of our turn
        self._moved = 0.0  # when the copy last made progress, time.monotonic()
        self._dm_uuid = ""  # of the unfinished volume that we made, "?" while it is being made
        self._began = 0.0  # to copy, time.monotonic()
        self._progress: Progress | None = None
        self._is_unwritable = False  # it could not be written once

    @property
    def log_fields(self) -> Mapping[str, str]:
        """What the log calls it."""
        if "template" in self._ids:
            return {"template": self._ids["template"], "lv": self.lv_name}
        return {"vm": self._ids["vm"], "disk": self.lv_name}

    @property
    def is_made(self) -> bool:
        """Whether there is an unfinished volume, or may be."""
        return bool(self._dm_uuid)

    @property
    def written(self) -> int:
        """Bytes so far."""
        return self._progress.written if self._progress else 0

    @property
    def took(self) -> float:
        """Seconds since the copy began."""
        return max(time.monotonic() - self._began, 0.001)

    def begin_phase(self, phase: str = PREPARING, size: int = 0) -> None:
        """Say to whoever reads the lock that this phase begins now; `size` in bytes of the guest's view."""
        now = int(time.time())
        vm_id, image_id, template = (self._ids.get(name, "") for name in ("vm", "image", "template"))
        self._write(Progress(vm_id, image_id, phase, now, now, size, template=template))

    def begin_turn(self, size: int, pause: Pause) -> None:
        """Wait for a turn to copy."""
        self.begin_phase(WAITING, size)
        self._ticket = self._turn.enter_context(lock.turn(self.policy.copy.parallel, pause))

    def make(
        self, pause: Pause, room: Callable[[], VolumeGroup], make: Callable[[VolumeGroup], None]
    ) -> VolumeGroup:
        """Make the volume; returns the group that `room` has seen.

        `room` looks at the volume group and raises where there is none; `make` creates the volume.
        """
        # Asking for room and taking it is one step on this host.
        with lock.holding(os.path.join(lock.RUN, "space.lock"), pause):
            vg = room()
            self._dm_uuid = "?"
            make(vg)
        self._dm_uuid = vg.dm_uuid(self.lv_name)
        return vg

    def create(
        self, size: int, pause: Pause, room: Callable[[], VolumeGroup], make: Callable[[VolumeGroup], None]
    ) -> Target:
        """Make the volume; returns where it is and how it is to be filled.

        `room` and `make` are those of `make`.
        """
        vg = self.make(pause, room, make)
        self._began = self._moved = time.monotonic()
        self.begin_phase(COPYING, size)
        log.event("copy starts", **self.log_fields, bytes=size, backend=self.policy.backend)
        bandwidth = self.policy.copy.bandwidth
        return Target(
            path=vg.path(self.lv_name),
            dm_uuid=self._dm_uuid,
            zeroed=self.policy.backend == "lvmthin",
            # The limit is the host's: each of the copies that may run at once gets its share.
            bandwidth=max(1, bandwidth // self.policy.copy.parallel) if bandwidth else None,
            nice=self.policy.copy.nice,
        )

    def report_progress(self, done: int, written: int) -> None:
        """The copy has come so far, in bytes of the guest's view and of the volume."""
        old = self._progress
        assert old  # noqa: S101 (since the volume was made)
        now = replace(old, at=int(time.time()), done=min(done, old.size), written=written)
        if (now.done, now.written) == (old.done, old.written):
            self.look_after_turn()
            if self.is_stalled:
                return
        else:
            self._moved = time.monotonic()
            if self.is_stalled:
                now = self._resumed(now)
        self._write(now)
        if int(now.fraction * 10) > int(old.fraction * 10) or now.at // 30 > old.at // 30:
            log.event("copying", **self.log_fields, done=f"{now.fraction:.0%}", **self.speed())

    @property
    def is_stalled(self) -> bool:
        """Whether the copy makes no progress and has given its turn back."""
        return self._progress is not None and self._progress.phase == STALLED

    def look_after_turn(self) -> None:
        """Give the turn back if the copy has made no progress for `copy.stall`; it is not ended.

        What it waits for, storage that hangs, is no reason for others to wait.
        """
        old, stall = self._progress, self.policy.copy.stall
        if old is None or old.phase != COPYING or not (self.is_made and stall):
            return
        idle = int(time.monotonic() - self._moved)
        if idle >= stall:
            self._turn.close()
            self._write(replace(old, phase=STALLED, at=int(time.time()) - idle))
            since = format_duration(idle)
            log.problem("copy stalls, its turn is given back", **self.log_fields, since=since, **self.speed())

    def _resumed(self, now: Progress) -> Progress:
        """The copy makes progress again: it counts as one that has a turn, and does not wait for it.

        Its bytes flow already, and its VM has waited for its turn once; those that come later wait for it.
        """
        self._turn.enter_context(lock.holding(self._ticket, time.sleep))
        log.event("copy goes on", **self.log_fields)
        return replace(now, phase=COPYING)

    def speed(self) -> dict[str, str]:
        """For the log."""
        rate = f"{format_size(int(self.written / self.took))}/s"
        return {"bytes": str(self.written), "took": f"{self.took:.1f}s", "rate": rate}

    def is_ours(self, vg: VolumeGroup, lv: LogicalVolume) -> bool:
        """Whether `lv` is the very volume that we made."""
        made = "LVM-" + (vg.vg_uuid + lv.lv_uuid).replace("-", "")
        return self._dm_uuid in (made, "?")

    def end_turn(self) -> None:
        """The volume is complete, others may copy; the lock stays held."""
        self._dm_uuid = ""
        self._turn.close()

    def remove_unfinished(self, find: Callable[[VolumeGroup], LocalDisk | None]) -> None:
        """Remove what we made and did not finish, others may copy; what cannot be removed now is gc's.

        `find` looks for the volume as something that can be removed.  The lock stays held.
        """
        if self.is_made:
            try:
                vg = VolumeGroup.read(self.policy.volume_group, self.policy.devices)
                found = find(vg)
                if found and found.state is State.UNFINISHED and self.is_ours(vg, found.lv):
                    vg.require_usable()
                    remove_or_set_aside(vg, found, self.policy.retention.erase, time.sleep)
                    log.event("unfinished copy removed", **self.log_fields)
            except Error as error:
                log.problem("unfinished copy is left to gc", **self.log_fields, why=error)
        self.end_turn()

    def release(self) -> None:
        """Let go of the lock."""
        self._resources.close()

    def _write(self, progress: Progress) -> None:
        """A record that cannot be written refuses nothing."""
        self._progress = progress
        try:
            self._lock.write(progress.as_text())
        except OSError as error:
            if not self._is_unwritable:
                log.problem("progress cannot be written", **self.log_fields, why=error.strerror)
            self._is_unwritable = True
