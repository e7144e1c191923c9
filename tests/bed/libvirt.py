"""A real libvirt in the bed: starts its daemons if systemd does not, and does with it what vdsm does.

start()                          once; afterwards virsh works, read-only for user vdsm
define_placeholder(vm_id)        defines the domain that vdsm defines while it prepares a VM's disks
start_domain(xml)                starts a VM as vdsm does: its domain is still defined when the VM ends
create(xml); destroy(vm_id)      starts a VM whose domain is removed when it ends; powers a VM off
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bed.shell import CommandFailed, attempt, run

ROOT = Path(__file__).resolve().parents[2]

URI = "qemu:///system"
QEMU_USERS = ("libvirt-qemu", "qemu")  # Debian's and EL's: who runs a VM
DAEMONS = ("libvirtd", "virtlogd")
OURS = Path("/run/localdisk-bed-libvirt")  # there if `start` started the daemons
AUTOSTARTED_NETWORK = Path("/etc/libvirt/qemu/networks/autostart/default.xml")

# What libvirt has found out about qemu: where it reads and writes it, where the bed keeps it from one guest
# to the next, and where a guest hands it over (guest.py).  libvirt itself finds out whether it is of this
# qemu.
CAPABILITIES = Path("/var/cache/libvirt/qemu/capabilities")
KEPT_CAPABILITIES = ROOT / ".bed/qemu-capabilities"
HANDED_OVER = Path("/run/bed-host/qemu-capabilities")

# With this capability libvirt asks a new VM for each of 400 properties of its CPU by a command of its own,
# of which qemu reads each byte by a system call of its own: 4 of 5 s of CPU in User Mode Linux.  Without it
# libvirt reads the CPU as it did from older qemus, by two commands.
ASKS_EACH_PROPERTY = "<flag name='cpu-unavailable-features'/>"


def start(timeout: float = 90) -> None:
    """Starts libvirt and what it needs, unless it runs already; returns when it answers.

    The VMs' user gets into group qemu, as it is on a host, so that it may open the local disks.
    """
    run("usermod", "-aG", "qemu", qemu_user())
    if not answers():
        start_services(timeout)
    Virsh.running()  # before a test puts something else in the place of virsh


def start_services(timeout: float) -> None:
    for directory in ("/run/dbus", "/var/log/libvirt/qemu", str(CAPABILITIES), "/var/lib/libvirt/qemu"):
        os.makedirs(directory, exist_ok=True)
    if not Path("/run/dbus/system_bus_socket").exists():
        run("dbus-daemon", "--system", "--fork")
    throwaway = "LOCALDISK_BED_THROWAWAY" in os.environ
    if throwaway:
        AUTOSTARTED_NETWORK.unlink(missing_ok=True)  # no VM here has a network card
        if KEPT_CAPABILITIES.exists():
            shutil.copytree(KEPT_CAPABILITIES, CAPABILITIES, dirs_exist_ok=True)
    start_daemons(timeout)
    if throwaway and ask_less():
        stop()
        start_daemons(timeout)


def start_daemons(timeout: float) -> None:
    OURS.touch()
    for daemon in reversed(DAEMONS):
        run(daemon, "-d")
    deadline = time.monotonic() + timeout
    while not answers():
        if time.monotonic() > deadline:
            raise CommandFailed(f"libvirtd does not answer within {timeout:.0f} s")
        time.sleep(0.1)


def ask_less() -> bool:
    """Takes ASKS_EACH_PROPERTY from what libvirt knows of qemu; True if libvirt has to read that again."""
    run("virsh", "-c", URI, "domcapabilities", "--virttype", "qemu", "--arch", "x86_64")
    asking = [file for file in CAPABILITIES.glob("*.xml") if ASKS_EACH_PROPERTY in file.read_text()]
    for file in asking:
        file.write_text(file.read_text().replace(ASKS_EACH_PROPERTY, ""))
        if HANDED_OVER.exists():
            shutil.copy(file, HANDED_OVER)
    return bool(asking)


def stop() -> None:
    """Stops the daemons if `start` started them; returns when they have ended."""
    Virsh.end()
    if not OURS.exists():
        return
    processes = [Path(f"/run/{daemon}.pid").read_text().strip() for daemon in DAEMONS]
    run("kill", *processes)
    while any(Path("/proc", process).exists() for process in processes):
        time.sleep(0.1)
    OURS.unlink()


def qemu_user() -> str:
    """The user whose qemu processes libvirt starts here."""
    return next(user for user in QEMU_USERS if not attempt("id", user).returncode)


def answers() -> bool:
    return attempt("virsh", "-r", "-c", URI, "list", "--uuid").returncode == 0


def start_domain(xml: str) -> None:
    """Defines the VM with this domain XML, in the place of its placeholder, and starts it."""
    vm_id = xml.partition("<uuid>")[2].partition("</uuid>")[0]
    define(xml)
    virsh("start", vm_id)


def create(xml: str, *options: str) -> None:
    """Starts the VM with this domain XML, which libvirt forgets when the VM ends."""
    with xml_file(xml) as file:
        virsh("create", file, *options)


def destroy(vm_id: str) -> None:
    """Ends the VM at once."""
    virsh("destroy", vm_id)


def define(xml: str) -> None:
    """Defines the VM with this domain XML, in the place of a definition of the same VM."""
    with xml_file(xml) as file:
        virsh("define", file)


def define_placeholder(vm_id: str) -> None:
    """Defines the VM without any device, not running."""
    define(f"""\
