"""The life of a local disk on real LVM: made, used, kept, recovered, removed."""

from __future__ import annotations

import fcntl
import json
import re
import threading
from pathlib import Path

import pytest

from tests.bed import host, libvirt, vdsm
from tests.bed.player import run_point, start_point
from tests.bed.shell import run
from tests.bed.storage import BlockStorage, FileStorage, digest, fill, new_id, qemu_io
from tests.bed.vm import Disk, Vm, boot_sector, disk_json, domain_xml
from tests.kernel.steps import (
    MIB,
    THICK,
    THIN,
    configure,
    copied,
    device,
    equals_source,
    hold_open,
    localdisk,
    lv_uuid,
    processes,
    seqno,
    start,
    starting,
    status,
    stop,
    tags,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("defaults")

ODD = 20 * MIB + 3 * 512  # no whole extents, no whole clusters


def old_bytes(size: int) -> None:
    """Leave a pattern where the next volumes will be."""
    run("lvcreate", "-y", "-Wn", "-L", f"{size}b", "-n", "old", host.VOLUME_GROUP)
    pattern = Path("/run/pattern")
    pattern.write_bytes(b"\xaa" * MIB)
    run("sh", "-c", f"for i in $(seq {size // MIB}); do cat {pattern}; done >/dev/{host.VOLUME_GROUP}/old")
    host.remove("old")


# -- starting


def test_thick_copy_of_a_chain(volume_group: str, file_storage: FileStorage) -> None:
    """Three layers with relative backing names; old bytes of the group must not show through."""
    old_bytes(48 * MIB)
    image = file_storage.clone(file_storage.template(16 * MIB, seed=1), layers=2, seed=2, size=ODD)
    vm_id = start(image)
    assert equals_source(image)
    assert device(image).stat().st_mode & 0o777 == 0o660
    assert run("stat", "-L", "-c", "%U:%G", str(device(image))).strip() == "vdsm:qemu"
    named = {f"VM_{vm_id}", f"IU_{image.id}", "localdisk"}
    fingerprints = tags(image) - named
    assert named < tags(image)
    assert len(fingerprints) == 1
    assert next(iter(fingerprints)).startswith("SOURCE_")
    row = status()[image.leaf.id]
    assert (row["vm"], row["state"], row["backend"], row["open"]) == (vm_id, "ready", "lvm", False)
    stop(vm_id, image)
    assert host.logical_volumes() == {}


def test_backing_names_that_vdsm_wrote_until_2016(volume_group: str, file_storage: FileStorage) -> None:
    """../IMAGE/VOLUME, once more for each live merge with libvirt of that time."""
    image = file_storage.clone(file_storage.template(8 * MIB, seed=1), layers=2, seed=2)
    base, middle, leaf = image.volumes
    for child, name, form in (
        (middle, f"../{image.id}/{base.id}", "raw"),
        (leaf, f"../{image.id}/" * 3 + middle.id, "qcow2"),
    ):
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", form, "-b", name, str(child.path))
    vm_id = start(image)
    assert equals_source(image)
    stop(vm_id, image)


def test_thin_copy_from_block_storage(thin_pool: str, block_storage: BlockStorage) -> None:
    image = block_storage.clone(block_storage.template(16 * MIB, seed=3), layers=2, seed=4)
    vm_id = start(image, THIN)
    assert equals_source(image)
    row = status()[image.leaf.id]
    assert row["backend"] == "lvmthin"
    assert 0 < row["used"] < 0.6 * row["size"], "only data is written"
    stop(vm_id, image, custom=THIN)


@pytest.mark.parametrize("volume_format", ["raw", "cow"])
def test_single_volume(volume_group: str, file_storage: FileStorage, volume_format: str) -> None:
    image = file_storage.template(12 * MIB, volume_format, seed=5)
    vm_id = start(image, {"localdisk": "on"})
    assert equals_source(image)
    stop(vm_id, image)


def test_raw_disk_with_a_qcow2_header_is_raw(volume_group: str, file_storage: FileStorage) -> None:
    """A guest writes into its raw disk a header that names a secret; nothing follows it."""
    image = file_storage.template(8 * MIB, seed=6)
    forged = file_storage.directory / "forged"
    secret = file_storage.directory / "secret"
    secret.write_bytes(b"SECRET" * 100_000)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(secret), "-F", "raw", str(forged), "8M")
    header = forged.read_bytes()[:65536]
    with open(image.leaf.path, "r+b") as file:
        file.write(header)
    vm_id = start(image)
    with open(device(image), "rb") as disk:
        assert disk.read(65536) == header
        assert b"SECRET" not in disk.read()
    stop(vm_id, image)


