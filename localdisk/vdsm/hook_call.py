"""The hook contract of vdsm: which point was called, for which VM, with what data, and the answer.

vdsm describes a call in the environment: `vmId`, one variable for each custom property, and either
`_hook_json` or `_hook_domxml` with the path of a temporary file, which vdsm reads after the last hook (vdsm
`lib/vdsm/common/hooks.py`).  None of it is trusted: an administrator can allow custom properties of any name.

Data is text: vdsm writes and reads the file as UTF-8, even if an XML declaration in it has another encoding.
Line ends are kept.  Standard library only: every hook run of a local VM imports this.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from localdisk.backend import BACKENDS
from localdisk.errors import BadHookCall, BadProperty
from localdisk.frozen import frozen
from localdisk.ids import is_uuid

PROPERTY = "localdisk"  # the VM custom property; older hook: the same name, values lvm and lvmthin
VALUES = (*BACKENDS, "on", "off")
DATA_LIMIT = 16 * 1024 * 1024  # bytes; a large domain's XML is some 100 KiB

# The path of the daemon in its service (vdsm `init/systemd/vdsmd.service.in`), and its path before vdsm 4.40.
_DAEMONS = frozenset({b"/usr/libexec/vdsm/vdsmd", b"/usr/share/vdsm/vdsmd"})

JSON = "_hook_json"
DOMXML = "_hook_domxml"

_DATA_OF_POINT = {
    "after_disk_prepare": JSON,
    "before_vm_start": DOMXML,
    "before_vm_destroy": DOMXML,  # the file is empty, although vdsm's manual page describes a content
    "after_vm_destroy": DOMXML,
    "before_vm_migrate_source": DOMXML,
    "before_vm_migrate_destination": DOMXML,
    "before_vm_hibernate": DOMXML,
    "before_vm_dehibernate": DOMXML,
    "before_disk_hotplug": DOMXML,
    "before_disk_hotunplug": DOMXML,
    "before_vdsm_start": None,
}
POINTS = frozenset(_DATA_OF_POINT)
BEGINNINGS = ("before_vm_start", "before_vm_migrate_destination")  # a VM begins to run on this host

# At these points vdsm continues when a hook fails (raiseError=False in vdsm's lib/vdsm/common/hooks.py); at
# all other points of ours it refuses the operation.
UNREFUSABLE = frozenset({"after_vm_destroy", "before_vdsm_start", "before_vm_destroy"})

MESSAGE_LIMIT = 1000  # characters on standard error: the engine shows at most 4000, each escaped
_PART_LIMIT = 400  # characters of "what is wrong", and of "what to do"


@frozen
class Call:
    """One call of a hook point.

    `before_vdsm_start` belongs to no VM: `vm_id` and `property_value` are "" and `data_path` is None.  At all
    other points `vm_id` is a canonical UUID, `property_value` is one of VALUES ("off" also if the VM does not
    have the property) and `data_path` is absolute.  `seen_at` is that of `protocol.Claim`.
    """

    point: str
    vm_id: str
    property_value: str
    data_path: str | None
    seen_at: int = 0


def is_running() -> bool:
    """Whether vdsm's daemon runs.  While before_vdsm_start runs, the daemon does not, and no VM can start."""
    return any(not _DAEMONS.isdisjoint(_command_line(pid)) for pid in os.listdir("/proc") if pid.isdigit())


def _command_line(pid: str) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().split(b"\0")
    except OSError:  # no process, or gone
        return []


def read_call(point: str, environ: Mapping[str, str]) -> Call:
    """The call of `point`, from the environment that vdsm gave to the hook.

    Raises BadHookCall if the point is unknown, `vmId` is no UUID (upper case is accepted), the data variable
    of the point is missing or a relative path, or the other data variable is set, too: a custom property can
    have its name.  Raises BadProperty for a value that is not in VALUES, also for an empty value.
    At `before_vdsm_start` the environment is not read: vdsm sets `_hook_domxml` to an empty file there.
    """
    if point not in _DATA_OF_POINT:
        raise BadHookCall(problem=f"there is no hook point '{point}'")
    wanted = _DATA_OF_POINT[point]
    if wanted is None:
        return Call(point, "", "", None)
    return Call(point, _vm_id(environ), _property_value(environ), _data_path(wanted, environ))


def exit_code(point: str, code: int, environ: Mapping[str, str]) -> int:
    """The exit code of a hook at `point`, for the program's exit code `code`.

    After 2, vdsm skips all later hooks, those of other products included.  If vdsm refuses the operation,
    they have nothing to do; if vdsm continues, they must run.  A VM without the property is never refused:
    when it begins to run, only its kept disks are marked.
    """
    if point in BEGINNINGS and environ.get("localdisk", "off") == "off":
        return 0
    return 1 if code == 2 and point in UNREFUSABLE else code


