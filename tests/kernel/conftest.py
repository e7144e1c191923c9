"""Fixtures of the tests that need a real kernel, run as root in the machine that tests/bed/boot.py gives:

    .venv/bin/python -m tests.bed.boot -- .venv/bin/python -m pytest tests/kernel

A plain `pytest` does not collect this directory (norecursedirs in pyproject.toml); named, it runs, and
fails where it cannot.  After each test that uses the volume group nothing may be left of it: no LV in
the group, no process of vdsm's.  What is left fails that test, and is removed for the next one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.bed import host
from tests.bed import libvirt as libvirt_daemon
from tests.bed.storage import BlockStorage, FileStorage
from tests.kernel.steps import LOCKS, configure, kill_all


@pytest.fixture(scope="session", autouse=True)
def machine() -> None:
    """The oVirt host; set up once."""
    if "LOCALDISK_BED_LOCAL" not in os.environ:
        pytest.exit("these tests run inside `python -m tests.bed.boot -- COMMAND`", returncode=2)
    host.setup()


@pytest.fixture
def volume_group() -> Iterator[str]:
    """The name of the empty volume group, without a thin pool."""
    host.remove(*host.logical_volumes())
    yield host.VOLUME_GROUP
    assert_nothing_left(frozenset())


@pytest.fixture
def thin_pool() -> Iterator[str]:
    """The name of the volume group, with nothing in it but the thin pool."""
    host.remove(*(name for name in host.logical_volumes() if name != host.THIN_POOL))
    host.thin_pool()
    yield host.VOLUME_GROUP
    assert_nothing_left(frozenset({host.THIN_POOL}))


def assert_nothing_left(expected: frozenset[str]) -> None:
    """Fails if LVs other than `expected` are in the volume group, or if vdsm runs anything; removes it."""
    processes = host.processes_of("vdsm")
    kill_all(*processes)
    volumes = {name: tags for name, tags in host.logical_volumes().items() if name not in expected}
    host.remove(*volumes)
    assert not processes, "processes of vdsm left behind"
    assert not volumes, "logical volumes left behind"


@pytest.fixture
def file_storage() -> Iterator[FileStorage]:
    """An empty storage domain of files."""
    storage = FileStorage()
    yield storage
    storage.remove()


@pytest.fixture
def block_storage() -> Iterator[BlockStorage]:
    """An empty storage domain of LVs."""
    storage = BlockStorage()
    yield storage
    storage.remove()


@pytest.fixture(scope="session")
def libvirt() -> None:
    """A running libvirt; see tests/bed/libvirt.py for what to do with it."""
    libvirt_daemon.start()


@pytest.fixture
def defaults(libvirt: None) -> Iterator[None]:
    """libvirt runs, and the configuration is empty, also after the test; no lock may be left then."""
    del libvirt
    configure()
    yield
    configure()
    assert not list(LOCKS.glob("*.*")), "a lock is left behind"


@pytest.fixture
def throwaway() -> None:
    """What is changed for the test is the whole machine's."""
    if not host.throwaway():
        pytest.skip("this machine's tools, users, clock and LVM configuration are left alone")
