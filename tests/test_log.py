from __future__ import annotations

import syslog

import pytest

from localdisk import log


def test_events_are_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, str]] = []
    monkeypatch.setattr(syslog, "syslog", lambda level, text: written.append((level, text)))
    log.event("disk ready", vm="a", disk="x\ny\x1b[0m", size=5)
    log.problem("left to gc", why="z" * 500)
    assert written == [
        (syslog.LOG_INFO, "disk ready vm=a disk=x\\ny\\x1b[0m size=5"),
        (syslog.LOG_WARNING, "left to gc why=" + "z" * 199 + "…"),
    ]
