"""Every error that an operator can see: one class for each problem with its own remedy.

An error is one line, `<what> : <what to do>`, made from the class's two templates and the fields
it was raised with.  Fields may come from a guest, an image or the engine: control characters are
escaped and a field keeps 200 characters, so that a message stays one plain line.
Only `cli.py` prints errors and exits.
"""

from __future__ import annotations

from collections.abc import Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar

FIELD_LIMIT = 200


def plain(value: object) -> str:
    """`value` as printable text of at most 200 characters: control characters become escapes.

    A longer text is cut in its middle, because the problem often follows after a long name.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
    half = FIELD_LIMIT // 2
    return text if len(text) <= FIELD_LIMIT else f"{text[: half - 1]}…{text[-half:]}"


def target(argv: Sequence[str]) -> str:
    """` for …` with what a command works on, its last word; "" where that is no plain name."""
    import re

    words = [word for word in argv[2:][-1:] if re.fullmatch(r"[\w/][\w/.:+-]*", word)]
    return "".join(f" for {word}" for word in words)


class Message(Exception):
    """One line, `what` and what to do about it; fields are keyword arguments."""

    what: ClassVar[str] = "{problem}"
    fix: ClassVar[str] = "{fix}"
    exit_code: ClassVar[int] = 2

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.fields = fields

    def __str__(self) -> str:
        shown = {name: plain(value) for name, value in self.fields.items()}
        return f"{self.what} : {self.fix}".format(**shown)


class Error(Message):
    """The base of every error that localdisk raises on purpose."""


# -- the command line and the configuration


class UsageError(Error):
    what = "{problem}"
    fix = "see localdisk --help"


class ConfigUnreadable(Error):
    what = "cannot read configuration {path}: {problem}"
    fix = "make it a regular file that only root can write (chown root:root, chmod 0644)"


class ConfigRefused(Error):
    """All problems of one configuration file at once; `problems` are `FILE:LINE:COLUMN: ...` lines."""

    what = "configuration {path} is refused, {count} problem(s)"
    fix = "correct it, then run localdisk check --config {path}"

    def __init__(self, path: str, problems: tuple[str, ...]) -> None:
        super().__init__(path=path, count=len(problems))
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join((*(plain(p) for p in self.problems), super().__str__()))


class InstallRefused(Error):
    what = "{problem}"
    fix = "{fix}"


class OlderHookBack(Error):
    what = "the localdisk hook of vdsm's package is there beside this one: {files}"
    fix = "run {program} install, which moves it aside"
    exit_code = 1


class WorkUnfinished(Error):
    what = "uninstall is refused, {what}"
    fix = "stop the VMs, run localdisk gc until localdisk status shows nothing under way, or use --force"


class MetricsUnwritable(Error):
    what = "cannot write metrics to {path}: {problem}"
    fix = "make its directory, or name another file"


# -- what vdsm hands us


class BadHookCall(Error):
    what = "hook called wrongly: {problem}"
    fix = "only vdsm calls this, through a link in its hook directory; see README, install"


class BadProperty(Error):
    what = "custom property localdisk has the value '{value}'"
    fix = "set it to lvm, lvmthin, on or off in the engine"


class BadDiskData(Error):
    what = "disk data from vdsm is refused: {problem}"
    fix = "see the vdsm log; this version of localdisk may not know this version of vdsm"


class BadDomain(Error):
    what = "domain XML from vdsm is refused: {problem}"
    fix = "see the vdsm log; this version of localdisk may not know this version of vdsm"


# -- the disk and its source


class DiskRefused(Error):
    """A disk of a kind that cannot be copied (shared, transient, network, no image)."""

    what = "disk {disk} is {problem}"
    fix = "{fix}"


class SourceRefused(Error):
    what = "source volume {path} is refused: {problem}"
    fix = "{fix}"

    def __init__(self, path: str, problem: str, fix: str = "check the volume with qemu-img info") -> None:
        super().__init__(path=path, problem=problem, fix=fix)


class OperationRefused(Error):
    what = "VM {vm} runs from local disks, it cannot {operation}"
    fix = "stop the VM, or run it without the custom property localdisk"


class HotplugRefused(Error):
    what = "disk {disk} cannot be plugged into VM {vm} while it runs from local disks"
    fix = "stop the VM first, or set `hotplug: shared` in /etc/localdisk.yaml"


class UnplugRefused(Error):
    what = "disk {disk} of VM {vm} is the local disk {path}, which is not unplugged while the VM runs"
    fix = "stop the VM first"


# -- tools and privileges


def how_it_ended(exit_code: int) -> str:
    """`exit code 3`, or `killed by SIGILL`, from what subprocess returns (negative: killed by that signal).

    sudo and timeout report the signal that ended their command as 128 and its number, as shells do.
    """
    import signal

    number = -exit_code if exit_code < 0 else exit_code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:  # an ordinary exit code; or a real-time signal, which has no name
        return f"exit code {exit_code}" if exit_code >= 0 else f"killed by signal {number}"
    return f"killed by {name}"


def last_words(who: str, said: str, exit_code: int) -> str:
    """What a process printed; if it printed nothing, or a signal ended it, also how `who` ended."""
    how = f"{who}: {how_it_ended(exit_code)}"
    if not said:
        return how
    return f"{how}: {said}" if "killed by" in how else said


class CommandFailed(Error):
    """A tool ended badly; keeps `argv`, `exit_code` (negative: killed by that signal) and `stderr`."""

    what = "{tool} failed{target} ({how}): {said}"
    fix = "see the system log of this host"

    def __init__(self, argv: tuple[str, ...], exit_code: int, stderr: str, said: str = "") -> None:
        """`said`: the part of `stderr` that is shown; if empty, its last line."""
        lines = [line.strip() for line in stderr.splitlines() if line.strip()]
        said = said or (lines[-1] if lines else "it printed nothing")
        super().__init__(tool=" ".join(argv[:2]), target=target(argv), how=how_it_ended(exit_code), said=said)
        self.argv = argv
        self.returncode = exit_code
        self.stderr = stderr


class LvmFailed(CommandFailed):
    """LVM has named the cause, and what ends it is known."""

    fix = "{fix}"

    def __init__(self, argv: tuple[str, ...], exit_code: int, stderr: str, said: str, fix: str) -> None:
        super().__init__(argv, exit_code, stderr, said)
        self.fields["fix"] = fix


class CommandTimeout(Error):
    what = "{tool} did not end within {seconds} s"
    fix = "look for hung storage and hanging commands on this host (dmesg, multipath -ll, ps), then try again"


class UdevdGone(CommandTimeout):
    what = "{tool} did not end within {seconds} s, because it waits for systemd-udevd, which does not run"
    fix = "systemctl restart systemd-udevd && dmsetup udevcomplete_all -y, then try again"


class LvmLocked(CommandTimeout):
    """Another process holds LVM's lock of the volume group."""

    what = "{tool} did not end within {seconds} s, LVM's lock of the volume group is held by {holder}"
    fix = "wait until it has ended; if it hangs, end it (ps -fp {pid}, kill {pid}), then try again"


