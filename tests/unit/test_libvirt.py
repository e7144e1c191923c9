from __future__ import annotations

import pytest

from localdisk import libvirt, run
from localdisk.errors import (
    CommandFailed,
    CommandForbidden,
    CommandMissing,
    CommandTimeout,
    Error,
    LibvirtSilent,
)
from localdisk.libvirt import DomainState
from tests.fakes import OTHER_VM, VM

ACTIVE = "virsh --readonly --connect qemu:///system list --uuid"


class Libvirt:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: str = "\n", error: Error | None = None) -> None:
        self.commands: list[tuple[str, float]] = []
        self.out, self.error = out, error
        monkeypatch.setattr(run, "begin", self.begin)

    def begin(self, argv: list[str]) -> Libvirt:
        self.argv = argv
        if isinstance(self.error, CommandMissing):
            raise self.error
        return self

    def output(self, deadline: float) -> str:
        self.commands.append((" ".join(self.argv), deadline))
        if self.error:
            raise self.error
        return self.out


def test_a_virsh_that_cannot_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    forbidden = CommandForbidden(tool="virsh", path="/usr/bin/virsh", uid=0, gid=0, mode="0750")
    for error, fix in (
        (CommandMissing(tool="virsh"), "install the package"),
        (forbidden, "chmod o.rx /usr/b"),
    ):
        Libvirt(monkeypatch, error=error)
        with pytest.raises(LibvirtSilent, match=f"virsh .* : {fix}"):
            libvirt.active()


# Output of virsh 9.0 (captured): one UUID a line, then an empty line; without a VM, an empty line.
@pytest.mark.parametrize(
    ("out", "found"),
    [("\n", set()), ("", set()), (f"{VM}\n\n", {VM}), (f"{VM}\n{OTHER_VM}\n\n", {VM, OTHER_VM})],
)
def test_the_vms_of_libvirt(monkeypatch: pytest.MonkeyPatch, out: str, found: set[str]) -> None:
    daemon = Libvirt(monkeypatch, out)
    assert libvirt.active() == found
    assert libvirt.known() == found
    assert daemon.commands == [(ACTIVE, 30), (f"{ACTIVE} --all", 30)]


@pytest.mark.parametrize("out", ["nonsense", f"{VM}\nwarning: x\n", VM.upper(), f"{VM}{OTHER_VM}\n", "-"])
def test_what_is_no_list_is_no_answer(monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    Libvirt(monkeypatch, out)
    with pytest.raises(LibvirtSilent, match="virsh list --uuid printed"):
        libvirt.known()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CommandTimeout(tool="virsh --readonly", seconds=30), "virsh --readonly did not end within 30 s"),
        (
            CommandFailed(("virsh",), 1, "error: failed to connect to the hypervisor\nerror: no socket\n"),
            r"virsh failed \(exit code 1\): error: no socket",
        ),
    ],
)
def test_a_libvirt_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch, error: Error, said: str) -> None:
    Libvirt(monkeypatch, error=error)
    with pytest.raises(LibvirtSilent, match=f"{said}[^:]* : check that libvirt runs"):
        libvirt.active()


# Output of virsh 9.0 (captured) for what asks for one VM: its disks, all VMs, those that run.
DISKS = " Target   Source\n----------------------------\n vda      /dev/ovirt-local/x====\n sdc      -\n\n"
NO_DISKS = " Target   Source\n----------------\n\n"


@pytest.mark.parametrize(
    ("disks", "known", "active", "state"),
    [
        ("", "", "", DomainState.UNKNOWN),
        ("", f"{OTHER_VM}\n", f"{OTHER_VM}\n", DomainState.UNKNOWN),
        (NO_DISKS, f"{OTHER_VM}\n{VM}\n", f"{OTHER_VM}\n", DomainState.PLACEHOLDER),
        (DISKS, f"{VM}\n", "", DomainState.SHUT_OFF),
        (DISKS.replace("====", "====\n====\n"), f"{VM}\n", "", DomainState.SHUT_OFF),
        (DISKS, f"{VM}\n", f"{VM}\n", DomainState.ACTIVE),
        (NO_DISKS, f"{VM}\n", f"{VM}\n", DomainState.ACTIVE),
    ],
)
def test_the_state_of_a_vm(
    monkeypatch: pytest.MonkeyPatch, disks: str, known: str, active: str, state: DomainState
) -> None:
    daemon = Libvirt(monkeypatch, f"{disks}====\n{known}\n====\n{active}\n")
    assert libvirt.state(VM) is state
    script = f"domblklist {VM}; echo ====; list --all --uuid; echo ====; list --uuid"
    assert daemon.commands == [(f"virsh --readonly --connect qemu:///system {script}", 30)]


@pytest.mark.parametrize(
    "out",
    [
        "",
        "====\n",
        f"====\n{VM}\n\n====\n\n",
        f"nonsense====\n{VM}\n\n====\n\n",
        f"{NO_DISKS}====\nx\n====\n",
    ],
)
def test_what_is_no_state_is_no_answer(monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    """A VM is only unknown if libvirt has listed the others."""
    Libvirt(monkeypatch, out)
    with pytest.raises(LibvirtSilent, match=r"virsh .* printed"):
        libvirt.state(VM)


# Output of virsh 9.0 (captured): UUID and name in columns.
NAMES = f"""\
{VM}

====
{VM} web one                       \n{OTHER_VM} 1                             \n
"""


def test_names_and_who_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = Libvirt(monkeypatch, NAMES)
    found = libvirt.read_names(libvirt.ask_names().text())
    assert found == ({VM: "web one", OTHER_VM: "1"}, frozenset({VM}))
    script = "list --uuid; echo ====; list --all --uuid --name"
    assert daemon.commands == [(f"virsh --readonly --connect qemu:///system {script}", 30)]


@pytest.mark.parametrize(
    "name",
    [
        "a name that is as wide as a column ====",
        "====",
        f"x\u2028{OTHER_VM}",
        f"x\x85{OTHER_VM} y",
        f"x\x0b\x0c\x1c{OTHER_VM}",
        "\u2003x",
        "\u3000",
        "名前" * 20,
        OTHER_VM,
    ],
)
def test_a_name_imitates_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """libvirt allows all but a line feed and a slash in it."""
    Libvirt(monkeypatch, f"{VM}\n\n====\n{VM} {name:<30}\n{OTHER_VM} {'b':<30}\n\n")
    found = libvirt.read_names(libvirt.ask_names().text())
    assert found == ({VM: name, OTHER_VM: "b"}, frozenset({VM}))


@pytest.mark.parametrize(
    "text", ["nonsense", "", f"{VM}\n", f"====\n{VM} a\nerror x\n", f"error\n====\n{VM} a\n"]
)
def test_names_that_are_no_answer(text: str) -> None:
    with pytest.raises(LibvirtSilent, match="virsh list --uuid printed"):
        libvirt.read_names(text)


def test_the_xml_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = "<domain type='kvm'>\n  <name>a</name>\n</domain>\n", "<domain id='2'>\n</domain>\n"
    daemon = Libvirt(monkeypatch, f"{one}\n{other}\n\n")
    assert libvirt.xmls({OTHER_VM, VM, "; undefine x"}) == (one, other)
    assert daemon.commands[0][0].endswith(f" dumpxml {VM}; dumpxml {OTHER_VM}; echo")


def test_no_vm_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = Libvirt(monkeypatch)
    assert libvirt.xmls(()) == ()
    assert daemon.commands == []
