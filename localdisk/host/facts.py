"""Collects what `check` must know about this host: tools, users, files, hooks, and a trial of a start.

Nothing is changed, except that user vdsm makes a tiny volume in each group and removes it (`rehearsal.py`).

`collect` returns one frozen `Host`, with what `storage_facts.py` reads of volume groups.  What could not be
read is a failure in it.  `check_system.py` and `check_storage.py` decide what is wrong.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from localdisk import daemons, libvirt, lock, run
from localdisk.config import Config
from localdisk.errors import CommandFailed, Error, Unseen
from localdisk.frozen import frozen
from localdisk.host import files, storage_facts, sudo_rule
from localdisk.host.storage_facts import Group, LvmSettings
from localdisk.ids import NOBODY
from localdisk.volumes import lvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")

# The packages of the tools that we run: EL's name, Debian's name.
PACKAGES = {
    "lvm": ("lvm2", "lvm2"),
    "qemu-img": ("qemu-img", "qemu-utils"),
    "sudo": ("sudo", "sudo"),
    "visudo": ("sudo", "sudo"),
    "virsh": ("libvirt-client", "libvirt-clients"),
    "setpriv": ("util-linux", "util-linux"),
    "blkdiscard": ("util-linux", "util-linux"),
}

Version = tuple[int, ...]


@frozen
class Entry:
    """A file or directory, links not followed; `text`: the content of a small file, if it was read."""

    path: str
    uid: int
    gid: int
    mode: int
    mtime: float
    text: str = ""

    @property
    def is_roots_alone(self) -> bool:
        return self.uid == 0 and not self.mode & 0o022

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


@frozen
class Hook:
    """An executable file in a directory of vdsm's hook points; `target`: its path without links."""

    point: str
    path: str
    target: str


@frozen
class Accounts:
    """Those of users vdsm and qemu and groups kvm and qemu that exist, and which of them vdsm is in."""

    users: Mapping[str, int]
    groups: Mapping[str, int]
    of_vdsm: frozenset[str]


@frozen
class Rehearsal:
    """The errors that user vdsm got in the trial of a start: whole messages, "" if there is none."""

    sudo: str = ""  # why the helper does not run
    libvirt: str = ""
    disks: tuple[str, ...] = ()  # why no disk can be made and written to


@frozen
class Host:
    """All facts; None: not known, because of one of `failures`, or because only root can read it."""

    program: str
    is_root: bool
    now: float
    missing_tools: tuple[str, ...]
    daemons: frozenset[str] | None  # the names of all processes
    has_cron_timers: bool
    has_dnf: bool
    lvm_version: Version | None
    qemu_img_version: Version | None
    known_vms: frozenset[str] | None
    accounts: Accounts
    program_path: tuple[Entry, ...]  # the program, and the directories above it
    hooks: tuple[Hook, ...]
    hook_directories: tuple[Entry, ...]  # those of vdsm's hook points, and all above them
    udev_rules: tuple[Entry, ...]  # those of files.UDEV_RULES that exist
    older_files: tuple[str, ...]  # those of files.OLDER_FILES that exist
    cron: Entry | None
    sudoers: Entry | None
    sudo_options: tuple[str, ...] | None  # those options of our rule that the host's sudo knows
    run_directory: Entry | None
    lvm_settings: LvmSettings | None
    groups: tuple[Group, ...]
    unnamed_groups: Mapping[str, int]  # other groups with volumes of ours, and how many
    rehearsal: Rehearsal | None
    failures: tuple[Error, ...]


def collect(config: Config, program: str, tries_starts: bool = True) -> Host:
    """Collect everything that this user may read; `program`: the file that vdsm and cron must run.

    `tries_starts`: whether vdsm tries to make disks; the helper makes them by its own configuration.
    """
    is_root = os.geteuid() == 0
    asked = _Asked()
    missing = tuple(tool for tool in PACKAGES if not run.tool_exists(tool))
    accounts = _accounts()
    owner = (accounts.users.get("vdsm"), accounts.groups.get("qemu"))
    running = daemons.running() if is_root else None  # others may not see all of them
    has_udevd = running is None or bool(running & daemons.UDEVD)  # else LVM makes a disk and waits for ever
    settings: LvmSettings | None = None
    groups: list[Group] = []
    unnamed: Mapping[str, int] | None = None
    if is_root and "lvm" not in missing:
        settings = asked(storage_facts.settings)
        for name, devices in config.volume_groups.items():
            hides = bool(settings and settings.use_devices_file and not devices)
            group = asked(partial(storage_facts.collect, name, devices, hides, owner))
            groups += [group] if group else []
        unnamed = asked(partial(storage_facts.unnamed_groups, config.volume_groups))
    return Host(
        program=program,
        is_root=is_root,
        now=time.time(),
        missing_tools=missing,
        daemons=running,
        has_cron_timers=daemons.has_cron_timers(os.path.basename(files.CRON)),
        has_dnf=run.tool_exists("dnf"),
        lvm_version=None if "lvm" in missing else asked(_lvm_version),
        qemu_img_version=None if "qemu-img" in missing else asked(_qemu_img_version),
        known_vms=None if "virsh" in missing else asked(libvirt.known),
        accounts=accounts,
        program_path=tuple(filter(None, (asked(partial(entry, path)) for path in _with_parents(program)))),
        hooks=asked(lambda: tuple(_read_hooks())) or (),
        hook_directories=asked(lambda: tuple(_hook_directories())) or (),
        udev_rules=tuple(filter(None, (asked(partial(entry, path, read=True)) for path in files.UDEV_RULES))),
        older_files=tuple(files.older_files()),
        cron=asked(partial(entry, files.CRON, read=True)),
        sudoers=asked(partial(entry, files.SUDOERS, read=True)) if is_root else None,
        sudo_options=asked(sudo_rule.known_options) if is_root and "visudo" not in missing else None,
        run_directory=asked(partial(entry, lock.RUN)),
        lvm_settings=settings,
        groups=tuple(groups),
        unnamed_groups=unnamed or {},
        rehearsal=asked(partial(_rehearse, program, starts(config, groups) if tries_starts else ()))
        if is_root and "vdsm" in accounts.users and not missing and has_udevd
        else None,
        failures=tuple(asked.failures),
    )