class CommandMissing(Error):
    what = "{tool} is not installed"
    fix = "install the package that has it"


class CommandForbidden(CommandMissing):
    """The tool is installed, but this user may not run it."""

    what = "{tool} cannot be run by this user: it is user {uid}'s, group {gid}'s, mode {mode}"
    fix = "chmod o+rx {path}"


class CommandBlocked(CommandMissing):
    """The tool's mode allows this user to run it, but the kernel or a preloaded library refuses."""

    what = "{tool} cannot be run, although the mode of {path} allows it"
    fix = "look for NOEXEC in sudo's rules (sudo -l -U vdsm), a mount with noexec, a denial in the audit log"


class Unseen(Error):
    what = "{path} cannot be looked at: {problem}"
    fix = "ls -ld {path}"


# What sudo prints, and what to do.  1.9.16 does not say which file others can write.
_SUDO_FIXES = (
    (
        "(is (world|group) writable|is owned by|is mode|has bad permissions)",
        "find /etc/sudoers /etc/sudoers.d -type f -exec chown root:root {} + -exec chmod 0440 {} +",
    ),
    ("unable to load plugins", "correct /etc/sudo.conf, or move it away (sudo -V shows what is wrong there)"),
    (
        "PAM account management error",
        "let vdsm pass the account lines of /etc/pam.d/sudo (pam_access: access.conf)",
    ),
    ("contact your system administrator", "chage --expiredate -1 vdsm, or look at /etc/pam.d/sudo"),
    ("reset your password", "chage --expiredate -1 --maxdays -1 vdsm"),
    ("is your account locked", "chage --expiredate -1 vdsm, or look at /etc/pam.d/sudo"),
    ("have the setuid bit set", "chown root:root /usr/bin/sudo && chmod 4755 /usr/bin/sudo"),
    ("effective uid is not 0", "chmod 4755 /usr/bin/sudo, and mount its file system without nosuid"),
    # sudo searches the command below the directory that this setting names (1.9.3 and later).
    (
        "command not found",
        "take runchroot out of what grep -rn runchroot /etc/sudoers /etc/sudoers.d shows, "
        "or limit it to other users (Defaults:USER runchroot=DIRECTORY)",
    ),
    ("no new privileges", "take NoNewPrivileges out of vdsmd's unit (systemctl cat vdsmd)"),
)


