"""What the tests of localdisk's life on a real kernel do again and again: start, look, refuse, stop."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.bed import host, libvirt
from tests.bed.player import Call, Result, run_point, start_point
from tests.bed.shell import CommandFailed, attempt, run
from tests.bed.storage import Image, digest, guest_bytes, is_zero, new_id
from tests.bed.vm import Disk, Vm, disk_json, domain_xml

CONFIG = Path("/etc/localdisk.yaml")
LOCKS = Path("/run/localdisk")
VALIDATED = LOCKS / "configuration"  # the program's memory of the last configuration that it validated
validated: dict[str, bytes] = {}  # what was in VALIDATED, by the text of the configuration
THICK = {"localdisk": "lvm"}
THIN = {"localdisk": "lvmthin"}
KEEP = "retention: {on_stop: keep}\n"
WRITTEN = b"written by the guest"
MIB = 1 << 20


def configure(text: str = "") -> None:
    """Write the configuration file.  If the program has validated this text before, it remembers that.

    It remembers the last valid configuration only (localdisk/config_memory.py), and takes twice as long to
    start with another.  Tests change the configuration all the time, hosts do not: what it remembered of each
    text is put back with the text.
    """
    with contextlib.suppress(OSError, ValueError):
        remembered = VALIDATED.read_bytes()
        of_text, *_ = json.loads(remembered.partition(b"\n")[2])["of"]
        validated[of_text] = remembered
    CONFIG.write_text(text)
    CONFIG.chmod(0o644)
    if text in validated and LOCKS.is_dir():
        VALIDATED.write_bytes(validated[text])
        VALIDATED.chmod(0o644)


def just_now() -> int:
    """What a claim says if the hook has just seen in libvirt that its VM starts."""
    return int(time.monotonic() * 1000)


def device(image: Image) -> Path:
    """Where the local copy of an image is."""
    return Path("/dev") / host.VOLUME_GROUP / image.leaf.id


def starting(vm_id: str) -> str:
    """As vdsm does first: the VM is defined and not active."""
    libvirt.define_placeholder(vm_id)
    return vm_id


def start(image: Image, custom: Mapping[str, str] = THICK, vm_id: str = "", **changes: object) -> str:
    """after_disk_prepare accepts the disk and makes it local; returns the VM's id."""
    vm_id = vm_id or new_id()
    starting(vm_id)
    before = json.loads(disk_json(Disk("vda", image), **changes))
    result = run_point("after_disk_prepare", vm_id, json.dumps(before), custom)
    assert result.rc == 0, result.stderr
    after = json.loads(result.data)
    local = {"path": str(device(image)), "format": "raw", "diskType": "block", "shared": "exclusive"}
    assert after == {**before, **local}
    assert list(after) == list(before)
    libvirt.undefine(vm_id)
    return vm_id


def begin(image: Image, vm_id: str, backend: str = "lvm") -> Call:
    starting(vm_id)
    return start_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), {"localdisk": backend})


@contextmanager
def waited_for(call: Call) -> Iterator[list[Result]]:
    """The call's end, which is waited for in the background."""
    results: list[Result] = []
    waiter = threading.Thread(target=lambda: results.append(call.wait()))
    waiter.start()
    yield results
    waiter.join(300)
    assert results, "the hook did not end"


def equals_source(image: Image) -> bool:
    """The local copy is what the guest would see of the source, and zeros behind."""
    size = image.leaf.size
    return digest(device(image), size) == guest_bytes(image.leaf) and is_zero(device(image), size)


def stop(vm_id: str, *images: Image, custom: Mapping[str, str] = THICK) -> None:
    vm = Vm(vm_id, tuple(Disk(f"vd{letter}", image) for letter, image in zip("abcdef", images)))
    result = run_point("after_vm_destroy", vm_id, domain_xml(vm), custom)
    assert result.rc == 0, result.stderr


def comes_back(image: Image, vm_id: str, custom: dict[str, str]) -> None:
    """The next start succeeds with the right bytes; after the stop nothing is there, also for gc."""
    configure()
    start(image, custom, vm_id)
    assert equals_source(image)
    stop(vm_id, image, custom=custom)
    localdisk("gc")
    assert set(host.logical_volumes()) <= {host.THIN_POOL}
    assert not list(LOCKS.glob("*.*"))
    assert "Suspended" not in run("dmsetup", "info", "-c", "--noheadings", "-o", "name,suspended")


def refused(point: str, vm_id: str, data: str, custom: Mapping[str, str] = THICK) -> str:
    """The hook point refuses with one line that has what to do, and changes nothing; returns the line."""
    before = seqno()
    result = run_point(point, vm_id, data, custom)
    line = one_line(result)
    assert result.data == data
    assert seqno() == before, "the volume group was changed"
    assert not list(LOCKS.glob("*.*")), "a lock is left behind"
    return line


def refused_disk(image: Image, custom: Mapping[str, str] = THICK, vm_id: str = "", **changes: object) -> str:
    """after_disk_prepare refuses this disk of a VM that is about to start."""
    vm_id = starting(vm_id or new_id())
    try:
        return refused("after_disk_prepare", vm_id, disk_json(Disk("vda", image), **changes), custom)
    finally:
        libvirt.undefine(vm_id)


