"""The shape of the package: rooms with walls, one door to subprocesses and to /sys, one place that prints."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "localdisk"

GROUND = "ground"  # the modules that lie in localdisk/ itself, but for `cli` and `__main__`
EVERY_ROOM = {"hook", "helper", "status", "host", "volumes", "vdsm", GROUND}
# Which rooms a room may import, beside itself.  The walls: what runs as vdsm never runs LVM, and what runs as
# root for a hook opens no image.
ROOMS = {
    "zipapp": {"cli"},
    "cli": EVERY_ROOM,
    "hook": {"vdsm", GROUND},
    "helper": {"volumes", GROUND},
    "status": {"volumes", "vdsm", GROUND},
    "host": {"volumes", "vdsm", GROUND, "zipapp"},  # of zipapp what other builds have extracted
    "volumes": {GROUND},
    "vdsm": {GROUND},
    GROUND: set(),
}
MODULES = sorted(
    str(path.relative_to(PACKAGE).with_suffix(""))
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)
BEFORE_CLI = {
    "zipapp/main",
    "zipapp/begin",
    "zipapp/bootstrap",
    "zipapp/first_run",
    "zipapp/pack",
    "__main__",
}  # what starts it


@lru_cache(maxsize=100)
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imported(module: str) -> Iterator[tuple[str, ast.AST]]:
    """Dotted names that a module imports, in functions too, with the node that does."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [alias.name for alias in node.names]
            is_package = node.module == "localdisk"
            yield from ((f"localdisk.{name}", node) for name in names if is_package)
            if not is_package:
                yield str(node.module), node


def room_of(module: str) -> str:
    room, slash, _ = module.rpartition("/")
    if slash:
        return room
    return "cli" if module in ("cli", "__main__") else GROUND


def ours(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    paths = (name.split(".")[1:] for name, _ in imported(module) if name.split(".")[0] == "localdisk")
    names = {"/".join(words[:length]) for words in paths for length in (1, 2)}
    return names & set(MODULES)


def called(module: str) -> Iterator[str]:
    """What a module calls, dotted: `print`, `sys.exit`."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_every_room_is_in_the_table_and_says_what_it_is() -> None:
    assert {room_of(module) for module in MODULES} == set(ROOMS)
    for room in sorted(set(ROOMS) - {GROUND, "cli"}):
        body = ast.parse((PACKAGE / room / "__init__.py").read_text()).body
        assert [type(node) for node in body] == [ast.Expr], f"{room}: one docstring, and nothing else"


@pytest.mark.parametrize("module", MODULES)
def test_the_walls_between_the_rooms(module: str) -> None:
    room = room_of(module)
    assert {room_of(name) for name in ours(module)} <= {room, *ROOMS[room]}


def test_no_import_runs_in_a_circle() -> None:
    left = {module: ours(module) for module in MODULES}
    while left:
        lowest = {module for module, names in left.items() if not names & set(left)}
        assert lowest, f"these import each other: {sorted(left)}"
        left = {module: names for module, names in left.items() if module not in lowest}


def test_the_helper_opens_no_image_and_the_hook_runs_no_lvm() -> None:
    """Also by way of other modules that a module imports."""
    for room, forbidden in (("helper", {"hook", "vdsm"}), ("hook", {"volumes", "helper"})):
        for module in (name for name in MODULES if room_of(name) == room):
            assert not {room_of(name) for name in reached(module)} & forbidden, module


def reached(module: str) -> set[str]:
    """All modules of the package that importing a module may import in the end."""
    found, new = set(), {module}
    while new:
        found |= new
        new = {name for one in new for name in ours(one)} - found
    return found


@pytest.mark.parametrize("module", ["zipapp/main", "zipapp/bootstrap"])
def test_what_starts_the_program_imports_nothing_of_it(module: str) -> None:
    top = [node for node in tree(module).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    named = {name for name, node in imported(module) if node in top}
    assert named <= {"fcntl", "gc", "os", "_signal", "sys", "time"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"run", "spawn"}))
def test_one_door_to_subprocesses(module: str) -> None:
    assert "localdisk.spawn" not in {name for name, _ in imported(module)} or module == "hook/copy"  # a type
    names = {name.split(".")[0] for name, _ in imported(module)}
    assert not names & {"subprocess", "multiprocessing", "pty", "asyncio"}
    starts = {
        name for name in called(module) if name.startswith(("os.exec", "os.spawn", "os.popen", "os.sys"))
    }
    assert starts <= ({"os.execv"} if module == "zipapp/main" else set())  # itself, after an update
    assert module == "zipapp/first_run" or "os.posix_spawn" not in called(module)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"device_mapper"}))
def test_one_door_to_sys(module: str) -> None:
    texts = [node.value for node in ast.walk(tree(module)) if isinstance(node, ast.Constant)]
    assert not [text for text in texts if isinstance(text, str) and text.startswith("/sys/")]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"cli", *BEFORE_CLI}))
def test_one_place_that_prints_and_exits(module: str) -> None:
    forbidden = {"print", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write", "sys.stderr.write"}
    assert not set(called(module)) & forbidden
    assert "SystemExit" not in {node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)}


HEAVY = (
    *("lxml", "yaml", "jsonschema", "argparse", "asyncio", "http", "email", "unittest"),
    *("subprocess", "threading", "locale", "selectors"),
)


@pytest.mark.parametrize("module", ["hook.points", "helper.process", "helper.session", "volumes.gc", "cli"])
def test_a_hook_run_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, localdisk.{module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    argv = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); {code}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(HEAVY)


TESTS = PACKAGE.parent / "tests"


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_module_is_imported(path: Path) -> None:
    """What several of them use is in tests/fakes, tests/kernel/steps.py and so on."""
    names = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert not [name for name in names if any(word.startswith("test_") for word in name.split("."))]


def test_the_tests_of_a_module_lie_in_its_room() -> None:
    units = TESTS / "unit"
    folders = {path.parent.relative_to(units).as_posix() for path in units.rglob("test_*.py")}
    assert folders <= {".", *ROOMS}
