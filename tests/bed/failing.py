"""Block devices that a test can make fail.

    with failing_device("bed-a", 256 << 20) as device:     in the place of a disk
        device.fail(start)        reads and writes after byte `start` fail from now on
        device.vanish()           removes the device and its node; nothing may have it open
        device.mend()             the device works again, with its data
    FailingDevice.of("ovirt--local-pool0_tmeta")           a linear LV fails like that, too

A disk is a file on the bed's shared storage.  LVM does not see the loop device between: what is on the disk
begins a mebibyte into the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bed.host import SCRATCH
from tests.bed.shell import attempt, run

SECTOR = 512
OFFSET = 2048  # sectors of the loop device before the disk begins

_TARGET_MSG = 0xC138FD0E  # DM_TARGET_MSG, linux/dm-ioctl.h
_DM_IOCTL = struct.Struct("=3I 7I Q 128s 129s 7x")  # version, data_size, data_start, …, dev, name, uuid


@dataclass(frozen=True)
class FailingDevice:
    """A mapping of device-mapper: `sectors` sectors of the device `lower`, from its sector `offset` on."""

    name: str
    lower: str
    offset: int
    sectors: int

    @classmethod
    def of(cls, name: str) -> FailingDevice:
        """The mapping of that name, which is there and linear, in one piece."""
        start, sectors, target, lower, offset = run("dmsetup", "table", name).split()
        assert (start, target) == ("0", "linear")
        return cls(name, lower, int(offset), int(sectors))

    @property
    def path(self) -> Path:
        return Path("/dev/mapper") / self.name

    def fail(self, start: int = 0, end: int | None = None) -> None:
        """From now on the bytes from `start` to `end` can be neither read nor written."""
        first, last = start // SECTOR, self.sectors if end is None else end // SECTOR
        pieces = (
            (0, first, self._good(0)),
            (first, last - first, "error"),
            (last, self.sectors - last, self._good(last)),
        )
        self._load("".join(f"{at} {size} {target}\n" for at, size, target in pieces if size))

    def vanish(self) -> None:
        run("dmsetup", "remove", "--retry", self.name)

    def mend(self) -> None:
        if self.path.exists():
            self._load(self._whole)
        else:
            self.create()

    def create(self) -> None:
        run("dmsetup", "create", self.name, text=self._whole)

    @property
    def _whole(self) -> str:
        return f"0 {self.sectors} {self._good(0)}\n"

    def _good(self, start: int) -> str:
        return f"linear {self.lower} {self.offset + start}"

    def _load(self, table: str) -> None:
        run("dmsetup", "load", self.name, text=table)
        run("dmsetup", "suspend", "--nolockfs", "--noflush", self.name)
        run("dmsetup", "resume", self.name)


@contextmanager
def failing_device(name: str, size: int) -> Iterator[FailingDevice]:
    """A disk of `size` zeros, whole for now."""
    backing = SCRATCH / f"{name}.img"
    with open(backing, "wb") as file:
        file.truncate(OFFSET * SECTOR + size)
    loop = run("losetup", "--find", "--show", str(backing)).strip()
    device = FailingDevice(name, loop, OFFSET, size // SECTOR)
    try:
        device.create()
        yield device
    finally:
        attempt("dmsetup", "remove", "--retry", "--force", name)
        run("losetup", "--detach", loop)
        backing.unlink()


def send_messages(name: str, messages: Iterable[str]) -> None:
    """Send messages to a mapping's first target, as `dmsetup message` does, until one is refused."""
    with open("/dev/mapper/control", "rb") as control, contextlib.suppress(OSError):
        for message in messages:
            data = struct.pack("=Q", 0) + message.encode() + b"\0"
            size = _DM_IOCTL.size + len(data)
            head = _DM_IOCTL.pack(4, 0, 0, size, _DM_IOCTL.size, *[0] * 6, name.encode(), b"")
            fcntl.ioctl(control, _TARGET_MSG, bytearray(head + data))
