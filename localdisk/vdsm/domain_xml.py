"""Reads the disks in libvirt's XML of a domain or of one disk, and puts local paths into the same text.

The text is a `str`, as `hook_call.read_data` returns it; nobody has checked it yet.

XML is read with lxml but never written by it: lxml would write other quotes, other line ends and other empty
elements.  Only the start tags that must change are edited, directly in the text, so that every other byte
stays the same.

Metadata of a disk that the domain does not have is left over from an unplugged disk, and is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from localdisk.errors import BadDomain
from localdisk.frozen import frozen, replace
from localdisk.ids import is_uuid
from localdisk.vdsm.disks import (
    IMAGE_PATH,
    Disk,
    RefusedError,
    Volume,
    check_can_be_local,
    check_disk,
    check_size,
    fit_path,
    image_and_volume,
    is_local_path,
    known_device,
    known_shared,
    refuse_twice,
    refused_as,
    uuid_or_nothing,
    volumes_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:  # lxml is slow to import: only functions that parse XML import it
    from typing import Optional

    from lxml.etree import _Element

    _Attributes = Mapping[str, Optional[str]]  # new values of a start tag's attributes; None removes one
    _Change = Optional[_Attributes]  # of an element; None removes it

_VM = "{http://ovirt.org/vm/1.0}"  # vdsm's metadata; the prefix in the text does not matter
_PATH_ATTRIBUTE = {"file": "file", "block": "dev", "network": "name"}  # of <source>, by the disk's type
_FORMAT = {"qcow2": "cow"}  # libvirt's word -> vdsm's, if they differ
_UNCACHED = ("none", "directsync")
# What libvirt accepts only for qcow2: attributes of <driver>, and elements inside of <driver> and <source>
# (qemuDomainValidateStorageSource and virDomainDiskDefValidate of libvirt: metadata_cache since 7.0,
# discard_no_unref since 9.5, dataStore, the external data file, since 10.10).
_QCOW2_ATTRIBUTES = ("discard_no_unref",)
_QCOW2_CHILDREN = ("driver/metadata_cache", "source/dataStore")

_ENCODING = r"""(?a)\ufeff?<\?xml\s[^>]*?\bencoding\s*=\s*["']([^"']*)["']"""

# Markup of a document that is known to be well-formed and without DTD: start tags (with a name) and end tags.
# Comments, CDATA and instructions come first in the pattern, so that a "<" in them is not taken for a tag.
_MARKUP = r"""(?asx)<!--.*?--> | <!\[CDATA\[.*?\]\]> | <\?.*?\?> | (?P<end></[^>]*>)
    | <(?P<name>[^\s/>!?][^\s/>]*) [^>"']* (?: (?:"[^"]*"|'[^']*') [^>"']* )* >"""
_ATTRIBUTE = r"""(?a)(?P<name>[^\s=]+)\s*=\s*(?P<value>"[^"]*"|'[^']*')"""


@refused_as(BadDomain)
def read_domain(xml: str) -> tuple[str, tuple[Disk, ...]]:
    """The UUID of the domain in `xml` and its disks in their order, with their identity from vdsm's metadata.

    Raises BadDomain for text that is not a well-formed `<domain>` with a UUID, has a DTD, declares another
    encoding than UTF-8, or exceeds the parser's limits (depth 256, text of 10 MB, DATA_LIMIT as a whole), and
    for the ambiguities that `disks.py` lists.
    """
    root = _parse(xml, "domain")
    uuid = uuid_or_nothing("the domain's uuid", _child_text(root, "uuid"))
    if not uuid:
        raise RefusedError("the domain has no uuid")
    return uuid, tuple(disk for _, disk in _disks(root))


