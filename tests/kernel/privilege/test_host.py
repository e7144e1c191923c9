"""Command lines, environments, and what a process inherits from whoever starts it."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bed import host, libvirt
from tests.bed.player import run_point
from tests.bed.shell import run
from tests.bed.storage import FileStorage
from tests.bed.vm import Disk, disk_json
from tests.kernel.privilege.attempts import (
    EVIL_SHELL,
    HAUNT,
    PYTHON,
    SIZE,
    SUDO_HELPER,
    Scene,
    Talk,
    Traces,
    as_user,
    aside,
    is_refusal,
    marks,
    script,
    traces,
    tried,
    works,
)
from tests.kernel.steps import CONFIG, configure, device, processes, starting, stop, wait_for

PROGRAM = str(host.PROGRAM)
KEEP = "retention: {on_stop: keep}\n"


# -- command lines

SUDO = ("sudo", "-n")
VDSMS_COMMANDS: dict[str, tuple[str, ...]] = {
    "without sudo": (PROGRAM, "helper"),
    "gc without sudo": (PROGRAM, "gc"),
    "hook before_vdsm_start without sudo": (PROGRAM, "hook", "before_vdsm_start"),
    "id": (*SUDO, "id"),
    "a shell": (*SUDO, "-s"),
    "a login": (*SUDO, "-i"),
    "a shell with the helper": (*SUDO, "-s", PROGRAM, "helper"),
    "no mode": (*SUDO, PROGRAM),
    "gc": (*SUDO, PROGRAM, "gc"),
    "hook before_vdsm_start": (*SUDO, PROGRAM, "hook", "before_vdsm_start"),
    "status to a file": (*SUDO, PROGRAM, "status", "--prometheus", "/etc/cron.d/x"),
    "helper with an argument": (*SUDO, PROGRAM, "helper", "helper"),
    "helper with --config": (*SUDO, PROGRAM, "helper", "--config", f"{HAUNT}/config"),
    "--config before helper": (*SUDO, PROGRAM, "--config", f"{HAUNT}/config", "helper"),
    "helper and gc in one word": (*SUDO, PROGRAM, "helper gc"),
    "helper and a newline": (*SUDO, PROGRAM, "helper\n"),
    "an empty argument": (*SUDO, PROGRAM, "helper", ""),
    "help": (*SUDO, PROGRAM, "helper", "-h"),
    "as qemu": (*SUDO, "-u", "qemu", PROGRAM, "helper"),
    "as vdsm": (*SUDO, "-u", "vdsm", PROGRAM, "helper"),
    "as user -1": (*SUDO, "-u", "#-1", PROGRAM, "helper"),
    "as group root": (*SUDO, "-g", "root", PROGRAM, "helper"),
    "-E": (*SUDO, "-E", PROGRAM, "helper"),
    "--preserve-env": (*SUDO, "--preserve-env=LVM_SYSTEM_DIR", PROGRAM, "helper"),
    "a variable": (*SUDO, f"LVM_SYSTEM_DIR={HAUNT}/lvm", PROGRAM, "helper"),
    "PYTHONPATH": (*SUDO, f"PYTHONPATH={HAUNT}/python", PROGRAM, "helper"),
    "LD_PRELOAD": (*SUDO, f"LD_PRELOAD={HAUNT}/x.so", PROGRAM, "helper"),
    "PATH": (*SUDO, f"PATH={HAUNT}/bin", PROGRAM, "helper"),
    "another directory": (*SUDO, "-D", str(HAUNT), PROGRAM, "helper"),
    "another root": (*SUDO, "-R", str(HAUNT), PROGRAM, "helper"),
    "more descriptors": (*SUDO, "-C", "10", PROGRAM, "helper"),
    "an editor": (*SUDO, "-e", PROGRAM),
    "python": (*SUDO, PYTHON, PROGRAM, "helper"),
    "a shell script of that name": (*SUDO, f"{HAUNT}/evil/localdisk", "helper"),
    "a copy": (*SUDO, f"{HAUNT}/copy/localdisk", "helper"),
    "another name": (*SUDO, f"{HAUNT}/other", "helper"),
    "another name linked like a hook": (*SUDO, f"{HAUNT}/before_vdsm_start/50_localdisk", "helper"),
}


OTHERS_COMMANDS = {
    "nobody: the helper": ("nobody", (*SUDO, PROGRAM, "helper")),
    "qemu: the helper": ("qemu", (*SUDO, PROGRAM, "helper")),
    "nobody: the helper as vdsm": ("nobody", (*SUDO, "-u", "vdsm", PROGRAM, "helper")),
    "qemu: the helper without sudo": ("qemu", (PROGRAM, "helper")),
    "nobody: gc without sudo": ("nobody", (PROGRAM, "gc")),
}
COMMANDS = {**{name: ("vdsm", argv) for name, argv in VDSMS_COMMANDS.items()}, **OTHERS_COMMANDS}


@pytest.fixture(scope="module")
def named(scene: Scene) -> None:
    """The program under other names, and another program under its name."""
    for directory in ("evil", "copy", "link", "before_vdsm_start", "race"):
        (HAUNT / directory).mkdir()
        shutil.chown(HAUNT / directory, "vdsm")
    script(HAUNT / "evil/localdisk", EVIL_SHELL)
    shutil.copy(PROGRAM, HAUNT / "copy/localdisk")
    shutil.chown(HAUNT / "copy/localdisk", "vdsm")
    for link in ("other", "link/localdisk", "before_vdsm_start/50_localdisk", "before_vdsm_start/localdisk"):
        (HAUNT / link).symlink_to(PROGRAM)
    (HAUNT / "config").write_text(f"volume_group: {scene.shared_group}\n")


@dataclass(frozen=True)
class Tried:
    """How command lines ended, what each of them made somebody run; and the host before and after them."""

    done: Mapping[str, subprocess.CompletedProcess[str]]
    marks: Mapping[str, tuple[str, ...]]
    before: Traces
    after: Traces


@pytest.fixture(scope="module")
def commands(scene: Scene, named: None) -> Tried:
    before = traces(scene)
    done, left = {}, {}
    environ = {
        "SUDO_EDITOR": f"{HAUNT}/bin/lvm",
        "SHELL": f"{HAUNT}/bin/lvm",
        "LVM_SYSTEM_DIR": f"{HAUNT}/lvm",
    }
    for name, (user, argv) in COMMANDS.items():
        done[name] = tried(user, *argv, environ=environ, data=b"{}\n")
        left[name] = marks()
    return Tried(done, left, before, traces(scene))


@pytest.mark.parametrize("name", COMMANDS)
def test_command(commands: Tried, name: str) -> None:
    done = commands.done[name]
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr
    assert commands.marks[name] == ()
    assert commands.after == commands.before


@pytest.mark.parametrize(
    "path",
    [
        f"{HAUNT}/link/localdisk",
        f"{HAUNT}/before_vdsm_start/localdisk",
        "/usr/local/libexec/../libexec/localdisk",
        "/usr/local//libexec/./localdisk",
    ],
)
def test_the_same_file_by_another_path(scene: Scene, named: None, unchanged: None, path: str) -> None:
    """sudo goes by the file, and runs what its rule names: then it is the helper, and no other mode."""
    with Talk([*SUDO, path, "helper"]) as talk:
        with contextlib.suppress(BrokenPipeError):
            talk.send({"verb": "gc"})
        answer = talk.answer()
        assert answer is None or is_refusal(answer)
        if answer:
            words = Path(f"/proc/{talk.pid}/cmdline").read_bytes().split(b"\0")
            assert words[-3:] == [PROGRAM.encode(), b"helper", b""]


def test_a_link_that_changes(scene: Scene, named: None, unchanged: None) -> None:
    """The name is the program's when sudo looks, and an evil script's when it runs, or would be."""
    swap = """
