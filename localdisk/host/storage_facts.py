"""Collects what `check` must know about volume groups, from LVM, device-mapper and udev.  Changes nothing."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping

from localdisk import device_mapper
from localdisk.errors import CommandFailed, NoVolumeGroup
from localdisk.frozen import field, frozen
from localdisk.ids import is_uuid
from localdisk.volumes import lvm
from localdisk.volumes.local_disk import OURS, LocalDisk, local_disks
from localdisk.volumes.lvm import VolumeGroup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

    Owner = tuple[Optional[int], Optional[int]]  # numbers of user and group; None: it does not exist


@frozen
class LvmSettings:
    """Settings of the host's LVM configuration."""

    use_devices_file: bool
    autoextend_threshold: int  # percent; 100: thin pools do not grow by themselves
    scan_lvs: bool = False  # whether LVM looks for volume groups inside of logical volumes
    volume_list: tuple[str, ...] | None = None  # what it activates; None: everything
    read_only_volume_list: tuple[str, ...] | None = None  # what it activates for reading
    filters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # devices/filter, global_filter


@frozen
class Multipath:
    """A multipath device under a volume group."""

    name: str  # of its mapping
    wwid: str


@frozen
class PoolWatch:
    """What LVM does if a thin pool fills up."""

    error_when_full: bool
    is_monitored: bool


@frozen
class Group:
    """A volume group of the configuration; `vg` None: LVM does not see it."""

    name: str
    devices: tuple[str, ...]
    vg: VolumeGroup | None
    hidden: tuple[str, ...] = ()  # its physical volumes that LVM's devices file or filter hides
    duplicates: tuple[str, ...] = ()  # further devices with the same content as its physical volumes
    multipaths: tuple[Multipath, ...] = ()
    pools: Mapping[str, PoolWatch] = field(default_factory=dict)
    no_discard: tuple[str, ...] = ()  # its physical volumes that cannot discard
    misowned: tuple[str, ...] = ()  # nodes of active local disks that are not vdsm:qemu, mode 0660

    @property
    def disks(self) -> tuple[LocalDisk, ...]:
        return local_disks(self.vg) if self.vg else ()


def settings() -> LvmSettings:
    """Read the settings.  Raises CommandFailed, CommandTimeout."""
    # --mergedconfig: the host's configuration, too, not only `--config`.
    out = lvm.call(["lvm", "lvmconfig", "--typeconfig", "full", "--mergedconfig", "devices", "activation"])
    values = dict(re.findall(r"^\s*(\w+)=\[?(.*?)\]?\s*$", out, re.M))
    return LvmSettings(
        use_devices_file=values.get("use_devicesfile", "0") == "1",  # absent before LVM 2.03.12
        autoextend_threshold=int(values.get("thin_pool_autoextend_threshold", "100")),
        scan_lvs=values.get("scan_lvs", "1") == "1",  # absent before LVM 2.03, which scans them
        volume_list=_list(values.get("volume_list")),
        read_only_volume_list=_list(values.get("read_only_volume_list")),
        filters={name: _list(values.get(name)) or () for name in ("filter", "global_filter")},
    )


def _list(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(re.findall(r'"([^"]*)"', text))


def collect(name: str, devices: tuple[str, ...], uses_devices_file: bool, owner: Owner) -> Group:
    """Collect the facts of one volume group; `owner`: the owner that its local disks should have.

    Raises VolumeGroupUnusable for a shared group, CommandFailed, CommandTimeout.
    """
    options = ["--devices", ",".join(devices)] if devices else []
    try:
        vg = VolumeGroup.read(name, devices)
    except NoVolumeGroup:
        vg = None
    rows = lvm.physical_volumes(*options)
    seen, there = _devices_of(name, rows), tuple[str, ...]()
    if uses_devices_file:
        there = _devices_of(name, lvm.physical_volumes("--devicesfile", ""))
    elif not devices and (vg is None or vg.vg_partial):
        there = _devices_of(name, lvm.physical_volumes(config=lvm.SEE_ALL))
    candidates = [*seen, *(device for device in devices if device not in seen)]
    multipaths = {found for device in candidates for found in _multipaths(device)}
    has_pools = vg is not None and any(lv.is_thin_pool for lv in vg.lvs)
    return Group(
        name=name,
        devices=devices,
        vg=vg,
        hidden=tuple(device for device in there if device not in seen),
        duplicates=_devices_of(name, rows, "duplicate"),
        multipaths=tuple(sorted(multipaths, key=lambda found: found.name)),
        pools=_pools(name, options) if has_pools else {},
        no_discard=tuple(device for device in seen if not device_mapper.can_discard(device)),
        misowned=tuple(_misowned(vg, owner)) if vg else (),
    )


def _devices_of(vg_name: str, rows: Iterable[Mapping[str, str]], duplicate: str = "") -> tuple[str, ...]:
    """The devices of a group's physical volumes; with `duplicate` those that LVM does not use."""
    found = (row["pv_name"] for row in rows if (row["vg_name"], row["pv_duplicate"]) == (vg_name, duplicate))
    return tuple(name for name in found if name.startswith("/"))  # a missing one is "[unknown]"


def _pools(vg_name: str, options: list[str]) -> dict[str, PoolWatch]:
    columns = "lv_name,lv_when_full,seg_monitor"
    rows = _report(["lvm", "lvs", "--reportformat", "json", "-o", columns, *options, vg_name], "lv")
    return {
        row["lv_name"]: PoolWatch(row["lv_when_full"] == "error", row["seg_monitor"] == "monitored")
        for row in rows
    }


def unnamed_groups(named: Iterable[str]) -> dict[str, int]:
    """How many local disks and template LVs each group has that the configuration does not name.

    Disks of vdsm's older hook are not among them: they lack the tag.  Raises CommandFailed, CommandTimeout.
    """
    columns = ["-o", "vg_name,lv_name", "-S", f'lv_tags="{OURS}"']
    rows = _report(["lvm", "lvs", "--reportformat", "json", *columns], "lv")
    names = [row["vg_name"] for row in rows if is_uuid(row["lv_name"]) and row["vg_name"] not in named]
    return {name: names.count(name) for name in sorted(set(names))}


def _report(argv: list[str], kind: str) -> list[dict[str, str]]:
    out = lvm.call(argv)
    try:
        rows: list[dict[str, str]] = json.loads(out)["report"][0][kind]
    except (ValueError, KeyError, IndexError, TypeError):
        raise CommandFailed(tuple(argv), 0, f"it printed {out[:80]!r}") from None
    return rows


def _multipaths(device: str) -> Iterator[Multipath]:
    """The multipath devices that `device` is, is on, or is a path of."""
    name = os.path.basename(os.path.realpath(device))
    for mapping in (name, *device_mapper.holders(name), *_below(name)):
        dm_name, uuid = device_mapper.name_and_uuid(mapping)
        if uuid.startswith("mpath-"):
            yield Multipath(dm_name, uuid[len("mpath-") :])


def _below(name: str) -> Iterator[str]:
    for lower in device_mapper.slaves(name):
        yield lower
        yield from _below(lower)


def _misowned(vg: VolumeGroup, owner: Owner) -> Iterator[str]:
    if None in owner:  # a missing user or group is a finding of its own
        return
    for disk in local_disks(vg):
        path = vg.path(disk.volume_id)
        if disk.lv.lv_active and _mode(path) != (*owner, 0o660):
            yield path


def _mode(path: str) -> tuple[int, int, int] | None:
    """User, group and permissions of a device node; None if it is missing."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)
