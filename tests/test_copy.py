from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from localdisk import copy, image, run
from localdisk.copy import Target
from localdisk.definition import Disk, Volume
from localdisk.errors import CopyFailed, DeviceNotReady
from localdisk.image import Layer, Source

MIB = 1 << 20
DM_UUID = "LVM-" + "x" * 64
LEAF = "aaaaaaaa-0000-4000-8000-000000000000"
BASE = "aaaaaaaa-0000-4000-8000-000000000001"
OLD = b"\xee"  # what another disk left on the device

# Captured: qemu-img 7.2 convert -p -r 16M, and that it pads with spaces and repeats the last.
PROGRESS = (
    b"    (0.00/100%)\r    (25.00/100%)\r    (50.00/100%)\r    (75.00/100%)\r    (100.00/100%)\r"
    b"    (100.00/100%)\r\n"
)


LIMITS = "prlimit --as=4294967296 --core=0 --"


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
        self.processes: list[run.Process[bytes]] = []
        self.tool: list[str] | None = None  # instead of qemu-img
        self._start, self._fsync = run.start_reporting, os.fsync
        monkeypatch.setattr(copy, "read_dm_uuid", lambda _device: DM_UUID)
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

    def _start_reporting(self, argv: list[str], pass_fds: Iterable[int]) -> run.Process[bytes]:
        self.events.append("convert")
        bent = [word.replace("file.driver=host_device", "file.driver=file") for word in argv]
        if not takes_direct_io(self.path):
            bent[bent.index("-t") + 1] = "writeback"
        self.processes.append(self._start(self.tool or bent, pass_fds))
        return self.processes[-1]

    def _sync(self, fd: int) -> None:
        self.events.append("fsync")
        self._fsync(fd)

    @property
    def has_ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)


def takes_direct_io(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.fixture(name="device")
def fixture_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    return Device(monkeypatch, tmp_path / "device", 4 * MIB)


def disk(directory: Path, image_format: str) -> Disk:
    volumes = tuple(Volume(name, str(directory / name)) for name in (LEAF, BASE))
    path = str(directory / LEAF)
    return Disk("vda", "disk", path, image_format, "file", BASE, LEAF, "none", volumes)


@contextlib.contextmanager
def raw_source(directory: Path, content: bytes) -> Iterator[Source]:
    (directory / LEAF).write_bytes(content)
    with image.opened(disk(directory, "raw")) as source:
        yield source


@pytest.fixture(name="chain")
def fixture_chain(tmp_path: Path) -> Iterator[Source]:
    """A leaf without data on a raw base of 1 MiB: a byte pattern, then a hole."""
    (tmp_path / BASE).write_bytes(bytes(range(256)) * 1024)
    os.truncate(tmp_path / BASE, MIB)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", BASE, "-F", "raw", str(tmp_path / LEAF)]
    subprocess.run(argv, check=True)
    with image.opened(disk(tmp_path, "cow")) as source:
        yield source


CHAIN_VIEW = (bytes(range(256)) * 1024).ljust(MIB, b"\0")


# -- the command


def one_layer(fd: int) -> Source:
    return Source((Layer("/src", "raw", fd, is_block=False, virtual_size=512, identity=""),))


@pytest.mark.parametrize(
    ("changes", "direct", "words"),
    [
        ({}, True, "-t none -T none"),
        ({}, False, "-t none"),
        ({"zeroed": True}, True, "-t none -T none --target-is-zero"),
        ({"bandwidth": 524288000}, True, "-t none -T none -r 524288000"),
        ({"zeroed": True, "bandwidth": 1}, False, "-t none --target-is-zero -r 1"),
    ],
    ids=str,
)
def test_command(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], direct: bool, words: str) -> None:
    monkeypatch.setattr(Source, "allows_direct_io", direct)
    monkeypatch.setattr(os, "getpriority", lambda _which, _who: -20)
    target = Target(**{**vars(Target("/dev/vg/lv", DM_UUID, False, None, 10)), **changes})
    assert copy._command(one_layer(7), target, 9) == [
        *f"setpriv --pdeathsig KILL -- {LIMITS} nice -n 30 qemu-img convert -p -n -W -m 8 {words}".split(),
        "--target-image-opts",
        'json:{"driver": "raw", "file": {"driver": "file", "filename": "/proc/self/fd/7"}}',
        "driver=raw,file.driver=host_device,file.filename=/proc/self/fd/9",
    ]


