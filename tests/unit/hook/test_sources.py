from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdisk import device_mapper, run
from localdisk.errors import CommandFailed, CommandMissing, SourceRefused
from localdisk.frozen import replace
from localdisk.hook import sources
from localdisk.hook.qcow2 import Header
from localdisk.hook.sources import Layer, Source
from localdisk.vdsm.disks import Disk, Volume
from tests.examples import examples
from tests.fakes.images import BASE, FORMAT, IMAGE, LEAF, MIB, MIDDLE, VOLUMES, disk, extension, made

SECRET = b"the host's own secret\n" * 100
OTHER_IMAGE = "cccccccc-9999-4000-8000-000000000000"

fuzzing = settings(max_examples=examples(150))


def qemu_img(*argv: object) -> None:
    subprocess.run(["qemu-img", *map(str, argv)], check=True, capture_output=True)


def qemu_io(path: Path, *commands: str, image_format: str = "qcow2") -> None:
    words = [word for command in commands for word in ("-c", command)]
    argv = ["qemu-io", "-f", image_format, *words, str(path)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    assert "error" not in (done.stdout + done.stderr).lower()


# -- headers of our own making


END = extension(0, b"")


@pytest.mark.parametrize(
    ("changes", "header"),
    [
        ({}, Header(MIB, "", "")),
        ({"version": 2}, Header(MIB, "", "")),
        ({"size": 512}, Header(512, "", "")),
        ({"size": 64 << 40}, Header(64 << 40, "", "")),
        ({"cluster_bits": 9}, Header(MIB, "", "")),
        ({"cluster_bits": 21}, Header(MIB, "", "")),
        ({"incompatible": 1 << 3}, Header(MIB, "", "")),
        ({"incompatible": 1 << 4 | 1 << 3}, Header(MIB, "", "")),
        ({"backing": b"base"}, Header(MIB, "base", "")),
        ({"backing": b"base", "extensions": END}, Header(MIB, "base", "")),
        ({"backing": b"base", "extensions": extension(FORMAT, b"raw")}, Header(MIB, "base", "raw")),
        ({"backing": b"base", "extensions": extension(FORMAT, b"qcow2") + END, "version": 2}, None),
        ({"backing": b"base", "extensions": extension(5, b"x" * 9) + extension(FORMAT, b"qcow2")}, None),
        ({"backing": b"base", "extensions": END + extension(FORMAT, b"qcow2")}, Header(MIB, "base", "")),
        ({"backing": b"b" * 1023}, Header(MIB, "b" * 1023, "")),
        ({"backing": b"/etc/\xff\n\0"}, Header(MIB, "/etc/\\xff\n\0", "")),
        ({"backing": b"b", "extensions": extension(FORMAT, b"\xff")}, Header(MIB, "b", "\\xff")),
        ({"extensions": extension(FORMAT, b"raw") + END}, Header(MIB, "", "raw")),
    ],
    ids=str,
)
def test_headers(changes: dict[str, Any], header: Header | None) -> None:
    assert Header.parse(made(**changes)) == (header or Header(MIB, "base", "qcow2"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"magic": b"QFI\xfa"}, "it is no qcow2 image"),
        ({"magic": b"\0\0\0\0"}, "it is no qcow2 image"),
        ({"version": 1}, "qcow2 version 1 is not known"),
        ({"version": 4}, "qcow2 version 4 is not known"),
        ({"version": 0}, "qcow2 version 0 is not known"),
        ({"crypt": 1}, "it is encrypted"),
        ({"crypt": 2}, "it is encrypted"),
        ({"snapshots": 1}, "it has internal snapshots"),
        ({"cluster_bits": 8}, "its cluster size is 2^8"),
        ({"cluster_bits": 22}, "its cluster size is 2^22"),
        ({"cluster_bits": 0xFFFFFFFF}, "its cluster size is 2^4294967295"),
        ({"size": 0}, "its virtual size is 0 bytes"),
        ({"size": 513}, "its virtual size is 513 bytes"),
        ({"size": (64 << 40) + 512}, "its virtual size is 70368744178176"),
        ({"size": 0xFFFFFFFFFFFFFE00}, "its virtual size is 18446744073709551104 bytes"),
        ({"incompatible": 1 << 0}, "it was not closed properly"),
        ({"incompatible": 1 << 1}, "it is marked corrupt"),
        ({"incompatible": 1 << 2}, "it has an external data file"),
        ({"incompatible": 1 << 5}, "it needs unknown features 0x20"),
        ({"incompatible": 1 << 63}, "it needs unknown features"),
        ({"incompatible": 7}, "it was not closed properly"),
        ({"header_length": 96}, "its header length is 96"),
        ({"header_length": 105}, "its header length is 105"),
        ({"header_length": 65544}, "its header length is 65544"),
        ({"header_length": 0}, "its header length is 0"),
        ({"backing": b"b", "backing_size": 0}, "its backing file name lies outside"),
        ({"backing": b"b" * 1024}, "its backing file name lies outside"),
        ({"backing": b"b", "backing_size": 0xFFFFFFFF}, "its backing file name lies outside"),
        ({"backing": b"b", "backing_offset": 65536}, "its backing file name lies outside"),
        ({"backing": b"b", "backing_offset": 0xFFFFFFFFFFFFFFFF}, "its backing file name lies outside"),
        ({"backing": b"b" * 500, "cluster_bits": 9}, "its backing file name lies outside"),
        ({"backing": b"b", "extensions": extension(FORMAT, b"raw", 99)}, "a header extension is longer"),
        ({"extensions": extension(FORMAT, b"raw", 0xFFFFFFFF)}, "a header extension is longer"),
        ({"backing": b"b", "extensions": extension(5, b"raw", 0x7FFFFFFF)}, "a header extension is longer"),
    ],
    ids=str,
)
def test_headers_that_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        Header.parse(made(**changes))
    said, fix = caught.value.args
    assert said
    assert fix


def parsed(data: bytes) -> Header | None:
    """The header, or None if it is refused; any other exception is a failure."""
    try:
        return Header.parse(data)
    except ValueError as error:
        refused = error.args
    assert [type(text) for text in refused] == [str, str]
    return None


@pytest.mark.parametrize("version", [2, 3])
def test_a_header_that_is_cut_off_never_names_another_parent(version: int) -> None:
    whole = made(version=version, backing=BASE.encode(), extensions=extension(FORMAT, b"qcow2") + END)
    end = whole.rindex(BASE.encode()) + len(BASE)
    for length in range(end):
        assert parsed(whole[:length]) is None, length
    for length in (end, end + 1, 4096):
        assert parsed(whole[:length]) == Header(MIB, BASE, "qcow2")


@fuzzing
@given(st.data())
def test_a_damaged_header_is_a_header_or_refused(data: st.DataObject) -> None:
    whole = bytearray(made(backing=BASE.encode(), extensions=extension(FORMAT, b"qcow2") + END))
    for _ in range(data.draw(st.integers(1, 4))):
        offset = data.draw(st.integers(0, 200))
        junk = data.draw(st.binary(min_size=1, max_size=8))
        whole[offset : offset + len(junk)] = junk
    header = parsed(bytes(whole[: data.draw(st.integers(0, 400))]))
    if header:
        assert 0 < header.virtual_size <= 64 << 40
        assert header.virtual_size % 512 == 0


