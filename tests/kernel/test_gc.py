"""gc on real LVM and real libvirt: disks that no VM needs are removed, disks that a VM may need are kept."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bed import host, libvirt, vdsm
from tests.bed.player import run_point
from tests.bed.shell import run
from tests.bed.storage import FileStorage, Image, Volume, digest, new_id, qemu_io
from tests.bed.vm import Disk, Vm, boot_sector, disk_json, domain_xml
from tests.kernel.steps import (
    KEEP,
    MIB,
    THICK,
    THIN,
    begin,
    configure,
    device,
    equals_source,
    erasing,
    localdisk,
    lv_uuid,
    seqno,
    slow_blkdiscard,
    start,
    starting,
    stop,
    tags,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("defaults")

SIZE = 8 * MIB


def gc(*words: str, code: int = 0) -> dict[str, str]:
    """What gc decided for each volume."""
    found = json.loads(localdisk("gc", "--json", *words, code=code))
    return {row["volume"]: row["action"] for row in found["disks"]}


def metadata() -> str:
    """All that LVM knows of the volume group, but for when and by whom it was asked."""
    file = Path("/run/gc-metadata")
    run("vgcfgbackup", "-f", str(file), host.VOLUME_GROUP)
    return file.read_text().partition(f"{host.VOLUME_GROUP} {{")[2]


def make(*more: str, name: str = "", vm_id: str = "") -> str:
    """A small local disk with these tags beside an owner's; returns its name."""
    name = name or new_id()
    words = ("localdisk", f"VM_{vm_id or new_id()}", f"IU_{new_id()}", *more)
    options = [word for tag in words for word in ("--addtag", tag)]
    run("lvcreate", "-y", "-Wn", "-ky", "-K", "-n", name, "-L", "4m", *options, host.VOLUME_GROUP)
    return name


def mark(name: str, kind: str) -> str:
    """Mark a disk as stopped or unneeded just now; returns its name."""
    run("lvchange", "--addtag", f"{kind}_{int(run('date', '+%s'))}", f"{host.VOLUME_GROUP}/{name}")
    return name


@contextmanager
def silent_libvirt() -> Iterator[None]:
    run("mount", "--bind", "/bin/false", "/usr/bin/virsh")
    try:
        yield
    finally:
        run("umount", "/usr/bin/virsh")


@contextmanager
def vdsm_runs() -> Iterator[None]:
    """A process that looks like vdsm's daemon."""
    daemon = "/usr/libexec/vdsm/vdsmd"
    process = subprocess.Popen(["bash", "-c", f"exec -a {daemon} sleep 3600"])
    wait_for(lambda: Path(f"/proc/{process.pid}/cmdline").read_text().startswith(daemon), "the daemon")
    try:
        yield
    finally:
        process.kill()
        process.wait()


# -- the missed stop


def test_a_vm_that_stops_while_vdsm_is_down(volume_group: str, file_storage: FileStorage) -> None:
    """The feature page's open issue; before that, vdsm restarts while the VM runs."""
    image = file_storage.template(SIZE, seed=40, boot=boot_sector("hello"))
    disk = Disk("vda", image, 1)
    vm = vdsm.start(Vm(new_id(), (disk,), host.SCRATCH / "serial-gc"), THICK)
    before = (seqno(), metadata(), digest(device(image), SIZE), tags(image), lv_uuid(image))
    assert run_point("before_vdsm_start").rc == 0
    with vdsm_runs():
        (recovered,) = vdsm.recover(Vm(vm.id, (disk,)), THICK)
        assert (recovered.rc, recovered.data) == (0, vdsm.recovered_disk(disk))
        assert gc() == {image.leaf.id: "keep"}
    assert (seqno(), metadata(), digest(device(image), SIZE), tags(image), lv_uuid(image)) == before

    libvirt.destroy(vm.id)  # its domain is there still, until the engine has vdsm destroy the VM
    with vdsm_runs():  # somebody calls the hook by hand: a VM may be starting
        assert run_point("before_vdsm_start").rc == 0
    assert any(tag.startswith("UNNEEDED_") for tag in tags(image))
    assert run_point("before_vdsm_start").rc == 0
    assert host.logical_volumes() == {}
    libvirt.undefine(vm.id)


