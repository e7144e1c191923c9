"""What check says of a host: each case changes a good one, and names the line that comes of it."""

from __future__ import annotations

import grp
import json
import os
import pwd
import shlex
import stat
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from localdisk import config, daemons, device_mapper, lock, run
from localdisk.errors import (
    CommandFailed,
    CommandMissing,
    CommandTimeout,
    HelperUnavailable,
    Interrupted,
    LibvirtSilent,
    Unseen,
    VolumeGroupUnusable,
    sudo_fix,
)
from localdisk.frozen import replace
from localdisk.host import check, facts, files, storage_facts
from localdisk.host.check import Report, as_json, as_lines, check_configuration, strangers
from localdisk.host.check_system import check_host
from localdisk.host.facts import Accounts, Entry, Hook, Host, Rehearsal
from localdisk.host.finding import Finding, write_command
from localdisk.host.storage_facts import Group, LvmSettings, Multipath, PoolWatch
from localdisk.ids import NOBODY
from localdisk.vdsm.hook_call import POINTS
from localdisk.volumes.lvm import VolumeGroup
from tests.fakes import OTHER_VM, VM, VOLUME, FakeHost, report, tags, without_settings

ROOT = Path(__file__).parents[3]
PROGRAM = files.PROGRAM
NOW = 2_000_000_000.0
CONFIG = config.parse(b"", "F")
FILE, DIRECTORY = stat.S_IFREG, stat.S_IFDIR


def a_file(path: str, mode: int = 0o644, text: str = "", uid: int = 0) -> Entry:
    return Entry(path, uid, 0, FILE | mode, NOW - 100, text)


def a_directory(path: str, mode: int = 0o755, uid: int = 0) -> Entry:
    return Entry(path, uid, 0, DIRECTORY | mode, NOW - 100)


WAY = (
    a_file(PROGRAM, 0o755),
    *map(a_directory, ("/usr/local/libexec", "/usr/local", "/usr", "/")),
)
HOOKS = tuple(Hook(point, files.hook_link(point), PROGRAM) for point in sorted(POINTS))
DIRECTORIES = tuple(
    map(a_directory, ("/usr/libexec/vdsm/hooks", "/usr", "/usr/libexec/vdsm/hooks/after_disk_prepare"))
)
ACCOUNTS = Accounts({"vdsm": 36, "qemu": 107}, {"kvm": 36, "qemu": 107}, frozenset({"kvm", "qemu"}))
RULES = tuple(a_file(path, text=files.udev_rule(["ovirt-local"])) for path in files.UDEV_RULES)
INSTALL = f"{PROGRAM} install"
SETTINGS = LvmSettings(use_devices_file=False, autoextend_threshold=100)


def a_group(fake: FakeHost | None = None, devices: tuple[str, ...] = (), **changes: object) -> Group:
    vg = VolumeGroup.from_report((fake or FakeHost()).report(), devices)
    vg = replace(vg, vg_name="ovirt-local")
    group = Group("ovirt-local", devices, vg, pools={"pool0": PoolWatch(True, False)})
    return replace(group, **changes)


GOOD = Host(
    program=PROGRAM,
    is_root=True,
    now=NOW,
    missing_tools=(),
    daemons=frozenset({"systemd-udevd", "crond"}),
    has_cron_timers=False,
    has_dnf=True,
    lvm_version=(2, 3, 16),
    qemu_img_version=(6, 2),
    known_vms=frozenset(),
    accounts=ACCOUNTS,
    program_path=WAY,
    hooks=HOOKS,
    hook_directories=DIRECTORIES,
    udev_rules=RULES,
    older_files=(),
    cron=a_file(files.CRON, text=files.cron_line(PROGRAM)),
    sudoers=a_file(files.SUDOERS, 0o440, files.sudoers(PROGRAM)),
    sudo_options=files.NEWER_SUDO_OPTIONS,
    run_directory=a_directory(lock.RUN),
    lvm_settings=SETTINGS,
    groups=(a_group(),),
    unnamed_groups={},
    rehearsal=Rehearsal(),
    failures=(),
)


def lines(text: str = "", **changes: object) -> list[str]:
    """What check says of a good host with these changes."""
    found = tuple(check_host(config.parse(text.encode(), "F"), replace(GOOD, **changes)))
    return as_lines(Report("F", True, (), found)).splitlines()[1:]


def test_a_good_host() -> None:
    assert lines() == ["this host: good"]
    assert lines(run_directory=None, has_dnf=False, lvm_settings=None) == ["this host: good"]


# -- what is not there, or too old


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"missing_tools": ("lvm",), "lvm_version": None, "groups": ()},
            "lvm is not installed, localdisk runs it : dnf install -y --best lvm2",
        ),
        (
            {"missing_tools": ("virsh",), "has_dnf": False, "known_vms": None},
            "virsh is not installed, localdisk runs it : apt-get install -y libvirt-clients",
        ),
        (
            {"lvm_version": (2, 2, 157)},
            "LVM is 2.02.157, lvm fullreport came with 2.02.158 : dnf install -y --best lvm2",
        ),
        (
            {"qemu_img_version": (5, 1)},
            "qemu-img is 5.1, convert --target-is-zero (thin disks) came with 5.0, convert -r"
            " (copy.bandwidth)"
            " with 5.2 : dnf install -y --best qemu-img",
        ),
        (
            {"accounts": replace(ACCOUNTS, groups={"kvm": 36}, of_vdsm=frozenset({"kvm"}))},
            "there is no group qemu, local disks belong to vdsm:qemu : groupadd -r -g 107 qemu",
        ),
        (
            {"accounts": replace(ACCOUNTS, users={"qemu": 107}, of_vdsm=frozenset())},
            "there is no user vdsm, hooks run as vdsm, VMs as qemu : useradd -r -u 36 -g kvm -G qemu -M -d /"
            " -s /sbin/nologin vdsm # or dnf install vdsm",
        ),
        (
            {"accounts": replace(ACCOUNTS, users={"vdsm": 36})},
            "there is no user qemu, hooks run as vdsm, VMs as qemu : useradd -r -u 107 -g qemu -G kvm -M -d /"
            " -s /sbin/nologin qemu # or dnf install qemu-kvm",
        ),
        (
            {"accounts": replace(ACCOUNTS, of_vdsm=frozenset({"kvm"}))},
            "user vdsm is not in group qemu, it reads shared storage and writes local disks through"
            " its groups"
            " : usermod -aG qemu vdsm",
        ),
        (
            {"now": NOW - 1000},
            "the clock of this host is before the time at which this program was installed, kept"
            " disks would be"
            " removed at the wrong time : systemctl restart chronyd && chronyc makestep # or date -s TIME",
        ),
        (
            {"run_directory": a_file(lock.RUN)},
            "/run/localdisk is not a directory, locks are made in it : rm /run/localdisk",
        ),
        (
            {"run_directory": a_directory(lock.RUN, 0o775)},
            "/run/localdisk (user 0, mode 0775) is not root's alone, whoever writes there can hold up VMs"
            " : chown root:root /run/localdisk && chmod 0755 /run/localdisk",
        ),
    ],
)
def test_what_the_host_lacks(changes: dict[str, Any], line: str) -> None:
    assert lines(**changes) == [line]


def test_devices_need_a_newer_lvm() -> None:
    group = a_group(devices=("/dev/a",))
    (line,) = lines("devices: [/dev/a]\n", lvm_version=(2, 3, 11), groups=(group,))
    assert line.startswith(
        "LVM is 2.03.11, the option --devices, which `devices` in the configuration needs,"
    )
    assert lines("devices: [/dev/a]\n", lvm_version=(2, 3, 12), groups=(group,)) == ["this host: good"]


