from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from localdisk import config, frozen
from localdisk.backend import Backend
from localdisk.config import Cache, Config, Copy, Margins, Policy, Retention, Settings
from localdisk.errors import BadProperty, ConfigRefused, ConfigUnreadable, Error
from localdisk.units import Amount
from tests.examples import examples

ROOT = Path(__file__).parents[2]
SCHEMA: dict[str, Any] = json.loads(config.schema_text())
VM = "11111111-2222-3333-4444-555555555555"
OTHER_VM = "11111111-2222-3333-4444-666666666666"
IMAGE = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
OTHER_IMAGE = "aaaaaaaa-bbbb-cccc-dddd-ffffffffffff"

DEFAULTS = Policy(
    volume_group="ovirt-local",
    backend=Backend.THICK,
    thin_pool="pool0",
    devices=(),
    margins=Margins(disk=Amount(bytes=0), reserve=Amount(bytes=0), thin_data=90.0, thin_metadata=80.0),
    retention=Retention(
        "delete", keep_for=7 * 86400, grace=600, on_source_change="refuse", erase="none", older_disks="keep"
    ),
    copy=Copy(parallel=2, bandwidth=None, nice=10, stall=300),
    hotplug="refuse",
    cache=Cache(templates=False, max_size=Amount(percent=50.0), keep_for=30 * 86400),
    enabled=True,
    disks=None,
)

fuzzing = settings(max_examples=examples(150))


def parse(text: str) -> Config:
    return config.parse(text.encode(), "F")


def problems(data: str | bytes) -> list[str]:
    with pytest.raises(ConfigRefused) as caught:
        config.parse(data.encode() if isinstance(data, str) else data, "F")
    return list(caught.value.problems)


# -- the schema and the examples


def properties(node: dict[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], dict[str, Any]]:
    """Every property below a schema node by its path, sections too."""
    found = {}
    for name, child in node.get("properties", {}).items():
        found[(*prefix, name)] = child
        found.update(properties(child, (*prefix, name)))
    return found


SETTINGS = properties(SCHEMA["$defs"]["settings"])
VM_ONLY = properties(SCHEMA["$defs"]["vm"])


def test_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", [*SETTINGS, *VM_ONLY, ("vms",)], ids=".".join)
def test_every_property_is_described_and_has_a_default_that_is_valid(path: tuple[str, ...]) -> None:
    node = {**SETTINGS, **VM_ONLY, **properties(SCHEMA)}[path]
    assert node["description"].endswith(".")
    assert "|" not in node["description"]
    Draft202012Validator({**node, "$defs": SCHEMA["$defs"]}).validate(node["default"])


def test_schema_and_dataclasses_have_the_same_keys() -> None:
    def names(kind: Any) -> list[str]:
        return list(frozen.names(kind))

    sections = {"margins": Margins, "retention": Retention, "copy": Copy, "cache": Cache}
    assert names(Settings) == [path[0] for path in SETTINGS if len(path) == 1]
    assert names(Policy) == names(Settings) + [path[0] for path in VM_ONLY]
    for section, kind in sections.items():
        assert names(kind) == [path[1] for path in SETTINGS if len(path) == 2 and path[0] == section]


def test_full_example_names_every_key_with_its_default() -> None:
    values = yaml.safe_load((ROOT / "examples/full.yaml").read_text())
    for path, node in SETTINGS.items():
        value = values
        for step in path:
            value = value[step]
        if "properties" not in node:
            assert value == node["default"], path
    (example,) = values["vms"].values()
    assert {path[0] for path in VM_ONLY} <= example.keys()
    assert values.keys() == {*(path[0] for path in SETTINGS), "vms"}


def test_examples_load() -> None:
    full = config.parse((ROOT / "examples/full.yaml").read_bytes(), "full.yaml")
    assert full.policy(OTHER_VM) == DEFAULTS
    kept = frozen.replace(DEFAULTS.retention, on_stop="keep", keep_for=30 * 86400)
    assert full.policy(VM) == frozen.replace(DEFAULTS, retention=kept)
    assert config.example_text() == (ROOT / "examples/minimal.yaml").read_text()
    assert config.parse(config.example_text().encode(), "minimal.yaml").policy(VM) == DEFAULTS


def test_reference_has_a_row_for_every_key_that_takes_a_value() -> None:
    rows = config.reference().splitlines()
    assert rows[:2] == ["| key | default | meaning |", "|---|---|---|"]
    named = [row.split("`")[1] for row in rows[2:]]
    general = [".".join(path) for path, node in SETTINGS.items() if "properties" not in node]
    assert named == [*general, "vms", *(f"vms.<VM UUID>.{path[0]}" for path in VM_ONLY)]
    assert "| `cache.templates` | `off` |" in config.reference()
    assert "| `margins.thin_data` | `90%` |" in config.reference()


