"""Changes to the files of a host: each is data, complete or not there, and on the disk when `do` returns.

A change that is broken off leaves at most a temporary file of a fixed name, which the next try replaces.
Paths are absolute.  `do` raises OSError, and what run.py raises.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from typing import ClassVar, Union

from localdisk import atomic_file, run
from localdisk.atomic_file import removed_on_failure, sync, unlink
from localdisk.frozen import field, frozen
from localdisk.zipapp import extract


@frozen
class MakeDirectory:
    path: str

    verbs: ClassVar = ("make", "made")

    @property
    def rest(self) -> str:
        return f"directory {self.path}"

    def do(self) -> None:
        with contextlib.suppress(FileExistsError):  # another one was faster
            os.mkdir(self.path)
            os.chmod(self.path, 0o755)  # noqa: S103 (vdsm must get to its hooks)
            os.chown(self.path, *owner())
        sync(os.path.dirname(self.path))


@frozen
class Write:
    """Make `path` a regular file, whatever is there, if `judge`, a command, accepts what is written."""

    path: str
    data: bytes = field(repr=False)
    mode: int
    judge: tuple[str, ...] = ()

    verbs: ClassVar = ("write", "wrote")

    @property
    def rest(self) -> str:
        return f"{self.path} (mode {self.mode:04o})"

    def do(self) -> None:
        judge = self._judged if self.judge else None
        atomic_file.replace(self.path, self.data, self.mode, owner(), judge)

    def _judged(self, temporary: str) -> None:
        run.run([*self.judge, temporary])


@frozen
class Link:
    """Make `path` a symbolic link, in the place of a link that is there."""

    path: str
    target: str

    verbs: ClassVar = ("link", "linked")

    @property
    def rest(self) -> str:
        return f"{self.path} to {self.target}"

    def do(self) -> None:
        temporary = temporary_link(self.path)
        with removed_on_failure(temporary):
            unlink(temporary)
            os.symlink(self.target, temporary)
            os.replace(temporary, self.path)
        sync(os.path.dirname(self.path))


@frozen
class Move:
    """Rename a file, in the place of what is there; `why` is told."""

    path: str
    to: str
    why: str

    verbs: ClassVar = ("move", "moved")

    @property
    def rest(self) -> str:
        return f"{self.path} to {self.to}, {self.why}"

    def do(self) -> None:
        os.replace(self.path, self.to)
        sync(os.path.dirname(self.to))
        sync(os.path.dirname(self.path))


@frozen
class Remove:
    """Remove a file, a link, an empty directory, or a directory with all that is in it."""

    path: str

    verbs: ClassVar = ("remove", "removed")

    @property
    def rest(self) -> str:
        return self.path

    def do(self) -> None:
        if os.path.isdir(self.path) and not os.path.islink(self.path):
            shutil.rmtree(self.path)
        else:
            unlink(self.path)
        sync(os.path.dirname(self.path))


@frozen
class Prune:
    """Remove the trees of other builds than `keep` that no process runs from; `found` are these."""

    trees: str
    keep: str
    found: tuple[str, ...]

    verbs: ClassVar = ("remove", "removed")

    @property
    def rest(self) -> str:
        return f"what other builds extracted to {self.trees}: {', '.join(self.found)}"

    def do(self) -> None:
        extract.prune(self.trees, self.keep)


@frozen
class Call:
    """Run a command of the live system."""

    argv: tuple[str, ...]

    verbs: ClassVar = ("run", "ran")

    @property
    def rest(self) -> str:
        return " ".join(self.argv)

    def do(self) -> None:
        run.run(self.argv)


Change = Union[MakeDirectory, Write, Link, Move, Remove, Prune, Call]


def planned(change: Change) -> str:
    """The line that tells a change that would be made."""
    return f"would {change.verbs[0]} {change.rest}"


def made(change: Change) -> str:
    """The line that tells a change that was made."""
    return f"{change.verbs[1]} {change.rest}"


# -- what is there


def is_as_written(write: Write) -> bool:
    """Whether the file is what it would be made: its bytes, owner and mode."""
    try:
        status = os.lstat(write.path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    wanted = (stat.S_IFREG | write.mode, *owner(), len(write.data))
    if (status.st_mode, status.st_uid, status.st_gid, status.st_size) != wanted:
        return False
    with open(write.path, "rb") as file:
        return file.read() == write.data


def temporary_link(path: str) -> str:
    """Beside the directory of `path`: everything inside of a hook point's directory may be run."""
    directory, name = os.path.split(path)
    above, point = os.path.split(directory)
    return f"{above}/.{point}-{name}.new"


# -- how it is done


def owner() -> tuple[int, int]:
    """Whose the files are: root's, or of whoever tries this out."""
    return (0, 0) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
