"""The built file, run as an administrator and as vdsm would; `./build.sh` makes it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from localdisk import __version__
from localdisk.zipapp import begin
from tests.pythons import pythons

ROOT = Path(__file__).resolve().parents[2]
ARTIFACT = ROOT / "dist/localdisk"
VM = "11111111-2222-3333-4444-555555555555"


PYTHONS = list(pythons())


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*words], env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def link(tmp_path: Path) -> str:
    """As vdsm's hook links are."""
    path = tmp_path / "after_disk_prepare/50_localdisk"
    path.parent.mkdir()
    path.symlink_to(ARTIFACT)
    return str(path)


def packages() -> list[str]:
    """The names in the zip file inside.  The outer one has few: Python reads them in each run."""
    with zipfile.ZipFile(ARTIFACT) as whole:
        starts = ["__main__.py", *(f"{name}.py" for name in ("begin", "bootstrap", "first_run", "extract"))]
        assert whole.namelist() == [*starts, "packages.zip"]
        return zipfile.ZipFile(io.BytesIO(whole.read("packages.zip"))).namelist()


def test_version() -> None:
    assert run(str(ARTIFACT), "--version").stdout == f"localdisk {__version__}\n"


@pytest.mark.parametrize("python", PYTHONS)
def test_every_python(python: str, tmp_path: Path) -> None:
    """It starts, its compiled packages are there for this Python, and it refuses in one line."""
    start = [python, "-IS", str(ARTIFACT)]
    assert run(*start, "--version").stdout == f"localdisk {__version__}\n"
    assert json.loads(run(*start, "schema").stdout)["title"]
    config = tmp_path / "localdisk.yaml"
    config.write_text("copy: {paralel: 2}\n")
    done = run(*start, "check", "--config", str(config))
    assert done.returncode == 2
    assert f"{config}:1:8: copy.paralel: unknown key; did you mean parallel?" in done.stderr
    data = tmp_path / "domain.xml"
    data.write_text("<domain>")
    environment = {"localdisk": "lvm", "vmId": VM, "_hook_domxml": str(data)}
    done = run(*start, "hook", "before_vm_start", **environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("localdisk: domain XML from vdsm is refused: not XML, ")


def test_this_machine_has_one_of_the_pythons() -> None:
    assert PYTHONS


def test_compiled_packages_for_every_python() -> None:
    names = packages()
    tags = {tag for name in names for tag in re.findall(r"/etree\.(cpython-[0-9]+)-", name)}
    assert tags == {"cpython-{}{}".format(*version) for version in begin.PYTHONS}
    compiled = {name.partition(".")[0] for name in names if name.endswith(".so")}
    assert compiled == {"site-packages/lxml/etree", "site-packages/rpds/rpds"}
    assert sum(name.startswith("site-packages/rpds/rpds.cpython-") for name in names) == 5


def test_help_names_every_mode() -> None:
    out = run(str(ARTIFACT), "--help").stdout
    assert all(
        f"\n    {mode} " in out
        for mode in ("hook", "gc", "status", "check", "install", "uninstall", "helper", "schema")
    )


def test_schema_is_the_projects() -> None:
    assert json.loads(run(str(ARTIFACT), "schema").stdout) == json.loads(
        (ROOT / "schema/localdisk.schema.json").read_text()
    )


@pytest.mark.parametrize("example", ["minimal.yaml", "full.yaml"])
def test_check(example: str, tmp_path: Path) -> None:
    config = tmp_path / "localdisk.yaml"
    config.write_text((ROOT / "examples" / example).read_text())
    done = run(str(ARTIFACT), "check", "--config", str(config))
    assert done.returncode in (0, 1), "whether the host is good, too, is another question"
    assert f"{config}: good\n" in done.stdout
    assert done.stderr == ""
    config.write_text("copy: {paralel: 2}\n")
    done = run(str(ARTIFACT), "--config", str(config), "check")
    assert done.returncode == 2
    assert f"{config}:1:8: copy.paralel: unknown key; did you mean parallel?" in done.stderr


@pytest.mark.parametrize("environment", [{}, {"localdisk": "off"}], ids=["absent", "off"])
def test_hook_without_the_property(link: str, environment: dict[str, str]) -> None:
    """It returns before anything is read: the environment does not even name a data file."""
    done = run(link, **environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_hook_refuses_in_one_line(link: str) -> None:
    Path(link).parent.rename(Path(link).parent.with_name("before_vm_start"))
    link = link.replace("after_disk_prepare", "before_vm_start")
    done = run(link, localdisk="fast", vmId=VM, _hook_domxml="/nonexistent")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "set it to lvm, lvmthin, on or off" in done.stderr


def test_environment_does_not_bend_it(tmp_path: Path) -> None:
    """Variables that shiv and Python obey; a custom property can have any of these names."""
    evil = tmp_path / "evil.py"
    evil.write_text("raise SystemExit('bent')\n")
    names = (
        "SHIV_ENTRY_POINT",
        "SHIV_MODULE",
        "SHIV_INTERPRETER",
        "PYTHONSTARTUP",
        "SHIV_PREPEND_PYTHONPATH",
    )
    for name in names:
        done = run(str(ARTIFACT), "--version", **{name: "evil" if "POINT" in name else str(tmp_path)})
        assert done.stdout == f"localdisk {__version__}\n", name
    assert run(str(ARTIFACT), "--version", PYTHONPATH=str(tmp_path), SHIV_ROOT=str(tmp_path)).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["evil.py"], "it extracted where it was told"


def test_only_what_run_time_needs_is_inside() -> None:
    names = packages()
    assert not [name for name in names if name.startswith(("_bootstrap", "environment.json", "."))]
    assert not [name for name in names if name.endswith((".pxd", ".h", ".pyc", ".pyi")) or "/tests/" in name]
    assert "site-packages/localdisk/schema/localdisk.schema.json" in names
    assert "site-packages/localdisk/examples/minimal.yaml" in names
    assert ARTIFACT.read_bytes().startswith(b"#!/usr/bin/python3 -IS\n")