@fuzzing
@given(st.binary(max_size=300))
def test_anything_else_is_refused(data: bytes) -> None:
    parsed(data)
    parsed(b"QFI\xfb" + data)
    parsed(b"QFI\xfb\0\0\0\x03" + data)


# -- headers of qemu-img


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ("compat=0.10", MIB),
        ("compat=1.1", 10 << 30),
        ("compat=1.1,lazy_refcounts=on", 512),
        ("compression_type=zstd", MIB),
        ("extended_l2=on,cluster_size=128k", MIB),
        ("cluster_size=512", MIB),
        ("cluster_size=2M", 8 << 40),
        ("compat=0.10,cluster_size=512", MIB),
    ],
)
def test_headers_of_qemu_img(tmp_path: Path, options: str, size: int) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", "-o", options, path, size)
    assert Header.parse(path.read_bytes()[:65536]) == Header(size, "", "")
    backing = f"{options},backing_file={BASE},backing_fmt=raw"
    qemu_img("create", "-u", "-f", "qcow2", "-o", backing, path, size)
    assert Header.parse(path.read_bytes()[:65536]) == Header(size, BASE, "raw")


def test_image_with_snapshot_bitmap_and_data_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", path, MIB)
    qemu_img("bitmap", "--add", path, "b")
    assert Header.parse(path.read_bytes()) == Header(MIB, "", "")
    qemu_img("snapshot", "-c", "s", path)
    with pytest.raises(ValueError, match="internal snapshots"):
        Header.parse(path.read_bytes())
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", path, MIB)
    with pytest.raises(ValueError, match="external data file"):
        Header.parse(path.read_bytes())


# -- chains


@pytest.fixture(name="chain", scope="module")
def fixture_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A leaf on a middle layer on a raw base, as vdsm lays them out; do not change them."""
    directory = tmp_path_factory.mktemp("chain")
    make_chain(directory)
    return directory


def make_chain(directory: Path) -> None:
    (directory / BASE).write_bytes(b"\x11" * (256 << 10))
    os.truncate(directory / BASE, MIB)
    for name, backing, kind in ((MIDDLE, BASE, "raw"), (LEAF, MIDDLE, "qcow2")):
        path = directory / name
        qemu_img("create", "-q", "-f", "qcow2", "-b", backing, "-F", kind, path, MIB)
    qemu_io(directory / MIDDLE, "write -P 0x22 64k 64k")
    qemu_io(directory / LEAF, "write -P 0x33 0 4k", "write -z 128k 64k")


CHAIN_VIEW = b"\x33" * 4096 + b"\x11" * 61440 + b"\x22" * 65536 + bytes(65536) + b"\x11" * 65536


@pytest.fixture(name="own_chain")
def fixture_own_chain(chain: Path, tmp_path: Path) -> Path:
    """A copy of the chain that a test may change."""
    return Path(shutil.copytree(chain, tmp_path / "chain"))


def view(source: Source, out: Path) -> bytes:
    """What qemu-img reads through the descriptors of `source`."""
    run.run(["qemu-img", "convert", "-O", "raw", source.filename, str(out)], pass_fds=source.fds)
    return out.read_bytes()


@contextlib.contextmanager
def no_descriptor_is_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


def refusal(given_disk: Disk) -> str:
    with no_descriptor_is_left(), pytest.raises(SourceRefused) as caught, sources.opened(given_disk):
        pass
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith("source volume ")
    assert message.partition(" : ")[2]
    return message


def test_a_chain_is_read_as_the_guest_sees_it(chain: Path, tmp_path: Path) -> None:
    with no_descriptor_is_left(), sources.opened(disk(chain / LEAF, volumes=[MIDDLE, BASE])) as source:
        leaf, middle, base = source.fds
        assert source.virtual_size == MIB
        assert [layer.path for layer in source.layers] == [str(chain / n) for n in (LEAF, MIDDLE, BASE)]
        assert source.filename.startswith("json:")
        assert json.loads(source.filename[5:]) == {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": f"/proc/self/fd/{leaf}"},
            "backing": {
                "driver": "qcow2",
                "file": {"driver": "file", "filename": f"/proc/self/fd/{middle}"},
                "backing": {
                    "driver": "raw",
                    "file": {"driver": "file", "filename": f"/proc/self/fd/{base}"},
                },
            },
        }
        assert view(source, tmp_path / "out") == CHAIN_VIEW.ljust(MIB, b"\0")
        qemu_img("compare", "-f", "qcow2", "-F", "raw", chain / LEAF, tmp_path / "out")


def unnamed(leaf: Path) -> Disk:
    """A disk whose chain vdsm does not name, in the image's own directory."""
    return Disk(**{**vars(disk(leaf, volumes=None)), "image_id": leaf.parent.name})


def test_a_chain_that_vdsm_does_not_name_is_in_the_images_directory(chain: Path) -> None:
    with sources.opened(unnamed(chain / LEAF)) as source:
        assert [layer.path for layer in source.layers] == [str(chain / n) for n in (LEAF, MIDDLE, BASE)]


def test_a_directory_that_is_not_the_images_holds_other_vms_volumes(chain: Path) -> None:
    """As /dev/<storage domain>/ does: a name there, in a forged header, is another VM's volume."""
    assert f"vdsm did not name its backing volume {MIDDLE}" in refusal(disk(chain / LEAF, volumes=None))


def test_paths_are_those_of_vdsm_not_of_the_header(own_chain: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (own_chain / BASE).rename(elsewhere / BASE)
    volumes = tuple(Volume(n, str((elsewhere if n == BASE else own_chain) / n)) for n in (LEAF, MIDDLE, BASE))
    given_disk = disk(own_chain / LEAF)
    with sources.opened(Disk(**{**vars(given_disk), "volumes": volumes})) as source:
        assert view(source, tmp_path / "out").startswith(CHAIN_VIEW)


@pytest.mark.parametrize("merges", [1, 2, 20])
def test_names_that_vdsm_wrote_until_2016(tmp_path: Path, merges: int) -> None:
    """../IMAGE/VOLUME, and once more for each live merge; qemu-img itself must read the same."""
    directory = tmp_path / IMAGE
    directory.mkdir()
    make_chain(directory)
    way = f"../{IMAGE}/" * merges  # a name has at most 1023 bytes
    for name, backing, kind in ((MIDDLE, BASE, "raw"), (LEAF, MIDDLE, "qcow2")):
        qemu_img("rebase", "-u", "-f", "qcow2", "-b", way + backing, "-F", kind, directory / name)
    for named in ([MIDDLE, BASE], None):
        with sources.opened(disk(directory / LEAF, volumes=named)) as source:
            assert [layer.path for layer in source.layers] == [
                str(directory / name) for name in (LEAF, MIDDLE, BASE)
            ]
            assert view(source, tmp_path / "out").startswith(CHAIN_VIEW)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", directory / LEAF, tmp_path / "out")


def test_a_leaf_without_parent_says_so(tmp_path: Path) -> None:
    """qemu would follow the name in the header, also a name that is written after we have read it."""
    (tmp_path / "secret").write_bytes(SECRET.ljust(MIB, b"\0"))
    path = tmp_path / LEAF
    qemu_img("create", "-f", "qcow2", path, MIB)
    with sources.opened(disk(path)) as source:
        assert json.loads(source.filename[5:])["backing"] is None
        qemu_img("rebase", "-u", "-f", "qcow2", "-b", tmp_path / "secret", "-F", "raw", path)
        assert view(source, tmp_path / "out") == bytes(MIB)


def test_a_link_to_the_images_directory_is_followed(tmp_path: Path) -> None:
    """vdsm has such in /run/vdsm/storage/DOMAIN/ and in /rhev/data-center/POOL/."""
    (tmp_path / "images" / IMAGE).mkdir(parents=True)
    (tmp_path / "images" / IMAGE / LEAF).write_bytes(bytes(MIB))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / IMAGE).symlink_to(tmp_path / "images" / IMAGE)
    with sources.opened(disk(tmp_path / "run" / IMAGE / LEAF, "raw")) as source:
        assert source.virtual_size == MIB


