from __future__ import annotations

import os
from pathlib import Path

import pytest

from localdisk import lock, log, ready
from localdisk.errors import RunUnwritable
from tests.fakes import IMAGE, OTHER_IMAGE, OTHER_VM, OTHER_VOLUME, VM, VOLUME, FakeHost, tags

PATH = f"/dev/ovirt-local/{VOLUME}"


@pytest.fixture(name="dm_uuid")
def fixture_dm_uuid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    host = FakeHost().install(monkeypatch, tmp_path)
    host.add(VOLUME, tags())
    return host.dm_uuid(VOLUME)


def test_a_disk_that_is_noted(dm_uuid: str) -> None:
    assert not ready.is_noted(VM, IMAGE, PATH)
    ready.note(VM, IMAGE, PATH, dm_uuid)
    assert ready.is_noted(VM, IMAGE, PATH)
    ready.note(VM, IMAGE, PATH, dm_uuid)  # of a second start
    assert ready.is_noted(VM, IMAGE, PATH)
    assert not ready.is_noted(OTHER_VM, IMAGE, PATH)
    assert not ready.is_noted(VM, OTHER_IMAGE, PATH)
    assert not ready.is_noted(VM, IMAGE, f"/dev/ovirt-local/../ovirt-local/{VOLUME}")


def test_a_disk_that_was_made_anew(dm_uuid: str) -> None:
    ready.note(VM, IMAGE, PATH, dm_uuid[:-1] + "?")
    assert not ready.is_noted(VM, IMAGE, PATH)


def test_everybody_can_read_the_file_and_only_root_can_write_it(dm_uuid: str) -> None:
    ready.note(VM, IMAGE, PATH, dm_uuid)
    file = Path(lock.RUN, "ready", VOLUME)
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o644, 0o755)


def test_a_disk_is_forgotten(dm_uuid: str) -> None:
    ready.note(VM, IMAGE, PATH, dm_uuid)
    ready.forget([OTHER_VOLUME, VOLUME])
    assert not ready.is_noted(VM, IMAGE, PATH)
    ready.forget([VOLUME])


def test_what_cannot_be_forgotten_is_not_changed(dm_uuid: str) -> None:
    del dm_uuid
    os.makedirs(os.path.join(lock.RUN, "ready", VOLUME))
    with pytest.raises(RunUnwritable, match="Is a directory"):
        ready.forget([VOLUME])


def test_a_link_or_more_text_in_place_of_the_file_counts_for_nothing(dm_uuid: str) -> None:
    ready.note(VM, IMAGE, PATH, dm_uuid)
    file = Path(lock.RUN, "ready", VOLUME)
    file.write_text(file.read_text() + "x")
    assert not ready.is_noted(VM, IMAGE, PATH)
    ready.note(VM, IMAGE, PATH, dm_uuid)
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")
    assert not ready.is_noted(VM, IMAGE, PATH)
    ready.note(VM, IMAGE, PATH, dm_uuid)  # replaces the link, not what it points to
    assert not file.is_symlink()
    assert ready.is_noted(VM, IMAGE, PATH)


def test_a_record_that_cannot_be_written_is_logged(dm_uuid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(log, "problem", lambda text, **fields: lines.append(f"{text} {fields['why']}"))
    os.makedirs(lock.RUN)
    Path(lock.RUN, "ready").touch()
    ready.note(VM, IMAGE, PATH, dm_uuid)
    assert lines == ["record of a ready disk cannot be written File exists"]
    Path(lock.RUN, "ready").unlink()
    os.makedirs(os.path.join(lock.RUN, "ready", VOLUME))
    ready.note(VM, IMAGE, PATH, dm_uuid)
    assert "Is a directory" in lines[1]


def test_gc_removes_the_records_of_other_volumes(dm_uuid: str) -> None:
    ready.sweep(frozenset())  # there is no directory yet
    ready.note(VM, IMAGE, PATH, dm_uuid)
    ready.note(VM, IMAGE, f"/dev/ovirt-local/{OTHER_VOLUME}", dm_uuid)
    ready.sweep(frozenset({VOLUME}))
    assert os.listdir(os.path.join(lock.RUN, "ready")) == [VOLUME]
