"""A logical volume as it is, and how it differs from the local disk that it should be.

The tags are those of docs/architecture.md and of the docstring of localdisk/volumes/local_disk.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tests.model.state import (
    ANOTHER,
    ASIDE,
    COMPLETE,
    DELETING,
    DRIFTED,
    GUESTS,
    READY,
    STOPPED,
    UNFINISHED,
    LocalDisk,
    Piece,
)


@dataclass(frozen=True)
class Seen:
    """One logical volume; sizes in bytes."""

    name: str
    uuid: str
    size: int
    tags: frozenset[str]
    is_open: bool
    is_thin: bool
    holds: tuple[str, ...] | None  # as LocalDisk.holds; None: its bytes were not looked at
    written: int | None = None  # data in a thin one that is its own; None: not known
    shared: Piece = ("", 0)  # what it has in common with the template LV that it was made from
    is_template: bool = False  # it was made as a template LV
    is_active: bool = True
    is_read_only: bool = False
    made: int = 0  # seconds since the epoch

    def values(self, name: str) -> frozenset[str]:
        """What follows `name_` in the tags."""
        return frozenset(tag[len(name) + 1 :] for tag in self.tags if tag.startswith(f"{name}_"))


def unlike(disk: LocalDisk, seen: Seen, during: range) -> Iterator[str]:
    """How the volume differs from the disk.

    `during` are the seconds that the call took; a mark that it made may be of any of them.
    """
    if (disk.size, disk.is_thin) != (seen.size, seen.is_thin):
        yield f"it is {'thin' if seen.is_thin else 'thick'}, {seen.size} bytes"
    if disk.state in GUESTS and seen.holds not in (None, disk.holds):
        yield f"it holds {seen.holds}"
    if disk.shared[1] != seen.shared[1]:
        yield f"it has {seen.shared[1]} bytes of a template's"
    if disk.name not in ("", ANOTHER, seen.name):
        yield f"its name is {seen.name}"
    yield from _unlike_tags(disk, seen, during)


def _unlike_tags(disk: LocalDisk, seen: Seen, during: range) -> Iterator[str]:
    wanted = _wanted(disk)
    for tag in sorted(wanted - seen.tags):
        yield f"it lacks the tag {tag}"
    if disk.state == DELETING:  # how it came to that does not matter any more
        return
    for name, mark in (("STOPPED", disk.stopped), ("UNNEEDED", disk.unneeded)):
        times = () if mark is None else during if mark in during else (mark,)
        marks = seen.values(name)
        if len(marks) != bool(times) or not marks <= {str(time) for time in times}:
            yield f"its {name} is {sorted(marks)}, not {mark}"
    if (len(seen.values("DRIFTED")) == 1) != (disk.state == DRIFTED):
        yield f"its DRIFTED is {sorted(seen.values('DRIFTED'))}"
    if disk.is_aside and (seen.values("ASIDE") == {seen.name}) == bool(disk.name):
        yield f"its name is {seen.name}, it is to get another"
    if _writes(disk) < 0 and disk.state == UNFINISHED and len(seen.values("WRITES")) != 1:
        yield "it does not say what will be written"
    elif disk.shared[1] and disk.state == UNFINISHED:
        told, writes = int(*seen.values("WRITES")), disk.writes + disk.shared[1]
        if abs(told - writes) > disk.size / 10_000:  # LVM tells a hundredth of a percent
            yield f"it says that {told} bytes will be written, not {writes}"
    for tag in sorted(seen.tags - wanted):
        if not tag.startswith(_ELSEWHERE[disk.state]) and not (
            tag.startswith("WRITES_") and _writes(disk) < 0
        ):
            yield f"it has the tag {tag}"


def _writes(disk: LocalDisk) -> int:
    """What its tag says that will be written; -1: not known, as what a template LV holds is known roughly."""
    return -1 if disk.shared[1] else disk.writes


def _wanted(disk: LocalDisk) -> set[str]:
    """The tags that such a disk has and that say nothing else than what it is."""
    owner = {f"VM_{disk.vm}", f"IU_{disk.image}"} | (set() if disk.is_older else {"localdisk"})
    owner |= {"STALE"} if disk.is_stale and disk.state in COMPLETE else set()
    writes = set() if disk.is_older or _writes(disk) < 0 else {f"WRITES_{disk.writes}"}
    return {
        UNFINISHED: owner | {"UPDATING"} | writes,
        READY: owner,
        STOPPED: owner,
        DRIFTED: owner,
        DELETING: owner | {"DELETING"},
        ASIDE: {"localdisk", "DELETING", f"ERASE_{disk.erase}"},
    }[disk.state]


# Tags that are looked at elsewhere: marks above, sources in judge.py; PU_ is the older hook's.
_ELSEWHERE = {
    UNFINISHED: ("SOURCE_", "PU_"),
    READY: ("SOURCE_", "PU_", "STOPPED_", "UNNEEDED_", "BOOT_"),
    STOPPED: ("SOURCE_", "PU_", "STOPPED_", "UNNEEDED_", "BOOT_"),
    DRIFTED: ("SOURCE_", "PU_", "DRIFTED_"),
    ASIDE: ("ASIDE_",),
}


def as_seen(disk: LocalDisk, seen: Seen) -> LocalDisk:
    """`disk` with the times and the data that it really has."""
    changes: dict[str, Any] = {"shared": seen.shared, "made": seen.made}
    if disk.name == ANOTHER:
        changes["name"] = seen.name
    if disk.state in COMPLETE:
        changes["is_active"] = seen.is_active
        for name, field in (("STOPPED", "stopped"), ("UNNEEDED", "unneeded")):
            changes[field] = next((int(value) for value in seen.values(name)), None)
    elif (
        disk.state not in (UNFINISHED, DRIFTED) and seen.written is not None
    ):  # a copy that was given up stays short
        changes["writes"] = seen.written
    return replace(disk, **changes)
