"""Template LVs: what their tags say, and how many of them there may be."""

from __future__ import annotations

import itertools
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdisk import config, frozen
from localdisk.config import Cache
from localdisk.frozen import replace
from localdisk.ids import is_uuid
from localdisk.volumes import local_disk, room, template
from localdisk.volumes.local_disk import LocalDisk, State
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup
from localdisk.volumes.template import Template
from tests.examples import examples
from tests.fakes import (
    EXTENT,
    FINGERPRINT,
    IMAGE,
    OTHER_FINGERPRINT,
    OTHER_VOLUME,
    VM,
    VOLUME,
    report,
)

NOW = 1_760_000_000
SAMPLE = "5" * 32
SIZE = 10 * EXTENT
VG = VolumeGroup.from_report(report("pool-only"))
POOL = VG.lvs[0]
LV = replace(POOL, lv_name=VOLUME, lv_layout=frozenset({"linear"}), lv_device_open=False, lv_size=SIZE)
READY = {"localdisk", f"TEMPLATE_{OTHER_VOLUME}", f"SOURCE_{FINGERPRINT}", f"SAMPLE_{SAMPLE}", f"USED_{NOW}"}

properties = settings(max_examples=examples(100))


def lv(lv_tags: set[str] | frozenset[str], **changes: object) -> LogicalVolume:
    return frozen.replace(LV, lv_tags=frozenset(lv_tags), **changes)


def found(lv_tags: set[str] | frozenset[str] = frozenset(READY), **changes: object) -> Template:
    each = Template.from_lv(lv(lv_tags, **changes))
    assert each
    return each


# -- what the tags say


def test_a_template_lv_says_all_of_itself() -> None:
    each = found(lv_permissions="read-only", lv_active=False)
    assert (each.name, each.volume_id, each.fingerprint) == (VOLUME, OTHER_VOLUME, FINGERPRINT)
    assert (each.is_ready, each.sample, each.used, each.is_open) == (True, SAMPLE, NOW, False)
    assert (each.holds, each.backend) == (SIZE, "lvm")
    assert each.used_tags == {f"USED_{NOW}"}
    assert not each.writes_tags


OPTIONS: dict[str, tuple[bool, tuple[set[str], ...]]] = {
    # whether it may be there, and what it can be
    "localdisk": (True, ({"localdisk"}, set())),
    "template": (
        True,
        (
            {f"TEMPLATE_{OTHER_VOLUME}"},
            set(),
            {"TEMPLATE_"},
            {"TEMPLATE"},
            {f"TEMPLATE_{OTHER_VOLUME.upper()}x"},
            {f"TEMPLATE_{OTHER_VOLUME}", f"TEMPLATE_{VOLUME}"},
        ),
    ),
    "owner": (
        False,
        (set(), {f"VM_{VM}"}, {f"IU_{IMAGE}"}, {f"VM_{VM}", f"IU_{IMAGE}"}, {"VM_"}, {"DELETING"}),
    ),
    "more": (True, (set(), {"UPDATING"}, {"x"}, {"PU_x"})),
}


def test_only_what_is_ours_and_nobodys_is_one() -> None:
    """Every combination of the tags that count; the first of each kind but `more` is what it must be."""
    for values in itertools.product(*(choices for _, choices in OPTIONS.values())):
        lv_tags = set[str]().union(*values)
        expected = all(
            chosen == choices[0] or name == "more"
            for chosen, (name, (_, choices)) in zip(values, OPTIONS.items())
        )
        each = Template.from_lv(lv(lv_tags))
        assert (each is not None) == expected, lv_tags
        if each:
            assert each.is_ready == ("UPDATING" not in lv_tags)


@pytest.mark.parametrize(
    "changes",
    [
        {"lv_name": "data"},
        {"lv_name": VM.upper()},
        {"lv_layout": frozenset({"thin", "pool"})},
        {"lv_layout": frozenset({"cache", "pool"})},
    ],
    ids=str,
)
def test_other_volumes_are_none_whatever_their_tags(changes: dict[str, object]) -> None:
    assert Template.from_lv(lv(READY, **changes)) is None


