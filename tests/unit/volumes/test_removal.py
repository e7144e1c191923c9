from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from localdisk.errors import CommandFailed, DiskBusy, EraseFailed
from localdisk.ids import is_uuid
from localdisk.volumes import removal
from localdisk.volumes.local_disk import LocalDisk
from localdisk.volumes.lvm import VolumeGroup
from tests.fakes import FULLREPORT, OTHER_VOLUME, VOLUME, FakeHost, Killed, aside, tags

NAME = f"ovirt-local/{VOLUME}"
REMOVE = f"lvremove --quiet --yes {NAME}"
ACTIVATE = f"lvchange --quiet --activate y --ignoreactivationskip {NAME}"
BLKDISCARD = f"blkdiscard --offset 0 --length {64 << 20} /dev/{NAME}"
LOOK = f"{FULLREPORT} ovirt-local"
ASIDE = aside("zero", VOLUME)
NOT_RENAMED = aside("zero", OTHER_VOLUME)
BLOCK = 64 << 10
ROOT = Path(__file__).parents[3]


@pytest.fixture(name="host")
def fixture_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHost:
    return FakeHost().install(monkeypatch, tmp_path)


Step = Callable[[VolumeGroup, LocalDisk, str, removal.Pause], object]


def call(step: Step, host: FakeHost, erase: str = "none", closes_after: int = 1000) -> tuple[object, int]:
    """Do it to VOLUME, which is closed after so many pauses; what came back, and how many there were."""
    vg = VolumeGroup.from_report(host.report())
    lv = vg.find(VOLUME)
    disk = LocalDisk.from_lv(lv) if lv else None
    assert disk
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == closes_after:
            host.volumes[VOLUME].lv_device_open = ""

    return step(vg, disk, erase, pause), len(pauses)


def erase_and_remove(vg: VolumeGroup, disk: LocalDisk, erase: str, pause: removal.Pause) -> None:
    removal.erase_and_remove(vg, disk, erase, removal.Pace(None, pause))


STEPS: list[Step] = [removal.remove_or_set_aside, erase_and_remove]


# -- without erasing


@pytest.mark.parametrize("step", STEPS)
def test_a_closed_disk(host: FakeHost, step: Step) -> None:
    host.add(VOLUME, tags(), lv_active="")
    returned, pauses = call(step, host)
    assert not returned
    assert pauses == 0
    assert host.commands == [REMOVE]
    assert VOLUME not in host.volumes


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("erase", ["none", "zero"])
def test_a_disk_that_is_open_for_a_moment_is_waited_for(host: FakeHost, step: Step, erase: str) -> None:
    host.add(VOLUME, tags() if step is removal.remove_or_set_aside else ASIDE, lv_device_open="open")
    assert call(step, host, erase, closes_after=3)[1] == 3
    assert host.commands[:3] == [LOOK] * 3
    assert VOLUME not in host.volumes


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("erase", ["none", "discard", "zero"])
def test_an_open_disk_is_left_alone(host: FakeHost, step: Step, erase: str) -> None:
    before = host.add(VOLUME, tags(), lv_device_open="open").row
    with pytest.raises(DiskBusy, match=r"is ready and still open by something that neither "):
        call(step, host, erase)
    assert host.commands == [LOOK] * removal.TRIES
    assert host.volumes[VOLUME].row == before


def test_a_disk_that_is_gone_meanwhile_is_not_waited_for(host: FakeHost) -> None:
    host.add(VOLUME, tags(), lv_device_open="open")
    host.before_command(1, host.volumes.clear)
    with pytest.raises(CommandFailed, match="Failed to find"):
        call(removal.remove_or_set_aside, host)
    assert host.commands == [LOOK, LOOK, REMOVE]


def test_a_disk_that_is_opened_after_the_look_is_waited_for(host: FakeHost) -> None:
    host.add(VOLUME, tags())
    host.fail("lvremove", f"  Logical volume {NAME} in use.\n", times=2)
    assert call(removal.remove_or_set_aside, host)[1] == 2
    assert host.commands == [REMOVE] * 3


def test_a_disk_that_stays_open_is_busy(host: FakeHost) -> None:
    host.add(VOLUME, tags())
    host.fail("lvremove", f"  Logical volume {NAME} is used by another device.\n", times=1000)
    with pytest.raises(DiskBusy):
        call(removal.remove_or_set_aside, host)
    assert host.commands == [REMOVE] * removal.TRIES


