"""Runs a command as root on a real kernel with device-mapper and two empty disks.

    .venv/bin/python -m tests.bed.boot [OPTIONS] -- COMMAND [ARGUMENT...]

Where this machine has device-mapper, udev and loop devices and we are root, the command runs right
here, its disks being loop devices on sparse files.  Everywhere else a throw-away kernel is booted by
virtme-ng: the newest /boot/vmlinuz-* with 9p, under KVM if that really works here (tried once per
boot of this machine, see `kvm_works`), else under emulation.  There the machine's own file system
is visible read-only below a throw-away overlay: nothing that the command writes stays.

The command runs in the repository's root directory and finds its disks in the environment, as
LOCALDISK_BED_LOCAL and LOCALDISK_BED_SHARED (host.py uses them); LOCALDISK_BED_THROWAWAY=1 says that
the machine is a guest.  A guest gets no other environment: `-- env NAME=VALUE COMMAND`.  The output is
streamed live: as it is on a terminal, line by line elsewhere, where of a line with carriage returns
(a progress bar) only the last state is shown.

Exit status: that of the command; 69 no such kernel can be had here, with what is missing;
70 the guest died before the command ended; 124 the deadline passed and the guest was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".bed"
SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KVM_TRIAL = 25  # seconds; a guest that works is up in less than five

NO_KERNEL, GUEST_DIED, TOO_LATE = 69, 70, 124

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
GUEST_TOOLS = {"busybox": "busybox-static", "file": "file"}  # vng asks file for the kernel version
KERNEL_PACKAGE = "linux-image-amd64"
KERNEL_MODULES = ("9p", "dm-thin-pool", "overlay", "virtio_blk")


class NoKernel(Exception):
    """Neither this machine nor a guest on it can run the command; the message says what is missing."""


class GuestDied(Exception):
    """The guest ended without the exit status of the command."""


class TooLate(Exception):
    """The deadline passed; the guest was killed."""


@dataclass(frozen=True)
class Disks:
    """The two disk images: `local` for the volume group, `shared` for shared storage."""

    local: Path
    shared: Path


# -- disks


@contextlib.contextmanager
def disks(size: int, name: str | None, keep: bool) -> Iterator[Disks]:
    """Two sparse images of `size` bytes in .bed/, called `name`, gone afterwards unless `keep`.

    Images that a killed run left behind go, too.
    """
    STATE.mkdir(exist_ok=True)
    for stale in STATE.glob("run-*.img"):
        if not Path("/proc", stale.name.split("-")[1]).exists():
            stale.unlink()
    prefix = name or f"run-{os.getpid()}"
    images = Disks(STATE / f"{prefix}-local.img", STATE / f"{prefix}-shared.img")
    for image in (images.local, images.shared):
        with open(image, "ab") as file:
            file.truncate(max(size, file.tell()))
    try:
        yield images
    finally:
        if keep:
            print(f"boot: disks kept: --disk-file {prefix}", file=sys.stderr)
        else:
            images.local.unlink()
            images.shared.unlink()


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


# -- in a throw-away guest


def run_guest(
    command: Sequence[str], images: Disks, deadline: float, memory: str = "3G", verbose: bool = False
) -> int:
    """The exit status of `command` in a guest with these disks; raises NoKernel, GuestDied or TooLate."""
    if os.geteuid() != 0:
        raise NoKernel(
            "be root: the guest works with this machine's own files, some of which only root reads"
        )
    missing = missing_packages({**TOOLS, **GUEST_TOOLS})
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
        (run / "command").write_text(command_script(command))
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
        return guest_status(run)


def command_script(command: Sequence[str]) -> str:
    """What guest.sh runs: the environment that the module's docstring promises, then the command."""
    return (
        "export LOCALDISK_BED_THROWAWAY=1 LOCALDISK_BED_LOCAL=/dev/disk/by-id/virtio-bed-local"
        " LOCALDISK_BED_SHARED=/dev/disk/by-id/virtio-bed-shared\n"
        f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(command)}\n"
    )


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
        for name, image in (("bed-local", images.local), ("bed-shared", images.shared)):
            drive = f"if=none,id={name},format=raw,cache=unsafe,discard=unmap,file={image}"
            options += ["-drive", drive, "-device", f"virtio-blk-pci,drive={name},serial={name}"]
    return options


