"""`check` on a real host: each problem is made, check names it and nothing else, and the command that it
prints, run as it stands, makes the host good again.

Where the fix is no command that can be run here, the test that does something in its place says so.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.bed import host, libvirt
from tests.bed.failing import FailingDevice, failing_device
from tests.bed.player import run_point
from tests.bed.shell import attempt, run
from tests.bed.storage import FileStorage, new_id
from tests.bed.vm import Disk, Vm, disk_json, domain_xml
from tests.kernel.steps import (
    CONFIG,
    LOCKS,
    MIB,
    THICK,
    THIN,
    configure,
    helpers,
    localdisk,
    one_line,
    seqno,
    stop,
    wait_for,
)

NAME = "bed-check"  # a volume group of these tests' own
POINT = host.HOOKS / "after_disk_prepare"
LVM_LOCAL = Path("/etc/lvm/lvmlocal.conf")
DEVICES_FILE = Path("/etc/lvm/devices/system.devices")
GOOD = f"{CONFIG}: good\nthis host: good\n"

pytestmark = pytest.mark.usefixtures("volume_group", "libvirt")

Problem = dict[str, Any]


def problems() -> list[Problem]:
    """What check counts as problems; there are some."""
    found = json.loads(localdisk("check", "--json", code=1))["problems"]
    return [row for row in found if not row["hint"]]


def named(*whats: str) -> list[str]:
    """Check names exactly these problems; returns their fixes, in check's order."""
    found = problems()
    for what in whats:
        assert sum(what in row["what"] for row in found) == 1, (what, found)
    assert len(found) == len(whats), found
    return [row["fix"] for row in found]


def paste(fix: str) -> None:
    run("sh", "-c", fix)


def fixed(*whats: str, **replaced: str) -> None:
    """`check` prints exactly these problems; after their fixes were pasted, it prints none.

    `replaced`: words in capital letters, which stand for what only the administrator knows.
    """
    for fix in named(*whats):
        for word, value in replaced.items():
            fix = fix.replace(word, value)
        paste(fix)
    good()


def good() -> None:
    assert localdisk("check") == GOOD


@pytest.fixture(autouse=True)
def configuration() -> Iterator[None]:
    configure()
    yield
    CONFIG.unlink(missing_ok=True)


# -- a good host


def test_a_well_made_host() -> None:
    good()
    found = json.loads(localdisk("check", "--json"))
    assert found == {"configuration": str(CONFIG), "problems": []}
    CONFIG.unlink()
    good_here = f"{CONFIG}: does not exist, the built-in defaults apply\nthis host: good\n"
    assert localdisk("check") == good_here
    as_vdsm = attempt(str(host.PROGRAM), "check", user="vdsm")
    hint = "hint: volume groups, thin pools, local disks and the sudo rule were not checked, only root sees"
    assert (as_vdsm.returncode, as_vdsm.stderr) == (0, "")
    assert as_vdsm.stdout.replace("this host: good\n", "").splitlines()[1].startswith(hint)


def test_what_is_printed_is_the_same_as_text() -> None:
    host.CRON.unlink()
    (row,) = problems()
    assert localdisk("check", code=1) == f"{CONFIG}: good\n{row['what']}, {row['why']} : {row['fix']}\n"
    paste(row["fix"])
    good()


# -- the configuration: its fixes are edits


def test_parts_that_do_nothing() -> None:
    same, off, strange = new_id(), new_id(), new_id()
    libvirt.define_placeholder(same)
    libvirt.define_placeholder(off)
    configure(
        "retention: {keep_for: 1d}\n"
        "vms:\n"
        f"  {same}: {{retention: {{keep_for: 24h}}}}\n"
        f"  {off}: {{enabled: off, disks: [{new_id()}]}}\n"
        f"  {strange}: {{enabled: off}}\n"
    )
    fixes = named(
        f"{CONFIG}:3:3: vms.{same} changes nothing",
        f"{CONFIG}:4:56: vms.{off}.disks changes nothing",
    )
    assert fixes == ["remove the section", "remove disks or enabled there"]
    configure(f"vms:\n  {off}: {{enabled: off}}\n  {strange}: {{enabled: off}}\n")
    hint, *rest = localdisk("check").splitlines()
    assert hint.startswith(f"hint: {CONFIG}:3:3: neither libvirt nor a local disk knows VM {strange}, ")
    assert "\n".join([*rest, ""]) == GOOD
    libvirt.undefine(same)
    libvirt.undefine(off)


