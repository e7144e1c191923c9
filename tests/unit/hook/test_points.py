from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from localdisk import cancel, cli, config, counters, lock, ready, run
from localdisk.errors import (
    BadDiskData,
    BadDomain,
    BadHookCall,
    BadProperty,
    CopyFailed,
    DiskRefused,
    Error,
    HelperRefused,
    HotplugRefused,
    LibvirtSilent,
    NotLocal,
    OperationRefused,
    SourceRefused,
    UnplugRefused,
)
from localdisk.hook import copy, local_copy, points, template_source
from localdisk.hook.copy import OnProgress
from localdisk.hook.sources import Layer, Source
from localdisk.libvirt import DomainState
from localdisk.protocol import Base, Device, Target
from localdisk.vdsm import hook_call
from localdisk.volumes import gc
from localdisk.volumes.lvm import VolumeGroup
from tests.fakes import (
    EXTENT,
    FULLREPORT,
    IMAGE,
    OTHER_IMAGE,
    OTHER_VM,
    OTHER_VOLUME,
    VM,
    VOLUME,
    tags,
)
from tests.fakes.vdsm import SIZE, Vdsm, disk_json, domain_xml, with_state

LOCAL, OTHER_LOCAL = f"/dev/ovirt-local/{VOLUME}", f"/dev/ovirt-local/{OTHER_VOLUME}"


@pytest.fixture(name="host_vdsm")
def fixture_host_vdsm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Vdsm:
    return Vdsm(monkeypatch, tmp_path)


# -- after_disk_prepare


def test_a_disk_is_made_local(host_vdsm: Vdsm) -> None:
    text = disk_json(host_vdsm)
    answer = json.loads(host_vdsm.call("after_disk_prepare", text))
    changed = {"path": LOCAL, "format": "raw", "diskType": "block", "shared": "exclusive"}
    assert answer == {**json.loads(text), **changed}
    assert host_vdsm.verbs == [["claim", "prepare", "progress", "commit"]]
    assert [target.path for target in host_vdsm.copied] == [LOCAL]
    assert "UPDATING" not in host_vdsm.host.volumes[VOLUME].lv_tags
    assert host_vdsm.locks == []


def test_a_thin_disk(host_vdsm: Vdsm) -> None:
    host_vdsm.call("after_disk_prepare", disk_json(host_vdsm), localdisk="lvmthin")
    assert host_vdsm.host.volumes[VOLUME].pool_lv == "pool0"
    assert host_vdsm.copied[0].zeroed
    assert "--addtag WRITES_65536 " in host_vdsm.host.lvm_commands[1]  # one cluster of data


def test_a_thick_disk_writes_all(host_vdsm: Vdsm) -> None:
    host_vdsm.call("after_disk_prepare", disk_json(host_vdsm))
    assert f"--addtag WRITES_{SIZE} " in host_vdsm.host.lvm_commands[1]


def test_a_second_run_of_the_same_hook(host_vdsm: Vdsm) -> None:
    """The first was killed after it was done; vdsm starts the VM again."""
    host_vdsm.configure("retention: {on_stop: keep}")
    first = host_vdsm.call("after_disk_prepare", disk_json(host_vdsm))
    assert host_vdsm.call("after_disk_prepare", disk_json(host_vdsm)) == first
    assert host_vdsm.verbs[1] == ["claim", "prepare"]
    assert len(host_vdsm.copied) == 1


