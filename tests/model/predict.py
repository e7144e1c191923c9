"""What a call should do: the state afterwards, whether it is refused, every stage of every disk on the way.

A call that succeeds leaves each disk at its last stage.  A call that is killed leaves each disk at any of its
stages; the next calls are predicted from that stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tests.model import shelf
from tests.model.rules import Policy
from tests.model.state import (
    ANOTHER,
    ASIDE,
    COMPLETE,
    DELETING,
    DESTROYED,
    DESTROYING,
    DRIFTED,
    READY,
    STOPPED,
    UNFINISHED,
    Flight,
    LocalDisk,
    Source,
    State,
    newborn,
)

SETTLED = 60  # seconds for which a power-off ends what vdsm still asks for its start
KEEP_MARKS = 24 * 3600  # seconds

Stages = list["LocalDisk | None"]  # None: it is not there


@dataclass(frozen=True)
class Call:
    """One of CALLS, with its arguments: ids first."""

    what: str
    arguments: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.what, *(str(argument)[:8] for argument in self.arguments)))

    @property
    def vm_id(self) -> str:
        """The VM that it is about, "" for gc and prefetch."""
        first = self.arguments[0] if self.arguments and not self.what.startswith("prefetch") else ""
        return first if isinstance(first, str) else ""


class Refused(Exception):
    """The call ends with an error."""


@dataclass
class Prediction:
    """What a call does, while it is being worked out.

    `stages` are those of each disk that changes, the first one included; `instead` are others at which it
    may be left when the call is killed or a tool fails; `erased` says how a disk that is gone must have been
    erased.
    """

    state: State
    is_refused: bool = False
    is_over: bool = False  # of a part of a call: what is left of the call is not done
    has_doubts: bool = False  # gc must end with 1
    stages: dict[str, Stages] = field(default_factory=dict)
    instead: dict[str, Stages] = field(default_factory=dict)
    erased: dict[str, str] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)  # what may be left of a start that is good
    ways: list[Prediction] = field(default_factory=list)  # in which it may have gone well in spite of trouble

    def becomes(self, key: str, disk: LocalDisk | None) -> None:
        self.stages.setdefault(key, [self.state.disks.get(key)]).append(disk)
        self.state = self.state.with_disk(key, disk)

    def goes(self, key: str, erase: str) -> None:
        """It is removed, or if it must be erased first, set aside: its name is free at once.

        What was set aside before must still be erased as was promised then.
        """
        disk = self.state.disks[key]
        erase = disk.erase if disk.is_aside else erase
        if erase == "none":
            self.erased[key] = erase
            self.becomes(key, None)
        elif disk.name:
            aside = replace(disk, state=ASIDE, erase=erase, stopped=None, unneeded=None)
            self.becomes(key, aside)
            self.becomes(key, replace(aside, name=""))

    def options(self, key: str) -> Stages:
        """What may be left of a disk when the call is killed, the least likely first."""
        return [*self.instead.get(key, ()), *self.stages.get(key, [self.state.disks.get(key)])]


def predict(state: State, call: Call) -> Prediction:
    """What this call does in this state."""
    prediction = Prediction(state)
    try:
        CALLS[call.what](prediction, *call.arguments)
    except Refused:
        prediction.is_refused = True
    return prediction


# -- libvirt, as vdsm uses it


def _define(p: Prediction, vm_id: str) -> None:
    """A placeholder, there as long as vdsm deals with the VM."""
    fresh: dict[str, Any] = {"paths": {}, "drifted": frozenset()}
    p.state = p.state.with_vm(
        vm_id, is_defined=True, has_started=False, using=p.state.vms[vm_id].value, **fresh
    )


def _create(p: Prediction, vm_id: str) -> None:
    if p.state.is_silent:
        raise Refused
    p.state = p.state.with_vm(vm_id, has_started=True, is_active=True)


def _destroy(p: Prediction, vm_id: str) -> None:
    p.state = p.state.with_vm(vm_id, is_active=False)


def _undefine(p: Prediction, vm_id: str) -> None:
    p.state = p.state.with_vm(vm_id, is_defined=False, has_started=False)


# -- starting


def _is_start(state: State, vm_id: str) -> bool:
    """Whether vdsm prepares disks to start the VM, as far as libvirt says: not to recover it."""
    vm = state.vms[vm_id]
    return not (state.is_silent or state.is_mute) and vm.is_defined and not vm.has_started


def _check_start(p: Prediction, vm_id: str) -> None:
    """after_disk_prepare to begin with."""
    p.is_over = not _is_start(p.state, vm_id)


def _after_disk_prepare(p: Prediction, vm_id: str, image_id: str) -> None:
    if _is_start(p.state, vm_id):
        _prepare(p, vm_id, image_id)


def _prepare(p: Prediction, vm_id: str, image_id: str) -> None:
    making = _make_way(p, vm_id, image_id)
    if making:
        base = _bring_in(p, vm_id, image_id, making)
        key = _begin_copy(p, vm_id, image_id, making, base)[0]
        _copied(p, vm_id, image_id, key, making.policy)
        _remove_replaced(p, making.replaced, making.policy)


def _prepare_in_vain(p: Prediction, vm_id: str, image_id: str) -> None:
    """Its VM is powered off while it copies."""
    marks = p.state.marks
    p.state = replace(p.state, marks={})
    making = _make_way(p, vm_id, image_id)
    p.state = replace(p.state, marks=marks)
    if making:
        base = _bring_in(p, vm_id, image_id, making)
        key = _begin_copy(p, vm_id, image_id, making, base)[0]
        _copied(p, vm_id, image_id, key, making.policy)


def _before_copy(p: Prediction, vm_id: str, image_id: str) -> None:
    """after_disk_prepare, left alone while it copies, if it does."""
    if not _is_start(p.state, vm_id):
        return
    making = _make_way(p, vm_id, image_id)
    if making:
        base = _bring_in(p, vm_id, image_id, making)
        key, base = _begin_copy(p, vm_id, image_id, making, base)
        reads = "" if shelf.is_thin(making.policy) else base
        p.state = replace(p.state, flight=_flight(vm_id, image_id, key, making, reads=reads))


def _flight(vm_id: str, image_id: str, key: str, making: Making, **more: Any) -> Flight:
    its: dict[str, Any] = {"replaced": making.replaced, "others": making.others, "names": making.names}
    return Flight(vm_id, image_id, key, making.policy, **its, **more)


def _before_fill(p: Prediction, vm_id: str, image_id: str) -> None:
    """after_disk_prepare, left alone while it fills a template LV, if it does."""
    if not _is_start(p.state, vm_id):
        return
    making = _make_way(p, vm_id, image_id)
    if making:
        base = _bring_in(p, vm_id, image_id, making, is_left=True)
        if not p.state.flight:
            key = _begin_copy(p, vm_id, image_id, making, base)[0]
            _copied(p, vm_id, image_id, key, making.policy)
            _remove_replaced(p, making.replaced, making.policy)


def _finish(p: Prediction) -> None:
    """The copy that was left alone ends well."""
    if p.state.is_cancelled(p.state.flight.vm if p.state.flight else ""):
        _give_up(p)
    flight = _landed(p)
    _rest(p, flight)
    key = flight.key
    if flight.is_filling:
        p.state, is_good = shelf.landed(p.state, flight)
        if not is_good:
            raise Refused
        if not flight.vm:
            return
        making = Making(flight.policy, flight.replaced, flight.others, flight.names)
        key, _ = _begin_copy(p, flight.vm, flight.image, making, flight.key)
    _copied(p, flight.vm, flight.image, key, flight.policy)
    _remove_replaced(p, flight.replaced, flight.policy)


def _give_up(p: Prediction) -> None:
    """The start is ended, and its unfinished disk is removed at once."""
    flight = _landed(p)
    _rest(p, flight)
    if flight.is_filling:
        p.state = shelf.taken_away(p.state, flight.key, flight.policy.erase)
    else:
        p.goes(flight.key, flight.policy.erase)
    raise Refused


def _lose(p: Prediction) -> None:
    """It is killed, the half that cleans up too."""
    _landed(p)
    raise Refused


def _landed(p: Prediction) -> Flight:
    flight = p.state.flight
    assert flight
    p.state = replace(p.state, flight=None)
    return flight


def _rest(p: Prediction, flight: Flight) -> None:
    """The template LV that it has read is not read any more."""
    lv = p.state.cached.get(flight.reads)
    if lv and not p.state.is_open(flight.reads):
        p.state = p.state.with_cached(flight.reads, replace(lv, is_active=False))


def _before_vm_start(p: Prediction, vm_id: str) -> None:
    """Each disk that must be local is, or is made so, in the order of the VM's disks."""
    _look(p, vm_id)
    _check_resumed(p, vm_id)
    if p.is_over:
        return
    _become_stale(p, vm_id, set(p.state.vms[vm_id].images) - {*_local_images(p.state, vm_id)})
    for image_id in _local_images(p.state, vm_id):
        volume = p.state.sources[image_id].volume
        if p.state.vms[vm_id].paths.get(image_id) != volume:
            _prepare(p, vm_id, image_id)
        elif volume not in (d.name for d in p.state.disks.values() if d.state == READY and d.is_active):
            raise Refused


