"""What hook and helper write to each other, as lines of JSON: requests of the hook, answers of the helper.

The hook (`hook/client.py`, user vdsm) asks, the helper (`helper/session.py`, root) answers.  A request has
the name of its class, as `verb`, and the fields of its class.  An answer has the fields of its class (most
have none), or is `{"error": "why"}` if the request is refused.  WIRE has the fields' names on the line.

    Look      the state of the local copies of these disks; locks and changes nothing  -> Looks
    Claim     take the disk's lock, and check whether the disk is in use               -> Claimed
    Reuse     use a kept disk again, if that is possible                               -> Prepared
    Prepare   make the claimed disk, or use a kept disk again                          -> Prepared
    Prefetch  take a template's lock, and check whether the template is cached         -> Fetched
    Fill      make the missing template LV                                             -> Prepared
    Uncached  why the claimed disk is copied without a template LV
    Progress  how many bytes of the guest's view are done, and how many were written to the volume
    Commit    the copy is complete: make the disk or template LV ready
    Cancel    the VM is powered off while it starts: end its start
    Drifted   the volumes from which the VM's disks ran when the VM stopped
    Release   the VM has stopped: remove or keep its disks
    Stale     the VM begins to run with these images on shared storage
    Rehearse  make a tiny volume as a start of this VM would, for `check`              -> Tried
    Rehearsed remove the tiny volume

Lines are validated only here: each field has one rule in _RULES, for requests and answers.  The helper trusts
nothing that the hook writes: UUIDs must be canonical, and integers and lists have limits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from enum import Enum

from localdisk import kept, uncached
from localdisk.backend import BACKENDS
from localdisk.errors import BadRequest
from localdisk.frozen import frozen, names
from localdisk.ids import is_fingerprint, is_uuid
from localdisk.units import MAX_DISK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    T = TypeVar("T")

MAX_REQUEST = 64 * 1024  # bytes of one line
MAX_DISKS = 256
PROPERTY_VALUES = (*BACKENDS, "on")

# Names on the line, if they differ from the attributes' names.
WIRE = {
    "vm_id": "vm",
    "image_id": "image",
    "volume_id": "volume",
    "domain_id": "domain",
    "property_value": "property",
    "ran_from": "disks",
    "looked": "disks",
    "template": "base",
    "base_device": "base",
    "is_local": "local",
    "is_kept": "kept",
    "is_ready": "ready",
    "is_cached": "cached",
    "seen_at": "seen",
}


class How(Enum):
    """What the hook does with a disk that the helper has prepared."""

    KEPT = "kept"  # nothing: a kept disk is used again
    NEW = "new"  # have a new disk prepared: no kept disk is used again
    COPY = "copy"  # copy all of it
    MISSING = "missing"  # fill the template LV, commit that, then ask again
    LAYERS = "layers"  # copy the layers above the base: the disk is a clone of the template LV
    ON_BASE = "on base"  # copy all, and read the base from the template LV
    UNCACHED = "uncached"  # ask again without base


# -- parts of requests and answers


@frozen
class Device:
    """An active logical volume."""

    path: str
    dm_uuid: str


@frozen
class Target(Device):
    """The logical volume that the helper has made, and the hook fills."""

    zeroed: bool  # blocks that are not written read as zeros
    bandwidth: int | None  # bytes per second
    nice: int  # absolute


@frozen
class Base:
    """A template's volume that a disk may start from; `size` in bytes of its guest's view."""

    volume_id: str
    domain_id: str  # of block storage, "" for a file
    fingerprint: str
    size: int


@frozen
class DiskIds:
    """One disk of a VM."""

    image_id: str
    volume_id: str


@frozen
class RanFrom:
    """Where a disk of a VM was when the VM stopped; the path is only compared and logged."""

    image_id: str
    path: str


# -- requests


@frozen
class Look:
    vm_id: str
    property_value: str
    disks: tuple[DiskIds, ...]


@frozen
class Claim:
    vm_id: str
    property_value: str
    image_id: str
    volume_id: str
    # When the hook asked libvirt, which then said that vdsm starts this VM: milliseconds of CLOCK_MONOTONIC,
    # which is the same for all processes; 0 if it did not ask.
    seen_at: int


@frozen
class Reuse:
    """Use a kept disk of this size and fingerprint again; if there is none, change nothing."""

    size: int
    fingerprint: str


@frozen
class Prepare:
    """`size` of the guest's view and `writes` of a copy in bytes; `base` is what the disk may start from."""

    size: int
    fingerprint: str
    writes: int
    base: Base | None


