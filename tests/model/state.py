"""The state of the model: rules, VMs, their sources, local disks.  It is immutable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tests.model.rules import Policy, Rules

# What a local disk can be.
UNFINISHED, READY, STOPPED, DELETING, ASIDE = "unfinished", "ready", "stopped", "deleting", "aside"
DRIFTED = "drifted"  # its VM ran from another volume in the end
COMPLETE = (READY, STOPPED)
GUESTS = (*COMPLETE, DRIFTED)  # what holds data of a guest
DESTROYING, DESTROYED = ".destroying", ".destroyed"  # what the files of a power-off end in
ANOTHER = "?"  # a name that nobody knows before it is seen


Piece = tuple[str, int]  # of a thin pool: the key of the template LV that it was written for, and its bytes


@dataclass(frozen=True)
class Source:
    """An image on shared storage.  `version` changes with what is written, `content` is what a guest reads.

    An empty layer upon the leaf, as a snapshot makes it, is another `volume` of the same version.
    """

    volume: str  # id of its leaf
    version: str
    content: str
    size: int  # bytes that the guest sees
    data: int  # bytes of data among them; -1: not known; upon a template, those of the layers above it
    base: str = ""  # the template that it stands on; then `content` is LAYERS/CONTENT of that


@dataclass(frozen=True)
class Vm:
    """`value` is what the custom property says by now, `using` what it said when the VM was started."""

    images: tuple[str, ...]
    value: str
    using: str = "off"
    is_defined: bool = False  # in libvirt: vdsm's placeholder, or once the VM has started its domain
    has_started: bool = False  # since it was defined: its domain has disks
    is_active: bool = False
    paths: Mapping[str, str] = field(default_factory=dict)  # image id -> volume id, of its local disks
    drifted: frozenset[str] = frozenset()  # images of which a live snapshot was made: it writes elsewhere


@dataclass(frozen=True)
class LocalDisk:
    """A local disk as it should be.  `holds` is the source's content, then what the VM wrote, in order."""

    name: str  # of its LV: the volume that it is a copy of; "": set aside, it has a name of its own
    vm: str
    image: str
    state: str
    version: str  # of the source; "": not known, made by the older hook
    holds: tuple[str, ...]
    size: int
    is_thin: bool
    writes: int  # bytes that its copy writes; -1: not known
    shared: Piece = ("", 0)  # what it has in common with a template LV that it is a snapshot of
    stopped: int | None = None
    unneeded: int | None = None
    erase: str = "none"  # what must be done to it once it is set aside
    is_older: bool = False
    is_stale: bool = False  # its VM was started without it
    is_active: bool = True  # as far as a stop of its VM says
    made: int | None = None  # when its LV was made, by the clock; None: it has not been seen yet

    @property
    def is_aside(self) -> bool:
        return self.state == ASIDE


@dataclass(frozen=True)
class Cached:
    """A template LV as it should be: a local copy of a template's volume, as that was in some version."""

    name: str  # of its LV; "": it has not been seen yet
    template: str
    version: str
    state: str  # UNFINISHED, READY or ASIDE
    holds: str  # content
    size: int
    is_thin: bool
    data: int  # bytes that it takes of the thin pool, will take when it is complete
    used: int = 0
    erase: str = "none"  # what must be done to it once it is set aside
    is_active: bool = False
    is_sound: bool = True  # nobody has changed what says what it is
    is_odd: bool = False  # it is plainly not as it was made
    is_spoiled: bool = False  # somebody has written to it

    def used_at(self, now: int) -> Cached:
        """It is used now, which is written down to the minute."""
        return self if 0 <= now - self.used < 60 else replace(self, used=now)

    @property
    def takes(self) -> int:
        """Bytes that `cache.max_size` is about."""
        return self.data if self.is_thin else self.size


@dataclass(frozen=True)
class Flight:
    """A start, or a prefetch, in the midst of copying: nobody else may work on what it makes."""

    vm: str  # "" of a prefetch
    image: str
    key: str  # of the disk, or of the template LV while that is filled
    policy: Policy  # when it began
    source: Source | None = None  # of the template that it fills
    reads: str = ""  # the key of a template LV that it has open
    replaced: tuple[str, ...] = ()  # the keys of kept disks that are removed once it is complete
    others: tuple[str, ...] = ()  # the keys of all disks of the image that it found
    names: frozenset[str] = frozenset()  # that these disks had

    @property
    def is_filling(self) -> bool:
        return self.source is not None


@dataclass(frozen=True)
class Room:
    """Bytes for preallocated disks, of which others take some; bytes of the thin pool, which is apart."""

    thick: int
    pool: int
    filled: int = 0
    extent: int = 4 << 20


