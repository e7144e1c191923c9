"""Disks that somebody may still need are not lost: older hooks' disks, snapshots, wrong clocks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bed import host, libvirt
from tests.bed.player import run_point
from tests.bed.shell import attempt, run
from tests.bed.storage import COW, FileStorage, Image, new_id, qemu_io
from tests.bed.vm import Disk, disk_json
from tests.kernel.steps import (
    KEEP,
    MIB,
    THICK,
    THIN,
    WRITTEN,
    configure,
    device,
    equals_source,
    localdisk,
    lv_uuid,
    name_of,
    older,
    refused_disk,
    start,
    starting,
    status,
    stop,
    tags,
)

pytestmark = pytest.mark.usefixtures("defaults")

SIZE = 8 * MIB


def gc(*words: str, code: int = 0) -> dict[str, dict[str, str]]:
    """What gc decided and why, for each volume."""
    found = json.loads(localdisk("gc", "--json", *words, code=code))
    return {row["volume"]: row for row in found["disks"]}


def problems(kind: str) -> list[str]:
    found = json.loads(attempt(str(host.PROGRAM), "status", "--json").stdout)["problems"]
    return [f"{each['what']} : {each['fix']}" for each in found if each["kind"] == kind]


# -- an older hook's disk


def test_an_older_hooks_disk_is_kept_until_the_operator_decides(
    volume_group: str, file_storage: FileStorage
) -> None:
    image, vm_id = file_storage.template(SIZE, seed=70), new_id()
    older(image, vm_id)
    before = (lv_uuid(image), tags(image))
    configure("retention: {grace: 0s}\n")
    for _ in range(2):  # of which the second removed it
        assert gc()[image.leaf.id]["action"] == "keep"
    assert run_point("before_vdsm_start").rc == 0
    assert "localdisk remove" in gc("--dry-run")[image.leaf.id]["reason"]
    assert f"{image.leaf.id}  VM {vm_id}  8 MiB" in localdisk("install")
    assert status()[image.leaf.id]["older"] is True
    assert "retention.older_disks" in localdisk("status")

    start(image, vm_id=vm_id)
    assert device(image).read_bytes().startswith(WRITTEN)
    stop(vm_id, image)
    assert (lv_uuid(image), tags(image)) == before

    configure("retention: {grace: 0s, older_disks: as_ours}\n")
    assert gc()[image.leaf.id]["action"] == "mark_unneeded"
    assert gc()[image.leaf.id]["action"] == "remove"


def test_an_older_hooks_disk_of_another_leaf_is_left(volume_group: str, file_storage: FileStorage) -> None:
    """A snapshot was made while the VM was down: the guest's data is in the copy of the old leaf."""
    image, vm_id = file_storage.template(SIZE, seed=77), new_id()
    older(image, vm_id)
    before = (lv_uuid(image), tags(image))
    upper = snapshot(file_storage, image)
    assert f"{name_of(image)} was not copied from" in refused_disk(upper, vm_id=vm_id)
    configure("retention: {grace: 0s, keep_for: 0s, on_source_change: recopy}\n")
    start(upper, vm_id=vm_id)
    assert equals_source(upper)
    stop(vm_id, upper)
    for _ in range(2):
        gc()
    assert [*host.logical_volumes()] == [image.leaf.id]
    assert (lv_uuid(image), tags(image)) == before
    host.remove(image.leaf.id)


# -- an administrator's snapshot


def snapshot(storage: FileStorage, image: Image) -> Image:
    """What a snapshot of a VM that is down makes of the image: an empty layer upon its leaf."""
    top = storage.new_volume(image.id, COW, image.leaf.size, image.leaf)
    return replace(image, volumes=(*image.volumes, top))


