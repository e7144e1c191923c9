"""The Ansible role of examples/ansible, run for real: this host is the controller and the fleet.

ansible-playbook is that of .venv/ansible, which ./build.sh makes, or of the directory LOCALDISK_ANSIBLE.
A run takes seconds, most of them Python starts: so the tests go through a host's life in few of them.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.bed import host
from tests.bed.shell import attempt, run
from tests.bed.storage import new_id
from tests.kernel.steps import CONFIG, MIB

PLAYBOOK = host.ROOT / "examples/ansible/site.yml"
BIN = Path(os.environ.get("LOCALDISK_ANSIBLE", host.ROOT / ".venv/ansible/bin"))
NAME = "bed-ansible"  # a volume group of these tests' own
INSTALLED = (host.PROGRAM, CONFIG, host.SUDOERS, host.CRON, *host.RULES, *host.hook_links())

pytestmark = pytest.mark.usefixtures("libvirt")


@pytest.fixture(autouse=True)
def nothing_installed() -> Iterator[None]:
    """A host without localdisk and without the tests' volume group; in the end one as the bed has it."""
    run(str(host.PROGRAM), "uninstall", "--force")
    for path in (host.PROGRAM, CONFIG):
        path.unlink(missing_ok=True)
    yield
    attempt("vgremove", "-f", "-y", NAME)
    CONFIG.unlink(missing_ok=True)
    host.install()
    CONFIG.unlink()


@pytest.fixture
def device() -> Iterator[str]:
    with loop_device("bed-ansible.img") as path:
        yield path


@contextmanager
def loop_device(name: str) -> Iterator[str]:
    file = host.SCRATCH / name
    file.touch()
    os.truncate(file, 512 * MIB)
    path = run("losetup", "--find", "--show", str(file)).strip()
    try:
        yield path
    finally:
        attempt("vgremove", "-f", "-y", NAME)
        run("losetup", "--detach", path)
        file.unlink()


class Played:
    """The output of a run of the playbook."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.text = done.stdout + done.stderr
        self.failed = done.returncode != 0
        recap = re.search(r"localhost +: ok=\d+ +changed=(\d+)", self.text)
        assert recap, self.text
        self.changed = int(recap[1])

    def has_line(self, line: str) -> bool:
        """The line was told as one: newer versions print a failed task's message as it is, all as JSON."""
        return re.search(rf'(^|"|\\n){re.escape(line)}', self.text, re.M) is not None


