"""Whether a volume is a template's, by the storage domain's own metadata; on any doubt it is not.

File storage: beside each volume is its metadata file `<volume>.meta`, with lines KEY=VALUE and a last line
`EOF` (vdsm, storage/volumemetadata.py).  A template's volume has VOLTYPE=SHARED, and IMAGE is the template's
image; images made from the template have hard links to the volume and its metadata file.  A snapshot, which
may be merged later, has VOLTYPE=INTERNAL.

Block storage: the tag IU_ of a volume names the image for which it was made (vdsm, storage/blockVolume.py).
Only root can read tags; `helper/cache.py` does.
"""

from __future__ import annotations

import os
import re
import stat

from localdisk import uncached
from localdisk.hook.sources import Layer
from localdisk.ids import is_uuid

_LIMIT = 64 << 10  # bytes; vdsm's is 512, or 8 KiB from version 5 of storage domains on
_LINE = r"([A-Z_]+)=(.*)"


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
    """The storage domain of a block volume, which is its volume group; "" if the names are not vdsm's."""
    domain_id, separator, volume_id = layer.dm_name.replace("--", "/").partition("-")
    ids = [each.replace("/", "-") for each in (domain_id, volume_id)]
    return ids[0] if separator and all(map(is_uuid, ids)) else ""


def read_metadata(path: str) -> dict[str, str]:
    """The metadata of the file volume `path`; {} if there are none, or the file is incomplete."""
    return _parse(_read(f"{path}.meta") or b"") or {}


def _read(path: str) -> bytes | None:
    """The first _LIMIT bytes of a file; None if it is no regular file, or cannot be read."""
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
    """The keys of volume metadata and their values; None if the text is incomplete or has a key twice."""
    lines = data.decode(errors="replace").splitlines()
    found = [re.fullmatch(_LINE, line) for line in lines]
    keys = [match[1] for match in found if match]
    is_whole = "EOF" in lines and len(keys) == len(set(keys))
    return {match[1]: match[2] for match in found if match} if is_whole else None


def _is_same(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except OSError:
        return False