def _must_make(state: State, vm_id: str) -> bool:
    """Whether a disk that must be local is not."""
    paths = state.vms[vm_id].paths
    return any(paths.get(i) != state.sources[i].volume for i in _local_images(state, vm_id))


def _check_resumed(p: Prediction, vm_id: str) -> None:
    """before_vm_start, once it has looked."""
    p.is_over = _must_make(p.state, vm_id) and _is_resumed(p.state, vm_id)


def _is_resumed(state: State, vm_id: str) -> bool:
    """Whether libvirt does not know the VM; refused if it does not answer."""
    if state.is_silent or state.is_mute:
        raise Refused
    return not state.vms[vm_id].is_defined


def _become_stale(p: Prediction, vm_id: str, images: set[str]) -> None:
    """The VM begins to run with these images on shared storage; without the property, with all of them."""
    state, vm = p.state, p.state.vms[vm_id]
    runs = vm.is_active or state.is_silent
    for key, disk in [*state.disks.items()]:
        is_its = disk.vm == vm_id and disk.state in COMPLETE and (vm.using == "off" or disk.image in images)
        if is_its and not disk.is_stale and not (state.is_open(key) and runs):
            p.becomes(key, replace(disk, is_stale=True))


def _look(p: Prediction, vm_id: str) -> None:
    """before_vm_start to begin with: whether the VM was powered off, and whose disks they are."""
    volumes = [p.state.sources[image_id].volume for image_id in p.state.vms[vm_id].images]
    if p.state.vms[vm_id].using != "off" and len({*volumes}) < len(volumes):  # a twin came back by a merge
        raise Refused
    if _local_images(p.state, vm_id) and p.state.is_cancelled(vm_id):
        _settle(p, vm_id)
        raise Refused
    for image_id in _local_images(p.state, vm_id):
        _owned(p.state, vm_id, image_id)


