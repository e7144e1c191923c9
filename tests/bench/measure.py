"""How things are measured: by turns, with a watch on LVM commands, bytes and memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.bed.shell import run
from tests.bed.storage import Volume

MIB = 1 << 20
ROUNDS = 3
BARE = ("/usr/bin/python3", "-c", "pass")
CALLS = Path("/run/bench-lvm-calls")
LVM = Path("/usr/sbin/lvm")


def timed(argv: Sequence[str]) -> float:
    """Seconds of a command with an empty environment."""
    return seconds(
        lambda: subprocess.run(argv, check=True, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    )


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternate(first: Callable[[], float], second: Callable[[], float], rounds: int) -> tuple[float, float]:
    """The medians of two measurements that take turns, so that both meet the same noise."""
    pairs = [(first(), second()) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def quiet_disks() -> None:
    run("sync")
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


# -- what the machine tells


@contextmanager
def lvm_commands_counted() -> Iterator[None]:
    """A script that notes each call is in the place of lvm; only in a machine that nobody else uses."""
    if os.environ.get("LOCALDISK_BED_THROWAWAY") != "1":
        yield
        return
    real = LVM.with_name("lvm.real")
    LVM.rename(real)
    try:
        LVM.write_text(f'#!/bin/bash\necho "${{0##*/}} $1" >>{CALLS}\nexec -a "$0" {real} "$@"\n')
        LVM.chmod(0o755)
        yield
    finally:
        real.rename(LVM)


def lvm_calls() -> list[str]:
    """The LVM commands since the last look."""
    calls = CALLS.read_text().splitlines() if CALLS.exists() else []
    CALLS.unlink(missing_ok=True)
    return calls


def shared_bytes() -> int:
    """Bytes read from the disk of the shared storage since it booted."""
    name = os.path.basename(os.path.realpath(os.environ["LOCALDISK_BED_SHARED"]))
    rows = [line.split() for line in Path("/proc/diskstats").read_text().splitlines()]
    return sum(int(row[5]) * 512 for row in rows if row[2] == name)


def allocated(volume: Volume) -> int:
    """Bytes that a volume takes on shared storage."""
    return os.stat(volume.path).st_blocks * 512


def sectors() -> tuple[int, int]:
    """KiB read from and written to the two disks of the bed since it booted."""
    names = {
        os.path.basename(os.path.realpath(os.environ[f"LOCALDISK_BED_{d}"])) for d in ("LOCAL", "SHARED")
    }
    rows = [line.split() for line in Path("/proc/diskstats").read_text().splitlines()]
    chosen = [row for row in rows if row[2] in names]
    return sum(int(row[5]) for row in chosen) // 2, sum(int(row[9]) for row in chosen) // 2


@contextmanager
def memory_watched(peaks: list[int], every: float = 0.1) -> Iterator[None]:
    """Append the peak of the memory of our own processes together while the context lasts, in bytes.

    Looked at each `every` seconds.
    """
    done = threading.Event()
    sums = [0]

    def watch() -> None:
        while not done.wait(every):
            sums.append(sum(proportional()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        peaks.append(max(sums))


def proportional() -> Iterator[int]:
    """The proportional set size of each running localdisk process: what several share is counted once."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            ours = any(word.endswith((b"/50_localdisk", b"/localdisk")) for word in words[:4])
            if ours and b"python" in words[0]:
                rollup = (process / "smaps_rollup").read_text()
                yield 1024 * int(rollup.split("\nPss:")[1].split()[0])
        except (OSError, IndexError, ValueError):
            continue


def row(what: str, value: float, detail: str = "", limit: str = "") -> None:
    """Print one line of the table; `limit` is what it is to reach."""
    print(f"{what:<62} {value:7.2f}  {('limit ' + limit) if limit else '':<11} {detail}", flush=True)


def say(text: str) -> None:
    print(text, flush=True)
