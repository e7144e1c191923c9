"""Every message of the product is provoked and read.

What there is to say is collected from the source: each place where an error of errors.py is made or a
problem is logged (a `Site`), and each text that is written into one (`WORDS`).  `provocations.py` has the
table that provokes them; a message that the table forgets fails here.  The bootstrap (first_run.py,
main.py) and what check and status find wrong are not errors; their own tests read them.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import syslog
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from localdisk import errors, log
from localdisk.errors import FIELD_LIMIT, Message
from tests.provocations import CASES, FILLERS, World, message_of

PACKAGE = Path(errors.__file__).parent
CLASSES = {
    name
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, (errors.Error, errors.Interrupted))
}
# What else a text is given to on its way into an error, and where else one is written down.
CARRIERS = {"_RefusedError", "ValueError", "_unreadable", "_refuse", "_report", "at"}
NAMES = {"problem", "fix", "_REFUSED_FEATURES"}
RETURNED_BY = {"_distrust"}
ELSEWHERE = {
    "errors": "the templates of the classes",
    "units": "the schema refuses first what cannot be parsed",
    "status/problems": "rows of status, not errors",
    "host/check": "findings of check, not errors",
    "host/check_system": "findings of check, not errors",
    "host/check_storage": "findings of check, not errors",
    "zipapp/begin": "the bootstrap",
    "zipapp/first_run": "the bootstrap",
    "zipapp/main": "the bootstrap",
}


def _module(path: Path) -> str:
    """Its room and name: `volumes/gc`."""
    return str(path.relative_to(PACKAGE).with_suffix(""))


MODULES = {_module(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


# -- what there is to say


@dataclass(frozen=True)
class Site:
    """A place that makes an error or logs a problem."""

    module: str
    function: str
    kind: str  # the error's class, or log.problem
    text: str  # its literal parts


@dataclass(frozen=True)
class Words:
    """A text that is written into an error or a log line, an ellipsis for what is filled in."""

    module: str
    text: str

    @property
    def pattern(self) -> str:
        return ".*".join(map(re.escape, self.text.split("…")))

    @property
    def ends(self) -> str:
        """The beginning and end of the pattern, which a message has even if a field is long."""
        first, *_, last = [*self.text.split("…"), ""] if "…" not in self.text else self.text.split("…")
        return f"{re.escape(first)}.*{re.escape(last)}"


def called(node: ast.Call) -> str:
    """`name` or `.name` of what is called."""
    if isinstance(node.func, ast.Attribute):
        is_log = isinstance(node.func.value, ast.Name) and node.func.value.id == "log"
        return f"{'log' if is_log else ''}.{node.func.attr}"
    return node.func.id if isinstance(node.func, ast.Name) else ""


def texts(node: ast.AST) -> Iterator[str]:
    """The sentences in an expression."""
    if isinstance(node, ast.JoinedStr):
        parts = (str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
        yield from (text for text in ["".join(parts)] if " " in text)
    elif isinstance(node, ast.Constant):
        yield from (node.value,) if isinstance(node.value, str) and " " in node.value else ()
    elif not isinstance(node, (ast.Call, ast.Compare)) or called_sentence(node):
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


def called_sentence(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and called(node) in (*CLASSES, *CARRIERS, "log.problem")


def places() -> Iterator[tuple[str, str, ast.AST]]:
    """Every node of the product with its module and the function that it is in."""

    def below(module: str, function: str, node: ast.AST) -> Iterator[tuple[str, str, ast.AST]]:
        yield module, function, node
        name = node.name if isinstance(node, ast.FunctionDef) else function
        for child in ast.iter_child_nodes(node):
            yield from below(module, name, child)

    for module, tree in MODULES.items():
        if module not in ELSEWHERE:
            yield from below(module, "", tree)


def sites() -> dict[tuple[str, int], Site]:
    """Every site by its module and each of its lines."""
    found = {}
    for module, function, node in places():
        if isinstance(node, ast.Call) and called(node) in (*CLASSES, "log.problem"):
            site = Site(module, function, called(node), " ".join(texts(node)))
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found.update({(module, line): site for line in lines})
    return found


def words() -> set[Words]:
    return {Words(module, text) for module, function, node in places() for text in said_at(function, node)}


def said_at(function: str, node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call):
        is_carrier = called(node).lstrip(".") in CARRIERS or called(node) in (*CLASSES, "log.problem")
        given = [*node.args, *(word.value for word in node.keywords)] if is_carrier else []
        given += [word.value for word in node.keywords if word.arg in NAMES]
        yield from (text for each in given for text in texts(each))
    elif isinstance(node, ast.Assign):
        targets = {target.id for target in node.targets if isinstance(target, ast.Name)}
        yield from texts(node.value) if targets & NAMES else ()
    elif isinstance(node, ast.Return) and function in RETURNED_BY and node.value:
        yield from texts(node.value)


SITES = sites()
WORDS = words()


# -- what was said


@dataclass
class Said:
    """What one provocation made the product say."""

    message: str = ""
    errors: list[Message] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    sites: set[Site] = field(default_factory=set)

    @property
    def lines(self) -> list[str]:
        """Every line that an operator could see."""
        return [
            line for text in (self.message, *map(str, self.errors), *self.log) for line in text.split("\n")
        ]


def provoked(name: str, directory: Path, is_hostile: bool) -> Said:
    said = Said()
    with pytest.MonkeyPatch.context() as patch:
        listen(patch, said)
        said.message = message_of(CASES[name].provoke, World(patch, directory, is_hostile))
    return said


def listen(patch: pytest.MonkeyPatch, said: Said) -> None:
    """Note what errors are made, and where, and what is logged."""
    make, tell = errors.Message.__init__, log.problem

    def making(error: errors.Message, **fields: object) -> None:
        make(error, **fields)
        if note_site(said):
            said.errors.append(error)

    def telling(what: str, **fields: object) -> None:
        note_site(said)
        tell(what, **fields)

    patch.setattr(errors.Message, "__init__", making)
    patch.setattr(log, "problem", telling)
    patch.setattr(syslog, "syslog", lambda _level, line: said.log.append(line))


def note_site(said: Said) -> bool:
    """Note the site that is at work; whether it is the product's."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_code.co_filename == errors.__file__:
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    site = SITES.get((_module(path), frame.f_lineno)) if PACKAGE in path.parents else None
    said.sites |= {site} if site else set()
    return PACKAGE in path.parents


