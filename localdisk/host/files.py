"""The paths of localdisk's files on a host, and the texts of its sudo rule, udev rule and cron file.

`examples/host/` has these texts for the volume group ovirt-local; a test compares them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

PROGRAM = "/usr/local/libexec/localdisk"  # where install puts it; any place that only root can write will do
TREES = "/var/cache/localdisk"  # the extracted packages (bootstrap.py)
BESIDE = ".extracted"
TREES_BESIDE = f"{PROGRAM}{BESIDE}"  # the same, if TREES is mounted noexec
HOOKS = "/usr/libexec/vdsm/hooks"
HOOKS_ASIDE = "/usr/libexec/vdsm/hooks.aside"  # for another program's hooks; vdsm does not look there
LINK = "50_localdisk"
CONFIG = "/etc/localdisk.yaml"
SUDOERS = "/etc/sudoers.d/50_localdisk"
CRON = "/etc/cron.d/localdisk"
MULTIPATH = "/etc/multipath/conf.d"

# The same text twice.  It must come after the rules that name a logical volume, and before the rules that
# probe its content: on EL 11-dm-lvm.rules and 13-dm-disk.rules, on Debian 56-lvm.rules and
# 60-persistent-storage-dm.rules.
UDEV_RULES = ("/etc/udev/rules.d/12-localdisk.rules", "/etc/udev/rules.d/58-localdisk.rules")
# Its path before there was `install`, when it was copied by hand.
UDEV_RULE_BEFORE = "/etc/udev/rules.d/90-localdisk.rules"

# node_exporter's textfile collector reads here, on Debian and on EL.
COLLECTORS = ("/var/lib/prometheus/node-exporter", "/var/lib/node_exporter/textfile_collector")
METRICS = "localdisk.prom"

# The older hook's rules (vdsm_hooks/localdisk/Makefile.am): vdsm may run its helper, which takes any LV name,
# as root; and every LV of the group belongs to vdsm.
OLDER_SUDOERS = "/etc/sudoers.d/50_vdsm_hook_localdisk"
OLDER_UDEV_RULE = "/usr/lib/udev/rules.d/12-vdsm-localdisk.rules"
# The files that an update of vdsm's package brings back.  The older helper is not listed: without the sudo
# rule it has no effect.
OLDER_FILES = (
    f"{HOOKS}/after_disk_prepare/localdisk",
    f"{HOOKS}/before_vm_migrate_source/localdisk",
    OLDER_SUDOERS,
    OLDER_UDEV_RULE,
)
ASIDE = ".aside"  # neither sudo nor udev reads a file with this ending

_HEX = "[0-9a-f]"
_UUID = "-".join(_HEX * length for length in (8, 4, 4, 4, 12))


def hook_link(point: str) -> str:
    """The link through which vdsm calls us at a hook point; `install.hook_files` finds a host's links."""
    return f"{HOOKS}/{point}/{LINK}"


def older_files() -> list[str]:
    """Those of OLDER_FILES that exist; without root, the sudo rule is not visible."""
    return [path for path in OLDER_FILES if os.path.lexists(path)]


# Options that sudo 1.8.29 (EL8) does not know yet; `sudo_rule.py` finds out which of them this host knows.
NEWER_SUDO_OPTIONS = (
    "!log_servers",  # 1.9.0
    "!runas_check_shell",  # 1.8.30
    "!runcwd",  # 1.9.3
    "!intercept, !log_subcmds, !log_exit_status",  # 1.9.8
    "!log_stdin, !log_stdout, !log_stderr, !log_ttyin, !log_ttyout",  # 1.9.15
)


