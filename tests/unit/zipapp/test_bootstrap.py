from __future__ import annotations

import ast
import errno
import fcntl
import gc
import importlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from localdisk.vdsm import hook_call
from localdisk.zipapp import begin, bootstrap, extract, main
from tests.bed.player import RAISING_POINTS
from tests.fakes.zipped import zipped

# In the zipapp they are beside each other.
sys.modules.update(begin=begin, bootstrap=bootstrap, extract=extract)
first_run = importlib.import_module("localdisk.zipapp.first_run")

START = [Path(str(module.__file__)) for module in (main, begin, bootstrap)]
FIRST = START[0]
end_at_once = os._exit
POINT = "after_disk_prepare"


# -- main.py: the look at the property


def test_points_are_vdsms() -> None:
    assert {*main.POINTS_OF_A_VM, "before_vdsm_start"} == hook_call.POINTS
    assert "before_vdsm_start" not in main.POINTS_OF_A_VM
    assert set(begin.UNREFUSABLE) == hook_call.UNREFUSABLE
    assert begin.BEGINNINGS == main.BEGINNINGS == hook_call.BEGINNINGS


@pytest.mark.parametrize("point", begin.BEGINNINGS)
@pytest.mark.parametrize(("value", "code"), [("off", 0), (None, 0), ("lvm", 2), ("", 2), ("nonsense", 2)])
def test_a_vm_without_the_property_is_never_refused(
    monkeypatch: pytest.MonkeyPatch, point: str, value: str | None, code: int
) -> None:
    """Only its kept disks are to be marked."""
    monkeypatch.delenv("localdisk", raising=False)
    if value is not None:
        monkeypatch.setenv("localdisk", value)
    assert begin.refused(point) == code
    assert hook_call.exit_code(point, 2, os.environ) == code
    assert hook_call.exit_code(point, 1, os.environ) == min(code, 1)


