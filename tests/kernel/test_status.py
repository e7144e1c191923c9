"""`status` on a real kernel: running VMs, copies, drifted disks, as root and without root; and the log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.bed import host, libvirt, vdsm
from tests.bed.player import Call, start_point
from tests.bed.shell import attempt, run
from tests.bed.storage import FileStorage, Image, new_id
from tests.bed.vm import Disk, Vm, disk_json, domain_xml
from tests.kernel.steps import (
    MIB,
    THICK,
    THIN,
    configure,
    copied,
    device,
    equals_source,
    helpers,
    hold_open,
    kill_all,
    localdisk,
    paused_copies,
    start,
    starting,
    stop,
    syslog,
    wait_for,
)

SCHEMA = json.loads((Path(__file__).parents[2] / "schema" / "status.schema.json").read_text())
SLOW = "copy: {parallel: 1, bandwidth: 1MiB}\nmargins: {reserve: 10%}\n"


@pytest.fixture(autouse=True)
def _defaults(libvirt: None) -> Iterator[None]:
    configure()
    yield
    configure()


def shown(code: int | None = None) -> Any:
    """The JSON of status, checked with its schema."""
    done = attempt(str(host.PROGRAM), "status", "--json")
    document = json.loads(done.stdout)
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    assert done.returncode == (bool(document["problems"]) if code is None else code), document["problems"]
    return document


def problems() -> dict[str, str]:
    """What is wrong, by kind."""
    return {each["kind"]: each["what"] for each in shown()["problems"]}


@contextmanager
def running_vm(image: Image, prop: str = "lvm") -> Iterator[Vm]:
    """A VM that runs from the local copy of the image."""
    vm = Vm(start(image, {"localdisk": prop}), (Disk("vda", image),))
    local = Vm(vm.id, (vdsm.local(vm.disks[0], str(device(image))),))
    custom = f"<ovirt-vm:custom><ovirt-vm:localdisk>{prop}</ovirt-vm:localdisk></ovirt-vm:custom>"
    xml = domain_xml(local).replace("<ovirt-vm:custom />", custom)
    libvirt.create(xml, "--paused")
    try:
        yield vm
    finally:
        libvirt.destroy(vm.id)
        stop(vm.id, image, custom={"localdisk": prop})


def begin(image: Image) -> Call:
    """A start of a VM, which copies."""
    return start_point("after_disk_prepare", starting(new_id()), disk_json(Disk("vda", image)), THICK)


def test_a_vm_that_runs(thin_pool: str, file_storage: FileStorage) -> None:
    image = file_storage.clone(file_storage.template(16 * MIB, seed=60), seed=61)
    with running_vm(image, "lvmthin") as vm:
        document = shown(0)
        (row,) = document["disks"]
        assert (row["vm"], row["vm_name"], row["disk"]) == (vm.id, f"vm-{vm.id[:8]}", "vda")
        assert (row["state"], row["open"], row["backend"]) == ("running", True, "lvmthin")
        assert 0 < row["used"] < row["size"]
        assert row["next"] == {"action": "remove", "at": None, "text": "removed when VM stops"}
        (group,) = document["volume_groups"]
        assert group["free"] < group["size"]
        table = localdisk("status")
        assert f"{vm.id[:8]} vm-{vm.id[:8]}" in table
        assert max(map(len, table.splitlines())) <= 100
        as_nobody(image, vm)


def as_nobody(image: Image, vm: Vm) -> None:
    """An ordinary user sees what runs, and that there is more."""
    done = attempt(str(host.PROGRAM), "status", "--json", user="nobody")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    (row,) = document["disks"]
    assert (row["vm"], row["volume"], row["disk"], row["state"]) == (vm.id, image.leaf.id, "vda", "running")
    assert document["unseen"] == [
        "volume groups, closed disks, copies and problems: run localdisk status as root"
    ]


def test_a_live_snapshot_went_past_us(volume_group: str, file_storage: FileStorage) -> None:
    image = file_storage.template(8 * MIB, seed=62)
    overlay = host.SCRATCH / "overlay.qcow2"
    with running_vm(image) as vm:
        assert problems() == {}
        run(
            "virsh", "-c", libvirt.URI, "snapshot-create-as", vm.id, "--disk-only", "--no-metadata",
            "--diskspec", f"vda,file={overlay}",
        )  # fmt: skip
        expected = f"VM vm-{vm.id[:8]} ({vm.id}): vda runs from {overlay}, not from {device(image)}"
        assert problems() == {"not_local": expected}
    overlay.unlink()


def test_open_by_no_vm(volume_group: str, file_storage: FileStorage) -> None:
    image = file_storage.template(8 * MIB, seed=63)
    vm_id = start(image)
    holder = hold_open(device(image))
    name = f"local disk {host.VOLUME_GROUP}/{image.leaf.id}"
    assert problems() == {"open_elsewhere": f"{name} is open, but by no VM: sleep ({holder.pid})"}
    holder.kill()
    holder.wait()
    loop = run("losetup", "--find", "--show", str(device(image))).strip()
    run("dmsetup", "create", "bed-child", "--table", f"0 1024 linear {loop} 0")
    (problem,) = shown()["problems"]
    held = f"device-mapper device bed-child, loop device {loop.removeprefix('/dev/')}"
    assert problem["what"] == f"{name} is open, but by no VM: {held}"
    run("sh", "-c", problem["fix"])
    assert problems() == {"unknown_vm": f"{name} is of VM {vm_id}, which libvirt does not know"}
    stop(vm_id, image)
    assert problems() == {}


def test_copies_that_run_wait_and_die(volume_group: str, file_storage: FileStorage) -> None:
    """A waiting start has no volume yet; a killed start leaves a volume that nobody works on."""
    configure(SLOW)
    images = [file_storage.template(64 * MIB, seed=64), file_storage.template(64 * MIB, seed=65)]
    for image in images:
        run("qemu-io", "-f", "raw", "-c", f"write -P 5 0 {64 * MIB}", str(image.leaf.path))
    with syslog(" localdisk[") as lines:  # sudo logs, too
        first = begin(images[0])
        wait_for(lambda: copied(images[0]), "progress")
        second = begin(images[1])
        wait_for(lambda: len(shown()["disks"]) == 2, "the second to wait")
        rows = {row["volume"]: row for row in shown(0)["disks"]}
        copy, waiting = rows[images[0].leaf.id], rows[images[1].leaf.id]
        assert (copy["state"], waiting["state"]) == ("copying", "waiting")
        assert copy["size"] == 64 * MIB
        assert 0 < copy["copy"]["done"] < 1
        assert 0 < copy["copy"]["written"] <= 64 * MIB
        assert copy["copy"]["rate"] < 4 * MIB  # qemu-img may write some MiB at once in the first second
        assert copy["next"]["text"].endswith(" left")
        assert waiting["next"]["text"].startswith("waits ")
        wait_for(lambda: any(" copying vm=" in line for line in lines), "a line that tells how far it is")
        for call in (first, second):
            assert call.process
            kill_all(*helpers())
            call.wait()
        (name,) = host.logical_volumes()
        expected = f"local disk {host.VOLUME_GROUP}/{name} is an unfinished copy that nobody works on"
        assert problems()["no_copier"] == expected
        for vm_id in libvirt.known():
            libvirt.undefine(vm_id)
        localdisk("gc")
        assert problems() == {}
    assert any(f"disk={images[0].leaf.id} bytes={64 * MIB} backend=lvm" in line for line in lines)
    copying = [line for line in lines if " copying vm=" in line]
    assert copying
    assert all(" took=" in line and "B/s" in line for line in copying), lines
    assert any("gc: remove " in line for line in lines)


def test_a_copy_that_hangs_gives_its_turn_back(volume_group: str, file_storage: FileStorage) -> None:
    """Another VM starts meanwhile; the copy is complete once it can go on."""
    configure("copy: {parallel: 1, bandwidth: 8MiB, stall: 2s}\n")
    images = [file_storage.template(size * MIB, seed=size) for size in (32, 4)]
    run("qemu-io", "-f", "raw", "-c", f"write -P 5 0 {32 * MIB}", str(images[0].leaf.path))
    first = begin(images[0])
    wait_for(lambda: copied(images[0]), "progress")
    with paused_copies():
        wait_for(lambda: "stalled" in problems(), "the copy to be seen as one that makes no progress")
        assert f"of disk {images[0].leaf.id}" in problems()["stalled"]
        assert begin(images[1]).wait().rc == 0
    assert first.wait().rc == 0
    assert equals_source(images[0])
    assert equals_source(images[1])
    assert "stalled" not in problems()
    for vm_id in libvirt.known():
        libvirt.undefine(vm_id)
    host.remove(*host.logical_volumes())


def test_metrics_of_a_real_life(thin_pool: str, file_storage: FileStorage) -> None:
    """Counted: a copy, a refusal, a gc."""
    image = file_storage.template(8 * MIB, seed=66)
    before = metrics()
    vm_id = start(image, THIN)
    stop(vm_id, image, custom=THIN)
    configure("margins: {reserve: 100%}\n")
    refusal = start_point("after_disk_prepare", starting(new_id()), disk_json(Disk("vda", image)), THICK)
    assert refusal.wait().rc == 2
    for vm_id in libvirt.known():
        libvirt.undefine(vm_id)
    localdisk("gc")
    after = metrics()

    def grown(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    assert grown("localdisk_copies_total") == 1
    assert 0 < grown("localdisk_copied_bytes_total") <= 9 * MIB
    assert grown('localdisk_failures_total{reason="no_space"}') == 1
    assert grown("localdisk_gc_runs_total") == 1


def test_two_vms_of_one_template(thin_pool: str, file_storage: FileStorage) -> None:
    """What the template LV is to status, gc and metrics, and that it is no VM's disk."""
    configure("cache: {templates: on, keep_for: 30d}\n")
    template = file_storage.template(16 * MIB, seed=67)
    images = [file_storage.clone(template, seed=68 + number) for number in range(2)]
    before = metrics()
    vms = [start(image, THIN) for image in images]
    for vm_id, image in zip(vms, images):
        stop(vm_id, image, custom=THIN)
    document = shown(0)
    assert document["disks"] == []
    (row,) = document["templates"]
    assert (row["volume"], row["backend"], row["state"]) == (template.leaf.id, "lvmthin", "ready")
    assert (row["open"], row["copy"], row["size"]) == (False, None, 16 * MIB)
    assert 0 < row["holds"] <= row["size"]
    assert row["last_used"] <= document["at"]
    assert row["next"]["action"] == "remove"
    assert row["next"]["text"].startswith("gc removes in 29 d 23 h")
    (group,) = document["volume_groups"]
    assert group["cache"] == {"used": 0, "limit": group["size"] // 2}
    assert group["pool"]["cache"] == {"used": row["holds"], "limit": group["pool"]["size"] // 2}
    table = localdisk("status")
    assert f"\n{template.leaf.id[:8]}  " in table
    assert f"\ncache in {host.VOLUME_GROUP}/{host.THIN_POOL}  [" in table
    assert max(map(len, table.splitlines())) <= 100
    (line,) = localdisk("gc", "--dry-run").splitlines()
    assert line.startswith(f"{host.VOLUME_GROUP}/{row['name']}  template {template.leaf.id}  16 MiB  kept: ")
    after = metrics()
    grown = {
        name: after[f"localdisk_template_{name}_total"] - before[f"localdisk_template_{name}_total"]
        for name in ("hits", "misses", "evictions")
    }
    assert grown == {"hits": 2, "misses": 1, "evictions": 0}
    labels = f'volume_group="{host.VOLUME_GROUP}"'
    assert after[f'localdisk_templates{{{labels},state="ready"}}'] == 1
    assert after[f'localdisk_template_bytes{{{labels},backend="lvmthin"}}'] == row["holds"]
    configure()
    assert shown(0)["templates"][0]["next"]["text"] == "gc removes it next"
    localdisk("gc")
    assert shown(0)["templates"] == []


def metrics() -> dict[str, float]:
    out = attempt(str(host.PROGRAM), "status", "--prometheus").stdout
    rows = (line.rpartition(" ") for line in out.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in rows}


def test_a_vm_with_a_direct_lun(volume_group: str, file_storage: FileStorage) -> None:
    """vdsm saves a LUN's GUID as its imageID: no image, no problem, and who has the local disk is known."""
    image, lun = file_storage.template(8 * MIB, seed=1), host.SCRATCH / "lun"
    lun.write_bytes(bytes(MIB))
    vm_id = start(image)
    local = Vm(vm_id, (vdsm.local(Disk("vda", image), str(device(image))),))
    guid = "360014059f8e7d6c5b4a3f2e1d0c9b8a7"
    ids = f"<ovirt-vm:GUID>{guid}</ovirt-vm:GUID><ovirt-vm:imageID>{guid}</ovirt-vm:imageID>"
    saved = f'<ovirt-vm:device devtype="disk" name="sda">{ids}</ovirt-vm:device></ovirt-vm:vm>'
    disk = (
        f'<disk type="file"><driver type="raw"/><source file="{lun}"/><target dev="sda" bus="scsi"/></disk>'
    )
    xml = domain_xml(local).replace("</ovirt-vm:vm>", saved).replace("</devices>", f"{disk}</devices>")
    xml = xml.replace(
        "<ovirt-vm:custom />",
        "<ovirt-vm:custom><ovirt-vm:localdisk>lvm</ovirt-vm:localdisk></ovirt-vm:custom>",
    )
    libvirt.create(xml, "--paused")
    try:
        (row,) = shown(0)["disks"]
        assert (row["vm"], row["disk"], row["state"]) == (vm_id, "vda", "running")
        assert "localdisk_unseen 0\n" in localdisk("status", "--prometheus")
    finally:
        libvirt.destroy(vm_id)
        stop(vm_id, image)
