"""The privileged half: what root does for the hook, and nothing else.

A request is one JSON object, a verb and its fields; the answer is one too, `{"error": "…"}` where it is
refused.  The verbs:

    look      {vm, property, disks: [{image, volume}]}    how these disks are; locks and changes nothing
    claim     {vm, property, image, volume}               take the disk's lock, see whether it is in use
    prepare   {size, fingerprint, writes, base}           make the claimed disk, or take a kept one back
    prefetch  {backend, base}                             take a template's lock, see whether it is cached
    fill      {writes}                                    make the template LV that was missing
    progress  {done, written}                             bytes of the guest's view, and of the volume, so far
    commit    {}                                          the copy is complete: what was made is ready
    cancel    {vm, property}                              the VM is powered off while it starts: end its start
    drifted   {vm, property, disks: [{image, path}]}      what the disks of the VM ran from when it stopped
    release   {vm, property}                              the VM has stopped: remove or keep its disks
    stale     {vm, images}                                it begins to run with these on shared storage

`base` is null, or what the disk may start from: {volume, domain, fingerprint, size} of a template's volume.
Then `prepare` answers `how`: `kept`, `copy` (all of it), `missing` (fill the template LV, commit, then ask
again), `layers` (copy those above the base), `on base` (copy all, reading the base there) or `uncached` (ask
again without base).

Everything else is decided here from the root-owned configuration: names, volume group, pool, sizes, tags.
A request carries canonical UUIDs and bounded integers only.  The tags are read again, under the disk's
lock, before every change.  `process.py` is the process around it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from localdisk import cancel, clock, counters, kept, libvirt, lock, log
from localdisk.config import Config, Policy
from localdisk.errors import (
    BadRequest,
    CacheOff,
    CommandFailed,
    Error,
    ForeignVolume,
    Interrupted,
    LibvirtSilent,
    NoSpace,
    StartCancelled,
    StillRuns,
    VmForgotten,
    VmRuns,
)
from localdisk.frozen import frozen, replace
from localdisk.helper import cache
from localdisk.helper.cache import Base, Shelf, Spare
from localdisk.helper.new_volume import Making
from localdisk.helper.replaced import Replaced
from localdisk.ids import is_uuid
from localdisk.libvirt import DomainState
from localdisk.units import MAX_DISK
from localdisk.volumes import disk as life
from localdisk.volumes import stale
from localdisk.volumes.disk import LocalDisk, State, Stop, Wanted
from localdisk.volumes.lvm import VolumeGroup
from localdisk.volumes.removal import take_away

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Request = Mapping[str, Any]
    Answer = dict[str, Any]

MAX_REQUEST = 64 * 1024  # bytes of one line
MAX_DISKS = 256
LOCK_TRIES = 3  # status and gc take a lock for a moment, to see whether it is free
PROPERTY_VALUES = ("lvm", "lvmthin", "on")


@frozen
class Claim:
    """The disk that this helper holds the lock of."""

    vm_id: str
    image_id: str
    volume_id: str
    policy: Policy
    found: LocalDisk | None  # what was there when it was last looked at; only the lock's holder changes it
    vg: VolumeGroup
    making: Making
    resources: ExitStack  # what `making` has
    # This VM's other local disks of the image, whose locks are held; None: nobody has looked for them yet.
    others: tuple[LocalDisk, ...] | None = None
    replaced: Replaced | None = None  # by the disk that is made
    wanted: tuple[int, int] = (
        0,
        0,
    )  # bytes of the disk, and of data that is written to it, as last asked for

    def find(self, vg: VolumeGroup) -> LocalDisk | None:
        """This disk now.  Raises ForeignVolume, OtherOwner."""
        return _find(vg, self.vm_id, self.image_id, self.volume_id)

    @property
    def disks(self) -> tuple[LocalDisk, ...]:
        """All local disks that this VM has of the image."""
        return (*((self.found,) if self.found else ()), *(self.others or ()))

    def require_room(self, vg: VolumeGroup) -> None:
        """Raises as `disk.require_room` where there is none for what is wanted."""
        life.require_room(vg, self.policy, *self.wanted)

    def find_room(self, spares: Sequence[Spare], pause: lock.Pause, keep: str = "") -> VolumeGroup:
        """The group with room for what is wanted, and its name free; as `cache.with_room`."""
        vg = cache.with_room(self.policy, self.require_room, keep, pause, spares)
        if self.replaced:
            self.replaced.free_name(vg, self.volume_id)
        return vg


class Session:
    """One hook run.  `requests` are served in order; `close` removes what is unfinished."""

    def __init__(self, config: Config, pause: lock.Pause) -> None:
        self._config = config
        self._hook_pause = pause
        self._starting = ""  # the VM whose disk is claimed, or is to be
        self._is_told = False  # the hook, that this VM was powered off
        self._claim: Claim | None = None
        self._shelf: Shelf | None = (
            None  # of the template that the claimed disk starts from, or that is fetched
        )
        self._verbs: dict[str, tuple[Callable[[Request], Answer], frozenset[str]]] = {
            "look": (self._look, frozenset({"vm", "property", "disks"})),
            "claim": (self._claim_disk, frozenset({"vm", "property", "image", "volume"})),
            "prepare": (self._prepare, frozenset({"size", "fingerprint", "writes", "base"})),
            "prefetch": (self._prefetch, frozenset({"backend", "base"})),
            "fill": (self._fill, frozenset({"writes"})),
            "progress": (self._progress, frozenset({"done", "written"})),
            "commit": (self._commit, frozenset()),
            "cancel": (self._cancel, frozenset({"vm", "property"})),
            "drifted": (self._drifted, frozenset({"vm", "property", "disks"})),
            "release": (self._release, frozenset({"vm", "property"})),
            "stale": (self._stale, frozenset({"vm", "images"})),
        }

    def serve(self, line: bytes) -> Answer:
        """The answer to one request.  A refused request ends the claim and removes what is unfinished."""
        fields: Request = {}
        try:
            verb, fields = self._parse(line)
            self._require_wanted()
            return verb(fields)
        except StartCancelled as error:
            return self._cancelled(error)
        except Error as error:
            who = self._who() or _asked(fields)
            self.close()
            log.problem("refused", **who, why=error)
            counters.failed(error)
            return {"error": str(error)}

    def end(self) -> None:
        """The hook has ended; what it has claimed and not completed, it has given up."""
        if self.is_cancelled():
            log.event("start broken off, the VM was powered off", **self._who())
        elif self._claim or (self._shelf and self._shelf.making.is_made):
            log.problem("start broken off" if self._claim else "prefetch broken off", **self._who())
            counters.failed("copy_broken_off" if self._made() else "preparation_broken_off")
        self.close()

    def close(self) -> None:
        """Remove what is unfinished, if anything, and let go of all locks."""
        claim, self._claim = self._claim, None
        self._starting = ""
        self._leave_shelf()
        if claim:
            claim.making.undo(claim.find)
            claim.making.release()

    def is_cancelled(self) -> bool:
        """Whether the VM whose disk is claimed, or waited for, was powered off."""
        return bool(self._starting) and cancel.is_cancelled(self._starting)

    @property
    def must_tell(self) -> bool:
        """Whether the hook does not know yet that its VM was powered off."""
        return not self._is_told and self.is_cancelled()

    def _require_wanted(self) -> None:
        if self.is_cancelled():
            raise StartCancelled(vm=self._starting)

    def _pause(self, seconds: float) -> None:
        """Wait; raises StartCancelled, and whatever the hook's end raises."""
        self._require_wanted()
        self._hook_pause(seconds)

    def _cancelled(self, error: StartCancelled) -> Answer:
        """The answer to a hook whose VM was powered off.

        A hook that copies has the volume open until it has read this; what it leaves is removed at its end.
        """
        self._is_told = True
        if not self._made():
            log.event("start ended, the VM was powered off", vm=error.fields["vm"])
            self.close()
        return {"error": str(error)}

    def _leave_shelf(self) -> None:
        shelf, self._shelf = self._shelf, None
        if shelf:
            shelf.close()

    def _made(self) -> Making | None:
        """What is being made."""
        shelf, claim = self._shelf, self._claim
        if shelf and shelf.making.is_made:
            return shelf.making
        return claim.making if claim and claim.making.is_made else None

    def _who(self) -> Mapping[str, str]:
        """Whom this is about, for the log."""
        if self._claim:
            return self._claim.making.who
        return self._shelf.making.who if self._shelf else {}

    # -- verbs

    def _look(self, request: Request) -> Answer:
        vm_id, policy = self._policy(request)
        cancel.require_started(vm_id)
        vg = _read(policy)
        return {"disks": [_look_at(vg, policy, vm_id, pair) for pair in _disks(request)]}

    def _claim_disk(self, request: Request) -> Answer:
        self.close()
        vm_id, policy = self._policy(request)
        image_id, volume_id = _uuid(request, "image"), _uuid(request, "volume")
        cancel.require_start(vm_id)
        if not policy.is_local(image_id):
            return {"stays": True, "path": "", "thin": False, "cached": False}
        self._starting = vm_id
        doubted = kept.doubted(vm_id)
        if doubted:
            stale.mark(self._config, vm_id, doubted, self._pause)
        with ExitStack() as stack:
            held = stack.enter_context(lock.holding(lock.disk_lock(volume_id), self._pause))
            vg = _read(policy)
            found = _find(vg, vm_id, image_id, volume_id)
            stays, path = _running(vg, found, vm_id, volume_id)
            if not (stays or path):  # else there is nothing to prepare
                resources = stack.pop_all()
                making = Making(volume_id, policy, held, resources, vm=vm_id, image=image_id)
                self._claim = Claim(vm_id, image_id, volume_id, policy, found, vg, making, resources)
                making.tell()
        if not self._claim:
            self._starting = ""
        thin, cached = policy.backend == "lvmthin", policy.cache.templates
        return {"stays": stays, "path": path, "thin": thin, "cached": cached}

    def _prepare(self, request: Request) -> Answer:
        self._unfilled_claim()
        size = _integer(request, "size", 512, MAX_DISK)
        writes = _integer(request, "writes", 0, MAX_DISK)
        base = None if request["base"] is None else _base(request["base"])
        fingerprint = request["fingerprint"]
        if size % 512 or not life.is_fingerprint(fingerprint):
            raise BadRequest(problem="size or fingerprint is malformed")
        if base and base.size > size:
            raise BadRequest(problem="the base is larger than the disk")
        claim = self._claim = self._with_others(self._unfilled_claim())
        claim.vg.require_usable()
        wanted = Wanted(claim.volume_id, fingerprint, size)
        plan = life.plan_start(claim.disks, wanted, claim.policy.retention, claim.vg.vg_name)
        claim = self._claim = self._without(claim, plan.remove)
        replaced = self._replaced(claim, plan.replace)
        if plan.reuse:
            return self._reuse(claim, plan.reuse, replaced, fingerprint)
        with_margin = size + claim.policy.margins.disk.of(size)
        claim = self._claim = replace(claim, wanted=(with_margin, writes), replaced=replaced)
        if base and claim.policy.cache.templates:
            return self._start_from(base, claim, size, fingerprint)
        self._leave_shelf()
        target = self._create(claim, size, fingerprint, replaced.spares)
        return _to_fill("copy", claim.vg.path(claim.volume_id), target)

    def _reuse(self, claim: Claim, found: LocalDisk, replaced: Replaced, fingerprint: str) -> Answer:
        vg, name = claim.vg, claim.volume_id
        if found.volume_id != name:
            self._replaced(claim, claim.disks).free_name(vg, name)
            vg.rename(found.volume_id, name)
            log.event("kept disk renamed", vm=claim.vm_id, disk=found.volume_id, to=name)
        kept.note(claim.vm_id)
        missing = {life.OURS, f"SOURCE_{fingerprint}"} - found.lv.lv_tags
        if life.is_left_alone(found, claim.policy.retention):
            missing = set()
        if missing or found.idle_tags:
            vg.change_tags(name, add=missing, remove=found.idle_tags)
        try:
            vg.activate(name)
            vg.dm_uuid(name)  # raises where the node is not there, or not the volume's
        except Error:
            self._keep_as_it_was(vg, name, found)
            raise
        log.event("kept disk taken back", **claim.making.who)
        replaced.remove()
        self.close()
        return _to_fill("kept", vg.path(name))

    def _keep_as_it_was(self, vg: VolumeGroup, name: str, found: LocalDisk) -> None:
        try:
            if found.idle_tags:
                vg.change_tags(name, add=found.idle_tags)
            if not found.lv.dependents:  # LVM deactivates snapshots along with what they are of
                vg.deactivate(name)
        except Error as error:
            log.problem("kept disk is left to gc", disk=name, why=error)

    def _create(self, claim: Claim, size: int, fingerprint: str, spares: Sequence[Spare] = ()) -> Answer:
        """Make the claimed disk, removing `spares` for room; returns the fields of its `copy.Target`."""
        policy, (with_margin, writes) = claim.policy, claim.wanted
        tags = life.new_tags(claim.vm_id, claim.image_id, fingerprint, writes)

        def make(vg: VolumeGroup) -> None:
            if policy.backend == "lvm":
                vg.create_thick(claim.volume_id, with_margin, tags)
            else:
                vg.create_thin(claim.volume_id, with_margin, policy.thin_pool, tags)

        claim.making.wait(size, self._pause)
        room = partial(claim.find_room, spares, self._pause)
        return claim.making.create(size, self._pause, room, cache.insisting(policy, make, "", self._pause))

    # -- templates

    def _start_from(self, base: Base, claim: Claim, size: int, fingerprint: str) -> Answer:
        """Make the claimed disk from a template LV; in doubt it is not, and copied in full."""
        try:
            if self._shelf is None:
                if base.domain_id:
                    cache.require_template(base, claim.image_id)
                self._shelf = Shelf(base, claim.policy, self._pause)
            if self._shelf.base != base:
                raise BadRequest(problem="it names another base")
            if not self._shelf.look():
                return _to_fill("missing")
            reading = ExitStack()
            device = self._shelf.open(reading) if claim.policy.backend == "lvm" else None
        except (BadRequest, Interrupted):
            raise
        except Error as error:
            return self._uncached(claim, error)
        path = claim.vg.path(claim.volume_id)
        if device:
            return self._make_beside(device, reading, claim, size, fingerprint)
        if claim.policy.backend == "lvmthin":
            target = self._clone(self._shelf, claim, size, fingerprint)
            if target:
                self._leave_shelf()
                return _to_fill("layers", path, target)
            claim.making.undo(claim.find)
        try:
            self._shelf.spoiled()
        except Interrupted:
            raise
        except Error as error:
            return self._uncached(claim, error)
        return _to_fill("missing")

    def _make_beside(
        self, device: Answer, reading: ExitStack, claim: Claim, size: int, fingerprint: str
    ) -> Answer:
        """Make the claimed disk while the template LV, as long as `reading`, is open and so not evicted."""
        self._leave_shelf()
        claim.resources.callback(reading.close)
        try:
            target = self._create(claim, size, fingerprint)
        except NoSpace as error:  # there may be, if that one goes, too
            claim.making.finished()
            reading.close()
            return self._uncached(claim, error)
        return _to_fill("on base", claim.vg.path(claim.volume_id), target, device)

    def _clone(self, shelf: Shelf, claim: Claim, size: int, fingerprint: str) -> Answer | None:
        with_margin, writes = claim.wanted
        tags = life.new_tags(claim.vm_id, claim.image_id, fingerprint, shelf.holds + writes)
        claim.making.wait(size, self._pause)
        spares = claim.replaced.spares if claim.replaced else ()
        room = partial(claim.find_room, spares, self._pause)
        return shelf.clone(claim.making, size, with_margin, tags, room)

    def _prefetch(self, request: Request) -> Answer:
        self.close()
        if request["backend"] not in ("lvm", "lvmthin"):
            raise BadRequest(problem="the backend is not known")
        policy = self._config.policy("", request["backend"])
        if not self._config.caches_templates(policy.volume_group):
            raise CacheOff(vg=policy.volume_group)
        self._shelf = Shelf(_base(request["base"]), policy, self._pause)
        is_there = self._shelf.look()
        if is_there:
            self._shelf.touch()
        return {"ready": is_there, "thin": policy.backend == "lvmthin"}

    def _fill(self, request: Request) -> Answer:
        writes = _integer(request, "writes", 0, MAX_DISK)
        shelf, claim = self._shelf, self._claim
        if shelf is None or shelf.is_there or self._made():
            raise BadRequest(problem="the verbs come in the wrong order")
        try:
            target = shelf.fill(writes, claim.require_room if claim else lambda _vg: None)
        except Interrupted:
            raise
        except Error as error:
            if claim is None:
                raise
            return self._uncached(claim, error)
        return _to_fill("copy", target["path"], target)

    def _uncached(self, claim: Claim, why: Error) -> Answer:
        log.problem("template not cached", **claim.making.who, why=why)
        self._leave_shelf()
        return _to_fill("uncached")

    # -- while it is filled, and then

    def _progress(self, request: Request) -> Answer:
        done, written = (_integer(request, name, 0, MAX_DISK) for name in ("done", "written"))
        self._making().go_on(done, written)
        return {}

    def _commit(self, request: Request) -> Answer:
        making = self._making()
        if self._shelf and making is self._shelf.making:
            self._shelf.commit()
        elif self._claim:
            self._commit_disk(self._claim)
        return {}

    def _commit_disk(self, claim: Claim) -> None:
        asked = libvirt.ask_domains()
        vg, making = _read(claim.policy), claim.making
        found = claim.find(vg)
        if found is None or found.state is not State.UNFINISHED or not making.is_ours(vg, found.lv):
            raise BadRequest(problem="the unfinished disk is not the one that was made")
        vg.require_usable()
        _require_known(asked, claim)
        kept.note(claim.vm_id)
        vg.change_tags(claim.volume_id, remove={life.UPDATING, *found.writes_tags})
        self._claim = None
        self._starting = ""
        making.finished()
        log.event("disk ready", **making.who, **making.speed())
        counters.copied(making.written, making.took)
        try:
            if claim.replaced:
                claim.replaced.remove()
        finally:
            making.release()

    def _cancel(self, request: Request) -> Answer:
        vm_id, _ = self._policy(request)
        cancel.destroying(vm_id)
        log.event("VM is powered off while it starts", vm=vm_id)
        return {}

    def _drifted(self, request: Request) -> Answer:
        """Mark the disks that a VM, which has stopped, has not run from in the end.

        A live snapshot or a live storage migration went past us.  The data until then are in the local disk.
        """
        self.close()
        vm_id, policy = self._policy(request)
        ran_from = _paths(request)
        with ExitStack() as locks:
            for vg, disk in _stopped_disks(policy, vm_id, locks):
                paths = ran_from.get(disk.image_id, {vg.path(disk.volume_id)})
                if disk.state is State.READY and not disk.is_stale and vg.path(disk.volume_id) not in paths:
                    vg.require_usable()
                    vg.change_tags(disk.volume_id, add={life.drifted_tag(time.time())}, remove=disk.idle_tags)
                    log.problem(
                        "VM did not run from its local disk, which is kept",
                        vm=vm_id,
                        disk=disk.volume_id,
                        ran_from=" ".join(sorted(paths)),
                    )
        return {}

    def _release(self, request: Request) -> Answer:
        self.close()
        vm_id, policy = self._policy(request)
        cancel.destroyed(vm_id)
        with ExitStack() as locks:
            disks = list(_stopped_disks(policy, vm_id, locks))
            for vg in [vg for vg, _ in disks[:1]]:
                vg.require_usable()
                _stop(vg, policy, [disk for _, disk in disks])
        return {}

    def _stale(self, request: Request) -> Answer:
        self.close()
        stale.mark(self._config, _uuid(request, "vm"), _images(request), self._pause)
        return {}

    # -- steps

    def _with_others(self, claim: Claim) -> Claim:
        """The claim, with this VM's other local disks of its image locked and looked at again.

        They are copies of what was the image's leaf before a snapshot was made or removed, or were given
        another name by a start that was to replace them.
        """
        if claim.others is not None:
            return claim
        names = [disk.volume_id for disk in _others(claim, claim.vg)]
        for name in names:
            claim.resources.enter_context(lock.holding(lock.disk_lock(name), self._pause))
        vg = _read(claim.policy) if names else claim.vg
        others = tuple(disk for disk in _others(claim, vg) if disk.volume_id in names)
        return replace(claim, vg=vg, found=claim.find(vg), others=others)

    def _replaced(self, claim: Claim, disks: Sequence[LocalDisk]) -> Replaced:
        return Replaced(disks, claim.policy, self._pause, claim.resources)

    def _without(self, claim: Claim, removed: Sequence[LocalDisk]) -> Claim:
        """The claim once these disks of it, which nobody keeps, were removed."""
        if not removed:
            return claim
        vg = claim.vg if claim.others else _read(claim.policy)  # with others, it was read again just now
        claim.find(vg)
        now = {disk.lv.lv_uuid: disk for disk in life.local_disks(vg)}
        for disk in filter(None, (now.get(disk.lv.lv_uuid) for disk in removed)):
            take_away(vg, disk, claim.policy.retention.erase, self._pause)
            log.event("old copy removed", vm=claim.vm_id, disk=disk.volume_id, state=disk.state.value)
        others = tuple(disk for disk in claim.others or () if disk not in removed)
        return replace(claim, found=None if claim.found in removed else claim.found, others=others)

    def _policy(self, request: Request) -> tuple[str, Policy]:
        if request["property"] not in PROPERTY_VALUES:
            raise BadRequest(problem="the property's value is not known")
        vm_id = _uuid(request, "vm")
        return vm_id, self._config.policy(vm_id, request["property"])

    def _unfilled_claim(self) -> Claim:
        if self._claim is None or self._made():
            raise BadRequest(problem="the verbs come in the wrong order")
        return self._claim

    def _making(self) -> Making:
        making = self._made()
        if making is None:
            raise BadRequest(problem="the verbs come in the wrong order")
        return making

    def _parse(self, line: bytes) -> tuple[Callable[[Request], Answer], Request]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            raise BadRequest(problem="it is no JSON") from None
        if not isinstance(request, dict) or not isinstance(request.get("verb"), str):
            raise BadRequest(problem="it has no verb")
        verb, fields = self._verbs.get(request["verb"], (None, frozenset[str]()))
        if verb is None or request.keys() - {"verb"} != fields:
            raise BadRequest(problem="its verb or its fields are not known")
        return verb, request


