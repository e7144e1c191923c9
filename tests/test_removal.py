from __future__ import annotations

from pathlib import Path

import pytest

from localdisk import removal
from localdisk.disk import LocalDisk
from localdisk.errors import CommandFailed, DiskBusy
from localdisk.lvm import VolumeGroup
from tests.fakes import FULLREPORT, VOLUME, FakeHost, tags

NAME = f"ovirt-local/{VOLUME}"
REMOVE = f"lvremove --quiet --yes {NAME}"
ACTIVATE = f"lvchange --quiet --activate y --ignoreactivationskip {NAME}"
LOOK = f"{FULLREPORT} ovirt-local"


@pytest.fixture(name="host")
def fixture_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHost:
    return FakeHost().install(monkeypatch, tmp_path)


def remove(host: FakeHost, erase: str = "none", closes_after: int = 1000) -> int:
    """Remove VOLUME, which is closed after so many pauses; returns how many there were."""
    vg = VolumeGroup.from_report(host.report())
    lv = vg.find(VOLUME)
    disk = LocalDisk.from_lv(lv) if lv else None
    assert disk
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == closes_after:
            host.volumes[VOLUME].lv_device_open = ""

    removal.remove(vg, disk, erase, pause)
    return len(pauses)


@pytest.mark.parametrize(
    ("erase", "commands"),
    [
        ("none", [REMOVE]),
        ("discard", [ACTIVATE, f"blkdiscard /dev/{NAME}", REMOVE]),
        ("zero", [ACTIVATE, f"blkdiscard --zeroout /dev/{NAME}", REMOVE]),
    ],
)
def test_a_closed_disk(host: FakeHost, erase: str, commands: list[str]) -> None:
    host.add(VOLUME, tags(), lv_active="")
    assert remove(host, erase) == 0
    assert host.commands == commands
    assert VOLUME not in host.volumes


@pytest.mark.parametrize("erase", ["none", "zero"])
def test_a_disk_that_is_open_for_a_moment_is_waited_for(host: FakeHost, erase: str) -> None:
    host.add(VOLUME, tags(), lv_device_open="open")
    assert remove(host, erase, closes_after=3) == 3
    assert host.commands[:3] == [LOOK] * 3
    assert VOLUME not in host.volumes


@pytest.mark.parametrize("erase", ["none", "discard", "zero"])
def test_an_open_disk_is_left_alone(host: FakeHost, erase: str) -> None:
    host.add(VOLUME, tags(), lv_device_open="open")
    with pytest.raises(DiskBusy, match=r"is ready and still open by something : find it"):
        remove(host, erase)
    assert host.commands == [LOOK] * removal.TRIES
    assert VOLUME in host.volumes


def test_a_disk_that_is_opened_after_the_look_is_waited_for(host: FakeHost) -> None:
    host.add(VOLUME, tags())
    host.fail("lvremove", f"  Logical volume {NAME} in use.\n", times=2)
    assert remove(host) == 2
    assert host.commands == [REMOVE] * 3


def test_a_disk_that_stays_open_is_busy(host: FakeHost) -> None:
    host.add(VOLUME, tags())
    host.fail("lvremove", f"  Logical volume {NAME} is used by another device.\n", times=1000)
    with pytest.raises(DiskBusy):
        remove(host)
    assert host.commands == [REMOVE] * removal.TRIES


def test_any_other_failure_is_not_tried_again(host: FakeHost) -> None:
    host.add(VOLUME, tags())
    host.fail("lvremove", "  Cannot change VG while PVs are missing.\n", times=1000)
    with pytest.raises(CommandFailed, match="PVs are missing"):
        remove(host)
    assert host.commands == [REMOVE]


def test_nothing_is_removed_that_could_not_be_erased(host: FakeHost) -> None:
    host.add(VOLUME, tags())
    host.fail("blkdiscard", "blkdiscard: /dev/x: BLKDISCARD ioctl failed: Operation not supported\n")
    with pytest.raises(CommandFailed, match="Operation not supported"):
        remove(host, "discard")
    assert VOLUME in host.volumes
