from __future__ import annotations

import os
from pathlib import Path

import pytest

from localdisk import run
from localdisk.errors import CommandMissing, HelperRefused, HelperUnavailable
from localdisk.hook.client import Helper
from localdisk.protocol import Base, Claimed, Device, Fetched, How, Looked, Prepared, Target
from localdisk.vdsm.disks import Disk
from tests.fakes import FINGERPRINT, IMAGE, OTHER_IMAGE, OTHER_VOLUME, VM, VOLUME
from tests.fakes.sudo import Sudo


def disk(image_id: str = IMAGE, volume_id: str = VOLUME) -> Disk:
    return Disk("vda", "disk", "/p", "cow", "file", image_id, volume_id, "none", ())


@pytest.fixture(name="sudo")
def fixture_sudo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sudo:
    return Sudo(monkeypatch, tmp_path)


VM_FIELDS = {"vm": VM, "property": "lvm"}
IDS = {"image": IMAGE, "volume": VOLUME}


def test_a_whole_conversation(sudo: Sudo) -> None:
    target = {"path": "/dev/v/l", "dm_uuid": "LVM-x", "zeroed": True, "bandwidth": None, "nice": 10}
    seen = {"local": True, "kept": False, "ready": False, "state": "absent", "path": "/dev/v/l"}
    other = {"local": False, "kept": True, "ready": False, "state": "absent", "path": "/dev/v/m"}
    sudo.answers(
        {"disks": [seen, other]},
        {"stays": False, "path": "", "chunk": 65536, "cached": False},
        {"how": "copy", "path": "/dev/v/l", "target": target, "base": None},
        {},
        {},
        {"how": "kept", "path": "/dev/v/l", "target": None, "base": None},
        {},
    )
    with Helper(VM, "lvm") as helper:
        assert helper.look([disk(), disk(OTHER_IMAGE, OTHER_VOLUME)]) == (
            Looked(True, False, False, "absent", "/dev/v/l"),
            Looked(False, True, False, "absent", "/dev/v/m"),
        )
        assert helper.claim(disk(), seen_at=1) == Claimed(stays=False, path="", chunk=65536, is_cached=False)
        expected = Prepared(How.COPY, "/dev/v/l", Target("/dev/v/l", "LVM-x", True, None, 10), None)
        assert helper.prepare(MIB, FINGERPRINT, 5) == expected
        helper.progress(1, 2)
        helper.commit()
        assert helper.prepare(MIB, FINGERPRINT, 5) == Prepared(How.KEPT, "/dev/v/l", None, None)
        helper.release()
    others = {"image": OTHER_IMAGE, "volume": OTHER_VOLUME}
    prepare = {"verb": "prepare", "size": MIB, "fingerprint": FINGERPRINT, "writes": 5, "base": None}
    assert sudo.asked == [
        {"verb": "look", **VM_FIELDS, "disks": [IDS, others]},
        {"verb": "claim", **VM_FIELDS, **IDS, "seen": 1},
        prepare,
        {"verb": "progress", "done": 1, "written": 2},
        {"verb": "commit"},
        prepare,
        {"verb": "release", **VM_FIELDS},
    ]


MIB = 1 << 20
BASE = Base(OTHER_VOLUME, "", FINGERPRINT, MIB)
AS_ASKED = {"volume": OTHER_VOLUME, "domain": "", "fingerprint": FINGERPRINT, "size": MIB}


