"""Checks a host's volume groups and thin pools: pure functions of what `storage_facts.py` has collected."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping

from localdisk.config import Config, Policy
from localdisk.errors import VolumeGroupUnusable
from localdisk.host import files
from localdisk.host.finding import Finding, write_command
from localdisk.host.storage_facts import Group, LvmSettings, Multipath, PoolWatch
from localdisk.units import format_size
from localdisk.volumes import template
from localdisk.volumes.local_disk import State, local_disks
from localdisk.volumes.lvm import MIN_CHUNK, LogicalVolume, VolumeGroup
from localdisk.volumes.removal import pool_keeps_bytes

LARGE_CHUNK = 512 * 1024  # bytes; README makes pools with 64 KiB, LVM makes large ones with up to 2 MiB


def check_group(group: Group, config: Config, settings: LvmSettings | None) -> Iterator[Finding]:
    """Findings that keep disks from being made in a volume group."""
    yield from _devices(group, settings)
    if group.vg is None:
        if not group.hidden and not group.multipaths:
            yield _no_group(group)
        return
    unusable = _unusable(group, group.vg)
    if unusable:
        if not group.hidden:  # a hidden device makes the group partial
            yield unusable
        return
    yield from _activation(group.name, settings)
    for pool in sorted(_pools_in_use(group, config)):
        yield from _pool(group, group.vg, pool, settings)


def check_content(group: Group, config: Config, program_time: float, now: float) -> Iterator[Finding]:
    """Findings about the content of a usable volume group; times in seconds since the epoch."""
    if group.vg is None or _unusable(group, group.vg):
        return
    yield from _allocation(group, group.vg)
    yield from dict.fromkeys(_caches(group.vg, config))
    yield from _discards(group, group.vg, config)
    yield from _nodes(group)
    yield from _dependents(group.vg)
    if now >= program_time:  # otherwise the clock is wrong, not the marks
        yield from _marks(group, now)


# -- the group and its devices


def _no_group(group: Group) -> Finding:
    return Finding(
        f"no volume group {group.name} on this host",
        "it holds the local disks",
        f"vgcreate --metadatasize 128m {group.name} DEVICE # or name another volume_group",
    )


def _devices(group: Group, settings: LvmSettings | None) -> Iterator[Finding]:
    if group.hidden:
        yield _hidden(group, settings)
    if group.duplicates and not group.multipaths:  # a multipath device has the same bytes as its path
        yield _duplicates(group, settings)
    for multipath in group.multipaths:
        yield _multipath(group.name, multipath)


def _hidden(group: Group, settings: LvmSettings | None) -> Finding:
    hidden, why = " ".join(map(shlex.quote, group.hidden)), "so LVM does not see it"
    if settings and settings.use_devices_file:
        fix = f"lvm vgimportdevices {group.name}"
        if group.vg:
            fix = f"for device in {hidden}; do lvm lvmdevices --adddev $device; done"
        return Finding(f"volume group {group.name} is not in LVM's devices file ({hidden})", why, fix)
    accept = [f"a|^{_pattern(device)}$|" for device in group.hidden]
    filters = settings.filters if settings else {}
    fix = _append_command("devices", {name: (*accept, *rest) for name, rest in filters.items()})
    return Finding(f"LVM's filter hides volume group {group.name} ({hidden})", why, fix)


def _duplicates(group: Group, settings: LvmSettings | None) -> Finding:
    copies = " ".join(map(shlex.quote, group.duplicates))
    fix = f"for device in {copies}; do lvm lvmdevices --deldev $device; done"
    if not (settings and settings.use_devices_file):
        # LVM accepts a device if it accepts one of its names: a general "a" would accept them all.
        rest = settings.filters.get("global_filter", ()) if settings else ()
        reject = [f"r|^{_pattern(device)}$|" for device in group.duplicates]
        fix = _append_command(
            "devices", {"global_filter": (*reject, *(word for word in rest if word != "a|.*|"))}
        )
    what = f"LVM sees physical volumes of volume group {group.name} twice (also on {copies})"
    return Finding(what, "so it makes and removes nothing there", f"{fix} # or detach the copy")


def _pattern(device: str) -> str:
    """A pattern for LVM's filters that matches this path, and hardly any other."""
    return re.sub(r"[^\w/-]", ".", device)


