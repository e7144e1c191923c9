"""The command line: reads arguments, runs a mode, prints its output, and turns errors into exit codes.

A mode imports what it needs when it runs, because a hook and its helper start for every disk of every VM.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from localdisk import __version__
from localdisk.backend import BACKENDS
from localdisk.errors import (
    DependentVolumes,
    DiskNeeded,
    Error,
    HelperRefused,
    Interrupted,
    OlderHookBack,
    RootNeeded,
    StartCancelled,
    UsageError,
    plain,
)
from localdisk.vdsm import hook_call
from localdisk.vdsm.hook_call import POINTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from argparse import Namespace
    from types import FrameType
    from typing import NoReturn

    from localdisk.config import Config
else:
    Namespace = object

GOOD, PROBLEMS, REFUSED = 0, 1, 2
GC_BUDGET = 30  # seconds that gc may take before vdsm starts; a tool that hangs gets 10 s more to end
VERSION = f"localdisk {__version__}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one mode; returns the exit code: 0 good, 1 problems, 2 refused."""
    words = sys.argv if argv is None else ["localdisk", *argv]
    point = _point(words)
    try:
        try:
            return _run(words)
        finally:
            if sys.stdout:  # None if it was closed
                sys.stdout.flush()  # here, so that a failure is reported and sets the exit code
    except (Error, Interrupted) as error:
        return _report(str(error), error.exit_code, point)
    except BrokenPipeError:
        _drop_output()
        return PROBLEMS
    except KeyboardInterrupt:
        return _report("interrupted : run it again", PROBLEMS, point)
    except OSError as error:
        _drop_output()
        return _report(f"{plain(error)} : see the system log of this host", REFUSED, point)
    except Exception as error:  # noqa: BLE001 (the last line of defence: never a traceback)
        what = plain(f"{type(error).__name__}: {error}")
        fix = "report it with the output of LOCALDISK_DEBUG=1"
        return _report(f"internal error, {what} : {fix}", REFUSED, point)


def _point(words: Sequence[str]) -> str:
    """The hook point that is called, by vdsm's link or by `hook POINT`; "" if it is none."""
    by_link = os.path.basename(os.path.dirname(words[0]))
    named = words[2] if len(words) == 3 and words[1] == "hook" else by_link
    return named if named in POINTS else ""


def _run(words: Sequence[str]) -> int:
    point = os.path.basename(os.path.dirname(words[0]))
    if point in POINTS:
        return _hook(point)
    if list(words[1:]) == ["helper"]:
        return _helper()
    if words[1:2] == ["rehearsal"]:  # `check` runs it as vdsm
        from localdisk.hook import rehearsal

        print(rehearsal.rehearse(words[2:]))
        return GOOD
    if list(words[1:]) == ["--version"]:  # without argparse, as below
        print(VERSION)
        return GOOD
    if words[1:] in (["gc"], ["status"]):
        return _gc_mode(WithoutOptions()) if words[1] == "gc" else _status_mode(WithoutOptions())
    arguments = parser().parse_args(words[1:])
    return int(arguments.mode(arguments))


class WithoutOptions(Namespace):
    """The arguments of a plain `gc` or `status`: argparse is as slow to import as all that a mode needs."""

    config = prometheus = None
    dry_run = json = watch = full = False


