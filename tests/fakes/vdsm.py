"""vdsm as it calls a hook point, with a fake host behind the helper."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from localdisk import config, lock, run
from localdisk.errors import (
    Error,
)
from localdisk.helper.process import Ended
from localdisk.helper.session import Session
from localdisk.hook import copy, points
from localdisk.hook.copy import OnProgress
from localdisk.hook.sources import Source
from localdisk.libvirt import DomainState
from localdisk.protocol import Target
from tests.fakes import (
    EXTENT,
    IMAGE,
    VM,
    VOLUME,
    Conversation,
    FakeHost,
)

SIZE = 2 * EXTENT


class Vdsm:
    """vdsm's side of a hook run, and a host without sudo, LVM and libvirt."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.host = FakeHost().install(monkeypatch, directory)
        self.host.defined = {VM}  # vdsm's placeholder: it starts the VM
        self.directory = directory
        self.helpers: list[Conversation] = []
        self.copied: list[Target] = []
        self.copy_fails: Error | None = None
        monkeypatch.setattr(config, "DEFAULT_PATH", str(directory / "localdisk.yaml"))
        monkeypatch.setattr(run, "start_talking", self._start)
        monkeypatch.setattr(run, "ask", Conversation.ask)
        monkeypatch.setattr(run, "close_input", lambda process: process.session.close())
        monkeypatch.setattr(run, "end", lambda _process: None)
        monkeypatch.setattr(copy, "copy", self._copy)
        self.source(VOLUME)

    def configure(self, text: str) -> None:
        (self.directory / "localdisk.yaml").write_text(text)

    def source(self, volume_id: str, size: int = SIZE) -> str:
        path = self.directory / volume_id
        path.write_bytes(b"x" * 512)
        os.truncate(path, size)
        return str(path)

    def call(self, point: str, text: str, **environ: str) -> str:
        """What the data file holds after the hook."""
        path = self.directory / "data"
        path.write_text(text)
        variable = "_hook_json" if point == "after_disk_prepare" else "_hook_domxml"
        given = {"vmId": VM, "localdisk": "lvm", variable: str(path), **environ}
        points.run(point, given)
        return path.read_text()

    def refused(self, kind: type[Error], point: str, text: str, **environ: str) -> str:
        with pytest.raises(kind) as caught:
            self.call(point, text, **environ)
        assert (self.directory / "data").read_text() == text
        message = str(caught.value)
        assert message.isprintable()
        assert message.partition(" : ")[2]
        assert [name for name in self.locks if name.endswith(".lock")] == []
        return message

    @property
    def locks(self) -> list[str]:
        return lock.names()

    @property
    def verbs(self) -> list[list[str]]:
        return [helper.verbs for helper in self.helpers]

    def _start(self, argv: Sequence[str]) -> Conversation:
        assert argv[:2] == ["sudo", "-n"]
        assert argv[3:] == ["helper"]
        self.helpers.append(Conversation(self.host, Session(config.load(), self._give_up)))
        return self.helpers[-1]

    def _copy(self, source: Source, target: Target, on_progress: OnProgress) -> None:
        on_progress(0.5, 1)
        if self.copy_fails:
            raise self.copy_fails
        assert os.pread(source.fds[0], 1, 0) == b"x"
        self.copied.append(target)

    @staticmethod
    def _give_up(_seconds: float) -> None:
        raise Ended


def disk_json(machine: Vdsm, **changes: Any) -> str:
    fields = {
        "device": "disk",
        "diskType": "file",
        "format": "raw",
        "path": str(machine.directory / VOLUME),
        "imageID": IMAGE,
        "volumeID": VOLUME,
        "shared": "false",
        "name": "vda",
        "serial": IMAGE,
        "volumeChain": [{"volumeID": VOLUME, "imageID": IMAGE, "path": str(machine.directory / VOLUME)}],
        "specParams": {},
    }
    return json.dumps({**fields, **changes})


def domain_xml(*disks: tuple[str, str, str, str], vm: str = VM, more: str = "") -> str:
    """A domain with raw disks: target, path, image, volume."""
    elements = "".join(
        f"<disk type='{'block' if path.startswith('/dev') else 'file'}' device='disk'>"
        "<driver name='qemu' type='raw' cache='none' io='threads'/>"
        f"<source {'dev' if path.startswith('/dev') else 'file'}='{path}'/>"
        f"<target dev='{name}' bus='virtio'/><serial>{image}</serial></disk>"
        for name, path, image, _ in disks
    )
    devices = "".join(
        f"<v:device devtype='disk' name='{name}'><v:imageID>{image}</v:imageID>"
        f"<v:volumeID>{volume}</v:volumeID></v:device>"
        for name, _, image, volume in disks
    )
    metadata = f"<metadata xmlns:v='http://ovirt.org/vm/1.0'><v:vm>{devices}</v:vm></metadata>"
    return f"<domain type='kvm'><uuid>{vm}</uuid>{metadata}<devices>{elements}{more}</devices></domain>"


def with_state(host: FakeHost, state: DomainState) -> None:
    host.defined = {VM} if state is DomainState.PLACEHOLDER else set()
    host.shut_off = {VM} if state is DomainState.SHUT_OFF else set()
    host.active = {VM} if state is DomainState.ACTIVE else set()
