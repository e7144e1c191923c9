"""Which volumes are templates', by what lies beside them on storage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdisk.hook import sources, template_source
from localdisk.hook.sources import Layer
from tests.examples import examples

VOLUME = "aaaaaaaa-0000-4000-8000-000000000000"
TEMPLATE_IMAGE = "bbbbbbbb-0000-4000-8000-000000000000"
VM_IMAGE = "cccccccc-0000-4000-8000-000000000000"

# As vdsm 4.50 writes it (storage/volumemetadata.py).
METADATA = {
    "CAP": "1073741824",
    "CTIME": "1700000000",
    "DESCRIPTION": '{"DiskAlias":"base=1","DiskDescription":""}',
    "DISKTYPE": "DATA",
    "DOMAIN": "dddddddd-0000-4000-8000-000000000000",
    "FORMAT": "COW",
    "GEN": "0",
    "IMAGE": TEMPLATE_IMAGE,
    "LEGALITY": "LEGAL",
    "PUUID": "00000000-0000-0000-0000-000000000000",
    "TYPE": "SPARSE",
    "VOLTYPE": "SHARED",
}


def text(**changes: str) -> str:
    return "".join(f"{key}={value}\n" for key, value in {**METADATA, **changes}.items()) + "EOF\n"


class Domain:
    """The images of a file storage domain: a template's, and one made from it, with hard links."""

    def __init__(self, directory: Path) -> None:
        self.images = directory / "images"
        for image_id in (TEMPLATE_IMAGE, VM_IMAGE):
            (self.images / image_id).mkdir(parents=True)
        self.theirs.write_bytes(b"x" * 512)
        self.meta(self.theirs).write_text(text())
        os.link(self.theirs, self.ours)
        os.link(self.meta(self.theirs), self.meta(self.ours))

    @property
    def theirs(self) -> Path:
        return self.images / TEMPLATE_IMAGE / VOLUME

    @property
    def ours(self) -> Path:
        return self.images / VM_IMAGE / VOLUME

    @staticmethod
    def meta(path: Path) -> Path:
        return path.with_name(f"{path.name}.meta")

    def say(self, content: str | bytes) -> None:
        """In the metadata, which is one file with two names."""
        self.meta(self.ours).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture(name="domain")
def fixture_domain(tmp_path: Path) -> Domain:
    return Domain(tmp_path)


@contextmanager
def opened(path: Path) -> Iterator[Layer]:
    with sources.opened_alone(str(path), "raw") as source:
        yield source.base


def is_template(path: Path) -> bool:
    before = sorted(os.listdir("/proc/self/fd"))
    with opened(path) as layer:
        found = template_source.is_template(layer)
    assert sorted(os.listdir("/proc/self/fd")) == before
    return found


def test_a_template_is_one_from_every_image(domain: Domain) -> None:
    assert is_template(domain.ours)
    assert is_template(domain.theirs)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"VOLTYPE": "LEAF"}, False),
        ({"VOLTYPE": "INTERNAL"}, False),
        ({"VOLTYPE": "shared"}, False),
        ({"VOLTYPE": "SHARED "}, False),
        ({"VOLTYPE": ""}, False),
        ({"LEGALITY": "ILLEGAL"}, False),
        ({"LEGALITY": "FAKE"}, False),
        ({"IMAGE": VM_IMAGE}, True),  # also there: what we have is a file of that image
        ({"IMAGE": "eeeeeeee-0000-4000-8000-000000000000"}, False),
        ({"IMAGE": TEMPLATE_IMAGE.upper()}, False),
        ({"IMAGE": f"../images/{TEMPLATE_IMAGE}"}, False),
        ({"IMAGE": ""}, False),
        ({"FORMAT": "x", "DESCRIPTION": "VOLTYPE=LEAF"}, True),
    ],
    ids=str,
)
def test_by_what_the_metadata_says(domain: Domain, changes: dict[str, str], expected: bool) -> None:
    domain.say(text(**changes))
    assert is_template(domain.ours) is expected


@pytest.mark.parametrize("left_out", ["VOLTYPE", "LEGALITY", "IMAGE"])
def test_what_it_does_not_say(domain: Domain, left_out: str) -> None:
    domain.say("".join(line + "\n" for line in text().splitlines() if not line.startswith(left_out)))
    assert not is_template(domain.ours)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "EOF\n",
        text().replace("EOF\n", ""),
        text()[:-2],  # cut off
        text().replace("EOF", "EOF "),
        text() + "VOLTYPE=LEAF\n",  # said twice
        "VOLTYPE=SHARED\n" + text(),
        text().replace("VOLTYPE=SHARED", "VOLTYPE=SHARED\0"),
        text().encode("utf-16"),
        b"\xff" * 1000,
        b"x" * (65 << 10) + text().encode(),  # behind what is read
    ],
    ids=lambda content: repr(content[:30]),
)
def test_metadata_that_is_none(domain: Domain, content: str | bytes) -> None:
    domain.say(content)
    assert not is_template(domain.ours)


