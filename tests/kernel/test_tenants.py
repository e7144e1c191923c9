"""Two tenants: VM B, through the real hook, never gets VM A's local disk nor one byte of it.

Only A's local disk has SECRET; it is neither on shared storage nor in an image of B.  In an attempt, vdsm
calls the hook for B, and everything that B's owner can influence is forged.  Each attempt is made while A
runs, while its disk is kept, while the disk waits to be removed, and while it is set aside to be erased.
The attempt is refused with one line, or B gets its own bytes; A's logical volume does not change.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.bed import host, libvirt, vdsm
from tests.bed.player import run_point, start_point
from tests.bed.shell import run
from tests.bed.storage import RAW, FileStorage, Image, Volume, digest, new_id
from tests.bed.vm import Disk, Vm, boot_sector, chain_entry, disk_json, disk_xml, domain_xml
from tests.kernel.privilege.attempts import Talk, is_refusal
from tests.kernel.steps import (
    KEEP,
    LOCKS,
    MIB,
    THICK,
    THIN,
    configure,
    copied,
    device,
    equals_source,
    hold_open,
    just_now,
    localdisk,
    one_line,
    processes,
    slow_blkdiscard,
    start,
    starting,
    stop,
    tags,
    wait_for,
)

SIZE = 8 * MIB
ODD = 5 * MIB + 3 * 512  # no whole extents: behind it is what was there before
SECRET = b"what tenant A's guest wrote. "
SLOW = "copy: {bandwidth: 4MiB}\n"  # 2 MiB a second for each copy
ERASE = "retention: {erase: zero}\n"


def guest_writes(path: Path) -> None:
    """Fill A's local disk behind its boot sector."""
    with open(path, "r+b") as disk:
        size = disk.seek(0, os.SEEK_END)
        disk.seek(64 << 10)
        disk.write((SECRET * (size // len(SECRET)))[: size - (64 << 10)])


def holds_secret(path: Path) -> bool:
    """Anywhere in the whole volume, a part of it too."""
    content = path.read_bytes()
    return any(SECRET[n : n + 8] in content for n in range(0, len(SECRET) - 8, 4))


def own_image(storage: FileStorage, size: int = SIZE) -> Image:
    return storage.clone(storage.template(4 * MIB, RAW, seed=5), seed=6, size=size)


# -- one after the other, and at the same time


@pytest.fixture(autouse=True)
def _defaults(libvirt: None) -> Iterator[None]:
    yield
    assert not list(LOCKS.glob("*.*")), "a lock is left behind"


def place(name: str) -> str:
    """Where in the volume group a volume lies."""
    return run("lvs", "--noheadings", "-o", "seg_pe_ranges", f"{host.VOLUME_GROUP}/{name}").strip()


NEXT: dict[str, Callable[[FileStorage], Image]] = {
    "raw": lambda storage: storage.template(4 * MIB + 512, RAW, seed=7),
    "odd": lambda storage: own_image(storage, ODD),
    "as large": own_image,
}


@pytest.mark.parametrize("make", NEXT.values(), ids=NEXT)
@pytest.mark.parametrize("custom", [THICK, THIN], ids=["thick", "thin"])
def test_the_next_disk_in_the_same_place(
    thin_pool: str,
    file_storage: FileStorage,
    custom: Mapping[str, str],
    make: Callable[[FileStorage], Image],
) -> None:
    configure()
    a, b = file_storage.template(SIZE, seed=1), make(file_storage)
    vm_id = start(a, custom)
    guest_writes(device(a))
    assert holds_secret(device(a))
    was = place(a.leaf.id)
    stop(vm_id, a, custom=custom)
    vm_id = start(b, custom)
    assert place(b.leaf.id).split("-")[0] == was.split("-")[0]
    assert equals_source(b)
    assert not holds_secret(device(b))
    stop(vm_id, b, custom=custom)


def test_while_a_is_copied(volume_group: str, file_storage: FileStorage) -> None:
    """B asks for A's disk, and waits for its lock; for its own, which is copied beside it."""
    configure(SLOW)
    a, b = file_storage.template(SIZE, seed=1), own_image(file_storage)
    vms = [starting(new_id()) for _ in range(3)]
    first = start_point("after_disk_prepare", vms[0], disk_json(Disk("vda", a)), THICK)
    wait_for(lambda: copied(a), "A's copy")
    thief = start_point("after_disk_prepare", vms[1], disk_json(Disk("vda", a)), THICK)
    own = start_point("after_disk_prepare", vms[2], disk_json(Disk("vda", b)), THICK)
    results = [call.wait() for call in (first, thief, own)]
    assert [result.rc for result in results] == [0, 2, 0], results
    assert f"belongs to VM {vms[0]}" in one_line(results[1])
    for image in (a, b):
        assert equals_source(image)
    for vm_id, image in ((vms[0], a), (vms[1], a), (vms[2], b)):
        libvirt.undefine(vm_id)
        stop(vm_id, image)


def test_while_a_is_erased(volume_group: str, file_storage: FileStorage) -> None:
    """gc is in the middle of it when B starts."""
    configure(ERASE)
    a, b = file_storage.template(SIZE, seed=1), own_image(file_storage)
    name = set_aside(a)
    with slow_blkdiscard() as waits:
        gc = subprocess.Popen([str(host.PROGRAM), "gc"], stdout=subprocess.DEVNULL)
        wait_for(lambda: any("blkdiscard" in " ".join(words) for _, words in processes()), "the erase")
        vm_id = start(b)
        assert equals_source(b)
        assert not holds_secret(device(b))
        assert gc.poll() is None
        assert set(host.logical_volumes()) == {name, b.leaf.id}
        waits.unlink()
        assert gc.wait(120) == 0
    configure()
    stop(vm_id, b)


def test_a_starts_again_while_b_claims_its_ids(volume_group: str, file_storage: FileStorage) -> None:
    """B's helper holds the lock of A's volume before A has a disk: A waits, and then gets its own."""
    configure()
    a = file_storage.template(SIZE, seed=1)
    vm_id, thief = starting(new_id()), new_id()
    ids = {"vm": thief, "property": "lvm", "image": a.id, "volume": a.leaf.id}
    claim = {"verb": "claim", **ids, "seen": 0}
    with Talk() as talk:
        assert "error" not in talk.ask(claim)
        call = start_point("after_disk_prepare", vm_id, disk_json(Disk("vda", a)), THICK)
        with pytest.raises(subprocess.TimeoutExpired):
            call.process.wait(3)  # type: ignore[union-attr]
    assert call.wait().rc == 0
    assert equals_source(a)
    assert {f"VM_{vm_id}", f"IU_{a.id}"} < tags(a)
    with Talk() as talk:
        assert is_refusal(talk.ask(claim))
    libvirt.undefine(vm_id)
    stop(vm_id, a)


# -- A's disk


@dataclass(frozen=True)
class Tenant:
    """VM A and its local disk; `name` is that of its logical volume now."""

    vm: Vm
    image: Image
    name: str

    @property
    def path(self) -> str:
        return f"/dev/{host.VOLUME_GROUP}/{self.name}"


def look(name: str) -> tuple[str, str]:
    """Everything of a volume that must not change: LVM's report and the content."""
    full = f"{host.VOLUME_GROUP}/{name}"
    columns = "lv_name,lv_uuid,lv_size,lv_tags,lv_active,seg_pe_ranges"
    said = run("lvs", "--noheadings", "--units", "b", "-o", columns, full)
    with activated(full):
        return said, digest(f"/dev/{full}", SIZE)


@contextmanager
def activated(full: str) -> Iterator[None]:
    """An inactive one for a moment."""
    is_active = Path("/dev", full).exists()
    if not is_active:
        run("lvchange", "-ay", "-K", full)
    yield
    if not is_active:
        run("lvchange", "-an", full)


def set_aside(image: Image) -> str:
    """A VM has run from the disk, and vdsm was restarted: the volume is set aside under another name."""
    vm_id = start(image)
    guest_writes(device(image))
    stop(vm_id, image)
    assert run_point("before_vdsm_start").rc == 0
    (name,) = set(host.logical_volumes()) - {host.THIN_POOL}
    assert name != image.leaf.id
    return name


@contextmanager
def running(image: Image) -> Iterator[Tenant]:
    configure(KEEP)
    vm = vdsm.start(Vm(new_id(), (Disk("vda", image, 1),), host.SCRATCH / new_id()), THICK)
    guest_writes(device(image))
    yield Tenant(vm, image, image.leaf.id)
    libvirt.destroy(vm.id)
    libvirt.undefine(vm.id)
    configure()
    stop(vm.id, image)


@contextmanager
def kept(image: Image) -> Iterator[Tenant]:
    configure(KEEP)
    vm_id = start(image)
    guest_writes(device(image))
    stop(vm_id, image)
    yield Tenant(Vm(vm_id, (Disk("vda", image),)), image, image.leaf.id)
    configure()
    stop(vm_id, image)


@contextmanager
def deleting(image: Image) -> Iterator[Tenant]:
    configure()
    vm_id = start(image)
    guest_writes(device(image))
    holder = hold_open(device(image))
    stop(vm_id, image)
    holder.kill()
    holder.wait()
    assert "DELETING" in tags(image)
    yield Tenant(Vm(vm_id, (Disk("vda", image),)), image, image.leaf.id)
    localdisk("gc")


@contextmanager
def aside(image: Image) -> Iterator[Tenant]:
    configure(ERASE)
    name = set_aside(image)
    yield Tenant(Vm(new_id(), (Disk("vda", image),)), image, name)
    localdisk("gc")


STATES = {"running": running, "kept": kept, "deleting": deleting, "aside": aside}


@pytest.fixture(scope="module")
def storage(machine: None) -> Iterator[FileStorage]:
    made = FileStorage()
    yield made
    made.remove()


@pytest.fixture(scope="module", params=STATES)
def given(request: pytest.FixtureRequest, storage: FileStorage) -> Iterator[Given]:
    request.getfixturevalue("libvirt")  # not an argument: it would hide the module
    host.remove(*host.logical_volumes())
    image = storage.template(SIZE, seed=1, boot=boot_sector("tenant A"))
    with STATES[request.param](image) as tenant:
        assert set(host.logical_volumes()) == {tenant.name}
        made = Given(request.param, storage, tenant, own_image(storage), look(tenant.name))
        starting(made.vm_id)
        yield made
        libvirt.undefine(made.vm_id)
    assert host.logical_volumes() == {}


# -- attempts


@dataclass(frozen=True)
class Given:
    """A's disk in one of its states, and B, about to start, with a leaf on a template's base."""

    state: str
    storage: FileStorage
    a: Tenant
    b: Image
    before: tuple[str, str]  # how A's disk looks
    vm_id: str = field(default_factory=new_id)  # B's

    def json(self, **changes: object) -> str:
        """vdsm's data about B's disk, partly forged."""
        return disk_json(Disk("vda", self.b), **changes)

    def xml(self, *disks: Disk, vm_id: str = "") -> str:
        return domain_xml(Vm(vm_id or self.vm_id, disks or (Disk("vda", self.b),)))

    def leaf(self, backing: str, image_format: str = "raw", **changes: object) -> str:
        """A leaf of B's that names this as its parent."""
        b = own_image(self.storage)
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", image_format, "-b", backing, str(b.leaf.path))
        return disk_json(Disk("vda", b), **changes)

    def instead_of_leaf(self, make: Callable[[Path], object]) -> str:
        """Something else in the place of B's leaf, with raw as its format."""
        b = own_image(self.storage)
        b.leaf.path.unlink()
        make(b.leaf.path)
        return disk_json(Disk("vda", b), format="raw")

    def disk(self, **leaf: object) -> Disk:
        """B's disk as the domain has it, its leaf forged."""
        volumes = (*self.b.volumes[:-1], replace(self.b.leaf, **leaf))  # type: ignore[arg-type]
        return Disk("vda", replace(self.b, volumes=volumes))


@dataclass(frozen=True)
class Attempt:
    data: str
    point: str = "after_disk_prepare"
    custom: Mapping[str, str] = field(default_factory=lambda: THICK)


def a_ids(given: Given) -> dict[str, object]:
    """A's ids where vdsm names B's."""
    return {"imageID": given.a.image.id, "serial": given.a.image.id, "volumeID": given.a.image.leaf.id}


def a_chain(given: Given, volume: Volume) -> list[dict[str, object]]:
    """B's chain with another volume in the place of its base."""
    disk = Disk("vda", given.b)
    return [chain_entry(disk, volume), chain_entry(disk, given.b.leaf)]


def a_base(given: Given) -> Volume:
    """B's base, with A's volume as its path in vdsm's data."""
    return replace(given.b.volumes[0], path=given.a.image.leaf.path)


def named_as_a_is_now(given: Given) -> str:
    """B has a volume of the very name that A's logical volume has."""
    path = given.b.leaf.path.with_name(given.a.name)
    os.link(given.b.leaf.path, path)
    leaf = replace(given.b.leaf, id=given.a.name, path=path)
    image = replace(given.b, volumes=(*given.b.volumes[:-1], leaf))
    return disk_json(Disk("vda", image))


def local_disk(given: Given) -> dict[str, object]:
    return {"path": given.a.path, "diskType": "block", "format": "raw"}


def image_linked(given: Given) -> str:
    """B's image is a link to A's, which has a volume of that name: A's, hard-linked."""
    b = own_image(given.storage)
    directory = given.a.image.leaf.path.parent
    os.link(given.a.image.leaf.path, directory / b.leaf.id)
    b.leaf.path.parent.rename(b.leaf.path.parent.with_name(new_id()))
    b.leaf.path.parent.symlink_to(directory)
    return disk_json(Disk("vda", b), format="raw")


def xml_of_a(given: Given, **leaf: object) -> Disk:
    """A's disk as B's domain would have it."""
    volumes = (replace(given.a.image.leaf, **leaf),)  # type: ignore[arg-type]
    return Disk("vda", replace(given.a.image, volumes=volumes))


JSONS: dict[str, Callable[[Given], str]] = {
    "A's volume": lambda g: g.json(volumeID=g.a.image.leaf.id),
    "A's volume in capitals": lambda g: g.json(volumeID=g.a.image.leaf.id.upper()),
    "A's image": lambda g: g.json(imageID=g.a.image.id, serial=g.a.image.id),
    "A's image and volume": lambda g: g.json(**a_ids(g)),
    "A's path": lambda g: g.json(path=str(g.a.image.leaf.path), format="raw"),
    "A's path and volume": lambda g: g.json(
        path=str(g.a.image.leaf.path), format="raw", volumeID=g.a.image.leaf.id
    ),
    "A's local disk as its path": lambda g: g.json(**local_disk(g)),
    "A's local disk by device-mapper": lambda g: g.json(
        **{**local_disk(g), "path": f"/dev/mapper/ovirt--local-{g.a.name.replace('-', '--')}"}
    ),
    "A's local disk and its volume": lambda g: g.json(**local_disk(g), volumeID=g.a.name),
    "A's path for its base": lambda g: g.json(volumeChain=a_chain(g, a_base(g))),
    "A's local disk for its base": lambda g: g.json(
        volumeChain=a_chain(g, replace(g.b.volumes[0], path=Path(g.a.path)))
    ),
    "A's volume as backing": lambda g: g.leaf(g.a.image.leaf.id),
    "A's volume as backing, in its chain": lambda g: g.leaf(
        g.a.image.leaf.id,
        volumeChain=[{"volumeID": g.a.image.leaf.id, "path": g.a.path}],
    ),
    "A's path as backing": lambda g: g.leaf(str(g.a.image.leaf.path)),
    "A's local disk as backing": lambda g: g.leaf(g.a.path),
    "A's local disk as backing, json:": lambda g: g.leaf(
        f'json:{{"driver":"host_device","filename":"{g.a.path}"}}'
    ),
    "a link to A's volume": lambda g: g.instead_of_leaf(lambda path: path.symlink_to(g.a.image.leaf.path)),
    "a link to A's local disk": lambda g: g.instead_of_leaf(lambda path: path.symlink_to(g.a.path)),
    "its image a link to A's": image_linked,
    "the name of A's local disk": named_as_a_is_now,
}
ATTEMPTS: dict[str, Callable[[Given], Attempt]] = {
    **{name: lambda g, make=make: Attempt(make(g)) for name, make in JSONS.items()},  # type: ignore[misc]
    "A's image and volume, thin": lambda g: Attempt(g.json(**a_ids(g)), custom=THIN),
    "A's ids in its XML": lambda g: Attempt(g.xml(xml_of_a(g, path=g.b.leaf.path)), "before_vm_start"),
    "A's local disk in its XML": lambda g: Attempt(
        g.xml(g.disk(path=Path(g.a.path), format=RAW)), "before_vm_start"
    ),
    "A's ids and local disk in its XML": lambda g: Attempt(
        g.xml(xml_of_a(g, path=Path(g.a.path))), "before_vm_start"
    ),
    "A's domain": lambda g: Attempt(g.xml(xml_of_a(g), vm_id=g.a.vm.id), "before_vm_start"),
    "A's disk plugged in": lambda g: Attempt(disk_xml(xml_of_a(g)), "before_disk_hotplug"),
    "a migration": lambda g: Attempt(g.xml(xml_of_a(g)), "before_vm_migrate_destination"),
    **{
        f"property {value[:20]!r}": lambda g, value=value: Attempt(g.json(), custom={"localdisk": value})  # type: ignore[misc]
        for value in ("lvm lvmthin", "lvm\nvm=x", "x" * 5000)
    },
    "A's volume as the property": lambda g: Attempt(g.json(), custom={"localdisk": g.a.image.leaf.id}),
}


# What asks for A's disk by its name; the others are refused before A's state matters.
BY_NAME = (
    "A's volume",
    "A's image and volume",
    "A's local disk and its volume",
    "A's ids and local disk in its XML",
    "the name of A's local disk",
)


@pytest.mark.parametrize("name", BY_NAME)
def test_attempt_in_every_state(given: Given, name: str) -> None:
    refused(given, ATTEMPTS[name](given))


@pytest.mark.parametrize("given", ["running"], indirect=True)
@pytest.mark.parametrize("name", [name for name in ATTEMPTS if name not in BY_NAME])
def test_attempt(given: Given, name: str) -> None:
    refused(given, ATTEMPTS[name](given))


def refused(given: Given, attempt: Attempt) -> None:
    """B's start is refused with one line, and A's disk has not changed."""
    result = run_point(attempt.point, given.vm_id, attempt.data, attempt.custom)
    assert len(one_line(result)) < 900
    assert result.data == attempt.data
    assert set(host.logical_volumes()) == {given.a.name}
    assert look(given.a.name) == given.before


def test_b_stops_with_a_in_its_domain(given: Given) -> None:
    data = given.xml(xml_of_a(given, path=Path(given.a.path)))
    result = run_point("after_vm_destroy", given.vm_id, data, THICK)
    assert result.rc == 0, result.stderr
    assert look(given.a.name) == given.before


def test_b_has_its_own(given: Given) -> None:
    """Beside A's disk, also where a claim of A's went before."""
    with Talk() as talk:
        ids = {"vm": given.vm_id, "property": "lvm"}
        row = {"image": given.a.image.id, "volume": given.a.image.leaf.id}
        looked = talk.ask({"verb": "look", **ids, "disks": [row]})
        assert is_refusal(looked) or looked["disks"][0]["state"] == "absent"
        claim = {"verb": "claim", **ids, **row, "seen": just_now()}
        assert is_refusal(talk.ask(claim)) is (given.state != "aside")
    start(given.b)
    assert equals_source(given.b)
    assert not holds_secret(device(given.b))
    assert look(given.a.name) == given.before
    host.remove(given.b.leaf.id)