OTHER = "bbbbbbbb-9999-4000-8000-000000000000"


@pytest.mark.parametrize("image_format", ["raw", "cow"])
@pytest.mark.parametrize(
    ("link", "target"),
    [
        (f"{IMAGE}/{LEAF}", "secret"),  # something that vdsm can read
        (f"{IMAGE}/{LEAF}", f"{OTHER}/{BASE}"),  # another volume
        (f"{IMAGE}/{LEAF}", f"{OTHER}/{LEAF}"),  # one of the same name, elsewhere
        (IMAGE, OTHER),  # another image that has a volume of that name
    ],
)
def test_a_link_in_a_volumes_place(tmp_path: Path, link: str, target: str, image_format: str) -> None:
    """Anybody who can write to shared storage can make such a link."""
    (tmp_path / OTHER).mkdir()
    for name in ("secret", f"{OTHER}/{BASE}", f"{OTHER}/{LEAF}"):
        qemu_img("create", "-f", {"raw": "raw", "cow": "qcow2"}[image_format], tmp_path / name, MIB)
    if "/" in link:
        (tmp_path / IMAGE).mkdir()
    (tmp_path / link).symlink_to(tmp_path / target)
    said = "it is a link to another file" if "/" in link else "it leads to something else than volume"
    assert said in refusal(disk(tmp_path / IMAGE / LEAF, image_format))


DOMAIN, OTHER_DOMAIN = (f"dddddddd-{n}000-4000-8000-000000000000" for n in "12")


def in_a_domain(path: Path) -> Disk:
    """A raw disk of DOMAIN, as vdsm names it."""
    return replace(disk(path, "raw"), domain_id=DOMAIN)


def make_images(tmp_path: Path) -> Path:
    """Two storage domains with the same image; returns where they are mounted."""
    for domain in (DOMAIN, OTHER_DOMAIN):
        directory = tmp_path / "mnt" / "srv:_exp" / domain / "images" / IMAGE
        directory.mkdir(parents=True)
        (directory / LEAF).write_bytes(domain.encode().ljust(MIB))
    return tmp_path / "mnt" / "srv:_exp"


@pytest.mark.parametrize(
    ("link", "target", "path"),
    [
        ("", "", f"mnt/srv:_exp/{DOMAIN}/images/{IMAGE}/{LEAF}"),
        (f"run/{DOMAIN}/{IMAGE}", f"mnt/srv:_exp/{DOMAIN}/images/{IMAGE}", f"run/{DOMAIN}/{IMAGE}/{LEAF}"),
        (f"{OTHER}/{DOMAIN}", f"mnt/srv:_exp/{DOMAIN}", f"{OTHER}/{DOMAIN}/images/{IMAGE}/{LEAF}"),
        ("mnt/_data", "mnt/srv:_exp", f"mnt/_data/{DOMAIN}/images/{IMAGE}/{LEAF}"),
    ],
    ids=["no link", "/run/vdsm/storage", "/rhev/data-center/POOL", "a local domain's mount"],
)
def test_vdsms_own_links_lead_to_the_domain(tmp_path: Path, link: str, target: str, path: str) -> None:
    """It makes them when it connects the pool or prepares an image, the last for a domain on local disks."""
    make_images(tmp_path)
    if link:
        (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / link).symlink_to(tmp_path / target)
    with sources.opened(in_a_domain(tmp_path / path)) as source:
        assert os.pread(source.fds[0], len(DOMAIN), 0) == DOMAIN.encode()


@pytest.mark.parametrize("place", ["", "images", f"images/{IMAGE}"])
def test_a_link_to_another_storage_domain(tmp_path: Path, place: str) -> None:
    """A directory there has an image and a volume of the same ids: nothing else tells them apart."""
    mount = make_images(tmp_path)
    (mount / DOMAIN / place).rename(tmp_path / "away")
    (mount / DOMAIN / place).symlink_to(mount / OTHER_DOMAIN / place)
    path = mount / DOMAIN / "images" / IMAGE / LEAF
    assert f"it leads to something else than volume {LEAF}" in refusal(in_a_domain(path))
    (tmp_path / "run" / DOMAIN).mkdir(parents=True)
    (tmp_path / "run" / DOMAIN / IMAGE).symlink_to(path.parent)
    assert "it leads to something else" in refusal(in_a_domain(tmp_path / "run" / DOMAIN / IMAGE / LEAF))


def test_a_path_in_another_storage_domain(tmp_path: Path) -> None:
    """vdsm names one domain and the path of another."""
    path = make_images(tmp_path) / OTHER_DOMAIN / "images" / IMAGE / LEAF
    assert "it leads to something else" in refusal(in_a_domain(path))


def test_a_parent_in_another_storage_domain(tmp_path: Path) -> None:
    """The leaf is where it belongs; the parent's path, as vdsm names it, is in another domain."""
    mount = make_images(tmp_path)
    leaf, base = (mount / d / "images" / IMAGE for d in (DOMAIN, OTHER_DOMAIN))
    leaf_on(leaf, BASE)
    (base / BASE).write_bytes(bytes(MIB))
    given_disk = replace(disk(leaf / LEAF, volumes=[]), domain_id=DOMAIN)
    volumes = (*given_disk.volumes, Volume(BASE, str(base / BASE)))
    assert f"something else than volume {BASE}" in refusal(replace(given_disk, volumes=volumes))


def dm(*names: str) -> str:
    """The name that device-mapper has for a volume group and a logical volume."""
    return "-".join(name.replace("-", "--") for name in names)


@pytest.mark.parametrize(
    ("name", "domain_id", "is_volume"),
    [
        (dm(DOMAIN, LEAF), DOMAIN, True),
        (dm(DOMAIN, LEAF), "", True),
        (dm(OTHER_DOMAIN, LEAF), "", True),
        (dm(OTHER_DOMAIN, LEAF), DOMAIN, False),
        (dm("ovirt-local", LEAF), DOMAIN, False),
        (dm(DOMAIN, BASE), DOMAIN, False),
        (dm(f"{DOMAIN}-x", LEAF), DOMAIN, False),
        (dm(DOMAIN, f"x-{LEAF}"), DOMAIN, False),
        (dm(f"x-{DOMAIN}", LEAF), DOMAIN, False),
        (dm(DOMAIN + LEAF), DOMAIN, False),
        (dm(LEAF), "", False),
        ("", DOMAIN, False),
        ("", "", False),
    ],
)
def test_the_name_of_a_block_volume(name: str, domain_id: str, is_volume: bool) -> None:
    """dmsetup(8), lvm2 lib/activate/dev_manager.c."""
    assert sources._is_volume_name(name, domain_id, LEAF) is is_volume