@refused_as(BadDomain)
def localize_domain(xml: str, paths: Mapping[str, str]) -> str:
    """`xml` with each disk in `paths` (target name -> local path) changed into a raw block device there.

    Changes of such a disk: `type` becomes "block"; `<source>` gets `dev` instead of `file`, and keeps its
    children; `<driver>` gets `type="raw"`, and `io="native"` if its cache is "none" or "directsync";
    attributes and elements that libvirt accepts only for qcow2 (_QCOW2_ATTRIBUTES, _QCOW2_CHILDREN) are
    removed.  With another value of cache, or without the attribute, `io` is not changed: qemu does native I/O
    only if it bypasses the host's page cache, and else refuses to start ("aio=native was specified, but it
    requires cache.direct=on"); without the attribute qemu uses the page cache.  The engine sets cache to
    "none", or to a VM's property viodiskcache.  A disk without `<driver>` is raw to libvirt and gets none.

    Every other byte stays the same.  A second call with the same paths changes nothing.  Raises BadDomain as
    `read_domain`, for a name that the domain does not have, and for a device that cannot be made local: it is
    no disk, is neither file nor block, has no source, or has the backing chain or mirror of a running VM.
    """
    root = _parse(xml, "domain")
    disks = {disk.name: (element, disk) for element, disk in _disks(root)}
    changes: dict[_Element, _Change] = {}
    for name, path in paths.items():
        if name not in disks:
            raise RefusedError(f"it has no disk {name}")
        element, disk = disks[name]
        check_can_be_local(disk, path)
        changes.update(_local_attributes(element, path))
        changes.update({child: None for tag in _QCOW2_CHILDREN for child in element.findall(tag)})
    return _edited(xml, root, changes)


@frozen
class Running:
    """A VM that runs, from the domain XML that libvirt has of it."""

    vm_id: str
    name: str
    property_value: str  # of the custom property localdisk, "" if the VM does not have it
    disks: tuple[Disk, ...]
    backing: tuple[tuple[str, str], ...]  # disk name, and path of each layer that qemu uses below the top one


@refused_as(BadDomain)
def read_running(xml: str) -> Running:
    """The VM of libvirt's live domain XML.  Raises BadDomain as `read_domain`.

    vdsm writes custom properties to `<ovirt-vm:vm><ovirt-vm:custom>` (vdsm, tests/virt/metadata_test.py).
    """
    root = _parse(xml, "domain")
    (custom,) = root.findall(f"metadata/{_VM}vm/{_VM}custom")[:1] or (None,)
    return Running(
        vm_id=uuid_or_nothing("the domain's uuid", _child_text(root, "uuid")),
        name=_child_text(root, "name"),
        property_value="" if custom is None else _child_text(custom, f"{_VM}localdisk"),
        disks=tuple(disk for _, disk in _disks(root)),
        backing=tuple(_backing(root)),
    )


@refused_as(BadDomain)
def read_ran_from(xml: str, is_live: bool) -> tuple[tuple[str, str], ...]:
    """Image id and path of each vdsm image that a VM has run from, by the domain XML of the stopped VM.

    `is_live`: only disks that have the marks of a VM that ran, because vdsm passes the engine's XML if a
    start was refused.  A disk without a readable image id is left out.  Raises BadDomain as `read_domain`.
    """
    root = _parse(xml, "domain")
    return tuple(
        (image_id, path)
        for element in root.findall("devices/disk")
        if element.get("device", "disk") == "disk"
        for image_id, path in [(_image_of(root, element), _source_path(element, element.get("type", "")))]
        if image_id and path and (not is_live or _has_run(element))
    )


def elsewhere(xmls: Iterable[str]) -> frozenset[tuple[str, str]]:
    """VM and image id of each vdsm image that is not on a local disk, by libvirt's definitions of VMs.

    If such a VM has stopped, and its local disk is still there, the VM ran from another volume when it
    stopped: a live snapshot or live storage migration was not refused.  Raises BadDomain.
    """
    return frozenset(
        ((_parse(xml, "domain").findtext("uuid") or "").strip().lower(), image_id)
        for xml in xmls
        for image_id, path in read_ran_from(xml, is_live=False)
        if not is_local_path(path)
    )


@refused_as(BadDomain)
def uses_local_disk(xml: str) -> bool:
    """Whether a disk of the domain, or a layer below it, is a local disk.

    Nothing else of the domain is checked.  Raises BadDomain as `_parse`.
    """
    sources = _parse(xml, "domain").iterfind("devices/disk//source")
    return any(is_local_path(source.get("dev", "")) for source in sources)


