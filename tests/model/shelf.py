"""What starts, prefetches and gc do with template LVs (docs/architecture.md, "Template cache inside").

This is the part of `predict.py` about templates; sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.model.rules import Policy
from tests.model.state import ASIDE, READY, UNFINISHED, Cached, Flight, Source, State

# Whether there is room in a state, if so many bytes of the place were free besides.
IsRoom = Callable[[State, int], bool]


def new_key(base: Source, is_thin: bool) -> str:
    """The key of a template LV that has not been seen yet."""
    return f"new template {base.volume} {base.version}{' thin' * is_thin}"


def is_thin(policy: Policy) -> bool:
    return policy.backend == "lvmthin"


def fits(policy: Policy, size: int, writes: int) -> IsRoom:
    """Whether a volume of `size` bytes into which `writes` bytes are written leaves the margins."""

    def is_room(state: State, spare: int) -> bool:
        if is_thin(policy):
            return 100 * (state.pool_used - spare + writes) / state.room.pool <= policy.thin_data
        return whole(state, size) + policy.reserve <= state.free + spare

    return is_room


def whole(state: State, size: int) -> int:
    """In whole extents."""
    return -(-size // state.room.extent) * state.room.extent


def idle(state: State, thin: bool, but: str = "") -> list[str]:
    """The keys of the template LVs of a place that nobody uses, the least recently used first."""
    return [
        key
        for key, lv in _in_place(state, thin)
        if key != but and not state.is_open(key) and not state.is_locked(key)
    ]


def aside(state: State, thin: bool) -> list[str]:
    """The keys of what was set aside in a place, and waits to be erased."""
    found = (key for key, lv in state.cached.items() if lv.is_thin == thin and lv.state == ASIDE)
    return [key for key in found if not state.is_open(key)]


def _in_place(state: State, thin: bool) -> list[tuple[str, Cached]]:
    found = [(key, lv) for key, lv in state.cached.items() if lv.is_thin == thin and lv.state != ASIDE]
    return sorted(found, key=lambda pair: (pair[1].used, pair[1].name))


def with_room(
    state: State, policy: Policy, is_room: IsRoom, but: str = "", beside: int = 0
) -> tuple[State, bool]:
    """Whether there is room once idle template LVs have been evicted.

    None is where that, and `beside` bytes that can be had then, cannot help.
    """
    if is_room(state, 0):
        return state, True
    keys = idle(state, is_thin(policy), but)
    if not is_room(state, beside + sum(state.cached[key].takes for key in keys)):
        return state, False
    for key in keys:
        state = state.with_cached(key, None)
        if is_room(state, 0):
            return state, True
    return state, False


def look(state: State, base: Source, policy: Policy) -> tuple[State, str, bool]:
    """The key of the template LV that may be used, as far as its tags tell, "" if there is none.

    One that may not is taken away; the last is False where it cannot be, as somebody has it open.
    """
    key = state.shelf(base, is_thin(policy))
    if key == "" or (state.cached[key].is_sound and state.cached[key].state == READY):
        return state, key, True
    if state.is_open(key):
        return state, "", False
    return taken_away(state, key, policy.erase), "", True


def taken_away(state: State, key: str, erase: str) -> State:
    """Removed, or set aside to be erased."""
    aside = replace(state.cached[key], state=ASIDE, erase=erase, name="")
    return state.with_cached(key, None if erase == "none" else aside)


def plan_fill(state: State, base: Source, policy: Policy) -> tuple[Cached, list[str]] | None:
    """The template LV that is to be made, and the keys of those that go for `cache.max_size`.

    None if it is larger than that, or than what those in use leave of it.
    """
    thin = is_thin(policy)
    lv = Cached(
        "", base.volume, base.version, UNFINISHED, base.content, whole(state, base.size), thin, base.data
    )  # fmt: skip
    keys = idle(state, thin)
    free = policy.max_size - sum(each.takes for key, each in _in_place(state, thin) if key not in keys)
    if lv.takes > free:
        return None
    over, left = list[str](), sum(state.cached[key].takes for key in keys)
    for key in keys:
        if left > free - lv.takes:
            over.append(key)
            left -= state.cached[key].takes
    return lv, over


def filled(state: State, key: str) -> State:
    lv = replace(state.cached[key], state=READY, used=state.now, is_active=False)
    return state.with_cached(key, lv)


def landed(state: State, flight: Flight) -> tuple[State, bool]:
    """The fill that was left alone has ended; not well if the template has changed under it."""
    base = flight.source
    assert base
    if state.templates[base.volume].version != base.version:
        return taken_away(state, flight.key, flight.policy.erase), False
    return filled(state, flight.key), True


# -- gc


def collected(state: State, may_start: bool = True) -> tuple[State, bool]:
    """After gc; and whether it has doubts."""
    general, doubts = state.rules.general, False
    too_many = {*_too_many(state, False), *_too_many(state, True)}
    for key, lv in [*state.cached.items()]:
        if state.is_open(key) or state.is_locked(key):
            continue
        age = state.now - lv.used
        if lv.state == ASIDE:
            if may_start:
                state = state.with_cached(key, None)
        elif lv.state == UNFINISHED or lv.is_odd or not state.rules.any_templates or key in too_many:
            state = _gone(state, key, general.erase, may_start)
        elif age < 0:
            doubts = True
        elif age >= general.cache_for:
            state = _gone(state, key, general.erase, may_start)
        else:
            state = state.with_cached(key, replace(lv, is_active=False))
    return state, doubts


def _too_many(state: State, thin: bool) -> Iterator[str]:
    every = _in_place(state, thin)
    left = sum(lv.takes for _, lv in every)
    for key, lv in every:
        if left <= state.rules.general.max_size:
            return
        left -= lv.takes
        yield key


def _gone(state: State, key: str, erase: str, may_start: bool) -> State:
    """What must be erased is left to the next gc where vdsm waits."""
    return state.with_cached(key, None) if may_start else taken_away(state, key, erase)
