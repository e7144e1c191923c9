"""A snapshot of this host: its local disks and template LVs, their VMs, states and problems; frozen.

`take` runs one LVM command for each volume group and asks libvirt at the same time, and reads the lock files.
The snapshot is a pure function of their answers.  `table.py`, `metrics.py` and `output.py` show it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping

from localdisk import clock, counters, device_mapper, libvirt
from localdisk.clock import Moment
from localdisk.config import Config, Margins, Policy
from localdisk.errors import BadDomain, LibvirtSilent, VolumeGroupUnusable
from localdisk.frozen import field, frozen, replace
from localdisk.status import libvirt_vms, problems
from localdisk.status.libvirt_vms import Vms
from localdisk.status.problems import Problem
from localdisk.units import format_duration
from localdisk.volumes import filling, lvm, progress, room, template
from localdisk.volumes.local_disk import LocalDisk, State, is_left_alone, local_disks
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup
from localdisk.volumes.progress import Progress
from localdisk.volumes.template import Template
from localdisk.volumes.verdict import (
    Action,
    Elsewhere,
    Verdict,
    decide,
    decide_template,
    may_have_drifted,
    witnesses_for,
)


@frozen
class CacheUse:
    """Bytes that template LVs take of a volume group or thin pool (`used`), and may take (cache.max_size)."""

    used: int
    limit: int


@frozen
class Pool:
    """A thin pool: its usage, None if LVM does not report it, and the margins; all in percent."""

    name: str
    size: int
    data_percent: float | None
    metadata_percent: float | None
    data_limit: float
    metadata_limit: float
    cache: CacheUse | None = None  # None: the cache is off, and the pool has no template LV


@frozen
class Group:
    """A volume group; `reserve`: bytes of `free` that are kept free of new disks."""

    name: str
    size: int
    free: int
    reserve: int
    pool: Pool | None
    cache: CacheUse | None = None  # preallocated template LVs; None: the cache is off, and there are none
    metadata_percent: float = 0.0  # how full the area is in which LVM describes the group
    other_pools: tuple[Pool, ...] = ()  # pools that sections of VMs name, or that have local disks

    @property
    def pools(self) -> tuple[Pool, ...]:
        return (*((self.pool,) if self.pool else ()), *self.other_pools)


@frozen
class Copy:
    """How far a copy is; `done` from 0 to 1, `rate` in bytes written per second."""

    phase: str  # one of progress.PHASES
    since: int
    done: float
    written: int
    rate: int
    seconds_left: int | None


@frozen
class Next:
    """What happens next to a disk or template LV if nobody does anything, and when; None: not known."""

    action: str  # copy | remove | keep
    at: int | None
    text: str


@frozen
class Row:
    """One local disk, or one that is about to be made."""

    vg: str
    vm: str
    vm_name: str  # "" if libvirt does not know the VM
    disk: str  # its name in the running VM, such as vda; "" if the VM does not run
    image: str
    volume: str
    size: int
    backend: str
    # One of these; without root only running and active can be told:
    # preparing|waiting|making_room|copying|stalled|ready|running|stopped|unfinished|drifted|deleting|active
    state: str
    open: bool
    used: int | None  # bytes of a thin disk that hold data
    stopped: int | None  # when its VM stopped
    copy: Copy | None
    next: Next
    older: bool = False  # of vdsm's older hook, kept until the operator decides


@frozen
class TemplateRow:
    """One template LV, or one that is about to be made."""

    vg: str
    volume: str  # the template's volume on shared storage
    name: str  # of the logical volume
    size: int
    backend: str  # "" if it is not made yet
    state: str  # preparing | waiting | making_room | copying | stalled | ready | unfinished
    open: bool
    holds: int  # bytes that it takes of its volume group or pool
    last_used: int | None  # when a disk last started from it, or when it was made; None if it is not made yet
    copy: Copy | None
    next: Next


@frozen
class Snapshot:
    """The whole snapshot.  Sizes in bytes, times in seconds since the epoch."""

    at: int
    volume_groups: tuple[Group, ...]
    disks: tuple[Row, ...]
    templates: tuple[TemplateRow, ...] = ()
    problems: tuple[Problem, ...] = ()
    unseen: tuple[str, ...] = ()  # what could not be read, one line each
    # Disks since boot that were copied without a template LV though the cache is on, by reason.
    uncached: Mapping[str, int] = field(default_factory=dict)


def take(config: Config) -> Snapshot:
    """Take a snapshot.  Raises NoVolumeGroup, CommandFailed and so on if no volume group can be read."""
    asked = libvirt.ask_names()
    if os.geteuid() != 0:
        return _without_root(config, asked)
    groups, failures = lvm.read_all(config.volume_groups)
    held, moment = progress.read_all(), clock.now()
    now = moment.epoch
    vms, unseen = _answered(asked)
    disks = tuple((vg, disk) for vg in groups for disk in local_disks(vg))
    elsewhere, unasked = _elsewhere([disk for _, disk in disks], vms)
    view = _View(config, vms, held, moment, elsewhere)
    judged = [(vg, disk, view.verdict(disk)) for vg, disk in disks]
    rows = [view.row(*each) for each in judged]
    rows += view.rows_without_volume({disk.volume_id for _, disk in disks})
    cached = tuple((vg, each) for vg in groups for each in template.templates(vg))
    templates = [row for vg in groups for row in view.template_rows(vg)]
    templates += view.templates_without_volume({each.name for _, each in cached})
    found = [*map(problems.not_usable, failures), *(p for vg in groups for p in _unusable(vg, config))]
    found += problems.of_groups(groups, vms, config)
    found += problems.of_copies(held, now)
    found += problems.of_disks(judged, held, vms, config, now, is_elsewhere_known=elsewhere is not None)
    found += problems.of_templates(cached, held, now)
    return Snapshot(
        at=int(now),
        volume_groups=tuple(_group(vg, config) for vg in groups),
        disks=tuple(rows),
        templates=tuple(templates),
        problems=tuple(found),
        unseen=(*unseen, *unasked),
        uncached=counters.read().uncached,
    )


def _answered(asked: libvirt.Question) -> tuple[Vms | None, tuple[str, ...]]:
    try:
        return libvirt_vms.answer(asked), ()
    except LibvirtSilent as error:
        return None, (f"which VMs run: {error}",)


def _elsewhere(disks: list[LocalDisk], vms: Vms | None) -> tuple[Elsewhere | None, tuple[str, ...]]:
    """The disks of VMs, stopped without a report, that were on no local disk; None, and why, if not known."""
    asked = may_have_drifted(disks, vms.domains if vms else None)
    try:
        return libvirt_vms.ran_elsewhere(asked) if asked else frozenset(), ()
    except (LibvirtSilent, BadDomain) as error:
        return None, (f"what VMs that stopped ran from: {error}",)


# -- volume groups


def _group(vg: VolumeGroup, config: Config) -> Group:
    pools = tuple(_pool(vg, pool, margins, config) for pool, margins in filling.pools(vg, config))
    return Group(
        name=vg.vg_name,
        size=vg.vg_size,
        free=vg.vg_free,
        reserve=config.margins.reserve.of(vg.vg_size),
        pool=next((pool for pool in pools if pool.name == config.thin_pool), None),
        cache=_cache_use(vg, config, ""),
        metadata_percent=round(vg.metadata_percent, 2),
        other_pools=tuple(pool for pool in pools if pool.name != config.thin_pool),
    )


def _pool(vg: VolumeGroup, pool: LogicalVolume, margins: Margins, config: Config) -> Pool:
    return Pool(
        name=pool.lv_name,
        size=pool.lv_size,
        data_percent=pool.data_percent,
        metadata_percent=pool.metadata_percent,
        data_limit=margins.thin_data,
        metadata_limit=margins.thin_metadata,
        cache=_cache_use(vg, config, pool.lv_name),
    )


def _cache_use(vg: VolumeGroup, config: Config, pool: str) -> CacheUse | None:
    """The cache in a thin pool, or with `pool` "" the cache of preallocated template LVs."""
    found = template.in_place(vg, pool)
    if not found and not config.caches_templates(vg.vg_name):
        return None
    return CacheUse(sum(each.holds for each in found), template.limit(vg, config.cache, pool))


def _unusable(vg: VolumeGroup, config: Config) -> Iterator[Problem]:
    try:
        vg.require_usable()
    except VolumeGroupUnusable as error:
        yield problems.not_usable(error)
    for pool, _ in filling.pools(vg, config):
        if pool.data_percent is None:
            yield problems.not_usable(room.silent_pool(vg.vg_name, pool))


# -- disks


@frozen
class _View:
    """What is needed besides LVM's report to make the rows."""

    config: Config
    vms: Vms | None
    held: Mapping[str, Progress | None]
    moment: Moment
    elsewhere: Elsewhere | None = frozenset()  # None: libvirt could not be asked

    @property
    def now(self) -> float:
        return self.moment.epoch

    def verdict(self, disk: LocalDisk) -> Verdict:
        """What gc would decide just now."""
        found = self.vms.domains if self.vms else None
        is_locked = disk.volume_id in self.held
        witnesses = witnesses_for(disk, is_locked, found, self.held, elsewhere=self.elsewhere)
        return decide(disk, witnesses, self.config.policy(disk.vm_id), self.moment)

    def row(self, vg: VolumeGroup, disk: LocalDisk, verdict: Verdict) -> Row:
        """The row of a local disk; `verdict`: what gc would decide about it."""
        policy, name = self.config.policy(disk.vm_id), vg.vg_name
        record = self.held.get(disk.volume_id)
        state = _state(disk, self.held, self._vm_runs(disk))
        if verdict.action is Action.MARK_DRIFTED:
            state = State.DRIFTED.value
        percent = disk.lv.data_percent
        return Row(
            vg=name,
            vm=disk.vm_id,
            vm_name=self._name(disk.vm_id),
            disk=self.vms.disk_name(disk.vm_id, disk.volume_id) if self.vms else "",
            image=disk.image_id,
            volume=disk.volume_id,
            size=disk.lv.lv_size,
            backend=disk.backend.value,
            state=state,
            open=disk.is_open,
            used=None if percent is None else round(disk.lv.lv_size * percent / 100),
            stopped=disk.stopped,
            copy=_copy(record) if state in _FILLED and record else None,
            next=self._next(disk, state, record, policy, verdict),
            older=is_left_alone(disk, policy.retention),
        )

    def rows_without_volume(self, there: set[str]) -> Iterator[Row]:
        """The rows of starts that have not made their volume yet."""
        for volume_id, record in self.held.items():
            if record is None or record.template or volume_id in there:
                continue
            policy = self.config.policy(record.vm)
            yield Row(
                vg=policy.volume_group,
                vm=record.vm,
                vm_name=self._name(record.vm),
                disk="",
                image=record.image,
                volume=volume_id,
                size=record.size,
                backend=policy.backend.value,
                state=record.phase,
                open=False,
                used=None,
                stopped=None,
                copy=_copy(record),
                next=Next("copy", None, _waiting(record, self.now)),
            )

    def template_rows(self, vg: VolumeGroup) -> Iterator[TemplateRow]:
        """The rows of all template LVs of a group, the least recently used first."""
        too_many = template.too_many(vg, self.config.cache)
        for found in template.templates(vg):
            record, is_locked = self.held.get(found.name), found.name in self.held
            state = "ready" if found.is_ready else _filled(record) if is_locked else "unfinished"
            yield TemplateRow(
                vg=vg.vg_name,
                volume=found.volume_id,
                name=found.name,
                size=found.lv.lv_size,
                backend=found.backend.value,
                state=state,
                open=found.is_open,
                holds=found.holds,
                last_used=found.used or None,
                copy=_copy(record) if state in _FILLED and record else None,
                next=Next("copy", _due(record), _pace(record, self.now))
                if state in _FILLED
                else self._next_of_template(vg, found, is_locked, found.name in too_many),
            )

    def templates_without_volume(self, there: set[str]) -> Iterator[TemplateRow]:
        """The rows of template LVs that are about to be made; probably in the general volume group."""
        for name, record in self.held.items():
            if record is None or not record.template or name in there:
                continue
            yield TemplateRow(
                vg=self.config.volume_group,
                volume=record.template,
                name=name,
                size=record.size,
                backend="",
                state=record.phase,
                open=False,
                holds=0,
                last_used=None,
                copy=_copy(record),
                next=Next("copy", None, _waiting(record, self.now)),
            )

    def _next_of_template(self, vg: VolumeGroup, found: Template, is_locked: bool, is_too_much: bool) -> Next:
        if found.is_open or is_locked:
            return Next("keep", None, "kept while in use")
        is_wanted, keep_for = self.config.caches_templates(vg.vg_name), self.config.cache.keep_for
        verdict = decide_template(found, is_locked, is_wanted, is_too_much, keep_for, self.now)
        return _removal(verdict, self.config.retention.erase != "none", self.now)

    def _vm_runs(self, disk: LocalDisk) -> bool:
        """Whether its VM runs from the disk; if libvirt's answer is missing, whether the disk is open."""
        doubt = self.vms is None or disk.vm_id in self.vms.unread
        return disk.is_open and bool(doubt or (self.vms and self.vms.user_of(disk.volume_id)))

    def _name(self, vm_id: str) -> str:
        return self.vms.names.get(vm_id, "") if self.vms else ""

    def _next(
        self, disk: LocalDisk, state: str, record: Progress | None, policy: Policy, verdict: Verdict
    ) -> Next:
        if state in _FILLED:
            return Next("copy", _due(record), _pace(record, self.now))
        if state == "running" and self.vms and self.vms.is_below(disk.volume_id):
            return Next("keep", None, "kept, see problems")
        if is_left_alone(disk, policy.retention):
            return Next("keep", None, "stale, older hook's" if disk.is_stale else "kept, older hook's")
        if state == "running" or (disk.is_open and disk.state is not State.READY):
            return _when_closed(disk, policy)
        if disk.is_open:
            return Next("keep", None, "kept while open")
        is_defined = self.vms is not None and disk.vm_id in self.vms.names
        if verdict.action is Action.MARK_UNNEEDED and disk.unneeded is None and is_defined:
            return Next("keep", None, "VM starts")
        if verdict.action is Action.MARK_DRIFTED:
            return Next("keep", None, "kept")
        coming = _by_gc(verdict, disk, policy, self.now)
        return replace(coming, text=f"stale, {coming.text}") if disk.is_stale and disk.is_complete else coming


