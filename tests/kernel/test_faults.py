"""Faults of real devices: the VM is refused with one line, nothing is left, and it starts after the fault.

The tests have their own volume group, on two devices that they can make fail.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.bed import host, libvirt, vdsm
from tests.bed.failing import FailingDevice, failing_device, send_messages
from tests.bed.player import Call, run_point, start_point
from tests.bed.shell import attempt, run
from tests.bed.storage import BlockStorage, FileStorage, Image, fill, new_id, qemu_io
from tests.bed.vm import Disk, Vm, disk_json, domain_xml
from tests.kernel import steps
from tests.kernel.steps import (
    KEEP,
    LOCKS,
    MIB,
    THICK,
    THIN,
    copied,
    copiers,
    device,
    equals_source,
    helpers,
    kill_all,
    lv_uuid,
    one_line,
    processes,
    refused,
    refused_disk,
    start,
    starting,
    stop,
    tags,
    wait_for,
)

NAME = "bed-faults"
MAPPED = NAME.replace("-", "--")  # in names of mappings
RULE = host.RULE.with_name("90-localdisk-faults.rules")
SLOW = "copy: {parallel: 1, bandwidth: 1MiB}\n"
CONTROL = Path("/run/udev/control")
DATA = 16 * MIB
BEDS_OWN = (
    ["lvm"],
    ["virsh", "-q", "-k", "0", "-c", libvirt.URI],
)  # they stay, and answer the bed's questions


# -- a volume group that can fail


@dataclass(frozen=True)
class Group:
    """The volume group of these tests."""

    devices: tuple[FailingDevice, FailingDevice]

    def mend(self) -> None:
        for each in self.devices:
            each.mend()

    def under(self, image: Image) -> FailingDevice:
        """The device that the local copy of an image is on."""
        said = run("lvs", "--noheadings", "-o", "devices", f"{NAME}/{image.leaf.id}")
        (found,) = (each for each in self.devices if f"{each.path}(" in said)
        return found

    def other(self, one: FailingDevice) -> FailingDevice:
        return self.devices[self.devices[0] == one]


@pytest.fixture(scope="module", autouse=True)
def rule() -> Iterator[None]:
    """Our udev rule for the group of these tests."""
    run("modprobe", "dm-mod")
    RULE.write_text(host.RULE.read_text().replace(host.VOLUME_GROUP, NAME))
    run("udevadm", "control", "--reload")
    yield
    RULE.unlink()
    run("udevadm", "control", "--reload")


@pytest.fixture(scope="module")
def devices(machine: None) -> Iterator[tuple[FailingDevice, FailingDevice]]:
    with failing_device("bed-one", 256 * MIB) as one, failing_device("bed-two", 256 * MIB) as two:
        yield one, two


@pytest.fixture
def group(
    monkeypatch: pytest.MonkeyPatch, libvirt: None, devices: tuple[FailingDevice, FailingDevice]
) -> Iterator[Group]:
    """An empty volume group of two devices, in the place of the bed's own; removed at the end."""
    run("vgcreate", "-y", "-s", "1m", NAME, *(str(each.path) for each in devices))
    monkeypatch.setattr(host, "VOLUME_GROUP", NAME)
    configure()
    group = Group(devices)
    yield group
    steps.configure()
    group.mend()
    clear(group)


def clear(group: Group) -> None:
    """Remove all that is left of the group, also hanging devices if a test failed in the middle."""
    kill_all(*helpers(), *copiers(), *host.processes_of("vdsm"))
    if attempt("vgremove", "-ff", "-y", NAME).returncode:
        for _ in range(3):  # what is above goes first
            for name, _ in mappings():
                if name.startswith(MAPPED):
                    attempt("dmsetup", "remove", "--force", name)
        for each in group.devices:
            run("wipefs", "-a", "-f", str(each.path))
    for lock in LOCKS.glob("*.*"):
        lock.unlink()


def configure(text: str = "") -> None:
    steps.configure(f"volume_group: {NAME}\n{text}")


@pytest.fixture(scope="module")
def image(machine: None) -> Iterator[Image]:
    """Enough data that a slow copy of it takes some seconds."""
    storage = FileStorage()
    template = storage.template(DATA, seed=1)
    fill(template.leaf, DATA)
    yield storage.clone(template, seed=2)
    storage.remove()


# -- what is there


