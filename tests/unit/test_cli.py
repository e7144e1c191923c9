from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from localdisk import __version__, cli, config
from localdisk.errors import (
    BadProperty,
    CommandFailed,
    ConfigRefused,
    DiskNeeded,
    Error,
    HelperRefused,
    Interrupted,
    NoTemplate,
    NoVolumeGroup,
    UsageError,
)
from localdisk.frozen import replace
from localdisk.helper import process
from localdisk.hook import points as hook_points
from localdisk.hook import prefetch
from localdisk.host import check, facts, files
from localdisk.status import output, snapshot
from localdisk.status.problems import Problem
from localdisk.status.snapshot import Snapshot
from localdisk.vdsm.hook_call import POINTS
from localdisk.volumes import gc, remove
from localdisk.volumes.gc import Collection, Finding
from localdisk.volumes.local_disk import LocalDisk
from localdisk.volumes.lvm import VolumeGroup
from localdisk.volumes.verdict import Action, Verdict
from tests.bed.player import RAISING_POINTS
from tests.fakes import VM, VOLUME, FakeHost, report, tags

ROOT = Path(__file__).parents[2]


class Run:
    """Runs modes in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *argv: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        try:
            code = cli.main(argv)
        except SystemExit as end:  # argparse, after --help and --version
            code = int(end.code or 0)
        out, err = self._capsys.readouterr()
        return code, out, err

    def refused(self, *argv: str, code: int = 2) -> str:
        """The one line of a refusal, without its prefix."""
        got, out, err = self(*argv)
        assert (got, out) == (code, "")
        assert err.endswith("\n")
        (line,) = err.splitlines()
        assert line.isprintable()
        assert line.startswith("localdisk: ")
        what, _, fix = line.partition(" : ")
        assert what
        assert fix
        return line[len("localdisk: ") :]


@pytest.fixture(name="run")
def fixture_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.delenv("LOCALDISK_DEBUG", raising=False)
    return Run(capsys)


@pytest.fixture(name="as_root")
def fixture_as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def raising(error: BaseException) -> Callable[..., object]:
    def run(*_arguments: object, **_named: object) -> object:
        raise error

    return run


# -- what anyone may ask


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"localdisk {__version__}\n", "")


def test_help_names_every_mode(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert all(
        f"\n    {mode} " in out
        for mode in ("hook", "gc", "status", "check", "prefetch", "install", "uninstall", "helper", "schema")
    )


@pytest.mark.parametrize("mode", ["gc", "status"])
def test_a_mode_without_options_is_not_parsed(mode: str) -> None:
    parsed = vars(cli.parser().parse_args([mode]))
    assert parsed.pop("mode")
    assert parsed == {name: getattr(cli.WithoutOptions, name) for name in parsed}


def test_schema(run: Run) -> None:
    code, out, _ = run("schema")
    assert code == 0
    assert out == config.schema_text()


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ((), "the following arguments are required: MODE"),
        (("nonsense",), "invalid choice: 'nonsense'"),
        (("--nonsense", "gc"), "--nonsense"),
        (("gc", "--nonsense"), "unrecognized arguments: --nonsense"),
        (("gc", "more"), "unrecognized arguments: more"),
        (("hook",), "hook needs the name of a hook point"),
        (("hook", "before_nonsense"), "invalid choice: 'before_nonsense'"),
        (("hook", "after_disk_prepare", "more"), "unrecognized arguments: more"),
        (("helper", "more"), "unrecognized arguments: more"),
        (("gc", "--config"), "expected one argument"),
        (("status", "\x1b[31m\n"), "unrecognized arguments: \\x1b[31m\\n"),
    ],
)
def test_bad_usage(run: Run, argv: tuple[str, ...], problem: str) -> None:
    message = run.refused(*argv)
    assert problem in message
    assert message.endswith(" : see localdisk --help")


# -- the configuration


HOST = "this host: good\n"


@pytest.fixture(name="good_host")
def fixture_good_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "collect", lambda *_, **__: SimpleNamespace(rehearsal=None))
    monkeypatch.setattr(check, "strangers", lambda *_: ())
    monkeypatch.setattr(check, "check_host", lambda *_: ())


@pytest.mark.usefixtures("good_host")
def test_check(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "localdisk.yaml"
    path.write_text("backend: lvmthin\n")
    good = (0, f"{path}: good\n{HOST}", "")
    assert run("check", "--config", str(path)) == good
    assert run("--config", str(path), "check") == good
    assert run("--config", "/nonexistent", "check", "--config", str(path)) == good
    code, out, err = run("check", "--json", "--config", str(path))
    assert (code, json.loads(out), err) == (0, {"configuration": str(path), "problems": []}, "")


@pytest.mark.usefixtures("good_host")
def test_check_of_the_default_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "localdisk.yaml"
    monkeypatch.setattr(config, "DEFAULT_PATH", str(path))
    assert run("check") == (0, f"{path}: does not exist, the built-in defaults apply\n{HOST}", "")
    path.write_text("")
    assert run("check") == (0, f"{path}: good\n{HOST}", "")


@pytest.mark.usefixtures("good_host")
def test_check_tells_what_does_nothing(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "localdisk.yaml"
    path.write_text(f"vms: {{{VM}: {{cache: {{keep_for: 1d}}}}}}\n")
    code, out, _ = run("check", "--config", str(path))
    assert (code, out.count("\n")) == (1, 2)
    assert out.startswith(f"{path}:1:54: vms.{VM}.cache.keep_for is for one VM alone, ")
    code, out, _ = run("check", "--json", "--config", str(path))
    assert (code, len(json.loads(out)["problems"])) == (1, 1)


def test_check_shows_all_problems(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "localdisk.yaml"
    path.write_text("backend: x\nnonsense: 1\n")
    code, out, err = run("check", "--config", str(path))
    assert (code, out) == (2, "")
    first, second, last = err.splitlines()
    assert first.startswith(f"{path}:1:10: backend: ")
    assert second.startswith(f"{path}:2:1: nonsense: ")
    assert last.startswith(f"localdisk: configuration {path} is refused, 2 problem(s) : correct it")


@pytest.mark.usefixtures("as_root")
def test_a_named_configuration_must_be_there(run: Run) -> None:
    for mode in ("check", "gc", "status"):
        assert run.refused(mode, "--config", "/nonexistent").startswith("cannot read configuration /nonexist")


@pytest.mark.parametrize(
    "argv", [("hook", "after_disk_prepare"), ("helper",), ("hook",), ("install",), ("uninstall", "--force")]
)
def test_modes_that_take_no_configuration(run: Run, argv: tuple[str, ...]) -> None:
    for words in (("--config", "/x", *argv), (*argv, "--config", "/x")):
        assert run.refused(*words).startswith("this mode takes no --config, it always reads ")


# -- modes that need root


@pytest.mark.parametrize("words", [("helper",), ("gc",), ("install",), ("uninstall",), ("remove", "x")])
def test_modes_of_root(run: Run, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 36)
    assert run.refused(*words) == f"{words[0]} needs root : run it with sudo"


NEEDED = DiskNeeded(vg="vg", lv="lv", problem="it is open")
FAILED = CommandFailed(("lvremove", "vg/lv"), 5, "Failed to write VG")


@pytest.mark.parametrize(
    ("failures", "code"),
    [((), 0), ((None,), 0), ((None, FAILED), 1), ((NEEDED,), 2), ((FAILED, NEEDED), 2)],
)
@pytest.mark.usefixtures("as_root")
def test_remove(
    run: Run, monkeypatch: pytest.MonkeyPatch, failures: tuple[Error | None, ...], code: int
) -> None:
    outcomes = [remove.Outcome(f"line {number}", failure) for number, failure in enumerate(failures)]
    asked: list[object] = []

    def removes(_config: object, names: list[str], dry_run: bool) -> list[remove.Outcome]:
        asked.append((names, dry_run))
        return outcomes

    monkeypatch.setattr(remove, "remove", removes)
    err = "".join(f"localdisk: {failure}\n" for failure in failures if failure)
    out = "".join(f"{outcome.text}\n" for outcome in outcomes)
    assert run("remove", "a", "b", "--dry-run") == (code, out, err)
    assert asked == [(["a", "b"], True)]
    assert run("remove")[0] == 2


@pytest.mark.usefixtures("as_root")
def test_helper(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "main", lambda load: 5 if load is config.load else 6)
    assert run("helper") == (5, "", "")


def finding(**fields: object) -> Finding:
    host = FakeHost(report("empty"))
    host.add(VOLUME, tags())
    disk = LocalDisk.from_lv(VolumeGroup.from_report(host.report()).lvs[0])
    assert disk
    values = {"verdict": Verdict(Action.KEEP, "in use"), **fields}
    return Finding("scratch", disk, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("collection", "code"),
    [
        (Collection(()), 0),
        (Collection((finding(),)), 0),
        (Collection((finding(verdict=Verdict(Action.REMOVE, "x")),)), 0),
        (Collection((finding(), finding(failure="x"))), 1),
        (Collection((finding(verdict=Verdict(Action.KEEP, "x", is_certain=False)),)), 1),
        (Collection((), problems=("a : b", "c : d")), 1),
        (Collection((finding(),), problems=("a : b",)), 1),
    ],
)
@pytest.mark.usefixtures("as_root")
def test_gc(run: Run, monkeypatch: pytest.MonkeyPatch, collection: Collection, code: int) -> None:
    asked: list[bool] = []

    def collect(_config: object, dry_run: bool, ran_elsewhere: object) -> Collection:
        asked.append(dry_run)
        return collection

    monkeypatch.setattr(gc, "collect", collect)
    monkeypatch.setattr(files, "OLDER_FILES", ())
    err = "".join(f"localdisk: {problem}\n" for problem in collection.problems)
    assert run("gc") == (code, gc.as_lines(collection, dry_run=False), err)
    assert run("gc", "--dry-run") == (code, gc.as_lines(collection, dry_run=True), err)
    assert run("gc", "--json") == (code, gc.as_json(collection), err)
    assert asked == [False, True, False]


@pytest.mark.usefixtures("as_root")
def test_status(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Snapshot(at=0, volume_groups=(), disks=())
    monkeypatch.setattr(snapshot, "take", lambda _config: found)
    assert run("status") == (0, "no local disks\n", "")
    assert run("status", "--full") == (0, "no local disks\n", "")
    assert run("status", "--json") == (0, output.as_json(found), "")
    found = replace(found, problems=(Problem("clock", "what", "fix"),))
    assert run("status")[0] == 1
    assert run.refused("status", "--watch") == "--watch needs a terminal : see localdisk --help"


@pytest.mark.usefixtures("as_root")
def test_gc_tells_that_vdsms_package_has_brought_its_hook_back(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """cron mails it."""
    there, not_there = tmp_path / "localdisk", tmp_path / "50_vdsm_hook_localdisk"
    there.touch()
    monkeypatch.setattr(gc, "collect", lambda *_args, **_more: Collection(()))
    monkeypatch.setattr(files, "OLDER_FILES", (str(there), str(not_there)))
    code, _, err = run("gc")
    assert (code, err) == (
        1,
        f"localdisk: the localdisk hook of vdsm's package is there beside this one: {there}"
        f" : run {files.PROGRAM} install, which moves it aside\n",
    )


# -- hooks


@pytest.fixture(name="points")
def fixture_points(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    called: list[str] = []
    monkeypatch.setattr(hook_points, "run", lambda point, _environ: called.append(point))
    monkeypatch.setattr(cli, "before_vdsm_start", lambda: called.append("before_vdsm_start"))
    monkeypatch.setattr("signal.signal", lambda _number, _handler: None)
    return called


@pytest.mark.parametrize("point", sorted(POINTS))
def test_hook_by_name_and_by_link(
    run: Run, monkeypatch: pytest.MonkeyPatch, points: list[str], point: str
) -> None:
    assert run("hook", point) == (0, "", "")
    for words in ([f"/usr/libexec/vdsm/hooks/{point}/50_localdisk"], [f"{point}/x", "ignored"]):
        monkeypatch.setattr(sys, "argv", words)
        assert cli.main() == 0
    assert points == [point] * 3


@pytest.mark.parametrize(
    "path", ["/usr/local/bin/localdisk", "localdisk", "/hooks/after_disk_prepare.d/x", ""]
)
def test_other_places_are_no_hook_points(
    run: Run, monkeypatch: pytest.MonkeyPatch, points: list[str], path: str
) -> None:
    monkeypatch.setattr(sys, "argv", [path, "schema"])
    assert cli.main() == 0
    assert points == []


def test_a_refused_hook(run: Run, monkeypatch: pytest.MonkeyPatch, points: list[str]) -> None:
    monkeypatch.setattr(hook_points, "run", raising(BadProperty(value="a\nb")))
    message = run.refused("hook", "after_disk_prepare")
    assert message == (
        "custom property localdisk has the value 'a\\nb' : set it to lvm, lvmthin, on or off in the engine"
    )


def config_refused(count: int, problem: str = "on_stop: 'kepp' is none of delete, keep") -> ConfigRefused:
    lines = tuple(f"/etc/localdisk.yaml:{number}:3: {problem}" for number in range(1, count + 1))
    return ConfigRefused("/etc/localdisk.yaml", lines)


@pytest.mark.parametrize("point", sorted(POINTS))
@pytest.mark.parametrize(
    "error",
    [BadProperty(value="x"), OSError(28, "No space left"), ValueError("x")],
    ids=lambda e: type(e).__name__,
)
def test_only_where_vdsm_refuses_other_hooks_do_not_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, points: list[str], point: str, error: Exception
) -> None:
    """Exit code 2 keeps vdsm from running the hooks that come after ours."""
    monkeypatch.setenv("localdisk", "lvm")
    monkeypatch.setattr(hook_points, "run", raising(error))
    monkeypatch.setattr(cli, "before_vdsm_start", raising(error))
    assert run.refused("hook", point, code=2 if point in RAISING_POINTS else 1)
    monkeypatch.setattr(sys, "argv", [f"/usr/libexec/vdsm/hooks/{point}/50_localdisk"])
    assert cli.main() == (2 if point in RAISING_POINTS else 1)


@pytest.mark.parametrize(
    "error",
    [
        config_refused(80),
        config_refused(80, "ж" * 200),
        config_refused(1, "x" * 5000),
        ConfigRefused("/" + "ж" * 5000, ("ж" * 300,) * 90),
        HelperRefused(str(config_refused(80))),
        HelperRefused("ж" * 900 + " : " + "я" * 900),
        BadProperty(value="\N{GRINNING FACE}" * 5000),
    ],
    ids=["many", "not ASCII", "one long", "all long", "helper's", "helper's long", "long value"],
)
def test_what_the_engine_shows_is_one_short_line_of_ascii(
    run: Run, monkeypatch: pytest.MonkeyPatch, points: list[str], error: Exception
) -> None:
    monkeypatch.setattr(hook_points, "run", raising(error))
    line = run.refused("hook", "after_disk_prepare")
    assert line.isascii()
    assert len(f"localdisk: {line}\n") <= 1000


def test_the_fix_of_very_many_problems_is_shown(
    run: Run, monkeypatch: pytest.MonkeyPatch, points: list[str]
) -> None:
    monkeypatch.setattr(hook_points, "run", raising(HelperRefused(str(config_refused(3000)))))
    line = run.refused("hook", "after_disk_prepare")
    assert "3000 problem(s) : correct it, then run localdisk check" in line


def test_the_first_of_many_problems_are_shown(
    run: Run, monkeypatch: pytest.MonkeyPatch, points: list[str]
) -> None:
    monkeypatch.setenv("localdisk", "lvm")
    monkeypatch.setattr(hook_points, "run", raising(config_refused(80)))
    line = run.refused("hook", "before_vm_start")
    assert line.startswith("/etc/localdisk.yaml:1:3: on_stop: 'kepp' is none of delete, keep; /etc/")
    *shown, more, last = line.split("; ")
    assert len(shown) > 5
    assert more == f"and {80 - len(shown)} more"
    assert last == (
        "configuration /etc/localdisk.yaml is refused, 80 problem(s)"
        " : correct it, then run localdisk check --config /etc/localdisk.yaml"
    )
    monkeypatch.setattr(hook_points, "run", raising(config_refused(3)))
    assert run.refused("hook", "before_vm_start").count("; ") == 3


# -- errors


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (NoVolumeGroup(vg="x"), 2, "no volume group x on this host : create it"),
        (ValueError("a\nb"), 2, "internal error, ValueError: a\\nb : report it with the output of LOCALDISK"),
        (KeyError("x" * 1000), 2, "internal error, KeyError: 'xxx"),
        (
            OSError(28, "No space left on device"),
            2,
            "[Errno 28] No space left on device : see the system log",
        ),
        (RecursionError(), 2, "internal error, RecursionError:"),
        (AssertionError("\ud800\x1b"), 2, "internal error, AssertionError: \\ud800\\x1b : report"),
        (KeyboardInterrupt(), 1, "interrupted : run it again"),
    ],
)
@pytest.mark.usefixtures("as_root")
def test_errors_are_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    monkeypatch.setattr(snapshot, "take", raising(error))
    assert run.refused("status", code=code).startswith(line)


@pytest.mark.usefixtures("as_root")
def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "take", raising(ValueError("x")))
    monkeypatch.setenv("LOCALDISK_DEBUG", "1")
    code, out, err = run("status")
    assert (code, out) == (2, "")
    assert err.startswith("Traceback (most recent call last):\n")
    assert "\nValueError: x\nlocaldisk: internal error, ValueError: x : " in err
    monkeypatch.setenv("LOCALDISK_DEBUG", "0")
    assert "Traceback" not in run("status")[2]


@pytest.mark.usefixtures("as_root")
def test_several_lines_have_one_prefix(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "take", raising(ConfigRefused("F", ("F:1:1: a", "F:2:1: b"))))
    _, _, err = run("status")
    assert err.splitlines()[:2] == ["F:1:1: a", "F:2:1: b"]
    assert err.splitlines()[2].startswith("localdisk: configuration F is refused")


# -- as a process


def run_process(*argv: str, code: str = "pass", **environ: str) -> subprocess.CompletedProcess[bytes]:
    start = f"import sys; {code}; from localdisk.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", start, *argv], capture_output=True, cwd=ROOT, env=environ, check=False
    )


@pytest.mark.parametrize("mode", ["schema", "--version", "--help", "check"])
def test_a_reader_that_goes_away(mode: str) -> None:
    done = run_process(mode, code="import os; r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)")
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("mode", ["schema", "--version"])
def test_a_full_file_system(mode: str) -> None:
    done = run_process(mode, code="import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)")
    line = b"localdisk: [Errno 28] No space left on device : see the system log of this host\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_without_standard_output() -> None:
    done = run_process("schema", code="sys.stdout = None")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_hook_that_is_ended_says_so(number: str) -> None:
    """Once: a second signal does not disturb the tidying up."""
    code = (
        "import os, signal\n"
        "from localdisk.hook import points\n"
        "def run(point, environ):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), signal.{number})\n"
        "    finally:\n"
        "        for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):\n"
        "            os.kill(os.getpid(), each)\n"
        "points.run = run\n"
    )
    done = run_process("hook", "after_vm_destroy", code=f"exec({code!r})")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == (
        f"localdisk: ended by signal {number} before it was done"
        " : start the VM again; nothing is left behind\n"
    )


def test_an_ascii_terminal() -> None:
    done = run_process("hook", "ümläut", PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0")
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"Traceback" not in done.stderr


# -- prefetch


@pytest.fixture(name="fetched")
def fixture_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str, bool]]:
    """What was asked for: name, backend, whether a bar is drawn.  "bad" is no template, "worse" ends all."""
    asked: list[tuple[str, str, bool]] = []

    def fetch(name: str, backend: str, show: Callable[[float, int], None] | None) -> str:
        asked.append((name, backend, show is not None))
        if show:
            show(0.5, 1 << 20)
            show(1.0, 2 << 20)
        if name == "bad":
            raise NoTemplate(volume=name, problem="x")
        if name == "worse":
            raise Interrupted(signal="SIGTERM")
        return f"{name}: cached"

    monkeypatch.setattr(prefetch, "become_vdsm", lambda: None)
    monkeypatch.setattr(prefetch, "prefetch", fetch)
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "localdisk.yaml"))
    return asked


def test_prefetch(run: Run, fetched: list[tuple[str, str, bool]]) -> None:
    assert run("prefetch", "/a", "/b") == (0, "/a: cached\n/b: cached\n", "")
    assert run("prefetch", "--backend", "lvmthin", "/a")[0] == 0
    assert fetched == [("/a", "lvm", False), ("/b", "lvm", False), ("/a", "lvmthin", False)]


def test_prefetch_is_for_the_backend_of_the_configuration(
    run: Run, fetched: list[tuple[str, str, bool]], tmp_path: Path
) -> None:
    (tmp_path / "localdisk.yaml").write_text("backend: lvmthin\n")
    assert run("prefetch", "/a")[0] == 0
    assert fetched == [("/a", "lvmthin", False)]


def test_prefetch_goes_on_after_one_that_is_none(run: Run, fetched: list[tuple[str, str, bool]]) -> None:
    code, out, err = run("prefetch", "/a", "bad", "/b")
    assert (code, out) == (1, "/a: cached\n/b: cached\n")
    assert err == "localdisk: volume bad cannot be cached: x : name a template's volume on file storage\n"
    assert [name for name, _, _ in fetched] == ["/a", "bad", "/b"]


def test_prefetch_that_is_ended_goes_on_with_nothing(run: Run, fetched: list[tuple[str, str, bool]]) -> None:
    code, _, err = run("prefetch", "worse", "/b")
    assert code == 2
    assert "ended by signal SIGTERM" in err
    assert [name for name, _, _ in fetched] == ["worse"]


@pytest.mark.usefixtures("fetched")
def test_prefetch_draws_a_bar_on_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is removed before the line with the result is printed."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    half, whole = f"\r[{'#' * 15}{'.' * 15}]  50% 1 MiB\033[K", f"\r[{'#' * 30}] 100% 2 MiB\033[K"
    code, out, _ = run("prefetch", "/a", "bad")
    assert code == 1
    assert out == f"{half}{whole}\r\033[K/a: cached\n{half}{whole}\r\033[K\r\033[K"


@pytest.mark.usefixtures("fetched")
def test_prefetch_with_a_bad_configuration(run: Run, tmp_path: Path) -> None:
    (tmp_path / "localdisk.yaml").write_text("nonsense: 5\n")
    code, out, err = run("prefetch", "/a")
    assert (code, out) == (2, "")
    assert "nonsense" in err


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (("prefetch",), "the following arguments are required: PATH|VOLUME"),
        (("prefetch", "--backend", "x", "/a"), "invalid choice: 'x'"),
        (("prefetch", "--backend"), "expected one argument"),
        (("prefetch", "/a", "--json"), "unrecognized arguments: --json"),
    ],
)
def test_bad_usage_of_prefetch(run: Run, argv: tuple[str, ...], problem: str) -> None:
    assert problem in run.refused(*argv)


def test_prefetch_takes_no_configuration(run: Run) -> None:
    assert run.refused("prefetch", "/a", "--config", "/x").startswith("this mode takes no --config")


def test_prefetch_on_a_host_without_vdsm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "become_vdsm", raising(UsageError(problem="this host has no user vdsm")))
    assert run.refused("prefetch", "/a").startswith("this host has no user vdsm")
