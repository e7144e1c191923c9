from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdisk import frozen
from localdisk.clock import Moment
from localdisk.config import Retention
from localdisk.errors import (
    DependentVolumes,
    DiskBusy,
    DiskDrifted,
    Error,
    KeptStale,
    OtherLeaf,
    OtherOwner,
    SourceChanged,
)
from localdisk.ids import is_fingerprint
from localdisk.volumes import local_disk
from localdisk.volumes.local_disk import LocalDisk, Start, State, Stop, Wanted, plan_start, plan_stop
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup
from tests.examples import examples
from tests.fakes import (
    EXTENT,
    FINGERPRINT,
    IMAGE,
    OTHER_FINGERPRINT,
    OTHER_IMAGE,
    OTHER_VM,
    OTHER_VOLUME,
    VM,
    VOLUME,
    report,
    tags,
)
from tests.fakes.policy import RETENTION

SIZE = 64 << 20


def volume(
    lv_tags: Iterable[str],
    lv_name: str = VOLUME,
    is_open: bool = False,
    size: int = SIZE,
    layout: Iterable[str] = ("linear",),
) -> LogicalVolume:
    return LogicalVolume(
        lv_name=lv_name,
        lv_uuid="",
        lv_size=size,
        lv_time=0,
        lv_tags=frozenset(lv_tags),
        lv_device_open=is_open,
        lv_active=True,
        lv_permissions="writeable",
        lv_layout=frozenset(layout),
        pool_lv="",
        data_percent=None,
        metadata_percent=None,
        kernel_discards="",
        zero=False,
    )


def disk_of(lv: LogicalVolume) -> LocalDisk:
    found = LocalDisk.from_lv(lv)
    assert found
    return found


# -- from tags


@pytest.mark.parametrize(
    ("more", "state"),
    [
        ((), State.READY),
        (("UPDATING",), State.UNFINISHED),
        (("UPDATING", "WRITES_5"), State.UNFINISHED),
        (("STOPPED_5",), State.STOPPED),
        (("STOPPED_5", "UPDATING"), State.UNFINISHED),
        (("DRIFTED_5", "STOPPED_6"), State.DRIFTED),
        (("DRIFTED_5", "UPDATING"), State.UNFINISHED),
        (("DELETING", "DRIFTED_5"), State.DELETING),
        (("DELETING",), State.DELETING),
        (("DELETING", "UPDATING", "STOPPED_5"), State.DELETING),
        (("DELETINGX", "xUPDATING", "updating", "STOPPED", "STOPPED_"), State.READY),
        (("STOPPED_-5", "STOPPED_1e9", "STOPPED_5 ", "STOPPED_٥"), State.READY),
        (("STOPPED_" + "9" * 5000,), State.READY),
    ],
    ids=str,
)
def test_state(more: tuple[str, ...], state: State) -> None:
    for ours in (True, False):
        found = disk_of(volume(tags(*more, ours=ours)))
        assert found.state is state
        assert found.is_older is not ours


def test_fields() -> None:
    stops, marks, writes = (
        {f"{name}_{low}", f"{name}_{high}", f"{name}_x"}
        for name, low, high in (("STOPPED", 7, 42), ("UNNEEDED", 8, 43), ("WRITES", 9, 4096))
    )
    found = disk_of(volume(tags(*stops, *marks, *writes)))
    assert (found.volume_id, found.vm_id, found.image_id) == (VOLUME, VM, IMAGE)
    assert (found.fingerprint, found.stopped, found.unneeded) == (FINGERPRINT, 42, 43)
    assert found.idle_tags == stops | marks
    assert found.unneeded_tags == marks
    assert found.writes_tags == writes
    assert (found.erase, found.aside_name) == ("", "")
    assert not found.is_open
    assert not found.is_aside


def test_fields_that_are_not_there() -> None:
    found = disk_of(volume(tags()))
    assert (found.stopped, found.unneeded, found.erase) == (None, None, "")
    assert found.idle_tags == found.unneeded_tags == found.writes_tags == frozenset()


def test_a_mark_does_not_change_the_state() -> None:
    assert disk_of(volume(tags("UNNEEDED_5"))).state is State.READY
    assert disk_of(volume(tags("UNNEEDED_5", "STOPPED_5"))).state is State.STOPPED
    marks = local_disk.unneeded_tags(disk_of(volume(tags())), Moment(7.9))
    assert disk_of(volume(tags(*marks))).unneeded == 7
    assert disk_of(volume(tags(*local_disk.stopped_tags(Moment(7.9))))).stopped == 7


