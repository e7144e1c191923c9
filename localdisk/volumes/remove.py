"""The mode remove: the operator gives up local disks by name, also disks that gc keeps.

All named disks are found and checked first.  If any of them is needed, none is removed.  Otherwise they are
removed one after the other, each under its lock and after a second check.  A disk that must be erased is set
aside: its name is free at once, and the next gc erases and removes it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from localdisk import clock, holders, libvirt, lock, log
from localdisk.clock import Moment
from localdisk.config import Config
from localdisk.errors import (
    DependentVolumes,
    DiskNeeded,
    Error,
    ForeignVolume,
    NoSuchDisk,
    SeveralDisks,
)
from localdisk.frozen import frozen
from localdisk.units import format_duration, format_size
from localdisk.volumes import lvm, template
from localdisk.volumes.local_disk import LocalDisk, State, local_disks
from localdisk.volumes.lvm import VolumeGroup
from localdisk.volumes.removal import remove_or_set_aside

Vms = tuple[Mapping[str, str], frozenset[str]]  # the names of all VMs by UUID; the UUIDs of running VMs


@frozen
class Named:
    """A named local disk or template LV; `template`: the volume that the template LV is a copy of."""

    vg: VolumeGroup
    disk: LocalDisk
    template: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.vg.vg_name}/{self.disk.volume_id}"


@frozen
class Outcome:
    """A line for one disk; `failure`: why it was refused or could not be removed."""

    text: str
    failure: Error | None = None


def remove(config: Config, names: Iterable[str], dry_run: bool = False) -> Iterator[Outcome]:
    """Remove the local disks that `names` name: logical volumes, or VMs by UUID or name.

    Raises NoSuchDisk, SeveralDisks and ForeignVolume before anything is changed; LibvirtSilent if libvirt
    does not answer; NoVolumeGroup and so on if a volume group cannot be read.
    """
    asked = libvirt.ask_names()
    groups, failures = lvm.read_all(config.volume_groups)
    if failures:
        raise failures[0]
    vms = libvirt.read_names(asked.text())
    found = {each.disk.lv.lv_uuid: each for name in names for each in find(groups, vms[0], name)}
    refusals = {uuid: _refusal(each, vms, _is_locked(each)) for uuid, each in found.items()}
    is_refused = any(refusals.values())
    for uuid, each in found.items():
        text = describe(each, vms[0], clock.now())
        if is_refused:
            yield Outcome(f"{text}: kept", refusals[uuid])
        elif dry_run:
            yield Outcome(f"{text}: would be {_how(each, config)}")
        else:
            yield _removed(each, text, config)


# -- finding


def find(groups: Iterable[VolumeGroup], vm_names: Mapping[str, str], name: str) -> tuple[Named, ...]:
    """The disks that one argument names.  Raises NoSuchDisk, SeveralDisks, ForeignVolume."""
    group_name, _, lv_name = name.removeprefix("/dev/").rpartition("/")
    every = [each for vg in groups for each in _all(vg) if group_name in ("", vg.vg_name)]
    found = [each for each in every if each.disk.volume_id == lv_name]
    if not found and not group_name:
        ids = {name, *(vm_id for vm_id, vm_name in vm_names.items() if vm_name == name)} - {""}
        owned = [each for each in every if {each.disk.vm_id, each.template} & ids]
        if owned:
            return tuple(owned)
    if len(found) > 1:
        raise SeveralDisks(name=name, places=", ".join(each.full_name for each in found))
    if not found:
        others = [vg for vg in groups if group_name in ("", vg.vg_name) and vg.find(lv_name)]
        if others:
            raise ForeignVolume(vg=others[0].vg_name, lv=lv_name)
        raise NoSuchDisk(name=name)
    return tuple(found)


def _all(vg: VolumeGroup) -> Iterator[Named]:
    yield from (Named(vg, disk) for disk in local_disks(vg))
    yield from (Named(vg, each.disk, each.volume_id) for each in template.templates(vg))


# -- checking


def _is_locked(named: Named) -> bool:
    return lock.is_held(lock.disk_lock(named.disk.volume_id))


def _refusal(named: Named, vms: Vms, is_locked: bool) -> Error | None:
    """The error if something needs the disk, else None."""
    vg, disk, (vm_names, active) = named.vg, named.disk, vms
    problem = ""
    if disk.vm_id in active:
        problem = f"its VM {disk.vm_id} runs"
    elif disk.vm_id in vm_names:  # vdsm defines a VM before it prepares its disks
        problem = f"its VM {disk.vm_id} is being started, or libvirt still has it"
    elif disk.is_open:
        problem = f"its device is open: {holders.described(vg.path(disk.volume_id))[0]}"
    elif is_locked:
        problem = "a process works on it"
    if problem:
        return DiskNeeded(vg=vg.vg_name, lv=disk.volume_id, problem=problem)
    if disk.lv.dependents:
        return DependentVolumes(vg=vg.vg_name, lv=disk.volume_id, others=", ".join(disk.lv.dependents))
    return None


# -- removing


def _removed(named: Named, text: str, config: Config) -> Outcome:
    try:
        with lock.trying(lock.disk_lock(named.disk.volume_id)) as held:
            again = _again(named)
            if again is None:
                return Outcome(f"{text}: removed meanwhile")
            refusal = _refusal(again, libvirt.read_names(libvirt.ask_names().text()), is_locked=not held)
            if refusal:
                return Outcome(f"{text}: kept", refusal)
            how = _how(again, config)
            if again.disk.aside_name != again.disk.volume_id:  # otherwise it is set aside already
                again.vg.require_usable()
                erase = config.policy(again.disk.vm_id).retention.erase
                remove_or_set_aside(again.vg, again.disk, erase, time.sleep)
            log.event("removed by the operator", vm=again.disk.vm_id, disk=again.disk.volume_id, how=how)
            return Outcome(f"{text}: {how}")
    except Error as error:
        log.problem("the operator could not remove it", disk=named.disk.volume_id, why=error)
        return Outcome(f"{text}: kept", error)


def _again(named: Named) -> Named | None:
    """The same volume as it is now, None if it no longer exists."""
    vg = VolumeGroup.read(named.vg.vg_name, named.vg.devices)
    return next((each for each in _all(vg) if each.disk.lv.lv_uuid == named.disk.lv.lv_uuid), None)


def _how(named: Named, config: Config) -> str:
    erase = named.disk.erase or config.policy(named.disk.vm_id).retention.erase
    if erase == "none":
        return "removed"
    return f"set aside, erased ({erase}) and removed by the next localdisk gc"


# -- showing


def describe(named: Named, vm_names: Mapping[str, str], now: Moment) -> str:
    """A disk's name, owner, size, state and age as one line."""
    disk = named.disk
    name = vm_names.get(disk.vm_id, "")
    whose = f"VM {disk.vm_id}{f' ({name})' if name else ''}, image {disk.image_id}"
    if named.template:
        whose = f"template {named.template}"
    elif disk.is_aside:
        whose = "no VM's any more"
    words = [whose, format_size(disk.lv.lv_size), _state(named, now)]
    if disk.lv.lv_time:
        words.append(f"made {_ago(disk.lv.lv_time, now)}")
    return f"{named.full_name}  {', '.join(words)}"


def _state(named: Named, now: Moment) -> str:
    disk = named.disk
    if named.template:
        return disk.state.value
    if disk.is_aside:
        return "set aside"
    state = f"stopped {_ago(disk.stopped or 0, now)}" if disk.state is State.STOPPED else disk.state.value
    state += ", stale" if disk.is_stale else ""
    return f"{state}, of vdsm's older hook" if disk.is_older else state


def _ago(since: int, now: Moment) -> str:
    return f"{format_duration(max(0, int(now.epoch - since)))} ago"
