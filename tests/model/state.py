"""All that is known: the rules, the VMs, their sources, the local disks.  Nothing is changed in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tests.model.rules import Rules

# What a local disk can be.
UNFINISHED, READY, STOPPED, DELETING, ASIDE = "unfinished", "ready", "stopped", "deleting", "aside"
COMPLETE = (READY, STOPPED)


@dataclass(frozen=True)
class Source:
    """An image on shared storage.  `version` changes with every change, `content` is what a guest reads."""

    volume: str  # id of its leaf
    version: str
    content: str
    size: int  # bytes that the guest sees
    data: int  # bytes of data among them; -1: not known


@dataclass(frozen=True)
class Vm:
    """`value` is what the custom property says by now, `using` what it said when the VM was started."""

    images: tuple[str, ...]
    value: str
    using: str = "off"
    is_defined: bool = False  # vdsm's placeholder
    is_active: bool = False
    paths: Mapping[str, str] = field(default_factory=dict)  # image id -> volume id, of its local disks


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
    stopped: int | None = None
    unneeded: int | None = None
    erase: str = "none"  # what must be done to it once it is set aside
    is_older: bool = False

    @property
    def is_aside(self) -> bool:
        return self.state == ASIDE


@dataclass(frozen=True)
class Flight:
    """A start that is in the midst of copying: nobody else may work on its disk."""

    vm: str
    image: str
    key: str  # of the disk
    erase: str  # what the rules said when it began


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
    foreign: frozenset[str] = frozenset()  # names that others' volumes have
    busy: frozenset[str] = frozenset()  # keys of disks that something else has open
    flight: Flight | None = None
    locked: frozenset[str] = frozenset()  # keys of disks that somebody else works on just now
    is_silent: bool = False  # libvirt does not answer
    is_flaky: bool = False  # it does not answer just once

    def named(self, volume: str) -> str:
        """The key of the disk whose LV has that name, "" if there is none."""
        return next((key for key, disk in self.disks.items() if disk.name == volume), "")

    def owner(self, image_id: str) -> str:
        """The VM that the image is attached to."""
        return next(vm_id for vm_id, vm in self.vms.items() if image_id in vm.images)

    def is_open(self, key: str) -> bool:
        return key in self.busy or key in self.in_use

    def is_locked(self, key: str) -> bool:
        return key in self.locked or (self.flight is not None and self.flight.key == key)

    def is_known(self, vm_id: str) -> bool:
        """To libvirt, in any state."""
        vm = self.vms.get(vm_id)
        return not self.is_silent and vm is not None and (vm.is_active or vm.is_defined)

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
        return self.room.thick - self.room.filled - taken

    @property
    def pool_used(self) -> int:
        """Bytes of data in the thin pool, once the copies that are under way are complete."""
        return sum(disk.writes for disk in self.disks.values() if disk.is_thin)

    def with_vm(self, vm_id: str, **changes: Any) -> State:
        return replace(self, vms={**self.vms, vm_id: replace(self.vms[vm_id], **changes)})

    def with_disk(self, key: str, disk: LocalDisk | None) -> State:
        disks = {k: d for k, d in self.disks.items() if k != key}
        return replace(self, disks=disks if disk is None else {**disks, key: disk})


def newborn(vm_id: str, image_id: str) -> str:
    return f"new {vm_id} {image_id}"


def is_newborn(key: str) -> bool:
    return key.startswith("new ")