def _local_images(state: State, vm_id: str) -> list[str]:
    """The VM's images that must run from a local disk."""
    vm = state.vms[vm_id]
    if vm.using == "off":
        return []
    policy = state.rules.of(vm_id, vm.using)
    return [image_id for image_id in vm.images if policy.is_local(image_id)]


def _owned(state: State, vm_id: str, image_id: str) -> str:
    """The key of what has the name of the image's leaf, "" if nothing has; refused if it is anyone else's."""
    volume = state.sources[image_id].volume
    key = state.named(volume)
    disk = state.disks.get(key)
    is_others = disk is not None and not disk.is_aside and (disk.vm, disk.image) != (vm_id, image_id)
    if is_others or volume in state.foreign:
        raise Refused
    return key


def _make_way(p: Prediction, vm_id: str, image_id: str) -> Making | None:
    """The preparation of one disk up to the copy; returns what is made, None if nothing is made."""
    state, source = p.state, p.state.sources[image_id]
    if image_id not in _local_images(state, vm_id):
        if state.vms[vm_id].using != "off":
            _settle(p, vm_id)
        return None
    if state.age_of(vm_id, DESTROYING) < SETTLED:
        raise Refused
    _settle(p, vm_id)
    state = p.state
    policy = state.rules.of(vm_id, state.vms[vm_id].using)
    key = _owned(state, vm_id, image_id)
    if _runs(state, vm_id, key):
        _leave_running(p, vm_id, image_id, key)
        return None
    if state.vms[vm_id].has_started and not (state.is_silent or state.is_flaky):
        return None  # it is shut off
    plan = _plan(state, policy, vm_id, image_id, key)
    for each in plan.removed:
        p.goes(each, policy.erase)
    if not plan.reused:
        left = tuple(key for key in plan.found if key not in plan.removed)
        return Making(policy, plan.replaced, left, frozenset(state.disks[k].name for k in plan.found))
    named = p.state.named(source.volume)
    if named and named != plan.reused:
        p.becomes(named, replace(p.state.disks[named], name=ANOTHER))
    if p.state.disks[plan.reused].name != source.volume:
        p.becomes(plan.reused, replace(p.state.disks[plan.reused], name=source.volume))
    _take_back(p, plan.reused, policy, p.state.disks[plan.reused], source)
    _local(p, vm_id, image_id)
    _remove_replaced(p, plan.replaced, policy)
    return None


def _settle(p: Prediction, vm_id: str) -> None:
    """What was powered off before does not count any more."""
    p.state = p.state.with_mark(vm_id, DESTROYED, None)
    if p.state.age_of(vm_id, DESTROYING) >= SETTLED:
        p.state = p.state.with_mark(vm_id, DESTROYING, None)


@dataclass(frozen=True)
class Making:
    """A disk that is to be made, by this policy: keys of what it replaces, and of what is locked for it."""

    policy: Policy
    replaced: tuple[str, ...]
    others: tuple[str, ...]
    names: frozenset[str]


@dataclass(frozen=True)
class Plan:
    """What a start does with the disks of its image, by their keys."""

    found: tuple[str, ...]
    removed: tuple[str, ...] = ()  # at once
    replaced: tuple[str, ...] = ()  # once the new disk is complete
    reused: str = ""


