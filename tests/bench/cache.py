"""The template cache: the second VM of a template against a full copy, what it reads, eight VMs at once."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

from tests.bed import host, libvirt
from tests.bed.player import start_point
from tests.bed.shell import run
from tests.bed.storage import FileStorage, Image, fill, new_id
from tests.bed.vm import Disk, disk_json
from tests.bench.many import CONFIG
from tests.bench.measure import MIB, ROUNDS, allocated, quiet_disks, row, say, shared_bytes
from tests.bench.starts import image, start, stop


def main(words: Sequence[str]) -> None:
    host.setup()
    libvirt.start()
    host.thin_pool("12g")
    storage = FileStorage()
    small = image(storage, 4 * MIB, 2 * MIB)
    start("lvmthin", small)
    constant = statistics.median(start("lvmthin", small) for _ in range(ROUNDS))
    for text in words or ("1", "4", "16", "4/1"):
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
    for each in images[1:4]:
        before = shared_bytes()
        times.append(start("lvmthin", each))
        read.append(shared_bytes() - before - allocated(each.leaf))
    second = statistics.median(times)
    limit = "0.1" if template.leaf.size == 4 << 30 else ""
    detail = f"{second:.2f} s / {full:.2f} s; first {first:.2f} s; a disk of 4 MiB {constant:.2f} s"
    row("second VM of a template / full copy", second / full, detail, limit)
    added = (second - constant) / (full - constant)
    row("what its size adds to it / what it adds to the full copy", added)
    row("read from shared storage for it, beyond its layers", max(read) / MIB, "MiB", "1")
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
        start_point("after_disk_prepare", vm_id, disk_json(Disk("vda", each)), {"localdisk": "lvmthin"})
        for vm_id, each in zip(vms, images)
    ]
    for call in calls:
        result = call.wait()
        assert result.rc == 0, result
    read = shared_bytes() - before - sum(allocated(each.leaf) for each in images)
    detail = f"{len(images)} VMs at once; {read / MIB:.0f} MiB for a base of {base / MIB:.0f} MiB"
    row("read of the base / its size", read / base, detail)
    for vm_id, each in zip(vms, images):
        stop("lvmthin", vm_id, each)
