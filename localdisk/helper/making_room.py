"""Removes volumes for room, one at a time: what `volumes/room.py` has planned.

A volume that must be erased is set aside first, which is quick, under the space lock; then it is erased
without that lock.  A template LV may have been taken into use since it was looked for: then it is kept.
"""

from __future__ import annotations

from localdisk import counters, lock, log
from localdisk.config import Policy
from localdisk.errors import CannotDiscard, CommandFailed, DependentVolumes, DiskBusy, EraseFailed
from localdisk.lock import Pause
from localdisk.volumes import removal, template
from localdisk.volumes.local_disk import LocalDisk
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup
from localdisk.volumes.removal import remove_or_set_aside
from localdisk.volumes.room import Kind, Need, Removable, Seen
from localdisk.volumes.template import Template


def look(vg: VolumeGroup, need: Need, tried: frozenset[str]) -> Seen:
    """What `room.plan` must know beside the group; `tried` are the UUIDs of LVs that were tried before."""
    names = (each.name for each in template.in_place(vg, need.policy.pool))
    return Seen(frozenset(name for name in names if lock.is_held(lock.disk_lock(name))), tried)


def remove(policy: Policy, each: Removable, pause: Pause) -> str:
    """Remove a volume or set it aside; returns the name under which it waits for `erase`, "" if it does not.

    Raises CannotDiscard, the volume as it was, and the errors of `remove_or_set_aside`.
    """
    if each.kind is Kind.ASIDE:
        return each.name
    if each.kind is Kind.KEPT:  # this process holds its lock
        return _remove_kept(policy, each, pause)
    with lock.trying(lock.disk_lock(each.name)) as held:
        return _evict(policy, each, pause) if held else ""


def _evict(policy: Policy, each: Removable, pause: Pause) -> str:
    """Remove a template LV, whose lock is held, or set it aside."""
    vg, lv = _read(policy, each)
    found = Template.from_lv(lv) if lv else None
    if found is None or found.is_open:
        return ""
    aside = _remove_or_set_aside(policy, vg, found.disk, pause)
    log.event("template LV evicted", template=found.volume_id, lv=each.name, why=each.why)
    counters.template_evicted()
    return aside


def _remove_kept(policy: Policy, each: Removable, pause: Pause) -> str:
    """Remove a kept disk or set it aside."""
    vg, lv = _read(policy, each)
    found = LocalDisk.from_lv(lv) if lv else None
    if found is None:
        return ""
    aside = _remove_or_set_aside(policy, vg, found, pause)
    log.event("kept disk removed before the copy, for room", vm=found.vm_id, disk=found.volume_id)
    return aside


def _read(policy: Policy, each: Removable) -> tuple[VolumeGroup, LogicalVolume | None]:
    """The group, and the volume as it is now."""
    vg = VolumeGroup.read(policy.volume_group, policy.devices)
    return vg, next((lv for lv in vg.lvs if lv.lv_uuid == each.lv_uuid), None)


def _remove_or_set_aside(policy: Policy, vg: VolumeGroup, disk: LocalDisk, pause: Pause) -> str:
    vg.require_usable()
    removal.require_erasable(vg, disk, policy.retention.erase)
    return remove_or_set_aside(vg, disk, policy.retention.erase, pause)


def erase(vg: VolumeGroup, policy: Policy, each: Removable, aside: str, pause: Pause) -> None:
    """Erase and remove a volume that is set aside under the name `aside`, or wait until gc has.

    Raises the errors of `removal.erase_aside`; but if a volume that was set aside before cannot be erased,
    it only makes no room.
    """
    try:
        removal.erase_aside(vg, aside, policy, pause)
    except (CannotDiscard, CommandFailed, DependentVolumes, DiskBusy, EraseFailed) as error:
        if each.kind is not Kind.ASIDE:
            raise
        log.problem("a volume that was set aside makes no room", disk=aside, why=error)
