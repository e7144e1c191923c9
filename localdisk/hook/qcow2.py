"""Reads the header of a qcow2 image with our own code: no tool probes the image.

The format is docs/interop/qcow2.txt of QEMU.
"""

from __future__ import annotations

import struct

from localdisk.frozen import field, frozen
from localdisk.hook.fingerprint import Tables
from localdisk.units import MAX_DISK

SECTOR = 512
HEADER_BYTES = 64 * 1024  # header, extensions and backing name lie in the first cluster

_MAGIC = b"QFI\xfb"
_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")  # magic … snapshots_offset: 72 bytes, all of version 2
_FEATURES = struct.Struct(">QQQII")  # version 3: features, refcount_order, header_length
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT = 0xE2792ACA
_COMPRESSION_TYPE, _EXTENDED_L2 = 1 << 3, 1 << 4
_CONVERT = "convert it with qemu-img convert -f qcow2 -O qcow2 and put the result in its place"
_REPAIR = "if no VM on any host uses it, repair it as user vdsm with qemu-img check -f qcow2 -r all"
_REFUSED_FEATURES = {
    # Of a dirty image only the reference counts may be wrong; of a corrupt image anything (qcow2.txt).
    1 << 0: ("it was not closed properly", f"{_REPAIR}; it corrects reference counts, no data of the guest"),
    1 << 1: ("it is marked corrupt", f"{_REPAIR}, or restore it"),
    1 << 2: ("it has an external data file", _CONVERT),
}
# If we do not know a feature, the host's qemu-img often cannot open the image, either, and so not convert it.
_UNKNOWN = f"restore it; if qemu-img info opens it, or a newer one elsewhere does, {_CONVERT}"


@frozen
class Header:
    """The fields of a qcow2 header that we use; `virtual_size` in bytes; absent names are ""."""

    virtual_size: int
    backing_name: str
    backing_format: str
    tables: Tables = field(default=Tables(), compare=False)

    @classmethod
    def parse(cls, data: bytes) -> Header:
        """The header in the first 64 KiB of an image.  Raises ValueError with (problem, fix)."""
        if len(data) < _FIXED.size or not data.startswith(_MAGIC):
            raise ValueError("it is no qcow2 image, but vdsm or its child says so", "restore the volume")
        fields = _FIXED.unpack_from(data)
        version, backing_offset, backing_size, cluster_bits, size = fields[1:6]
        crypt_method, l1_size, l1_at, refcounts_at, refcount_clusters, snapshots = fields[6:12]
        if version not in (2, 3):
            raise ValueError(f"qcow2 version {version} is not known", _UNKNOWN)
        if crypt_method:
            fix = "decrypt it with qemu-img convert --object secret,id=NAME,file=KEY --image-opts"
            raise ValueError("it is encrypted", fix)
        if snapshots:
            raise ValueError("it has internal snapshots", "remove each with qemu-img snapshot -d NAME")
        if not 9 <= cluster_bits <= 21:
            raise ValueError(f"its cluster size is 2^{cluster_bits}", "restore the volume")
        if size % SECTOR or not 0 < size <= MAX_DISK:
            fix = "set it to whole 512 bytes, at most 64 TiB, with qemu-img resize -f qcow2 --shrink"
            raise ValueError(f"its virtual size is {size} bytes", fix)
        header_length = _header_length(version, data)
        return cls(
            virtual_size=size,
            backing_name=_backing_name(data, backing_offset, backing_size, 1 << cluster_bits),
            backing_format=_backing_format(data, header_length, backing_offset or 1 << cluster_bits),
            tables=Tables(
                cluster=1 << cluster_bits,
                l1=(l1_at, 8 * l1_size),
                refcounts=(refcounts_at, refcount_clusters << cluster_bits),
            ),
        )


def _header_length(version: int, data: bytes) -> int:
    if version == 2:
        return _FIXED.size
    if len(data) < _FIXED.size + _FEATURES.size:
        raise ValueError("its header is cut off", "restore the volume")
    incompatible, _, _, _, length = _FEATURES.unpack_from(data, _FIXED.size)
    for bit, refusal in _REFUSED_FEATURES.items():
        if incompatible & bit:
            raise ValueError(*refusal)
    unknown = incompatible & ~(_COMPRESSION_TYPE | _EXTENDED_L2)
    if unknown:
        raise ValueError(f"it needs unknown features {unknown:#x}", _UNKNOWN)
    if not _FIXED.size + _FEATURES.size <= length <= len(data) or length % 8:
        raise ValueError(f"its header length is {length}", "restore the volume")
    return int(length)


def _backing_name(data: bytes, offset: int, size: int, cluster: int) -> str:
    if not offset:
        return ""
    if not 0 < size <= 1023 or offset + size > min(cluster, len(data)):
        raise ValueError("its backing file name lies outside the header", "restore the volume")
    return data[offset : offset + size].decode("utf-8", "backslashreplace")


def _backing_format(data: bytes, offset: int, end: int) -> str:
    """The value of the backing format's header extension between `offset` and `end`, "" if there is none."""
    while offset + _EXTENSION.size <= min(end, len(data)):
        kind, length = _EXTENSION.unpack_from(data, offset)
        offset += _EXTENSION.size
        if kind == 0:
            break
        if offset + length > min(end, len(data)):
            raise ValueError("a header extension is longer than the header", "restore the volume")
        if kind == _BACKING_FORMAT:
            return data[offset : offset + length].decode("ascii", "backslashreplace")
        offset += -(-length // 8) * 8
    return ""
