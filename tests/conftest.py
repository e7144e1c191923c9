"""Fixtures for all tests."""

from __future__ import annotations

import shutil
import syslog
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

from localdisk import config_memory

# The same code gives the same examples, however slow the machine is.
settings.register_profile("localdisk", deadline=None, derandomize=True, database=None)
settings.load_profile("localdisk")


def pytest_configure(config: pytest.Config) -> None:
    """A short path for temporary directories: messages are cut, and tests read what paths are followed by."""
    if config.option.basetemp is None:
        config.option.basetemp = tempfile.mkdtemp(prefix="t-")
        config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))


@pytest.fixture(autouse=True, scope="session")
def no_config_memory() -> Iterator[None]:
    """The tests leave no file in this machine's /run, and each validates its own configuration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_memory, "_path", lambda: "/nonexistent/configuration")
        yield


@pytest.fixture(name="logged")
def fixture_logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are logged from now on."""
    lines: list[str] = []
    monkeypatch.setattr(syslog, "syslog", lambda _level, text: lines.append(text))
    return lines
