"""Hostile images on real LVM: only volumes that vdsm named are read, nothing is left, one line is printed.

Each attack forges the leaf of an image; then vdsm prepares it.  The canary is a file that user vdsm can read;
inotify detects whether anything opened it.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.bed import host, libvirt
from tests.bed.player import run_point
from tests.bed.shell import attempt, run
from tests.bed.storage import COW, RAW, FileStorage, Image, new_id, qemu_io
from tests.bed.vm import Disk, disk_json
from tests.kernel.steps import (
    LOCKS,
    MIB,
    THICK,
    configure,
    device,
    equals_source,
    localdisk,
    one_line,
    start,
    starting,
    stop,
)

CANARY = Path("/srv/canary")
SECRET = b"a key that user vdsm can read" * 1000
SIZE = 4 * MIB


@pytest.fixture(autouse=True)
def _cached(volume_group: str, libvirt: None) -> Iterator[None]:
    """With the template cache on: all that is there without it comes first, and more can go wrong."""
    configure("cache: {templates: on}\n")
    yield
    configure()
    localdisk("gc")


@dataclass(frozen=True)
class Given:
    """What an attack works on: an image of a leaf on a template's base, both qcow2."""

    storage: FileStorage
    image: Image

    @property
    def leaf(self) -> Path:
        return self.image.leaf.path

    def patch(self, offset: int, data: bytes) -> None:
        with open(self.leaf, "r+b") as file:
            file.seek(offset)
            file.write(data)

    def backing(self, name: str, image_format: str = "raw") -> None:
        argv = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", image_format, "-b", name, str(self.leaf)]
        run(*argv)

    def instead(self, make: Callable[[Path], object], path: Path | None = None) -> None:
        """Something else in the place of a volume, by default of the leaf."""
        path = path or self.leaf
        path.unlink()
        make(path)

    def link(self, target: str, path: Path | None = None) -> None:
        """A link in its place."""
        self.instead(lambda place: place.symlink_to(target), path)


Attack = Callable[[Given], object]


def u32(number: int) -> bytes:
    return struct.pack(">I", number)


def u64(number: int) -> bytes:
    return struct.pack(">Q", number)


def json_file(name: object) -> str:
    return f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{name}"}}}}'


def data_file(given: Given) -> None:
    options = f"data_file={CANARY},data_file_raw=on"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(given.leaf), str(SIZE))


def truncated(length: int) -> Attack:
    return lambda given: os.truncate(given.leaf, length)


def other_volume(given: Given) -> str:
    return str(given.storage.template(SIZE, COW, 9).leaf.path)


def links(given: Given) -> None:
    (given.leaf.parent / "link").symlink_to(CANARY)
    given.link("link")


def swapped(given: Given) -> None:
    """The directory of the image is a link to another image that has a volume of that name."""
    directory = given.leaf.parent
    other = directory.with_name(new_id())
    directory.rename(other)
    directory.symlink_to(other)


def in_another_domain(given: Given) -> None:
    """The directory of the image is a link to another storage domain, which has an image of the same ids."""
    directory = given.leaf.parent
    other = given.storage.directory / new_id() / "images" / directory.name
    other.parent.mkdir(parents=True)
    directory.rename(other)
    directory.symlink_to(other)


def cycle(given: Given) -> None:
    given.backing(given.image.leaf.id, "qcow2")


def too_long(given: Given) -> None:
    """65 layers, each of which vdsm names."""
    directory, name = given.leaf.parent, given.image.volumes[0].id
    for _ in range(64):
        overlay = new_id()
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", overlay, str(SIZE)]
        run(*argv, cwd=str(directory))
        name = overlay
    given.backing(name, "qcow2")


