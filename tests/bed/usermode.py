"""A throw-away guest of User Mode Linux: a whole Linux kernel that runs as a process of this one.

It has real device-mapper and real LVM, and programs run at nearly their own speed, while an emulated machine
needs five to ten times as long; it boots in two seconds.  It sees the machine's own file system through
hostfs, below a throw-away overlay (usermode.sh).

There are two kernels, both from Debian's package user-mode-linux:

    recent()         a newer Debian's, fetched into .bed/ (pins/kernel.txt); its seccomp mode runs on every
                     processor that was tried
    distribution()   the machine's own release's; it dies on processors with AMX, which have more registers
                     than it expects
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bed import packages
from tests.bed.guest import ROOT, STATE, NoKernel, Order, run_directory, status, stream
from tests.bed.packages import NoPackage, Pin
from tests.bed.shell import SBIN

PROGRAM = "linux.uml"
PACKAGE = "user-mode-linux"
MODULES = "usr/lib/uml/modules"
PINS = ROOT / "pins/kernel.txt"
# Of its 0.9 s, the kernel measures for 0.85 s how fast it can compute RAID 6, which nothing here uses.
NO_BENCHMARK = ("initcall_blacklist=raid6_init",)
LOADER = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"


@dataclass(frozen=True)
class Kernel:
    """A User Mode Linux: its program, the folder of its modules, and what its command line needs."""

    program: Path
    modules: Path
    options: tuple[str, ...] = ()


# -- where it comes from


def distribution() -> Kernel:
    """The machine's own release's.  Raises NoKernel."""
    with as_no_kernel():
        packages.install(PACKAGE)
    program = shutil.which(PROGRAM, path=SBIN)
    if program is None:
        raise NoKernel(f"the package {PACKAGE} has no {PROGRAM}")
    return Kernel(Path(program), Path("/", MODULES))


def recent() -> Kernel:
    """A recent one, fetched once.  Raises NoKernel."""
    pins = read_pins()
    with as_no_kernel():
        remove_stale(folder_name(pins))
        folder = STATE / folder_name(pins)
        if not folder.exists():
            unpack(pins, folder)
    return Kernel(folder / "usr/bin" / PROGRAM, folder / MODULES, ("seccomp=on", *NO_BENCHMARK))


def remove_stale(current: str) -> None:
    """Kernels other than the current one, and what a killed run has fetched in part."""
    for folder in STATE.glob("uml-*"):
        if folder.name != current:
            shutil.rmtree(folder)
    for folder in STATE.glob("unfinished-*"):
        if not Path("/proc", folder.name.split("-")[1]).exists():
            shutil.rmtree(folder)


def read_pins() -> list[Pin]:
    """The lines of pins/kernel.txt: suite, package, version, SHA-256."""
    lines = (line.split() for line in PINS.read_text().splitlines())
    return [Pin(*words) for words in lines if words and not words[0].startswith("#")]


def folder_name(pins: list[Pin]) -> str:
    return f"uml-{pins[0].version}"


@contextlib.contextmanager
def as_no_kernel() -> Iterator[None]:
    try:
        yield
    except (NoPackage, subprocess.CalledProcessError) as problem:
        raise NoKernel(str(problem)) from None


def unpack(pins: list[Pin], folder: Path) -> None:
    """Fetch the kernel and its C library into `folder`, which is there when both are whole."""
    packages.install("patchelf")
    unfinished = folder.with_name(f"unfinished-{os.getpid()}-{folder.name}")
    try:
        packages.fetch(pins, unfinished)
        use_own_library(unfinished, folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def use_own_library(now: Path, later: Path) -> None:
    """Have the kernel's program use the C library beside it: the machine's may be too old for it.

    It is written into the program, with `later` as the place, since a kernel that is started through that
    library's ld.so panics.
    """
    loader = later / LOADER
    options = ["--set-interpreter", str(loader), "--set-rpath", str(loader.parent)]
    subprocess.run(["patchelf", *options, now / "usr/bin" / PROGRAM], check=True)


# -- booting it


def boot(kernel: Kernel, order: Order) -> int:
    """The exit status of the command in a guest; raises GuestDied or TooLate."""
    STATE.mkdir(exist_ok=True)
    with run_directory(order, "/dev/ubda", "/dev/ubdb") as run, one_cpu() as cpu:
        (run / "modules").symlink_to(kernel.modules)
        argv = [
            *("taskset", "--cpu-list", str(cpu)),
            *(str(kernel.program), f"mem={order.memory}", "root=/dev/root", "rootfstype=hostfs"),
            *("rootflags=/", "ro", *kernel.options),
            *(f"uml_dir={run}", "con=null", "con0=null,fd:1", "random.trust_cpu=on"),
            *([] if order.verbose else ["quiet", "loglevel=1"]),
            *([f"ubd0={run}/local", f"ubd1={run}/shared"] if order.disks else []),
            *(f"init={run}/root/tests/bed/usermode.sh", f"BED_RUN={run}"),
        ]
        # User Mode Linux 7.2 dies at its first program if its environment has no HOME.
        environment = {"PATH": SBIN, "HOME": "/root", **memory_folder(order.memory)}
        return status(run, stream(argv, order.deadline, environment, order.log))


@contextlib.contextmanager
def one_cpu() -> Iterator[int]:
    """A CPU for one guest, another guest's only when all are taken, also by other checkouts' guests.

    The guest's kernel and its programs take turns, many thousand times a second: on two CPUs each turn
    wakes the other one up, and everything takes three times as long.
    """
    cpus = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        for cpu in cpus:
            lock = stack.enter_context(open(f"/run/localdisk-bed-cpu-{cpu}", "a"))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield cpu
                return
        yield cpus[os.getpid() % len(cpus)]


def memory_folder(memory: str) -> dict[str, str]:
    """Where the guest's memory is a file: in memory, unless /dev/shm will not do (containers)."""
    wanted = int(memory[:-1]) << {"M": 20, "G": 30}[memory[-1]]
    shm = os.statvfs("/dev/shm")
    big_enough = shm.f_bavail * shm.f_frsize > wanted
    return {} if big_enough and not shm.f_flag & os.ST_NOEXEC else {"TMPDIR": str(STATE)}


def print_present_pins() -> None:
    """What pins/kernel.txt would be today, of the suites that it names.  Raises NoPackage."""
    print("# A recent User Mode Linux and the C library that it runs with, which are fetched from Debian.")
    print("# ./build.sh pins writes this file.")
    for pin in packages.present(read_pins()):
        print(pin.suite, pin.package, pin.version, pin.sha256)


if __name__ == "__main__":
    print_present_pins()
