"""One function for each hook point of a VM.

A function returns the text that vdsm reads back, or None if nothing changes; it raises an error to refuse
the operation.  `vdsm/hook_call.py` describes what vdsm expects of hooks; `helper/session.py` does the work
of root. `cli.py` serves before_vdsm_start, which is for no VM and runs as root.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from localdisk import cancel, kept, libvirt, log, ready
from localdisk.errors import (
    BadDomain,
    Error,
    HotplugRefused,
    LibvirtSilent,
    NotLocal,
    OperationRefused,
    UnplugRefused,
)
from localdisk.frozen import replace
from localdisk.hook.client import Helper
from localdisk.libvirt import DomainState
from localdisk.protocol import Looked
from localdisk.vdsm import domain_xml, hook_call
from localdisk.vdsm.disks import Disk, is_local_path
from localdisk.vdsm.hook_call import BEGINNINGS, Call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from localdisk.config import Policy


def run(point: str, environ: Mapping[str, str]) -> None:
    """Serve one hook point as vdsm calls it.  Raises Error to refuse."""
    seen_at = 0
    if point == "after_disk_prepare":
        # This comes first: a VM that runs may not be refused, even if its property or the configuration is
        # wrong.
        vm_id, seen_at = hook_call.local_vm(environ), int(time.monotonic() * 1000)
        if vm_id and not _is_start(vm_id):
            return
    call = replace(hook_call.read_call(point, environ), seen_at=seen_at)
    if call.vm_id and call.property_value == "off":
        if point in BEGINNINGS:
            _mark_stale(call)
        return
    answer = HANDLERS[point](call)
    if answer is not None:
        hook_call.write_data(call, answer)


# Why vdsm prepares the disks of a VM that it does not start (vm.py, `_run`; clientIF.py,
# `_preparePathsForRecoveredVMs`).  Before a start, vdsm defines a placeholder for the VM in libvirt.
_NO_START = {
    DomainState.ACTIVE: "the VM runs, vdsm recovers it",
    DomainState.SHUT_OFF: "the VM has run and is shut off, vdsm recovers it",
    DomainState.UNKNOWN: "the VM is not started here, it is migrated to this host or resumed",
}


def _is_start(vm_id: str) -> bool:
    """Whether vdsm prepares the disks of this VM to start it.

    If libvirt does not answer, the VM may run already, so nothing is done for it.  If it is being started,
    before_vm_start refuses the start.
    """
    try:
        state = libvirt.state(vm_id)
    except LibvirtSilent as error:
        log.problem("disk left as it is", vm=vm_id, why=error)
        return False
    if state in _NO_START:
        log.event("disk left as it is", vm=vm_id, why=_NO_START[state])
    return state not in _NO_START


def after_disk_prepare(call: Call) -> str | None:
    """Make a local copy of one disk of a VM that vdsm starts, and return the disk with the local path."""
    from localdisk.vdsm import disk_json

    text = hook_call.read_data(call)
    disk = disk_json.read_disk(text)
    if disk.device in ("cdrom", "floppy"):
        return None
    if disk.was_local:
        log.event(
            "disk left as it is", vm=call.vm_id, disk=disk.volume_id, why="vdsm read it from a VM that ran"
        )
        return None
    with Helper(call.vm_id, call.property_value) as helper:
        path = _make_local(helper, disk, call.seen_at)
    return disk_json.localize_disk(text, path) if path else None


def before_vm_start(call: Call) -> str | None:
    """Just before the domain is created, make sure that every disk that must be local is local."""
    xml = hook_call.read_data(call)
    domain_id, every_disk = domain_xml.read_domain(xml)
    if domain_id != call.vm_id:
        raise BadDomain(problem=f"it is of VM {domain_id}, called for VM {call.vm_id}")
    disks = [disk for disk in every_disk if disk.is_vdsm_image]
    if not disks:
        return None
    is_cancelled = cancel.is_cancelled(call.vm_id)  # then the helper refuses
    ready_disks = [] if is_cancelled else [disk for disk in disks if _is_ready(call.vm_id, disk)]
    rest = [disk for disk in disks if disk not in ready_disks]
    paths = {disk.name: disk.path for disk in ready_disks}
    if rest:
        with Helper(call.vm_id, call.property_value) as helper:
            looks = helper.look(rest)
            if not ready_disks and _is_resumed(call.vm_id, rest, looks):
                return None
            looked_at = list(zip(rest, looks))
            shared = [
                disk.image_id for disk, looked in looked_at if looked.is_kept and _is_shared(disk, looked)
            ]
            if shared:
                helper.mark_stale(shared)
            for disk, looked in looked_at:
                paths[disk.name] = _require_local(helper, call.vm_id, disk, looked)
    # Also disks that after_disk_prepare has made local: vdsm may have left `file=` beside `dev=` in the XML.
    return domain_xml.localize_domain(xml, {name: path for name, path in paths.items() if path})


def _is_ready(vm_id: str, disk: Disk) -> bool:
    """Whether the disk is local already, and the helper has noted that it is ready.

    The configuration and the disk's tags were looked at when it was prepared.  If the configuration has
    changed since, the disk is local nevertheless.
    """
    return (
        disk.is_local
        and os.path.basename(disk.path) == disk.volume_id
        and ready.is_noted(vm_id, disk.image_id, disk.path)
    )


def before_vm_destroy(call: Call) -> None:
    """End the preparation of the disks of a VM that vdsm powers off while it starts.

    While a VM starts, libvirt has only vdsm's placeholder for it, or nothing yet.  So if libvirt has its full
    definition, the VM has started, and nothing is done here.
    """
    with contextlib.suppress(LibvirtSilent):
        if libvirt.state(call.vm_id) in (DomainState.ACTIVE, DomainState.SHUT_OFF):
            return
    with Helper(call.vm_id, call.property_value) as helper:
        helper.cancel()


def after_vm_destroy(call: Call) -> None:
    """Release the local disks of a VM that has stopped, and mark those it did not run from as drifted."""
    drifted = [(image_id, path) for image_id, path in _ran_from(call) if not is_local_path(path)]
    with Helper(call.vm_id, call.property_value) as helper:
        if drifted:
            helper.drifted(drifted)
        helper.release()


def _ran_from(call: Call) -> Iterator[tuple[str, str]]:
    """(image id, path) of the VM's disks when it stopped, from vdsm's XML and libvirt's definition.

    vdsm's XML may be older than a snapshot; so libvirt is asked, too, which still has the definition now.
    """
    try:
        yield from domain_xml.read_ran_from(hook_call.read_data(call), is_live=True)
        for xml in libvirt.xmls([call.vm_id]):
            yield from domain_xml.read_ran_from(xml, is_live=False)
    except (BadDomain, LibvirtSilent) as error:
        log.problem("what the VM ran from is not known", vm=call.vm_id, why=error)


def before_vm_migrate_source(call: Call) -> None:
    _refuse(call, "be migrated")


def before_vm_migrate_destination(call: Call) -> None:
    _refuse(call, "be migrated")
    _mark_stale(call)  # the configuration of this host leaves the VM on shared storage


def before_vm_hibernate(call: Call) -> None:
    _refuse(call, "be suspended")


def before_vm_dehibernate(call: Call) -> None:
    _refuse(call, "be resumed from a saved state")


def before_disk_hotplug(call: Call) -> None:
    """Refuse to plug a disk into a VM with local disks, or leave it on shared storage (`hotplug`).

    If it has a kept local disk, the VM runs without that one from now on.
    """
    disk = domain_xml.read_disk_element(hook_call.read_data(call))
    policy = _policy(call)
    if policy.is_local(disk.image_id) and policy.hotplug == "refuse" and disk.device == "disk":
        raise HotplugRefused(vm=call.vm_id, disk=disk.name or disk.path)
    if disk.device == "disk" and disk.image_id and kept.may_have(call.vm_id):
        _mark_stale(call, disk.image_id)


def before_disk_hotunplug(call: Call) -> None:
    """Refuse to unplug a local disk: plugged in again, it would come from shared storage, with older data."""
    disk = domain_xml.read_disk_element(hook_call.read_data(call))
    if disk.is_local:
        raise UnplugRefused(vm=call.vm_id, disk=disk.name, path=disk.path)


HANDLERS: dict[str, Callable[[Call], str | None]] = {
    "after_disk_prepare": after_disk_prepare,
    "before_vm_start": before_vm_start,
    "before_vm_destroy": before_vm_destroy,
    "after_vm_destroy": after_vm_destroy,
    "before_vm_migrate_source": before_vm_migrate_source,
    "before_vm_migrate_destination": before_vm_migrate_destination,
    "before_vm_hibernate": before_vm_hibernate,
    "before_vm_dehibernate": before_vm_dehibernate,
    "before_disk_hotplug": before_disk_hotplug,
    "before_disk_hotunplug": before_disk_hotunplug,
}


def _mark_stale(call: Call, image: str = kept.EVERY) -> None:
    """A VM begins to use this image here from shared storage: mark its kept disks of it as stale.

    A failure does not refuse the VM, which does not use localdisk for it: the helper has recorded first that
    the disks must be marked, and the VM's next local start, or gc, marks them.
    """
    try:
        with Helper(call.vm_id) as helper:
            helper.mark_stale([image])
    except Error as error:
        log.problem("kept disks are not marked as stale yet", vm=call.vm_id, why=error)


def _refuse(call: Call, operation: str) -> None:
    """Refuse what a VM with local disks cannot do.

    A VM that started before `enabled: false` was set still runs from its local disks.
    """
    if _policy(call).enabled or domain_xml.uses_local_disk(hook_call.read_data(call)):
        raise OperationRefused(vm=call.vm_id, operation=operation)


def _policy(call: Call) -> Policy:
    from localdisk import config

    return config.load().policy(call.vm_id, call.property_value)


def _is_resumed(vm_id: str, disks: Sequence[Disk], looks: Sequence[Looked]) -> bool:
    """Whether the VM is resumed from a saved state: then libvirt does not know it yet.

    vdsm starts the saved domain, whatever this hook point answers; before_vm_dehibernate refuses.
    """
    is_prepared = all(disk.path == looked.path for disk, looked in zip(disks, looks) if looked.is_local)
    if is_prepared or libvirt.state(vm_id) is not DomainState.UNKNOWN:
        return False
    log.event("disks left as they are", vm=vm_id, why="the VM is resumed from a saved state")
    return True


def _require_local(helper: Helper, vm_id: str, disk: Disk, looked: Looked) -> str:
    """The local path of a disk of the domain, "" if the disk stays on shared storage.  Raises NotLocal.

    after_disk_prepare has made the disk local; a vdsm without this hook point gets it made here.
    """
    if _is_shared(disk, looked):
        return ""
    if looked.is_local and disk.path != looked.path:
        return _make_local(helper, disk)
    if not (looked.is_local and looked.is_ready):
        raise NotLocal(vm=vm_id, disk=disk.name, path=disk.path, state=looked.state)
    return disk.path


def _is_shared(disk: Disk, looked: Looked) -> bool:
    """Whether the VM runs from this disk on shared storage, as the configuration wants it."""
    return not (looked.is_local or disk.is_local)


def _make_local(helper: Helper, disk: Disk, seen_at: int = 0) -> str:
    """As `local_copy.make`."""
    from localdisk.hook import local_copy

    return local_copy.make(helper, disk, seen_at)
