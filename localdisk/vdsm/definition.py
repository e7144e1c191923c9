"""What vdsm says about a VM's disks, and the same text back with disks on their local paths.

There are two texts: the JSON of one disk (`after_disk_prepare`) and libvirt XML, of a whole domain
(`before_vm_start`) or of one disk (`before_disk_hotplug`, `before_disk_hotunplug`).  All are `str`, as
`vdsm.read_data` returns them, and input that nobody has checked.  The functions are pure and raise
BadDiskData (JSON) or BadDomain (XML).

XML is read with lxml but never written by it: a document that went through a tree has other quotes, other
line ends, other empty elements.  Only the start tags that must change are edited, where they stand in the
text, so that everything else is the same to the byte.

Ambiguity is refused, because guessing wrong means the wrong disk:
- two disks with one target name, or with one volume; two metadata devices with one name;
- an imageID without volumeID or the reverse; a serial that is another UUID than the imageID (a serial that
  is no UUID is the administrator's and says nothing);
- a disk without identity that looks like an image: its serial is the imageID of another name's metadata, or
  its path is where vdsm keeps images.  Taken for no image it would silently run from shared storage.
Metadata that names no disk of the domain is a leftover of an unplugged one, and is passed over.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from localdisk.errors import BadDiskData, BadDomain
from localdisk.frozen import frozen, replace
from localdisk.ids import is_uuid
from localdisk.vdsm.hook_call import DATA_LIMIT

TYPE_CHECKING = False
if TYPE_CHECKING:  # the JSON path must not pay for lxml's import
    from typing import Optional

    from lxml.etree import _Element

    _Attributes = Mapping[str, Optional[str]]  # new values of a start tag's attributes; None removes one
    _Change = Optional[_Attributes]  # of an element; None removes it

DEVICES = ("disk", "cdrom", "floppy", "lun")  # libvirt's, and vdsm's DRIVE device
SHARED = ("none", "false", "exclusive", "shared", "transient")
DIGITS = 4300  # of one number in JSON: Python's own limit where it has one (3.9.14, 3.11)

_VM = "{http://ovirt.org/vm/1.0}"  # vdsm's metadata; the prefix in the text does not matter
_PATH_ATTRIBUTE = {"file": "file", "block": "dev", "network": "name"}  # of <source>, by the disk's type
_FORMAT = {"qcow2": "cow"}  # libvirt's word -> vdsm's, where they differ
_UNCACHED = ("none", "directsync")
# What libvirt accepts for qcow2 alone: attributes of <driver>, and what is inside of <driver> and <source>
# (qemuDomainValidateStorageSource and virDomainDiskDefValidate of libvirt: metadata_cache since 7.0,
# discard_no_unref since 9.5, dataStore, the external data file, since 10.10).
_QCOW2_ATTRIBUTES = ("discard_no_unref",)
_QCOW2_CHILDREN = ("driver/metadata_cache", "source/dataStore")

_UUID = "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_IMAGE_PATH = re.compile(rf"/({_UUID})/({_UUID})\Z")  # at the end of every path of a vdsm image
# A local disk as vdsm has it: a logical volume of a group whose name is no UUID, as a storage domain's is.
_LOCAL_DISK = re.compile(rf"/dev/(?!(?:{_UUID}|mapper|disk)/)[^/]+/{_UUID}")
_LOCAL_PATH = re.compile(r"/[A-Za-z0-9_+.:@/-]+")  # what LVM can name; nothing that XML would have to escape
_UNFIT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # in a path: control characters, halves of characters

_ENCODING = re.compile(r"""\ufeff?<\?xml\s[^>]*?\bencoding\s*=\s*["']([^"']*)["']""", re.ASCII)

# Markup of a document that is known to be well-formed and without DTD: start tags (with a name) and end tags;
# the others stand before them so that a "<" inside of those is not mistaken for a tag.
_MARKUP = re.compile(
    r"""<!--.*?--> | <!\[CDATA\[.*?\]\]> | <\?.*?\?> | (?P<end></[^>]*>)
      | <(?P<name>[^\s/>!?][^\s/>]*) [^>"']* (?: (?:"[^"]*"|'[^']*') [^>"']* )* >""",
    re.ASCII | re.DOTALL | re.VERBOSE,
)
_ATTRIBUTE = re.compile(r"""(?P<name>[^\s=]+)\s*=\s*(?P<value>"[^"]*"|'[^']*')""", re.ASCII)


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


