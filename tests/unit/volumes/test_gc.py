from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdisk import cli, clock, config, counters, frozen, lock, ready
from localdisk.clock import Moment
from localdisk.config import Config, Policy
from localdisk.errors import CommandFailed, CommandTimeout, Interrupted, NoVolumeGroup
from localdisk.helper.session import Session
from localdisk.status import libvirt_vms
from localdisk.volumes import gc, removal
from localdisk.volumes.gc import Collection
from localdisk.volumes.local_disk import FIRST, LocalDisk, unneeded_tags
from localdisk.volumes.lvm import VolumeGroup
from localdisk.volumes.progress import Progress
from localdisk.volumes.template import Template
from localdisk.volumes.verdict import Action, Verdict, Witnesses, decide, decide_template, depends_on_vms
from tests.examples import examples
from tests.fakes import (
    FINGERPRINT,
    FULLREPORT,
    IMAGE,
    OTHER_IMAGE,
    OTHER_VM,
    OTHER_VOLUME,
    VM,
    VOLUME,
    FakeHost,
    Killed,
    Volume,
    aside,
    report,
    tags,
)

NOW = 1_760_000_000
GRACE, KEEP_FOR = 600, 7 * 86400  # the defaults
SIZE = 64 << 20
LOOK = f"{FULLREPORT} ovirt-local"
LIST = "virsh --readonly --connect qemu:///system list --all --uuid; echo ====; list --uuid"
NAME = f"ovirt-local/{VOLUME}"
KEEP = "retention: {on_stop: keep}"
ERASE = "retention: {erase: discard}"
ASIDE = aside("discard", VOLUME)
NOT_RENAMED = aside("discard", OTHER_VOLUME)  # killed before it could be, or LVM refused
LONG_MARKED = f"UNNEEDED_{NOW - GRACE}"
LONG_STOPPED = f"STOPPED_{NOW - KEEP_FOR}"
LV = VolumeGroup.from_report(report("mixed")).lvs[0]

SCHEMA = json.loads((Path(__file__).parents[3] / "schema/gc.schema.json").read_text())


@lru_cache(maxsize=50)
def parsed(text: str = "") -> Config:
    return config.parse(text.encode(), "F")


@lru_cache(maxsize=50)
def policy(text: str = "") -> Policy:
    return parsed(text).policy(VM)


def disk(lv_tags: set[str] | frozenset[str], is_open: bool = False) -> LocalDisk:
    lv = frozen.replace(LV, lv_name=VOLUME, lv_tags=frozenset(lv_tags), lv_device_open=is_open)
    found = LocalDisk.from_lv(lv)
    assert found
    return found


@pytest.fixture(name="host")
def fixture_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHost:
    monkeypatch.setattr(time, "time", lambda: float(NOW))
    return FakeHost().install(monkeypatch, tmp_path)


# -- deciding: the order


# The rows of the table in docs/operations.md: how each begins, the reason that gc gives, and what makes it so
# beside what makes the rows below it so.  `lv_tags`: then the rows below are of another state.
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("open", "in use, its device is open", {"is_open": True}),
    ("being worked on", "a process works on it", {"is_locked": True}),
    ("drifted: ", "it has data of its VM", {"lv_tags": tags(f"DRIFTED_{NOW}")}),
    ("of a VM about which libvirt", "libvirt cannot be asked about its VM", {"vm_runs": None}),
    ("of a VM that runs or is paused", "its VM runs", {"vm_runs": True}),
    ("of a VM that has another disk", "another disk of its VM is being prepared", {"vm_is_prepared": True}),
    (
        "complete and not marked, of a VM that libvirt knows",
        "its VM ran from another volume",
        {"lv_tags": tags() - {"localdisk"}, "vm_is_defined": True, "ran_elsewhere": True},
    ),
    ("of vdsm's older hook", "an older hook's disk", {"lv_tags": tags() - {"localdisk"}}),
    ("one with volumes", "but LVM would remove backup with it", {"dependents": ("backup",)}),
    ("an unfinished copy", "unfinished copy that nobody works on", {"lv_tags": tags("UPDATING")}),
    ("set aside", "set aside to be erased", {"lv_tags": ASIDE}),
    (
        "marked for removal",
        "marked for removal when its VM stopped",
        {"lv_tags": tags("DELETING", "STOPPED_5")},
    ),
    (
        "marked at a time that the clock has not reached",
        "marked as stopped in the future",
        {"lv_tags": tags(f"STOPPED_{NOW + 9}")},
    ),
    ("marked at a time before", "marked as stopped before the disk was made", {"lv_tags": tags("STOPPED_5")}),
    ("kept since its VM stopped", "kept for another", {"lv_tags": tags(f"STOPPED_{NOW}")}),
    ("complete and not marked: ", "no VM needs it", {"lv_tags": tags()}),
)


def test_the_table_has_the_order_of_decisions() -> None:
    """From the last row to the first, each comes before all below it."""
    page = (Path(__file__).parents[3] / "docs/operations.md").read_text()
    table = page.split("| a disk that is | is removed |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert len(table) == len(ROWS) + 1  # the first is of what gc does not look at
    so_far: dict[str, Any] = {"is_locked": False, "vm_runs": False}
    for row, (begins, reason, more) in reversed([*zip(table[1:], ROWS)]):
        assert row.startswith(f"| {begins}")
        so_far |= more
        witnesses = dict(so_far, may_start=True)
        found = disk(witnesses.pop("lv_tags"), witnesses.pop("is_open", False))
        lv = frozen.replace(found.lv, dependents=witnesses.pop("dependents", ()))
        verdict = decide(frozen.replace(found, lv=lv), Witnesses(**witnesses), policy(), Moment(NOW))
        assert reason in verdict.reason, begins


# -- deciding: every combination


class Case(NamedTuple):
    state: str
    is_open: bool
    is_locked: bool
    vm: str | None  # in libvirt; None: libvirt is silent; prepared: defined, and its other disk is worked on
    may_start: bool
    marked: int | None  # seconds ago; negative: in the future
    stopped: int
    on_stop: str

    @property
    def verdict(self) -> Verdict:
        runs = None if self.vm is None else self.vm == "runs"
        is_defined, is_prepared = self.vm in ("defined", "prepared"), self.vm == "prepared"
        witnesses = Witnesses(self.is_locked, runs, self.may_start, is_defined, is_prepared)
        return decide(self.disk, witnesses, policy(f"retention: {{on_stop: {self.on_stop}}}"), Moment(NOW))

    @property
    def disk(self) -> LocalDisk:
        more = {
            "ready": set[str](),
            "stopped": {f"STOPPED_{NOW - self.stopped}"},
            "unfinished": {"UPDATING", "WRITES_5"},
            "deleting": {"DELETING"},
            "aside": ASIDE,
        }[self.state]
        mark = set() if self.marked is None else {f"UNNEEDED_{NOW - self.marked}"}
        return disk((set() if self.state == "aside" else tags()) | more | mark, self.is_open)


BOTH = (False, True)
STATES = ("ready", "stopped", "unfinished", "deleting", "aside")
VMS = (None, "unknown", "defined", "prepared", "runs")
MARKS = (None, -1, 0, GRACE - 1, GRACE, GRACE + 1)
STOPS = (-1, 0, KEEP_FOR - 1, KEEP_FOR, KEEP_FOR + 1)
CASES = [
    Case(*values)
    for values in itertools.product(STATES, BOTH, BOTH, VMS, BOTH, MARKS, STOPS, ("delete", "keep"))
    if values[0] == "stopped" or values[6] == 0
]


def expected(case: Case) -> tuple[Action, bool]:
    """The expected action, and whether everything that matters is known."""
    can_go = not case.is_open and not case.is_locked and case.vm in ("unknown", "defined")
    is_kept = case.state == "ready" and case.on_stop == "keep"
    is_over = case.state == "stopped" and case.stopped >= KEEP_FOR
    may_be_starting = case.vm == "defined" and (is_kept or is_over)
    must_wait = can_go and case.may_start and ((case.state == "ready" and not is_kept) or may_be_starting)
    has_waited = not must_wait or (case.marked is not None and case.marked >= GRACE)
    is_due = {
        "unfinished": True,
        "deleting": True,
        "aside": case.may_start,
        "stopped": is_over,
        "ready": not is_kept,
    }
    mark_is_ahead = must_wait and case.marked is not None and case.marked < 0
    # The mark is of another date, or of another keep_for.
    is_outdated = can_go and case.state == "stopped" and (mark_is_ahead or 0 <= case.stopped < KEEP_FOR)
    needed = case.is_open or (not case.is_locked and case.vm in ("runs", "prepared"))
    actions = {
        Action.REMOVE: can_go and is_due[case.state] and has_waited,
        Action.MARK_STOPPED: can_go and is_kept and has_waited,
        Action.MARK_UNNEEDED: must_wait and case.marked is None,
        Action.CLEAR_MARK: case.marked is not None and (needed or is_outdated),
    }
    wanted = [action for action, holds in actions.items() if holds]
    assert len(wanted) <= 1
    was_silent = not case.is_open and not case.is_locked and case.vm is None
    stop_is_ahead = can_go and case.state == "stopped" and case.stopped < 0
    is_in_doubt = mark_is_ahead and not is_outdated
    return (*wanted, Action.KEEP)[0], not (was_silent or is_in_doubt or stop_is_ahead)


def test_decide_does_what_the_design_says() -> None:
    assert len(CASES) > 2000
    for case in CASES:
        verdict = case.verdict
        assert (verdict.action, verdict.is_certain) == expected(case), case
        assert verdict.reason, case


def test_what_does_not_depend_on_vms_is_decided_alike_whatever_libvirt_says() -> None:
    unasked = set()
    for case in CASES:
        if case.vm is None or (case.state == "aside" and case.vm != "unknown"):  # what is aside is of no VM
            continue
        alone = case._replace(vm="unknown").verdict
        if case.vm != "prepared" and not depends_on_vms(case.disk, alone):
            assert (case.verdict.action, case.verdict.is_certain) == (alone.action, alone.is_certain), case
            unasked.add((case.state, case.is_open))
    closed = {(state, False) for state in ("stopped", "aside", "unfinished", "deleting")}  # some are locked
    assert unasked == {(state, True) for state in STATES} | closed


@pytest.mark.parametrize("may_start", [True, False])
def test_a_host_that_boots_with_a_wrong_date_removes_no_kept_disk(may_start: bool) -> None:
    """The date is years ahead until NTP sets it, some minutes after vdsm has started."""
    stopped = tags(f"STOPPED_{NOW - 5}", f"BOOT_{OTHER_BOOT}_5")
    ahead, witnesses = Moment(NOW + 99 * KEEP_FOR, BOOT, 60), Witnesses(False, False, may_start)
    first = decide(disk(stopped), witnesses, policy(KEEP), ahead)
    assert first.action is Action.MARK_UNNEEDED
    marked = stopped | unneeded_tags(disk(stopped), ahead)
    second = decide(disk(marked), witnesses, policy(KEEP), Moment(NOW, BOOT, 360))
    assert (second.action, second.is_certain) == (Action.CLEAR_MARK, True)
    late = decide(disk(marked), witnesses, policy(KEEP), Moment(ahead.epoch + GRACE, BOOT, 60 + GRACE))
    assert late.action is Action.REMOVE


@pytest.mark.parametrize("may_start", [True, False])
def test_a_mark_of_a_wrong_date_is_taken_back(may_start: bool) -> None:
    """By the right date, too, the disk's time is over."""
    marks = tags(LONG_STOPPED, f"BOOT_{OTHER_BOOT}_5", f"UNNEEDED_{NOW + 99 * KEEP_FOR}")
    verdict = decide(disk(marks), Witnesses(False, False, may_start), policy(KEEP), Moment(NOW, BOOT, 60))
    assert (verdict.action, verdict.is_certain) == (Action.CLEAR_MARK, True)


@pytest.mark.parametrize(
    ("lv_tags", "text", "may_start", "reason"),
    [
        (tags(f"STOPPED_{NOW + 1}"), "", True, "marked as stopped in the future, the clock went backwards"),
        (tags(f"STOPPED_{NOW - 3600}"), "", True, "kept for another 6 d 23 h"),
        (tags(f"STOPPED_{NOW - KEEP_FOR - 3600}"), "", True, "stopped 7 d 1 h ago, past keep_for"),
        (tags(), "", True, "no VM needs it; removed if that is so after 10 min"),
        (tags(f"UNNEEDED_{NOW - 61}"), "", True, "no VM needs it since 1 min 1 s, of 10 min (grace)"),
        (tags(f"UNNEEDED_{NOW + 1}"), "", True, "marked as unneeded in the future, the clock went backwards"),
        (tags(LONG_MARKED), "", True, "no VM needs it since 10 min, past grace"),
        (tags(LONG_MARKED), "", False, "its VM stopped while vdsm did not run"),
        (tags(), KEEP, True, "its VM does not run, kept for 7 d from now"),
        (tags("UPDATING"), "", True, "unfinished copy that nobody works on"),
        (tags("DELETING"), "", True, "marked for removal when its VM stopped"),
        (tags(f"UNNEEDED_{NOW - 61}"), KEEP, True, "its VM does not run, kept for 7 d from now"),
        (ASIDE, "", True, "set aside to be erased"),
        (ASIDE, "", False, "set aside; the next gc erases it, because vdsm waits for this one"),
        (NOT_RENAMED, "", False, "set aside; the next gc erases it, because vdsm waits for this one"),
    ],
)
def test_reasons(lv_tags: set[str], text: str, may_start: bool, reason: str) -> None:
    assert (
        decide(disk(lv_tags), Witnesses(False, False, may_start), policy(text), Moment(NOW)).reason == reason
    )


@pytest.mark.parametrize(
    ("more", "text", "reason"),
    [
        ((), "", "no VM needs it; removed if that is so after 10 min"),
        ((), KEEP, "no VM needs it; marked as stopped if that is so after 10 min"),
        ((LONG_STOPPED,), KEEP, "no VM needs it; removed if that is so after 10 min"),
        ((LONG_STOPPED, LONG_MARKED), KEEP, "stopped 7 d ago, past keep_for"),
        ((LONG_MARKED,), KEEP, "its VM does not run, kept for 7 d from now"),
        ((LONG_MARKED,), "", "no VM needs it since 10 min, past grace"),
        (("UPDATING",), "", "unfinished copy that nobody works on"),
    ],
)
def test_reasons_for_a_vm_that_is_only_defined(more: tuple[str, ...], text: str, reason: str) -> None:
    witnesses = Witnesses(False, False, may_start=True, vm_is_defined=True)
    assert decide(disk(tags(*more)), witnesses, policy(text), Moment(NOW)).reason == reason


@pytest.mark.parametrize(
    ("is_open", "is_locked", "runs", "reason"),
    [
        (True, True, True, "in use, its device is open"),
        (False, True, True, "a process works on it"),
        (False, False, True, "its VM runs"),
        (False, False, None, "libvirt cannot be asked about its VM"),
        (False, False, False, "another disk of its VM is being prepared"),
    ],
)
def test_reasons_to_keep(is_open: bool, is_locked: bool, runs: bool | None, reason: str) -> None:
    witnesses = Witnesses(is_locked, runs, may_start=True, vm_is_prepared=True)
    assert decide(disk(tags("UPDATING"), is_open), witnesses, policy(), Moment(NOW)).reason == reason


# -- deciding: what never happens

EPOCHS = st.integers(0, 2 * NOW)
TAG_SETS = st.frozensets(
    st.sampled_from(["UPDATING", "DELETING", "WRITES_5", "ERASE_zero"])
    | st.builds("{}_{}".format, st.sampled_from(["STOPPED", "UNNEEDED"]), EPOCHS | st.just("x")),
    max_size=4,
)
WITNESSES = st.builds(
    Witnesses, st.booleans(), st.none() | st.booleans(), st.booleans(), st.booleans(), st.booleans()
)
POLICIES = st.builds(
    lambda on_stop, keep_for, grace: frozen.replace(
        policy(),
        retention=frozen.replace(policy().retention, on_stop=on_stop, keep_for=keep_for, grace=grace),
    ),
    st.sampled_from(["delete", "keep"]),
    st.integers(0, 2 * NOW),
    st.integers(0, 2 * NOW),
)
properties = settings(max_examples=examples(150))


@properties
@given(TAG_SETS, st.booleans(), st.booleans(), WITNESSES, POLICIES, EPOCHS)
def test_decide_never_breaks_a_promise(
    more: frozenset[str], ours: bool, is_open: bool, witnesses: Witnesses, its: Policy, now: int
) -> None:
    found = disk(tags(*more, ours=ours), is_open)
    verdict = decide(found, witnesses, its, Moment(now))
    if verdict.action is Action.REMOVE:
        assert not is_open
        assert not witnesses.is_locked
        assert witnesses.vm_runs is False
        assert not witnesses.vm_is_prepared
        assert verdict.is_certain
        if not more & {"UPDATING", "DELETING"}:  # a complete copy
            assert not (found.is_older and its.retention.older_disks == "keep")
            assert all(
                since >= max(FIRST, found.lv.lv_time) for since in (found.stopped, found.unneeded) if since
            )
            assert found.stopped is None or now - found.stopped >= its.retention.keep_for
            if (found.stopped is None or witnesses.vm_is_defined) and witnesses.may_start:
                assert found.unneeded is not None
                assert now - found.unneeded >= its.retention.grace
    if verdict.action is Action.MARK_UNNEEDED and verdict.is_certain:
        assert found.unneeded is None


@properties
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 5000)), min_size=1, max_size=8))
def test_a_clock_that_went_backwards_never_deletes(sightings: list[tuple[int, int]]) -> None:
    """gc sees a disk every so many seconds, by a clock that is behind by so much, after it was right once."""
    lv_tags, true_time = tags(*unneeded_tags(disk(tags()), Moment(NOW))), NOW
    for seconds, behind in sightings:
        true_time += seconds
        found = disk(lv_tags)
        verdict = decide(found, Witnesses(False, False, True), policy(), Moment(true_time - behind))
        if verdict.action is Action.REMOVE:
            assert true_time - NOW >= GRACE
            return
        if verdict.action in (Action.MARK_UNNEEDED, Action.CLEAR_MARK):
            lv_tags -= found.unneeded_tags
        if verdict.action is Action.MARK_UNNEEDED:
            lv_tags |= unneeded_tags(found, Moment(true_time - behind))