def _has_run(element: _Element) -> bool:
    """Whether the disk is of an active domain: libvirt numbers its source, or shows its backing chain."""
    return element.find("source[@index]") is not None or element.find("backingStore") is not None


def _image_of(root: _Element, element: _Element) -> str:
    """The image id of a disk from vdsm's metadata, else from its serial, which vdsm sets to it; else ""."""
    name = _target(element)
    found = root.findall(f"metadata/{_VM}vm/{_VM}device[@devtype='disk']")
    texts = [device.findtext(f"{_VM}imageID") for device in found if device.get("name") == name]
    ids = [(text or "").strip().lower() for text in (*texts, element.findtext("serial"))]
    return next(filter(is_uuid, ids), "")


def _backing(root: _Element) -> Iterator[tuple[str, str]]:
    for element in root.findall("devices/disk"):
        for source in element.iterfind(".//backingStore/source"):
            yield _target(element), source.get("dev") or source.get("file") or ""


@refused_as(BadDomain)
def read_disk_element(xml: str) -> Disk:
    """The disk in the XML of `before_disk_hotplug` and `before_disk_hotunplug`, one `<disk>` element.

    The XML has no metadata.  A disk whose path ends in `/<image or storage domain>/<volume>` is a vdsm image:
    the last part is its volume; its image is its serial or, if that is no UUID, the part before the last.
    """
    element = _parse(xml, "disk")
    disk, serial = _disk_from_xml(element, _NO_IDENTITY), _child_text(element, "serial")
    place = re.search(IMAGE_PATH, disk.path)
    if place:
        image_id = serial if is_uuid(serial.lower()) else place[1]
        disk = replace(disk, image_id=image_id.lower(), volume_id=place[2].lower())
    check_disk(disk, serial)
    return disk


def _parse(xml: str, root_tag: str) -> _Element:
    from lxml import etree

    check_size(xml)
    declared = re.match(_ENCODING, xml)
    if declared and declared[1].lower() not in ("utf-8", "us-ascii", "ascii"):
        raise RefusedError(f"it says that its encoding is {declared[1]}, vdsm's is UTF-8")
    parser = etree.XMLParser(
        encoding="utf-8", resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False
    )
    try:
        root = etree.fromstring(xml.encode("utf-8"), parser)
    except etree.XMLSyntaxError as error:
        raise RefusedError(f"not XML, {' '.join(str(error.msg).split())}") from None
    except UnicodeEncodeError:
        raise RefusedError("not XML, it holds half a character") from None
    if root.getroottree().docinfo.internalDTD is not None:
        raise RefusedError("it has a document type declaration")
    if root.tag != root_tag:
        raise RefusedError(f"it is a <{root.tag}>, not a <{root_tag}>")
    return root


def _disks(root: _Element) -> list[tuple[_Element, Disk]]:
    """Every disk of the domain `root` with its element, checked."""
    metadata = _metadata(root)
    images = {identity.image_id for identity in metadata.values() if identity.image_id}
    disks = []
    for element in root.findall("devices/disk"):
        disk = _disk_from_xml(element, metadata.get(_target(element), _NO_IDENTITY))
        check_disk(disk, _child_text(element, "serial"), images)
        disks.append((element, disk))
    refuse_twice("disk", (disk.name for _, disk in disks))
    refuse_twice("volume", (disk.volume_id for _, disk in disks if disk.is_vdsm_image))
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
    refuse_twice("metadata of disk", (device.get("name") for device in devices))
    return {device.get("name", ""): _identity(device) for device in devices}


def _identity(device: _Element) -> _Identity:
    nodes = device.findall(f"{_VM}volumeChain/{_VM}volumeChainNode")
    image_id, volume_id = image_and_volume(
        *(_child_text(device, f"{_VM}{key}") for key in ("imageID", "volumeID", "GUID"))
    )
    return _Identity(
        image_id=image_id,
        volume_id=volume_id,
        shared=known_shared(_child_text(device, f"{_VM}shared") or "none"),
        volumes=volumes_of((_child_text(n, f"{_VM}volumeID"), _child_text(n, f"{_VM}path")) for n in nodes),
        domain_id=uuid_or_nothing("domainID", _child_text(device, f"{_VM}domainID")),
    )