@dataclass(frozen=True)
class Traces:
    """All that a start or a stop could leave behind."""

    volumes: Mapping[str, frozenset[str]] | None  # None: the group cannot be read
    mappings: frozenset[str]  # of device-mapper
    suspended: frozenset[str]
    locks: frozenset[str]
    running: tuple[str, ...]
    cookies: str  # of LVM commands that wait for udev


def traces() -> Traces:
    volumes = None if attempt("vgs", NAME).returncode else host.logical_volumes()
    rows = mappings()
    return Traces(
        volumes=volumes,
        # LVM makes -tpool when the pool gets its first volume, and leaves it there
        mappings=frozenset(name for name, _ in rows if not name.endswith("-tpool")),
        suspended=frozenset(name for name, state in rows if state == "Suspended"),
        locks=frozenset(path.name for path in LOCKS.glob("*.*")),
        running=tuple(sorted(busy())),
        cookies=run("dmsetup", "udevcookies"),
    )


def mappings() -> list[tuple[str, str]]:
    """All mappings of device-mapper, and whether they are Active or Suspended."""
    report = run("dmsetup", "info", "-c", "--noheadings", "--separator", " ", "-o", "name,suspended")
    return [(name, state) for name, state in (line.split() for line in report.splitlines())]


def busy() -> list[str]:
    """Command lines of processes that a hook, its helper or gc started, or that are them."""
    found = list(host.processes_of("vdsm").values())
    for _, words in processes():
        tool = Path(words[0]).name
        if words in BEDS_OWN:
            continue
        if tool in ("lvm", "qemu-img", "sudo", "virsh") or tool.startswith(("lv", "vg")):
            found.append(" ".join(words))
        if words[-1:] == ["helper"] or "50_localdisk" in " ".join(words[:3]):
            found.append(" ".join(words))
    return found


# -- starts that fail


def fails(
    image: Image,
    custom: Mapping[str, str] = THICK,
    vm_id: str = "",
    fault: Callable[[], None] | None = None,
    left: frozenset[str] = frozenset(),
) -> str:
    """A start is refused with one line and leaves nothing; returns that line.

    `fault` happens while the copy is under way; the mappings `left` and their volumes are what cannot go now.
    """
    before = traces()
    vm_id = starting(vm_id or new_id())
    call = begin(image, vm_id, custom)
    if fault:
        wait_for(lambda: copied(image) > 2 * MIB, "the copy")
        fault()
    result = call.wait(400)
    libvirt.undefine(vm_id)
    line = one_line(result)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.data == disk_json(Disk("vda", image))
    after = traces()
    if left:
        assert after.mappings - before.mappings == left
        after = replace(after, mappings=before.mappings, volumes=before.volumes)
    assert after == before
    return line


def mapping(group: str, image: Image) -> str:
    """What device-mapper calls an image's LV in that group."""
    return "-".join(word.replace("-", "--") for word in (group, image.leaf.id))


def begin(image: Image, vm_id: str, custom: Mapping[str, str]) -> Call:
    return start_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), custom)


def comes_back(image: Image, custom: Mapping[str, str] = THICK, vm_id: str = "") -> None:
    """After the fault, a start succeeds with the right bytes, and its stop leaves nothing."""
    configure()
    vm_id = start(image, custom, vm_id)
    assert equals_source(image)
    stop(vm_id, image, custom=custom)
    after = traces()
    assert set(after.volumes or {}) <= {host.THIN_POOL}
    assert (after.suspended, after.locks, after.running) == (frozenset(), frozenset(), ())


def told(*words: str) -> tuple[int, str, tuple[str, ...]]:
    """How a mode of the program ends: its exit code, what it prints, and its problems, one line each."""
    done = attempt(str(host.PROGRAM), *words)
    lines = tuple(done.stderr.splitlines())
    assert all(line.startswith("localdisk: ") and " : " in line for line in lines), done.stderr
    return done.returncode, done.stdout, lines


def shown() -> tuple[str, ...]:
    """The problems that `localdisk status` shows, but for that of VMs that libvirt does not know here."""
    code, out, _ = told("status", "--json")
    problems = json.loads(out)["problems"]
    assert code == bool(problems)
    kinds = ("not_usable", "near_limit", "clock", "no_copier")
    return tuple(f"localdisk: {each['what']} : {each['fix']}" for each in problems if each["kind"] in kinds)


# -- a device of the group

GONE = (FailingDevice.fail, FailingDevice.vanish)
PARTIAL = f"localdisk: volume group {NAME} is missing a physical volume : "
ABSENT = f"localdisk: no volume group {NAME} on this host : "