def _append_command(section: str, lists: Mapping[str, Iterable[str]]) -> str:
    """The command that appends lists to this host's LVM configuration, where the last value wins."""
    words = (f"{name} = [ {', '.join(json.dumps(word) for word in each)} ]" for name, each in lists.items())
    text = shlex.quote(f"{section} {{ {' '.join(words)} }}")
    return f"printf '%s\\n' {text} >> /etc/lvm/lvmlocal.conf"


def _activation(vg_name: str, settings: LvmSettings | None) -> Iterator[Finding]:
    """Findings if LVM would not activate the group's volumes, or only read-only.

    Lists with tags are not understood here; the trial of a start shows their effect.
    """
    wanted, unwanted = (settings.volume_list, settings.read_only_volume_list) if settings else (None, None)
    if wanted is not None and vg_name not in wanted and not any(word.startswith("@") for word in wanted):
        fix = _append_command("activation", {"volume_list": (*wanted, vg_name)})
        what = f"LVM's activation/volume_list lacks volume group {vg_name}"
        yield Finding(what, "so no local disk is active", fix)
    if unwanted is not None and vg_name in unwanted:
        rest = tuple(word for word in unwanted if word != vg_name)
        fix = _append_command("activation", {"read_only_volume_list": rest})
        what = f"LVM's activation/read_only_volume_list has volume group {vg_name}"
        yield Finding(what, "so no local disk can be written to", fix)


def _multipath(vg_name: str, multipath: Multipath) -> Finding:
    """The names of mappings and WWIDs come from devices and are quoted."""
    name, blacklist = shlex.quote(multipath.name), f"{files.MULTIPATH}/localdisk-{vg_name}.conf"
    lines = ("blacklist {", f'  wwid "{multipath.wwid}"', "}")
    again = (
        f"multipathd reconfigure; udevadm trigger --settle --subsystem-match=block; vgchange -aay {vg_name}"
    )
    steps = (
        write_command(blacklist, lines, "0644"),
        f"vgchange -an {vg_name}",
        f"{{ multipath -f {name} || dmsetup remove --retry {name}; }}",
        f"{{ {again}; }}",
    )
    what = f"multipath device {multipath.name} is under volume group {vg_name}"
    why = "a local disk has only one path, and if that fails, multipath holds all writes back"
    return Finding(what, why, " && ".join(steps))


def _unusable(group: Group, vg: VolumeGroup) -> Finding | None:
    name, devices = vg.vg_name, _devices_option(group)
    try:
        vg.require_usable()
    except VolumeGroupUnusable as error:
        if vg.vg_exported:
            fix = f"vgimport{devices} {name}"
        elif vg.vg_partial:
            restore = f"vgextend{devices} --restoremissing {name} DEVICE if it is back"
            fix = f"vgreduce{devices} --removemissing {name} # if the device is lost for good; {restore}"
        else:
            fix = unshare_command(name)
        what = f"volume group {name} is {error.fields['problem']}"
        return Finding(what, "so no local disk can be made or changed", fix)
    return None


def unshare_command(vg_name: str) -> str:
    """The command that makes a shared volume group local to this host."""
    # LVM of Debian 13 does nothing here, with exit code 0, unless lvmlockd is switched on; it need not run.
    config = "--config 'global{use_lvmlockd=1}'"
    return f"vgchange -y {config} --lock-type none --lock-opt force {vg_name} # if no other host uses it"


def _allocation(group: Group, vg: VolumeGroup) -> Iterator[Finding]:
    """A hint, because somebody may want it so; if a disk finds no room because of it, its trial says so."""
    if vg.unallocatable:
        devices = " ".join(map(shlex.quote, vg.unallocatable))
        what = f"LVM may allocate nothing on {devices} of volume group {vg.vg_name}"
        fix = f"pvchange{_devices_option(group)} -x y {devices}"
        yield Finding(what, "so what is free there does not count", fix, is_hint=True)


