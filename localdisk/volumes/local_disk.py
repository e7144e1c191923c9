"""A local disk: its tags and state, the plans of a start and a stop, and the limits of room for a new disk.

A local disk is a logical volume; its name is the id of the oVirt volume that it is a copy of.  Its tags
record everything else, so that no second record can disagree with the volume group:

    localdisk           made by localdisk; disks of vdsm's older hook do not have it
    VM_<uuid>           the VM that the disk belongs to
    IU_<uuid>           the image that the disk is a copy of
    SOURCE_<hex>        fingerprint of the source when it was copied
    UPDATING            the copy is incomplete
    WRITES_<bytes>      while UPDATING: the data that the disk will hold, counted as used in the thin pool
    STOPPED_<epoch>     its VM stopped at this time, and the disk is kept
    DRIFTED_<epoch>     its VM stopped at this time, and ran from another volume by then
    UNNEEDED_<epoch>    since this time gc has seen no VM that needs the disk; no stop was reported
    BOOT_<uuid>_<n>     time of the mark STOPPED, else UNNEEDED: id of the boot, seconds since it
    STALE               since its VM stopped, the VM has been started on this host from shared storage
    DELETING            is to be removed
    ERASE_<how>         while set aside: how it is erased before it is removed
    ASIDE_<uuid>        while set aside: its new name

A disk that must be erased before it is removed is *set aside*: its tags VM and IU are removed, it is marked
as DELETING, and it is renamed, so that nothing waits for the erase (`removal.py`).

Everything here is a pure function of frozen data.  `helper/start.py`, `helper/stop.py` and `gc.py` carry out
what is decided here.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Sequence

from localdisk.backend import Backend
from localdisk.clock import Moment
from localdisk.config import Retention
from localdisk.errors import (
    FIELD_LIMIT,
    DependentVolumes,
    DiskBusy,
    DiskDrifted,
    Error,
    KeptStale,
    OtherLeaf,
    OtherOwner,
    SourceChanged,
)
from localdisk.frozen import frozen, once
from localdisk.ids import is_uuid
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup

OURS = "localdisk"
UPDATING = "UPDATING"
DELETING = "DELETING"
STALE = "STALE"
ERASES = ("discard", "zero")  # the values of `retention.erase` other than none

FIRST = 1735689600  # 2025-01-01: an older time in a mark is of a wrong clock
HOW_TO_DECIDE = "kept until you decide: retention.older_disks: as_ours, or localdisk remove"
SLACK = 60  # seconds by which a clock may be corrected without a new mark
_BOOT = r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})_([0-9]{1,12})"


class State(enum.Enum):
    UNFINISHED = "unfinished"
    READY = "ready"
    STOPPED = "stopped"
    DRIFTED = "drifted"
    DELETING = "deleting"


@frozen
class LocalDisk:
    """A local disk as its logical volume and tags describe it."""

    lv: LogicalVolume
    vm_id: str
    image_id: str
    state: State
    fingerprint: str  # "" if not recorded
    stopped: int | None  # time of the mark STOPPED, in seconds since the epoch; None: no such mark
    unneeded: int | None  # time of the mark UNNEEDED, likewise
    boot: tuple[str, int] | None  # of the mark: boot id, seconds since that boot; None: not recorded
    erase: str  # if set aside: how it must be erased; else ""
    aside_name: str  # if set aside: the name that it gets, or has already; else ""

    @classmethod
    def from_lv(cls, lv: LogicalVolume) -> LocalDisk | None:
        """The local disk that `lv` is, None if it is not a local disk and must not be touched.

        A local disk has a canonical UUID as its name, and tags of exactly one VM and one image, or of neither
        if it was set aside; it is no pool.  The tag `localdisk` is not required: vdsm's older hook did not
        set it.
        """
        values = lv.tag_values
        vm_id, image_id = only_uuid(values["VM"]), only_uuid(values["IU"])
        is_aside = not ("VM" in values or "IU" in values) and {OURS, DELETING} <= lv.lv_tags
        has_owner = bool(vm_id and image_id) or is_aside
        if not (is_uuid(lv.lv_name) and has_owner) or "pool" in lv.lv_layout:
            return None
        stopped, fingerprints = latest(values["STOPPED"]), values["SOURCE"]
        return cls(
            lv=lv,
            vm_id=vm_id,
            image_id=image_id,
            state=_state(lv.lv_tags, stopped, "DRIFTED" in values),
            fingerprint=fingerprints[0] if len(fingerprints) == 1 else "",
            stopped=stopped,
            unneeded=latest(values["UNNEEDED"]),
            boot=_boot_of(values["BOOT"]),
            erase=next((how for how in ERASES if f"ERASE_{how}" in lv.lv_tags), ""),
            aside_name=only_uuid(values["ASIDE"]),
        )

    @property
    def volume_id(self) -> str:
        return self.lv.lv_name

    @property
    def is_open(self) -> bool:
        return self.lv.lv_device_open

    @property
    def is_older(self) -> bool:
        """Whether it was made by vdsm's older hook."""
        return OURS not in self.lv.lv_tags

    @property
    def backend(self) -> Backend:
        return Backend.THIN if self.lv.pool_lv else Backend.THICK

    @property
    def is_complete(self) -> bool:
        return self.state in (State.READY, State.STOPPED)

    @property
    def is_stale(self) -> bool:
        """Whether its VM was started on this host from shared storage since the disk was kept."""
        return STALE in self.lv.lv_tags

    @property
    def is_aside(self) -> bool:
        """Whether it was set aside to be erased and removed, and belongs to no VM."""
        return not self.vm_id

    @property
    def waits_for_erase(self) -> bool:
        """Whether it was set aside and has its new name already; only the erase is left to do."""
        return self.is_aside and self.aside_name == self.volume_id

    @property
    def idle_tags(self) -> frozenset[str]:
        """The tags that record since when no VM uses the disk."""
        return self._tags("STOPPED_", "UNNEEDED_", "BOOT_")

    @property
    def unneeded_boot(self) -> tuple[str, int] | None:
        """`boot` if it belongs to the mark UNNEEDED, None if it belongs to STOPPED."""
        return self.boot if self.stopped is None else None

    @property
    def unneeded_tags(self) -> frozenset[str]:
        """Those of `idle_tags` that are removed if a VM needs the disk; the mark STOPPED is kept."""
        return self._tags("UNNEEDED_") if self.stopped is not None else self._tags("UNNEEDED_", "BOOT_")

    @property
    def source_tags(self) -> frozenset[str]:
        return self._tags("SOURCE_")

    @property
    def boot_tags(self) -> frozenset[str]:
        return self._tags("BOOT_")

    @property
    def writes_tags(self) -> frozenset[str]:
        return self._tags("WRITES_")

    def _tags(self, *prefixes: str) -> frozenset[str]:
        return frozenset(tag for tag in self.lv.lv_tags if tag.startswith(prefixes))


