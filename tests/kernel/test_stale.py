"""Old bytes: in a group and a pool full of a pattern, a local disk has only its guest's view and zeros."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bed import host, libvirt
from tests.bed.player import run_point
from tests.bed.shell import run
from tests.bed.storage import COW, RAW, FileStorage, Image, new_id, qemu_io
from tests.bed.vm import Disk, Vm, domain_xml
from tests.kernel.steps import (
    MIB,
    THICK,
    THIN,
    configure,
    device,
    equals_source,
    localdisk,
    starting,
    stop,
)

KIB = 1 << 10
OLD = 0xAA
# None is a whole number of extents of 4 MiB; few are of clusters of 64 KiB or of blocks of 4 KiB.
SIZES = (
    *(512, 1536, 4096, 4608, 12 * KIB + 512, 65024, 64 * KIB, 66048, 100 * KIB, 1 * MIB - 512),
    *(1 * MIB + 512, 3 * MIB + 40 * KIB, 4 * MIB - 512, 4 * MIB + 512, 4 * MIB + 4 * KIB),
    *(5 * MIB + 65 * KIB, 6 * MIB + 1536, 8 * MIB - 4 * KIB, 8 * MIB + 512, 9 * MIB + 63 * KIB + 512),
)


@pytest.fixture(autouse=True)
def _defaults(libvirt: None) -> Iterator[None]:
    configure()
    yield
    configure()


def image_of(storage: FileStorage, size: int, rng: random.Random) -> Image:
    """Raw or qcow2, alone or with a layer on it, some pieces of it written."""
    image_id, volume_format = new_id(), rng.choice((RAW, COW))
    volumes = [storage.new_volume(image_id, volume_format, size)]
    write_pieces(volumes[0], size, rng)
    storage.publish(volumes[0])
    if rng.random() < 0.5:
        volumes.append(storage.new_volume(image_id, COW, size, volumes[0]))
        write_pieces(volumes[1], size, rng)
    return storage.image(image_id, *volumes)


def write_pieces(volume: object, size: int, rng: random.Random) -> None:
    pieces = []
    for _ in range(rng.randrange(4)):
        start = rng.randrange(size // 512)
        count = rng.randrange(1, min(400, size // 512 - start) + 1)
        pieces.append(f"write -P {rng.randrange(1, 255)} {start * 512} {count * 512}")
    if pieces:
        qemu_io(volume, pieces)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_cached", [False, True], ids=["copied", "cached"])
@pytest.mark.parametrize("custom", [THICK, THIN], ids=["thick", "thin"])
def test_nothing_old_shows_through(
    thin_pool: str, file_storage: FileStorage, custom: dict[str, str], is_cached: bool
) -> None:
    """Twenty disks of one VM, odd sizes, made by one hook run, where everything was full of a pattern.

    The base of each is a template's; with the cache on, each goes through a template LV of its size.
    """
    old_everywhere(custom == THIN)
    configure("cache: {templates: on}\n" if is_cached else "")
    rng = random.Random(7)
    images = [image_of(file_storage, size, rng) for size in SIZES]
    names = [f"vd{letter}" for letter in string.ascii_lowercase]
    vm = Vm(starting(new_id()), tuple(map(Disk, names, images)))
    result = run_point("before_vm_start", vm.id, domain_xml(vm), custom)
    assert result.rc == 0, result.stderr
    for image, size in zip(images, SIZES):
        assert equals_source(image), size
    libvirt.undefine(vm.id)
    stop(vm.id, *images, custom=custom)
    assert len(host.logical_volumes()) == 1 + is_cached * len(SIZES)
    configure()
    localdisk("gc")
    assert set(host.logical_volumes()) == {host.THIN_POOL}


def old_everywhere(is_thin: bool) -> None:
    """What a VM that was here before has left, where LVM puts the next volumes."""
    group = host.VOLUME_GROUP
    thin = ["-V", "256m", "--thinpool", f"{group}/{host.THIN_POOL}"]
    run("lvcreate", "-y", "-Wn", *(thin if is_thin else ["-L", "256m", group]), "-n", "old")
    node = Path(f"/dev/{group}/old")
    with open(node, "r+b", buffering=0) as device:
        for _ in range(256):
            device.write(bytes([OLD]) * MIB)
    host.remove("old")


@pytest.mark.parametrize("erase", ["none", "discard", "zero"])
def test_what_the_next_volume_can_read(thin_pool: str, file_storage: FileStorage, erase: str) -> None:
    """Of a disk of 5 MiB and a half, its tail included, as the documentation of `erase` says."""
    configure(f"retention: {{erase: {erase}}}\n")
    size = 5 * MIB + 512 * KIB
    image = file_storage.image(image_id := new_id(), file_storage.new_volume(image_id, RAW, size))
    qemu_io(image.leaf, [f"write -P 171 0 {size}"])
    vm_id = starting(new_id())
    vm = Vm(vm_id, (Disk("vda", image),))
    assert run_point("before_vm_start", vm_id, domain_xml(vm), THICK).rc == 0
    with open(device(image), "r+b") as disk:  # the guest sees all of the volume, and may write there
        disk.seek(size)
        disk.write(b"\xab" * (8 * MIB - size))
    libvirt.undefine(vm_id)
    stop(vm_id, image)
    localdisk("gc")
    run("lvcreate", "-y", "-Wn", "-Zn", "-L", "8m", "-n", "next", host.VOLUME_GROUP)
    left = Path(f"/dev/{host.VOLUME_GROUP}/next").read_bytes().count(171)
    host.remove("next")
    assert left == (8 * MIB if erase == "none" else 0)
