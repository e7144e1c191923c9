"""The demo: the whole life of a VM's local disks on real LVM and real libvirt, with comments.

Runs as root in the test bed (`./build.sh demo`).  Every promise is checked; if one does not hold, the demo
ends with exit code 1.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tests.bed import host, libvirt, vdsm
from tests.bed.shell import CommandFailed, attempt, how_it_ended, run
from tests.bed.storage import FileStorage, digest, fill, guest_bytes, new_id
from tests.bed.vm import Disk, Vm, boot_sector

MIB = 1 << 20
CONFIG = Path("/etc/localdisk.yaml")
LINE = "Guest here: I run, and my shared storage is gone."
BAR = 40  # characters

T = TypeVar("T")


class BrokenPromise(Exception):
    pass


def main() -> int:
    started = time.monotonic()
    try:
        vm, storage = prepare_host()
        act("1. Custom property localdisk=lvm: preallocated copies, removed when the VM stops")
        life(vm, storage, "lvm", keep=False)
        act("2. localdisk=lvmthin and `on_stop: keep`: thin copies, kept when the VM stops")
        host.thin_pool()
        life(vm, storage, "lvmthin", keep=True)
    except (BrokenPromise, vdsm.Refused, CommandFailed, AssertionError) as error:
        say(f"\n  NOT AS PROMISED: {error or type(error).__name__}")
        return 1
    say(f"\nEverything was as promised ({time.monotonic() - started:.0f} s).")
    return 0


# -- the acts


def prepare_host() -> tuple[Vm, FileStorage]:
    act("A host, shared storage with a template, and a VM made from the template")
    host.setup()
    libvirt.start()
    storage = FileStorage()
    template = storage.template(512 * MIB, "raw", seed=1)
    fill(template.leaf, 256 * MIB, seed=2)
    with open(template.leaf.path, "r+b") as file:
        file.write(boot_sector(LINE))
    system, data = storage.clone(template, layers=2, seed=3), storage.template(64 * MIB, "raw", seed=4)
    vm = Vm(new_id(), (Disk("vda", system, 1), Disk("vdb", data)))
    say(f"  VM {vm.id} has two disks on shared storage:")
    say("    vda  512 MiB, qcow2 on qcow2 on the template's raw volume, 256 MiB of data")
    say("    vdb  64 MiB, one raw volume")
    show("vgs", "-o", "vg_name,vg_size,vg_free,lv_count", host.VOLUME_GROUP)
    promise(not local_volumes(), "volume group ovirt-local is empty")
    return vm, storage


def life(vm: Vm, storage: FileStorage, backend: str, keep: bool) -> None:
    CONFIG.write_text(f"retention: {{on_stop: {'keep' if keep else 'delete'}, keep_for: 0s}}\n")
    custom = {"localdisk": backend}
    running = starts(vm, storage, custom, "a-first-start")
    runs(running)
    stops(vm, custom, keep)
    if keep:
        starts(vm, storage, custom, "a-second-start", expect_copy=False)
        stops(vm, custom, keep)
        show(str(host.PROGRAM), "gc")
    promise(not local_volumes(), "nothing is left behind: no local disk in the volume group")
    promise(not list(Path("/run/localdisk").glob("*.*")), "and no lock in /run/localdisk")


def starts(vm: Vm, storage: FileStorage, custom: dict[str, str], name: str, expect_copy: bool = True) -> Vm:
    """vdsm prepares both disks; then the images are moved away, and the VM boots all the same."""
    serial = host.SCRATCH / f"{name}-{custom['localdisk']}"
    vm = replace(vm, serial_file=serial)
    expected = [guest_bytes(disk.image.leaf) for disk in vm.disks]
    say(f"\n  vdsm starts the VM ({name[2:].replace('-', ' ')}):")
    libvirt.define_placeholder(vm.id)
    prepared = replace(vm, disks=tuple(prepares(vm.id, disk, custom, expect_copy) for disk in vm.disks))
    for disk, content in zip(prepared.disks, expected):
        path = disk.image.leaf.path
        promise(path == Path("/dev/ovirt-local") / disk.image.leaf.id, f"{disk.name} is {path}")
        same = digest(path, disk.image.leaf.size) == content
        promise(same, f"{disk.name} equals the guest's view of its chain, bit for bit")
    away = storage.images.rename(storage.images.with_name("away"))
    say("  the images are moved away from shared storage now")
    try:
        boots(prepared, custom, serial)
    finally:
        away.rename(storage.images)
    return prepared


def prepares(vm_id: str, disk: Disk, custom: dict[str, str], expect_copy: bool) -> Disk:
    """One after_disk_prepare with a progress bar."""
    copies: list[float] = []
    answer = watched(lambda: vdsm.prepare(vm_id, disk, custom), disk, copies)
    if not expect_copy:
        promise(not copies, f"{disk.name}: the kept copy is used again, nothing is copied")
    return answer


def boots(vm: Vm, custom: dict[str, str], serial: Path) -> None:
    xml = vdsm.before_start(vm, custom)
    libvirt.create(xml)
    line = libvirt.serial_line(serial)
    promise(line == LINE, f"the VM's serial console says: {line}")
    show("virsh", "-r", "-c", libvirt.URI, "domblklist", vm.id)


def runs(vm: Vm) -> None:
    show(str(host.PROGRAM), "status")
    name = f"{host.VOLUME_GROUP}/{vm.disks[0].image.leaf.id}"
    refused = attempt("lvremove", "-y", name)
    said = refused.stderr.strip().rpartition("\n")[2]
    promise(refused.returncode != 0, f"lvremove is refused: {said or how_it_ended(refused.returncode)}")
    gc = run(str(host.PROGRAM), "gc")
    promise(gc.count("kept: in use") == len(vm.disks), "localdisk gc keeps both disks: in use")


def stops(vm: Vm, custom: dict[str, str], keep: bool) -> None:
    result = vdsm.stop(vm, custom)
    promise(result.rc == 0, f"vdsm stops the VM{result.reason and f': {result.reason}'}")
    if keep:
        show(str(host.PROGRAM), "status")
        promise(len(local_volumes()) == len(vm.disks), "its local disks are kept")


# -- telling and checking


def watched(work: Callable[[], T], disk: Disk, copies: list[float]) -> T:
    """Do `work` in a thread and draw how far the copy of `disk` is; `copies` gets what was seen."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def carry_out() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001 (handed to the caller)
            failure.append(error)

    started = time.monotonic()
    worker = threading.Thread(target=carry_out)
    worker.start()
    while worker.is_alive():
        done = copied(disk)
        if done is not None:
            copies.append(done)
            draw(disk, done, started)
        worker.join(0.3)
    if failure:
        raise failure[0]
    draw(disk, 1.0, started)
    say("")
    return outcome[0]


def copied(disk: Disk) -> float | None:
    """The fraction of a copy that is under way, from the record in the disk's lock."""
    try:
        record = json.loads(Path(f"/run/localdisk/{disk.image.leaf.id}.lock").read_text())
        return float(record["done"] / record["size"])
    except (OSError, ValueError, ArithmeticError):
        return None


def draw(disk: Disk, done: float, started: float) -> None:
    filled = round(done * BAR)
    bar = "#" * filled + "." * (BAR - filled)
    print(f"\r    {disk.name} [{bar}] {done:4.0%} {time.monotonic() - started:4.0f} s", end="", flush=True)


def local_volumes() -> list[str]:
    return [name for name in host.logical_volumes() if name != host.THIN_POOL]


def promise(holds: bool, what: str) -> None:
    if not holds:
        raise BrokenPromise(what)
    say(f"  ok  {what}")


def act(title: str) -> None:
    say(f"\n== {title}")


def show(*argv: str) -> None:
    """Run a command the way an operator would, its output indented."""
    output = run(*argv).rstrip()
    say(f"\n  # {Path(argv[0]).name} {' '.join(argv[1:])}")
    say("\n".join(f"  {line}" for line in output.splitlines()) + "\n")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
