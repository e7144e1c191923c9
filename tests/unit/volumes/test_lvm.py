from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdisk import daemons, device_mapper, run
from localdisk.errors import (
    CommandFailed,
    CommandTimeout,
    DeviceNotReady,
    Error,
    LvmFailed,
    MetadataAreaFull,
    NoVolumeGroup,
    ThinPoolAtThreshold,
    ThinPoolUnusable,
    UdevdGone,
    VolumeGroupUnusable,
)
from localdisk.volumes import lvm
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup
from tests import fakes
from tests.examples import examples
from tests.fakes import EXTENT, FINGERPRINT, FULLREPORT, FakeHost, report, without_settings

REPORTS = sorted(path.stem for path in fakes.REPORTS.glob("*.json"))
THICK, THIN, OLDER, STOPPED = (f"{n * 8}-{n * 4}-4{n * 3}-8{n * 3}-{n * 12}" for n in "1234")

fuzzing = settings(max_examples=examples(80))


def read(name: str) -> VolumeGroup:
    return VolumeGroup.from_report(report(name))


def lv(vg: VolumeGroup, name: str) -> LogicalVolume:
    found = vg.find(name)
    assert found
    return found


class Door:
    """Records what comes to run.run; answers with `out` or raises `error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: str = "", error: CommandFailed | None = None):
        self.commands: list[str] = []
        self.out, self.error = out, error
        monkeypatch.setattr(run, "run", self.run)

    def run(self, argv: Sequence[str], *, deadline: float = 0, pass_fds: Iterable[int] = ()) -> str:
        self.commands.append(" ".join(without_settings(argv)))
        if self.error:
            raise self.error
        return self.out


# -- reports that were captured


def test_group_with_a_pool() -> None:
    vg = read("pool-only")
    assert vg.vg_name == "ovirt-local"
    assert vg.vg_uuid == "ZR2sc5-zkoj-aLgA-qBhx-BuEw-29d0-zo13X4"
    assert (vg.vg_size, vg.vg_free, vg.vg_extent_size) == (8585740288, 7503609856, EXTENT)
    assert (vg.vg_partial, vg.vg_exported, vg.vg_lock_type) == (False, False, "")
    (pool,) = vg.lvs
    assert pool.is_thin_pool
    assert pool.zero
    assert (pool.data_percent, pool.metadata_percent, pool.chunk_size) == (0.0, 10.94, 64 << 10)
    vg.require_usable()


def test_thick_volume_that_is_open() -> None:
    thick = lv(read("mixed"), THICK)
    assert thick == LogicalVolume(
        lv_name=THICK,
        lv_uuid="2FNIdt-CDne-mAof-9tz2-lxgr-e6yR-G1yjcc",
        lv_size=64 << 20,
        lv_time=1750000000,
        lv_tags=frozenset(
            {
                "localdisk",
                "VM_aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa",
                "IU_cccccccc-1111-4ccc-8ccc-cccccccccccc",
                f"SOURCE_{FINGERPRINT}",
            }
        ),
        lv_device_open=True,
        lv_active=True,
        lv_permissions="writeable",
        lv_layout=frozenset({"linear"}),
        pool_lv="",
        data_percent=None,
        metadata_percent=None,
        kernel_discards="",
        zero=False,
    )


def test_thin_volume_with_data_of_its_own() -> None:
    thin = lv(read("mixed"), THIN)
    assert (thin.pool_lv, thin.data_percent, thin.metadata_percent) == ("pool0", 3.12, None)
    assert (thin.lv_active, thin.lv_device_open, thin.is_thin_pool) == (True, False, False)
    assert len(thin.lv_tags) == 6


def test_inactive_thin_volume_is_not_open_although_lvm_does_not_know() -> None:
    assert '"lv_device_open":"unknown"' in report("mixed")
    stopped = lv(read("mixed"), STOPPED)
    assert (stopped.lv_active, stopped.lv_device_open, stopped.data_percent) == (False, False, None)


def test_what_lvm_would_remove_along_with_a_volume() -> None:
    """Each was tried: `lvremove --yes` removes it without a question."""
    found = {each.lv_name: each.dependents for each in read("dependents").lvs}
    assert {name: others for name, others in found.items() if others} == {
        "cached": ("fast_cpool",),
        "external": ("extsnap",),
        "merging": ("a snapshot that is being merged",),
        "thick": ("cow", "cow2"),
        "thin2": ("thincow",),
    }
    assert {"thin", "thinsnap", "pool0"} <= found.keys()  # a thin snapshot is independent


def test_the_pool_of_a_cache_is_no_thin_pool() -> None:
    pools = {each.lv_name: each.pool_lv for each in read("dependents").lvs if each.pool_lv}
    assert pools == dict.fromkeys(("extsnap", "thin", "thin2", "thinsnap"), "pool0")
    assert lv(read("dependents"), "pool0").kernel_discards == "passdown"


def test_active_volume_of_which_lvm_does_not_know_counts_as_open() -> None:
    row = {**FakeHost().volumes["pool0"].row, "lv_device_open": "unknown"}
    assert LogicalVolume.from_report(row, None).lv_device_open


def test_volume_without_tags_has_none() -> None:
    assert lv(read("mixed"), "data").lv_tags == frozenset()


def test_open_pool_is_no_local_disk_but_open() -> None:
    assert lv(read("mixed"), "pool0").lv_device_open


def test_empty_group() -> None:
    assert read("empty").lvs == ()


def test_pool_that_does_not_zero() -> None:
    assert not lv(read("not-zeroing"), "pool0").zero


def test_inactive_pool_does_not_tell_how_full_it_is() -> None:
    pool = lv(read("pool-inactive"), "pool0")
    assert (pool.lv_active, pool.data_percent, pool.metadata_percent) == (False, None, None)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("exported", "exported : vgimport scratch"),
        ("partial", "missing a physical volume : bring the device"),
    ],
)
def test_unusable_groups(name: str, problem: str) -> None:
    with pytest.raises(VolumeGroupUnusable) as caught:
        read(name).require_usable()
    assert str(caught.value).startswith(f"volume group scratch is {problem}")


@pytest.mark.parametrize("lock_type", ["sanlock", "dlm", "idm"])
def test_shared_group_is_unusable(lock_type: str) -> None:
    host = FakeHost()
    host.vg["vg_lock_type"] = lock_type
    with pytest.raises(VolumeGroupUnusable, match=lock_type):
        VolumeGroup.from_report(host.report()).require_usable()


@pytest.mark.parametrize("name", REPORTS)
def test_fake_reports_have_the_shape_of_real_ones(name: str) -> None:
    assert json.loads(FakeHost(report(name)).report()) == json.loads(report(name))


# -- reports that are not understood


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"report": []}',
        '{"report": [{"vg": [], "lv": [], "seg": []}]}',
        '{"report": [{"vg": [1], "lv": [], "seg": []}]}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_report_is_a_failed_command(text: str) -> None:
    with pytest.raises(CommandFailed, match="its report is not understood"):
        VolumeGroup.from_report(text)


JUNK = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.lists(st.text(max_size=3)))


@fuzzing
@given(st.data())
def test_a_damaged_report_never_raises_anything_else(data: st.DataObject) -> None:
    content: Any = json.loads(report("mixed"))
    section = content["report"][0]
    kind = data.draw(st.sampled_from(["vg", "lv", "seg"]))
    row = data.draw(st.sampled_from(section[kind]))
    column = data.draw(st.sampled_from(sorted(row)))
    if data.draw(st.booleans()):
        del row[column]
    else:
        row[column] = data.draw(JUNK)
    with contextlib.suppress(CommandFailed):
        VolumeGroup.from_report(json.dumps(content))


# -- commands


def test_read_is_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(monkeypatch, report("pool-only"))
    assert VolumeGroup.read("ovirt-local") == read("pool-only")
    assert door.commands == [f"{FULLREPORT} ovirt-local"]


def test_devices_go_to_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(monkeypatch, report("pool-only"))
    vg = VolumeGroup.read("ovirt-local", ("/dev/vda", "/dev/vdb"))
    vg.create_thick("a", EXTENT, ())
    vg.create_thin("b", EXTENT, "pool0", ())
    vg.change_tags("a", add={"x"})
    vg.activate("a")
    vg.deactivate("a")
    vg.remove("a")
    vg.rename("a", "b")
    vg.create_snapshot("c", "b", ())
    vg.extend("c", EXTENT)
    vg.seal("b", add={"x"}, remove={"y"})
    vg.set_writable("b")
    vg.remove_tags("b", "U", {"x"}, having={"x"})
    assert len(door.commands) == 13
    assert all(" --devices /dev/vda,/dev/vdb " in command for command in door.commands)


def test_the_uuid_in_a_device_mapper_uuid() -> None:
    lv_uuid = "D6Yr9j-R2L2-d73P-uoZh-gzUs-9TLg-E4kNzf"
    assert lvm.uuid_of("LVM-" + "x" * 32 + lv_uuid.replace("-", "")) == lv_uuid


def test_argument_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(monkeypatch)
    vg = read("pool-only")
    vg.create_thick("a", EXTENT + 1, {"y", "x"})
    vg.create_thin("b", EXTENT, "pool0", {"x"})
    vg.change_tags("a", "b", add={"y", "x"}, remove={"z"})
    vg.activate("a")
    vg.deactivate("a", "b")
    vg.remove("a", "b")
    vg.rename("a", "b")
    vg.discard("a", 0, EXTENT)
    vg.zero("a", EXTENT, 2 * EXTENT)
    vg.create_snapshot("c", "b", {"y", "x"})
    vg.extend("c", EXTENT + 1)
    vg.seal("b", add={"x"}, remove={"y"})
    vg.set_writable("b")
    vg.remove_tags("b", "U", {"x"}, having={"x", "y"})
    create = "lvcreate --quiet --yes --name"
    skip, wipe = "--setactivationskip y --ignoreactivationskip", "--wipesignatures n"
    assert door.commands == [
        f"{create} a {skip} --addtag x --addtag y {wipe} --zero y --size {EXTENT + 512}b ovirt-local",
        f"{create} b {skip} --addtag x {wipe} --virtualsize {EXTENT}b --thinpool ovirt-local/pool0",
        "lvchange --quiet --deltag z --addtag x --addtag y ovirt-local/a ovirt-local/b",
        "lvchange --quiet --activate y --ignoreactivationskip ovirt-local/a",
        "lvchange --quiet --activate n ovirt-local/a ovirt-local/b",
        "lvremove --quiet --yes ovirt-local/a ovirt-local/b",
        "lvrename --quiet ovirt-local a b",
        f"blkdiscard --offset 0 --length {EXTENT} /dev/ovirt-local/a",
        f"blkdiscard --zeroout --offset {EXTENT} --length {2 * EXTENT} /dev/ovirt-local/a",
        f"{create} c {skip} --addtag x --addtag y --permission rw --snapshot ovirt-local/b",
        f"lvextend --quiet --size {EXTENT + 512}b ovirt-local/c",
        "lvchange --quiet --permission r --deltag y --addtag x ovirt-local/b",
        "lvchange --quiet --permission rw ovirt-local/b",
        'lvchange --yes --deltag x --select lv_uuid=U && lv_tags={"x" && "y"} && vg_partial=0'
        " && vg_exported=0 ovirt-local/b",
    ]


def test_a_failure_names_the_command_as_it_could_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the settings that it carries."""
    Door(monkeypatch, error=CommandFailed(("lvchange", "--quiet", "--config", lvm.SETTINGS, "vg/a"), 5, "no"))
    with pytest.raises(CommandFailed) as caught:
        lvm.call(["lvchange", "--quiet", "vg/a"])
    assert caught.value.argv == ("lvchange", "--quiet", "vg/a")
    assert str(caught.value).startswith("lvchange --quiet failed for vg/a (exit code 5): no")


