"""The configuration that was found good last, so that it is not validated again while it stays the same.

Validating costs a helper more than half of its time, mostly for importing what validates.  The memory is
one file in /run/localdisk that only root writes and everybody reads: `<CRC-32 of the rest>`, a new line,
then JSON with the text of the configuration file, the program that validated it, and the values that it
found.  It holds for the same text and the same program alone.  It is written in place: a process that
reads it while it is written, or after its writer was killed, finds a wrong checksum, and validates.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import zlib

from localdisk import lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NAME = "configuration"
_LIMIT = 1 << 20  # bytes; a configuration file has at most 64 KiB


def recall(text: bytes) -> dict[str, Any] | None:
    """The values of the configuration file `text`, if this program found them good before."""
    try:
        fd = os.open(_path(), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _values(os.read(fd, _LIMIT), text) if _is_roots(os.fstat(fd)) else None
    except OSError:
        return None
    finally:
        os.close(fd)


def remember(text: bytes, values: dict[str, Any]) -> None:
    """Root has found `values`, the contents of `text`, good.  What goes wrong here is of no consequence."""
    if os.geteuid() != 0:
        return
    record = json.dumps({"of": _origin(text), "values": values}).encode()
    try:
        os.makedirs(lock.RUN, mode=0o755, exist_ok=True)
        fd = os.open(_path(), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, _checksum(record) + b"\n" + record, 0)
    except OSError:
        pass  # another one writes, or /run is full: the next run validates again
    finally:
        os.close(fd)


def _path() -> str:
    return os.path.join(lock.RUN, _NAME)


def _is_roots(status: os.stat_result) -> bool:
    others = stat.S_IWGRP | stat.S_IWOTH
    return stat.S_ISREG(status.st_mode) and status.st_uid == 0 and not status.st_mode & others


def _values(written: bytes, text: bytes) -> dict[str, Any] | None:
    checksum, _, record = written.partition(b"\n")
    if checksum != _checksum(record):
        return None
    found = json.loads(record)
    values: dict[str, Any] = found["values"]
    return values if found["of"] == _origin(text) else None


def _origin(text: bytes) -> list[object]:
    """What the values are made from: the text, and this program, whose tree is named by its contents."""
    ours = os.stat(__file__)
    return [text.decode("latin-1"), __file__, ours.st_mtime_ns, ours.st_size]


def _checksum(record: bytes) -> bytes:
    return b"%08x" % zlib.crc32(record)
