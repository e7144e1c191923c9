"""Decides what gc does with a local disk or a template LV: pure functions of what gc has read.

On any doubt a disk is kept.  `gc.py` reads and carries out the verdicts; `status` shows what gc would do.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

from localdisk.clock import Moment
from localdisk.config import Policy
from localdisk.frozen import frozen, replace
from localdisk.libvirt import Domains
from localdisk.units import format_duration
from localdisk.volumes.local_disk import (
    HOW_TO_DECIDE,
    Age,
    LocalDisk,
    State,
    age_of,
    is_clock_wrong,
    is_left_alone,
)
from localdisk.volumes.lvm import LogicalVolume
from localdisk.volumes.progress import Progress
from localdisk.volumes.template import Template

Elsewhere = frozenset["tuple[str, str]"]  # (VM id, image id) of disks that ran from another volume


class Action(enum.Enum):
    """The values are those of `gc --json` (schema/gc.schema.json)."""

    KEEP = "keep"
    REMOVE = "remove"
    MARK_UNNEEDED = "mark_unneeded"  # no VM seems to need the disk, from now on
    CLEAR_MARK = "clear_mark"  # the disk is marked as unneeded, but a VM needs it
    MARK_STOPPED = "mark_stopped"  # as the stop would have marked it that was not reported
    MARK_DRIFTED = "mark_drifted"  # likewise
    DEACTIVATE = "deactivate"  # a template LV that no process reads

    @property
    def words(self) -> str:
        """The action in words, for the log."""
        return self.value.replace("_", " ")


@frozen
class Witnesses:
    """What is known, besides its tags, about whether a disk is needed."""

    is_locked: bool  # a process works on the disk
    vm_runs: bool | None  # whether its VM runs or is paused; None: libvirt did not answer
    may_start: bool  # whether vdsm can be starting VMs just now
    vm_is_defined: bool = False  # libvirt knows the VM, which may be starting
    vm_is_prepared: bool = False  # a process works on another disk of its VM
    # Whether the VM, which no longer runs, ran from another volume, by libvirt's definition; None: not known.
    ran_elsewhere: bool | None = False


@frozen
class Verdict:
    action: Action
    reason: str
    is_certain: bool = True  # False: something is not known, or the clock is or was wrong
    due: float | None = None  # until when the disk is probably kept; seconds since the epoch
    age: float = 0  # of a mark that is made: seconds before now


def decide(disk: LocalDisk, witnesses: Witnesses, policy: Policy, now: Moment) -> Verdict:
    """What gc does with `disk`.

    A disk is never removed if it is open or locked; if its VM runs or is being prepared; if libvirt did not
    answer; if other volumes depend on it; or if it is an older hook's disk and the operator has not decided.

    A VM that libvirt knows, and that does not run, may need its disks or not.  It may be starting.  Or
    nothing will ever use it: a vdsm that was restarted during a start leaves the VM's placeholder, and a VM
    that was shut off stays defined until the engine destroys it.  So if the disk is complete and its VM is
    known, or if no stop was reported, two runs of gc are needed: the first one marks the disk, one at least
    `grace` later removes it.

    With `may_start` false (before vdsm starts), no VM can be starting, so one run is enough.  But vdsm waits
    for this gc: disks that must be erased are left to the next one.

    A host may boot with a wrong date.  So if the host has booted since a disk was marked as stopped, two runs
    must see that `keep_for` is over, too.
    """
    if disk.is_open:
        return _needed(disk, "in use, its device is open")
    if witnesses.is_locked:
        return Verdict(Action.KEEP, "a process works on it")
    if disk.state is State.DRIFTED:
        return Verdict(Action.KEEP, "it has data of its VM that shared storage lacks, see localdisk status")
    if witnesses.vm_runs is None:
        return Verdict(Action.KEEP, "libvirt cannot be asked about its VM", is_certain=False)
    if witnesses.vm_runs:
        return _needed(disk, "its VM runs")
    if witnesses.vm_is_prepared:
        return _needed(disk, "another disk of its VM is being prepared")
    if has_run(disk) and witnesses.vm_is_defined and witnesses.ran_elsewhere is not False:
        return _drifted(witnesses.ran_elsewhere)
    if is_left_alone(disk, policy.retention):
        return Verdict(Action.KEEP, f"an older hook's disk; {HOW_TO_DECIDE}")
    return _unless_others_depend(disk.lv, _decide_idle(disk, witnesses, policy, now))


def depends_on_vms(disk: LocalDisk, alone: Verdict) -> bool:
    """Whether libvirt's answer can change what gc does with `disk`; `alone`: the verdict if it knew no VM.

    That a VM runs, or is known, only ever keeps a disk or takes a mark back.
    """
    if disk.is_open or disk.is_aside or disk.state is State.DRIFTED:
        return False
    is_kept = alone.action is Action.KEEP and alone.is_certain and disk.unneeded is None
    return has_run(disk) or not is_kept


def has_run(disk: LocalDisk) -> bool:
    """Whether its VM may have run from the disk, and no stop was reported since."""
    return disk.state is State.READY and not disk.is_stale


def may_have_drifted(disks: Iterable[LocalDisk], found: Domains | None) -> frozenset[str]:
    """The VMs of which libvirt must be asked what they ran from: they stopped, and no stop was reported."""
    stopped = found.known - found.active if found else frozenset[str]()
    return stopped.intersection(disk.vm_id for disk in disks if has_run(disk) and not disk.is_open)


def _drifted(is_certain: bool | None) -> Verdict:
    """The VM stopped without a report, as in a crash of the host; libvirt still has its definition."""
    if is_certain:
        return Verdict(Action.MARK_DRIFTED, "its VM ran from another volume, see localdisk status")
    return Verdict(Action.KEEP, "libvirt cannot be asked what its VM ran from", is_certain=False)


def _unless_others_depend(lv: LogicalVolume, verdict: Verdict) -> Verdict:
    """The verdict, but keep a volume if LVM would remove or deactivate other volumes with it."""
    if lv.dependents and verdict.action is Action.DEACTIVATE:
        return replace(verdict, action=Action.KEEP)
    if verdict.action is not Action.REMOVE or not lv.dependents:
        return verdict
    why = f"{verdict.reason}, but LVM would remove {', '.join(lv.dependents)} with it"
    return Verdict(Action.KEEP, why, is_certain=False)


def _decide_idle(disk: LocalDisk, witnesses: Witnesses, policy: Policy, now: Moment) -> Verdict:
    if disk.state is State.UNFINISHED:
        return Verdict(Action.REMOVE, "unfinished copy that nobody works on")
    if disk.is_aside and not witnesses.may_start:
        return Verdict(Action.KEEP, "set aside; the next gc erases it, because vdsm waits for this one")
    if disk.is_aside:
        return Verdict(Action.REMOVE, "set aside to be erased")
    if disk.state is State.DELETING:
        return Verdict(Action.REMOVE, "marked for removal when its VM stopped")
    if disk.state is State.STOPPED:
        return _decide_stopped(disk, witnesses, policy, now)
    verdict = _decide_ready(disk, witnesses, policy, now)
    is_final = verdict.action in (Action.REMOVE, Action.MARK_STOPPED)
    if is_final and witnesses.vm_is_defined and witnesses.may_start:
        return _after_grace(disk, policy, now, verdict)
    return verdict


def witnesses_for(
    disk: LocalDisk,
    is_locked: bool,
    found: Domains | None,
    prepared: Mapping[str, Progress | None],
    may_start: bool = True,
    elsewhere: Elsewhere | None = frozenset(),
) -> Witnesses:
    """What is known about `disk` from these sources.

    `found`: the domains that libvirt knows, None if it did not answer.  `prepared`: `progress.read_all`.
    `elsewhere`: the disks of stopped VMs that are not on a local disk, by libvirt's definition.
    """
    if disk.is_aside:
        return Witnesses(is_locked, False, may_start)
    if found is None:
        return Witnesses(is_locked, None, may_start)
    others = {record.vm for volume, record in prepared.items() if record and volume != disk.volume_id}
    return Witnesses(
        is_locked,
        disk.vm_id in found.active,
        may_start,
        vm_is_defined=disk.vm_id in found.known,
        vm_is_prepared=disk.vm_id in others,
        ran_elsewhere=None if elsewhere is None else (disk.vm_id, disk.image_id) in elsewhere,
    )


def _needed(disk: LocalDisk, why: str) -> Verdict:
    return Verdict(Action.KEEP if disk.unneeded is None else Action.CLEAR_MARK, why)


def _decide_stopped(disk: LocalDisk, witnesses: Witnesses, policy: Policy, now: Moment) -> Verdict:
    age, keep_for = age_of(disk.boot, disk, disk.stopped or 0, now), policy.retention.keep_for
    if age.doubt:
        return _in_doubt(disk, Action.MARK_STOPPED, f"marked as stopped {age.doubt}", keep_for, now)
    left = keep_for - age.seconds
    if left <= 0:
        over = Verdict(Action.REMOVE, f"stopped {format_duration(int(age.seconds))} ago, past keep_for")
        if not (age.has_booted or (witnesses.vm_is_defined and witnesses.may_start)):
            return over
        if (disk.unneeded or 0) > now.epoch:  # marked by a wrong date, which was corrected
            return Verdict(Action.CLEAR_MARK, over.reason, due=now.epoch + policy.retention.grace)
        return _after_grace(disk, policy, now, over)
    why = f"kept for another {format_duration(int(left))}"
    verdict = _kept(age, Action.MARK_STOPPED, why, now.epoch + left)
    # A mark UNNEEDED was made by another date, or by another keep_for.
    is_outdated = verdict.action is Action.KEEP and disk.unneeded is not None
    return replace(verdict, action=Action.CLEAR_MARK) if is_outdated else verdict


def _kept(age: Age, again: Action, why: str, due: float) -> Verdict:
    """Keep the disk; if the clock was set forward since it was marked, correct the mark's time (`again`)."""
    if age.is_late:
        return Verdict(again, f"{why}; the clock was set since it was marked", due=due, age=age.seconds)
    return Verdict(Action.KEEP, why, due=due)


