from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from localdisk import lock
from localdisk.errors import RunUnwritable

NAME = "11111111-1111-4111-8111-111111111111"
DEADLINE = 20  # seconds; only a broken lock takes so long


class GivenUp(Exception):
    pass


def give_up(_seconds: float) -> None:
    raise GivenUp


def wait(seconds: float) -> None:
    time.sleep(seconds)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Child:
    """A process of our own that runs `work` and ends; `work` gets a function that waits for `let_go`."""

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        self._go_read, self._go_write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                signal.alarm(DEADLINE)
                work(self._wait)
                status = 0
            finally:
                os._exit(status)

    def _wait(self) -> None:
        os.read(self._go_read, 1)

    def let_go(self) -> None:
        os.write(self._go_write, b"go")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.join()

    def join(self) -> int:
        if not self.pid:
            return 0
        self.let_go()
        status = os.waitpid(self.pid, 0)[1]
        self.pid = 0
        os.close(self._go_read)
        os.close(self._go_write)
        return status


@pytest.fixture(name="path")
def fixture_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(lock, "RUN", str(tmp_path / "run"))
    monkeypatch.setattr(lock, "POLL", 0.005)
    return lock.disk_lock(NAME)


@pytest.fixture(name="start")
def fixture_start() -> Iterator[Callable[[Callable[[Callable[[], None]], None]], Child]]:
    children: list[Child] = []

    def start(work: Callable[[Callable[[], None]], None]) -> Child:
        children.append(Child(work))
        return children[-1]

    yield start
    for child in children:
        child.join()


Start = Callable[[Callable[[Callable[[], None]], None]], Child]


def holder(path: str, text: str = "held") -> Callable[[Callable[[], None]], None]:
    def work(pause: Callable[[], None]) -> None:
        with lock.holding(path, give_up) as held:
            held.write(text)
            pause()

    return work


def hold_elsewhere(start: Start, path: str) -> Child:
    child = start(holder(path))
    wait_until(lambda: lock.read_held(path) == "held")
    return child


# -- locks


def test_a_lock_and_its_directory_are_roots_alone(path: str) -> None:
    assert path == f"{lock.RUN}/{NAME}.lock"
    held = lock.try_hold(path)
    assert held
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(lock.RUN).st_mode) == 0o755
    held.release()
    assert os.listdir(lock.RUN) == []


def test_one_process_holds_a_lock(path: str, start: Start) -> None:
    child = hold_elsewhere(start, path)
    assert lock.try_hold(path) is None
    assert lock.is_held(path)
    with pytest.raises(GivenUp):
        lock.hold(path, give_up)
    assert child.join() == 0
    assert not lock.is_held(path)
    assert not os.path.exists(path)
    with lock.holding(path, give_up):
        assert lock.is_held(path)


def test_a_lock_is_waited_for(path: str, start: Start) -> None:
    child = hold_elsewhere(start, path)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            child.let_go()
        time.sleep(seconds)

    lock.hold(path, pause).release()
    assert len(pauses) >= 3
    assert set(pauses) == {lock.POLL}


def test_another_lock_is_not_waited_for(path: str, start: Start) -> None:
    hold_elsewhere(start, path)
    with lock.holding(lock.disk_lock("other"), give_up):
        pass


def test_a_lock_ends_with_its_holder(path: str, start: Start) -> None:
    hold_elsewhere(start, path).kill()
    assert os.path.exists(path)
    assert lock.read_held(path) is None
    with lock.holding(path, give_up):
        assert lock.read_held(path) == ""  # nothing of what the killed one wrote
    assert not os.path.exists(path)


