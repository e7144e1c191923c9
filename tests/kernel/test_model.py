"""The model test on a real kernel: a random walk (tests/model) over real LVM, libvirt, hooks and gc.

    LOCALDISK_MODEL_SEED=7          that walk; 7-9: these
    LOCALDISK_MODEL_STEPS=100       so many steps each

A VM that runs is a real domain, paused; what its guest writes is written here.  Calls are stopped before,
while or after one of their tools runs (tests/crash/halt.py), to be killed or to let others go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import pytest

from tests.bed import host, libvirt, vdsm
from tests.bed.player import Call as HookCall
from tests.bed.player import Result, start_point, start_program
from tests.bed.shell import attempt, run
from tests.bed.storage import COW, QEMU, RAW, FileStorage, Image, new_id, qemu_io
from tests.bed.vm import Disk, Vm, disk_json, domain_xml
from tests.crash import halt
from tests.crash.cases import ours
from tests.kernel.steps import LOCKS, configure, helpers, hold_open, kill_all, wait_for
from tests.model.predict import Call
from tests.model.rules import MIB, Rules
from tests.model.seen import Seen
from tests.model.state import Room, Source, State
from tests.model.walk import Plan, Walk
from tests.model.world import STARTS, STRANGERS, Ended, Look, Trouble

STEPS = int(os.environ.get("LOCALDISK_MODEL_STEPS", "100"))
FIRST, _, LAST = os.environ.get("LOCALDISK_MODEL_SEED", "1").partition("-")
DURATIONS = (0, 1800, 3600)  # seconds; with steps of half an hour nothing becomes due while a call runs
REST = 50  # looks, a tenth of a second apart: who sleeps in nearly all of them waits for the paused call
BOOT_ID = "/proc/sys/kernel/random/boot_id"
COLUMNS = "lv_name,lv_uuid,lv_size,lv_time,lv_tags,lv_device_open,lv_active,pool_lv"
FILLER = "filler"


@dataclass
class Running:
    """A call under way; it is waited for in the background."""

    state: State
    call: Call
    process: HookCall
    results: list[Result] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._waiter = threading.Thread(target=lambda: self.results.append(self.process.wait()), daemon=True)
        self._waiter.start()

    @property
    def is_over(self) -> bool:
        return not self._waiter.is_alive()

    def ends_within(self, seconds: float) -> bool:
        self._waiter.join(seconds)
        return self.is_over

    def rests(self) -> bool:
        """Whether it has come to a rest before its end: a busy machine is no reason for that."""
        pid = self.process.process.pid if self.process.process else 0
        looks: deque[bool] = deque(maxlen=REST)
        while not self.ends_within(0.1):
            looks.append(any(state in "RD" for state in states(pid)))
            if len(looks) == REST and sum(looks) <= REST // 10:
                return True
        return False

    def wait(self) -> Result:
        assert self.ends_within(300), f"{self.call} does not end"
        return self.results[0]

    def kill(self, how: str) -> str:
        process = self.process.process
        assert process
        if how == "term":
            for pid in (*helpers(), -process.pid):
                with contextlib.suppress(ProcessLookupError):  # it has noticed another's end already
                    os.kill(pid, signal.SIGTERM)
        else:
            kill_all(*{"hook": [process.pid], "helper": helpers()}.get(how, [*helpers(), -process.pid]))
        return how


class Contents:
    """What is on volumes: bytes, without the zeros behind them, by what they are called in the model."""

    def __init__(self) -> None:
        self._names: dict[str, tuple[str, ...]] = {}  # by digest
        self._bytes: dict[tuple[str, ...], bytes] = {}  # compressed

    def learn(self, path: Path, *name: str) -> None:
        self.put(path.read_bytes(), *name)

    def put(self, data: bytes, *name: str) -> None:
        data = data.rstrip(b"\0")
        self._names[hashlib.sha256(data).hexdigest()] = name
        self._bytes[name] = zlib.compress(data, 1)

    def get(self, *name: str) -> bytes:
        return zlib.decompress(self._bytes[name])

    def name(self, path: Path) -> tuple[str, ...]:
        digest = hashlib.sha256(path.read_bytes().rstrip(b"\0")).hexdigest()
        return self._names.get(digest, (f"bytes {digest[:16]}",))


class RealWorld:
    """The bed's host: a volume group with a thin pool, an empty storage domain, libvirt."""

    troubles: tuple[str, ...] = ("helper", "hook", "all", "term", "pause")

    def __init__(self, storage: FileStorage) -> None:
        self.storage = storage
        self.cannot = frozenset({"twins", "silence", "cache", "backup", "late_power_off", "discard"})
        if host.throwaway():
            # Time goes by as the date is set: no mark may be measured by the clock that counts from the boot.
            run("mount", "--bind", os.devnull, BOOT_ID)
        else:
            self.cannot |= {"clock"}
        self.images: dict[str, Image] = {}
        self.snapshots: dict[str, int] = {}  # by image: volumes that were made since
        self.contents = Contents()
        self.read: dict[
            tuple[str, object], tuple[str, ...]
        ] = {}  # what was found on volumes, as long as it holds
        self.looked: dict[str, Seen] = {}  # by UUID
        self.writes: dict[str, int] = {}  # by UUID: how often its bytes may have changed with our consent
        self.holders: dict[str, subprocess.Popen[bytes]] = {}
        self.layers: dict[
            tuple[str, str], Path
        ] = {}  # by VM and image: what it writes to since a live snapshot
        self.ran: dict[str, str] = {}  # by VM: its XML when it ended
        self.begun: list[Running] = []
        self.paused: Running | None = None
        self.armed = ExitStack()
        self.versions = 0
        for name, tags in STRANGERS.items():
            self.add(name, tags, 4 * MIB)

    def close(self) -> None:
        self.armed.close()
        for running in self.begun:
            running.ends_within(60)
        if host.throwaway():
            run("umount", BOOT_ID)
        for holder in self.holders.values():
            holder.kill()
            holder.wait()
        for vm_id in libvirt.active():
            libvirt.destroy(vm_id)
        for vm_id in libvirt.known():
            libvirt.undefine(vm_id)
        host.remove(*(name for name in host.logical_volumes() if name != host.THIN_POOL))
        for path in LOCKS.glob("*.*"):
            path.unlink()

    # -- what a walk asks for

    def moments(self, call: Call) -> int:
        return 15 if call.what == "gc" else 30

    def look(self) -> Look:
        rows = host.lvm_report("lvs", "--units", "b", "--nosuffix", "-o", COLUMNS, host.VOLUME_GROUP)
        volumes = tuple(self._seen(row) for row in rows if row["lv_name"] not in (host.THIN_POOL, FILLER))
        self.looked = {seen.uuid: seen for seen in volumes}
        marks = {path.name: int(path.stat().st_mtime) for path in LOCKS.glob("*.destroy*")}
        locks = frozenset(path.name for path in LOCKS.glob("*.*")) - marks.keys()
        return Look(int(time.time()), volumes, locks, marks)

    def _seen(self, row: Mapping[str, str]) -> Seen:
        tags = frozenset(filter(None, row["lv_tags"].split(",")))
        is_active = row["lv_active"] == "active"
        holds = self._holds(row["lv_name"], row["lv_uuid"], tags) if is_active else None
        is_open = is_active and row["lv_device_open"] == "open"
        is_thin = row["pool_lv"] != ""
        made = datetime.strptime(row["lv_time"], "%Y-%m-%d %H:%M:%S %z")
        seen = Seen(row["lv_name"], row["lv_uuid"], int(row["lv_size"]), tags, is_open, is_thin, holds)
        return replace(seen, made=int(made.timestamp()), is_active=is_active)

    def _holds(self, name: str, uuid: str, tags: frozenset[str]) -> tuple[str, ...] | None:
        """Read once for each state that the volume is in."""
        if {"UPDATING", "DELETING"} & tags:
            return None
        key = (uuid, (tags, self.writes.get(uuid)))
        if key not in self.read:
            self.read[key] = self.contents.name(path_of(name))
        return self.read[key]

    def room(self) -> Room:
        (row,) = host.lvm_report("vgs", "--units", "b", "--nosuffix", "-o", "vg_free", host.VOLUME_GROUP)
        return Room(int(row["vg_free"]), 2 << 30)

    def new_image(self, rng: random.Random, base: Source | None = None) -> tuple[str, Source]:
        assert base is None, "templates are for the walk in memory"
        size, seed = rng.choice((8 * MIB, 10 * MIB + 1536)), rng.getrandbits(30)
        image = self.storage.template(size, rng.choice((RAW, COW)), seed)
        if rng.random() < 0.6:
            image = self.storage.clone(image, seed=seed)
        self.images[image.id] = image
        return image.id, self._new(image)

    def _new(self, image: Image, content: str = "") -> Source:
        """The image's source in a new version; new `content` is read."""
        self.versions += 1
        if not content:
            content, raw = f"c{self.versions}", host.SCRATCH / "content"
            run(
                "qemu-img",
                "convert",
                "-f",
                QEMU[image.leaf.format],
                "-O",
                "raw",
                str(image.leaf.path),
                str(raw),
            )
            self.contents.learn(raw, content)
        return Source(image.leaf.id, f"v{self.versions}", content, image.leaf.size, -1)

    def change(
        self, image_id: str, source: Source, how: str, rng: random.Random, base: Source | None = None
    ) -> Source | None:
        image, content = self.images[image_id], source.content
        *rest, leaf = image.volumes
        if how == "content":
            at = rng.randrange(leaf.size // 4096) * 4096
            qemu_io(leaf, [f"write -P {rng.randrange(1, 256)} {at} 4096"])
            content = ""
        elif how == "snapshot":
            image = replace(
                image, volumes=(*rest, leaf, self.storage.new_volume(image_id, COW, leaf.size, leaf))
            )
            self.snapshots[image_id] = self.snapshots.get(image_id, 0) + 1
            self.images[image_id] = image
            return replace(source, volume=image.leaf.id)  # an empty layer changes nothing
        elif how == "grow":
            size = leaf.size + rng.choice((512, MIB))
            run("qemu-img", "resize", "-q", "-f", QEMU[leaf.format], str(leaf.path), str(size))
            image = replace(image, volumes=(*rest, replace(leaf, size=size)))
        elif self.snapshots.get(image_id):
            self.snapshots[image_id] -= 1
            run("qemu-img", "commit", "-q", "-f", QEMU[leaf.format], str(leaf.path))
            image = replace(image, volumes=(*rest[:-1], replace(rest[-1], size=leaf.size)))
            leaf.path.unlink()
            os.utime(image.leaf.path)  # also where nothing was written to it
        else:
            return None
        self.images[image_id] = image
        return self._new(image, content)

    def new_template(self, rng: random.Random) -> Source:
        raise NotImplementedError

    def change_template(self, template: Source, rng: random.Random) -> Source:
        raise NotImplementedError

    def tamper(self, uuid: str, how: str, token: str) -> None:
        raise NotImplementedError

    def configure(self, rules: Rules) -> None:
        configure(rules.yaml())

    def set_clock(self, now: int) -> None:
        run("date", "-s", f"@{now}")

    def fill(self, size: int) -> None:
        attempt("lvremove", "-q", "-y", f"{host.VOLUME_GROUP}/{FILLER}")
        if size:
            run("lvcreate", "-y", "-an", "-Zn", "-Wn", "-L", f"{size}b", "-n", FILLER, host.VOLUME_GROUP)

    def add(self, name: str, tags: frozenset[str], size: int) -> None:
        options = [word for tag in sorted(tags) for word in ("--addtag", tag)]
        run("lvcreate", "-y", "-Wn", "-L", f"{size}b", "-n", name, *options, host.VOLUME_GROUP)
        with open(path_of(name), "r+b") as device:
            device.write(name.encode())
        self.contents.learn(path_of(name), f"of {name}")
        for vm_id in (tag[3:] for tag in tags if tag.startswith("VM_")):  # as gc would
            (LOCKS / "kept").mkdir(parents=True, exist_ok=True)
            (LOCKS / "kept" / vm_id).touch()

    def snapshot(self, name: str, origin: str) -> None:
        raise NotImplementedError

    def remove(self, name: str) -> None:
        host.remove(name)

    def write(self, name: str, token: str) -> None:
        (seen,) = (seen for seen in self.looked.values() if seen.name == name)
        assert seen.holds
        data = bytearray(self.contents.get(*seen.holds).ljust(2 * MIB, b"\0"))
        text, at = token.encode().ljust(4096, b"."), random.Random(token).randrange(MIB // 4096) * 4096
        data[at : at + len(text)] = text
        with open(path_of(name), "r+b") as device:
            device.seek(at)
            device.write(text)
            device.flush()
            os.fsync(device.fileno())
        self.contents.put(bytes(data), *seen.holds, token)
        self.writes[seen.uuid] = self.writes.get(seen.uuid, 0) + 1

    def hold(self, uuid: str) -> bool:
        path = path_of(self.looked[uuid].name)
        if path.exists():
            self.holders[uuid] = hold_open(path)
        return path.exists()

    def let_go(self, uuid: str) -> None:
        holder = self.holders.pop(uuid)
        holder.kill()
        holder.wait()

    def silence(self, is_silent: bool) -> None:
        raise NotImplementedError

    def live_snapshot(self, state: State, vm_id: str, image_id: str) -> None:
        """libvirt has the VM write to a new file."""
        (name,) = (disk.name for disk in self._disks(state, vm_id) if disk.image.id == image_id)
        below = self.layers.get((vm_id, image_id), path_of(state.vms[vm_id].paths[image_id]))
        layer = host.SCRATCH / f"layer-{new_id()}"
        below_format = "raw" if below.is_block_device() else "qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", below_format, "-b", str(below), str(layer))
        layer.chmod(0o666)
        where = f"{name},file={layer},stype=file,driver=qcow2"
        virsh(
            "snapshot-create-as",
            vm_id,
            "--disk-only",
            "--no-metadata",
            "--reuse-external",
            "--diskspec",
            where,
        )
        self.layers[vm_id, image_id] = layer

    def power_cut(self, state: State) -> None:
        """All processes are killed, the volumes are activated as at a boot, /run is empty."""
        for running in self.begun:
            running.kill("all")
            running.wait()
        self.begun.clear()
        for uuid in [*self.holders]:
            self.let_go(uuid)
        for vm_id in libvirt.active():
            libvirt.destroy(vm_id)
            self.ran[vm_id] = virsh("dumpxml", vm_id)
        wait_for(lambda: not [*ours()], "all processes to end")
        run("vgchange", "-q", "-an", host.VOLUME_GROUP)
        host.volume_group()
        shutil.rmtree(LOCKS, ignore_errors=True)
        self._changed(seen.name for seen in self.looked.values())

    # -- calls

    def perform(self, state: State, call: Call, trouble: Trouble | None) -> Ended:
        began = time.monotonic()
        ended = self._perform(state, call, trouble)
        print(f"{time.monotonic() - began:6.1f} s  {call}: {ended}", flush=True)  # for `pytest -s`
        return ended

    def _perform(self, state: State, call: Call, trouble: Trouble | None) -> Ended:
        if call.what in ("define", "undefine", "create", "destroy"):
            self._libvirt(state, call.what, call.vm_id)
            return Ended("done")
        if trouble:
            self.armed.enter_context(halt.armed(point(trouble)))
        running = Running(state, call, self._begin(state, call))
        self.begun.append(running)
        if trouble:
            wait_for(lambda: halt.is_there() or running.is_over, "the moment", 300)
            if halt.is_there() and trouble.kind == "pause":
                self.paused = running
                return Ended("paused", "pause")
            befell = running.kill(trouble.kind) if halt.is_there() else ""
            self.armed.close()
            return replace(self._ended(running), trouble=befell)
        other = self.resume() if self.paused and running.rests() else None
        return replace(self._ended(running), other=other)

    def resume(self) -> Ended:
        running, self.paused = self.paused, None
        assert running
        self.armed.close()
        return self._ended(running)

    def _ended(self, running: Running) -> Ended:
        result = running.wait()
        if self.paused is None and all(other.is_over for other in self.begun):
            self.begun.clear()
            wait_for(lambda: not [*ours()], "all processes to end")
        is_gc = running.call.what.startswith("gc")
        outcome = "killed" if result.rc < 0 else "refused" if result.rc > is_gc else "done"
        said = "".join(result.stderr.strip().splitlines()[-1:])
        if is_gc and result.rc:
            said = "; ".join([*(script.stdout.strip() for script in result.scripts), said])
        paths = _paths(running, result) if outcome == "done" else None
        return Ended(outcome, "", paths, is_gc and result.rc == 1, said)

    def _libvirt(self, state: State, what: str, vm_id: str) -> None:
        vm = state.vms[vm_id]
        if what == "define":
            libvirt.define_placeholder(vm_id)
        elif what == "undefine":
            libvirt.undefine(vm_id)
        elif what == "destroy":
            self.ran[vm_id] = virsh("dumpxml", vm_id)
            libvirt.destroy(vm_id)
            self._changed(vm.paths.values())
        else:
            self.layers = {key: layer for key, layer in self.layers.items() if key[0] != vm_id}
            libvirt.define(self._domain(state, vm_id))
            virsh("start", "--paused", vm_id)
            self._changed(vm.paths.values())

    def _domain(self, state: State, vm_id: str) -> str:
        """The VM's XML; what is on shared storage is left out, as it is changed while the VM runs."""
        vm = state.vms[vm_id]
        disks = tuple(disk for disk in self._disks(state, vm_id) if disk.image.id in vm.paths)
        return domain_xml(Vm(vm_id, disks))

    def _ran(self, state: State, vm_id: str) -> str:
        """The XML of a VM that is released, as vdsm has it."""
        vm = state.vms[vm_id]
        if not vm.drifted:
            return self._domain(state, vm_id)
        return virsh("dumpxml", vm_id) if vm.is_active else self.ran[vm_id]

    def _changed(self, names: Iterable[str]) -> None:
        """Look at these volumes' bytes again."""
        for seen in self.looked.values():
            if seen.name in names:
                self.writes[seen.uuid] = self.writes.get(seen.uuid, 0) + 1

    def _disks(self, state: State, vm_id: str) -> Iterator[Disk]:
        """The VM's disks as its domain has them."""
        vm = state.vms[vm_id]
        for letter, image_id in zip("abcdef", vm.images):
            disk = Disk(f"vd{letter}", self.images[image_id])
            yield vdsm.local(disk, str(path_of(vm.paths[image_id]))) if image_id in vm.paths else disk

    def _begin(self, state: State, call: Call) -> HookCall:
        if call.what.startswith("gc") and call.arguments != (False,):
            return start_program(*call.what.split())
        if call.what == "gc":
            return start_point("before_vdsm_start")
        if call.what == "remove":
            return start_program("remove", call.vm_id)
        vm = state.vms[call.vm_id]
        if call.what == "after_disk_prepare":
            disk = Disk("vda", self.images[call.arguments[1]])
            data = vdsm.recovered_disk(disk) if vm.has_started else disk_json(disk)
        elif call.what == "after_vm_destroy":
            data = self._ran(state, call.vm_id)
        else:
            data = domain_xml(Vm(call.vm_id, tuple(self._disks(state, call.vm_id))))
        return start_point(call.what, call.vm_id, data, {"localdisk": vm.using})


def _paths(running: Running, result: Result) -> Mapping[str, str] | None:
    """The disks that the VM is to run from, by what vdsm reads back."""
    state, call = running.state, running.call
    if call.what not in STARTS:
        return None
    vm = state.vms[call.vm_id]
    images = call.arguments[1:] or vm.images
    volumes = {image_id: state.sources[image_id].volume for image_id in images}
    local = {i: volume for i, volume in volumes.items() if f'"{path_of(volume)}"' in result.data}
    return {**vm.paths, **local}


def virsh(*words: str) -> str:
    return libvirt.virsh(*words)


def point(trouble: Trouble) -> halt.Point:
    """Before, while or after a tool runs; nothing is paused while one runs, which others would wait for."""
    moments = ("before", "after") if trouble.kind == "pause" else halt.MOMENTS
    number, moment = divmod(trouble.at, len(moments))
    return halt.Point(number + 1, moments[moment])


def states(pid: int) -> Iterator[str]:
    """The state of a process and of all that it started: R runs or would like to, D waits for a device."""
    with contextlib.suppress(OSError):
        yield Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from states(int(child))


def path_of(name: str) -> Path:
    return Path("/dev") / host.VOLUME_GROUP / name


@pytest.fixture
def world(libvirt: None, thin_pool: str, file_storage: FileStorage) -> Iterator[RealWorld]:
    began, clock = time.monotonic(), time.time()
    made = RealWorld(file_storage)
    with halt.installed():
        yield made
        made.close()
    configure()
    if host.throwaway():
        made.set_clock(int(clock + time.monotonic() - began))


@pytest.mark.parametrize("seed", range(int(FIRST), int(LAST or FIRST) + 1))
def test_walk(world: RealWorld, seed: int) -> None:
    words = f"LOCALDISK_MODEL_SEED={seed} LOCALDISK_MODEL_STEPS={STEPS}"
    test = ".venv/bin/python -m pytest tests/kernel/test_model.py"
    repeat = f".venv/bin/python -m tests.bed.boot -- env {words} {test}"
    Walk(world, Plan(seed, STEPS, DURATIONS, is_exact=False), repeat).run()
