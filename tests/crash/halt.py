"""Stops localdisk at a chosen moment, by a script in the place of the tools that it runs.

Inside `armed`, the script is in that place and counts the calls of tools.  The chosen call waits before,
while or after the tool runs, until `go_on`.  localdisk itself does not notice.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.kernel.steps import processes

TOOLS = ("/usr/sbin/lvm", "/usr/bin/virsh", "/usr/bin/qemu-img", "/usr/sbin/blkdiscard")
MOMENTS = ("before", "during", "after")
PLACE = Path("/run/bed-halt")
SCRIPT_FILE = PLACE / "script"
MS_BIND, MNT_DETACH = 4096, 2  # <sys/mount.h>
REAL, PLAN, CALLS, HERE = (PLACE / name for name in ("real", "plan", "calls", "here"))

# A call's number is that of its line in CALLS, whoever is called at the same time: gc asks libvirt while LVM
# works.  No process is started for that, since a flow calls many tools.
# During: an LVM command waits for the volume group's lock, which the script has; a copy is stopped when it
# has run for a while, any other tool as soon as it runs.  A tool that must die with its parent does.
SCRIPT = f"""\
#!/bin/bash
real={REAL}/${{0##*/}}
[ -e {PLAN} ] || exec "$real" "$@"
echo "$$ ${{0##*/}} ${{1-}}" >>{CALLS}
mapfile -t calls <{CALLS}
count=0
for call in "${{calls[@]}}"; do
    count=$((count + 1))
    [ "${{call%% *}}" != $$ ] || break
done
read -r number moment <{PLAN} && [ "$count" = "$number" ] || exec "$real" "$@"
here() {{
    touch {HERE}
    while [ -e {HERE} ] && [ -e {PLAN} ]; do sleep 0.1; done
}}
trap '' TERM
case $moment in
before)
    here
    trap - TERM
    exec "$real" "$@"
    ;;
during)
    if [ "$real" -ef {REAL}/lvm ]; then
        exec 9>>/run/lock/lvm/V_ovirt-local
        flock 9
        (trap - TERM; exec "$real" "$@" 9>&-) &
        sleep 0.3
        here
        exec 9>&-
        wait $!
        exit $?
    fi
    (
        [ "$1" != convert ] || sleep 1
        kill -STOP $$ && here
        kill -CONT $$
    ) >/dev/null 2>&1 </dev/null &
    trap - TERM
    exec "$real" "$@"
    ;;
after)
    (trap - TERM; exec setpriv --pdeathsig KILL -- "$real" "$@") &
    wait $!
    code=$?
    here
    exit $code
    ;;
esac
"""


@dataclass(frozen=True)
class Point:
    """A moment of a flow: before, during or after its `number`-th call of a tool, counted from 1."""

    number: int
    moment: str


@contextmanager
def installed() -> Iterator[None]:
    """Copies of the tools, and the script that `armed` puts in their place."""
    shutil.rmtree(PLACE, ignore_errors=True)
    REAL.mkdir(parents=True)
    SCRIPT_FILE.write_text(SCRIPT)
    SCRIPT_FILE.chmod(0o755)
    for tool in TOOLS:
        shutil.copy(tool, REAL / Path(tool).name)
    for link in Path("/usr/sbin").iterdir():
        if link.is_symlink() and link.readlink().name == "lvm":
            (REAL / link.name).symlink_to("lvm")  # which looks at the name that it was called by
    PLACE.chmod(0o777)  # qemu-img is vdsm's; not sticky, or fs.protected_regular keeps it out
    yield


@contextmanager
def armed(point: Point | None) -> Iterator[None]:
    """Calls are counted, and the flow stops at the point."""
    HERE.unlink(missing_ok=True)
    CALLS.write_text("")
    CALLS.chmod(0o666)
    PLAN.write_text(f"{point.number} {point.moment}\n" if point else "0 never\n")
    put_in_place()
    try:
        yield
    finally:
        PLAN.unlink(missing_ok=True)
        HERE.unlink(missing_ok=True)
        put_back()


def put_in_place() -> None:
    """The script in the place of the tools.  A process for each would cost more than some flows do."""
    for tool in TOOLS:
        if libc().mount(os.fsencode(SCRIPT_FILE), os.fsencode(tool), None, MS_BIND, None):
            raise OSError(ctypes.get_errno(), f"bind mount on {tool}")


def put_back() -> None:
    """The tools.  A script that still runs goes on."""
    for tool in TOOLS:
        if libc().umount2(os.fsencode(tool), MNT_DETACH):
            raise OSError(ctypes.get_errno(), f"umount {tool}")


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def calls() -> list[str]:
    """The tools that were run since `armed`, each with its first argument if that is a word."""
    lines = (line.split()[1:] for line in CALLS.read_text().splitlines())
    return [" ".join(words[:1] + [w for w in words[1:2] if w.isalpha()]) for words in lines]


def is_there() -> bool:
    """Whether the flow has stopped at the point."""
    return HERE.exists()


def go_on() -> None:
    HERE.unlink(missing_ok=True)


def tools_that_run() -> list[int]:
    """The process ids of real tools."""
    return [pid for pid, words in processes() if words[0].startswith(f"{REAL}/")]


def is_call(words: list[str]) -> bool:
    """Whether a command line is a real tool's, or that of a script that becomes one or waits for one."""
    script = words[1] if Path(words[0]).name == "bash" and words[1:] else ""
    return words[0].startswith(f"{REAL}/") or Path(script).name in {path.name for path in REAL.iterdir()}