@pytest.fixture(name="read", scope="module")
def fixture_read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Said]:
    """What each provocation says where nobody is hostile."""
    return {name: provoked(name, tmp_path_factory.mktemp("m"), is_hostile=False) for name in CASES}


@pytest.fixture(name="measured", scope="module")
def fixture_measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Said]:
    """What each provocation says where an attacker chooses what he can."""
    return {name: provoked(name, tmp_path_factory.mktemp("m"), is_hostile=True) for name in CASES}


# -- all of it, and how it reads


def test_every_site_is_provoked(read: dict[str, Said]) -> None:
    missing = set(SITES.values()) - {site for said in read.values() for site in said.sites}
    assert not missing


def test_every_text_is_read(read: dict[str, Said]) -> None:
    lines = "\n".join(line for said in read.values() for line in said.lines)
    assert not [each for each in WORDS if not re.search(each.pattern, lines)]


def test_every_class_is_provoked(read: dict[str, Said]) -> None:
    """Also errors that are made under another name."""
    assert CLASSES - {"Error"} == {type(error).__name__ for said in read.values() for error in said.errors}


def test_there_is_something_to_say() -> None:
    """The collection would see if it were empty."""
    assert len(set(SITES.values())) > 100
    assert len(WORDS) > 120
    assert {word.text for word in WORDS} > {"it is a link to another file", "vmId is '…', not a UUID"}


def one_line(line: str) -> None:
    assert line.isprintable()
    what, _, fix = line.partition(" : ")
    assert what.strip()
    assert fix.strip()


@pytest.mark.parametrize("name", CASES)
def test_it_is_one_line_that_names_the_thing_and_says_what_to_do(read: dict[str, Said], name: str) -> None:
    said = read[name]
    for text in filter(None, (said.message, *map(str, said.errors))):
        one_line(text.split("\n")[-1])  # before it, a configuration's problems, each with its place
    assert all(line.isprintable() for line in said.lines)
    shown = said.message or "\n".join(said.lines)
    assert [part for part in CASES[name].names if part not in shown] == []


@pytest.mark.parametrize("name", CASES)
def test_what_an_attacker_says_is_escaped_and_cut(measured: dict[str, Said], name: str) -> None:
    said = measured[name]
    for text in filter(None, (said.message, *map(str, said.errors))):
        one_line(text.split("\n")[-1])
    for line in said.lines:
        assert line.isprintable()
        assert max(map(line.count, FILLERS)) <= FIELD_LIMIT
        assert len(line) < 5 * FIELD_LIMIT


@pytest.mark.parametrize("name", CASES)
def test_what_an_attacker_says_does_not_hide_what_is_wrong(
    read: dict[str, Said], measured: dict[str, Said], name: str
) -> None:
    """The same site speaks, and each of its texts is there, its beginning and its end."""
    assert measured[name].sites == read[name].sites
    lines, hostile = ("\n".join(found[name].lines) for found in (read, measured))
    said = [each for each in WORDS if re.search(each.pattern, lines)]
    assert [each for each in said if not re.search(each.ends, hostile)] == []
