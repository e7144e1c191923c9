"""Reads on standard input what record.py prints, and writes docs/*.svg; every other line is passed on.

bed ... -m tests.pictures.record | python -m tests.pictures.draw
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.pictures import terminal, way

DOCS = Path(__file__).resolve().parents[2] / "docs"
MARK = "PICTURE "
TITLES = {
    "status": "localdisk status on a terminal",
    "watch": "localdisk status --watch during two copies",
    "way": "One start and one stop of a VM with one disk, as traced",
    "restart": "One start from a kept disk, and one stop that keeps it, as traced",
}
TRACES = ("way", "restart")


def main() -> int:
    drawn = {name: write(name, scene) for name, scene in scenes(sys.stdin)}
    missing = TITLES.keys() - drawn.keys()
    if missing:
        print(f"pictures: not recorded: {' '.join(sorted(missing))}", file=sys.stderr)
    return bool(missing)


def scenes(lines: Iterable[str]) -> Iterable[tuple[str, Any]]:
    """Each scene by its name."""
    for line in lines:
        if line.startswith(MARK):
            scene = json.loads(line[len(MARK) :])
            yield scene.pop("scene"), scene
        else:
            print(line, end="", flush=True)


def write(name: str, scene: Any) -> Path:
    path = DOCS / f"{name}.svg"
    DOCS.mkdir(exist_ok=True)
    picture = way.picture if name in TRACES else terminal.picture
    path.write_text(picture(TITLES[name], **scene))
    print(f"{path.relative_to(DOCS.parent)}: {path.stat().st_size} bytes", flush=True)
    return path


if __name__ == "__main__":
    sys.exit(main())
