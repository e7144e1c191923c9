"""The common parts of all throw-away guests: disks, command, exit status, live output."""

from __future__ import annotations

import contextlib
import os
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
from typing import IO

from tests.bed.shell import how_it_ended

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".bed"
CAPABILITIES = "qemu-capabilities"  # a directory of this name in STATE, and in each run directory


class NoKernel(Exception):
    """Neither this machine nor a guest on it can run the command; the message says what is missing."""


class GuestDied(Exception):
    """The guest ended without the exit status of the command; the message says how."""


class TooLate(Exception):
    """The deadline passed; the guest was killed."""


@dataclass(frozen=True)
class Disks:
    """The two disk images: `local` for the volume group, `shared` for shared storage."""

    local: Path
    shared: Path


@dataclass(frozen=True)
class Order:
    """What a guest does: it runs `command` with `disks`, for at most `deadline` seconds.

    `memory` is a number with M or G.  `log`: a file that gets the output, which is shown otherwise.
    """

    command: Sequence[str]
    disks: Disks | None
    deadline: float
    memory: str = "3G"
    verbose: bool = False
    log: Path | None = None


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


# -- the command


@contextlib.contextmanager
def run_directory(order: Order, local: str, shared: str) -> Iterator[Path]:
    """A directory that the guest finds: what it runs in `command`, this repository as the link `root`.

    `local` and `shared` are the devices of the disks in the guest.  The guest writes the exit status to
    `status`, and what libvirt has found out about qemu to `qemu-capabilities`.  The directory lies in /run
    because its path stands on command lines of kernels, which can hold no space; the repository's path may
    have spaces.
    """
    with tempfile.TemporaryDirectory(prefix="localdisk-bed-", dir="/run") as directory:
        run = Path(directory)
        (run / "root").symlink_to(ROOT)
        if order.disks:
            (run / "local").symlink_to(order.disks.local)
            (run / "shared").symlink_to(order.disks.shared)
        disks = f"LOCALDISK_BED_LOCAL={local} LOCALDISK_BED_SHARED={shared}"
        words = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(order.command)}"
        (run / "command").write_text(f"export LOCALDISK_BED_THROWAWAY=1 {disks}\n{words}\n")
        (run / CAPABILITIES).mkdir()
        yield run
        keep_capabilities(run / CAPABILITIES)


def keep_capabilities(folder: Path) -> None:
    """What libvirt has found out about qemu, for the next guest (libvirt.py)."""
    kept = STATE / CAPABILITIES
    kept.mkdir(exist_ok=True)
    for file in folder.iterdir():
        unfinished = kept / f"{file.name}.{os.getpid()}"
        shutil.copy(file, unfinished)
        unfinished.rename(kept / file.name)


def status(run: Path, ended: int) -> int:
    """The status that the guest handed over; raises GuestDied when it did not.

    `ended` is the exit status of the guest itself.
    """
    file = run / "status"
    text = file.read_text().strip() if file.exists() else ""
    if not text.isdigit():
        raise GuestDied(f"the guest ended before the command did: {how_it_ended(ended)}")
    return int(text)


# -- running and showing


def stream(
    argv: Sequence[str], deadline: float, environment: Mapping[str, str], log: Path | None = None
) -> int:
    """Runs `argv` in the repository's root and shows its output, or writes it to `log`; its exit status.

    Negative: the signal that ended it.  After `deadline` seconds, or when we are ended ourselves, its whole
    process group is killed.  Raises TooLate.
    """
    with contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stack.enter_context(open(log, "ab")) if log else subprocess.PIPE,
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
