"""The helper as a process: root runs it for the hook, through sudo.

The hook (user vdsm) starts one `localdisk helper` and sends JSON lines to its standard input; the helper
answers each with one JSON line on standard output.  `protocol.py` describes the lines, `session.py` does what
they request.  If standard input ends, or a signal comes, before a copy was committed, the unfinished volume
is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator

from localdisk import kept, lock, protocol
from localdisk.errors import BadRequest, Error
from localdisk.helper.session import Session
from localdisk.protocol import MAX_REQUEST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from localdisk.config import Config
    from localdisk.helper.session import Answer


CANCELLED = signal.SIGUSR1  # sent to the hook if its VM was powered off


class Ended(Exception):
    """The hook has ended, or a signal tells this process to end."""


def main(load: Callable[[], Config]) -> int:
    """Serve requests until standard input ends; returns the exit code.  `load` reads the configuration."""
    hook = Hook()
    session: Session | None = None
    try:
        for line in hook.lines():
            if session is None:
                try:
                    config = load()
                except Error:
                    remember_stale(line)
                    raise
                session = Session(config, hook.pause)
                hook.session = session
            hook.answer(session.serve(line))
    except Ended:
        pass
    except Error as error:  # the configuration
        hook.answer({"error": str(error)})
        return error.exit_code
    finally:
        if session:
            session.end()
    return 0


def remember_stale(line: bytes) -> None:
    """Record which kept disks a request wants marked as stale, if no configuration says where they are.

    Their VM begins to run without them now, and is not refused.
    """
    with contextlib.suppress(BadRequest):
        request = protocol.read_request(line)
        if isinstance(request, protocol.Stale):
            kept.doubt(request.vm_id, request.images)


class Hook:
    """The hook: the process at the other end of standard input and output.

    A signal does not interrupt a change: only the next wait raises Ended.
    """

    def __init__(self) -> None:
        self.session: Session | None = None
        self._process = _parent()
        self._signal, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        self._buffer = b""

    def lines(self) -> Iterator[bytes]:
        """The requests, a line each, until the input ends.  Raises Ended on a signal, BadRequest if too long.

        If its VM is powered off while the hook works, the hook gets one signal.
        """
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                yield line
                continue
            more = self._read_more(lock.POLL)
            if more is False:
                return
            if more is None and self.session:
                self.session.look_after_copy()
                if self.session.must_end_hook:
                    self._end_hook()

    def _end_hook(self) -> None:
        """Send the hook the signal that ends it: its VM was powered off."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, CANCELLED)
            os.close(self._process)
            self._process = None

    def pause(self, seconds: float) -> None:
        """Wait; raises Ended if the hook ends meanwhile."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._read_more(left) is False:
                raise Ended

    def answer(self, answer: Answer) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(1, json.dumps(answer).encode() + b"\n")

    def _read_more(self, timeout: float | None) -> bool | None:
        """True: there is more input.  False: the input has ended.  None: neither within `timeout` seconds."""
        ready = select.select([0, self._signal], [], [], timeout)[0]
        if self._signal in ready:
            raise Ended
        if not ready:
            return None
        data = os.read(0, MAX_REQUEST)
        self._buffer += data
        if len(self._buffer) > MAX_REQUEST:
            raise BadRequest(problem="it is too long")
        return bool(data)


def _parent() -> int | None:
    """A descriptor of the hook's process, None if the hook is not our parent.

    Usually sudo executes the helper in its own place.  If sudo stays as our parent, it does not have the user
    that called it, and the hook only learns from our next answer that its start is cancelled.
    """
    pid = os.getppid()
    try:
        fd = os.pidfd_open(pid)
        if str(os.stat(f"/proc/{pid}").st_uid) == os.environ.get("SUDO_UID") and os.getppid() == pid:
            return fd
        os.close(fd)
    except (AttributeError, OSError):  # this Python or kernel has no pidfd_open
        pass
    return None
