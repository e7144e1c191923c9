"""What the attempts have in common: who tries, the bait, and what must not have changed.

Somebody tries something; the test says what he was told, and that nothing of what only root could change has
changed: `traces`.  What he would have root run leaves a mark in HAUNT with the user id that it ran as.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import select
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bed import host, libvirt, vdsm
from tests.bed.shell import run
from tests.bed.storage import BlockStorage, FileStorage, digest, new_id
from tests.bed.vm import Disk, Vm, boot_sector
from tests.kernel.steps import CONFIG, LOCKS, MIB, THICK, configure, start

HAUNT = Path("/run/bed-haunt")  # everybody may write there
SECRET = Path("/run/bed-secret")  # root's alone
GROUP = host.VOLUME_GROUP
SIZE = 8 * MIB
PYTHON = "/usr/bin/python3"
SUDO_HELPER = ("sudo", "-n", str(host.PROGRAM), "helper")
EVIL_PYTHON = f"import os; open(f'{HAUNT}/ran-{{os.geteuid()}}-python', 'w')\n"
EVIL_SHELL = f'#!/bin/sh\n: >"{HAUNT}/ran-$(/usr/bin/id -u)-${{0##*/}}"\n'

Answer = dict[str, Any]


@dataclass(frozen=True)
class Scene:
    """Whose disks there are besides those of the attacker's VM, which has none yet."""

    kept: str  # the volume id of a ready disk
    kept_vm: str
    kept_image: str
    running: str  # the volume id of a running VM's disk
    running_vm: str
    running_image: str
    foreign: Mapping[str, str]  # names of logical volumes that are not localdisk's, by what they are
    shared_group: str  # a volume group of shared storage
    shared_volume: str
    vm_id: str  # the attacker's
    image_id: str

    def claim(self, **changes: object) -> dict[str, object]:
        """The attacker's VM asks for a disk of its own; `changes` replace or add fields."""
        ids = {"vm": self.vm_id, "property": "lvm", "image": self.image_id, "volume": new_id()}
        return {"verb": "claim", **ids, "seen": 0, **changes}

    def claim_kept(self, **changes: object) -> dict[str, object]:
        """As the VM that it belongs to."""
        ids = {"vm": self.kept_vm, "image": self.kept_image, "volume": self.kept}
        return self.claim(**{**ids, **changes})


def prepare(**changes: object) -> dict[str, object]:
    return {"verb": "prepare", "size": SIZE, "fingerprint": "0" * 32, "writes": 0, "base": None, **changes}


# -- who tries


def as_user(name: str) -> dict[str, Any]:
    """Options for subprocess."""
    who = pwd.getpwnam(name)
    groups = os.getgrouplist(name, who.pw_gid)
    return {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": groups}


def tried(
    user: str, *argv: str, environ: Mapping[str, str] | None = None, data: bytes = b"", **options: Any
) -> subprocess.CompletedProcess[str]:
    """How `argv` ends for that user; `environ` comes to what he has, `options` are subprocess's."""
    done = subprocess.run(
        argv,
        input=data,
        capture_output=True,
        check=False,
        timeout=120,
        env={**os.environ, **(environ or {})},
        **as_user(user),
        **options,
    )
    out, err = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
    assert "Traceback" not in err
    return subprocess.CompletedProcess(argv, done.returncode, out, err)


class Talk:
    """A helper with its pipes; user vdsm runs it unless another user is given."""

    def __init__(
        self, argv: Sequence[str] = SUDO_HELPER, environ: Mapping[str, str] | None = None, user: str = "vdsm"
    ) -> None:
        pipe = subprocess.PIPE
        options = {"env": {**os.environ, **(environ or {})}, **as_user(user)}
        self.process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, **options)
        self._read = b""
        self._ended: tuple[int, str] | None = None

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """The helper's: sudo becomes it."""
        return self.process.pid

    def send(self, *requests: object) -> None:
        """Bytes are sent as they are, everything else as a line of JSON."""
        assert self.process.stdin
        data = b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in requests)
        self.process.stdin.write(data)

    def try_to_send(self, data: bytes) -> bool:
        """Send it, at most PIPE_BUF bytes, if the pipe has room for all of it."""
        assert self.process.stdin
        os.set_blocking(self.process.stdin.fileno(), False)
        return bool(self.process.stdin.write(data))

    def answer(self, timeout: float = 60) -> Answer | None:
        """The next answer; None if none comes in time, or the helper has ended."""
        assert self.process.stdout
        while b"\n" not in self._read:
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                return None
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                return None
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def ask(self, request: object) -> Answer:
        self.send(request)
        answer = self.answer()
        assert answer is not None, f"no answer to {request!r:.200}"
        return answer

    def end(self) -> tuple[int, str]:
        """Close its input; returns its exit code and its whole standard error."""
        if self._ended is None:
            _, err = self.process.communicate(timeout=120)
            self._ended = self.process.returncode, err.decode(errors="replace")
            assert "Traceback" not in self._ended[1], self._ended
        return self._ended