def test_a_missed_stop_of_a_kept_disk(volume_group: str, file_storage: FileStorage) -> None:
    """It is kept from when it was noticed, with what the guest has written."""
    configure(KEEP)
    image = file_storage.template(SIZE, seed=41)
    vm_id = start(image)
    device(image).write_bytes(b"written by the guest")
    assert run_point("before_vdsm_start").rc == 0
    assert any(tag.startswith("STOPPED_") for tag in tags(image))
    assert gc() == {image.leaf.id: "keep"}
    start(image, vm_id=vm_id)
    assert device(image).read_bytes().startswith(b"written by the guest")
    configure()
    stop(vm_id, image)


def test_two_sightings(volume_group: str) -> None:
    """The first marks, one within grace does nothing, one after it removes; a VM that is there unmarks."""
    configure("retention: {grace: 1h}\n")
    name = make()
    assert gc("--dry-run") == {name: "mark_unneeded"}
    assert not any(tag.startswith("UNNEEDED_") for tag in host.logical_volumes()[name])
    assert gc() == {name: "mark_unneeded"}
    before = metadata()
    assert gc() == {name: "keep"}
    assert metadata() == before
    (first,) = (tag for tag in host.logical_volumes()[name] if tag.startswith("UNNEEDED_"))
    (owner,) = (tag for tag in host.logical_volumes()[name] if tag.startswith("VM_"))

    libvirt.define_placeholder(owner[3:])  # which says nothing
    assert gc() == {name: "keep"}
    libvirt.undefine(owner[3:])
    libvirt.create(domain_xml(Vm(owner[3:], ())))
    assert gc() == {name: "clear_mark"}
    assert first not in host.logical_volumes()[name]
    libvirt.destroy(owner[3:])

    assert gc() == {name: "mark_unneeded"}
    configure("retention: {grace: 0s}\n")
    assert gc() == {name: "remove"}
    assert host.logical_volumes() == {}


# -- what it prints, and what it changes


def test_a_dry_run_changes_nothing(volume_group: str) -> None:
    """Then gc without --dry-run does what was printed."""
    configure("retention: {grace: 0s, keep_for: 0s}\n")
    kinds = {
        make("UPDATING"): "remove",
        make("DELETING"): "remove",
        mark(make(), "STOPPED"): "remove",
        mark(make(), "UNNEEDED"): "remove",
        make("STOPPED_5"): "mark_stopped",  # of a time before it was made
        make("UNNEEDED_5"): "mark_unneeded",
        make("STOPPED_99999999999"): "keep",
        make(): "mark_unneeded",
    }
    run("lvcreate", "-y", "-Wn", "-L", "4m", "-n", "backup", "--addtag", "localdisk", host.VOLUME_GROUP)
    before = metadata()
    assert gc("--dry-run", code=1) == kinds  # the one from the future
    assert metadata() == before
    lines = localdisk("gc", "--dry-run", code=1).splitlines()
    assert metadata() == before
    assert len(lines) == len(kinds)
    for name, action in kinds.items():
        (line,) = (line for line in lines if name in line)
        assert line.startswith(f"{host.VOLUME_GROUP}/{name}  VM ")
        assert "  4 MiB  " in line
        assert ("would be removed: " in line) == (action == "remove")
    assert gc(code=1) == kinds
    assert set(host.logical_volumes()) == {"backup", *(n for n, a in kinds.items() if a != "remove")}
    host.remove(*host.logical_volumes())