def test_a_kept_thin_disk_is_used_again_and_nothing_is_measured(
    host_vdsm: Vdsm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a large image on slow storage, the measure would take longer than all else of a restart."""
    host_vdsm.configure("retention: {on_stop: keep, on_source_change: recopy}")
    thin = {"localdisk": "lvmthin"}
    first = host_vdsm.call("after_disk_prepare", disk_json(host_vdsm), **thin)
    assert host_vdsm.verbs[0] == ["claim", "reuse", "prepare", "progress", "commit"]
    with monkeypatch.context() as patch:
        patch.setattr(Source, "writes", None)
        assert host_vdsm.call("after_disk_prepare", disk_json(host_vdsm), **thin) == first
    assert host_vdsm.verbs[1] == ["claim", "reuse"]
    host_vdsm.source(VOLUME, 2 * SIZE)
    assert host_vdsm.call("after_disk_prepare", disk_json(host_vdsm), **thin) == first
    assert host_vdsm.verbs[2] == ["claim", "reuse", "prepare", "progress", "commit"]
    assert len(host_vdsm.copied) == 2


@pytest.mark.parametrize("device", ["cdrom", "floppy"])
def test_what_is_no_disk_is_passed_over(host_vdsm: Vdsm, device: str) -> None:
    text = disk_json(host_vdsm, device=device, readonly=True)
    assert host_vdsm.call("after_disk_prepare", text) == text
    assert host_vdsm.helpers == []


def test_a_disk_that_stays(host_vdsm: Vdsm) -> None:
    text = disk_json(host_vdsm)
    for override in ("enabled: false", f"disks: [{OTHER_IMAGE}]"):
        host_vdsm.configure(f"vms: {{{VM}: {{{override}}}}}")
        assert host_vdsm.call("after_disk_prepare", text) == text
    assert host_vdsm.verbs == [["claim"]] * 2
    assert host_vdsm.host.tools == ["virsh"] * 2


@pytest.mark.parametrize("shared", ["shared", "transient"])
def test_a_shared_disk_may_stay(host_vdsm: Vdsm, shared: str) -> None:
    host_vdsm.configure(f"vms: {{{VM}: {{disks: [{OTHER_IMAGE}]}}}}")
    text = disk_json(host_vdsm, shared=shared)
    assert host_vdsm.call("after_disk_prepare", text) == text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shared": "shared"}, "disk vda is shared between VMs; a local copy would split them : exclude"),
        ({"shared": "transient"}, "disk vda is transient"),
        ({"diskType": "network", "path": "volume/x"}, "disk vda is on network storage"),
        (
            {"imageID": "", "volumeID": "", "serial": "", "volumeChain": []},
            "disk vda is no image of a storage",
        ),
    ],
)
def test_disks_that_cannot_be_local(host_vdsm: Vdsm, changes: dict[str, Any], problem: str) -> None:
    assert problem in host_vdsm.refused(DiskRefused, "after_disk_prepare", disk_json(host_vdsm, **changes))
    assert host_vdsm.copied == []
    assert VOLUME not in host_vdsm.host.volumes


@pytest.mark.parametrize("shared", ["false", "none", "exclusive"])
def test_disks_of_one_vm(host_vdsm: Vdsm, shared: str) -> None:
    text = disk_json(host_vdsm, shared=shared)
    assert LOCAL in host_vdsm.call("after_disk_prepare", text)


# What vdsm asks about a disk of a VM that it recovers: as its domain has it, but with the shared path again.
RECOVERED = {"diskType": "block", "format": "raw", "shared": "exclusive"}


@pytest.mark.parametrize("state", [s for s in DomainState if s is not DomainState.PLACEHOLDER])
@pytest.mark.parametrize("more", [(), ("UNNEEDED_5",), ("STOPPED_5",), ("UPDATING",)])
def test_a_vm_that_vdsm_does_not_start_is_left_alone(
    host_vdsm: Vdsm, state: DomainState, more: tuple[str, ...]
) -> None:
    """vdsm recovers it, running or shut off, or it is migrated to this host or resumed."""
    host_vdsm.configure("retention: {on_stop: keep, on_source_change: recopy}")
    host_vdsm.host.add(VOLUME, tags(*more), SIZE, lv_device_open="open" if state.value == "active" else "")
    with_state(host_vdsm.host, state)
    text = disk_json(host_vdsm, **RECOVERED)
    assert host_vdsm.call("after_disk_prepare", text) == text
    assert host_vdsm.helpers == []
    assert host_vdsm.host.tools == ["virsh"]
    assert host_vdsm.host.volumes[VOLUME].lv_tags == tags(*more)


@pytest.mark.parametrize("state", [DomainState.ACTIVE, DomainState.SHUT_OFF])
@pytest.mark.parametrize(
    "break_it",
    [
        lambda machine: machine.configure("volume_grop: x"),
        lambda machine: machine.host.fail("lvm", "it hangs", times=9),
        lambda machine: machine.host.vg.update(vg_name="another"),
    ],
    ids=["configuration", "LVM", "volume group"],
)
def test_nothing_is_refused_while_vdsm_recovers_a_vm(
    host_vdsm: Vdsm, state: DomainState, break_it: Callable[[Vdsm], None]
) -> None:
    with_state(host_vdsm.host, state)
    break_it(host_vdsm)
    for text in (disk_json(host_vdsm, **RECOVERED), disk_json(host_vdsm, shared="shared"), "no JSON"):
        assert host_vdsm.call("after_disk_prepare", text) == text
        assert host_vdsm.call("after_disk_prepare", text, localdisk="nonsense") == text


def test_a_silent_libvirt_refuses_a_start_only_when_the_domain_is_created(host_vdsm: Vdsm) -> None:
    """Before that, the VM may be one that vdsm recovers."""
    host_vdsm.host.libvirt_is_silent = True
    text = disk_json(host_vdsm)
    assert host_vdsm.call("after_disk_prepare", text) == text
    assert host_vdsm.helpers == []
    domain = domain_xml(("vda", host_vdsm.source(VOLUME), IMAGE, VOLUME))
    assert "libvirt does not report" in host_vdsm.refused(LibvirtSilent, "before_vm_start", domain)


@pytest.mark.parametrize("storage", ["file", "network"])
def test_a_block_device_of_another_kind_of_storage_is_of_a_vm_that_ran(host_vdsm: Vdsm, storage: str) -> None:
    """The second sign of a recovery, whatever libvirt answers."""
    host_vdsm.host.add(VOLUME, tags(), SIZE)
    shared = f"/rhev/data-center/p/d/images/{IMAGE}/{VOLUME}"
    text = disk_json(host_vdsm, **RECOVERED, path=shared, volumeInfo={"type": storage, "path": "/x"})
    assert host_vdsm.call("after_disk_prepare", text) == text
    assert host_vdsm.helpers == []


@pytest.mark.parametrize("path", [f"/dev/ovirt-local/{OTHER_VOLUME}", "/dev/mapper/ovirt--local-x"])
def test_a_local_disk_as_the_path_is_no_sign(host_vdsm: Vdsm, path: str) -> None:
    """vdsm names the shared path when it recovers a VM; another VM's local disk must not get through."""
    more = {**RECOVERED, "path": path, "volumeInfo": {"type": "file", "path": "/x"}}
    host_vdsm.refused(Error, "after_disk_prepare", disk_json(host_vdsm, **more))


def test_block_storage_alone_is_no_sign(host_vdsm: Vdsm) -> None:
    text = disk_json(host_vdsm, diskType="block", volumeInfo={"type": "block", "path": "/x"})
    assert LOCAL in host_vdsm.call("after_disk_prepare", text)


@pytest.mark.parametrize("point", ["after_disk_prepare", "before_vm_hibernate"])
def test_a_vm_without_the_property_asks_nobody(host_vdsm: Vdsm, point: str) -> None:
    host_vdsm.call(point, "anything", localdisk="off")
    assert host_vdsm.host.commands == []


def test_a_copy_that_fails_leaves_nothing(host_vdsm: Vdsm) -> None:
    host_vdsm.copy_fails = CopyFailed(volume="v", path="p", problem="x")
    host_vdsm.refused(CopyFailed, "after_disk_prepare", disk_json(host_vdsm))
    assert VOLUME not in host_vdsm.host.volumes


def test_a_source_that_is_refused_leaves_nothing(host_vdsm: Vdsm) -> None:
    os.truncate(host_vdsm.directory / VOLUME, 0)
    host_vdsm.refused(SourceRefused, "after_disk_prepare", disk_json(host_vdsm))
    assert host_vdsm.host.tools == ["virsh", "fullreport"]


def test_what_the_helper_refuses_is_refused(host_vdsm: Vdsm) -> None:
    host_vdsm.host.add(VOLUME, tags(vm=OTHER_VM), SIZE)
    message = host_vdsm.refused(HelperRefused, "after_disk_prepare", disk_json(host_vdsm))
    assert f"belongs to VM {OTHER_VM}" in message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"device": "disk"}x'])
def test_data_that_is_no_disk(host_vdsm: Vdsm, text: str) -> None:
    host_vdsm.refused(BadDiskData, "after_disk_prepare", text)
    assert host_vdsm.helpers == []


# -- before_vm_start


