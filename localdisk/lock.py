"""Locks and turns in /run/localdisk: which process works on which disk, and which processes may copy now.

A lock is a file with a flock of the process that holds it, so the lock always ends with that process.  The
file's text is the progress of the copy; `volumes/progress.py` has its format.  Only root can open the files:
an ordinary user who could open a file could also lock it.  To wait, these functions call `pause(seconds)`,
which may raise an error to end the wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from localdisk.errors import RunUnwritable

RUN = "/run/localdisk"
POLL = 0.2  # seconds

Pause = Callable[[float], None]


class Lock:
    """A held lock; `write` replaces the text that others can read in it."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.was_waited_for = False
        self._fd = fd

    def write(self, text: str) -> None:
        """Replace the text in one write; it is padded, so that nothing of a longer text is left.

        Raises OSError: /run may be full.
        """
        os.pwrite(self._fd, text.encode().ljust(512), 0)

    def release(self) -> None:
        """Remove the file, then unlock it.  A waiting process detects that, and makes a new file.

        If somebody else has removed the file (`uninstall --force`), a new file of this name is not ours.
        """
        with contextlib.suppress(OSError):
            if _is_still(self.path, self._fd):
                os.unlink(self.path)
        os.close(self._fd)


def disk_lock(volume_id: str) -> str:
    """The path of the lock of one local disk."""
    return os.path.join(RUN, f"{volume_id}.lock")


def try_hold(path: str) -> Lock | None:
    """Take the lock; None, without waiting, if another process holds it.  Raises RunUnwritable."""
    while True:
        fd = make(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        if _is_still(path, fd):
            os.ftruncate(fd, 0)  # remove the text of a holder that was killed
            return Lock(path, fd)
        os.close(fd)


def make(path: str) -> int:
    """A descriptor of a file in RUN, which is made if it is not there.  Raises RunUnwritable."""
    try:
        os.makedirs(RUN, mode=0o755, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise RunUnwritable(path=path, problem=error.strerror) from None


def remove(path: str) -> None:
    """Remove a file in RUN, if it is there.

    Raises RunUnwritable: a read-only file system refuses it also if there is no such file.
    """
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise RunUnwritable(path=path, problem=error.strerror) from None


def hold(path: str, pause: Pause) -> Lock:
    """Take the lock; waits until `pause` raises."""
    was_waited_for = False
    while True:
        lock = try_hold(path)
        if lock:
            lock.was_waited_for = was_waited_for
            return lock
        was_waited_for = True
        pause(POLL)


@contextmanager
def holding(path: str, pause: Pause) -> Iterator[Lock]:
    lock = hold(path, pause)
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def trying(path: str) -> Iterator[Lock | None]:
    """The lock for as long as the context lasts; None if another process holds it."""
    lock = try_hold(path)
    try:
        yield lock
    finally:
        if lock:
            lock.release()


def held() -> frozenset[str]:
    """The paths of all locks that a living process holds."""
    return frozenset(filter(is_held, (os.path.join(RUN, name) for name in names())))


def names() -> list[str]:
    """The names of all lock files and tickets, sorted; some may be held by no process."""
    try:
        found = os.listdir(RUN)
    except FileNotFoundError:
        return []
    return sorted(name for name in found if name.endswith((".turn", ".lock")))


def is_held(path: str) -> bool:
    """Whether a living process holds the lock.  Makes no file."""
    return read_held(path) is not None


def read_held(path: str) -> str | None:
    """The text of a held lock; None if no process holds it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(fd, 512, 0).decode(errors="replace").strip()
    finally:
        os.close(fd)
    return None


# -- room in volume groups


@contextmanager
def holding_space(pause: Pause) -> Iterator[None]:
    """Hold the lock under which a process looks for room and takes it."""
    with holding(_space(), pause):
        yield


def note_made() -> None:
    """Note that this process, with the space lock held, is about to make a volume.  Raises RunUnwritable."""
    fd, now = make(_made()), time.time_ns()
    try:
        os.utime(fd, ns=(now, now))
    except OSError as error:
        raise RunUnwritable(path=_made(), problem=error.strerror) from None
    finally:
        os.close(fd)


def made_so_far() -> str:
    """A text that changes when `note_made` is called; "" while a process holds the space lock."""
    text = last_made()
    return "" if is_held(_space()) else text


def last_made() -> str:
    """The same text, for the process that holds the space lock."""
    try:
        status = os.stat(_made(), follow_symlinks=False)
    except FileNotFoundError:
        return "none"
    return f"{status.st_ino} {status.st_mtime_ns}"


def _space() -> str:
    return os.path.join(RUN, "space.lock")


def _made() -> str:
    return os.path.join(RUN, "made")


# -- turns to copy


@contextmanager
def turn(parallel: int, pause: Pause) -> Iterator[str]:
    """Wait for one of `parallel` turns on this host, first come first served; the turn ends with the context.

    Yields the path of the ticket.  A process that gave its turn back and needs it again takes the same ticket
    with `holding`: the ticket is as old as before, so later processes wait.

    Every process that copies or waits holds a ticket: a lock whose name sorts by the time it was made.  A
    process may copy if fewer than `parallel` older tickets are held.
    """
    queue = os.path.join(RUN, "queue.lock")
    with holding(queue, pause):
        # CLOCK_MONOTONIC: setting the clock must not change the order; a reboot empties /run.
        ticket = hold(os.path.join(RUN, f"{time.monotonic_ns():020d}-{os.getpid()}.turn"), pause)
    try:
        while _older_tickets(ticket.path) >= parallel:
            pause(POLL)
        yield ticket.path
    finally:
        ticket.release()


def _older_tickets(mine: str) -> int:
    """How many tickets older than `mine` are held; removes older tickets that no process holds."""
    older = (name for name in names() if name.endswith(".turn") and name < os.path.basename(mine))
    return sum(not _swept(os.path.join(RUN, name)) for name in older)


def sweep() -> int:
    """Remove lock files and tickets that no process holds (it was killed); returns how many."""
    return sum(_swept(os.path.join(RUN, name)) for name in names())


def _swept(path: str) -> bool:
    """Remove a lock file that no process holds; False if a process holds it."""
    lock = try_hold(path)
    if lock:
        lock.release()
    return lock is not None


def _is_still(path: str, fd: int) -> bool:
    """Whether `path` is still the open file `fd`: the holder before us may have removed it."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False
