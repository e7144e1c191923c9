"""What libvirt does with a running VM's local disk at operations that nobody refuses (examples/engine.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bed import host, libvirt, vdsm
from tests.bed.shell import attempt, run
from tests.bed.storage import COW, FileStorage, Image, digest, new_id
from tests.bed.vm import Disk, Vm, boot_sector
from tests.kernel.steps import MIB, THICK, device, stop, wait_for

pytestmark = pytest.mark.usefixtures("defaults")

SIZE = 8 * MIB


@contextmanager
def running(image: Image) -> Iterator[str]:
    """A VM that runs from the local copy of the image, in which it has written."""
    vm = vdsm.start(Vm(new_id(), (Disk("vda", image, 1),), host.SCRATCH / "serial-operations"), THICK)
    try:
        with open(device(image), "r+b", buffering=0) as disk:
            disk.seek(4 * MIB)
            disk.write(b"local" * 1000)
        run("sync", str(device(image)))
        yield vm.id
    finally:
        libvirt.destroy(vm.id)
        libvirt.undefine(vm.id)
        stop(vm.id, image)


@pytest.fixture
def image(volume_group: str, file_storage: FileStorage) -> Image:
    return file_storage.template(SIZE, COW, seed=1, boot=boot_sector("hello"))


def virsh(*words: str, text: str = "") -> tuple[int, str]:
    done = attempt("virsh", "-c", libvirt.URI, *words, text=text)
    return done.returncode, done.stderr


def test_a_full_backup_is_of_the_local_disk(image: Image) -> None:
    target = host.SCRATCH / "backup"
    target.unlink(missing_ok=True)
    with running(image) as vm_id:
        shared = image.leaf.path.read_bytes()
        disk = f"<disk name='vda' type='file'><target file='{target}'/><driver type='raw'/></disk>"
        xml = f"<domainbackup mode='push'><disks>{disk}</disks></domainbackup>"
        assert virsh("backup-begin", vm_id, "/dev/stdin", text=xml) == (0, "")
        wait_for(lambda: "None" in run("virsh", "-c", libvirt.URI, "domjobinfo", vm_id), "the backup")
        assert digest(target, SIZE) == digest(device(image), SIZE)
        assert b"locallocal" in target.read_bytes()
        assert image.leaf.path.read_bytes() == shared
    target.unlink()


def test_there_are_no_checkpoints_of_a_local_disk(image: Image) -> None:
    """So an incremental backup is refused by libvirt."""
    with running(image) as vm_id:
        code, said = virsh("checkpoint-create-as", vm_id, "c1", "--diskspec", "vda,checkpoint=bitmap")
        assert code
        assert "raw" in said


def test_a_local_disk_does_not_grow(image: Image) -> None:
    with running(image) as vm_id:
        before = digest(device(image), SIZE), Path(device(image)).resolve()
        code, said = virsh("blockresize", vm_id, "vda", "16M")
        assert code, said
        virsh("blockresize", vm_id, "vda", "1M")  # as vdsm asks, of a qcow2 file that is smaller
        shown = run("virsh", "-c", libvirt.URI, "domblkinfo", vm_id, "vda").split()
        assert shown[:2] == ["Capacity:", str(SIZE)]
        assert (digest(device(image), SIZE), Path(device(image)).resolve()) == before
        assert run("blockdev", "--getsize64", str(device(image))).strip() == str(SIZE)