@pytest.mark.parametrize(("domain_id", "is_refused"), [(DOMAIN, False), (OTHER_DOMAIN, True)])
def test_a_block_volume_in_another_storage_domain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, domain_id: str, is_refused: bool
) -> None:
    """A link of vdsm's place leads to a device, whose name the kernel tells."""
    (tmp_path / LEAF).write_bytes(bytes(MIB))
    status = SimpleNamespace(st_mode=stat.S_IFBLK | 0o660, st_rdev=0)
    monkeypatch.setattr(os, "fstat", lambda _fd: status)
    monkeypatch.setattr(device_mapper, "read_name", lambda _device: dm(DOMAIN, LEAF))
    given_disk = replace(disk(tmp_path / LEAF, "raw"), domain_id=domain_id)
    if is_refused:
        assert f"it leads to something else than volume {LEAF}" in refusal(given_disk)
    else:
        with sources.opened(given_disk) as source:
            assert source.layers[0].is_block


def test_a_hard_link_is_a_volume(tmp_path: Path) -> None:
    """A template's base is one in the directory of each image that is made from it."""
    (tmp_path / "template").write_bytes(bytes(MIB))
    os.link(tmp_path / "template", tmp_path / LEAF)
    with sources.opened(disk(tmp_path / LEAF, "raw")) as source:
        assert source.virtual_size == MIB


@pytest.mark.parametrize(
    ("size", "virtual_size"),
    [(512, 512), (1, 512), (511, 512), (513, 1024), (65536, 65536), (1000000, 1000448)],
)
def test_raw_volumes_are_whole_sectors(tmp_path: Path, size: int, virtual_size: int) -> None:
    content = os.urandom(size)
    (tmp_path / LEAF).write_bytes(content)
    with sources.opened(disk(tmp_path / LEAF, "raw")) as source:
        assert source.virtual_size == virtual_size
        assert json.loads(source.filename[5:]) == {
            "driver": "raw",
            "file": {"driver": "file", "filename": f"/proc/self/fd/{source.fds[0]}"},
        }
        assert view(source, tmp_path / "out") == content.ljust(virtual_size, b"\0")


