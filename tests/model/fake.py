"""A host in memory: the real hooks, helper and gc run on it, with fakes at the door.

Hooks and gc run in threads, never two at once, so that they can be paused, or killed: what is dead runs no
command any more, and its locks end with it while their files stay.  All that happens follows from the seed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from localdisk import cli, config, libvirt, lock, run
from localdisk.errors import CommandFailed, Error
from localdisk.helper.process import Ended as HelperEnded
from localdisk.helper.session import Session
from localdisk.hook import copy, points, prefetch, sources, template_source
from localdisk.hook.copy import OnProgress
from localdisk.protocol import Device, Target
from localdisk.status import libvirt_vms
from localdisk.vdsm import hook_call
from localdisk.volumes import gc, removal, remove
from tests.bed import vdsm as bed_vdsm
from tests.bed.storage import COW
from tests.bed.storage import Image as BedImage
from tests.bed.storage import Volume as BedVolume
from tests.bed.vm import Disk as BedDisk
from tests.bed.vm import Vm as BedVm
from tests.bed.vm import disk_json, domain_xml
from tests.fakes import REAL_CLOSE, FakeHost, Volume
from tests.model.predict import Call
from tests.model.rules import MIB, Rules
from tests.model.seen import Seen
from tests.model.state import Piece, Room, Source, State
from tests.model.world import FORBIDDEN, LEFT, STRANGERS, Ended, Look, Trouble

VG = "ovirt-local"
NOW = 1_760_000_000
POOL = 512 * MIB
# What vdsm asks when it recovers a VM, on storage whose kind says nothing.
RECOVERED = {"format": "raw", "diskType": "block", "shared": "exclusive", "volumeInfo": {"type": "block"}}
WAITS = 1000  # times that a call may wait while nobody else gets any further


class Dead(BaseException):
    """This process, or half of it, has been killed: nothing of it runs any more."""


class Process:
    """A hook with its helper, or gc: it runs in a thread of its own, and never while another one does."""

    def __init__(self, state: State, call: Call, trouble: Trouble | None) -> None:
        self.state, self.call, self.trouble = state, call, trouble
        self.befell, self.moments = "", 0
        self.is_hook_dead = self.is_helper_dead = False
        self.locks: dict[int, TrackedLock] = {}  # by descriptor
        self.opened: dict[int, str] = {}  # volumes that the helper has open: UUIDs by descriptor
        self.dead_fds: list[int] = []
        self.answer = ""
        self.says = ""  # why it has stopped running: waiting, paused, copying, ended
        self.error: BaseException | None = None
        self._turn, self._driver = threading.Semaphore(0), threading.Semaphore(0)

    def start(self, work: Callable[[], None]) -> None:
        threading.Thread(target=self._run, args=(work,), daemon=True).start()

    def go(self) -> str:
        """Let it run until it says why it stops."""
        self._turn.release()
        self._driver.acquire()
        return self.says

    def stop(self, why: str) -> None:
        """Called by the process: let the others go on."""
        self.says = why
        self._driver.release()
        self._turn.acquire()

    def is_due(self, is_change: bool) -> bool:
        """Count this moment; whether trouble comes now.  A copy is left alone elsewhere."""
        if (
            not self.trouble
            or self.trouble.kind in ("copying", "filling")
            or (self.trouble.of_changes and not is_change)
        ):
            return False
        self.moments += 1
        return self.moments == self.trouble.at

    def postpone(self) -> None:
        """The trouble is none at this moment: it may come at the next."""
        if self.trouble:
            self.trouble = replace(self.trouble, at=self.trouble.at + 1)

    def kill_helper(self, host: Host) -> None:
        """Its locks end with it; their files stay."""
        self.is_helper_dead = True
        for fd in self.locks:
            os.close(fd)
        self.locks.clear()
        for fd, lv_uuid in self.opened.items():
            host.close(lv_uuid, f"{id(self)} {fd}")
        self.dead_fds += self.opened
        self.opened.clear()

    def _run(self, work: Callable[[], None]) -> None:
        self._turn.acquire()
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (it is raised where the process ends)
            self.error = error
        for fd in self.dead_fds:
            REAL_CLOSE(fd)
        self.says = "ended"
        self._driver.release()


class TrackedLock(lock.Lock):
    """A lock that is let go of as its process ends, without the process doing anything for it."""

    process: Process | None = None  # that runs now

    def __init__(self, path: str, fd: int) -> None:
        super().__init__(path, fd)
        self.fd, self.owner = fd, TrackedLock.process
        if self.owner:
            self.owner.locks[fd] = self

    def release(self) -> None:
        if self.owner and self.owner.locks.pop(self.fd, None) is not self:
            return  # its process is dead
        super().release()


class Host(FakeHost):
    """With the bytes of its volumes, and a moment for trouble before and after every command."""

    def __init__(self, world: FakeWorld) -> None:
        super().__init__()
        self.world = world
        self.holds: dict[str, tuple[str, ...]] = {}  # what is on it, by lv_uuid
        self.wiped: dict[str, str] = {}  # how it was erased, by lv_uuid
        self.written: dict[str, int] = {}  # bytes of data of its own, by lv_uuid
        self.shared: dict[str, Piece] = {}  # of snapshots, by lv_uuid
        self.templates: set[str] = set()  # lv_uuids of what was made as a template LV
        self.gone: dict[str, str] = {}  # how it was erased, by lv_uuid
        self.openers: dict[str, set[str]] = {}  # who has it open, by lv_uuid
        self.volumes["pool0"].lv_size = POOL
        self.of_running: dict[str, Seen] = {}  # volumes of running VMs, as they were when the VM started

    def run(self, argv: Sequence[str], **options: Any) -> str:
        words = list(argv)
        is_change = words[0] not in ("lvm", "virsh")
        self.world.moment(is_change)
        names = [word for word in words[1:] if word.startswith(f"{VG}/")]
        self._check_templates(words, names)
        if len(names) > 1 and self.world.dies_within(is_change):
            super().run([word for word in words if word not in names[1:]])
            self.world.die()
        answer = super().run(words, **options)
        self._check_running_vms()
        self.world.moment(is_change)
        return answer

    def report(self) -> str:
        thin = [volume.lv_uuid for volume in self.volumes.values() if volume.pool_lv]
        left = {self.shared[lv_uuid] for lv_uuid in thin if lv_uuid in self.shared}
        total = sum(map(self.data, thin)) + sum(size for piece, size in left if piece not in thin)
        self.volumes["pool0"].data_percent = f"{100 * total / POOL:.2f}"
        for volume in self.volumes.values():
            if volume.pool_lv:
                mapped = self.data(volume.lv_uuid) + self.shared.get(volume.lv_uuid, ("", 0))[1]
                volume.data_percent = f"{100 * mapped / volume.lv_size:.2f}"
        return super().report()

    def digest(self, lv_name: str, size: int) -> str:
        """A sample of it."""
        return sha256(f"{self.holds[self.volumes[lv_name].lv_uuid]} {size}".encode()).hexdigest()[:32]

    def _open(self, path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        fd = super()._open(path, flags, mode, **more)
        if fd in self.opened:
            process, lv_uuid = self.world.running, self.opened.pop(fd).lv_uuid
            process.opened[fd] = lv_uuid
            self.open(str(path).rpartition("/")[2], f"{id(process)} {fd}")
        return fd

    def _close(self, fd: int) -> None:
        process = self.world.current
        if process and fd in process.dead_fds:
            return  # its process is dead; it is closed, and yet the number is not used again so soon
        super()._close(fd)
        if process and fd in process.opened:
            self.close(process.opened.pop(fd), f"{id(process)} {fd}")

    def data(self, lv_uuid: str) -> int:
        return self.written.get(lv_uuid, 0)

    def open(self, name: str, who: str) -> None:
        volume = self.volumes[name]
        assert volume.lv_active, f"{who} cannot open {name}, it is not active"
        self.openers.setdefault(volume.lv_uuid, set()).add(who)
        volume.lv_device_open = "open"

    def close(self, lv_uuid: str, who: str) -> None:
        self.openers.get(lv_uuid, set()).discard(who)
        for volume in self.volumes.values():
            if volume.lv_uuid == lv_uuid and not self.openers.get(lv_uuid):
                volume.lv_device_open = ""

    def seen(self, name: str) -> Seen:
        volume = self.volumes[name]
        written = self.data(volume.lv_uuid) if volume.pool_lv else None
        is_open, holds = volume.lv_device_open != "", self.holds.get(volume.lv_uuid, ())
        return Seen(
            name=name,
            uuid=volume.lv_uuid,
            size=volume.lv_size,
            tags=frozenset(volume.lv_tags),
            is_open=is_open,
            is_thin=bool(volume.pool_lv),
            holds=holds,
            written=written,
            shared=self.shared.get(volume.lv_uuid, ("", 0)),
            is_template=volume.lv_uuid in self.templates,
            is_active=bool(volume.lv_active),
            is_read_only=volume.lv_permissions == "read-only",
            made=int(volume.lv_time),
        )

    def _check_running_vms(self) -> None:
        """No command of any process changes a running VM's disk."""
        there = {volume.lv_uuid: name for name, volume in self.volumes.items()}
        for lv_uuid, before in self.of_running.items():
            assert lv_uuid in there, f"a running VM's disk {before.name} is removed by {self.commands[-1]}"
            now = self.seen(there[lv_uuid])
            idle = {tag for tag in before.tags if tag.startswith(("STOPPED_", "UNNEEDED_"))}
            is_same = (
                replace(now, tags=before.tags, is_active=True, holds=before.holds, written=before.written)
                == before
            )
            is_same = is_same and before.tags - idle <= now.tags <= before.tags
            assert is_same, f"a running VM's disk was\n{before}, after\n{self.commands[-1]}\nit is\n{now}"

    def _lvcreate(self, argv: list[str]) -> str:
        before = {*self.volumes}
        answer = super()._lvcreate(argv)
        for name in {*self.volumes} - before:
            volume = self.volumes[name]
            self.holds[volume.lv_uuid] = ("what was there before",)
            volume.lv_time = str(self.world.clock)
            if any(tag.startswith("TEMPLATE_") for tag in volume.lv_tags):
                self.templates.add(volume.lv_uuid)
            if "--snapshot" in argv:
                origin = self.volumes[argv[-1].rpartition("/")[2]].lv_uuid
                self.holds[volume.lv_uuid] = self.holds[origin]
                self.shared[volume.lv_uuid] = (origin, self.data(origin))
        return answer

    def _check_templates(self, words: list[str], names: list[str]) -> None:
        """A process that changes a template LV, reads it or starts from it holds its lock."""
        if words[0] in ("lvm", "virsh"):
            return
        paths = {held.path for held in self.world.running.locks.values()}
        named = words[3:4] if words[0] == "lvrename" else [name.rpartition("/")[2] for name in names]
        for volume in filter(None, map(self.volumes.get, named)):
            if volume.lv_uuid in self.templates:
                assert lock.disk_lock(volume.lv_name) in paths, f"without its lock: {' '.join(words)}"

    def _lvremove(self, argv: list[str]) -> str:
        before = {volume.lv_uuid: volume for volume in self.volumes.values()}
        answer = super()._lvremove(argv)
        for lv_uuid in before.keys() - {volume.lv_uuid for volume in self.volumes.values()}:
            self.gone[lv_uuid] = self.wiped.get(lv_uuid, "none")
        return answer

    def _blkdiscard(self, argv: list[str]) -> str:
        answer = super()._blkdiscard(argv)
        self.wipe(argv[-1], "zero" if "--zeroout" in argv else "discard")
        return answer

    def wipe(self, path: str, how: str) -> None:
        volume = self.volumes[path.rpartition("/")[2]]
        assert volume.lv_active
        assert not volume.lv_device_open, "erased under whoever has it open"
        self.holds[volume.lv_uuid], self.wiped[volume.lv_uuid] = (how,), how


