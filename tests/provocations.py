"""The table of test_messages.py: for every message of the product, a function that provokes it.

A provocation runs the real code, with fakes for tools or with real files, and gets a `World`.  A value that
an attacker could choose comes from the world: "evil" when the message is read, and thousands of hostile
characters when the message is measured.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pwd
import select
import signal
import stat
import struct
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localdisk import (
    cancel,
    cli,
    config,
    counters,
    daemons,
    device_mapper,
    frozen,
    holders,
    kept,
    libvirt,
    lock,
    run,
)
from localdisk.config import Config
from localdisk.errors import CommandFailed, CommandMissing, CommandTimeout, Error, Interrupted
from localdisk.helper import cache, process
from localdisk.hook import copy, prefetch, sources
from localdisk.hook.client import Helper
from localdisk.hook.sources import Layer, Source
from localdisk.host import facts, files, install, storage_facts, uninstall
from localdisk.host.file_changes import Write
from localdisk.libvirt import DomainState
from localdisk.protocol import Device
from localdisk.status import libvirt_vms, metrics
from localdisk.vdsm import hook_call
from localdisk.vdsm.disk_json import localize_disk, read_disk
from localdisk.vdsm.disks import Disk
from localdisk.vdsm.domain_xml import localize_domain, read_domain
from localdisk.vdsm.hook_call import DATA_LIMIT, DOMXML, JSON, Call
from localdisk.volumes import gc, lvm, removal, remove
from localdisk.volumes.local_disk import LocalDisk
from localdisk.volumes.lvm import VolumeGroup
from tests.fakes import (
    EXTENT,
    IMAGE,
    OTHER_IMAGE,
    OTHER_VM,
    OTHER_VOLUME,
    VM,
    VOLUME,
    FakeHost,
    aside,
    report,
    tags,
)
from tests.fakes import device as fake_device
from tests.fakes import session as fake_session
from tests.fakes import storage as fake_storage
from tests.fakes import sudo as fake_sudo
from tests.fakes import template as fake_template
from tests.fakes import vdsm as fake_vdsm
from tests.fakes.images import FORMAT, LEAF, extension, made
from tests.fakes.images import disk as source_disk
from tests.fakes.template import BASE, DOMAIN, FILL, ON, OWN_VOLUME, PREFETCH, THICK_LV, WITH_BASE

if TYPE_CHECKING:
    import pytest

MIB = 1 << 20
FILLERS = "ЖДФЯЮЩЭБГЛ"  # letters of hostile texts; no message of ours has them
HOSTILE = "\n\r\0\x1b[31m\u202e{vg}%s"
SPACE = os.strerror(errno.ENOSPC)
CANCEL = {"verb": "cancel", "vm": VM, "property": "lvm"}
CLAIM, PREPARE, COMMIT = fake_session.CLAIM, fake_session.PREPARE, fake_session.COMMIT_IT


@dataclass
class World:
    """A host of one provocation, and what an attacker says there."""

    patch: pytest.MonkeyPatch
    directory: Path
    is_hostile: bool
    _told: int = 0

    def evil(self, prefix: str = HOSTILE, count: int = 5000) -> str:
        """What an attacker chooses; each time another letter, so that each can be counted."""
        if not self.is_hostile:
            return "evil"
        self._told += 1
        return prefix + FILLERS[self._told - 1] * count

    def word(self, count: int = 5000) -> str:
        """The same without anything but letters, for an XML or command line that must be read."""
        return self.evil("", count)

    def xml(self) -> str:
        """The same for a value in XML, which cannot hold most control characters."""
        return self.evil("&#10;\u202e{vg}%s")

    def name(self) -> str:
        """The same as the name of a file."""
        return self.evil("\n\x1b[31m\u202e{vg}%s", 90)

    def evil_path(self) -> str:
        return str(self.directory / self.name())

    def host(self, captured: str = "pool-only") -> FakeHost:
        return FakeHost(report(captured)).install(self.patch, self.directory)

    def ask(self, *requests: object, text: str = "", host: FakeHost | None = None) -> object:
        """The helper's answer to the last of `requests`, its configuration being `text`."""
        hook = fake_session.Hook(host or self.host(), text)
        return [hook.ask(request) for request in requests][-1]

    def vdsm(self, text: str = "") -> fake_vdsm.Vdsm:
        machine = fake_vdsm.Vdsm(self.patch, self.directory)
        machine.configure(text)
        return machine

    def prepare(self, text: str = "", **changes: Any) -> None:
        """after_disk_prepare of a disk with these keys."""
        machine = self.vdsm(text)
        machine.call("after_disk_prepare", fake_vdsm.disk_json(machine, **changes))

    def source(self, data: bytes, image_format: str = "cow", **changes: object) -> None:
        """Open the volume of these bytes."""
        (self.directory / LEAF).write_bytes(data)
        self.open(source_disk(self.directory / LEAF, image_format), **changes)

    def open(self, disk: Disk, **changes: object) -> None:
        with sources.opened(Disk(**{**vars(disk), **changes})):
            pass

    def raises(self, place: object, name: str, error: BaseException) -> None:
        def fail(*_arguments: object, **_options: object) -> None:
            raise error

        self.patch.setattr(place, name, fail)

    def prints(self, out: str) -> None:
        """Every tool prints this."""
        self.patch.setattr(run, "run", lambda _argv, **_options: out)

    def sudo(self, script: str) -> None:
        """Release with a sudo of our own."""
        fake_sudo.Sudo(self.patch, self.directory).does(script)
        with Helper(VM, "lvm") as there:
            there.release()

    def copies(self, *tool: str, **target: object) -> None:
        """Copy a volume with this tool in qemu-img's place."""
        device = fake_device.Device(self.patch, self.directory / "device", 4 * MIB)
        device.tool = list(tool)
        with fake_device.raw_source(self.directory, b"x" * 512) as source:
            copy.copy(source, device.target(**target), fake_device.silent)


Provoke = Callable[[World], object]


@dataclass(frozen=True)
class Case:
    """`names` is what the message must have, "" in it standing for the directory of the world."""

    provoke: Provoke
    names: tuple[str, ...]


def case(provoke: Provoke, *names: str) -> Case:
    return Case(provoke, names)


# -- cli


def as_root(world: World, *words: str) -> None:
    world.patch.setattr(os, "geteuid", lambda: 0)
    cli._run(["localdisk", *words])


def as_user(world: World, *words: str) -> None:
    world.patch.setattr(os, "geteuid", lambda: 1000)
    cli._run(["localdisk", *words])


def told_to_cancel(world: World) -> None:
    world.patch.setattr(signal, "signal", lambda *_: None)
    world.patch.setenv("vmId", VM)
    cli._cancel(signal.SIGUSR1, None)


def interrupted(world: World) -> None:
    world.patch.setattr(signal, "signal", lambda *_: None)
    cli._interrupt(signal.SIGTERM, None)


def watched(world: World) -> None:
    world.patch.setattr(sys, "stdout", io.StringIO())
    cli._watch(iter(()))


def hook_log(world: World) -> None:
    world.patch.setattr(signal, "signal", lambda *_: None)
    environ = {"vmId": world.evil(HOSTILE.replace("\0", "")), "localdisk": "lvm"}
    world.patch.setattr(os, "environ", environ)
    cli._hook("after_vm_destroy")


def ended_by(error: Callable[[World], BaseException]) -> Provoke:
    """`main` ends by an exception that is none of ours."""

    def provoke(world: World) -> str:
        said = io.StringIO()
        world.raises(cli, "_run", error(world))
        world.patch.setattr(sys, "stderr", said)
        world.patch.setattr(cli, "_drop_output", lambda: None)
        cli.main(["gc"])
        return said.getvalue().rstrip("\n")

    return provoke


def older_hook_back(world: World) -> str:
    paths = [world.directory / "localdisk", world.directory / "rule"]
    for path in paths:
        path.touch()
    world.patch.setattr(files, "OLDER_FILES", tuple(map(str, paths)))
    return next(cli._older_hook())


CLI = {
    "older hook": case(older_hook_back, "/localdisk, ", "/rule", "/usr/local/libexec/localdisk install"),
    "signal": case(interrupted, "SIGTERM"),
    "powered off": case(told_to_cancel, VM),
    "no point": case(lambda w: as_root(w, "hook"), "hook point"),
    "no terminal": case(watched, "--watch"),
    "no root directory": case(lambda w: as_root(w, "install", "--root", ""), "--root"),
    "not root": case(lambda w: as_user(w, "gc"), "gc", "sudo"),
    "--config": case(lambda w: as_root(w, "--config", w.evil(), "helper"), "--config", "/etc/localdisk.yaml"),
    "usage": case(lambda w: as_root(w, w.evil()), "evil", "--help"),
    "refused": case(hook_log, "vmId is 'evil'"),
    "Ctrl-C": case(ended_by(lambda _: KeyboardInterrupt()), "interrupted"),
    "OSError": case(ended_by(lambda w: OSError(5, "Input/output error", w.evil())), "evil"),
    "a bug": case(ended_by(lambda w: RuntimeError(w.evil())), "evil", "LOCALDISK_DEBUG=1"),
}

# -- cache, prefetch

SMALL = "cache: {templates: on, max_size: 4MiB}"
ON_BLOCK = {**WITH_BASE, "base": {**BASE, "domain": DOMAIN}}


def cached(*requests: object, text: str = ON, host: Callable[[World, FakeHost], object]) -> Provoke:
    """What a session answers if the cache is on and the host is in this state."""

    def provoke(world: World) -> object:
        there = world.host()
        host(world, there)
        return world.ask(*requests, text=text, host=there)

    return provoke


