"""SVG as text: escaped, with a style of its own and nothing from outside.

A picture brings its own background, so it can be read on a light page and on a dark one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.sax.saxutils import escape, quoteattr

MONO = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono','Liberation Mono',monospace"
# The classes of text and shapes that more than one picture has.
STYLE = f"""\
text{{font-family:{MONO};fill:#d6dde5;white-space:pre}}
.page{{fill:#161b22;stroke:#30363d}}
"""
_FORBIDDEN = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, 2.2


def document(width: float, height: float, title: str, style: str, body: Iterable[str]) -> str:
    """A whole file; `title` is what it is called where it is not seen."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_number(width)}" height="{_number(height)}" '
        f'viewBox="0 0 {_number(width)} {_number(height)}" role="img" aria-label={quoteattr(plain(title))}>'
    )
    page = rect(0.5, 0.5, width - 1, height - 1, "page", rx=8)
    parts = [head, f"<title>{words(title)}</title>", f"<style>\n{STYLE}{style}</style>", page, *body]
    return "\n".join([*parts, "</svg>"]) + "\n"


def text(x: float, y: float, content: str, kind: str = "", **more: object) -> str:
    return f"<text{_attributes(x=x, y=y, kind=kind, **more)}>{words(content)}</text>"


def rect(x: float, y: float, width: float, height: float, kind: str, **more: object) -> str:
    return f"<rect{_attributes(x=x, y=y, width=width, height=height, kind=kind, **more)}/>"


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f"<line{_attributes(x1=x1, y1=y1, x2=x2, y2=y2, kind=kind)}/>"


def polygon(points: Iterable[tuple[float, float]], kind: str) -> str:
    return f"<polygon{_attributes(points=' '.join(f'{x:.1f},{y:.1f}' for x, y in points), kind=kind)}/>"


def circle(x: float, y: float, radius: float, kind: str) -> str:
    return f"<circle{_attributes(cx=x, cy=y, r=radius, kind=kind)}/>"


def words(content: str) -> str:
    """`content` as it may stand between two tags."""
    return escape(plain(content))


def plain(content: str) -> str:
    """`content`, what no XML may hold shown as the replacement character."""
    return _FORBIDDEN.sub("\ufffd", content)


def _attributes(kind: str = "", **named: object) -> str:
    """A name's underscore is a hyphen in SVG; `kind` is the class."""
    pairs = [(name.replace("_", "-"), value) for name, value in named.items()]
    pairs += [("class", kind)] if kind else []
    return "".join(f" {name}={quoteattr(plain(_number(value)))}" for name, value in pairs)


def _number(value: object) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
