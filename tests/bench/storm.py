"""A boot storm: a hundred VMs of one template, four at a time, as vdsm creates them (`_ongoingCreations`).

Once thin and from the template cache, once as full copies with `copy.parallel: 2`.  After the first four
comes a VM without the property: it waits for one of vdsm's four places, behind what their hooks wait for.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.bed import host, libvirt
from tests.bed.player import Call, start_point
from tests.bed.storage import FileStorage, Image, fill, new_id
from tests.bed.vm import Disk, disk_json
from tests.bench.many import CONFIG
from tests.bench.measure import (
    MIB,
    allocated,
    lvm_calls,
    lvm_commands_counted,
    memory_watched,
    quiet_disks,
    row,
    say,
    shared_bytes,
)

PLACES = 4  # VMs that vdsm creates at once
VMS = 100
SMALL, LARGE = (64 * MIB, 16 * MIB), (4096 * MIB, 1024 * MIB)  # of the template: size, data
THIN = {"localdisk": "lvmthin"}
CACHED = "cache: {templates: on, max_size: 90%}\n"
COPIED = "copy: {parallel: 2}\n"


@dataclass
class Start:
    """A VM that is to start, with the property or without."""

    vm_id: str
    image: Image
    custom: dict[str, str]
    began: float = 0
    ended: float = 0


@dataclass
class Storm:
    """All of them, in the order in which the engine asks for them."""

    starts: list[Start]
    running: dict[str, tuple[Start, Call]] = field(default_factory=dict)

    def run(self) -> float:
        """Start them, as many at once as vdsm does; returns the seconds until the last one is prepared."""
        asked, waiting = time.perf_counter(), list(self.starts)
        while waiting or self.running:
            while waiting and len(self.running) < PLACES:
                self._begin(waiting.pop(0))
            for start, call in list(self.running.values()):
                if call.process and call.process.poll() is not None:
                    self._end(start, call)
            time.sleep(0.01)
        for start in self.starts:
            start.began -= asked
            start.ended -= asked
        return max(start.ended for start in self.starts)

    def _begin(self, start: Start) -> None:
        start.began = time.perf_counter()
        text = disk_json(Disk("vda", start.image))
        self.running[start.vm_id] = start, start_point("after_disk_prepare", start.vm_id, text, start.custom)

    def _end(self, start: Start, call: Call) -> None:
        result = call.wait()
        assert result.rc == 0, result
        start.ended = time.perf_counter()
        del self.running[start.vm_id]


def main(words: Sequence[str]) -> None:
    size, data = LARGE if "--full" in words else SMALL
    counts = [int(word) for word in words if word.isdigit()]
    count = counts[0] if counts else VMS
    host.setup()
    libvirt.start()
    pool = max(3072, count * data // MIB * 2)
    host.thin_pool(f"{pool}m")
    storage = FileStorage()
    template = storage.template(size, "raw", seed=1)
    fill(template.leaf, data)
    images = [storage.clone(template, seed=number + 2) for number in range(count + 2)]
    say(f"boot storm: {count} VMs, {PLACES} at once; template of {size // MIB} MiB, {data // MIB} of it data")
    with lvm_commands_counted():
        storm("cached", CACHED, images, template)
        storm("full copies", COPIED, images, template)


def storm(how: str, text: str, images: Sequence[Image], template: Image) -> None:
    # LVM looks at the local disk only: its scans of the other would count as read from shared storage.
    device = os.environ["LOCALDISK_BED_LOCAL"]
    CONFIG.write_text(f"{text}margins: {{thin_data: 100%}}\ndevices: [{device}]\n")
    first, *rest = images
    one_start = statistics.median(list(alone(first))[1:])  # the first one extracts, and fills the cache
    remove_all()  # the storm begins with an empty cache
    starts = [Start(new_id(), image, THIN) for image in rest[:-1]]
    plain = Start(new_id(), rest[-1], {})
    starts.insert(PLACES, plain)
    for each in starts:
        libvirt.define_placeholder(each.vm_id)
    quiet_disks()
    lvm_calls()
    before, peaks = shared_bytes(), list[int]()
    with memory_watched(peaks, every=1):
        took = Storm(starts).run()
    read = shared_bytes() - before
    calls, local = len(lvm_calls()), len(starts) - 1
    ideal = one_start * local / PLACES
    row(
        f"storm, {how}: until the last start / (a start x {local // PLACES})",
        took / ideal,
        f"{took:.0f} s, {one_start:.2f} s",
    )
    layers = sum(allocated(each.image.leaf) for each in starts if each.custom)
    needed = layers + allocated(template.leaf) * (1 if text == CACHED else local)
    detail = f"{read / MIB:.0f} MiB"
    row(f"storm, {how}: read from shared storage / what must be", read / needed, detail)
    row(f"storm, {how}: LVM commands a start", calls / local, f"{calls} in all")
    row(f"storm, {how}: peak memory of all processes", max(peaks) / MIB, "MiB, proportional")
    row(
        f"storm, {how}: a VM without the property waits / a start",
        plain.began / one_start,
        f"{plain.began:.1f} s",
    )
    clear(starts)


def alone(image: Image) -> Iterator[float]:
    """Seconds of starts that have the host to themselves."""
    for _ in range(4):
        start = Start(new_id(), image, THIN)
        libvirt.define_placeholder(start.vm_id)
        quiet_disks()
        yield Storm([start]).run()
        clear([start])


def clear(starts: Sequence[Start]) -> None:
    """The VMs end, and their disks."""
    known = libvirt.known()
    for start in starts:
        if start.vm_id in known:
            libvirt.undefine(start.vm_id)
    host.remove(*(host.logical_volumes().keys() & {start.image.leaf.id for start in starts}))


def remove_all() -> None:
    host.remove(*(host.logical_volumes().keys() - {host.THIN_POOL}))
