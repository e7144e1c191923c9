"""LVM: one volume group as an immutable snapshot, and the few commands that change it.

A snapshot is read with one `lvm fullreport` (LVM 2.02.158 and later): the group, its logical volumes and its
pools' segments in one command and under one lock.  Fields have the names of LVM's report columns.
Nothing in this module knows local disks; `local_disk.py` describes them.  But before a command changes the
tags or the name of a volume, or removes it, what is recorded of the volume is removed (`ready.py`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

from localdisk import daemons, device_mapper, holders, ready, run
from localdisk.errors import (
    CommandFailed,
    CommandMissing,
    CommandTimeout,
    Error,
    LvmFailed,
    LvmLocked,
    MetadataAreaFull,
    NoVolumeGroup,
    ThinPoolAtThreshold,
    ThinPoolUnusable,
    UdevdGone,
    VolumeGroupHidden,
    VolumeGroupUnusable,
)
from localdisk.frozen import frozen, once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

REPORT = {
    "vg": "vg_name,vg_uuid,vg_size,vg_free,vg_extent_size,vg_partial,vg_exported,vg_lock_type,"
    "vg_mda_size,vg_mda_free",
    "lv": "lv_name,lv_uuid,lv_size,lv_time,lv_tags,lv_device_open,lv_active,lv_permissions,lv_layout,lv_role,"
    "pool_lv,origin,data_percent,metadata_percent,kernel_discards",
    "seg": "lv_name,zero,chunk_size",
    "pv": "pv_name,pv_free",
    # This report cannot be switched off; SELECT makes it empty.
    "pvseg": "pvseg_start",
}
# lvm2, lib/format_text/format-text.c: the first message since 2.03.09, the other one before.
_METADATA_FULL = (
    r"VG (\S+) \d+ metadata on .* (?:exceeds maximum metadata size|too large for circular buffer)"
)
_ORIGINS = {"thickorigin", "multithickorigin", "extthinorigin", "multiextthinorigin"}
_NO_WIPE = ("--wipesignatures", "n")  # old signatures are left; lvcreate refuses the option for snapshots
# Settings that shape the messages and reports that are read here (lvm.conf(5), "log" and "report"), and a
# limit for LVM's archive.  `--config` overrides these keys only: the administrator's settings of devices,
# filters, locking and activation still apply.
SETTINGS = (
    'log{command_names=0 prefix="  " indent=0 silent=0 verbose=0 activation=0 report_command_log=0} '
    'report{output_format="basic" compact_output=0 compact_output_cols="" aligned=1 buffered=1 headings=1 '
    'separator=" " list_item_separator="," prefixes=0 quoted=1 columns_as_rows=0 binary_values_as_numeric=0 '
    'time_format="%s" mark_hidden_devices=1 two_word_unknown_device=0 '  # times in seconds since the epoch
    'lvs_sort="vg_name,lv_name" pvs_sort="pv_name" vgs_sort_full="vg_name" lvs_sort_full="vg_name,lv_name" '
    'pvs_sort_full="pv_name" segs_sort_full="lv_uuid,seg_start" pvsegs_sort_full="pv_uuid,pvseg_start"} '
    # By default LVM archives a group's metadata before each change, and keeps the archives for 30 days: with
    # a thousand disks, 3 files of 600 KB for each start and stop.  The limit applies to the changed group
    # only.
    "backup{retain_min=50 retain_days=0} "
    # Without both, LVM does not wait for udev, and the rule that gives a local disk to vdsm does not work.
    "activation{udev_sync=1 udev_rules=1}"
)
# Before a report, LVM reads its own backup file of the group, which is as long as the metadata, and writes
# the file anew if it is not current.  A command that only looks need not do that: each change writes it.
LOOKS_ONLY = "backup{backup=0 archive=0}"
SELECT = {"seg": "segtype=thin-pool", "pv": "pv_allocatable=0", "pvseg": "pv_name=none"}
LOCKS = "/run/lock/lvm"
_IS_USABLE = "vg_partial=0 && vg_exported=0"  # of `VolumeGroup.require_usable`, for --select
MIN_CHUNK = 64 * 1024  # bytes; the smallest block of a thin pool, of which all others are multiples
SEE_ALL = 'devices{filter=["a|.*|"] global_filter=["a|.*|"]}'  # overrides the host's filters
_HIDING = {
    "filter": (
        (),
        SEE_ALL,
        "let devices/filter and devices/global_filter accept it (lvmconfig devices shows them)",
    ),
    "devices file": (("--devicesfile", ""), "", "vgimportdevices {vg}"),
}

# Why LVM refuses to work in a group: what is wrong, and what to do.  _REASONS finds them by LVM's message.
_LEFT_INACTIVE = (
    "left inactive by LVM, whose activation/volume_list lacks it",
    "add {vg} to volume_list (lvmconfig activation/volume_list shows it, lvm.conf or lvmlocal.conf has it)",
)
_TWINS = (
    "one of several of that name, of which LVM uses none",
    "vgs -o vg_name,vg_uuid,pv_name, then vgrename UUID NEW_NAME for the other one",
)
_ANOTHERS = (
    "another host's, its system ID is {id}",
    "if no other host uses it: "
    """vgchange -y --config 'local{{extra_system_ids=["{id}"]}}' --systemid {own} {vg}""",
)
_ANOTHERS_HERE_NONE = (
    "another host's, its system ID is {id} and this host has none",
    'if no other host uses it: set global/system_id_source = "lvmlocal" in lvm.conf and '
    'local/system_id = "{id}" in lvmlocal.conf',
)
_DUPLICATES = (
    "on a physical volume that LVM sees on several devices",
    "hide the copy from LVM (pvs -a -o +pv_duplicate): lvmdevices --deldev DEVICE, or devices/global_filter",
)
_REASONS = (
    (r"(?:Volume|thin pool) (?P<vg>[^\s/]+)/.*volume_list", _LEFT_INACTIVE),
    (r"with the same name: skipping (?P<vg>\S+)", _TWINS),
    (r"VG (?P<vg>\S+) with system ID (?P<id>\S+) with local system ID (?P<own>[^\s.]+)", _ANOTHERS),
    (r"VG (?P<vg>\S+) with system ID (?P<id>\S+) with unknown local", _ANOTHERS_HERE_NONE),
    (r"(?:VG|volume group) (?P<vg>\S+) (?:while PVs appear on|with) duplicate", _DUPLICATES),
)

# What ends a failure, by the message in which LVM names the cause.
_REMOUNT = "mount -o remount,rw $(findmnt -no TARGET -T {path})"
_FIXES = (
    (
        r"Parse error .*\s+Failed to load config file (?P<file>\S+)",  # LVM prints both lines
        "correct what is wrong in {file}: lvmconfig shows it as long as it is there",
    ),
    (
        r"archive volume group metadata for \S+ to read-only|(/archive|/archive/\S*|archive): .*Read-only",
        _REMOUNT.format(path="/etc/lvm/archive"),
    ),
    (r"/archive/\S* .*No space left", "make room where LVM keeps old metadata: df -h /etc/lvm/archive"),
    (r"File locking initialisation failed", _REMOUNT.format(path="/run/lock/lvm")),
    (
        r"create ioctl on (?P<name>\S+) .*Device or resource busy",
        "if nothing needs the mapping of that name (dmsetup info {name}): dmsetup remove {name}",
    ),
    (
        r"Maximum number of logical volumes \(\d+\) reached in volume group (?P<vg>\S*[^\s.])",
        "vgchange --logicalvolume 0 {vg}",
    ),
    (r"maximum number of semaphores", "raise the fourth number of kernel.sem: sysctl kernel.sem; ipcs -s"),
    (r": not found: device not cleared", device_mapper.NO_NODE),
)


class _Values(dict[str, tuple[str, ...]]):
    def __missing__(self, _name: str) -> tuple[str, ...]:
        return ()


@frozen
class LogicalVolume:
    """One row of `lvs`; sizes in bytes, percentages 0 to 100 or None if LVM shows none."""

    lv_name: str
    lv_uuid: str
    lv_size: int
    lv_time: int  # when it was made, by the clock at that time; seconds since the epoch; 0: not known
    lv_tags: frozenset[str]
    lv_device_open: bool
    lv_active: bool
    lv_permissions: str  # "writeable", "read-only", …
    lv_layout: frozenset[str]
    pool_lv: str  # thin volume: its thin pool; "" for others
    data_percent: float | None
    metadata_percent: float | None
    kernel_discards: str  # active thin pool: "passdown", "nopassdown" or "ignore"; "" for others
    zero: bool  # thin pool: whether new blocks read as zeros
    chunk_size: int = 0  # thin pool: bytes of one block; 0 for others
    dependents: tuple[str, ...] = ()  # the volumes that LVM would remove or change together with it
    origin: str = ""  # the volume that it is a snapshot of, if that still exists

    @classmethod
    def from_report(
        cls, row: dict[str, str], pool: dict[str, str] | None, dependents: tuple[str, ...] = ()
    ) -> LogicalVolume:
        """From a row of the `lv` report and, for a thin pool, its row of the `seg` report."""
        return cls(
            lv_name=row["lv_name"],
            lv_uuid=row["lv_uuid"],
            lv_size=_bytes(row["lv_size"]),
            lv_time=_bytes(row["lv_time"] or "0"),
            lv_tags=_words(row["lv_tags"]),
            # LVM may print "unknown": an inactive volume cannot be open, an active volume counts as open.
            lv_device_open=row["lv_active"] != "" and row["lv_device_open"] != "",
            lv_active=row["lv_active"] != "",
            lv_permissions=row["lv_permissions"],
            lv_layout=_kinds(row["lv_layout"]),
            pool_lv=row["pool_lv"] if "thin" in row["lv_layout"] else "",  # not a cache pool
            data_percent=_percent(row["data_percent"]),
            metadata_percent=_percent(row["metadata_percent"]),
            kernel_discards=row["kernel_discards"],
            zero=pool is not None and pool["zero"] == "zero",
            chunk_size=_bytes(pool["chunk_size"]) if pool else 0,
            dependents=dependents,
            origin=row["origin"],
        )

    @property
    @once
    def tag_values(self) -> Mapping[str, Sequence[str]]:
        """The values of tags `NAME_VALUE`, by name: `STOPPED_17` is {"STOPPED": ("17",)}; of others, ()."""
        values = _Values()
        for tag in self.lv_tags:
            name, _, value = tag.partition("_")
            values[name] = (*values[name], value)
        return values

    @property
    def is_thin_pool(self) -> bool:
        return {"thin", "pool"} <= self.lv_layout


@frozen
class VolumeGroup:
    """One volume group as it was when it was read; sizes in bytes.

    The methods under "commands" change the real group, not this object.
    """

    vg_name: str
    vg_uuid: str
    vg_size: int
    vg_free: int  # without what is free on `unallocatable` physical volumes, which LVM counts, too
    vg_extent_size: int
    vg_partial: bool
    vg_exported: bool
    vg_lock_type: str
    vg_mda_size: int  # of the smallest metadata area
    vg_mda_free: int  # of the fullest metadata area
    lvs: tuple[LogicalVolume, ...]
    devices: tuple[str, ...] = ()
    unallocatable: tuple[str, ...] = ()  # physical volumes with free space that LVM uses for nothing

    @classmethod
    def read(cls, vg_name: str, devices: tuple[str, ...] = ()) -> VolumeGroup:
        """Read a group with LVM; `devices`: the only devices that LVM may use, () for all.

        Raises NoVolumeGroup, VolumeGroupUnusable, CommandFailed, CommandTimeout.
        """
        argv = ["lvm", "fullreport", "--reportformat", "json", "--units", "b", "--nosuffix"]
        for report, columns in REPORT.items():
            argv += ["--configreport", report, "-o", columns]
            if report in SELECT:
                argv += ["-S", SELECT[report]]
        try:
            text = call([*argv, *_devices(devices), vg_name], LOOKS_ONLY)
        except CommandFailed as error:
            if f'Volume group "{vg_name}" not found' in error.stderr:
                raise _not_found(vg_name) from None
            shared = re.search(r"with lock type (\w+) that requires lvmlockd", error.stderr)
            if shared:
                raise _shared(vg_name, shared[1]) from None
            raise _explained(error) from None
        return cls.from_report(text, devices)

    @classmethod
    def from_report(cls, text: str, devices: tuple[str, ...] = ()) -> VolumeGroup:
        """From the JSON of `lvm fullreport` for one group.  Raises CommandFailed if it is not understood."""
        try:
            report = json.loads(text)["report"][0]
            (vg,) = report["vg"]
            pools = {row["lv_name"]: row for row in report["seg"]}
            rows = report["lv"]
            snapshots = _by_origin(rows)
            closed = {row["pv_name"]: _bytes(row["pv_free"]) for row in report["pv"]}
            return cls(
                vg_name=vg["vg_name"],
                vg_uuid=vg["vg_uuid"],
                vg_size=_bytes(vg["vg_size"]),
                vg_free=max(0, _bytes(vg["vg_free"]) - sum(closed.values())),
                vg_extent_size=_bytes(vg["vg_extent_size"]),
                vg_partial=vg["vg_partial"] != "",
                vg_exported=vg["vg_exported"] != "",
                vg_lock_type=vg["vg_lock_type"],
                vg_mda_size=_bytes(vg["vg_mda_size"]),
                vg_mda_free=_bytes(vg["vg_mda_free"]),
                lvs=tuple(
                    LogicalVolume.from_report(
                        row,
                        pools.get(row["lv_name"]),
                        tuple(_dependents(row, snapshots.get(row["lv_name"], ()))),
                    )
                    for row in rows
                ),
                devices=devices,
                unallocatable=tuple(name for name, free in closed.items() if free),
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            problem = f"its report is not understood ({type(error).__name__}: {error})"
            raise CommandFailed(("lvm", "fullreport"), 0, problem) from None

    @property
    def metadata_percent(self) -> float:
        """How full the metadata area is, in which LVM describes the group as text; 0 to 100.

        LVM writes each new text beside the old one, so a text can take at most half of the area.
        """
        return 100 * (1 - 2 * self.vg_mda_free / self.vg_mda_size) if self.vg_mda_size else 0.0

    def find(self, lv_name: str) -> LogicalVolume | None:
        return next((lv for lv in self.lvs if lv.lv_name == lv_name), None)

    def chunk(self, pool: str) -> int:
        """Bytes of a block of this thin pool; 0 if `pool` is ""."""
        found = self.find(pool) if pool else None
        return (found.chunk_size if found else 0) or (MIN_CHUNK if pool else 0)

    def path(self, lv_name: str) -> str:
        """The device node of a logical volume; it exists while the volume is active."""
        return f"/dev/{self.vg_name}/{lv_name}"

    def round_up(self, size: int) -> int:
        """`size` bytes as whole extents, as `lvcreate` rounds."""
        return -(-size // self.vg_extent_size) * self.vg_extent_size

    def require_usable(self) -> None:
        """Raise VolumeGroupUnusable if no disk of the group may be made or changed."""
        if self.vg_exported:
            raise VolumeGroupUnusable(vg=self.vg_name, problem="exported", fix=f"vgimport {self.vg_name}")
        if self.vg_partial:
            raise VolumeGroupUnusable(
                vg=self.vg_name,
                problem="missing a physical volume",
                # If the group was changed meanwhile, LVM still counts the device as missing when it is back.
                fix=f"bring the device back (and vgextend --restoremissing {self.vg_name} DEVICE), "
                f"or vgreduce --removemissing {self.vg_name}",
            )
        if self.vg_lock_type not in ("", "none"):
            raise _shared(self.vg_name, self.vg_lock_type)

    # -- commands

    def create_thick(self, lv_name: str, size: int, tags: Iterable[str]) -> None:
        """Create and activate a preallocated volume of `size` bytes with these tags, in one commit.

        LVM zeroes only the first 4 KiB; the rest has old data of the device.
        """
        self._create(lv_name, tags, *_NO_WIPE, "--zero", "y", "--size", f"{_sectors(size)}b", self.vg_name)

    def create_thin(self, lv_name: str, size: int, pool: str, tags: Iterable[str]) -> None:
        """Create and activate a thin volume of `size` bytes in `pool` with these tags, in one commit.

        Raises ThinPoolUnusable, and ThinPoolAtThreshold if the pool is too full for LVM: LVM's own limits may
        be lower than the margins of the configuration.
        """
        size_and_place = ("--virtualsize", f"{_sectors(size)}b", "--thinpool", f"{self.vg_name}/{pool}")
        try:
            self._create(lv_name, tags, *_NO_WIPE, *size_and_place)
        except CommandFailed as error:
            raise _at_threshold(error, self.vg_name, pool) from None

    def create_snapshot(self, lv_name: str, origin: str, tags: Iterable[str]) -> None:
        """Create and activate a writable thin snapshot of `origin` with these tags, in one commit.

        Raises ThinPoolAtThreshold, ThinPoolUnusable.
        """
        try:
            self._create(lv_name, tags, "--permission", "rw", "--snapshot", self._full_name(origin))
        except CommandFailed as error:
            raise _at_threshold(error, self.vg_name, self._pool_of(origin)) from None

    def _pool_of(self, lv_name: str) -> str:
        lv = self.find(lv_name)
        return lv.pool_lv if lv else ""

    def extend(self, lv_name: str, size: int) -> None:
        """Make an active volume at least `size` bytes large."""
        option = ["--size", f"{_sectors(size)}b"]
        call(["lvextend", "--quiet", *option, *_devices(self.devices), self._full_name(lv_name)])

    def _create(self, lv_name: str, tags: Iterable[str], *rest: str) -> None:
        # --setactivationskip: do not activate it at boot (LVM 2.03.16 refuses --setautoactivation for thin
        # volumes); --ignoreactivationskip: activate it now all the same.
        argv = ["lvcreate", "--quiet", "--yes", "--name", lv_name]
        argv += ["--setactivationskip", "y", "--ignoreactivationskip"]
        device_mapper.require_no_file(self.path(lv_name))
        try:
            call([*argv, *_repeat("--addtag", tags), *_devices(self.devices), *rest])
        except CommandFailed as error:
            raise _explained(error) from None

    def change_tags(self, *lv_names: str, add: Iterable[str] = (), remove: Iterable[str] = ()) -> None:
        """Add and remove tags, in one commit for each volume; to remove an absent tag is no error."""
        tags = [*_repeat("--deltag", remove), *_repeat("--addtag", add)]
        names = map(self._full_name, lv_names)
        _change(["lvchange", "--quiet", *tags, *_devices(self.devices), *names], *lv_names)

    def remove_tags(self, lv_name: str, lv_uuid: str, remove: Iterable[str], having: Iterable[str]) -> bool:
        """Remove tags of the volume if it still has this UUID and all the tags `having`, in a whole group.

        LVM looks and changes under one lock, in one commit.  False: LVM does not say that it changed the
        volume, perhaps because the administrator has switched its messages off (`_change`).
        """
        tags = " && ".join(f'"{tag}"' for tag in sorted(having))
        selection = ["--select", f"lv_uuid={lv_uuid} && lv_tags={{{tags}}} && {_IS_USABLE}"]
        name = self._full_name(lv_name)
        argv = ["lvchange", "--yes", *_repeat("--deltag", remove), *selection, *_devices(self.devices), name]
        return f"{name} changed" in _change(argv, lv_name)

    def mark(
        self, *lv_names: str, add: frozenset[str], remove: frozenset[str], spare: frozenset[str]
    ) -> None:
        """Change tags; if the metadata area is full for that, remove tags that can be spared before.

        Two commands, because the command line is in the area, too (`_change`): each is short.  Raises
        MetadataAreaFull if that is not enough.
        """
        try:
            self.change_tags(*lv_names, add=add, remove=remove)
        except MetadataAreaFull:
            if not spare:
                raise
            self.change_tags(*lv_names, remove=remove | spare)
            self.change_tags(*lv_names, add=add)

    def activate(self, lv_name: str) -> None:
        argv = ["lvchange", "--quiet", "--activate", "y", "--ignoreactivationskip"]
        try:
            call([*argv, *_devices(self.devices), self._full_name(lv_name)])
        except CommandFailed as error:
            raise _explained(error) from None

    def seal(self, lv_name: str, add: Iterable[str], remove: Iterable[str]) -> None:
        """Make a volume read-only, now and whenever it is activated, and change its tags, in one commit."""
        tags = [*_repeat("--deltag", remove), *_repeat("--addtag", add)]
        argv = ["lvchange", "--quiet", "--permission", "r", *tags]
        call([*argv, *_devices(self.devices), self._full_name(lv_name)])

    def set_writable(self, lv_name: str) -> None:
        """Undo the first half of `seal`."""
        argv = ["lvchange", "--quiet", "--permission", "rw"]
        call([*argv, *_devices(self.devices), self._full_name(lv_name)])

    def deactivate(self, *lv_names: str) -> None:
        names = map(self._full_name, lv_names)
        call(["lvchange", "--quiet", "--activate", "n", *_devices(self.devices), *names])

    def remove(self, *lv_names: str) -> None:
        """Remove volumes; if one of them is open ("in use") or does not exist, LVM removes none."""
        names = map(self._full_name, lv_names)
        _change(["lvremove", "--quiet", "--yes", *_devices(self.devices), *names], *lv_names)

    def rename(self, lv_name: str, new_name: str) -> None:
        argv = ["lvrename", "--quiet", *_devices(self.devices), self.vg_name, lv_name, new_name]
        _change(argv, lv_name, new_name)

    def discard(self, lv_name: str, start: int, length: int) -> None:
        """Discard `length` bytes of an active volume from byte `start` on."""
        self._blkdiscard(lv_name, start, length)

    def zero(self, lv_name: str, start: int, length: int) -> None:
        """Write zeros over `length` bytes of an active volume from byte `start` on, and sync."""
        self._blkdiscard(lv_name, start, length, "--zeroout")

    def _blkdiscard(self, lv_name: str, start: int, length: int, *options: str) -> None:
        place = ["--offset", str(start), "--length", str(length), self.path(lv_name)]
        run.run(["blkdiscard", *options, *place], deadline=3600)

    def dm_uuid(self, lv_name: str) -> str:
        """The device-mapper UUID of an active volume's device, which is checked to be of this group.

        It is `LVM-` and the UUIDs of group and volume without dashes (lvm2, lib/activate/dev_manager.c).
        Raises DeviceNotReady; VolumeGroupUnusable if LVM has silently not activated the volume.
        """
        path = self.path(lv_name)
        try:
            uuid = device_mapper.read_uuid(os.stat(path).st_rdev)
        except OSError as error:
            self._require_active(lv_name)
            raise device_mapper.not_ready(path, error) from None
        if not uuid.startswith("LVM-" + self.vg_uuid.replace("-", "")):
            raise device_mapper.another_device(path, f"({uuid})")
        return uuid

    def _require_active(self, lv_name: str) -> None:
        """Raise VolumeGroupUnusable if a volume that was to be activated is not active.

        If activation/volume_list does not list the group, `lvchange --activate y`, and `lvcreate` of a thin
        volume in an active pool, print nothing and exit with 0 (LVM 2.03.16).
        """
        try:
            lv = VolumeGroup.read(self.vg_name, self.devices).find(lv_name)
        except Error:  # the caller reports the missing device node
            return
        if lv and not lv.lv_active:
            raise _unusable({"vg": self.vg_name}, _LEFT_INACTIVE)

    def _full_name(self, lv_name: str) -> str:
        return f"{self.vg_name}/{lv_name}"


def call(argv: Sequence[str], config: str = "") -> str:
    """Run an LVM command with SETTINGS and `config`; returns its standard output.

    `--config` is inserted after the second word of `argv`: `lvm fullreport`, `lvs --readonly`.
    Raises MetadataAreaFull, CommandTimeout (UdevdGone), CommandMissing, and CommandFailed with `argv` without
    `--config`.
    """
    return _run([*argv[:2], "--config", f"{SETTINGS} {config}".strip(), *argv[2:]], argv)


def _change(argv: Sequence[str], *lv_names: str) -> str:
    """Run a command that removes, renames or marks these volumes, also if the area is full for SETTINGS.

    LVM writes the command line into the metadata, too (2.03.16, "description"), and SETTINGS are a thousand
    bytes of it.  In a group that others have filled, lvremove needs more room than it makes.  The settings
    shape what LVM prints, which is not read here.  Commands that make or enlarge a volume are not repeated:
    the thousand bytes that they leave are the room for these commands.
    Raises RunUnwritable, too.
    """
    ready.forget(lv_names)
    try:
        return call(argv)
    except MetadataAreaFull:
        return _run(argv, argv)


def _run(argv: Sequence[str], told: Sequence[str]) -> str:
    """Run an LVM command, which errors name by the words `told`."""
    try:
        return run.run(argv)
    except CommandFailed as error:
        full = re.search(_METADATA_FULL, error.stderr)
        if full:
            raise MetadataAreaFull(vg=full[1]) from None
        raise _failed(tuple(told), error) from None
    except CommandTimeout as error:
        if run.is_spent() or daemons.udevd_runs():
            raise _locked(told[-1].partition("/")[0], error) from None
        raise UdevdGone(tool=error.fields["tool"], seconds=error.fields["seconds"]) from None


def _failed(argv: tuple[str, ...], error: CommandFailed) -> CommandFailed:
    """The same failure of `argv` with LVM's reason: LvmFailed if it is known what ends it."""
    for pattern, fix in _FIXES:
        found = re.search(pattern, error.stderr)
        if found:
            said = _reason(error.stderr, found[0])
            return LvmFailed(argv, error.returncode, error.stderr, said, fix.format(**found.groupdict()))
    return CommandFailed(argv, error.returncode, error.stderr, _reason(error.stderr))


