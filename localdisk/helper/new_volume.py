"""A logical volume while a helper makes it: lock, turn to copy, space, progress, end.

Local disks and template LVs are made the same way, under the lock of their name.  The LVM commit that creates
the volume adds the tag UPDATING; the commit after the complete copy removes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext

from localdisk import lock, log
from localdisk.config import Policy
from localdisk.errors import Error, ThinPoolAtThreshold
from localdisk.frozen import frozen, replace
from localdisk.helper import making_room
from localdisk.lock import Pause
from localdisk.protocol import Target
from localdisk.units import format_duration, format_size
from localdisk.volumes import lvm, room
from localdisk.volumes.local_disk import UPDATING, LocalDisk, State
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup
from localdisk.volumes.progress import COPYING, MAKING_ROOM, PREPARING, STALLED, WAITING, Progress
from localdisk.volumes.removal import remove_or_set_aside
from localdisk.volumes.room import Need, Removable, Seen

_CURRENT = 5.0  # seconds; guests write to a thin pool all the time

Create = Callable[[VolumeGroup], None]  # creates a volume; raises ThinPoolAtThreshold
Context = Callable[[], AbstractContextManager[object]]


@frozen
class Known:
    """A group as it was read, so that a volume may be made in it without reading it again."""

    vg: VolumeGroup
    made: str  # `lock.made_so_far` before it was read
    at: float  # when it was read, of CLOCK_MONOTONIC

    @classmethod
    def read(cls, policy: Policy) -> Known:
        """Read the volume group of a policy."""
        at, made = time.monotonic(), lock.made_so_far()
        return cls(VolumeGroup.read(policy.volume_group, policy.devices), made, at)

    def shows_room(self, need: Need) -> bool:
        """Whether there is room without a removal, and no process of localdisk has made a volume since.

        The caller holds the space lock.
        """
        is_current = self.made == lock.last_made() and time.monotonic() - self.at < _CURRENT
        try:
            return is_current and not room.plan(self.vg, need, Seen())
        except Error:  # it may be mended since
            return False


class NewVolume:
    """One volume, for a disk of a VM or for a template; the lock of its name is held."""

    def __init__(
        self, lv_name: str, policy: Policy, held: lock.Lock, resources: ExitStack, **ids: str
    ) -> None:
        """`resources` holds the lock; `ids` are fields of `Progress`: vm and image, or template."""
        self.lv_name = lv_name
        self.policy = policy
        self._ids = ids
        self._lock = held
        self._resources = resources
        self._turn = resources.enter_context(ExitStack())
        self._ticket = ""  # the lock file of the turn
        self._moved = 0.0  # when the copy last made progress, time.monotonic()
        self._dm_uuid = ""  # of the unfinished volume that we made, "?" while LVM makes it
        self._tags = frozenset[str]()  # with which it was made
        self._began = 0.0  # when the copy began, time.monotonic()
        self._progress: Progress | None = None
        self._is_unwritable = False  # writing the progress has failed before

    @property
    def log_fields(self) -> Mapping[str, str]:
        """The volume and its owner, for the log."""
        if "template" in self._ids:
            return {"template": self._ids["template"], "lv": self.lv_name}
        return {"vm": self._ids["vm"], "disk": self.lv_name}

    @property
    def is_made(self) -> bool:
        """Whether an unfinished volume exists, or may exist."""
        return bool(self._dm_uuid)

    @property
    def dm_uuid(self) -> str:
        """The device-mapper UUID of the unfinished volume."""
        return self._dm_uuid

    @property
    def written(self) -> int:
        """Bytes that the copy has written so far."""
        return self._progress.written if self._progress else 0

    @property
    def took(self) -> float:
        """Seconds since the copy began."""
        return max(time.monotonic() - self._began, 0.001)

    def begin_phase(self, phase: str = PREPARING, size: int = 0) -> None:
        """Write into the lock file that this phase begins now; `size` in bytes of the guest's view."""
        now = int(time.time())
        vm_id, image_id, template = (self._ids.get(name, "") for name in ("vm", "image", "template"))
        self._write(Progress(vm_id, image_id, phase, now, now, size, template=template))

    def begin_turn(self, size: int, pause: Pause) -> None:
        """Wait for a turn to copy."""
        self.begin_phase(WAITING, size)
        self._ticket = self._turn.enter_context(lock.turn(self.policy.copy.parallel, pause))

    def make(
        self,
        need: Need,
        tags: frozenset[str],
        create: Create,
        pause: Pause,
        known: Known | None = None,
        erasing: Context = nullcontext,
    ) -> VolumeGroup:
        """Make the volume when there is room for it; returns the group as it was just before.

        `create` creates the volume, with `tags`.  What is in the way is removed as `room.plan` orders, one
        volume after the other.  The space lock is held from the look for room until the volume is made or a
        volume was removed or set aside.  Neither this lock nor the turn to copy is held while bytes are
        erased; `erasing` is the context of that, for other locks.  If `known` shows that there is room, the
        group is not read again.
        Raises the errors of `room.plan`, `making_room.remove`, `making_room.erase` and `create`.
        """
        planned: tuple[Removable, ...] = ()
        tried = frozenset[str]()
        while True:
            with lock.holding_space(pause):
                if known and not planned and known.shows_room(need):
                    vg = known.vg
                else:
                    vg = VolumeGroup.read(self.policy.volume_group, self.policy.devices)
                seen = making_room.look(vg, need, tried)
                left = room.plan(vg, need, seen)
                planned = planned if planned and left else left
                if not planned:
                    try:
                        self._create(vg, create)
                        break
                    except ThinPoolAtThreshold as refused:
                        planned = room.plan_below_threshold(vg, need, seen, refused)[:1]
                each, *rest = planned
                planned, tried = tuple(rest), tried | {each.lv_uuid}
                aside = making_room.remove(self.policy, each, pause)
            if aside:
                self._erase(vg, each, aside, pause, erasing)
        self._dm_uuid = vg.dm_uuid(self.lv_name)
        self._tags = tags
        return vg

    def _create(self, vg: VolumeGroup, create: Create) -> None:
        self._dm_uuid = "?"
        lock.note_made()
        try:
            create(vg)
        except ThinPoolAtThreshold:
            self._dm_uuid = ""
            raise

    def _erase(
        self,
        vg: VolumeGroup,
        removed: Removable,
        aside: str,
        pause: Pause,
        erasing: Context,
    ) -> None:
        """Wait until a volume is erased, without a turn.

        Afterwards the turn is taken again as it was, as by a copy that makes progress again.
        """
        before = self._progress
        self._turn.close()
        self.begin_phase(MAKING_ROOM, before.size if before else 0)
        with erasing():
            making_room.erase(vg, self.policy, removed, aside, pause)
        if self._ticket:
            self._turn.enter_context(lock.holding(self._ticket, pause))

    def create(
        self,
        size: int,
        need: Need,
        tags: frozenset[str],
        create: Create,
        pause: Pause,
        known: Known | None = None,
        erasing: Context = nullcontext,
    ) -> Target:
        """Make the volume; returns its device, and how to fill it with `size` bytes of the guest's view.

        The other parameters, and the errors, are those of `make`.
        """
        vg = self.make(need, tags, create, pause, known, erasing)
        self._began = self._moved = time.monotonic()
        self.begin_phase(COPYING, size)
        log.event("copy starts", **self.log_fields, bytes=size, backend=self.policy.backend)
        bandwidth = self.policy.copy.bandwidth
        return Target(
            path=vg.path(self.lv_name),
            dm_uuid=self._dm_uuid,
            zeroed=bool(self.policy.pool),
            # `copy.bandwidth` is for the whole host: each of the copies that may run at once gets its share.
            bandwidth=max(1, bandwidth // self.policy.copy.parallel) if bandwidth else None,
            nice=self.policy.copy.nice,
        )

    def report_progress(self, done: int, written: int) -> None:
        """Record the progress: `done` bytes of the guest's view, `written` bytes written to the volume."""
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
        """If the copy has made no progress for `copy.stall`, give its turn to another copy; do not end it.

        Its storage hangs; copies from other storage need not wait for that.
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
        """The copy makes progress again: it counts as a copy with a turn, and need not wait for a turn again.

        It is copying already, and has waited for its turn once; later copies wait for it.
        """
        self._turn.enter_context(lock.holding(self._ticket, time.sleep))
        log.event("copy continues", **self.log_fields)
        return replace(now, phase=COPYING)

    def speed(self) -> dict[str, str]:
        """Bytes written, time and rate of the copy, for the log."""
        rate = f"{format_size(int(self.written / self.took))}/s"
        return {"bytes": str(self.written), "took": f"{self.took:.1f}s", "rate": rate}

    def make_ready(self, vg: VolumeGroup) -> bool:
        """Remove the tags of an unfinished volume; False if LVM does not say that it has done so.

        LVM does nothing if the volume of our name is not the one that we made, or has lost a tag.
        """
        lv_uuid = lvm.uuid_of(self._dm_uuid)
        unfinished = {tag for tag in self._tags if tag == UPDATING or tag.startswith("WRITES_")}
        return vg.remove_tags(self.lv_name, lv_uuid, unfinished, having=self._tags)

    def is_ours(self, vg: VolumeGroup, lv: LogicalVolume) -> bool:
        """Whether `lv` is the volume that we made, not another volume of the same name."""
        made = "LVM-" + (vg.vg_uuid + lv.lv_uuid).replace("-", "")
        return self._dm_uuid in (made, "?")

    def end_turn(self) -> None:
        """The volume is complete or removed: let others copy.  The lock is kept."""
        self._dm_uuid = ""
        self._turn.close()

    def remove_unfinished(self, find: Callable[[VolumeGroup], LocalDisk | None]) -> None:
        """Remove the unfinished volume, if there is one, and let others copy.  The lock is kept.

        `find` finds the volume in the group.  If it cannot be removed now, gc removes it later.
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
        """Release the lock."""
        self._resources.close()

    def _write(self, progress: Progress) -> None:
        """Write the progress into the lock file; a failure is logged once and refuses nothing."""
        self._progress = progress
        try:
            self._lock.write(progress.as_text())
        except OSError as error:
            if not self._is_unwritable:
                log.problem("progress cannot be written", **self.log_fields, why=error.strerror)
            self._is_unwritable = True