@pytest.mark.parametrize("point", [*main.POINTS_OF_A_VM, *begin.UNREFUSABLE])
def test_where_it_cannot_run_other_hooks_run_unless_vdsm_refuses(
    monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    monkeypatch.setenv("localdisk", "lvm")
    code = 2 if point in RAISING_POINTS else 1
    assert begin.refused(main.named_point([f"/usr/libexec/vdsm/hooks/{point}/50_localdisk"])) == code
    assert begin.refused(main.named_point(["/usr/local/libexec/localdisk", "hook", point])) == code
    assert begin.refused(main.named_point(["/usr/local/libexec/localdisk", "gc"])) == 2


@pytest.mark.parametrize(
    ("argv", "point"),
    [
        *(([f"/usr/libexec/vdsm/hooks/{point}/50_localdisk"], point) for point in main.POINTS_OF_A_VM),
        *((["/usr/local/libexec/localdisk", "hook", point], point) for point in main.POINTS_OF_A_VM),
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
    assert main.called_point(argv) == point


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
    """In the zipapp `bootstrap` is beside it; here it is one that tells."""
    program = tmp_path / "program"
    program.mkdir()
    (program / "__main__.py").write_bytes(FIRST.read_bytes())
    (program / "begin.py").write_bytes(Path(begin.__file__).read_bytes())
    (program / "bootstrap.py").write_text("def packages(): return ''\ndef run(found): print(found)")
    (program / "first_run.py").write_text("def packages(*words): return words")
    done = subprocess.run(
        [sys.executable, str(program), *words], capture_output=True, text=True, env=environ, check=True
    )
    point = words[1] if len(words) == 2 else tmp_path.name
    assert done.stdout == (f"{(point, point == POINT)}\n" if goes_on else "")
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


@pytest.mark.parametrize(
    ("version", "machine", "is_right"),
    [
        *((version, "x86_64", True) for version in begin.PYTHONS),
        ((3, 8), "x86_64", False),
        ((3, 14), "x86_64", False),
        ((3, 6), "x86_64", False),
        ((3, 11), "aarch64", False),
    ],
)
def test_the_wrong_host_is_told_in_one_line(version: tuple[int, int], machine: str, is_right: bool) -> None:
    line = begin.wrong_host((*version, 5), machine)
    if is_right:
        assert line == ""
    else:
        said = f"this is Python {version[0]}.{version[1]} on {machine} : use another host"
        assert line.startswith("localdisk: this file is for Python 3.9 to 3.13 on x86_64, " + said)


@pytest.mark.parametrize("path", START)
def test_older_pythons_read_the_first_lines(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 6))


def test_the_wrong_machine(tmp_path: Path) -> None:
    text = Path(begin.__file__).read_text().replace('MACHINE = "x86_64"', 'MACHINE = "s390x"')
    (tmp_path / "__main__.py").write_bytes(FIRST.read_bytes())
    (tmp_path / "bootstrap.py").write_bytes(Path(bootstrap.__file__).read_bytes())
    (tmp_path / "begin.py").write_text(text)
    done = subprocess.run([sys.executable, str(tmp_path), "gc"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    argv = [sys.executable, str(tmp_path), "hook", "before_vdsm_start"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_an_update_between_two_looks_at_the_file(tmp_path: Path) -> None:
    """It begins again, with the new file."""
    program = tmp_path / "program"
    program.write_text(f"#!{sys.executable}\n" + FIRST.read_text())
    program.chmod(0o755)
    (tmp_path / "begin.py").write_bytes(Path(begin.__file__).read_bytes())
    new = "def packages(): return 'found'\ndef run(found): print('new', found)\n"
    for module in ("bootstrap", "first_run"):
        (tmp_path / "bootstrap.py").write_text("def packages(): return ''\n")
        (tmp_path / f"{module}.py").write_text(
            "import os\nos.rename('new', 'bootstrap.py')\nraise ImportError\n"
        )
        (tmp_path / "new").write_text(new)
        argv = [str(program), "gc"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert (done.stdout, done.stderr) == ("new found\n", "")
    (tmp_path / "bootstrap.py").write_text("raise ImportError('broken for good')\n")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "broken for good" in done.stderr


# -- bootstrap.py


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
    bootstrap.clean(environ)  # type: ignore[arg-type]
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
    assert bootstrap.is_alone(str(tmp_path), 0) is trusted


def test_what_is_no_directory_is_nobodys(tmp_path: Path) -> None:
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(tmp_path)
    file.touch()
    for path in (link, file, tmp_path / "missing", Path("/dev/null/x")):
        assert not bootstrap.is_alone(str(path), os.geteuid())


@pytest.mark.parametrize(
    ("part", "owner", "mode", "trusted"),
    [
        ("a/b/program", 0, 0o755, True),
        ("a/b/program", 0, 0o775, False),
        ("a/b/program", 0, 0o757, False),
        ("a/b/program", 0, 0o1777, False),  # sticky says nothing of a file
        ("a/b/program", 1000, 0o755, False),
        ("a/b", 0, 0o777, False),
        ("a/b", 0, 0o1777, True),  # as /tmp: nobody removes what is root's
        ("a/b", 1000, 0o755, False),
        ("a", 0, 0o770, False),
        ("a", 36, 0o700, False),
    ],
)
def test_what_root_runs(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    part: str,
    owner: int,
    mode: int,
    trusted: bool,
) -> None:
    program = tmp_path / "a/b/program"
    program.parent.mkdir(parents=True)
    program.touch()
    bent = status(tmp_path / part, owner, mode)
    mine = {str(tmp_path / name) for name in ("a", "a/b", "a/b/program")}

    def lstat(path: str) -> os.stat_result:
        if path == str(tmp_path / part):
            return bent(path)
        kind = 0o100000 if path == str(program) else 0o040000
        real = os.stat(path)  # all others are root's
        return os.stat_result((kind | 0o755 if path in mine else kind | 0o1755, *real[1:4], 0, *real[5:10]))

    monkeypatch.setattr(os, "lstat", lstat)
    if trusted:
        first_run.require_trusted(str(program))
        return
    with pytest.raises(SystemExit) as caught:
        first_run.require_trusted(str(program))
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"localdisk: {tmp_path / part} could be written by others than root, who will not run {program}"
        f" : install -m 0755 {program} /usr/local/libexec/localdisk, and run that\n"
    )


@pytest.fixture(name="trees")
def fixture_trees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """root's directory of extracted packages, for the user who runs the tests; the zipapp has one module."""
    monkeypatch.setattr(bootstrap, "TREES", str(tmp_path / "trees"))
    monkeypatch.setattr(bootstrap, "BUILD_ID", "abc")
    monkeypatch.setattr(bootstrap, "_in_use", [])
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "link")])
    (tmp_path / "link").symlink_to(tmp_path / "localdisk")
    with zipfile.ZipFile(tmp_path / "localdisk", "w") as packed:
        packed.writestr(extract.PACKED, zipped({"site-packages/some/module.py": "NAME = 'x'\n"}))
        packed.writestr("bootstrap.py", 'BUILD_ID = "abc"\n')
    return tmp_path / "trees"


ME = os.geteuid()
NAME = f"abc-{sys.implementation.cache_tag}"


def test_the_tree_of_this_build(monkeypatch: pytest.MonkeyPatch, trees: Path) -> None:
    assert bootstrap.ready(str(trees), ME) == ""
    packages = first_run.unpacked(str(trees), ME)
    assert packages == str(trees / NAME / "site-packages") == bootstrap.ready(str(trees), ME)
    assert bootstrap.ready(str(trees), ME + 1) == ""
    monkeypatch.setattr(bootstrap, "BUILD_ID", "abd")
    assert bootstrap.ready(str(trees), ME) == ""


def test_a_tree_that_somebody_locks(trees: Path) -> None:
    """Anybody who can read a file can lock it; a program must run all the same."""
    packages = first_run.unpacked(str(trees), ME)
    os.close(bootstrap._in_use.pop())
    with open(trees / NAME / "files", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert bootstrap.ready(str(trees), ME) == packages


def test_a_tree_that_is_being_removed(trees: Path) -> None:
    first_run.unpacked(str(trees), ME)
    with open(trees / NAME / "files", "rb") as file:
        (trees / NAME / "files").unlink()
        assert not bootstrap._holds(file.fileno())


@pytest.mark.parametrize("part", ["", NAME])
def test_a_tree_that_others_could_write(trees: Path, part: str) -> None:
    first_run.unpacked(str(trees), ME)
    (trees / part).chmod(0o777)
    assert bootstrap.ready(str(trees), ME) == ""


DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda tree: (tree / "site-packages/some/module.pyc").write_text(""),
    "removed": lambda tree: (tree / "site-packages/some/module.pyc").unlink(),
    "package removed": lambda tree: shutil.rmtree(tree / "site-packages/some"),
    "no list": lambda tree: (tree / "files").unlink(),
    "empty list": lambda tree: (tree / "files").write_text(""),
    "nonsense": lambda tree: (tree / "files").write_text("x y\n"),
    "cut list": lambda tree: (tree / "files").write_text("12"),
    "all": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tree_is_noticed_and_replaced(trees: Path, damage: str) -> None:
    first_run.unpacked(str(trees), ME)
    DAMAGES[damage](trees / NAME)
    assert bootstrap.ready(str(trees), ME) == ""
    packages = Path(first_run.unpacked(str(trees), ME))
    assert b"NAME" in (packages / "some/module.pyc").read_bytes()
    assert sorted(path.name for path in trees.iterdir()) == [".lock", NAME]
    assert sorted(path.name for path in (trees / NAME).iterdir()) == ["files", "site-packages"]


@pytest.fixture(name="noexec")
def fixture_noexec(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The paths that exist and are on a mount with noexec; all others exist and are not."""
    paths: set[str] = set()

    def statvfs(path: str) -> SimpleNamespace:
        return SimpleNamespace(f_flag=os.ST_NOEXEC if path in paths else 0)

    monkeypatch.setattr(os, "statvfs", statvfs)
    return paths


def test_packages_on_a_mount_with_noexec(
    trees: Path, noexec: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = trees.with_name("localdisk.extracted")
    assert bootstrap.trees_of_root() == str(trees)
    noexec.add(str(trees))
    assert bootstrap.trees_of_root() == str(beside)
    packages = first_run.unpacked(str(beside), ME)
    assert packages == str(beside / NAME / "site-packages") == bootstrap.ready(str(beside), ME)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(trees.parent))
    assert refused(capsys, lambda: first_run.unpacked(str(trees), ME)) == (
        f"localdisk: {trees} is on a file system that is mounted noexec, no compiled module is loaded from"
        f" there : mount -o remount,exec {trees.parent}"
    )

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "makedirs", read_only)
    assert refused(capsys, lambda: first_run.unpacked(str(beside), ME)) == (
        f"localdisk: cannot extract to {beside}, Read-only file system : mount -o remount,exec {trees.parent}"
    )


def test_where_there_is_no_directory_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def statvfs(path: str) -> SimpleNamespace:
        seen.append(path)
        if path != str(tmp_path):
            raise FileNotFoundError
        return SimpleNamespace(f_flag=os.ST_NOEXEC | os.ST_RDONLY)

    monkeypatch.setattr(os, "statvfs", statvfs)
    assert bootstrap.is_noexec(str(tmp_path / "a/b"))
    assert seen == [str(tmp_path / "a/b"), str(tmp_path / "a"), str(tmp_path)]
    monkeypatch.setattr(os, "statvfs", lambda _path: os.close(-1))
    assert not bootstrap.is_noexec(str(tmp_path))


def refused(capsys: pytest.CaptureFixture[str], call: Callable[[], object]) -> str:
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_not_where_others_could_write(trees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trees.mkdir()
    trees.chmod(0o777)
    line = refused(capsys, lambda: first_run.unpacked(str(trees), ME))
    assert line == f"localdisk: {trees} could be written by others : rm -r {trees}"
    assert list(trees.iterdir()) == []


def test_not_through_a_link(trees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = trees.parent / "elsewhere"
    elsewhere.mkdir()
    trees.symlink_to(elsewhere)
    assert "could be written by others" in refused(capsys, lambda: first_run.unpacked(str(trees), ME))
    assert list(elsewhere.iterdir()) == []


def test_a_user_who_cannot_extract(trees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, lambda: first_run.unpacked("/dev/null/.cache", ME))
    assert line == (
        "localdisk: cannot extract to /dev/null/.cache, Not a directory"
        f" : make room in {trees} (df -h {trees}), then run {trees.parent}/localdisk --version once as root"
    )


def test_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, trees: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refused(capsys, lambda: first_run.unpacked(str(trees), ME))
    assert [path.name for path in trees.iterdir()] == [".lock"]


def test_an_update_while_it_starts(trees: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(trees.parent / "localdisk", "w") as packed:
        packed.writestr("bootstrap.py", 'BUILD_ID = "abd"\n')
    line = refused(capsys, lambda: first_run.unpacked(str(trees), ME))
    assert line == f"localdisk: {trees.parent}/localdisk was replaced while it started : try again"


def test_what_is_still_damaged_is_not_run(
    monkeypatch: pytest.MonkeyPatch, trees: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extract, "unpack", lambda *_: None)
    line = refused(capsys, lambda: first_run.unpacked(str(trees), ME))
    assert line.startswith(f"localdisk: what was extracted to {trees} is damaged : ")


def test_an_ordinary_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    home(monkeypatch, Path("/home/x"))
    assert first_run.own_trees() == "/home/x/.cache/localdisk"


def home(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    class Entry:
        pw_dir = str(path)

    monkeypatch.setattr("pwd.getpwuid", lambda _uid: Entry)


# -- starting


@pytest.fixture(name="started")
def fixture_started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What main.py starts, instead of doing so."""
    started: list[str] = []

    def spawn(path: str, argv: list[str], environ: dict[str, str], file_actions: object) -> int:
        assert environ == {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        started.append(f"{path}: {' '.join(argv)}")
        raise FileNotFoundError

    def untrusted(path: str) -> str:
        started.append(f"trusts {path}")
        return ""

    def program() -> int:
        started.append(f"program on {sys.path[-1]}")
        return 5

    monkeypatch.setattr(os, "posix_spawn", spawn)
    monkeypatch.setattr(os, "umask", lambda mask: started.append(f"umask {mask:o}"))
    monkeypatch.setattr(os, "environ", {"PYTHONPATH": "/evil"})

    def end(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(gc, "set_threshold", lambda _objects: None)
    monkeypatch.setattr(sys, "path", ["the zipapp", *sys.path])
    monkeypatch.setattr("localdisk.cli.main", program)
    # The tests' user in root's place, and everything its own.
    monkeypatch.setattr(bootstrap, "is_alone", lambda path, _user: os.path.isdir(path))
    monkeypatch.setattr(bootstrap, "untrusted", untrusted)
    return started


def runs(point: str = "", called_by_vdsm: bool = False) -> None:
    """As main.py runs it."""
    with pytest.raises(SystemExit) as caught:
        bootstrap.run(bootstrap.packages() or first_run.packages(point, called_by_vdsm))
    assert caught.value.code == 5
    assert "the zipapp" not in sys.path


def test_a_refusal_has_the_points_exit_code(
    monkeypatch: pytest.MonkeyPatch, trees: Path, started: list[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(bootstrap, "untrusted", lambda path: path)
    assert bootstrap.packages() == ""
    for point, code in (("before_vdsm_start", 1), (POINT, 2), ("", 2)):
        with pytest.raises(SystemExit) as caught:
            first_run.packages(point, called_by_vdsm=True)
        assert caught.value.code == code


def test_the_program_runs_from_roots_tree(
    monkeypatch: pytest.MonkeyPatch, trees: Path, started: list[str]
) -> None:
    packages = first_run.unpacked(str(trees), ME)
    monkeypatch.setattr(os, "geteuid", lambda: 36)
    runs()
    assert started == ["umask 22", f"program on {packages}"]


def test_who_ignores_the_death_of_children(trees: Path, started: list[str]) -> None:
    """Ignored, which is inherited, it makes subprocess take every exit code for 0."""
    first_run.unpacked(str(trees), ME)
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        runs()
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
        assert subprocess.run(["false"], check=False).returncode == 1
    finally:
        signal.signal(signal.SIGCHLD, before)


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
    program = trees.parent / "localdisk"
    monkeypatch.setattr(os, "geteuid", lambda: user)
    home(monkeypatch, trees.parent / "home")
    runs(POINT, called_by_vdsm)
    place = trees if user == 0 else trees.parent / "home/.cache/localdisk"
    asked = [f"/usr/bin/sudo: sudo -n {program} helper"] if asks_root else []
    trusts = [f"trusts {program}"] * 2 if user == 0 else []
    assert started == ["umask 22", *trusts, *asked, f"program on {place / NAME / 'site-packages'}"]
    assert "PYTHONPATH" not in os.environ


def test_root_extracts_for_vdsm(monkeypatch: pytest.MonkeyPatch, trees: Path, started: list[str]) -> None:
    def extract(_path: str, _argv: list[str], _environ: object, file_actions: object) -> int:
        child = os.fork()
        if child == 0:
            first_run.unpacked(str(trees), 0)
            end_at_once(0)
        return child

    monkeypatch.setattr(os, "geteuid", lambda: 36)
    monkeypatch.setattr(os, "posix_spawn", extract)
    runs(POINT, called_by_vdsm=True)
    assert started == ["umask 22", f"program on {trees / NAME / 'site-packages'}"]
