"""Starts from a template's local copy, as the hook asks for them, command by command."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from localdisk import counters, lock
from localdisk.errors import CommandTimeout, DeviceNotReady, NoTemplate
from localdisk.helper import cache
from localdisk.volumes import gc, progress, template
from localdisk.volumes.lvm import VolumeGroup
from tests.fakes import (
    EXTENT,
    FINGERPRINT,
    IMAGE,
    OTHER_FINGERPRINT,
    OTHER_IMAGE,
    OTHER_VM,
    OTHER_VOLUME,
    REAL_SAMPLE,
    VM,
    VOLUME,
    FakeHost,
    Killed,
    Volume,
    aside,
    tags,
)
from tests.fakes.session import (
    ACTIVATE,
    CLAIM,
    COMMIT_IT,
    CREATE,
    KEPT,
    LIST,
    LOOK,
    NAME,
    NEW_TAGS,
    PATH,
    PREPARE,
    PROGRESS,
    RELEASE,
    SIZE,
    TO_PREPARE,
    Ended,
    Hook,
    commit,
    held_elsewhere,
    locks,
    lv_tags,
    parsed,
)
from tests.fakes.template import (
    BASE,
    BASE_SIZE,
    DOMAIN,
    FILL,
    LVS,
    NOW,
    ON,
    OWN_VOLUME,
    PREFETCH,
    THICK_LV,
    THIN_LV,
    WITH_BASE,
    WRITES,
    add_template,
    sample,
    template_tags,
)

ONE_AT_A_TIME = "{cache: {templates: on}, copy: {parallel: 1}}"
MISSING = {"how": "missing", "path": "", "target": None, "base": None}
UNCACHED = {**MISSING, "how": "uncached"}
BACKENDS = pytest.mark.parametrize("backend", ["lvm", "lvmthin"])

NEW_TEMPLATE = (
    f"--addtag SOURCE_{OTHER_FINGERPRINT} --addtag TEMPLATE_{OWN_VOLUME} --addtag UPDATING"
    f" --addtag WRITES_{WRITES} --addtag localdisk"
)
OPTIONS = "--setactivationskip y --ignoreactivationskip"


@pytest.fixture(name="host")
def fixture_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHost:
    monkeypatch.setattr(time, "time", lambda: NOW + 0.5)
    return FakeHost().install(monkeypatch, tmp_path)


def changing(host: FakeHost) -> list[str]:
    """All commands but the looks at the volume group."""
    return [command for command in host.commands if command != LOOK]


def other(number: int) -> str:
    """The name of a template LV of another template."""
    return f"{number:08d}-eeee-4eee-8eee-eeeeeeeeeeee"


def start(hook: Hook, backend: str = "lvm", **changes: object) -> Any:
    """Claim, and prepare with a base."""
    claim = {key: value for key, value in changes.items() if key in CLAIM}
    rest = {key: value for key, value in changes.items() if key not in CLAIM}
    answer = hook.ask(CLAIM, property=backend, **claim)
    assert answer == {**TO_PREPARE, "chunk": 65536 * (backend == "lvmthin"), "cached": True}, answer
    return hook.ask(WITH_BASE, **rest)


def whole_start(hook: Hook, backend: str = "lvm", **changes: object) -> list[str]:
    """As the hook does it, to the end; each answer's `how`."""
    answer = start(hook, backend, **changes)
    said = [answer["how"]]
    if answer["how"] == "missing":
        filled = hook.ask(FILL)
        said.append(filled["how"])
        if filled["how"] == "copy":
            hook.ask(PROGRESS)
            assert hook.ask(COMMIT_IT) == {}
            answer = hook.ask(WITH_BASE)
            said.append(answer["how"])
    if said[-1] in ("missing", "uncached"):
        answer = hook.ask(PREPARE)
        said.append(answer["how"])
    if answer["target"]:
        hook.ask(PROGRESS)
        assert hook.ask(COMMIT_IT) == {}
    return said


FIRST = {"lvm": ["missing", "copy", "on base"], "lvmthin": ["missing", "copy", "layers"]}
SECOND = {"lvm": ["on base"], "lvmthin": ["layers"]}
FULL = ["missing", "uncached", "copy"]


def assert_ready(host: FakeHost, backend: str, used: int = NOW) -> None:
    """The template LV is there as it is used, closed, and the disk is ready."""
    volume = host.volumes[LVS[backend]]
    vg = VolumeGroup.from_report(host.report())
    (found,) = (each for each in template.templates(vg) if each.name == volume.lv_name)
    assert template.is_sound(found, OTHER_FINGERPRINT, BASE_SIZE, vg)
    assert found.sample == sample(host, volume.lv_name)
    assert (found.used, found.writes_tags) == (used, frozenset())
    assert (volume.lv_active, volume.lv_device_open) == ("", "")
    assert lv_tags(host) == tags()
    assert locks() == []


# -- the flows, command by command


