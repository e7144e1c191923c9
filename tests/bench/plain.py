"""Plain tools that stand for the hook that vdsm ships, step by step: that hook itself is not ours to ship.

It is a Python program that imports these standard modules (and vdsm's own, which are left out here), and
runs, each through sudo and a second such program, the LVM commands that are run here.
"""

from __future__ import annotations

import subprocess

from tests.bed import host
from tests.bed.shell import run
from tests.bed.storage import Image
from tests.bench.measure import BARE, timed

_OF_HOOK = (
    "collections, configparser, contextlib, copy, ctypes, errno, functools, glob, hashlib, io, itertools,"
    "json, logging, pickle, pkgutil, queue, re, select, shutil, socket, subprocess, tempfile, textwrap,"
    "threading, time, traceback, xml.dom.minidom"
)
_OF_HELPER = (
    "argparse, collections, configparser, contextlib, copy, ctypes, errno, glob, io, itertools, logging,"
    "queue, re, select, shutil, subprocess, textwrap, threading, time, traceback"
)
_RUN = (
    "import sys; sys.exit(subprocess.run(['/usr/sbin/lvm', *sys.argv[1:]], capture_output=True).returncode)"
)
_FILTER = 'devices { filter=["a|.*|"] }'
NAME = "plain"
PLACE = f"{host.VOLUME_GROUP}/{NAME}"


def hook() -> None:
    """Starts, imports what it needs, ends."""
    timed((BARE[0], "-c", f"import {_OF_HOOK}"))


def lvm(command: str, *words: str) -> None:
    argv = ["sudo", "-n", BARE[0], "-c", f"import {_OF_HELPER}\n{_RUN}", command, "--config", _FILTER, *words]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)


def listed() -> None:
    lvm("lvs", "-o", "name,attr,tags,size", "--units", "b", "--reportformat", "json", host.VOLUME_GROUP)


def kept() -> None:
    """A start that finds its disk."""
    hook()
    listed()
    lvm("lvchange", "--activate", "y", PLACE)


def first(backend: str, image: Image) -> None:
    """A start that copies."""
    hook()
    listed()
    run("qemu-img", "info", "--output", "json", str(image.leaf.path))
    tags = [word for tag in ("UPDATING", "VM_1", "IU_1", "PU_1") for word in ("--addtag", tag)]
    lvm("lvcreate", "-y", "-Wn", "-n", NAME, *tags, *kind(backend, image), host.VOLUME_GROUP)
    convert(backend, image)
    lvm("lvchange", "--deltag", "UPDATING", PLACE)


def kind(backend: str, image: Image) -> list[str]:
    """How lvcreate makes a disk."""
    size = f"{image.leaf.size}b"
    return ["-L", size] if backend == "lvm" else ["-V", size, "--thinpool", host.THIN_POOL]


def convert(backend: str, image: Image) -> None:
    """As that hook copies: a thin disk twice, through a sparse file."""
    if backend == "lvm":
        copy(image, f"/dev/{PLACE}")
        return
    file = host.SCRATCH / "plain.raw"
    copy(image, str(file))
    options = ["bs=1M", "iflag=direct", "oflag=direct", "conv=sparse", "status=none"]
    run("dd", f"if={file}", f"of=/dev/{PLACE}", *options)
    file.unlink()


def copy(image: Image, target: str) -> None:
    """The chain by qemu-img alone."""
    options = ["-t", "none", "-T", "none", "-f", "qcow2", "-O", "raw"]
    run("qemu-img", "convert", *options, str(image.leaf.path), target)
