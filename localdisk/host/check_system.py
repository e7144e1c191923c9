"""Checks a host: pure functions of what `facts.py` has collected; each finding has a fix."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import stat
from collections.abc import Iterator

from localdisk import daemons
from localdisk.config import Config
from localdisk.errors import CommandFailed, Error, LibvirtSilent, VolumeGroupUnusable
from localdisk.host import files
from localdisk.host.check_storage import check_content, check_group, unshare_command
from localdisk.host.facts import PACKAGES, Entry, Host, Rehearsal
from localdisk.host.finding import Finding
from localdisk.vdsm.hook_call import POINTS

# lvm.py runs `lvm fullreport`, which came with 2.02.158; --devices came with 2.03.12.
LVM_FULLREPORT = (2, 2, 158)
LVM_DEVICES = (2, 3, 12)
# copy.py: convert --target-is-zero came with QEMU 5.0, convert -r (copy.bandwidth) with 5.2.
QEMU_IMG = (5, 2)


def check_host(config: Config, host: Host) -> Iterator[Finding]:
    """All findings about the host, causes before their effects."""
    has_cause = False
    for finding in _causes(config, host):
        has_cause = has_cause or not finding.is_hint
        yield finding
    if not has_cause:
        yield from _rehearsal(host)
    yield from _others(config, host)


def _causes(config: Config, host: Host) -> Iterator[Finding]:
    """Findings that keep VMs from starting, and so explain why the trial of a start fails."""
    yield from _tools(host)
    yield from _versions(config, host)
    yield from _accounts(host)
    yield from _udevd(host)
    directory, ways = tuple(_run_directory(host)), tuple(_program(host))
    yield from directory
    yield from ways
    if not ways:
        yield from _sudo(host, is_explained=bool(directory))
    yield from _udev(config, host)
    for group in host.groups:
        yield from check_group(group, config, host.lvm_settings)
    for failure in host.failures:
        if not (ways and failure.fields.get("tool") == host.program):
            yield _failure(failure)


def _others(config: Config, host: Host) -> Iterator[Finding]:
    yield from _hook_directories(host)
    yield from _check_hooks(host)
    yield from _older_rules(host)
    yield from _cron(host)
    yield from _scan_lvs(host)
    yield from _clock(host)
    for group in host.groups:
        yield from check_content(group, config, _program_time(host), host.now)
    for name, count in host.unnamed_groups.items():
        what = (
            f"volume group {name} has {count} local disk(s) or template LV(s), and the configuration lacks it"
        )
        fix = f"set volume_group: {name}, in the section of one VM (vms) at least, until they are removed"
        yield Finding(what, "so no stop, gc, status or remove looks at them", fix)
    if not host.is_root:
        what = "volume groups, thin pools, local disks and the sudo rule were not checked"
        yield Finding(what, "only root sees them", f"sudo {shlex.quote(host.program)} check", is_hint=True)


def _tools(host: Host) -> Iterator[Finding]:
    for tool in host.missing_tools:
        yield Finding(f"{tool} is not installed", "localdisk runs it", _install(host, tool))


def _versions(config: Config, host: Host) -> Iterator[Finding]:
    lvm, qemu_img = host.lvm_version, host.qemu_img_version
    if lvm and lvm < LVM_FULLREPORT:
        why = "lvm fullreport came with 2.02.158"
        yield Finding(f"LVM is {lvm[0]}.{lvm[1]:02}.{lvm[2]}", why, _install(host, "lvm"))
    elif lvm and lvm < LVM_DEVICES and any(config.volume_groups.values()):
        why = "the option --devices, which `devices` in the configuration needs, came with 2.03.12"
        yield Finding(f"LVM is {lvm[0]}.{lvm[1]:02}.{lvm[2]}", why, _install(host, "lvm"))
    if qemu_img and qemu_img < QEMU_IMG:
        why = "convert --target-is-zero (thin disks) came with 5.0, convert -r (copy.bandwidth) with 5.2"
        yield Finding(f"qemu-img is {qemu_img[0]}.{qemu_img[1]}", why, _install(host, "qemu-img"))


def _install(host: Host, tool: str) -> str:
    """The command that installs or updates the package of a tool."""
    of_el, of_debian = PACKAGES[tool]
    return f"dnf install -y --best {of_el}" if host.has_dnf else f"apt-get install -y {of_debian}"


# As the packages of vdsm and qemu make them; the numbers are fixed by oVirt.
_GROUPS = {"kvm": 36, "qemu": 107}
_USERS = {
    "vdsm": "useradd -r -u 36 -g kvm -G qemu -M -d / -s /sbin/nologin vdsm # or dnf install vdsm",
    "qemu": "useradd -r -u 107 -g qemu -G kvm -M -d / -s /sbin/nologin qemu # or dnf install qemu-kvm",
}


def _accounts(host: Host) -> Iterator[Finding]:
    accounts = host.accounts
    for group, number in _GROUPS.items():
        if group not in accounts.groups:
            fix = f"groupadd -r -g {number} {group}"
            yield Finding(f"there is no group {group}", "local disks belong to vdsm:qemu", fix)
    for user, fix in _USERS.items():
        if user not in accounts.users:
            yield Finding(f"there is no user {user}", "hooks run as vdsm, VMs as qemu", fix)
    for group in sorted(accounts.groups) if "vdsm" in accounts.users else ():
        if group not in accounts.of_vdsm:
            why = "it reads shared storage and writes local disks through its groups"
            yield Finding(f"user vdsm is not in group {group}", why, f"usermod -aG {group} vdsm")


# -- the program and who may run it


def _program(host: Host) -> Iterator[Finding]:
    """Findings if a user other than root can change the program, or vdsm cannot run it."""
    program, quoted = host.program, shlex.quote(host.program)
    others = [entry for entry in host.program_path if not entry.is_roots_alone]
    why = "root runs this program, so whoever can change it is root"
    if others and not program.startswith(("/usr/", "/opt/")):
        what = f"{program} is in a directory that others than root can write to ({others[-1].path})"
        fix = f"install -D -o root -g root -m 0755 {quoted} {files.PROGRAM}"
        fix += f" && {files.PROGRAM} install && {files.PROGRAM} check"
        yield Finding(what, why, fix)
        return
    for entry in others:
        path = shlex.quote(entry.path)
        fix = f"chown root:root {path} && chmod go-w {path}"
        yield Finding(f"{_owned(entry)} can be written by others than root", why, fix)
    for entry in host.program_path:
        needed = 0o001 if entry.is_directory else 0o005
        if entry.mode & needed != needed:
            fix = f"chmod {'o+x' if entry.is_directory else '0755'} {shlex.quote(entry.path)}"
            yield Finding(f"{_owned(entry)} is closed to other users", "vdsm cannot run the program", fix)


def _install_ours(host: Host) -> str:
    """The command that installs the program with its rules and links."""
    fix = f"{shlex.quote(host.program)} install"
    return fix if host.program == files.PROGRAM else f"{fix} && {files.PROGRAM} check"


def _owned(entry: Entry) -> str:
    return f"{entry.path} (user {entry.uid}, mode {stat.S_IMODE(entry.mode):04o})"


def _sudo(host: Host, is_explained: bool) -> Iterator[Finding]:
    """`is_explained`: another finding explains why the helper ends without an answer."""
    problem = host.rehearsal.sudo if host.rehearsal else ""
    if problem and not is_explained:
        yield _no_helper(host, problem)
    elif host.sudoers and host.sudo_options is not None and not _has_our_rule(host):
        what = f"{files.SUDOERS} is not the rule that localdisk needs, no more and no less"
        why = "vdsm could reach root with more than it needs, or a setting for all commands break a start"
        yield Finding(what, why, _install_ours(host))


def _has_our_rule(host: Host) -> bool:
    rule = files.sudoers(host.program, host.sudo_options or ())
    return host.sudoers is not None and _rules(host.sudoers.text) == _rules(rule)


def _no_helper(host: Host, problem: str) -> Finding:
    """The finding that vdsm cannot run the helper; its fix depends on sudo's message."""
    said, _, fix = problem.partition(" : ")
    said = said.replace("cannot run the privileged helper: ", "")
    if fix.startswith("check the sudo rule"):
        fix = _install_ours(host)
        if _has_our_rule(host):
            fix = "sudo -l -U vdsm # shows the rule or setting of another file that takes the place of ours"
    what = f"vdsm cannot run `sudo {host.program} helper` ({said})"
    return Finding(what, "without it no local disk is made", fix)


