from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from localdisk import atomic_file, cli, config, counters, errors, lock, uncached
from localdisk.counters import Counters
from localdisk.errors import Error, NoVolumeGroup
from localdisk.frozen import replace
from localdisk.status import metrics, problems, snapshot
from localdisk.status.problems import Problem
from localdisk.status.snapshot import CacheUse, Copy, Group, Next, Pool, Row, Snapshot, TemplateRow
from localdisk.volumes.progress import PHASES
from tests.fakes import IMAGE, OTHER_VOLUME, VM, VOLUME

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "metrics"
DATA = ROOT / "tests" / "data" / "metrics"

NOW = 1_760_000_000
POOL = Pool("pool0", 900 << 30, 12.5, 10.94, 90.0, 80.0, CacheUse(3 << 30, 450 << 30))
GROUP = Group("ovirt-local", 1 << 40, 100 << 30, 10 << 30, POOL, CacheUse(20 << 30, 1 << 39))
SUMS = Counters(
    copies=3,
    copied_bytes=5 << 40,
    copy_seconds=1234.567,
    template_hits=9,
    template_misses=2,
    templates_evicted=1,
    failures={"no_space": 2, "source_changed": 1},
    uncached={"no_template": 5, "disk_busy": 1},
    gc_runs=7,
    gc_last_run=NOW - 60,
    gc_last_success=NOW - 660,
    gc_removed=4,
    gc_removed_bytes=1 << 36,
)

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


def row(volume: str = VOLUME, state: str = "ready", copy: Copy | None = None, vm: str = VM) -> Row:
    return Row(
        vg="ovirt-local",
        vm=vm,
        vm_name="web",
        disk="vda",
        image=IMAGE,
        volume=volume,
        size=64 << 20,
        backend="lvm",
        state=state,
        open=False,
        used=None,
        stopped=None,
        copy=copy,
        next=Next("keep", None, ""),
    )


def copying(phase: str, since: int = NOW) -> Copy:
    return Copy(phase, since, 0.5, 1 << 20, 1 << 20, 1)


def shelved(state: str = "ready", copy: Copy | None = None) -> TemplateRow:
    return TemplateRow(
        vg="ovirt-local",
        volume=OTHER_VOLUME,
        name=VOLUME,
        size=64 << 20,
        backend="lvm",
        state=state,
        open=False,
        holds=64 << 20,
        last_used=NOW,
        copy=copy,
        next=Next("keep", None, ""),
    )


def seen(
    *rows: Row,
    templates: tuple[TemplateRow, ...] = (),
    problems: tuple[Problem, ...] = (),
    unseen: tuple[str, ...] = (),
) -> Snapshot:
    return Snapshot(NOW, (GROUP,), rows, templates, problems, unseen)


def rendered(found: Snapshot | None, sums: Counters = SUMS, config_valid: bool = True) -> Values:
    return parsed(metrics.render(found, sums, config_valid))


def parsed(text: str) -> Values:
    """The series of a text in Prometheus' format, none of them twice; an empty label is none."""
    values: Values = {}
    for line in text.split("\n"):
        if line and not line.startswith("#"):
            found = re.fullmatch(r'(\w+)(?:\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\})? (\S+)', line)
            assert found, line
            pairs = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', found[2] or "")
            key = (found[1], frozenset((name, _unescaped(value)) for name, value in pairs if value))
            assert key not in values
            values[key] = float(found[3])
    return values


def _unescaped(value: str) -> str:
    return re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], value)


def value(values: Values, name: str, **labels: str) -> float:
    return values[f"localdisk_{name}", frozenset(labels.items())]


def names(values: Values) -> set[str]:
    return {name for name, _ in values}


# -- what is emitted


def test_the_whole_text() -> None:
    text = metrics.render(None, Counters(copies=3), config_valid=False)
    assert text.startswith(
        "# HELP localdisk_build_info Always 1; the version of localdisk is the label.\n"
        "# TYPE localdisk_build_info gauge\n"
        'localdisk_build_info{version="0.1.0"} 1\n'
        "# HELP localdisk_config_valid "
    )
    assert "# TYPE localdisk_copies_total counter\nlocaldisk_copies_total 3\n" in text
    assert text.endswith("\nlocaldisk_gc_removed_bytes_total 0\n")
    assert text.isascii()