class _RefusedError(Exception):
    """Why the text at hand is not acted on; the border of the module turns it into one of errors.py."""


@contextmanager
def _refused_as(error: type[BadDiskData] | type[BadDomain]) -> Iterator[None]:
    try:
        yield
    except _RefusedError as problem:
        raise error(problem=problem) from None
    except RecursionError:  # from reading or writing JSON
        raise error(problem="it nests too deeply") from None


# -- the JSON of one disk


@_refused_as(BadDiskData)
def read_disk(text: str) -> Disk:
    """The disk in the JSON of `after_disk_prepare`.

    It is bare, as vdsm sends it, or the value of the only key `disk`, as vdsm's manual page says.  Raises
    BadDiskData for text that is not one JSON object, names a key twice, nests too deeply, or holds a number
    that is not finite or has more than DIGITS digits; for values of the wrong type; for IDs that are no UUIDs
    (upper case is accepted); and for what the module's docstring lists.
    """
    return _disk_from_json(_disk_object(_load(text)))


@_refused_as(BadDiskData)
def localize_disk(text: str, path: str) -> str:
    """`text` with the disk being the raw block device `path`, which one VM uses exclusively.

    `path`, `format`, `diskType` and `shared` get new values; every other key, its value, the order and the
    wrapping stay.  vdsm refuses live snapshot, live storage migration and unplugging of a disk that is shared
    "exclusive" and whose volumes have leases (vdsm, vmdevices/storage.py, `Drive.hasVolumeLeases`): each of
    them would take the running VM away from its local disk.

    The text is written as vdsm writes it (`json.dumps`), so white space is not kept.  Raises BadDiskData as
    `read_disk`, and for what cannot be made local: no disk, or neither file nor block.
    """
    data = _load(text)
    inner = _disk_object(data)
    _check_can_be_local(_disk_from_json(inner), path)
    inner.update(path=path, format="raw", diskType="block", shared="exclusive")
    return json.dumps(data)


def _load(text: str) -> dict[str, object]:
    _check_size(text)
    try:
        data = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except json.JSONDecodeError as error:
        raise _RefusedError(f"not JSON, {error}") from None
    if not isinstance(data, dict):
        raise _RefusedError("it is not a JSON object")
    return data


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) < len(pairs):
        _refuse_twice("key", (key for key, _ in pairs))
    return data


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise _RefusedError(f"it holds a number of more than {DIGITS} digits")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise _RefusedError(f"it holds the number {number}")
    return value


def _disk_object(data: dict[str, object]) -> dict[str, object]:
    inner = data.get("disk")
    if not isinstance(inner, dict):
        return data
    if len(data) > 1:
        raise _RefusedError("it holds other keys beside an object 'disk'")
    return inner


def _disk_from_json(data: Mapping[str, object]) -> Disk:
    image_id, volume_id = _image_and_volume(
        _string(data, "imageID"), _string(data, "volumeID"), _string(data, "GUID")
    )
    disk = Disk(
        name=_string(data, "name"),
        device=_device(_string(data, "device")),
        path=_path(_string(data, "path")),
        format=_string(data, "format"),
        disk_type=_string(data, "diskType"),
        image_id=image_id,
        volume_id=volume_id,
        shared=_shared(data.get("shared", "none")),
        volumes=_volumes(_volume_strings(data.get("volumeChain", []))),
        domain_id=_uuid("domainID", _string(data, "domainID")),
        storage_type=_storage_type(data.get("volumeInfo")),
    )
    _check_disk(disk, _string(data, "serial"))
    return disk


def _storage_type(volume_info: object) -> str:
    return _string(volume_info, "type") if isinstance(volume_info, dict) else ""


def _string(data: Mapping[str, object], key: str) -> str:
    value = data.get(key, "")
    if not isinstance(value, str):
        raise _RefusedError(f"{key} is of type {type(value).__name__}, not a string")
    return value


def _volume_strings(chain: object) -> Iterator[tuple[str, str]]:
    if not isinstance(chain, list):
        raise _RefusedError("volumeChain is not a list")
    for volume in chain:
        if not isinstance(volume, dict):
            raise _RefusedError("volumeChain holds something that is not an object")
        yield _string(volume, "volumeID"), _string(volume, "path")


# -- libvirt's XML