def test_a_refused_configuration() -> None:
    configure("copy: {paralel: 2}\n")
    done = attempt(str(host.PROGRAM), "check")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{CONFIG}:1:8: copy.paralel: unknown key")


# -- what is installed


def test_nothing_installed() -> None:
    for path in (*host.RULES, host.CRON, host.SUDOERS, *host.hook_links()):
        path.unlink()
    run("udevadm", "control", "--reload")
    fixed(
        "vdsm cannot run",
        "no hook at",
        f"there is no {host.CRON}",
        *(f"there is no {rule}" for rule in host.RULES),
    )
    assert all(link.resolve() == host.PROGRAM for link in host.hook_links())
    volume = local_disk()  # its node is vdsm's again
    good()
    host.remove(volume)


def test_installed_wrongly() -> None:
    host.CRON.chmod(0o666)
    host.SUDOERS.write_text("vdsm ALL=(root) NOPASSWD: /usr/libexec/other helper\n")
    host.RULE.write_text(host.RULE.read_text().replace(host.VOLUME_GROUP, "other"))
    (POINT / "50_localdisk").unlink()
    (POINT / "50_localdisk").symlink_to("/usr/libexec/nothing")
    shutil.copy(host.PROGRAM, POINT / "localdisk")
    (POINT / "60_localdisk").symlink_to(host.PROGRAM)
    (host.HOOKS / "before_vm_migrate_source/localdisk").write_text("#!/bin/sh\n")
    (host.HOOKS / "before_vm_migrate_source/localdisk").chmod(0o755)
    (host.HOOKS / "after_vm_start/50_localdisk").symlink_to(host.PROGRAM)
    (host.HOOKS / "before_vdsm_start/90_again").symlink_to(host.PROGRAM)
    LOCKS.mkdir(exist_ok=True)
    LOCKS.chmod(0o777)
    fixes = named(
        f"{host.SUDOERS} is not the rule that localdisk needs",
        f"{POINT}/localdisk is another hook",
        "before_vm_migrate_source/localdisk is another hook",
        "after_vm_start/50_localdisk leads to",
        "before_vdsm_start/90_again does the work of",
        "cron ignores",
        f"{host.RULE} does not name volume group {host.VOLUME_GROUP}",
        f"{LOCKS} (user 0, mode 0777) is not root's alone",
    )
    for fix in fixes:
        paste(fix)
    good()
    (POINT / "50_localdisk").rename(POINT / "60_localdisk")
    good()  # it serves as well
    localdisk("install")
    assert [path.name for path in POINT.iterdir()] == ["50_localdisk"]
    shutil.rmtree("/usr/libexec/vdsm/hooks.aside")


def test_rules_that_say_something_else() -> None:
    host.SUDOERS.write_text(f"vdsm ALL=(root) NOPASSWD: {host.PROGRAM}\n")
    host.CRON.write_text("*/10 * * * * root /usr/libexec/other gc\n# */10 * * * * root localdisk gc\n")
    shutil.rmtree(LOCKS, ignore_errors=True)
    LOCKS.touch()
    fixed(
        f"{host.SUDOERS} is not the rule that localdisk needs",
        f"{host.CRON} does not run",
        f"{LOCKS} is not a directory",
    )


def test_a_program_that_others_can_write() -> None:
    """Root does not run it at all; `check` run by another user reports it."""
    shutil.chown(host.PROGRAM, "vdsm")
    host.PROGRAM.parent.chmod(0o777)
    try:
        by_root = attempt(str(host.PROGRAM), "check")
        assert (by_root.returncode, by_root.stderr.count("\n")) == (2, 1)
        rows = json.loads(attempt(str(host.PROGRAM), "check", "--json", user="vdsm").stdout)["problems"]
        found = {row["what"]: row["fix"] for row in rows if "can be written by others" in row["what"]}
        assert [what.partition(" (user ")[0] for what in found] == [
            str(host.PROGRAM),
            str(host.PROGRAM.parent),
        ]
        for fix in found.values():
            paste(fix)
        good()
    finally:
        host.PROGRAM.parent.chmod(0o755)
        shutil.chown(host.PROGRAM, "root")
    host.PROGRAM.chmod(0o700)
    fixed(f"{host.PROGRAM} (user 0, mode 0700) is closed to other users")