def starts_from(host: Callable[[World, FakeHost], object]) -> Provoke:
    """A start from a template LV that is ready, on a host like that."""

    def prepared(world: World, there: FakeHost) -> None:
        fake_template.add_template(there)
        host(world, there)

    return cached(CLAIM, WITH_BASE, host=prepared)


def on_block(world: World, there: FakeHost) -> None:
    there.domain_tags[f"{DOMAIN}/{OWN_VOLUME}"] = {f"IU_{IMAGE}"}
    world.patch.setattr(cache, "_devices", lambda _path: ["/dev/sda"])


def swapped(world: World) -> object:
    """Somebody has removed the template LV that is filled."""
    there = world.host()
    hook = fake_session.Hook(there, ON)
    hook.ask(PREFETCH)
    hook.ask(FILL)
    del there.volumes[THICK_LV]
    return hook.ask(COMMIT)


def ends_fetching(world: World) -> None:
    """Where what was not finished cannot be removed either."""
    there = world.host()
    hook = fake_session.Hook(there, ON)
    hook.ask(PREFETCH)
    hook.ask(FILL)
    there.fail("lvremove", world.evil(), times=9)
    hook.session.end()


CACHE = {
    "full": case(cached(PREFETCH, FILL, text=SMALL, host=lambda _w, _h: None), "16 MiB", "4 MiB"),
    "full at a start": case(
        cached(CLAIM, WITH_BASE, FILL, text=SMALL, host=lambda _w, _h: None), "not cached", VOLUME, "16 MiB"
    ),
    "spoiled": case(starts_from(lambda _w, h: h.spoil(THICK_LV)), THICK_LV, OWN_VOLUME),
    "unreadable": case(
        starts_from(lambda w, _: w.raises(cache, "_sample", OSError(5, w.evil()))), THICK_LV, "evil"
    ),
    "unmarked": case(
        starts_from(lambda w, h: h.fail("lvchange", w.evil(), when="--addtag USED")), THICK_LV, "evil"
    ),
    "foreign": case(
        cached(CLAIM, WITH_BASE, host=lambda w, h: h.add(THICK_LV, {w.word()[:100]})),
        f"ovirt-local/{THICK_LV}",
    ),
    "no device": case(
        starts_from(lambda w, _: w.patch.setattr(VolumeGroup, "activate", lambda *_: None)),
        f"/dev/ovirt-local/{THICK_LV}",
    ),
    "the image's own": case(cached(CLAIM, ON_BLOCK, host=on_block), OWN_VOLUME),
    "no block volume": case(cached(CLAIM, ON_BLOCK, host=lambda _w, _h: None), f"/dev/{DOMAIN}/{OWN_VOLUME}"),
    "gone": case(swapped, OWN_VOLUME, "not the one"),
    "broken off": case(ends_fetching, OWN_VOLUME, THICK_LV, "evil"),
}


def volume_of(world: World, **metadata: str) -> str:
    """The path of a volume of this metadata, in a directory that an attacker names."""
    path = world.directory / world.name() / fake_storage.VOLUME
    path.parent.mkdir()
    path.write_bytes(b"x" * 512)
    lines = (f"{key}={value}\n" for key, value in {**fake_storage.METADATA, **metadata}.items())
    path.with_suffix(".meta").write_text("".join(lines) + "EOF\n")
    return str(path)


def fetched(name: Callable[[World], str]) -> Provoke:
    def provoke(world: World) -> str:
        fake_storage.Storage(world.patch, world.directory)
        return prefetch.prefetch(name(world), "lvm")

    return provoke


def told(**metadata: str) -> Provoke:
    """Fetched by its id, where a storage domain has it."""

    def provoke(world: World) -> str:
        fake_storage.Storage(world.patch, world.directory).tell(**metadata)
        return prefetch.prefetch(fake_storage.VOLUME, "lvm")

    return provoke


def no_vdsm(world: World) -> None:
    world.patch.setattr(os, "geteuid", lambda: 0)
    world.raises(pwd, "getpwnam", KeyError("vdsm"))
    prefetch.become_vdsm()


def block_volume(world: World) -> str:
    world.patch.setattr(os.path, "realpath", lambda path: f"/dev/dm-3{path}")
    return prefetch.prefetch(f"{world.evil_path()}/{fake_storage.VOLUME}", "lvm")


def changes(world: World) -> str:
    storage = fake_storage.Storage(world.patch, world.directory)
    path = volume_of(world)
    storage.path.unlink()
    os.link(path, storage.path)
    storage.on_copy = lambda: os.utime(path)
    return prefetch.prefetch(str(storage.path), "lvm")


FETCHED = fake_storage.VOLUME
PREFETCHES = {
    "no vdsm": case(no_vdsm, "vdsm"),
    "neither": case(lambda w: prefetch.prefetch(w.evil(HOSTILE.replace("/", "")), "lvm"), "'evil'"),
    "nowhere": case(fetched(lambda _: OTHER_VOLUME), OTHER_VOLUME, "files"),
    "no id": case(lambda w: prefetch.prefetch(w.evil_path(), "lvm"), "/evil"),
    "block storage": case(block_volume, "/evil", FETCHED),
    "no metadata": case(fetched(lambda w: volume_of(w, FORMAT=w.evil())), "/evil", FETCHED),
    "no template": case(fetched(lambda w: volume_of(w, VOLTYPE=w.evil())), "/evil", FETCHED),
    "none by its id": case(told(VOLTYPE="LEAF"), FETCHED),
    "illegal": case(fetched(lambda w: volume_of(w, LEGALITY=w.evil())), "/evil", FETCHED),
    "changes": case(changes, FETCHED, "try again"),
}

# -- client and helper


def too_long(world: World) -> None:
    """More than a request's bytes without an end of line."""
    hook = process.Hook.__new__(process.Hook)
    hook._buffer, hook._signal = b"", -1
    world.patch.setattr(select, "select", lambda *_: ([0], [], []))
    world.patch.setattr(os, "read", lambda _fd, size: b"x" * (size + 1))
    next(hook.lines())


CLIENT = {
    "refused": case(
        lambda w: w.sudo("""read line; echo '{"error": "disk d is busy : stop it"}'"""), "disk d"
    ),
    "gone": case(lambda w: w.sudo(f"echo {w.evil('x')} >&2; exit 1"), "evil", "sudo rule"),
    "gone silently": case(lambda w: w.sudo("exit 3"), "helper", "it ended: exit code 3"),
    "not understood": case(lambda w: w.sudo("read line; echo 5; cat"), "helper", "sudo rule"),
    "too long": case(too_long, "request to the helper"),
}

# -- config


def written(world: World, text: str, mode: int = 0o644) -> str:
    path = world.directory / "localdisk.yaml"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def owned(world: World) -> Config:
    path = written(world, "")
    status = os.stat_result((stat.S_IFREG | 0o644, 1, 1, 1, 4711, 1, 0, 0, 0, 0))
    world.patch.setattr(os, "fstat", lambda _fd: status)
    return config.load(path)


def yaml(text: str | Callable[[World], str]) -> Provoke:
    return lambda w: config.parse((text if isinstance(text, str) else text(w)).encode(), "F")


CONFIG = {
    "refused": case(lambda w: config.parse(f"{w.word(900)}: 1".encode(), "F"), "F:1:1: evil", "unknown key"),
    "no value": case(yaml("volume_group:"), "F:1:1", "volume_group"),
    "wrong value": case(yaml(lambda w: f"backend: {w.word()}"), "F:1:10: backend", "'evil'"),
    "property": case(lambda w: config.parse(b"", "F").policy(VM, w.evil()), "'evil'"),
    "missing": case(lambda w: config.load(w.evil_path()), "evil", "No such file"),
    "no path": case(lambda w: config.load("/\0" + w.evil()), "/\\x00evil"),
    "directory": case(lambda w: config.load(str(w.directory)), "", "regular file"),
    "writable": case(lambda w: config.load(written(w, "", 0o666)), "/localdisk.yaml", "0666"),
    "another's": case(owned, "/localdisk.yaml", "4711"),
    "too large": case(yaml("#" * 70000), "F:1:1"),
    "no UTF-8": case(lambda _: config.parse(b"a: 1\nb: \xff", "F"), "F:2:4"),
    "control character": case(yaml("a: \x01"), "F:1:4"),
    "no YAML": case(yaml(lambda w: f"[{w.word()}"), "F:1:"),
    "number out of range": case(yaml('a: "\\UFFFFFFFF"'), "F:1:"),
    "two documents": case(yaml("--- {}\n--- {}"), "F:2:1"),
    "deep": case(yaml("vms: " + "[" * 50 + "]" * 50), "F:1:", "vms"),
    "twice": case(yaml("backend: lvm\nbackend: lvm"), "F:2:1: backend"),
    "key that is a list": case(yaml("[a]: 1"), "F:1:1"),
    "merge key": case(yaml("<<: {}"), "F:1:1"),
    "empty key": case(yaml("'': 1"), "F:1:1"),
    "number": case(yaml(lambda w: "margins: {disk: 1" + "0" * (5000 if w.is_hostile else 30) + "}"), "1000"),
    "alias": case(yaml("a: &x 1\nb: *x"), "F:2:4"),
    "anchor": case(yaml("a: &x 1"), "F:1:4"),
    "tag": case(yaml("a: !!str 1"), "F:1:4"),
    "line break": case(yaml('a: "x\\ny"'), "F:1:4"),
}

