"""Whether there is room in a group or pool, and what is removed for it."""

from __future__ import annotations

import pytest

from localdisk import frozen
from localdisk.config import Policy
from localdisk.errors import (
    CacheFull,
    NoSpace,
    NoThinPool,
    ThinPoolAtThreshold,
    ThinPoolFull,
    ThinPoolInactive,
    ThinPoolNotZeroing,
    VolumeGroupUnusable,
)
from localdisk.units import Amount
from localdisk.volumes import room
from localdisk.volumes.local_disk import local_disks
from localdisk.volumes.lvm import VolumeGroup
from localdisk.volumes.room import (
    Kind,
    Need,
    NewLv,
    Removable,
    Seen,
    plan,
    plan_below_threshold,
    require_room,
)
from tests.fakes import EXTENT, OTHER_VOLUME, VOLUME, FakeHost, aside, report, tags
from tests.fakes.policy import POLICY, THIN
from tests.fakes.template import add_template, template_tags

SIZE = 64 << 20


def group(**vg: str) -> FakeHost:
    host = FakeHost()
    host.vg.update(vg)
    return host


def read(host: FakeHost) -> VolumeGroup:
    return VolumeGroup.from_report(host.report())


def with_margins(policy: Policy, **margins: Amount | float) -> Policy:
    return frozen.replace(policy, margins=frozen.replace(policy.margins, **margins))


@pytest.mark.parametrize(
    ("reserve", "size", "missing"),
    [
        (Amount(bytes=0), 10 * EXTENT, None),
        (Amount(bytes=0), 10 * EXTENT + 1, "4 MiB"),
        (Amount(bytes=0), 9 * EXTENT + 1, None),
        (Amount(bytes=EXTENT), 9 * EXTENT, None),
        (Amount(bytes=EXTENT), 9 * EXTENT + 512, "4 MiB"),
        (Amount(bytes=1), 10 * EXTENT, "1 B"),
        (Amount(percent=5.0), 5 * EXTENT, None),
        (Amount(percent=5.0), 5 * EXTENT + 1, "4 MiB"),
        (Amount(percent=10.0), 1, "4 MiB"),
        (Amount(percent=100.0), 1, "364 MiB"),
    ],
)
def test_thick_room(reserve: Amount, size: int, missing: str | None) -> None:
    host = group(vg_free=str(10 * EXTENT), vg_size=str(100 * EXTENT))
    policy = with_margins(POLICY, reserve=reserve)
    if missing is None:
        require_room(read(host), policy, size, size)
    else:
        with pytest.raises(NoSpace, match=f"lacks {missing}: the disk needs"):
            require_room(read(host), policy, size, size)


def test_room_that_lvm_may_not_use() -> None:
    """It is no free space, whatever LVM reports; and the error says how to get it."""
    host = group(vg_free=str(10 * EXTENT), vg_size=str(100 * EXTENT))
    host.unallocatable = [
        {"pv_name": "/dev/sdb", "pv_free": str(4 * EXTENT)},
        {"pv_name": "/dev/sdc", "pv_free": "0"},
    ]
    policy = with_margins(POLICY, reserve=Amount(bytes=0))
    assert read(host).vg_free == 6 * EXTENT
    require_room(read(host), policy, 6 * EXTENT, 6 * EXTENT)
    with pytest.raises(NoSpace, match=r"24 MiB is free where.*not on /dev/sdb : pvchange -x y /dev/sdb,"):
        require_room(read(host), policy, 7 * EXTENT, 7 * EXTENT)


def pool(data: str = "50.00", metadata: str = "10.00", size: int = 1000 * EXTENT) -> FakeHost:
    host = FakeHost()
    host.volumes["pool0"].lv_size = size
    host.volumes["pool0"].data_percent, host.volumes["pool0"].metadata_percent = data, metadata
    return host


def percent(number: float) -> int:
    return int(10 * EXTENT * number)


