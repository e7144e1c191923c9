"""Unusual states of LVM: settings that change its output, restored metadata, an archive that grows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bed import host
from tests.bed.shell import attempt, run
from tests.bed.storage import RAW, FileStorage, digest, guest_bytes, new_id
from tests.kernel.steps import (
    LOCKS,
    MIB,
    THIN,
    configure,
    device,
    localdisk,
    refused_disk,
    start,
    stop,
)

LVM_LOCAL = Path("/etc/lvm/lvmlocal.conf")
SIZE = 8 * MIB
BACKENDS = pytest.mark.parametrize("custom", [{"localdisk": "lvm"}, THIN], ids=["thick", "thin"])
# Each is allowed, and each changes what LVM prints.
SHAPES = """\
log {
    command_names=1 prefix="# " indent=1 silent=1 verbose=3 activation=1 report_command_log=1
}
global { units="h" suffix=1 }
report {
    output_format="json" compact_output=1 compact_output_cols="lv_tags,pool_lv" aligned=0 buffered=0
    headings=0 separator="@" list_item_separator=";" prefixes=1 quoted=0
    columns_as_rows=1 binary_values_as_numeric=1
    time_format="%Y" mark_hidden_devices=0 two_word_unknown_device=1
    lvs_sort="-lv_size" pvs_sort="-pv_name" lvs_cols="lv_name" pvs_cols="pv_name" vgs_cols="vg_name"
    vgs_sort_full="nosuch" lvs_sort_full="-lv_size" pvs_sort_full="-pv_name" segs_sort_full="-lv_uuid"
    lvs_cols_full="lv_name" vgs_cols_full="vg_name" segs_cols_full="lv_name"
}
"""


@pytest.fixture(autouse=True)
def _defaults(thin_pool: str, libvirt: None, throwaway: None) -> Iterator[None]:
    configure()
    yield
    configure()
    assert not list(LOCKS.glob("*.*")), "a lock is left behind"


@contextmanager
def lvm_local(text: str) -> Iterator[None]:
    """LVM's configuration of this host; what tests ask LVM themselves, they ask outside of it."""
    before = LVM_LOCAL.read_text() if LVM_LOCAL.exists() else ""
    LVM_LOCAL.write_text(text)
    try:
        yield
    finally:
        LVM_LOCAL.write_text(before)


def unfinished() -> str:
    """A disk whose copy was never completed, and that nobody asks for."""
    name = new_id()
    tags = [
        word
        for tag in ("localdisk", "UPDATING", f"VM_{new_id()}", f"IU_{name}")
        for word in ("--addtag", tag)
    ]
    run("lvcreate", "-y", "-L", "4m", "-n", name, *tags, host.VOLUME_GROUP)
    return name


@BACKENDS
def test_settings_that_shape_reports(file_storage: FileStorage, custom: dict[str, str]) -> None:
    """Start, status, check, gc and stop read what they read without them."""
    image = file_storage.image(image_id := new_id(), file_storage.new_volume(image_id, RAW, SIZE))
    abandoned = unfinished()
    with lvm_local(SHAPES):
        assert '"log"' in attempt("lvs", host.VOLUME_GROUP).stdout, "LVM does not read them"
        vm_id = start(image, custom)
        assert digest(device(image), SIZE) == guest_bytes(image.leaf)
        shown = json.loads(attempt(str(host.PROGRAM), "status", "--json").stdout)
        checked = attempt(str(host.PROGRAM), "check").stdout
        localdisk("gc")
        left = status_of(abandoned), status_of(image.leaf.id)
        stop(vm_id, image, custom=custom)
    assert {row["volume"] for row in shown["disks"]} == {image.leaf.id, abandoned}
    assert "could not be checked" not in checked
    assert left == (False, True)
    assert set(host.logical_volumes()) == {host.THIN_POOL}


def status_of(volume: str) -> bool:
    """Whether status shows it."""
    shown = json.loads(attempt(str(host.PROGRAM), "status", "--json").stdout)
    return volume in {row["volume"] for row in shown["disks"]}


# -- what LVM keeps of each change


def archives(group: str) -> list[Path]:
    return sorted(Path("/etc/lvm/archive").glob(f"{group}_{'[0-9]' * 5}-*.vg"))


def test_archives_of_metadata_are_bounded(file_storage: FileStorage) -> None:
    """By default LVM keeps three archives of each start and stop for 30 days.  Other groups' are kept."""
    others = ("fedora", f"{host.VOLUME_GROUP}_2", host.VOLUME_GROUP[:-1])
    for number in range(80):
        for group in (host.VOLUME_GROUP, *others):
            Path(f"/etc/lvm/archive/{group}_{number:05}-123.vg").write_text("# old, or of just now\n")
    image = file_storage.image(image_id := new_id(), file_storage.new_volume(image_id, RAW, SIZE))
    before = len(archives(host.VOLUME_GROUP))
    vm_id = start(image)
    newest = archives(host.VOLUME_GROUP)
    stop(vm_id, image)
    assert before >= 80
    assert 50 <= len(newest) <= 51
    assert 50 <= len(archives(host.VOLUME_GROUP)) <= 51
    assert "lvcreate" in newest[-2].read_text() + newest[-1].read_text(), "the newest are not kept"
    assert [len(archives(group)) for group in others] == [80] * 3


# -- a pool that does not fit LVM's metadata


def test_a_pool_with_another_transaction_id(file_storage: FileStorage) -> None:
    """A restored backup of the metadata: nothing idle is evicted, LVM's own reason is shown."""
    configure("cache: {templates: on}\n")
    first = file_storage.clone(file_storage.template(SIZE, seed=1), seed=2)
    stop(start(first, THIN), first, custom=THIN)
    before = host.logical_volumes()
    good, changed = Path("/run/metadata"), Path("/run/metadata.changed")
    run("vgcfgbackup", "-f", str(good), host.VOLUME_GROUP)
    changed.write_text(re.sub(r"transaction_id = [1-9]\d*", "transaction_id = 77", good.read_text()))
    restore = ("vgcfgrestore", "--yes", "--force", host.VOLUME_GROUP, "-f")
    image = file_storage.clone(file_storage.template(SIZE, seed=3), seed=4)
    run(*restore, str(changed))
    try:
        line = refused_disk(image, THIN)
    finally:
        run(*restore, str(good))
    assert host.logical_volumes() == before, "a template was evicted"
    assert "unexpected transaction id" in line
    assert "expecting 77" in line
    vm_id = start(image, THIN)
    stop(vm_id, image, custom=THIN)
    configure()
    localdisk("gc")
