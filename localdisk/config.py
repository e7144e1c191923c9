"""The configuration: `/etc/localdisk.yaml` -> schema -> frozen `Config` -> the `Policy` of one VM.

`schema/localdisk.schema.json` is the single truth about keys, syntax and defaults.  `config_yaml`
reads the file, jsonschema compares it with the schema, and this module reports each problem in one line:
where it is and what would be right.  To add a key: the schema, `examples/full.yaml`, and the frozen class
and its builder here.

PyYAML and jsonschema are imported in the functions that need them: most runs of the program read no
configuration at all, or one that does not exist.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType

from localdisk import config_memory
from localdisk.backend import BACKENDS, Backend
from localdisk.config_yaml import FILE_LIMIT, Problem, Refused, Tree, read_tree, shorten
from localdisk.errors import BadProperty, ConfigRefused, ConfigUnreadable
from localdisk.frozen import frozen, replace
from localdisk.units import Amount, parse_duration, parse_percentage, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from jsonschema.exceptions import ValidationError

    from localdisk.config_yaml import Path

    _Values = dict[str, Any]

DEFAULT_PATH = "/etc/localdisk.yaml"

_SCHEMA_FILE = "localdisk.schema.json"
_SHOWN_PROBLEMS = 50


# -- what the rest of the program sees


@frozen
class Margins:
    """Room that is left: `disk` of the virtual size, `reserve` of the VG, percentages of the thin pool."""

    disk: Amount
    reserve: Amount
    thin_data: float
    thin_metadata: float


@frozen
class Retention:
    """How a local disk ends; `keep_for` and `grace` in seconds, the others in the schema's words."""

    on_stop: str
    keep_for: int
    grace: int
    on_source_change: str
    erase: str
    older_disks: str


@frozen
class Copy:
    """`bandwidth` is of the whole host, bytes per second, None: unlimited; `stall` in seconds, 0: never."""

    parallel: int
    bandwidth: int | None
    nice: int
    stall: int


@frozen
class Cache:
    """The template cache; `max_size` of the VG or pool, `keep_for` in seconds."""

    templates: bool
    max_size: Amount
    keep_for: int


@frozen
class Settings:
    """Every key that may stand at the top of the file and again under `vms`."""

    volume_group: str
    backend: Backend
    thin_pool: str
    devices: tuple[str, ...]
    margins: Margins
    retention: Retention
    copy: Copy
    hotplug: str
    cache: Cache

    @property
    def pool(self) -> str:
        """The thin pool in which disks are made, "" if they are not made in one."""
        return self.thin_pool if self.backend is Backend.THIN else ""


@frozen
class Policy(Settings):
    """What holds for one VM; `disks` are the image ids that are local, None: all of them."""

    enabled: bool
    disks: tuple[str, ...] | None

    def is_local(self, image_id: str) -> bool:
        """Whether the disk of this image must run from a local copy."""
        return self.enabled and (self.disks is None or image_id.lower() in self.disks)


@frozen
class Override:
    """A VM's policy before its property is known; `backend`: of its own section, None if it has none."""

    policy: Policy
    backend: Backend | None


@frozen
class Config(Settings):
    """One configuration file; `vms` by VM UUID, `others` for every VM that it does not name."""

    vms: Mapping[str, Override]
    others: Override

    def policy(self, vm_id: str, property_value: str = "on") -> Policy:
        """What holds for this VM: its own section, then its custom property, then the file.

        `property_value` is `lvm`, `lvmthin` or `on`, which leaves the backend to the file; else BadProperty.
        """
        if property_value not in ("on", *BACKENDS):
            raise BadProperty(value=property_value)
        override = self.vms.get(vm_id.lower(), self.others)
        asked = Backend(property_value) if property_value in BACKENDS else None
        backend = override.backend or asked or self.backend
        return (
            override.policy
            if override.policy.backend == backend
            else replace(override.policy, backend=backend)
        )

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The general one, then those of VMs that the file names."""
        return (self.others.policy, *(override.policy for override in self.vms.values()))

    def caches_templates(self, volume_group: str) -> bool:
        """Whether any VM's disks in that group may start from a template LV."""
        return any(each.cache.templates and each.volume_group == volume_group for each in self.policies)

    @property
    def volume_groups(self) -> Mapping[str, tuple[str, ...]]:
        """Every volume group that the file names, each once, the general one first, with its `devices`."""
        groups: dict[str, tuple[str, ...]] = {}
        for policy in self.policies:
            groups.setdefault(policy.volume_group, policy.devices)
        return groups


