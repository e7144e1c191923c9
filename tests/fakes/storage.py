"""A storage domain of files, as far as prefetch looks at it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from localdisk import config, lock, run
from localdisk.errors import Error
from localdisk.helper.process import Ended
from localdisk.helper.session import Session
from localdisk.hook import copy, prefetch
from localdisk.hook.copy import OnProgress
from localdisk.hook.sources import Source
from localdisk.protocol import Target
from tests.fakes import EXTENT, Conversation, FakeHost

VOLUME = "aaaaaaaa-0000-4000-8000-000000000000"


TEMPLATE_IMAGE = "bbbbbbbb-0000-4000-8000-000000000000"


VM_IMAGE = "cccccccc-0000-4000-8000-000000000000"


METADATA = {"VOLTYPE": "SHARED", "LEGALITY": "LEGAL", "IMAGE": TEMPLATE_IMAGE, "FORMAT": "RAW"}


SIZE = 2 * EXTENT


class Storage:
    """A storage domain of files that holds a template, and a host with a helper."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.host = FakeHost().install(monkeypatch, directory)
        self.mount = directory / "mnt" / "server:_export" / "domain" / "images"
        self.text = "cache: {templates: on}"
        self.helpers: list[Conversation] = []
        self.copied: list[str] = []
        self.on_copy: Callable[[], object] = lambda: None
        for image_id in (TEMPLATE_IMAGE, VM_IMAGE):
            (self.mount / image_id).mkdir(parents=True)
        self.path.write_bytes(b"x" * SIZE)
        self.tell()
        monkeypatch.setattr(
            prefetch, "MOUNTS", (f"{directory}/mnt/*/*/images", f"{directory}/mnt/*/*/*/images")
        )
        monkeypatch.setattr(run, "start_talking", self._start)
        monkeypatch.setattr(run, "ask", Conversation.ask)
        monkeypatch.setattr(run, "close_input", lambda process: process.session.end())
        monkeypatch.setattr(run, "end", lambda _process: None)
        monkeypatch.setattr(copy, "copy", self._copy)

    @property
    def path(self) -> Path:
        return self.mount / TEMPLATE_IMAGE / VOLUME

    def tell(self, **changes: str) -> None:
        lines = (f"{key}={value}\n" for key, value in {**METADATA, **changes}.items())
        self.path.with_suffix(".meta").write_text("".join(lines) + "EOF\n")

    def refused(self, kind: type[Error], name: str = VOLUME) -> str:
        before = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(kind) as caught:
            prefetch.prefetch(name, "lvm")
        assert sorted(os.listdir("/proc/self/fd")) == before
        assert self.copied == []
        assert set(self.host.volumes) == {"pool0"}
        assert [each for each in lock.names() if each.endswith(".lock")] == []
        message = str(caught.value)
        assert message.partition(" : ")[2]
        return message

    def _start(self, argv: Sequence[str]) -> Conversation:
        assert argv[:2] == ["sudo", "-n"]
        session = Session(config.parse(self.text.encode(), "F"), self._give_up)
        self.helpers.append(Conversation(self.host, session))
        return self.helpers[-1]

    def _copy(self, source: Source, target: Target, on_progress: OnProgress) -> None:
        for fraction in (0.0, 0.5, 1.0):
            on_progress(fraction, int(fraction * SIZE))
        self.on_copy()
        assert os.pread(source.fds[0], 1, 0) == b"x"
        self.copied.append(target.path)

    @staticmethod
    def _give_up(_seconds: float) -> None:
        raise Ended
