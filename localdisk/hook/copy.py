"""Copies a source to a logical volume: runs qemu-img convert, zeroes the rest of the volume, and syncs.

There are three ways.  `copy`: the whole chain in one pass.  `apply`: the volume is a clone of the template
LV, and the layers above the base are copied onto it, one pass each.  `copy_on`: the whole chain in one pass,
with the base read from the template LV.

This runs as user vdsm.  If the hook is killed, qemu-img is killed with it (setpriv --pdeathsig), so that no
process goes on writing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial

from localdisk import device_mapper, run
from localdisk.errors import CopyFailed, Error, PoolFilledUp, last_words
from localdisk.frozen import frozen
from localdisk.hook import sources
from localdisk.hook.sources import Layer, Source
from localdisk.protocol import Device, Target
from localdisk.spawn import Process

NODE_DEADLINE = 10.0  # seconds; by then udev must have made the node with vdsm as its owner
# A forged image could make qemu-img use much memory, so its address space is limited; time is not.  The
# tables of 64 layers take at most 32 MiB each (qemu, L2 cache).  A crash must leave no core file with a
# guest's data.
LIMITS = {"AS": 4 << 30, "CORE": 0}  # bytes
HEARTBEAT = 1.0  # seconds between two calls of `on_progress`

_BLKZEROOUT = 0x127F  # linux/fs.h; takes offset and length in bytes
_LARGEST_SECTOR = 4096  # bytes
_ZERO_CHUNK = 64 << 20  # bytes a call; the ioctl can't be interrupted
_BLOCK = b"localdisk check\n" * 256
_PROGRESS = rb"\((\d+(?:\.\d+)?)/100%\)"

# The fraction done, 0 to 1, and the bytes written so far; raises to end the copy.
OnProgress = Callable[[float, int], None]


@frozen
class _Pass:
    """One run of qemu-img convert: the source's name with its descriptors `fds`, and further options."""

    filename: str
    fds: tuple[int, ...]
    is_direct: bool
    options: tuple[str, ...] = ()


def copy(source: Source, target: Target, on_progress: OnProgress) -> None:
    """Fill `target` with the guest's view of `source` and zeros after it, and sync.

    Raises CopyFailed, PoolFilledUp, DeviceNotReady, CommandMissing, and whatever `on_progress` raises.
    """
    options = ("--target-is-zero",) if target.zeroed else ()
    whole = _Pass(source.filename, source.fds, source.allows_direct_io, options)
    _fill(source, target, on_progress, [nullcontext(whole)])


def copy_on(source: Source, base: Device, target: Target, on_progress: OnProgress) -> None:
    """As `copy`, but read the base from the device `base` (a template LV), which has the same content."""
    with _as_copy_failed(source, target), _opened(base, os.O_RDONLY) as fd:
        fds = (*(layer.fd for layer in source.above), fd)
        whole = _Pass(source.filename_on(fd), fds, _is_direct(source.above))
        _fill(source, target, on_progress, [nullcontext(whole)])


def apply(source: Source, target: Target, on_progress: OnProgress) -> None:
    """As `copy`, for a target that already has the content of the source's base, and zeros after it.

    Only the layers above the base are read and written, with their zeros that hide data of the base.
    """
    _fill(source, target, on_progress, [_layer(layer) for layer in reversed(source.above)])


def rehearse(device: Device) -> None:
    """Write a block to a volume, as a copy begins, and read it back from the device.

    Raises DeviceNotReady.
    """
    with _opened(device, os.O_RDWR) as fd:
        try:
            os.pwrite(fd, _BLOCK, 0)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            found = os.pread(fd, len(_BLOCK), 0)
        except OSError as error:
            raise device_mapper.not_ready(device.path, error) from None
    if found != _BLOCK:
        problem = "it does not hold what was written to it"
        raise device_mapper.not_ready(device.path, OSError(errno.EIO, problem))