# -- the program and its rules


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (
            a_file(PROGRAM, 0o775),
            f"{PROGRAM} (user 0, mode 0775) can be written by others than root, root runs this program, so"
            f" whoever can change it is root : chown root:root {PROGRAM} && chmod go-w {PROGRAM}",
        ),
        (
            a_directory("/usr/local", uid=36),
            "/usr/local (user 36, mode 0755) can be written by others than root, root runs this program, so"
            " whoever can change it is root : chown root:root /usr/local && chmod go-w /usr/local",
        ),
        (
            a_file(PROGRAM, 0o700),
            f"{PROGRAM} (user 0, mode 0700) is closed to other users, vdsm cannot run the program"
            f" : chmod 0755 {PROGRAM}",
        ),
        (
            a_directory("/usr/local", 0o700),
            "/usr/local (user 0, mode 0700) is closed to other users, vdsm cannot run the program"
            " : chmod o+x /usr/local",
        ),
    ],
)
def test_the_program_is_roots_alone(entry: Entry, line: str) -> None:
    way = tuple(entry if each.path == entry.path else each for each in WAY)
    assert lines(program_path=way) == [line]
    assert lines(program_path=way, rehearsal=no_helper("sudo: refused")) == [line], "its effect is not shown"


def test_a_program_outside_of_the_system() -> None:
    program = "/tmp/local disk"
    hooks = tuple(replace(hook, target=program) for hook in HOOKS)
    cron = a_file(files.CRON, text=files.cron_line(PROGRAM))
    way = (a_file(program, 0o755), a_directory("/tmp", 0o1777), a_directory("/"))
    first, *_ = lines(program=program, program_path=way, hooks=hooks, cron=cron)
    assert first == (
        "/tmp/local disk is in a directory that others than root can write to (/tmp), root runs this"
        f" program, so whoever can change it is root : install -D -o root -g root -m 0755"
        f" '/tmp/local disk' {PROGRAM} && {PROGRAM} install && {PROGRAM} check"
    )


def test_a_program_that_is_not_where_install_puts_it() -> None:
    program = "/opt/localdisk"
    way = (a_file(program, 0o755), a_directory("/opt"), a_directory("/"))
    fixes = {line.partition(" : ")[2] for line in lines(program=program, program_path=way)}
    assert fixes == {f"{program} install && {PROGRAM} check"}


def no_helper(problem: str) -> Rehearsal:
    return Rehearsal(str(HelperUnavailable(problem=problem, fix=sudo_fix(problem, PROGRAM))))


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("sudo: a password is required", "sudo -l -U vdsm # shows the rule or setting of another file"),
        ("sudo: account validation failure, is your account locked?", "chage --expiredate -1 vdsm"),
        (f"sudo: {PROGRAM}: command not found", "take runchroot out of what grep -rn runchroot /etc/sudo"),
        ("sudo: /usr/bin/sudo must be owned by uid 0 and have the setuid bit set", "chown root:root /usr"),
    ],
)
def test_what_keeps_sudo_from_running(said: str, fix: str) -> None:
    (line,) = lines(rehearsal=no_helper(said))
    assert line.startswith(f"vdsm cannot run `sudo {PROGRAM} helper` ({said}), without it no")
    assert f" : {fix}" in line


def test_what_only_vdsm_meets() -> None:
    found = lines(rehearsal=Rehearsal("", "no libvirt : do that", ("no report : do this",)))
    assert found == [
        "user vdsm tried a start: no libvirt, so no VM can start from local disks : do that",
        "user vdsm tried a start: no report, so no VM can start from local disks : do this",
    ]
    group = a_group(vg=None)
    assert len(lines(rehearsal=Rehearsal(disks=("no report : do this",)), groups=(group,))) == 1


def test_sudo() -> None:
    (line,) = lines(rehearsal=no_helper("sudo: a password is required"), sudoers=None)
    what, _, fix = line.partition(" : ")
    assert what == (
        f"vdsm cannot run `sudo {PROGRAM} helper` (sudo: a password is required),"
        " without it no local disk is made"
    )
    assert fix == INSTALL


@pytest.mark.parametrize(
    ("sudoers", "is_good"),
    [
        (files.sudoers(PROGRAM).replace(" ", "\t"), True),
        (f"vdsm ALL=(root) NOPASSWD: {PROGRAM} helper\n", False),
        (f"{files.sudoers(PROGRAM)}vdsm ALL=(root) NOPASSWD: {PROGRAM} gc", False),
        (f"{files.sudoers(PROGRAM)}#36 ALL=(root) NOPASSWD: {PROGRAM} gc", False),
        (f"{files.sudoers(PROGRAM)}#include /x", False),
    ],
)
def test_sudo_rule_that_allows_more_or_less(sudoers: str, is_good: bool) -> None:
    found = lines(sudoers=a_file(files.SUDOERS, 0o440, sudoers))
    line = (
        f"{files.SUDOERS} is not the rule that localdisk needs, no more and no less, vdsm"
        " could reach root with more than it needs, or a setting for all commands break a start"
        f" : {INSTALL}"
    )
    assert found == (["this host: good"] if is_good else [line])
    assert lines(sudoers=None) == ["this host: good"], "it may be in another file"


def test_a_written_file_says_what_was_meant(tmp_path: Path) -> None:
    path, text = tmp_path / "a b", ("it's $HOME", "%s\\n", '"x"')
    command = write_command(str(path), text, "0640").replace("-o root -g root", "")
    run.run(["sh", "-c", command])
    assert path.read_text() == "".join(f"{line}\n" for line in text)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("example", "made"),
    [
        ("sudoers", files.sudoers(PROGRAM)),
        ("12-localdisk.rules", files.udev_rule(["ovirt-local"])),
    ],
)
def test_the_examples_are_what_install_writes(example: str, made: str) -> None:
    assert (ROOT / "examples/host" / example).read_text() == made


def test_the_places_are_those_of_the_pages() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    made = (files.PROGRAM, files.SUDOERS, *files.UDEV_RULES, files.CRON, files.HOOKS, files.HOOKS_ASIDE)
    assert [place for place in made if place not in text] == []


# -- hooks


def test_hooks_that_are_missing() -> None:
    points = ("after_vm_destroy", "before_disk_hotplug", "before_vm_start", "before_vm_hibernate")
    hooks = tuple(hook for hook in HOOKS if hook.point not in points)
    link, file = files.hook_link("before_vm_start"), files.hook_link("before_vm_hibernate")
    others = (Hook("before_vm_start", link, "/opt/old/localdisk"), Hook("before_vm_hibernate", file, file))
    assert lines(hooks=hooks + others) == [
        f"{link} leads to /opt/old/localdisk, not to {PROGRAM}, vdsm does not call it there : {INSTALL}",
        f"{file} is a file of its own, not a link to {PROGRAM}, vdsm does not call it there : {INSTALL}",
        f"no hook at after_vm_destroy, before_disk_hotplug leads to {PROGRAM}, vdsm does not call it"
        f" there : {INSTALL}",
    ]


@pytest.mark.parametrize(
    ("directory", "is_good"),
    [
        (a_directory("/usr/libexec/vdsm/hooks/after_disk_prepare", 0o750), False),
        (a_directory("/usr/libexec/vdsm/hooks/after_disk_prepare", 0o754), False),
        (a_directory("/usr/libexec/vdsm", 0o700), False),
        (a_directory("/usr/libexec/vdsm/hooks/after_disk_prepare", 0o750, uid=36), True),
        (replace(a_directory("/usr/libexec/vdsm/hooks/after_disk_prepare", 0o750), gid=36), True),
        (a_directory("/usr/libexec/vdsm/hooks/after_vm_start", 0o700), True),  # it serves no such point
    ],
)
def test_directories_of_hooks(directory: Entry, is_good: bool) -> None:
    (line,) = lines(hook_directories=(*DIRECTORIES, directory))
    if is_good:
        assert line == "this host: good"
    else:
        assert line.startswith(f"vdsm may not look into {directory.path} (user 0, mode 07")
        assert line.endswith(f" : chmod o+rx {directory.path}")


