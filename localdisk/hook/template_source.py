"""Which volumes are templates', by what the storage domain itself says; in doubt, none.

File storage: beside each volume lies its metadata, `<volume>.meta`, lines of KEY=VALUE with `EOF` as the last
(vdsm, storage/volumemetadata.py).  A template's says VOLTYPE=SHARED, and IMAGE, the template's image; every
image made from it has hard links to the volume and its metadata.  A snapshot that may be merged is INTERNAL.
Block storage: the tag IU_ of a volume names the image it was made for (vdsm, storage/blockVolume.py).  Only
root can read tags; `cache.py` does.
"""

from __future__ import annotations

import os
import re
import stat

from localdisk import uncached
from localdisk.hook.sources import Layer
from localdisk.ids import is_uuid

_LIMIT = 64 << 10  # bytes; vdsm's is 512, or 8 KiB from version 5 of storage domains on
_LINE = re.compile(r"([A-Z_]+)=(.*)")


def is_template(layer: Layer) -> bool:
    """Whether the file that is open as `layer` is a template's volume; False for block devices."""
    return not (layer.is_block or why_no_template(layer))


def why_no_template(layer: Layer) -> str:
    """Why the open file `layer` is no template's volume, a word of `uncached.REASONS`; "" if it is one."""
    path = os.readlink(f"/proc/self/fd/{layer.fd}")
    data = _read(f"{path}.meta")
    if data is None:
        return uncached.NO_METADATA
    told = _parse(data)
    if told is None:
        return uncached.METADATA_UNCLEAR
    if told.get("VOLTYPE") != "SHARED":
        return uncached.NO_TEMPLATE
    if told.get("LEGALITY") != "LEGAL":
        return uncached.NOT_LEGAL
    image_id, images = told.get("IMAGE", ""), os.path.dirname(os.path.dirname(path))
    theirs = os.path.join(images, image_id, os.path.basename(path))
    return "" if is_uuid(image_id) and _is_same(layer.fd, theirs) else uncached.NOT_IN_TEMPLATE


def domain_of(layer: Layer) -> str:
    """The storage domain of a block volume: its volume group, "" where the name is none of vdsm's."""
    domain_id, separator, volume_id = layer.dm_name.replace("--", "/").partition("-")
    ids = [each.replace("/", "-") for each in (domain_id, volume_id)]
    return ids[0] if separator and all(map(is_uuid, ids)) else ""


def read_metadata(path: str) -> dict[str, str]:
    """What stands in the metadata of the file volume `path`; {} where there is none, or it is cut off."""
    return _parse(_read(f"{path}.meta") or b"") or {}


def _read(path: str) -> bytes | None:
    """What is in a file, its beginning if it is too long; None if it is none, or cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return os.read(fd, _LIMIT) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except OSError:
        return None
    finally:
        os.close(fd)


def _parse(data: bytes) -> dict[str, str] | None:
    """The keys of volume metadata and their values; None if it is cut off or has a key twice."""
    lines = data.decode(errors="replace").splitlines()
    found = [_LINE.fullmatch(line) for line in lines]
    keys = [match[1] for match in found if match]
    is_whole = "EOF" in lines and len(keys) == len(set(keys))
    return {match[1]: match[2] for match in found if match} if is_whole else None


def _is_same(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except OSError:
        return False
