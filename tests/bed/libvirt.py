"""A real libvirt in the bed: starts its daemons where systemd does not, and does what vdsm does with it.

start()                          once; afterwards virsh works, read-only for user vdsm
define_placeholder(vm_id)        what vdsm has there while it prepares the disks of a VM
start_domain(xml)                a VM starts as vdsm starts it: its domain stays when it ends
create(xml); destroy(vm_id)      a VM starts whose domain goes when it ends; a VM is pulled the plug
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.bed.shell import CommandFailed, attempt, run

URI = "qemu:///system"
QEMU_USERS = ("libvirt-qemu", "qemu")  # Debian's and EL's: who runs a VM
DAEMONS = ("libvirtd", "virtlogd")
OURS = Path("/run/localdisk-bed-libvirt")  # there if `start` started the daemons
AUTOSTARTED_NETWORK = Path("/etc/libvirt/qemu/networks/autostart/default.xml")


def start(timeout: float = 90) -> None:
    """Starts libvirt and what it needs, unless it runs already; returns when it answers.

    The VMs' user gets into group qemu, as it is on a host, so that it may open the local disks.
    """
    run("usermod", "-aG", "qemu", qemu_user())
    if answers():
        return
    for directory in (
        "/run/dbus",
        "/var/log/libvirt/qemu",
        "/var/cache/libvirt/qemu",
        "/var/lib/libvirt/qemu",
    ):
        os.makedirs(directory, exist_ok=True)
    if os.environ.get("LOCALDISK_BED_THROWAWAY"):
        AUTOSTARTED_NETWORK.unlink(missing_ok=True)  # no VM here has a network card
    if not Path("/run/dbus/system_bus_socket").exists():
        run("dbus-daemon", "--system", "--fork")
    OURS.touch()
    for daemon in reversed(DAEMONS):
        run(daemon, "-d")
    deadline = time.monotonic() + timeout
    while not answers():
        if time.monotonic() > deadline:
            raise CommandFailed(f"libvirtd does not answer within {timeout:.0f} s")
        time.sleep(0.5)


def stop() -> None:
    """Stops the daemons if `start` started them."""
    if OURS.exists():
        for daemon in DAEMONS:
            run("kill", Path(f"/run/{daemon}.pid").read_text().strip())
        OURS.unlink()


def qemu_user() -> str:
    """The user whose qemu processes libvirt starts here."""
    return next(user for user in QEMU_USERS if not attempt("id", user).returncode)


def answers() -> bool:
    return attempt("virsh", "-r", "-c", URI, "list", "--uuid").returncode == 0


def start_domain(xml: str) -> None:
    """Defines the VM with this domain XML, in the place of its placeholder, and starts it."""
    vm_id = xml.partition("<uuid>")[2].partition("</uuid>")[0]
    run("virsh", "-c", URI, "define", "/dev/stdin", text=xml)
    run("virsh", "-c", URI, "start", vm_id)


def create(xml: str) -> None:
    """Starts the VM with this domain XML, which libvirt forgets when the VM ends."""
    run("virsh", "-c", URI, "create", "/dev/stdin", text=xml)


def destroy(vm_id: str) -> None:
    """Ends the VM at once."""
    run("virsh", "-c", URI, "destroy", vm_id)


def define_placeholder(vm_id: str) -> None:
    """Defines the VM without any device, not running."""
    xml = f"""\
<domain type="qemu">
  <name>vm-{vm_id[:8]}</name>
  <uuid>{vm_id}</uuid>
  <memory>32768</memory>
  <os><type arch="x86_64" machine="pc">hvm</type></os>
</domain>"""
    run("virsh", "-c", URI, "define", "/dev/stdin", text=xml)


def undefine(vm_id: str) -> None:
    """Removes the definition of a VM that does not run."""
    run("virsh", "-c", URI, "undefine", vm_id)


def known() -> frozenset[str]:
    """The UUIDs of all domains, running or not, as user vdsm sees them."""
    return frozenset(run("virsh", "-r", "-c", URI, "list", "--all", "--uuid", user="vdsm").split())


def active() -> frozenset[str]:
    """The UUIDs of all running domains."""
    return frozenset(run("virsh", "-r", "-c", URI, "list", "--uuid").split())


def serial_line(file: Path, timeout: float = 120) -> str:
    """The first line that a VM has written to its serial port's file."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        text = file.read_text() if file.exists() else ""
        if "\n" in text:
            return text.split("\n")[0].strip()
        time.sleep(0.5)
    raise AssertionError(f"the VM wrote no line to {file} within {timeout:.0f} s")