def test_without_libvirt_everything_stays(volume_group: str) -> None:
    configure("retention: {grace: 0s, keep_for: 0s}\n")
    for tag in ("UPDATING", "DELETING"):
        make(tag)
    for kind in ("STOPPED", "UNNEEDED"):
        mark(make(), kind)
    before = metadata()
    with silent_libvirt():
        assert set(gc(code=1).values()) == {"keep"}
        (first, *_) = localdisk("gc", code=1).splitlines()
        assert first.endswith("  kept: libvirt cannot be asked about its VM")
    assert metadata() == before
    assert set(gc().values()) == {"remove"}


def test_what_is_open_or_kept_for_its_time_needs_no_libvirt(volume_group: str) -> None:
    """gc is good then; cron sends no mail while libvirt is upgraded."""
    configure("retention: {on_stop: keep, keep_for: 1h}\n")
    in_use, kept = make(), mark(make(), "STOPPED")
    before = metadata()
    with silent_libvirt(), Path(f"/dev/{host.VOLUME_GROUP}/{in_use}").open("rb"):
        assert gc() == {in_use: "keep", kept: "keep"}
    with silent_libvirt():
        assert gc(code=1) == {in_use: "keep", kept: "keep"}
    assert metadata() == before
    host.remove(in_use, kept)


def test_two_at_once(volume_group: str) -> None:
    """Also with a third VM's start in between: nobody is hurt, all that should go has gone."""
    names = [make("DELETING") for _ in range(6)]
    runs = [subprocess.Popen([str(host.PROGRAM), "gc"], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], said
    assert host.logical_volumes() == {}
    for name in names:
        assert any(name in text for text in said)


def test_gc_while_vms_start_and_stop(volume_group: str, file_storage: FileStorage) -> None:
    configure("retention: {grace: 1m}\n")
    image = file_storage.template(SIZE, seed=42)
    done = threading.Event()
    codes = []

    def collect() -> None:
        while not done.is_set():
            process = subprocess.run([str(host.PROGRAM), "gc"], capture_output=True, check=False)
            codes.append(process.returncode)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for _ in range(4):
            vm_id = starting(new_id())
            result = run_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), THICK)
            assert result.rc == 0, result
            assert equals_source(image)
            stop(vm_id, image)
            libvirt.undefine(vm_id)
    finally:
        done.set()
        collector.join()
    assert set(codes) == {0}
    assert host.logical_volumes() == {}


# -- retention


def test_keep_for_and_a_vms_own(volume_group: str) -> None:
    vm_id = new_id()
    general, own = mark(make(), "STOPPED"), mark(make(vm_id=vm_id), "STOPPED")
    configure(f"vms: {{{vm_id}: {{retention: {{keep_for: 0s}}}}}}\n")
    assert gc() == {general: "keep", own: "remove"}
    configure(f"retention: {{keep_for: 0s}}\nvms: {{{vm_id}: {{retention: {{keep_for: 2h}}}}}}\n")
    own = mark(make(vm_id=vm_id), "STOPPED")
    assert gc() == {general: "remove", own: "keep"}
    host.remove(own)


def test_a_vms_own_on_stop_grace_and_source_change(volume_group: str, file_storage: FileStorage) -> None:
    image, vm_id = file_storage.template(SIZE, seed=43), new_id()
    own = "{on_stop: keep, grace: 0s, on_source_change: recopy}"
    configure(f"vms: {{{vm_id}: {{retention: {own}}}}}\n")
    start(image, vm_id=vm_id)
    stop(vm_id, image)
    assert any(tag.startswith("STOPPED_") for tag in tags(image))
    qemu_io(image.leaf, ["write -P 9 0 64k"])
    start(image, vm_id=vm_id)
    assert equals_source(image)
    configure(f"vms: {{{vm_id}: {{retention: {{grace: 0s}}}}}}\n")
    other = make()
    assert gc() == {image.leaf.id: "mark_unneeded", other: "mark_unneeded"}
    assert gc() == {image.leaf.id: "remove", other: "keep"}
    host.remove(other)


