"""A sudo that runs a script in the place of the helper."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from localdisk import run


class Sudo:
    """A `sudo` of our own on the PATH: `script` is what it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.directory = directory
        path = f"{directory}:{run.ENVIRONMENT['PATH']}"
        monkeypatch.setitem(run.ENVIRONMENT, "PATH", path)
        monkeypatch.setattr(sys, "argv", [str(directory / "link" / "50_localdisk")])
        (directory / "link").mkdir()
        (directory / "link" / "50_localdisk").symlink_to(directory / "localdisk")

    def does(self, script: str) -> None:
        path = self.directory / "sudo"
        path.write_text(f'#!/bin/sh\nprintf "%s " "$@" >{self.directory}/called\n{script}\n')
        path.chmod(0o755)

    def answers(self, *answers: object) -> None:
        """Answer each request in turn, keep it, and end with the input."""
        lines = "\n".join(json.dumps(answer) for answer in answers)
        (self.directory / "answers").write_text(lines + "\n")
        self.does(
            f"while read -r line && read -r answer <&3; do printf '%s\\n' \"$line\" >>{self.directory}/asked;"
            f" printf '%s\\n' \"$answer\"; done 3<{self.directory}/answers; touch {self.directory}/ended"
        )

    @property
    def asked(self) -> list[object]:
        return [json.loads(line) for line in (self.directory / "asked").read_text().splitlines()]