def load(path: str | None = None) -> Config:
    """The configuration in the file `path`; None: in DEFAULT_PATH, or the defaults if there is no such file.

    Raises ConfigUnreadable for a file that is missing or that others can write, ConfigRefused with all
    problems of its contents.
    """
    if path is None and not _exists(DEFAULT_PATH):
        return _build({})
    path = DEFAULT_PATH if path is None else path
    text = _read_file(path)
    values = config_memory.recall(text)
    if values is None:
        values = _validated(text, path)
        config_memory.remember(text, values)
    return _build(values)


def parse(data: bytes, path: str) -> Config:
    """The configuration that `data`, the contents of the file `path`, holds; else ConfigRefused."""
    return _build(_validated(data, path))


def _validated(data: bytes, path: str) -> _Values:
    """The values in `data`, which the schema accepts; else ConfigRefused."""
    tree = read_tree(data)
    problems = {*tree.problems, *_schema_problems(tree), *_name_problems(tree)}
    if problems:
        raise ConfigRefused(path, _lines(path, problems))
    values: _Values = tree.value
    return values


def places(path: str) -> Mapping[str, str]:
    """Where each key of a file stands, `FILE:LINE:COLUMN` by dotted key.  Raises ConfigUnreadable."""
    keys = read_tree(_read_file(path)).keys.items()
    return {".".join(map(str, steps)): f"{path}:{place.line}:{place.column}" for steps, place in keys}


# -- the schema


def schema_text() -> str:
    """The JSON schema of the configuration, as text."""
    return _packed("schema", _SCHEMA_FILE)


def example_text() -> str:
    """A configuration to start from, as text: it has the defaults."""
    return _packed("examples", "minimal.yaml")


def _packed(directory: str, name: str) -> str:
    package = os.path.dirname(os.path.abspath(__file__))
    loader: Any = __spec__.loader  # reads from a zip file, too
    path = os.path.join(directory, name)
    try:
        text: bytes = loader.get_data(os.path.join(package, path))
    except OSError:
        # Not installed but run from the source tree, where they lie beside the package.
        text = loader.get_data(os.path.join(os.path.dirname(package), path))
    return text.decode()


def reference() -> str:
    """The table of all keys in Markdown, from the schema: key, default, meaning."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, node in _keys():
        default = node["default"]
        shown = ("off", "on")[default] if isinstance(default, bool) else str(default)
        lines.append(f"| `{name}` | `{shown}` | {node['description']} |")
    return "\n".join(lines) + "\n"


@lru_cache(maxsize=1)
def _schema() -> _Values:
    schema: _Values = json.loads(schema_text())
    return schema


def _definition(name: str) -> _Values:
    definition: _Values = _schema()["$defs"][name]
    return definition


def _keys() -> Iterator[tuple[str, _Values]]:
    """Every key that takes a value, dotted, with its schema node, in the order of the schema."""
    yield from _leaves(_definition("settings"), "")
    yield from _leaves(_schema(), "")
    yield from _leaves(_definition("vm"), "vms.<VM UUID>.")


def _leaves(node: _Values, prefix: str) -> Iterator[tuple[str, _Values]]:
    for name, child in node["properties"].items():
        if "properties" in child:
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _defaults(node: _Values) -> _Values:
    return {
        name: _defaults(child) if "properties" in child else child["default"]
        for name, child in node["properties"].items()
    }


# -- the file


def _exists(path: str) -> bool:
    """Whether there is anything of that name; a dangling link is something, and then refused."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError:
        pass
    return True


