"""Runs parts of the test command side by side:

    python -m tests.suite [--where PLACE] [--all] PART...

PART is lint, build-again, unit (also under the oldest other Python that this machine has),
kernel (each file of tests/kernel; short ones share a guest), crash.  --all: the whole crash matrix, not a
selection, and all of the unit tests under each Python.  What each prints is in .bed/log/ and shown if it
failed; of the others the last line is shown.  Exit status: 0 if all are good, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, PriorityQueue

from tests.bed.guest import ROOT, STATE
from tests.bed.places import NAMES
from tests.bed.shell import how_it_ended
from tests.pythons import others

LOGS = STATE / "log"
DURATIONS = STATE / "durations.json"  # seconds that each job took the last time
KERNEL_TESTS = ROOT / "tests/kernel"
CRASH_GUESTS = 2  # one of them takes too long
SHORT, SHARED = 330, 900  # lines: files of kernel tests that share a guest, and how many they have in all
PASSED = re.compile(r"(\d+) passed")
FAILED = re.compile(r"(\d+) (?:failed|errors?)")


@dataclass(frozen=True)
class Job:
    """One part: `argv` is run, of the jobs that are `alone` never two at once.

    `guess` is how many seconds it may take, for the first time that it runs.
    """

    name: str
    argv: tuple[str, ...]
    guess: int
    alone: bool = False


@dataclass(frozen=True)
class Done:
    """`seconds` it took, for `cpu` of which a processor worked."""

    job: Job
    status: int
    seconds: float
    cpu: float
    output: str

    def counts(self) -> tuple[int, int]:
        """How many tests passed and failed, as pytest's last lines say; a job without pytest is one test."""
        passed, failed = (sum(map(int, pattern.findall(self.last_line()))) for pattern in (PASSED, FAILED))
        if self.status:
            failed = max(failed, 1)
        return (passed, failed) if passed or failed else (1, 0)

    def last_line(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        summaries = [line for line in lines if PASSED.search(line)]
        return (summaries or lines or [""])[-1].strip("= ")


def main() -> int:
    options = parser().parse_args()
    began = time.monotonic()
    place = choose(options.where) if {"kernel", "crash"} & set(options.part) else ""
    known = known_durations()
    jobs = sorted(find_jobs(options.part, place, options.all), key=lambda job: -expected(job, known))
    done = run_all(jobs, how_many_at_once(place))
    remember({**known, **{each.job.name: each.seconds for each in done}})
    passed, failed = (sum(each.counts()[i] for each in done) for i in (0, 1))
    cpu = sum(each.cpu for each in done)
    print(f"{len(done)} parts took {time.monotonic() - began:.0f} s, CPU {cpu:.0f} s")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.suite", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--where", choices=["auto", "guest", *NAMES], default="auto")
    parser.add_argument("--all", action="store_true", help="also what is long")
    parser.add_argument("part", nargs="+", choices=list(PARTS))
    return parser


# -- what there is to run


def find_jobs(parts: Sequence[str], place: str, everything: bool) -> Iterator[Job]:
    for part in parts:
        yield from PARTS[part](place, everything)


def lint(place: str, everything: bool) -> Iterator[Job]:
    yield Job("lint", ("./build.sh", "lint"), 20)


def build_again(place: str, everything: bool) -> Iterator[Job]:
    yield Job("build-again", ("./build.sh", "build-again"), 20)


def unit(place: str, everything: bool) -> Iterator[Job]:
    """The unit tests under several Pythons; 200 random chains by the cache's way of copying.

    Of the other Pythons, the oldest: a newer one lacks little that it has.  `everything`: all of them.  The
    tests of the built file start it under each Python that this machine has.
    """
    yield Job("unit", ("./build.sh", "unit", "tests"), 60)
    chains = ("./build.sh", "unit", "tests/unit/hook/test_copy.py", "-k", "test_random_chains")
    yield Job("unit-chains", ("env", "LOCALDISK_CHAINS=200", *chains), 20)
    found = list(others())
    for python in found if everything else found[:1]:
        words = [python, *(["--all"] if everything else [])]
        yield Job(f"unit-{Path(python).name}", ("./build.sh", "unit-under", *words), 50)