def test_hooks_that_are_too_many() -> None:
    top = files.HOOKS
    more = (
        Hook("after_disk_prepare", f"{top}/after_disk_prepare/60_again", PROGRAM),
        Hook(
            "after_disk_prepare", f"{top}/after_disk_prepare/localdisk", f"{top}/after_disk_prepare/localdisk"
        ),
        Hook("after_vm_start", f"{top}/after_vm_start/50_localdisk", PROGRAM),
        Hook("after_vm_start", f"{top}/after_vm_start/10_other", "/usr/libexec/other"),
    )
    assert lines(hooks=HOOKS + more) == [
        f"{more[0].path} does the work of {files.hook_link('after_disk_prepare')}, vdsm calls it twice"
        f" : {INSTALL}",
        f"{more[2].path} leads to {PROGRAM}, it serves no such point : {INSTALL}",
        f"{more[1].path} is another hook for local disks, two of them copy twice"
        f" : {INSTALL} # moves it to {files.HOOKS_ASIDE}",
    ]


def test_all_that_vdsms_package_brings_back_is_named() -> None:
    scripts, rules = files.OLDER_FILES[:2], files.OLDER_FILES[2:]
    hooks = tuple(Hook(path.split("/")[-2], path, path) for path in scripts)
    found = lines(hooks=HOOKS + hooks, older_files=files.OLDER_FILES)
    assert [line.split()[0] for line in found] == [*scripts, *rules]
    assert all(f" : {INSTALL} # moves it" in line for line in found)
    assert found[2].startswith(
        f"{rules[0]} belongs to the localdisk hook of vdsm's package, vdsm may run that hook's helper as root"
    )


# -- cron and udev


def test_daemons() -> None:
    every, crond, udevd = {"systemd-udevd", "crond"}, frozenset({"crond"}), frozenset({"systemd-udevd"})
    assert lines(daemons=crond) == [
        "systemd-udevd does not run, LVM waits for it when it makes a disk"
        " : systemctl restart systemd-udevd && dmsetup udevcomplete_all -y"
    ]
    no_cron = "no cron daemon runs, gc would only run when vdsm starts : "
    assert lines(daemons=udevd) == [f"{no_cron}dnf install -y cronie && systemctl enable --now crond"]
    assert lines(daemons=udevd, has_dnf=False) == [
        f"{no_cron}apt-get install -y cron && systemctl enable --now cron"
    ]
    for good in (
        {"daemons": None},  # an ordinary user does not see all processes
        {"daemons": frozenset({*every, "anacron"})},
        {"daemons": frozenset({"udevd", "cron"})},
        {"daemons": udevd, "has_cron_timers": True},
    ):
        assert lines(**good) == ["this host: good"]


@pytest.mark.parametrize(
    "text",
    [
        f"*/10 * * * * root {PROGRAM} gc",
        f"# comment\nMAILTO=x\n@hourly root {PROGRAM} gc --json\n",
        f"5,10-20/2  1 * jan mon-fri   root   {PROGRAM} gc >/dev/null",
    ],
)
def test_cron_lines_that_run_gc(text: str) -> None:
    assert lines(cron=a_file(files.CRON, text=text)) == ["this host: good"]


NOT_RUN = f"{files.CRON} does not run `{PROGRAM} gc` as root, "


@pytest.mark.parametrize(
    ("cron", "what"),
    [
        (None, f"there is no {files.CRON}, gc would only run when vdsm starts : {INSTALL}"),
        (a_file(files.CRON, text=""), NOT_RUN),
        (a_file(files.CRON, text=f"# */10 * * * * root {PROGRAM} gc"), NOT_RUN),
        (a_file(files.CRON, text=f"*/10 * * * * vdsm {PROGRAM} gc"), NOT_RUN),
        (a_file(files.CRON, text=f"*/10 * * * root {PROGRAM} gc"), NOT_RUN),
        (a_file(files.CRON, text=f"*/10 * * * * root {PROGRAM}"), NOT_RUN),
        (a_file(files.CRON, text="*/10 * * * * root /opt/localdisk gc"), NOT_RUN),
        (a_file(files.CRON, 0o666), f"cron ignores {files.CRON} (user 0, mode 0666), "),
        (a_file(files.CRON, uid=5), f"cron ignores {files.CRON} (user 5, mode 0644), "),
        (a_directory(files.CRON), f"cron ignores {files.CRON} (user 0, mode 0755), "),
    ],
)
def test_cron(cron: Entry | None, what: str) -> None:
    (line,) = lines(cron=cron)
    assert line.startswith(what)
    assert line.endswith(f" : {INSTALL}")


@pytest.mark.parametrize(
    ("rules", "whats"),
    [
        ((), [f"there is no {path}" for path in files.UDEV_RULES]),
        (RULES[:1], [f"there is no {files.UDEV_RULES[1]}"]),
        (RULES[1:], [f"there is no {files.UDEV_RULES[0]}"]),
        (
            (replace(RULES[0], text=""), RULES[1]),
            [f"{files.UDEV_RULES[0]} does not name volume group ovirt-local"],
        ),
        (
            (RULES[0], replace(RULES[1], text=RULES[1].text.replace("\n", "\n# "))),
            [f"{files.UDEV_RULES[1]} does not name volume group ovirt-local"],
        ),
    ],
)
def test_udev_rules(rules: tuple[Entry, ...], whats: list[str]) -> None:
    why = "the nodes of local disks must be vdsm's, and hidden"
    assert lines(udev_rules=rules) == [f"{what}, {why} : {INSTALL}" for what in whats]


@pytest.mark.parametrize(
    ("scans", "uses_devices_file", "is_good"),
    [(False, False, True), (True, False, False), (True, True, True)],
)
def test_lvm_that_looks_into_local_disks(scans: bool, uses_devices_file: bool, is_good: bool) -> None:
    line = (
        "LVM looks for volume groups in logical volumes (devices/scan_lvs), a guest's groups on local disks"
        " would be this host's : echo 'devices { scan_lvs = 0 }' >> /etc/lvm/lvmlocal.conf"
    )
    found = lines(lvm_settings=LvmSettings(uses_devices_file, 100, scans))
    assert found == (["this host: good"] if is_good else [line])


def test_udev_rule_of_several_groups() -> None:
    text = f"vms:\n  {VM}: {{volume_group: fast}}\n"
    groups = (a_group(), replace(a_group(), name="fast"))
    found = lines(text, groups=groups)
    assert [line.split(", ")[0] for line in found] == [
        f"{path} does not name volume group fast" for path in files.UDEV_RULES
    ]
    assert files.udev_rule(["ovirt-local", "fast"]).count('ENV{DM_VG_NAME}!="ovirt-local|fast"') == 1
    for good in (files.udev_rule(["ovirt-local", "fast"]), ' ENV{DM_VG_NAME}=="*"'):
        rules = tuple(replace(rule, text=good) for rule in RULES)
        assert lines(text, groups=groups, udev_rules=rules) == ["this host: good"]