def test_a_program_outside_of_the_system() -> None:
    elsewhere = Path("/tmp/localdisk")
    shutil.copy(host.PROGRAM, elsewhere)
    done = attempt(str(elsewhere), "check", "--json")
    assert done.returncode == 1
    fix = next(
        row["fix"]
        for row in json.loads(done.stdout)["problems"]
        if "others than root can write" in row["what"]
    )
    elsewhere_fixed = attempt("sh", "-c", fix)
    assert elsewhere_fixed.returncode == 0
    assert elsewhere_fixed.stdout.endswith(GOOD)
    elsewhere.unlink()


@pytest.mark.usefixtures("throwaway")
def test_hooks() -> None:
    """Another's link or file in the place of a link, our file without its mode, no link, no way to it."""
    other = Path("/usr/libexec/storage-team")
    shutil.copy("/bin/true", other)
    places = [host.HOOKS / point / "50_localdisk" for point in host.OUR_POINTS]
    for place in places[:4]:
        place.unlink()
    places[0].symlink_to(other)
    shutil.copy("/bin/true", places[1])
    shutil.copy(host.PROGRAM, places[2])
    places[2].chmod(0o644)
    missing = ", ".join(sorted(place.parent.name for place in places[2:4]))
    fixed(
        f"{places[0]} leads to {other}, not to {host.PROGRAM}",
        f"{places[1]} is a file of its own, not a link to {host.PROGRAM}",
        f"no hook at {missing} leads to {host.PROGRAM}",
    )
    assert all(place.resolve() == host.PROGRAM for place in places)
    POINT.chmod(0o750)
    host.HOOKS.chmod(0o711)
    assert "50_localdisk" not in attempt("ls", str(POINT), user="vdsm").stdout
    fixed(f"vdsm may not look into {POINT}", f"vdsm may not look into {host.HOOKS} ")
    assert "50_localdisk" in run("ls", str(POINT), user="vdsm")
    shutil.rmtree("/usr/libexec/vdsm/hooks.aside")
    other.unlink()


# -- users, tools, libvirt, the clock


@pytest.mark.usefixtures("throwaway")
def test_cron_does_not_run() -> None:
    """The fix asks systemd, which does not run here: cron is started as the bed does."""
    host.stop_cron()
    try:
        assert named("no cron daemon runs") == ["apt-get install -y cron && systemctl enable --now cron"]
    finally:
        host.start_cron()
    good()


@pytest.mark.usefixtures("throwaway")
def test_udevd_does_not_run() -> None:
    """LVM makes a disk, and waits for ever; the second half of the fix ends that, the first asks systemd."""
    host.end_daemon("systemd-udevd")
    try:
        (fix,) = named("systemd-udevd does not run")
        words = ["lvcreate", "-qq", "-y", "-Wn", "-Zn", "-L4m", "-nx", host.VOLUME_GROUP]
        with subprocess.Popen(words) as waiting:
            try:
                with pytest.raises(subprocess.TimeoutExpired):
                    waiting.wait(5)
                host.start_udevd()
                first, _, second = fix.partition(" && ")
                assert first == "systemctl restart systemd-udevd"
                paste(second)
                assert waiting.wait(60) == 0
            finally:
                waiting.kill()  # else `with` would wait for it for ever
    finally:
        if "systemd-udevd" not in host.names_of_processes():
            host.start_udevd()
    host.remove("x")
    good()
    start_works()


@pytest.mark.usefixtures("throwaway")
def test_a_configuration_that_no_start_goes_by() -> None:
    """What would be tried is what starts use now, so nothing is tried, and check says so."""
    other = Path("/etc/localdisk.yaml.new")
    other.write_text("backend: lvm\n")
    before = seqno()
    configure("volume_group: missing\n")
    said = localdisk("check", "--config", str(other))
    assert seqno() == before
    hint, *rest = said.splitlines()
    assert rest == [f"{other}: good", "this host: good"]
    assert hint.startswith(f"hint: no start was tried with {other}, because starts go by {CONFIG} alone : ")
    assert run("sh", "-c", hint.rpartition(" : ")[2]) == GOOD
    other.unlink()


@pytest.mark.usefixtures("throwaway")
def test_users() -> None:
    run("gpasswd", "-d", "vdsm", "qemu")
    fixed("user vdsm is not in group qemu")
    run("userdel", "vdsm")
    run("userdel", "qemu")
    fixed("there is no user vdsm", "there is no user qemu")


