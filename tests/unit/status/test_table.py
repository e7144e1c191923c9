"""The table of status, and the screen of --watch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from localdisk.frozen import replace
from localdisk.status import output, table
from localdisk.status.snapshot import CacheUse, Next, Pool, Snapshot, TemplateRow
from localdisk.status.table import Look, render
from tests.fakes.snapshot import COPY, GIB, GROUP, NOW, ROWS, SNAPSHOT, row

ROOT = Path(__file__).parents[3]


EXPECTED = """\
VM                        DISK             SIZE   USED  BACKEND  STATE         NEXT
2111f97c db-xxxxxxxxxxx…  2b845a9c       20 GiB         lvm      copying 42%   310 MiB/s 00:41 left
1111f97c web1             1b845a9c vda   20 GiB         lvm      running       removed when VM stops
1111f97c web1             77b845a9 vdb  100 GiB  3 GiB  lvmthin  running       removed when VM stops
-                         6b845a9c       20 GiB         lvm      deleting      gc erases it next
4111f97c                  4b845a9c       20 GiB         lvm      stopped 3 d   gc removes in 4 d 2 h

[#######---------]  42% of 20 GiB  310 MiB/s 00:41 left  db-xxxxxxxxxxxxxxxxxxxxxxxxxx… 2b845a9c

volume group ovirt-local  [########-------|] 53% of 1.8 TiB used, 850 GiB free (reserve 90 GiB)
pool ovirt-local/pool0    [#############-|-] 83% of 400 GiB used (limit 90%), metadata 11% (80%)

1 problem:
  VM web1: vdb runs from /rhev/data-center/x, not from there not from there not from there not from
    there not from there not from there
      stop it

not seen: which VMs run: nobody says
"""


def test_the_table() -> None:
    assert render(SNAPSHOT, Look()) == EXPECTED
    assert max(map(len, EXPECTED.splitlines())) <= 100


def template_row(number: int, **fields: object) -> TemplateRow:
    usual: dict[str, object] = {
        "vg": "ovirt-local",
        "volume": f"{number}c0ffee5-9336-4e7a-a8a9-b4f052ababf1",
        "name": f"{number}5b845a9-e065-5a01-8d50-0838a877ec55",
        "size": 100 * GIB,
        "backend": "lvmthin",
        "state": "ready",
        "open": False,
        "holds": 3 * GIB,
        "last_used": NOW - 75_000,
        "copy": None,
        "next": Next("remove", 5, "gc removes in 29 d 3 h"),
    }
    return TemplateRow(**{**usual, **fields})  # type: ignore[arg-type]


CACHED = replace(
    SNAPSHOT,
    volume_groups=(
        replace(
            GROUP,
            cache=CacheUse(20 * GIB, 900 * GIB),
            pool=Pool("pool0", 400 * GIB, 83.2, 10.9, 90, 80, CacheUse(200 * GIB, 200 * GIB)),
        ),
    ),
    disks=ROWS[:2],
    templates=(
        template_row(1),
        template_row(
            2, backend="lvm", holds=100 * GIB, last_used=NOW, next=Next("keep", None, "kept while in use")
        ),
        template_row(
            3,
            state="copying",
            last_used=None,
            copy=COPY,
            next=Next("copy", 3, "310 MiB/s 00:41 left"),
        ),
        template_row(
            4,
            state="waiting",
            backend="",
            holds=0,
            last_used=None,
            copy=replace(COPY, phase="waiting", done=0),
            next=Next("copy", None, "waits 20 s for turn"),
        ),
    ),
    problems=(),
    unseen=(),
)
EXPECTED_CACHED = """\
VM             DISK            SIZE  BACKEND  STATE        NEXT
1111f97c web1  1b845a9c vda  20 GiB  lvm      running      removed when VM stops
4111f97c       4b845a9c      20 GiB  lvm      stopped 3 d  gc removes in 4 d 2 h

TEMPLATE     SIZE    HOLDS  BACKEND  LAST USED        STATE         NEXT
1c0ffee5  100 GiB    3 GiB  lvmthin  20 h 50 min ago  ready         gc removes in 29 d 3 h
2c0ffee5  100 GiB  100 GiB  lvm      0 s ago          ready         kept while in use
3c0ffee5  100 GiB    3 GiB  lvmthin  -                copying 42%   310 MiB/s 00:41 left
4c0ffee5  100 GiB      0 B  -        -                waiting       waits 20 s for turn

[#######---------]  42% of 100 GiB  310 MiB/s 00:41 left  template 3c0ffee5

volume group ovirt-local    [########-------|] 53% of 1.8 TiB used, 850 GiB free (reserve 90 GiB)
cache in ovirt-local        [--------|-------] 20 GiB of at most 900 GiB used
pool ovirt-local/pool0      [#############-|-] 83% of 400 GiB used (limit 90%), metadata 11% (80%)
cache in ovirt-local/pool0  [########|-------] 200 GiB of at most 200 GiB used
"""


def test_templates() -> None:
    text = render(CACHED, Look())
    assert text == EXPECTED_CACHED
    long = template_row(
        5,
        size=1_099_000_000_000_000,
        holds=1_099_000_000_000_000,
        state="copying",
        last_used=NOW - 86_000,
        copy=COPY,
        next=Next("copy", 3, "1023.9 MiB/s 1:00:00 left"),
    )
    lines = render(replace(CACHED, templates=(long,)), Look()).splitlines()
    assert max(map(len, (*text.splitlines(), *lines))) <= 100


def test_why_the_cache_did_not_serve() -> None:
    counted = {"cache_full": 1, "no_template": 12, "metadata_unclear": 3}
    lines = render(replace(CACHED, uncached=counted), Look()).splitlines()
    assert lines[-1] == (
        "copied without the cache since boot: 12 no_template, 3 metadata_unclear, 1 cache_full"
    )


@pytest.mark.parametrize("name", ["名" * 15, "é" * 9 + "e\u0301" * 9, "한국어 서버", "a\u200bb", "😀" * 9])
@pytest.mark.parametrize("width", [100, 60])
def test_columns_stay_where_they_are_whatever_a_name_is_written_in(name: str, width: int) -> None:
    """As wide as a terminal shows it: twice for wide characters, nothing for what is put upon others."""
    rows = [replace(SNAPSHOT.disks[0], vm_name=each) for each in (name, "web")]
    first, second = render(replace(SNAPSHOT, disks=tuple(rows)), Look(width=width)).splitlines()[1:3]
    shown = [line[: line.index("  lvm")] for line in sorted((first, second))]
    assert len({table.columns(text) for text in shown}) == 1
    assert table.columns(first) <= 100


def test_the_columns_of_a_text() -> None:
    texts = ("", "ab", "名前", "e\u0301", "a\u200b", "ｱ", "Ａ", "😀")
    assert [table.columns(text) for text in texts] == [0, 2, 4, 1, 1, 1, 2, 2]
    assert table.cut("名前あ", 4) == "名…"
    assert table.cut("名前あ", 6) == "名前あ"
    assert table.cut("abc", 2) == "a…"


def test_templates_in_full() -> None:
    text = render(CACHED, Look(full=True))
    for each in CACHED.templates:
        assert f"{each.volume}  {each.name}  " in text


def test_a_full_cache_is_no_alarm() -> None:
    lines = render(CACHED, Look(colours=True)).splitlines()
    (line,) = [line for line in lines if line.startswith("cache in ovirt-local/pool0")]
    assert "\033[32m[########|-------]\033[0m" in line
    assert "\033[36mcopying\033[0m 42%" in "".join(lines)


def test_templates_and_no_disks() -> None:
    text = render(replace(CACHED, disks=()), Look())
    assert text.startswith("no local disks\n\nTEMPLATE  ")


def test_nothing() -> None:
    assert render(Snapshot(NOW, (), ()), Look()) == "no local disks\n"


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_widths(width: int) -> None:
    lines = render(SNAPSHOT, Look(width)).splitlines()
    assert all(len(line) <= max(width, 98) for line in lines)
    assert any("stopped 3 d" in line for line in lines)
    shown = "".join(lines[:6])
    assert ("db-" + "x" * 40 in shown) is (width == 200)


def test_full() -> None:
    text = render(SNAPSHOT, Look(full=True))
    for each in ROWS:
        assert f"{each.vm} {each.vm_name}".strip() in text
        assert each.volume in text


def test_colours_say_nothing_more() -> None:
    text = render(SNAPSHOT, Look(colours=True))
    assert re.sub(r"\033\[\d*m", "", text) == EXPECTED
    assert "\033[32mrunning\033[0m" in text
    assert "\033[36mcopying\033[0m 42%" in text
    assert "\033[31m1 problem:\033[0m" in text


def test_a_stop_in_the_future_and_a_pool_that_does_not_tell() -> None:
    pool = Pool("pool0", 400 * GIB, None, None, 90, 80)
    stopped = row(4, state="stopped", stopped=NOW + 99)
    text = render(Snapshot(NOW, (replace(GROUP, pool=pool, reserve=0),), (stopped,)), Look())
    assert "stopped 0 s" in text
    assert "] 400 GiB, LVM does not report how full it is" in text
    assert "850 GiB free\n" in text


def test_a_hostile_name() -> None:
    text = render(Snapshot(NOW, (), (row(1, vm_name="\033[2Ja\nb" + "c" * 300),)), Look())
    assert len(text.splitlines()) == 2
    assert "\033" not in text


@pytest.mark.parametrize(
    ("share", "limit", "bar"),
    [
        (0, 1, "----------------"),
        (1, 1, "################"),
        (7, 1, "################"),
        (0.5, 0.75, "########----|---"),
        (0.9, 0.5, "##############--"),
    ],
)
def test_bars(share: float, limit: float, bar: str) -> None:
    assert table._bar(share, limit) == f"[{bar}]"


@pytest.mark.parametrize(
    ("is_terminal", "environ", "colours"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, True),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {"TERM": "xterm"}, False),
    ],
)
def test_when_there_are_colours(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, environ: dict[str, str], colours: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert output._look().colours is colours


# -- --watch on a real terminal

WATCHED = """
import sys
from localdisk import cli
from localdisk.status import snapshot
from tests.fakes.snapshot import SNAPSHOT
snapshot.take = lambda config: SNAPSHOT
sys.exit(cli.main(["status", "--watch"]))
"""


class Terminal:
    """A program on a pseudo-terminal; `seen` is all that it has written."""

    def __init__(self, lines: int = 30, columns: int = 100) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        environ = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)}
        environ.pop("COLUMNS", None)
        environ.pop("LINES", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", WATCHED],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environ,
            cwd=ROOT,
            start_new_session=True,
            # A shell has what it runs in the background ignore Ctrl-C, and so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + 20
        while self.seen.count(text) < times:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the program has ended
                    self.seen += os.read(self.master, 65536).decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_watch_draws_in_place_and_gives_the_screen_back(number: int) -> None:
    terminal = Terminal()
    terminal.wait_for("\033[H", times=2)
    terminal.process.send_signal(number)
    terminal.wait_for(output.LEAVE)
    assert terminal.process.wait(20) == 0
    assert terminal.seen.startswith(output.ENTER + "\033[H")
    assert "Traceback" not in terminal.seen
    frame = terminal.seen.split("\033[H")[1]
    assert "\n" not in frame[frame.rindex("\n") + 1 :]
    assert "[\033[36m#" in frame or "\033[36m[#######---------]" in frame


def test_watch_shows_what_fits() -> None:
    terminal = Terminal(lines=6)
    terminal.wait_for("more lines")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for(output.LEAVE)
    frame = terminal.seen.split("\033[H")[1].split("\033[J")[0]
    assert len(frame.splitlines()) == 6
    terminal.process.wait(20)
