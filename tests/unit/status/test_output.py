"""What status shows: the snapshot, its JSON; tests/unit/status/test_table.py has the table."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import replace as replace_volume
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from localdisk import config, device_mapper, holders, lock
from localdisk.backend import BACKENDS
from localdisk.config import Config
from localdisk.errors import NoVolumeGroup
from localdisk.frozen import replace
from localdisk.status import output, problems, snapshot, table
from localdisk.status.snapshot import CacheUse, Copy, Group, Next, Pool, Row, Snapshot, TemplateRow
from localdisk.volumes import progress
from localdisk.volumes.local_disk import State
from localdisk.volumes.progress import Progress
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
    Volume,
    aside,
    report,
    tags,
)

NOW = 1_760_000_000
SIZE = 64 << 20
LIST = "virsh --readonly --connect qemu:///system list --uuid; echo ====; list --all --uuid --name"
LOCAL = f"/dev/ovirt-local/{VOLUME}"
SCHEMA = json.loads((Path(__file__).parents[3] / "schema" / "status.schema.json").read_text())


@lru_cache(maxsize=20)
def parsed(text: str = "") -> Config:
    return config.parse(text.encode(), "F")


@pytest.fixture(name="host")
def fixture_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHost:
    monkeypatch.setattr(time, "time", lambda: float(NOW))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return FakeHost().install(monkeypatch, tmp_path)


def take(text: str = "") -> Snapshot:
    """A snapshot; its JSON must always fit the schema."""
    taken = snapshot.take(parsed(text))
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(output.as_json(taken)))
    return taken


def row(host: FakeHost, *more: str, text: str = "", **fields: str) -> Row:
    host.add(VOLUME, tags(*more), SIZE, **fields)
    (found,) = take(text).disks
    return found


def running(vm: str = VM, prop: str = "lvm", disks: Iterable[tuple[str, str, str]] = ()) -> str:
    """libvirt's XML of a VM that runs from (image, volume, path)s."""
    letters = dict(zip("abcdef", disks))
    elements = "".join(
        f"<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='{path}' index='1'/>"
        f"<backingStore/><target dev='vd{letter}' bus='virtio'/><serial>{image}</serial></disk>"
        for letter, (image, _, path) in letters.items()
    )
    devices = "".join(
        f"<o:device devtype='disk' name='vd{letter}'><o:imageID>{image}</o:imageID>"
        f"<o:volumeID>{volume}</o:volumeID></o:device>"
        for letter, (image, volume, _) in letters.items()
    )
    custom = f"<o:custom><o:localdisk>{prop}</o:localdisk></o:custom>" if prop else "<o:custom/>"
    return (
        f"<domain type='kvm' id='1'><name>web</name><uuid>{vm}</uuid><metadata>"
        f"<o:vm xmlns:o='http://ovirt.org/vm/1.0'>{custom}{devices}</o:vm></metadata>"
        f"<devices>{elements}</devices>\n</domain>"
    )


def runs(host: FakeHost, *disks: tuple[str, str, str], prop: str = "lvm") -> None:
    host.active, host.xmls = {VM}, {VM: running(prop=prop, disks=disks)}


def kinds(taken: Snapshot) -> list[str]:
    return [problem.kind for problem in taken.problems]


# -- looking


def test_one_command_each(host: FakeHost) -> None:
    taken = take()
    assert host.commands == [LIST, f"{FULLREPORT} ovirt-local"]
    assert taken == Snapshot(
        at=NOW,
        volume_groups=(
            Group(
                "ovirt-local",
                8585740288,
                7503609856,
                0,
                Pool("pool0", 1 << 30, 0.0, 10.94, 90.0, 80.0),
                metadata_percent=0.59,
            ),
        ),
        disks=(),
    )


def test_one_more_command_where_vms_run(host: FakeHost) -> None:
    runs(host, (IMAGE, VOLUME, LOCAL))
    host.active.add(OTHER_VM)
    host.xmls[OTHER_VM] = running(OTHER_VM)
    host.add(VOLUME, tags(), SIZE, lv_device_open="open")
    take()
    assert host.commands[2:] == [
        f"virsh --readonly --connect qemu:///system dumpxml {VM}; dumpxml {OTHER_VM}; echo"
    ]


def test_a_disk(host: FakeHost) -> None:
    host.defined, host.names = {VM}, {VM: "web one"}
    assert row(host) == Row(
        vg="ovirt-local",
        vm=VM,
        vm_name="web one",
        disk="",
        image=IMAGE,
        volume=VOLUME,
        size=SIZE,
        backend="lvm",
        state="ready",
        open=False,
        used=None,
        stopped=None,
        copy=None,
        next=Next("keep", None, "VM starts"),
    )


