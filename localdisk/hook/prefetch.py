"""The mode prefetch: caches a template's volume before the first VM needs it.

It reads as user vdsm, as hooks do: root often cannot read shared storage, and root must never run qemu-img.
"""

from __future__ import annotations

import glob
import os
import pwd

from localdisk.errors import NoTemplate, UsageError
from localdisk.hook import sources, template_source
from localdisk.hook.client import Helper
from localdisk.hook.copy import OnProgress
from localdisk.hook.local_copy import fill
from localdisk.ids import is_uuid
from localdisk.protocol import Base
from localdisk.units import format_size

# Image directories of file storage domains: MOUNT/DOMAIN/images, on Gluster glusterSD/MOUNT/DOMAIN/images.
MOUNTS = ("/rhev/data-center/mnt/*/*/images", "/rhev/data-center/mnt/*/*/*/images")

_BAR = 30  # columns
_FORMATS = {"RAW": "raw", "COW": "qcow2"}


def become_vdsm() -> None:
    """Become user vdsm, for good, if we are root.  Raises UsageError if there is no user vdsm."""
    if os.geteuid() != 0:
        return
    try:
        user = pwd.getpwnam("vdsm")
    except KeyError:
        raise UsageError(problem="this host has no user vdsm") from None
    os.initgroups(user.pw_name, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)


def prefetch(name: str, backend: str, show: OnProgress | None = None) -> str:
    """Cache the template whose volume is `name`, a path or a volume's id; returns the result as one line.

    Raises NoTemplate, SourceRefused, CacheOff, CacheFull, NoSpace and the other errors of a copy.
    """
    path = name if "/" in name else _find(name)
    if not is_uuid(os.path.basename(path)):
        raise NoTemplate(volume=path, problem="its name is no volume's id")
    metadata = template_source.read_metadata(path)
    if not metadata and os.path.realpath(path).startswith("/dev/"):
        problem = "a block volume has no mark that it is a template's; the first VM caches it"
        raise NoTemplate(volume=path, problem=problem)
    if metadata.get("FORMAT") not in _FORMATS:
        raise NoTemplate(volume=path, problem="there is no metadata of vdsm's beside it")
    if metadata.get("VOLTYPE") != "SHARED":
        raise NoTemplate(volume=path, problem="its metadata does not mark it as a template's")
    with sources.opened_alone(path, _FORMATS[metadata["FORMAT"]]) as source, Helper() as helper:
        layer = source.base
        if not template_source.is_template(layer):
            raise NoTemplate(volume=path, problem="its metadata is not that of a template in use")
        base = Base(os.path.basename(path), "", layer.fingerprint, layer.virtual_size)
        fetched = helper.prefetch(backend, base)
        if fetched.is_ready:
            return f"{path}: in the cache"
        fill(helper, source, fetched.chunk, show)
    return f"{path}: cached, {format_size(layer.virtual_size)}"


def bar(fraction: float, written: int) -> str:
    """The progress of the copy as a bar that is drawn over the bar before."""
    done = round(_BAR * fraction)
    return f"\r[{'#' * done}{'.' * (_BAR - done)}] {fraction:4.0%} {format_size(written)}\033[K"


NO_BAR = "\r\033[K"


def _find(volume_id: str) -> str:
    """The path of the template's volume `volume_id` on file storage.  Raises UsageError, NoTemplate."""
    if not is_uuid(volume_id):
        raise UsageError(problem=f"{volume_id!r} is neither a path nor the id of a volume")
    paths = sorted(path for mount in MOUNTS for path in glob.glob(f"{mount}/*/{volume_id}"))
    told = {path: template_source.read_metadata(path) for path in paths}
    for path, metadata in told.items():
        if metadata.get("VOLTYPE") == "SHARED":
            return path
    if paths:
        raise NoTemplate(volume=volume_id, problem="its metadata does not mark it as a template's")
    problem = "no storage domain of files on this host has it"
    raise NoTemplate(volume=volume_id, problem=problem)