# -- volume groups


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"vg": None},
            "no volume group ovirt-local on this host, it holds the local disks"
            " : vgcreate --metadatasize 128m ovirt-local DEVICE # or name another volume_group",
        ),
        (
            {"vg": None, "hidden": ("/dev/a", "/dev/b")},
            "volume group ovirt-local is not in LVM's devices file (/dev/a /dev/b), so LVM does not see it"
            " : lvm vgimportdevices ovirt-local",
        ),
        (
            {"hidden": ("/dev/b",), "vg": replace(a_group().vg, vg_partial=True)},
            "volume group ovirt-local is not in LVM's devices file (/dev/b), so LVM does not see it"
            " : for device in /dev/b; do lvm lvmdevices --adddev $device; done",
        ),
        (
            {"vg": replace(a_group().vg, vg_partial=True)},
            "volume group ovirt-local is missing a physical volume, so no local disk can be made or changed"
            " : vgreduce --removemissing ovirt-local # if the device is lost for good;"
            " vgextend --restoremissing ovirt-local DEVICE if it is back",
        ),
        (
            {"vg": replace(a_group().vg, vg_exported=True, vg_partial=True)},
            "volume group ovirt-local is exported, so no local disk can be made or changed"
            " : vgimport ovirt-local",
        ),
        (
            {"vg": replace(a_group().vg, vg_lock_type="dlm")},
            "volume group ovirt-local is shared (dlm), so no local disk can be made or changed : vgchange -y"
            " --config 'global{use_lvmlockd=1}' --lock-type none"
            " --lock-opt force ovirt-local # if no other host uses it",
        ),
        (
            {"misowned": ("/dev/ovirt-local/a", "/dev/ovirt-local/b")},
            "2 device node(s) of local disks are not vdsm:qemu, mode 0660 (first:"
            " /dev/ovirt-local/a), their VMs"
            " cannot use them : udevadm control --reload && udevadm trigger --settle --action=change"
            " --name-match=/dev/ovirt-local/a --name-match=/dev/ovirt-local/b",
        ),
    ],
)
def test_volume_groups(changes: dict[str, object], line: str) -> None:
    settings = replace(SETTINGS, use_devices_file="hidden" in changes)
    assert lines(groups=(a_group(**changes),), lvm_settings=settings) == [line]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "changes", "line"),
    [
        (
            {"filters": {"filter": ("a|.*|",), "global_filter": ("r|/dev/a|", "a|.*|")}},
            {"vg": None, "hidden": ("/dev/a",)},
            "LVM's filter hides volume group ovirt-local (/dev/a), so LVM does not see it : printf '%s\\n'"
            """ 'devices { filter = [ "a|^/dev/a$|", "a|.*|" ]"""
            """ global_filter = [ "a|^/dev/a$|", "r|/dev/a|", "a|.*|" ] }' >> /etc/lvm/lvmlocal.conf""",
        ),
        (
            {"filters": {"filter": (), "global_filter": ("a|.*|",)}},
            {"duplicates": ("/dev/b",)},
            "LVM sees physical volumes of volume group ovirt-local twice (also on /dev/b), so it makes and"
            """ removes nothing there : printf '%s\\n' 'devices { global_filter = [ "r|^/dev/b$|" ] }'"""
            " >> /etc/lvm/lvmlocal.conf # or detach the copy",
        ),
        (
            {"use_devices_file": True},
            {"duplicates": ("/dev/b",)},
            "LVM sees physical volumes of volume group ovirt-local twice (also on /dev/b), so it makes and"
            " removes nothing there : for device in /dev/b; do lvm lvmdevices --deldev $device; done"
            " # or detach the copy",
        ),
        (
            {"volume_list": ("other",)},
            {},
            "LVM's activation/volume_list lacks volume group ovirt-local, so no local disk is active : "
            """printf '%s\\n' 'activation { volume_list = [ "other", "ovirt-local" ] }'"""
            " >> /etc/lvm/lvmlocal.conf",
        ),
        (
            {"read_only_volume_list": ("ovirt-local", "x")},
            {},
            "LVM's activation/read_only_volume_list has volume group ovirt-local, so no local disk can be"
            """ written to : printf '%s\\n' 'activation { read_only_volume_list = [ "x" ] }'"""
            " >> /etc/lvm/lvmlocal.conf",
        ),
    ],
)
def test_lvms_configuration(settings: dict[str, Any], changes: dict[str, object], line: str) -> None:
    settings_of = replace(SETTINGS, **settings)
    assert lines(groups=(a_group(**changes),), lvm_settings=settings_of) == [line]  # type: ignore[arg-type]
    assert lines(lvm_settings=replace(SETTINGS, volume_list=("@local",))) == ["this host: good"]


@pytest.mark.parametrize("changes", [{}, {"vg": None}, {"duplicates": ("/dev/b",)}])
def test_multipath(changes: dict[str, object]) -> None:
    group = a_group(multipaths=(Multipath("mpath a", "3600"),), **changes)  # type: ignore[arg-type]
    (line,) = lines(groups=(group,))
    what, _, fix = line.partition(" : ")
    assert what == (
        "multipath device mpath a is under volume group ovirt-local, a local disk has only one path,"
        " and if that fails, multipath holds all writes back"
    )
    assert fix == (
        "printf '%s\\n' 'blacklist {' '  wwid \"3600\"' '}' | install -D -o root -g root -m 0644 /dev/stdin"
        " /etc/multipath/conf.d/localdisk-ovirt-local.conf && vgchange -an ovirt-local"
        " && { multipath -f 'mpath a' || dmsetup remove --retry 'mpath a'; } && { multipathd reconfigure;"
        " udevadm trigger --settle --subsystem-match=block; vgchange -aay ovirt-local; }"
    )


def test_physical_volumes_that_lvm_may_not_use() -> None:
    fake = FakeHost()
    fake.unallocatable = [{"pv_name": "/dev/sdb", "pv_free": "4194304"}]
    assert lines(groups=(a_group(fake, ("/dev/sda", "/dev/sdb")),))[0] == (
        "hint: LVM may allocate nothing on /dev/sdb of volume group ovirt-local, so what is free there does"
        " not count : pvchange --devices /dev/sda,/dev/sdb -x y /dev/sdb"
    )
    fake.unallocatable[0]["pv_free"] = "0"
    assert lines(groups=(a_group(fake),)) == ["this host: good"]


def test_disks_marked_in_the_future() -> None:
    fake = FakeHost()
    fake.add(VOLUME, tags(f"STOPPED_{NOW:.0f}0", "UNNEEDED_1"))
    group = a_group(fake)
    assert lines(groups=(group,)) == [
        f"local disk ovirt-local/{VOLUME} has the tag STOPPED_20000000000, a time in the future, gc never"
        " removes it"
        " : lvchange --deltag STOPPED_20000000000 --addtag STOPPED_$(date +%s)"
        f" ovirt-local/{VOLUME} # if date shows the right time"
    ]
    (line,) = lines(groups=(group,), now=5.0)
    assert line.startswith("the clock of this host is before"), "a wrong clock says nothing about the tags"


def test_a_template_used_in_the_future() -> None:
    fake = FakeHost()
    fake.add(VOLUME, {"localdisk", f"TEMPLATE_{OTHER_VM}", f"USED_{NOW:.0f}0"}, lv_active="")
    (line,) = lines(groups=(a_group(fake, ("/dev/a",)),))
    assert line.startswith(
        f"template LV ovirt-local/{VOLUME} has the tag USED_20000000000, a time in the future, "
    )
    assert " : lvchange --devices /dev/a --deltag USED_20000000000 --addtag USED_$(date +%s) " in line


# -- the template cache