def test_a_guest_cannot_make_its_raw_disk_a_qcow2_image(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    path = tmp_path / LEAF
    qemu_img("create", "-u", "-f", "qcow2", "-b", tmp_path / "secret", "-F", "raw", path, MIB)
    content = path.read_bytes().ljust(MIB, b"\0")
    path.write_bytes(content)
    with sources.opened(disk(path, "raw")) as source:
        assert len(source.layers) == 1
        assert view(source, tmp_path / "out") == content


def test_a_base_that_is_raw_by_its_childs_header_is_not_probed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    base = tmp_path / BASE
    qemu_img("create", "-u", "-f", "qcow2", "-b", tmp_path / "secret", "-F", "raw", base, MIB)
    content = base.read_bytes().ljust(MIB, b"\0")
    base.write_bytes(content)
    qemu_img("create", "-u", "-f", "qcow2", "-b", BASE, "-F", "raw", tmp_path / LEAF, MIB)
    with sources.opened(disk(tmp_path / LEAF, volumes=[BASE])) as source:
        assert view(source, tmp_path / "out") == content


def test_a_volume_that_is_swapped_after_opening_changes_nothing(own_chain: Path, tmp_path: Path) -> None:
    (own_chain / "other").write_bytes(SECRET)
    with sources.opened(disk(own_chain / LEAF, volumes=[MIDDLE, BASE])) as source:
        before = source.fingerprint
        for name in (LEAF, MIDDLE, BASE):
            os.replace(shutil.copy(own_chain / "other", own_chain / "new"), own_chain / name)
        assert view(source, tmp_path / "out") == CHAIN_VIEW.ljust(MIB, b"\0")
        assert source.fingerprint == before


def long_chain(directory: Path, layers: int) -> Disk:
    """So many layers, the base raw; made by writing other names into one leaf of qemu-img."""
    pattern = directory / "pattern"
    qemu_img("create", "-u", "-f", "qcow2", "-b", VOLUMES[1], "-F", "qcow2", pattern, MIB)
    content = pattern.read_bytes()
    raw = directory / "raw"
    qemu_img("create", "-u", "-f", "qcow2", "-b", VOLUMES[layers - 1], "-F", "raw", raw, MIB)
    for n in range(layers - 2):
        child = content.replace(VOLUMES[1].encode(), VOLUMES[n + 1].encode())
        (directory / VOLUMES[n]).write_bytes(child)
    raw.rename(directory / VOLUMES[layers - 2])
    (directory / VOLUMES[layers - 1]).write_bytes(b"\x44" * MIB)
    return disk(directory / LEAF, volumes=VOLUMES[1:layers])


def test_the_longest_chain(tmp_path: Path) -> None:
    with no_descriptor_is_left(), sources.opened(long_chain(tmp_path, 64)) as source:
        assert len(source.layers) == 64
        assert view(source, tmp_path / "out") == b"\x44" * MIB


def test_a_chain_that_is_too_long(tmp_path: Path) -> None:
    assert "more than 64 layers" in refusal(long_chain(tmp_path, 65))


# -- chains that are refused


@pytest.mark.parametrize(
    "backing",
    [
        "/etc/shadow",
        f"/images/{BASE}",
        f"../{OTHER_IMAGE}/{BASE}",
        f"../{IMAGE}/../{BASE}",
        f"../{IMAGE}/../{OTHER_IMAGE}/{BASE}",
        f"../../images/{IMAGE}/{BASE}",
        f"../{IMAGE}/",
        f"../{IMAGE}//{BASE}",
        f"..//{BASE}",
        f"../{IMAGE.upper()}/{BASE}",
        f"./{BASE}",
        f"{BASE}/",
        f"{BASE}.qcow2",
        f" {BASE}",
        BASE.upper(),
        "base",
        'json:{"driver":"file","filename":"/etc/shadow"}',
        "nbd:localhost:10809",
        "file:" + BASE,
        "https://example.com/x",
        "fat:/etc",
        "x\ny",
    ],
)
def test_a_parent_that_is_no_volume(tmp_path: Path, backing: str) -> None:
    path = tmp_path / LEAF
    path.write_bytes(made(backing=backing.encode(), extensions=extension(FORMAT, b"raw") + END))
    (tmp_path / BASE).write_bytes(bytes(MIB))
    for volumes in ([BASE], None):
        message = refusal(disk(path, volumes=volumes))
        assert "not a volume of its image : if it is a genuine chain, correct it with qemu-img" in message


# -- the advice of a refusal, followed with real files


@dataclass(frozen=True)
class Advice:
    """How a good volume is broken, what the refusal advises then, and the commands that follow it.

    `break_it` gets the path of the volume; words of a command may be that path (IT), a new file beside it
    (NEW) or a key file (KEY).
    """

    break_it: Callable[[Path], None]
    advice: str
    commands: tuple[tuple[str, ...], ...]


def feature(bit: int) -> Callable[[Path], None]:
    return lambda path: patch(path, 72, ">Q", 1 << bit)


def patch(path: Path, offset: int, form: str, value: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(struct.pack(form, value))


def with_data_file(path: Path) -> None:
    data = f"data_file={path.with_name('data')},data_file_raw=on"
    qemu_img("convert", "-f", "qcow2", "-O", "qcow2", "-o", data, path, path.with_name("made"))
    path.with_name("made").rename(path)


def with_snapshots(path: Path) -> None:
    for name in ("a", "b"):
        qemu_img("snapshot", "-c", name, path)


def encrypted(path: Path) -> None:
    key = path.with_name("key")
    key.write_text("secret")
    secret, options = f"secret,id=KEYID,file={key}", "encrypt.format=aes,encrypt.key-secret=KEYID"
    made_there = path.with_name("made")
    qemu_img("convert", "--object", secret, "-f", "qcow2", "-O", "qcow2", "-o", options, path, made_there)
    made_there.rename(path)


CHECK = ("qemu-img", "check", "-f", "qcow2", "-r", "all", "IT")
CONVERT = (("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", "IT", "NEW"), ("mv", "NEW", "IT"))
DECRYPT = (
    *("qemu-img", "convert", "--object", "secret,id=NAME,file=KEY", "--image-opts"),
    *("driver=qcow2,encrypt.key-secret=NAME,file.filename=IT", "-O", "qcow2", "NEW"),
)
ADVICE = {
    "dirty": Advice(feature(0), "qemu-img check -f qcow2 -r all", (CHECK,)),
    "corrupt": Advice(feature(1), "qemu-img check -f qcow2 -r all", (CHECK,)),
    "data file": Advice(with_data_file, "qemu-img convert -f qcow2 -O qcow2 and put", CONVERT),
    "snapshots": Advice(
        with_snapshots,
        "each with qemu-img snapshot -d NAME",
        tuple(("qemu-img", "snapshot", "-d", name, "IT") for name in ("a", "b")),
    ),
    "encrypted": Advice(
        encrypted,
        "qemu-img convert --object secret,id=NAME,file=KEY --image-opts",
        (DECRYPT, ("mv", "NEW", "IT")),
    ),
    "odd size": Advice(
        lambda path: patch(path, 24, ">Q", MIB - 7),
        "qemu-img resize -f qcow2 --shrink",
        (("qemu-img", "resize", "-f", "qcow2", "--shrink", "IT", str(MIB)),),
    ),
}


@pytest.mark.parametrize("name", ADVICE)
def test_advice_that_is_followed_makes_the_volume_good(tmp_path: Path, name: str) -> None:
    path, advice = tmp_path / LEAF, ADVICE[name]
    qemu_img("create", "-q", "-f", "qcow2", path, MIB)
    qemu_io(path, "write -P 0x55 64k 128k")
    advice.break_it(path)
    assert advice.advice in refusal(disk(path))
    places = {"IT": str(path), "NEW": str(tmp_path / "new"), "KEY": str(tmp_path / "key")}
    for command in advice.commands:
        words = [re.sub(r"\b(IT|NEW|KEY)\b", lambda found: places[str(found[0])], word) for word in command]
        subprocess.run(words, check=True, capture_output=True)
    with sources.opened(disk(path)) as source:
        assert source.virtual_size == MIB
        content = view(source, tmp_path / "out")
    assert content == bytes(64 << 10) + b"\x55" * (128 << 10) + bytes(MIB - (192 << 10))


@pytest.mark.parametrize(
    "break_it", [feature(10), lambda path: patch(path, 4, ">I", 4)], ids=["feature", "version"]
)
def test_qemu_img_converts_nothing_that_it_does_not_know(
    tmp_path: Path, break_it: Callable[[Path], None]
) -> None:
    """So restoring is the first advice."""
    path = tmp_path / LEAF
    qemu_img("create", "-q", "-f", "qcow2", path, MIB)
    break_it(path)
    assert " : restore it; if qemu-img info opens it" in refusal(disk(path))
    for words in (("convert", "-f", "qcow2", "-O", "qcow2", path, tmp_path / "new"), ("info", path)):
        with pytest.raises(subprocess.CalledProcessError):
            qemu_img(*words)


@pytest.mark.parametrize("backing_format", [None, "vmdk"])
def test_a_backing_format_is_set_as_advised(
    own_chain: Path, tmp_path: Path, backing_format: str | None
) -> None:
    extensions = extension(FORMAT, backing_format.encode()) if backing_format else b""
    header = bytearray((own_chain / LEAF).read_bytes())
    at = header.find(extension(FORMAT, b"qcow2"))
    assert at > 0
    header[at : at + 16] = extensions.ljust(16, b"\0")
    (own_chain / LEAF).write_bytes(header)
    leaf = disk(own_chain / LEAF, volumes=[MIDDLE, BASE])
    assert f"set it with qemu-img rebase -u -f qcow2 -b {MIDDLE} -F raw|qcow2" in refusal(leaf)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", MIDDLE, "-F", "qcow2", own_chain / LEAF)
    with sources.opened(leaf) as source:
        assert view(source, tmp_path / "out").startswith(CHAIN_VIEW)


def test_a_genuine_chain_is_corrected_as_advised(own_chain: Path, tmp_path: Path) -> None:
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", own_chain / MIDDLE, "-F", "qcow2", own_chain / LEAF)
    leaf = disk(own_chain / LEAF, volumes=[MIDDLE, BASE])
    assert "correct it with qemu-img rebase -u -f qcow2 -b VOLUME -F FORMAT" in refusal(leaf)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", MIDDLE, "-F", "qcow2", own_chain / LEAF)
    with sources.opened(leaf) as source:
        assert view(source, tmp_path / "out").startswith(CHAIN_VIEW)


def leaf_on(
    directory: Path, backing: str, backing_format: str = "raw", name: str = LEAF, version: int = 3
) -> Path:
    extensions = extension(FORMAT, backing_format.encode()) if backing_format else b""
    content = made(backing=backing.encode(), extensions=extensions + END, version=version)
    (directory / name).write_bytes(content)
    return directory / name


def test_a_parent_that_vdsm_does_not_name(tmp_path: Path) -> None:
    (tmp_path / BASE).write_bytes(bytes(MIB))
    message = refusal(disk(leaf_on(tmp_path, BASE), volumes=[MIDDLE]))
    assert f"vdsm did not name its backing volume {BASE}" in message


@pytest.mark.parametrize("backing_format", ["", "vmdk", "file", "QCOW2", "raw\0", "luks", "x" * 300])
def test_a_parent_whose_format_is_not_known(tmp_path: Path, backing_format: str) -> None:
    (tmp_path / BASE).write_bytes(bytes(MIB))
    message = refusal(disk(leaf_on(tmp_path, BASE, backing_format), volumes=[BASE]))
    assert f"set it with qemu-img rebase -u -f qcow2 -b {BASE} -F raw|qcow2" in message


@pytest.mark.parametrize("names", [(LEAF,), (MIDDLE, LEAF), (MIDDLE, BASE, MIDDLE), (BASE, BASE)])
def test_a_cycle(tmp_path: Path, names: Sequence[str]) -> None:
    for child, parent in zip((LEAF, *names), names):
        leaf_on(tmp_path, parent, "qcow2", name=child)
    for one in (disk(tmp_path / LEAF, volumes=[MIDDLE, BASE]), unnamed(tmp_path / LEAF)):
        assert "its chain has a cycle" in refusal(one)


def test_a_parent_that_is_not_there(tmp_path: Path) -> None:
    message = refusal(disk(leaf_on(tmp_path, BASE), volumes=[BASE]))
    assert message.startswith(f"source volume {tmp_path / BASE} is refused: No such file or directory : ")


def test_a_parent_that_is_no_qcow2_image(tmp_path: Path) -> None:
    (tmp_path / BASE).write_bytes(bytes(MIB))
    message = refusal(disk(leaf_on(tmp_path, BASE, "qcow2"), volumes=[BASE]))
    assert "it is no qcow2 image, but vdsm or its child says so : restore" in message


@pytest.mark.parametrize("image_format", ["raw", "cow"])
@pytest.mark.parametrize("kind", ["missing", "empty", "directory", "link", "fifo", "device", "loop", "nul"])
def test_what_is_no_volume(tmp_path: Path, kind: str, image_format: str) -> None:
    path = tmp_path / LEAF
    expected = "it is no regular file and no block device"
    if kind == "missing":
        expected = "No such file or directory : check that the shared storage is there"
    elif kind == "empty":
        path.touch()
        expected = {"raw": "its size is 0 bytes", "cow": "it is no qcow2 image"}[image_format]
    elif kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path)
        expected = "it is a link to another file"
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
        expected = "it is a link to another file"
    else:
        path = tmp_path / "a\0b"
        expected = "embedded null "  # byte or character
    assert expected in refusal(disk(path, image_format))


def test_a_volume_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / LEAF
    path.write_bytes(bytes(512))
    path.chmod(0)
    with as_ordinary_user():
        assert "Permission denied : check that the shared storage" in refusal(disk(path, "raw"))


@contextlib.contextmanager
def as_ordinary_user() -> Iterator[None]:
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_volume_that_is_too_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "MAX_DISK", 1024)  # no file system has room for the real limit
    path = tmp_path / LEAF
    path.write_bytes(bytes(1025))
    assert "its size is 1536 bytes : check the volume" in refusal(disk(path, "raw"))


