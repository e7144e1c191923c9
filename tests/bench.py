"""The benchmark: ratios, each measured side by side in one run (`./build.sh bench`).

    python -m tests.bench here     what needs no kernel of our own: a hook run without the property
    python -m tests.bench bed      what needs LVM; runs as root in the test bed
    python -m tests.bench cache    the template cache; there, too.  With GIB or GIB/N …: templates of these
                                   sizes, of which 1/N (without: a quarter) is data

Machines differ and are noisy: read the ratios, not the seconds.  In a throw-away kernel without KVM
every instruction of ours is emulated while the disks are not, so that what we add looks larger there.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.bed import host, libvirt, vdsm
from tests.bed.player import run_point, start_point
from tests.bed.shell import run
from tests.bed.storage import FileStorage, Image, Volume, fill, new_id
from tests.bed.vm import Disk, Vm, disk_json, domain_xml

MIB = 1 << 20
SIZE, DATA, SMALL = 2048 * MIB, 1024 * MIB, 4 * MIB
ROUNDS = 3
CONFIG = Path("/etc/localdisk.yaml")
CALLS = Path("/run/bench-lvm-calls")
LVM = Path("/usr/sbin/lvm")
MANY, ASIDE = host.VOLUME_GROUP, "bench-aside"


def main() -> int:
    {"here": here, "bed": bed, "cache": cache}[sys.argv[1]]()
    return 0


# -- without a kernel of our own


def here() -> None:
    """A hook run for a VM without the property, against a bare interpreter."""
    with tempfile.TemporaryDirectory() as directory:
        link = Path(directory, "after_disk_prepare", "50_localdisk")
        link.parent.mkdir()
        link.symlink_to(host.ROOT / "dist/localdisk")
        bare, hook = alternate(
            lambda: timed(["/usr/bin/python3", "-c", "pass"]), lambda: timed([str(link)]), rounds=60
        )
    row("(a) hook run without the property / bare interpreter", hook / bare, f"{hook * 1e3:.1f} ms", "1.5")


def timed(argv: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(argv, check=True, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def alternate(first: Callable[[], float], second: Callable[[], float], rounds: int) -> tuple[float, float]:
    """The medians of two measurements that take turns, so that both meet the same noise."""
    pairs = [(first(), second()) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


# -- on real LVM


def bed() -> None:
    host.setup()
    libvirt.start()
    host.thin_pool("3g")
    if os.environ.get("LOCALDISK_BED_THROWAWAY") == "1":
        count_lvm_commands()
    storage = FileStorage()
    large, small = image(storage, SIZE, DATA), image(storage, SMALL, SMALL // 2)
    say(f"disk of {SIZE >> 30} GiB with {DATA >> 30} GiB of data, qcow2 on a raw template")
    for backend in ("lvm", "lvmthin"):
        first_start(backend, large, small)
    kept_start(large)
    for count in (10, 100, 1000):
        collect(count)


def image(storage: FileStorage, size: int, data: int) -> Image:
    template = storage.template(size, "raw", seed=1)
    fill(template.leaf, data)
    return storage.clone(template, layers=1, seed=2)


def first_start(backend: str, large: Image, small: Image) -> None:
    """(b): our first start against plain qemu-img to an LV of the same kind."""
    configure("delete")
    peaks: list[int] = []
    start(backend, small)  # extraction and caches are not what is measured
    constant = statistics.median(start(backend, small) for _ in range(ROUNDS))
    calls = len(lvm_calls())
    plain, ours = alternate(
        lambda: convert(backend, large), lambda: start(backend, large, peaks), rounds=ROUNDS
    )
    detail = f"{ours:.1f} s / {plain:.1f} s; constant {constant:.1f} s, {calls} LVM commands"
    row(f"(b) first start, {backend}, whole / qemu-img convert", ours / plain, detail, "")
    row(f"(b) first start, {backend}, less the constant / convert", (ours - constant) / plain, "", "1.15")
    row(f"(d) peak memory of our processes, {backend}", max(peaks) / MIB, "MiB, hook and helper", "64")


def kept_start(large: Image) -> None:
    """(c): a restart that finds its kept disk."""
    configure("keep")
    vm_id = new_id()
    first = prepare("lvm", vm_id, large)
    stop("lvm", vm_id, large)
    before = sectors()
    lvm_calls()
    again = prepare("lvm", vm_id, large)
    calls = lvm_calls()
    read, written = (after - start for after, start in zip(sectors(), before))
    detail = f"{again:.1f} s; {len(calls)} LVM commands; {read} KiB read, {written} KiB written on both disks"
    row("(c) restart of a kept disk / first start", again / first, detail, "")
    configure("delete")
    stop("lvm", vm_id, large)


def collect(count: int) -> None:
    """(e): gc over so many kept disks against one lvs over them and a bare interpreter."""
    with many_disks(count):
        lvs = [
            "/usr/sbin/lvs",
            "--reportformat",
            "json",
            "--units",
            "b",
            "-o",
            "lv_name,lv_size,lv_tags",
            MANY,
        ]
        bare = ["/usr/bin/python3", "-c", "pass"]
        gc = [str(host.PROGRAM), "gc"]
        for argv in (lvs, gc):
            timed(argv)
        plain, ours = alternate(lambda: timed(lvs) + timed(bare), lambda: timed(gc), rounds=ROUNDS)
        before = metadata()
        for words in ([], ["--dry-run"]):
            timed([*gc, *words])
        assert metadata() == before, "gc has changed kept disks"
    limit = "1.5" if count == 1000 else ""
    row(f"(e) gc over {count} kept disks / lvs and interpreter", ours / plain, f"{ours:.2f} s", limit)


@contextmanager
def many_disks(count: int) -> Iterator[None]:
    """The volume group is another one, with so many small kept disks, written into its metadata at once.

    There is no configuration: reading one costs the same with any number of disks.
    """
    CONFIG.unlink(missing_ok=True)
    run("vgrename", MANY, ASIDE)
    file = host.SCRATCH / "many.pv"
    with open(file, "wb") as pv:
        pv.truncate((count + 100) * 4 * MIB)
    loop = run("losetup", "--find", "--show", str(file)).strip()
    run("vgcreate", "-y", "--setautoactivation", "n", "--metadatasize", "32m", MANY, loop)
    text = Path("/run/many")
    try:
        run("vgcfgbackup", "-f", str(text), MANY)
        text.write_text(with_disks(text.read_text(), count))
        run("vgcfgrestore", "-f", str(text), MANY)
        yield
    finally:
        run("vgremove", "-f", "-y", MANY)
        run("vgrename", ASIDE, MANY)
        run("losetup", "--detach", loop)
        file.unlink()


def with_disks(text: str, count: int) -> str:
    """LVM's metadata text of an empty group, with `count` kept disks of one extent each."""
    now, volumes = int(time.time()), []
    for number in range(count):
        tags = ("localdisk", f"VM_{new_id()}", f"IU_{new_id()}", f"SOURCE_{number:032x}", f"STOPPED_{now}")
        uuid = f"bench0-many-many-many-many-many-{number:06d}"
        listed = ", ".join(f'"{tag}"' for tag in tags)
        volumes.append(
            f"""{new_id()} {{
            id = "{uuid}"
            status = ["READ", "WRITE", "VISIBLE"]
            tags = [{listed}]
            creation_host = "bench"
            creation_time = {now}
            segment_count = 1
            segment1 {{
                start_extent = 0
                extent_count = 1
                type = "striped"
                stripe_count = 1
                stripes = ["pv0", {number}]
            }}
        }}
        """
        )
    end = text.rindex("\n}")
    return f"{text[:end]}\n    logical_volumes {{\n{''.join(volumes)}\n    }}{text[end:]}"


