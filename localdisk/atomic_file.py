"""Replaces a file so that a reader finds either the old bytes or the new bytes, never a part.

A process that is killed in between leaves at most `temporary_name(path)`; the next replacement removes it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator


def temporary_name(path: str) -> str:
    """A name beside `path` that sudo, cron, udev and the textfile collector ignore."""
    directory, name = os.path.split(path)
    return f"{directory}/.{name}.new"


def replace(
    path: str, data: bytes, mode: int, owner: tuple[int, int], validate: Callable[[str], None] | None = None
) -> None:
    """Make `path` a regular file with these bytes, mode and owner; it is synced when this returns.

    `validate` gets the path of the temporary file first, and raises an error to refuse it.  Raises OSError.
    """
    temporary = temporary_name(path)
    with removed_on_failure(temporary):
        with open(new_file(temporary), "wb") as file:
            file.write(data)
            file.flush()
            os.fchown(file.fileno(), *owner)
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        if validate:
            validate(temporary)
        os.replace(temporary, path)
    sync(os.path.dirname(path))


def new_file(path: str) -> int:
    """A descriptor of a new file that nobody else has open; a file of a killed run is removed first.

    The directory may belong to another user, who must not choose to which file root writes.
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
    """Sync a directory, so that a rename or removal in it survives a crash."""
    fd = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
