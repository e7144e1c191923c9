"""From the zipapp to the program: where its packages are extracted, and that nobody bends that.

Lies beside `__main__.py` (first.py) in the zipapp; standard library only.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

SYSTEM_TREES = "/var/cache/localdisk"
BUILD_ID = "@BUILD_ID@"  # build.sh puts shiv's here, a hash of everything that is in the zipapp


def clean(environ: os._Environ[str]) -> None:
    """Take away what would make shiv's bootstrap or Python run something else.

    vdsm puts a custom property of any name into our environment.
    """
    for name in list(environ):
        if name.startswith(("SHIV_", "PYTHON")):
            del environ[name]


def extracted_tree() -> str:
    """The packages that root has extracted from this very build, "" where they are not there.

    shiv's bootstrap would find the same ones, but it costs four times a bare interpreter's start.
    """
    tree = os.path.join(SYSTEM_TREES, f"{os.path.basename(program())}_{BUILD_ID}")
    trusted = is_roots_alone(SYSTEM_TREES) and is_roots_alone(tree)
    packages = os.path.join(tree, "site-packages")
    return packages if trusted and os.path.isdir(packages) else ""


def have_root_extract() -> None:
    """Start the helper with nothing to do: vdsm may run it, and root extracts what it runs from."""
    null = os.open(os.devnull, os.O_RDWR)
    streams = [(os.POSIX_SPAWN_DUP2, null, number) for number in (0, 1, 2)]
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    try:
        child = os.posix_spawn(
            "/usr/bin/sudo", ["sudo", "-n", program(), "helper"], environ, file_actions=streams
        )
        os.waitpid(child, 0)
    except OSError:
        pass  # what it was for is looked at next
    os.close(null)


def place_to_extract() -> str:
    """Where shiv's bootstrap may extract: root's own directory, an ordinary user's cache."""
    if os.geteuid() == 0:
        if os.path.lexists(SYSTEM_TREES) and not is_roots_alone(SYSTEM_TREES):
            refuse(f"{SYSTEM_TREES} could be written by others than root", f"rm -r {SYSTEM_TREES}")
        return SYSTEM_TREES
    import pwd

    cache = os.path.join(pwd.getpwuid(os.geteuid()).pw_dir, ".cache", "localdisk")
    try:
        os.makedirs(cache, exist_ok=True)
    except OSError as error:
        refuse(f"cannot extract to {cache}, {error.strerror}", f"run {program()} --version once as root")
    return cache


def refuse(what: str, fix: str) -> NoReturn:
    """End with one line and exit code 2, as cli.py would."""
    print(f"localdisk: {what} : {fix}", file=sys.stderr)
    sys.exit(2)


def program() -> str:
    """The zipapp itself, whatever link it was called through."""
    return os.path.realpath(sys.argv[0])


def is_roots_alone(path: str) -> bool:
    """Whether `path` is there and nobody but root can write it."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return status.st_uid == 0 and not status.st_mode & 0o022


def main(called_by_vdsm: bool) -> None:
    """Run the program from its extracted packages; extract them where that was not done."""
    clean(os.environ)
    os.umask(0o022)
    tree = extracted_tree()
    if not tree and os.geteuid() != 0 and called_by_vdsm:
        have_root_extract()
        tree = extracted_tree()
    if tree:
        sys.path.insert(0, tree)
        from localdisk.cli import main as run

        sys.exit(run())
    os.environ["SHIV_ROOT"] = place_to_extract()
    from _bootstrap import bootstrap  # type: ignore[import-not-found]

    bootstrap()
