"""Templates and their LVs on the fake host."""

from __future__ import annotations

from localdisk.volumes import template
from tests.fakes import (
    EXTENT,
    OTHER_FINGERPRINT,
    FakeHost,
    Volume,
)
from tests.fakes.session import (
    PREPARE,
)

NOW = 1_760_000_000


OWN_VOLUME = "99999999-9999-4999-8999-999999999999"  # of the template, on shared storage


DOMAIN = "dddddddd-dddd-4ddd-8ddd-dddddddddddd"


BASE_SIZE = 4 * EXTENT


BASE = {"volume": OWN_VOLUME, "domain": "", "fingerprint": OTHER_FINGERPRINT, "size": BASE_SIZE}


WRITES = 2 * EXTENT  # data in the base


THICK_LV = template.lv_name(OWN_VOLUME, OTHER_FINGERPRINT, "lvm", "pool0")


THIN_LV = template.lv_name(OWN_VOLUME, OTHER_FINGERPRINT, "lvmthin", "pool0")


LVS = {"lvm": THICK_LV, "lvmthin": THIN_LV}


ON = "cache: {templates: on}"


FILL = {"verb": "fill", "writes": WRITES}


WITH_BASE = {**PREPARE, "base": BASE}


PREFETCH = {"verb": "prefetch", "backend": "lvm", "base": BASE}


def sample(host: FakeHost, name: str, size: int = BASE_SIZE) -> str:
    return host.digest(name, size)


def template_tags(*more: str, volume: str = OWN_VOLUME, fingerprint: str = OTHER_FINGERPRINT) -> set[str]:
    return {"localdisk", f"TEMPLATE_{volume}", f"SOURCE_{fingerprint}", *more}


def add_template(
    host: FakeHost, backend: str = "lvm", used: int = NOW - 100, name: str = "", size: int = BASE_SIZE
) -> Volume:
    """A ready template LV, as `commit` leaves it."""
    thin = {"pool_lv": "pool0", "lv_layout": "thin,sparse", "data_percent": "50.00"}
    fields = thin if backend == "lvmthin" else {}
    name = name or LVS[backend]
    volume = host.add(name, size=size, lv_active="", lv_permissions="read-only", **fields)
    holds = f"HOLDS_{size // 2 if fields else size}"
    volume.lv_tags = template_tags(f"USED_{used}", holds, f"SAMPLE_{sample(host, name, size)}")
    return volume
