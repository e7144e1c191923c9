"""What gc does with a local disk or a template LV: pure functions of what was seen.

In doubt a disk is kept.  `gc.py` looks and carries out; `status` shows what gc would do.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from localdisk.clock import Moment
from localdisk.config import Policy
from localdisk.frozen import frozen, replace
from localdisk.libvirt import Domains
from localdisk.units import format_duration
from localdisk.volumes.disk import HOW_TO_DECIDE, Age, LocalDisk, State, age_of, is_clock_wrong, is_left_alone
from localdisk.volumes.lvm import LogicalVolume
from localdisk.volumes.progress import Progress
from localdisk.volumes.template import Template

Elsewhere = frozenset["tuple[str, str]"]  # VM and image id


class Action(enum.Enum):
    """The values are those of `gc --json` (schema/gc.schema.json)."""

    KEEP = "keep"
    REMOVE = "remove"
    MARK_UNNEEDED = "mark_unneeded"  # since now no VM needs it
    CLEAR_MARK = "clear_mark"  # it is needed after all
    MARK_STOPPED = "mark_stopped"  # as the missed stop would have marked it
    MARK_DRIFTED = "mark_drifted"  # as the missed stop would have marked it
    DEACTIVATE = "deactivate"  # a template LV that nobody reads

    @property
    def words(self) -> str:
        """For the log."""
        return self.value.replace("_", " ")


@frozen
class Witnesses:
    """What speaks for a disk."""

    is_locked: bool  # a process works on it
    vm_runs: bool | None  # or is paused; None: libvirt could not be asked
    may_start: bool  # vdsm may be starting its VM just now
    vm_is_defined: bool = (
        False  # in libvirt, but does not run: vdsm may have prepared this disk for its start
    )
    vm_is_prepared: bool = False  # a process works on another disk of its VM
    ran_elsewhere: bool | None = (
        False  # by libvirt's definition of its VM, which does not run; None: not known
    )


@frozen
class Verdict:
    action: Action
    reason: str
    is_certain: bool = True  # False: a witness could not be asked, or the clock is wrong
    due: float | None = None  # seconds since the epoch; kept until then as far as can be seen now
    age: float = 0  # of the mark that is made, in seconds


def decide(disk: LocalDisk, witnesses: Witnesses, policy: Policy, now: Moment) -> Verdict:
    """What to do with `disk`.

    Never removed: what is open, locked, or of a VM that runs, is being prepared, or cannot be asked about;
    what other volumes depend on; an older hook's disk about which the operator has not decided.

    A VM that libvirt knows and that does not run needs nothing: vdsm leaves its placeholder behind if it is
    restarted during a start, and the domain of a VM that is shut off until the engine destroys it.  But vdsm
    may be starting it.  So a complete disk of such a VM, and one that nothing says to be given up, is not
    removed on one look: the first marks it, one that is at least `grace` later removes it, unless no VM can
    be starting: then vdsm waits for us, and what must be erased is left to the next gc.
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


def has_run(disk: LocalDisk) -> bool:
    """Whether its VM may have run from it last, and no stop has been seen since."""
    return disk.state is State.READY and not disk.is_stale


def _drifted(is_certain: bool | None) -> Verdict:
    """The VM stopped unseen, as when the host crashed; libvirt has its definition until vdsm destroys it."""
    if is_certain:
        return Verdict(Action.MARK_DRIFTED, "its VM ran from another volume, see localdisk status")
    return Verdict(Action.KEEP, "libvirt cannot be asked what its VM ran from", is_certain=False)


def _unless_others_depend(lv: LogicalVolume, verdict: Verdict) -> Verdict:
    """Whatever LVM would remove or deactivate along with ours is not ours."""
    if lv.dependents and verdict.action is Action.DEACTIVATE:
        return replace(verdict, action=Action.KEEP)
    if verdict.action is not Action.REMOVE or not lv.dependents:
        return verdict
    why = f"{verdict.reason}, but LVM would remove {', '.join(lv.dependents)} along with it"
    return Verdict(Action.KEEP, why, is_certain=False)


