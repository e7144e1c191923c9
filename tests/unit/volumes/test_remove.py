"""The mode remove: what an operator gives up is removed, what anything needs is kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from localdisk import config, frozen, lock
from localdisk.errors import (
    CommandFailed,
    DependentVolumes,
    DiskNeeded,
    Error,
    ForeignVolume,
    LibvirtSilent,
    NoSuchDisk,
    SeveralDisks,
)
from localdisk.volumes import gc, remove
from localdisk.volumes.lvm import VolumeGroup
from localdisk.volumes.remove import Outcome
from tests.fakes import IMAGE, OTHER_VM, OTHER_VOLUME, VM, VOLUME, FakeHost, aside, tags

NOW = 1_760_000_000
SIZE = 64 << 20
TEMPLATE = "33333333-3333-4333-8333-333333333333"
SHARED = "44444444-4444-4444-8444-444444444444"
NAME = f"ovirt-local/{VOLUME}"


@pytest.fixture(name="host")
def fixture_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHost:
    monkeypatch.setattr(time, "time", lambda: float(NOW))
    return FakeHost().install(monkeypatch, tmp_path)


def removed(*names: str, text: str = "", dry_run: bool = False) -> list[Outcome]:
    return list(remove.remove(config.parse(text.encode(), "F"), names, dry_run))


def void(_value: object) -> None:
    """For what is called for its effect."""


def only(outcomes: list[Outcome]) -> Outcome:
    (found,) = outcomes
    return found


# -- names


@pytest.mark.parametrize("name", [VOLUME, NAME, f"/dev/{NAME}", VM, "web"])
def test_a_disk_is_removed_by_any_of_its_names(host: FakeHost, name: str) -> None:
    mine = host.add(VOLUME, tags(f"STOPPED_{NOW - 7200}"), SIZE)
    host.add(OTHER_VOLUME, tags(vm=OTHER_VM), SIZE)
    host.names = {VM: "web"}
    host.defined = {VM} if name == "web" else set()
    if name == "web":  # a name is libvirt's to know
        assert isinstance(only(removed(name)).failure, DiskNeeded)
        return
    found = only(removed(name))
    assert found.failure is None
    assert found.text == (
        f"{NAME}  VM {VM}, image {IMAGE}, 64 MiB, stopped 2 h ago, made 115 d 17 h ago: removed"
    )
    assert host.removed == [mine]
    assert lock.names() == []


def test_a_vm_is_all_of_its_disks_each_once(host: FakeHost) -> None:
    for volume in (VOLUME, OTHER_VOLUME):
        host.add(volume, tags(), SIZE)
    assert len(removed(VM, VOLUME, f"/dev/{NAME}")) == 2
    assert len(host.removed) == 2


def test_a_second_time_there_is_nothing_of_that_name(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE)
    removed(VOLUME)
    with pytest.raises(NoSuchDisk):
        removed(VOLUME)


@pytest.mark.parametrize("name", ["", "/", "/dev/", "x", "pool1", OTHER_VM, f"other/{VOLUME}", f"{VOLUME}/"])
def test_an_unknown_name_refuses_all_of_it(host: FakeHost, name: str) -> None:
    host.add(VOLUME, tags(), SIZE)
    with pytest.raises(NoSuchDisk) as caught:
        removed(VOLUME, name)
    assert caught.value.exit_code == 2
    assert not host.removed


@pytest.mark.parametrize("lv_tags", [set[str](), {"localdisk"}, {f"VM_{VM}"}])
def test_what_is_not_ours_is_not_touched(host: FakeHost, lv_tags: set[str]) -> None:
    host.add(VOLUME, lv_tags, SIZE)
    for name in (VOLUME, "pool0", "ovirt-local/pool0"):
        with pytest.raises(ForeignVolume):
            removed(name)
    assert host.lvm_commands[1:] == [c for c in host.lvm_commands[1:] if c.startswith("lvm ")]


def test_two_groups_with_a_disk_of_that_name(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    host.add(VOLUME, tags(), SIZE)
    vg = VolumeGroup.from_report(host.report())
    groups = (vg, frozen.replace(vg, vg_name="second"))
    with pytest.raises(SeveralDisks, match=f"{NAME}, second/{VOLUME}"):
        remove.find(groups, {}, VOLUME)
    assert len(remove.find(groups, {}, f"second/{VOLUME}")) == 1
    assert len(remove.find(groups, {}, VM)) == 2


# -- what is needed stays


@pytest.mark.parametrize(
    ("act", "kind", "why"),
    [
        (lambda host, _: host.active.add(VM), DiskNeeded, "its VM .* runs"),
        (lambda host, _: host.defined.add(VM), DiskNeeded, "is being started"),
        (lambda _, volume: setattr(volume, "lv_device_open", "open"), DiskNeeded, "its device is open"),
        (
            lambda host, _: host.add("backup", (), origin=VOLUME),
            DependentVolumes,
            "would remove backup along",
        ),
    ],
)
@pytest.mark.parametrize("is_late", [False, True])
def test_what_anything_needs_is_refused(
    host: FakeHost, act: Callable[..., object], kind: type[Error], why: str, is_late: bool
) -> None:
    """Also if it is needed only since the first check; the other named disk is kept, too."""
    volume = host.add(VOLUME, tags(), SIZE)
    other = host.add(OTHER_VOLUME, tags(vm=OTHER_VM), SIZE)
    if is_late:
        host.before_command(2, lambda: void(act(host, volume)))
    else:
        act(host, volume)
    found = removed(VOLUME, OTHER_VOLUME)
    assert isinstance(found[0].failure, kind)
    assert found[0].text.endswith(": kept")
    with pytest.raises(kind, match=why):
        raise found[0].failure
    assert host.volumes[VOLUME] is volume
    assert host.removed == ([other] if is_late else [])


def test_what_a_process_works_on_is_refused(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    host.add(VOLUME, tags(), SIZE)
    with lock.trying(lock.disk_lock(VOLUME)):
        for is_seen in (True, False):  # at first, or only when it is about to be removed
            monkeypatch.setattr(remove, "_is_locked", lambda _named, seen=is_seen: seen)
            assert "a process works on it" in str(only(removed(VOLUME)).failure)
    assert not host.removed


def test_nothing_is_removed_while_libvirt_is_silent(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE)
    host.libvirt_is_silent = True
    with pytest.raises(LibvirtSilent):
        removed(VOLUME)
    assert not host.removed


def test_a_failure_does_not_keep_the_others(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE)
    other = host.add(OTHER_VOLUME, tags(vm=OTHER_VM), SIZE)
    host.fail("lvremove", "  Failed to write VG ovirt-local.\n")
    first, second = removed(VOLUME, OTHER_VOLUME)
    assert isinstance(first.failure, CommandFailed)
    assert second.failure is None
    assert host.removed == [other]


def test_one_that_goes_meanwhile(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE)
    host.before_command(2, lambda: void(host.volumes.pop(VOLUME)))
    assert only(removed(VOLUME)).text.endswith(": removed meanwhile")


def test_dry_run_changes_nothing(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE)
    assert only(removed(VOLUME, dry_run=True)).text.endswith(": would be removed")
    assert (host.tools, host.removed) == (["virsh", "fullreport"], [])


# -- kinds of disks, and their erase


@pytest.mark.parametrize(
    ("lv_tags", "shown"),
    [
        (tags(), "ready"),
        (tags(ours=False), "ready, of vdsm's older hook"),
        (tags("STALE"), "ready, stale"),
        (tags(f"STOPPED_{NOW - 7200}", "STALE"), "stopped 2 h ago, stale"),
        (tags("UPDATING"), "unfinished"),
        (tags("DELETING"), "deleting"),
    ],
)
def test_every_kind_of_disk(host: FakeHost, lv_tags: set[str], shown: str) -> None:
    volume = host.add(VOLUME, lv_tags, SIZE)
    assert f", {shown}, made " in only(removed(VOLUME)).text
    assert host.removed == [volume]


@pytest.mark.parametrize("name", [TEMPLATE, SHARED])
def test_a_template_lv(host: FakeHost, name: str) -> None:
    volume = host.add(TEMPLATE, {"localdisk", f"TEMPLATE_{SHARED}", f"USED_{NOW}"}, SIZE)
    assert f"  template {SHARED}, 64 MiB, ready" in only(removed(name)).text
    assert host.removed == [volume]


def test_what_must_be_erased_is_set_aside_for_gc(host: FakeHost) -> None:
    volume = host.add(VOLUME, tags(), SIZE)
    text = "retention: {erase: zero}"
    found = only(removed(VOLUME, text=text))
    assert found.text.endswith(": set aside, erased (zero) and removed by the next localdisk gc")
    assert volume.lv_tags == aside("zero", volume.lv_name)
    again = only(removed(volume.lv_name, text=text))
    assert (again.failure, volume.lv_tags) == (None, aside("zero", volume.lv_name))
    assert "  no VM's any more, 64 MiB, set aside" in again.text
    gc.collect(config.parse(text.encode(), "F"))
    assert host.removed == [volume]