def sudoers(program: str, options: Sequence[str] = NEWER_SUDO_OPTIONS) -> str:
    """The text of SUDOERS; `options` are those of NEWER_SUDO_OPTIONS that the host's sudo knows."""
    newer = "".join(f"Defaults!{program} {option}\n" for option in options)
    return f"""\
# Made by localdisk install: root:root, mode 0440.
# vdsm may run exactly this one command as root: no wildcard, no other argument.
#
# The helper gets nothing of vdsm's environment.  Without a pty, without logs of its input and output, and
# without a PAM session, sudo executes the helper in its own place and does not stay as its parent: so the
# helper's standard input ends when the hook ends.  Each run is logged, although vdsm's own sudoers file has
# !syslog for everything that vdsm runs.
#
# sudo applies Defaults for one command after Defaults for all commands or for vdsm, and the tags of a rule
# after all Defaults.  The helper runs LVM (EXEC, !intercept), copies take hours (!command_timeout), and the
# helper must know the path of its own file (fdexec).  NOSETENV: vdsm may set no variable.  The last Defaults
# are of newer versions of sudo; install leaves out those that this host's sudo does not know.

Defaults!{program} env_reset, !env_keep, !env_check
Defaults!{program} secure_path = /usr/sbin:/usr/bin:/sbin:/bin
Defaults!{program} !requiretty, !use_pty, !pam_session, !pam_setcred
Defaults!{program} syslog = authpriv
Defaults!{program} !command_timeout, fdexec = never, !stay_setuid
Defaults!{program} ignore_logfile_errors, ignore_audit_errors
{newer}\
vdsm ALL=(root) NOPASSWD: EXEC: NOSETENV: NOLOG_INPUT: NOLOG_OUTPUT: {program} helper
"""


def udev_rule(volume_groups: Iterable[str]) -> str:
    """The text of UDEV_RULES for the local disks in these volume groups."""
    return f"""\
# Made by localdisk install: the nodes of local disks belong to vdsm:qemu, mode 0660, and this host does not
# probe their content.  Local disks are the LVs of these volume groups whose name is a canonical UUID; no
# other LV of a group (the thin pool and its parts, an administrator's LV) matches.
#
# A guest decides what is on its disk.  A UUID or label of a file system there must not become a link below
# /dev/disk that this host mounts, a PV there must not become a volume group that this host activates, and a
# RAID member there must not become an array.
#
# This file exists twice: as 12-localdisk.rules for EL, where 11-dm-lvm.rules names the LV and
# 13-dm-disk.rules probes it, and as 58-localdisk.rules for Debian, where these are 56-lvm.rules and
# 60-persistent-storage-dm.rules.  On EL the second file has no effect.  Both come before 95-dm-notify.rules,
# which lets lvcreate return: with a later rule, the node would belong to root:disk for a moment.

ACTION=="remove", GOTO="localdisk_end"
SUBSYSTEM!="block", GOTO="localdisk_end"
ENV{{.LOCALDISK}}=="1", GOTO="localdisk_end"
ENV{{DM_VG_NAME}}!="{"|".join(volume_groups)}", GOTO="localdisk_end"
ENV{{DM_LV_LAYER}}=="?*", GOTO="localdisk_end"
ENV{{DM_LV_NAME}}!="{_UUID}", GOTO="localdisk_end"
ENV{{.LOCALDISK}}="1"

# RUN, because OWNER=, GROUP= and MODE= would reset the node's SELinux label and pause its VM.
RUN+="/usr/bin/chown vdsm:qemu $env{{DEVNAME}}", RUN+="/usr/bin/chmod 0660 $env{{DEVNAME}}"

# Device-mapper's own rules for a disk's content (blkid, /dev/disk/by-uuid and so on) skip local disks, and so
# do all other rules (LVM's 69-dm-lvm.rules and 69-lvm.rules, btrfs, MD, multipath, kpartx).
ENV{{DM_UDEV_DISABLE_DISK_RULES_FLAG}}="1", ENV{{DM_UDEV_DISABLE_OTHER_RULES_FLAG}}="1"
# No event when a disk is closed after writing: no rule may probe it, or have it open when it is removed.
OPTIONS:="nowatch"
# systemd starts nothing that waits for the disk, and udisks does not show it.
ENV{{SYSTEMD_READY}}="0", ENV{{UDISKS_IGNORE}}="1"

LABEL="localdisk_end"
"""


def cron(program: str, collectors: Iterable[str]) -> str:
    """The text of CRON, with metrics for each of these directories of a textfile collector."""
    lines = ["# Made by localdisk install.", cron_line(program)]
    lines += [f"* * * * * root {program} status --prometheus {path}/{METRICS}" for path in collectors]
    return "".join(f"{line}\n" for line in lines)


def cron_line(program: str) -> str:
    """The line of CRON that runs gc; its output is in the log, too, and cron mails its problems."""
    return f"*/10 * * * * root {program} gc >/dev/null"
