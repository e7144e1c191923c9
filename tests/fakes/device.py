"""A file in the place of a device that a copy fills."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from localdisk import device_mapper, run
from localdisk.hook import copy, sources
from localdisk.hook.sources import Source
from localdisk.protocol import Target
from localdisk.spawn import Process
from localdisk.vdsm.disks import Disk, Volume

DM_UUID = "LVM-" + "x" * 64


LEAF = "aaaaaaaa-0000-4000-8000-000000000000"


BASE = "aaaaaaaa-0000-4000-8000-000000000001"


OLD = b"\xee"  # what another disk left on the device


def silent(_fraction: float, _written: int) -> None:
    """A listener to progress that lets the copy go on."""


class Device:
    """A file in the place of the logical volume; what needs a block device is bent at the door.

    The kernel's BLKZEROOUT writes zeros into the file, and qemu-img opens it as a file.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, size: int, content: bytes = OLD) -> None:
        self.path = path
        path.write_bytes(content * size)
        self.events: list[str] = []
        self.processes: list[Process] = []
        self.tool: list[str] | None = None  # instead of qemu-img
        self._start, self._fsync = run.start_reporting, os.fsync
        monkeypatch.setattr(device_mapper, "read_uuid", lambda _device: DM_UUID)
        monkeypatch.setattr(fcntl, "ioctl", self._ioctl)
        monkeypatch.setattr(run, "start_reporting", self._start_reporting)
        monkeypatch.setattr(os, "fsync", self._sync)
        monkeypatch.setattr(copy, "NODE_DEADLINE", 0.2)

    def target(self, **changes: Any) -> Target:
        fields = {"path": str(self.path), "dm_uuid": DM_UUID, "zeroed": False, "bandwidth": None, "nice": 10}
        return Target(**{**fields, **changes})

    def _ioctl(self, fd: int, request: int, argument: bytes) -> int:
        assert request == 0x127F
        offset, length = struct.unpack("QQ", argument)
        self.events.append(f"zero {offset} {length}")
        return os.pwrite(fd, bytes(length), offset)

    def _start_reporting(
        self, argv: list[str], pass_fds: Iterable[int], limits: Mapping[str, int]
    ) -> Process:
        self.events.append("convert")
        bent = [word.replace("file.driver=host_device", "file.driver=file") for word in argv]
        bent = [word.replace('"driver": "host_device"', '"driver": "file"') for word in bent]
        if not takes_direct_io(self.path):
            bent[bent.index("-t") + 1] = "writeback"
        self.processes.append(self._start(self.tool or bent, pass_fds, limits))
        return self.processes[-1]

    def _sync(self, fd: int) -> None:
        self.events.append("fsync")
        self._fsync(fd)

    @property
    def has_ended(self) -> bool:
        return all(process.wait(0) is not None for process in self.processes)


def takes_direct_io(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def disk(directory: Path, image_format: str) -> Disk:
    volumes = tuple(Volume(name, str(directory / name)) for name in (LEAF, BASE))
    path = str(directory / LEAF)
    return Disk("vda", "disk", path, image_format, "file", BASE, LEAF, "none", volumes)


@contextlib.contextmanager
def raw_source(directory: Path, content: bytes) -> Iterator[Source]:
    (directory / LEAF).write_bytes(content)
    with sources.opened(disk(directory, "raw")) as source:
        yield source
