"""Compares the template LVs of a host with those of a state, as `judge.py` does with local disks.

After a call without trouble they are exactly what `shelf.py` predicts.  After trouble, and after calls that
overlapped, they must be as any order of events could have left them: see `_require_possible`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from tests.model.seen import Seen
from tests.model.state import ASIDE, READY, UNFINISHED, Cached, State
from tests.model.world import Look


@dataclass
class Librarian:
    """What was learned of templates so far.  Its methods raise AssertionError."""

    fingerprints: dict[str, str] = field(default_factory=dict)  # version of a template -> its tag's value
    names: dict[tuple[str, str, bool], str] = field(default_factory=dict)  # template, version, is thin -> LV

    def look(self, before: State, look: Look) -> dict[str, Cached]:
        """The template LVs as they are, by UUID."""
        found = {}
        for seen in look.volumes:
            if seen.is_template:
                lv = before.cached.get(seen.uuid) or self._born(seen, before)
                found[seen.uuid] = self._now(lv, seen, look)
        return found

    def compare(
        self, before: State, after: State, found: Mapping[str, Cached], is_exact: bool
    ) -> dict[str, str]:
        """Whether they are as in `after`; returns the UUIDs of those that had not been seen yet."""
        self._require_possible(before, after, found)
        left, uuids = dict(found), dict[str, str]()
        for key, lv in after.cached.items() if not is_exact else ():
            same = [uuid for uuid, each in left.items() if _is_same(lv, each)]
            uuids |= {key: same[0]} if same and key not in left else {}
        return uuids if not is_exact else self._require(after, found)

    def check_erased(
        self, before: State, look: Look, found: Mapping[str, Cached], erases: frozenset[str]
    ) -> None:
        """What has gone was erased as it had to be."""
        for key, lv in before.cached.items():
            allowed = {lv.erase} if lv.state == ASIDE else erases
            how = look.erased.get(key, "none")
            is_good = key in found or "none" in allowed or how in allowed
            assert is_good, f"{_text(lv)} was erased by {how}, and not {sorted(allowed)}"

    def _require(self, wanted: State, found: Mapping[str, Cached]) -> dict[str, str]:
        left, uuids = dict(found), dict[str, str]()
        for key, lv in wanted.cached.items():
            keys = [key] if key in left else [k for k, each in left.items() if _is_same(lv, each)]
            assert keys, f"the template LV {_text(lv)} is not there but {[*map(_text, left.values())]}"
            uuids[key] = keys[0]
            now, is_at_rest = left.pop(keys[0]), not (lv.is_active or wanted.is_open(key))
            data = now.data if lv.state == ASIDE else lv.data  # a copy that was given up stays short
            same = replace(lv, name=lv.name or now.name, data=data, is_active=now.is_active)
            assert now == same, f"a template LV is\n  {now} and not\n  {lv}"
            assert lv.state != READY or not (is_at_rest and now.is_active), f"{_text(lv)} is still active"
        assert not left, f"there are template LVs beyond those that should be: {[*map(_text, left.values())]}"
        return uuids

    def _require_possible(self, before: State, after: State, found: Mapping[str, Cached]) -> None:
        """Check that nothing impossible has happened."""
        for key, lv in before.cached.items():
            is_kept = after.is_open(key) or after.is_locked(key)
            now = found.get(key)
            assert not is_kept or (now and now.state == lv.state), f"{_text(lv)} was in use and is {now}"
            assert now is None or now.state in (lv.state, ASIDE, READY), f"{_text(lv)} is {now}"
            if now and lv.state == READY == now.state:
                times = (lv.used, *range(before.now, after.now + 1))
                assert now == replace(lv, used=now.used, is_active=now.is_active), f"{lv} became {now}"
                assert now.used in times, f"{_text(lv)} was used at {lv.used}, and now at {now.used}"
        places = [
            (lv.template, lv.version, lv.is_thin)
            for lv in found.values()
            if lv.state != ASIDE and lv.is_sound
        ]
        assert len(places) == len({*places}), f"there are two template LVs of one kind: {places}"

    def _born(self, seen: Seen, before: State) -> Cached:
        """A template LV that did not exist before."""
        if "DELETING" in seen.tags:  # set aside already
            return Cached(
                "", "", "", ASIDE, "", seen.size, seen.is_thin, seen.written or 0, erase=_erase(seen)
            )
        (template,) = seen.values("TEMPLATE")
        assert template in before.templates, f"{template} is no template"
        base = before.templates[template]
        extent = before.room.extent
        lv = Cached(
            name=seen.name,
            template=template,
            version=base.version,
            state=UNFINISHED,
            holds=base.content,
            size=-(-base.size // extent) * extent,
            is_thin=seen.is_thin,
            data=base.data,
        )
        name = self.names.setdefault((template, base.version, seen.is_thin), seen.name)
        assert name == seen.name, f"{_text(lv)} has another name than {name}"
        assert [*self.names.values()].count(name) == 1, f"{_text(lv)} has the name of another"
        return lv

    def _now(self, lv: Cached, seen: Seen, look: Look) -> Cached:
        """As it is; what is said in its tags and nothing else is believed."""
        if "DELETING" in seen.tags:
            tags = {"localdisk", "DELETING", f"ERASE_{_erase(seen)}", f"ASIDE_{seen.name}"}
            problem = sorted(seen.tags ^ tags)
            assert not {t for t in problem if not t.startswith("ASIDE_")}, f"{_text(lv)}: {problem}"
            data = lv.data if seen.written is None else seen.written
            return replace(lv, state=ASIDE, name="", erase=_erase(seen), data=data, is_active=False)
        state = UNFINISHED if "UPDATING" in seen.tags else READY
        # What is unfinished counts for what it will hold.
        problems = [*self._problems(replace(lv, state=state), seen)] if lv.is_sound else []
        assert not problems, f"{_text(lv)}: {', '.join(problems)}"
        used = max((int(value) for value in seen.values("USED")), default=0)
        is_right = state == UNFINISHED or lv.is_spoiled or seen.holds == (lv.holds,)
        assert is_right, f"{_text(lv)} holds {seen.holds} and not {lv.holds}"
        return replace(lv, name=seen.name, state=state, used=used, is_active=seen.is_active)

    def _problems(self, lv: Cached, seen: Seen) -> Iterator[str]:
        if (lv.size, lv.is_thin) != (seen.size, seen.is_thin):
            yield f"it is {seen.size} bytes, {'thin' if seen.is_thin else 'thick'}"
        if lv.name and lv.name != seen.name:
            yield f"its name is {seen.name}"
        (value,) = seen.values("SOURCE") or {""}
        known = self.fingerprints.setdefault(lv.version, value)
        others = [v for v, of in self.fingerprints.items() if of == value and v != lv.version]
        if not value or value != known or others:
            yield f"its source is {value}, of {others}, and not {known} of {lv.version}"
        tags = {"localdisk", f"TEMPLATE_{lv.template}", f"SOURCE_{value}"}
        numbers = ("HOLDS", "USED", "SAMPLE") if lv.state == READY else ("WRITES",)
        tags |= {"UPDATING"} if lv.state == UNFINISHED else set()
        told = {tag for tag in seen.tags if tag.startswith(tuple(f"{name}_" for name in numbers))}
        if seen.tags - told != tags or len(told) != len(numbers):
            yield f"its tags are {sorted(seen.tags)}"
            return
        if lv.state == READY and not seen.is_read_only:
            yield "it can be written to"
        (takes,) = map(int, seen.values("HOLDS") or seen.values("WRITES"))
        # LVM tells a hundredth of a percent.
        if lv.state == READY and abs(takes - lv.takes) > lv.size * lv.is_thin / 10_000:
            yield f"it is said to take {takes} bytes, and not {lv.takes}"


def _is_same(wanted: Cached, found: Cached) -> bool:
    """Whether this template LV may be one that the model has not seen yet."""
    if wanted.name or wanted.state != found.state:
        return False
    if wanted.state == ASIDE:
        return (wanted.size, wanted.is_thin) == (found.size, found.is_thin)
    return (wanted.template, wanted.version, wanted.is_thin) == (
        found.template,
        found.version,
        found.is_thin,
    )


def _erase(seen: Seen) -> str:
    return next(iter(seen.values("ERASE")), "none")


def _text(lv: Cached) -> str:
    place = "thin" if lv.is_thin else "thick"
    return f"{lv.state} {lv.name[:8]} of {lv.template[:8]} {lv.version}, {place}, used {lv.used}"