@contextmanager
def _layer(layer: Layer) -> Iterator[_Pass]:
    # A file is read through the page cache, which still has its tables from the look at its mapping.  For a
    # block device, the page cache may have old data: other hosts write to the device.
    is_direct = layer.is_block and _is_direct((layer,))
    with sources.alone(layer) as (filename, fds):
        # qemu-img takes the target as the layer's backing file: blocks that the layer lacks are not written.
        yield _Pass(filename, fds, is_direct, ("-B", "below", "-F", "raw"))
    if not layer.is_block:
        os.posix_fadvise(layer.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _is_direct(layers: tuple[Layer, ...]) -> bool:
    return not layers or Source(layers).allows_direct_io


def _fill(
    source: Source, target: Target, on_progress: OnProgress, passes: Sequence[AbstractContextManager[_Pass]]
) -> None:
    """Run the passes in order, the lowest layer first."""
    before = 0  # bytes that earlier steps wrote

    def part(number: int, fraction: float, written: int) -> None:
        on_progress((number + fraction) / len(passes), before + written)

    with _as_copy_failed(source, target), _opened(target, os.O_RDWR) as fd:
        if not target.zeroed:
            before = _zero_tail(fd, source.virtual_size, on_progress)
        for number, each in enumerate(passes):
            with each as read:
                before += _convert(source, read, target, fd, partial(part, number))
        os.fsync(fd)


@contextmanager
def _as_copy_failed(source: Source, target: Target) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _failed(source, target, error.strerror or str(error)) from None


@contextmanager
def _opened(device: Device, flags: int) -> Iterator[int]:
    """A descriptor of a volume when udev has made vdsm its owner; checked to be the helper's volume."""
    fd = _open_when_ready(device.path, flags)
    try:
        if device_mapper.read_uuid(os.fstat(fd).st_rdev) != device.dm_uuid:
            raise device_mapper.another_device(device.path, "than the helper made")
        if flags & os.O_RDWR and device_mapper.is_read_only(device.path):
            raise device_mapper.not_ready(device.path, PermissionError(errno.EACCES, "it is read-only"))
        yield fd
    finally:
        os.close(fd)


def _open_when_ready(path: str, flags: int) -> int:
    deadline = time.monotonic() + NODE_DEADLINE
    while True:
        try:
            return os.open(path, flags | os.O_CLOEXEC)
        except OSError as error:
            if time.monotonic() > deadline:
                raise device_mapper.not_ready(path, error) from None
        time.sleep(0.1)


def _zero_tail(fd: int, begin: int, on_progress: OnProgress) -> int:
    """Zero the volume after the guest's view, because it has old data there; returns how many bytes.

    A volume has whole extents, so it can be larger than the guest's view.
    """
    start, end = begin, os.lseek(fd, 0, os.SEEK_END)
    # The guest's view has whole sectors of 512 bytes; the device's sectors may be larger, and the kernel
    # refuses to zero a part of a sector.  So this part is written, and synced before qemu-img writes
    # directly.
    rest = min(-start % _LARGEST_SECTOR, end - start)
    if rest > 0:
        os.pwrite(fd, bytes(rest), start)
        os.fsync(fd)
        start += rest
    while start < end:
        size = min(_ZERO_CHUNK, end - start)
        fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", start, size))
        start += size
        on_progress(0.0, start - begin)
    return max(0, end - begin)


def _convert(source: Source, read: _Pass, target: Target, fd: int, on_progress: OnProgress) -> int:
    """Run one pass; returns how many bytes were written."""
    process = run.start_reporting(_command(read, target, fd), (*read.fds, fd), LIMITS)
    written = 0
    try:
        # vdsmd runs at nice -20, and we inherit that.  setpriv still runs: qemu-img's threads inherit this.
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, process.pid, target.nice)
        for fraction in _progress(process):
            written = _written(process.pid, int(fraction * source.virtual_size))
            on_progress(fraction, written)
        said = run.read_errors(process)
        if process.returncode in (126, 127):  # setpriv could not run qemu-img
            raise run.cannot_run("setpriv", "qemu-img")
        if process.returncode != 0:
            raise _failed(source, target, last_words("qemu-img", said, process.returncode))
    finally:
        run.end(process)
    return written


def _command(read: _Pass, target: Target, fd: int) -> list[str]:
    argv = ["setpriv", "--pdeathsig", "KILL", "--"]
    argv += ["qemu-img", "convert", "-p", "-n", "-W", "-m", "8", "-t", "none"]
    if read.is_direct:
        argv += ["-T", "none"]
    argv += read.options
    if target.bandwidth:
        argv += ["-r", str(target.bandwidth)]
    options = f"driver=raw,file.driver=host_device,file.filename=/proc/self/fd/{fd}"
    return [*argv, "--target-image-opts", read.filename, options]


def _progress(process: Process) -> Iterator[float]:
    """The fraction done, about once a second, and once more when the tool closes its standard output."""
    assert process.stdout is not None  # noqa: S101 (started with a pipe)
    fd, fraction, reported = process.stdout.fileno(), 0.0, time.monotonic()
    yield fraction
    while True:
        if select.select([fd], [], [], HEARTBEAT)[0]:
            text = os.read(fd, 65536)
            if not text:
                yield fraction
                return
            found = re.findall(_PROGRESS, text)
            fraction = float(found[-1]) / 100 if found else fraction
        if time.monotonic() - reported >= HEARTBEAT:
            reported = time.monotonic()
            yield fraction


def _written(pid: int, otherwise: int) -> int:
    """Bytes that a process has written to devices; `otherwise` if the kernel does not count them."""
    try:
        with open(f"/proc/{pid}/io", encoding="ascii") as file:
            return int(re.findall(r"^write_bytes: (\d+)$", file.read(), re.M)[0])
    except (OSError, IndexError):
        return otherwise


def _failed(source: Source, target: Target, problem: str) -> Error:
    if os.strerror(errno.ENOSPC) in problem:  # only thin volumes get this error
        return PoolFilledUp(volume=source.layers[0].path, path=target.path)
    return CopyFailed(volume=source.layers[0].path, path=target.path, problem=problem)
