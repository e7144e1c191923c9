"""Reading and rewriting vdsm's JSON and XML.

Golden files: data/definition/NAME.in.{xml,json}, written by hand in the shape that vdsm and the engine give
them, and NAME.out.*, the same with every vdsm image on file or block storage made local.
LOCALDISK_REGENERATE=1 writes the .out files anew; read their diff.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from localdisk.errors import BadDiskData, BadDomain, Error
from localdisk.frozen import replace
from localdisk.vdsm.disk_json import localize_disk, read_disk
from localdisk.vdsm.disks import Disk, Volume
from localdisk.vdsm.domain_xml import localize_domain, read_disk_element, read_domain, read_running
from localdisk.vdsm.hook_call import DATA_LIMIT
from tests.examples import examples

DATA = Path(__file__).parents[2] / "data" / "definition"
XML_FILES = sorted(DATA.glob("*.in.xml"))
JSON_FILES = sorted(DATA.glob("*.in.json"))
REGENERATE = os.environ.get("LOCALDISK_REGENERATE") == "1"

IMAGE = "1b4a2c0e-7c55-4a0e-9f2c-2f5e6a7b8c9d"
VOLUME = "3d9f0a1b-2c3d-4e5f-8a7b-9c0d1e2f3a4b"
BASE = "9e8d7c6b-5a49-4838-a726-15049382716a"
OTHER = "c0ffee00-1111-4222-8333-444455556666"
VM = "7c3f5f5e-2f0a-4b0f-9a51-0c6e0f0f1a01"
DOMAIN = "88252cf6-381e-48f0-8795-a294a32c7149"
DIRECTORY = f"/rhev/data-center/mnt/srv:_exp/{DOMAIN}/images/{IMAGE}"
LOCAL = f"/dev/ovirt-local/{VOLUME}"


def text_of(file: Path) -> str:
    return file.read_bytes().decode()


def can_be_local(disk: Disk) -> bool:
    return disk.is_vdsm_image and disk.disk_type in ("file", "block")


def local_paths(xml: str) -> dict[str, str]:
    return {d.name: f"/dev/ovirt-local/{d.volume_id}" for d in read_domain(xml)[1] if can_be_local(d)}


def stem(file: Path) -> str:
    return file.name.split(".")[0]


def compare_golden(file: Path, result: str) -> None:
    golden = file.with_name(file.name.replace(".in.", ".out."))
    if REGENERATE:
        golden.write_bytes(result.encode())
    assert result == text_of(golden)


# -- golden files


@pytest.mark.parametrize("file", XML_FILES, ids=stem)
def test_golden_domain(file: Path) -> None:
    xml = text_of(file)
    compare_golden(file, localize_domain(xml, local_paths(xml)))


@pytest.mark.parametrize("file", JSON_FILES, ids=stem)
def test_golden_disk(file: Path) -> None:
    text = text_of(file)
    compare_golden(file, localize_disk(text, f"/dev/ovirt-local/{read_disk(text).volume_id}"))


CHANGED = {".": ("type",), "source": ("file", "dev"), "driver": ("type", "io", "discard_no_unref")}
REMOVED = ("driver/metadata_cache", "source/dataStore")


def remove(element: Any) -> None:
    """Remove the element and keep the text behind it."""
    parent, before = element.getparent(), element.getprevious()
    if before is None:
        parent.text = (parent.text or "") + (element.tail or "")
    else:
        before.tail = (before.tail or "") + (element.tail or "")
    parent.remove(element)


def masked(xml: str, names: set[str]) -> bytes:
    """Canonical XML, comments included, without what may change of the disks `names`."""
    root = etree.fromstring(xml.encode())
    for target in root.findall("devices/disk/target"):
        disk = target.getparent()
        if target.get("dev") not in names or disk is None:
            continue
        for path, attributes in CHANGED.items():
            for element in disk.findall(path):
                for attribute in attributes:
                    element.attrib.pop(attribute, "")
        for path in REMOVED:
            for element in disk.findall(path):
                remove(element)
    # c14n2: the first version of canonical XML refuses a namespace that is a relative URI.
    return etree.tostring(root.getroottree(), method="c14n2", with_comments=True)


def outside_disks(xml: str, names: set[str]) -> list[bytes]:
    """The bytes of `xml` before, between and after the disks `names`, as another parser (expat) sees them."""
    data, cuts, tags, start, name = xml.encode(), [0], [""], 0, ""
    parser = expat.ParserCreate()

    def begin(tag: str, attributes: dict[str, str]) -> None:
        nonlocal start, name
        tags.append(tag)
        if tags[1:] == ["domain", "devices", "disk"]:
            start = parser.CurrentByteIndex
        if tags[1:] == ["domain", "devices", "disk", "target"]:
            name = attributes["dev"]

    def end(tag: str) -> None:
        if tags[1:] == ["domain", "devices", "disk"] and name in names:
            cuts.extend((start, parser.CurrentByteIndex))
        tags.pop()

    parser.StartElementHandler, parser.EndElementHandler = begin, end
    parser.Parse(data, True)
    cuts.append(len(data))
    return [data[a:b] for a, b in zip(cuts[::2], cuts[1::2])]


def check_only_disks_changed(before: str, after: str, paths: dict[str, str]) -> None:
    names = set(paths)
    assert masked(after, names) == masked(before, names)
    assert outside_disks(after, names) == outside_disks(before, names)
    uuid, disks = read_domain(before)
    expected = tuple(
        replace(disk, path=paths[disk.name], format="raw", disk_type="block") if disk.name in paths else disk
        for disk in disks
    )
    assert read_domain(after) == (uuid, expected)
    assert localize_domain(after, paths) == after


@pytest.mark.parametrize("file", XML_FILES, ids=stem)
def test_every_other_node_and_byte_stays(file: Path) -> None:
    xml, paths = text_of(file), local_paths(text_of(file))
    assert paths
    check_only_disks_changed(xml, localize_domain(xml, paths), paths)


@pytest.mark.parametrize("file", XML_FILES, ids=stem)
def test_disks_are_localized_one_by_one_as_together(file: Path) -> None:
    xml, paths = text_of(file), local_paths(text_of(file))
    one_by_one = xml
    for name, path in reversed(paths.items()):
        one_by_one = localize_domain(one_by_one, {name: path})
    assert one_by_one == localize_domain(xml, paths)


@pytest.mark.parametrize("file", XML_FILES, ids=stem)
@pytest.mark.parametrize("change", ["crlf", "bom", "no declaration", "single quotes"])
def test_other_spellings_of_the_golden_files(file: Path, change: str) -> None:
    xml = text_of(file)
    if change == "crlf":
        xml = xml.replace("\n", "\r\n")
    elif change == "bom":
        xml = "\ufeff" + xml
    elif change == "no declaration" and xml.startswith("<?xml "):
        xml = xml[xml.index("?>") + 2 :].lstrip()
    elif change == "single quotes" and "'" not in xml.partition("?>")[2]:
        xml = xml.replace('"', "'")
    paths = local_paths(xml)
    after = localize_domain(xml, paths)
    check_only_disks_changed(xml, after, paths)
    assert after.replace("'", '"').count('"block"') >= len(paths)


def test_what_is_not_asked_for_is_not_touched() -> None:
    for file in XML_FILES:
        assert localize_domain(text_of(file), {}) == text_of(file)


def test_a_running_local_disk_is_already_as_it_should_be() -> None:
    xml = text_of(DATA / "running-local.in.xml")
    assert localize_domain(xml, local_paths(xml)) == xml


def disks_of(name: str) -> dict[str, Disk]:
    return {disk.name: disk for disk in read_domain(text_of(DATA / f"{name}.in.xml"))[1]}


def test_reading_a_file_disk() -> None:
    uuid, disks = read_domain(text_of(DATA / "virtio-file-qcow2.in.xml"))
    assert uuid == VM
    assert disks == (
        Disk("sdc", "cdrom", "", "raw", "file", "", "", "none", ()),
        Disk(
            name="vda",
            device="disk",
            path=f"{DIRECTORY}/{VOLUME}",
            format="cow",
            disk_type="file",
            image_id=IMAGE,
            volume_id=VOLUME,
            shared="none",
            volumes=(Volume(BASE, f"{DIRECTORY}/{BASE}"), Volume(VOLUME, f"{DIRECTORY}/{VOLUME}")),
            domain_id=DOMAIN,
        ),
    )
    assert [disk.is_vdsm_image for disk in disks] == [False, True]


def test_reading_an_upper_case_domain_uuid() -> None:
    uuid, _ = read_domain(text_of(DATA / "virtio-scsi-block-qcow2.in.xml"))
    assert uuid == "1f2e3d4c-5b6a-4978-8695-a4b3c2d1e0f9"


def test_reading_cdroms_and_floppies() -> None:
    disks = disks_of("cdrom")
    assert disks["fda"].device == "floppy"
    assert disks["sdd"].path == "PAYLOAD:"
    assert disks["sdc"].device == "cdrom"
    assert disks["sdc"].volume_id == "626a493f-5214-4337-b580-96a1ce702c2a"
    assert [name for name, disk in disks.items() if disk.is_vdsm_image] == ["vda"]


def test_reading_the_storage_domain() -> None:
    xml = text_of(DATA / "virtio-file-qcow2.in.xml")
    json_text = text_of(DATA / "file-qcow2.in.json")
    for old, new, found in ((DOMAIN, OTHER.upper(), OTHER), ("domainID", "x", "")):
        assert read_domain(xml.replace(old, new))[1][1].domain_id == found
        assert read_disk(json_text.replace(old, new)).domain_id == found


def test_reading_luns() -> None:
    disks = disks_of("lun")
    assert disks["sda"] == Disk(
        "sda", "lun", "/dev/mapper/3600140565f2a1b0c4d24f1c9a1b2c3d4", "raw", "block", "", "", "none", ()
    )
    assert disks["vda"].device == "disk"
    assert disks["vdb"].path == "/run/vdsm/managedvolumes/2e3f4051-6c7d-4e8f-90a1-b2c3d4e5f607"
    assert [name for name, disk in disks.items() if disk.is_vdsm_image] == ["vdc"]


def test_reading_luns_of_a_vm_that_runs() -> None:
    """vdsm has saved their GUID as imageID; the one of a managed block disk may be a UUID."""
    xml = text_of(DATA / "lun.in.xml").replace("20024f400585401ce", OTHER)
    saved = re.sub(r"(<ovirt-vm:)GUID(>(.*?)</ovirt-vm:)GUID>", r"\g<0>\1imageID\2imageID>", xml)
    assert saved.count("imageID") == xml.count("imageID") + 6
    assert read_domain(saved) == read_domain(xml)
    assert read_running(saved).disks == read_domain(xml)[1]
    assert localize_domain(saved, local_paths(xml)).count("/dev/ovirt-local/") == 1


@pytest.mark.parametrize("guid", ["", "<GUID>360014059f8e7d6c5</GUID>"])
def test_an_image_id_that_is_no_uuid_is_refused_unless_it_is_the_guid(guid: str) -> None:
    with pytest.raises(BadDomain, match="imageID is '360014059f8e7d6c4', not a UUID"):
        read_domain(domain(disk_xml(), metadata(image="360014059f8e7d6c4", volume="", more=guid)))


def test_reading_network_disks() -> None:
    disks = disks_of("network")
    assert disks["vda"].disk_type == "network"
    assert disks["vda"].path == "volumes/volume-3f405162-7d8e-4f90-a1b2-c3d4e5f60718"
    assert not disks["vda"].is_vdsm_image
    assert disks["sda"].disk_type == "network"
    assert disks["sda"].format == "cow"
    assert disks["sda"].is_vdsm_image


def test_reading_shared_disks_and_upper_case_ids() -> None:
    disks = disks_of("several")
    assert {name: disk.shared for name, disk in disks.items()} == {
        "vda": "none",
        "sdc": "none",
        "sda": "exclusive",
        "sdb": "shared",
        "sdd": "none",
        "vdb": "transient",
    }
    assert disks["sda"].image_id == "f708192a-3b4c-45d6-a7f8-091a2b3c4d5e"
    assert disks["sda"].volume_id == "0819202a-4c5d-46e7-b809-1a2b3c4d5e6f"


# -- small domains, one thing each


def metadata(name: str = "vda", image: str = IMAGE, volume: str = VOLUME, more: str = "") -> str:
    ids = f"<imageID>{image}</imageID><volumeID>{volume}</volumeID>"
    return f"<device devtype='disk' name='{name}'>{ids}{more}</device>"


def disk_xml(more: str = "", attributes: str = "type='file' device='disk'") -> str:
    return (
        f"<disk {attributes}><source file='{DIRECTORY}/{VOLUME}'/><target dev='vda'/>"
        f"<serial>{IMAGE}</serial>{more}</disk>"
    )


QCOW2 = "<driver name='qemu' type='qcow2' cache='none' io='threads'/>"


def domain(disks: str, devices: str | None = None, uuid: str = f"<uuid>{VM}</uuid>") -> str:
    known = metadata() if devices is None else devices
    return (
        f"<domain>{uuid}<metadata><vm xmlns='http://ovirt.org/vm/1.0'>{known}</vm></metadata>"
        f"<devices>{disks}</devices></domain>"
    )


def without_ids(source: str, serial: str = "", target: str = "vda") -> str:
    return f"<disk type='block' device='disk'><source dev='{source}'/><target dev='{target}'/>{serial}</disk>"


@pytest.mark.parametrize(
    ("cache", "before", "after"),
    [
        ("cache='none'", "io='threads'", "io='native'"),
        ("cache='none'", "io='native'", "io='native'"),
        ("cache='none'", "io='io_uring'", "io='native'"),
        ("cache='directsync'", "io='threads'", "io='native'"),
        ("cache='writeback'", "io='threads'", "io='threads'"),
        ("cache='writethrough'", "io='threads'", "io='threads'"),
        ("cache='unsafe'", "io='io_uring'", "io='io_uring'"),
        ("cache='default'", "io='threads'", "io='threads'"),
        ("", "io='threads'", "io='threads'"),
        ("cache='writeback'", "", ""),
        ("", "", ""),
    ],
)
def test_native_io_only_without_host_cache(cache: str, before: str, after: str) -> None:
    xml = domain(disk_xml(f"<driver name='qemu' type='qcow2' {cache} {before}/>"))
    result = localize_domain(xml, {"vda": LOCAL})
    assert f"<driver name='qemu' type='raw' {cache} {after}/>" in result


def test_native_io_is_added_where_io_is_missing() -> None:
    xml = domain(disk_xml("<driver name='qemu' type='qcow2' cache='none' ><x/></driver>"))
    assert "<driver name='qemu' type='raw' cache='none' io=\"native\" ><x/></driver>" in localize_domain(
        xml, {"vda": LOCAL}
    )


def test_a_driver_without_type_gets_one_and_a_missing_driver_is_raw() -> None:
    assert localize_domain(domain(disk_xml("<driver/>")), {"vda": LOCAL}).count('<driver type="raw"/>') == 1
    without = localize_domain(domain(disk_xml()), {"vda": LOCAL})
    assert "driver" not in without
    assert read_domain(without)[1][0].format == "raw"


@pytest.mark.parametrize("name", ["sda", "vda", "vdb"])
def test_what_only_qcow2_allows_is_removed(name: str) -> None:
    xml = text_of(DATA / "qcow2-only.in.xml")
    element = etree.fromstring(localize_domain(xml, local_paths(xml)).encode()).find(
        f"devices/disk/target[@dev='{name}']/.."
    )
    assert element is not None
    assert element.find("driver[@type='raw']") is not None
    assert [path for path in REMOVED if element.find(path) is not None] == []
    assert element.find("driver[@discard_no_unref]") is None


def test_what_only_qcow2_allows_stays_where_no_disk_is_made_local() -> None:
    xml = text_of(DATA / "qcow2-only.in.xml")
    after = localize_domain(xml, {"vda": LOCAL})
    assert after.count("discard_no_unref") == xml.count("discard_no_unref") - 1
    assert after.count("metadata_cache") == xml.count("metadata_cache")


def test_source_with_both_attributes_keeps_only_dev() -> None:
    xml = domain(disk_xml().replace("<source ", "<source dev='/old' startupPolicy='optional' "))
    assert f"<source dev='{LOCAL}' startupPolicy='optional'/>" in localize_domain(xml, {"vda": LOCAL})


@pytest.mark.parametrize("word", ["shareable", "transient"])
def test_libvirts_words_for_sharing(word: str) -> None:
    device = metadata(more="<shared>exclusive</shared>")
    (disk,) = read_domain(domain(disk_xml(f"<{word}/>"), device))[1]
    assert disk.shared == {"shareable": "shared", "transient": "transient"}[word]


def test_metadata_of_other_devices_and_namespaces_is_not_read() -> None:
    others = (
        f"<device devtype='interface' name='vda'><imageID>x</imageID></device><device alias='vda'/>"
        f"<device devtype='disk'><imageID>x</imageID></device>"
        f"<device xmlns='urn:x' devtype='disk' name='vda'><imageID>{OTHER}</imageID></device>{metadata()}"
    )
    (disk,) = read_domain(domain(disk_xml(), others))[1]
    assert (disk.image_id, disk.volume_id) == (IMAGE, VOLUME)


def test_disks_elsewhere_are_not_the_domains() -> None:
    xml = domain(disk_xml() + "<x><disk/></x>").replace(
        "</domain>", "<disk/><x:devices xmlns:x='x'><disk/></x:devices></domain>"
    )
    assert [disk.name for disk in read_domain(xml)[1]] == ["vda"]


def test_leftover_metadata_is_passed_over() -> None:
    leftover = metadata(name="vdq", image=OTHER, volume=OTHER)
    assert len(read_domain(domain(disk_xml(), metadata() + leftover))[1]) == 1


def test_a_serial_that_is_no_uuid_says_nothing() -> None:
    for serial in ("", "administrator's own", IMAGE[-20:], IMAGE.upper()):
        xml = domain(disk_xml().replace(f"<serial>{IMAGE}", f"<serial>{serial}"))
        assert read_domain(xml)[1][0].image_id == IMAGE


def test_other_devices_keep_libvirts_words() -> None:
    floppy = (
        "<disk type='dir' device='floppy'><driver type='fat'/><source dir='/x'/><target dev='fda'/></disk>"
    )
    (disk,) = read_domain(domain(floppy))[1]
    assert disk == Disk("fda", "floppy", "", "fat", "dir", "", "", "none", ())


TWO = disk_xml() + disk_xml().replace("vda", "vdb")

REFUSED_DOMAINS = {
    "two disks of one name": (domain(disk_xml() + without_ids("/dev/x")), "it has disk vda twice"),
    "two metadata of one name": (
        domain(disk_xml(), metadata() + metadata(image=OTHER)),
        "metadata of disk vda twice",
    ),
    "the same metadata twice": (domain(disk_xml(), metadata() * 2), "metadata of disk vda twice"),
    "two metadata of one name in two vm": (
        domain(disk_xml(), metadata() + "</vm><vm xmlns='http://ovirt.org/vm/1.0'>" + metadata()),
        "metadata of disk vda twice",
    ),
    "two disks of one volume": (domain(TWO, metadata() + metadata("vdb")), f"it has volume {VOLUME} twice"),
    "serial of another image": (
        domain(disk_xml().replace(f"<serial>{IMAGE}", f"<serial>{OTHER}")),
        f"the serial of disk vda is {OTHER}, its imageID {IMAGE}",
    ),
    "no metadata, image path": (domain(disk_xml(), ""), "disk vda looks like an image of vdsm's"),
    "empty metadata, image path": (
        domain(disk_xml(), "<device devtype='disk' name='vda'/>"),
        "disk vda looks like an image of vdsm's",
    ),
    "metadata under another name": (
        domain(without_ids("/dev/ovirt-local/x", f"<serial>{IMAGE}</serial>"), metadata("vdb")),
        "disk vda looks like an image of vdsm's",
    ),
    "imageID without volumeID": (domain(disk_xml(), metadata(volume="")), "only one of imageID and volumeID"),
    "volumeID without imageID": (domain(disk_xml(), metadata(image="")), "only one of imageID and volumeID"),
    "two imageIDs": (
        domain(disk_xml(), metadata(more=f"<imageID>{OTHER}</imageID>")),
        "<device> has 2 <imageID>",
    ),
    "comment in an ID": (
        domain(disk_xml(), metadata(image=IMAGE + "<!-- -->")),
        "<imageID> holds more than text",
    ),
    "image is no UUID": (domain(disk_xml(), metadata(image="../x")), "imageID is '../x', not a UUID"),
    "domain is no UUID": (
        domain(disk_xml(), metadata(more="<domainID>../x</domainID>")),
        "domainID is '../x', not a UUID",
    ),
    "two domains": (
        domain(disk_xml(), metadata(more=f"<domainID>{OTHER}</domainID>" * 2)),
        "<device> has 2 <domainID>",
    ),
    "volume is no UUID": (domain(disk_xml(), metadata(volume=VOLUME + "0")), "not a UUID"),
    "unknown sharing": (domain(disk_xml(), metadata(more="<shared>maybe</shared>")), "shared is 'maybe'"),
    "chain without path": (
        domain(
            disk_xml(),
            metadata(
                more=f"<volumeChain><volumeChainNode><volumeID>{BASE}</volumeID></volumeChainNode></volumeChain>"
            ),
        ),
        "without volumeID or path",
    ),
    "volume twice in the chain": (
        domain(
            disk_xml(),
            metadata(
                more="<volumeChain>"
                + f"<volumeChainNode><volumeID>{BASE}</volumeID><path>/x</path></volumeChainNode>" * 2
                + "</volumeChain>"
            ),
        ),
        f"it has volume {BASE} twice",
    ),
    "two sources": (domain(disk_xml("<source dev='/dev/sda'/>")), "<disk> has 2 <source>"),
    "two drivers": (domain(disk_xml(QCOW2 * 2)), "<disk> has 2 <driver>"),
    "two targets": (domain(disk_xml("<target dev='vdb'/>")), "<disk> has 2 <target>"),
    "two serials": (domain(disk_xml("<serial>x</serial>")), "<disk> has 2 <serial>"),
    "no target": (domain(disk_xml().replace("<target dev='vda'/>", "")), "no target name"),
    "image of format vmdk": (domain(disk_xml("<driver type='vmdk'/>")), "format of disk vda is 'vmdk'"),
    "image of type dir": (
        domain(disk_xml(attributes="type='dir' device='disk'")),
        "type of disk vda is 'dir', not file",
    ),
    "image without path": (
        domain(disk_xml(attributes="type='block' device='disk'")),
        "path of disk vda is ''",
    ),
    "unknown device": (domain(disk_xml(attributes="device='tape'")), "device is 'tape'"),
    "control character": (domain(disk_xml().replace("/rhev", "/rh&#10;ev")), "control characters"),
    "no uuid": (domain(disk_xml(), uuid=""), "the domain has no uuid"),
    "uuid is none": (domain(disk_xml(), uuid="<uuid>1</uuid>"), "uuid is '1', not a UUID"),
    "two uuids": (domain(disk_xml(), uuid=f"<uuid>{VM}</uuid><uuid>{OTHER}</uuid>"), "<domain> has 2 <uuid>"),
}


@pytest.mark.parametrize("name", REFUSED_DOMAINS)
def test_refused_domains(name: str) -> None:
    xml, problem = REFUSED_DOMAINS[name]
    with pytest.raises(BadDomain) as caught:
        read_domain(xml)
    assert problem in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("xml", "paths", "problem"),
    [
        (domain(disk_xml()), {"vdb": LOCAL}, "it has no disk vdb"),
        (domain(disk_xml()), {"": LOCAL}, "it has no disk "),
        (
            text_of(DATA / "lun.in.xml"),
            {"sda": LOCAL},
            "disk sda is a lun of type 'block' and cannot be made local",
        ),
        (text_of(DATA / "cdrom.in.xml"), {"sdc": LOCAL}, "disk sdc is a cdrom"),
        (text_of(DATA / "cdrom.in.xml"), {"fda": LOCAL}, "disk fda is a floppy"),
        (text_of(DATA / "network.in.xml"), {"sda": LOCAL}, "disk sda is a disk of type 'network'"),
        (domain("<disk><target dev='sda'/></disk>"), {"sda": LOCAL}, "disk sda has no source"),
        (domain(disk_xml("<mirror type='block'/>")), {"vda": LOCAL}, "mirror of a running VM"),
        (
            domain(disk_xml("<backingStore type='file'><source file='/x'/></backingStore>")),
            {"vda": LOCAL},
            "backing chain or mirror of a running VM",
        ),
        *(
            (domain(disk_xml()), {"vda": path}, "is not the path of a local disk")
            for path in (
                "",
                "dev/x",
                "/dev/x'y",
                '/dev/x"/><evil/>',
                "/dev/x&y",
                "/dev/x\n",
                "/dev/ü",
                "/dev/\ud800",
            )
        ),
    ],
)
def test_what_cannot_be_made_local(xml: str, paths: dict[str, str], problem: str) -> None:
    with pytest.raises(BadDomain) as caught:
        localize_domain(xml, paths)
    assert problem in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_disk_without_identity_is_made_local_when_asked() -> None:
    xml = domain(without_ids("/dev/mapper/lun"))
    check_only_disks_changed(xml, localize_domain(xml, {"vda": LOCAL}), {"vda": LOCAL})


# -- hostile documents

LAUGHS = "".join(f"<!ENTITY e{n} '{f'&e{n - 1};' * 10}'>" for n in range(1, 12))
SYSTEM = "<!DOCTYPE domain [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>"

HOSTILE = {
    "empty": "",
    "white space": " \n",
    "text": "domain",
    "json": "{}",
    "NUL": "<domain>\0</domain>",
    "half a character": "<domain>\ud800</domain>",
    "cut off": text_of(XML_FILES[0])[:-20],
    "two roots": "<domain/><domain/>",
    "other root": "<hotplug/>",
    "root in a namespace": "<domain xmlns='urn:x'/>",
    "undefined prefix": "<x:domain/>",
    "undefined entity": "<domain>&x;</domain>",
    "attribute twice": "<domain a='1' a='2'/>",
    "doctype": "<!DOCTYPE domain><domain/>",
    "doctype after a comment": "<!-- --><!DOCTYPE domain><domain/>",
    "external DTD": "<!DOCTYPE domain SYSTEM 'file:///etc/passwd'><domain/>",
    "network DTD": "<!DOCTYPE domain SYSTEM 'http://192.0.2.1/x.dtd'><domain/>",
    "external entity": f"{SYSTEM}<domain><uuid>&x;</uuid></domain>",
    "external parameter entity": "<!DOCTYPE domain [<!ENTITY % x SYSTEM 'file:///etc/passwd'> %x;]><domain/>",
    "laughs": f"<!DOCTYPE domain [<!ENTITY e0 'ha'>{LAUGHS}]><domain>&e11;</domain>",
    "laughs in an attribute": f"<!DOCTYPE domain [<!ENTITY e0 'ha'>{LAUGHS}]><domain a='&e11;'/>",
    "default attributes": "<!DOCTYPE domain [<!ATTLIST disk type CDATA 'block'>]><domain/>",
    "deep": "<domain>" * 100_000 + "</domain>" * 100_000,
    "long text": f"<domain>{'x' * 11_000_000}</domain>",
    "long tag": f"<domain{' ' * 11_000_000}/>",
    "long attribute": f"<domain a='{'x' * 11_000_000}'/>",
    "too long": " " * (DATA_LIMIT + 1),
    "latin-1": "<?xml version='1.0' encoding='latin-1'?><domain/>",
    "utf-16": "<?xml version='1.0' encoding='UTF-16'?><domain/>",
    "utf-7": "\ufeff<?xml version = '1.0'\n encoding = \"utf-7\"?><domain/>",
    "xml 1.1 control": "<?xml version='1.1'?><domain>&#1;</domain>",
}

READERS: dict[str, tuple[Callable[[str], object], type[Error]]] = {
    "read_domain": (read_domain, BadDomain),
    "localize_domain": (lambda text: localize_domain(text, {}), BadDomain),
    "read_disk_element": (read_disk_element, BadDomain),
    "read_disk": (read_disk, BadDiskData),
    "localize_disk": (lambda text: localize_disk(text, LOCAL), BadDiskData),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_one_line(name: str, reader: str) -> None:
    read, error = READERS[reader]
    started = time.process_time()
    with pytest.raises(error) as caught:
        read(HOSTILE[name])
    assert str(caught.value).isprintable()
    assert "passwd" not in str(caught.value)
    assert "root:" not in str(caught.value)
    assert time.process_time() - started < 2


def test_doctype_is_named() -> None:
    for name in ("doctype", "external DTD", "network DTD", "external entity", "default attributes"):
        with pytest.raises(BadDomain, match="document type declaration"):
            read_domain(HOSTILE[name])


@pytest.mark.parametrize(
    "filling",
    [
        "<x/>" * 200_000,
        "<!--'\"<disk>-->" * 100_000,
        "<?x '\"<disk>?>" * 100_000,
        "<![CDATA['\"<disk>]]>" * 100_000,
        "'\">" * 300_000,
        "<x " + " ".join(f"a{n}=''" for n in range(30_000)) + "/>",
        f"<x{' ' * 3_000_000}/>",
        f"<x a{' ' * 1_500_000}={' ' * 1_500_000}'>'/>",
    ],
    ids=lambda filling: filling[:8],
)
def test_large_documents_take_linear_time(filling: str) -> None:
    for xml in (domain(disk_xml(filling)), domain(disk_xml()).replace("<domain>", f"<domain>{filling}")):
        started = time.process_time()
        after = localize_domain(xml, {"vda": LOCAL})
        assert time.process_time() - started < 2
        assert len(after) < len(xml)
        assert filling in after


def test_a_large_start_tag_takes_linear_time() -> None:
    for space in (" " * 2_000_000, " ".join(f" a{n}=''" for n in range(20_000)) + " "):
        xml = domain(disk_xml().replace("<source ", f"<source {space}"))
        started = time.process_time()
        assert localize_domain(xml, {"vda": LOCAL}).count(LOCAL) == 1
        assert time.process_time() - started < 2


# -- one <disk>, of a hotplug


def plugged(path: str, serial: str, disk_type: str = "file") -> Disk:
    attribute = {"file": "file", "block": "dev", "network": "name"}[disk_type]
    return read_disk_element(
        f"<?xml version='1.0' encoding='utf-8'?><disk type='{disk_type}' device='disk' snapshot='no'>"
        f"<source {attribute}='{path}'/><target dev='sdb' bus='scsi'/><serial>{serial}</serial>"
        "<driver name='qemu' type='qcow2' cache='none' io='threads'/></disk>"
    )


def test_hotplugged_image() -> None:
    expected = Disk("sdb", "disk", f"{DIRECTORY}/{VOLUME}", "cow", "file", IMAGE, VOLUME, "none", ())
    assert plugged(f"{DIRECTORY}/{VOLUME}", IMAGE) == expected
    assert plugged(f"{DIRECTORY}/{VOLUME}", "") == expected
    assert plugged(f"{DIRECTORY}/{VOLUME}", IMAGE[-20:]) == expected
    assert plugged(f"/dev/{OTHER}/{VOLUME.upper()}", IMAGE.upper(), "block") == replace(
        expected, path=f"/dev/{OTHER}/{VOLUME.upper()}", disk_type="block"
    )


def test_hotplugged_other_disks_are_no_images() -> None:
    assert not plugged("/dev/mapper/3600140565f2a1b0c4d24f1c9a1b2c3d4", IMAGE, "block").is_vdsm_image
    assert not plugged(f"/run/vdsm/managedvolumes/{VOLUME}", IMAGE, "block").is_vdsm_image
    assert not plugged(f"pool/volume-{VOLUME}", IMAGE, "network").is_vdsm_image


@pytest.mark.parametrize("xml", ["<domain/>", "<disk/>", "<disk device='disk'><target dev=''/></disk>"])
def test_hotplugged_nonsense_is_refused(xml: str) -> None:
    with pytest.raises(BadDomain):
        read_disk_element(xml)


# -- JSON


def disk_data(**changes: object) -> dict[str, object]:
    data: dict[str, object] = {
        "device": "disk",
        "diskType": "file",
        "format": "cow",
        "path": f"{DIRECTORY}/{VOLUME}",
        "imageID": IMAGE,
        "volumeID": VOLUME,
        "shared": "false",
        "name": "vda",
        "serial": IMAGE,
    }
    data.update(changes)
    return {key: value for key, value in data.items() if value is not ...}


def test_reading_a_disk() -> None:
    assert read_disk(text_of(DATA / "file-qcow2.in.json")) == Disk(
        name="vda",
        device="disk",
        path=f"{DIRECTORY}/{VOLUME}",
        format="cow",
        disk_type="file",
        image_id=IMAGE,
        volume_id=VOLUME,
        shared="none",
        volumes=(Volume(VOLUME, f"{DIRECTORY}/{VOLUME}"), Volume(BASE, f"{DIRECTORY}/{BASE}")),
        domain_id=DOMAIN,
        storage_type="file",
    )


@pytest.mark.parametrize(
    ("disk_type", "volume_info", "was_local"),
    [
        ("block", {"type": "file"}, True),
        ("block", {"type": "network"}, True),
        ("block", {"type": "block"}, False),
        ("file", {"type": "file"}, False),
        ("file", {"type": "network"}, False),  # Gluster's own protocol is not used
        ("block", {}, False),
        ("block", "x", False),
        ("block", ..., False),
    ],
)
def test_a_disk_that_vdsm_read_from_the_domain_of_a_local_vm(
    disk_type: str, volume_info: object, was_local: bool
) -> None:
    text = json.dumps(disk_data(diskType=disk_type, volumeInfo=volume_info))
    assert read_disk(text).was_local == was_local


def test_reading_a_wrapped_disk_with_upper_case_ids() -> None:
    disk = read_disk(text_of(DATA / "wrapped-block-raw.in.json"))
    assert (disk.image_id, disk.volume_id) == (
        "f708192a-3b4c-45d6-a7f8-091a2b3c4d5e",
        "0819202a-4c5d-46e7-b809-1a2b3c4d5e6f",
    )
    assert (disk.format, disk.disk_type, disk.shared, disk.name) == ("raw", "block", "exclusive", "")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("none", "none"),
        ("false", "false"),
        (False, "false"),
        ("False", "false"),
        ("exclusive", "exclusive"),
        ("shared", "shared"),
        ("true", "shared"),
        (True, "shared"),
        ("transient", "transient"),
        (..., "none"),
    ],
)
def test_words_for_sharing(value: object, expected: str) -> None:
    assert read_disk(json.dumps(disk_data(shared=value))).shared == expected


def test_a_lun_in_json_is_no_image() -> None:
    guid = "360014059f8e7d6c5b4a3f2e1d0c9b8a7"
    lun = {
        "device": "disk",
        "name": "sda",
        "path": f"/dev/mapper/{guid}",
        "diskType": "block",
        "format": "raw",
    }
    disk = read_disk(json.dumps({**lun, "GUID": guid, "imageID": guid}))
    assert (disk.is_vdsm_image, disk.image_id, disk.path) == (False, "", f"/dev/mapper/{guid}")
    with pytest.raises(BadDiskData, match="only one of imageID and volumeID"):
        read_disk(json.dumps({**lun, "GUID": guid, "imageID": IMAGE}))


def test_a_cdrom_needs_no_identity() -> None:
    disk = read_disk('{"device": "cdrom", "path": "/x.iso"}')
    assert disk == Disk("", "cdrom", "/x.iso", "", "", "", "", "none", ())


def test_a_network_image_is_read() -> None:
    disk = read_disk(json.dumps(disk_data(diskType="network", path=f"vol/sd/images/{IMAGE}/{VOLUME}")))
    assert disk.is_vdsm_image
    assert disk.disk_type == "network"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"device": ...}, "device is ''"),
        ({"device": "tape"}, "device is 'tape'"),
        ({"device": 1}, "device is of type int, not a string"),
        ({"device": None}, "device is of type NoneType"),
        ({"path": ...}, "path of disk vda is ''"),
        ({"path": "x/y"}, "path of disk vda is 'x/y', not absolute"),
        ({"path": ["/x"]}, "path is of type list"),
        ({"path": "/x\0"}, "control characters"),
        ({"path": "/x\n"}, "control characters"),
        ({"path": "/x\ud800"}, "control characters"),
        ({"format": ...}, "format of disk vda is ''"),
        ({"format": "qcow2"}, "format of disk vda is 'qcow2'"),
        ({"format": {}}, "format is of type dict"),
        ({"diskType": ...}, "type of disk vda is ''"),
        ({"diskType": "dir"}, "type of disk vda is 'dir'"),
        ({"imageID": ...}, "only one of imageID and volumeID"),
        ({"volumeID": ""}, "only one of imageID and volumeID"),
        ({"imageID": ..., "volumeID": ...}, "looks like an image"),
        ({"imageID": 5}, "imageID is of type int"),
        ({"imageID": "x"}, "imageID is 'x', not a UUID"),
        ({"domainID": "x"}, "domainID is 'x', not a UUID"),
        ({"domainID": f"../{OTHER}"}, "not a UUID"),
        ({"domainID": 5}, "domainID is of type int"),
        ({"volumeID": VOLUME + "\n"}, "not a UUID"),
        ({"volumeID": f"../{VOLUME}"}, "not a UUID"),
        ({"volumeID": "-" + VOLUME[1:]}, "not a UUID"),
        ({"serial": OTHER}, f"serial of disk vda is {OTHER}, its imageID {IMAGE}"),
        ({"shared": "maybe"}, "shared is 'maybe'"),
        ({"shared": 1}, "shared is 'of the wrong type'"),
        ({"shared": None}, "shared is"),
        ({"name": 7}, "name is of type int"),
        ({"volumeChain": {}}, "volumeChain is not a list"),
        ({"volumeChain": None}, "volumeChain is not a list"),
        ({"volumeChain": ["x"]}, "not an object"),
        ({"volumeChain": [{}]}, "without volumeID or path"),
        ({"volumeChain": [{"volumeID": BASE}]}, "without volumeID or path"),
        ({"volumeChain": [{"volumeID": BASE, "path": 1}]}, "path is of type int"),
        ({"volumeChain": [{"volumeID": "x", "path": "/x"}]}, "not a UUID"),
        ({"volumeChain": [{"volumeID": BASE, "path": "/x"}] * 2}, f"it has volume {BASE} twice"),
    ],
)
def test_refused_disks(changes: dict[str, object], problem: str) -> None:
    for text in (json.dumps(disk_data(**changes)), json.dumps({"disk": disk_data(**changes)})):
        with pytest.raises(BadDiskData) as caught:
            read_disk(text)
        assert problem in str(caught.value)
        assert str(caught.value).isprintable()


HOSTILE_JSON = {
    "empty": ("", "not JSON"),
    "cut off": ('{"device": "disk"', "not JSON"),
    "two objects": ("{}{}", "not JSON"),
    "byte order mark": ("\ufeff{}", "not JSON"),
    "list": ("[]", "not a JSON object"),
    "string": ('"disk"', "not a JSON object"),
    "number": ("1", "not a JSON object"),
    "null": ("null", "not a JSON object"),
    "empty object": ("{}", "device is ''"),
    "wrapped list": ('{"disk": []}', "device is ''"),
    "wrapped twice": ('{"disk": {"disk": {"device": "disk"}}}', "device is ''"),
    "key twice": ('{"device": "disk", "device": "cdrom"}', "it has key device twice"),
    "key twice, escaped": ('{"path": "/x", "\\u0070ath": "/y"}', "it has key path twice"),
    "nested key twice": ('{"a": [{"b": {"c": 1, "c": 1}}]}', "it has key c twice"),
    "disk and more": ('{"disk": {"device": "disk"}, "device": "disk"}', "other keys beside an object 'disk'"),
    "disk twice": ('{"disk": {}, "disk": {}}', "it has key disk twice"),
    "NaN": ('{"a": NaN}', "it holds the number NaN"),
    "infinity": ('{"a": [-Infinity]}', "it holds the number -Infinity"),
    "overflow": ('{"a": 1e999}', "it holds the number 1e999"),
    "many digits": ('{"a": ' + "1" * 4301 + "}", "more than 4300 digits"),
    "very many digits": ('{"a": ' + "1" * 10_000_000 + "}", "more than 4300 digits"),
    "deep lists": ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "nests too deeply"),
    "deep objects": ('{"a": ' * 200_000 + "1" + "}" * 200_000, "nests too deeply"),
    "too long": (" " * (DATA_LIMIT + 1), "longer than 16777216"),
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_hostile_json(name: str) -> None:
    text, problem = HOSTILE_JSON[name]
    for read in (read_disk, lambda text: localize_disk(text, LOCAL)):
        with pytest.raises(BadDiskData) as caught:
            read(text)
        assert problem in str(caught.value)
        assert str(caught.value).isprintable()


def test_nesting_that_only_writing_finds_too_deep_is_refused() -> None:
    for depth in range(100, sys.getrecursionlimit() + 100, 10):
        text = json.dumps(disk_data())[:-1] + ', "a": ' + "[" * depth + "]" * depth + "}"
        with contextlib.suppress(BadDiskData):
            assert json.loads(localize_disk(text, LOCAL))["path"] == LOCAL


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"device": "cdrom"}, "disk vda is a cdrom of type 'file' and cannot be made local"),
        ({"device": "floppy"}, "disk vda is a floppy"),
        ({"device": "lun", "diskType": "block"}, "disk vda is a lun"),
        ({"diskType": "network"}, "disk vda is a disk of type 'network'"),
    ],
)
def test_disks_that_cannot_be_made_local(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(BadDiskData, match=problem):
        localize_disk(json.dumps(disk_data(**changes)), LOCAL)


def test_a_local_path_is_checked() -> None:
    for path in ("", "x", '/x"', "/x\n", "/x\ud800"):
        with pytest.raises(BadDiskData, match="is not the path of a local disk"):
            localize_disk(json.dumps(disk_data()), path)


def check_disk_rewritten(before: str, after: str) -> None:
    """The same pairs in the same order at every level, but four values of the disk."""
    old, new = (json.loads(text, object_pairs_hook=list) for text in (before, after))
    wrapped = [key for key, _ in old] == ["disk"]
    if wrapped:
        (_, old), (_, new) = old[0], new[0]
    changed = {"path": LOCAL, "format": "raw", "diskType": "block", "shared": "exclusive"}
    expected = [(key, changed.get(key, value)) for key, value in old]
    if "shared" not in dict(old):
        expected.append(("shared", "exclusive"))
    assert new == expected
    assert repr(new) == repr(expected)  # 1, 1.0 and true are equal but not the same
    assert localize_disk(after, LOCAL) == after


@pytest.mark.parametrize("file", JSON_FILES, ids=stem)
def test_every_other_key_stays(file: Path) -> None:
    text = text_of(file)
    check_disk_rewritten(text, localize_disk(text, LOCAL))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=examples(60))
@given(
    others=st.dictionaries(
        st.text().filter(lambda key: key not in ("volumeChain", "disk")), VALUES, max_size=5
    ),
    order=st.randoms(use_true_random=False),
    ascii_only=st.booleans(),
    wrapped=st.booleans(),
)
def test_rewriting_keeps_any_other_json(
    others: dict[str, Any], order: random.Random, ascii_only: bool, wrapped: bool
) -> None:
    pairs = list({**others, **disk_data()}.items())
    order.shuffle(pairs)
    data = {"disk": dict(pairs)} if wrapped else dict(pairs)
    text = json.dumps(data, ensure_ascii=ascii_only, indent=1 if ascii_only else None)
    after = localize_disk(text, LOCAL)
    check_disk_rewritten(text, after)
    assert replace(read_disk(after), path="", format="", disk_type="", shared="") == replace(
        read_disk(text), path="", format="", disk_type="", shared=""
    )


# -- anything at all

NASTY = [
    "<!-- -->",
    "<?x?>",
    "<x/>",
    "<x:source xmlns:x='urn:x' file='/x'/>",
    "<metadata><vm xmlns='http://ovirt.org/vm/1.0'/></metadata>",
    *"<>&'\"/=?!-[] \t\r\n\0\x85\u2028",
    "<!--",
    "-->",
    "<![CDATA[",
    "]]>",
    "<?x ",
    "?>",
    "<disk>",
    "</disk>",
    "<disk type='file'><source file='/x'/><target dev='vda'/></disk>",
    "<source file='/x'/>",
    "<target dev='vda'/>",
    "&#38;",
    "&lt;",
    " xmlns='urn:x'",
    "<!DOCTYPE domain>",
    '"type": 1, ',
    "\\ud800",
    "{",
    "1e999",
]


@st.composite
def mutated(draw: st.DrawFn, texts: list[str]) -> str:
    """One of `texts` with up to three pieces removed, doubled or replaced, half of them between tags."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(len(text) - 1, 0)))
        if draw(st.booleans()):
            start = text.find(">", start) + 1
        end = start + draw(st.integers(0, 12))
        piece = draw(st.sampled_from(["", text[start:end] * 2, *NASTY]))
        keep_to = draw(st.sampled_from([start, start, end]))
        text = text[:start] + piece + text[keep_to:]
    return text


