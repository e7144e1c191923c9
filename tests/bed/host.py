"""Makes this kernel an oVirt host as far as localdisk can see.  Runs as root inside boot.py's machine.

    python -m tests.bed.host setup      users, storage, volume group, rules, the program and its links
    python -m tests.bed.host leave      removes all of this again, except the users

`setup` can be run again, also on the disks of an earlier boot: what exists stays.
What is installed is dist/localdisk, or the file that LOCALDISK_BED_PROGRAM names.
"""

from __future__ import annotations

import atexit
import contextlib
import grp
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bed import libvirt
from tests.bed.shell import CommandFailed, attempt, run

ROOT = Path(__file__).resolve().parents[2]
VOLUME_GROUP = "ovirt-local"
THIN_POOL = "pool0"
PROGRAM = Path("/usr/local/libexec/localdisk")
CONFIG = Path("/etc/localdisk.yaml")
TREES = Path("/var/cache/localdisk")  # where the program extracts itself
HOOKS = Path("/usr/libexec/vdsm/hooks")
SUDOERS = Path("/etc/sudoers.d/50_localdisk")
REPORTED = re.compile(r"LVM2_(\w+)='([^']*)'")
LVM_NAMES = 50  # in one line to the open lvm, which takes 64 words
LVM_SETTINGS = Path("/etc/lvm/lvm.conf")
LESS_MEMORY = "    reserved_memory = 64  # KiB"
CRON = Path("/etc/cron.d/localdisk")
RULES = tuple(Path("/etc/udev/rules.d", name) for name in ("12-localdisk.rules", "58-localdisk.rules"))
RULE = RULES[1]  # what is Debian's
CRON_OF_BED = Path("/run/localdisk-bed-cron")  # there if `start_cron` started it
STORAGE_RULE = Path("/etc/udev/rules.d/90-bed-storage.rules")
DATA_CENTER = Path("/rhev/data-center")
STORAGE = DATA_CENTER / "mnt/srv:_exp"
RUN_STORAGE = Path("/run/vdsm/storage")
SCRATCH = STORAGE / "bed-scratch"  # a place on a disk for what does not fit into memory
KEPT_CACHE = SCRATCH / "cache"  # made by `keep_cache`

POINTS = (
    "before_vdsm_start",
    "after_disk_prepare",
    "before_vm_start",
    "after_vm_start",
    "before_vm_destroy",
    "before_vm_migrate_source",
    "before_vm_migrate_destination",
    "before_vm_hibernate",
    "before_vm_dehibernate",
    "before_disk_hotplug",
    "before_disk_hotunplug",
    "after_disk_hotunplug",
    "after_vm_destroy",
)
# where localdisk does something; install links it here
OUR_POINTS = tuple(p for p in POINTS if p not in ("after_vm_start", "after_disk_hotunplug"))

# vdsm's own LVs on block storage domains, whose volume groups have UUIDs as names
STORAGE_RULE_TEXT = """\
ACTION!="remove", SUBSYSTEM=="block", ENV{DM_VG_NAME}=="????????-????-????-????-????????????", \
RUN+="/usr/bin/chown vdsm:qemu $env{DEVNAME}"
"""


def setup() -> None:
    """Everything a host has before localdisk works there: see the module's docstring."""
    run("modprobe", "-a", "dm-mod", "dm-thin-pool", "loop")
    lvm_settings()
    users()
    shared_storage()
    STORAGE_RULE.write_text(STORAGE_RULE_TEXT)
    run("udevadm", "control", "--reload")
    volume_group()
    start_cron()
    install()


def lvm_settings() -> None:
    """Have LVM reserve less memory before it suspends a device: here it need not survive a lack of memory.

    By default LVM writes to each page of 8 MiB each time, which takes 0.1 s in User Mode Linux.
    """
    if throwaway() and LVM_SETTINGS.exists():
        text = LVM_SETTINGS.read_text()
        if LESS_MEMORY not in text:
            LVM_SETTINGS.write_text(text.replace("\nactivation {", f"\nactivation {{\n{LESS_MEMORY}", 1))


# -- users


def users() -> None:
    """vdsm (group kvm, also in qemu) and qemu (group qemu, also in kvm), with oVirt's numbers if free.

    Nobody else's number is changed: the files that belong to it would then be another's.
    """
    group("kvm", 36)
    group("qemu", 107)
    user("vdsm", 36, "kvm", "qemu")
    user("qemu", 107, "qemu", "kvm")


