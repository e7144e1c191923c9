"""The disk that a helper holds the lock of, and what is found of a VM's disks in the volume group."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from localdisk import libvirt, lock, log
from localdisk.config import Policy
from localdisk.errors import ForeignVolume, LibvirtSilent, VmRuns
from localdisk.frozen import frozen, replace
from localdisk.helper import cache
from localdisk.helper.cache import Spare
from localdisk.helper.new_volume import NewVolume
from localdisk.helper.replaced import Replaced
from localdisk.libvirt import DomainState
from localdisk.lock import Pause
from localdisk.protocol import DiskIds, Looked
from localdisk.volumes import disk as local_disk
from localdisk.volumes import stale
from localdisk.volumes.disk import LocalDisk, State
from localdisk.volumes.lvm import VolumeGroup
from localdisk.volumes.removal import remove_or_set_aside


@frozen
class Claim:
    """The disk that this helper holds the lock of."""

    vm_id: str
    image_id: str
    volume_id: str
    policy: Policy
    found: LocalDisk | None  # as it was when last looked at; only the lock's holder changes it
    vg: VolumeGroup
    new_volume: NewVolume
    resources: ExitStack  # of `new_volume`
    # This VM's other local disks of the image, whose locks are held; None: nobody has looked for them yet.
    others: tuple[LocalDisk, ...] | None = None
    replaced: Replaced | None = None  # by the disk that is made
    wanted: tuple[int, int] = (0, 0)  # bytes of the disk, and of data written to it, as last asked for

    def find(self, vg: VolumeGroup) -> LocalDisk | None:
        """This disk now.  Raises ForeignVolume, OtherOwner."""
        return find(vg, self.vm_id, self.image_id, self.volume_id)

    @property
    def disks(self) -> tuple[LocalDisk, ...]:
        """All local disks that this VM has of the image."""
        return (*((self.found,) if self.found else ()), *(self.others or ()))

    def require_room(self, vg: VolumeGroup) -> None:
        """Raises as `disk.require_room` if there is none for what is wanted."""
        local_disk.require_room(vg, self.policy, *self.wanted)

    def find_room(self, spares: Sequence[Spare], pause: Pause, keep: str = "") -> VolumeGroup:
        """The group with room for what is wanted, and its name free; as `cache.with_room`."""
        vg = cache.with_room(self.policy, self.require_room, keep, pause, spares)
        if self.replaced:
            self.replaced.free_name(vg, self.volume_id)
        return vg

    def replacing(self, disks: Sequence[LocalDisk], pause: Pause) -> Replaced:
        """These disks of the claim as disks that a start replaces."""
        return Replaced(disks, self.vg, self.policy, pause, self.resources)


def with_others(claim: Claim, pause: Pause) -> Claim:
    """The claim, with this VM's other local disks of its image locked and looked at again.

    They are copies of what was the image's leaf before a snapshot was made or removed, or were given another
    name by a start that was to replace them.
    """
    if claim.others is not None:
        return claim
    names = [disk.volume_id for disk in _others(claim, claim.vg)]
    for name in names:
        claim.resources.enter_context(lock.holding(lock.disk_lock(name), pause))
    vg = read(claim.policy) if names else claim.vg
    others = tuple(disk for disk in _others(claim, vg) if disk.volume_id in names)
    return replace(claim, vg=vg, found=claim.find(vg), others=others)


def without(claim: Claim, removed: Sequence[LocalDisk], pause: Pause) -> Claim:
    """The claim once these disks of it, which nobody keeps, were removed."""
    if not removed:
        return claim
    vg = claim.vg if claim.others else read(claim.policy)  # with others, it was read again just now
    claim.find(vg)
    now = {disk.lv.lv_uuid: disk for disk in local_disk.local_disks(vg)}
    for disk in filter(None, (now.get(disk.lv.lv_uuid) for disk in removed)):
        remove_or_set_aside(vg, disk, claim.policy.retention.erase, pause)
        log.event("old copy removed", vm=claim.vm_id, disk=disk.volume_id, state=disk.state.value)
    others = tuple(disk for disk in claim.others or () if disk not in removed)
    return replace(claim, found=None if claim.found in removed else claim.found, others=others)


def running(
    asked: libvirt.Question, vg: VolumeGroup, found: LocalDisk | None, vm_id: str, volume_id: str
) -> tuple[bool, str]:
    """Whether the disk is left as it is, and the path of the local disk that the VM runs from already.

    `asked` is `libvirt.ask_state`, begun while the disk's lock was held.
    vdsm, restarted, recovers VMs by the same hook points, those that run and those that have run and are shut
    off; nothing of theirs may change.  Raises LibvirtSilent, VmRuns.
    """
    found = None if found is not None and found.is_aside else found
    is_open = found is not None and found.is_open
    try:
        state = libvirt.read_state(asked.text(), vm_id)
    except LibvirtSilent:
        if not is_open:
            raise
        state = DomainState.ACTIVE  # nothing says otherwise: an open disk is in use
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


# -- looking


def read(policy: Policy) -> VolumeGroup:
    """The volume group of a policy, as it is now."""
    return VolumeGroup.read(policy.volume_group, policy.devices)


def find(vg: VolumeGroup, vm_id: str, image_id: str, volume_id: str) -> LocalDisk | None:
    """This VM's local disk of that name, None if there is no such volume.

    Raises ForeignVolume, OtherOwner: another's volume is never handed out.
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


def look_at(vg: VolumeGroup, policy: Policy, vm_id: str, disk: DiskIds) -> Looked:
    """How the local copy of a disk is; nothing is locked or changed.  Raises as `find`."""
    is_local = policy.is_local(disk.image_id)
    found = find(vg, vm_id, disk.image_id, disk.volume_id) if is_local else None
    return Looked(
        is_local=is_local,
        is_kept=any(each.image_id == disk.image_id and stale.is_usable(each) for each in of_vm(vg, vm_id)),
        is_ready=found is not None and found.state is State.READY and found.lv.lv_active,
        state=found.state.value if found else "absent",
        path=vg.path(disk.volume_id),
    )


def _others(claim: Claim, vg: VolumeGroup) -> list[LocalDisk]:
    """This VM's local disks of the claimed image that have another name than the claimed one."""
    disks = (disk for disk in of_vm(vg, claim.vm_id) if disk.image_id == claim.image_id)
    return [disk for disk in disks if disk.volume_id != claim.volume_id]
