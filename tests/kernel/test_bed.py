"""Proves that the test bed is the host that the other tests take it for.  Nothing of localdisk runs here."""

from __future__ import annotations

import json
import os
import pwd
import signal
import time
from pathlib import Path

import pytest

from tests.bed import host, libvirt, storage
from tests.bed.player import run_point, start_point
from tests.bed.shell import attempt, run
from tests.bed.storage import MIB, BlockStorage, FileStorage, Image, Volume
from tests.bed.vm import Disk, Vm, boot_sector, disk_json, domain_xml

VM_ID = "11111111-2222-3333-4444-555555555555"
VOLUME_ID = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
HOOK = """\
#!/bin/sh
echo "$0 $# $(id -u):$(id -g):$(id -G | tr " " ,) $(nice) $$ $(ps -o pgid= $$)" >&2
env | sort >"$OUTPUT"
[ -z "$_hook_json" ] || echo " $0" >>"$_hook_json"
"""


def node_owner(name: str) -> str:
    return run("stat", "-L", "-c", "%U:%G %a", f"/dev/{host.VOLUME_GROUP}/{name}").strip()


def make_volume(name: str, *options: str) -> None:
    run("lvcreate", "-y", "-Wy", "-n", name, *options, host.VOLUME_GROUP)


# -- LVM and udev


def test_thick_volumes(volume_group: str) -> None:
    assert host.logical_volumes() == {}
    make_volume(VOLUME_ID, "-L", "8m", "--addtag", "VM_x", "--addtag", "IU_y")
    assert host.logical_volumes() == {VOLUME_ID: {"VM_x", "IU_y"}}
    host.remove(VOLUME_ID)
    assert host.logical_volumes() == {}


def test_thin_volumes(thin_pool: str) -> None:
    make_volume(VOLUME_ID, "-V", "4g", "--thinpool", host.THIN_POOL)
    assert sorted(host.logical_volumes()) == sorted([VOLUME_ID, host.THIN_POOL])
    assert node_owner(VOLUME_ID) == "vdsm:qemu 660"
    host.remove(VOLUME_ID)


def test_only_volumes_named_by_a_uuid_are_vdsms(volume_group: str) -> None:
    """The owner is right as soon as lvcreate returns, not some time later."""
    names = [f"{VOLUME_ID[:-1]}{last}" for last in range(3)]
    for name in names:
        make_volume(name, "-L", "4m")
        assert node_owner(name) == "vdsm:qemu 660"
    for name in ("backup", VOLUME_ID.upper(), f"{VOLUME_ID}x"):
        make_volume(name, "-L", "4m")
        run("udevadm", "settle")
        assert node_owner(name) == "root:disk 660"
    host.remove(*host.logical_volumes())


def test_vdsm_writes_to_its_volume_past_the_page_cache(volume_group: str) -> None:
    make_volume(VOLUME_ID, "-L", "4m")
    device = f"/dev/{volume_group}/{VOLUME_ID}"
    run("dd", "if=/dev/zero", f"of={device}", "bs=1M", "count=4", "oflag=direct", user="vdsm")
    host.remove(VOLUME_ID)


def test_shared_storage_has_o_direct(file_storage: FileStorage) -> None:
    image = file_storage.template(4 * MIB)
    run("dd", f"if={image.leaf.path}", "of=/dev/null", "bs=1M", "iflag=direct", user="vdsm")


# -- users and sudo


def test_users_are_those_of_a_host() -> None:
    assert run("id", "-Gn", user="vdsm").split() == ["kvm", "qemu"]
    assert run("id", "-Gn", user="qemu").split() == ["qemu", "kvm"]
    # A number that a package's group has stays that group's: dbus-daemon runs such a program.
    helper = Path("/usr/lib/dbus-1.0/dbus-daemon-launch-helper")
    assert helper.group() == "messagebus"


@pytest.mark.parametrize(
    ("allowed", "arguments"),
    [(True, ["helper"]), (False, []), (False, ["helper", "x"]), (False, ["gc"]), (False, ["helper x"])],
)
def test_sudo_allows_exactly_the_helper(allowed: bool, arguments: list[str]) -> None:
    # -l asks whether, without running it
    asked = attempt("sudo", "-n", "-l", str(host.PROGRAM), *arguments, user="vdsm")
    assert (asked.returncode == 0) == allowed


