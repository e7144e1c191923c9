from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from localdisk import lock
from tests.fakes import EXTENT, FINGERPRINT, IMAGE, VM, VOLUME

CLAIM = {"verb": "claim", "vm": VM, "property": "lvm", "image": IMAGE, "volume": VOLUME, "seen": 0}
PREPARE = {"verb": "prepare", "size": 10 * EXTENT, "fingerprint": FINGERPRINT, "writes": 4096, "base": None}
PROGRESS = {"verb": "progress", "done": 5, "written": 3}
COMMIT_IT = {"verb": "commit"}
STALE = {"verb": "stale", "vm": VM, "images": [IMAGE]}
TO_PREPARE = {"stays": False, "path": "", "chunk": 0, "cached": False}

CHILD = """
import sys
from pathlib import Path
from localdisk import config, lock
from localdisk.helper import process
from tests.fakes import VM, FakeHost

class Patch:
    setattr = staticmethod(setattr)

host = FakeHost().install(Patch, Path(sys.argv[1]))
host.defined.add(VM)
config.DEFAULT_PATH = sys.argv[2]
lock.POLL = 0.01
try:
    code = process.main(config.load)
finally:
    Path(sys.argv[1], "commands").write_text("\\n".join(host.tools))
sys.exit(code)
"""


class Process:
    """The helper as a process with a host of its own."""

    def __init__(
        self, directory: Path, configuration: str = "/nonexistent", lock_directory: Path | None = None
    ) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        if lock_directory:
            (directory / "run").symlink_to(lock_directory)
        self._popen = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(directory), configuration],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[3],
        )

    def send(self, data: bytes) -> None:
        assert self._popen.stdin
        self._popen.stdin.write(data)
        self._popen.stdin.flush()

    def ask(self, request: object) -> Any:
        self.send(json.dumps(request).encode() + b"\n")
        return self.answer()

    def answer(self) -> Any:
        assert self._popen.stdout
        assert select.select([self._popen.stdout], [], [], 10)[0]
        return json.loads(self._popen.stdout.readline())

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def end(self) -> tuple[int, list[str]]:
        """Close its input; its exit code and commands.  It wrote nothing to standard error."""
        _, said = self._popen.communicate(timeout=10)
        assert said == b""
        return self._popen.returncode, (self.directory / "commands").read_text().split()


STARTED = ["virsh", "fullreport", "lvcreate"]


def started(directory: Path) -> Process:
    process = Process(directory)
    assert process.ask(CLAIM) == TO_PREPARE
    assert process.ask(PREPARE)["target"]
    return process


def test_the_process_serves_until_its_input_ends(tmp_path: Path) -> None:
    process = started(tmp_path)
    process.send(json.dumps(PROGRESS).encode()[:5])
    time.sleep(0.05)
    process.send(json.dumps(PROGRESS).encode()[5:] + b"\n" + json.dumps(COMMIT_IT).encode() + b"\n")
    assert (process.answer(), process.answer()) == ({}, {})
    process.send(b'{"verb": "release", "cut off')
    assert process.end() == (0, [*STARTED, "lvchange"])
    assert sorted(os.listdir(tmp_path / "run")) == ["counters", "kept", "made", "ready"]


def test_the_process_tidies_up_when_its_input_ends(tmp_path: Path) -> None:
    assert started(tmp_path).end() == (0, [*STARTED, "fullreport", "lvremove"])
    assert os.listdir(tmp_path / "run") == ["counters", "made"]