def _plan(state: State, policy: Policy, vm_id: str, image_id: str, key: str) -> Plan:
    """What counts for a kept disk is its source, not its name."""
    source = state.sources[image_id]
    own = [k for k, d in state.disks.items() if (d.vm, d.image) == (vm_id, image_id) and not d.is_aside]
    found = [
        *([key] if key else []),
        *sorted((k for k in own if k != key), key=lambda k: state.disks[k].name),
    ]
    if any(state.disks[k].state == DRIFTED for k in found) or (key and state.is_open(key)):
        raise Refused
    kept = [k for k in found if _is_kept(policy, state.disks[k])]
    older = [k for k in kept if _is_left_alone(policy, state.disks[k])]
    free = [k for k in found if not (state.is_open(k) or k in state.backups or k in older)]
    removed = tuple(k for k in free if k not in kept)
    usable = older if policy.on_stop == "delete" else kept
    reused = next((k for k in usable if _is_good(policy, source, state.disks[k])), "")
    is_refused = policy.on_source_change == "refuse"
    if (reused and state.is_open(reused)) or (usable and not reused and is_refused):
        raise Refused
    _require_alone(state, key, reused, older)
    others = tuple(k for k in kept if k != reused and k in free)
    return Plan(tuple(found), removed, others if policy.on_stop == "delete" or not is_refused else (), reused)


def _is_kept(policy: Policy, disk: LocalDisk) -> bool:
    would_keep = policy.on_stop == "keep" or _is_left_alone(policy, disk)
    return disk.state == STOPPED or (disk.state == READY and would_keep)


def _remove_replaced(p: Prediction, replaced: tuple[str, ...], policy: Policy) -> None:
    for key in replaced:
        if key in p.state.disks and not p.state.is_open(key):
            p.replaced.add(key)
            p.goes(key, policy.erase)


def _require_alone(state: State, key: str, reused: str, older: Iterable[str]) -> None:
    """What has a snapshot keeps its name, as does an older hook's disk."""
    if key != reused and {key, reused} & {*state.backups, *older}:
        raise Refused


def _runs(state: State, vm_id: str, key: str) -> bool:
    """By libvirt; where it cannot be asked, an open disk is in use, and otherwise the start is refused."""
    is_in_use = key != "" and not state.disks[key].is_aside and state.is_open(key)
    if is_in_use and (state.is_silent or state.is_flaky):
        return True
    if state.is_silent:
        raise Refused
    return state.vms[vm_id].is_active


def _leave_running(p: Prediction, vm_id: str, image_id: str, key: str) -> None:
    """vdsm recovers a VM: no write, no tag but bookkeeping."""
    disk = p.state.disks.get(key)
    if disk and disk.state in (UNFINISHED, DELETING):
        raise Refused
    if disk and not disk.is_aside and p.state.is_open(key):
        p.becomes(key, replace(disk, state=READY, stopped=None, unneeded=None))
        if not p.state.vms[vm_id].is_active:
            _local(p, vm_id, image_id)


def _is_good(policy: Policy, source: Source, disk: LocalDisk) -> bool:
    """A kept disk that the VM can go on with; of an older hook's only its name says what it is a copy of."""
    if _is_left_alone(policy, disk):
        return disk.name == source.volume and not disk.is_stale
    is_older = disk.is_older and not disk.version
    is_same = disk.name == source.volume if is_older else disk.version == source.version
    return is_same and disk.size >= source.size and not disk.is_stale


def _is_left_alone(policy: Policy, disk: LocalDisk) -> bool:
    """A complete disk of an older hook, about which the operator has not decided."""
    return disk.is_older and disk.state in COMPLETE and policy.older_disks == "keep"


def _take_back(p: Prediction, key: str, policy: Policy, disk: LocalDisk, source: Source) -> None:
    named = replace(disk, version=disk.version or source.version, is_older=False)
    if _is_left_alone(policy, disk):
        named = disk
    p.instead[key] = [named]  # it could not be activated, and is as idle as before
    p.becomes(key, replace(named, state=READY, stopped=None, unneeded=None, is_active=True))


def _bring_in(p: Prediction, vm_id: str, image_id: str, making: Making, is_left: bool = False) -> str:
    """The key of the template LV that the image's disk starts from, "" if it is copied in full.

    One that is missing is filled; `is_left`: or left alone while it is.
    """
    policy, base = making.policy, p.state.templates.get(p.state.sources[image_id].base)
    if base is None or not policy.templates or p.state.is_uncached:
        return ""
    p.state, key, is_good = shelf.look(p.state, base, policy)
    if key and p.state.cached[key].is_spoiled:
        if shelf.is_thin(policy):  # which a snapshot of it shows
            _spoiled_disk(p, vm_id, image_id, making, key)
        is_good = not p.state.is_open(key)
        if is_good:
            p.state = shelf.taken_away(p.state, key, policy.erase)
        key = ""
    if key == "" and is_good:
        beside = shelf.fits(policy, *_wanted(p.state, image_id, policy, is_whole=False))
        key = _begin_fill(p, base, policy, beside)
        if key and is_left:
            p.state = replace(p.state, flight=_flight(vm_id, image_id, key, making, source=base))
        elif key:
            p.state = shelf.filled(p.state, key)
    return key


