"""The lines between hook and helper: what is written is read, and nothing else is."""

from __future__ import annotations

import json

import pytest

from localdisk import kept, protocol
from localdisk.errors import BadRequest
from localdisk.frozen import names
from localdisk.protocol import (
    Base,
    Claim,
    Claimed,
    Commit,
    Device,
    DiskIds,
    Done,
    Drifted,
    Fetched,
    Fill,
    How,
    Look,
    Looked,
    Looks,
    Prefetch,
    Prepare,
    Prepared,
    Progress,
    RanFrom,
    Stale,
    Target,
)
from tests.fakes import FINGERPRINT, IMAGE, OTHER_IMAGE, VM, VOLUME

BASE = Base(VOLUME, "", FINGERPRINT, 512)
TARGET = Target("/dev/v/l", "LVM-x", True, None, 10)


@pytest.mark.parametrize(
    "request_",
    [
        Look(VM, "lvm", (DiskIds(IMAGE, VOLUME),)),
        Look(VM, "lvm", ()),
        Claim(VM, "lvmthin", IMAGE, VOLUME, seen_at=1),
        Prepare(512, FINGERPRINT, 0, None),
        Prepare(512, FINGERPRINT, 5, Base(VOLUME, IMAGE, FINGERPRINT, 512)),
        Prefetch("lvm", BASE),
        Fill(7),
        Progress(1, 2),
        Commit(),
        protocol.Cancel(VM, "on"),
        Drifted(VM, "lvm", (RanFrom(IMAGE, "/any path"),)),
        protocol.Release(VM, "lvm"),
        Stale(VM, (kept.EVERY,)),
        Stale(VM, (IMAGE, OTHER_IMAGE)),
    ],
    ids=lambda request: type(request).__name__,
)
def test_a_request_that_is_written_is_read(request_: object) -> None:
    assert protocol.read_request(protocol.write_request(request_)) == request_


@pytest.mark.parametrize(
    "answer",
    [
        Done(),
        Looks((Looked(True, False, False, "absent", "/dev/v/l"),)),
        Claimed(stays=False, path="", chunk=65536, is_cached=False),
        Prepared(How.MISSING),
        Prepared(How.COPY, "/dev/v/l", TARGET),
        Prepared(How.ON_BASE, "/dev/v/l", TARGET, Device("/dev/v/t", "LVM-t")),
        Fetched(is_ready=True, chunk=0),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_an_answer_that_is_written_is_read(answer: object) -> None:
    line = json.dumps(protocol.write_answer(answer))
    assert protocol.read_answer(type(answer), json.loads(line)) == answer


@pytest.mark.parametrize("kind", protocol.REQUESTS)
def test_a_field_less_or_more_is_refused(kind: type) -> None:
    fields = {protocol.WIRE.get(name, name): None for name in names(kind)}
    more = {"verb": kind.__name__.lower(), **fields, "more": 1}
    with pytest.raises(BadRequest, match="its verb or its fields are not known"):
        protocol.read_request(json.dumps(more).encode())
    for name in fields:
        less = {key: value for key, value in more.items() if key not in ("more", name)}
        with pytest.raises(BadRequest, match="its verb or its fields are not known"):
            protocol.read_request(json.dumps(less).encode())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vm": "x"}, "vm is no canonical UUID"),
        ({"vm": VM.upper()}, "vm is no canonical UUID"),
        ({"vm": [VM]}, "vm is no canonical UUID"),
        ({"property": "off"}, "the property is not known"),
        ({"property": {}}, "the property is not known"),
        ({"disks": "x"}, "disks is no list of at most 256"),
        ({"disks": [{}] * 257}, "disks is no list of at most 256"),
        ({"disks": [5]}, "a disk is not {image, volume}"),
        ({"disks": [{"image": IMAGE}]}, "a disk is not {image, volume}"),
        ({"disks": [{"image": IMAGE, "volume": 5}]}, "volume is no canonical UUID"),
    ],
)
def test_a_malformed_look(changes: dict[str, object], problem: str) -> None:
    request = {"verb": "look", "vm": VM, "property": "lvm", "disks": [], **changes}
    with pytest.raises(BadRequest) as refusal:
        protocol.read_request(json.dumps(request).encode())
    assert problem in str(refusal.value)


@pytest.mark.parametrize("size", [0, 511, 513, True, 512.0, "512", (64 << 40) + 512, None])
def test_a_malformed_size(size: object) -> None:
    request = {"verb": "prepare", "size": size, "fingerprint": FINGERPRINT, "writes": 0, "base": None}
    with pytest.raises(BadRequest, match="size is"):
        protocol.read_request(json.dumps(request).encode())


@pytest.mark.parametrize(
    "data",
    [None, [], "x", {}, {"how": "copy"}, {"how": "x", "path": "", "target": None, "base": None}],
)
def test_what_is_no_answer(data: object) -> None:
    with pytest.raises(ValueError, match=r"Prepared is not|not a valid How"):
        protocol.read_answer(Prepared, data)