FILTER = "Volume ovirt-local/n1 is not active locally (volume_list activation filter?)"
NAMESAKES = "Multiple VGs found with the same name: skipping ovirt-local"
RENAME = "Fix duplicate VG names with vgrename uuid, a device filter, or system IDs"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            f"  {FILTER}.\n  Aborting. Failed to wipe start of new LV.\n",
            f"{FILTER}; Aborting. Failed to wipe start of new LV",
        ),
        (
            f"  WARNING: VG name ovirt-local is used by VGs a and b.\n  {RENAME}.\n  WARNING: Not using x.\n"
            f"  {NAMESAKES}\n  Use --select vg_uuid=<uuid> in place of the VG name.\n",
            f"{RENAME}; {NAMESAKES}",
        ),
        ("  no\n  no\n", "no"),
        ("  WARNING: only this.\n", "WARNING: only this"),
        ("", "it printed nothing"),
    ],
)
def test_the_whole_reason_is_shown(monkeypatch: pytest.MonkeyPatch, said: str, shown: str) -> None:
    """As LVM 2.03.16 says it."""
    Door(monkeypatch, error=CommandFailed(("lvcreate",), 5, said))
    with pytest.raises(CommandFailed) as caught:
        lvm.call(["lvcreate", "--quiet", "ovirt-local"])
    assert f"(exit code 5): {shown} : " in str(caught.value)


