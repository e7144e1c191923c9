"""The mode uninstall: removes what install has put on a host, and moves back what install has moved aside.

Configuration and local disks are kept.  While a start, stop or removal is unfinished, uninstall is refused:
nobody would finish it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from localdisk import config, lock
from localdisk.atomic_file import temporary_name
from localdisk.errors import Error, NoVolumeGroup, WorkUnfinished
from localdisk.host import files
from localdisk.host.file_changes import Change, Move, Remove, planned, temporary_link
from localdisk.host.install import (
    LOCK,
    RELOAD,
    checked_root,
    hook_files,
    is_ours,
    make,
    own_trees,
    require_inside,
)
from localdisk.vdsm.hook_call import POINTS
from localdisk.volumes.local_disk import LocalDisk, State, local_disks
from localdisk.volumes.lvm import VolumeGroup
from localdisk.volumes.template import Template, templates


def uninstall(root: str = "", dry_run: bool = False, force: bool = False) -> Iterator[str]:
    """Undo install on this host, or below directory `root`; yields lines for changes and for what is kept.

    Raises WorkUnfinished (unless `force`), the errors of reading the volume groups, CommandFailed, OSError.
    """
    root = checked_root(root)
    if not root and not force:
        _require_no_work()
    left = tuple(_left(root))  # before the packages that it imports are removed
    if dry_run:
        yield from map(planned, [*decide(root), *_state(root)])
    elif root:
        yield from make((*decide(root), *_state(root)), root)
    else:
        with lock.holding(LOCK, time.sleep):
            yield from make(decide(root), root)
        yield from make(tuple(_state(root)), root)
    yield from left


# -- unfinished work


def _require_no_work() -> None:
    """Raise WorkUnfinished if a start or stop is under way, or a disk is in use, unfinished or DELETING."""
    busy = [f"{path} is held" for path in sorted(lock.held() - {LOCK})]
    busy += [f"local disk {vg.vg_name}/{disk.volume_id} is {why}" for vg, disk, why in _busy_disks()]
    busy += [f"template LV {vg.vg_name}/{found.name} is {why}" for vg, found, why in _busy_templates()]
    if busy:
        more = f" (and {len(busy) - 1} more)" if len(busy) > 1 else ""
        raise WorkUnfinished(what=busy[0] + more)


def _busy_disks() -> Iterator[tuple[VolumeGroup, LocalDisk, str]]:
    for vg in _groups():
        for disk in local_disks(vg):
            if disk.is_open:
                yield vg, disk, f"in use by VM {disk.vm_id}"
            elif disk.state is State.UNFINISHED:
                yield vg, disk, "unfinished"
            elif disk.state is State.DELETING:
                yield vg, disk, "not erased and removed yet"


def _busy_templates() -> Iterator[tuple[VolumeGroup, Template, str]]:
    for vg in _groups():
        for found in templates(vg):
            if found.is_open:
                yield vg, found, "in use"
            elif not found.is_ready:
                yield vg, found, "unfinished"


def _groups() -> Iterator[VolumeGroup]:
    for name, devices in config.load().volume_groups.items():
        try:
            yield VolumeGroup.read(name, devices)
        except NoVolumeGroup:
            continue


# -- deciding


def decide(root: str) -> tuple[Change, ...]:
    """The changes that undo install: first vdsm's links, then the files that they lead to."""
    changes = (*_unlink_hooks(root), *_rules(root), *_removed(f"{root}{files.PROGRAM}"))
    for change in changes:
        if isinstance(change, (Remove, Move)):
            require_inside(root, os.path.dirname(change.path))
    return changes


def _unlink_hooks(root: str) -> Iterator[Change]:
    for path in hook_files(root):
        if is_ours(path):
            yield Remove(path)
    for point in sorted(POINTS):
        yield from _removed(temporary_link(f"{root}{files.hook_link(point)}"))
    yield from _hooks_back(f"{root}{files.HOOKS_ASIDE}", f"{root}{files.HOOKS}")


def _hooks_back(aside: str, hooks: str) -> Iterator[Change]:
    """Move the files of `aside` back to `hooks`, if their place there is free."""
    found = [os.path.relpath(path, aside) for path in _files_below(aside)]
    back = [change for path in found for change in _back(f"{aside}/{path}", f"{hooks}/{path}")]
    yield from back
    if len(back) == len(found):
        yield from _removed(aside)


def _files_below(top: str) -> Iterator[str]:
    for directory, _, names in sorted(os.walk(top)):
        yield from (os.path.join(directory, name) for name in sorted(names))


def _rules(root: str) -> Iterator[Change]:
    for path in (files.CRON, files.SUDOERS):
        yield from _removed(root + path)
    yield from _older_back(f"{root}{files.OLDER_SUDOERS}")
    udev = [change for path in files.UDEV_RULES for change in _removed(root + path)]
    udev += _older_back(f"{root}{files.OLDER_UDEV_RULE}")
    yield from udev
    yield from (RELOAD,) if udev and not root else ()
    for path in files.COLLECTORS:
        metrics = f"{root}{path}/{files.METRICS}"
        for each in (metrics, temporary_name(metrics), f"{metrics}.new"):  # .new: an earlier build's
            yield from _removed(each)
    for path in (files.PROGRAM, files.CRON, files.SUDOERS, files.CONFIG, *files.UDEV_RULES):
        yield from _removed(temporary_name(root + path))


def _older_back(path: str) -> Iterator[Change]:
    return _back(path + files.ASIDE, path)


def _state(root: str) -> Iterator[Change]:
    """Remove what localdisk makes while it runs; last, because our own lock is there."""
    trees = [files.TREES, files.TREES_BESIDE]
    own = own_trees()  # of a program that runs from another place
    if not root and own.endswith(files.BESIDE) and own != os.path.realpath(files.TREES_BESIDE):
        trees.append(own)
    for path in (*trees, lock.RUN):
        yield from _removed(root + path)


def _back(path: str, to: str) -> Iterator[Change]:
    is_free = os.path.isdir(os.path.dirname(to)) and (is_ours(to) or not os.path.lexists(to))
    if os.path.lexists(path) and is_free:
        yield Move(path, to, "where install found it")


def _removed(path: str) -> list[Change]:
    return [Remove(path)] if os.path.lexists(path) else []


# -- what is kept


def _left(root: str) -> Iterator[str]:
    path = f"{root}{files.CONFIG}"
    if os.path.lexists(path):
        yield f"left {path}"
    if root:
        return
    try:
        for vg in _groups():
            disks = local_disks(vg)
            if disks:
                yield f"left {len(disks)} local disk(s) in volume group {vg.vg_name}: see lvs {vg.vg_name}"
            names = " ".join(f"{vg.vg_name}/{found.name}" for found in templates(vg))
            if names:
                how = "removed by the file that you installed"
                yield f"left the template cache, which no VM needs; {how}: remove {names}"
    except Error as error:
        yield f"left the local disks, if there are any: {str(error).splitlines()[-1]}"
