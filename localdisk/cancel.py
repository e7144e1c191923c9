"""VMs that are powered off while vdsm starts them: one empty file for each VM in /run/localdisk.

    <vm id>.destroying   before_vm_destroy has been called: vdsm powers off a VM that it is starting
    <vm id>.destroyed    after_vm_destroy has been called, too

A helper that prepares a disk of the VM looks for the file whenever it waits, and ends if the file is there.
So nobody has to find that helper, and a helper that is started a moment later ends as well.

vdsm still calls these hook points for such a start (vdsm `lib/vdsm/virt/vm.py`: `_preparePathsForDrives`,
`doDestroy`, `releaseVm`):

- after_disk_prepare for a further disk, if the call begins before vdsm notes that the VM is to be destroyed;
  vdsm notes that right after before_vm_destroy.  It never calls it after after_vm_destroy, which waits until
  the disk is prepared;
- before_vm_start, once, at any time: even after after_vm_destroy, and even for a start that has waited until
  then for one of vdsm's four places.

The next start of the VM calls after_disk_prepare first, and only after after_vm_destroy of the start before.
This call removes the file.  If a process is killed in between, or the VM is powered off twice, a file is left
and ends at most one start: `destroying` counts for SETTLED seconds at after_disk_prepare, before_vm_start
removes a file that it finds, gc removes old files, and before_vdsm_start removes all files.  A VM without
local disks is never ended: when it resumes, vdsm calls before_vm_start without a start before it.
"""

from __future__ import annotations

import contextlib
import os
import time

from localdisk import lock
from localdisk.errors import StartCancelled

SETTLED = 60  # seconds from before_vm_destroy to the last after_disk_prepare of the same start
KEEP_FOR = 24 * 3600  # seconds that a start may wait for its place

_DESTROYING, _DESTROYED = ".destroying", ".destroyed"


def destroying(vm_id: str) -> None:
    """Note that vdsm powers off this VM while it starts; helpers then end.  Raises RunUnwritable."""
    if _age(_path(vm_id, _DESTROYED)) < SETTLED:  # powered off twice: no further after_vm_destroy comes
        return
    fd = lock.make(_path(vm_id, _DESTROYING))
    now = time.time()
    os.utime(fd, (now, now))
    os.close(fd)


def destroyed(vm_id: str) -> None:
    """Note that vdsm has powered off this VM."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(_path(vm_id, _DESTROYING), _path(vm_id, _DESTROYED))


def is_cancelled(vm_id: str) -> bool:
    """Whether the present start of this VM must end."""
    return any(os.path.lexists(_path(vm_id, ending)) for ending in (_DESTROYING, _DESTROYED))


def require_start(vm_id: str) -> None:
    """At after_disk_prepare: raise StartCancelled if its start was powered off; else a new start begins."""
    if _age(_path(vm_id, _DESTROYING)) < SETTLED:
        raise StartCancelled(vm=vm_id)
    settle(vm_id)


def require_started(vm_id: str) -> None:
    """At before_vm_start: raise StartCancelled, once, if the start was powered off."""
    if is_cancelled(vm_id):
        settle(vm_id)
        raise StartCancelled(vm=vm_id)


def sweep(may_start: bool) -> None:
    """Remove files that are too old to end a start; remove all files if vdsm cannot be starting VMs."""
    for name in _names():
        path = os.path.join(lock.RUN, name)
        if not may_start or _age(path) > KEEP_FOR:
            lock.remove(path)


def settle(vm_id: str) -> None:
    """A start begins: remove the file of a power-off before it, but not the file of a recent one."""
    lock.remove(_path(vm_id, _DESTROYED))
    if SETTLED <= _age(_path(vm_id, _DESTROYING)) < float("inf"):
        lock.remove(_path(vm_id, _DESTROYING))


def _names() -> list[str]:
    try:
        found = os.listdir(lock.RUN)
    except FileNotFoundError:
        return []
    return [name for name in found if name.endswith((_DESTROYING, _DESTROYED))]


def _path(vm_id: str, ending: str) -> str:
    return os.path.join(lock.RUN, vm_id + ending)


def _age(path: str) -> float:
    """Seconds between now and the time of the file, in either direction; infinite if there is no file."""
    try:
        return abs(time.time() - os.lstat(path).st_mtime)
    except FileNotFoundError:
        return float("inf")
