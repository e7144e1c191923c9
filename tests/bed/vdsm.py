"""Plays vdsm with a whole VM: every hook point in its order, and libvirt.

    started = start(vm, {"localdisk": "lvm"})      prepared disks, domain XML, a running domain
    stop(vm, custom)                               the plug pulled, after_vm_destroy called
    recover(vm, custom)                            vdsm was restarted: the VM runs, is paused or is shut off
    migrate_here(vm, custom)                       the destination of a migration, as far as the hooks let it
    resume(vm, custom)                             a suspended VM, or the preview of a snapshot with memory

The order of a start is vdsm's: a placeholder domain is defined, each disk is prepared, the domain XML is made
from what the hooks answered, before_vm_start has its say, libvirt defines and starts the domain.  The domain
is persistent: when the VM has ended, it is shut off until the engine has vdsm destroy the VM.  There is no
placeholder for a migration and a resume.
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
        libvirt.start_domain(before_start(prepared, custom))
    except Refused:
        run_point("after_vm_destroy", vm.id, domain_xml(vm), custom)
        libvirt.undefine(vm.id)
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
    """Pull the plug; then what vdsm does: after_vm_destroy is called, the domain is undefined."""
    libvirt.destroy(vm.id)
    return release(vm, custom)


def release(vm: Vm, custom: Custom) -> Result:
    """The engine has vdsm destroy a VM that has ended, also a VM that vdsm has recovered."""
    result = run_point("after_vm_destroy", vm.id, domain_xml(vm), custom)
    if vm.id in libvirt.known():
        libvirt.undefine(vm.id)
    return result


# -- what is no start


def recovered_disk(disk: Disk) -> str:
    """What after_disk_prepare gets when vdsm recovers a VM that was started with this disk made local.

    vdsm reads its domain, asks the storage for the path again, and throws away what the hook answers.
    """
    return disk_json(disk, format=RAW, diskType="block", shared="exclusive")


def recover(vm: Vm, custom: Custom) -> list[Result]:
    """vdsm, restarted, recovers a VM that libvirt knows; `vm`: the VM as it was before its start."""
    return [run_point("after_disk_prepare", vm.id, recovered_disk(disk), custom) for disk in vm.disks]


def migrate_here(vm: Vm, custom: Custom) -> None:
    """Prepare for a VM that runs on another host, from shared storage.  Raises Refused."""
    try:
        for disk in vm.disks:
            prepare(vm.id, disk, custom)
        accepted(run_point("before_vm_migrate_destination", vm.id, domain_xml(vm), custom))
    except Refused:
        release(vm, custom)
        raise


def resume(vm: Vm, custom: Custom, is_preview: bool = False) -> None:
    """Prepare for a VM whose saved domain is `vm`'s.  Raises Refused.

    What before_vm_start answers is thrown away (vdsm, vm.py, `_run`): the saved domain starts.
    """
    if vm.id in libvirt.known():
        libvirt.undefine(vm.id)
    try:
        prepared = replace(vm, disks=tuple(prepare(vm.id, disk, custom) for disk in vm.disks))
        before_start(prepared, custom)
        environment = {**custom, "FROM_SNAPSHOT": str(is_preview)}
        accepted(run_point("before_vm_dehibernate", vm.id, domain_xml(vm), environment))
    except Refused:
        release(vm, custom)
        raise


def accepted(result: Result) -> Result:
    """`result`; raises Refused where vdsm would."""
    if result.refused:
        raise Refused(result.reason)
    return result