@pytest.mark.parametrize(
    ("lv_tags", "pool_lv", "holds"),
    [
        ((), "", SIZE),
        (("HOLDS_5",), "", SIZE),  # a preallocated one takes all of it
        ((), "pool0", SIZE),  # unknown: all that it can
        (("HOLDS_5",), "pool0", 5),
        (("HOLDS_5", "HOLDS_7"), "pool0", 7),
        (("HOLDS_x", "HOLDS_-5", "HOLDS_"), "pool0", SIZE),
        (("HOLDS_" + "9" * 40,), "pool0", SIZE),
        (("UPDATING", "WRITES_4096"), "pool0", 4096),  # else it would count as its whole size until then
        (("UPDATING", "WRITES_4096"), "", SIZE),
    ],
)
def test_what_it_holds(lv_tags: tuple[str, ...], pool_lv: str, holds: int) -> None:
    assert found(READY | set(lv_tags), pool_lv=pool_lv).holds == holds


@pytest.mark.parametrize(
    ("lv_tags", "used"),
    [((), 0), (("USED_5",), 5), (("USED_5", "USED_7"), 7), (("USED_x",), 0), (("USED_x", "USED_3"), 3)],
)
def test_when_it_was_used(lv_tags: tuple[str, ...], used: int) -> None:
    each = found((READY - {f"USED_{NOW}"}) | set(lv_tags))
    assert each.used == used
    assert each.used_tags == set(lv_tags)


@pytest.mark.parametrize(
    ("used", "is_told"),
    [((0,), True), ((59,), True), ((60,), False), ((-1,), False), ((), False), ((5, 7), False)],
)
def test_a_use_is_told_to_the_minute(used: tuple[int, ...], is_told: bool) -> None:
    each = found((READY - {f"USED_{NOW}"}) | {f"USED_{NOW - ago}" for ago in used})
    assert each.is_used_at(NOW + 0.9) == is_told


@pytest.mark.parametrize("name", ["SOURCE", "SAMPLE"])
def test_what_is_said_twice_is_not_said(name: str) -> None:
    for more in ((), (f"{name}_{FINGERPRINT}", f"{name}_{OTHER_FINGERPRINT}")):
        without = {tag for tag in READY if not tag.startswith(name)}
        each = found(without | set(more))
        assert (each.fingerprint if name == "SOURCE" else each.sample) == ""


def test_it_is_removed_as_a_disk_of_nobody() -> None:
    for more, state in (((), State.READY), (("UPDATING",), State.UNFINISHED)):
        disk = found(READY | set(more)).disk
        assert (disk.vm_id, disk.image_id, disk.state, disk.volume_id) == ("", "", state, VOLUME)
        assert (disk.erase, disk.aside_name) == ("", "")
        add, remove = local_disk.aside_tags(disk, "zero", OTHER_VOLUME)
        aside = (disk.lv.lv_tags | add) - remove
        assert aside == {"localdisk", "DELETING", "ERASE_zero", f"ASIDE_{OTHER_VOLUME}"}
        assert Template.from_lv(lv(aside)) is None
        set_aside = LocalDisk.from_lv(lv(aside))
        assert set_aside
        assert set_aside.is_aside


# -- which tags it gets


@properties
@given(st.integers(0, 64 << 40), st.integers(0, 64 << 40), st.floats(0, 1e11), st.booleans())
def test_what_is_tagged_is_read_back(writes: int, holds: int, now: float, is_thin: bool) -> None:
    pool_lv = "pool0" if is_thin else ""
    new = template.new_tags(OTHER_VOLUME, FINGERPRINT, writes)
    unfinished = found(new, pool_lv=pool_lv)
    assert not unfinished.is_ready
    assert unfinished.writes_tags == {f"WRITES_{writes}"}
    assert room._still_to_write(unfinished.lv) == writes  # the room that it will take is taken
    ready = found(
        (new - unfinished.writes_tags - {"UPDATING"}) | template.ready_tags(holds, SAMPLE, now),
        pool_lv=pool_lv,
    )
    assert ready.is_ready
    assert (ready.volume_id, ready.fingerprint, ready.sample) == (OTHER_VOLUME, FINGERPRINT, SAMPLE)
    assert (ready.used, ready.holds) == (int(now), holds if is_thin else SIZE)
    assert ready.used_tags == {template.used_tag(now)}
    assert room._still_to_write(ready.lv) == 0