@once
def local_disks(vg: VolumeGroup) -> tuple[LocalDisk, ...]:
    """All local disks of a volume group, those of vdsm's older hook included."""
    found = (LocalDisk.from_lv(lv) for lv in vg.lvs)
    return tuple(disk for disk in found if disk)


def require_owner(disk: LocalDisk, vm_id: str, image_id: str, vg: str) -> None:
    """Raise OtherOwner unless the disk is this VM's copy of this image, or was set aside."""
    if not disk.is_aside and (disk.vm_id, disk.image_id) != (vm_id, image_id):
        raise OtherOwner(vg=vg, lv=disk.volume_id, owner=disk.vm_id, image=disk.image_id)


def new_tags(vm_id: str, image_id: str, fingerprint: str, writes: int) -> frozenset[str]:
    """The tags of a disk whose copy is about to start."""
    tags = {OURS, f"VM_{vm_id}", f"IU_{image_id}", f"SOURCE_{fingerprint}", UPDATING, f"WRITES_{writes}"}
    return frozenset(tags)


def stopped_tags(now: Moment, age: float = 0) -> frozenset[str]:
    """The marks of a disk whose VM stopped `age` seconds before `now`."""
    return _marks("STOPPED", now, age)


def drifted_tag(now: float) -> str:
    """The mark of a disk whose VM ran from another volume when it stopped; `now`: seconds since the epoch."""
    return f"DRIFTED_{int(now)}"