# -- thin pools


def _pools_in_use(group: Group, config: Config) -> set[str]:
    """The thin pools of this group that have thin disks or will have some, and other configured pools."""
    assert group.vg  # noqa: S101 (asked by check_group)
    overrides = (config.others, *config.vms.values())
    policies = [override.policy for override in overrides if override.policy.volume_group == group.name]
    wanted = {policy.pool for policy in policies if policy.pool}
    named = {policy.thin_pool for policy in policies if group.vg.find(policy.thin_pool)}
    return wanted | named | {disk.lv.pool_lv for disk in group.disks if disk.lv.pool_lv}


def _pool(group: Group, vg: VolumeGroup, name: str, settings: LvmSettings | None) -> Iterator[Finding]:
    pool, full, devices = vg.find(name), f"{vg.vg_name}/{name}", _devices_option(group)
    # lvcreate 2.03.16 refuses --errorwhenfull, whatever its manual page says
    create = f"lvcreate --type thin-pool --chunksize 64k -l 90%FREE -n {name}{devices} {vg.vg_name}"
    create += f" && lvchange --errorwhenfull y{devices} {full}"
    if pool is None:
        yield Finding(f"no thin pool {full}", "thin local disks are made in it", create)
    elif not pool.is_thin_pool:
        rename = f"lvrename{devices} {vg.vg_name} {name} {name}.old"
        what = f"{full} is no thin pool"
        yield Finding(what, "thin local disks are made in it", f"{rename} && {create}")
    else:
        yield from _thin_pool(group, full, pool, settings)


def _thin_pool(
    group: Group, full: str, pool: LogicalVolume, settings: LvmSettings | None
) -> Iterator[Finding]:
    change = f"lvchange{_devices_option(group)}"
    if not pool.lv_active:
        why = "so LVM does not report how full it is, and no thin disk is made"
        fix = f"{change} --activate n {full}_tmeta {full}_tdata; {change} --activate y {full}"
        yield Finding(f"thin pool {full} is not active", why, fix)
    elif pool.data_percent is None or pool.metadata_percent is None:
        repair = f"lvconvert{_devices_option(group)} --repair {full}"
        what = f"thin pool {full} is active, but LVM does not report how full it is"
        # LVM checks the metadata when it activates the pool, and refuses if they must be repaired.
        again = f"{change} --activate y {full}"
        fix = f"{change} --activate n {full} && {again} || {repair} && {again}"
        yield Finding(what, "its metadata may be damaged", fix)
    if not pool.zero:
        why = "a disk would show other disks' old data"
        yield Finding(f"thin pool {full} does not zero new blocks", why, f"{change} --zero y {full}")
    if pool.chunk_size > LARGE_CHUNK:
        what = f"thin pool {full} gives disks blocks of {format_size(pool.chunk_size)}"
        why = f"scattered data of a guest can take up to {pool.chunk_size // MIN_CHUNK} times their size"
        yield Finding(what, why, "when you make the pool anew, use lvcreate --chunksize 64k", is_hint=True)
    watch = group.pools.get(pool.lv_name)
    if watch and pool.lv_active and not _is_safe_when_full(watch, settings):
        what = f"thin pool {full} neither grows by itself nor fails writes when it is full"
        why = "every VM on it would hang for a minute or more"
        yield Finding(what, why, f"{change} --errorwhenfull y {full}")


def _is_safe_when_full(watch: PoolWatch, settings: LvmSettings | None) -> bool:
    grows = watch.is_monitored and settings is not None and settings.autoextend_threshold < 100
    return watch.error_when_full or grows


# -- the template cache


def _caches(vg: VolumeGroup, config: Config) -> Iterator[Finding]:
    """Findings if `cache.max_size` is more than the margins leave; a policy may repeat another's finding."""
    for policy in config.policies:
        if not policy.cache.templates or policy.volume_group != vg.vg_name:
            continue
        pool = vg.find(policy.thin_pool)
        if not policy.pool:
            left = vg.vg_size - policy.margins.reserve.of(vg.vg_size)
            place = f"volume group {vg.vg_name}"
            yield from _cache(policy, place, vg.vg_size, "margins.reserve", left)
        elif pool and pool.is_thin_pool:
            left = int(pool.lv_size * policy.margins.thin_data / 100)
            place = f"thin pool {vg.vg_name}/{pool.lv_name}"
            yield from _cache(policy, place, pool.lv_size, "margins.thin_data", left)


