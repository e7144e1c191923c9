"""What can be said to the helper by vdsm, in what order, and by how many."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import pytest

from tests.bed import host
from tests.bed.shell import run
from tests.bed.storage import new_id
from tests.kernel.privilege.attempts import (
    GROUP,
    PYTHON,
    SUDO_HELPER,
    Answer,
    Scene,
    Talk,
    Traces,
    aside,
    is_refusal,
    prepare,
    traces,
)
from tests.kernel.steps import CONFIG, configure, just_now, processes, wait_for

Request = Callable[[Scene], object]
TO_PREPARE = {"stays": False, "path": "", "chunk": 0, "cached": False}


@dataclass(frozen=True)
class Told:
    """What attempts, all with one helper, were answered; and the host before and after them."""

    answers: Mapping[str, Answer]
    before: Traces
    after: Traces

    def assert_refused(self, name: str) -> None:
        assert is_refusal(self.answers[name]), self.answers[name]
        assert self.after == self.before


# -- requests that come alone


def look(scene: Scene, *disks: object) -> dict[str, object]:
    return {"verb": "look", "vm": scene.vm_id, "property": "lvm", "disks": list(disks)}


def drifted(scene: Scene, vm_id: str, path: object) -> dict[str, object]:
    """A request that names what a VM ran from."""
    disks = [{"image": scene.running_image, "path": path}]
    return {"verb": "drifted", "vm": vm_id, "property": "lvm", "disks": disks}


def row(scene: Scene, volume: object) -> dict[str, object]:
    return {"image": scene.image_id, "volume": volume}


NO_JSON: dict[str, Request] = {
    "an empty line": lambda _: b"\n",
    "no JSON": lambda _: b"claim\n",
    "cut off": lambda s: json.dumps(s.claim()).encode()[:-1] + b"\n",
    "not UTF-8": lambda _: b'{"verb": "\xff\xfe"}\n',
    "a NUL": lambda s: json.dumps(s.claim()).encode() + b"\0\n",
    "deeply nested": lambda _: b"[" * 60_000 + b"\n",
    "deeply nested fields": lambda _: b'{"verb":' * 8_000 + b"\n",
    "a list": lambda s: [s.claim()],
    "a string": lambda _: "claim",
    "null": lambda _: None,
    "a number of 60,000 digits": lambda _: b"9" * 60_000 + b"\n",
}
VERBS: dict[str, Request] = {
    "no verb": lambda s: {"vm": s.vm_id, "property": "lvm"},
    "verb null": lambda s: s.claim(verb=None),
    "verb as a list": lambda s: s.claim(verb=["claim"]),
    "verb as an object": lambda s: s.claim(verb={"claim": 1}),
    "verb in capitals": lambda s: s.claim(verb="CLAIM"),
    "verb remove": lambda s: {"verb": "remove", "vm": s.kept_vm, "volume": s.kept},
    "verb gc": lambda _: {"verb": "gc"},
    "verb _remove_old": lambda s: s.claim(verb="_remove_old"),
    "verb __class__": lambda _: {"verb": "__class__"},
    "a field too many": lambda s: s.claim(volume_group=s.shared_group),
    "a path": lambda s: s.claim(path="/etc/shadow"),
    "tags": lambda s: s.claim(tags=["localdisk"]),
    "a field too few": lambda s: {k: v for k, v in s.claim().items() if k != "image"},
    "two verbs": lambda s: (
        f'{{"verb": "claim", "vm": "{s.kept_vm}", "property": "lvm", "verb": "commit"}}\n'.encode()
    ),
}
NAMES: dict[str, Request] = {
    "volume: the thin pool": lambda s: s.claim(volume=host.THIN_POOL),
    "volume: the pool's data": lambda s: s.claim(volume=f"{host.THIN_POOL}_tdata"),
    "volume: a name of somebody's": lambda s: s.claim_kept(volume="backup"),
    "volume: in capitals": lambda s: s.claim(volume=new_id().upper()),
    "volume: a newline behind": lambda s: s.claim(volume=new_id() + "\n"),
    "volume: a blank before": lambda s: s.claim(volume=" " + new_id()),
    "volume: a path": lambda s: s.claim(volume=f"../{s.shared_group}/{s.shared_volume}"),
    "volume: another group's": lambda s: s.claim(volume=f"{s.shared_group}/{s.shared_volume}"),
    "volume: a tag": lambda _: _.claim(volume="@localdisk"),
    "volume: an option": lambda s: s.claim(volume="--config=global/use_lvmlockd=1"),
    "volume: two": lambda s: s.claim(volume=f"{new_id()} {s.kept}"),
    "volume: a NUL behind": lambda s: s.claim(volume=new_id() + "\0"),
    "volume: without dashes": lambda s: s.claim(volume=new_id().replace("-", "")),
    "volume: digits of another script": lambda s: s.claim(volume="\N{FULLWIDTH DIGIT ONE}" + new_id()[1:]),
    "volume: a list": lambda s: s.claim(volume=[new_id()]),
    "volume: a number": lambda s: s.claim(volume=10**30),
    "image: a tag in it": lambda s: s.claim(image=f"{new_id()},VM_{s.kept_vm}"),
    "image: an option": lambda s: s.claim(image="x --addtag y"),
    "VM: a tag in it": lambda s: s.claim(vm=f"{s.kept_vm} --addtag VM_{new_id()}"),
    "VM: empty": lambda s: s.claim(vm=""),
    "property: off": lambda s: s.claim(property="off"),
    "property: a newline behind": lambda s: s.claim(property="lvm\n"),
    "property: a list": lambda s: s.claim(property=["lvm"]),
    "property: a lone surrogate": lambda s: s.claim(property="\ud800"),
    "release: every VM": lambda _: {"verb": "release", "vm": "*", "property": "lvm"},
    "cancel: a path": lambda _: {"verb": "cancel", "vm": "../../etc/cron.d/x", "property": "lvm"},
    "drifted: a path that is none": lambda s: drifted(s, s.running_vm, 5),
    "drifted: a VM that is none": lambda s: drifted(s, "../x", "/x"),
    "look: 257 disks": lambda s: look(s, *(row(s, new_id()) for _ in range(257))),
    "look: the thin pool": lambda s: look(s, row(s, host.THIN_POOL)),
    "look: a field too many": lambda s: look(s, {**row(s, new_id()), "vg": s.shared_group}),
    "look: no list": lambda s: {**look(s), "disks": {"image": s.image_id}},
}
OTHERS: dict[str, Request] = {
    "another VM's disk": lambda s: s.claim(image=s.kept_image, volume=s.kept),
    "another VM's disk, looked at": lambda s: look(s, {"image": s.kept_image, "volume": s.kept}),
    "the VM's disk as another image's": lambda s: s.claim_kept(image=s.image_id),
    "a running VM's disk": lambda s: s.claim(image=s.running_image, volume=s.running),
    "a stop of a VM that runs": lambda s: {"verb": "release", "vm": s.running_vm, "property": "lvm"},
    "a drift of a VM that runs": lambda s: drifted(s, s.running_vm, "/x"),
    **{
        f"a volume {what}": lambda s, what=what: s.claim_kept(volume=s.foreign[what])  # type: ignore[misc]
        for what in ("without tags", "with two VMs' tags", "with an image's tag only", "with malformed tags")
    },
    "a pool with our tags": lambda s: s.claim_kept(volume=s.foreign["a pool with our tags"]),
}
EARLY: dict[str, Request] = {
    "prepare before claim": lambda _: prepare(),
    "progress before claim": lambda _: {"verb": "progress", "done": 1, "written": 1},
    "commit before claim": lambda _: {"verb": "commit"},
}


def prefetch(backend: object = "lvm", **changes: object) -> dict[str, object]:
    base = {"volume": new_id(), "domain": "", "fingerprint": "0" * 32, "size": 4 << 20, **changes}
    return {"verb": "prefetch", "backend": backend, "base": base}


# With the template cache on.
TEMPLATES: dict[str, Request] = {
    "a backend that is none": lambda _: prefetch("raid"),
    "a backend as a list": lambda _: prefetch(["lvm"]),
    "no base": lambda _: {**prefetch(), "base": None},
    "a base as a list": lambda _: {**prefetch(), "base": [new_id()]},
    "a field of the base too many": lambda _: prefetch(name="backup"),
    "the name of the template LV": lambda s: {**prefetch(), "volume": s.kept},
    "template: a path": lambda s: prefetch(volume=f"../{s.shared_group}/{s.shared_volume}"),
    "template: a tag": lambda _: prefetch(volume="@localdisk"),
    "template: a tag in it": lambda s: prefetch(volume=f"{new_id()},VM_{s.kept_vm}"),
    "domain: an option": lambda _: prefetch(domain="--config=global/use_lvmlockd=1"),
    "domain: the volume group": lambda _: prefetch(domain=GROUP),
    "fingerprint: a tag in it": lambda s: prefetch(fingerprint=f"{'0' * 32},VM_{s.kept_vm}"),
    "template: no bytes": lambda _: prefetch(size=0),
    "template: not whole sectors": lambda _: prefetch(size=513),
    "template: 2^63 bytes": lambda _: prefetch(size=1 << 63),
    "template: half a byte": lambda _: prefetch(size=4194304.5),
    "fill before prefetch": lambda _: {"verb": "fill", "writes": 0},
    "reuse before claim": lambda _: {"verb": "reuse", "size": 4194304, "fingerprint": "0" * 32},
}
ALONE = {**NO_JSON, **VERBS, **NAMES, **OTHERS, **EARLY}


@pytest.fixture(scope="module")
def alone(scene: Scene) -> Told:
    before = traces(scene)
    with Talk() as talk:
        answers = {name: talk.ask(request(scene)) for name, request in ALONE.items()}
    return Told(answers, before, traces(scene))


@pytest.mark.parametrize("name", ALONE)
def test_request(alone: Told, name: str) -> None:
    alone.assert_refused(name)


@pytest.fixture(scope="module")
def of_templates(scene: Scene) -> Told:
    with aside(CONFIG):
        configure("cache: {templates: on}\n")
        before = traces(scene)
        with Talk() as talk:
            answers = {name: talk.ask(request(scene)) for name, request in TEMPLATES.items()}
        after = traces(scene)
    return Told(answers, before, after)


@pytest.mark.parametrize("name", TEMPLATES)
def test_request_for_a_template(of_templates: Told, name: str) -> None:
    of_templates.assert_refused(name)


def test_templates_are_made_in_order(scene: Scene, untouched: None) -> None:
    """Filled once, committed once, and gone when it is not: no verb makes one ready that was not made."""
    with aside(CONFIG):
        configure("cache: {templates: on}\n")
        for requests in (
            [{"verb": "commit"}],
            [prepare()],
            [{"verb": "progress", "done": 1, "written": 1}],
            [{"verb": "fill", "writes": 0}, {"verb": "fill", "writes": 0}],
            [{"verb": "fill", "writes": 0}, prepare()],
            [{"verb": "fill", "writes": 1 << 63}],
        ):
            with Talk() as talk:
                assert talk.ask(prefetch())["ready"] is False
                answers = [talk.ask(request) for request in requests]
            assert is_refusal(answers[-1]), answers


def test_a_running_vms_claim_gets_nothing_to_prepare(scene: Scene) -> None:
    """The VM's own claim, when vdsm has restarted: it learns the path, and no verb comes after that."""
    before = traces(scene)
    claim = scene.claim(vm=scene.running_vm, image=scene.running_image, volume=scene.running)
    for then in (prepare(), {"verb": "commit"}):
        with Talk() as talk:
            assert talk.ask(claim) == {
                "stays": False,
                "path": f"/dev/{GROUP}/{scene.running}",
                "chunk": 0,
                "cached": False,
            }
            assert is_refusal(talk.ask(then))
    assert traces(scene) == before