def metadata() -> str:
    """All that LVM knows of the group of many disks."""
    file = Path("/run/many-now")
    run("vgcfgbackup", "-f", str(file), MANY)
    return file.read_text().partition(f"{MANY} {{")[2]


def cache() -> None:
    """(f): the second VM of a template against a full copy; (g): what it reads; (h): eight VMs at once."""
    host.setup()
    libvirt.start()
    host.thin_pool("12g")
    storage = FileStorage()
    small = image(storage, SMALL, SMALL // 2)
    start("lvmthin", small)
    constant = statistics.median(start("lvmthin", small) for _ in range(ROUNDS))
    for text in sys.argv[2:] or ("1", "4", "16", "4/1"):
        gibibytes, data = text.split("/") if "/" in text else (text, "4")
        size = int(gibibytes) << 30
        template = storage.template(size, "raw", seed=1)
        fill(template.leaf, size // int(data))
        say(f"template of {gibibytes} GiB, 1/{data} of it data")
        second_start(storage, template, constant)
        template.leaf.path.write_bytes(b"")  # its room is wanted for the next


def second_start(storage: FileStorage, template: Image, constant: float) -> None:
    caching("off")
    images = [storage.clone(template, seed=seed) for seed in range(2, 12)]
    start("lvmthin", images[0])
    full = start("lvmthin", images[0])
    caching("on")
    first = start("lvmthin", images[0])
    base = allocated(template.leaf)
    times, read = [], []
    for image in images[1:4]:
        before = shared_bytes()
        times.append(start("lvmthin", image))
        read.append(shared_bytes() - before - allocated(image.leaf))
    second = statistics.median(times)
    limit = "0.1" if template.leaf.size == 4 << 30 else ""
    detail = f"{second:.2f} s / {full:.2f} s; first {first:.2f} s; a disk of 4 MiB {constant:.2f} s"
    row("(f) second VM of a template / full copy", second / full, detail, limit)
    added = (second - constant) / (full - constant)
    row("(f) what its size adds to it / what it adds to the full copy", added, "", "")
    row("(g) read from shared storage for it, beyond its layers", max(read) / MIB, "MiB", "1")
    if template.leaf.size == 1 << 30:
        at_once(images[2:], base)
    caching("off")
    run(str(host.PROGRAM), "gc")


def caching(templates: str) -> None:
    """LVM looks at the local disk only: its scans of the other would count as read from shared storage."""
    CONFIG.write_text(f"devices: [{os.environ['LOCALDISK_BED_LOCAL']}]\ncache: {{templates: {templates}}}\n")


def at_once(images: list[Image], base: int) -> None:
    """Eight VMs of a template that is not in the cache."""
    caching("off")
    run(str(host.PROGRAM), "gc")
    caching("on")
    quiet_disks()
    vms, before = [new_id() for _ in images], shared_bytes()
    for vm_id in vms:
        libvirt.define_placeholder(vm_id)
    calls = [
        start_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), {"localdisk": "lvmthin"})
        for vm_id, image in zip(vms, images)
    ]
    for call in calls:
        result = call.wait()
        assert result.rc == 0, result
    read = shared_bytes() - before - sum(allocated(image.leaf) for image in images)
    detail = f"{len(images)} VMs at once; {read / MIB:.0f} MiB for a base of {base / MIB:.0f} MiB"
    row("(h) read of the base / its size", read / base, detail, "")
    for vm_id, image in zip(vms, images):
        stop("lvmthin", vm_id, image)


