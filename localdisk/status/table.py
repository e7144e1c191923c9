"""A snapshot as text for a terminal: disks, templates, copies, room, problems.

Pure functions: width and colours are arguments.  Colours carry no information that the text lacks.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from localdisk.errors import plain
from localdisk.frozen import frozen
from localdisk.status.snapshot import CacheUse, Copy, Group, Pool, Row, Snapshot, TemplateRow
from localdisk.units import format_duration, format_size
from localdisk.volumes import progress

WIDTH = 100  # columns if there is no terminal
BAR = 16  # columns of a bar
SHORT = 8  # characters of a UUID
_FILLED = (progress.COPYING, progress.STALLED)
_SHOW_METADATA = 50  # percent: a group's metadata area is shown only if it is fuller

_GREEN, _YELLOW, _RED, _CYAN, _DIM, _BOLD = "32", "33", "31", "36", "2", "1"
_COLOURS = {
    "running": _GREEN,
    "active": _GREEN,
    "copying": _CYAN,
    "stalled": _YELLOW,
    "waiting": _CYAN,
    "making_room": _CYAN,
    "preparing": _CYAN,
    "unfinished": _YELLOW,
    "deleting": _YELLOW,
}
_HEAD = ("VM", "DISK", "SIZE", "USED", "BACKEND", "STATE", "NEXT")
_TEMPLATES = ("TEMPLATE", "LV", "SIZE", "HOLDS", "BACKEND", "LAST USED", "STATE", "NEXT")
_RIGHT = {"SIZE", "USED", "HOLDS"}
_MAY_BE_EMPTY = {"USED", "LV"}


@frozen
class Look:
    """How to show it; `full`: whole ids and names, even if a line is wider than `width`."""

    width: int = WIDTH
    colours: bool = False
    full: bool = False

    def paint(self, text: str, colour: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if self.colours and colour else text


def render(snapshot: Snapshot, look: Look) -> str:
    """The whole text.  No line is wider than `look.width`, except if ids or a fix need it."""
    parts = [_disks(snapshot, look), _templates(snapshot, look), [*_bars(snapshot, look)]]
    parts += [[*_room(snapshot.volume_groups, look), *_uncached(snapshot, look)]]
    parts += [[*_problems(snapshot, look)], [*_wrapped("not seen: ", snapshot.unseen, look)]]
    return "\n".join("\n".join(part) + "\n" for part in parts if part)


# -- disks


def _disks(snapshot: Snapshot, look: Look) -> list[str]:
    rows = _sorted(snapshot.disks)
    if not rows:
        return ["no local disks"]
    cells = [_cells(row, snapshot.at, look) for row in rows]
    return [*_grid(_HEAD, cells, [row.state for row in rows], look), *_older(rows, look)]


def _older(rows: Iterable[Row], look: Look) -> Iterator[str]:
    """How to decide about the disks of vdsm's older hook."""
    count = sum(row.older for row in rows)
    if count:
        text = f"{count} of vdsm's older hook: set retention.older_disks to as_ours, or localdisk remove DISK"
        yield from _wrapped("", [text], look)


def _grid(
    head: tuple[str, ...], cells: Sequence[tuple[str, ...]], states: Sequence[str], look: Look
) -> list[str]:
    """Rows of `cells` below their head; if they are too wide, the first column is shortened."""
    used = [i for i, name in enumerate(head) if name not in _MAY_BE_EMPTY or any(row[i] for row in cells)]
    widths = {i: max(columns(row[i]) for row in [head, *cells]) for i in used}
    if "copying" in states:
        state = head.index("STATE")
        widths[state] = max(widths[state], len("copying 100%"))  # otherwise columns would jump
    spare = look.width - sum(widths.values()) - 2 * (len(used) - 1)
    if spare < 0 and not look.full:
        widths[0] = max(SHORT, widths[0] + spare)
    rights = {i for i in used if head[i] in _RIGHT}

    def line(row: Sequence[str]) -> str:
        return "  ".join(_fitted(row[i], widths[i], i in rights) for i in used).rstrip()

    painted = (_painted(line(row), state, look) for row, state in zip(cells, states))
    return [look.paint(line(head), _BOLD), *painted]


def _sorted(rows: Iterable[Row]) -> list[Row]:
    """The rows of VMs that have a name first."""
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
    if row.state in _FILLED:
        return _copying(row.state, row.copy)
    if row.state == "stopped" and row.stopped is not None:
        return f"stopped {format_duration(max(0, now - row.stopped))}"
    return row.state


def _copying(state: str, copy: Copy | None) -> str:
    return f"{state} {int(copy.done * 100)}%" if copy else state


def _fitted(text: str, width: int, is_right: bool) -> str:
    text = cut(text, width)
    wide = columns(text) - len(text)  # 0 but for characters that take no column, or two
    return text.rjust(width - wide) if is_right else text.ljust(width - wide)


def cut(text: str, width: int) -> str:
    """The text, or its beginning with an ellipsis, in at most `width` columns."""
    if columns(text) <= width:
        return text
    while text and columns(text) >= width:
        text = text[:-1]
    return f"{text}…"


