"""The way of the data as swimlanes: who ran what as whom in one start and one stop, from a trace.

A start from a kept disk copies nothing, so its picture has no data.

All that is drawn was measured; between two hook points, time is cut out.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.pictures import svg

WIDTH, LEFT, RIGHT, PAD = 1000, 132, 984, 16
CUT, CUT_EMPTY = 78, 30  # pixels of time cut out, with and without calls of libvirt
LANES = {"vdsm": 62, "hook": 58, "helper": 58, "lvm": 56, "disk": 30, "data": 84}
LABELS = {
    "vdsm": ("vdsm", "user vdsm", "and libvirt"),
    "hook": ("localdisk hook", "user vdsm", "reads images"),
    "helper": ("localdisk helper", "root", "reads no image"),
    "lvm": ("LVM", "root"),
    "disk": ("local disk",),
    "data": ("data", "to the local disk"),
}
SUDO = 20  # pixels between the two halves
TOP, GAP, BAR = 96, 6, 15
NUMBER = 6.6  # pixels of a character in the list of commands
MIB = 1 << 20

_STYLE = """\
text{font-size:11px}
.title{font-size:15px;font-weight:bold}
.name{font-size:12px;font-weight:bold}
.faint{fill:#8b949e}
.lane{fill:#0d1117}
.user-vdsm{fill:#1f6feb}
.user-root{fill:#bd561d}
.on{fill:#fff}
.number{font-weight:bold;text-anchor:middle}
.middle{text-anchor:middle}
.updating{fill:#9e6a03}
.ready{fill:#238636}
.kept{fill:#6e7681}
.look{opacity:.6}
.paper{fill:#161b22}
.data{fill:#238636;opacity:.55}
.told{fill:#7ee787}
.tick{stroke:#30363d}
.sudo{stroke:#ff7b72;stroke-dasharray:6 4}
.sudoword{fill:#ff7b72}
.box{fill:#0d1117;stroke:#30363d}
.arrow{fill:#8b949e}
"""


@dataclass(frozen=True)
class Step:
    """One program in one process, in milliseconds since the trace began."""

    pid: int
    user: str
    argv: tuple[str, ...]
    start: int
    end: int

    @property
    def point(self) -> str:
        """The hook point that it serves, "" where it is no hook."""
        return next((Path(word).parent.name for word in self.argv if "/vdsm/hooks/" in word), "")

    @property
    def lane(self) -> str:
        tool = Path(self.argv[0]).name
        if self.point or tool in ("setpriv", "qemu-img"):
            return "hook"
        if tool == "virsh":
            return "helper" if "--readonly" in self.argv else "vdsm"
        return "lvm" if tool.startswith(("lv", "vg", "pv")) else "helper"

    @property
    def is_half(self) -> bool:
        """It is the program itself, not a tool that it runs."""
        return bool(self.point) or (self.argv[-1] == "helper" and self.argv[0] != "sudo")


@dataclass(frozen=True)
class Piece:
    """A stretch of time and where it is drawn; `point`: the hook point, "" where time is cut out."""

    start: int
    end: int
    left: float
    right: float
    point: str


def picture(title: str, **scene: Any) -> str:
    """The SVG of a trace of record.py."""
    return _Way(title, scene).document()


def steps(spans: Sequence[Mapping[str, Any]]) -> tuple[Step, ...]:
    """In their order; what only runs another program, as setpriv does, is one with it.

    What runs a hook is vdsm's part, which the bed plays, and is left out; so is all after the last hook.
    """
    found: list[Step] = []
    for span in sorted(spans, key=lambda span: (span["start"], span["end"])):
        step = Step(span["pid"], span["user"], tuple(span["argv"]), span["start"], span["end"])
        before = next((old for old in found if old.pid == step.pid), None)
        if before and before.point and before.point == step.point:
            found[found.index(before)] = step
        elif before and before.argv[-len(step.argv) :] == step.argv:
            found[found.index(before)] = Step(before.pid, step.user, before.argv, before.start, step.end)
        else:
            found.append(step)
    last = max((step.end for step in found if step.point), default=0)
    return tuple(step for step in found if step.start <= last)


def pieces(found: Sequence[Step]) -> tuple[Piece, ...]:
    """The hook points to one scale, what lies between them cut out, from LEFT to RIGHT."""
    points = [step for step in found if step.point]
    borders = [found[0].start, *(time for step in points for time in (step.start, step.end))]
    stretches = list(zip(borders, borders[1:]))
    cuts = [
        CUT if any(start <= s.start < end and s.lane == "vdsm" for s in found) else CUT_EMPTY
        for start, end in stretches[::2]
    ]
    scale = (RIGHT - LEFT - sum(cuts)) / sum(step.end - step.start for step in points)
    made: list[Piece] = []
    x: float = LEFT
    for number, (start, end) in enumerate(stretches):
        width = (end - start) * scale if number % 2 else cuts[number // 2]
        made.append(Piece(start, end, x, x + width, points[number // 2].point if number % 2 else ""))
        x += width
    return tuple(made)


def shown(argv: Sequence[str], names: Mapping[str, str]) -> str:
    """A command line with ids replaced by what they are, and long words cut short."""
    text = " ".join(word if len(word) <= 70 else f"{word[:60]}…" for word in (Path(argv[0]).name, *argv[1:]))
    for value, name in names.items():
        text = text.replace(value, f"<{name}>")
    return re.sub("SOURCE_[0-9a-f]{32}", "SOURCE_<fingerprint>", text)


class _Way:
    def __init__(self, title: str, scene: Mapping[str, Any]) -> None:
        self._title = title
        self._steps = steps(scene["spans"])
        self._pieces = pieces(self._steps)
        self._samples, self._files, self._size = scene["samples"], scene["files"], scene["size"]
        self._where = scene["where"]
        self._names = {value: name for name, value in scene["ids"].items()}
        self._commands: dict[str, list[Step]] = {}
        for step in self._steps:
            if step.lane != "vdsm" and not step.is_half:
                self._commands.setdefault(shown(step.argv, self._names), []).append(step)
        self._tops: dict[str, float] = {}
        y: float = TOP
        self._copies = any("convert" in step.argv for step in self._steps)
        for lane in self._lane_names():
            y += SUDO if lane == "helper" else 0
            self._tops[lane] = y
            y += LANES[lane] + GAP
        self._below = y

    def document(self) -> str:
        body = [*self._head(), *self._lanes(), *self._bars(), *self._disk()]
        if self._copies:
            body += [*self._data(), *self._flow(self._below + 8)]
        commands, bottom = self._list(self._below + (112 if self._copies else 24))
        return svg.document(WIDTH, bottom, self._title, _STYLE, [*body, *commands])

    def _lane_names(self) -> list[str]:
        return [lane for lane in LANES if lane != "data" or self._copies]

    def _x(self, time: int) -> float:
        piece = next((piece for piece in self._pieces if time <= piece.end), self._pieces[-1])
        share = (min(time, piece.end) - piece.start) / max(1, piece.end - piece.start)
        return round(piece.left + max(0.0, share) * (piece.right - piece.left), 1)

    # -- the frame

    def _head(self) -> Iterator[str]:
        yield svg.text(PAD, 28, self._title, "title")
        yield svg.text(PAD, 48, f"Measured {self._where}.", "faint")
        for piece in self._pieces:
            if piece.point:
                took = f"{piece.end - piece.start:,} ms"
                yield svg.text((piece.left + piece.right) / 2, TOP - 24, took, "name middle")
                for time in range(piece.start, piece.end, 1000):
                    yield svg.line(self._x(time), TOP - 8, self._x(time), self._below - GAP, "tick")
                    if piece.right - self._x(time) > 12 or time == piece.start:
                        second = f"{(time - piece.start) // 1000}s"
                        yield svg.text(self._x(time) + 2, TOP - 10, second, "faint")

    def _lanes(self) -> Iterator[str]:
        for lane in self._lane_names():
            top = self._tops[lane]
            yield svg.rect(8, top, WIDTH - 16, LANES[lane], "lane", rx=4, fill_opacity=0.55)
            name, *more = LABELS[lane]
            yield svg.text(PAD, top + 16, name, "name")
            for number, word in enumerate(more):
                yield svg.text(PAD, top + 30 + 13 * number, word, "faint")
        y = self._tops["helper"] - SUDO / 2 - GAP / 2
        yield svg.line(8, y, WIDTH - 8, y, "sudo")
        words = "sudo: a request is a verb, UUIDs and numbers"
        yield svg.rect(LEFT + CUT, y - 7, (len(words) + 2) * NUMBER, 14, "paper")
        yield svg.text(LEFT + CUT + NUMBER, y + 4, words, "sudoword")

    # -- what ran

    def _bars(self) -> Iterator[str]:
        numbers = {step: n for n, same in enumerate(self._commands.values(), 1) for step in same}
        for step in self._steps:
            if step.point:
                yield from self._point(step)
            if step.lane == "lvm":
                yield from self._lvm(step, numbers[step])
            elif step.lane != "vdsm":
                yield from self._bar(step, numbers.get(step))
        yield from self._libvirt()

    def _point(self, step: Step) -> Iterator[str]:
        """vdsm waits for its hook point."""
        left, right, top = self._x(step.start), self._x(step.end), self._tops["vdsm"] + 8
        yield svg.rect(left, top, right - left, 22, f"user-{step.user}", rx=3)
        size = min(11.0, (right - left - 8) / len(step.point) / 0.6)
        yield svg.text(left + 4, top + 15, step.point, "on", style=f"font-size:{size:.1f}px")

    def _lvm(self, step: Step, number: int) -> Iterator[str]:
        """What changes something has its name."""
        left, right, top = self._x(step.start), self._x(step.end), self._tops["lvm"] + 19
        tool = Path(step.argv[0]).name
        looks = " look" if tool == "lvm" else ""
        yield svg.rect(left, top, max(2.0, right - left), BAR, f"user-{step.user}{looks}", rx=2)
        yield svg.text((left + right) / 2, top - 5, str(number), "number on")
        if not looks:
            yield svg.text(min((left + right) / 2, RIGHT - 24), top + BAR + 13, tool, "middle")

    def _bar(self, step: Step, number: int | None) -> Iterator[str]:
        """One of the two halves, or below it a tool that it runs."""
        left, right = self._x(step.start), self._x(step.end)
        is_tool = not step.is_half and step.argv[0] != "sudo"
        top = self._tops[step.lane] + (33 if is_tool else 8)
        yield svg.rect(left, top, max(2.0, right - left), BAR, f"user-{step.user}", rx=2)
        if number:
            yield svg.text((left + right) / 2, top + 11.5, str(number), "number on")
        if is_tool:
            tool = "qemu-img convert" if "convert" in step.argv else Path(step.argv[0]).name
            yield svg.text(right + 5, top + 11.5, tool)

    def _libvirt(self) -> Iterator[str]:
        """What vdsm has libvirt do between the hook points."""
        for piece in self._pieces:
            calls = [s for s in self._steps if s.lane == "vdsm" and piece.start <= s.start < piece.end]
            words = [next(word for word in call.argv[3:] if word.isalpha()) for call in calls]
            if "create" in words:
                words.insert(words.index("create") + 1, "(VM runs)")
            for number, word in enumerate(words):
                middle = (piece.left + piece.right) / 2
                yield svg.text(middle, self._tops["vdsm"] + 14 + 14 * number, word, "middle faint")

    # -- the local disk and its data

    def _disk(self) -> Iterator[str]:
        """Its state, from the commands that change it."""
        top = self._tops["disk"] + 5
        for state, word, since, until in self._states():
            left, right = self._x(since), self._x(until)
            yield svg.rect(left, top, right - left, 20, state, rx=3)
            if right - left > 8 * len(word):  # else there is no room for it
                yield svg.text(left + 6, top + 14, word, "on")

    def _states(self) -> Iterator[tuple[str, str, int, int]]:
        """Each state's style and word, and from when to when the disk has it."""
        changes = [step for step in self._steps if step.lane == "lvm" and step.argv[0] != "lvm"]  # no reports
        if self._copies:
            made, complete, stopped, removed = changes
            assert (made.argv[0], removed.argv[0]) == ("lvcreate", "lvremove")
            assert "UPDATING" in made.argv
            assert "UPDATING" in complete.argv
            assert "DELETING" in stopped.argv
            yield "updating", "UPDATING", made.end, complete.end
            yield "ready", "ready", complete.end, stopped.end
            yield "updating", "DELETING", stopped.end, removed.end
        else:
            used, stopped = changes
            assert "--deltag" in used.argv
            assert any(word.startswith("STOPPED_") for word in stopped.argv)
            yield "kept", "kept", self._pieces[0].start, used.end
            yield "ready", "ready", used.end, stopped.end
            yield "kept", "kept", stopped.end, self._pieces[-1].end

    def _data(self) -> Iterator[str]:
        bottom = self._tops["data"] + LANES["data"] - 6
        most = max(sample["written"] for sample in self._samples)
        height = LANES["data"] - 18

        def place(sample: Mapping[str, Any]) -> tuple[float, float]:
            return self._x(sample["at"]), round(bottom - height * sample["written"] / most, 1)

        counted = [place(sample) for sample in self._samples if not sample["told"]]
        ready = self._x(next(step.end for step in self._steps if step.argv[0] == "lvchange"))
        last = counted[-1]
        yield svg.polygon([(counted[0][0], bottom), *counted, (ready, last[1]), (ready, bottom)], "data")
        for sample in self._samples:
            if sample["told"]:
                yield svg.circle(*place(sample), 3, "told")
        lines = (
            f"{most / MIB:.0f} MiB written for {self._size / MIB:.0f} MiB",
            "of disk, the rest is zeros",
            "● told to the helper, for status",
        )
        for number, words in enumerate(lines):
            y = self._tops["data"] + 22 + 16 * number
            yield svg.text(ready + 10, y, words, "faint" if number else "")

    def _flow(self, top: float) -> Iterator[str]:
        """What qemu-img had open: from where to where the data went."""
        read = [path for path, is_written in self._files.items() if not is_written]
        (written,) = (path for path, is_written in self._files.items() if is_written)
        convert = next(step for step in self._steps if "convert" in step.argv)
        took = f"user {convert.user}, {convert.end - convert.start:,} ms"
        boxes = (
            (8, 330, "shared storage: open for reading", [self._short(path) for path in read]),
            (372, 224, "qemu-img convert", [took, "all layers in one pass"]),
            (630, 362, "local disk: open for writing", [self._short(written), "one raw block device"]),
        )
        for left, width, name, lines in boxes:
            yield svg.rect(left, top, width, 70, "box", rx=4)
            yield svg.text(left + 10, top + 20, name, "name")
            for number, words in enumerate(lines):
                yield svg.text(left + 10, top + 40 + 16 * number, words, "faint")
            if left > 8:
                tip = (left - 6, top + 35)
                yield svg.polygon([(left - 22, top + 29), tip, (left - 22, top + 41)], "arrow")

    def _short(self, path: str) -> str:
        """Of a path to an image its end; ids are named or cut short."""
        text = path if path.startswith("/dev") else "…/" + "/".join(Path(path).parts[-3:])
        for value, name in self._names.items():
            text = text.replace(value, f"<{name}>")
        return re.sub(r"([0-9a-f]{8})-[0-9a-f-]{27}", r"\1…", text)

    # -- the commands

    def _list(self, top: float) -> tuple[list[str], float]:
        """The numbered command lines, and where the picture ends."""
        body = [svg.text(PAD, top, "Every command that was run", "name")]
        y = top + 20
        for number, (command, found) in enumerate(self._commands.items(), 1):
            times = sorted(step.end - step.start for step in found)
            took = f"{times[0]} ms" if len(times) == 1 else f"{len(times)}× {times[0]}–{times[-1]} ms"
            body.append(svg.text(PAD + 8, y, str(number), "number"))
            body.append(svg.text(PAD + 24, y, " ".join(sorted({step.user for step in found})), "name"))
            body.append(svg.text(PAD + 64, y, took, "faint"))
            for line in textwrap.wrap(command, 118, break_on_hyphens=False, break_long_words=False):
                body.append(svg.text(PAD + 180, y, line))
                y += 15
            y += 3
        return body, y + 6