def test_a_running_vms_claim_as_if_it_started_gets_nothing_either(scene: Scene) -> None:
    """The helper need not ask libvirt about it: the disk is open."""
    before = traces(scene)
    ids = {"vm": scene.running_vm, "image": scene.running_image, "volume": scene.running}
    for then in (prepare(), {"verb": "commit"}, prepare(fingerprint="f" * 32)):
        with Talk() as talk:
            assert talk.ask(scene.claim(**ids, seen=just_now()))["path"] == ""
            assert is_refusal(talk.ask(then))
    assert traces(scene) == before


def test_a_strangers_stop_stops_nothing(scene: Scene) -> None:
    before = traces(scene)
    with Talk() as talk:
        assert talk.ask({"verb": "release", "vm": scene.vm_id, "property": "lvm"}) == {}
    assert traces(scene) == before


# -- requests that come after a claim

HUGE = 1 << 63
AFTER_CLAIM: dict[str, object] = {
    **{
        f"size {size!r:.20}": prepare(size=size)
        for size in (0, 1, 511, 513, -512, HUGE, (64 << 40) + 512, 10**4000, True, 512.0, "512", None, [512])
    },
    "size NaN": json.dumps(prepare(size=float("nan"))).encode() + b"\n",
    "size infinite": json.dumps(prepare(size=float("inf"))).encode() + b"\n",
    "writes -1": prepare(writes=-1),
    "writes of 2^63": prepare(writes=HUGE),
    "writes as a tag": prepare(writes=f"1 --addtag VM_{new_id()}"),
    "fingerprint: none": prepare(fingerprint=""),
    "fingerprint: a newline behind": prepare(fingerprint="0" * 32 + "\n"),
    "fingerprint: in capitals": prepare(fingerprint="A" * 32),
    "fingerprint: a tag": prepare(fingerprint="0" * 32 + ",VM_x"),
    "fingerprint: a list": prepare(fingerprint=["0" * 32]),
    "prepare names a pool": prepare(thin_pool="pool0"),
    "prepare names a volume": prepare(volume=new_id()),
    "prepare names tags": prepare(tags=[]),
    "commit before prepare": {"verb": "commit"},
    "progress before prepare": {"verb": "progress", "done": 0, "written": 0},
}