# -- disks that are set aside


@pytest.mark.parametrize("how", ["discard", "zero"])
@pytest.mark.parametrize("ours", [True, False])
def test_a_disk_that_is_set_aside_is_nobodys(how: str, ours: bool) -> None:
    found = disk_of(volume(tags("UPDATING", "WRITES_5", "STOPPED_5", "UNNEEDED_5", "x", ours=ours)))
    add, remove = local_disk.aside_tags(found, how, OTHER_VOLUME)
    aside = disk_of(volume((found.lv.lv_tags - remove) | add))
    assert aside.lv.lv_tags == {"localdisk", "DELETING", f"ERASE_{how}", f"ASIDE_{OTHER_VOLUME}"}
    assert (aside.vm_id, aside.image_id, aside.fingerprint, aside.stopped, aside.unneeded) == (
        *("", "", "", None, None),
    )
    assert (aside.is_aside, aside.state, aside.erase) == (True, State.DELETING, how)
    assert aside.aside_name == OTHER_VOLUME
    assert local_disk.aside_tags(aside, how, OTHER_VOLUME) == (frozenset(), frozenset())
    renamed = frozenset({f"ASIDE_{VOLUME}"}), frozenset({f"ASIDE_{OTHER_VOLUME}"})
    assert local_disk.aside_tags(aside, how, VOLUME) == renamed
    local_disk.require_owner(aside, VM, IMAGE, "vg")
    local_disk.require_owner(aside, OTHER_VM, OTHER_IMAGE, "vg")


def test_how_a_disk_is_to_be_erased() -> None:
    """What a later version may say is not taken for anything that it is not."""
    for tag, erase in (
        ("ERASE_zero", "zero"),
        ("ERASE_discard", "discard"),
        ("ERASE_none", ""),
        ("ERASE_x", ""),
    ):
        assert disk_of(volume({"localdisk", "DELETING", tag})).erase == erase
    assert disk_of(volume(tags("ERASE_zero"))).erase == "zero"


@pytest.mark.parametrize(
    ("names", "name"),
    [
        ((), ""),
        ((OTHER_VOLUME,), OTHER_VOLUME),
        ((VOLUME,), VOLUME),
        ((VOLUME, OTHER_VOLUME), ""),
        (("x",), ""),
        ((OTHER_VOLUME.upper().replace("2", "A"),), ""),
        ((f"{OTHER_VOLUME}x",), ""),
        (("",), ""),
    ],
    ids=str,
)
def test_the_name_that_a_disk_gets(names: tuple[str, ...], name: str) -> None:
    """It becomes an argument of lvrename: a name of ours, and no doubt which."""
    lv_tags = {"localdisk", "DELETING", "ERASE_zero", *(f"ASIDE_{each}" for each in names)}
    assert disk_of(volume(lv_tags)).aside_name == name


def test_two_fingerprints_are_none() -> None:
    found = disk_of(volume(tags(f"SOURCE_{OTHER_FINGERPRINT}")))
    assert found.fingerprint == ""


@pytest.mark.parametrize(
    "lv_tags",
    [
        set(),
        {"localdisk"},
        {"localdisk", f"VM_{VM}"},
        {"localdisk", f"IU_{IMAGE}"},
        tags() - {f"VM_{VM}"},
        tags() - {f"IU_{IMAGE}"},
        tags(f"VM_{OTHER_VM}"),
        tags(f"IU_{OTHER_IMAGE}"),
        tags(vm=VM.upper()),
        tags(image=IMAGE.upper()),
        tags(vm=""),
        tags(vm=VM + "0"),
        tags(vm=VM[:-1]),
        tags(vm=VM + "\n"),
        tags(vm="../../etc"),
        tags(vm="{" + VM + "}"),
        tags(vm=VM, image="x"),
        {"localdisk", f"vm_{VM}", f"IU_{IMAGE}"},
        {"DELETING", "ERASE_zero"},
        {"localdisk", "UPDATING"},
        {"localdisk", "DELETING", f"VM_{VM}"},
        {"localdisk", "DELETING", f"IU_{IMAGE}"},
        {"localdisk", "DELETING", "VM_x", "IU_x"},
        {"localdisk", "DELETING", "ERASE_zero", "VM_"},
        tags("DELETING", f"VM_{OTHER_VM}"),
    ],
    ids=lambda given: " ".join(sorted(given)),
)
def test_volumes_that_are_not_ours_to_touch(lv_tags: set[str]) -> None:
    assert LocalDisk.from_lv(volume(lv_tags)) is None


