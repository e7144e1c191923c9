"""What a stop does with the local disks of a VM: removes, keeps or marks them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from localdisk import clock, kept, libvirt, lock, log
from localdisk.config import Config, Policy
from localdisk.errors import CommandFailed, CommandTimeout, Error, StillRuns
from localdisk.helper.claims import of_vm
from localdisk.protocol import RanFrom
from localdisk.volumes import local_disk
from localdisk.volumes.filling import log_filling
from localdisk.volumes.local_disk import LocalDisk, State, Stop
from localdisk.volumes.lvm import VolumeGroup

START_TRIES = 3  # how often a stop tries to take the lock of a disk that a new start prepares
GC_TRIES = 25  # the same if gc has the lock: for as long as a few LVM commands take


def release(config: Config, policy: Policy, vm_id: str) -> None:
    """Remove, keep or mark the disks of a VM that has stopped, as its policy demands.  Raises StillRuns."""
    with ExitStack() as locks:
        for vg, disks in _stopped_disks(config, policy, vm_id, locks):
            log_filling(vg)
            vg.require_usable()
            _stop(vg, policy, disks)


def mark_drifted(config: Config, policy: Policy, vm_id: str, ran_from: Sequence[RanFrom]) -> None:
    """Mark the local disks from which a VM did not run when it stopped, as `ran_from` shows.

    A live snapshot or a live storage migration was not refused: the local disk has the data until then, the
    volume that the VM switched to has the later data.  Raises StillRuns.
    """
    paths: dict[str, set[str]] = {}
    for disk in ran_from:
        paths.setdefault(disk.image_id, set()).add(disk.path)
    with ExitStack() as locks:
        for vg, disks in _stopped_disks(config, policy, vm_id, locks):
            for found in disks:
                _mark_if_drifted(vg, found, paths.get(found.image_id, {vg.path(found.volume_id)}))


def _mark_if_drifted(vg: VolumeGroup, disk: LocalDisk, paths: set[str]) -> None:
    if disk.state is not State.READY or disk.is_stale or vg.path(disk.volume_id) in paths:
        return
    vg.require_usable()
    mark = frozenset({local_disk.drifted_tag(time.time())})
    vg.mark(disk.volume_id, add=mark, remove=disk.idle_tags, spare=disk.source_tags)
    log.problem(
        "VM did not run from its local disk, which is kept",
        vm=disk.vm_id,
        disk=disk.volume_id,
        ran_from=" ".join(sorted(paths)),
    )


def _stopped_disks(
    config: Config, policy: Policy, vm_id: str, locks: ExitStack
) -> list[tuple[VolumeGroup, list[LocalDisk]]]:
    """The disks of a VM that has stopped, by group, with their locks held.

    A disk that a new start prepares is left out.  The VM's volume group may have been changed while it ran,
    so the other groups are looked at, too: for disks that it may have run from.  Raises StillRuns, and LVM's
    errors about its own group.
    """
    own = policy.volume_group
    others = {name: devices for name, devices in config.volume_groups.items() if name != own}
    found = [_held_disks(VolumeGroup.read(own, policy.devices), vm_id, locks)]
    for name, devices in others.items():
        try:
            vg, disks = _held_disks(VolumeGroup.read(name, devices), vm_id, locks)
            found.append((vg, [disk for disk in disks if disk.state is State.READY]))
        except Error as error:
            log.problem("a stop cannot look at a volume group", vg=name, vm=vm_id, why=error)
    if any(disk.is_open for _, disks in found for disk in disks) and vm_id in libvirt.active():
        raise StillRuns(vm=vm_id)
    return [(vg, disks) for vg, disks in found if disks]


def _held_disks(vg: VolumeGroup, vm_id: str, locks: ExitStack) -> tuple[VolumeGroup, list[LocalDisk]]:
    """The group, read again with the locks of the VM's disks held, and these disks."""
    held = {disk.volume_id for disk in of_vm(vg, vm_id) if _try_hold(disk.volume_id, locks)}
    vg = VolumeGroup.read(vg.vg_name, vg.devices) if held else vg
    return vg, [disk for disk in of_vm(vg, vm_id) if disk.volume_id in held]


def _try_hold(volume_id: str, locks: ExitStack) -> bool:
    """Take a disk's lock until `locks` is closed; False if a new start holds it, or gc for very long.

    The lock of a disk that is prepared has a text, its progress.
    """
    path = lock.disk_lock(volume_id)
    for number in range(1, GC_TRIES + 1):
        held = lock.try_hold(path)
        if held:
            locks.callback(held.release)
            return True
        if number >= START_TRIES and lock.read_held(path):
            return False
        time.sleep(lock.POLL)
    return False


def _stop(vg: VolumeGroup, policy: Policy, disks: list[LocalDisk]) -> None:
    """Plan and change disks whose locks are held: one LVM command for each kind of change.

    If one kind of change fails, the others are tried all the same; then the first failure is raised.
    """
    planned: dict[Stop, list[LocalDisk]] = {plan: [] for plan in Stop}
    for disk in disks:
        plan = local_disk.plan_stop(disk, policy.retention)
        planned[plan].append(disk)
        log.event("VM stopped", vm=disk.vm_id, disk=disk.volume_id, plan=plan.value)
        if disk.lv.dependents and plan is Stop.MARK_DELETING:
            others = ", ".join(disk.lv.dependents)
            log.problem("LVM would remove other volumes with it", disk=disk.volume_id, others=others)
    failures = []
    for step in (_mark, _remove, _keep):
        try:
            step(vg, planned)
        except CommandTimeout:  # the next command would wait as long for LVM
            raise
        except Error as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _mark(vg: VolumeGroup, planned: Mapping[Stop, list[LocalDisk]]) -> None:
    """Mark the disks that are to be removed as DELETING, before they are removed.

    The removal may fail or take too long.  The next start or gc removes a disk that is marked or unfinished.
    """
    to_remove = [disk for disk in planned[Stop.REMOVE] if disk.state is not State.UNFINISHED]
    given_up = [*to_remove, *planned[Stop.MARK_DELETING]]
    unmarked = [disk.volume_id for disk in given_up if disk.state is not State.DELETING]
    if unmarked:
        vg.change_tags(*unmarked, add={local_disk.DELETING})


def _remove(vg: VolumeGroup, planned: Mapping[Stop, list[LocalDisk]]) -> None:
    names = [disk.volume_id for disk in planned[Stop.REMOVE]]
    try:
        if names:
            vg.remove(*names)
    except (CommandFailed, CommandTimeout) as error:  # if one volume is open, LVM removes none of them
        log.problem("left to gc", disks=" ".join(names), why=error)


def _keep(vg: VolumeGroup, planned: Mapping[Stop, list[LocalDisk]]) -> None:
    """Mark the kept disks as stopped.

    They stay active until the host boots: to deactivate and activate a disk costs as much as all else that a
    restart from it does with LVM.
    """
    for vm_id in {disk.vm_id for disk in [*planned[Stop.KEEP], *planned[Stop.LEAVE]]}:
        kept.note(vm_id)
    ready = [disk for disk in planned[Stop.KEEP] if disk.state is State.READY]
    if ready:
        seen = frozenset[str]().union(*(disk.unneeded_tags for disk in ready))
        marks = local_disk.stopped_tags(clock.now())
        vg.change_tags(*(disk.volume_id for disk in ready), add=marks, remove=seen - marks)