# -- the values


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "---\n...\n", "{}", "vms: {}", "\ufeff"])
def test_empty_file_means_the_defaults(text: str) -> None:
    assert parse(text).policy(VM) == DEFAULTS


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("volume_group: local-nvme", {"volume_group": "local-nvme"}),
        ("volume_group: '1.5'", {"volume_group": "1.5"}),
        ("backend: lvmthin", {"backend": "lvmthin"}),
        ('"backend": "lvmthin"', {"backend": "lvmthin"}),
        ("thin_pool: p", {"thin_pool": "p"}),
        (
            "devices: [/dev/sda, /dev/disk/by-id/wwn-0x5:1]",
            {"devices": ("/dev/sda", "/dev/disk/by-id/wwn-0x5:1")},
        ),
        ("hotplug: shared", {"hotplug": "shared"}),
        ("%YAML 1.1\n---\nhotplug: shared\n", {"hotplug": "shared"}),
        ("hotplug: shared\r\n", {"hotplug": "shared"}),
    ],
)
def test_plain_values(text: str, changed: dict[str, Any]) -> None:
    assert parse(text).policy(VM) == frozen.replace(DEFAULTS, **changed)


@pytest.mark.parametrize(
    ("section", "text", "changed"),
    [
        ("margins", "disk: 4096", {"disk": Amount(bytes=4096)}),
        ("margins", "disk: 2.5%", {"disk": Amount(percent=2.5)}),
        ("margins", "disk: 1152921504606846976", {"disk": Amount(bytes=1 << 60)}),
        ("margins", "reserve: 10GiB", {"reserve": Amount(bytes=10 << 30)}),
        ("margins", "thin_data: 100%", {"thin_data": 100.0}),
        ("margins", "thin_metadata: 0%", {"thin_metadata": 0.0}),
        ("retention", "on_stop: keep", {"on_stop": "keep"}),
        ("retention", "keep_for: 12h", {"keep_for": 43200}),
        ("retention", "grace: 0s", {"grace": 0}),
        ("retention", "on_source_change: recopy", {"on_source_change": "recopy"}),
        ("retention", "erase: discard", {"erase": "discard"}),
        ("copy", "parallel: 64", {"parallel": 64}),
        ("copy", "bandwidth: 500MiB", {"bandwidth": 500 << 20}),
        ("copy", "bandwidth: 1048576", {"bandwidth": 1 << 20}),
        ("copy", "nice: 0", {"nice": 0}),
        ("cache", "templates: on", {"templates": True}),
        ("cache", "templates: true", {"templates": True}),
        ("cache", "templates: No", {"templates": False}),
        ("cache", "max_size: 1TiB", {"max_size": Amount(bytes=1 << 40)}),
        ("cache", "keep_for: 1d", {"keep_for": 86400}),
    ],
)
def test_values_of_sections(section: str, text: str, changed: dict[str, Any]) -> None:
    policy = parse(f"{section}: {{{text}}}").policy(VM)
    expected = frozen.replace(getattr(DEFAULTS, section), **changed)
    assert policy == frozen.replace(DEFAULTS, **{section: expected})


def test_config_is_frozen() -> None:
    loaded = parse(f"vms: {{{VM}: {{}}}}")
    with pytest.raises(AttributeError):
        loaded.backend = Backend.THIN  # type: ignore[misc]
    with pytest.raises(TypeError):
        loaded.vms[OTHER_VM] = loaded.vms[VM]  # type: ignore[index]


# -- the policy of one VM


@pytest.mark.parametrize(
    ("general", "own", "property_value", "backend"),
    [
        ("", "", "on", "lvm"),
        ("", "", "lvm", "lvm"),
        ("", "", "lvmthin", "lvmthin"),
        ("lvmthin", "", "on", "lvmthin"),
        ("lvmthin", "", "lvm", "lvm"),
        ("lvmthin", "", "lvmthin", "lvmthin"),
        ("", "lvmthin", "on", "lvmthin"),
        ("", "lvmthin", "lvm", "lvmthin"),
        ("lvmthin", "lvm", "on", "lvm"),
        ("lvmthin", "lvm", "lvmthin", "lvm"),
        ("lvm", "lvm", "lvmthin", "lvm"),
    ],
)
def test_precedence_of_the_backend(general: str, own: str, property_value: str, backend: str) -> None:
    text = f"backend: {general}\n" if general else ""
    text += f"vms: {{{VM}: {{backend: {own}}}}}\n" if own else f"vms: {{{VM}: {{hotplug: shared}}}}\n"
    assert parse(text).policy(VM, property_value).backend == backend
    if not own:
        assert parse(text).policy(OTHER_VM, property_value).backend == backend


@pytest.mark.parametrize("value", ["", "off", "ON", "thin", "lvm\n", "lvm; rm"])
def test_other_property_values_are_refused(value: str) -> None:
    with pytest.raises(BadProperty):
        parse("").policy(VM, value)


def test_override_changes_only_the_keys_it_names() -> None:
    loaded = parse(
        "volume_group: a\n"
        "retention: {on_stop: keep, grace: 1h}\n"
        "vms:\n"
        f"  {VM}:\n"
        "    retention: {keep_for: 1d}\n"
        f"  {OTHER_VM}: {{volume_group: b, devices: [/dev/sdb], retention: {{on_stop: delete}}}}\n"
    )
    kept = Retention(
        "keep", keep_for=7 * 86400, grace=3600, on_source_change="refuse", erase="none", older_disks="keep"
    )
    general = frozen.replace(DEFAULTS, volume_group="a", retention=kept)
    assert loaded.policy("99999999-2222-3333-4444-555555555555") == general
    assert loaded.policy(VM).retention == frozen.replace(kept, keep_for=86400)
    other = loaded.policy(OTHER_VM)
    assert (other.volume_group, other.devices) == ("b", ("/dev/sdb",))
    assert other.retention == frozen.replace(kept, on_stop="delete")