def _rehearsal(host: Host) -> Iterator[Finding]:
    """The errors that user vdsm got in the trial of a start."""
    found = host.rehearsal or Rehearsal()
    for message in (found.libvirt, *found.disks):
        if message:
            what, _, fix = message.partition(" : ")
            yield Finding(f"user vdsm tried a start: {what}", "so no VM can start from local disks", fix)


def _rules(text: str) -> set[str]:
    """The lines of a sudoers file without comments; `#include` and `#UID` are no comments."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return {line for line in lines if line and not re.match(r"#(?!include)(?!\d)", line)}


# -- vdsm's hooks


def _check_hooks(host: Host) -> Iterator[Finding]:
    ours = {hook.path: hook.point for hook in host.hooks if hook.target == host.program}
    taken = {hook.path: hook for hook in host.hooks if hook.path == files.hook_link(hook.point)}
    missing = sorted(POINTS - set(ours.values()))
    fix = _install_ours(host)
    for path, hook in taken.items():
        if path not in ours and hook.point in missing:
            missing.remove(hook.point)
            what = f"{path} leads to {hook.target}, not to {host.program}"
            if hook.target == path:
                what = f"{path} is a file of its own, not a link to {host.program}"
            yield Finding(what, "vdsm does not call it there", fix)
    if missing:
        what = f"no hook at {', '.join(missing)} leads to {host.program}"
        yield Finding(what, "vdsm does not call it there", fix)
    for path, point in ours.items():
        again = [other for other, its in ours.items() if its == point and other < path]
        if point not in POINTS:
            yield Finding(f"{path} leads to {host.program}", "it serves no such point", fix)
        elif again:
            yield Finding(f"{path} does the work of {again[0]}", "vdsm calls it twice", fix)
    replaced = {files.hook_link(point) for point in POINTS}
    for hook in host.hooks:
        name = os.path.basename(hook.path)
        if hook.path not in ours and hook.path not in replaced and "localdisk" in name.lower():
            what = f"{hook.path} is another hook for local disks"
            yield Finding(what, "two of them copy twice", f"{fix} # moves it to {files.HOOKS_ASIDE}")


def _hook_directories(host: Host) -> Iterator[Finding]:
    """vdsm looks for hooks as user vdsm, and finds none where it may not look (lib/vdsm/common/hooks.py)."""
    for directory in host.hook_directories:
        is_ours = os.path.basename(directory.path) in POINTS or files.HOOKS.startswith(directory.path)
        if is_ours and not _vdsm_may_list(directory, host):
            fix = f"chmod o+rx {shlex.quote(directory.path)}"
            yield Finding(f"vdsm may not look into {_owned(directory)}", "so it runs no hook there", fix)


def _vdsm_may_list(directory: Entry, host: Host) -> bool:
    accounts = host.accounts
    if directory.uid == accounts.users.get("vdsm"):
        bits = directory.mode >> 6
    elif directory.gid in {accounts.groups[name] for name in accounts.of_vdsm}:
        bits = directory.mode >> 3
    else:
        bits = directory.mode
    return bits & 0o5 == 0o5


_OLDER_RULES = {
    files.OLDER_SUDOERS: "vdsm may run that hook's helper as root, which removes any LV",
    files.OLDER_UDEV_RULE: "every LV of the group would be vdsm's",
}


def _older_rules(host: Host) -> Iterator[Finding]:
    """Rules of the hook in vdsm's package; `_check_hooks` finds its scripts."""
    for path, why in _OLDER_RULES.items():
        if path in host.older_files:
            what = f"{path} belongs to the localdisk hook of vdsm's package"
            yield Finding(what, why, f"{_install_ours(host)} # moves it aside")


