"""The claimed disk, whose lock this helper holds, and the local disks of its VM in the volume group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from localdisk import kept, libvirt, lock, log
from localdisk.config import Config, Policy
from localdisk.errors import Error, ForeignVolume, KeptElsewhere, LibvirtSilent, VmRuns
from localdisk.frozen import frozen, replace
from localdisk.helper.new_volume import Known, NewVolume
from localdisk.helper.replaced import Replaced
from localdisk.libvirt import DomainState
from localdisk.lock import Pause
from localdisk.protocol import DiskIds, Looked
from localdisk.volumes import local_disk, stale
from localdisk.volumes.local_disk import LocalDisk, State
from localdisk.volumes.lvm import VolumeGroup
from localdisk.volumes.removal import remove_or_set_aside
from localdisk.volumes.room import Need, NewLv


@frozen
class Claim:
    """The disk whose lock this helper holds; one hook run claims one disk after the other."""

    vm_id: str
    image_id: str
    volume_id: str
    policy: Policy
    found: LocalDisk | None  # the local disk in `vg`, if there is one; only the lock's holder changes it
    vg: VolumeGroup  # as it was last read
    known: Known | None  # as it was first read; None if this VM has, or had, local disks of the image
    new_volume: NewVolume
    resources: ExitStack  # holds the locks; `new_volume.release` closes it
    asked_at: float  # when libvirt was asked, which said that the VM is being started; of CLOCK_MONOTONIC
    others: tuple[LocalDisk, ...] | None = None  # see `with_others`; None: not looked for yet
    replaced: Replaced | None = None  # the kept disks that the new disk replaces
    wanted: tuple[int, int] = (0, 0)  # bytes: size of the new disk with its margin; data that it will hold

    def find(self, vg: VolumeGroup) -> LocalDisk | None:
        """The claimed disk as `vg` shows it, None if there is none.  Raises ForeignVolume, OtherOwner."""
        return find(vg, self.vm_id, self.image_id, self.volume_id)

    @property
    def disks(self) -> tuple[LocalDisk, ...]:
        """All known local disks that this VM has of the image."""
        return (*((self.found,) if self.found else ()), *(self.others or ()))

    @property
    def wanted_lv(self) -> NewLv:
        """The wanted disk."""
        return NewLv(*self.wanted)

    def need(self, template: str = "", takes_kept: bool = True) -> Need:
        """The wanted disk; the template LV of the name `template` is not removed for it.

        `takes_kept`: the kept disks that it replaces may be removed before it is made.
        """
        kept = self.replaced.disks if self.replaced and takes_kept else ()
        return Need(self.policy, (self.wanted_lv,), template, kept=tuple(kept))

    def free_name(self, vg: VolumeGroup) -> None:
        """Rename the kept disk that has the name of the wanted disk, if there is one."""
        if self.replaced:
            self.replaced.free_name(vg, self.volume_id)

    def replacing(self, disks: Sequence[LocalDisk], pause: Pause) -> Replaced:
        """These disks of the claim, to be replaced by the disk of this start."""
        return Replaced(disks, self.policy, pause, self.resources)


def with_others(claim: Claim, pause: Pause) -> Claim:
    """The claim with `others`: this VM's other local disks of the image, locked and then read again.

    Such a disk is a copy of the volume that was the image's leaf before a snapshot was made or removed; or a
    start that did not end has renamed it, to replace it (`replaced.py`).
    """
    if claim.others is not None:
        return claim
    names = [disk.volume_id for disk in _others(claim, claim.vg)]
    for name in names:
        claim.resources.enter_context(lock.holding(lock.disk_lock(name), pause))
    vg = read(claim.policy) if names else claim.vg
    others = tuple(disk for disk in _others(claim, vg) if disk.volume_id in names)
    return replace(claim, vg=vg, found=claim.find(vg), others=others)


def remove_old_copies(claim: Claim, removed: Sequence[LocalDisk], pause: Pause) -> Claim:
    """Remove these disks of the claim, which the policy does not keep; returns the claim without them."""
    if not removed:
        return claim
    vg = claim.vg if claim.others else read(claim.policy)  # if there are others, it was read just now
    claim.find(vg)
    now = {disk.lv.lv_uuid: disk for disk in local_disk.local_disks(vg)}
    for disk in filter(None, (now.get(disk.lv.lv_uuid) for disk in removed)):
        remove_or_set_aside(vg, disk, claim.policy.retention.erase, pause)
        log.event("old copy removed", vm=claim.vm_id, disk=disk.volume_id, state=disk.state.value)
    others = tuple(disk for disk in claim.others or () if disk not in removed)
    return replace(claim, found=None if claim.found in removed else claim.found, others=others)


def in_use(
    asked: libvirt.Question, vg: VolumeGroup, found: LocalDisk | None, vm_id: str, volume_id: str
) -> tuple[bool, str]:
    """Whether to leave the disk's description as it is; and the local path if the VM runs from it already.

    (False, "") means: the VM is being started, prepare its disk.

    A vdsm that was restarted calls the same hook points to recover VMs: VMs that run, and VMs that ran and
    are shut off.  No disk of such a VM may change.
    `asked` is the question of `libvirt.ask_state`, asked while the disk's lock was held.
    Raises LibvirtSilent, VmRuns.
    """
    found = None if found is not None and found.is_aside else found
    is_open = found is not None and found.is_open
    try:
        state = libvirt.read_state(asked.text(), vm_id)
    except LibvirtSilent:
        if not is_open:
            raise
        state = DomainState.ACTIVE  # the disk is open: without an answer we assume that the VM runs
    if state in (DomainState.UNKNOWN, DomainState.PLACEHOLDER):
        return False, ""
    if state is DomainState.SHUT_OFF:
        log.problem("VM is shut off and not being started; disk left as it is", vm=vm_id, disk=volume_id)
        return True, ""
    if found is not None and found.state in (State.UNFINISHED, State.DELETING):
        raise VmRuns(vg=vg.vg_name, lv=volume_id, vm=vm_id)
    if found is not None and found.is_open:
        if found.idle_tags:
            vg.change_tags(volume_id, remove=found.idle_tags)
        return False, vg.path(volume_id)
    log.problem("VM runs, but not from a local disk; left as it is", vm=vm_id, disk=volume_id)
    return True, ""


def require_none_elsewhere(config: Config, policy: Policy, vm_id: str, image_id: str) -> None:
    """Raise KeptElsewhere if another group of this host has a kept disk of the image.

    Its VM would start without the data of that disk, and gc would remove them when their time is over.
    """
    for vg in other_groups(config, policy, vm_id):
        for disk in of_vm(vg, vm_id):
            is_needed = disk.state is State.DRIFTED or local_disk.is_kept(disk, policy.retention)
            if disk.image_id == image_id and is_needed:
                raise KeptElsewhere(vg=vg.vg_name, lv=disk.volume_id, wanted=policy.volume_group)


def other_groups(config: Config, policy: Policy, vm_id: str) -> Iterator[VolumeGroup]:
    """The groups but the VM's own that can be read, if it may have kept disks."""
    for name, devices in config.volume_groups.items() if kept.may_have(vm_id) else ():
        if name != policy.volume_group:
            try:
                yield VolumeGroup.read(name, devices)
            except Error as error:
                log.problem("a start cannot look at a volume group", vg=name, vm=vm_id, why=error)


