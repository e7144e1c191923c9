"""A trial of a start, as user vdsm and without a VM; `check` runs it.

It asks libvirt about a VM that does not exist.  Through sudo, the helper makes a tiny volume as it makes a
local disk (`helper/trial.py`).  The trial opens the volume, writes to it and reads it back; the helper
removes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from localdisk import libvirt
from localdisk.errors import CommandMissing, Error, HelperUnavailable
from localdisk.hook import copy
from localdisk.hook.client import Helper
from localdisk.ids import NOBODY


def rehearse(starts: Iterable[str]) -> str:
    """Try these starts, each `VM=PROPERTY`: a VM's id, and the value of its custom property.

    Returns one JSON object, `{"sudo": "…", "libvirt": "…", "disks": ["…", …]}`: error messages, "" if there
    is none.
    """
    found = {"sudo": "", "libvirt": _libvirt()}
    disks: dict[str, None] = {}
    for start in starts:
        vm_id, _, value = start.partition("=")
        try:
            _disk(vm_id, value)
        except (HelperUnavailable, CommandMissing) as error:
            found["sudo"] = str(error)
            break
        except Error as error:
            disks[str(error)] = None
    return json.dumps({**found, "disks": list(disks)})


def _libvirt() -> str:
    try:
        libvirt.state(NOBODY)
    except Error as error:
        return str(error)
    return ""


def _disk(vm_id: str, value: str) -> None:
    with Helper(vm_id, value) as helper:
        device = helper.rehearse()
        if device:
            copy.rehearse(device)
            helper.rehearsed()
