"""Runs a command, and meanwhile waits (wait(2)) for every process that loses its parent.

    python3 reaper.py COMMAND [ARGUMENT...]

This is the work of a machine's first process, which virtme-ng's first process does not do while a command
runs. libvirt waits 80 s for a qemu that has ended and is still a zombie. Exit status: the command's; 128 and
the signal's number if a signal ended it.
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
