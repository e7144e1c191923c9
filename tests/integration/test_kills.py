"""Killed at any moment on real LVM: the next start succeeds, and nothing is left behind.

The moments between a hook's steps are found by a script in the place of `lvm`, which stops before or after
a chosen command until it is told to go on; localdisk itself knows nothing of it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bed import host, libvirt
from tests.bed.player import Call, Result, run_point, start_point
from tests.bed.shell import run
from tests.bed.storage import FileStorage, Image, fill, new_id
from tests.bed.vm import Disk, Vm, disk_json, domain_xml
from tests.integration.steps import (
    LOCKS,
    MIB,
    THICK,
    THIN,
    configure,
    copied,
    copiers,
    equals_source,
    helpers,
    localdisk,
    processes,
    start,
    starting,
    stop,
    wait_for,
)

LVM = Path("/usr/sbin/lvm")
REAL = Path("/run/bed-lvm")  # lvm itself, while the script is in its place
HERE = Path("/run/bed-lvm-here")
SLOW = "copy: {parallel: 1, bandwidth: 1MiB}\n"
STOPPER = f"""\
#!/bin/bash
name=${{0##*/}}
[ "$name" != lvm ] || name=$1
halt() {{
    if [ -e "/run/bed-lvm-$1-$name" ]; then
        rm "/run/bed-lvm-$1-$name"
        touch {HERE}
        while [ -e {HERE} ]; do sleep 0.1; done
    fi
}}
trap '' TERM
halt before
(trap - TERM; exec -a "$0" {REAL} "$@")
code=$?
halt after
exit $code
"""


@pytest.fixture(scope="module", autouse=True)
def stopper() -> Iterator[None]:
    """The script in the place of lvm."""
    run("cp", str(LVM), str(REAL))
    script = Path("/run/bed-lvm-stopper")
    script.write_text(STOPPER)
    script.chmod(0o755)
    run("mount", "--bind", str(script), str(LVM))
    yield
    run("umount", str(LVM))


@pytest.fixture(autouse=True)
def defaults(libvirt: None) -> Iterator[None]:
    configure()
    yield
    configure()


@pytest.fixture
def image(file_storage: FileStorage) -> Image:
    """Enough data that a slow copy of it takes most of a minute: zeros are not limited."""
    template = file_storage.template(48 * MIB, seed=1)
    fill(template.leaf, 48 * MIB)
    return file_storage.clone(template, seed=2)


def stop_at(moment: str, command: str) -> None:
    Path(f"/run/bed-lvm-{moment}-{command}").touch()


def go_on() -> None:
    HERE.unlink()


def begin(image: Image, vm_id: str, backend: str = "lvm") -> Call:
    starting(vm_id)
    return start_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), {"localdisk": backend})


@contextmanager
def waited_for(call: Call) -> Iterator[list[Result]]:
    """The call's end, which is waited for in the background."""
    results: list[Result] = []
    waiter = threading.Thread(target=lambda: results.append(call.wait()))
    waiter.start()
    yield results
    waiter.join(300)
    assert results, "the hook did not end"


def kill(call: Call, how: str) -> None:
    assert call.process
    if how == "group TERM":
        call.kill(signal.SIGTERM)
        for pid in helpers():  # systemd sends it to all of the control group
            os.kill(pid, signal.SIGTERM)
    elif how == "hook KILL":
        os.kill(call.process.pid, signal.SIGKILL)
    elif how == "helper KILL":
        for pid in helpers():
            os.kill(pid, signal.SIGKILL)
    elif how == "all KILL":
        for pid in helpers():
            os.kill(pid, signal.SIGKILL)
        call.kill(signal.SIGKILL)
    elif how == "copier KILL":
        for pid in copiers():
            os.kill(pid, signal.SIGKILL)


def nobody_is_left() -> bool:
    words = [words for _, words in processes()]
    ours = any("/50_localdisk" in " ".join(w[:3]) or w[-1:] == ["helper"] for w in words)
    return not (ours or copiers())


def comes_back(image: Image, vm_id: str, custom: dict[str, str]) -> None:
    """The next start succeeds with the right bytes; after the stop nothing is there, also for gc."""
    configure()
    start(image, custom, vm_id)
    assert equals_source(image)
    stop(vm_id, image, custom=custom)
    localdisk("gc")
    assert set(host.logical_volumes()) <= {host.THIN_POOL}
    assert not list(LOCKS.glob("*"))
    assert "Suspended" not in run("dmsetup", "info", "-c", "--noheadings", "-o", "name,suspended")


@pytest.mark.parametrize("how", ["group TERM", "hook KILL", "helper KILL", "all KILL", "copier KILL"])
def test_killed_while_copying(volume_group: str, image: Image, how: str) -> None:
    configure(SLOW)
    vm_id = new_id()
    call = begin(image, vm_id)
    with waited_for(call) as results:
        wait_for(lambda: copied(image), "the copy")
        kill(call, how)
    assert results[0].refused
    wait_for(nobody_is_left, "all processes to end")
    libvirt.undefine(vm_id)
    if "helper" not in how and "all" not in how:
        assert host.logical_volumes() == {}, "what is unfinished goes at once"
    comes_back(image, vm_id, THICK)


@pytest.mark.parametrize(
    ("moment", "command", "how"),
    [
        ("before", "lvcreate", "hook KILL"),
        ("after", "lvcreate", "group TERM"),
        ("after", "lvcreate", "helper KILL"),
        ("before", "lvchange", "group TERM"),
        ("before", "lvchange", "all KILL"),
        ("after", "lvchange", "hook KILL"),
    ],
)
def test_killed_between_steps_of_a_start(
    volume_group: str, image: Image, moment: str, command: str, how: str
) -> None:
    vm_id = new_id()
    stop_at(moment, command)
    call = begin(image, vm_id)
    with waited_for(call):
        wait_for(HERE.exists, f"{command}")
        kill(call, how)
        go_on()
    wait_for(nobody_is_left, "all processes to end")
    libvirt.undefine(vm_id)
    comes_back(image, vm_id, THICK)


def test_killed_thin_start(thin_pool: str, image: Image) -> None:
    vm_id = new_id()
    stop_at("before", "lvchange")
    call = begin(image, vm_id, "lvmthin")
    with waited_for(call):
        wait_for(HERE.exists, "lvchange")
        kill(call, "all KILL")
        go_on()
    wait_for(nobody_is_left, "all processes to end")
    libvirt.undefine(vm_id)
    comes_back(image, vm_id, THIN)


@pytest.mark.parametrize(("moment", "how"), [("before", "all KILL"), ("after", "hook KILL")])
def test_killed_stop(volume_group: str, image: Image, moment: str, how: str) -> None:
    vm_id = start(image)
    stop_at(moment, "lvremove")
    xml = domain_xml(Vm(vm_id, (Disk("vda", image),)))
    call = start_point("after_vm_destroy", vm_id, xml, THICK)
    with waited_for(call):
        wait_for(HERE.exists, "lvremove")
        kill(call, how)
        go_on()
    wait_for(nobody_is_left, "all processes to end")
    comes_back(image, vm_id, THICK)


def test_killed_while_waiting_for_a_turn(volume_group: str, image: Image, file_storage: FileStorage) -> None:
    """The one that waits is killed, the one that copies goes on; then the one that copies is killed."""
    configure(SLOW)
    other = file_storage.template(16 * MIB, seed=3)
    first, second = new_id(), new_id()
    copying = begin(image, first)
    with waited_for(copying) as results:
        wait_for(lambda: copied(image), "the copy")
        waiting = begin(other, second)
        with waited_for(waiting) as ended:
            wait_for(lambda: len(list(LOCKS.glob("*.turn"))) == 2, "the second ticket")
            kill_hook = waiting.process
            assert kill_hook
            os.kill(kill_hook.pid, signal.SIGKILL)
        assert ended[0].refused
    assert results[0].rc == 0, results[0].stderr
    for vm_id in (first, second):
        libvirt.undefine(vm_id)
    assert set(host.logical_volumes()) == {image.leaf.id}
    stop(first, image)
    comes_back(other, second, THICK)


def test_leftover_of_a_killed_start_is_gcs(volume_group: str, image: Image) -> None:
    """Nobody starts the VM again: gc removes the unfinished copy, and not while somebody works on it."""
    configure(SLOW)
    vm_id = new_id()
    call = begin(image, vm_id)
    with waited_for(call):
        wait_for(lambda: copied(image), "the copy")
        assert "kept:" in localdisk("gc")
        kill(call, "all KILL")
    wait_for(nobody_is_left, "all processes to end")
    libvirt.undefine(vm_id)
    assert "unfinished copy that nobody works on" in localdisk("gc")
    assert host.logical_volumes() == {}
    assert not list(LOCKS.glob("*"))
    assert run_point("before_vdsm_start").rc == 0
