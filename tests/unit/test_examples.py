"""`examples/`: the Ansible role agrees with itself and with the program, engine.md with README.

`python -m tests.unit.test_examples` writes the role's table of variables anew.  What the role does is tried
in tests/kernel/test_ansible.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from localdisk import config
from localdisk.hook import prefetch
from localdisk.host import files as host_files
from localdisk.host import install

ROOT = Path(__file__).resolve().parents[2]
ANSIBLE = ROOT / "examples/ansible"
ROLE = ANSIBLE / "roles/localdisk"
ROLE_README = ROLE / "README.md"
ENGINE = ROOT / "examples/engine.md"
PROPERTY = re.compile(r"localdisk=(\^\S*?\$)")
OLDER_PROPERTY = "^(lvm|lvmthin)$"  # what vdsm's own hook asks for
TABLE = re.compile(r"(<!-- reference: variables -->\n).*?(<!-- end -->)", re.S)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def options() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = load(ROLE / "meta/argument_specs.yml")["argument_specs"]["main"][
        "options"
    ]
    return found


def filled(text: str) -> str:
    """The role's README with the table of its variables as argument_specs.yml has them."""
    rows = ["| variable | type | default | meaning |", "|---|---|---|---|"]
    for name, option in options().items():
        default = str(option["default"]).lower() if option["type"] == "bool" else option["default"]
        meaning = re.sub(r"\b[CI]\(([^)]*)\)", r"`\1`", option["description"])
        kind = f"list of {option['elements']}s" if option["type"] == "list" else option["type"]
        shown = '""' if default == "" else default
        rows.append(f"| `{name}` | {kind} | `{shown}` | {meaning} |")
    found = TABLE.search(text)
    assert found
    return text[: found.end(1)] + "".join(f"{row}\n" for row in rows) + text[found.start(2) :]


def test_every_yaml_file_can_be_read() -> None:
    files = [path for path in ANSIBLE.rglob("*") if path.is_file() and path.suffix != ".md"]
    assert len(files) > 8
    for path in files:
        assert path.suffix == ".yml"
        assert path.read_text().startswith("---\n"), path
        assert load(path) is not None, path


def test_every_variable_is_specified() -> None:
    defaults = load(ROLE / "defaults/main.yml")
    assert {name: option["default"] for name, option in options().items()} == defaults
    assert all(name.startswith("localdisk_") for name in defaults)


def test_every_variable_is_explained() -> None:
    """`python -m tests.unit.test_examples` writes the table again."""
    text = ROLE_README.read_text()
    assert text == filled(text)


def test_the_inventory_uses_variables_of_the_role() -> None:
    group = load(ANSIBLE / "inventory.yml")["localdisk_hosts"]
    used = set(group["vars"]).union(*group["hosts"].values())
    assert {name for name in used if not name.startswith("ansible_")} <= set(options())


def test_the_inventory_s_configuration_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "localdisk.yaml"
    group = load(ANSIBLE / "inventory.yml")["localdisk_hosts"]
    path.write_text(yaml.safe_dump(group["vars"]["localdisk_config"]))
    path.chmod(0o644)
    assert config.load(str(path)).others.policy.retention.on_stop == "keep"


def test_an_empty_configuration_is_accepted(tmp_path: Path) -> None:
    """What the role writes where localdisk_config is empty."""
    path = tmp_path / "localdisk.yaml"
    path.write_text("# a comment\n{}\n")
    path.chmod(0o644)
    assert config.load(str(path)) == config.load(None)


def test_the_role_knows_the_program_s_places_and_defaults() -> None:
    known = load(ROLE / "vars/main.yml")
    assert known["localdisk_program"] == host_files.PROGRAM
    assert known["localdisk_config_file"] == host_files.CONFIG
    policy = config.load(None).others.policy
    assert f"default('{policy.volume_group}')" in known["localdisk_volume_group"]
    assert f"default('{policy.thin_pool}')" in known["localdisk_thin_pool"]


def test_the_role_knows_install_s_words() -> None:
    (task,) = (task for task in load(ROLE / "tasks/host.yml") if task["name"] == "Install")
    (words,) = re.findall("'(.*)' not in", task["changed_when"])
    assert words in Path(install.__file__).read_text()


def test_the_role_knows_prefetch_s_words() -> None:
    (task,) = load(ROLE / "tasks/templates.yml")
    (words,) = re.findall("'(.*)' not in", task["changed_when"])
    assert words in Path(prefetch.__file__).read_text()


def test_the_engine_s_property_is_one() -> None:
    readme = set(PROPERTY.findall((ROOT / "README.md").read_text()))
    assert len(readme) == 1
    assert set(PROPERTY.findall(ENGINE.read_text())) == readme | {OLDER_PROPERTY}
    (pattern,) = readme
    for value in ("lvm", "lvmthin", "on", "off"):
        assert re.match(pattern, value)


def test_the_tests_that_the_engine_s_table_names_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", ENGINE.read_text())
    assert len(named) > 8
    tests = ROOT / "tests/kernel"
    assert [each for each in named if f"\ndef {each[1]}(" not in (tests / each[0]).read_text()] == []


def test_every_note_of_the_engine_s_table_names_a_test() -> None:
    table, _, notes = ENGINE.read_text().partition("These tests in `tests/kernel`")
    in_table = set(re.findall(r"\((\d)\)", table.partition("## 3.")[2]))
    assert in_table == set(re.findall(r"^(\d)\. `test_", notes.partition("## 4.")[0], re.M))
    assert len(in_table) > 6


if __name__ == "__main__":
    ROLE_README.write_text(filled(ROLE_README.read_text()))