def allocated(volume: Volume) -> int:
    """Bytes that a volume takes on shared storage."""
    return os.stat(volume.path).st_blocks * 512


def shared_bytes() -> int:
    """Bytes read from the disk of the shared storage since it booted."""
    name = os.path.basename(os.path.realpath(os.environ["LOCALDISK_BED_SHARED"]))
    rows = [line.split() for line in Path("/proc/diskstats").read_text().splitlines()]
    return sum(int(row[5]) * 512 for row in rows if row[2] == name)


def convert(backend: str, disk: Image) -> float:
    """Seconds of plain qemu-img to a fresh LV of that kind."""
    kind = ["-L", f"{SIZE}b"] if backend == "lvm" else ["-V", f"{SIZE}b", "--thinpool", host.THIN_POOL]
    run("lvcreate", "-y", "-Wn", "-n", "plain", *kind, host.VOLUME_GROUP)
    quiet_disks()
    started = time.perf_counter()
    options = ["-f", "qcow2", "-O", "raw", "-t", "none", "-T", "none"]
    run("qemu-img", "convert", *options, str(disk.leaf.path), f"/dev/{host.VOLUME_GROUP}/plain")
    took = time.perf_counter() - started
    host.remove("plain")
    return took


def start(backend: str, disk: Image, peaks: list[int] | None = None) -> float:
    """Seconds of after_disk_prepare for a new VM, which is stopped again."""
    vm_id = new_id()
    lvm_calls()
    with memory_watched(peaks if peaks is not None else []):
        took = prepare(backend, vm_id, disk)
    calls = lvm_calls(keep=True)
    stop(backend, vm_id, disk)
    CALLS.write_text("\n".join(calls) + "\n" if calls else "")
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


def configure(on_stop: str) -> None:
    CONFIG.write_text(f"retention: {{on_stop: {on_stop}}}\n")


def quiet_disks() -> None:
    run("sync")
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


# -- what the machine tells


def count_lvm_commands() -> None:
    """Put a script in the place of lvm that notes each call; only where nobody else uses it."""
    real = LVM.with_name("lvm.real")
    LVM.rename(real)
    LVM.write_text(f'#!/bin/bash\necho "${{0##*/}} $1" >>{CALLS}\nexec -a "$0" {real} "$@"\n')
    LVM.chmod(0o755)


def lvm_calls(keep: bool = False) -> list[str]:
    """The LVM commands since the last look."""
    calls = CALLS.read_text().splitlines() if CALLS.exists() else []
    if not keep:
        CALLS.unlink(missing_ok=True)
    return calls


def sectors() -> tuple[int, int]:
    """KiB read from and written to the two disks of the bed since it booted."""
    names = {
        os.path.basename(os.path.realpath(os.environ[f"LOCALDISK_BED_{d}"])) for d in ("LOCAL", "SHARED")
    }
    rows = [line.split() for line in Path("/proc/diskstats").read_text().splitlines()]
    chosen = [row for row in rows if row[2] in names]
    return sum(int(row[5]) for row in chosen) // 2, sum(int(row[9]) for row in chosen) // 2


@contextmanager
def memory_watched(peaks: list[int]) -> Iterator[None]:
    """Append the peak of the memory of our own processes together while the context lasts, in bytes."""
    done = threading.Event()
    sums = [0]

    def watch() -> None:
        while not done.wait(0.1):
            sums.append(sum(proportional()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        peaks.append(max(sums))


def proportional() -> Iterator[int]:
    """The proportional set size of each running localdisk process: what several share is counted once."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            ours = any(word.endswith((b"/50_localdisk", b"/localdisk")) for word in words[:4])
            if ours and b"python" in words[0]:
                rollup = (process / "smaps_rollup").read_text()
                yield 1024 * int(rollup.split("\nPss:")[1].split()[0])
        except (OSError, IndexError, ValueError):
            continue


def row(what: str, value: float, detail: str, limit: str) -> None:
    print(f"{what:<62} {value:7.2f}  {('limit ' + limit) if limit else '':<11} {detail}", flush=True)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
