from __future__ import annotations

import syslog

import pytest

from localdisk import log
from localdisk.errors import CommandFailed, ConfigRefused


def test_events_are_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, str]] = []
    monkeypatch.setattr(syslog, "syslog", lambda level, text: written.append((level, text)))
    log.event("disk ready", vm="a", disk="x\ny\x1b[0m", size=5)
    log.problem("left to gc", why="z" * 500)
    assert written == [
        (syslog.LOG_INFO, "disk ready vm=a disk=x\\ny\\x1b[0m size=5"),
        (syslog.LOG_WARNING, "left to gc why=" + "z" * 99 + "…" + "z" * 100),
    ]


def test_of_an_error_what_to_do_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fields are cut; of a refused configuration the last line is what to do."""
    written: list[str] = []
    monkeypatch.setattr(syslog, "syslog", lambda _level, text: written.append(text))
    log.problem("left to gc", why=CommandFailed(("lvremove", "v"), 5, "\x1b" + "z" * 500))
    log.problem("refused", why=ConfigRefused("F", ("F:1:1: a", "F:2:1: b")))
    said = "\\x1b" + "z" * 95 + "…" + "z" * 100
    assert written == [
        f"left to gc why=lvremove v failed (exit code 5): {said} : see the system log of this host",
        "refused why=configuration F is refused, 2 problem(s)"
        " : correct it, then run localdisk check --config F",
    ]
