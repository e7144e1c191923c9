"""Which daemons run on this host, by the names of its processes."""

from __future__ import annotations

import contextlib
import os

PROC = "/proc"
UDEVD = frozenset({"systemd-udevd", "udevd"})
# Those that read /etc/cron.d: Debian's, and cronie's on EL.
CRON = frozenset({"cron", "crond"})


def running() -> frozenset[str]:
    """The names of all processes that this user sees, as the kernel has them: at most 15 characters each.

    A process that has ended keeps its name until its parent waits for it (states Z and X), and does not run.
    """
    found = set()
    for process in filter(str.isdigit, os.listdir(PROC)):
        path = os.path.join(PROC, process, "stat")  # PID (NAME) STATE …; a name may have parentheses itself
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            name, _, rest = file.read().partition("(")[2].rpartition(") ")
            if not rest.startswith(("Z", "X")):
                found.add(name)
    return frozenset(found)


def udevd_runs() -> bool:
    """LVM waits without a limit, and whatever signal it gets, for what udevd does with a new device."""
    return bool(running() & UDEVD)


def has_cron_timers(name: str) -> bool:
    """Whether systemd-cron, which has no daemon, has made timers of /etc/cron.d/`name`."""
    import glob

    return bool(glob.glob(f"/run/systemd/generator*/cron-{glob.escape(name)}-*.timer"))
