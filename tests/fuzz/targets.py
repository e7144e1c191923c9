"""The parsers, each as a function of bytes; `judge` says what came of one input."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from localdisk import config, counters, libvirt, lock, run
from localdisk.clock import Moment
from localdisk.errors import Error
from localdisk.helper.session import Session
from localdisk.hook import sources, template_source
from localdisk.hook.qcow2 import Header
from localdisk.status import output, snapshot
from localdisk.vdsm import disk_json, disks, domain_xml
from localdisk.vdsm.disks import Disk
from localdisk.volumes import progress, template, verdict
from localdisk.volumes.local_disk import LocalDisk, local_disks
from localdisk.volumes.lvm import VolumeGroup
from tests.fakes import IMAGE, OTHER_VM, OTHER_VOLUME, REPORTS, VM, VOLUME, FakeHost, tags

ROOT = Path(__file__).parents[2]
DEFINITIONS = ROOT / "tests" / "data" / "definition"
LINES, LINE = 120, 2000  # of one refusal, and characters of one line
PATH = f"/rhev/images/{IMAGE}/{VOLUME}"


@dataclass(frozen=True)
class Target:
    name: str
    read: Callable[[bytes], object]  # False: refused without an error raised
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()  # that mean something to it


@dataclass(frozen=True)
class Outcome:
    refused: bool
    crash: str  # "" where it was taken or refused as it should be
    seconds: float


def judge(target: Target, data: bytes) -> Outcome:
    """Give it to the parser."""
    began, refused, crash = time.perf_counter(), False, ""
    try:
        refused = target.read(data) is False
    except Error as error:
        refused, crash = True, _wrong(str(error))
    except Exception as error:  # noqa: BLE001 (that is what we look for)
        crash = f"{type(error).__name__}: {error}"
    return Outcome(refused, crash, time.perf_counter() - began)


def _wrong(message: str) -> str:
    lines = message.splitlines()
    if not lines or " : " not in lines[-1]:
        return f"it does not say what to do: {message[:200]!r}"
    if len(lines) > LINES or max(map(len, lines)) > LINE or not all(map(str.isprintable, lines)):
        return f"it is not plain: {message[:200]!r}"
    return ""


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


# -- what vdsm hands over


def _disk_json(data: bytes) -> None:
    disk_json.read_disk(_text(data))
    disk_json.localize_disk(_text(data), f"/dev/ovirt-local/{VOLUME}")


def _domain(data: bytes) -> None:
    _, disks = domain_xml.read_domain(_text(data))
    for disk in disks:
        domain_xml.localize_domain(_text(data), {disk.name: f"/dev/ovirt-local/{VOLUME}"})


def _file(data: bytes) -> int:
    fd = os.memfd_create("fuzz")
    os.pwrite(fd, data, 0)
    return fd


def _qcow2(data: bytes) -> None:
    """The header, then a chain whose leaf it is and whose parent is the same bytes."""
    with contextlib.suppress(ValueError):
        Header.parse(data)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        leaf, parent = Path(directory) / VOLUME, Path(directory) / OTHER_VOLUME
        leaf.write_bytes(data)
        parent.write_bytes(data)
        volumes = tuple(disks.Volume(path.name, str(path)) for path in (leaf, parent))
        with sources.opened(_disk(str(leaf), volumes)) as source:
            assert json.loads(source.filename.partition(":")[2])
            assert 0 < source.virtual_size <= 64 << 40


def _disk(path: str, volumes: tuple[disks.Volume, ...]) -> Disk:
    return Disk("vda", "disk", path, "cow", "file", IMAGE, VOLUME, "none", volumes)


def _measure(data: bytes) -> None:
    source = sources.Source((sources.Layer(PATH, "raw", 0, False, 1 << 30, ""),))
    with mock.patch.object(run, "run", return_value=_text(data)):
        assert 0 <= source.writes(65536) <= 1 << 30


def _metadata(data: bytes) -> bool:
    """What lies beside a volume; other strings and other keys than vdsm's are nobody's."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory) / IMAGE / VOLUME
        path.parent.mkdir()
        path.write_bytes(b"x" * 512)
        path.with_suffix(".meta").write_bytes(data)
        told = template_source.read_metadata(str(path))
        with sources.opened_alone(str(path), "raw") as source:
            is_template = template_source.is_template(source.base)
    assert all(isinstance(value, str) and "\n" not in value for value in told.values())
    if is_template:  # it has but one image, which it must name
        assert (told["IMAGE"], told["VOLTYPE"], told["LEGALITY"]) == (IMAGE, "SHARED", "LEGAL")
    return bool(told)


