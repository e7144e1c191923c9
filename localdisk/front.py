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
    called_by_link = os.path.basename(os.path.dirname(argv[0])) in POINTS_OF_A_VM
    called_by_name = len(argv) == 3 and argv[1] == "hook" and argv[2] in POINTS_OF_A_VM
    return (called_by_link or called_by_name) and environ.get("localdisk", "off") == "off"


def use_own_environment(environ: os._Environ[str]) -> None:
    """Take away what would make shiv's bootstrap or Python run something else, and say where to extract.

    vdsm puts a custom property of any name into our environment.  As root, and for anyone once root has
    run, the tree is in a directory that only root writes; otherwise in the user's own cache.
    """
    for name in list(environ):
        if name.startswith(("SHIV_", "PYTHON")):
            del environ[name]
    if os.geteuid() == 0 or is_roots_alone(SYSTEM_TREES):
        environ["SHIV_ROOT"] = SYSTEM_TREES
    else:
        import pwd

        home = pwd.getpwuid(os.geteuid()).pw_dir
        environ["SHIV_ROOT"] = os.path.join(home, ".cache", "localdisk")


def is_roots_alone(path: str) -> bool:
    """Whether `path` is there and nobody but root can write it."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return status.st_uid == 0 and not status.st_mode & 0o022


def extracted_tree() -> str:
    """The packages that root has extracted from this very build, "" where they are not there.

    shiv's bootstrap would find the same ones, but it costs four times a bare interpreter's start.
    """
    program = os.path.basename(os.path.realpath(sys.argv[0]))
    tree = os.path.join(SYSTEM_TREES, f"{program}_{BUILD_ID}")
    trusted = is_roots_alone(SYSTEM_TREES) and is_roots_alone(tree)
    packages = os.path.join(tree, "site-packages")
    return packages if trusted and os.path.isdir(packages) else ""


def main() -> None:
    if is_not_ours(sys.argv, os.environ):
        return
    use_own_environment(os.environ)
    os.umask(0o022)
    tree = extracted_tree()
    if tree:
        sys.path.insert(0, tree)
        from localdisk.cli import main as run

        sys.exit(run())
    from _bootstrap import bootstrap  # type: ignore[import-not-found]

    bootstrap()


if __name__ == "__main__":
    main()
