"""The model test in memory: random walks (tests/model) over real hooks, helper and gc, fakes at the door.

LOCALDISK_MODEL_SEED=7          only that walk; 100-199: these
LOCALDISK_MODEL_STEPS=500       so many steps each
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.model.fake import FakeWorld
from tests.model.walk import Plan, Walk

STEPS = int(os.environ.get("LOCALDISK_MODEL_STEPS", "100"))
# Not 8: two of its calls at once have 6,561 possible outcomes, which takes twelve seconds.
FIRST, _, LAST = os.environ.get("LOCALDISK_MODEL_SEED", "9-28").partition("-")


@pytest.mark.parametrize("seed", range(int(FIRST), int(LAST or FIRST) + 1))
def test_walk(seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    walk(monkeypatch, tmp_path, seed, STEPS).run()


def walk(monkeypatch: pytest.MonkeyPatch, directory: Path, seed: int, steps: int) -> Walk:
    words = f"LOCALDISK_MODEL_SEED={seed} LOCALDISK_MODEL_STEPS={steps}"
    repeat = f"{words} .venv/bin/python -m pytest tests/unit/test_model.py -k test_walk"
    return Walk(FakeWorld(monkeypatch, directory, seed), Plan(seed, steps), repeat)
