"""The time by two clocks: one has the date and can be set, the other counts seconds since the boot.

A host whose clock has no battery boots with a date such as 1970 or 2001, which is corrected minutes later.
So the age of a mark that was made since the boot is measured by the second clock, which nobody can set.
"""

from __future__ import annotations

import contextlib
import time

from localdisk.frozen import frozen

BOOT_ID = "/proc/sys/kernel/random/boot_id"


@frozen
class Moment:
    epoch: float  # the date, in seconds since the epoch
    boot_id: str = ""  # "" if the kernel has none
    uptime: float = 0.0  # seconds since the boot, suspended time included


def now() -> Moment:
    return Moment(time.time(), _boot_id(), time.clock_gettime(time.CLOCK_BOOTTIME))


def _boot_id() -> str:
    with contextlib.suppress(OSError), open(BOOT_ID, encoding="ascii") as file:
        return file.read().strip()
    return ""
