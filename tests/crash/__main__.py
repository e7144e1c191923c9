"""python -m tests.crash [--all | --match TEXT]: runs the crash matrix in guests, prints the table.

Without either a selection is run.  `--share K/N` runs the K-th of N shares, in one guest; without it there
are as many as CPUs, side by side.  Exit status: 0 where no case found a violation, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from typing import Any

from tests.bed.boot import GUEST_DIED
from tests.bed.guest import ROOT, STATE
from tests.bed.places import NAMES, choose
from tests.bed.shell import how_it_ended

SELECTION = 12  # one of twelve cases: more than 60
DISK_MIB = 4096

GUESTS = [name for name in NAMES if name != "here"]

Row = dict[str, Any]


def main() -> int:
    options = parser().parse_args()
    every = options.every or (1 if options.all or options.match else SELECTION)
    place = choose(options.where).name
    chosen, parts = options.share
    shares = [Share(place, part, parts, every, options.match) for part in chosen]
    for share in shares:
        share.start()
    for share in shares:
        share.join()
    rows = [row for share in shares for row in share.rows]
    print(table(rows))
    problems = [share.problem for share in shares if share.problem]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems or any(row["violations"] for row in rows) else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--all", action="store_true", help="all cases")
    parser.add_argument("--every", type=int, metavar="N", help="one of N cases")
    parser.add_argument("--match", default="", metavar="TEXT", help="of those with TEXT in their name")
    parser.add_argument(
        "--share", type=share, default=all_shares(), metavar="K/N", help="only one of N shares"
    )
    parser.add_argument("--where", choices=["guest", *GUESTS], default="guest", help="which kind of guest")
    return parser


def share(text: str) -> tuple[list[int], int]:
    """The parts that are run, from 0 on, and how many there are."""
    number, _, parts = text.partition("/")
    return [int(number) - 1], int(parts)


def all_shares() -> tuple[list[int], int]:
    parts = len(os.sched_getaffinity(0))
    return list(range(parts)), parts


class Share(threading.Thread):
    """The cases of one guest, which is booted again whenever a case has stopped its kernel."""

    def __init__(self, place: str, part: int, parts: int, every: int, match: str) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self.problem = ""
        self._disks = f"crash-{os.getpid()}-{part}"
        python = sys.executable
        boot = [python, "-m", "tests.bed.boot", "--where", place, "--disk-file", self._disks, "--keep"]
        boot += ["--disk-size", str(DISK_MIB), "--deadline", "7200"]
        self._argv = [*boot, "--", python, "-m", "tests.crash.cases", *map(str, (part, parts, every)), match]

    def run(self) -> None:
        try:
            while self._boot():
                pass
        finally:
            for image in STATE.glob(f"{self._disks}-*.img"):
                image.unlink()

    def _boot(self) -> bool:
        """One guest's life; True where a case has ended it as it should and there is more to do."""
        said: list[str] = []
        dies = False
        pipe, out = subprocess.PIPE, subprocess.STDOUT
        with subprocess.Popen(self._argv, cwd=ROOT, stdout=pipe, stderr=out, text=True) as guest:
            for line in guest.stdout or ():
                if line.startswith("{"):
                    row = json.loads(line)
                    dies = "dies" in row
                    if not dies:
                        self._tell(row)
                else:
                    said.append(line)
        if guest.returncode == GUEST_DIED and dies:
            return True
        if guest.returncode:
            self.problem = f"a guest ended ({how_it_ended(guest.returncode)}):\n" + "".join(said)
        return False

    def _tell(self, row: Row) -> None:
        self.rows.append(row)
        verdict = "; ".join(row["violations"]) or ("good" if row["reached"] else "good (ended before)")
        print(f"{row['name']}: {verdict}", flush=True)


def table(rows: list[Row]) -> str:
    """A line for each flow, a column for each way to be killed: cases, and how many found a violation."""
    ways = sorted({row["how"] for row in rows})
    cells: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        cells[row["flow"], row["how"]].append(row)
    flows = list(dict.fromkeys(row["flow"] for row in rows))
    lines = [f"{'flow':<26}" + "".join(f"{way:>14}" for way in ways)]
    for flow in flows:
        lines.append(f"{flow:<26}" + "".join(f"{cell(cells[flow, way]):>14}" for way in ways))
    bad = sum(bool(row["violations"]) for row in rows)
    early = sum(not row["reached"] for row in rows)
    return "\n".join([*lines, f"{len(rows)} cases, {bad} with violations; in {early} the flow ended before"])


def cell(rows: list[Row]) -> str:
    bad = sum(bool(row["violations"]) for row in rows)
    return f"{len(rows)} / {bad}" if rows else "-"


if __name__ == "__main__":
    sys.exit(main())
