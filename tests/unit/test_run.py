from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from types import FrameType

import pytest

from localdisk import run
from localdisk.errors import CommandBlocked, CommandFailed, CommandForbidden, CommandMissing, CommandTimeout


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -- run


def test_output_is_returned() -> None:
    assert run.run(["printf", "a\\nb"]) == "a\nb"


def test_output_that_is_no_text() -> None:
    assert run.run(["printf", "\\377"]) == "\ufffd"


def test_the_environment_is_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/tmp/evil.so")
    monkeypatch.setenv("PYTHONPATH", "/tmp")
    got = dict(line.split("=", 1) for line in run.run(["env"]).splitlines())
    assert got == run.ENVIRONMENT
    assert got["LC_ALL"] == "C"
    assert all(os.path.isabs(directory) for directory in got["PATH"].split(":"))


def test_no_shell_no_input_no_descriptors_no_directory() -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    assert run.run(["printf", "%s", "$(id); `id` *"]) == "$(id); `id` *"
    assert run.run(["cat"]) == ""
    assert run.run(["pwd"]) == "/\n"
    assert run.run(["sh", "-c", "echo /proc/self/fd/*"]).split()[:4] == [
        f"/proc/self/fd/{n}" for n in range(4)
    ]
    assert f"/{write_end}" not in run.run(["sh", "-c", "echo /proc/$$/fd/*"])
    assert f"/{write_end}" in run.run(["sh", "-c", "echo /proc/$$/fd/*"], pass_fds=[write_end])
    os.close(read_end)
    os.close(write_end)


def test_a_tool_is_in_a_session_of_its_own() -> None:
    session = run.run(["sh", "-c", "cut -d' ' -f6 /proc/$$/stat"])
    assert int(session) != os.getsid(0)


def test_a_failure_keeps_all_and_shows_the_last_line() -> None:
    argv = ["sh", "-c", "echo out; echo '  first' >&2; echo '  last ' >&2; echo >&2; exit 5"]
    with pytest.raises(CommandFailed) as caught:
        run.run(argv)
    error = caught.value
    assert (error.argv, error.returncode, error.stderr) == (tuple(argv), 5, "  first\n  last \n\n")
    assert str(error) == "sh -c failed (exit code 5): last : see the system log of this host"
    assert error.exit_code == 2


def test_a_tool_that_dies() -> None:
    with pytest.raises(CommandFailed, match=r"failed \(killed by SIGSEGV\): it printed nothing"):
        run.run(["sh", "-c", "kill -SEGV $$"])


@pytest.mark.parametrize("tool", ["no-such-tool-at-all", "/nonexistent/tool"])
def test_a_tool_that_cannot_be_run(tool: str) -> None:
    with pytest.raises(CommandMissing, match=f"^{tool} is not installed"):
        run.run([tool])


def test_a_tool_that_is_not_for_this_user(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.touch(0o640)
    error = CommandForbidden(tool=str(tool), path=str(tool), uid=os.getuid(), gid=os.getgid(), mode="0640")
    with pytest.raises(CommandForbidden, match=re.escape(str(error))):
        run.run([str(tool)])


def test_a_tool_that_something_else_than_its_mode_forbids() -> None:
    """As sudo's noexec, a mount with noexec, or a security module does: EACCES, whatever the mode is."""
    with pytest.raises(CommandBlocked, match=r"^sh cannot be run, although the mode of /\S+/sh allows it : "):
        raise run._cannot_run("sh")


def test_a_deadline_ends_the_tool(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    started = time.monotonic()
    with pytest.raises(CommandTimeout, match=r"^sh -c did not end within 0 s : look for hung storage"):
        run.run(["sh", "-c", f"echo $$ >{pid_file}; exec sleep 30"], deadline=0.2)
    assert time.monotonic() - started < 5
    assert not is_running(int(pid_file.read_text()))


def test_all_tools_together_have_a_budget() -> None:
    """A short deadline of one tool still applies; after the time is over, no tool is started."""
    started = time.monotonic()
    with run.within(0.5):
        assert run.run(["echo", "a"]) == "a\n"
        with pytest.raises(CommandTimeout):
            run.run(["sleep", "30"], deadline=0.1)
        assert not run.is_spent()
        begun = run.begin(["sleep", "30"])
        with pytest.raises(CommandTimeout):
            run.run(["sleep", "30"])
        assert run.is_spent()
        for ask in (begun.output, lambda: run.begin(["echo"]), lambda: run.run(["no-such-tool"])):
            with pytest.raises(CommandTimeout):
                ask()
    assert time.monotonic() - started < 5
    assert not run.is_spent()
    assert run.run(["echo", "a"]) == "a\n"


def test_an_exception_ends_the_tool(tmp_path: Path) -> None:
    """A signal whose handler raises, as the hook's does."""
    pid_file = tmp_path / "pid"

    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.run(["sh", "-c", f"echo $$ >{pid_file}; exec sleep 30"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not is_running(int(pid_file.read_text()))


# -- talking


def test_asking_line_by_line() -> None:
    process = run.start_talking(["cat"])
    assert run.ask(process, b"one") == b"one\n"
    assert run.ask(process, b"two") == b"two\n"
    run.close_input(process)
    assert run.read_errors(process) == ""
    run.close_input(process)
    run.end(process)
    assert process.returncode == 0


def test_a_tool_that_has_ended_answers_nothing() -> None:
    process = run.start_talking(["sh", "-c", "read line; echo '  why' >&2; exit 3"])
    assert run.ask(process, b"one") == b""
    with contextlib.suppress(OSError):
        assert run.ask(process, b"two") == b""
    assert run.read_errors(process) == "why"
    assert process.returncode == 3
    run.end(process)


def test_a_tool_without_pipes_is_not_asked() -> None:
    process = run.start(["true"])
    assert run.ask(process, b"one") == b""
    run.close_input(process)
    run.end(process)


def test_reporting() -> None:
    read_end, write_end = os.pipe()
    process = run.start_reporting(
        ["sh", "-c", f"echo out; echo passed >/proc/self/fd/{write_end}"], [write_end]
    )
    assert process.stdout is not None
    assert process.stdout.read() == b"out\n"
    run.end(process)
    os.close(write_end)
    assert os.read(read_end, 99) == b"passed\n"
    os.close(read_end)


def test_end_asks_and_never_kills() -> None:
    process = run.start_talking(["sh", "-c", "trap '' TERM; echo; while :; do sleep 0.05; done"])
    assert process.stdout is not None
    process.stdout.readline()
    run.end(process, grace=0.1)
    assert is_running(process.pid)
    assert process.stdout.closed
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_end_twice() -> None:
    process = run.start(["sleep", "30"])
    run.end(process)
    run.end(process)
    assert process.returncode == -signal.SIGTERM


def test_tool_exists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(run.ENVIRONMENT, "PATH", str(tmp_path))
    (tmp_path / "tool").touch(0o755)
    (tmp_path / "text").touch(0o644)
    assert run.tool_exists("tool")
    assert not run.tool_exists("text")
    assert not run.tool_exists("other")