def test_every_general_key_may_be_repeated_for_a_vm() -> None:
    values = yaml.safe_load((ROOT / "examples/full.yaml").read_text())
    del values["vms"]
    assert parse(json.dumps({"vms": {VM: values}})).policy(VM) == DEFAULTS


@pytest.mark.parametrize(
    ("own", "image_id", "is_local"),
    [
        ("{}", IMAGE, True),
        ("{disks: all}", IMAGE, True),
        (f"{{disks: [{IMAGE}]}}", IMAGE, True),
        (f"{{disks: [{IMAGE}]}}", IMAGE.upper(), True),
        (f"{{disks: [{IMAGE}]}}", OTHER_IMAGE, False),
        (f"{{disks: [{IMAGE}, {OTHER_IMAGE}]}}", OTHER_IMAGE, True),
        ("{enabled: off}", IMAGE, False),
        (f"{{enabled: false, disks: [{IMAGE}]}}", IMAGE, False),
    ],
)
def test_which_disks_are_local(own: str, image_id: str, is_local: bool) -> None:
    loaded = parse(f"vms: {{{VM}: {own}}}")
    assert loaded.policy(VM).is_local(image_id) is is_local
    assert loaded.policy(VM.upper()).is_local(image_id) is is_local
    assert loaded.policy(OTHER_VM).is_local(image_id)


def test_volume_groups_are_all_that_are_named_the_general_one_first() -> None:
    loaded = parse(
        f"volume_group: m\nvms: {{{VM}: {{volume_group: z}}, {OTHER_VM}: {{volume_group: m}}, "
        f"{IMAGE}: {{volume_group: a}}, {OTHER_IMAGE}: {{}}}}"
    )
    assert tuple(loaded.volume_groups) == ("m", "z", "a")
    assert parse("").volume_groups == {"ovirt-local": ()}


# -- refused: YAML