@_refused_as(BadDomain)
def read_domain(xml: str) -> tuple[str, tuple[Disk, ...]]:
    """The UUID of the domain in `xml` and its disks in their order, with their identity from vdsm's metadata.

    Raises BadDomain for text that is not a well-formed `<domain>` with a UUID, has a DTD, declares another
    encoding than UTF-8, goes past the parser's limits (depth 256, text of 10 MB, DATA_LIMIT as a whole), and
    for the ambiguities that the module's docstring lists.
    """
    root = _parse(xml, "domain")
    uuid = _uuid("the domain's uuid", _child_text(root, "uuid"))
    if not uuid:
        raise _RefusedError("the domain has no uuid")
    return uuid, tuple(disk for _, disk in _disks(root))


@_refused_as(BadDomain)
def localize_domain(xml: str, paths: Mapping[str, str]) -> str:
    """`xml` with each disk that `paths` names (target name -> local path) being a raw block device there.

    What changes of such a disk: `type` is "block"; `<source>` has `dev`, no `file`, and keeps its children;
    `<driver>` has `type="raw"`, and `io="native"` where its cache is "none" or "directsync"; what libvirt
    accepts for qcow2 alone (_QCOW2_ATTRIBUTES, _QCOW2_CHILDREN) is removed.  With another
    cache, or none named, io stays as it is: qemu does native I/O only past the host's page cache and refuses
    to start otherwise ("aio=native was specified, but it requires cache.direct=on"); without a name qemu
    uses the page cache.  The engine names the cache: "none", or a VM's property viodiskcache.  A disk
    without `<driver>` is raw to libvirt and gets none.

    Everything else is the same to the byte.  Doing it twice is doing it once.  Raises BadDomain as
    `read_domain`, and for a name that the domain does not have or a disk that cannot be made local: no disk,
    neither file nor block, without source, or with the backing chain or mirror of a running VM.
    """
    root = _parse(xml, "domain")
    disks = {disk.name: (element, disk) for element, disk in _disks(root)}
    changes: dict[_Element, _Change] = {}
    for name, path in paths.items():
        if name not in disks:
            raise _RefusedError(f"it has no disk {name}")
        element, disk = disks[name]
        _check_can_be_local(disk, path)
        changes.update(_local_attributes(element, path))
        changes.update({child: None for tag in _QCOW2_CHILDREN for child in element.findall(tag)})
    return _edited(xml, root, changes)


@frozen
class Running:
    """A VM that runs, from the domain XML that libvirt has of it."""

    vm_id: str
    name: str
    property_value: str  # of the custom property localdisk, "" where it has none
    disks: tuple[Disk, ...]
    backing: tuple[tuple[str, str], ...]  # disk name and path of what is below its top layer, as qemu has it


@_refused_as(BadDomain)
def read_running(xml: str) -> Running:
    """The VM of libvirt's live domain XML.  Raises BadDomain as `read_domain`.

    vdsm writes custom properties to `<ovirt-vm:vm><ovirt-vm:custom>` (vdsm, tests/virt/metadata_test.py).
    """
    root = _parse(xml, "domain")
    (custom,) = root.findall(f"metadata/{_VM}vm/{_VM}custom")[:1] or (None,)
    return Running(
        vm_id=_uuid("the domain's uuid", _child_text(root, "uuid")),
        name=_child_text(root, "name"),
        property_value="" if custom is None else _child_text(custom, f"{_VM}localdisk"),
        disks=tuple(disk for _, disk in _disks(root)),
        backing=tuple(_backing(root)),
    )


@_refused_as(BadDomain)
def read_ran_from(xml: str, is_live: bool) -> tuple[tuple[str, str], ...]:
    """Image id and path of each vdsm image that a VM has run from, by the domain XML that is left of it.

    `is_live`: only what the XML shows to be of a VM that ran; vdsm hands over the engine's if a start was
    refused.  An image that has no id that can be read is left out.  Raises BadDomain as `read_domain`.
    """
    root = _parse(xml, "domain")
    return tuple(
        (image_id, path)
        for element in root.findall("devices/disk")
        if element.get("device", "disk") == "disk"
        for image_id, path in [(_image_of(root, element), _source_path(element, element.get("type", "")))]
        if image_id and path and (not is_live or _has_run(element))
    )


def is_local_path(path: str) -> bool:
    """Whether it is a local disk's, whatever the configuration says now."""
    return _LOCAL_DISK.fullmatch(path) is not None


def _has_run(element: _Element) -> bool:
    """libvirt numbers the sources of a domain that is active, and shows what is below them."""
    return element.find("source[@index]") is not None or element.find("backingStore") is not None