def guest_status(run: Path) -> int:
    """The status that guest.sh handed over; raises GuestDied when it did not."""
    status = run / "status"
    text = status.read_text().strip() if status.exists() else ""
    if not text.isdigit():
        raise GuestDied("the guest died before the command ended (--verbose shows its console)")
    return int(text)


def kvm_works(kernel: Path) -> bool:
    """True if a guest really boots under KVM; the answer is remembered in .bed/kvm until the next reboot.

    /dev/kvm proves nothing: inside some virtual machines it is there and qemu dies on it, or hangs.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    cache = STATE / "kvm"
    known = cache.read_text().split() if cache.exists() else []
    if known[:1] != [boot_id]:
        print(f"boot: trying KVM (once, at most {KVM_TRIAL} s) ...", file=sys.stderr)
        known = [boot_id, "works" if kvm_boots(kernel) else "broken"]
        cache.write_text(" ".join(known) + "\n")
        print(f"boot: KVM {known[1]}", file=sys.stderr)
    return known[1] == "works"


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


def missing_packages(tools: Mapping[str, str]) -> list[str]:
    """The Debian packages of those `tools` that this machine does not have."""
    return [package for tool, package in tools.items() if not shutil.which(tool, path=SBIN)]


# -- running and showing


def stream(argv: Sequence[str], deadline: float, environment: Mapping[str, str], quiet: bool = False) -> int:
    """Runs `argv` in the repository's root, showing its output unless `quiet`; its exit status.

    After `deadline` seconds, or when we are ended ourselves, its whole process group is killed.
    """
    process = subprocess.Popen(
        argv,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if quiet else subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    shown = threading.Thread(target=show, args=(process.stdout, sys.stdout.buffer), daemon=True)
    if process.stdout:
        shown.start()
    try:
        return process.wait(deadline)
    except subprocess.TimeoutExpired:
        raise TooLate(f"killed after {deadline:.0f} s (--deadline)") from None
    finally:
        if process.returncode is None:
            end_group(process)
        if process.stdout:
            shown.join(10)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the process group of `process`: SIGTERM, at most two seconds, SIGKILL."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)


def show(source: IO[bytes], target: IO[bytes]) -> None:
    """Copies `source` to `target` until its end: raw to a terminal, else lines without overwritten states."""
    if target.isatty():
        while chunk := source.read1(65536):  # type: ignore[attr-defined]
            target.write(chunk)
            target.flush()
        return
    for line in source:
        target.write(last_state(line))
        target.flush()


def last_state(line: bytes) -> bytes:
    """What a terminal would show of `line` in the end: what follows its last carriage return."""
    states = line.rstrip(b"\r\n").split(b"\r")
    return states[-1] + b"\n"


# -- the command line


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    if options.packages:
        print("\n".join([*TOOLS.values(), *GUEST_TOOLS.values(), KERNEL_PACKAGE]))
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
    reason = "asked for a guest" if options.where == "guest" else why_not_here()
    if reason is None:
        print("boot: running on this machine's own kernel", file=sys.stderr)
        return run_here(options.command, images, options.deadline)
    if options.where == "here":
        raise NoKernel(f"cannot run on this machine's own kernel: {reason}")
    print(f"boot: booting a throw-away kernel ({reason})", file=sys.stderr)
    return run_guest(options.command, images, options.deadline, options.memory, options.verbose)


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
    parser.add_argument("--where", choices=["auto", "here", "guest"], default="auto")
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
