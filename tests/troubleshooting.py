"""An explanation of each error; `python -m tests.readme` makes a table of them in docs/operations.md.

errors.py has the messages.  This module has what a message has no room for: when it happens, and where to
look. A test fails if an error has no entry.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from string import Formatter

from localdisk import errors
from localdisk.errors import Error, Interrupted

# HelperRefused prints the helper's error, which is one of the others.
CARRIERS = {"HelperRefused"}

BEHIND = {
    "UsageError": "The command line is wrong: [command line](#command-line).",
    "ConfigUnreadable": "A configuration that others can write is not read, and no VM starts from local"
    " disks until that is corrected.",
    "ConfigRefused": "The lines before it show each problem with its line and column. No VM starts from"
    " local disks until all are corrected; running VMs are not affected.",
    "InstallRefused": "`install` or `uninstall` found something that it does not overwrite, or was not"
    " called as the built file. Nothing was changed.",
    "OlderHookBack": "vdsm's package was updated and has brought its own hook back; both hooks would copy"
    " each disk.",
    "WorkUnfinished": "After `uninstall`, nobody would finish this work or remove this disk.",
    "MetricsUnwritable": "The new file is written beside the old one and then renamed, so the directory must"
    " be writable.",
    "BadHookCall": "The program was called by hand as a hook, or a custom property has the same name as a"
    " variable of vdsm's hooks.",
    "BadProperty": "The engine accepts a value for the property that localdisk does not know: correct the"
    " engine's pattern, too ([engine.md](../examples/engine.md)).",
    "BadDiskData": "vdsm's description of a disk is ambiguous or incomplete; localdisk does not guess which"
    " volume is meant.",
    "BadDomain": "The same for the domain XML: two disks with one name, for example.",
    "DiskRefused": "The VM has a disk that cannot have a local copy: a direct LUN, a network disk, a disk"
    " that VMs share. If it is an image, it can be left on shared storage with `vms: … disks:`.",
    "SourceRefused": "The image is damaged, uses a feature that cannot be copied, or names a file that"
    " does not belong to its chain. The message names the cause, and a command that was tested for it.",
    "OperationRefused": "A VM's memory cannot move to another host, or be restored, together with its local"
    " disks; see [every"
    " operation](../examples/engine.md#3-every-operation-who-refuses-it-and-what-happens-to-the-data).",
    "HotplugRefused": "The VM would have to wait while the disk that is plugged in is copied. With"
    " `hotplug: shared` it uses the disk on shared storage.",
    "UnplugRefused": "Plugged in again, the disk would come back from shared storage, with older data.",
    "CommandFailed": "A tool (LVM, qemu-img, virsh, udevadm) ended with an error; `<said>` is the last line"
    " of its messages, or for LVM the lines that have the reason. `localdisk check` often finds the cause.",
    "LvmFailed": "Something on the host stops LVM, and LVM's message names it: a full or read-only `/etc` or"
    " `/run`, a typing error in `lvm.conf`, a device-mapper device that was left behind, a limit.",
    "CommandTimeout": "A tool hangs, mostly because storage hangs, or because another LVM command holds LVM's"
    " lock.",
    "UdevdGone": "LVM tells udevd of each new device, and waits until udevd has handled it."
    " `udevcomplete_all` ends LVM commands that wait in vain; gc then removes the unfinished disk.",
    "LvmLocked": "Only one LVM command at a time works on a volume group. A command that hangs, mostly"
    " because storage hangs, delays all others, and with them each start and stop.",
    "CommandMissing": "`localdisk check` names the package.",
    "CommandForbidden": "Somebody, following a hardening guide perhaps, has allowed only a group to run the"
    " tool. User vdsm runs sudo, virsh and qemu-img.",
    "CommandBlocked": "A sudo rule that comes after ours has NOEXEC, the file system is mounted noexec, or a"
    " security module refuses.",
    "Unseen": "Only `check` prints this: it could not check the file or directory.",
    "HelperUnavailable": "vdsm may not run the helper as root, or sudo refuses user vdsm for another"
    " reason, such as an expired account: `sudo -u vdsm sudo -n -l`, then `localdisk check`.",
    "RunUnwritable": "`/run/localdisk` has the lock of each disk; without its lock no work on a disk begins."
    " If only the progress or the counters cannot be written there, nothing is refused.",
    "BadRequest": "Something other than localdisk's hook sent requests to the helper, or the program was"
    " updated during a start: start the VM again.",
    "RootNeeded": "LVM needs root. Without root, `status` shows the running VMs.",
    "NoVolumeGroup": "LVM does not list the group. On EL9, LVM does not see a group that is not in its"
    " devices file. If the group's device has failed, LVM does not see it, either.",
    "VolumeGroupHidden": "LVM finds the group only without the filters of lvm.conf, or without its devices"
    " file.",
    "VolumeGroupUnusable": "The group is exported, shared between hosts or another host's, one of two of"
    " that name, on devices that LVM sees twice, or left inactive by `activation/volume_list`; or a"
    " physical volume is missing. No disk is made or removed in it until that is corrected.",
    "NoSpace": "A preallocated disk takes its whole virtual size. Disks that are set aside take room until"
    " they are erased; a start waits for that if it makes enough room. `localdisk status` shows which"
    " disks take the room.",
    "AllocationOff": "LVM uses nothing of a physical volume that `pvchange -x n` has closed, for example"
    " until its data are moved away, but still counts it as free.",
    "MetadataAreaFull": "LVM describes each volume in an area at the beginning of a device, 1 MiB by default,"
    " of which it can fill half: some 1,000 disks. `vgcreate --metadatasize` makes a larger area. An existing"
    " area cannot grow, but a further device can have a larger one. `status` and the log warn earlier.",
    "NoThinPool": "The property `lvmthin`, or `backend: lvmthin`, needs `thin_pool`.",
    "ThinPoolNotZeroing": "Every local disk would show old data of the device, also other VMs' data.",
    "ThinPoolInactive": "LVM reports how full a pool is only while it is active.",
    "ThinPoolBroken": "The kernel or LVM could not read the pool's metadata. Do not write to the pool"
    " before the repair. If LVM names two transaction ids that do not match, set the second one in the"
    " group's metadata: `vgcfgbackup`, edit `transaction_id` of the pool, `vgcfgrestore --force`.",
    "ThinPoolFull": "The used data, with the data that the copy will write, would pass `margins.thin_data`;"
    " or the used metadata has passed `margins.thin_metadata`. In a full pool, the writes of all VMs fail.",
    "ThinPoolAtThreshold": "LVM's own threshold (`thin_pool_autoextend_threshold` of lvm.conf) is lower"
    " than the margins.",
    "ThinPoolUnusable": "LVM cannot work with the pool, even if it has room: for example after an old backup"
    " of the metadata was restored. No template is evicted for it.",
    "CacheFull": "In the log of a start: the whole chain was copied instead. From `prefetch`: nothing was"
    " copied.",
    "CacheOff": "`prefetch` needs the cache.",
    "NoTemplate": "`prefetch` only takes volumes that the storage domain's metadata marks as a template's. In"
    " the log of a start: the whole chain was copied.",
    "ForeignVolume": "An LV has the name of the disk that is to be made, and no tags of localdisk. It"
    " is never touched.",
    "OtherOwner": "Two VMs have a disk of the same volume, or the VM was imported again under another id.",
    "DiskBusy": "Something on the host has the device open: a backup, `kpartx`, a loop device, a mount, also"
    " in a container's mount namespace. Run the commands of the message in their order.",
    "DependentVolumes": "An administrator made a snapshot of the local disk, or put a cache on it. LVM"
    " would remove both together.",
    "NoSuchDisk": "`remove` takes a volume id, `VG/LV`, a device path, or a VM by UUID or name.",
    "SeveralDisks": "Two volume groups have an LV of that name.",
    "DiskNeeded": "If one of the disks that you named is needed, `remove` removes none of them.",
    "CannotDiscard": "A device that cannot discard, or a thin pool that does not pass discards down, would"
    " leave the bytes readable.",
    "VmRuns": "vdsm recovers a running VM whose local disk is incomplete; the VM cannot have started from it."
    " Before you stop the VM, look at what it runs from (`virsh -r domblklist VM`).",
    "StillRuns": "vdsm reported a stop, but libvirt still knows the VM as running. gc removes or keeps the"
    " disks later.",
    "SourceChanged": "Since the disk was kept, a VM ran from the image elsewhere, or something wrote to it,"
    " or it was moved, grown, sparsified or backed up with a checkpoint. `<or_use_it>` is the command that"
    " makes the next start use the kept disk nevertheless: [kept disks](#kept-stale-and-drifted-disks).",
    "OtherLeaf": "A snapshot was made, removed or previewed while the VM was down. For `<or_use_it>`, see"
    " `source_changed`: [kept disks](#kept-stale-and-drifted-disks).",
    "KeptStale": "The VM used the image on this host from shared storage, for example without the"
    " property: [kept disks](#kept-stale-and-drifted-disks).",
    "KeptElsewhere": "`volume_group` was changed, for all VMs or for this one. A new disk in the other group"
    " would not have the data of the kept disk, and gc would remove these when `keep_for` is over.",
    "DiskDrifted": "[drifted.md](drifted.md) shows how to bring the data together. The VM does not start"
    " before that.",
    "NotLocal": "Between the preparation of the disks and the start of the VM, the local disk was"
    " removed or changed.",
    "DeviceNotReady": "udev did not make the device, or did not make vdsm its owner, in time; or LVM has made"
    " it read-only; or it is another device.",
    "LibvirtSilent": "While it is not known which VMs run, no disk is removed and no kept disk is used.",
    "VirshUnusable": "virsh is not installed, or user vdsm may not run it.",
    "CopyFailed": "qemu-img could not read the source or write the local disk; the message has its error. The"
    " unfinished disk is removed.",
    "PoolFilledUp": "While the copy ran, other VMs of the pool wrote more than the margin had left.",
    "EraseFailed": "The disk is kept set aside, with its data, until gc can erase it. It belongs to no VM.",
    "VmForgotten": "The VM was powered off while its disk was copied. Nothing to do.",
    "Interrupted": "A signal ended the hook or command: a stop of vdsmd, a reboot, Ctrl-C.",
    "StartCancelled": "The VM was powered off while its disks were copied: nothing to do. Or its resume, or"
    " its preview with memory, was refused before: try it again to see the reason.",
}


def classes() -> dict[str, type[Error] | type[Interrupted]]:
    """Every error class that an operator can see, by name, in the order of errors.py."""
    kinds = (Error, Interrupted)
    found = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, kinds)]
    return {kind.__name__: kind for kind in found if kind is not Error and kind.__name__ not in CARRIERS}


def reference() -> str:
    """Markdown table of all errors: the reason that metrics use, the message, the explanation."""
    rows = "".join(f"| {' | '.join(row)} |\n" for row in _rows())
    return f"| reason | message : what to do | explanation |\n|---|---|---|\n{rows}"


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