# Offsets of fields are those of qemu's docs/interop/qcow2.txt.
ATTACKS: dict[str, Attack] = {
    "backing: absolute": lambda given: given.backing(str(CANARY)),
    "backing: leads out": lambda given: given.backing(f"../../../../../../../..{CANARY}"),
    "backing: file:": lambda given: given.backing(f"file:{CANARY}"),
    "backing: json:": lambda given: given.backing(json_file(CANARY)),
    "backing: host device": lambda given: given.backing("/dev/vda"),
    "backing: nbd:": lambda given: given.backing("nbd://localhost/x"),
    "backing: http:": lambda given: given.backing("http://localhost/x"),
    "backing: a local disk": lambda given: given.backing(f"/dev/{host.VOLUME_GROUP}/{new_id()}"),
    "backing: no UUID": lambda given: given.backing("canary"),
    "backing: upper case": lambda given: given.backing(given.image.volumes[0].id.upper(), "qcow2"),
    "backing: UUID that vdsm did not name": lambda given: given.backing(new_id(), "qcow2"),
    "backing: itself": cycle,
    "backing: 65 layers": too_long,
    "backing: unknown format": lambda given: given.backing(given.image.volumes[0].id, "vmdk"),
    "backing: raw said to be qcow2": lambda given: given.image.volumes[0].path.write_bytes(bytes(MIB)),
    "backing: a link to the canary": lambda given: given.link(str(CANARY), given.image.volumes[0].path),
    "backing: name beyond the header": lambda given: given.patch(8, u64(1 << 40)),
    "backing: name too long": lambda given: given.patch(16, u32(1024)),
    "backing: name of length 0": lambda given: given.patch(16, u32(0)),
    "external data file": data_file,
    "encryption 1": lambda given: given.patch(32, u32(1)),
    "encryption 2": lambda given: given.patch(32, u32(2)),
    "internal snapshots": lambda given: run("qemu-img", "snapshot", "-c", "a", str(given.leaf)),
    "dirty": lambda given: given.patch(72, u64(1)),
    "corrupt": lambda given: given.patch(72, u64(2)),
    "unknown feature": lambda given: given.patch(72, u64(1 << 40)),
    "version 1": lambda given: given.patch(4, u32(1)),
    "version 4": lambda given: given.patch(4, u32(4)),
    "other magic": lambda given: given.patch(0, b"QFI\xfa"),
    "size 0": lambda given: given.patch(24, u64(0)),
    "size 513": lambda given: given.patch(24, u64(513)),
    "size 1 PiB": lambda given: given.patch(24, u64(1 << 50)),
    "size 2^63": lambda given: given.patch(24, u64(1 << 63)),
    "clusters of 2^8": lambda given: given.patch(20, u32(8)),
    "clusters of 2^63": lambda given: given.patch(20, u32(63)),
    "header of 2 GiB": lambda given: given.patch(100, u32(1 << 31)),
    "L1 table beyond the file": lambda given: given.patch(40, u64(1 << 50)),
    "L1 table of 2^32 entries": lambda given: given.patch(36, u32((1 << 32) - 1)),
    "refcounts beyond the file": lambda given: given.patch(48, u64(1 << 50)),
    **{f"cut at {length}": truncated(length) for length in (0, 4, 20, 24, 32, 71, 72, 79, 100, 104, 110)},
    "a FIFO": lambda given: given.instead(os.mkfifo),
    "a directory": lambda given: given.instead(Path.mkdir),
    "a link to a device": lambda given: given.link("/dev/zero"),
    "a link to the canary": lambda given: given.link(str(CANARY)),
    "a chain of links to the canary": links,
    "a link to another volume": lambda given: given.link(other_volume(given)),
    "its directory a link to another image": swapped,
    "its directory a link to another storage domain": in_another_domain,
    "unreadable": lambda given: given.leaf.chmod(0),
}
# Tables that lie behind the end of the file read as zeros, to the guest as to us: nothing is allocated there.
AS_QEMU_SEES_THEM = {"L1 table beyond the file", "L1 table of 2^32 entries", "refcounts beyond the file"}


@contextmanager
def unread_canary() -> Iterator[None]:
    """Fails where anything opened the canary meanwhile (inotify(7): IN_ACCESS, IN_OPEN)."""
    CANARY.write_bytes(SECRET)
    CANARY.chmod(0o644)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert fd >= 0
    assert libc.inotify_add_watch(fd, os.fsencode(CANARY), 0x1 | 0x20) >= 0
    try:
        yield
        with pytest.raises(BlockingIOError):
            os.read(fd, 4096)
    finally:
        os.close(fd)
        CANARY.unlink()


