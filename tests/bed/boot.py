"""Runs a command as root on a real kernel with device-mapper and two empty disks.

    .venv/bin/python -m tests.bed.boot [OPTIONS] -- COMMAND [ARGUMENT...]

Where it runs, the first that is possible:

    here      this machine's own kernel: it has device-mapper, udev and loop devices, and we are root
    usermode  a throw-away guest of User Mode Linux (usermode.py), tried once
    virtme    a throw-away guest in qemu, by virtme-ng (virtme.py)

In a guest the machine's own file system is visible read-only below a throw-away overlay: nothing that
the command writes stays.  The command runs in the repository's root directory and finds its disks in the
environment, as LOCALDISK_BED_LOCAL and LOCALDISK_BED_SHARED (host.py uses them); LOCALDISK_BED_THROWAWAY=1
says that the machine is a guest.  A guest gets no other environment: `-- env NAME=VALUE COMMAND`.  The
output is streamed live: as it is on a terminal, line by line elsewhere, where of a line with carriage
returns (a progress bar) only the last state is shown.

Exit status: that of the command; 69 no such kernel can be had here, with what is missing;
70 the guest died before the command ended; 124 the deadline passed and the guest was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from tests.bed import usermode, virtme
from tests.bed.guest import (
    ROOT,
    SBIN,
    Disks,
    GuestDied,
    NoKernel,
    TooLate,
    disks,
    missing_packages,
    remembered,
    stream,
)

NO_KERNEL, GUEST_DIED, TOO_LATE = 69, 70, 124
USERMODE_TRIAL = 30  # seconds; a guest that works is up in less than five

# What the bed runs, here or in the guest, and the Debian package that brings it.
TOOLS = {
    "lvm": "lvm2",
    "thin_check": "thin-provisioning-tools",
    "qemu-img": "qemu-utils",
    "sudo": "sudo",
    "udevadm": "udev",
    "mkfs.ext4": "e2fsprogs",
    "libvirtd": "libvirt-daemon-system",
    "virsh": "libvirt-clients",
    "dbus-daemon": "dbus",
    "qemu-system-x86_64": "qemu-system-x86",
}


# -- here, on the machine's own kernel


def why_not_here() -> str | None:
    """What this machine lacks for running the command on its own kernel, or None."""
    if os.geteuid() != 0:
        return "not root"
    for module in ("dm-mod", "dm-thin-pool", "loop"):
        subprocess.run(["modprobe", "-q", module], check=False, env={"PATH": SBIN})
    if " device-mapper\n" not in Path("/proc/misc").read_text():
        return "no device-mapper in this kernel"
    if not Path("/run/udev/control").exists():
        return "no udevd"
    if not Path("/dev/loop-control").exists():
        return "no loop devices"
    if Path("/etc/vdsm").exists():
        return "this is an oVirt host"
    if Path("/dev/ovirt-local").exists():
        return "there is a volume group ovirt-local already"
    return None


def run_here(command: Sequence[str], images: Disks, deadline: float) -> int:
    """The exit status of `command` on this machine, with loop devices as its disks."""
    missing = missing_packages(TOOLS)
    if missing:
        raise NoKernel(f"install {' '.join(missing)}")
    with loop_device(images.local) as local, loop_device(images.shared) as shared:
        environment = {
            **os.environ,
            "PATH": SBIN,
            "LOCALDISK_BED_LOCAL": local,
            "LOCALDISK_BED_SHARED": shared,
        }
        try:
            return stream(command, deadline, environment)
        finally:
            leave = [sys.executable, "-m", "tests.bed.host", "leave"]
            subprocess.run(leave, check=False, cwd=ROOT, env=environment)


@contextlib.contextmanager
def loop_device(image: Path) -> Iterator[str]:
    """The loop device on `image`, for as long as the context lasts."""
    device = subprocess.check_output(["losetup", "--find", "--show", image], text=True).strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


# -- the command line


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    if options.packages:
        print("\n".join([*TOOLS.values(), *virtme.GUEST_TOOLS.values(), virtme.KERNEL_PACKAGE]))
        return 0
    signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        with disks(options.disk_size << 20, options.disk_file, options.keep) as images:
            return run(options, images)
    except NoKernel as problem:
        return failed(NO_KERNEL, problem)
    except GuestDied as problem:
        return failed(GUEST_DIED, problem)
    except TooLate as problem:
        return failed(TOO_LATE, problem)


def run(options: argparse.Namespace, images: Disks) -> int:
    """Chooses where to run, says so, and runs."""
    where, reason = choose(options.where)
    print(f"boot: running {PLACES[where]}{f' ({reason})' if reason else ''}", file=sys.stderr)
    if where != "here" and (missing := missing_packages(TOOLS)):
        raise NoKernel(f"install {' '.join(missing)}")
    if where == "here":
        return run_here(options.command, images, options.deadline)
    guest = usermode.boot if where == "usermode" else virtme.boot_best
    return guest(options.command, images, options.deadline, options.memory, options.verbose)


PLACES = {
    "here": "on this machine's own kernel",
    "usermode": "in a guest of User Mode Linux",
    "virtme": "in a guest of virtme-ng",
}


def choose(wanted: str = "auto") -> tuple[str, str]:
    """Where to run, and why not at an earlier place.  Raises NoKernel where that is not possible."""
    why: dict[str, Callable[[], str | None]] = {
        "here": why_not_here,
        "usermode": why_not_usermode,
        "virtme": lambda: None,
    }
    if wanted in PLACES:
        reason = why[wanted]()
        if reason:
            raise NoKernel(f"cannot run {PLACES[wanted]}: {reason}")
        return wanted, ""
    reasons: list[str] = []
    if wanted == "guest":
        del why["here"]
    for place, ask in why.items():
        reason = ask()
        if reason is None:
            return place, "; ".join(reasons)
        reasons.append(reason)
    raise AssertionError


def why_not_usermode() -> str | None:
    """What speaks against such a guest, or None: it really boots here."""
    reason = usermode.why_not()
    if reason is None and not remembered("usermode", "User Mode Linux", usermode_boots):
        return "User Mode Linux does not work here"
    return reason


def usermode_boots() -> bool:
    """True if a guest that does nothing but load device-mapper boots and ends well, in time."""
    try:
        return usermode.boot(["modprobe", "dm-thin-pool"], None, USERMODE_TRIAL, "256M", False) == 0
    except (GuestDied, TooLate):
        return False


def exit_on_signal(number: int, _frame: FrameType | None) -> None:
    """Turns a signal into an exit that runs every cleanup."""
    raise SystemExit(128 + number)


def failed(status: int, problem: Exception) -> int:
    print(f"boot: {problem}", file=sys.stderr)
    return status


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bed.boot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--where", choices=["auto", "guest", *PLACES], default="auto")
    parser.add_argument("--disk-size", type=int, default=8192, metavar="MIB", help="of each disk (sparse)")
    parser.add_argument(
        "--disk-file", metavar="NAME", help="disks of that name in .bed/, as the last run kept them"
    )
    parser.add_argument("--keep", action="store_true", help="keep the disks for a later --disk-file")
    parser.add_argument("--deadline", type=float, default=3600, metavar="SECONDS")
    parser.add_argument("--memory", default="3G", help="of the guest")
    parser.add_argument("--verbose", action="store_true", help="show the guest's console")
    parser.add_argument("--packages", action="store_true", help="only print the Debian packages this needs")
    parser.add_argument("command", nargs="*", metavar="COMMAND")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
