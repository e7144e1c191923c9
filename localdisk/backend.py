"""How local disks are allocated: the values of `backend` in the configuration, the property and `--json`."""

from __future__ import annotations

import enum


class Backend(str, enum.Enum):
    """A backend; its value is its name everywhere else."""

    THICK = "lvm"  # preallocated logical volumes
    THIN = "lvmthin"  # thin volumes in a thin pool

    __str__ = str.__str__


BACKENDS = tuple(each.value for each in Backend)