def test_the_canary_sings() -> None:
    """As user vdsm, who could read it."""
    with pytest.raises(pytest.fail.Exception), unread_canary():
        run("cat", str(CANARY), user="vdsm")


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(file_storage: FileStorage, name: str) -> None:
    image = file_storage.clone(file_storage.template(SIZE, COW, 3), seed=4)
    given, data, vm_id = Given(file_storage, image), disk_json(Disk("vda", image)), new_id()
    CANARY.write_bytes(SECRET)
    ATTACKS[name](given)
    if name.startswith("backing: 65"):
        names = [path.name for path in given.leaf.parent.iterdir() if "." not in path.name]
        chain = [{"volumeID": each, "path": str(given.leaf.parent / each)} for each in names]
        data = disk_json(Disk("vda", image), volumeChain=chain)
    starting(vm_id)
    with unread_canary():
        result = run_point("after_disk_prepare", vm_id, data, THICK)
    libvirt.undefine(vm_id)
    if result.rc == 0 and name in AS_QEMU_SEES_THEM:
        assert equals_source(image)
        stop(vm_id, image)
    else:
        assert len(one_line(result)) < 900
        assert result.data == data
    # Where the attack is found while the layer is copied, the template below it is in the cache.
    left = {name: " ".join(tags) for name, tags in host.logical_volumes().items()}
    assert not [name for name, tags in left.items() if "TEMPLATE_" not in tags or "UPDATING" in tags]
    assert not list(LOCKS.glob("*.*"))


# -- what is legitimate must be copied right


def raw_with_a_header(given: Given) -> Image:
    """A guest wrote a qcow2 header that names the canary into its raw disk."""
    forged = given.storage.directory / "forged"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(CANARY), "-F", "raw", str(forged), str(SIZE))
    image = given.storage.template(SIZE, RAW, 5)
    with open(image.leaf.path, "r+b") as file:
        file.write(forged.read_bytes())
    return image


def made(given: Given, *options: str) -> Image:
    """A qcow2 image with these options and compressed data."""
    image_id = new_id()
    volume = given.storage.new_volume(image_id, COW, SIZE)
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, str(volume.path), str(SIZE))
    qemu_io(volume, [f"write -P 17 0 {MIB}", f"write -c -P 34 {2 * MIB} {MIB}", f"discard 0 {64 << 10}"])
    return given.storage.image(image_id, volume)


def base_is_raw_by_its_child(given: Given) -> Image:
    """A guest wrote a qcow2 header into a raw disk, of which a snapshot was made then."""
    base = raw_with_a_header(given)
    leaf = given.storage.new_volume(base.id, COW, SIZE, base.leaf)
    return replace(base, volumes=(base.leaf, leaf))


LEGITIMATE: dict[str, Callable[[Given], Image]] = {
    "raw that begins with a header": raw_with_a_header,
    "raw base that begins with a header": base_is_raw_by_its_child,
    "compressed clusters": lambda given: made(given),
    "zstd": lambda given: made(given, "-o", "compression_type=zstd"),
    "extended L2": lambda given: made(given, "-o", "extended_l2=on"),
    "version 2": lambda given: made(given, "-o", "compat=0.10"),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_legitimate(file_storage: FileStorage, name: str) -> None:
    given = Given(file_storage, file_storage.template(SIZE, COW, 6))
    CANARY.write_bytes(SECRET)
    image = LEGITIMATE[name](given)
    with unread_canary():
        vm_id = start(image)
    assert equals_source(image)
    stop(vm_id, image)


def test_an_image_that_a_crash_left_open(file_storage: FileStorage) -> None:
    """qemu counts references lazily and is killed: what the refusal says to do makes the image good."""
    image_id = new_id()
    volume = file_storage.new_volume(image_id, COW, SIZE)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", str(volume.path), str(SIZE)]
    run(*argv)
    attempt(
        "qemu-io", "-f", "qcow2", "-c", "write -P 17 64k 1M", "-c", "flush", "-c", "abort", str(volume.path)
    )
    image, vm_id = file_storage.image(image_id, volume), starting(new_id())
    line = one_line(run_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), THICK))
    libvirt.undefine(vm_id)
    assert f"{volume.path} is refused: it was not closed properly : if no VM on any host uses it, " in line
    assert "as user vdsm with qemu-img check -f qcow2 -r all; it corrects reference counts, no data" in line
    run("qemu-img", "check", "-f", "qcow2", "-r", "all", str(volume.path), user="vdsm")
    vm_id = start(image)
    assert equals_source(image)
    assert device(image).read_bytes()[64 << 10 :][:MIB] == bytes([17]) * MIB
    stop(vm_id, image)