def _in_doubt(disk: LocalDisk, again: Action, why: str, wait: int, now: Moment) -> Verdict:
    """Keep the disk; if its mark is too early, replace it by a mark of now, which only keeps the disk longer.

    If the mark is in the future, or the clock is wrong now, it is not replaced: once the clock is right
    again, a new mark would be too early.
    """
    mark = disk.stopped if again is Action.MARK_STOPPED else disk.unneeded
    if (mark or 0) > now.epoch or is_clock_wrong(disk, now):
        return Verdict(Action.KEEP, why, is_certain=False)
    why = f"{why}; marked again, kept for {format_duration(wait)} from now"
    return Verdict(again, why, is_certain=False, due=now.epoch + wait)


def _decide_ready(disk: LocalDisk, witnesses: Witnesses, policy: Policy, now: Moment) -> Verdict:
    """A complete, closed disk without the mark STOPPED: no stop was reported, or its VM is just starting."""
    if policy.retention.on_stop == "keep":
        kept = format_duration(policy.retention.keep_for)
        why = f"its VM does not run, kept for {kept} from now"
        return Verdict(Action.MARK_STOPPED, why, due=now.epoch + policy.retention.keep_for)
    if not witnesses.may_start:
        return Verdict(Action.REMOVE, "its VM stopped while vdsm did not run")
    return _after_grace(disk, policy, now, Verdict(Action.REMOVE, ""))


