"""The identity of a volume on shared storage: a text that changes if the volume's content changes.

A file has a modification time.  A block device has none, so 2.3 MiB of its data are read, and the tables of a
qcow2 image:

- the first 256 KiB, with headers and partition tables, and 64 KiB at the usual beginning of the first
  partition, to which guests write as soon as they mount it;
- 512 blocks of 4 KiB, spread evenly over the device.  A change in one place is always noticed if it is longer
  than a 512th of the device.  If a share s of all blocks is changed here and there, the probability to notice
  that is 1 - (1 - s)^512: 40 % for a thousandth, 92 % for half a hundredth, 99.4 % for a hundredth;
- of qcow2, the tables that map each cluster: L1, all L2, refcounts.  So a write to a cluster that had no data
  before is always noticed.  At most 128 MiB of tables are read, enough for 800 GiB of data in clusters of
  64 KiB; if there are more tables, a part of them, spread evenly.

qcow2: docs/interop/qcow2.txt of QEMU.
"""

from __future__ import annotations

import os
import stat
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from localdisk import device_mapper
from localdisk.frozen import frozen

MAX_TABLES = 128 << 20  # bytes of L2 tables and refcount blocks that are read of one volume
SAMPLES, SAMPLE = 512, 4096  # blocks, and bytes of each

_HEADS = ((0, 256 << 10), (1 << 20, 64 << 10))  # offset, length
_MAX_L1, _MAX_REFCOUNTS = 32 << 20, 8 << 20  # bytes; QEMU refuses more
_OFFSET = 0x00FFFFFFFFFFFE00  # of an entry of either table
_AHEAD = 256  # pieces that the kernel is asked to read at the same time

Piece = tuple[int, int]  # offset, length


@frozen
class Tables:
    """Where a qcow2 image has its tables: offsets and sizes in bytes."""

    cluster: int = 1 << 16
    l1: Piece = (0, 0)
    refcounts: Piece = (0, 0)


def digest(data: bytes) -> str:
    """The SHA-256 of a few bytes, by Python's own code if it has any.

    `hashlib` loads OpenSSL, which takes as long as a third of all that a hook imports.
    """
    try:
        if sys.version_info >= (3, 12):
            from _sha2 import sha256
        else:
            from _sha256 import sha256  # type: ignore[import-not-found]
    except ImportError:  # some distributions leave it out
        from hashlib import sha256
    found: str = sha256(data).hexdigest()
    return found


def read_identity(fd: int, start: bytes, tables: Tables | None) -> str:
    """The identity of the open volume; `start` is its first 64 KiB, used for a file; `tables` are qcow2's.

    Of a file: inode, size, modification time and a digest of `start`.  Of a block device: its device-mapper
    UUID, its size, and a digest of the bytes that the module's docstring lists.  Raises OSError.
    """
    status = os.fstat(fd)
    size = os.lseek(fd, 0, os.SEEK_END)
    if stat.S_ISREG(status.st_mode):
        return f"file {status.st_ino} {size} {status.st_mtime_ns} {digest(start)}"
    try:
        device = device_mapper.read_uuid(status.st_rdev)
    except OSError:
        device = "unnamed"
    return f"block {device} {size} {read_sample(fd, size, tables)}"


def read_sample(fd: int, size: int, tables: Tables | None) -> str:
    """A digest of the bytes that the module lists, of a device of `size` bytes.  Raises OSError."""
    import hashlib  # OpenSSL's is faster for megabytes

    forget_pages(fd)
    found = hashlib.sha256()
    for data in _read(fd, [*_HEADS, *_spread(size)]):
        found.update(data)
    for data in _read_tables(fd, tables) if tables else ():
        found.update(data)
    return found.hexdigest()


def is_empty(fd: int, tables: Tables) -> bool:
    """Whether a qcow2 image maps no cluster, so that it shows its backing file.  Raises OSError."""
    length = tables.l1[1]
    return 0 < length <= _MAX_L1 and _read_table(fd, tables.l1, _MAX_L1) == bytes(length)


def forget_pages(fd: int) -> None:
    """Drop the cached pages of a block device: other hosts write to it, so they may be old."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _spread(size: int) -> Iterator[Piece]:
    for number in range(SAMPLES):
        yield number * size // SAMPLES // SAMPLE * SAMPLE, SAMPLE


def _read_tables(fd: int, tables: Tables) -> Iterator[bytes]:
    """The L1 and refcount tables, then the tables at the offsets in them."""
    l1 = _read_table(fd, tables.l1, _MAX_L1)
    refcounts = _read_table(fd, tables.refcounts, _MAX_REFCOUNTS)
    yield from (l1, refcounts)
    offsets = [*_offsets(l1), *_offsets(refcounts)]
    yield from _read(
        fd, [(offset, tables.cluster) for offset in _some(offsets, MAX_TABLES // tables.cluster)]
    )


def _read_table(fd: int, table: Piece, most: int) -> bytes:
    """At most `most` bytes of a table; b"" if a forged header has an offset beyond any image."""
    offset, length = table
    return os.pread(fd, min(length, most), offset) if offset <= _OFFSET else b""


def _offsets(table: bytes) -> Iterator[int]:
    entries = array("Q", table[: len(table) // 8 * 8])
    if sys.byteorder == "little":
        entries.byteswap()
    return (entry & _OFFSET for entry in entries if entry & _OFFSET)


def _some(offsets: Sequence[int], most: int) -> Iterable[int]:
    """All offsets, or `most` of them, spread evenly."""
    if len(offsets) <= most:
        return offsets
    return (offsets[number * len(offsets) // most] for number in range(most))


def _read(fd: int, pieces: Iterable[Piece]) -> Iterator[bytes]:
    """The bytes of each piece; the kernel reads many pieces at the same time."""
    left = iter(pieces)
    while batch := list(islice(left, _AHEAD)):
        for offset, length in batch:
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)
        for offset, length in batch:
            yield os.pread(fd, length, offset)