def unneeded_tags(disk: LocalDisk, now: Moment, age: float = 0) -> frozenset[str]:
    """The marks of a disk that gc has seen unneeded for `age` seconds at `now`.

    A disk has one tag BOOT; if the disk is marked as stopped, BOOT belongs to that mark, and UNNEEDED has
    only its date.
    """
    return _marks("UNNEEDED", now if disk.stopped is None else Moment(now.epoch), age)


def _marks(name: str, now: Moment, age: float) -> frozenset[str]:
    boot = {f"BOOT_{now.boot_id}_{max(0, int(now.uptime - age))}"} if now.boot_id else set[str]()
    return frozenset({f"{name}_{int(now.epoch - age)}", *boot})


def aside_tags(disk: LocalDisk, erase: str, name: str) -> tuple[frozenset[str], frozenset[str]]:
    """The tags to add and to remove to set a disk aside: how it must be erased, and its new name."""
    wanted = frozenset({OURS, DELETING, f"ERASE_{erase}", f"ASIDE_{name}"})
    return wanted - disk.lv.lv_tags, disk.lv.lv_tags - wanted


# -- how old a mark is


@frozen
class Age:
    """How long ago a disk was marked, in seconds; `doubt`: why the mark's time is impossible, or ""."""

    seconds: float
    doubt: str = ""
    is_late: bool = False  # the clock was set forward since: by today's clock, the mark's time is too early
    has_booted: bool = False  # the host has booted since: the age is right only if the date is right now


def age_of(boot: tuple[str, int] | None, disk: LocalDisk, since: int, now: Moment) -> Age:
    """How long ago a mark of the disk was made: at `since`, seconds since the epoch, in `boot`.

    If the host has not booted since, the uptime decides.  Otherwise only the date is known, which may have
    been wrong when the mark was made, and may be wrong now.
    """
    if boot and boot[0] == now.boot_id and boot[1] <= now.uptime:
        seconds = now.uptime - boot[1]
        return Age(seconds, is_late=now.epoch - since > seconds + SLACK)
    if since > now.epoch:
        return Age(0, "in the future, the clock went backwards")
    if since < max(disk.lv.lv_time, FIRST):
        return Age(0, "before the disk was made, the clock was wrong then")
    return Age(now.epoch - since, has_booted=boot is not None)


def is_clock_wrong(disk: LocalDisk, now: Moment) -> bool:
    """Whether the clock is certainly wrong now, so that no mark may be made with its time."""
    return now.epoch < max(disk.lv.lv_time, FIRST)


# -- starting


@frozen
class Start:
    """What a start does with the local disks of its image.  Without `reuse`, a new disk is made."""

    reuse: LocalDisk | None = None  # the kept disk that the VM uses again
    remove: tuple[LocalDisk, ...] = ()  # removed at once: the policy does not keep their data
    replace: tuple[LocalDisk, ...] = ()  # kept disks, removed when the disk of this start is ready


@frozen
class Wanted:
    """The disk that a start asks for."""

    volume_id: str  # of the image's leaf; the local disk gets this name
    fingerprint: str  # of the guest's view
    virtual_size: int  # bytes


