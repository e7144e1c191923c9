"""Which VMs libvirt knows, asked through `virsh --readonly`.

virsh and not libvirt's Python binding: the binding is compiled for the distribution's own Python and is
not in a zipapp; virsh is on every oVirt host, and its read-only socket needs no password.  The URI names
the system's libvirt, which is found behind a modular daemon (virtqemud) as behind a monolithic libvirtd.
"""

from __future__ import annotations

from localdisk import run
from localdisk.errors import CommandFailed, CommandMissing, CommandTimeout, LibvirtSilent
from localdisk.ids import is_uuid

VIRSH = ("virsh", "--readonly", "--connect", "qemu:///system", "list", "--uuid")
DEADLINE = 30  # seconds


def active() -> frozenset[str]:
    """The UUIDs of VMs that run, paused ones included.  Raises LibvirtSilent."""
    return _list()


def known() -> frozenset[str]:
    """The UUIDs of all VMs in any state: a VM that vdsm is starting is defined but not active.

    Raises LibvirtSilent.
    """
    return _list("--all")


def _list(*options: str) -> frozenset[str]:
    try:
        out = run.run([*VIRSH, *options], deadline=DEADLINE)
    except (CommandFailed, CommandMissing, CommandTimeout) as error:
        raise LibvirtSilent(problem=str(error).partition(" : ")[0]) from None
    ids = out.split()
    if not all(map(is_uuid, ids)):
        raise LibvirtSilent(problem=f"virsh list --uuid printed {out[:80]!r}")
    return frozenset(ids)