def group(name: str, number: int) -> None:
    names = {entry.gr_name: entry.gr_gid for entry in grp.getgrall()}
    if name not in names:
        run("groupadd", *(["-g", str(number)] if number not in names.values() else ["-r"]), name)


def user(name: str, number: int, primary: str, other: str) -> None:
    """The user `name` in these two groups."""
    names = {entry.pw_name: entry.pw_uid for entry in pwd.getpwall()}
    if name not in names:
        wanted = ["-u", str(number)] if number not in names.values() else []
        groups = ["-g", primary, "-G", other]
        run("useradd", "-r", *wanted, *groups, "-M", "-d", "/", "-s", "/sbin/nologin", name)


def throwaway() -> bool:
    """True in a guest that nobody will miss."""
    return os.environ.get("LOCALDISK_BED_THROWAWAY") == "1"


# -- disks


def shared_storage() -> None:
    """A file system with O_DIRECT on the second disk, where a host mounts its shared storage."""
    disk = os.environ["LOCALDISK_BED_SHARED"]
    for path in (STORAGE, RUN_STORAGE):
        path.mkdir(parents=True, exist_ok=True)
    if attempt("blkid", "-p", disk).returncode:
        run("mkfs.ext4", "-q", "-E", "nodiscard", disk)
    if not STORAGE.is_mount():
        run("mount", disk, str(STORAGE))
    SCRATCH.mkdir(exist_ok=True)
    for path in (STORAGE, RUN_STORAGE, RUN_STORAGE.parent, SCRATCH):
        shutil.chown(path, "vdsm", "kvm")


def volume_group() -> None:
    """The volume group on the first disk; its LVs are activated as a host does when it boots."""
    if attempt("vgs", VOLUME_GROUP).returncode:
        run("vgcreate", "-y", VOLUME_GROUP, os.environ["LOCALDISK_BED_LOCAL"])
    else:
        run("vgchange", "-aay", VOLUME_GROUP)


def thin_pool(size: str = "2g") -> None:
    """The thin pool, made if it is not there."""
    if THIN_POOL not in logical_volumes():
        run("lvcreate", "-y", "--type", "thin-pool", "-L", size, "-n", THIN_POOL, VOLUME_GROUP)


def remove(*names: str) -> None:
    """Removes these LVs of the volume group, of any kind."""
    for first in range(0, len(names), LVM_NAMES):
        some = names[first : first + LVM_NAMES]
        said = Lvm.running().ask("lvremove", "-f", "-y", *(f"{VOLUME_GROUP}/{name}" for name in some))
        if said.count("successfully removed") < len(some):
            raise CommandFailed(f"lvremove {' '.join(some)}:\n{said}")


def logical_volumes() -> dict[str, frozenset[str]]:
    """The names of all visible LVs in the volume group, with their tags."""
    rows = lvm_report("lvs", "-o", "lv_name,lv_tags", VOLUME_GROUP)
    return {row["lv_name"]: frozenset(filter(None, row["lv_tags"].split(","))) for row in rows}


# -- one lvm for many reports


def lvm_report(command: str, *words: str) -> list[dict[str, str]]:
    """The rows of a report of LVM (`lvs`, `vgs`), by the names of the columns.  No word may have a space.

    Raises CommandFailed if LVM does not find what the report is of.
    """
    said = Lvm.running().ask(command, "--noheadings", "--nameprefixes", *words)
    if "Cannot process " in said or "Failed to find " in said:
        raise CommandFailed(f"{command} {' '.join(words)}:\n{said}")
    rows = (REPORTED.findall(line) for line in said.splitlines())
    return [{name.lower(): value for name, value in row} for row in rows if row]


