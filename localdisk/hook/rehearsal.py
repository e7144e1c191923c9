"""What a start does before it copies anything, done as user vdsm and without a VM; `check` runs it.

It changes nothing: libvirt is asked about a VM that nobody has, and the helper, through sudo, about the disks
of that VM.
"""

from __future__ import annotations

import json

from localdisk import libvirt
from localdisk.errors import CommandMissing, Error, HelperUnavailable
from localdisk.hook.client import Helper

NOBODY = "00000000-0000-0000-0000-000000000000"  # no VM, image or volume has it


def rehearse() -> str:
    """One JSON object, `{"sudo": …, "helper": …, "libvirt": …}`: an error's message, "" if there is none."""
    found = {"sudo": "", "helper": "", "libvirt": ""}
    try:
        libvirt.state(NOBODY)
    except Error as error:
        found["libvirt"] = str(error)
    try:
        with Helper(NOBODY, "on") as helper:
            helper.look([])
    except (HelperUnavailable, CommandMissing) as error:
        found["sudo"] = str(error)
    except Error as error:
        found["helper"] = str(error)
    return json.dumps(found)
