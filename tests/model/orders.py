"""The orders in which two calls at once may have happened.

While one call is paused, others are made.  The result must be one that the parts of the calls, one after the
other in some order, would have.  A `Branch` is one such order; the orders that fit what was seen are kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from tests.model.predict import Call, Prediction, predict, swept
from tests.model.rules import MIB
from tests.model.state import UNFINISHED, Cached, State
from tests.model.world import Ended

_STARTS = ("after_disk_prepare", "before_vm_start", "prefetch")


@dataclass(frozen=True)
class Branch:
    """What is, if the calls have happened in one order.

    `left` are the parts of the paused call that have not happened yet.  Of gc it is empty: it deals with one
    disk after the other, and passes over what somebody works on.
    """

    state: State
    paused: Call
    left: tuple[Call, ...]
    is_refused: bool = False
    erased: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> Hashable:
        """What tells it from others."""
        vms = tuple(
            (vm.is_defined, vm.has_started, vm.is_active, frozenset(vm.paths.items()))
            for vm in self.state.vms.values()
        )
        disks, marks = frozenset(self.state.disks.items()), frozenset(self.state.marks.items())
        return disks, marks, vms, len(self.left), self.is_refused

    def next(self, vm_id: str) -> Iterator[Branch]:
        """The same when the paused call has gone on, as far as that can matter to this VM."""
        for part in _parts_of_gc(self.state, vm_id) if self.paused.what == "gc" else self.left[:1]:
            # The call that is made meanwhile may have to wait for gc, when it has begun to prepare its disk.
            waits = [_predicted(self.state, part, frozenset(), vm_id)] if self.paused.what == "gc" else []
            for p in (predict(self.state, part), *_powered_off_within(self.state, part), *waits):
                left = () if p.is_refused or p.is_over else self.left[1:]
                yield replace(self.after(p), left=left, is_refused=p.is_refused)

    def after(self, p: Prediction) -> Branch:
        return replace(self, state=p.state, erased={**self.erased, **p.erased})


def begin(state: State, call: Call) -> list[Branch]:
    """`call` has begun."""
    return [Branch(state, call, tuple(_parts(state, call)))]


def go_on(branches: list[Branch], call: Call, ended: Ended) -> list[Branch]:
    """`call` was made meanwhile, and ended so; where it had to wait, the paused one has gone on during it."""
    found: list[Branch] = []
    for part in _parts_around(branches[0].state, call) if ended.other else [call]:
        if ended.is_refused:
            found += _made(branches, part, is_refused=True)
        branches = _made(branches, part, is_refused=False)
    return _different(found if ended.is_refused else branches)


def _made(branches: list[Branch], call: Call, is_refused: bool) -> list[Branch]:
    """`call` was made, with that outcome."""
    vm_id = "" if call.what.startswith("gc") else call.vm_id
    found = []
    for branch in _continued(branches, vm_id):
        predictions = (*_passing_over(branch.state, call, branch.paused), *_squeezed(branch.state, call))
        found += [branch.after(p) for p in predictions if p.is_refused == is_refused]
    return _different(found)


def end(branches: list[Branch], ended: Ended) -> list[Branch]:
    """The paused call has gone on, and ended so."""
    finals = [b for b in _continued(branches, "") if not b.left and b.is_refused == ended.is_refused]
    return [replace(b, state=swept(b.state)) if b.paused.what == "gc" else b for b in finals]


def _continued(branches: list[Branch], vm_id: str) -> list[Branch]:
    """These, and those where the paused call has gone on."""
    found: dict[Hashable, Branch] = {}
    while branches:
        new = _different(b for b in branches if b.key not in found)
        found.update((b.key, b) for b in new)
        branches = [after for b in new for after in b.next(vm_id)]
    return [*found.values()]


def _different(branches: Iterable[Branch]) -> list[Branch]:
    return [*{b.key: b for b in branches}.values()]


def _parts(state: State, call: Call) -> Iterator[Call]:
    """What the call does, in steps between which others may act."""
    images = [*call.arguments[1:]] if call.vm_id else []
    if call.what == "before_vm_start":
        yield Call("look", (call.vm_id,))
        yield Call("is resumed", (call.vm_id,))
        images = [i for i in state.vms[call.vm_id].images if i not in state.vms[call.vm_id].paths]
    if call.what == "after_disk_prepare":
        yield Call("is start", (call.vm_id,))
    for image_id in images:
        yield Call("make way", (call.vm_id, image_id))
        yield Call("prepare", (call.vm_id, image_id))
    if call.what in ("before_vm_start", "before_vm_destroy", "after_vm_destroy", "prefetch"):
        yield call


def _parts_around(state: State, call: Call) -> list[Call]:
    """What the call does before and after it waits for the paused one; gc waits before it erases."""
    if call.what == "gc" and call.arguments == (True,):
        return [Call("gc of some", (tuple(state.disks), False)), call]
    return [*_parts(state, call)] or [call]


def _powered_off_within(state: State, part: Call) -> Iterator[Prediction]:
    """What a part of a start does if its VM is powered off when it has begun."""
    if part.what in ("look", "make way", "prepare", "before_vm_start") and state.is_cancelled(part.vm_id):
        p = predict(replace(state, marks={}), part)
        p.state = replace(p.state, marks=state.marks)
        yield p
        if part.what == "prepare":
            yield predict(state, Call("prepare in vain", part.arguments))


def _parts_of_gc(state: State, vm_id: str) -> Iterator[Call]:
    """The disks that this VM may meet, each set aside first; of the others only the room matters."""
    volumes = {state.sources[image_id].volume for image_id in state.vms[vm_id].images} if vm_id else set()
    own = {key for key, disk in state.disks.items() if disk.vm == vm_id and disk.name}
    met = [key for key, disk in state.disks.items() if key in own or disk.name in volumes]
    for key in met:
        yield Call("gc of some", ((key,), False))
        yield Call("gc of some", ((key,),))
    yield Call("gc of some", (tuple(key for key in state.disks if key not in met),))


def _passing_over(state: State, call: Call, paused: Call) -> Iterator[Prediction]:
    """What the call does, also if it skips disks that the paused call may be working on."""
    whole = predict(state, call)
    yield whole
    changed = [key for key in whole.stages if key in state.disks]
    if paused.what == "gc":  # many at once, then those that are erased one after the other
        locks = [frozenset(changed), *(frozenset({key}) for key in changed)]
    else:
        images = state.vms[paused.vm_id].images if paused.vm_id else ()
        names = {state.sources[image_id].volume for image_id in images}
        disks = {key: state.disks[key] for key in changed}
        locks = [frozenset(k for k, d in disks.items() if d.vm == paused.vm_id or d.name in names)]
    for locked in filter(None, locks):
        yield _predicted(state, call, locked)
    if call.what == "gc" and paused.vm_id:
        for key in ("", *state.disks):  # the one that the paused call works on, if it is there
            yield _predicted(state, call, frozenset({key}), paused.vm_id)


def _predicted(state: State, call: Call, locked: frozenset[str], prepared: str = "") -> Prediction:
    """What the call does where somebody works on these disks."""
    p = predict(replace(state, locked=locked, prepared=prepared), call)
    p.state = replace(p.state, locked=frozenset(), prepared="")
    return p


def _squeezed(state: State, call: Call) -> Iterator[Prediction]:
    """What the call does where the paused one works on template LVs: it holds them, and is filling one."""
    if not (state.cached or state.rules.any_templates) or call.what not in _STARTS:
        return
    p = predict(replace(state, is_uncached=True), call)
    p.state = replace(p.state, is_uncached=False)
    yield p
    yield from _with_all_held(state, call)


def _with_all_held(state: State, call: Call) -> Iterator[Prediction]:
    filling = [Cached("", "", "", UNFINISHED, "", 0, False, 0)]
    for base in state.templates.values():
        lv = Cached("", base.volume, "", UNFINISHED, "", -(-base.size // MIB) * MIB, False, base.data)
        filling += [lv, replace(lv, is_thin=True)]
    for lv in filling:
        held = state.with_cached("held", lv)
        p = predict(replace(held, locked=frozenset(held.cached)), call)
        p.state = replace(p.state.with_cached("held", None), locked=frozenset())
        yield p
