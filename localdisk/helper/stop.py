"""What a stop does with the disks of a VM: removes, keeps or marks them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

from localdisk import clock, kept, libvirt, lock, log
from localdisk.config import Policy
from localdisk.errors import CommandFailed, CommandTimeout, Error, StillRuns
from localdisk.helper.claim import of_vm, read
from localdisk.protocol import RanFrom
from localdisk.volumes import disk as local_disk
from localdisk.volumes.disk import LocalDisk, State, Stop
from localdisk.volumes.filling import log_filling
from localdisk.volumes.lvm import VolumeGroup

LOCK_TRIES = 3  # status and gc take a lock for a moment, to see whether it is free


def release(policy: Policy, vm_id: str) -> None:
    """Do with the disks of a VM that has stopped what its policy says.  Raises StillRuns."""
    with ExitStack() as locks:
        disks = list(_stopped_disks(policy, vm_id, locks))
        for vg in [vg for vg, _ in disks[:1]]:
            log_filling(vg)
            vg.require_usable()
            _stop(vg, policy, [disk for _, disk in disks])


def mark_drifted(policy: Policy, vm_id: str, ran_from: Sequence[RanFrom]) -> None:
    """Mark the disks that a VM, which has stopped, has not run from in the end.

    A live snapshot or a live storage migration went past us.  The data until then are in the local disk.
    Raises StillRuns.
    """
    paths: dict[str, set[str]] = {}
    for disk in ran_from:
        paths.setdefault(disk.image_id, set()).add(disk.path)
    with ExitStack() as locks:
        for vg, found in _stopped_disks(policy, vm_id, locks):
            _mark_if_drifted(vg, found, paths.get(found.image_id, {vg.path(found.volume_id)}))


def _mark_if_drifted(vg: VolumeGroup, disk: LocalDisk, paths: set[str]) -> None:
    if disk.state is not State.READY or disk.is_stale or vg.path(disk.volume_id) in paths:
        return
    vg.require_usable()
    vg.change_tags(disk.volume_id, add={local_disk.drifted_tag(time.time())}, remove=disk.idle_tags)
    log.problem(
        "VM did not run from its local disk, which is kept",
        vm=disk.vm_id,
        disk=disk.volume_id,
        ran_from=" ".join(sorted(paths)),
    )


def _stopped_disks(policy: Policy, vm_id: str, locks: ExitStack) -> Iterator[tuple[VolumeGroup, LocalDisk]]:
    """The disks of a VM that has stopped, their locks held, but for those that a new start prepares.

    Raises StillRuns.
    """
    held = {d.volume_id for d in of_vm(read(policy), vm_id) if _try_hold(d.volume_id, locks)}
    vg = read(policy) if held else None
    disks = [d for d in of_vm(vg, vm_id) if d.volume_id in held] if vg else []
    if any(disk.is_open for disk in disks) and vm_id in libvirt.active():
        raise StillRuns(vm=vm_id)
    return ((vg, disk) for disk in disks if vg)


def _try_hold(volume_id: str, locks: ExitStack) -> bool:
    """Take a disk's lock for as long as `locks`; False if it is being prepared for a new start."""
    for _ in range(LOCK_TRIES):
        held = lock.try_hold(lock.disk_lock(volume_id))
        if held:
            locks.callback(held.release)
            return True
        time.sleep(lock.POLL)
    return False


def _stop(vg: VolumeGroup, policy: Policy, disks: list[LocalDisk]) -> None:
    """Do what a stop does with disks whose locks are held: one LVM command for each kind of change.

    All is tried; raises the first failure.
    """
    planned: dict[Stop, list[LocalDisk]] = {plan: [] for plan in Stop}
    for disk in disks:
        plan = local_disk.plan_stop(disk, policy.retention)
        planned[plan].append(disk)
        log.event("VM stopped", vm=disk.vm_id, disk=disk.volume_id, plan=plan.value)
        if disk.lv.dependents and plan is Stop.MARK_DELETING:
            others = ", ".join(disk.lv.dependents)
            log.problem("LVM would remove others along with it", disk=disk.volume_id, others=others)
    failures = []
    for step in (_mark, _remove, _keep):
        try:
            step(vg, planned)
        except CommandTimeout:  # the next would wait as long for LVM
            raise
        except Error as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _mark(vg: VolumeGroup, planned: Mapping[Stop, list[LocalDisk]]) -> None:
    """Mark what is given up before it is removed: that may fail, or take longer than we wait for it.

    The next start or gc removes a disk that was marked, or is unfinished.
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
    except (CommandFailed, CommandTimeout) as error:  # LVM removes none if one is open by now
        log.problem("left to gc", disks=" ".join(names), why=error)


def _keep(vg: VolumeGroup, planned: Mapping[Stop, list[LocalDisk]]) -> None:
    left = [*planned[Stop.KEEP], *planned[Stop.LEAVE]]
    for vm_id in {disk.vm_id for disk in left}:
        kept.note(vm_id)
    ready = [disk for disk in planned[Stop.KEEP] if disk.state is State.READY]
    # LVM deactivates snapshots along with what they are of.
    closed = [disk.volume_id for disk in left if not (disk.is_open or disk.lv.dependents)]
    if ready:
        seen = frozenset[str]().union(*(disk.unneeded_tags for disk in ready))
        marks = local_disk.stopped_tags(clock.now())
        vg.change_tags(*(disk.volume_id for disk in ready), add=marks, remove=seen - marks)
    if closed:
        vg.deactivate(*closed)
