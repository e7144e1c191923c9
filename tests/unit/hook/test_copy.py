from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from localdisk import device_mapper, protocol
from localdisk.errors import CopyFailed, DeviceNotReady
from localdisk.hook import copy, sources
from localdisk.hook.sources import Layer, Source
from localdisk.protocol import Target
from localdisk.spawn import Process
from localdisk.vdsm.disks import Disk, Volume
from tests.fakes.device import BASE, DM_UUID, LEAF, OLD, Device, disk, raw_source, silent

MIB = 1 << 20

# Captured: qemu-img 7.2 convert -p -r 16M, and that it pads with spaces and repeats the last.
PROGRESS = (
    b"    (0.00/100%)\r    (25.00/100%)\r    (50.00/100%)\r    (75.00/100%)\r    (100.00/100%)\r"
    b"    (100.00/100%)\r\n"
)


@pytest.fixture(name="device")
def fixture_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    return Device(monkeypatch, tmp_path / "device", 4 * MIB)


@pytest.fixture(name="chain")
def fixture_chain(tmp_path: Path) -> Iterator[Source]:
    """A leaf without data on a raw base of 1 MiB: a byte pattern, then a hole."""
    (tmp_path / BASE).write_bytes(bytes(range(256)) * 1024)
    os.truncate(tmp_path / BASE, MIB)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", BASE, "-F", "raw", str(tmp_path / LEAF)]
    subprocess.run(argv, check=True)
    with sources.opened(disk(tmp_path, "cow")) as source:
        yield source


CHAIN_VIEW = (bytes(range(256)) * 1024).ljust(MIB, b"\0")


# -- the command


def one_layer(fd: int) -> Source:
    return Source((Layer("/src", "raw", fd, is_block=False, virtual_size=512, identity=""),))


def whole(source: Source, target: Target) -> copy._Pass:
    """All of it in one pass."""
    options = ("--target-is-zero",) if target.zeroed else ()
    return copy._Pass(source.filename, source.fds, source.allows_direct_io, options)


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
    target = Target(**{**vars(Target("/dev/vg/lv", DM_UUID, False, None, 10)), **changes})
    assert copy._command(whole(one_layer(7), target), target, 9) == [
        *f"setpriv --pdeathsig KILL -- qemu-img convert -p -n -W -m 8 {words}".split(),
        "--target-image-opts",
        'json:{"driver": "raw", "file": {"driver": "file", "filename": "/proc/self/fd/7"}}',
        "driver=raw,file.driver=host_device,file.filename=/proc/self/fd/9",
    ]


@pytest.mark.parametrize("nice", [0, 10, 19])
def test_niceness_is_absolute(device: Device, tmp_path: Path, nice: int) -> None:
    if nice < os.getpriority(os.PRIO_PROCESS, 0):
        nice = os.getpriority(os.PRIO_PROCESS, 0)
    found = tmp_path / "nice"
    device.tool = ["sh", "-c", f"sleep 0.2; nice >{found}"]
    with raw_source(tmp_path, OLD * 512) as source:
        copy.copy(source, device.target(nice=nice), silent)
    assert found.read_text() == f"{nice}\n"


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