def _cache(policy: Policy, place: str, size: int, margin: str, left: int) -> Iterator[Finding]:
    """`left`: how many of the `size` bytes of `place` the margin leaves."""
    limit = policy.cache.max_size.of(size)
    if limit > left + 1:  # one byte more may come from rounding of percentages
        what = f"cache.max_size is {format_size(limit)} of {place}, {margin} leaves {format_size(left)}"
        why = f"so the cache can never use {format_size(limit - left)} of it"
        fix = f"write cache.max_size: {100 * (left + 1) // size}% or less in {files.CONFIG}"
        yield Finding(what, why, fix)


# -- erasing


def _discards(group: Group, vg: VolumeGroup, config: Config) -> Iterator[Finding]:
    """Findings if `erase: discard` would leave the bytes on the device."""
    mine = [policy for policy in config.policies if policy.volume_group == vg.vg_name]
    fix = f"set retention.erase: zero in {files.CONFIG}"
    erased = [policy for policy in mine if policy.retention.erase == "discard"]
    if any(not policy.pool for policy in erased) and group.no_discard:
        what = f"{', '.join(group.no_discard)} under volume group {vg.vg_name} cannot discard"
        yield Finding(what, "erase: discard would leave the bytes there", fix)
    for pool in sorted(_pools_in_use(group, config)) if erased else ():
        lv = vg.find(pool)
        problem = pool_keeps_bytes(lv) if lv and lv.is_thin_pool and lv.lv_active else ""
        if problem:
            yield Finding(f"in volume group {vg.vg_name}, {problem}", "erase: discard leaves the bytes", fix)


# -- local disks and templates


def _dependents(vg: VolumeGroup) -> Iterator[Finding]:
    """Other volumes that LVM would remove together with a disk; the disk is kept because of them."""
    found = [("local disk", disk.lv, disk.state is State.DELETING) for disk in local_disks(vg)]
    found += [("template LV", each.lv, False) for each in template.templates(vg)]
    for kind, lv, is_due in found:
        if lv.dependents:
            what = f"{', '.join(lv.dependents)} depends on {kind} {vg.vg_name}/{lv.lv_name}"
            fix = f"remove {lv.dependents[0]} when nobody needs it"
            yield Finding(what, f"so the {kind} is not removed", fix, is_hint=not is_due)


def _nodes(group: Group) -> Iterator[Finding]:
    if group.misowned:
        matches = " ".join(f"--name-match={path}" for path in group.misowned)
        what = f"{len(group.misowned)} device node(s) of local disks are not vdsm:qemu, mode 0660"
        fix = f"udevadm control --reload && udevadm trigger --settle --action=change {matches}"
        yield Finding(f"{what} (first: {group.misowned[0]})", "their VMs cannot use them", fix)


def _marks(group: Group, now: float) -> Iterator[Finding]:
    """Disks and template LVs with a mark in the future: gc never removes them."""
    marked = [("local disk", each.volume_id, "STOPPED", each.stopped) for each in group.disks]
    marked += [("local disk", each.volume_id, "UNNEEDED", each.unneeded) for each in group.disks]
    cached = template.templates(group.vg) if group.vg else ()
    marked += [("template LV", each.name, "USED", each.used) for each in cached]
    for kind, lv_name, tag, since in marked:
        if since is None or since <= now:
            continue
        full = f"{group.name}/{lv_name}"
        change = f"lvchange{_devices_option(group)} --deltag {tag}_{since} --addtag {tag}_$(date +%s) {full}"
        what = f"{kind} {full} has the tag {tag}_{since}, a time in the future"
        yield Finding(what, "gc never removes it", f"{change} # if date shows the right time")


def _devices_option(group: Group) -> str:
    return f" --devices {shlex.quote(','.join(group.devices))}" if group.devices else ""