def _drop_output() -> None:
    """Discard the rest of standard output, so that Python does not fail again when it flushes at its end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(message: str, exit_code: int, point: str = "") -> int:
    """Print an error; returns the exit code, at a hook point the one that vdsm expects."""
    if os.environ.get("LOCALDISK_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    if point:
        print(hook_call.shown(message), file=sys.stderr)
        return hook_call.exit_code(point, exit_code, os.environ)
    *details, last = message.splitlines()
    print(*details, f"localdisk: {last}", sep="\n", file=sys.stderr)
    return exit_code


# -- modes


def _hook(point: str) -> int:
    import signal

    from localdisk import log

    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    signal.signal(signal.SIGUSR1, _cancel)
    try:
        _serve(point)
    except (HelperRefused, StartCancelled):  # the helper has logged why
        raise
    except (Error, Interrupted) as error:
        vm_id = os.environ.get("vmId", "")  # noqa: SIM112 (vdsm's name)
        log.problem("refused", point=point, vm=vm_id, why=error)
        raise
    return GOOD


def _serve(point: str) -> None:
    if point == "before_vdsm_start":  # runs as root, and for no VM
        before_vdsm_start()
        return
    from localdisk.hook import points

    points.run(point, os.environ)


def before_vdsm_start() -> None:
    """Run gc before vdsm starts any VM.

    If vdsm runs already (somebody calls this by hand), a VM may be starting, and this behaves like plain
    `gc`. After 90 s systemd would end this process, and vdsm's start with it: work that takes longer (LVM's
    lock is held, many disks) is left to cron's next gc.
    """
    from localdisk import config, log, run
    from localdisk.status.libvirt_vms import ran_elsewhere
    from localdisk.volumes import gc

    with run.within(GC_BUDGET):
        found = gc.collect(config.load(), may_start=hook_call.is_running(), ran_elsewhere=ran_elsewhere)
        problems = found.problems
        if run.is_spent():
            problems = (*problems, f"{GC_BUDGET} s are over, the next gc does the rest")
    for problem in problems:
        log.problem("gc before vdsm starts", why=problem)


def _cancel(_number: int, _frame: FrameType | None) -> NoReturn:
    """Signal handler: the helper has seen that our VM was powered off.  Raises StartCancelled."""
    _ignore_signals()
    raise StartCancelled(vm=os.environ.get("vmId", ""))  # noqa: SIM112 (vdsm's name)


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    """Signal handler.  Raises Interrupted: on the way out, the helper removes the unfinished disk."""
    import signal

    _ignore_signals()
    raise Interrupted(signal=signal.Signals(number).name)


def _ignore_signals() -> None:
    import signal

    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)


def _hook_mode(arguments: Namespace) -> int:
    _refuse_config(arguments)
    if arguments.point is None:
        raise UsageError(problem="hook needs the name of a hook point")
    return _hook(arguments.point)


def _helper_mode(arguments: Namespace) -> int:
    _refuse_config(arguments)
    return _helper()


def _helper() -> int:
    from localdisk import config
    from localdisk.helper import process

    _require_root("helper")
    return process.main(config.load)


def _gc_mode(arguments: Namespace) -> int:
    from localdisk.status.libvirt_vms import ran_elsewhere
    from localdisk.volumes import gc

    _require_root("gc")
    found = gc.collect(_load(arguments), arguments.dry_run, ran_elsewhere=ran_elsewhere)
    print(gc.as_json(found) if arguments.json else gc.as_lines(found, arguments.dry_run), end="")
    problems = (*found.problems, *_older_hook())
    for problem in problems:
        _report(problem, PROBLEMS)
    return PROBLEMS if problems or found.is_problem else GOOD


def _older_hook() -> Iterator[str]:
    """The problem if an update of vdsm's package has brought its own hook back."""
    from localdisk import log
    from localdisk.host import files as host_files

    files = host_files.older_files()
    if files:
        error = OlderHookBack(files=", ".join(files), program=host_files.PROGRAM)
        log.problem("two hooks for local disks", why=error)
        yield str(error)


def _status_mode(arguments: Namespace) -> int:
    from localdisk.status import output, snapshot

    if arguments.prometheus is not None:
        return _metrics(arguments)
    settings = _load(arguments)
    if arguments.watch:
        return _watch(output.frames(settings, arguments.full))
    found = snapshot.take(settings)
    print(output.as_json(found) if arguments.json else output.as_table(found, arguments.full), end="")
    return PROBLEMS if found.problems else GOOD


def _watch(frames: Iterator[str]) -> int:
    import signal
    import time

    from localdisk.status import output

    if not sys.stdout.isatty():
        raise UsageError(problem="--watch needs a terminal")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(output.ENTER, end="")
        for frame in frames:
            print(frame, end="", flush=True)
            time.sleep(output.INTERVAL)
    except KeyboardInterrupt:
        pass
    finally:
        print(output.LEAVE, end="", flush=True)
    return GOOD


def _metrics(arguments: Namespace) -> int:
    """Write metrics, also if the configuration is refused or no volume group can be read."""
    from localdisk import counters
    from localdisk.status import metrics, snapshot

    _require_root("status --prometheus")
    settings, found, refusal = None, None, None
    try:
        settings = _load(arguments)
        found = snapshot.take(settings)
    except Error as error:
        refusal = error
    _put(arguments.prometheus, metrics.render(found, counters.read(), config_valid=settings is not None))
    if refusal:
        raise refusal
    return PROBLEMS if found and found.problems else GOOD


def _put(path: str, text: str) -> None:
    from localdisk.status import metrics

    if path == "-":
        print(text, end="")
    else:
        metrics.write(path, text)


def _check_mode(arguments: Namespace) -> int:
    from localdisk.host import check

    report = check.check(_load(arguments), arguments.config, os.path.realpath(sys.argv[0]))
    print(check.as_json(report) if arguments.json else check.as_lines(report), end="")
    return PROBLEMS if report.is_problem else GOOD


def _prefetch_mode(arguments: Namespace) -> int:
    from localdisk import config
    from localdisk.hook import prefetch

    _refuse_config(arguments)
    prefetch.become_vdsm()
    backend = arguments.backend or config.load().backend
    code = GOOD
    for name in arguments.volumes:
        try:
            print(prefetch.prefetch(name, backend, _bar if sys.stdout.isatty() else None))
        except Error as error:
            if sys.stdout.isatty():
                print(prefetch.NO_BAR, end="", flush=True)
            code = _report(str(error), PROBLEMS)
    return code


def _bar(fraction: float, written: int) -> None:
    from localdisk.hook import prefetch

    print(prefetch.bar(fraction, written), end="" if fraction < 1 else prefetch.NO_BAR, flush=True)