@pytest.mark.usefixtures("throwaway")
def test_tools() -> None:
    """The fix installs a package, which cannot be had here: the tool is put back."""
    virsh, aside = Path("/usr/bin/virsh"), Path("/usr/bin/virsh.aside")
    virsh.rename(aside)
    try:
        assert named("virsh is not installed") == ["apt-get install -y libvirt-clients"]
    finally:
        aside.rename(virsh)
    good()


def test_libvirt_is_silent() -> None:
    """The fix asks systemd, which does not run here: libvirt is started as the bed does."""
    libvirt.stop()
    try:
        (fix,) = named("libvirt does not report which VMs run")
        assert fix.startswith("systemctl restart ")
    finally:
        libvirt.start()
    good()


@pytest.mark.usefixtures("throwaway")
def test_clock() -> None:
    """The fix asks a time server, which does not exist here: the clock is set by hand."""
    before, since = time.time(), time.monotonic()
    run("date", "-s", "@1000000000")
    try:
        (fix,) = named("the clock of this host is before")
        assert fix.endswith(" # or date -s TIME")
    finally:
        run("date", "-s", f"@{before + time.monotonic() - since:.0f}")
    good()


def test_a_disk_marked_in_the_future() -> None:
    volume = local_disk()
    future = int(time.time()) + 10**6
    run("lvchange", "--addtag", f"STOPPED_{future}", f"{host.VOLUME_GROUP}/{volume}")
    fixed(f"has the tag STOPPED_{future}, a time in the future")
    (tag,) = (tag for tag in host.logical_volumes()[volume] if tag.startswith("STOPPED_"))
    assert abs(int(tag.rpartition("_")[2]) - time.time()) < 60
    host.remove(volume)


def local_disk() -> str:
    """A local disk, active; returns its name."""
    name = new_id()
    tags = ("--addtag", "localdisk", "--addtag", f"VM_{new_id()}", "--addtag", f"IU_{new_id()}")
    run("lvcreate", "-y", "-Wn", "-L", "4m", "-n", name, *tags, host.VOLUME_GROUP)
    return name


def test_nodes_of_local_disks() -> None:
    volume = local_disk()
    node = f"/dev/{host.VOLUME_GROUP}/{volume}"
    run("chown", "root:disk", node)
    fixed(f"1 device node(s) of local disks are not vdsm:qemu, mode 0660 (first: {node})")
    host.remove(volume)


# -- volume groups


@contextmanager
def group_on(*devices: object) -> Iterator[None]:
    """Configure the volume group of these tests; at the end remove it with all its volumes."""
    configure(f"volume_group: {NAME}\n")
    localdisk("install")
    if devices:
        run("vgcreate", "-y", "-s", "1m", NAME, *map(str, devices))
    try:
        yield
    finally:
        attempt("vgremove", "-ff", "-y", NAME)
        configure()
        localdisk("install")


def test_no_volume_group() -> None:
    """Only the administrator knows the DEVICE of the fix."""
    with failing_device("bed-a", 256 * MIB) as device, group_on():
        fixed(f"no volume group {NAME} on this host", DEVICE=str(device.path))


def test_exported_and_shared() -> None:
    with failing_device("bed-a", 64 * MIB) as device, group_on(device.path):
        run("vgexport", NAME)
        fixed(f"volume group {NAME} is exported")
        text = Path("/run/bed-check.vg")
        run("vgcfgbackup", "-f", str(text), NAME)
        lock = 'format = "lvm2"\nlock_type = "sanlock"\nlock_args = "1.0.0:lvmlock"\n'
        text.write_text(text.read_text().replace('format = "lvm2"', lock, 1))
        run("vgcfgrestore", "-f", str(text), NAME)
        fixed(f"volume group {NAME} is shared (sanlock)")


def test_a_device_is_missing() -> None:
    with (
        failing_device("bed-a", 64 * MIB) as one,
        failing_device("bed-b", 64 * MIB) as two,
        group_on(one.path, two.path),
    ):
        two.vanish()
        fixed(f"volume group {NAME} is missing a physical volume")
        two.mend()