def _image_of(root: _Element, element: _Element) -> str:
    """The image id of a disk from vdsm's metadata or, as vdsm makes it, its serial; "" if there is none."""
    name = _target(element)
    found = root.findall(f"metadata/{_VM}vm/{_VM}device[@devtype='disk']")
    texts = [device.findtext(f"{_VM}imageID") for device in found if device.get("name") == name]
    ids = [(text or "").strip().lower() for text in (*texts, element.findtext("serial"))]
    return next(filter(is_uuid, ids), "")


def _backing(root: _Element) -> Iterator[tuple[str, str]]:
    for element in root.findall("devices/disk"):
        for source in element.iterfind(".//backingStore/source"):
            yield _target(element), source.get("dev") or source.get("file") or ""


@_refused_as(BadDomain)
def read_disk_element(xml: str) -> Disk:
    """The disk in the XML of `before_disk_hotplug` and `before_disk_hotunplug`, one `<disk>` element.

    It comes without metadata.  A disk whose path ends in `/<image or storage domain>/<volume>` is a vdsm
    image: its volume is the last part, its image is its serial, or where that is no UUID the part before.
    """
    element = _parse(xml, "disk")
    disk, serial = _disk_from_xml(element, _NO_IDENTITY), _child_text(element, "serial")
    place = _IMAGE_PATH.search(disk.path)
    if place:
        image_id = serial if is_uuid(serial.lower()) else place[1]
        disk = replace(disk, image_id=image_id.lower(), volume_id=place[2].lower())
    _check_disk(disk, serial)
    return disk


def _parse(xml: str, root_tag: str) -> _Element:
    from lxml import etree

    _check_size(xml)
    declared = _ENCODING.match(xml)
    if declared and declared[1].lower() not in ("utf-8", "us-ascii", "ascii"):
        raise _RefusedError(f"it says that its encoding is {declared[1]}, vdsm's is UTF-8")
    parser = etree.XMLParser(
        encoding="utf-8", resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False
    )
    try:
        root = etree.fromstring(xml.encode("utf-8"), parser)
    except etree.XMLSyntaxError as error:
        raise _RefusedError(f"not XML, {' '.join(str(error.msg).split())}") from None
    except UnicodeEncodeError:
        raise _RefusedError("not XML, it holds half a character") from None
    if root.getroottree().docinfo.internalDTD is not None:
        raise _RefusedError("it has a document type declaration")
    if root.tag != root_tag:
        raise _RefusedError(f"it is a <{root.tag}>, not a <{root_tag}>")
    return root


def _disks(root: _Element) -> list[tuple[_Element, Disk]]:
    """Every disk of the domain `root` with its element, checked."""
    metadata = _metadata(root)
    images = {identity.image_id for identity in metadata.values() if identity.image_id}
    disks = []
    for element in root.findall("devices/disk"):
        disk = _disk_from_xml(element, metadata.get(_target(element), _NO_IDENTITY))
        _check_disk(disk, _child_text(element, "serial"), images)
        disks.append((element, disk))
    _refuse_twice("disk", (disk.name for _, disk in disks))
    _refuse_twice("volume", (disk.volume_id for _, disk in disks if disk.is_vdsm_image))
    return disks


@frozen
class _Identity:
    """What vdsm's metadata says about one disk; the fields are those of Disk."""

    image_id: str
    volume_id: str
    shared: str
    volumes: tuple[Volume, ...]
    domain_id: str


_NO_IDENTITY = _Identity("", "", "none", (), "")


def _metadata(root: _Element) -> dict[str, _Identity]:
    devices = root.findall(f"metadata/{_VM}vm/{_VM}device[@devtype='disk'][@name]")
    _refuse_twice("metadata of disk", (device.get("name") for device in devices))
    return {device.get("name", ""): _identity(device) for device in devices}


def _identity(device: _Element) -> _Identity:
    nodes = device.findall(f"{_VM}volumeChain/{_VM}volumeChainNode")
    image_id, volume_id = _image_and_volume(
        *(_child_text(device, f"{_VM}{key}") for key in ("imageID", "volumeID", "GUID"))
    )
    return _Identity(
        image_id=image_id,
        volume_id=volume_id,
        shared=_shared(_child_text(device, f"{_VM}shared") or "none"),
        volumes=_volumes((_child_text(n, f"{_VM}volumeID"), _child_text(n, f"{_VM}path")) for n in nodes),
        domain_id=_uuid("domainID", _child_text(device, f"{_VM}domainID")),
    )


