"""What changes when a volume does.  Block devices are files here: what is read is the same."""

from __future__ import annotations

import os
import random
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from localdisk import device_mapper
from localdisk.hook import fingerprint
from localdisk.hook.fingerprint import SAMPLE, SAMPLES, Tables, is_empty, read_identity, read_sample
from localdisk.hook.qcow2 import Header

MIB = 1 << 20


@pytest.fixture(name="device")
def fixture_device(tmp_path: Path) -> Iterator[int]:
    """An open, sparse file that can be written to."""
    fd = os.open(tmp_path / "device", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def changes(fd: int, offset: int, tables: Tables | None = None) -> bool:
    """Whether another byte at `offset` is noticed; it is put back."""
    size = os.lseek(fd, 0, os.SEEK_END)
    before, byte = read_sample(fd, size, tables), os.pread(fd, 1, offset)
    os.pwrite(fd, bytes([byte[0] ^ 1]), offset)
    after = read_sample(fd, size, tables)
    os.pwrite(fd, byte, offset)
    assert read_sample(fd, size, tables) == before
    return after != before


# -- of a file and of a device


def test_a_file_is_known_by_its_time_of_change(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    with path.open("r+b") as file:
        os.utime(path, ns=(5, 5))
        before = read_identity(file.fileno(), b"start", None)
        assert before.startswith(f"file {path.stat().st_ino} {MIB} 5 ")
        os.utime(path, ns=(5, 6))
        assert read_identity(file.fileno(), b"start", None) != before
        os.utime(path, ns=(5, 5))
        assert read_identity(file.fileno(), b"other", None) != before


@pytest.mark.parametrize("is_named", [True, False])
def test_a_device_is_known_by_its_lvm_uuid(
    monkeypatch: pytest.MonkeyPatch, device: int, is_named: bool
) -> None:
    def dm_uuid(_device: int) -> str:
        if not is_named:
            raise FileNotFoundError
        return "LVM-x"

    os.truncate(device, MIB)
    monkeypatch.setattr(device_mapper, "read_uuid", dm_uuid)
    monkeypatch.setattr(stat, "S_ISREG", lambda _mode: False)
    name = "LVM-x" if is_named else "unnamed"
    assert read_identity(device, b"", None) == f"block {name} {MIB} {read_sample(device, MIB, None)}"


# -- the sample


@pytest.mark.parametrize("size", [512, 4096, 256 << 10, MIB + 512, 64 * MIB, 1 << 40])
def test_the_ends_and_the_beginning_of_the_first_partition_are_read(device: int, size: int) -> None:
    os.truncate(device, size)
    assert changes(device, 0)
    assert changes(device, min(size, 256 << 10) - 1)
    if size > MIB:
        assert changes(device, MIB + 511)


@pytest.mark.parametrize("size", [8 * MIB, 100 * MIB + 512, 1 << 40])
def test_whatever_is_longer_than_a_512th_is_noticed(size: int) -> None:
    """No two blocks that are read lie further apart than that."""
    offsets = [offset for offset, _ in fingerprint._spread(size)] + [size]
    gaps = [after - before for before, after in zip(offsets, offsets[1:])]
    assert max(gaps) <= -(-size // SAMPLES) + SAMPLE


def test_the_odds_of_a_change_here_and_there() -> None:
    """As the module's docstring has them; here of disks of which one block of a hundred was changed."""
    rng, size, noticed = random.Random(1), 1 << 30, 0
    sampled = {offset // SAMPLE for offset, _ in fingerprint._spread(size)}
    assert len(sampled) == SAMPLES
    for _ in range(100):
        noticed += not sampled.isdisjoint(rng.sample(range(size // SAMPLE), size // SAMPLE // 100))
    assert noticed >= 97
    assert round(100 * (1 - 0.999**SAMPLES)) == 40
    assert round(100 * (1 - 0.995**SAMPLES)) == 92


def test_about_two_mebibytes_are_read(device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    pread = os.pread

    def counted(fd: int, length: int, offset: int) -> bytes:
        read.append(length)
        return pread(fd, length, offset)

    os.truncate(device, 1 << 40)
    monkeypatch.setattr(os, "pread", counted)
    read_sample(device, 1 << 40, None)
    assert sum(read) == (256 << 10) + (64 << 10) + SAMPLES * SAMPLE


# -- qcow2


def qcow2(path: Path, *commands: str, options: str = "", size: str = "256G") -> tuple[int, Tables]:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), str(path), size],
        check=True,
    )
    for command in commands:
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, str(path)], check=True, capture_output=True)
    fd = os.open(path, os.O_RDWR)
    return fd, Header.parse(os.pread(fd, 65536, 0)).tables


@pytest.mark.parametrize(
    "options", ["", "cluster_size=4k", "cluster_size=2M", "extended_l2=on,cluster_size=64k"]
)
def test_any_change_in_a_table_is_noticed(tmp_path: Path, options: str) -> None:
    """In each table, wherever it is, and for each of its bytes."""
    writes = [f"write {offset} 64k" for offset in ("0", "70G", "200G")]
    fd, tables = qcow2(tmp_path / "image", *writes, options=options)
    try:
        places = [tables.l1[0], tables.l1[0] + tables.l1[1] - 1, tables.refcounts[0]]
        places += [tables.refcounts[0] + tables.refcounts[1] - 1]
        for table in (tables.l1, tables.refcounts):
            for offset in fingerprint._offsets(os.pread(fd, table[1], table[0])):
                places += [offset, offset + tables.cluster // 2, offset + tables.cluster - 1]
        assert len(places) >= 4 + 3 * 2
        end = os.lseek(fd, 0, os.SEEK_END)
        os.truncate(fd, max(end, max(places) + 1))
        assert all(changes(fd, place, tables) for place in places)
    finally:
        os.close(fd)


def test_a_write_to_a_cluster_without_data_is_noticed(tmp_path: Path) -> None:
    seen = set()
    for commands in (
        ("write 0 64k",),
        ("write 0 64k", "write 200G 512"),
        ("write 0 64k", "write -z 100G 64k"),
    ):
        fd, tables = qcow2(tmp_path / "image", *commands)
        seen.add(read_sample(fd, 1 << 40, tables))  # on a volume of that size
        os.close(fd)
    assert len(seen) == 3


def test_of_too_many_tables_some_are_read(device: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "MAX_TABLES", 4 * 65536)
    os.truncate(device, 1 << 40)
    offsets = [(1 << 30) + number * 65536 for number in range(10)]
    os.pwrite(device, struct.pack(">10Q", *(offset | 1 << 63 for offset in offsets)), 1 << 29)
    tables = Tables(65536, l1=(1 << 29, 80))
    noticed = [number for number, offset in enumerate(offsets) if changes(device, offset + 9, tables)]
    assert noticed == [0, 2, 5, 7]
    assert changes(device, (1 << 29) + 79, tables), "the L1 table itself is read"


@pytest.mark.parametrize(
    "tables",
    [
        Tables(65536, l1=(1 << 63, 80), refcounts=((1 << 64) - 1, 1 << 40)),
        Tables(512, l1=(0, (1 << 32) * 8), refcounts=(512, (1 << 32) << 21)),
        Tables(1 << 21, l1=(1 << 55, 8)),
    ],
)
def test_forged_tables_are_read_as_far_as_they_are_there(device: int, tables: Tables) -> None:
    os.pwrite(device, b"\xff" * 4096, 0)
    assert read_sample(device, 4096, tables) == read_sample(device, 4096, tables)
    assert not is_empty(device, tables)


@pytest.mark.parametrize(
    "options", ["", "cluster_size=512", "cluster_size=2M", "extended_l2=on", "compat=0.10"]
)
@pytest.mark.parametrize("size", ["512", "1M", "9G"])
def test_what_is_empty(tmp_path: Path, options: str, size: str) -> None:
    fd, tables = qcow2(tmp_path / "image", options=options, size=size)
    assert is_empty(fd, tables)
    os.close(fd)
    fd, tables = qcow2(tmp_path / "image", "write -z 0 512", options=options, size=size)
    assert not is_empty(fd, tables)
    os.truncate(fd, tables.l1[0] + tables.l1[1] - 1)
    assert not is_empty(fd, tables)
    os.close(fd)
