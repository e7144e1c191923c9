"""What needs LVM: starts, restarts, memory, gc and status, each against the plain tools in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from localdisk.hook import copy as hook_copy
from localdisk.hook import sources
from localdisk.protocol import Target
from localdisk.vdsm.disk_json import read_disk
from localdisk.volumes.lvm import VolumeGroup
from tests.bed import host, libvirt, vdsm
from tests.bed.player import run_point
from tests.bed.shell import run
from tests.bed.storage import FileStorage, Image, fill, new_id
from tests.bed.vm import Disk, Vm, disk_json, domain_xml
from tests.bench import plain
from tests.bench.many import CONFIG, MANY, many_disks, metadata
from tests.bench.measure import (
    BARE,
    MIB,
    ROUNDS,
    alternate,
    lvm_calls,
    lvm_commands_counted,
    memory_watched,
    quiet_disks,
    row,
    say,
    seconds,
    sectors,
    timed,
)

SIZE, DATA, SMALL = 1024 * MIB, 220 * MIB, 4 * MIB
BACKENDS = ("lvm", "lvmthin")
MEMORY_ROUNDS = 5


def main(words: Sequence[str]) -> None:
    host.setup()
    libvirt.start()
    host.thin_pool("3g")
    storage = FileStorage()
    large, small = image(storage, SIZE, DATA), image(storage, SMALL, SMALL // 2)
    say(f"disk of {SIZE // MIB} MiB with {DATA // MIB} MiB of data, qcow2 on a raw template")
    say("V: plain tools that stand for the hook that vdsm ships (tests/bench/plain.py)")
    rows: dict[str, Callable[[], None]] = {
        "first": lambda: first_start("lvm", "0.8", large, small),
        "first-thin": lambda: first_start("lvmthin", "0.6", large, small),
        "copy": lambda: copy("lvm", large),
        "copy-thin": lambda: copy("lvmthin", large),
        "kept": lambda: kept_start("lvm", large),
        "kept-thin": lambda: kept_start("lvmthin", large),
        "prepared": lambda: prepared(large),
        "memory": lambda: memory(large, small),
        "many": many,
        "remove": removal,
    }
    for name in words or rows:
        rows[name]()


def image(storage: FileStorage, size: int, data: int) -> Image:
    template = storage.template(size, "raw", seed=1)
    fill(template.leaf, data)
    return storage.clone(template, layers=1, seed=2)


# -- rows


def first_start(backend: str, limit: str, large: Image, small: Image) -> None:
    configure("delete")
    start(backend, small)  # extraction and caches are not what is measured
    theirs, ours = alternate(lambda: plain_first(backend, large), lambda: start(backend, large), ROUNDS)
    with lvm_commands_counted():
        lvm_calls()
        start(backend, small)
        calls = len(lvm_calls())
    detail = f"{ours:.2f} s / {theirs:.2f} s; {calls} LVM commands with the stop"
    row(f"first start, {backend} / V", ours / theirs, detail, limit)


def copy(backend: str, large: Image) -> None:
    """What fills the volume, run by itself, against qemu-img alone."""
    configure("delete")
    theirs, ours = alternate(lambda: plain_copy(backend, large), lambda: our_copy(backend, large), ROUNDS)
    detail = f"{ours:.2f} s / {theirs:.2f} s"
    row(f"the copy itself, {backend} / qemu-img convert", ours / theirs, detail, "0.9")


def kept_start(backend: str, large: Image) -> None:
    """A restart that finds its kept disk."""
    configure("keep")
    vm_id = new_id()
    restart(backend, vm_id, large)
    with plain_volume(backend, large):
        theirs, ours = alternate(plain_kept, lambda: restart(backend, vm_id, large), rounds=2 * ROUNDS)
    with lvm_commands_counted():
        before = sectors()
        lvm_calls()
        prepare(backend, vm_id, large)
        calls = len(lvm_calls())
        read, written = (after - start for after, start in zip(sectors(), before))
    configure("delete")
    stop(backend, vm_id, large)
    detail = f"{ours:.2f} s / {theirs:.2f} s; {calls} LVM commands, {read} KiB read, {written} written"
    row(f"restart of a kept disk, {backend} / V", ours / theirs, detail, "0.75")


def prepared(large: Image) -> None:
    """before_vm_start of a VM whose disk after_disk_prepare has made local."""
    configure("delete")
    vm_id, custom = new_id(), {"localdisk": "lvm"}
    libvirt.define_placeholder(vm_id)
    xml = domain_xml(Vm(vm_id, (vdsm.prepare(vm_id, Disk("vda", large), custom),)))
    call = ("before_vm_start", vm_id, xml, custom)
    run_point(*call)
    bare, ours = alternate(lambda: timed(BARE), lambda: seconds(lambda: run_point(*call)), rounds=3 * ROUNDS)
    row("before_vm_start of a prepared VM / bare interpreter", ours / bare, f"{ours * 1e3:.0f} ms", "6")
    stop("lvm", vm_id, large)


def memory(large: Image, small: Image) -> None:
    """The most of several starts: as they usually are, and with a configuration that has changed before."""
    for backend in BACKENDS:
        configure("delete")
        start(backend, small)  # extracts, the first time
        usual = max(peak_memory(backend, large) for _ in range(MEMORY_ROUNDS))
        changed = 0
        for nice in range(MEMORY_ROUNDS):
            configure("delete", f"copy: {{nice: {nice}}}\n")
            changed = max(changed, peak_memory(backend, large))
        detail = f"MiB, proportional; {changed / MIB:.1f} with a changed configuration"
        row(f"peak memory of hook and helper together, {backend}", usual / MIB, detail, "25")


def peak_memory(backend: str, large: Image) -> int:
    """Bytes of one start: the most that a look met; between two looks it may be more."""
    peaks: list[int] = []
    with memory_watched(peaks, every=0.01):
        start(backend, large)
    return peaks[0]


def many() -> None:
    for count in (10, 100, 1000, 3000):
        collect(count)


def collect(count: int) -> None:
    """gc and status over so many kept disks against one lvs over them and a bare interpreter."""
    with many_disks(count):
        columns = ["-o", "lv_name,lv_size,lv_tags"]
        lvs = ["/usr/sbin/lvs", "--reportformat", "json", "--units", "b", *columns, MANY]
        for mode in ("gc", "status"):
            look_at_all(mode, count, lvs)
        before = metadata()
        for words in ([], ["--dry-run"]):
            timed([str(host.PROGRAM), "gc", *words])
        assert metadata() == before, "gc has changed kept disks"


def look_at_all(mode: str, count: int, lvs: Sequence[str]) -> None:
    argv = [str(host.PROGRAM), mode]
    for each in (lvs, argv):
        timed(each)
    theirs, ours = alternate(lambda: timed(lvs) + timed(BARE), lambda: timed(argv), ROUNDS)
    limit = "1.5" if count >= 1000 else ""
    row(f"{mode} over {count} kept disks / lvs and interpreter", ours / theirs, f"{ours:.2f} s", limit)


def removal() -> None:
    """gc that removes thirty disks against one lvremove of thirty."""
    configure("delete")
    theirs, ours = alternate(lambda: with_thirty(lvremove), lambda: with_thirty(gc), rounds=2)
    row("gc that removes 30 disks / lvremove of 30", ours / theirs, f"{ours:.2f} s / {theirs:.2f} s", "2")


def with_thirty(remove: Callable[[list[str]], object]) -> float:
    names = [new_id() for _ in range(30)]
    for name in names:
        tags = ["localdisk", f"VM_{new_id()}", f"IU_{new_id()}", "DELETING"]
        options = [word for tag in tags for word in ("--addtag", tag)]
        run("lvcreate", "-y", "-Wn", "-L", "4m", "-n", name, *options, host.VOLUME_GROUP)
    took = seconds(lambda: remove(names))
    assert not host.logical_volumes().keys() & set(names)
    return took


def lvremove(names: list[str]) -> None:
    """A process of its own, as gc's is; `host.remove` asks the open lvm."""
    run("lvremove", "-y", "-qq", *(f"{host.VOLUME_GROUP}/{name}" for name in names))


