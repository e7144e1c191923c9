from __future__ import annotations

import dataclasses
import itertools
import json
import time
from functools import lru_cache
from pathlib import Path

import pytest

from localdisk import config, gc, lock
from localdisk.config import Config
from localdisk.disk import LocalDisk, State
from localdisk.errors import NoVolumeGroup
from localdisk.gc import Action, Finding, Verdict, Witnesses
from localdisk.lvm import VolumeGroup
from tests.fakes import (
    FULLREPORT,
    IMAGE,
    OTHER_IMAGE,
    OTHER_VM,
    OTHER_VOLUME,
    VM,
    VOLUME,
    FakeHost,
    tags,
)

NOW = 1_760_000_000
KEEP_FOR = 7 * 86400
SIZE = 64 << 20
LOOK = f"{FULLREPORT} ovirt-local"
LIST = "virsh --readonly --connect qemu:///system list --uuid --all"
STATE_TAGS = {
    State.READY: (),
    State.STOPPED: ("STOPPED_5",),
    State.UNFINISHED: ("UPDATING", "WRITES_5"),
    State.DELETING: ("DELETING",),
}


@lru_cache(maxsize=20)
def parsed(text: str = "") -> Config:
    return config.parse(text.encode(), "F")


@pytest.fixture(name="host")
def fixture_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHost:
    monkeypatch.setattr(time, "time", lambda: float(NOW))
    return FakeHost().install(monkeypatch, tmp_path)


def disk(state: State, is_open: bool = False, stopped: int | None = None) -> LocalDisk:
    host = FakeHost()
    host.add(VOLUME, tags(*STATE_TAGS[state]), SIZE, lv_device_open="open" if is_open else "")
    lv = VolumeGroup.from_report(host.report()).find(VOLUME)
    found = LocalDisk.from_lv(lv) if lv else None
    assert found
    return dataclasses.replace(found, stopped=stopped)


# -- deciding


def decided(state: State, is_open: bool, is_locked: bool, is_known: bool | None, age: float) -> Verdict:
    given = disk(state, is_open, stopped=NOW if state is State.STOPPED else None)
    return gc.decide(given, Witnesses(is_locked, is_known), parsed().policy(VM), NOW + age)


AGES = (-86400.0, -1.0, 0.0, 1.0, KEEP_FOR - 0.5, float(KEEP_FOR), KEEP_FOR * 100.0)
CASES = list(itertools.product(State, (False, True), (False, True), (None, False, True), AGES))


def test_decide_does_what_the_table_says() -> None:
    for state, is_open, is_locked, is_known, age in CASES:
        verdict = decided(state, is_open, is_locked, is_known, age)
        if is_open or is_locked or state is State.READY:
            expected, certain = Action.KEEP, True
        elif state in (State.UNFINISHED, State.DELETING):
            expected, certain = Action.REMOVE, True
        else:
            is_due = is_known is False and age >= KEEP_FOR
            expected, certain = Action.REMOVE if is_due else Action.KEEP, is_known is not None
        assert (verdict.action, verdict.is_certain) == (expected, certain), (state, is_open, is_locked)
        assert verdict.reason


def test_decide_never_breaks_a_promise() -> None:
    for state, is_open, is_locked, is_known, age in CASES:
        verdict = decided(state, is_open, is_locked, is_known, age)
        if verdict.action is Action.REMOVE:
            assert not is_open
            assert not is_locked
            assert state is not State.READY
            if state is State.STOPPED:  # a complete copy that someone wanted to keep
                assert is_known is False
                assert age >= KEEP_FOR


@pytest.mark.parametrize(
    ("age", "reason"),
    [
        (-1, "stopped in the future: the clock went backwards"),
        (3600, "kept for another 6 d 23 h"),
        (KEEP_FOR + 3600, "stopped 7 d 1 h ago, past keep_for"),
    ],
)
def test_reasons(age: int, reason: str) -> None:
    assert decided(State.STOPPED, False, False, False, age).reason == reason


def test_the_policy_is_the_vms_own() -> None:
    policy = parsed(f"vms: {{{VM}: {{retention: {{keep_for: 1h}}}}}}").policy(VM)
    verdict = gc.decide(disk(State.STOPPED, stopped=NOW), Witnesses(False, False), policy, NOW + 3600)
    assert verdict.action is Action.REMOVE


# -- collecting