@pytest.mark.parametrize(
    "lv_name", ["data", IMAGE.upper(), VOLUME + "_tdata", VOLUME[:-1], "lvol0", "", VOLUME.replace("-", "")]
)
def test_names_that_no_local_disk_has(lv_name: str) -> None:
    assert LocalDisk.from_lv(volume(tags(), lv_name=lv_name)) is None
    assert LocalDisk.from_lv(volume({"localdisk", "DELETING"}, lv_name=lv_name)) is None


def test_a_pool_named_like_a_volume_is_none() -> None:
    assert LocalDisk.from_lv(volume(tags(), layout=("thin", "pool"))) is None
    assert LocalDisk.from_lv(volume(tags(), layout=("cache", "pool"))) is None


def test_local_disks_of_a_real_report() -> None:
    found = local_disk.local_disks(VolumeGroup.from_report(report("mixed")))
    assert [(d.volume_id[:1], d.state.value, d.backend, d.is_older, d.is_open) for d in found] == [
        ("1", "ready", "lvm", False, True),
        ("2", "unfinished", "lvmthin", False, False),
        ("3", "ready", "lvm", True, False),
        ("4", "deleting", "lvmthin", False, False),
    ]


@settings(max_examples=examples(80))
@given(
    st.frozensets(
        st.one_of(
            st.sampled_from(sorted(tags("UPDATING", "DELETING", f"VM_{OTHER_VM}"))),
            st.from_regex(r"(VM|IU|STOPPED|WRITES|SOURCE)_[0-9a-f-]{0,40}", fullmatch=True),
            st.text(max_size=20),
        ),
        max_size=8,
    )
)
def test_any_tags_make_a_disk_of_one_vm_or_none(lv_tags: frozenset[str]) -> None:
    found = LocalDisk.from_lv(volume(lv_tags))
    if found:
        owners = {t for t in lv_tags if t.startswith(("VM_", "IU_"))}
        if found.is_aside:
            assert owners == set()
            assert {"localdisk", "DELETING"} <= lv_tags
        else:
            assert owners == {f"VM_{found.vm_id}", f"IU_{found.image_id}"}
        assert found.stopped is None or found.stopped >= 0


def test_new_tags_make_the_disk_that_they_describe() -> None:
    found = disk_of(volume(local_disk.new_tags(VM, IMAGE, FINGERPRINT, 4096)))
    assert (found.vm_id, found.image_id, found.fingerprint) == (VM, IMAGE, FINGERPRINT)
    assert (found.state, found.is_older) == (State.UNFINISHED, False)


def test_stopped_tag() -> None:
    assert disk_of(volume(tags(*local_disk.stopped_tags(Moment(1760000000.9))))).stopped == 1760000000


@pytest.mark.parametrize(
    ("vm", "image", "refused"),
    [(VM, IMAGE, False), (OTHER_VM, IMAGE, True), (VM, OTHER_IMAGE, True), (OTHER_VM, OTHER_IMAGE, True)],
)
def test_require_owner(vm: str, image: str, refused: bool) -> None:
    disk = disk_of(volume(tags(vm=vm, image=image)))
    if refused:
        with pytest.raises(OtherOwner, match=f"belongs to VM {vm}, image {image}"):
            local_disk.require_owner(disk, VM, IMAGE, "ovirt-local")
    else:
        local_disk.require_owner(disk, VM, IMAGE, "ovirt-local")


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (FINGERPRINT, True),
        (FINGERPRINT[:-1], False),
        (FINGERPRINT + "0", False),
        (FINGERPRINT.upper(), False),
        (FINGERPRINT + "\n", False),
        ("", False),
        (None, False),
        (5, False),
        ([FINGERPRINT], False),
    ],
)
def test_is_fingerprint(text: object, good: bool) -> None:
    assert is_fingerprint(text) is good


# -- starting

