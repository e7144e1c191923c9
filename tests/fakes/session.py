"""A hook's side of a session, without a process: requests, and what comes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest

from localdisk import config, frozen, lock
from localdisk.config import Config
from localdisk.helper.session import Session
from localdisk.volumes.lvm import VolumeGroup
from tests.fakes import (
    EXTENT,
    FINGERPRINT,
    FULLREPORT,
    IMAGE,
    VM,
    VOLUME,
    FakeHost,
)

THIRD_VOLUME = "33333333-3333-4333-8333-333333333333"


SIZE = 10 * EXTENT


LOOK = f"{FULLREPORT} ovirt-local"


LIST = (
    f"virsh --readonly --connect qemu:///system"
    f" domblklist {VM}; echo ====; list --all --uuid; echo ====; list --uuid"
)


NAME = f"ovirt-local/{VOLUME}"


PATH = f"/dev/{NAME}"


CREATE = f"lvcreate --quiet --yes --name {VOLUME} --setactivationskip y --ignoreactivationskip"


NEW_TAGS = (
    f"--addtag IU_{IMAGE} --addtag SOURCE_{FINGERPRINT} --addtag UPDATING --addtag VM_{VM}"
    " --addtag WRITES_4096 --addtag localdisk"
)


def commit(lv_uuid: str, writes: int = 4096) -> str:
    """The command that makes a new disk ready."""
    having = " && ".join(f'"{word}"' for word in NEW_TAGS.split() if word != "--addtag")
    selection = f"lv_uuid={lv_uuid} && lv_tags={{{having}}} && vg_partial=0 && vg_exported=0".replace(
        "WRITES_4096", f"WRITES_{writes}"
    )
    return f"lvchange --yes --deltag UPDATING --deltag WRITES_{writes} --select {selection} {NAME}"


ACTIVATE = f"lvchange --quiet --activate y --ignoreactivationskip {NAME}"


KEEP = "retention: {on_stop: keep}"


RECOPY = "retention: {on_stop: keep, on_source_change: recopy}"


IDS = {"vm": VM, "property": "lvm", "image": IMAGE, "volume": VOLUME}
CLAIM = {"verb": "claim", **IDS, "seen": 0}


PREPARE = {"verb": "prepare", "size": SIZE, "fingerprint": FINGERPRINT, "writes": 4096, "base": None}


PROGRESS = {"verb": "progress", "done": 5, "written": 3}


COMMIT_IT = {"verb": "commit"}


RELEASE = {"verb": "release", "vm": VM, "property": "lvm"}


TO_PREPARE = {"stays": False, "path": "", "chunk": 0, "cached": False}


KEPT = {"how": "kept", "path": PATH, "target": None, "base": None}


@lru_cache(maxsize=100)
def parsed(text: str) -> Config:
    return config.parse(text.encode(), "F")


class Ended(Exception):
    pass


def give_up(_seconds: float) -> None:
    raise Ended


class Hook:
    """One hook run: requests go in as bytes."""

    def __init__(self, host: FakeHost, text: str = "", pause: Callable[[float], None] = give_up) -> None:
        self.host = host
        self.session = Session(parsed(text), pause)

    def ask(self, request: object, **changes: object) -> Any:
        merged = {**request, **changes} if isinstance(request, dict) else request
        return self.host.serve(self.session, json.dumps(merged).encode())

    def refused(self, request: object, **changes: object) -> str:
        answer = self.ask(request, **changes)
        assert list(answer) == ["error"], answer
        message: str = answer["error"]
        assert message.isprintable()
        assert all(message.partition(" : "))
        return message

    def refused_start(self, **changes: object) -> str:
        assert "error" not in self.ask(CLAIM, **changes)
        return self.refused(PREPARE)

    def start(self, **changes: object) -> Any:
        """Claim and prepare."""
        claim = {key: value for key, value in changes.items() if key in CLAIM}
        rest = {key: value for key, value in changes.items() if key not in CLAIM}
        answer = self.ask(CLAIM, **claim)
        assert answer == {**TO_PREPARE, "chunk": 65536 * (claim.get("property") == "lvmthin")}, answer
        return self.ask(PREPARE, **rest)


def add_group(patch: pytest.MonkeyPatch, name: str) -> None:
    """Another volume group beside the fake host's, without any volume."""
    read = VolumeGroup.read

    def read_either(_class: type[VolumeGroup], vg_name: str, devices: tuple[str, ...] = ()) -> VolumeGroup:
        if vg_name != name:
            return read(vg_name, devices)
        return frozen.replace(read("ovirt-local"), vg_name=name, lvs=())

    patch.setattr(VolumeGroup, "read", classmethod(read_either))


def locks() -> list[str]:
    return lock.names()


def lv_tags(host: FakeHost, name: str = VOLUME) -> set[str]:
    return host.volumes[name].lv_tags


def held_elsewhere(path: str) -> Iterator[None]:
    held = lock.try_hold(path)
    assert held
    yield
    held.release()


DRIFTED = {"verb": "drifted", "vm": VM, "property": "lvm", "disks": [{"image": IMAGE, "path": "/rhev/x"}]}
