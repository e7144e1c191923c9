"""The template cache in the helper: makes, checks, clones and evicts template LVs.

A start holds the lock of the template LV from its first check until the disk is made from it, but not while
bytes are erased to make room for the disk.  So if several VMs of one template start together, the first
copies the template, and the others wait and use the copy.  On any doubt the cache is bypassed, and the disk
is copied in full.  `volumes/template.py` describes the tags.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from localdisk import counters, device_mapper, lock, log
from localdisk.config import Policy
from localdisk.errors import (
    BadRequest,
    CommandFailed,
    Error,
    ForeignVolume,
    NoTemplate,
)
from localdisk.helper.new_volume import Create, Known, NewVolume
from localdisk.lock import Pause
from localdisk.protocol import Base, Device, Target
from localdisk.volumes import template
from localdisk.volumes.local_disk import UPDATING, LocalDisk
from localdisk.volumes.lvm import VolumeGroup, read_tags
from localdisk.volumes.removal import remove_or_set_aside
from localdisk.volumes.room import Need, NewLv
from localdisk.volumes.template import Template

_SAMPLES, _SAMPLE = 256, 4096  # blocks, and bytes of each


class _Unusable(Exception):
    """The template LV was removed, or changed, while its lock was released."""


class CachedTemplate:
    """One template and its template LV, whether it exists or not; the lock of its name is held."""

    def __init__(self, base: Base, policy: Policy, pause: Pause) -> None:
        self.base = base
        self._policy = policy
        self._pause = pause
        self._pool = policy.pool
        self.name = template.lv_name(base.volume_id, base.fingerprint, policy.backend, policy.thin_pool)
        self.new_volume = self._hold()
        self._vg: VolumeGroup  # as `find_usable` has read it
        self._found: Template | None = None

    def _hold(self) -> NewVolume:
        with ExitStack() as stack:
            held = stack.enter_context(lock.holding(lock.disk_lock(self.name), self._pause))
            volume = NewVolume(self.name, self._policy, held, stack.pop_all(), template=self.base.volume_id)
        volume.begin_phase()
        return volume

    @contextlib.contextmanager
    def _left_to_others(self) -> Iterator[None]:
        """Release the lock, and wait for it again at the end; meanwhile the template LV may be removed.

        After an error the start ends, and does not need the lock.
        """
        self.new_volume.release()
        self._found = None
        yield
        self.new_volume = self._hold()

    @property
    def chunk(self) -> int:
        """Bytes of a block of its thin pool, 0 if it is thick; after `find_usable`."""
        return self._vg.chunk(self._pool)

    @property
    def is_there(self) -> bool:
        """Whether `find_usable` has found a template LV."""
        return self._found is not None

    @property
    def holds(self) -> int:
        """Bytes of data in the template LV, which every clone shares."""
        return self._found.holds if self._found else 0

    def find_usable(self) -> bool:
        """Whether its template LV exists and may be used; a template LV that may not be used is removed.

        Raises ForeignVolume, DiskBusy, CommandFailed.
        """
        vg = self._vg = _read(self._policy)
        self._found = self._sound(vg)
        if self._found:
            return True
        if vg.find(self.name):
            self._discard(vg, "it is incomplete, or not as it was made")
        return False

    def _sound(self, vg: VolumeGroup) -> Template | None:
        """The template LV, if it may be used; its content is not read."""
        found = _find(vg, self.name)
        return (
            found if found and template.is_sound(found, self.base.fingerprint, self.base.size, vg) else None
        )

    def fill(self, writes: int, beside: Sequence[NewLv]) -> Target:
        """Make the template LV; returns the volume that the base must be copied to.

        `writes`: bytes of data in the base; `beside`: for these volumes there must be room besides.
        Raises the errors of `NewVolume.make`.
        """
        base = self.base
        new = NewLv(base.size, writes)
        need = Need(self._policy, (new, *beside), template=self.name, is_template=True)

        tags = template.new_tags(base.volume_id, base.fingerprint, writes)

        def create(vg: VolumeGroup) -> None:
            if self._pool:
                vg.create_thin(self.name, base.size, self._pool, tags)
            else:
                vg.create_thick(self.name, base.size, tags)

        self.new_volume.begin_turn(base.size, self._pause)
        return self.new_volume.create(base.size, need, tags, create, self._pause)

    def commit(self) -> None:
        """Make the template LV ready and read-only; its copy is complete and synced.

        Raises BadRequest if the volume is not the one that this helper made.
        """
        vg = _read(self._policy)
        found = _find(vg, self.name)
        if found is None or found.is_ready or not self.new_volume.is_ours(vg, found.lv):
            what = f"the local copy of volume {self.base.volume_id}"
            raise BadRequest(problem=f"{what} is not the one that was made")
        vg.require_usable()
        sample = self._take_sample(vg.path(self.name))
        holds = (
            round(found.lv.lv_size * (found.lv.data_percent or 0) / 100)
            if self._pool
            else vg.round_up(self.base.size)
        )
        vg.deactivate(self.name)
        ready = template.ready_tags(holds, sample, time.time())
        vg.seal(self.name, add=ready, remove={UPDATING, *found.writes_tags})
        self.new_volume.end_turn()
        log.event("template ready", **self.new_volume.log_fields, **self.new_volume.speed())
        counters.copied(self.new_volume.written, self.new_volume.took)
        counters.template_miss()

    # -- making a disk from it

    def clone(
        self,
        disk: NewVolume,
        size: int,
        need: Need,
        tags: frozenset[str],
        free_name: Create,
        known: Known | None,
    ) -> Target | None:
        """Make a VM's disk as a thin snapshot of the template LV, when `free_name` has freed its name.

        `size` bytes of the disk are the guest's view; `need` has its size; `known` is that of
        `NewVolume.make`.  Returns the volume to which the layers above the base must be copied; None if the
        template LV has changed since it was made, or was removed while the disk's room was erased.
        """
        larger = need.volumes[0].size

        def create(vg: VolumeGroup) -> None:
            found = self._found = self._found or self._sound(vg)
            if found is None:
                raise _Unusable
            free_name(vg)
            vg.create_snapshot(disk.lv_name, self.name, tags)
            if vg.round_up(larger) > found.lv.lv_size:
                vg.extend(disk.lv_name, larger)

        try:
            target = disk.create(size, need, tags, create, self._pause, known, self._left_to_others)
        except _Unusable:
            return None
        if not self._is_as_it_was(target.path):
            return None
        self.mark_used()
        counters.template_hit()
        return target

    def open(self, resources: ExitStack) -> Device | None:
        """Activate the template LV, to be read; None if its content has changed since it was made.

        It is kept open, so that it is not evicted, until `resources` is closed; then it is deactivated.
        """
        vg, path = self._vg, self._vg.path(self.name)
        with ExitStack() as stack:
            stack.callback(_deactivate_if_unused, self._policy, self.name)
            vg.activate(self.name)
            dm_uuid = vg.dm_uuid(self.name)
            stack.callback(os.close, _open(path))
            if not self._is_as_it_was(path):
                return None
            self.mark_used()
            counters.template_hit()
            resources.callback(stack.pop_all().close)
        return Device(path, dm_uuid)

    def discard(self) -> None:
        """Remove a template LV, if there is one, whose content has changed since it was made."""
        vg = _read(self._policy)
        if vg.find(self.name):
            self._discard(vg, "its content is not what was copied")

    def _is_as_it_was(self, path: str) -> bool:
        """Whether the template LV, or a new clone of it, can be read and has the content that was copied."""
        assert self._found  # noqa: S101 (find_usable was called)
        try:
            return self._take_sample(path) == self._found.sample
        except CommandFailed as error:
            log.problem("template LV cannot be read", **self.new_volume.log_fields, why=error)
            return False

    def _take_sample(self, path: str) -> str:
        """Raises CommandFailed."""
        try:
            return _sample(path, self.base.size)
        except OSError as error:
            raise CommandFailed(("read", path), error.errno or 0, error.strerror or str(error)) from None

    def mark_used(self) -> None:
        """Record in the tag USED that the template LV is used now."""
        assert self._found  # noqa: S101 (find_usable was called)
        now = time.time()
        if self._found.is_used_at(now):
            return
        tag = template.used_tag(now)
        try:
            self._vg.change_tags(self.name, add={tag}, remove=self._found.used_tags - {tag})
        except CommandFailed as error:  # it may only be evicted earlier than otherwise
            log.problem("template LV cannot be marked as used", **self.new_volume.log_fields, why=error)

    def _discard(self, vg: VolumeGroup, why: str) -> None:
        found = removable(vg, self.name)
        if found is None:
            raise ForeignVolume(vg=vg.vg_name, lv=self.name)
        vg.require_usable()
        remove_or_set_aside(vg, found, self._policy.retention.erase, self._pause)
        log.problem("template LV removed", **self.new_volume.log_fields, why=why)
        self._found = None

    def close(self) -> None:
        """Remove an unfinished template LV and release its lock."""
        self.new_volume.remove_unfinished(lambda vg: removable(vg, self.name))
        self.new_volume.release()


# -- which volumes are templates'


def require_template(base: Base, image_id: str) -> None:
    """Raise NoTemplate unless a block volume belongs to another image than `image_id`, the disk's own."""
    tags = read_tags(base.domain_id, base.volume_id, _devices(f"/dev/{base.domain_id}/{base.volume_id}"))
    images = [tag[3:] for tag in tags if tag.startswith("IU_")]
    if len(images) != 1 or images[0] == image_id:
        raise NoTemplate(volume=base.volume_id, problem="its storage domain has it as the image's own")