@pytest.mark.usefixtures("throwaway")
def test_devices_file() -> None:
    with (
        failing_device("bed-a", 64 * MIB) as one,
        failing_device("bed-b", 64 * MIB) as two,
        group_on(one.path, two.path),
        devices_file(),
    ):
        assert not attempt("vgs", host.VOLUME_GROUP).returncode
        assert attempt("vgs", NAME).returncode
        fixed(f"volume group {NAME} is not in LVM's devices file ({one.path} {two.path})")
        run("lvm", "lvmdevices", "--deldev", str(two.path))
        fixed(f"volume group {NAME} is not in LVM's devices file ({two.path})")


@pytest.mark.usefixtures("throwaway")
def test_lvm_that_looks_into_local_disks() -> None:
    before = LVM_LOCAL.read_text() if LVM_LOCAL.exists() else ""
    LVM_LOCAL.write_text("devices {\n\tscan_lvs = 1\n}\n")
    try:
        fixed("LVM looks for volume groups in logical volumes")
    finally:
        LVM_LOCAL.write_text(before)


@contextmanager
def devices_file() -> Iterator[None]:
    """LVM uses a devices file, as on EL9, with the bed's own volume group in it."""
    before = LVM_LOCAL.read_text() if LVM_LOCAL.exists() else ""
    LVM_LOCAL.write_text("devices { use_devicesfile=1 }\n")
    DEVICES_FILE.parent.mkdir(exist_ok=True)
    try:
        run("lvm", "vgimportdevices", host.VOLUME_GROUP)
        yield
    finally:
        LVM_LOCAL.write_text(before)
        shutil.rmtree(DEVICES_FILE.parent)


@contextmanager
def multipath() -> Iterator[tuple[str, str]]:
    """A mapping with the UUID of a multipath device, and the device below it.

    There is no multipath here that makes or removes such a mapping: dmsetup does both.
    """
    backing = host.SCRATCH / "bed-multipath.img"
    with open(backing, "wb") as file:
        file.truncate(64 * MIB)
    loop = run("losetup", "--find", "--show", str(backing)).strip()
    table = f"0 {64 * MIB // 512} linear {loop} 0"
    run("dmsetup", "create", "--uuid", "mpath-3600bed", "mpathbed", "--table", table)
    try:
        yield "/dev/mapper/mpathbed", loop
    finally:
        attempt("dmsetup", "remove", "--retry", "mpathbed")
        run("losetup", "--detach", loop)
        backing.unlink()


def test_multipath() -> None:
    with multipath() as (mapped, path), group_on(mapped):
        fixed(f"multipath device mpathbed is under volume group {NAME}")
        assert run("pvs", "--noheadings", "-o", "pv_name", "-S", f"vg_name={NAME}").strip() == path
        written = Path(f"/etc/multipath/conf.d/localdisk-{NAME}.conf")
        assert written.read_text() == 'blacklist {\n  wwid "3600bed"\n}\n'
        written.unlink()


def test_multipath_has_grabbed_a_configured_device() -> None:
    with multipath() as (mapped, path), group_on(mapped):
        configure(f"volume_group: {NAME}\ndevices: [{path}]\n")
        fixed(f"multipath device mpathbed is under volume group {NAME}")


# -- thin pools


def test_thin_pool() -> None:
    """The fixes work with `devices` in the configuration, too."""
    configure("backend: lvmthin\n")
    full = f"{host.VOLUME_GROUP}/{host.THIN_POOL}"
    run("lvcreate", "-y", "-L", "4m", "-n", host.THIN_POOL, host.VOLUME_GROUP)
    fixed(f"{full} is no thin pool")
    host.remove(f"{host.THIN_POOL}.old", host.THIN_POOL)
    devices = f"devices: [{os.environ['LOCALDISK_BED_LOCAL']}]\n"
    configure(f"backend: lvmthin\n{devices}")
    fixed(f"no thin pool {full}")

    configure(devices)  # it is there, so it is looked at
    run("lvchange", "--zero", "n", full)
    run("lvchange", "--errorwhenfull", "n", full)
    fixed(f"thin pool {full} does not zero", f"thin pool {full} neither grows by itself nor fails writes")
    run("lvchange", "--activate", "n", full)
    fixed(f"thin pool {full} is not active")
    host.remove(host.THIN_POOL)