def _disk_from_xml(element: _Element, identity: _Identity) -> Disk:
    disk_type = element.get("type", "file")
    driver = _only(element, "driver")
    format_ = "raw" if driver is None else driver.get("type", "raw")
    return Disk(
        name=_target(element),
        device=known_device(element.get("device", "disk")),
        path=fit_path(_source_path(element, disk_type)),
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
        raise RefusedError("a disk has no target name")
    return name


def _shared_in_xml(element: _Element, identity: _Identity) -> str:
    """libvirt's word for sharing if the disk has one, else vdsm's (a transient disk has only vdsm's)."""
    if element.find("shareable") is not None:
        return "shared"
    return "transient" if element.find("transient") is not None else identity.shared


def _only(parent: _Element, tag: str) -> _Element | None:
    found = parent.findall(tag)
    if len(found) > 1:
        raise RefusedError(f"<{_local_name(parent.tag)}> has {len(found)} <{_local_name(tag)}>")
    return found[0] if found else None


def _child_text(parent: _Element, tag: str) -> str:
    """The text of the one child `tag`, "" if there is none; refuses a child with markup, even comments."""
    child = _only(parent, tag)
    if child is None:
        return ""
    if len(child):
        raise RefusedError(f"<{_local_name(tag)}> holds more than text")
    return (child.text or "").strip()


def _local_name(tag: str) -> str:
    return tag.rpartition("}")[2]


def _local_attributes(element: _Element, path: str) -> dict[_Element, _Attributes]:
    """The changes that make the disk `element` the raw block device `path`."""
    source, driver = _only(element, "source"), _only(element, "driver")
    if source is None:
        raise RefusedError(f"disk {_target(element)} has no source")
    if element.find("mirror") is not None or element.find("backingStore/source") is not None:
        raise RefusedError(f"disk {_target(element)} has the backing chain or mirror of a running VM")
    changes: dict[_Element, _Attributes] = {
        element: {"type": "block"},
        source: {"file": None, "dev": path},
    }
    if driver is not None:
        native = {"io": "native"} if driver.get("cache") in _UNCACHED else {}
        changes[driver] = {"type": "raw", **native, **dict.fromkeys(_QCOW2_ATTRIBUTES)}
    return changes


def _edited(xml: str, root: _Element, changes: Mapping[_Element, _Change]) -> str:
    """`xml` with `changes`, which remove elements or change start tags; `root` is `xml` parsed."""
    pieces, end = [], 0
    start_tags = (markup for markup in re.finditer(_MARKUP, xml) if markup["name"])
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
    """The offset in the text at which the element with the start tag `tag` ends."""
    depth = 0
    for markup in re.compile(_MARKUP).finditer(tag.string, tag.start()):
        if markup["end"]:
            depth -= 1
        elif markup["name"] and not markup[0].endswith("/>"):
            depth += 1
        if depth == 0:
            return markup.end()
    raise AssertionError(tag[0])  # the document is well-formed


def _with_attributes(tag: re.Match[str], changes: _Attributes) -> str:
    """The start tag `tag` with attributes changed in their places, added after the last one, or removed."""
    text, end, new = tag.string, tag.end("name"), dict(changes)
    pieces = [text[tag.start() : end]]
    for attribute in re.compile(_ATTRIBUTE).finditer(text, end, tag.end()):
        name, value = attribute["name"], attribute["value"]
        if name not in changes:
            pieces.append(text[end : attribute.end()])
        elif (changed := new.pop(name)) is not None:
            pieces += [text[end : attribute.start("value")], value[0], changed, value[0]]
        end = attribute.end()
    pieces += [f' {name}="{value}"' for name, value in new.items() if value is not None]
    return "".join([*pieces, text[end : tag.end()]])
