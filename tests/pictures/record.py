"""Plays the scenes of the pictures on a real kernel and prints what it saw.

    python -m tests.pictures.record

Runs as root in the test bed.  Each scene is one line, MARK and a JSON object with its name; draw.py reads
them.  The VMs are started paused: what they do is no matter here, and the bed has no KVM.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.bed import host, libvirt, vdsm
from tests.bed.player import Call, run_point, start_point
from tests.bed.shell import attempt, run
from tests.bed.storage import FileStorage, Image, fill, new_id
from tests.bed.vm import Disk, Vm, disk_json, domain_xml
from tests.kernel.steps import MIB, THICK, THIN, configure, copied, localdisk, wait_for
from tests.pictures.trace import Tracer

MARK = "PICTURE "
COLUMNS, ROWS = 100, 30
TERMINAL = {"TERM": "xterm-256color", "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
SLOW = "copy: {parallel: 1, bandwidth: 4MiB}\nmargins: {reserve: 10%}\n"
TWO = "copy: {parallel: 2, bandwidth: 32MiB}\nmargins: {reserve: 10%}\n"
FRAMES, BETWEEN = 4, 1.0  # frames of --watch while it copies; seconds between two looks at it
TMUX = ("tmux", "-L", "localdisk-pictures")


@dataclass(frozen=True)
class Guest:
    """A VM; `name` "": the one that the bed gives it."""

    name: str
    vm: Vm
    custom: vdsm.Custom


def main() -> int:
    host.setup()
    libvirt.start()
    host.thin_pool()
    storage = FileStorage()
    small, large = storage.template(256 * MIB, "raw", seed=1), storage.template(1024 * MIB, "raw", seed=2)
    fill(small.leaf, 160 * MIB, seed=3)
    fill(large.leaf, 512 * MIB, seed=4)
    show("way", way(lambda: storage.clone(large, seed=5)))
    show("restart", restart(lambda: storage.clone(large, seed=5)))
    show("watch", watch(lambda: storage.clone(small, seed=6)))
    show("status", status(lambda: storage.clone(small, seed=6)))
    return 0


NewImage = Callable[[], Image]


def show(scene: str, recorded: dict[str, Any]) -> None:
    print(MARK + json.dumps({"scene": scene, **recorded}), flush=True)


# -- the scenes


def way(new_image: NewImage) -> dict[str, Any]:
    """Every process of one start and one stop."""
    configure()
    with started(guest("", storage_of(new_image), THICK)):
        pass  # the program is extracted, Python's files have been read once
    return traced(guest("", storage_of(new_image), THICK))


def restart(new_image: NewImage) -> dict[str, Any]:
    """Every process of one start from a kept disk, and of the stop that keeps it again."""
    configure("retention: {on_stop: keep}\n")
    restarted = guest("", storage_of(new_image), THICK)
    for _ in range(2):  # the first one copies
        with started(restarted):
            pass
    return traced(restarted)


def traced(each: Guest) -> dict[str, Any]:
    """Every process of one start and one stop of this VM."""
    with Tracer() as tracer, started(each):
        time.sleep(0.5)
    (disk,) = each.vm.disks
    ids = {"vm": each.vm.id, "image": disk.image.id, "volume": disk.image.leaf.id}
    return {"ids": ids, "size": disk.image.leaf.size, "where": where(), **asdict(tracer.trace)}


def status(new_image: NewImage) -> dict[str, Any]:
    """VMs that run, one that is copied, one that waits, one that has stopped; a copy that was killed."""
    web, database, build = (
        guest(name, storage_of(new_image), custom)
        for name, custom in (("web-1", THICK), ("db-1", THIN), ("build-7", THICK))
    )
    keep = f"vms:\n  {build.vm.id}: {{retention: {{on_stop: keep}}}}\n"
    configure(SLOW + keep)
    with starting(guest("web-0", storage_of(new_image), THICK), signal.SIGKILL) as killed:
        wait_for(lambda: copied(killed.image), "progress")
    configure(keep)
    with ExitStack() as stack:
        for each in (web, database):
            stack.enter_context(started(each))
        with started(build):
            pass
        configure(SLOW + keep)
        first = stack.enter_context(starting(guest("web-2", storage_of(new_image), THICK)))
        wait_for(lambda: copied(first.image) > 60 * MIB, "progress")
        stack.enter_context(starting(guest("web-3", storage_of(new_image), THICK)))
        wait_for(lambda: '"waiting"' in localdisk("status", "--json", code=1), "one to wait")
        time.sleep(3)
        return {"columns": COLUMNS, "frames": [on_terminal(str(host.PROGRAM), "status")]}


def watch(new_image: NewImage) -> dict[str, Any]:
    """Two copies at once, looked at again and again."""
    configure(TWO)
    with ExitStack() as stack:
        first = stack.enter_context(starting(guest("web-2", storage_of(new_image), THICK)))
        second = stack.enter_context(starting(guest("db-2", storage_of(new_image), THIN)))
        for each in (first, second):
            wait_for(lambda each=each: copied(each.image), "progress")  # type: ignore[misc]
        stack.enter_context(session(str(host.PROGRAM), "status", "--watch"))
        wait_for(lambda: "Ctrl-C" in captured(), "the first frame")
        frames = []
        while "copying" in (frame := captured()):
            frames.append(frame)
            time.sleep(BETWEEN)
        # A few of them, and the one where both are ready.
        frames = [*frames[:: max(1, len(frames) // FRAMES)], frame]
        return {"columns": COLUMNS, "frames": frames}


def where() -> str:
    if not host.throwaway():
        return "on a machine's own kernel"
    is_usermode = "User Mode Linux" in Path("/proc/cpuinfo").read_text()
    kind = f"User Mode Linux {os.uname().release}" if is_usermode else f"Linux {os.uname().release}"
    return f"in a throw-away guest ({kind}): a real host is several times faster"


# -- VMs


def storage_of(new_image: NewImage) -> Disk:
    return Disk("vda", new_image())


def guest(name: str, disk: Disk, custom: vdsm.Custom) -> Guest:
    return Guest(name, Vm(new_id(), (disk,)), custom)


def define(each: Guest) -> None:
    """As vdsm does first, under the VM's own name."""
    libvirt.define_placeholder(each.vm.id)
    if each.name:
        libvirt.virsh("domrename", each.vm.id, each.name)


