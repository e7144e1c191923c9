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

from localdisk.hook.sources import Layer
from localdisk.ids import is_uuid

_LIMIT = 64 << 10  # bytes; vdsm's is 512, or 8 KiB from version 5 of storage domains on
_LINE = re.compile(r"([A-Z_]+)=(.*)")


def is_template(layer: Layer) -> bool:
    """Whether the file that is open as `layer` is a template's volume; False for block devices."""
    if layer.is_block:
        return False
    path = os.readlink(f"/proc/self/fd/{layer.fd}")
    told = read_metadata(path)
    image_id = told.get("IMAGE", "")
    if told.get("VOLTYPE") != "SHARED" or told.get("LEGALITY") != "LEGAL" or not is_uuid(image_id):
        return False
    images = os.path.dirname(os.path.dirname(path))
    return _is_same(layer.fd, os.path.join(images, image_id, os.path.basename(path)))


def domain_of(layer: Layer) -> str:
    """The storage domain of a block volume: its volume group, "" where the name is none of vdsm's."""
    domain_id, separator, volume_id = layer.dm_name.replace("--", "/").partition("-")
    ids = [each.replace("/", "-") for each in (domain_id, volume_id)]
    return ids[0] if separator and all(map(is_uuid, ids)) else ""


def read_metadata(path: str) -> dict[str, str]:
    """What stands in the metadata of the file volume `path`; {} where there is none, or it is cut off."""
    try:
        fd = os.open(f"{path}.meta", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return {}
    try:
        data = os.read(fd, _LIMIT) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    except OSError:
        return {}
    finally:
        os.close(fd)
    lines = data.decode(errors="replace").splitlines()
    found = [_LINE.fullmatch(line) for line in lines]
    keys = [match[1] for match in found if match]
    is_whole = "EOF" in lines and len(keys) == len(set(keys))
    return {match[1]: match[2] for match in found if match} if is_whole else {}


def _is_same(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except OSError:
        return False
