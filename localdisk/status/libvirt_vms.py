"""The VMs of this host as libvirt has them: their names, and what those that run run from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from localdisk import libvirt, log
from localdisk.errors import BadDomain
from localdisk.frozen import frozen
from localdisk.libvirt import Domains
from localdisk.vdsm import domain_xml
from localdisk.vdsm.domain_xml import Running


@frozen
class Vms:
    """`names` by UUID of all VMs that libvirt knows in any state; `running` those that run."""

    names: Mapping[str, str]
    running: tuple[Running, ...]
    unread: tuple[str, ...] = ()  # VMs that run and whose XML is not understood

    @property
    def domains(self) -> Domains:
        """The same without names and disks."""
        return Domains(frozenset(self.names), frozenset(vm.vm_id for vm in self.running).union(self.unread))

    def disk_name(self, vm_id: str, volume_id: str) -> str:
        """What a volume is called in its VM that runs, such as `vda`; "" where it does not run from it."""
        found = (disk for vm, disk, volume in self._local() if (vm, volume) == (vm_id, volume_id))
        return next(found, "")

    def user_of(self, volume_id: str) -> str:
        """The VM that runs from the local disk of that name, "" if none."""
        return next((vm for vm, _, volume in self._local() if volume == volume_id), "")

    def is_below(self, volume_id: str) -> bool:
        """Whether a VM that runs has this local disk open only below another volume, such as a snapshot's."""
        top = (os.path.basename(disk.path) for vm in self.running for disk in vm.disks)
        return volume_id not in top and bool(self.user_of(volume_id))

    def _local(self) -> Iterator[tuple[str, str, str]]:
        """VM, name of its disk, volume: what VMs have open, also below a snapshot that was made since."""
        for vm in self.running:
            paths = [(disk.name, disk.path) for disk in vm.disks if disk.disk_type == "block"]
            for name, path in [*paths, *vm.backing]:
                yield vm.vm_id, name, os.path.basename(path)


def answer(asked: libvirt.Question) -> Vms:
    """From the answer to `domains.ask_names`, and the XML of the VMs that run.  Raises LibvirtSilent."""
    names, active = libvirt.read_names(asked.text())
    running, unread = [], set(active)
    for xml in libvirt.xmls(active):
        try:
            vm = domain_xml.read_running(xml)
        except BadDomain as error:
            vm_id = next((vm_id for vm_id in active if f"<uuid>{vm_id}</uuid>" in xml), "")
            log.problem("a VM's XML is not understood", vm=vm_id, why=error)
            continue
        running.append(vm)
        unread.discard(vm.vm_id)
    return Vms(names, tuple(running), tuple(sorted(unread)))
