"""The problems that `status` shows: pure functions of the snapshot's parts, except that they look up which
process has a disk open.

A `Problem` has a kind, one of the words below, by which the metrics count it; what is wrong; and what to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from localdisk import holders
from localdisk.backend import BACKENDS
from localdisk.config import Config, Margins
from localdisk.errors import DependentVolumes, Error, plain
from localdisk.frozen import frozen
from localdisk.ids import is_fingerprint
from localdisk.status.libvirt_vms import Vms
from localdisk.units import format_duration, format_size
from localdisk.vdsm.disks import Disk
from localdisk.vdsm.domain_xml import Running
from localdisk.volumes import filling, progress
from localdisk.volumes.local_disk import LocalDisk, State, is_left_alone
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup
from localdisk.volumes.progress import Progress
from localdisk.volumes.template import Template
from localdisk.volumes.verdict import Action, Verdict, has_run

NEAR = 0.9  # near a limit: more than this share of it

NOT_USABLE = "not_usable"  # a volume group or thin pool
NEAR_LIMIT = "near_limit"
FILLING = "filling"  # a thin pool, under VMs that run from it
NOT_LOCAL = "not_local"
OPEN_ELSEWHERE = "open_elsewhere"
UNKNOWN_VM = "unknown_vm"
NO_COPIER = "no_copier"
STALLED = "stalled"  # a copy
DRIFTED = "drifted"
NOT_AS_MADE = "not_as_made"  # a template LV
CLOCK = "clock"
DEPENDENTS = "dependents"  # LVM would remove other volumes together with a disk
UNREAD = "unread"
KINDS = (
    NOT_USABLE,
    NEAR_LIMIT,
    FILLING,
    NOT_LOCAL,
    OPEN_ELSEWHERE,
    UNKNOWN_VM,
    NO_COPIER,
    STALLED,
    DRIFTED,
    NOT_AS_MADE,
    CLOCK,
    DEPENDENTS,
    UNREAD,
)

_SET_CLOCK = "set the clock of this host (chronyc makestep)"

Disks = Iterable[tuple[VolumeGroup, LocalDisk]]
Templates = Iterable[tuple[VolumeGroup, Template]]
Held = Mapping[str, "Progress | None"]


@frozen
class Problem:
    kind: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what} : {self.fix}"


def not_usable(error: Error) -> Problem:
    """The problem of a volume group or thin pool that cannot be read or used, from its error."""
    what, _, fix = str(error).partition(" : ")
    return Problem(NOT_USABLE, what, fix)


# -- room


def of_groups(groups: Iterable[VolumeGroup], vms: Vms | None, config: Config) -> Iterator[Problem]:
    """Thin pools that fill up while VMs run from them; groups and pools near the limit for new disks."""
    for vg in groups:
        for each in filling.of_group(vg):
            yield Problem(FILLING, each.what(vms.names if vms else {}), "; ".join(each.fixes))
        yield from _reserve(vg, config)
        yield from _metadata_area(vg)
        for pool, margins in filling.pools(vg, config):
            yield from _limits(vg, pool, margins)


def _reserve(vg: VolumeGroup, config: Config) -> Iterator[Problem]:
    reserve = config.margins.reserve.of(vg.vg_size)
    if vg.vg_free < reserve:
        what = f"volume group {vg.vg_name} has {format_size(vg.vg_free)} free, less than its reserve"
        closed = " ".join(vg.unallocatable)
        fix = f"pvchange -x y {closed}" if closed else f"vgextend {vg.vg_name} DEVICE"
        yield Problem(NEAR_LIMIT, f"{what} of {format_size(reserve)}", fix)


def _metadata_area(vg: VolumeGroup) -> Iterator[Problem]:
    fix = filling.metadata_fix(vg)
    if fix:
        left = f"{vg.metadata_percent:.1f} % used, {format_size(vg.vg_mda_free)} left"
        yield Problem(
            NEAR_LIMIT, f"the metadata area of volume group {vg.vg_name} is nearly full: {left}", fix
        )


def _limits(vg: VolumeGroup, pool: LogicalVolume, margins: Margins) -> Iterator[Problem]:
    name = f"{vg.vg_name}/{pool.lv_name}"
    for what, used, limit, fix in (
        ("data", pool.data_percent, margins.thin_data, f"lvextend --size +SIZE {name}"),
        (
            "metadata",
            pool.metadata_percent,
            margins.thin_metadata,
            f"lvextend --poolmetadatasize +SIZE {name}",
        ),
    ):
        if used is not None and used >= NEAR * limit:
            yield Problem(NEAR_LIMIT, f"thin pool {name}: {what} {used:.1f} % of {limit:g} % allowed", fix)


# -- copies


def of_copies(held: Held, now: float) -> Iterator[Problem]:
    """Copies that make no progress.  `now` in seconds since the epoch."""
    for volume_id, record in held.items():
        if record and record.phase == progress.STALLED:
            since = format_duration(max(0, int(now - record.at)))
            fix = "look for storage that hangs (dmesg, multipath -ll)"
            whose = f"template {record.template}"
            if not record.template:
                whose, fix = f"disk {volume_id} of VM {record.vm}", f"{fix}; powering the VM off ends it"
            yield Problem(STALLED, f"the copy of {whose} has made no progress for {since}", fix)


# -- disks


def of_disks(
    judged: Sequence[tuple[VolumeGroup, LocalDisk, Verdict]],
    held: Held,
    vms: Vms | None,
    config: Config,
    now: float,
    is_elsewhere_known: bool,
) -> Iterator[Problem]:
    """Problems of local disks, and running VMs that should run from local disks and do not.

    `judged`: each disk with what gc would decide about it.  `now` in seconds since the epoch.
    `is_elsewhere_known`: whether libvirt has told what stopped VMs ran from.
    """
    for vg, disk, verdict in judged:
        name = f"local disk {vg.vg_name}/{disk.volume_id}"
        if disk.volume_id in held:
            continue
        if disk.is_open:
            yield from _open_by_no_vm(vg, disk, name, vms)
        elif disk.lv.dependents and disk.state in (State.UNFINISHED, State.DELETING):
            yield depended_on(vg, disk)
        elif disk.state is State.UNFINISHED:
            yield Problem(NO_COPIER, f"{name} is an unfinished copy that nobody works on", "localdisk gc")
        elif disk.state is State.DRIFTED:
            yield _drifted(vg, disk, name)
        else:
            yield from _uncertain(vg, disk, verdict, vms, config, now, is_elsewhere_known)
    if vms:
        by_vm: dict[str, list[tuple[VolumeGroup, LocalDisk]]] = {}
        for vg, disk, _ in judged:
            by_vm.setdefault(disk.vm_id, []).append((vg, disk))
        for vm in vms.running:
            yield from _of_vm(vm, by_vm.get(vm.vm_id, []), config)
        for vm_id in vms.unread:
            what = f"the domain XML of VM {vm_id} is not understood, so its disks are not known"
            yield Problem(UNREAD, what, f"virsh --readonly dumpxml {vm_id}")


def _open_by_no_vm(vg: VolumeGroup, disk: LocalDisk, name: str, vms: Vms | None) -> Iterator[Problem]:
    if vms is None or vms.unread or vms.user_of(disk.volume_id):
        return
    yield _open_elsewhere(vg.path(disk.volume_id), f"{name} is open, but by no VM")


def _drifted(vg: VolumeGroup, disk: LocalDisk, name: str) -> Problem:
    """A disk whose VM stopped on another volume.  docs/drifted.md explains the steps; a test runs them."""
    what = f"{name} has data that shared storage lacks: VM {disk.vm_id} stopped on another volume"
    lv = f"{vg.vg_name}/{disk.volume_id}"
    steps = (
        f"do not start the VM; lvchange -ay -K {lv}",
        f"as user vdsm, in the directory of image {disk.image_id}, with NEW for the volume that the VM ran"
        f" from and FORMAT for that of {disk.volume_id} there:"
        f" qemu-img rebase -u -f qcow2 -F raw -b {vg.path(disk.volume_id)} NEW"
        f" && qemu-img rebase -f qcow2 -F FORMAT -b {disk.volume_id} NEW",
        f"localdisk remove {lv}",
    )
    return Problem(DRIFTED, what, "; ".join(steps))


def _open_elsewhere(path: str, what: str) -> Problem:
    users, fix = holders.described(path)
    return Problem(OPEN_ELSEWHERE, f"{what}: {users}", fix)


def depended_on(vg: VolumeGroup, disk: LocalDisk) -> Problem:
    error = DependentVolumes(vg=vg.vg_name, lv=disk.volume_id, others=", ".join(disk.lv.dependents))
    what, _, fix = str(error).partition(" : ")
    return Problem(DEPENDENTS, what, fix)


def _uncertain(
    vg: VolumeGroup,
    disk: LocalDisk,
    verdict: Verdict,
    vms: Vms | None,
    config: Config,
    now: float,
    is_elsewhere_known: bool,
) -> Iterator[Problem]:
    if vms is None:
        return
    name = f"local disk {vg.vg_name}/{disk.volume_id}"
    if verdict.action is Action.MARK_DRIFTED:
        yield _drifted(vg, disk, name)
    elif not is_elsewhere_known and has_run(disk) and disk.vm_id in vms.names:
        return  # what could not be asked is among what was not seen
    elif not verdict.is_certain and disk.lv.dependents:
        yield depended_on(vg, disk)
    elif not verdict.is_certain:
        is_mended = verdict.action is not Action.KEEP
        yield Problem(CLOCK, f"{name}: {verdict.reason}", "localdisk gc" if is_mended else _SET_CLOCK)
    elif is_left_alone(disk, config.policy(disk.vm_id).retention):
        return
    elif disk.state is State.READY and disk.vm_id not in vms.names:
        due = f"removes it in {format_duration(max(0, int((verdict.due or now) - now)))}"
        kept = verdict.action is Action.MARK_STOPPED
        what = f"{name} is of VM {disk.vm_id}, which libvirt does not know"
        yield Problem(UNKNOWN_VM, what, "localdisk gc keeps it as stopped" if kept else f"localdisk gc {due}")


def of_templates(templates: Templates, held: Held, now: float) -> Iterator[Problem]:
    """Problems of template LVs.  `now` in seconds since the epoch."""
    a_copy_may_read = any(record is None or not record.template for record in held.values())
    for vg, found in templates:
        full = f"{vg.vg_name}/{found.name}"
        name = f"template LV {full}"
        if found.name in held or (found.is_open and a_copy_may_read):
            continue
        if found.is_open:
            yield _open_elsewhere(vg.path(found.name), f"{name} is open, but no copy reads it")
        elif not found.is_ready:
            yield Problem(NO_COPIER, f"{name} is an unfinished copy that nobody works on", "localdisk gc")
        elif _change(found):
            what = f"{name} is not as it was made, {_change(found)}: no VM starts from it"
            yield Problem(NOT_AS_MADE, what, "localdisk gc")
        elif found.used > now:
            yield Problem(
                CLOCK, f"{name}: its last use is in the future, the clock went backwards", _SET_CLOCK
            )


def _change(found: Template) -> str:
    """Why no start would use a template LV, "" if nothing is wrong; its source is not read for that."""
    if found.lv.lv_permissions != "read-only":
        return "it can be written to"
    if not is_fingerprint(found.fingerprint):
        return "its tag SOURCE_ is missing or not alone"
    return "" if found.sample else "its tag SAMPLE_ is missing or not alone"


def _of_vm(vm: Running, disks: Disks, config: Config) -> Iterator[Problem]:
    """The disks of a running VM that should be local and are not; `disks` are its local disks.

    If a kept disk has the mark STALE, its VM was started from shared storage: that is no problem.
    """
    own = {disk.image_id: (group, disk) for group, disk in disks if not disk.is_stale}
    asked = vm.property_value if vm.property_value in ("on", *BACKENDS) else ""
    policy = config.policy(vm.vm_id, asked or "on")
    for disk in vm.disks:
        expected = f"/dev/{policy.volume_group}/{disk.volume_id}"
        wanted = asked and policy.hotplug == "refuse" and policy.is_local(disk.image_id)
        if not _can_be_local(disk) or not (wanted or disk.image_id in own) or _is_at(disk, expected):
            continue
        name = plain(vm.name or vm.vm_id)
        what = f"VM {name} ({vm.vm_id}): {disk.name} runs from {plain(disk.path)}, not from {expected}"
        yield Problem(NOT_LOCAL, what, _back(vm, disk, own.get(disk.image_id)))


def _back(vm: Running, disk: Disk, local: tuple[VolumeGroup, LocalDisk] | None) -> str:
    """How a running VM can be brought back to its local disk, if it has one."""
    if local is None or local[1].state is not State.READY:
        return "the VM's data are on that volume; shut the VM down, and start it again"
    path = local[0].path(local[1].volume_id)
    if (disk.name, path) in vm.backing:
        command = f"virsh blockcommit {vm.vm_id} {disk.name} --active --pivot --wait"
        return f"do not stop the VM; {command} brings it back"
    kept = "the local disk is kept, and localdisk status then shows how to bring the data together"
    return f"what the VM wrote before is only in {path}; shut the VM down: {kept}"


def _can_be_local(disk: Disk) -> bool:
    return disk.is_vdsm_image and disk.device == "disk"


def _is_at(disk: Disk, expected: str) -> bool:
    return disk.path == expected or os.path.realpath(disk.path) == os.path.realpath(expected)