class Lvm:
    """An interactive lvm.  It looks at the devices and its configuration again for each command.

    Half of an LVM command's time in User Mode Linux is the start of the process.
    """

    _current: Lvm | None = None

    def __init__(self) -> None:
        self._asked = 0
        self._process = subprocess.Popen(
            ["lvm"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    @classmethod
    def running(cls) -> Lvm:
        if cls._current is None or cls._current._process.poll() is not None:
            cls._current = Lvm()
            atexit.register(cls._current._process.kill)
        return cls._current

    def ask(self, *words: str) -> str:
        """All that the command prints, errors too, until lvm does not know the command that follows."""
        assert self._process.stdin
        assert self._process.stdout
        self._asked += 1
        end = f"@end-{self._asked}@"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{' '.join(words)}\n{end}\n".encode())
            self._process.stdin.flush()
        said = b""
        while end.encode() not in said:
            some = os.read(self._process.stdout.fileno(), 1 << 16)
            if not some:
                raise CommandFailed(f"lvm ended: {' '.join(words)}\n{said.decode()}")
            said += some
        return said.decode().partition(end)[0]


# -- what localdisk puts on a host


def install() -> None:
    """As an administrator does: copies one file, and has it install all that belongs to it."""
    if throwaway() and not TREES.parent.is_mount():
        # What this machine has extracted shows through, and changes while other tests run on it; a host that
        # gets the file has nothing yet.
        kept = (
            ["--bind", str(KEPT_CACHE)] if KEPT_CACHE.exists() else ["-t", "tmpfs", "-o", "mode=755", "cache"]
        )
        run("mount", *kept, str(TREES.parent))
    elif throwaway():
        shutil.rmtree(TREES, ignore_errors=True)
    source = Path(os.environ.get("LOCALDISK_BED_PROGRAM", ROOT / "dist/localdisk"))
    if not source.is_file():
        raise SystemExit(f"bed: {source} is missing: run ./build.sh first")
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, PROGRAM)
    PROGRAM.chmod(0o755)
    for point in POINTS:
        (HOOKS / point).mkdir(parents=True, exist_ok=True)
    run(str(PROGRAM), "install")


def keep_cache() -> None:
    """Have the next boot on these disks find what this one has extracted, as a host does."""
    shutil.copytree(TREES.parent, KEPT_CACHE)


def hook_links() -> tuple[Path, ...]:
    return tuple(HOOKS / point / "50_localdisk" for point in OUR_POINTS)


# -- cron


def start_cron() -> None:
    """Starts the machine's cron unless it runs: `check` looks for it.

    It sees no table, so that gc runs when a test says so, and not every ten minutes.
    """
    if "cron" in names_of_processes():
        return
    hidden = "mount -t tmpfs none /etc/cron.d && mount --bind /dev/null /etc/crontab && exec cron"
    run("unshare", "--mount", "sh", "-c", hidden)
    CRON_OF_BED.touch()


def stop_cron() -> None:
    """Ends cron if `start_cron` started it."""
    if CRON_OF_BED.exists():
        end_daemon("cron")
        CRON_OF_BED.unlink()


def start_udevd() -> None:
    run("/lib/systemd/systemd-udevd", "--daemon")


def end_daemon(name: str) -> None:
    """Ends the daemon, and waits until it has ended."""
    run("kill", *(pid for pid, its in named_processes() if its == name))
    for _ in range(600):
        if name not in names_of_processes():
            return
        time.sleep(0.1)
    raise AssertionError(f"{name} does not end")


def names_of_processes() -> set[str]:
    return {name for _, name in named_processes()}


def named_processes() -> Iterator[tuple[str, str]]:
    """Process id and name of each process that has not ended.

    One that has ended keeps its name until its parent waits for it: in a guest in qemu, the first process
    has started udevd, and never does.
    """
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = file.read_text().partition("(")[2].rpartition(") ")
            if not rest.startswith(("Z", "X")):
                yield file.parent.name, name


# -- leaving a machine as it was


def leave() -> None:
    """Undoes `setup`, also an incomplete one, except for the users."""
    libvirt.stop()
    stop_cron()
    if PROGRAM.exists():
        run(str(PROGRAM), "uninstall", "--force")
    for path in (STORAGE_RULE, CONFIG):
        path.unlink(missing_ok=True)
    run("udevadm", "control", "--reload")
    for loop, file in loop_devices():
        if file.startswith(f"{STORAGE}/"):
            deactivate(loop)
            attempt("losetup", "--detach", loop)
    attempt("umount", str(STORAGE))
    deactivate(os.path.realpath(os.environ["LOCALDISK_BED_LOCAL"]))


def loop_devices() -> Iterator[tuple[str, str]]:
    """All loop devices with their files."""
    report = run("losetup", "--json", "--list", "-O", "NAME,BACK-FILE")
    for row in json.loads(report or '{"loopdevices": []}')["loopdevices"]:
        yield row["name"], row["back-file"]


def deactivate(device: str) -> None:
    """Deactivates the LVs of the volume group that has `device`."""
    group_name = attempt("pvs", "--noheadings", "-o", "vg_name", device).stdout.strip()
    if group_name:
        attempt("vgchange", "-an", group_name)


# -- who is there


def processes_of(name: str) -> dict[int, str]:
    """The command lines of all running processes of that user, by process id."""
    number = pwd.getpwnam(name).pw_uid
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == number:
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return {pid: line for pid, line in found.items() if line}  # a zombie has none


if __name__ == "__main__":
    {"setup": setup, "leave": leave}[sys.argv[1]]()
