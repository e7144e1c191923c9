"""This machine's own kernel as the place to run: loop devices are the disks, and are removed at the end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.bed.guest import ROOT, NoKernel, Order, stream
from tests.bed.shell import SBIN


def trial() -> None:
    """Raises NoKernel where this machine's own kernel, or the machine, will not do."""
    for module in ("dm-mod", "dm-thin-pool", "loop"):
        subprocess.run(["modprobe", "-q", module], check=False, env={"PATH": SBIN})
    if " device-mapper\n" not in Path("/proc/misc").read_text():
        raise NoKernel("this kernel has no device-mapper")
    if not Path("/run/udev/control").exists():
        raise NoKernel("no udevd runs")
    if not Path("/dev/loop-control").exists():
        raise NoKernel("no loop devices")
    if Path("/etc/vdsm").exists():
        raise NoKernel("this is an oVirt host")
    if Path("/dev/ovirt-local").exists():
        raise NoKernel("there is a volume group ovirt-local already")


def boot(order: Order) -> int:
    """The exit status of the command on this machine, with loop devices as its disks."""
    assert order.disks
    with loop_device(order.disks.local) as local, loop_device(order.disks.shared) as shared:
        environment = {
            **os.environ,
            "PATH": SBIN,
            "LOCALDISK_BED_LOCAL": local,
            "LOCALDISK_BED_SHARED": shared,
        }
        try:
            return stream(order.command, order.deadline, environment)
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
