"""Replaces a file so that whoever reads it finds the old bytes or the new ones, never a part.

A replacement that is killed leaves at most `temporary_name(path)`, which the next one replaces.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator


def temporary_name(path: str) -> str:
    """Beside `path`; neither sudo, cron, udev nor the textfile collector reads such a name."""
    directory, name = os.path.split(path)
    return f"{directory}/.{name}.new"


def replace(
    path: str, data: bytes, mode: int, owner: tuple[int, int], judge: Callable[[str], None] | None = None
) -> None:
    """Make `path` a regular file of these bytes, this mode and this owner, on the disk when this returns.

    `judge` looks at the temporary file first, and raises to refuse it.  Raises OSError.
    """
    temporary = temporary_name(path)
    with removed_on_failure(temporary):
        with open(new_file(temporary), "wb") as file:
            file.write(data)
            file.flush()
            os.fchown(file.fileno(), *owner)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        if judge:
            judge(temporary)
        os.replace(temporary, path)
    sync(os.path.dirname(path))


def new_file(path: str) -> int:
    """A descriptor of a file that nobody else has open, in the place of what a killed run left.

    The directory may be another user's, who must not choose what root writes to.
    """
    unlink(path)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


@contextlib.contextmanager
def removed_on_failure(path: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        unlink(path)
        raise


def unlink(path: str) -> None:
    """Remove a file or link, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def sync(directory: str) -> None:
    """Have what was renamed or removed in a directory on the disk."""
    fd = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
