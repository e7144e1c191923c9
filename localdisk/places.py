"""Where localdisk's parts are on a host, and what those of them say that are text.

`examples/host/` has the same rules with their reasons; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterable

PROGRAM = "/usr/local/libexec/localdisk"  # where README installs it; it may be anywhere that is root's alone
HOOKS = "/usr/libexec/vdsm/hooks"
HOOKS_ASIDE = "/usr/libexec/vdsm/hooks.aside"  # for another program's hooks; vdsm does not look there
LINK = "50_localdisk"
SUDOERS = "/etc/sudoers.d/50_localdisk"
UDEV_RULE = "/etc/udev/rules.d/90-localdisk.rules"
CRON = "/etc/cron.d/localdisk"
MULTIPATH = "/etc/multipath/conf.d"
BLOCK = "/sys/class/block"

_HEX = "[0-9a-f]"
_UUID = "-".join(_HEX * length for length in (8, 4, 4, 4, 12))


def hook_link(point: str) -> str:
    """The link through which vdsm calls us at a hook point."""
    return f"{HOOKS}/{point}/{LINK}"


def sudo_rule(program: str) -> tuple[str, ...]:
    """The lines of SUDOERS."""
    return (
        f"Defaults!{program} env_reset, !env_keep, !env_check",
        f"Defaults!{program} secure_path = /usr/sbin:/usr/bin:/sbin:/bin",
        f"Defaults!{program} !requiretty, !use_pty, !pam_session, !pam_setcred",
        f"vdsm ALL=(root) NOPASSWD: {program} helper",
    )


def udev_rule(volume_groups: Iterable[str]) -> tuple[str, ...]:
    """The lines of UDEV_RULE: the local disks in these volume groups are vdsm:qemu, mode 0660."""
    return (
        'ACTION=="remove", GOTO="localdisk_end"',
        'SUBSYSTEM!="block", GOTO="localdisk_end"',
        f'ENV{{DM_VG_NAME}}!="{"|".join(volume_groups)}", GOTO="localdisk_end"',
        'ENV{DM_LV_LAYER}=="?*", GOTO="localdisk_end"',
        f'ENV{{DM_LV_NAME}}!="{_UUID}", GOTO="localdisk_end"',
        'RUN+="/usr/bin/chown vdsm:qemu $env{DEVNAME}", RUN+="/usr/bin/chmod 0660 $env{DEVNAME}"',
        'LABEL="localdisk_end"',
    )


def cron_line(program: str) -> str:
    """The line of CRON."""
    return f"*/10 * * * * root {program} gc"