def _devices(path: str) -> Iterator[str]:
    """The devices that an active volume's group may be on: those below the volume, and all multipath ones.

    LVM gets their names, because a storage domain's devices need not be in this host's devices file.
    """
    try:
        yield from device_mapper.devices_below(path)
        yield from device_mapper.multipath_devices()
    except OSError as error:
        raise NoTemplate(volume=path, problem=error.strerror) from None


def removable(vg: VolumeGroup, name: str) -> LocalDisk | None:
    """The volume with a template LV's name, as a disk to remove: the template LV, or one being set aside."""
    lv = vg.find(name)
    if lv is None:
        return None
    found = Template.from_lv(lv)
    aside = LocalDisk.from_lv(lv)
    if found:
        return found.disk
    return aside if aside and aside.is_aside else None


# -- steps


def _read(policy: Policy) -> VolumeGroup:
    return VolumeGroup.read(policy.volume_group, policy.devices)


def _find(vg: VolumeGroup, name: str) -> Template | None:
    lv = vg.find(name)
    return Template.from_lv(lv) if lv else None


def _deactivate_if_unused(policy: Policy, name: str) -> None:
    """Deactivate a template LV unless it is in use or its lock is held: LVM waits 5 s for an open volume."""
    with contextlib.suppress(Error), lock.trying(lock.disk_lock(name)) as held:
        vg = _read(policy)
        found = _find(vg, name)
        if held and found and not (found.is_open or found.lv.dependents):
            vg.deactivate(name)


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CommandFailed(("open", path), error.errno or 0, error.strerror or str(error)) from None


def _sample(path: str, size: int) -> str:
    """A digest, 32 hexadecimal digits, of blocks spread over the first `size` bytes of a device.

    At most 1 MiB is read: the digest detects a volume that was overwritten, moved or restored in part, but
    not a few changed bits.
    """
    import hashlib  # slow to import; few disks need it

    digest = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for number in range(_SAMPLES):
            digest.update(os.pread(fd, _SAMPLE, number * size // _SAMPLES // _SAMPLE * _SAMPLE))
    finally:
        os.close(fd)
    return digest.hexdigest()[:32]