def shown(message: str) -> str:
    """`message` as one line for standard error: `localdisk: …` in ASCII, shorter than MESSAGE_LIMIT.

    vdsm shows the bytes as Python's b'...', so other characters would be unreadable.  The last line of
    `message` has what to do, and is always shown, at the end.  Of the lines before it (problems of a
    configuration), the first are shown, then the number of the others.
    """
    *problems, last = [line.replace("…", "...") for line in message.splitlines()]
    what, colon, fix = last.rpartition(" : ")
    last = _ascii(what) + colon + _ascii(fix)
    parts: list[str] = []
    for count, problem in enumerate(problems):
        more = f"and {len(problems) - count} more"
        if len(_line(*parts, _ascii(problem), more, last)) >= MESSAGE_LIMIT:
            parts.append(more)
            break
        parts.append(_ascii(problem))
    return _line(*parts, last)


def _line(*parts: str) -> str:
    return f"localdisk: {'; '.join(parts)}"


def _ascii(text: str) -> str:
    """`text` in ASCII, cut in its middle if it is longer than _PART_LIMIT."""
    text = text.encode("ascii", "backslashreplace").decode()
    half = _PART_LIMIT // 2 - 2
    return text if len(text) <= _PART_LIMIT else f"{text[:half]}...{text[-half:]}"


def local_vm(environ: Mapping[str, str]) -> str:
    """The VM that the hook is called for, if it has the property; "" if not, or if its id is no UUID."""
    vm_id = environ.get("vmId", "").lower()
    return vm_id if is_uuid(vm_id) and environ.get(PROPERTY, "off") != "off" else ""


def read_data(call: Call) -> str:
    """The text that vdsm handed to `call`.

    Raises BadHookCall if there is no file, it is no regular file (a symbolic link is refused, too), it has
    more than DATA_LIMIT bytes, or it is not UTF-8.
    """
    try:
        with open(_open_data(call, os.O_RDONLY), "rb") as file:
            data = file.read(DATA_LIMIT + 1)
        if len(data) > DATA_LIMIT:
            raise BadHookCall(problem=f"data file {call.data_path} holds more than {DATA_LIMIT} bytes")
        return data.decode("utf-8")
    except (OSError, ValueError) as error:
        raise _unusable(call, error) from None


def write_data(call: Call, text: str) -> None:
    """Write `text` to the same file; vdsm reads it when the last hook has ended.

    The file is emptied before it is written.  If we are killed in between, or the file system is full, the
    file is empty or has the beginning of `text`, which is neither JSON nor XML, so that nobody can take it
    for an answer.  (At the points at which we write, vdsm refuses the operation anyway if a hook is killed.)
    Without emptying it, the file could have the beginning of the new text and the end of the old one; a new
    file that is renamed over the old one could be left behind.  Raises BadHookCall as `read_data` does.
    """
    try:
        data = text.encode("utf-8")
        if len(data) > DATA_LIMIT:
            raise BadHookCall(problem=f"the answer for {call.data_path} has more than {DATA_LIMIT} bytes")
        with open(_open_data(call, os.O_WRONLY), "wb") as file:
            file.truncate(0)
            file.write(data)
    except (OSError, ValueError) as error:
        raise _unusable(call, error) from None


def _vm_id(environ: Mapping[str, str]) -> str:
    vm_id = environ.get("vmId", "").lower()
    if not is_uuid(vm_id):
        raise BadHookCall(problem=f"vmId is '{vm_id}', not a UUID")
    return vm_id


def _property_value(environ: Mapping[str, str]) -> str:
    value = environ.get(PROPERTY, "off")
    if value not in VALUES:
        raise BadProperty(value=value)
    return value


def _data_path(wanted: str, environ: Mapping[str, str]) -> str:
    other = JSON if wanted == DOMXML else DOMXML
    if other in environ:
        raise BadHookCall(problem=f"{other} is set where only {wanted} belongs")
    path = environ.get(wanted, "")
    if not os.path.isabs(path):
        raise BadHookCall(problem=f"{wanted} is '{path}', not the path of a data file")
    return path


def _open_data(call: Call, flags: int) -> int:
    """A descriptor of `call`'s data file; O_NONBLOCK, so that we do not wait for a pipe in its place."""
    if call.data_path is None:
        raise BadHookCall(problem=f"{call.point} has no data")
    descriptor = os.open(call.data_path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadHookCall(problem=f"data file {call.data_path} is not a regular file")
    return descriptor


def _unusable(call: Call, error: OSError | ValueError) -> BadHookCall:
    reason = error.strerror if isinstance(error, OSError) else error
    return BadHookCall(problem=f"data file {call.data_path} cannot be used: {reason}")