@frozen
class Prefetch:
    backend: str
    template: Base


@frozen
class Fill:
    writes: int


@frozen
class Uncached:
    """The claimed disk is copied without a template LV; `reason` is a word of `uncached.REASONS`."""

    reason: str


@frozen
class Progress:
    done: int
    written: int


@frozen
class Commit:
    pass


@frozen
class Cancel:
    vm_id: str
    property_value: str


@frozen
class Drifted:
    vm_id: str
    property_value: str
    ran_from: tuple[RanFrom, ...]


@frozen
class Release:
    vm_id: str
    property_value: str


@frozen
class Stale:
    """`images` are ids, or kept.EVERY alone."""

    vm_id: str
    images: tuple[str, ...]


@frozen
class Rehearse:
    vm_id: str
    property_value: str


@frozen
class Rehearsed:
    pass


STARTS = (Look, Claim, Reuse, Prepare, Prefetch, Fill, Uncached, Progress, Commit, Cancel)
STOPS = (Drifted, Release, Stale)
TRIALS = (Rehearse, Rehearsed)
REQUESTS = (*STARTS, *STOPS, *TRIALS)
VERBS: Mapping[str, type] = {kind.__name__.lower(): kind for kind in REQUESTS}


# -- answers


@frozen
class Done:
    """There is nothing to answer."""


@frozen
class Looked:
    """The state of one disk; `path` is the path that its local disk has or would have."""

    is_local: bool  # by the policy of this host, it must run from a local disk
    is_kept: bool  # the VM has a complete local disk of its image
    is_ready: bool
    state: str
    path: str


@frozen
class Looks:
    """A Looked for each disk of the request, in the same order."""

    looked: tuple[Looked, ...]


@frozen
class Claimed:
    """If `stays` is false and `path` is "", the disk must be prepared."""

    stays: bool  # the path of the disk is left as it is
    path: str  # the running VM's local disk, "" if there is none
    chunk: int  # bytes of a block of the thin pool in which a new local disk would be; 0 if it would be thick
    is_cached: bool  # the template cache is on


@frozen
class Prepared:
    """The local disk's path, "" if it is not made yet; what the hook must copy, and to which device."""

    how: How
    path: str = ""
    target: Target | None = None
    base_device: Device | None = None


@frozen
class Fetched:
    """Whether a template is in the cache; `chunk` is as in Claimed, for a new copy of it."""

    is_ready: bool
    chunk: int


@frozen
class Tried:
    """The tiny volume; None if it would fit only after an eviction, which a start would do."""

    device: Device | None


# -- lines


def write_request(request: object) -> bytes:
    """A request as one line, without its line end."""
    return json.dumps({"verb": type(request).__name__.lower(), **_plain(request)}).encode()


