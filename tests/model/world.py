"""What a host must offer to the walk."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tests.model.predict import Call
from tests.model.rules import Rules
from tests.model.seen import Seen
from tests.model.state import Room, Source, State

HOOKS = ("after_disk_prepare", "before_vm_start", "after_vm_destroy", "before_vm_destroy")
STARTS = HOOKS[:2]
LEFT = ("copying", "filling")
FORBIDDEN = (
    "before_vm_migrate_source",
    "before_vm_migrate_destination",
    "before_vm_hibernate",
    "before_vm_dehibernate",
)


@dataclass(frozen=True)
class Trouble:
    """What befalls a call at its moment number `at`; moments are before and after each command.

    helper, hook    that half is killed
    all             both are, or gc is
    term            both are asked to end
    fail            a tool fails
    pause           others have their turn first
    copying         the call is left alone while it copies, to be finished later
    filling         the same, while it copies a template into the cache

    `of_changes`: only those commands count that change something.
    """

    kind: str
    at: int = 0
    of_changes: bool = False


@dataclass(frozen=True)
class Ended:
    """How a call ended.

    result      done, refused, killed; paused, copying or filling: it has not ended
    trouble     what befell it, "" if nothing did
    paths       image id -> volume id: the disks that the VM is to run from by what vdsm was answered
    has_doubts  gc ended with 1
    other       how the call that was in the way ended, which was let go on
    """

    result: str
    trouble: str = ""
    paths: Mapping[str, str] | None = None
    has_doubts: bool = False
    said: str = ""
    other: Ended | None = None

    @property
    def is_good(self) -> bool:
        return self.result in ("done", *LEFT)

    @property
    def is_refused(self) -> bool:
        return self.result == "refused"


@dataclass(frozen=True)
class Look:
    """What exists now; `erased`: how removed volumes were erased, if the world knows it."""

    now: int
    volumes: tuple[Seen, ...]
    locks: frozenset[str]  # names of files
    marks: Mapping[str, int]  # names of files of power-offs, and when they were written, epoch
    erased: Mapping[str, str] = field(default_factory=dict)  # by UUID


def _number(number: int) -> str:
    return f"{number:08x}-0000-4000-8000-000000000000"


# Volumes that look like local disks and are none: their names and tags.
STRANGERS: Mapping[str, frozenset[str]] = {
    _number(4): frozenset(),
    _number(5): frozenset({"localdisk"}),
    _number(6): frozenset({"localdisk", "UPDATING", f"VM_{_number(1)}"}),
    _number(7): frozenset({"DELETING", f"VM_{_number(1)}", f"VM_{_number(2)}", f"IU_{_number(3)}"}),
    "data": frozenset({"localdisk", "DELETING", f"VM_{_number(1)}", f"IU_{_number(3)}"}),
    _number(0xA8).upper(): frozenset({"localdisk", "DELETING", f"VM_{_number(1)}", f"IU_{_number(3)}"}),
    _number(9): frozenset({"DELETING", "ERASE_zero"}),
}


class World(Protocol):
    """A host, with the kinds of trouble that it can make and the names of the steps that it cannot do.

    Volumes are named by LV names, where not said otherwise; sizes are bytes.
    """

    @property
    def troubles(self) -> tuple[str, ...]: ...

    @property
    def cannot(self) -> frozenset[str]: ...

    def moments(self, call: Call) -> int:
        """About how many moments a call has."""

    def look(self) -> Look: ...

    def room(self) -> Room: ...

    def new_image(self, rng: random.Random, base: Source | None = None) -> tuple[str, Source]:
        """An image's id and its source, which stands on the template `base`."""

    def change(
        self, image_id: str, source: Source, how: str, rng: random.Random, base: Source | None = None
    ) -> Source | None:
        """content, snapshot, merge or grow, or template: only `base` has changed.

        None where that is not possible.
        """

    def new_template(self, rng: random.Random) -> Source: ...

    def change_template(self, template: Source, rng: random.Random) -> Source:
        """Another version of it."""

    def configure(self, rules: Rules) -> None: ...

    def set_clock(self, now: int) -> None: ...

    def fill(self, size: int) -> None:
        """Others take so much of the room for preallocated disks, in all."""

    def add(self, name: str, tags: frozenset[str], size: int) -> None:
        """A volume that localdisk did not make."""

    def snapshot(self, name: str, origin: str) -> None:
        """An administrator's snapshot of a volume."""

    def remove(self, name: str) -> None: ...

    def write(self, name: str, token: str) -> None:
        """The guest writes something that nobody else writes."""

    def hold(self, uuid: str) -> bool:
        """Something opens a volume; False if the volume is not active."""

    def let_go(self, uuid: str) -> None: ...

    def tamper(self, uuid: str, how: str, token: str) -> None:
        """spoil what a template LV holds, make writable, change a tag or remove a tag."""

    def silence(self, is_silent: bool) -> None:
        """libvirt does not answer, or does again."""

    def live_snapshot(self, state: State, vm_id: str, image_id: str) -> None:
        """Of a local disk of a running VM, which then writes to a new layer on shared storage."""

    def power_cut(self, state: State) -> None:
        """The host loses power, and boots."""

    def perform(self, state: State, call: Call, trouble: Trouble | None) -> Ended:
        """Make the call; `state` says what vdsm knows of its VMs."""

    def resume(self) -> Ended:
        """Let the paused call go on to its end."""
