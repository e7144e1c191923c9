"""A VM that begins to run on this host without its kept disks: they are stale, whatever is killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from localdisk import kept, lock
from localdisk.errors import CommandFailed
from localdisk.hook import points
from localdisk.status import snapshot
from localdisk.vdsm import hook_call
from localdisk.volumes import gc
from localdisk.zipapp import main
from tests.fakes import IMAGE, OTHER_IMAGE, OTHER_VM, OTHER_VOLUME, VM, VOLUME, FakeHost, Killed, tags
from tests.fakes.session import CLAIM, COMMIT_IT, KEEP, KEPT, PREPARE, RELEASE, SIZE, Hook, parsed
from tests.fakes.vdsm import Vdsm

STALE = {"verb": "stale", "vm": VM, "images": ["*"]}
BEGINNINGS = ("before_vm_start", "before_vm_migrate_destination")


@pytest.fixture(name="host")
def fixture_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHost:
    return FakeHost().install(monkeypatch, tmp_path)


@pytest.fixture(name="host_vdsm")
def fixture_host_vdsm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Vdsm:
    return Vdsm(monkeypatch, tmp_path)


def stale_names(host: FakeHost) -> set[str]:
    return {name for name, volume in host.volumes.items() if "STALE" in volume.lv_tags}


# -- the mark


@pytest.mark.parametrize(
    ("images", "expected"),
    [(["*"], {VOLUME, OTHER_VOLUME}), ([IMAGE], {VOLUME}), ([OTHER_IMAGE, IMAGE], {VOLUME, OTHER_VOLUME})],
)
def test_kept_disks_of_the_vm_are_marked(host: FakeHost, images: list[str], expected: set[str]) -> None:
    host.add(VOLUME, tags("STOPPED_5"), SIZE)
    host.add(OTHER_VOLUME, tags(image=OTHER_IMAGE), SIZE)
    host.add("33333333-3333-4333-8333-333333333333", tags(vm=OTHER_VM), SIZE)
    host.add("44444444-4444-4444-8444-444444444444", tags("UPDATING"), SIZE)
    assert Hook(host).ask(STALE, images=images) == {}
    assert stale_names(host) == expected
    assert host.tools == ["fullreport", "fullreport", "lvchange"]
    assert lock.names() == []
    assert Hook(host).ask(STALE, images=images) == {}
    assert host.tools[3:] == ["fullreport"], "what is marked is marked"


@pytest.mark.parametrize(("is_active", "is_silent"), [(True, False), (False, True), (False, False)])
def test_the_disk_that_a_vm_runs_from_is_not_marked(host: FakeHost, is_active: bool, is_silent: bool) -> None:
    """A disk that something other than the VM has open is marked."""
    host.add(VOLUME, tags(), SIZE, lv_device_open="open")
    host.active, host.libvirt_is_silent = ({VM} if is_active else set()), is_silent
    assert Hook(host).ask(STALE) == {}
    assert stale_names(host) == (set() if is_active or is_silent else {VOLUME})


@pytest.mark.parametrize("images", [None, [], "*", ["*", IMAGE], ["x"], [5], [IMAGE.upper()], [IMAGE] * 257])
def test_images_that_are_none(host: FakeHost, images: Any) -> None:
    assert "refused" in Hook(host).refused(STALE, images=images)
    assert kept.noted() == {}


@pytest.mark.parametrize("number", range(4))
def test_whoever_is_killed_leaves_a_doubt(host: FakeHost, number: int) -> None:
    """Before its command of that number; the next local start is refused as if it had been marked."""
    host.add(VOLUME, tags("STOPPED_5"), SIZE)
    host.kill_before(number)
    with contextlib.suppress(Killed):
        Hook(host).ask(STALE)
    host.before = {}
    hook = Hook(host, KEEP)
    hook.ask(CLAIM)
    assert "is stale" in hook.refused(PREPARE)
    assert stale_names(host) == {VOLUME}


@pytest.mark.parametrize("is_locked", [True, False])
def test_gc_marks_what_was_in_doubt(host: FakeHost, is_locked: bool) -> None:
    host.add(VOLUME, tags("STOPPED_5"), SIZE)
    host.defined = {VM}
    kept.doubt(VM, [IMAGE])
    with lock.trying(lock.disk_lock(VOLUME)) if is_locked else contextlib.nullcontext():
        gc.collect(parsed(KEEP))
    assert stale_names(host) == (set() if is_locked else {VOLUME})
    assert kept.doubted(VM) == ((IMAGE,) if is_locked else ())


def test_a_mark_for_which_the_metadata_area_is_full(host: FakeHost) -> None:
    """It takes the place of what says in which boot the VM stopped; the date says nearly the same."""
    boot = "BOOT_dddddddd-dddd-4ddd-8ddd-dddddddddddd_7"
    volume = host.add(VOLUME, tags("STOPPED_5", boot), SIZE)
    said = "VG x 27 metadata on /dev/a (523730 bytes) exceeds maximum metadata size (521472 bytes)"
    host.fail("lvchange", f"  {said}\n", times=2)
    assert Hook(host).ask(STALE) == {}
    assert volume.lv_tags == tags("STOPPED_5", "STALE")
    assert kept.doubted(VM) == ()


def test_a_mark_that_fails_is_made_up_for(host: FakeHost) -> None:
    host.add(VOLUME, tags("STOPPED_5"), SIZE)
    host.fail("lvchange", "  Failed to write VG\n")
    assert "Failed to write VG" in Hook(host).refused(STALE)
    assert kept.doubted(VM) == ("*",)
    host.defined = {VM}
    gc.collect(parsed(KEEP))
    assert stale_names(host) == {VOLUME}


def test_status_shows_it(host: FakeHost) -> None:
    host.add(VOLUME, tags("STOPPED_5", "STALE"), SIZE)
    host.add(OTHER_VOLUME, tags("STOPPED_5"), SIZE)
    rows = {row.volume: row.next.text for row in snapshot.take(parsed(KEEP)).disks}
    assert rows[VOLUME] == f"stale, {rows[OTHER_VOLUME]}"


# -- the record of who has kept disks


def test_a_disk_is_on_record_before_it_is_complete(host: FakeHost) -> None:
    hook = Hook(host, KEEP)
    hook.start()
    assert kept.noted() == {}
    host.fail("lvchange", "  it failed\n")
    assert "it failed" in hook.refused(COMMIT_IT)
    assert kept.noted() == {VM: ()}


def test_a_kept_disk_is_on_record(host: FakeHost) -> None:
    host.add(VOLUME, tags(), SIZE)
    assert Hook(host, KEEP).ask(RELEASE) == {}
    assert kept.noted() == {VM: ()}
    os.unlink(kept.path(VM))
    assert Hook(host, KEEP).start() == KEPT
    assert kept.noted() == {VM: ()}


@pytest.mark.parametrize("is_dry", [True, False])
def test_gc_writes_the_record_anew(host: FakeHost, is_dry: bool) -> None:
    """As after a boot, when /run is empty; and it removes what is none any more."""
    host.add(VOLUME, tags("STOPPED_5"), SIZE)
    host.add(OTHER_VOLUME, tags("STALE", vm=OTHER_VM), SIZE)
    host.defined = {VM, OTHER_VM}
    kept.note(OTHER_VM)
    (Path(lock.RUN) / "kept" / "no uuid").touch()
    gc.collect(parsed(KEEP), dry_run=is_dry)
    assert kept.noted() == ({OTHER_VM: ()} if is_dry else {VM: (), OTHER_VM: ()})


def test_gc_that_cannot_read_a_group_removes_no_record(host: FakeHost) -> None:
    kept.note(OTHER_VM)
    text = f"{{volume_group: ovirt-local, vms: {{{VM}: {{volume_group: gone}}}}}}"
    assert gc.collect(parsed(text)).problems
    assert kept.noted() == {OTHER_VM: ()}


def test_gc_leaves_a_record_that_is_made_while_it_works(host: FakeHost) -> None:
    """As while it erases for hours: the disk of that VM was not there when gc read the group."""
    kept.note(VM)
    os.utime(kept.path(VM), ns=(5, 5))
    kept.note(OTHER_VM)
    os.utime(kept.path(OTHER_VM), ns=(5, 5))

    def kept_now(_argv: list[str]) -> None:
        kept.note(OTHER_VM)

    host.before["lvm"] = kept_now
    gc.collect(parsed(KEEP))
    assert kept.noted() == {OTHER_VM: ()}


def test_a_process_that_is_killed_while_it_records_loses_no_doubt(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when it adds a doubt, nor when it takes one back."""
    kept.doubt(VM, [IMAGE])

    def kill(*_arguments: object) -> None:
        raise Killed

    for name in ("pwrite", "ftruncate"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, kill)
            with contextlib.suppress(Killed):
                kept.doubt(VM, [OTHER_IMAGE])
            with contextlib.suppress(Killed):
                kept.settle(VM, (), ())
        assert IMAGE in kept.doubted(VM)