def _begin_fill(p: Prediction, base: Source, policy: Policy, beside: shelf.IsRoom | None) -> str:
    """An unfinished template LV, if there is room for it and for what is to be `beside` it; its key or ""."""
    planned = shelf.plan_fill(p.state, base, policy)
    if planned is None:
        return ""
    lv, over = planned
    alone = shelf.fits(policy, base.size, base.data)

    def is_room(then: State, spare: int) -> bool:
        return alone(then, spare) and (beside is None or beside(then, spare - lv.takes))

    if not _find_room(p, policy, is_room, "", (), over):
        return ""
    key = shelf.new_key(base, lv.is_thin)
    p.state = p.state.with_cached(key, lv)
    return key


def _spoiled_disk(p: Prediction, vm_id: str, image_id: str, making: Making, base: str) -> None:
    """A snapshot that is given up at once; it is set aside if it must be erased."""
    policy = making.policy
    is_room = shelf.fits(policy, *_wanted(p.state, image_id, policy, is_whole=False))
    if not _find_room(p, policy, is_room, base, making.replaced):
        raise Refused
    _free_name(p, image_id, making)
    key, made = _made(p, vm_id, image_id, policy, base)
    key += " spoiled"
    p.becomes(key, made)
    p.goes(key, policy.erase)
    if policy.erase != "none":
        p.becomes(key, replace(p.state.disks[key], writes=0))


def _wanted(state: State, image_id: str, policy: Policy, is_whole: bool) -> tuple[int, int]:
    """Bytes of the image's disk, and those that are written to it; upon a template LV unless `is_whole`."""
    source = state.sources[image_id]
    base = state.templates.get(source.base)
    data = source.data + (base.data if base and is_whole else 0)
    return source.size + policy.disk, data if shelf.is_thin(policy) else source.size


def _made(p: Prediction, vm_id: str, image_id: str, policy: Policy, base: str) -> tuple[str, LocalDisk]:
    """An unfinished disk and its key."""
    source, is_thin = p.state.sources[image_id], shelf.is_thin(policy)
    size, writes = _wanted(p.state, image_id, policy, is_whole=not base)
    size = shelf.whole(p.state, size)
    made = LocalDisk(source.volume, vm_id, image_id, UNFINISHED, source.version, (), size, is_thin, writes)
    if base and is_thin:
        made = replace(made, shared=(base, p.state.cached[base].data))
    return newborn(vm_id, image_id), made


def _begin_copy(p: Prediction, vm_id: str, image_id: str, making: Making, base: str) -> tuple[str, str]:
    """An unfinished disk, from the template LV `base` or without one, if there is room.

    Returns its key, and `base`, "" where there was room only without it.
    """
    policy = making.policy
    is_room = shelf.fits(policy, *_wanted(p.state, image_id, policy, is_whole=not base))
    is_beside = base != "" and not shelf.is_thin(policy)
    if is_beside:  # it is opened first
        p.state = p.state.with_cached(base, p.state.cached[base].used_at(p.state.now))
    is_good = _find_room(p, policy, is_room, base, () if is_beside else making.replaced)
    if not is_good and is_beside:  # there may be if that one makes room, too, or what is replaced
        if not p.state.is_open(base):
            p.state = p.state.with_cached(base, replace(p.state.cached[base], is_active=False))
        return _begin_copy(p, vm_id, image_id, making, "")
    if not is_good:
        raise Refused
    _free_name(p, image_id, making)
    key, made = _made(p, vm_id, image_id, policy, base)
    if base:
        p.state = p.state.with_cached(base, p.state.cached[base].used_at(p.state.now))
    if is_beside and not p.state.is_open(base):  # also if a killed start has left it active
        p.state = p.state.with_cached(base, replace(p.state.cached[base], is_active=False))
    p.becomes(key, made)
    p.instead[key] = [*_given_up(made, policy)]
    if made.shared[0]:  # a snapshot is as large as what it is of, and then larger
        small = replace(made, size=p.state.cached[base].size)
        p.instead[key] += [*_given_up(small, policy), small]
    return key, base


