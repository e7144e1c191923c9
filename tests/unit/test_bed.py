"""The parts of the test bed that need no kernel."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import pytest

from tests import suite
from tests.bed import guest, places, player, usermode, virtme
from tests.bed.guest import GuestDied, NoKernel, Order, TooLate
from tests.bed.vm import boot_sector


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (b"text\n", b"text\n"),
        (b"text\r\n", b"text\n"),
        (b"\n", b"\n"),
        (b"\r 10 %\r 50 %\r100 %\n", b"100 %\n"),
        (b"\r 10 %\r100 %\r", b"100 %\n"),
    ],
)
def test_of_a_progress_bar_only_the_last_state_is_logged(line: bytes, shown: bytes) -> None:
    target = io.BytesIO()
    guest.show(io.BytesIO(line), target)
    assert target.getvalue() == shown


def test_a_guest_without_a_status_has_died(tmp_path: Path) -> None:
    with pytest.raises(guest.GuestDied):
        guest.status(tmp_path, 0)
    (tmp_path / "status").touch()
    with pytest.raises(guest.GuestDied):
        guest.status(tmp_path, 0)
    (tmp_path / "status").write_text("3\n")
    assert guest.status(tmp_path, 0) == 3


def test_disks_are_reused_by_name_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "STATE", tmp_path)
    with guest.disks(1 << 20, "crash", keep=True) as images:
        images.local.write_bytes(b"data")
    with guest.disks(1 << 20, "crash", keep=False) as images:
        assert images.local.read_bytes()[:5] == b"data\0"
        assert images.local.stat().st_size == images.shared.stat().st_size == 1 << 20
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "STATE", tmp_path)
    for name in ("run-999999999-local.img", "crash-local.img"):
        (tmp_path / name).touch()
    with guest.disks(1 << 20, None, keep=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["crash-local.img"]


def test_what_a_killed_fetch_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usermode, "STATE", tmp_path)
    for name in ("uml-7.1", "uml-7.2", "unfinished-999999999-uml-7.2", f"unfinished-{os.getpid()}-uml-7.2"):
        (tmp_path / name / "usr").mkdir(parents=True)
    usermode.remove_stale("uml-7.2")
    assert {path.name for path in tmp_path.iterdir()} == {"uml-7.2", f"unfinished-{os.getpid()}-uml-7.2"}


def test_hook_scripts_are_the_executable_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name, mode in (("50_b", 0o755), ("10_a", 0o755), ("20_data", 0o644), (".hidden", 0o755)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    (tmp_path / "30_directory").mkdir()
    (tmp_path / "60_link").symlink_to(tmp_path / "10_a")
    (tmp_path / "70_dangling").symlink_to(tmp_path / "nothing")
    assert [path.name for path in player.scripts(tmp_path)] == ["10_a", "50_b", "60_link"]


def test_a_boot_sector_is_one_sector_with_the_bios_mark() -> None:
    sector = boot_sector("hello")
    assert len(sector) == 512
    assert sector.endswith(b"\x55\xaa")
    assert b"hello\r\n\0" in sector


@pytest.mark.parametrize(
    ("rc", "stderr", "reason"),
    [
        (2, "localdisk: no room\n", "localdisk: no room"),
        (2, "", "/hooks/50_localdisk: exit code 2"),
        (-4, "", "/hooks/50_localdisk: killed by SIGILL"),
        (-4, "half a line", "/hooks/50_localdisk: killed by SIGILL: half a line"),
        (0, "only said", ""),
    ],
)
def test_a_refusal_names_its_reason_also_when_the_hook_was_killed(rc: int, stderr: str, reason: str) -> None:
    script = player.Script(Path("/hooks/50_localdisk"), rc, "", stderr)
    assert player.Result(rc, stderr if rc else "", "", True, (script,)).reason == reason


# -- places


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(places, "STATE", tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    return tmp_path


def a_place(name: str, problem: Exception | None, tried: list[str]) -> places.Place:
    def trial() -> None:
        tried.append(name)
        if problem:
            raise problem

    return places.Place(name, lambda order: 0, trial)


def test_the_first_place_that_works_is_taken_and_each_result_is_printed_once_tried(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[str] = []
    candidates = (
        a_place("here", NoKernel("this kernel has no device-mapper"), tried),
        a_place("kvm", TooLate("killed"), tried),
        a_place("usermode", GuestDied("the guest ended: killed by SIGSEGV"), tried),
        a_place("emulation", None, tried),
    )
    monkeypatch.setattr(places, "PLACES", candidates)
    for _ in range(2):
        assert places.choose("auto").name == "emulation"
        said = capsys.readouterr().err.splitlines()
        assert [line.rpartition(" (tried")[0] for line in said] == [
            "boot: here: no: this kernel has no device-mapper",
            "boot: kvm: no: hangs: its guest had not ended in time",
            "boot: usermode: no: the guest ended: killed by SIGSEGV",
            "boot: emulation: works",
        ]
    assert tried == ["here", "kvm", "usermode", "emulation", "here"]  # what could not be tried is tried again
    with pytest.raises(NoKernel, match="kvm: hangs"):
        places.choose("kvm")


def test_a_guest_only_where_one_is_asked_for(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = (a_place("here", None, []), a_place("usermode", None, []))
    monkeypatch.setattr(places, "PLACES", candidates)
    assert places.choose("auto").name == "here"
    assert places.choose("guest").name == "usermode"
    assert places.choose("usermode").name == "usermode"


def test_a_place_is_tried_again_when_the_pinned_kernel_changes(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(places, "PLACES", (a_place("usermode", None, tried),))
    places.choose("auto")
    pins = state / "kernel.txt"
    pins.write_text("another")
    monkeypatch.setattr(usermode, "PINS", pins)
    places.choose("auto")
    assert tried == ["usermode", "usermode"]


def test_a_trial_names_the_last_line_of_the_console(state: Path) -> None:
    def dies(order: Order) -> int:
        assert order.log
        order.log.write_text("booting\nptrace set fp regs failed, errno = 14\n\n")
        raise GuestDied("the guest ended before the command did: killed by SIGABRT")

    with pytest.raises(GuestDied, match=r"killed by SIGABRT: ptrace set fp regs failed, errno = 14"):
        places.try_guest(dies, "1G", 1)


@pytest.mark.parametrize(
    ("does", "problem", "said"),
    [
        ("echo this is KVM; sleep 60", None, ""),
        ("echo failed to set MSR; kill -ABRT $$", GuestDied, "failed to set MSR"),
        ("kill -SEGV $$", GuestDied, "killed by SIGSEGV"),
        ("exec sleep 60", TooLate, "killed after"),
    ],
)
def test_kvm_is_tried_before_a_kernel_is_installed(
    tmp_path: Path, does: str, problem: type[Exception] | None, said: str
) -> None:
    program = tmp_path / "qemu"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    with pytest.raises(problem, match=said) if problem else contextlib.nullcontext():
        virtme.try_kvm(1.5 if problem is TooLate else 30, str(program))


def test_kernel_tests_are_found_by_looking() -> None:
    jobs = list(suite.kernel("here", everything=False))
    run = [word for job in jobs for word in job.argv if word.endswith(".py")]
    files = [str(file.relative_to(guest.ROOT)) for file in (guest.ROOT / "tests/kernel").rglob("test_*.py")]
    assert sorted(run) == sorted(files)
    assert len({job.name for job in jobs}) == len(jobs) > 10


def test_kernel_tests_share_steps_and_fixtures_and_do_not_import_each_other() -> None:
    for file in (guest.ROOT / "tests/kernel").rglob("*.py"):
        imports = [line for line in file.read_text().splitlines() if line.startswith(("from ", "import "))]
        assert not [line for line in imports if "tests.kernel" in line and "test_" in line], file