def read_request(line: bytes) -> Any:
    """The request in a line: an object of a class in REQUESTS.  Raises BadRequest."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise BadRequest(problem="it is no JSON") from None
    if not isinstance(data, dict) or not isinstance(data.get("verb"), str):
        raise BadRequest(problem="it has no verb")
    kind = VERBS.get(data.pop("verb"))
    if kind is None or data.keys() != set(map(_wire, names(kind))):
        raise BadRequest(problem="its verb or its fields are not known")
    try:
        return _read(kind, data)
    except ValueError as problem:
        raise BadRequest(problem=str(problem)) from None


def write_answer(answer: object) -> dict[str, Any]:
    """An answer as it is written to a line."""
    found: dict[str, Any] = _plain(answer)
    return found


def read_answer(kind: type[T], data: object) -> T:
    """The answer of this class in `data`.  Raises ValueError if `data` is no such answer."""
    return _read(kind, data)


def _wire(name: str) -> str:
    return WIRE.get(name, name)


def _plain(found: Any) -> Any:
    if isinstance(found, Enum):
        return found.value
    if hasattr(type(found), "_names"):
        return {_wire(name): _plain(getattr(found, name)) for name in names(type(found))}
    return [_plain(each) for each in found] if isinstance(found, (list, tuple)) else found


def _read(kind: type[T], data: object) -> T:
    if not isinstance(data, dict) or data.keys() != set(map(_wire, names(kind))):
        fields = ", ".join(map(_wire, names(kind)))
        raise ValueError(f"{_SHOWN.get(kind, kind.__name__)} is not {{{fields}}}")
    of = " of the base" if kind is Base else ""
    return kind(**{name: _RULES[name](_wire(name) + of, data[_wire(name)]) for name in names(kind)})


# -- one rule for each field


def _one_of(*words: str) -> Callable[[str, object], str]:
    def rule(name: str, value: object) -> str:
        if value not in words:
            raise ValueError(f"the {name} is not known")
        return str(value)

    return rule


def _integer(low: int, high: int) -> Callable[[str, object], int]:
    def rule(name: str, value: object) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name} is no integer from {low} to {high}")
        return value

    return rule


def _list_of(read: Callable[[object], T], least: int = 0) -> Callable[[str, object], tuple[T, ...]]:
    def rule(name: str, value: object) -> tuple[T, ...]:
        if not isinstance(value, list) or not least <= len(value) <= MAX_DISKS:
            raise ValueError(f"{name} is no list of at most {MAX_DISKS}")
        return tuple(map(read, value))

    return rule


def _maybe(kind: type[T]) -> Callable[[str, object], T | None]:
    return lambda _name, value: None if value is None else _read(kind, value)


def _uuid(name: str, value: object) -> str:
    if not is_uuid(value):
        raise ValueError(f"{name} is no canonical UUID")
    return str(value)


def _uuid_or_nothing(name: str, value: object) -> str:
    return "" if value == "" else _uuid(name, value)


def _size(name: str, value: object) -> int:
    size = _integer(512, MAX_DISK)(name, value)
    if size % 512:
        raise ValueError(f"{name} is malformed")
    return size


def _fingerprint(name: str, value: object) -> str:
    if not is_fingerprint(value):
        raise ValueError(f"{name} is malformed")
    return str(value)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is no text")
    return value


def _flag(name: str, value: object) -> bool:
    if type(value) is not bool:
        raise ValueError(f"the {name} is not known")
    return value


def _bandwidth(name: str, value: object) -> int | None:
    return None if value is None else _integer(1, MAX_DISK)(name, value)


def _images(name: str, value: object) -> tuple[str, ...]:
    found = _list_of(str, least=1)(name, value)
    if found != (kept.EVERY,) and not all(map(is_uuid, found)):
        raise ValueError("an image is no canonical UUID")
    return found


_SHOWN: dict[type, str] = {Base: "base", DiskIds: "a disk", RanFrom: "a disk"}
_RULES: dict[str, Callable[[str, Any], Any]] = {
    "vm_id": _uuid,
    "image_id": _uuid,
    "volume_id": _uuid,
    "domain_id": _uuid_or_nothing,
    "property_value": _one_of(*PROPERTY_VALUES),
    "backend": _one_of(*BACKENDS),
    "reason": _one_of(*uncached.REASONS),
    "size": _size,
    "writes": _integer(0, MAX_DISK),
    "done": _integer(0, MAX_DISK),
    "written": _integer(0, MAX_DISK),
    "fingerprint": _fingerprint,
    "base": _maybe(Base),
    "template": lambda _name, value: _read(Base, value),
    "disks": _list_of(lambda row: _read(DiskIds, row)),
    "ran_from": _list_of(lambda row: _read(RanFrom, row)),
    "images": _images,
    "path": _text,
    "dm_uuid": _text,
    "state": _text,
    "zeroed": _flag,
    "bandwidth": _bandwidth,
    "nice": _integer(-20, 19),
    "looked": _list_of(lambda row: _read(Looked, row)),
    "is_local": _flag,
    "is_kept": _flag,
    "is_ready": _flag,
    "chunk": _integer(0, MAX_DISK),
    "is_cached": _flag,
    "seen_at": _integer(0, MAX_DISK),
    "stays": _flag,
    "how": lambda _name, value: How(value),
    "target": _maybe(Target),
    "base_device": _maybe(Device),
    "device": _maybe(Device),
}
