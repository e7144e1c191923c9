"""What `check` finds: a problem, why it matters, and the command that fixes it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from localdisk.frozen import frozen


@frozen
class Finding:
    """One problem.  A hint is possibly no problem, and does not change the exit code."""

    what: str
    why: str  # why it matters
    fix: str  # a command for root's shell, or what to write into which file
    is_hint: bool = False


def write_command(path: str, lines: Iterable[str], mode: str) -> str:
    """The command that writes these lines to the file `path`, owned by root; an old file is replaced."""
    text = " ".join(map(shlex.quote, lines))
    return f"printf '%s\\n' {text} | install -D -o root -g root -m {mode} /dev/stdin {shlex.quote(path)}"
