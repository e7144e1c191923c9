"""What is wrong with the configuration and this host, one line a problem, with the command that fixes it.

`check` looks (`facts.py`) and judges: the configuration here, the host in `check_system.py` and its volume
groups in `check_storage.py`.  The judging is pure functions of frozen data.
"""

from __future__ import annotations

import json
import os
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
    """What was found; `path` is the configuration's."""

    path: str
    is_there: bool  # False: the built-in defaults hold
    about_configuration: tuple[Finding, ...]
    about_host: tuple[Finding, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        return self.about_configuration + self.about_host

    @property
    def is_problem(self) -> bool:
        return not _is_good(self.findings)


def check(config: Config, named: str | None, program: str) -> Report:
    """Judge `config`, which is from the file `named` (None: from the default one), and the host it is for.

    `program` is the file that vdsm and cron are to run.  Raises ConfigUnreadable.
    """
    path = configuration.DEFAULT_PATH if named is None else named
    is_there = os.path.lexists(path)
    found = configuration.places(path) if is_there else {}
    host = hosts.look(config, program)
    return Report(
        path=path,
        is_there=is_there,
        about_configuration=(*check_configuration(config, path, found), *strangers(config, host, found)),
        about_host=tuple(check_host(config, host)),
    )


def as_lines(report: Report) -> str:
    """A line for each finding; one for the configuration and one for the host where these are good."""
    lines = list(map(_line, report.about_configuration))
    if _is_good(report.about_configuration):
        state = "good" if report.is_there else "not there, the built-in defaults hold"
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
    # Names of files and mappings are whatever somebody made them.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_good(findings: tuple[Finding, ...]) -> bool:
    return all(finding.is_hint for finding in findings)


# -- the configuration


def check_configuration(config: Config, path: str, where: Mapping[str, str]) -> Iterator[Finding]:
    """What is valid but does not do what it says; `where` has FILE:LINE:COLUMN by dotted key."""
    for vm_id, vm in config.vms.items():
        key = f"vms.{vm_id}"
        if vm == config.others:
            why = "what it says holds without it, too"
            yield Finding(f"{where.get(key, path)}: {key} changes nothing", why, "take the section out")
        elif vm.policy.disks is not None and not vm.policy.enabled:
            key += ".disks"
            why = "with enabled: off no disk of the VM is local"
            yield Finding(
                f"{where.get(key, path)}: {key} changes nothing", why, "take disks or enabled out there"
            )
    yield from _cache_of_all(config, where)


def _cache_of_all(config: Config, where: Mapping[str, str]) -> Iterator[Finding]:
    """What a VM's section says of templates that other VMs start from, too."""
    for vm_id, vm in config.vms.items():
        for name in ("max_size", "keep_for"):
            key, general = f"vms.{vm_id}.cache.{name}", f"cache.{name}"
            if key in where and getattr(vm.policy.cache, name) != getattr(config.cache, name):
                why = f"a template is no VM's own, and gc goes by {general} for all of them"
                yield Finding(f"{where[key]}: {key} is for one VM alone", why, f"write {general} instead")


def strangers(config: Config, host: Host, where: Mapping[str, str]) -> Iterator[Finding]:
    """Sections of VMs that nobody here has heard of: they may be stopped, or gone, or mistyped."""
    groups_seen = [group for group in host.groups if group.vg]
    if host.known_vms is None or len(groups_seen) < len(config.volume_groups):
        return
    heard_of = host.known_vms | {disk.vm_id for group in groups_seen for disk in group.disks}
    for vm_id in config.vms:
        if vm_id not in heard_of:
            key = f"vms.{vm_id}"
            what = f"{where.get(key, key)}: neither libvirt nor a local disk knows VM {vm_id}"
            why = "so it is stopped, or not on this host any more"
            yield Finding(what, why, "take the section out if the engine has no such VM here", is_hint=True)
