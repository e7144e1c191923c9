"""Builds shared storage as vdsm does, and computes the guest's view of its images.

    storage = FileStorage()                                  or BlockStorage(): volumes are LVs
    template = storage.template(64 << 20, "raw", seed=1)     one base volume with data
    image = storage.clone(template, layers=2, seed=2)        qcow2 on qcow2 on the template's volume
    guest_bytes(image.leaf)                                  the digest of what its guest reads

A storage domain is a directory (file) or a volume group (block) named by a UUID.  A VM's image is a
directory named by its id with all volumes of its chain, the template's base volume included; qcow2
backing names are file names in that directory.  Everything belongs to vdsm:kvm (block: vdsm:qemu).
Data is written through qemu-io in seeded patterns, so that any two seeds differ.  qemu-img here runs
on images that the test made itself; nothing of localdisk is used.
"""

from __future__ import annotations

import grp
import hashlib
import os
import pwd
import random
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.bed.host import DATA_CENTER, RUN_STORAGE, SCRATCH, STORAGE
from tests.bed.shell import run

RAW, COW = "raw", "cow"  # vdsm's words for formats
QEMU = {RAW: "raw", COW: "qcow2"}
MIB = 1 << 20
EXTENT = 64 << 10  # patterns are written in pieces of this size


@dataclass(frozen=True)
class Volume:
    """One volume of an image: `path` as vdsm names it, `size` in bytes as the guest sees it."""

    id: str
    path: Path
    format: str
    size: int
    lease_path: Path
    lease_offset: int


@dataclass(frozen=True)
class Image:
    """A disk: its volumes from the base to the leaf, in one directory; `kind` is file or block."""

    id: str
    domain_id: str
    pool_id: str
    kind: str
    volumes: tuple[Volume, ...]

    @property
    def leaf(self) -> Volume:
        return self.volumes[-1]


class Storage:
    """A storage domain.  What differs between files and LVs is below, in FileStorage and BlockStorage."""

    kind: str

    def __init__(self, domain_id: str, mount: Path) -> None:
        self.domain_id = domain_id
        self.pool_id = new_id()
        self.directory = mount / domain_id
        self.images = self.directory / "images"
        make_directory(self.images)
        link(DATA_CENTER / self.pool_id / domain_id, self.directory)

    def template(self, size: int, volume_format: str = RAW, seed: int = 0, boot: bytes = b"") -> Image:
        """An image of one volume with data; `boot` is written to its beginning."""
        image_id = new_id()
        volume = self.new_volume(image_id, volume_format, size)
        write_data(volume, seed, boot)
        return self.image(image_id, self.publish(volume))

    def publish(self, volume: Volume) -> Volume:
        """Make a volume a template's, as vdsm marks it; images made from it share it."""
        return volume

    def clone(self, template: Image, layers: int = 1, seed: int = 0, size: int | None = None) -> Image:
        """An image of `layers` qcow2 volumes with data on the template's leaf; larger if `size` is given."""
        image_id = new_id()
        volumes = [self.share(template.leaf, image_id)]
        for layer in range(layers):
            volumes.append(self.new_volume(image_id, COW, size or template.leaf.size, volumes[-1]))
            write_data(volumes[-1], seed * 1000 + layer + 1)
        return self.image(image_id, *volumes)

    def image(self, image_id: str, *volumes: Volume) -> Image:
        """The image of these volumes, where vdsm links it before a VM starts."""
        return Image(image_id, self.domain_id, self.pool_id, self.kind, volumes)

    def new_volume(
        self, image_id: str, volume_format: str, size: int, backing: Volume | None = None
    ) -> Volume:
        """A new volume without data in the image's directory, on `backing` (a volume there) if given."""
        volume_id = new_id()
        volume = self.allocate(image_id, volume_id, volume_format, size)
        if volume_format == COW:
            on = ["-b", backing.id, "-F", QEMU[backing.format]] if backing else []
            run(
                "qemu-img",
                "create",
                "-q",
                "-f",
                "qcow2",
                *on,
                str(volume.path),
                str(size),
                cwd=parent(volume),
            )
        return volume

    def allocate(self, image_id: str, volume_id: str, volume_format: str, size: int) -> Volume:
        """The place of a new volume; nothing is in it yet."""
        raise NotImplementedError

    def share(self, base: Volume, image_id: str) -> Volume:
        """The template's volume `base` as it appears in the directory of an image made from it."""
        raise NotImplementedError

    def remove(self) -> None:
        """Removes the storage domain with everything in it."""
        (DATA_CENTER / self.pool_id / self.domain_id).unlink()
        (DATA_CENTER / self.pool_id).rmdir()
        shutil.rmtree(RUN_STORAGE / self.domain_id, ignore_errors=True)
        shutil.rmtree(self.directory)


