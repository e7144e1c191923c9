"""Bad input and bad hosts on real LVM: one line that explains what to do, exit 2, nothing made or lost."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.bed import host, libvirt, vdsm
from tests.bed.player import run_point
from tests.bed.shell import attempt, run
from tests.bed.storage import FileStorage, Image, new_id
from tests.bed.vm import Disk, Vm, disk_xml, domain_xml
from tests.kernel.privilege.attempts import Talk, is_refusal
from tests.kernel.steps import (
    CONFIG,
    MIB,
    THICK,
    THIN,
    configure,
    device,
    just_now,
    localdisk,
    refused,
    refused_disk,
    seqno,
    start,
    starting,
    status,
    stop,
)

pytestmark = pytest.mark.usefixtures("defaults")


@pytest.fixture
def image(file_storage: FileStorage) -> Image:
    return file_storage.clone(file_storage.template(8 * MIB, seed=1), seed=2)


# -- what vdsm hands over


@pytest.mark.parametrize("value", ["", "LVM", "lvm ; rm -rf /", "lvm\nlvmthin"])
def test_property_value(volume_group: str, image: Image, value: str) -> None:
    assert "set it to lvm, lvmthin, on or off" in refused_disk(image, {"localdisk": value})


@pytest.mark.parametrize(
    "data", ["", "{", "[]", "[" * 100_000, '{"device": "disk"}'], ids=["empty", "cut", "list", "deep", "keys"]
)
def test_json(volume_group: str, data: str) -> None:
    vm_id = starting(new_id())
    try:
        refused("after_disk_prepare", vm_id, data)
    finally:
        libvirt.undefine(vm_id)


@pytest.mark.parametrize(
    "data",
    ["", "<domain", '<!DOCTYPE x [<!ENTITY a "b">]><domain>&a;</domain>', "<disk/>"],
    ids=["empty", "cut", "entity", "disk"],
)
def test_xml(volume_group: str, data: str) -> None:
    refused("before_vm_start", new_id(), data)


def test_domain_of_another_vm(volume_group: str, image: Image) -> None:
    xml = domain_xml(Vm(new_id(), (Disk("vda", image),)))
    assert "is of VM" in refused("before_vm_start", new_id(), xml)


def test_domain_that_claims_a_local_disk(volume_group: str, image: Image) -> None:
    """The XML points to a local disk that is not there, or is another VM's."""
    vm_id = new_id()
    xml = domain_xml(Vm(vm_id, (vdsm.local(Disk("vda", image), str(device(image))),)))
    assert "no ready local disk" in refused("before_vm_start", vm_id, xml)
    owner = start(image)
    assert f"belongs to VM {owner}" in refused("before_vm_start", vm_id, xml)
    stop(owner, image)


@pytest.mark.parametrize("shared", ["shared", "transient"])
def test_shared_disk(volume_group: str, image: Image, shared: str) -> None:
    assert f"is {shared}" in refused_disk(image, shared=shared)


def test_hotplug(volume_group: str, image: Image) -> None:
    vm_id, data = new_id(), disk_xml(Disk("vdb", image))
    assert "cannot be plugged" in refused("before_disk_hotplug", vm_id, data)
    configure("hotplug: shared\n")
    result = run_point("before_disk_hotplug", vm_id, data, THICK)
    assert (result.rc, result.data) == (0, data), result.stderr


def test_many_errors_in_the_configuration(volume_group: str, image: Image) -> None:
    """What the engine shows is one short line, with what to do at its end."""
    configure("".join(f"wrong{number}: 1\n" for number in range(80)))
    line = refused_disk(image)
    assert line.isascii()
    assert len(line) < 1000
    assert f"{CONFIG}:1:1: wrong0: unknown key" in line
    assert " more; configuration" in line
    assert line.endswith(f" problem(s) : correct it, then run localdisk check --config {CONFIG}")


def test_other_hooks_run_where_vdsm_goes_on(volume_group: str, image: Image) -> None:
    """A stop that fails for us, with another product's hook behind ours."""
    vm_id = start(image)
    other = host.HOOKS / "after_vm_destroy/90_other"
    other.write_text("#!/bin/sh\nexit 0\n")
    other.chmod(0o755)
    try:
        configure("wrong: 1\n")
        xml = domain_xml(Vm(vm_id, (Disk("vda", image),)))
        result = run_point("after_vm_destroy", vm_id, xml, THICK)
        assert [(script.path.name, script.rc) for script in result.scripts] == [
            ("50_localdisk", 1),
            ("90_other", 0),
        ]
    finally:
        other.unlink()
        configure()
    stop(vm_id, image)