SMALL = [
    domain(disk_xml(QCOW2)),
    domain(TWO, metadata() + metadata("vdb", OTHER, BASE)).replace(f"<serial>{IMAGE}</serial>", ""),
]


def check_any_domain(xml: str) -> None:
    with contextlib.suppress(BadDomain):
        paths = local_paths(xml)
        check_only_disks_changed(xml, localize_domain(xml, paths), paths)


@settings(max_examples=examples(200))
@given(mutated([*SMALL, text_of(DATA / "comments-namespaces.in.xml")]))
def test_a_mutated_domain_is_refused_or_rewritten_exactly(xml: str) -> None:
    check_any_domain(xml)


@settings(max_examples=examples(150))
@given(mutated([text_of(file) for file in JSON_FILES]))
def test_a_mutated_disk_is_refused_or_rewritten_exactly(text: str) -> None:
    with contextlib.suppress(BadDiskData):
        if can_be_local(read_disk(text)):
            check_disk_rewritten(text, localize_disk(text, LOCAL))


@settings(max_examples=examples(150))
@given(
    st.text() | st.text(alphabet="<>/'\"= !-?[]{}:,a1\n\u2028") | st.from_regex(r"<(disk|domain)[^<]{0,9}>")
)
def test_any_text_is_read_or_an_error(text: str) -> None:
    for read, error in READERS.values():
        with contextlib.suppress(error):
            read(text)


