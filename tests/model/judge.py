"""Compares a host with a state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from tests.model.librarian import Librarian
from tests.model.predict import Call, Prediction, Stages
from tests.model.rules import Policy
from tests.model.seen import Seen, as_seen, unlike
from tests.model.state import (
    DELETING,
    DRIFTED,
    GUESTS,
    READY,
    STOPPED,
    UNFINISHED,
    LocalDisk,
    State,
    is_newborn,
)
from tests.model.world import LEFT, STARTS, Ended, Look, World


@dataclass
class Judge:
    """What was learned of the host so far.  Its methods raise AssertionError."""

    world: World
    others: dict[str, Seen] = field(default_factory=dict)  # volumes that are not localdisk's, by name
    fingerprints: dict[str, str] = field(default_factory=dict)  # version of a source -> its tag's value
    locks: frozenset[str] = frozenset()
    librarian: Librarian = field(default_factory=Librarian)

    # -- a call

    def after(self, state: State, call: Call, ended: Ended, p: Prediction) -> State:
        """What is after a call that was to do `p`."""
        is_exact = not ended.trouble or ended.result in LEFT
        if is_exact or (ended.is_good and call.what in STARTS):
            self._require_end(call, ended, p)
            ways = [p.state, *(way.state for way in p.ways)]
            options: dict[str, Stages] = {
                key: [way.disks.get(key) for way in ways] for key in _keys(state, *ways)
            }
            for way in (p, *p.ways) if ended.trouble == "fail" else ():
                for key in way.replaced:  # the next start, or gc, removes it
                    options[key] = [*way.options(key), *options[key]]
        else:
            every = (*p.ways, p)
            keys = {*state.disks, *(key for way in every for key in way.stages)}
            options = {key: [disk for way in every for disk in way.options(key)] for key in keys}
            if ended.trouble in ("hook", "term"):  # then what is unfinished goes at once
                for key in filter(is_newborn, options):
                    options[key] = [disk for disk in options[key] if not disk or disk.state != UNFINISHED]
        after = self.match(
            replace(p.state, disks=state.disks),
            options,
            {k: {e} for k, e in p.erased.items()},
            before=state,
            is_exact=is_exact and not ended.other,
            erases=_erases(state, call),
        )
        self._check_kept(state, after, call, ended)
        after = self.check_marks([state, p.state, *(way.state for way in p.ways)], after, is_exact)
        if "before" in call.what and ended.result not in LEFT and state.flight is None:
            after = replace(after, flight=None)
        return self.check(after, call, ended)

    def _check_kept(self, before: State, after: State, call: Call, ended: Ended) -> None:
        """A guest's data may only be lost by a decision of the operator, whatever happens."""
        for key, disk in before.disks.items():
            if is_newborn(key):  # nobody has looked since it was made
                continue
            now = after.disks.get(key)
            is_there = now is not None and now.state in GUESTS and now.holds == disk.holds
            is_good = disk.state not in GUESTS or is_there or _may_go(before, after, disk, call, ended)
            assert is_good, f"{call} has lost the disk {key}, {disk}, which is now {now}"

    def check_marks(self, states: list[State], after: State, is_exact: bool) -> State:
        """The files of power-offs are as they were, in the first of `states`, or as they should be."""
        look = self.world.look()
        during = range(states[0].now, look.now + 1)
        possible = states[1:] if is_exact else states
        for name in {*look.marks, *(name for state in states for name in state.marks)}:
            wanted = {state.marks.get(name) for state in possible}
            now = look.marks.get(name)
            is_new = now is not None and now in during and any(w in during for w in wanted if w is not None)
            assert now in wanted or is_new, f"{name} is of {now}, and not of {wanted}"
        return replace(after, marks=look.marks)

    def _require_end(self, call: Call, ended: Ended, p: Prediction) -> None:
        """It ended as it should."""
        flight = p.state.flight
        expected = "refused" if p.is_refused else "done"
        if call.what in ("give up", "lose"):
            expected = "killed"
        elif call.what in ("before copy", "before fill", "prefetch before fill") and flight:
            expected = "filling" if flight.is_filling else "copying"
        assert ended.result == expected, f"{call} is {ended.result} and not {expected}: {ended.said}"
        if call.what.startswith("gc") and call.arguments != (False,):
            assert ended.has_doubts == p.has_doubts, f"{call} has{' no' * p.has_doubts} doubts: {ended.said}"
        vm = p.state.vms.get(call.vm_id)
        if vm and not vm.is_active and ended.paths is not None:
            assert ended.paths == vm.paths, f"{call}: the VM is to run from {ended.paths}, not {vm.paths}"

    # -- disks

    def match(
        self,
        state: State,
        options: Mapping[str, Stages],
        erased: Mapping[str, set[str]],
        before: State,
        is_exact: bool,
        erases: frozenset[str] = frozenset({"none"}),
    ) -> State:
        """`state` with its disks as they are, each one of its options, and its template LVs.

        Keys of the newborn become UUIDs; those that are not in `options` are as in `state`.  Template LVs
        must be those of `state` if `is_exact`; those that went were erased as one of `erases` says.
        """
        look = self.world.look()
        during = range(state.now, look.now + 1)
        mine = (seen for seen in look.volumes if seen.name not in self.others and not seen.is_template)
        left = {seen.uuid: seen for seen in mine}
        disks: dict[str, LocalDisk] = {}
        new_keys: dict[str, str] = {}
        for key in sorted(options, key=lambda key: (is_newborn(key), key)):
            volumes = [left[key]] if key in left else [*left.values()] if is_newborn(key) else []
            found = self._find(key, options[key], volumes, during)
            if found:
                seen, disk = found
                disks[seen.uuid] = disk
                new_keys[key] = left.pop(seen.uuid).uuid
            elif key in look.erased and erased.get(key):
                how, allowed = look.erased[key], erased[key]
                assert how in allowed or "none" in allowed, f"{key} was erased by {how}, not {allowed}"
        assert not left, f"nobody needs {[(seen.name, sorted(seen.tags)) for seen in left.values()]}"
        cached = self.librarian.look(before, look)
        after = replace(state, now=look.now, disks=disks)
        new_keys |= self.librarian.compare(before, after, cached, is_exact)
        self.librarian.check_erased(before, look, cached, erases)
        flight = state.flight
        if flight:
            key, reads = (new_keys.get(key, key) for key in (flight.key, flight.reads))
            flight = replace(flight, key=key, reads=reads)
        return replace(after, cached=cached, flight=flight)

    def _find(
        self, key: str, options: Stages, volumes: list[Seen], during: range
    ) -> tuple[Seen, LocalDisk] | None:
        """The volume that is the disk, and which option that is; None: it is not there, as it may be."""
        problems = []
        for option in reversed(options):
            for seen in volumes if option else ():
                assert option
                problem = [*unlike(option, seen, during)] or [*self._unlike_source(option, seen)]
                if not problem:
                    return seen, as_seen(option, seen)
                problems.append(
                    f"  {seen.name} {sorted(seen.tags)}\n  is not {option}:\n  {', '.join(problem)}"
                )
        is_there = bool(volumes) and not is_newborn(key)
        text = "\n".join(problems) or f"  it is {'still' if is_there else 'not'} there"
        is_good = None in options and not is_there
        assert is_good, f"{key} is not as it should be\n{text}"
        return None

    def _unlike_source(self, disk: LocalDisk, seen: Seen) -> Iterable[str]:
        """Sources that differ have tags that differ, and the same source has the same tag."""
        values = seen.values("SOURCE")
        if disk.state == DELETING or disk.is_aside:
            return
        if not disk.version or len(values) != 1:
            if len(values) != bool(disk.version):
                yield f"its source is {sorted(values)}"
            return
        (value,) = values
        of_others = [
            version for version, v in self.fingerprints.items() if v == value and version != disk.version
        ]
        known = self.fingerprints.setdefault(disk.version, value)
        if value != known or of_others:
            yield f"its source is {value}, of {of_others}, and not {known} of {disk.version}"

    # -- all the rest

    def check(self, state: State, call: Call | None = None, ended: Ended | None = None) -> State:
        """What must be so at any time; returns the state as of now."""
        look = self.world.look()
        seen = {seen.name: seen for seen in look.volumes}
        for name, before in self.others.items():
            assert name in seen, f"{name}, which is not localdisk's, is gone"
            now = replace(seen[name], is_open=before.is_open, is_active=before.is_active)
            assert now == before, f"{name}, which is not localdisk's, was\n  {before} and is\n  {now}"
        self._check_locks(state, look, call, ended)
        return replace(state, now=look.now)

    def _check_locks(self, state: State, look: Look, call: Call | None, ended: Ended | None) -> None:
        """No lock file but of a living process; a killed one's lies there until gc comes, or a new start."""
        flight = state.flight
        own = {name for name in look.locks if flight and name.endswith(".turn")}
        own |= {f"{state.name_of(flight.key)}.lock"} if flight else set()
        own |= {f"{state.sources[flight.image].volume}.lock"} if flight and flight.image else set()
        if flight:
            named = {state.disks[key].name for key in flight.others if key in state.disks}
            own |= {f"{name}.lock" for name in {*flight.names, *named}}
        left, befell = look.locks - own, ended.trouble if ended else ""
        is_swept = call is not None and call.what == "gc" and not befell
        is_killed = befell in ("helper", "all") or (call is not None and call.what == "lose")
        left -= frozenset() if is_swept else self.locks
        assert is_killed or not left, f"locks are left behind: {sorted(left)}"
        self.locks = look.locks

    def check_boot(self, state: State, vm_id: str) -> None:
        """A VM that has just started runs from complete disks, its own and no one else's."""
        vm, volumes = state.vms[vm_id], {seen.name: seen for seen in self.world.look().volumes}
        for image_id, volume in vm.paths.items():
            tags, holds = volumes[volume].tags, volumes[volume].holds
            shown = f"VM {vm_id} runs from {volume}, {sorted(tags)}, which holds {holds}"
            assert {f"VM_{vm_id}", f"IU_{image_id}"} <= tags, shown
            assert not {"UPDATING", "DELETING"} & tags, shown
            kept = (
                disk.holds for disk in state.disks.values() if disk.name == volume and disk.state == READY
            )
            assert holds in (None, (state.sources[image_id].content,), *kept), shown
        for other, its in state.vms.items():
            shared = (
                {*vm.paths.values()} & {*its.paths.values()} if its.is_active and other != vm_id else set()
            )
            assert not shared, f"VMs {vm_id} and {other} both run from {shared}"


