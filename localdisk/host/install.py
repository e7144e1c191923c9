"""The mode install: puts on a host the program, its rules, and the links through which vdsm calls it.

Install reads what is there, decides which changes are missing, and makes them one after the other.  So it can
be interrupted anywhere and run again; it is complete when nothing is missing.  Below another root directory,
an image's, it only runs the syntax check of the sudo rule.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
import zipfile
from collections.abc import Iterator

from localdisk import config, lock, log
from localdisk.atomic_file import temporary_name
from localdisk.errors import (
    CommandFailed,
    CommandMissing,
    CommandTimeout,
    InstallRefused,
    NoVolumeGroup,
    VolumeGroupUnusable,
)
from localdisk.host import files, sudo_rule
from localdisk.host.file_changes import (
    Call,
    Change,
    Link,
    MakeDirectory,
    Move,
    Prune,
    Remove,
    Write,
    is_as_written,
    made,
    planned,
)
from localdisk.units import format_size
from localdisk.vdsm.hook_call import POINTS
from localdisk.volumes import lvm
from localdisk.volumes.local_disk import HOW_TO_DECIDE, is_left_alone, local_disks
from localdisk.zipapp import extract

LOCK = os.path.join(lock.RUN, "install.lock")
RELOAD = Call(("udevadm", "control", "--reload"))
# Applies the new rule to local disks that are active already.
TRIGGER = Call(("udevadm", "trigger", "--settle", "--action=change", "--sysname-match=dm-*"))

# after_disk_prepare is last, where the older hook is moved aside: if a VM starts at this moment,
# before_vm_start makes its disks local.
_IN_ORDER = sorted(POINTS, key=lambda point: (point == "after_disk_prepare", point))


def install(program: str, root: str = "", dry_run: bool = False) -> Iterator[str]:
    """Install `program`, the built file, with its rules and links on this host, or below directory `root`.

    Yields a line for each change that was made.  Raises InstallRefused, ConfigRefused, ConfigUnreadable,
    CommandFailed and OSError.
    """
    root = checked_root(root)
    if not zipfile.is_zipfile(program):
        fix = "run the one file that build.sh makes, dist/localdisk"
        raise InstallRefused(problem=f"{program} cannot be copied to a host", fix=fix)
    changes = decide(program, root)
    if dry_run:
        yield from map(planned, changes)
    elif root:
        yield from make(changes, root)
        if changes:
            yield f"left {root}{files.TREES} to the first run of the program, which extracts itself there"
    elif changes:
        with lock.holding(LOCK, time.sleep):
            changes = decide(program, root)  # another install may have been faster
            yield from make(changes, root)
    if not root:
        yield from _older_disks()
    if not changes:
        yield f"all of localdisk is in its place{f' below {root}' if root else ''}, nothing was changed"


def _older_disks() -> Iterator[str]:
    """A line for each disk of vdsm's older hook that is kept until the operator decides."""
    settings = config.load()
    with contextlib.suppress(
        CommandFailed, CommandMissing, CommandTimeout, NoVolumeGroup, VolumeGroupUnusable
    ):
        groups, _ = lvm.read_all(settings.volume_groups)
        for vg, found in ((group, disk) for group in groups for disk in local_disks(group)):
            if is_left_alone(found, settings.policy(found.vm_id).retention):
                what = f"{vg.vg_name}/{found.volume_id}  VM {found.vm_id}  {format_size(found.lv.lv_size)}"
                yield f"{what}  is vdsm's older hook's, {HOW_TO_DECIDE}"


def make(changes: tuple[Change, ...], root: str) -> Iterator[str]:
    """Make the changes in turn; yield and log a line for each."""
    for change in changes:
        change.do()
        line = made(change)
        if not root:
            log.event(line)
        yield line


def checked_root(root: str) -> str:
    """The absolute path of another root directory; "" for the live system."""
    if not root:
        return root
    path = os.path.realpath(root)
    if not os.path.isdir(path):
        raise InstallRefused(problem=f"{root} is no directory", fix="name the root directory of an image")
    if os.path.samefile(path, "/"):
        raise InstallRefused(problem=f"{root} is this system's own root directory", fix="leave out --root")
    return path


# -- deciding


def decide(program: str, root: str) -> tuple[Change, ...]:
    """The changes that are missing, in the order in which they must be made."""
    return tuple(
        _with_directories(root, [*_program(program, root), *_rules(root), *_link_hooks(root), *_trees(root)])
    )


def _program(program: str, root: str) -> Iterator[Change]:
    place = f"{root}{files.PROGRAM}"
    if os.path.islink(place) or not (os.path.exists(place) and os.path.samefile(place, program)):
        with open(program, "rb") as file:
            yield from _file(Write(place, file.read(), 0o755))


def _rules(root: str) -> Iterator[Change]:
    """The files of sudo, udev and cron, and a first configuration."""
    settings = f"{root}{files.CONFIG}"
    example = config.example_text().encode()
    if os.path.lexists(settings):
        groups = config.load(settings).volume_groups
    else:
        groups = config.parse(example, settings).volume_groups
        yield Write(settings, example, 0o644)
    sudoers = files.sudoers(_called(root), sudo_rule.known_options()).encode()
    yield from _file(Write(f"{root}{files.SUDOERS}", sudoers, 0o440, validate=("visudo", "-cf")))
    rule = files.udev_rule(groups).encode()
    udev = [change for path in files.UDEV_RULES for change in _file(Write(root + path, rule, 0o644))]
    udev += [*_removed(f"{root}{files.UDEV_RULE_BEFORE}"), *_older(f"{root}{files.OLDER_UDEV_RULE}")]
    yield from udev
    # If install is interrupted before these, nothing is lost: udevd itself reads changed rules after seconds.
    yield from (RELOAD, TRIGGER) if udev and not root else ()
    collectors = [path for path in files.COLLECTORS if os.path.isdir(root + path)]
    yield from _file(Write(f"{root}{files.CRON}", files.cron(files.PROGRAM, collectors).encode(), 0o644))
    yield from _older(f"{root}{files.OLDER_SUDOERS}")