def _read_file(path: str) -> bytes:
    """At most one byte more than the limit of a file that nobody else can have written."""
    try:
        with open(path, "rb", opener=_open) as file:
            problem = _distrust(os.fstat(file.fileno()), os.geteuid())
            if problem:
                raise ConfigUnreadable(path=path, problem=problem)
            return file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise ConfigUnreadable(path=path, problem=error.strerror or error) from error
    except ValueError as error:  # a NUL or a lone surrogate in the path
        raise ConfigUnreadable(path=path, problem=error) from error


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)  # a FIFO must not hold us up


def _distrust(status: os.stat_result, euid: int) -> str | None:
    """Why a file of that status is not to be believed by a process of user `euid`; None: it is."""
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    if status.st_uid not in (0, euid):
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"its mode {stat.S_IMODE(status.st_mode):04o} lets others write it"
    return None


# -- problems


def _schema_problems(tree: Tree) -> Iterator[Problem]:
    from jsonschema.validators import Draft202012Validator

    for error in Draft202012Validator(_schema()).iter_errors(tree.value):
        path = tuple(error.absolute_path)
        if isinstance(error.instance, Refused):
            continue
        if error.validator in ("additionalProperties", "unevaluatedProperties"):
            yield from _unknown_keys(tree, path, error)
        elif "propertyNames" in error.absolute_schema_path:
            key = (*path, str(error.instance))
            yield Problem.at(tree.keys[key], key, _mismatch(error.instance, "", error.schema))
        elif error.instance is None:
            yield Problem.at(tree.values[path], path, "has no value: give it one, or remove the key")
        else:
            text = tree.values[path].text
            yield Problem.at(tree.values[path], path, _mismatch(error.instance, text, error.schema))


def _unknown_keys(tree: Tree, path: Path, error: ValidationError) -> Iterator[Problem]:
    schema: Any = error.schema
    known = [*schema["properties"]]
    if "$ref" in schema:
        known = [*_definition("settings")["properties"], *known]
    instance: Any = error.instance
    for key in instance.keys() - set(known):
        yield Problem.at(tree.keys[(*path, key)], (*path, key), f"unknown key; {_key_hint(key, known)}")


def _key_hint(key: str, known: list[str]) -> str:
    homes = [name.rpartition(".")[0] for name, _ in _keys() if name.endswith(f".{key}")]
    if homes:
        return "it belongs under " + " or ".join(homes)
    near = _nearest(key, known)
    return f"did you mean {near}?" if near else "known here: " + ", ".join(known)


def _mismatch(value: object, text: str, schema: Any) -> str:
    """Why `value`, written as `text`, does not fit the schema node."""
    return f"{_shown(value, text)} is not {_expected(schema)}{_value_hint(value, schema)}"


def _shown(value: object, text: str) -> str:
    if isinstance(value, bool):
        return f"{text} (true or false to YAML)"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "this list"
    return f"'{shorten(value)}'" if isinstance(value, str) else str(value)


def _expected(schema: Any) -> str:
    if "title" in schema:
        return str(schema["title"])
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if schema["type"] == "boolean":
        return "on or off, without quotes"
    return f"a whole number from {schema['minimum']} to {schema['maximum']}"


def _value_hint(value: object, schema: Any) -> str:
    if not isinstance(value, str):
        return ""
    if "enum" in schema:
        near = _nearest(value, schema["enum"])
        return f"; did you mean {near}?" if near else ""
    if schema == _definition("uuid"):
        right = _canonical_uuid(value)
        return f"; write {right}" if right else ""
    return ""


def _canonical_uuid(text: str) -> str | None:
    import uuid

    try:
        return str(uuid.UUID(text))
    except ValueError:
        return None


