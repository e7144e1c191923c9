"""The zipapp's `__main__`: the few lines that run for every VM, also for VMs without local disks.

build.sh replaces shiv's own `__main__.py` by this file, and puts the files beside it that it imports.  Python
compiles it in every run, so it is as short as possible and imports only what Python has imported already.
Python 3.6 must be able to read it, too: begin.py then prints that this is the wrong Python.
"""

import os
import sys

# hook_call.py has the same names; a test compares them.
POINTS_OF_A_VM = (
    "after_disk_prepare",
    "before_vm_start",
    "before_vm_destroy",
    "after_vm_destroy",
    "before_vm_migrate_source",
    "before_vm_migrate_destination",
    "before_vm_hibernate",
    "before_vm_dehibernate",
    "before_disk_hotplug",
    "before_disk_hotunplug",
)
# Hook points at which a VM begins to run here, and the directory with a file for each VM that has kept disks
# here (kept.py makes the files); if the file "all" is missing, others may have some, too.
BEGINNINGS = ("before_vm_start", "before_vm_migrate_destination")
KEPT = "/run/localdisk/kept/"


def called_point(argv):  # type: (list[str]) -> str
    """The hook point that was called, by vdsm's link or by `hook POINT`, if it is one of a VM; else ""."""
    named = named_point(argv)
    return named if named in POINTS_OF_A_VM else ""


def named_point(argv):  # type: (list[str]) -> str
    """The name of the link's directory, if vdsm calls us through its link, or POINT of `hook POINT`."""
    by_link = os.path.basename(os.path.dirname(argv[0]))
    return argv[2] if len(argv) == 3 and argv[1] == "hook" else by_link


def is_done(argv, environ):  # type: (list[str], os._Environ[str]) -> bool
    """Whether there is nothing to do, as for a VM without the property (an environment variable of its name).

    If such a VM has kept disks here and begins to run, it runs without them, so they must be marked as stale.
    """
    point = called_point(argv)
    if not point or environ.get("localdisk", "off") != "off":
        return False
    if point not in BEGINNINGS:
        return True
    return os.path.exists(KEPT + "all") and not os.path.exists(KEPT + (environ.get("vmId") or "-").lower())


if __name__ == "__main__":
    if is_done(sys.argv, os.environ):
        os._exit(0)  # Python's own end would take another tenth of the time
    try:
        import bootstrap  # type: ignore[import-not-found]

        found = bootstrap.packages()
        if not found:
            import begin  # type: ignore[import-not-found]

            begin.require_host(named_point(sys.argv))
            import first_run  # type: ignore[import-not-found]
    except Exception:
        # Python opens the file again for each import: it was updated after Python had read this module.
        if len(os.environ.get("LOCALDISK_AGAIN", "")) > 50:
            raise
        os.environ["LOCALDISK_AGAIN"] = os.environ.get("LOCALDISK_AGAIN", "") + "x"
        os.execv(sys.argv[0], sys.argv)  # noqa: S606 (ourselves)

    bootstrap.run(found or first_run.packages(named_point(sys.argv), bool(called_point(sys.argv))))