def test_a_broken_thin_pool() -> None:
    full = f"{NAME}/{host.THIN_POOL}"
    with failing_device("bed-a", 256 * MIB) as device, group_on(device.path):
        run("lvcreate", "-y", "-qq", "--type", "thin-pool", "-L", "64m", "-n", host.THIN_POOL, NAME)
        run("lvchange", "--errorwhenfull", "y", full)
        mapped = f"{NAME.replace('-', '--')}-{host.THIN_POOL}"
        metadata = FailingDevice.of(f"{mapped}_tmeta")
        metadata.fail()
        attempt("dmsetup", "message", mapped, "0", "create_thin 1")
        metadata.mend()
        fixed(f"thin pool {full} is active, but LVM does not report how full it is")


@pytest.mark.usefixtures("throwaway")
def test_a_thin_pool_that_grows() -> None:
    before = LVM_LOCAL.read_text() if LVM_LOCAL.exists() else ""
    full = f"{host.VOLUME_GROUP}/{host.THIN_POOL}"
    host.thin_pool("64m")
    LVM_LOCAL.write_text("activation { thin_pool_autoextend_threshold=80 }\n")
    try:
        run("lvchange", "--monitor", "y", full)
        good()
        run("lvchange", "--monitor", "n", full)
        named(f"thin pool {full} neither grows by itself nor fails writes")
    finally:
        LVM_LOCAL.write_text(before)
        host.remove(host.THIN_POOL)
        stop_daemon("dmeventd")


def stop_daemon(daemon: str) -> None:
    """End the daemon, by the process id that it wrote down."""
    file = Path(f"/run/{daemon}.pid")
    if file.exists():
        run("kill", file.read_text().strip())


# -- what vdsm meets, and root does not


@contextmanager
def later_rule(text: str) -> Iterator[None]:
    path = Path("/etc/sudoers.d/99_later")
    path.write_text(f"{text}\n")
    path.chmod(0o440)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def start_meets(*words: str, custom: Mapping[str, str] = THICK) -> None:
    """A start is refused with one line that has these words."""
    storage, vm_id = FileStorage(), new_id()
    image = storage.template(8 * MIB, seed=1)
    libvirt.define_placeholder(vm_id)
    try:
        result = run_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), custom)
        line = one_line(result)
        for word in words:
            assert word in line
    finally:
        libvirt.undefine(vm_id)
        storage.remove()


def start_works(custom: Mapping[str, str] = THICK) -> None:
    storage, vm_id = FileStorage(), new_id()
    image = storage.template(8 * MIB, seed=1)
    libvirt.define_placeholder(vm_id)
    try:
        result = run_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), custom)
        assert result.rc == 0, result.stderr
        stop(vm_id, image, custom=custom)
    finally:
        libvirt.undefine(vm_id)
        storage.remove()


@pytest.mark.usefixtures("throwaway")
def test_sudo_is_for_a_group_that_vdsm_is_not_in() -> None:
    sudo = Path("/usr/bin/sudo")
    sudo.chmod(0o4750)
    try:
        start_meets("sudo cannot be run by this user: it is user 0's", "chmod o+rx /usr/bin/sudo")
        fixed("sudo cannot be run by this user")
    finally:
        sudo.chmod(0o4755)


@pytest.mark.usefixtures("throwaway")
def test_sudo_without_its_setuid_bit() -> None:
    sudo = Path("/usr/bin/sudo")
    sudo.chmod(0o755)
    try:
        start_meets("have the setuid bit set", "chmod 4755 /usr/bin/sudo")
        fixed("have the setuid bit set")
    finally:
        sudo.chmod(0o4755)


@pytest.mark.usefixtures("throwaway")
def test_vdsms_account_has_expired() -> None:
    run("chage", "--expiredate", "2001-01-01", "vdsm")
    try:
        start_meets("xpired", "chage --expiredate -1 vdsm")
        (fix,) = named("vdsm cannot run")
        paste(fix.partition(", or ")[0])
        good()
    finally:
        run("chage", "--expiredate", "-1", "vdsm")


def test_a_later_rule_forbids_the_helper_to_run_lvm() -> None:
    """The fix shows the rule; somebody must remove it."""
    with later_rule(f"vdsm ALL=(root) NOPASSWD: NOEXEC: {host.PROGRAM} helper"):
        start_meets("lvm cannot be run, although the mode of /usr/sbin/lvm allows it", "sudo -l -U vdsm")
        named("user vdsm tried a start: lvm cannot be run")
    good()


def test_a_later_rule_wants_a_password() -> None:
    with later_rule("vdsm ALL=(ALL) ALL"):
        start_meets("a password is required")
        (fix,) = named("vdsm cannot run")
        assert fix.startswith("sudo -l -U vdsm # ")
        assert "ALL" in run("sh", "-c", fix)
    good()


