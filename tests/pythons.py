"""The versions of Python that the built file supports and this machine has."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from localdisk.zipapp import begin


def pythons() -> Iterator[str]:
    """The versions that the file is packed for and this machine has, those of pyenv included."""
    for version in begin.PYTHONS:
        name = "python{}.{}".format(*version)
        managed = Path.home().glob(f".pyenv/versions/*/bin/{name}")
        for path in (shutil.which(name), *map(str, managed)):
            if path and "/shims/" not in path:
                yield path
                break


def others() -> Iterator[str]:
    """All but the running one."""
    own = "python{}.{}".format(*sys.version_info[:2])
    return (path for path in pythons() if Path(path).name != own)
