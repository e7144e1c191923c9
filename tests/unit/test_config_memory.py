"""The remembered configuration: used for the same text and program alone, and only if it is root's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from localdisk import config, config_memory, lock
from localdisk.errors import ConfigRefused

TEXT = (
    b"retention: {on_stop: keep, keep_for: 2d}\nvms: {11111111-2222-3333-4444-555555555555: {enabled: no}}\n"
)
EXAMPLE = Path(__file__).parents[2] / "examples/full.yaml"


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of the memory; the user who runs the tests counts as root."""
    monkeypatch.setattr(lock, "RUN", str(tmp_path / "run"))
    path = tmp_path / "run/configuration"
    monkeypatch.setattr(config_memory, "_path", lambda: str(path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    as_root = config_memory._is_roots

    def is_roots(status: os.stat_result) -> bool:
        fields = list(status)
        fields[stat.ST_UID] = 0 if status.st_uid == os.getuid() else status.st_uid
        return as_root(os.stat_result(fields))

    monkeypatch.setattr(config_memory, "_is_roots", is_roots)
    return path


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(config, "_distrust", lambda _status, _euid: None)
    path = tmp_path / "localdisk.yaml"
    path.write_bytes(TEXT)
    return path


def never(*_arguments: object) -> object:
    raise AssertionError("it was validated again")


@pytest.mark.parametrize("text", [TEXT, EXAMPLE.read_bytes(), b"", "# naïve\n".encode()])
def test_the_same_file_is_validated_once(file: Path, monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    file.write_bytes(text)
    first = config.load(str(file))
    monkeypatch.setattr(config, "_validated", never)
    assert config.load(str(file)) == first == config.load(str(file))


def test_another_text_is_validated(file: Path) -> None:
    config.load(str(file))
    file.write_bytes(TEXT.replace(b"2d", b"3d"))
    assert config.load(str(file)).retention.keep_for == 3 * 86400


def test_another_program_validates_itself(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config.load(str(file))
    other = tmp_path / "config_memory.py"
    other.touch()
    monkeypatch.setattr(config_memory, "__file__", str(other))
    assert config_memory.recall(TEXT) is None


def test_everybody_reads_it_and_root_alone_writes_it(file: Path, memory: Path) -> None:
    was = os.umask(0o022)
    try:
        config.load(str(file))
    finally:
        os.umask(was)
    assert stat.S_IMODE(memory.stat().st_mode) == 0o644


def test_an_ordinary_user_remembers_nothing(
    file: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 36)
    config.load(str(file))
    assert not memory.exists()


def test_what_others_could_have_written_is_not_believed(file: Path, memory: Path) -> None:
    config.load(str(file))
    assert config_memory.recall(TEXT)
    memory.chmod(0o666)
    assert config_memory.recall(TEXT) is None


def test_a_link_or_a_pipe_in_its_place_is_not_followed(file: Path, memory: Path, tmp_path: Path) -> None:
    config.load(str(file))
    memory.rename(tmp_path / "elsewhere")
    memory.symlink_to(tmp_path / "elsewhere")
    assert config_memory.recall(TEXT) is None
    before = (tmp_path / "elsewhere").read_bytes()
    config_memory.remember(b"{}", {})
    assert (tmp_path / "elsewhere").read_bytes() == before
    memory.unlink()
    os.mkfifo(memory)
    assert config_memory.recall(TEXT) is None


def test_cut_off_anywhere_it_is_validated_again(file: Path, memory: Path) -> None:
    config.load(str(file))
    whole = memory.read_bytes()
    for size in range(0, len(whole), 7):
        memory.write_bytes(whole[:size])
        assert config_memory.recall(TEXT) is None
    memory.write_bytes(whole.replace(b"keep", b"KEEP", 1))
    assert config_memory.recall(TEXT) is None
    memory.write_bytes(whole)
    assert config_memory.recall(TEXT)


def test_a_refused_configuration_is_never_remembered(file: Path, memory: Path) -> None:
    file.write_bytes(b"backend: x\n")
    for _ in range(2):
        with pytest.raises(ConfigRefused):
            config.load(str(file))
    assert not memory.exists()


def test_no_room_for_it_refuses_nothing(file: Path, memory: Path) -> None:
    memory.parent.mkdir()
    memory.mkdir()
    assert config.load(str(file)).retention.on_stop == "keep"
