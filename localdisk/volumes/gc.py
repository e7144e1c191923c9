"""Remove what no VM needs: unfinished copies, disks marked for removal, kept ones past their time, and
disks whose VM has stopped unseen.

`decide` is a pure function of what was seen; `collect` looks, decides and acts, one disk at a time, each
under its lock and after looking at it again.  In doubt a disk stays.
"""

from __future__ import annotations

import enum
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from localdisk import cancel, clock, counters, kept, libvirt, lock, log, run
from localdisk.clock import Moment
from localdisk.config import Config, Policy
from localdisk.errors import Error, LibvirtSilent
from localdisk.frozen import frozen, replace
from localdisk.libvirt import Domains
from localdisk.units import format_duration, format_size
from localdisk.volumes import lvm, progress, stale, template
from localdisk.volumes.disk import (
    HOW_TO_DECIDE,
    Age,
    LocalDisk,
    State,
    age_of,
    drifted_tag,
    is_clock_wrong,
    is_left_alone,
    local_disks,
    stopped_tags,
    unneeded_tags,
)
from localdisk.volumes.filling import log_filling
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup
from localdisk.volumes.progress import Progress
from localdisk.volumes.removal import finish, take_away
from localdisk.volumes.template import Template

Elsewhere = frozenset["tuple[str, str]"]  # VM and image id


class Action(enum.Enum):
    KEEP = "keep"
    REMOVE = "remove"
    MARK = "mark"  # as unneeded since now
    UNMARK = "unmark"  # it is needed after all
    STOP = "stop"  # mark as stopped, as the missed stop would have
    DRIFT = "drift"  # mark as drifted, as the missed stop would have
    REST = "rest"  # deactivate a template LV that nobody reads


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


@frozen
class Finding:
    """One disk, what was decided, and what came of it."""

    vg_name: str
    disk: LocalDisk
    verdict: Verdict
    failure: str = ""  # why it could not be done
    template: str = ""  # the volume that a template LV is a copy of, "" for a disk

    @property
    def is_problem(self) -> bool:
        return bool(self.failure) or not self.verdict.is_certain


@frozen
class Collection:
    """One run of gc; `problems` are what it could not look at, one line each."""

    findings: tuple[Finding, ...]
    problems: tuple[str, ...] = ()

    @property
    def is_problem(self) -> bool:
        return bool(self.problems) or any(finding.is_problem for finding in self.findings)


# -- deciding


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
        return Verdict(Action.DRIFT, "its VM ran from another volume, see localdisk status")
    return Verdict(Action.KEEP, "libvirt cannot be asked what its VM ran from", is_certain=False)


def _unless_others_depend(lv: LogicalVolume, verdict: Verdict) -> Verdict:
    """Whatever LVM would remove or deactivate along with ours is not ours."""
    if lv.dependents and verdict.action is Action.REST:
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
        verdict.action is Action.STOP and disk.stopped is None  # not one that is only marked anew
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
    return Verdict(Action.KEEP if disk.unneeded is None else Action.UNMARK, why)


def _decide_stopped(disk: LocalDisk, policy: Policy, now: Moment) -> Verdict:
    age, keep_for = age_of(disk.boot, disk, disk.stopped or 0, now), policy.retention.keep_for
    if age.doubt:
        return _in_doubt(disk, Action.STOP, f"stopped in {age.doubt}", keep_for, now)
    left = keep_for - age.seconds
    if left <= 0:
        return Verdict(Action.REMOVE, f"stopped {format_duration(int(age.seconds))} ago, past keep_for")
    why = f"kept for another {format_duration(int(left))}"
    return _kept(age, Action.STOP, why, now.epoch + left)


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
    mark = disk.stopped if again is Action.STOP else disk.unneeded
    if (mark or 0) > now.epoch or is_clock_wrong(disk, now):
        return Verdict(Action.KEEP, why, is_certain=False)
    why = f"{why}; marked anew, kept for {format_duration(wait)} from now"
    return Verdict(again, why, is_certain=False, due=now.epoch + wait)