def outcome(findings: tuple[Finding, ...]) -> dict[str, str]:
    """The first digit of each disk -> what came of it."""
    return {f.disk.volume_id[0]: "failed" if f.failure else f.verdict.action.value for f in findings}


def populate(host: FakeHost) -> None:
    old, young = f"STOPPED_{NOW - KEEP_FOR}", f"STOPPED_{NOW - 5}"
    for digit, more, vm in (
        ("1", (), VM),
        ("2", ("UPDATING",), VM),
        ("3", ("DELETING",), VM),
        ("4", (old,), VM),
        ("5", (young,), VM),
        ("6", (old,), OTHER_VM),
    ):
        host.add(VOLUME.replace("1", digit), tags(*more, vm=vm), SIZE)
    host.add("data", {"localdisk"}, SIZE)
    host.defined = {OTHER_VM}


def test_collect(host: FakeHost) -> None:
    populate(host)
    findings = gc.collect(parsed())
    assert outcome(findings) == {
        "1": "keep",
        "2": "remove",
        "3": "remove",
        "4": "remove",
        "5": "keep",
        "6": "keep",
    }
    assert [name[0] for name in sorted(host.volumes)] == ["1", "5", "6", "d", "p"]
    assert not any(finding.is_problem for finding in findings)
    removes = [f"lvremove --quiet --yes ovirt-local/{VOLUME.replace('1', digit)}" for digit in "234"]
    assert host.commands == [LIST, LOOK, LOOK, removes[0], LOOK, removes[1], LOOK, removes[2]]


def test_dry_run_changes_nothing(host: FakeHost) -> None:
    populate(host)
    held = lock.try_hold(lock.disk_lock("left"))
    assert held
    before = host.report()
    findings = gc.collect(parsed(), dry_run=True)
    assert outcome(findings)["2"] == "remove"
    assert host.report() == before
    assert host.commands == [LIST, LOOK]


def test_an_empty_group(host: FakeHost) -> None:
    assert gc.collect(parsed()) == ()
    assert host.commands == [LIST, LOOK]


@pytest.mark.parametrize("is_dry", [False, True])
def test_a_disk_that_is_being_prepared(host: FakeHost, is_dry: bool) -> None:
    host.add(VOLUME, tags("UPDATING"), SIZE)
    with lock.holding(lock.disk_lock(VOLUME), lambda _: None):
        (finding,) = gc.collect(parsed(), is_dry)
    assert finding.verdict == Verdict(Action.KEEP, "being prepared")
    assert VOLUME in host.volumes


def test_a_disk_that_is_claimed_after_the_look(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    host.add(VOLUME, tags("UPDATING"), SIZE)
    monkeypatch.setattr(lock, "is_held", lambda _path: False)
    with lock.holding(lock.disk_lock(VOLUME), lambda _: None):
        (finding,) = gc.collect(parsed())
    assert finding.verdict == Verdict(Action.KEEP, "being prepared")
    assert VOLUME in host.volumes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lv_tags": tags()}, "not marked as stopped"),
        ({"lv_device_open": "open"}, "in use"),
        ({"lv_tags": tags(f"STOPPED_{NOW}")}, "kept for another 7 d"),
    ],
)
def test_a_disk_that_changes_after_the_look_is_judged_again(
    host: FakeHost, change: dict[str, object], reason: str
) -> None:
    volume = host.add(VOLUME, tags("UPDATING"), SIZE)
    on_second_look(host, lambda: vars(volume).update(change))
    (finding,) = gc.collect(parsed())
    assert (finding.verdict.action, finding.verdict.reason) == (Action.KEEP, reason)
    assert VOLUME in host.volumes


def on_second_look(host: FakeHost, change: object) -> None:
    looks = [0]

    def look(_argv: list[str]) -> None:
        looks[0] += 1
        if looks[0] == 2 and callable(change):
            change()

    host.before["lvm"] = look


def test_a_disk_that_is_gone_after_the_look(host: FakeHost) -> None:
    host.add(VOLUME, tags("UPDATING"), SIZE)
    on_second_look(host, lambda: host.volumes.pop(VOLUME))
    (finding,) = gc.collect(parsed())
    assert not finding.is_problem
    assert host.commands == [LIST, LOOK, LOOK]


