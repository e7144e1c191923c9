"""Changes to a host's files.  A change is frozen data; `do` makes it, completely or not at all, and syncs.

If `do` is interrupted, it leaves at most a temporary file of a fixed name, which the next try replaces.
Paths are absolute.  `do` raises OSError and the errors of run.py.
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
    def what(self) -> str:
        return f"directory {self.path}"

    def do(self) -> None:
        with contextlib.suppress(FileExistsError):  # another one was faster
            os.mkdir(self.path)
            os.chmod(self.path, 0o755)  # noqa: S103 (vdsm must get to its hooks)
            os.chown(self.path, *owner())
        sync(os.path.dirname(self.path))


@frozen
class Write:
    """Make `path` a regular file if the command `validate` accepts it; what is there is replaced."""

    path: str
    data: bytes = field(repr=False)
    mode: int
    validate: tuple[str, ...] = ()

    verbs: ClassVar = ("write", "wrote")

    @property
    def what(self) -> str:
        return f"{self.path} (mode {self.mode:04o})"

    def do(self) -> None:
        validate = self._validated if self.validate else None
        atomic_file.replace(self.path, self.data, self.mode, owner(), validate)

    def _validated(self, temporary: str) -> None:
        run.run([*self.validate, temporary])


@frozen
class Link:
    """Make `path` a symbolic link; a link that is there is replaced."""

    path: str
    target: str

    verbs: ClassVar = ("link", "linked")

    @property
    def what(self) -> str:
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
    """Rename a file; a file that is there is replaced.  `why` is part of the line that is printed."""

    path: str
    to: str
    why: str

    verbs: ClassVar = ("move", "moved")

    @property
    def what(self) -> str:
        return f"{self.path} to {self.to}, {self.why}"

    def do(self) -> None:
        os.replace(self.path, self.to)
        sync(os.path.dirname(self.to))
        sync(os.path.dirname(self.path))


@frozen
class Remove:
    """Remove a file, a link, or a directory with its content."""

    path: str

    verbs: ClassVar = ("remove", "removed")

    @property
    def what(self) -> str:
        return self.path

    def do(self) -> None:
        if os.path.isdir(self.path) and not os.path.islink(self.path):
            shutil.rmtree(self.path)
        else:
            unlink(self.path)
        sync(os.path.dirname(self.path))


@frozen
class Prune:
    """Remove extracted packages of other builds than `keep` that no process uses; `found` names them."""

    trees: str
    keep: str
    found: tuple[str, ...]

    verbs: ClassVar = ("remove", "removed")

    @property
    def what(self) -> str:
        return f"what other builds extracted to {self.trees}: {', '.join(self.found)}"

    def do(self) -> None:
        extract.prune(self.trees, self.keep)


@frozen
class Call:
    """Run a command of the live system."""

    argv: tuple[str, ...]

    verbs: ClassVar = ("run", "ran")

    @property
    def what(self) -> str:
        return " ".join(self.argv)

    def do(self) -> None:
        run.run(self.argv)


Change = Union[MakeDirectory, Write, Link, Move, Remove, Prune, Call]


def planned(change: Change) -> str:
    """The line about a change that would be made."""
    return f"would {change.verbs[0]} {change.what}"


def made(change: Change) -> str:
    """The line about a change that was made."""
    return f"{change.verbs[1]} {change.what}"


# -- what is there


def is_as_written(write: Write) -> bool:
    """Whether the file already has the content, owner and mode of `write`."""
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
    """The temporary name of a link: outside the hook point's directory, in which vdsm may run every file."""
    directory, name = os.path.split(path)
    above, point = os.path.split(directory)
    return f"{above}/.{point}-{name}.new"


# -- how it is done


def owner() -> tuple[int, int]:
    """The owner of the files: root; without root, for tests, the user that runs this."""
    return (0, 0) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