@pytest.mark.parametrize("nice", [0, 10, 19])
def test_niceness_is_absolute(device: Device, tmp_path: Path, nice: int) -> None:
    if nice < os.getpriority(os.PRIO_PROCESS, 0):
        nice = os.getpriority(os.PRIO_PROCESS, 0)
    with raw_source(tmp_path, OLD * 512) as source:
        command = copy._command(source, device.target(nice=nice), 9)
    tool = command[command.index("nice") : command.index("qemu-img")]
    assert run.run([*tool, "nice"]) == f"{nice}\n"


# -- a copy


def test_a_chain_is_copied_with_zeros_behind_it(device: Device, chain: Source) -> None:
    fractions: list[float] = []
    copy.copy(chain, device.target(), lambda fraction, _written: fractions.append(fraction))
    assert device.path.read_bytes() == CHAIN_VIEW.ljust(4 * MIB, b"\0")
    assert device.events == [f"zero {MIB} {3 * MIB}", "convert", "fsync"]
    assert fractions[0] == 0.0
    assert device.has_ended


def test_a_thin_disk_is_zero_already(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chain: Source) -> None:
    device = Device(monkeypatch, tmp_path / "thin", 4 * MIB, b"\0")
    copy.copy(chain, device.target(zeroed=True), silent)
    assert device.path.read_bytes() == CHAIN_VIEW.ljust(4 * MIB, b"\0")
    assert device.events == ["convert", "fsync"]


@pytest.mark.parametrize("size", [1, 512, MIB - 1, 4 * MIB - 100])
def test_a_raw_volume_that_is_not_whole(device: Device, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    with raw_source(tmp_path, content) as source:
        copy.copy(source, device.target(), silent)
    assert device.path.read_bytes() == content.ljust(4 * MIB, b"\0")


def test_a_disk_without_a_tail(device: Device, tmp_path: Path) -> None:
    content = os.urandom(4 * MIB)
    with raw_source(tmp_path, content) as source:
        copy.copy(source, device.target(), silent)
    assert device.path.read_bytes() == content
    assert device.events == ["convert", "fsync"]


def test_a_long_tail_is_zeroed_in_steps(
    monkeypatch: pytest.MonkeyPatch, device: Device, chain: Source
) -> None:
    monkeypatch.setattr(copy, "_ZERO_CHUNK", 2 * MIB)
    fractions: list[float] = []
    copy.copy(chain, device.target(), lambda fraction, _written: fractions.append(fraction))
    assert device.events[:2] == [f"zero {MIB} {2 * MIB}", f"zero {3 * MIB} {MIB}"]
    assert fractions[:2] == [0.0, 0.0]


# -- failures


def test_a_target_that_is_too_small(device: Device, tmp_path: Path) -> None:
    with raw_source(tmp_path, OLD * 5 * MIB) as source, pytest.raises(CopyFailed) as caught:
        copy.copy(source, device.target(), silent)
    assert str(caught.value).startswith(
        f"copying {tmp_path}/{LEAF} to {device.path} failed: "
        "qemu-img: output file is smaller than input file : look at the source storage"
    )
    assert "fsync" not in device.events


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo first >&2; echo '  why ' >&2; echo >&2; exit 1", "why :"),
        ("exit 1", "qemu-img ended with 1 :"),
        ("kill -SEGV $$", "qemu-img ended with -11 :"),
        (r"printf 'a\033[31mb\n' >&2; exit 1", r"a\x1b[31mb :"),
    ],
)
def test_a_tool_that_fails(device: Device, chain: Source, script: str, problem: str) -> None:
    device.tool = ["sh", "-c", script]
    with pytest.raises(CopyFailed) as caught:
        copy.copy(chain, device.target(), silent)
    message = str(caught.value)
    assert f"failed: {problem}" in message
    assert message.isprintable()
    assert "fsync" not in device.events


class GivenUp(Exception):
    pass


def give_up(_fraction: float, _written: int) -> None:
    raise GivenUp


def test_who_hears_of_progress_can_end_the_copy(device: Device, tmp_path: Path) -> None:
    with raw_source(tmp_path, OLD * 4 * MIB) as source, pytest.raises(GivenUp):
        copy.copy(source, device.target(bandwidth=1000), give_up)
    assert device.events == ["convert"]
    assert device.has_ended