def is_refusal(answer: Answer | None) -> bool:
    return answer is not None and answer.keys() == {"error"} and " : " in answer["error"]


def works(scene: Scene, talk: Talk) -> None:
    """The helper does what it is for."""
    row = {"image": scene.kept_image, "volume": scene.kept}
    answer = talk.ask({"verb": "look", "vm": scene.kept_vm, "property": "lvm", "disks": [row]})
    assert answer.get("disks"), answer


# -- what must not have changed


@dataclass(frozen=True)
class Traces:
    groups: str  # the volume groups with the numbers of their last commits
    volumes: str
    data: tuple[str, ...]  # digests of what is in others' volumes
    secret: str
    files: tuple[tuple[str, int, int, int, float], ...]  # what localdisk has on the host
    locks: tuple[str, ...]
    marks: tuple[str, ...]  # who ran what he should not have run


def traces(scene: Scene, is_new: bool = False) -> Traces:
    """`is_new`: volumes have come and gone, and with them commits."""
    columns = "vg_name,lv_name,lv_uuid,lv_tags,lv_size,lv_active"
    others = (f"{GROUP}/{scene.foreign['without tags']}", f"{scene.shared_group}/{scene.shared_volume}")
    return Traces(
        groups="" if is_new else run("vgs", "--noheadings", "-o", "vg_name,vg_seqno"),
        volumes=run("lvs", "-a", "--noheadings", "-o", columns, "-O", "vg_name,lv_name"),
        data=tuple(digest(f"/dev/{name}", MIB) for name in others),
        secret=SECRET.read_text(),
        files=tuple(_file(path) for path in (host.PROGRAM, host.SUDOERS, host.CRON, host.TREES, CONFIG)),
        locks=tuple(sorted(path.name for path in LOCKS.glob("*.*"))),
        marks=marks(),
    )


def _file(path: Path) -> tuple[str, int, int, int, float]:
    status = path.lstat()
    return str(path), status.st_uid, status.st_gid, status.st_mode, status.st_mtime


def marks(user: int | None = None) -> tuple[str, ...]:
    """What ran though it should not have; with `user`, as that user."""
    return tuple(sorted(path.name for path in HAUNT.glob(f"ran-{'*' if user is None else user}-*")))


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def haunt() -> None:
    """Make HAUNT, with the programs and modules that somebody would like root to run."""
    shutil.rmtree(HAUNT, ignore_errors=True)
    HAUNT.mkdir()
    HAUNT.chmod(0o777)
    for tool in ("lvm", "lvs", "lvcreate", "lvchange", "virsh", "blkdiscard", "sudo", "qemu-img", "python3"):
        script(HAUNT / "bin" / tool, EVIL_SHELL)
    script(HAUNT / "startup", EVIL_SHELL)
    for module in ("sitecustomize", "usercustomize", "json", "lvm", "startup", "unpack", "front", "yaml"):
        script(HAUNT / "python" / f"{module}.py", EVIL_PYTHON)
    script(HAUNT / "python/localdisk/__init__.py", EVIL_PYTHON)
    (HAUNT / "lvm").mkdir()
    (HAUNT / "lvm/lvm.conf").write_text('devices { global_filter = [ "r|.*|" ] }\n')