STATE_TAGS = {
    State.READY: (),
    State.STOPPED: ("STOPPED_5",),
    State.UNFINISHED: ("UPDATING", "WRITES_5"),
    State.DRIFTED: ("DRIFTED_5", "STOPPED_5"),
    State.DELETING: ("DELETING",),
}
STARTS = list(
    itertools.product(
        [state for state in State if state is not State.DRIFTED],
        (False, True),  # open
        ("delete", "keep"),
        ("refuse", "recopy"),
        ("same", "other", "none", "two"),  # fingerprint
        (SIZE - 512, SIZE, SIZE + EXTENT),  # of the volume
        (False, True),  # made by the older hook
        ("keep", "as_ours"),  # what the configuration says of those
    )
)


def found_disk(state: State, is_open: bool, fingerprint: str, size: int, is_older: bool) -> LocalDisk:
    lv_tags = tags(*STATE_TAGS[state], ours=not is_older) - {f"SOURCE_{FINGERPRINT}"}
    shown = {"same": [FINGERPRINT], "other": [OTHER_FINGERPRINT], "two": [FINGERPRINT, OTHER_FINGERPRINT]}
    lv_tags |= {f"SOURCE_{each}" for each in shown.get(fingerprint, [])}
    return disk_of(volume(lv_tags, is_open=is_open, size=size))


def expected_start(
    state: State,
    is_open: bool,
    on_stop: str,
    on_change: str,
    fingerprint: str,
    size: int,
    is_older: bool,
    older_disks: str,
) -> str | type[Error]:
    """The expected plan, for a VM that does not run and whose disk nobody else holds."""
    if is_open:
        return DiskBusy
    if is_older and older_disks == "keep" and state in (State.READY, State.STOPPED):
        return "reuse"
    is_kept = state is State.STOPPED or (state is State.READY and on_stop == "keep")
    if not is_kept:
        return "remove"
    if on_stop == "delete":
        return "replace"
    is_same = fingerprint == "same" or (is_older and fingerprint in ("none", "two"))
    if is_same and size >= SIZE:
        return "reuse"
    return "replace" if on_change == "recopy" else SourceChanged


WANTED = Wanted(VOLUME, FINGERPRINT, SIZE)


def planned_start(*disks: LocalDisk, retention: Retention = RETENTION) -> Start | type[Error]:
    try:
        return plan_start(disks, WANTED, retention, "ovirt-local")
    except Error as error:
        return type(error)


def does(plan: Start | type[Error], disk: LocalDisk) -> str | type[Error]:
    """What a start does with one disk: one thing at most."""
    if not isinstance(plan, Start):
        return plan
    found = ["reuse"] * (plan.reuse is disk) + ["remove"] * (disk in plan.remove)
    (what,) = [*found, *["replace"] * (disk in plan.replace)] or ["leave"]
    return what


def test_a_start_does_what_the_table_says() -> None:
    for case in STARTS:
        state, is_open, on_stop, on_change, fingerprint, size, is_older, older_disks = case
        disk = found_disk(state, is_open, fingerprint, size, is_older)
        retention = Retention(on_stop, 3600, 600, on_change, "none", older_disks)
        assert does(planned_start(disk, retention=retention), disk) == expected_start(*case), case


def test_no_start_breaks_a_promise() -> None:
    """With any two disks of an image, only `recopy` or `delete` loses a complete copy that is kept."""
    states = [state for state in State if state is not State.DRIFTED]
    kinds = [*itertools.product(states, (False, True), ("same", "other"), (SIZE, SIZE - 512), (False, True))]
    for (one, other), on_stop, on_change in itertools.product(
        itertools.product(kinds, kinds), ("delete", "keep"), ("refuse", "recopy")
    ):
        retention = frozen.replace(RETENTION, on_stop=on_stop, on_source_change=on_change)
        ours, theirs = of_kind(VOLUME, *one), of_kind(OTHER_VOLUME, *other)
        plan = planned_start(ours, theirs, retention=retention)
        if not isinstance(plan, Start):
            assert plan is DiskBusy or (on_stop, on_change) == ("keep", "refuse")
            continue
        assert not ours.is_open
        for disk in (ours, theirs):
            what = does(plan, disk)
            if disk.is_open:
                assert what == "leave"
            if disk.is_complete and (on_stop, on_change) == ("keep", "refuse"):
                assert what in ("reuse", "leave")
            if what == "reuse":
                assert (disk.is_complete, disk.fingerprint, on_stop) == (True, FINGERPRINT, "keep")
                assert disk.lv.lv_size >= SIZE
                assert not disk.is_stale
            if not disk.is_complete and not disk.is_open:
                assert what == "remove"
        if (on_stop, on_change) == ("keep", "refuse") and plan.reuse is None:
            assert not any(disk.is_complete for disk in (ours, theirs))