@pytest.mark.parametrize("cut", [0, 4, 71, 72, 103, 104, 127])
def test_a_leaf_that_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = leaf_on(tmp_path, BASE)
    os.truncate(path, cut)
    assert " : restore the volume" in refusal(disk(path, volumes=[BASE]))


# -- how much a copy writes


def test_writes_of_a_copy(chain: Path) -> None:
    with sources.opened(disk(chain / LEAF, volumes=[MIDDLE, BASE])) as source:
        assert source.writes(0) == MIB
        assert source.writes(65536) == 192 << 10


def test_writes_of_clusters_that_are_not_whole(tmp_path: Path) -> None:
    with (tmp_path / LEAF).open("wb") as file:
        file.write(b"x" * 4096)
        file.seek(900_000)
        file.write(b"x" * 100_000)
    with sources.opened(disk(tmp_path / LEAF, "raw")) as source:
        assert source.virtual_size == 1_000_448
        assert source.writes(65536) == 4 * 65536  # 0, 13, 14, and the last, cut off, as whole
    (tmp_path / LEAF).write_bytes(b"x" * 1_000_000)
    with sources.opened(disk(tmp_path / LEAF, "raw")) as source:
        assert source.writes(65536) == 1_000_448


@pytest.mark.parametrize(
    ("chunk", "taken"),
    [
        (64 << 10, 4 * (64 << 10)),
        (128 << 10, 3 * (128 << 10)),  # the first two clusters are in one
        (512 << 10, 3 * (512 << 10)),
        (2 << 20, 2 * (2 << 20)),
        (192 << 10, 4 * (192 << 10)),  # not exact: each cluster of 64 KiB could be in another block
        (4 << 20, 2 * (4 << 20)),
        (1 << 30, 20 << 20),  # at most the whole disk
    ],
)
def test_what_scattered_data_take_of_a_thin_pool(tmp_path: Path, chunk: int, taken: int) -> None:
    with (tmp_path / LEAF).open("wb") as file:
        for at in (0, 64 << 10, 1 << 20, 9 << 20):
            file.seek(at)
            file.write(b"x")
        file.truncate(20 << 20)
    with sources.opened(disk(tmp_path / LEAF, "raw")) as source:
        assert source.writes(chunk) == taken


def test_what_scattered_layers_take_of_a_thin_pool(tmp_path: Path) -> None:
    """Each block of the template that they share with others and write to becomes their own."""
    (tmp_path / BASE).write_bytes(b"\x11" * MIB * 8)
    qemu_img("create", "-q", "-f", "qcow2", "-b", BASE, "-F", "raw", tmp_path / LEAF, 8 * MIB)
    qemu_io(tmp_path / LEAF, *(f"write -P 1 {at}k 4k" for at in (0, 64, 1000, 1030, 5000)))
    with sources.opened(disk(tmp_path / LEAF, volumes=[BASE])) as source:
        assert source.writes_above(64 << 10) == 5 * (64 << 10)
        assert source.writes_above(1 << 20) == 3 << 20
        assert source.writes_above(2 << 20) == 4 << 20


@pytest.mark.parametrize(
    ("extents", "blocks"),
    [
        ([], 0),
        ([(0, 0)], 0),
        ([(0, 1)], 1),
        ([(9, 1), (10, 1)], 2),
        ([(0, 10), (10, 10)], 2),
        ([(5, 20)], 3),
        ([(5, 1), (6, 1), (9, 2), (11, 80)], 10),
        ([(0, 5), (0, 0), (7, 1)], 1),
    ],
)
def test_blocks_are_counted_once(extents: list[tuple[int, int]], blocks: int) -> None:
    assert sources.count_blocks(extents, 10) == blocks


def test_writes_of_an_empty_image(tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", tmp_path / LEAF, "1T")
    with sources.opened(disk(tmp_path / LEAF)) as source:
        assert source.writes(65536) == 0
        assert source.writes(0) == 1 << 40


def test_writes_of_an_image_whose_tables_are_forged(tmp_path: Path) -> None:
    path = tmp_path / LEAF
    path.write_bytes(made(size=MIB))  # its L1 table lies behind the end
    with sources.opened(disk(path)) as source, contextlib.suppress(CommandFailed):
        assert 0 <= source.writes(65536) <= MIB


@pytest.mark.parametrize(
    "out",
    ["", "{}", "[]", "null", '{"required": null, "fully-allocated": 5}', '{"required": 5}', "[" * 9999],
    ids=lambda out: out[:20],
)
def test_a_measure_that_is_not_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: str) -> None:
    (tmp_path / LEAF).write_bytes(bytes(512))
    commands: list[list[str]] = []

    def measure(argv: list[str], *, deadline: float, pass_fds: Sequence[int], limits: dict[str, int]) -> str:
        assert limits == {"AS": 2 << 30, "CPU": 600, "CORE": 0}
        commands.append(argv)
        return out

    monkeypatch.setattr(run, "run", measure)
    with sources.opened(disk(tmp_path / LEAF, "raw")) as source:
        with pytest.raises(CommandFailed, match=f"measure failed for {tmp_path / LEAF} .*: it printed"):
            source.writes(65536)
        as_qcow2 = ["--output", "json", "-O", "qcow2", "-o", "cluster_size=65536"]
        assert commands == [["qemu-img", "measure", *as_qcow2, source.filename]]