def test_sudo_allows_no_other_program_user_or_environment() -> None:
    helper = [str(host.PROGRAM), "helper"]
    for refused in (["id"], ["-u", "qemu", *helper], ["SHIV_ROOT=/tmp", *helper], ["-E", *helper]):
        assert attempt("sudo", "-n", *refused, user="vdsm").returncode == 1, refused


# -- the player


@pytest.fixture
def hooks(tmp_path: Path) -> Path:
    """A directory of hook points, with one script in after_disk_prepare and another way to it."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    point = tmp_path / "after_disk_prepare"
    point.mkdir()
    script(tmp_path / "program", HOOK)
    (point / "50_link").symlink_to(tmp_path / "program")
    script(point / "10_first", HOOK)
    (point / "20_not_executable").write_text(HOOK)
    (point / "30_directory").mkdir()
    return tmp_path


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_a_hook_runs_as_vdsm_runs_it(hooks: Path) -> None:
    output = hooks / "output"
    output.touch()
    output.chmod(0o666)
    custom = {"localdisk": "lvm", "OUTPUT": str(output)}
    result = run_point("after_disk_prepare", VM_ID, "data", custom, hooks)

    first, second = result.scripts
    assert (result.rc, result.refused) == (0, False)
    assert [s.path.name for s in result.scripts] == ["10_first", "50_link"]
    assert result.data == f"data {first.path}\n {second.path}\n"
    path, arguments, user, nice, pid, group = second.stderr.split()
    assert (path, arguments, nice, pid) == (str(second.path), "0", "-20", group)
    who = pwd.getpwnam("vdsm")
    assert user.startswith(f"{who.pw_uid}:{who.pw_gid}:")
    environment = dict(line.split("=", 1) for line in output.read_text().splitlines())
    assert environment["vmId"] == VM_ID
    assert environment["localdisk"] == "lvm"
    assert environment["PYTHONPATH"].startswith(":")
    assert "_hook_domxml" not in environment
    assert not Path(environment["_hook_json"]).exists()


@pytest.mark.parametrize(
    ("code", "ran", "refused"), [(0, 2, False), (1, 2, True), (2, 1, True), (3, 2, True)]
)
def test_exit_codes(hooks: Path, code: int, ran: int, refused: bool) -> None:
    script(hooks / "after_disk_prepare/10_first", f"#!/bin/sh\necho said >&2; exit {code}\n")
    script(hooks / "program", "#!/bin/sh\nexit 0\n")
    result = run_point("after_disk_prepare", VM_ID, "data", {}, hooks)
    assert (len(result.scripts), result.refused, result.rc) == (ran, refused, code)
    assert result.stderr == ("said\n" if code else "")


def test_a_hook_that_a_signal_ends_is_named_as_that(hooks: Path) -> None:
    """As where the processor lacks an instruction of a compiled module: it has no last words."""
    script(hooks / "program", "#!/bin/sh\nkill -ILL $$\n")
    result = run_point("after_disk_prepare", VM_ID, "data", {}, hooks)
    assert result.refused
    assert result.reason == f"{hooks}/after_disk_prepare/50_link: killed by SIGILL"


def test_a_point_that_does_not_raise_never_refuses(hooks: Path) -> None:
    (hooks / "after_vm_destroy").mkdir()
    script(hooks / "after_vm_destroy/50_x", "#!/bin/sh\nexit 2\n")
    result = run_point("after_vm_destroy", VM_ID, "<domain/>", {}, hooks)
    assert (result.rc, result.refused, result.data) == (2, False, "<domain/>")


def test_before_vdsm_start_is_root_without_data(hooks: Path) -> None:
    (hooks / "before_vdsm_start").mkdir()
    script(hooks / "before_vdsm_start/50_x", '#!/bin/sh\necho "$(id -u)$_hook_json$_hook_domxml$vmId"\n')
    result = run_point("before_vdsm_start", hooks=hooks)
    assert result.scripts[0].stdout == "0\n"


def test_killing_a_hook_kills_its_children(hooks: Path) -> None:
    script(hooks / "after_disk_prepare/10_first", "#!/bin/sh\nsleep 1000 & sleep 1000\n")
    script(hooks / "program", "#!/bin/sh\nexit 0\n")
    call = start_point("after_disk_prepare", VM_ID, "data", {}, hooks)
    while len(host.processes_of("vdsm")) < 3:
        time.sleep(0.1)
    call.kill()
    result = call.wait(timeout=60)
    assert (result.rc, result.refused, result.data) == (-signal.SIGKILL, True, "data")
    assert host.processes_of("vdsm") == {}


# -- shared storage


def check_image(image: Image, template: Image) -> None:
    """What a clone must be, wherever it is stored."""
    assert image.volumes[0].id == template.leaf.id
    for path in (image.leaf.path, storage_link(image, image.leaf)):
        info = json.loads(run("qemu-img", "info", "--output=json", str(path), user="vdsm"))
        assert info["backing-filename"] == image.volumes[-2].id
    digests = {storage.guest_bytes(volume) for volume in image.volumes}
    assert len(digests) == len(image.volumes)


def storage_link(image: Image, volume: Volume) -> Path:
    return host.RUN_STORAGE / image.domain_id / image.id / volume.id


def test_file_storage(file_storage: FileStorage) -> None:
    template = file_storage.template(16 * MIB, seed=1)
    image = file_storage.clone(template, layers=2, seed=2)
    check_image(image, template)
    assert os.path.samefile(image.volumes[0].path, template.leaf.path)
    assert image.leaf.path.owner() == "vdsm"


def test_block_storage(block_storage: BlockStorage) -> None:
    template = block_storage.template(16 * MIB, seed=1)
    image = block_storage.clone(template, layers=1, seed=2)
    check_image(image, template)
    assert image.leaf.path.resolve().is_block_device()


# -- libvirt


@pytest.mark.usefixtures("libvirt")
def test_a_vm_boots_from_a_local_volume_which_is_then_in_use(
    volume_group: str, file_storage: FileStorage
) -> None:
    image = file_storage.template(8 * MIB, boot=boot_sector("hello from the local volume"))
    make_volume(image.leaf.id, "-L", "8m")
    device = Path(f"/dev/{volume_group}/{image.leaf.id}")
    run("dd", f"if={image.leaf.path}", f"of={device}", "bs=1M", "oflag=direct", user="vdsm")
    vm = Vm(VM_ID, (Disk("vda", local_image(image, device), boot_order=1),), Path("/run/bed-serial"))

    libvirt.create(domain_xml(vm))
    assert libvirt.serial_line(Path("/run/bed-serial")) == "hello from the local volume"
    assert libvirt.known() == {VM_ID}
    refused = attempt("lvremove", "-f", f"{volume_group}/{image.leaf.id}")
    assert refused.returncode == 5
    assert "in use" in refused.stderr

    libvirt.destroy(VM_ID)
    assert libvirt.known() == frozenset()
    host.remove(image.leaf.id)


def local_image(image: Image, device: Path) -> Image:
    """The image with its one volume on `device`."""
    leaf = Volume(image.leaf.id, device, storage.RAW, image.leaf.size, image.leaf.lease_path, 0)
    return Image(image.id, image.domain_id, image.pool_id, "block", (leaf,))


@pytest.mark.usefixtures("libvirt")
def test_a_placeholder_domain_is_known(file_storage: FileStorage) -> None:
    libvirt.define_placeholder(VM_ID)
    assert libvirt.known() == {VM_ID}
    libvirt.undefine(VM_ID)
    assert libvirt.known() == frozenset()


def test_disk_json_names_every_volume(file_storage: FileStorage) -> None:
    image = file_storage.clone(file_storage.template(4 * MIB))
    disk = json.loads(disk_json(Disk("vda", image), shared="none"))
    assert [entry["volumeID"] for entry in disk["volumeChain"]] == [v.id for v in image.volumes]
    assert (disk["volumeID"], disk["format"], disk["shared"]) == (image.leaf.id, "cow", "none")