def of_kind(name: str, state: State, is_open: bool, fingerprint: str, size: int, is_stale: bool) -> LocalDisk:
    disk = found_disk(state, is_open, fingerprint, size, is_older=False)
    lv_tags = disk.lv.lv_tags | ({"STALE"} if is_stale else set())
    return disk_of(frozen.replace(disk.lv, lv_name=name, lv_tags=lv_tags))


def kept(name: str = VOLUME, fingerprint: str = "same", is_stale: bool = False) -> LocalDisk:
    return of_kind(name, State.STOPPED, False, fingerprint, SIZE, is_stale)


@pytest.mark.parametrize(
    ("disk", "refusal"),
    [
        (kept(fingerprint="other"), SourceChanged),
        (kept(is_stale=True), KeptStale),
        (kept(OTHER_VOLUME, fingerprint="other"), OtherLeaf),
        (kept(OTHER_VOLUME, is_stale=True), KeptStale),
    ],
)
def test_the_operator_decides_about_a_kept_disk(disk: LocalDisk, refusal: type[Error]) -> None:
    assert planned_start(disk, retention=RETENTION) is refusal
    recopy = frozen.replace(RETENTION, on_source_change="recopy")
    assert planned_start(disk, retention=recopy) == Start(replace=(disk,))


@pytest.mark.parametrize("name", [VOLUME, OTHER_VOLUME])
def test_how_the_operator_uses_a_kept_disk_nevertheless(name: str) -> None:
    """A disk that is too small cannot be used, and there is no advice to do so."""
    wanted = Wanted(VOLUME, FINGERPRINT, SIZE)
    disk = kept(name, fingerprint="other")
    with pytest.raises((SourceChanged, OtherLeaf)) as caught:
        plan_start([disk], wanted, RETENTION, "vg")
    advice = f"lvchange --deltag SOURCE_{disk.fingerprint} --addtag SOURCE_{FINGERPRINT} vg/{name}"
    assert str(caught.value).endswith(f" : {FIX} vg/{name}; {TO_USE} {advice}")
    with pytest.raises((SourceChanged, OtherLeaf)) as caught:
        plan_start([disk], frozen.replace(wanted, virtual_size=SIZE + 512), RETENTION, "vg")
    assert str(caught.value).endswith(f" : {FIX} vg/{name}")


FIX = "set `on_source_change: recopy` (loses the local data), or localdisk remove"
TO_USE = "to use it nevertheless:"


def test_the_kept_disk_of_the_same_bytes_is_used_whatever_its_name_is() -> None:
    other, changed = kept(OTHER_VOLUME), kept(fingerprint="other")
    assert planned_start(other, retention=RETENTION) == Start(other)
    assert planned_start(changed, other, retention=RETENTION) == Start(other)
    recopy = frozen.replace(RETENTION, on_source_change="recopy")
    assert planned_start(changed, other, retention=recopy) == Start(other, replace=(changed,))


def test_a_disk_of_the_older_hook_says_by_its_name_alone_what_it_is_a_copy_of() -> None:
    older = found_disk(State.READY, False, "none", SIZE, is_older=True)
    elsewhere = disk_of(frozen.replace(older.lv, lv_name=OTHER_VOLUME))
    assert planned_start(older, retention=RETENTION) == Start(older)
    assert planned_start(elsewhere, retention=RETENTION) is OtherLeaf


@pytest.mark.parametrize("name", [VOLUME, OTHER_VOLUME])
@pytest.mark.parametrize("is_open", [False, True])
def test_no_start_while_a_disk_of_the_image_has_drifted(name: str, is_open: bool) -> None:
    """With any other disks of the image: nothing is removed, replaced or used."""
    drifted = of_kind(name, State.DRIFTED, is_open, "same", SIZE, False)
    beside = OTHER_VOLUME if name == VOLUME else VOLUME
    kinds = itertools.product(STATE_TAGS, (False, True), ("same", "other"), (SIZE,), (False, True))
    others = [(), *((of_kind(beside, *kind),) for kind in kinds)]
    for other, on_stop, on_change in itertools.product(others, ("delete", "keep"), ("refuse", "recopy")):
        retention = frozen.replace(RETENTION, on_stop=on_stop, on_source_change=on_change)
        assert planned_start(*other, drifted, retention=retention) is DiskDrifted