def test_a_device_is_gone(group: Group, image: Image) -> None:
    for gone in GONE:
        gone(group.devices[1])
        assert refused_disk(image).startswith(PARTIAL)
    assert told("gc") == (0, "", ())
    (problem,) = shown()
    assert problem.startswith(PARTIAL)
    group.mend()
    comes_back(image)


def test_all_devices_are_gone(group: Group, image: Image) -> None:
    for gone in GONE:
        for each in group.devices:
            gone(each)
        assert refused_disk(image).startswith(ABSENT)
    for mode in ("gc", "status"):
        code, out, (problem,) = told(mode)
        assert (code, out, problem.startswith(ABSENT)) == (2, "", True)
    group.mend()
    comes_back(image)


@pytest.mark.parametrize("whose", ["its own", "the other"])
def test_kept_disk_and_a_device_is_gone(group: Group, image: Image, whose: str) -> None:
    """The disk is neither used nor lost, and the group heals by itself when the device is back."""
    configure(KEEP)
    vm_id = start(image)
    stop(vm_id, image)
    kept, stopped = lv_uuid(image), tags(image)
    own = group.under(image)
    (own if whose == "its own" else group.other(own)).fail()
    assert refused_disk(image, vm_id=vm_id).startswith(PARTIAL)
    ended = run_point("after_vm_destroy", vm_id, domain_xml(Vm(vm_id, (Disk("vda", image),))), THICK)
    assert ended.stderr.startswith(PARTIAL)
    configure("retention: {on_stop: keep, keep_for: 0s}\n")
    code, out, problems = told("gc")
    assert (code, problems) == (1, ())
    (line,) = out.splitlines()
    assert f"not removed, {PARTIAL[11:]}" in line
    assert shown()[0].startswith(PARTIAL)
    configure(KEEP)
    group.mend()
    assert tags(image) == stopped
    start(image, vm_id=vm_id)
    assert lv_uuid(image) == kept
    configure()
    stop(vm_id, image)
    assert host.logical_volumes() == {}


def test_running_vm_and_a_device_is_gone(group: Group, image: Image) -> None:
    """vdsm recovers the VM; its stop fails; the disk is removed when the device is back."""
    vm = Vm(new_id(), (Disk("vda", image),))
    started = vdsm.start(vm, THICK)
    before = tags(image)
    group.other(group.under(image)).fail()
    (again,) = vdsm.recover(vm, THICK)
    assert (again.rc, again.data) == (0, vdsm.recovered_disk(vm.disks[0])), again.stderr
    assert "kept: in use" in told("gc")[1]
    assert vdsm.stop(started, THICK).stderr.startswith(PARTIAL)
    group.mend()
    assert tags(image) == before
    comes_back(image, vm_id=vm.id)


def test_a_device_goes_while_copying(group: Group, image: Image) -> None:
    """The device below the copy fails: the disk cannot be removed before the device is back."""
    configure(SLOW)
    vm_id = new_id()

    def fault() -> None:
        for each in group.devices:
            each.fail()

    line = fails(image, vm_id=vm_id, fault=fault, left=frozenset({mapping(NAME, image)}))
    assert "Input/output error : look at" in line
    for mode in ("gc", "status"):
        assert told(mode)[0] == 2
    group.mend()
    comes_back(image, vm_id=vm_id)


def test_the_metadata_goes_while_copying(group: Group, image: Image) -> None:
    """The copy succeeds and is not made ready, as nothing may be changed in what is left of the group."""
    configure("copy: {parallel: 1, bandwidth: 4MiB}\n")

    def fault() -> None:
        group.other(group.under(image)).fail(0, MIB)

    assert fails(image, fault=fault, left=frozenset({mapping(NAME, image)})).startswith(PARTIAL)
    code, out, _ = told("gc")
    assert (code, f"not removed, {PARTIAL[11:]}" in out) == (1, True)
    group.mend()
    assert told("gc")[:1] == (0,)
    assert host.logical_volumes() == {}
    comes_back(image)


def test_another_group_is_not_in_the_way(group: Group, image: Image) -> None:
    """What is in the other group is judged and shown all the same."""
    configure(f"vms: {{{new_id()}: {{volume_group: nosuch}}}}\n")
    vm_id = start(image)
    code, out, (problem,) = told("gc")
    assert (code, out.count("\n")) == (1, 1)
    assert problem.startswith("localdisk: no volume group nosuch on this host : ")
    assert shown() == (problem,)
    assert vm_id in told("status", "--full")[1]
    stop(vm_id, image)