def test_a_thin_disk(host: FakeHost) -> None:
    found = row(host, lv_layout="thin,sparse", pool_lv="pool0", data_percent="25.00")
    assert (found.backend, found.used) == ("lvmthin", SIZE // 4)


def test_a_running_vms_disk(host: FakeHost) -> None:
    runs(host, (OTHER_IMAGE, OTHER_VOLUME, "/x"), (IMAGE, VOLUME, LOCAL), prop="")
    host.names = {VM: "web"}
    found = row(host, lv_device_open="open")
    assert (found.vm_name, found.disk, found.state, found.open) == ("web", "vdb", "running", True)


@pytest.mark.parametrize(
    ("more", "is_open", "state"),
    [
        ((), "", "ready"),
        ((), "open", "ready"),  # something else has it open
        (("UPDATING",), "", "unfinished"),
        (("UPDATING",), "open", "unfinished"),
        (("STOPPED_5",), "", "stopped"),
        (("STOPPED_5",), "open", "stopped"),
        (("DELETING",), "", "deleting"),
        (("DELETING",), "open", "deleting"),
    ],
)
def test_states(host: FakeHost, more: tuple[str, ...], is_open: str, state: str) -> None:
    found = row(host, *more, lv_device_open=is_open)
    assert (found.state, found.open) == (state, bool(is_open))


@pytest.mark.parametrize(
    ("name", "has_pool"), [("empty", False), ("not-zeroing", True), ("pool-inactive", True)]
)
def test_other_groups(
    monkeypatch: pytest.MonkeyPatch, host: FakeHost, tmp_path: Path, name: str, has_pool: bool
) -> None:
    host = FakeHost(report(name)).install(monkeypatch, tmp_path)
    (group,) = take(f"volume_group: {host.vg['vg_name']}").volume_groups
    assert (group.pool is not None) is has_pool
    if name == "pool-inactive":
        assert group.pool
        assert (group.pool.data_percent, group.pool.metadata_percent) == (None, None)


def test_a_group_that_is_missing(host: FakeHost) -> None:
    taken = take(f"vms: {{{VM}: {{volume_group: other}}}}")
    assert [group.name for group in taken.volume_groups] == ["ovirt-local"]
    (problem,) = taken.problems
    assert (problem.kind, str(problem)) == (problems.NOT_USABLE, str(NoVolumeGroup(vg="other")))


def test_without_libvirt(host: FakeHost) -> None:
    host.libvirt_is_silent = True
    host.add(VOLUME, tags(), SIZE)
    host.add(OTHER_VOLUME, tags(), SIZE, lv_device_open="open")
    taken = take()
    assert [found.next.text for found in taken.disks] == ["kept, see problems", "removed when VM stops"]
    assert taken.problems == ()
    (line,) = taken.unseen
    assert line.startswith("which VMs run: libvirt does not report which VMs run: virsh --readonly failed")


# -- copies


def record(**fields: Any) -> Progress:
    usual = {"vm": VM, "image": IMAGE, "phase": "copying", "since": NOW - 20, "at": NOW, "size": SIZE}
    return Progress(**{**usual, **fields})


def test_a_copy(host: FakeHost) -> None:
    with lock.holding(lock.disk_lock(VOLUME), lambda _: None) as held:
        held.write(record(done=SIZE // 4, written=40 << 20).as_text())
        found = row(host, "UPDATING", lv_device_open="open")
        assert (found.state, found.next) == ("copying", Next("copy", NOW + 60, "2 MiB/s 01:00 left"))
        assert found.copy == Copy("copying", NOW - 20, 0.25, 40 << 20, 2 << 20, 60)
        assert kinds(take()) == []


def test_a_copy_that_makes_no_progress(host: FakeHost) -> None:
    with lock.holding(lock.disk_lock(VOLUME), lambda _: None) as held:
        stalled = record(phase="stalled", since=NOW - 900, at=NOW - 600, done=SIZE // 4)
        held.write(stalled.as_text())
        found = row(host, "UPDATING", lv_device_open="open")
        assert (found.state, found.next) == ("stalled", Next("copy", None, "no progress for 10 min"))
        assert found.copy
        assert (found.copy.phase, found.copy.done) == ("stalled", 0.25)
        (problem,) = take().problems
    assert problem.kind == problems.STALLED
    assert problem.what == f"the copy of disk {VOLUME} of VM {VM} has made no progress for 10 min"
    assert problem.fix.endswith("powering the VM off ends it")


def test_a_copy_that_says_nothing_yet(host: FakeHost) -> None:
    with lock.holding(lock.disk_lock(VOLUME), lambda _: None):
        found = row(host, "UPDATING")
    assert (found.state, found.copy, found.next) == ("copying", None, Next("copy", None, "copy begins"))


@pytest.mark.parametrize(
    ("phase", "text"), [("waiting", "waits 20 s for turn"), ("preparing", "copy begins")]
)
def test_a_start_without_volume(host: FakeHost, phase: str, text: str) -> None:
    host.names, host.defined = {VM: "web"}, {VM}
    with lock.holding(lock.disk_lock(VOLUME), lambda _: None) as held:
        held.write(record(phase=phase).as_text())
        (found,) = take("backend: lvmthin").disks
    assert (found.vm_name, found.volume, found.size, found.backend) == ("web", VOLUME, SIZE, "lvmthin")
    assert (found.state, found.next) == (phase, Next("copy", None, text))


def test_a_lock_that_nobody_holds_is_no_progress(host: FakeHost) -> None:
    Path(lock.RUN).mkdir()
    Path(lock.disk_lock(VOLUME)).write_text(record().as_text())
    assert (row(host, "UPDATING").state, row(host, "UPDATING").copy) == ("unfinished", None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        "\0\0\0",
        '{"done": 1' + "0" * 400 + "}",
        record(vm="x").as_text(),
        record(image="../x").as_text(),
        record(done=-1).as_text(),
        record(written=1.5).as_text(),
        record(phase=3).as_text(),
        record(template=OTHER_VOLUME).as_text(),  # either a VM's or a template's
        record(vm="", image="", template="../x").as_text(),
        record(vm="", image="").as_text(),
        record(at=True).as_text(),
        record(written=1 << 63).as_text(),
        record().as_text().replace("}", ', "more": 1}'),
    ],
)
def test_what_is_no_record(text: str) -> None:
    assert progress.parse(text) is None


def test_a_record_comes_back() -> None:
    assert progress.parse(record(done=3).as_text()) == record(done=3)
    of_template = record(vm="", image="", template=OTHER_VOLUME)
    assert progress.parse(of_template.as_text()) == of_template


@pytest.mark.parametrize(
    ("fields", "fraction", "rate", "left"),
    [
        ({}, 0, 0, None),
        ({"size": 0}, 0, 0, None),
        ({"done": SIZE}, 1, 0, 0),
        ({"done": 2 * SIZE}, 1, 0, 0),
        ({"done": SIZE // 2, "written": 100}, 0.5, 5, 20),
        ({"done": SIZE // 2, "written": 100, "since": NOW}, 0.5, 100, None),
        ({"done": SIZE // 2, "written": 100, "since": NOW + 9}, 0.5, 100, None),  # the clock went back
    ],
)
def test_rate_and_rest(fields: dict[str, int], fraction: float, rate: int, left: int | None) -> None:
    found = record(**fields)
    assert (found.fraction, found.rate, found.seconds_left) == (fraction, rate, left)


@pytest.mark.parametrize(
    ("left", "text"),
    [
        (None, "2 KiB/s"),
        (0, "2 KiB/s, finishing"),
        (61, "2 KiB/s 01:01 left"),
        (7325, "2 KiB/s 2:02:05 left"),
    ],
)
def test_pace(left: int | None, text: str) -> None:
    assert progress.pace(2048, left) == text


# -- what happens next

KEEP = "retention: {on_stop: keep, keep_for: 7d}"
ERASE = "retention: {erase: zero}"


@pytest.mark.parametrize(
    ("text", "more", "is_open", "expected"),
    [
        ("", (), "open", Next("remove", None, "removed when VM stops")),
        (KEEP, (), "open", Next("keep", None, "kept 7 d when VM stops")),
        ("", ("DELETING",), "open", Next("remove", None, "removed when closed")),
        ("", ("DELETING",), "", Next("remove", NOW, "gc removes it next")),
        (ERASE, ("DELETING",), "", Next("remove", NOW, "gc erases it next")),
        ("", ("UPDATING",), "", Next("remove", NOW, "gc removes it next")),
        ("", (), "", Next("remove", NOW + 600, "gc removes in 10 min")),
        ("", (f"UNNEEDED_{NOW - 200}",), "", Next("remove", NOW + 400, "gc removes in 6 min 40 s")),
        ("", (f"UNNEEDED_{NOW - 700}",), "", Next("remove", NOW, "gc removes it next")),
        (KEEP, (), "", Next("keep", None, "kept 7 d by gc")),
        (KEEP, (f"STOPPED_{NOW - 86400}",), "", Next("remove", NOW + 6 * 86400, "gc removes in 6 d")),
        (KEEP, (f"STOPPED_{NOW + 5}",), "", Next("keep", None, "kept, see problems")),
    ],
)
def test_next(host: FakeHost, text: str, more: tuple[str, ...], is_open: str, expected: Next) -> None:
    if is_open:
        runs(host, (IMAGE, VOLUME, LOCAL))
    assert row(host, *more, text=text, lv_device_open=is_open).next == expected


def test_a_disk_that_something_else_has_open(host: FakeHost) -> None:
    assert row(host, lv_device_open="open").next == Next("keep", None, "kept while open")


def test_a_disk_that_was_set_aside(host: FakeHost) -> None:
    host.add(VOLUME, aside("zero", VOLUME), SIZE)
    (found,) = take().disks
    assert (found.vm, found.state, found.next.text) == ("", "deleting", "gc erases it next")


# -- problems


def test_a_healthy_vm(host: FakeHost) -> None:
    runs(host, (IMAGE, VOLUME, LOCAL))
    host.add(VOLUME, tags(), SIZE, lv_device_open="open")
    assert take().problems == ()


MOVED = f"/rhev/x/{OTHER_VOLUME}"


@pytest.mark.parametrize(
    ("prop", "has_disk", "text", "is_problem"),
    [
        ("lvm", True, "", True),
        ("lvm", False, "", True),
        ("", True, "", True),
        ("off", True, "", True),
        ("", False, "", False),
        ("off", False, "", False),
        ("nonsense", False, "", False),
        ("lvm", False, "hotplug: shared", False),  # it may have been plugged in
        ("lvm", True, "hotplug: shared", True),
        ("lvm", False, f"vms: {{{VM}: {{enabled: false}}}}", False),
        ("lvm", False, f"vms: {{{VM}: {{disks: [{OTHER_IMAGE}]}}}}", False),
    ],
)
def test_a_vm_that_runs_from_elsewhere(
    host: FakeHost, prop: str, has_disk: bool, text: str, is_problem: bool
) -> None:
    """A snapshot or a storage operation went past us: its leaf is another volume now, on shared storage."""
    runs(host, (IMAGE, OTHER_VOLUME, MOVED), prop=prop)
    if has_disk:
        host.add(VOLUME, tags(), SIZE, lv_device_open="open", lv_active="active")
    found = [problem for problem in take(text).problems if problem.kind == problems.NOT_LOCAL]
    assert [problem.what for problem in found] == is_problem * [
        f"VM web ({VM}): vda runs from {MOVED}, not from /dev/ovirt-local/{OTHER_VOLUME}"
    ]


@pytest.mark.parametrize("prop", ["", "off"])
def test_a_vm_that_was_started_without_its_kept_disk(host: FakeHost, prop: str) -> None:
    """It runs from shared storage because it was started so: its disk is marked, and nothing is wrong."""
    runs(host, (IMAGE, VOLUME, MOVED), prop=prop)
    host.add(VOLUME, tags(f"STOPPED_{NOW - 60}", "STALE"), SIZE)
    assert take(KEEP).problems == ()


def test_below_a_live_snapshot_it_is_still_the_vms(host: FakeHost) -> None:
    """Nobody shall be told to end the VM."""
    host.add(VOLUME, tags(), SIZE, lv_device_open="open")
    runs(host, (IMAGE, OTHER_VOLUME, MOVED))
    chain = f"<backingStore type='block'><source dev='{LOCAL}'/><backingStore/></backingStore>"
    host.xmls[VM] = host.xmls[VM].replace("<backingStore/>", chain)
    taken = take()
    assert kinds(taken) == [problems.NOT_LOCAL]
    (found,) = taken.disks
    assert (found.state, found.disk, found.next.text) == ("running", "vda", "kept, see problems")


@pytest.mark.parametrize("more", [(), ("DRIFTED_5",)], ids=["before gc", "after gc"])
def test_a_vm_that_drifted_and_stopped_unseen(host: FakeHost, more: tuple[str, ...]) -> None:
    """As after a crash of the host; gc marks the disk."""
    host.shut_off, host.xmls = {VM}, {VM: running(disks=[(IMAGE, OTHER_VOLUME, MOVED)])}
    host.add(VOLUME, tags(*more), SIZE)
    taken = take()
    assert kinds(taken) == [problems.DRIFTED]
    (found,) = taken.disks
    assert (found.state, found.next) == ("drifted", Next("keep", None, "kept"))


def test_what_a_vm_that_stopped_unseen_ran_from_is_not_known(host: FakeHost) -> None:
    host.shut_off, host.xmls = {VM}, {VM: "<domain\n</domain>"}
    host.add(VOLUME, tags(), SIZE)
    taken = take()
    assert kinds(taken) == []
    (why,) = taken.unseen
    assert why.startswith("what VMs that stopped ran from: domain XML")
    (found,) = taken.disks
    assert (found.state, found.next.action) == ("ready", "keep")


def test_a_disk_that_is_open_by_no_vm(monkeypatch: pytest.MonkeyPatch, host: FakeHost) -> None:
    runs(host, (OTHER_IMAGE, OTHER_VOLUME, f"/dev/ovirt-local/{OTHER_VOLUME}"))
    host.add(VOLUME, tags(), SIZE, lv_device_open="open")
    monkeypatch.setattr(holders, "described", lambda path: (f"dd (7) {path}", "end it"))
    (problem,) = take().problems
    assert problem.kind == problems.OPEN_ELSEWHERE
    assert problem.what == f"local disk ovirt-local/{VOLUME} is open, but by no VM: dd (7) {LOCAL}"
    assert problem.fix == "end it"
    host.xmls[VM] = running().replace("<name>", "<nam>")
    assert kinds(take()) == [problems.UNREAD]  # that VM may be the one that has it open


@pytest.mark.parametrize(
    ("text", "more", "kind", "fix"),
    [
        ("", (), problems.UNKNOWN_VM, "localdisk gc removes it in 10 min"),
        ("", (f"UNNEEDED_{NOW - 700}",), problems.UNKNOWN_VM, "localdisk gc removes it in 0 s"),
        (KEEP, (), problems.UNKNOWN_VM, "localdisk gc keeps it as stopped"),
        ("", ("UPDATING",), problems.NO_COPIER, "localdisk gc"),
        (
            KEEP,
            (f"STOPPED_{NOW + 9}",),
            problems.CLOCK,
            "set the clock of this host (chronyc makestep)",
        ),
    ],
)
def test_disks_that_nobody_looks_after(
    host: FakeHost, text: str, more: tuple[str, ...], kind: str, fix: str
) -> None:
    host.add(VOLUME, tags(*more), SIZE)
    (problem,) = take(text).problems
    assert (problem.kind, problem.fix) == (kind, fix)
    assert VOLUME in problem.what


@pytest.mark.parametrize("more", ["DELETING", "UPDATING", "STOPPED_1750000000"])
def test_a_disk_that_is_kept_for_others_volumes(host: FakeHost, more: str) -> None:
    host.add(VOLUME, tags(more), SIZE)
    host.add("backup", (), SIZE, origin=VOLUME)
    (problem,) = take().problems
    assert problem.kind == problems.DEPENDENTS
    assert "LVM would remove backup along with" in problem.what
    assert "lvremove the snapshot" in problem.fix


def test_a_mark_that_gc_makes_anew(host: FakeHost) -> None:
    host.add(VOLUME, tags("STOPPED_5"), SIZE)
    (problem,) = take().problems
    assert (problem.kind, problem.fix) == (problems.CLOCK, "localdisk gc")


def test_a_disk_of_an_older_hook(host: FakeHost) -> None:
    host.add(VOLUME, tags(ours=False), SIZE)
    found = take()
    assert found.problems == ()
    assert (found.disks[0].older, found.disks[0].next.text) == (True, "kept, older hook's")
    assert "1 of vdsm's older hook: set retention.older_disks" in table.render(found, table.Look())
    assert not take("retention: {older_disks: as_ours}").disks[0].older


@pytest.mark.parametrize("more", [(f"STOPPED_{NOW - 5}",), ("DELETING",)])
def test_disks_that_are_as_they_should_be(host: FakeHost, more: tuple[str, ...]) -> None:
    host.add(VOLUME, tags(*more), SIZE)
    assert take().problems == ()


def test_a_disk_of_a_vm_that_starts(host: FakeHost) -> None:
    host.defined = {VM}
    assert row(host).next == Next("keep", None, "VM starts")


def test_a_disk_of_a_vm_whose_other_disk_is_prepared(host: FakeHost) -> None:
    host.defined = {VM}
    with lock.holding(lock.disk_lock(OTHER_VOLUME), lambda _: None) as held:
        held.write(record().as_text())
        host.add(VOLUME, tags("UNNEEDED_5"), SIZE)
        found, _ = sorted(take().disks, key=lambda each: each.volume)
    assert found.next == Next("keep", None, "VM starts")


def test_a_disk_of_a_vm_that_vdsm_gave_up(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its placeholder is left, and gc has seen the disk once."""
    monkeypatch.setattr(time, "time", lambda: 1_760_000_060.0)
    host.defined = {VM}
    found = row(host, "UNNEEDED_1760000000").next
    assert (found.action, found.text) == ("remove", "gc removes in 9 min")
    assert take().problems == ()


def test_a_vm_that_starts_is_no_problem(host: FakeHost) -> None:
    host.defined = {VM}
    host.add(VOLUME, tags(), SIZE)
    assert take().problems == ()


@pytest.mark.parametrize(
    ("data", "metadata", "said"),
    [
        ("80.00", "10.00", []),
        ("81.00", "10.00", ["data 81.0 % of 90 % allowed"]),
        ("99.99", "10.00", ["data 100.0 % of 90 % allowed"]),
        ("10.00", "72.00", ["metadata 72.0 % of 80 % allowed"]),
        ("90.00", "80.00", ["data 90.0 % of 90 % allowed", "metadata 80.0 % of 80 % allowed"]),
    ],
)
def test_a_pool_near_its_limits(host: FakeHost, data: str, metadata: str, said: list[str]) -> None:
    pool = host.volumes["pool0"]
    pool.data_percent, pool.metadata_percent = data, metadata
    found = take().problems
    assert [problem.what for problem in found] == [f"thin pool ovirt-local/pool0: {what}" for what in said]
    assert {problem.kind for problem in found} <= {problems.NEAR_LIMIT}


def in_pool(
    host: FakeHost, volume: str, *more: str, vm: str = VM, pool: str = "pool0", **fields: str
) -> None:
    thin = {"lv_layout": "thin,sparse", "pool_lv": pool, "data_percent": "50.00", **fields}
    host.add(volume, tags(*more, vm=vm), SIZE, **thin)


def test_a_pool_that_fills_up_under_running_vms(host: FakeHost) -> None:
    host.volumes["pool0"].data_percent = "93.75"
    in_pool(host, VOLUME, lv_device_open="open")
    runs(host, (IMAGE, VOLUME, LOCAL))
    host.names = {VM: "web"}
    (filling, near) = take().problems
    assert (filling.kind, near.kind) == (problems.FILLING, problems.NEAR_LIMIT)
    assert filling.what == (
        f"thin pool ovirt-local/pool0 fills up: data 93.8 % used, 64 MiB left; VMs run from it: web ({VM})"
    )
    assert filling.fix == "lvextend --size +SIZE ovirt-local/pool0 (up to 7 GiB are free)"


def test_what_makes_room_in_a_pool(host: FakeHost) -> None:
    host.volumes["pool0"].data_percent = host.volumes["pool0"].metadata_percent = "100.00"
    host.vg["vg_free"] = "0"
    in_pool(host, VOLUME, lv_device_open="open", vm=OTHER_VM)
    in_pool(host, OTHER_VOLUME, f"STOPPED_{NOW}")
    in_pool(host, OTHER_IMAGE, "DELETING")
    host.add(
        IMAGE, {"localdisk", f"TEMPLATE_{IMAGE}", "HOLDS_1048576"}, SIZE, pool_lv="pool0", lv_layout="thin"
    )
    (what, fix) = next((p.what, p.fix) for p in take().problems if p.kind == problems.FILLING)
    assert what == (
        "thin pool ovirt-local/pool0 fills up: data 100.0 %, metadata 100.0 % used, nothing left; "
        f"VMs run from it: ({OTHER_VM})"
    )
    assert fix.split("; ") == [
        "lvextend --size +SIZE ovirt-local/pool0 and lvextend --poolmetadatasize +SIZE ovirt-local/pool0"
        " (after vgextend ovirt-local DEVICE)",
        "localdisk gc removes what is unfinished or given up",
        "localdisk remove DISK gives up one of 1 kept disk",
        "cache.templates: off, then localdisk gc, removes templates of 1 MiB",
    ]


@pytest.mark.parametrize("is_open", ["", "open"])
def test_a_pool_that_fills_up_under_no_vm(host: FakeHost, is_open: str) -> None:
    """A disk that is closed, or being copied."""
    host.volumes["pool0"].data_percent = "95.00"
    in_pool(host, VOLUME, *(["UPDATING"] if is_open else []), lv_device_open=is_open)
    assert problems.FILLING not in kinds(take())


def test_another_pool_of_the_group(host: FakeHost) -> None:
    """A pool that a VM's section names, with the margins of that section."""
    pool = host.volumes["pool0"]
    host.volumes["fast"] = replace_volume(pool, lv_name="fast", lv_uuid="other", data_percent="50.00")
    text = f"vms: {{{VM}: {{thin_pool: fast, margins: {{thin_data: 55%}}}}}}"
    taken = take(text)
    assert taken.volume_groups[0].other_pools == (Pool("fast", 1 << 30, 50.0, 10.94, 55.0, 80.0),)
    assert [p.what for p in taken.problems] == ["thin pool ovirt-local/fast: data 50.0 % of 55 % allowed"]
    assert take().volume_groups[0].other_pools == ()


def test_a_metadata_area_that_is_nearly_full(host: FakeHost) -> None:
    host.vg.update(vg_mda_size="1044480", vg_mda_free="52224")
    (problem,) = take().problems
    assert problem.kind == problems.NEAR_LIMIT
    what = "the metadata area of volume group ovirt-local is nearly full: 90.0 % used, 51 KiB left"
    assert problem.what == what
    assert "localdisk gc" in problem.fix
    host.vg.update(vg_mda_free="62000")
    assert take().problems == ()


def test_a_reserve_that_is_gone(host: FakeHost) -> None:
    (problem,) = take("margins: {reserve: 90%}").problems
    assert problem.what == "volume group ovirt-local has 7 GiB free, less than its reserve of 7.2 GiB"


def test_a_pool_that_does_not_tell(host: FakeHost) -> None:
    host.volumes["pool0"].data_percent = host.volumes["pool0"].metadata_percent = ""
    (problem,) = take().problems
    assert problem.kind == problems.NOT_USABLE
    assert problem.what.startswith(
        "thin pool ovirt-local/pool0 is active, but LVM does not report how full it is"
    )


def test_hostile_words_of_a_vm(host: FakeHost) -> None:
    runs(host, (IMAGE, OTHER_VOLUME, "/x\x1b[2J" + "y" * 500))
    host.xmls[VM] = host.xmls[VM].replace("\x1b", "&#9;").replace("web", "a" * 900)
    (problem,) = take().problems
    assert len(problem.what) < 600
    assert str(problem).isprintable()


# -- templates

TEMPLATE = "33333333-3333-4333-8333-333333333333"  # its volume on shared storage
SHELVED = "44444444-4444-5444-8444-444444444444"  # the template LV
OTHER_SHELVED = "55555555-5555-5555-8555-555555555555"
ON = "cache: {templates: on, max_size: 50%, keep_for: 30d}"
DAY = 86400
SAMPLE = "0" * 32


def shelve(host: FakeHost, *changes: str, name: str = SHELVED, **fields: str) -> Volume:
    """A template LV as it should be, used an hour ago; each of `changes` replaces its kind of tag."""
    usual = ("localdisk", f"TEMPLATE_{TEMPLATE}", f"SOURCE_{FINGERPRINT}", f"SAMPLE_{SAMPLE}")
    kinds_of = {tag.partition("_")[0]: tag for tag in (*usual, f"USED_{NOW - 3600}", *changes)}
    words = {tag for tag in kinds_of.values() if not tag.endswith("_")}
    return host.add(name, words, SIZE, **{"lv_permissions": "read-only", "lv_active": "", **fields})


def unfinished(host: FakeHost, **fields: str) -> Volume:
    usual = {"lv_permissions": "writeable", "lv_active": "active"}
    return shelve(host, "UPDATING", "WRITES_4096", "SAMPLE_", "USED_", **{**usual, **fields})


def shelved(host: FakeHost, text: str = ON) -> TemplateRow:
    taken = take(text)
    assert taken.disks == (), "it is no VM's"
    (found,) = taken.templates
    return found


def filling(**fields: Any) -> Progress:
    return record(**{"vm": "", "image": "", "template": TEMPLATE, **fields})


def test_a_template(host: FakeHost) -> None:
    shelve(host)
    assert shelved(host) == TemplateRow(
        vg="ovirt-local",
        volume=TEMPLATE,
        name=SHELVED,
        size=SIZE,
        backend="lvm",
        state="ready",
        open=False,
        holds=SIZE,
        last_used=NOW - 3600,
        copy=None,
        next=Next("remove", NOW - 3600 + 30 * DAY, "gc removes in 29 d 23 h"),
    )
    assert take(ON).problems == ()


THIN = {"lv_layout": "thin,sparse", "pool_lv": "pool0"}


def test_a_thin_template(host: FakeHost) -> None:
    shelve(host, "HOLDS_8388608", **THIN)
    found = shelved(host)
    assert (found.backend, found.size, found.holds) == ("lvmthin", SIZE, 8 << 20)


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        (ON, (f"USED_{NOW - 31 * DAY}",), Next("remove", NOW, "gc removes it next")),
        ("cache: {templates: off}", (), Next("remove", NOW, "gc removes it next")),
        ("cache: {templates: on, max_size: 1MiB}", (), Next("remove", NOW, "gc removes it next")),
        (
            f"retention: {{erase: zero}}\n{ON}",
            (f"USED_{NOW}",),
            Next("remove", NOW + 30 * DAY, "gc erases in 30 d"),
        ),
        (ON, (f"USED_{NOW + 9}",), Next("keep", None, "kept, see problems")),
    ],
)
def test_what_happens_to_a_template(
    host: FakeHost, text: str, changes: tuple[str, ...], expected: Next
) -> None:
    shelve(host, *changes)
    assert shelved(host, text).next == expected


def test_a_template_that_a_vm_alone_wants(host: FakeHost) -> None:
    shelve(host)
    assert (
        shelved(host, f"vms: {{{VM}: {{cache: {{templates: on}}}}}}").next.text == "gc removes in 29 d 23 h"
    )


def test_a_template_that_is_copied(host: FakeHost) -> None:
    unfinished(host, lv_device_open="open")
    with lock.holding(lock.disk_lock(SHELVED), lambda _: None) as held:
        assert (shelved(host).state, shelved(host).copy) == ("copying", None)
        held.write(filling(done=SIZE // 4, written=40 << 20).as_text())
        found = shelved(host)
        assert (found.state, found.open, found.last_used) == ("copying", True, None)
        assert found.copy == Copy("copying", NOW - 20, 0.25, 40 << 20, 2 << 20, 60)
        assert found.next == Next("copy", NOW + 60, "2 MiB/s 01:00 left")
        assert take(ON).problems == ()


def test_a_template_whose_copy_makes_no_progress(host: FakeHost) -> None:
    unfinished(host)
    with lock.holding(lock.disk_lock(SHELVED), lambda _: None) as held:
        held.write(filling(phase="stalled").as_text())
        assert shelved(host).state == "stalled"
        (problem,) = take().problems
    assert problem.what == f"the copy of template {TEMPLATE} has made no progress for 0 s"


def test_a_template_that_waits_for_its_turn(host: FakeHost) -> None:
    with lock.holding(lock.disk_lock(SHELVED), lambda _: None) as held:
        held.write(filling(phase="waiting").as_text())
        found = shelved(host)
    assert (found.volume, found.name, found.backend, found.size) == (TEMPLATE, SHELVED, "", SIZE)
    assert (found.state, found.holds) == ("waiting", 0)
    assert found.next == Next("copy", None, "waits 20 s for turn")


def test_a_template_that_a_start_looks_at(host: FakeHost) -> None:
    shelve(host)
    with lock.holding(lock.disk_lock(SHELVED), lambda _: None) as held:
        assert shelved(host).next == Next("keep", None, "kept while in use")
        held.write(filling(done=SIZE).as_text())  # it has just been made
        assert (shelved(host).state, shelved(host).copy) == ("ready", None)


def test_a_template_that_a_copy_reads(host: FakeHost) -> None:
    """The copy is a disk's, and holds that disk's lock alone."""
    shelve(host, lv_device_open="open", lv_active="active")
    host.add(VOLUME, tags("UPDATING"), SIZE, lv_device_open="open")
    with lock.holding(lock.disk_lock(VOLUME), lambda _: None) as held:
        held.write(record().as_text())
        taken = take(ON)
    assert taken.problems == ()
    assert [each.state for each in taken.disks] == ["copying"]
    assert [(each.state, each.open, each.next.text) for each in taken.templates] == [
        ("ready", True, "kept while in use")
    ]


def test_a_template_that_is_open_by_no_copy(monkeypatch: pytest.MonkeyPatch, host: FakeHost) -> None:
    shelve(host, lv_device_open="open", lv_active="active")
    monkeypatch.setattr(holders, "described", lambda path: (f"dd (7) {path}", "end it"))
    with lock.holding(lock.disk_lock(OTHER_SHELVED), lambda _: None) as held:
        held.write(filling().as_text())  # of another template, which reads shared storage alone
        (problem,) = take(ON).problems
    path = f"/dev/ovirt-local/{SHELVED}"
    said = f"template LV ovirt-local/{SHELVED} is open, but no copy reads it: dd (7) {path}"
    assert (problem.kind, problem.what) == (problems.OPEN_ELSEWHERE, said)
    assert problem.fix == "end it"


def test_a_template_without_copier(host: FakeHost) -> None:
    unfinished(host)
    assert (shelved(host).state, shelved(host).next.text) == ("unfinished", "gc removes it next")
    (problem,) = take(ON).problems
    assert (problem.kind, problem.fix) == (problems.NO_COPIER, "localdisk gc")
    assert SHELVED in problem.what


@pytest.mark.parametrize(
    ("changes", "fields", "said"),
    [
        ((), {"lv_permissions": "writeable"}, "it can be written to"),
        (("SAMPLE_",), {}, "its tag SAMPLE_ is missing or not alone"),
        (("SOURCE_",), {}, "its tag SOURCE_ is missing or not alone"),
        (("SOURCE_xyz",), {}, "its tag SOURCE_ is missing or not alone"),
    ],
)
def test_a_template_that_is_not_as_it_was_made(
    host: FakeHost, changes: tuple[str, ...], fields: dict[str, str], said: str
) -> None:
    shelve(host, *changes, **fields)
    (problem,) = take(ON).problems
    full = f"ovirt-local/{SHELVED}"
    assert problem.kind == problems.NOT_AS_MADE
    assert problem.what == f"template LV {full} is not as it was made, {said}: no VM starts from it"
    assert problem.fix == "localdisk gc"


def test_a_template_from_the_future(host: FakeHost) -> None:
    shelve(host, f"USED_{NOW + 9}")
    assert kinds(take(ON)) == [problems.CLOCK]


@pytest.mark.parametrize("text", ["", ON])
def test_how_much_the_cache_takes(host: FakeHost, text: str) -> None:
    (group,) = take(text).volume_groups
    assert group.pool
    assert (group.cache is None, group.pool.cache is None) == (not text, not text)
    shelve(host)
    shelve(host, "HOLDS_8388608", name=OTHER_SHELVED, **THIN)
    (group,) = take(text).volume_groups
    assert group.pool
    assert group.cache == CacheUse(SIZE, group.size // 2)
    assert group.pool.cache == CacheUse(8 << 20, group.pool.size // 2)


# -- without root


def dm(directory: Path, number: int, name: str, size: int = SIZE) -> None:
    device = directory / f"dm-{number}"
    (device / "dm").mkdir(parents=True)
    (device / "dm" / "name").write_text(f"{name}\n")
    (device / "size").write_text(f"{size // 512}\n")


def dashed(text: str) -> str:
    return text.replace("-", "--")


def test_without_root(monkeypatch: pytest.MonkeyPatch, host: FakeHost, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(device_mapper, "BLOCK", str(tmp_path / "block"))
    runs(host, (IMAGE, VOLUME, LOCAL))
    host.names = {VM: "web"}
    for number, name in enumerate(
        [
            f"ovirt--local-{dashed(VOLUME)}",
            f"ovirt--local-{dashed(OTHER_VOLUME)}",
            "ovirt--local-pool0",
            f"other-{dashed(VOLUME)}",
            "nonsense",
        ]
    ):
        dm(tmp_path / "block", number, name)
    (tmp_path / "block" / "dm-9").mkdir()  # it has just gone
    (tmp_path / "block" / "sda").mkdir()
    taken = take()
    assert [(each.volume, each.state, each.vm_name, each.disk) for each in taken.disks] == [
        (VOLUME, "running", "web", "vda"),
        (OTHER_VOLUME, "active", "", ""),
    ]
    assert taken.disks[0].size == SIZE
    assert taken.unseen == ("volume groups, closed disks, copies and problems: run localdisk status as root",)
    assert not [command for command in host.commands if command.startswith("lvm")]


def test_without_root_and_devices(monkeypatch: pytest.MonkeyPatch, host: FakeHost, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(device_mapper, "BLOCK", str(tmp_path / "nothing"))
    host.libvirt_is_silent = True
    assert take().disks == ()
    assert len(take().unseen) == 2


# -- JSON


def test_the_json(host: FakeHost) -> None:
    row(host, "STOPPED_5")
    shelve(host, **THIN)
    document = json.loads(output.as_json(take()))
    assert document.keys() == set(SCHEMA["required"])
    (disk,) = document["disks"]
    assert disk.keys() == set(SCHEMA["$defs"]["disk"]["required"])
    assert (disk["stopped"], disk["volume"]) == (5, VOLUME)
    (group,) = document["volume_groups"]
    assert group["pool"]["name"] == "pool0"
    (shelf,) = document["templates"]
    for found, name in ((group, "group"), (group["pool"], "pool"), (shelf, "template")):
        assert found.keys() == set(SCHEMA["$defs"][name]["required"])


def test_the_schema_has_all_words() -> None:
    fields = {name: SCHEMA["$defs"][name]["properties"] for name in ("disk", "template", "copy", "problem")}
    phases = [*progress.PHASES]
    states = {*phases, *(state.value for state in State), "running", "active"}
    assert {*fields["disk"]["state"]["enum"]} == states
    assert {*fields["template"]["state"]["enum"]} == {*phases, "ready", "unfinished"}
    assert fields["copy"]["phase"]["enum"] == phases
    assert fields["problem"]["kind"]["enum"] == list(problems.KINDS)
    for name in ("disk", "template"):
        assert fields[name]["backend"]["enum"] == [*BACKENDS, ""]
    for name, field in (("disk", "state"), ("template", "state"), ("problem", "kind")):
        words = fields[name][field]
        assert [word for word in words["enum"] if f"{word}: " not in words["description"]] == []


def test_what_the_schema_refuses(host: FakeHost) -> None:
    disk = replace(row(host), state="nonsense")
    shelve(host)
    (shelf,) = take().templates
    for taken in (replace(take(), disks=(disk,)), replace(take(), templates=(replace(shelf, name="x"),))):
        document = json.loads(output.as_json(taken))
        assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(document)
