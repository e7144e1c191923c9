"""Warnings about thin pools that fill up while VMs run from them, and about metadata areas that fill up.

They are a pure function of a volume group as it was read.  `status` shows them; gc, starts and stops log them
(`log_filling`), so that the log has them even if nobody calls `status`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from localdisk import log
from localdisk.config import Config, Margins
from localdisk.errors import MetadataAreaFull, plain
from localdisk.frozen import frozen
from localdisk.units import format_size
from localdisk.volumes import template
from localdisk.volumes.local_disk import LocalDisk, State, local_disks
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup

FULL = 90.0  # percent: a pool or area that is fuller gets a warning
_SHOWN = 5  # at most so many VMs are named


@frozen
class Filling:
    """A thin pool that is nearly full and from which VMs run."""

    pool: str  # VG/LV
    parts: Mapping[str, float]  # of "data" and "metadata", those that are nearly full; percent
    left: int  # bytes of data that are free
    vm_ids: tuple[str, ...]  # the VMs whose local disks are open
    fixes: tuple[str, ...]  # what makes room, the surest first

    @property
    def percentages(self) -> str:
        return ", ".join(f"{name} {percent:.1f} %" for name, percent in self.parts.items())

    def what(self, names: Mapping[str, str]) -> str:
        """The warning as one line; `names`: the names, by UUID, of the VMs that libvirt knows."""
        shown = [f"{plain(names.get(vm_id, ''))} ({vm_id})".lstrip() for vm_id in self.vm_ids[:_SHOWN]]
        more = len(self.vm_ids) - len(shown)
        vms = ", ".join([*shown, *([f"{more} more"] if more else [])])
        left = f"{format_size(self.left)} left" if self.left else "nothing left"
        return f"thin pool {self.pool} fills up: {self.percentages} used, {left}; VMs run from it: {vms}"


def of_group(vg: VolumeGroup) -> Iterator[Filling]:
    """The thin pools of a group that are nearly full and from which VMs run."""
    for pool in vg.lvs:
        parts = _nearly_full(pool)
        if parts:
            disks = [disk for disk in local_disks(vg) if disk.lv.pool_lv == pool.lv_name]
            vm_ids = sorted({disk.vm_id for disk in disks if disk.is_open and disk.state is State.READY})
            if vm_ids:
                left = int(pool.lv_size * (1 - (pool.data_percent or 0) / 100))
                fixes = tuple(_fixes(vg, pool, parts, disks))
                yield Filling(f"{vg.vg_name}/{pool.lv_name}", parts, left, tuple(vm_ids), fixes)


def _nearly_full(pool: LogicalVolume) -> Mapping[str, float]:
    percentages = {"data": pool.data_percent, "metadata": pool.metadata_percent} if pool.is_thin_pool else {}
    return {name: percent for name, percent in percentages.items() if percent is not None and percent >= FULL}


def _fixes(
    vg: VolumeGroup, pool: LogicalVolume, parts: Mapping[str, float], disks: list[LocalDisk]
) -> Iterator[str]:
    """What makes room in the pool, the surest first."""
    grow = {"data": "--size", "metadata": "--poolmetadatasize"}
    commands = [f"lvextend {grow[part]} +SIZE {vg.vg_name}/{pool.lv_name}" for part in parts]
    has_free = vg.vg_free >= vg.vg_extent_size
    first = f"up to {format_size(vg.vg_free)} are free" if has_free else f"after vgextend {vg.vg_name} DEVICE"
    yield f"{' and '.join(commands)} ({first})"
    closed = [disk for disk in disks if not (disk.is_open or disk.lv.dependents)]
    if any(disk.state in (State.UNFINISHED, State.DELETING) for disk in closed):
        yield "localdisk gc removes what is unfinished or given up"
    kept = [disk for disk in closed if disk.state is State.STOPPED]
    if kept:
        yield f"localdisk remove DISK gives up one of {len(kept)} kept disk{'s' * (len(kept) > 1)}"
    cached = sum(each.holds for each in template.in_place(vg, pool.lv_name))
    if cached:
        yield f"cache.templates: off, then localdisk gc, removes templates of {format_size(cached)}"


def pools(vg: VolumeGroup, config: Config) -> tuple[tuple[LogicalVolume, Margins], ...]:
    """The thin pools of a group that the configuration names or that have local disks, with their margins.

    The pool of the general configuration comes first.
    """
    policies = [policy for policy in config.policies if policy.volume_group == vg.vg_name]
    margins = {config.thin_pool: config.margins}
    for policy in policies:
        margins.setdefault(policy.thin_pool, policy.margins)
    for disk in local_disks(vg):
        margins.setdefault(disk.lv.pool_lv, config.margins)
    found = ((vg.find(name), its) for name, its in margins.items())
    return tuple((pool, its) for pool, its in found if pool and pool.is_thin_pool)


def metadata_fix(vg: VolumeGroup) -> str:
    """What to do if the metadata area of the group is nearly full; "" if it is not."""
    error = str(MetadataAreaFull(vg=vg.vg_name))
    return error.partition(" : ")[2] if vg.metadata_percent >= FULL else ""


def log_filling(vg: VolumeGroup) -> None:
    """Log a warning for each thin pool that fills up, and for the metadata area."""
    for each in of_group(vg):
        vms, rest = " ".join(each.vm_ids[:_SHOWN]), "; ".join(each.fixes[1:])
        fix = {"fix": each.fixes[0], **({"or": rest} if rest else {})}  # a field has 200 characters
        log.problem("thin pool fills up", pool=each.pool, used=each.percentages, vms=vms, **fix)
    if metadata_fix(vg):
        used, left = f"{vg.metadata_percent:.1f} %", format_size(vg.vg_mda_free)
        log.problem("metadata area fills up", vg=vg.vg_name, used=used, left=left, fix="localdisk status")
