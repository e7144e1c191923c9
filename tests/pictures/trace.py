"""Which processes ran, as whom, from when to when, and what they copied: /proc, looked at every few ms.

    with Tracer() as tracer: ...
    tracer.trace

What ends between two looks is not seen.  Runs as root in the test bed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

INTERVAL = 0.004  # seconds between two looks
NICE = -20
LOCKS = Path("/run/localdisk")


@dataclass(frozen=True)
class Span:
    """One program in one process; times in milliseconds since the trace began."""

    pid: int
    parent: int
    user: str
    argv: tuple[str, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Sample:
    """Bytes that qemu-img convert had written to devices by then; `told`: what the disk's lock said."""

    at: int
    written: int
    told: bool


@dataclass
class Trace:
    """All of it; `files` are what qemu-img convert had open: path, and whether for writing."""

    spans: list[Span] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    files: dict[str, bool] = field(default_factory=dict)


class Tracer:
    """Traces the descendants of this process for as long as the context lasts."""

    def __init__(self) -> None:
        self.trace = Trace()
        self._began = time.monotonic()
        self._running: dict[int, Span] = {}
        self._others = set(pids()) | {os.getpid()}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Tracer:
        # The hook inherits this niceness of vdsmd's: it must not keep us from looking, nor from giving the
        # interpreter's lock to the thread that looks.
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        os.setpriority(os.PRIO_PROCESS, 0, 0)

    def now(self) -> int:
        return round((time.monotonic() - self._began) * 1000)

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL):
            self._look()
        self._leave(set())

    def _look(self) -> None:
        there = set(pids())
        self._leave(there)
        for pid in sorted(there - self._others - self._running.keys()):
            parent = parent_of(pid)
            if parent != os.getpid() and parent not in self._running:
                self._others.add(pid)
            else:
                self._running[pid] = Span(pid, parent, "", (), self.now(), 0)
        for pid, span in list(self._running.items()):
            self._follow(pid, span)
            if span.argv[1:2] == ("convert",):
                self._follow_copy(pid)

    def _leave(self, there: set[int]) -> None:
        for pid in self._running.keys() - there:
            self._close(self._running.pop(pid))

    def _close(self, span: Span) -> None:
        if span.argv:
            self.trace.spans.append(replace(span, end=self.now()))

    def _follow(self, pid: int, span: Span) -> None:
        """A process that becomes another program is a new span; its user is the last that it had."""
        with contextlib.suppress(OSError, KeyError):
            argv, parent = argv_of(pid), self._running.get(span.parent)
            if not argv:  # it has ended, and nobody has waited for it yet
                self._close(span)
                self._running[pid] = replace(span, argv=())
            elif argv == span.argv:
                self._running[pid] = replace(span, user=user_of(pid))
            elif argv != (parent.argv if parent else argv_of(span.parent)):  # else it is a fork, so far
                self._close(span)
                self._running[pid] = replace(span, argv=argv, user=user_of(pid), start=self.now())

    def _follow_copy(self, pid: int) -> None:
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = Path(f"/proc/{pid}/io").read_text().splitlines()
            written = next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))
            self._add(Sample(self.now(), written, told=False))
            self.trace.files.update(open_files(pid))
        with contextlib.suppress(OSError, ValueError, KeyError, StopIteration):
            record = json.loads(next(LOCKS.glob("*-*.lock")).read_text())
            if record["phase"] == "copying":
                self._add(Sample(self.now(), record["written"], told=True))

    def _add(self, sample: Sample) -> None:
        """What is new."""
        if sample.written not in (old.written for old in self.trace.samples if old.told == sample.told):
            self.trace.samples.append(sample)


def pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def parent_of(pid: int) -> int:
    """0 where there is no such process any more."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def argv_of(pid: int) -> tuple[str, ...]:
    text = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return tuple(text.rstrip("\0").split("\0")) if text else ()


def user_of(pid: int) -> str:
    """The name of the effective user."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return pwd.getpwuid(next(int(line.split()[2]) for line in lines if line.startswith("Uid:"))).pw_name


def open_files(pid: int) -> dict[str, bool]:
    """The images and local disks that a process has open, and whether for writing."""
    found: dict[str, bool] = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            path = os.readlink(link)
            if path.startswith("/dev/dm-"):
                path = logical_volume(path)
            if path.startswith(("/rhev/", "/dev/ovirt-local/")):
                info = (link.parent.parent / "fdinfo" / link.name).read_text()
                flags = next(int(line.split()[1], 8) for line in info.splitlines() if "flags" in line)
                found[path] = found.get(path, False) or flags & os.O_ACCMODE != os.O_RDONLY
    return found


def logical_volume(node: str) -> str:
    """`/dev/<volume group>/<logical volume>` of a device-mapper node; in its name hyphens are doubled."""
    name = Path("/sys/block", Path(node).name, "dm/name").read_text().strip()
    return "/dev/" + "/".join(re.split("(?<!-)-(?!-)", name)).replace("--", "-")
