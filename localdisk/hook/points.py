"""One function per hook point: what vdsm asks, and what it gets back.

A function returns the data that vdsm reads back, or None if nothing changes; it raises to refuse.
`vdsm/hook_call.py` is the contract, `helper/session.py` the privileged half.  The one point that runs as
root, before_vdsm_start, is no VM's: `cli.py` serves it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from localdisk import kept, libvirt, log, uncached
from localdisk.errors import (
    BadDomain,
    DiskRefused,
    Error,
    HotplugRefused,
    LibvirtSilent,
    NotLocal,
    OperationRefused,
    SourceRefused,
    UnplugRefused,
)
from localdisk.hook import copy, sources, template_source
from localdisk.hook.client import Helper
from localdisk.hook.copy import OnProgress
from localdisk.hook.sources import Source
from localdisk.libvirt import DomainState
from localdisk.protocol import Base, How, Looked, Prepared
from localdisk.vdsm import disk_json, domain_xml, hook_call
from localdisk.vdsm.disks import Disk, is_local_path
from localdisk.vdsm.hook_call import BEGINNINGS, Call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from localdisk.config import Policy


def run(point: str, environ: Mapping[str, str]) -> None:
    """Serve one hook point as vdsm calls it.  Raises Error to refuse."""
    if point == "after_disk_prepare":
        # Before all else: for a VM that runs, neither its property nor the configuration may refuse anything.
        vm_id = hook_call.local_vm(environ)
        if vm_id and not _is_start(vm_id):
            return
    call = hook_call.read_call(point, environ)
    if call.vm_id and call.property_value == "off":
        if point in BEGINNINGS:
            _begins_without(call)
        return
    answer = POINTS[point](call)
    if answer is not None:
        hook_call.write_data(call, answer)


# Why vdsm prepares the disks of a VM that it does not start (vm.py, `_run`; clientIF.py,
# `_preparePathsForRecoveredVMs`).  For a start it has defined a placeholder before.
_NO_START = {
    DomainState.ACTIVE: "the VM runs, vdsm recovers it",
    DomainState.SHUT_OFF: "the VM has run and is shut off, vdsm recovers it",
    DomainState.UNKNOWN: "the VM is not started here, it is migrated to this host or resumed",
}


def _is_start(vm_id: str) -> bool:
    """Whether vdsm prepares the disks of this VM to start it.

    If libvirt does not answer, the VM may be one that runs: nothing is done for it, either.  The start of
    another VM is refused at before_vm_start then.
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
    """Make one disk of a VM that vdsm starts local, and point vdsm to it."""
    text = hook_call.read_data(call)
    disk = disk_json.read_disk(text)
    if disk.device in ("cdrom", "floppy"):
        return None
    if disk.was_local:
        log.event(
            "disk left as it is", vm=call.vm_id, disk=disk.volume_id, why="it is read from a VM that ran"
        )
        return None
    with Helper(call.vm_id, call.property_value) as helper:
        path = _make_local(helper, disk)
    return disk_json.localize_disk(text, path) if path else None


def before_vm_start(call: Call) -> str | None:
    """Make sure that every disk that must be local is, just before the domain is created."""
    xml = hook_call.read_data(call)
    domain_id, every_disk = domain_xml.read_domain(xml)
    if domain_id != call.vm_id:
        raise BadDomain(problem=f"it is of VM {domain_id}, called for VM {call.vm_id}")
    disks = [disk for disk in every_disk if disk.is_vdsm_image]
    if not disks:
        return None
    with Helper(call.vm_id, call.property_value) as helper:
        looks = helper.look(disks)
        if _is_resumed(call.vm_id, disks, looks):
            return None
        shared = [
            disk.image_id for disk, looked in zip(disks, looks) if looked.is_kept and not looked.is_local
        ]
        if shared:
            helper.mark_stale(shared)
        paths = {disk.name: _be_local(helper, call.vm_id, disk, looked) for disk, looked in zip(disks, looks)}
    # Also what after_disk_prepare has made local: vdsm can leave `file=` beside `dev=` there.
    return domain_xml.localize_domain(xml, {name: path for name, path in paths.items() if path})