# -- writing


def test_write_error(group: Group, image: Image) -> None:
    for each in group.devices:
        each.fail(9 * MIB)
    line = fails(image)
    assert f"to {device(image)} failed: " in line
    assert "Input/output error : look at" in line
    group.mend()
    comes_back(image)


def test_write_error_at_the_start(group: Group, image: Image) -> None:
    for each in group.devices:
        each.fail(MIB)
    line = fails(image)
    assert line.startswith(f"localdisk: lvcreate --quiet failed for {NAME} (exit code 5): ")
    group.mend()
    comes_back(image)


def test_write_error_below_a_thin_disk(group: Group, image: Image) -> None:
    configure(SLOW)
    make_pool()
    data = FailingDevice.of(f"{MAPPED}-{host.THIN_POOL}_tdata")
    line = fails(image, THIN, fault=data.fail)
    assert f"to {device(image)} failed: " in line
    assert "Input/output error : look at" in line
    data.mend()
    comes_back(image, THIN)


def test_erasing_fails(group: Group, image: Image) -> None:
    """What could not be erased is not removed; gc tries again."""
    configure("retention: {erase: zero}\n")
    vm_id = start(image)
    stop(vm_id, image)
    for each in group.devices:
        each.fail(9 * MIB)
    code, out, problems = told("gc")
    assert (code, problems) == (1, ())
    (line,) = out.splitlines()
    assert "blkdiscard --zeroout failed" in line
    (aside,) = host.logical_volumes()
    assert aside != image.leaf.id
    assert shown() == ()
    group.mend()
    assert told("gc")[0] == 0
    comes_back(image, vm_id=vm_id)


# -- reading


def test_read_error(group: Group, image: Image, block_storage: BlockStorage) -> None:
    image = block_storage.template(DATA, seed=3)
    run("chown", "vdsm", str(image.leaf.path))
    source = FailingDevice.of(mapping(block_storage.domain_id, image))
    between = 9 * MIB + 8192  # two blocks of the fingerprint's sample
    source.fail(between, between + 16384)
    line = fails(image)
    assert f"copying {image.leaf.path} to {device(image)} failed: " in line
    assert "error while reading" in line
    source.fail()
    line = refused_disk(image)
    assert line.startswith(f"localdisk: source volume {image.leaf.path} is refused: Input/output error : ")
    source.mend()
    comes_back(image)


def test_read_error_in_the_mapping(group: Group, block_storage: BlockStorage) -> None:
    """The tables of a qcow2 image are part of its fingerprint."""
    make_pool()
    image = block_storage.template(DATA, "cow", seed=4)
    source = FailingDevice.of(mapping(block_storage.domain_id, image))
    source.fail(256 << 10, 512 << 10)
    line = refused_disk(image, THIN)
    assert line.startswith(f"localdisk: source volume {image.leaf.path} is refused: Input/output error : ")
    source.mend()
    comes_back(image, THIN)


def test_shared_storage_goes_while_copying(group: Group) -> None:
    """A file whose file system can no longer be read."""
    configure(SLOW)
    with ExitStack() as stack:
        disk = stack.enter_context(failing_device("bed-shared", 96 * MIB))
        storage = FileStorage()
        stack.callback(storage.remove)
        run("mkfs.ext4", "-q", str(disk.path))
        run("mount", str(disk.path), str(storage.images))
        stack.callback(run, "umount", str(storage.images))
        run("chown", "vdsm:kvm", str(storage.images))
        image = storage.template(2 * DATA, seed=5)  # qemu-img reads up to 16 MiB ahead
        fill(image.leaf, 2 * DATA)
        run("mount", "-o", "remount,ro", str(storage.images))
        line = fails(image, fault=disk.fail)
        assert "error while reading" in line
        disk.mend()
        comes_back(image)


# -- the thin pool


@pytest.mark.parametrize("when_full", ["error", "queue"])
def test_pool_fills_up_while_copying(group: Group, image: Image, when_full: str) -> None:
    configure(f"margins: {{thin_data: 100%}}\n{SLOW}")
    make_pool(size="24m")
    pool = f"{NAME}/{host.THIN_POOL}"
    if when_full == "error":
        run("lvchange", "--errorwhenfull", "y", pool)
    run("lvcreate", "-y", "-qq", "-V", "24m", "--thinpool", pool, "-n", "guest")

    def fault() -> None:
        attempt("dd", "if=/dev/urandom", f"of=/dev/{NAME}/guest", "bs=1M", "oflag=direct")

    with no_space_timeout(3):
        line = fails(image, THIN, fault=fault)
        fault()  # what the copy had got is free again
    assert f"to {device(image)} failed: the thin pool is full : " in line
    assert "margins.thin_data" in refused_disk(image, THIN)
    assert told("gc") == (0, "", ())
    assert "allowed : lvextend --size" in shown()[0]
    host.remove("guest")
    comes_back(image, THIN)