def test_giving_up_while_the_tail_is_zeroed(device: Device, chain: Source) -> None:
    with pytest.raises(GivenUp):
        copy.copy(chain, device.target(), give_up)
    assert device.events == [f"zero {MIB} {3 * MIB}"]


def test_the_tool_dies_with_us(device: Device, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    def tell(_fraction: float, _written: int) -> None:
        (process,) = device.processes
        (tmp_path / "new").write_text(str(process.pid))
        os.replace(tmp_path / "new", pid_file)

    with raw_source(tmp_path, OLD * 4 * MIB) as source:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                copy.copy(source, device.target(bandwidth=1000), tell)
            os._exit(0)
        wait_until(pid_file.exists)
        tool = pid_file.read_text()
        wait_until(lambda: b"qemu-img" in Path(f"/proc/{tool}/cmdline").read_bytes()[:9])
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    wait_until(lambda: not is_running(tool))


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_descriptor_is_left(device: Device, chain: Source) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    copy.copy(chain, device.target(), silent)
    with contextlib.suppress(GivenUp):
        copy.copy(chain, device.target(), give_up)
    assert sorted(os.listdir("/proc/self/fd")) == before


# -- the device


def test_a_node_that_never_comes(device: Device, chain: Source) -> None:
    with pytest.raises(DeviceNotReady, match="No such file or directory : check that the udev rule"):
        copy.copy(chain, device.target(path="/nonexistent/lv"), silent)


def test_a_node_that_comes_late(device: Device, chain: Source) -> None:
    late = device.path.with_name("late")
    child = os.fork()
    if child == 0:
        time.sleep(0.05)
        os.link(device.path, late)
        os._exit(0)
    copy.copy(chain, device.target(path=str(late)), silent)
    os.waitpid(child, 0)
    assert late.read_bytes().startswith(CHAIN_VIEW)


def test_a_node_of_another_device(device: Device, chain: Source) -> None:
    with pytest.raises(DeviceNotReady, match="another device than the helper made"):
        copy.copy(chain, device.target(dm_uuid="LVM-other"), silent)
    assert device.path.read_bytes() == OLD * 4 * MIB


def test_a_node_of_no_device(monkeypatch: pytest.MonkeyPatch, device: Device, chain: Source) -> None:
    monkeypatch.undo()
    with pytest.raises(CopyFailed, match="No such file or directory : look at"):
        copy.copy(chain, device.target(), silent)
    assert device.path.read_bytes() == OLD * 4 * MIB


def test_a_device_that_cannot_be_synced(
    monkeypatch: pytest.MonkeyPatch, device: Device, chain: Source
) -> None:
    def fail(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CopyFailed, match="failed: Input/output error"):
        copy.copy(chain, device.target(), silent)


# -- progress


def heard(device: Device, chain: Source, script: str) -> list[float]:
    device.tool = ["sh", "-c", script]
    fractions: list[float] = []
    copy.copy(chain, device.target(zeroed=True), lambda fraction, _written: fractions.append(fraction))
    return fractions


def test_progress_of_the_real_tool(monkeypatch: pytest.MonkeyPatch, device: Device, chain: Source) -> None:
    monkeypatch.setattr(copy, "HEARTBEAT", 0)
    (device.path.parent / "progress").write_bytes(PROGRESS)
    assert heard(device, chain, f"cat {device.path.parent}/progress")[-1] == 1.0


def test_progress_is_told_as_it_comes(monkeypatch: pytest.MonkeyPatch, device: Device, chain: Source) -> None:
    monkeypatch.setattr(copy, "HEARTBEAT", 0.02)
    fractions = heard(
        device,
        chain,
        r"""printf '    (25.00/100%%)\r'; sleep .1; printf 'noise (30.0'; sleep .1
            printf '0/100%%)\r (50.50/100%%)\r    (50.75/100%%)'; sleep .1""",
    )
    assert sorted(set(fractions)) == [0.0, 0.25, 0.5075]
    assert fractions == sorted(fractions)
    assert len(fractions) > 5  # it beats also where nothing new is told


def test_progress_is_not_told_too_often(device: Device, chain: Source) -> None:
    many = "i=0; while [ $i -lt 300 ]; do printf '(1.00/100%%)\\r'; i=$((i+1)); done"
    assert heard(device, chain, many) == [0.0, 0.01]  # at the start, and when the tool has ended
