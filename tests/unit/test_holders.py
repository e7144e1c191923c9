"""What has a device open, seen in a /sys and /proc of our own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localdisk import device_mapper, holders
from localdisk.errors import DiskBusy
from localdisk.holders import described
from tests.fakes import VOLUME

PATH, NUMBER = "/dev/full", "1:7"  # any device that is everywhere


class Machine:
    """The device PATH, and what stands upon it."""

    def __init__(self, directory: Path) -> None:
        self.sys, self.proc = directory / "sys", directory / "proc"
        self._count = 0
        self.write(self.proc / "self" / "mountinfo", "")

    @staticmethod
    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def device(self, name: str, below: str = "", **files: str) -> str:
        """A device, held by the one with the number `below`; returns its number."""
        self._count += 1
        number = f"253:{self._count}"
        for path, text in {"dev": number, **{key.replace("__", "/"): v for key, v in files.items()}}.items():
            self.write(self.sys / "class" / "block" / name / path, text)
        if below:
            (self.sys / "dev" / "block" / below / "holders" / name).mkdir(parents=True)
        return number

    def partition(self, name: str, below: str) -> str:
        self.write(self.sys / "dev" / "block" / below / name / "partition", "1")
        return self.device(name, partition="1")

    def mount(self, number: str, place: str) -> None:
        with (self.proc / "self" / "mountinfo").open("a") as file:
            file.write(f"36 35 {number} / {place} rw,noatime shared:1 - ext4 /dev/x rw\n")

    def namespace(self, pid: int, name: str, mounts: str = "") -> None:
        """A mount namespace, and a process in it."""
        (self.proc / str(pid) / "ns").mkdir(parents=True)
        (self.proc / str(pid) / "ns" / "mnt").symlink_to(f"mnt:[{name}]")
        self.write(self.proc / str(pid) / "comm", "snapd")
        self.write(self.proc / str(pid) / "mountinfo", mounts)

    def process(self, pid: int, name: str, path: str = PATH) -> None:
        self.write(self.proc / str(pid) / "comm", name)
        (self.proc / str(pid) / "fd").mkdir()
        (self.proc / str(pid) / "fd" / "3").symlink_to(path)


@pytest.fixture(name="machine")
def fixture_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    found = Machine(tmp_path)
    monkeypatch.setattr(device_mapper, "NAMES", str(found.sys / "class" / "block"))
    monkeypatch.setattr(device_mapper, "NUMBERS", str(found.sys / "dev" / "block"))
    monkeypatch.setattr(holders, "PROC", str(found.proc))
    return found


def test_nothing_is_seen(machine: Machine) -> None:
    who = "something that neither /proc nor /sys shows"
    assert described(PATH) == (who, f"end what fuser -v {PATH} and lsblk {PATH} show")
    assert described("/nonexistent")[0] == who


def test_a_process(machine: Machine) -> None:
    machine.process(7, "dd\x1b")
    machine.process(8, "cat", "/dev/null")
    assert described(PATH) == ("dd\\x1b (7)", f"end what fuser -v {PATH} and lsblk {PATH} show")


@pytest.mark.parametrize(
    ("files", "who", "end"),
    [
        ({"dm__name": "a-b1", "dm__uuid": "part1-LVM-x"}, "partition a-b1", f"kpartx -d {PATH}"),
        (
            {"dm__name": "vg--guest-root", "dm__uuid": "LVM-x"},
            "logical volume vg--guest-root of a group in it",
            "dmsetup remove vg--guest-root",
        ),
        ({"dm__name": "cow", "dm__uuid": ""}, "device-mapper device cow", "dmsetup remove cow"),
        ({"md__level": "raid1"}, "RAID other", "mdadm --stop /dev/other"),
    ],
    ids=["kpartx", "a guest's group", "overlay", "RAID"],
)
def test_a_device_upon_it(machine: Machine, files: dict[str, str], who: str, end: str) -> None:
    machine.device("other", NUMBER, **files)
    assert described(PATH) == (who, end)


def test_what_stands_upon_each_other_ends_from_the_top(machine: Machine) -> None:
    loop = machine.device("loop3", loop__backing_file=PATH)
    partition = machine.partition("loop3p1", loop)
    child = machine.device("dm-9", partition, dm__name="root", dm__uuid="")
    machine.mount(child, "/mnt/a\\040b")
    machine.device("loop4", loop__backing_file="/dev/null")
    assert described(PATH) == (
        "a mount at /mnt/a b, device-mapper device root, partition loop3p1, loop device loop3",
        "umount /mnt/a b; dmsetup remove root; partx -d /dev/loop3; losetup -d /dev/loop3",
    )


def test_a_mount_in_the_namespace_of_another_process(machine: Machine) -> None:
    """Once for each namespace, and ours is not among them."""
    line = f"36 35 {NUMBER} / /run/snap rw shared:1 - ext4 /dev/x rw"
    (machine.proc / "self" / "ns").mkdir()
    (machine.proc / "self" / "ns" / "mnt").symlink_to("mnt:[1]")
    machine.namespace(1, "1")
    machine.namespace(70, "2", line)
    machine.namespace(71, "2", line)
    assert described(PATH) == (
        "a mount at /run/snap in the mount namespace of snapd (70)",
        "nsenter --mount --target 70 umount /run/snap",
    )


def test_a_device_that_holds_itself(machine: Machine) -> None:
    number = machine.device("dm-1", NUMBER, dm__name="x", dm__uuid="")
    (machine.sys / "dev" / "block" / number / "holders" / "dm-1").mkdir(parents=True)
    assert described(PATH)[0] == "device-mapper device x"


def test_our_own_process_as_it_is() -> None:
    with open("/dev/full", "rb"):
        assert f"({os.getpid()})" in described("/dev/full")[0]


def test_a_busy_disk_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "described", lambda path: (f"loop0 on {path}", "losetup -d /dev/loop0"))
    error = DiskBusy(vg="vg", lv=VOLUME, state="ready", users="something", fix="find it")
    assert str(holders.busy(error)) == (
        f"local disk vg/{VOLUME} is ready and still open by loop0 on /dev/vg/{VOLUME} : "
        "losetup -d /dev/loop0, then start the VM again"
    )


LOCKS = """\
1: POSIX  ADVISORY  WRITE 310 00:1a:{inode} 0 EOF
2: FLOCK  ADVISORY  WRITE 311 00:1a:{inode}1 0 EOF
3: FLOCK  ADVISORY  WRITE 312 00:1a:{inode} 0 EOF
3: -> FLOCK  ADVISORY  WRITE 313 00:1a:{inode} 0 EOF
"""


@pytest.mark.parametrize(
    ("locks", "pid"),
    [
        (LOCKS, "310"),
        (LOCKS.partition("\n")[2], "312"),
        ("4: FLOCK  ADVISORY  READ -1 00:1a:1 0 EOF", ""),
        ("", ""),
    ],
)
def test_who_holds_a_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, locks: str, pid: str) -> None:
    """The file system is not compared: /proc/locks has another number than stat for some of them."""
    monkeypatch.setattr(holders, "PROC", str(tmp_path))
    (tmp_path / "file").touch()
    inode = (tmp_path / "file").stat().st_ino
    (tmp_path / "locks").write_text(locks.format(inode=inode))
    assert holders.of_lock(str(tmp_path / "file")) == pid
    assert holders.of_lock(str(tmp_path / "nothing")) == ""
