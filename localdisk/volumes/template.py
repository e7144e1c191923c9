"""Template LVs: local copies of templates' volumes, from which local disks are made.

As with a local disk, the tags record everything:

    localdisk           made by localdisk
    TEMPLATE_<uuid>     the oVirt volume that it is a copy of
    SOURCE_<hex>        fingerprint of that volume when it was copied
    UPDATING            the copy is incomplete
    WRITES_<bytes>      while UPDATING: the data that it will hold
    HOLDS_<bytes>       the space that it takes; for a thin LV, its data
    SAMPLE_<hex>        digest of blocks spread over the LV (`helper/cache.py`)
    USED_<epoch>        last start from it, last prefetch that found it, or its making; to the minute

A template LV has no tags of a VM or image, so nothing takes it for a VM's disk.  Its name is a hash of its
source and place (`lv_name`): all starts from the same template find the same name, and so the same lock.
A complete template LV is read-only and inactive; a disk that was made from it no longer needs it.
Everything here is a pure function of frozen data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from localdisk.backend import Backend
from localdisk.config import Cache
from localdisk.frozen import frozen, once
from localdisk.ids import is_fingerprint, is_uuid, uuid_of
from localdisk.volumes.local_disk import (
    DELETING,
    OURS,
    UPDATING,
    LocalDisk,
    State,
    latest,
    only_uuid,
)
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup

_MINUTE = 60  # seconds; if twenty VMs start together, only the first changes the tag USED
_NAMES = "5f2b6f5e-2a40-4b4d-9d0b-6f6a3c1e7d42"  # namespace of the names; random, must never change


@frozen
class Template:
    """A template LV as its logical volume and tags describe it."""

    lv: LogicalVolume
    volume_id: str  # of the template's volume on shared storage
    fingerprint: str
    is_ready: bool
    sample: str  # "" if not recorded
    used: int  # seconds since the epoch
    holds: int  # bytes that it takes of its volume group or thin pool, or will take when it is complete

    @classmethod
    def from_lv(cls, lv: LogicalVolume) -> Template | None:
        """The template LV that `lv` is, None if it is not a template LV of localdisk."""
        values = lv.tag_values
        if "TEMPLATE" not in values:
            return None
        volume_id = only_uuid(values["TEMPLATE"])
        is_owned = bool(values["VM"] or values["IU"]) or DELETING in lv.lv_tags
        if OURS not in lv.lv_tags or not volume_id or is_owned or not is_uuid(lv.lv_name):
            return None
        if "pool" in lv.lv_layout:
            return None
        fingerprints, samples = values["SOURCE"], values["SAMPLE"]
        holds = latest([*values["HOLDS"], *values["WRITES"]])
        return cls(
            lv=lv,
            volume_id=volume_id,
            fingerprint=fingerprints[0] if len(fingerprints) == 1 else "",
            is_ready=UPDATING not in lv.lv_tags,
            sample=samples[0] if len(samples) == 1 else "",
            used=latest(values["USED"]) or 0,
            holds=lv.lv_size if holds is None or not lv.pool_lv else holds,
        )

    @property
    def name(self) -> str:
        """Of the logical volume."""
        return self.lv.lv_name

    @property
    def is_open(self) -> bool:
        return self.lv.lv_device_open

    @property
    def backend(self) -> Backend:
        return Backend.THIN if self.lv.pool_lv else Backend.THICK

    @property
    def is_as_made(self) -> bool:
        """Whether a complete template LV still has the tags and permission that it was made with.

        No disk starts from a template LV that was changed.
        """
        has_tags = is_fingerprint(self.fingerprint) and bool(self.sample)
        return has_tags and self.lv.lv_permissions == "read-only"

    @property
    def used_tags(self) -> frozenset[str]:
        return frozenset(tag for tag in self.lv.lv_tags if tag.startswith("USED_"))

    def is_used_at(self, now: float) -> bool:
        """Whether its tags have recorded a use less than a minute before `now`, seconds since the epoch."""
        return len(self.used_tags) == 1 and 0 <= int(now) - self.used < _MINUTE

    @property
    def writes_tags(self) -> frozenset[str]:
        return frozenset(tag for tag in self.lv.lv_tags if tag.startswith("WRITES_"))

    @property
    def disk(self) -> LocalDisk:
        """The template LV as a local disk without owner, for the functions that remove disks."""
        return LocalDisk(
            lv=self.lv,
            vm_id="",
            image_id="",
            state=State.READY if self.is_ready else State.UNFINISHED,
            fingerprint=self.fingerprint,
            stopped=None,
            unneeded=None,
            boot=None,
            erase="",
            aside_name="",
        )


@once
def templates(vg: VolumeGroup) -> tuple[Template, ...]:
    """All template LVs of a volume group, the least recently used first."""
    found = (Template.from_lv(lv) for lv in vg.lvs)
    return tuple(sorted((each for each in found if each), key=lambda each: (each.used, each.name)))


def lv_name(volume_id: str, fingerprint: str, backend: str, thin_pool: str) -> str:
    """The LV name for a template's volume with this fingerprint, in the group or in a thin pool of it."""
    place = f"{backend} {thin_pool}" if backend == Backend.THIN else str(backend)
    return uuid_of(f"{volume_id} {fingerprint} {place}", _NAMES)


def new_tags(volume_id: str, fingerprint: str, writes: int) -> frozenset[str]:
    """The tags of a template LV whose copy is about to start."""
    return frozenset({OURS, f"TEMPLATE_{volume_id}", f"SOURCE_{fingerprint}", UPDATING, f"WRITES_{writes}"})


def ready_tags(holds: int, sample: str, now: float) -> frozenset[str]:
    """The tags that a template LV gets when its copy is complete, at `now`, seconds since the epoch."""
    return frozenset({f"HOLDS_{holds}", f"SAMPLE_{sample}", used_tag(now)})


def used_tag(now: float) -> str:
    return f"USED_{int(now)}"


def is_sound(template: Template, fingerprint: str, size: int, vg: VolumeGroup) -> bool:
    """Whether a template LV may be used for a base volume of `size` bytes; its content is not read."""
    is_copy = template.fingerprint == fingerprint and template.lv.lv_size == vg.round_up(size)
    return template.is_ready and template.is_as_made and is_copy


# -- how much room template LVs may take


def limit(vg: VolumeGroup, cache: Cache, pool: str) -> int:
    """Bytes that template LVs may take (`cache.max_size`): of the thin pool; with `pool` "", of the group."""
    lv = vg.find(pool) if pool else None
    return cache.max_size.of(lv.lv_size if lv else vg.vg_size)


def in_place(vg: VolumeGroup, pool: str) -> tuple[Template, ...]:
    """The template LVs in a thin pool, or with `pool` "" those in no pool; the least recently used first."""
    return tuple(each for each in templates(vg) if each.lv.pool_lv == pool)


def too_many(vg: VolumeGroup, cache: Cache) -> frozenset[str]:
    """The names of the template LVs that must be removed so that the rest fits into `cache.max_size`."""
    pools = {each.lv.pool_lv for each in templates(vg)}
    found = (beyond(in_place(vg, pool), limit(vg, cache, pool)) for pool in pools)
    return frozenset(each.name for names in found for each in names)


def beyond(found: Iterable[Template], most: int) -> Iterator[Template]:
    """The first ones of `found` that must be removed so that the rest takes at most `most` bytes."""
    every = tuple(found)
    left = sum(each.holds for each in every)
    for each in every:
        if left <= most:
            return
        left -= each.holds
        yield each
