"""Room for new volumes: whether there is enough, and if not, what must be removed and in which order.

These are removed for room, the first group first:

1. volumes that were set aside: nobody needs them, and gc would erase and remove them;
2. template LVs that nobody uses, the least recently used first: they are only copies;
3. the kept disks that this start replaces: otherwise they are removed when the new disk is complete.

Nothing of a group is removed if that would not help, as far as LVM reports it: LVM does not report which
blocks a template LV shares with the disks that started from it, so less room may come than seemed.
Everything here is a pure function of frozen data; `helper/new_volume.py` carries the plans out.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence

from localdisk.config import Margins, Policy
from localdisk.errors import (
    AllocationOff,
    CacheFull,
    Error,
    NoSpace,
    NoThinPool,
    ThinPoolAtThreshold,
    ThinPoolBroken,
    ThinPoolFull,
    ThinPoolInactive,
    ThinPoolNotZeroing,
)
from localdisk.frozen import frozen, replace
from localdisk.units import format_size
from localdisk.volumes import template
from localdisk.volumes.local_disk import OURS, UPDATING, LocalDisk, latest, local_disks
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup
from localdisk.volumes.template import Template


class Kind(enum.Enum):
    """Of volumes that can be removed for room."""

    ASIDE = "set aside"
    TEMPLATE = "template LV"
    KEPT = "kept disk"


@frozen
class Removable:
    """A volume that can be removed for room."""

    kind: Kind
    name: str  # of the LV
    lv_uuid: str
    takes: int  # bytes that its removal frees in the group or thin pool, as far as LVM reports them
    why: str = "a disk needs its room"  # it is removed, for the log


@frozen
class NewLv:
    """A volume that is to be made: its size, and the data that will be written to it; bytes."""

    size: int
    writes: int


@frozen
class Need:
    """The volumes that are to be made, the first of them now, and what may be removed for them."""

    policy: Policy
    volumes: tuple[NewLv, ...]
    template: str = ""  # the name of a template LV that is not removed: it is made now, or used
    is_template: bool = False  # the first volume is a template LV: `cache.max_size` holds for it
    kept: tuple[LocalDisk, ...] = ()  # kept disks that may be removed
    is_trial: bool = False  # nothing may be removed


@frozen
class Seen:
    """What is known of the volumes of a group beside what LVM reports."""

    locked: frozenset[str] = frozenset()  # names of template LVs that a process works on
    tried: frozenset[str] = frozenset()  # UUIDs of LVs whose removal was tried already


def plan(vg: VolumeGroup, need: Need, seen: Seen) -> tuple[Removable, ...]:
    """What to remove, in this order, until there is room; () if there is room now.

    Raises CacheFull, and the errors of `require_room`, if there will be no room whatever is removed.
    """
    over = tuple(_over_limit(vg, need, seen))
    if not over and _is_room(vg, need):
        return ()
    if need.is_trial:
        require_all(vg, need)
    names = {each.name for each in over}
    aside = tuple(_aside(vg, need, seen))
    idle = tuple(each for each in _evictable(vg, need, seen) if each.name not in names)
    kept = tuple(_kept(vg, need, seen))
    for order in ((*over,), (*over, *aside), (*over, *aside, *idle), (*over, *aside, *kept)):
        if _is_room(_without(vg, need.policy, order), need):
            return order
    every = (*over, *aside, *idle, *kept)
    require_all(_without(vg, need.policy, every), need)
    return every


def plan_below_threshold(
    vg: VolumeGroup, need: Need, seen: Seen, refused: ThinPoolAtThreshold
) -> tuple[Removable, ...]:
    """What to remove, one after the other, until LVM makes the volume that it has `refused`.

    LVM's own threshold may be lower than `margins`.  Raises `refused` if nothing is left to remove.
    """
    found = () if need.is_trial else (*_aside(vg, need, seen), *_evictable(vg, need, seen))
    if not found:
        raise refused
    return found


def can_be_made(vg: VolumeGroup, need: Need) -> bool:
    """Whether some volume could be removed for room."""
    return any(_aside(vg, need, Seen())) or any(_evictable(vg, need, Seen()))


def require_all(vg: VolumeGroup, need: Need) -> None:
    """Raise as `require_room` unless there is room for all volumes of `need`."""
    for each in need.volumes:
        require_room(vg, need.policy, each.size, each.writes)
        vg = with_more(vg, need.policy, each)


def _is_room(vg: VolumeGroup, need: Need) -> bool:
    try:
        require_all(vg, need)
    except (NoSpace, ThinPoolFull):
        return False
    return True


# -- what can be removed


def _over_limit(vg: VolumeGroup, need: Need, seen: Seen) -> Iterator[Removable]:
    """The template LVs that must be removed so that the new one fits into `cache.max_size`.

    Raises CacheFull.
    """
    if not need.is_template:
        return
    pool = need.policy.pool
    needed = need.volumes[0].writes if pool else vg.round_up(need.volumes[0].size)
    idle = _idle(vg, need, seen)
    names = {each.name for each in idle}
    used = sum(each.holds for each in template.in_place(vg, pool) if each.name not in names)
    free = template.limit(vg, need.policy.cache, pool) - used
    if needed > free:
        raise CacheFull(needed=format_size(needed), free=format_size(max(0, free)))
    for each in template.beyond(idle, free - needed):
        yield _of_template(each, "the cache is full")


def _evictable(vg: VolumeGroup, need: Need, seen: Seen) -> Iterator[Removable]:
    for each in _idle(vg, need, seen):
        yield _of_template(each, "a disk needs its room")


def _of_template(found: Template, why: str) -> Removable:
    return Removable(Kind.TEMPLATE, found.name, found.lv.lv_uuid, found.holds, why)


def _idle(vg: VolumeGroup, need: Need, seen: Seen) -> Sequence[Template]:
    """The template LVs that nobody uses, the least recently used first."""
    return [
        each
        for each in template.in_place(vg, need.policy.pool)
        if _is_free(each.lv, seen) and each.name != need.template and each.name not in seen.locked
    ]


def _aside(vg: VolumeGroup, need: Need, seen: Seen) -> Iterator[Removable]:
    """What waits to be erased, also if a process erases it at this moment; all starts take the same order."""
    for disk in sorted(local_disks(vg), key=lambda disk: disk.lv.lv_uuid):
        if disk.waits_for_erase and disk.lv.pool_lv == need.policy.pool and _is_free(disk.lv, seen):
            yield _of_disk(Kind.ASIDE, disk, vg)


def _kept(vg: VolumeGroup, need: Need, seen: Seen) -> Iterator[Removable]:
    wanted = {disk.lv.lv_uuid: (disk.vm_id, disk.image_id) for disk in need.kept}
    for disk in local_disks(vg):
        is_it = wanted.get(disk.lv.lv_uuid) == (disk.vm_id, disk.image_id)
        if is_it and disk.lv.pool_lv == need.policy.pool and disk.lv.lv_uuid not in seen.tried:
            yield _of_disk(Kind.KEPT, disk, vg)


def _of_disk(kind: Kind, disk: LocalDisk, vg: VolumeGroup) -> Removable:
    return Removable(kind, disk.volume_id, disk.lv.lv_uuid, _takes(vg, disk.lv))


def _is_free(lv: LogicalVolume, seen: Seen) -> bool:
    return not (lv.lv_device_open or lv.dependents or lv.lv_uuid in seen.tried)


def _takes(vg: VolumeGroup, lv: LogicalVolume) -> int:
    """Bytes of the group or thin pool that the removal of `lv` would free, as far as LVM reports them.

    Blocks that a thin volume may share with the template LV that it started from are not counted.
    """
    if not lv.pool_lv:
        return lv.lv_size
    origin = vg.find(lv.origin) if lv.origin else None
    return max(0, _mapped(lv) - (_mapped(origin) if origin else 0))


def _mapped(lv: LogicalVolume) -> int:
    return round(lv.lv_size * (lv.data_percent or 0) / 100)


# -- the group as it would be


def _without(vg: VolumeGroup, policy: Policy, removed: Iterable[Removable]) -> VolumeGroup:
    """The group as it would be without these volumes."""
    size = sum(each.takes for each in removed)
    if not policy.pool:
        return replace(vg, vg_free=vg.vg_free + size)
    return _with_data(vg, policy.pool, -size)


def with_more(vg: VolumeGroup, policy: Policy, new: NewLv) -> VolumeGroup:
    """The group as it would be with one more volume."""
    if not policy.pool:
        return replace(vg, vg_free=vg.vg_free - vg.round_up(new.size))
    return _with_data(vg, policy.pool, new.writes)


def _with_data(vg: VolumeGroup, pool: str, more: int) -> VolumeGroup:
    lvs = tuple(
        replace(lv, data_percent=max(0.0, lv.data_percent + 100 * more / lv.lv_size))
        if lv.lv_name == pool and lv.data_percent is not None
        else lv
        for lv in vg.lvs
    )
    return replace(vg, lvs=lvs)


# -- the limits


def require_room(vg: VolumeGroup, policy: Policy, size: int, writes: int) -> None:
    """Raise if a new disk of `size` bytes, with `writes` bytes of data, would pass a limit of `margins`.

    Raises VolumeGroupUnusable; for backend lvm NoSpace (AllocationOff); for backend lvmthin NoThinPool,
    ThinPoolNotZeroing, ThinPoolInactive, ThinPoolBroken, ThinPoolFull.
    """
    vg.require_usable()
    if policy.pool:
        _require_thin_room(vg, policy.pool, policy.margins, writes)
    else:
        _require_thick_room(vg, policy.margins, size)


def _require_thick_room(vg: VolumeGroup, margins: Margins, size: int) -> None:
    needed, reserve = vg.round_up(size), margins.reserve.of(vg.vg_size)
    missing = needed + reserve - vg.vg_free
    if missing > 0:
        if vg.unallocatable:
            raise AllocationOff(
                vg=vg.vg_name,
                missing=format_size(missing),
                needed=format_size(needed),
                free=format_size(vg.vg_free),
                devices=" ".join(vg.unallocatable),
            )
        raise NoSpace(
            vg=vg.vg_name,
            missing=format_size(missing),
            needed=format_size(needed),
            free=format_size(vg.vg_free),
            reserve=format_size(reserve),
        )


def _require_thin_room(vg: VolumeGroup, pool_name: str, margins: Margins, writes: int) -> None:
    pool = vg.find(pool_name)
    if pool is None or not pool.is_thin_pool:
        raise NoThinPool(vg=vg.vg_name, pool=pool_name)
    if not pool.zero:
        raise ThinPoolNotZeroing(vg=vg.vg_name, pool=pool_name)
    if pool.data_percent is None or pool.metadata_percent is None:
        raise silent_pool(vg.vg_name, pool)
    promised = sum(_still_to_write(lv) for lv in vg.lvs if lv.pool_lv == pool_name)
    would = pool.data_percent + 100 * (writes + promised) / pool.lv_size
    for limit, value, allowed in (
        ("thin_data", would, margins.thin_data),
        ("thin_metadata", pool.metadata_percent, margins.thin_metadata),
    ):
        if value > allowed:
            raise ThinPoolFull(
                vg=vg.vg_name, pool=pool_name, limit=limit, would=f"{value:.1f} %", allowed=f"{allowed:g} %"
            )


def silent_pool(vg: str, pool: LogicalVolume) -> Error:
    """The error for a thin pool of which LVM reports no usage."""
    return (ThinPoolBroken if pool.lv_active else ThinPoolInactive)(vg=vg, pool=pool.lv_name)


def _still_to_write(lv: LogicalVolume) -> float:
    """Bytes of data that an unfinished copy has not written yet."""
    if not {OURS, UPDATING} <= lv.lv_tags:
        return 0
    writes = latest(lv.tag_values["WRITES"]) or 0
    return max(0.0, writes - lv.lv_size * (lv.data_percent or 0) / 100)