def _map(data: bytes) -> None:
    extents = (sources._held(line, PATH) for line in data.splitlines(keepends=True))
    assert sources.count_blocks(extents, 64 << 10) >= 0


# -- what the hook asks of the helper


class _Helper:
    """One helper with a claimed disk; requests come one after the other, as lines."""

    def __init__(self, text: bytes = b"") -> None:
        self._config = config.parse(text, "F")
        self._directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.host = FakeHost()
        self.host.add(VOLUME, tags("STOPPED_5"), 64 << 20)
        self.host.add(OTHER_VOLUME, tags(vm=OTHER_VM), 64 << 20)

    def read(self, data: bytes) -> bool:
        """Whether any request was carried out."""
        with pytest.MonkeyPatch.context() as patch:
            self.host.install(patch, self._directory)
            return self._read(data)

    def _read(self, data: bytes) -> bool:
        session, done = Session(self._config, lambda _: None), 0
        for line in data.split(b"\n")[:8]:
            answer = self.host.serve(session, line[: 64 << 10])
            assert json.dumps(answer)
            done += "error" not in answer
            if "error" in answer:
                assert not _wrong(str(answer["error"])), answer
        session.end()
        assert self.host.volumes[OTHER_VOLUME].lv_tags == tags(vm=OTHER_VM)
        assert "pool0" in self.host.volumes
        for name, volume in self.host.volumes.items():
            assert "UPDATING" not in volume.lv_tags, f"{name} was left unfinished"
        for found in template.templates(VolumeGroup.from_report(self.host.report())):
            assert (found.lv.lv_permissions, found.is_open) == ("read-only", False)
        return done > 0


def _requests(data: bytes) -> bool:
    global _helper
    if _helper is None:
        _helper = _Helper()
    return _helper.read(data)


_helper: _Helper | None = None


def _base_requests(data: bytes) -> bool:
    """Where templates are cached."""
    global _caching
    if _caching is None:
        _caching = _Helper(b"cache: {templates: on}")
    return _caching.read(data)


_caching: _Helper | None = None


# -- what tools print


def _report(data: bytes) -> None:
    vg = VolumeGroup.from_report(_text(data))
    for disk in local_disks(vg):
        policy = config.parse(b"", "F").others.policy
        assert verdict.decide(disk, verdict.Witnesses(False, False, True), policy, Moment(1e9)).reason
    for found in template.templates(vg):
        assert verdict.decide_template(found, False, True, False, 5, 1e9).reason
        assert not LocalDisk.from_lv(found.lv)
    template.too_many(vg, config.parse(b"", "F").cache)
    with ExitStack() as stack:
        for owner, name, value in (
            (VolumeGroup, "read", vg),
            (libvirt, "ask_names", libvirt.Question(None, None)),
            (os, "geteuid", 0),
        ):
            stack.enter_context(mock.patch.object(owner, name, return_value=value))
        taken = snapshot.take(config.parse(b"", "F"))
    output.as_table(taken)
    output.as_json(taken)


def _names(data: bytes) -> None:
    names, running = libvirt.read_names(_text(data))
    assert all(len(each) == 36 for each in (*names, *running))


def _xmls(data: bytes) -> None:
    question = mock.Mock()
    question.text = lambda: _text(data)
    with mock.patch.object(libvirt, "_ask", return_value=question):
        for xml in libvirt.xmls([VM]):
            domain_xml.read_running(xml)