def _to_fill(how: str, path: str = "", target: Answer | None = None, base: Answer | None = None) -> Answer:
    return {"how": how, "path": path, "target": target, "base": base}


# -- telling


def _asked(request: Request) -> dict[str, object]:
    """Who asks, where nothing is claimed yet."""
    told = {"vm": request.get("vm"), "disk": request.get("volume")}
    return {name: value for name, value in told.items() if isinstance(value, str)}


# -- stopping


def _of_vm(vg: VolumeGroup, vm_id: str) -> list[LocalDisk]:
    return [disk for disk in life.local_disks(vg) if disk.vm_id == vm_id]


def _stopped_disks(policy: Policy, vm_id: str, locks: ExitStack) -> Iterator[tuple[VolumeGroup, LocalDisk]]:
    """The disks of a VM that has stopped, their locks held, but for those that a new start prepares.

    Raises StillRuns.
    """
    held = {d.volume_id for d in _of_vm(_read(policy), vm_id) if _try_hold(d.volume_id, locks)}
    vg = _read(policy) if held else None
    disks = [d for d in _of_vm(vg, vm_id) if d.volume_id in held] if vg else []
    if any(disk.is_open for disk in disks) and vm_id in libvirt.active():
        raise StillRuns(vm=vm_id)
    return ((vg, disk) for disk in disks if vg)