# -- copy

COPY = {
    "fails": case(lambda w: w.copies("sh", "-c", f"echo {w.evil('x')} >&2; exit 1"), LEAF, "/device", "evil"),
    "fails silently": case(lambda w: w.copies("sh", "-c", "exit 1"), LEAF, "/device", "exit code 1"),
    "full": case(lambda w: w.copies("sh", "-c", f"echo {SPACE} >&2; exit 1"), LEAF, "/device"),
    "no qemu-img": case(lambda w: w.copies("sh", "-c", "exit 127"), "qemu-img"),
    "another device": case(lambda w: w.copies("true", dm_uuid="LVM-y"), "/device"),
    "no device": case(lambda w: w.copies("true", path="/nonexistent/lv"), "/nonexistent/lv"),
}

# -- definition

PATH = f"/p/{IMAGE}/{VOLUME}"
DISK = {
    **{"device": "disk", "diskType": "file", "format": "raw", "path": PATH, "imageID": IMAGE},
    **{"volumeID": VOLUME, "name": "vda", "serial": IMAGE},
}
DATA, XML = "disk data from vdsm", "domain XML from vdsm"


def disk_json(changes: Mapping[str, object] | Callable[[World], Mapping[str, object]]) -> Provoke:
    return lambda w: read_disk(json.dumps({**DISK, **(changes(w) if callable(changes) else changes)}))


def local_json(changes: Callable[[World], Mapping[str, object]], path: str = "/dev/v/l") -> Provoke:
    return lambda w: localize_disk(json.dumps({**DISK, **changes(w)}), path)


def disk_xml(target: str = "vda", inner: str = "<source file='/p'/>") -> str:
    return f"<disk type='file'><target dev='{target}'/>{inner}</disk>"


def domain_xml(devices: str = "", metadata: str = "", uuid: str = f"<uuid>{VM}</uuid>") -> str:
    vm = f"<metadata xmlns:v='http://ovirt.org/vm/1.0'><v:vm>{metadata}</v:vm></metadata>"
    return f"<domain>{uuid}{vm}<devices>{devices}</devices></domain>"


def metadata_of(name: str) -> str:
    return f"<v:device devtype='disk' name='{name}'/>"


def domain(xml: str | Callable[[World], str]) -> Provoke:
    return lambda w: read_domain(xml if isinstance(xml, str) else xml(w))


def local(inner: str) -> Provoke:
    """Make a disk local that holds this."""

    def provoke(world: World) -> None:
        name = world.xml()
        shown = name.replace("&#10;", "\n")
        localize_domain(domain_xml(disk_xml(name, inner)), {shown: "/dev/v/l"})

    return provoke


def deep(_world: World) -> None:
    read_disk('{"a":' * 100_000 + "1" + "}" * 100_000)


DEFINITION = {
    "no object": case(lambda _: read_disk("[]"), DATA),
    "no JSON": case(lambda w: read_disk(w.evil()), DATA, "line 1 column 1"),
    "deep": case(deep, DATA, "deep"),
    "digits": case(lambda _: read_disk('{"a": ' + "9" * 5000 + "}"), DATA, "4300"),
    "infinite": case(lambda w: read_disk('{"a": 1e' + "9" * (4000 if w.is_hostile else 4) + "}"), "1e999"),
    "twice": case(lambda w: read_disk(f'{{"{w.word()}": 1' + f', "{"Ж" * 5000}": 1' * 2 + "}"), DATA, "Ж"),
    "wrapped": case(lambda _: read_disk('{"disk": {}, "more": 1}'), DATA),
    "type": case(disk_json({"imageID": 5}), "imageID", "int"),
    "chain": case(disk_json({"volumeChain": 5}), "volumeChain"),
    "chain of numbers": case(disk_json({"volumeChain": [5]}), "volumeChain"),
    "chain without ids": case(disk_json({"volumeChain": [{}]}), "volumeChain"),
    "device": case(disk_json(lambda w: {"device": w.evil()}), "'evil'"),
    "id": case(disk_json(lambda w: {"imageID": w.evil()}), "imageID is 'evil'"),
    "shared": case(disk_json(lambda w: {"shared": w.evil()}), "'evil'"),
    "control characters": case(disk_json(lambda w: {"path": f"/\n{w.evil()}"}), "/\\nevil"),
    "format": case(disk_json(lambda w: {"name": w.evil(), "format": w.evil()}), "disk evil", "'evil'"),
    "disk type": case(disk_json(lambda w: {"name": w.evil(), "diskType": w.evil()}), "disk evil", "'evil'"),
    "relative": case(disk_json(lambda w: {"name": w.evil(), "path": w.word()}), "disk evil", "'evil'"),
    "serial": case(
        disk_json(lambda w: {"name": w.evil(), "serial": OTHER_IMAGE}), "disk evil", IMAGE, OTHER_IMAGE
    ),
    "half an image": case(disk_json(lambda w: {"name": w.evil(), "imageID": ""}), "disk evil"),
    "no image": case(disk_json(lambda w: {"name": w.evil(), "imageID": "", "volumeID": ""}), "disk evil"),
    "no disk": case(local_json(lambda w: {"name": w.evil(), "device": "cdrom"}), "disk evil", "cdrom"),
    "no local path": case(local_json(lambda _: {}, "/dev/v/l x"), "'/dev/v/l x'"),
    "too long": case(lambda _: read_disk("x" * (DATA_LIMIT + 1)), DATA, str(DATA_LIMIT)),
    "no uuid": case(domain(domain_xml(uuid="")), XML),
    "encoding": case(domain(lambda w: f"<?xml version='1.0' encoding='{w.evil()}'?><domain/>"), "evil"),
    "DTD": case(domain("<!DOCTYPE domain><domain/>"), XML),
    "another element": case(domain(lambda w: f"<{w.word()}/>"), "<evil>"),
    "no target": case(domain(domain_xml("<disk/>")), XML),
    "two sources": case(domain(domain_xml(disk_xml(inner="<source/><source/>"))), "<disk>", "<source>"),
    "uuid with markup": case(domain(domain_xml(uuid="<uuid><a/></uuid>")), "<uuid>"),
    "domain's uuid": case(domain(lambda w: domain_xml(uuid=f"<uuid>{w.xml()}</uuid>")), "'evil'"),
    "no XML": case(domain(lambda w: f"<domain><{w.word()}></domain>"), XML, "evil"),
    "half a character": case(domain("<domain>\ud800</domain>"), XML),
    "metadata twice": case(
        domain(lambda w: domain_xml("", metadata_of(w.xml()) + metadata_of("a") * 2)), XML
    ),
    "disk of that name": case(lambda w: localize_domain(domain_xml(), {w.evil(): "/dev/v/l"}), "disk evil"),
    "no source": case(local(""), "disk evil"),
    "mirror": case(local("<source file='/p'/><mirror/>"), "disk evil"),
}

# -- disk, session

OTHER_PREPARE = {**PREPARE, "fingerprint": "f" * 32}
LV = f"ovirt-local/{VOLUME}"
SCRATCH = "volume_group: scratch"  # as some captured reports have it


def found(
    *more: str,
    text: str = "",
    requests: tuple[object, ...] = (CLAIM, PREPARE),
    name: str = VOLUME,
    **fields: str,
) -> Provoke:
    """A start where the volume is there already."""

    def provoke(world: World) -> object:
        there = world.host()
        there.add(name, tags(*more), EXTENT, **fields)
        return world.ask(*requests, text=text, host=there)

    return provoke


def owned_by_another(world: World) -> object:
    there = world.host()
    there.add(VOLUME, tags(vm=OTHER_VM, image=OTHER_IMAGE))
    return world.ask(CLAIM, host=there)


def thin(
    captured: str = "pool-only", text: str = "", error: Callable[[World], str] = lambda _: ""
) -> Provoke:
    """A thin disk on a group like that, where lvcreate says this."""

    def provoke(world: World) -> object:
        there, said = world.host(captured), error(world)
        if said:
            there.fail("lvcreate", said)
        return world.ask({**CLAIM, "property": "lvmthin"}, PREPARE, text=text, host=there)

    return provoke


def broken_pool(world: World) -> object:
    there = world.host("pool-inactive")
    there.volumes["pool0"].lv_active = "active"
    return world.ask({**CLAIM, "property": "lvmthin"}, PREPARE, host=there)


def allocation_off(world: World) -> object:
    there = world.host()
    there.unallocatable = [{"pv_name": "/dev/sda", "pv_free": there.vg["vg_free"]}]
    return world.ask(CLAIM, PREPARE, host=there)


ELSEWHERE = f"{{{fake_session.KEEP}, vms: {{{VM}: {{volume_group: fast}}}}}}"
GROUP_GONE = f"vms: {{{OTHER_VM}: {{volume_group: gone}}}}"


def kept_elsewhere(world: World) -> object:
    there = world.host()
    fake_session.add_group(world.patch, "fast")
    there.add(VOLUME, tags("STOPPED_5"), EXTENT)
    return world.ask(CLAIM, text=ELSEWHERE, host=there)


