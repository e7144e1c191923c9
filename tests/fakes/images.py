"""qcow2 images made by hand."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from localdisk.vdsm.disks import Disk, Volume

MIB = 1 << 20


IMAGE = "cccccccc-0000-4000-8000-000000000000"


VOLUMES = [f"aaaaaaaa-0000-4000-8000-{n:012d}" for n in range(70)]


LEAF, MIDDLE, BASE = VOLUMES[:3]


GOOD: dict[str, Any] = {
    "magic": b"QFI\xfb",
    "version": 3,
    "backing": b"",
    "backing_offset": None,  # where the name is put
    "cluster_bits": 16,
    "size": MIB,
    "crypt": 0,
    "snapshots": 0,
    "incompatible": 0,
    "header_length": 104,
    "extensions": b"",
    "backing_size": None,
}


def extension(kind: int, data: bytes, length: int | None = None) -> bytes:
    header = struct.pack(">II", kind, len(data) if length is None else length)
    return header + data.ljust(-(-len(data) // 8) * 8, b"\0")


FORMAT = 0xE2792ACA


def made(**changes: Any) -> bytes:
    """The first 64 KiB of an image, by docs/interop/qcow2.txt."""
    value = {**GOOD, **changes}
    length = value["header_length"] if value["version"] >= 3 else 72
    place = 104 if value["version"] >= 3 else 72
    name_at = place + len(value["extensions"]) if value["backing"] else 0
    if value["backing_offset"] is not None:
        name_at = value["backing_offset"]
    name_size = len(value["backing"]) if value["backing_size"] is None else value["backing_size"]
    data = struct.pack(
        ">4sIQIIQIIQQIIQ",
        *(value["magic"], value["version"], name_at, name_size, value["cluster_bits"], value["size"]),
        *(value["crypt"], 1, 196608, 65536, 1, value["snapshots"], 0),
    )
    if value["version"] >= 3:
        data += struct.pack(">QQQII", value["incompatible"], 0, 0, 4, length)
    names: bytes = value["extensions"] + value["backing"]
    return (data + names).ljust(65536, b"\0")


def disk(
    path: Path | str, image_format: str = "cow", volumes: Iterable[str] | None = (), leaf: str = LEAF
) -> Disk:
    """A disk of vdsm's whose chain is `volumes` beside its leaf; None: vdsm named none."""
    directory = Path(path).parent
    named = [] if volumes is None else [leaf, *volumes]
    return Disk(
        name="vda",
        device="disk",
        path=str(path),
        format=image_format,
        disk_type="file",
        image_id=IMAGE,
        volume_id=leaf,
        shared="none",
        volumes=tuple(Volume(name, str(directory / name)) for name in reversed(named)),
    )
