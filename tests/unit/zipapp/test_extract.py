"""Trees of extracted packages: made as a whole, by many at once, removed when nobody uses them."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import stat
import sys
import zipfile
from pathlib import Path

import pytest

from localdisk.zipapp import extract
from tests.fakes.zipped import zipped

TAG = sys.implementation.cache_tag


@pytest.fixture(name="archive")
def fixture_archive(tmp_path: Path) -> str:
    path = tmp_path / "localdisk"
    path.write_bytes(b"#!/usr/bin/python3\n")
    with zipfile.ZipFile(path, "a") as packed:
        packed.writestr("__main__.py", "raise SystemExit\n")
        packed.writestr("bootstrap.py", 'BUILD_ID = "abc"\n')
        packed.writestr(
            extract.PACKED,
            zipped(
                {
                    "site-packages/some/__init__.py": "",
                    "site-packages/some/module.py": "def f(): raise ValueError\n",
                    f"site-packages/some/fast.{TAG}-x86_64-linux-gnu.so": "ours",
                    "site-packages/some/fast.cpython-37-x86_64-linux-gnu.so": "other",
                    "site-packages/some/data.json": "{}",
                }
            ),
        )
    return str(path)


@pytest.fixture(name="trees")
def fixture_trees(tmp_path: Path) -> Path:
    trees = tmp_path / "trees"
    trees.mkdir()
    return trees


def files(tree: Path) -> dict[str, int]:
    lines = (line.split(" ", 1) for line in (tree / "files").read_text().splitlines())
    return {name: int(size) for size, name in lines}


def test_what_is_in_a_tree(archive: str, trees: Path) -> None:
    """All for this Python, compiled, nothing for another, no source, and each file is listed."""
    extract.unpack(archive, str(trees), "one", "abc")
    found = files(trees / "one")
    assert found == {
        str(path.relative_to(trees / "one")): path.stat().st_size
        for path in (trees / "one/site-packages").rglob("*")
        if path.is_file()
    }
    assert {Path(name).name for name in found} == {
        "__init__.pyc",
        "module.pyc",
        f"fast.{TAG}-x86_64-linux-gnu.so",
        "data.json",
    }
    assert stat.S_IMODE((trees / "one").stat().st_mode) == 0o755


def test_what_is_compiled_knows_its_place_and_is_believed(archive: str, trees: Path) -> None:
    extract.unpack(archive, str(trees), "one", "abc")
    compiled = trees / "one/site-packages/some/module.pyc"
    data = compiled.read_bytes()
    assert str(trees / "one/site-packages/some/module.py").encode() in data
    assert int.from_bytes(data[4:8], "little") == 0b01  # by hash, unchecked (PEP 552)


@pytest.mark.parametrize("number", range(14))
def test_killed_in_the_middle(archive: str, trees: Path, number: int) -> None:
    """Nothing is there under the name, or all of it; what was begun is removed by the next one."""
    left = [number]
    real = os.fsync

    def sync(fd: int) -> None:
        if not left[0]:
            os.kill(os.getpid(), 9)
        left[0] -= 1
        real(fd)

    child = os.fork()
    if child == 0:
        os.fsync = sync  # type: ignore[assignment]
        extract.unpack(archive, str(trees), "one", "abc")
        os._exit(0)
    os.waitpid(child, 0)
    names = {path.name for path in trees.iterdir()}
    assert "one" not in names or files(trees / "one")
    extract.unpack(archive, str(trees), "one", "abc")
    assert [path.name for path in trees.iterdir()] == ["one"]
    assert sorted(path.name for path in (trees / "one").iterdir()) == ["files", "site-packages"]


def _start(archive: str, trees: str) -> bool:
    with extract.alone(trees):
        made = not os.path.exists(os.path.join(trees, "one"))
        if made:
            extract.unpack(archive, trees, "one", "abc")
    return made


def test_of_many_at_once_one_extracts(archive: str, trees: Path) -> None:
    with multiprocessing.get_context("fork").Pool(8) as pool:
        made = pool.starmap(_start, [(archive, str(trees))] * 50)
    assert sum(made) == 1


def test_trees_that_nobody_uses_go(archive: str, trees: Path) -> None:
    for name in ("old", "used", "new"):
        extract.unpack(archive, str(trees), name, "abc")
    (trees / "localdisk_abc").mkdir()  # of a version that had no list
    with open(trees / "used/files", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert extract.prune(str(trees), keep="new") == ["localdisk_abc", "old"]
    assert sorted(path.name for path in trees.iterdir()) == [".lock", "new", "used"]
    assert extract.prune(str(trees), keep="new") == ["used"]


def test_the_lock_follows_no_link(trees: Path, tmp_path: Path) -> None:
    (trees / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), extract.alone(str(trees)):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_was_replaced_meanwhile(archive: str, trees: Path) -> None:
    with pytest.raises(extract.Replaced):
        extract.unpack(archive, str(trees), "one", "abd")
    assert list(trees.iterdir()) == []