class FileStorage(Storage):
    """A storage domain of files, on the file system that is mounted as shared storage."""

    kind = "file"

    def __init__(self) -> None:
        super().__init__(new_id(), STORAGE)

    def image(self, image_id: str, *volumes: Volume) -> Image:
        link(RUN_STORAGE / self.domain_id / image_id, self.images / image_id)
        return super().image(image_id, *volumes)

    def allocate(self, image_id: str, volume_id: str, volume_format: str, size: int) -> Volume:
        make_directory(self.images / image_id)
        volume = self.volume(image_id, volume_id, volume_format, size)
        make_file(volume.path, size if volume_format == RAW else 0)
        make_file(volume.lease_path, 1 << 20)
        make_file(meta_of(volume)).write_text(
            f'CAP={size}\nCTIME=1700000000\nDESCRIPTION={{"DiskAlias":"vm_Disk1"}}\nDISKTYPE=DATA\n'
            f"DOMAIN={self.domain_id}\nFORMAT={volume_format.upper()}\nGEN=0\nIMAGE={image_id}\n"
            "LEGALITY=LEGAL\nPUUID=00000000-0000-0000-0000-000000000000\nTYPE=SPARSE\nVOLTYPE=LEAF\nEOF\n"
        )
        return volume

    def publish(self, volume: Volume) -> Volume:
        meta = meta_of(volume)
        meta.write_text(meta.read_text().replace("VOLTYPE=LEAF", "VOLTYPE=SHARED"))
        return volume

    def share(self, base: Volume, image_id: str) -> Volume:
        make_directory(self.images / image_id)
        shared = self.volume(image_id, base.id, base.format, base.size)
        for suffix in ("", ".meta", ".lease"):
            os.link(f"{base.path}{suffix}", f"{shared.path}{suffix}")
        return shared

    def volume(self, image_id: str, volume_id: str, volume_format: str, size: int) -> Volume:
        path = self.images / image_id / volume_id
        return Volume(volume_id, path, volume_format, size, path.with_name(f"{volume_id}.lease"), 0)


class BlockStorage(Storage):
    """A storage domain of LVs: a volume group named by the domain's id, on a loop device of `size` bytes.

    Volumes are linked from /run/vdsm/storage/DOMAIN/IMAGE/, and the image's directory under the
    domain's mount directory is a link to that one.
    """

    kind = "block"

    def __init__(self, size: int = 1 << 30) -> None:
        super().__init__(new_id(), DATA_CENTER / "mnt/blockSD")
        self.backing = SCRATCH / f"{self.domain_id}.pv"
        with open(self.backing, "xb") as file:
            file.truncate(size)
        self.loop = run("losetup", "--find", "--show", str(self.backing)).strip()
        run("vgcreate", "-y", self.domain_id, self.loop)

    def allocate(self, image_id: str, volume_id: str, volume_format: str, size: int) -> Volume:
        # qcow2 needs room for its own tables
        extra = (size >> 8) + (4 << 20) if volume_format == COW else 0
        name = ["--addtag", f"IU_{image_id}", "-n", volume_id, self.domain_id]
        run("lvcreate", "-y", "-Wy", "-L", f"{size + extra}b", *name)
        device = Path("/dev") / self.domain_id / volume_id
        # what an LV holds is a raw volume's content, all of it
        actual = size if volume_format == COW else int(run("blockdev", "--getsize64", str(device)))
        return self.volume(image_id, volume_id, volume_format, actual)

    def share(self, base: Volume, image_id: str) -> Volume:
        return self.volume(image_id, base.id, base.format, base.size)

    def volume(self, image_id: str, volume_id: str, volume_format: str, size: int) -> Volume:
        directory = RUN_STORAGE / self.domain_id / image_id
        device = Path("/dev") / self.domain_id / volume_id
        make_directory(directory)
        link(directory / volume_id, device)
        if not (self.images / image_id).is_symlink():
            link(self.images / image_id, directory)
        path = self.images / image_id / volume_id
        lease_offset = (100 + len(list(directory.iterdir()))) << 20
        return Volume(volume_id, path, volume_format, size, device.with_name("leases"), lease_offset)

    def remove(self) -> None:
        run("vgremove", "-f", "-y", self.domain_id)
        run("losetup", "--detach", self.loop)
        self.backing.unlink()
        super().remove()