def test_a_domain_that_is_local_already(host_vdsm: Vdsm) -> None:
    host_vdsm.host.add(VOLUME, tags(), SIZE)
    host_vdsm.host.add(OTHER_VOLUME, tags(image=OTHER_IMAGE), SIZE)
    text = domain_xml(("vda", LOCAL, IMAGE, VOLUME), ("vdb", OTHER_LOCAL, OTHER_IMAGE, OTHER_VOLUME))
    answer = host_vdsm.call("before_vm_start", text)
    assert answer == text.replace("threads", "native")
    assert host_vdsm.verbs == [["look"]]
    assert host_vdsm.host.commands == [f"{FULLREPORT} ovirt-local"]


def test_disks_that_are_noted_as_ready_need_no_helper(host_vdsm: Vdsm) -> None:
    text = prepared(host_vdsm)
    assert host_vdsm.call("before_vm_start", text) == text
    assert host_vdsm.helpers == []
    assert host_vdsm.host.commands == []


@pytest.mark.parametrize("change", ["marked", "renamed", "removed", "inactive", "powered off", "no file"])
def test_a_disk_that_has_changed_since_it_was_ready(host_vdsm: Vdsm, change: str) -> None:
    text, vg = prepared(host_vdsm), VolumeGroup.read("ovirt-local")
    if change == "marked":
        vg.change_tags(VOLUME, add={"DELETING"})
    elif change == "renamed":
        vg.rename(VOLUME, OTHER_VOLUME)
        vg.rename(OTHER_VOLUME, VOLUME)
    elif change == "removed":
        vg.remove(VOLUME)
    elif change == "inactive":
        host_vdsm.host.volumes[VOLUME].lv_active = ""
    elif change == "powered off":
        cancel.destroying(VM)
    else:
        os.unlink(os.path.join(lock.RUN, "ready", VOLUME))
    if change in ("renamed", "no file"):
        assert host_vdsm.call("before_vm_start", text) == text
    else:
        host_vdsm.refused(Error, "before_vm_start", text)
    assert host_vdsm.verbs == [["look"]]


@pytest.mark.parametrize("field", ["vm", "image", "volume", "path"])
def test_the_record_of_another_disk_does_not_count(host_vdsm: Vdsm, field: str) -> None:
    """The record is there, and differs in one of its fields from what the domain has."""
    prepared(host_vdsm)
    vm, image, volume, path = VM, IMAGE, VOLUME, LOCAL
    if field == "vm":
        vm = OTHER_VM
        host_vdsm.host.defined.add(OTHER_VM)
    elif field == "image":
        image = OTHER_IMAGE
    elif field == "volume":
        volume = OTHER_VOLUME
    else:
        path = f"/dev/other/{VOLUME}"
        host_vdsm.host.add(OTHER_VOLUME, tags(), SIZE)
    text = domain_xml(("vda", path, image, volume), vm=vm)
    with suppress(Error):
        host_vdsm.call("before_vm_start", text, vmId=vm)
    assert host_vdsm.verbs[0][0] == "look"


def test_one_disk_without_its_record_has_all_looked_at(host_vdsm: Vdsm) -> None:
    prepared(host_vdsm)
    host_vdsm.host.add(OTHER_VOLUME, tags(image=OTHER_IMAGE), SIZE)
    text = domain_xml(("vda", LOCAL, IMAGE, VOLUME), ("vdb", OTHER_LOCAL, OTHER_IMAGE, OTHER_VOLUME))
    host_vdsm.call("before_vm_start", text)
    assert host_vdsm.verbs == [["look"]]


def prepared(host_vdsm: Vdsm) -> str:
    """The domain XML of a VM whose disk was prepared; the helpers and commands of that are forgotten."""
    host_vdsm.call("after_disk_prepare", disk_json(host_vdsm))
    host_vdsm.helpers.clear()
    host_vdsm.host.commands.clear()
    return domain_xml(("vda", LOCAL, IMAGE, VOLUME)).replace("threads", "native")


def test_disks_that_were_not_prepared_are_prepared_now(host_vdsm: Vdsm) -> None:
    """An older vdsm without after_disk_prepare, or its link is missing: one was, one was not."""
    host_vdsm.host.add(VOLUME, tags(), SIZE)
    shared = host_vdsm.source(OTHER_VOLUME)
    text = domain_xml(("vda", LOCAL, IMAGE, VOLUME), ("vdb", shared, OTHER_IMAGE, OTHER_VOLUME))
    answer = host_vdsm.call("before_vm_start", text)
    assert f"<source dev='{OTHER_LOCAL}'/>" in answer.replace('"', "'")
    assert shared not in answer
    assert answer.count("type='block'") + answer.count('type="block"') == 2
    assert host_vdsm.verbs == [["look", "claim", "prepare", "progress", "commit"]]
    assert [target.path for target in host_vdsm.copied] == [OTHER_LOCAL]


def test_two_disks_are_prepared_with_one_helper(host_vdsm: Vdsm) -> None:
    paths = host_vdsm.source(VOLUME), host_vdsm.source(OTHER_VOLUME)
    text = domain_xml(("vda", paths[0], IMAGE, VOLUME), ("vdb", paths[1], OTHER_IMAGE, OTHER_VOLUME))
    answer = host_vdsm.call("before_vm_start", text)
    assert LOCAL in answer
    assert OTHER_LOCAL in answer
    assert host_vdsm.verbs == [["look", *["claim", "prepare", "progress", "commit"] * 2]]
    assert host_vdsm.locks == []


def test_a_second_disk_that_fails_leaves_the_first_ready(host_vdsm: Vdsm) -> None:
    paths = host_vdsm.source(VOLUME), host_vdsm.source(OTHER_VOLUME, 0)
    text = domain_xml(("vda", paths[0], IMAGE, VOLUME), ("vdb", paths[1], OTHER_IMAGE, OTHER_VOLUME))
    host_vdsm.refused(SourceRefused, "before_vm_start", text)
    assert set(host_vdsm.host.volumes) == {"pool0", VOLUME}


