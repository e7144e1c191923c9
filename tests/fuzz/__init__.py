"""Fuzzing of everything that reads what others wrote: `./build.sh fuzz [SECONDS]`.

    targets.py    each parser, what it may raise, and inputs that it takes
    mutate.py     inputs made from these, by a seed
    __main__.py   runs them, by coverage (atheris) where that is installed, and counts

A parser either takes an input or refuses it with one of our errors, whose every line is plain and bounded.
tests/unit/test_fuzz.py runs some inputs of each with the unit tests.
"""