DISK_LIFE = {
    "changed": case(found("STOPPED_5", text=fake_session.KEEP, requests=(CLAIM, OTHER_PREPARE)), LV),
    "other leaf": case(
        found(text=fake_session.KEEP, requests=(CLAIM, OTHER_PREPARE), name=OTHER_VOLUME),
        f"ovirt-local/{OTHER_VOLUME}",
        VOLUME,
    ),
    "stale": case(found("STOPPED_5", "STALE", text=fake_session.KEEP), LV),
    "kept elsewhere": case(kept_elsewhere, LV, "volume group fast"),
    "start without a group": case(
        lambda w: w.ask(CLAIM, text=GROUP_GONE), "a start cannot look at a volume group", "gone", VM
    ),
    "stop without a group": case(
        lambda w: w.ask(fake_session.RELEASE, text=GROUP_GONE),
        "a stop cannot look at a volume group",
        "gone",
        VM,
    ),
    "owner": case(owned_by_another, LV, OTHER_VM, OTHER_IMAGE),
    "open": case(found(lv_device_open="open"), LV, "ready"),
    "no space": case(lambda w: w.ask(CLAIM, {**PREPARE, "size": 1 << 45}), "ovirt-local", "TiB"),
    "allocation off": case(allocation_off, "ovirt-local", "0 B is free", "pvchange -x y /dev/sda"),
    "no pool": case(thin("empty", SCRATCH), "scratch/pool0"),
    "not zeroing": case(thin("not-zeroing", SCRATCH), "scratch/pool0"),
    "silent pool": case(thin("pool-inactive"), "ovirt-local/pool0"),
    "broken pool": case(broken_pool, "ovirt-local/pool0"),
    "full pool": case(thin(text="margins: {thin_data: 0%}"), "ovirt-local/pool0", "thin_data", "0 %"),
}


def session(*requests: Callable[[World], object] | object) -> Provoke:
    return lambda w: w.ask(*(each(w) if callable(each) else each for each in requests))


def powered_off(world: World, *requests: object) -> object:
    """before_vm_destroy has been called when the last of `requests` comes."""
    hook = fake_session.Hook(world.host())
    for request in requests[:-1]:
        hook.ask(request)
    hook.ask(CANCEL)
    return hook.ask(requests[-1])