@pytest.mark.parametrize(
    ("more", "active", "state"),
    [
        (None, "", "absent"),
        (("UPDATING",), "active", "unfinished"),
        (("STOPPED_5",), "active", "stopped"),
        (("DELETING",), "active", "deleting"),
        ((), "", "ready"),
    ],
)
def test_a_domain_on_a_disk_that_is_not_ready(
    host_vdsm: Vdsm, more: tuple[str, ...] | None, active: str, state: str
) -> None:
    if more is not None:
        host_vdsm.host.add(VOLUME, tags(*more), SIZE, lv_active=active)
    text = domain_xml(("vda", LOCAL, IMAGE, VOLUME))
    message = host_vdsm.refused(NotLocal, "before_vm_start", text)
    assert f"disk vda of VM {VM} points to {LOCAL}" in message
    assert f"({state})" in message


@pytest.mark.parametrize("change", ["enabled: false", f"disks: [{OTHER_IMAGE}]", "volume_group: other"])
def test_the_configuration_changes_while_a_vm_starts(host_vdsm: Vdsm, change: str) -> None:
    """Its first disk is local already, so the VM runs from it; the second one is not ready yet."""
    host_vdsm.configure("retention: {on_stop: keep}")
    prepared(host_vdsm)
    host_vdsm.configure(f"{{retention: {{on_stop: keep}}, vms: {{{VM}: {{{change}}}}}}}")
    shared = host_vdsm.source(OTHER_VOLUME)
    second = disk_json(
        host_vdsm, name="vdb", path=shared, imageID=OTHER_IMAGE, volumeID=OTHER_VOLUME, serial=OTHER_IMAGE
    )
    if change == "enabled: false":
        assert host_vdsm.call("after_disk_prepare", second) == second
        text = domain_xml(("vda", LOCAL, IMAGE, VOLUME), ("vdb", shared, OTHER_IMAGE, OTHER_VOLUME))
        assert f"<source file='{shared}'/>" in host_vdsm.call("before_vm_start", text)
    else:
        text = domain_xml(("vda", LOCAL, IMAGE, VOLUME))
        assert LOCAL in host_vdsm.call("before_vm_start", text)
    assert "STALE" not in host_vdsm.host.volumes[VOLUME].lv_tags


def test_a_local_path_without_a_record_is_refused_although_the_vm_is_not_local(host_vdsm: Vdsm) -> None:
    text = prepared(host_vdsm)
    host_vdsm.configure(f"vms: {{{VM}: {{enabled: false}}}}")
    ready.forget([VOLUME])
    assert "absent" in host_vdsm.refused(NotLocal, "before_vm_start", text)
    assert "STALE" not in host_vdsm.host.volumes[VOLUME].lv_tags


def test_a_domain_on_the_disk_of_another_vm(host_vdsm: Vdsm) -> None:
    host_vdsm.host.add(VOLUME, tags(vm=OTHER_VM), SIZE)
    text = domain_xml(("vda", LOCAL, IMAGE, VOLUME))
    assert OTHER_VM in host_vdsm.refused(HelperRefused, "before_vm_start", text)


def test_disks_of_a_domain_that_stay(host_vdsm: Vdsm) -> None:
    host_vdsm.configure(f"vms: {{{VM}: {{disks: [{IMAGE}]}}}}")
    host_vdsm.host.add(VOLUME, tags(), SIZE)
    shared = host_vdsm.source(OTHER_VOLUME)
    text = domain_xml(("vda", LOCAL, IMAGE, VOLUME), ("vdb", shared, OTHER_IMAGE, OTHER_VOLUME))
    answer = host_vdsm.call("before_vm_start", text)
    assert f"<source file='{shared}'/>" in answer
    assert host_vdsm.verbs == [["look"]]


@pytest.mark.parametrize(
    "state",
    [DomainState.ACTIVE, DomainState.SHUT_OFF, DomainState.UNKNOWN],
    ids=["runs", "shut off", "resumed"],
)
def test_a_domain_that_is_not_started_is_left_alone(host_vdsm: Vdsm, state: DomainState) -> None:
    with_state(host_vdsm.host, state)
    text = domain_xml(("vda", host_vdsm.source(VOLUME), IMAGE, VOLUME))
    assert host_vdsm.call("before_vm_start", text) == text
    assert host_vdsm.copied == []


def test_a_domain_without_images(host_vdsm: Vdsm) -> None:
    cdrom = (
        "<disk type='file' device='cdrom'><source file='/iso/x.iso'/><target dev='sda'/></disk>"
        "<disk type='block' device='lun'><source dev='/dev/mapper/x'/><target dev='sdb'/></disk>"
    )
    text = domain_xml(more=cdrom)
    assert host_vdsm.call("before_vm_start", text) == text
    assert host_vdsm.helpers == []


def test_a_domain_of_another_vm(host_vdsm: Vdsm) -> None:
    text = domain_xml(("vda", LOCAL, IMAGE, VOLUME), vm=OTHER_VM)
    assert OTHER_VM in host_vdsm.refused(BadDomain, "before_vm_start", text)


# -- stopping


def test_stopping_releases_the_disks(host_vdsm: Vdsm) -> None:
    host_vdsm.host.add(VOLUME, tags(), SIZE)
    host_vdsm.host.add(OTHER_VOLUME, tags(vm=OTHER_VM), SIZE)
    text = domain_xml(("vda", LOCAL, IMAGE, VOLUME))
    assert host_vdsm.call("after_vm_destroy", text) == text
    assert host_vdsm.verbs == [["release"]]
    assert set(host_vdsm.host.volumes) == {"pool0", OTHER_VOLUME}


OVERLAY = f"/rhev/data-center/mnt/blockSD/{OTHER_VM}/images/{IMAGE}/{OTHER_VOLUME}"


def left_domain(path: str, inside: str = "<backingStore/>") -> str:
    """The domain XML of a VM that ran from `path` when it stopped, its disk known by its serial."""
    return (
        f"<domain type='qemu'>\n  <uuid>{VM}</uuid>\n  <devices>\n"
        "    <disk type='file' device='cdrom'><target dev='sdc'/></disk>\n"
        f"    <disk type='block' device='disk'><source dev='{path}'/>{inside}<target dev='vda'/>"
        f"<serial>{IMAGE}</serial></disk>\n  </devices>\n</domain>\n"
    )


