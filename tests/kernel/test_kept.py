"""Kept disks whose image has changed, or has another leaf: they are used, refused or replaced, but not lost.

On file storage and on block storage.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.bed import host, libvirt
from tests.bed.here import loop_device
from tests.bed.player import run_point
from tests.bed.shell import run
from tests.bed.storage import COW, RAW, Image, Storage, fill, new_id, qemu_io
from tests.bed.vm import Disk, Vm, disk_json, disk_xml, domain_xml
from tests.kernel.steps import (
    KEEP,
    LOCKS,
    MIB,
    THICK,
    WRITTEN,
    configure,
    device,
    equals_source,
    localdisk,
    lv_uuid,
    refused_disk,
    seqno,
    start,
    starting,
    status,
    stop,
    tags,
)

RECOPY = "retention: {on_stop: keep, on_source_change: recopy}\n"


@pytest.fixture(autouse=True)
def defaults(libvirt: None, volume_group: str) -> Iterator[None]:
    configure(KEEP)
    yield
    configure()
    host.remove(*host.logical_volumes())  # they are kept
    assert not list(LOCKS.glob("*.*")), "a lock is left behind"


def snapshot(storage: Storage, image: Image) -> Image:
    """What a snapshot of a VM that is down makes of the image: an empty layer upon its leaf."""
    leaf = image.leaf
    top = storage.new_volume(image.id, COW, leaf.size, leaf)
    return replace(image, volumes=(*image.volumes, top))


def keep(image: Image) -> str:
    """A VM runs from its local disk, writes there, and stops; returns its id."""
    vm_id = start(image)
    with open(device(image), "r+b") as disk:
        disk.write(WRITTEN)
    stop(vm_id, image)
    return vm_id


def holds_what_the_guest_wrote(image: Image) -> bool:
    run("lvchange", "-ay", "-K", f"{host.VOLUME_GROUP}/{image.leaf.id}")
    return device(image).read_bytes().startswith(WRITTEN)


@pytest.mark.parametrize(("kind", "volume_format"), [("file", RAW), ("block", COW)])
def test_an_empty_layer_changes_nothing(
    request: pytest.FixtureRequest, kind: str, volume_format: str
) -> None:
    storage = request.getfixturevalue(f"{kind}_storage")
    image = storage.template(16 * MIB, volume_format, seed=1)
    vm_id = keep(image)
    made, source = lv_uuid(image), tags(image)
    upper = snapshot(storage, snapshot(storage, image))
    for leaf in (upper, image):  # the snapshot is made, and deleted again
        start(leaf, vm_id=vm_id)
        assert lv_uuid(leaf) == made
        assert {tag for tag in source if tag.startswith("SOURCE_")} <= tags(leaf)
        assert holds_what_the_guest_wrote(leaf)
        stop(vm_id, leaf)
        assert len(host.logical_volumes()) == 1


def test_another_leaf_is_a_changed_source(block_storage: Storage) -> None:
    storage = block_storage
    image = storage.clone(storage.template(16 * MIB, seed=2), seed=3)
    vm_id = keep(image)
    made = lv_uuid(image)
    upper = snapshot(storage, image)
    qemu_io(upper.leaf, ["write -P 9 5M 64k"])
    said = refused_disk(upper, vm_id=vm_id)
    assert f"{host.VOLUME_GROUP}/{image.leaf.id} was not copied from" in said
    assert "on_source_change: recopy" in said
    assert lv_uuid(image) == made

    start(image, vm_id=vm_id)  # the snapshot is previewed, or was deleted
    assert holds_what_the_guest_wrote(image)
    stop(vm_id, image)

    configure(RECOPY)
    start(upper, vm_id=vm_id)
    assert equals_source(upper)
    assert [*host.logical_volumes()] == [upper.leaf.id]
    stop(vm_id, upper)


def test_the_kept_disk_is_used_after_a_merge_as_the_refusal_advises(file_storage: Storage) -> None:
    """A snapshot is deleted while the VM is down: another leaf, and the same bytes."""
    storage = file_storage
    image = storage.clone(storage.template(16 * MIB, seed=2), seed=3)
    upper = snapshot(storage, image)
    qemu_io(upper.leaf, ["write -P 9 5M 64k"])
    vm_id = keep(upper)
    made = lv_uuid(upper)
    run("qemu-img", "commit", "-q", "-f", "qcow2", upper.leaf.id, cwd=str(upper.leaf.path.parent))
    said = refused_disk(image, vm_id=vm_id)
    assert "was not copied from" in said
    run(*shlex.split(said.partition("to use it nevertheless: ")[2]))
    start(image, vm_id=vm_id)
    assert lv_uuid(image) == made
    assert holds_what_the_guest_wrote(image)
    stop(vm_id, image)


@pytest.mark.parametrize(("is_other_leaf", "erase"), [(True, "zero"), (False, "none")])
def test_a_start_that_is_refused_for_room_has_removed_nothing(
    file_storage: Storage, is_other_leaf: bool, erase: str
) -> None:
    """If the kept disk would make enough room, it is removed first; otherwise it is kept."""
    retention = f"on_stop: keep, on_source_change: recopy, erase: {erase}"
    configure(f"retention: {{{retention}}}\n")
    image = file_storage.template(16 * MIB, seed=4)
    vm_id = keep(image)
    made, now = lv_uuid(image), image
    if is_other_leaf:
        now = snapshot(file_storage, image)
    qemu_io(now.leaf, ["write -P 9 5M 64k"])
    free = int(run("vgs", "--noheadings", "--units", "b", "--nosuffix", "-o", "vg_free", host.VOLUME_GROUP))
    configure(f"retention: {{{retention}}}\nmargins: {{reserve: {free + 4 * MIB}}}\n")
    assert "lacks" in refused_disk(now, vm_id=vm_id)
    assert lv_uuid(image) == made

    configure(f"retention: {{{retention}}}\nmargins: {{reserve: {free}}}\n")
    start(now, vm_id=vm_id)
    assert equals_source(now)
    assert [*host.logical_volumes()] == [now.leaf.id]
    assert lv_uuid(now) != made
    stop(vm_id, now)


def test_a_copy_that_fails_leaves_the_kept_disk(file_storage: Storage) -> None:
    """The VM uses it again if it starts from the leaf that was copied."""
    storage = file_storage
    configure(RECOPY)
    image = storage.template(16 * MIB, COW, seed=5)
    vm_id = keep(image)
    made = lv_uuid(image)
    upper = snapshot(storage, image)
    qemu_io(upper.leaf, ["write -P 9 5M 64k"])
    starting(vm_id)
    run("mv", "/usr/bin/qemu-img", "/usr/bin/qemu-img.aside")
    try:
        result = run_point("after_disk_prepare", vm_id, disk_json(Disk("vda", upper)), THICK)
    finally:
        run("mv", "/usr/bin/qemu-img.aside", "/usr/bin/qemu-img")
        libvirt.undefine(vm_id)
    assert result.rc == 2
    assert "qemu-img is not installed" in result.stderr
    configure(KEEP)
    start(image, vm_id=vm_id)
    assert lv_uuid(image) == made
    assert holds_what_the_guest_wrote(image)
    stop(vm_id, image)


# -- what a changed source is, on block storage


def test_a_cluster_that_gets_data_is_noticed(block_storage: Storage) -> None:
    """Behind the first 256 KiB, which once were all that was looked at."""
    image = block_storage.image(image_id := new_id(), block_storage.new_volume(image_id, COW, 16 * MIB))
    qemu_io(image.leaf, ["write -P 5 0 1M"])
    vm_id = keep(image)
    qemu_io(image.leaf, ["write -z 12M 64k"])
    assert "has changed since it was copied" in refused_disk(image, vm_id=vm_id)


def test_a_piece_of_a_raw_volume_that_changes_is_noticed(block_storage: Storage) -> None:
    image = block_storage.image(image_id := new_id(), block_storage.new_volume(image_id, RAW, 64 * MIB))
    fill(image.leaf, 64 * MIB)
    vm_id = keep(image)
    qemu_io(image.leaf, [f"write -P 9 {33 * MIB} {64 * MIB // 512 + 4096}"])
    assert "has changed since it was copied" in refused_disk(image, vm_id=vm_id)


# -- a run without the property


def test_a_kept_disk_that_its_vm_ran_without_is_stale(file_storage: Storage) -> None:
    """The source is restored, so that only the mark shows it."""
    image = file_storage.template(16 * MIB, seed=6)
    other = file_storage.template(16 * MIB, seed=7)
    vm_id, other_vm = keep(image), keep(other)
    vm = Vm(vm_id, (Disk("vda", image),))
    shutil.rmtree(LOCKS / "kept")  # the host was booted
    localdisk("gc")
    before = seqno()
    for point in ("before_vm_migrate_source", "after_vm_destroy"):
        assert run_point(point, vm_id, domain_xml(vm), {}).rc == 0
    assert seqno() == before
    result = run_point("before_vm_start", vm_id, domain_xml(vm), {})
    assert (result.rc, result.data) == (0, domain_xml(vm))
    assert "STALE" in tags(image)
    assert "STALE" not in tags(other)
    libvirt.create(domain_xml(vm))
    assert localdisk("status", "--json")  # exit 0: it runs from shared storage because it was started so
    libvirt.destroy(vm_id)
    assert status()[image.leaf.id]["next"]["text"].startswith("stale, ")
    assert "is stale" in refused_disk(image, vm_id=vm_id)
    run("lvchange", "--deltag", "STALE", f"{host.VOLUME_GROUP}/{image.leaf.id}")  # as it advises
    start(image, vm_id=vm_id)
    assert holds_what_the_guest_wrote(image)
    stop(vm_id, image)

    run_point("before_vm_start", vm_id, domain_xml(vm), {"localdisk": "off"})
    configure(RECOPY)
    start(image, vm_id=vm_id)
    assert equals_source(image)
    stop(vm_id, image)
    start(other, vm_id=other_vm)
    assert holds_what_the_guest_wrote(other)
    stop(other_vm, other)


def test_what_becomes_stale_is_remembered_while_the_configuration_is_refused(file_storage: Storage) -> None:
    """Also after a boot, when no gc could read where kept disks are."""
    image = file_storage.template(16 * MIB, seed=8)
    vm_id = keep(image)
    vm = Vm(vm_id, (Disk("vda", image),))
    shutil.rmtree(LOCKS / "kept")  # the host was booted
    configure("retention: [\n")
    localdisk("gc", code=2)
    assert run_point("before_vm_start", vm_id, domain_xml(vm), {}).rc == 0
    assert "STALE" not in tags(image)
    assert not (LOCKS / "kept/all").exists()
    configure(KEEP)
    localdisk("gc")
    assert (LOCKS / "kept/all").exists()
    assert "STALE" in tags(image)
    assert "is stale" in refused_disk(image, vm_id=vm_id)


def test_a_disk_is_plugged_in_that_has_a_kept_copy(file_storage: Storage) -> None:
    """It was left out of the last start: its VM uses it on shared storage now."""
    image = file_storage.template(16 * MIB, seed=9)
    vm_id = keep(image)
    configure(f"{KEEP}hotplug: shared\n")
    element = disk_xml(Disk("vdb", image))
    assert run_point("before_disk_hotplug", vm_id, element, THICK).rc == 0
    assert "STALE" in tags(image)
    assert "is stale" in refused_disk(image, vm_id=vm_id)


@pytest.fixture
def other_group() -> Iterator[str]:
    """The name of a second volume group."""
    name, file = "bed-other", host.SCRATCH / "other.pv"
    with open(file, "wb") as pv:
        pv.truncate(256 * MIB)
    with loop_device(file) as loop:
        run("vgcreate", "-y", name, loop)
        yield name
        run("vgremove", "-ff", "-y", name)
    file.unlink()


def test_the_volume_group_of_a_vm_is_changed(file_storage: Storage, other_group: str) -> None:
    """Its kept disk is in the group of before: neither is it passed over, nor is it left to nobody."""
    image = file_storage.template(16 * MIB, seed=10)
    vm_id = keep(image)
    moved = f"{KEEP}vms: {{{vm_id}: {{volume_group: {other_group}}}}}\n"
    configure(moved)
    assert f"localdisk: local disk {host.VOLUME_GROUP}/{image.leaf.id} of this VM is kept" in refused_disk(
        image, vm_id=vm_id
    )
    configure(f"{KEEP}volume_group: {other_group}\n")  # and none of the VMs names the group of before
    findings = json.loads(localdisk("check", "--json", code=1))["problems"]
    assert [each for each in findings if each["what"].startswith(f"volume group {host.VOLUME_GROUP} has 1 ")]
    configure(KEEP)
    start(image, vm_id=vm_id)
    assert holds_what_the_guest_wrote(image)
    configure(moved.replace("keep", "delete"))  # while it runs
    stop(vm_id, image)
    assert host.logical_volumes() == {}