def test_whoever_waits_does_not_get_a_removed_file(path: str, start: Start, tmp_path: Path) -> None:
    """Four processes count to 400 together, one lost update would show."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count(_pause: Callable[[], None]) -> None:
        for _ in range(100):
            with lock.holding(path, lambda _seconds: time.sleep(0)):
                counter.write_text(str(int(counter.read_text()) + 1))

    assert [child.join() for child in [start(count) for _ in range(4)]] == [0] * 4
    assert counter.read_text() == "400"
    assert os.listdir(lock.RUN) == []


def test_the_lock_is_let_go_on_an_exception(path: str) -> None:
    with contextlib.suppress(GivenUp), lock.holding(path, give_up):
        raise GivenUp
    assert not lock.is_held(path)


def test_trying(path: str, start: Start) -> None:
    with lock.trying(path) as held:
        assert held
        assert held.path == path
        assert lock.is_held(path)
        with lock.trying(path) as again:
            assert again is None
        assert lock.is_held(path)
    assert os.listdir(lock.RUN) == []
    child = hold_elsewhere(start, path)
    with lock.trying(path) as held:
        assert held is None
    assert lock.is_held(path)
    assert child.join() == 0


def test_trying_lets_go_on_an_exception(path: str) -> None:
    with contextlib.suppress(GivenUp), lock.trying(path):
        raise GivenUp
    assert os.listdir(lock.RUN) == []


def test_a_link_in_its_place_is_not_followed(path: str, tmp_path: Path) -> None:
    os.mkdir(lock.RUN)
    os.symlink(tmp_path / "victim", path)
    with pytest.raises(RunUnwritable, match="symbolic links"):
        lock.try_hold(path)
    assert not (tmp_path / "victim").exists()


# -- texts


def test_a_shorter_text_replaces_a_longer_one(path: str) -> None:
    with lock.holding(path, give_up) as held:
        held.write("a long text, a very long one")
        held.write("short")
        assert lock.read_held(path) == "short"


def test_no_text_where_nobody_holds(path: str) -> None:
    assert lock.read_held(path) is None
    os.mkdir(lock.RUN)
    Path(path).write_text("left")
    assert lock.read_held(path) is None
    assert Path(path).read_text() == "left"


def test_a_text_that_is_no_text(path: str) -> None:
    with lock.holding(path, give_up):
        Path(path).write_bytes(b"\xff\0")
        assert lock.read_held(path) == "\ufffd\0"


# -- turns


class Queue:
    """Processes that take a turn one after the other, and who has had one."""

    def __init__(self, start: Start, log: Path, parallel: int) -> None:
        self._start, self._log, self._parallel = start, log, parallel
        log.touch()

    @property
    def served(self) -> str:
        return self._log.read_text()

    def join(self, name: str) -> Child:
        """Start a process that draws its ticket now and writes `name` when it is its turn."""

        def work(pause: Callable[[], None]) -> None:
            with lock.turn(self._parallel, wait):
                with open(self._log, "a") as log:
                    log.write(name)
                pause()

        before = tickets()
        child = self._start(work)
        wait_until(lambda: len(tickets() - before) == 1)
        return child


def tickets() -> set[str]:
    with contextlib.suppress(FileNotFoundError):
        return {name for name in os.listdir(lock.RUN) if name.endswith(".turn")}
    return set()


@pytest.mark.parametrize("parallel", [1, 2])
def test_turns_are_first_come_first_served(path: str, start: Start, tmp_path: Path, parallel: int) -> None:
    queue = Queue(start, tmp_path / "log", parallel)
    names = "abcde"
    children = [queue.join(name) for name in names]
    for done, child in enumerate(children):
        expected = names[: parallel + done]
        wait_until(lambda expected=expected: sorted(queue.served) == sorted(expected))  # type: ignore[misc]
        time.sleep(0.03)  # nobody comes too early
        assert sorted(queue.served) == sorted(expected)
        assert child.join() == 0
    assert os.listdir(lock.RUN) == []


@pytest.mark.parametrize("parallel", [1, 2])
def test_turns_survive_a_killed_holder_and_a_killed_waiter(
    path: str, start: Start, tmp_path: Path, parallel: int
) -> None:
    queue = Queue(start, tmp_path / "log", parallel)
    served = "abcdef"[:parallel]
    children = [queue.join(name) for name in "abcdef"]
    wait_until(lambda: sorted(queue.served) == sorted(served))
    children[parallel].kill()  # the next in line
    children[0].kill()
    wait_until(lambda: queue.served[parallel:] == "abcdef"[parallel + 1])
    for child in children:
        child.join()
    assert sorted(queue.served) == sorted("abcdef".replace("abcdef"[parallel], ""))
    lock.sweep()
    assert os.listdir(lock.RUN) == []


def test_no_two_go_at_once(path: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes draw tickets at the same time, again and again, and are slow to hold what they drew."""
    inside = tmp_path / "inside"
    now = time.monotonic_ns

    def draw() -> int:
        drawn = now()
        time.sleep(drawn % 3 / 1000)
        return drawn

    monkeypatch.setattr(time, "monotonic_ns", draw)

    def go(_pause: Callable[[], None]) -> None:
        for _ in range(10):
            with lock.turn(1, lambda _seconds: time.sleep(0)):
                os.mkdir(inside)
                time.sleep(0)
                os.rmdir(inside)

    assert [child.join() for child in [start(go) for _ in range(4)]] == [0] * 4
    assert os.listdir(lock.RUN) == []


