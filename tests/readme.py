"""The generated parts of README.md and docs/: `python -m tests.readme` writes them again.

A part is between `<!-- reference: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from localdisk import cli, config
from localdisk.status import metrics
from tests import troubleshooting

ROOT = Path(__file__).resolve().parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = (README, *sorted(DOCS.glob("*.md")))  # those with generated parts
DOCUMENTS = (
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
)


def generated() -> dict[str, str]:
    """Each generated part by its name."""
    return {
        "configuration": config.reference(),
        "help": modes(),
        "messages": troubleshooting.reference(),
        "metrics": metrics.reference(),
    }


def modes() -> str:
    """The help of the program and of each mode, 80 columns wide."""
    os.environ["COLUMNS"] = "80"
    top = cli.parser()
    (subparsers,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    usages = "".join(mode.format_usage() for mode in subparsers.choices.values())
    # Python 3.9 calls them optional arguments.
    shown = top.format_help().replace("optional arguments:", "options:")
    return f"```\n{shown}\n{usages}```\n"


def parts(text: str) -> list[str]:
    """The names of the generated parts of a document."""
    return re.findall(r"^<!-- reference: (\w+) -->$", text, re.M)


def filled(text: str) -> str:
    """A document's `text` with every generated part as it is generated now."""
    bodies = generated()
    for name in parts(text):
        block = re.compile(rf"(<!-- reference: {name} -->\n).*?(<!-- end -->)", re.S)
        found = block.search(text)
        assert found, name
        text = text[: found.end(1)] + bodies[name] + text[found.start(2) :]
    return text


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text()))