# -- deciding: clocks

BOOT, OTHER_BOOT = "55555555-5555-4555-8555-555555555555", "66666666-6666-4666-8666-666666666666"
KINDS = pytest.mark.parametrize(
    ("kind", "text", "again"),
    [
        ("STOPPED", "retention: {keep_for: 1h}", Action.MARK_STOPPED),
        ("UNNEEDED", "retention: {grace: 1h}", Action.MARK_UNNEEDED),
    ],
)


def decided(text: str, lv_tags: set[str], now: Moment) -> Verdict:
    return decide(disk(lv_tags), Witnesses(False, False, True), policy(text), now)


@KINDS
@pytest.mark.parametrize("date", [5, 978307200, NOW - 86400, NOW - 9, NOW, NOW + 86400])
@pytest.mark.parametrize("age", [0, 3599, 3600, 99999])
def test_within_a_boot_the_date_of_a_mark_does_not_count(
    kind: str, text: str, again: Action, date: int, age: int
) -> None:
    """The clock was wrong when the host booted, or went wrong later."""
    now = Moment(NOW, BOOT, 500000.5)
    verdict = decided(text, tags(f"{kind}_{date}", f"BOOT_{BOOT}_{500000 - age}"), now)
    assert verdict.is_certain
    is_late = NOW - date > age + 60
    assert verdict.action is (Action.REMOVE if age >= 3600 else again if is_late else Action.KEEP)
    if age < 3600:
        assert verdict.due == NOW + 3600 - (age + 0.5)


@KINDS
@pytest.mark.parametrize(
    "boot", ["", f"BOOT_{OTHER_BOOT}_5", f"BOOT_{BOOT}_99999", "BOOT_x_5", f"BOOT_{BOOT}_x"]
)
def test_a_mark_that_cannot_be_true_is_in_doubt(kind: str, text: str, again: Action, boot: str) -> None:
    """The mark is of an earlier or unknown boot; it is replaced by a mark of now."""
    made = LV.lv_time
    now = Moment(NOW, BOOT, 50)
    for date in (5, 978307200, FIRST - 1, made - 1):
        verdict = decided(text, tags(f"{kind}_{date}", *filter(None, [boot])), now)
        assert (verdict.action, verdict.is_certain, verdict.due) == (again, False, NOW + 3600)
        assert "before the disk was made, the clock was wrong then" in verdict.reason
    assert decided(text, tags(f"{kind}_{made}"), now).action is Action.REMOVE


@KINDS
def test_no_mark_is_made_anew_while_the_clock_is_wrong(kind: str, text: str, again: Action) -> None:
    for now in (5, FIRST - 1, LV.lv_time - 1):
        verdict = decided(text, tags(f"{kind}_4"), Moment(now, BOOT, 50))
        assert (verdict.action, verdict.is_certain) == (Action.KEEP, False)


