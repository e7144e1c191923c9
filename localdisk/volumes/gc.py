"""The mode gc: removes unfinished copies, disks that are to be removed, kept disks whose time is over, disks
whose VM stopped without a report, and template LVs that are no longer worth their room.

Local disks and template LVs are treated alike.  `verdict.py` decides about each of them, from one report of
its volume group, and asks libvirt only if that can change anything: about disks that are open, or kept for
their time, it cannot.  Volumes to be changed are taken in batches: all of a batch are locked, decided about
again from a second report, and changed with one LVM command for each kind of change.  A disk that must be
erased is set aside with its batch, and erased after all batches, without their locks.  On any doubt a disk is
kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from localdisk import cancel, clock, counters, kept, libvirt, lock, log, ready, run
from localdisk.clock import Moment
from localdisk.config import Config
from localdisk.errors import CommandFailed, Error, LibvirtSilent, RunUnwritable
from localdisk.frozen import frozen, replace
from localdisk.libvirt import Domains
from localdisk.units import format_size
from localdisk.volumes import lvm, progress, removal, stale, template
from localdisk.volumes.filling import log_filling
from localdisk.volumes.local_disk import (
    LocalDisk,
    State,
    drifted_tag,
    local_disks,
    stopped_tags,
    unneeded_tags,
)
from localdisk.volumes.lvm import VolumeGroup
from localdisk.volumes.verdict import (
    Action,
    Elsewhere,
    Verdict,
    decide,
    decide_template,
    depends_on_vms,
    may_have_drifted,
    witnesses_for,
)

BATCH = 50  # volumes that are locked and changed at once; a start that needs one of them waits for all
GAP = 0.5  # seconds between two erases
ERASING = "gc.lock"  # held by the gc that erases what is set aside

_LATER = Verdict(Action.KEEP, "left to the next gc, because vdsm does not wait longer for this one")
_NO_VMS = Domains(known=frozenset(), active=frozenset())
_Tags = frozenset[str]


@frozen
class Finding:
    """One local disk or template LV, what was decided about it, and whether that failed."""

    vg_name: str
    disk: LocalDisk  # of a template LV: `Template.disk`
    verdict: Verdict
    failure: str = ""  # why it could not be done
    template: str = ""  # the volume that a template LV is a copy of, "" for a disk

    @property
    def name(self) -> str:
        """Of the logical volume."""
        return self.disk.volume_id

    @property
    def log_fields(self) -> Mapping[str, str]:
        """The volume and its owner, for the log."""
        if self.template:
            return {"template": self.template, "lv": self.name}
        return {"vm": self.disk.vm_id, "disk": self.name}

    @property
    def is_problem(self) -> bool:
        return bool(self.failure) or not self.verdict.is_certain


@frozen
class Collection:
    """One run of gc; `problems`: why something could not be read, one line each."""

    findings: tuple[Finding, ...]
    problems: tuple[str, ...] = ()

    @property
    def is_problem(self) -> bool:
        return bool(self.problems) or any(finding.is_problem for finding in self.findings)


# -- deciding and carrying out


def collect(
    config: Config,
    dry_run: bool = False,
    may_start: bool = True,
    ran_elsewhere: Callable[[Iterable[str]], Elsewhere] = lambda _vm_ids: frozenset(),
) -> Collection:
    """Decide about every local disk and template LV of this host, and carry the decisions out.

    `dry_run`: change nothing.  `may_start`: whether vdsm can be starting VMs.  `ran_elsewhere`: for stopped
    VMs, reads in libvirt's definitions which of their disks are not on a local disk. Raises NoVolumeGroup,
    CommandFailed and so on if no volume group can be read.
    """
    kept_seen = kept.times()
    groups, failed = lvm.read_all(config.volume_groups)
    judge = _Judge(config, may_start, ran_elsewhere)
    findings, silence = judge.look(groups, lock.held())
    if not dry_run:
        findings = tuple(each for vg in groups for each in _Group(judge, vg).carry_out(findings))
    failures = [*failed, *([silence] if silence and any(not f.verdict.is_certain for f in findings) else [])]
    found = Collection(findings, tuple(map(str, failures)))
    if not dry_run:
        for vg in groups:
            log_filling(vg)
        lock.sweep()
        _look_after_kept(config, groups, not failed, kept_seen)
        if not failed:
            _look_after_ready(groups)
        cancel.sweep(may_start)
        _count(found)
    return found


def _answer(asked: libvirt.Question) -> tuple[Domains | None, LibvirtSilent | None]:
    """The domains that libvirt knows, or the error if it did not answer."""
    try:
        return libvirt.read_domains(asked.text()), None
    except LibvirtSilent as error:
        log.problem("libvirt does not answer gc", why=error)
        return None, error


class _GaveUp(Exception):
    """A lock is held."""


def _give_up(_seconds: float) -> None:
    raise _GaveUp


def _look_after_kept(
    config: Config, groups: tuple[VolumeGroup, ...], is_all: bool, seen: Mapping[str, int]
) -> None:
    """Mark the disks that a killed process was about to mark as stale; record again who has kept disks.

    `groups` may have been read hours ago, before an erase; `seen` is that of `kept.renew`.
    """
    names = [vg.vg_name for vg in groups]
    for vm_id, doubts in kept.noted().items():
        try:
            if any(kept.images_in(doubts, name) for name in names):
                stale.mark(config, vm_id, (), _give_up)
        except _GaveUp:  # a process works on one of the disks; the next gc marks them
            pass
        except Error as error:
            log.problem("kept disks are not marked as stale yet", vm=vm_id, why=error)
    every = (disk for vg in groups for disk in local_disks(vg))
    may_matter = (disk for disk in every if disk.is_complete or disk.state is State.DRIFTED)
    kept.renew(frozenset(disk.vm_id for disk in may_matter if disk.vm_id), is_all, seen)


def _look_after_ready(groups: tuple[VolumeGroup, ...]) -> None:
    """Remove the records of disks that an administrator's own command has removed or changed."""
    every = (disk for vg in groups for disk in local_disks(vg))
    with contextlib.suppress(RunUnwritable):  # then no command of ours could have changed a disk, either
        ready.sweep(frozenset(disk.volume_id for disk in every if disk.state is State.READY))