# -- data


def write_data(volume: Volume, seed: int, boot: bytes = b"") -> None:
    """Writes the seed's pattern as a guest would: some pieces anywhere and the last one; `boot` at the start.

    The first piece is left alone, so that a template's boot sector is also that of its clones.
    """
    rng = random.Random(seed)
    pieces = volume.size // EXTENT
    chosen = {pieces - 1, *(rng.randrange(1, pieces) for _ in range(24))}
    qemu_io(
        volume, (f"write -P {rng.randrange(1, 256)} {piece * EXTENT} {EXTENT}" for piece in sorted(chosen))
    )
    if boot:
        with tempfile.NamedTemporaryFile() as file:
            file.write(boot)
            file.flush()
            qemu_io(volume, [f"write -s {file.name} 0 {len(boot)}"])


def fill(volume: Volume, length: int, seed: int = 0) -> None:
    """Writes the first `length` bytes of the volume, 1 MiB at a time, no two neighbours alike."""
    first = random.Random(seed).randrange(255)
    mebibytes = range(length >> 20)
    qemu_io(volume, (f"write -P {(first + piece) % 255 + 1} {piece << 20} 1M" for piece in mebibytes))


def qemu_io(volume: Volume, commands: Iterable[str]) -> None:
    """Lets qemu-io write to the volume, all `commands` in one go."""
    options = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", QEMU[volume.format], *options, str(volume.path), cwd=parent(volume))


def guest_bytes(volume: Volume) -> str:
    """The digest of what a guest reads from a disk whose leaf is `volume`, to its virtual size."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as directory:
        raw = f"{directory}/raw"
        run("qemu-img", "convert", "-f", QEMU[volume.format], "-O", "raw", str(volume.path), raw)
        return digest(raw, volume.size)


def digest(path: str | Path, length: int) -> str:
    """The SHA-256 of the first `length` bytes of a file or device, which must be that long."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while length:
            chunk = file.read(min(length, 1 << 20))
            if not chunk:
                raise AssertionError(f"{path} is {length} bytes too short")
            total.update(chunk)
            length -= len(chunk)
    return total.hexdigest()


def is_zero(path: str | Path, start: int) -> bool:
    """True if a file or device holds only zeros from byte `start` to its end."""
    with open(path, "rb") as file:
        file.seek(start)
        return all(chunk == bytes(len(chunk)) for chunk in iter(lambda: file.read(1 << 20), b""))


# -- places


def new_id() -> str:
    return str(uuid.uuid4())


def meta_of(volume: Volume) -> Path:
    """The metadata of a file volume."""
    return volume.path.with_name(f"{volume.id}.meta")


def parent(volume: Volume) -> str:
    return str(volume.path.parent)


def vdsm_kvm() -> tuple[int, int]:
    """The numbers of user vdsm and of group kvm."""
    return pwd.getpwnam("vdsm").pw_uid, grp.getgrnam("kvm").gr_gid


def make_directory(path: Path) -> None:
    """The directory and those above it, vdsm's from the storage domain down."""
    if not path.exists():
        make_directory(path.parent)
        path.mkdir()
        os.chown(path, *vdsm_kvm())


def make_file(path: Path, size: int = 0) -> Path:
    """A sparse file as vdsm makes volumes: vdsm:kvm, 0660."""
    with open(path, "xb") as file:
        file.truncate(size)
    path.chmod(0o660)
    os.chown(path, *vdsm_kvm())
    return path


def link(path: Path, target: Path) -> None:
    """A symbolic link of vdsm's."""
    make_directory(path.parent)
    path.symlink_to(target)
    os.chown(path, *vdsm_kvm(), follow_symlinks=False)
