"""One hook run as the helper serves it: one method for each request.

`protocol.py` has the requests and answers.  A request has UUIDs and numbers; names, volume group, thin pool,
sizes and tags are decided here from the root-owned configuration.  Before every change, the tags are read
again under the disk's lock.  `process.py` reads the requests and writes the answers; `start.py`,
`start_from_template.py` and `stop.py` do the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from localdisk import cancel, counters, kept, libvirt, lock, log, protocol
from localdisk.config import Config, Policy
from localdisk.errors import BadRequest, CacheOff, Error, StartCancelled
from localdisk.helper import claims, start, start_from_template
from localdisk.helper.claims import Claim
from localdisk.helper.new_volume import Known, NewVolume
from localdisk.helper.start_from_template import TemplateInUse
from localdisk.protocol import Claimed, Done, Fetched, How, Looks, Prepared, Tried
from localdisk.volumes import stale
from localdisk.volumes.filling import log_filling

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from localdisk.helper.trial import Trial

    Answer = dict[str, Any]


class Session:
    """One hook run.  `serve` serves its requests in order; `close` removes an unfinished volume."""

    def __init__(self, config: Config, pause: lock.Pause) -> None:
        self._config = config
        self._hook_pause = pause
        self._starting = ""  # the VM whose disk is claimed, or whose lock is waited for
        self._is_hook_told = False  # whether the hook knows that this VM was powered off
        self._claim: Claim | None = None
        self._trial: Trial | None = None
        self._template = TemplateInUse()
        self._verbs: dict[type, Callable[[Any], object]] = {
            protocol.Look: self._look,
            protocol.Claim: self._claim_disk,
            protocol.Reuse: self._reuse,
            protocol.Prepare: self._prepare,
            protocol.Prefetch: self._prefetch,
            protocol.Fill: self._fill,
            protocol.Uncached: self._uncached,
            protocol.Progress: self._progress,
            protocol.Commit: self._commit,
            protocol.Cancel: self._cancel,
            protocol.Drifted: self._drifted,
            protocol.Release: self._release,
            protocol.Stale: self._stale,
            protocol.Rehearse: self._rehearse,
            protocol.Rehearsed: self._rehearsed,
        }

    def serve(self, line: bytes) -> Answer:
        """The answer to one request.  A refused request ends the claim and removes an unfinished volume."""
        request: object = None
        try:
            request = protocol.read_request(line)
            self._require_wanted()
            return protocol.write_answer(self._verbs[type(request)](request))
        except StartCancelled as error:
            return self._cancelled(error)
        except Error as error:
            fields = self._log_fields() or _fields_of(request)
            self.close()
            if not isinstance(request, protocol.TRIALS):  # a trial of `check` refuses no VM
                log.problem("refused", **fields, why=error)
                counters.failed(error)
            return {"error": str(error)}

    def end(self) -> None:
        """The hook has ended: log what it had begun and not completed, and remove an unfinished volume."""
        cached = self._template.cached
        if self.is_cancelled():
            log.event("start broken off, the VM was powered off", **self._log_fields())
        elif self._claim or (cached and cached.new_volume.is_made):
            log.problem("start broken off" if self._claim else "prefetch broken off", **self._log_fields())
            counters.failed("copy_broken_off" if self._made() else "preparation_broken_off")
        self.close()

    def close(self) -> None:
        """Remove an unfinished volume, if there is one, and release all locks."""
        claim, self._claim = self._claim, None
        trial, self._trial = self._trial, None
        self._starting = ""
        if trial:
            trial.close()
        self._template.leave()
        if claim:
            claim.new_volume.remove_unfinished(claim.find)
            claim.new_volume.release()

    def is_cancelled(self) -> bool:
        """Whether the VM was powered off whose disk is claimed, or whose lock is waited for."""
        return bool(self._starting) and cancel.is_cancelled(self._starting)

    @property
    def must_end_hook(self) -> bool:
        """Whether its VM was powered off and the hook does not know yet."""
        return not self._is_hook_told and self.is_cancelled()

    def look_after_copy(self) -> None:
        """Detect a copy that stalls; called again and again while the hook sends nothing."""
        new_volume = self._made()
        if new_volume:
            new_volume.look_after_turn()

    def _require_wanted(self) -> None:
        if self.is_cancelled():
            raise StartCancelled(vm=self._starting)

    def _pause(self, seconds: float) -> None:
        """Wait.  Raises StartCancelled, and what `Hook.pause` of `process.py` raises."""
        self._require_wanted()
        self._hook_pause(seconds)

    def _cancelled(self, error: StartCancelled) -> Answer:
        """The answer to a hook whose VM was powered off.

        A hook that copies has the volume open until it reads this answer: `end` removes the volume.
        """
        self._is_hook_told = True
        if not self._made():
            log.event("start ended, the VM was powered off", vm=error.fields["vm"])
            self.close()
        return {"error": str(error)}

    def _made(self) -> NewVolume | None:
        """The volume that is unfinished, None if there is none."""
        cached, claim = self._template.cached, self._claim
        if cached and cached.new_volume.is_made:
            return cached.new_volume
        return claim.new_volume if claim and claim.new_volume.is_made else None

    def _log_fields(self) -> Mapping[str, str]:
        """The VM and disk, or the template, for the log; empty if no disk or template is locked."""
        if self._claim:
            return self._claim.new_volume.log_fields
        return self._template.cached.new_volume.log_fields if self._template.cached else {}

    # -- one method for each request

    def _look(self, request: protocol.Look) -> Looks:
        policy = self._policy(request)
        if any(policy.is_local(disk.image_id) for disk in request.disks):
            cancel.require_started(request.vm_id)
        vg = claims.read(policy)
        every = [vg]
        if any(not policy.is_local(disk.image_id) for disk in request.disks):
            every += claims.other_groups(self._config, policy, request.vm_id)
        return Looks(tuple(claims.look_at(every, policy, request.vm_id, disk) for disk in request.disks))

    def _claim_disk(self, request: protocol.Claim) -> Claimed:
        self.close()
        policy, vm_id, volume_id = self._policy(request), request.vm_id, request.volume_id
        if not policy.is_local(request.image_id):
            cancel.settle(vm_id)
            return Claimed(stays=True, path="", chunk=0, is_cached=False)
        cancel.require_start(vm_id)
        self._starting = vm_id
        doubted = kept.images_in(kept.doubted(vm_id), policy.volume_group)
        if doubted:
            self._mark_what_is_in_doubt(vm_id, policy)
        with ExitStack() as stack:
            held = stack.enter_context(lock.holding(lock.disk_lock(volume_id), self._pause))
            # What the hook has seen in libvirt counts only if nothing was waited for since.
            seen_at = 0 if held.was_waited_for or doubted else request.seen_at / 1000
            is_start = libvirt.is_recent(seen_at)
            asked_at = seen_at if is_start else time.monotonic()
            asked = None if is_start else libvirt.ask_state(vm_id)  # virsh runs while LVM is read
            known = Known.read(policy)
            vg = known.vg
            log_filling(vg)
            found = claims.find(vg, vm_id, request.image_id, volume_id)
            stays, path = claims.in_use(asked, vg, found, vm_id, volume_id) if asked else (False, "")
            if not (stays or path):  # otherwise there is nothing to prepare
                claims.require_none_elsewhere(self._config, policy, vm_id, request.image_id)
                resources = stack.pop_all()
                new_volume = NewVolume(volume_id, policy, held, resources, vm=vm_id, image=request.image_id)
                self._claim = Claim(
                    vm_id=vm_id,
                    image_id=request.image_id,
                    volume_id=volume_id,
                    policy=policy,
                    found=found,
                    vg=vg,
                    known=known,
                    new_volume=new_volume,
                    resources=resources,
                    asked_at=asked_at,
                )
                new_volume.begin_phase()
        if not self._claim:
            self._starting = ""
        return Claimed(stays, path, vg.chunk(policy.pool), policy.cache.templates)

    def _reuse(self, request: protocol.Reuse) -> Prepared:
        self._claim, planned = start.look(self._unfilled_claim(), request, self._pause)
        if not planned.reuse:
            return Prepared(How.NEW)
        # As a `prepare`, which does not measure what it copies.
        return self._prepare(protocol.Prepare(request.size, request.fingerprint, 0, None))

    def _prepare(self, request: protocol.Prepare) -> Prepared:
        if request.base and request.base.size > request.size:
            raise BadRequest(problem="the base is larger than the disk")
        claim, reused = start.plan(self._unfilled_claim(), request, self._pause)
        self._claim = claim
        if reused:
            answer = start.reuse(claim, reused, request.fingerprint, self._pause)
            self.close()
            return answer
        if request.base and claim.policy.cache.templates:
            return start_from_template.prepare(self._template, request.base, claim, request, self._pause)
        self._template.leave()
        target = start.create(claim, request, self._pause)
        return Prepared(How.COPY, target.path, target)

    def _rehearse(self, request: protocol.Rehearse) -> Tried:
        from localdisk.helper.trial import Trial

        self.close()
        self._trial = Trial(self._policy(request), self._pause)
        return Tried(self._trial.make())

    def _rehearsed(self, _request: protocol.Rehearsed) -> Done:
        if self._trial is None:
            raise BadRequest(problem="the verbs come in the wrong order")
        self._trial.remove()
        self.close()
        return Done()

    def _prefetch(self, request: protocol.Prefetch) -> Fetched:
        self.close()
        policy = self._config.policy("", request.backend)
        if not self._config.caches_templates(policy.volume_group):
            raise CacheOff(vg=policy.volume_group)
        cached = self._template.take(request.template, policy, self._pause)
        is_there = cached.find_usable()
        if is_there:
            cached.mark_used()
        return Fetched(is_there, cached.chunk)

    def _fill(self, request: protocol.Fill) -> Prepared:
        cached = self._template.cached
        if cached is None or cached.is_there or self._made():
            raise BadRequest(problem="the verbs come in the wrong order")
        return start_from_template.fill(self._template, cached, self._claim, request.writes)

    def _uncached(self, request: protocol.Uncached) -> Done:
        if self._claim is None:
            raise BadRequest(problem="the verbs come in the wrong order")
        start_from_template.note_uncached(self._claim, request.reason)
        return Done()

    def _progress(self, request: protocol.Progress) -> Done:
        self._unfinished().report_progress(request.done, request.written)
        return Done()

    def _commit(self, _request: protocol.Commit) -> Done:
        new_volume, cached, claim = self._unfinished(), self._template.cached, self._claim
        if cached and new_volume is cached.new_volume:
            cached.commit()
        elif claim:
            start.make_ready(claim)
            self._claim = None
            self._starting = ""
            start.finish(claim)
        return Done()

    def _cancel(self, request: protocol.Cancel) -> Done:
        cancel.destroying(request.vm_id)
        log.event("VM is powered off while it starts", vm=request.vm_id)
        return Done()

    def _drifted(self, request: protocol.Drifted) -> Done:
        from localdisk.helper import stop

        self.close()
        stop.mark_drifted(self._config, self._policy(request), request.vm_id, request.ran_from)
        return Done()

    def _release(self, request: protocol.Release) -> Done:
        from localdisk.helper import stop

        self.close()
        policy = self._policy(request)
        cancel.destroyed(request.vm_id)
        stop.release(self._config, policy, request.vm_id)
        return Done()

    def _stale(self, request: protocol.Stale) -> Done:
        self.close()
        stale.mark(self._config, request.vm_id, list(request.images), self._pause)
        return Done()

    # -- steps

    def _mark_what_is_in_doubt(self, vm_id: str, policy: Policy) -> None:
        """Mark the VM's kept disks as stale that are in doubt; in its own group, that must not fail."""
        try:
            stale.mark(self._config, vm_id, (), self._pause)
        except Error as error:
            if kept.images_in(kept.doubted(vm_id), policy.volume_group):
                raise
            log.problem("kept disks are not marked as stale yet", vm=vm_id, why=error)

    def _policy(self, request: Any) -> Policy:
        """The policy of the VM and custom property that a request names."""
        return self._config.policy(request.vm_id, request.property_value)

    def _unfilled_claim(self) -> Claim:
        if self._claim is None or self._made():
            raise BadRequest(problem="the verbs come in the wrong order")
        return self._claim

    def _unfinished(self) -> NewVolume:
        new_volume = self._made()
        if new_volume is None:
            raise BadRequest(problem="the verbs come in the wrong order")
        return new_volume


def _fields_of(request: object) -> dict[str, str]:
    """The VM and disk that a request names, for the log."""
    named = {"vm": getattr(request, "vm_id", ""), "disk": getattr(request, "volume_id", "")}
    return {name: value for name, value in named.items() if value}