def start_tag(rng: random.Random, name: str, attributes: dict[str, str], empty: str) -> str:
    """A start tag in any spelling: order, white space, quotes, and attributes of other names."""
    pairs = dict(attributes)
    for other in rng.sample(["a:type", "a:file", "a:dev", "types", "fil", "i", "Io"], rng.randint(0, 3)):
        pairs[other] = "".join(rng.choices("a ü<>&'\"=/\t", k=rng.randint(0, 6)))
    text = f"<{name}"
    for key in rng.sample(list(pairs), len(pairs)):
        space, before, after = (rng.choice(spaces) for spaces in ([" ", "\n", "\t  "], ["", " "], ["", "\n"]))
        text += f"{space}{key}{before}={after}{quoteattr(pairs[key])}"
    return f"{text}{rng.choice(['', ' ', chr(10)])}{empty}>"


def metadata_cache(rng: random.Random) -> str:
    """What libvirt accepts only inside of a qcow2 driver, in some spelling."""
    inside = ["", "<!--</metadata_cache>-->", "<metadata_cache/>", "<max_size unit='bytes' >1</max_size>"]
    empty = start_tag(rng, "metadata_cache", {}, "/")
    full = start_tag(rng, "metadata_cache", {}, "") + rng.choice(inside) + "</metadata_cache\n>"
    return rng.choice([empty, full])