def test_room() -> None:
    values = rendered(seen())
    group, pool = {"volume_group": "ovirt-local"}, {"volume_group": "ovirt-local", "thin_pool": "pool0"}
    assert value(values, "volume_group_size_bytes", **group) == 1 << 40
    assert value(values, "volume_group_free_bytes", **group) == 100 << 30
    assert value(values, "volume_group_reserve_bytes", **group) == 10 << 30
    assert value(values, "thin_pool_size_bytes", **pool) == 900 << 30
    assert value(values, "thin_pool_data_used_ratio", **pool) == 0.125
    assert value(values, "thin_pool_data_limit_ratio", **pool) == 0.9
    assert value(values, "thin_pool_metadata_used_ratio", **pool) == 0.1094
    assert value(values, "thin_pool_metadata_limit_ratio", **pool) == 0.8


def test_a_pool_that_does_not_tell_is_not_empty() -> None:
    silent = replace(POOL, data_percent=None, metadata_percent=None)
    found = names(rendered(replace(seen(), volume_groups=(replace(GROUP, pool=silent),))))
    assert "localdisk_thin_pool_data_limit_ratio" in found
    assert not found & {"localdisk_thin_pool_data_used_ratio", "localdisk_thin_pool_metadata_used_ratio"}


def test_a_group_without_a_pool() -> None:
    found = names(rendered(replace(seen(), volume_groups=(replace(GROUP, pool=None),))))
    assert "localdisk_volume_group_size_bytes" in found
    assert not [name for name in found if "thin_pool" in name]


def test_every_state_of_a_disk_is_there() -> None:
    values = rendered(seen(row(), row(OTHER_VOLUME), row("third", "stopped")))
    counts = {
        state: value(values, "disks", volume_group="ovirt-local", state=state) for state in metrics.STATES
    }
    assert counts == {**dict.fromkeys(metrics.STATES, 0), "ready": 2, "stopped": 1}


def test_the_states_are_those_of_the_snapshot() -> None:
    source = Path(snapshot.__file__).read_text()
    comment, *_ = re.findall(r"^    # (.*)\n    state: str$", source, re.M)
    assert sorted(metrics.STATES) == sorted({*comment.split("|")} - {"active"})  # active: without root


def test_templates() -> None:
    """No series has a template's id: they come and go."""
    values = rendered(seen(templates=(shelved(), shelved(), shelved("waiting", copying("waiting")))))
    group = {"volume_group": "ovirt-local"}
    counts = {state: value(values, "templates", state=state, **group) for state in metrics.TEMPLATE_STATES}
    assert counts == {**dict.fromkeys(metrics.TEMPLATE_STATES, 0), "ready": 2, "waiting": 1}
    assert value(values, "template_bytes", backend="lvm", **group) == 20 << 30
    assert value(values, "template_bytes", backend="lvmthin", **group) == 3 << 30
    assert value(values, "cache_limit_bytes", backend="lvm", **group) == 1 << 39
    assert value(values, "cache_limit_bytes", backend="lvmthin", **group) == 450 << 30
    assert not [labels for _, labels in values if OTHER_VOLUME in dict(labels).values()]


def test_the_states_of_a_template_are_those_of_the_snapshot() -> None:
    source = Path(snapshot.__file__).read_text().partition("class TemplateRow")[2]
    found = re.search(r"^    state: str  # (.*)$", source, re.M)
    assert found
    assert sorted(metrics.TEMPLATE_STATES) == sorted(found[1].split(" | "))


def test_without_a_cache() -> None:
    group = replace(GROUP, cache=None, pool=replace(POOL, cache=None))
    found = names(rendered(replace(seen(), volume_groups=(group,))))
    assert "localdisk_templates" in found
    assert not found & {"localdisk_template_bytes", "localdisk_cache_limit_bytes"}


def test_disks_of_a_group_that_was_not_seen() -> None:
    values = rendered(seen(replace(row(state="waiting", copy=copying("waiting")), vg="other")))
    assert value(values, "disks", volume_group="other", state="waiting") == 1
    assert value(values, "disks", volume_group="ovirt-local", state="waiting") == 0