PLACE = (OTHER_VOLUME, FINGERPRINT, "lvmthin", "pool0")


def test_the_name_is_always_the_same() -> None:
    """Else all template LVs of a host would be made again after an update."""
    assert template.lv_name(*PLACE) == "f540efec-3354-5934-bf0b-3836b9a26109"
    assert is_uuid(template.lv_name(*PLACE))


def test_another_volume_content_or_place_has_another_name() -> None:
    names = {
        template.lv_name(*values)
        for values in itertools.product(
            (VOLUME, OTHER_VOLUME), (FINGERPRINT, OTHER_FINGERPRINT), ("lvm", "lvmthin"), ("pool0", "pool1")
        )
    }
    assert len(names) == 2 * 2 * 3  # where there is no pool, its name means nothing
    assert all(map(is_uuid, names))
    assert names.isdisjoint({VOLUME, OTHER_VOLUME})
    assert template.lv_name(VOLUME, FINGERPRINT, "lvm", "a") == template.lv_name(
        VOLUME, FINGERPRINT, "lvm", "b"
    )


# -- whether it may be used


@pytest.mark.parametrize("size", [SIZE, SIZE - 512, SIZE - EXTENT + 512])
def test_one_as_it_was_made_is_sound(size: int) -> None:
    assert template.is_sound(found(lv_permissions="read-only"), FINGERPRINT, size, VG)


@pytest.mark.parametrize(
    ("lv_tags", "changes", "fingerprint", "size"),
    [
        (READY | {"UPDATING"}, {}, FINGERPRINT, SIZE),
        (READY, {"lv_permissions": "writeable"}, FINGERPRINT, SIZE),
        (READY, {"lv_permissions": ""}, FINGERPRINT, SIZE),
        (READY, {}, OTHER_FINGERPRINT, SIZE),
        (READY - {f"SOURCE_{FINGERPRINT}"}, {}, FINGERPRINT, SIZE),
        (READY - {f"SOURCE_{FINGERPRINT}"}, {}, "", SIZE),
        (READY | {f"SOURCE_{OTHER_FINGERPRINT}"}, {}, FINGERPRINT, SIZE),
        (READY - {f"SAMPLE_{SAMPLE}"}, {}, FINGERPRINT, SIZE),
        (READY | {f"SAMPLE_{FINGERPRINT}"}, {}, FINGERPRINT, SIZE),
        (READY, {"lv_size": SIZE - EXTENT}, FINGERPRINT, SIZE),
        (READY, {"lv_size": SIZE + EXTENT}, FINGERPRINT, SIZE),
        (READY, {}, FINGERPRINT, SIZE + 512),
        (READY, {}, FINGERPRINT, SIZE - EXTENT),
    ],
)
def test_any_deviation_makes_it_unsound(
    lv_tags: set[str], changes: dict[str, object], fingerprint: str, size: int
) -> None:
    each = found(lv_tags, **{"lv_permissions": "read-only", **changes})
    assert not template.is_sound(each, fingerprint, size, VG)


# -- many of them


@lru_cache(maxsize=20)
def cache(max_size: str) -> Cache:
    return config.parse(f"cache: {{templates: on, max_size: {max_size}}}".encode(), "F").cache


def name(number: int) -> str:
    return f"{number:08d}-0000-4000-8000-000000000000"


def group(*shapes: tuple[int, int, str]) -> VolumeGroup:
    """With template LVs of so many extents, last used then, in that pool or none; and other volumes."""
    lvs = [
        lv(
            (READY - {f"USED_{NOW}"}) | {f"USED_{used}", f"HOLDS_{extents * EXTENT}"},
            lv_name=name(number),
            lv_size=extents * EXTENT,
            pool_lv=pool,
        )
        for number, (extents, used, pool) in enumerate(shapes)
    ]
    others = [lv({"localdisk", f"VM_{VM}", f"IU_{IMAGE}"}, lv_name=OTHER_VOLUME), lv(set(), lv_name="data")]
    return replace(VG, lvs=(POOL, *lvs, *others))