@pytest.fixture(scope="module")
def after_claim(scene: Scene) -> Told:
    before = traces(scene)
    answers = {}
    with Talk() as talk:
        for name, request in AFTER_CLAIM.items():
            assert talk.ask(scene.claim()) == TO_PREPARE
            answers[name] = talk.ask(request)
    return Told(answers, before, traces(scene))


@pytest.mark.parametrize("name", AFTER_CLAIM)
def test_after_claim(after_claim: Told, name: str) -> None:
    after_claim.assert_refused(name)


# -- requests that come while the disk is being copied

AFTER_PREPARE: dict[str, Request] = {
    "prepare again": lambda _: prepare(),
    "progress backwards": lambda _: {"verb": "progress", "done": -1, "written": 0},
    "progress of 2^63": lambda _: {"verb": "progress", "done": HUGE, "written": 0},
    "commit of another disk": lambda s: {"verb": "commit", "volume": s.kept},
    "claim of another VM's disk": lambda s: s.claim(image=s.kept_image, volume=s.kept),
}


@pytest.fixture(scope="module")
def after_prepare(scene: Scene) -> Told:
    before = traces(scene, is_new=True)
    answers = {}
    with Talk() as talk:
        for name, request in AFTER_PREPARE.items():
            begin(talk, scene)
            answers[name] = talk.ask(request(scene))
            assert is_refusal(talk.ask({"verb": "commit"})), "a refusal ends the claim"
    return Told(answers, before, traces(scene, is_new=True))


