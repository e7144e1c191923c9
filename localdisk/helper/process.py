"""The privileged half as a process: what root runs for the hook, through sudo.

The hook (user vdsm) starts one `localdisk helper` and sends JSON lines on its standard input; each is
answered by one JSON line on standard output.  `protocol.py` has the lines, `session.py` what is done.  When
standard input ends, or a signal comes, before the copy was committed, the unfinished disk is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator

from localdisk import lock
from localdisk.errors import BadRequest, Error
from localdisk.helper.session import Session
from localdisk.protocol import MAX_REQUEST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from localdisk.config import Config
    from localdisk.helper.session import Answer


CANCELLED = signal.SIGUSR1  # to the hook: its VM was powered off


class Ended(Exception):
    """The hook is gone or we were told to end."""


def main(load: Callable[[], Config]) -> int:
    """Serve requests from standard input until it ends.  `load` reads the configuration."""
    hook = Hook()
    session: Session | None = None
    try:
        for line in hook.lines():
            if session is None:
                session = Session(load(), hook.pause)
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


class Hook:
    """The process at the other end of standard input and output.

    A signal does not interrupt: it makes the next wait raise Ended, so that a change that has begun is
    carried through.
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
        """Each request, one line.  Ends with the input; raises Ended on a signal, BadRequest if too long.

        The hook is told once if its VM is powered off while it works.
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
                if self.session.must_tell:
                    self._tell()

    def _tell(self) -> None:
        """End the hook, whatever it does: its VM was powered off."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, CANCELLED)
            os.close(self._process)
            self._process = None

    def pause(self, seconds: float) -> None:
        """Wait; raises Ended when the hook goes away meanwhile."""
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
    """A descriptor of the hook's process, None if that is not our parent.

    sudo has become us; if it stays between, it has another user than who called it, and the hook only learns
    from our next answer that it is cancelled.
    """
    pid = os.getppid()
    try:
        fd = os.pidfd_open(pid)
        if str(os.stat(f"/proc/{pid}").st_uid) == os.environ.get("SUDO_UID") and os.getppid() == pid:
            return fd
        os.close(fd)
    except (AttributeError, OSError):  # a Python or kernel without it
        pass
    return None
