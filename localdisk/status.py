"""What is local on this host: one snapshot, as a table or as JSON.

The JSON is `{"volume_groups": [{name, size, free, pool}], "disks": [{vm, image, volume, size, backend, state,
open, …}]}`; sizes in bytes, times in seconds since the epoch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from localdisk import lock
from localdisk.config import Config
from localdisk.disk import LocalDisk, State, local_disks, silent_pool
from localdisk.errors import CommandFailed, CommandTimeout, Error, NoVolumeGroup, VolumeGroupUnusable
from localdisk.lvm import VolumeGroup
from localdisk.units import format_duration, format_size


@dataclass(frozen=True)
class Pool:
    name: str
    size: int
    data_percent: float
    metadata_percent: float


@dataclass(frozen=True)
class Group:
    name: str
    size: int
    free: int
    pool: Pool | None


@dataclass(frozen=True)
class Row:
    """One local disk."""

    vg: str
    vm: str
    image: str
    volume: str
    size: int
    backend: str
    state: str  # unfinished | copying | ready | running | stopped | deleting
    open: bool
    stopped: int | None  # since then
    done: float | None  # of a copy that is under way, 0 to 1
    data_percent: float | None  # used data of a thin disk


@dataclass(frozen=True)
class Snapshot:
    at: int
    volume_groups: tuple[Group, ...]
    disks: tuple[Row, ...]
    problems: tuple[str, ...] = ()  # groups and pools that cannot be used or looked at, one line each


def take(config: Config) -> Snapshot:
    """Look once: one LVM command for each volume group.

    Raises NoVolumeGroup, CommandFailed and so on where no volume group can be looked at.
    """
    groups: list[VolumeGroup] = []
    failures: list[Error] = []
    for name, devices in config.volume_groups.items():
        try:
            groups.append(VolumeGroup.read(name, devices))
            groups[-1].require_usable()
            failures += _silent_pools(groups[-1], config.thin_pool)
        except (CommandFailed, CommandTimeout, NoVolumeGroup, VolumeGroupUnusable) as error:
            failures.append(error)
    if not groups:
        raise failures[0]
    return Snapshot(
        at=int(time.time()),
        volume_groups=tuple(_group(vg, config.thin_pool) for vg in groups),
        disks=tuple(_row(vg.vg_name, disk) for vg in groups for disk in local_disks(vg)),
        problems=tuple(map(str, failures)),
    )


def _silent_pools(vg: VolumeGroup, pool_name: str) -> Iterator[Error]:
    pool = vg.find(pool_name)
    if pool and pool.is_thin_pool and pool.data_percent is None:
        yield silent_pool(vg.vg_name, pool)


def as_json(snapshot: Snapshot) -> str:
    shown = {name: value for name, value in asdict(snapshot).items() if name != "problems"}
    return json.dumps(shown, indent=2) + "\n"


def as_table(snapshot: Snapshot) -> str:
    """For a reader: a line for each disk, then one for each volume group."""
    head = ("VM", "DISK", "SIZE", "BACKEND", "STATE")
    lines = _columns([head, *(_cells(row, snapshot.at) for row in snapshot.disks)])
    if not snapshot.disks:
        lines = ["no local disks"]
    return "\n".join([*lines, "", *_group_lines(snapshot)]) + "\n"


def _group(vg: VolumeGroup, pool_name: str) -> Group:
    pool = vg.find(pool_name)
    return Group(
        name=vg.vg_name,
        size=vg.vg_size,
        free=vg.vg_free,
        pool=Pool(pool.lv_name, pool.lv_size, pool.data_percent or 0.0, pool.metadata_percent or 0.0)
        if pool and pool.is_thin_pool
        else None,
    )


def _row(vg_name: str, disk: LocalDisk) -> Row:
    record = lock.read_held(lock.disk_lock(disk.volume_id))
    return Row(
        vg=vg_name,
        vm=disk.vm_id,
        image=disk.image_id,
        volume=disk.volume_id,
        size=disk.lv.lv_size,
        backend=disk.backend,
        state=_state(disk, is_locked=record is not None),
        open=disk.is_open,
        stopped=disk.stopped,
        done=_done(record),
        data_percent=disk.lv.data_percent,
    )


def _state(disk: LocalDisk, is_locked: bool) -> str:
    if disk.state is State.UNFINISHED and is_locked:
        return "copying"
    if disk.state is State.READY and disk.is_open:
        return "running"
    return disk.state.value


def _done(record: str | None) -> float | None:
    """The fraction that a lock's record tells; it may be empty or half written."""
    try:
        progress = json.loads(record or "")
        return float(progress["done"] / progress["total"])
    except (ValueError, KeyError, TypeError, ArithmeticError):
        return None


def _cells(row: Row, now: int) -> tuple[str, ...]:
    state = row.state
    if state == "copying" and row.done is not None:
        state += f" {row.done:.0%}"
    if state == "stopped" and row.stopped is not None:
        state += f" {format_duration(max(0, now - row.stopped))}"
    return (row.vm, row.volume, format_size(row.size), row.backend, state)


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _group_lines(snapshot: Snapshot) -> Iterator[str]:
    for group in snapshot.volume_groups:
        yield f"volume group {group.name}: {format_size(group.free)} of {format_size(group.size)} free"
        if group.pool:
            yield (
                f"thin pool {group.name}/{group.pool.name}: {format_size(group.pool.size)}, "
                f"data {group.pool.data_percent:.1f} %, metadata {group.pool.metadata_percent:.1f} %"
            )
