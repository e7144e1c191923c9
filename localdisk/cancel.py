"""VMs that are powered off while vdsm starts them: one empty file for each in /run/localdisk.

    <vm id>.destroying   before_vm_destroy has been called: vdsm powers off a VM that it is starting
    <vm id>.destroyed    then after_vm_destroy, too

A helper that prepares a disk of the VM looks for the file whenever it waits, and ends if it is there; so
nobody has to find that helper, and a helper that began too late to be found ends as well.

What vdsm still calls for such a start, and when (vdsm `lib/vdsm/virt/vm.py`: `_preparePathsForDrives`,
`doDestroy`, `releaseVm`):

- after_disk_prepare for a further disk, if that begins before vdsm notes that the VM is to be destroyed,
  right after before_vm_destroy; never after after_vm_destroy, which waits for the disk's preparation;
- before_vm_start, once, at any time: also after after_vm_destroy, also for a start that has waited all along
  for one of vdsm's four places.

A new start calls after_disk_prepare first, after after_vm_destroy of the old one: this removes the file.
Processes that are killed in between, or a second power-off, leave a file that ends at most one start:
`destroying` counts for SETTLED seconds at after_disk_prepare, before_vm_start removes what it has met, gc
removes old files, and before_vdsm_start all of them.  A VM of which nothing is local is never ended: a resume
comes to before_vm_start without a start before it.
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
    """vdsm powers off this VM, which it is starting: end what is prepared for it.  Raises RunUnwritable."""
    if _age(_path(vm_id, _DESTROYED)) < SETTLED:  # powered off twice: no further after_vm_destroy comes
        return
    fd = lock.make(_path(vm_id, _DESTROYING))
    now = time.time()
    os.utime(fd, (now, now))
    os.close(fd)


def destroyed(vm_id: str) -> None:
    """vdsm has powered off this VM."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(_path(vm_id, _DESTROYING), _path(vm_id, _DESTROYED))


def is_cancelled(vm_id: str) -> bool:
    """Whether the start of this VM that is under way is to end."""
    return any(os.path.lexists(_path(vm_id, ending)) for ending in (_DESTROYING, _DESTROYED))


def require_start(vm_id: str) -> None:
    """At after_disk_prepare: raise StartCancelled if it is of a start that was ended; else a start begins."""
    if _age(_path(vm_id, _DESTROYING)) < SETTLED:
        raise StartCancelled(vm=vm_id)
    settle(vm_id)


def require_started(vm_id: str) -> None:
    """At before_vm_start: raise StartCancelled, once, if the start was ended."""
    if is_cancelled(vm_id):
        settle(vm_id)
        raise StartCancelled(vm=vm_id)


def sweep(may_start: bool) -> None:
    """Remove the files that end no start any more; all of them if vdsm cannot be starting VMs."""
    for name in _names():
        path = os.path.join(lock.RUN, name)
        if not may_start or _age(path) > KEEP_FOR:
            _remove(path)


def settle(vm_id: str) -> None:
    """A start begins.  What was powered off does not count any more; a power-off that comes just now does."""
    _remove(_path(vm_id, _DESTROYED))
    if SETTLED <= _age(_path(vm_id, _DESTROYING)) < float("inf"):
        _remove(_path(vm_id, _DESTROYING))


def _names() -> list[str]:
    try:
        found = os.listdir(lock.RUN)
    except FileNotFoundError:
        return []
    return [name for name in found if name.endswith((_DESTROYING, _DESTROYED))]


def _path(vm_id: str, ending: str) -> str:
    return os.path.join(lock.RUN, vm_id + ending)


def _age(path: str) -> float:
    """Seconds since the file was written, whichever way the clock was set; infinite if there is none."""
    try:
        return abs(time.time() - os.lstat(path).st_mtime)
    except FileNotFoundError:
        return float("inf")


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