def test_the_process_looks_after_a_hook_that_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "yaml").write_text("copy: {stall: 1s}\n")
    (tmp_path / "yaml").chmod(0o600)
    process = Process(tmp_path, str(tmp_path / "yaml"))
    process.ask(CLAIM)
    process.ask(PREPARE)
    run = tmp_path / "run"
    assert list(run.glob("*.turn"))
    deadline = time.monotonic() + 10
    while list(run.glob("*.turn")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert '"stalled"' in (run / f"{VOLUME}.lock").read_text()
    assert not list(run.glob("*.turn"))
    assert process.end()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_process_tidies_up_on_a_signal(tmp_path: Path, number: int) -> None:
    process = started(tmp_path)
    process.signal(number)
    assert process.end() == (0, [*STARTED, "fullreport", "lvremove"])
    assert os.listdir(tmp_path / "run") == ["counters", "made"]


CANCEL = {"verb": "cancel", "vm": VM, "property": "lvm"}

# The hook's process: it starts the helper, which knows its user from sudo, and ends when it is told to.
HOOK = """
import os, signal, subprocess, sys

def told(number, frame):
    print("told", flush=True)
    raise SystemExit

signal.signal(signal.SIGUSR1, told)
environment = {**os.environ, "SUDO_UID": sys.argv[4].format(user=os.getuid())}
argv = [sys.executable, "-c", sys.argv[1], sys.argv[2], sys.argv[3]]
helper = subprocess.Popen(argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
for line in sys.stdin.buffer:
    helper.stdin.write(line)
    helper.stdin.flush()
    print(helper.stdout.readline().decode().strip(), flush=True)
print("not told", flush=True)
"""


@pytest.mark.parametrize(("user", "told"), [("{user}", ["told"]), ("12345", ["not told"])])
def test_the_hook_is_told_that_its_vm_was_powered_off(tmp_path: Path, user: str, told: list[str]) -> None:
    """Unless the helper's parent is another user's; what is unfinished is removed when the hook ends."""
    hook = subprocess.Popen(
        [sys.executable, "-c", HOOK, CHILD, str(tmp_path), "/nonexistent", user],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert hook.stdin
    assert hook.stdout
    for request in (CLAIM, PREPARE):
        hook.stdin.write(json.dumps(request).encode() + b"\n")
        hook.stdin.flush()
        assert "error" not in json.loads(hook.stdout.readline())
    other = Process(tmp_path / "other", lock_directory=tmp_path / "run")
    assert other.ask(CANCEL) == {}
    other.end()
    if not told[0].startswith("not"):
        assert hook.wait(timeout=10) == 0
    else:
        time.sleep(0.3)
    out, _ = hook.communicate(timeout=10)
    assert out.decode().split("\n")[:-1] == told
    deadline = time.monotonic() + 30
    commands = tmp_path / "commands"  # the helper writes them last
    while not (commands.exists() and "lvremove" in commands.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "lvremove" in commands.read_text()
    assert sorted(os.listdir(tmp_path / "run")) == [f"{VM}.destroying", "made"]


def lock_files(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith((".lock", ".turn"))]


def test_a_line_that_is_too_long_ends_the_process(tmp_path: Path) -> None:
    process = started(tmp_path)
    process.send(b"x" * 70_000)
    assert "it is too long" in process.answer()["error"]
    assert process.end() == (2, [*STARTED, "fullreport", "lvremove"])


def test_a_hook_that_goes_away_while_it_waits_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    process = Process(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "RUN", str(tmp_path / "run"))
        with lock.holding(lock.disk_lock(VOLUME), time.sleep):
            process.send(json.dumps(CLAIM).encode() + b"\n")
            assert process.end() == (0, [])


def test_a_refused_configuration_is_told_to_the_hook(tmp_path: Path) -> None:
    (tmp_path / "localdisk.yaml").write_text("nonsense: 1")
    process = Process(tmp_path, str(tmp_path / "localdisk.yaml"))
    assert "nonsense" in process.ask(CLAIM)["error"]
    assert process.end() == (2, [])


@pytest.mark.parametrize("request_", [STALE, CLAIM, {"verb": "?"}])
def test_what_becomes_stale_is_recorded_without_a_configuration(tmp_path: Path, request_: object) -> None:
    """Its VM begins to run without its kept disks, and is not refused."""
    (tmp_path / "localdisk.yaml").write_text("nonsense: 1")
    process = Process(tmp_path, str(tmp_path / "localdisk.yaml"))
    assert "nonsense" in process.ask(request_)["error"]
    assert process.end() == (2, [])
    record = tmp_path / "run" / "kept" / VM
    assert (record.read_text() if record.exists() else "") == (IMAGE if request_ is STALE else "")


def test_a_process_without_requests(tmp_path: Path) -> None:
    assert Process(tmp_path, str(tmp_path)).end() == (0, [])
