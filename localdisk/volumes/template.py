"""Template LVs: local copies of templates' base volumes, which local disks start from.

As of a local disk, all that is known about one is in its tags:

    localdisk           ours
    TEMPLATE_<uuid>     the volume that it is a copy of
    SOURCE_<hex>        fingerprint of that volume when it was copied
    UPDATING            the copy is incomplete
    WRITES_<bytes>      while UPDATING: the data that it will hold
    HOLDS_<bytes>       the data that it holds, of a thin one
    SAMPLE_<hex>        digest of blocks all over it (`cache.py`)
    USED_<epoch>        when a disk last started from it, prefetch found it, or it was made, to the minute

It has no owner, so nothing takes it for a VM's disk.  Its name is made from what it is a copy of and of
where it lies: whoever wants the same template comes to the same name, and to the same lock.
A complete one is read-only and inactive; a disk that was made from it does not need it any more.
Everything here is a pure function of frozen data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from localdisk.config import Cache
from localdisk.frozen import frozen
from localdisk.ids import is_fingerprint, is_uuid, uuid_of
from localdisk.volumes.disk import (
    DELETING,
    OURS,
    UPDATING,
    LocalDisk,
    State,
    numbers_of,
    only_uuid,
    values_of,
)
from localdisk.volumes.lvm import LogicalVolume, VolumeGroup

_MINUTE = 60  # seconds; of twenty VMs that start together, one writes down that it is used
_NAMES = "5f2b6f5e-2a40-4b4d-9d0b-6f6a3c1e7d42"  # any, but always this one


@frozen
class Template:
    """A template LV as its logical volume and tags describe it."""

    lv: LogicalVolume
    volume_id: str  # of the template, on shared storage
    fingerprint: str
    is_ready: bool
    sample: str  # "" where none was recorded
    used: int  # seconds since the epoch
    holds: int  # bytes that it takes of its volume group or pool, or will when it is complete

    @classmethod
    def from_lv(cls, lv: LogicalVolume) -> Template | None:
        """The template LV that `lv` is, or None where it is none, or not ours."""
        values = values_of(lv.lv_tags)
        volume_id = only_uuid(values["TEMPLATE"])
        is_owned = bool(values["VM"] or values["IU"]) or DELETING in lv.lv_tags
        if OURS not in lv.lv_tags or not volume_id or is_owned or not is_uuid(lv.lv_name):
            return None
        if "pool" in lv.lv_layout:
            return None
        fingerprints, samples = values["SOURCE"], values["SAMPLE"]
        holds = numbers_of([*values["HOLDS"], *values["WRITES"]])
        return cls(
            lv=lv,
            volume_id=volume_id,
            fingerprint=fingerprints[0] if len(fingerprints) == 1 else "",
            is_ready=UPDATING not in lv.lv_tags,
            sample=samples[0] if len(samples) == 1 else "",
            used=max(numbers_of(values["USED"]), default=0),
            holds=max(holds, default=lv.lv_size) if lv.pool_lv else lv.lv_size,
        )

    @property
    def name(self) -> str:
        """Of the logical volume."""
        return self.lv.lv_name

    @property
    def is_open(self) -> bool:
        return self.lv.lv_device_open

    @property
    def backend(self) -> str:
        return "lvmthin" if self.lv.pool_lv else "lvm"

    @property
    def is_as_made(self) -> bool:
        """Whether a complete one is as `cache.py` leaves it; no disk starts from another."""
        is_told = is_fingerprint(self.fingerprint) and bool(self.sample)
        return is_told and self.lv.lv_permissions == "read-only"

    @property
    def used_tags(self) -> frozenset[str]:
        return frozenset(tag for tag in self.lv.lv_tags if tag.startswith("USED_"))

    def is_used_at(self, now: float) -> bool:
        """Whether its tags say that it is used at `now`, seconds since the epoch, to the minute."""
        return len(self.used_tags) == 1 and 0 <= int(now) - self.used < _MINUTE

    @property
    def writes_tags(self) -> frozenset[str]:
        return frozenset(tag for tag in self.lv.lv_tags if tag.startswith("WRITES_"))

    @property
    def disk(self) -> LocalDisk:
        """It as what can be removed: a local disk of nobody."""
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


def templates(vg: VolumeGroup) -> tuple[Template, ...]:
    """All template LVs of a volume group, the least recently used first."""
    found = (Template.from_lv(lv) for lv in vg.lvs)
    return tuple(sorted((each for each in found if each), key=lambda each: (each.used, each.name)))


def lv_name(volume_id: str, fingerprint: str, backend: str, thin_pool: str) -> str:
    """The name of the template LV of a volume as it is now, in the volume group or in a thin pool of it."""
    place = f"{backend} {thin_pool}" if backend == "lvmthin" else backend
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
    """Whether it may be used, as far as can be seen of it, for a base volume of `size` bytes."""
    is_of_it = template.fingerprint == fingerprint and template.lv.lv_size == vg.round_up(size)
    return template.is_ready and template.is_as_made and is_of_it


# -- how much of it there may be


def limit(vg: VolumeGroup, cache: Cache, pool: str) -> int:
    """Bytes that template LVs may take: of the pool, where `pool` is the name of one, or of the group."""
    lv = vg.find(pool) if pool else None
    return cache.max_size.of(lv.lv_size if lv else vg.vg_size)


def in_place(vg: VolumeGroup, pool: str) -> tuple[Template, ...]:
    """The template LVs of a pool, or with pool "" those that are no pool's; least recently used first."""
    return tuple(each for each in templates(vg) if each.lv.pool_lv == pool)


def too_many(vg: VolumeGroup, cache: Cache) -> frozenset[str]:
    """The names of the template LVs that `cache.max_size` has no room for."""
    pools = {each.lv.pool_lv for each in templates(vg)}
    found = (beyond(in_place(vg, pool), limit(vg, cache, pool)) for pool in pools)
    return frozenset(each.name for names in found for each in names)


def beyond(found: Iterable[Template], most: int) -> Iterator[Template]:
    """Those of `found`, in their order, that must go so that the rest takes at most `most` bytes."""
    every = tuple(found)
    left = sum(each.holds for each in every)
    for each in every:
        if left <= most:
            return
        left -= each.holds
        yield each