def _try_hold(volume_id: str, locks: ExitStack) -> bool:
    """Take a disk's lock for as long as `locks`; False where it is being prepared for a new start."""
    for _ in range(LOCK_TRIES):
        held = lock.try_hold(lock.disk_lock(volume_id))
        if held:
            locks.callback(held.release)
            return True
        time.sleep(lock.POLL)
    return False


def _stop(vg: VolumeGroup, policy: Policy, disks: list[LocalDisk]) -> None:
    """Do what a stop does with disks whose locks are held: one LVM command for each kind of change.

    All is tried; raises the first failure.
    """
    planned: dict[Stop, list[LocalDisk]] = {plan: [] for plan in Stop}
    for disk in disks:
        plan = life.plan_stop(disk, policy.retention)
        planned[plan].append(disk)
        log.event("VM stopped", vm=disk.vm_id, disk=disk.volume_id, plan=plan.value)
        if disk.lv.dependents and plan is Stop.MARK_DELETING:
            others = ", ".join(disk.lv.dependents)
            log.problem("LVM would remove others along with it", disk=disk.volume_id, others=others)
    failures = []
    for step in (_drop, _keep):
        try:
            step(vg, planned)
        except Error as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _drop(vg: VolumeGroup, planned: Mapping[Stop, list[LocalDisk]]) -> None:
    left = _remove_all(vg, [disk.volume_id for disk in planned[Stop.REMOVE]])
    busy = left.union(disk.volume_id for disk in planned[Stop.MARK_DELETING])
    if busy:
        vg.change_tags(*sorted(busy), add={life.DELETING})


