"""A VM's disks as vdsm and libvirt name them, and what must hold for each of them.

`disk_json.py` and `domain_xml.py` read them from input that nobody has checked, and raise BadDiskData or
BadDomain for what is refused here.

Ambiguity is refused, because guessing wrong means the wrong disk:
- two disks with one target name, or with one volume; two metadata devices with one name;
- an imageID without volumeID or the reverse; a serial that is another UUID than the imageID (a serial that
  is no UUID is the administrator's and says nothing);
- a disk without identity that looks like an image: its serial is the imageID of another name's metadata, or
  its path is where vdsm keeps images.  Taken for no image it would silently run from shared storage.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from localdisk.errors import BadDiskData, BadDomain
from localdisk.frozen import frozen
from localdisk.ids import is_uuid
from localdisk.vdsm.hook_call import DATA_LIMIT

DEVICES = ("disk", "cdrom", "floppy", "lun")  # libvirt's, and vdsm's DRIVE device
SHARED = ("none", "false", "exclusive", "shared", "transient")
TYPES = ("file", "block", "network")  # libvirt's, of the storage of an image

_UUID = "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
IMAGE_PATH = re.compile(rf"/({_UUID})/({_UUID})\Z")  # at the end of every path of a vdsm image
# A local disk as vdsm has it: a logical volume of a group whose name is no UUID, as a storage domain's is.
_LOCAL_DISK = re.compile(rf"/dev/(?!(?:{_UUID}|mapper|disk)/)[^/]+/{_UUID}")
_LOCAL_PATH = re.compile(r"/[A-Za-z0-9_+.:@/-]+")  # what LVM can name; nothing that XML would have to escape
_UNFIT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # in a path: control characters, halves of characters


@frozen
class Volume:
    """One volume of an image directory, as vdsm names it; `volume_id` is a canonical UUID."""

    volume_id: str
    path: str


@frozen
class Disk:
    """One disk of a VM, in vdsm's words.

    name       target device, "vda"; "" where the JSON does not tell
    device     one of DEVICES
    path       of the leaf; a path on the host, or "volume/…/leaf" for a network disk; "" for an empty drive
    format     "raw" or "cow" for a vdsm image; another device may have any word of libvirt's, or ""
    disk_type  "file", "block" or "network" for a vdsm image; another device may have any word of libvirt's
    image_id, volume_id  canonical UUIDs, or both "" for what is no image of vdsm's (LUN, Ceph, ISO file)
    shared     one of SHARED
    volumes    every volume of the image directory, the template's included, in no particular order
    domain_id  canonical UUID of the storage domain that all of them are in, "" where it is not told
    storage_type  what kind of storage vdsm names: "file", "block" or "network"; "" if it names none
    """

    name: str
    device: str
    path: str
    format: str
    disk_type: str
    image_id: str
    volume_id: str
    shared: str
    volumes: tuple[Volume, ...]
    domain_id: str = ""
    storage_type: str = ""

    @property
    def was_local(self) -> bool:
        """Whether vdsm read this disk from a domain in which it was local.

        It is a block device then, of storage without block devices, and its path is the shared one again.
        """
        is_shared_path = self.path.endswith(f"/{self.image_id}/{self.volume_id}")
        return is_shared_path and self.disk_type == "block" and self.storage_type not in ("", "block")

    @property
    def is_vdsm_image(self) -> bool:
        """Whether this is a disk (no CD-ROM, floppy, LUN) whose content is a volume of vdsm's."""
        return self.device == "disk" and bool(self.image_id and self.volume_id)

    @property
    def is_local(self) -> bool:
        """Whether its path is a local disk's, whatever the configuration says now."""
        return self.disk_type == "block" and is_local_path(self.path)


class RefusedError(Exception):
    """Why the text at hand is not acted on; the border of the module turns it into one of errors.py."""


@contextmanager
def refused_as(error: type[BadDiskData] | type[BadDomain]) -> Iterator[None]:
    try:
        yield
    except RefusedError as problem:
        raise error(problem=problem) from None
    except RecursionError:  # from reading or writing JSON
        raise error(problem="it nests too deeply") from None