# -- fingerprints


def fingerprint(directory: Path) -> str:
    with sources.opened(disk(directory / LEAF, volumes=[MIDDLE, BASE])) as source:
        return source.fingerprint


def set_mtime(path: Path, mtime_ns: int) -> None:
    os.utime(path, ns=(path.stat().st_atime_ns, mtime_ns))


@pytest.mark.parametrize("name", [LEAF, MIDDLE, BASE])
def test_a_change_of_any_layer_changes_the_fingerprint(own_chain: Path, name: str) -> None:
    path = own_chain / name
    seen = [fingerprint(own_chain)]
    mtime = path.stat().st_mtime_ns

    set_mtime(path, mtime + 1)
    seen.append(fingerprint(own_chain))

    set_mtime(path, mtime)
    assert fingerprint(own_chain) == seen[0]

    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 512)
    set_mtime(path, mtime)
    seen.append(fingerprint(own_chain))

    os.replace(shutil.copy2(path, own_chain / "copy"), path)
    seen.append(fingerprint(own_chain))

    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"\x99")
    set_mtime(path, mtime)
    seen.append(fingerprint(own_chain))

    assert len(set(seen)) == len(seen)
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in seen)


def test_what_does_not_change_the_fingerprint(own_chain: Path, tmp_path: Path) -> None:
    before = fingerprint(own_chain)
    for name in (LEAF, MIDDLE, BASE):
        path = own_chain / name
        os.utime(path, ns=(0, path.stat().st_mtime_ns))
        path.chmod(0o444)
        os.link(path, own_chain / f"{name}.lease")
    own_chain.rename(tmp_path / "renamed")
    assert fingerprint(tmp_path / "renamed") == before


