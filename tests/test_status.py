from __future__ import annotations

import json
import time
from functools import lru_cache
from pathlib import Path

import pytest

from localdisk import config, lock, status
from localdisk.config import Config
from localdisk.status import Group, Pool, Row
from tests.fakes import FULLREPORT, IMAGE, OTHER_VOLUME, VM, VOLUME, FakeHost, report, tags

NOW = 1_760_000_000
SIZE = 64 << 20


@lru_cache(maxsize=20)
def parsed(text: str = "") -> Config:
    return config.parse(text.encode(), "F")


@pytest.fixture(name="host")
def fixture_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHost:
    monkeypatch.setattr(time, "time", lambda: float(NOW))
    return FakeHost().install(monkeypatch, tmp_path)


def row(host: FakeHost, *more: str, **fields: str) -> Row:
    host.add(VOLUME, tags(*more), SIZE, **fields)
    (found,) = status.take(parsed()).disks
    return found


def test_one_command(host: FakeHost) -> None:
    snapshot = status.take(parsed())
    assert host.commands == [f"{FULLREPORT} ovirt-local"]
    assert snapshot.at == NOW
    assert snapshot.volume_groups == (
        Group("ovirt-local", 8585740288, 7503609856, Pool("pool0", 1 << 30, 0.0, 10.94)),
    )
    assert snapshot.disks == ()


def test_a_disk(host: FakeHost) -> None:
    assert row(host) == Row(
        vg="ovirt-local",
        vm=VM,
        image=IMAGE,
        volume=VOLUME,
        size=SIZE,
        backend="lvm",
        state="ready",
        open=False,
        stopped=None,
        done=None,
        data_percent=None,
    )


@pytest.mark.parametrize(
    ("more", "is_open", "state"),
    [
        ((), "", "ready"),
        ((), "open", "running"),
        (("UPDATING",), "", "unfinished"),
        (("UPDATING",), "open", "unfinished"),
        (("STOPPED_5",), "", "stopped"),
        (("STOPPED_5",), "open", "stopped"),
        (("DELETING",), "", "deleting"),
        (("DELETING",), "open", "deleting"),
    ],
)
def test_states(host: FakeHost, more: tuple[str, ...], is_open: str, state: str) -> None:
    found = row(host, *more, lv_device_open=is_open)
    assert (found.state, found.open) == (state, bool(is_open))


@pytest.mark.parametrize(
    ("record", "done"),
    [
        ('{"vm": "x", "done": 25, "total": 100}', 0.25),
        ("", None),
        ("{", None),
        ("[]", None),
        ("null", None),
        ("{}", None),
        ('{"done": 1, "total": 0}', None),
        ('{"done": "1", "total": 2}', None),
        ('{"done": 1' + "0" * 400 + ', "total": 2}', None),
        ("\0\0\0", None),
    ],
)
def test_progress_of_a_copy(host: FakeHost, record: str, done: float | None) -> None:
    with lock.holding(lock.disk_lock(VOLUME), lambda _: None) as held:
        held.write(record)
        found = row(host, "UPDATING")
    assert (found.state, found.done) == ("copying", done)


def test_a_lock_that_nobody_holds_is_no_progress(host: FakeHost) -> None:
    Path(lock.RUN).mkdir()
    Path(lock.disk_lock(VOLUME)).write_text('{"done": 25, "total": 100}')
    assert row(host, "UPDATING").state == "unfinished"
    assert row(host, "UPDATING").done is None


@pytest.mark.parametrize(
    ("name", "has_pool"), [("empty", False), ("not-zeroing", True), ("pool-inactive", True)]
)
def test_other_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, has_pool: bool) -> None:
    host = FakeHost(report(name)).install(monkeypatch, tmp_path)
    (group,) = status.take(parsed(f"volume_group: {host.vg['vg_name']}")).volume_groups
    assert (group.pool is not None) is has_pool
    assert status.as_table(status.take(parsed(f"volume_group: {host.vg['vg_name']}")))


def test_the_table(host: FakeHost) -> None:
    host.add(VOLUME, tags("STOPPED_1759990000"), SIZE)
    host.add(OTHER_VOLUME, tags("UPDATING"), 3 << 29, lv_layout="thin,sparse", pool_lv="pool0")
    with lock.holding(lock.disk_lock(OTHER_VOLUME), lambda _: None) as held:
        held.write('{"done": 1, "total": 3}')
        table = status.as_table(status.take(parsed()))
    assert table == (
        f"{'VM':36}  {'DISK':36}  SIZE     BACKEND  STATE\n"
        f"{VM}  {VOLUME}  64 MiB   lvm      stopped 2 h 46 min\n"
        f"{VM}  {OTHER_VOLUME}  1.5 GiB  lvmthin  copying 33%\n"
        "\n"
        "volume group ovirt-local: 7 GiB of 8 GiB free\n"
        "thin pool ovirt-local/pool0: 1 GiB, data 0.0 %, metadata 10.9 %\n"
    )


def test_the_table_of_nothing(host: FakeHost) -> None:
    assert status.as_table(status.take(parsed())).startswith("no local disks\n\nvolume group ovirt-local: ")


def test_a_stop_in_the_future(host: FakeHost) -> None:
    row(host, f"STOPPED_{NOW + 99}")
    assert "stopped 0 s" in status.as_table(status.take(parsed()))


def test_the_json(host: FakeHost) -> None:
    row(host, "STOPPED_5")
    document = json.loads(status.as_json(status.take(parsed())))
    assert document.keys() == {"at", "volume_groups", "disks"}
    assert document["disks"][0]["stopped"] == 5
    assert document["disks"][0]["volume"] == VOLUME
    assert document["volume_groups"][0]["pool"]["name"] == "pool0"
