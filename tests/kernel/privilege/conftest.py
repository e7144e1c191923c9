from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernel.privilege.attempts import Scene, a_scene, traces


@pytest.fixture(scope="package")
def scene(libvirt: None) -> Iterator[Scene]:
    """Made once: it takes half a minute."""
    with a_scene() as made:
        yield made


@pytest.fixture
def untouched(scene: Scene) -> Iterator[None]:
    """Nothing is changed by this test but what has come and gone: volumes, and with them commits."""
    before = traces(scene, is_new=True)
    yield
    assert traces(scene, is_new=True) == before


@pytest.fixture
def unchanged(scene: Scene) -> Iterator[None]:
    """Nothing at all is changed by this test."""
    before = traces(scene)
    yield
    assert traces(scene) == before
