"""Which daemons run, seen in a /proc of our own."""

from __future__ import annotations

from pathlib import Path

import pytest

from localdisk import daemons


def test_running(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number, name in (("1", "systemd"), ("27", "systemd-udevd"), ("self", "nobody")):
        (tmp_path / number).mkdir()
        (tmp_path / number / "stat").write_text(f"{number} ({name}) S 1 27 27 0 -1\n")
    (tmp_path / "99").mkdir()  # it has ended meanwhile
    (tmp_path / "uptime").touch()
    monkeypatch.setattr(daemons, "PROC", str(tmp_path))
    assert daemons.running() == {"systemd", "systemd-udevd"}
    assert daemons.udevd_runs()
    ended = ("27 (systemd-udevd) Z 1", "27 (systemd-udevd) X 1", "27 (systemd-udevd", "")
    for stat in ("27 ((udev-worker)) R 1", *ended):
        (tmp_path / "27" / "stat").write_text(stat)
        assert not daemons.udevd_runs(), stat
    (tmp_path / "27" / "stat").write_text("27 (udevd) R 1")
    assert daemons.udevd_runs()


def test_timers_of_cron() -> None:
    assert not daemons.has_cron_timers("no-such-file")
