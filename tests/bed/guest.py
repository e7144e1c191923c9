"""What every throw-away guest needs: its disks, its command, its exit status, and its output shown live."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / ".bed"
SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


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


# -- the command


def command_file(run: Path, command: Sequence[str], local: str, shared: str) -> None:
    """Writes what the guest runs: the environment that boot.py promises, then the command."""
    disks = f"LOCALDISK_BED_LOCAL={local} LOCALDISK_BED_SHARED={shared}"
    words = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(command)}"
    (run / "command").write_text(f"export LOCALDISK_BED_THROWAWAY=1 {disks}\n{words}\n")


def status(run: Path) -> int:
    """The status that the guest handed over; raises GuestDied when it did not."""
    file = run / "status"
    text = file.read_text().strip() if file.exists() else ""
    if not text.isdigit():
        raise GuestDied("the guest died before the command ended (--verbose shows its console)")
    return int(text)


def missing_packages(tools: Mapping[str, str]) -> list[str]:
    """The Debian packages of those `tools` that this machine does not have."""
    return [package for tool, package in tools.items() if not shutil.which(tool, path=SBIN)]


def remembered(name: str, what: str, trial: Callable[[], bool]) -> bool:
    """Whether `trial` succeeded; told, and remembered in .bed/ until this machine boots again."""
    STATE.mkdir(exist_ok=True)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    cache = STATE / name
    known = cache.read_text().split() if cache.exists() else []
    if known[:1] != [boot_id]:
        print(f"boot: trying {what} (once) ...", file=sys.stderr)
        known = [boot_id, "works" if trial() else "broken"]
        cache.write_text(" ".join(known) + "\n")
        print(f"boot: {what} {known[1]}", file=sys.stderr)
    return known[1] == "works"


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