def _find_room(
    p: Prediction,
    policy: Policy,
    is_room: shelf.IsRoom,
    but: str,
    replaced: tuple[str, ...],
    over: Iterable[str] = (),
) -> bool:
    """Remove what is set aside, then idle template LVs, or replaced disks, or both, to make room.

    Template LVs `over` a limit are removed first.  Nothing is removed if that would not help.
    """
    thin = shelf.is_thin(policy)
    waiting = [k for k, disk in p.state.disks.items() if disk.is_thin == thin and _waits(p.state, k)]
    spares = [k for k in replaced if k in p.state.disks and p.state.disks[k].is_thin == thin]
    spares = [k for k in spares if not p.state.is_open(k)]
    comes = sum(_takes(p.state, p.state.disks[k]) for k in waiting)
    comes += sum(p.state.cached[key].takes for key in shelf.aside(p.state, thin))
    takes = sum(_takes(p.state, p.state.disks[k]) for k in spares)
    evicted = sum(p.state.cached[key].takes for key in shelf.idle(p.state, thin, but))
    if not is_room(p.state, comes + evicted + takes):
        return False
    for key in over:
        p.state = p.state.with_cached(key, None)
    for key in sorted([*waiting, *shelf.aside(p.state, thin)]):
        if is_room(p.state, 0):
            return True
        if key in p.state.cached:
            p.state = p.state.with_cached(key, None)
        else:
            _erase_and_remove(p, key, policy, does_erase=True)
    p.state, is_good = shelf.with_room(p.state, policy, is_room, but)
    if not (is_good or is_room(p.state, takes)):  # template LVs first, as they are only copies
        p.state, is_good = shelf.with_room(p.state, policy, is_room, but, beside=takes)
    if is_good or not is_room(p.state, takes):
        return is_good
    for key in spares:
        _erase_and_remove(p, key, policy, does_erase=True)
        if is_room(p.state, 0):
            return True
    p.state, is_good = shelf.with_room(p.state, policy, is_room, but)
    return is_good


def _waits(state: State, key: str) -> bool:
    """Whether it only waits to be erased."""
    disk = state.disks[key]
    return disk.is_aside and not disk.name and not (state.is_open(key) or key in state.backups)


def _takes(state: State, disk: LocalDisk) -> int:
    """What is free once it is removed, as far as LVM reports it."""
    if not disk.is_thin:
        return disk.size
    return disk.writes + (0 if disk.shared[0] in state.cached else disk.shared[1])


def _free_name(p: Prediction, image_id: str, making: Making) -> None:
    """What is replaced gives its name to the new disk."""
    for key in making.replaced:
        disk = p.state.disks.get(key)
        if disk and disk.name == p.state.sources[image_id].volume:
            p.becomes(key, replace(disk, name=ANOTHER))


def _given_up(made: LocalDisk, policy: Policy) -> Iterator[LocalDisk]:
    """What may be left of it if it is removed as it is."""
    if policy.erase != "none":
        aside = replace(made, state=ASIDE, erase=policy.erase)
        yield from (aside, replace(aside, name=""))


def _copied(p: Prediction, vm_id: str, image_id: str, key: str, policy: Policy) -> None:
    """The copy is complete; it is given up if the VM was powered off, or libvirt knows it no longer."""
    is_asked = not (p.state.is_silent or p.state.is_flaky)
    if p.state.is_cancelled(vm_id) or (is_asked and not p.state.vms[vm_id].is_defined):
        p.goes(key, policy.erase)
        raise Refused
    content = p.state.sources[image_id].content
    p.becomes(key, replace(p.state.disks[key], state=READY, holds=(content,)))
    _local(p, vm_id, image_id)


def _local(p: Prediction, vm_id: str, image_id: str) -> None:
    paths = {**p.state.vms[vm_id].paths, image_id: p.state.sources[image_id].volume}
    p.state = p.state.with_vm(vm_id, paths=paths)


# -- stopping


def _before_vm_destroy(p: Prediction, vm_id: str) -> None:
    """A start is to end, if libvirt does not say that the VM has started."""
    state, vm = p.state, p.state.vms[vm_id]
    is_asked = not (state.is_silent or state.is_mute)
    if vm.using == "off" or (is_asked and (vm.is_active or vm.has_started)):
        return
    if state.age_of(vm_id, DESTROYED) >= SETTLED:
        p.state = state.with_mark(vm_id, DESTROYING, state.now)


def _drifts(p: Prediction, vm_id: str, own: Iterable[str]) -> None:
    """What the VM did not run from in the end is kept."""
    for key in own:
        disk = p.state.disks[key]
        if disk.image in p.state.vms[vm_id].drifted and disk.state == READY and not disk.is_stale:
            p.becomes(key, replace(disk, state=DRIFTED, stopped=None, unneeded=None))


def _after_vm_destroy(p: Prediction, vm_id: str) -> None:
    """Every disk of the VM is removed or kept; what cannot be removed at once is left to gc."""
    state, vm = p.state, p.state.vms[vm_id]
    if vm.using == "off":
        return
    policy = state.rules.of(vm_id, vm.using)
    own = {key: disk for key, disk in state.disks.items() if disk.vm == vm_id and not disk.is_aside}
    own = {key: disk for key, disk in own.items() if not state.is_locked(key)}
    is_refused = any(map(state.is_open, own)) and (state.is_silent or vm.is_active)
    if is_refused and vm.drifted:
        raise Refused
    _drifts(p, vm_id, own)
    if vm_id + DESTROYING in state.marks:
        p.state = p.state.with_mark(vm_id, DESTROYED, state.marks[vm_id + DESTROYING])
        p.state = p.state.with_mark(vm_id, DESTROYING, None)
    if is_refused:
        raise Refused
    for key in own:
        disk = p.state.disks[key]
        if disk.state == DRIFTED or _is_left_alone(policy, disk):
            is_rest = not (state.is_open(key) or key in state.backups)
            p.becomes(key, replace(disk, is_active=disk.is_active and not is_rest))
            continue
        if policy.on_stop == "keep" and disk.state in COMPLETE:
            stopped = replace(disk, state=STOPPED, stopped=state.now, unneeded=None)
            p.becomes(key, stopped if disk.state == READY else disk)
        elif state.is_open(key) or policy.erase != "none" or key in state.backups:
            p.becomes(key, replace(disk, state=DELETING))
        else:
            p.instead[key] = [replace(disk, state=DELETING)]  # it could not be removed
            p.goes(key, "none")