@dataclass(frozen=True)
class FakeSource:
    """What `sources.opened` gives, of a source that exists in the model only."""

    source: Source
    template: Source | None  # that it stands on
    versions: Mapping[str, str]  # of templates, at any time
    is_template: bool = False
    grows = True

    @property
    def virtual_size(self) -> int:
        return self.source.size

    @property
    def fingerprint(self) -> str:
        return sha256(self.source.version.encode()).hexdigest()[:32]

    def writes(self, chunk: int) -> int:
        if not chunk:
            return self.source.size
        return self.source.data + (self.template.data if self.template else 0)

    def writes_above(self, _chunk: int) -> int:
        return self.source.data

    @property
    def base_alone(self) -> FakeSource:
        return FakeSource(self.template, None, self.versions, True) if self.template else self

    # and what its base gives, a `Layer`

    is_block = False

    @property
    def base(self) -> FakeSource:
        return self.base_alone

    @property
    def path(self) -> str:
        return f"/rhev/{self.source.volume}"

    def is_unchanged(self) -> bool:
        return self.versions[self.source.volume] == self.source.version


class Conversation:
    """A helper in this process, in the place of the one behind sudo."""

    stdin = stdout = stderr = None
    returncode = 1

    def __init__(self, world: FakeWorld) -> None:
        self._world, self._process = world, world.running
        self._session: Session | None = Session(world.config, world.pause)

    def ask(self, line: bytes) -> bytes:
        """As `run.ask`; the answer is lost on a hook that is dead by then."""
        self._world.moment(is_hook=True)
        answer = b""
        if self._session and not self._process.is_helper_dead:
            try:
                answer = json.dumps(self._session.serve(line)).encode()
            except Dead:
                pass
            except HelperEnded:
                self.close()
        self._world.moment(is_hook=True)
        return answer

    def close(self) -> None:
        """Its input ends: it removes what is unfinished."""
        session, self._session = self._session, None
        if session and not self._process.is_helper_dead:
            session.close()

    def wait(self) -> int:
        return self.returncode


