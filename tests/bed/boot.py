"""Runs a command as root on a real kernel with device-mapper and two empty disks.

    .venv/bin/python -m tests.bed.boot [OPTIONS] -- COMMAND [ARGUMENT...]

Where it runs, the first that works (places.py; `--where PLACE` forces one):

    here         this machine's own kernel: it has device-mapper, udev and loop devices, and we are root
    kvm          a throw-away guest in qemu under KVM, by virtme-ng (virtme.py)
    usermode     a throw-away guest of a recent User Mode Linux, fetched from Debian (usermode.py)
    usermode-of-release
                 the same, of the User Mode Linux of this machine's own release
    emulation    a throw-away guest in qemu, emulated: three to five times slower than User Mode Linux

Debian packages that a place needs are installed.  A guest sees the machine's own file system through a
throw-away overlay: files that the command writes are lost when the guest ends.  The command runs in the
repository's root directory.  The environment names its disks, as LOCALDISK_BED_LOCAL and
LOCALDISK_BED_SHARED (host.py uses them); LOCALDISK_BED_THROWAWAY=1 means that the machine is a guest.  A
guest gets no other environment: `-- env NAME=VALUE COMMAND`.  The output is shown live.  If it is not a
terminal, it is shown line by line, and of a line with carriage returns (a progress bar) only the last state.
Without a COMMAND, `true` runs.

Exit status: the command's; 69: this machine has no such kernel, and what is missing is printed; 70: the guest
died before the command ended; 124: the deadline passed and the guest was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from tests.bed import packages, places
from tests.bed.guest import ROOT, STATE, GuestDied, NoKernel, Order, TooLate, disks
from tests.bed.packages import NoPackage

NO_KERNEL, GUEST_DIED, TOO_LATE = 69, 70, 124

# What the bed runs, here or in the guest.
PACKAGES = (
    *("lvm2", "thin-provisioning-tools", "kmod", "udev", "util-linux", "procps"),
    *("e2fsprogs", "iproute2", "hostname", "sudo", "cron"),
    *("libvirt-daemon-system", "libvirt-clients", "dbus", "qemu-system-x86", "qemu-utils"),
)


# -- the command line


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        packages.install(*PACKAGES)
        place = places.choose(options.where)
        if options.choose:
            print(place.name)
            return 0
        with disks(options.disk_size << 20, options.disk_file, options.keep) as images:
            command = options.command or ["true"]
            order = Order(command, images, options.deadline, options.memory, options.verbose)
            return place.boot(order)
    except (NoKernel, NoPackage) as problem:
        return failed(NO_KERNEL, problem)
    except GuestDied as problem:
        return failed(GUEST_DIED, f"{problem} (--verbose shows its console)")
    except TooLate as problem:
        return failed(TOO_LATE, problem)
    finally:
        give_back()


def give_back() -> None:
    """What root has made in .bed/ is its owner's, who may want to remove it."""
    owner = ROOT.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        for path in (STATE, *STATE.rglob("*")):
            with contextlib.suppress(FileNotFoundError):
                os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def exit_on_signal(number: int, _frame: FrameType | None) -> None:
    """Turns a signal into an exit that runs every cleanup."""
    raise SystemExit(128 + number)


def failed(status: int, problem: object) -> int:
    print(f"boot: {problem}", file=sys.stderr)
    return status


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bed.boot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--where", choices=["auto", "guest", *places.NAMES], default="auto")
    parser.add_argument("--disk-size", type=int, default=8192, metavar="MIB", help="of each disk (sparse)")
    parser.add_argument(
        "--disk-file", metavar="NAME", help="disks of that name in .bed/, as the last run kept them"
    )
    parser.add_argument("--keep", action="store_true", help="keep the disks for a later --disk-file")
    parser.add_argument("--deadline", type=float, default=3600, metavar="SECONDS")
    parser.add_argument("--memory", default="3G", help="of the guest")
    parser.add_argument("--verbose", action="store_true", help="show the guest's console")
    parser.add_argument(
        "--choose", action="store_true", help="only print the place, and install what it needs"
    )
    parser.add_argument("command", nargs="*", metavar="COMMAND")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