# -- given up


def _remove(p: Prediction, vm_id: str) -> None:
    """The operator gives up a VM's disks: all of them, or if anything needs one of them, none."""
    state = p.state
    own = [key for key, disk in state.disks.items() if disk.vm == vm_id and not disk.is_aside]
    is_needed = [key for key in own if state.is_open(key) or state.is_locked(key) or key in state.backups]
    is_known = state.is_running(vm_id) or state.is_waiting(vm_id)
    if state.is_silent or is_known or is_needed or not own:
        raise Refused
    for key in own:
        p.goes(key, state.rules.of(vm_id).erase)


# -- templates


def _prefetch(p: Prediction, template: str, backend: str, is_left: bool = False) -> None:
    """The template is in the cache; `is_left`: or left alone while it is copied."""
    rules, base = p.state.rules, p.state.templates[template]
    policy = rules.of("", backend)
    if not rules.any_templates:
        raise Refused
    p.state, key, is_good = shelf.look(p.state, base, policy)
    if key:
        p.state = p.state.with_cached(key, p.state.cached[key].used_at(p.state.now))
        return
    if is_good:
        key = _begin_fill(p, base, policy, None)
    if not key:
        raise Refused
    if is_left:
        p.state = replace(p.state, flight=Flight("", "", key, policy, base))
    else:
        p.state = shelf.filled(p.state, key)


def _prefetch_left(p: Prediction, template: str, backend: str) -> None:
    _prefetch(p, template, backend, is_left=True)


# -- gc


def _gc(p: Prediction, may_start: bool = True) -> None:
    """Removes what no VM needs, one disk at a time; `may_start` as before_vdsm_start is not."""
    is_asked = any(_depends_on_vms(p.state, key, may_start) for key in p.state.disks)
    for key in [*p.state.disks]:
        _collect(p, key, may_start, may_start, is_asked)
    p.state, has_doubts = shelf.collected(p.state, may_start)
    p.has_doubts = p.has_doubts or has_doubts
    p.state = swept(p.state, may_start)


def swept(state: State, may_start: bool = True) -> State:
    """Without the files of power-offs that end no start any more."""
    left = {name: then for name, then in state.marks.items() if abs(state.now - then) <= KEEP_MARKS}
    return replace(state, marks=left if may_start else {})


def _gc_of_some(p: Prediction, keys: Iterable[str], does_erase: bool = True) -> None:
    """What gc does with these disks, or what it has done before it erases them."""
    for key in keys:
        _collect(p, key, True, does_erase)


def _gc_dry_run(p: Prediction) -> None:
    """Only says so."""
    tried = Prediction(p.state)
    _gc(tried)
    p.has_doubts = tried.has_doubts


def _depends_on_vms(state: State, key: str, may_start: bool) -> bool:
    """Whether gc must ask libvirt about this disk: it may have run, is marked, or would not stay as it is."""
    disk = state.disks[key]
    if state.is_open(key) or disk.is_aside or disk.state == DRIFTED:
        return False
    alone = Prediction(replace(state, vms={}, is_silent=False))
    _collect(alone, key, may_start, may_start)
    is_kept = alone.state.disks.get(key) == disk and not alone.has_doubts
    return not is_kept or disk.unneeded is not None or (disk.state == READY and not disk.is_stale)


