from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localdisk.errors import BadHookCall, BadProperty, Error
from localdisk.vdsm import hook_call
from localdisk.vdsm.hook_call import Call, read_call, read_data, write_data
from tests.examples import examples

VM = "7c3f5f5e-2f0a-4b0f-9a51-0c6e0f0f1a01"
XML_POINTS = sorted(hook_call.POINTS - {"after_disk_prepare", "before_vdsm_start"})


def environment(**changes: str) -> dict[str, str]:
    """What vdsm sets for a VM with the property, with anything else in the environment."""
    return {
        "PATH": "/usr/bin",
        "PYTHONPATH": ":/hooks",
        "vmId": VM,
        "localdisk": "lvm",
        "sap": "true",
        **changes,
    }


def call_on(path: Path | str) -> Call:
    return Call("before_vm_start", VM, "lvm", str(path))


def test_points_are_those_of_the_design() -> None:
    assert {
        "after_disk_prepare",
        "before_vm_start",
        "after_vm_destroy",
        "before_vm_destroy",
        "before_vm_migrate_source",
        "before_vm_migrate_destination",
        "before_vm_hibernate",
        "before_vm_dehibernate",
        "before_disk_hotplug",
        "before_disk_hotunplug",
        "before_vdsm_start",
    } == hook_call.POINTS


# -- whether vdsm runs


@pytest.mark.parametrize(
    ("words", "is_vdsm"),
    [
        (["/usr/bin/python3", "/usr/libexec/vdsm/vdsmd"], True),
        (["/usr/bin/python3", "-x", "/usr/libexec/vdsm/vdsmd", "--more"], True),
        (["/usr/bin/python", "/usr/share/vdsm/vdsmd"], True),
        (["/usr/libexec/vdsm/vdsmd"], True),
        (["/bin/sh", "/usr/libexec/vdsm/vdsmd_init_common.sh", "--pre-start"], False),
        (["/usr/bin/python3", "/usr/libexec/vdsm/supervdsmd"], False),
        (["vdsmd"], False),
        (["-"], False),
    ],
    ids=str,
)
def test_is_running(monkeypatch: pytest.MonkeyPatch, words: list[str], is_vdsm: bool) -> None:
    argv = [words[0], "-c", "echo; read line", *words[1:]]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, executable="/bin/sh", stdin=pipe, stdout=pipe) as process:
        assert process.stdout
        process.stdout.readline()
        entries = ["self", "meminfo", "0", str(process.pid)]  # there is never a process 0
        monkeypatch.setattr(os, "listdir", {"/proc": entries}.__getitem__)
        assert hook_call.is_running() is is_vdsm


def test_json_point() -> None:
    call = read_call("after_disk_prepare", environment(_hook_json="/tmp/tmpab12"))
    assert call == Call("after_disk_prepare", VM, "lvm", "/tmp/tmpab12")


@pytest.mark.parametrize("point", XML_POINTS)
def test_xml_points(point: str) -> None:
    call = read_call(point, environment(_hook_domxml="/tmp/tmpab12", localdisk="on"))
    assert call == Call(point, VM, "on", "/tmp/tmpab12")


def test_before_vdsm_start_looks_at_nothing() -> None:
    nothing = Call("before_vdsm_start", "", "", None)
    assert read_call("before_vdsm_start", {}) == nothing
    assert (
        read_call("before_vdsm_start", environment(vmId="x", localdisk="x", _hook_domxml="/tmp/x")) == nothing
    )


@pytest.mark.parametrize("value", ["lvm", "lvmthin", "on", "off"])
def test_property_values(value: str) -> None:
    assert (
        read_call("before_vm_start", environment(localdisk=value, _hook_domxml="/x")).property_value == value
    )


def test_a_vm_without_the_property_is_off() -> None:
    call = read_call("before_vm_start", {"vmId": VM, "_hook_domxml": "/x"})
    assert call.property_value == "off"


@pytest.mark.parametrize(
    "value", ["", " lvm", "lvm\n", "LVM", "lvm,on", "true", "--help", "\x1b[31mlvm", "\udcff"]
)
def test_other_property_values_are_refused(value: str) -> None:
    with pytest.raises(BadProperty) as caught:
        read_call("before_vm_start", environment(localdisk=value, _hook_domxml="/x"))
    assert str(caught.value).isprintable()


def test_an_upper_case_vm_id_is_lowered() -> None:
    assert read_call("before_vm_start", environment(vmId=VM.upper(), _hook_domxml="/x")).vm_id == VM


