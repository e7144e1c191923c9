"""From the zipapp to the program: finds the extracted packages, if nobody but root can have changed them.

The zipapp has this file beside `__main__.py` (main.py).  It replaces shiv's own bootstrap, which obeys the
environment, trusts any files that it finds, and does not sync the files that it extracts.  A *tree* is the
directory to which one build extracts its packages for one version of Python:

    /var/cache/localdisk/<build id>-cpython-311/files             lines of SIZE PATH, one for each file
                                               /site-packages/…   the packages that are imported

Python compiles this file in every run, too: what only the first run of a build needs is in first_run.py.
Python 3.6 must be able to read it.
"""

import _signal  # type: ignore[import-not-found]  # `signal` wraps it in enumerations, which are slow to import
import fcntl
import gc
import os
import sys
import time

TREES = "/var/cache/localdisk"
BESIDE = ".extracted"  # if TREES is mounted noexec, packages are in a directory named PROGRAM.extracted
BUILD_ID = "@BUILD_ID@"  # build.sh writes a hash of the zipapp's whole content here
FILES, PACKAGES = "files", "site-packages"
GARBAGE = 20000  # objects after which Python looks for garbage (700 by default); importing makes 12,000

_in_use = []  # type: list[int]  # descriptors; their shared locks mark trees as in use


def packages():  # type: () -> str
    """The extracted packages of this build; "" if first_run.py must extract them, or refuse to run."""
    clean(os.environ)
    os.umask(0o022)
    # If SIGCHLD is inherited as ignored, every command that fails seems to have succeeded.
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    if os.geteuid() == 0 and untrusted(program()):
        return ""
    return ready(trees_of_root(), 0)


def run(found):  # type: (str) -> None
    """Run the program from these packages; ends the process with its exit code."""
    # Nothing is imported from the zipapp any more: Python need not look there first, for each module.
    sys.path[:1] = []
    sys.path.append(found)
    gc.set_threshold(GARBAGE)
    from localdisk.cli import main

    code = main()
    # Python would free each object before the kernel frees them all: an eighth of the time of a hook.  All
    # is written: main flushes standard output, and standard error is written line by line.
    os._exit(code)


def clean(environ):  # type: (os._Environ[str]) -> None
    """Remove variables that would make shiv or Python run other code, here or in processes that we start.

    vdsm puts custom properties of any name into our environment.
    """
    for name in list(environ):
        if name.startswith(("SHIV_", "PYTHON")):
            del environ[name]


def trees_of_root():  # type: () -> str
    """Where root extracts packages for everybody: TREES, or beside the program if TREES is mounted noexec.

    The kernel maps no compiled module from a noexec mount.  The program runs, so its own mount is not noexec.
    """
    return f"{program()}{BESIDE}" if is_noexec(TREES) else TREES


def is_noexec(path):  # type: (str) -> bool
    """Whether `path`, or the directory in which it will be made, is mounted noexec."""
    try:
        return bool(os.statvfs(path).f_flag & os.ST_NOEXEC)
    except FileNotFoundError:
        return path != "/" and is_noexec(os.path.dirname(path))
    except OSError:
        return False


def ready(trees, user):  # type: (str, int) -> str
    """The packages of this build's tree under `trees`; "" if it is missing, damaged or not `user`'s alone.

    If the packages are returned, their tree is in use until this process ends.
    """
    tree = os.path.join(trees, tree_name())
    if not (is_alone(trees, user) and is_alone(tree, user)):
        return ""
    try:
        fd = os.open(os.path.join(tree, FILES), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    if not (_holds(fd) and _is_whole(tree, fd)):
        os.close(fd)
        return ""
    _in_use.append(fd)
    return os.path.join(tree, PACKAGES)


def tree_name():  # type: () -> str
    return f"{BUILD_ID[:32]}-{sys.implementation.cache_tag}"


def _holds(fd):  # type: (int) -> bool
    """Take the lock that keeps the tree from removal; False if the tree was removed just now.

    A process that removes the tree locks the file for a moment, and removes it.  Everybody can read the file
    and so lock it: a lock that somebody holds for longer must not stop us, so we wait for 0.4 seconds only.
    """
    for _ in range(20):
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            break
        except OSError:
            time.sleep(0.02)
    return os.fstat(fd).st_nlink > 0


def _is_whole(tree, fd):  # type: (str, int) -> bool
    """Whether each file has its size; False if a failing disk has cut a file or somebody has removed it."""
    lines = os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace").splitlines()
    try:
        for line in lines:
            size, _, path = line.partition(" ")
            if os.stat(os.path.join(tree, path)).st_size != int(size):
                return False
    except (OSError, ValueError):
        return False
    return bool(lines)


def untrusted(path):  # type: (str) -> str
    """The file, or the directory above it, that others than root could have written; "" if none."""
    parent = path
    while True:
        status = os.lstat(parent)
        # In a sticky directory nobody but root can remove root's files.
        sticky = parent != path and status.st_mode & 0o1000
        if status.st_uid != 0 or (status.st_mode & 0o022 and not sticky):
            return parent
        if parent == "/":
            return ""
        parent = os.path.dirname(parent)


def is_alone(path, user):  # type: (str, int) -> bool
    """Whether `path` is a directory that nobody but `user` (and root) can write."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    is_directory = status.st_mode & 0o170000 == 0o040000
    return is_directory and status.st_uid == user and not status.st_mode & 0o022


def program():  # type: () -> str
    """The path of the zipapp itself, even if it was called through a link."""
    return os.path.realpath(sys.argv[0])
