"""What holds for all unit tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from localdisk import config_memory


@pytest.fixture(autouse=True, scope="session")
def no_config_memory() -> Iterator[None]:
    """The tests leave no file in this machine's /run, and each validates its own configuration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_memory, "_path", lambda: "/nonexistent/configuration")
        yield
