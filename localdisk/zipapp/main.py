"""The zipapp's `__main__`: the few lines that run for every VM, also for VMs without local disks.

build.sh replaces shiv's own `__main__.py` by this file, and puts bootstrap.py and extract.py beside it.
Python compiles it in every run, so it is as short as possible and imports only what Python has imported
already.  Python 3.6 must be able to read it, too, so that it can print that this is the wrong Python.
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
UNREFUSABLE = ("before_vdsm_start", "before_vm_destroy", "after_vm_destroy")
# Hook points at which a VM begins to run here, and the directory with a file for each VM that has kept disks
# here (kept.py makes the files).
BEGINNINGS = ("before_vm_start", "before_vm_migrate_destination")
KEPT = "/run/localdisk/kept/"
PYTHONS = ((3, 9), (3, 10), (3, 11), (3, 12), (3, 13))  # build.sh packs for these
MACHINE = "x86_64"


def called_point(argv):  # type: (list[str]) -> str
    """The hook point that was called, by vdsm's link or by `hook POINT`, if it is one of a VM; else ""."""
    named = named_point(argv)
    return named if named in POINTS_OF_A_VM else ""


def named_point(argv):  # type: (list[str]) -> str
    """The name of the link's directory, if vdsm calls us through its link, or POINT of `hook POINT`."""
    by_link = os.path.basename(os.path.dirname(argv[0]))
    return argv[2] if len(argv) == 3 and argv[1] == "hook" else by_link


def refused(argv):  # type: (list[str]) -> int
    """The exit code if we cannot run.  After 2, vdsm does not run the hooks that come after ours."""
    return 1 if named_point(argv) in UNREFUSABLE else 2


def wrong_host(version, machine):  # type: (tuple[object, ...], str) -> str
    """Why we cannot run here, in one line; "" if we can."""
    if tuple(version[:2]) in PYTHONS and machine == MACHINE:
        return ""
    here = f"Python {version[0]}.{version[1]} on {machine}"
    fix = "use another host, or build it for this one"
    return f"localdisk: this file is for Python 3.9 to 3.13 on {MACHINE}, this is {here} : {fix}"


def is_done(argv, environ):  # type: (list[str], os._Environ[str]) -> bool
    """Whether there is nothing to do, as for a VM without the property (an environment variable of its name).

    If such a VM has kept disks here and begins to run, it runs without them, so they must be marked as stale.
    """
    point = called_point(argv)
    if not point or environ.get("localdisk", "off") != "off":
        return False
    return point not in BEGINNINGS or not os.path.exists(KEPT + (environ.get("vmId") or "-").lower())


if __name__ == "__main__" and not is_done(sys.argv, os.environ):
    problem = wrong_host(sys.version_info, os.uname().machine)
    if problem:
        sys.stderr.write(problem + "\n")
        sys.exit(refused(sys.argv))
    try:
        import bootstrap  # type: ignore[import-not-found]
    except Exception:
        # Python opens the file again for each import: it was updated after Python had read this module.
        if len(os.environ.get("LOCALDISK_AGAIN", "")) > 50:
            raise
        os.environ["LOCALDISK_AGAIN"] = os.environ.get("LOCALDISK_AGAIN", "") + "x"
        os.execv(sys.argv[0], sys.argv)  # noqa: S606 (ourselves)

    bootstrap.main(called_by_vdsm=bool(called_point(sys.argv)), refused=refused(sys.argv))
