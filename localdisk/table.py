"""A snapshot as text for a terminal: the disks, the room, what is wrong.

Pure: the width, and whether there may be colours, come in.  Without colours it says the same.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from localdisk import progress
from localdisk.errors import plain
from localdisk.snapshot import Group, Pool, Row, Snapshot
from localdisk.units import format_duration, format_size

WIDTH = 100  # columns, where nobody says how many there are
BAR = 16  # columns of a bar
SHORT = 8  # characters of a UUID

_GREEN, _YELLOW, _RED, _CYAN, _DIM, _BOLD = "32", "33", "31", "36", "2", "1"
_COLOURS = {
    "running": _GREEN,
    "active": _GREEN,
    "copying": _CYAN,
    "waiting": _CYAN,
    "preparing": _CYAN,
    "unfinished": _YELLOW,
    "deleting": _YELLOW,
}
_HEAD = ("VM", "DISK", "SIZE", "USED", "BACKEND", "STATE", "NEXT")
_USED, _VM, _STATE = _HEAD.index("USED"), _HEAD.index("VM"), _HEAD.index("STATE")
_RIGHT = {_HEAD.index("SIZE"), _USED}


@dataclass(frozen=True)
class Look:
    """How it is shown; `full`: whole ids and names, however wide."""

    width: int = WIDTH
    colours: bool = False
    full: bool = False

    def paint(self, text: str, colour: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if self.colours and colour else text


def render(snapshot: Snapshot, look: Look) -> str:
    """Every line ends with a newline; none is wider than `look.width` but where the ids need it."""
    parts = [_disks(snapshot, look), [*_bars(snapshot.disks, look)], [*_room(snapshot.volume_groups, look)]]
    parts += [[*_problems(snapshot, look)], [*_wrapped("not seen: ", snapshot.unseen, look)]]
    return "\n".join("\n".join(part) + "\n" for part in parts if part)


# -- disks


def _disks(snapshot: Snapshot, look: Look) -> list[str]:
    rows = _sorted(snapshot.disks)
    if not rows:
        return ["no local disks"]
    cells = [_cells(row, snapshot.at, look) for row in rows]
    columns = [i for i, _ in enumerate(_HEAD) if i != _USED or any(row[i] for row in cells)]
    widths = {i: max(len(row[i]) for row in [_HEAD, *cells]) for i in columns}
    if any(row.state == "copying" for row in rows):
        widths[_STATE] = max(widths[_STATE], len("copying 100%"))  # or columns would jump
    spare = look.width - sum(widths.values()) - 2 * (len(columns) - 1)
    if spare < 0 and not look.full:
        widths[_VM] = max(SHORT, widths[_VM] + spare)
    head = look.paint(_line(_HEAD, columns, widths), _BOLD)
    return [head, *(_painted(_line(row, columns, widths), each, look) for row, each in zip(cells, rows))]


def _sorted(rows: Iterable[Row]) -> list[Row]:
    """Those of VMs that have a name first."""
    return sorted(rows, key=lambda row: (row.vm_name or "~", row.vm, row.disk, row.volume))


def _cells(row: Row, now: int, look: Look) -> tuple[str, ...]:
    name = plain(row.vm_name)
    vm = row.vm if look.full else row.vm[:SHORT]
    volume = row.volume if look.full else row.volume[:SHORT]
    return (
        f"{vm} {name}".strip() or "-",
        f"{volume} {row.disk}".strip(),
        format_size(row.size),
        "" if row.used is None else format_size(row.used),
        row.backend,
        _state(row, now),
        row.next.text,
    )


def _state(row: Row, now: int) -> str:
    if row.state == "copying" and row.copy:
        return f"copying {int(row.copy.done * 100)}%"
    if row.state == "stopped" and row.stopped is not None:
        return f"stopped {format_duration(max(0, now - row.stopped))}"
    return row.state


def _line(cells: Sequence[str], columns: Sequence[int], widths: dict[int, int]) -> str:
    shown = (_fitted(cells[i], widths[i], i in _RIGHT) for i in columns)
    return "  ".join(shown).rstrip()


def _fitted(text: str, width: int, is_right: bool) -> str:
    if len(text) > width:
        text = text[: width - 1] + "…"
    return text.rjust(width) if is_right else text.ljust(width)


def _painted(line: str, row: Row, look: Look) -> str:
    """The state in its colour."""
    colour = _COLOURS.get(row.state, "")
    before, state, after = line.rpartition(f"  {row.state}")
    return f"{before}  {look.paint(row.state, colour)}{after}" if state and look.colours else line


# -- copies, room


def _bars(rows: Sequence[Row], look: Look) -> Iterator[str]:
    for row in _sorted(rows):
        if row.copy and row.copy.phase == progress.COPYING:
            name = plain(row.vm_name) or row.vm[:SHORT]
            bar = look.paint(_bar(row.copy.done), _CYAN)
            pace = progress.pace(row.copy.rate, row.copy.seconds_left)
            share = f"{int(row.copy.done * 100):3}%"
            yield f"{bar} {share} of {format_size(row.size)}  {pace}  {name[:30]} {row.volume[:SHORT]}"


def _room(groups: Sequence[Group], look: Look) -> Iterator[str]:
    lines = [line for group in groups for line in _lines_of(group)]
    width = max((len(name) for name, *_ in lines), default=0)
    for name, share, limit, text in lines:
        colour = _RED if share >= limit else _YELLOW if share >= 0.9 * limit else _GREEN
        yield f"{name.ljust(width)}  {look.paint(_bar(share, limit), colour)} {text}"


def _lines_of(group: Group) -> Iterator[tuple[str, float, float, str]]:
    """Name, the share that is used, the share from where on no disk is made, and words."""
    used = 1 - group.free / group.size if group.size else 0.0
    limit = 1 - group.reserve / group.size if group.size else 1.0
    reserve = f" (reserve {format_size(group.reserve)})" if group.reserve else ""
    words = f"{used:.0%} of {format_size(group.size)} used, {format_size(group.free)} free{reserve}"
    yield f"volume group {group.name}", used, limit, words
    pool = group.pool
    if pool:
        yield (
            f"pool {group.name}/{pool.name}",
            (pool.data_percent or 0) / 100,
            pool.data_limit / 100,
            _used(pool),
        )


def _used(pool: Pool) -> str:
    if pool.data_percent is None or pool.metadata_percent is None:
        return f"{format_size(pool.size)}, does not tell how full it is"
    data = f"{pool.data_percent:.0f}% of {format_size(pool.size)} used (limit {pool.data_limit:g}%)"
    return f"{data}, metadata {pool.metadata_percent:.0f}% ({pool.metadata_limit:g}%)"


def _bar(share: float, limit: float = 1.0) -> str:
    """`[#######---|-]`: used, then where no more is given."""
    filled = round(min(1.0, max(0.0, share)) * BAR)
    bar = "#" * filled + "-" * (BAR - filled)
    mark = round(limit * BAR)
    if filled <= mark < BAR:
        bar = f"{bar[:mark]}|{bar[mark + 1 :]}"
    return f"[{bar}]"


# -- problems


def _problems(snapshot: Snapshot, look: Look) -> Iterator[str]:
    if snapshot.problems:
        count = len(snapshot.problems)
        yield look.paint(f"{count} problem{'s' * (count > 1)}:", _RED)
    for problem in snapshot.problems:
        yield from _wrapped("  ", [problem.what], look)
        yield "      " + look.paint(problem.fix, _BOLD)  # whole: it is there to be copied


def _wrapped(head: str, lines: Iterable[str], look: Look) -> Iterator[str]:
    for line in lines:
        wrapper = textwrap.TextWrapper(look.width, subsequent_indent=" " * 4, break_on_hyphens=False)
        wrapper.break_long_words = False
        yield from wrapper.wrap(head + line)