def _called(root: str) -> str:
    """The path by which hooks call the program through sudo, without links: /usr/local may be a link.

    Below another `root`, links cannot be resolved as the host will resolve them.
    """
    return files.PROGRAM if root else os.path.realpath(files.PROGRAM)


def _older(path: str) -> Iterator[Change]:
    if os.path.lexists(path):
        yield Move(path, path + files.ASIDE, "it is the older localdisk hook's")


def _link_hooks(root: str) -> Iterator[Change]:
    """The changes after which each of our hook points has our link, and no other hook for local disks."""
    links = {f"{root}{files.hook_link(point)}": point for point in _IN_ORDER}
    others = [path for path in hook_files(root) if path not in links]
    for path, point in links.items():
        yield from (_aside(root, other) for other in others if _is_at(other, point) and not is_ours(other))
        if os.path.lexists(path) and not os.path.islink(path):
            yield _aside(root, path)
        if not is_ours(path):
            yield Link(path, files.PROGRAM)
    for path in others:
        if is_ours(path):
            yield Remove(path)
        elif not any(_is_at(path, point) for point in POINTS):
            yield _aside(root, path)


def _trees(root: str) -> Iterator[Change]:
    """Remove the packages that other builds have extracted and no process uses; our own are in use."""
    trees, keep = os.path.split(_own_tree())
    if not root and trees in (files.TREES, files.TREES_BESIDE):
        found = [name for name in sorted(os.listdir(trees)) if name != keep and not name.startswith(".")]
        unused = tuple(name for name in found if not _is_used(os.path.join(trees, name)))
        if unused:
            yield Prune(trees, keep, unused)


def own_trees() -> str:
    """Where the running program's file has extracted itself, with other builds of it."""
    return os.path.dirname(_own_tree())


def _own_tree() -> str:
    return _up(__file__, 4)


def _up(path: str, levels: int) -> str:
    for _ in range(levels):
        path = os.path.dirname(path)
    return path


def _with_directories(root: str, changes: list[Change]) -> Iterator[Change]:
    """The changes, each after the changes that make its directories."""
    there: set[str] = set()
    for change in changes:
        path = change.to if isinstance(change, Move) else getattr(change, "path", "")
        if isinstance(change, (Write, Link, Move)):
            yield from map(MakeDirectory, _missing(root, os.path.dirname(path), there))
        yield change


def _missing(root: str, directory: str, there: set[str]) -> list[str]:
    """The missing directories of the path `directory`, highest first; they are added to `there`."""
    missing: list[str] = []
    while directory not in there and directory not in ("", "/", root) and not os.path.lexists(directory):
        missing.insert(0, directory)
        directory = os.path.dirname(directory)
    if not os.path.isdir(directory or "/") and directory not in there:
        raise InstallRefused(problem=f"{directory} is no directory", fix="move it away")
    require_inside(root, directory)
    there.update(missing)
    return missing


def require_inside(root: str, directory: str) -> None:
    """Raise InstallRefused if a link in an image leads to this system's own files."""
    real = os.path.realpath(directory)
    if root and os.path.commonpath([root, real]) != root:
        fix = "make it a relative link, or chroot there and leave out --root"
        raise InstallRefused(problem=f"{directory} leads out of {root}, to {real}", fix=fix)


# -- what is there


def hook_files(root: str) -> Iterator[str]:
    """The files at vdsm's hook points that vdsm may run and that are named localdisk or lead to us."""
    hooks = f"{root}{files.HOOKS}"
    for point in sorted(os.listdir(hooks)) if os.path.isdir(hooks) else ():
        directory = os.path.join(hooks, point)
        for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else ():
            path = os.path.join(directory, name)
            if is_ours(path) or ("localdisk" in name.lower() and _may_run(path)):
                yield path


def is_ours(path: str) -> bool:
    """Whether it is a link to our program."""
    if not os.path.islink(path):
        return False
    return os.readlink(path) == files.PROGRAM or os.path.realpath(path) == os.path.realpath(files.PROGRAM)


def _may_run(path: str) -> bool:
    mode = os.lstat(path).st_mode
    return stat.S_ISLNK(mode) or (stat.S_ISREG(mode) and bool(mode & 0o111))


def _is_at(path: str, point: str) -> bool:
    return os.path.basename(os.path.dirname(path)) == point


def _aside(root: str, path: str) -> Change:
    point = os.path.basename(os.path.dirname(path))
    to = f"{root}{files.HOOKS_ASIDE}/{point}/{os.path.basename(path)}"
    return Move(path, to, "two hooks for local disks would copy twice")


def _file(write: Write) -> Iterator[Change]:
    """The change that writes the file; none if the file is already as it should be."""
    if os.path.isdir(write.path) and not os.path.islink(write.path):
        raise InstallRefused(problem=f"{write.path} is a directory", fix="move it away")
    if not is_as_written(write):
        yield write
    else:
        yield from _removed(temporary_name(write.path))


def _removed(path: str) -> list[Change]:
    return [Remove(path)] if os.path.lexists(path) else []


def _is_used(tree: str) -> bool:
    """Whether a process uses the extracted packages in `tree`: see bootstrap.py."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        fd = os.open(os.path.join(tree, extract.FILES), os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
    return False