NUMBER_FIX = "to YAML: write plain digits with a unit (90s, 10GiB), or quote it"
NOT_SHOWN = "holds a line break, control or other character that cannot be shown"
TOO_DEEP = "is nested more than 8 levels deep"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("backend: lvm\nbackend: lvm", "F:2:1: backend: is a duplicate: the key stands in line 1 already"),
        ("copy:\n  nice: 1\n  nice: 2", "F:3:3: copy.nice: is a duplicate: the key stands in line 2 already"),
        (
            f"vms:\n  {VM}: {{}}\n  {VM}: {{}}",
            f"F:3:3: vms.{VM}: is a duplicate: the key stands in line 2 already",
        ),
        ("backend: &a lvm", "F:1:10: backend: anchors are refused, write the value out"),
        ("copy: &a\n  nice: 1", "F:1:7: copy: anchors are refused, write the value out"),
        ("&a backend: lvm", "F:1:1: backend: anchors are refused, write the value out"),
        ("backend: *a", "F:1:10: backend: aliases are refused, write the value out"),
        ("*a : lvm", "F:1:1: has a key that is not plain text"),
        ("*a", "F:1:1: aliases are refused, write the value out"),
        ("backend: !!str lvm", "F:1:10: backend: tags are refused, write the value alone"),
        ("backend: ! lvm", "F:1:10: backend: tags are refused, write the value alone"),
        ("backend: !x lvm", "F:1:10: backend: tags are refused, write the value alone"),
        ("backend: !!python/name:os.system x", "F:1:10: backend: tags are refused, write the value alone"),
        ("!!map {}", "F:1:1: tags are refused, write the value alone"),
        ("devices: [!!str /dev/sda]", "F:1:11: devices[0]: tags are refused, write the value alone"),
        (
            "backend: lvm\n---\nbackend: lvm",
            "F:2:1: a second document begins here; the file must have only one",
        ),
        ("---\n---\n", "F:2:1: a second document begins here; the file must have only one"),
        ("copy:\n  <<: {nice: 1}", "F:2:3: copy.<<: merge keys are refused, write the keys out"),
        ("? [a]\n: b", "F:1:3: has a key that is not plain text"),
        ("copy: {{a: b}: c}", "F:1:8: copy: has a key that is not plain text"),
        ('"": b', "F:1:1: has an empty key"),
        ("copy: {nice: 0x10}", f"F:1:14: copy.nice: 0x10 is a number in base 16 {NUMBER_FIX}"),
        ("copy: {nice: 0b1}", f"F:1:14: copy.nice: 0b1 is a number in base 2 {NUMBER_FIX}"),
        ("copy: {nice: 010}", f"F:1:14: copy.nice: 010 is a number in base 8 {NUMBER_FIX}"),
        ("copy: {nice: 1:30}", f"F:1:14: copy.nice: 1:30 is a number in base 60 {NUMBER_FIX}"),
        ("retention: {grace: 1:30}", f"F:1:20: retention.grace: 1:30 is a number in base 60 {NUMBER_FIX}"),
        ("copy: {nice: 1:30.5}", f"F:1:14: copy.nice: 1:30.5 is a number in base 60 {NUMBER_FIX}"),
        (
            "copy: {nice: 1_0}",
            f"F:1:14: copy.nice: 1_0 is a number with signs or too many digits {NUMBER_FIX}",
        ),
        ("copy: {nice: +1}", f"F:1:14: copy.nice: +1 is a number with signs or too many digits {NUMBER_FIX}"),
        ("copy: {nice: 1.0}", f"F:1:14: copy.nice: 1.0 is a floating-point number {NUMBER_FIX}"),
        ("margins: {disk: .inf}", f"F:1:17: margins.disk: .inf is a floating-point number {NUMBER_FIX}"),
        ("margins: {disk: -.INF}", f"F:1:17: margins.disk: -.INF is a floating-point number {NUMBER_FIX}"),
        ("margins: {disk: .nan}", f"F:1:17: margins.disk: .nan is a floating-point number {NUMBER_FIX}"),
        (
            "margins: {disk: " + "9" * 5000 + "}",
            f"F:1:17: margins.disk: {'9' * 39}… is a number with signs or too many digits {NUMBER_FIX}",
        ),
        ('volume_group: "a\\0b"', f"F:1:15: volume_group: {NOT_SHOWN}"),
        ('volume_group: "a\\n"', f"F:1:15: volume_group: {NOT_SHOWN}"),
        ('volume_group: "a\\e[31m"', f"F:1:15: volume_group: {NOT_SHOWN}"),
        ('volume_group: "\\uD800"', f"F:1:15: volume_group: {NOT_SHOWN}"),
        ("volume_group: |\n  a\n", f"F:1:15: volume_group: {NOT_SHOWN}"),
        ('"a\\u202eb": c', f"F:1:1: a\u202eb: {NOT_SHOWN}"),
        ("volume_group: a\0b", "F:1:16: holds a control character"),
        ("backend: lvm\nthin_pool: \x1b[31m\n", "F:2:12: holds a control character"),
        ("\tbackend: lvm", "F:1:1: is not YAML: found character '\\t' that cannot start any token"),
        ("backend: lvm\n  hotplug: shared", "F:2:10: is not YAML: mapping values are not allowed here"),
        ("backend: [lvm", "F:1:14: is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("backend: 'lvm", "F:1:14: is not YAML: found unexpected end of stream"),
        ('a: "\\q"', "F:1:6: is not YAML: found unknown escape character 'q'"),
        ('a: "\\UFFFFFFFF"', "F:1:7: is not YAML: a number is out of range"),
        ('a: "\\U00110000"', "F:1:7: is not YAML: a number is out of range"),
        ("%YAML " + "9" * 5000 + ".1\n--- {}", "F:1:7: is not YAML: a number is out of range"),
        (
            "%YAML 2.0\n--- {}",
            "F:1:1: is not YAML: found incompatible YAML document (version 1.* is required)",
        ),
        ("[" * 60_000, f"F:1:10: [0]: {TOO_DEEP}"),
        ("[\n" * 30_000, f"F:10:1: [0]: {TOO_DEEP}"),
        ("- " * 30_000, f"F:1:19: [0]: {TOO_DEEP}"),
        ("{a: " * 15_000, f"F:1:37: a: {TOO_DEEP}"),
        ("#" * 65_537, "F:1:1: is larger than 65536 bytes"),
        (b"backend: lvm\nthin_pool: p\xff\n", "F:2:13: is not UTF-8 text"),
        (b"\xff\xfeb\0a\0", "F:1:1: is not UTF-8 text"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_yaml_is_refused(text: str | bytes, expected: str) -> None:
    assert expected in problems(text)


@pytest.mark.parametrize("depth", [1, 100, 10_000])
def test_deep_complex_keys_do_not_crash(depth: int) -> None:
    assert problems("? " * depth)
    assert problems("{" * depth)


def test_file_of_the_largest_size_is_read() -> None:
    assert parse("#" * 65_536).policy(VM) == DEFAULTS


# -- refused: by the schema


KNOWN = "volume_group, backend, thin_pool, devices, margins, retention, copy, hotplug, cache"
VG_NAME = "a volume group's name (A-Za-z0-9+_.-, at most 80, a dash counting twice)"
LV_NAME = "a thin pool's name (A-Za-z0-9+_.-, at most 40, a dash counting twice, none that LVM reserves)"
AMOUNT = "a size (bytes, 512MiB, 10GiB) or a percentage (5%)"
PERCENTAGE = "a percentage from 0% to 100%, such as 90%"
DURATION = "a duration such as 90s, 15m, 12h or 7d"
RATE = "a rate: unlimited, or bytes per second, at least 1MiB (such as 500MiB)"
UUID = "a UUID in lower case with dashes"
DISKS = "the word all, or a list of 1 to 256 image ids, each once"
DEVICE = "the path of a device, such as /dev/nvme0n1p4"
DEVICES = "a list of at most 256 device paths, each once"
NO_VALUE = "has no value: give it one, or remove the key"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("volume_grp: x", "F:1:1: volume_grp: unknown key; did you mean volume_group?"),
        ("Backend: lvm", "F:1:1: Backend: unknown key; did you mean backend?"),
        ("xyz: 1", f"F:1:1: xyz: unknown key; known here: {KNOWN}, vms"),
        ("on: 1", f"F:1:1: on: unknown key; known here: {KNOWN}, vms"),
        ("1: 1", f"F:1:1: 1: unknown key; known here: {KNOWN}, vms"),
        ("parallel: 1", "F:1:1: parallel: unknown key; it belongs under copy"),
        ("keep_for: 1d", "F:1:1: keep_for: unknown key; it belongs under retention or cache"),
        ("enabled: on", "F:1:1: enabled: unknown key; it belongs under vms.<VM UUID>"),
        ("copy: {paralel: 1}", "F:1:8: copy.paralel: unknown key; did you mean parallel?"),
        ("copy:\n    xyz: 1", "F:2:5: copy.xyz: unknown key; known here: parallel, bandwidth, nice, stall"),
        (f"vms: {{{VM}: {{enable: on}}}}", f"F:1:46: vms.{VM}.enable: unknown key; did you mean enabled?"),
        (
            f"vms: {{{VM}: {{vms: {{}}}}}}",
            f"F:1:46: vms.{VM}.vms: unknown key; known here: {KNOWN}, enabled, disks",
        ),
        ("a" * 100 + ": 1", f"F:1:1: {'a' * 39}…: unknown key; known here: {KNOWN}, vms"),
        ("[]", "F:1:1: this list is not a mapping of the configuration's keys"),
        ("backend", "F:1:1: 'backend' is not a mapping of the configuration's keys"),
        ("null", f"F:1:1: {NO_VALUE}"),
        ("vms:", f"F:1:5: vms: {NO_VALUE}"),
        ("backend: ~", f"F:1:10: backend: {NO_VALUE}"),
        ("copy:\nhotplug: shared", f"F:1:6: copy: {NO_VALUE}"),
        ("copy: fast", "F:1:7: copy: 'fast' is not a mapping of the keys of copy"),
        ("backend: lvmthn", "F:1:10: backend: 'lvmthn' is not one of lvm, lvmthin; did you mean lvmthin?"),
        ("backend: LVM", "F:1:10: backend: 'LVM' is not one of lvm, lvmthin; did you mean lvm?"),
        ("backend: {}", "F:1:10: backend: a mapping is not one of lvm, lvmthin"),
        ("hotplug: off", "F:1:10: hotplug: off (true or false to YAML) is not one of refuse, shared"),
        ("hotplug: 2001-01-01", "F:1:10: hotplug: '2001-01-01' is not one of refuse, shared"),
        ("volume_group: 5", f"F:1:15: volume_group: 5 is not {VG_NAME}"),
        ("volume_group: -x", f"F:1:15: volume_group: '-x' is not {VG_NAME}"),
        ("volume_group: ..", f"F:1:15: volume_group: '..' is not {VG_NAME}"),
        ("volume_group: a/b", f"F:1:15: volume_group: 'a/b' is not {VG_NAME}"),
        ("volume_group: ''", f"F:1:15: volume_group: '' is not {VG_NAME}"),
        ("volume_group: é", f"F:1:15: volume_group: 'é' is not {VG_NAME}"),
        ("volume_group: yes", f"F:1:15: volume_group: yes (true or false to YAML) is not {VG_NAME}"),
        (f"volume_group: {'a' * 81}", f"F:1:15: volume_group: '{'a' * 39}…' is not {VG_NAME}"),
        (f"volume_group: {'a' * 79}-", f"F:1:15: volume_group: '{'a' * 39}…' is not {VG_NAME}"),
        ("thin_pool: snapshot1", f"F:1:12: thin_pool: 'snapshot1' is not {LV_NAME}"),
        ("thin_pool: pvmove0", f"F:1:12: thin_pool: 'pvmove0' is not {LV_NAME}"),
        ("thin_pool: p_tdata", f"F:1:12: thin_pool: 'p_tdata' is not {LV_NAME}"),
        ("thin_pool: vg/pool", f"F:1:12: thin_pool: 'vg/pool' is not {LV_NAME}"),
        (f"thin_pool: {'a' * 39}-", f"F:1:12: thin_pool: '{'a' * 39}-' is not {LV_NAME}"),
        ("devices: /dev/sda", f"F:1:10: devices: '/dev/sda' is not {DEVICES}"),
        ("devices: [sda]", f"F:1:11: devices[0]: 'sda' is not {DEVICE}"),
        ("devices:\n- /dev/sda\n- /etc/x", f"F:3:3: devices[1]: '/etc/x' is not {DEVICE}"),
        ("devices: [/dev/../etc/x]", f"F:1:11: devices[0]: '/dev/../etc/x' is not {DEVICE}"),
        ("devices: [/dev/]", f"F:1:11: devices[0]: '/dev/' is not {DEVICE}"),
        ("devices: ['/dev/a,b']", f"F:1:11: devices[0]: '/dev/a,b' is not {DEVICE}"),
        ("devices: ['/dev/a --x']", f"F:1:11: devices[0]: '/dev/a --x' is not {DEVICE}"),
        ("devices: [/dev/a, /dev/a]", f"F:1:10: devices: this list is not {DEVICES}"),
        (f"devices: [{'/dev/a,' * 5000}]", f"F:1:10: devices: this list is not {DEVICES}"),
        ("margins: {disk: 5GB}", f"F:1:17: margins.disk: '5GB' is not {AMOUNT}"),
        ("margins: {disk: -1}", f"F:1:17: margins.disk: -1 is not {AMOUNT}"),
        ("margins: {disk: 101%}", f"F:1:17: margins.disk: '101%' is not {AMOUNT}"),
        ("margins: {disk: '4096'}", f"F:1:17: margins.disk: '4096' is not {AMOUNT}"),
        (
            "margins: {disk: 1152921504606846977}",
            f"F:1:17: margins.disk: 1152921504606846977 is not {AMOUNT}",
        ),
        ("margins: {reserve: ten}", f"F:1:20: margins.reserve: 'ten' is not {AMOUNT}"),
        ("margins: {thin_data: 90}", f"F:1:22: margins.thin_data: 90 is not {PERCENTAGE}"),
        ("margins: {thin_data: 10GiB}", f"F:1:22: margins.thin_data: '10GiB' is not {PERCENTAGE}"),
        ("margins: {thin_metadata: 100.1%}", f"F:1:26: margins.thin_metadata: '100.1%' is not {PERCENTAGE}"),
        ("cache: {max_size: half}", f"F:1:19: cache.max_size: 'half' is not {AMOUNT}"),
        ("retention: {keep_for: 7}", f"F:1:23: retention.keep_for: 7 is not {DURATION}"),
        ("retention: {keep_for: 1w}", f"F:1:23: retention.keep_for: '1w' is not {DURATION}"),
        ("retention: {grace: '1:30'}", f"F:1:20: retention.grace: '1:30' is not {DURATION}"),
        (
            "retention: {on_stop: no}",
            "F:1:22: retention.on_stop: no (true or false to YAML) is not one of delete, keep",
        ),
        ("retention: {erase: ~}", f"F:1:20: retention.erase: {NO_VALUE}"),
        ("copy: {parallel: 0}", "F:1:18: copy.parallel: 0 is not a whole number from 1 to 64"),
        ("copy: {parallel: 65}", "F:1:18: copy.parallel: 65 is not a whole number from 1 to 64"),
        ("copy: {parallel: two}", "F:1:18: copy.parallel: 'two' is not a whole number from 1 to 64"),
        (
            "copy: {parallel: on}",
            "F:1:18: copy.parallel: on (true or false to YAML) is not a whole number from 1 to 64",
        ),
        ("copy: {nice: -1}", "F:1:14: copy.nice: -1 is not a whole number from 0 to 19"),
        ("copy: {nice: 20}", "F:1:14: copy.nice: 20 is not a whole number from 0 to 19"),
        ("copy: {bandwidth: 5%}", f"F:1:19: copy.bandwidth: '5%' is not {RATE}"),
        ("copy: {bandwidth: 0}", f"F:1:19: copy.bandwidth: 0 is not {RATE}"),
        ("copy: {bandwidth: 0MiB}", f"F:1:19: copy.bandwidth: '0MiB' is not {RATE}"),
        ("copy: {bandwidth: 512KiB}", f"F:1:19: copy.bandwidth: '512KiB' is not {RATE}"),
        ("cache: {templates: 'on'}", "F:1:20: cache.templates: 'on' is not on or off, without quotes"),
        ("cache: {templates: 1}", "F:1:20: cache.templates: 1 is not on or off, without quotes"),
        ("vms: []", "F:1:6: vms: this list is not a mapping of VM UUIDs"),
        ("vms:\n  web: {}", f"F:2:3: vms.web: 'web' is not {UUID}"),
        (
            f"vms:\n  {IMAGE.upper()}: {{}}",
            f"F:2:3: vms.{IMAGE.upper()}: '{IMAGE.upper()}' is not {UUID}; write {IMAGE}",
        ),
        (f"vms: {{'{{{VM}}}': {{}}}}", f"F:1:7: vms.{{{VM}}}: '{{{VM}}}' is not {UUID}; write {VM}"),
        (
            f"vms: {{{VM}: off}}",
            f"F:1:45: vms.{VM}: off (true or false to YAML) is not a mapping of the keys to override",
        ),
        (f"vms:\n  {VM}:\n", f"F:2:40: vms.{VM}: {NO_VALUE}"),
        (f"vms: {{{VM}: {{disks: none}}}}", f"F:1:53: vms.{VM}.disks: 'none' is not {DISKS}"),
        (f"vms: {{{VM}: {{disks: []}}}}", f"F:1:53: vms.{VM}.disks: this list is not {DISKS}"),
        (f"vms: {{{VM}: {{disks: [all]}}}}", f"F:1:54: vms.{VM}.disks[0]: 'all' is not {UUID}"),
        (
            f"vms: {{{VM}: {{disks: [{IMAGE}, {IMAGE}]}}}}",
            f"F:1:53: vms.{VM}.disks: this list is not {DISKS}",
        ),
        (
            f"vms: {{{VM}: {{disks: [{IMAGE.upper()}]}}}}",
            f"F:1:54: vms.{VM}.disks[0]: '{IMAGE.upper()}' is not {UUID}; write {IMAGE}",
        ),
        (
            f"vms: {{{VM}: {{copy: {{parallel: 99}}}}}}",
            f"F:1:63: vms.{VM}.copy.parallel: 99 is not a whole number from 1 to 64",
        ),
        (
            f"vms: {{{VM}: {{volume_group: {'-a' * 30}}}}}",
            f"F:1:60: vms.{VM}.volume_group: '{'-a' * 19}-…' is not {VG_NAME}",
        ),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_schema_refuses(text: str, expected: str) -> None:
    assert problems(text) == [expected]


def test_all_problems_are_reported_at_once_in_the_order_of_the_file() -> None:
    text = (
        "hotplug: maybe\n"
        "vms:\n"
        f"  {VM}: {{enabled: 1}}\n"
        f"  {OTHER_VM}: *nowhere\n"
        "copy: {nice: 20, nice: 0x10, parallel: 0}\n"
        "backends: lvm\n"
        "---\n"
    )
    assert problems(text) == [
        "F:1:10: hotplug: 'maybe' is not one of refuse, shared",
        f"F:3:51: vms.{VM}.enabled: 1 is not on or off, without quotes",
        f"F:4:41: vms.{OTHER_VM}: aliases are refused, write the value out",
        "F:5:14: copy.nice: 20 is not a whole number from 0 to 19",
        "F:5:18: copy.nice: is a duplicate: the key stands in line 5 already",
        f"F:5:24: copy.nice: 0x10 is a number in base 16 {NUMBER_FIX}",
        "F:5:40: copy.parallel: 0 is not a whole number from 1 to 64",
        "F:6:1: backends: unknown key; did you mean backend?",
        "F:7:1: a second document begins here; the file must have only one",
    ]


def test_refusal_is_lines_that_say_what_to_do() -> None:
    with pytest.raises(ConfigRefused) as caught:
        config.parse(b"xyz: 1\nbackend: no", "/etc/localdisk.yaml")
    assert str(caught.value).splitlines() == [
        f"/etc/localdisk.yaml:1:1: xyz: unknown key; known here: {KNOWN}, vms",
        "/etc/localdisk.yaml:2:10: backend: no (true or false to YAML) is not one of lvm, lvmthin",
        "configuration /etc/localdisk.yaml is refused, 2 problem(s) : "
        "correct it, then run localdisk check --config /etc/localdisk.yaml",
    ]


def test_problems_beyond_fifty_are_only_counted() -> None:
    lines = problems("".join(f"k{n}: 1\n" for n in range(60)))
    assert len(lines) == 51
    assert lines[-1] == "F: and 10 more"


# -- the file


def write(path: Path, text: str, mode: int = 0o644) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def unreadable(path: str) -> str:
    with pytest.raises(ConfigUnreadable) as caught:
        config.load(path)
    return str(caught.value.fields["problem"])


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o444])
def test_file_that_others_cannot_write_is_read(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "c.yaml", "hotplug: shared", mode)
    assert config.load(path).hotplug == "shared"