@pytest.mark.parametrize("change", ["grown", "replaced"])
def test_a_kept_disk_whose_source_is_another(
    volume_group: str, file_storage: FileStorage, change: str
) -> None:
    """Changed is in test_life.py."""
    configure(KEEP)
    image = file_storage.clone(file_storage.template(SIZE, seed=44), seed=45)
    vm_id = start(image)
    stop(vm_id, image)
    if change == "grown":
        run("qemu-img", "resize", "-q", "-f", "qcow2", str(image.leaf.path), str(SIZE * 2))
        leaf = Volume(**{**vars(image.leaf), "size": SIZE * 2})
        image = Image(**{**vars(image), "volumes": (*image.volumes[:-1], leaf)})
    else:
        content = image.leaf.path.read_bytes()
        image.leaf.path.unlink()
        image.leaf.path.write_bytes(content)
        run("chown", "vdsm:kvm", str(image.leaf.path))
    starting(vm_id)
    before = metadata()
    result = run_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), THICK)
    libvirt.undefine(vm_id)
    assert (result.rc, metadata()) == (2, before)
    assert "has changed since it was copied" in result.stderr
    configure("retention: {on_stop: keep, on_source_change: recopy}\n")
    start(image, vm_id=vm_id)
    assert equals_source(image)
    configure()
    stop(vm_id, image)


def test_a_vm_whose_property_was_removed(volume_group: str, file_storage: FileStorage) -> None:
    """It runs from shared storage; its kept disk is there until the VM stops and keep_for is over."""
    configure("retention: {on_stop: keep, keep_for: 0s}\n")
    image = file_storage.template(SIZE, seed=46)
    vm_id = start(image)
    stop(vm_id, image)
    starting(vm_id)
    data = disk_json(Disk("vda", image))
    result = run_point("after_disk_prepare", vm_id, data, {})
    assert (result.rc, result.data) == (0, data)
    libvirt.start_domain(domain_xml(Vm(vm_id, (Disk("vda", image),))))
    assert gc() == {image.leaf.id: "keep"}
    libvirt.destroy(vm_id)
    libvirt.undefine(vm_id)
    assert gc() == {image.leaf.id: "remove"}
    assert host.logical_volumes() == {}


def test_a_snapshot_made_while_the_vm_was_stopped(volume_group: str, file_storage: FileStorage) -> None:
    """The copy of what was the leaf is garbage as soon as the VM starts from the new one."""
    configure(KEEP)
    image = file_storage.clone(file_storage.template(SIZE, seed=47), seed=48)
    vm_id = start(image)
    stop(vm_id, image)
    leaf = file_storage.new_volume(image.id, "cow", SIZE, image.leaf)
    newer = Image(**{**vars(image), "volumes": (*image.volumes, leaf)})
    start(newer, vm_id=vm_id)
    assert equals_source(newer)
    assert set(host.logical_volumes()) == {newer.leaf.id}
    configure()
    stop(vm_id, newer)


# -- erase


def test_a_start_does_not_wait_for_the_erase_of_its_old_copy(
    volume_group: str, file_storage: FileStorage
) -> None:
    """Nor does a stop; an erase that is killed is finished by the next gc."""
    configure("retention: {erase: zero}\n")
    image = file_storage.template(SIZE, seed=49)
    vm_id = start(image)
    with slow_blkdiscard():
        stop(vm_id, image)
        assert "DELETING" in tags(image)
        collector = subprocess.Popen([str(host.PROGRAM), "gc"], start_new_session=True)
        wait_for(erasing, "gc to begin")
        start(image, vm_id=vm_id)
        assert equals_source(image)
        collector.send_signal(signal.SIGKILL)
        collector.wait()
        run("pkill", "-f", "gc-script|gc-real|blkdiscard")
        assert set(host.logical_volumes()) == {image.leaf.id, *erasing()}
    starting(vm_id)
    (aside,) = erasing()
    assert gc() == {
        image.leaf.id: "mark_unneeded",
        aside: "remove",
    }  # a placeholder alone holds no disk for ever
    libvirt.undefine(vm_id)
    configure()
    stop(vm_id, image)


