"""A configuration as the model understands it, and as YAML for the product."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class Policy:
    """What holds for one VM, in the configuration's names; sizes in bytes, times in seconds."""

    backend: str = "lvm"
    on_stop: str = "delete"
    keep_for: int = 7 * 86400
    grace: int = 600
    on_source_change: str = "refuse"
    erase: str = "none"
    older_disks: str = "keep"
    disk: int = 0  # margins.disk
    reserve: int = 0  # margins.reserve
    thin_data: int = 90  # margins.thin_data, percent
    enabled: bool = True
    disks: tuple[str, ...] | None = None  # image ids; None: all
    templates: bool = False  # cache.templates
    max_size: int = 1 << 40  # cache.max_size
    cache_for: int = 30 * 86400  # cache.keep_for

    @classmethod
    def random(cls, rng: random.Random, durations: tuple[int, ...], images: tuple[str, ...]) -> Policy:
        grace = rng.choice(durations)
        return cls(
            backend=rng.choice(("lvm", "lvm", "lvmthin")),
            on_stop=rng.choice(("delete", "keep")),
            keep_for=rng.choice((grace, 2 * grace, 86400, 7 * 86400)),
            grace=grace,
            on_source_change=rng.choice(("refuse", "recopy")),
            erase=rng.choice(("none", "none", "discard", "zero")),
            older_disks=rng.choice(("keep", "as_ours")),
            disk=rng.choice((0, 0, MIB + 512, 9 * MIB)),
            reserve=rng.choice((0, 0, 20 * MIB)),
            thin_data=rng.choice((20, 90, 90)),
            enabled=rng.random() < 0.9,
            disks=None if rng.random() < 0.7 or not images else images[:1],
            templates=rng.random() < 0.7,
            # Half a MiB lies between what templates can take, of which the product knows roughly.
            max_size=rng.choice((12, 28, 40, 70, 70, 600)) * MIB + MIB // 2,
            cache_for=rng.choice((2 * grace, 86400, 7 * 86400)),
        )

    def is_local(self, image_id: str) -> bool:
        return self.enabled and (self.disks is None or image_id in self.disks)


@dataclass(frozen=True)
class Rules:
    """What the configuration says in general, and what its `vms` override: VM -> key -> value."""

    general: Policy = Policy()
    vms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parallel: int = 2

    @classmethod
    def random(
        cls, rng: random.Random, durations: tuple[int, ...], vms: Mapping[str, tuple[str, ...]]
    ) -> Rules:
        """Any rules for these VMs, given with their images."""
        overrides = {}
        for vm_id, images in vms.items():
            if rng.random() < 0.4:
                chosen = vars(Policy.random(rng, durations, images))
                own = sorted(chosen.keys() - {"max_size", "cache_for"})
                overrides[vm_id] = {name: chosen[name] for name in rng.sample(own, rng.randint(1, 4))}
        general = replace(Policy.random(rng, durations, ()), enabled=True, disks=None)
        return cls(general, overrides, rng.choice((1, 2, 2)))

    def of(self, vm_id: str, value: str = "on") -> Policy:
        """The VM's own section wins over its property `value`, the property over the rest of the file."""
        asked = {} if value == "on" else {"backend": value}
        return replace(self.general, **{**asked, **self.vms.get(vm_id, {})})

    def with_general(self, name: str, value: object) -> Rules:
        changes: dict[str, Any] = {name: value}
        return replace(self, general=replace(self.general, **changes))

    def with_own(self, vm_id: str, name: str, value: object) -> Rules:
        return replace(self, vms={**self.vms, vm_id: {**self.vms.get(vm_id, {}), name: value}})

    @property
    def any_templates(self) -> bool:
        """Whether any VM's disks may start from a template LV."""
        return self.general.templates or any(own.get("templates") for own in self.vms.values())

    def deciding_about_older_disks(self) -> Rules:
        own = {vm_id: {k: v for k, v in its.items() if k != "older_disks"} for vm_id, its in self.vms.items()}
        return replace(self, general=replace(self.general, older_disks="as_ours"), vms=own)

    def without_templates(self) -> Rules:
        own = {vm_id: {k: v for k, v in its.items() if k != "templates"} for vm_id, its in self.vms.items()}
        return replace(self, general=replace(self.general, templates=False), vms=own)

    def without_discard(self) -> Rules:
        """What was to be discarded is overwritten with zeros."""
        own = {vm_id: {**its, **_zeroed(its)} for vm_id, its in self.vms.items()}
        return replace(self, general=replace(self.general, **_zeroed(vars(self.general))), vms=own)

    def yaml(self) -> str:
        """The file, which is JSON too."""
        general = {k: v for k, v in vars(self.general).items() if k not in ("enabled", "disks")}
        vms = {vm_id: _section(own) for vm_id, own in self.vms.items()}
        return json.dumps({**_section(general), "copy": {"parallel": self.parallel}, "vms": vms})


def _zeroed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"erase": "zero"} if values.get("erase") == "discard" else {}


_SECTIONS = {
    "retention": ("on_stop", "keep_for", "grace", "on_source_change", "erase", "older_disks"),
    "margins": ("disk", "reserve", "thin_data"),
    "cache": ("templates", "max_size", "cache_for"),
}
_UNITS = {"keep_for": "s", "grace": "s", "thin_data": "%", "cache_for": "s"}
_IN_FILE = {"cache_for": "keep_for"}  # where the field has another name


def _section(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Policy` where the file has them."""
    shown = {name: f"{value}{_UNITS[name]}" if name in _UNITS else value for name, value in values.items()}
    if "disks" in shown:
        shown["disks"] = "all" if shown["disks"] is None else list(shown["disks"])
    for section, names in _SECTIONS.items():
        inner = {_IN_FILE.get(name, name): shown.pop(name) for name in names if name in shown}
        if inner:
            shown[section] = inner
    return shown