def _count(found: Collection) -> None:
    done = [f for f in found.findings if f.verdict.action is Action.REMOVE and not f.failure]
    removed = [f.disk for f in done if not f.template]
    counters.gc_ran(
        removed=len(removed),
        removed_bytes=sum(disk.lv.lv_size for disk in removed),
        is_good=not found.is_problem,
    )


@frozen
class _Judge:
    """Decides, and asks libvirt only if the answer can change a decision."""

    config: Config
    may_start: bool
    ran_elsewhere: Callable[[Iterable[str]], Elsewhere]

    def look(
        self,
        groups: Iterable[VolumeGroup],
        held: frozenset[str],
        is_due: Callable[[Finding], bool] = lambda _found: True,
    ) -> tuple[tuple[Finding, ...], LibvirtSilent | None]:
        """The findings that are due; and libvirt's error, if it was asked and did not answer.

        `groups`: as just read.  `held`: the locks that other processes hold.
        """
        alone = self._judge(groups, held, _NO_VMS, frozenset())
        findings = tuple(filter(is_due, alone))
        if not any(depends_on_vms(found.disk, found.verdict) for found in findings):
            return findings, None
        vms, silence = _answer(libvirt.ask_domains())
        elsewhere = self._elsewhere(findings, vms)
        return tuple(filter(is_due, self._judge(groups, held, vms, elsewhere))), silence

    def _elsewhere(self, findings: Iterable[Finding], vms: Domains | None) -> Elsewhere | None:
        """Which disks of VMs, stopped without a report, were on no local disk; None if that is not known."""
        asked = may_have_drifted((found.disk for found in findings if not found.template), vms)
        try:
            return self.ran_elsewhere(asked) if asked else frozenset()
        except Error as error:
            log.problem("gc cannot find out what VMs ran from", vms=" ".join(sorted(asked)), why=error)
            return None

    def _judge(
        self,
        groups: Iterable[VolumeGroup],
        held: frozenset[str],
        vms: Domains | None,
        elsewhere: Elsewhere | None,
    ) -> Iterator[Finding]:
        """The finding of each volume; `vms`: the domains that libvirt knows, None if it did not answer."""
        prepared, now = progress.read_all(), clock.now()
        for vg in groups:
            for disk in local_disks(vg):
                is_locked = lock.disk_lock(disk.volume_id) in held
                witnesses = witnesses_for(disk, is_locked, vms, prepared, self.may_start, elsewhere)
                verdict = decide(disk, witnesses, self.config.policy(disk.vm_id), now)
                yield Finding(vg.vg_name, disk, verdict)
            is_wanted, keep_for = self.config.caches_templates(vg.vg_name), self.config.cache.keep_for
            too_many = template.too_many(vg, self.config.cache)
            for each in template.templates(vg):
                is_locked, is_too_much = lock.disk_lock(each.name) in held, each.name in too_many
                verdict = decide_template(each, is_locked, is_wanted, is_too_much, keep_for, now.epoch)
                yield Finding(vg.vg_name, each.disk, verdict, template=each.volume_id)