# -- reading the volume group


def read(policy: Policy) -> VolumeGroup:
    """Read the volume group of a policy."""
    return VolumeGroup.read(policy.volume_group, policy.devices)


def find(vg: VolumeGroup, vm_id: str, image_id: str, volume_id: str) -> LocalDisk | None:
    """The VM's local disk with the name `volume_id`, None if there is no logical volume of this name.

    Raises ForeignVolume if the volume is not a local disk, OtherOwner if it is another VM's or image's.
    """
    lv = vg.find(volume_id)
    if lv is None:
        return None
    found = LocalDisk.from_lv(lv)
    if found is None:
        raise ForeignVolume(vg=vg.vg_name, lv=volume_id)
    local_disk.require_owner(found, vm_id, image_id, vg.vg_name)
    return found


def of_vm(vg: VolumeGroup, vm_id: str) -> list[LocalDisk]:
    """All local disks of a VM."""
    return [disk for disk in local_disk.local_disks(vg) if disk.vm_id == vm_id]


def look_at(groups: Sequence[VolumeGroup], policy: Policy, vm_id: str, disk: DiskIds) -> Looked:
    """Whether a disk has a local copy, and its state; nothing is locked or changed.  Raises as `find`.

    `groups`: the VM's own, and others in which it may have kept disks.
    """
    vg, is_local = groups[0], policy.is_local(disk.image_id)
    found = find(vg, vm_id, disk.image_id, disk.volume_id) if is_local else None
    return Looked(
        is_local=is_local,
        is_kept=any(
            each.image_id == disk.image_id and stale.is_usable(each)
            for group in groups
            for each in of_vm(group, vm_id)
        ),
        is_ready=found is not None and found.state is State.READY and found.lv.lv_active,
        state=found.state.value if found else "absent",
        path=vg.path(disk.volume_id),
    )


def _others(claim: Claim, vg: VolumeGroup) -> list[LocalDisk]:
    """This VM's local disks of the claimed image, without the claimed disk itself."""
    disks = (disk for disk in of_vm(vg, claim.vm_id) if disk.image_id == claim.image_id)
    return [disk for disk in disks if disk.volume_id != claim.volume_id]