def plan_start(disks: Iterable[LocalDisk], wanted: Wanted, retention: Retention, vg: str) -> Start:
    """What a start does with `disks`: all local disks that the VM, which does not run, has of one image.

    Their owner was checked, and their locks are held.  A kept disk may be a copy of a volume that is no
    longer the image's leaf: it is used again if its fingerprint is that of the present guest's view.

    Raises DiskBusy if the disk to be used is open; DiskDrifted, SourceChanged, OtherLeaf, KeptStale if the
    operator must decide; DependentVolumes if a disk on which other volumes depend would have to be removed or
    renamed.  A disk that `is_left_alone` is neither removed nor renamed.
    """
    disks = tuple(disks)
    _require_no_drift(disks, vg)
    every = sorted(disks, key=lambda disk: disk.volume_id != wanted.volume_id)
    for disk in every:
        if disk.volume_id == wanted.volume_id:
            _require_closed(disk, vg)
    start = _plan_closed(every, wanted, retention, vg)
    for disk in every:
        if (disk.volume_id == wanted.volume_id) != (disk is start.reuse):
            require_alone(disk, vg)
            if is_left_alone(disk, retention):
                raise _changed(disk, wanted, vg)
    return start


def _plan_closed(every: list[LocalDisk], wanted: Wanted, retention: Retention, vg: str) -> Start:
    older = [disk for disk in every if is_left_alone(disk, retention)]
    free = [disk for disk in every if not (disk.is_open or disk.lv.dependents or disk in older)]
    kept = [disk for disk in every if is_kept(disk, retention)]
    remove = tuple(disk for disk in free if disk not in kept)
    usable = older if retention.on_stop == "delete" else kept
    reuse = next((disk for disk in usable if _is_good(disk, wanted, retention)), None)
    if reuse:
        _require_closed(reuse, vg)
    elif usable and retention.on_source_change == "refuse":
        raise _changed(usable[0], wanted, vg)
    does_replace = retention.on_stop == "delete" or retention.on_source_change == "recopy"
    others = tuple(disk for disk in kept if disk is not reuse and disk in free)
    return Start(reuse, remove, others if does_replace else ())


def _require_no_drift(disks: Iterable[LocalDisk], vg: str) -> None:
    """Raise DiskDrifted if one of these disks has data of its VM that shared storage lacks."""
    for disk in disks:
        if disk.state is State.DRIFTED:
            raise DiskDrifted(vg=vg, lv=disk.volume_id)


def require_alone(disk: LocalDisk, vg: str) -> None:
    """Raise DependentVolumes if LVM would change or remove other volumes with the disk."""
    if disk.lv.dependents:
        raise DependentVolumes(vg=vg, lv=disk.volume_id, others=", ".join(disk.lv.dependents))


def _require_closed(disk: LocalDisk, vg: str) -> None:
    if disk.is_open:
        raise busy(disk, vg)


def busy(disk: LocalDisk, vg: str) -> DiskBusy:
    """The error for an open disk, without the names of its users: `holders.busy` adds them."""
    fix = f"find it (lsblk, lsof /dev/{vg}/{disk.volume_id})"
    return DiskBusy(vg=vg, lv=disk.volume_id, state=disk.state.value, users="something", fix=fix)


def is_kept(disk: LocalDisk, retention: Retention) -> bool:
    """Whether a stop has kept the disk, or would have kept it if it had been reported."""
    would_keep = retention.on_stop == "keep" or is_left_alone(disk, retention)
    return disk.state is State.STOPPED or (disk.state is State.READY and would_keep)


def _is_good(disk: LocalDisk, wanted: Wanted, retention: Retention) -> bool:
    """Whether a start may use the disk again.

    A disk of the older hook is used as that hook used it: if the name matches, whatever its size is.
    """
    if is_left_alone(disk, retention):
        return not disk.is_stale and disk.volume_id == wanted.volume_id
    is_large_enough = disk.lv.lv_size >= wanted.virtual_size
    return not disk.is_stale and is_large_enough and _is_same_source(disk, wanted)