def test_the_least_recently_used_is_first() -> None:
    vg = group((1, 30, ""), (1, 10, "pool0"), (1, 20, ""), (1, 10, ""))
    assert [each.name for each in template.templates(vg)] == [name(n) for n in (1, 3, 2, 0)]
    assert [each.name for each in template.in_place(vg, "")] == [name(n) for n in (3, 2, 0)]
    assert [each.name for each in template.in_place(vg, "pool0")] == [name(1)]
    assert template.in_place(vg, "pool1") == ()


@pytest.mark.parametrize(
    ("max_size", "pool", "expected"),
    [
        ("50%", "", VG.vg_size // 2),
        ("50%", "pool0", POOL.lv_size // 2),
        ("50%", "gone", VG.vg_size // 2),
        ("1GiB", "", 1 << 30),
        ("1GiB", "pool0", 1 << 30),
        ("0%", "", 0),
    ],
)
def test_the_limit_is_of_the_group_or_of_the_pool(max_size: str, pool: str, expected: int) -> None:
    assert template.limit(VG, cache(max_size), pool) == expected


def test_each_pool_has_its_own_limit() -> None:
    """1 GiB in all: of the group's preallocated ones, and again of the pool's."""
    half = (512 << 20) // EXTENT
    vg = group((half, 1, ""), (half, 2, "pool0"), (half, 3, ""), (half, 4, "pool0"))
    assert template.too_many(vg, cache("1GiB")) == frozenset()
    vg = group((half, 1, ""), (half, 2, "pool0"), (half + 1, 3, ""), (half + 1, 4, "pool0"))
    assert template.too_many(vg, cache("1GiB")) == {name(0), name(1)}


SHAPES = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 9), st.sampled_from(["", "pool0"])), max_size=8
)


@properties
@given(SHAPES, st.integers(0, 200))
def test_what_is_left_fits_and_nothing_goes_in_vain(shapes: list[tuple[int, int, str]], extents: int) -> None:
    vg = group(*shapes)
    allowed = cache(str(extents * EXTENT))
    too_many = template.too_many(vg, allowed)
    for pool in ("", "pool0"):
        every = template.in_place(vg, pool)
        gone = [each for each in every if each.name in too_many]
        rest = sum(each.holds for each in every if each.name not in too_many)
        assert gone == list(every[: len(gone)])  # the least recently used
        assert rest <= extents * EXTENT
        if gone:
            assert rest + gone[-1].holds > extents * EXTENT  # without the last, it would not have fitted


@properties
@given(SHAPES, st.integers(-100, 200))
def test_beyond_leaves_what_fits_or_nothing(shapes: list[tuple[int, int, str]], extents: int) -> None:
    every = template.templates(group(*shapes))
    gone = tuple(template.beyond(every, extents * EXTENT))
    assert gone == every[: len(gone)]
    rest = sum(each.holds for each in every[len(gone) :])
    assert rest <= extents * EXTENT or gone == every


# -- nothing is both

UUIDS = st.sampled_from([VM, IMAGE, VOLUME, OTHER_VOLUME, "x", "", VM.upper()])
NAMES = st.sampled_from(["VM", "IU", "TEMPLATE", "SOURCE", "SAMPLE", "USED", "HOLDS", "ASIDE", "ERASE"])
TAGS = st.frozensets(
    st.builds("{}_{}".format, NAMES, UUIDS | st.integers(0, 99).map(str))
    | st.sampled_from(["localdisk", "UPDATING", "DELETING", "TEMPLATE", "VM", "IU"])
    | st.builds("{}_{}".format, st.just("TEMPLATE"), st.just(OTHER_VOLUME))
    | st.text(max_size=5),
    max_size=8,
)


@settings(properties, max_examples=examples(250))
@given(TAGS, st.booleans(), st.sampled_from([VOLUME, "data"]), st.sampled_from(["linear", "pool"]))
def test_nothing_is_a_template_lv_and_a_local_disk(
    lv_tags: frozenset[str], ours: bool, lv_name: str, layout: str
) -> None:
    each = lv(lv_tags | ({"localdisk"} if ours else set()), lv_name=lv_name, lv_layout=frozenset({layout}))
    as_template, as_disk = Template.from_lv(each), LocalDisk.from_lv(each)
    assert not (as_template and as_disk)
    if as_template:
        assert "localdisk" in each.lv_tags
        assert as_template.holds >= 0
        assert as_template.used >= 0
