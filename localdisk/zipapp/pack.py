"""Pack dist/localdisk from shiv's zipapp, with our own start code instead of shiv's.  build.sh runs it.

    python3 pack.py SHIV_FILE TARGET

It is not part of the zipapp.
"""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from pathlib import Path

STARTS = (
    ("__main__.py", "main.py"),
    ("begin.py", "begin.py"),
    ("bootstrap.py", "bootstrap.py"),
    ("first_run.py", "first_run.py"),
    ("extract.py", "extract.py"),
)
PACKED = "packages.zip"  # as extract.py has it
SHIVS = ("__main__.py", "_bootstrap/", "environment.json")


def pack(made: Path, target: Path) -> None:
    """Write the executable zipapp `target` with the content of shiv's zipapp `made`; file times are kept.

    In each run Python reads the zipapp's whole directory, in a loop that is Python code itself.  So the
    packages are in a zip file inside, which extract.py opens.  Our start code is not compressed, so that
    Python needs no import to read it.  Compiled modules, five sixths of the file, are compressed with LZMA.
    All other files are compressed as shiv does it.
    """
    with zipfile.ZipFile(made) as old, open(target, "wb") as file:
        date = old.infolist()[0].date_time
        file.write(_first_line(made))
        build_id = json.loads(old.read("environment.json"))["build_id"]
        with zipfile.ZipFile(file, "w") as new:
            for name, source in STARTS:
                text = (Path(__file__).parent / source).read_text()
                new.writestr(_file(name, date), text.replace("@BUILD_ID@", build_id))
            new.writestr(_file(PACKED, date), _packages(old))
    os.chmod(target, 0o755)  # noqa: S103 (everybody may run it)


def _packages(old: zipfile.ZipFile) -> bytes:
    """A zip file of the packages in shiv's zipapp."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as new:
        for info in old.infolist():
            if not info.is_dir() and not info.filename.startswith(SHIVS):
                how = zipfile.ZIP_LZMA if info.filename.endswith(".so") else info.compress_type
                new.writestr(info, old.read(info), how)
    return packed.getvalue()


def _file(name: str, date: tuple[int, int, int, int, int, int]) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, date)
    info.external_attr = 0o644 << 16
    return info


def _first_line(made: Path) -> bytes:
    with open(made, "rb") as file:
        return file.readline()


if __name__ == "__main__":
    pack(*map(Path, sys.argv[1:]))