def _keep(vg: VolumeGroup, planned: Mapping[Stop, list[LocalDisk]]) -> None:
    left = [*planned[Stop.KEEP], *planned[Stop.LEAVE]]
    for vm_id in {disk.vm_id for disk in left}:
        kept.note(vm_id)
    ready = [disk for disk in planned[Stop.KEEP] if disk.state is State.READY]
    # LVM deactivates snapshots along with what they are of.
    closed = [disk.volume_id for disk in left if not (disk.is_open or disk.lv.dependents)]
    if ready:
        seen = frozenset[str]().union(*(disk.unneeded_tags for disk in ready))
        marks = life.stopped_tags(clock.now())
        vg.change_tags(*(disk.volume_id for disk in ready), add=marks, remove=seen - marks)
    if closed:
        vg.deactivate(*closed)


def _remove_all(vg: VolumeGroup, names: list[str]) -> set[str]:
    """Remove volumes; returns those that are still there because something has them open by now."""
    if not names:
        return set()
    try:
        vg.remove(*names)
    except CommandFailed as error:
        log.problem("left to gc", disks=" ".join(names), why=error)
        left = VolumeGroup.read(vg.vg_name, vg.devices)
        return {name for name in names if left.find(name)}
    return set()


# -- looking


def _read(policy: Policy) -> VolumeGroup:
    return VolumeGroup.read(policy.volume_group, policy.devices)


