from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from localdisk import first, front, vdsm

FIRST = Path(first.__file__)
POINT = "after_disk_prepare"


# -- first.py: the look at the property


def test_points_are_vdsms() -> None:
    assert {*first.POINTS_OF_A_VM, "before_vdsm_start"} == vdsm.POINTS
    assert "before_vdsm_start" not in first.POINTS_OF_A_VM


@pytest.mark.parametrize(
    ("argv", "point"),
    [
        *(([f"/usr/libexec/vdsm/hooks/{point}/50_localdisk"], point) for point in first.POINTS_OF_A_VM),
        *((["/usr/local/libexec/localdisk", "hook", point], point) for point in first.POINTS_OF_A_VM),
        ([f"{POINT}/x"], POINT),
        ([f"/hooks/{POINT}/x", "more"], POINT),
        ([f"/hooks/{POINT}/x", "hook", "before_vm_start"], "before_vm_start"),
        (["/hooks/before_vdsm_start/x"], ""),
        (["/x", "hook", "before_vdsm_start"], ""),
        (["/x", "hook"], ""),
        (["/x", "hook", POINT, "more"], ""),
        (["/x", "hook", "nonsense"], ""),
        (["/x", "helper"], ""),
        (["/x", "gc", POINT], ""),
        (["/x"], ""),
        ([POINT], ""),
        ([f"/hooks/{POINT}.d/x"], ""),
        ([f"/hooks/{POINT}/sub/x"], ""),
        ([""], ""),
    ],
)
def test_called_point(argv: list[str], point: str) -> None:
    assert first.called_point(argv) == point


@pytest.mark.parametrize(
    ("words", "environ", "goes_on"),
    [
        (["hook", POINT], {}, False),
        (["hook", POINT], {"localdisk": "off"}, False),
        (["hook", POINT], {"LOCALDISK": "lvm"}, False),
        (["hook", POINT], {"localdisk": "lvm"}, True),
        (["hook", POINT], {"localdisk": ""}, True),
        (["hook", POINT], {"localdisk": "OFF"}, True),
        (["hook", "before_vdsm_start"], {}, True),
        (["hook", "before_vdsm_start"], {"localdisk": "off"}, True),
        (["--version"], {}, True),
        ([], {}, True),
    ],
)
def test_who_is_let_through(tmp_path: Path, words: list[str], environ: dict[str, str], goes_on: bool) -> None:
    """In the zipapp `front` is beside it; here it is one that tells."""
    program = tmp_path / "program"
    program.mkdir()
    (program / "__main__.py").write_bytes(FIRST.read_bytes())
    (program / "front.py").write_text("def main(called_by_vdsm): print(called_by_vdsm)")
    done = subprocess.run(
        [sys.executable, str(program), *words], capture_output=True, text=True, env=environ, check=True
    )
    assert done.stdout == (f"{len(words) == 2 and words[1] == POINT}\n" if goes_on else "")
    assert done.stderr == ""


def test_a_vm_without_the_property_imports_nothing(tmp_path: Path) -> None:
    program = tmp_path / POINT / "50_localdisk"
    program.parent.mkdir()
    program.symlink_to(FIRST)
    argv = [sys.executable, "-I", "-X", "importtime", str(program)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    bare = subprocess.run([*argv[:-1], "/dev/null"], capture_output=True, text=True, check=True)

    def names(said: str) -> set[str]:
        return {line.rpartition("|")[2].strip() for line in said.splitlines()}

    assert names(done.stderr) == names(bare.stderr)


# -- front.py


def test_the_environment_is_cleaned() -> None:
    environ = {
        "SHIV_ROOT": "/tmp/evil",
        "SHIV_ENTRY_POINT": "os:system",
        "SHIV_": "",
        "PYTHONPATH": ":/tmp",
        "PYTHONSTARTUP": "/tmp/x.py",
        "PATH": "/usr/bin",
        "vmId": "x",
        "localdisk": "lvm",
        "shiv_root": "kept",
    }
    front.clean(environ)  # type: ignore[arg-type]
    assert environ.keys() == {"PATH", "vmId", "localdisk", "shiv_root"}


def status(path: Path, owner: int, mode: int) -> Callable[[str], os.stat_result]:
    """An lstat by which `path` has another owner and mode; tests may run as any user."""
    real = os.lstat

    def lstat(asked: str) -> os.stat_result:
        found = real(asked)
        if asked != str(path):
            return found
        kind = found.st_mode & 0o170000
        return os.stat_result((kind | mode, *found[1:4], owner, *found[5:10]))

    return lstat


@pytest.mark.parametrize(
    ("owner", "mode", "trusted"),
    [
        (0, 0o755, True),
        (0, 0o700, True),
        (0, 0o1755, True),
        (0, 0o775, False),
        (0, 0o757, False),
        (0, 0o1777, False),
        (0, 0o720, False),
        (36, 0o755, False),
        (36, 0o700, False),
    ],
)
def test_what_is_roots_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: int, mode: int, trusted: bool
) -> None:
    monkeypatch.setattr(os, "lstat", status(tmp_path, owner, mode))
    assert front.is_roots_alone(str(tmp_path)) is trusted


def test_what_is_not_there_is_not_roots(tmp_path: Path) -> None:
    assert not front.is_roots_alone(str(tmp_path / "missing"))
    assert not front.is_roots_alone("/dev/null/x")


