"""The life of one local disk: what its tags say, and what a start or a stop should do with it.

A local disk is a logical volume named by the volume it is a copy of.  All that is known about it is in
its tags, so that nothing else has to be kept in step with the volume group:

    localdisk           ours (absent on disks made by vdsm's older hook)
    VM_<uuid>           the VM that it belongs to
    IU_<uuid>           the image that it is a copy of
    SOURCE_<hex>        fingerprint of the source when it was copied
    UPDATING            the copy is incomplete
    WRITES_<bytes>      while UPDATING: the data that it will hold, counted against the thin pool
    STOPPED_<epoch>     kept since then for a VM that is not running
    DRIFTED_<epoch>     when its VM stopped then, it ran from another volume, and this one has data of it
    UNNEEDED_<epoch>    since then gc has seen no VM that needs it, though nothing says that its VM stopped
    BOOT_<uuid>_<n>     of these two marks, the first that there is: the boot of the host, and its n-th second
    STALE               since its VM stopped, the VM has been started here from shared storage
    DELETING            waits to be removed
    ERASE_<how>         while set aside: erase it so first
    ASIDE_<uuid>        while set aside: the name that it gets

A disk that must be erased before it is removed is set aside: it gives its owner and its name back at once,
and is DELETING under a name of its own (`removal.py`).
Everything here is a pure function of frozen data; `helper/start.py`,
`helper/stop.py` and `gc.py` do what is decided here.
"""

from __future__ import annotations

import enum
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from localdisk.clock import Moment
from localdisk.config import Margins, Policy, Retention
from localdisk.errors import (
    DependentVolumes,
    DiskBusy,
    DiskDrifted,
    Error,
    KeptStale,
    NoSpace,
    NoThinPool,
    OtherLeaf,
    OtherOwner,
    SourceChanged,
    ThinPoolBroken,
    ThinPoolFull,
    ThinPoolInactive,
    ThinPoolNotZeroing,
)
from localdisk.frozen import frozen
from localdisk.ids import is_uuid
from localdisk.units import format_size
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup

OURS = "localdisk"
UPDATING = "UPDATING"
DELETING = "DELETING"
STALE = "STALE"
ERASES = ("discard", "zero")  # but for none, what `retention.erase` can say

