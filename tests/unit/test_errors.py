from __future__ import annotations

import ast
import inspect
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdisk import errors
from localdisk.errors import (
    CommandFailed,
    ConfigRefused,
    Error,
    HelperRefused,
    LvmFailed,
    SourceRefused,
    how_it_ended,
    plain,
)
from tests.examples import examples

PACKAGE = Path(errors.__file__).parent
CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, (Error, errors.Interrupted)) and kind is not Error
}
OWN_ARGUMENTS = {"ConfigRefused", "SourceRefused", "CommandFailed", "LvmFailed", "HelperRefused"}
HOSTILE = "a\nb\r\x1b[31m\u202e\ud800{x}%s\0" + "y" * 5000


def fields(kind: type[Error] | type[errors.Interrupted]) -> set[str]:
    """The fields that the templates of a class name."""
    parsed = string.Formatter().parse(kind.what + kind.fix)
    return {name for _, name, _, _ in parsed if name}


def one_line(message: str) -> str:
    assert message.isprintable()
    what, _, fix = message.partition(" : ")
    assert what
    assert fix
    return message


# -- fields


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("", ""),
        ("plain text, ümläut", "plain text, ümläut"),
        ("a\nb\tc\r\0", "a\\nb\\tc\\r\\x00"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\u202e\u2028", "\\u202e\\u2028"),
        ("\ud800", "\\ud800"),
        (None, "None"),
        (5, "5"),
        (b"x", "b'x'"),
        ("x" * 200, "x" * 200),
        ("a" * 150 + "b" * 150, "a" * 99 + "…" + "b" * 100),
        ("\n" * 101, "\\n" * 49 + "\\…" + "\\n" * 50),
    ],
)
def test_plain(value: object, text: str) -> None:
    assert plain(value) == text


@settings(max_examples=examples(80))
@given(st.text())
def test_plain_is_one_printable_line_of_bounded_length(text: str) -> None:
    assert plain(text).isprintable()
    assert len(plain(text)) <= 200


# -- classes


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - OWN_ARGUMENTS))
def test_every_error_is_one_line_that_says_what_to_do(name: str) -> None:
    kind = CLASSES[name]
    one_line(str(kind(**dict.fromkeys(fields(kind), HOSTILE))))
    assert kind.fix not in ("", "{problem}")
    assert kind.exit_code in (1, 2)


def test_errors_with_arguments_of_their_own() -> None:
    one_line(str(SourceRefused(HOSTILE, HOSTILE)))
    one_line(str(SourceRefused(HOSTILE, HOSTILE, HOSTILE)))
    one_line(str(CommandFailed((HOSTILE, HOSTILE), 5, HOSTILE)))
    one_line(str(CommandFailed(("lvm",), -6, "")))
    one_line(str(LvmFailed((HOSTILE, HOSTILE), 5, HOSTILE, HOSTILE, HOSTILE)))


def test_a_refused_configuration_is_one_line_for_each_problem() -> None:
    error = ConfigRefused("/etc/localdisk.yaml", (f"F:1:1: {HOSTILE}", "F:2:1: b"))
    first, second, last = str(error).splitlines()
    assert first.isprintable()
    assert second == "F:2:1: b"
    assert one_line(last).startswith("configuration /etc/localdisk.yaml is refused, 2 problem(s)")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("disk is busy : stop it", "disk is busy : stop it"),
        ("a\nb", "a\nb"),
        ("a\x1b[31mb\ud800", "a[31mb"),
        ("x" * 5000, "x" * 1000),
        ("x\n" * 5000, "\n".join("x" * 100)),
    ],
)
def test_what_the_helper_says_is_shown_plainly(message: str, shown: str) -> None:
    assert str(HelperRefused(message)) == shown


@pytest.mark.parametrize("message", ["", "\n", "\0\n\n"])
def test_a_helper_that_says_nothing_is_still_an_error(message: str) -> None:
    one_line(str(HelperRefused(message)))


def raised() -> list[tuple[str, str, set[str]]]:
    """Where an error is made: place, class, names of the fields given."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES:
                given_names = {word.arg for word in node.keywords if word.arg}
                found.append((f"{path.name}:{node.lineno}", node.func.id, given_names))
    return found


@pytest.mark.parametrize(("place", "name", "given_names"), raised())
def test_errors_are_made_with_the_fields_that_they_show(place: str, name: str, given_names: set[str]) -> None:
    if name not in OWN_ARGUMENTS:
        assert given_names == fields(CLASSES[name]), place


def test_every_class_is_raised_somewhere() -> None:
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "errors.py")
    assert [name for name in CLASSES if name not in text] == []


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (-4, "killed by SIGILL"),
        (132, "killed by SIGILL"),  # as sudo, timeout and shells report it
        (128, "exit code 128"),
        (-40, "killed by signal 40"),
        (255, "exit code 255"),
    ],
)
def test_a_process_that_a_signal_ended_is_named_as_that(exit_code: int, words: str) -> None:
    assert how_it_ended(exit_code) == words
