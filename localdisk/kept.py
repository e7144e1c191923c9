"""Which VMs may have kept disks on this host: one file for each VM in /run/localdisk/kept.

For a VM without the custom property, `main.py` ends at once, unless the VM has a file here.  The tags of the
disks are what counts.  A file is made before its VM's first disk is complete, and gc makes all files again
from the tags, also after a boot, before vdsm starts any VM; then it makes the file `ALL`.  As long as gc
cannot read all volume groups after a boot, each VM may have kept disks.  The text of a file names the images
whose disks are about to be marked as stale: if the marking is interrupted, the next start or gc marks them.
Each line is an image, or `IMAGE/VOLUME GROUP` if the others have been looked at and this one could not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from localdisk import lock, log
from localdisk.ids import is_uuid

EVERY = "*"  # all images of the VM
ALL = "all"  # the name of an empty file: every VM that has kept disks has its file


def path(vm_id: str) -> str:
    return os.path.join(lock.RUN, "kept", vm_id)


def may_have(vm_id: str) -> bool:
    """Whether the VM may have kept disks on this host; everybody may ask."""
    return os.path.exists(path(vm_id)) or not os.path.exists(path(ALL))


def note(vm_id: str) -> None:
    """Note that the VM has, or will have, a disk that may be kept.  A failure is only logged."""
    _write(vm_id)


def doubt(vm_id: str, images: Iterable[str]) -> tuple[str, ...]:
    """Note that kept disks of these images are about to be marked as stale; returns all lines of the file."""
    every = tuple(sorted({*images, *doubted(vm_id)}))
    _write(vm_id, "\n".join(every))
    return every


def settle(vm_id: str, doubts: Iterable[str], unread: Iterable[str]) -> None:
    """Note that these disks are marked, but for those in the groups that could not be read."""
    left = {f"{image}/{name}" for name in unread for image in images_in(doubts, name)}
    _write(vm_id, "\n".join(sorted(left)))


def doubted(vm_id: str) -> tuple[str, ...]:
    """The lines of its file: whose kept disks must still be marked as stale."""
    try:
        with open(path(vm_id), encoding="utf-8", errors="replace") as file:
            return tuple(file.read(1 << 16).split())
    except OSError:
        return ()


def images_in(doubts: Iterable[str], vg_name: str) -> frozenset[str]:
    """The images whose kept disks must still be marked in this group."""
    split = (doubt.partition("/") for doubt in doubts)
    return frozenset(image for image, _, group in split if group in ("", vg_name))


def noted() -> Mapping[str, tuple[str, ...]]:
    """All VMs that have a file, with what is in it."""
    return {vm_id: doubted(vm_id) if _size(entry) else () for vm_id, entry in sorted(_entries().items())}


def times() -> Mapping[str, int]:
    """When each file was last written, by VM: what `renew` compares."""
    return {vm_id: time for vm_id, entry in _entries().items() if (time := _time(entry))}


def renew(vm_ids: frozenset[str], is_all: bool, seen: Mapping[str, int]) -> None:
    """These VMs have kept disks; `is_all`: and no others, so that the files of others are removed.

    `seen`: `times` from before the disks were read.  A file that was written since is left: its VM has, or
    will have, a disk that was not read.
    """
    entries = _entries()
    for vm_id in vm_ids:
        if vm_id not in entries or not entries[vm_id].is_file(follow_symlinks=False):
            note(vm_id)
    for vm_id in (entries.keys() - vm_ids) if is_all else ():
        entry = entries[vm_id]
        if seen.get(vm_id) == _time(entry) and not (_size(entry) and doubted(vm_id)):
            try:
                os.unlink(path(vm_id))
            except OSError as error:
                log.problem("record of kept disks cannot be removed", vm=vm_id, why=error.strerror)
    if is_all and not os.path.exists(path(ALL)):
        note(ALL)


def _entries() -> dict[str, os.DirEntry[str]]:
    """What is there by the name of a VM: with a thousand VMs, few files are opened."""
    try:
        with os.scandir(os.path.dirname(path(""))) as entries:
            return {entry.name: entry for entry in entries if is_uuid(entry.name)}
    except OSError:
        return {}


def _size(entry: os.DirEntry[str]) -> int:
    """Its bytes, -1 if it is no file."""
    try:
        return entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else -1
    except OSError:  # it was removed just now
        return -1


def _time(entry: os.DirEntry[str]) -> int:
    """When it was last written, in nanoseconds since the epoch; 0 if it was removed just now."""
    try:
        return entry.stat(follow_symlinks=False).st_mtime_ns
    except OSError:
        return 0


def _write(vm_id: str, text: str | None = None) -> None:
    """Make the file, with this text if there is one, and set its time to now.

    The old text is overwritten before the file is cut: whoever is killed here loses no line.
    """
    try:
        os.makedirs(os.path.dirname(path(vm_id)), mode=0o755, exist_ok=True)
        fd = os.open(path(vm_id), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            if text is not None:
                os.pwrite(fd, text.encode(), 0)
                os.ftruncate(fd, len(text.encode()))
            os.utime(fd)
        finally:
            os.close(fd)
    except OSError as error:
        log.problem("record of kept disks cannot be written", vm=vm_id, why=error.strerror)