<domain type="qemu">
  <name>vm-{vm_id[:8]}</name>
  <uuid>{vm_id}</uuid>
  <memory>32768</memory>
  <os><type arch="x86_64" machine="pc">hvm</type></os>
</domain>""")


def undefine(vm_id: str) -> None:
    """Removes the definition of a VM that does not run."""
    virsh("undefine", vm_id)


@contextlib.contextmanager
def xml_file(xml: str) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(xml)
        file.flush()
        yield file.name


def known() -> frozenset[str]:
    """The UUIDs of all domains, running or not, as user vdsm sees them."""
    return frozenset(run("virsh", "-r", "-c", URI, "list", "--all", "--uuid", user="vdsm").split())


def defined() -> frozenset[str]:
    """The UUIDs of all domains, running or not."""
    return frozenset(virsh("list", "--all", "--uuid").split())


def active() -> frozenset[str]:
    """The UUIDs of all running domains."""
    return frozenset(virsh("list", "--uuid").split())


def serial_line(file: Path, timeout: float = 120) -> str:
    """The first line that a VM has written to its serial port's file."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        text = file.read_text() if file.exists() else ""
        if "\n" in text:
            return text.split("\n")[0].strip()
        time.sleep(0.5)
    raise AssertionError(f"the VM wrote no line to {file} within {timeout:.0f} s")


# -- one virsh for many commands


def virsh(*words: str) -> str:
    """What virsh prints for this command, as root.  No word may have a space or a quote.

    Raises CommandFailed with what virsh said.
    """
    return Virsh.running().ask(*words)


class Virsh:
    """An interactive virsh: most of a virsh's time is its start, above all in User Mode Linux."""

    _current: Virsh | None = None

    def __init__(self) -> None:
        self._daemon = daemon()
        self._asked = 0
        # Without keepalive: a libvirtd that hangs for a while must not end the connection.
        self._process = subprocess.Popen(
            ["virsh", "-q", "-k", "0", "-c", URI],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    @classmethod
    def running(cls) -> Virsh:
        """The one that runs; a new one if libvirtd is another since, or if virsh has ended."""
        current = cls._current
        if current and (current._daemon != daemon() or current._process.poll() is not None):
            cls.end()
        if cls._current is None:
            cls._current = Virsh()
        return cls._current

    @classmethod
    def end(cls) -> None:
        if cls._current is not None:
            cls._current._process.kill()
            cls._current._process.communicate()
            cls._current = None

    def ask(self, *words: str) -> str:
        """The lines that the command prints."""
        assert self._process.stdin
        assert self._process.stdout
        self._asked += 1
        # virsh repeats its input behind its prompt, and there the quotes are still in it.
        typed = (" ".join(words), f"echo '@end' '{self._asked}'")
        end = f"@end {self._asked}"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("".join(f"{line}\n" for line in typed).encode())
            self._process.stdin.flush()
        said = b""
        while end.encode() not in said:
            some = os.read(self._process.stdout.fileno(), 1 << 16)
            if not some:
                raise CommandFailed(f"virsh {typed[0]}: virsh ended\n{said.decode()}")
            said += some
        lines = said.decode().partition(end)[0].splitlines()
        lines = [line for line in lines if line.removeprefix("virsh # ") not in typed]
        if any(line.startswith("error: ") for line in lines):
            raise CommandFailed("\n".join([f"virsh {typed[0]}:", *lines]))
        return "\n".join(lines)


def daemon() -> str:
    """Which libvirtd runs: its process id, empty if there is no file of it."""
    try:
        return Path("/run/libvirtd.pid").read_text()
    except FileNotFoundError:
        return ""


atexit.register(Virsh.end)
