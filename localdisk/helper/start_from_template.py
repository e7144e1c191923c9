"""Makes the claimed disk from a template LV, the local copy of its template's volume; makes the template LV.

On any doubt the cache is bypassed: the answer is `uncached`, and the hook copies the whole chain.
"""

from __future__ import annotations

from contextlib import ExitStack

from localdisk import counters, log, uncached
from localdisk.config import Policy
from localdisk.errors import BadRequest, Error, NoSpace
from localdisk.helper import start
from localdisk.helper.claims import Claim
from localdisk.lock import Pause
from localdisk.protocol import Base, Device, How, Prepare, Prepared, Target
from localdisk.volumes import local_disk

TYPE_CHECKING = False
if TYPE_CHECKING:  # only starts with a template need it
    from localdisk.helper.cache import CachedTemplate


class TemplateInUse:
    """The template, if any, whose lock this helper holds, for a start or for `prefetch`."""

    def __init__(self) -> None:
        self.cached: CachedTemplate | None = None

    def take(self, base: Base, policy: Policy, pause: Pause) -> CachedTemplate:
        """Wait for the lock of this template, and hold it."""
        from localdisk.helper.cache import CachedTemplate

        self.cached = CachedTemplate(base, policy, pause)
        return self.cached

    def leave(self) -> None:
        """Remove an unfinished template LV and release the lock."""
        cached, self.cached = self.cached, None
        if cached:
            cached.close()


def prepare(used: TemplateInUse, base: Base, claim: Claim, request: Prepare, pause: Pause) -> Prepared:
    """Make the claimed disk from a template LV.

    If no disk was made, the answer is `missing` (the template LV must be made first) or `uncached`.
    """
    try:
        cached = _cached(used, base, claim, pause)
        if not cached.find_usable():
            return Prepared(How.MISSING)
        reading = ExitStack()
        device = cached.open(reading) if not claim.policy.pool else None
    except BadRequest:
        raise
    except Error as error:
        return _uncached(used, claim, error)
    if device:
        return _make_beside(used, device, reading, claim, request, pause)
    if claim.policy.pool:
        target = _clone(cached, claim, request, pause)
        if target:
            used.leave()
            return Prepared(How.LAYERS, claim.vg.path(claim.volume_id), target)
        claim.new_volume.remove_unfinished(claim.find)
    try:
        cached.discard()
    except Error as error:
        return _uncached(used, claim, error)
    return Prepared(How.MISSING)


def fill(used: TemplateInUse, cached: CachedTemplate, claim: Claim | None, writes: int) -> Prepared:
    """Make the missing template LV, to which the hook will write `writes` bytes of data.

    A prefetch has no claim: then the errors of `CachedTemplate.fill` are raised.
    """
    try:
        target = cached.fill(writes, (claim.wanted_lv,) if claim else ())
    except Error as error:
        if claim is None:
            raise
        return _uncached(used, claim, error)
    return Prepared(How.COPY, target.path, target)


def note_uncached(claim: Claim, reason: str) -> None:
    """Log and count that the hook does not use the cache for this disk; `reason` is of `uncached.REASONS`."""
    fields = {**claim.new_volume.log_fields, "reason": reason, "why": uncached.REASONS[reason]}
    if reason == uncached.NO_TEMPLATE:  # no problem: the image was not made from a template
        log.event("template not cached", **fields)
    else:
        log.problem("template not cached", **fields)
    counters.uncached(reason)


def _cached(used: TemplateInUse, base: Base, claim: Claim, pause: Pause) -> CachedTemplate:
    if used.cached is None:
        if base.domain_id:
            from localdisk.helper import cache

            cache.require_template(base, claim.image_id)
        return used.take(base, claim.policy, pause)
    if used.cached.base != base:
        raise BadRequest(problem="it names another base")
    return used.cached


def _make_beside(
    used: TemplateInUse, device: Device, reading: ExitStack, claim: Claim, request: Prepare, pause: Pause
) -> Prepared:
    """Make a preallocated disk while `reading` keeps the template LV open, so that it is not evicted."""
    used.leave()
    claim.resources.callback(reading.close)
    try:
        target = start.create(claim, request, pause, takes_kept=False)
    except NoSpace as error:  # the next `prepare` may evict this template LV, too
        claim.new_volume.end_turn()
        reading.close()
        return _uncached(used, claim, error)
    return Prepared(How.ON_BASE, claim.vg.path(claim.volume_id), target, device)


def _clone(cached: CachedTemplate, claim: Claim, request: Prepare, pause: Pause) -> Target | None:
    writes = cached.holds + claim.wanted_lv.writes
    tags = local_disk.new_tags(claim.vm_id, claim.image_id, request.fingerprint, writes)
    claim.new_volume.begin_turn(request.size, pause)
    need = claim.need(cached.name)
    return cached.clone(claim.new_volume, request.size, need, tags, claim.free_name, claim.known)


def _uncached(used: TemplateInUse, claim: Claim, why: Error) -> Prepared:
    reason = counters.reason(why)
    log.problem("template not cached", **claim.new_volume.log_fields, reason=reason, why=why)
    counters.uncached(reason)
    used.leave()
    return Prepared(How.UNCACHED)