@pytest.mark.parametrize(
    ("vdsms", "libvirts", "is_kept"),
    [
        (left_domain(OVERLAY), "", True),
        (left_domain(OVERLAY, ""), "", False),  # the engine's: the start was refused
        (left_domain(LOCAL), "", False),
        (left_domain(LOCAL), left_domain(OVERLAY, ""), True),
        (left_domain(LOCAL), left_domain(LOCAL, ""), False),
        (left_domain(f"/dev/{OTHER_VM}/{OTHER_VOLUME}"), "", True),
        (left_domain(OVERLAY).replace(IMAGE, "mine", 2).replace("mine", IMAGE, 1), "", False),
        ("no XML", left_domain(OVERLAY), False),
    ],
)
def test_a_disk_that_the_vm_ran_beside_in_the_end_is_kept(
    host_vdsm: Vdsm, vdsms: str, libvirts: str, is_kept: bool
) -> None:
    host_vdsm.host.add(VOLUME, tags(), SIZE)
    host_vdsm.host.xmls.update({VM: libvirts} if libvirts else {})
    host_vdsm.call("after_vm_destroy", vdsms)
    assert host_vdsm.verbs == [["drifted", "release"] if is_kept else ["release"]]
    assert (VOLUME in host_vdsm.host.volumes) == is_kept


def test_stopping_does_not_look_at_the_domain(host_vdsm: Vdsm) -> None:
    host_vdsm.host.add(VOLUME, tags(), SIZE)
    assert host_vdsm.call("after_vm_destroy", "no XML") == "no XML"
    assert VOLUME not in host_vdsm.host.volumes


# -- what a local VM cannot do

ON_TOP = (  # a live snapshot was not refused: the local disk is below the new layer
    f"<disk type='block' device='disk'><source dev='/dev/{OTHER_VM}/{OTHER_VOLUME}'/><target dev='vda'/>"
    f"<backingStore type='block'><source dev='{LOCAL}'/></backingStore></disk>"
)


@pytest.mark.parametrize(
    ("point", "operation"),
    [
        ("before_vm_migrate_source", "migrated"),
        ("before_vm_migrate_destination", "migrated"),
        ("before_vm_hibernate", "suspended"),
        ("before_vm_dehibernate", "resumed from a saved state"),
    ],
)
def test_operations_that_are_refused(host_vdsm: Vdsm, point: str, operation: str) -> None:
    message = host_vdsm.refused(OperationRefused, point, domain_xml())
    assert f"VM {VM} runs from local disks, it cannot be {operation} : stop the VM" in message
    host_vdsm.configure(f"vms: {{{VM}: {{enabled: false}}}}")
    shared = domain_xml(("vda", host_vdsm.source(VOLUME), IMAGE, VOLUME))
    assert host_vdsm.call(point, shared) == shared
    assert not host_vdsm.helpers or point == "before_vm_migrate_destination"


@pytest.mark.parametrize("point", ["before_vm_migrate_source", "before_vm_hibernate"])
@pytest.mark.parametrize("xml", [domain_xml(("vda", LOCAL, IMAGE, VOLUME)), domain_xml(more=ON_TOP)])
def test_a_vm_that_runs_from_local_disks_when_it_is_disabled(host_vdsm: Vdsm, point: str, xml: str) -> None:
    host_vdsm.configure(f"vms: {{{VM}: {{enabled: false}}}}")
    assert "runs from local disks" in host_vdsm.refused(OperationRefused, point, xml)


def test_a_disabled_vm_that_is_migrated_to_this_host_makes_its_kept_disks_stale(host_vdsm: Vdsm) -> None:
    host_vdsm.host.add(VOLUME, tags("STOPPED_5"), SIZE)
    host_vdsm.configure(f"retention: {{on_stop: keep}}\nvms: {{{VM}: {{enabled: false}}}}")
    host_vdsm.call("before_vm_migrate_destination", domain_xml())
    assert "STALE" in host_vdsm.host.volumes[VOLUME].lv_tags


def disk_element(device: str = "disk", image: str = IMAGE) -> str:
    path = f"/rhev/data-center/mnt/srv:_exp/{VM}/images/{image}/{VOLUME}"
    return (
        f"<disk type='file' device='{device}'><driver name='qemu' type='qcow2'/><source file='{path}'/>"
        f"<target dev='vdc' bus='virtio'/><serial>{image}</serial></disk>"
    )


@pytest.mark.parametrize(
    ("text", "element", "is_refused"),
    [
        ("", disk_element(), True),
        ("hotplug: refuse", disk_element(), True),
        ("hotplug: shared", disk_element(), False),
        ("", disk_element("cdrom"), False),
        (f"vms: {{{VM}: {{enabled: false}}}}", disk_element(), False),
        (f"vms: {{{VM}: {{hotplug: shared}}}}", disk_element(), False),
        (f"vms: {{{VM}: {{disks: [{OTHER_IMAGE}]}}}}", disk_element(), False),
        (f"vms: {{{VM}: {{disks: [{OTHER_IMAGE}]}}}}", disk_element(image=OTHER_IMAGE), True),
    ],
)
def test_hotplug(host_vdsm: Vdsm, text: str, element: str, is_refused: bool) -> None:
    host_vdsm.configure(text)
    if is_refused:
        message = host_vdsm.refused(HotplugRefused, "before_disk_hotplug", element)
        assert message.startswith(f"disk vdc cannot be plugged into VM {VM}")
    else:
        assert host_vdsm.call("before_disk_hotplug", element) == element
    assert host_vdsm.verbs == ([["stale"]] if not is_refused and "cdrom" not in element else [])


@pytest.mark.parametrize("text", ["hotplug: shared", f"vms: {{{VM}: {{disks: [{OTHER_IMAGE}]}}}}"])
def test_a_disk_with_a_kept_copy_is_plugged_in_from_shared_storage(host_vdsm: Vdsm, text: str) -> None:
    """The VM writes to shared storage from now on: the kept copy must not be used again unseen."""
    host_vdsm.configure(text)
    host_vdsm.host.add(VOLUME, tags("STOPPED_5"), SIZE)
    host_vdsm.host.add(OTHER_VOLUME, tags("STOPPED_5", image=OTHER_IMAGE), SIZE)
    host_vdsm.call("before_disk_hotplug", disk_element())
    assert "STALE" in host_vdsm.host.volumes[VOLUME].lv_tags
    assert "STALE" not in host_vdsm.host.volumes[OTHER_VOLUME].lv_tags


def test_a_vm_without_kept_disks_is_not_looked_at_when_a_disk_is_plugged_in(host_vdsm: Vdsm) -> None:
    host_vdsm.configure("hotplug: shared")
    gc.collect(config.load())  # has made a file for each VM with kept disks
    host_vdsm.host.commands.clear()
    host_vdsm.call("before_disk_hotplug", disk_element())
    assert host_vdsm.helpers == []


