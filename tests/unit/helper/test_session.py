from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdisk import counters, ids, kept, libvirt, lock
from localdisk.counters import Counters
from localdisk.errors import CommandFailed, CommandTimeout
from localdisk.frozen import replace
from localdisk.helper import new_volume
from localdisk.volumes import gc, progress, template, verdict
from localdisk.volumes.local_disk import State, local_disks
from localdisk.volumes.lvm import VolumeGroup
from localdisk.volumes.progress import Progress
from tests.examples import examples
from tests.fakes import (
    EXTENT,
    FINGERPRINT,
    FULLREPORT,
    IMAGE,
    OTHER_FINGERPRINT,
    OTHER_IMAGE,
    OTHER_VM,
    OTHER_VOLUME,
    VM,
    VOLUME,
    FakeHost,
    Killed,
    Volume,
    aside,
    tags,
)
from tests.fakes.session import (
    ACTIVATE,
    CLAIM,
    COMMIT_IT,
    CREATE,
    DRIFTED,
    KEEP,
    KEPT,
    LIST,
    LOOK,
    NAME,
    NEW_TAGS,
    PATH,
    PREPARE,
    PROGRESS,
    RECOPY,
    RELEASE,
    SIZE,
    THIRD_VOLUME,
    TO_PREPARE,
    Ended,
    Hook,
    add_group,
    commit,
    give_up,
    held_elsewhere,
    locks,
    lv_tags,
    parsed,
)

REAL_DM_UUID = VolumeGroup.dm_uuid
ACTIVE = "virsh --readonly --connect qemu:///system list --uuid"
REMOVE = f"lvremove --quiet --yes {NAME}"
MARK = f"lvchange --quiet --addtag DELETING {NAME}"

STAYS = {"stays": True, "path": "", "chunk": 0, "cached": False}


@pytest.fixture(name="host")
def fixture_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHost:
    return FakeHost().install(monkeypatch, tmp_path)


# -- the flows, command by command


def test_first_start_thick(host: FakeHost) -> None:
    hook = Hook(host)
    prepared = hook.start()
    assert prepared == {
        "how": "copy",
        "base": None,
        "path": PATH,
        "target": {
            "path": PATH,
            "dm_uuid": host.dm_uuid(VOLUME),
            "zeroed": False,
            "bandwidth": None,
            "nice": 10,
        },
    }
    assert lv_tags(host) == tags("UPDATING", "WRITES_4096")
    assert locks()[1:] == [f"{VOLUME}.lock"]
    assert hook.ask(PROGRESS) == {}
    assert hook.ask(COMMIT_IT) == {}
    assert lv_tags(host) == tags()
    assert locks() == []
    hook.session.close()
    assert host.commands == [
        LIST,
        LOOK,
        f"{CREATE} {NEW_TAGS} --wipesignatures n --zero y --size {SIZE}b ovirt-local",
        commit(host.volumes[VOLUME].lv_uuid),
    ]


def test_first_start_thin(host: FakeHost) -> None:
    hook = Hook(host)
    target = hook.start(property="lvmthin")["target"]
    assert target["zeroed"]
    hook.ask(COMMIT_IT)
    assert host.volumes[VOLUME].pool_lv == "pool0"
    assert host.commands == [
        LIST,
        LOOK,
        f"{CREATE} {NEW_TAGS} --wipesignatures n --virtualsize {SIZE}b --thinpool ovirt-local/pool0",
        commit(host.volumes[VOLUME].lv_uuid),
    ]