import os, sys
while True:
    for target in sys.argv[1:]:
        os.symlink(target, "new")
        os.rename("new", "localdisk")
"""
    paths = (PROGRAM, f"{HAUNT}/evil/localdisk")
    swapper = subprocess.Popen([PYTHON, "-c", swap, *paths], cwd=HAUNT / "race", **as_user("vdsm"))
    try:
        wait_for(lambda: (HAUNT / "race/localdisk").is_symlink(), "the link")
        for _ in range(10):
            tried("vdsm", *SUDO, f"{HAUNT}/race/localdisk", "helper")
    finally:
        swapper.kill()
        swapper.wait()


# -- environments

EVIL: dict[str, str] = {
    "PATH": f"{HAUNT}/bin",
    "PYTHONPATH": f"{HAUNT}/python",
    "PYTHONHOME": f"{HAUNT}/python",
    "PYTHONSTARTUP": f"{HAUNT}/python/startup.py",
    "PYTHONINSPECT": "1",
    "PYTHONUSERBASE": f"{HAUNT}/python",
    "PYTHONPLATLIBDIR": f"{HAUNT}/python",
    "PYTHONPYCACHEPREFIX": str(HAUNT),
    "PYTHONBREAKPOINT": "os.system",
    "PYTHONWARNINGS": "error",
    "PYTHONEXECUTABLE": f"{HAUNT}/bin/python3",
    "SHIV_ROOT": f"{HAUNT}/shiv",
    "SHIV_INTERPRETER": f"{HAUNT}/bin/python3",
    "SHIV_ENTRY_POINT": "startup:main",
    "SHIV_MODULE": "startup",
    "SHIV_CONSOLE_SCRIPT": "startup",
    "SHIV_PREPEND_PYTHONPATH": f"{HAUNT}/python",
    "SHIV_FORCE_EXTRACT": "1",
    "LVM_SYSTEM_DIR": f"{HAUNT}/lvm",
    "LVM_BINARY": f"{HAUNT}/bin/lvm",
    "LVM_COMMAND_PROFILE": "evil",
    "LVM_RUN_BY_DMEVENTD": "1",
    "DM_DEV_DIR": str(HAUNT),
    "DM_DEFAULT_NAME_MANGLING_MODE": "none",
    "DM_DISABLE_UDEV": "1",
    "LIBVIRT_DEFAULT_URI": "test:///default",
    "VIRSH_DEFAULT_CONNECT_URI": "test:///default",
    "HOME": str(HAUNT),
    "XDG_CACHE_HOME": str(HAUNT),
    "XDG_CONFIG_HOME": str(HAUNT),
    "TMPDIR": str(HAUNT),
    "BASH_ENV": f"{HAUNT}/startup",
    "ENV": f"{HAUNT}/startup",
    "LC_ALL": "xx_XX.evil",
    "LOCPATH": str(HAUNT),
    "TZ": f":{HAUNT}/tz",
    "LOCALDISK_DEBUG": "1",
    "LOCALDISK_CONFIG": f"{HAUNT}/config",
    "localdisk": "lvmthin",
    "vmId": "x",
    "_hook_domxml": "/etc/shadow",
}
LOADER = {
    "LD_PRELOAD": f"{HAUNT}/evil.so",
    "LD_AUDIT": f"{HAUNT}/evil.so",
    "LD_LIBRARY_PATH": str(HAUNT),
    "GCONV_PATH": str(HAUNT),
}
SUDOS = {
    "SUDO_ASKPASS": f"{HAUNT}/bin/lvm",
    "SUDO_PROMPT": "evil",
    "SUDO_USER": "root",
    "SUDO_UID": "0",
    "SUDO_COMMAND": "evil",
}


def test_the_bait_is_taken(scene: Scene) -> None:
    """By a program that has no defence; else these attempts would prove nothing."""
    for argv in (["lvm"], [PYTHON, "-c", "0"]):
        chosen = {"PATH": EVIL["PATH"], "PYTHONPATH": EVIL["PYTHONPATH"]}
        subprocess.run(argv, env=chosen, check=True, **as_user("nobody"))
    number = int(run("id", "-u", "nobody"))
    assert marks(number) == (f"ran-{number}-lvm", f"ran-{number}-python")
    for name in marks():
        (HAUNT / name).unlink()


@pytest.fixture(scope="module")
def environments(scene: Scene) -> Mapping[str, dict[str, str]]:
    """The environments of a helper whose caller had all of this in his own, and of an LVM command of it."""
    before = traces(scene)
    argv = ["/usr/bin/sudo", *SUDO_HELPER[1:]]
    with Talk(argv, {**EVIL, **LOADER, **SUDOS}) as talk:
        works(scene, talk)
        helper = environment(talk.pid)
        talk.send(*[scene.claim(), scene.claim()])
        lvm: dict[str, str] = {}
        while not lvm:
            lvm = tool(talk.pid)
        talk.answer()
        talk.answer()
    assert traces(scene) == before
    return {"helper": helper, "lvm": lvm}


def environment(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_text()
    return dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)


def tool(pid: int) -> dict[str, str]:
    """The environment of an LVM command that the helper runs just now, {} where there is none."""
    for child, words in processes():
        with contextlib.suppress(OSError):
            if words[0] == "lvm" and f"\nPPid:\t{pid}\n" in Path(f"/proc/{child}/status").read_text():
                return environment(child)
    return {}


@pytest.mark.parametrize("name", [*EVIL, *LOADER, *SUDOS])
def test_variable(environments: Mapping[str, Mapping[str, str]], name: str) -> None:
    value = {**EVIL, **LOADER, **SUDOS}[name]
    assert environments["helper"].get(name) != value
    assert environments["lvm"].get(name) != value


def test_roots_own_environment(scene: Scene, unchanged: None) -> None:
    """sudo's rule removed or forgotten: the program does not believe the environment by itself either."""
    with Talk([PROGRAM, "helper"], {**EVIL, "PATH": f"{HAUNT}/bin:/usr/bin"}, user="root") as talk:
        works(scene, talk)
        assert is_refusal(talk.ask({"verb": "gc"}))