def before_vm_destroy(call: Call) -> None:
    """End the preparation of the disks of a VM that vdsm powers off while it starts.

    libvirt knows a VM that starts by vdsm's placeholder, or does not know it yet; a VM that has started has
    disks there until vdsm has powered it off.
    """
    with contextlib.suppress(LibvirtSilent):
        if libvirt.state(call.vm_id) in (DomainState.ACTIVE, DomainState.SHUT_OFF):
            return
    with Helper(call.vm_id, call.property_value) as helper:
        helper.cancel()


def after_vm_destroy(call: Call) -> None:
    """Release the local disks of a VM that has stopped; those that it ran beside in the end are kept."""
    drifted = [(image_id, path) for image_id, path in _ran_from(call) if not is_local_path(path)]
    with Helper(call.vm_id, call.property_value) as helper:
        if drifted:
            helper.drifted(drifted)
        helper.release()


def _ran_from(call: Call) -> Iterator[tuple[str, str]]:
    """What the VM's disks ran from when it stopped, as vdsm and libvirt say: image id, path.

    vdsm's own XML may be of before a snapshot; libvirt's definition is undefined after this hook point.
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


def before_vm_hibernate(call: Call) -> None:
    _refuse(call, "be suspended")


def before_vm_dehibernate(call: Call) -> None:
    _refuse(call, "be resumed from a saved state")


def before_disk_hotplug(call: Call) -> None:
    """Refuse a disk that is plugged into a running local VM, or let it stay on shared storage."""
    disk = domain_xml.read_disk_element(hook_call.read_data(call))
    policy = _policy(call)
    if policy.is_local(disk.image_id) and policy.hotplug == "refuse" and disk.device == "disk":
        raise HotplugRefused(vm=call.vm_id, disk=disk.name or disk.path)


def before_disk_hotunplug(call: Call) -> None:
    """Refuse to unplug a local disk: plugged in again, it would be the shared one, with older data."""
    disk = domain_xml.read_disk_element(hook_call.read_data(call))
    if disk.is_local:
        raise UnplugRefused(vm=call.vm_id, disk=disk.name, path=disk.path)


POINTS: dict[str, Callable[[Call], str | None]] = {
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


def _begins_without(call: Call) -> None:
    """A VM without the property begins to run here: kept disks that it has here are stale from now on.

    It has no part in localdisk, and is not refused, whatever goes wrong: the helper has written down that its
    disks must be marked, and the next local start of it, or gc, does so.
    """
    try:
        with Helper(call.vm_id) as helper:
            helper.mark_stale([kept.EVERY])
    except Error as error:
        log.problem("kept disks are not marked as stale yet", vm=call.vm_id, why=error)


def _refuse(call: Call, operation: str) -> None:
    if _policy(call).enabled:
        raise OperationRefused(vm=call.vm_id, operation=operation)


def _policy(call: Call) -> Policy:
    from localdisk import config

    return config.load().policy(call.vm_id, call.property_value)


def _is_resumed(vm_id: str, disks: Sequence[Disk], looks: Sequence[Looked]) -> bool:
    """Whether the VM is resumed from a saved state: libvirt does not know it yet.

    vdsm starts the saved domain then, whatever the answer here is; before_vm_dehibernate refuses.
    """
    is_prepared = all(disk.path == looked.path for disk, looked in zip(disks, looks) if looked.is_local)
    if is_prepared or libvirt.state(vm_id) is not DomainState.UNKNOWN:
        return False
    log.event("disks left as they are", vm=vm_id, why="the VM is resumed from a saved state")
    return True


def _be_local(helper: Helper, vm_id: str, disk: Disk, looked: Looked) -> str:
    """The local path of a disk of the domain, "" where it stays on shared storage.

    after_disk_prepare has made it local; with a vdsm that has no such hook point, it is done here.
    """
    if not looked.is_local:
        return ""
    if disk.path != looked.path:
        return _make_local(helper, disk)
    if not looked.is_ready:
        raise NotLocal(vm=vm_id, disk=disk.name, path=disk.path, state=looked.state)
    return disk.path


def _make_local(helper: Helper, disk: Disk) -> str:
    """The path of the local copy of `disk`, which is ready; "" where it stays on shared storage."""
    if not disk.is_vdsm_image:
        fix = "detach it from this VM, or run the VM without the custom property localdisk"
        raise DiskRefused(disk=disk.name or disk.path, problem="no image of a storage domain", fix=fix)
    claimed = helper.claim(disk)
    if claimed.stays or claimed.path:
        return claimed.path
    _require_copyable(disk)
    with sources.opened(disk) as source:
        base, why = _base(source) if claimed.is_cached else (None, "")
        prepared = _prepare(helper, source, claimed.is_thin, base)
        if prepared.target:
            if why:
                helper.uncached(why)
            _copy(helper, source, prepared)
    return prepared.path


def _base(source: Source) -> tuple[Base | None, str]:
    """What storage says that this disk and others may start from, or why nothing is (`uncached.REASONS`)."""
    layer = source.base
    domain_id = template_source.domain_of(layer) if layer.is_block else ""
    why = _why_no_base(source, domain_id)
    if why:
        return None, why
    return Base(os.path.basename(layer.path), domain_id, layer.fingerprint, layer.virtual_size), ""


def _why_no_base(source: Source, domain_id: str) -> str:
    if not source.grows:
        return uncached.SMALLER_LAYER
    if not source.base.is_block:
        return template_source.why_no_template(source.base)
    if not domain_id:
        return uncached.OTHER_LAYOUT
    return "" if source.above else uncached.NO_TEMPLATE  # a block volume without layers is the image's own


def _prepare(helper: Helper, source: Source, is_thin: bool, base: Base | None) -> Prepared:
    """Have the disk made, from its template's local copy where `base` is one and the helper has it."""
    disk = source.virtual_size, source.fingerprint
    if base:
        writes = source.writes_above() if is_thin else source.virtual_size
        prepared = helper.prepare(*disk, writes, base)
        if prepared.how is How.MISSING and fill(helper, source.base_alone, is_thin):
            prepared = helper.prepare(*disk, writes, base)
            if prepared.how is How.MISSING:
                helper.uncached(uncached.SPOILED)
        if prepared.how not in (How.MISSING, How.UNCACHED):
            return prepared
    return helper.prepare(*disk, source.writes(is_thin))


