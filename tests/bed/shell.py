"""Runs commands for the bed: argument lists, no standard input unless given, failures with all output."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess

SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class CommandFailed(AssertionError):
    """A command of the bed did not exit with 0; the message has its whole output."""


def run(*argv: str, text: str = "", cwd: str | None = None, user: str = "root") -> str:
    """The standard output of `argv`, which gets `text` as its standard input.

    It runs as `user` with all of that user's groups.  Raises CommandFailed when it does not exit with 0.
    """
    done = attempt(*argv, text=text, cwd=cwd, user=user)
    if done.returncode:
        ended = how_it_ended(done.returncode)
        raise CommandFailed(f"{' '.join(argv)}: {ended}\n{done.stdout}{done.stderr}")
    return done.stdout


def attempt(
    *argv: str, text: str = "", cwd: str | None = None, user: str = "root"
) -> subprocess.CompletedProcess[str]:
    """Like `run`, but any exit code is an answer."""
    return subprocess.run(
        [*as_user(user), *argv], input=text, cwd=cwd, capture_output=True, text=True, check=False
    )


def as_user(name: str) -> tuple[str, ...]:
    """What is put before a command so that it runs as this user, with all of that user's groups.

    The same process becomes the command.  subprocess could do this, too, but would have to fork all of the
    calling Python for it, which takes longer than most commands in User Mode Linux.
    """
    who = pwd.getpwnam(name)
    if who.pw_uid == os.geteuid():
        return ()
    groups = ",".join(map(str, os.getgrouplist(name, who.pw_gid)))
    return ("/usr/bin/setpriv", f"--reuid={who.pw_uid}", f"--regid={who.pw_gid}", f"--groups={groups}", "--")


def how_it_ended(returncode: int) -> str:
    """A return code in words: `exit code 3`, or `killed by SIGILL` for -4, and for 132 as of a shell."""
    number = -returncode if returncode < 0 else returncode - 128
    try:
        return f"killed by {signal.Signals(number).name}"
    except ValueError:  # an ordinary exit code; or a real-time signal, which has no name
        return f"exit code {returncode}" if returncode >= 0 else f"killed by signal {number}"