# -- cron, udev, the clock


def _udevd(host: Host) -> Iterator[Finding]:
    if host.daemons is not None and not host.daemons & daemons.UDEVD:
        fix = "systemctl restart systemd-udevd && dmsetup udevcomplete_all -y"
        yield Finding("systemd-udevd does not run", "LVM waits for it when it makes a disk", fix)


def _cron(host: Host) -> Iterator[Finding]:
    fix = _install_ours(host)
    why = "gc would only run when vdsm starts"
    if host.daemons is not None and not host.daemons & daemons.CRON and not host.has_cron_timers:
        install = "dnf install -y cronie" if host.has_dnf else "apt-get install -y cron"
        start = f"systemctl enable --now {'crond' if host.has_dnf else 'cron'}"
        yield Finding("no cron daemon runs", why, f"{install} && {start}")
    if host.cron is None:
        if not _failed(host, files.CRON):
            yield Finding(f"there is no {files.CRON}", why, fix)
    elif not host.cron.is_roots_alone or not stat.S_ISREG(host.cron.mode):
        yield Finding(f"cron ignores {_owned(host.cron)}", why, fix)
    elif not any(_runs_gc(line, host.program) for line in host.cron.text.splitlines()):
        yield Finding(f"{files.CRON} does not run `{host.program} gc` as root", why, fix)