def _locked(vg_name: str, error: CommandTimeout) -> CommandTimeout:
    """LvmLocked if another process holds the lock of the volume group (lvm2, lib/locking/file_locking.c)."""
    pid = holders.of_lock(f"{LOCKS}/V_{vg_name}")
    if not pid:
        return error
    tool, seconds = error.fields["tool"], error.fields["seconds"]
    return LvmLocked(tool=tool, seconds=seconds, holder=f"{holders.command(pid)} ({pid})", pid=pid)


def _reason(stderr: str, cause: str = "") -> str:
    """Why LVM failed, from its messages: the last three lines, because the last one is often too general.

    Lines with WARNING are about something else, and are only used if there are no others; hints about LVM's
    options are left out.  Of a `cause` that is known, the line with it says all.
    """
    every = list(dict.fromkeys(filter(None, map(str.strip, stderr.splitlines()))))
    lines = [line for line in every if not line.startswith(("WARNING:", "Use --select", "Run `"))]
    known = [line for line in every if cause and cause in line]
    return "; ".join(line.rstrip(".") for line in known[:1] or (lines or every)[-3:])


def read_all(
    groups: Mapping[str, tuple[str, ...]],
) -> tuple[tuple[VolumeGroup, ...], tuple[Error, ...]]:
    """Read all `groups`, names with their devices: the groups that can be read, and the errors of the others.

    If no group can be read, the first error is raised.
    """
    found: list[VolumeGroup] = []
    failures: list[Error] = []
    for name, devices in groups.items():
        try:
            found.append(VolumeGroup.read(name, devices))
        except (CommandFailed, CommandMissing, CommandTimeout, NoVolumeGroup, VolumeGroupUnusable) as error:
            failures.append(error)
    if not found:
        raise failures[0]
    return tuple(found), tuple(failures)