@pytest.mark.parametrize("more", [(), ("STALE",)])
def test_a_mark_is_made_anew_with_its_age(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """The VM stopped ten minutes ago, in the year 2001."""
    monkeypatch.setattr(clock, "now", lambda: Moment(NOW, BOOT, 700.0))
    volume = host.add(VOLUME, tags("STOPPED_978307200", "UNNEEDED_5", f"BOOT_{BOOT}_100", *more), SIZE)
    assert outcome(gc.collect(parsed())) == {"1": "mark_stopped"}
    assert volume.lv_tags == tags(f"STOPPED_{NOW - 600}", f"BOOT_{BOOT}_100", *more)
    assert outcome(gc.collect(parsed())) == {"1": "keep"}


def test_marks_record_the_boot_and_go_with_it(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now", lambda: Moment(NOW, BOOT, 7.9))
    volume = host.add(VOLUME, tags(), SIZE)
    gc.collect(parsed())
    assert volume.lv_tags == tags(f"UNNEEDED_{NOW}", f"BOOT_{BOOT}_7")
    host.active = {VM}
    gc.collect(parsed())
    assert volume.lv_tags == tags()


def test_a_stopped_disk_keeps_its_boot(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its VM is defined: past keep_for it is marked as unneeded, too, by the date alone."""
    now = Moment(NOW, BOOT, KEEP_FOR + 100.0)
    monkeypatch.setattr(clock, "now", lambda: now)
    stopped = tags(f"STOPPED_{NOW - KEEP_FOR}", f"BOOT_{BOOT}_100")
    volume, host.defined = host.add(VOLUME, stopped, SIZE), {VM}
    assert outcome(gc.collect(parsed())) == {"1": "mark_unneeded"}
    assert volume.lv_tags == stopped | {f"UNNEEDED_{NOW}"}
    now = Moment(NOW + GRACE - 1, BOOT, KEEP_FOR + GRACE + 99.0)
    assert outcome(gc.collect(parsed())) == {"1": "keep"}
    host.active = {VM}
    assert outcome(gc.collect(parsed())) == {"1": "clear_mark"}
    assert volume.lv_tags == stopped
    host.active = set()
    assert outcome(gc.collect(parsed())) == {"1": "mark_unneeded"}
    now = Moment(now.epoch + GRACE, BOOT, now.uptime + GRACE)
    assert outcome(gc.collect(parsed())) == {"1": "remove"}


def test_a_stopped_disk_is_marked_anew_at_once(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its VM is defined: a later mark keeps it longer."""
    monkeypatch.setattr(clock, "now", lambda: Moment(NOW, BOOT, 700.0))
    volume, host.defined = host.add(VOLUME, tags("STOPPED_978307200", f"BOOT_{BOOT}_100"), SIZE), {VM}
    assert outcome(gc.collect(parsed())) == {"1": "mark_stopped"}
    assert volume.lv_tags == tags(f"STOPPED_{NOW - 600}", f"BOOT_{BOOT}_100")


def test_the_clocks_of_this_machine() -> None:
    found = clock.now()
    assert abs(found.epoch - time.time()) < 5
    assert found.uptime > 0
    assert len(found.boot_id) == 36


# -- deciding: others' volumes, an older hook's disks


@pytest.mark.parametrize("more", ["UPDATING", "DELETING", LONG_MARKED, LONG_STOPPED])
@pytest.mark.parametrize("erase", ["none", "zero"])
def test_what_others_depend_on_is_kept_and_said(host: FakeHost, more: str, erase: str) -> None:
    """LVM would remove an administrator's snapshot with the disk."""
    volume = host.add(VOLUME, tags(more), SIZE)
    host.add("backup", (), SIZE, origin=VOLUME)
    before = host.report()
    found = gc.collect(parsed(f"retention: {{erase: {erase}}}"))
    assert (outcome(found), found.is_problem) == ({"1": "keep"}, True)
    assert found.findings[0].verdict.reason.endswith("but LVM would remove backup with it")
    assert host.report() == before
    del host.volumes["backup"]
    assert outcome(gc.collect(parsed())) == {"1": "remove"}
    assert host.removed == [volume]


def test_a_template_that_others_depend_on(host: FakeHost) -> None:
    add_template(host, "1", NOW - CACHE_KEEP_FOR)
    host.add("backup", (), SIZE, origin=next(name for name in host.volumes if name.startswith("1")))
    found = gc.collect(parsed("cache: {templates: on}"))
    assert (outcome(found), found.is_problem) == ({"1": "keep"}, True)


def test_a_snapshot_that_is_made_meanwhile(host: FakeHost) -> None:
    """Seen when gc looks again, under the disk's lock."""
    host.add(VOLUME, tags("DELETING"), SIZE)
    host.before_command(2, lambda: void(host.add("backup", (), SIZE, origin=VOLUME)))
    assert outcome(gc.collect(parsed())) == {"1": "keep"}
    assert not host.removed


def void(_value: object) -> None:
    """For what is called for its effect."""


@pytest.mark.parametrize("more", [(), (LONG_MARKED,), (LONG_STOPPED,)])
@pytest.mark.parametrize("may_start", BOTH)
def test_an_older_hooks_disk_is_kept_until_the_operator_decides(
    host: FakeHost, more: tuple[str, ...], may_start: bool
) -> None:
    """D3."""
    host.add(VOLUME, tags(*more, ours=False), SIZE)
    found = gc.collect(parsed(), may_start=may_start)
    assert (outcome(found), found.is_problem) == ({"1": "keep"}, False)
    assert "retention.older_disks" in gc.as_lines(found, dry_run=True)
    assert {*host.tools} <= {"virsh", "fullreport"}
    decided_by = gc.collect(parsed("retention: {older_disks: as_ours}"), may_start=may_start)
    assert outcome(decided_by) == {"1": "remove" if more or not may_start else "mark_unneeded"}


def test_what_is_left_of_an_older_hooks_disk_is_not_kept(host: FakeHost) -> None:
    """Unfinished, or given up by a stop before."""
    for name, state in ((VOLUME, "UPDATING"), (OTHER_VOLUME, "DELETING")):
        host.add(name, tags(state, ours=False), SIZE)
    assert outcome(gc.collect(parsed())) == {"1": "remove", "2": "remove"}


@pytest.mark.parametrize("text", ["", ERASE])
def test_a_discard_that_would_do_nothing_is_an_error_until_zeros_are_configured(
    host: FakeHost, text: str
) -> None:
    """D6."""
    volume = host.add(VOLUME, ASIDE, SIZE, lv_active="")
    host.cannot_discard = {f"/dev/{NAME}"}
    found = gc.collect(parsed(text))
    assert "cannot discard" in found.findings[0].failure
    assert not host.erased
    assert outcome(gc.collect(parsed("retention: {erase: zero}"))) == {"1": "remove"}
    assert host.commands[-3] == f"blkdiscard --zeroout --offset 0 --length {SIZE} /dev/{NAME}"
    assert host.removed == [volume]


@pytest.mark.parametrize("how", ["nopassdown", "ignore", ""])
def test_a_pool_that_passes_no_discards_down(host: FakeHost, how: str) -> None:
    host.add(VOLUME, ASIDE, SIZE, pool_lv="pool0", lv_layout="thin,sparse")
    host.volumes["pool0"].kernel_discards = how
    assert "pool0 passes no discards" in gc.collect(parsed()).findings[0].failure
    assert not host.erased


# -- collecting


def outcome(collection: Collection) -> dict[str, str]:
    """The first digit of each disk -> what came of it."""
    return {
        finding.disk.volume_id[0]: "failed" if finding.failure else finding.verdict.action.value
        for finding in collection.findings
    }


def name(digit: str) -> str:
    return VOLUME.replace("1", digit)


def new_name(volume: Volume) -> str:
    """The name that a disk that is set aside gets, or has."""
    (found,) = (tag[6:] for tag in volume.lv_tags if tag.startswith("ASIDE_"))
    return found


POPULATION = {
    "1": tags(),
    "2": tags("UPDATING"),
    "3": tags("DELETING"),
    "4": tags(LONG_STOPPED),
    "5": tags(f"STOPPED_{NOW - 5}"),
    "6": tags(LONG_STOPPED, vm=OTHER_VM),
    "7": tags(LONG_MARKED),
    "8": tags(LONG_MARKED, vm=OTHER_VM),
    "9": aside("discard", name("9")),
    "a": aside("discard", name("b")),
}
DIGITS = "".join(POPULATION)
OUTCOME = {
    "1": "mark_unneeded",
    "2": "remove",
    "3": "remove",
    "4": "remove",
    "5": "keep",
    "6": "keep",
    "7": "remove",
    "8": "clear_mark",
    "9": "remove",
    "a": "remove",
}


def populate(host: FakeHost, digits: str = DIGITS) -> None:
    for digit in digits:
        host.add(name(digit), POPULATION[digit], SIZE)
    host.add("data", {"localdisk"}, SIZE)
    host.active = {OTHER_VM}


def test_collect(host: FakeHost) -> None:
    populate(host)
    collection = gc.collect(parsed())
    assert outcome(collection) == OUTCOME
    assert not collection.is_problem
    assert {name[0]: volume.lv_tags for name, volume in host.volumes.items()} == {
        "1": tags(f"UNNEEDED_{NOW}"),
        "5": POPULATION["5"],
        "6": POPULATION["6"],
        "8": tags(vm=OTHER_VM),
        "d": {"localdisk"},
        "p": set(),
    }
    assert lock.names() == []


def test_what_changes_is_looked_at_again_and_changed_together(host: FakeHost) -> None:
    for digit in "12357e":
        host.add(name(digit), POPULATION[digit if digit != "e" else "1"], SIZE)
    gc.collect(parsed())
    assert host.commands == [
        *(LOOK, LIST) * 2,
        f"lvremove --quiet --yes {' '.join(f'ovirt-local/{name(digit)}' for digit in '237')}",
        f"lvchange --quiet --addtag UNNEEDED_{NOW} {NAME} ovirt-local/{name('e')}",
    ]


def test_the_second_sighting_removes(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    host.add(VOLUME, tags(), SIZE)
    seen: list[str] = []
    for seconds in (0, GRACE - 1, GRACE):
        monkeypatch.setattr(time, "time", lambda now=NOW + seconds: float(now))
        seen += outcome(gc.collect(parsed())).values()
    assert seen == ["mark_unneeded", "keep", "remove"]
    assert VOLUME not in host.volumes


def test_a_missed_stop_of_a_kept_disk(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = host.add(VOLUME, tags("UNNEEDED_5"), SIZE)
    assert outcome(gc.collect(parsed(KEEP))) == {"1": "mark_stopped"}
    assert volume.lv_tags == tags(f"STOPPED_{NOW}")
    monkeypatch.setattr(time, "time", lambda: float(NOW + KEEP_FOR))
    assert outcome(gc.collect(parsed(KEEP))) == {"1": "remove"}


def test_a_kept_disk_that_is_unmarked_stays_stopped(host: FakeHost) -> None:
    volume = host.add(VOLUME, tags(LONG_STOPPED, LONG_MARKED), SIZE)
    host.active = {VM}
    assert outcome(gc.collect(parsed(KEEP))) == {"1": "clear_mark"}
    assert volume.lv_tags == tags(LONG_STOPPED)


# -- VMs that libvirt knows and that do not run


def ran_from(host: FakeHost, path: str) -> None:
    """The VM is shut off, and its disk in libvirt's definition is at this path."""
    host.shut_off = {VM}
    host.xmls[VM] = f"""\
<domain>
  <uuid>{VM}</uuid>
  <devices>
    <disk type="block" device="disk"><source dev="{path}"/><target dev="vda"/><serial>{IMAGE}</serial></disk>
  </devices>
</domain>"""


LAYER = f"/rhev/data-center/mnt/blockSD/{OTHER_VM}/images/{IMAGE}/{OTHER_VOLUME}"


@pytest.mark.parametrize("point", [False, True], ids=["gc", "before_vdsm_start"])
@pytest.mark.parametrize("text", ["retention: {grace: 0s}", KEEP])
def test_a_vm_that_drifted_and_stopped_unseen(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, text: str, point: bool
) -> None:
    """The host crashed, say: no stop has marked the disk, on which the VM's live data stand."""
    monkeypatch.setattr(config, "load", lambda _path=None: parsed(text))
    monkeypatch.setattr("localdisk.cli._require_root", lambda _what: None)
    volume = host.add(VOLUME, tags(f"UNNEEDED_{NOW - GRACE}"), SIZE, lv_active="")
    ran_from(host, LAYER)
    for _ in range(3):
        if point:
            cli.before_vdsm_start()
        else:
            assert cli.main(["gc"]) == 0
        assert volume.lv_tags == tags(f"DRIFTED_{NOW}")
    assert host.removed == []


@pytest.mark.parametrize("text", ["", KEEP])
def test_a_vm_that_drifts_and_stops_unseen_after_the_look(host: FakeHost, text: str) -> None:
    """At the first look its device was open; what it ran from must be asked at the second."""
    volume = host.add(VOLUME, tags(LONG_MARKED), SIZE, lv_device_open="open", lv_active="active")

    def stop() -> None:
        volume.lv_device_open = ""
        host.active.clear()
        ran_from(host, LAYER)

    host.active = {VM}
    host.before_command(1, stop)
    (found,) = gc.collect(parsed(text), ran_elsewhere=libvirt_vms.ran_elsewhere).findings
    assert found.verdict.action is Action.MARK_DRIFTED
    assert volume.lv_tags == tags(f"DRIFTED_{NOW}")


FULL = "  VG ovirt-local 27 metadata on /dev/a (523730 bytes) exceeds maximum metadata size (521472 bytes)\n"


def test_a_full_metadata_area_does_not_hide_that_a_vm_drifted(host: FakeHost) -> None:
    """Its text must not grow: the mark takes the place of the fingerprint, which nobody needs any more."""
    volume = host.add(VOLUME, tags(), SIZE, lv_active="")
    ran_from(host, LAYER)
    host.fail("lvchange", FULL, times=2)
    assert outcome(collect_with_definitions()) == {"1": "mark_drifted"}
    assert volume.lv_tags == {tag for tag in tags(f"DRIFTED_{NOW}") if not tag.startswith("SOURCE_")}


def test_a_mark_for_which_the_metadata_area_is_too_full(host: FakeHost) -> None:
    volume = host.add(VOLUME, tags(), SIZE, lv_active="")
    host.fail("lvchange", FULL, times=6)
    for _ in range(2):
        (found,) = gc.collect(parsed("retention: {grace: 0s}")).findings
        assert "metadata area of volume group ovirt-local is full" in found.failure
    assert volume.lv_tags == tags()


def collect_with_definitions(text: str = "") -> Collection:
    return gc.collect(parsed(text), may_start=False, ran_elsewhere=libvirt_vms.ran_elsewhere)


def test_a_vm_that_stopped_on_its_local_disk_has_not_drifted(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE, lv_active="")
    ran_from(host, f"/dev/ovirt-local/{VOLUME}")
    assert outcome(collect_with_definitions()) == {"1": "remove"}


@pytest.mark.parametrize("more", [{"STALE"}, {LONG_STOPPED}, {"DELETING"}])
def test_what_is_left_of_an_earlier_run_has_not_drifted(host: FakeHost, more: set[str]) -> None:
    """The VM ran from shared storage since."""
    host.add(VOLUME, tags(*more), SIZE, lv_active="")
    ran_from(host, LAYER)
    assert outcome(collect_with_definitions()) == {"1": "remove"}


def test_a_definition_that_is_not_understood_keeps_the_disk(host: FakeHost) -> None:
    volume = host.add(VOLUME, tags(), SIZE, lv_active="")
    ran_from(host, LAYER)
    host.xmls[VM] = "<domain\n</domain>"
    found = collect_with_definitions()
    assert outcome(found) == {"1": "keep"}
    assert found.is_problem
    assert volume.lv_tags == tags()


def test_the_record_of_a_disk_that_is_not_ready_is_removed(host: FakeHost) -> None:
    """An administrator has removed one volume, and changed the tags of another."""
    host.add(VOLUME, tags(), SIZE, lv_device_open="open")
    host.add(OTHER_VOLUME, tags("DELETING"), SIZE, lv_device_open="open")
    host.active = {VM}
    absent = OTHER_VOLUME.replace("2", "3")
    for name in (VOLUME, OTHER_VOLUME, absent):
        ready.note(VM, IMAGE, f"/dev/ovirt-local/{name}", "LVM-x")
    gc.collect(parsed(""), dry_run=True)
    assert len(os.listdir(os.path.join(lock.RUN, "ready"))) == 3
    gc.collect(parsed(""))
    assert os.listdir(os.path.join(lock.RUN, "ready")) == [VOLUME]


def test_definitions_are_read_only_where_they_matter(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE, lv_active="open", lv_device_open="open")
    host.add(OTHER_VOLUME, tags("UPDATING"), SIZE, lv_active="")
    ran_from(host, LAYER)
    collect_with_definitions()
    assert not any("dumpxml" in command for command in host.commands)


def collected(host: FakeHost, monkeypatch: pytest.MonkeyPatch, text: str, *seconds: int) -> list[str]:
    """What came of the only disk at these times after NOW."""
    seen: list[str] = []
    for second in seconds:
        monkeypatch.setattr(time, "time", lambda now=NOW + second: float(now))
        seen += outcome(gc.collect(parsed(text))).values()
    return seen


@pytest.mark.parametrize("kind", ["defined", "shut_off"])
def test_an_unfinished_disk_is_needed_by_no_vm_that_does_not_run(host: FakeHost, kind: str) -> None:
    """vdsm was killed while it started the VM, and nobody removes its placeholder."""
    setattr(host, kind, {VM})
    host.add(VOLUME, tags("UPDATING"), SIZE)
    assert outcome(gc.collect(parsed())) == {"1": "remove"}


@pytest.mark.parametrize("kind", ["defined", "shut_off"])
def test_a_complete_disk_of_a_vm_that_does_not_run_is_as_one_that_stopped(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    setattr(host, kind, {VM})
    volume = host.add(VOLUME, tags(), SIZE)
    assert collected(host, monkeypatch, "", 0, GRACE - 1, GRACE) == ["mark_unneeded", "keep", "remove"]
    assert host.removed == [volume]


def test_a_kept_disk_of_a_vm_that_does_not_run_is_marked_as_stopped_after_grace(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.defined = {VM}
    volume = host.add(VOLUME, tags(), SIZE)
    assert collected(host, monkeypatch, KEEP, 0, GRACE - 1, GRACE) == [
        "mark_unneeded",
        "keep",
        "mark_stopped",
    ]
    assert volume.lv_tags == tags(f"STOPPED_{NOW + GRACE}")


def test_a_kept_disk_past_its_time_whose_vm_may_be_starting(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.defined = {VM}
    host.add(VOLUME, tags(LONG_STOPPED), SIZE)
    assert collected(host, monkeypatch, KEEP, 0, GRACE - 1, GRACE) == ["mark_unneeded", "keep", "remove"]


@pytest.mark.parametrize("text", ["", KEEP])
def test_a_disk_waits_for_the_other_disk_of_its_vm(host: FakeHost, text: str) -> None:
    """It is complete since long, and the VM's next disk is still copied."""
    host.defined = {VM}
    volume = host.add(VOLUME, tags(LONG_MARKED), SIZE)
    with lock.holding(lock.disk_lock(OTHER_VOLUME), lambda _: None) as held:
        held.write(Progress(VM, OTHER_IMAGE, "copying", NOW, NOW).as_text())
        assert outcome(gc.collect(parsed(text))) == {"1": "clear_mark"}
    assert volume.lv_tags == tags()


@pytest.mark.parametrize("kind", ["defined", "shut_off"])
@pytest.mark.parametrize(("text", "what"), [("", "remove"), (KEEP, "mark_stopped")])
def test_before_vdsm_starts_no_vm_is_being_started(host: FakeHost, kind: str, text: str, what: str) -> None:
    setattr(host, kind, {VM})
    host.add(VOLUME, tags(), SIZE)
    assert outcome(gc.collect(parsed(text), may_start=False)) == {"1": what}


def test_before_vdsm_starts_one_sighting_is_enough(host: FakeHost) -> None:
    populate(host)
    collection = gc.collect(parsed(), may_start=False)
    assert outcome(collection) == {**OUTCOME, "1": "remove", "9": "keep", "a": "keep"}
    assert not collection.is_problem


def test_dry_run_changes_nothing(host: FakeHost) -> None:
    populate(host)
    held = lock.try_hold(lock.disk_lock("left"))
    assert held
    before = host.report()
    assert outcome(gc.collect(parsed(), dry_run=True)) == OUTCOME
    assert host.report() == before
    assert host.commands == [LOOK, LIST]


@pytest.mark.parametrize("dry_run", BOTH)
def test_libvirt_need_not_answer_if_nothing_depends_on_it(host: FakeHost, dry_run: bool) -> None:
    """One disk is open, one is kept for its time, one is drifted, and a template LV was used today."""
    host.add(name("1"), tags(), SIZE, lv_device_open="open", lv_active="active")
    host.add(name("2"), tags(f"STOPPED_{NOW}"), SIZE)
    host.add(name("3"), tags(f"DRIFTED_{NOW}"), SIZE)
    add_template(host, "4", NOW)
    host.libvirt_is_silent = True
    found = gc.collect(parsed("cache: {templates: on}"), dry_run)
    assert not found.is_problem
    assert {finding.verdict.action for finding in found.findings} == {Action.KEEP}
    assert host.commands == [LOOK]


def test_an_empty_group(host: FakeHost) -> None:
    assert gc.collect(parsed()) == Collection(())
    assert host.commands == [LOOK]


@pytest.mark.parametrize("is_dry", [False, True])
def test_a_disk_that_is_being_prepared(host: FakeHost, is_dry: bool) -> None:
    host.add(VOLUME, tags("UPDATING"), SIZE)
    with lock.holding(lock.disk_lock(VOLUME), lambda _: None):
        (finding,) = gc.collect(parsed(), is_dry).findings
    assert finding.verdict == Verdict(Action.KEEP, "a process works on it")
    assert VOLUME in host.volumes


def test_a_disk_that_is_claimed_after_the_look(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    host.add(VOLUME, tags("UPDATING"), SIZE)
    monkeypatch.setattr(lock, "is_held", lambda _path: False)
    with lock.holding(lock.disk_lock(VOLUME), lambda _: None):
        (finding,) = gc.collect(parsed()).findings
    assert finding.verdict == Verdict(Action.KEEP, "a process works on it")
    assert host.commands == [LOOK, LIST]


@pytest.mark.parametrize(
    ("change", "action", "reason"),
    [
        ({"lv_tags": tags()}, Action.MARK_UNNEEDED, "no VM needs it; removed if that is so after 10 min"),
        ({"lv_device_open": "open"}, Action.KEEP, "in use, its device is open"),
        ({"lv_tags": tags(f"STOPPED_{NOW}")}, Action.KEEP, "kept for another 7 d"),
        ({"lv_tags": tags(LONG_MARKED, vm=OTHER_VM)}, Action.CLEAR_MARK, "its VM runs"),
    ],
)
def test_a_disk_that_changes_after_the_look_is_judged_again(
    host: FakeHost, change: dict[str, object], action: Action, reason: str
) -> None:
    volume = host.add(VOLUME, tags("UPDATING"), SIZE)
    host.active = {OTHER_VM}
    host.before_command(2, lambda: vars(volume).update(change))
    (finding,) = gc.collect(parsed()).findings
    assert (finding.verdict.action, finding.verdict.reason) == (action, reason)
    assert VOLUME in host.volumes


@pytest.mark.parametrize("text", ["", KEEP])
def test_a_vm_that_runs_only_after_the_look(host: FakeHost, text: str) -> None:
    """Its start has taken the disk and let go of the lock, all since gc has asked libvirt."""
    volume = host.add(VOLUME, tags(), SIZE)
    host.before_command(2, lambda: host.active.add(VM))
    (finding,) = gc.collect(parsed(text)).findings
    assert (finding.verdict.action, finding.verdict.reason) == (Action.KEEP, "its VM runs")
    assert volume.lv_tags == tags()


def test_a_libvirt_that_is_silent_after_the_look(host: FakeHost) -> None:
    host.add(VOLUME, tags("UPDATING"), SIZE)
    host.before_command(2, lambda: vars(host).update(libvirt_is_silent=True))
    (finding,) = gc.collect(parsed()).findings
    assert finding.verdict == Verdict(Action.KEEP, "libvirt cannot be asked about its VM", is_certain=False)
    assert VOLUME in host.volumes


def test_a_disk_that_is_gone_after_the_look(host: FakeHost) -> None:
    host.add(VOLUME, tags("UPDATING"), SIZE)
    host.before_command(2, lambda: host.volumes.clear())
    assert not gc.collect(parsed()).is_problem
    assert host.commands == [LOOK, LIST, LOOK]


def test_a_volume_that_is_not_ours_any_more_after_the_look(host: FakeHost) -> None:
    volume = host.add(VOLUME, tags("UPDATING"), SIZE)
    host.before_command(2, volume.lv_tags.clear)
    gc.collect(parsed())
    assert VOLUME in host.volumes


def test_a_failure_does_not_stop_the_others(host: FakeHost) -> None:
    for volume in (VOLUME, OTHER_VOLUME):
        host.add(volume, tags("DELETING"), SIZE)
    host.fail("lvremove", "  Cannot change VG\n", when=VOLUME, times=2)
    first, second = gc.collect(parsed()).findings
    assert "Cannot change VG" in first.failure
    assert (first.is_problem, second.is_problem) == (True, False)
    assert set(host.volumes) == {VOLUME, "pool0"}
    assert lock.names() == []


@pytest.mark.parametrize(
    "lv_tags",
    [tags("UPDATING"), tags(), ASIDE, NOT_RENAMED],
    ids=["remove", "mark", "aside", "not renamed"],
)
@pytest.mark.parametrize("vg", [{"vg_partial": "partial"}, {"vg_exported": "exported"}], ids=str)
def test_nothing_is_changed_in_an_unusable_group(
    host: FakeHost, vg: dict[str, str], lv_tags: set[str]
) -> None:
    before = host.add(VOLUME, lv_tags, SIZE).row
    host.vg.update(vg)
    (finding,) = gc.collect(parsed()).findings
    assert finding.failure.startswith("volume group ovirt-local is ")
    assert host.volumes[VOLUME].row == before


def test_without_libvirt_only_what_is_no_vms_goes(host: FakeHost) -> None:
    host.libvirt_is_silent = True
    populate(host)
    volume = host.add(name("c"), tags(), SIZE, lv_device_open="open")
    collection = gc.collect(parsed())
    kept = dict.fromkeys("12345678c", "keep")
    assert outcome(collection) == {**kept, "9": "remove", "a": "remove"}
    certain = {finding.disk.volume_id[0] for finding in collection.findings if not finding.is_problem}
    assert certain == {"9", "a", "c"}
    assert volume.lv_tags == tags()
    assert all(host.volumes[name(digit)].lv_tags == POPULATION[digit] for digit in "12345678")


@pytest.mark.parametrize("number", range(5))
def test_gc_ends_when_it_is_told_to(host: FakeHost, number: int) -> None:
    """A hook gets one signal, which raises an error at any place."""
    for volume in (VOLUME, OTHER_VOLUME):
        host.add(volume, tags("DELETING"), SIZE)

    def interrupt() -> None:
        raise Interrupted(signal="SIGTERM")

    host.before_command(number, interrupt)
    with pytest.raises(Interrupted):
        gc.collect(parsed(TWO_GROUPS))
    assert len(host.commands) == number + 1
    assert lock.names() == []


def test_locks_that_nobody_holds_are_swept(host: FakeHost) -> None:
    Path(lock.RUN).mkdir()
    Path(lock.disk_lock("left")).touch()
    with lock.holding(lock.disk_lock("held"), lambda _: None):
        gc.collect(parsed(), dry_run=True)
        assert len(list(Path(lock.RUN).iterdir())) == 2
        gc.collect(parsed())
        assert lock.names() == ["held.lock"]


# -- a VM's own policy


@pytest.mark.parametrize(
    ("override", "lv_tags", "with_it", "without"),
    [
        ("on_stop: keep", tags(), "mark_stopped", "mark_unneeded"),
        ("keep_for: 1h", tags(f"STOPPED_{NOW - 3600}"), "remove", "keep"),
        ("keep_for: 8d", tags(LONG_STOPPED), "keep", "remove"),
        ("grace: 1s", tags(f"UNNEEDED_{NOW - 1}"), "remove", "keep"),
        ("grace: 11m", tags(LONG_MARKED), "keep", "remove"),
    ],
)
def test_a_vms_own_retention(
    host: FakeHost, override: str, lv_tags: set[str], with_it: str, without: str
) -> None:
    text = f"vms: {{{VM}: {{retention: {{{override}}}}}}}"
    host.add(VOLUME, lv_tags, SIZE)
    host.add(OTHER_VOLUME, (lv_tags - {f"VM_{VM}"}) | {f"VM_{OTHER_VM}"}, SIZE)
    assert outcome(gc.collect(parsed(text), dry_run=True)) == {"1": with_it, "2": without}
    assert outcome(gc.collect(parsed(text))) == {"1": with_it, "2": without}


@pytest.mark.parametrize("erase", ["none", "discard", "zero"])
def test_a_vms_own_erase(host: FakeHost, erase: str) -> None:
    theirs = {"none": "discard"}.get(erase, "none")
    text = f"{{retention: {{erase: {theirs}}}, vms: {{{VM}: {{retention: {{erase: {erase}}}}}}}}}"
    ours = host.add(VOLUME, tags("DELETING"), SIZE)
    other = host.add(OTHER_VOLUME, tags("DELETING", vm=OTHER_VM), SIZE)
    gc.collect(parsed(text))
    assert {*map(id, host.removed)} == {id(ours), id(other)}
    assert host.erased == {other.lv_uuid if erase == "none" else ours.lv_uuid}
    assert all("--zeroout" in command for command in host.commands if "blkdiscard" in command) == (
        erase == "zero"
    )


# -- erasing


LOOKS = ("fullreport", "virsh") * 2  # then again, under the locks
LOOKS_ALONE = ("fullreport",) * 2  # no VM can need what is set aside
FINISH = ("fullreport", "lvchange", "blkdiscard", "lvremove", "fullreport")  # then what others left


@pytest.mark.parametrize("erase", ["discard", "zero"])
def test_a_disk_gives_its_name_back_before_it_is_erased(host: FakeHost, erase: str) -> None:
    volume = host.add(VOLUME, tags("DELETING", "UNNEEDED_5"), SIZE, lv_active="")
    seen: list[set[str]] = []
    host.before["blkdiscard"] = lambda _argv: seen.append(set(volume.lv_tags))
    assert outcome(gc.collect(parsed(f"retention: {{erase: {erase}}}"))) == {"1": "remove"}
    assert seen == [aside(erase, volume.lv_name)]
    assert volume.lv_name != VOLUME
    assert host.tools == [*LOOKS, "lvchange", "lvrename", *FINISH]
    assert host.removed == [volume]


def test_one_that_has_its_new_name_is_only_erased(host: FakeHost) -> None:
    volume = host.add(VOLUME, ASIDE, SIZE)
    assert outcome(gc.collect(parsed())) == {"1": "remove"}
    assert host.tools == [*LOOKS_ALONE, *FINISH]
    assert (host.removed, host.erased) == ([volume], {volume.lv_uuid})


@pytest.mark.parametrize("text", ["", KEEP, ERASE, "retention: {erase: zero}"])
def test_one_that_was_not_renamed_is_renamed_first(host: FakeHost, text: str) -> None:
    volume = host.add(VOLUME, NOT_RENAMED, SIZE)
    assert outcome(gc.collect(parsed(text))) == {"1": "remove"}
    assert host.tools == [*LOOKS_ALONE, "lvrename", *FINISH]
    assert host.commands[2] == f"lvrename --quiet ovirt-local {VOLUME} {OTHER_VOLUME}"
    assert host.commands[-3] == f"blkdiscard --offset 0 --length {SIZE} /dev/ovirt-local/{OTHER_VOLUME}"
    assert (host.removed, host.erased) == ([volume], {volume.lv_uuid})


@pytest.mark.parametrize("names", [(), (VOLUME, OTHER_VOLUME), ("x",)], ids=str)
def test_one_that_lost_its_new_name_gets_another(host: FakeHost, names: tuple[str, ...]) -> None:
    volume = host.add(VOLUME, ASIDE - {f"ASIDE_{VOLUME}"} | {f"ASIDE_{name}" for name in names}, SIZE)
    assert outcome(gc.collect(parsed())) == {"1": "remove"}
    assert host.tools == [*LOOKS_ALONE, "lvchange", "lvrename", *FINISH]
    assert volume.lv_name not in (VOLUME, OTHER_VOLUME)
    assert (host.removed, host.erased) == ([volume], {volume.lv_uuid})


@pytest.mark.parametrize(
    "lv_tags",
    [tags("DELETING"), tags("UPDATING"), NOT_RENAMED, ASIDE - {f"ASIDE_{VOLUME}"}],
    ids=["deleting", "unfinished", "not renamed", "without a name"],
)
@pytest.mark.parametrize("tool", ["blkdiscard", "lvremove"])
def test_a_start_does_not_wait_for_an_erase(host: FakeHost, lv_tags: set[str], tool: str) -> None:
    """The old name is free, and its lock too, as long as it takes."""
    old = host.add(VOLUME, lv_tags, SIZE)
    seen: list[object] = []

    def act(argv: list[str]) -> None:
        host.before.clear()
        seen.extend([argv[-1].rpartition("/")[2], lock.names(), start(host, parsed(ERASE), VOLUME)])

    host.before[tool] = act
    assert outcome(gc.collect(parsed(ERASE))) == {"1": "remove"}
    assert seen == [old.lv_name, sorted([f"{old.lv_name}.lock", "erase.lock", "gc.lock"]), True]
    assert host.volumes[VOLUME].lv_tags == tags()
    assert (host.removed, host.erased) == ([old], {old.lv_uuid})
    assert lock.names() == []


def test_an_erase_that_fails_is_finished_by_the_next_gc(host: FakeHost) -> None:
    volume = host.add(VOLUME, tags("DELETING"), SIZE)
    host.fail("blkdiscard", "blkdiscard: BLKDISCARD ioctl failed\n", times=2)
    for policy_then in (ERASE, ""):
        (finding,) = gc.collect(parsed(policy_then)).findings
        assert "ioctl failed" in finding.failure
        assert volume.lv_tags == aside("discard", volume.lv_name)
        assert lock.names() == []
    (finding,) = gc.collect(parsed("retention: {erase: zero}")).findings
    assert not finding.failure
    assert "--zeroout" not in host.commands[-3]  # as it was to be when it was set aside
    assert host.tools.count("lvrename") == 1
    assert host.removed == [volume]


@pytest.mark.parametrize("lv_tags", [tags("DELETING"), NOT_RENAMED], ids=["deleting", "not renamed"])
@pytest.mark.parametrize("next_is", ["gc", "start"])
def test_a_rename_that_fails_is_done_by_whoever_comes_next(
    host: FakeHost, lv_tags: set[str], next_is: str
) -> None:
    volume = host.add(VOLUME, lv_tags, SIZE)
    host.fail("lvrename", "  Failed to write VG ovirt-local.\n", times=2)
    for text in (ERASE, ""):
        (finding,) = gc.collect(parsed(text)).findings
        assert "Failed to write VG" in finding.failure
        assert host.volumes[VOLUME] is volume
        assert volume.lv_tags == aside("discard", new_name(volume))
        assert lock.names() == []
    assert outcome(gc.collect(parsed(), may_start=False)) == {"1": "keep"}
    if next_is == "start":
        assert start(host, parsed(), VOLUME)
        assert host.volumes[VOLUME].lv_tags == tags()
        host.active = {VM}
    assert not gc.collect(parsed()).is_problem
    assert len({command for command in host.commands if "lvrename" in command}) == 1
    assert volume.lv_name == new_name(volume)
    assert (host.removed, host.erased) == ([volume], {volume.lv_uuid})


@pytest.mark.parametrize("erase", ["discard", "zero"])
def test_vdsm_does_not_wait_for_an_erase(host: FakeHost, erase: str) -> None:
    populate(host)
    volumes = {digit: host.volumes[name(digit)] for digit in DIGITS}
    text = f"retention: {{erase: {erase}}}"
    for _ in range(2):  # the next gc can be the next boot's
        assert not gc.collect(parsed(text), may_start=False).is_problem
        assert set(host.tools) == {"virsh", "fullreport", "lvchange", "lvrename"}
        assert all(volumes[digit].lv_tags == aside(erase, volumes[digit].lv_name) for digit in "12347")
        assert all(volumes[digit].lv_name != name(digit) for digit in "12347")
        assert all(host.volumes[name(digit)].lv_tags == POPULATION[digit] for digit in "569a")
    assert host.tools.count("lvrename") == len("12347")
    assert lock.names() == []
    assert not gc.collect(parsed()).is_problem
    gone = sorted(volumes[digit].lv_uuid for digit in "123479a")
    assert sorted(volume.lv_uuid for volume in host.removed) == sorted(host.erased) == gone


def test_before_vdsm_starts_a_start_takes_what_was_set_aside(host: FakeHost) -> None:
    old = host.add(VOLUME, tags("DELETING"), SIZE)
    gc.collect(parsed(ERASE), may_start=False)
    assert start(host, parsed(ERASE), VOLUME)
    host.active = {VM}
    assert not gc.collect(parsed()).is_problem
    assert left_on(host) == {"1": tags(), "p": set()}
    assert (host.removed, host.erased) == ([old], {old.lv_uuid})


def test_an_erase_that_another_gc_has_begun_is_left_to_it(host: FakeHost) -> None:
    volume = host.add(VOLUME, tags("DELETING"), SIZE)
    others: list[object] = []
    host.before["lvrename"] = lambda argv: others.append(lock.try_hold(lock.disk_lock(argv[-1])))
    assert not gc.collect(parsed(ERASE)).is_problem
    (finding,) = gc.collect(parsed()).findings
    assert finding.verdict == Verdict(Action.KEEP, "a process works on it")
    assert volume.lv_tags == aside("discard", volume.lv_name)
    assert (host.removed, host.erased) == ([], set())


@pytest.mark.parametrize("is_named", BOTH)
def test_a_disk_without_a_word_on_how_to_erase_it(host: FakeHost, is_named: bool) -> None:
    """A disk with its new name is only removed; a disk without one is treated as configured now."""
    lost = {"ERASE_discard"} if is_named else {"ERASE_discard", f"ASIDE_{VOLUME}"}
    for text in ("retention: {erase: none}", "retention: {erase: zero}"):
        volume = host.add(VOLUME, ASIDE - lost, SIZE)
        gc.collect(parsed(text))
        assert host.removed.pop() is volume
        assert (volume.lv_uuid in host.erased) == ("zero" in text and not is_named)
        assert volume.lv_tags == (aside("zero", volume.lv_name) if host.erased else ASIDE - lost)


@pytest.mark.parametrize("lv_tags", [ASIDE, NOT_RENAMED], ids=["renamed", "not renamed"])
def test_an_aside_disk_that_is_open_is_left(host: FakeHost, lv_tags: set[str]) -> None:
    before = host.add(VOLUME, lv_tags, SIZE, lv_device_open="open").row
    assert outcome(gc.collect(parsed())) == {"1": "keep"}
    assert host.volumes[VOLUME].row == before


def test_tags_of_one_that_is_set_aside_do_not_make_it_so(host: FakeHost) -> None:
    volume = host.add(VOLUME, tags(f"ASIDE_{VOLUME}", "ERASE_zero"), SIZE)
    assert outcome(gc.collect(parsed())) == {"1": "mark_unneeded"}
    assert volume.lv_tags == tags(f"ASIDE_{VOLUME}", "ERASE_zero", f"UNNEEDED_{NOW}")


def test_one_that_is_gone_before_it_is_erased(host: FakeHost) -> None:
    host.add(VOLUME, tags("DELETING"), SIZE)
    host.before_command(6, host.volumes.clear)
    assert not gc.collect(parsed(ERASE)).is_problem
    assert host.tools == [*LOOKS, "lvchange", "lvrename", "fullreport", "fullreport"]


def test_what_is_no_longer_aside_is_not_erased(host: FakeHost) -> None:
    volume = host.add(VOLUME, tags("DELETING"), SIZE)
    host.before_command(6, lambda: vars(volume).update(lv_tags=tags()))
    gc.collect(parsed(ERASE))
    assert (host.removed, host.erased) == ([], set())


# -- many at once


def many(host: FakeHost, count: int, *more: str) -> list[Volume]:
    numbers = (f"{number:08x}" + VOLUME[8:] for number in range(count))
    return [host.add(number, tags(*more), SIZE) for number in numbers]


def test_many_disks_are_changed_with_few_commands(host: FakeHost) -> None:
    """Not one report, one question to libvirt and one command for each disk."""
    count = 2 * gc.BATCH + 1
    volumes = many(host, count, "DELETING")
    found = gc.collect(parsed())
    assert [finding.verdict.action for finding in found.findings] == [Action.REMOVE] * count
    assert not found.is_problem
    assert host.removed == volumes
    assert host.tools == ["fullreport", "virsh", *["fullreport", "virsh", "lvremove"] * 3]
    many(host, 30)
    host.commands.clear()
    assert {finding.verdict.action for finding in gc.collect(parsed()).findings} == {Action.MARK_UNNEEDED}
    assert host.tools == [*LOOKS, "lvchange"]


def test_one_that_is_opened_meanwhile_keeps_no_other(host: FakeHost) -> None:
    """LVM removes none of them then."""
    first, busy, last = many(host, 3, "DELETING")
    host.before["lvremove"] = lambda _argv: vars(busy).update(lv_device_open="open")
    found = gc.collect(parsed())
    assert [finding.failure.partition(" : ")[0] for finding in found.findings] == [
        "",
        f"local disk ovirt-local/{busy.lv_name} is deleting and still open"
        " by something that neither /proc nor /sys shows",
        "",
    ]
    assert host.removed == [first, last]
    assert host.tools.count("lvremove") == 2
    assert "is deleting and still open" in gc.as_lines(found, dry_run=False)
    assert lock.names() == []


def test_what_lvm_removed_before_it_failed_is_removed(host: FakeHost) -> None:
    """A pool's thin volumes go one by one."""
    volumes = many(host, 3, "DELETING")

    def fail(argv: list[str]) -> None:
        if len(argv) > 4:
            host.removed.append(host.volumes.pop(volumes[0].lv_name))
            raise CommandFailed(tuple(argv), 5, "  Failed to suspend pool0.\n")

    host.before["lvremove"] = fail
    assert not gc.collect(parsed()).is_problem
    assert host.removed == volumes


def test_a_removal_that_takes_too_long_is_a_failure_of_all(host: FakeHost) -> None:
    many(host, 3, "DELETING")

    def stall(_argv: list[str]) -> None:
        raise CommandTimeout(tool="lvremove", seconds=120)

    host.before["lvremove"] = stall
    found = gc.collect(parsed())
    assert ["did not end within 120 s" in finding.failure for finding in found.findings] == [True] * 3
    assert host.tools.count("lvremove") == 1


def test_one_mark_that_cannot_be_made_keeps_no_other(host: FakeHost) -> None:
    volumes = many(host, 3)
    host.fail("lvchange", "  Failed to write VG\n", when=volumes[1].lv_name, times=2)
    found = gc.collect(parsed())
    assert [bool(finding.failure) for finding in found.findings] == [False, True, False]
    assert [volume.lv_tags == tags(f"UNNEEDED_{NOW}") for volume in volumes] == [True, False, True]


def test_a_gc_leaves_the_erase_to_another_that_erases(host: FakeHost) -> None:
    """Runs of cron do not wait for a gc that erases for hours."""
    volume = host.add(VOLUME, tags("DELETING"), SIZE)
    with lock.holding(os.path.join(lock.RUN, gc.ERASING), lambda _: None):
        found = gc.collect(parsed(ERASE))
    assert (outcome(found), found.is_problem) == ({"1": "keep"}, False)
    assert "the gc that erases" in found.findings[0].verdict.reason
    assert volume.lv_tags == aside("discard", volume.lv_name)
    assert outcome(gc.collect(parsed(ERASE))) == {volume.lv_name[0]: "remove"}


def test_a_gc_erases_what_others_have_left_to_it(host: FakeHost) -> None:
    first, second = host.add(VOLUME, tags("DELETING"), SIZE), host.add(OTHER_VOLUME, tags(), SIZE)
    inner: list[Collection] = []

    def another(_argv: list[str]) -> None:
        host.before.clear()
        second.lv_tags.add("DELETING")
        inner.append(gc.collect(parsed(ERASE)))

    host.before["blkdiscard"] = another
    assert outcome(gc.collect(parsed(ERASE)))["1"] == "remove"
    assert "keep" in outcome(inner[0]).values()
    assert host.removed == [first, second]
    assert host.erased == {first.lv_uuid, second.lv_uuid}
    assert lock.names() == []


def test_one_process_erases_at_a_time(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """gc waits for a start that erases for its room."""
    host.add(VOLUME, tags("DELETING"), SIZE)
    held = lock.try_hold(os.path.join(lock.RUN, removal.ERASER))
    assert held
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        assert not host.erased
        if len(waited) == 3:
            held.release()

    monkeypatch.setattr(time, "sleep", wait)
    assert outcome(gc.collect(parsed(ERASE))) == {"1": "remove"}
    assert len(waited) == 3
    assert len(host.erased) == 1


# -- at the same time

TEXTS = ["", KEEP, ERASE]


def hosts(
    tmp_path: Path, text: str, digits: str = DIGITS, may_start: bool = True
) -> Iterator[tuple[int, FakeHost]]:
    """A fresh populated host for each command that gc sends there."""
    with fresh_host(tmp_path, digits) as first:
        gc.collect(parsed(text), may_start=may_start)
    for number in range(len(first.commands)):
        with fresh_host(tmp_path, digits) as host:
            yield number, host


@contextlib.contextmanager
def fresh_host(tmp_path: Path, digits: str = DIGITS) -> Iterator[FakeHost]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: float(NOW))
        host = FakeHost().install(patch, tmp_path)
        populate(host, digits)
        yield host


def left_on(host: FakeHost) -> dict[str, set[str]]:
    return {volume_id[0]: volume.lv_tags for volume_id, volume in host.volumes.items()}


@pytest.mark.parametrize("text", TEXTS)
def test_two_gcs_at_once(tmp_path: Path, text: str) -> None:
    """A second gc runs before any one command of the first: the same is left as by one, and no failure."""
    with fresh_host(tmp_path) as alone:
        gc.collect(parsed(text))
    for number, host in hosts(tmp_path, text):
        collections: list[Collection] = []

        def collect(found: list[Collection] = collections) -> None:
            found.append(gc.collect(parsed(text)))

        host.before_command(number, collect)
        collect()
        assert [collection.is_problem for collection in collections] == [False, False]
        assert left_on(host) == left_on(alone), number
        assert host.erased == alone.erased


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("may_start", BOTH)
def test_a_gc_that_is_killed_is_finished_by_the_next(tmp_path: Path, text: str, may_start: bool) -> None:
    for number, host in hosts(tmp_path, text, may_start=may_start):
        host.kill_before(number)
        with pytest.raises(Killed):
            gc.collect(parsed(text), may_start=may_start)
        host.before = {}
        assert may_start or not host.erased
        assert not gc.collect(parsed(text)).is_problem
        is_first_gone = not may_start and name("1") not in host.volumes
        left = {*"1568dp", *("7" if text == KEEP else "")} - set("1" if is_first_gone else "")
        assert left_on(host).keys() == left, number
        aside = {volume.lv_uuid for volume in host.removed if "ERASE_discard" in volume.lv_tags}
        assert len(aside) == (len(host.removed) if text == ERASE else len("9a"))
        assert host.erased == aside
        assert lock.names() == []


@pytest.mark.parametrize("may_start", BOTH)
def test_what_a_killed_gc_left_under_its_old_name_is_renamed_first(tmp_path: Path, may_start: bool) -> None:
    """A start while the next gc erases what it left: nothing of that is in its way."""
    left: list[set[str]] = []
    for number, host in hosts(tmp_path, ERASE, "3", may_start):
        host.kill_before(number)
        with pytest.raises(Killed):
            gc.collect(parsed(ERASE), may_start=may_start)
        old = host.volumes.get(name("3"))
        if old is None or old.lv_tags == POPULATION["3"]:
            continue
        left.append(old.lv_tags)
        taken: list[bool] = []

        def act(_argv: object, host: FakeHost = host, taken: list[bool] = taken) -> None:
            host.before = {}
            taken.append(start(host, parsed(ERASE), name("3")))

        host.before = {"blkdiscard": act}
        sent = len(host.commands)
        assert not gc.collect(parsed(ERASE)).is_problem
        assert taken == [True]
        changes = [tool for tool in host.tools[sent:] if tool not in ("virsh", "fullreport")]
        assert changes[:3] == ["lvrename", "lvchange", "blkdiscard"]
        assert old.lv_name == new_name(old)
        assert left_on(host) == {"3": tags(), "d": {"localdisk"}, "p": set()}
        assert (host.removed, host.erased) == ([old], {old.lv_uuid})
    assert len(left) == 1  # between tagging and renaming


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("digit", "123457a")
def test_a_start_while_gc_runs(tmp_path: Path, text: str, digit: str) -> None:
    """A VM starts before any one command of gc: what it got is as it left it when gc has ended."""
    for number, host in hosts(tmp_path, text, digit):
        taken: list[bool] = []
        renamed: list[bool] = []

        def act(host: FakeHost = host, taken: list[bool] = taken, renamed: list[bool] = renamed) -> None:
            host.defined.add(VM)
            renamed.append("lvrename" in host.tools[:-1])
            taken.append(start(host, parsed(text), name(digit)))

        host.before_command(number, act)
        assert not gc.collect(parsed(text)).is_problem
        if taken == [True]:
            marked = host.volumes[name(digit)].lv_tags - tags()
            assert marked <= {f"UNNEEDED_{NOW}"}, number  # qemu does not have it open yet
        assert taken >= renamed, number


def start(host: FakeHost, settings: Config, volume_id: str) -> bool:
    """Whether it could; False: gc has the lock, and it would wait."""

    def give_up(_seconds: float) -> None:
        raise Killed

    session = Session(settings, give_up)

    def ask(verb: str, **fields: object) -> dict[str, object]:
        answer = host.serve(session, json.dumps({"verb": verb, **fields}).encode())
        assert "error" not in answer, answer
        return answer

    try:
        ask("claim", vm=VM, property="lvm", image=IMAGE, volume=volume_id, seen=0)
        if ask("prepare", size=SIZE, fingerprint=FINGERPRINT, writes=0, base=None)["target"]:
            ask("commit")
    except Killed:
        return False
    finally:
        session.close()
    return True


# -- several volume groups

TWO_GROUPS = f"vms: {{{OTHER_VM}: {{volume_group: other}}}}"


def test_a_group_that_is_missing_does_not_keep_the_others_from_being_served(host: FakeHost) -> None:
    host.add(VOLUME, tags("DELETING"), SIZE)
    collection = gc.collect(parsed(TWO_GROUPS))
    (problem,) = collection.problems
    assert problem.startswith("no volume group other on this host : create it")
    assert collection.is_problem
    assert outcome(collection) == {"1": "remove"}
    assert VOLUME not in host.volumes
    assert f"{FULLREPORT} other" in host.commands


@pytest.mark.parametrize("text", ["volume_group: b", f"{{volume_group: b, {TWO_GROUPS}}}"])
@pytest.mark.usefixtures("host")
def test_without_any_group(text: str) -> None:
    with pytest.raises(NoVolumeGroup, match="no volume group b "):
        gc.collect(parsed(text))


# -- exit codes


@pytest.fixture(name="run_gc")
def fixture_run_gc(host: FakeHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], int]:
    monkeypatch.setattr(os, "geteuid", os.getuid)
    monkeypatch.setattr(cli, "_require_root", lambda _mode: None)
    path = tmp_path / "localdisk.yaml"

    def run_gc(text: str) -> int:
        path.write_text(text)
        path.chmod(0o600)
        return cli.main(["gc", "--config", str(path)])

    assert host
    return run_gc


@pytest.mark.parametrize(
    ("text", "is_silent", "code", "said"),
    [
        ("", False, 0, ""),
        (KEEP, False, 0, ""),
        ("", True, 1, "libvirt does not report "),
        (TWO_GROUPS, False, 1, "no volume group "),
        ("volume_group: b", False, 2, "no volume group "),
    ],
)
def test_exit_codes(
    host: FakeHost,
    run_gc: Callable[[str], int],
    capsys: pytest.CaptureFixture[str],
    text: str,
    is_silent: bool,
    code: int,
    said: str,
) -> None:
    populate(host)
    host.libvirt_is_silent = is_silent
    assert run_gc(text) == code
    out, err = capsys.readouterr()
    assert out.count("\n") == (0 if code == 2 else len(POPULATION))
    assert err.count("\n") == (1 if said else 0)
    assert err.startswith(f"localdisk: {said}" if said else "")


@pytest.mark.parametrize("tag", [f"STOPPED_{NOW + 60}", f"UNNEEDED_{NOW + 60}"])
def test_a_clock_that_went_backwards_is_told(host: FakeHost, run_gc: Callable[[str], int], tag: str) -> None:
    volume = host.add(VOLUME, tags(tag), SIZE)
    assert run_gc("") == 1
    assert volume.lv_tags == tags(tag)


def test_a_failure_is_told(host: FakeHost, run_gc: Callable[[str], int]) -> None:
    host.add(VOLUME, tags("DELETING"), SIZE)
    host.fail("lvremove", "  Cannot change VG\n")
    assert run_gc("") == 1
    assert run_gc("") == 0


# -- what the operator sees


def test_lines(host: FakeHost) -> None:
    host.add(VOLUME, tags("DELETING"), SIZE)
    host.add(OTHER_VOLUME, tags(f"STOPPED_{NOW}"), SIZE)
    host.add(name("3"), aside("zero", name("3")), SIZE)
    host.add(name("4"), tags(), SIZE)
    at_first, second, third, fourth = gc.as_lines(gc.collect(parsed(), dry_run=True), True).splitlines()
    assert at_first == f"{NAME}  VM {VM}  64 MiB  would be removed: marked for removal when its VM stopped"
    assert second == f"ovirt-local/{OTHER_VOLUME}  VM {VM}  64 MiB  kept: kept for another 7 d"
    assert third == f"ovirt-local/{name('3')}  VM -  64 MiB  would be removed: set aside to be erased"
    assert "  would be marked as unneeded: no VM needs it; " in fourth
    host.fail("lvremove", "  Cannot change VG\n")
    at_first = gc.as_lines(gc.collect(parsed()), dry_run=False).splitlines()[0]
    assert "  not removed, lvremove " in at_first
    assert "Cannot change VG" in at_first
    at_first = gc.as_lines(gc.collect(parsed()), dry_run=False).splitlines()[0]
    assert at_first.endswith("  removed: marked for removal when its VM stopped")


@pytest.mark.parametrize(
    ("lv_tags", "text", "outcome_"),
    [
        (tags(), "", "marked as unneeded: "),
        (tags(), KEEP, "marked as stopped: "),
        (tags("UNNEEDED_5", vm=OTHER_VM), "", "unmarked: its VM runs"),
    ],
)
def test_lines_of_marks(host: FakeHost, lv_tags: set[str], text: str, outcome_: str) -> None:
    host.add(VOLUME, lv_tags, SIZE)
    host.active = {OTHER_VM}
    assert f"  64 MiB  would be {outcome_}" in gc.as_lines(gc.collect(parsed(text), dry_run=True), True)
    assert f"  64 MiB  {outcome_}" in gc.as_lines(gc.collect(parsed(text)), False)


def document(collection: Collection) -> Any:
    """The JSON of a collection, which is as its schema says."""
    found = json.loads(gc.as_json(collection))
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    return found


def test_the_schema_has_every_action() -> None:
    fields = SCHEMA["$defs"]["disk"]["properties"]
    assert fields["action"]["enum"] == [action.value for action in Action]
    assert sorted(fields) == sorted(SCHEMA["$defs"]["disk"]["required"])


def test_json(host: FakeHost) -> None:
    host.add(VOLUME, tags("DELETING"), SIZE)
    collection = gc.collect(parsed(TWO_GROUPS))
    assert document(collection) == {
        "version": 1,
        "disks": [
            {
                "vg": "ovirt-local",
                "volume": VOLUME,
                "vm": VM,
                "image": IMAGE,
                "template": "",
                "size": SIZE,
                "action": "remove",
                "reason": "marked for removal when its VM stopped",
                "certain": True,
                "failure": "",
            }
        ],
        "problems": list(collection.problems),
    }
    assert document(Collection(())) == {"version": 1, "disks": [], "problems": []}
    assert gc.as_lines(Collection(()), dry_run=False) == ""


def test_what_cannot_be_done_is_one_failure(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE)

    def fail(argv: list[str]) -> None:
        raise CommandFailed(tuple(argv), 5, "  Failed to write VG\n")

    host.before["lvchange"] = fail
    (finding,) = gc.collect(parsed()).findings
    assert (finding.verdict.action, finding.is_problem) == (Action.MARK_UNNEEDED, True)
    assert "not marked as unneeded, lvchange --quiet failed" in gc.as_lines(gc.collect(parsed()), False)


# -- template LVs: deciding

CACHED = "{cache: {templates: on, max_size: 64MiB, keep_for: 30d}}"
CACHE_KEEP_FOR = 30 * 86400
TEMPLATE = "55555555-5555-4555-8555-555555555555"  # the volume of one
LV_OF_IT = "cccccccc-0000-4000-8000-000000000000"


def template_tags(used: int = NOW, *more: str, volume: str = TEMPLATE) -> set[str]:
    return {"localdisk", f"TEMPLATE_{volume}", f"SOURCE_{FINGERPRINT}", f"SAMPLE_{FINGERPRINT}"} | {
        f"USED_{used}",
        *more,
    }


class TemplateCase(NamedTuple):
    is_open: bool
    is_locked: bool
    is_ready: bool
    is_as_made: bool
    is_wanted: bool
    is_too_much: bool
    is_active: bool
    used: int  # seconds ago

    @property
    def verdict(self) -> Verdict:
        more = () if self.is_ready else ("UPDATING", "WRITES_5")
        lv = frozen.replace(
            LV,
            lv_name=LV_OF_IT,
            lv_tags=frozenset(template_tags(NOW - self.used, *more)),
            lv_device_open=self.is_open,
            lv_active=self.is_active,
            lv_permissions="read-only" if self.is_as_made else "writeable",
        )
        found = Template.from_lv(lv)
        assert found
        return decide_template(found, self.is_locked, self.is_wanted, self.is_too_much, CACHE_KEEP_FOR, NOW)


TEMPLATE_CASES = [
    TemplateCase(*values, used)
    for used in (-1, 0, CACHE_KEEP_FOR - 1, CACHE_KEEP_FOR, CACHE_KEEP_FOR + 1)
    for values in itertools.product(BOTH, BOTH, BOTH, BOTH, BOTH, BOTH, BOTH)
]


def expected_of_template(case: TemplateCase) -> tuple[Action, bool]:
    """The expected action, and whether the clock was right if that matters."""
    is_free = not case.is_open and not case.is_locked
    is_given_up = not (case.is_ready and case.is_as_made and case.is_wanted) or case.is_too_much
    if not is_free:
        return Action.KEEP, True
    if is_given_up:
        return Action.REMOVE, True
    if case.used < 0:
        return Action.KEEP, False
    if case.used >= CACHE_KEEP_FOR:
        return Action.REMOVE, True
    return Action.DEACTIVATE if case.is_active else Action.KEEP, True


def test_decide_template_does_what_the_design_says() -> None:
    assert len(TEMPLATE_CASES) == 640
    for case in TEMPLATE_CASES:
        verdict = case.verdict
        assert (verdict.action, verdict.is_certain) == expected_of_template(case), case
        assert verdict.reason, case
        has_due = expected_of_template(case)[1] and verdict.action is not Action.REMOVE
        is_free = not case.is_open and not case.is_locked
        assert verdict.due == (NOW - case.used + CACHE_KEEP_FOR if has_due and is_free else None), case


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (TemplateCase(True, True, False, False, False, True, True, 0), "in use, its device is open"),
        (TemplateCase(False, True, False, False, False, True, True, 0), "a process works on it"),
        (
            TemplateCase(False, False, False, False, True, False, True, 0),
            "unfinished copy that nobody works on",
        ),
        (
            TemplateCase(False, False, True, False, False, True, True, 0),
            "writable, or without its tags: no disk would start from it",
        ),
        (TemplateCase(False, False, True, True, False, True, True, 0), "cache.templates is off"),
        (
            TemplateCase(False, False, True, True, True, True, True, 0),
            "the cache is larger than cache.max_size, and this is its least recently used",
        ),
        (
            TemplateCase(False, False, True, True, True, False, True, -1),
            "its last use is in the future, the clock went backwards",
        ),
        (
            TemplateCase(False, False, True, True, True, False, True, 31 * 86400),
            "not used for 31 d, past cache.keep_for",
        ),
        (TemplateCase(False, False, True, True, True, False, True, 3600), "kept for another 29 d 23 h"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reasons_of_templates(case: TemplateCase, reason: str) -> None:
    assert case.verdict.reason == reason


@properties
@given(
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.frozensets(
        st.sampled_from(["UPDATING", "WRITES_5", "HOLDS_5", "x"]) | EPOCHS.map("USED_{}".format), max_size=4
    ),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2 * NOW),
    EPOCHS,
)
def test_decide_template_never_breaks_a_promise(
    is_told: bool,
    is_open: bool,
    is_locked: bool,
    more: frozenset[str],
    is_wanted: bool,
    is_too_much: bool,
    keep_for: int,
    now: int,
) -> None:
    own = {"localdisk", f"TEMPLATE_{TEMPLATE}", *more}
    lv = frozen.replace(
        LV,
        lv_name=LV_OF_IT,
        lv_tags=frozenset(own | ({f"SOURCE_{FINGERPRINT}", f"SAMPLE_{FINGERPRINT}"} if is_told else set())),
        lv_device_open=is_open,
        lv_permissions="read-only",
    )
    found = Template.from_lv(lv)
    assert found
    verdict = decide_template(found, is_locked, is_wanted, is_too_much, keep_for, now)
    if verdict.action is Action.REMOVE:
        assert not is_open
        assert not is_locked
        assert verdict.is_certain
        if found.is_ready and is_told and is_wanted and not is_too_much:  # by its age alone
            assert now - found.used >= keep_for
            assert found.used <= now


# -- template LVs: collecting


def add_template(host: FakeHost, digit: str, used: int = NOW - 60, *more: str, **fields: str) -> Volume:
    volume = TEMPLATE.replace("5", digit)
    values = {"lv_active": "", "lv_permissions": "read-only", **fields}
    return host.add(LV_OF_IT.replace("c", digit), template_tags(used, *more, volume=volume), SIZE, **values)


def of_templates(collection: Collection) -> dict[str, str]:
    """The first digit of each template -> what came of it."""
    return {
        finding.template[0]: "failed" if finding.failure else finding.verdict.action.value
        for finding in collection.findings
        if finding.template
    }


def test_collect_templates(host: FakeHost) -> None:
    """All that can be, but for size."""
    add_template(host, "1")
    add_template(host, "2", NOW, "UPDATING", "WRITES_5", lv_active="active", lv_permissions="writeable")
    add_template(host, "3", NOW - CACHE_KEEP_FOR)
    add_template(host, "4", lv_active="active")
    add_template(host, "6", lv_active="active", lv_device_open="open")
    add_template(host, "7", NOW - CACHE_KEEP_FOR)
    with lock.holding(lock.disk_lock(LV_OF_IT.replace("c", "7")), lambda _: None):
        collection = gc.collect(parsed("cache: {templates: on}"))
    assert of_templates(collection) == {
        **{"1": "keep", "2": "remove", "3": "remove"},
        **{"4": "deactivate", "6": "keep", "7": "keep"},
    }
    assert not collection.is_problem
    assert sorted(host.volumes) == [*(LV_OF_IT.replace("c", digit) for digit in "1467"), "pool0"]
    assert [bool(host.volumes[LV_OF_IT.replace("c", digit)].lv_active) for digit in "146"] == [
        *(False, False, True)
    ]
    assert [command for command in host.lvm_commands if not command.startswith("lvm ")] == [
        "lvremove --quiet --yes " + " ".join("ovirt-local/" + LV_OF_IT.replace("c", digit) for digit in "32"),
        f"lvchange --quiet --activate n ovirt-local/{LV_OF_IT.replace('c', '4')}",
    ]
    assert lock.names() == []


def test_a_clock_that_went_backwards_removes_no_template(host: FakeHost) -> None:
    add_template(host, "1", NOW + 1)
    collection = gc.collect(parsed("cache: {templates: on}"))
    assert of_templates(collection) == {"1": "keep"}
    assert collection.is_problem


def test_templates_do_not_depend_on_libvirt(host: FakeHost) -> None:
    """No VM needs one."""
    host.libvirt_is_silent = True
    add_template(host, "1", NOW - CACHE_KEEP_FOR)
    collection = gc.collect(parsed("cache: {templates: on}"))
    assert of_templates(collection) == {"1": "remove"}
    assert not collection.is_problem


def test_where_the_cache_is_off_all_go(host: FakeHost) -> None:
    for digit in "12":
        add_template(host, digit)
    assert of_templates(gc.collect(parsed())) == {"1": "remove", "2": "remove"}
    assert set(host.volumes) == {"pool0"}


def test_a_cache_that_is_on_for_one_vm_is_on(host: FakeHost) -> None:
    add_template(host, "1")
    text = f"vms: {{{VM}: {{cache: {{templates: on}}}}}}"
    assert of_templates(gc.collect(parsed(text))) == {"1": "keep"}


@pytest.mark.parametrize("dry_run", BOTH)
def test_a_cache_that_is_too_large_loses_what_was_not_used_for_longest(host: FakeHost, dry_run: bool) -> None:
    """64 MiB each, of which one may be."""
    for digit, used in (("1", 30), ("2", 10), ("3", 20)):
        add_template(host, digit, NOW - used)
    collection = gc.collect(parsed(CACHED), dry_run)
    assert of_templates(collection) == {"1": "remove", "2": "keep", "3": "remove"}
    assert len(host.volumes) == (4 if dry_run else 2)


def test_what_is_in_use_counts_but_stays_too(host: FakeHost) -> None:
    """It was used first, and is not removed; the next one is not instead of it."""
    add_template(host, "1", NOW - 30, lv_active="active", lv_device_open="open")
    add_template(host, "2", NOW - 20)
    assert of_templates(gc.collect(parsed(CACHED))) == {"1": "keep", "2": "keep"}


@pytest.mark.parametrize("may_start", BOTH)
@pytest.mark.parametrize("erase", ["none", "discard", "zero"])
def test_templates_are_erased_as_disks_are(host: FakeHost, erase: str, may_start: bool) -> None:
    """Though nobody may write to one.  vdsm, when it starts, does not wait for it."""
    old = add_template(host, "1", NOW - CACHE_KEEP_FOR)
    text = f"{{cache: {{templates: on}}, retention: {{erase: {erase}}}}}"
    collection = gc.collect(parsed(text), may_start=may_start)
    assert of_templates(collection) == {"1": "remove"}
    assert not collection.is_problem
    waits = erase != "none" and not may_start
    assert set(host.volumes) == {"pool0", *([old.lv_name] if waits else [])}
    assert host.erased == (set() if erase == "none" or waits else {old.lv_uuid})
    assert not gc.collect(parsed(text)).is_problem
    assert set(host.volumes) == {"pool0"}
    assert host.erased == (set() if erase == "none" else {old.lv_uuid})


def test_a_dry_run_changes_no_template(host: FakeHost) -> None:
    add_template(host, "1", NOW - CACHE_KEEP_FOR)
    add_template(host, "2", NOW, "UPDATING")
    add_template(host, "4", lv_active="active")
    before = host.report()
    collection = gc.collect(parsed("cache: {templates: on}"), dry_run=True)
    assert of_templates(collection) == {"1": "remove", "2": "remove", "4": "deactivate"}
    assert host.report() == before
    assert host.commands == [LOOK]
    lines = gc.as_lines(collection, dry_run=True).splitlines()
    assert [line.split("  ")[1:] for line in lines if " template " in line] == [
        [
            f"template {TEMPLATE.replace('5', '1')}",
            *("64 MiB", "would be removed: not used for 30 d, past cache.keep_for"),
        ],
        [
            f"template {TEMPLATE.replace('5', '4')}",
            *("64 MiB", "would be deactivated: kept for another 29 d 23 h"),
        ],
        [
            f"template {TEMPLATE.replace('5', '2')}",
            *("64 MiB", "would be removed: unfinished copy that nobody works on"),
        ],
    ]


def activate(volume: Volume, is_open: str) -> None:
    volume.lv_active, volume.lv_device_open = "active", is_open


@pytest.mark.parametrize(
    ("change", "outcome_", "is_there"),
    [
        (lambda volume: volume.lv_tags.clear(), "remove", True),
        (lambda volume: volume.lv_tags.update(tags()), "remove", True),
        (lambda volume: volume.lv_tags.add(f"USED_{NOW}"), "keep", True),
        (lambda volume: activate(volume, "open"), "keep", True),
        (lambda volume: activate(volume, ""), "remove", False),
    ],
    ids=["foreign", "a disk's", "used", "open", "active"],
)
def test_a_template_is_looked_at_again_under_its_lock(
    host: FakeHost, change: Callable[[Volume], None], outcome_: str, is_there: bool
) -> None:
    volume = add_template(host, "1", NOW - CACHE_KEEP_FOR)
    host.before_command(1, lambda: change(volume))
    assert of_templates(gc.collect(parsed("cache: {templates: on}"))) == {"1": outcome_}
    assert (volume.lv_name in host.volumes) == is_there


def test_a_template_that_another_removed_meanwhile(host: FakeHost) -> None:
    volume = add_template(host, "1", NOW - CACHE_KEEP_FOR)

    def remove() -> None:
        del host.volumes[volume.lv_name]

    host.before_command(1, remove)
    collection = gc.collect(parsed("cache: {templates: on}"))
    assert of_templates(collection) == {"1": "remove"}
    assert not collection.is_problem
    assert "lvremove" not in host.tools


def test_a_template_whose_lock_is_taken_meanwhile(host: FakeHost) -> None:
    volume = add_template(host, "1", NOW - CACHE_KEEP_FOR)
    held: list[lock.Lock] = []

    def hold() -> None:
        found = lock.try_hold(lock.disk_lock(volume.lv_name))
        assert found
        held.append(found)

    held_before = lock.held

    def look() -> frozenset[str]:
        found = held_before()
        hold()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "held", look)
        collection = gc.collect(parsed("cache: {templates: on}"))
    held[0].release()
    assert of_templates(collection) == {"1": "keep"}
    assert volume.lv_name in host.volumes


def test_a_template_that_cannot_be_removed_is_a_problem(host: FakeHost) -> None:
    add_template(host, "1", NOW - CACHE_KEEP_FOR)
    add_template(host, "3", NOW - CACHE_KEEP_FOR)
    host.fail("lvremove", "  Cannot change VG\n", when=LV_OF_IT.replace("c", "1"), times=2)
    collection = gc.collect(parsed("cache: {templates: on}"))
    assert of_templates(collection) == {"1": "failed", "3": "remove"}
    assert collection.is_problem
    assert "Cannot change VG" in gc.as_lines(collection, dry_run=False)


@pytest.mark.parametrize("erase", ["none", "discard"])
@pytest.mark.parametrize("number", range(10))
def test_a_gc_of_templates_that_is_killed_is_finished_by_the_next(
    host: FakeHost, erase: str, number: int
) -> None:
    add_template(host, "1", NOW - CACHE_KEEP_FOR)
    add_template(host, "2", NOW, "UPDATING", lv_permissions="writeable")
    text = f"{{cache: {{templates: on}}, retention: {{erase: {erase}}}}}"
    host.kill_before(number)
    with contextlib.suppress(Killed):
        gc.collect(parsed(text))
    host.bury()
    assert not gc.collect(parsed(text)).is_problem
    assert set(host.volumes) == {"pool0"}
    assert len(host.erased) == (0 if erase == "none" else 2)
    assert lock.names() == []


def test_json_of_a_template(host: FakeHost) -> None:
    add_template(host, "1", NOW - 86400)
    (row,) = document(gc.collect(parsed("cache: {templates: on}")))["disks"]
    assert row == {
        "vg": "ovirt-local",
        "volume": LV_OF_IT.replace("c", "1"),
        "vm": "",
        "image": "",
        "template": TEMPLATE.replace("5", "1"),
        "size": SIZE,
        "action": "keep",
        "reason": "kept for another 29 d",
        "certain": True,
        "failure": "",
    }


def test_templates_that_go_are_counted(host: FakeHost) -> None:
    """They are no disks, and unfinished ones were no templates."""
    add_template(host, "1", NOW - CACHE_KEEP_FOR)
    add_template(host, "2")
    add_template(host, "3", NOW, "UPDATING")
    gc.collect(parsed("cache: {templates: on}"))
    found = counters.read()
    assert (found.templates_evicted, found.gc_removed, found.gc_removed_bytes) == (1, 0, 0)
