"""Fill a logical volume from a source: qemu-img convert, the zeroed tail, fsync.

A whole chain in one pass; or on a local copy of its base: the layers above it, one pass each, onto a clone
of that copy, or all of it in one pass with that copy in the place of the base.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from localdisk import device_mapper, run
from localdisk.errors import CommandMissing, CopyFailed, Error, PoolFilledUp, how_it_ended
from localdisk.frozen import frozen
from localdisk.hook import sources
from localdisk.hook.sources import Layer, Source
from localdisk.protocol import Device, Target

NODE_DEADLINE = 10.0  # seconds until udev has made the node and given it to us
MEMORY = 4 << 30  # bytes of address space; the tables of 64 layers take at most 32 MiB each (qemu, L2 cache)
HEARTBEAT = 1.0  # seconds between two calls of `on_progress`

_BLKZEROOUT = 0x127F  # linux/fs.h; takes offset and length in bytes
_LARGEST_SECTOR = 4096  # bytes
_ZERO_CHUNK = 64 << 20  # bytes a call; the ioctl can't be interrupted
_BLOCK = b"localdisk check\n" * 256
_PROGRESS = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")

# The fraction done, 0 to 1, and the bytes written so far; raises to end the copy.
OnProgress = Callable[[float, int], None]


@frozen
class _Pass:
    """One run of qemu-img convert: what it reads, with the descriptors `fds`, and what it is told."""

    filename: str
    fds: tuple[int, ...]
    is_direct: bool
    options: tuple[str, ...] = ()


def copy(source: Source, target: Target, on_progress: OnProgress) -> None:
    """Fill `target` so that it equals the guest's view of `source`, zeros behind it, all on the device.

    Raises CopyFailed, PoolFilledUp, DeviceNotReady, CommandMissing, and whatever `on_progress` raises.
    """
    options = ("--target-is-zero",) if target.zeroed else ()
    whole = _Pass(source.filename, source.fds, source.allows_direct_io, options)
    _fill(source, target, on_progress, [nullcontext(whole)])


def copy_on(source: Source, base: Device, target: Target, on_progress: OnProgress) -> None:
    """As `copy`, but read from the device `base` what the source's base holds; it has the same content."""
    with _as_copy_failed(source, target), _opened(base, os.O_RDONLY) as fd:
        fds = (*(layer.fd for layer in source.above), fd)
        whole = _Pass(source.filename_on(fd), fds, _is_direct(source.above))
        _fill(source, target, on_progress, [nullcontext(whole)])


def apply(source: Source, target: Target, on_progress: OnProgress) -> None:
    """As `copy`, for a target that has the content of the source's base, and zeros behind it, already.

    Only what the layers above the base hold is read and written, zeros that hide the base's data included.
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
    # A file is read through the page cache: its tables are there since its mapping was looked at, and so are
    # not read again.  A block device may have old pages there: other hosts write to it.
    is_direct = layer.is_block and _is_direct((layer,))
    with sources.alone(layer) as (filename, fds):
        # The target stands for the layer's backing file: what the layer does not hold is left as it is there.
        yield _Pass(filename, fds, is_direct, ("-B", "below", "-F", "raw"))
    if not layer.is_block:
        os.posix_fadvise(layer.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _is_direct(layers: tuple[Layer, ...]) -> bool:
    return not layers or Source(layers).allows_direct_io


def _fill(
    source: Source, target: Target, on_progress: OnProgress, passes: Sequence[AbstractContextManager[_Pass]]
) -> None:
    """Carry out the passes, from the bottom up."""
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
    """A descriptor of a volume, once udev has given it to us; it is surely the one that the helper means."""
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
    """Zero what lies behind the guest's view: the volume is whole extents, and old bytes are there.

    Returns how many bytes.
    """
    start, end = begin, os.lseek(fd, 0, os.SEEK_END)
    # The guest's view is whole sectors of 512 bytes, the device's may be larger: the kernel refuses to zero a
    # part of one.  Written and on the device before qemu-img writes around the page cache.
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
    """One pass; returns the bytes that were written."""
    process = run.start_reporting(_command(read, target, fd), (*read.fds, fd))
    written = 0
    try:
        for fraction in _progress(process):
            written = _written(process.pid, int(fraction * source.virtual_size))
            on_progress(fraction, written)
        said = run.read_errors(process)
        if process.returncode in (126, 127):  # what setpriv, prlimit and nice say where they cannot run it
            raise CommandMissing(tool="qemu-img")
        if process.returncode != 0:
            raise _failed(source, target, said or f"qemu-img: {how_it_ended(process.returncode)}")
    finally:
        run.end(process)
    return written


def _command(read: _Pass, target: Target, fd: int) -> list[str]:
    argv = ["setpriv", "--pdeathsig", "KILL", "--"]
    # A forged image can make a tool eat memory; how long a copy takes is not bounded.  A crash leaves no
    # file with a guest's data.
    argv += ["prlimit", f"--as={MEMORY}", "--core=0", "--"]
    # vdsmd runs at nice -20 and we inherit that; the configured value is absolute.
    argv += ["nice", "-n", str(target.nice - os.getpriority(os.PRIO_PROCESS, 0))]
    argv += ["qemu-img", "convert", "-p", "-n", "-W", "-m", "8", "-t", "none"]
    if read.is_direct:
        argv += ["-T", "none"]
    argv += read.options
    if target.bandwidth:
        argv += ["-r", str(target.bandwidth)]
    options = f"driver=raw,file.driver=host_device,file.filename=/proc/self/fd/{fd}"
    return [*argv, "--target-image-opts", read.filename, options]


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


def _written(pid: int, otherwise: int) -> int:
    """Bytes that a process has had written to devices; `otherwise` where the kernel does not count them."""
    try:
        with open(f"/proc/{pid}/io", encoding="ascii") as file:
            return int(re.findall(r"^write_bytes: (\d+)$", file.read(), re.M)[0])
    except (OSError, IndexError):
        return otherwise


def _failed(source: Source, target: Target, problem: str) -> Error:
    if os.strerror(errno.ENOSPC) in problem:  # a preallocated volume never says so
        return PoolFilledUp(volume=source.layers[0].path, path=target.path)
    return CopyFailed(volume=source.layers[0].path, path=target.path, problem=problem)