def _disk_from_xml(element: _Element, identity: _Identity) -> Disk:
    disk_type = element.get("type", "file")
    driver = _only(element, "driver")
    format_ = "raw" if driver is None else driver.get("type", "raw")
    return Disk(
        name=_target(element),
        device=_device(element.get("device", "disk")),
        path=_path(_source_path(element, disk_type)),
        format=_FORMAT.get(format_, format_),
        disk_type=disk_type,
        image_id=identity.image_id,
        volume_id=identity.volume_id,
        shared=_shared_in_xml(element, identity),
        volumes=identity.volumes,
        domain_id=identity.domain_id,
    )


def _source_path(element: _Element, disk_type: str) -> str:
    source = _only(element, "source")
    if source is None or disk_type not in _PATH_ATTRIBUTE:
        return ""
    return source.get(_PATH_ATTRIBUTE[disk_type], "")


def _target(element: _Element) -> str:
    target = _only(element, "target")
    name = "" if target is None else target.get("dev", "")
    if not name:
        raise _RefusedError("a disk has no target name")
    return name


def _shared_in_xml(element: _Element, identity: _Identity) -> str:
    """libvirt's word for sharing where the disk has one, else vdsm's (a transient disk has only vdsm's)."""
    if element.find("shareable") is not None:
        return "shared"
    return "transient" if element.find("transient") is not None else identity.shared


def _only(parent: _Element, tag: str) -> _Element | None:
    found = parent.findall(tag)
    if len(found) > 1:
        raise _RefusedError(f"<{_local_name(parent.tag)}> has {len(found)} <{_local_name(tag)}>")
    return found[0] if found else None


def _child_text(parent: _Element, tag: str) -> str:
    """The text of the one child `tag`, "" where there is none; it holds no markup, not even comments."""
    child = _only(parent, tag)
    if child is None:
        return ""
    if len(child):
        raise _RefusedError(f"<{_local_name(tag)}> holds more than text")
    return (child.text or "").strip()


def _local_name(tag: str) -> str:
    return tag.rpartition("}")[2]


def _local_attributes(element: _Element, path: str) -> dict[_Element, _Attributes]:
    """What changes of the disk `element`, so that it is the raw block device `path`."""
    source, driver = _only(element, "source"), _only(element, "driver")
    if source is None:
        raise _RefusedError(f"disk {_target(element)} has no source")
    if element.find("mirror") is not None or element.find("backingStore/source") is not None:
        raise _RefusedError(f"disk {_target(element)} has the backing chain or mirror of a running VM")
    changes: dict[_Element, _Attributes] = {
        element: {"type": "block"},
        source: {"file": None, "dev": path},
    }
    if driver is not None:
        native = {"io": "native"} if driver.get("cache") in _UNCACHED else {}
        changes[driver] = {"type": "raw", **native, **dict.fromkeys(_QCOW2_ATTRIBUTES)}
    return changes


def _edited(xml: str, root: _Element, changes: Mapping[_Element, _Change]) -> str:
    """`xml`, which was parsed to `root`, with some elements removed and the start tags of others changed."""
    pieces, end = [], 0
    start_tags = (markup for markup in _MARKUP.finditer(xml) if markup["name"])
    for element, tag in zip(root.iter("*"), start_tags):
        if element in changes:
            pieces.append(xml[end : tag.start()])
            attributes = changes[element]
            if attributes is None:
                end = _end_of_element(tag)
            else:
                pieces.append(_with_attributes(tag, attributes))
                end = tag.end()
    return "".join([*pieces, xml[end:]])


def _end_of_element(tag: re.Match[str]) -> int:
    """Where the element that begins with the start tag `tag` ends in the text."""
    depth = 0
    for markup in _MARKUP.finditer(tag.string, tag.start()):
        if markup["end"]:
            depth -= 1
        elif markup["name"] and not markup[0].endswith("/>"):
            depth += 1
        if depth == 0:
            return markup.end()
    raise AssertionError(tag[0])  # the document is well-formed