BUSY = "device-mapper: create ioctl on vg-lv LVM-xy failed: Device or resource busy"


@pytest.mark.parametrize(
    ("said", "shown", "fix"),
    [
        (
            "  Parse error at byte 22 (line 1): no\n  Failed to load config file /etc/lvm/lvmlocal.conf\n",
            "Parse error at byte 22 (line 1): no; Failed to load config file /etc/lvm/lvmlocal.conf",
            "correct what is wrong in /etc/lvm/lvmlocal.conf: ",
        ),
        (
            f"  {BUSY}\n  Failed to activate new LV vg/lv.\n  Manual intervention.\n",
            BUSY,
            "dmsetup remove vg-lv",
        ),
        (
            "  Maximum number of logical volumes (1) reached in volume group my.vg.\n",
            "Maximum number of logical volumes (1) reached in volume group my.vg",
            "vgchange --logicalvolume 0 my.vg",
        ),
    ],
)
def test_what_ends_a_failure(monkeypatch: pytest.MonkeyPatch, said: str, shown: str, fix: str) -> None:
    """As LVM 2.03.16 says it; code that looks at what LVM said still sees all of it."""
    Door(monkeypatch, error=CommandFailed(("lvcreate",), 5, said))
    with pytest.raises(LvmFailed) as caught:
        lvm.call(["lvcreate", "--quiet", "ovirt-local"])
    what, _, advice = str(caught.value).partition(" : ")
    assert what.endswith(f"(exit code 5): {shown}")
    assert fix in advice
    assert caught.value.stderr == said