def test_any_other_failure_is_not_tried_again(host: FakeHost) -> None:
    host.add(VOLUME, tags())
    host.fail("lvremove", "  Cannot change VG while PVs are missing.\n", times=1000)
    with pytest.raises(CommandFailed, match="PVs are missing"):
        call(removal.remove_or_set_aside, host)
    assert host.commands == [REMOVE]


# -- setting aside


@pytest.mark.parametrize("erase", ["discard", "zero"])
@pytest.mark.parametrize(
    "lv_tags",
    [
        tags(),
        tags("UPDATING", "WRITES_5"),
        tags("STOPPED_5", "UNNEEDED_5"),
        tags("DELETING"),
        tags(ours=False),
        tags(f"ASIDE_{OTHER_VOLUME}"),
    ],
    ids=["ready", "unfinished", "stopped", "deleting", "older", "edited"],
)
def test_what_must_be_erased_is_set_aside(host: FakeHost, erase: str, lv_tags: set[str]) -> None:
    volume = host.add(VOLUME, lv_tags)
    name, _ = call(removal.remove_or_set_aside, host, erase)
    assert is_uuid(name)
    assert host.volumes == {"pool0": host.volumes["pool0"], name: volume}
    assert volume.lv_tags == aside(erase, str(name))
    assert host.tools == ["lvchange", "lvrename"]


def test_every_disk_gets_a_name_of_its_own(host: FakeHost) -> None:
    for _ in range(3):
        host.add(VOLUME, tags())
        call(removal.remove_or_set_aside, host, "zero")
    assert len(host.volumes) == 1 + 3


@pytest.mark.parametrize("number", [0, 1])
def test_killed_while_it_is_set_aside(host: FakeHost, number: int) -> None:
    """Before the first commit nothing has changed; between the two, its tags already say it all."""
    volume = host.add(VOLUME, tags())
    host.kill_before(number)
    with pytest.raises(Killed):
        call(removal.remove_or_set_aside, host, "zero")
    host.before = {}
    assert volume.lv_name == VOLUME
    recorded = [tag for tag in volume.lv_tags if tag.startswith("ASIDE_")]
    assert volume.lv_tags == (set(recorded) | ASIDE - {f"ASIDE_{VOLUME}"} if number else tags())
    assert len(recorded) == number
    name, _ = call(removal.remove_or_set_aside, host, "zero")
    assert host.volumes[str(name)].lv_tags == aside("zero", str(name))
    assert recorded in ([], [f"ASIDE_{name}"])
    assert host.tools.count("lvchange") == 2 - number


def test_a_rename_that_fails_is_done_again(host: FakeHost) -> None:
    volume = host.add(VOLUME, tags())
    host.fail("lvrename", "  Failed to write VG ovirt-local.\n", times=2)
    for _ in range(2):
        with pytest.raises(CommandFailed, match="Failed to write VG"):
            call(removal.remove_or_set_aside, host, "zero")
    name, _ = call(removal.remove_or_set_aside, host, "zero")
    assert host.volumes[str(name)] is volume
    assert volume.lv_tags == aside("zero", str(name))
    assert host.tools == ["lvchange", *["lvrename"] * 3]
    assert len(set(host.commands)) == 2  # to one name, the first time as the last


@pytest.mark.parametrize("erase", ["none", "discard", "zero"])
def test_a_disk_is_erased_as_was_decided_when_it_was_set_aside(host: FakeHost, erase: str) -> None:
    volume = host.add(VOLUME, NOT_RENAMED)
    assert call(removal.remove_or_set_aside, host, erase)[0] == OTHER_VOLUME
    assert host.volumes[OTHER_VOLUME] is volume
    assert volume.lv_tags == NOT_RENAMED
    assert host.commands == [f"lvrename --quiet ovirt-local {VOLUME} {OTHER_VOLUME}"]


@pytest.mark.parametrize("erase", ["none", "discard", "zero"])
@pytest.mark.parametrize("names", [(), (VOLUME, OTHER_VOLUME), ("x",)], ids=str)
def test_one_that_lost_its_new_name_gets_another(host: FakeHost, erase: str, names: tuple[str, ...]) -> None:
    volume = host.add(VOLUME, ASIDE - {f"ASIDE_{VOLUME}"} | {f"ASIDE_{name}" for name in names})
    name, _ = call(removal.remove_or_set_aside, host, erase)
    assert is_uuid(name)
    assert name not in (VOLUME, OTHER_VOLUME)
    assert host.volumes[str(name)] is volume
    assert volume.lv_tags == aside("zero", str(name))
    assert host.tools == ["lvchange", "lvrename"]


