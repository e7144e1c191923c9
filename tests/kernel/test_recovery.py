"""vdsm prepares disks of VMs that it does not start: it recovers the VMs, or they are migrated or resumed.

Real VMs on real libvirt; `tests/bed/vdsm.py` plays vdsm.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bed import host, libvirt, vdsm
from tests.bed.player import Result, run_point, start_point
from tests.bed.shell import run
from tests.bed.storage import FileStorage, digest, fill, new_id
from tests.bed.vm import Disk, Vm, boot_sector, disk_json
from tests.kernel.steps import (
    MIB,
    THICK,
    configure,
    copied,
    device,
    helpers,
    kill_all,
    localdisk,
    paused_copies,
    seqno,
    start,
    starting,
    stop,
    tags,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("defaults")

SIZE = 8 * MIB
KEEP = "retention: {on_stop: keep, on_source_change: recopy}\n"
Come = Callable[[Vm, Mapping[str, str]], None]
WEEK = b"what the guest has written in a week"


@pytest.fixture
def vm(volume_group: str, file_storage: FileStorage) -> Iterator[Vm]:
    """A VM with two disks, one a chain of qcow2 volumes, that can be started; nothing of it is left."""
    base = file_storage.template(SIZE, seed=1, boot=boot_sector("hello"))
    images = (file_storage.clone(base, layers=2, seed=2), file_storage.template(SIZE, seed=3))
    made = Vm(new_id(), (Disk("vda", images[0], 1), Disk("sda", images[1])), host.SCRATCH / "serial-recovery")
    yield made
    configure()
    if made.id in libvirt.active():
        libvirt.destroy(made.id)
    vdsm.release(made, THICK)
    assert made.id not in libvirt.known()


def guest_writes(vm: Vm) -> None:
    """To the place where its first disk is."""
    fd = os.open(device(vm.disks[0].image), os.O_WRONLY | os.O_DSYNC)
    os.pwrite(fd, WEEK, 5 * MIB)
    os.close(fd)


def seen(vm: Vm) -> tuple[object, ...]:
    """All that recovery must not change: each commit of the group, and each byte."""
    return seqno(), host.logical_volumes(), [digest(device(disk.image), SIZE) for disk in vm.disks]


def is_left_alone(vm: Vm, results: list[Result]) -> bool:
    asked = [vdsm.recovered_disk(disk) for disk in vm.disks]
    assert [(result.rc, result.data) for result in results] == [(0, data) for data in asked], results
    return True


def be_paused(vm_id: str) -> None:
    libvirt.virsh("suspend", vm_id)


STATES = {"runs": lambda vm_id: None, "is paused": be_paused, "is shut off": libvirt.destroy}


@contextmanager
def hanging_lvm() -> Iterator[None]:
    script = Path("/run/hanging-lvm")
    script.write_text("#!/bin/sh\nexec sleep 3600\n")
    script.chmod(0o755)
    run("mount", "--bind", str(script), "/usr/sbin/lvm")
    try:
        yield
    finally:
        run("umount", "/usr/sbin/lvm")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("config", ["", KEEP], ids=["delete", "keep"])
def test_a_vm_that_vdsm_recovers_is_left_alone(vm: Vm, state: str, config: str) -> None:
    """After a crash of vdsm or of the host; its domain is persistent."""
    configure(config)
    vdsm.start(vm, THICK)
    guest_writes(vm)
    STATES[state](vm.id)
    before = seen(vm)
    assert is_left_alone(vm, vdsm.recover(vm, THICK))
    assert seen(vm) == before
    assert WEEK in device(vm.disks[0].image).read_bytes()


@pytest.mark.parametrize("state", STATES)
def test_nothing_is_refused_whatever_is_broken(vm: Vm, state: str) -> None:
    """A refusal would keep vdsm from watching the VM's other disks, which it extends."""
    vdsm.start(vm, THICK)
    guest_writes(vm)
    STATES[state](vm.id)
    before = seen(vm)
    configure("volume_grop: x\n")
    assert is_left_alone(vm, vdsm.recover(vm, THICK))
    assert is_left_alone(vm, vdsm.recover(vm, {"localdisk": "nonsense"}))
    configure("volume_group: another\n")
    assert is_left_alone(vm, vdsm.recover(vm, THICK))
    configure()
    with hanging_lvm():
        assert is_left_alone(vm, vdsm.recover(vm, THICK))
    assert seen(vm) == before


def test_the_engine_destroys_a_vm_that_was_recovered(vm: Vm) -> None:
    """Then it has stopped as any other."""
    configure(KEEP)
    vdsm.start(vm, THICK)
    libvirt.destroy(vm.id)
    vdsm.recover(vm, THICK)
    assert vdsm.release(vm, THICK).rc == 0
    for disk in vm.disks:
        assert any(tag.startswith("STOPPED_") for tag in tags(disk.image))


