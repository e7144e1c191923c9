"""A throw-away guest of User Mode Linux: a whole Linux kernel that runs as a process of this one.

It has real device-mapper and real LVM below its programs, and these run at nearly their own speed, where
an emulated machine needs five to ten times as long; it boots in two seconds.  Debian's package
user-mode-linux has kernel and modules.  The machine's own file system is seen through hostfs, below a
throw-away overlay (usermode.sh).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bed.guest import ROOT, SBIN, STATE, Disks, NoKernel, command_file, missing_packages, status, stream

PROGRAM = "linux.uml"
PACKAGE = "user-mode-linux"
MODULES = Path("/usr/lib/uml/modules")


def why_not() -> str | None:
    """What this machine lacks for such a guest, or None."""
    if os.geteuid() != 0:
        return "not root"
    if missing_packages({PROGRAM: PACKAGE}):
        return f"no {PACKAGE}"
    if any(c.isspace() for c in str(ROOT)):
        return "a space in the path of this repository, which no kernel command line can hold"
    return None


def boot(command: Sequence[str], images: Disks | None, deadline: float, memory: str, verbose: bool) -> int:
    """The exit status of `command` in a guest; raises GuestDied or TooLate."""
    STATE.mkdir(exist_ok=True)
    program = shutil.which(PROGRAM, path=SBIN)
    if program is None:
        raise NoKernel(f"install {PACKAGE}")
    with tempfile.TemporaryDirectory(prefix="guest-", dir=STATE) as directory, one_cpu() as cpu:
        run = Path(directory)
        command_file(run, command, "/dev/ubda", "/dev/ubdb")
        argv = [
            *("taskset", "--cpu-list", str(cpu)),
            *(program, f"mem={memory}", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"),
            *(f"uml_dir={run}", "con=null", "con0=null,fd:1", "random.trust_cpu=on"),
            *([] if verbose else ["quiet", "loglevel=1"]),
            *([f"ubd0={images.local}", f"ubd1={images.shared}"] if images else []),
            *(f"init={ROOT}/tests/bed/usermode.sh", f"BED_RUN={run}", f"BED_MODULES={MODULES}"),
        ]
        stream(argv, deadline, {"PATH": SBIN, **memory_folder(memory, run)}, quiet=images is None)
        return status(run)


@contextlib.contextmanager
def one_cpu() -> Iterator[int]:
    """A CPU for one guest, another guest's only when all are taken.

    The guest's kernel and its programs take turns, many thousand times a second: on two CPUs each turn
    wakes the other one up, and everything takes three times as long.
    """
    cpus = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        for cpu in cpus:
            lock = stack.enter_context(open(STATE / f"cpu-{cpu}", "a"))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield cpu
                return
        yield cpus[os.getpid() % len(cpus)]


def memory_folder(memory: str, run: Path) -> dict[str, str]:
    """Where the guest's memory is a file: in memory, unless /dev/shm is too small for it (containers)."""
    wanted = int(memory[:-1]) << {"M": 20, "G": 30}[memory[-1]]
    shm = os.statvfs("/dev/shm")
    return {} if shm.f_bavail * shm.f_frsize > wanted else {"TMPDIR": str(run)}