FIRST = 1735689600  # 2025-01-01: no mark of ours is older, whatever a clock without a battery said
HOW_TO_DECIDE = "kept until you decide: retention.older_disks: as_ours, or localdisk remove"
SLACK = 60  # seconds by which a clock may be corrected without a mark being made anew
_NUMBER = re.compile(r"[0-9]{1,18}")
_BOOT = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})_([0-9]{1,12})")


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
    fingerprint: str  # "" where none was recorded
    stopped: int | None  # seconds since the epoch
    unneeded: int | None  # seconds since the epoch
    boot: tuple[str, int] | None  # the boot id and its second in which it was marked so; None: not recorded
    erase: str  # what `retention.erase` said when it was set aside, "" otherwise
    aside_name: str  # the name that it gets, or has, when it was set aside, "" otherwise

    @classmethod
    def from_lv(cls, lv: LogicalVolume) -> LocalDisk | None:
        """The local disk that `lv` is, or None where it is not ours to touch.

        Ours has a canonical UUID as its name, exactly one VM and one image, or none where it was set
        aside, and is no pool.  The tag `localdisk` is not asked for: vdsm's older hook did not set it.
        """
        values = values_of(lv.lv_tags)
        vm_id, image_id = only_uuid(values["VM"]), only_uuid(values["IU"])
        is_aside = {OURS, DELETING} <= lv.lv_tags and not values["VM"] and not values["IU"]
        has_owner = bool(vm_id and image_id) or is_aside
        if not (is_uuid(lv.lv_name) and has_owner) or "pool" in lv.lv_layout:
            return None
        stopped, fingerprints = max(numbers_of(values["STOPPED"]), default=None), values["SOURCE"]
        return cls(
            lv=lv,
            vm_id=vm_id,
            image_id=image_id,
            state=_state(lv.lv_tags, stopped, bool(values["DRIFTED"])),
            fingerprint=fingerprints[0] if len(fingerprints) == 1 else "",
            stopped=stopped,
            unneeded=max(numbers_of(values["UNNEEDED"]), default=None),
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
        """Made by vdsm's older hook."""
        return OURS not in self.lv.lv_tags

    @property
    def backend(self) -> str:
        return "lvmthin" if self.lv.pool_lv else "lvm"

    @property
    def is_complete(self) -> bool:
        return self.state in (State.READY, State.STOPPED)

    @property
    def is_stale(self) -> bool:
        """Its VM has been started here from shared storage since it was kept."""
        return STALE in self.lv.lv_tags

    @property
    def is_aside(self) -> bool:
        """Set aside to be erased and removed; it is no VM's."""
        return not self.vm_id

    @property
    def waits_for_erase(self) -> bool:
        """Set aside, and under the name for that: no start asks for it."""
        return self.is_aside and self.aside_name == self.volume_id

    @property
    def idle_tags(self) -> frozenset[str]:
        """Those that say since when no VM uses it."""
        return self._tags("STOPPED_", "UNNEEDED_", "BOOT_")

    @property
    def unneeded_boot(self) -> tuple[str, int] | None:
        """`boot` of the mark `unneeded`, None where it is of the other mark."""
        return self.boot if self.stopped is None else None

    @property
    def unneeded_tags(self) -> frozenset[str]:
        """Those of `idle_tags` that go when it is needed; a stopped one stays stopped."""
        return self._tags("UNNEEDED_") if self.stopped is not None else self._tags("UNNEEDED_", "BOOT_")

    @property
    def writes_tags(self) -> frozenset[str]:
        return self._tags("WRITES_")

    def _tags(self, *prefixes: str) -> frozenset[str]:
        return frozenset(tag for tag in self.lv.lv_tags if tag.startswith(prefixes))


def local_disks(vg: VolumeGroup) -> tuple[LocalDisk, ...]:
    """All local disks of a volume group, ours and the older hook's."""
    found = (LocalDisk.from_lv(lv) for lv in vg.lvs)
    return tuple(disk for disk in found if disk)


def require_owner(disk: LocalDisk, vm_id: str, image_id: str, vg: str) -> None:
    """Raise OtherOwner unless the disk is this VM's copy of this image, or nobody's any more."""
    if not disk.is_aside and (disk.vm_id, disk.image_id) != (vm_id, image_id):
        raise OtherOwner(vg=vg, lv=disk.volume_id, owner=disk.vm_id, image=disk.image_id)


def new_tags(vm_id: str, image_id: str, fingerprint: str, writes: int) -> frozenset[str]:
    """The tags of a disk whose copy is about to start."""
    tags = {OURS, f"VM_{vm_id}", f"IU_{image_id}", f"SOURCE_{fingerprint}", UPDATING, f"WRITES_{writes}"}
    return frozenset(tags)


def stopped_tags(now: Moment, age: float = 0) -> frozenset[str]:
    """The tags of a disk that is kept for `age` seconds by `now`."""
    return _marks("STOPPED", now, age)


def drifted_tag(now: float) -> str:
    """Of a disk whose VM ran from another volume when it stopped; `now` in seconds since the epoch."""
    return f"DRIFTED_{int(now)}"


def unneeded_tags(disk: LocalDisk, now: Moment, age: float = 0) -> frozenset[str]:
    """The tags of a disk that no VM needs as far as gc sees for `age` seconds by `now`.

    One that is stopped has a boot already, of the other mark: then the date has to do.
    """
    return _marks("UNNEEDED", now if disk.stopped is None else Moment(now.epoch), age)


def _marks(name: str, now: Moment, age: float) -> frozenset[str]:
    boot = {f"BOOT_{now.boot_id}_{max(0, int(now.uptime - age))}"} if now.boot_id else set[str]()
    return frozenset({f"{name}_{int(now.epoch - age)}", *boot})


def aside_tags(disk: LocalDisk, erase: str, name: str) -> tuple[frozenset[str], frozenset[str]]:
    """The tags to add and to remove so that a disk is nobody's, to be erased as `erase` says under `name`."""
    wanted = frozenset({OURS, DELETING, f"ERASE_{erase}", f"ASIDE_{name}"})
    return wanted - disk.lv.lv_tags, disk.lv.lv_tags - wanted


# -- how old a mark is


@frozen
class Age:
    """How long ago a disk was marked, in seconds; `doubt` says why that cannot be true, "" if it can."""

    seconds: float
    doubt: str = ""
    is_late: bool = False  # the clock has been set forward since: the mark should be later


def age_of(boot: tuple[str, int] | None, disk: LocalDisk, since: int, now: Moment) -> Age:
    """How long ago the mark `since`, seconds since the epoch, was made on the disk, in which `boot`.

    Within one boot the clock that counts from it decides.  From an earlier boot there is only the date, which
    may have been wrong when the mark was made, and may be wrong now.
    """
    if boot and boot[0] == now.boot_id and boot[1] <= now.uptime:
        seconds = now.uptime - boot[1]
        return Age(seconds, is_late=now.epoch - since > seconds + SLACK)
    if since > now.epoch:
        return Age(0, "the future, the clock went backwards")
    if since < max(disk.lv.lv_time, FIRST):
        return Age(0, "the time before it was made, the clock was wrong then")
    return Age(now.epoch - since)


def is_clock_wrong(disk: LocalDisk, now: Moment) -> bool:
    """Whether the date is certainly wrong now: what it says would be in doubt later."""
    return now.epoch < max(disk.lv.lv_time, FIRST)


# -- starting


@frozen
class Start:
    """What a start does with the local disks of its image.  Without `reuse`, a new disk is made."""

    reuse: LocalDisk | None = None  # the kept disk that the VM goes on with
    remove: tuple[LocalDisk, ...] = ()  # at once: nobody keeps what they hold
    replace: tuple[LocalDisk, ...] = ()  # kept disks that are removed once the disk of this start is ready


@frozen
class Wanted:
    """The disk that a start asks for."""

    volume_id: str  # the leaf's; the local disk gets this name
    fingerprint: str  # of what the guest sees
    virtual_size: int  # bytes


def plan_start(disks: Iterable[LocalDisk], wanted: Wanted, retention: Retention, vg: str) -> Start:
    """What to do for a VM that is not running with `disks`, all local disks that it has of one image.

    Their owner was checked, and their locks are held.  A kept disk may be the copy of what was the image's
    leaf before: what counts is whether it was made from the bytes that the guest sees now.
    Raises DiskBusy if something has the disk open that is to be used; DiskDrifted, SourceChanged, OtherLeaf,
    KeptStale if the operator must decide; DependentVolumes if a disk that other volumes depend on would have
    to be removed or renamed.  Neither is done to a disk that `is_left_alone`.
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
    kept = [disk for disk in every if _is_kept(disk, retention)]
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
    """Raise DiskDrifted if one of these disks has data of its VM that are nowhere else."""
    for disk in disks:
        if disk.state is State.DRIFTED:
            raise DiskDrifted(vg=vg, lv=disk.volume_id)


def require_alone(disk: LocalDisk, vg: str) -> None:
    """Raise DependentVolumes if LVM would change or remove other volumes along with the disk."""
    if disk.lv.dependents:
        raise DependentVolumes(vg=vg, lv=disk.volume_id, others=", ".join(disk.lv.dependents))


def _require_closed(disk: LocalDisk, vg: str) -> None:
    if disk.is_open:
        raise busy(disk, vg)


def busy(disk: LocalDisk, vg: str) -> DiskBusy:
    """The error of a disk that something has open; `holders.busy` looks what that is."""
    fix = f"find it (lsblk, lsof /dev/{vg}/{disk.volume_id})"
    return DiskBusy(vg=vg, lv=disk.volume_id, state=disk.state.value, users="something", fix=fix)


def _is_kept(disk: LocalDisk, retention: Retention) -> bool:
    """Whether its stop has kept it, or would have."""
    would_keep = retention.on_stop == "keep" or is_left_alone(disk, retention)
    return disk.state is State.STOPPED or (disk.state is State.READY and would_keep)


def _is_good(disk: LocalDisk, wanted: Wanted, retention: Retention) -> bool:
    """A disk of the older hook is used as that hook did: by its name, whatever its size is."""
    if is_left_alone(disk, retention):
        return not disk.is_stale and disk.volume_id == wanted.volume_id
    is_large_enough = disk.lv.lv_size >= wanted.virtual_size
    return not disk.is_stale and is_large_enough and _is_same_source(disk, wanted)


def _is_same_source(disk: LocalDisk, wanted: Wanted) -> bool:
    """A disk of the older hook has no fingerprint: its name alone says what it is a copy of."""
    if disk.is_older and not disk.fingerprint:
        return disk.volume_id == wanted.volume_id
    return disk.fingerprint == wanted.fingerprint


def _changed(disk: LocalDisk, wanted: Wanted, vg: str) -> Error:
    """Why the kept `disk` is not used."""
    if disk.is_stale:
        return KeptStale(vg=vg, lv=disk.volume_id)
    if disk.volume_id != wanted.volume_id:
        return OtherLeaf(vg=vg, lv=disk.volume_id, volume=wanted.volume_id)
    return SourceChanged(vg=vg, lv=disk.volume_id)


def is_left_alone(disk: LocalDisk, retention: Retention) -> bool:
    """Whether it is a complete disk of vdsm's older hook, about which the operator has not decided yet.

    That hook removed no disk and started its VM from it again and again: a guest's only data may be there.
    """
    return disk.is_older and disk.is_complete and retention.older_disks == "keep"


def require_room(vg: VolumeGroup, policy: Policy, size: int, writes: int) -> None:
    """Raise unless a disk of `size` bytes that will hold `writes` bytes of data fits and leaves the margins.

    Raises VolumeGroupUnusable; NoSpace (lvm); NoThinPool, ThinPoolNotZeroing, ThinPoolInactive,
    ThinPoolBroken, ThinPoolFull (lvmthin).
    """
    vg.require_usable()
    if policy.backend == "lvm":
        _require_thick_room(vg, policy.margins, size)
    else:
        _require_thin_room(vg, policy.thin_pool, policy.margins, writes)


def _require_thick_room(vg: VolumeGroup, margins: Margins, size: int) -> None:
    needed, reserve = vg.round_up(size), margins.reserve.of(vg.vg_size)
    missing = needed + reserve - vg.vg_free
    if missing > 0:
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
    """What is wrong with a thin pool that does not tell how full it is."""
    return (ThinPoolBroken if pool.lv_active else ThinPoolInactive)(vg=vg, pool=pool.lv_name)


def _still_to_write(lv: LogicalVolume) -> float:
    """Bytes that an unfinished copy has been promised and not written yet."""
    if not {OURS, UPDATING} <= lv.lv_tags:
        return 0
    writes = max(numbers_of(values_of(lv.lv_tags)["WRITES"]), default=0)
    return max(0.0, writes - lv.lv_size * (lv.data_percent or 0) / 100)


# -- stopping


class Stop(enum.Enum):
    """What a stop does with a disk of the VM that has stopped."""

    REMOVE = "remove"
    KEEP = "keep"
    LEAVE = "leave as it is"
    MARK_DELETING = "mark deleting"


def plan_stop(disk: LocalDisk, retention: Retention) -> Stop:
    """What to do, at once, with a disk whose VM has stopped and whose lock is held.

    A stop never waits: what is open or must be erased first is left to gc, as is what others depend on.
    """
    if disk.state is State.DRIFTED or is_left_alone(disk, retention):
        return Stop.LEAVE
    if retention.on_stop == "keep" and disk.is_complete:
        return Stop.KEEP
    if disk.is_open or retention.erase != "none" or disk.lv.dependents:
        return Stop.MARK_DELETING
    return Stop.REMOVE


# -- tags


def _boot_of(values: list[str]) -> tuple[str, int] | None:
    match = _BOOT.fullmatch(values[0]) if len(values) == 1 else None
    return (match[1], int(match[2])) if match else None


def _state(tags: frozenset[str], stopped: int | None, is_drifted: bool) -> State:
    if DELETING in tags:
        return State.DELETING
    if UPDATING in tags:
        return State.UNFINISHED
    if is_drifted:
        return State.DRIFTED
    return State.READY if stopped is None else State.STOPPED


def values_of(tags: Iterable[str]) -> Mapping[str, list[str]]:
    """The values of tags NAME_VALUE by their name."""
    values: defaultdict[str, list[str]] = defaultdict(list)
    for tag in tags:
        name, _, value = tag.partition("_")
        values[name].append(value)
    return values


def only_uuid(values: list[str]) -> str:
    """The one UUID that there is, "" otherwise."""
    return values[0] if len(values) == 1 and is_uuid(values[0]) else ""


def numbers_of(values: list[str]) -> list[int]:
    """Those of the values that are numbers, as tags have them."""
    return [int(value) for value in values if _NUMBER.fullmatch(value)]