def read_tags(vg_name: str, lv_name: str, devices: Iterable[str]) -> frozenset[str]:
    """The tags of a volume of any group, for example a storage domain's, on these devices.

    Nothing is locked or repaired (`--readonly`), because other hosts use the group.  Raises CommandFailed.
    """
    argv = ["lvs", "--readonly", "--reportformat", "json", "-o", "lv_tags", "--devices", ",".join(devices)]
    text = call([*argv, f"{vg_name}/{lv_name}"])
    try:
        (row,) = json.loads(text)["report"][0]["lv"]
        return _words(row["lv_tags"])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise CommandFailed(("lvs", lv_name), 0, f"its report is not understood ({error})") from None


def _dependents(row: dict[str, str], snapshots: Iterable[dict[str, str]]) -> Iterator[str]:
    """The volumes that `lvremove --yes` would remove, without a question, together with the volume of `row`.

    `snapshots` are the rows of its snapshots.  Tried with LVM 2.03.16: LVM removes copy-on-write snapshots,
    also those of thin volumes; thin snapshots of an external origin, which is not in their pool; and the
    cache.  A thin snapshot in the same pool does not depend on its origin.
    """
    names = [each["lv_name"] for each in snapshots if _depends(each, row)]
    yield from names
    if _kinds(row["lv_layout"]) & {"cache", "writecache"}:
        yield row["pool_lv"].strip("[]")
    if not names and _kinds(row["lv_role"]) & _ORIGINS:  # lvconvert --merge hides the snapshot
        yield "a snapshot that is being merged"