@contextmanager
def started(each: Guest) -> Iterator[None]:
    """What vdsm does with a VM, from its start to its stop."""
    vm, custom = each.vm, each.custom
    define(each)
    prepared = replace(vm, disks=tuple(vdsm.prepare(vm.id, disk, custom) for disk in vm.disks))
    (prop,) = custom.values()
    told = f"<ovirt-vm:custom><ovirt-vm:localdisk>{prop}</ovirt-vm:localdisk></ovirt-vm:custom>"
    xml = re.sub("<ovirt-vm:custom ?/>", told, vdsm.before_start(prepared, custom))
    if each.name:
        xml = xml.replace(f"<name>vm-{vm.id[:8]}<", f"<name>{each.name}<")
    libvirt.create(xml, "--paused")
    try:
        yield
    finally:
        assert vdsm.stop(prepared, custom).rc == 0


@dataclass(frozen=True)
class Starting:
    call: Call
    image: Image


@contextmanager
def starting(each: Guest, sign: signal.Signals = signal.SIGTERM) -> Iterator[Starting]:
    """A start that is broken off in the end, and its VM stopped; nothing is tidied up if it is killed."""
    define(each)
    (disk,) = each.vm.disks
    call = start_point("after_disk_prepare", each.vm.id, disk_json(disk), each.custom)
    try:
        yield Starting(call, disk.image)
    finally:
        if call.process and call.process.poll() is None:
            call.kill(sign)
        call.wait()
        libvirt.undefine(each.vm.id)
        if sign != signal.SIGKILL:
            run_point("after_vm_destroy", each.vm.id, domain_xml(each.vm), each.custom)


# -- terminals


def on_terminal(*argv: str) -> str:
    """What `argv` prints on a terminal of COLUMNS columns, below its own command line."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    process = subprocess.Popen(argv, stdin=its, stdout=its, stderr=its, env=TERMINAL)
    os.close(its)
    printed = b""
    while True:
        try:
            printed += os.read(ours, 65536)
        except OSError:  # EIO: nobody has the other side open any more
            break
    process.wait()
    os.close(ours)
    words = [os.path.basename(argv[0]), *argv[1:]]
    return f"\033[2m# {' '.join(words)}\033[0m\n" + printed.decode().rstrip()


@contextmanager
def session(*argv: str) -> Iterator[None]:
    """`argv` runs in a terminal of tmux."""
    size = ("-x", str(COLUMNS), "-y", str(ROWS))
    settings = (";", "set-option", "status", "off")  # its line would take one of ours
    begin = ("-f", "/dev/null", "new-session", "-d", *size, *argv, *settings)
    subprocess.run([*TMUX, *begin], env=TERMINAL, check=True)
    try:
        yield
    finally:
        attempt(*TMUX, "kill-server")


def captured() -> str:
    """What the terminal of tmux shows now."""
    return run(*TMUX, "capture-pane", "-p", "-e").rstrip()


if __name__ == "__main__":
    sys.exit(main())