def fill(helper: Helper, base: Source, is_thin: bool, show: OnProgress | None = None) -> bool:
    """Copy a template's volume into the cache; False where the helper does not take it."""
    target = helper.fill(base.writes(is_thin))
    if target is None:
        return False
    tell = _tell(helper, base)

    def on_progress(fraction: float, written: int) -> None:
        tell(fraction, written)
        if show:
            show(fraction, written)

    copy.copy(base, target, on_progress)
    if not base.base.is_unchanged():
        raise SourceRefused(base.base.path, "it changed while it was copied", "try again")
    helper.commit()
    return True


def _require_copyable(disk: Disk) -> None:
    problem = ""
    if disk.shared in ("shared", "true"):
        problem = "shared between VMs; a local copy would split them"
    elif disk.shared == "transient":
        problem = "transient; its changes are thrown away by vdsm itself"
    elif disk.disk_type not in ("file", "block"):
        problem = f"on {disk.disk_type} storage, which cannot be read as a file or block device"
    if problem:
        fix = "exclude its image in `vms: … disks:` of /etc/localdisk.yaml, or detach it from this VM"
        raise DiskRefused(disk=disk.name or disk.image_id or disk.path, problem=problem, fix=fix)


def _copy(helper: Helper, source: Source, prepared: Prepared) -> None:
    target, tell = prepared.target, _tell(helper, source)
    assert target  # noqa: S101 (nothing is copied otherwise)
    if prepared.how is How.LAYERS:
        copy.apply(source, target, tell)
    elif prepared.base_device:
        copy.copy_on(source, prepared.base_device, target, tell)
    else:
        copy.copy(source, target, tell)
    helper.commit()


def _tell(helper: Helper, source: Source) -> OnProgress:
    return lambda fraction, written: helper.progress(int(fraction * source.virtual_size), written)