@pytest.mark.parametrize("why", ["made", "held", "old"])
def test_room_is_looked_for_anew(host: FakeHost, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """Another start has made a volume since the claim, or may have been making one; or it is too long ago."""
    hook = Hook(host)
    with contextlib.ExitStack() as stack:
        if why == "held":
            stack.enter_context(lock.holding_space(time.sleep))
        hook.ask(CLAIM)
    if why == "made":
        other = Hook(host)
        assert other.start(image=OTHER_IMAGE, volume=OTHER_VOLUME)["target"]
    if why == "old":
        monkeypatch.setattr(new_volume, "_CURRENT", 0)
    host.commands.clear()
    assert hook.ask(PREPARE)["target"]
    assert host.tools == ["fullreport", "lvcreate"]


def test_room_that_has_come_since_the_claim(host: FakeHost) -> None:
    free, host.vg["vg_free"] = host.vg["vg_free"], "0"
    hook = Hook(host)
    hook.ask(CLAIM)
    host.vg["vg_free"] = free
    assert hook.ask(PREPARE)["target"]
    assert host.tools == ["virsh", "fullreport", "fullreport", "lvcreate"]


def test_restart_of_a_kept_disk(host: FakeHost) -> None:
    host.add(VOLUME, tags("STOPPED_1760000000"), SIZE, lv_active="")
    hook = Hook(host, KEEP)
    assert hook.start() == KEPT
    assert lv_tags(host) == tags()
    assert host.volumes[VOLUME].lv_active
    assert locks() == []
    assert host.commands == [
        LIST,
        LOOK,
        f"lvchange --quiet --deltag STOPPED_1760000000 {NAME}",
        ACTIVATE,
    ]


def test_restart_of_a_disk_that_was_never_stopped(host: FakeHost) -> None:
    """The host lost power while the VM ran."""
    host.add(VOLUME, tags(), SIZE, lv_active="")
    assert Hook(host, KEEP).start() == KEPT
    assert host.commands == [LIST, LOOK, ACTIVATE]


def test_restart_of_a_disk_that_gc_has_seen_unneeded(host: FakeHost) -> None:
    host.add(VOLUME, tags("UNNEEDED_5", "UNNEEDED_x", "STOPPED_5"), SIZE)
    assert Hook(host, KEEP).start() == KEPT
    assert lv_tags(host) == tags()
    assert host.commands[2:] == [
        f"lvchange --quiet --deltag STOPPED_5 --deltag UNNEEDED_5 --deltag UNNEEDED_x {NAME}"
    ]


def test_taking_over_a_disk_of_the_older_hook(host: FakeHost) -> None:
    host.add(VOLUME, tags(ours=False), SIZE)
    assert Hook(host, "retention: {on_stop: keep, older_disks: as_ours}").start() == KEPT
    assert lv_tags(host) == tags() | tags(ours=False)
    assert host.commands[2:] == [f"lvchange --quiet --addtag SOURCE_{FINGERPRINT} --addtag localdisk {NAME}"]


@pytest.mark.parametrize("text", ["", KEEP, "retention: {on_source_change: recopy, erase: zero}"])
def test_a_disk_of_the_older_hook_stays_as_it_is_until_the_operator_decides(
    host: FakeHost, text: str
) -> None:
    """The disk may have months of a guest's data."""
    volume = host.add(VOLUME, tags(ours=False), SIZE // 2, lv_active="")
    assert Hook(host, text).start() == KEPT
    assert host.tools == ["virsh", "fullreport", "lvchange"]
    assert (host.commands[-1], lv_tags(host)) == (ACTIVATE, tags(ours=False))
    assert Hook(host, text).ask(RELEASE) == {}
    assert (host.volumes[VOLUME], lv_tags(host)) == (volume, tags(ours=False))
    hook = Hook(host, text)  # a snapshot was made
    hook.ask(CLAIM, volume=OTHER_VOLUME)
    if "recopy" in text:
        assert hook.ask(PREPARE)["target"]
        assert hook.ask(COMMIT_IT) == {}
    else:
        assert f"ovirt-local/{VOLUME} was not copied from" in hook.refused(PREPARE)
    assert (host.volumes[VOLUME], lv_tags(host), host.removed) == (volume, tags(ours=False), [])


@pytest.mark.parametrize(
    ("more", "text", "fingerprint", "size"),
    [
        (("UPDATING", "WRITES_5"), KEEP, FINGERPRINT, SIZE),
        (("UPDATING", "STOPPED_5"), "", FINGERPRINT, SIZE),
        (("DELETING",), KEEP, FINGERPRINT, SIZE),
        ((), "", FINGERPRINT, SIZE),  # a missed stop
    ],
)
def test_an_old_copy_that_nobody_keeps_is_removed_first(
    host: FakeHost, more: tuple[str, ...], text: str, fingerprint: str, size: int
) -> None:
    host.add(VOLUME, tags(*more, fingerprint=fingerprint), size)
    assert Hook(host, text).start()["target"]
    assert lv_tags(host) == tags("UPDATING", "WRITES_4096")
    assert host.commands[:5] == [LIST, LOOK, LOOK, REMOVE, LOOK]
    assert len(host.commands) == 6


REPLACED = [
    (("STOPPED_5",), "", FINGERPRINT, SIZE),
    (("STOPPED_5",), RECOPY, OTHER_FINGERPRINT, SIZE),
    ((), RECOPY, OTHER_FINGERPRINT, SIZE),
    (("STOPPED_5",), RECOPY, FINGERPRINT, SIZE - EXTENT),
    (("STOPPED_5", "STALE"), RECOPY, FINGERPRINT, SIZE),
]


@pytest.mark.parametrize("name", [VOLUME, OTHER_VOLUME])
@pytest.mark.parametrize(("more", "text", "fingerprint", "size"), REPLACED)
def test_a_kept_disk_is_replaced_once_the_new_one_is_ready(
    host: FakeHost, more: tuple[str, ...], text: str, fingerprint: str, size: int, name: str
) -> None:
    before = tags(*more, fingerprint=fingerprint)
    old = host.add(name, before, size)
    hook = Hook(host, text)
    assert hook.start()["target"]
    assert lv_tags(host) == tags("UPDATING", "WRITES_4096")
    assert old.lv_tags == before
    assert old.lv_name != VOLUME
    assert hook.ask(COMMIT_IT) == {}
    assert host.removed == [old]
    assert {name: volume.lv_tags for name, volume in host.volumes.items()} == {"pool0": set(), VOLUME: tags()}
    assert locks() == []


@pytest.mark.parametrize("name", [VOLUME, OTHER_VOLUME])
@pytest.mark.parametrize("is_killed", [True, False])
def test_a_copy_that_fails_leaves_the_kept_disk(host: FakeHost, name: str, is_killed: bool) -> None:
    """The source is as it was again: the VM goes on with the kept disk, under the name that it asks for."""
    old = host.add(name, tags("STOPPED_5"), SIZE)
    hook = Hook(host, RECOPY)
    assert hook.start(fingerprint=OTHER_FINGERPRINT)["target"]
    if is_killed:
        host.kill_before(0)
    with contextlib.suppress(Killed):
        hook.session.close()
    host.before = {}
    assert Hook(host, KEEP).start() == KEPT
    assert (old.lv_name, old.lv_tags) == (VOLUME, tags())
    assert set(host.volumes) == {"pool0", VOLUME}


@pytest.mark.parametrize("number", range(13))
@pytest.mark.parametrize(
    "text", [RECOPY, "retention: {on_stop: keep, on_source_change: recopy, erase: zero}"]
)
def test_a_replacement_that_is_killed_loses_neither(host: FakeHost, text: str, number: int) -> None:
    """Before its command of that number: the kept disk is there, or the new one is ready."""
    old = host.add(VOLUME, tags("STOPPED_5", fingerprint=OTHER_FINGERPRINT), SIZE)
    host.kill_before(number)
    hook = Hook(host, text)
    with contextlib.suppress(Killed):
        hook.start()
        hook.ask(COMMIT_IT)
    with contextlib.suppress(Killed):
        hook.session.close()
    host.before = {}
    is_ready = any(v.lv_tags == tags() for v in host.volumes.values())
    assert is_ready or old.lv_tags == tags("STOPPED_5", fingerprint=OTHER_FINGERPRINT)
    hook = Hook(host, text)
    if hook.start()["target"]:
        assert hook.ask(COMMIT_IT) == {}
    host.active = {VM}
    assert not gc.collect(parsed(text)).is_problem
    assert {name: volume.lv_tags for name, volume in host.volumes.items()} == {"pool0": set(), VOLUME: tags()}
    assert old in host.removed


@pytest.mark.parametrize("erase", ["none", "zero"])
@pytest.mark.parametrize("name", [VOLUME, OTHER_VOLUME])
def test_a_kept_disk_makes_room_for_the_one_that_replaces_it(host: FakeHost, name: str, erase: str) -> None:
    old = host.add(name, tags("STOPPED_5"), SIZE)
    host.vg["vg_free"] = str(SIZE - EXTENT)
    text = f"retention: {{on_stop: keep, on_source_change: recopy, erase: {erase}}}"
    assert Hook(host, text).start(fingerprint=OTHER_FINGERPRINT)["target"]
    assert host.removed == [old]
    assert host.erased == ({old.lv_uuid} if erase == "zero" else set())


@pytest.mark.parametrize("is_thin", [False, True])
def test_a_kept_disk_that_cannot_be_erased_makes_no_room(host: FakeHost, is_thin: bool) -> None:
    """`erase: discard` would leave its bytes: the start is refused, and the disk is as it was."""
    thin = {"pool_lv": "pool0", "lv_layout": "thin,sparse", "data_percent": "50.00"} if is_thin else {}
    old = host.add(OTHER_VOLUME, tags("STOPPED_5", fingerprint=OTHER_FINGERPRINT), SIZE, lv_active="", **thin)
    before = old.row
    host.cannot_discard.add(f"/dev/ovirt-local/{OTHER_VOLUME}")
    host.volumes["pool0"].kernel_discards = "nopassdown"
    host.volumes["pool0"].data_percent = "90.00"
    host.vg["vg_free"] = str(SIZE - EXTENT)
    hook = Hook(host, "retention: {on_stop: keep, on_source_change: recopy, erase: discard}")
    hook.ask(CLAIM, property="lvmthin" if is_thin else "lvm")
    assert "discard would leave the bytes" in hook.refused(PREPARE)
    assert old.row == before
    assert locks() == []


@pytest.mark.parametrize("name", [VOLUME, OTHER_VOLUME])
@pytest.mark.parametrize("text", [RECOPY, ""])
def test_a_start_that_is_refused_for_room_removes_no_kept_disk(host: FakeHost, name: str, text: str) -> None:
    """Its room would not be enough."""
    old = host.add(name, tags("STOPPED_5", fingerprint=OTHER_FINGERPRINT), SIZE)
    before = old.row
    host.vg["vg_free"] = str(EXTENT)
    hook = Hook(host, text)
    hook.ask(CLAIM)
    assert "lacks" in hook.refused(PREPARE, size=SIZE + 2 * EXTENT)
    assert old.row == before
    assert "lvremove" not in host.tools


def test_a_kept_disk_elsewhere_makes_no_room(host: FakeHost) -> None:
    """A thin one takes nothing of what a preallocated one needs."""
    old = host.add(VOLUME, tags("STOPPED_5"), SIZE, pool_lv="pool0", lv_layout="thin", data_percent="50.0")
    host.vg["vg_free"] = str(EXTENT)
    hook = Hook(host, RECOPY)
    hook.ask(CLAIM)
    assert "lacks" in hook.refused(PREPARE, fingerprint=OTHER_FINGERPRINT)
    assert host.volumes[VOLUME] is old


def test_a_replaced_disk_that_cannot_be_removed_is_left(host: FakeHost) -> None:
    """The new one is ready, and the VM starts; the next start removes the other."""
    old = host.add(OTHER_VOLUME, tags("STOPPED_5", fingerprint=OTHER_FINGERPRINT), SIZE)
    hook = Hook(host, RECOPY)
    assert hook.start()["target"]
    host.fail("lvremove", "  Cannot change VG\n")
    assert hook.ask(COMMIT_IT) == {}
    assert locks() == []
    assert old.lv_name in host.volumes
    assert Hook(host, RECOPY).start() == KEPT
    assert host.removed == [old]


@pytest.mark.parametrize(
    ("fingerprint", "size"), [(OTHER_FINGERPRINT, SIZE), (FINGERPRINT, SIZE - EXTENT)], ids=["source", "size"]
)
def test_a_kept_disk_whose_source_changed_is_refused(host: FakeHost, fingerprint: str, size: int) -> None:
    before = host.add(VOLUME, tags("STOPPED_5", fingerprint=fingerprint), size).row
    hook = Hook(host, KEEP)
    hook.ask(CLAIM)
    assert "has changed since it was copied" in hook.refused(PREPARE)
    assert host.volumes[VOLUME].row == before
    assert host.commands == [LIST, LOOK]
    assert locks() == []


@pytest.mark.parametrize("text", [RECOPY, ""])
@pytest.mark.parametrize("is_late", [False, True])
def test_a_kept_disk_that_others_depend_on_is_not_replaced(host: FakeHost, text: str, is_late: bool) -> None:
    """If it has the claimed name, the start is refused, even if the snapshot is made only just before."""
    before = tags("STOPPED_5", fingerprint=OTHER_FINGERPRINT)
    old = host.add(VOLUME, before, SIZE)
    hook = Hook(host, text)
    if is_late:
        hook.ask(CLAIM)
        host.before_command(0, lambda: void(host.add("backup", (), SIZE, origin=VOLUME)))
    else:
        host.add("backup", (), SIZE, origin=VOLUME)
        hook.ask(CLAIM)
    assert "LVM would remove backup along with" in hook.refused(PREPARE)
    assert (host.volumes[VOLUME], old.lv_tags, host.removed) == (old, before, [])


@pytest.mark.parametrize("text", [RECOPY, ""])
@pytest.mark.parametrize("more", [("STOPPED_5",), ("DELETING",)])
def test_a_disk_of_another_leaf_that_others_depend_on_is_left(
    host: FakeHost, text: str, more: tuple[str, ...]
) -> None:
    before = tags(*more, fingerprint=OTHER_FINGERPRINT)
    old = host.add(OTHER_VOLUME, before, SIZE)
    host.add("backup", (), SIZE, origin=OTHER_VOLUME)
    hook = Hook(host, text)
    assert hook.start()["target"]
    assert hook.ask(COMMIT_IT) == {}
    assert (host.volumes[OTHER_VOLUME], old.lv_tags, host.removed) == (old, before, [])


def void(_value: object) -> None:
    """For what is called for its effect."""


def test_margin_bandwidth_and_niceness_are_the_configurations(host: FakeHost) -> None:
    text = "{margins: {disk: 10%}, copy: {bandwidth: 10MiB, parallel: 4, nice: 3}, volume_group: ovirt-local}"
    target = Hook(host, text).start()["target"]
    assert (target["bandwidth"], target["nice"]) == (10 * (1 << 20) // 4, 3)
    assert f"--size {SIZE + SIZE // 10}b" in host.commands[2]


def test_devices_of_the_configuration(host: FakeHost) -> None:
    hook = Hook(host, "devices: [/dev/vda]")
    answer = {}
    with contextlib.suppress(AssertionError):  # the fake takes no devices
        answer = hook.ask(CLAIM)
    assert answer == {}
    assert host.commands == [LIST, f"{FULLREPORT} --devices /dev/vda ovirt-local"]


def test_two_disks_in_one_run(host: FakeHost) -> None:
    hook = Hook(host)
    others = {"image": OTHER_IMAGE, "volume": OTHER_VOLUME}
    assert hook.start()["target"]
    assert hook.ask(COMMIT_IT) == {}
    assert hook.start(**others)["target"]
    assert hook.ask(COMMIT_IT) == {}
    assert (lv_tags(host), lv_tags(host, OTHER_VOLUME)) == (tags(), tags(image=OTHER_IMAGE))


def test_a_new_claim_gives_up_the_old_one(host: FakeHost) -> None:
    hook = Hook(host)
    hook.start()
    assert hook.ask(CLAIM, image=OTHER_IMAGE, volume=OTHER_VOLUME) == TO_PREPARE
    assert VOLUME not in host.volumes
    assert locks() == [f"{OTHER_VOLUME}.lock"]


# -- disks in another volume group


ELSEWHERE = "{{retention: {{on_stop: {}}}, vms: {{" + VM + ": {{volume_group: fast}}}}}}"


@pytest.mark.parametrize(
    ("more", "on_stop", "is_refused"),
    [
        (("STOPPED_5",), "keep", True),
        (("STOPPED_5",), "delete", True),
        ((), "keep", True),
        ((), "delete", False),  # gc removes it
        (("DRIFTED_5",), "delete", True),
        (("UPDATING",), "keep", False),
        (("DELETING",), "keep", False),
    ],
)
def test_a_kept_disk_in_another_group_is_not_passed_over(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], on_stop: str, is_refused: bool
) -> None:
    """`volume_group` was changed after its VM had stopped."""
    add_group(monkeypatch, "fast")
    host.add(VOLUME, tags(*more), SIZE)
    hook = Hook(host, ELSEWHERE.format(on_stop))
    if is_refused:
        assert f"ovirt-local/{VOLUME} of this VM is kept" in hook.refused(CLAIM)
        assert locks() == []
    else:
        assert hook.ask(CLAIM) == TO_PREPARE
    assert hook.ask(CLAIM, image=OTHER_IMAGE, volume=OTHER_VOLUME) == TO_PREPARE


def test_other_groups_are_not_read_for_a_vm_without_kept_disks(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.note(kept.ALL)
    hook = Hook(host, f"vms: {{{OTHER_VM}: {{volume_group: gone}}}}")
    assert hook.ask(CLAIM) == TO_PREPARE
    assert host.tools.count("fullreport") == 1


@pytest.mark.parametrize("on_stop", ["keep", "delete"])
def test_a_stop_after_the_volume_group_was_changed(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, on_stop: str
) -> None:
    add_group(monkeypatch, "fast")
    volume = host.add(VOLUME, tags(), SIZE)
    assert Hook(host, ELSEWHERE.format(on_stop)).ask(RELEASE) == {}
    if on_stop == "keep":
        assert any(tag.startswith("STOPPED_") for tag in volume.lv_tags)
    else:
        assert host.removed == [volume]


def test_a_stop_leaves_what_was_kept_in_another_group(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its start was refused for the sake of this disk, and now the engine destroys the VM."""
    add_group(monkeypatch, "fast")
    volume = host.add(VOLUME, tags("STOPPED_5"), SIZE)
    hook = Hook(host, ELSEWHERE.format("delete"))
    assert f"ovirt-local/{VOLUME} of this VM is kept" in hook.refused(CLAIM)
    assert hook.ask(RELEASE) == {}
    assert volume.lv_tags == tags("STOPPED_5")


def test_a_vm_that_still_runs_in_another_group(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    add_group(monkeypatch, "fast")
    host.add(VOLUME, tags(), SIZE, lv_device_open="open")
    host.active = {VM}
    assert "as still running" in Hook(host, ELSEWHERE.format("delete")).refused(RELEASE)


@pytest.mark.parametrize("more", ["DRIFTED_5", "STOPPED_5", "STALE"])
def test_a_disk_in_another_group_is_not_passed_over_after_gc(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    host.add(VOLUME, tags(more), SIZE)
    host.defined = {VM}
    monkeypatch.setattr(time, "time", lambda: 6.0)
    gc.collect(parsed(KEEP))
    assert not kept.may_have(OTHER_VM)
    add_group(monkeypatch, "fast")
    assert f"ovirt-local/{VOLUME} of this VM is kept" in Hook(host, ELSEWHERE.format("keep")).refused(CLAIM)


@pytest.mark.parametrize("change", ["enabled: off", f"disks: [{OTHER_IMAGE}]"])
def test_a_disk_in_another_group_of_an_image_that_stays_shared(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    add_group(monkeypatch, "fast")
    host.add(VOLUME, tags("STOPPED_5"), SIZE)
    hook = Hook(host, f"vms: {{{VM}: {{volume_group: fast, {change}}}, {OTHER_VM}: {{backend: lvmthin}}}}")
    (looked,) = hook.ask(LOOK_AT_IT)["disks"]
    assert (looked["local"], looked["kept"]) == (False, True)


@pytest.mark.parametrize("is_own", [True, False])
def test_a_doubt_about_a_group_that_cannot_be_read(host: FakeHost, is_own: bool) -> None:
    """It refuses starts in this group only."""
    text = f"{{vms: {{{VM if is_own else OTHER_VM}: {{volume_group: gone}}}}}}"
    host.add(OTHER_VOLUME, tags("STOPPED_5"), SIZE)
    hook = Hook(host, text)
    assert "no volume group gone" in hook.refused({"verb": "stale", "vm": VM, "images": ["*"]})
    assert kept.doubted(VM) == ("*/gone",)
    assert "STALE" in host.volumes[OTHER_VOLUME].lv_tags
    host.volumes[OTHER_VOLUME].lv_tags.discard("STALE")  # the operator has decided
    if is_own:
        assert "no volume group gone" in hook.refused(CLAIM)
    else:
        assert hook.ask(CLAIM) == TO_PREPARE
    gc.collect(parsed(text))
    assert "STALE" not in host.volumes[OTHER_VOLUME].lv_tags, "what was in doubt is another group's"
    assert kept.doubted(VM) == ("*/gone",)


def test_a_drift_after_the_volume_group_was_changed(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    add_group(monkeypatch, "fast")
    volume = host.add(VOLUME, tags(), SIZE)
    ran_from = [{"image": IMAGE, "path": "/rhev/x"}]
    request = {"verb": "drifted", "vm": VM, "property": "lvm", "disks": ran_from}
    assert Hook(host, ELSEWHERE.format("delete")).ask(request) == {}
    assert any(tag.startswith("DRIFTED_") for tag in volume.lv_tags)


@pytest.mark.parametrize("request_", [CLAIM, RELEASE])
def test_a_group_of_other_vms_that_cannot_be_read_refuses_nothing(
    host: FakeHost, request_: dict[str, object], logged: list[str]
) -> None:
    assert "error" not in Hook(host, f"vms: {{{OTHER_VM}: {{volume_group: gone}}}}").ask(request_)
    assert "cannot look at a volume group" in "".join(logged)


# -- disks that must be erased before they are removed


ERASE = "retention: {erase: zero}"
ASIDE = aside("zero", THIRD_VOLUME)  # still under its old name, as a killed helper leaves it


def set_aside(host: FakeHost) -> list[str]:
    """The uuids of the volumes that were set aside."""
    names = set(host.volumes) - {VOLUME, OTHER_VOLUME, "pool0"}
    assert all(lv_tags(host, name) == aside("zero", name) for name in names)
    return sorted(host.volumes[name].lv_uuid for name in names)


def test_an_old_copy_is_set_aside_and_the_new_one_made_at_once(host: FakeHost) -> None:
    old = host.add(VOLUME, tags(), SIZE)
    assert Hook(host, ERASE).start()["target"]
    assert lv_tags(host) == tags("UPDATING", "WRITES_4096")
    assert set_aside(host) == [old.lv_uuid]
    assert host.tools == [
        *("virsh", "fullreport", "fullreport", "lvchange", "lvrename", "fullreport", "lvcreate"),
    ]


def test_an_unfinished_copy_is_set_aside(host: FakeHost) -> None:
    hook = Hook(host, ERASE)
    hook.start()
    made = host.volumes[VOLUME].lv_uuid
    hook.session.close()
    assert set_aside(host) == [made]
    assert host.tools[3:] == ["fullreport", "lvchange", "lvrename"]
    assert locks() == []


@pytest.mark.parametrize("text", ["", KEEP, ERASE, "retention: {erase: discard}"])
@pytest.mark.parametrize("vm", [VM, OTHER_VM])
@pytest.mark.parametrize("has_name", [True, False])
def test_a_disk_that_is_set_aside_under_its_old_name(
    host: FakeHost, text: str, vm: str, has_name: bool
) -> None:
    """The helper was killed before it could rename it. It is nobody's, whoever starts."""
    old = host.add(VOLUME, ASIDE if has_name else ASIDE - {f"ASIDE_{THIRD_VOLUME}"}, SIZE)
    pair = {"image": IMAGE, "volume": VOLUME}
    hook = Hook(host, text)
    (row,) = hook.ask({"verb": "look", "vm": vm, "property": "lvm", "disks": [pair]})["disks"]
    assert row == {"local": True, "kept": False, "ready": False, "state": "deleting", "path": PATH}
    assert hook.start(vm=vm)["target"]
    assert lv_tags(host) == tags("UPDATING", "WRITES_4096", vm=vm)
    assert set_aside(host) == [old.lv_uuid]
    assert (old.lv_name == THIRD_VOLUME) == has_name
    assert host.tools[4:] == [*([] if has_name else ["lvchange"]), "lvrename", "fullreport", "lvcreate"]
    assert host.removed == []


def test_nobody_gets_the_name_of_a_disk_that_was_set_aside(host: FakeHost) -> None:
    """No disk of a VM has it: whoever asks for it made it up."""
    before = host.add(VOLUME, aside("zero", VOLUME), SIZE).row
    hook = Hook(host)
    assert hook.ask(CLAIM) == TO_PREPARE
    assert "already exists" in hook.refused(PREPARE)
    assert host.volumes[VOLUME].row == before
    assert locks() == []


@pytest.mark.parametrize("is_made", [True, False], ids=["to end", "to start"])
@pytest.mark.parametrize("is_next_a_gc", [True, False])
def test_a_rename_that_fails_is_done_by_whoever_comes_next(
    host: FakeHost, is_made: bool, is_next_a_gc: bool
) -> None:
    """Whether it was to give up what it made, or to replace what was there."""
    hook = Hook(host, ERASE)
    if is_made:
        hook.start()
    else:
        host.add(VOLUME, tags(), SIZE)
    old = host.volumes[VOLUME]
    host.fail("lvrename", "  Failed to write VG ovirt-local.\n")
    if is_made:
        hook.session.close()
    else:
        hook.ask(CLAIM)
        assert "Failed to write VG" in hook.refused(PREPARE)
    (recorded,) = (tag[6:] for tag in old.lv_tags if tag.startswith("ASIDE_"))
    assert host.volumes[VOLUME] is old
    assert old.lv_tags == aside("zero", recorded)
    assert locks() == []
    if is_next_a_gc:
        assert not gc.collect(parsed(ERASE)).is_problem
    else:
        assert Hook(host, ERASE).start()["target"]
        assert set_aside(host) == [old.lv_uuid]
    assert old.lv_name == recorded
    host.active = {VM}
    assert not gc.collect(parsed("")).is_problem
    assert [volume.lv_uuid for volume in host.removed] == [old.lv_uuid]
    assert host.erased == {old.lv_uuid}


def test_an_open_disk_that_is_set_aside_is_busy(host: FakeHost) -> None:
    before = host.add(VOLUME, ASIDE, SIZE, lv_device_open="open").row
    hook = Hook(host)
    assert hook.ask(CLAIM) == TO_PREPARE
    assert "is deleting and still open" in hook.refused(PREPARE)
    assert host.volumes[VOLUME].row == before


@pytest.mark.parametrize("is_open", ["", "open"])
def test_a_running_vm_has_nothing_to_do_with_a_disk_that_is_set_aside(host: FakeHost, is_open: str) -> None:
    before = host.add(VOLUME, ASIDE, SIZE, lv_device_open=is_open).row
    host.active = {VM}
    assert Hook(host).ask(CLAIM) == STAYS
    host.libvirt_is_silent = True
    assert "check that libvirt runs" in Hook(host).refused(CLAIM)
    assert host.volumes[VOLUME].row == before


def test_release_leaves_what_is_set_aside(host: FakeHost) -> None:
    host.add(VOLUME, ASIDE, SIZE)
    assert Hook(host).ask(RELEASE) == {}
    assert host.commands == [LOOK]


@pytest.mark.parametrize("text", ["", ERASE])
@pytest.mark.parametrize("number", range(12))
def test_a_start_that_is_killed_is_made_good_by_the_next_and_by_gc(
    host: FakeHost, text: str, number: int
) -> None:
    """Killed before its command of that number, with an old copy to replace and one of another leaf."""
    old = [host.add(VOLUME, tags(), SIZE), host.add(OTHER_VOLUME, tags(), SIZE)]
    host.kill_before(number)
    hook = Hook(host, text)
    with contextlib.suppress(Killed):
        hook.start()
        hook.ask(COMMIT_IT)
    with contextlib.suppress(Killed):
        hook.session.close()
    host.before = {}
    hook = Hook(host, text)
    assert hook.start()["target"]
    assert hook.ask(COMMIT_IT) == {}
    host.active = {VM}
    assert not gc.collect(parsed(text)).is_problem
    assert {name: volume.lv_tags for name, volume in host.volumes.items()} == {"pool0": set(), VOLUME: tags()}
    assert {volume.lv_uuid for volume in old} <= {volume.lv_uuid for volume in host.removed}
    assert host.erased == ({volume.lv_uuid for volume in host.removed} if text else set())
    assert locks() == []


# -- copies of what was the image's leaf before


def with_other_leaf(host: FakeHost, *more: str, **fields: str) -> Volume:
    return host.add(OTHER_VOLUME, tags(*more), SIZE, **fields)


@pytest.mark.parametrize("more", [("UPDATING", "WRITES_5"), ("DELETING",)])
@pytest.mark.parametrize("ours", [None, (), ("STOPPED_5",)])
def test_a_copy_of_another_leaf_that_nobody_keeps_is_removed(
    host: FakeHost, more: tuple[str, ...], ours: tuple[str, ...] | None
) -> None:
    with_other_leaf(host, *more)
    if ours is not None:
        host.add(VOLUME, tags(*ours), SIZE)
    prepared = Hook(host, KEEP).start()
    assert (prepared["target"] is None) == (ours is not None)
    assert set(host.volumes) == {"pool0", VOLUME}
    assert host.commands[2:4] == [LOOK, f"lvremove --quiet --yes ovirt-local/{OTHER_VOLUME}"]
    assert f"{OTHER_VOLUME}.lock" not in locks() or prepared["target"]


@pytest.mark.parametrize("more", [(), ("STOPPED_5",), ("UNNEEDED_5",)])
@pytest.mark.parametrize("ours", [None, ("UPDATING", "WRITES_5"), ("DELETING",)])
def test_a_kept_copy_of_the_same_bytes_is_used_whatever_the_leaf_is_called_now(
    host: FakeHost, more: tuple[str, ...], ours: tuple[str, ...] | None
) -> None:
    """An empty layer was put upon the leaf that was copied, or removed from it."""
    kept = with_other_leaf(host, *more, lv_active="")
    if ours is not None:
        host.add(VOLUME, tags(*ours), SIZE)
    assert Hook(host, KEEP).start() == KEPT
    assert (kept.lv_name, kept.lv_tags, kept.lv_active) == (VOLUME, tags(), "active")
    assert set(host.volumes) == {"pool0", VOLUME}
    assert locks() == []


@pytest.mark.parametrize(("text", "is_left"), [(KEEP, True), (RECOPY, False)])
def test_of_two_kept_copies_the_one_of_the_same_bytes_is_used(
    host: FakeHost, text: str, is_left: bool
) -> None:
    """The other one has the name that the VM asks for, and gets another."""
    kept = with_other_leaf(host, "STOPPED_5")
    other = host.add(VOLUME, tags("STOPPED_6", fingerprint=OTHER_FINGERPRINT), SIZE)
    assert Hook(host, text).start() == KEPT
    assert (kept.lv_name, kept.lv_tags) == (VOLUME, tags())
    assert (other.lv_name in host.volumes) == is_left
    assert not is_left or other.lv_tags == tags("STOPPED_6", fingerprint=OTHER_FINGERPRINT)
    assert locks() == []


@pytest.mark.parametrize(
    ("name", "more", "fingerprint", "said"),
    [
        (OTHER_VOLUME, (), OTHER_FINGERPRINT, f"volume {VOLUME} shows now"),
        (OTHER_VOLUME, ("STALE",), FINGERPRINT, "lvchange --deltag STALE ovirt-local/"),
        (VOLUME, ("STALE",), FINGERPRINT, "is stale"),
    ],
)
def test_a_kept_copy_that_the_operator_must_decide_about_is_left(
    host: FakeHost, name: str, more: tuple[str, ...], fingerprint: str, said: str
) -> None:
    before = host.add(name, tags("STOPPED_5", *more, fingerprint=fingerprint), SIZE).row
    hook = Hook(host, KEEP)
    hook.ask(CLAIM)
    assert said in hook.refused(PREPARE)
    assert host.volumes[name].row == before
    assert locks() == []


@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_kept_copy_under_another_name_that_cannot_be_activated(host: FakeHost, is_stopped: bool) -> None:
    kept = with_other_leaf(host, *(["STOPPED_5"] * is_stopped), lv_active="")
    host.fail("lvchange", "  Cannot activate\n", when="--activate y")
    hook = Hook(host, KEEP)
    hook.ask(CLAIM)
    assert "Cannot activate" in hook.refused(PREPARE)
    assert (kept.lv_tags, kept.lv_active) == (tags(*(["STOPPED_5"] * is_stopped)), "")
    assert Hook(host, KEEP).start() == KEPT


def test_the_copy_of_another_leaf_is_erased_by_gc(host: FakeHost) -> None:
    other = with_other_leaf(host)
    assert Hook(host, ERASE).start()["target"]
    assert set_aside(host) == [other.lv_uuid]
    assert "blkdiscard" not in host.tools


@pytest.mark.parametrize(
    ("lv_tags_", "is_open"),
    [
        (tags(), "open"),
        (tags("UPDATING"), "open"),
        (tags(vm=OTHER_VM), ""),
        (tags(image=OTHER_IMAGE), ""),
        (tags(f"VM_{OTHER_VM}"), ""),
        ({"localdisk"}, ""),
    ],
    ids=["open", "open and unfinished", "of another VM", "of another image", "of two VMs", "of none"],
)
def test_disks_that_a_start_leaves(host: FakeHost, lv_tags_: set[str], is_open: str) -> None:
    before = host.add(OTHER_VOLUME, lv_tags_, SIZE, lv_device_open=is_open).row
    assert Hook(host).start()["target"]
    assert host.volumes[OTHER_VOLUME].row == before


def test_another_leaf_that_is_locked_is_waited_for(host: FakeHost) -> None:
    before = with_other_leaf(host).row
    hook = Hook(host)
    hook.ask(CLAIM)
    with lock.holding(lock.disk_lock(OTHER_VOLUME), give_up), pytest.raises(Ended):
        hook.ask(PREPARE)
    assert host.volumes[OTHER_VOLUME].row == before


@pytest.mark.parametrize(
    "change",
    [
        {"lv_device_open": "open"},
        {"lv_tags": tags(vm=OTHER_VM)},
        {"lv_tags": tags(image=OTHER_IMAGE)},
    ],
    ids=str,
)
def test_another_leaf_is_looked_at_again_under_its_lock(host: FakeHost, change: dict[str, Any]) -> None:
    volume = with_other_leaf(host)
    host.before_command(2, lambda: vars(volume).update(change))
    assert Hook(host).start()["target"]
    assert OTHER_VOLUME in host.volumes


def test_another_leaf_that_appears_meanwhile_is_left(host: FakeHost) -> None:
    """Its lock is not ours."""
    with_other_leaf(host)

    def add() -> None:
        host.add(THIRD_VOLUME, tags(), SIZE)

    host.before_command(2, add)
    assert Hook(host).start()["target"]
    assert set(host.volumes) == {"pool0", VOLUME, THIRD_VOLUME}


def test_a_start_that_is_refused_takes_nothing_away(host: FakeHost) -> None:
    with_other_leaf(host, "DELETING")
    host.add(VOLUME, tags("STOPPED_5", fingerprint=OTHER_FINGERPRINT), SIZE)
    hook = Hook(host, KEEP)
    hook.ask(CLAIM)
    assert "has changed since it was copied" in hook.refused(PREPARE)
    assert set(host.volumes) == {"pool0", VOLUME, OTHER_VOLUME}


def test_a_running_vm_keeps_the_copy_of_another_leaf(host: FakeHost) -> None:
    """A snapshot was made while it runs: the shared leaf is another, its local disk is not."""
    before = with_other_leaf(host, lv_device_open="open").row
    host.active = {VM}
    assert Hook(host).ask(CLAIM)["stays"]
    assert host.volumes[OTHER_VOLUME].row == before


def test_locks_of_other_leaves_are_let_go_of_after_a_failure(host: FakeHost) -> None:
    with_other_leaf(host)
    host.fail("lvremove", "  Cannot change VG\n")
    hook = Hook(host)
    hook.ask(CLAIM)
    assert "Cannot change VG" in hook.refused(PREPARE)
    assert locks() == []


# -- looking


@pytest.mark.parametrize(
    ("more", "active", "state", "ready"),
    [
        (None, "", "absent", False),
        ((), "active", "ready", True),
        ((), "", "ready", False),
        (("UPDATING",), "active", "unfinished", False),
        (("STOPPED_5",), "active", "stopped", False),
        (("DELETING",), "active", "deleting", False),
    ],
)
def test_look(host: FakeHost, more: tuple[str, ...] | None, active: str, state: str, ready: bool) -> None:
    if more is not None:
        host.add(VOLUME, tags(*more), SIZE, lv_active=active)
    pair = {"image": IMAGE, "volume": VOLUME}
    answer = Hook(host).ask({"verb": "look", "vm": VM, "property": "on", "disks": [pair, pair]})
    is_kept = state in ("ready", "stopped")
    row = {"local": True, "kept": is_kept, "ready": ready, "state": state, "path": PATH}
    assert answer == {"disks": [row, row]}
    assert host.commands == [LOOK]
    assert locks() == []


def test_look_at_nothing(host: FakeHost) -> None:
    answer = Hook(host).ask({"verb": "look", "vm": VM, "property": "lvm", "disks": []})
    assert answer == {"disks": []}


# -- what stays on shared storage


@pytest.mark.parametrize(
    ("text", "is_local"),
    [
        (f"vms: {{{VM}: {{enabled: false}}}}", False),
        (f"vms: {{{VM}: {{disks: [{OTHER_IMAGE}]}}}}", False),
        (f"vms: {{{VM}: {{disks: [{IMAGE}]}}}}", True),
        (f"vms: {{{OTHER_VM}: {{enabled: false}}}}", True),
    ],
)
def test_disks_that_stay(host: FakeHost, text: str, is_local: bool) -> None:
    pair = {"image": IMAGE, "volume": VOLUME}
    hook = Hook(host, text)
    assert hook.ask(CLAIM) == (TO_PREPARE if is_local else STAYS)
    (row,) = hook.ask({"verb": "look", "vm": VM, "property": "lvm", "disks": [pair]})["disks"]
    assert row["local"] is is_local
    if not is_local:
        assert host.commands == [LOOK]
        assert "wrong order" in hook.refused(PREPARE)


def test_a_foreign_volume_is_nobodys_business_where_the_disk_stays(host: FakeHost) -> None:
    host.add(VOLUME, {"someone"})
    hook = Hook(host, f"vms: {{{VM}: {{enabled: false}}}}")
    assert hook.ask(CLAIM)["stays"]
    pair = {"image": IMAGE, "volume": VOLUME}
    assert hook.ask({"verb": "look", "vm": VM, "property": "lvm", "disks": [pair]})["disks"]


# -- disks of others


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (tags(vm=OTHER_VM), f"belongs to VM {OTHER_VM}, image {IMAGE}"),
        (tags("UPDATING", vm=OTHER_VM), f"belongs to VM {OTHER_VM}"),
        (tags("DELETING", vm=OTHER_VM), f"belongs to VM {OTHER_VM}"),
        (tags(image=OTHER_IMAGE), f"belongs to VM {VM}, image {OTHER_IMAGE}"),
        (tags(ours=False, vm=OTHER_VM), f"belongs to VM {OTHER_VM}"),
        (set(), "exists and is not localdisk's"),
        ({"localdisk"}, "exists and is not localdisk's"),
        (tags(f"VM_{OTHER_VM}"), "exists and is not localdisk's"),
    ],
)
@pytest.mark.parametrize("is_running", [False, True])
def test_volumes_of_others(host: FakeHost, others: set[str], message: str, is_running: bool) -> None:
    before = host.add(VOLUME, others, SIZE).row
    host.active = {VM} if is_running else set()
    hook = Hook(host, KEEP)
    assert message in hook.refused(CLAIM)
    pair = {"image": IMAGE, "volume": VOLUME}
    assert message in hook.refused({"verb": "look", "vm": VM, "property": "lvm", "disks": [pair]})
    assert "wrong order" in hook.refused(PREPARE)
    assert hook.ask(RELEASE, vm="dddddddd-dddd-4ddd-8ddd-dddddddddddd") == {}
    assert host.volumes[VOLUME].row == before
    assert host.lvm_commands == [LOOK] * 3
    assert locks() == []


# -- VMs that run


@pytest.mark.parametrize("more", [(), ("STOPPED_5", "UNNEEDED_6")])
def test_a_running_vm_keeps_its_disk(host: FakeHost, more: tuple[str, ...]) -> None:
    host.add(VOLUME, tags(*more, fingerprint=OTHER_FINGERPRINT), 512, lv_device_open="open")
    host.active = {VM}
    hook = Hook(host)
    assert hook.ask(CLAIM) == {**TO_PREPARE, "path": PATH}
    assert lv_tags(host) == tags(fingerprint=OTHER_FINGERPRINT)
    bookkeeping = [f"lvchange --quiet --deltag STOPPED_5 --deltag UNNEEDED_6 {NAME}"] if more else []
    assert host.commands == [LIST, LOOK, *bookkeeping]
    assert locks() == []
    assert "wrong order" in hook.refused(PREPARE)


def test_a_vm_that_runs_from_shared_storage_stays_there(host: FakeHost) -> None:
    host.active = {VM}
    hook = Hook(host)
    assert hook.ask(CLAIM) == STAYS
    assert "wrong order" in hook.refused(PREPARE)
    before = host.add(VOLUME, tags(), SIZE).row
    assert hook.ask(CLAIM) == STAYS
    assert "wrong order" in hook.refused(PREPARE)
    assert host.volumes[VOLUME].row == before
    assert locks() == []


@pytest.mark.parametrize("state", ["UPDATING", "DELETING"])
@pytest.mark.parametrize("is_open", ["", "open"])
def test_an_unfinished_disk_of_a_running_vm(host: FakeHost, state: str, is_open: str) -> None:
    before = host.add(VOLUME, tags(state), SIZE, lv_device_open=is_open).row
    host.active = {VM}
    assert f"VM {VM} as running : stop the VM" in Hook(host).refused(CLAIM)
    assert host.volumes[VOLUME].row == before
    assert locks() == []


@pytest.mark.parametrize("more", [(), ("UPDATING",), ("DELETING",), ("STOPPED_5",)])
@pytest.mark.parametrize("text", ["", KEEP])
def test_an_open_disk_of_a_vm_that_does_not_run(host: FakeHost, more: tuple[str, ...], text: str) -> None:
    before = host.add(VOLUME, tags(*more), SIZE, lv_device_open="open").row
    hook = Hook(host, text)
    assert hook.ask(CLAIM) == TO_PREPARE
    assert "still open by something" in hook.refused(PREPARE)
    assert host.volumes[VOLUME].row == before
    assert locks() == []


def test_a_vm_that_is_only_defined_does_not_run(host: FakeHost) -> None:
    """vdsm defines the domain before it prepares the disks."""
    host.defined = {VM}
    assert Hook(host).start()["target"]


@pytest.mark.parametrize("more", [None, (), ("UPDATING",), ("DELETING",), ("STOPPED_5",), ("UNNEEDED_5",)])
@pytest.mark.parametrize("text", ["", KEEP])
def test_a_vm_that_is_shut_off_stays_as_it_is(
    host: FakeHost, more: tuple[str, ...] | None, text: str
) -> None:
    """vdsm, restarted, recovers it, too: its domain is persistent, with the disks that it ran from."""
    before = None if more is None else host.add(VOLUME, tags(*more), SIZE).row
    host.shut_off = {VM}
    hook = Hook(host, text)
    assert hook.ask(CLAIM) == STAYS
    assert "wrong order" in hook.refused(PREPARE)
    assert before is None or host.volumes[VOLUME].row == before
    assert host.commands == [LIST, LOOK]
    assert locks() == []


def now() -> int:
    return int(time.monotonic() * 1000)


def test_libvirt_is_not_asked_twice_about_a_start(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE)
    assert Hook(host, KEEP).start(seen=now()) == KEPT
    assert host.commands == [LOOK]


@pytest.mark.parametrize("later", [-libvirt.RECENT, 3600])
def test_what_the_hook_has_seen_does_not_count_for_long(host: FakeHost, later: float) -> None:
    """sudo may have waited for hours between the hook's question and its claim; nobody asks in the future."""
    host.shut_off = {VM}
    assert Hook(host).ask(CLAIM, seen=now() + int(later * 1000)) == STAYS
    assert host.commands == [LIST, LOOK]


def test_after_a_wait_for_the_lock_libvirt_is_asked_again(host: FakeHost) -> None:
    """What the hook has seen may be from hours ago: meanwhile the VM was started and shut off."""
    host.shut_off = {VM}
    elsewhere = held_elsewhere(lock.disk_lock(VOLUME))
    next(elsewhere)

    def let_go(_seconds: float) -> None:
        next(elsewhere, None)

    assert Hook(host, pause=let_go).ask(CLAIM, seen=now()) == STAYS
    assert host.commands == [LIST, LOOK]


def test_after_a_doubt_about_kept_disks_libvirt_is_asked_again(host: FakeHost) -> None:
    host.shut_off = {VM}
    kept.doubt(VM, [IMAGE])
    assert Hook(host).ask(CLAIM, seen=now()) == STAYS


def test_without_libvirt_an_open_disk_is_in_use(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE, lv_device_open="open")
    host.libvirt_is_silent = True
    assert Hook(host).ask(CLAIM)["path"] == PATH


@pytest.mark.parametrize("more", [None, (), ("UPDATING",)])
def test_without_libvirt_nothing_is_made_or_removed(host: FakeHost, more: tuple[str, ...] | None) -> None:
    if more is not None:
        host.add(VOLUME, tags(*more), SIZE)
    host.libvirt_is_silent = True
    assert "check that libvirt runs" in Hook(host).refused(CLAIM)
    assert locks() == []


# -- room


@pytest.mark.parametrize("value", ["lvm", "lvmthin"])
def test_without_room_nothing_is_made(host: FakeHost, value: str) -> None:
    host.vg["vg_free"] = str(SIZE - EXTENT)
    host.volumes["pool0"].data_percent = "90.01"
    hook = Hook(host)
    hook.ask(CLAIM, property=value)
    message = hook.refused(PREPARE)
    assert {"lvm": "lacks 4 MiB", "lvmthin": "would pass margins.thin_data"}[value] in message
    assert host.tools == ["virsh", "fullreport", "fullreport"]
    assert locks() == []


def test_room_is_made_by_what_is_replaced(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE)
    host.vg["vg_free"] = "0"
    assert Hook(host).start()["target"]


ERASES = pytest.mark.parametrize("is_kept", [False, True])


def add_erasable(host: FakeHost, is_kept: bool) -> Volume:
    """The only volume that can make room: it was set aside, or is kept and will be replaced."""
    name = OTHER_VOLUME
    lv_tags = tags("STOPPED_5", fingerprint=OTHER_FINGERPRINT) if is_kept else aside("zero", name)
    host.vg["vg_free"] = str(SIZE - EXTENT)
    return host.add(name, lv_tags, SIZE, lv_active="")


ZERO = "{copy: {parallel: 1}, retention: {on_stop: keep, on_source_change: recopy, erase: zero}}"


@ERASES
def test_nobody_else_waits_while_a_start_erases_for_room(host: FakeHost, is_kept: bool) -> None:
    """It has neither the space lock nor a turn: another start makes its disk meanwhile, if that one has room.

    Then the turn is taken again as it was.
    """
    old = add_erasable(host, is_kept)
    seen: list[object] = []

    def erase(_argv: list[str]) -> None:
        if not seen:
            seen.extend([in_lock().phase, turns(), lock.is_held(os.path.join(lock.RUN, "space.lock"))])
            other = Hook(host, ZERO)
            other.ask(CLAIM, vm=OTHER_VM, image=OTHER_IMAGE, volume=THIRD_VOLUME)
            seen.append(other.ask(PREPARE, size=EXTENT)["how"])
            seen.append(other.ask(COMMIT_IT))

    host.before["blkdiscard"] = erase
    hook = Hook(host, ZERO)
    hook.ask(CLAIM)
    assert hook.ask(PREPARE)["how"] == "copy"
    assert seen == ["making_room", 0, False, "copy", {}]
    assert (in_lock().phase, turns()) == ("copying", 1)
    assert (host.removed, host.erased) == ([old], {old.lv_uuid})
    assert hook.ask(COMMIT_IT) == {}
    assert locks() == []


def test_a_start_waits_for_the_erase_that_another_process_does(host: FakeHost) -> None:
    old = add_erasable(host, False)
    hook = Hook(host, ZERO)
    hook.ask(CLAIM)
    for _ in held_elsewhere(os.path.join(lock.RUN, "erase.lock")):
        with pytest.raises(Ended):  # it waits
            hook.ask(PREPARE)
    assert host.volumes[OTHER_VOLUME] is old
    hook.session.close()
    assert Hook(host, ZERO).start()["how"] == "copy"
    assert host.removed == [old]


def test_what_was_set_aside_and_cannot_be_erased_makes_no_room(host: FakeHost, logged: list[str]) -> None:
    old = add_erasable(host, False)
    old.lv_tags = aside("discard", OTHER_VOLUME)
    host.cannot_discard.add(f"/dev/ovirt-local/{OTHER_VOLUME}")
    hook = Hook(host, "retention: {erase: discard}")
    hook.ask(CLAIM)
    assert "lacks 4 MiB" in hook.refused(PREPARE)
    assert host.volumes[OTHER_VOLUME] is old
    assert f"a volume that was set aside makes no room disk={OTHER_VOLUME}" in "".join(logged)
    assert locks() == []


def test_without_the_group(host: FakeHost) -> None:
    message = Hook(host, "volume_group: other").refused(CLAIM)
    assert message.startswith(
        "no volume group other on this host : create it (vgcreate --metadatasize 128m other DEVICE)"
    )


# -- failures and ends


@pytest.mark.parametrize("said", ["  Insufficient suitable allocatable extents\n", ""])
def test_a_create_that_fails(host: FakeHost, said: str) -> None:
    host.fail("lvcreate", said)
    hook = Hook(host)
    hook.ask(CLAIM)
    assert "lvcreate" in hook.refused(PREPARE)
    assert host.tools == ["virsh", "fullreport", "lvcreate", "fullreport"]
    assert locks() == []


def test_a_create_that_fails_after_all(host: FakeHost) -> None:
    """It has made the volume, and then could not activate it."""
    create = host._lvcreate

    def make_and_fail(argv: list[str]) -> None:
        create(argv)
        raise CommandFailed(tuple(argv), 5, "  Failed to activate new LV.\n")

    host.before["lvcreate"] = make_and_fail
    hook = Hook(host)
    hook.ask(CLAIM)
    assert "Failed to activate" in hook.refused(PREPARE)
    assert VOLUME not in host.volumes


def test_a_node_that_does_not_come(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VolumeGroup, "dm_uuid", REAL_DM_UUID)
    hook = Hook(host)
    hook.ask(CLAIM)
    assert "check that udev runs" in hook.refused(PREPARE)
    assert VOLUME not in host.volumes


def test_a_volume_that_lvm_leaves_inactive(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with activation/volume_list: the commands end with 0."""
    monkeypatch.setattr(VolumeGroup, "dm_uuid", REAL_DM_UUID)

    def leave_inactive(_argv: object) -> None:
        for volume in host.volumes.values():
            volume.lv_active = ""

    host.before["lvm"] = leave_inactive
    hook = Hook(host)
    hook.ask(CLAIM)
    assert "volume group ovirt-local is left inactive by LVM" in hook.refused(PREPARE)
    assert VOLUME not in host.volumes


REHEARSE = {"verb": "rehearse", "vm": VM, "property": "lvm"}


@pytest.mark.parametrize("backend", ["lvm", "lvmthin"])
def test_a_trial(host: FakeHost, backend: str) -> None:
    """As a start's disk it is made, found by gc if it is left, and it is removed."""
    hook = Hook(host)
    device = hook.ask(REHEARSE, property=backend)["device"]
    name = device["path"].rpartition("/")[2]
    assert device == {"path": f"/dev/ovirt-local/{name}", "dm_uuid": host.dm_uuid(name)}
    (found,) = local_disks(VolumeGroup.from_report(host.report()))
    assert (found.volume_id, found.state, found.vm_id) == (name, State.UNFINISHED, ids.NOBODY)
    assert found.backend == backend
    assert locks() == [f"{name}.lock"]
    assert hook.ask({"verb": "rehearsed"}) == {}
    assert (name in host.volumes, locks()) == (False, [])
    hook.ask(REHEARSE, property=backend)
    hook.session.end()
    assert (set(host.volumes), locks()) == ({"pool0"}, [])
    assert not counters.read().failures


def test_a_trial_that_fails_is_no_start_that_failed(host: FakeHost) -> None:
    host.vg["vg_free"] = "0"
    assert "lacks 4 MiB" in Hook(host).refused(REHEARSE)
    host.vg["vg_free"] = str(1 << 30)
    host.fail("lvcreate", "  nothing works\n", 2)
    assert "nothing works" in Hook(host).refused(REHEARSE)
    hook = Hook(host)
    assert "wrong order" in hook.refused({"verb": "rehearsed"})
    assert (counters.read().failures, set(host.volumes), locks()) == ({}, {"pool0"}, [])


def test_a_trial_evicts_nothing(host: FakeHost) -> None:
    """A start would find room by evicting template LVs."""
    host.vg["vg_free"] = "0"
    name = template.lv_name(OTHER_VOLUME, FINGERPRINT, "lvm", "pool0")
    host.add(name, template.new_tags(OTHER_VOLUME, FINGERPRINT, 4096), EXTENT)
    hook = Hook(host)
    assert hook.ask(REHEARSE) == {"device": None}
    assert name in host.volumes


def test_close_removes_the_unfinished_disk(host: FakeHost) -> None:
    hook = Hook(host)
    hook.start()
    hook.ask(PROGRESS)
    hook.session.close()
    assert VOLUME not in host.volumes
    assert host.commands[3:] == [LOOK, REMOVE]
    assert locks() == []
    hook.session.close()
    assert len(host.commands) == 5


@pytest.mark.parametrize("request_", [{"verb": "nonsense"}, PREPARE, {**PROGRESS, "done": -1}])
def test_any_refusal_ends_the_copy(host: FakeHost, request_: dict[str, object]) -> None:
    hook = Hook(host)
    hook.start()
    hook.refused(request_)
    assert VOLUME not in host.volumes
    assert "wrong order" in hook.refused(COMMIT_IT)


def test_an_unfinished_disk_that_stays_open_is_left_to_gc(host: FakeHost) -> None:
    hook = Hook(host)
    hook.start()
    host.volumes[VOLUME].lv_device_open = "open"
    hook.session.close()
    assert lv_tags(host) == tags("UPDATING", "WRITES_4096")
    assert locks() == []


def test_a_remove_that_fails_is_left_to_gc(host: FakeHost) -> None:
    hook = Hook(host)
    hook.start()
    host.fail("lvremove", "  Cannot change VG\n")
    hook.session.close()
    assert locks() == []


@pytest.mark.parametrize(
    "swap",
    [
        lambda volume: setattr(volume, "lv_uuid", "other0-0000-0000-0000-0000-0000-000000"),
        lambda volume: setattr(volume, "lv_tags", tags("UPDATING", vm=OTHER_VM)),
        lambda volume: setattr(volume, "lv_tags", tags("UPDATING", image=OTHER_IMAGE)),
        lambda volume: setattr(volume, "lv_tags", set()),
    ],
    ids=["uuid", "vm", "image", "foreign"],
)
def test_a_volume_that_someone_swapped_is_neither_committed_nor_removed(
    host: FakeHost, swap: Callable[[object], None]
) -> None:
    for request in (COMMIT_IT, None):
        host.volumes.pop(VOLUME, None)
        hook = Hook(host)
        hook.start()
        swap(host.volumes[VOLUME])
        before = host.volumes[VOLUME].row
        if request:
            hook.refused(request)
        hook.session.close()
        assert host.volumes[VOLUME].row == before
        assert locks() == []


def test_a_volume_that_is_gone_is_not_committed(host: FakeHost) -> None:
    hook = Hook(host)
    hook.start()
    del host.volumes[VOLUME]
    assert "not the one that was made" in hook.refused(COMMIT_IT)
    assert host.lvm_commands[-1] == LOOK


@pytest.mark.parametrize("how", ["vg_partial", "vg_exported"])
def test_no_disk_becomes_ready_in_half_a_group(host: FakeHost, how: str) -> None:
    hook = Hook(host)
    hook.start()
    host.vg[how] = how.removeprefix("vg_")
    assert {"vg_partial": "missing a physical", "vg_exported": "exported"}[how] in hook.refused(COMMIT_IT)
    assert "UPDATING" in lv_tags(host)


def test_a_disk_is_ready_though_lvm_does_not_say_so(host: FakeHost) -> None:
    """The administrator may have switched LVM's messages off."""
    host.is_silent = True
    hook = Hook(host)
    hook.start()
    assert hook.ask(COMMIT_IT) == {}
    assert lv_tags(host) == tags()
    assert host.lvm_commands[-1] == LOOK


def test_a_copy_that_took_its_time_asks_libvirt_again(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = Hook(host)
    hook.start(seen=now())
    assert host.tools == ["fullreport", "lvcreate"]
    monkeypatch.setattr(libvirt, "RECENT", 0)
    assert hook.ask(COMMIT_IT) == {}
    assert host.tools[2:] == ["virsh", "lvchange"]


def test_a_finished_disk_is_not_removed_at_the_end(host: FakeHost) -> None:
    hook = Hook(host)
    hook.start()
    lv_tags(host).remove("UPDATING")
    hook.session.close()
    assert VOLUME in host.volumes


def test_a_commit_that_fails_removes_the_disk(host: FakeHost) -> None:
    hook = Hook(host)
    hook.start()
    host.fail("lvchange", "  Failed to write VG ovirt-local.\n")
    assert "Failed to write" in hook.refused(COMMIT_IT)
    assert VOLUME not in host.volumes
    assert locks() == []


def test_a_kept_disk_that_cannot_be_activated(host: FakeHost) -> None:
    host.add(VOLUME, tags("STOPPED_5"), SIZE, lv_active="")
    host.fail("lvchange", "  device-mapper: reload failed\n", when="--activate")
    hook = Hook(host, KEEP)
    hook.ask(CLAIM)
    assert "reload failed" in hook.refused(PREPARE)
    assert VOLUME in host.volumes
    assert locks() == []


# -- powered off while it starts


CANCEL = {"verb": "cancel", "vm": VM, "property": "lvm"}
LOOK_AT_IT = {"verb": "look", "vm": VM, "property": "lvm", "disks": [{"image": IMAGE, "volume": VOLUME}]}
POWERED_OFF = f"VM {VM} was powered off before it ran"


def marks() -> list[str]:
    return sorted(name for name in os.listdir(lock.RUN) if ".destroy" in name)


def power_off(host: FakeHost) -> None:
    assert Hook(host).ask(CANCEL) == {}


def test_a_copy_ends_when_its_vm_is_powered_off(host: FakeHost) -> None:
    """Its volume is removed when the hook, which has it open until then, has ended."""
    hook = Hook(host)
    hook.start()
    assert not hook.session.is_cancelled()
    power_off(host)
    assert hook.session.is_cancelled()
    assert POWERED_OFF in hook.refused(PROGRESS)
    assert POWERED_OFF in hook.refused(COMMIT_IT)
    assert VOLUME in host.volumes
    hook.session.end()
    assert VOLUME not in host.volumes
    assert locks() == []
    assert counters.read().failures == {}


def test_what_waits_ends_when_its_vm_is_powered_off(host: FakeHost) -> None:
    waits: list[int] = []

    def pause(_seconds: float) -> None:
        assert waits == []
        waits.append(1)
        power_off(host)

    hook = Hook(host, pause=pause)
    with lock.trying(lock.disk_lock(VOLUME)):
        assert POWERED_OFF in hook.refused(CLAIM)
    assert host.volumes.keys() == {"pool0"}
    assert marks() == [f"{VM}.destroying"]
    assert not hook.session.is_cancelled()
    assert POWERED_OFF in hook.refused(CLAIM, image=OTHER_IMAGE, volume=OTHER_VOLUME)
    assert Hook(host).ask(CLAIM, vm=OTHER_VM) == TO_PREPARE


def test_nothing_is_prepared_until_vdsm_is_through(host: FakeHost) -> None:
    power_off(host)
    power_off(host)
    assert POWERED_OFF in Hook(host).refused(CLAIM)
    assert POWERED_OFF in Hook(host).refused(LOOK_AT_IT)
    assert Hook(host).ask(RELEASE) == {}
    power_off(host)  # a second time
    assert marks() == [f"{VM}.destroyed"]
    assert POWERED_OFF in Hook(host).refused(LOOK_AT_IT)
    assert marks() == []
    assert Hook(host).ask(LOOK_AT_IT)["disks"]


def test_a_new_start_forgets_that_the_vm_was_powered_off(host: FakeHost) -> None:
    power_off(host)
    Hook(host).ask(RELEASE)
    hook = Hook(host)
    hook.start()
    assert marks() == []
    assert hook.ask(COMMIT_IT) == {}
    power_off(host)
    assert marks() == [f"{VM}.destroying"]


@pytest.mark.parametrize("text", [f"disks: [{OTHER_IMAGE}]", "enabled: false"])
def test_a_start_with_shared_disks_is_not_ended_and_forgets_it(host: FakeHost, text: str) -> None:
    """Nothing is prepared for it; vdsm itself ends it."""
    power_off(host)
    hook = Hook(host, f"vms: {{{VM}: {{{text}}}}}")
    assert hook.ask(CLAIM)["stays"]
    assert not hook.ask(LOOK_AT_IT)["disks"][0]["local"]
    assert marks() == [f"{VM}.destroying"]
    hook.ask(RELEASE)
    assert not hook.ask(LOOK_AT_IT)["disks"][0]["local"]
    assert hook.ask(CLAIM)["stays"]
    assert marks() == []


@pytest.mark.parametrize("age", [61, -61])
def test_what_was_not_carried_through_ends_no_later_start(host: FakeHost, age: int) -> None:
    """vdsm was killed before it called after_vm_destroy, or the clock was set."""
    power_off(host)
    then = time.time() - age
    os.utime(os.path.join(lock.RUN, f"{VM}.destroying"), (then, then))
    assert POWERED_OFF in Hook(host).refused(LOOK_AT_IT)
    power_off(host)
    os.utime(os.path.join(lock.RUN, f"{VM}.destroying"), (then, then))
    assert Hook(host).ask(CLAIM) == TO_PREPARE
    assert marks() == []


def test_a_power_off_long_after_another_is_a_new_one(host: FakeHost) -> None:
    power_off(host)
    Hook(host).ask(RELEASE)
    os.utime(os.path.join(lock.RUN, f"{VM}.destroyed"), (5, 5))
    power_off(host)
    assert f"{VM}.destroying" in marks()
    assert POWERED_OFF in Hook(host).refused(CLAIM)


def test_no_copy_is_completed_for_a_vm_that_libvirt_has_forgotten(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = Hook(host)
    hook.start()
    host.has_undefined = True
    monkeypatch.setattr(libvirt, "RECENT", 0)  # the copy takes its time
    assert f"libvirt no longer knows VM {VM}" in hook.refused(COMMIT_IT)
    assert VOLUME not in host.volumes
    assert locks() == []


def test_a_copy_is_completed_though_libvirt_is_silent(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = Hook(host)
    hook.start()
    monkeypatch.setattr(libvirt, "RECENT", 0)  # the copy takes its time
    host.libvirt_is_silent = True
    assert hook.ask(COMMIT_IT) == {}
    assert lv_tags(host) == tags()


# -- locks and turns


def test_a_disk_that_is_being_prepared_is_waited_for(host: FakeHost) -> None:
    other = held_elsewhere(lock.disk_lock(VOLUME))
    next(other)
    with pytest.raises(Ended):
        Hook(host).ask(CLAIM)
    assert host.commands == []

    def pause(_seconds: float) -> None:
        host.add(VOLUME, tags(), SIZE)
        next(other, None)

    assert Hook(host, KEEP, pause).start() == KEPT


def test_a_copy_waits_for_its_turn_and_can_end_there(host: FakeHost) -> None:
    first = Hook(host, "copy: {parallel: 1}")
    first.start()
    second = Hook(host, "copy: {parallel: 1}")
    second.ask(CLAIM, volume=OTHER_VOLUME, image=OTHER_IMAGE)
    with pytest.raises(Ended):
        second.ask(PREPARE)
    second.session.close()
    assert OTHER_VOLUME not in host.volumes
    assert len(locks()) == 2
    first.ask(COMMIT_IT)
    assert second.start(volume=OTHER_VOLUME, image=OTHER_IMAGE)["target"]
    second.session.close()
    assert locks() == []


def test_progress_is_in_the_lock(host: FakeHost) -> None:
    hook = Hook(host)
    hook.ask(CLAIM)
    assert record() == Progress(VM, IMAGE, "preparing", 0, 0)
    hook.ask(PREPARE)
    assert record() == Progress(VM, IMAGE, "copying", 0, 0, size=SIZE)
    hook.ask(PROGRESS)
    assert record() == Progress(VM, IMAGE, "copying", 0, 0, size=SIZE, done=5, written=3)


def test_progress_that_cannot_be_written_refuses_nothing(
    monkeypatch: pytest.MonkeyPatch, host: FakeHost, logged: list[str]
) -> None:
    """/run is full, or read-only by now."""

    def fail(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    hook = Hook(host)
    assert hook.start()["how"] == "copy"
    for _ in range(2):
        assert hook.ask(PROGRESS) == {}
    assert hook.ask(COMMIT_IT) == {}
    assert lv_tags(host) == tags()
    lines = [line for line in logged if "progress" in line]
    assert lines == [f"progress cannot be written vm={VM} disk={VOLUME} why=No space left on device"]


def test_locks_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, host: FakeHost) -> None:
    monkeypatch.setattr(lock, "RUN", "/proc/nothing")
    for request_ in (CLAIM, {"verb": "cancel", "vm": VM, "property": "lvm"}):
        message = Hook(host).refused(request_)
        assert message.startswith("cannot make or remove /proc/nothing")
        assert "df -i" in message


def test_a_copy_is_logged_and_counted(
    monkeypatch: pytest.MonkeyPatch, host: FakeHost, logged: list[str]
) -> None:
    """One line at the start, one each tenth or half minute, one at the end with the rate."""
    now = [1_760_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    hook = Hook(host)
    hook.start()
    for seconds, percent in ((1, 4), (2, 9), (3, 10), (4, 19), (5, 19), (41, 19), (50, 35), (51, 100)):
        now[0] = 1_760_000_000.0 + seconds
        hook.ask(PROGRESS, done=SIZE * percent // 100 + 1, written=percent << 20)
    hook.ask(COMMIT_IT)
    who = f"vm={VM} disk={VOLUME}"
    assert logged == [
        f"copy starts {who} bytes={SIZE} backend=lvm",
        f"copying {who} done=10% bytes={10 << 20} took=3.0s rate=3.3 MiB/s",
        f"copying {who} done=19% bytes={19 << 20} took=41.0s rate=474.5 KiB/s",
        f"copying {who} done=35% bytes={35 << 20} took=50.0s rate=716.8 KiB/s",
        f"copying {who} done=100% bytes={100 << 20} took=51.0s rate=2 MiB/s",
        f"disk ready {who} bytes={100 << 20} took=51.0s rate=2 MiB/s",
    ]
    assert counters.read() == Counters(copies=1, copied_bytes=100 << 20, copy_seconds=51)


class Clock:
    """The time, which stands still until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_760_000_000.0
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "monotonic_ns", lambda: int(self.now * 1e9))


def in_lock() -> Progress:
    found = progress.parse(lock.read_held(lock.disk_lock(VOLUME)) or "")
    assert found
    return found


def turns() -> int:
    return sum(name.endswith(".turn") and lock.is_held(os.path.join(lock.RUN, name)) for name in lock.names())


def test_a_copy_that_stalls_gives_its_turn_back(
    monkeypatch: pytest.MonkeyPatch, host: FakeHost, logged: list[str]
) -> None:
    """It is not ended; when it makes progress again, it counts as one that has a turn."""
    clock = Clock(monkeypatch)
    text = "copy: {parallel: 1}"
    first, second = Hook(host, text), Hook(host, text)
    first.start()
    first.ask(PROGRESS)
    clock.now += 299
    assert first.ask(PROGRESS) == {}
    assert (in_lock().phase, turns()) == ("copying", 1)
    with pytest.raises(Ended):
        second.start(vm=OTHER_VM, image=OTHER_IMAGE, volume=OTHER_VOLUME)
    second.session.close()
    clock.now += 1
    first.ask(PROGRESS)
    assert in_lock() == Progress(
        VM, IMAGE, "stalled", since=1_760_000_000, at=1_760_000_000, size=SIZE, done=5, written=3
    )
    clock.now += 1000
    first.ask(PROGRESS)
    assert (in_lock().phase, in_lock().at, turns()) == ("stalled", 1_760_000_000, 0)
    second.start(vm=OTHER_VM, image=OTHER_IMAGE, volume=OTHER_VOLUME)
    first.ask(PROGRESS, written=4)
    assert (in_lock().phase, in_lock().written, turns()) == ("copying", 4, 2)
    third = Hook(host, text)
    with pytest.raises(Ended):
        third.start(vm=OTHER_VM, image=THIRD_VOLUME, volume=THIRD_VOLUME)
    third.session.close()
    assert first.ask(COMMIT_IT) == {}
    second.ask(COMMIT_IT)
    assert turns() == 0
    who = f"vm={VM} disk={VOLUME}"
    said = [line for line in logged if who in line]
    assert said[-4:-2] == [
        f"copy stalls, its turn is given back {who} since=5 min bytes=3 took=300.0s rate=0 B/s",
        f"copy continues {who}",
    ]


def test_a_hook_that_says_nothing_stalls_too(monkeypatch: pytest.MonkeyPatch, host: FakeHost) -> None:
    """It waits for the device, in fsync for example, and is done in the end."""
    clock, hook = Clock(monkeypatch), Hook(host)
    hook.session.look_after_copy()
    hook.start()
    clock.now += 299
    hook.session.look_after_copy()
    assert turns() == 1
    clock.now += 1
    hook.session.look_after_copy()
    hook.session.look_after_copy()
    assert (in_lock().phase, turns()) == ("stalled", 0)
    assert hook.ask(COMMIT_IT) == {}
    assert locks() == []


def test_a_copy_that_keeps_its_turn(monkeypatch: pytest.MonkeyPatch, host: FakeHost) -> None:
    clock, hook = Clock(monkeypatch), Hook(host, "copy: {stall: 0s}")
    hook.start()
    clock.now += 1_000_000
    hook.session.look_after_copy()
    assert (in_lock().phase, turns()) == ("copying", 1)
    hook.session.close()


def test_refusals_are_logged_and_counted(host: FakeHost, logged: list[str]) -> None:
    Hook(host).refused(CLAIM, vm="x")
    full = Hook(host, "margins: {reserve: 100%}")
    full.ask(CLAIM)
    full.refused(PREPARE)
    refused = [line.split(" why=")[0] for line in logged]
    assert refused == ["refused", f"refused vm={VM} disk={VOLUME}"]
    assert counters.read().failures == {"bad_request": 1, "no_space": 1}


def test_ids_that_cannot_be_shown_are_not_logged(host: FakeHost, logged: list[str]) -> None:
    """JSON that can just be read may nest too deeply to be written again."""
    for depth in range(200, 1000, 2):
        nested = "[" * depth + "]" * depth
        ids = f'"vm": {nested}, "property": "lvm", "image": 5, "volume": {nested}'
        line = f'{{"verb": "claim", {ids}, "seen": 0}}'
        assert list(Hook(host).session.serve(line.encode())) == ["error"]
    assert {line.split(" why=")[0] for line in logged} == {"refused"}


def test_a_hook_that_ends_in_the_middle_is_logged_and_counted(host: FakeHost, logged: list[str]) -> None:
    idle, claimed, copying = Hook(host), Hook(host), Hook(host)
    idle.session.end()
    claimed.ask(CLAIM)
    claimed.session.end()
    copying.start()
    copying.session.end()
    assert counters.read().failures == {"preparation_broken_off": 1, "copy_broken_off": 1}
    broken = f"start broken off vm={VM} disk={VOLUME}"
    assert [line for line in logged if "broken off" in line] == [broken, broken]


def test_a_kept_disk_that_is_taken_back_is_no_failure(host: FakeHost) -> None:
    host.add(VOLUME, tags("STOPPED_5"), SIZE, lv_active="")
    hook = Hook(host, "retention: {on_stop: keep}")
    assert hook.start()["target"] is None
    hook.session.end()
    assert counters.read() == Counters()


def record() -> Progress | None:
    """What the lock says; its times are checked here, and 0 in what is returned."""
    found = progress.parse(lock.read_held(lock.disk_lock(VOLUME)) or "")
    assert found
    assert found.since <= found.at <= time.time() < found.since + 60
    return replace(found, since=0, at=0)


# -- stopping

STOPS = [
    # retention, tags beyond the usual, open -> tags afterwards (None: removed), active, commands
    ("{}", (), "", None, [MARK, REMOVE]),
    ("{}", ("STOPPED_5",), "", None, [MARK, REMOVE]),
    ("{}", ("UPDATING",), "", None, [REMOVE]),
    ("{}", ("DELETING",), "", None, [REMOVE]),
    ("{}", (), "open", ("DELETING",), [f"lvchange --quiet --addtag DELETING {NAME}"]),
    ("{erase: zero}", (), "", ("DELETING",), [f"lvchange --quiet --addtag DELETING {NAME}"]),
    (
        "{on_stop: keep}",
        (),
        "",
        ("STOPPED_1760000000",),
        [f"lvchange --quiet --addtag STOPPED_1760000000 {NAME}"],
    ),
    (
        "{on_stop: keep}",
        (),
        "open",
        ("STOPPED_1760000000",),
        [f"lvchange --quiet --addtag STOPPED_1760000000 {NAME}"],
    ),
    ("{on_stop: keep}", ("STOPPED_5",), "", ("STOPPED_5",), []),
    ("{on_stop: keep}", ("STOPPED_5",), "open", ("STOPPED_5",), []),
    ("{on_stop: keep}", ("UPDATING",), "", None, [REMOVE]),
    (
        "{on_stop: keep}",
        ("UNNEEDED_5", "UNNEEDED_x"),
        "open",
        ("STOPPED_1760000000",),
        [f"lvchange --quiet --deltag UNNEEDED_5 --deltag UNNEEDED_x --addtag STOPPED_1760000000 {NAME}"],
    ),
    ("{on_stop: keep, erase: discard}", (), "", ("STOPPED_1760000000",), None),
]


@pytest.mark.parametrize(("retention", "more", "is_open", "after", "commands"), STOPS)
def test_release(
    host: FakeHost,
    monkeypatch: pytest.MonkeyPatch,
    retention: str,
    more: tuple[str, ...],
    is_open: str,
    after: tuple[str, ...] | None,
    commands: list[str] | None,
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1760000000.5)
    host.add(VOLUME, tags(*more), SIZE, lv_device_open=is_open)
    assert Hook(host, f"retention: {retention}").ask(RELEASE) == {}
    if after is None:
        assert VOLUME not in host.volumes
    else:
        assert lv_tags(host) == tags(*after)
    if commands is not None:
        asked = [ACTIVE] if is_open else []
        assert host.commands == [LOOK, LOOK, *asked, *commands]
    assert locks() == []


DRIFT_TAG = "DRIFTED_1760000000"


@pytest.fixture(name="at_noon")
def fixture_at_noon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1760000000.5)


@pytest.mark.parametrize("retention", ["on_stop: delete", "on_stop: keep", "erase: zero"])
def test_a_disk_that_its_vm_did_not_run_from_in_the_end_is_kept(
    host: FakeHost, at_noon: None, retention: str
) -> None:
    host.add(VOLUME, tags("UNNEEDED_5"), SIZE)
    host.add(OTHER_VOLUME, tags(vm=OTHER_VM), SIZE)
    hook = Hook(host, f"retention: {{{retention}}}")
    assert hook.ask(DRIFTED) == {}
    for _ in range(2):
        assert hook.ask(RELEASE) == {}
    assert lv_tags(host) == tags(DRIFT_TAG)
    assert lv_tags(host, OTHER_VOLUME) == tags(vm=OTHER_VM)
    (finding,) = (f for f in gc.collect(parsed(""), may_start=False).findings if f.disk.volume_id == VOLUME)
    assert (finding.verdict.action, finding.is_problem) == (verdict.Action.KEEP, False)
    assert locks() == []


def test_a_full_metadata_area_does_not_hide_a_drift(host: FakeHost, at_noon: None) -> None:
    host.add(VOLUME, tags(), SIZE)
    said = "VG x 27 metadata on /dev/a (523730 bytes) exceeds maximum metadata size (521472 bytes)"
    host.fail("lvchange", f"  {said}\n", times=2)
    assert Hook(host).ask(DRIFTED) == {}
    assert lv_tags(host) == {tag for tag in tags(DRIFT_TAG) if not tag.startswith("SOURCE_")}


@pytest.mark.parametrize("state", [("UPDATING",), ("STOPPED_5",), ("DELETING",), ("DRIFTED_5",)])
def test_only_what_is_ready_drifts(host: FakeHost, state: tuple[str, ...]) -> None:
    host.add(VOLUME, tags(*state), SIZE)
    assert Hook(host).ask(DRIFTED) == {}
    assert lv_tags(host) == tags(*state)


@pytest.mark.parametrize(
    "disks", [[], [{"image": IMAGE, "path": PATH}], [{"image": OTHER_IMAGE, "path": "/x"}]]
)
def test_what_runs_from_its_local_disk_has_not_drifted(host: FakeHost, disks: list[dict[str, str]]) -> None:
    host.add(VOLUME, tags(), SIZE)
    assert Hook(host).ask(DRIFTED, disks=disks) == {}
    assert lv_tags(host) == tags()


def test_a_vm_that_runs_does_not_drift(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE, lv_device_open="open")
    host.active = {VM}
    assert "as still running" in Hook(host).refused(DRIFTED)
    assert lv_tags(host) == tags()


@pytest.mark.parametrize("volume", [VOLUME, OTHER_VOLUME])
@pytest.mark.parametrize("text", ["", KEEP, RECOPY])
def test_no_start_while_a_disk_of_the_image_has_drifted(host: FakeHost, volume: str, text: str) -> None:
    """Nor from the layer above it: with what shared storage has below, that is a mix of two disks."""
    host.add(VOLUME, tags("DRIFTED_5"), SIZE)
    hook = Hook(host, text)
    assert "has data of this VM" in hook.refused_start(volume=volume)
    assert set(host.volumes) == {"pool0", VOLUME}
    assert lv_tags(host) == tags("DRIFTED_5")


@pytest.mark.parametrize("drifted", [VOLUME, OTHER_VOLUME])
@pytest.mark.parametrize("kept", [tags("STOPPED_5"), tags("STOPPED_5", "STALE"), tags()])
@pytest.mark.parametrize("text", ["", KEEP, RECOPY])
def test_a_kept_disk_beside_one_that_has_drifted_changes_nothing(
    host: FakeHost, drifted: str, kept: set[str], text: str
) -> None:
    """Neither is used, renamed, replaced or removed for room."""
    beside = OTHER_VOLUME if drifted == VOLUME else VOLUME
    host.add(drifted, tags("DRIFTED_5"), SIZE)
    host.add(beside, kept, SIZE)
    host.vg["vg_free"] = "0"
    hook = Hook(host, text)
    assert "has data of this VM" in hook.refused_start()
    assert {drifted: tags("DRIFTED_5"), beside: kept} == {
        name: lv_tags(host, name) for name in host.volumes if name != "pool0"
    }
    assert set(host.tools) <= {"virsh", "fullreport"}
    assert locks() == []


def test_a_stale_disk_has_not_drifted(host: FakeHost) -> None:
    """Its VM was started without it."""
    host.add(VOLUME, tags("STALE"), SIZE)
    assert Hook(host).ask(DRIFTED) == {}
    assert lv_tags(host) == tags("STALE")


@pytest.mark.parametrize(
    "disks",
    [5, [{"image": IMAGE}], [{"image": "x", "path": "/x"}], [{"image": IMAGE, "path": 5}], [{}] * 257],
)
def test_what_it_ran_from_is_well_formed(host: FakeHost, disks: object) -> None:
    assert "request to the helper" in Hook(host).refused(DRIFTED, disks=disks)


def test_release_of_a_vm_without_disks(host: FakeHost) -> None:
    host.add(VOLUME, tags(vm=OTHER_VM), SIZE)
    assert Hook(host).ask(RELEASE) == {}
    assert host.commands == [LOOK]


def test_release_of_a_vm_that_still_runs(host: FakeHost) -> None:
    """Called wrongly, it must not mark the disk: vdsm's next recovery of that VM would be refused."""
    host.add(VOLUME, tags(), SIZE, lv_device_open="open")
    host.add(OTHER_VOLUME, tags(image=OTHER_VOLUME), SIZE)
    host.active = {VM}
    assert "as still running" in str(Hook(host).ask(RELEASE)["error"])
    assert host.commands == [LOOK, LOOK, ACTIVE]
    assert locks() == []


def test_release_twice(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE)
    hook = Hook(host)
    assert hook.ask(RELEASE) == {}
    assert hook.ask(RELEASE) == {}
    assert host.commands == [LOOK, LOOK, MARK, REMOVE, LOOK]


def test_release_of_several_disks_is_one_command_of_each_kind(host: FakeHost) -> None:
    for name in (VOLUME, OTHER_VOLUME, THIRD_VOLUME):
        host.add(name, tags(image=name), SIZE)
    host.volumes[THIRD_VOLUME].lv_device_open = "open"
    host.add("44444444-4444-4444-8444-444444444444", tags(vm=OTHER_VM), SIZE)
    assert Hook(host).ask(RELEASE) == {}
    assert host.commands[2:] == [
        ACTIVE,
        f"lvchange --quiet --addtag DELETING {NAME} ovirt-local/{OTHER_VOLUME} ovirt-local/{THIRD_VOLUME}",
        f"lvremove --quiet --yes ovirt-local/{VOLUME} ovirt-local/{OTHER_VOLUME}",
    ]
    assert sorted(host.volumes)[0] == THIRD_VOLUME


def test_release_of_disks_in_mixed_states(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1760000000.5)
    host.add(VOLUME, tags(), SIZE)
    host.add(OTHER_VOLUME, tags("UPDATING"), SIZE)
    host.add(THIRD_VOLUME, tags("STOPPED_5"), SIZE)
    assert Hook(host, KEEP).ask(RELEASE) == {}
    assert host.commands[2:] == [
        f"lvremove --quiet --yes ovirt-local/{OTHER_VOLUME}",
        f"lvchange --quiet --addtag STOPPED_1760000000 ovirt-local/{VOLUME}",
    ]


def test_a_remove_that_takes_too_long_leaves_marked_disks(host: FakeHost) -> None:
    """LVM discards what it frees if lvm.conf says so, which may take minutes; gc does not wait for grace."""
    for name in (VOLUME, OTHER_VOLUME):
        host.add(name, tags(image=name), SIZE)

    def hang(_argv: list[str]) -> None:
        raise CommandTimeout(tool="lvremove", seconds=120)

    host.before["lvremove"] = hang
    assert Hook(host).ask(RELEASE) == {}
    assert host.tools == ["fullreport", "fullreport", "lvchange", "lvremove"]
    assert lv_tags(host) == tags("DELETING", image=VOLUME)
    host.before = {}
    assert {f.verdict.action for f in gc.collect(parsed("")).findings} == {verdict.Action.REMOVE}
    assert set(host.volumes) == {"pool0"}


def test_disks_that_cannot_be_marked_are_removed(host: FakeHost) -> None:
    """A group whose metadata is full takes no tag; a removal makes room there."""
    host.add(VOLUME, tags(), SIZE)
    host.fail("lvchange", "  VG ovirt-local metadata too large\n")
    assert "metadata too large" in Hook(host).refused(RELEASE)
    assert VOLUME not in host.volumes


def test_a_stop_that_waits_in_vain_for_lvm_waits_once(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE)
    host.add(OTHER_VOLUME, tags("UPDATING", image=OTHER_IMAGE), SIZE)

    def hang(_argv: list[str]) -> None:
        raise CommandTimeout(tool="lvchange", seconds=120)

    host.before["lvchange"] = hang
    assert "did not end within" in Hook(host).refused(RELEASE)
    assert host.tools == ["fullreport", "fullreport", "lvchange"]


def test_release_when_a_remove_fails(host: FakeHost) -> None:
    """Opened after the look; LVM removes none of the volumes then. All that are left are gc's."""
    for name in (VOLUME, OTHER_VOLUME):
        host.add(name, tags(image=name), SIZE)
    host.fail("lvremove", f"  Logical volume {NAME} in use.\n")
    assert Hook(host).ask(RELEASE) == {}
    assert host.commands[2:] == [
        f"lvchange --quiet --addtag DELETING ovirt-local/{VOLUME} ovirt-local/{OTHER_VOLUME}",
        f"lvremove --quiet --yes ovirt-local/{VOLUME} ovirt-local/{OTHER_VOLUME}",
    ]
    assert {name: lv_tags(host, name) for name in (VOLUME, OTHER_VOLUME)} == {
        name: tags("DELETING", image=name) for name in (VOLUME, OTHER_VOLUME)
    }


def test_release_goes_on_after_a_failure_and_reports_it(host: FakeHost) -> None:
    host.add(VOLUME, tags("UPDATING"), SIZE)
    host.add(OTHER_VOLUME, tags(image=OTHER_IMAGE), SIZE, lv_device_open="open")
    host.fail("lvchange", "  Failed to write VG\n", when="DELETING")
    assert "Failed to write VG" in Hook(host).refused(RELEASE)
    assert VOLUME not in host.volumes
    assert locks() == []


@pytest.mark.parametrize("text", ["", KEEP, ERASE])
@pytest.mark.parametrize("number", range(6))
def test_a_release_that_is_killed_is_made_good_by_gc(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, text: str, number: int
) -> None:
    for name, more in ((VOLUME, ()), (OTHER_VOLUME, ("UPDATING",)), (THIRD_VOLUME, ())):
        host.add(name, tags(*more, image=name), SIZE)
    host.volumes[THIRD_VOLUME].lv_device_open = "open"
    host.kill_before(number)
    monkeypatch.setattr(time, "time", lambda: 1760000000.0)
    with contextlib.suppress(Killed):
        Hook(host, text).ask(RELEASE)
    host.before = {}
    host.volumes[THIRD_VOLUME].lv_device_open = ""
    for now in (1760000000.0, 1760000600.0):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        gc.collect(parsed(text))
    kept = {VOLUME, THIRD_VOLUME} if text == KEEP else set()
    assert set(host.volumes) == {"pool0", *kept}
    assert all(any(tag.startswith("STOPPED_") for tag in lv_tags(host, name)) for name in kept)
    assert len(host.erased) == (3 if text == ERASE else 0)


def test_release_leaves_a_disk_that_is_being_prepared(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE)
    host.add(OTHER_VOLUME, tags(image=OTHER_IMAGE), SIZE)
    with lock.holding(lock.disk_lock(VOLUME), give_up) as held:
        held.write("its progress")
        assert Hook(host).ask(RELEASE) == {}
    assert VOLUME in host.volumes
    assert OTHER_VOLUME not in host.volumes


@pytest.mark.parametrize("tries", [4, 24, 99])
def test_release_waits_for_a_gc_that_works_on_the_disk(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, tries: int
) -> None:
    """For some seconds: a gc that must do more than that decides about the disk itself."""
    host.add(VOLUME, tags(), SIZE)
    slept: list[float] = []
    with contextlib.ExitStack() as gc_works:
        gc_works.enter_context(lock.holding(lock.disk_lock(VOLUME), give_up))

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == tries:
                gc_works.close()

        monkeypatch.setattr(time, "sleep", sleep)
        assert Hook(host).ask(RELEASE) == {}
    assert (VOLUME in host.volumes) == (tries == 99)
    assert len(slept) == min(tries, 25)


def test_release_is_not_held_up_by_a_look_at_the_lock(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """status and gc take a lock for a moment to see whether it is free."""
    host.add(VOLUME, tags(), SIZE)
    try_hold, calls = lock.try_hold, [0]

    def held_at_first(path: str) -> lock.Lock | None:
        calls[0] += 1
        return None if calls[0] == 1 else try_hold(path)

    monkeypatch.setattr(lock, "try_hold", held_at_first)
    assert Hook(host).ask(RELEASE) == {}
    assert VOLUME not in host.volumes


def test_release_looks_again_under_the_lock(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE)
    looks = [0]

    def change(_argv: list[str]) -> None:
        looks[0] += 1
        if looks[0] == 2:
            lv_tags(host).clear()

    host.before["lvm"] = change
    assert Hook(host).ask(RELEASE) == {}
    assert host.commands == [LOOK, LOOK]


# -- requests that are no requests


@pytest.mark.parametrize("reason", [None, 5, "", "x", ["no_template"], "cache_full", "no_template\n"])
def test_a_reason_that_is_not_known(host: FakeHost, reason: object) -> None:
    hook = Hook(host)
    hook.ask(CLAIM)
    assert "the reason is not known" in hook.refused({"verb": "uncached", "reason": reason})
    assert counters.read().uncached == {}


def test_a_reason_without_a_claim(host: FakeHost) -> None:
    assert "wrong order" in Hook(host).refused({"verb": "uncached", "reason": "no_template"})


UUIDS: list[object] = [
    None,
    5,
    True,
    [],
    {},
    "",
    VM.upper(),
    VM[:-1],
    VM + "\n",
    f"{{{VM}}}",
    "../x",
    "a\0b",
    " " + VM,
]
NUMBERS: list[object] = [
    None,
    True,
    False,
    1.0,
    "1",
    [],
    {},
    -1,
    (64 << 40) + 1,
    10**400,
    1e400,
    float("nan"),
]
PAIR = {"image": IMAGE, "volume": VOLUME}
LOOK_IT = {"verb": "look", "vm": VM, "property": "lvm", "disks": [PAIR]}
PROPERTIES: list[object] = [None, 5, [], {}, "", "off", "LVM", "lvm\n", ["lvm"]]
LISTS: list[object] = [None, 5, {}, "x", [5], [[]], [None], [PAIR] * 257]
FINGERPRINTS: list[object] = [None, 5, "", [], "g" * 32, FINGERPRINT.upper(), FINGERPRINT + "0"]

BAD_REQUESTS: list[object] = [
    *(None, 5, "claim", [], [CLAIM], {}, {"verb": None}, {"verb": 5}, {"verb": []}, {"verb": "CLAIM"}),
    *({"verb": "serve"}, {"verb": "_claim_disk"}, {"verb": "__init__"}, {"verb": ""}),
    *({**request, "more": 1} for request in (LOOK_IT, CLAIM, PREPARE, PROGRESS, COMMIT_IT, RELEASE)),
    *({"verb": "fill"}, {"verb": "fill", "writes": 5, "more": 1}, {"verb": "prefetch", "backend": "lvm"}),
    *({k: v for k, v in CLAIM.items() if k != left_out} for left_out in CLAIM),
    *({**CLAIM, "vm": value} for value in UUIDS),
    *({**CLAIM, "image": value} for value in UUIDS),
    *({**CLAIM, "volume": value} for value in UUIDS),
    *({**RELEASE, "vm": value} for value in UUIDS),
    *({**CLAIM, "property": value} for value in PROPERTIES),
    *({**RELEASE, "property": value} for value in (None, "off", {"lvm": 1})),
    *({**LOOK_IT, "disks": value} for value in LISTS),
    *({**LOOK_IT, "disks": [{**PAIR, key: value}]} for key in (*PAIR, "more") for value in (5, VM.upper())),
    {**LOOK_IT, "disks": [{"image": IMAGE}]},
]


@pytest.mark.parametrize("request_", BAD_REQUESTS, ids=lambda request: json.dumps(request)[:60])
def test_bad_requests(host: FakeHost, request_: object) -> None:
    host.add(VOLUME, tags(), SIZE)
    assert "only localdisk's own hook talks to it" in Hook(host).refused(request_)
    assert set(host.commands) <= {LOOK}
    assert locks() == []


@pytest.mark.parametrize(
    "changes",
    [
        *({"size": value} for value in [*NUMBERS, 0, 511, 513]),
        *({"writes": value} for value in NUMBERS),
        *({"fingerprint": value} for value in FINGERPRINTS),
        {"fingerprint": FINGERPRINT[:-1] + "\n"},
    ],
    ids=str,
)
def test_bad_prepares(host: FakeHost, changes: dict[str, object]) -> None:
    hook = Hook(host)
    hook.ask(CLAIM)
    assert "request to the helper is refused" in hook.refused(PREPARE, **changes)
    assert host.commands == [LIST, LOOK]
    assert locks() == []


@pytest.mark.parametrize(
    "changes",
    [*({"done": value} for value in NUMBERS), *({"written": value} for value in NUMBERS)],
    ids=str,
)
def test_bad_progress(host: FakeHost, changes: dict[str, object]) -> None:
    hook = Hook(host)
    hook.start()
    assert "request to the helper is refused" in hook.refused(PROGRESS, **changes)
    assert VOLUME not in host.volumes


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"\0" * 100,
        b"[" * 60000,
        b'{"verb":' * 5000,
        b'{"verb": "commit"} {"verb": "commit"}',
        b'{"verb": "progress", "done": ' + b"9" * 60000 + b', "written": 5}',
        json.dumps(COMMIT_IT).encode("utf-16"),
        b"NaN",
        b'{"verb": "\\ud800"}',
    ],
    ids=lambda line: repr(line[:20]),
)
def test_lines_that_are_no_requests(host: FakeHost, line: bytes) -> None:
    answer = Hook(host).session.serve(line)
    assert list(answer) == ["error"]
    assert json.dumps(answer).isascii()
    assert host.commands == []


ORDER = [PREPARE, PROGRESS, COMMIT_IT, {"verb": "fill", "writes": 5}]


@pytest.mark.parametrize("request_", ORDER, ids=lambda request: str(request["verb"]))
def test_verbs_in_the_wrong_order(host: FakeHost, request_: dict[str, object]) -> None:
    hook = Hook(host)
    assert "wrong order" in hook.refused(request_)
    hook.start()
    hook.ask(COMMIT_IT)
    assert "wrong order" in hook.refused(request_)
    hook.ask(LOOK_IT)
    assert "wrong order" in hook.refused(request_)


@pytest.mark.parametrize("request_", [PROGRESS, COMMIT_IT], ids=lambda request: str(request["verb"]))
def test_nothing_to_commit_before_it_is_prepared(host: FakeHost, request_: dict[str, object]) -> None:
    hook = Hook(host)
    hook.ask(CLAIM)
    assert "wrong order" in hook.refused(request_)
    assert locks() == []


# -- any requests at all

FOREIGN = {
    "data": set(),
    OTHER_VOLUME: tags(vm=OTHER_VM),
    "33333333-3333-4333-8333-333333333333": tags("UPDATING", vm=OTHER_VM, ours=False),
    "44444444-4444-4444-8444-444444444444": {"localdisk"},
    "55555555-5555-4555-8555-555555555555": tags(f"VM_{OTHER_VM}"),
}
OWN = {
    VOLUME: tags("STOPPED_5"),
    "66666666-6666-4666-8666-666666666666": tags("UPDATING", image=OTHER_IMAGE),
    "77777777-7777-4777-8777-777777777777": tags(ours=False),
}
NEW = "88888888-8888-4888-8888-888888888888"
OPEN = "99999999-9999-4999-8999-999999999999"

garbage = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
volumes = st.sampled_from([*FOREIGN, *OWN, NEW, OPEN]) | garbage
images = st.sampled_from([IMAGE, OTHER_IMAGE]) | garbage
BASE = {"volume": OTHER_VOLUME, "domain": "", "fingerprint": OTHER_FINGERPRINT, "size": 512}
bases = st.fixed_dictionaries(
    {
        "volume": st.sampled_from([VOLUME, OTHER_VOLUME]) | garbage,
        "domain": st.sampled_from(["", VM]) | garbage,
        "fingerprint": st.sampled_from([FINGERPRINT, OTHER_FINGERPRINT]) | garbage,
        "size": st.sampled_from([512, SIZE]) | garbage,
    }
)
fields = {
    "vm": st.just(VM) | garbage,
    "property": st.sampled_from(["lvm", "lvmthin", "on"]) | garbage,
    "image": images,
    "volume": volumes,
    "disks": st.lists(st.fixed_dictionaries({"image": images, "volume": volumes}), max_size=3) | garbage,
    "size": st.integers(0, 200).map(lambda n: n * 512) | st.just(SIZE) | garbage,
    "fingerprint": st.sampled_from([FINGERPRINT, OTHER_FINGERPRINT]) | garbage,
    "writes": st.integers(0, SIZE) | garbage,
    "done": st.integers(0, SIZE) | garbage,
    "written": st.integers(0, SIZE) | garbage,
    "base": st.none() | st.just(BASE) | bases | garbage,
    "backend": st.sampled_from(["lvm", "lvmthin"]) | garbage,
    "seen": st.just(0) | st.builds(now) | garbage,
}
VERBS = {"look": "vm property disks", "claim": "vm property image volume seen", "release": "vm property"}
VERBS.update({"prepare": "size fingerprint writes base", "progress": "done written", "commit": ""})
VERBS.update({"prefetch": "backend base", "fill": "writes", "reuse": "size fingerprint"})
VERBS.update({"cancel": "vm property", "drifted": "vm property disks"})
VERBS.update({"rehearse": "vm property", "rehearsed": ""})
REUSE = {"verb": "reuse", "size": SIZE, "fingerprint": FINGERPRINT}
FROM_BASE = {**PREPARE, "base": BASE}
FILL = {"verb": "fill", "writes": 512}
PREFETCH = {"verb": "prefetch", "backend": "lvmthin", "base": BASE}
STARTS = [
    CLAIM,
    {**CLAIM, "seen": 1 << 40},
    {**CLAIM, "volume": NEW},
    {**CLAIM, "volume": NEW, "property": "lvmthin"},
    PREFETCH,
]
sound = st.sampled_from([*STARTS, REUSE, PREPARE, FROM_BASE, FILL, PROGRESS, COMMIT_IT, RELEASE]).map(
    json.dumps
)
wild = st.sampled_from(sorted(VERBS)).flatmap(
    lambda verb: st.fixed_dictionaries(
        {"verb": st.just(verb), **{name: fields[name] for name in VERBS[verb].split()}}
    ).map(json.dumps)
)
lines = st.lists(st.one_of(sound, sound, wild, wild, st.text(max_size=20)), max_size=9)
POLICIES = [
    "",
    KEEP,
    "retention: {erase: zero, on_stop: keep, on_source_change: recopy}",
    "cache: {templates: on}",
    "{cache: {templates: on}, retention: {erase: zero}, copy: {parallel: 1}}",
]


@pytest.mark.parametrize(
    ("its_tags", "how"),
    [
        (tags("STOPPED_5"), "kept"),
        (tags(), "kept"),
        (tags("STOPPED_5", fingerprint=OTHER_FINGERPRINT), "new"),
        (tags("UPDATING"), "new"),
        (tags("DELETING"), "new"),
        (None, "new"),
    ],
)
def test_a_kept_disk_is_used_again_or_nothing_changes(
    host: FakeHost, its_tags: set[str] | None, how: str
) -> None:
    """What is in the way of a new disk is removed when the new disk is prepared."""
    if its_tags is not None:
        host.add(VOLUME, its_tags, SIZE)
    before = dict(host.volumes)
    hook = Hook(host, RECOPY)
    assert hook.ask(CLAIM) == TO_PREPARE
    commands = len(host.commands)
    assert hook.ask(REUSE)["how"] == how
    if how == "new":
        assert len(host.commands) == commands
        assert host.volumes == before
        assert hook.ask(PREPARE)["how"] == "copy"
    else:
        assert not any(tag.startswith("STOPPED") for tag in host.volumes[VOLUME].lv_tags)
        assert locks() == []
    hook.session.close()


def test_a_kept_disk_that_the_operator_must_decide_about_is_refused(host: FakeHost) -> None:
    host.add(VOLUME, tags("STOPPED_5", fingerprint=OTHER_FINGERPRINT), SIZE)
    hook = Hook(host, KEEP)
    hook.ask(CLAIM)
    assert "changed" in hook.refused(REUSE)


def test_reuse_needs_a_claim(host: FakeHost) -> None:
    assert "order" in Hook(host).refused(REUSE)
    hook = Hook(host)
    hook.start()
    assert "order" in hook.refused(REUSE)
    assert "UPDATING" not in host.volumes.get(VOLUME, host.volumes["pool0"]).lv_tags


@settings(max_examples=examples(100))
@given(lines, st.sampled_from(POLICIES), st.booleans(), st.booleans())
def test_any_requests(requests: list[str], text: str, is_silent: bool, runs: bool) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        host = FakeHost().install(patch, Path(directory))
        for name, its_tags in {**FOREIGN, **OWN}.items():
            host.add(name, its_tags, SIZE)
        host.add(OPEN, tags(), SIZE, lv_device_open="open")
        host.libvirt_is_silent, host.active = is_silent, {VM} if runs else set()
        before = {name: host.volumes[name].row for name in (*FOREIGN, "pool0")}
        hook = Hook(host, text)
        for request in requests:
            with contextlib.suppress(Ended):
                answer = hook.session.serve(request.encode())
                assert json.dumps(answer).isascii()
        hook.session.close()
        assert {name: host.volumes[name].row for name in before} == before
        assert host.volumes[OPEN].lv_active
        for name in set(host.volumes) - set(OWN):  # no unfinished copy but the one that was there
            assert "UPDATING" not in lv_tags(host, name) or name in before
        for found in template.templates(VolumeGroup.from_report(host.report())):
            assert (found.lv.lv_permissions, found.lv.lv_active) == ("read-only", False)
        assert host.opened == {}
        assert locks() == []