def _is_same_source(disk: LocalDisk, wanted: Wanted) -> bool:
    """Whether the disk was copied from the present guest's view.

    A disk of the older hook has no fingerprint: only its name shows what it is a copy of.
    """
    if disk.is_older and not disk.fingerprint:
        return disk.volume_id == wanted.volume_id
    return disk.fingerprint == wanted.fingerprint


def _changed(disk: LocalDisk, wanted: Wanted, vg: str) -> Error:
    """Why the kept `disk` is not used."""
    if disk.is_stale:
        return KeptStale(vg=vg, lv=disk.volume_id)
    or_use_it = _how_to_use(disk, wanted, vg)
    if disk.volume_id != wanted.volume_id:
        return OtherLeaf(vg=vg, lv=disk.volume_id, volume=wanted.volume_id, or_use_it=or_use_it)
    return SourceChanged(vg=vg, lv=disk.volume_id, or_use_it=or_use_it)


def _how_to_use(disk: LocalDisk, wanted: Wanted, vg: str) -> str:
    """How the operator has the VM started from its kept disk; "" if the disk cannot be used.

    Many operations change the source and not what the guest sees: a snapshot is merged, the image is moved or
    made sparse, a backup adds a bitmap.
    """
    if disk.is_older or not disk.fingerprint or disk.lv.lv_size < wanted.virtual_size:
        return ""
    tags = f"--deltag SOURCE_{disk.fingerprint} --addtag SOURCE_{wanted.fingerprint}"
    text = f"; to use it nevertheless: lvchange {tags} {vg}/{disk.volume_id}"
    return text if len(text) <= FIELD_LIMIT else ""  # a message would have it without its middle


def is_left_alone(disk: LocalDisk, retention: Retention) -> bool:
    """Whether it is a complete disk of vdsm's older hook, about which the operator has not decided yet.

    That hook removed no disk and started the VM from the same disk each time: it may have the only copy of a
    guest's data.
    """
    return disk.is_older and disk.is_complete and retention.older_disks == "keep"


# -- stopping


class Stop(enum.Enum):
    """What a stop does with a disk of the VM that has stopped."""

    REMOVE = "remove"
    KEEP = "keep"
    LEAVE = "leave as it is"
    MARK_DELETING = "mark deleting"


def plan_stop(disk: LocalDisk, retention: Retention) -> Stop:
    """What a stop does with a disk whose VM has stopped and whose lock is held.

    A stop never waits: gc removes later what is open, must be erased first, or has dependent volumes.
    """
    if disk.state is State.DRIFTED or is_left_alone(disk, retention):
        return Stop.LEAVE
    if retention.on_stop == "keep" and disk.is_complete:
        return Stop.KEEP
    if disk.is_open or retention.erase != "none" or disk.lv.dependents:
        return Stop.MARK_DELETING
    return Stop.REMOVE


# -- tags


def _boot_of(values: Sequence[str]) -> tuple[str, int] | None:
    match = re.fullmatch(_BOOT, values[0]) if len(values) == 1 else None
    return (match[1], int(match[2])) if match else None


def _state(tags: frozenset[str], stopped: int | None, is_drifted: bool) -> State:
    if DELETING in tags:
        return State.DELETING
    if UPDATING in tags:
        return State.UNFINISHED
    if is_drifted:
        return State.DRIFTED
    return State.READY if stopped is None else State.STOPPED


def only_uuid(values: Sequence[str]) -> str:
    """The UUID if `values` is exactly one UUID, else ""."""
    return values[0] if len(values) == 1 and is_uuid(values[0]) else ""


def latest(values: Sequence[str]) -> int | None:
    """The largest of the values that are decimal numbers of at most 18 digits, None if there is none."""
    numbers = [int(value) for value in values if len(value) <= 18 and value.isascii() and value.isdigit()]
    return max(numbers, default=None)
