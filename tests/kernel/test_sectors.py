"""A volume group on a device with sectors of 4096 bytes: disks are copied, cached, erased and booted from.

Guests and images have sectors of 512 bytes, so a disk may end in the middle of a sector of the device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.bed import host, libvirt, vdsm
from tests.bed.shell import run
from tests.bed.storage import FileStorage, Image, new_id
from tests.bed.vm import Disk, Vm, boot_sector
from tests.kernel.steps import MIB, THICK, THIN, configure, device, equals_source, localdisk, start, stop

ODD = 20 * MIB + 3 * 512
ASIDE, BACKING = "bed-aside", "bed-sectors.img"

pytestmark = pytest.mark.usefixtures("libvirt", "sectors")


@pytest.fixture
def sectors() -> Iterator[None]:
    """The volume group is another one, on a device with sectors of 4096 bytes, with a thin pool."""
    host.remove(*host.logical_volumes())
    run("vgrename", host.VOLUME_GROUP, ASIDE)
    backing = host.SCRATCH / BACKING
    with open(backing, "wb") as file:
        file.truncate(512 * MIB)
    loop = run("losetup", "--sector-size", "4096", "--find", "--show", str(backing)).strip()
    try:
        run("vgcreate", "-y", host.VOLUME_GROUP, loop)
        host.thin_pool("128m")
        run("lvchange", "--errorwhenfull", "y", f"{host.VOLUME_GROUP}/{host.THIN_POOL}")
        yield
    finally:
        run("vgremove", "-ff", "-y", host.VOLUME_GROUP)
        run("losetup", "--detach", loop)
        backing.unlink()
        run("vgrename", ASIDE, host.VOLUME_GROUP)
        configure()


@pytest.mark.parametrize("custom", [THICK, THIN])
def test_a_device_with_large_sectors(file_storage: FileStorage, custom: dict[str, str]) -> None:
    """From layers and a single volume, by way of a template LV, erased with zeros, and `check` is content."""
    configure("retention: {erase: zero}\ncache: {templates: on}\n")
    localdisk("check")
    template = file_storage.template(ODD - 4096, seed=1)
    images = [file_storage.clone(template, layers=2, seed=seed, size=ODD) for seed in (2, 3)]
    images.append(file_storage.template(ODD, seed=4))
    for image in images:
        vm_id = start(image, custom)
        assert run("blockdev", "--getss", str(device(image))).strip() == "4096"
        assert equals_source(image)
        stop(vm_id, image, custom=custom)
    localdisk("gc")
    left = [tags for name, tags in host.logical_volumes().items() if name != host.THIN_POOL]
    assert len(left) == 2, "the template LVs"
    assert all(any(tag.startswith("TEMPLATE_") for tag in tags) for tags in left)


@pytest.mark.parametrize("custom", [THICK, THIN])
def test_discard(file_storage: FileStorage, custom: dict[str, str]) -> None:
    """No byte of a disk is left on the device, and nothing beside the disk is discarded."""
    configure("retention: {erase: discard}\n")
    localdisk("check")
    neighbour, image = file_storage.template(ODD, seed=6), file_storage.template(ODD, seed=7)
    neighbours_vm, vm_id = start(neighbour, custom), start(image, custom)
    parts = written(image)
    assert on_device(parts) == parts
    stop(vm_id, image, custom=custom)
    localdisk("gc")
    assert image.leaf.id not in host.logical_volumes()
    assert not on_device(parts)
    assert equals_source(neighbour)
    stop(neighbours_vm, neighbour, custom=custom)
    localdisk("gc")
    assert set(host.logical_volumes()) == {host.THIN_POOL}


def written(image: Image) -> set[bytes]:
    """What a guest writes to each MiB of its local disk, and behind the last whole one: a sector each."""
    sectors = {offset: os.urandom(4096) for offset in range(0, ODD, MIB)}
    with open(device(image), "r+b") as file:
        for offset, sector in sectors.items():
            file.seek(offset)
            file.write(sector)
        os.fsync(file.fileno())
    return set(sectors.values())


def on_device(parts: set[bytes]) -> set[bytes]:
    """Those of these sectors that are somewhere on the device of the volume group."""
    run("sync")
    with open(host.SCRATCH / BACKING, "rb") as file:
        return parts.intersection(sectors_of(file.fileno()))


def sectors_of(fd: int) -> Iterator[bytes]:
    """The sectors of a sparse file, but for its holes."""
    end = 0
    with suppress(OSError):  # there is no data behind the last
        while True:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            for offset in range(start, end, 4096):
                yield os.pread(fd, 4096, offset)


def test_a_vm_boots_from_large_sectors(file_storage: FileStorage) -> None:
    image = file_storage.template(ODD, seed=5, boot=boot_sector("hello"))
    serial = host.SCRATCH / "serial-sectors"
    serial.unlink(missing_ok=True)
    vm = vdsm.start(Vm(new_id(), (Disk("vda", image, 1),), serial), THICK)
    try:
        assert libvirt.serial_line(serial) == "hello"
    finally:
        libvirt.destroy(vm.id)
        libvirt.undefine(vm.id)
        stop(vm.id, image)
