"""`localdisk remove`: what the operator gives up is removed, what anything needs is kept."""

from __future__ import annotations

import pytest

from tests.bed import host, libvirt
from tests.bed.player import run_point
from tests.bed.shell import attempt, run
from tests.bed.storage import FileStorage, new_id
from tests.bed.vm import Disk, Vm, disk_json, domain_xml
from tests.kernel.steps import (
    KEEP,
    MIB,
    THICK,
    configure,
    device,
    equals_source,
    localdisk,
    name_of,
    older,
    refused_disk,
    start,
    starting,
    stop,
    tags,
)

pytestmark = pytest.mark.usefixtures("defaults")

SIZE = 8 * MIB


def refused(*words: str) -> str:
    done = attempt(str(host.PROGRAM), *words)
    assert done.returncode == 2, done
    return done.stderr


def test_an_older_hooks_disk_is_given_up(volume_group: str, file_storage: FileStorage) -> None:
    image, vm_id = file_storage.template(SIZE, seed=71), new_id()
    older(image, vm_id)
    assert "of vdsm's older hook" in localdisk("remove", "--dry-run", vm_id)
    assert f"{vm_id}, image {image.id}, 8 MiB" in localdisk("remove", vm_id)
    assert host.logical_volumes() == {}
    assert "status" in refused("remove", vm_id)


def test_remove_what_is_needed(volume_group: str, file_storage: FileStorage) -> None:
    """The disk is needed because its device is open, or its VM starts."""
    configure(KEEP)
    image = file_storage.template(SIZE, seed=72)
    vm_id = starting(new_id())
    run_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), THICK)
    assert "is being started" in refused("remove", name_of(image))
    libvirt.undefine(vm_id)
    with open(device(image), "rb"):
        assert "its device is open" in refused("remove", f"/dev/{name_of(image)}")
    stop(vm_id, image)
    assert tags(image)
    run("lvcreate", "-y", "-Wn", "-L", "4m", "-n", "data", host.VOLUME_GROUP)
    assert "is not localdisk's" in refused("remove", image.leaf.id, f"{host.VOLUME_GROUP}/data")
    assert tags(image)
    done = attempt("setpriv", "--reuid=vdsm", "--clear-groups", str(host.PROGRAM), "remove", image.leaf.id)
    assert (done.returncode, "remove needs root" in done.stderr) == (2, True)

    configure("retention: {on_stop: keep, erase: zero}\n")
    assert "set aside, erased (zero) and removed by the next localdisk gc" in localdisk(
        "remove", image.leaf.id
    )
    assert image.leaf.id not in host.logical_volumes()
    localdisk("gc")
    assert set(host.logical_volumes()) == {"data"}
    host.remove("data")


def test_a_stale_disk_is_given_up(volume_group: str, file_storage: FileStorage) -> None:
    """As the start that it refuses advises."""
    configure(KEEP)
    image = file_storage.template(SIZE, seed=74)
    vm_id = start(image)
    stop(vm_id, image)
    run_point("before_vm_start", vm_id, domain_xml(Vm(vm_id, (Disk("vda", image),))), {})
    said = refused_disk(image, vm_id=vm_id)
    assert "is stale" in said
    assert f"localdisk remove {name_of(image)}" in said
    assert ", stale, made" in localdisk("remove", name_of(image))
    start(image, vm_id=vm_id)
    assert equals_source(image)
    stop(vm_id, image)
    assert localdisk("remove", vm_id).endswith(": removed\n")


def test_a_disk_with_a_snapshot(volume_group: str, file_storage: FileStorage) -> None:
    """LVM would remove the snapshot with the disk."""
    configure(KEEP)
    image = file_storage.template(SIZE, seed=73)
    stop(start(image), image)
    run("lvcreate", "-y", "-s", "-L", "4m", "-n", "backup", name_of(image))
    assert "LVM would remove backup along" in refused("remove", image.leaf.id)
    assert set(host.logical_volumes()) == {"backup", image.leaf.id}
    host.remove("backup")
    assert localdisk("remove", image.leaf.id).endswith(": removed\n")
    assert host.logical_volumes() == {}