def test_a_link_is_not_roots(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/usr")
    assert not front.is_roots_alone(str(link))


@pytest.fixture(name="trees")
def fixture_trees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where root extracts, trusted whoever runs the tests."""
    trees = tmp_path / "trees"
    monkeypatch.setattr(front, "SYSTEM_TREES", str(trees))
    monkeypatch.setattr(front, "BUILD_ID", "abc")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "link")])
    (tmp_path / "link").symlink_to(tmp_path / "localdisk")
    monkeypatch.setattr(front, "is_roots_alone", os.path.isdir)
    return trees


def test_the_tree_of_this_build(trees: Path) -> None:
    packages = trees / "localdisk_abc" / "site-packages"
    assert front.extracted_tree() == ""
    packages.parent.mkdir(parents=True)
    assert front.extracted_tree() == ""
    packages.mkdir()
    assert front.extracted_tree() == str(packages)
    packages.parent.rename(trees / "localdisk_abd")
    assert front.extracted_tree() == ""


@pytest.mark.parametrize("untrusted", ["", "localdisk_abc"])
def test_a_tree_that_others_could_write(monkeypatch: pytest.MonkeyPatch, trees: Path, untrusted: str) -> None:
    (trees / "localdisk_abc" / "site-packages").mkdir(parents=True)
    bad = str(trees / untrusted) if untrusted else str(trees)
    monkeypatch.setattr(front, "is_roots_alone", lambda path: path != bad)
    assert front.extracted_tree() == ""


def test_root_extracts_to_its_own_place(monkeypatch: pytest.MonkeyPatch, trees: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert front.place_to_extract() == str(trees)
    trees.mkdir()
    assert front.place_to_extract() == str(trees)


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_root_does_not_extract_where_others_could_write(
    monkeypatch: pytest.MonkeyPatch, trees: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(front, "is_roots_alone", lambda _path: False)
    if kind == "directory":
        trees.mkdir()
    else:
        trees.symlink_to("/nonexistent")
    with pytest.raises(SystemExit) as caught:
        front.place_to_extract()
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"localdisk: {trees} could be written by others than root : rm -r {trees}\n"
    )


def test_an_ordinary_user_extracts_to_its_cache(monkeypatch: pytest.MonkeyPatch, trees: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 36)
    home(monkeypatch, trees.parent / "home")
    assert front.place_to_extract() == str(trees.parent / "home/.cache/localdisk")
    assert (trees.parent / "home/.cache/localdisk").is_dir()
    assert front.place_to_extract()


def home(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    class Entry:
        pw_dir = str(path)

    monkeypatch.setattr("pwd.getpwuid", lambda _uid: Entry)


def test_a_user_who_cannot_extract(
    monkeypatch: pytest.MonkeyPatch, trees: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 36)
    home(monkeypatch, Path("/dev/null"))
    with pytest.raises(SystemExit) as caught:
        front.place_to_extract()
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "localdisk: cannot extract to /dev/null/.cache/localdisk, Not a directory"
        f" : run {trees.parent}/localdisk --version once as root\n"
    )


# -- starting


@pytest.fixture(name="started")
def fixture_started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What front.main starts, instead of doing so."""
    started: list[str] = []

    def spawn(path: str, argv: list[str], environ: dict[str, str], file_actions: object) -> int:
        assert environ == {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        started.append(f"{path}: {' '.join(argv)}")
        raise FileNotFoundError

    def program() -> int:
        started.append(f"program on {sys.path[0]}")
        return 5

    monkeypatch.setattr(os, "posix_spawn", spawn)
    monkeypatch.setattr(os, "umask", lambda mask: started.append(f"umask {mask:o}"))
    monkeypatch.setattr(os, "environ", {"PYTHONPATH": "/evil"})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("localdisk.cli.main", program)
    bootstrap = types.ModuleType("_bootstrap")
    bootstrap.bootstrap = lambda: started.append(f"bootstrap to {os.environ['SHIV_ROOT']}")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "_bootstrap", bootstrap)
    return started


def test_the_program_runs_from_the_tree(trees: Path, started: list[str]) -> None:
    packages = trees / "localdisk_abc" / "site-packages"
    packages.mkdir(parents=True)
    with pytest.raises(SystemExit) as caught:
        front.main(called_by_vdsm=True)
    assert caught.value.code == 5
    assert started == ["umask 22", f"program on {packages}"]


@pytest.mark.parametrize(
    ("user", "called_by_vdsm", "asks_root"), [(36, True, True), (36, False, False), (0, True, False)]
)
def test_without_a_tree(
    monkeypatch: pytest.MonkeyPatch,
    trees: Path,
    started: list[str],
    user: int,
    called_by_vdsm: bool,
    asks_root: bool,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    home(monkeypatch, trees.parent / "home")
    front.main(called_by_vdsm)
    place = trees if user == 0 else trees.parent / "home/.cache/localdisk"
    asked = [f"/usr/bin/sudo: sudo -n {trees.parent}/localdisk helper"] if asks_root else []
    assert started == ["umask 22", *asked, f"bootstrap to {place}"]
    assert "PYTHONPATH" not in os.environ


def test_root_extracts_for_vdsm(monkeypatch: pytest.MonkeyPatch, trees: Path, started: list[str]) -> None:
    packages = trees / "localdisk_abc" / "site-packages"

    def extract(_path: str, _argv: list[str], _environ: object, file_actions: object) -> int:
        packages.mkdir(parents=True)
        child = os.fork()
        if child == 0:
            os._exit(0)
        return child

    monkeypatch.setattr(os, "geteuid", lambda: 36)
    monkeypatch.setattr(os, "posix_spawn", extract)
    with pytest.raises(SystemExit):
        front.main(called_by_vdsm=True)
    assert started == ["umask 22", f"program on {packages}"]