@pytest.mark.parametrize("size", [512, 4608, 8192 - 512])
def test_a_disk_that_ends_inside_a_sector_of_4096_bytes(
    device: Device, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel zeroes whole sectors of the device only."""
    real = device._ioctl

    def whole_sectors(fd: int, request: int, argument: bytes) -> int:
        assert not any(number % 4096 for number in struct.unpack("QQ", argument))
        return real(fd, request, argument)

    monkeypatch.setattr(fcntl, "ioctl", whole_sectors)
    content = os.urandom(size)
    with raw_source(tmp_path, content) as source:
        copy.copy(source, device.target(), silent)
    assert device.path.read_bytes() == content.ljust(4 * MIB, b"\0")
    assert device.events[0] == "fsync", "before qemu-img writes beside the page cache"


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
        ("exit 1", "qemu-img: exit code 1 :"),
        ("kill -SEGV $$", "qemu-img: killed by SIGSEGV :"),
        ("echo 'an assertion' >&2; kill -ABRT $$", "qemu-img: killed by SIGABRT: an assertion :"),
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
    with pytest.raises(DeviceNotReady, match="No such file or directory : check that udev runs"):
        copy.copy(chain, device.target(path="/nonexistent/lv"), silent)


def test_a_node_that_is_not_for_this_user(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DeviceNotReady, match="Permission denied : localdisk install brings back its udev"):
        copy.rehearse(device.target())


def test_a_device_that_is_read_only(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with activation/read_only_volume_list: opened for writing it is, and nothing can be written."""
    monkeypatch.setattr(device_mapper, "is_read_only", lambda path: path == str(device.path))
    with pytest.raises(DeviceNotReady, match="take the volume group out of activation/read_only_volume_list"):
        copy.rehearse(device.target())


def test_a_trial(device: Device) -> None:
    copy.rehearse(device.target())
    assert device.path.read_bytes() == b"localdisk check\n" * 256 + (OLD * 4 * MIB)[4096:]
    assert device.events == ["fsync"]


def test_a_trial_on_a_device_that_fails(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", lambda *_: b"\0" * 4096)
    with pytest.raises(DeviceNotReady, match="does not hold what was written to it : look at the device"):
        copy.rehearse(device.target())
    monkeypatch.setattr(os, "pwrite", lambda *_: os.close(-1))
    with pytest.raises(DeviceNotReady, match="Bad file descriptor : look at the device in the system log"):
        copy.rehearse(device.target())


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


# -- on a local copy of the base

LAYERS = [f"aaaaaaaa-0000-4000-8000-{n:012d}" for n in range(100, 110)]


def qemu_img(*argv: object) -> None:
    subprocess.run(["qemu-img", *map(str, argv)], check=True, capture_output=True)


class Chain:
    """Layers upon a base, as a test makes them; `path` is the leaf's."""

    def __init__(self, directory: Path, base: bytes) -> None:
        self.directory = directory
        self.names = [BASE]
        self.size = len(base)
        (directory / BASE).write_bytes(base)

    @property
    def path(self) -> Path:
        return self.directory / self.names[0]

    def add(self, *commands: str, size: int = 0, options: str = "") -> None:
        """A layer on what there is, with what `qemu-io` writes to it."""
        kind = "raw" if len(self.names) == 1 else "qcow2"
        name, self.size = LAYERS[len(self.names)], size or self.size
        words = ["-o", options] if options else []
        backing = ["-b", self.names[0], "-F", kind]
        qemu_img("create", "-q", "-f", "qcow2", *words, *backing, self.directory / name, self.size)
        self.names.insert(0, name)
        if commands:
            argv = ["qemu-io", "-f", "qcow2", *(w for c in commands for w in ("-c", c)), str(self.path)]
            done = subprocess.run(argv, check=True, capture_output=True, text=True)
            assert "rror" not in done.stdout + done.stderr, done

    @contextlib.contextmanager
    def opened(self) -> Iterator[Source]:
        volumes = tuple(Volume(name, str(self.directory / name)) for name in reversed(self.names))
        kind = "cow" if len(self.names) > 1 else "raw"
        with sources.opened(
            Disk("vda", "disk", str(self.path), kind, "file", BASE, self.names[0], "none", volumes)
        ) as source:
            yield source

    def compare(self, device: Path) -> None:
        """The guest's view, zeros behind it."""
        kind = "qcow2" if len(self.names) > 1 else "raw"
        with device.open("rb") as file:
            file.seek(self.size)
            assert not file.read().strip(b"\0")
        # what is behind the end of one is taken for zeros
        qemu_img("compare", "-f", kind, "-F", "raw", self.path, device)


def base_device(device: Device, content: bytes, tail: bytes = b"\0") -> protocol.Device:
    """The template LV: whole extents, of which the base takes the first."""
    path = device.path.with_name("template")
    path.write_bytes(content + tail * (-len(content) % (1 << 20)))
    return protocol.Device(str(path), DM_UUID)


def apply_and_compare(device: Device, chain: Chain, base: bytes) -> None:
    """Onto a clone of the template LV; and in one pass, with the template LV in the place of the base."""
    device.path.write_bytes(base.ljust(4 * MIB, b"\0"))
    with chain.opened() as source:
        copy.apply(source, device.target(zeroed=True), silent)
        chain.compare(device.path)
        applied = device.path.read_bytes()
        device.path.write_bytes(OLD * 4 * MIB)
        copy.copy_on(source, base_device(device, base), device.target(), silent)
    assert device.path.read_bytes() == applied
    assert device.has_ended


EVERYTHING = bytes(range(256)) * 4096  # 1 MiB
ON_A_BASE: dict[str, list[tuple[tuple[str, ...], dict[str, Any]]]] = {
    "no layer above": [],
    "a layer without data": [((), {})],
    "data": [(("write -P 7 64k 200k",), {})],
    "a part of a cluster": [(("write -P 7 4k 512",), {})],
    "explicit zeros": [(("write -z 64k 128k",), {})],
    "zeros that free their cluster": [(("write -z -u 64k 128k",), {})],
    "discarded data": [(("write -P 7 0 192k", "discard 64k 64k"), {})],
    "discarded where there was none": [(("discard 64k 64k",), {})],
    "zeros as data": [(("write -P 0 0 256k",), {})],
    "all of it zeros as data": [(("write -P 0 0 1M",), {})],
    "all of it explicit zeros": [(("write -z 0 1M",), {})],
    "several layers": [
        (("write -P 7 0 256k",), {}),
        (("write -z 64k 64k", "write -P 0 128k 64k"), {}),
        (("write -P 9 96k 64k", "discard 0 64k"), {}),
    ],
    "zeros and data again": [(("write -z 0 1M",), {}), (("write -P 7 64k 64k",), {})],
    "a larger leaf": [(("write -P 7 512k 64k",), {"size": 2 * MIB})],
    "a larger leaf with data behind": [(("write -P 7 1536k 64k",), {"size": 2 * MIB})],
    "growing twice": [
        (("write -P 7 1M 4608", "write -P 8 960k 66k"), {"size": MIB + 4608}),
        (("write -z 1M 64k",), {"size": 3 * MIB}),
    ],
    "compressed": [(("write -c -P 7 64k 64k", "write -c -P 8 256k 128k"), {})],
    "compressed with zstd": [(("write -c -P 7 64k 64k",), {"options": "compression_type=zstd"})],
    "subclusters": [
        (
            ("write -P 7 4k 4k", "write -z 256k 4k", "write -P 8 300k 200k", "discard 304k 4k"),
            {"options": "extended_l2=on,cluster_size=128k"},
        )
    ],
    "small clusters": [(("write -P 7 512 512", "write -z 4k 512"), {"options": "cluster_size=512"})],
    "large clusters": [(("write -P 7 4k 4k", "write -z 512k 4k"), {"options": "cluster_size=2M"})],
    "version 2": [(("write -P 7 0 64k", "write -z 64k 64k"), {"options": "compat=0.10"})],
}


def chain_of(directory: Path, base: bytes, layers: list[tuple[tuple[str, ...], dict[str, Any]]]) -> Chain:
    chain = Chain(directory, base)
    for commands, how in layers:
        chain.add(*commands, **how)
    return chain


@pytest.mark.parametrize("kind", ON_A_BASE)
def test_layers_of_every_kind(device: Device, tmp_path: Path, kind: str) -> None:
    chain = chain_of(tmp_path, EVERYTHING, ON_A_BASE[kind])
    apply_and_compare(device, chain, EVERYTHING)


def test_only_what_the_layers_hold_is_written(device: Device, tmp_path: Path) -> None:
    """Otherwise the clone would share nothing with its template: other blocks are not written."""
    chain = chain_of(tmp_path, EVERYTHING, [(("write -P 7 64k 64k",), {}), (("write -z 256k 64k",), {})])
    device.path.write_bytes(b"\x5a" * 4 * MIB)
    with chain.opened() as source:
        copy.apply(source, device.target(zeroed=True), silent)
    expected = bytearray(b"\x5a" * 4 * MIB)
    expected[64 << 10 : 128 << 10] = b"\7" * (64 << 10)
    expected[256 << 10 : 320 << 10] = bytes(64 << 10)
    assert device.path.read_bytes() == expected
    assert device.events == ["convert", "convert", "fsync"]


def test_without_a_layer_above_nothing_is_read(device: Device, tmp_path: Path) -> None:
    chain = Chain(tmp_path, EVERYTHING)
    with chain.opened() as source:
        copy.apply(source, device.target(zeroed=True), silent)
    assert device.events == ["fsync"]
    assert device.path.read_bytes() == OLD * 4 * MIB


def test_the_shared_base_is_not_read(device: Device, tmp_path: Path) -> None:
    """That is what the cache is for: it could be gone."""
    chain = chain_of(tmp_path, EVERYTHING, [(("write -P 7 64k 64k",), {})])
    expected = bytearray(EVERYTHING)
    expected[64 << 10 : 128 << 10] = b"\7" * (64 << 10)
    with chain.opened() as source:
        (tmp_path / BASE).write_bytes(b"other content" * 80659)
        for number in range(2):
            device.path.write_bytes(EVERYTHING.ljust(4 * MIB, b"\0"))
            if number:
                copy.copy_on(source, base_device(device, EVERYTHING), device.target(), silent)
            else:
                copy.apply(source, device.target(zeroed=True), silent)
            assert device.path.read_bytes() == expected.ljust(4 * MIB, b"\0")


def test_what_lies_behind_the_base_in_its_device_is_not_its(device: Device, tmp_path: Path) -> None:
    """A larger leaf sees zeros there."""
    content = EVERYTHING[: MIB - 512]
    chain = chain_of(tmp_path, content, [((), {"size": 2 * MIB})])
    with chain.opened() as source:
        copy.copy_on(source, base_device(device, content, tail=b"?"), device.target(), silent)
    assert device.path.read_bytes() == content.ljust(4 * MIB, b"\0")
    assert device.events == [f"zero {2 * MIB} {2 * MIB}", "convert", "fsync"]


def test_progress_of_several_passes_only_rises(device: Device, tmp_path: Path) -> None:
    chain = chain_of(tmp_path, EVERYTHING, [((f"write -P {n} 0 1M",), {}) for n in (7, 8, 9)])
    told: list[tuple[float, int]] = []
    with chain.opened() as source:
        copy.apply(source, device.target(zeroed=True), lambda *what: told.append(what))
    assert told == sorted(told)
    assert told[0][0] == 0.0
    assert told[-1][0] == 1.0


@pytest.mark.parametrize("at", [0, 1])
def test_a_pass_that_fails_ends_the_copy(device: Device, tmp_path: Path, at: int) -> None:
    chain = chain_of(tmp_path, EVERYTHING, [(("write -P 7 0 1M",), {}), (("write -P 8 0 1M",), {})])
    start = device._start

    def start_one(
        argv: Sequence[str], pass_fds: Iterable[int], limits: Mapping[str, int] | None = None
    ) -> Process:
        fails = len(device.processes) == at
        return start(["sh", "-c", "echo oops >&2; exit 1"] if fails else argv, pass_fds, limits)

    device._start = start_one
    with chain.opened() as source, pytest.raises(CopyFailed, match="oops"):
        copy.apply(source, device.target(zeroed=True), silent)
    assert device.events == ["convert"] * (at + 1)
    assert device.has_ended


def test_a_base_that_is_another_device(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = chain_of(tmp_path, EVERYTHING, [((), {})])
    with chain.opened() as source:
        base = base_device(device, EVERYTHING)
        other = protocol.Device(base.path, "LVM-other")
        with pytest.raises(DeviceNotReady, match="another device than the helper made"):
            copy.copy_on(source, other, device.target(), silent)
        os.unlink(base.path)
        with pytest.raises(DeviceNotReady, match="No such file"):
            copy.copy_on(source, base, device.target(), silent)
    assert device.events == []


def test_no_descriptor_is_left_of_the_passes(device: Device, tmp_path: Path) -> None:
    chain = chain_of(tmp_path, EVERYTHING, [(("write -P 7 0 64k",), {}), ((), {})])
    before = sorted(os.listdir("/proc/self/fd"))
    with chain.opened() as source:
        copy.apply(source, device.target(zeroed=True), silent)
        copy.copy_on(source, base_device(device, EVERYTHING), device.target(), silent)
    assert sorted(os.listdir("/proc/self/fd")) == before


def random_chain(directory: Path, seed: int) -> tuple[Chain, bytes]:
    rng = random.Random(seed)
    size = rng.choice((MIB, MIB - 512, 700 * 1024, 4096, 192 * 1024 + 512))
    base = b"".join(rng.choice((bytes(4096), rng.randbytes(4096))) for _ in range(-(-size // 4096)))[:size]
    chain = Chain(directory, base)
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        kind = rng.choice(("", "", "cluster_size=4k", "cluster_size=512k", "compat=0.10", SUBCLUSTERS))
        new_size = chain.size + rng.choice((0, 0, 512, 65536, MIB // 2))
        chain.add(
            *(some_command(rng, new_size) for _ in range(rng.randrange(6))), size=new_size, options=kind
        )
    return chain, base


SUBCLUSTERS = "extended_l2=on,cluster_size=64k"


def some_command(rng: random.Random, size: int) -> str:
    """Any change of what is in `size` bytes, which may be a part of a cluster."""
    unit = rng.choice((512, 4096, 65536))
    start = rng.randrange(size) // unit * unit
    length = min(rng.randrange(1, 6) * unit, size - start)
    verbs = (f"write -P {rng.randrange(1, 256)}", "write -P 0", "write -z", "write -z -u", "discard")
    return f"{rng.choice(verbs)} {start} {length}"


@pytest.fixture(name="in_memory")
def fixture_in_memory() -> Iterator[Path]:
    """A directory where nothing waits for a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.mark.parametrize("seed", range(int(os.environ.get("LOCALDISK_CHAINS", "8"))))
def test_random_chains(monkeypatch: pytest.MonkeyPatch, in_memory: Path, seed: int) -> None:
    device = Device(monkeypatch, in_memory / "device", 4 * MIB)
    chain, base = random_chain(in_memory, seed)
    with chain.opened() as source:
        assert source.grows
        assert source.base.virtual_size == -(-len(base) // 512) * 512
    apply_and_compare(device, chain, base)