# -- what comes from elsewhere


@pytest.mark.parametrize(
    ("come", "message"),
    [
        (vdsm.migrate_here, "it cannot be migrated"),
        (vdsm.resume, "it cannot be resumed from a saved state"),
        (lambda vm, custom: vdsm.resume(vm, custom, is_preview=True), "it cannot be resumed"),
    ],
    ids=["migration", "resume", "preview"],
)
@pytest.mark.parametrize("has_run_here", [False, True])
def test_what_comes_from_elsewhere_is_refused_and_nothing_is_copied(
    vm: Vm, come: Come, message: str, has_run_here: bool
) -> None:
    configure(KEEP)
    if has_run_here:
        vdsm.stop(vdsm.start(vm, THICK), THICK)
    before = (seqno(), host.logical_volumes())
    with pytest.raises(vdsm.Refused, match=message):
        come(vm, THICK)
    assert (seqno(), host.logical_volumes()) == before


@pytest.mark.parametrize("come", [vdsm.migrate_here, vdsm.resume])
@pytest.mark.parametrize("custom", [THICK, {}], ids=["not on this host", "without the property"])
def test_a_vm_that_is_not_local_here_comes(vm: Vm, come: Come, custom: Mapping[str, str]) -> None:
    configure(f"vms: {{{vm.id}: {{enabled: false}}}}\n" if custom else "")
    come(vm, custom)
    assert host.logical_volumes() == {}


# -- placeholders that vdsm leaves behind


def test_an_unfinished_disk_whose_vm_has_only_a_placeholder(vm: Vm) -> None:
    """Hook and helper are killed in a start, and vdsm never asks for that VM again."""
    configure("copy: {bandwidth: 1MiB}\n")
    image = vm.disks[1].image
    fill(image.leaf, SIZE)
    starting(vm.id)
    call = start_point("after_disk_prepare", vm.id, disk_json(vm.disks[1]), THICK)
    wait_for(lambda: "UPDATING" in host.logical_volumes().get(image.leaf.id, ()), "the copy")
    assert call.process
    kill_all(*helpers(), -call.process.pid)
    call.wait()
    wait_for(lambda: not host.processes_of("vdsm"), "the copy to end")
    assert "unfinished copy that nobody works on" in localdisk("gc")
    assert host.logical_volumes() == {}


@pytest.mark.parametrize("is_shut_off", [False, True])
def test_a_complete_disk_of_a_vm_that_does_not_run(vm: Vm, is_shut_off: bool) -> None:
    """vdsm was restarted in the midst of a start with two disks, or the VM has ended without it."""
    configure("retention: {grace: 1s}\n")
    image = vm.disks[0].image
    if is_shut_off:
        vdsm.start(vm, THICK)
        libvirt.destroy(vm.id)
    else:
        start(image, vm_id=vm.id)
        starting(vm.id)
    assert ": no VM needs it; removed if that is so after 1 s" in localdisk("gc")
    assert any(tag.startswith("UNNEEDED_") for tag in tags(image))
    wait_for(lambda: not host.logical_volumes() or not localdisk("gc"), "gc to remove it")


@pytest.mark.parametrize(("config", "left"), [("", 0), (KEEP, 1)])
def test_before_vdsm_starts_a_placeholder_holds_nothing(vm: Vm, config: str, left: int) -> None:
    configure(config)
    image = vm.disks[0].image
    start(image, vm_id=vm.id)
    starting(vm.id)
    assert run_point("before_vdsm_start").rc == 0
    assert len(host.logical_volumes()) == left
    assert not left or any(tag.startswith("STOPPED_") for tag in tags(image))
    libvirt.undefine(vm.id)
    configure()
    stop(vm.id, image)


def test_gc_leaves_a_disk_whose_vm_still_waits_for_its_other_disk(vm: Vm) -> None:
    """However short `grace` is: the first is complete and closed while the second is copied."""
    configure("copy: {bandwidth: 1MiB}\nretention: {grace: 0s}\n")
    first, second = vm.disks
    fill(second.image.leaf, SIZE)
    starting(vm.id)
    vdsm.prepare(vm.id, first, THICK)
    call = start_point("after_disk_prepare", vm.id, disk_json(second), THICK)
    wait_for(lambda: copied(second.image) > 0, "progress")
    with paused_copies():
        for _ in range(3):
            assert "kept: another disk of its VM is being prepared" in localdisk("gc")
    assert call.wait().rc == 0
    assert {first.image.leaf.id, second.image.leaf.id} == set(host.logical_volumes())
