"""Makes one disk of a VM local: has the helper make its volume, and copies the image.

`points.py` imports this module when a disk must be made: most hook points only look.
"""

from __future__ import annotations

import os

from localdisk import uncached
from localdisk.errors import DiskRefused, SourceRefused
from localdisk.hook import copy, sources, template_source
from localdisk.hook.client import Helper
from localdisk.hook.copy import OnProgress
from localdisk.hook.sources import Source
from localdisk.protocol import Base, How, Prepared
from localdisk.vdsm.disks import Disk


def make(helper: Helper, disk: Disk, seen_at: int = 0) -> str:
    """Make `disk` local; returns the path of the ready copy, "" if the disk stays on shared storage.

    `seen_at` is that of `protocol.Claim`.
    """
    if not disk.is_vdsm_image:
        fix = "detach it from this VM, or run the VM without the custom property localdisk"
        raise DiskRefused(disk=disk.name or disk.path, problem="no image of a storage domain", fix=fix)
    claimed = helper.claim(disk, seen_at)
    if claimed.stays or claimed.path:
        return claimed.path
    _require_copyable(disk)
    with sources.opened(disk) as source:
        if claimed.chunk:  # what a copy would write need not be measured if nothing is copied
            reused = helper.reuse(source.virtual_size, source.fingerprint)
            if reused.how is How.KEPT:
                return reused.path
        base, why = _base(source) if claimed.is_cached else (None, "")
        prepared = _prepare(helper, source, claimed.chunk, base)
        if prepared.target:
            if why:
                helper.uncached(why)
            _copy(helper, source, prepared)
    return prepared.path


def _base(source: Source) -> tuple[Base | None, str]:
    """The template's volume below this disk; or None and the reason why none is used (`uncached.REASONS`)."""
    layer = source.base
    domain_id = template_source.domain_of(layer) if layer.is_block else ""
    why = _why_no_base(source, domain_id)
    if why:
        return None, why
    return Base(os.path.basename(layer.path), domain_id, layer.fingerprint, layer.virtual_size), ""


def _why_no_base(source: Source, domain_id: str) -> str:
    if not source.grows:
        return uncached.SMALLER_LAYER
    if not source.base.is_block:
        return template_source.why_no_template(source.base)
    if not domain_id:
        return uncached.OTHER_LAYOUT
    return "" if source.above else uncached.NO_TEMPLATE  # without layers above, it is the image's own volume


def _prepare(helper: Helper, source: Source, chunk: int, base: Base | None) -> Prepared:
    """Have the helper prepare the disk, from the template LV of `base` if possible."""
    disk = source.virtual_size, source.fingerprint
    if base:
        writes = source.writes_above(chunk) if chunk else source.virtual_size
        prepared = helper.prepare(*disk, writes, base)
        if prepared.how is How.MISSING and fill(helper, source.base_alone, chunk):
            prepared = helper.prepare(*disk, writes, base)
            if prepared.how is How.MISSING:
                helper.uncached(uncached.SPOILED)
        if prepared.how not in (How.MISSING, How.UNCACHED):
            return prepared
    return helper.prepare(*disk, source.writes(chunk))


def fill(helper: Helper, base: Source, chunk: int, show: OnProgress | None = None) -> bool:
    """Copy a template's volume into the cache; False if the helper does not use the cache for it."""
    target = helper.fill(base.writes(chunk))
    if target is None:
        return False
    report = _reporter(helper, base)

    def on_progress(fraction: float, written: int) -> None:
        report(fraction, written)
        if show:
            show(fraction, written)

    copy.copy(base, target, on_progress)
    if not base.base.is_unchanged():
        raise SourceRefused(base.base.path, "it changed while it was copied", "try again")
    helper.commit()
    return True


def _require_copyable(disk: Disk) -> None:
    problem = ""
    if disk.shared in ("shared", "true"):
        problem = "shared between VMs; a local copy would split them"
    elif disk.shared == "transient":
        problem = "transient; vdsm itself discards its changes"
    elif disk.disk_type not in ("file", "block"):
        problem = f"on {disk.disk_type} storage, which cannot be read as a file or block device"
    if problem:
        fix = "exclude its image in `vms: … disks:` of /etc/localdisk.yaml, or detach it from this VM"
        raise DiskRefused(disk=disk.name or disk.image_id or disk.path, problem=problem, fix=fix)


def _copy(helper: Helper, source: Source, prepared: Prepared) -> None:
    target, report = prepared.target, _reporter(helper, source)
    assert target  # noqa: S101 (otherwise nothing is copied)
    if prepared.how is How.LAYERS:
        copy.apply(source, target, report)
    elif prepared.base_device:
        copy.copy_on(source, prepared.base_device, target, report)
    else:
        copy.copy(source, target, report)
    helper.commit()


def _reporter(helper: Helper, source: Source) -> OnProgress:
    return lambda fraction, written: helper.progress(int(fraction * source.virtual_size), written)
