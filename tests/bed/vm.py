"""A VM as vdsm hands it to the hooks: the JSON of each disk and the domain XML, and its boot sector.

    vm = Vm(new_id(), (Disk("vda", image),), serial_file)
    disk_json(vm.disks[0])         what after_disk_prepare gets
    domain_xml(vm)                 what before_vm_start gets; libvirt can start it, too

The XML has vdsm's shape (attributes, metadata, user aliases, serials), as small as a VM that boots in
seconds under emulation allows: type qemu, 32 MiB, one serial port that writes to a file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from tests.bed.storage import COW, Image, Volume

VM_NAMESPACE = "http://ovirt.org/vm/1.0"
IDENTITY = ("poolID", "domainID", "imageID", "volumeID")


@dataclass(frozen=True)
class Disk:
    """A disk of a VM: the name it has there (vda, sda, ...) and its image."""

    name: str
    image: Image
    boot_order: int | None = None

    @property
    def bus(self) -> str:
        return {"v": "virtio", "s": "scsi"}[self.name[0]]

    @property
    def ids(self) -> dict[str, str]:
        """Which disk this is, in vdsm's words."""
        image = self.image
        return dict(zip(IDENTITY, (image.pool_id, image.domain_id, image.id, image.leaf.id)))


@dataclass(frozen=True)
class Vm:
    """A VM: its UUID, its disks, and the file (if any) that gets what it writes to its serial port."""

    id: str
    disks: tuple[Disk, ...]
    serial_file: Path | None = None


# -- the disk of after_disk_prepare


def disk_json(disk: Disk, **changes: object) -> str:
    """The flat JSON object that vdsm gives to after_disk_prepare; `changes` replace or add keys."""
    image = disk.image
    return json.dumps(
        {
            "device": "disk",
            "type": "disk",
            "diskType": image.kind,
            "format": image.leaf.format,
            "path": str(image.leaf.path),
            **disk.ids,
            "shared": "false",
            "readonly": False,
            "iface": disk.bus,
            "name": disk.name,
            "index": "0",
            "serial": image.id,
            "cache": "none",
            "propagateErrors": "off",
            "specParams": {},
            "volumeChain": [chain_entry(disk, volume) for volume in image.volumes],
            "volumeInfo": {"type": image.kind, "path": str(image.leaf.path)},
            **changes,
        }
    )


def chain_entry(disk: Disk, volume: Volume) -> dict[str, object]:
    return {
        "domainID": disk.image.domain_id,
        "imageID": disk.image.id,
        "volumeID": volume.id,
        "path": str(volume.path),
        "leasePath": str(volume.lease_path),
        "leaseOffset": volume.lease_offset,
    }


# -- the domain


def domain_xml(vm: Vm) -> str:
    """The domain XML that vdsm gives to before_vm_start."""
    return f"""\
<?xml version='1.0' encoding='utf-8'?>
<domain xmlns:ovirt-vm="{VM_NAMESPACE}" type="qemu">
    <name>vm-{vm.id[:8]}</name>
    <uuid>{vm.id}</uuid>
    <memory>32768</memory>
    <currentMemory>32768</currentMemory>
    <vcpu current="1">1</vcpu>
    <os>
        <type arch="x86_64" machine="pc">hvm</type>
    </os>
    <features>
        <acpi />
    </features>
    <clock adjustment="0" offset="variable">
        <timer name="rtc" tickpolicy="catchup" />
    </clock>
    <on_poweroff>destroy</on_poweroff>
    <on_reboot>destroy</on_reboot>
    <on_crash>destroy</on_crash>
    <devices>
        <controller index="0" model="virtio-scsi" type="scsi" />
{"".join(disk_xml(disk) for disk in vm.disks)}{serial_xml(vm.serial_file)}        <memballoon model="none" />
    </devices>
    <metadata>
        <ovirt-vm:vm>
            <ovirt-vm:minGuaranteedMemoryMb type="int">32</ovirt-vm:minGuaranteedMemoryMb>
            <ovirt-vm:clusterVersion>4.7</ovirt-vm:clusterVersion>
            <ovirt-vm:custom />
            <ovirt-vm:launchPaused>false</ovirt-vm:launchPaused>
{"".join(device_xml(disk) for disk in vm.disks)}        </ovirt-vm:vm>
    </metadata>
</domain>
"""


def disk_xml(disk: Disk) -> str:
    """One <disk> as vdsm writes it; also what before_disk_hotplug and before_disk_hotunplug get."""
    image = disk.image
    attribute = {"file": "file", "block": "dev"}[image.kind]
    driver = "qcow2" if image.leaf.format == COW else "raw"
    io = {"file": "threads", "block": "native"}[image.kind]
    order = f'            <boot order="{disk.boot_order}" />\n' if disk.boot_order else ""
    return f"""\
        <disk device="disk" snapshot="no" type="{image.kind}">
            <target bus="{disk.bus}" dev="{disk.name}" />
            <source {attribute}={quoteattr(str(image.leaf.path))}>
                <seclabel model="dac" relabel="no" type="none" />
            </source>
            <driver cache="none" error_policy="stop" io="{io}" name="qemu" type="{driver}" />
            <alias name="ua-{image.id}" />
{order}            <serial>{image.id}</serial>
        </disk>
"""


def serial_xml(file: Path | None) -> str:
    """The serial port; what the VM writes to it can be read from `file`."""
    if file is None:
        return ""
    return f"""\
        <serial type="file">
            <source path={quoteattr(str(file))} />
            <target port="0" />
        </serial>
"""


def device_xml(disk: Disk) -> str:
    """The metadata that says which disk of vdsm's this is."""
    ids = (f"<ovirt-vm:{key}>{escape(value)}</ovirt-vm:{key}>" for key, value in disk.ids.items())
    lines = "".join(f"                {line}\n" for line in ids)
    return f"""\
            <ovirt-vm:device devtype="disk" name="{disk.name}">
{lines}            </ovirt-vm:device>
"""


# -- the guest


def boot_sector(line: str) -> bytes:
    """A disk's first sector: a PC that boots from it writes `line` to its first serial port, then halts.

    The BIOS loads the sector to 0000:7C00 and jumps there in 16-bit mode.
    """
    code = bytes.fromhex(
        "fc"  #         cld
        "31c0"  #       xor  ax, ax
        "8ed8"  #       mov  ds, ax
        "be1e7c"  #     mov  si, 0x7c00 + text
        "bafd03"  # l:  mov  dx, 0x3fd          line status register of the port at 0x3f8
        "ec"  #         in   al, dx
        "a820"  #       test al, 0x20           may a byte be written?
        "74fb"  #       jz   in
        "ac"  #         lodsb
        "84c0"  #       test al, al
        "7406"  #       jz   stop
        "baf803"  #     mov  dx, 0x3f8
        "ee"  #         out  dx, al
        "ebed"  #       jmp  l
        "f4"  # stop:   hlt
        "ebfd"  #       jmp  stop
    )
    assert code[6:8] == (0x7C00 + len(code)).to_bytes(2, "little"), hex(len(code))
    text = line.encode("ascii") + b"\r\n\0"
    return (code + text).ljust(510, b"\0") + b"\x55\xaa"