def one_line(result: Result) -> str:
    assert (result.rc, result.refused) == (2, True), result
    lines = result.stderr.splitlines()
    assert lines, "it said nothing"
    assert "Traceback" not in result.stderr
    assert lines[-1].startswith("localdisk: ")
    assert " : " in lines[-1]
    return lines[-1]


def older(image: Image, vm_id: str) -> None:
    """As vdsm's older hook has left it, in which a guest has lived."""
    words = (f"VM_{vm_id}", f"IU_{image.id}", "PU_00000000-0000-0000-0000-000000000000")
    options = [word for tag in words for word in ("--addtag", tag)]
    run("lvcreate", "-y", "-Wn", "-n", image.leaf.id, "-L", "8m", *options, host.VOLUME_GROUP)
    device(image).write_bytes(WRITTEN)


def name_of(image: Image) -> str:
    return f"{host.VOLUME_GROUP}/{image.leaf.id}"


def tags(image: Image) -> frozenset[str]:
    return host.logical_volumes()[image.leaf.id]


def lv_uuid(image: Image) -> str:
    (row,) = host.lvm_report("lvs", "-o", "lv_uuid", f"{host.VOLUME_GROUP}/{image.leaf.id}")
    return row["lv_uuid"]


def seqno() -> str:
    """The number of the volume group's last metadata commit; "" if LVM reports no such group."""
    try:
        rows = host.lvm_report("vgs", "-o", "vg_seqno", host.VOLUME_GROUP)
    except CommandFailed:
        return ""
    return "".join(row["vg_seqno"] for row in rows)  # of a shared group without lvmlockd there is no row


def localdisk(*words: str, code: int = 0) -> str:
    """What a mode of the installed program prints to root."""
    done = attempt(str(host.PROGRAM), *words)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    return done.stdout


def status() -> dict[str, dict[str, Any]]:
    """The rows of `status --json` by volume id; its exit code must fit its problems."""
    document = json.loads(attempt(str(host.PROGRAM), "status", "--json").stdout)
    return {row["volume"]: row for row in document["disks"]}


def copied(image: Image) -> int:
    """Bytes that a copy under way has done, from the record in the disk's lock; 0 if there is none."""
    try:
        return int(json.loads((LOCKS / f"{image.leaf.id}.lock").read_text())["done"])
    except (OSError, ValueError):
        return 0


def helpers() -> list[int]:
    """The process ids of running helpers."""
    return [pid for pid, words in processes() if words[-1:] == ["helper"] and "python" in words[0]]


def copiers() -> list[int]:
    """The process ids of running qemu-img convert."""
    named = ((pid, [Path(words[0]).name, *words[1:2]]) for pid, words in processes())
    return [pid for pid, words in named if words == ["qemu-img", "convert"]]


@contextmanager
def paused_copies() -> Iterator[None]:
    """No copy that runs now makes progress, however long the context lasts."""
    pids = copiers()
    assert pids, "nothing is copied"
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def kill_all(*pids: int) -> None:
    """Kills processes, or groups of them (negative numbers), as one: none sees another end and acts on it."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def processes() -> list[tuple[int, list[str]]]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().rstrip("\0").split("\0")
        except OSError:
            continue
        found.append((int(process.name), words))
    return found


def nobody_is_left() -> bool:
    words = [words for _, words in processes()]
    ours = any("/50_localdisk" in " ".join(w[:3]) or w[-1:] == ["helper"] for w in words)
    return not (ours or copiers())


def wait_for(condition: Callable[[], object], what: str, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def hold_open(path: Path) -> subprocess.Popen[bytes]:
    """A process that has the device open until it is killed."""
    with open(path, "rb") as node:
        return subprocess.Popen(["sleep", "3600"], stdin=node)


@contextmanager
def syslog(part: str = "") -> Iterator[list[str]]:
    """The lines that go to the log of the host and have this part; the list grows as long as this lasts."""
    lines: list[str] = []
    path = Path("/dev/log")
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        path.chmod(0o666)
        receiver.settimeout(0.2)
        ended = threading.Event()

        def read() -> None:
            while not ended.is_set():
                with suppress(TimeoutError):
                    line = receiver.recv(65536).decode()
                    if part in line:
                        lines.append(line)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield lines
        finally:
            ended.set()
            reader.join()
            path.unlink()


# -- erasing

BLKDISCARD = "/usr/sbin/blkdiscard"


@contextmanager
def slow_blkdiscard() -> Iterator[Path]:
    """blkdiscard waits, before it begins, until the yielded file is removed."""
    waits, real, script = Path("/run/gc-blkdiscard"), Path("/run/gc-real"), Path("/run/gc-script")
    run("cp", BLKDISCARD, str(real))
    script.write_text(f'#!/bin/sh\nwhile [ -e {waits} ]; do sleep 0.1; done\nexec {real} "$@"\n')
    script.chmod(0o755)
    run("mount", "--bind", str(script), BLKDISCARD)
    waits.touch()
    try:
        yield waits
    finally:
        waits.unlink(missing_ok=True)
        run("umount", BLKDISCARD)


def erasing() -> list[str]:
    """The names of disks that are set aside to be erased."""
    return [name for name, words in host.logical_volumes().items() if "ERASE_zero" in words]