POOL = "ovirt-local/pool0"
ON_RESERVE = "cache: {templates: on, max_size: 50%}\nmargins: {reserve: 60%}\n"
ON_THIN = "cache: {templates: on, max_size: 80%}\nmargins: {thin_data: 75%}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            ON_RESERVE,
            "cache.max_size is 4 GiB of volume group ovirt-local, margins.reserve leaves 3.2 GiB, so the"
            " cache can never use 818.8 MiB of it : write cache.max_size: 40% or less in /etc/localdisk.yaml",
        ),
        (
            f"{ON_THIN}backend: lvmthin\n",
            f"cache.max_size is 819.2 MiB of thin pool {POOL}, margins.thin_data leaves 768 MiB, so the cache"
            " can never use 51.2 MiB of it : write cache.max_size: 75% or less in /etc/localdisk.yaml",
        ),
        (f"{ON_RESERVE}vms: {{{VM}: {{hotplug: shared}}}}\n", "cache.max_size is 4 GiB of volume group"),
        (f"{ON_RESERVE}vms: {{{VM}: {{backend: lvmthin}}}}\n", "cache.max_size is 4 GiB of volume group"),
        (
            f"margins: {{reserve: 60%}}\nvms: {{{VM}: {{cache: {{templates: on}}}}}}\n",
            "cache.max_size is 4 GiB of volume group",
        ),
        (ON_RESERVE.replace("on,", "off,"), "this host: good"),
        (f"{ON_RESERVE}backend: lvmthin\n", "this host: good"),
        (ON_THIN, "this host: good"),
        ("cache: {templates: on, max_size: 100%}\n", "this host: good"),
        (ON_RESERVE.replace("60%", "50%"), "this host: good"),
        (ON_RESERVE.replace("50%", "40%"), "this host: good"),  # a byte is no problem
    ],
)
def test_a_cache_that_the_margins_leave_no_room_for(text: str, expected: str) -> None:
    (line,) = lines(text)
    assert line.startswith(expected)


def test_a_vm_s_cache_in_a_group_of_its_own() -> None:
    own = f"cache: {{templates: off}}\nvms: {{{VM}: {{volume_group: own, cache: {{templates: on}}}}}}\n"
    vg = VolumeGroup.from_report(FakeHost().report())
    groups = (
        a_group(),
        Group("own", (), replace(vg, vg_name="own"), pools={"pool0": PoolWatch(True, False)}),
    )
    rules = tuple(a_file(path, text=files.udev_rule(["ovirt-local", "own"])) for path in files.UDEV_RULES)
    assert lines(own, groups=groups, udev_rules=rules) == ["this host: good"]


# -- thin pools


def test_no_thin_pool() -> None:
    empty = FakeHost(report("empty"))
    assert lines(groups=(a_group(empty),)) == ["this host: good"], "nobody asked for one"
    make, then = "lvcreate --type thin-pool --chunksize 64k -l 90%FREE -n pool0", "lvchange --errorwhenfull y"
    create, why = f"{make} ovirt-local && {then} {POOL}", "thin local disks are made in it"
    line = f"no thin pool {POOL}, {why} : {create}"
    assert lines("backend: lvmthin\n", groups=(a_group(empty),)) == [line]
    assert lines(f"vms: {{{VM}: {{backend: lvmthin}}}}\n", groups=(a_group(empty),)) == [line]
    on_device = f"{make} --devices /dev/a ovirt-local && {then} --devices /dev/a {POOL}"
    assert lines("backend: lvmthin\ndevices: [/dev/a]\n", groups=(a_group(empty, ("/dev/a",)),)) == [
        f"no thin pool {POOL}, {why} : {on_device}"
    ]
    empty.add("pool0")
    assert lines(groups=(a_group(empty),)) == [
        f"{POOL} is no thin pool, {why} : lvrename ovirt-local pool0 pool0.old && {create}"
    ]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"lv_active": "", "data_percent": "", "metadata_percent": ""},
            f"thin pool {POOL} is not active, so LVM does not report how full it is, and no thin disk is made"
            f" : lvchange --activate n {POOL}_tmeta {POOL}_tdata; lvchange --activate y {POOL}",
        ),
        (
            {"data_percent": ""},
            f"thin pool {POOL} is active, but LVM does not report how full it is, its metadata may be"
            " damaged : lvchange"
            f" --activate n {POOL} && lvchange --activate y {POOL} || lvconvert --repair {POOL}"
            f" && lvchange --activate y {POOL}",
        ),
    ],
)
def test_a_silent_thin_pool(fields: dict[str, str], line: str) -> None:
    fake = FakeHost()
    for name, value in fields.items():
        setattr(fake.volumes["pool0"], name, value)
    assert lines(groups=(a_group(fake),)) == [line]


def test_a_thin_pool_that_does_not_zero() -> None:
    assert lines(groups=(a_group(FakeHost(report("not-zeroing"))),)) == [
        f"thin pool {POOL} does not zero new blocks, a disk would show other disks' old data"
        f" : lvchange --zero y {POOL}"
    ]


def test_a_thin_pool_with_large_blocks() -> None:
    fake = FakeHost()
    for size, is_said in ((512 << 10, False), (1 << 20, True)):
        fake.pools["pool0"]["chunk_size"] = str(size)
        hint = (
            f"hint: thin pool {POOL} gives disks blocks of 1 MiB, scattered data of a guest can take up to"
            " 16 times their size : when you make the pool anew, use lvcreate --chunksize 64k"
        )
        assert lines(groups=(a_group(fake),)) == [*([hint] if is_said else []), "this host: good"]


@pytest.mark.parametrize(
    ("watch", "threshold", "is_good"),
    [
        (PoolWatch(True, False), 100, True),
        (PoolWatch(False, True), 80, True),
        (PoolWatch(False, True), 100, False),
        (PoolWatch(False, False), 80, False),
        (PoolWatch(False, True), None, False),
    ],
)
def test_a_thin_pool_when_it_is_full(watch: PoolWatch, threshold: int | None, is_good: bool) -> None:
    settings = None if threshold is None else LvmSettings(False, threshold)
    found = lines(groups=(a_group(pools={"pool0": watch}),), lvm_settings=settings)
    line = (
        f"thin pool {POOL} neither grows by itself nor fails writes when it is full, every VM on it"
        f" would hang for a minute or more : lvchange --errorwhenfull y {POOL}"
    )
    assert found == (["this host: good"] if is_good else [line])


# -- others' volumes, and discards that do nothing


def test_volumes_that_lvm_would_remove_along_with_a_disk() -> None:
    """A hint, until gc waits for them."""
    for more, head in (((), "hint: "), (("DELETING",), "")):
        fake = FakeHost()
        fake.add(VOLUME, tags(*more))
        fake.add("backup", (), origin=VOLUME)
        (line, *rest) = lines(groups=(a_group(fake),))
        what = f"backup depends on local disk ovirt-local/{VOLUME}, so the local disk is not removed"
        assert line == f"{head}{what} : remove backup when nobody needs it"
        assert rest == (["this host: good"] if head else [])


def test_physical_volumes_that_cannot_discard() -> None:
    for text, is_good in (
        ("", True),
        ("retention: {erase: zero}", True),
        ("{backend: lvmthin, retention: {erase: discard}}", True),  # what counts there is the pool
        ("retention: {erase: discard}", False),
        (f"vms: {{{VM}: {{retention: {{erase: discard}}}}}}", False),
    ):
        found = lines(text, groups=(a_group(no_discard=("/dev/sda", "/dev/sdb")),))
        what = "/dev/sda, /dev/sdb under volume group ovirt-local cannot discard"
        fix = "set retention.erase: zero in /etc/localdisk.yaml"
        line = f"{what}, erase: discard would leave the bytes there : {fix}"
        assert found == (["this host: good"] if is_good else [line]), text


@pytest.mark.parametrize("how", ["nopassdown", "ignore"])
def test_a_thin_pool_that_passes_no_discards_down(how: str) -> None:
    fake = FakeHost()
    fake.volumes["pool0"].kernel_discards = how
    assert lines(groups=(a_group(fake),)) == ["this host: good"]
    (line,) = lines("retention: {erase: discard}", groups=(a_group(fake),))
    assert f"thin pool pool0 passes no discards to its device ({how}), erase: discard leaves" in line