def test_a_conversation_about_a_template(sudo: Sudo) -> None:
    target = {"path": "/dev/v/l", "dm_uuid": "LVM-x", "zeroed": False, "bandwidth": 5, "nice": 10}
    nothing = {"path": "", "target": None, "base": None}
    sudo.answers(
        {"stays": False, "path": "", "chunk": 0, "cached": True},
        {"how": "missing", **nothing},
        {"how": "copy", "path": "/dev/v/l", "target": target, "base": None},
        {},
        {
            "how": "on base",
            "path": "/dev/v/l",
            "target": target,
            "base": {"path": "/dev/v/t", "dm_uuid": "LVM-t"},
        },
        {"how": "uncached", **nothing},
        {"how": "uncached", **nothing},
        {"ready": True, "chunk": 65536},
    )
    filled = Target("/dev/v/l", "LVM-x", False, 5, 10)
    with Helper(VM, "lvm") as helper:
        assert helper.claim(disk(), seen_at=1).is_cached
        assert helper.prepare(2 * MIB, FINGERPRINT, 5, BASE) == Prepared(How.MISSING, "", None, None)
        assert helper.fill(7) == filled
        helper.commit()
        on_base = Prepared(How.ON_BASE, "/dev/v/l", filled, Device("/dev/v/t", "LVM-t"))
        assert helper.prepare(2 * MIB, FINGERPRINT, 5, BASE) == on_base
        assert helper.prepare(2 * MIB, FINGERPRINT, 5, BASE) == Prepared(How.UNCACHED, "", None, None)
        assert helper.fill(7) is None
        assert helper.prefetch("lvmthin", BASE) == Fetched(is_ready=True, chunk=65536)
    prepare = {"verb": "prepare", "size": 2 * MIB, "fingerprint": FINGERPRINT, "writes": 5, "base": AS_ASKED}
    assert sudo.asked[1:] == [
        prepare,
        {"verb": "fill", "writes": 7},
        {"verb": "commit"},
        prepare,
        prepare,
        {"verb": "fill", "writes": 7},
        {"verb": "prefetch", "backend": "lvmthin", "base": AS_ASKED},
    ]


def test_sudo_is_called_once_and_without_a_password(sudo: Sudo) -> None:
    sudo.answers({}, {})
    with Helper(VM, "lvm") as helper:
        helper.release()
        helper.release()
    # the file itself, as the sudo rule names it, not vdsm's link
    assert (sudo.directory / "called").read_text() == f"-n {sudo.directory}/localdisk helper "


def test_leaving_ends_the_helper_and_waits_for_it(sudo: Sudo) -> None:
    sudo.does(f"cat >/dev/null; sleep 0.1; touch {sudo.directory}/ended")
    with pytest.raises(ZeroDivisionError), Helper(VM, "lvm"):
        raise ZeroDivisionError
    assert (sudo.directory / "ended").exists()


WHOLE = {"how": "copy", "path": "/p", "target": None, "base": None}


def refused(call: str = "release") -> str:
    arguments: dict[str, tuple[object, ...]] = {
        "look": ([disk()],),
        "claim": (disk(), False),
        "prepare": (MIB, FINGERPRINT, 0),
        "fill": (0,),
        "prefetch": ("lvm", BASE),
    }
    with pytest.raises(HelperUnavailable) as caught, Helper(VM, "lvm") as helper:
        getattr(helper, call)(*arguments.get(call, ()))
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith("cannot run the privileged helper: ")
    assert message.endswith("@includedir /etc/sudoers.d")
    assert " : check the sudo rule `vdsm ALL=(root) NOPASSWD: " in message
    return message


def test_without_sudo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(run.ENVIRONMENT, "PATH", str(tmp_path))
    with pytest.raises(CommandMissing, match="sudo is not installed"):
        Helper(VM, "lvm")


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo 'sudo: a password is required' >&2; exit 1", "sudo: a password is required"),
        ("printf 'sudo: a\nsudo: b is required\n' >&2; exit 1", "sudo: a, b is required"),
        ("printf 'Warning\\n  a\\033[31mb\\n\\n' >&2; exit 1", "a\\x1b[31mb"),
        ("exit 3", "it ended: exit code 3"),
        ("exit 0", "it ended: exit code 0"),
        ("kill -KILL $$", "it ended: killed by SIGKILL"),
        ("echo warning >&2; kill -SEGV $$", "it ended: killed by SIGSEGV: warning"),
        ("read line; exit 2", "it ended: exit code 2"),
        ("exec <&-; sleep 0.05; echo gone >&2", "gone"),
    ],
)
def test_a_helper_that_ends(sudo: Sudo, script: str, problem: str) -> None:
    sudo.does(script)
    assert f"helper: {problem} :" in refused()


