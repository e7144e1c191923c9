"""Files, links and locks: what ordinary users could write, open or lock.

Where root alone could open the door (a directory that others may write, a file that is another's) the test
opens it first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bed import host
from tests.bed.shell import run
from tests.kernel.privilege.attempts import (
    EVIL_PYTHON,
    GROUP,
    HAUNT,
    PYTHON,
    SECRET,
    SUDO_HELPER,
    Scene,
    Talk,
    as_user,
    aside,
    is_refusal,
    marks,
    status_of,
    traces,
    tried,
    works,
)
from tests.kernel.steps import CONFIG, LOCKS

# -- what ordinary users can write, open or lock

TRY = """\
import fcntl, json, os, sys
def make(path):
    os.close(os.open(path + "/bed-made", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
def lock(path):
    fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)
attempts = {
    "write": lambda path: os.close(os.open(path, os.O_WRONLY)),
    "read": lambda path: os.close(os.open(path, os.O_RDONLY)),
    "lock": lock,
    "remove": os.unlink,
    "rename": lambda path: os.rename(path, path + ".bed"),
    "chmod": lambda path: os.chmod(path, 0o666),
    "make": make,
    "link": lambda path: os.symlink("/run/bed-haunt/evil", path + "/bed-link"),
}
succeeded = []
for name, (verb, path) in json.load(sys.stdin).items():
    try:
        attempts[verb](path)
        succeeded.append(name)
    except OSError:
        pass
print(json.dumps(succeeded))
"""


def file_attempts() -> dict[str, tuple[str, Callable[[Scene], str]]]:
    """What is tried with which file, by a name."""
    places: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("the zipapp", str(host.PROGRAM), ("write", "remove", "rename", "chmod")),
        ("the zipapp's directory", str(host.PROGRAM.parent), ("make", "rename", "chmod")),
        ("the configuration", str(CONFIG), ("write", "remove", "rename", "chmod")),
        ("the sudo rule", str(host.SUDOERS), ("write", "read", "remove", "rename")),
        ("cron's line", str(host.CRON), ("write", "remove", "rename")),
        ("a hook point", str(host.HOOKS / "before_vdsm_start"), ("make", "link", "rename", "chmod")),
        ("a hook link", str(host.HOOKS / "before_vdsm_start/50_localdisk"), ("remove", "rename")),
        ("the trees", str(host.TREES), ("make", "link", "rename", "chmod")),
        ("the trees' lock", str(host.TREES / ".lock"), ("read", "write", "lock", "remove")),
        ("/run", "/run", ("make", "link")),
        ("the locks", str(LOCKS), ("make", "link", "rename", "chmod")),
        ("the counters", str(LOCKS / "counters"), ("read", "write", "lock", "remove", "rename")),
        ("the group's nodes", f"/dev/{GROUP}", ("make", "link", "rename")),
        ("all nodes", "/dev", ("make", "link")),
        ("device-mapper's nodes", "/dev/mapper", ("make", "link")),
        ("device-mapper", "/dev/mapper/control", ("read", "write")),
        ("LVM's locks", "/run/lock/lvm", ("make", "link", "lock")),
    )
    fixed = {
        f"{verb}: {what}": (verb, lambda _, path=path: path) for what, path, verbs in places for verb in verbs
    }
    by_scene: dict[str, tuple[str, Callable[[Scene], str]]] = {
        "remove: a disk's node": ("remove", lambda s: f"/dev/{GROUP}/{s.kept}"),
        "read: somebody's volume": ("read", lambda _: f"/dev/{GROUP}/backup"),
        "write: somebody's volume": ("write", lambda _: f"/dev/{GROUP}/backup"),
        "read: a held lock": ("read", lambda s: str(LOCKS / f"{s.vm_id}.lock")),
        "lock: a held lock": ("lock", lambda s: str(LOCKS / f"{s.vm_id}.lock")),
        "remove: a held lock": ("remove", lambda s: str(LOCKS / f"{s.vm_id}.lock")),
    }
    return {**fixed, **by_scene}


FILES = file_attempts()


@pytest.fixture(scope="module", params=["vdsm", "nobody", "qemu"])
def succeeded(scene: Scene, request: pytest.FixtureRequest) -> frozenset[str]:
    """The names of the attempts at files that succeeded."""
    before = traces(scene)
    asked = {name: (verb, path(scene)) for name, (verb, path) in FILES.items()}
    with Talk() as talk:
        assert "error" not in talk.ask(scene.claim(volume=scene.vm_id))
        assert all(os.path.lexists(path) for _, path in asked.values())
        done = run(PYTHON, "-c", TRY, text=json.dumps(asked), user=request.param)
    assert traces(scene) == before
    return frozenset(json.loads(done))


@pytest.mark.parametrize("name", FILES)
def test_file(succeeded: frozenset[str], name: str) -> None:
    assert name not in succeeded


def test_what_root_extracted_is_roots(scene: Scene) -> None:
    """Each file and directory, to the root: what runs as root was written by root."""
    for path in (host.PROGRAM, CONFIG, *host.TREES.glob("*-cpython-*/**/*")):
        for each in (path, *path.parents):
            status = each.lstat()
            assert status.st_uid == 0, each
            assert not status.st_mode & 0o022 or each.is_symlink(), each


def test_a_lock_on_what_everybody_can_read(scene: Scene, unchanged: None) -> None:
    """An ordinary user locks each list of extracted files as soon as it is there: no start fails by that."""
    code = """
import fcntl, glob, os, sys, time
held = {}
while True:
    for path in glob.glob(sys.argv[1]):
        try:
            fd = os.open(path, os.O_RDONLY)
            if os.fstat(fd).st_ino in held:
                os.close(fd)
            else:
                fcntl.flock(fd, fcntl.LOCK_EX)
                held[os.fstat(fd).st_ino] = fd
                print("held", flush=True)
        except OSError:
            pass
"""
    argv = [PYTHON, "-c", code, f"{host.TREES}/*/files"]
    with aside(host.TREES):
        locker = subprocess.Popen(argv, stdout=subprocess.PIPE, **as_user("nobody"))
        try:
            assert locker.stdout
            assert locker.stdout.readline() == b"held\n"
            for _ in range(3):
                began = time.monotonic()
                with Talk() as talk:
                    works(scene, talk)
                assert time.monotonic() - began < 20
        finally:
            locker.kill()
            locker.communicate()


# -- a door that root has left open: root does not go through

PROGRAMS: dict[str, tuple[Path, dict[str, object]]] = {
    "vdsm's": (host.PROGRAM, {"user": "vdsm"}),
    "nobody's": (host.PROGRAM, {"user": "nobody"}),
    "writable for vdsm's group": (host.PROGRAM, {"mode": 0o775, "group": "kvm"}),
    "writable for all": (host.PROGRAM, {"mode": 0o757}),
    "in a directory of vdsm's": (host.PROGRAM.parent, {"user": "vdsm"}),
    "in a directory writable for vdsm's group": (host.PROGRAM.parent, {"mode": 0o775, "group": "kvm"}),
    "in a directory writable for all": (host.PROGRAM.parent, {"mode": 0o777}),
    "below a directory writable for all": (host.PROGRAM.parent.parent, {"mode": 0o777}),
    "below a directory of vdsm's": (host.PROGRAM.parent.parent, {"user": "vdsm"}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_zipapp_that_others_could_write(scene: Scene, unchanged: None, name: str) -> None:
    path, changes = PROGRAMS[name]
    with status_of(path, **changes):  # type: ignore[arg-type]
        done = tried("vdsm", *SUDO_HELPER, data=b"{}\n")
        assert (done.returncode, done.stdout) == (2, "")
        assert "could be written by others than root" in done.stderr


def poison(tree: Path) -> None:
    """Have the tree run somebody's code, in the size that it says its files have."""
    cli = tree / "site-packages/localdisk/cli.py"
    (cli.parent / "cli.pyc").unlink()
    cli.write_text(EVIL_PYTHON + "def main():\n    return 0\n")
    (tree / "files").write_text(f"{cli.stat().st_size} site-packages/localdisk/cli.py\n")


def the_tree() -> Path:
    (tree,) = host.TREES.glob("*-cpython-*")
    return tree


def given_away(path: Path, user: str) -> None:
    for each in (path, *path.glob("**/*")):
        shutil.chown(each, user)


def tree_of_vdsm() -> None:
    poison(the_tree())
    given_away(the_tree(), "vdsm")


def tree_for_all() -> None:
    poison(the_tree())
    the_tree().chmod(0o777)


def tree_for_the_group() -> None:
    poison(the_tree())
    shutil.chown(the_tree(), group="kvm")
    the_tree().chmod(0o775)


def tree_through_a_link() -> None:
    tree, elsewhere = the_tree(), HAUNT / "tree"
    poison(tree)
    shutil.move(tree, elsewhere)
    given_away(elsewhere, "vdsm")
    tree.symlink_to(elsewhere)


def tree_list_is_a_link() -> None:
    files = the_tree() / "files"
    files.unlink()
    files.symlink_to(SECRET)


@pytest.mark.parametrize(
    "damage",
    [
        tree_of_vdsm,
        tree_for_all,
        tree_for_the_group,
        tree_through_a_link,
        tree_list_is_a_link,
    ],
)
def test_extracted_tree(scene: Scene, damage: Callable[[], None]) -> None:
    """Root does not run it, and puts a good one in its place."""
    with aside(host.TREES):
        before = traces(scene)
        damage()
        with Talk() as talk:
            works(scene, talk)
        assert (the_tree() / "site-packages/localdisk/cli.pyc").stat().st_size > 10_000
        assert the_tree().stat().st_uid == 0
        assert the_tree().stat().st_mode & 0o022 == 0
        after = traces(scene)
    assert (after.marks, after.groups, after.secret) == ((), before.groups, before.secret)


def trees_of_vdsm() -> None:
    shutil.chown(host.TREES, "vdsm")


def trees_for_all() -> None:
    host.TREES.chmod(0o777)


def trees_through_a_link() -> None:
    elsewhere = HAUNT / "trees"
    shutil.move(host.TREES, elsewhere)
    shutil.chown(elsewhere, "vdsm")
    host.TREES.symlink_to(elsewhere)


@pytest.mark.parametrize("damage", [trees_of_vdsm, trees_for_all, trees_through_a_link])
def test_directory_of_trees(scene: Scene, unchanged: None, damage: Callable[[], None]) -> None:
    with aside(host.TREES):
        poison(the_tree())
        damage()
        done = tried("vdsm", *SUDO_HELPER, data=b"{}\n")
        assert (done.returncode, done.stdout) == (2, "")
        assert "could be written by others" in done.stderr
        assert marks() == ()


def config_of_vdsm() -> None:
    shutil.chown(CONFIG, "vdsm")


def config_for_the_group() -> None:
    shutil.chown(CONFIG, group="kvm")
    CONFIG.chmod(0o664)


def config_for_all() -> None:
    CONFIG.chmod(0o646)


def config_of_vdsm_through_a_link() -> None:
    elsewhere = HAUNT / "localdisk.yaml"
    shutil.move(CONFIG, elsewhere)
    shutil.chown(elsewhere, "vdsm")
    CONFIG.symlink_to(elsewhere)


def config_through_a_dangling_link() -> None:
    CONFIG.unlink()
    CONFIG.symlink_to(HAUNT / "none")


def config_is_a_pipe() -> None:
    CONFIG.unlink()
    os.mkfifo(CONFIG)


def config_is_a_directory() -> None:
    CONFIG.unlink()
    CONFIG.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        config_of_vdsm,
        config_for_the_group,
        config_for_all,
        config_of_vdsm_through_a_link,
        config_through_a_dangling_link,
        config_is_a_pipe,
        config_is_a_directory,
    ],
)
def test_configuration(scene: Scene, unchanged: None, damage: Callable[[], None]) -> None:
    """It names the group of shared storage; root does not believe it, and does not take defaults instead."""
    with aside(CONFIG), Talk() as talk:
        CONFIG.write_text(f"volume_group: {scene.shared_group}\n")
        damage()
        talk.send(scene.claim_kept(volume=scene.shared_volume))
        answer = talk.answer()
        assert answer
        assert is_refusal(answer)
        assert str(CONFIG) in answer["error"]
        assert talk.end()[0] == 2


