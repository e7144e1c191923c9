"""Real libvirt starts the domain that before_vm_start answers, whatever was there for the qcow2 image."""

from __future__ import annotations

import pytest

from tests.bed import host, libvirt, vdsm
from tests.bed.player import run_point
from tests.bed.shell import CommandFailed
from tests.bed.storage import COW, FileStorage, Image, new_id
from tests.bed.vm import Disk, Vm, boot_sector, domain_xml
from tests.kernel.steps import MIB, THICK, device, starting, stop

pytestmark = pytest.mark.usefixtures("defaults")

METADATA_CACHE = "<metadata_cache>\n<max_size unit='bytes'>1048576</max_size>\n</metadata_cache>"


@pytest.fixture
def image(volume_group: str, file_storage: FileStorage) -> Image:
    return file_storage.template(8 * MIB, COW, seed=1, boot=boot_sector("hello"))


def for_qcow2_alone(xml: str) -> str:
    """The domain with what the engine and administrators write only for qcow2 (one disk)."""
    driver = '<driver cache="none" discard="unmap" discard_no_unref="on" '
    before, after = xml.replace('<driver cache="none" ', driver).split("            <alias")
    assert driver in before
    return f"{before.rstrip()[:-2]}>{METADATA_CACHE}</driver>\n            <alias{after}"


@pytest.mark.parametrize("is_prepared", [True, False], ids=["after_disk_prepare", "before_vm_start"])
def test_a_disk_with_what_only_qcow2_allows(image: Image, is_prepared: bool) -> None:
    """Discard is enabled for the disk in a cluster of level 4.8, or its qcow2 cache is limited."""
    serial = host.SCRATCH / "serial-domain"
    serial.unlink(missing_ok=True)
    shared = Vm(starting(new_id()), (Disk("vda", image, 1),), serial)
    local = (vdsm.local(shared.disks[0], str(device(image))),)
    if is_prepared:
        vdsm.prepare(shared.id, shared.disks[0], THICK)
    xml = for_qcow2_alone(domain_xml(Vm(shared.id, local if is_prepared else shared.disks, serial)))
    answer = run_point("before_vm_start", shared.id, xml, THICK)
    assert answer.rc == 0, answer.stderr
    libvirt.create(answer.data)
    try:
        assert libvirt.serial_line(serial) == "hello"
    finally:
        libvirt.destroy(shared.id)
        libvirt.undefine(shared.id)
        stop(shared.id, image)


def test_libvirt_refuses_it_for_a_raw_disk(image: Image) -> None:
    """Otherwise the test above would not see that it is removed."""
    disk = vdsm.local(Disk("vda", image), str(image.leaf.path))
    with pytest.raises(CommandFailed, match=r"only.* with qcow2"):
        libvirt.create(for_qcow2_alone(domain_xml(Vm(new_id(), (disk,)))))
