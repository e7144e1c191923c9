"""Starts child processes: what localdisk needs of `subprocess`, whose import takes a tenth of a hook's time.

`subprocess` imports threading, locale and selectors, too.  `run.py` decides what is started, and how.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any

_LONGEST_PAUSE = 0.05  # seconds, between two looks whether a process has ended
_BACK_TO_DEFAULT = (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores them, and a child would, too


class Process:
    """A child process; `stdin`, `stdout` and `stderr` are our ends of its pipes, None for those without one.

    `returncode` is None until somebody has waited for it; negative if a signal has ended it.
    """

    def __init__(
        self, pid: int, stdin: IO[bytes] | None, stdout: IO[bytes] | None, stderr: IO[bytes] | None
    ) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.returncode: int | Any = None  # as in subprocess: who has waited need not ask again

    def wait(self, timeout: float | None = None) -> int | Any:
        """Wait until it has ended, at most `timeout` seconds; returns `returncode`."""
        until, pause = time.monotonic() + (timeout or 0), 0.0005
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, 0 if timeout is None else os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif (left := until - time.monotonic()) <= 0:
                break
            else:
                time.sleep(min(pause, left))
                pause = min(2 * pause, _LONGEST_PAUSE)
        return self.returncode

    def terminate(self) -> None:
        """Send SIGTERM, unless it has ended."""
        if self.wait(0) is None:
            os.kill(self.pid, signal.SIGTERM)

    def communicate(self, text: bytes, timeout: float) -> tuple[bytes, bytes]:
        """Write `text`, read both outputs, which are pipes, to their ends, and wait; returns the outputs.

        `text` is at most what a pipe holds, 64 KiB.  Raises TimeoutError after `timeout` seconds.
        """
        until = time.monotonic() + timeout
        if self.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.write(text)
                self.stdin.close()
        pipes = [pipe.fileno() for pipe in (self.stdout, self.stderr) if pipe]
        said = _read(pipes, until)
        if self.wait(max(0, until - time.monotonic())) is None:
            raise TimeoutError
        self.close()
        out, err = (b"".join(said[fd]) for fd in pipes)
        return out, err

    def close(self) -> None:
        """Close our ends of its pipes."""
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()


def _read(fds: Sequence[int], until: float) -> Mapping[int, list[bytes]]:
    """What is read from pipes until their ends.  Raises TimeoutError at `until` of time.monotonic()."""
    said: dict[int, list[bytes]] = {fd: [] for fd in fds}
    poll, left = select.poll(), set(fds)
    for fd in fds:
        poll.register(fd, select.POLLIN)
    while left:
        ready = poll.poll(max(0, until - time.monotonic()) * 1000)
        if not ready and time.monotonic() >= until:
            raise TimeoutError
        for fd, _ in ready:
            part = os.read(fd, 1 << 16)
            said[fd].append(part)
            if not part:
                poll.unregister(fd)
                left.discard(fd)
    return said


def start(
    path: str,
    argv: Sequence[str],
    environment: Mapping[str, str],
    *,
    pipes: Iterable[int],
    pass_fds: Iterable[int] = (),
    new_session: bool = False,
    limits: Mapping[str, int],
) -> Process:
    """Start the program at `path` in the directory `/`, with its standard descriptors and `pass_fds` only.

    `pipes`: which of the descriptors 0, 1 and 2 are pipes to us; the others are /dev/null.  `limits`: by the
    names of setrlimit(2), without RLIMIT_, for the program and all that it starts.
    Raises OSError, as execve does.
    """
    ours: dict[int, int] = {}
    theirs: dict[int, int] = {}
    try:
        for number in pipes:
            read, write = map(_above_standard, os.pipe())
            theirs[number], ours[number] = (write, read) if number else (read, write)
        null = (os.POSIX_SPAWN_OPEN, os.devnull, os.O_RDWR, 0)
        actions: list[tuple[object, ...]] = [
            (os.POSIX_SPAWN_DUP2, theirs[n], n) if n in theirs else (null[0], n, *null[1:]) for n in range(3)
        ]
        # To itself: glibc then lets the child inherit it (2.29 and later, posix/spawni.c).
        actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in pass_fds]
        _keep_to_ourselves()
        with _in_root_directory(), _limited(limits):
            pid = os.posix_spawn(
                path,
                list(argv),
                environment,
                file_actions=actions,
                setsid=new_session,
                setsigdef=_BACK_TO_DEFAULT,
            )
    except BaseException as error:
        for fd in ours.values():
            os.close(fd)
        if isinstance(error, OSError) and error.errno == -1:  # of sudo's noexec, instead of EACCES
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path) from None
        raise
    finally:
        for fd in theirs.values():
            os.close(fd)
    stdin, stdout, stderr = (
        os.fdopen(ours[number], "rb" if number else "wb") if number in ours else None for number in range(3)
    )
    return Process(pid, stdin, stdout, stderr)


def _above_standard(fd: int) -> int:
    """The descriptor, or a copy of it above 2, if we ourselves were started without a standard descriptor."""
    if fd > 2:
        return fd
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return copy


def _keep_to_ourselves() -> None:
    """No child inherits what we have inherited; what Python has opened is inherited by none."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # the one of this list is closed
                os.set_inheritable(int(name), False)


@contextmanager
def _in_root_directory() -> Iterator[None]:
    """For a child, which inherits the working directory.

    If we may not enter our own directory, as user vdsm in root's, we stay in the root directory.
    """
    try:
        before = os.open(".", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        os.chdir("/")
        yield
        return
    try:
        os.chdir("/")
        yield
    finally:
        with contextlib.suppress(OSError):
            os.fchdir(before)
        os.close(before)


@contextmanager
def _limited(limits: Mapping[str, int]) -> Iterator[None]:
    """Lower our own soft limits for a moment: a child inherits them.

    It could raise a soft limit again.  qemu-img does not, and prlimit(1) would be one more program to start.
    """
    before: dict[int, tuple[int, int]] = {}
    try:
        for name, limit in limits.items():
            import resource

            number = getattr(resource, f"RLIMIT_{name}")
            before[number] = resource.getrlimit(number)
            hard = before[number][1]
            resource.setrlimit(number, (limit if hard < 0 else min(limit, hard), hard))  # -1: infinity
        yield
    finally:
        for number, both in before.items():
            resource.setrlimit(number, both)
