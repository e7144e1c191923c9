"""A VM is powered off while vdsm starts it: its copy ends at once, nothing is left, and it starts again.

vdsm calls before_vm_destroy, notes that the VM is to be destroyed, waits for the disk's preparation, and
calls after_vm_destroy; then it undefines the VM.  Its other thread, which prepares disks, gets our refusal.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.bed import host, libvirt, vdsm
from tests.bed.player import Call, Result, run_point, start_point
from tests.bed.storage import FileStorage, Image, fill, new_id
from tests.bed.vm import Disk, Vm, disk_json, domain_xml
from tests.kernel.steps import (
    LOCKS,
    MIB,
    THICK,
    THIN,
    begin,
    comes_back,
    configure,
    copied,
    copiers,
    device,
    equals_source,
    localdisk,
    nobody_is_left,
    one_line,
    seqno,
    start,
    starting,
    stop,
    wait_for,
    waited_for,
)

SLOW = "copy: {parallel: 1, bandwidth: 1MiB}\n"
POWERED_OFF = "was powered off before it ran"


@pytest.fixture(autouse=True)
def defaults(libvirt: None) -> Iterator[None]:
    configure()
    yield
    configure()
    for mark in LOCKS.glob("*.destroy*"):
        mark.unlink()


@pytest.fixture
def image(file_storage: FileStorage) -> Image:
    """A slow copy of it takes most of a minute."""
    template = file_storage.template(48 * MIB, seed=1)
    fill(template.leaf, 48 * MIB)
    return file_storage.clone(template, seed=2)


def power_off(vm_id: str, custom: dict[str, str] = THICK) -> None:
    """What vdsm does first."""
    result = run_point("before_vm_destroy", vm_id, "", custom)
    assert (result.rc, result.stderr) == (0, "")


def is_over(vm_id: str, *images: Image, custom: dict[str, str] = THICK) -> None:
    """What vdsm does then, with nothing left of the VM."""
    stop(vm_id, *images, custom=custom)
    libvirt.undefine(vm_id)
    assert not {image.leaf.id for image in images} & set(host.logical_volumes())


def ended(call: Call, within: float = 10) -> str:
    """The refusal of a hook that was cancelled."""
    began = time.monotonic()
    result = call.wait(60)
    assert time.monotonic() - began < within
    return refusal(result)


def refusal(result: Result) -> str:
    line = one_line(result)
    assert POWERED_OFF in line
    return line


@pytest.mark.parametrize("custom", [THICK, THIN], ids=["thick", "thin"])
def test_cancelled_while_copying(thin_pool: str, image: Image, custom: dict[str, str]) -> None:
    configure(SLOW)
    vm_id = new_id()
    call = begin(image, vm_id, custom["localdisk"])
    wait_for(lambda: copied(image), "the copy")
    power_off(vm_id, custom)
    ended(call)
    assert nobody_is_left()
    assert set(host.logical_volumes()) == {host.THIN_POOL}
    assert not list(LOCKS.glob("*.lock")) + list(LOCKS.glob("*.turn"))
    is_over(vm_id, image, custom=custom)
    comes_back(image, vm_id, custom)


def test_cancelled_while_waiting_for_a_turn(
    volume_group: str, image: Image, file_storage: FileStorage
) -> None:
    """The copy that has the turn continues."""
    configure(SLOW)
    other = file_storage.template(16 * MIB, seed=3)
    first, second = new_id(), new_id()
    copying = begin(image, first)
    with waited_for(copying) as results:
        wait_for(lambda: copied(image), "the copy")
        waiting = begin(other, second)
        wait_for(lambda: len(list(LOCKS.glob("*.turn"))) == 2, "the second ticket")
        power_off(second)
        ended(waiting)
        is_over(second, other)
        assert copiers()
    assert results[0].rc == 0, results[0].stderr
    libvirt.undefine(first)
    stop(first, image)
    comes_back(other, second, THICK)


def test_cancelled_while_another_process_has_the_disks_lock(volume_group: str, image: Image) -> None:
    vm_id = new_id()
    LOCKS.mkdir(exist_ok=True)
    path = LOCKS / f"{image.leaf.id}.lock"
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        call = begin(image, vm_id)
        wait_for(lambda: not nobody_is_left(), "the helper")
        time.sleep(1)
        power_off(vm_id)
        ended(call)
        path.unlink()
    assert host.logical_volumes() == {}
    is_over(vm_id, image)
    comes_back(image, vm_id, THICK)


def test_cancelled_while_another_vm_copies_the_template(volume_group: str, file_storage: FileStorage) -> None:
    """First the waiting VM is powered off, then the copying VM; then a third VM copies the template again."""
    configure(SLOW + "cache: {templates: on}\n")
    template = file_storage.template(48 * MIB, seed=1)
    fill(template.leaf, 48 * MIB)
    images = [file_storage.clone(template, seed=seed) for seed in (2, 4, 5)]
    vms = [new_id() for _ in images]
    copying = begin(images[0], vms[0])
    wait_for(copiers, "the copy of the template")
    waiting, third = begin(images[1], vms[1]), begin(images[2], vms[2])
    wait_for(lambda: len([p for p in LOCKS.glob("*.lock") if p.stat().st_size]) >= 4, "the other starts")
    power_off(vms[1])
    ended(waiting)
    assert copiers()
    power_off(vms[0])
    ended(copying)
    wait_for(copiers, "the copy by the third")
    power_off(vms[2])
    ended(third)
    for vm_id, each in zip(vms, images):
        is_over(vm_id, each)
    assert host.logical_volumes() == {}


def test_nothing_is_prepared_for_a_vm_that_was_powered_off(
    volume_group: str, file_storage: FileStorage
) -> None:
    """vdsm calls what it has begun to call for that start: its second disk, and before_vm_start."""
    images = [file_storage.template(16 * MIB, seed=seed) for seed in (1, 2)]
    vm = Vm(starting(new_id()), tuple(Disk(name, image) for name, image in zip(("vda", "vdb"), images)))
    first = vdsm.prepare(vm.id, vm.disks[0], THICK)
    power_off(vm.id)
    assert refusal(run_point("after_disk_prepare", vm.id, disk_json(vm.disks[1]), THICK))
    half = Vm(vm.id, (first, vm.disks[1]))
    assert refusal(run_point("before_vm_start", vm.id, domain_xml(half), THICK))
    assert set(host.logical_volumes()) == {images[0].leaf.id}
    stop(vm.id, *images)
    assert host.logical_volumes() == {}
    libvirt.undefine(vm.id)
    assert refusal(run_point("before_vm_start", vm.id, domain_xml(half), THICK))
    started = vdsm.start(vm, THICK)
    assert all(equals_source(image) for image in images)
    power_off(vm.id)
    assert vdsm.stop(started, THICK).rc == 0
    assert not list(LOCKS.glob("*.*"))


def test_no_copy_is_completed_for_a_vm_that_libvirt_has_forgotten(volume_group: str, image: Image) -> None:
    configure("copy: {bandwidth: 8MiB}\n")  # 12 s: what libvirt has said before is too old then
    vm_id = new_id()
    call = begin(image, vm_id)
    wait_for(lambda: copied(image), "the copy")
    libvirt.undefine(vm_id)
    line = one_line(call.wait(60))
    assert "libvirt no longer knows VM" in line
    assert host.logical_volumes() == {}


def test_a_vm_that_runs_has_nothing_to_cancel(volume_group: str, file_storage: FileStorage) -> None:
    image = file_storage.template(16 * MIB, seed=1)
    vm = Vm(new_id(), (Disk("vda", image),))
    started = vdsm.start(vm, THICK)
    before = seqno()
    for _ in range(2):
        power_off(vm.id)
    assert seqno() == before
    assert not list(LOCKS.glob("*.destroy*"))
    assert vdsm.stop(started, THICK).rc == 0
    start(image, THICK, vm.id)
    stop(vm.id, image)


def test_powered_off_before_it_prepares_and_twice(volume_group: str, image: Image) -> None:
    """vdsm has not come to the VM's disks yet; the second power-off comes after all is over."""
    vm_id = starting(new_id())
    power_off(vm_id)
    is_over(vm_id, image)
    power_off(vm_id)
    comes_back(image, vm_id, THICK)


def test_power_off_is_killed_in_between(volume_group: str, image: Image) -> None:
    """The hook is killed at any moment: the copy ends, or another power-off ends it."""
    configure(SLOW)
    vm_id = new_id()
    for delay in (0.05, 0.2, 0.4, 0.6):
        call = begin(image, vm_id)
        wait_for(lambda: copied(image), "the copy")
        cancelling = start_point("before_vm_destroy", vm_id, "", THICK)
        time.sleep(delay)
        assert cancelling.process
        os.killpg(cancelling.process.pid, signal.SIGKILL)
        cancelling.wait()
        power_off(vm_id)
        ended(call)
        is_over(vm_id, image)
    comes_back(image, vm_id, THICK)


def test_a_start_of_vdsm_forgets_what_was_powered_off(volume_group: str, image: Image) -> None:
    """vdsm was killed before it called after_vm_destroy."""
    vm_id = starting(new_id())
    power_off(vm_id)
    assert list(LOCKS.glob("*.destroy*"))
    assert run_point("before_vdsm_start").rc == 0
    assert not list(LOCKS.glob("*.*"))
    libvirt.undefine(vm_id)
    comes_back(image, vm_id, THICK)
    assert localdisk("gc") == ""
    assert not device(image).exists()
