"""The mode prefetch: which volume it takes for the one that is meant, and what it says."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from localdisk import lock
from localdisk.errors import Error, HelperRefused, NoTemplate, SourceRefused, UsageError
from localdisk.hook import prefetch, template_source
from tests.fakes.storage import SIZE, TEMPLATE_IMAGE, VM_IMAGE, VOLUME, Storage


@pytest.fixture(name="storage")
def fixture_storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Storage:
    return Storage(monkeypatch, tmp_path)


@pytest.mark.parametrize("backend", ["lvm", "lvmthin"])
@pytest.mark.parametrize("by_path", [True, False])
def test_a_template_is_fetched_once(storage: Storage, backend: str, by_path: bool) -> None:
    name = str(storage.path) if by_path else VOLUME
    assert prefetch.prefetch(name, backend) == f"{storage.path}: cached, 8 MiB"
    assert prefetch.prefetch(name, backend) == f"{storage.path}: in the cache"
    assert [each.verbs for each in storage.helpers] == [
        ["prefetch", "fill", "progress", "progress", "progress", "commit"],
        ["prefetch"],
    ]
    (made,) = set(storage.host.volumes) - {"pool0"}
    volume = storage.host.volumes[made]
    assert (volume.lv_permissions, volume.pool_lv) == ("read-only", "pool0" if backend == "lvmthin" else "")
    assert f"TEMPLATE_{VOLUME}" in volume.lv_tags
    assert lock.names() == []


def test_how_far_it_is_is_shown(storage: Storage) -> None:
    shown: list[tuple[float, int]] = []
    prefetch.prefetch(VOLUME, "lvm", lambda *what: shown.append(what))
    assert shown == [(0.0, 0), (0.5, SIZE // 2), (1.0, SIZE)]


def test_a_hard_link_of_a_vms_image_is_the_template(storage: Storage) -> None:
    ours = storage.mount / VM_IMAGE / VOLUME
    os.link(storage.path, ours)
    os.link(storage.path.with_suffix(".meta"), ours.with_suffix(".meta"))
    assert prefetch.prefetch(str(ours), "lvm").endswith(": cached, 8 MiB")
    assert prefetch.prefetch(VOLUME, "lvm").endswith(": in the cache")


def test_on_gluster_the_domain_lies_one_deeper(storage: Storage, tmp_path: Path) -> None:
    deeper = tmp_path / "mnt" / "glusterSD" / "server:volume" / "domain"
    deeper.mkdir(parents=True)
    os.rename(storage.mount, deeper / "images")
    found = deeper / "images" / TEMPLATE_IMAGE / VOLUME
    assert prefetch.prefetch(VOLUME, "lvm") == f"{found}: cached, 8 MiB"


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("template", UsageError, "'template' is neither a path nor the id of a volume"),
        ("", UsageError, "'' is neither a path nor"),
        (VOLUME.upper(), UsageError, "is neither a path nor"),
        (VM_IMAGE, NoTemplate, "no storage domain of files on this host has it"),
        ("/etc/passwd", NoTemplate, "its name is no volume's id"),
        (f"/nonexistent/{VOLUME}", NoTemplate, "there is no metadata of vdsm's beside it"),
        ("./", NoTemplate, "its name is no volume's id"),
        ("/dev/null", NoTemplate, "its name is no volume's id"),
    ],
)
def test_names_of_no_template(storage: Storage, name: str, kind: type[Error], problem: str) -> None:
    assert problem in storage.refused(kind, name)
    assert storage.helpers == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"VOLTYPE": "LEAF"}, "its metadata does not mark it as a template's"),
        ({"LEGALITY": "ILLEGAL"}, "its metadata is not that of a template in use"),
        ({"IMAGE": VM_IMAGE}, "its metadata is not that of a template in use"),
        ({"FORMAT": "VMDK"}, "there is no metadata of vdsm's"),
        ({"FORMAT": "COW"}, "it is no qcow2 image"),
    ],
    ids=str,
)
def test_volumes_that_are_no_templates(storage: Storage, changes: dict[str, str], problem: str) -> None:
    storage.tell(**changes)
    kind = SourceRefused if "qcow2" in problem else NoTemplate
    assert problem in storage.refused(kind)
    assert problem in storage.refused(kind, str(storage.path))


def test_a_template_that_stands_on_another_volume(storage: Storage) -> None:
    header = b"QFI\xfb" + (2).to_bytes(4, "big") + (72).to_bytes(8, "big") + (4).to_bytes(4, "big")
    header += (16).to_bytes(4, "big") + SIZE.to_bytes(8, "big") + bytes(40) + b"base"
    storage.path.write_bytes(header.ljust(SIZE, b"\0"))
    storage.tell(FORMAT="COW")
    assert "it stands on another volume" in storage.refused(SourceRefused)


def test_block_storage_has_no_mark(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "realpath", lambda path: f"/dev/dm-3{path}")
    message = storage.refused(NoTemplate, f"/rhev/x/{VOLUME}")
    assert "a block volume has no mark that it is a template's; the first VM caches it" in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "there is no template cache in volume group ovirt-local : set `cache: {templates: on}`"),
        ("cache: {templates: on, max_size: 4MiB}", "does not fit into the cache"),
        ("{cache: {templates: on}, margins: {reserve: 100%}}", "volume group ovirt-local lacks"),
    ],
)
def test_what_the_helper_refuses(storage: Storage, text: str, problem: str) -> None:
    storage.text = text
    assert problem in storage.refused(HelperRefused)


def test_a_template_that_changes_meanwhile(storage: Storage) -> None:
    storage.on_copy = lambda: os.utime(storage.path)
    with pytest.raises(SourceRefused, match="it changed while it was copied"):
        prefetch.prefetch(VOLUME, "lvm")
    assert set(storage.host.volumes) == {"pool0"}


# -- who it runs as


@pytest.mark.parametrize("is_root", [True, False])
def test_it_gives_up_root_for_good(monkeypatch: pytest.MonkeyPatch, is_root: bool) -> None:
    calls: list[object] = []
    entry = pwd.struct_passwd(("vdsm", "x", 36, 37, "", "/", "/sbin/nologin"))
    monkeypatch.setattr(os, "geteuid", lambda: 0 if is_root else 36)
    monkeypatch.setattr(pwd, "getpwnam", lambda name: {"vdsm": entry}[name])
    monkeypatch.setattr(os, "initgroups", lambda *what: calls.append(("groups", *what)))
    monkeypatch.setattr(os, "setgid", lambda gid: calls.append(("gid", gid)))
    monkeypatch.setattr(os, "setuid", lambda uid: calls.append(("uid", uid)))
    prefetch.become_vdsm()
    # the user last: it could not change its groups any more
    assert calls == ([("groups", "vdsm", 37), ("gid", 37), ("uid", 36)] if is_root else [])


def test_a_host_without_vdsm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def fail(name: str) -> object:
        raise KeyError(name)

    monkeypatch.setattr(pwd, "getpwnam", fail)
    with pytest.raises(UsageError, match="this host has no user vdsm"):
        prefetch.become_vdsm()


# -- the bar


@pytest.mark.parametrize(
    ("fraction", "written", "shown"),
    [
        (0.0, 0, f"[{'.' * 30}]   0% 0 B"),
        (0.5, 512 << 20, f"[{'#' * 15}{'.' * 15}]  50% 512 MiB"),
        (1.0, 3 << 30, f"[{'#' * 30}] 100% 3 GiB"),
    ],
)
def test_bar(fraction: float, written: int, shown: str) -> None:
    assert prefetch.bar(fraction, written) == f"\r{shown}\033[K"


def test_the_bar_is_always_as_wide() -> None:
    for percent in range(101):
        assert prefetch.bar(percent / 100, 0).count("#") + prefetch.bar(percent / 100, 0).count(".") >= 30
        assert len(prefetch.bar(percent / 100, 0)) == len(prefetch.bar(0, 0))


def test_metadata_is_read_once_for_each_path(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that many VMs stand on has as many paths."""
    for number in range(5):
        directory = storage.mount / f"{number}{VM_IMAGE[1:]}"
        directory.mkdir()
        os.link(storage.path, directory / VOLUME)
        os.link(storage.path.with_suffix(".meta"), directory / f"{VOLUME}.meta")
    read: list[str] = []
    read_metadata = template_source.read_metadata

    def note(path: str) -> dict[str, str]:
        read.append(path)
        return read_metadata(path)

    monkeypatch.setattr(template_source, "read_metadata", note)
    assert prefetch._find(VOLUME) == str(storage.mount / f"0{VM_IMAGE[1:]}" / VOLUME)
    assert len(read) == len(set(read)) == 6
