"""Runs a command and adopts and buries every process that loses its parent meanwhile.

    python3 reaper.py COMMAND [ARGUMENT...]

That is the work of a machine's first process, and the one of virtme-ng's guests does not do it while a
command runs.  libvirt waits 80 s for every qemu that has ended but was not buried.
Exit status: that of the command, 128 + the signal's number if one ended it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


def main(command: list[str]) -> int:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    process = subprocess.Popen(command)
    while True:
        pid, status = os.wait()
        if pid == process.pid:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
