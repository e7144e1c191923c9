"""A live snapshot went past us: nothing is lost, and the data come back as status says.

vdsm's snapshot job on block storage, as libvirt sees it: the new layer is an LV of the storage domain that
libvirt is told to reuse; what is below it is what the VM runs from, our local disk.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bed import host, libvirt, vdsm
from tests.bed.player import run_point
from tests.bed.shell import attempt, run
from tests.bed.storage import COW, BlockStorage, Image, Volume, new_id
from tests.bed.vm import Disk, Vm, boot_sector, disk_json, domain_xml
from tests.kernel.steps import (
    MIB,
    THICK,
    configure,
    device,
    equals_source,
    localdisk,
    one_line,
    start,
    starting,
    status,
    stop,
    tags,
)

SIZE = 16 * MIB


@pytest.fixture(autouse=True)
def defaults(libvirt: None) -> Iterator[None]:
    configure()
    yield
    configure()


@pytest.fixture
def image(block_storage: BlockStorage) -> Image:
    template = block_storage.template(SIZE, seed=1, boot=boot_sector("drift"))
    return block_storage.clone(template, seed=2)


def problems() -> dict[str, dict[str, str]]:
    document = json.loads(attempt(str(host.PROGRAM), "status", "--json").stdout)
    return {problem["kind"]: problem for problem in document["problems"]}


def started(image: Image) -> Vm:
    vm = vdsm.start(Vm(new_id(), (Disk("vda", image),)), THICK)
    write(vm, "write -P 0xAA 1M 64k")
    return vm


def write(vm: Vm, command: str) -> None:
    """Through the VM's own block layer, as its guest would."""
    drive = f"/machine/peripheral/ua-{vm.disks[0].image.id}/virtio-backend"
    said = run(
        "virsh", "-c", libvirt.URI, "qemu-monitor-command", vm.id, "--hmp", f'qemu-io -d {drive} "{command}"'
    )
    assert not said.strip(), said


def snapshot(vm: Vm, storage: BlockStorage, image: Image) -> Volume:
    """The new layer, on which the guest has written since."""
    layer = storage.new_volume(image.id, COW, SIZE, image.leaf)
    real = Path(f"/dev/{image.domain_id}/{layer.id}").resolve()
    real.chmod(0o666)
    run(
        "virsh", "-c", libvirt.URI, "snapshot-create-as", vm.id, "--disk-only", "--no-metadata",
        "--reuse-external", "--diskspec", f"vda,file={layer.path},stype=block,driver=qcow2",
    )  # fmt: skip
    write(vm, "write -P 0xBB 2M 64k")
    return layer


def has_both(path: Path | str, image_format: str = "raw", cwd: str | None = None) -> bool:
    """What the guest wrote before the snapshot, and after it."""
    commands = [word for what in ("0xAA 1M", "0xBB 2M") for word in ("-c", f"read -P {what} 64k")]
    said = run("qemu-io", "-r", "-f", image_format, *commands, str(path), cwd=cwd)
    return "Pattern verification failed" not in said


def test_a_snapshot_of_a_running_vm_is_taken_back(
    volume_group: str, block_storage: BlockStorage, image: Image
) -> None:
    vm = started(image)
    snapshot(vm, block_storage, image)
    found = problems()
    assert set(found) == {"not_local"}
    assert status()[image.leaf.id]["next"]["action"] == "keep"
    (command,) = re.findall(r"virsh blockcommit .*?--wait", found["not_local"]["fix"])
    run(*shlex.split(command))
    assert problems() == {}
    assert vdsm.stop(vm, THICK).rc == 0
    assert host.logical_volumes() == {}


@pytest.mark.parametrize("told_by", ["vdsm", "libvirt", "gc"])
def test_a_snapshot_of_a_vm_that_stopped(
    volume_group: str, block_storage: BlockStorage, image: Image, told_by: str
) -> None:
    """vdsm's XML may be older than the snapshot; then libvirt's definition has the new volume.

    "gc": the VM stopped while vdsm did not run, as when the host crashes.
    """
    vm = started(image)
    if told_by == "libvirt":
        libvirt.define(domain_xml(vm))
    layer = snapshot(vm, block_storage, image)
    live = libvirt.virsh("dumpxml", vm.id)
    libvirt.destroy(vm.id)
    if told_by == "gc":
        result = run_point("before_vdsm_start")
    else:
        result = run_point("after_vm_destroy", vm.id, live if told_by == "vdsm" else domain_xml(vm), THICK)
    assert (result.rc, result.stderr) == (0, "")
    attempt("virsh", "-c", libvirt.URI, "undefine", vm.id)
    is_kept(vm, image)
    refused(vm, image, layer)
    bring_back(image, layer)
    assert has_both(layer.path, "qcow2", cwd=str(layer.path.parent))
    assert ": removed" in localdisk("remove", f"{host.VOLUME_GROUP}/{image.leaf.id}")
    image = replace(image, volumes=(*image.volumes, layer))
    start(image, THICK, vm.id)
    assert equals_source(image)
    assert has_both(device(image))
    stop(vm.id, image)


def is_kept(vm: Vm, image: Image) -> None:
    """The disk is kept by a second stop, by gc, and by gc before vdsm starts."""
    stop(vm.id, image)
    configure("retention: {grace: 0s}\n")
    assert "see localdisk status" in localdisk("gc")
    assert run_point("before_vdsm_start").rc == 0
    configure()
    assert any(tag.startswith("DRIFTED_") for tag in tags(image))
    row = status()[image.leaf.id]
    assert (row["state"], row["next"]["action"]) == ("drifted", "keep")
    assert set(problems()) == {"drifted"}


def refused(vm: Vm, image: Image, layer: Volume) -> None:
    """A start from what is on shared storage would be from a mix of two disks."""
    starting(vm.id)
    for volumes in (image.volumes, (*image.volumes, layer)):
        disk = Disk("vda", replace(image, volumes=volumes))
        result = run_point("after_disk_prepare", vm.id, disk_json(disk), THICK)
        assert "has data of this VM that its image on shared storage lacks" in one_line(result)
    libvirt.undefine(vm.id)
    assert set(host.logical_volumes()) == {image.leaf.id}


def bring_back(image: Image, layer: Volume) -> None:
    """Run the steps that `status` shows, word for word, after a boot."""
    run("lvchange", "-an", f"{host.VOLUME_GROUP}/{image.leaf.id}")
    fix = problems()["drifted"]["fix"]
    (activate,) = re.findall(r"lvchange [^;]+", fix)
    run(*shlex.split(activate))
    for command in re.findall(r"qemu-img rebase .*? NEW\b", fix):
        words = shlex.split(command.replace("NEW", layer.id).replace("FORMAT", "qcow2"))
        run(*words, user="vdsm", cwd=str(layer.path.parent))