def unplugged_element(path: str, kind: str = "block") -> str:
    attribute = "dev" if kind == "block" else "file"
    return (
        f"<disk type='{kind}' device='disk'><driver name='qemu' type='raw'/><source {attribute}='{path}'/>"
        f"<target dev='vdb' bus='virtio'/><serial>{IMAGE}</serial></disk>"
    )


@pytest.mark.parametrize(
    "text", ["", "hotplug: shared", f"vms: {{{VM}: {{enabled: false}}}}", "volume_group: other", "broken: ["]
)
@pytest.mark.parametrize("group", ["ovirt-local", "scratch", "a.b_c+d"])
def test_a_local_disk_is_never_unplugged(host_vdsm: Vdsm, text: str, group: str) -> None:
    """The present configuration does not matter: the VM runs from this disk."""
    host_vdsm.configure(text)
    path = f"/dev/{group}/{VOLUME}"
    message = host_vdsm.refused(UnplugRefused, "before_disk_hotunplug", unplugged_element(path))
    assert message.startswith(f"disk vdb of VM {VM} is the local disk {path}, which is not unplugged")


@pytest.mark.parametrize(
    "element",
    [
        disk_element(),
        disk_element("cdrom"),
        unplugged_element(f"/dev/{OTHER_VM}/{VOLUME}"),
        unplugged_element(f"/rhev/data-center/mnt/blockSD/{OTHER_VM}/images/{IMAGE}/{VOLUME}"),
        unplugged_element(f"/dev/mapper/{VOLUME}"),
        unplugged_element("/dev/mapper/3600140565f2a1b0c4d24f1c9a1b2c3d4"),
        unplugged_element(f"/run/vdsm/managedvolumes/{VOLUME}"),
        unplugged_element(f"/dev/ovirt-local/{VOLUME}", "file"),
    ],
)
def test_a_shared_disk_of_a_local_vm_may_be_unplugged(host_vdsm: Vdsm, element: str) -> None:
    assert host_vdsm.call("before_disk_hotunplug", element) == element
    assert host_vdsm.helpers == []


# -- before_vdsm_start


@pytest.mark.parametrize("vdsm_runs", [False, True])
def test_the_start_of_vdsm_collects_garbage(
    host_vdsm: Vdsm, monkeypatch: pytest.MonkeyPatch, vdsm_runs: bool
) -> None:
    """Called by hand while vdsm runs, a VM may be starting."""
    monkeypatch.setattr(hook_call, "is_running", lambda: vdsm_runs)
    host_vdsm.host.add(VOLUME, tags("UPDATING"), SIZE)
    host_vdsm.host.add(OTHER_VOLUME, tags(image=OTHER_IMAGE), SIZE)
    cli.before_vdsm_start()
    assert set(host_vdsm.host.volumes) == {"pool0", *([OTHER_VOLUME] if vdsm_runs else [])}


