"""python -m tests.crash [--all | --match TEXT]: runs the crash matrix in guests, prints the table.

Without both options, a selection is run.  A first guest makes what the flows need and runs each flow once.
Its disks are copied for as many guests as there are CPUs (`--guests`), which share the cases.  Exit status: 0
if no case found a violation, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.bed.boot import GUEST_DIED
from tests.bed.guest import ROOT, STATE
from tests.bed.places import NAMES, choose
from tests.bed.shell import how_it_ended

SELECTION = 18  # one of eighteen cases: some 120
DISK_MIB = 4096

GUESTS = [name for name in NAMES if name != "here"]

Row = dict[str, Any]


def main() -> int:
    options = parser().parse_args()
    every = options.every or (1 if options.all or options.match else SELECTION)
    place = choose(options.where).name
    prepared = Guest(place, f"crash-{os.getpid()}-scene", "prepare", options.match)
    parts = range(options.guests)
    shares = [
        Share(
            place, f"crash-{os.getpid()}-{part}", "run", options.match, str(part), str(len(parts)), str(every)
        )
        for part in parts
    ]
    try:
        prepared.boot()
        if not prepared.problem:
            for share in shares:
                share.take_disks(prepared)
            side_by_side(shares)
    finally:
        for guest in (prepared, *shares):
            guest.remove_disks()
    rows = [row for share in shares for row in share.rows]
    print(table(rows))
    problems = [guest.problem for guest in (prepared, *shares) if guest.problem]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems or any(row["violations"] for row in rows) else 0


def side_by_side(shares: list[Share]) -> None:
    threads = [threading.Thread(target=share.run) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--all", action="store_true", help="all cases")
    parser.add_argument("--every", type=int, metavar="N", help="one of N cases")
    parser.add_argument(
        "--match",
        default="",
        metavar="TEXT",
        help="of those with TEXT, or TEXT|TEXT, in their name",
    )
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("--guests", type=int, default=cpus, metavar="N", help="as many run side by side")
    parser.add_argument("--where", choices=["guest", *GUESTS], default="guest", help="which kind of guest")
    return parser


class Guest:
    """A guest on disks that outlive it, in which tests/crash/cases.py runs with these words."""

    def __init__(self, place: str, disks: str, *words: str) -> None:
        self.rows: list[Row] = []
        self.problem = ""
        self._disks = disks
        python = sys.executable
        boot = [python, "-m", "tests.bed.boot", "--where", place, "--disk-file", disks, "--keep"]
        boot += ["--disk-size", str(DISK_MIB), "--deadline", "7200"]
        self._argv = [*boot, "--", python, "-m", "tests.crash.cases", *words]

    def boot(self) -> bool:
        """One life of the guest; True if a case has ended it as it should and there is more to do."""
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

    def disks(self) -> list[Path]:
        return sorted(STATE.glob(f"{self._disks}-*.img"))

    def remove_disks(self) -> None:
        for image in self.disks():
            image.unlink()

    def _tell(self, row: Row) -> None:
        self.rows.append(row)
        verdict = "; ".join(row["violations"]) or ("good" if row["reached"] else "good (ended before)")
        print(f"{row['name']}: {verdict}", flush=True)


class Share(Guest):
    """A guest for a share of the cases, which is booted again whenever a case has stopped its kernel."""

    def take_disks(self, prepared: Guest) -> None:
        """Copies of the disks of another guest."""
        for image in prepared.disks():
            name = image.name.rpartition("-")[2]
            subprocess.run(["cp", "--sparse=always", image, STATE / f"{self._disks}-{name}"], check=True)

    def run(self) -> None:
        while self.boot():
            pass


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