@pytest.mark.parametrize(
    ("point", "changes", "problem"),
    [
        ("after_vm_start", {"_hook_domxml": "/x"}, "no hook point 'after_vm_start'"),
        ("", {"_hook_domxml": "/x"}, "no hook point ''"),
        ("../before_vm_start", {"_hook_domxml": "/x"}, "no hook point"),
        ("before_vm_start", {"_hook_domxml": "/x", "vmId": ""}, "vmId is ''"),
        ("before_vm_start", {"_hook_domxml": "/x", "vmId": VM + "\n"}, "vmId is"),
        ("before_vm_start", {"_hook_domxml": "/x", "vmId": VM.replace("-", "")}, "vmId is"),
        ("before_vm_start", {"_hook_domxml": "/x", "vmId": "../" + VM}, "vmId is"),
        ("before_vm_start", {}, "_hook_domxml is ''"),
        ("before_vm_start", {"_hook_domxml": ""}, "_hook_domxml is ''"),
        ("before_vm_start", {"_hook_domxml": "tmp/x"}, "_hook_domxml is 'tmp/x'"),
        ("before_vm_start", {"_hook_json": "/x"}, "_hook_json is set where only _hook_domxml"),
        ("before_vm_start", {"_hook_domxml": "/x", "_hook_json": "/y"}, "_hook_json is set"),
        ("before_vm_start", {"_hook_domxml": "/x", "_hook_json": ""}, "_hook_json is set"),
        ("after_disk_prepare", {"_hook_domxml": "/x"}, "_hook_domxml is set where only _hook_json"),
        ("after_disk_prepare", {"_hook_json": "/x", "_hook_domxml": "/x"}, "_hook_domxml is set"),
        ("after_disk_prepare", {}, "_hook_json is ''"),
    ],
)
def test_wrong_calls_are_refused(point: str, changes: dict[str, str], problem: str) -> None:
    with pytest.raises(BadHookCall, match=problem) as caught:
        read_call(point, environment(**changes))
    assert str(caught.value).isprintable()


def test_data_is_utf8_text_with_its_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes("\ufeff<a>Größe\r\n\r</a>\n".encode())
    assert read_data(call_on(file)) == "\ufeff<a>Größe\r\n\r</a>\n"


def test_empty_data_is_empty_text(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.touch()
    assert read_data(call_on(file)) == ""


def test_data_up_to_the_limit_is_read(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.touch()
    os.truncate(file, hook_call.DATA_LIMIT)
    assert len(read_data(call_on(file))) == hook_call.DATA_LIMIT
    os.truncate(file, hook_call.DATA_LIMIT + 1)
    with pytest.raises(BadHookCall, match="holds more than 16777216 bytes"):
        read_data(call_on(file))


@pytest.fixture(params=["missing", "directory", "link", "pipe", "device", "no directory", "NUL", "surrogate"])
def unusable(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    place = tmp_path / "data"
    (tmp_path / "real").write_text("{}")
    if request.param == "directory":
        place.mkdir()
    elif request.param == "link":
        place.symlink_to(tmp_path / "real")
    elif request.param == "pipe":
        os.mkfifo(place)
    odd = {
        "device": "/dev/null",
        "no directory": f"{place}/x/y",
        "NUL": f"{place}\0",
        "surrogate": f"{place}\ud800",
    }
    return odd.get(request.param, str(place))


def test_only_regular_files_are_data(unusable: str) -> None:
    for use in (read_data, lambda call: write_data(call, "{}")):
        with pytest.raises(BadHookCall, match="data file") as caught:
            use(call_on(unusable))
        assert str(caught.value).isprintable()


def test_data_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"<a>\xff</a>")
    with pytest.raises(BadHookCall, match="can't decode byte 0xff in position 3"):
        read_data(call_on(file))


def test_no_data_at_before_vdsm_start() -> None:
    with pytest.raises(BadHookCall, match="before_vdsm_start has no data"):
        read_data(read_call("before_vdsm_start", {}))
    with pytest.raises(BadHookCall, match="before_vdsm_start has no data"):
        write_data(read_call("before_vdsm_start", {}), "")


@pytest.mark.parametrize("text", ["", "{}", '{"a": "ü\\ud800"}\r\n', "x" * 100_000])
def test_an_answer_replaces_the_content_of_the_same_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "data"
    file.write_text("what vdsm wrote, neither short nor long")
    before = file.stat()
    write_data(call_on(file), text)
    assert file.read_bytes() == text.encode()
    assert (file.stat().st_ino, file.stat().st_mode) == (before.st_ino, before.st_mode)
    assert read_data(call_on(file)) == text
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize("text", ["\ud800", "x" * (hook_call.DATA_LIMIT + 1)])
def test_a_refused_answer_leaves_the_file_alone(tmp_path: Path, text: str) -> None:
    file = tmp_path / "data"
    file.write_text("as it was")
    with pytest.raises(BadHookCall):
        write_data(call_on(file), text)
    assert file.read_text() == "as it was"


def test_a_full_file_system_leaves_no_mixture(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_text('{"path": "/old", "format": "cow"}')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, limits[1]))
    try:
        with pytest.raises(BadHookCall, match="File too large"):
            write_data(call_on(file), '{"path": "/new", "format": "raw"}')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == '{"path": "/n'


@settings(max_examples=examples(200))
@given(
    point=st.sampled_from([*sorted(hook_call.POINTS), "x"]) | st.text(),
    environ=st.fixed_dictionaries(
        {},
        optional={
            "vmId": st.just(VM) | st.text(),
            "localdisk": st.sampled_from(hook_call.VALUES) | st.text(),
            "_hook_json": st.text(),
            "_hook_domxml": st.text(),
        },
    ),
)
def test_any_environment_is_a_call_or_an_error(point: str, environ: dict[str, Any]) -> None:
    with contextlib.suppress(Error):
        call = read_call(point, environ)
        assert call.point in hook_call.POINTS
        assert call.property_value in ("", *hook_call.VALUES)
        assert call.data_path is None or os.path.isabs(call.data_path)