def test_link_to_a_good_file_is_read(tmp_path: Path) -> None:
    write(tmp_path / "c.yaml", "hotplug: shared")
    (tmp_path / "link").symlink_to("c.yaml")
    assert config.load(str(tmp_path / "link")).hotplug == "shared"


def test_problems_carry_the_file_as_it_was_named(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "hotplug: x")
    with pytest.raises(ConfigRefused) as caught:
        config.load(path)
    assert caught.value.problems == (f"{path}:1:10: hotplug: 'x' is not one of refuse, shared",)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666, 0o620])
def test_file_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "c.yaml", "hotplug: shared", mode)
    assert unreadable(path) == f"its mode {mode:04o} lets others write it"


@pytest.mark.parametrize(
    ("owner", "euid", "is_trusted"),
    [(0, 0, True), (0, 36, True), (36, 36, True), (36, 0, False), (107, 36, False)],
)
def test_whose_file_is_believed(owner: int, euid: int, is_trusted: bool) -> None:
    status = os.stat_result((stat.S_IFREG | 0o644, 0, 0, 1, owner, 0, 0, 0, 0, 0))
    assert config._distrust(status, euid) == (None if is_trusted else f"it belongs to user {owner}")


def test_directories_fifos_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert unreadable(str(tmp_path)) == "Is a directory"
    assert unreadable(str(tmp_path / "fifo")) == "it is not a regular file"
    assert unreadable("/dev/zero") == "it is not a regular file"