def _remove_mode(arguments: Namespace) -> int:
    from localdisk.volumes import remove

    _require_root("remove")
    code = GOOD
    for each in remove.remove(_load(arguments), arguments.names, arguments.dry_run):
        print(each.text, flush=True)
        if each.failure:
            is_needed = isinstance(each.failure, (DependentVolumes, DiskNeeded))
            code = max(code, _report(str(each.failure), REFUSED if is_needed else PROBLEMS))
    return code


def _install_mode(arguments: Namespace) -> int:
    from localdisk.host import install

    _refuse_config(arguments)
    _require_root("install")
    return _print(install.install(os.path.realpath(sys.argv[0]), _root(arguments), arguments.dry_run))


def _uninstall_mode(arguments: Namespace) -> int:
    from localdisk.host import uninstall

    _refuse_config(arguments)
    _require_root("uninstall")
    return _print(uninstall.uninstall(_root(arguments), arguments.dry_run, arguments.force))


def _root(arguments: Namespace) -> str:
    if arguments.root == "":
        raise UsageError(problem="--root needs a directory")
    return arguments.root or ""


def _print(lines: Iterator[str]) -> int:
    """Print each line when its step is done."""
    for line in lines:
        print(line, flush=True)
    return GOOD


def _schema_mode(_arguments: Namespace) -> int:
    from localdisk import config

    print(config.schema_text(), end="")
    return GOOD


def _load(arguments: Namespace) -> Config:
    from localdisk import config

    return config.load(arguments.config)


def _require_root(mode: str) -> None:
    if os.geteuid() != 0:
        raise RootNeeded(mode=mode)


def _refuse_config(arguments: Namespace) -> None:
    if arguments.config is not None:
        raise UsageError(problem="this mode takes no --config, it always reads /etc/localdisk.yaml")


# -- arguments


def parser() -> argparse.ArgumentParser:
    """The argument parser; docs/operations.md has its help.  Bad usage raises UsageError."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(problem=message)

    top = Parser(prog="localdisk", description="oVirt VMs run from fast local copies of their disks.")
    top.add_argument("--version", action="version", version=VERSION)
    top.add_argument("--config", metavar="FILE", help="configuration instead of /etc/localdisk.yaml")
    modes = top.add_subparsers(title="modes", metavar="MODE", required=True)

    def mode(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = modes.add_parser(name, help=text, description=text)
        added.set_defaults(mode=run)
        # --config is global: `localdisk check --config FILE` works as `localdisk --config FILE check`.
        added.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return added

    hook_mode = mode("hook", _hook_mode, "serve one hook point (vdsm)")
    hook_mode.add_argument("point", nargs="?", choices=sorted(POINTS), metavar="POINT")
    gc_mode = mode("gc", _gc_mode, "remove disks and templates that no VM needs (cron, root)")
    gc_mode.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    gc_mode.add_argument(
        "--json", action="store_true", help="print JSON, as schema/gc.schema.json describes it"
    )
    status_mode = mode(
        "status", _status_mode, "show local disks, copies, the template cache, free space and problems"
    )
    form = status_mode.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="print JSON, as schema/status.schema.json describes it"
    )
    form.add_argument("--watch", action="store_true", help="draw the table again every second, until Ctrl-C")
    form.add_argument(
        "--prometheus",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print metrics, or replace FILE by them, for node_exporter's textfile collector",
    )
    status_mode.add_argument("--full", action="store_true", help="do not shorten ids and names")
    check_mode = mode("check", _check_mode, "check the configuration and this host, and show fixes")
    check_mode.add_argument("--json", action="store_true", help="print JSON")
    prefetch_mode = mode(
        "prefetch", _prefetch_mode, "copy templates into the cache before a VM needs them (root or vdsm)"
    )
    prefetch_mode.add_argument("volumes", nargs="+", metavar="PATH|VOLUME")
    prefetch_mode.add_argument(
        "--backend",
        choices=BACKENDS,
        help="for VMs with this backend; default: the configured backend",
    )
    remove_mode = mode(
        "remove", _remove_mode, "remove local disks, named by disk or by VM; their data are lost (root)"
    )
    remove_mode.add_argument("names", nargs="+", metavar="DISK|VM")
    remove_mode.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    install_mode = mode("install", _install_mode, "install localdisk on this host, or update it (root)")
    uninstall_mode = mode(
        "uninstall",
        _uninstall_mode,
        "remove localdisk from this host; configuration and local disks are kept (root)",
    )
    for each in (install_mode, uninstall_mode):
        each.add_argument(
            "--root", metavar="DIR", help="change the files below DIR, an image's root directory"
        )
        each.add_argument("--dry-run", action="store_true", help="only print what would be changed")
    uninstall_mode.add_argument(
        "--force", action="store_true", help="even if VMs run from local disks or work is unfinished"
    )
    mode("helper", _helper_mode, "do the privileged work of a hook (vdsm, through sudo)")
    mode("schema", _schema_mode, "print the JSON schema of the configuration")
    return top