def gc(_names: list[str]) -> None:
    timed([str(host.PROGRAM), "gc"])


# -- steps


def configure(on_stop: str, more: str = "") -> None:
    CONFIG.write_text(f"retention: {{on_stop: {on_stop}}}\n{more}")


def start(backend: str, disk: Image) -> float:
    """Seconds of after_disk_prepare for a new VM, which is stopped again."""
    vm_id = new_id()
    took = prepare(backend, vm_id, disk)
    stop(backend, vm_id, disk)
    return took


def restart(backend: str, vm_id: str, disk: Image) -> float:
    took = prepare(backend, vm_id, disk)
    stop(backend, vm_id, disk)
    return took


def prepare(backend: str, vm_id: str, disk: Image) -> float:
    libvirt.define_placeholder(vm_id)
    quiet_disks()
    started = time.perf_counter()
    vdsm.prepare(vm_id, Disk("vda", disk), {"localdisk": backend})
    return time.perf_counter() - started


def stop(backend: str, vm_id: str, disk: Image) -> None:
    libvirt.undefine(vm_id)
    xml = domain_xml(Vm(vm_id, (Disk("vda", disk),)))
    run_point("after_vm_destroy", vm_id, xml, {"localdisk": backend})


def our_copy(backend: str, disk: Image) -> float:
    """Seconds of the hook's copy to a fresh volume of that kind."""
    with plain_volume(backend, disk), sources.opened(read_disk(disk_json(Disk("vda", disk)))) as source:
        dm_uuid = VolumeGroup.read(host.VOLUME_GROUP).dm_uuid(plain.NAME)
        target = Target(f"/dev/{plain.PLACE}", dm_uuid, zeroed=backend == "lvmthin", bandwidth=None, nice=0)
        quiet_disks()
        return seconds(lambda: hook_copy.copy(source, target, lambda _fraction, _written: None))


@contextmanager
def plain_volume(backend: str, disk: Image) -> Iterator[None]:
    run("lvcreate", "-y", "-Wn", "-n", plain.NAME, *plain.kind(backend, disk), host.VOLUME_GROUP)
    try:
        yield
    finally:
        host.remove(plain.NAME)


def plain_copy(backend: str, disk: Image) -> float:
    """Seconds of qemu-img to a fresh volume of that kind."""
    with plain_volume(backend, disk):
        quiet_disks()
        return seconds(lambda: plain.copy(disk, f"/dev/{plain.PLACE}"))


def plain_first(backend: str, disk: Image) -> float:
    quiet_disks()
    try:
        return seconds(lambda: plain.first(backend, disk))
    finally:
        host.remove(plain.NAME)


def plain_kept() -> float:
    """Seconds of a start that finds its disk, active since the start before."""
    quiet_disks()
    return seconds(plain.kept)
