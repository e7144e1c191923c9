"""Some inputs for each parser; `./build.sh fuzz` gives them as many as there is time for."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS, Target, judge

INPUTS = 150


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_seeds_are_taken(target: Target) -> None:
    outcomes = [judge(target, seed) for seed in target.seeds]
    assert not [outcome.crash for outcome in outcomes if outcome.crash]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_what_others_could_make_of_them(target: Target) -> None:
    rng = random.Random(target.name)
    for number in range(INPUTS):
        data = mutated(rng, target.seeds, target.words)
        assert not judge(target, data).crash, (number, data)