def _collect(p: Prediction, key: str, may_start: bool, does_erase: bool, is_asked: bool = True) -> None:
    """What gc does; on any doubt a disk is kept.  `is_asked`: whether it asks libvirt, about any disk."""
    disk, now = p.state.disks[key], p.state.now
    policy = p.state.rules.of(disk.vm)
    if p.state.is_locked(key):
        return
    is_needed = p.state.is_open(key)
    if not disk.is_aside and not p.state.is_silent:
        is_needed = is_needed or p.state.is_running(disk.vm) or p.state.is_prepared(key)
    if is_needed:
        if disk.state in COMPLETE and disk.unneeded is not None:
            p.becomes(key, replace(disk, unneeded=None))
        return
    if disk.state == DRIFTED:
        return
    if not disk.is_aside and p.state.is_silent:
        p.has_doubts = p.has_doubts or is_asked
    elif _is_elsewhere(p.state, disk):
        p.becomes(key, replace(disk, state=DRIFTED, unneeded=None))
    elif _is_left_alone(policy, disk):
        return
    elif disk.is_aside and not may_start:
        return  # vdsm does not wait for an erase
    elif disk.state not in COMPLETE:
        _erase_and_remove(p, key, policy, does_erase)
    elif disk.state == STOPPED:
        stopped, unneeded = disk.stopped or 0, disk.unneeded
        is_waiting = may_start and p.state.is_waiting(disk.vm)
        if _is_in_doubt(p, key, stopped):
            p.becomes(key, replace(disk, stopped=now, unneeded=None))
        elif _is_due(p, disk, stopped, policy.keep_for):
            if is_waiting and unneeded is not None and unneeded > now:
                p.becomes(key, replace(disk, unneeded=None))
            elif not is_waiting or _is_past_grace(p, key, policy):
                _erase_and_remove(p, key, policy, does_erase)
        elif unneeded is not None and (disk.made or 0) <= stopped <= now:
            p.becomes(key, replace(disk, unneeded=None))
    elif policy.on_stop == "keep":
        if not (may_start and p.state.is_waiting(disk.vm)) or _is_past_grace(p, key, policy):
            p.becomes(key, replace(disk, state=STOPPED, stopped=now, unneeded=None))
    elif not may_start or _is_past_grace(p, key, policy):
        _erase_and_remove(p, key, policy, does_erase)


def _is_elsewhere(state: State, disk: LocalDisk) -> bool:
    """Whether libvirt's definition of its VM, which has stopped, has the image on another volume."""
    is_candidate = disk.state == READY and not disk.is_stale and state.is_waiting(disk.vm)
    return is_candidate and disk.image in state.vms[disk.vm].drifted


def _is_past_grace(p: Prediction, key: str, policy: Policy) -> bool:
    """Whether it was seen as unneeded long enough; it is marked if it was not seen so before, or in doubt."""
    disk = p.state.disks[key]
    if disk.unneeded is None or _is_in_doubt(p, key, disk.unneeded):
        p.becomes(key, replace(disk, unneeded=p.state.now))
        return False
    return _is_due(p, disk, disk.unneeded, policy.grace)


def _is_in_doubt(p: Prediction, key: str, mark: int) -> bool:
    """Whether a disk is marked again because its mark is older than the disk.

    Not while the clock is wrong: then it is only kept, like a disk with a mark in the future.
    """
    made = p.state.disks[key].made or 0
    is_in_doubt = mark <= p.state.now and mark < made
    p.has_doubts = p.has_doubts or is_in_doubt
    return is_in_doubt and p.state.now >= made


def _is_due(p: Prediction, disk: LocalDisk, mark: int, due: int) -> bool:
    """Whether the mark is so old; on any doubt it is not."""
    age = p.state.now - mark
    p.has_doubts = p.has_doubts or age < 0  # the clock went backwards
    return 0 <= age >= due and mark >= (disk.made or 0)


def _erase_and_remove(p: Prediction, key: str, policy: Policy, does_erase: bool) -> None:
    """What must be erased is set aside for that; where vdsm waits for gc, the next gc erases it."""
    if key in p.state.backups:
        p.has_doubts = True
        return
    p.goes(key, policy.erase)
    if does_erase and key in p.state.disks:
        p.erased[key] = p.state.disks[key].erase
        p.becomes(key, None)


# -- what a VM with local disks must not do


def _arrives(p: Prediction, vm_id: str) -> None:
    """A VM without the property comes from another host."""
    if p.state.vms[vm_id].using == "off":
        _become_stale(p, vm_id, set())
    _forbidden(p, vm_id)


def _forbidden(p: Prediction, vm_id: str) -> None:
    vm = p.state.vms[vm_id]
    if vm.using != "off" and p.state.rules.of(vm_id, vm.using).enabled:
        raise Refused


CALLS: Mapping[str, Callable[..., object]] = {
    "define": _define,
    "create": _create,
    "destroy": _destroy,
    "undefine": _undefine,
    "after_disk_prepare": _after_disk_prepare,
    "before_vm_start": _before_vm_start,
    "before_vm_destroy": _before_vm_destroy,
    "after_vm_destroy": _after_vm_destroy,
    "before_vm_migrate_source": _forbidden,
    "before_vm_migrate_destination": _arrives,
    "before_vm_hibernate": _forbidden,
    "before_vm_dehibernate": _forbidden,
    "remove": _remove,
    "prefetch": _prefetch,
    "gc": _gc,
    "gc --dry-run": _gc_dry_run,
    # parts of those above
    "look": _look,
    "is start": _check_start,
    "is resumed": _check_resumed,
    "prepare": _prepare,
    "prepare in vain": _prepare_in_vain,
    "make way": _make_way,
    "gc of some": _gc_of_some,
    "before copy": _before_copy,
    "before fill": _before_fill,
    "prefetch before fill": _prefetch_left,
    "finish": _finish,
    "give up": _give_up,
    "lose": _lose,
}