# -- doors that only root can open


@contextmanager
def aside(path: Path) -> Iterator[None]:
    """A copy in the place of `path`, of which anything may become."""
    original = path.with_name(f"{path.name}.bed-original")
    path.rename(original)
    try:
        if original.is_dir():
            shutil.copytree(original, path, symlinks=True)
        else:
            shutil.copy2(original, path)
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        original.rename(path)


@contextmanager
def status_of(path: Path, mode: int = 0, user: str = "", group: str = "") -> Iterator[None]:
    """`path` with another mode or owner."""
    before = path.stat()
    os.chown(
        path,
        pwd.getpwnam(user).pw_uid if user else -1,
        grp.getgrnam(group).gr_gid if group else -1,
    )
    if mode:
        path.chmod(mode)
    try:
        yield
    finally:
        os.chown(path, before.st_uid, before.st_gid)
        path.chmod(before.st_mode & 0o7777)


# -- the scene


@contextmanager
def a_scene() -> Iterator[Scene]:
    """A host on which one VM runs from its local disk, another's disk is kept, and others have volumes."""
    configure("retention: {on_stop: keep}\n")
    host.remove(*host.logical_volumes())
    haunt()
    SECRET.write_text("secret\n")
    SECRET.chmod(0o600)
    files, blocks = FileStorage(), BlockStorage(64 * MIB)
    try:
        running = a_running_vm(files)
        kept = files.template(SIZE, seed=2)
        kept_vm = start(kept)
        shared = blocks.template(SIZE, seed=3)
        yield Scene(
            kept=kept.leaf.id,
            kept_vm=kept_vm,
            kept_image=kept.id,
            running=running.disks[0].image.leaf.id,
            running_vm=running.id,
            running_image=running.disks[0].image.id,
            foreign=foreign_volumes(kept_vm, kept.id),
            shared_group=blocks.domain_id,
            shared_volume=shared.leaf.id,
            vm_id=new_id(),
            image_id=new_id(),
        )
    finally:
        for vm_id in libvirt.active():
            libvirt.destroy(vm_id)
        host.remove(*host.logical_volumes())
        files.remove()
        blocks.remove()
        shutil.rmtree(HAUNT)
        SECRET.unlink()
        configure()


def a_running_vm(storage: FileStorage) -> Vm:
    image = storage.template(SIZE, seed=1, boot=boot_sector("runs"))
    serial = Path("/run/bed-serial")
    serial.unlink(missing_ok=True)
    vm = vdsm.start(Vm(new_id(), (Disk("vda", image, boot_order=1),), serial), THICK)
    assert libvirt.serial_line(serial) == "runs"
    return vm


def foreign_volumes(vm_id: str, image_id: str) -> dict[str, str]:
    """Logical volumes of our group that are not localdisk's; the tags look like those of that VM's disk."""
    vm, image = f"VM_{vm_id}", f"IU_{image_id}"
    pool = ("--type", "thin-pool")
    made: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
        "without tags": (new_id(), (), ()),
        "with two VMs' tags": (new_id(), (), (vm, f"VM_{new_id()}", image)),
        "with an image's tag only": (new_id(), (), ("localdisk", image)),
        "with malformed tags": (new_id(), (), (f"VM_{vm_id}x", image)),
        "a pool with our tags": (new_id(), pool, ("localdisk", vm, image)),
        "the thin pool": (host.THIN_POOL, pool, ()),
        "of another name": ("backup", (), ("localdisk", vm, image)),
    }
    for name, options, tags in made.values():
        words = [word for tag in tags for word in ("--addtag", tag)]
        run("lvcreate", "-y", "-L", "8m", *(options or ["-Wn"]), *words, "-n", name, GROUP)
    return {what: name for what, (name, _, _) in made.items()}
