"""Which VMs libvirt knows, asked through `virsh --readonly`.

virsh and not libvirt's Python binding: the binding is compiled for the distribution's own Python and is
not in a zipapp; virsh is on every oVirt host, and its read-only socket needs no password.  The URI names
the system's libvirt, which is found behind a modular daemon (virtqemud) as behind a monolithic libvirtd.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from localdisk import run
from localdisk.errors import CommandFailed, CommandMissing, CommandTimeout, LibvirtSilent
from localdisk.ids import is_uuid

VIRSH = ("virsh", "--readonly", "--connect", "qemu:///system")
DEADLINE = 30  # seconds
_END = "</domain>"
_RULE = "===="


@dataclass(frozen=True)
class Question:
    """virsh under way."""

    _begun: run.Begun | None
    _failure: CommandMissing | None = None

    def text(self) -> str:
        """What it printed.  Raises LibvirtSilent."""
        try:
            if self._begun:
                return self._begun.output(DEADLINE)
        except (CommandFailed, CommandTimeout) as error:
            raise _silent(error) from None
        raise _silent(self._failure)

    def answer(self) -> frozenset[str]:
        """The UUIDs of a `list --uuid`.  Raises LibvirtSilent."""
        return frozenset(_uuids(self.text().split()))


def active() -> frozenset[str]:
    """The UUIDs of VMs that run, paused ones included.  Raises LibvirtSilent."""
    return _list().answer()


def known() -> frozenset[str]:
    """The UUIDs of all VMs in any state: a VM that vdsm is starting is defined but not active.

    Raises LibvirtSilent.
    """
    return ask_known().answer()


def ask_known() -> Question:
    """As `known`; libvirt answers while the caller does something else."""
    return _list("--all")


def ask_names() -> Question:
    """The VMs that libvirt knows with their names, then those that run; `read_names` reads the answer."""
    return _ask(f"list --all --uuid --name; echo {_RULE}; list --uuid")


def read_names(text: str) -> tuple[dict[str, str], frozenset[str]]:
    """Names by UUID of all VMs, and the UUIDs of those that run, from what `ask_names` printed.

    Raises LibvirtSilent.
    """
    every, _, running = text.partition(f"{_RULE}\n")
    rows = (line.split(None, 1) for line in every.splitlines() if line.strip())
    names = {row[0]: row[-1].strip() for row in rows}
    _uuids(names)
    return names, frozenset(_uuids(running.split()))


def xmls(vm_ids: Iterable[str]) -> tuple[str, ...]:
    """The domain XML of VMs that run, asked with one command; without that of a VM that has ended meanwhile.

    Raises LibvirtSilent.
    """
    asked = sorted(filter(is_uuid, vm_ids))
    if not asked:
        return ()
    # virsh goes on after a command that failed, and fails itself only where the last one did.
    out = _ask("; ".join([*(f"dumpxml {vm_id}" for vm_id in asked), "echo"])).text()
    *texts, _ = out.split(f"\n{_END}\n")  # what is inside is indented
    return tuple(f"{text.lstrip()}\n{_END}\n" for text in texts)


def _list(*options: str) -> Question:
    return _ask("list", "--uuid", *options)


def _ask(*words: str) -> Question:
    try:
        return Question(run.begin([*VIRSH, *words]))
    except CommandMissing as error:
        return Question(None, error)


def _uuids(words: Iterable[str]) -> list[str]:
    found = list(words)
    if not all(map(is_uuid, found)):
        raise LibvirtSilent(problem=f"virsh list --uuid printed {' '.join(found)[:80]!r}")
    return found


def _silent(error: Exception | None) -> LibvirtSilent:
    return LibvirtSilent(problem=str(error).partition(" : ")[0])