def test_what_devices_say_of_discards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A disk by its own queue, a partition by its disk's."""
    node = os.stat("/dev/null").st_rdev
    monkeypatch.setattr(device_mapper, "NUMBERS", str(tmp_path))
    number = tmp_path / f"{os.major(node)}:{os.minor(node)}"
    assert not device_mapper.can_discard("/dev/null")
    (tmp_path / "sda/sda1").mkdir(parents=True)
    (tmp_path / "sda/queue").mkdir()
    limit = tmp_path / "sda/queue/discard_max_bytes"
    for place in ("sda", "sda/sda1"):
        number.symlink_to(tmp_path / place)
        for text, can in (("0\n", False), ("4294966784\n", True), ("", False)):
            limit.write_text(text)
            assert device_mapper.can_discard("/dev/null") is can
        number.unlink()
    assert not device_mapper.can_discard("/nonexistent")


# -- what could not be asked


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (
            LibvirtSilent(problem="x"),
            "libvirt does not report which VMs run: x, so no local disk is removed, and no kept disk is used"
            " : systemctl restart virtqemud.socket || systemctl restart libvirtd",
        ),
        (
            VolumeGroupUnusable(vg="fast", problem="shared (sanlock)", fix="x"),
            "volume group fast is shared (sanlock), so no local disk can be made or changed : vgchange -y"
            " --config 'global{use_lvmlockd=1}' --lock-type none"
            " --lock-opt force fast # if no other host uses it",
        ),
        (
            CommandFailed(("lvm", "pvs", "a b"), 5, "no"),
            "lvm pvs failed (exit code 5): no, so this could not be checked"
            " : lvm pvs 'a b' # shows the whole message",
        ),
        (
            CommandTimeout(tool="lvm pvs", seconds=120),
            "lvm pvs did not end within 120 s, so this could not be checked : look for hung storage"
            " and hanging"
            " commands on this host (dmesg, multipath -ll, ps), then try again",
        ),
        (
            Unseen(path="/etc/x", problem="Permission denied"),
            "/etc/x cannot be looked at: Permission denied, so this could not be checked : ls -ld /etc/x",
        ),
    ],
)
def test_failures(failure: Exception, line: str) -> None:
    assert lines(failures=(failure,)) == [line]


def test_what_could_not_be_seen_is_not_missing() -> None:
    failures = tuple(Unseen(path=path, problem="x") for path in (files.CRON, *files.UDEV_RULES))
    assert len(lines(cron=None, udev_rules=(), failures=failures)) == 3


def test_an_ordinary_user() -> None:
    hint = (
        "hint: volume groups, thin pools, local disks and the sudo rule were not checked, only"
        " root sees them"
        f" : sudo {PROGRAM} check"
    )
    seen: dict[str, Any] = {"is_root": False, "groups": (), "lvm_settings": None, "rehearsal": None}
    assert lines(**seen) == [hint, "this host: good"]


# -- the configuration


def configured(text: str, known: Iterable[str] = (), group: Group | None = None) -> list[str]:
    parsed = config.parse(text.encode(), "F")
    tree_places = _places(text)
    seen = replace(GOOD, known_vms=frozenset(known), groups=(group or a_group(),))
    found = (*check_configuration(parsed, "F", tree_places), *strangers(parsed, seen, tree_places))
    return as_lines(Report("F", True, found, ())).splitlines()[:-1]


def _places(text: str) -> dict[str, str]:
    from localdisk.config_yaml import read_tree

    keys = read_tree(text.encode()).keys.items()
    return {".".join(map(str, steps)): f"F:{place.line}:{place.column}" for steps, place in keys}


def test_places(tmp_path: Path) -> None:
    path = tmp_path / "localdisk.yaml"
    path.write_text(f"vms:\n  {VM}: {{enabled: off}}\n")
    assert config.places(str(path)) == {
        "vms": f"{path}:1:1",
        f"vms.{VM}": f"{path}:2:3",
        f"vms.{VM}.enabled": f"{path}:2:42",
    }


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ["F: good"]),
        ("cache: {templates: on}\n", ["F: good"]),
        (f"vms: {{{VM}: {{cache: {{templates: on}}}}}}\n", ["F: good"]),
        (f"vms: {{{VM}: {{volume_group: x, cache: {{templates: on, max_size: 50%}}}}}}\n", ["F: good"]),
        (
            f"vms:\n  {VM}:\n    cache:\n      max_size: 9%\n      keep_for: 1d\n",
            [
                f"F:4:7: vms.{VM}.cache.max_size is for one VM alone, a template belongs to no VM, and gc"
                " applies cache.max_size to all templates : write cache.max_size instead",
                f"F:5:7: vms.{VM}.cache.keep_for is for one VM alone, a template belongs to no VM, and gc"
                " applies cache.keep_for to all templates : write cache.keep_for instead",
            ],
        ),
        (
            f"retention: {{keep_for: 1d}}\nvms:\n  {VM}: {{retention: {{keep_for: 24h}}, disks: all}}\n",
            [
                f"F:3:3: vms.{VM} changes nothing, the general settings are the same : remove the section",
            ],
        ),
        (f"vms:\n  {VM}: {{}}\n", [f"F:2:3: vms.{VM} changes nothing, the general settings are the same"]),
        (f"vms:\n  {VM}: {{backend: lvm}}\n", ["F: good"]),  # it wins over the VM's property
        (
            f"vms:\n  {VM}:\n    enabled: off\n    disks: [{OTHER_VM}]\n",
            [
                f"F:4:5: vms.{VM}.disks changes nothing, with enabled: off no disk of the VM is local"
                " : remove disks or enabled there"
            ],
        ),
    ],
)
def test_parts_that_do_nothing(text: str, found: list[str]) -> None:
    got = configured(text, known=[VM])
    assert len(got) == len(found)
    assert all(line.startswith(start) for line, start in zip(got, found))


def test_vms_that_nobody_knows() -> None:
    text = f"vms:\n  {VM}: {{enabled: off}}\n"
    assert configured(text) == [
        f"hint: F:2:3: neither libvirt nor a local disk knows VM {VM}, so it is stopped, or no longer"
        " on this host : remove the section if the engine has no such VM here",
        "F: good",
    ]
    fake = FakeHost()
    fake.add(VOLUME, tags())
    assert configured(text, group=a_group(fake)) == ["F: good"]
    assert configured(text, group=a_group(vg=None)) == ["F: good"], "its disks cannot be seen"
    unasked = replace(GOOD, known_vms=None)
    assert not list(strangers(config.parse(text.encode(), "F"), unasked, {}))


# -- what is printed


def test_json() -> None:
    problem, hint = Finding("a", "b", "c"), Finding("d", "e", "f", is_hint=True)
    shown = json.loads(as_json(Report("F", True, (hint,), (problem,))))
    assert shown == {
        "configuration": "F",
        "problems": [
            {"what": "d", "why": "e", "fix": "f", "hint": True},
            {"what": "a", "why": "b", "fix": "c", "hint": False},
        ],
    }
    assert json.loads(as_json(Report("F", False, (), ()))) == {"configuration": None, "problems": []}


def test_a_finding_is_one_plain_line() -> None:
    found = Finding("a\nb\x1b\udcff", "c", "d")
    assert as_lines(Report("F", True, (found,), ())).splitlines()[0] == "a\\nb\\x1b\\udcff, c : d"