def test_fingerprint_of_an_image_is_not_that_of_its_raw_bytes(tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", tmp_path / LEAF, MIB)
    with sources.opened(disk(tmp_path / LEAF)) as cow, sources.opened(disk(tmp_path / LEAF, "raw")) as raw:
        assert cow.fingerprint != raw.fingerprint


@pytest.mark.parametrize("name", [MIDDLE, BASE])
def test_an_empty_layer_on_top_changes_nothing(own_chain: Path, name: str) -> None:
    """A snapshot puts it there; what a guest sees is what lies below."""
    with sources.opened(disk(own_chain / LEAF, volumes=[MIDDLE, BASE])) as source:
        before, size = source.fingerprint, source.virtual_size
    tops, under = VOLUMES[10:12], [*VOLUMES[10:12], LEAF, MIDDLE, BASE]
    for top, below in zip(tops, (LEAF, tops[0])):
        qemu_img("create", "-f", "qcow2", "-b", below, "-F", "qcow2", own_chain / top, size)
        with sources.opened(disk(own_chain / top, volumes=under, leaf=top)) as source:
            assert source.fingerprint == before
            assert source.layers[0].is_empty
    qemu_io(own_chain / tops[0], "write -z 0 64k")  # zeros hide what is below
    with sources.opened(disk(own_chain / tops[1], volumes=under, leaf=tops[1])) as source:
        assert [layer.is_empty for layer in source.layers[:2]] == [True, False]
        assert source.fingerprint != before
    set_mtime(own_chain / name, 7)
    with sources.opened(disk(own_chain / tops[1], volumes=under, leaf=tops[1])) as source:
        assert source.fingerprint != before


@pytest.mark.parametrize("size", [MIB - 512, MIB + 512])
def test_an_empty_layer_of_another_size_is_another_disk(tmp_path: Path, size: int) -> None:
    qemu_img("create", "-f", "qcow2", tmp_path / BASE, MIB)
    qemu_img("create", "-f", "qcow2", "-b", BASE, "-F", "qcow2", tmp_path / LEAF, size)
    below, above = disk(tmp_path / BASE, leaf=BASE), disk(tmp_path / LEAF, volumes=[BASE])
    with sources.opened(below) as base, sources.opened(above) as leaf:
        assert leaf.layers[0].is_empty
        assert leaf.fingerprint != base.fingerprint


def test_an_image_without_anything_below_is_what_it_is(tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", tmp_path / LEAF, MIB)
    with sources.opened(disk(tmp_path / LEAF)) as source:
        assert not source.layers[0].is_empty
        assert source.fingerprint == sources._fingerprint(source.base)


# -- layers


def test_a_block_device_is_another_node() -> None:
    layer = Layer("/dev/sd/vol", "raw", fd=7, is_block=True, virtual_size=512, identity="")
    assert layer.node["file"] == {"driver": "host_device", "filename": "/proc/self/fd/7"}


def test_direct_io_is_as_the_file_system_allows(tmp_path: Path) -> None:
    (tmp_path / LEAF).write_bytes(bytes(512))
    try:
        os.close(os.open(tmp_path / LEAF, os.O_RDONLY | os.O_DIRECT))
        expected = True
    except OSError:
        expected = False
    with sources.opened(disk(tmp_path / LEAF, "raw")) as source:
        assert source.allows_direct_io is expected


def test_direct_io_must_work_on_every_layer(monkeypatch: pytest.MonkeyPatch, chain: Path) -> None:
    with sources.opened(disk(chain / LEAF, volumes=[MIDDLE, BASE])) as source:
        for refusing in (None, *source.fds):
            monkeypatch.setattr(sources, "_opens_direct", lambda fd, refusing=refusing: fd != refusing)
            assert source.allows_direct_io is (refusing is None)


# -- the base, and what stands on it


def test_base_and_above(chain: Path, tmp_path: Path) -> None:
    with sources.opened(disk(chain / LEAF, volumes=[MIDDLE, BASE])) as source:
        leaf, middle, base = source.layers
        assert source.base is base
        assert source.above == (leaf, middle)
        alone = source.base_alone
        assert alone.layers == (base,)
        assert (alone.above, alone.fds, alone.virtual_size) == ((), (base.fd,), MIB)
        assert alone.fingerprint == base.fingerprint != source.fingerprint
        assert view(alone, tmp_path / "out") == (chain / BASE).read_bytes()
        with sources.opened_alone(str(chain / BASE), "raw") as opened_alone:
            assert opened_alone.fingerprint == base.fingerprint


@pytest.mark.parametrize(
    ("sizes", "grows"),
    [
        ((512,), True),
        ((512, 512), True),
        ((1024, 512), True),
        ((512, 1024), False),
        ((2048, 512, 1024), False),  # the middle one hides the end of the base
        ((2048, 1024, 512), True),
    ],
)
def test_a_layer_that_is_smaller_than_its_base_hides_its_end(sizes: tuple[int, ...], grows: bool) -> None:
    layers = tuple(Layer("/p", "qcow2", 0, False, size, "") for size in sizes)
    assert Source(layers).grows is grows


def test_a_chain_on_another_base(chain: Path) -> None:
    """The device may be larger than the base was: what is behind is not part of it."""
    with sources.opened(disk(chain / LEAF, volumes=[MIDDLE, BASE])) as source:
        leaf, middle, _ = source.fds
        assert json.loads(source.filename_on(77)[5:]) == {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": f"/proc/self/fd/{leaf}"},
            "backing": {
                "driver": "qcow2",
                "file": {"driver": "file", "filename": f"/proc/self/fd/{middle}"},
                "backing": {
                    "driver": "raw",
                    "size": MIB,
                    "file": {"driver": "host_device", "filename": "/proc/self/fd/77"},
                },
            },
        }
        device = json.loads(source.base_alone.filename_on(77)[5:])
        assert device["size"] == MIB
        assert device["file"]["driver"] == "host_device"


def mapped(layer: Layer) -> list[tuple[int, int]]:
    """Start and length of what a layer alone holds, as `qemu-img map` says."""
    with sources.alone(layer) as (filename, fds):
        out = run.run(["qemu-img", "map", "--output", "json", filename], pass_fds=fds)
    return [(e["start"], e["length"]) for e in json.loads(out) if e["depth"] == 0 and e["present"]]


def test_a_layer_alone_holds_what_it_holds(chain: Path) -> None:
    """Data, and zeros that hide what is below; not what lies below."""
    with no_descriptor_is_left(), sources.opened(disk(chain / LEAF, volumes=[MIDDLE, BASE])) as source:
        assert mapped(source.layers[0]) == [(0, 64 << 10), (128 << 10, 64 << 10)]
        assert mapped(source.layers[1]) == [(64 << 10, 64 << 10)]
        assert source.writes_above(65536) == 192 << 10
        assert source.base_alone.writes_above(65536) == 0


@pytest.mark.parametrize(
    ("options", "commands", "held"),
    [
        ("", [], 0),
        ("", ["write -P 0 0 64k"], 64 << 10),  # zeros as data
        ("", ["write -z 0 128k"], 128 << 10),
        ("", ["write -P 1 0 64k", "discard 0 64k"], 64 << 10),  # now zeros
        ("", ["write -c -P 1 0 128k"], 128 << 10),
        ("extended_l2=on,cluster_size=128k", ["write -P 1 4k 4k"], 64 << 10),
        ("extended_l2=on,cluster_size=128k", ["write -P 1 0 4k", "write -z 64k 4k"], 128 << 10),
        ("cluster_size=4k", ["write -P 1 4k 4k"], 64 << 10),
        ("cluster_size=2M", ["write -P 1 0 4k"], MIB),  # cut off where the disk ends
    ],
    ids=str,
)
def test_what_layers_hold(tmp_path: Path, options: str, commands: list[str], held: int) -> None:
    (tmp_path / BASE).write_bytes(b"\x11" * MIB)
    words = ["-o", options] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *words, "-b", BASE, "-F", "raw", tmp_path / LEAF, MIB)
    if commands:
        qemu_io(tmp_path / LEAF, *commands)
    with sources.opened(disk(tmp_path / LEAF, volumes=[BASE])) as source:
        assert source.writes_above(65536) == held


@pytest.mark.parametrize(
    ("line", "held"),
    [
        (b"", (0, 0)),
        (b"[\n", (0, 0)),
        (b"]\n", (0, 0)),
        (b'[{ "start": 3, "length": 5, "depth": 0, "present": true, "zero": true, "data": false},', (3, 5)),
        (b'{ "start": 3, "length": 5, "depth": 1, "present": true, "zero": true, "data": false}]', (0, 0)),
        (b'{ "start": 3, "length": 5, "depth": 0, "present": false, "zero": true, "data": false},', (0, 0)),
    ],
)
def test_lines_of_a_map(line: bytes, held: tuple[int, int]) -> None:
    """qemu-img 7.2 prints an extent a line, and the list's brackets around them."""
    assert sources._held(line, "/v") == held


@pytest.mark.parametrize(
    "line",
    [
        *(b"x", b"{", b"5", b'"x"', b'{"depth": 0}', b'{"depth": 0, "present": true}', b"{}{}", b"\xff"),
        *(b'{"depth": 0, "present": true, "length": 5}', b'{"depth":' * 3000),
        b'{"depth": 0, "present": true, "start": 0, "length": null}',
    ],
    ids=lambda line: repr(line[:20]),
)
def test_lines_of_no_map(line: bytes) -> None:
    with pytest.raises(CommandFailed, match=r"qemu-img map failed for /v .*: it printed"):
        sources._held(line, "/v")


def test_a_map_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, tool = run.start_reporting, ["sh", "-c", "echo oops >&2; exit 3"]
    monkeypatch.setattr(run, "start_reporting", lambda _argv, fds, _limits: start(tool, fds))
    layer = Layer("/the/volume", "qcow2", 0, False, MIB, "")
    source = Source((layer, layer))
    with no_descriptor_is_left(), pytest.raises(CommandFailed) as caught:
        source.writes_above(65536)
    assert "qemu-img map failed for /the/volume (exit code 3): oops" in str(caught.value)
    tool[2] = "exit 127"
    with pytest.raises(CommandMissing, match="qemu-img cannot be run, although"):
        source.writes_above(65536)
    tool[2] = "echo garbage; sleep 60"
    with no_descriptor_is_left(), pytest.raises(CommandFailed, match="it printed"):
        source.writes_above(65536)


def test_a_layer_that_changes_is_another(tmp_path: Path) -> None:
    path = tmp_path / LEAF
    path.write_bytes(b"x" * MIB)
    set_mtime(path, 5)
    with sources.opened_alone(str(path), "raw") as source:
        assert source.base.is_unchanged()
        set_mtime(path, 6)
        assert not source.base.is_unchanged()
        set_mtime(path, 5)
        assert source.base.is_unchanged()
        with path.open("r+b") as file:
            file.write(b"y")
        set_mtime(path, 5)
        assert not source.base.is_unchanged()
    with sources.opened_alone(str(path), "raw") as source:
        os.truncate(path, MIB + 512)
        set_mtime(path, 5)
        assert not source.base.is_unchanged()
    assert not source.base.is_unchanged()  # closed


def test_a_volume_alone(tmp_path: Path) -> None:
    (tmp_path / BASE).write_bytes(b"x" * MIB)
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / MIDDLE, MIB)
    qemu_img("create", "-q", "-f", "qcow2", "-b", BASE, "-F", "raw", tmp_path / LEAF)
    with no_descriptor_is_left():
        for name, image_format in ((BASE, "raw"), (MIDDLE, "qcow2"), (LEAF, "raw")):
            with sources.opened_alone(str(tmp_path / name), image_format) as source:
                assert [layer.path for layer in source.layers] == [str(tmp_path / name)]
        for name, image_format, problem in (
            (LEAF, "qcow2", "it stands on another volume"),
            (BASE, "qcow2", "it is no qcow2 image"),
            (VOLUMES[9], "raw", "No such file"),
        ):
            with pytest.raises(SourceRefused, match=problem):
                sources.opened_alone(str(tmp_path / name), image_format).__enter__()


def test_only_block_volumes_have_a_name_of_device_mapper(
    monkeypatch: pytest.MonkeyPatch, chain: Path
) -> None:
    monkeypatch.setattr(device_mapper, "read_name", lambda _device: "vg-lv")
    with sources.opened(disk(chain / LEAF, volumes=[MIDDLE, BASE])) as source:
        assert source.base.dm_name == ""
        assert replace(source.base, is_block=True).dm_name == "vg-lv"