def test_the_same_hook_twice(volume_group: str, file_storage: FileStorage) -> None:
    """on_stop: delete and a closed, ready disk: a stop was not reported, and the start copies again."""
    image = file_storage.template(8 * MIB, seed=7)
    vm_id = start(image)
    first = lv_uuid(image)
    start(image, vm_id=vm_id)
    assert lv_uuid(image) != first
    assert equals_source(image)
    stop(vm_id, image)


def test_two_vms_take_turns(volume_group: str, file_storage: FileStorage) -> None:
    """With one turn on the host, two VMs that start at once copy one after the other."""
    configure("copy: {parallel: 1, bandwidth: 4MiB, nice: 7}\n")
    images = [file_storage.template(16 * MIB, seed=seed) for seed in (8, 9)]
    vms = [starting(new_id()) for _ in images]
    calls = [
        start_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), THICK)
        for vm_id, image in zip(vms, images)
    ]
    most, seen = 0, []
    results = []
    waiters = [threading.Thread(target=lambda call=call: results.append(call.wait())) for call in calls]
    for waiter in waiters:
        waiter.start()
    while any(waiter.is_alive() for waiter in waiters):
        running = [(pid, words) for pid, words in processes() if words[:2] == ["qemu-img", "convert"]]
        most = max(most, len(running))
        seen += running
        waiters[0].join(0.1)
        waiters[1].join(0.1)
    assert [result.rc for result in results] == [0, 0]
    assert most == 1, "both copied at once"
    assert all(words[words.index("-r") + 1] == str(4 * MIB) for _, words in seen)
    for vm_id, image in zip(vms, images):
        libvirt.undefine(vm_id)
        assert equals_source(image)
        stop(vm_id, image)


def test_the_copy_is_nice_and_runs_as_vdsm(volume_group: str, file_storage: FileStorage) -> None:
    configure("copy: {parallel: 1, bandwidth: 1MiB, nice: 7}\n")
    image = file_storage.template(12 * MIB)
    fill(image.leaf, 12 * MIB)
    vm_id = starting(new_id())
    call = start_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), THICK)
    seen: list[str] = []
    limits: list[str] = []

    def copier() -> bool:
        found = [pid for pid, words in processes() if words[:2] == ["qemu-img", "convert"]]
        seen.extend(run("ps", "-o", "ni=,user=", "-p", str(pid)) for pid in found)
        limits.extend(Path(f"/proc/{pid}/limits").read_text() for pid in found)
        return bool(seen)

    wait_for(copier, "the copy")
    wait_for(lambda: copied(image), "progress")
    row = status()[image.leaf.id]
    assert (row["state"], row["copy"]["done"] > 0) == ("copying", True)
    assert seen[0].split() == ["7", "vdsm"]
    assert re.search(rf"^Max address space +{4 << 30} ", limits[0], re.M)
    assert re.search(r"^Max core file size +0 ", limits[0], re.M)
    assert call.wait().rc == 0
    libvirt.undefine(vm_id)
    stop(vm_id, image)


def test_before_vm_start_makes_up_for_a_missing_link(volume_group: str, file_storage: FileStorage) -> None:
    """Without after_disk_prepare, both disks are made local there, by one helper."""
    images = [
        file_storage.clone(file_storage.template(8 * MIB, seed=11), seed=12),
        file_storage.template(4 * MIB),
    ]
    vm = Vm(starting(new_id()), (Disk("vda", images[0]), Disk("sda", images[1])))
    result = run_point("before_vm_start", vm.id, domain_xml(vm), THICK)
    assert result.rc == 0, result.stderr
    local = [vdsm.local(disk, str(device(disk.image))) for disk in vm.disks]
    for image, disk in zip(images, local):
        assert equals_source(image)
        assert f'dev="{disk.image.leaf.path}"' in result.data
    before = seqno()
    again = run_point("before_vm_start", vm.id, domain_xml(Vm(vm.id, tuple(local))), THICK)
    assert again.rc == 0, again.stderr
    assert seqno() == before, "disks that are local already are only looked at"
    libvirt.undefine(vm.id)
    stop(vm.id, *images)


RECORDS = Path("/run/localdisk/ready")


