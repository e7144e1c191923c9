"""README's reference, made from the schema and from --help: `python -m tests.readme` writes it in."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from localdisk import cli, config, metrics

README = Path(__file__).resolve().parents[1] / "README.md"


def generated() -> dict[str, str]:
    """Each reference by its name."""
    return {"configuration": config.reference(), "help": modes(), "metrics": metrics.reference()}


def modes() -> str:
    """The help of the program and of each mode, 80 columns wide."""
    os.environ["COLUMNS"] = "80"
    top = cli.parser()
    (subparsers,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    usages = "".join(mode.format_usage() for mode in subparsers.choices.values())
    # Python 3.9 calls them optional arguments.
    shown = top.format_help().replace("optional arguments:", "options:")
    return f"```\n{shown}\n{usages}```\n"


def filled(text: str) -> str:
    """README's `text` with every reference as it is generated now."""
    for name, body in generated().items():
        block = re.compile(rf"(<!-- reference: {name} -->\n).*?(<!-- end -->)", re.S)
        found = block.search(text)
        assert found, name
        text = text[: found.end(1)] + body + text[found.start(2) :]
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