def _decide_ready(disk: LocalDisk, witnesses: Witnesses, policy: Policy, now: Moment) -> Verdict:
    """A complete copy, closed, that is not marked as stopped: its VM stopped unseen, or is just starting."""
    if policy.retention.on_stop == "keep":
        kept = format_duration(policy.retention.keep_for)
        why = f"its VM does not run, kept for {kept} from now"
        return Verdict(Action.STOP, why, due=now.epoch + policy.retention.keep_for)
    if not witnesses.may_start:
        return Verdict(Action.REMOVE, "its VM stopped while vdsm did not run")
    return _after_grace(disk, policy, now, Verdict(Action.REMOVE, ""))


def _after_grace(disk: LocalDisk, policy: Policy, now: Moment, then: Verdict) -> Verdict:
    """Mark the disk, and `grace` later do `then`."""
    grace = policy.retention.grace
    if disk.unneeded is None:
        done = "marked as stopped" if then.action is Action.STOP else "removed"
        why = f"no VM needs it; {done} if that is so after {format_duration(grace)}"
        return Verdict(Action.MARK, why, due=now.epoch + grace)
    age = age_of(disk.unneeded_boot, disk, disk.unneeded, now)
    if age.doubt:
        return _in_doubt(disk, Action.MARK, f"unneeded since {age.doubt}", grace, now)
    since = format_duration(int(age.seconds))
    if age.seconds < grace:
        why = f"no VM needs it since {since}, of {format_duration(grace)} (grace)"
        return _kept(age, Action.MARK, why, now.epoch + grace - age.seconds)
    return replace(then, reason=then.reason or f"no VM needs it since {since}, past grace")


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
    return Verdict(Action.REST if found.lv.lv_active else Action.KEEP, left, due=found.used + keep_for)


# -- looking and acting


def collect(
    config: Config,
    dry_run: bool = False,
    may_start: bool = True,
    ran_elsewhere: Callable[[Iterable[str]], Elsewhere] = lambda _vm_ids: frozenset(),
) -> Collection:
    """Look at every local disk of the host and remove what no VM needs.

    `may_start` says whether vdsm can be starting VMs; `ran_elsewhere` reads libvirt's definitions of VMs.
    Raises NoVolumeGroup, CommandFailed and so on where no volume group can be looked at.
    """
    asked = libvirt.ask_domains()
    groups, failed = lvm.read_all(config.volume_groups)
    found_domains, silence = _answer(asked)
    elsewhere = _elsewhere(groups, found_domains, ran_elsewhere)
    findings = tuple(
        finding
        for vg in groups
        for finding in _Group(config, vg, found_domains, may_start, dry_run, elsewhere).collect()
    )
    failures = [*failed, *([silence] if silence and any(not f.verdict.is_certain for f in findings) else [])]
    found = Collection(findings, tuple(map(str, failures)))
    if not dry_run:
        for vg in groups:
            log_filling(vg)
        lock.sweep()
        _look_after_kept(config, groups, is_all=not failed)
        cancel.sweep(may_start)
        _count(found)
    return found


def _answer(asked: libvirt.Question) -> tuple[Domains | None, LibvirtSilent | None]:
    """What libvirt knows, or why it does not say."""
    try:
        return libvirt.read_domains(asked.text()), None
    except LibvirtSilent as error:
        log.problem("gc asks libvirt in vain", why=error)
        return None, error


def _elsewhere(
    groups: Iterable[VolumeGroup], found: Domains | None, ask: Callable[[Iterable[str]], Elsewhere]
) -> Elsewhere | None:
    """What VMs that stopped unseen have not on a local disk, None if that cannot be known."""
    stopped = found.known - found.active if found else frozenset[str]()
    asked = {disk.vm_id for vg in groups for disk in local_disks(vg) if has_run(disk) and not disk.is_open}
    try:
        return ask(asked & stopped) if asked & stopped else frozenset()
    except Error as error:
        log.problem("gc cannot know what VMs ran from", vms=" ".join(sorted(asked & stopped)), why=error)
        return None


_LATER = Verdict(Action.KEEP, "left to the next gc: vdsm waits no longer")


class _GaveUp(Exception):
    """A lock is held."""


def _give_up(_seconds: float) -> None:
    raise _GaveUp


def _look_after_kept(config: Config, groups: tuple[VolumeGroup, ...], is_all: bool) -> None:
    """Mark what somebody was about to mark as stale, and write down anew which VMs have kept disks."""
    for vm_id, images in kept.noted().items():
        try:
            if images:
                stale.mark(config, vm_id, images, _give_up)
        except _GaveUp:  # a process works on one of them; the next gc marks them
            pass
        except Error as error:
            log.problem("kept disks are not marked as stale yet", vm=vm_id, why=error)
    every = (disk for vg in groups for disk in local_disks(vg))
    kept.renew(frozenset(disk.vm_id for disk in every if disk.vm_id and stale.is_usable(disk)), is_all)