def test_missing_named_file_is_refused(tmp_path: Path) -> None:
    assert unreadable(str(tmp_path / "missing")) == "No such file or directory"
    assert unreadable("") == "No such file or directory"
    assert "null" in unreadable("a\0b")


def test_missing_default_file_means_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "localdisk.yaml"))
    assert config.load().policy(VM) == DEFAULTS
    write(tmp_path / "localdisk.yaml", "hotplug: shared")
    assert config.load().hotplug == "shared"


def test_default_file_that_is_a_dangling_link_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "localdisk.yaml"))
    (tmp_path / "localdisk.yaml").symlink_to("missing")
    with pytest.raises(ConfigUnreadable):
        config.load()


def test_huge_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "")
    os.truncate(path, 1 << 40)
    with pytest.raises(ConfigRefused) as caught:
        config.load(path)
    assert caught.value.problems == (f"{path}:1:1: is larger than 65536 bytes",)


def test_defaults_need_neither_yaml_nor_jsonschema(tmp_path: Path) -> None:
    code = (
        "import sys; from localdisk import config; "
        f"config.DEFAULT_PATH = {str(tmp_path / 'missing')!r}; config.load().policy({VM!r}); "
        "print(*{'yaml', 'jsonschema', 'difflib', 'uuid'} & sys.modules.keys())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True
    )
    assert run.stdout == b"\n"


