"""The mode check: finds problems of the configuration and this host, and prints each with its fix.

`facts.py` collects what is there.  Pure functions of that find the problems: of the configuration in this
module, of the host in `check_system.py`, of its volume groups in `check_storage.py`.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping

from localdisk import config as configuration
from localdisk.config import Config
from localdisk.frozen import frozen, plain_values
from localdisk.host import facts as hosts
from localdisk.host.check_system import check_host
from localdisk.host.facts import Host
from localdisk.host.finding import Finding


@frozen
class Report:
    """All findings; `path`: the configuration file."""

    path: str
    is_there: bool  # False: the file does not exist, and the built-in defaults apply
    about_configuration: tuple[Finding, ...]
    about_host: tuple[Finding, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        return self.about_configuration + self.about_host

    @property
    def is_problem(self) -> bool:
        return not _is_good(self.findings)


def check(config: Config, named: str | None, program: str) -> Report:
    """Check `config`, which was read from the file `named` (None: the default file), and this host.

    `program`: the file that vdsm and cron must run.  Raises ConfigUnreadable.
    """
    path = configuration.DEFAULT_PATH if named is None else named
    is_there = os.path.lexists(path)
    found = configuration.places(path) if is_there else {}
    is_used = os.path.realpath(path) == os.path.realpath(configuration.DEFAULT_PATH)
    host = hosts.collect(config, program, tries_starts=is_used)
    untried = () if is_used or not host.rehearsal else (_untried(path, program),)
    return Report(
        path=path,
        is_there=is_there,
        about_configuration=(
            *check_configuration(config, path, found),
            *strangers(config, host, found),
            *untried,
        ),
        about_host=tuple(check_host(config, host)),
    )


def _untried(path: str, program: str) -> Finding:
    used = configuration.DEFAULT_PATH
    fix = f"install -m 0644 {shlex.quote(path)} {used} && {shlex.quote(program)} check"
    what = f"no start was tried with {path}"
    return Finding(what, f"because starts go by {used} alone", fix, is_hint=True)


def as_lines(report: Report) -> str:
    """A line for each finding; if there is none, a line that the configuration or the host is good."""
    lines = list(map(_line, report.about_configuration))
    if _is_good(report.about_configuration):
        state = "good" if report.is_there else "does not exist, the built-in defaults apply"
        lines.append(f"{report.path}: {state}")
    lines += map(_line, report.about_host)
    if _is_good(report.about_host):
        lines.append("this host: good")
    return "".join(f"{line}\n" for line in lines)


def as_json(report: Report) -> str:
    """`{"configuration": PATH or null, "problems": [{"what", "why", "fix", "hint"}, …]}`."""
    rows = []
    for finding in report.findings:
        row = plain_values(finding)
        row["hint"] = row.pop("is_hint")
        rows.append(row)
    shown = {"configuration": report.path if report.is_there else None, "problems": rows}
    return json.dumps(shown, indent=2) + "\n"


def _line(finding: Finding) -> str:
    text = f"{'hint: ' if finding.is_hint else ''}{finding.what}, {finding.why} : {finding.fix}"
    # Names of files and mappings may have any characters.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_good(findings: tuple[Finding, ...]) -> bool:
    return all(finding.is_hint for finding in findings)


# -- the configuration


def check_configuration(config: Config, path: str, where: Mapping[str, str]) -> Iterator[Finding]:
    """Keys that are valid but have no effect; `where`: FILE:LINE:COLUMN by dotted key."""
    for vm_id, vm in config.vms.items():
        key = f"vms.{vm_id}"
        if vm == config.others:
            why = "the general settings are the same"
            yield Finding(f"{where.get(key, path)}: {key} changes nothing", why, "remove the section")
        elif vm.policy.disks is not None and not vm.policy.enabled:
            key += ".disks"
            why = "with enabled: off no disk of the VM is local"
            yield Finding(
                f"{where.get(key, path)}: {key} changes nothing", why, "remove disks or enabled there"
            )
    yield from _cache_of_all(config, where)


def _cache_of_all(config: Config, where: Mapping[str, str]) -> Iterator[Finding]:
    """Keys of a VM's section about templates, which other VMs use, too."""
    for vm_id, vm in config.vms.items():
        for name in ("max_size", "keep_for"):
            key, general = f"vms.{vm_id}.cache.{name}", f"cache.{name}"
            if key in where and getattr(vm.policy.cache, name) != getattr(config.cache, name):
                why = f"a template belongs to no VM, and gc applies {general} to all templates"
                yield Finding(f"{where[key]}: {key} is for one VM alone", why, f"write {general} instead")


def strangers(config: Config, host: Host, where: Mapping[str, str]) -> Iterator[Finding]:
    """Sections of VMs that are unknown here: stopped, no longer on this host, or mistyped."""
    groups_seen = [group for group in host.groups if group.vg]
    if host.known_vms is None or len(groups_seen) < len(config.volume_groups):
        return
    heard_of = host.known_vms | {disk.vm_id for group in groups_seen for disk in group.disks}
    for vm_id in config.vms:
        if vm_id not in heard_of:
            key = f"vms.{vm_id}"
            what = f"{where.get(key, key)}: neither libvirt nor a local disk knows VM {vm_id}"
            why = "so it is stopped, or no longer on this host"
            yield Finding(what, why, "remove the section if the engine has no such VM here", is_hint=True)
