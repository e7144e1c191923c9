"""The one door to subprocesses: every tool that localdisk runs is started here.

Tools get an argument list (no shell), the C locale, a fixed PATH, a closed standard input and none of our
descriptors.  This module never sends SIGKILL: an LVM command that is killed in a critical section can leave
devices suspended.  LVM delays SIGTERM until it is safe.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from localdisk import spawn
from localdisk.errors import (
    CommandBlocked,
    CommandFailed,
    CommandForbidden,
    CommandMissing,
    CommandTimeout,
    target,
)
from localdisk.spawn import Process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    Limits = Mapping[str, int]

DEADLINE = 120  # seconds; LVM waits for its own locks and for udev, both bounded below this

ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C",
    "LVM_SUPPRESS_FD_WARNINGS": "1",
}

_budget: tuple[float, float] | None = None  # until when on the monotonic clock, and its seconds in all


class Begun:
    """A tool that runs while its caller does something else; `output` waits for its end."""

    def __init__(
        self,
        argv: Sequence[str],
        pass_fds: Iterable[int] = (),
        user: str = "",
        text: str = "",
        limits: Limits | None = None,
    ) -> None:
        self._argv = argv
        if is_spent():
            raise self._timeout(0)
        self._input = text.encode()
        # The tool has its own session.  So a signal to our process group ends only us, and we end the tool.
        self._process = start(
            argv,
            pipes=(0, 1, 2) if text else (1, 2),
            pass_fds=pass_fds,
            new_session=True,
            user=user,
            limits=limits,
        )

    def output(self, deadline: float = DEADLINE) -> str:
        """Its standard output, when it has ended, at most `deadline` seconds from now.

        Raises CommandFailed, CommandTimeout.
        """
        process, argv = self._process, self._argv
        try:
            out, err = process.communicate(self._input, timeout=_within_budget(deadline))
        except TimeoutError:
            end(process)
            raise self._timeout(deadline) from None
        except BaseException:
            end(process)
            raise
        if process.returncode:
            raise CommandFailed(tuple(argv), process.returncode, err.decode(errors="replace"))
        return out.decode(errors="replace")

    def _timeout(self, deadline: float) -> CommandTimeout:
        seconds = _budget[1] if _budget and is_spent() else deadline
        return CommandTimeout(tool=" ".join(self._argv[:2]) + target(self._argv), seconds=round(seconds))


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Limit all tools together to so many seconds from now; tools started later time out at once."""
    global _budget
    before, _budget = _budget, (time.monotonic() + seconds, seconds)
    try:
        yield
    finally:
        _budget = before


def is_spent() -> bool:
    """Whether the time of `within` is over."""
    return _budget is not None and time.monotonic() >= _budget[0]


def _within_budget(deadline: float) -> float:
    return deadline if _budget is None else min(deadline, max(0.0, _budget[0] - time.monotonic()))


def begin(argv: Sequence[str]) -> Begun:
    """Start `argv`; its output must be short, as it is read only at the end.

    Raises CommandMissing, CommandTimeout.
    """
    return Begun(argv)


def run(
    argv: Sequence[str],
    *,
    deadline: float = DEADLINE,
    pass_fds: Iterable[int] = (),
    user: str = "",
    text: str = "",
    limits: Limits | None = None,
) -> str:
    """Run `argv` to its end, at most `deadline` seconds, and return its standard output.

    Root can run it as `user`, with that user's groups and no capability.  `text` is its standard input.
    `limits` are those of `spawn.start`.

    Raises CommandFailed, CommandTimeout, CommandMissing.
    """
    return Begun(argv, pass_fds, user, text, limits).output(deadline)


