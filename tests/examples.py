"""How many examples Hypothesis draws for a test."""

from __future__ import annotations

import os

# `./build.sh test` runs the unit tests under each Python; under all but the first, Hypothesis draws a part.
PART = int(os.environ.get("LOCALDISK_EXAMPLES_PART", "1"))


def examples(count: int) -> int:
    """`count`, or 1/PART of it, but at least ten."""
    return max(10, count // PART)