def test_a_first_start_thin(host: FakeHost) -> None:
    hook = Hook(host, ON)
    assert start(hook, "lvmthin") == MISSING
    assert changing(host) == [LIST]
    assert locks() == [f"{VOLUME}.lock", f"{THIN_LV}.lock"]
    filled = hook.ask(FILL)
    path = f"/dev/ovirt-local/{THIN_LV}"
    target = {"path": path, "dm_uuid": host.dm_uuid(THIN_LV), "zeroed": True, "bandwidth": None, "nice": 10}
    assert filled == {"how": "copy", "path": path, "target": target, "base": None}
    assert lv_tags(host, THIN_LV) == template_tags("UPDATING", f"WRITES_{WRITES}")
    assert hook.ask(PROGRESS) == {}
    host.volumes[THIN_LV].data_percent = "50.00"
    assert hook.ask(COMMIT_IT) == {}
    assert lv_tags(host, THIN_LV) == template_tags(
        f"HOLDS_{BASE_SIZE // 2}", f"SAMPLE_{sample(host, THIN_LV)}", f"USED_{NOW}"
    )
    assert VOLUME not in host.volumes
    prepared = hook.ask(WITH_BASE)
    target = {**target, "path": PATH, "dm_uuid": host.dm_uuid(VOLUME)}
    assert prepared == {"how": "layers", "path": PATH, "target": target, "base": None}
    # LVM counts what it shares as its own data: what it still writes is the rest
    assert lv_tags(host) == tags("UPDATING", f"WRITES_{BASE_SIZE // 2 + 4096}")
    assert host.volumes[VOLUME].lv_size == SIZE
    assert host.volumes[VOLUME].lv_permissions == "writeable"
    assert f"{THIN_LV}.lock" not in locks()
    assert hook.ask(COMMIT_IT) == {}
    assert_ready(host, "lvmthin")
    holds, used, taken = f"HOLDS_{BASE_SIZE // 2}", f"USED_{NOW}", f"SAMPLE_{sample(host, THIN_LV)}"
    full_name = f"ovirt-local/{THIN_LV}"
    assert changing(host) == [
        LIST,
        f"lvcreate --quiet --yes --name {THIN_LV} {OPTIONS} {NEW_TEMPLATE}"
        f" --wipesignatures n --virtualsize {BASE_SIZE}b --thinpool ovirt-local/pool0",
        f"lvchange --quiet --activate n {full_name}",
        f"lvchange --quiet --permission r --deltag UPDATING --deltag WRITES_{WRITES}"
        f" --addtag {holds} --addtag {taken} --addtag {used} {full_name}",
        f"{CREATE} {NEW_TAGS.replace('4096', str(BASE_SIZE // 2 + 4096))} --permission rw"
        f" --snapshot {full_name}",
        f"lvextend --quiet --size {SIZE}b {NAME}",
        commit(host.volumes[VOLUME].lv_uuid, BASE_SIZE // 2 + 4096),
    ]


def test_a_second_start_thin(host: FakeHost) -> None:
    add_template(host, "lvmthin")
    hook = Hook(host, ON)
    assert start(hook, "lvmthin")["how"] == "layers"
    assert hook.ask(COMMIT_IT) == {}
    assert_ready(host, "lvmthin")
    assert [command.replace(THIN_LV, "TEMPLATE") for command in changing(host)] == [
        LIST,
        f"{CREATE} {NEW_TAGS.replace('4096', str(BASE_SIZE // 2 + 4096))} --permission rw"
        " --snapshot ovirt-local/TEMPLATE",
        f"lvextend --quiet --size {SIZE}b {NAME}",
        f"lvchange --quiet --deltag USED_{NOW - 100} --addtag USED_{NOW} ovirt-local/TEMPLATE",
        commit(host.volumes[VOLUME].lv_uuid, BASE_SIZE // 2 + 4096),
    ]


def test_two_starts_within_a_minute_are_one_use(host: FakeHost) -> None:
    add_template(host, "lvmthin", used=NOW - 59)
    assert start(Hook(host, ON), "lvmthin")["how"] == "layers"
    assert not [command for command in changing(host) if "USED_" in command]


def test_a_disk_as_large_as_its_template_is_not_extended(host: FakeHost) -> None:
    add_template(host, "lvmthin")
    hook = Hook(host, ON)
    assert start(hook, "lvmthin", size=BASE_SIZE)["how"] == "layers"
    assert "lvextend" not in host.tools
    assert host.volumes[VOLUME].lv_size == BASE_SIZE


def test_a_clone_gets_its_margin(host: FakeHost) -> None:
    add_template(host, "lvmthin")
    hook = Hook(host, "{cache: {templates: on}, margins: {disk: 4MiB}}")
    assert start(hook, "lvmthin", size=BASE_SIZE)["how"] == "layers"
    assert host.volumes[VOLUME].lv_size == BASE_SIZE + EXTENT


def test_a_first_start_thick(host: FakeHost) -> None:
    hook = Hook(host, ON)
    assert start(hook) == MISSING
    assert hook.ask(FILL)["target"]["zeroed"] is False
    assert hook.ask(COMMIT_IT) == {}
    assert host.volumes[THICK_LV].lv_active == ""
    prepared = hook.ask(WITH_BASE)
    device = {"path": f"/dev/ovirt-local/{THICK_LV}", "dm_uuid": host.dm_uuid(THICK_LV)}
    assert (prepared["how"], prepared["base"]) == ("on base", device)
    assert prepared["target"]["path"] == PATH
    assert lv_tags(host) == tags("UPDATING", "WRITES_4096")
    assert (host.volumes[THICK_LV].lv_active, host.volumes[THICK_LV].lv_device_open) == ("active", "open")
    assert f"{THICK_LV}.lock" not in locks()  # others may start from it meanwhile
    assert hook.ask(COMMIT_IT) == {}
    assert_ready(host, "lvm")
    ready = f"--addtag HOLDS_{BASE_SIZE} --addtag SAMPLE_{sample(host, THICK_LV)} --addtag USED_{NOW}"
    full_name = f"ovirt-local/{THICK_LV}"
    assert changing(host) == [
        LIST,
        f"lvcreate --quiet --yes --name {THICK_LV} {OPTIONS} {NEW_TEMPLATE}"
        f" --wipesignatures n --zero y --size {BASE_SIZE}b ovirt-local",
        f"lvchange --quiet --activate n {full_name}",
        f"lvchange --quiet --permission r --deltag UPDATING --deltag WRITES_{WRITES} {ready} {full_name}",
        f"lvchange --quiet --activate y --ignoreactivationskip {full_name}",
        f"{CREATE} {NEW_TAGS} --wipesignatures n --zero y --size {SIZE}b ovirt-local",
        commit(host.volumes[VOLUME].lv_uuid),
        f"lvchange --quiet --activate n {full_name}",
    ]


def test_a_second_start_thick(host: FakeHost) -> None:
    add_template(host)
    hook = Hook(host, ON)
    assert start(hook)["how"] == "on base"
    assert hook.ask(COMMIT_IT) == {}
    assert_ready(host, "lvm")
    assert [command.split()[0] for command in changing(host)] == [
        *("virsh", "lvchange", "lvchange", "lvcreate", "lvchange", "lvchange"),
    ]


@BACKENDS
@pytest.mark.parametrize("text", [ON, ONE_AT_A_TIME])
def test_starts_as_the_hook_does_them(host: FakeHost, backend: str, text: str) -> None:
    assert whole_start(Hook(host, text), backend) == FIRST[backend]
    assert_ready(host, backend)
    made = host.volumes[LVS[backend]].lv_uuid
    second = Hook(host, text)
    others: dict[str, Any] = {"vm": OTHER_VM, "image": OTHER_IMAGE, "volume": OTHER_VOLUME}
    assert whole_start(second, backend, **others) == SECOND[backend]
    assert host.volumes[LVS[backend]].lv_uuid == made
    assert_ready(host, backend)
    assert lv_tags(host, OTHER_VOLUME) == tags(vm=OTHER_VM, image=OTHER_IMAGE)
    counted = counters.read()
    assert (counted.template_misses, counted.templates_evicted, counted.failures) == (1, 0, {})
    assert counted.copies == 3


@BACKENDS
def test_two_disks_of_one_template_in_one_run(host: FakeHost, backend: str) -> None:
    hook = Hook(host, ONE_AT_A_TIME)
    assert whole_start(hook, backend) == FIRST[backend]
    assert whole_start(hook, backend, image=OTHER_IMAGE, volume=OTHER_VOLUME) == SECOND[backend]
    assert_ready(host, backend)


def test_each_backend_has_its_own(host: FakeHost) -> None:
    assert whole_start(Hook(host, ON), "lvm") == FIRST["lvm"]
    others: dict[str, Any] = {"vm": OTHER_VM, "image": OTHER_IMAGE, "volume": OTHER_VOLUME}
    assert whole_start(Hook(host, ON), "lvmthin", **others) == FIRST["lvmthin"]
    assert {THICK_LV, THIN_LV} <= set(host.volumes)


def test_a_copy_that_is_broken_off_leaves_the_template_inactive(host: FakeHost) -> None:
    add_template(host)
    hook = Hook(host, ON)
    start(hook)
    hook.session.end()
    assert VOLUME not in host.volumes
    assert (host.volumes[THICK_LV].lv_active, host.volumes[THICK_LV].lv_device_open) == ("", "")
    assert locks() == []
    assert host.opened == {}


def test_a_template_lv_that_another_reads_stays_active(host: FakeHost) -> None:
    add_template(host)
    first, second = Hook(host, ON), Hook(host, ON)
    others: dict[str, Any] = {"vm": OTHER_VM, "image": OTHER_IMAGE, "volume": OTHER_VOLUME}
    assert start(first)["how"] == "on base"
    assert start(second, **others)["how"] == "on base"
    assert first.ask(COMMIT_IT) == {}
    volume = host.volumes[THICK_LV]
    assert (volume.lv_active, volume.lv_device_open) == ("active", "open")
    assert second.ask(COMMIT_IT) == {}
    assert (volume.lv_active, volume.lv_device_open) == ("", "")


def test_a_template_lv_that_another_is_about_to_read_stays_active(host: FakeHost) -> None:
    add_template(host)
    hook = Hook(host, ON)
    start(hook)
    for _ in held_elsewhere(lock.disk_lock(THICK_LV)):
        assert hook.ask(COMMIT_IT) == {}
    assert host.volumes[THICK_LV].lv_active
    assert lv_tags(host) == tags()


@pytest.mark.parametrize("is_stuck", [True, False])
def test_a_disk_is_ready_whether_its_template_lv_can_be_deactivated_or_not(
    host: FakeHost, is_stuck: bool
) -> None:
    """What is left active is gc's; the VM has all that it needs."""
    add_template(host)
    hook = Hook(host, ON)
    start(hook)
    host.fail("lvchange", "  Failed to suspend\n", when="--activate n")
    if is_stuck:

        def hang(argv: list[str]) -> None:
            if "--activate" in argv:
                raise CommandTimeout(tool="lvchange", seconds=5)

        host.before["lvchange"] = hang
    assert hook.ask(COMMIT_IT) == {}
    assert lv_tags(host) == tags()
    assert locks() == []
    assert host.opened == {}


def test_a_kept_disk_needs_no_template(host: FakeHost) -> None:
    host.add(VOLUME, tags("STOPPED_5"), SIZE, lv_active="")
    hook = Hook(host, "{cache: {templates: on}, retention: {on_stop: keep}}")
    assert start(hook) == KEPT
    assert host.commands == [LIST, LOOK, f"lvchange --quiet --deltag STOPPED_5 {NAME}", ACTIVATE]
    assert locks() == []


@BACKENDS
def test_an_old_copy_is_replaced_from_the_template(host: FakeHost, backend: str) -> None:
    """It goes first: its room may be what the template needs."""
    host.add(VOLUME, tags(), SIZE)
    host.vg["vg_free"] = str(BASE_SIZE)
    host.vg["vg_free"] = str(SIZE + BASE_SIZE - SIZE)
    assert whole_start(Hook(host, ON), backend) == FIRST[backend]
    assert_ready(host, backend)


def test_where_the_cache_is_off_a_base_is_nothing(host: FakeHost) -> None:
    add_template(host)
    hook = Hook(host)
    assert hook.ask(CLAIM)["cached"] is False
    assert hook.ask(WITH_BASE)["how"] == "copy"
    assert hook.ask(COMMIT_IT) == {}
    assert host.commands[2].startswith(f"{CREATE} {NEW_TAGS}")
    assert len(host.commands) == 4


def test_the_cache_can_be_on_for_some_vms(host: FakeHost) -> None:
    text = f"vms: {{{VM}: {{cache: {{templates: on}}}}}}"
    assert whole_start(Hook(host, text)) == FIRST["lvm"]
    assert Hook(host, text).ask(CLAIM, vm=OTHER_VM, volume=OTHER_VOLUME)["cached"] is False


# -- requests that make no sense


STRINGS: list[object] = [None, "", 5, VM.upper(), "../x", []]
DOMAINS: list[object] = [None, 5, "x", "../x", DOMAIN.upper(), []]
BASES: list[object] = [
    *(5, "x", [], {}, True),
    *({key: value for key, value in BASE.items() if key != left_out} for left_out in BASE),
    {**BASE, "more": 1},
    *({**BASE, "volume": value} for value in STRINGS),
    *({**BASE, "domain": value} for value in DOMAINS),
    *({**BASE, "fingerprint": value} for value in (None, 5, "", "x" * 32, OTHER_FINGERPRINT.upper())),
    *({**BASE, "size": value} for value in (None, 0, 511, 513, -512, True, "512", 1.5, (64 << 40) + 512)),
]


@pytest.mark.parametrize("base", BASES, ids=str)
def test_a_base_that_is_none(host: FakeHost, base: object) -> None:
    add_template(host)
    hook = Hook(host, ON)
    hook.ask(CLAIM)
    assert "request to the helper is refused" in hook.refused(PREPARE, base=base)
    assert "request to the helper is refused" in hook.refused(PREFETCH, base=base)
    assert set(host.volumes) == {"pool0", THICK_LV}
    assert set(host.commands) <= {LIST, LOOK}
    assert locks() == []


def test_a_base_that_is_larger_than_the_disk(host: FakeHost) -> None:
    hook = Hook(host, ON)
    hook.ask(CLAIM)
    assert "the base is larger than the disk" in hook.refused(WITH_BASE, size=BASE_SIZE - 512)
    assert locks() == []


@pytest.mark.parametrize("changes", [{"volume": VOLUME}, {"fingerprint": FINGERPRINT}, {"size": 512}])
def test_another_base_than_before(host: FakeHost, changes: dict[str, object]) -> None:
    hook = Hook(host, ON)
    assert start(hook) == MISSING
    assert "it names another base" in hook.refused(WITH_BASE, base={**BASE, **changes})
    assert locks() == []


def test_verbs_in_the_wrong_order(host: FakeHost) -> None:
    """Each refusal ends the claim, and what is under way."""
    hook = Hook(host, ON)
    assert "wrong order" in hook.refused(FILL)  # nothing claimed
    hook.ask(CLAIM)
    assert "wrong order" in hook.refused(FILL)  # nothing missing
    assert start(hook) == MISSING
    assert "wrong order" in hook.refused(COMMIT_IT)  # nothing made
    assert start(hook) == MISSING
    hook.ask(FILL)
    assert "wrong order" in hook.refused(FILL)  # under way already
    assert THICK_LV not in host.volumes
    assert start(hook) == MISSING
    hook.ask(FILL)
    assert "wrong order" in hook.refused(WITH_BASE)  # not yet
    assert THICK_LV not in host.volumes
    assert start(hook) == MISSING
    hook.ask(FILL)
    hook.ask(COMMIT_IT)
    assert "wrong order" in hook.refused(COMMIT_IT)  # nothing more to commit
    assert start(hook)["how"] == "on base"
    assert "wrong order" in hook.refused(FILL)
    assert VOLUME not in host.volumes
    assert locks() == []
    assert set(host.volumes) == {"pool0", THICK_LV}


@pytest.mark.parametrize("writes", [None, -1, True, 1.5, "1", (64 << 40) + 1])
def test_a_bad_fill(host: FakeHost, writes: object) -> None:
    hook = Hook(host, ON)
    start(hook)
    assert "writes is no integer" in hook.refused(FILL, writes=writes)
    assert locks() == []


def test_a_release_gives_up_a_fill(host: FakeHost) -> None:
    hook = Hook(host, ON)
    start(hook)
    hook.ask(FILL)
    assert hook.ask(RELEASE) == {}
    assert set(host.volumes) == {"pool0"}
    assert locks() == []


# -- template LVs that may not be used


UNSOUND: dict[str, Callable[[Volume], object]] = {
    "size": lambda volume: setattr(volume, "lv_size", volume.lv_size - EXTENT),
    "writeable": lambda volume: setattr(volume, "lv_permissions", "writeable"),
    "unfinished": lambda volume: volume.lv_tags.add("UPDATING"),
    "no sample": lambda volume: volume.lv_tags.difference_update(
        [tag for tag in volume.lv_tags if tag.startswith("SAMPLE_")]
    ),
    "source": lambda volume: volume.lv_tags.add(f"SOURCE_{FINGERPRINT}"),
}


@BACKENDS
@pytest.mark.parametrize("deviation", UNSOUND)
@pytest.mark.parametrize("erase", ["none", "zero"])
def test_an_unsound_one_is_replaced(host: FakeHost, backend: str, deviation: str, erase: str) -> None:
    old = add_template(host, backend)
    UNSOUND[deviation](old)
    text = f"{{cache: {{templates: on}}, retention: {{erase: {erase}}}}}"
    assert whole_start(Hook(host, text), backend) == FIRST[backend]
    assert_ready(host, backend)
    assert host.volumes[LVS[backend]] is not old
    assert (old in host.removed) == (erase == "none")  # else gc erases it


@BACKENDS
@pytest.mark.parametrize("text", [ON, ONE_AT_A_TIME])
@pytest.mark.parametrize("how", ["spoiled", "unreadable"])
def test_a_spoiled_one_is_replaced(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, backend: str, text: str, how: str
) -> None:
    """What was cloned from it goes first; with one copy at once, the turn is not waited for twice."""
    old = add_template(host, backend)
    if how == "spoiled":
        host.spoil(old.lv_name)
    else:
        take_sample = cache._sample

        def read(path: str, size: int) -> str:
            if old.lv_name in host.volumes and host.volumes[old.lv_name] is old:
                raise OSError(5, "Input/output error")
            return take_sample(path, size)

        monkeypatch.setattr(cache, "_sample", read)
    assert whole_start(Hook(host, text), backend) == FIRST[backend]
    assert old in host.removed
    assert_ready(host, backend)
    removed = [volume.lv_name for volume in host.removed]
    assert removed == ([VOLUME] if backend == "lvmthin" else []) + [LVS[backend]]
    assert host.opened == {}


def test_a_spoiled_one_that_another_reads_is_left_to_it(host: FakeHost) -> None:
    """It cannot be removed; the start goes on without."""
    add_template(host)
    host.volumes[THICK_LV].lv_device_open = "open"
    host.volumes[THICK_LV].lv_active = "active"
    host.spoil(THICK_LV)
    host.fail("lvremove", f"  Logical volume ovirt-local/{THICK_LV} in use.\n", times=1000)
    hook = Hook(host, ON, pause=lambda _seconds: None)
    assert start(hook) == UNCACHED
    assert hook.ask(PREPARE)["how"] == "copy"
    assert hook.ask(COMMIT_IT) == {}
    assert THICK_LV in host.volumes
    assert locks() == []


def test_a_device_that_does_not_come(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    add_template(host)

    def fail(_path: str) -> int:
        raise DeviceNotReady(path=_path, problem="No such file or directory", fix="wait")

    monkeypatch.setattr(cache, "_open", fail)
    hook = Hook(host, ON)
    assert start(hook) == UNCACHED
    assert hook.ask(PREPARE)["how"] == "copy"


@pytest.mark.parametrize(
    "change",
    [
        {"lv_tags": set()},
        {"lv_tags": tags(vm=OTHER_VM)},
        {"lv_tags": {"localdisk"}},
        {"lv_tags": template_tags(f"VM_{VM}")},
        {"lv_layout": "thin,pool"},
    ],
    ids=str,
)
@BACKENDS
def test_a_volume_of_its_name_that_is_not_ours(host: FakeHost, backend: str, change: dict[str, Any]) -> None:
    volume = add_template(host, backend)
    vars(volume).update(change)
    before = volume.row
    hook = Hook(host, ON)
    assert start(hook, backend) == UNCACHED
    assert "wrong order" not in str(hook.ask(PREPARE))
    assert hook.ask(COMMIT_IT) == {}
    assert volume.row == before
    assert lv_tags(host) == tags()
    assert locks() == []


@BACKENDS
@pytest.mark.parametrize("has_name", [True, False])
def test_one_that_is_half_set_aside(host: FakeHost, backend: str, has_name: bool) -> None:
    """A helper was killed before it could rename it: whoever comes next does."""
    old = add_template(host, backend)
    old.lv_tags = aside("zero", other(5)) - (set() if has_name else {f"ASIDE_{other(5)}"})
    assert whole_start(Hook(host, ON), backend) == FIRST[backend]
    assert_ready(host, backend)
    assert (old.lv_name == other(5)) == has_name
    assert old.lv_name != LVS[backend]
    assert "DELETING" in old.lv_tags


# -- filling


@BACKENDS
def test_a_fill_that_is_broken_off(host: FakeHost, backend: str) -> None:
    hook = Hook(host, ON)
    start(hook, backend)
    hook.ask(FILL)
    hook.ask(PROGRESS)
    hook.session.end()
    assert set(host.volumes) == {"pool0"}
    assert locks() == []
    assert counters.read().failures == {"copy_broken_off": 1}


def test_a_fill_that_must_be_erased_is_set_aside(host: FakeHost) -> None:
    text = "{cache: {templates: on}, retention: {erase: discard}}"
    hook = Hook(host, text)
    start(hook)
    hook.ask(FILL)
    made = host.volumes[THICK_LV]
    hook.session.end()
    assert made.lv_tags == aside("discard", made.lv_name)
    assert not gc.collect(parsed(text)).is_problem
    assert host.erased == {made.lv_uuid}


@pytest.mark.parametrize("when", ["--activate n", "--permission r"])
@pytest.mark.parametrize("erase", ["none", "discard", "zero"])
def test_a_commit_of_a_template_that_fails_removes_it(host: FakeHost, when: str, erase: str) -> None:
    """Read-only or not, it is erased and goes."""
    text = f"{{cache: {{templates: on}}, retention: {{erase: {erase}}}}}"
    hook = Hook(host, text)
    start(hook)
    hook.ask(FILL)
    made = host.volumes[THICK_LV]
    host.fail("lvchange", "  Failed to write VG ovirt-local.\n", when=when)
    assert "Failed to write VG" in hook.refused(COMMIT_IT)
    assert THICK_LV not in host.volumes
    assert not gc.collect(parsed(text)).is_problem
    assert made in host.removed
    assert host.erased == (set() if erase == "none" else {made.lv_uuid})
    assert locks() == []


@pytest.mark.parametrize(
    "swap",
    [
        lambda volume: setattr(volume, "lv_uuid", "other0-0000-0000-0000-0000-0000-000000"),
        lambda volume: volume.lv_tags.clear(),
        lambda volume: volume.lv_tags.discard("UPDATING"),
        lambda volume: setattr(volume, "lv_tags", tags("UPDATING")),
    ],
    ids=["uuid", "foreign", "ready", "disk"],
)
def test_a_template_lv_that_someone_swapped_is_not_committed(
    host: FakeHost, swap: Callable[[Volume], object]
) -> None:
    hook = Hook(host, ON)
    start(hook)
    hook.ask(FILL)
    swap(host.volumes[THICK_LV])
    before = host.volumes[THICK_LV].row
    assert "is not the one that was made" in hook.refused(COMMIT_IT)
    assert host.volumes[THICK_LV].row == before
    assert locks() == []


def test_a_template_lv_that_cannot_be_read_is_not_committed(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_path: str, _size: int) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cache, "_sample", fail)
    hook = Hook(host, ON)
    start(hook)
    hook.ask(FILL)
    assert "Input/output error : see the system log" in hook.refused(COMMIT_IT)
    assert set(host.volumes) == {"pool0"}


def test_a_fill_tells_how_far_it_is(host: FakeHost) -> None:
    hook = Hook(host, ON)
    start(hook)
    hook.ask(FILL)
    hook.ask(PROGRESS)
    found = progress.read_all()[THICK_LV]
    assert found
    assert (found.template, found.vm, found.phase) == (OWN_VOLUME, "", "copying")
    assert (found.size, found.done, found.written) == (BASE_SIZE, 5, 3)


# -- two at once


@BACKENDS
def test_the_second_waits_and_then_finds_it(host: FakeHost, backend: str) -> None:
    first = Hook(host, ONE_AT_A_TIME)
    others: dict[str, Any] = {"vm": OTHER_VM, "image": OTHER_IMAGE, "volume": OTHER_VOLUME}
    assert start(first, backend) == MISSING
    steps: Iterator[Any] = iter([FILL, PROGRESS, COMMIT_IT, WITH_BASE, COMMIT_IT])

    def pause(_seconds: float) -> None:
        assert "error" not in first.ask(next(steps))

    second = Hook(host, ONE_AT_A_TIME, pause)
    assert whole_start(second, backend, **others) == SECOND[backend]
    for step in steps:
        assert "error" not in first.ask(step)
    assert (lv_tags(host), lv_tags(host, OTHER_VOLUME)) == (tags(), tags(vm=OTHER_VM, image=OTHER_IMAGE))
    assert counters.read().template_misses == 1
    assert locks() == []


def test_the_second_fills_it_where_the_first_gave_up(host: FakeHost) -> None:
    first = Hook(host, ON)
    start(first)
    first.ask(FILL)
    second = Hook(host, ON, lambda _seconds: first.session.end())
    others: dict[str, Any] = {"vm": OTHER_VM, "image": OTHER_IMAGE, "volume": OTHER_VOLUME}
    assert whole_start(second, **others) == FIRST["lvm"]


def test_waiting_for_a_template_can_end(host: FakeHost) -> None:
    first, second = Hook(host, ON), Hook(host, ON)
    start(first)
    second.ask(CLAIM, image=OTHER_IMAGE, volume=OTHER_VOLUME)
    with pytest.raises(Ended):
        second.ask(WITH_BASE)
    second.session.end()
    assert locks() == [f"{VOLUME}.lock", f"{THICK_LV}.lock"]


# -- room


def room_for(host: FakeHost, backend: str, size: int) -> None:
    """So much, and what is there already."""
    if backend == "lvm":
        host.vg["vg_free"] = str(size)
    else:
        pool = host.volumes["pool0"]
        pool.data_percent = f"{90 - 100 * size / pool.lv_size:.4f}"


@BACKENDS
def test_room_for_the_disk_alone(host: FakeHost, backend: str) -> None:
    """The template has to stand back."""
    room_for(host, backend, SIZE if backend == "lvm" else WRITES)
    hook = Hook(host, ON)
    assert whole_start(hook, backend) == FULL
    assert lv_tags(host) == tags()
    assert LVS[backend] not in host.volumes
    assert locks() == []


@BACKENDS
def test_no_room_at_all(host: FakeHost, backend: str) -> None:
    room_for(host, backend, 2048)
    hook = Hook(host, ON)
    start(hook, backend)
    assert hook.ask(FILL) == UNCACHED
    assert "margins" in hook.refused(PREPARE)
    assert set(host.volumes) == {"pool0"}
    assert locks() == []


@pytest.mark.parametrize("text", [ON, ONE_AT_A_TIME])
def test_room_that_its_own_template_lv_takes(host: FakeHost, text: str) -> None:
    """It was opened to be read, so it was not evicted; without it there is room."""
    add_template(host)
    room_for(host, "lvm", SIZE - BASE_SIZE)
    assert whole_start(Hook(host, text)) == ["uncached", "copy"]
    assert lv_tags(host) == tags()
    assert set(host.volumes) == {"pool0", VOLUME}
    assert locks() == []


@BACKENDS
def test_room_is_made_by_idle_template_lvs(host: FakeHost, backend: str) -> None:
    """The least recently used first, no more than needed; not what is in use, locked, or no template's."""
    for number, used in ((1, 30), (2, 10), (3, 20), (4, 5), (5, 6)):
        add_template(host, backend, used, other(number))
    host.volumes[other(4)].lv_device_open = host.volumes[other(4)].lv_active = "open"
    room_for(host, backend, SIZE - BASE_SIZE if backend == "lvm" else EXTENT - BASE_SIZE // 2)
    host.commands.clear()
    hook = Hook(host, ON)
    for _ in held_elsewhere(lock.disk_lock(other(5))):
        hook.ask(CLAIM, property=backend)
        assert hook.ask(PREPARE)["how"] == "copy"
    assert hook.ask(COMMIT_IT) == {}
    assert [volume.lv_name for volume in host.removed] == [other(2)]
    assert counters.read().templates_evicted == 1
    assert locks() == []


@BACKENDS
def test_its_own_template_lv_is_not_evicted(host: FakeHost, backend: str) -> None:
    add_template(host, backend, used=1)
    add_template(host, backend, used=2, name=other(1))
    room_for(host, backend, SIZE - BASE_SIZE if backend == "lvm" else EXTENT - BASE_SIZE // 2)
    assert whole_start(Hook(host, ON), backend) == SECOND[backend]
    assert [volume.lv_name for volume in host.removed] == [other(1)]
    assert_ready(host, backend)


@BACKENDS
def test_nothing_is_evicted_where_it_does_not_help(host: FakeHost, backend: str) -> None:
    for number in (1, 2):
        add_template(host, backend, number, other(number))
    room_for(host, backend, 0 if backend == "lvm" else -10 * BASE_SIZE)
    hook = Hook(host, ON)
    hook.ask(CLAIM, property=backend)
    assert "margins" in hook.refused(PREPARE)
    assert host.removed == []
    assert locks() == []


THRESHOLD = "  Cannot create new thin volume, free space in thin pool ovirt-local/pool0 reached threshold.\n"


@pytest.mark.parametrize(
    ("text", "is_cached", "answers"),
    [
        ("cache: {templates: on, max_size: 1}", False, FULL),
        (ON, False, FIRST["lvmthin"]),
        (ON, True, SECOND["lvmthin"]),
    ],
)
def test_a_pool_too_full_for_lvm_itself(
    host: FakeHost, text: str, is_cached: bool, answers: list[str]
) -> None:
    """Its threshold may be lower than our margins; idle template LVs go one by one, but for its own."""
    for number in range(1, 4):
        add_template(host, "lvmthin", number, other(number))
    if is_cached:
        add_template(host, "lvmthin", 0)
    host.fail("lvcreate", THRESHOLD, times=2)
    assert whole_start(Hook(host, text), "lvmthin") == answers
    assert [volume.lv_name for volume in host.removed] == [other(1), other(2)]
    assert counters.read().templates_evicted == 2
    assert locks() == []


def test_a_pool_too_full_for_lvm_without_template_lvs(host: FakeHost) -> None:
    add_template(host, "lvmthin", 1, other(1))
    add_template(host, "lvm", 2, other(2))
    host.fail("lvcreate", THRESHOLD, times=9)
    hook = Hook(host, "")
    hook.ask(CLAIM, property="lvmthin")
    assert "too full for LVM itself" in hook.refused(PREPARE)
    assert [volume.lv_name for volume in host.removed] == [other(1)]
    assert locks() == []


def test_what_lies_elsewhere_makes_no_room(host: FakeHost) -> None:
    """A pool's template LVs for a preallocated disk."""
    add_template(host, "lvmthin", 1, other(1))
    room_for(host, "lvm", SIZE - EXTENT)
    hook = Hook(host, ON)
    hook.ask(CLAIM)
    assert "lacks 4 MiB" in hook.refused(PREPARE)
    assert host.removed == []


@pytest.mark.parametrize("erase", ["discard", "zero"])
@BACKENDS
def test_what_is_evicted_is_erased_first(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, backend: str, erase: str
) -> None:
    """Now, as its room is wanted, and though it is read-only."""
    zeroed: list[str] = []
    monkeypatch.setattr("localdisk.volumes.removal._zero_thin_data", lambda path, _pace: zeroed.append(path))
    old = add_template(host, backend, 1, other(1))
    room_for(host, backend, SIZE - BASE_SIZE if backend == "lvm" else EXTENT - BASE_SIZE // 2)
    hook = Hook(host, f"{{cache: {{templates: on}}, retention: {{erase: {erase}}}}}")
    hook.ask(CLAIM, property=backend)
    assert hook.ask(PREPARE)["how"] == "copy"
    assert host.removed == [old]
    assert old.lv_permissions == "writeable"
    assert [*host.erased] == [old.lv_uuid] if not zeroed else zeroed == [f"/dev/ovirt-local/{old.lv_name}"]
    assert host.tools[3:-1] == [
        "fullreport",
        *(["lvchange"] if erase == "discard" and backend == "lvm" else []),  # can it be discarded?
        *("lvchange", "lvrename", "fullreport", "lvchange", "lvchange"),
        *(["fullreport"] if erase == "discard" and backend == "lvmthin" else []),
        *([] if zeroed else ["blkdiscard"]),
        *("lvremove", "fullreport"),
    ]


def test_one_that_is_taken_into_use_meanwhile_stays(host: FakeHost) -> None:
    add_template(host, "lvm", 1, other(1))
    add_template(host, "lvm", 2, other(2))
    room_for(host, "lvm", SIZE - BASE_SIZE)

    def use() -> None:
        host.volumes[other(1)].lv_device_open = host.volumes[other(1)].lv_active = "open"

    hook = Hook(host, ON)
    hook.ask(CLAIM)
    host.before_command(1, use)
    assert hook.ask(PREPARE)["how"] == "copy"
    assert [volume.lv_name for volume in host.removed] == [other(2)]


def test_one_whose_lock_is_taken_meanwhile_stays(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was free when it was looked for."""
    add_template(host, "lvm", 1, other(1))
    add_template(host, "lvm", 2, other(2))
    room_for(host, "lvm", SIZE - BASE_SIZE)
    monkeypatch.setattr(lock, "is_held", lambda _path: False)
    hook = Hook(host, ON)
    hook.ask(CLAIM)
    for _ in held_elsewhere(lock.disk_lock(other(1))):
        assert hook.ask(PREPARE)["how"] == "copy"
    assert [volume.lv_name for volume in host.removed] == [other(2)]


def test_where_all_are_taken_into_use_meanwhile_there_is_no_room(host: FakeHost) -> None:
    add_template(host, "lvm", 1, other(1))
    room_for(host, "lvm", SIZE - BASE_SIZE)

    def use() -> None:
        host.volumes[other(1)].lv_device_open = host.volumes[other(1)].lv_active = "open"

    hook = Hook(host, ON)
    hook.ask(CLAIM)
    host.before_command(1, use)
    assert "lacks" in hook.refused(PREPARE)
    assert host.removed == []


def test_what_is_replaced_makes_the_room_that_template_lvs_did_not_make(host: FakeHost) -> None:
    """As where one shares its blocks with a disk, which LVM does not report, or is in use by now."""
    add_template(host, "lvm", 1, other(1))
    old = host.add(OTHER_VOLUME, tags("STOPPED_5", fingerprint=OTHER_FINGERPRINT), SIZE, lv_active="")
    room_for(host, "lvm", SIZE - BASE_SIZE)

    def use() -> None:
        host.volumes[other(1)].lv_device_open = host.volumes[other(1)].lv_active = "open"

    hook = Hook(host, "{cache: {templates: on}, retention: {on_source_change: recopy}}")
    hook.ask(CLAIM)
    host.before_command(2, use)
    assert hook.ask(PREPARE)["how"] == "copy"
    assert host.removed == [old]


@pytest.mark.parametrize("room", [EXTENT // 2, 5 * EXTENT // 4])
def test_what_a_kept_disk_shares_with_its_template_lv_is_no_room(host: FakeHost, room: int) -> None:
    """8 MiB of its 10 stay with the template LV: it goes only if the other 2 are enough."""
    base = add_template(host, "lvmthin")
    thin = {"pool_lv": "pool0", "lv_layout": "thin,sparse", "lv_role": "public,snapshot,thinsnapshot"}
    old_tags = tags("STOPPED_5", fingerprint=OTHER_FINGERPRINT)
    fields = {"data_percent": "25.00", "lv_active": "", "origin": base.lv_name, **thin}
    old = host.add(OTHER_VOLUME, old_tags, SIZE, **fields)
    room_for(host, "lvmthin", room)
    hook = Hook(host, "{cache: {templates: on}, retention: {on_stop: keep, on_source_change: recopy}}")
    hook.ask(CLAIM, property="lvmthin")
    if room > EXTENT:
        assert hook.ask(WITH_BASE, writes=3 * EXTENT // 2)["how"] == "layers"
        assert host.removed == [old]
    else:
        assert "thin_data" in hook.refused(WITH_BASE, writes=3 * EXTENT // 2)
        assert host.removed == []


@pytest.mark.parametrize("change", ["none", "removed", "spoiled"])
def test_a_clone_that_erases_for_its_room_leaves_the_template_lv_to_others(
    host: FakeHost, change: str
) -> None:
    """Other VMs of the template start meanwhile; gc may remove it."""
    base = add_template(host, "lvmthin")
    thin = {"pool_lv": "pool0", "lv_layout": "thin,sparse", "lv_role": "public,snapshot,thinsnapshot"}
    old_tags = tags("STOPPED_5", fingerprint=OTHER_FINGERPRINT)
    fields = {"data_percent": "25.00", "lv_active": "", "origin": base.lv_name, **thin}
    old = host.add(OTHER_VOLUME, old_tags, SIZE, **fields)
    room_for(host, "lvmthin", 5 * EXTENT // 4)
    text = (
        "{cache: {templates: on}, copy: {parallel: 1},"
        " retention: {on_stop: keep, on_source_change: recopy, erase: discard}}"
    )
    seen: list[list[str]] = []

    def erase(_argv: list[str]) -> None:
        if not seen:
            seen.append(locks())
            if change == "removed":
                del host.volumes[base.lv_name]
            elif change == "spoiled":
                base.lv_tags.discard(f"SAMPLE_{sample(host, base.lv_name)}")

    host.before["blkdiscard"] = erase
    hook = Hook(host, text)
    hook.ask(CLAIM, property="lvmthin")
    answer = hook.ask(WITH_BASE, writes=3 * EXTENT // 2)
    assert old in host.removed
    assert [f"{base.lv_name}.lock" in names for names in seen] == [False]
    assert answer["how"] == ("layers" if change == "none" else "missing")
    if change != "none":
        assert VOLUME not in host.volumes
        assert hook.ask(FILL)["how"] == "copy"
        assert hook.ask(COMMIT_IT) == {}
        assert hook.ask(WITH_BASE)["how"] == "layers"
    assert hook.ask(COMMIT_IT) == {}
    assert locks() == []


# -- cache.max_size


@BACKENDS
def test_a_template_that_is_too_large_for_the_cache(host: FakeHost, backend: str) -> None:
    most = (BASE_SIZE if backend == "lvm" else WRITES) - 512
    old = add_template(host, backend, 1, other(1), size=EXTENT)
    text = f"cache: {{templates: on, max_size: {most}}}"
    assert whole_start(Hook(host, text), backend) == FULL
    assert LVS[backend] not in host.volumes
    assert host.removed == []  # it would not have helped
    assert old.lv_name in host.volumes


@BACKENDS
def test_a_full_cache_gives_up_what_was_not_used_for_longest(host: FakeHost, backend: str) -> None:
    for number, used in ((1, 30), (2, 10), (3, 20)):
        add_template(host, backend, used, other(number))
    most = 3 * BASE_SIZE if backend == "lvm" else 3 * (BASE_SIZE // 2)
    text = f"cache: {{templates: on, max_size: {most}}}"
    assert whole_start(Hook(host, text), backend) == FIRST[backend]
    assert [volume.lv_name for volume in host.removed] == [other(2)]
    assert_ready(host, backend)


@BACKENDS
def test_what_is_in_use_counts_but_stays(host: FakeHost, backend: str) -> None:
    busy = add_template(host, backend, 1, other(1))
    busy.lv_device_open = busy.lv_active = "open"
    most = BASE_SIZE + EXTENT if backend == "lvm" else BASE_SIZE // 2 + EXTENT
    hook = Hook(host, f"cache: {{templates: on, max_size: {most}}}")
    assert whole_start(hook, backend) == FULL
    assert host.removed == []


def test_what_another_is_filling_counts_as_what_it_will_hold(host: FakeHost) -> None:
    """Not as its whole size: a large template with little data does not keep others out of the pool."""
    large = host.add(
        other(1), template_tags("UPDATING", "WRITES_4096"), 900 << 20, pool_lv="pool0", data_percent="0.00"
    )
    for _ in held_elsewhere(lock.disk_lock(large.lv_name)):
        assert whole_start(Hook(host, ON), "lvmthin") == FIRST["lvmthin"]
    assert large.lv_name in host.volumes


def test_an_eviction_that_fails_leaves_the_start(host: FakeHost) -> None:
    add_template(host, "lvm", 1, other(1))
    host.fail("lvremove", "  Cannot change VG\n", when=other(1))
    hook = Hook(host, f"cache: {{templates: on, max_size: {BASE_SIZE}}}")
    assert whole_start(hook) == FULL
    assert lv_tags(host) == tags()


# -- templates on block storage


ON_BLOCK = {**BASE, "domain": DOMAIN}


@pytest.fixture(name="devices")
def fixture_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_devices", lambda _path: ["/dev/sda", "/dev/sdb"])


@pytest.mark.parametrize(
    ("domain_tags", "is_cached"),
    [
        ({f"IU_{OTHER_IMAGE}", "PU_x", "MD_5"}, True),
        ({f"IU_{IMAGE}"}, False),
        ({f"IU_{IMAGE}", f"IU_{OTHER_IMAGE}"}, False),
        ({"MD_5"}, False),
        (set(), False),
        (None, False),  # there is no such volume
    ],
    ids=str,
)
@pytest.mark.usefixtures("devices")
def test_a_block_volume_is_a_templates_by_its_tag(
    host: FakeHost, domain_tags: set[str] | None, is_cached: bool
) -> None:
    if domain_tags is not None:
        host.domain_tags[f"{DOMAIN}/{OWN_VOLUME}"] = domain_tags
    hook = Hook(host, ON)
    assert start(hook, base=ON_BLOCK) == (MISSING if is_cached else UNCACHED)
    asked = "lvs --readonly --reportformat json -o lv_tags --devices /dev/sda,/dev/sdb"
    assert host.commands[2] == f"{asked} {DOMAIN}/{OWN_VOLUME}"
    if not is_cached:
        assert locks() == [f"{VOLUME}.lock"]
        assert hook.ask(PREPARE)["how"] == "copy"


def test_a_block_volume_whose_device_is_not_there(host: FakeHost) -> None:
    hook = Hook(host, ON)
    assert start(hook, base=ON_BLOCK) == UNCACHED
    assert "lvs" not in host.tools
    assert hook.ask(PREPARE)["how"] == "copy"


@pytest.mark.usefixtures("devices")
def test_a_storage_domain_is_asked_once(host: FakeHost) -> None:
    host.domain_tags[f"{DOMAIN}/{OWN_VOLUME}"] = {f"IU_{OTHER_IMAGE}"}
    hook = Hook(host, ON)
    start(hook, base=ON_BLOCK)
    hook.ask(FILL)
    hook.ask(COMMIT_IT)
    assert hook.ask(PREPARE, base=ON_BLOCK)["how"] == "on base"
    assert host.tools.count("lvs") == 1


# -- prefetch


@BACKENDS
def test_prefetch(host: FakeHost, backend: str) -> None:
    hook = Hook(host, ON)
    assert hook.ask(PREFETCH, backend=backend) == {"ready": False, "chunk": 65536 * (backend == "lvmthin")}
    assert hook.ask(FILL)["how"] == "copy"
    assert hook.ask(PROGRESS) == {}
    assert hook.ask(COMMIT_IT) == {}
    hook.session.end()
    assert locks() == []
    assert counters.read().failures == {}
    second = Hook(host, ON)
    assert second.ask(PREFETCH, backend=backend) == {"ready": True, "chunk": 65536 * (backend == "lvmthin")}
    assert "wrong order" in second.refused(FILL)
    assert whole_start(Hook(host, ON), backend) == SECOND[backend]
    assert_ready(host, backend)


def test_prefetch_is_a_use(host: FakeHost) -> None:
    """What is fetched again and again is wanted, though no VM of it starts."""
    volume = add_template(host)
    hook = Hook(host, ON)
    assert hook.ask(PREFETCH) == {"ready": True, "chunk": 0}
    assert volume.lv_tags == template_tags(
        f"HOLDS_{BASE_SIZE}", f"SAMPLE_{sample(host, THICK_LV)}", f"USED_{NOW}"
    )
    assert hook.ask(PREFETCH)["ready"]
    assert [command.split()[0] for command in changing(host)] == ["lvchange"]
    assert counters.read().template_hits == 0


def test_a_template_that_is_looked_for_is_shown(host: FakeHost) -> None:
    hook = Hook(host, ON)
    hook.ask(PREFETCH)
    found = progress.read_all()[THICK_LV]
    assert found
    assert (found.template, found.phase) == (OWN_VOLUME, "preparing")


def test_prefetch_of_several(host: FakeHost) -> None:
    hook = Hook(host, ONE_AT_A_TIME)
    for volume in (OWN_VOLUME, OTHER_VOLUME):
        assert hook.ask(PREFETCH, base={**BASE, "volume": volume})["ready"] is False
        assert hook.ask(FILL)["target"]
        assert hook.ask(COMMIT_IT) == {}
    hook.session.end()
    assert len(host.volumes) == 3


def test_prefetch_where_the_cache_is_off(host: FakeHost) -> None:
    assert "there is no template cache in volume group ovirt-local" in Hook(host).refused(PREFETCH)
    assert host.commands == []
    assert locks() == []


@pytest.mark.parametrize("backend", [None, "", "on", 5, [], "LVM"])
def test_prefetch_for_no_backend(host: FakeHost, backend: object) -> None:
    assert "the backend is not known" in Hook(host, ON).refused(PREFETCH, backend=backend)


@BACKENDS
def test_prefetch_without_room(host: FakeHost, backend: str) -> None:
    """Nobody waits for it: it is refused, and why."""
    room_for(host, backend, 2048)
    hook = Hook(host, ON)
    hook.ask(PREFETCH, backend=backend)
    assert {"lvm": "lacks 16 MiB", "lvmthin": "would pass margins.thin_data"}[backend] in hook.refused(FILL)
    assert set(host.volumes) == {"pool0"}
    assert locks() == []


def test_prefetch_into_a_cache_that_is_too_small(host: FakeHost) -> None:
    hook = Hook(host, "cache: {templates: on, max_size: 4MiB}")
    hook.ask(PREFETCH)
    assert "of 16 MiB does not fit into the cache, of which 4 MiB can be had" in hook.refused(FILL)


def test_prefetch_that_ends_in_the_middle(host: FakeHost) -> None:
    hook = Hook(host, ON)
    hook.ask(PREFETCH)
    hook.ask(FILL)
    hook.ask(PROGRESS)
    hook.session.end()
    assert set(host.volumes) == {"pool0"}
    assert locks() == []
    assert counters.read().failures == {"copy_broken_off": 1}


# -- killed


def settle(host: FakeHost, text: str, vm_runs: bool = True) -> None:
    """Two rounds of gc, after which nothing is left that nobody needs."""
    host.bury()
    host.active = {VM} if vm_runs else set()
    for _ in range(2):
        assert not gc.collect(parsed(text)).is_problem


def killed_start(host: FakeHost, text: str, backend: str, number: int) -> None:
    """A start whose helper is killed before its command of that number."""
    host.kill_before(number)
    hook = Hook(host, text)
    with contextlib.suppress(Killed):
        whole_start(hook, backend)
    with contextlib.suppress(Killed):
        hook.session.close()


@pytest.mark.parametrize("number", range(22))
@pytest.mark.parametrize("backend", ["lvm", "lvmthin"])
@pytest.mark.parametrize("erase", ["none", "discard"])
def test_a_start_that_is_killed_is_made_good(host: FakeHost, number: int, backend: str, erase: str) -> None:
    """Killed before its command of that number, while it fills and clones."""
    text = f"{{cache: {{templates: on}}, copy: {{parallel: 1}}, retention: {{erase: {erase}}}}}"
    killed_start(host, text, backend, number)
    host.bury()
    assert whole_start(Hook(host, text), backend)[-1] in ("on base", "layers")
    assert_ready(host, backend)
    settle(host, text)
    assert_ready(host, backend)
    assert set(host.volumes) == {"pool0", VOLUME, LVS[backend]}
    assert host.erased == ({volume.lv_uuid for volume in host.removed} if erase != "none" else set())


@pytest.mark.parametrize("number", range(22))
@BACKENDS
def test_gc_alone_makes_good_what_was_killed(host: FakeHost, number: int, backend: str) -> None:
    killed_start(host, ON, backend, number)
    settle(host, ON, vm_runs=False)
    for name, volume in host.volumes.items():
        assert "UPDATING" not in volume.lv_tags
        if name == LVS[backend]:
            assert (volume.lv_permissions, volume.lv_active) == ("read-only", "")
        else:
            assert name in ("pool0", VOLUME)
    assert locks() == []


@pytest.mark.parametrize("number", range(3, 24))
@BACKENDS
@pytest.mark.parametrize("erase", ["none", "discard"])
def test_a_start_from_a_spoiled_one_that_is_killed(
    host: FakeHost, number: int, backend: str, erase: str
) -> None:
    """Whatever was done by then, no disk ever starts from it."""
    old = add_template(host, backend)
    host.spoil(old.lv_name)
    text = f"{{cache: {{templates: on}}, retention: {{erase: {erase}}}}}"
    killed_start(host, text, backend, number)
    host.bury()
    assert whole_start(Hook(host, text), backend)[-1] in ("on base", "layers")
    assert_ready(host, backend)
    content = {host.content.get(volume.lv_uuid) for volume in host.volumes.values()}
    assert "spoiled" not in content or erase != "none"  # else set aside, until gc has erased it
    settle(host, text)
    assert "spoiled" not in {host.content.get(volume.lv_uuid) for volume in host.volumes.values()}
    assert set(host.volumes) == {"pool0", VOLUME, LVS[backend]}


# -- the sample


def test_a_sample_tells_what_was_overwritten_moved_or_cut_off(tmp_path: Path) -> None:
    size, path = 8 << 20, tmp_path / "device"
    content = os.urandom(size)
    path.write_bytes(content)
    as_it_was = REAL_SAMPLE(str(path), size)
    assert len(as_it_was) == 32
    assert int(as_it_was, 16)
    path.write_bytes(content + b"more behind it")
    assert REAL_SAMPLE(str(path), size) == as_it_was
    for spoiled in (
        content[: size // 2] + bytes(size // 2),
        bytes(64 << 10) + content[64 << 10 :],
        content[512:] + content[:512],
        content[: size - (1 << 20)],
        bytes(size),
    ):
        path.write_bytes(spoiled)
        assert REAL_SAMPLE(str(path), size) != as_it_was


@pytest.mark.parametrize("size", [512, 4096, 4608, 1 << 20, (1 << 20) - 512, 5 << 20])
def test_a_sample_reads_little_and_inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int) -> None:
    (tmp_path / "device").write_bytes(bytes(-(-size // EXTENT) * EXTENT))
    read: list[tuple[int, int]] = []
    pread = os.pread

    def note(fd: int, length: int, offset: int) -> bytes:
        read.append((offset, length))
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", note)
    REAL_SAMPLE(str(tmp_path / "device"), size)
    assert sum(length for _, length in read) <= 1 << 20
    assert all(offset < size and offset % 4096 == 0 for offset, _ in read)
    assert max(offset for offset, _ in read) >= size - size // 128 - 4096


def test_devices_of_a_volume_that_is_not_there() -> None:
    with pytest.raises(NoTemplate, match="No such file"):
        list(cache._devices("/dev/no-such-domain/volume"))
