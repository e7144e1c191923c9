"""Copy a source onto a local disk in one pass: qemu-img convert, the zeroed tail, fsync.

Runs as vdsm.  qemu-img dies with us (setpriv --pdeathsig), so a killed hook leaves no writer behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from localdisk import run
from localdisk.errors import CommandMissing, CopyFailed, DeviceNotReady, Error, PoolFilledUp
from localdisk.image import Source
from localdisk.lvm import read_dm_uuid

NODE_DEADLINE = 10.0  # seconds until udev has made the node and given it to us
MEMORY = 4 << 30  # bytes of address space; the tables of 64 layers take at most 32 MiB each (qemu, L2 cache)
HEARTBEAT = 1.0  # seconds between two calls of `on_progress`

_BLKZEROOUT = 0x127F  # linux/fs.h; takes offset and length in bytes
_ZERO_CHUNK = 64 << 20  # bytes a call; the ioctl can't be interrupted
_PROGRESS = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")

# The fraction done, 0 to 1, and the bytes written so far; raises to end the copy.
OnProgress = Callable[[float, int], None]


@dataclass(frozen=True)
class Target:
    """The logical volume to fill, as the helper made it."""

    path: str
    dm_uuid: str
    zeroed: bool  # reads as zeros where nothing is written
    bandwidth: int | None  # bytes per second
    nice: int  # absolute


def copy(source: Source, target: Target, on_progress: OnProgress) -> None:
    """Fill `target` so that it equals the guest's view of `source`, zeros behind it, all on the device.

    Raises CopyFailed, PoolFilledUp, DeviceNotReady, CommandMissing, and whatever `on_progress` raises.
    """
    try:
        with _opened(target) as fd:
            if not target.zeroed:
                _zero_tail(fd, source.virtual_size, on_progress)
            _convert(source, target, fd, on_progress)
            os.fsync(fd)
    except OSError as error:
        raise _failed(source, target, error.strerror or str(error)) from None


@contextmanager
def _opened(target: Target) -> Iterator[int]:
    """A descriptor of the target, once udev has given it to us; it is surely the volume that was made."""
    fd = _open_when_ready(target.path)
    try:
        if read_dm_uuid(os.fstat(fd).st_rdev) != target.dm_uuid:
            raise DeviceNotReady(path=target.path, problem="it is another device than the helper made")
        yield fd
    finally:
        os.close(fd)


def _open_when_ready(path: str) -> int:
    deadline = time.monotonic() + NODE_DEADLINE
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if time.monotonic() > deadline:
                raise DeviceNotReady(path=path, problem=error.strerror) from None
        time.sleep(0.1)


def _zero_tail(fd: int, start: int, on_progress: OnProgress) -> None:
    """Zero what lies behind the guest's view: the volume is whole extents, and old bytes are there."""
    end = os.lseek(fd, 0, os.SEEK_END)
    while start < end:
        size = min(_ZERO_CHUNK, end - start)
        fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", start, size))
        on_progress(0.0, 0)
        start += size


def _convert(source: Source, target: Target, fd: int, on_progress: OnProgress) -> None:
    process = run.start_reporting(_command(source, target, fd), (*source.fds, fd))
    try:
        for fraction in _progress(process):
            written = _written(process.pid)
            on_progress(fraction, int(fraction * source.virtual_size) if written is None else written)
        said = run.read_errors(process)
        if process.returncode in (126, 127):  # what setpriv, prlimit and nice say where they cannot run it
            raise CommandMissing(tool="qemu-img")
        if process.returncode != 0:
            raise _failed(source, target, said or f"qemu-img ended with {process.returncode}")
    finally:
        run.end(process)


def _command(source: Source, target: Target, fd: int) -> list[str]:
    argv = ["setpriv", "--pdeathsig", "KILL", "--"]
    # A forged image can make a tool eat memory; how long a copy takes is not bounded.  A crash leaves no
    # file with a guest's data.
    argv += ["prlimit", f"--as={MEMORY}", "--core=0", "--"]
    # vdsmd runs at nice -20 and we inherit that; the configured value is absolute.
    argv += ["nice", "-n", str(target.nice - os.getpriority(os.PRIO_PROCESS, 0))]
    argv += ["qemu-img", "convert", "-p", "-n", "-W", "-m", "8", "-t", "none"]
    if source.allows_direct_io:
        argv += ["-T", "none"]
    if target.zeroed:
        argv += ["--target-is-zero"]
    if target.bandwidth:
        argv += ["-r", str(target.bandwidth)]
    options = f"driver=raw,file.driver=host_device,file.filename=/proc/self/fd/{fd}"
    return [*argv, "--target-image-opts", source.filename, options]


def _progress(process: run.Process[bytes]) -> Iterator[float]:
    """The fraction done, about once a second until the tool closes its standard output, and then."""
    assert process.stdout is not None  # noqa: S101 (started with a pipe)
    fd, fraction, told = process.stdout.fileno(), 0.0, time.monotonic()
    yield fraction
    while True:
        if select.select([fd], [], [], HEARTBEAT)[0]:
            text = os.read(fd, 65536)
            if not text:
                yield fraction
                return
            found = _PROGRESS.findall(text)
            fraction = float(found[-1]) / 100 if found else fraction
        if time.monotonic() - told >= HEARTBEAT:
            told = time.monotonic()
            yield fraction


def _written(pid: int) -> int | None:
    """Bytes that a process has had written to devices; None where the kernel does not count them."""
    try:
        with open(f"/proc/{pid}/io", encoding="ascii") as file:
            return int(re.findall(r"^write_bytes: (\d+)$", file.read(), re.M)[0])
    except (OSError, IndexError):
        return None


def _failed(source: Source, target: Target, problem: str) -> Error:
    if os.strerror(errno.ENOSPC) in problem:  # a preallocated volume never says so
        return PoolFilledUp(volume=source.layers[0].path, path=target.path)
    return CopyFailed(volume=source.layers[0].path, path=target.path, problem=problem)