def _decide_idle(disk: LocalDisk, witnesses: Witnesses, policy: Policy, now: Moment) -> Verdict:
    if disk.state is State.UNFINISHED:
        return Verdict(Action.REMOVE, "unfinished copy that nobody works on")
    if disk.is_aside and not witnesses.may_start:
        return Verdict(Action.KEEP, "set aside, the next gc erases it: vdsm does not wait for that")
    if disk.is_aside:
        return Verdict(Action.REMOVE, "set aside to be erased")
    if disk.state is State.DELETING:
        return Verdict(Action.REMOVE, "marked for removal when its VM stopped")
    if disk.state is State.STOPPED:
        verdict = _decide_stopped(disk, policy, now)
    else:
        verdict = _decide_ready(disk, witnesses, policy, now)
    is_final = verdict.action is Action.REMOVE or (
        verdict.action is Action.MARK_STOPPED and disk.stopped is None  # not one that is only marked anew
    )
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
    """What speaks for `disk`.

    `found` is what libvirt knows, None if it does not say; `prepared` is `progress.read_all`; `elsewhere` are
    the images that their VMs, which do not run, have not on a local disk by libvirt's definition.
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


def _decide_stopped(disk: LocalDisk, policy: Policy, now: Moment) -> Verdict:
    age, keep_for = age_of(disk.boot, disk, disk.stopped or 0, now), policy.retention.keep_for
    if age.doubt:
        return _in_doubt(disk, Action.MARK_STOPPED, f"stopped in {age.doubt}", keep_for, now)
    left = keep_for - age.seconds
    if left <= 0:
        return Verdict(Action.REMOVE, f"stopped {format_duration(int(age.seconds))} ago, past keep_for")
    why = f"kept for another {format_duration(int(left))}"
    return _kept(age, Action.MARK_STOPPED, why, now.epoch + left)


def _kept(age: Age, again: Action, why: str, due: float) -> Verdict:
    """Not removed yet; the mark is made anew where the clock has been set forward since."""
    if age.is_late:
        return Verdict(again, f"{why}; the clock was set since it was marked", due=due, age=age.seconds)
    return Verdict(Action.KEEP, why, due=due)


def _in_doubt(disk: LocalDisk, again: Action, why: str, wait: int, now: Moment) -> Verdict:
    """Kept.  A mark that is too early is made anew, as of now: that only keeps the disk longer.

    One in the future is not, nor is any while the clock is wrong: the new mark would be too early once it is
    right again.
    """
    mark = disk.stopped if again is Action.MARK_STOPPED else disk.unneeded
    if (mark or 0) > now.epoch or is_clock_wrong(disk, now):
        return Verdict(Action.KEEP, why, is_certain=False)
    why = f"{why}; marked anew, kept for {format_duration(wait)} from now"
    return Verdict(again, why, is_certain=False, due=now.epoch + wait)


def _decide_ready(disk: LocalDisk, witnesses: Witnesses, policy: Policy, now: Moment) -> Verdict:
    """A complete copy, closed, that is not marked as stopped: its VM stopped unseen, or is just starting."""
    if policy.retention.on_stop == "keep":
        kept = format_duration(policy.retention.keep_for)
        why = f"its VM does not run, kept for {kept} from now"
        return Verdict(Action.MARK_STOPPED, why, due=now.epoch + policy.retention.keep_for)
    if not witnesses.may_start:
        return Verdict(Action.REMOVE, "its VM stopped while vdsm did not run")
    return _after_grace(disk, policy, now, Verdict(Action.REMOVE, ""))


def _after_grace(disk: LocalDisk, policy: Policy, now: Moment, then: Verdict) -> Verdict:
    """Mark the disk, and `grace` later do `then`."""
    grace = policy.retention.grace
    if disk.unneeded is None:
        done = "marked as stopped" if then.action is Action.MARK_STOPPED else "removed"
        why = f"no VM needs it; {done} if that is so after {format_duration(grace)}"
        return Verdict(Action.MARK_UNNEEDED, why, due=now.epoch + grace)
    age = age_of(disk.unneeded_boot, disk, disk.unneeded, now)
    if age.doubt:
        return _in_doubt(disk, Action.MARK_UNNEEDED, f"unneeded since {age.doubt}", grace, now)
    since = format_duration(int(age.seconds))
    if age.seconds < grace:
        why = f"no VM needs it since {since}, of {format_duration(grace)} (grace)"
        return _kept(age, Action.MARK_UNNEEDED, why, now.epoch + grace - age.seconds)
    return replace(then, reason=then.reason or f"no VM needs it since {since}, past grace")


# -- template LVs


def decide_template(
    found: Template, is_locked: bool, is_wanted: bool, is_too_much: bool, keep_for: int, now: float
) -> Verdict:
    """What to do with a template LV; `keep_for` in seconds since its last use.

    Never removed: what is open or locked, or what other volumes depend on.  No disk needs one: it only saves
    the next start a copy.
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
        return Verdict(Action.REMOVE, "the cache is larger than cache.max_size, and others were used later")
    since = now - found.used
    if since < 0:
        return Verdict(Action.KEEP, "used in the future, the clock went backwards", is_certain=False)
    if since >= keep_for:
        return Verdict(Action.REMOVE, f"not used for {format_duration(int(since))}, past cache.keep_for")
    left = f"kept for another {format_duration(int(keep_for - since))}"
    return Verdict(Action.DEACTIVATE if found.lv.lv_active else Action.KEEP, left, due=found.used + keep_for)