def _find(vg: VolumeGroup, vm_id: str, image_id: str, volume_id: str) -> LocalDisk | None:
    """This VM's local disk of that name, None if there is no such volume.

    Raises ForeignVolume, OtherOwner: another's volume is never handed out.
    """
    lv = vg.find(volume_id)
    if lv is None:
        return None
    found = LocalDisk.from_lv(lv)
    if found is None:
        raise ForeignVolume(vg=vg.vg_name, lv=volume_id)
    life.require_owner(found, vm_id, image_id, vg.vg_name)
    return found


def _others(claim: Claim, vg: VolumeGroup) -> list[LocalDisk]:
    """This VM's local disks of the claimed image that have another name than the claimed one."""
    return [
        d for d in _of_vm(vg, claim.vm_id) if d.image_id == claim.image_id and d.volume_id != claim.volume_id
    ]


def _running(vg: VolumeGroup, found: LocalDisk | None, vm_id: str, volume_id: str) -> tuple[bool, str]:
    """Whether the disk is left as it is, and the path of the local disk that the VM runs from already.

    vdsm, restarted, recovers VMs by the same hook points, those that run and those that have run and are shut
    off; nothing of theirs may change.
    """
    found = None if found is not None and found.is_aside else found
    is_open = found is not None and found.is_open
    try:
        state = libvirt.state(vm_id)
    except LibvirtSilent:
        if not is_open:
            raise
        state = DomainState.ACTIVE  # nothing says otherwise: an open disk is in use
    if state in (DomainState.UNKNOWN, DomainState.PLACEHOLDER):
        return False, ""
    if state is DomainState.SHUT_OFF:
        log.problem("VM is shut off and not being started; disk left as it is", vm=vm_id, disk=volume_id)
        return True, ""
    if found is not None and found.state in (State.UNFINISHED, State.DELETING):
        raise VmRuns(vg=vg.vg_name, lv=volume_id, vm=vm_id)
    if found is not None and found.is_open:
        if found.idle_tags:
            vg.change_tags(volume_id, remove=found.idle_tags)
        return False, vg.path(volume_id)
    log.problem("VM runs, but not from a local disk; left as it is", vm=vm_id, disk=volume_id)
    return True, ""