def _by_origin(rows: Iterable[dict[str, str]]) -> Mapping[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if row["origin"]:
            found.setdefault(row["origin"], []).append(row)
    return found


def _depends(snapshot: dict[str, str], origin: dict[str, str]) -> bool:
    is_thin = "thinsnapshot" in _kinds(snapshot["lv_role"])
    return not is_thin or snapshot["pool_lv"] != origin["pool_lv"]


def _at_threshold(error: CommandFailed, vg_name: str, pool: str) -> Error:
    """ThinPoolAtThreshold if LVM only complains that the pool is too full; else ThinPoolUnusable or `error`.

    LVM calls a pool whose state it cannot read "at its threshold", too: then the line before has the reason.
    """
    lines = [line for line in map(str.strip, error.stderr.splitlines()) if line]
    others = [line for line in lines if not re.search("(reached|above) threshold", line)]
    if len(others) == len(lines):
        return error
    why = [line for line in others if not line.startswith("WARNING:") or f"{vg_name}/{pool} has" in line]
    if why:
        return ThinPoolUnusable(vg=vg_name, pool=pool, said=why[0])
    return ThinPoolAtThreshold(vg=vg_name, pool=pool)


def _explained(error: CommandFailed) -> Error:
    """VolumeGroupUnusable if LVM's message matches one of _REASONS, else `error` itself."""
    for pattern, reason in _REASONS:
        match = re.search(pattern, error.stderr)
        if match:
            return _unusable(match.groupdict(), reason)
    return error


def _unusable(names: Mapping[str, str], reason: tuple[str, str]) -> VolumeGroupUnusable:
    problem, fix = (text.format(**names) for text in reason)
    return VolumeGroupUnusable(vg=names["vg"], problem=problem, fix=fix)


def _not_found(vg_name: str) -> NoVolumeGroup:
    """NoVolumeGroup, or VolumeGroupHidden if a filter or the devices file hides the group from LVM."""
    for how, (options, config, fix) in _HIDING.items():
        try:
            rows = physical_volumes(*options, config=config)
        except (CommandFailed, CommandTimeout):  # LVM before 2.03.12 has no devices file
            continue
        devices = " ".join(row["pv_name"] for row in rows if row["vg_name"] == vg_name)
        if devices:
            return VolumeGroupHidden(vg=vg_name, how=how, devices=devices, fix=fix.format(vg=vg_name))
    return NoVolumeGroup(vg=vg_name)


def uuid_of(dm_uuid: str) -> str:
    """The UUID of a volume as LVM prints it, from its `dm_uuid`: 32 characters, in groups of 6, 4 … 4, 6."""
    plain = dm_uuid[-32:]
    return "-".join([plain[:6], *(plain[at : at + 4] for at in range(6, 26, 4)), plain[26:]])


def physical_volumes(*options: str, config: str = "") -> list[dict[str, str]]:
    """All physical volumes that LVM finds with `options`: rows of pv_name, vg_name, pv_duplicate.

    Raises CommandFailed, CommandTimeout.
    """
    columns = "pv_name,vg_name,pv_duplicate"
    argv = ["lvm", "pvs", "--reportformat", "json", "--all", "-o", columns, *options]
    text = call(argv, config)
    try:
        rows: list[dict[str, str]] = json.loads(text)["report"][0]["pv"]
        return [row for row in rows if row["vg_name"]]
    except (ValueError, KeyError, IndexError, TypeError):
        raise CommandFailed(tuple(argv), 0, f"it printed {text[:80]!r}") from None


def _shared(vg_name: str, lock_type: str) -> VolumeGroupUnusable:
    fix = "use a volume group of this host alone"
    return VolumeGroupUnusable(vg=vg_name, problem=f"shared ({lock_type})", fix=fix)


def _sectors(size: int) -> int:
    """`size` in bytes, rounded up to a multiple of 512: LVM accepts no others."""
    return -(-size // 512) * 512


def _devices(devices: tuple[str, ...]) -> list[str]:
    return ["--devices", ",".join(devices)] if devices else []


def _repeat(option: str, values: Iterable[str]) -> list[str]:
    return [word for value in sorted(values) for word in (option, value)]


@cache  # of a thousand volumes, most have the same layout and role
def _kinds(column: str) -> frozenset[str]:
    return _words(column)


def _words(column: Any) -> frozenset[str]:
    return frozenset(word for word in column.split(",") if word)


def _bytes(column: str) -> int:
    """A number of bytes as LVM prints it, 64 bits at most."""
    if len(column) > 19 or not (column.isascii() and column.isdigit()):
        raise ValueError(f"{column[:40]!r} is no size")
    return int(column)


def _percent(column: str) -> float | None:
    return float(column) if column else None
