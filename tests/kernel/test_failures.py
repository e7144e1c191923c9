"""What most often goes wrong on a host, one row each: a start is refused with one line that names the cause
and what to do; that is done, and the start works.

Further failures are in test_check.py (sudo, udev, LVM's lists and filters) and test_faults.py (devices).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.bed import host
from tests.bed.libvirt import undefine
from tests.bed.player import Result, run_point
from tests.bed.shell import run
from tests.bed.storage import FileStorage, Image, new_id
from tests.bed.vm import Disk, disk_json
from tests.kernel.steps import CONFIG, LOCKS, MIB, THICK, THIN, configure, device, one_line, starting, stop

GROUP = host.VOLUME_GROUP
POOL = f"{GROUP}/{host.THIN_POOL}"
SUDOERS, PROGRAM = host.SUDOERS, host.PROGRAM
LOCAL = "/etc/lvm/lvmlocal.conf"


@dataclass(frozen=True)
class Failure:
    """`breaks` makes a start fail with one line, which `says` this and what to do.

    `fix` is the command in that line; `advice` is what it says besides or instead, which somebody follows by
    doing `does`.  `undo` takes the rest of `breaks` back when the start has worked.  All commands are for the
    shell; NODE, MAPPING and SOURCE are the local disk's device, its name for device-mapper, and the volume on
    shared storage.
    """

    breaks: str
    says: str
    fix: str = "true"
    advice: str = ""
    does: str = "true"
    undo: str = "true"
    thin: bool = False


def remount(path: object) -> str:
    return f"mount -o remount,rw $(findmnt -no TARGET -T {path})"


def mount(path: object, options: str) -> str:
    return f"mkdir -p {path} && mount -t tmpfs -o mode=755,{options} bed {path}"


FAILURES = {
    # -- LVM
    "LVM's archive is read-only": Failure(
        mount("/etc/lvm/archive", "ro"),
        "to read-only filesystem",
        remount("/etc/lvm/archive"),
        undo="umount /etc/lvm/archive",
    ),
    "LVM's archive is full": Failure(
        f"{mount('/etc/lvm/archive', 'size=8k')} && yes | head -c 8192 >/etc/lvm/archive/full",
        "No space left on device",
        "df -h /etc/lvm/archive",
        does="mount -o remount,size=1m /etc/lvm/archive",
        undo="umount /etc/lvm/archive",
    ),
    "a typing error in lvmlocal.conf": Failure(
        f"echo 'devices {{ filter = [ }}' >{LOCAL}",
        f"Parse error at byte 22 (line 1): expected a value; Failed to load config file {LOCAL}",
        advice=f"correct what is wrong in {LOCAL}: lvmconfig shows it",
        does=f"lvmconfig 2>&1 | grep 'byte 22' && : >{LOCAL}",
    ),
    "LVM's locks are read-only": Failure(
        mount("/run/lock/lvm", "ro"),
        "File locking initialisation failed",
        remount("/run/lock/lvm"),
        undo="umount /run/lock/lvm",
    ),
    "a mapping of the disk's name": Failure(
        "dmsetup create MAPPING --table '0 2048 zero'", "Device or resource busy", "dmsetup remove MAPPING"
    ),
    "a file in the place of the device": Failure(
        f"mkdir -p /dev/{GROUP} && echo backup >NODE", "it is a file in /dev, not a device", "rm NODE"
    ),
    "no further volume is allowed": Failure(
        f"vgchange --logicalvolume 1 {GROUP}",
        "Maximum number of logical volumes (1) reached",
        f"vgchange --logicalvolume 0 {GROUP}",
    ),
    "no semaphores": Failure(
        "sysctl -n kernel.sem >/run/sem && sysctl -w kernel.sem='250 32000 32 0'",
        "maximum number of semaphores reached",
        "sysctl kernel.sem",
        advice="raise the fourth number of kernel.sem",
        does='sysctl -w kernel.sem="$(cat /run/sem)"',
    ),
    # -- the thin pool
    "a part of the pool is active alone": Failure(
        f"lvchange -an {POOL} && lvchange -y -ay {POOL}_tmeta",
        f"thin pool {POOL} is not active",
        f"lvchange --activate n {POOL}_tmeta {POOL}_tdata; lvchange --activate y {POOL}",
        thin=True,
    ),
    "the pool does not zero": Failure(
        f"lvchange --zero n {POOL}", "does not zero new blocks", f"lvchange --zero y {POOL}", thin=True
    ),
    "no pool": Failure(
        f"lvremove -qqy {POOL}",
        f"no thin pool {POOL}",
        f"lvcreate --type thin-pool --chunksize 64k -l 90%FREE -n {host.THIN_POOL} {GROUP}",
        thin=True,
    ),
    # -- sudo
    "others can write the sudo rule": Failure(
        f"chmod 666 {SUDOERS}",
        "is world writable",
        "find /etc/sudoers /etc/sudoers.d -type f -exec chown root:root {} + -exec chmod 0440 {} +",
    ),
    "the sudo rule is gone": Failure(f"rm {SUDOERS}", "a password is required", f"{PROGRAM} install"),
    "sudo does not read /etc/sudoers.d": Failure(
        "sed -i.aside /includedir/d /etc/sudoers",
        "a password is required",
        advice="/etc/sudoers reads it with @includedir /etc/sudoers.d",
        does="echo '@includedir /etc/sudoers.d' >>/etc/sudoers",
        undo="mv /etc/sudoers.aside /etc/sudoers",
    ),
    "sudo.conf": Failure(
        "echo 'Plugin sudoers_policy nosuch.so' >/etc/sudo.conf",
        "error in /etc/sudo.conf, line 1",
        advice="correct /etc/sudo.conf, or move it away",
        does="mv /etc/sudo.conf /etc/sudo.conf.aside",
    ),
    "PAM": Failure(
        "sed -i.aside '1i account required pam_access.so accessfile=/etc/bed.access' /etc/pam.d/sudo"
        " && echo '-:ALL EXCEPT root:ALL' >/etc/bed.access",
        "PAM account management error: Permission denied",
        advice="let vdsm pass the account lines of /etc/pam.d/sudo (pam_access: access.conf)",
        does="echo '-:ALL EXCEPT root vdsm:ALL' >/etc/bed.access",
        undo="mv /etc/pam.d/sudo.aside /etc/pam.d/sudo",
    ),
    # -- udev
    "udev does not run": Failure(  # without those that have ended, and that no parent waits for
        "udevadm control --exit && timeout 20 sh -c 'while pgrep -r R,S,D systemd-udevd; do sleep 0.1; done'"
        " && rm -f /run/udev/control",
        "not found: device not cleared",
        "udevadm trigger --settle --subsystem-match=block",
        advice="check that udev runs",
        does="/lib/systemd/systemd-udevd --daemon",
    ),
    "our udev rule is gone": Failure(
        f"rm {' '.join(map(str, host.RULES))} && udevadm control --reload",
        "Permission denied",
        advice="localdisk install brings back its udev rule",
        does=f"{PROGRAM} install",
    ),
    # -- files
    "qemu-img is for some only": Failure(
        "chmod 750 /usr/bin/qemu-img", "qemu-img cannot be run by this user", "chmod o+rx /usr/bin/qemu-img"
    ),
    "the source is not vdsm's": Failure(
        "chown root:root SOURCE && chmod 600 SOURCE",
        "Permission denied",
        advice="check that the shared storage is there and that user vdsm can read it",
        does="chown vdsm:kvm SOURCE",
    ),
    "/run is read-only": Failure(
        mount(LOCKS, "ro"), "Read-only file system", remount(LOCKS), undo=f"umount {LOCKS}"
    ),
    "others can write the configuration": Failure(
        f"chmod 666 {CONFIG}",
        f"cannot read configuration {CONFIG}: its mode 0666 lets others write it",
        advice="(chown root:root, chmod 0644)",
        does=f"chown root:root {CONFIG} && chmod 0644 {CONFIG}",
    ),
    "/var is full": Failure(
        mount("/var/cache/localdisk", "size=64k"),
        "cannot extract to",
        f"{PROGRAM} --version",
        advice="make room in /var/cache/localdisk (df -h /var/cache/localdisk)",
        does="mount -o remount,size=200m /var/cache/localdisk",
        undo="umount /var/cache/localdisk",
    ),
}

pytestmark = pytest.mark.usefixtures("libvirt", "throwaway")


@dataclass(frozen=True)
class Place:
    """The VM that each test starts, and its disk."""

    vm_id: str
    image: Image

    def start(self, is_thin: bool) -> Result:
        data = disk_json(Disk("vda", self.image))
        return run_point("after_disk_prepare", self.vm_id, data, THIN if is_thin else THICK)

    def filled(self, text: str) -> str:
        node = device(self.image)
        mapping = "-".join(word.replace("-", "--") for word in (GROUP, node.name))
        words = {"NODE": str(node), "MAPPING": mapping, "SOURCE": str(self.image.leaf.path)}
        return re.sub("|".join(words), lambda found: words[found[0]], text)

    def run(self, command: str) -> None:
        run("sh", "-c", self.filled(command))


@pytest.fixture(scope="module")
def place(machine: None, libvirt: None) -> Iterator[Place]:
    configure()
    host.remove(*host.logical_volumes())
    host.thin_pool("64m")
    storage, vm_id = FileStorage(), starting(new_id())
    yield Place(vm_id, storage.template(MIB, seed=1))
    undefine(vm_id)
    storage.remove()
    host.remove(*host.logical_volumes())


@pytest.mark.parametrize("name", FAILURES)
def test_failure(place: Place, name: str) -> None:
    failure = FAILURES[name]
    place.run(failure.breaks)
    try:
        line = one_line(place.start(failure.thin))
    finally:
        place.run(failure.does)
        place.run(failure.fix)
    started = place.start(failure.thin)
    if started.rc == 0:
        stop(place.vm_id, place.image, custom=THIN if failure.thin else THICK)
    place.run(failure.undo)
    what, _, fix = line.partition(" : ")
    assert place.filled(failure.says) in what
    assert failure.fix == "true" or place.filled(failure.fix) in fix, fix
    assert failure.advice in fix
    assert started.rc == 0, started.stderr
    assert set(host.logical_volumes()) == {host.THIN_POOL}


def test_lvm_does_not_wait_for_udev(place: Place) -> None:
    """Containers and old guides switch that off for all commands; our commands switch it on."""
    place.run(f"echo 'activation {{ udev_sync = 0 udev_rules = 0 }}' >{LOCAL}")
    started = place.start(is_thin=False)
    place.run(f": >{LOCAL}")
    assert started.rc == 0, started.stderr
    stop(place.vm_id, place.image)
