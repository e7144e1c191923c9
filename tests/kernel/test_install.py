"""`install` and `uninstall` on a real host: it is installed, hides what guests write, and is removed."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import threading
import time
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bed import host
from tests.bed.shell import attempt, run
from tests.bed.storage import FileStorage, Image, new_id
from tests.kernel.steps import (
    CONFIG,
    LOCKS,
    MIB,
    THICK,
    THIN,
    configure,
    device,
    equals_source,
    hold_open,
    localdisk,
    start,
    stop,
    syslog,
    tags,
    wait_for,
)

NEW = Path("/run/localdisk-new")  # a copy that somebody brought
RULES_DIRECTORY = Path("/etc/udev/rules.d")
WRITTEN = (host.PROGRAM, CONFIG, host.SUDOERS, host.CRON, *host.RULES, *host.hook_links())
RIGHT = "all of localdisk is in its place, nothing was changed\n"
GUESTS = "bed-guest"  # a volume group inside of a guest's disk

pytestmark = pytest.mark.usefixtures("libvirt")


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    """The tests begin and end with an installed host."""
    shutil.copy(host.PROGRAM, NEW)
    configure()
    yield
    run(str(NEW), "install")
    NEW.unlink()


def listing() -> dict[str, tuple[object, ...]]:
    """All that may show a change of what is installed: times, owners, modes, sizes."""
    tops = (host.PROGRAM, host.HOOKS, host.TREES, Path("/etc"))
    paths = [path for top in tops for path in (top, *sorted(top.rglob("*")))]
    # LVM keeps backups, trees have a lock.
    found = {str(path): path.lstat() for path in paths if "/lvm" not in str(path) and path.name != ".lock"}
    return {
        path: (at.st_ino, at.st_mtime_ns, at.st_ctime_ns, at.st_mode, at.st_uid, at.st_gid, at.st_size)
        for path, at in found.items()
    }


def another_build(path: Path) -> Path:
    """The same program under another build's id, as a newer one would be."""
    with zipfile.ZipFile(NEW) as old, open(path, "wb") as file:
        file.write(b"#!/usr/bin/python3 -IS\n")
        with zipfile.ZipFile(file, "w") as new:
            for info in old.infolist():
                data = old.read(info)
                if info.filename == "bootstrap.py":
                    before, name, rest = data.partition(b'\nBUILD_ID = "')
                    data = before + name + b"0" * 16 + rest[16:]
                new.writestr(info, data, info.compress_type)
    path.chmod(0o755)
    return path


# -- install


def test_from_one_copied_file(volume_group: str, file_storage: FileStorage) -> None:
    run(str(NEW), "uninstall")
    run(str(NEW), "uninstall")
    CONFIG.unlink()
    assert [path for path in WRITTEN if os.path.lexists(path)] == []
    assert not host.TREES.exists()
    assert not LOCKS.exists()
    before = listing_of_etc()
    would = run(str(NEW), "install", "--dry-run").splitlines()
    assert listing_of_etc() == before
    assert not host.PROGRAM.exists()
    did = run(str(NEW), "install").splitlines()
    assert len(did) == len(would)
    assert "ran udevadm control --reload" in did
    assert localdisk("check") == f"{CONFIG}: good\nthis host: good\n"
    for path in WRITTEN:
        assert (path.lstat().st_uid, path.lstat().st_gid) == (0, 0)
    assert stat.S_IMODE(host.SUDOERS.stat().st_mode) == 0o440
    image = file_storage.template(8 * MIB, seed=81)
    vm_id = start(image)
    assert equals_source(image)
    stop(vm_id, image)
    assert before == {path: at for path, at in listing_of_etc().items() if path in before}


def listing_of_etc() -> dict[str, tuple[int, int]]:
    files = [path for path in Path("/etc").rglob("*") if not path.is_dir() and "/lvm" not in str(path)]
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in files}


def test_again_changes_nothing() -> None:
    before = listing()
    assert run(str(NEW), "install") == RIGHT
    assert localdisk("install") == RIGHT
    assert localdisk("install", "--dry-run") == RIGHT
    assert listing() == before