def test_one_series_a_disk_for_all_its_life() -> None:
    labels = {"volume_group": "ovirt-local", "vm": VM, "disk": VOLUME}
    for state in ("copying", "ready", "running", "stopped", "deleting"):
        changed = replace(row(state=state), vm_name=state, disk=state)
        values = rendered(seen(changed))
        assert [key for key in values if key[0] == "localdisk_disk_size_bytes"] == [
            ("localdisk_disk_size_bytes", frozenset(labels.items()))
        ]
        assert value(values, "disk_size_bytes", **labels) == 64 << 20
    assert "localdisk_disk_size_bytes" not in names(rendered(seen(row(state="waiting"))))


def test_copies() -> None:
    values = rendered(
        seen(
            row("1", "preparing", copying("preparing")),
            row("2", "waiting", copying("waiting", NOW - 30)),
            row("3", "waiting", copying("waiting", NOW - 90)),
            row("4", "copying", copying("copying", NOW - 900)),
            row("5", "copying"),
            row("6", "ready"),
            row("7", "stalled", copying("stalled")),
            templates=(shelved("waiting", copying("waiting", NOW - 120)), shelved("copying"), shelved()),
        )
    )
    phases = {phase: value(values, "copies", phase=phase) for phase in PHASES}
    assert phases == {"preparing": 1, "waiting": 3, "making_room": 0, "copying": 3, "stalled": 1}
    assert value(values, "copy_longest_wait_seconds") == 120


@pytest.mark.parametrize("rows", [(), (row(state="waiting", copy=copying("waiting", NOW + 99)),)])
def test_nobody_waits_less_than_no_time(rows: tuple[Row, ...]) -> None:
    assert value(rendered(seen(*rows)), "copy_longest_wait_seconds") == 0


def test_every_kind_of_problem_is_there() -> None:
    problem = Problem(problems.NOT_LOCAL, "what", "fix")
    values = rendered(seen(problems=(problem, problem, replace(problem, kind=problems.CLOCK)), unseen=("x",)))
    counts = {kind: value(values, "problems", kind=kind) for kind in problems.KINDS}
    assert counts == {
        **dict.fromkeys(problems.KINDS, 0),
        problems.NOT_LOCAL: 2,
        problems.CLOCK: 1,
    }
    assert value(values, "unseen") == 1


def test_counters() -> None:
    values = rendered(None)
    assert value(values, "copies_total") == 3
    assert value(values, "copied_bytes_total") == 5 << 40
    assert value(values, "copy_duration_seconds_total") == 1234.567
    assert value(values, "template_hits_total") == 9
    assert value(values, "template_misses_total") == 2
    assert value(values, "template_evictions_total") == 1
    assert value(values, "failures_total", reason="no_space") == 2
    assert value(values, "failures_total", reason="source_changed") == 1
    assert value(values, "failures_total", reason="copy_broken_off") == 0
    assert value(values, "uncached_disks_total", reason="no_template") == 5
    assert value(values, "uncached_disks_total", reason="disk_busy") == 1
    assert value(values, "uncached_disks_total", reason="cache_full") == 0
    assert value(values, "gc_runs_total") == 7
    assert value(values, "gc_last_run_timestamp_seconds") == NOW - 60
    assert value(values, "gc_last_success_timestamp_seconds") == NOW - 660
    assert value(values, "gc_removed_disks_total") == 4
    assert value(values, "gc_removed_bytes_total") == 1 << 36


def test_the_reasons_are_errors_or_what_a_session_counts() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Error)]
    known = {counters.reason(kind.__new__(kind)) for kind in kinds}
    session = (ROOT / "localdisk/helper/session.py").read_text()
    assert {each for each in metrics.REASONS if f'"{each}"' not in session} <= known
    assert {*metrics.UNCACHED} - {*uncached.REASONS} <= known


def test_what_is_not_known_is_left_out() -> None:
    everything, little = names(rendered(seen(row()))), names(rendered(None, config_valid=False))
    assert everything == {metric.name for metric in metrics.METRICS}
    assert little == {
        name
        for name in everything
        if name.endswith("_total")
        or name.startswith("localdisk_gc_last_")
        or name in ("localdisk_build_info", "localdisk_config_valid", "localdisk_snapshot_taken")
    }