def sudo_fix(problem: str, program: str) -> str:
    """What to do if sudo did not run the helper, by what it said."""
    import re

    for said, fix in _SUDO_FIXES:
        if re.search(said, problem):
            return fix
    return (
        f"check the sudo rule `vdsm ALL=(root) NOPASSWD: {program} helper`: {program} install makes it, "
        "/etc/sudoers reads it with @includedir /etc/sudoers.d"
    )


class HelperUnavailable(Error):
    what = "cannot run the privileged helper: {problem}"
    fix = "{fix}"


class HelperRefused(Error):
    """The helper refused a request; `message` is its whole error message."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = message

    def __str__(self) -> str:
        # The problems of a configuration are several lines, each one plain; the last line has what to do.
        every = self.message.splitlines()
        lines = [line[:1000] for line in (*every[:99], *every[99:][-1:])]
        shown = ["".join(c for c in line if c.isprintable()) for line in lines]
        return "\n".join(filter(None, shown)) or "the helper refused : see the system log of this host"


class RunUnwritable(Error):
    what = "cannot make or remove {path}: {problem}"
    fix = (
        "make room in /run (df -h /run and df -i /run show what is left); if it is read-only: "
        "mount -o remount,rw $(findmnt -no TARGET -T /run/localdisk)"
    )


class BadRequest(Error):
    what = "request to the helper is refused: {problem}"
    fix = "only localdisk's own hook talks to it"


class RootNeeded(Error):
    what = "{mode} needs root"
    fix = "run it with sudo"


# -- the volume group and what is in it


class NoVolumeGroup(Error):
    what = "no volume group {vg} on this host"
    fix = (
        "create it (vgcreate --metadatasize 128m {vg} DEVICE), on EL9 add it with vgimportdevices {vg}, "
        "or correct volume_group; if it was there, bring its devices back (dmesg)"
    )


class VolumeGroupHidden(NoVolumeGroup):
    what = "volume group {vg} is hidden from LVM by its {how}, it is on {devices}"
    fix = "{fix}"


class VolumeGroupUnusable(Error):
    what = "volume group {vg} is {problem}"
    fix = "{fix}"


class NoSpace(Error):
    what = "volume group {vg} lacks {missing}: the disk needs {needed}, {free} is free, {reserve} is reserved"
    fix = "remove local disks (localdisk gc), extend the volume group, or lower margins"


class AllocationOff(NoSpace):
    """More is free, on physical volumes of which LVM may use nothing (`pvchange -x n`)."""

    what = (
        "volume group {vg} lacks {missing}: the disk needs {needed}, {free} is free where LVM may allocate, "
        "which it may not on {devices}"
    )
    fix = "pvchange -x y {devices}, or vgextend {vg} DEVICE"


class MetadataAreaFull(Error):
    what = "the metadata area of volume group {vg} is full, LVM cannot describe one more disk in it"
    fix = (
        "remove local disks (localdisk gc, localdisk remove); for more of them, add a device with a larger "
        "area: vgextend --metadatasize 128m {vg} DEVICE && pvchange --metadataignore y OTHER_DEVICES"
    )


class NoThinPool(Error):
    what = "no thin pool {vg}/{pool}"
    fix = (
        "create it (lvcreate --type thin-pool --chunksize 64k -l 90%FREE -n {pool} {vg}), or use backend lvm"
    )


class ThinPoolNotZeroing(Error):
    what = "thin pool {vg}/{pool} does not zero new blocks, so a disk would show other disks' old data"
    fix = "lvchange --zero y {vg}/{pool}"


class ThinPoolInactive(Error):
    what = "thin pool {vg}/{pool} is not active, so LVM does not report how full it is"
    # If a part of the pool is active alone, as after an interrupted boot, LVM refuses to activate the pool.
    fix = "lvchange --activate n {vg}/{pool}_tmeta {vg}/{pool}_tdata; lvchange --activate y {vg}/{pool}"


class ThinPoolBroken(Error):
    what = (
        "thin pool {vg}/{pool} is active, but LVM does not report how full it is, its metadata may be damaged"
    )
    fix = (
        "see the system log of this host, then lvchange --activate n and lvchange --activate y {vg}/{pool}; "
        "if LVM refuses to activate it, lvconvert --repair {vg}/{pool} before"
    )


class ThinPoolFull(Error):
    what = "thin pool {vg}/{pool} would pass margins.{limit}: {would} of {allowed} allowed"
    fix = "remove local disks (localdisk gc), extend the pool, or raise the margin"


class ThinPoolAtThreshold(Error):
    what = "LVM makes no new disk in thin pool {vg}/{pool}: its data or metadata is too full for LVM itself"
    fix = "remove local disks (localdisk gc), or extend the pool (lvextend --size or --poolmetadatasize)"


class ThinPoolUnusable(Error):
    """LVM refuses for another reason than its threshold; to remove something would not help."""

    what = "LVM makes no new disk in thin pool {vg}/{pool}: {said}"
    fix = (
        "after vgcfgrestore: restore those with the transaction id of the pool (vgcfgrestore --list {vg}); "
        "else see the system log of this host"
    )


class CacheFull(Error):
    what = "a template of {needed} does not fit into the cache, of which {free} can be had (cache.max_size)"
    fix = "raise cache.max_size in /etc/localdisk.yaml"


class CacheOff(Error):
    what = "there is no template cache in volume group {vg}"
    fix = "set `cache: {{templates: on}}` in /etc/localdisk.yaml"


class NoTemplate(Error):
    what = "volume {volume} cannot be cached: {problem}"
    fix = "name a template's volume on file storage"


class ForeignVolume(Error):
    what = "logical volume {vg}/{lv} exists and is not localdisk's"
    fix = "rename or remove it if nobody needs it"


class OtherOwner(Error):
    what = "local disk {vg}/{lv} belongs to VM {owner}, image {image}"
    fix = "if that VM no longer exists, localdisk remove {vg}/{lv}"


class DiskBusy(Error):
    """`holders.busy` adds what has the disk open, and how to end that."""

    what = "local disk {vg}/{lv} is {state} and still open by {users}"
    fix = "{fix}, then start the VM again"


class DependentVolumes(Error):
    what = "LVM would remove {others} along with local disk {vg}/{lv}"
    fix = (
        "if nobody needs it, lvremove the snapshot (lvconvert --uncache {vg}/{lv} for a cache), "
        "then run localdisk gc"
    )


class NoSuchDisk(Error):
    what = "no local disk, template LV or VM with local disks is called {name}"
    fix = "see localdisk status --full"


class SeveralDisks(Error):
    what = "{name} names more than one local disk: {places}"
    fix = "write VG/LV"


class DiskNeeded(Error):
    what = "local disk {vg}/{lv} is needed, {problem}"
    fix = "stop the VM in the engine, or end what uses the disk; localdisk status shows it"


class CannotDiscard(Error):
    what = "erase: discard would leave the bytes of {vg}/{lv} where they are: {problem}"
    fix = "set `erase: zero` in /etc/localdisk.yaml, then run localdisk gc"


class VmRuns(Error):
    what = "local disk {vg}/{lv} is unfinished while libvirt reports VM {vm} as running"
    fix = "stop the VM, then start it again"


class StillRuns(Error):
    what = "libvirt reports VM {vm} as still running, its local disks are left as they are"
    fix = "stop the VM first"


class SourceChanged(Error):
    what = "the source of local disk {vg}/{lv} has changed since it was copied"
    fix = "set `on_source_change: recopy` (loses the local data), or localdisk remove {vg}/{lv}{or_use_it}"


class OtherLeaf(Error):
    """The image has another leaf than when it was copied, and its guest's view has changed."""

    what = "kept local disk {vg}/{lv} was not copied from what its image's volume {volume} shows now"
    fix = "set `on_source_change: recopy` (loses the local data), or localdisk remove {vg}/{lv}{or_use_it}"