@dataclass(frozen=True)
class State:
    """Disks have keys: an LV's UUID, or one of `newborn` for a disk that has not been seen yet."""

    now: int  # seconds since the epoch
    rules: Rules
    vms: Mapping[str, Vm]
    sources: Mapping[str, Source]  # by image id
    room: Room
    disks: Mapping[str, LocalDisk] = field(default_factory=dict)
    templates: Mapping[str, Source] = field(default_factory=dict)  # on storage, by volume
    cached: Mapping[str, Cached] = field(default_factory=dict)  # template LVs
    foreign: frozenset[str] = frozenset()  # names that others' volumes have
    backups: Mapping[str, str] = field(default_factory=dict)  # key of a disk -> a snapshot of it, not ours
    busy: frozenset[str] = frozenset()  # keys of disks that something else has open
    flight: Flight | None = None
    locked: frozenset[str] = frozenset()  # keys of disks that somebody else works on just now
    prepared: str = ""  # the VM that somebody else prepares a disk of just now
    marks: Mapping[str, int] = field(default_factory=dict)  # files of power-offs: name -> when, epoch
    is_silent: bool = False  # libvirt does not answer
    is_flaky: bool = False  # it does not answer just once, the helper
    is_mute: bool = False  # it does not answer just once, the hook
    is_uncached: bool = False  # something goes wrong about the cache just once

    def named(self, volume: str) -> str:
        """The key of the disk whose LV has that name, "" if there is none."""
        return next((key for key, disk in self.disks.items() if disk.name == volume), "")

    def owner(self, image_id: str) -> str:
        """The VM that the image is attached to."""
        return next(vm_id for vm_id, vm in self.vms.items() if image_id in vm.images)

    def is_open(self, key: str) -> bool:
        return (
            key in self.busy or key in self.in_use or (self.flight is not None and self.flight.reads == key)
        )

    def is_locked(self, key: str) -> bool:
        flight = self.flight
        return key in self.locked or (flight is not None and key in (flight.key, *flight.others))

    def is_running(self, vm_id: str) -> bool:
        """By libvirt."""
        vm = self.vms.get(vm_id)
        return not self.is_silent and vm is not None and vm.is_active

    def is_waiting(self, vm_id: str) -> bool:
        """By libvirt it is defined and does not run: vdsm may be starting it."""
        vm = self.vms.get(vm_id)
        return not self.is_silent and vm is not None and vm.is_defined and not vm.is_active

    def is_prepared(self, key: str) -> bool:
        """Whether somebody works on another disk of the VM of this one."""
        flying = self.flight.vm if self.flight and self.flight.key != key else ""
        return self.disks[key].vm in (self.prepared, flying)

    @property
    def in_use(self) -> Mapping[str, str]:
        """The keys of the disks that VMs run from -> the VM."""
        active = {vm_id: vm for vm_id, vm in self.vms.items() if vm.is_active}
        used = {self.named(volume): vm_id for vm_id, vm in active.items() for volume in vm.paths.values()}
        return {key: vm_id for key, vm_id in used.items() if key}

    @property
    def free(self) -> int:
        """Bytes for preallocated disks."""
        taken = sum(disk.size for disk in self.disks.values() if not disk.is_thin)
        taken += sum(lv.size for lv in self.cached.values() if not lv.is_thin)
        return self.room.thick - self.room.filled - taken

    @property
    def pool_used(self) -> int:
        """Bytes of data in the thin pool, once the copies that are under way are complete."""
        thin = [disk for disk in self.disks.values() if disk.is_thin]
        pieces = {disk.shared for disk in thin if disk.shared[0] not in self.cached}
        cached = sum(lv.data for lv in self.cached.values() if lv.is_thin)
        return sum(disk.writes for disk in thin) + cached + sum(size for _, size in pieces)

    def with_vm(self, vm_id: str, **changes: Any) -> State:
        return replace(self, vms={**self.vms, vm_id: replace(self.vms[vm_id], **changes)})

    def with_mark(self, vm_id: str, ending: str, when: int | None) -> State:
        marks = {name: time for name, time in self.marks.items() if name != vm_id + ending}
        return replace(self, marks=marks if when is None else {**marks, vm_id + ending: when})

    def is_cancelled(self, vm_id: str) -> bool:
        """Whether the VM was powered off while it started."""
        return not {vm_id + DESTROYING, vm_id + DESTROYED}.isdisjoint(self.marks)

    def age_of(self, vm_id: str, ending: str) -> float:
        """Seconds since the file was written, whichever way the clock was set; infinite if there is none."""
        return abs(self.now - self.marks.get(vm_id + ending, -float("inf")))

    def with_disk(self, key: str, disk: LocalDisk | None) -> State:
        disks = {k: d for k, d in self.disks.items() if k != key}
        return replace(self, disks=disks if disk is None else {**disks, key: disk})

    def name_of(self, key: str) -> str:
        """The name of a disk's LV or of a template LV."""
        return self.disks[key].name if key in self.disks else self.cached[key].name

    def with_cached(self, key: str, lv: Cached | None) -> State:
        others = {k: c for k, c in self.cached.items() if k != key}
        return replace(self, cached=others if lv is None else {**others, key: lv})

    def shelf(self, base: Source, is_thin: bool) -> str:
        """The key of the template LV of this template as it is now, "" if there is none."""
        found = (
            key
            for key, lv in self.cached.items()
            if (lv.template, lv.version, lv.is_thin) == (base.volume, base.version, is_thin)
            and lv.state != ASIDE
        )
        return next(found, "")


def newborn(vm_id: str, image_id: str) -> str:
    return f"new {vm_id} {image_id}"


def is_newborn(key: str) -> bool:
    return key.startswith("new ")
