"""The format of a lock file: how far a start is with a disk, while its lock is held.

The text of `/run/localdisk/<LV name>.lock` is one JSON object with the fields of `Progress`:
`{"vm": …, "image": …, "phase": "copying", "size": …, "done": …, "written": …, "since": …, "at": …}`.
`localdisk/lock.py` makes the files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from localdisk import lock
from localdisk.frozen import frozen, plain_values
from localdisk.ids import is_uuid
from localdisk.units import format_size

PREPARING, WAITING, MAKING_ROOM = "preparing", "waiting", "making_room"
COPYING, STALLED = "copying", "stalled"
PHASES = (PREPARING, WAITING, MAKING_ROOM, COPYING, STALLED)
NOT_MADE = PHASES[:3]  # phases before the volume exists


@frozen
class Progress:
    """One disk that is being prepared; bytes, and seconds since the epoch."""

    vm: str  # both "" for a template LV
    image: str
    phase: str  # one of PHASES; see `schema/status.schema.json`
    since: int  # when this phase began; if stalled, when the copy began
    at: int  # when this record was written; if stalled, when the copy last made progress
    size: int = 0  # bytes of the guest's view
    done: int = 0  # bytes of `size` that are copied
    written: int = 0  # bytes written to the local disk: less than `done` if the source has zeros
    template: str = ""  # for a template LV: the volume that it is a copy of

    @property
    def fraction(self) -> float:
        return min(1.0, self.done / self.size) if self.size else 0.0

    @property
    def rate(self) -> int:
        """Bytes written per second, on average."""
        return self.written // max(1, self.at - self.since)

    @property
    def seconds_left(self) -> int | None:
        """Seconds until the copy is complete, at its average rate; None if too little is done to know."""
        if self.fraction < 0.01 or self.at <= self.since:
            return None
        return round((self.at - self.since) * (1 - self.fraction) / self.fraction)

    def as_text(self) -> str:
        return json.dumps(plain_values(self))


def pace(rate: int, seconds_left: int | None) -> str:
    """`310 MiB/s 00:41 left`, with hours if there are any."""
    if seconds_left is None:
        return f"{format_size(rate)}/s"
    if not seconds_left:  # only the sync is left
        return f"{format_size(rate)}/s, finishing"
    minutes, seconds = divmod(seconds_left, 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
    return f"{format_size(rate)}/s {clock} left"


def read_all() -> Mapping[str, Progress | None]:
    """The progress of every disk whose lock is held, by LV name; None if the lock file has none (yet)."""
    texts = {}
    for name in lock.names():
        volume_id, suffix = os.path.splitext(name)
        if suffix == ".lock" and is_uuid(volume_id):
            texts[volume_id] = lock.read_held(lock.disk_lock(volume_id))
    return {volume_id: parse(text) for volume_id, text in texts.items() if text is not None}


def parse(text: str) -> Progress | None:
    """The progress in a lock file; None if `text` is not a valid record (a new lock file is empty)."""
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
