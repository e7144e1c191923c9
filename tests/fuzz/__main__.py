"""Fuzz every parser:  python -m tests.fuzz [--seconds N] [--seed N] [--target NAME [--input FILE]]

Prints a line for each parser: inputs, how many were refused, crashes, the slowest input.  An input that
crashes one is written to .fuzz/ and printed; then the exit code is 1.  With atheris installed, each parser
gets half of its time from it, which goes by coverage.  With --input, the parser gets that one input, and a
crash is raised as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.mutate import mutated

if "--by-coverage" in sys.argv:
    import atheris

    with atheris.instrument_imports(include=["localdisk"], enable_loader_override=False):
        from tests.fuzz.targets import TARGETS, Target, judge
else:
    from tests.fuzz.targets import TARGETS, Target, judge

FOUND = Path(".fuzz")


@dataclass
class Tally:
    inputs: int = 0
    refused: int = 0
    crashes: int = 0
    slowest: float = 0.0
    told: set[str] = field(default_factory=set)  # one input of each kind of crash is kept

    def add(self, target: Target, data: bytes) -> None:
        outcome = judge(target, data)
        self.inputs += 1
        self.refused += outcome.refused
        self.slowest = max(self.slowest, outcome.seconds)
        if outcome.crash:
            self.crashes += 1
            if outcome.crash not in self.told:
                self.told.add(outcome.crash)
                keep(target, data, outcome.crash)


def keep(target: Target, data: bytes, crash: str) -> None:
    FOUND.mkdir(exist_ok=True)
    path = FOUND / f"{target.name.replace(' ', '-')}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    again = shlex.join([sys.executable, "-m", "tests.fuzz", "--target", target.name, "--input", str(path)])
    print(f"{target.name}: {crash[:300]}\n    {again}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=60, help="for all parsers together")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--target", choices=[target.name for target in TARGETS], help="only this one")
    parser.add_argument("--input", type=Path, help="run the parser of --target with this file only")
    parser.add_argument("--by-coverage", metavar="TALLY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    targets = [target for target in TARGETS if arguments.target in (None, target.name)]
    if arguments.input:
        print(targets[0].read(arguments.input.read_bytes()))
        return 0
    share = arguments.seconds / len(targets)
    if arguments.by_coverage:
        return by_coverage(targets[0], share, arguments.seed, Path(arguments.by_coverage))
    print(f"seed {arguments.seed}")
    print(f"{'parser':20} {'inputs':>8} {'refused':>8} {'crashes':>8} {'slowest':>10}")
    total = Tally()
    for target in targets:
        tally = by_mutation(target, share, arguments.seed)
        print(row(target.name, tally), flush=True)
        for each in ("inputs", "refused", "crashes"):
            setattr(total, each, getattr(total, each) + getattr(tally, each))
        total.slowest = max(total.slowest, tally.slowest)
    print(row("all", total))
    return 1 if total.crashes else 0


def row(name: str, tally: Tally) -> str:
    counts = f"{tally.inputs:8} {tally.refused:8} {tally.crashes:8}"
    return f"{name:20} {counts} {tally.slowest * 1000:7.1f} ms"


def by_mutation(target: Target, seconds: float, seed: int) -> Tally:
    """Half of the time with mutations; the other half goes by coverage where that can be had."""
    has_atheris = importlib.util.find_spec("atheris") is not None
    rng, tally = random.Random(f"{seed} {target.name}"), Tally()
    end = time.monotonic() + seconds / (2 if has_atheris else 1)
    for data in target.seeds:
        tally.add(target, data)
    while time.monotonic() < end:
        tally.add(target, mutated(rng, target.seeds, target.words))
    if has_atheris:
        with tempfile.NamedTemporaryFile("r") as file:
            words = ["--seconds", str(seconds / 2), "--seed", str(seed), "--target", target.name]
            argv = [sys.executable, "-m", "tests.fuzz", *words, "--by-coverage", file.name]
            done = subprocess.run(argv, check=False, capture_output=True, text=True)
            counts = file.read().split()
            sys.stderr.write("".join(f"{line}\n" for line in done.stderr.splitlines() if ".fuzz/" in line))
        if done.returncode or len(counts) != 4:
            print(done.stderr[-2000:], file=sys.stderr)
            tally.crashes += 1
        else:
            tally.inputs += int(counts[0])
            tally.refused += int(counts[1])
            tally.crashes += int(counts[2])
            tally.slowest = max(tally.slowest, float(counts[3]))
    return tally


def by_coverage(target: Target, seconds: float, seed: int, file: Path) -> int:
    """atheris, in a process of its own: it never returns."""
    tally, end = Tally(), time.monotonic() + seconds

    def one(data: bytes) -> None:
        tally.add(target, data)
        if time.monotonic() > end:
            file.write_text(f"{tally.inputs} {tally.refused} {tally.crashes} {tally.slowest}")
            sys.stderr.flush()
            os._exit(0)

    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(target.seeds):
            (Path(corpus) / str(number)).write_bytes(data)
        options = [f"-seed={seed % 2**31 + 1}", f"-max_total_time={int(seconds) + 60}", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *options, corpus], one)
        atheris.Fuzz()
    return 1


if __name__ == "__main__":
    sys.exit(main())