@pytest.mark.parametrize("erase", ["none", "zero"])
@pytest.mark.parametrize("property_value", [THICK, THIN], ids=["thick", "thin"])
def test_a_snapshot_keeps_its_origin(
    thin_pool: str, file_storage: FileStorage, property_value: dict[str, str], erase: str
) -> None:
    configure(f"retention: {{erase: {erase}}}\n")
    image = file_storage.template(SIZE, seed=73)
    vm_id = start(image, property_value)
    device(image).write_bytes(WRITTEN)
    run("lvcreate", "-y", "-s", "-L", "4m", "-n", "backup", name_of(image))
    stop(vm_id, image, custom=property_value)
    assert "DELETING" in tags(image)
    for _ in range(2):
        row = gc(code=1)[image.leaf.id]
        assert (row["action"], "backup" in row["reason"]) == ("keep", True)
    assert [text for text in problems("dependents") if "backup" in text and "lvremove" in text]
    assert "backup depends on local disk" in attempt(str(host.PROGRAM), "check").stdout

    starting(vm_id)
    again = run_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), property_value)
    assert (again.rc, "backup" in again.stderr) == (2, True)
    libvirt.undefine(vm_id)
    backup = Path(f"/dev/{host.VOLUME_GROUP}/backup")
    assert backup.read_bytes().startswith(WRITTEN)

    run("lvremove", "-y", f"{host.VOLUME_GROUP}/backup")
    assert gc()[image.leaf.id]["action"] == "remove"
    assert set(host.logical_volumes()) == {host.THIN_POOL}


def test_a_snapshot_of_a_kept_disk_stays_active(volume_group: str, file_storage: FileStorage) -> None:
    configure(KEEP)
    image = file_storage.template(SIZE, seed=74)
    vm_id = start(image)
    run("lvcreate", "-y", "-s", "-L", "4m", "-n", "backup", name_of(image))
    stop(vm_id, image)
    assert Path(f"/dev/{host.VOLUME_GROUP}/backup").exists()
    assert any(tag.startswith("STOPPED_") for tag in tags(image))
    host.remove("backup", image.leaf.id)


@pytest.mark.parametrize("is_other_leaf", [False, True])
def test_what_a_snapshot_is_of_is_not_replaced(
    volume_group: str, file_storage: FileStorage, is_other_leaf: bool
) -> None:
    """Neither under its own name nor beside the new disk; it is not renamed for it."""
    configure("retention: {on_stop: keep, on_source_change: recopy}\n")
    image = file_storage.template(SIZE, seed=78)
    vm_id = start(image)
    device(image).write_bytes(WRITTEN)
    stop(vm_id, image)
    made, before = lv_uuid(image), tags(image)
    run("lvcreate", "-y", "-s", "-L", "4m", "-n", "backup", name_of(image))
    now = snapshot(file_storage, image) if is_other_leaf else image
    qemu_io(now.leaf, ["write -P 9 5M 64k"])
    if is_other_leaf:
        start(now, vm_id=vm_id)
        assert equals_source(now)
        stop(vm_id, now)
    else:
        assert "LVM would remove backup along with" in refused_disk(now, vm_id=vm_id)
    assert (lv_uuid(image), tags(image)) == (made, before)
    assert "backup" in host.logical_volumes()

    host.remove("backup")
    start(now, vm_id=vm_id)
    assert equals_source(now)
    assert [*host.logical_volumes()] == [now.leaf.id]
    assert lv_uuid(now) != made
    stop(vm_id, now)
    host.remove(now.leaf.id)


def test_a_thin_snapshot_is_independent(thin_pool: str, file_storage: FileStorage) -> None:
    image = file_storage.template(SIZE, seed=75)
    vm_id = start(image, THIN)
    device(image).write_bytes(WRITTEN)
    run("lvcreate", "-y", "-s", "-kn", "-n", "backup", name_of(image))
    stop(vm_id, image, custom=THIN)
    assert set(host.logical_volumes()) == {host.THIN_POOL, "backup"}
    assert Path(f"/dev/{host.VOLUME_GROUP}/backup").read_bytes().startswith(WRITTEN)
    host.remove("backup")


def test_a_cache_keeps_its_disk(volume_group: str, file_storage: FileStorage) -> None:
    """lvremove would take the administrator's cache pool along."""
    configure(KEEP)
    image = file_storage.template(SIZE, seed=76)
    vm_id = start(image)
    run("lvcreate", "-y", "--type", "cache-pool", "-L", "12m", "-n", "fast", host.VOLUME_GROUP)
    run("lvconvert", "-y", "--type", "cache", "--cachepool", "fast", name_of(image))
    configure()
    stop(vm_id, image)
    assert "fast" in gc(code=1)[image.leaf.id]["reason"]
    assert status()[image.leaf.id]["backend"] == "lvm"
    run("lvconvert", "-y", "--uncache", name_of(image))
    assert gc()[image.leaf.id]["action"] == "remove"


# -- a clock that was wrong


@pytest.fixture
def clock(throwaway: None) -> Iterator[None]:
    began, since = time.time(), time.monotonic()
    yield
    run("date", "-s", f"@{began + time.monotonic() - since:.0f}")