def kernel(place: str, everything: bool) -> Iterator[Job]:
    """The kernel tests that there are, by guests; one at a time on the machine's own kernel."""
    for files in guests(sorted(KERNEL_TESTS.rglob("test_*.py"))):
        paths = [str(file.relative_to(ROOT)) for file in files]
        argv = boot(place, ".venv/bin/python", "-m", "pytest", "-v", "--durations", "5", *paths)
        name = "+".join(file.stem[len("test_") :] for file in files)
        yield Job(f"kernel-{name}", argv, sum(map(lines, files)), place == "here")


def guests(files: Sequence[Path]) -> list[list[Path]]:
    """The files that run in the same guest: short ones share one, since it takes its time to be set up."""
    found = [[file] for file in files if lines(file) > SHORT]
    shared: list[Path] = []
    for file in files:
        if lines(file) <= SHORT:
            if sum(map(lines, shared)) + lines(file) > SHARED:
                found.append(shared)
                shared = []
            shared = [*shared, file]
    return [*found, shared] if shared else found


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def crash(place: str, everything: bool) -> Iterator[Job]:
    guest = "guest" if place == "here" else place
    words = ("-m", "tests.crash", "--where", guest, "--guests", str(CRASH_GUESTS))
    yield Job("crash", as_root(*words, *(["--all"] if everything else [])), 1000)


PARTS = {"lint": lint, "build-again": build_again, "unit": unit, "kernel": kernel, "crash": crash}


def boot(place: str, *command: str) -> tuple[str, ...]:
    return as_root("-m", "tests.bed.boot", "--where", place, "--memory", "2G", "--", *command)


def as_root(*words: str) -> tuple[str, ...]:
    """Python with these words, as root; root's compiled modules would be in the user's way (-B)."""
    mirror = f"DEBIAN_MIRROR={os.environ.get('DEBIAN_MIRROR', '')}"
    return (*([] if os.geteuid() == 0 else ["sudo", "env", mirror]), ".venv/bin/python", "-B", *words)


def choose(where: str) -> str:
    """The place for the kernel tests; once for all of them, since each place is tried."""
    chosen = as_root("-m", "tests.bed.boot", "--choose", "--where")
    place = subprocess.check_output([*chosen, where], cwd=ROOT, text=True).strip()
    if place == "here":  # the crash matrix switches kernels off
        subprocess.run([*chosen, "guest"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return place


# -- running them


def run_all(jobs: Sequence[Job], at_once: int) -> list[Done]:
    """Run the jobs in this order, so many at once; tells of each when it has ended."""
    waiting: PriorityQueue[tuple[int, Job]] = PriorityQueue()
    for number, job in enumerate(jobs):
        waiting.put((number, job))
    done: list[Done] = []
    alone = threading.Lock()

    def work() -> None:
        with suppress(Empty):
            while True:
                _, job = waiting.get_nowait()
                with alone if job.alone else nullcontext():
                    ended = run(job)
                done.append(ended)
                tell(ended)

    workers = [threading.Thread(target=work) for _ in range(at_once)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return done


def run(job: Job) -> Done:
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{job.name}.txt"
    began = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            job.argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    output = log.read_text(errors="replace")
    cpu = usage.ru_utime + usage.ru_stime
    return Done(job, process.returncode, time.monotonic() - began, cpu, output)


def how_many_at_once(place: str) -> int:
    """Two for each CPU, since many tests wait (for LVM's locks, for time to pass), as far as memory lasts."""
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    per_job = (3 if place else 1) << 30
    return max(1, min(2 * len(os.sched_getaffinity(0)), memory // per_job))


def tell(done: Done) -> None:
    verdict = "FAILED" if done.status else "ok"
    end = how_it_ended(done.status) if done.status else done.last_line()
    times = f"{done.seconds:5.0f} s, CPU {done.cpu:4.0f} s"
    print(f"{verdict:<7}{done.job.name:<28}{times}   {end}", flush=True)
    if done.status:
        print(done.output, flush=True)


# -- what took how long


def expected(job: Job, known: dict[str, float]) -> float:
    """Seconds: the longest job begins first."""
    return known.get(job.name, job.guess)


def known_durations() -> dict[str, float]:
    try:
        durations: dict[str, float] = json.loads(DURATIONS.read_text())
    except (OSError, ValueError):
        return {}
    return durations


def remember(durations: dict[str, float]) -> None:
    DURATIONS.write_text(json.dumps(durations, indent=1))


if __name__ == "__main__":
    sys.exit(main())
