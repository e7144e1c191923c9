"""How far a start is with a disk: what its lock file says while the lock is held.

The text is JSON, `{"vm": …, "image": …, "phase": "copying", "size": …, "done": …, "written": …, "since": …,
"at": …}`, the fields of `Progress`; the file's name is the LV's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from localdisk import lock
from localdisk.frozen import frozen, plain_values
from localdisk.ids import is_uuid
from localdisk.units import format_size

PREPARING, WAITING, COPYING, STALLED = "preparing", "waiting", "copying", "stalled"


@frozen
class Progress:
    """One disk that is being prepared; bytes, and seconds since the epoch."""

    vm: str  # both "" for a template LV
    image: str
    phase: str  # preparing: its source is looked at; waiting: for its turn to copy; copying; stalled
    since: int  # when this phase began; of a stalled copy, when the copy did
    at: int  # when this was said; of a stalled copy, when it last made progress
    size: int = 0  # of the guest's view
    done: int = 0  # of size
    written: int = 0  # to the local disk, which is less where the source holds zeros
    template: str = ""  # of a template LV: the volume that it is a copy of

    @property
    def fraction(self) -> float:
        return min(1.0, self.done / self.size) if self.size else 0.0

    @property
    def rate(self) -> int:
        """Bytes written per second, on average."""
        return self.written // max(1, self.at - self.since)

    @property
    def seconds_left(self) -> int | None:
        """At this pace; None where too little is done to say."""
        if self.fraction < 0.01 or self.at <= self.since:
            return None
        return round((self.at - self.since) * (1 - self.fraction) / self.fraction)

    def as_text(self) -> str:
        return json.dumps(plain_values(self))


def pace(rate: int, seconds_left: int | None) -> str:
    """`310 MiB/s 00:41 left`, hours where there are any."""
    if seconds_left is None:
        return f"{format_size(rate)}/s"
    if not seconds_left:  # what is left is to get it onto the device
        return f"{format_size(rate)}/s, finishing"
    minutes, seconds = divmod(seconds_left, 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
    return f"{format_size(rate)}/s {clock} left"


def read_all() -> Mapping[str, Progress | None]:
    """Every disk that a living process holds the lock of, by volume; None where it says nothing (yet)."""
    texts = {}
    for name in lock.names():
        volume_id, suffix = os.path.splitext(name)
        if suffix == ".lock" and is_uuid(volume_id):
            texts[volume_id] = lock.read_held(lock.disk_lock(volume_id))
    return {volume_id: parse(text) for volume_id, text in texts.items() if text is not None}


def parse(text: str) -> Progress | None:
    """None where `text` is no such record: it is empty at first, and what a lock is taken for is not told."""
    try:
        found = json.loads(text)
        progress = Progress(**found)
    except (ValueError, TypeError, RecursionError):
        return None
    of_disk = is_uuid(progress.vm) and is_uuid(progress.image) and progress.template == ""
    of_template = is_uuid(progress.template) and progress.vm == progress.image == ""
    numbers = (progress.since, progress.at, progress.size, progress.done, progress.written)
    numbers_are_good = all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
    return (
        progress
        if (of_disk or of_template) and numbers_are_good and isinstance(progress.phase, str)
        else None
    )