class FakeWorld:
    """The host that walks are made on.  Everything that it does follows from the walk's seed."""

    troubles: tuple[str, ...] = ("helper", "hook", "all", "term", "fail", "pause", "copying", "filling")
    cannot: frozenset[str] = frozenset()

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path, seed: int) -> None:
        self.host = Host(self)
        self.host.install(monkeypatch, directory)
        self.directory, self.rng, self.clock = directory, random.Random(f"world {seed}"), NOW
        self.other: Process | None = None  # that is paused or copying
        self.current: Process | None = None
        self.sources: Mapping[str, Source] = {}  # by image id
        self.templates: Mapping[str, Source] = {}  # by volume
        self.template_versions: dict[str, str] = {}  # by volume
        self.history: dict[str, list[str]] = {}  # by image, its earlier leaves
        self.versions = 0
        self.config = config.parse(b"", "F")
        self.filled = 0
        self.host.vg["vg_free"] = str(600 * MIB)
        for module, attribute, value in (
            (libvirt, "RECENT", 5.0),
            (time, "time", lambda: float(self.clock)),
            (uuid, "uuid4", lambda: uuid.UUID(int=self.rng.getrandbits(128), version=4)),
            (config, "load", lambda _path=None: self.config),
            (hook_call, "is_running", lambda: False),
            (sources, "opened", self._opened),
            (sources, "opened_alone", self._opened_alone),
            (template_source, "read_metadata", lambda _path: {"FORMAT": "RAW", "VOLTYPE": "SHARED"}),
            (template_source, "why_no_template", lambda layer: "" if layer.is_template else "no_template"),
            (copy, "copy", self._copy),
            (copy, "copy_on", self._copy_on),
            (copy, "apply", self._apply),
            (run, "start_talking", lambda _argv: Conversation(self)),
            (run, "ask", lambda helper, line: helper.ask(line)),
            (run, "close_input", lambda helper: helper.close()),
            (run, "read_errors", lambda _helper: ""),
            (run, "end", lambda _helper: None),
            (lock, "Lock", TrackedLock),
            (removal, "_zero_thin_data", lambda path, _pace: self._zero(path)),
            (gc, "time", SimpleNamespace(sleep=self._sleep)),
        ):
            monkeypatch.setattr(module, attribute, value)
        for name, tags in STRANGERS.items():
            self.host.add(name, tags, 4 * MIB, lv_active="")

    # -- what a walk asks for

    def moments(self, call: Call) -> int:
        return 14 if call.what == "gc" else 30

    def look(self) -> Look:
        volumes = tuple(self.host.seen(name) for name in self.host.volumes if name != "pool0")
        locks = frozenset(lock.names())
        marks = Path(lock.RUN).glob("*.destroy*")
        return Look(
            self.clock,
            volumes,
            locks,
            {path.name: int(path.stat().st_mtime) for path in marks},
            self.host.gone,
        )

    def room(self) -> Room:
        return Room(int(self.host.vg["vg_free"]), POOL)

    def new_image(self, rng: random.Random, base: Source | None = None) -> tuple[str, Source]:
        image_id = self._id(rng)
        size = rng.choice((8 * MIB, 10 * MIB + 1536, 24 * MIB, 64 * MIB))
        if base is None:
            return image_id, self._new(self._id(rng), size, rng)
        return image_id, self._new(self._id(rng), base.size + rng.choice((0, 0, 4 * MIB)), rng, base=base)

    def _new(
        self, volume: str, size: int, rng: random.Random, content: str = "", base: Source | None = None
    ) -> Source:
        self.versions += 1
        version, content = f"v{self.versions}", content or f"c{self.versions}"
        if base is None:
            return Source(volume, version, content, size, rng.randint(0, size // MIB) * MIB)
        data = rng.randint(0, (size - base.data) // MIB) * MIB
        return Source(volume, version, f"{content}/{base.content}", size, data, base.volume)

    def change(
        self, image_id: str, source: Source, how: str, rng: random.Random, base: Source | None = None
    ) -> Source | None:
        history, content = self.history.setdefault(image_id, []), source.content.partition("/")[0]
        if how == "content":
            return self._new(source.volume, source.size, rng, base=base)
        if how == "snapshot":  # of a VM that is down: an empty layer, or somebody wrote there since
            history.append(source.volume)
            if rng.random() < 0.5:
                return replace(source, volume=self._id(rng))
            return self._new(self._id(rng), source.size, rng, "" if rng.random() < 0.5 else content, base)
        if how == "merge":
            return self._new(history.pop(), source.size, rng, content, base) if history else None
        if how == "template":
            return self._new(source.volume, source.size, rng, content, base)
        grown = self._new(source.volume, source.size + rng.choice((512, 4 * MIB)), rng, content, base)
        return replace(grown, version=source.version) if rng.random() < 0.5 else grown

    def new_template(self, rng: random.Random) -> Source:
        return self._template(self._id(rng), rng.choice((8, 10, 24, 24, 40)) * MIB, rng)

    def change_template(self, template: Source, rng: random.Random) -> Source:
        content = template.content if rng.random() < 0.3 else ""
        return self._template(template.volume, template.size, rng, content)

    def _template(self, volume: str, size: int, rng: random.Random, content: str = "") -> Source:
        made = self._new(volume, size, rng, content)
        self.template_versions[volume] = made.version
        return replace(made, data=rng.randint(1, size // MIB // 2) * MIB)

    def _id(self, rng: random.Random) -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def configure(self, rules: Rules) -> None:
        self.config = config.parse(rules.yaml().encode(), "F")

    def set_clock(self, now: int) -> None:
        self.clock = now

    def fill(self, size: int) -> None:
        self._take(size - self.filled)
        self.filled = size

    def _take(self, size: int) -> None:
        """Of the room for preallocated volumes."""
        self.host.vg["vg_free"] = str(int(self.host.vg["vg_free"]) - size)

    def add(self, name: str, tags: frozenset[str], size: int) -> None:
        volume = self.host.add(name, tags, size)
        self.host.holds[volume.lv_uuid] = (f"of {name[:8]}",)
        volume.lv_time = str(self.clock)
        self._take(size)

    def snapshot(self, name: str, origin: str) -> None:
        self.host.add(name, (), 4 * MIB, origin=origin)
        self._take(4 * MIB)

    def remove(self, name: str) -> None:
        self._take(-self.host.volumes.pop(name).lv_size)

    def write(self, name: str, token: str) -> None:
        lv_uuid = self.host.volumes[name].lv_uuid
        self.host.holds[lv_uuid] = (*self.host.holds[lv_uuid], token)
        self.host.wiped.pop(lv_uuid, None)

    def hold(self, lv_uuid: str) -> bool:
        (volume,) = (volume for volume in self.host.volumes.values() if volume.lv_uuid == lv_uuid)
        if lv_uuid in self.host.templates:  # to read it, one must activate it first
            volume.lv_active = "active"
        if volume.lv_active:
            self.host.open(volume.lv_name, "somebody")
        return bool(volume.lv_active)

    def let_go(self, lv_uuid: str) -> None:
        self.host.close(lv_uuid, "somebody")

    def tamper(self, lv_uuid: str, how: str, token: str) -> None:
        (volume,) = (volume for volume in self.host.volumes.values() if volume.lv_uuid == lv_uuid)
        if how == "spoil":
            self.host.holds[lv_uuid] = (*self.host.holds[lv_uuid], token)
        elif how == "make writable":
            volume.lv_permissions = "writeable"
        else:
            name = "SOURCE_" if how == "change a tag" else "SAMPLE_"
            tags = {tag for tag in volume.lv_tags if tag.startswith(name)}
            volume.lv_tags -= tags
            if how == "change a tag":
                volume.lv_tags.add(f"{name}{sha256(token.encode()).hexdigest()[:32]}")

    def silence(self, is_silent: bool) -> None:
        self.host.libvirt_is_silent = is_silent

    def live_snapshot(self, state: State, vm_id: str, image_id: str) -> None:
        """What libvirt says of the VM follows from the state."""

    def power_cut(self, state: State) -> None:
        self.end()
        for vm_id in self.host.active:  # libvirt's definitions survive
            self.host.xmls[vm_id] = self._domain(state, vm_id, is_whole=False)
        self.host.shut_off |= self.host.active
        self.host.active.clear()
        self.host.of_running.clear()
        self.host.openers.clear()
        for volume in self.host.volumes.values():
            if volume.lv_name != "pool0":
                volume.lv_device_open, volume.lv_active = "", ""
        shutil.rmtree(lock.RUN, ignore_errors=True)

    def end(self) -> None:
        """Kill what runs."""
        process, self.other = self.other, None
        if process:
            process.kill_helper(self.host)
            process.is_hook_dead = True
            self._switch(process)

    # -- calls

    def perform(self, state: State, call: Call, trouble: Trouble | None) -> Ended:
        if call.what in ("define", "undefine", "create", "destroy"):
            return self._libvirt(state, call.what, str(call.arguments[0]))
        if call.what in ("finish", "give up", "lose"):
            return self._end_copy(call.what)
        self.sources, self.templates = state.sources, state.templates
        process = Process(state, call, trouble)
        process.start(self._work(process))
        other = self._until_it_ends(process)
        if process.says in ("paused", *LEFT):
            self.other = process
        return replace(self._ended(process), other=other)

    def resume(self) -> Ended:
        """The paused call continues to its end."""
        process, self.other = self.other, None
        assert process
        self._until_it_ends(process)
        return self._ended(process)

    def _until_it_ends(self, process: Process) -> Ended | None:
        """Or is left alone.  Where it has to wait, the other one goes on, to its end: how that ended."""
        other, waits = self.other, 0
        while self._switch(process) == "waiting":
            waits += 1
            assert waits < WAITS, f"it waits in vain: {sorted(self.look().locks)}"
            if other and other.says != "ended":
                self._switch(other)
        if not (other and waits):
            return None
        self.other = None
        if other.says != "ended":
            self._until_it_ends(other)
        return self._ended(other)

    def _switch(self, process: Process) -> str:
        before, self.current = self.current, process
        TrackedLock.process = process
        try:
            return process.go()
        finally:
            self.current, TrackedLock.process = before, before

    def _ended(self, process: Process) -> Ended:
        error, befell = process.error, process.befell
        if process.says in ("paused", *LEFT):
            return Ended(process.says, befell)
        if isinstance(error, Dead):
            return Ended("killed", befell)
        if isinstance(error, Error):
            return Ended("refused", befell, said=str(error))
        if error:
            raise error
        return Ended("done", befell, self._paths(process), process.answer == "doubts")

    def _paths(self, process: Process) -> Mapping[str, str] | None:
        state, call = process.state, process.call
        if call.what.startswith(("gc", "prefetch", "remove")) or call.what in (
            "before_vm_destroy",
            "after_vm_destroy",
            *FORBIDDEN,
        ):
            return None
        vm = state.vms[str(call.arguments[0])]
        paths = dict(vm.paths)
        images = [str(call.arguments[1])] if len(call.arguments) > 1 else vm.images
        for image_id in images:
            volume = state.sources[image_id].volume
            if f'"/dev/{VG}/{volume}"' in process.answer:
                paths[image_id] = volume
        return paths

    def _libvirt(self, state: State, what: str, vm_id: str) -> Ended:
        host, paths = self.host, state.vms[vm_id].paths
        if what == "define":
            host.shut_off.discard(vm_id)
            host.xmls.pop(vm_id, None)
            host.defined.add(vm_id)
        elif what == "undefine":
            host.defined.discard(vm_id)
            host.shut_off.discard(vm_id)
            host.xmls.pop(vm_id, None)
        elif what == "destroy":
            host.active.discard(vm_id)
            if state.vms[vm_id].is_defined:
                host.shut_off.add(vm_id)
                host.xmls[vm_id] = self._domain(state, vm_id, is_whole=False)
            for lv_uuid in [u for u, who in host.openers.items() if vm_id in who]:
                host.close(lv_uuid, vm_id)
                host.of_running.pop(lv_uuid, None)
        elif host.libvirt_is_silent:
            return Ended("refused", said="libvirt is silent")
        else:
            host.defined.discard(vm_id)
            host.active.add(vm_id)
            for volume in paths.values():
                host.open(volume, vm_id)
                host.of_running[host.volumes[volume].lv_uuid] = host.seen(volume)
        return Ended("done")

    def _end_copy(self, how: str) -> Ended:
        process = self.other
        assert process
        if how == "give up":
            process.is_hook_dead = True
        elif how == "lose":
            process.is_hook_dead = True
            process.kill_helper(self.host)
        return replace(self.resume(), trouble="")

    def _work(self, process: Process) -> Callable[[], None]:
        state, call = process.state, process.call
        if call.what in ("gc", "gc --dry-run"):
            return lambda: self._gc(call)
        if call.what.startswith("prefetch"):
            return lambda: self._prefetch(call)
        if call.what == "remove":
            return lambda: self._remove(str(call.arguments[0]))
        point = "after_disk_prepare" if call.what in ("before copy", "before fill") else call.what
        vm_id = str(call.arguments[0])
        vm = state.vms[vm_id]
        if point == "after_disk_prepare":
            disk = bed_disk(state, vm_id, str(call.arguments[1]))
            text, variable = disk_json(disk, **(RECOVERED if vm.has_started else {})), "_hook_json"
        else:
            drifted = point == "after_vm_destroy"
            text, variable = self._domain(state, vm_id, is_drifted=drifted), "_hook_domxml"
        path = self.directory / f"data-{self.rng.getrandbits(32)}"
        path.write_text(text)
        environ = {"vmId": vm_id, "localdisk": vm.using, variable: str(path)}

        def work() -> None:
            try:
                points.run(point, environ)
                process.answer = path.read_text()
            finally:
                path.unlink()

        return work

    def _domain(self, state: State, vm_id: str, is_drifted: bool = True, is_whole: bool = True) -> str:
        """The VM's XML.  `is_drifted`: with what it runs from in the end; `is_whole`: with shared disks."""
        vm, disks = state.vms[vm_id], []
        for number, image_id in enumerate(vm.images):
            disk = bed_disk(state, vm_id, image_id, number)
            if image_id in vm.paths:
                disks.append(bed_vdsm.local(disk, f"/dev/{VG}/{vm.paths[image_id]}"))
            elif is_whole:
                disks.append(disk)
        text = domain_xml(BedVm(vm_id, tuple(disks)))
        for image_id in vm.drifted if is_drifted else ():
            layer = f'dev="/dev/{vm_id}/{image_id}" index="1"'
            text = text.replace(f'dev="/dev/{VG}/{vm.paths[image_id]}"', layer)
        return text

    def _gc(self, call: Call) -> None:
        if call.arguments == (False,):
            cli.before_vdsm_start()
        else:
            found = gc.collect(
                self.config, call.what == "gc --dry-run", ran_elsewhere=libvirt_vms.ran_elsewhere
            )
            assert gc.as_lines(found, call.what == "gc --dry-run").count("\n") == len(found.findings)
            self.running.answer = "doubts" if found.is_problem else ""

    def _remove(self, vm_id: str) -> None:
        failures = [outcome.failure for outcome in remove.remove(self.config, [vm_id]) if outcome.failure]
        if failures:
            raise failures[0]

    def _prefetch(self, call: Call) -> None:
        template, backend = call.arguments
        self.running.answer = prefetch.prefetch(f"/rhev/{template}", backend)

    # -- what a process meets

    @property
    def running(self) -> Process:
        assert self.current
        return self.current

    def moment(self, is_change: bool = False, is_hook: bool = False) -> None:
        """One moment of the running process: its trouble may come now."""
        process = self.running
        if process.is_due(is_change):
            self._befall(process, process.trouble.kind if process.trouble else "", is_hook)
        if process.is_hook_dead if is_hook else process.is_helper_dead:
            raise Dead

    def _befall(self, process: Process, kind: str, is_hook: bool) -> None:
        if kind == "fail" and is_hook:  # there is no tool
            process.postpone()
            return
        process.befell = kind
        if kind == "pause":
            process.stop("paused")
        elif kind == "fail":
            raise CommandFailed(("a tool",), 5, "  it failed\n")
        elif kind in ("hook", "term"):
            process.is_hook_dead = True
        else:
            process.is_hook_dead = kind == "all"
            process.kill_helper(self.host)

    def dies_within(self, is_change: bool) -> bool:
        """Whether the running process is killed in the middle of a command."""
        process = self.running
        kind = process.trouble.kind if process.is_due(is_change) and process.trouble else ""
        if kind not in ("", "helper", "all"):
            process.postpone()
        return kind in ("helper", "all")

    def die(self) -> None:
        process = self.running
        assert process.trouble
        self._befall(process, process.trouble.kind, is_hook=False)
        raise Dead

    def _sleep(self, seconds: float) -> None:
        """gc waits, for the process that erases."""
        if seconds == lock.POLL:
            self.running.stop("waiting")
            if self.running.is_helper_dead or self.running.is_hook_dead:
                raise Dead

    def pause(self, _seconds: float) -> None:
        """The helper waits, and notices that its hook has ended."""
        if self.running.is_hook_dead:
            raise HelperEnded
        self.running.stop("waiting")
        if self.running.is_helper_dead:
            raise Dead

    @contextmanager
    def _opened(self, disk: Any) -> Iterator[FakeSource]:
        source = self.sources[disk.image_id]
        assert source.volume == disk.volume_id
        yield FakeSource(source, self.templates.get(source.base), self.template_versions)

    @contextmanager
    def _opened_alone(self, path: str, _format: str) -> Iterator[FakeSource]:
        yield FakeSource(self.templates[path.rpartition("/")[2]], None, self.template_versions, True)

    def _copy(self, source: FakeSource, target: Target, on_progress: OnProgress) -> None:
        self._fill(source, target, on_progress, lambda: source.source.content, source.writes(65536))

    def _copy_on(self, source: FakeSource, base: Device, target: Target, on_progress: OnProgress) -> None:
        volume = self.host.volumes[base.path.rpartition("/")[2]]
        assert base.dm_uuid == self.host.dm_uuid(volume.lv_name)

        def content() -> str:
            is_held = volume.lv_device_open or self.running.is_helper_dead  # then the hook has it open alone
            assert is_held, f"{volume.lv_name} is not open while it is read"
            return self._upon(source, volume)

        self._fill(source, target, on_progress, content, 0)

    def _apply(self, source: FakeSource, target: Target, on_progress: OnProgress) -> None:
        volume = self.host.volumes[target.path.rpartition("/")[2]]
        below = self._upon(source, volume)
        self._fill(source, target, on_progress, lambda: below, source.writes_above(65536))

    def _upon(self, source: FakeSource, volume: Volume) -> str:
        """What comes of the layers above the source's base upon what is in a volume."""
        return f"{source.source.content.partition('/')[0]}/{','.join(self.host.holds[volume.lv_uuid])}"

    def _fill(
        self, source: FakeSource, target: Target, on_progress: OnProgress, what: Callable[[], str], data: int
    ) -> None:
        process, host = self.running, self.host
        kind = process.trouble.kind if process.trouble else ""
        is_left = kind == ("filling" if source.is_template else "copying")
        name = target.path.rpartition("/")[2]
        assert target.dm_uuid == host.dm_uuid(name)
        lv_uuid = host.volumes[name].lv_uuid
        if process.trouble and is_left and process.trouble.at % 2:
            self._leave_copying(process, kind)
        host.open(name, "copy")
        try:
            host.holds[lv_uuid] = ("half a copy",)
            on_progress(0.5, 1)
            if process.trouble and is_left and not process.trouble.at % 2:
                self._leave_copying(process, kind)
            assert name in host.volumes, f"{name} was removed while it was copied to"
            assert host.volumes[name].lv_uuid == lv_uuid, f"{name} was replaced while it was copied to"
            host.holds[lv_uuid] = (what(),)
            host.written[lv_uuid] = data
            on_progress(1, 2)
        finally:
            host.close(lv_uuid, "copy")

    def _leave_copying(self, process: Process, kind: str) -> None:
        process.befell = kind
        libvirt.RECENT = 0.0  # a copy that is left alone takes its time; later starts, too
        process.stop(kind)
        process.befell = ""
        if process.is_hook_dead:
            raise Dead

    def _zero(self, path: str) -> None:
        self.moment(is_change=True)
        self.host.wipe(path, "zero")
        self.moment(is_change=True)


def bed_disk(state: State, vm_id: str, image_id: str, number: int = 0) -> BedDisk:
    """The disk as vdsm describes it."""
    source = state.sources[image_id]
    path = Path(f"/rhev/data-center/mnt/srv:_exp/{vm_id}/images/{image_id}/{source.volume}")
    volume = BedVolume(source.volume, path, COW, source.size, path.with_suffix(".lease"), 0)
    return BedDisk(f"vd{'abcdefgh'[number]}", BedImage(image_id, vm_id, vm_id, "file", (volume,)))
