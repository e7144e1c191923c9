"""The source of a local disk: its layers, opened once, and the guest's view of them.

No format is probed.  vdsm names the format of the leaf; the qcow2 header of each layer (`qcow2.py`) names its
parent and the parent's format, and the parent must be a volume that vdsm has named.  Each layer is opened
once: header, fingerprint and copy use the same descriptor, so nobody can replace the file in between.
qemu-img gets the layers as an explicit tree of nodes.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from localdisk import device_mapper, run
from localdisk.errors import CommandFailed, SourceRefused
from localdisk.frozen import frozen
from localdisk.hook.fingerprint import Tables, digest, forget_pages, is_empty, read_identity
from localdisk.hook.qcow2 import HEADER_BYTES, SECTOR, Header
from localdisk.ids import is_uuid
from localdisk.units import MAX_DISK
from localdisk.vdsm.disks import Disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_LAYERS = 64

_REPLACED = "find out who put it there (ls -l, readlink -f), then restore the volume"
_LARGEST_CLUSTER = 2 << 20  # bytes; qcow2 has no larger ones
# A forged image can make a tool use memory or processor time without end.
_LIMITS = {"AS": 2 << 30, "CPU": 600, "CORE": 0}  # bytes, seconds, bytes


@frozen
class Layer:
    """One opened volume of the chain; `virtual_size` is its size in bytes as a guest would see it."""

    path: str
    format: str  # raw | qcow2, qemu's words
    fd: int
    is_block: bool
    virtual_size: int
    identity: str  # changes when the volume's content may have changed
    tables: Tables | None = None  # of a qcow2 layer
    is_empty: bool = False  # it has no data, and shows the layer below it

    @property
    def node(self) -> dict[str, Any]:
        """This layer alone as a qemu block node."""
        return {"driver": self.format, "file": _file_node(self.fd, self.is_block)}

    @property
    def dm_name(self) -> str:
        """The device-mapper name of a block volume; "" for a file."""
        return device_mapper.read_name(os.fstat(self.fd).st_rdev) if self.is_block else ""

    @property
    def fingerprint(self) -> str:
        """A hash of its identity: 32 hexadecimal digits."""
        return _fingerprint(self)

    def is_unchanged(self) -> bool:
        """Whether its identity is still the same as when it was opened."""
        try:
            return read_identity(self.fd, _read(self.fd, HEADER_BYTES), self.tables) == self.identity
        except OSError:
            return False


@frozen
class Source:
    """The chain of one disk, leaf first."""

    layers: tuple[Layer, ...]

    @property
    def virtual_size(self) -> int:
        """The size of the guest's view in bytes."""
        return self.layers[0].virtual_size

    @property
    def fds(self) -> tuple[int, ...]:
        return tuple(layer.fd for layer in self.layers)

    @property
    def fingerprint(self) -> str:
        """A hash of the identities of the layers: 32 hexadecimal digits.

        Empty layers at the top are left out: a snapshot adds one, and does not change the guest's view.
        """
        layers = self.layers
        while len(layers) > 1 and layers[0].is_empty and layers[0].virtual_size == layers[1].virtual_size:
            layers = layers[1:]
        return _fingerprint(*layers)

    @property
    def base(self) -> Layer:
        return self.layers[-1]

    @property
    def above(self) -> tuple[Layer, ...]:
        """The layers above the base, leaf first."""
        return self.layers[:-1]

    @property
    def base_alone(self) -> Source:
        return Source(self.layers[-1:])

    @property
    def grows(self) -> bool:
        """Whether no layer is smaller than the layer below it; a smaller layer would hide the end of it."""
        sizes = [layer.virtual_size for layer in self.layers]
        return sizes == sorted(sizes, reverse=True)

    @property
    def filename(self) -> str:
        """The chain as a `json:` file name for qemu-img; valid in a process that has `fds`."""
        return _filename(self.layers, None)

    def filename_on(self, base_fd: int) -> str:
        """The chain with its base replaced by a block device of the same content."""
        size = self.base.virtual_size  # the device may be larger; bytes after this size are not the base's
        return _filename(self.above, {"driver": "raw", "size": size, "file": _file_node(base_fd, True)})

    @property
    def allows_direct_io(self) -> bool:
        return all(_opens_direct(layer.fd) for layer in self.layers)

    def writes(self, chunk: int) -> int:
        """The number of bytes that a copy takes.  Reads the mapping, not the data.

        That is all of a thick volume (`chunk` is 0).  A thin pool gives a volume blocks of `chunk` bytes, a
        multiple of 64 KiB: all blocks in which there are data.  The number is exact if `chunk` is a power of
        two up to 2 MiB, else it may be too large.

        Raises CommandFailed, CommandMissing.
        """
        if not chunk:
            return self.virtual_size
        # Measured for qcow2, because QEMU's raw_measure() counts zeros, too.
        cluster = min(chunk & -chunk, _LARGEST_CLUSTER)  # each is inside of one block of the pool
        options = ["-O", "qcow2", "-o", f"cluster_size={cluster}"]
        argv = ["qemu-img", "measure", "--output", "json", *options, self.filename]
        measure = ("qemu-img", "measure", self.layers[0].path)
        try:
            out = run.run(argv, deadline=3600, pass_fds=self.fds, limits=_LIMITS)
        except CommandFailed as error:
            raise CommandFailed(measure, error.returncode, error.stderr) from None
        try:
            found = json.loads(out)
            left_out = int(found["fully-allocated"]) - int(found["required"])
            if not 0 <= left_out <= self.virtual_size + cluster:
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise CommandFailed(measure, 0, f"it printed {out[:80]!r}") from None
        # Both numbers count the last cluster as a whole.
        clusters = -(-self.virtual_size // cluster) - left_out // cluster
        return max(0, min(self.virtual_size, clusters * chunk))

    def writes_above(self, chunk: int) -> int:
        """The number of bytes that a copy of the layers above the base takes: data and explicit zeros.

        They are written to a thin volume that shares the base's blocks of `chunk` bytes; a block to which
        something is written is shared no more.  A block counts for each layer that has data in it.
        Reads the mapping of the layers.  Raises CommandFailed, CommandMissing.
        """
        return sum(_held_by(layer, chunk) for layer in self.above)


def _held_by(layer: Layer, chunk: int) -> int:
    """Bytes of the blocks in which one layer has data or explicit zeros.

    Raises CommandFailed, CommandMissing.
    """
    with alone(layer) as (filename, fds):
        argv = ["timeout", "3600", "qemu-img", "map", "--output", "json", filename]
        process = run.start_reporting(argv, fds, _LIMITS)
        try:
            assert process.stdout  # noqa: S101 (started with a pipe)
            blocks = count_blocks((_held(line, layer.path) for line in process.stdout), chunk)
            said = run.read_errors(process)
        finally:
            run.end(process)
    if process.returncode in (126, 127):
        raise run.cannot_run("timeout", "qemu-img")
    if process.returncode:
        raise CommandFailed(("qemu-img", "map", layer.path), process.returncode, said)
    return blocks * chunk


def count_blocks(extents: Iterable[tuple[int, int]], chunk: int) -> int:
    """The number of blocks of `chunk` bytes in which there are extents: first byte and length, in order."""
    blocks = end = 0  # `end`: the block after the last one that is counted
    for start, length in extents:
        first, after = max(start // chunk, end), -(-(start + length) // chunk)
        if length and after > first:
            blocks, end = blocks + after - first, after
    return blocks


def _held(line: bytes, path: str) -> tuple[int, int]:
    """First byte and length of the extent in one line of `qemu-img map`; (0, 0) if it is not the layer's own.

    Raises CommandFailed.
    """
    try:
        extent = json.loads(line.strip().strip(b"[],") or b"{}")
        is_held = bool(extent) and extent["depth"] == 0 and extent["present"]
        return (int(extent["start"]), int(extent["length"])) if is_held else (0, 0)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise CommandFailed(("qemu-img", "map", path), 0, f"it printed {line[:80]!r}") from None


@contextmanager
def alone(layer: Layer) -> Iterator[tuple[str, tuple[int, ...]]]:
    """One qcow2 layer as a `json:` file name, with the descriptors that it needs.

    An empty file is its backing file: with none, qemu would report ranges that the layer does not define as
    zeros of the layer.
    """
    below = os.memfd_create("below")
    try:
        os.ftruncate(below, layer.virtual_size)
        # The file is on tmpfs, which may not support O_DIRECT; nothing is read from it.
        node = {"driver": "raw", "file": {**_file_node(below, False), "cache": {"direct": False}}}
        yield _filename((layer,), node), (layer.fd, below)
    finally:
        os.close(below)


def _filename(layers: tuple[Layer, ...], node: dict[str, Any] | None) -> str:
    """Layers, leaf first, on top of a block node, as a `json:` file name for qemu-img."""
    for layer in reversed(layers):
        # A qcow2 layer without a parent gets "backing": null, or qemu would follow the name in its header.
        backing = {"backing": node} if layer.format == "qcow2" else {}
        node = {**layer.node, **backing}
    return "json:" + json.dumps(node)


def _file_node(fd: int, is_block: bool) -> dict[str, Any]:
    return {"driver": "host_device" if is_block else "file", "filename": f"/proc/self/fd/{fd}"}


def _fingerprint(*layers: Layer) -> str:
    text = "\n".join(f"{layer.format} {layer.identity}" for layer in layers)
    return digest(text.encode())[:32]


@contextmanager
def opened_alone(path: str, image_format: str) -> Iterator[Source]:
    """Open one `raw` or `qcow2` volume that has no backing file.  Raises SourceRefused."""
    volume_id = os.path.basename(path)
    disk = Disk("", "disk", path, "", "file", "", volume_id, "none", ())
    with ExitStack() as stack:
        layer, header = _open_layer(disk, path, volume_id, image_format, stack)
        if header and header.backing_name:
            raise SourceRefused(path, "it stands on another volume")
        yield Source((layer,))


@contextmanager
def opened(disk: Disk) -> Iterator[Source]:
    """Open the chain of `disk`, which vdsm has prepared; it is closed at the end.  Raises SourceRefused."""
    with ExitStack() as stack:
        yield Source(tuple(_chain(disk, stack)))


def _chain(disk: Disk, stack: ExitStack) -> Iterator[Layer]:
    """The layers from leaf to base."""
    parents = _Parents(disk)
    path, image_format = disk.path, {"raw": "raw", "cow": "qcow2"}[disk.format]
    volume_id = disk.volume_id
    while True:
        layer, header = _open_layer(disk, path, volume_id, image_format, stack)
        yield layer
        if header is None or not header.backing_name:
            return
        volume_id, path, image_format = parents.next(path, header)


class _Parents:
    """The volumes that may be a parent in the chain: the volumes that vdsm named, each once."""

    def __init__(self, disk: Disk) -> None:
        self._image_id = disk.image_id
        self._paths = {volume.volume_id: volume.path for volume in disk.volumes}
        self._leaf_directory = os.path.dirname(disk.path)
        # Older versions of vdsm name no chain at before_vm_start.  Then every volume in the image's own
        # directory may be a parent: vdsm puts nothing else there.  But the device directory of a storage
        # domain has volumes of other VMs, too.
        is_images_own = os.path.basename(self._leaf_directory) == disk.image_id
        self._any_sibling = not self._paths and is_images_own
        self._seen = {disk.volume_id}

    def next(self, child: str, header: Header) -> tuple[str, str, str]:
        """Volume id, path and format of the parent that `header`, the header of `child`, names."""
        volume_id = self._volume_id(header.backing_name)
        if not is_uuid(volume_id):
            raise SourceRefused(
                child,
                f"its backing file name is {header.backing_name!r}, not a volume of its image",
                "if it is a genuine chain, correct it with qemu-img rebase -u -f qcow2 -b VOLUME -F FORMAT",
            )
        if volume_id not in self._paths and not self._any_sibling:
            raise SourceRefused(child, f"vdsm did not name its backing volume {volume_id}")
        if volume_id in self._seen or len(self._seen) >= MAX_LAYERS:
            raise SourceRefused(
                child,
                f"its chain has a cycle or more than {MAX_LAYERS} layers",
                "delete snapshots of the disk in the engine, or restore the volume",
            )
        if header.backing_format not in ("raw", "qcow2"):
            raise SourceRefused(
                child,
                f"its header gives the backing format {header.backing_format!r}",
                f"set it with qemu-img rebase -u -f qcow2 -b {header.backing_name} -F raw|qcow2, as it is",
            )
        self._seen.add(volume_id)
        path = self._paths.get(volume_id) or os.path.join(self._leaf_directory, volume_id)
        return volume_id, path, header.backing_format

    def _volume_id(self, backing_name: str) -> str:
        """`backing_name` without the prefix `../IMAGE/`, which vdsm wrote until 2016.

        libvirt of that time added the prefix once more at each live merge (bugzilla.redhat.com 1333627).
        """
        own, name = f"../{self._image_id}/", backing_name
        while name.startswith(own):
            name = name[len(own) :]
        return name


def _open_layer(
    disk: Disk, path: str, volume_id: str, image_format: str, stack: ExitStack
) -> tuple[Layer, Header | None]:
    fd = _open(path)
    stack.callback(os.close, fd)
    status = os.fstat(fd)
    is_block = stat.S_ISBLK(status.st_mode)
    if not is_block and not stat.S_ISREG(status.st_mode):
        raise SourceRefused(path, "it is no regular file and no block device", _REPLACED)
    _require_is_volume(disk, path, volume_id, fd, status)
    file_size = os.lseek(fd, 0, os.SEEK_END)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead here; qemu-img opens it again
        if is_block:
            forget_pages(fd)
        start = _read(fd, HEADER_BYTES)
        header = Header.parse(start) if image_format == "qcow2" else None
        tables = header.tables if header else None
        is_upon = header is not None and header.backing_name != ""
        empty = is_upon and tables is not None and is_empty(fd, tables)
        identity = read_identity(fd, start, tables)
    except ValueError as error:
        raise SourceRefused(path, *error.args) from None
    except OSError as error:
        raise SourceRefused(path, error.strerror or "read error", "check the storage") from None
    virtual_size = header.virtual_size if header else -(-file_size // SECTOR) * SECTOR
    if not 0 < virtual_size <= MAX_DISK:
        raise SourceRefused(path, f"its size is {virtual_size} bytes")
    return Layer(path, image_format, fd, is_block, virtual_size, identity, tables, empty), header


def _require_is_volume(disk: Disk, path: str, volume_id: str, fd: int, status: os.stat_result) -> None:
    """Refuse a file or device that is not the volume.

    A user who can write to shared storage could replace a volume by a link to any file that vdsm can read.
    """
    if stat.S_ISBLK(status.st_mode):
        is_volume = _is_volume_name(device_mapper.read_name(status.st_rdev), disk.domain_id, volume_id)
    else:
        is_volume = _is_volume_file(os.readlink(f"/proc/self/fd/{fd}"), disk, path, volume_id)
    if not is_volume:
        raise SourceRefused(path, f"it leads to something else than volume {volume_id}", _REPLACED)


def _is_volume_name(dm_name: str, domain_id: str, volume_id: str) -> bool:
    """Whether this is the device of the logical volume `volume_id` in the volume group `domain_id`.

    device-mapper joins the two names with a dash, and doubles each dash inside of them.
    """
    vg, lv = (name.replace("-", "--") for name in (domain_id, volume_id))
    return dm_name == f"{vg}-{lv}" if domain_id else dm_name.endswith(f"-{lv}")


def _is_volume_file(real: str, disk: Disk, path: str, volume_id: str) -> bool:
    """Whether `real` is the file of the volume, in the image's directory that vdsm names.

    vdsm's own links lead to this directory: a link to the storage domain in /rhev/data-center/POOL/, and a
    link to the image in /run/vdsm/storage/DOMAIN/.
    """
    directory = os.path.realpath(os.path.dirname(path))
    if real != os.path.join(directory, volume_id):
        return False
    # DOMAIN/images/IMAGE/VOLUME below the domain's mount or the pool's link; DOMAIN/IMAGE/VOLUME in /run.
    named = [part for part in path.split("/") if part != "images"][-3:]
    if disk.domain_id and len(named) == 3 and all(map(is_uuid, named)):
        return real.endswith(f"/{disk.domain_id}/images/{disk.image_id}/{volume_id}")
    named_directory = os.path.basename(os.path.dirname(path))
    return not is_uuid(named_directory) or os.path.basename(directory) == named_directory


def _open(path: str) -> int:
    # A link in the place of a file volume is not even opened; vdsm's own links to volumes lead to devices.
    if os.path.islink(path) and not os.path.realpath(path).startswith("/dev/"):
        raise SourceRefused(path, "it is a link to another file", _REPLACED)
    try:
        # O_NONBLOCK: a FIFO in the place of a volume must not make us wait.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        problem = (error.strerror if isinstance(error, OSError) else None) or str(error)
        fix = "check that the shared storage is there and that user vdsm can read it"
        raise SourceRefused(path, problem, fix) from None
    return fd


def _read(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.pread(fd, size - len(data), len(data))
        if not part:
            break
        data += part
    return data


def _opens_direct(fd: int) -> bool:
    """Whether the file can be opened with O_DIRECT: tmpfs and some network file systems refuse it."""
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True
