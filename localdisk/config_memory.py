"""The last valid configuration, so that it is not validated again as long as it does not change.

Validation takes more than half of a helper's time, mostly to import the validator.  The memory is one file in
/run/localdisk, which only root writes and everybody may read: `<CRC-32 of the rest>`, a new line, then JSON
with the text of the configuration file, the program that validated it, and the resulting values.  It is used
only for the same text and the same program.  The file is written in place: if a process reads it while it is
written, or after its writer was killed, the checksum is wrong, and the process validates the configuration.
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
    """The values of the configuration file `text`, if this program has validated it before."""
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
    """Remember `values`, which root has read from the valid text `text`.  Failures are ignored."""
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
        pass  # another process writes, or /run is full: the next run validates again
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
    """The origin of the values: the text, and this program, whose directory is named by its content."""
    ours = os.stat(__file__)
    return [text.decode("latin-1"), __file__, ours.st_mtime_ns, ours.st_size]


def _checksum(record: bytes) -> bytes:
    return b"%08x" % zlib.crc32(record)