def test_before_vm_start_of_prepared_disks_asks_nobody(volume_group: str, file_storage: FileStorage) -> None:
    """Another process holds the lock of the volume group: whoever asks LVM waits for two minutes."""
    images = [file_storage.template(4 * MIB), file_storage.template(8 * MIB)]
    vm_id = starting(new_id())
    disks = tuple(vdsm.prepare(vm_id, Disk(f"vd{x}", image), THICK) for x, image in zip("ab", images))
    assert sorted(path.name for path in RECORDS.iterdir()) == sorted(image.leaf.id for image in images)
    xml = domain_xml(Vm(vm_id, disks))
    with open(f"/run/lock/lvm/V_{host.VOLUME_GROUP}", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_point("before_vm_start", vm_id, xml, THICK, timeout=60).rc == 0
    libvirt.undefine(vm_id)
    stop(vm_id, *images)
    assert not list(RECORDS.iterdir())


@pytest.mark.parametrize("is_kept", [False, True], ids=["new", "kept"])
@pytest.mark.parametrize(
    "change",
    [
        ("lvchange", "-an", "{lv}"),
        ("lvremove", "-y", "{lv}"),
        ("lvrename", "{lv}", "renamed"),
    ],
    ids=["inactive", "removed", "renamed"],
)
def test_a_disk_that_an_administrator_changed_since_it_was_ready(
    volume_group: str, file_storage: FileStorage, change: tuple[str, ...], is_kept: bool
) -> None:
    """before_vm_start looks at the device as well as at the record, and gc removes a record without disk."""
    configure("retention: {on_stop: keep}\n")
    image = file_storage.template(4 * MIB)
    vm_id = start(image)
    if is_kept:
        stop(vm_id, image)
        assert not list(RECORDS.iterdir())
        start(image, THICK, vm_id)
    lv = f"{host.VOLUME_GROUP}/{image.leaf.id}"
    run(*(word.format(lv=lv) for word in change))
    xml = domain_xml(Vm(vm_id, (vdsm.local(Disk("vda", image), str(device(image))),)))
    result = run_point("before_vm_start", vm_id, xml, THICK)
    assert "no ready local disk" in result.stderr
    assert result.rc == 2
    host.remove(*host.logical_volumes())
    localdisk("gc")
    assert not list(RECORDS.iterdir())


def test_what_stays_on_shared_storage(volume_group: str, file_storage: FileStorage) -> None:
    image = file_storage.template(8 * MIB, seed=13)
    vm_id = new_id()
    data = disk_json(Disk("vda", image))
    cdrom = disk_json(Disk("vda", image), device="cdrom")
    assert run_point("after_disk_prepare", vm_id, cdrom, THICK).data == cdrom
    for custom in ({}, {"localdisk": "off"}):
        assert run_point("after_disk_prepare", vm_id, data, custom).data == data
    for policy in ("enabled: false", f"disks: [{new_id()}]"):
        configure(f"vms: {{{vm_id}: {{{policy}}}}}\n")
        result = run_point("after_disk_prepare", vm_id, data, THICK)
        assert (result.rc, result.data) == (0, data), result.stderr


# -- keeping


def test_kept_disk(volume_group: str, file_storage: FileStorage) -> None:
    configure("retention: {on_stop: keep}\n")
    image = file_storage.clone(file_storage.template(8 * MIB, seed=14), seed=15)
    vm_id = start(image)
    made = lv_uuid(image)
    with open(device(image), "r+b") as disk:
        disk.write(b"written by the guest")
    stop(vm_id, image)
    assert any(tag.startswith("STOPPED_") for tag in tags(image))
    assert status()[image.leaf.id]["state"] == "stopped"
    assert device(image).exists(), "a restart need not activate it"
    assert "kept for another" in localdisk("gc")

    start(image, vm_id=vm_id)
    assert lv_uuid(image) == made
    assert device(image).read_bytes().startswith(b"written by the guest")
    assert not any(tag.startswith("STOPPED_") for tag in tags(image))
    stop(vm_id, image)

    run("lvchange", "--activate", "n", f"{volume_group}/{image.leaf.id}")  # as after a boot
    start(image, vm_id=vm_id)
    assert device(image).read_bytes().startswith(b"written by the guest")
    stop(vm_id, image)

    qemu_io(image.leaf, ["write -P 77 0 64k"])
    data = disk_json(Disk("vda", image))
    starting(vm_id)
    before = seqno()
    result = run_point("after_disk_prepare", vm_id, data, THICK)
    assert (result.rc, result.data) == (2, data)
    assert "has changed since it was copied" in result.stderr
    assert seqno() == before
    libvirt.undefine(vm_id)
    configure("retention: {on_stop: keep, on_source_change: recopy}\n")
    start(image, vm_id=vm_id)
    assert equals_source(image)
    stop(vm_id, image)

    configure("retention: {on_stop: keep, keep_for: 0s}\n")
    before = seqno()
    assert "would be removed" in localdisk("gc", "--dry-run")
    assert seqno() == before
    assert json.loads(localdisk("gc", "--json"))["disks"][0]["action"] == "remove"
    assert host.logical_volumes() == {}


def test_disk_of_the_older_hook(volume_group: str, file_storage: FileStorage) -> None:
    """LVs with VM_ and IU_ and without localdisk, once the operator has decided: replaced, or taken over."""
    image = file_storage.template(8 * MIB, seed=16)
    vm_id = new_id()
    older = ["--addtag", f"VM_{vm_id}", "--addtag", f"IU_{image.id}", "--addtag", "PU_" + "0" * 8]
    run("lvcreate", "-y", "-Wn", "-L", "8m", "-n", image.leaf.id, *older, host.VOLUME_GROUP)
    configure("retention: {on_stop: keep, older_disks: as_ours}\n")
    start(image, vm_id=vm_id)
    assert "localdisk" in tags(image), "taken over"
    assert not equals_source(image), "and not copied: nothing says that its source changed"
    stop(vm_id, image)
    configure()
    start(image, vm_id=vm_id)
    assert equals_source(image)
    stop(vm_id, image)


# -- a running VM


def test_running_vm_is_never_touched(volume_group: str, file_storage: FileStorage) -> None:
    """A real VM runs; vdsm, restarted, calls the hook again with what it read from the domain."""
    image = file_storage.template(8 * MIB, seed=17, boot=boot_sector("hello"))
    disk = Disk("vda", image, 1)
    vm = vdsm.start(Vm(new_id(), (disk,), host.SCRATCH / "serial-running"), THICK)
    try:
        before, content = seqno(), digest(device(image), 8 * MIB)
        (result,) = vdsm.recover(Vm(vm.id, (disk,)), THICK)
        assert (result.rc, result.data) == (0, vdsm.recovered_disk(disk)), result.stderr
        assert (seqno(), digest(device(image), 8 * MIB)) == (before, content)
        assert "kept: in use, its device is open" in localdisk("gc")
        assert seqno() == before
        for point in (
            "before_vm_migrate_source",
            "before_vm_migrate_destination",
            "before_vm_hibernate",
            "before_vm_dehibernate",
        ):
            for text in ("", f"vms: {{{vm.id}: {{enabled: false}}}}\n"):  # for its next start
                configure(text)
                refusal = run_point(point, vm.id, domain_xml(vm), THICK)
                assert (refusal.rc, refusal.refused) == (2, True)
                assert "runs from local disks" in refusal.stderr
        configure()
        assert status()[image.leaf.id]["state"] == "running"
    finally:
        libvirt.destroy(vm.id)
        libvirt.undefine(vm.id)
        stop(vm.id, image)


def test_vm_that_runs_from_shared_storage_is_left_alone(volume_group: str, file_storage: FileStorage) -> None:
    """The property was set, or the host changed, while the VM ran: vdsm's recovery gets its disk back."""
    image = file_storage.template(8 * MIB, seed=18, boot=boot_sector("hello"))
    vm = Vm(new_id(), (Disk("vda", image, 1),))
    libvirt.create(domain_xml(vm))
    try:
        data = disk_json(vm.disks[0])
        result = run_point("after_disk_prepare", vm.id, data, THICK)
        assert (result.rc, result.data) == (0, data), result.stderr
        assert host.logical_volumes() == {}
    finally:
        libvirt.destroy(vm.id)


def test_disk_that_is_busy_at_the_stop(volume_group: str, file_storage: FileStorage) -> None:
    """It is marked, keeps the name taken while it is open, and gc removes it afterwards."""
    image = file_storage.template(8 * MIB, seed=19)
    vm_id = start(image)
    holder = hold_open(device(image))
    try:
        stop(vm_id, image)
        assert "DELETING" in tags(image)
        assert "kept: in use, its device is open" in localdisk("gc")
        starting(vm_id)
        result = run_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), THICK)
        libvirt.undefine(vm_id)
        assert result.rc == 2
        assert "still open" in result.stderr
    finally:
        holder.kill()
        holder.wait()
    assert "removed: marked for removal" in localdisk("gc")
    assert host.logical_volumes() == {}


def test_erase_before_removal(volume_group: str, file_storage: FileStorage) -> None:
    """erase: zero; the stop does not wait, gc erases: what comes to lie there next reads zeros."""
    configure("retention: {erase: zero}\n")
    image = file_storage.template(8 * MIB, seed=20)
    vm_id = start(image)
    stop(vm_id, image)
    assert "DELETING" in tags(image)
    localdisk("gc")
    assert host.logical_volumes() == {}
    run("lvcreate", "-y", "-Wn", "-Zn", "-L", "8m", "-n", "next", host.VOLUME_GROUP)
    assert not any(Path(f"/dev/{host.VOLUME_GROUP}/next").read_bytes())
    host.remove("next")
