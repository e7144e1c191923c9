"""Installs Debian packages, and unpacks packages of another release without a change of the machine's apt.

install("lvm2", "sudo")                     installs those that are not installed yet
missing(TOOLS)                              the packages of tools that this machine does not have
fetch(PINS, Path(".bed/uml"))               unpacks files of packages from Debian's other suites
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bed.shell import SBIN

KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
KEYS_PACKAGE = "debian-archive-keyring"


class NoPackage(Exception):
    """A package cannot be had; the message names it, with apt's reason."""


@dataclass(frozen=True)
class Pin:
    """One version of a package of Debian, in `suite`; `sha256` is of its file."""

    suite: str
    package: str
    version: str
    sha256: str


def install(*packages: str) -> None:
    """Install `packages` of the machine's own release, as root.  Raises NoPackage."""
    wanted = [package for package in packages if not is_installed(package)]
    if not wanted:
        return
    if os.geteuid() != 0:
        raise NoPackage(f"not root, and these packages are missing: {' '.join(wanted)}")
    print(f"installing: {' '.join(wanted)}", file=sys.stderr)
    apt("update", "-qq")
    apt("install", "-y", "-qq", "--no-install-recommends", *wanted)


def is_installed(package: str) -> bool:
    query = ["dpkg-query", "-W", "-f", "${Status}", package]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.endswith("ok installed")


def is_known(package: str) -> bool:
    """True if this machine's release has the package."""
    done = subprocess.run(["apt-cache", "show", package], capture_output=True, check=False)
    return done.returncode == 0


def apt(*arguments: str, cwd: Path | None = None) -> str:
    """The standard output of apt-get; what it complains about is in the NoPackage that it raises."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C", "PATH": SBIN}
    done = subprocess.run(
        ["apt-get", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        raise NoPackage("; ".join(complaints) or f"apt-get {arguments[0]} failed: {done.stderr[-300:]}")
    return done.stdout


# -- another release's


def fetch(pins: Sequence[Pin], target: Path) -> list[str]:
    """Unpack the files of these packages into `target`; what was taken, as `package version`.

    The machine's own sources, lists and preferences are neither read nor changed: apt gets a state of its
    own, in a temporary directory.  Where the archive does not have a pinned version any more, the suite's
    present one is taken, which apt has verified by the archive's signature.  Raises NoPackage.
    """
    install(KEYS_PACKAGE)
    with tempfile.TemporaryDirectory() as directory:
        state = AptState(Path(directory), sorted({pin.suite for pin in pins}))
        taken = []
        for pin in pins:
            file, version = state.download(pin)
            subprocess.run(["dpkg", "-x", file, target], check=True)
            taken.append(f"{pin.package} {version}")
    return taken


def present(pins: Sequence[Pin]) -> list[Pin]:
    """Pins of the versions that the suites have today.  Raises NoPackage."""
    install(KEYS_PACKAGE)
    with tempfile.TemporaryDirectory() as directory:
        state = AptState(Path(directory), sorted({pin.suite for pin in pins}))
        files = [state.newest(pin) for pin in pins]
        return [Pin(pin.suite, pin.package, version_of(file), sha256(file)) for pin, file in zip(pins, files)]


def mirror() -> str:
    """Where this machine gets Debian from: DEBIAN_MIRROR, or what its apt uses.  Raises NoPackage."""
    if named := os.environ.get("DEBIAN_MIRROR"):
        return named
    for _ in range(2):
        shown = apt("indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)")
        rows = (line.split("|") for line in shown.splitlines())
        uris = [row[2] for row in rows if row[:2] == ["Debian", "Debian"]]
        if uris:
            return uris[0]
        apt("update", "-qq")
    raise NoPackage("no mirror of Debian is known: set DEBIAN_MIRROR to the address of one")


class AptState:
    """apt's sources, lists and cache in `directory`, of Debian's `suites` alone."""

    def __init__(self, directory: Path, suites: Sequence[str]) -> None:
        self._directory = directory
        for folder in ("lists/partial", "cache/archives/partial", "empty"):
            (directory / folder).mkdir(parents=True)
        (directory / "status").touch()
        archive = mirror()
        lines = [f"deb [signed-by={KEYS}] {archive} {suite} main\n" for suite in suites]
        (directory / "sources.list").write_text("".join(lines))
        self._options = [
            *("-o", f"Dir::State::Lists={directory}/lists", "-o", f"Dir::State::Status={directory}/status"),
            *("-o", f"Dir::Cache={directory}/cache", "-o", f"Dir::Etc::SourceList={directory}/sources.list"),
            *("-o", f"Dir::Etc::SourceParts={directory}/empty", "-o", "APT::Architecture=amd64"),
            *("-o", "Dir::Etc::Preferences=/dev/null", "-o", f"Dir::Etc::PreferencesParts={directory}/empty"),
            *("-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none"),
            # A mirror may be behind by more than sid's week; the signature and the pinned digest remain.
            *("-o", "Acquire::Check-Valid-Until=false"),
        ]
        apt(*self._options, "update", "-qq")

    def download(self, pin: Pin) -> tuple[Path, str]:
        """The file of the pinned version, else of the suite's present one, and its version."""
        try:
            file = self._download(f"{pin.package}={pin.version}")
        except NoPackage:
            file = self.newest(pin)
            version = version_of(file)
            gone = f"{pin.package} {pin.version} is no longer in {pin.suite}"
            print(f"boot: {gone}: taking {version} (./build.sh pins)", file=sys.stderr)
            return file, version
        if sha256(file) != pin.sha256:
            raise NoPackage(f"{file.name} is not the file that is pinned by its SHA-256")
        return file, pin.version

    def newest(self, pin: Pin) -> Path:
        """The file of the version that the suite has today."""
        return self._download(f"{pin.package}/{pin.suite}")

    def _download(self, what: str) -> Path:
        with tempfile.TemporaryDirectory(dir=self._directory) as folder:
            apt(*self._options, "download", "-qq", what, cwd=Path(folder))
            file = next(Path(folder).iterdir())
            return file.rename(self._directory / file.name)


def version_of(file: Path) -> str:
    return subprocess.check_output(["dpkg-deb", "-f", file, "Version"], text=True).strip()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
