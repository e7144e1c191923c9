"""The VMs that libvirt knows on this host: their names, and the devices of the running VMs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from localdisk import libvirt, log
from localdisk.errors import BadDomain
from localdisk.frozen import frozen, once
from localdisk.libvirt import Domains
from localdisk.vdsm import domain_xml
from localdisk.vdsm.domain_xml import Running


@frozen
class Vms:
    """The VMs that libvirt knows."""

    names: Mapping[str, str]  # by UUID, of VMs in any state
    running: tuple[Running, ...]
    unread: tuple[str, ...] = ()  # UUIDs of running VMs whose XML is not understood

    @property
    @once
    def domains(self) -> Domains:
        """The same without names and disks."""
        return Domains(frozenset(self.names), frozenset(vm.vm_id for vm in self.running).union(self.unread))

    def disk_name(self, vm_id: str, volume_id: str) -> str:
        """The disk's name in the VM, such as `vda`; "" if the VM does not run from this volume."""
        return next((disk for vm, disk in self._users.get(volume_id, ()) if vm == vm_id), "")

    def user_of(self, volume_id: str) -> str:
        """The VM that runs from the local disk of this name, "" if there is none."""
        return next((vm for vm, _ in self._users.get(volume_id, ())), "")

    def is_below(self, volume_id: str) -> bool:
        """Whether a running VM uses this local disk only below another volume, such as a snapshot's."""
        return volume_id not in self._top and bool(self.user_of(volume_id))

    @property
    @once
    def _top(self) -> frozenset[str]:
        """The LV names of the volumes that running VMs write to."""
        return frozenset(os.path.basename(disk.path) for vm in self.running for disk in vm.disks)

    @property
    @once
    def _users(self) -> Mapping[str, list[tuple[str, str]]]:
        """(VM, name of its disk) by LV name of all block devices of running VMs, also below a snapshot."""
        found: dict[str, list[tuple[str, str]]] = {}
        for vm in self.running:
            paths = [(disk.name, disk.path) for disk in vm.disks if disk.disk_type == "block"]
            for name, path in [*paths, *vm.backing]:
                found.setdefault(os.path.basename(path), []).append((vm.vm_id, name))
        return found


def ran_elsewhere(vm_ids: Iterable[str]) -> frozenset[tuple[str, str]]:
    """VM and image id of the disks, of VMs that libvirt knows and that do not run, that are on no local disk.

    Raises LibvirtSilent, BadDomain.
    """
    return domain_xml.elsewhere(libvirt.xmls(vm_ids))


def answer(asked: libvirt.Question) -> Vms:
    """The VMs, from the answer to `libvirt.ask_names` and the XML of running VMs.  Raises LibvirtSilent."""
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