@contextmanager
def no_space_timeout(seconds: int) -> Iterator[None]:
    """How long a full pool queues writes."""
    parameter = Path("/sys/module/dm_thin_pool/parameters/no_space_timeout")
    before = parameter.read_text()
    parameter.write_text(str(seconds))
    yield
    parameter.write_text(before)


def test_pool_metadata_fills_up_while_copying(group: Group, image: Image) -> None:
    """Also what is unfinished cannot be removed then as it should: LVM does the rest when there is room.

    The kernel either makes the pool read-only or, where it cannot take back what it had begun, gives it up.
    """
    configure(SLOW)
    make_pool("--poolmetadatasize", "2m")
    fill_metadata(70)
    line = fails(image, THIN, fault=lambda: fill_metadata(100))
    assert f"to {device(image)} failed: " in line
    refusal = refused_disk(image, THIN)
    is_given_up = refusal.startswith(f"{BROKEN_POOL} is active, but LVM does not report how full it is")
    assert is_given_up or "margins.thin_metadata: 100.0 % of 80 % allowed" in refusal
    assert told("gc") == (0, "", ())
    (problem,) = shown()
    assert ("metadata 100.0 % of 80 % allowed" in problem) is not is_given_up
    if is_given_up:
        repair_pool()
    run("lvextend", "-qq", "--poolmetadatasize", "+2m", f"{NAME}/{host.THIN_POOL}")
    comes_back(image, THIN)


def test_pool_metadata_is_nearly_full(group: Group, image: Image) -> None:
    """LVM itself makes no thin volume then, before our margin is reached."""
    make_pool("--poolmetadatasize", "2m")
    fill_metadata(78)
    line = fails(image, THIN)
    assert line.startswith(f"localdisk: LVM makes no new disk in thin pool {NAME}/{host.THIN_POOL}: ")
    run("lvextend", "-qq", "--poolmetadatasize", "+2m", f"{NAME}/{host.THIN_POOL}")
    comes_back(image, THIN)


def test_pool_metadata_cannot_be_written(group: Group, image: Image) -> None:
    configure(SLOW)
    make_pool()
    metadata = FailingDevice.of(f"{MAPPED}-{host.THIN_POOL}_tmeta")
    assert f"to {device(image)} failed: " in fails(image, THIN, fault=metadata.fail)
    broken = f"{BROKEN_POOL} is active, but LVM does not report how full it is"
    assert refused_disk(image, THIN).startswith(broken)
    assert told("gc") == (0, "", ())
    (problem,) = shown()
    assert problem.startswith(broken)
    metadata.mend()
    repair_pool()
    comes_back(image, THIN)


BROKEN_POOL = f"localdisk: thin pool {NAME}/{host.THIN_POOL}"


def repair_pool() -> None:
    """Do what the refusal says."""
    pool = f"{NAME}/{host.THIN_POOL}"
    run("lvchange", "-an", pool)
    if not attempt("lvchange", "-ay", pool).returncode:
        return
    said = attempt("lvconvert", "-y", "--repair", pool)
    ids = re.search(r"Transaction id (\d+) .* repaired transaction id (\d+)", said.stderr)
    if ids:  # LVM of Debian 13 leaves that to the administrator
        text = Path("/run/bed-faults.vg")
        run("vgcfgbackup", "-f", str(text), NAME)
        old, new = (f"transaction_id = {number}\n" for number in ids.groups())
        text.write_text(text.read_text().replace(old, new))
        run("vgcfgrestore", "--force", "-f", str(text), NAME)
    else:
        assert said.returncode == 0, said.stderr
        run("lvremove", "-y", f"{pool}_meta0")
    run("lvchange", "-ay", pool)


def make_pool(*options: str, size: str = "64m") -> None:
    words = ["-y", "-qq", "--type", "thin-pool", "-L", size, *options]
    run("lvcreate", *words, "-n", host.THIN_POOL, NAME)