def test_a_doubt_is_added_to_what_was_in_doubt(host: FakeHost) -> None:
    host.add(VOLUME, tags("STOPPED_5"), SIZE)
    kept.doubt(VM, [IMAGE])
    kept.doubt(VM, [OTHER_IMAGE])
    assert set(kept.doubted(VM)) == {IMAGE, OTHER_IMAGE}
    assert Hook(host).ask(STALE, images=[OTHER_IMAGE]) == {}
    assert stale_names(host) == {VOLUME}


@pytest.mark.parametrize("is_read", [True, False])
def test_every_vm_may_have_kept_disks_until_gc_has_read_all_groups(host: FakeHost, is_read: bool) -> None:
    text = "" if is_read else f"{{vms: {{{VM}: {{volume_group: gone}}}}}}"
    assert kept.may_have(OTHER_VM)
    gc.collect(parsed(text), dry_run=True)
    assert kept.may_have(OTHER_VM)
    gc.collect(parsed(text))
    assert kept.may_have(OTHER_VM) == (not is_read)
    assert kept.noted() == {}


def test_no_record_refuses_anything(host: FakeHost) -> None:
    os.makedirs(lock.RUN)
    (Path(lock.RUN) / "kept").touch()  # in the place of the directory
    hook = Hook(host, KEEP)
    assert hook.start()["target"]
    assert hook.ask(COMMIT_IT) == {}
    assert hook.ask(RELEASE) == {}
    assert kept.noted() == {}