class KeptStale(Error):
    what = "kept local disk {vg}/{lv} is stale, its VM was started without it on this host since"
    fix = (
        "set `on_source_change: recopy` (loses the local data), or localdisk remove {vg}/{lv}; "
        "to use the local data and not what was written to shared storage since: "
        "lvchange --deltag STALE {vg}/{lv}"
    )


class KeptElsewhere(Error):
    what = "local disk {vg}/{lv} of this VM is kept, and the configuration names volume group {wanted} now"
    fix = (
        "set volume_group to {vg} again (for this VM: under vms), "
        "or localdisk remove {vg}/{lv} (loses the local data)"
    )


class DiskDrifted(Error):
    """The VM has run from another volume above or beside it: a snapshot or replication went past us."""

    what = "local disk {vg}/{lv} has data of this VM that its image on shared storage lacks"
    fix = "bring them back as localdisk status shows, or give them up with localdisk remove {vg}/{lv}"


class NotLocal(Error):
    what = "disk {disk} of VM {vm} points to {path}, which is no ready local disk of this VM ({state})"
    fix = "start the VM again; if this happens again, look at localdisk status"


class DeviceNotReady(Error):
    what = "cannot write to {path} as this user: {problem}"
    fix = "{fix}"


class LibvirtSilent(Error):
    what = "libvirt does not report which VMs run: {problem}"
    fix = "check that libvirt runs (virsh -r list)"