# -- anything at all


def assert_config_or_error(data: bytes) -> None:
    try:
        loaded = config.parse(data, "F")
    except Error as error:
        for line in str(error).splitlines():
            assert line.isprintable()
    else:
        assert loaded.policy(VM).volume_group


FRAGMENTS = [
    *(step for path in [*SETTINGS, *VM_ONLY] for step in path),
    *(
        "vms",
        VM,
        IMAGE,
        VM.upper(),
        "lvm",
        "keep",
        "all",
        "on",
        "off",
        "5%",
        "1GiB",
        "7d",
        "~",
        "0x1",
        "1:30",
        ".inf",
        "<<",
    ),
    *(
        ": ",
        ":\n  ",
        ":\n",
        "\n",
        "\n  ",
        "\n    ",
        "- ",
        "? ",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "&a ",
        "*a",
        "!!str ",
        "! ",
    ),
    *(
        "'",
        '"',
        "\\",
        "|",
        ">",
        "%YAML 1.1\n",
        "%TAG ! x:\n",
        "---\n",
        "...\n",
        "#",
        " ",
        "\t",
        "\0",
        "\ufeff",
        "\x85",
    ),
]

leaf = st.sampled_from(
    ["lvm", "keep", "all", "5%", "1GiB", "7d", "/dev/sda", IMAGE, None, True, 0, -1, 1.5, 10**30]
)
anything = st.recursive(
    leaf | st.text(max_size=5) | st.integers(),
    lambda children: st.lists(children, max_size=3)
    | st.dictionaries(st.sampled_from(FRAGMENTS), children, max_size=4),
    max_leaves=20,
)


