"""A snapshot with a row of each kind."""

from __future__ import annotations

from localdisk.status.problems import Problem
from localdisk.status.snapshot import Copy, Group, Next, Pool, Row, Snapshot

GIB = 1 << 30


NOW = 1_760_000_000


GROUP = Group("ovirt-local", 1800 * GIB, 850 * GIB, 90 * GIB, Pool("pool0", 400 * GIB, 83.2, 10.9, 90, 80))


PROBLEM = Problem(
    "not_local", "VM web1: vdb runs from /rhev/data-center/x, " + "not from there " * 6, "stop it"
)


COPY = Copy("copying", NOW - 20, 0.423, 8 * GIB, 310 << 20, 41)


def row(number: int, **fields: object) -> Row:
    usual: dict[str, object] = {
        "vg": "ovirt-local",
        "vm": f"{number}111f97c-9336-4e7a-a8a9-b4f052ababf1",
        "vm_name": "",
        "disk": "",
        "image": "",
        "volume": f"{number}b845a9c-e065-4a01-8d50-0838a877ec55",
        "size": 20 * GIB,
        "backend": "lvm",
        "state": "ready",
        "open": False,
        "used": None,
        "stopped": None,
        "copy": None,
        "next": Next("keep", None, "VM starts"),
    }
    return Row(**{**usual, **fields})  # type: ignore[arg-type]


ROWS = (
    row(4, state="stopped", stopped=NOW - 260_000, next=Next("remove", 5, "gc removes in 4 d 2 h")),
    row(1, vm_name="web1", disk="vda", state="running", next=Next("remove", None, "removed when VM stops")),
    row(
        1,
        vm_name="web1",
        disk="vdb",
        volume="77b845a9-e065-4a01-8d50-0838a877ec55",
        state="running",
        backend="lvmthin",
        used=3 * GIB,
        size=100 * GIB,
        next=Next("remove", None, "removed when VM stops"),
    ),
    row(
        2, vm_name="db-" + "x" * 40, state="copying", copy=COPY, next=Next("copy", 3, "310 MiB/s 00:41 left")
    ),
    row(6, vm="", state="deleting", next=Next("remove", 5, "gc erases it next")),
)


SNAPSHOT = Snapshot(NOW, (GROUP,), ROWS, (), (PROBLEM,), ("which VMs run: nobody says",))