@pytest.mark.parametrize(
    ("data", "metadata", "writes", "limit"),
    [
        ("0.00", "0.00", 0, None),
        ("50.00", "10.00", percent(40), None),
        ("50.00", "10.00", percent(40) + EXTENT, "thin_data"),
        ("90.00", "80.00", 0, None),
        ("90.01", "0.00", 0, "thin_data"),
        ("0.00", "80.01", 0, "thin_metadata"),
        ("100.00", "100.00", 0, "thin_data"),
        ("0.00", "0.00", percent(90), None),
        ("0.00", "0.00", 64 << 40, "thin_data"),
    ],
)
def test_thin_room(data: str, metadata: str, writes: int, limit: str | None) -> None:
    vg = read(pool(data, metadata))
    if limit is None:
        require_room(vg, THIN, SIZE, writes)
    else:
        with pytest.raises(
            ThinPoolFull, match=rf"would pass margins\.{limit}: [0-9.]+ % of [0-9.]+ % allowed"
        ):
            require_room(vg, THIN, SIZE, writes)


def test_thin_disk_does_not_need_room_for_its_size() -> None:
    host = pool("0.00")
    host.vg["vg_free"] = "0"
    require_room(read(host), THIN, 64 << 40, 0)


def test_unfinished_copies_have_their_promise_counted() -> None:
    host = pool("50.00")
    thin = {"lv_layout": "thin,sparse", "pool_lv": "pool0"}
    host.add(
        VOLUME, tags("UPDATING", f"WRITES_{percent(30)}"), size=percent(60), data_percent="25.00", **thin
    )
    # 30 % promised, a quarter of its 60 % is written and is in the pool's 50 %: 15 % are still to come
    require_room(read(host), THIN, SIZE, percent(25))
    with pytest.raises(ThinPoolFull, match=r"thin_data: 90\.1 % of 90 %"):
        require_room(read(host), THIN, SIZE, percent(25.1))
    host.add(OTHER_VOLUME, tags("UPDATING", f"WRITES_{percent(20)}"), size=percent(20), lv_active="", **thin)
    require_room(read(host), THIN, SIZE, percent(5))
    with pytest.raises(ThinPoolFull):
        require_room(read(host), THIN, SIZE, percent(5.1))


def test_a_template_that_is_being_copied_has_its_promise_counted() -> None:
    """Else another disk could take the room that it still needs."""
    host = pool("50.00")
    thin = {"lv_layout": "thin,sparse", "pool_lv": "pool0"}
    lv_tags = {"localdisk", f"TEMPLATE_{OTHER_VOLUME}", "UPDATING", f"WRITES_{percent(30)}"}
    host.add(VOLUME, lv_tags, size=percent(60), data_percent="25.00", **thin)
    require_room(read(host), THIN, SIZE, percent(25))
    with pytest.raises(ThinPoolFull):
        require_room(read(host), THIN, SIZE, percent(25.1))


def test_a_clone_promises_only_what_it_does_not_share() -> None:
    """LVM counts the blocks that it shares with its template as its data; so does its promise."""
    host = pool("50.00")
    clone = {"lv_layout": "thin,sparse", "pool_lv": "pool0", "data_percent": "50.00"}
    host.add(VOLUME, tags("UPDATING", f"WRITES_{percent(30 + 10)}"), size=percent(60), **clone)
    require_room(read(host), THIN, SIZE, percent(30))
    with pytest.raises(ThinPoolFull):
        require_room(read(host), THIN, SIZE, percent(30.1))


@pytest.mark.parametrize(
    "fields",
    [
        {"lv_tags": tags(f"WRITES_{percent(40)}"), "pool_lv": "pool0"},  # finished
        {"lv_tags": tags("UPDATING", f"WRITES_{percent(40)}"), "pool_lv": "pool1"},
        {"lv_tags": tags("UPDATING", f"WRITES_{percent(40)}"), "pool_lv": ""},  # thick
        {"lv_tags": tags("UPDATING", f"WRITES_{percent(10)}"), "pool_lv": "pool0", "data_percent": "100.00"},
        {"lv_tags": {"UPDATING", f"WRITES_{percent(40)}"}, "pool_lv": "pool0"},  # not ours
    ],
)
def test_what_promises_nothing(fields: dict[str, object]) -> None:
    host = pool("50.00")
    host.add(VOLUME, size=percent(60), **fields)  # type: ignore[arg-type]
    require_room(read(host), THIN, SIZE, percent(40))


@pytest.mark.parametrize("layout", [None, "linear", "cache,pool", "thin,sparse"])
def test_pool_that_is_none(layout: str | None) -> None:
    host = pool()
    if layout:
        host.volumes["pool0"].lv_layout = layout
    else:
        del host.volumes["pool0"]
    with pytest.raises(NoThinPool, match="no thin pool ovirt-local/pool0 : create it"):
        require_room(read(host), THIN, SIZE, 0)


