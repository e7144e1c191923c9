"""What needs no kernel of our own: starts of the program that touch no disk, and its size."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.bed import host
from tests.bench.measure import BARE, alternate, row, timed

FILE = host.ROOT / "dist/localdisk"
MANY_ROUNDS = 60


def main(_words: Sequence[str]) -> None:
    row("size of dist/localdisk", FILE.stat().st_size / 1e6, "MB", "12")
    with tempfile.TemporaryDirectory() as directory:
        link = Path(directory, "after_disk_prepare", "50_localdisk")
        link.parent.mkdir()
        link.symlink_to(FILE)
        against_bare("hook run without the property / bare interpreter", str(link), limit="1.3")
    against_bare("localdisk --version / bare interpreter", str(FILE), "--version", limit="1.8")


def against_bare(what: str, *argv: str, limit: str) -> None:
    timed(argv)  # extracts, the first time
    bare, ours = alternate(lambda: timed(BARE), lambda: timed(argv), rounds=MANY_ROUNDS)
    row(what, ours / bare, f"{ours * 1e3:.1f} ms", limit)
