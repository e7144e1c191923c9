"""A snapshot and the counters as metrics in Prometheus' text format, for node_exporter's textfile collector.

METRICS lists all metrics: name, meaning, labels, and how the values are computed from a snapshot or counters.
The table in docs/operations.md, examples/metrics/ and their tests follow this list.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/; names and units:
https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from localdisk import __version__, atomic_file, lock, uncached
from localdisk.backend import Backend
from localdisk.counters import Counters
from localdisk.errors import MetricsUnwritable
from localdisk.status import problems
from localdisk.status.snapshot import CacheUse, Group, Pool, Row, Snapshot, TemplateRow
from localdisk.volumes.local_disk import State
from localdisk.volumes.progress import NOT_MADE, PHASES, WAITING

STATES = (*PHASES, "running", *(state.value for state in State))
TEMPLATE_STATES = (*PHASES, State.UNFINISHED.value, State.READY.value)

# Shown as 0 before they happen: for Prometheus' increase(), a series that begins with 1 has not increased.
REASONS = (
    "copy_broken_off",
    "preparation_broken_off",
    "no_space",
    "allocation_off",
    "metadata_area_full",
    "thin_pool_full",
    "thin_pool_at_threshold",
    "no_volume_group",
    "volume_group_unusable",
    "command_failed",
    "command_timeout",
)

UNCACHED = (*uncached.REASONS, "cache_full", "no_space", "thin_pool_full", "thin_pool_at_threshold")

Samples = Mapping[tuple[str, ...], float]  # values of the metric, by the values of its labels
Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Metric(Generic[Seen]):
    """A metric; `meaning` is one line.  If `samples` returns nothing, the metric is left out."""

    name: str
    meaning: str
    labels: tuple[str, ...]
    samples: Callable[[Seen], Samples]

    @property
    def type(self) -> str:
        return "counter" if self.name.endswith("_total") else "gauge"

    def text(self, seen: Seen) -> str:
        lines = [f"{self.name}{self._labelled(key)} {value}\n" for key, value in self.samples(seen).items()]
        head = f"# HELP {self.name} {self.meaning}\n# TYPE {self.name} {self.type}\n"
        return head + "".join(lines) if lines else ""

    def _labelled(self, values: tuple[str, ...]) -> str:
        pairs = [f'{label}="{_escaped(value)}"' for label, value in zip(self.labels, values)]
        return f"{{{','.join(pairs)}}}" if pairs else ""


def render(snapshot: Snapshot | None, counters: Counters, config_valid: bool) -> str:
    """All metrics; without a snapshot, those that do not need one."""
    run = _Run(config_valid, snapshot is not None)
    texts = [metric.text(run) for metric in _OF_RUN]
    texts += [metric.text(snapshot) for metric in _OF_SNAPSHOT if snapshot]
    texts += [metric.text(counters) for metric in _OF_COUNTERS]
    return "".join(texts)


def reference() -> str:
    """Markdown table of all metrics; docs/operations.md has it."""
    rows = [f"| `{_signature(metric)}` | {metric.type} | {metric.meaning} |\n" for metric in METRICS]
    return "| metric | type | meaning |\n|---|---|---|\n" + "".join(rows)


def _signature(metric: Metric[Any]) -> str:
    return metric.name + (f"{{{','.join(metric.labels)}}}" if metric.labels else "")


def _escaped(value: str) -> str:
    valid = value.encode(errors="replace").decode()
    return valid.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# -- how values are computed


@dataclass(frozen=True)
class _Run:
    """What this run of `status` could do."""

    config_valid: bool
    has_snapshot: bool


def _one(value: float) -> Samples:
    return {(): value}


def _groups(value: Callable[[Group], float]) -> Callable[[Snapshot], Samples]:
    return lambda snapshot: {(group.name,): value(group) for group in snapshot.volume_groups}


def _pools(value: Callable[[Pool], float | None]) -> Callable[[Snapshot], Samples]:
    """One value for each thin pool of which LVM reports it."""

    def samples(snapshot: Snapshot) -> Samples:
        pools = [(group.name, pool) for group in snapshot.volume_groups for pool in group.pools]
        found = {(vg, pool.name): value(pool) for vg, pool in pools}
        return {key: number for key, number in found.items() if number is not None}

    return samples


def _ratio(percent: float | None) -> float | None:
    return None if percent is None else round(percent / 100, 6)


def _counted(words: Iterable[str], all_words: Iterable[str]) -> dict[str, int]:
    """How often each word occurs; 0 for those of `all_words` that do not occur."""
    counts = dict.fromkeys(all_words, 0)
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return counts


def _disks(snapshot: Snapshot) -> Samples:
    return _by_state(snapshot, snapshot.disks, STATES)


def _templates(snapshot: Snapshot) -> Samples:
    return _by_state(snapshot, snapshot.templates, TEMPLATE_STATES)


def _by_state(snapshot: Snapshot, rows: Iterable[Row | TemplateRow], states: Iterable[str]) -> Samples:
    """How many of `rows` are in each state, by volume group."""
    found: dict[str, list[str]] = {group.name: [] for group in snapshot.volume_groups}
    for row in rows:
        found.setdefault(row.vg, []).append(row.state)
    return {(vg, state): count for vg, its in found.items() for state, count in _counted(its, states).items()}


def _caches(value: Callable[[CacheUse], int]) -> Callable[[Snapshot], Samples]:
    """One value for each volume group and thin pool in which the cache is on, or has template LVs."""

    def samples(snapshot: Snapshot) -> Samples:
        groups = snapshot.volume_groups
        found = [((group.name, "lvm"), group.cache) for group in groups]
        found += [((group.name, Backend.THIN.value), group.pool.cache) for group in groups if group.pool]
        return {key: value(cache) for key, cache in found if cache}

    return samples


def _disk_sizes(snapshot: Snapshot) -> Samples:
    """The sizes of disks whose volume was made.

    The labels do not change from the making of a disk to its removal, so each disk has one series.  Its
    state, its VM's name and its name in the VM can change, and each change would begin another series.
    """
    made = (row for row in snapshot.disks if row.state not in NOT_MADE)
    return {(row.vg, row.vm, row.volume): row.size for row in made}


def _copies(snapshot: Snapshot) -> Samples:
    rows: tuple[Row | TemplateRow, ...] = (*snapshot.disks, *snapshot.templates)
    phases = (phase for phase in map(_phase, rows) if phase)
    return {(phase,): count for phase, count in _counted(phases, PHASES).items()}


def _phase(row: Row | TemplateRow) -> str:
    """The phase of a disk or template LV that is being prepared, "" for others.

    The lock file may have no progress yet; then the state is the phase.
    """
    if row.copy:
        return row.copy.phase
    return row.state if row.state in PHASES else ""


def _longest_wait(snapshot: Snapshot) -> Samples:
    rows: tuple[Row | TemplateRow, ...] = (*snapshot.disks, *snapshot.templates)
    waits = (snapshot.at - row.copy.since for row in rows if row.copy and row.copy.phase == WAITING)
    return _one(max((0, *waits)))


def _problems(snapshot: Snapshot) -> Samples:
    kinds = (problem.kind for problem in snapshot.problems)
    return {(kind,): count for kind, count in _counted(kinds, problems.KINDS).items()}


def _failures(counters: Counters) -> Samples:
    return _by_reason(REASONS, counters.failures)


def _uncached(counters: Counters) -> Samples:
    return _by_reason(UNCACHED, counters.uncached)


def _by_reason(reasons: Iterable[str], counted: Mapping[str, int]) -> Samples:
    counts = {**dict.fromkeys(reasons, 0), **counted}
    return {(reason,): count for reason, count in counts.items()}


# -- the metrics

_VG = ("volume_group",)
_POOL = ("volume_group", "thin_pool")

_OF_RUN: tuple[Metric[_Run], ...] = (
    Metric(
        "localdisk_build_info",
        "Always 1; the version of localdisk is the label.",
        ("version",),
        lambda _run: {(__version__,): 1},
    ),
    Metric(
        "localdisk_config_valid",
        "1: the configuration is valid; 0: it is refused, and no VM starts from local disks.",
        (),
        lambda run: _one(int(run.config_valid)),
    ),
    Metric(
        "localdisk_snapshot_taken",
        "1: the host was read; 0: no volume group could be read, and metrics of groups, disks and problems "
        "are missing.",
        (),
        lambda run: _one(int(run.has_snapshot)),
    ),
)

_OF_SNAPSHOT: tuple[Metric[Snapshot], ...] = (
    Metric(
        "localdisk_volume_group_size_bytes", "Size of the volume group.", _VG, _groups(lambda vg: vg.size)
    ),
    Metric(
        "localdisk_volume_group_free_bytes",
        "Bytes of the group that no logical volume has, the reserve included.",
        _VG,
        _groups(lambda vg: vg.free),
    ),
    Metric(
        "localdisk_volume_group_reserve_bytes",
        "Bytes of the group that are kept free of new disks (margins.reserve).",
        _VG,
        _groups(lambda vg: vg.reserve),
    ),
    Metric(
        "localdisk_volume_group_metadata_used_ratio",
        "Used part of the area in which LVM describes the group and its volumes, 0 to 1.",
        _VG,
        _groups(lambda vg: round(vg.metadata_percent / 100, 6)),
    ),
    Metric("localdisk_thin_pool_size_bytes", "Size of the thin pool.", _POOL, _pools(lambda pool: pool.size)),
    Metric(
        "localdisk_thin_pool_data_used_ratio",
        "Used part of the pool's data, 0 to 1.",
        _POOL,
        _pools(lambda pool: _ratio(pool.data_percent)),
    ),
    Metric(
        "localdisk_thin_pool_data_limit_ratio",
        "If a new thin disk would use more of the pool's data than this, it is not made (margins.thin_data), "
        "0 to 1.",
        _POOL,
        _pools(lambda pool: _ratio(pool.data_limit)),
    ),
    Metric(
        "localdisk_thin_pool_metadata_used_ratio",
        "Used part of the pool's metadata, 0 to 1.",
        _POOL,
        _pools(lambda pool: _ratio(pool.metadata_percent)),
    ),
    Metric(
        "localdisk_thin_pool_metadata_limit_ratio",
        "If more of the pool's metadata is used than this, no new thin disk is made (margins.thin_metadata), "
        "0 to 1.",
        _POOL,
        _pools(lambda pool: _ratio(pool.metadata_limit)),
    ),
    Metric(
        "localdisk_disks",
        "Local disks, and those about to be made, by state: " + ", ".join(STATES) + ".",
        ("volume_group", "state"),
        _disks,
    ),
    Metric(
        "localdisk_disk_size_bytes",
        "Size of the local disk; disk: its volume id; vm: the VM's id, empty if the disk was set aside to be "
        "erased.",
        ("volume_group", "vm", "disk"),
        _disk_sizes,
    ),
    Metric(
        "localdisk_templates",
        "Template LVs, and those about to be made, by state: " + ", ".join(TEMPLATE_STATES) + ".",
        ("volume_group", "state"),
        _templates,
    ),
    Metric(
        "localdisk_template_bytes",
        "Bytes that template LVs take of the volume group (backend lvm) or of the thin pool (lvmthin).",
        ("volume_group", "backend"),
        _caches(lambda cache: cache.used),
    ),
    Metric(
        "localdisk_cache_limit_bytes",
        "Bytes that template LVs may take of the volume group or thin pool (cache.max_size).",
        ("volume_group", "backend"),
        _caches(lambda cache: cache.limit),
    ),
    Metric(
        "localdisk_copies",
        "Disks and template LVs being prepared, by phase: " + ", ".join(PHASES) + ".",
        ("phase",),
        _copies,
    ),
    Metric(
        "localdisk_copy_longest_wait_seconds",
        "How long the copy that waits longest has waited for its turn so far; 0: no copy waits.",
        (),
        _longest_wait,
    ),
    Metric(
        "localdisk_problems",
        "Problems that localdisk status shows, by kind: " + ", ".join(problems.KINDS) + ".",
        ("kind",),
        _problems,
    ),
    Metric(
        "localdisk_unseen",
        "How many things, such as libvirt, could not be read; their problems are missing.",
        (),
        lambda snapshot: _one(len(snapshot.unseen)),
    ),
)

_OF_COUNTERS: tuple[Metric[Counters], ...] = (
    Metric(
        "localdisk_copies_total",
        "Copies completed since boot, copies of templates included.",
        (),
        lambda sums: _one(sums.copies),
    ),
    Metric(
        "localdisk_copied_bytes_total",
        "Bytes that completed copies wrote since boot.",
        (),
        lambda sums: _one(sums.copied_bytes),
    ),
    Metric(
        "localdisk_copy_duration_seconds_total",
        "Time that all completed copies since boot took together.",
        (),
        lambda sums: _one(sums.copy_seconds),
    ),
    Metric(
        "localdisk_template_hits_total",
        "Disks that were made from a template LV since boot; the first disk of each template LV counts, too.",
        (),
        lambda sums: _one(sums.template_hits),
    ),
    Metric(
        "localdisk_template_misses_total",
        "Template LVs that were made since boot, each from a template on shared storage.",
        (),
        lambda sums: _one(sums.template_misses),
    ),
    Metric(
        "localdisk_template_evictions_total",
        "Template LVs that were removed since boot, for room or by gc.",
        (),
        lambda sums: _one(sums.templates_evicted),
    ),
    Metric(
        "localdisk_uncached_disks_total",
        "Disks that were copied without a template LV since boot although the cache is on, by reason.",
        ("reason",),
        _uncached,
    ),
    Metric(
        "localdisk_failures_total",
        "Starts and stops refused or broken off since boot, by reason.",
        ("reason",),
        _failures,
    ),
    Metric(
        "localdisk_gc_runs_total",
        "Completed runs of localdisk gc since boot.",
        (),
        lambda sums: _one(sums.gc_runs),
    ),
    Metric(
        "localdisk_gc_last_run_timestamp_seconds",
        "When gc was last completed, in seconds since the epoch; 0: not since boot.",
        (),
        lambda sums: _one(sums.gc_last_run),
    ),
    Metric(
        "localdisk_gc_last_success_timestamp_seconds",
        "When gc last had neither doubts nor failures, in seconds since the epoch; 0: not since boot.",
        (),
        lambda sums: _one(sums.gc_last_success),
    ),
    Metric(
        "localdisk_gc_removed_disks_total",
        "Local disks that gc removed since boot.",
        (),
        lambda sums: _one(sums.gc_removed),
    ),
    Metric(
        "localdisk_gc_removed_bytes_total",
        "Size of the local disks that gc removed since boot.",
        (),
        lambda sums: _one(sums.gc_removed_bytes),
    ),
)

METRICS: tuple[Metric[Any], ...] = (*_OF_RUN, *_OF_SNAPSHOT, *_OF_COUNTERS)


# -- the file


def write(path: str, text: str) -> None:
    """Replace the file `path` by `text`, with mode 0644; readers see the old file or the new one.

    On failure raises MetricsUnwritable: `path` is unchanged, and no temporary file is left.  If a run is
    killed, the next one replaces its temporary file, whose name is fixed; one run at a time writes.
    """
    try:
        with lock.holding(os.path.join(lock.RUN, "metrics.lock"), time.sleep):
            _require_replaceable(path)
            atomic_file.replace(path, text.encode(), 0o644, (os.geteuid(), os.getegid()))
    except OSError as error:
        raise MetricsUnwritable(path=path, problem=error.strerror or error) from error


def _require_replaceable(path: str) -> None:
    """Raise MetricsUnwritable for anything but a regular file, such as /dev/null or /dev/stdout."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise MetricsUnwritable(path=path, problem="it is not a regular file")
