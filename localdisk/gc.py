"""Remove what no VM needs: unfinished copies, disks marked for removal, kept ones past their time.

`decide` is a pure function of what was seen; `collect` looks, decides and acts, one disk at a time, each
under its lock and after looking at it again.  In doubt a disk stays.
"""

from __future__ import annotations

import enum
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

from localdisk import domains, lock, log
from localdisk.config import Config, Policy
from localdisk.disk import LocalDisk, State, local_disks
from localdisk.errors import Error, LibvirtSilent
from localdisk.lvm import VolumeGroup
from localdisk.removal import remove
from localdisk.units import format_duration, format_size


class Action(enum.Enum):
    KEEP = "keep"
    REMOVE = "remove"


@dataclass(frozen=True)
class Witnesses:
    """What speaks for a disk; None is a witness that could not be asked."""

    is_locked: bool
    vm_is_known: bool | None  # by libvirt, in any state


@dataclass(frozen=True)
class Verdict:
    action: Action
    reason: str
    is_certain: bool = True  # False: a witness could not be asked


@dataclass(frozen=True)
class Finding:
    """One disk, what was decided, and what came of it."""

    vg_name: str
    disk: LocalDisk
    verdict: Verdict
    failure: str = ""  # why it could not be done

    @property
    def is_problem(self) -> bool:
        return bool(self.failure) or not self.verdict.is_certain


def decide(disk: LocalDisk, witnesses: Witnesses, policy: Policy, now: float) -> Verdict:
    """Whether to remove `disk`; `now` in seconds since the epoch.

    Never: what is open, locked, or kept for a VM that libvirt knows or cannot be asked about.
    """
    if disk.is_open:
        return Verdict(Action.KEEP, "in use")
    if witnesses.is_locked:
        return Verdict(Action.KEEP, "being prepared")
    if disk.state is State.UNFINISHED:
        return Verdict(Action.REMOVE, "unfinished copy that nobody works on")
    if disk.state is State.DELETING:
        return Verdict(Action.REMOVE, "marked for removal when its VM stopped")
    if disk.state is State.READY:
        return Verdict(Action.KEEP, "not marked as stopped")
    return _decide_stopped(disk, witnesses, policy, now)


def _decide_stopped(disk: LocalDisk, witnesses: Witnesses, policy: Policy, now: float) -> Verdict:
    if witnesses.vm_is_known is None:
        return Verdict(Action.KEEP, "libvirt cannot be asked about its VM", is_certain=False)
    if witnesses.vm_is_known:
        return Verdict(Action.KEEP, "libvirt knows its VM")
    since = now - (disk.stopped or 0)
    if since < 0:
        return Verdict(Action.KEEP, "stopped in the future: the clock went backwards")
    left = policy.retention.keep_for - since
    if left > 0:
        return Verdict(Action.KEEP, f"kept for another {format_duration(int(left))}")
    return Verdict(Action.REMOVE, f"stopped {format_duration(int(since))} ago, past keep_for")


def collect(config: Config, dry_run: bool = False) -> tuple[Finding, ...]:
    """Look at every local disk of the host and remove what no VM needs; one finding per disk.

    Raises NoVolumeGroup and CommandFailed where nothing can be seen at all.
    """
    known = _known_vms()
    findings = tuple(
        finding
        for name, devices in config.volume_groups.items()
        for finding in _collect_group(config, VolumeGroup.read(name, devices), known, dry_run)
    )
    if not dry_run:
        lock.sweep()
    return findings


def _known_vms() -> frozenset[str] | None:
    try:
        return domains.known()
    except LibvirtSilent as error:
        log.problem("gc asks libvirt in vain", why=error)
        return None


def _collect_group(
    config: Config, vg: VolumeGroup, known: frozenset[str] | None, dry_run: bool
) -> Iterator[Finding]:
    for disk in local_disks(vg):
        is_locked = lock.is_held(lock.disk_lock(disk.volume_id))
        finding = Finding(vg.vg_name, disk, _judge(config, disk, is_locked, known))
        if finding.verdict.action is Action.REMOVE and not dry_run:
            finding = _remove(config, vg, disk, known) or finding
        yield finding


def _judge(config: Config, disk: LocalDisk, is_locked: bool, known: frozenset[str] | None) -> Verdict:
    vm_is_known = None if known is None else disk.vm_id in known
    return decide(disk, Witnesses(is_locked, vm_is_known), config.policy(disk.vm_id), time.time())


def _remove(config: Config, vg: VolumeGroup, disk: LocalDisk, known: frozenset[str] | None) -> Finding | None:
    """Remove a disk if it still is what it was; None where it is gone meanwhile."""
    held = lock.try_hold(lock.disk_lock(disk.volume_id))
    if held is None:
        return Finding(vg.vg_name, disk, Verdict(Action.KEEP, "being prepared"))
    try:
        fresh = VolumeGroup.read(vg.vg_name, vg.devices)
        lv = fresh.find(disk.volume_id)
        again = LocalDisk.from_lv(lv) if lv else None
        if again is None:
            return None
        finding = Finding(vg.vg_name, again, _judge(config, again, False, known))
        if finding.verdict.action is Action.REMOVE:
            fresh.require_usable()
            remove(fresh, again, config.policy(again.vm_id).retention.erase, time.sleep)
            log.event("gc removed", vm=again.vm_id, disk=again.volume_id, why=finding.verdict.reason)
    except Error as error:
        log.problem("gc could not remove", disk=disk.volume_id, why=error)
        verdict = Verdict(Action.REMOVE, "could not be removed")
        return Finding(vg.vg_name, disk, verdict, failure=str(error))
    finally:
        held.release()
    return finding


# -- what the operator sees


def as_lines(findings: tuple[Finding, ...], dry_run: bool) -> str:
    """One line for each disk: name, VM, size, verdict, reason."""
    return "".join(f"{_line(finding, dry_run)}\n" for finding in findings)


def _line(finding: Finding, dry_run: bool) -> str:
    disk, verdict = finding.disk, finding.verdict
    done = {Action.KEEP: "kept", Action.REMOVE: "would be removed" if dry_run else "removed"}
    outcome = f"not removed, {finding.failure}" if finding.failure else done[verdict.action]
    size = format_size(disk.lv.lv_size)
    return f"{finding.vg_name}/{disk.volume_id}  VM {disk.vm_id}  {size}  {outcome}: {verdict.reason}"


def as_json(findings: tuple[Finding, ...]) -> str:
    """A list with one object for each disk; sizes in bytes."""
    rows = [
        {
            "vg": finding.vg_name,
            "volume": finding.disk.volume_id,
            "vm": finding.disk.vm_id,
            "image": finding.disk.image_id,
            "size": finding.disk.lv.lv_size,
            "action": finding.verdict.action.value,
            "reason": finding.verdict.reason,
            "failure": finding.failure,
        }
        for finding in findings
    ]
    return json.dumps(rows, indent=2) + "\n"