@fuzzing
@given(st.text())
def test_any_text_is_a_config_or_an_error(text: str) -> None:
    assert_config_or_error(text.encode(errors="surrogatepass"))


@fuzzing
@given(st.binary())
def test_any_bytes_are_a_config_or_an_error(data: bytes) -> None:
    assert_config_or_error(data)


@fuzzing
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join))
def test_any_yaml_like_text_is_a_config_or_an_error(text: str) -> None:
    assert_config_or_error(text.encode())


@fuzzing
@given(anything)
def test_any_tree_is_a_config_or_an_error(tree: Any) -> None:
    assert_config_or_error(json.dumps(tree).encode())


def words(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Every value that the schema node allows, in practice."""
    if "$ref" in node:
        node = SCHEMA["$defs"][node["$ref"].rpartition("/")[2]]
    if "enum" in node:
        return st.sampled_from(node["enum"])
    kinds = node["type"] if isinstance(node["type"], list) else [node["type"]]
    found: list[st.SearchStrategy[Any]] = []
    if "boolean" in kinds:
        found.append(st.booleans())
    if "integer" in kinds:
        found.append(st.integers(node["minimum"], node["maximum"]))
    if "string" in kinds:
        text = st.from_regex(node["pattern"], fullmatch=True).filter(str.isprintable)
        found.append(text.filter(lambda t: len(t) + t.count("-") <= node.get("maxLength", len(t) * 2)))
    if "array" in kinds:
        found.append(
            st.lists(words(node["items"]), min_size=node.get("minItems", 0), max_size=3, unique=True)
        )
    return st.one_of(found)


def sections(node: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    parts = {k: sections(v) if "properties" in v else words(v) for k, v in node["properties"].items()}
    return st.fixed_dictionaries({}, optional=parts)


@settings(fuzzing, max_examples=examples(60))
@given(sections(SCHEMA["$defs"]["settings"]), sections(SCHEMA["$defs"]["vm"]))
def test_whatever_the_schema_allows_is_understood(general: dict[str, Any], own: dict[str, Any]) -> None:
    loaded = config.parse(json.dumps({**general, "vms": {VM: {**general, **own}}}).encode(), "F")
    assert loaded.policy(VM).margins == loaded.margins
    assert loaded.policy(VM).backend == loaded.backend