# -- erasing


@pytest.mark.parametrize(
    ("erase", "command"),
    [("discard", BLKDISCARD), ("zero", BLKDISCARD.replace(" ", " --zeroout ", 1))],
)
def test_erase_and_remove(host: FakeHost, erase: str, command: str) -> None:
    host.add(VOLUME, ASIDE, lv_active="")
    call(erase_and_remove, host, erase)
    assert host.commands == [ACTIVATE, command, REMOVE]


def test_a_thin_disk_is_discarded_like_any_other(host: FakeHost) -> None:
    host.add(VOLUME, ASIDE, pool_lv="pool0", lv_layout="thin,sparse")
    call(erase_and_remove, host, "discard")
    look = f"{FULLREPORT} ovirt-local"  # whether the pool passes it down
    assert host.commands == [ACTIVATE, look, BLKDISCARD, REMOVE]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_erase_can_be_begun_again(host: FakeHost, number: int) -> None:
    volume = host.add(VOLUME, ASIDE, lv_active="")
    host.kill_before(number)
    with pytest.raises(Killed):
        call(erase_and_remove, host, "zero")
    host.before = {}
    call(erase_and_remove, host, "zero")
    assert host.removed == [volume]
    assert host.erased == {volume.lv_uuid}


@pytest.mark.parametrize("erase", ["discard", "zero"])
def test_nothing_is_removed_that_could_not_be_erased(host: FakeHost, erase: str) -> None:
    host.add(VOLUME, ASIDE)
    host.fail("blkdiscard", "blkdiscard: /dev/x: BLKDISCARD ioctl failed: Operation not supported\n")
    with pytest.raises(CommandFailed, match="Operation not supported"):
        call(erase_and_remove, host, erase)
    assert VOLUME in host.volumes


# -- zeros on a thin disk: a file of a real file system takes its place