def fill_metadata(percent: int) -> None:
    """Thin devices that LVM knows nothing of take the pool's metadata, a block each."""
    pool = f"{MAPPED}-{host.THIN_POOL}-tpool"
    if attempt("dmsetup", "status", pool).returncode:
        pool = f"{MAPPED}-{host.THIN_POOL}"
    used, total = map(int, run("dmsetup", "status", pool).split()[4].split("/"))
    messages = (f"create_thin {percent * 10_000 + number}" for number in range(total * percent // 100 - used))
    send_messages(pool, messages)


def test_what_a_pool_gives_is_counted_in_its_blocks(group: Group, machine: None) -> None:
    """Scattered data take a whole block each: of the pool's 64 blocks of 1 MiB, these 64 KiB take 16."""
    make_pool("--chunksize", "1m")
    storage = FileStorage()
    image_id = new_id()
    volume = storage.new_volume(image_id, "raw", 32 * MIB)
    qemu_io(volume, [f"write -P 1 {number * 2}M 4k" for number in range(16)])
    image = storage.image(image_id, volume)
    configure("margins: {thin_data: 20%}\n")
    assert "would pass margins.thin_data: 25.0 % of 20 % allowed" in refused_disk(image, THIN)
    configure("margins: {thin_data: 26%}\n")
    vm_id = start(image, THIN)
    assert lvm_percent(f"{NAME}/{host.THIN_POOL}") == 25
    stop(vm_id, image)
    storage.remove()


def lvm_percent(pool: str) -> float:
    return float(run("lvs", "--noheadings", "-o", "data_percent", pool))


def test_no_usable_pool(group: Group, image: Image) -> None:
    """It is missing, does not zero what it gives, is not active."""
    pool = f"{NAME}/{host.THIN_POOL}"
    assert f"no thin pool {pool} : create it" in refused_disk(image, THIN)
    make_pool("--zero", "n")
    assert f"lvchange --zero y {pool}" in refused_disk(image, THIN)
    run("lvchange", "--zero", "y", pool)
    run("lvchange", "-an", pool)
    inactive = f"localdisk: thin pool {pool} is not active, "
    assert refused_disk(image, THIN).startswith(inactive)
    (problem,) = shown()
    assert problem.startswith(inactive)
    run("lvchange", "-ay", pool)
    comes_back(image, THIN)


# -- the group itself


def test_no_group(group: Group, image: Image) -> None:
    steps.configure("volume_group: nosuch\n")
    absent = "localdisk: no volume group nosuch on this host : create it (vgcreate --metadatasize 128m nosuch"
    assert refused_disk(image).startswith(absent)
    for mode in ("gc", "status"):
        code, out, (problem,) = told(mode)
        assert (code, out, problem.startswith(absent)) == (2, "", True)
    comes_back(image)


def test_group_is_full(group: Group, image: Image) -> None:
    run("lvcreate", "-y", "-Wn", "-l", "100%FREE", "-n", "full", NAME)
    assert f"volume group {NAME} lacks 16 MiB" in refused_disk(image)
    host.remove("full")
    comes_back(image)


def test_exported_group(group: Group, image: Image) -> None:
    exported = f"volume group {NAME} is exported : vgimport {NAME}"
    configure(KEEP)
    vm_id = start(image)
    stop(vm_id, image)
    kept = lv_uuid(image)
    run("vgchange", "--activate", "n", NAME)  # vgexport refuses a group with active volumes
    run("vgexport", NAME)
    assert refused_disk(image, vm_id=vm_id) == f"localdisk: {exported}"
    assert shown() == (f"localdisk: {exported}",)
    configure("retention: {on_stop: keep, keep_for: 0s}\n")
    code, out, _ = told("gc")
    assert (code, f"not removed, {exported}" in out) == (1, True)
    run("vgimport", NAME)
    configure(KEEP)
    start(image, vm_id=vm_id)
    assert lv_uuid(image) == kept
    configure()
    stop(vm_id, image)


def test_a_full_metadata_area(group: Group, image: Image) -> None:
    """Others have filled it by short commands: gc removes all the same what no VM needs.

    LVM writes the command line into the metadata, and ours are longer by a thousand bytes.
    """
    configure("retention: {on_stop: keep, keep_for: 0s}\n")
    stop(start(image), image)
    fill_metadata_area()
    code, out, said = told("gc")
    assert (code, said, " removed: " in out) == (0, (), True)
    assert host.logical_volumes() == {}


def fill_metadata_area() -> None:
    """With tags of the group, until not even a short one has room."""
    number = 0
    for length, at_once in ((900, 100), (900, 20), (900, 4), (900, 1), (100, 1), (1, 1)):
        while True:
            names = [f"{number + n:0{length}d}" for n in range(at_once)]
            number += at_once
            if attempt("vgchange", "-qq", *(f"--addtag={name}" for name in names), NAME).returncode:
                break


def test_shared_group(group: Group, image: Image) -> None:
    """Without lvmlockd, LVM reports nothing else about such a group."""
    text = Path("/run/bed-faults.vg")
    run("vgcfgbackup", "-f", str(text), NAME)
    lock = 'format = "lvm2"\nlock_type = "sanlock"\nlock_args = "1.0.0:lvmlock"\n'
    text.write_text(text.read_text().replace('format = "lvm2"', lock, 1))
    run("vgcfgrestore", "-f", str(text), NAME)
    shared = f"localdisk: volume group {NAME} is shared (sanlock) : "
    assert refused_disk(image).startswith(shared)
    for mode in ("gc", "status"):
        code, out, (problem,) = told(mode)
        assert (code, out, problem.startswith(shared)) == (2, "", True)
    on = "global{use_lvmlockd=1}"
    run("vgchange", "-y", "--config", on, "--lock-type", "none", "--lock-opt", "force", NAME)
    comes_back(image)


def test_lock_held_for_a_while(group: Group, image: Image) -> None:
    """Another LVM command works on the group: the start waits."""
    vm_id = starting(new_id())
    with locked():
        call = begin(image, vm_id, THICK)
        wait_for(lambda: any(words[:2] == ["lvm", "fullreport"] for _, words in processes()), "lvm")
        time.sleep(3)
        assert call.process
        assert call.process.poll() is None
    assert call.wait().rc == 0
    libvirt.undefine(vm_id)
    assert equals_source(image)
    stop(vm_id, image)


@contextmanager
def locked() -> Iterator[None]:
    """The group's lock is held, as by an LVM command that changes it."""
    with open(f"/run/lock/lvm/V_{NAME}", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def run_of(options: str) -> Iterator[None]:
    """/run/localdisk is a file system of this size."""
    LOCKS.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(LOCKS))
    try:
        yield
    finally:
        run("umount", str(LOCKS))


def test_run_is_full(group: Group, image: Image) -> None:
    """A tmpfs that is full has files without content all the same; one without inodes has none."""
    with run_of("size=16k,nr_inodes=100"):
        (LOCKS / "full").write_bytes(bytes(16 << 10))
        vm_id = start(image)
        assert equals_source(image)
        stop(vm_id, image)
    with run_of("nr_inodes=1"):
        lock = LOCKS / f"{image.leaf.id}.lock"
        assert refused_disk(image).startswith(
            f"localdisk: cannot make or remove {lock}: No space left on device : "
        )
    comes_back(image)


# -- the tools


@pytest.fixture
def qemu_img() -> Iterator[Callable[[str], None]]:
    """What puts something else in the place of qemu-img: a script; not even a program where it is empty."""
    program, script = Path("/usr/bin/qemu-img"), Path("/run/bed-script")
    real = Path("/run/bed-qemu-img")
    shutil.copy2(program, real)

    def replace(text: str) -> None:
        script.write_text(text)
        script.chmod(0o755 if text else 0o644)
        run("mount", "--bind", str(script), str(program))

    yield replace
    attempt("umount", str(program))


def test_qemu_img_is_no_program(group: Group, image: Image, qemu_img: Callable[[str], None]) -> None:
    make_pool()
    qemu_img("")
    for custom in (THICK, THIN):
        said = "localdisk: qemu-img cannot be run by this user: it is user 0's"
        assert fails(image, custom).startswith(said)
    run("umount", "/usr/bin/qemu-img")
    comes_back(image, THIN)


def test_qemu_img_crashes(group: Group, image: Image, qemu_img: Callable[[str], None]) -> None:
    make_pool()
    qemu_img("#!/bin/sh\nkill -ABRT $$\n")
    assert f"copying {image.leaf.path} to {device(image)} failed: " in fails(image)
    assert f"qemu-img measure failed for {image.leaf.path} (killed by SIGABRT): " in fails(image, THIN)
    run("umount", "/usr/bin/qemu-img")
    comes_back(image)


@pytest.mark.parametrize("how", ["stopped", "hangs"])
def test_libvirt_is_silent(group: Group, image: Image, how: str) -> None:
    """Whether the VM runs cannot be asked, so nothing is copied, and nothing is removed."""
    configure("retention: {on_stop: keep, keep_for: 0s}\n")
    vm_id = start(image)
    stop(vm_id, image)
    stopped = tags(image)
    with silent_libvirt(how), ThreadPoolExecutor() as background:
        gc = background.submit(told, "gc")
        data = disk_json(Disk("vda", image))
        asked = run_point("after_disk_prepare", vm_id, data, THICK)
        assert (asked.rc, asked.data) == (0, data), "the VM may be one that runs"
        line = refused("before_vm_start", vm_id, domain_xml(Vm(vm_id, (Disk("vda", image),))))
        assert line.startswith("localdisk: libvirt does not report which VMs run: ")
        code, out, _ = gc.result()
        assert (code, "kept: libvirt cannot be asked" in out) == (1, True)
        assert shown() == ()
    assert tags(image) == stopped
    comes_back(image, vm_id=vm_id)


@contextmanager
def silent_libvirt(how: str) -> Iterator[None]:
    if how == "stopped":
        libvirt.stop()
        yield
        libvirt.start()
    else:
        daemons = [pid for pid, words in processes() if Path(words[0]).name == "libvirtd"]
        for pid in daemons:
            os.kill(pid, signal.SIGSTOP)
        yield
        for pid in daemons:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture
def no_udev() -> Iterator[Callable[[], None]]:
    """Makes udevd end, as long as the test runs or until what it gives back is called again."""
    if not host.throwaway():
        pytest.skip("this machine's udevd is left alone")

    def toggle() -> None:
        if CONTROL.exists():
            run("udevadm", "control", "--exit")
            wait_for(lambda: not any("udevd" in words[0] for _, words in processes()), "udevd to end")
            CONTROL.unlink()  # what LVM looks at
        else:
            run("/lib/systemd/systemd-udevd", "--daemon")
            run("udevadm", "trigger", "--action=add", "--subsystem-match=block")
            run("udevadm", "settle")

    yield toggle
    if not CONTROL.exists():
        toggle()


def test_udev_does_not_run(group: Group, image: Image, no_udev: Callable[[], None]) -> None:
    """Nobody makes the nodes: lvcreate cannot zero the start of a thick volume, nor we open a thin one."""
    make_pool()
    no_udev()
    line = fails(image)
    assert line.startswith(f"localdisk: lvcreate --quiet failed for {NAME} (exit code 5): ")
    line = fails(image, THIN)
    assert line.startswith(f"localdisk: cannot write to {device(image)} as this user: No such file")
    assert told("gc") == (0, "", ())
    no_udev()
    comes_back(image, THIN)


def test_udev_does_not_run_for_a_kept_disk(group: Group, image: Image, no_udev: Callable[[], None]) -> None:
    configure(KEEP)
    vm_id = start(image)
    stop(vm_id, image)
    kept = lv_uuid(image)
    run("lvchange", "--activate", "n", f"{NAME}/{image.leaf.id}")  # as after a boot
    no_udev()
    line = fails(image, vm_id=vm_id)
    assert line.startswith(f"localdisk: cannot write to {device(image)} as this user: No such file")
    no_udev()
    start(image, vm_id=vm_id)
    assert lv_uuid(image) == kept
    configure()
    stop(vm_id, image)


# -- last, as it takes longer than our deadline for LVM


def test_lock_held_too_long(group: Group, image: Image) -> None:
    before = traces()
    vm_id = starting(new_id())
    hangs = f"localdisk: lvm fullreport for {NAME} did not end within 120 s, LVM's lock of the volume group "
    ours = f" ({os.getpid()}) : wait until it has ended; if it hangs, end it (ps -fp {os.getpid()}, "
    with ThreadPoolExecutor() as background, locked():
        call = begin(image, vm_id, THICK)
        ends = [background.submit(told, mode) for mode in ("gc", "status")]
        began = time.monotonic()
        result = run_point("before_vdsm_start")  # vdsmd does not start if it takes 90 s
        assert time.monotonic() - began < 80
        assert (result.rc, "did not end within 30 s" in result.stderr) == (1, True), result
        line = one_line(call.wait(300))
        assert line.startswith(hangs)
        assert ours in line
        for end in ends:
            code, out, (problem,) = end.result()
            assert (code, out, problem.startswith(hangs)) == (2, "", True)
    libvirt.undefine(vm_id)
    assert traces() == before
    comes_back(image)