def untold(world: World) -> None:
    """/run is full."""
    world.raises(lock.Lock, "write", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    fake_session.Hook(world.host()).ask(CLAIM)


def no_lock(world: World) -> object:
    there = world.host()
    there.add(VOLUME, tags())
    world.patch.setattr(lock, "RUN", "/proc/nothing")
    return world.ask(CLAIM, host=there)


def no_note(world: World) -> object:
    """That a volume is made cannot be noted."""
    world.raises(os, "utime", OSError(errno.EROFS, os.strerror(errno.EROFS)))
    return world.ask(CLAIM, PREPARE)


def forgotten(world: World) -> object:
    there = world.host()
    there.has_undefined = True
    world.patch.setattr(libvirt, "RECENT", 0.0)  # the copy takes its time
    return world.ask(CLAIM, PREPARE, COMMIT, host=there)


def commits_in_silence(world: World) -> None:
    there = world.host()
    world.patch.setattr(libvirt, "RECENT", 0.0)
    hook = fake_session.Hook(there)
    hook.start()
    there.libvirt_is_silent = True
    hook.ask(COMMIT)


DRIFTED = fake_session.DRIFTED


def starts_beside(tag: str) -> Provoke:
    def provoke(world: World) -> object:
        there = world.host()
        there.add(VOLUME, tags(tag), 10 * EXTENT)
        return world.ask(CLAIM, PREPARE, host=there)

    return provoke


def drifts(world: World) -> object:
    there = world.host()
    there.add(VOLUME, tags(), 10 * EXTENT)
    return world.ask({**DRIFTED, "disks": [{"image": IMAGE, "path": world.evil()}]}, host=there)


def silent_end(world: World) -> None:
    hook = fake_session.Hook(world.host())
    hook.start()
    hook.session.end()


def replaced(world: World) -> object:
    """Somebody has made another disk of that name meanwhile."""
    there = world.host()
    hook = fake_session.Hook(there)
    hook.start()
    del there.volumes[VOLUME]
    there.add(VOLUME, tags("UPDATING"))
    return hook.ask({"verb": "commit"})


def not_local(world: World) -> object:
    there = world.host()
    there.active = {VM}
    return world.ask(CLAIM, host=there)


def shut_off(world: World) -> object:
    there = world.host()
    there.shut_off = {VM}
    return world.ask(CLAIM, host=there)


def replaced_in_vain(world: World) -> None:
    """The new disk is complete, and the kept one cannot be removed."""
    there = world.host()
    there.add(OTHER_VOLUME, tags("STOPPED_5"), 10 * EXTENT)
    there.fail("lvremove", world.evil(), times=9)
    hook = fake_session.Hook(there, fake_session.RECOPY)
    hook.start(fingerprint="f" * 32)
    hook.ask({"verb": "commit"})


def no_room_of_what_is_aside(world: World) -> None:
    """A disk that was set aside cannot be erased, so that a start has no room."""
    there = world.host()
    there.add(OTHER_VOLUME, aside("zero", OTHER_VOLUME), 10 * EXTENT, lv_active="")
    there.vg["vg_free"] = "0"
    there.fail("blkdiscard", world.evil(), times=9)
    hook = fake_session.Hook(there)
    hook.ask(CLAIM)
    hook.ask(PREPARE)


def fails_later(tool: str, when: str, *requests: object, lv: str = "") -> Provoke:
    """Where that command fails, so that it is left to gc."""

    def provoke(world: World) -> None:
        there = world.host()
        if lv:
            there.add(VOLUME, tags(lv), 10 * EXTENT, lv_active="")
        there.fail(tool, world.evil(), times=9, when=when)
        if lv == "STOPPED_5":
            world.raises(VolumeGroup, "activate", CommandFailed(("lvchange",), 5, world.evil()))
        hook = fake_session.Hook(there, fake_session.KEEP if lv == "STOPPED_5" else "")
        for request in requests:
            hook.ask(request)
        hook.session.close()

    return provoke


def still_runs(world: World) -> object:
    there = world.host()
    there.add(VOLUME, tags(), lv_device_open="open")
    there.active = {VM}
    return world.ask(fake_session.RELEASE, host=there)


def runs_unfinished(world: World) -> object:
    there = world.host()
    there.add(VOLUME, tags("UPDATING"), lv_device_open="open")
    there.active = {VM}
    return world.ask(CLAIM, host=there)


def foreign(world: World) -> object:
    there = world.host()
    there.add(VOLUME, {world.word()[:100]})
    return world.ask(CLAIM, host=there)


def garbage(line: bytes) -> Provoke:
    return lambda w: fake_session.Hook(w.host()).session.serve(line)


def base(**changed: Callable[[World], object]) -> Provoke:
    """Prepared from a base that has these fields."""
    return session(CLAIM, lambda w: {**WITH_BASE, "base": {**BASE, **{k: v(w) for k, v in changed.items()}}})


def another_base(world: World) -> object:
    other = {**WITH_BASE, "base": {**BASE, "volume": OTHER_VOLUME}}
    return world.ask(CLAIM, WITH_BASE, other, text=ON)


LOOK = {"verb": "look", "vm": VM, "property": "lvm"}
LOOK_AT_IT = {**LOOK, "disks": [{"image": IMAGE, "volume": VOLUME}]}
REQUEST = "request to the helper"


def stalls(world: World) -> None:
    """A copy makes no progress for longer than copy.stall."""
    hook = fake_session.Hook(world.host())
    hook.start()
    later = time.monotonic() + 1000
    world.patch.setattr(time, "monotonic", lambda: later)
    hook.session.look_after_copy()
    hook.session.close()


def not_noted(world: World) -> None:
    """A file is where the directory would be."""
    hook = fake_session.Hook(world.host())
    hook.start()
    Path(lock.RUN, "ready").write_text(world.evil())
    hook.ask(fake_session.COMMIT_IT)


def noted_for_ever(world: World) -> object:
    """What is recorded of a volume cannot be removed, so the volume is not changed."""
    there = world.host()
    there.add(VOLUME, tags())
    os.makedirs(os.path.join(lock.RUN, "ready", VOLUME))
    return world.ask(fake_session.RELEASE, host=there)


SESSION = {
    "not noted": case(not_noted, "a ready disk cannot be written", VM, "File exists"),
    "noted for ever": case(noted_for_ever, f"/ready/{VOLUME}", "Is a directory"),
    "stalls": case(stalls, "copy stalls, its turn is given back", VM, VOLUME),
    "foreign": case(foreign, LV),
    "unfinished and running": case(runs_unfinished, LV, VM),
    "running": case(still_runs, VM),
    "id": case(session(lambda w: {**CLAIM, "image": w.evil()}), "image"),
    "number": case(session(CLAIM, lambda w: {**PREPARE, "size": w.evil()}), "size"),
    "many disks": case(session({**LOOK, "disks": [{}] * 300}), "disks", "256"),
    "half a disk": case(session({**LOOK, "disks": [{}]}), "disk"),
    "fingerprint": case(session(CLAIM, lambda w: {**PREPARE, "fingerprint": w.evil()}), "fingerprint"),
    "replaced": case(replaced, REQUEST, "unfinished disk"),
    "property": case(session(lambda w: {**CLAIM, "property": w.evil()}), "property"),
    "order": case(session({"verb": "commit"}), REQUEST, "order"),
    "order of a trial": case(session({"verb": "rehearsed"}), REQUEST, "order"),
    "order of prepare": case(session(PREPARE), REQUEST, "order"),
    "order of fill": case(session(CLAIM, FILL), REQUEST, "order"),
    "why uncached": case(
        session(CLAIM, lambda w: {"verb": "uncached", "reason": w.evil()}), REQUEST, "the reason is not known"
    ),
    "no lock": case(no_lock, "/proc/", "/run"),
    "no note": case(no_note, "/made", "Read-only"),
    "order of uncached": case(session({"verb": "uncached", "reason": "spoiled"}), REQUEST, "order"),
    "untold": case(untold, VM, VOLUME, "progress cannot be written"),
    "uncached": case(
        session(CLAIM, {"verb": "uncached", "reason": "no_metadata"}), VM, VOLUME, "no_metadata", ".meta"
    ),
    "half a base": case(session(CLAIM, lambda w: {**PREPARE, "base": {w.evil(): 1}}), REQUEST, "base"),
    "fingerprint of a base": case(base(fingerprint=lambda w: w.evil()), REQUEST, "base"),
    "large base": case(base(size=lambda _: 1 << 40), REQUEST, "base"),
    "another base": case(another_base, REQUEST, "base"),
    "backend": case(session(lambda w: {**PREFETCH, "backend": w.evil()}), REQUEST, "backend"),
    "no cache": case(session(PREFETCH), "ovirt-local", "templates: on"),
    "no JSON": case(garbage(b"\xff{"), REQUEST),
    "no verb": case(session(lambda w: {"evil": w.evil()}), REQUEST, "verb"),
    "verb": case(session(lambda w: {"verb": w.evil()}), REQUEST, "verb"),
    "broken off": case(silent_end, VM, VOLUME),
    "powered off before it claims": case(lambda w: powered_off(w, CLAIM), VM, "powered off"),
    "powered off before it starts": case(lambda w: powered_off(w, LOOK_AT_IT), VM, "powered off"),
    "powered off then": case(lambda w: powered_off(w, CLAIM, PREPARE), VM, "powered off"),
    "forgotten": case(forgotten, VM, VOLUME),
    "drifted": case(starts_beside("DRIFTED_5"), LV),
    "drifts": case(drifts, VM, VOLUME, "evil"),
    "many paths": case(session({**DRIFTED, "disks": [{}] * 300}), "disks", "256"),
    "half a path": case(session({**DRIFTED, "disks": [{}]}), "disk"),
    "a number for a path": case(session({**DRIFTED, "disks": [{"image": IMAGE, "path": 5}]}), "path"),
    "committed in silence": case(commits_in_silence, VM, VOLUME),
    "left by a start": case(
        fails_later("lvremove", "", CLAIM, PREPARE, {"verb": "x"}), "unfinished copy", VOLUME, "evil"
    ),
    "no room": case(no_room_of_what_is_aside, "set aside makes no room", OTHER_VOLUME, "evil"),
    "not replaced": case(replaced_in_vain, "replaced disk is left", OTHER_VOLUME, "evil"),
    "left by a stop": case(
        fails_later("lvremove", "", fake_session.RELEASE, lv="localdisk"), "left to gc", VOLUME, "evil"
    ),
    "kept": case(
        fails_later("lvchange", "--addtag STOPPED", CLAIM, PREPARE, lv="STOPPED_5"),
        "kept disk",
        VOLUME,
        "evil",
    ),
    "not from a local disk": case(not_local, VM, VOLUME),
    "shut off": case(shut_off, VM, VOLUME),
}

# -- kept disks that are stale


def stale_later(world: World) -> None:
    """gc cannot mark what somebody was about to mark."""
    there = world.host()
    there.add(VOLUME, tags("STOPPED_5"))
    there.defined = {VM}
    there.fail("lvchange", world.evil(), times=9)
    kept.doubt(VM, [kept.EVERY])
    gc.collect(config.parse(fake_session.KEEP.encode(), "F"))


def stale_hook(world: World) -> None:
    machine = world.vdsm()
    machine.host.fail("lvm", world.evil(), times=9)
    machine.call("before_vm_start", "anything", localdisk="off")


def no_record(world: World) -> None:
    """Files and directories are in each other's place."""
    there = world.host()
    os.makedirs(os.path.join(lock.RUN, "kept", OTHER_VM))
    os.makedirs(os.path.join(lock.RUN, "kept", VM))
    there.add(VOLUME, tags("STOPPED_5"))
    gc.collect(config.parse(fake_session.KEEP.encode(), "F"))


def stale_in_another_group(world: World) -> object:
    there = world.host()
    kept.doubt(VM, [kept.EVERY])
    return world.ask(CLAIM, text=GROUP_GONE, host=there)


STALE_ONES = {
    "another group": case(stale_in_another_group, "not marked as stale yet", VM, "gone"),
    "by gc": case(stale_later, "not marked as stale yet", VM, "evil"),
    "by the hook": case(stale_hook, "not marked as stale yet", VM),
    "no record": case(no_record, "cannot be written", "cannot be removed", VM, OTHER_VM),
    "no images": case(session({"verb": "stale", "vm": VM, "images": []}), REQUEST, "images"),
    "no image": case(session(lambda w: {"verb": "stale", "vm": VM, "images": [w.evil()]}), REQUEST, "image"),
}

# -- domains, gc, vms


def collects(world: World, there: FakeHost) -> str:
    found = gc.collect(config.parse(b"", "F"), may_start=False)
    return "\n".join(found.problems) or found.findings[0].failure


def in_vain(world: World) -> str:
    there = world.host()
    there.add(VOLUME, tags())
    there.libvirt_is_silent = True
    return collects(world, there)


def not_understood(world: World) -> object:
    """The definition of a VM that has stopped."""
    there = world.host()
    there.add(VOLUME, tags())
    there.shut_off = {VM}
    there.xmls[VM] = f"<{world.evil()}\n</domain>"
    return gc.collect(config.parse(b"", "F"), ran_elsewhere=libvirt_vms.ran_elsewhere)


def no_list(world: World) -> object:
    there = world.host()
    there.active = {world.evil()}
    return libvirt.active()


def no_virsh(world: World) -> object:
    world.raises(run, "begin", CommandMissing(tool="virsh"))
    return libvirt.active()


@dataclass(frozen=True)
class Printed:
    """A tool that has printed this."""

    text: str

    def output(self, _deadline: float) -> str:
        return self.text


def no_state(text: str) -> Provoke:
    """What virsh prints about one VM makes no sense."""

    def provoke(world: World) -> object:
        printed = Printed(text.replace("evil", world.evil()))
        world.patch.setattr(run, "begin", lambda _argv: printed)
        return libvirt.state(VM)

    return provoke


def not_removed(world: World) -> str:
    there = world.host()
    there.add(VOLUME, tags("UPDATING"))
    there.fail("lvremove", world.evil(), times=99)
    return collects(world, there)


def template_not_removed(world: World) -> str:
    there = world.host()
    there.add(THICK_LV, fake_template.template_tags("UPDATING"))
    there.fail("lvremove", world.evil(), times=99)
    collects(world, there)
    return ""


def unread_vm(world: World) -> object:
    there = world.host()
    there.active = {VM}
    there.xmls = {VM: f"<domain>\n<uuid>{VM}</uuid><{world.word()}>\n</domain>"}
    return libvirt_vms.answer(libvirt.ask_names()).unread


GC = {
    "in vain": case(in_vain, "libvirt", "virsh"),
    "no virsh": case(no_virsh, "virsh is not installed", "install the package"),
    "no list": case(no_list, "evil", "virsh"),
    "no names": case(lambda w: libvirt.read_names(w.evil()), "evil", "virsh"),
    "no state": case(no_state("evil"), "evil", "virsh"),
    "no disks": case(no_state(f"evil====\n{VM}\n====\n"), "evil", "virsh"),
    "not removed": case(not_removed, VOLUME, "evil"),
    "template not removed": case(template_not_removed, OWN_VOLUME, "evil"),
    "VM's XML": case(unread_vm, f"vm={VM}", "evil"),
    "definition": case(not_understood, "cannot find out what VMs ran from", VM),
}

# -- hook


def starts(*disks: tuple[str, str, str, str], vm: str = VM) -> Provoke:
    return lambda w: w.vdsm().call("before_vm_start", fake_vdsm.domain_xml(*disks, vm=vm))


def plugged(world: World) -> None:
    element = f"<disk type='file'><source file='{PATH}'/><target dev='{world.xml()}'/></disk>"
    world.vdsm().call("before_disk_hotplug", element)


def unplugged(world: World) -> None:
    element = f"<disk type='block'><source dev='/dev/{LV}'/><target dev='{world.xml()}'/></disk>"
    world.vdsm().call("before_disk_hotunplug", element)


def stopped(world: World) -> None:
    world.vdsm().call("after_vm_destroy", world.word())


def before_vdsm(world: World) -> None:
    machine = world.vdsm()
    machine.host.add(VOLUME, tags())
    machine.host.libvirt_is_silent = True
    world.patch.setattr(hook_call, "is_running", lambda: True)
    cli.before_vdsm_start()


def local_but_not_ready(world: World) -> None:
    text = fake_vdsm.domain_xml((world.xml(), f"/dev/{LV}", IMAGE, VOLUME))
    world.vdsm().call("before_vm_start", text)


def recovered(world: World) -> None:
    """vdsm recovers the VM, once it runs and once it is shut off; then it is migrated here."""
    machine = world.vdsm()
    for state in (DomainState.ACTIVE, DomainState.SHUT_OFF, DomainState.UNKNOWN):
        fake_vdsm.with_state(machine.host, state)
        machine.call("after_disk_prepare", "")


def was_local(world: World) -> None:
    world.prepare(diskType="block", volumeInfo={"type": "file"})


def starts_in_vain(world: World) -> None:
    machine = world.vdsm()
    machine.host.libvirt_is_silent = True
    machine.call("after_disk_prepare", "")


def resumed(world: World) -> None:
    machine = world.vdsm()
    fake_vdsm.with_state(machine.host, DomainState.UNKNOWN)
    path = machine.source(VOLUME)
    machine.call("before_vm_start", fake_vdsm.domain_xml(("vda", path, IMAGE, VOLUME)))


NO_IMAGE: dict[str, Any] = {"imageID": "", "volumeID": "", "serial": "", "volumeChain": []}
HOOK = {
    "another VM": case(starts(vm=OTHER_VM), VM, OTHER_VM),
    "plugged": case(plugged, "disk evil", VM),
    "unplugged": case(unplugged, "disk evil", VM, f"/dev/{LV}"),
    "migrated": case(lambda w: w.vdsm().call("before_vm_migrate_source", ""), VM, "migrated"),
    "suspended": case(lambda w: w.vdsm().call("before_vm_hibernate", ""), VM, "suspended"),
    "resumed": case(lambda w: w.vdsm().call("before_vm_dehibernate", ""), VM, "resumed"),
    "recovered": case(recovered, VM),
    "read from a VM": case(was_local, VM, VOLUME),
    "in vain": case(starts_in_vain, VM, "libvirt"),
    "of a VM that is resumed": case(resumed, VM),
    "not ready": case(local_but_not_ready, "disk evil", VM, f"/dev/{LV}", "absent"),
    "no image": case(lambda w: w.prepare(**NO_IMAGE, name=w.evil()), "disk evil"),
    "shared": case(lambda w: w.prepare(shared="shared", name=w.evil()), "disk evil", "shared"),
    "transient": case(lambda w: w.prepare(shared="transient", name=w.evil()), "disk evil", "transient"),
    "network": case(lambda w: w.prepare(diskType="network", path=w.word(), name=w.evil()), "disk evil"),
    "gc": case(before_vdsm, "libvirt"),
    "stopped": case(stopped, VM),
}

# -- host, install, lvm, metrics, removal, run, uninstall


def asked_in_vain(world: World) -> str:
    asked = facts._Asked()
    asked(lambda: os.stat(world.evil_path()))
    return str(asked.failures[0])


def printed(ask: Callable[[], object]) -> Provoke:
    def provoke(world: World) -> object:
        world.prints(world.evil())
        return ask()

    return provoke


def uncounted(world: World) -> None:
    (world.directory / "file").touch()
    world.patch.setattr(lock, "RUN", str(world.directory / "file" / "run"))
    counters.failed("x")


def leads_out(world: World) -> None:
    place = world.directory / "root" / world.name()
    place.parent.mkdir()
    place.symlink_to("/usr")
    install.require_inside(str(world.directory / "root"), str(place))


def in_the_way(world: World) -> object:
    path = world.directory / world.name()
    path.touch()
    return install._missing("", str(path / "x"), set())


def directory_in_the_way(world: World) -> object:
    path = world.directory / world.name()
    path.mkdir()
    return list(install._file(Write(str(path), b"", 0o644)))


def forbidden(world: World) -> object:
    path = world.directory / world.name()
    path.touch(0o640)
    return run.run([str(path)])


def blocked(world: World) -> object:
    path = world.directory / world.name()
    path.touch(0o755)
    world.raises(os, "posix_spawn", PermissionError())
    return run.run([str(path)])


HOST = {
    "rehearsal": case(printed(lambda: facts._rehearse("/x/localdisk", ())), "/x/localdisk rehearsal", "evil"),
    "unseen": case(asked_in_vain, "/evil", "ls -ld"),
    "version": case(printed(facts._lvm_version), "lvm version", "evil"),
    "report": case(printed(lambda: storage_facts._pools("vg", [])), "lvm lvs", "evil"),
    "counters": case(uncounted, "cannot count"),
}
INSTALL = {
    "no zipapp": case(lambda w: list(install.install(w.evil_path())), "/evil", "dist/localdisk"),
    "no root": case(lambda w: install.checked_root(w.evil_path()), "/evil"),
    "own root": case(lambda _: install.checked_root("//"), "//", "--root"),
    "in the way": case(in_the_way, "/evil"),
    "leads out": case(leads_out, "/root/evil", "/usr"),
    "a directory": case(directory_in_the_way, "/evil"),
    "busy": case(lambda w: uninstalls(w, VOLUME, tags()), LV, VM, "--force"),
    "busy template": case(
        lambda w: uninstalls(w, THICK_LV, fake_template.template_tags()),
        f"template LV ovirt-local/{THICK_LV}",
    ),
}


def uninstalls(world: World, name: str, lv_tags: set[str]) -> object:
    there = world.host()
    there.add(name, lv_tags, lv_device_open="open")
    world.patch.setattr(config, "DEFAULT_PATH", "/nonexistent")
    return list(uninstall.uninstall())


def writes_metrics(below: str) -> Provoke:
    """To a directory's own name, or to a file below a directory that is not there."""

    def provoke(world: World) -> None:
        world.patch.setattr(lock, "RUN", str(world.directory / "run"))
        path = world.evil_path()
        if not below:
            os.mkdir(path)
        metrics.write(path + below, "")

    return provoke


METRICS = {
    "no file": case(writes_metrics(""), "/evil"),
    "no directory": case(writes_metrics("/m"), "/evil/m"),
}


def usable(captured: str) -> Provoke:
    claim = {**CLAIM, "volume": OTHER_VOLUME}
    return lambda w: w.ask(claim, PREPARE, text=SCRATCH, host=w.host(captured))


def node(uuid: Callable[[World], str], path: str) -> Provoke:
    def provoke(world: World) -> None:
        found = uuid(world)
        world.patch.setattr("localdisk.device_mapper.read_uuid", lambda _device: found)
        world.patch.setattr(VolumeGroup, "path", lambda _vg, _name: path)
        VolumeGroup.from_report(report("empty")).dm_uuid("lv")

    return provoke


def lock_type(world: World) -> object:
    said = "Cannot access VG ovirt-local with lock type sanlock that requires lvmlockd"
    world.raises(run, "run", CommandFailed(("lvm",), 5, said))
    return VolumeGroup.read("ovirt-local")


def full_area(world: World) -> FakeHost:
    there = world.host()
    said = (
        "VG ovirt-local 27 metadata on /dev/sda (523730 bytes) exceeds maximum metadata size (521472 bytes)"
    )
    there.fail("lvcreate", f"  {said}\n  Failed to write VG ovirt-local.\n")
    return there


def fills_up(world: World) -> None:
    """The pool of a VM that runs, and the metadata area of its group."""
    there = world.host()
    there.volumes["pool0"].data_percent = "95.00"
    there.vg["vg_mda_free"] = "1024"
    thin = {"lv_layout": "thin,sparse", "pool_lv": "pool0", "lv_device_open": "open"}
    there.add(OTHER_VOLUME, tags(vm=OTHER_VM), EXTENT, **thin)
    there.add(IMAGE, tags("DELETING"), EXTENT, **{**thin, "lv_device_open": ""})
    gc.collect(config.parse(b"", "F"))


def hidden(option: str) -> Provoke:
    """LVM finds the group `other` only with this option, or with all filters off."""
    listed = json.dumps(
        {"report": [{"pv": [{"pv_name": "/dev/sda", "vg_name": "other", "pv_duplicate": ""}]}]}
    )

    def lvm_run(argv: list[str], **_: object) -> str:
        if "fullreport" in argv:
            raise CommandFailed(tuple(argv), 5, 'Volume group "other" not found')
        return listed if option in argv else '{"report": [{"pv": []}]}'

    def provoke(world: World) -> object:
        world.patch.setattr(run, "run", lvm_run)
        return VolumeGroup.read("other")

    return provoke


def lvm_says(said: str) -> Provoke:
    def provoke(world: World) -> object:
        world.raises(run, "run", CommandFailed(("lvm", "fullreport"), 5, f"WARNING: this.\n  {said}\n"))
        return VolumeGroup.read("other")

    return provoke


def locked(world: World) -> object:
    """Another process holds LVM's lock; it has chosen its own name."""
    world.raises(run, "run", CommandTimeout(tool="lvm fullreport", seconds=120))
    world.patch.setattr(daemons, "udevd_runs", lambda: True)
    world.patch.setattr(holders, "of_lock", lambda _path: str(os.getpid()))
    world.patch.setattr(holders, "command", lambda _pid: world.evil())
    return VolumeGroup.read("other")


def forgetful(world: World) -> None:
    """A device that takes what is written and reads as zeros."""
    fd = os.open("/dev/zero", os.O_RDWR)
    world.patch.setattr(copy, "_opened", lambda *_: nullcontext(fd))
    world.patch.setattr(os, "fsync", lambda _fd: None)
    copy.rehearse(Device("/dev/x", ""))


def broken_node(world: World) -> None:
    raise device_mapper.not_ready("/dev/x", OSError(errno.EIO, world.evil()))


def group_report(world: World) -> object:
    text = report("empty").replace('"vg_size":"', f'"vg_size":"{world.word()}')
    return VolumeGroup.from_report(text)


def udevd_is_gone(world: World) -> object:
    world.patch.setattr(daemons, "running", frozenset)
    world.raises(run, "run", CommandTimeout(tool="lvcreate --quiet for other", seconds=120))
    return lvm.call(["lvcreate", "--quiet", "other"])


LVM_SAYS = {
    "volume_list": ("Volume other/x is not active locally (volume_list activation filter?).", "add other"),
    "twins": ("Multiple VGs found with the same name: skipping other", "vgrename"),
    "another host's": ("Cannot access VG other with system ID x with local system ID y.", "vgchange"),
    "a stranger's": (
        "Cannot access VG other with system ID x with unknown local ID.",
        "lvmlocal.conf",
    ),
    "duplicates": ("Cannot update volume group other with duplicate PV devices.", "pvs -a"),
}

LVM = {
    "no group": case(
        lambda w: w.ask(CLAIM, text="volume_group: other"),
        "volume group other",
        "vgcreate --metadatasize 128m other",
    ),
    "exported": case(usable("exported"), "volume group scratch", "vgimport scratch"),
    "partial": case(usable("partial"), "volume group scratch", "vgreduce"),
    "shared": case(lock_type, "ovirt-local", "sanlock"),
    "size": case(group_report, "lvm fullreport", "evil"),
    "metadata area": case(
        lambda w: w.ask(CLAIM, PREPARE, host=full_area(w)), "volume group ovirt-local", "localdisk gc"
    ),
    "fills up": case(
        fills_up, "thin pool fills up", "ovirt-local/pool0", OTHER_VM, "lvextend", "localdisk gc"
    ),
    "threshold": case(thin(error=lambda _: "pool has reached threshold."), "ovirt-local/pool0"),
    "pool": case(thin(error=lambda w: f"{w.evil()}\npool reached threshold."), "ovirt-local/pool0", "evil"),
    "tags": case(printed(lambda: lvm.read_tags("vg", "lv", ["/dev/sda"])), "lvs lv", "not understood"),
    "filter": case(hidden("--all"), "volume group other", "devices/filter", "/dev/sda"),
    "devices file": case(hidden("--devicesfile"), "volume group other", "vgimportdevices other", "/dev/sda"),
    "no udevd": case(udevd_is_gone, "lvcreate --quiet for other", "udevcomplete_all"),
    "pvs": case(printed(lvm.physical_volumes), "lvm pvs", "evil"),
    "volume_list": case(
        lvm_says("Volume other/x is not active locally (volume_list activation filter?)."),
        "other",
        "add other",
    ),
    "twins": case(lvm_says("Multiple VGs found with the same name: skipping other"), "other", "vgrename"),
    "another host's": case(
        lvm_says("Cannot access VG other with system ID x with local system ID y."), "other", "vgchange"
    ),
    "another host's, unknown": case(
        lvm_says("Cannot access VG other with system ID x with unknown local ID."),
        "other",
        "lvmlocal.conf",
    ),
    "duplicates": case(
        lvm_says("Cannot update volume group other with duplicate PV devices."), "other", "pvs -a"
    ),
    "lvm.conf": case(
        lvm_says("Parse error at byte 2 (line 1): no\n  Failed to load config file /etc/lvm/lvm.conf"),
        "for other",
        "byte 2",
        "lvmconfig",
    ),
    "archive": case(lvm_says("/etc/lvm/archive/.lvm: write error failed: No space left on device"), "df -h"),
    "archive is read-only": case(
        lvm_says("Cannot archive volume group metadata for other to read-only filesystem"),
        "/etc/lvm/archive)",
    ),
    "locks": case(lvm_says("File locking initialisation failed."), "/run/lock/lvm)"),
    "mapping": case(
        lvm_says("device-mapper: create ioctl on vg-lv LVM-x failed: Device or resource busy"),
        "busy",
        "dmsetup remove vg-lv",
    ),
    "number of volumes": case(
        lvm_says("Maximum number of logical volumes (1) reached in volume group other."),
        "vgchange --logicalvolume 0 other",
    ),
    "semaphores": case(lvm_says("Limit for the maximum number of semaphores reached."), "kernel.sem"),
    "no udev": case(lvm_says("/dev/other/lv: not found: device not cleared"), "udevadm trigger"),
    "lock": case(locked, "lvm fullreport", "120 s", f"held by evil ({os.getpid()})"),
    "a file": case(lambda _: device_mapper.require_no_file("/etc/passwd"), "/etc/passwd", "rm /etc/passwd"),
    "forgetful": case(forgetful, "/dev/x", "does not hold"),
    "broken node": case(broken_node, "/dev/x", "dmesg"),
    "no node": case(node(lambda _: "", "/nonexistent/lv"), "/nonexistent/lv", "udev"),
    "another device": case(node(lambda w: w.evil(), os.devnull), os.devnull, "evil"),
}


def erases(how: str, **fields: str) -> Provoke:
    """gc's last step on a disk that was set aside, which LVM calls in use."""

    def provoke(world: World) -> None:
        there = world.host()
        there.add(VOLUME, aside("zero", VOLUME), EXTENT, **fields)
        there.cannot_discard = {"/nonexistent/lv"}
        vg = VolumeGroup.from_report(there.report())
        lv = vg.find(VOLUME)
        disk = LocalDisk.from_lv(lv) if lv else None
        assert disk
        there.fail("lvremove", f"Logical volume {LV} in use.", times=99)
        world.patch.setattr(VolumeGroup, "path", lambda _vg, _name: "/nonexistent/lv")
        removal.erase_and_remove(vg, disk, how, removal.Pace(None, lambda _seconds: None))

    return provoke


def gc_cannot_erase_the_rest(world: World) -> None:
    """Another gc has set a disk aside meanwhile, which cannot be discarded."""
    there = world.host()
    there.add(VOLUME, aside("discard", VOLUME), EXTENT)
    there.cannot_discard = {f"/dev/ovirt-local/{OTHER_VOLUME}"}

    def another(_argv: list[str]) -> None:
        there.before.clear()
        there.add(OTHER_VOLUME, aside("discard", OTHER_VOLUME), EXTENT)

    there.before["blkdiscard"] = another
    gc.collect(config.parse(b"", "F"))


def gc_finds_in_use(world: World) -> object:
    """LVM calls a disk in use that gc removes."""
    there = world.host()
    there.add(VOLUME, tags("DELETING"), EXTENT)
    there.fail("lvremove", f"Logical volume {LV} in use.", times=99)
    return collects(world, there)


def depended_on(world: World) -> object:
    """A VM starts whose old disk has an administrator's snapshot."""
    there = world.host()
    there.add(VOLUME, tags("DELETING"), EXTENT)
    there.add(world.word()[:100], (), EXTENT, origin=VOLUME)
    return world.ask(CLAIM, PREPARE, host=there)


def stops_depended_on(world: World) -> object:
    there = world.host()
    there.add(VOLUME, tags(), EXTENT)
    there.add(world.word()[:100], (), EXTENT, origin=VOLUME)
    return world.ask(fake_session.RELEASE, host=there)


def gives_up(change: Callable[[FakeHost], object] = lambda _: None, name: str = VOLUME) -> Provoke:
    """The operator removes a disk."""

    def provoke(world: World) -> None:
        there = world.host()
        there.add(VOLUME, tags(), EXTENT)
        change(there)
        outcomes = remove.remove(config.parse(b"", "F"), (name or world.evil(),))
        for failure in [outcome.failure for outcome in outcomes if outcome.failure]:
            raise failure

    return provoke


def in_two_groups(world: World) -> None:
    there = world.host()
    there.add(VOLUME, tags(), EXTENT)
    vg = VolumeGroup.from_report(there.report())
    remove.find((vg, frozen.replace(vg, vg_name="second")), {}, VOLUME)


REMOVE = {
    "no such disk": case(gives_up(name=""), "evil", "status"),
    "no disk of ours": case(gives_up(name="pool0"), "ovirt-local/pool0"),
    "in two groups": case(in_two_groups, VOLUME, LV, f"second/{VOLUME}"),
    "runs": case(gives_up(lambda there: there.active.add(VM)), LV, f"its VM {VM} runs"),
    "starts": case(gives_up(lambda there: there.defined.add(VM)), LV, f"its VM {VM} is being started"),
    "open": case(gives_up(lambda there: there.add(VOLUME, tags(), lv_device_open="open")), LV, "open"),
    "locked": case(gives_up(lambda _: lock.try_hold(lock.disk_lock(VOLUME))), LV, "a process works on it"),
    "snapshot": case(gives_up(lambda there: there.add("backup", (), origin=VOLUME)), LV, "backup"),
    "fails": case(gives_up(lambda there: there.fail("lvremove", "Failed to write VG")), "write VG"),
}
REMOVAL = {
    "cannot discard": case(erases("discard"), LV, "cannot discard", "erase: zero"),
    "depended on": case(depended_on, LV, "evil", "lvremove"),
    "stops, depended on": case(stops_depended_on, "evil", VOLUME),
    "stays open": case(erases("none", lv_device_open="open"), LV, "fuser"),
    "in use": case(erases("none"), LV, "fuser"),
    "gc erases the rest": case(gc_cannot_erase_the_rest, OTHER_VOLUME, "cannot discard"),
    "gc finds it in use": case(gc_finds_in_use, LV, "fuser"),
    "not erased": case(erases("zero", pool_lv="pool0", lv_layout="thin"), "/nonexistent/lv", "gc"),
}


def left_over(world: World) -> None:
    """The note of a power-off cannot be removed."""
    world.patch.setattr(lock, "RUN", str(world.directory))
    (world.directory / f"{VM}.destroyed").mkdir()
    cancel.settle(VM)


RUN = {
    "left over": case(left_over, f"{VM}.destroyed", "df -h /run"),
    "fails": case(lambda w: run.run(["sh", "-c", f"echo {w.evil('x')} >&2; exit 3"]), "sh -c", "3", "evil"),
    "killed": case(lambda _: run.run(["sh", "-c", "kill -TERM $$"]), "killed by SIGTERM"),
    "late": case(lambda _: run.run(["sh", "-c", "sleep 9", "/dev/x"], deadline=0.1), "sh -c", "/dev/x"),
    "missing": case(lambda _: run.run(["nosuchtool"]), "nosuchtool"),
    "forbidden": case(forbidden, "/evil", "chmod o+rx"),
    "blocked": case(blocked, "/evil", "NOEXEC"),
}

# -- image


def header(**changes: Any) -> Provoke:
    return lambda w: w.source(made(**changes))


def chain(backing: Callable[[World], str], image_format: Callable[[World], str] = lambda _: "raw") -> Provoke:
    """A leaf whose header says so, and whose parent vdsm names."""

    def provoke(world: World) -> None:
        said = extension(FORMAT, image_format(world)[:800].encode("utf-8", "surrogateescape")[:800])
        data = made(backing=backing(world).encode()[:1000], extensions=said)
        (world.directory / LEAF).write_bytes(data)
        world.open(source_disk(world.directory / LEAF, volumes=[fake_session.THIRD_VOLUME]))

    return provoke


def in_its_place(make: Callable[[Path], object], image_format: str = "raw") -> Provoke:
    def provoke(world: World) -> None:
        path = world.directory / IMAGE_ID / LEAF
        path.parent.mkdir()
        make(path)
        world.open(source_disk(path, image_format))

    return provoke


IMAGE_ID = source_disk("/x").image_id


def elsewhere(world: World) -> None:
    """Its directory is a link to that of another image."""
    other = world.directory / OTHER_IMAGE
    other.mkdir()
    (other / LEAF).write_bytes(b"x" * 512)
    (world.directory / IMAGE_ID).symlink_to(other)
    world.open(source_disk(world.directory / IMAGE_ID / LEAF, "raw"))


def missing(world: World) -> None:
    world.open(source_disk(world.directory / LEAF), path=world.evil_path())


def unreadable(error: OSError) -> Provoke:
    def provoke(world: World) -> None:
        world.raises(sources, "_read", error)
        world.source(b"x" * 512, "raw")

    return provoke


def measured(error: Callable[[World], Exception | str]) -> Provoke:
    def provoke(world: World) -> None:
        (world.directory / LEAF).write_bytes(b"x" * 512)
        with sources.opened(source_disk(world.directory / LEAF, "raw")) as source:
            found = error(world)
            if isinstance(found, str):
                world.prints(found)
            else:
                world.raises(run, "run", found)
            source.writes(65536)

    return provoke


def too_large(world: World) -> None:
    world.patch.setattr(sources, "MAX_DISK", 512)
    world.source(b"x" * 513, "raw")


def cut(length: int) -> Provoke:
    return lambda w: w.source(made()[:length])


def mapped(script: Callable[[World], str]) -> Provoke:
    """What layers hold, with this in the place of qemu-img map."""

    def provoke(world: World) -> None:
        start, path = run.start_reporting, world.evil_path()
        tool = ["sh", "-c", script(world)]
        world.patch.setattr(run, "start_reporting", lambda _argv, fds, _limits: start(tool, fds))
        layer = Layer(path, "qcow2", 0, False, MIB, "")
        Source((layer, layer)).writes_above(65536)

    return provoke


def stands_on_another(world: World) -> None:
    path = world.directory / LEAF
    path.write_bytes(made(backing=world.evil().encode()[:1000]))
    with sources.opened_alone(str(path), "qcow2"):
        pass


FEATURES = {1: "not closed", 2: "corrupt", 4: "external data file", 1 << 40: "0x10000000000"}
MEASURE = ("qemu-img", "measure")
IMAGES = {
    "no qcow2": case(header(magic=b"QFI\xfa"), LEAF, "qcow2"),
    "version": case(header(version=4), LEAF, "4"),
    "encrypted": case(header(crypt=1), LEAF, "encrypted"),
    "snapshots": case(header(snapshots=1), LEAF, "qemu-img snapshot -d"),
    "clusters": case(header(cluster_bits=99), LEAF, "2^99"),
    "size": case(header(size=513), LEAF, "513"),
    "cut off": case(cut(80), LEAF, "cut off"),
    **{f"feature {n:#x}": case(header(incompatible=n), LEAF, said) for n, said in FEATURES.items()},
    "header length": case(header(header_length=96), LEAF, "96"),
    "name outside": case(header(backing=b"x", backing_size=2000), LEAF, "backing file name"),
    "extension": case(header(extensions=struct.pack(">II", 5, 1 << 31)), LEAF, "extension"),
    "backing name": case(chain(lambda w: w.evil()), LEAF, "'evil'", "qemu-img rebase"),
    "unnamed parent": case(chain(lambda _: OTHER_VOLUME), LEAF, OTHER_VOLUME),
    "cycle": case(chain(lambda _: LEAF), LEAF, "64"),
    "backing format": case(chain(lambda _: fake_session.THIRD_VOLUME, lambda w: w.evil()), LEAF, "'evil'"),
    "a FIFO": case(in_its_place(os.mkfifo), IMAGE_ID, LEAF),
    "empty": case(in_its_place(Path.touch), IMAGE_ID, LEAF, "0 bytes"),
    "too large": case(too_large, LEAF, "1024"),
    "a link": case(in_its_place(lambda path: path.symlink_to("/etc/passwd")), IMAGE_ID, LEAF, "link"),
    "another image": case(elsewhere, IMAGE_ID, LEAF),
    "missing": case(missing, "/evil", "No such file"),
    "read error": case(unreadable(OSError(5, "Input/output error")), LEAF, "Input/output error"),
    "unknown read error": case(unreadable(OSError()), LEAF, "read error"),
    "measure": case(
        measured(lambda w: CommandFailed(MEASURE, 1, w.evil())), LEAF, "qemu-img measure", "evil"
    ),
    "measure says": case(measured(lambda w: w.evil()), LEAF, "qemu-img measure", "evil"),
    "no qemu-img": case(measured(lambda _: CommandMissing(tool="qemu-img")), "qemu-img"),
    "map": case(mapped(lambda w: f"echo {w.evil('x')} >&2; exit 3"), "qemu-img map", "3", "evil"),
    "map says": case(mapped(lambda w: f"echo {w.evil('x')}"), "qemu-img map", "evil"),
    "no qemu-img to map": case(mapped(lambda _: "exit 127"), "qemu-img"),
    "not alone": case(stands_on_another, LEAF, "another volume"),
}

# -- vdsm


def call(text: bytes | None = b"", path: str = "data") -> Callable[[World], Call]:
    def made_call(world: World) -> Call:
        file = world.directory / path
        if text is not None:
            file.write_bytes(text)
        return Call("before_vm_start", VM, "lvm", str(file))

    return made_call


def environ(**changes: Callable[[World], str]) -> Provoke:
    def provoke(world: World) -> object:
        given = {"vmId": VM, "localdisk": "lvm", DOMXML: "/x"}
        return hook_call.read_call("before_vm_start", {**given, **{k: v(world) for k, v in changes.items()}})

    return provoke


def no_file_of_data(world: World) -> str:
    path = world.directory / world.name()
    path.mkdir()
    return hook_call.read_data(Call("before_vm_start", VM, "lvm", str(path)))


VDSM = {
    "point": case(lambda w: hook_call.read_call(w.evil(), {}), "'evil'"),
    "id": case(environ(vmId=lambda w: w.evil()), "vmId is 'evil'"),
    "property": case(environ(localdisk=lambda w: w.evil()), "'evil'", "lvmthin"),
    "both": case(environ(**{JSON: lambda w: w.evil()}), JSON, DOMXML),
    "relative": case(environ(**{DOMXML: lambda w: w.evil()}), DOMXML, "'evil'"),
    "no data": case(
        lambda _: hook_call.read_data(Call("before_vdsm_start", "", "", None)), "before_vdsm_start"
    ),
    "no file": case(no_file_of_data, "/evil"),
    "missing": case(
        lambda w: hook_call.read_data(Call("p", VM, "lvm", w.evil_path())), "/evil", "No such file"
    ),
    "too long": case(
        lambda w: hook_call.read_data(call(b"x" * (DATA_LIMIT + 1))(w)), "/data", str(DATA_LIMIT)
    ),
    "answer": case(
        lambda w: hook_call.write_data(call()(w), "x" * (DATA_LIMIT + 1)), "/data", str(DATA_LIMIT)
    ),
    "no UTF-8": case(lambda w: hook_call.read_data(call(b"\xff")(w)), "/data", "utf-8"),
}

CASES: dict[str, Case] = {
    f"{module}: {name}": each
    for module, table in {
        "cache": CACHE,
        "cli": CLI,
        "client": CLIENT,
        "config": CONFIG,
        "copy": COPY,
        "definition": DEFINITION,
        "disk": DISK_LIFE,
        "stale": STALE_ONES,
        "gc": GC,
        "hook": HOOK,
        "host": HOST,
        "image": IMAGES,
        "install": INSTALL,
        "lvm": LVM,
        "metrics": METRICS,
        "prefetch": PREFETCHES,
        "removal": REMOVAL,
        "remove": REMOVE,
        "run": RUN,
        "session": SESSION,
        "vdsm": VDSM,
    }.items()
    for name, each in table.items()
}


def message_of(provoke: Provoke, world: World) -> str:
    """The message of the error that it raises, or answers with, or returns; "" for none."""
    try:
        returned = provoke(world)
    except (Error, Interrupted) as error:
        return str(error)
    if isinstance(returned, dict):
        return str(returned.get("error", ""))
    return returned if isinstance(returned, str) else ""