@pytest.fixture(name="thin_disk")
def fixture_thin_disk(host: FakeHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    host.add(VOLUME, ASIDE, pool_lv="pool0", lv_layout="thin,sparse")
    place = tmp_path if takes_direct_io(tmp_path) else ROOT / ".bed"
    place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as directory:
        path = Path(directory, "disk")
        monkeypatch.setattr(VolumeGroup, "path", lambda _vg, _name: str(path))
        yield path


def takes_direct_io(directory: Path) -> bool:
    path = directory / "probe"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:  # a tmpfs before Linux 6.6
        return False
    return True


def write(path: Path, size: int, data: dict[int, bytes]) -> int:
    """A file of holes and `data`; returns how many blocks it takes."""
    with open(path, "wb") as file:
        for offset, content in data.items():
            file.seek(offset)
            file.write(content)
        file.truncate(size)
        os.fsync(file.fileno())
    return os.stat(path).st_blocks


@pytest.mark.parametrize(
    ("size", "data"),
    [
        (0, {}),
        (BLOCK, {}),
        (BLOCK, {0: b"x" * BLOCK}),
        (64 * BLOCK, {BLOCK: b"x" * BLOCK, 40 * BLOCK: b"y" * 2 * BLOCK}),
        (20 * BLOCK + 4096, {20 * BLOCK: b"x" * 4096}),  # no whole number of blocks
        (20 * BLOCK + 4096, {18 * BLOCK: b"x" * BLOCK}),
        (2 * BLOCK, {BLOCK: b"\0" * (BLOCK - 1) + b"x"}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_data_becomes_zeros_and_holes_stay(
    host: FakeHost, thin_disk: Path, size: int, data: dict[int, bytes]
) -> None:
    blocks = write(thin_disk, size, data)
    call(erase_and_remove, host, "zero")
    assert thin_disk.read_bytes() == bytes(size)
    assert os.stat(thin_disk).st_blocks == blocks
    assert VOLUME not in host.volumes


def test_no_more_is_provided_than_there_is(host: FakeHost, thin_disk: Path) -> None:
    """A thin pool's blocks can be as small as 64 KiB."""
    blocks = write(thin_disk, 64 * BLOCK, {8 * n * BLOCK: b"x" * BLOCK for n in range(8)})
    call(erase_and_remove, host, "zero")
    assert os.stat(thin_disk).st_blocks == blocks


def test_a_device_that_writes_less_than_it_got(
    host: FakeHost, thin_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a block at a time, read and written."""
    write(thin_disk, 4 * BLOCK, {0: b"x" * 4 * BLOCK})
    preadv, pwritev = os.preadv, os.pwritev

    def half(buffers: list[memoryview]) -> list[memoryview]:
        return [memoryview(buffers[0])[: BLOCK // 2]]

    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, half(buffers), at))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: pwritev(fd, half(buffers), at))
    call(erase_and_remove, host, "zero")
    assert thin_disk.read_bytes() == bytes(4 * BLOCK)

    write(thin_disk, 4 * BLOCK, {0: b"x" * 4 * BLOCK})
    monkeypatch.setattr(os, "preadv", preadv)
    host.add(VOLUME, ASIDE, pool_lv="pool0", lv_layout="thin,sparse")
    call(erase_and_remove, host, "zero")
    assert thin_disk.read_bytes() == bytes(4 * BLOCK)


def test_a_device_that_becomes_smaller(
    host: FakeHost, thin_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not there any more is not waited for."""
    write(thin_disk, 4 * BLOCK, {0: b"x" * 4 * BLOCK})
    preadv, reads = os.preadv, []

    def shrink(fd: int, buffers: list[memoryview], at: int) -> int:
        reads.append(at)
        assert len(reads) < 9, "it goes round in circles"
        os.truncate(thin_disk, 2 * BLOCK)
        return preadv(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", shrink)
    call(erase_and_remove, host, "zero")
    assert thin_disk.read_bytes() == bytes(2 * BLOCK)


def test_an_erase_that_fails_names_the_device(host: FakeHost, thin_disk: Path) -> None:
    with pytest.raises(
        EraseFailed, match=rf"erasing {thin_disk} failed: No such file or directory : look at"
    ):
        call(erase_and_remove, host, "zero")
    assert VOLUME in host.volumes


def test_a_write_error_is_an_error(host: FakeHost, thin_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(thin_disk, BLOCK, {0: b"x"})

    def fail(*_arguments: object) -> int:
        raise OSError(5, "Input/output error")

    for call_ in ("pwritev", "preadv", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call_, fail)
            with pytest.raises(EraseFailed, match="Input/output error"):
                call(erase_and_remove, host, "zero")
    assert VOLUME in host.volumes


# -- and the blocks given back as it goes


STEP = 4 * BLOCK


class Discards:
    """The kernel's BLKDISCARD, on a file: holes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.path = path
        self.ranges: list[tuple[int, int]] = []
        self.most = 0  # 512-byte blocks that the file took
        self.is_refused = False
        self.unsynced = False
        pwritev, fsync = os.pwritev, os.fsync

        def write(fd: int, buffers: list[memoryview], at: int) -> int:
            self.unsynced = True
            written = pwritev(fd, buffers, at)
            self.most = max(self.most, os.fstat(fd).st_blocks)
            return written

        def sync(fd: int) -> None:
            fsync(fd)
            self.unsynced = False

        monkeypatch.setattr(removal, "_STEP", STEP)
        monkeypatch.setattr(fcntl, "ioctl", self._ioctl)
        monkeypatch.setattr(os, "pwritev", write)
        monkeypatch.setattr(os, "fsync", sync)

    def _ioctl(self, fd: int, request: int, argument: bytes) -> int:
        assert request == 0x1277
        assert not self.unsynced, "zeros that are not on the device are lost with the block"
        start, length = struct.unpack("QQ", argument)
        self.ranges.append((start, length))
        if self.is_refused:
            raise OSError(95, "Operation not supported")
        where = ["--offset", str(start), "--length", str(length)]
        subprocess.run(
            ["fallocate", "--punch-hole", *where, f"/proc/self/fd/{fd}"], check=True, pass_fds=[fd]
        )
        return 0


@pytest.fixture(name="discards")
def fixture_discards(monkeypatch: pytest.MonkeyPatch, thin_disk: Path) -> Discards:
    return Discards(monkeypatch, thin_disk)


@pytest.mark.parametrize(
    ("size", "data", "ranges"),
    [
        (16 * BLOCK, {}, []),
        (16 * BLOCK, {0: b"x" * 16 * BLOCK}, [(n * STEP, STEP) for n in range(4)]),
        (16 * BLOCK, {9 * BLOCK: b"x"}, [(2 * STEP, STEP)]),
        (16 * BLOCK, {0: bytes(16 * BLOCK)}, []),  # zeros already: nobody's data
        (9 * BLOCK, {8 * BLOCK: b"x"}, [(2 * STEP, BLOCK)]),  # not behind the end
        (9 * BLOCK + 4096, {9 * BLOCK: b"x"}, [(2 * STEP, BLOCK + 4096)]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_blocks_are_given_back_step_by_step(
    host: FakeHost,
    thin_disk: Path,
    discards: Discards,
    size: int,
    data: dict[int, bytes],
    ranges: list[tuple[int, int]],
) -> None:
    write(thin_disk, size, data)
    call(erase_and_remove, host, "zero")
    assert discards.ranges == ranges
    assert thin_disk.read_bytes() == bytes(size)
    assert VOLUME not in host.volumes


def test_a_clone_never_takes_more_than_a_step_of_its_own(
    host: FakeHost, thin_disk: Path, discards: Discards
) -> None:
    """Shared blocks are allocated again when they are written, which must not fill the pool."""
    blocks = write(thin_disk, 32 * BLOCK, {0: b"x" * 32 * BLOCK})
    call(erase_and_remove, host, "zero")
    assert len(discards.ranges) == 8
    assert discards.most <= blocks
    assert os.stat(thin_disk).st_blocks == 0


def test_a_pool_that_ignores_discards(host: FakeHost, thin_disk: Path, discards: Discards) -> None:
    discards.is_refused = True
    write(thin_disk, 16 * BLOCK, {0: b"x" * 16 * BLOCK})
    call(erase_and_remove, host, "zero")
    assert len(discards.ranges) == 4
    assert thin_disk.read_bytes() == bytes(16 * BLOCK)
    assert VOLUME not in host.volumes


# -- in steps


def test_zeros_are_written_in_steps_at_the_pace_of_copies(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call of the kernel for a whole device could not be interrupted."""
    volume = host.add(VOLUME, ASIDE, 20 << 20)
    vg = VolumeGroup.from_report(host.report())
    disk = next(filter(None, map(LocalDisk.from_lv, vg.lvs)))
    now, slept = [0.0], list[float]()

    def pause(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    host.before["blkdiscard"] = lambda _argv: now.append(now.pop() + 0.25)
    removal.erase_and_remove(vg, disk, "zero", removal.Pace(8 << 20, pause))
    assert [command.split()[2:6] for command in host.commands if "--zeroout" in command] == [
        ["--offset", "0", "--length", str(8 << 20)],
        ["--offset", str(8 << 20), "--length", str(8 << 20)],
        ["--offset", str(16 << 20), "--length", str(4 << 20)],
    ]
    assert slept == [0.75, 0.75, 0.25]
    assert (host.erased, host.removed) == ({volume.lv_uuid}, [volume])


@pytest.mark.parametrize(("bandwidth", "step"), [(None, 64), (1 << 40, 64), (5 << 19, 2), (1, 1)])
def test_steps_are_whole_and_no_longer_than_a_second(bandwidth: int | None, step: int) -> None:
    assert removal.Pace(bandwidth, lambda _: None).step == step << 20


def test_zeros_on_a_thin_disk_have_a_pace_by_what_is_written(
    host: FakeHost, thin_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(thin_disk, 4 << 20, {2 << 20: b"x" * BLOCK})
    slept: list[float] = []
    vg = VolumeGroup.from_report(host.report())
    disk = next(filter(None, map(LocalDisk.from_lv, vg.lvs)))
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    removal.erase_and_remove(vg, disk, "zero", removal.Pace(1 << 20, slept.append))
    assert slept == [BLOCK / (1 << 20)]
    assert thin_disk.read_bytes() == bytes(4 << 20)


# -- template LVs


@pytest.mark.parametrize("erase", ["discard", "zero"])
def test_what_nobody_may_write_is_made_writable_to_be_erased(host: FakeHost, erase: str) -> None:
    """The kernel answers EPERM otherwise, and it would never go."""
    host.add(VOLUME, aside(erase, VOLUME), lv_active="", lv_permissions="read-only")
    call(erase_and_remove, host, erase)
    command = BLKDISCARD.replace(" ", " --zeroout ", 1) if erase == "zero" else BLKDISCARD
    assert host.commands == [f"lvchange --quiet --permission rw {NAME}", ACTIVATE, command, REMOVE]


def test_what_is_not_erased_stays_read_only(host: FakeHost) -> None:
    host.add(VOLUME, aside("none", VOLUME), lv_active="", lv_permissions="read-only")
    call(erase_and_remove, host)
    assert host.commands == [REMOVE]