def test_a_start_waits_for_the_erase_that_frees_its_room(
    volume_group: str, file_storage: FileStorage
) -> None:
    """A VM whose disk fills the group is stopped and started; status shows what it waits for."""
    configure("retention: {erase: zero}\n")
    image = file_storage.template(SIZE, seed=51)
    vm_id = start(image)
    free = int(run("vgs", "--noheadings", "--units", "b", "--nosuffix", "-o", "vg_free", volume_group))
    configure(f"retention: {{erase: zero}}\nmargins: {{reserve: {free}}}\n")  # its own room is all there is
    stop(vm_id, image)
    with slow_blkdiscard() as waits:
        call = begin(image, vm_id)
        wait_for(erasing, "the old copy to be set aside")
        wait_for(lambda: states() == ["making_room"], "status to show it")
        waits.unlink()
        result = call.wait()
    assert result.rc == 0, result.stderr
    assert equals_source(image)
    assert set(host.logical_volumes()) == {image.leaf.id}
    libvirt.undefine(vm_id)
    configure()
    stop(vm_id, image)


def states() -> list[str]:
    """The states of disks that `status` shows, but of those to be removed."""
    shown = json.loads(run(str(host.PROGRAM), "status", "--json"))
    return [disk["state"] for disk in shown["disks"] if disk["state"] != "deleting"]


def test_a_missed_stop_that_must_be_erased(volume_group: str, file_storage: FileStorage) -> None:
    """A start over it sets it aside; vdsm's start erases nothing, gc does."""
    configure("retention: {erase: zero}\n")
    image = file_storage.template(SIZE, seed=50)
    vm_id = start(image)
    start(image, vm_id=vm_id)
    (aside,) = erasing()
    assert run_point("before_vdsm_start").rc == 0
    assert len(erasing()) == 2, "the VM's disk, too: vdsm was down, and the VM does not run"
    assert aside in erasing()
    assert set(gc().values()) == {"remove"}
    assert host.logical_volumes() == {}


@pytest.mark.parametrize("erase", ["none", "discard", "zero"])
def test_what_can_be_read_afterwards(volume_group: str, file_storage: FileStorage, erase: str) -> None:
    configure(f"retention: {{erase: {erase}}}\n")
    image = file_storage.template(SIZE, seed=51)
    qemu_io(image.leaf, [f"write -P 171 0 {SIZE}"])
    vm_id = start(image)
    stop(vm_id, image)
    gc()
    assert host.logical_volumes() == {}
    run("lvcreate", "-y", "-Wn", "-Zn", "-L", "8m", "-n", "next", host.VOLUME_GROUP)
    left = Path(f"/dev/{host.VOLUME_GROUP}/next").read_bytes().count(171)
    host.remove("next")
    assert (left > 0) == (erase == "none")


def test_zero_does_not_fill_a_thin_pool(thin_pool: str, file_storage: FileStorage) -> None:
    configure("retention: {erase: zero}\n")
    image = file_storage.template(SIZE, seed=52)
    run("truncate", "-s", str(1 << 30), str(image.leaf.path))
    leaf = Volume(**{**vars(image.leaf), "size": 1 << 30})
    image = Image(**{**vars(image), "volumes": (leaf,)})
    vm_id = start(image, THIN)
    used = pool_percent()
    stop(vm_id, image, custom=THIN)
    with slow_blkdiscard():  # zero is not done by blkdiscard here
        assert gc() == {image.leaf.id: "remove"}
    assert pool_percent() <= used
    assert set(host.logical_volumes()) == {host.THIN_POOL}


def pool_percent() -> float:
    report = run("lvs", "--noheadings", "-o", "data_percent", f"{host.VOLUME_GROUP}/{host.THIN_POOL}")
    return float(report)
