"""The places that can have a kernel with device-mapper, and which of them work on this machine.

    choose("auto").boot(order)

Each place is really tried, with a deadline: /dev/kvm may exist and hang, or a kernel may die at its first
program.  The result is printed in one line.  If a guest boots, dies or hangs, that is remembered in .bed/
until this machine boots again; a place that could not be tried, for example without a package, is tried
again.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bed import here, usermode, virtme
from tests.bed.guest import STATE, GuestDied, NoKernel, Order, TooLate
from tests.bed.packages import NoPackage

MEMORY = "256M"  # of a trial's guest in User Mode Linux
MEMORY_QEMU = "1G"


@dataclass(frozen=True)
class Place:
    """`boot` runs an order; `trial` raises NoKernel, GuestDied or TooLate where that is not possible."""

    name: str
    boot: Callable[[Order], int]
    trial: Callable[[], None]


def choose(wanted: str) -> Place:
    """The place `wanted`, or the first that works: of all ("auto") or of the guests ("guest").

    Raises NoKernel, its message says why for each place.
    """
    candidates = [place for place in PLACES if may_be(place, wanted)]
    reasons = []
    for place in candidates:
        reason = why_not(place)
        if reason is None:
            return place
        reasons.append(f"{place.name}: {reason}")
    raise NoKernel("no kernel to run on: " + "; ".join(reasons))


def may_be(place: Place, wanted: str) -> bool:
    return place.name == wanted or wanted == "auto" or (wanted == "guest" and place.name != "here")


def why_not(place: Place) -> str | None:
    """Why `place` does not work, None if it works.  It is printed, and tried only once after each boot."""
    memory = Memory(place.name)
    found = memory.read()
    if found is None:
        found = attempt(place)
        if found.lasts:
            memory.write(found)
    verdict = "works" if found.reason is None else f"no: {found.reason}"
    print(f"boot: {place.name}: {verdict} (tried in {found.seconds:.1f} s)", file=sys.stderr, flush=True)
    return found.reason


def attempt(place: Place) -> Found:
    if os.geteuid() != 0:
        return Found("not root: a guest works with this machine's own files, some of which only root reads")
    STATE.mkdir(exist_ok=True)
    began = time.monotonic()
    try:
        place.trial()
    except TooLate:
        return Found("hangs: its guest had not ended in time", time.monotonic() - began, lasts=True)
    except GuestDied as problem:
        return Found(str(problem), time.monotonic() - began, lasts=True)
    except (NoKernel, NoPackage) as problem:
        return Found(str(problem), time.monotonic() - began)
    return Found(None, time.monotonic() - began, lasts=True)


# -- what is remembered


@dataclass(frozen=True)
class Found:
    """What came of a trial: `reason` why not, None if it works; `lasts` until the machine boots again."""

    reason: str | None
    seconds: float = 0.0
    lasts: bool = False


class Memory:
    """The result of a trial in .bed/, until this machine boots again or what was tried changes."""

    def __init__(self, name: str) -> None:
        self._file = STATE / f"place-{name}"
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._of = [boot_id, os.geteuid(), usermode.PINS.read_text()]

    def read(self) -> Found | None:
        try:
            record = json.loads(self._file.read_text())
        except (OSError, ValueError):
            return None
        return Found(record["reason"], record["seconds"]) if record["of"] == self._of else None

    def write(self, found: Found) -> None:
        STATE.mkdir(exist_ok=True)
        record = {"of": self._of, "reason": found.reason, "seconds": found.seconds}
        self._file.write_text(json.dumps(record))


# -- the trials


def try_guest(boot: Callable[[Order], int], memory: str, deadline: float) -> None:
    """A guest that does nothing but load device-mapper has to boot and to end well, in time.

    Raises GuestDied, whose message ends with the last line on the guest's console, or TooLate.
    """
    with tempfile.NamedTemporaryFile(dir=STATE, prefix="trial-") as log:
        try:
            status = boot(Order(["modprobe", "dm-thin-pool"], None, deadline, memory, log=Path(log.name)))
        except GuestDied as problem:
            raise GuestDied(f"{problem}{last_line(Path(log.name))}") from None
        if status != 0:
            raise GuestDied(f"dm-thin-pool cannot be loaded{last_line(Path(log.name))}")


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1]}" if lines else ""


def try_kvm() -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise NoKernel("no /dev/kvm")
    virtme.try_kvm()
    try_guest(boot_kvm, MEMORY_QEMU, 25)  # a guest that works is up in less than five


def boot_kvm(order: Order) -> int:
    return virtme.boot(virtme.find_kernel(), order, kvm=True)


def boot_recent(order: Order) -> int:
    return usermode.boot(usermode.recent(), order)


def boot_distribution(order: Order) -> int:
    return usermode.boot(usermode.distribution(), order)


def boot_emulation(order: Order) -> int:
    return virtme.boot(virtme.find_kernel(), order, kvm=False)


PLACES = (
    Place("here", here.boot, here.trial),
    Place("kvm", boot_kvm, try_kvm),
    Place("usermode", boot_recent, partial(try_guest, boot_recent, MEMORY, 30)),
    Place("usermode-of-release", boot_distribution, partial(try_guest, boot_distribution, MEMORY, 30)),
    Place("emulation", boot_emulation, partial(try_guest, boot_emulation, MEMORY_QEMU, 300)),
)
NAMES = tuple(place.name for place in PLACES)
