"""What `check` finds: a problem, why it matters, and the command that fixes it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from localdisk.frozen import frozen


@frozen
class Finding:
    """One problem; a hint may be none, and does not count."""

    what: str
    why: str
    fix: str  # a command for root's shell, or what to write where
    is_hint: bool = False


def write_command(path: str, lines: Iterable[str], mode: str) -> str:
    """The command that makes these lines the file `path`, root's, whatever is there now."""
    text = " ".join(map(shlex.quote, lines))
    return f"printf '%s\\n' {text} | install -D -o root -g root -m {mode} /dev/stdin {shlex.quote(path)}"
