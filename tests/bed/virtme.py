"""A throw-away guest by virtme-ng: a distribution's kernel in qemu, the machine's own files below it.

It runs under KVM if that really works here, else under emulation, five to ten times slower.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.bed.guest import (
    ROOT,
    SBIN,
    STATE,
    Disks,
    GuestDied,
    NoKernel,
    TooLate,
    command_file,
    missing_packages,
    remembered,
    status,
    stream,
)

KVM_TRIAL = 25  # seconds; a guest that works is up in less than five
LOCAL, SHARED = "bed-local", "bed-shared"
GUEST_TOOLS = {"busybox": "busybox-static", "file": "file"}  # vng asks file for the kernel version
KERNEL_PACKAGE = "linux-image-amd64"
KERNEL_MODULES = ("9p", "dm-thin-pool", "overlay", "virtio_blk")


def boot_best(
    command: Sequence[str], images: Disks, deadline: float, memory: str = "3G", verbose: bool = False
) -> int:
    """The exit status of `command` in a guest with these disks; raises NoKernel, GuestDied or TooLate."""
    if os.geteuid() != 0:
        raise NoKernel(
            "be root: the guest works with this machine's own files, some of which only root reads"
        )
    missing = missing_packages(GUEST_TOOLS)
    kernel = newest_kernel()
    if kernel is None:
        missing.append(f"{KERNEL_PACKAGE} (not the cloud flavour, it has no 9p)")
    if find_vng() is None:
        missing.append("the Python package virtme-ng (tests/requirements.txt)")
    if missing or kernel is None:
        raise NoKernel(f"install {', '.join(missing)}")
    return boot(kernel, command, images, deadline, kvm_works(kernel), memory, verbose)


def boot(
    kernel: Path,
    command: Sequence[str],
    images: Disks | None,
    deadline: float,
    kvm: bool,
    memory: str = "1G",
    verbose: bool = False,
    quiet: bool = False,
) -> int:
    """Boots `kernel` for this one command; `quiet` drops all output."""
    STATE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="guest-", dir=STATE) as directory:
        run = Path(directory)
        command_file(run, command, *(f"/dev/disk/by-id/virtio-{disk}" for disk in (LOCAL, SHARED)))
        vng = find_vng()
        argv = [
            *(str(vng), "--run", str(kernel), "--user", "root", "--memory", memory),
            *("--cpus", str(min(4, os.cpu_count() or 1)), "--disable-microvm"),
            *([] if kvm else ["--disable-kvm"]),
            *(["--verbose"] if verbose else []),
            f"--qemu-opts={shlex.join(qemu_options(run, images))}",
            *("--exec", shlex.join(["sh", str(ROOT / "tests/bed/guest.sh"), str(run)])),
        ]
        # vng calls its virtme-run by name, and leaves its temporary files when it is killed
        environment = {**os.environ, "PATH": f"{vng.parent if vng else ''}:{SBIN}", "TMPDIR": directory}
        stream(argv, deadline, environment, quiet)
        return status(run)


def qemu_options(run: Path, images: Disks | None) -> list[str]:
    """What guest.sh needs: the machine's root directory, our own port for the exit status, the disks.

    The disks are not given through vng's --disk because it leaves their format to probing.  No flush
    reaches the host's disk (cache=unsafe): a killed guest loses nothing by that, only a power cut would.
    """
    options = [
        *("-fsdev", "local,id=bed-root,path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=bed-root,mount_tag=bed-root"),
        *("-chardev", f"file,id=bed-status,path={run / 'status'}"),
        *("-device", "virtio-serial-pci", "-device", "virtserialport,name=bed.status,chardev=bed-status"),
    ]
    if images:
        for name, image in ((LOCAL, images.local), (SHARED, images.shared)):
            drive = f"if=none,id={name},format=raw,cache=unsafe,discard=unmap,file={image}"
            options += ["-drive", drive, "-device", f"virtio-blk-pci,drive={name},serial={name}"]
    return options


def kvm_works(kernel: Path) -> bool:
    """True if a guest really boots under KVM.

    /dev/kvm proves nothing: inside some virtual machines it is there and qemu dies on it, or hangs.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    return remembered("kvm", "KVM", lambda: kvm_boots(kernel))


def kvm_boots(kernel: Path) -> bool:
    """True if a guest that does nothing boots and ends well under KVM, in time."""
    try:
        return boot(kernel, ["true"], None, KVM_TRIAL, kvm=True, quiet=True) == 0
    except (GuestDied, TooLate):
        return False


def newest_kernel() -> Path | None:
    """The newest readable /boot/vmlinuz-* whose modules are installed and hold all that the guest needs."""
    kernels = [path for path in Path("/boot").glob("vmlinuz-*") if os.access(path, os.R_OK) and fits(path)]
    return max(kernels, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)], default=None)


def fits(kernel: Path) -> bool:
    """True if the kernel has KERNEL_MODULES, as modules or built in."""
    folder = Path("/lib/modules") / kernel.name[len("vmlinuz-") :]
    lists = [folder / name for name in ("modules.dep", "modules.builtin")]
    text = "\n".join(path.read_text() for path in lists if path.exists())
    return all(re.search(rf"/{module}\.ko", text) for module in KERNEL_MODULES)


def find_vng() -> Path | None:
    """virtme-ng's program: the one beside this Python, else the one on PATH."""
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    found = shutil.which("vng", path=path)
    return Path(found) if found else None