def test_unplugging(volume_group: str, image: Image) -> None:
    """A local disk is not unplugged; a disk that was plugged in with `hotplug: shared` may be."""
    vm_id = start(image)
    shared, disk = disk_xml(Disk("vdb", image)), vdsm.local(Disk("vda", image), str(device(image)))
    for text in ("", "hotplug: shared\n"):
        configure(text)
        assert "is not unplugged" in refused("before_disk_hotunplug", vm_id, disk_xml(disk))
        result = run_point("before_disk_hotunplug", vm_id, shared, THICK)
        assert (result.rc, result.data) == (0, shared), result.stderr
    assert run_point("before_disk_hotunplug", vm_id, disk_xml(disk)).rc == 0, "no VM of ours"
    stop(vm_id, image)


# -- the source


def test_source_is_missing(volume_group: str, image: Image) -> None:
    image.leaf.path.rename(image.leaf.path.with_name("away"))
    assert "No such file" in refused_disk(image)


def test_source_is_unreadable(volume_group: str, image: Image) -> None:
    image.leaf.path.chmod(0)
    assert "Permission denied" in refused_disk(image)


def test_parent_is_missing(volume_group: str, image: Image) -> None:
    image.volumes[0].path.unlink()
    assert "No such file" in refused_disk(image)


@pytest.mark.parametrize(
    "backing",
    ["/etc/shadow", "../../../../etc/shadow", 'json:{"driver":"nbd","host":"localhost"}', "nbd://localhost/"],
)
def test_backing_name_leads_out(volume_group: str, image: Image, backing: str) -> None:
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, str(image.leaf.path))
    assert "not a volume of its image" in refused_disk(image)


def test_parent_that_vdsm_did_not_name(volume_group: str, image: Image, file_storage: FileStorage) -> None:
    stranger = file_storage.share(file_storage.template(8 * MIB, seed=3).leaf, image.id)
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", stranger.id, str(image.leaf.path))
    assert "vdsm did not name" in refused_disk(image)


def test_external_data_file(volume_group: str, image: Image, file_storage: FileStorage) -> None:
    data = file_storage.directory / "data"
    options = ["-o", f"data_file={data},data_file_raw=on"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, str(image.leaf.path), "8M")
    assert "external data file" in refused_disk(image)


def test_leaf_is_no_qcow2(volume_group: str, image: Image) -> None:
    image.leaf.path.write_bytes(b"\0" * MIB)
    assert "no qcow2 image" in refused_disk(image)


# -- the host


def test_thin_pool_near_its_limit(thin_pool: str, image: Image) -> None:
    configure("margins: {thin_data: 0%}\n")
    assert "margins.thin_data" in refused_disk(image, THIN)


def test_reserve_and_margin(volume_group: str, image: Image) -> None:
    configure("margins: {reserve: 100%}\n")
    assert "lacks 8 MiB" in refused_disk(image)
    configure("margins: {disk: 16MiB}\n")
    vm_id = start(image)
    assert status()[image.leaf.id]["size"] == 24 * MIB
    stop(vm_id, image)


def test_foreign_volume_of_that_name(volume_group: str, image: Image) -> None:
    """It is not localdisk's, so no mode lists it, changes it or removes it."""
    name = f"{host.VOLUME_GROUP}/{image.leaf.id}"
    run("lvcreate", "-y", "-Wn", "-L", "8m", "-n", image.leaf.id, host.VOLUME_GROUP)
    for tags in ((), ("localdisk",), ("VM_x", "IU_y")):
        run("lvchange", "--addtag", "any", *(word for tag in tags for word in ("--addtag", tag)), name)
        assert "is not localdisk's" in refused_disk(image)
    before = seqno()
    stop(new_id(), image)
    assert localdisk("gc") == ""
    assert status() == {}
    assert seqno() == before
    host.remove(image.leaf.id)


def test_disk_of_another_vm(volume_group: str, image: Image) -> None:
    owner = start(image)
    assert f"belongs to VM {owner}" in refused_disk(image)
    before = seqno()
    stop(new_id(), image)
    assert seqno() == before, "another VM's stop leaves it alone"
    stop(owner, image)


