from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from localdisk import counters, lock
from localdisk.counters import Counters
from localdisk.errors import BadRequest, NoSpace


@pytest.fixture(name="file", autouse=True)
def fixture_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(lock, "RUN", str(tmp_path / "run"))
    monkeypatch.setattr(time, "time", lambda: 1_760_000_000.5)
    return tmp_path / "run" / "counters"


def test_nothing_has_happened(file: Path) -> None:
    assert counters.read() == Counters()
    assert not file.exists()


def test_all_is_added_up(file: Path) -> None:
    counters.copied(1000, 1.5)
    counters.copied(24, 0.25)
    counters.failed(NoSpace())
    counters.failed(NoSpace())
    counters.failed(BadRequest())
    counters.failed("copy_broken_off")
    counters.template_hit()
    counters.template_hit()
    counters.template_miss()
    counters.template_evicted()
    counters.gc_ran(2, 100, is_good=True)
    assert counters.read() == Counters(
        copies=2,
        copied_bytes=1024,
        copy_seconds=1.75,
        template_hits=2,
        template_misses=1,
        templates_evicted=1,
        failures={"no_space": 2, "bad_request": 1, "copy_broken_off": 1},
        gc_runs=1,
        gc_last_run=1_760_000_000,
        gc_last_success=1_760_000_000,
        gc_removed=2,
        gc_removed_bytes=100,
    )
    assert os.stat(file).st_mode & 0o777 == 0o600


def test_a_gc_with_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    counters.gc_ran(0, 0, is_good=True)
    monkeypatch.setattr(time, "time", lambda: 1_760_000_100.0)
    counters.gc_ran(0, 0, is_good=False)
    found = counters.read()
    assert (found.gc_runs, found.gc_last_run, found.gc_last_success) == (2, 1_760_000_100, 1_760_000_000)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "null",
        "\0" * 9,
        "[" * 4000,
        '{"copies": -1}',
        '{"copies": "1"}',
        '{"copies": true}',
        '{"copies": Infinity}',
        '{"copies": NaN}',
        '{"failures": 3}',
        '{"failures": {"x": "y"}}',
        '{"unknown": 3}',
    ],
)
def test_what_is_not_understood_begins_anew(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    assert counters.read() == Counters()
    counters.copied(5, 1)
    assert counters.read() == Counters(copies=1, copied_bytes=5, copy_seconds=1)


def test_reasons_are_bounded(file: Path) -> None:
    for number in range(200):
        counters.failed(f"reason_{number}")
    assert len(counters.read().failures) == 65
    assert sum(counters.read().failures.values()) == 200
    assert file.stat().st_size == 4096


def test_a_longer_text_leaves_no_rest() -> None:
    counters.gc_ran(10**15, 10**15, is_good=True)
    counters.copied(1, 0.1)
    assert counters.read().copies == 1


def test_counting_fails_nothing(file: Path) -> None:
    file.mkdir(parents=True)
    counters.copied(1, 1)
    assert counters.read() == Counters()


def test_a_link_is_not_followed(file: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    file.parent.mkdir()
    file.symlink_to(tmp_path / "precious")
    counters.copied(1, 1)
    assert (tmp_path / "precious").read_text() == "precious"


def _count(run: str) -> None:
    lock.RUN = run
    for _ in range(50):
        counters.copied(1, 1)


def test_many_at_once(file: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(_count, [str(file.parent)] * 4)
    assert counters.read().copies == 200
