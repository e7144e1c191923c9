"""Runs cases of the crash matrix inside a guest:

    python -m tests.crash.cases prepare MATCH                  makes what the flows need, lists their tools
    python -m tests.crash.cases run MATCH PART PARTS EVERY     runs this guest's share of the cases

MATCH is a text in the names of cases, or several texts separated by |.  Of these cases, one in EVERY is
chosen; of the chosen ones, this guest runs every PARTS-th, beginning with PART.  Results are kept on the
shared disk, so that the next boot continues after the case that has switched the kernel off. Each line of
output is one JSON object: a result, or `{"dies": CASE}` just before the kernel is switched off.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bed import host, libvirt
from tests.bed.player import Call, Result
from tests.bed.shell import attempt, run
from tests.bed.storage import digest, is_zero
from tests.crash import halt
from tests.crash.flows import (
    BACKUP,
    CACHE,
    FLOWS,
    SIZE,
    SLOW,
    STARTS,
    Flow,
    PowerOff,
    Scene,
    new_scene,
    start_after_power_off,
    start_thick,
    start_without_after_boot,
    templates,
)
from tests.crash.halt import MOMENTS, Point
from tests.kernel.steps import LOCKS, configure, device, helpers, processes, starting, wait_for

STATE = host.SCRATCH / "crash"
SCENE, POINTS, RESULTS, PENDING = (STATE / name for name in ("scene", "points", "results", "pending"))
READS = ("lvm fullreport", "virsh", "qemu-img measure", "qemu-img map")  # commands that change nothing
DEFINED = Path("/run/crash-defined")  # there while the VM is defined
CLEARED = Path("/run/crash-cleared")  # there while nothing is there but the scene's source
TEMPORARY = (Path("/tmp"), Path("/var/tmp"))
HOOK_KILLS, GC_KILLS = ("TERM group", "KILL hook", "KILL helper"), ("TERM group", "KILL gc")
POWER = "power cut"


@dataclass(frozen=True)
class Case:
    flow: str
    call: str
    number: int
    moment: str
    how: str

    @property
    def name(self) -> str:
        return f"{self.flow}: {self.how} {self.moment} {self.number} {self.call}"


def main(do: str, match: str, *share: str) -> int:
    host.setup()
    libvirt.start()
    host.thin_pool()
    STATE.mkdir(exist_ok=True)
    with halt.installed():
        if do == "prepare":
            host.keep_cache()
            prepare(match)
        else:
            run_share(match, *map(int, share))
    return 0


def run_share(match: str, part: int, parts: int, every: int) -> None:
    scene = Scene.load(SCENE)
    for case in chosen(every, match)[part::parts][done() :]:
        try:
            run_case(scene, case)
        except BaseException:
            print(f"in the case {case.name}", file=sys.stderr)
            raise


def chosen(every: int, match: str) -> list[Case]:
    """Of the cases that `match` is in the name of one of `every`, of each flow, always the same, in order."""
    rng, found = random.Random(0), []
    matching = (case for case in cases() if any(text in case.name for text in match.split("|")))
    for _, each in itertools.groupby(matching, lambda case: case.flow):
        of_flow = list(each)
        numbers = rng.sample(range(len(of_flow)), -(-len(of_flow) // every))
        found += [of_flow[number] for number in sorted(numbers)]
    return found


def done() -> int:
    return len(RESULTS.read_text().splitlines()) if RESULTS.exists() else 0


# -- the cases


def cases() -> list[Case]:
    """All of those flows that `prepare` has run, flow by flow."""
    points = json.loads(POINTS.read_text())
    return [
        Case(flow.name, call, number, moment, how)
        for flow in FLOWS
        if flow.name in points
        for number, call in enumerate(points[flow.name], 1)
        for how in (*(HOOK_KILLS if flow.has_hook else GC_KILLS), POWER)
        for moment in moments(number, call)
    ]


def moments(number: int, call: str) -> tuple[str, ...]:
    """Those of a call that are not another's: before a command that changes nothing is after the last one."""
    if call not in READS:
        return MOMENTS
    return MOMENTS[: MOMENTS.index("during") + 1] if number == 1 else ("during",)


def prepare(match: str) -> None:
    """The scene, and which tools each flow runs of which a case may match."""
    configure()
    scene = new_scene()
    points = {}
    for flow in (flow for flow in FLOWS if may_match(flow, match)):
        configure(flow.config + SLOW * flow.is_slow)
        set_up(flow, scene)
        with halt.armed(None):
            result = flow.do(scene).wait()
            assert result.rc == 0, (flow.name, result)
            points[flow.name] = halt.calls()
        clear(scene)
    save(POINTS, json.dumps(points))
    scene.save(SCENE)
    os.sync()