def _require_known(asked: libvirt.Question, claim: Claim) -> None:
    """Raise VmForgotten if libvirt knows the VM of a claim no longer: it was powered off, and none starts."""
    try:
        known = libvirt.read_domains(asked.text()).known
    except LibvirtSilent as error:
        log.problem("libvirt is not asked whether the VM still starts", **claim.making.who, why=error)
        return
    if claim.vm_id not in known:
        raise VmForgotten(vm=claim.vm_id, volume=claim.volume_id)


def _look_at(vg: VolumeGroup, policy: Policy, vm_id: str, ids: tuple[str, str]) -> Answer:
    image_id, volume_id = ids
    found = _find(vg, vm_id, image_id, volume_id) if policy.is_local(image_id) else None
    return {
        "local": policy.is_local(image_id),
        "kept": any(disk.image_id == image_id and stale.is_usable(disk) for disk in _of_vm(vg, vm_id)),
        "ready": found is not None and found.state is State.READY and found.lv.lv_active,
        "state": found.state.value if found else "absent",
        "path": vg.path(volume_id),
    }


# -- requests


def _uuid(request: Request, name: str) -> str:
    value = request.get(name)
    if not is_uuid(value):
        raise BadRequest(problem=f"{name} is no canonical UUID")
    return str(value)