def test_pool_that_does_not_zero() -> None:
    with pytest.raises(ThinPoolNotZeroing, match="lvchange --zero y scratch/pool0"):
        require_room(VolumeGroup.from_report(report("not-zeroing")), THIN, SIZE, 0)


def test_pool_that_does_not_tell_how_full_it_is() -> None:
    """An inactive pool may be full: the margins cannot be kept, so nothing is made in it."""
    with pytest.raises(ThinPoolInactive, match=r"lvchange --activate y ovirt-local/pool0"):
        require_room(VolumeGroup.from_report(report("pool-inactive")), THIN, SIZE, 0)


@pytest.mark.parametrize("backend", ["lvm", "lvmthin"])
@pytest.mark.parametrize(
    "vg", [{"vg_partial": "partial"}, {"vg_exported": "exported"}, {"vg_lock_type": "sanlock"}], ids=str
)
def test_no_room_in_an_unusable_group(vg: dict[str, str], backend: str) -> None:
    with pytest.raises(VolumeGroupUnusable):
        require_room(read(group(**vg)), frozen.replace(POLICY, backend=backend), 512, 0)


# -- what is removed


ASIDE = "00000000-aaaa-4aaa-8aaa-000000000001"
KEPT = "00000000-bbbb-4bbb-8bbb-000000000002"
FIRST, SECOND = "00000000-cccc-4ccc-8ccc-000000000003", "00000000-dddd-4ddd-8ddd-000000000004"
POLICIES = pytest.mark.parametrize("policy", [POLICY, THIN], ids=["lvm", "lvmthin"])
STEP = 8 * EXTENT  # each volume takes


def crowded(policy: Policy) -> FakeHost:
    """Without room for a disk of one STEP; four volumes could be removed, each for one STEP."""
    host = pool("90.00") if policy.pool else group(vg_free="0", vg_size=str(1000 * EXTENT))
    fields = {"pool_lv": "pool0", "lv_layout": "thin,sparse", "data_percent": "100.00"} if policy.pool else {}
    for name, used in ((SECOND, 2), (FIRST, 1)):
        add_template(host, policy.backend, used=used, name=name, size=STEP)
        host.volumes[name].lv_tags = template_tags(f"USED_{used}", f"HOLDS_{STEP}")
    host.add(KEPT, tags("STOPPED_5"), STEP, **fields)
    host.add(ASIDE, aside("zero", ASIDE), STEP, **fields)
    return host


def need(the_policy: Policy, host: FakeHost, steps: float, **more: object) -> Need:
    size = int(steps * STEP)
    kept = tuple(disk for disk in local_disks(read(host)) if disk.volume_id == KEPT)
    return frozen.replace(Need(the_policy, (NewLv(size, size),), kept=kept), **more)


def names(found: tuple[Removable, ...]) -> list[str]:
    return [each.name for each in found]


@POLICIES
@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (0, []),
        (1, [ASIDE]),
        (2, [ASIDE, FIRST, SECOND]),
        (3, [ASIDE, FIRST, SECOND]),
        (4, [ASIDE, FIRST, SECOND, KEPT]),
    ],
)
def test_what_is_removed_in_which_order(policy: Policy, steps: int, expected: list[str]) -> None:
    host = crowded(policy)
    assert names(plan(read(host), need(policy, host, steps), Seen())) == expected


@POLICIES
def test_nothing_is_removed_that_does_not_help(policy: Policy) -> None:
    host = crowded(policy)
    with pytest.raises((NoSpace, ThinPoolFull)):
        plan(read(host), need(policy, host, 5), Seen())
    with pytest.raises((NoSpace, ThinPoolFull)):
        plan(read(host), need(policy, host, 1, is_trial=True), Seen())
    over = need(policy, host, 9, is_template=True, policy=with_cache(policy, 9 * STEP))
    with pytest.raises((NoSpace, ThinPoolFull)):  # though two template LVs are over the limit
        plan(read(host), over, Seen())


