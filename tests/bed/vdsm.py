"""Plays vdsm starting and stopping a whole VM: every hook point in its order, then libvirt.

    started = start(vm, {"localdisk": "lvm"})      prepared disks, domain XML, a running domain
    stop(vm, custom)                               the plug pulled, after_vm_destroy called

The order is vdsm's: a placeholder domain is defined, each disk is prepared, the domain XML is made from
what the hooks answered, before_vm_start has its say, libvirt starts the domain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tests.bed import libvirt
from tests.bed.player import Result, run_point
from tests.bed.storage import RAW
from tests.bed.vm import Disk, Vm, disk_json, domain_xml

Custom = Mapping[str, str]


class Refused(Exception):
    """vdsm refuses the operation; the message is what the engine shows."""


def start(vm: Vm, custom: Custom) -> Vm:
    """Start the VM; returns it with the disks that it runs from.  Raises Refused, the VM not there."""
    libvirt.define_placeholder(vm.id)
    try:
        prepared = replace(vm, disks=tuple(prepare(vm.id, disk, custom) for disk in vm.disks))
        libvirt.create(before_start(prepared, custom))
    except Refused:
        libvirt.undefine(vm.id)
        run_point("after_vm_destroy", vm.id, domain_xml(vm), custom)
        raise
    return prepared


def prepare(vm_id: str, disk: Disk, custom: Custom) -> Disk:
    """What vdsm makes of `disk` when after_disk_prepare has answered.  Raises Refused."""
    return follow(disk, accepted(run_point("after_disk_prepare", vm_id, disk_json(disk), custom)).data)


def before_start(prepared: Vm, custom: Custom) -> str:
    """The domain XML that before_vm_start lets libvirt start.  Raises Refused."""
    return accepted(run_point("before_vm_start", prepared.id, domain_xml(prepared), custom)).data


def follow(disk: Disk, answer: str) -> Disk:
    """`disk` with the path, the format and the type of the JSON that a hook gave back."""
    drive = json.loads(answer)
    leaf = replace(disk.image.leaf, path=Path(drive["path"]), format=drive["format"])
    volumes = (*disk.image.volumes[:-1], leaf)
    return replace(disk, image=replace(disk.image, kind=drive["diskType"], volumes=volumes))


def local(disk: Disk, path: str) -> Disk:
    """`disk` as it is once it is the raw block device `path`."""
    return follow(disk, json.dumps({"path": path, "format": RAW, "diskType": "block"}))


def stop(vm: Vm, custom: Custom) -> Result:
    """Pull the plug; then what vdsm does: the domain is undefined, after_vm_destroy is called."""
    libvirt.destroy(vm.id)
    libvirt.undefine(vm.id)
    return run_point("after_vm_destroy", vm.id, domain_xml(vm), custom)


def accepted(result: Result) -> Result:
    """`result`; raises Refused where vdsm would."""
    if result.refused:
        raise Refused(result.reason)
    return result
