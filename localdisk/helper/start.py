"""What a start does with the claimed disk: use a kept disk again, or make a new disk and make it ready.

A claim is frozen: a function that changes the disk returns a new claim.
"""

from __future__ import annotations

from localdisk import counters, holders, kept, libvirt, log, ready
from localdisk.errors import BadRequest, CommandFailed, DiskBusy, Error, LibvirtSilent, VmForgotten
from localdisk.frozen import replace
from localdisk.helper import claims
from localdisk.helper.claims import Claim
from localdisk.helper.replaced import Replaced
from localdisk.lock import Pause
from localdisk.protocol import How, Prepare, Prepared, Reuse, Target
from localdisk.volumes import local_disk
from localdisk.volumes.local_disk import LocalDisk, Start, State, Wanted
from localdisk.volumes.lvm import VolumeGroup


def plan(claim: Claim, request: Prepare, pause: Pause) -> tuple[Claim, LocalDisk | None]:
    """Plan the start (`local_disk.plan_start`), and remove the copies that the policy does not keep.

    Returns the claim, and the kept disk that the start uses again, None if a new disk must be made.
    Raises SourceChanged and the other errors of `local_disk.plan_start`.
    """
    claim, planned = look(claim, request, pause)
    claim = claims.remove_old_copies(claim, planned.remove, pause)
    with_margin = request.size + claim.policy.margins.disk.of(request.size)
    replaced = claim.replacing(planned.replace, pause)
    known = None if claim.disks or planned.remove else claim.known
    claim = replace(claim, wanted=(with_margin, request.writes), replaced=replaced, known=known)
    return claim, planned.reuse


def look(claim: Claim, request: Prepare | Reuse, pause: Pause) -> tuple[Claim, Start]:
    """Plan the start as `plan`, and change nothing; returns the claim with all disks that were looked at."""
    claim = claims.with_others(claim, pause)
    claim.vg.require_usable()
    wanted = Wanted(claim.volume_id, request.fingerprint, request.size)
    try:
        return claim, local_disk.plan_start(claim.disks, wanted, claim.policy.retention, claim.vg.vg_name)
    except DiskBusy as error:
        raise holders.busy(error) from None


def reuse(claim: Claim, found: LocalDisk, fingerprint: str, pause: Pause) -> Prepared:
    """Use a kept disk again: give it the claimed name, activate it if it is not, remove what it replaces."""
    vg, name = claim.vg, claim.volume_id
    if found.volume_id != name:
        claim.replacing(claim.disks, pause).free_name(vg, name)
        vg.rename(found.volume_id, name)
        log.event("kept disk renamed", vm=claim.vm_id, disk=found.volume_id, to=name)
    kept.note(claim.vm_id)
    missing = {local_disk.OURS, f"SOURCE_{fingerprint}"} - found.lv.lv_tags
    if local_disk.is_left_alone(found, claim.policy.retention):
        missing = set()
    if missing or found.idle_tags:
        vg.change_tags(name, add=missing, remove=found.idle_tags)
    try:
        if not found.lv.lv_active:  # as after a boot
            vg.activate(name)
        dm_uuid = vg.dm_uuid(name)  # raises if the device node is missing, or is another volume's
    except Error:
        _keep_as_it_was(vg, name, found)
        raise
    log.event("kept disk used again", **claim.new_volume.log_fields)
    ready.note(claim.vm_id, claim.image_id, vg.path(name), dm_uuid)
    _remove_replaced(claim.replaced)
    return Prepared(How.KEPT, vg.path(name))


def create(claim: Claim, request: Prepare, pause: Pause, takes_kept: bool = True) -> Target:
    """Wait for a turn to copy, then make the claimed disk.

    `takes_kept` is that of `Claim.need`.
    """
    policy, (with_margin, writes) = claim.policy, claim.wanted
    tags = local_disk.new_tags(claim.vm_id, claim.image_id, request.fingerprint, writes)

    def create_volume(vg: VolumeGroup) -> None:
        claim.free_name(vg)
        if policy.pool:
            vg.create_thin(claim.volume_id, with_margin, policy.pool, tags)
        else:
            vg.create_thick(claim.volume_id, with_margin, tags)

    claim.new_volume.begin_turn(request.size, pause)
    need = claim.need(takes_kept=takes_kept)
    return claim.new_volume.create(request.size, need, tags, create_volume, pause, claim.known)


def make_ready(claim: Claim) -> None:
    """Make the disk ready with one LVM command; its copy is complete and synced.

    The group is not read before: LVM itself looks whether the volume is still the one that was made.  libvirt
    is asked again if its answer is too old.
    Raises VmForgotten, and BadRequest if the volume is not the one that this helper made.
    """
    if not libvirt.is_recent(claim.asked_at):
        _require_known(claim)
    kept.note(claim.vm_id)
    try:
        is_ready = claim.new_volume.make_ready(claim.vg)
    except CommandFailed:
        _require_made(claim, State.UNFINISHED)  # it has the reason, if that is it
        raise
    if not is_ready:
        _require_made(claim, State.READY)  # LVM's messages may be switched off
    ready.note(claim.vm_id, claim.image_id, claim.vg.path(claim.volume_id), claim.new_volume.dm_uuid)


def _require_made(claim: Claim, state: State) -> None:
    """Raise BadRequest unless the volume that was made is in this state.  Raises VolumeGroupUnusable."""
    vg = claims.read(claim.policy)
    vg.require_usable()
    found = claim.find(vg)
    if found is None or found.state is not state or not claim.new_volume.is_ours(vg, found.lv):
        raise BadRequest(problem="the unfinished disk is not the one that was made")


def finish(claim: Claim) -> None:
    """The disk is ready: remove the kept disks that it replaces, and release all locks."""
    new_volume = claim.new_volume
    new_volume.end_turn()
    log.event("disk ready", **new_volume.log_fields, **new_volume.speed())
    counters.copied(new_volume.written, new_volume.took)
    try:
        _remove_replaced(claim.replaced)
    finally:
        new_volume.release()


def _remove_replaced(replaced: Replaced | None) -> None:
    if replaced:
        replaced.remove()


def _keep_as_it_was(vg: VolumeGroup, name: str, found: LocalDisk) -> None:
    try:
        if found.idle_tags:
            vg.change_tags(name, add=found.idle_tags)
        if not (found.lv.lv_active or found.lv.dependents):  # LVM would deactivate its snapshots, too
            vg.deactivate(name)
    except Error as error:
        log.problem("kept disk is left to gc", disk=name, why=error)


def _require_known(claim: Claim) -> None:
    """Raise VmForgotten if libvirt no longer knows the VM of a claim: it was powered off during the copy."""
    try:
        known = libvirt.known()
    except LibvirtSilent as error:
        log.problem(
            "libvirt cannot be asked whether the VM still starts", **claim.new_volume.log_fields, why=error
        )
        return
    if claim.vm_id not in known:
        raise VmForgotten(vm=claim.vm_id, volume=claim.volume_id)