def _count(found: Collection) -> None:
    done = [f for f in found.findings if f.verdict.action is Action.REMOVE and not f.failure]
    removed = [f.disk for f in done if not f.template]
    counters.gc_ran(
        removed=len(removed),
        removed_bytes=sum(disk.lv.lv_size for disk in removed),
        is_good=not found.is_problem,
    )


@frozen
class _Group:
    """gc's work on one volume group, as it was at first."""

    config: Config
    vg: VolumeGroup
    domains: Domains | None
    may_start: bool
    dry_run: bool
    elsewhere: Elsewhere | None

    def collect(self) -> Iterator[Finding]:
        held, prepared = lock.held(), progress.read_all()
        for disk in local_disks(self.vg):
            verdict = self._judge(disk, lock.disk_lock(disk.volume_id) in held, self.domains, prepared)
            if verdict.action is Action.KEEP or self.dry_run:
                yield Finding(self.vg.vg_name, disk, verdict)
            elif run.is_spent():
                yield Finding(self.vg.vg_name, disk, _LATER)
            else:
                yield self._act(disk, verdict)
        too_many = template.too_many(self.vg, self.config.cache)
        for found in template.templates(self.vg):
            verdict = self._judge_template(found, lock.disk_lock(found.name) in held, too_many)
            if verdict.action is Action.KEEP or self.dry_run:
                yield self._template(found, verdict)
            elif run.is_spent():
                yield self._template(found, _LATER)
            else:
                yield self._act_on_template(found, verdict, too_many)

    def _judge_template(self, found: Template, is_locked: bool, too_many: frozenset[str]) -> Verdict:
        is_wanted = self.config.caches_templates(self.vg.vg_name)
        keep_for = self.config.cache.keep_for
        return decide_template(found, is_locked, is_wanted, found.name in too_many, keep_for, time.time())

    def _template(self, found: Template, verdict: Verdict, failure: str = "") -> Finding:
        return Finding(self.vg.vg_name, found.disk, verdict, failure, found.volume_id)

    def _act_on_template(self, found: Template, verdict: Verdict, too_many: frozenset[str]) -> Finding:
        """Do what was decided if the template LV still is what it was."""
        aside = ""
        try:
            with lock.trying(lock.disk_lock(found.name)) as held:
                if not held:
                    return self._template(found, Verdict(Action.KEEP, "a process works on it"))
                vg = VolumeGroup.read(self.vg.vg_name, self.vg.devices)
                lv = vg.find(found.name)
                again = Template.from_lv(lv) if lv else None
                if again is None:  # somebody else has just removed it
                    return self._template(found, verdict)
                verdict = self._judge_template(again, False, too_many)
                if verdict.action is Action.REST:
                    vg.require_usable()
                    vg.deactivate(found.name)
                elif verdict.action is Action.REMOVE:
                    vg.require_usable()
                    aside = take_away(vg, again.disk, self.config.retention.erase, time.sleep)
                    if again.is_ready:
                        counters.template_evicted()
                log.event(f"gc: {verdict.action.value}", template=found.volume_id, why=verdict.reason)
            if aside and self.may_start:
                self._finish(aside)
        except Error as error:
            log.problem("gc could not finish", template=found.volume_id, why=error)
            return self._template(found, verdict, str(error))
        return self._template(found, verdict)

    def _judge(
        self, disk: LocalDisk, is_locked: bool, found: Domains | None, prepared: Mapping[str, Progress | None]
    ) -> Verdict:
        witnesses = witnesses_for(disk, is_locked, found, prepared, self.may_start, self.elsewhere)
        return decide(disk, witnesses, self.config.policy(disk.vm_id), clock.now())

    def _act(self, disk: LocalDisk, verdict: Verdict) -> Finding:
        """Do what was decided if the disk still is what it was."""
        name = self.vg.vg_name
        try:
            with lock.trying(lock.disk_lock(disk.volume_id)) as held:
                if not held:
                    return Finding(name, disk, Verdict(Action.KEEP, "a process works on it"))
                vg, again = self._look_again(disk.volume_id)
                if again is None:  # somebody else has just removed it
                    return Finding(name, disk, verdict)
                # Libvirt, too, is asked again: since the first look, the VM may have taken the disk.
                found, prepared = _answer(libvirt.ask_domains())[0], progress.read_all()
                disk, verdict = again, self._judge(again, False, found, prepared)
                aside = self._carry_out(vg, disk, verdict)
            if aside and self.may_start:
                self._finish(aside)
        except Error as error:
            log.problem("gc could not finish", disk=disk.volume_id, action=verdict.action.value, why=error)
            return Finding(name, disk, verdict, failure=str(error))
        return Finding(name, disk, verdict)

    def _look_again(self, volume_id: str) -> tuple[VolumeGroup, LocalDisk | None]:
        vg = VolumeGroup.read(self.vg.vg_name, self.vg.devices)
        lv = vg.find(volume_id)
        return vg, LocalDisk.from_lv(lv) if lv else None

    def _carry_out(self, vg: VolumeGroup, disk: LocalDisk, verdict: Verdict) -> str:
        """Do it; returns the name of a volume that is left to be erased, "" for none."""
        if verdict.action is Action.KEEP:
            return ""
        vg.require_usable()
        aside = ""
        if verdict.action is Action.REMOVE and disk.aside_name == disk.volume_id:
            finish(vg, disk, self.config.retention.erase, time.sleep)
        elif verdict.action is Action.REMOVE:
            aside = take_away(vg, disk, self.config.policy(disk.vm_id).retention.erase, time.sleep)
        else:
            now = clock.now()
            add, remove = {
                Action.MARK: (unneeded_tags(disk, now, verdict.age), disk.unneeded_tags),
                Action.STOP: (stopped_tags(now, verdict.age), disk.idle_tags),
                Action.UNMARK: (frozenset[str](), disk.unneeded_tags),
                Action.DRIFT: (frozenset({drifted_tag(now.epoch)}), disk.idle_tags),
            }[verdict.action]
            vg.change_tags(disk.volume_id, add=add, remove=remove - add)
        log.event(f"gc: {verdict.action.value}", vm=disk.vm_id, disk=disk.volume_id, why=verdict.reason)
        return aside

    def _finish(self, volume_id: str) -> None:
        """Erase and remove what was just set aside, unless another gc is at it by now."""
        with lock.trying(lock.disk_lock(volume_id)) as held:
            vg, disk = self._look_again(volume_id)
            if held and disk and disk.is_aside:
                finish(vg, disk, self.config.retention.erase, time.sleep)


