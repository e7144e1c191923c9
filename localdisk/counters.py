"""What has happened on this host since it booted, added up for the metrics: one small file in /run/localdisk.

The file is JSON, `{"copies": 3, "failures": {"no_space": 1}, …}`, the fields of `Counters`.  It is root's
alone, written in place under a lock on itself: nothing is left of a process that is killed.  Counting never
fails what is counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from localdisk import lock, log
from localdisk.errors import Error
from localdisk.frozen import field, frozen, names, plain_values, replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LIMIT = 4096  # bytes of the file
_REASONS, _UNCACHED = 64, 24  # different reasons that are counted


@frozen
class Counters:
    """Sums since boot; bytes, seconds, and times in seconds since the epoch (0: never)."""

    copies: int = 0
    copied_bytes: int = 0
    copy_seconds: float = 0.0
    template_hits: int = 0  # disks that started from a template LV that was there
    template_misses: int = 0  # template LVs that were made
    templates_evicted: int = 0
    # Disks that were copied without a template LV though the cache is on, by reason (`uncached.py`).
    uncached: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)  # by reason, the error's name in snake case
    gc_runs: int = 0
    gc_last_run: int = 0
    gc_last_success: int = 0
    gc_removed: int = 0
    gc_removed_bytes: int = 0


def read() -> Counters:
    """What has been counted; zeros if the file is missing or not understood."""
    try:
        with _opened(os.O_RDONLY, fcntl.LOCK_SH) as fd:
            return _parse(os.pread(fd, _LIMIT, 0))
    except OSError:
        return Counters()


def copied(written: int, seconds: float) -> None:
    """A copy of so many bytes has been completed."""
    _change(
        lambda old: replace(
            old,
            copies=old.copies + 1,
            copied_bytes=old.copied_bytes + written,
            copy_seconds=round(old.copy_seconds + seconds, 3),
        )
    )


def reason(error: Error) -> str:
    """The name of an error as it is counted: `no_space`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__).lower()


def failed(error: Error | str) -> None:
    """A start or stop was refused or broken off; counted by the name of the error."""
    name = error if isinstance(error, str) else reason(error)
    _change(lambda old: replace(old, failures=_one_more(old.failures, name, _REASONS)))


def uncached(name: str) -> None:
    """A disk is copied without a template LV though the cache is on."""
    _change(lambda old: replace(old, uncached=_one_more(old.uncached, name, _UNCACHED)))


def _one_more(sums: dict[str, int], name: str, limit: int) -> dict[str, int]:
    known = name if name in sums or len(sums) < limit else "other"
    return {**sums, known: sums.get(known, 0) + 1}


def template_hit() -> None:
    """A disk has started from a template LV."""
    _change(lambda old: replace(old, template_hits=old.template_hits + 1))


def template_miss() -> None:
    """A template LV has been made."""
    _change(lambda old: replace(old, template_misses=old.template_misses + 1))


def template_evicted() -> None:
    """A template LV has been removed to make room, or because its time was over."""
    _change(lambda old: replace(old, templates_evicted=old.templates_evicted + 1))


def gc_ran(removed: int, removed_bytes: int, is_good: bool) -> None:
    """A run of gc is complete; `is_good`: it had no doubts and no failures."""
    now = int(time.time())
    _change(
        lambda old: replace(
            old,
            gc_runs=old.gc_runs + 1,
            gc_last_run=now,
            gc_last_success=now if is_good else old.gc_last_success,
            gc_removed=old.gc_removed + removed,
            gc_removed_bytes=old.gc_removed_bytes + removed_bytes,
        )
    )


def _change(change: Callable[[Counters], Counters]) -> None:
    try:
        os.makedirs(lock.RUN, mode=0o755, exist_ok=True)
        with _opened(os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX) as fd:
            old = _parse(os.pread(fd, _LIMIT, 0))
            os.pwrite(fd, json.dumps(plain_values(change(old))).encode().ljust(_LIMIT), 0)
    except OSError as error:
        log.problem("cannot count", why=error)


@contextmanager
def _opened(flags: int, operation: int) -> Iterator[int]:
    path = os.path.join(lock.RUN, "counters")
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, operation)
        yield fd
    finally:
        os.close(fd)


def _parse(text: bytes) -> Counters:
    """The fields that are valid; the others begin again at 0."""
    values: dict[str, Any] = {}
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        values = found if isinstance(found, dict) else {}
    return Counters(**{name: values[name] for name in names(Counters) if _is_good(name, values)})


def _is_good(name: str, values: dict[str, Any]) -> bool:
    value = values.get(name)
    if name in ("failures", "uncached"):
        return isinstance(value, dict) and all(_is_number(count) for count in value.values())
    return _is_number(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1 << 63