@POLICIES
def test_a_kept_disk_alone_if_template_lvs_alone_are_too_small(policy: Policy) -> None:
    host = crowded(policy)
    seen = Seen(locked=frozenset({FIRST}), tried=frozenset({host.volumes[SECOND].lv_uuid}))
    assert names(plan(read(host), need(policy, host, 2), seen)) == [ASIDE, KEPT]


@POLICIES
@pytest.mark.parametrize("name", [ASIDE, FIRST])
def test_what_is_not_removed(policy: Policy, name: str) -> None:
    """What is open, has dependents, is wanted itself, was tried, or lies elsewhere."""
    for change in ("lv_device_open", "dependent", "tried", "elsewhere", "template"):
        host = crowded(policy)
        volume = host.volumes[name]
        seen, template = Seen(), ""
        if change == "lv_device_open":
            volume.lv_device_open = volume.lv_active = "open"
        elif change == "dependent":
            host.add("backup", size=STEP, origin=name, lv_layout="linear", lv_role="public,snapshot")
        elif change == "tried":
            seen = Seen(tried=frozenset({volume.lv_uuid}))
        elif change == "elsewhere":
            volume.pool_lv, volume.lv_layout = ("", "linear") if policy.pool else ("pool0", "thin,sparse")
        elif name == FIRST:
            template = FIRST
        else:
            continue
        found = plan(read(host), need(policy, host, 3, template=template), seen)
        assert name not in names(found), change


@POLICIES
def test_template_lvs_over_the_limit_go_first(policy: Policy) -> None:
    host = crowded(policy)
    new = need(policy, host, 1, is_template=True, policy=with_cache(policy, 2 * STEP))
    found = plan(read(host), new, Seen())
    assert [(each.name, each.why) for each in found] == [(FIRST, "the cache is full")]
    assert found[0].kind is Kind.TEMPLATE
    with pytest.raises(CacheFull, match="a template of 32 MiB"):
        plan(read(host), frozen.replace(new, policy=with_cache(policy, STEP - EXTENT)), Seen())
    with pytest.raises(CacheFull):
        plan(read(host), new, Seen(locked=frozenset({FIRST, SECOND})))  # those in use have it all


@POLICIES
def test_room_for_the_disk_beside_its_template_lv(policy: Policy) -> None:
    host = crowded(policy)
    both = need(policy, host, 1, volumes=(NewLv(STEP, STEP), NewLv(2 * STEP, 2 * STEP)))
    assert names(plan(read(host), both, Seen())) == [ASIDE, FIRST, SECOND]


def test_what_is_removed_below_the_threshold_of_lvm() -> None:
    host, refused = crowded(THIN), ThinPoolAtThreshold(vg="ovirt-local", pool="pool0")
    new = need(THIN, host, 1)
    assert names(plan_below_threshold(read(host), new, Seen(), refused)) == [ASIDE, FIRST, SECOND]
    every = frozenset(volume.lv_uuid for volume in host.volumes.values())
    for wanted, seen in ((new, Seen(tried=every)), (frozen.replace(new, is_trial=True), Seen())):
        with pytest.raises(ThinPoolAtThreshold):
            plan_below_threshold(read(host), wanted, seen, refused)


def test_what_a_kept_disk_shares_with_its_template_lv_is_no_room() -> None:
    host = crowded(THIN)
    host.volumes[KEPT].origin = FIRST
    host.volumes[FIRST].data_percent = "25.00"
    found = plan(read(host), need(THIN, host, 1.75, template=SECOND), Seen())
    assert {each.name: each.takes for each in found}[KEPT] == STEP * 3 // 4


def with_cache(policy: Policy, size: int) -> Policy:
    return frozen.replace(policy, cache=frozen.replace(policy.cache, max_size=Amount(bytes=size)))


def test_a_group_as_it_would_be() -> None:
    thick = read(group(vg_free=str(100 * EXTENT)))
    with_more = room.with_more(thick, POLICY, NewLv(STEP - 5, 1))
    assert with_more == frozen.replace(thick, vg_free=thick.vg_free - STEP)
    vg = read(pool("50.00"))
    (as_if,) = room.with_more(vg, THIN, NewLv(1, percent(25))).lvs
    assert as_if.data_percent == 75.0
    silent = frozen.replace(vg, lvs=(frozen.replace(vg.lvs[0], data_percent=None),))
    assert room.with_more(silent, THIN, NewLv(1, 5)) == silent