def test_missing_group_is_told_from_other_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    said = '  Volume group "nosuch" not found\n  Cannot process volume group nosuch\n'
    Door(monkeypatch, error=CommandFailed(("lvm", "fullreport"), 5, said))
    with pytest.raises(NoVolumeGroup, match="vgcreate --metadatasize 128m nosuch DEVICE"):
        VolumeGroup.read("nosuch")
    with pytest.raises(CommandFailed):
        VolumeGroup.read("other")


@pytest.mark.parametrize(
    "said",
    [
        # LVM 2.03.16, and before 2.03.09
        "VG x 27 metadata on /dev/ubda (523730 bytes) exceeds maximum metadata size (521472 bytes)\n"
        "  WARNING: Failed to write an MDA of VG x.\n  Failed to write VG x.",
        "VG x 27 metadata on /dev/ubda (523730 bytes) too large for circular buffer (1043968 bytes with "
        "521472 used)\n  Failed to write VG x.",
    ],
)
def test_a_metadata_area_that_is_full(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    Door(monkeypatch, error=CommandFailed(("lvchange",), 5, f"  {said}\n"))
    with pytest.raises(MetadataAreaFull, match="metadata area of volume group x is full"):
        lvm.call(["lvchange", "--quiet", "x/y"])


def test_a_removal_in_a_full_metadata_area_goes_without_our_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their thousand bytes would be in the metadata; a new volume leaves that room to removals and marks."""
    full = "  VG x 27 metadata on /dev/a (30231 bytes) exceeds maximum metadata size (29952 bytes)\n"
    host = FakeHost()
    monkeypatch.setattr(run, "run", host.run)
    host.add(THICK, fakes.tags(), EXTENT)
    vg = VolumeGroup.read("ovirt-local")
    host.fail("lvremove", full)
    vg.remove(THICK)
    assert THICK not in host.volumes
    host.fail("lvcreate", full)
    with pytest.raises(MetadataAreaFull):
        vg.create_thick(THICK, EXTENT, fakes.tags())


@pytest.mark.parametrize(("free", "percent"), [(522240, 0), (261120, 50), (0, 100)])
def test_how_full_the_metadata_area_is(free: int, percent: int) -> None:
    """LVM writes the new text beside the old one."""
    host = FakeHost()
    host.vg.update(vg_mda_size="1044480", vg_mda_free=str(free))
    assert VolumeGroup.from_report(host.report()).metadata_percent == percent


THRESHOLD = "  Cannot create new thin volume, free space in thin pool ovirt-local/pool0 reached threshold.\n"


def test_a_pool_that_is_too_full_for_lvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a snapshot, which is as much of a new volume."""
    vg = read("mixed")
    thin = next(lv for lv in vg.lvs if lv.pool_lv)
    for said, kind in ((THRESHOLD, ThinPoolAtThreshold), ("  Failed to write VG\n", CommandFailed)):
        Door(monkeypatch, error=CommandFailed(("lvcreate",), 5, said))
        with pytest.raises(kind):
            vg.create_thin("a", EXTENT, thin.pool_lv, ())
        with pytest.raises(kind) as caught:
            vg.create_snapshot("a", thin.lv_name, ())
        if kind is ThinPoolAtThreshold:
            assert f"thin pool ovirt-local/{thin.pool_lv}" in str(caught.value)
        with pytest.raises(kind):
            vg.create_snapshot("a", "gone", ())


MISMATCH = "  WARNING: Thin pool ovirt-local/pool0 has unexpected transaction id 2, expecting 1.\n"
SUM = "  WARNING: Sum of all thin volume sizes (1 GiB) exceeds the size of thin pool ovirt-local/pool0.\n"


@pytest.mark.parametrize(
    ("said", "kind", "shown"),
    [
        (THRESHOLD, ThinPoolAtThreshold, "too full for LVM itself"),
        (SUM + THRESHOLD, ThinPoolAtThreshold, "too full for LVM itself"),
        (MISMATCH + THRESHOLD, ThinPoolUnusable, "has unexpected transaction id 2, expecting 1."),
        ("  Failed to get status.\n" + THRESHOLD, ThinPoolUnusable, "pool0: Failed to get status."),
    ],
)
def test_only_the_threshold_counts_as_full(
    monkeypatch: pytest.MonkeyPatch, said: str, kind: type[Error], shown: str
) -> None:
    """LVM says that of a pool whose state it does not know, too."""
    Door(monkeypatch, error=CommandFailed(("lvcreate",), 5, said))
    with pytest.raises(kind) as caught:
        read("mixed").create_thin("a", EXTENT, "pool0", ())
    assert shown in str(caught.value)


# -- tags of volumes of storage domains


def test_tags_of_another_group_are_read_without_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(monkeypatch, json.dumps({"report": [{"lv": [{"lv_tags": "IU_x,MD_5,PU_y"}]}]}))
    assert lvm.read_tags("domain", "volume", iter(["/dev/sda", "/dev/sdb"])) == {"IU_x", "MD_5", "PU_y"}
    assert door.commands == [
        "lvs --readonly --reportformat json -o lv_tags --devices /dev/sda,/dev/sdb domain/volume"
    ]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "{",
            "[]",
            "5",
            "{}",
            '{"report": []}',
            '{"report": [{"lv": []}]}',
            '{"report": [{"lv": [{}]}]}',
        ),
        '{"report": [{"lv": [{"lv_tags": 5}]}]}',
        '{"report": [{"lv": [{"lv_tags": ""}, {"lv_tags": ""}]}]}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:40],
)
def test_tags_that_are_not_understood(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    Door(monkeypatch, text)
    with pytest.raises(CommandFailed, match="its report is not understood"):
        lvm.read_tags("domain", "volume", ["/dev/sda"])


@pytest.mark.parametrize(
    ("size", "rounded"), [(0, 0), (1, EXTENT), (EXTENT, EXTENT), (EXTENT + 1, 2 * EXTENT)]
)
def test_round_up(size: int, rounded: int) -> None:
    assert read("empty").round_up(size) == rounded


# -- device nodes


def test_node_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VolumeGroup, "path", lambda _vg, name: f"/nonexistent/{name}")
    with pytest.raises(DeviceNotReady, match="No such file"):
        read("empty").dm_uuid("a")