def test_lines_that_mean_nothing_are_passed_over(domain: Domain) -> None:
    domain.say("# a comment\nno key\nlower=1\n=x\n" + text())
    assert is_template(domain.ours)


@pytest.mark.parametrize("kind", ["missing", "link", "directory", "fifo", "socket-like", "unreadable"])
def test_metadata_that_is_no_file(domain: Domain, kind: str) -> None:
    """Neither followed nor waited for."""
    meta = domain.meta(domain.ours)
    meta.unlink()
    if kind == "link":
        meta.symlink_to(domain.meta(domain.theirs))
    elif kind == "directory":
        meta.mkdir()
    elif kind == "fifo":
        os.mkfifo(meta)
    elif kind == "socket-like":
        meta.symlink_to("/dev/zero")
    elif kind == "unreadable":
        meta.symlink_to(meta)
    assert template_source.read_metadata(str(domain.ours)) == {}
    assert not is_template(domain.ours)


def test_a_volume_that_the_templates_image_does_not_have(domain: Domain) -> None:
    """Anybody who can write to an image can forge its metadata, but cannot make files in other images."""
    domain.theirs.unlink()
    assert not is_template(domain.ours)
    domain.theirs.write_bytes(b"x" * 512)  # another one of the same name
    assert not is_template(domain.ours)
    domain.theirs.unlink()
    domain.theirs.symlink_to(domain.ours)
    assert not is_template(domain.ours)


def test_a_volume_that_is_deleted_meanwhile(domain: Domain) -> None:
    with opened(domain.ours) as layer:
        domain.ours.unlink()
        assert not template_source.is_template(layer)


def test_metadata_is_read_as_it_is(domain: Domain) -> None:
    assert template_source.read_metadata(str(domain.ours)) == METADATA


KEYS = st.text(st.sampled_from("ABC_"), min_size=1, max_size=4)
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=10)


@settings(max_examples=examples(100))
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_what_is_written_is_read_back(told: dict[str, str]) -> None:
    fd = os.memfd_create("meta")
    try:
        os.write(fd, "".join(f"{key}={value}\n" for key, value in told.items()).encode() + b"EOF\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", lambda _path, _flags: os.dup(fd))
            os.lseek(fd, 0, os.SEEK_SET)
            assert template_source.read_metadata("/volume") == told
    finally:
        os.close(fd)


@settings(max_examples=examples(100))
@given(st.binary(max_size=200))
def test_anything_is_metadata_or_nothing(data: bytes) -> None:
    fd = os.memfd_create("meta")
    try:
        os.write(fd, data + b"\nEOF\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", lambda _path, _flags: os.dup(fd))
            os.lseek(fd, 0, os.SEEK_SET)
            assert isinstance(template_source.read_metadata("/volume"), dict)
    finally:
        os.close(fd)


# -- block storage


def block(dm_name: str, monkeypatch: pytest.MonkeyPatch) -> Layer:
    monkeypatch.setattr(Layer, "dm_name", dm_name)
    return Layer(f"/dev/x/{VOLUME}", "qcow2", 0, is_block=True, virtual_size=512, identity="")


DOMAIN_ID = METADATA["DOMAIN"]


def doubled(name: str) -> str:
    return name.replace("-", "--")


@pytest.mark.parametrize(
    ("dm_name", "domain_id"),
    [
        (f"{doubled(DOMAIN_ID)}-{doubled(VOLUME)}", DOMAIN_ID),
        (f"{doubled('vg')}-{doubled(VOLUME)}", ""),
        (f"{doubled(DOMAIN_ID)}-lv", ""),
        (f"{doubled(DOMAIN_ID)}-{doubled(VOLUME)}-tpool", ""),
        (doubled(DOMAIN_ID), ""),
        (f"{DOMAIN_ID}-{VOLUME}", ""),
        (f"{doubled(DOMAIN_ID.upper())}-{doubled(VOLUME)}", ""),
        ("", ""),
        ("-", ""),
        ("360000000000000000", ""),
    ],
)
def test_the_storage_domain_of_a_block_volume(
    monkeypatch: pytest.MonkeyPatch, dm_name: str, domain_id: str
) -> None:
    layer = block(dm_name, monkeypatch)
    assert template_source.domain_of(layer) == domain_id
    assert not template_source.is_template(layer)  # only root can tell
