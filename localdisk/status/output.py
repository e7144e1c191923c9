"""The mode status: prints a snapshot as a table, once or every second, or as JSON.

The JSON is described by `schema/status.schema.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator

from localdisk.config import Config
from localdisk.errors import Error
from localdisk.frozen import plain_values
from localdisk.status import snapshot, table
from localdisk.status.snapshot import Snapshot
from localdisk.status.table import Look

INTERVAL = 1.0  # seconds between two frames

ENTER, LEAVE = "\033[?1049h\033[?25l", "\033[?25h\033[?1049l"  # another screen without cursor; and back
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\033[H", "\033[K", "\033[J"


def as_json(found: Snapshot) -> str:
    return json.dumps({"version": 1, **plain_values(found)}, indent=2) + "\n"


def as_table(found: Snapshot, full: bool = False) -> str:
    """The table for standard output: as wide as the terminal, in colour on a terminal without NO_COLOR."""
    return table.render(found, _look(full))


def _look(full: bool = False) -> Look:
    if not sys.stdout.isatty():
        return Look(full=full)
    # https://no-color.org: any value but the empty one counts
    colours = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Look(shutil.get_terminal_size((table.WIDTH, 24)).columns, colours, full)


def frames(config: Config, full: bool) -> Iterator[str]:
    """For each new snapshot, the text that draws its table over the one before without flicker."""
    while True:
        look, (_, height) = _look(full), shutil.get_terminal_size((table.WIDTH, 24))
        lines = [f"localdisk status, {time.strftime('%H:%M:%S')}, Ctrl-C ends", "", *_lines(config, look)]
        if len(lines) > height:
            lines = [*lines[: height - 1], f"… {len(lines) - height + 1} more lines"]
        yield _HOME + "\n".join(line + _CLEAR_LINE for line in lines) + _CLEAR_BELOW


def _lines(config: Config, look: Look) -> list[str]:
    """The table, or the error: the next snapshot may succeed."""
    try:
        return table.render(snapshot.take(config), look).splitlines()
    except Error as error:
        return str(error).splitlines()
