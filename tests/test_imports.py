"""The shape of the package: imports point down only, one door to subprocesses, one place that prints."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "localdisk"

# Top to bottom: a module may import those below it.
ORDER = (
    "first",
    "front",
    "pack",
    "__main__",
    "cli",
    "uninstall",
    "install",
    "check",
    "check_host",
    "check_storage",
    "host",
    "host_storage",
    "finding",
    "sudo_rule",
    "places",
    "status",
    "table",
    "metrics",
    "snapshot",
    "drift",
    "vms",
    "prefetch",
    "rehearsal",
    "hook",
    "remove",
    "gc",
    "client",
    "helper",
    "session",
    "replaced",
    "cache",
    "making",
    "counters",
    "progress",
    "stale",
    "removal",
    "sysfs",
    "copy",
    "origin",
    "image",
    "identity",
    "definition",
    "vdsm",
    "domains",
    "cancel",
    "kept",
    "template",
    "disk",
    "clock",
    "config",
    "config_memory",
    "lock",
    "yamltree",
    "lvm",
    "log",
    "change",
    "run",
    "ids",
    "unpack",
    "units",
    "frozen",
    "errors",
    "__init__",
)
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
BEFORE_CLI = {"first", "front", "pack", "__main__"}  # what starts it


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


def ours(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    parts = (name.split(".") for name, _ in imported(module))
    names = {words[1] for words in parts if words[0] == "localdisk" and len(words) > 1}
    return {name if name in MODULES else "__init__" for name in names}


def called(module: str) -> Iterator[str]:
    """What a module calls, dotted: `print`, `sys.exit`."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_down(module: str) -> None:
    below = ORDER[ORDER.index(module) + 1 :]
    assert ours(module) <= set(below)


@pytest.mark.parametrize("module", ["first", "front"])
def test_what_starts_the_program_imports_nothing_of_it(module: str) -> None:
    top = [node for node in tree(module).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    named = {name for name, node in imported(module) if node in top}
    assert named <= {"__future__", "fcntl", "os", "_signal", "sys", "time"}


@pytest.mark.parametrize("module", sorted(set(ORDER) - {"run"}))
def test_one_door_to_subprocesses(module: str) -> None:
    names = {name.split(".")[0] for name, _ in imported(module)}
    assert not names & {"subprocess", "multiprocessing", "pty", "asyncio"}
    starts = {
        name for name in called(module) if name.startswith(("os.exec", "os.spawn", "os.popen", "os.sys"))
    }
    assert starts <= ({"os.execv"} if module == "first" else set())  # itself, after an update
    assert module == "front" or "os.posix_spawn" not in called(module)


@pytest.mark.parametrize("module", sorted(set(ORDER) - {"cli", *BEFORE_CLI}))
def test_one_place_that_prints_and_exits(module: str) -> None:
    forbidden = {"print", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write", "sys.stderr.write"}
    assert not set(called(module)) & forbidden
    assert "SystemExit" not in {node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)}


HEAVY = ("lxml", "yaml", "jsonschema", "argparse", "asyncio", "http", "email", "unittest")


@pytest.mark.parametrize("module", ["hook", "helper", "session", "gc", "cli"])
def test_a_hook_run_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, localdisk.{module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    argv = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); {code}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(HEAVY)