Play = Callable[..., Played]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Runs the playbook, and a second one after it if its tasks are given."""
    assert (BIN / "ansible-playbook").exists(), f"no ansible-playbook in {BIN}: ./build.sh test makes it"
    for name, value in {"HOME": str(tmp_path), "PIPELINING": "1", "NOCOLOR": "1"}.items():
        monkeypatch.setenv(f"ANSIBLE_{name}", value)
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    inventory = tmp_path / "inventory.yml"
    here = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}
    inventory.write_text(yaml.safe_dump({"localdisk_hosts": {"hosts": {"localhost": here}}}))

    def played(*options: str, then: tuple[str, ...] = (), **variables: object) -> Played:
        playbook, values = tmp_path / "playbook.yml", tmp_path / "variables.yml"
        after = {
            "hosts": "localdisk_hosts",
            "gather_facts": False,
            "tasks": [{"ansible.builtin.assert": {"that": list(then)}}],
        }
        plays: list[object] = [{"import_playbook": str(PLAYBOOK)}, *([after] if then else [])]
        playbook.write_text(yaml.safe_dump(plays, sort_keys=False))
        values.write_text(yaml.safe_dump(variables, sort_keys=False))
        program = str(BIN / "ansible-playbook")
        return Played(attempt(program, "-i", str(inventory), "-e", f"@{values}", *options, str(playbook)))

    return played


def installed() -> dict[str, tuple[object, ...]]:
    """What is installed, with all that a change would leave behind."""
    found: dict[str, tuple[object, ...]] = {}
    for path in INSTALLED:
        if os.path.lexists(path):
            at = path.lstat()
            found[str(path)] = (at.st_ino, at.st_mtime_ns, at.st_mode, at.st_uid, at.st_gid, at.st_size)
    return found


def staged() -> list[Path]:
    return list(Path("/tmp").glob("localdisk.*"))


def test_the_life_of_a_host(play: Play, device: str) -> None:
    other = f"{NAME}-2"
    fix = f"vgcreate --metadatasize 128m {other} DEVICE"
    told = f"no volume group {other} on this host, it holds the local disks : {fix}"
    settings = {"volume_group": NAME, "vms": {new_id(): {"volume_group": other}}}
    variables = {
        "localdisk_config": settings,
        "localdisk_create_vg": True,
        "localdisk_devices": [device],
        "localdisk_thin_pool_size": "50%FREE",
    }
    facts = (
        "localdisk_status.version == 1",
        f"'{NAME}' in localdisk_status.volume_groups | map(attribute='name')",
        "localdisk_problems | length == 1",
    )
    first = play(**variables, localdisk_check="warn", then=facts)
    assert not first.failed, first.text
    assert first.has_line(told), first.text
    # program, configuration, volume group, thin pool, what it does when it is full, install
    assert first.changed == 6, first.text
    assert len(installed()) == len(INSTALLED)
    assert yaml.safe_load(CONFIG.read_text()) == settings
    at = CONFIG.stat()
    assert (at.st_uid, at.st_gid, at.st_mode & 0o777) == (0, 0, 0o644)
    assert run("lvs", "--noheadings", "-o", "lv_when_full", f"{NAME}/pool0").strip() == "error"

    before = installed()
    second = play(**variables)
    assert second.failed
    assert second.has_line(told), second.text
    assert second.changed == 0, second.text
    assert installed() == before

    text = CONFIG.read_bytes()
    refused = play(**{**variables, "localdisk_config": {**settings, "copy": {"paralel": 2}}})
    assert refused.failed
    assert refused.changed == 0, refused.text
    assert refused.has_line(f"{CONFIG} is not changed, localdisk_config is refused:"), refused.text
    assert refused.has_line("localdisk.yaml:7:3: copy.paralel: unknown key; did you mean parallel?"), (
        refused.text
    )
    assert CONFIG.read_bytes() == text
    assert installed() == before
    assert not staged()


def test_what_would_be_changed(play: Play) -> None:
    """With --check nothing is."""
    host.install()
    before = installed()
    changed = {"volume_group": host.VOLUME_GROUP, "copy": {"nice": 5}}
    would = play("--check", "--diff", localdisk_config=changed)
    assert not would.failed, would.text
    assert would.changed == 1, would.text
    assert "+copy:" in would.text
    assert installed() == before
    assert not staged()


def test_devices_that_are_not_empty(play: Play, device: str) -> None:
    """A file system is not lost unasked, and a mounted one not even then."""
    run("mkfs.ext4", "-q", "-E", "nodiscard", "-L", "precious", device)
    storage = {
        "localdisk_config": {"volume_group": NAME},
        "localdisk_create_vg": True,
        "localdisk_devices": [device],
    }
    refused = play(**storage)
    assert refused.failed
    assert "is not empty, set localdisk_wipe_devices to lose what is there" in refused.text, refused.text
    assert "precious" in refused.text
    mounted = host.SCRATCH / "mounted"
    mounted.mkdir()
    run("mount", device, str(mounted))
    try:
        refused = play(**storage, localdisk_wipe_devices=True)
    finally:
        run("umount", str(mounted))
        mounted.rmdir()
    assert refused.failed
    assert f"{device} is in use, it is left alone" in refused.text, refused.text
    assert run("blkid", "-p", "-o", "value", "-s", "LABEL", device).strip() == "precious"