def may_match(flow: Flow, match: str) -> bool:
    """False if no case of the flow can have one of these texts in its name: before a colon is the flow's."""
    names = (text.partition(":") for text in match.split("|"))
    return any(not colon or flow.name.endswith(name) for name, colon, _ in names)


def set_up(flow: Flow, scene: Scene) -> None:
    """What is there before the flow; libvirt knows the VM where it starts."""
    if flow.vm_starts:
        be_known(scene)
    elif not flow.vm_runs:
        be_forgotten(scene)
    flow.before(scene)
    be_defined(flow, scene)


def be_defined(flow: Flow, scene: Scene) -> None:
    """As libvirt has the VM that has run, also after a boot."""
    if flow.domain:
        libvirt.define(flow.domain(scene))


def be_known(scene: Scene) -> None:
    """As vdsm does while a VM starts."""
    if not DEFINED.exists():
        starting(scene.vm_id)
        DEFINED.touch()


def be_forgotten(scene: Scene) -> None:
    if DEFINED.exists():
        libvirt.undefine(scene.vm_id)
        DEFINED.unlink()


def save(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# -- one case


def run_case(scene: Scene, case: Case) -> None:
    flow = next(flow for flow in FLOWS if flow.name == case.flow)
    if not PENDING.exists():
        is_copy = (case.call, case.moment) == ("qemu-img convert", "during")
        configure(flow.config + SLOW * (is_copy or flow.is_slow))
        if not flow.vm_runs and not CLEARED.exists():
            clear(scene)
        CLEARED.unlink(missing_ok=True)
        set_up(flow, scene)
        if case.how == POWER:
            os.sync()
            save(PENDING, json.dumps(asdict(case)))
        before = temporary_files()
        reached = kill(flow, scene, case)
    else:  # the kernel was stopped, and booted again
        before = temporary_files()
        reached = True
    violations = list(look(flow, scene, case, before))
    record = {**asdict(case), "name": case.name, "reached": reached, "violations": violations}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    PENDING.unlink(missing_ok=True)
    print(json.dumps(record), flush=True)
    if violations or case.how == POWER or not flow.vm_runs:
        clear(scene)


def kill(flow: Flow, scene: Scene, case: Case) -> bool:
    """Run the flow up to the case's point and kill it there; False if it ended before that."""
    with halt.armed(Point(case.number, case.moment)):
        call = flow.do(scene)
        results: list[Result] = []
        waiter = threading.Thread(target=lambda: results.append(call.wait()))
        waiter.start()
        wait_for(lambda: halt.is_there() or not waiter.is_alive(), "the point", 120)
        reached = halt.is_there()
        if reached and case.how == POWER:
            print(json.dumps({"dies": asdict(case)}), flush=True)
            Path("/proc/sysrq-trigger").write_text("o")
            time.sleep(60)
        if reached:
            send(call, case.how)
            halt.go_on()
    waiter.join(150)
    return reached


def send(call: Call, how: str) -> None:
    if how == "TERM group":  # systemd sends it to all of the control group
        each(os.kill, (*helpers(), *halt.tools_that_run()), signal.SIGTERM)
        each(os.killpg, hooks(call), signal.SIGTERM)
    elif how == "KILL helper":
        each(os.kill, helpers(), signal.SIGKILL)
    else:
        each(os.kill, hooks(call), signal.SIGKILL)


def each(kill: Callable[[int, int], None], pids: Iterable[int], sign: signal.Signals) -> None:
    """Send the signal; some may have ended, and been waited for, meanwhile."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            kill(pid, sign)


def hooks(call: Call) -> list[int]:
    """The process ids of its hook, and of the start's that it is to end."""
    both = [call, call.start] if isinstance(call, PowerOff) else [call]
    return [one.process.pid for one in both if one and one.process]


# -- what is left and what is wrong


def look(flow: Flow, scene: Scene, case: Case, before: set[Path]) -> Iterator[str]:
    """The violations: straight after the kill, then after one more start and one gc."""
    try:
        wait_for(lambda: not list(ours()), "all processes to end", 60)
    except AssertionError:
        yield f"still runs: {list(ours())}"
    lvs = host.logical_volumes()
    tags = lvs.get(scene.image.leaf.id, frozenset())
    if "localdisk" in tags and not tags & {"UPDATING", "DELETING"}:
        yield from wrong_bytes(scene, (scene.source, scene.kept), "a ready disk after the kill")
    yield from suspended()
    configure(flow.config)
    if flow.has_backup:  # or no start makes the disk anew
        yield from () if BACKUP in lvs else ("the backup is gone",)
        host.remove(*({BACKUP} & lvs.keys()))
    vm_is_gone = case.how == POWER and flow.vm_runs
    again, content = (start_thick, "source") if vm_is_gone else (flow.start_again, flow.content)
    if again in (*STARTS, start_after_power_off, start_without_after_boot):
        be_known(scene)
    elif case.how == POWER:
        be_defined(flow, scene)
    result = again(scene).wait(300)
    if result.rc:
        yield f"the next start fails: {result.stderr.strip()}"
    else:
        allowed = {"source": (scene.source,), "kept": (scene.kept,), "either": (scene.source, scene.kept)}
        yield from wrong_bytes(scene, allowed[content], "the next start")
        if not any(tag.startswith(flow.tag) for tag in host.logical_volumes()[scene.image.leaf.id]):
            yield f"no tag {flow.tag}"
    collected = attempt(str(host.PROGRAM), "gc")
    if collected.returncode:
        yield f"gc fails: {collected.stdout}{collected.stderr}"
    names = volume_names()
    left = {name for name in names if name[0] != "["} - {scene.image.leaf.id, host.THIN_POOL}
    if flow.config == CACHE:
        yield from wrong_templates(scene)
        left -= templates().keys()
    if left:
        yield f"left: {left}, gc: {collected.stdout}"
    yield from suspended()
    yield from (f"mapping left: {name}" for name in mappings(names))
    yield from (f"lock left: {path}" for path in LOCKS.glob("*.*"))
    yield from (f"temporary file left: {path}" for path in temporary_files() - before)


def wrong_bytes(scene: Scene, allowed: tuple[str, ...], when: str) -> Iterator[str]:
    path = device(scene.image)
    if not path.exists():  # kept, not active
        run("lvchange", "-ay", "-K", f"{host.VOLUME_GROUP}/{scene.image.leaf.id}")
    if digest(path, SIZE) not in allowed or not is_zero(path, SIZE):
        yield f"wrong bytes: {when}"


def wrong_templates(scene: Scene) -> Iterator[str]:
    """The template LVs that are incomplete, were not prepared, or have other bytes."""
    names = {words[0] for words in scene.cached.values()}
    for name, its_tags in templates().items():
        if name not in names or "UPDATING" in its_tags:
            yield f"template left: {name} {set(its_tags)}"
            continue
        lv = f"{host.VOLUME_GROUP}/{name}"
        if run("lvs", "--noheadings", "-o", "lv_active,lv_permissions", lv).split() != ["read-only"]:
            yield f"template active, or writable: {name}"
        run("lvchange", "-ay", "-K", lv)
        if digest(Path("/dev", lv), SIZE) != scene.base:
            yield f"wrong bytes: template {name}"
        run("lvchange", "-an", lv)


def ours() -> Iterator[list[str]]:
    """The command lines of localdisk's processes and its tools that still run, by one look at all."""
    for _, words in processes():
        is_ours = "/50_localdisk" in " ".join(words[:3]) or str(host.PROGRAM) in words[:3]
        if is_ours or halt.is_call(words):
            yield words


def suspended() -> Iterator[str]:
    for line in run("dmsetup", "info", "-c", "--noheadings", "-o", "name,suspended").splitlines():
        if line.endswith("Suspended"):
            yield f"suspended: {line}"


def volume_names() -> list[str]:
    """The names of all LVs of the volume group, hidden ones in brackets."""
    return [row["lv_name"] for row in host.lvm_report("lvs", "-a", "-o", "lv_name", host.VOLUME_GROUP)]


def mappings(names: list[str]) -> Iterator[str]:
    """Those of the volume group that belong to no LV of these names."""
    known = {name.strip("[]") for name in names}
    prefix = host.VOLUME_GROUP.replace("-", "--") + "-"
    for line in run("dmsetup", "info", "-c", "--noheadings", "-o", "name").splitlines():
        if line.startswith(prefix):
            name = line[len(prefix) :].removesuffix("-tpool").replace("--", "-")
            if name not in known:
                yield line


def temporary_files() -> set[Path]:
    return {path for folder in TEMPORARY for path in folder.glob("*") if path.name[:4] != "tmp_"}


def clear(scene: Scene) -> None:
    """Nothing of the scene but its source."""
    if scene.vm_id in libvirt.active():  # of the flow before
        libvirt.destroy(scene.vm_id)
    if scene.vm_id in libvirt.defined() and not DEFINED.exists():  # that has run
        libvirt.undefine(scene.vm_id)
    host.remove(*(name for name in host.logical_volumes() if name != host.THIN_POOL))
    for path in LOCKS.glob("*.*"):
        path.unlink()
    CLEARED.touch()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