def _runs_gc(line: str, program: str) -> bool:
    """Whether a line of a cron file runs gc: five fields of time or @word, the user, the command."""
    found = re.fullmatch(r"\s*(?:@\w+|(?:[\d*,/\-A-Za-z]+\s+){4}[\d*,/\-A-Za-z]+)\s+root\s+(.*)", line)
    words = found[1].split() if found else []
    return words[1:2] == ["gc"] and os.path.realpath(words[0]) == program


def _udev(config: Config, host: Host) -> Iterator[Finding]:
    there = {entry.path: entry.text for entry in host.udev_rules}
    why, fix = "the nodes of local disks must be vdsm's, and hidden", _install_ours(host)
    for path in files.UDEV_RULES:
        text = there.get(path, "")
        lacking = [name for name in config.volume_groups if not _names_group(text, name)]
        if path not in there and not _failed(host, path):
            yield Finding(f"there is no {path}", why, fix)
        elif path in there and lacking:
            yield Finding(f"{path} does not name volume group {', '.join(lacking)}", why, fix)


def _names_group(rule: str, vg_name: str) -> bool:
    values = re.findall(r'^[^#\n]*ENV\{DM_VG_NAME\}[=!]="([^"]*)"', rule, re.M)
    return any(fnmatch.fnmatchcase(vg_name, pattern) for value in values for pattern in value.split("|"))


def _scan_lvs(host: Host) -> Iterator[Finding]:
    """Whether LVM would look into local disks: udev's rules do not prevent that, LVM's configuration does."""
    settings = host.lvm_settings
    if settings and settings.scan_lvs and not settings.use_devices_file:
        what = "LVM looks for volume groups in logical volumes (devices/scan_lvs)"
        why = "a guest's groups on local disks would be this host's"
        yield Finding(what, why, "echo 'devices { scan_lvs = 0 }' >> /etc/lvm/lvmlocal.conf")


def _clock(host: Host) -> Iterator[Finding]:
    if host.now < _program_time(host):
        what = "the clock of this host is before the time at which this program was installed"
        fix = "systemctl restart chronyd && chronyc makestep # or date -s TIME"
        yield Finding(what, "kept disks would be removed at the wrong time", fix)


def _program_time(host: Host) -> float:
    return next((entry.mtime for entry in host.program_path if entry.path == host.program), 0.0)


def _run_directory(host: Host) -> Iterator[Finding]:
    entry = host.run_directory
    if entry is None:  # made when it is needed
        return
    if not entry.is_directory:
        yield Finding(f"{entry.path} is not a directory", "locks are made in it", f"rm {entry.path}")
    elif not entry.is_roots_alone:
        fix = f"chown root:root {entry.path} && chmod 0755 {entry.path}"
        yield Finding(_owned(entry) + " is not root's alone", "whoever writes there can hold up VMs", fix)


# -- what could not be asked


def _failed(host: Host, path: str) -> bool:
    return any(failure.fields.get("path") == path for failure in host.failures)


def _failure(error: Error) -> Finding:
    """The finding that something could not be read."""
    what, _, fix = str(error).partition(" : ")
    why = "so this could not be checked"
    if isinstance(error, LibvirtSilent):
        why = "so no local disk is removed, and no kept disk is used"
        fix = "systemctl restart virtqemud.socket || systemctl restart libvirtd"
    elif isinstance(error, VolumeGroupUnusable):
        why = "so no local disk can be made or changed"
        if str(error.fields["problem"]).startswith("shared"):
            fix = unshare_command(str(error.fields["vg"]))
    elif isinstance(error, CommandFailed) and error.argv:
        fix = f"{shlex.join(error.argv)} # shows the whole message"
    return Finding(what, why, fix)