def _record(data: bytes) -> None:
    found = progress.parse(_text(data))
    if found:
        assert 0 <= found.fraction <= 1
        progress.pace(found.rate, found.seconds_left)


def _counters(data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory, mock.patch.object(lock, "RUN", directory):
        (Path(directory) / "counters").write_bytes(data)
        counters.read()
        counters.copied(1, 1.0)


# -- all


def _files(*patterns: str) -> tuple[bytes, ...]:
    return tuple(path.read_bytes() for pattern in patterns for path in sorted(DEFINITIONS.glob(pattern)))


def _elements() -> tuple[bytes, ...]:
    texts = (text[text.index(b"<disk") :] for text in _files("*.in.xml"))
    return tuple(text[: text.index(b"</disk>") + 7] for text in texts)


def _header() -> bytes:
    """A qcow2 image of version 3 on a raw parent, as `qemu-img create` lays it out."""
    name, format_name = OTHER_VOLUME.encode(), b"qcow2"
    extension = b"\xe2\x79\x2a\xca" + len(format_name).to_bytes(4, "big") + format_name.ljust(8, b"\0")
    head = b"QFI\xfb" + (3).to_bytes(4, "big") + (112 + len(extension) + 8).to_bytes(8, "big")
    head += len(name).to_bytes(4, "big") + (16).to_bytes(4, "big") + (1 << 30).to_bytes(8, "big")
    head += bytes(4) + (1).to_bytes(4, "big") + (0x30000).to_bytes(8, "big") + (0x10000).to_bytes(8, "big")
    head += (1).to_bytes(4, "big") + bytes(4) + bytes(8) + bytes(24) + (4).to_bytes(4, "big")
    head += (112).to_bytes(4, "big") + bytes(8)
    return head + extension + bytes(8) + name


CLAIM = {"verb": "claim", "vm": VM, "property": "lvm", "image": IMAGE, "volume": VOLUME, "seen": 0}
PREPARE = {
    "verb": "prepare",
    "size": 64 << 20,
    "fingerprint": "0123456789abcdef" * 2,
    "writes": 4096,
    "base": None,
}
REQUESTS = (
    [CLAIM, PREPARE, {"verb": "progress", "done": 1, "written": 1}, {"verb": "commit"}],
    [
        {
            "verb": "look",
            "vm": VM,
            "property": "on",
            "disks": [{"image": IMAGE, "volume": VOLUME}],
        }
    ],
    [
        {"verb": "drifted", "vm": VM, "property": "lvm", "disks": [{"image": IMAGE, "path": "/x"}]},
        {"verb": "release", "vm": VM, "property": "lvm"},
    ],
    [{**CLAIM, "volume": OTHER_VOLUME}, PREPARE],
)
BASE = {"volume": VOLUME, "domain": "", "fingerprint": "fedcba9876543210" * 2, "size": 4 << 20}
FROM_BASE = {**PREPARE, "base": BASE}
FILL = ({"verb": "fill", "writes": 4096}, {"verb": "progress", "done": 1, "written": 1}, {"verb": "commit"})
NEW = {**CLAIM, "volume": "33333333-3333-4333-8333-333333333333"}
BASE_REQUESTS = (
    [NEW, FROM_BASE, *FILL, FROM_BASE, {"verb": "commit"}],
    [{**NEW, "property": "lvmthin"}, FROM_BASE, *FILL, FROM_BASE, {"verb": "commit"}],
    [{"verb": "prefetch", "backend": "lvm", "base": BASE}, *FILL],
    [{"verb": "prefetch", "backend": "lvmthin", "base": {**BASE, "domain": IMAGE}}],
    [NEW, {**PREPARE, "base": {**BASE, "domain": IMAGE}}, PREPARE],
)
METADATA = (
    b"CAP=1073741824\nCTIME=1700000000\nDESCRIPTION={}\nDISKTYPE=DATA\nFORMAT=COW\nGEN=0\n"
    + f"IMAGE={IMAGE}\nLEGALITY=LEGAL\nTYPE=SPARSE\nVOLTYPE=SHARED\nEOF\n".encode()
)
MAPPED = (
    b'[{ "start": 0, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, '
    b'"offset": 327680},\n{ "start": 65536, "length": 983040, "depth": 1, "present": false, "zero": true, '
    b'"data": false}]\n'
)
MEASURED = {"required": 5 << 20, "fully-allocated": 1 << 30}

TARGETS = (
    Target(
        "configuration",
        lambda data: config.parse(data, "F"),
        (
            *((ROOT / "examples" / name).read_bytes() for name in ("full.yaml", "minimal.yaml")),
            f"vms: {{{VM}: {{disks: [{IMAGE}]}}}}".encode(),
            b"margins: {reserve: 5%}\n",
        ),
        (b"&a", b"*a", b"<<: ", b"!!python/object:os.system", b"---\n", b"10GiB", b"5%", b"7d", b"\t"),
    ),
    Target("disk JSON", _disk_json, _files("*.in.json"), (b'"volumeChain"', b"1e999", b"NaN", b"\\ud800")),
    Target("domain XML", _domain, _files("*.in.xml"), (b"<!DOCTYPE x>", b"&x;", b"<!--", b"<![CDATA[")),
    Target("disk element", lambda data: domain_xml.read_disk_element(_text(data)), _elements()),
    Target("qcow2 header", _qcow2, (_header(), _header()[:104], b"QFI\xfb"), (b"\xff" * 8, bytes(8))),
    Target("qemu-img measure", _measure, (json.dumps(MEASURED).encode(),), (b"-1", b"1e9", b"null")),
    Target("qemu-img map", _map, (MAPPED,), (b"-1", b"1e9", b"null", b"true", b"[[", b"},\n{")),
    Target(
        "volume metadata",
        _metadata,
        (METADATA, METADATA.replace(b"SHARED", b"LEAF")),
        (
            b"EOF\n",
            b"VOLTYPE=SHARED\n",
            b"LEGALITY=LEGAL\n",
            b"=",
            b"\x85",
            "\u2028".encode(),
            OTHER_VM.encode(),
        ),
    ),
    Target(
        "base requests",
        _base_requests,
        tuple("\n".join(map(json.dumps, lines)).encode() for lines in BASE_REQUESTS),
        (VM.encode(), OTHER_VOLUME.encode(), b'"base": null', b'"lvmthin"', b"{}", b"null", b"-1", b"\n"),
    ),
    Target(
        "helper requests",
        _requests,
        tuple("\n".join(map(json.dumps, lines)).encode() for lines in REQUESTS),
        (VM.encode(), OTHER_VM.encode(), OTHER_VOLUME.encode(), b"pool0", b"null", b"true", b"-1", b"\n"),
    ),
    Target(
        "lvm fullreport",
        _report,
        tuple(path.read_bytes() for path in sorted(REPORTS.glob("*.json"))),
        (
            f"localdisk,TEMPLATE_{VOLUME},SOURCE_{'a' * 32},SAMPLE_{'b' * 32},HOLDS_5,USED_5".encode(),
            *(b"TEMPLATE_", b"USED_" + b"9" * 18, b"HOLDS_" + b"9" * 18, b"WRITES_5"),
            b"UPDATING",
            b"STOPPED_9",
            b'"unknown"',
            b"WARNING: x\n",
            b"STOPPED_" + b"9" * 18,
            b"1,5",
        ),
    ),
    Target("virsh list", _names, (f"{VM}\n\n====\n{VM} web\n\n".encode(),), (b"error: x\n", b"====")),
    Target("virsh dumpxml", _xmls, tuple(b"\n" + each for each in _files("*.in.xml")), (b"</domain>\n",)),
    Target("progress record", _record, (progress.Progress(VM, IMAGE, "copying", 1, 2).as_text().encode(),)),
    Target("counters", _counters, (b'{"copies": 1, "failures": {"no_space": 2}}',), (b"Infinity", b"-1")),
)