def test_sudo_runs_commands_below_another_directory() -> None:
    """The fix shows the setting, which no setting for one command overrides; somebody must remove it."""
    with later_rule("Defaults runchroot=/srv"):
        start_meets("command not found", "take runchroot out of what grep -rn runchroot")
        (fix,) = named("vdsm cannot run")
        command = fix.partition("out of what ")[2].partition(" shows, ")[0]
        assert "99_later" in run("sh", "-c", command)
    good()
    with later_rule("Defaults:vdsm !requiretty\nDefaults:root runchroot=/srv"):
        good()  # limited to another user, as the fix says


@pytest.mark.usefixtures("throwaway")
def test_libvirt_is_not_for_vdsm(file_storage: FileStorage) -> None:
    virsh = Path("/usr/bin/virsh")
    virsh.chmod(0o750)
    try:
        (fix,) = named("user vdsm tried a start: libvirt does not report which VMs run: virsh cannot be run")
        vm = Vm(new_id(), (Disk("vda", file_storage.template(4 * MIB)),))
        line = one_line(run_point("before_vm_start", vm.id, domain_xml(vm), THICK))
        assert "virsh cannot be run by this user" in line
        assert line.endswith(f" : {fix}")
        paste(fix)
        good()
    finally:
        virsh.chmod(0o755)


# -- a tiny volume goes the way of a local disk


def failures() -> dict[str, int]:
    """What metrics count as starts and stops that failed."""
    try:
        found = json.loads((LOCKS / "counters").read_text())
    except FileNotFoundError:
        return {}
    return dict(found["failures"])


def lvm_says(text: str) -> None:
    LVM_LOCAL.write_text(text)


@pytest.fixture
def lvm_local() -> Iterator[None]:
    before = LVM_LOCAL.read_text() if LVM_LOCAL.exists() else ""
    yield
    LVM_LOCAL.write_text(before)


def test_a_full_group() -> None:
    """The fix is the operator's choice: here something else makes room."""
    run("lvcreate", "-y", "-Wn", "-Zn", "-l", "100%FREE", "-n", "full", host.VOLUME_GROUP)
    before = failures()
    (fix,) = named("user vdsm tried a start: volume group ovirt-local lacks 4 MiB")
    assert fix.startswith("remove local disks (localdisk gc), extend the volume group")
    assert failures() == before, "no start has failed"
    host.remove("full")
    good()


def test_allocation_is_off() -> None:
    """What is free on such a device is no free space; a hint says so even if there is room elsewhere."""
    with (
        failing_device("bed-a", 64 * MIB) as one,
        failing_device("bed-b", 64 * MIB) as two,
        group_on(one.path, two.path),
    ):
        run("pvchange", "-x", "n", str(one.path))
        of_file, hint, of_host = localdisk("check").splitlines()
        assert [of_file, of_host] == GOOD.splitlines()
        assert hint.startswith(f"hint: LVM may allocate nothing on {one.path} of volume group {NAME}")
        run("pvchange", "-x", "n", str(two.path))
        start_meets(f"volume group {NAME} lacks", "0 B is free where LVM may allocate", f"not on {one.path} ")
        before = failures()
        (fix,) = named(f"user vdsm tried a start: volume group {NAME} lacks")
        assert failures() == before, "no start has failed"
        command, _, rest_of_fix = fix.partition(", or ")
        assert rest_of_fix == f"vgextend {NAME} DEVICE"
        paste(command)
        good()
        start_works()


def test_what_a_killed_check_leaves_is_removed_by_gc() -> None:
    words = ["sudo", "-n", str(host.PROGRAM), "helper"]
    asked = {"verb": "rehearse", "vm": new_id(), "property": "lvm"}
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, user="vdsm", text=True
    ) as helper:
        assert helper.stdin
        assert helper.stdout
        print(json.dumps(asked), file=helper.stdin, flush=True)
        path = Path(json.loads(helper.stdout.readline())["device"]["path"])
        # For a late event of what had this device's number before, udev gives it to root for a moment.
        wait_for(lambda: (path.owner(), path.group()) == ("vdsm", "qemu"), "the device's owner")
        (pid,) = helpers()
        os.kill(pid, signal.SIGKILL)
    assert path.name in host.logical_volumes()
    assert path.name in localdisk("gc")
    assert path.name not in host.logical_volumes()