def spelled_disk(rng: random.Random) -> str:
    """A disk `vda` of volume VOLUME in any spelling, among what looks like markup and is none."""
    misc = [
        "",
        " ",
        "<!--<disk'>-->",
        '<?p <driver"?>',
        "<![CDATA[<source/>]]>",
        "&lt;source&gt;",
        "<a:source/>",
    ]
    kind, path = rng.choice([("file", {"file": f"/a'\"<&>/{VOLUME}"}), ("block", {"dev": f"/b/{VOLUME}"})])
    cache = rng.choice([{}, {"cache": "none"}, {"cache": "writeback"}])
    io = rng.choice([{}, {"io": "threads"}, {"io": "native"}])
    unref = rng.choice([{}, {"discard_no_unref": "on"}])
    children = [
        start_tag(rng, "source", path, "") + rng.choice(misc) + "</source>",
        start_tag(rng, "driver", {"name": "qemu", "type": "qcow2", **cache, **io, **unref}, "")
        + rng.choice(["", rng.choice(misc).join(metadata_cache(rng) for _ in range(rng.randint(1, 2)))])
        + rng.choice([" ", rng.choice(misc)])
        + "</driver >",
        start_tag(rng, "target", {"dev": "vda"}, "/"),
        rng.choice(misc),
    ]
    rng.shuffle(children)
    disk = start_tag(rng, "disk", {"type": kind, "device": "disk"}, "")
    return rng.choice(misc) + disk + rng.choice(misc).join(children) + "</disk>" + rng.choice(misc)


@pytest.mark.parametrize("seed", range(10))
def test_any_spelling_of_a_disk_is_rewritten_exactly(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        xml = domain(spelled_disk(rng)).replace("<domain>", "<domain xmlns:a='urn:a'>")
        assert local_paths(xml) == {"vda": LOCAL}
        after = localize_domain(xml, {"vda": LOCAL})
        check_only_disks_changed(xml, after, {"vda": LOCAL})
        driver = etree.fromstring(after.encode()).find("devices/disk/driver")
        assert driver is not None
        assert driver.get("cache") != "none" or driver.get("io") == "native"


# -- cost


def test_reading_json_does_not_import_lxml() -> None:
    code = (
        "import sys; from localdisk.vdsm.disk_json import read_disk; read_disk(sys.argv[1]);"
        "print('lxml' in sys.modules)"
    )
    text = text_of(DATA / "file-qcow2.in.json")
    done = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_inputs_are_not_modified() -> None:
    paths = {"vda": LOCAL}
    before = copy.copy(paths)
    localize_domain(domain(disk_xml()), paths)
    assert paths == before