def test_for_an_image(tmp_path: Path) -> None:
    before = listing()
    run(str(NEW), "install", "--root", str(tmp_path))
    for path in WRITTEN:
        copy = tmp_path / str(path).lstrip("/")
        if path.is_symlink():
            assert os.readlink(copy) == os.readlink(path)
        elif path not in (CONFIG, host.CRON):  # metrics are collected here
            assert copy.read_bytes() == path.read_bytes()
        assert copy.lstat().st_mode == path.lstat().st_mode
    assert "nothing was changed" in run(str(NEW), "install", "--root", str(tmp_path))
    run(str(NEW), "uninstall", "--root", str(tmp_path))
    left = [path for path in tmp_path.rglob("*") if not path.is_dir()]
    assert left == [tmp_path / "etc/localdisk.yaml"]
    assert listing() == before


def test_refusals() -> None:
    for mode in ("install", "uninstall"):
        done = attempt(str(NEW), mode, user="vdsm")
        assert (done.returncode, done.stderr) == (2, f"localdisk: {mode} needs root : run it with sudo\n")
        for root in ("/", "/nonexistent", "", str(host.SUDOERS)):
            done = attempt(str(NEW), mode, "--root", root)
            assert (done.returncode, done.stdout) == (2, "")
            assert done.stderr.count("\n") == 1


