"""Calls one hook point as vdsm calls it.

    result = run_point("after_disk_prepare", vm_id, disk_json, custom={"localdisk": "lvm"})

Every executable file of the point's directory runs, in the order of the paths, without arguments and
without input, as user vdsm (before_vdsm_start: as root), in a process group of its own, at vdsmd's
nice -20.  Its environment is vdsm's own, the VM's custom properties, vmId, a PYTHONPATH whose first
entry is empty, and the path of one temporary file with the data, which is read again when all scripts have
ended.

`start_point` returns while the first script runs, for tests that kill it or watch it.
Runs as root.  Written from vdsm's documentation of hooks, not from its code.
"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.bed.host import HOOKS, PROGRAM
from tests.bed.shell import as_user, how_it_ended

VDSM_NICE = -20
VDSM_ENVIRONMENT = {
    "HOME": "/var/lib/vdsm",
    "LANG": "en_US.UTF-8",
    "LOGNAME": "vdsm",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
    "SHELL": "/sbin/nologin",
    "USER": "vdsm",
    # vdsm appends the folder of its hook module to its own PYTHONPATH, and it has none
    "PYTHONPATH": ":/usr/lib/python3.9/site-packages/vdsm",
}
# Which variable names the data file, and where a failure refuses the operation.
JSON_POINTS = frozenset({"after_disk_prepare"})
NO_DATA_POINTS = frozenset({"before_vdsm_start"})
RAISING_POINTS = frozenset(
    {
        "after_disk_prepare",
        "before_vm_start",
        "before_vm_migrate_source",
        "before_vm_migrate_destination",
        "before_vm_hibernate",
        "before_vm_dehibernate",
        "before_disk_hotplug",
        "before_disk_hotunplug",
    }
)


@dataclass(frozen=True)
class Script:
    """How one script ended: its exit code (negative: the signal that ended it) and its whole output."""

    path: Path
    rc: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Result:
    """How the hook point ended.

    `rc` and `stderr` are the last failing script's (0 and empty: none failed): `stderr` is what the
    engine shows.  `refused`: vdsm refuses the operation.  `data`: the data that vdsm uses from then on.
    """

    rc: int
    stderr: str
    data: str
    refused: bool
    scripts: tuple[Script, ...]

    @property
    def reason(self) -> str:
        """The last failing script's error output, and how it ended if by a signal or without output."""
        failed = [script for script in self.scripts if script.rc]
        if not failed:
            return ""
        said, script = self.stderr.strip(), failed[-1]
        if said and script.rc > 0:
            return said
        return f"{script.path}: {how_it_ended(script.rc)}{f': {said}' if said else ''}"


@dataclass
class Call:
    """A hook point that is being called.

    `process` runs now (None: there is none any more); it is the first of the scripts `waiting`.
    """

    point: str
    environment: Mapping[str, str]
    data_file: Path | None
    waiting: list[Path]
    process: subprocess.Popen[str] | None = None
    done: list[Script] = field(default_factory=list)

    def start_next(self) -> None:
        """Starts the next script, if there is one."""
        self.process = None
        if self.waiting:
            self.process = start_script(self.waiting[0], self.point, self.environment)

    def kill(self, sign: signal.Signals = signal.SIGKILL) -> None:
        """Sends `sign` to the process group of the running script: to the hook and all its children."""
        assert self.process
        os.killpg(self.process.pid, sign)

    def wait(self, timeout: float = 900) -> Result:
        """Lets all scripts run to their end.

        Raises subprocess.TimeoutExpired, the running script's group killed, where vdsm would wait forever.
        """
        while self.process:
            script = self.finish(self.process, timeout)
            self.done.append(script)
            if script.rc == 2:
                break
            self.waiting.pop(0)
            self.start_next()
        return self.result()

    def finish(self, process: subprocess.Popen[str], timeout: float) -> Script:
        """Waits for the running script: until it ended and nobody holds its output open, like vdsm."""
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return Script(self.waiting[0], process.returncode, stdout, stderr)

    def result(self) -> Result:
        """What came out; removes the data file."""
        data = ""
        if self.data_file:
            data = self.data_file.read_text()
            self.data_file.unlink()
        failed = [script for script in self.done if script.rc]
        rc, stderr = (failed[-1].rc, failed[-1].stderr) if failed else (0, "")
        return Result(rc, stderr, data, bool(failed) and self.point in RAISING_POINTS, tuple(self.done))


def run_point(
    point: str,
    vm_id: str = "",
    data: str = "",
    custom: Mapping[str, str] | None = None,
    hooks: Path = HOOKS,
    timeout: float = 900,
) -> Result:
    """Calls the hook point and waits for it; see `start_point`."""
    return start_point(point, vm_id, data, custom, hooks).wait(timeout)


def start_point(
    point: str,
    vm_id: str = "",
    data: str = "",
    custom: Mapping[str, str] | None = None,
    hooks: Path = HOOKS,
) -> Call:
    """Calls the hook point `point` of the VM with this id and these custom properties.

    `data` is the disk's JSON or the domain's (or disk's) XML; `hooks` is the directory of the points.
    """
    environment = {**VDSM_ENVIRONMENT, **(custom or {})}
    data_file = None
    if point not in NO_DATA_POINTS:
        data_file = write_data(data)
        environment["vmId"] = vm_id
        environment["_hook_json" if point in JSON_POINTS else "_hook_domxml"] = str(data_file)
    call = Call(point, environment, data_file, scripts(hooks / point))
    call.start_next()
    return call


def start_program(*words: str) -> Call:
    """Starts the installed program as root, as cron and administrators do, in a process group of its own."""
    process = subprocess.Popen(
        [str(PROGRAM), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return Call(words[0], {}, None, [PROGRAM], process)


def scripts(directory: Path) -> list[Path]:
    """The executable files of a hook point, in the order in which they run; links to files count."""
    found = [path for path in directory.glob("[!.]*") if path.is_file() and os.access(path, os.X_OK)]
    return sorted(found)


def write_data(data: str) -> Path:
    """A temporary file with `data` that belongs to vdsm."""
    handle, name = tempfile.mkstemp()
    with open(handle, "w") as file:
        file.write(data)
    os.chown(name, pwd.getpwnam("vdsm").pw_uid, pwd.getpwnam("vdsm").pw_gid)
    return Path(name)


def start_script(script: Path, point: str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Starts one script as vdsm starts it."""
    user = "root" if point == "before_vdsm_start" else "vdsm"
    variables = (f"{name}={value}" for name, value in environment.items())
    return subprocess.Popen(
        [
            *("/usr/bin/nice", "-n", str(VDSM_NICE), *as_user(user)),
            *("/usr/bin/env", "-i", "--", *variables, str(script)),  # which are not for those before it
        ],
        env={},
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
