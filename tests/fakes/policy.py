"""A policy, for tests of what is decided by one."""

from __future__ import annotations

from localdisk import frozen
from localdisk.backend import Backend
from localdisk.config import Cache, Copy, Margins, Policy, Retention
from localdisk.units import Amount

RETENTION = Retention(
    "keep", keep_for=3600, grace=600, on_source_change="refuse", erase="none", older_disks="keep"
)
POLICY = Policy(
    volume_group="ovirt-local",
    backend=Backend.THICK,
    thin_pool="pool0",
    devices=(),
    margins=Margins(Amount(bytes=0), Amount(bytes=0), thin_data=90.0, thin_metadata=80.0),
    retention=RETENTION,
    copy=Copy(parallel=2, bandwidth=None, nice=10, stall=300),
    hotplug="refuse",
    cache=Cache(templates=False, max_size=Amount(percent=50.0), keep_for=0),
    enabled=True,
    disks=None,
)
THIN = frozen.replace(POLICY, backend=Backend.THIN)