@pytest.mark.parametrize("name", AFTER_PREPARE)
def test_after_prepare(after_prepare: Told, name: str) -> None:
    after_prepare.assert_refused(name)


def begin(talk: Talk, scene: Scene) -> str:
    """A disk of the attacker's VM is being made; its volume id."""
    claim = scene.claim()
    assert "error" not in talk.ask(claim)
    answer = talk.ask(prepare())
    assert answer.get("target"), answer
    return str(claim["volume"])


# -- the host changes in between


def test_another_volume_takes_the_name_before_prepare(scene: Scene, untouched: None) -> None:
    """LVM refuses to make the disk; the foreign volume is neither used nor removed."""
    claim = scene.claim()
    with Talk() as talk:
        talk.ask(claim)
        with stranger(str(claim["volume"])):
            assert is_refusal(talk.ask(prepare()))


IGNORE_CHILDREN = """\
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def test_who_ignores_the_death_of_children(scene: Scene, untouched: None) -> None:
    """A program inherits this setting from its parent; commands that fail must still count as failed."""
    claim = scene.claim()
    with Talk([PYTHON, "-c", IGNORE_CHILDREN, *SUDO_HELPER]) as talk:
        assert "error" not in talk.ask(claim)
        with stranger(str(claim["volume"])):
            answer = talk.ask(prepare())
            assert is_refusal(answer), answer
            assert "already exists" in answer["error"], answer


def test_another_volume_takes_the_place_before_commit(scene: Scene, untouched: None) -> None:
    with Talk() as talk:
        name = begin(talk, scene)
        tags = host.logical_volumes()[name]
        host.remove(name)
        with stranger(name, *tags):
            assert is_refusal(talk.ask({"verb": "commit"}))
            assert host.logical_volumes()[name] == tags, "it is not what was made, and stays unfinished"


def test_the_owner_changes_before_commit(scene: Scene, untouched: None) -> None:
    with Talk() as talk:
        name = begin(talk, scene)
        full_name = f"{GROUP}/{name}"
        run("lvchange", "--deltag", f"VM_{scene.vm_id}", "--addtag", f"VM_{scene.kept_vm}", full_name)
        tags = host.logical_volumes()[name]
        assert is_refusal(talk.ask({"verb": "commit"}))
        assert host.logical_volumes()[name] == tags
        host.remove(name)


@contextlib.contextmanager
def stranger(name: str, *tags: str) -> Iterator[None]:
    """Somebody's volume of that name, which must stay."""
    words = [word for tag in tags for word in ("--addtag", tag)]
    run("lvcreate", "-y", "-Wn", "-L", "8m", *words, "-n", name, GROUP)
    made = identity(name)
    yield
    assert identity(name) == made
    host.remove(name)


