"""Which options of our sudo rule this host's sudo knows; `files.sudoers` has the text of the rule."""

from __future__ import annotations

from collections.abc import Sequence

from localdisk import run
from localdisk.errors import CommandFailed
from localdisk.host import files


def known_options() -> tuple[str, ...]:
    """Those of files.NEWER_SUDO_OPTIONS that visudo accepts.  Raises CommandMissing, CommandTimeout.

    The version of sudo does not decide it: EL's sudo 1.8.29 and 1.9.5 have features of later versions, and
    sudo can be built without a feature.  With an unknown option, visudo refuses the file, and sudo prints a
    warning at each run.
    """
    every = files.NEWER_SUDO_OPTIONS
    return every if _accepts(every) else tuple(option for option in every if _accepts([option]))


def _accepts(options: Sequence[str]) -> bool:
    try:
        run.run(["visudo", "-cf", "-"], text=files.sudoers(files.PROGRAM, options))
    except CommandFailed:
        return False
    return True