@pytest.mark.parametrize("on_stop", ["delete", "keep"])
@pytest.mark.parametrize("on_change", ["refuse", "recopy"])
@pytest.mark.parametrize("state", State)
def test_a_disk_that_others_depend_on_is_neither_removed_nor_renamed(
    state: State, on_stop: str, on_change: str
) -> None:
    """It is neither removed nor renamed: the start is refused, or leaves it beside the new disk."""
    retention = frozen.replace(RETENTION, on_stop=on_stop, on_source_change=on_change)
    for fingerprint, mates in itertools.product(
        ("same", "other"), ((), (kept(OTHER_VOLUME),), (kept(OTHER_VOLUME, "other"),))
    ):
        ours = depended_on(of_kind(VOLUME, state, False, fingerprint, SIZE, False))
        plan = planned_start(ours, *mates, retention=retention)
        if isinstance(plan, Start):
            assert plan.reuse is ours
        elif state is State.DRIFTED:
            assert plan is DiskDrifted
        else:
            assert plan is DependentVolumes or on_change == "refuse"
            assert plan in (DependentVolumes, SourceChanged, OtherLeaf)
        theirs = depended_on(of_kind(OTHER_VOLUME, state, False, fingerprint, SIZE, False))
        mates = tuple(disk_of(frozen.replace(mate.lv, lv_name=VOLUME)) for mate in mates)
        plan = planned_start(theirs, *mates, retention=retention)
        if isinstance(plan, Start):
            assert does(plan, theirs) == "leave"


@pytest.mark.parametrize("on_stop", ["delete", "keep"])
@pytest.mark.parametrize("on_change", ["refuse", "recopy"])
@pytest.mark.parametrize("state", [State.READY, State.STOPPED])
@pytest.mark.parametrize("fingerprint", ["none", "same", "other"])
def test_a_disk_of_the_older_hook_is_left_alone(
    state: State, on_stop: str, on_change: str, fingerprint: str
) -> None:
    """With any other disks beside it, it is used as it is, or kept until the operator decides."""
    retention = Retention(on_stop, 3600, 600, on_change, "none", "keep")
    older = found_disk(state, False, fingerprint, SIZE // 2, is_older=True)
    stale = disk_of(frozen.replace(older.lv, lv_tags=older.lv.lv_tags | {"STALE"}))
    named = kept(OTHER_VOLUME)
    for mates in ((), (named,), (kept(OTHER_VOLUME, "other"),)):
        assert does(planned_start(older, *mates, retention=retention), older) == "reuse"
        assert planned_start(stale, *mates, retention=retention) is KeptStale
    elsewhere = disk_of(frozen.replace(older.lv, lv_name=OTHER_VOLUME))
    plan = planned_start(elsewhere, retention=retention)
    assert plan == (Start() if on_change == "recopy" else OtherLeaf)
    plan = planned_start(elsewhere, kept(), retention=retention)
    if (on_stop, on_change) == ("delete", "refuse"):
        assert plan is OtherLeaf
    else:
        assert does(plan, elsewhere) == "leave"


def depended_on(disk: LocalDisk) -> LocalDisk:
    return disk_of(frozen.replace(disk.lv, dependents=("backup",)))


def test_nothing_found_is_created() -> None:
    assert planned_start() == Start()


# -- stopping

STOPS = list(itertools.product(State, (False, True), ("delete", "keep"), ("none", "discard", "zero")))


def test_a_stop_does_what_the_table_says() -> None:
    for state, is_open, on_stop, erase in STOPS:
        disk = found_disk(state, is_open, "same", SIZE, is_older=False)
        retention = frozen.replace(RETENTION, on_stop=on_stop, erase=erase)
        is_kept = on_stop == "keep" and state in (State.READY, State.STOPPED)
        must_wait = is_open or erase != "none"
        expected = Stop.KEEP if is_kept else Stop.MARK_DELETING if must_wait else Stop.REMOVE
        if state is State.DRIFTED:
            expected = Stop.LEAVE
        assert plan_stop(disk, retention) is expected, (state, is_open, on_stop, erase)