def identity(name: str) -> str:
    return run("lvs", "--noheadings", "-o", "lv_uuid,lv_tags", f"{GROUP}/{name}")


# -- too much, too long, too many


def test_a_line_without_end(untouched: None) -> None:
    with Talk() as talk:
        with contextlib.suppress(BrokenPipeError):
            for _ in range(64):
                talk.send(b"x" * 65536)
        assert is_refusal(talk.answer())
        assert talk.answer() is None
        assert talk.end()[0] == 2


def test_a_line_too_long(scene: Scene, untouched: None) -> None:
    """The request is valid except for its length; the unfinished disk is removed."""
    with Talk() as talk:
        begin(talk, scene)
        talk.send(json.dumps({"verb": "commit"}).encode() + b" " * 70_000 + b"\n")
        assert is_refusal(talk.answer())
        assert talk.answer() is None


def test_requests_while_it_waits(scene: Scene, untouched: None) -> None:
    """What is sent ahead is served when its turn comes, and not kept without end."""
    claim = scene.claim()
    with Talk() as first, Talk() as second:
        first.ask(claim)
        second.send(claim)
        assert second.answer(1) is None
        with contextlib.suppress(BrokenPipeError):
            for _ in range(64):
                second.send(b"x" * 65536)
        assert is_refusal(second.answer())


def test_two_helpers_on_one_disk(scene: Scene, untouched: None) -> None:
    """The second helper waits for the first; then it finds the first one's disk."""
    with Talk() as first:
        volume = begin(first, scene)
        with Talk() as second:
            second.send(scene.claim(volume=volume), {"verb": "commit"}, prepare())
            assert second.answer(2) is None
            assert "UPDATING" in host.logical_volumes()[volume]
            first.end()
            assert volume not in host.logical_volumes()
            assert second.answer() == TO_PREPARE
            assert is_refusal(second.answer())
            assert is_refusal(second.answer())


def test_who_waits_and_goes_leaves_nothing(scene: Scene, untouched: None) -> None:
    with Talk() as first:
        volume = begin(first, scene)
        with Talk() as second:
            second.send(scene.claim(volume=volume))
            assert second.answer(1) is None
            assert second.end()[0] == 0
        assert volume in host.logical_volumes()