def is_local_path(path: str) -> bool:
    """Whether it is a local disk's, whatever the configuration says now."""
    return _LOCAL_DISK.fullmatch(path) is not None


def check_size(text: str) -> None:
    if len(text) > DATA_LIMIT:
        raise RefusedError(f"it is longer than {DATA_LIMIT} characters")


def check_disk(disk: Disk, serial: str, images: Iterable[str] = ()) -> None:
    """Refuses a disk that is half an image of vdsm's or looks like one; `images` are all that are known."""
    if bool(disk.image_id) != bool(disk.volume_id):
        raise RefusedError(f"disk {disk.name} has only one of imageID and volumeID")
    if disk.is_vdsm_image:
        _check_image(disk, serial)
    elif disk.device == "disk" and (IMAGE_PATH.search(disk.path) or serial.lower() in images):
        raise RefusedError(f"disk {disk.name} looks like an image of vdsm's but has no imageID and volumeID")


def _check_image(disk: Disk, serial: str) -> None:
    if disk.format not in ("raw", "cow"):
        raise RefusedError(f"the format of disk {disk.name} is '{disk.format}', neither raw nor cow (qcow2)")
    if disk.disk_type not in TYPES:
        raise RefusedError(f"the type of disk {disk.name} is '{disk.disk_type}', not file, block or network")
    if disk.disk_type != "network" and not disk.path.startswith("/"):
        raise RefusedError(f"the path of disk {disk.name} is '{disk.path}', not absolute")
    if is_uuid(serial.lower()) and serial.lower() != disk.image_id:
        raise RefusedError(f"the serial of disk {disk.name} is {serial}, its imageID {disk.image_id}")


def check_can_be_local(disk: Disk, path: str) -> None:
    if disk.device != "disk" or disk.disk_type not in ("file", "block"):
        kind = f"{disk.device} of type '{disk.disk_type}'"
        raise RefusedError(f"disk {disk.name} is a {kind} and cannot be made local")
    if not _LOCAL_PATH.fullmatch(path):
        raise RefusedError(f"'{path}' is not the path of a local disk")


def refuse_twice(what: str, names: Iterable[str | None]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise RefusedError(f"it has {what} {twice[0]} twice")


def volumes_of(pairs: Iterable[tuple[str, str]]) -> tuple[Volume, ...]:
    volumes = tuple(
        Volume(uuid_or_nothing("volumeID", volume_id), fit_path(path)) for volume_id, path in pairs
    )
    if not all(volume.volume_id and volume.path for volume in volumes):
        raise RefusedError("volumeChain has a volume without volumeID or path")
    refuse_twice("volume", (volume.volume_id for volume in volumes))
    return volumes


def image_and_volume(image_id: str, volume_id: str, guid: str) -> tuple[str, str]:
    """The canonical imageID and volumeID of a disk, both "" for a LUN and a managed block disk.

    In the metadata of a VM that runs, vdsm repeats the GUID of such a device as its imageID, without volumeID
    (get_metadata of vdsm's lib/vdsm/virt/vmdevices/storagexml.py).
    """
    if guid and image_id == guid and not volume_id:
        return "", ""
    return uuid_or_nothing("imageID", image_id), uuid_or_nothing("volumeID", volume_id)


def uuid_or_nothing(what: str, text: str) -> str:
    """`text` in lower case, which is a canonical UUID or ""."""
    if text and not is_uuid(text.lower()):
        raise RefusedError(f"{what} is '{text}', not a UUID")
    return text.lower()


def known_device(word: str) -> str:
    if word not in DEVICES:
        raise RefusedError(f"a disk's device is '{word}', none of {', '.join(DEVICES)}")
    return word


def known_shared(value: object) -> str:
    """One of SHARED for the words and truth values that vdsm knows (older engines send "true")."""
    word = str(value).lower() if isinstance(value, (str, bool)) else "of the wrong type"
    if word == "true":
        return "shared"
    if word not in SHARED:
        raise RefusedError(f"shared is '{word}', none of {', '.join(SHARED)}")
    return word


def fit_path(path: str) -> str:
    if _UNFIT.search(path):
        raise RefusedError(f"the path '{path}' holds control characters")
    return path