_FILLED = (progress.COPYING, progress.STALLED)  # states of a volume that is being filled


def _filled(record: Progress | None) -> str:
    return progress.STALLED if record and record.phase == progress.STALLED else progress.COPYING


def _state(disk: LocalDisk, held: Mapping[str, Progress | None], runs: bool) -> str:
    if disk.state is State.UNFINISHED and disk.volume_id in held:
        return _filled(held[disk.volume_id])
    return "running" if disk.state is State.READY and runs else disk.state.value


def _copy(record: Progress) -> Copy:
    return Copy(
        phase=record.phase,
        since=record.since,
        done=record.fraction,
        written=record.written,
        rate=record.rate,
        seconds_left=record.seconds_left,
    )


# -- what happens next


def _due(record: Progress | None) -> int | None:
    left = record.seconds_left if record and record.phase == progress.COPYING else None
    return record.at + left if record and left is not None else None


def _pace(record: Progress | None, now: float) -> str:
    """`310 MiB/s 00:41 left`."""
    if record and record.phase == progress.STALLED:
        return f"no progress for {format_duration(max(0, int(now - record.at)))}"
    if record is None or record.phase != progress.COPYING:
        return "copy begins"
    return progress.pace(record.rate, record.seconds_left)


def _waiting(record: Progress, now: float) -> str:
    since = format_duration(max(0, int(now - record.since)))
    if record.phase == progress.MAKING_ROOM:
        return f"waits {since} for room"
    return f"waits {since} for turn" if record.phase == progress.WAITING else "copy begins"