def test_many_at_once(scene: Scene, untouched: None) -> None:
    """One copies, the others wait; a hook that is stopped, or silent, holds its own turn until it ends."""
    with aside(CONFIG), contextlib.ExitStack() as stack:
        configure("copy: {parallel: 1}\n")
        talks = [stack.enter_context(Talk()) for _ in range(4)]
        for talk in talks:
            talk.send(scene.claim(), prepare())
        for talk in talks:
            assert "error" not in (talk.answer() or {"error": "none"})
        time.sleep(1)
        for left in range(len(talks), 0, -1):
            assert unfinished(scene) == 1
            going = next(talk for talk in talks if talk.answer(0.5))
            talks.remove(going)
            going.end()
            wait_for(lambda n=left - 1: unfinished(scene) == min(1, n), "the next one")  # type: ignore[misc]


def unfinished(scene: Scene) -> int:
    return sum({"UPDATING", f"VM_{scene.vm_id}"} <= tags for tags in host.logical_volumes().values())


def test_nobody_reads_the_answers(scene: Scene, untouched: None) -> None:
    """The helper waits to write its answer, and removes the unfinished disk when the reader has ended."""
    with Talk() as talk:
        volume = begin(talk, scene)
        progress = json.dumps({"verb": "progress", "done": 1, "written": 1}).encode() + b"\n"
        deaf(talk)
        many = progress * (select.PIPE_BUF // len(progress))  # a pipe takes all of it or nothing
        blocked = time.monotonic()
        while time.monotonic() < blocked + 2:
            if talk.try_to_send(many):
                blocked = time.monotonic()
        assert volume in host.logical_volumes()


def deaf(talk: Talk) -> None:
    """Let few answers fit into the pipe."""
    set_pipe_size = 1031  # F_SETPIPE_SZ, linux/fcntl.h
    assert talk.process.stdout
    fcntl.fcntl(talk.process.stdout, set_pipe_size, 4096)


# -- the process itself

TRACE = """\
import ctypes, os, signal, sys
pid = int(sys.argv[1])
def attach():
    if ctypes.CDLL(None, use_errno=True).ptrace(16, pid, 0, 0):
        raise OSError(ctypes.get_errno(), "ptrace")
for name, attempt in {
    "kill": lambda: os.kill(pid, signal.SIGKILL),
    "stop": lambda: os.kill(pid, signal.SIGSTOP),
    "end": lambda: os.kill(pid, signal.SIGTERM),
    "trace": attach,
    "memory": lambda: open(f"/proc/{pid}/mem", "r+b"),
    "descriptors": lambda: os.listdir(f"/proc/{pid}/fd"),
    "environment": lambda: open(f"/proc/{pid}/environ").read(),
    "directory": lambda: os.chdir(f"/proc/{pid}/root"),
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
    "limits": lambda: __import__("resource").prlimit(pid, 7, (0, 0)),
}.items():
    try:
        attempt()
        print(name)
    except OSError:
        pass
"""


@pytest.mark.parametrize("user", ["vdsm", "nobody", "qemu"])
def test_the_helper_cannot_be_got_at(scene: Scene, untouched: None, user: str) -> None:
    with Talk() as talk:
        volume = begin(talk, scene)
        assert run(PYTHON, "-c", TRACE, str(talk.pid), user=user) == ""
        assert volume in host.logical_volumes()
        assert "error" not in talk.ask({"verb": "progress", "done": 1, "written": 1})


def test_a_keyboard(scene: Scene) -> None:
    """^\\ ends the helper, not the LVM command that it runs; the next start removes what is left."""
    before = traces(scene, is_new=True)
    claim = scene.claim()
    with Talk(["setsid", *SUDO_HELPER]) as talk:
        talk.ask(claim)
        talk.send(prepare())
        while not any(words[0] == "lvcreate" for _, words in processes()):
            pass
        os.killpg(talk.pid, signal.SIGQUIT)
        assert talk.process.wait(60) == -signal.SIGQUIT
    wait_for(lambda: unfinished(scene), "the disk", 20)
    with Talk() as talk:
        assert "error" not in talk.ask(claim)
        assert talk.ask(prepare()).get("target")
    assert traces(scene, is_new=True) == before