def test_a_volume_that_is_not_ours_any_more_after_the_look(host: FakeHost) -> None:
    volume = host.add(VOLUME, tags("UPDATING"), SIZE)
    on_second_look(host, volume.lv_tags.clear)
    gc.collect(parsed())
    assert VOLUME in host.volumes


def test_a_failure_does_not_stop_the_others(host: FakeHost) -> None:
    for name in (VOLUME, OTHER_VOLUME):
        host.add(name, tags("DELETING"), SIZE)
    host.fail("lvremove", "  Cannot change VG\n", when=VOLUME)
    first, second = gc.collect(parsed())
    assert "Cannot change VG" in first.failure
    assert (first.is_problem, second.is_problem) == (True, False)
    assert set(host.volumes) == {VOLUME, "pool0"}


@pytest.mark.parametrize("vg", [{"vg_partial": "partial"}, {"vg_exported": "exported"}], ids=str)
def test_nothing_is_removed_from_an_unusable_group(host: FakeHost, vg: dict[str, str]) -> None:
    host.add(VOLUME, tags("UPDATING"), SIZE)
    host.vg.update(vg)
    (finding,) = gc.collect(parsed())
    assert finding.failure.startswith("volume group ovirt-local is ")
    assert VOLUME in host.volumes


def test_without_libvirt(host: FakeHost) -> None:
    host.libvirt_is_silent = True
    host.add(VOLUME, tags("STOPPED_5"), SIZE)
    host.add(OTHER_VOLUME, tags("UPDATING"), SIZE)
    kept, removed = gc.collect(parsed())
    assert (kept.verdict.action, kept.is_problem) == (Action.KEEP, True)
    assert (removed.verdict.action, removed.is_problem) == (Action.REMOVE, False)
    assert set(host.volumes) == {VOLUME, "pool0"}


@pytest.mark.parametrize("erase", ["discard", "zero"])
def test_a_disk_is_erased_as_its_vm_wants(host: FakeHost, erase: str) -> None:
    host.add(VOLUME, tags("DELETING"), SIZE, lv_active="")
    gc.collect(parsed(f"vms: {{{VM}: {{retention: {{erase: {erase}}}}}}}"))
    assert [command.split()[0] for command in host.commands[3:]] == ["lvchange", "blkdiscard", "lvremove"]


def test_locks_that_nobody_holds_are_swept(host: FakeHost) -> None:
    Path(lock.RUN).mkdir()
    Path(lock.disk_lock("left")).touch()
    with lock.holding(lock.disk_lock("held"), lambda _: None):
        gc.collect(parsed(), dry_run=True)
        assert len(list(Path(lock.RUN).iterdir())) == 2
        gc.collect(parsed())
        assert [path.name for path in Path(lock.RUN).iterdir()] == ["held.lock"]


def test_without_the_group(host: FakeHost) -> None:
    with pytest.raises(NoVolumeGroup):
        gc.collect(parsed("volume_group: other"))


# -- what the operator sees


def test_lines(host: FakeHost) -> None:
    host.add(VOLUME, tags("DELETING"), SIZE)
    host.add(OTHER_VOLUME, tags(image=OTHER_IMAGE), SIZE)
    assert gc.as_lines(gc.collect(parsed(), dry_run=True), dry_run=True) == (
        f"ovirt-local/{VOLUME}  VM {VM}  64 MiB  would be removed: marked for removal when its VM stopped\n"
        f"ovirt-local/{OTHER_VOLUME}  VM {VM}  64 MiB  kept: not marked as stopped\n"
    )
    host.fail("lvremove", "  Cannot change VG\n")
    first = gc.as_lines(gc.collect(parsed()), dry_run=False).splitlines()[0]
    assert "  not removed, lvremove " in first
    assert "Cannot change VG" in first
    first = gc.as_lines(gc.collect(parsed()), dry_run=False).splitlines()[0]
    assert first.endswith("  removed: marked for removal when its VM stopped")


def test_json(host: FakeHost) -> None:
    host.add(VOLUME, tags("DELETING"), SIZE)
    assert json.loads(gc.as_json(gc.collect(parsed()))) == [
        {
            "vg": "ovirt-local",
            "volume": VOLUME,
            "vm": VM,
            "image": IMAGE,
            "size": SIZE,
            "action": "remove",
            "reason": "marked for removal when its VM stopped",
            "failure": "",
        }
    ]
    assert gc.as_json(()) == "[]\n"
    assert gc.as_lines((), dry_run=False) == ""