@pytest.mark.parametrize(("findings", "is_problem"), [((), False), ((True,), False), ((True, False), True)])
def test_hints_do_not_count(findings: Sequence[bool], is_problem: bool) -> None:
    found = tuple(Finding("a", "b", "c", is_hint) for is_hint in findings)
    for report_ in (Report("F", True, found, ()), Report("F", True, (), found)):
        assert report_.is_problem == is_problem
        is_silent = as_lines(report_) == "F: good\nthis host: good\n"
        assert is_silent == (not findings)


# -- looking


class Door:
    """Answers tools by the beginning of their command line; an Exception is raised."""

    def __init__(self, answers: dict[str, str | Exception]) -> None:
        self.answers = answers
        self.commands: list[str] = []

    def run(self, argv: Sequence[str], **_: object) -> str:
        command = shlex.join(without_settings(argv))
        self.commands.append(command)
        best = max((start for start in self.answers if command.startswith(start)), key=len)
        answer = self.answers[best]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def begin(self, argv: Sequence[str]) -> SimpleNamespace:
        return SimpleNamespace(output=lambda *_: self.run(argv))


PVS = json.dumps(
    {
        "report": [
            {
                "pv": [
                    {"pv_name": "/dev/sda", "vg_name": "ovirt-local", "pv_duplicate": ""},
                    {"pv_name": "[unknown]", "vg_name": "ovirt-local", "pv_duplicate": ""},
                    {"pv_name": "/dev/sdx", "vg_name": "other", "pv_duplicate": ""},
                ]
            }
        ]
    }
)
LVS = json.dumps(
    {"report": [{"lv": [{"lv_name": "pool0", "lv_when_full": "error", "seg_monitor": "not monitored"}]}]}
)
LVMCONFIG = (
    'devices {\n\tscan_lvs=0\n\tuse_devicesfile=0\n\tdir="/dev"\n}\n'
    "activation {\n\tthin_pool_autoextend_threshold=80\n}\n"
)


def ovirt_local(name: str = "pool-only") -> str:
    fake = FakeHost(report(name))
    fake.vg["vg_name"] = "ovirt-local"
    return fake.report()


