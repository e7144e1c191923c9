"""Which VMs libvirt knows, asked through `virsh --readonly`.

We do not use libvirt's Python binding: it is compiled for the distribution's own Python, so it cannot be part
of the zipapp.  virsh is on every oVirt host, and its read-only socket needs no password.  The URI names the
system's libvirt, and works with the modular daemon (virtqemud) and with the monolithic libvirtd.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterable

from localdisk import run
from localdisk.errors import CommandFailed, CommandMissing, CommandTimeout, LibvirtSilent, VirshUnusable
from localdisk.frozen import frozen
from localdisk.ids import is_uuid

VIRSH = ("virsh", "--readonly", "--connect", "qemu:///system")
DEADLINE = 30  # seconds
RECENT = 5.0  # seconds; what libvirt has said of a VM counts for so long
_END = "</domain>"
_RULE = "===="
_BOTH_LISTS = f"list --all --uuid; echo {_RULE}; list --uuid"


class DomainState(enum.Enum):
    """The state of a VM in libvirt."""

    UNKNOWN = "unknown"
    PLACEHOLDER = "placeholder"  # inactive, without disks: vdsm prepares the disks of a start (vm.py, `_run`)
    SHUT_OFF = "shut off"  # inactive, with disks: it ran, or vdsm starts it at this moment
    ACTIVE = "active"  # it runs or is paused


@frozen
class Domains:
    """The UUIDs of all VMs that libvirt knows in any state, and of running VMs, paused VMs included."""

    known: frozenset[str]
    active: frozenset[str]


@frozen
class Question:
    """A running virsh command."""

    _begun: run.Begun | None
    _failure: CommandMissing | CommandTimeout | None = None

    def text(self) -> str:
        """The output of virsh.  Raises LibvirtSilent."""
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
    """The UUIDs of running VMs, paused VMs included.  Raises LibvirtSilent."""
    return _list().answer()


def known() -> frozenset[str]:
    """The UUIDs of all VMs in any state.

    Raises LibvirtSilent.
    """
    return _list("--all").answer()


def ask_domains() -> Question:
    """Ask which VMs there are, and which of them run; `read_domains` reads the answer."""
    return _ask(_BOTH_LISTS)


def read_domains(text: str) -> Domains:
    """What `ask_domains` printed.  Raises LibvirtSilent."""
    every, _, running = text.partition(f"{_RULE}\n")
    return Domains(frozenset(_uuids(every.split())), frozenset(_uuids(running.split())))


def state(vm_id: str) -> DomainState:
    """The state in libvirt of one VM, a canonical UUID.  Raises LibvirtSilent."""
    return read_state(ask_state(vm_id).text(), vm_id)


def ask_state(vm_id: str) -> Question:
    """The state in libvirt of one VM, a canonical UUID; `read_state` reads the answer."""
    # The lists come last: if libvirt does not answer, the last command fails, and with it virsh.
    return _ask(f"domblklist {vm_id}; echo {_RULE}; {_BOTH_LISTS}")


def read_state(text: str, vm_id: str) -> DomainState:
    """What `ask_state` printed.  Raises LibvirtSilent."""
    parts = text.rsplit(f"{_RULE}\n", 2)  # from the right: a disk's path may hold anything
    if len(parts) != 3:
        raise LibvirtSilent(problem=f"virsh domblklist and list printed {text[:80]!r}")
    disks, known, running = parts
    found = Domains(frozenset(_uuids(known.split())), frozenset(_uuids(running.split())))
    if vm_id not in found.known:
        return DomainState.UNKNOWN
    if vm_id in found.active:
        return DomainState.ACTIVE
    return DomainState.SHUT_OFF if _has_disks(disks) else DomainState.PLACEHOLDER


def is_recent(asked_at: float) -> bool:
    """Whether an answer still counts; `asked_at` in seconds of CLOCK_MONOTONIC, 0 for no answer."""
    return asked_at > 0 and 0 <= time.monotonic() - asked_at < RECENT


def ask_names() -> Question:
    """Ask for the UUIDs of running VMs, then for all UUIDs and names; `read_names` reads the answer."""
    # Names can have any text, so they come last: a name that ends in the rule ends nothing.
    return _ask(f"list --uuid; echo {_RULE}; list --all --uuid --name")


def read_names(text: str) -> tuple[dict[str, str], frozenset[str]]:
    """Names by UUID of all VMs, and the UUIDs of running VMs, from the answer to `ask_names`.

    Raises LibvirtSilent.
    """
    running, rule, every = text.partition(f"{_RULE}\n")
    if not rule:
        raise LibvirtSilent(problem=f"virsh list --uuid printed {text[:80]!r}")
    # A name can hold all but a line feed, what Python takes for the end of a line or for a space as well.
    lines = [line for line in every.split("\n") if line.strip(" ")]
    _uuids(line[:36] for line in lines)
    return {line[:36]: line[36:].strip(" ") for line in lines}, frozenset(_uuids(running.split()))


def xmls(vm_ids: Iterable[str]) -> tuple[str, ...]:
    """The domain XML of running VMs, from one command; VMs that have ended meanwhile are left out.

    Raises LibvirtSilent.
    """
    asked = sorted(filter(is_uuid, vm_ids))
    if not asked:
        return ()
    # virsh continues after a command that failed, and fails itself only if the last command failed.
    out = _ask("; ".join([*(f"dumpxml {vm_id}" for vm_id in asked), "echo"])).text()
    *texts, _ = out.split(f"\n{_END}\n")  # lines inside of a domain are indented
    return tuple(f"{text.lstrip()}\n{_END}\n" for text in texts)


def _has_disks(table: str) -> bool:
    """Whether `domblklist` printed any disks; it also prints a heading, a rule and an empty line."""
    heading, *rows = table.splitlines() or [""]
    if heading.split() != ["Target", "Source"]:
        raise LibvirtSilent(problem=f"virsh domblklist printed {table[:80]!r}")
    return any(row.strip() for row in rows[1:])


def _list(*options: str) -> Question:
    return _ask("list", "--uuid", *options)


def _ask(*words: str) -> Question:
    try:
        return Question(run.begin([*VIRSH, *words]))
    except (CommandMissing, CommandTimeout) as error:
        return Question(None, error)


def _uuids(words: Iterable[str]) -> list[str]:
    found = list(words)
    if not all(map(is_uuid, found)):
        raise LibvirtSilent(problem=f"virsh list --uuid printed {' '.join(found)[:80]!r}")
    return found


def _silent(error: Exception | None) -> LibvirtSilent:
    problem, _, fix = str(error).partition(" : ")
    if isinstance(error, CommandMissing):
        return VirshUnusable(problem=problem, fix=fix)
    return LibvirtSilent(problem=problem)
