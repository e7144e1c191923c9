"""The first run of a build on this host: extract the packages, or say in one line why it cannot run.

The zipapp has this file beside `__main__.py`, which imports it if bootstrap.py finds no packages.
"""

from __future__ import annotations

import os
import sys

import begin  # type: ignore[import-not-found]
import bootstrap  # type: ignore[import-not-found]
import extract  # type: ignore[import-not-found]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_refused = 2


def packages(point: str, called_by_vdsm: bool) -> str:
    """The packages of this build, extracted if necessary; ends the process if it cannot run.

    `point` is the hook point that was called, if any: it decides with which exit code.
    """
    global _refused
    _refused = begin.refused(point)
    user = os.geteuid()
    if user == 0:
        require_trusted(bootstrap.program())
    trees, found = str(bootstrap.trees_of_root()), ""
    if user != 0 and called_by_vdsm:
        have_root_unpack()
        found = bootstrap.ready(trees, 0)
    return found or unpacked(trees if user == 0 else own_trees(), user)


def require_trusted(path: str) -> None:
    """Refuse a file that anyone but root could have written."""
    part = bootstrap.untrusted(path)
    if part:
        fix = f"install -m 0755 {path} /usr/local/libexec/localdisk, and run that"
        refuse(f"{part} could be written by others than root, who will not run {path}", fix)


def have_root_unpack() -> None:
    """Start the helper with nothing to do: vdsm may run it, and it extracts the packages as root."""
    null = os.open(os.devnull, os.O_RDWR)
    streams = [(os.POSIX_SPAWN_DUP2, null, number) for number in (0, 1, 2)]
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    try:
        child = os.posix_spawn(
            "/usr/bin/sudo", ["sudo", "-n", bootstrap.program(), "helper"], environ, file_actions=streams
        )
        os.waitpid(child, 0)
    except OSError:
        pass  # the caller checks next whether the packages are there
    os.close(null)


def unpacked(trees: str, user: int) -> str:
    """The packages of this build's tree under `trees`; makes the tree if it is missing or damaged."""
    if bootstrap.is_noexec(trees):
        what = f"{trees} is on a file system that is mounted noexec, no compiled module is loaded from there"
        refuse(what, f"mount -o remount,exec {mount_of(trees)}")
    try:
        os.makedirs(trees, mode=0o755, exist_ok=True)
        require_alone(trees, user)
        with extract.alone(trees):  # if many processes start at once, one of them extracts
            if not bootstrap.ready(trees, user):
                extract.unpack(bootstrap.program(), trees, bootstrap.tree_name(), bootstrap.BUILD_ID)
        found = str(bootstrap.ready(trees, user))
    except extract.Replaced:
        refuse(f"{bootstrap.program()} was replaced while it started", "try again")
    except OSError as error:
        place = bootstrap.TREES
        fix = f"make room in {place} (df -h {place}), then run {bootstrap.program()} --version once as root"
        if bootstrap.is_noexec(place):
            fix = f"mount -o remount,exec {mount_of(place)}"
        refuse(f"cannot extract to {trees}, {error.strerror}", fix)
    if not found:
        refuse(f"what was extracted to {trees} is damaged", f"look for a failing disk, rm -r {trees}")
    return found


def mount_of(path: str) -> str:
    """The mount point of `path`, which need not exist yet."""
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def own_trees() -> str:
    """An ordinary user's own cache."""
    import pwd

    return os.path.join(pwd.getpwuid(os.geteuid()).pw_dir, ".cache", "localdisk")


def require_alone(path: str, user: int) -> None:
    if not bootstrap.is_alone(path, user):
        refuse(f"{path} could be written by others", f"rm -r {path}")


def refuse(what: str, fix: str) -> NoReturn:
    """End with one line and the exit code of a refusal, as cli.py would."""
    print(f"localdisk: {what} : {fix}", file=sys.stderr)
    sys.exit(_refused)