@pytest.mark.parametrize("config_valid", [False, True])
def test_whether_it_could_look(config_valid: bool) -> None:
    values = rendered(None, config_valid=config_valid)
    assert (value(values, "config_valid"), value(values, "snapshot_taken")) == (config_valid, 0)
    assert value(rendered(seen()), "snapshot_taken") == 1


HOSTILE = ('a"b', "a\\", "\\n", "a\nb 1\n", 'x"} 1\nevil{y="', "ümläut", "\r\t\0\x1b[31m", "\\\\\"\n'{}#,=")


def hostile() -> Snapshot:
    rows = [row(text, vm=text) for text in HOSTILE]
    return replace(seen(*rows), volume_groups=tuple(replace(GROUP, name=text) for text in HOSTILE))


def test_hostile_labels() -> None:
    values = rendered(hostile(), Counters(failures=dict.fromkeys(HOSTILE, 1)))
    for text in HOSTILE:
        assert value(values, "disk_size_bytes", volume_group="ovirt-local", vm=text, disk=text)
        assert value(values, "volume_group_size_bytes", volume_group=text)
        assert value(values, "failures_total", reason=text) == 1


def test_labels_are_utf_8() -> None:
    metrics.render(seen(row("\udcff")), SUMS, True).encode()


def test_the_reference() -> None:
    lines = metrics.reference().splitlines()
    assert lines[:2] == ["| metric | type | meaning |", "|---|---|---|"]
    assert len(lines) == len(metrics.METRICS) + 2
    assert "| `localdisk_failures_total{reason}` | counter | Starts and stops" in metrics.reference()
    assert all("\n" not in metric.meaning and "|" not in metric.meaning for metric in metrics.METRICS)


# -- the file


@pytest.fixture(name="file")
def fixture_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(lock, "RUN", str(tmp_path / "run"))
    (tmp_path / "textfiles").mkdir()
    return tmp_path / "textfiles" / "localdisk.prom"


def left(file: Path) -> list[str]:
    """The files beside the file of metrics, and the locks that are held."""
    beside = [name for name in os.listdir(file.parent) if name != file.name]
    return beside + (os.listdir(lock.RUN) if os.path.isdir(lock.RUN) else [])


# A directory without permissions is one that only root can write to.
UMASKS = [0o000, 0o077, *([0o777] if os.geteuid() == 0 else [])]


@pytest.mark.parametrize("umask", UMASKS)
def test_the_file_is_replaced(file: Path, umask: int) -> None:
    file.write_text("old")
    was = os.umask(umask)
    try:
        with file.open() as reader:
            metrics.write(str(file), "new\n")
            assert reader.read() == "old"
    finally:
        os.umask(was)
    assert file.read_text() == "new\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert left(file) == []


@pytest.mark.parametrize("kind", ["file", "symlink", "dangling"])
def test_what_a_killed_run_left_is_replaced(file: Path, tmp_path: Path, kind: str) -> None:
    other, temporary = tmp_path / "other", Path(atomic_file.temporary_name(str(file)))
    if kind == "file":
        temporary.write_text("half")
    else:
        temporary.symlink_to(other)
    if kind == "symlink":
        other.write_text("another's")
    metrics.write(str(file), "new\n")
    assert (file.read_text(), file.is_symlink(), left(file)) == ("new\n", False, [])
    assert not other.exists() or other.read_text() == "another's"


class Ended(BaseException):
    pass