def test_a_turn_is_not_waited_for_without_others(path: str) -> None:
    for _ in range(2):
        with lock.turn(1, give_up):
            assert len(tickets()) == 1
    with lock.turn(2, give_up), lock.turn(2, give_up):
        assert len(tickets()) == 2


def test_who_gives_up_leaves_no_ticket(path: str) -> None:
    with lock.turn(1, give_up):
        with pytest.raises(GivenUp), lock.turn(1, give_up):
            pass
        assert len(tickets()) == 1
    assert os.listdir(lock.RUN) == []


def test_a_turn_is_given_back_on_an_exception(path: str) -> None:
    with pytest.raises(GivenUp), lock.turn(1, give_up):
        raise GivenUp
    assert os.listdir(lock.RUN) == []


# -- sweeping


def test_sweep_removes_what_nobody_holds(path: str, start: Start) -> None:
    hold_elsewhere(start, lock.disk_lock("killed")).kill()
    hold_elsewhere(start, path)
    for name in ("1-1.turn", "notes.txt"):
        Path(lock.RUN, name).touch()
    assert lock.sweep() == 2
    assert sorted(os.listdir(lock.RUN)) == [f"{NAME}.lock", "notes.txt"]
    assert lock.is_held(path)
    assert lock.sweep() == 0


def test_sweep_without_a_directory(path: str) -> None:
    assert lock.sweep() == 0
    assert not os.path.exists(lock.RUN)


# -- /run/localdisk is full, or somebody clears it


def test_the_file_of_a_held_lock_was_removed(path: str) -> None:
    """`uninstall --force` does that."""
    held = lock.hold(path, give_up)
    os.unlink(path)
    held.write("on")
    held.release()
    assert lock.names() == []
    lock.hold(path, give_up).release()


def test_the_whole_directory_was_removed(path: str) -> None:
    with lock.holding(path, give_up), lock.turn(1, give_up):
        shutil.rmtree(lock.RUN)


def test_the_next_holder_keeps_its_file(path: str) -> None:
    first = lock.hold(path, give_up)
    os.unlink(path)
    second = lock.hold(path, give_up)
    first.release()
    assert lock.is_held(path)
    second.release()
    assert lock.names() == []


@pytest.mark.parametrize("tool", ["makedirs", "open"])
def test_a_lock_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, path: str, tool: str) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(os, tool, fail)
    with pytest.raises(RunUnwritable) as caught:
        lock.try_hold(path)
    assert str(caught.value).startswith(f"cannot make or remove {path}: No space left on device : ")
