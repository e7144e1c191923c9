"""Which options of our sudo rule this host's sudo knows; `places.sudoers` has the text."""

from __future__ import annotations

from collections.abc import Sequence

from localdisk import run
from localdisk.errors import CommandFailed
from localdisk.host import files


def known_options() -> tuple[str, ...]:
    """Those of places.NEWER_SUDO_OPTIONS that visudo accepts.  Raises CommandMissing, CommandTimeout.

    visudo is asked, not the version: EL's sudo 1.8.29 and 1.9.5 have features of later versions, and a sudo
    can be built without a feature.  An option that sudo does not know makes visudo refuse the file, and sudo
    print a warning at each run.
    """
    every = files.NEWER_SUDO_OPTIONS
    return every if _accepts(every) else tuple(option for option in every if _accepts([option]))


def _accepts(options: Sequence[str]) -> bool:
    try:
        run.run(["visudo", "-cf", "-"], text=files.sudoers(files.PROGRAM, options))
    except CommandFailed:
        return False
    return True
