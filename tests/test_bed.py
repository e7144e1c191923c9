"""The parts of the test bed that need no kernel."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tests.bed import guest, player
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
