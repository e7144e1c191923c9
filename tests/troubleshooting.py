"""What is behind each error of errors.py: `python -m tests.readme` makes a table of it in docs/operations.md.

What an error prints is in errors.py alone.  Here is what it cannot have: when it happens, where to look.
An error that has no entry fails a test.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from string import Formatter

from localdisk import errors
from localdisk.errors import Error, Interrupted

# HelperRefused prints what the helper refused with, which is one of the others.
CARRIERS = {"HelperRefused"}

BEHIND = {
    "UsageError": "The command line is wrong: [command line](#command-line).",
    "ConfigUnreadable": "A configuration that others can write is not read, and no VM starts from local"
    " disks until that is mended.",
    "ConfigRefused": "The lines before it have each problem with its line and column. No VM starts from"
    " local disks until all are mended; VMs that run are not touched.",
    "InstallRefused": "`install` or `uninstall` found something that it does not overwrite, or was not"
    " called as the built file. Nothing was changed.",
    "OlderHookBack": "vdsm's package was updated and has brought its own hook back; both would copy"
    " each disk.",
    "WorkUnfinished": "After `uninstall` nobody would finish or remove what it names.",
    "MetricsUnwritable": "The file is written beside its old version and renamed, so the directory must"
    " be writable.",
    "BadHookCall": "The program was called by hand as a hook, or a custom property has the name of a"
    " variable of vdsm's hooks.",
    "BadProperty": "The engine lets the property have a value that localdisk does not know: correct the"
    " pattern, too ([engine.md](../examples/engine.md)).",
    "BadDiskData": "vdsm has described a disk in a way that could mean two things, or nothing;"
    " localdisk does not guess which volume is meant.",
    "BadDomain": "The same for the domain XML: two disks with one name, for example.",
    "DiskRefused": "The VM has a disk that has no local copy by its nature: a direct LUN, a network"
    " disk, a disk that VMs share. Such a disk of an image can be left on shared storage with `vms: …"
    " disks:`.",
    "SourceRefused": "The image is damaged, uses a feature that cannot be copied, or names a file that"
    " is not of its chain. The message has which of these, and a command that was tried for it.",
    "OperationRefused": "Memory and local disks cannot go to another host together; see [every"
    " operation](../examples/engine.md#3-every-operation-who-refuses-it-and-what-happens-to-the-data).",
    "HotplugRefused": "A disk that is plugged in could not be copied without holding up the VM. With"
    " `hotplug: shared` it stays on shared storage.",
    "UnplugRefused": "Plugged in again, the disk would come back from shared storage, with older data.",
    "CommandFailed": "A tool (LVM, qemu-img, virsh, udevadm) ended with an error; `<said>` is its last"
    " line, or the lines of LVM's that have the reason. `localdisk check` often finds the cause.",
    "CommandTimeout": "A tool hangs, mostly because storage does. LVM waits for another LVM command"
    " that holds its lock.",
    "CommandMissing": "`localdisk check` names the package.",
    "CommandForbidden": "A hardening guide has taken a tool away from all but a group. User vdsm runs"
    " sudo, virsh and qemu-img.",
    "CommandBlocked": "A rule of sudo that comes after ours has NOEXEC, the file system is mounted"
    " noexec, or a security module refuses.",
    "Unseen": "Only `check` prints it: the file or directory could not be judged.",
    "HelperUnavailable": "vdsm may not run the helper as root, or sudo refuses user vdsm for another"
    " reason, such as an expired account: `sudo -u vdsm sudo -n -l`, then `localdisk check`.",
    "RunUnwritable": "Who works on which disk is in `/run/localdisk`; without that file nobody may begin. The"
    " record of progress in it, and the counters, refuse nothing.",
    "BadRequest": "Something else than localdisk's hook spoke to the helper, or the file was updated"
    " between two steps of one start: start the VM again.",
    "RootNeeded": "LVM needs root. Without root, `status` shows what runs.",
    "NoVolumeGroup": "LVM does not list the group. On EL9 a group that is not in LVM's devices file"
    " does not exist for LVM; after a failed device it is gone.",
    "VolumeGroupHidden": "LVM finds the group only without the filters of lvm.conf, or without its devices"
    " file.",
    "VolumeGroupUnusable": "The group is exported, shared between hosts or another host's, one of two of"
    " that name, on devices that LVM sees twice, or left inactive by `activation/volume_list`; or a"
    " physical volume is missing. No disk is made or removed in it until that is mended.",
    "NoSpace": "A preallocated disk takes its whole virtual size. What gc has set aside for an erase"
    " counts until it is erased. `localdisk status` shows who has the room.",
    "MetadataAreaFull": "LVM describes each volume in an area at the beginning of a device, 1 MiB by default,"
    " of which it can fill half: some 1,000 disks. `vgcreate --metadatasize` makes it larger; an area that is"
    " there cannot grow, but a further device can have a larger one. `status` and the log warn before.",
    "NoThinPool": "The property `lvmthin`, or `backend: lvmthin`, needs `thin_pool`.",
    "ThinPoolNotZeroing": "Every local disk would show what was on the device before, also other VMs' data.",
    "ThinPoolInactive": "LVM reports how full a pool is only while it is active.",
    "ThinPoolBroken": "The kernel or LVM could not read the pool's metadata. Do not write to the pool"
    " before the repair.",
    "ThinPoolFull": "Used data, and what the copy will write, would pass `margins.thin_data`; or used"
    " metadata has passed `margins.thin_metadata`. A pool that is full fails the writes of all VMs in"
    " it.",
    "ThinPoolAtThreshold": "LVM's own threshold (`thin_pool_autoextend_threshold` of lvm.conf) is lower"
    " than the margins.",
    "ThinPoolUnusable": "LVM cannot work with the pool, whatever room it has: after an old backup of the"
    " metadata was restored, for example. Nothing is evicted for it.",
    "CacheFull": "In the log of a start: the disk was copied in full instead. From `prefetch`: nothing"
    " was fetched.",
    "CacheOff": "`prefetch` needs the cache.",
    "NoTemplate": "`prefetch` takes only what the storage domain's metadata has as a template's. In the"
    " log of a start: the disk was copied in full.",
    "ForeignVolume": "An LV has the name of the disk that is to be made, and no tags of localdisk. It"
    " is never touched.",
    "OtherOwner": "Two VMs have a disk of the same volume, or the VM was imported again under another id.",
    "DiskBusy": "A program of the host has the device open: a backup, `kpartx`, a loop device, a mount,"
    " also in a container's mount namespace. The commands end them from the top.",
    "DependentVolumes": "An administrator made a snapshot of the local disk, or put a cache on it. LVM"
    " would remove both together.",
    "NoSuchDisk": "`remove` takes a volume id, `VG/LV`, a device path, or a VM by UUID or name.",
    "SeveralDisks": "Two volume groups have an LV of that name.",
    "DiskNeeded": "`remove` removes nothing at all while one of the disks that you named is needed.",
    "CannotDiscard": "A device that does not discard, or a thin pool that does not pass discards down,"
    " would leave the bytes readable.",
    "VmRuns": "vdsm recovers a VM that runs, and its disk is incomplete, which a VM cannot have started"
    " from: look at what it runs from (`virsh -r domblklist VM`) before you stop it.",
    "StillRuns": "vdsm reported a stop, and libvirt has the VM still. gc removes or keeps the disks later.",
    "SourceChanged": "A VM ran from the image elsewhere, or somebody wrote to it, since the disk was"
    " kept: [kept disks](#kept-stale-and-drifted-disks).",
    "OtherLeaf": "A snapshot was made, removed or previewed while the VM was down: [kept"
    " disks](#kept-stale-and-drifted-disks).",
    "KeptStale": "The VM ran on this host with the property removed or `off`: [kept"
    " disks](#kept-stale-and-drifted-disks).",
    "DiskDrifted": "[drifted.md](drifted.md) brings the data together. The VM is not started until then.",
    "NotLocal": "Between the preparation of the disks and the start of the VM, the local disk was"
    " removed or changed.",
    "DeviceNotReady": "udev did not make the device or give it to user vdsm in time, LVM has made it"
    " read-only, or it is another device.",
    "LibvirtSilent": "If nobody can say which VMs run, no disk is removed and no kept disk is used.",
    "VirshUnusable": "virsh is not installed, or user vdsm may not run it.",
    "CopyFailed": "qemu-img could not read the source or write the local disk; its own words are in the"
    " message. The unfinished disk is removed.",
    "PoolFilledUp": "VMs of the pool wrote more while the copy ran than the margin had left.",
    "EraseFailed": "The disk stays set aside, with its data, until gc can erase it. It is no VM's any more.",
    "VmForgotten": "The VM was powered off while its disk was copied. Nothing to do.",
    "Interrupted": "The hook or a command was ended: a stop of vdsmd, a reboot, Ctrl-C.",
    "StartCancelled": "The VM was powered off while its disks were copied: nothing to do. Or its resume, or a"
    " preview with memory, was refused before: if you try that again, the message has the reason.",
}


def classes() -> dict[str, type[Error] | type[Interrupted]]:
    """Every error that an operator can see by its name, in the order of errors.py."""
    kinds = (Error, Interrupted)
    found = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, kinds)]
    return {kind.__name__: kind for kind in found if kind is not Error and kind.__name__ not in CARRIERS}


def reference() -> str:
    """Markdown table of all errors: the name that metrics have, what it prints, what is behind it."""
    rows = "".join(f"| {' | '.join(row)} |\n" for row in _rows())
    return f"| reason | message : what to do | what is behind it |\n|---|---|---|\n{rows}"


def _rows() -> Iterator[tuple[str, str, str]]:
    for name, kind in classes().items():
        reason = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
        yield f"`{reason}`", f"{_shown(kind.what)} : {_shown(kind.fix)}", BEHIND[name]


def _shown(template: str) -> str:
    """A template of a message with its fields as `<name>`."""
    names = {name for _, name, _, _ in Formatter().parse(template) if name}
    text = template.format(**{name: f"<{name}>" for name in names})
    mark = "``" if "`" in text else "`"
    return f"{mark}{' ' * (len(mark) - 1)}{text}{' ' * (len(mark) - 1)}{mark}".replace("|", r"\|")