class _Asked:
    """Calls functions; if one fails, its result is None, and its error is in `failures`."""

    def __init__(self) -> None:
        self.failures: list[Error] = []

    def __call__(self, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except Error as error:
            self.failures.append(error)
        except OSError as error:
            self.failures.append(Unseen(path=error.filename, problem=error.strerror))
        return None


# -- files and users


def entry(path: str, read: bool = False) -> Entry | None:
    """The file or directory `path`, with a file's text if `read`; None if it is missing.  Raises OSError."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    text = ""
    if read and stat.S_ISREG(status.st_mode):
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read(64 << 10)
    return Entry(path, status.st_uid, status.st_gid, status.st_mode, status.st_mtime, text)


def _with_parents(program: str) -> Iterator[str]:
    path = program
    yield path
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        yield path


def _read_hooks() -> Iterator[Hook]:
    """Every file that vdsm would run as a hook (as lib/vdsm/common/hooks.py finds them)."""
    if not os.path.isdir(files.HOOKS):
        return
    for point in sorted(os.listdir(files.HOOKS)):
        directory = os.path.join(files.HOOKS, point)
        for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else ():
            path = os.path.join(directory, name)
            if os.path.isfile(path) and os.access(path, os.X_OK):
                yield Hook(point, path, os.path.realpath(path))


def _hook_directories() -> Iterator[Entry]:
    points = sorted(entry.path for entry in os.scandir(files.HOOKS)) if os.path.isdir(files.HOOKS) else ()
    found = map(entry, (*_with_parents(files.HOOKS), *points))
    yield from (each for each in found if each and each.is_directory)


def _accounts() -> Accounts:
    users = {user.pw_name: user for user in map(_user, ("vdsm", "qemu")) if user}
    groups = {group.gr_name: group.gr_gid for group in map(_group_entry, ("kvm", "qemu")) if group}
    vdsm = users.get("vdsm")
    numbers = os.getgrouplist("vdsm", vdsm.pw_gid) if vdsm else []
    return Accounts(
        users={name: user.pw_uid for name, user in users.items()},
        groups=groups,
        of_vdsm=frozenset(name for name, number in groups.items() if number in numbers),
    )


def _user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def _group_entry(name: str) -> grp.struct_group | None:
    try:
        return grp.getgrnam(name)
    except KeyError:
        return None


# -- tools


def _lvm_version() -> Version:
    argv = ["lvm", "version"]
    return _version(argv, lvm.call(argv), r"LVM version:\s+(\d+)\.(\d+)\.(\d+)")


def _qemu_img_version() -> Version:
    argv = ["qemu-img", "--version"]
    return _version(argv, run.run(argv), r"qemu-img version (\d+)\.(\d+)")


def _version(argv: list[str], out: str, pattern: str) -> Version:
    found = re.search(pattern, out)
    if not found:
        raise CommandFailed(tuple(argv), 0, f"it printed {out[:80]!r}")
    return tuple(map(int, found.groups()))


def starts(config: Config, groups: Iterable[Group]) -> tuple[str, ...]:
    """The starts to try, as `VM=PROPERTY`: one for each volume group and backend that VMs may use.

    If the configured thin pool exists, its backend is tried, too: the property of a VM may ask for it.
    """
    pools = {
        (group.name, lv.lv_name) for group in groups if group.vg for lv in group.vg.lvs if lv.is_thin_pool
    }
    found: dict[tuple[str, str, tuple[str, ...]], str] = {}
    for vm_id, override in ((NOBODY, config.others), *config.vms.items()):
        policy = override.policy
        if not policy.enabled:
            continue
        if not policy.pool:
            found.setdefault((policy.volume_group, "", policy.devices), f"{vm_id}=lvm")
        has_pool = override.backend is None and (policy.volume_group, policy.thin_pool) in pools
        if policy.pool or has_pool:
            found.setdefault((policy.volume_group, policy.thin_pool, policy.devices), f"{vm_id}=lvmthin")
    return tuple(found.values())


def _rehearse(program: str, tried: tuple[str, ...]) -> Rehearsal:
    """Run the trial of a start as user vdsm, with the program itself, to test vdsm's rights to it, too."""
    argv = [program, "rehearsal", *tried]
    out = run.run(argv, user="vdsm")
    try:
        found = json.loads(out)
        return Rehearsal(str(found["sudo"]), str(found["libvirt"]), tuple(map(str, found["disks"])))
    except (KeyError, TypeError, ValueError):
        raise CommandFailed(tuple(argv), 0, f"it printed {out[:80]!r}") from None