def test_node_that_is_no_device_mapper_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VolumeGroup, "path", lambda _vg, _name: os.devnull)
    with pytest.raises(DeviceNotReady):
        read("empty").dm_uuid("a")


def test_node_of_another_group(monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = "LVM-" + "x" * 64
    monkeypatch.setattr(VolumeGroup, "path", lambda _vg, _name: os.devnull)
    monkeypatch.setattr(device_mapper, "read_uuid", lambda _device: uuid)
    with pytest.raises(DeviceNotReady, match="another device"):
        read("empty").dm_uuid("a")


def test_node_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = "LVM-HJWxVI9CX9Py2kn4CUNGKTfCM5SJMALZ" + "x" * 32
    monkeypatch.setattr(VolumeGroup, "path", lambda _vg, _name: os.devnull)
    monkeypatch.setattr(device_mapper, "read_uuid", lambda _device: uuid)
    assert read("empty").dm_uuid("a") == uuid


def test_a_command_that_waits_for_udevd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is over: if udevd does not run, that is why; if all the time of a hook point is, it is not."""

    def hang(*_: object, **__: object) -> str:
        raise CommandTimeout(tool="lvcreate --quiet for ovirt-local", seconds=120)

    monkeypatch.setattr(run, "run", hang)
    monkeypatch.setattr(daemons, "running", lambda: frozenset({"systemd-udevd"}))
    with pytest.raises(CommandTimeout, match="look for hung storage"):
        lvm.call(["lvcreate", "--quiet"])
    monkeypatch.setattr(daemons, "running", lambda: frozenset())
    with pytest.raises(UdevdGone, match=r"within 120 s, because it waits for systemd-udevd"):
        lvm.call(["lvcreate", "--quiet"])
    with run.within(0), pytest.raises(CommandTimeout, match="look for hung storage"):
        lvm.call(["lvcreate", "--quiet"])