def test_a_lock_is_a_link(scene: Scene, unchanged: None) -> None:
    """A lock is emptied and written; not so what a link in its place leads to."""
    lock = LOCKS / f"{scene.vm_id}.lock"
    lock.symlink_to(SECRET)
    try:
        with Talk() as talk:
            talk.send(scene.claim(volume=scene.vm_id))
            answer = talk.answer()
            assert answer is None or is_refusal(answer)
    finally:
        lock.unlink()


def test_the_counters_are_a_link(scene: Scene, unchanged: None) -> None:
    with aside(LOCKS):
        counters = LOCKS / "counters"
        counters.unlink()
        counters.symlink_to(SECRET)
        with Talk() as talk:
            assert is_refusal(talk.ask({}))
            works(scene, talk)


def test_locks_are_roots_alone(scene: Scene, unchanged: None) -> None:
    """Also the first one after a boot, and whatever the caller's umask is."""
    with aside(LOCKS):
        shutil.rmtree(LOCKS)
        argv = ["sh", "-c", 'umask 0; exec "$@"', "-", *SUDO_HELPER]
        with Talk(argv) as talk:
            assert "error" not in talk.ask(scene.claim(volume=scene.vm_id))
            assert (LOCKS.stat().st_uid, LOCKS.stat().st_mode & 0o7777) == (0, 0o755)
            lock = LOCKS / f"{scene.vm_id}.lock"
            assert (lock.stat().st_uid, lock.stat().st_mode & 0o7777) == (0, 0o600)