def _after_grace(disk: LocalDisk, policy: Policy, now: Moment, then: Verdict) -> Verdict:
    """Mark the disk as unneeded; if it was marked at least `grace` ago, do `then`."""
    grace = policy.retention.grace
    if disk.unneeded is None:
        done = "marked as stopped" if then.action is Action.MARK_STOPPED else "removed"
        why = f"no VM needs it; {done} if that is so after {format_duration(grace)}"
        return Verdict(Action.MARK_UNNEEDED, why, due=now.epoch + grace)
    age = age_of(disk.unneeded_boot, disk, disk.unneeded, now)
    if age.doubt:
        return _in_doubt(disk, Action.MARK_UNNEEDED, f"marked as unneeded {age.doubt}", grace, now)
    since = format_duration(int(age.seconds))
    if age.seconds < grace:
        why = f"no VM needs it since {since}, of {format_duration(grace)} (grace)"
        return _kept(age, Action.MARK_UNNEEDED, why, now.epoch + grace - age.seconds)
    return replace(then, reason=then.reason or f"no VM needs it since {since}, past grace")


# -- template LVs


def decide_template(
    found: Template, is_locked: bool, is_wanted: bool, is_too_much: bool, keep_for: int, now: float
) -> Verdict:
    """What gc does with a template LV; `keep_for`: seconds since its last use.

    A template LV is never removed if it is open or locked, or if other volumes depend on it.  No local disk
    needs its template LV: without it, the next start has more to copy.
    """
    if found.is_open:
        return Verdict(Action.KEEP, "in use, its device is open")
    if is_locked:
        return Verdict(Action.KEEP, "a process works on it")
    verdict = _decide_idle_template(found, is_wanted, is_too_much, keep_for, now)
    return _unless_others_depend(found.lv, verdict)


def _decide_idle_template(
    found: Template, is_wanted: bool, is_too_much: bool, keep_for: int, now: float
) -> Verdict:
    if not found.is_ready:
        return Verdict(Action.REMOVE, "unfinished copy that nobody works on")
    if not found.is_as_made:
        return Verdict(Action.REMOVE, "writable, or without its tags: no disk would start from it")
    if not is_wanted:
        return Verdict(Action.REMOVE, "cache.templates is off")
    if is_too_much:
        return Verdict(
            Action.REMOVE, "the cache is larger than cache.max_size, and this is its least recently used"
        )
    since = now - found.used
    if since < 0:
        return Verdict(
            Action.KEEP, "its last use is in the future, the clock went backwards", is_certain=False
        )
    if since >= keep_for:
        return Verdict(Action.REMOVE, f"not used for {format_duration(int(since))}, past cache.keep_for")
    left = f"kept for another {format_duration(int(keep_for - since))}"
    return Verdict(Action.DEACTIVATE if found.lv.lv_active else Action.KEEP, left, due=found.used + keep_for)