def _nearest(word: str, known: list[str]) -> str | None:
    import difflib

    return next(iter(difflib.get_close_matches(word[:80].lower(), known, n=1)), None)


def _name_problems(tree: Tree) -> Iterator[Problem]:
    """Names that are too long once LVM has doubled their dashes, which no pattern can count.

    A device-mapper name has at most 127 characters: 80 of the VG, a dash, 40 of the pool or of a
    volume id with four dashes, and a suffix like `_tdata`.
    """
    nodes = {"volume_group": _definition("vg_name"), "thin_pool": _definition("lv_name")}
    for path, place in tree.values.items():
        node = nodes.get(str(path[-1])) if path else None
        if node and len(place.text) + place.text.count("-") > node["maxLength"]:
            yield Problem.at(place, path, _mismatch(place.text, place.text, node))


def _lines(file: str, problems: set[Problem]) -> tuple[str, ...]:
    """One line for each problem in the file's order; if there are too many, the last counts the others."""
    ordered = sorted(problems, key=lambda p: (p.line, p.column, p.what))
    lines = [f"{file}:{p.line}:{p.column}: {_dotted(p.path)}{p.what}" for p in ordered]
    if len(lines) > _SHOWN_PROBLEMS:
        lines[_SHOWN_PROBLEMS:] = [f"{file}: and {len(lines) - _SHOWN_PROBLEMS} more"]
    return tuple(lines)


def _dotted(path: Path) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{shorten(step)}" for step in path)
    return f"{text.removeprefix('.')}: " if text else ""


# -- from values to Config


def _build(values: _Values) -> Config:
    """The configuration from validated values; what they leave out is the schema's default."""
    general = _merge(_defaults(_definition("settings")), values)
    unnamed = {**general, **_defaults(_definition("vm"))}
    vms = {vm_id: _override(unnamed, own) for vm_id, own in values.get("vms", {}).items()}
    return Config(**_settings(general), vms=MappingProxyType(vms), others=_override(unnamed, {}))


def _merge(base: _Values, over: _Values) -> _Values:
    """The keys of `base`, with the values of `over` where it has them; sections key by key."""
    return {
        key: _merge(value, over.get(key, {})) if isinstance(value, dict) else over.get(key, value)
        for key, value in base.items()
    }


def _override(general: _Values, own: _Values) -> Override:
    values = _merge(general, own)
    disks = None if values["disks"] == "all" else tuple(values["disks"])
    policy = Policy(**_settings(values), enabled=values["enabled"], disks=disks)
    return Override(policy, Backend(own["backend"]) if "backend" in own else None)


def _settings(values: _Values) -> _Values:
    """The fields of `Settings`."""
    return {
        "volume_group": values["volume_group"],
        "backend": Backend(values["backend"]),
        "thin_pool": values["thin_pool"],
        "devices": tuple(values["devices"]),
        "margins": _margins(**values["margins"]),
        "retention": _retention(**values["retention"]),
        "copy": _copy(**values["copy"]),
        "hotplug": values["hotplug"],
        "cache": _cache(**values["cache"]),
    }


def _margins(disk: str | int, reserve: str | int, thin_data: str, thin_metadata: str) -> Margins:
    return Margins(
        Amount.parse(disk),
        Amount.parse(reserve),
        parse_percentage(thin_data),
        parse_percentage(thin_metadata),
    )


def _retention(keep_for: str, grace: str, **words: str) -> Retention:
    return Retention(keep_for=parse_duration(keep_for), grace=parse_duration(grace), **words)


def _copy(parallel: int, bandwidth: str | int, nice: int, stall: str) -> Copy:
    rate = None if bandwidth == "unlimited" else parse_size(bandwidth)
    return Copy(parallel, rate, nice, parse_duration(stall))


def _cache(templates: bool, max_size: str | int, keep_for: str) -> Cache:
    return Cache(templates, Amount.parse(max_size), parse_duration(keep_for))