def _integer(request: Request, name: str, low: int, high: int) -> int:
    value = request.get(name)
    if type(value) is not int or not low <= value <= high:
        raise BadRequest(problem=f"{name} is no integer from {low} to {high}")
    return value


def _base(fields: Any) -> Base:
    if not isinstance(fields, dict) or fields.keys() != {"volume", "domain", "fingerprint", "size"}:
        raise BadRequest(problem="base is not {volume, domain, fingerprint, size}")
    size = _integer(fields, "size", 512, MAX_DISK)
    if size % 512 or not life.is_fingerprint(fields["fingerprint"]):
        raise BadRequest(problem="size or fingerprint of the base is malformed")
    domain_id = _uuid(fields, "domain") if fields["domain"] != "" else ""
    return Base(_uuid(fields, "volume"), domain_id, fields["fingerprint"], size)


def _paths(request: Request) -> dict[str, set[str]]:
    """What disks ran from, by image; the paths are compared and logged, nothing else."""
    rows = request["disks"]
    if not isinstance(rows, list) or len(rows) > MAX_DISKS:
        raise BadRequest(problem=f"disks is no list of at most {MAX_DISKS}")
    if not all(isinstance(row, dict) and row.keys() == {"image", "path"} for row in rows):
        raise BadRequest(problem="a disk is not {image, path}")
    if not all(isinstance(row["path"], str) for row in rows):
        raise BadRequest(problem="a path is no text")
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(_uuid(row, "image"), set()).add(row["path"])
    return found


def _disks(request: Request) -> list[tuple[str, str]]:
    rows = request["disks"]
    if not isinstance(rows, list) or len(rows) > MAX_DISKS:
        raise BadRequest(problem=f"disks is no list of at most {MAX_DISKS}")
    if not all(isinstance(row, dict) and row.keys() == {"image", "volume"} for row in rows):
        raise BadRequest(problem="a disk is not {image, volume}")
    return [(_uuid(row, "image"), _uuid(row, "volume")) for row in rows]


def _images(request: Request) -> list[str]:
    images = request["images"]
    if not isinstance(images, list) or not 0 < len(images) <= MAX_DISKS:
        raise BadRequest(problem=f"images is no list of at most {MAX_DISKS}")
    if images != [kept.EVERY] and not all(map(is_uuid, images)):
        raise BadRequest(problem="an image is no canonical UUID")
    return [str(image) for image in images]