@frozen
class _Group:
    """gc's work on one volume group."""

    judge: _Judge
    vg: VolumeGroup  # as it was when gc began

    @property
    def config(self) -> Config:
        return self.judge.config

    def carry_out(self, findings: Iterable[Finding]) -> Iterable[Finding]:
        """Carry out the decisions about this group; returns their findings with what came of them."""
        first = [found for found in findings if found.vg_name == self.vg.vg_name]
        due = [found for found in first if found.verdict.action is not Action.KEEP]
        done: dict[str, Finding] = {}
        waiting: dict[str, str] = {}  # old name to new name of disks that are set aside and not yet erased
        for start in range(0, len(due), BATCH):
            if run.is_spent():
                done.update((found.name, replace(found, verdict=_LATER)) for found in due[start:])
                break
            batch = _Batch(self, due[start : start + BATCH])
            done.update(batch.carry_out())
            waiting.update(batch.aside)
        if self.judge.may_start:
            done.update(self._erase(waiting, done))
        return [done.get(found.name, found) for found in first]

    def read(self) -> VolumeGroup:
        """Read the group again."""
        return VolumeGroup.read(self.vg.vg_name, self.vg.devices)

    def _erase(self, waiting: Mapping[str, str], done: Mapping[str, Finding]) -> Mapping[str, Finding]:
        """Erase and remove the disks that are set aside, unless another gc erases at this moment.

        Returns the findings that have changed: failures, or all disks if the other gc erases them.
        """
        if not waiting:
            return {}
        with lock.trying(os.path.join(lock.RUN, ERASING)) as ours:
            if ours:
                failed = dict(self._erase_each(waiting, done))
                self._erase_rest({*waiting.values()})
                return failed
        left = Verdict(
            Action.KEEP, "set aside; the gc that erases at this moment, or the next one, erases it"
        )
        return {name: replace(done[name], verdict=left) for name in waiting}

    def _erase_each(
        self, waiting: Mapping[str, str], done: Mapping[str, Finding]
    ) -> Iterator[tuple[str, Finding]]:
        """The findings of the disks that could not be erased and removed, by old name."""
        for number, (name, aside) in enumerate(waiting.items()):
            if number:
                time.sleep(GAP)  # a start that waits for room comes first
            try:
                removal.erase_aside(self.vg, aside, self.config, time.sleep)
            except Error as error:
                yield name, _failed(done[name], error)

    def _erase_rest(self, tried: set[str]) -> None:
        """Erase the disks that other gcs have set aside meanwhile: they leave them to this gc."""
        while True:
            rest = [
                disk for disk in local_disks(self.read()) if disk.is_aside and disk.volume_id not in tried
            ]
            free = [disk for disk in rest if not (disk.is_open or disk.lv.dependents)]
            if not free:
                return
            for disk in free:
                tried.add(disk.volume_id)
                try:
                    removal.erase_aside(self.vg, disk.volume_id, self.config, time.sleep)
                except Error as error:
                    log.problem("gc could not finish", disk=disk.volume_id, why=error)


class _Batch:
    """Volumes of a group that are locked and changed together."""

    def __init__(self, group: _Group, due: Sequence[Finding]) -> None:
        self._group = group
        self._due = due
        self.aside: dict[str, str] = {}  # old name to new name of the disks that were set aside

    def carry_out(self) -> Mapping[str, Finding]:
        """Carry out the decisions about volumes that have not changed since; the finding of each, by name."""
        busy = Verdict(Action.KEEP, "a process works on it")
        done = {found.name: replace(found, verdict=busy) for found in self._due}
        with ExitStack() as locks:
            locked = [found for found in self._due if _try_hold(found.name, locks)]
            done.update((found.name, found) for found in locked)
            try:
                done.update(self._change(locked) if locked else {})
            except Error as error:
                done.update((found.name, _failed(found, error)) for found in locked)
        return done

    def _change(self, locked: Sequence[Finding]) -> Mapping[str, Finding]:
        vg = self._group.read()
        old = {found.name: found for found in locked}
        # Again, with libvirt: since the first look, a VM may have started, or stopped.  The locks are our own
        # now.  A volume that is missing, or of another kind, was removed.
        due, _ = self._group.judge.look([vg], frozenset(), lambda new: _is_same(old.get(new.name), new))
        changed = [found for found in due if found.verdict.action is not Action.KEEP]
        if changed:
            vg.require_usable()
        failures = {
            **self._remove(vg, [found for found in changed if found.verdict.action is Action.REMOVE]),
            **_all_or_each(
                vg.deactivate, [found.name for found in changed if found.verdict.action is Action.DEACTIVATE]
            ),
            **_change_tags(vg, changed, clock.now()),
        }
        for found in changed:
            if found.name not in failures:
                _record(found)
        failed = {found.name: _failed(found, failures[found.name]) for found in due if found.name in failures}
        return {**{found.name: found for found in due}, **failed}

    def _remove(self, vg: VolumeGroup, due: Sequence[Finding]) -> Mapping[str, Error]:
        """Remove the volumes that need no erase, set the others aside; returns the errors by name."""
        erase = {found.name: self._erase_mode(found) for found in due}
        at_once = [found.disk for found in due if erase[found.name] == "none"]
        failures = dict(removal.remove_all(vg, at_once, time.sleep))
        for found in due:
            if erase[found.name] != "none":
                try:
                    self.aside[found.name] = removal.set_aside(vg, found.disk, erase[found.name], time.sleep)
                except Error as error:
                    failures[found.name] = error
        return failures

    def _erase_mode(self, found: Finding) -> str:
        """How the volume must be erased; if it was set aside already, the tag ERASE decides."""
        disk, config = found.disk, self._group.config
        if disk.waits_for_erase:
            return disk.erase or "none"
        general = config.retention if found.template else config.policy(disk.vm_id).retention
        return disk.erase or general.erase