def test_configuration(volume_group: str, image: Image) -> None:
    configure("retention: {on_stopp: keep}\ncopy: {parallel: 0}\n")
    line = refused_disk(image)
    assert "2 problem(s)" in line


# -- the helper, asked by vdsm directly


def ask(*requests: object) -> list[dict[str, object]]:
    """What the helper answers vdsm."""
    lines = "".join(
        request if isinstance(request, str) else json.dumps(request) + "\n" for request in requests
    )
    done = attempt("sudo", "-n", str(host.PROGRAM), "helper", user="vdsm", text=lines)
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def others(volume_group: str, image: Image) -> Iterator[tuple[str, Image]]:
    owner = start(image)
    yield owner, image
    stop(owner, image)


def claim(vm_id: str, image: Image, **changes: object) -> dict[str, object]:
    return {
        "verb": "claim",
        "vm": vm_id,
        "property": "lvm",
        "image": image.id,
        "volume": image.leaf.id,
        "seen": just_now(),
        **changes,
    }


PREPARE = {"verb": "prepare", "size": 8 * MIB, "fingerprint": "0" * 32, "writes": 0, "base": None}


def test_helper_refuses(others: tuple[str, Image]) -> None:
    """Nothing that vdsm can send gets at a disk that is not the VM's, or at anything else."""
    owner, image = others
    before = seqno()
    thief = new_id()
    look = {"image": image.id, "volume": image.leaf.id}
    requests = (
        claim(thief, image),
        PREPARE,
        claim(thief, image, volume=host.THIN_POOL),
        claim(thief, image, volume=image.leaf.id.upper()),
        claim(thief, image, volume="../" + image.leaf.id),
        claim(thief, image, volume=[image.leaf.id]),
        {**claim(owner, image), "image": new_id()},
        claim(owner, image, property="x"),
        claim(owner, image, vg="other"),
        {"verb": "commit"},
        {"verb": "progress", "done": 1, "total": 2},
        {"verb": "remove", "volume": image.leaf.id},
        {"verb": "look", "vm": thief, "property": "lvm", "disks": [look]},
        "no JSON\n",
        "[" * 50_000 + "\n",
        '{"verb": "claim"' + "x" * 100_000 + "\n",
    )
    answers = ask(*requests)
    assert len(answers) == len(requests)
    assert all("error" in answer for answer in answers), answers
    assert ask({"verb": "release", "vm": thief, "property": "lvm"}) == [{}], (
        "a stranger has nothing to release"
    )
    assert seqno() == before
    assert set(host.logical_volumes()) == {image.leaf.id}


def test_two_claims_before_the_room_is_taken(volume_group: str, image: Image) -> None:
    """Both have read the group while it had room for one disk; the second does not rely on that."""
    free = int(run("vgs", "--noheadings", "-o", "vg_free_count", volume_group))
    run("lvcreate", "-y", "-an", "-Zn", "-Wn", "-l", str(free - 3), "-n", "filler", volume_group)
    one, two = starting(new_id()), starting(new_id())
    with Talk() as first, Talk() as second:
        assert not is_refusal(first.ask(claim(one, image)))
        assert not is_refusal(second.ask({**claim(two, image), "image": new_id(), "volume": new_id()}))
        assert first.ask(PREPARE)["target"]
        assert "lacks 4 MiB: the disk needs 8 MiB" in second.ask(PREPARE)["error"]
        assert set(host.logical_volumes()) == {"filler", image.leaf.id}
    for vm_id in (one, two):
        libvirt.undefine(vm_id)
    host.remove("filler")


def test_nobody_else_runs_the_helper(volume_group: str) -> None:
    for user, words in (
        ("nobody", ["sudo", "-n", str(host.PROGRAM), "helper"]),
        ("vdsm", ["sudo", "-n", str(host.PROGRAM), "gc"]),
        ("vdsm", ["sudo", "-n", str(host.PROGRAM), "helper", "--config", "/tmp/x"]),
        ("vdsm", ["sudo", "-n", str(host.PROGRAM), "--config", "/tmp/x", "helper"]),
        ("vdsm", [str(host.PROGRAM), "helper"]),
        ("vdsm", [str(host.PROGRAM), "gc"]),
    ):
        done = attempt(*words, user=user)
        assert done.returncode != 0, words
        assert "Traceback" not in done.stderr