# -- the hook


@pytest.mark.parametrize("point", BEGINNINGS)
def test_a_vm_without_the_property_marks_its_kept_disks(host_vdsm: Vdsm, point: str) -> None:
    host_vdsm.host.add(VOLUME, tags("STOPPED_5"), SIZE)
    assert host_vdsm.call(point, "anything", localdisk="off") == "anything"
    assert stale_names(host_vdsm.host) == {VOLUME}


def test_a_vm_without_the_property_is_never_refused(host_vdsm: Vdsm, monkeypatch: pytest.MonkeyPatch) -> None:
    host_vdsm.host.add(VOLUME, tags("STOPPED_5"), SIZE)
    host_vdsm.host.fail("lvm", "  it failed\n", times=9)
    assert host_vdsm.call("before_vm_start", "anything", localdisk="off") == "anything"
    assert kept.doubted(VM) == ("*",)

    def gone(*_arguments: object) -> None:
        raise CommandFailed(("sudo",), 1, "it is gone")

    monkeypatch.setattr(points, "Helper", gone)
    assert host_vdsm.call("before_vm_start", "anything", localdisk="off") == "anything"


# -- the first lines


def test_the_names_are_everywhere_the_same() -> None:
    assert main.BEGINNINGS == hook_call.BEGINNINGS == BEGINNINGS
    assert main.KEPT == "/run/localdisk/kept/"
    assert kept.path(kept.ALL) == f"{main.KEPT}all"


@pytest.mark.parametrize("point", main.POINTS_OF_A_VM)
@pytest.mark.parametrize("is_all", [True, False])
@pytest.mark.parametrize(
    ("environ", "is_noted"),
    [
        ({"vmId": VM}, True),
        ({"vmId": VM.upper(), "localdisk": "off"}, True),
        ({"vmId": OTHER_VM}, False),
        ({"vmId": ""}, False),
        ({}, False),
    ],
)
def test_who_is_let_through(
    tmp_path: Path, point: str, environ: dict[str, str], is_noted: bool, is_all: bool
) -> None:
    """In the zipapp `bootstrap` is beside it; here it is one that tells."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / VM).touch()
    if is_all:
        (tmp_path / "kept" / kept.ALL).touch()
    text = Path(main.__file__).read_text().replace(main.KEPT, f"{tmp_path}/kept/")
    (tmp_path / "__main__.py").write_text(text)
    (tmp_path / "bootstrap.py").write_text("def packages(): return 'x'\ndef run(_found): print('goes on')")
    argv = [sys.executable, str(tmp_path), "hook", point]
    done = subprocess.run(argv, capture_output=True, text=True, env=environ, check=True)
    assert done.stdout == ("goes on\n" if (is_noted or not is_all) and point in BEGINNINGS else "")
