"""A throw-away guest by virtme-ng: a distribution's kernel in qemu, with the machine's own files.

Under KVM it is as fast as the machine, in emulation three to five times slower than User Mode Linux.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path

from tests.bed import packages
from tests.bed.guest import ROOT, STATE, GuestDied, NoKernel, Order, TooLate, run_directory, status, stream
from tests.bed.packages import NoPackage
from tests.bed.shell import SBIN, how_it_ended
from tests.bed.vm import boot_sector

LOCAL, SHARED = "bed-local", "bed-shared"
GUEST_PACKAGES = ("busybox-static", "file", "qemu-system-x86")  # vng asks file for the kernel version
KERNEL_PACKAGE = "linux-image-amd64"  # of Ubuntu: linux-image-generic
KERNEL_MODULES = ("9p", "dm-thin-pool", "overlay", "virtio_blk")
# What EL9 and later need, x86-64-v2: qemu's own default processor has no SSE4, and lxml's compiled module is
# ended there by SIGILL.
EMULATED_PROCESSOR = "Nehalem"
# What costs most where each instruction is translated: a page table of its own for the kernel, as against
# Meltdown, and code at other addresses in each process, which is translated again (lvs: 330 ms, without both
# 130 ms; with a second processor 190 ms).
EMULATED_KERNEL = ("mitigations=off", "norandmaps")
# Drivers of what qemu's PC has and nothing here needs; udev would load them at each boot.
NEEDLESS_MODULES = (
    *("ahci", "libata", "sr_mod", "sg", "psmouse", "serio_raw", "evdev", "pcspkr", "i2c_i801", "lpc_ich"),
    *("iTCO_wdt", "i6300esb", "qemu_fw_cfg", "button", "sha1_ssse3", "sha256_ssse3", "sha512_ssse3"),
)
# Else qemu waits for some 450 eventfds, and takes more time for that than for the guest.
EMULATED_DEVICES = ("-global", "virtio-pci.ioeventfd=off")


def find_kernel() -> Path:
    """A kernel for the guest, installed if this machine has none.  Raises NoKernel."""
    try:
        packages.install(*GUEST_PACKAGES)
        if newest_kernel() is None:
            packages.install(KERNEL_PACKAGE if packages.is_known(KERNEL_PACKAGE) else "linux-image-generic")
    except NoPackage as problem:
        raise NoKernel(str(problem)) from None
    kernel = newest_kernel()
    if kernel is None:
        modules = ", ".join(KERNEL_MODULES)
        raise NoKernel(f"no kernel in /boot has {modules} (the cloud flavour has no 9p: {KERNEL_PACKAGE})")
    return kernel


def try_kvm(deadline: float = 10, program: str = "qemu-system-x86_64") -> None:
    """A PC has to write one line under KVM: if it does not, no kernel for a guest need be installed.

    Raises GuestDied, TooLate after `deadline` seconds, or NoKernel.
    """
    line = b"this is KVM"
    with tempfile.NamedTemporaryFile() as disk:
        disk.write(boot_sector(line.decode()))
        disk.flush()
        argv = [program, "-accel", "kvm", "-cpu", "host", "-m", "64", "-nodefaults", "-display", "none"]
        argv += ["-serial", "stdio", "-drive", f"file={disk.name},format=raw"]
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        except FileNotFoundError:
            raise NoKernel(f"{program} is missing") from None
        said = b""
        killer = threading.Timer(deadline, process.kill)
        killer.start()
        with process:
            while line not in said and (some := os.read(process.stdout.fileno(), 4096)):  # type: ignore[union-attr]
                said += some
            is_late = not killer.is_alive()
            killer.cancel()
            process.kill()
    if line in said:
        return
    if is_late:
        raise TooLate(f"killed after {deadline:.0f} s")
    last = said.decode(errors="replace").strip().rpartition("\n")[2]
    raise GuestDied(f"qemu ended before its PC wrote a line: {last or how_it_ended(process.returncode)}")


def boot(kernel: Path, order: Order, kvm: bool) -> int:
    """The exit status of the command in a guest; raises GuestDied or TooLate."""
    STATE.mkdir(exist_ok=True)
    devices = (f"/dev/disk/by-id/virtio-{disk}" for disk in (LOCAL, SHARED))
    with run_directory(order, *devices) as run:
        vng = find_vng()
        options = (f"module_blacklist={','.join(NEEDLESS_MODULES)}", *(() if kvm else EMULATED_KERNEL))
        argv = [
            *(str(vng), "--run", str(kernel), "--user", "root", "--memory", order.memory),
            *("--cpus", str(min(4, os.cpu_count() or 1) if kvm else 1), "--disable-microvm"),
            *([] if kvm else ["--disable-kvm"]),
            *(word for option in options for word in ("--append", option)),
            *(["--verbose"] if order.verbose else []),
            f"--qemu-opts={shlex.join(qemu_options(run, order, kvm))}",
            *("--cwd", "/", "--exec", guest_command()),
        ]
        # vng calls its virtme-run by name, and leaves its temporary files when it is killed.  The path of its
        # package is on the kernel's command line, which can hold no space; this repository's path can.
        (run / "packages").symlink_to(sysconfig.get_path("purelib"))
        environment = {
            **os.environ,
            "PATH": f"{vng.parent}:{SBIN}",
            "PYTHONPATH": str(run / "packages"),
            "TMPDIR": str(run),
        }
        ended = stream(argv, order.deadline, environment, order.log)
        return status(run, ended)


def guest_command() -> str:
    """What virtme's first process runs: guest.sh, found through a mount of our own.

    virtme has put file systems of its own over /tmp and /run, below which the repository may lie.
    """
    mount = "-t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000 bed-root"
    script = shlex.quote(f"/mnt/host{ROOT}/tests/bed/guest.sh")
    words = (
        "mount -t tmpfs bed /mnt",
        "mkdir /mnt/host",
        f"mount {mount} /mnt/host",
        f"exec sh {script} {shlex.quote(str(ROOT))}",
    )
    return shlex.join(["sh", "-c", " && ".join(words)])


def qemu_options(run: Path, order: Order, kvm: bool) -> list[str]:
    """What guest.sh needs: the machine's root directory, the run directory, the disks.

    The disks are not given through vng's --disk because it leaves their format to probing.  No flush
    reaches the host's disk (cache=unsafe): a killed guest loses nothing by that, only a power cut would.
    """
    options = [
        *("-fsdev", "local,id=bed-root,path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=bed-root,mount_tag=bed-root"),
        *("-fsdev", f"local,id=bed-run,path={run},security_model=none"),
        *("-device", "virtio-9p-pci,fsdev=bed-run,mount_tag=bed-run"),
    ]
    if not kvm:
        options += ["-cpu", EMULATED_PROCESSOR, *EMULATED_DEVICES]
    if order.disks:
        for name, image in ((LOCAL, run / "local"), (SHARED, run / "shared")):
            drive = f"if=none,id={name},format=raw,cache=unsafe,discard=unmap,file={image}"
            options += ["-drive", drive, "-device", f"virtio-blk-pci,drive={name},serial={name}"]
    return options


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


def find_vng() -> Path:
    """virtme-ng's program: the one beside this Python, else the one on PATH.  Raises NoKernel."""
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    found = shutil.which("vng", path=path)
    if found is None:
        raise NoKernel("the Python package virtme-ng is missing (pins/tools.txt)")
    return Path(found)