def _may_go(before: State, after: State, disk: LocalDisk, call: Call, ended: Ended) -> bool:
    """Whether this call may remove a disk that holds data of a guest."""
    rules, flight = before.rules, before.flight
    if call.what == "remove" and call.vm_id == disk.vm:
        return True
    if disk.state == DRIFTED:
        return False
    if call.what.startswith("gc"):
        return _is_due(rules.of(disk.vm), disk, after.now)
    if flight and flight.vm == disk.vm and (call.what == "finish" or ended.other):
        return _does_replace(flight.policy)
    if call.vm_id != disk.vm or before.vms[disk.vm].using == "off":
        return False
    policy = rules.of(disk.vm, before.vms[disk.vm].using)
    if policy.older_disks == "keep" and disk.is_older:
        return False
    if call.what == "after_vm_destroy":
        return policy.on_stop == "delete"
    is_refused = call.what == "after_disk_prepare" and ended.is_refused and not ended.trouble
    is_kept = disk.state == STOPPED and is_refused
    return call.what in (*STARTS, "before copy", "before fill") and _does_replace(policy) and not is_kept


def _does_replace(policy: Policy) -> bool:
    """Whether a start may make a new disk in the place of an existing one."""
    return policy.on_stop == "delete" or policy.on_source_change == "recopy"


def _is_due(policy: Policy, disk: LocalDisk, now: int) -> bool:
    """Whether gc may remove it by now, as far as the times go."""
    if policy.older_disks == "keep" and disk.is_older:
        return False
    if disk.state == STOPPED:
        return disk.stopped is not None and now - disk.stopped >= policy.keep_for
    return policy.on_stop == "delete"


def _erases(state: State, call: Call) -> frozenset[str]:
    """How the call may erase template LVs."""
    vm, rules = state.vms.get(call.vm_id), state.rules
    flight = {state.flight.policy.erase} if state.flight else set()
    return frozenset(
        {(rules.of(call.vm_id, vm.using) if vm and vm.using != "off" else rules.general).erase} | flight
    )


def _keys(*states: State) -> set[str]:
    return {key for state in states for key in state.disks}