@pytest.fixture(name="door")
def fixture_door(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Door:
    """A host whose files are in tmp_path, and whose tools answer well."""
    door = Door(
        {
            "lvm version": "  LVM version:     2.03.16(2) (2022-05-18)\n",
            "lvm lvmconfig": LVMCONFIG,
            "lvm fullreport": ovirt_local(),
            "lvm pvs": PVS,
            "lvm lvs": LVS,
            "qemu-img --version": "qemu-img version 7.2.22 (Debian 1:7.2)\nCopyright\n",
            "visudo": "",
            "virsh": f"{VM}\n\n",
            f"{PROGRAM} rehearsal": json.dumps({"sudo": "", "libvirt": "", "disks": []}),
        }
    )
    monkeypatch.setattr(run, "run", door.run)
    monkeypatch.setattr(run, "begin", door.begin)
    monkeypatch.setattr(run, "tool_exists", lambda _tool: True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(daemons, "running", lambda: frozenset({"systemd-udevd", "cron"}))
    for name in ("HOOKS", "CRON", "SUDOERS"):
        monkeypatch.setattr(files, name, str(tmp_path / name.lower()))
    monkeypatch.setattr(device_mapper, "NAMES", str(tmp_path / "block"))
    rules = tuple(str(tmp_path / os.path.basename(path)) for path in files.UDEV_RULES)
    monkeypatch.setattr(files, "UDEV_RULES", rules)
    monkeypatch.setattr(lock, "RUN", str(tmp_path / "run"))
    users = {"vdsm": (36, 36), "qemu": (107, 107)}
    monkeypatch.setattr(
        pwd,
        "getpwnam",
        lambda name: SimpleNamespace(pw_name=name, pw_uid=users[name][0], pw_gid=users[name][1]),
    )
    groups = {"kvm": 36, "qemu": 107}
    monkeypatch.setattr(grp, "getgrnam", lambda name: SimpleNamespace(gr_name=name, gr_gid=groups[name]))
    monkeypatch.setattr(os, "getgrouplist", lambda _name, gid: [gid, 107])
    return door


def look(text: str = "", program: str = PROGRAM) -> Host:
    return facts.collect(config.parse(text.encode(), "F"), program)


def test_looking(door: Door) -> None:
    began = time.time()
    seen = look()
    assert seen.failures == ()
    assert (seen.lvm_version, seen.qemu_img_version) == ((2, 3, 16), (7, 2))
    assert (seen.accounts, seen.known_vms) == (ACCOUNTS, frozenset({VM}))
    assert seen.rehearsal == Rehearsal()
    assert (seen.hooks, seen.cron, seen.udev_rules, seen.run_directory) == ((), None, (), None)
    assert seen.lvm_settings == LvmSettings(
        False, autoextend_threshold=80, filters={"filter": (), "global_filter": ()}
    )
    (group,) = seen.groups
    assert group.vg
    assert (group.hidden, group.multipaths, group.pools) == ((), (), {"pool0": PoolWatch(True, False)})
    assert began <= seen.now <= time.time()
    assert door.commands[-1] == f"{PROGRAM} rehearsal {NOBODY}=lvm {NOBODY}=lvmthin"


def test_udevd_that_does_not_run(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """No disk is tried: LVM would wait for ever."""
    monkeypatch.setattr(daemons, "running", lambda: frozenset({"crond"}))
    assert look().rehearsal is None
    assert [command for command in door.commands if "rehearsal" in command] == []


def test_directories_that_are_looked_at(door: Door, tmp_path: Path) -> None:
    hooks = tmp_path / "hooks"
    (hooks / "before_vm_start").mkdir(parents=True)
    (hooks / "file").touch()
    found = [entry.path for entry in look().hook_directories]
    assert found == [str(path) for path in (hooks, tmp_path, *tmp_path.parents, hooks / "before_vm_start")]
    assert door.commands


def test_looking_as_an_ordinary_user(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 36)
    seen = look()
    assert (seen.is_root, seen.groups, seen.lvm_settings, seen.rehearsal) == (False, (), None, None)
    assert [command.split()[0] for command in door.commands] == ["lvm", "qemu-img", "virsh"]


def test_a_tool_that_is_missing_is_not_run(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "tool_exists", lambda _tool: False)
    seen = look()
    assert seen.missing_tools == tuple(facts.PACKAGES)
    assert (door.commands, seen.has_dnf, seen.failures) == ([], False, ())


def test_everything_fails(door: Door) -> None:
    """Each is one failure, and nothing is lost of the others."""
    door.answers = {"": CommandTimeout(tool="x", seconds=5), "qemu-img": "nonsense", "lvm version": "LVM 3\n"}
    seen = look()
    assert [type(failure) for failure in seen.failures] == [
        CommandTimeout,  # lvmconfig
        CommandTimeout,  # the volume group
        CommandTimeout,  # other groups
        CommandFailed,
        CommandFailed,
        LibvirtSilent,
        CommandTimeout,  # visudo
        CommandTimeout,  # sudo
    ]
    assert all("Traceback" not in line for line in lines(failures=seen.failures))


def test_a_signal_ends_it(door: Door) -> None:
    door.answers["lvm version"] = Interrupted(signal="SIGTERM")
    with pytest.raises(Interrupted):
        look()


@pytest.mark.parametrize("answer", ["", "{}", '{"report": []}', '{"report": [{"lv": []}]}', "[]"])
def test_a_report_that_is_not_understood(door: Door, answer: str) -> None:
    door.answers["lvm pvs"] = answer
    (failure,) = look().failures
    assert str(failure).startswith("lvm pvs failed")


def test_sudo_is_tried(door: Door) -> None:
    said = {"sudo": "s : t", "libvirt": "l : m", "disks": ["h : i"]}
    door.answers[f"{PROGRAM} rehearsal"] = json.dumps(said)
    assert look().rehearsal == Rehearsal("s : t", "l : m", ("h : i",))
    for answer in ("", "[]", "{}", CommandMissing(tool=PROGRAM)):
        door.answers[f"{PROGRAM} rehearsal"] = answer
        seen = look()
        assert (seen.rehearsal, len(seen.failures)) == (None, 1)


def test_accounts_that_are_missing(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> object:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwnam", missing)
    monkeypatch.setattr(grp, "getgrnam", missing)
    seen = look()
    assert seen.accounts == Accounts({}, {}, frozenset())
    assert seen.rehearsal is None, "as whom?"


def test_files(door: Door, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.touch(0o755)
    point = tmp_path / "hooks/before_vm_start"
    point.mkdir(parents=True)
    (tmp_path / "hooks/README").touch()
    (point / "50_localdisk").symlink_to(program)
    (point / "40_dangling").symlink_to("nothing")
    (point / "30_data").touch(0o644)
    (point / "20_directory").mkdir()
    (tmp_path / "cron").write_text("text\n")
    (tmp_path / "run").mkdir()
    door.answers[str(program)] = json.dumps({"sudo": "", "libvirt": "", "disks": []})
    seen = look(program=str(program))
    assert seen.hooks == (Hook("before_vm_start", str(point / "50_localdisk"), str(program)),)
    assert [entry.path for entry in seen.program_path] == [str(program), *map(str, program.parents)]
    assert seen.cron
    assert (seen.cron.text, seen.cron.is_directory) == ("text\n", False)
    assert seen.run_directory
    assert seen.run_directory.is_directory


def test_a_file_that_may_not_be_read(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.lstat

    def refuse(path: str) -> os.stat_result:
        if path == files.CRON:
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "lstat", refuse)
    (failure,) = look().failures
    assert str(failure).startswith(f"{files.CRON} cannot be looked at: Permission denied")


# -- looking at volume groups


def test_a_group_that_is_not_there(door: Door) -> None:
    missing = '  Volume group "ovirt-local" not found\n'
    door.answers["lvm fullreport"] = CommandFailed(("lvm", "fullreport"), 5, missing)
    (group,) = look().groups
    assert (group.vg, group.disks, group.hidden) == (None, (), ())


def test_a_group_outside_of_the_devices_file(door: Door) -> None:
    door.answers["lvm lvmconfig"] = "use_devicesfile=1\n"
    pvs = "lvm pvs --reportformat json --all -o pv_name,vg_name,pv_duplicate"
    door.answers[pvs] = '{"report": [{"pv": []}]}'
    door.answers[f"{pvs} --devicesfile ''"] = PVS
    (group,) = look().groups
    assert group.hidden == ("/dev/sda",)
    (group,) = look("devices: [/dev/sda]\n").groups
    assert group.hidden == (), "devices of the configuration are used whatever the file says"
    assert f"{pvs} --devices /dev/sda" in door.commands


def test_what_no_gc_looks_at() -> None:
    (line,) = lines(unnamed_groups={"old": 2})
    assert line.startswith("volume group old has 2 local disk(s) or template LV(s)")


def test_disks_in_a_group_that_the_configuration_does_not_name(door: Door) -> None:
    rows = [("ovirt-local", VOLUME), ("old", VOLUME), ("old", VM), ("foreign", "lv1")]
    listed = [{"vg_name": group, "lv_name": name} for group, name in rows]
    door.answers["lvm lvs --reportformat json -o vg_name,lv_name"] = json.dumps({"report": [{"lv": listed}]})
    host = look()
    assert host.unnamed_groups == {"old": 2}
    assert look(f"vms: {{{VM}: {{volume_group: old}}}}").unnamed_groups == {}


def mapping(tmp_path: Path, name: str, uuid: str, **relations: str) -> None:
    """A block device in sysfs; relations: slaves and holders."""
    (tmp_path / "block" / name / "dm").mkdir(parents=True)
    (tmp_path / "block" / name / "dm/uuid").write_text(f"{uuid}\n")
    (tmp_path / "block" / name / "dm/name").write_text(f"name of {name}\n")
    for relation, others in relations.items():
        for other in others.split():
            (tmp_path / "block" / name / relation / other).mkdir(parents=True)


def test_multipath_at_above_and_under_a_device(door: Door, tmp_path: Path) -> None:
    mapping(tmp_path, "dm-0", "mpath-3600")
    mapping(tmp_path, "dm-1", "part1-mpath-3600", slaves="dm-0")
    mapping(tmp_path, "dm-9", "LVM-xyz")
    (tmp_path / "block/sda/holders/dm-9").mkdir(parents=True)
    assert look().groups[0].multipaths == ()
    found = (Multipath("name of dm-0", "3600"),)
    for device in ("dm-0", "dm-1"):
        door.answers["lvm pvs"] = PVS.replace("/dev/sda", f"/dev/{device}")
        assert look().groups[0].multipaths == found
    door.answers["lvm pvs"] = PVS.replace("/dev/sda", "/dev/nothing")
    (tmp_path / "block/sda/holders/dm-0").mkdir()
    assert look("devices: [/dev/sda]\n").groups[0].multipaths == found, "multipath has grabbed it"


def test_owners_of_nodes(door: Door, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeHost(ovirt_local("empty"))
    right, wrong = VOLUME, VOLUME.replace("1", "3")
    for name, active in ((right, "active"), (wrong, "active"), (VOLUME.replace("1", "4"), "")):
        fake.add(name, tags(), lv_active=active)
    door.answers["lvm fullreport"] = fake.report()
    modes = {right: (36, 107, 0o660), wrong: (0, 6, 0o660)}
    monkeypatch.setattr(storage_facts, "_mode", lambda path: modes.get(path.rpartition("/")[2]))
    assert look().groups[0].misowned == (f"/dev/ovirt-local/{wrong}",)
    del modes[right]  # it has no node
    assert len(look().groups[0].misowned) == 2


def test_mode_of_a_node(tmp_path: Path) -> None:
    assert storage_facts._mode(str(tmp_path / "nothing")) is None
    file = tmp_path / "file"
    file.touch()
    file.chmod(0o640)
    assert storage_facts._mode(str(file)) == (os.getuid(), os.getgid(), 0o640)


# -- all of it


def test_check(door: Door, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "localdisk.yaml"
    monkeypatch.setattr(config, "DEFAULT_PATH", str(path))
    rules = tuple(replace(rule, path=path) for rule, path in zip(RULES, files.UDEV_RULES))
    looked: list[bool] = []

    def collect(_config: object, _program: str, tries_starts: bool) -> Host:
        looked.append(tries_starts)
        return replace(GOOD, udev_rules=rules)

    monkeypatch.setattr(facts, "collect", collect)
    found = check.check(config.load(), None, PROGRAM)
    assert as_lines(found) == f"{path}: does not exist, the built-in defaults apply\nthis host: good\n"
    path.write_text(f"vms:\n  {VM}: {{}}\n")
    found = check.check(config.load(), None, PROGRAM)
    assert [finding.what for finding in found.about_configuration] == [
        f"{path}:2:3: vms.{VM} changes nothing",
        f"{path}:2:3: neither libvirt nor a local disk knows VM {VM}",
    ]
    assert (found.is_problem, found.about_host) == (True, ())
    other = tmp_path / "new.yaml"
    other.write_text("{}\n")
    assert as_lines(check.check(config.load(str(other)), str(other), PROGRAM)) == (
        f"hint: no start was tried with {other}, because starts go by {path} alone"
        f" : install -m 0644 {other} {path} && {PROGRAM} check\n{other}: good\nthis host: good\n"
    )
    assert looked == [True, True, False]