def _when_closed(disk: LocalDisk, policy: Policy) -> Next:
    if disk.state is State.DELETING:
        return Next("remove", None, "removed when closed")
    if policy.retention.on_stop == "keep":
        return Next("keep", None, f"kept {format_duration(policy.retention.keep_for)} when VM stops")
    return Next("remove", None, "removed when VM stops")


def _by_gc(verdict: Verdict, disk: LocalDisk, policy: Policy, now: float) -> Next:
    """What gc will do with the disk, and when; `verdict` is what it would decide now."""
    if verdict.action is Action.MARK_STOPPED:
        return Next("keep", None, f"kept {format_duration(policy.retention.keep_for)} by gc")
    is_kept = verdict.action is not Action.REMOVE and verdict.due is None and verdict.is_certain
    if is_kept and disk.state is State.READY:
        return Next("keep", None, "VM starts")
    return _removal(verdict, policy.retention.erase != "none" or disk.is_aside, now)


def _removal(verdict: Verdict, is_erased: bool, now: float) -> Next:
    removes = "erases" if is_erased else "removes"
    if verdict.action is Action.REMOVE:
        return Next("remove", int(now), f"gc {removes} it next")
    if verdict.due is not None:
        left = format_duration(max(0, int(verdict.due - now)))
        return Next("remove", int(verdict.due), f"gc {removes} in {left}")
    return Next("keep", None, "kept" if verdict.is_certain else "kept, see problems")


# -- without root


def _without_root(config: Config, asked: libvirt.Question) -> Snapshot:
    """The snapshot that an ordinary user can take: active volumes, and running VMs."""
    vms, unseen = _answered(asked)
    rows = []
    for volume in device_mapper.logical_volumes(config.volume_groups):
        vm_id = vms.user_of(volume.lv_name) if vms else ""
        rows.append(
            Row(
                vg=volume.vg_name,
                vm=vm_id,
                vm_name=vms.names.get(vm_id, "") if vms else "",
                disk=vms.disk_name(vm_id, volume.lv_name) if vms else "",
                image="",
                volume=volume.lv_name,
                size=volume.size,
                backend="",
                state="running" if vm_id else "active",
                open=bool(vm_id),
                used=None,
                stopped=None,
                copy=None,
                next=Next("keep", None, ""),
            )
        )
    unseen += ("volume groups, closed disks, copies and problems: run localdisk status as root",)
    return Snapshot(int(time.time()), (), tuple(rows), unseen=unseen)
