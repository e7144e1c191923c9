from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from localdisk import spawn
from localdisk.spawn import Process

ENVIRONMENT = {"PATH": "/usr/bin:/bin"}
ALL = (0, 1, 2)


def sh(script: str, **options: object) -> Process:
    given: dict[str, Any] = {"pipes": ALL, "limits": {}, **options}
    return spawn.start("/bin/sh", ["sh", "-c", script], ENVIRONMENT, **given)


def test_both_outputs_are_read_at_once() -> None:
    """More than a pipe holds, of both, in turns."""
    part = "head -c 100000 /dev/zero; head -c 100000 /dev/zero >&2"
    out, err = sh(f"{part}; {part}; cat").communicate(b"end", 60)
    assert (out, err) == (bytes(200_000) + b"end", bytes(200_000))


def test_what_is_written_to_a_tool_that_does_not_read() -> None:
    assert sh("exec <&-; sleep 0.2; echo out").communicate(b"in", 60) == (b"out\n", b"")


def test_a_tool_that_closes_its_outputs_and_runs_on() -> None:
    process = sh("exec >&- 2>&-; exec sleep 30")
    with pytest.raises(TimeoutError):
        process.communicate(b"", 0.3)
    process.terminate()
    assert process.wait() == -signal.SIGTERM


def test_waiting_for_a_while() -> None:
    process = sh("read line; exit 3")
    began = time.monotonic()
    assert process.wait(0) is None
    assert process.wait(0.2) is None
    assert time.monotonic() - began >= 0.2
    assert process.communicate(b"\n", 60) == (b"", b"")
    assert process.returncode == process.wait() == process.wait(0) == 3
    process.terminate()  # it has ended: no other process gets the signal


def test_signals_are_not_ignored() -> None:
    """Python ignores SIGPIPE and SIGXFSZ."""
    process = sh("grep SigIgn /proc/$$/status")
    # But for two of glibc, above 31, which posix_spawn has ignored.
    assert int(process.communicate(b"", 60)[0].split()[1], 16) & 0x7FFFFFFF == 0


def test_limits_are_for_the_child_alone() -> None:
    """Memory and core files, and never above a hard limit."""
    kinds = {"AS": resource.RLIMIT_AS, "CORE": resource.RLIMIT_CORE, "NOFILE": resource.RLIMIT_NOFILE}
    before = {name: resource.getrlimit(number) for name, number in kinds.items()}
    hard = before["NOFILE"][1]
    out, _ = sh(
        "ulimit -v; ulimit -c; ulimit -n", limits={"AS": 4 << 30, "CORE": 0, "NOFILE": hard + 1}
    ).communicate(b"", 60)
    assert out.split() == [b"%d" % (4 << 20), b"0", b"%d" % hard]
    assert {name: resource.getrlimit(number) for name, number in kinds.items()} == before
    with pytest.raises(FileNotFoundError):
        spawn.start("/missing", ["x"], ENVIRONMENT, pipes=ALL, limits={"CORE": 0})
    assert resource.getrlimit(resource.RLIMIT_CORE) == before["CORE"]


def test_our_own_directory_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert sh("pwd").communicate(b"", 60)[0] == b"/\n"
    assert Path.cwd() == tmp_path
    tmp_path.rmdir()
    assert sh("pwd").communicate(b"", 60)[0] == b"/\n"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_directory_that_we_may_not_enter(tmp_path: Path) -> None:
    """As in `prefetch`, which root starts in its home and which becomes vdsm."""
    code = f"""
import os, sys
sys.path.insert(0, {os.getcwd()!r})
from localdisk import spawn
os.chdir({str(tmp_path)!r})
os.setuid(65534)
process = spawn.start("/bin/sh", ["sh", "-c", "pwd"], {ENVIRONMENT}, pipes=(0, 1, 2), limits={{}})
print(process.communicate(b"", 60))
"""
    tmp_path.chmod(0o700)
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "(b'/\\n', b'')\n", done.stderr


def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    sh("exit").communicate(b"", 60)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises((FileNotFoundError, PermissionError)):
            spawn.start(str(path), ["x"], ENVIRONMENT, pipes=ALL, limits={})
    assert os.listdir("/proc/self/fd") == before


def test_what_sudo_forbids(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preloaded library of sudo's NOEXEC has a posix_spawn that returns -1, not an error's number."""
    monkeypatch.setattr(os, "posix_spawn", raising(OSError(-1, "Unknown error -1")))
    with pytest.raises(PermissionError, match="Permission denied: '/bin/sh'"):
        sh("exit")


def raising(error: OSError) -> Callable[..., int]:
    def posix_spawn(*_words: object, **_options: object) -> int:
        raise error

    return posix_spawn


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_of_a_process_without_standard_descriptors(tmp_path: Path, closed: str) -> None:
    """The ends of pipes then have the numbers of standard descriptors."""
    result = tmp_path / "result"
    code = f"""
import sys
sys.path.insert(0, {os.getcwd()!r})
from localdisk import spawn
argv = ["sh", "-c", "cat; echo err >&2"]
process = spawn.start("/bin/sh", argv, {ENVIRONMENT}, pipes=(0, 1, 2), limits={{}})
open({str(result)!r}, "w").write(repr(process.communicate(b"in", 60)))
"""
    script = tmp_path / "script"
    script.write_text(code)
    subprocess.run(f"exec {sys.executable} -I {script} {closed}", shell=True, check=True)
    assert result.read_text() == "(b'in', b'err\\n')"