def _with_attributes(tag: re.Match[str], changes: _Attributes) -> str:
    """The start tag `tag` with attributes set in their places, or after the last one, or removed."""
    text, end, new = tag.string, tag.end("name"), dict(changes)
    pieces = [text[tag.start() : end]]
    for attribute in _ATTRIBUTE.finditer(text, end, tag.end()):
        name, value = attribute["name"], attribute["value"]
        if name not in changes:
            pieces.append(text[end : attribute.end()])
        elif (changed := new.pop(name)) is not None:
            pieces += [text[end : attribute.start("value")], value[0], changed, value[0]]
        end = attribute.end()
    pieces += [f' {name}="{value}"' for name, value in new.items() if value is not None]
    return "".join([*pieces, text[end : tag.end()]])


# -- both


def _check_size(text: str) -> None:
    if len(text) > DATA_LIMIT:
        raise _RefusedError(f"it is longer than {DATA_LIMIT} characters")


def _check_disk(disk: Disk, serial: str, images: Iterable[str] = ()) -> None:
    """Refuses a disk that is half an image of vdsm's or looks like one; `images` are all that are known."""
    if bool(disk.image_id) != bool(disk.volume_id):
        raise _RefusedError(f"disk {disk.name} has only one of imageID and volumeID")
    if disk.is_vdsm_image:
        _check_image(disk, serial)
    elif disk.device == "disk" and (_IMAGE_PATH.search(disk.path) or serial.lower() in images):
        raise _RefusedError(f"disk {disk.name} looks like an image of vdsm's but has no imageID and volumeID")


def _check_image(disk: Disk, serial: str) -> None:
    if disk.format not in ("raw", "cow"):
        raise _RefusedError(f"the format of disk {disk.name} is '{disk.format}', neither raw nor cow (qcow2)")
    if disk.disk_type not in _PATH_ATTRIBUTE:
        raise _RefusedError(f"the type of disk {disk.name} is '{disk.disk_type}', not file, block or network")
    if disk.disk_type != "network" and not disk.path.startswith("/"):
        raise _RefusedError(f"the path of disk {disk.name} is '{disk.path}', not absolute")
    if is_uuid(serial.lower()) and serial.lower() != disk.image_id:
        raise _RefusedError(f"the serial of disk {disk.name} is {serial}, its imageID {disk.image_id}")


def _check_can_be_local(disk: Disk, path: str) -> None:
    if disk.device != "disk" or disk.disk_type not in ("file", "block"):
        kind = f"{disk.device} of type '{disk.disk_type}'"
        raise _RefusedError(f"disk {disk.name} is a {kind} and cannot be made local")
    if not _LOCAL_PATH.fullmatch(path):
        raise _RefusedError(f"'{path}' is not the path of a local disk")


def _refuse_twice(what: str, names: Iterable[str | None]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise _RefusedError(f"it has {what} {twice[0]} twice")


def _volumes(pairs: Iterable[tuple[str, str]]) -> tuple[Volume, ...]:
    volumes = tuple(Volume(_uuid("volumeID", volume_id), _path(path)) for volume_id, path in pairs)
    if not all(volume.volume_id and volume.path for volume in volumes):
        raise _RefusedError("volumeChain has a volume without volumeID or path")
    _refuse_twice("volume", (volume.volume_id for volume in volumes))
    return volumes


def _image_and_volume(image_id: str, volume_id: str, guid: str) -> tuple[str, str]:
    """The canonical imageID and volumeID of a disk, both "" for a LUN and a managed block disk.

    In the metadata of a VM that runs, vdsm repeats the GUID of such a device as its imageID, without volumeID
    (get_metadata of vdsm's lib/vdsm/virt/vmdevices/storagexml.py).
    """
    if guid and image_id == guid and not volume_id:
        return "", ""
    return _uuid("imageID", image_id), _uuid("volumeID", volume_id)


def _uuid(what: str, text: str) -> str:
    """`text` in lower case, which is a canonical UUID or ""."""
    if text and not is_uuid(text.lower()):
        raise _RefusedError(f"{what} is '{text}', not a UUID")
    return text.lower()


def _device(word: str) -> str:
    if word not in DEVICES:
        raise _RefusedError(f"a disk's device is '{word}', none of {', '.join(DEVICES)}")
    return word


def _shared(value: object) -> str:
    """One of SHARED for the words and truth values that vdsm knows (older engines send "true")."""
    word = str(value).lower() if isinstance(value, (str, bool)) else "of the wrong type"
    if word == "true":
        return "shared"
    if word not in SHARED:
        raise _RefusedError(f"shared is '{word}', none of {', '.join(SHARED)}")
    return word


def _path(path: str) -> str:
    if _UNFIT.search(path):
        raise _RefusedError(f"the path '{path}' holds control characters")
    return path