def test_the_start_of_vdsm_does_not_wait_for_all_of_it(
    host_vdsm: Vdsm, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    """LVM is busy, or there are many: what is not done in time is the next gc's."""
    monkeypatch.setattr(hook_call, "is_running", lambda: False)
    monkeypatch.setattr(gc, "BATCH", 1)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for name in (VOLUME, OTHER_VOLUME):
        host_vdsm.host.add(name, tags("UPDATING", image=name), SIZE)

    def take_long(_argv: list[str]) -> None:
        now[0] += cli.GC_BUDGET

    host_vdsm.host.before["lvremove"] = take_long
    cli.before_vdsm_start()
    assert set(host_vdsm.host.volumes) == {"pool0", OTHER_VOLUME}
    (line,) = (line for line in logged if "gc before vdsm starts" in line)
    assert line.endswith("why=30 s are over, the next gc does the rest")
    assert not run.is_spent()
    cli.before_vdsm_start()
    assert set(host_vdsm.host.volumes) == {"pool0"}


# -- powered off


@pytest.mark.parametrize(
    ("state", "verbs"),
    [("", [["cancel"]]), ("defined", [["cancel"]]), ("shut_off", []), ("active", [])],
    ids=["unknown", "starting", "shut off", "runs"],
)
def test_a_vm_that_starts_is_powered_off(host_vdsm: Vdsm, state: str, verbs: list[list[str]]) -> None:
    """vdsm hands over an empty file."""
    host_vdsm.host.defined = set()
    if state:
        setattr(host_vdsm.host, state, {VM})
    assert host_vdsm.call("before_vm_destroy", "") == ""
    assert host_vdsm.verbs == verbs


def test_the_next_preview_after_a_refused_one_says_that_the_vm_was_powered_off_before_it_ran(
    host_vdsm: Vdsm,
) -> None:
    """Only then does it say again why a VM with local disks is not resumed: nothing tells the two apart."""
    host_vdsm.host.defined = set()
    shared = domain_xml(("vda", str(host_vdsm.directory / VOLUME), IMAGE, VOLUME))
    assert host_vdsm.call("before_vm_start", shared) == shared
    host_vdsm.refused(OperationRefused, "before_vm_dehibernate", shared)
    host_vdsm.call("before_vm_destroy", "")
    host_vdsm.call("after_vm_destroy", shared)
    message = host_vdsm.refused(Error, "before_vm_start", shared)
    assert message == f"VM {VM} was powered off before it ran : try again; nothing is left behind"
    assert host_vdsm.call("before_vm_start", shared) == shared
    host_vdsm.refused(OperationRefused, "before_vm_dehibernate", shared)


def test_a_vm_is_powered_off_while_libvirt_is_silent(host_vdsm: Vdsm) -> None:
    host_vdsm.host.libvirt_is_silent = True
    host_vdsm.call("before_vm_destroy", "")
    assert host_vdsm.verbs == [["cancel"]]


# -- calls


@pytest.mark.parametrize("point", sorted(hook_call.POINTS - {"before_vdsm_start", *hook_call.BEGINNINGS}))
def test_without_the_property_nothing_is_done(host_vdsm: Vdsm, point: str) -> None:
    assert host_vdsm.call(point, "anything", localdisk="off") == "anything"
    variable = "_hook_json" if point == "after_disk_prepare" else "_hook_domxml"
    points.run(point, {"vmId": VM, variable: "/nonexistent"})
    assert host_vdsm.helpers == []


@pytest.mark.parametrize(
    ("kind", "environ"),
    [
        (BadProperty, {"localdisk": "LVM"}),
        (BadProperty, {"localdisk": ""}),
        (BadHookCall, {"vmId": "x"}),
        (BadHookCall, {"_hook_domxml": "/x"}),
        (BadHookCall, {"_hook_json": "relative"}),
    ],
)
def test_calls_that_are_refused(host_vdsm: Vdsm, kind: type[Error], environ: dict[str, str]) -> None:
    host_vdsm.refused(kind, "after_disk_prepare", disk_json(host_vdsm), **environ)


def test_every_point_has_its_function() -> None:
    functions: dict[str, Callable[..., Any]] = dict(points.HANDLERS)
    assert functions.keys() == hook_call.POINTS - {"before_vdsm_start"}  # cli serves it
    assert all(function.__name__ == point for point, function in functions.items())


# -- from a template


BASE_VOLUME = "55555555-5555-4555-8555-555555555555"
DOMAIN = "dddddddd-5555-4555-8555-555555555555"
TEMPLATE_IMAGE = "eeeeeeee-5555-4555-8555-555555555555"
ON = "cache: {templates: on}"
METADATA = {"VOLTYPE": "SHARED", "LEGALITY": "LEGAL", "IMAGE": TEMPLATE_IMAGE, "FORMAT": "RAW"}


class Templated(Vdsm):
    """A VM's image on a file storage domain: a leaf on the base of a template, which has hard links here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        super().__init__(monkeypatch, directory)
        self.configure(ON)
        self.filled: list[tuple[str, ...]] = []  # how, and the first digits of the volumes that were read
        self.on_copy: Callable[[], object] = lambda: None
        for each in (self.images / IMAGE, self.images / TEMPLATE_IMAGE):
            each.mkdir(parents=True)
        self.base.write_bytes(b"x" * EXTENT)
        self.tell()
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", BASE_VOLUME, "-F", "raw", str(self.leaf)]
        subprocess.run([*argv, str(SIZE)], check=True)
        monkeypatch.setattr(copy, "copy", self._any_copy("copy"))
        monkeypatch.setattr(copy, "apply", self._any_copy("layers"))
        monkeypatch.setattr(copy, "copy_on", self._copy_on)

    @property
    def images(self) -> Path:
        return self.directory / "images"

    @property
    def leaf(self) -> Path:
        return self.images / IMAGE / VOLUME

    @property
    def base(self) -> Path:
        return self.images / IMAGE / BASE_VOLUME

    def tell(self, **changes: str) -> None:
        """What storage says of the base; its template has the same file."""
        lines = (f"{key}={value}\n" for key, value in {**METADATA, **changes}.items())
        self.base.with_suffix(".meta").write_text("".join(lines) + "EOF\n")
        their = self.images / TEMPLATE_IMAGE / BASE_VOLUME
        their.unlink(missing_ok=True)
        os.link(self.base, their)

    def start(self, **environ: str) -> Any:
        volumes = [
            {"volumeID": each.name, "imageID": IMAGE, "path": str(each)} for each in (self.base, self.leaf)
        ]
        fields = {"format": "cow", "path": str(self.leaf), "volumeChain": volumes}
        text = disk_json(self, **fields)
        return json.loads(self.call("after_disk_prepare", text, **environ))

    def refused_start(self, kind: type[Error]) -> str:
        with pytest.raises(kind) as caught:
            self.start()
        assert [name for name in self.locks if name.endswith(".lock")] == []
        return str(caught.value)

    def require_uncached(self, logged: list[str], why: str) -> None:
        """One line says why the template was not used, and it is counted."""
        (line,) = (line for line in logged if "template not cached" in line)
        assert f"vm={VM} disk={VOLUME} reason={why} why=" in line
        assert counters.read().uncached == {why: 1}

    @property
    def asked(self) -> list[dict[str, Any]]:
        return [request for helper in self.helpers for request in helper.requests]

    def bases(self) -> list[Any]:
        return [each["base"] and each["base"]["volume"] for each in self.asked if each["verb"] == "prepare"]

    def _any_copy(self, how: str) -> Callable[[Source, Target, OnProgress], None]:
        def copied(source: Source, target: Target, on_progress: OnProgress) -> None:
            on_progress(0.5, 1)
            self.on_copy()
            if self.copy_fails:
                raise self.copy_fails
            self.filled.append((how, *(os.path.basename(layer.path)[0] for layer in source.layers)))
            assert target.path.startswith("/dev/ovirt-local/")

        return copied

    def _copy_on(self, source: Source, base: Device, target: Target, on_progress: OnProgress) -> None:
        assert base.path != target.path
        self._any_copy("on base")(source, target, on_progress)


@pytest.fixture(name="templated")
def fixture_templated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Templated:
    return Templated(monkeypatch, tmp_path)


@pytest.mark.parametrize(("backend", "how"), [("lvm", "on base"), ("lvmthin", "layers")])
def test_a_disk_starts_from_its_template(templated: Templated, backend: str, how: str) -> None:
    assert templated.start(localdisk=backend)["path"] == LOCAL
    assert templated.filled == [("copy", "5"), (how, "1", "5")]
    reuse = ["reuse"] * (backend == "lvmthin")
    assert templated.verbs == [
        [
            *("claim", *reuse, "prepare", "fill", "progress", "commit"),
            *("prepare", "progress", "commit"),
        ]
    ]
    asked = templated.asked[1 + len(reuse)]["base"]
    assert (asked["volume"], asked["domain"], asked["size"]) == (BASE_VOLUME, "", EXTENT)
    writes = [each["writes"] for each in templated.asked if "writes" in each]
    assert writes == ([SIZE, EXTENT, SIZE] if backend == "lvm" else [0, EXTENT, 0])
    templated.filled.clear()
    templated.host.volumes.pop(VOLUME)
    assert templated.start(localdisk=backend)["path"] == LOCAL
    assert templated.filled == [(how, "1", "5")]
    assert templated.verbs[1] == ["claim", *reuse, "prepare", "progress", "commit"]
    assert "UPDATING" not in templated.host.volumes[VOLUME].lv_tags
    assert [name for name in templated.locks if name.endswith(".lock")] == []


def test_progress_is_of_what_is_copied(templated: Templated) -> None:
    templated.start()
    assert [each["done"] for each in templated.asked if each["verb"] == "progress"] == [
        EXTENT // 2,
        SIZE // 2,
    ]


def test_without_the_cache_no_base_is_asked_for(templated: Templated) -> None:
    templated.configure("")
    templated.start()
    assert templated.bases() == [None]
    assert templated.filled == [("copy", "1", "5")]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"VOLTYPE": "INTERNAL"}, "no_template"),
        ({"VOLTYPE": "LEAF"}, "no_template"),
        ({"LEGALITY": "ILLEGAL"}, "not_legal"),
        ({"IMAGE": OTHER_IMAGE}, "not_in_template"),
        ({"IMAGE": "x"}, "not_in_template"),
    ],
    ids=str,
)
def test_a_base_that_is_no_template(
    templated: Templated, logged: list[str], changes: dict[str, str], why: str
) -> None:
    templated.tell(**changes)
    templated.start()
    assert templated.bases() == [None]
    assert templated.filled == [("copy", "1", "5")]
    templated.require_uncached(logged, why)


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "no_metadata"), ("VOLTYPE=SHARED\n", "metadata_unclear"), ("EOF\n", "no_template")],
)
def test_a_base_without_its_metadata(
    templated: Templated, logged: list[str], content: str | None, why: str
) -> None:
    meta = templated.base.with_suffix(".meta")
    meta.unlink()
    if content is not None:
        meta.write_text(content)
    templated.start()
    assert templated.bases() == [None]
    templated.require_uncached(logged, why)


def test_a_disk_that_is_smaller_than_its_template(templated: Templated, logged: list[str]) -> None:
    """What of the base lies behind its end must not come back."""
    with templated.base.open("ab") as file:
        file.write(bytes(SIZE))
    templated.start()
    assert templated.bases() == [None]
    assert templated.filled == [("copy", "1", "5")]
    templated.require_uncached(logged, "smaller_layer")


def test_a_template_that_the_cache_has_no_room_for(templated: Templated, logged: list[str]) -> None:
    """All of it is copied to the disk, as without a cache."""
    templated.configure("cache: {templates: on, max_size: 512}")
    assert templated.start()["path"] == LOCAL
    assert templated.bases() == [BASE_VOLUME, None]
    assert templated.filled == [("copy", "1", "5")]
    assert templated.verbs == [["claim", "prepare", "fill", "prepare", "progress", "commit"]]
    templated.require_uncached(logged, "cache_full")


def test_a_volume_in_the_template_lvs_place(templated: Templated) -> None:
    templated.start()
    (name,) = set(templated.host.volumes) - {VOLUME, "pool0"}
    templated.host.volumes[name].lv_tags = set()
    del templated.host.volumes[VOLUME]
    templated.filled.clear()
    assert templated.start()["path"] == LOCAL
    assert templated.filled == [("copy", "1", "5")]
    assert templated.verbs[1] == ["claim", "prepare", "prepare", "progress", "commit"]


def test_a_template_lv_that_is_missing_again_when_it_was_made(
    templated: Templated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is spoiled as soon as it is made: no second try, but a full copy."""
    takes = iter(range(100))
    monkeypatch.setattr("localdisk.helper.cache._sample", lambda _path, _size: f"{next(takes):032x}")
    assert templated.start()["path"] == LOCAL
    assert templated.filled == [("copy", "5"), ("copy", "1", "5")]
    assert templated.bases() == [BASE_VOLUME, BASE_VOLUME, None]
    assert set(templated.host.volumes) == {"pool0", VOLUME}
    assert counters.read().uncached == {"spoiled": 1}


def test_a_base_that_changes_while_it_is_copied(templated: Templated) -> None:
    """Neither cached nor started from."""
    templated.on_copy = lambda: templated.base.write_bytes(b"y" * EXTENT)
    message = templated.refused_start(SourceRefused)
    assert "it changed while it was copied : try again" in message
    assert set(templated.host.volumes) == {"pool0"}


def test_a_fill_that_fails_leaves_nothing(templated: Templated) -> None:
    templated.copy_fails = CopyFailed(volume="v", path="p", problem="x")
    templated.refused_start(CopyFailed)
    assert set(templated.host.volumes) == {"pool0"}


def test_layers_that_fail_leave_the_template(templated: Templated) -> None:
    def fail() -> None:
        if templated.filled:
            raise CopyFailed(volume="v", path="p", problem="x")

    templated.on_copy = fail
    templated.refused_start(CopyFailed)
    assert VOLUME not in templated.host.volumes
    (name,) = set(templated.host.volumes) - {"pool0"}
    volume = templated.host.volumes[name]
    assert (volume.lv_permissions, volume.lv_active) == ("read-only", "")


@pytest.mark.parametrize("kind", ["SHARED", "INTERNAL"])
def test_a_kept_disk_needs_no_template(templated: Templated, kind: str) -> None:
    templated.configure("{cache: {templates: on}, retention: {on_stop: keep}}")
    templated.tell(VOLTYPE=kind)
    templated.start()
    templated.filled.clear()
    assert templated.start()["path"] == LOCAL
    assert templated.filled == []
    assert templated.verbs[1] == ["claim", "prepare"]
    assert counters.read().uncached == ({} if kind == "SHARED" else {"no_template": 1})


@pytest.mark.parametrize(
    ("domain_id", "is_alone", "leaf_size", "why"),
    [
        (DOMAIN, False, 2048, ""),
        (DOMAIN, True, 2048, "no_template"),
        ("", False, 2048, "other_layout"),
        (DOMAIN, False, 512, "smaller_layer"),
    ],
)
def test_a_base_on_block_storage_is_for_the_helper_to_judge(
    monkeypatch: pytest.MonkeyPatch, domain_id: str, is_alone: bool, leaf_size: int, why: str
) -> None:
    """Only root can read the tags of a storage domain."""
    monkeypatch.setattr(template_source, "domain_of", lambda _layer: domain_id)
    leaf = Layer("/x/leaf", "qcow2", 0, True, leaf_size, "leaf")
    base = Layer(f"/dev/{domain_id}/{BASE_VOLUME}", "raw", 0, True, 1024, "base")
    found = local_copy._base(Source((base,) if is_alone else (leaf, base)))
    assert found == (None if why else Base(BASE_VOLUME, domain_id, base.fingerprint, 1024), why)
