"""Whether the zipapp can run here at all, and with which exit code it ends if it cannot.

Python 3.6 must be able to read this file, too.  main.py imports it before the first run of a build.
"""

import os
import sys

UNREFUSABLE = ("before_vdsm_start", "before_vm_destroy", "after_vm_destroy")
BEGINNINGS = ("before_vm_start", "before_vm_migrate_destination")
PYTHONS = ((3, 9), (3, 10), (3, 11), (3, 12), (3, 13))  # build.sh packs for these
MACHINE = "x86_64"


def require_host(point):  # type: (str) -> None
    """End with one line if we cannot run here; `point` is the hook point that was called, if any."""
    problem = wrong_host(sys.version_info, os.uname().machine)
    if problem:
        sys.stderr.write(problem + "\n")
        sys.exit(refused(point))


def refused(point):  # type: (str) -> int
    """The exit code if we cannot run at this hook point.  After 2, vdsm does not run the hooks after ours.

    A VM without the property is never refused: only its kept disks are marked at these points.
    """
    if point in BEGINNINGS and os.environ.get("localdisk", "off") == "off":  # noqa: SIM112 (vdsm's name)
        return 0
    return 1 if point in UNREFUSABLE else 2


def wrong_host(version, machine):  # type: (tuple[object, ...], str) -> str
    """Why we cannot run here, in one line; "" if we can."""
    if tuple(version[:2]) in PYTHONS and machine == MACHINE:
        return ""
    here = f"Python {version[0]}.{version[1]} on {machine}"
    fix = "use another host, or build it for this one"
    return f"localdisk: this file is for Python 3.9 to 3.13 on {MACHINE}, this is {here} : {fix}"