@pytest.mark.parametrize("step", ["fchmod", "fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), Ended()])
def test_a_failure_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch, file: Path, step: str, failure: BaseException
) -> None:
    def fail(*_arguments: object) -> None:
        raise failure

    file.write_text("old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises((Error, Ended)) as raised:
        metrics.write(str(file), "new\n")
    if isinstance(failure, OSError):
        assert str(raised.value).startswith(f"cannot write metrics to {file}: No space left on device : ")
    assert (file.read_text(), left(file)) == ("old", [])


def test_runs_at_the_same_time_write_one_after_the_other(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr(lock, "POLL", 0.001)
    texts = [f"{number}\n" * 50_000 for number in range(8)]
    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(lambda text: metrics.write(str(file), text), texts))
    assert file.read_text() in texts
    assert left(file) == []


def test_a_directory_that_is_not_there(file: Path) -> None:
    with pytest.raises(Error, match=r"^cannot write metrics to .*: No such file or directory : make its dir"):
        metrics.write(str(file.parent / "no" / "x.prom"), "")


@pytest.mark.parametrize("kind", ["symlink", "directory", "fifo"])
def test_only_a_regular_file_is_replaced(file: Path, kind: str) -> None:
    if kind == "symlink":
        file.symlink_to("/dev/stdout")
    elif kind == "directory":
        file.mkdir()
    else:
        os.mkfifo(file)
    was = file.lstat()
    with pytest.raises(Error, match="it is not a regular file"):
        metrics.write(str(file), "")
    assert (file.lstat().st_ino, file.lstat().st_mode, left(file)) == (was.st_ino, was.st_mode, [])


# -- the mode


@pytest.fixture(name="host")
def fixture_host(monkeypatch: pytest.MonkeyPatch, file: Path) -> Path:
    """Root, a good configuration, and a snapshot without problems; the file of the metrics."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(config, "_distrust", lambda _status, _euid: None)  # the file is whose tests these are
    monkeypatch.setattr(counters, "read", lambda: SUMS)
    monkeypatch.setattr(snapshot, "take", lambda _config: seen(row()))
    (file.parent.parent / "localdisk.yaml").write_text("")
    return file


def run(file: Path, *more: str) -> int:
    return cli.main(["status", "--config", str(file.parent.parent / "localdisk.yaml"), "--prometheus", *more])


@pytest.mark.parametrize("more", [(), ("-",)])
def test_printed(host: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]) -> None:
    assert run(host, *more) == 0
    assert capsys.readouterr() == (metrics.render(seen(row()), SUMS, True), "")
    assert left(host) == []


def test_written(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(host, str(host)) == 0
    assert capsys.readouterr() == ("", "")
    assert host.read_text() == metrics.render(seen(row()), SUMS, True)


def test_problems_are_exit_code_1(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = seen(problems=(Problem(problems.CLOCK, "what", "fix"),))
    monkeypatch.setattr(snapshot, "take", lambda _config: found)
    assert run(host, str(host)) == 1
    assert host.read_text() == metrics.render(found, SUMS, True)


def test_a_refused_configuration_is_told_and_counted(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (host.parent.parent / "localdisk.yaml").write_text("nonsense: 1\n")
    assert run(host, str(host)) == 2
    assert "is refused, 1 problem(s)" in capsys.readouterr().err
    assert host.read_text() == metrics.render(None, SUMS, False)


def test_nothing_to_look_at_is_told(
    host: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def take(_config: object) -> Snapshot:
        raise NoVolumeGroup(vg="ovirt-local")

    monkeypatch.setattr(snapshot, "take", take)
    assert run(host, str(host)) == 2
    assert "no volume group ovirt-local" in capsys.readouterr().err
    assert host.read_text() == metrics.render(None, SUMS, True)


def test_an_ordinary_user_is_refused(
    host: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run(host, str(host)) == 2
    assert capsys.readouterr() == ("", "localdisk: status --prometheus needs root : run it with sudo\n")
    assert not host.exists()


def test_a_file_that_cannot_be_written(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(host, "/nonexistent/localdisk.prom") == 2
    assert capsys.readouterr().err.startswith(
        "localdisk: cannot write metrics to /nonexistent/localdisk.prom: "
    )


# -- what Prometheus' own tools say; they come with build.sh


def promtool(*argv: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *argv], input=text, capture_output=True, text=True, timeout=30)


SNAPSHOTS = {"all": seen(row(), templates=(shelved(),)), "nothing": None, "hostile": hostile()}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_promtool_has_no_warnings(name: str) -> None:
    done = promtool("check", "metrics", text=metrics.render(SNAPSHOTS[name], SUMS, name != "nothing"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@contextmanager
def node_exporter(directory: Path) -> Iterator[str]:
    """The real one, on a free port of this machine alone; the address of its metrics."""
    argv = ["prometheus-node-exporter", "--collector.disable-defaults", "--collector.textfile"]
    argv += [f"--collector.textfile.directory={directory}", "--web.listen-address=127.0.0.1:0"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stderr
            said = (re.search(r'"?Listening on"? address=(\S+)', line) for line in process.stderr)
            yield f"http://{next(found[1] for found in said if found)}/metrics"
        finally:
            process.kill()


def scraped(address: str) -> Values:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=10) as answer:
        return parsed(answer.read().decode())


def test_node_exporter_serves_what_was_written(file: Path) -> None:
    with node_exporter(file.parent) as address:
        Path(atomic_file.temporary_name(str(file))).write_text("what a killed run left, half of a li")
        assert not names(scraped(address)) & {metric.name for metric in metrics.METRICS}
        for found in (seen(row()), None, hostile()):
            text = metrics.render(found, SUMS, True)
            metrics.write(str(file), text)
            served = scraped(address)
            own = {key: number for key, number in served.items() if key[0].startswith("localdisk_")}
            assert own == parsed(text)
            assert served["node_textfile_scrape_error", frozenset()] == 0
            mtime = frozenset({("file", str(file))})
            assert served["node_textfile_mtime_seconds", mtime] == pytest.approx(file.stat().st_mtime)


# -- the examples


def alert_expressions() -> list[str]:
    (group,) = yaml.safe_load((EXAMPLES / "alerts.yml").read_text())["groups"]
    return [rule["expr"] for rule in group["rules"]]


def dashboard() -> dict[str, list[dict[str, object]]]:
    found: dict[str, list[dict[str, object]]] = json.loads((EXAMPLES / "grafana.json").read_text())
    return found


def dashboard_expressions() -> list[str]:
    """As Prometheus gets them."""
    text = json.dumps(dashboard()["panels"])
    expressions = re.findall(r'"expr": ("(?:[^"\\]|\\.)*")', text)
    return [json.loads(found).replace("$instance", ".*") for found in expressions]


@pytest.mark.parametrize("expressions", [alert_expressions(), dashboard_expressions()])
def test_examples_ask_for_metrics_that_there_are(expressions: list[str]) -> None:
    assert len(expressions) > 10
    asked = {name for text in expressions for name in re.findall(r"\b(?:localdisk|node)_\w+", text)}
    assert asked <= {*(metric.name for metric in metrics.METRICS), "node_textfile_mtime_seconds"}


def test_the_alerts_are_good_rules() -> None:
    done = promtool("check", "rules", "--lint-fatal", str(EXAMPLES / "alerts.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_alerts_fire_when_they_should() -> None:
    done = promtool("test", "rules", *map(str, sorted(DATA.glob("*.yml"))))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    (group,) = yaml.safe_load((EXAMPLES / "alerts.yml").read_text())["groups"]
    tests = "".join(path.read_text() for path in DATA.glob("*.yml"))
    for rule in group["rules"]:
        assert re.search(rf"\b{rule['alert']}\b", tests), rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} == rule["annotations"].keys()


def test_alerts_for_failures_look_at_reasons_that_begin_with_0() -> None:
    matchers = [re.findall(r'reason=~"([^"]+)"', text) for text in alert_expressions()]
    reasons = {reason for found in matchers for group in found for reason in group.split("|")}
    assert reasons
    assert reasons <= {*metrics.REASONS}


def test_the_dashboard_asks_good_questions(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{n}", "expr": text} for n, text in enumerate(dashboard_expressions())]
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = promtool("check", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_fits_together() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    cells = [cell for place in places if isinstance(place, dict) for cell in _cells(place)]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23


def _cells(place: dict[str, int]) -> list[tuple[int, int]]:
    xs, ys = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
    return [(x, y) for x in xs for y in ys]


def test_the_cron_line_is_a_command_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    lines = (EXAMPLES / "cron").read_text().splitlines()
    (line,) = [line for line in lines if line and not line.startswith("#")]
    assert line.split()[:7] == [*"*****", "root", "/usr/local/libexec/localdisk"]
    arguments = cli.parser().parse_args(line.split()[7:])
    assert arguments.prometheus == "/var/lib/prometheus/node-exporter/localdisk.prom"
