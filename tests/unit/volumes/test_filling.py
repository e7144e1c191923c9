"""What is logged of pools and metadata areas that fill up; tests/unit/status/ has what status shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localdisk import config, log
from localdisk.helper.session import Session
from localdisk.volumes import filling, gc
from localdisk.volumes.lvm import VolumeGroup
from tests.fakes import IMAGE, OTHER_VM, OTHER_VOLUME, VM, VOLUME, FakeHost, tags

CONFIG = config.parse(b"", "F")


@pytest.fixture(name="said")
def fixture_said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, object]]]:
    said: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(log, "problem", lambda what, **fields: said.append((what, fields)))
    return said


@pytest.fixture(name="host")
def fixture_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHost:
    """A pool at 93 % from which another VM runs, and a metadata area at 95 %."""
    host = FakeHost().install(monkeypatch, tmp_path)
    host.volumes["pool0"].data_percent = "93.00"
    fields: dict[str, Any] = {
        "lv_layout": "thin,sparse",
        "pool_lv": "pool0",
        "data_percent": "50.00",
        "lv_device_open": "open",
    }
    host.add(VOLUME, tags(vm=OTHER_VM), **fields)
    host.vg.update(vg_mda_size="1000", vg_mda_free="25")
    host.active = {OTHER_VM}
    return host


def ask(host: FakeHost, session: Session, verb: str, **fields: object) -> None:
    request = {"verb": verb, "property": "on", **fields}
    assert "error" not in host.serve(session, json.dumps(request).encode())


EXPECTED = ["thin pool fills up", "metadata area fills up"]


def test_gc_logs_it(host: FakeHost, said: list[tuple[str, dict[str, object]]]) -> None:
    gc.collect(CONFIG, dry_run=True)
    assert said == []
    gc.collect(CONFIG)
    assert [what for what, _ in said] == EXPECTED
    pool, area = (fields for _, fields in said)
    assert (pool["pool"], pool["used"], pool["vms"]) == ("ovirt-local/pool0", "data 93.0 %", OTHER_VM)
    assert (area["vg"], area["used"], area["left"]) == ("ovirt-local", "95.0 %", "25 B")


def test_a_start_and_a_stop_log_it(host: FakeHost, said: list[tuple[str, dict[str, object]]]) -> None:
    session = Session(CONFIG, lambda _seconds: None)
    ids = {"image": IMAGE, "volume": OTHER_VOLUME}
    ask(host, session, "claim", vm=VM, **ids, seen=0)
    assert [what for what, _ in said] == EXPECTED
    said.clear()
    host.active.clear()
    host.volumes[VOLUME].lv_device_open = ""
    ask(host, session, "release", vm=OTHER_VM)
    assert [what for what, _ in said] == EXPECTED[1:]  # nobody runs from the pool now


def test_a_group_with_room(said: list[tuple[str, dict[str, object]]]) -> None:
    filling.log_filling(VolumeGroup.from_report(FakeHost().report()))
    assert said == []