def _is_same(old: Finding | None, new: Finding) -> bool:
    return old is not None and new.template == old.template


def _record(found: Finding) -> None:
    log.event(f"gc: {found.verdict.action.words}", **found.log_fields, why=found.verdict.reason)
    if found.template and found.verdict.action is Action.REMOVE and found.disk.state is State.READY:
        counters.template_evicted()


def _try_hold(name: str, locks: ExitStack) -> bool:
    held = lock.try_hold(lock.disk_lock(name))
    if held:
        locks.callback(held.release)
    return held is not None


def _change_tags(vg: VolumeGroup, due: Iterable[Finding], now: Moment) -> Mapping[str, Error]:
    """Set and remove marks, with one command for all volumes with the same change; the errors by name."""
    changes: dict[tuple[_Tags, _Tags, _Tags], list[str]] = {}
    for found in due:
        change = _marks(found, now)
        if change:
            changes.setdefault(change, []).append(found.name)
    failures: dict[str, Error] = {}
    for (add, remove, spare), names in changes.items():
        failures.update(_all_or_each(partial(vg.mark, add=add, remove=remove, spare=spare), names))
    return failures


def _marks(found: Finding, now: Moment) -> tuple[_Tags, _Tags, _Tags] | None:
    """The tags to add, to remove, and to spare if the metadata area is full; None if no tags change."""
    disk, verdict = found.disk, found.verdict
    if verdict.action is Action.MARK_UNNEEDED:
        add = unneeded_tags(disk, now, verdict.age)
        return add, disk.unneeded_tags - add, frozenset()
    if verdict.action is Action.MARK_STOPPED:
        add = stopped_tags(now, verdict.age)
        return add, disk.idle_tags - add, frozenset()
    if verdict.action is Action.MARK_DRIFTED:
        return frozenset({drifted_tag(now.epoch)}), disk.idle_tags, disk.source_tags
    if verdict.action is Action.CLEAR_MARK:
        return frozenset(), disk.unneeded_tags, frozenset()
    return None


def _all_or_each(act: Callable[..., None], names: Sequence[str]) -> Mapping[str, Error]:
    """Change volumes with one command, or, if LVM refuses that, with one command each; the errors by name."""
    try:
        if names:
            act(*names)
    except CommandFailed as error:
        if len(names) == 1:
            return {names[0]: error}
        return {name: why for each in names for name, why in _all_or_each(act, [each]).items()}
    except Error as error:
        return dict.fromkeys(names, error)
    return {}


def _failed(found: Finding, error: Error) -> Finding:
    log.problem("gc could not finish", **found.log_fields, action=found.verdict.action.words, why=error)
    return replace(found, failure=str(error))


# -- what the operator sees


def as_lines(collection: Collection, dry_run: bool) -> str:
    """One line for each volume: name, VM or template, size, verdict, reason."""
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
    Action.MARK_UNNEEDED: "marked as unneeded",
    Action.CLEAR_MARK: "unmarked",
    Action.MARK_STOPPED: "marked as stopped",
    Action.MARK_DRIFTED: "marked as drifted",
    Action.DEACTIVATE: "deactivated",
}


def as_json(collection: Collection) -> str:
    """As `schema/gc.schema.json` describes it."""
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
    return json.dumps({"version": 1, "disks": rows, "problems": collection.problems}, indent=2) + "\n"
