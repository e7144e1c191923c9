"""A VM's disks as vdsm and libvirt describe them, and the rules for each disk.

`disk_json.py` and `domain_xml.py` read disks from input that nobody has checked yet.  If a rule here is
broken, they raise BadDiskData or BadDomain.

Ambiguous input is refused, because a wrong guess means a wrong disk:
- two disks with one target name, or with one volume; two metadata devices with one name;
- an imageID without volumeID, or the reverse; a serial that is another UUID than the imageID (a serial that
  is no UUID was set by an administrator, and is ignored);
- a disk without imageID and volumeID that looks like an image: its serial is an imageID in the metadata of
  another disk, or its path is in a place where vdsm keeps images.  If it were not treated as an image, it
  would run from shared storage, and nobody would notice.
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
IMAGE_PATH = rf"/({_UUID})/({_UUID})\Z"  # at the end of every path of a vdsm image
# The path of a local disk: a logical volume of a group whose name is no UUID.  The group of a storage domain
# has a UUID as its name.
_LOCAL_DISK = rf"/dev/(?!(?:{_UUID}|mapper|disk)/)[^/]+/{_UUID}"
_LOCAL_PATH = r"/[A-Za-z0-9_+.:@/-]+"  # characters of LVM's names; none must be escaped in XML
_UNFIT = r"[\x00-\x1f\x7f\ud800-\udfff]"  # in a path: control characters, lone surrogates


@frozen
class Volume:
    """One volume of an image directory, as vdsm names it; `volume_id` is a canonical UUID."""

    volume_id: str
    path: str


@frozen
class Disk:
    """One disk of a VM, in vdsm's words.

    name       target device, "vda"; "" if the JSON does not have it
    device     one of DEVICES
    path       of the leaf; a path on the host, or "volume/…/leaf" for a network disk; "" for an empty drive
    format     "raw" or "cow" for a vdsm image; another device may have any word of libvirt's, or ""
    disk_type  "file", "block" or "network" for a vdsm image; another device may have any word of libvirt's
    image_id, volume_id  canonical UUIDs; both "" if the disk is no image of vdsm's (LUN, Ceph, ISO file)
    shared     one of SHARED
    volumes    every volume of the image directory, the template's included, in no particular order
    domain_id  canonical UUID of the storage domain that all volumes are in, "" if it is not given
    storage_type  the kind of storage by vdsm's word: "file", "block" or "network"; "" if it is not given
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
        """Whether vdsm read this disk from a domain in which the disk was local.

        Then it has the type of a block device although its storage has none, and its path is again the one
        on shared storage.
        """
        is_shared_path = self.path.endswith(f"/{self.image_id}/{self.volume_id}")
        return is_shared_path and self.disk_type == "block" and self.storage_type not in ("", "block")

    @property
    def is_vdsm_image(self) -> bool:
        """Whether this is a disk (no CD-ROM, floppy, LUN) whose content is a volume of vdsm's."""
        return self.device == "disk" and bool(self.image_id and self.volume_id)

    @property
    def is_local(self) -> bool:
        """Whether its path is a local disk's; the present configuration does not matter."""
        return self.disk_type == "block" and is_local_path(self.path)


class RefusedError(Exception):
    """Why a text is refused; `refused_as` turns it into an error of errors.py."""


@contextmanager
def refused_as(error: type[BadDiskData] | type[BadDomain]) -> Iterator[None]:
    try:
        yield
    except RefusedError as problem:
        raise error(problem=problem) from None
    except RecursionError:  # from reading or writing JSON
        raise error(problem="it nests too deeply") from None


def is_local_path(path: str) -> bool:
    """Whether it is a local disk's path; the present configuration does not matter."""
    return re.fullmatch(_LOCAL_DISK, path) is not None


def check_size(text: str) -> None:
    if len(text) > DATA_LIMIT:
        raise RefusedError(f"it is longer than {DATA_LIMIT} characters")


def check_disk(disk: Disk, serial: str, images: Iterable[str] = ()) -> None:
    """Refuse a disk that has only one of the ids or looks like an image; `images` are all known ids."""
    if bool(disk.image_id) != bool(disk.volume_id):
        raise RefusedError(f"disk {disk.name} has only one of imageID and volumeID")
    if disk.is_vdsm_image:
        _check_image(disk, serial)
    elif disk.device == "disk" and (re.search(IMAGE_PATH, disk.path) or serial.lower() in images):
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
    if not re.fullmatch(_LOCAL_PATH, path):
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
    """The canonical imageID and volumeID of a disk; both "" for a LUN and a managed block disk.

    In the metadata of a running VM, such a device has its GUID as its imageID, and no volumeID (get_metadata
    of vdsm's lib/vdsm/virt/vmdevices/storagexml.py).
    """
    if guid and image_id == guid and not volume_id:
        return "", ""
    return uuid_or_nothing("imageID", image_id), uuid_or_nothing("volumeID", volume_id)


def uuid_or_nothing(what: str, text: str) -> str:
    """`text` in lower case, a canonical UUID or ""; refuses other text."""
    if text and not is_uuid(text.lower()):
        raise RefusedError(f"{what} is '{text}', not a UUID")
    return text.lower()


def known_device(word: str) -> str:
    if word not in DEVICES:
        raise RefusedError(f"a disk's device is '{word}', none of {', '.join(DEVICES)}")
    return word


def known_shared(value: object) -> str:
    """The word of SHARED for a word or truth value that vdsm accepts (older engines send "true")."""
    word = str(value).lower() if isinstance(value, (str, bool)) else "of the wrong type"
    if word == "true":
        return "shared"
    if word not in SHARED:
        raise RefusedError(f"shared is '{word}', none of {', '.join(SHARED)}")
    return word


def fit_path(path: str) -> str:
    if re.search(_UNFIT, path):
        raise RefusedError(f"the path '{path}' holds control characters")
    return path