def test_a_clock_that_jumps_forward(volume_group: str, file_storage: FileStorage, clock: None) -> None:
    """The host has booted in the year 2001, a VM stops, and then the clock is set."""
    configure(KEEP)
    image, now = file_storage.template(SIZE, seed=77), int(time.time())
    vm_id = start(image)
    run("date", "-s", "2001-01-01")
    stop(vm_id, image)
    (wrong,) = (tag for tag in tags(image) if tag.startswith("STOPPED_"))
    run("date", "-s", f"@{now + 60}")
    assert gc()[image.leaf.id]["action"] == "mark_stopped"
    (right,) = (tag for tag in tags(image) if tag.startswith("STOPPED_"))
    assert wrong != right
    assert 0 <= int(right.partition("_")[2]) - now <= 120
    assert gc()[image.leaf.id]["action"] == "keep"
    host.remove(image.leaf.id)


def test_a_mark_from_before_the_disk_was_made(volume_group: str, file_storage: FileStorage) -> None:
    """The mark is of an earlier boot: the disk is kept, reported once, and marked again."""
    configure(KEEP)
    image = file_storage.template(SIZE, seed=78)
    stop(start(image), image)
    marks = [tag for tag in tags(image) if tag.startswith(("STOPPED_", "BOOT_"))]
    options = [word for tag in marks for word in ("--deltag", tag)]
    run("lvchange", *options, "--addtag", "STOPPED_978307200", name_of(image))
    assert problems("clock")
    row = gc(code=1)[image.leaf.id]
    assert (row["action"], "the clock was wrong" in row["reason"]) == ("mark_stopped", True)
    assert gc()[image.leaf.id]["action"] == "keep"
    host.remove(image.leaf.id)


def test_a_disk_that_looks_unneeded_while_the_clock_is_wrong(volume_group: str, clock: None) -> None:
    """grace is measured by the clock that counts from the boot."""
    now, name = int(time.time()), new_id()
    words = ("localdisk", f"VM_{new_id()}", f"IU_{new_id()}")
    options = [word for tag in words for word in ("--addtag", tag)]
    run("lvcreate", "-y", "-Wn", "-n", name, "-L", "4m", *options, host.VOLUME_GROUP)
    run("date", "-s", "2001-01-01")
    assert gc()[name]["action"] == "mark_unneeded"
    run("date", "-s", f"@{now + 60}")
    assert gc()[name]["action"] == "mark_unneeded"
    configure("retention: {grace: 0s}\n")
    assert gc()[name]["action"] == "remove"


# -- a discard that does nothing


def test_a_pool_that_does_not_pass_discards_down(thin_pool: str, file_storage: FileStorage) -> None:
    configure("retention: {erase: discard}\nbackend: lvmthin\n")
    pool = f"{host.VOLUME_GROUP}/{host.THIN_POOL}"
    run("lvchange", "--discards", "nopassdown", pool)
    try:
        image = file_storage.template(SIZE, seed=79)
        stop(start(image, THIN), image, custom=THIN)
        done = json.loads(localdisk("gc", "--json", code=1))
        assert "passes no discards" in done["disks"][0]["failure"]
        assert "passes no discards" in attempt(str(host.PROGRAM), "check").stdout
        assert len(host.logical_volumes()) == 2
        configure("retention: {erase: zero}\nbackend: lvmthin\n")
        gc()
        assert set(host.logical_volumes()) == {host.THIN_POOL}
    finally:
        run("lvchange", "--discards", "passdown", pool)


def test_a_device_that_cannot_discard(volume_group: str, file_storage: FileStorage, throwaway: None) -> None:
    """As the administrator, or the device, says in its queue limits."""
    configure("retention: {erase: discard}\n")
    image = file_storage.template(SIZE, seed=80)
    vm_id = start(image)
    block = os.path.basename(os.path.realpath(device(image)))
    stop(vm_id, image)
    Path(f"/sys/block/{block}/queue/discard_max_bytes").write_text("0")
    done = json.loads(localdisk("gc", "--json", code=1))
    assert "cannot discard" in done["disks"][0]["failure"]
    (left,) = host.logical_volumes()
    run("lvchange", "-an", f"{host.VOLUME_GROUP}/{left}")  # some kernels take no other limit once it is 0
    gc()
    assert host.logical_volumes() == {}