def test_custom_properties(scene: Scene) -> None:
    """vdsm puts them into the hook's environment: nothing else runs there, either, and the disk is made."""
    before = traces(scene, is_new=True)
    storage = FileStorage()
    image = storage.template(SIZE, seed=4)
    custom = {name: value for name, value in EVIL.items() if name not in ("vmId", "_hook_domxml")}
    try:
        starting(scene.vm_id)
        data = disk_json(Disk("vda", image))
        result = run_point("after_disk_prepare", scene.vm_id, data, {**custom, "localdisk": "lvm"})
        libvirt.undefine(scene.vm_id)
        assert result.rc == 0, result.stderr
        assert json.loads(result.data)["path"] == str(device(image))
        assert marks() == ()
        configure()
        stop(scene.vm_id, image)
    finally:
        configure(KEEP)
        storage.remove()
    # a new file of the same text
    assert traces(scene, is_new=True).volumes == before.volumes


# -- what the caller leaves to a process that he starts


def test_umask(scene: Scene) -> None:
    """What root extracts can be read by all, and written by nobody else, whatever the caller's umask is."""
    for umask in (0, 0o077):
        with aside(host.TREES):
            shutil.rmtree(host.TREES)
            done = tried("vdsm", *SUDO_HELPER, umask=umask)
            assert (done.returncode, done.stderr) == (0, "")
            for path in (host.TREES, *host.TREES.glob("*-cpython-*/**/*")):
                status = path.lstat()
                assert status.st_uid == 0
                assert status.st_mode & 0o022 == 0, path
                assert status.st_mode & 0o044 == 0o044, path


def test_limits(scene: Scene, unchanged: None) -> None:
    """No file may get longer than this: nothing half is believed afterwards."""
    most = (100_000, 100_000)
    with aside(host.TREES):
        shutil.rmtree(host.TREES)
        done = tried("vdsm", *SUDO_HELPER, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, most))
        assert (done.returncode, done.stdout) == (2, ""), done
        assert "cannot extract" in done.stderr
        with Talk() as talk:
            works(scene, talk)


def test_standard_output_is_not_one(scene: Scene, unchanged: None) -> None:
    """Standard output closed, or opened for reading only: nothing is written elsewhere."""
    for redirection in (">&-", f"1<{CONFIG}", "0<&- 1>&- 2>&-"):
        command = f"echo '{{}}' | sudo -n {PROGRAM} helper {redirection}"
        tried("vdsm", "sh", "-c", command)
