"""The zipapp's own `__main__`: what runs before anything is extracted or imported.

build.sh puts this file at the top of the zipapp in the place of shiv's `__main__.py`.  Standard library
only, and as little of it as possible: for a VM without the property, which is most, this is all that runs.
"""

from __future__ import annotations

import os
import sys

# vdsm.py has the same names; a test compares them.
POINTS_OF_A_VM = frozenset(
    (
        "after_disk_prepare",
        "before_vm_start",
        "after_vm_destroy",
        "before_vm_migrate_source",
        "before_vm_migrate_destination",
        "before_vm_hibernate",
        "before_disk_hotplug",
    )
)
SYSTEM_TREES = "/var/cache/localdisk"
BUILD_ID = "@BUILD_ID@"  # build.sh puts shiv's here, a hash of everything that is in the zipapp


def is_not_ours(argv: list[str], environ: os._Environ[str]) -> bool:
    """Whether this is a hook run for a VM that does not ask for local disks."""
    called_by_name = len(argv) == 3 and argv[1] == "hook" and argv[2] in POINTS_OF_A_VM
    return (is_called_by_link(argv) or called_by_name) and environ.get("localdisk", "off") == "off"


def is_called_by_link(argv: list[str]) -> bool:
    """Whether vdsm calls us, through a link in the directory of a hook point."""
    return os.path.basename(os.path.dirname(argv[0])) in POINTS_OF_A_VM


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
        return SYSTEM_TREES
    import pwd

    cache = os.path.join(pwd.getpwuid(os.geteuid()).pw_dir, ".cache", "localdisk")
    try:
        os.makedirs(cache, exist_ok=True)
    except OSError as error:
        what = f"cannot extract to {cache}, {error.strerror}"
        print(f"localdisk: {what} : run {program()} --version once as root", file=sys.stderr)
        sys.exit(2)
    return cache


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


def main() -> None:
    if is_not_ours(sys.argv, os.environ):
        return
    clean(os.environ)
    os.umask(0o022)
    tree = extracted_tree()
    if not tree and os.geteuid() != 0 and is_called_by_link(sys.argv):
        have_root_extract()
        tree = extracted_tree()
    if tree:
        sys.path.insert(0, tree)
        from localdisk.cli import main as run

        sys.exit(run())
    os.environ["SHIV_ROOT"] = place_to_extract()
    from _bootstrap import bootstrap  # type: ignore[import-not-found]

    bootstrap()


if __name__ == "__main__":
    main()
