"""From the zipapp to the program: finds the extracted packages, and makes sure that nobody has changed them.

The zipapp has this file beside `__main__.py` (main.py); standard library only.  It replaces shiv's own
bootstrap, which obeys the environment, trusts any files that it finds, and does not sync the files that it
extracts.  A *tree* is the directory to which one build extracts its packages for one version of Python:

    /var/cache/localdisk/<build id>-cpython-311/files             lines of SIZE PATH, one for each file
                                               /site-packages/…   the packages that are imported
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` wraps it in enumerations, which are slow to import
import fcntl
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

TREES = "/var/cache/localdisk"
BESIDE = ".extracted"  # if TREES is mounted noexec, packages are in a directory named PROGRAM.extracted
BUILD_ID = "@BUILD_ID@"  # build.sh writes a hash of the zipapp's whole content here
FILES, PACKAGES = "files", "site-packages"

_refused = 2
_in_use: list[int] = []  # descriptors; their shared locks mark trees as in use


def main(called_by_vdsm: bool, refused: int = 2) -> None:
    """Run the program from its extracted packages; extract them first if necessary.

    `refused` is the exit code if the program cannot run (main.py).
    """
    global _refused
    _refused = refused
    clean(os.environ)
    os.umask(0o022)
    # If SIGCHLD is inherited as ignored, every command that fails seems to have succeeded.
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    user = os.geteuid()
    if user == 0:
        require_trusted(program())
    trees = trees_of_root()
    packages = ready(trees, 0)
    if not packages and user != 0 and called_by_vdsm:
        have_root_unpack()
        packages = ready(trees, 0)
    if not packages:
        packages = unpacked(trees if user == 0 else own_trees(), user)
    sys.path.insert(0, packages)
    from localdisk.cli import main as run

    sys.exit(run())


def trees_of_root() -> str:
    """Where root extracts packages for everybody: TREES, or beside the program if TREES is mounted noexec.

    The kernel maps no compiled module from a noexec mount.  The program runs, so its own mount is not noexec.
    """
    return f"{program()}{BESIDE}" if is_noexec(TREES) else TREES


def is_noexec(path: str) -> bool:
    """Whether `path`, or the directory in which it will be made, is mounted noexec."""
    try:
        return bool(os.statvfs(path).f_flag & os.ST_NOEXEC)
    except FileNotFoundError:
        return path != "/" and is_noexec(os.path.dirname(path))
    except OSError:
        return False


def mount_of(path: str) -> str:
    """The mount point of `path`, which need not exist yet."""
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def clean(environ: os._Environ[str]) -> None:
    """Remove variables that would make shiv or Python run other code, here or in processes that we start.

    vdsm puts custom properties of any name into our environment.
    """
    for name in list(environ):
        if name.startswith(("SHIV_", "PYTHON")):
            del environ[name]


def ready(trees: str, user: int) -> str:
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


def tree_name() -> str:
    return f"{BUILD_ID[:32]}-{sys.implementation.cache_tag}"


def _holds(fd: int) -> bool:
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


def _is_whole(tree: str, fd: int) -> bool:
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


def have_root_unpack() -> None:
    """Start the helper with nothing to do: vdsm may run it, and it extracts the packages as root."""
    null = os.open(os.devnull, os.O_RDWR)
    streams = [(os.POSIX_SPAWN_DUP2, null, number) for number in (0, 1, 2)]
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    try:
        child = os.posix_spawn(
            "/usr/bin/sudo", ["sudo", "-n", program(), "helper"], environ, file_actions=streams
        )
        os.waitpid(child, 0)
    except OSError:
        pass  # the caller checks next whether the packages are there
    os.close(null)


def unpacked(trees: str, user: int) -> str:
    """The packages of this build's tree under `trees`; makes the tree if it is missing or damaged."""
    try:
        import extract  # type: ignore[import-not-found]
    except Exception:  # noqa: BLE001 (an update of the file can show as any exception)
        replaced()

    if is_noexec(trees):
        what = f"{trees} is on a file system that is mounted noexec, no compiled module is loaded from there"
        refuse(what, f"mount -o remount,exec {mount_of(trees)}")
    try:
        os.makedirs(trees, mode=0o755, exist_ok=True)
        require_alone(trees, user)
        with extract.alone(trees):  # if many processes start at once, one of them extracts
            if not ready(trees, user):
                extract.unpack(program(), trees, tree_name(), BUILD_ID)
        packages = ready(trees, user)
    except extract.Replaced:
        replaced()
    except OSError as error:
        fix = f"make room in {TREES} (df -h {TREES}), then run {program()} --version once as root"
        if is_noexec(TREES):
            fix = f"mount -o remount,exec {mount_of(TREES)}"
        refuse(f"cannot extract to {trees}, {error.strerror}", fix)
    if not packages:
        refuse(f"what was extracted to {trees} is damaged", f"look for a failing disk, rm -r {trees}")
    return packages


def replaced() -> NoReturn:
    """A newer file replaced this one while it started."""
    refuse(f"{program()} was replaced while it started", "try again")


def own_trees() -> str:
    """An ordinary user's own cache."""
    import pwd

    return os.path.join(pwd.getpwuid(os.geteuid()).pw_dir, ".cache", "localdisk")


def require_trusted(path: str) -> None:
    """Refuse a file that anyone but root could have written: the file, and each directory above it."""
    parent = path
    while True:
        status = os.lstat(parent)
        # In a sticky directory nobody but root can remove root's files.
        sticky = parent != path and status.st_mode & 0o1000
        if status.st_uid != 0 or (status.st_mode & 0o022 and not sticky):
            fix = f"install -m 0755 {path} /usr/local/libexec/localdisk, and run that"
            refuse(f"{parent} could be written by others than root, who will not run {path}", fix)
        if parent == "/":
            return
        parent = os.path.dirname(parent)


def require_alone(path: str, user: int) -> None:
    if not is_alone(path, user):
        refuse(f"{path} could be written by others", f"rm -r {path}")


def is_alone(path: str, user: int) -> bool:
    """Whether `path` is a directory that nobody but `user` (and root) can write."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    is_directory = status.st_mode & 0o170000 == 0o040000
    return is_directory and status.st_uid == user and not status.st_mode & 0o022


def refuse(what: str, fix: str) -> NoReturn:
    """End with one line and the exit code of a refusal, as cli.py would."""
    print(f"localdisk: {what} : {fix}", file=sys.stderr)
    sys.exit(_refused)


def program() -> str:
    """The path of the zipapp itself, even if it was called through a link."""
    return os.path.realpath(sys.argv[0])
