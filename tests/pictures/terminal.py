"""What a terminal shows, with its colours, as SVG; several frames take turns.

Understood are the colours that localdisk and tmux use (SGR 0, 1, 2, 22, 30 to 37, 39); every other escape
sequence is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tests.pictures import svg

COLUMN, LINE, SIZE = 7.8, 18, 13  # pixels: of a column, of a line, of the font
PAD = 16
SECONDS = 2  # that a frame is shown

_COLOURS = ("#6e7681", "#ff7b72", "#56d364", "#e3b341", "#79c0ff", "#d2a8ff", "#56d4dd", "#d6dde5")
_STYLE = "".join(f".c{number}{{fill:{colour}}}\n" for number, colour in enumerate(_COLOURS))
_STYLE += f"text{{font-size:{SIZE}px}}\n.bold{{font-weight:bold}}\n.dim{{opacity:.65}}\n"
_SEQUENCE = re.compile(r"\033\[([0-9;?]*)([@-~])|\033[()].|\033[^\[]")


@dataclass(frozen=True)
class Style:
    colour: int | None = None  # 0 to 7
    bold: bool = False
    dim: bool = False

    @property
    def kind(self) -> str:
        named = ((self.bold, "bold"), (self.dim, "dim"), (self.colour is not None, f"c{self.colour}"))
        return " ".join(name for holds, name in named if holds)


@dataclass(frozen=True)
class Run:
    """Text of one style, and the column that it begins in."""

    column: int
    text: str
    style: Style


def picture(title: str, frames: Sequence[str], columns: int) -> str:
    """The SVG of these texts, all of the same terminal."""
    height = 2 * PAD + LINE * max(len(frame.splitlines()) for frame in frames)
    style = _STYLE + (_turns(len(frames)) if len(frames) > 1 else "")
    body = []
    for number, frame in enumerate(frames):
        turn = f' class="frame frame{number}"' if len(frames) > 1 else ""
        body += [f"<g{turn}>", *_drawn(frame), "</g>"]
    return svg.document(2 * PAD + columns * COLUMN, height, title, style, body)


def _turns(count: int) -> str:
    """The first frame is what those see who see nothing move."""
    turns = "".join(f".frame{number}{{animation-delay:{number * SECONDS}s}}\n" for number in range(1, count))
    return f"""\
.frame{{visibility:hidden;animation:turn {count * SECONDS}s step-end infinite}}
.frame0{{visibility:visible}}
{turns}@keyframes turn{{0%{{visibility:visible}}{100 / count:.4f}%{{visibility:hidden}}}}
@media (prefers-reduced-motion:reduce){{.frame{{animation:none}}}}
"""


def _drawn(frame: str) -> Iterator[str]:
    for number, runs in enumerate(parse(frame)):
        for run in runs:
            # Whatever font there is, columns stay where they are.
            width = round(len(run.text) * COLUMN, 1)
            yield svg.text(
                round(PAD + run.column * COLUMN, 1),
                PAD + (number + 0.75) * LINE,
                run.text,
                run.style.kind,
                textLength=width,
                lengthAdjust="spacingAndGlyphs",
            )


def parse(text: str) -> list[list[Run]]:
    """The runs of each line; the style goes on from one line to the next."""
    style, lines = Style(), []
    for line in text.replace("\r\n", "\n").split("\n"):
        runs, style = _parse_line(line, style)
        lines.append(runs)
    return lines


def _parse_line(line: str, style: Style) -> tuple[list[Run], Style]:
    runs: list[Run] = []
    column = at = 0
    for found in [*_SEQUENCE.finditer(line), None]:
        piece = line[at : found.start() if found else len(line)]
        runs += _split(piece, column, style)
        column += len(piece)
        if found:
            at = found.end()
            style = _changed(style, found[1]) if found[2] == "m" else style
    return runs, style


def _split(piece: str, column: int, style: Style) -> Iterator[Run]:
    """Words with what is more than one space between them apart."""
    for found in re.finditer(r"\S+(?: \S+)*", piece):
        yield Run(column + found.start(), found[0], style)


def _changed(style: Style, codes: str) -> Style:
    for code in (int(code or 0) for code in codes.split(";") if code.isdigit() or not code):
        if code == 0:
            style = Style()
        elif code in (1, 2):
            style = replace(style, bold=style.bold or code == 1, dim=style.dim or code == 2)
        elif code == 22:
            style = replace(style, bold=False, dim=False)
        elif 30 <= code <= 37 or code == 39:
            style = replace(style, colour=None if code == 39 else code - 30)
    return style