def start(
    argv: Sequence[str],
    *,
    pipes: Iterable[int] = (2,),
    pass_fds: Iterable[int] = (),
    new_session: bool = False,
    user: str = "",
    limits: Limits | None = None,
) -> Process:
    """Start `argv`; `pipes` are those of its standard descriptors that are pipes.  Raises CommandMissing."""
    try:
        if user:
            return _start_as(user, argv)
        path = _find(argv[0])
        return spawn.start(
            path,
            argv,
            ENVIRONMENT,
            pipes=pipes,
            pass_fds=pass_fds,
            new_session=new_session,
            limits=limits or {},
        )
    except (FileNotFoundError, PermissionError):
        raise _cannot_run(argv[0]) from None


def cannot_run(*tools: str) -> CommandMissing:
    """The error that the first of `tools` that cannot be run, or else the last one, was not run, and why."""
    return _cannot_run(next((tool for tool in tools if not tool_exists(tool)), tools[-1]))


def _cannot_run(tool: str) -> CommandMissing:
    path = next(filter(os.path.isfile, _places(tool)), "")
    if not path:
        return CommandMissing(tool=tool)
    if os.access(path, os.X_OK):
        return CommandBlocked(tool=tool, path=path)
    found = os.stat(path)
    mode = f"{stat.S_IMODE(found.st_mode):04o}"
    return CommandForbidden(tool=tool, path=path, uid=found.st_uid, gid=found.st_gid, mode=mode)


def _start_as(user: str, argv: Sequence[str]) -> Process:
    """Start `argv` as another user, with pipes for both outputs, in a session of its own."""
    import pwd
    import subprocess

    found = pwd.getpwnam(user)
    started = subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        cwd="/",
        start_new_session=True,
        user=found.pw_uid,
        group=found.pw_gid,
        extra_groups=os.getgrouplist(user, found.pw_gid),
    )
    started.returncode = 0  # we wait for it, not this object
    return Process(started.pid, None, started.stdout, started.stderr)


def start_talking(argv: Sequence[str]) -> Process:
    """Start `argv` with pipes for standard input and output; `ask` uses them."""
    return start(argv, pipes=(0, 1, 2))


def ask(process: Process, line: bytes) -> bytes:
    """Send one line to a tool started by `start_talking`; returns its answer, b"" if it has ended.

    Raises OSError if the tool has closed its standard input.
    """
    if process.stdin is None or process.stdout is None:
        return b""
    process.stdin.write(line + b"\n")
    process.stdin.flush()
    return process.stdout.readline()


def start_reporting(argv: Sequence[str], pass_fds: Iterable[int], limits: Limits | None = None) -> Process:
    """Start `argv` with a pipe for standard output, the descriptors `pass_fds` and the limits."""
    return start(argv, pipes=(1, 2), pass_fds=pass_fds, limits=limits)


def end(process: Process, grace: float = 10) -> None:
    """Ask `process` to end with SIGTERM and wait up to `grace` seconds; its pipes are closed."""
    with contextlib.suppress(OSError):
        process.terminate()
    process.wait(grace)
    process.close()


def tool_exists(tool: str) -> bool:
    """Whether `tool` is on the PATH that our tools get."""
    return any(os.access(path, os.X_OK) for path in _places(tool))


def _find(tool: str) -> str:
    """The path of a tool that can be run, "" if there is none."""
    return next((path for path in _places(tool) if os.access(path, os.X_OK) and os.path.isfile(path)), "")


def _places(tool: str) -> Iterator[str]:
    return (os.path.join(directory, tool) for directory in ENVIRONMENT["PATH"].split(":"))


def close_input(process: Process) -> None:
    """Close a tool's standard input; the tool may have ended already."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def read_errors(process: Process) -> str:
    """Wait for a tool to end and return the last line that it wrote to standard error, "" if none.

    sudo prints the reason first and "a password is required" last, so its lines are all returned, as one.
    """
    said = process.stderr.read() if process.stderr else b""
    process.wait()
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    by_sudo = [line[len(_SUDO) :] for line in lines if line.startswith(_SUDO)]
    if by_sudo and lines[-1].startswith(_SUDO):
        return _SUDO + ", ".join(by_sudo)
    return lines[-1] if lines else ""


_SUDO = "sudo: "
