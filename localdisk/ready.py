"""Which local disks are ready: one file for each in /run/localdisk/ready, with the name of its volume.

The tags are what counts.  The helper makes a disk's file when the disk is ready, while it holds the disk's
lock; before a command of ours changes the volume in LVM, the file is removed (`volumes/lvm.py`).  vdsm calls
before_vm_start when all disks of the VM are prepared: if each disk has a file, neither LVM nor root is asked.
A file counts only with the device for which it was made.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from localdisk import device_mapper, lock, log
from localdisk.errors import RunUnwritable
from localdisk.ids import is_uuid

_LIMIT = 4096  # bytes; a file is shorter


def note(vm_id: str, image_id: str, path: str, dm_uuid: str) -> None:
    """Note that the local disk at `path` is ready: the device with this device-mapper UUID.

    A failure is only logged: the hook then asks the helper.
    """
    file = _file(os.path.basename(path))
    try:
        os.makedirs(os.path.dirname(file), mode=0o755, exist_ok=True)
        lock.remove(file)
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            os.write(fd, _text(vm_id, image_id, path, dm_uuid))
        finally:
            os.close(fd)
    except (OSError, RunUnwritable) as error:
        why = error.strerror if isinstance(error, OSError) else error
        log.problem("record of a ready disk cannot be written", vm=vm_id, path=path, why=why)


def is_noted(vm_id: str, image_id: str, path: str) -> bool:
    """Whether the local disk at `path` is ready for this VM and image, and its device is there."""
    try:
        dm_uuid = device_mapper.uuid_at(path)
        fd = os.open(_file(os.path.basename(path)), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return os.read(fd, _LIMIT) == _text(vm_id, image_id, path, dm_uuid)
        finally:
            os.close(fd)
    except OSError:
        return False


def forget(lv_names: Iterable[str]) -> None:
    """These volumes are about to be changed.  Raises RunUnwritable."""
    for name in lv_names:
        lock.remove(_file(name))


def sweep(ready: frozenset[str]) -> None:
    """Remove the files of all volumes but these, which are ready.  Raises RunUnwritable."""
    try:
        names = os.listdir(os.path.dirname(_file("")))
    except OSError:
        return
    forget(name for name in names if is_uuid(name) and name not in ready)


def _file(lv_name: str) -> str:
    return os.path.join(lock.RUN, "ready", lv_name)


def _text(vm_id: str, image_id: str, path: str, dm_uuid: str) -> bytes:
    return f"{vm_id} {image_id} {dm_uuid} {path}\n".encode()