def test_killed_and_two_at_once() -> None:
    run(str(NEW), "uninstall")
    for delay in (0.2, 0.8, 1.6, 2.4):
        process = subprocess.Popen([NEW, "install"], stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    both = [subprocess.Popen([NEW, "install"], stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert run(str(NEW), "install") == RIGHT
    assert list(Path("/etc").rglob(".*localdisk*")) == []
    assert localdisk("check").endswith("this host: good\n")


def test_vms_start_while_it_is_updated(volume_group: str, file_storage: FileStorage) -> None:
    other = another_build(Path("/run/localdisk-other"))
    images = [file_storage.template(4 * MIB, seed=82 + number) for number in range(3)]
    failures: list[str] = []
    ended = threading.Event()

    def update() -> None:
        while not ended.is_set():
            for program in (other, NEW):
                done = attempt(str(program), "install")
                if done.returncode or not done.stdout.startswith(f"wrote {host.PROGRAM} (mode 0755)\n"):
                    failures.append(f"{done}")

    updater = threading.Thread(target=update)
    updater.start()
    try:
        for image in images:
            vm_id = start(image)
            assert equals_source(image)
            stop(vm_id, image)
    finally:
        ended.set()
        updater.join()
    assert failures == []
    # What the other build extracted goes with the first install after it.
    assert len([path for path in host.TREES.iterdir() if not path.name.startswith(".")]) <= 2
    run(str(NEW), "install")
    assert len([path for path in host.TREES.iterdir() if not path.name.startswith(".")]) == 1
    other.unlink()


@pytest.mark.usefixtures("throwaway")
def test_var_is_mounted_noexec(volume_group: str, file_storage: FileStorage) -> None:
    """As hardening guides want it: every hook point works, from packages that are beside the program."""
    beside = Path(f"{host.PROGRAM}.extracted")
    image = file_storage.template(4 * MIB, seed=90)
    run("mount", "-t", "tmpfs", "-o", "mode=755,noexec", "noexec", str(host.TREES.parent))
    try:
        vm_id = start(image)
        assert equals_source(image)
        stop(vm_id, image)
        assert not host.logical_volumes()
        assert localdisk("check") == f"{CONFIG}: good\nthis host: good\n"
        assert [path.name for path in beside.iterdir() if not path.name.startswith(".")]
        assert not host.TREES.exists()
        localdisk("uninstall")
        assert not beside.exists()
    finally:
        run("umount", str(host.TREES.parent))
    run(str(NEW), "install")


def test_the_older_hook() -> None:
    older = host.HOOKS / "after_disk_prepare/localdisk"
    older.write_text("#!/bin/sh\nexit 1\n")
    older.chmod(0o755)
    sudoers = Path("/etc/sudoers.d/50_vdsm_hook_localdisk")
    sudoers.write_text("vdsm ALL=(ALL) NOPASSWD: /usr/libexec/vdsm/localdisk-helper\n")
    allowed = attempt("sudo", "-n", "-l", "/usr/libexec/vdsm/localdisk-helper", user="vdsm")
    aside = Path("/usr/libexec/vdsm/hooks.aside/after_disk_prepare/localdisk")
    out = localdisk("install")
    assert out == (
        f"moved {sudoers} to {sudoers}.aside, it is the older localdisk hook's\n"
        f"made directory {aside.parent.parent}\nmade directory {aside.parent}\n"
        f"moved {older} to {aside}, two hooks for local disks would copy twice\n"
    )
    refused = attempt("sudo", "-n", "-l", "/usr/libexec/vdsm/localdisk-helper", user="vdsm")
    assert refused.returncode
    del allowed  # sudo -l wants the command to be there
    assert localdisk("check").endswith("this host: good\n")
    run(str(NEW), "uninstall")
    assert (older.read_text(), sudoers.exists()) == ("#!/bin/sh\nexit 1\n", True)
    assert not aside.parent.parent.exists()
    older.unlink()
    sudoers.unlink()


def test_an_update_of_vdsms_package_brings_its_hook_back() -> None:
    """`check` lists all four files, gc reports them to cron, and install moves them aside again."""
    texts = {
        host.HOOKS / "after_disk_prepare/localdisk": "#!/bin/sh\n",
        host.HOOKS / "before_vm_migrate_source/localdisk": "#!/bin/sh\n",
        Path(
            "/etc/sudoers.d/50_vdsm_hook_localdisk"
        ): "vdsm ALL=(ALL) NOPASSWD: /usr/libexec/vdsm/localdisk-helper\n",
        Path("/usr/lib/udev/rules.d/12-vdsm-localdisk.rules"): "# rules\n",
    }
    for path, text in texts.items():
        path.write_text(text)
        path.chmod(0o755 if host.HOOKS in path.parents else 0o440)
    named = localdisk("check", code=1)
    assert [path for path in texts if f"{path} " not in named] == []
    collected = attempt(str(host.PROGRAM), "gc")
    assert collected.returncode == 1
    assert [path for path in texts if str(path) not in collected.stderr] == []
    localdisk("install")
    assert [path for path in texts if path.exists()] == []
    assert localdisk("check").endswith("this host: good\n")
    assert attempt(str(host.PROGRAM), "gc").stderr == ""
    for path in texts:
        path.with_name(f"{path.name}.aside").unlink(missing_ok=True)
    shutil.rmtree("/usr/libexec/vdsm/hooks.aside")


# -- sudo


def test_the_helper_is_logged_whatever_vdsm_says() -> None:
    """vdsm's own sudoers file silences sudo for all that vdsm runs."""
    silent = Path("/etc/sudoers.d/50_vdsm")
    silent.write_text(
        "Defaults:vdsm !requiretty\nDefaults:vdsm !syslog\nvdsm ALL=(root) NOPASSWD: /bin/true\n"
    )
    silent.chmod(0o440)
    with syslog() as lines:
        assert not attempt("sudo", "-n", "/bin/true", user="vdsm").returncode
        assert not attempt("sudo", "-n", str(host.PROGRAM), "helper", user="vdsm").returncode
        wait_for(lambda: any("COMMAND=" in line for line in lines), "sudo's line", 20)
    silent.unlink()
    (line,) = (line for line in lines if "COMMAND=" in line)
    assert f"COMMAND={host.PROGRAM} helper" in line


# -- udev


def with_file_system(storage: FileStorage) -> tuple[Image, set[str]]:
    """An image with a file system, and the names below /dev/disk that it would have."""
    image = storage.template(8 * MIB)
    file_system = str(uuid.uuid4())
    run("mkfs.ext4", "-q", "-F", "-U", file_system, "-L", "bed-label", str(image.leaf.path))
    return image, {f"/dev/disk/by-uuid/{file_system}", "/dev/disk/by-label/bed-label"}


def with_volume_group(storage: FileStorage) -> tuple[Image, set[str]]:
    """An image that is a PV with a volume group, and the name below /dev/disk that it would have."""
    image = storage.template(16 * MIB)
    loop = run("losetup", "--find", "--show", str(image.leaf.path)).strip()
    run("vgcreate", "-y", "-s", "1m", GUESTS, loop)
    run("lvcreate", "-y", "-l", "4", "-n", "root", GUESTS)
    pv = run("pvs", "--noheadings", "-o", "pv_uuid", loop).strip()
    run("vgchange", "-an", GUESTS)
    run("udevadm", "settle")
    run("losetup", "--detach", loop)
    wait_for(lambda: attempt("vgs", GUESTS).returncode, "the guest's group to go")
    return image, {f"/dev/disk/by-id/lvm-pv-uuid-{pv}"}


def seen(image: Image) -> set[str]:
    """What this host has made of what is in a local disk: links to it below /dev/disk, udev's findings."""
    run("udevadm", "settle")
    node = device(image).resolve()
    links = {str(path) for path in Path("/dev/disk").glob("*/*") if path.resolve() == node}
    properties = run("udevadm", "info", "--query=property", f"--name={node}").splitlines()
    return links | {line for line in properties if line.startswith(("ID_FS_", "ID_PART_"))}


def hidden(image: Image) -> None:
    """Nothing of it is seen or held, and its node is vdsm's."""
    assert seen(image) == set()
    status = device(image).stat()
    assert (Path(device(image)).owner(), Path(device(image)).group()) == ("vdsm", "qemu")
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert GUESTS not in run("vgs", "--noheadings", "-o", "vg_name")
    assert not attempt("dmsetup", "info", f"{GUESTS.replace('-', '--')}-root").stdout
    full = f"{host.VOLUME_GROUP}/{image.leaf.id}"
    assert run("lvs", "--noheadings", "-o", "lv_device_open", full).strip() == ""
    holders = Path("/sys/class/block", device(image).resolve().name, "holders")
    assert list(holders.iterdir()) == []


def stays_hidden(image: Image) -> None:
    """At its first start, after events of any kind, when it was written to, and after it was inactive."""
    full = f"{host.VOLUME_GROUP}/{image.leaf.id}"
    name = device(image).resolve().name
    hidden(image)
    for action in ("change", "add"):
        run("udevadm", "trigger", "--settle", f"--action={action}", f"/sys/class/block/{name}")
        hidden(image)
    with open(device(image), "r+b") as node:  # as a VM does; closed, it must not be looked at
        node.write(node.read(MIB))
    hidden(image)
    run("lvchange", "-an", full)
    run("lvchange", "-ay", "-K", full)
    hidden(image)
    run("lvchange", "--refresh", full)
    hidden(image)


@pytest.mark.parametrize("custom", [THICK, THIN], ids=["thick", "thin"])
def test_what_a_guest_writes_is_not_seen(
    thin_pool: str, file_storage: FileStorage, custom: dict[str, str]
) -> None:
    for image, _ in (with_file_system(file_storage), with_volume_group(file_storage)):
        vm_id = start(image, custom)
        stays_hidden(image)
        stop(vm_id, image, custom=custom)  # nothing has it open


@pytest.fixture
def lvm_looks_into_volumes() -> Iterator[None]:
    """As LVM's rules did in Debian 12; in Debian 13 they ask for this before they look into an LV."""
    rule = Path("/etc/udev/rules.d/00-bed-pvscan.rules")
    rule.write_text('ENV{LVM_PVSCAN_ON_LVS}="1"\n')
    run("udevadm", "control", "--reload")
    yield
    rule.unlink()
    run("udevadm", "control", "--reload")


@pytest.mark.usefixtures("lvm_looks_into_volumes")
def test_without_the_rules_it_is_seen(volume_group: str, file_storage: FileStorage) -> None:
    """So the rules are what hides it; when they come, it disappears."""
    images = [with_file_system(file_storage), with_volume_group(file_storage)]
    vm_ids = [start(image) for image, _ in images]
    for rule in host.RULES:
        rule.unlink()
    run("udevadm", "control", "--reload")
    for image, names in images:
        run("lvchange", "-an", f"{host.VOLUME_GROUP}/{image.leaf.id}")
        run("lvchange", "-ay", "-K", f"{host.VOLUME_GROUP}/{image.leaf.id}")
        assert names <= seen(image)
        assert any(line.startswith("ID_FS_TYPE=") for line in seen(image))
    out = localdisk("install")
    assert "ran udevadm trigger --settle --action=change --sysname-match=dm-*\n" in out
    for image, names in images:
        hidden(image)
        assert not [name for name in names if os.path.lexists(name)]
    for (image, _), vm_id in zip(images, vm_ids):
        stop(vm_id, image)


ORDER_ON_EL = {
    "55-dm.rules": "10-dm.rules",
    "56-lvm.rules": "11-dm-lvm.rules",
    "60-persistent-storage-dm.rules": "13-dm-disk.rules",
    "69-lvm.rules": "69-dm-lvm.rules",
}


def test_the_rules_in_els_order(volume_group: str, file_storage: FileStorage) -> None:
    """LVM's rules under the numbers that EL's packages give them: the one numbered 12 is what hides."""
    if not host.throwaway():
        pytest.skip("this machine's rules are left alone")
    made = []
    for debian, el in ORDER_ON_EL.items():
        shutil.copy(Path("/usr/lib/udev/rules.d", debian), RULES_DIRECTORY / el)
        (RULES_DIRECTORY / debian).symlink_to("/dev/null")
        made += [RULES_DIRECTORY / el, RULES_DIRECTORY / debian]
    try:
        run("udevadm", "control", "--reload")
        for image, _ in (with_file_system(file_storage), with_volume_group(file_storage)):
            vm_id = start(image)
            stays_hidden(image)
            stop(vm_id, image)
        host.RULES[0].unlink()
        run("udevadm", "control", "--reload")
        image, names = with_file_system(file_storage)
        vm_id = start(image)
        run("lvchange", "-an", f"{host.VOLUME_GROUP}/{image.leaf.id}")
        run("lvchange", "-ay", "-K", f"{host.VOLUME_GROUP}/{image.leaf.id}")
        assert names <= seen(image), "58 comes too late there"
        stop(vm_id, image)
    finally:
        for path in made:
            path.unlink()
        run("udevadm", "control", "--reload")


def test_other_volumes_of_the_group_are_left_alone(volume_group: str) -> None:
    """An administrator's LV still belongs to root, and its content is still found."""
    other = "somebodys-own"
    run("lvcreate", "-y", "-Wn", "-L", "8m", "-n", other, host.VOLUME_GROUP)
    node = Path("/dev", host.VOLUME_GROUP, other)
    run("mkfs.ext4", "-q", "-F", "-U", (name := str(uuid.uuid4())), str(node))
    run("udevadm", "trigger", "--settle", f"/sys/class/block/{node.resolve().name}")
    assert Path("/dev/disk/by-uuid", name).resolve() == node.resolve()
    assert node.owner() == "root"
    host.remove(other)


# -- uninstall


def test_uninstall_refuses_while_work_is_unfinished(volume_group: str, file_storage: FileStorage) -> None:
    image = file_storage.template(8 * MIB, seed=88)
    vm_id = start(image)
    before = listing()

    def refusal() -> str:
        done = attempt(str(host.PROGRAM), "uninstall")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert listing() == before
        return done.stderr

    name = f"{host.VOLUME_GROUP}/{image.leaf.id}"
    vm = hold_open(device(image))
    assert f"localdisk: uninstall is refused, local disk {name} is in use by VM {vm_id} : " in refusal()
    vm.kill()
    vm.wait()
    run("lvchange", "--addtag", "UPDATING", name)
    assert f"{name} is unfinished : " in refusal()
    run("lvchange", "--deltag", "UPDATING", name)
    LOCKS.mkdir(exist_ok=True)
    lock = subprocess.Popen(
        ["flock", str(LOCKS / f"{new_id()}.lock"), "sleep", "3600"], start_new_session=True
    )
    wait_for(lambda: list(LOCKS.glob("*.lock")), "the lock")
    time.sleep(0.5)
    assert ".lock is held : " in refusal()
    os.killpg(lock.pid, signal.SIGTERM)
    lock.wait()

    state = tags(image)
    out = run(str(host.PROGRAM), "uninstall")
    group = host.VOLUME_GROUP
    assert out.endswith(f"left {CONFIG}\nleft 1 local disk(s) in volume group {group}: see lvs {group}\n")
    assert [path for path in WRITTEN if os.path.lexists(path)] == [CONFIG]
    assert not LOCKS.exists()
    assert not host.TREES.exists()
    assert tags(image) == state
    assert equals_source(image)
    run(str(NEW), "install")
    stop(vm_id, image)


def test_uninstall_by_force(volume_group: str, file_storage: FileStorage) -> None:
    image = file_storage.template(8 * MIB, seed=89)
    vm_id = start(image)
    vm = hold_open(device(image))
    run(str(host.PROGRAM), "uninstall", "--force")
    assert [path for path in WRITTEN if os.path.lexists(path)] == [CONFIG]
    vm.kill()
    vm.wait()
    run(str(NEW), "install")
    stop(vm_id, image)