class VirshUnusable(LibvirtSilent):
    fix = "{fix}"


class CopyFailed(Error):
    what = "copying {volume} to {path} failed: {problem}"
    fix = "look at the source storage and the local device in the system log, then start the VM again"


class PoolFilledUp(Error):
    what = "copying {volume} to {path} failed: the thin pool is full"
    fix = "remove local disks (localdisk gc) or extend the pool, then start the VM again"


class EraseFailed(Error):
    what = "erasing {path} failed: {problem}"
    fix = "look at the local device in the system log, then run localdisk gc"


class VmForgotten(Error):
    """A complete copy for which no VM starts any more."""

    what = "libvirt no longer knows VM {vm}, the copy of its disk {volume} is given up"
    fix = "start the VM again; nothing is left behind"


class Interrupted(Message):
    """A signal ends this run.  It is no Error: code that handles errors and goes on must not handle it."""

    what = "ended by signal {signal} before it was done"
    fix = "start the VM again; nothing is left behind"


class StartCancelled(Interrupted):
    """vdsm powers off a VM whose disks are being prepared, or has powered off one before it ran.

    A VM whose resume was refused is powered off before it ran, too; its next resume or preview meets this.
    """

    what = "VM {vm} was powered off before it ran"
    fix = "try again; nothing is left behind"