def test_a_helper_that_prints_its_own_error(sudo: Sudo) -> None:
    """It ran: neither sudo nor its rule is to blame."""
    sudo.does("echo 'localdisk: /run is full : make room' >&2; exit 2")
    with pytest.raises(HelperRefused) as caught, Helper(VM, "lvm") as helper:
        helper.release()
    assert str(caught.value) == "/run is full : make room"


@pytest.mark.parametrize(
    "answer",
    ["", "garbage", "{", "[]", "5", "null", '"error"', '["error"]', "\\377", "{}" + "}" * 99, "[" * 9999],
    ids=lambda answer: answer[:10],
)
@pytest.mark.parametrize("call", ["release", "claim"])
def test_an_answer_that_is_none(sudo: Sudo, answer: str, call: str) -> None:
    sudo.does(f"read line; printf '{answer}\\n'; cat >/dev/null")
    refused(call)


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("look", {}),
        ("look", {"disks": None}),
        ("look", {"disks": [5]}),
        ("look", {"disks": [{}]}),
        ("look", {"disks": []}),
        ("claim", {}),
        ("claim", {"stays": False, "path": ""}),
        ("prepare", {}),
        ("prepare", {"path": "/p", "target": 5}),
        ("prepare", {"path": "/p", "target": {}}),
        ("prepare", {"path": "/p", "target": {"path": "/p", "more": 1}}),
        ("claim", {"stays": False, "path": "", "chunk": 65536}),
        *(("prepare", {key: value for key, value in WHOLE.items() if key != left_out}) for left_out in WHOLE),
        ("prepare", {**WHOLE, "base": {}}),
        ("prepare", {**WHOLE, "base": 5}),
        ("prepare", {**WHOLE, "base": {"path": "/p", "dm_uuid": "x", "zeroed": True}}),
        ("prepare", {**WHOLE, "target": {"path": "/p", "dm_uuid": "x"}}),
        ("fill", {}),
        ("fill", {"how": "copy", "target": {}}),
        ("prefetch", {}),
        ("prefetch", {"ready": True}),
        ("prefetch", {"chunk": 65536}),
    ],
    ids=str,
)
def test_an_answer_that_lacks_something(sudo: Sudo, call: str, answer: object) -> None:
    sudo.answers(answer)
    refused(call)


def test_a_refusal_is_the_helpers_own_message(sudo: Sudo) -> None:
    sudo.answers({"error": "disk is busy : stop it"})
    with pytest.raises(HelperRefused) as caught, Helper(VM, "lvm") as helper:
        helper.release()
    assert str(caught.value) == "disk is busy : stop it"


def test_a_helper_that_is_gone_in_the_middle(sudo: Sudo) -> None:
    sudo.does("read line; echo '{}'; read line; echo 'localdisk: internal error, x : report it' >&2; exit 2")
    with Helper(VM, "lvm") as helper:
        helper.release()
        with pytest.raises(HelperRefused, match="internal error"):
            helper.commit()


def test_a_helper_that_does_not_listen_is_noticed_by_progress(sudo: Sudo) -> None:
    sudo.does("exec <&-; echo killed >&2")
    with pytest.raises(HelperUnavailable, match="killed"), Helper(VM, "lvm") as helper:
        helper.progress(1, 2)


def test_no_descriptor_and_no_process_is_left(sudo: Sudo) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    sudo.answers({"error": "x : y"})
    with pytest.raises(HelperRefused), Helper(VM, "lvm") as helper:
        helper.release()
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
