"""Killed while copying or waiting: the next start succeeds, and nothing is left behind.

The crash matrix (tests/crash) has the cases that are killed at a certain command.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest

from tests.bed import host, libvirt
from tests.bed.player import Call, run_point
from tests.bed.storage import FileStorage, Image, fill, new_id
from tests.kernel.steps import (
    LOCKS,
    MIB,
    THICK,
    begin,
    comes_back,
    configure,
    copied,
    copiers,
    helpers,
    kill_all,
    localdisk,
    nobody_is_left,
    stop,
    wait_for,
    waited_for,
)

pytestmark = pytest.mark.usefixtures("defaults")

SLOW = "copy: {parallel: 1, bandwidth: 1MiB}\n"


@pytest.fixture
def image(file_storage: FileStorage) -> Image:
    """Enough data that a slow copy of it takes most of a minute: zeros are not limited."""
    template = file_storage.template(48 * MIB, seed=1)
    fill(template.leaf, 48 * MIB)
    return file_storage.clone(template, seed=2)


def kill(call: Call, how: str) -> None:
    assert call.process
    group = call.process.pid
    if how == "group TERM":
        for pid in (-group, *helpers()):  # systemd sends it to all of the control group
            with suppress(ProcessLookupError):  # it has noticed another's end already
                os.kill(pid, signal.SIGTERM)
        return
    victims = {
        "hook KILL": [group],
        "helper KILL": helpers(),
        "all KILL": [*helpers(), -group],
        "copier KILL": copiers(),
    }
    kill_all(*victims[how])


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


def test_killed_while_waiting_for_a_turn(volume_group: str, image: Image, file_storage: FileStorage) -> None:
    """The waiting start is killed, the copying one continues; then the copying start is killed."""
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
    assert not list(LOCKS.glob("*.*"))
    assert run_point("before_vdsm_start").rc == 0