def columns(text: str) -> int:
    """How many columns of a terminal a text takes: a wide character two, a combining character none."""
    if text.isascii():
        return len(text)
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _painted(line: str, state: str, look: Look) -> str:
    """The line with its state in colour."""
    before, found, after = line.rpartition(f"  {state}")
    return (
        f"{before}  {look.paint(state, _COLOURS.get(state, ''))}{after}" if found and look.colours else line
    )


# -- templates


def _templates(snapshot: Snapshot, look: Look) -> list[str]:
    rows = snapshot.templates
    cells = [_template_cells(row, snapshot.at, look) for row in rows]
    return _grid(_TEMPLATES, cells, [row.state for row in rows], look) if rows else []


def _template_cells(row: TemplateRow, now: int, look: Look) -> tuple[str, ...]:
    used = "-" if row.last_used is None else f"{format_duration(max(0, now - row.last_used))} ago"
    return (
        row.volume if look.full else row.volume[:SHORT],
        row.name if look.full else "",
        format_size(row.size),
        format_size(row.holds),
        row.backend or "-",
        used,
        _copying(row.state, row.copy) if row.state in _FILLED else row.state,
        row.next.text,
    )


# -- copies, room


def _bars(snapshot: Snapshot, look: Look) -> Iterator[str]:
    for row in _sorted(snapshot.disks):
        name = plain(row.vm_name) or row.vm[:SHORT]
        yield from _copy_bar(row.copy, row.size, f"{cut(name, 30)} {row.volume[:SHORT]}", look)
    for each in snapshot.templates:
        yield from _copy_bar(each.copy, each.size, f"template {each.volume[:SHORT]}", look)


def _copy_bar(copy: Copy | None, size: int, name: str, look: Look) -> Iterator[str]:
    if copy and copy.phase == progress.COPYING:
        bar, share = look.paint(_bar(copy.done), _CYAN), f"{int(copy.done * 100):3}%"
        yield f"{bar} {share} of {format_size(size)}  {progress.pace(copy.rate, copy.seconds_left)}  {name}"


@frozen
class _Gauge:
    """How full something is; `limit`: the share from which on no new disk is made."""

    name: str
    share: float
    limit: float
    words: str
    may_be_full: bool = False

    @property
    def colour(self) -> str:
        if self.may_be_full or self.share < 0.9 * self.limit:
            return _GREEN
        return _RED if self.share >= self.limit else _YELLOW


def _room(groups: Sequence[Group], look: Look) -> Iterator[str]:
    gauges = [gauge for group in groups for gauge in _gauges(group)]
    width = max((len(gauge.name) for gauge in gauges), default=0)
    for gauge in gauges:
        bar = look.paint(_bar(gauge.share, gauge.limit), gauge.colour)
        yield f"{gauge.name.ljust(width)}  {bar} {gauge.words}"


def _gauges(group: Group) -> Iterator[_Gauge]:
    used = 1 - group.free / group.size if group.size else 0.0
    limit = 1 - group.reserve / group.size if group.size else 1.0
    reserve = f" (reserve {format_size(group.reserve)})" if group.reserve else ""
    words = f"{used:.0%} of {format_size(group.size)} used, {format_size(group.free)} free{reserve}"
    words += f", metadata {group.metadata_percent:.0f}%" if group.metadata_percent >= _SHOW_METADATA else ""
    yield _Gauge(f"volume group {group.name}", used, limit, words)
    yield from _cache_gauge(f"cache in {group.name}", group.cache, group.size)
    for pool in group.pools:
        name = f"{group.name}/{pool.name}"
        yield _Gauge(f"pool {name}", (pool.data_percent or 0) / 100, pool.data_limit / 100, _used(pool))
        yield from _cache_gauge(f"cache in {name}", pool.cache, pool.size)


def _cache_gauge(name: str, cache: CacheUse | None, size: int) -> Iterator[_Gauge]:
    """The gauge of a cache; a full cache is no problem: the least recently used template LVs make room."""
    if cache and size:
        words = f"{format_size(cache.used)} of at most {format_size(cache.limit)} used"
        yield _Gauge(name, cache.used / size, cache.limit / size, words, may_be_full=True)


def _uncached(snapshot: Snapshot, look: Look) -> Iterator[str]:
    """How many disks were copied without the cache, and why."""
    if snapshot.uncached:
        often = sorted(snapshot.uncached.items(), key=lambda each: (-each[1], each[0]))
        text = ", ".join(f"{count} {plain(reason)}" for reason, count in often)
        yield from _wrapped("copied without the cache since boot: ", [text], look)


def _used(pool: Pool) -> str:
    if pool.data_percent is None or pool.metadata_percent is None:
        return f"{format_size(pool.size)}, LVM does not report how full it is"
    data = f"{pool.data_percent:.0f}% of {format_size(pool.size)} used (limit {pool.data_limit:g}%)"
    return f"{data}, metadata {pool.metadata_percent:.0f}% ({pool.metadata_limit:g}%)"


def _bar(share: float, limit: float = 1.0) -> str:
    """`[#######---|-]`: the used share, and a mark at the limit."""
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
        yield "      " + look.paint(problem.fix, _BOLD)  # not wrapped, so that it can be copied


def _wrapped(head: str, lines: Iterable[str], look: Look) -> Iterator[str]:
    for line in lines:
        wrapper = textwrap.TextWrapper(look.width, subsequent_indent=" " * 4, break_on_hyphens=False)
        wrapper.break_long_words = False
        yield from wrapper.wrap(head + line)