# -- what the operator sees


def as_lines(collection: Collection, dry_run: bool) -> str:
    """One line for each disk: name, VM, size, verdict, reason."""
    return "".join(f"{_line(finding, dry_run)}\n" for finding in collection.findings)


def _line(finding: Finding, dry_run: bool) -> str:
    disk, verdict = finding.disk, finding.verdict
    outcome = f"not {_DONE[verdict.action]}, {finding.failure}" if finding.failure else _DONE[verdict.action]
    if dry_run and verdict.action is not Action.KEEP:
        outcome = f"would be {outcome}"
    name = f"{finding.vg_name}/{disk.volume_id}"
    whose = f"template {finding.template}" if finding.template else f"VM {disk.vm_id or '-'}"
    return f"{name}  {whose}  {format_size(disk.lv.lv_size)}  {outcome}: {verdict.reason}"


_DONE = {
    Action.KEEP: "kept",
    Action.REMOVE: "removed",
    Action.MARK: "marked as unneeded",
    Action.UNMARK: "unmarked",
    Action.STOP: "marked as stopped",
    Action.DRIFT: "marked as drifted",
    Action.REST: "deactivated",
}


def as_json(collection: Collection) -> str:
    """`{"disks": […], "problems": […]}`, an object for each disk, sizes in bytes, and lines of text."""
    rows = [
        {
            "vg": finding.vg_name,
            "volume": finding.disk.volume_id,
            "vm": finding.disk.vm_id,
            "image": finding.disk.image_id,
            "template": finding.template,
            "size": finding.disk.lv.lv_size,
            "action": finding.verdict.action.value,
            "reason": finding.verdict.reason,
            "certain": finding.verdict.is_certain,
            "failure": finding.failure,
        }
        for finding in collection.findings
    ]
    return json.dumps({"disks": rows, "problems": collection.problems}, indent=2) + "\n"
