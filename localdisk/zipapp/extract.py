"""Extract the zipapp's packages for this Python, completely or not at all; standard library only.

The zipapp has it twice: beside `__main__.py` for bootstrap.py, and in the package for install.py.
"""

from __future__ import annotations

import compileall
import contextlib
import fcntl
import io
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from py_compile import PycInvalidationMode

FILES, PACKAGES = "files", "site-packages"  # as bootstrap.py has them
PACKED = "packages.zip"  # in the archive
_HERE = f"{sys.version_info[0]}{sys.version_info[1]}"
_OTHER = re.compile(rf"\.cpython-(?!{_HERE}-)[0-9]+-")  # modules compiled for another Python


@contextmanager
def alone(trees: str) -> Iterator[None]:
    """Hold the lock of the directory of trees."""
    fd = os.open(os.path.join(trees, ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class Replaced(Exception):
    """The archive is of another build than the code that reads it: the file was updated in between."""


def unpack(archive: str, trees: str, name: str, build_id: str) -> None:
    """Make the tree `name` from `archive`; replaces a tree of that name.

    The tree gets its name when all of it is on the disk.  The caller holds the lock of `trees`, so an
    unfinished tree of another process was left by a killed one.  Raises OSError, Replaced.
    """
    for left in os.listdir(trees):
        if left.startswith(".new-"):
            shutil.rmtree(os.path.join(trees, left))
    new, tree = tempfile.mkdtemp(prefix=".new-", dir=trees), os.path.join(trees, name)
    try:
        _fill(archive, new, tree, build_id)
        if os.path.lexists(tree):
            os.rename(tree, os.path.join(new, "damaged"))
        os.rename(new, tree)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _sync(trees)
    shutil.rmtree(os.path.join(tree, "damaged"), ignore_errors=True)


def prune(trees: str, keep: str) -> list[str]:
    """Remove the trees of other builds that no process runs from; returns their names."""
    removed = []
    with alone(trees):
        for name in sorted(os.listdir(trees)):
            if name != keep and not name.startswith(".") and _remove_unused(os.path.join(trees, name)):
                removed.append(name)
    return removed


def _remove_unused(tree: str) -> bool:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        fd = os.open(os.path.join(tree, FILES), os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(os.path.join(tree, FILES))  # without this file nobody uses the tree any more
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
    shutil.rmtree(tree, ignore_errors=True)
    return True


def _fill(archive: str, new: str, tree: str, build_id: str) -> None:
    with zipfile.ZipFile(archive) as whole:
        if build_id.encode() not in whole.read("bootstrap.py"):
            raise Replaced
        inside = io.BytesIO(whole.read(PACKED))
    with zipfile.ZipFile(inside) as packed:
        names = [name for name in packed.namelist() if name.startswith(f"{PACKAGES}/")]
        packed.extractall(new, [name for name in names if not _OTHER.search(name)])
    # Python does not compare compiled modules with their sources: the tree only changes as a whole.
    compileall.compile_dir(
        os.path.join(new, PACKAGES),
        quiet=2,
        invalidation_mode=PycInvalidationMode.UNCHECKED_HASH,
        stripdir=new,
        prependdir=tree,
        legacy=True,  # beside the source, which may then be removed
    )
    paths = sorted(os.path.join(directory, name) for directory, _, names in os.walk(new) for name in names)
    for path in paths:
        if path.endswith(".pyc"):
            os.unlink(path[:-1])
    paths = [path for path in paths if os.path.exists(path)]
    listed = "".join(f"{os.stat(path).st_size} {os.path.relpath(path, new)}\n" for path in paths)
    with open(os.path.join(new, FILES), "w", encoding="utf-8") as file:
        file.write(listed)
    os.chmod(new, 0o755)  # noqa: S103 (mkdtemp made it with mode 0700)
    for path in [*paths, os.path.join(new, FILES)]:
        _sync(path)
    for directory, _, _ in os.walk(new):
        _sync(directory)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