def test_another_udev_rule_takes_the_devices_away() -> None:
    """The fix shows the rule; somebody must remove it."""
    rule = Path("/etc/udev/rules.d/94-storage-team.rules")
    rule.write_text('ENV{DM_VG_NAME}=="ovirt-local", RUN+="/usr/bin/chown root:disk $env{DEVNAME}"\n')
    run("udevadm", "control", "--reload")
    try:
        (fix,) = named("user vdsm tried a start: cannot write to /dev/ovirt-local/")
        command = fix.partition("(")[2].rpartition(")")[0]
        assert str(rule) in run("sh", "-c", command)
    finally:
        rule.unlink()
        run("udevadm", "control", "--reload")
    good()


@pytest.mark.usefixtures("throwaway", "lvm_local")
def test_lvm_leaves_the_group_inactive() -> None:
    """In a pool that is active, LVM makes inactive disks and prints nothing; its reason is found."""
    host.thin_pool("64m")
    full = f"{host.VOLUME_GROUP}/{host.THIN_POOL}"
    run("lvchange", "--errorwhenfull", "y", full)
    run("lvcreate", "-y", "-V", "4m", "-T", full, "-n", "other")
    for custom in (THICK, THIN):
        lvm_says('activation {\n\tvolume_list = [ "other" ]\n}\n')
        start_meets("left inactive by LVM", "add ovirt-local to volume_list", custom=custom)
        fixed("LVM's activation/volume_list lacks volume group ovirt-local")
        start_works(custom)
    lvm_says('activation { volume_list = [ "@nobody" ] }\n')
    named("user vdsm tried a start: volume group ovirt-local is left inactive by LVM")
    lvm_says('activation { read_only_volume_list = [ "ovirt-local" ] }\n')
    start_meets("cannot write to /dev/ovirt-local/", "read_only_volume_list", custom=THICK)
    fixed("LVM's activation/read_only_volume_list has volume group ovirt-local")
    host.remove("other", host.THIN_POOL)


@pytest.mark.usefixtures("throwaway", "lvm_local")
def test_lvm_has_a_reason_against_the_group() -> None:
    """Each start names the cause, each fix is run, and then a start works."""
    with (
        failing_device("bed-a", 64 * MIB) as one,
        failing_device("bed-b", 64 * MIB) as two,
        group_on(one.path),
    ):
        local = os.environ["LOCALDISK_BED_LOCAL"]
        lvm_says(f'devices {{ filter = [ "a|^{local}$|", "r|.*|" ] }}\n')
        start_meets("hidden from LVM by its filter", str(one.path), "devices/filter")
        fixed(f"LVM's filter hides volume group {NAME} ({one.path})")
        start_works()
        lvm_says("")

        only_two = f'devices {{ filter = [ "a|^{two.path}$|", "r|.*|" ] }}'
        run("vgcreate", "-y", "-s", "1m", "--config", only_two, NAME, str(two.path))
        start_meets(f"volume group {NAME} is one of several of that name", "vgrename UUID NEW_NAME")
        (fix,) = named(f"volume group {NAME} is one of several of that name")
        shown = run("sh", "-c", fix.partition(", then ")[0])
        (uuid,) = (line.split()[1] for line in shown.splitlines() if str(two.path) in line)
        run("vgrename", uuid, "bed-twin")
        good()
        start_works()
        run("vgremove", "-y", "bed-twin")

        run("dd", f"if={one.path}", f"of={two.path}", "bs=1M")
        start_meets(f"volume group {NAME} is on a physical volume that LVM sees on several devices")
        fixed(f"LVM sees physical volumes of volume group {NAME} twice (also on ")
        start_works()
        lvm_says("")
        run("wipefs", "-qa", str(two.path))

        run("vgchange", "-y", "--systemid", "stranger", NAME)
        start_meets(
            f"volume group {NAME} is another host's, its system ID is stranger and this host has none"
        )
        named(f"volume group {NAME} is another host's")
        lvm_says('global { system_id_source = "lvmlocal" }\nlocal { system_id = "stranger" }\n')
        good()
        lvm_says('global { system_id_source = "lvmlocal" }\nlocal { system_id = "mine" }\n')
        start_meets(f"volume group {NAME} is another host's, its system ID is stranger")
        (fix,) = named(f"volume group {NAME} is another host's")
        paste(fix.partition(": ")[2])
        good()
        start_works()
