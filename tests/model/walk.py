"""A random walk: a seed chooses the steps; each is done on a host, and predicted by the model.

    Walk(world, Plan(seed, steps), repeat).run()

A *step* is one thing that people, vdsm, VMs or cron do; it makes one or more *calls*.  A call can meet
*trouble*.  After each call:

- every local disk is exactly as the model predicts, with its tags, size, bytes and LVM UUID; after trouble it
  is at one of the stages that the call passes through;
- the call is refused, or gc has doubts, exactly if the model predicts that; - every template LV is as the
model predicts, too; after trouble it is unchanged if it is in use, or what is left
  of it can do no harm;
- foreign volumes are unchanged, and there is no lock file except of a start that is still copying;
- removed disks were erased as their VM's rules demand.

In the end everything stops, time passes, gc runs, and nothing may be left.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.model import orders
from tests.model.judge import Judge
from tests.model.orders import Branch
from tests.model.predict import Call, Prediction, Stages, predict
from tests.model.rules import MIB, Policy, Rules
from tests.model.state import DRIFTED, READY, UNFINISHED, LocalDisk, State, Vm
from tests.model.world import FORBIDDEN, HOOKS, Ended, Trouble, World

OLDER = "PU_00000000-0000-0000-0000-000000000000"  # a tag of vdsm's older hook

Step = Callable[[Any], None]


@dataclass(frozen=True)
class Plan:
    """Which walk: everything else follows from it.

    `durations` are what `grace` can be, in seconds.  Where a call takes no time, `is_exact`: then things are
    also looked at in the very second that they are due.
    """

    seed: int
    steps: int
    durations: tuple[int, ...] = (0, 60, 600, 3600)
    is_exact: bool = True


class Walk:
    """One walk.  `state` is what the model says, `trail` the steps so far in words, `counts` them by name."""

    def __init__(self, world: World, plan: Plan, repeat: str) -> None:
        self.world, self.plan, self.repeat, self.judge = world, plan, repeat, Judge(world)
        self.rng = random.Random(plan.seed)
        self.trail: list[str] = []
        self.counts: Counter[str] = Counter()
        self.pending: dict[str, list[Call]] = {}  # VM -> the calls that are left of its start
        self.branches: list[Branch] = []  # while a call is paused
        self.paused_end: Ended | None = None
        self.intruders: list[str] = []  # volumes that are not localdisk's and have names that it wants
        self.preferences: dict[str, float] = {}  # by step: each walk has its own
        self.silent_for = 0  # steps
        self.is_calm = False  # no call meets trouble
        self.is_doomed = False  # every call is killed
        self.state = self._begin()

    def run(self) -> None:
        """Raises AssertionError with what is wrong, how to repeat it, and the walk so far."""
        try:
            for number in range(self.plan.steps):
                self.trail.append(f"{number + 1:4}.")
                self._step()
            self.trail.append(" end.")
            self._settle()
        except Exception as problem:
            text = str(problem) if isinstance(problem, AssertionError) else repr(problem)
            lines = [text, "", "to repeat it:", f"    {self.repeat}", "", "the walk:", *self.trail]
            raise AssertionError("\n".join(lines)) from problem

    def _begin(self) -> State:
        """Some VMs, and rules for them."""
        rng, sources, vms, templates = self.rng, {}, {}, {}
        if "cache" not in self.world.cannot:
            made = [self.world.new_template(rng) for _ in range(rng.choice((1, 2, 3, 3)))]
            templates = {template.volume: template for template in made}
        for _ in range(3):
            bases = [
                rng.choice((None, *templates.values(), *templates.values()))
                for _ in range(rng.choice((1, 1, 2)))
            ]
            own = dict(self.world.new_image(rng, base) for base in bases)
            sources.update(own)
            vms[self._id()] = Vm(tuple(own), rng.choice(("lvm", "lvm", "lvmthin", "on")))
        if rng.random() < 0.3 and "twins" not in self.world.cannot:  # a VM that was imported once more
            first, *_, last = sources
            sources[last] = replace(sources[last], volume=sources[first].volume)
        look = self.world.look()
        self.judge.others = {seen.name: seen for seen in look.volumes}
        self.state = State(
            look.now,
            Rules(),
            vms,
            sources,
            self.world.room(),
            templates=templates,
            foreign=frozenset(self.judge.others),
        )
        self._apply(self._any_rules())
        for vm_id, vm in vms.items():
            shown = ", ".join(
                f"{i[:8]} volume {sources[i].volume[:8]} on {sources[i].base[:8] or 'nothing'}"
                for i in vm.images
            )
            self.trail.append(f"      VM {vm_id[:8]} localdisk={vm.value}, images {shown}")
        return self.state

    def _any_rules(self) -> Rules:
        images = {vm_id: vm.images for vm_id, vm in self.state.vms.items()}
        rules = Rules.random(self.rng, self.plan.durations, images)
        rules = rules.without_discard() if "discard" in self.world.cannot else rules
        return rules.without_templates() if "cache" in self.world.cannot else rules

    def _id(self) -> str:
        text = f"{self.rng.getrandbits(128):032x}"
        return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-8{text[17:20]}-{text[20:]}"

    def _chance(self, of_one: float) -> bool:
        return self.rng.random() < of_one

    # -- steps

    def _step(self) -> None:
        """Choose one of the steps that are possible, by weight."""
        if self.silent_for:
            self.silent_for -= 1
            if not self.silent_for:
                self._silence(False)
        possible = []
        for weight, step, subjects in self._steps():
            preference = self.preferences.setdefault(step.__name__, self.rng.choice((0.5, 1, 1, 3)))
            if subjects and step.__name__.strip("_") not in self.world.cannot:
                possible.append((weight * preference, step, subjects))
        ((_, step, subjects),) = self.rng.choices(possible, [weight for weight, _, _ in possible])
        subject, name = self.rng.choice(subjects), step.__name__.strip("_")
        self.counts[name] += 1
        self._note(f"{name.replace('_', ' ')} {'' if subject is None else str(subject)[:8]}")
        step(subject)

    def _note(self, text: str) -> None:
        """Say more of this step."""
        self.trail[-1] = f"{self.trail[-1]} {text}".rstrip()

    def _steps(self) -> list[tuple[float, Step, Sequence[Any]]]:
        """Weight, step, and what it can be done to."""
        state, always = self.state, [None]
        flying = state.flight.vm if state.flight else ""
        off = [v for v, vm in state.vms.items() if not vm.is_active and v not in self.pending and v != flying]
        clean = [v for v in off if not state.vms[v].is_defined]
        clean += [disk.vm for disk in state.disks.values() if disk.vm in clean]
        active = [v for v, vm in state.vms.items() if vm.is_active]
        waiting = [v for v in self.pending if v != flying]
        marked = [disk.vm for disk in state.disks.values() if disk.unneeded is not None and disk.vm in off]
        still = [image_id for v in off for image_id in state.vms[v].images]
        closed = [
            k for k, disk in state.disks.items() if disk.name and not (state.is_open(k) or state.is_locked(k))
        ]
        templates = [*state.templates]
        complete = [
            key
            for key, lv in state.cached.items()
            if lv.state == READY and not (state.is_open(key) or state.is_locked(key))
        ]
        return [
            (24, self._start, clean),
            (8, self._go_on, waiting),
            (6 if flying else 2, self._break_off, [*self.pending]),
            (12, self._stop, active),
            (4, self._tidy, [v for v in off if state.vms[v].is_defined]),
            (3, self._late_destroy, off + active),
            (3, self._power_off, [*self.pending]),
            (1, self._late_power_off, off + active),
            (2, self._live_snapshot, [v for v in active if state.vms[v].paths]),
            (1, self._early_destroy, [v for v in waiting if len(self.pending[v]) > 1]),
            (8, self._write, [v for v in active if state.vms[v].images]),
            (1, self._forbid, active),
            (9, self._gc, always),
            (1, self._gc_dry_run, always),
            (3, self._restart_vdsm, always),
            (1, self._power_cut, always),
            (2, self._power_cut_within, [v for v in clean + active if v not in self.pending]),
            (6, self._end_copy, always if state.flight else []),
            (6, self._clock, always),
            (3, self._configure, always),
            (9, self._keep_after_all, marked),
            (2, self._property, [*state.vms]),
            (2, self._source_changes, still),
            (2, self._snapshot, still),
            (1, self._merge, still),
            (1, self._grow, still),
            (1, self._move_disk, still),
            (1, self._fill, always),
            (2, self._hold, closed),
            (10, self._let_go, sorted(state.busy)),
            (1, self._silence, [] if state.is_silent else [True]),
            (0.5, self._foreign_volume, still),
            (2, self._remove_foreign, self.intruders),
            (1, self._older_volume, still),
            (2, self._remove, [*state.vms]),
            (1, self._backup, [key for key in closed if key not in state.backups]),
            (3, self._remove_backup, sorted(state.backups)),
            (5, self._prefetch, templates),
            (2, self._template_changes, templates),
            (5, self._tamper, complete),
            (2, self._hold, complete),
        ]

    # -- what vdsm does

    def _start(self, vm_id: str) -> None:
        self._call("define", vm_id)
        self._begin_start(vm_id)

    def _begin_start(self, vm_id: str) -> None:
        """Some of the calls of a start; with an older vdsm, before_vm_start is the only hook point."""
        images = () if self._chance(0.15) else self.state.vms[vm_id].images
        self.pending[vm_id] = [Call("after_disk_prepare", (vm_id, image_id)) for image_id in images]
        self.pending[vm_id] += [Call("before_vm_start", (vm_id,)), Call("create", (vm_id,))]
        self._go_on(vm_id, 9 if self._chance(0.7) else self.rng.randint(0, 2))

    def _go_on(self, vm_id: str, most: int = 9) -> None:
        """Some more calls of a start; refused, vdsm gives it up.  A domain that may be created is at once."""
        while most > 0 or [call.what for call in self.pending.get(vm_id, ())] == ["create"]:
            most, flight = most - 1, self.state.flight
            if not self.pending.get(vm_id) or (flight and flight.vm == vm_id):
                return
            call = self.pending[vm_id].pop(0)
            is_accepted = self._call(call.what, *call.arguments)
            if is_accepted and call.what == "create":
                del self.pending[vm_id]
                if not self.branches:
                    self.judge.check_boot(self.state, vm_id)
            elif not (is_accepted and self.pending[vm_id]):
                self._break_off(vm_id)

    def _break_off(self, vm_id: str) -> None:
        """vdsm ends a start; now and then it does not come to all that belongs to that."""
        del self.pending[vm_id]
        if self._chance(0.9):
            self._undefine(vm_id)
        if self._chance(0.8):
            self._call("after_vm_destroy", vm_id)

    def _power_off(self, vm_id: str) -> None:
        """The VM is powered off while it starts.  vdsm still calls what it has begun to call."""
        self._call("before_vm_destroy", vm_id)
        flight = self.state.flight
        if flight and flight.vm == vm_id:
            self._call("finish")
        elif self._chance(0.5):
            self._go_on(vm_id, 1)
        left = self.pending.pop(vm_id, [])
        if self.state.vms[vm_id].is_active:  # nothing of it is local
            self._call("destroy", vm_id)
        # Where calls take time, nothing is left that counts for a minute.
        self.is_calm = not self.plan.is_exact
        if self.is_calm or self._chance(0.9):
            self._call("after_vm_destroy", vm_id)
        self.is_calm = False
        if self._chance(0.9):
            self._undefine(vm_id)
        if any(call.what == "before_vm_start" for call in left) and self._chance(0.5):
            self._call("before_vm_start", vm_id)
            self.state = self.state.with_vm(vm_id, paths={})

    def _late_power_off(self, vm_id: str) -> None:
        """The hook point is called for a VM that runs, has stopped, or is about to start."""
        self._call("before_vm_destroy", vm_id)

    def _live_snapshot(self, vm_id: str) -> None:
        """A live snapshot is not refused: from now on the VM writes to another volume."""
        vm = self.state.vms[vm_id]
        image_id = self.rng.choice([*vm.paths])
        self.world.live_snapshot(self.state, vm_id, image_id)
        self.state = self.state.with_vm(vm_id, drifted=vm.drifted | {image_id})
        self._note(f"of {image_id[:8]}")

    def _stop(self, vm_id: str) -> None:
        """The VM ends.  vdsm may not see it; something else may have its disk open."""
        if not self.branches and self._chance(0.3):
            self._call("before_vm_destroy", vm_id)
        opened = [key for key, vm in self.state.in_use.items() if vm == vm_id]
        if opened and not self.branches and "hold" not in self.world.cannot and self._chance(0.15):
            self._hold(self.rng.choice(opened))
        is_seen = bool(self.branches) or self._chance(0.6)
        self._call("destroy", vm_id)
        if is_seen or self._chance(0.7):
            self._undefine(vm_id)
        if is_seen:
            self._call("after_vm_destroy", vm_id)
        elif self._chance(0.5):
            self._call("gc", True)

    def _vanish(self, vm_id: str) -> None:
        """vdsm gives up a start of which something still runs; then gc comes."""
        self.pending[vm_id].clear()
        self._undefine(vm_id)
        self._call("gc", True)

    def _end_paused(self, vm_id: str) -> None:
        """vdsm powers off the VM of a start of which something still runs."""
        self._call("before_vm_destroy", vm_id)

    def _undefine(self, vm_id: str) -> None:
        if self.state.vms[vm_id].is_defined:
            self._call("undefine", vm_id)

    def _tidy(self, vm_id: str) -> None:
        """vdsm finds that a VM has stopped."""
        self._undefine(vm_id)
        if self._chance(0.5):
            self._call("after_vm_destroy", vm_id)

    def _late_destroy(self, vm_id: str) -> None:
        """The hook point is called for a VM that has stopped long ago, or runs."""
        self._call("after_vm_destroy", vm_id)

    def _early_destroy(self, vm_id: str) -> None:
        """A start continues although its disks were removed: it must be refused."""
        self._call("after_vm_destroy", vm_id)
        self._go_on(vm_id)

    def _forbid(self, vm_id: str) -> None:
        self._call(self.rng.choice(FORBIDDEN), vm_id)

    def _restart_vdsm(self, _: None) -> None:
        """What it did is ended; before it starts, gc; then it takes up the VMs that run or are shut off."""
        if self.state.flight:
            self._call(self.rng.choice(("give up", "lose")))
        for vm_id in [*self.pending]:
            del self.pending[vm_id]
            if self._chance(0.7):
                self._undefine(vm_id)
        while not self._call("gc", False):  # vdsm does not start then; systemd tries again
            self._note("again")
        for vm_id, vm in self.state.vms.items():
            for image_id in vm.images if vm.has_started else ():
                self._call("after_disk_prepare", vm_id, image_id)

    def _end_copy(self, _: None) -> None:
        """A start that copies is done, or killed."""
        flight = self.state.flight
        assert flight
        how = self.rng.choice(("finish", "finish", "finish", "give up", "lose"))
        self._note(f"of {'the template of ' * flight.is_filling}{flight.vm[:8] or 'a prefetch'}")
        if not self._call(how) and flight.vm in self.pending:
            self._break_off(flight.vm)

    # -- what others do

    def _write(self, vm_id: str) -> None:
        """The guest writes, to where its disks are."""
        vm = self.state.vms[vm_id]
        image_id = self.rng.choice(vm.images)
        if image_id not in vm.paths:
            self._change(image_id, "content")
            return
        if image_id in vm.drifted:
            return
        key, token = self.state.named(vm.paths[image_id]), f"w{self.rng.getrandbits(20)}"
        self.world.write(vm.paths[image_id], token)
        disk = self.state.disks[key]
        self._look_at_all(self.state.with_disk(key, replace(disk, holds=(*disk.holds, token))))

    def _gc(self, _: None) -> None:
        self._call("gc", True)

    def _gc_dry_run(self, _: None) -> None:
        self._call("gc --dry-run")

    def _power_cut(self, _: None) -> None:
        """The host loses power.  libvirt still has the definitions of its VMs, /run is empty."""
        self.world.power_cut(self.state)
        self.pending.clear()
        vms = {vm_id: replace(vm, is_active=False) for vm_id, vm in self.state.vms.items()}
        self._look_at_all(replace(self.state, vms=vms, busy=frozenset(), flight=None, marks={}))
        self._restart_vdsm(None)

    def _power_cut_within(self, vm_id: str) -> None:
        """The host loses power while a VM starts or stops, or while gc runs after that."""
        vm, is_doomed = self.state.vms[vm_id], self._chance(0.7)
        if vm.is_active:
            self._call("destroy", vm_id)
            call = Call("after_vm_destroy", (vm_id,))
        else:
            self._call("define", vm_id)
            images = [Call("after_disk_prepare", (vm_id, image_id)) for image_id in vm.images]
            call = self.rng.choice([*images, *images, Call("before_vm_start", (vm_id,))])
        self.is_doomed = is_doomed
        self._call(call.what, *call.arguments)
        self.is_doomed = not is_doomed
        if not is_doomed:
            self._call("gc", True)
        self.is_doomed = False
        self._power_cut(None)

    def _clock(self, _: None) -> None:
        """Time passes, preferably until something is due or just before that, or is set back; gc runs."""
        dues = [due for key in self.state.disks for due in self._dues(key)]
        dues += self._dues_of_templates()
        if self.plan.is_exact and dues and self._chance(0.7):
            since, due = self.rng.choice(dues)
            now = self.rng.choice((due, due, due - 1, since - 1))
        else:
            unit = max(self.plan.durations)
            now = self.state.now + self.rng.choice((1, 1, -1)) * self.rng.choice((unit, unit, 86400))
        self._set_clock(now)
        if self._chance(0.7):
            self._call("gc", True)

    def _dues(self, key: str) -> Iterator[tuple[int, int]]:
        """Since when gc has waited with this disk, and until when."""
        disk = self.state.disks[key]
        policy = self.state.rules.of(disk.vm)
        if disk.stopped is not None:
            yield disk.stopped, disk.stopped + policy.keep_for
        if disk.unneeded is not None:
            yield from 3 * [(disk.unneeded, disk.unneeded + policy.grace)]

    def _dues_of_templates(self) -> Iterator[tuple[int, int]]:
        """Since when template LVs have not been used, and until when they are kept."""
        kept = self.state.rules.general.cache_for
        for lv in self.state.cached.values():
            if lv.state == READY:
                yield lv.used, lv.used + kept

    def _set_clock(self, now: int) -> None:
        self.world.set_clock(now)
        self.state = replace(self.state, now=now)
        self._note(f"to {now}")

    def _configure(self, _: None) -> None:
        """The administrator changes all rules, or one of them, preferably one that is in use."""
        rules = self._any_rules()
        if self._chance(0.7):
            names = ["on_stop", "erase", "on_source_change", "keep_for", "backend"]
            names += 3 * ["templates", "max_size", "cache_for"] * ("cache" not in self.world.cannot)
            disks = self.state.disks.values()
            names += ["older_disks"] * 9 * any(disk.is_older for disk in disks)
            names += ["on_stop"] * 9 * any(disk.unneeded is not None for disk in disks)
            names += ["erase"] * 9 * any(disk.is_aside and disk.name for disk in disks)
            name = self.rng.choice(names)
            rules = self.state.rules.with_general(name, getattr(rules.general, name))
        self._apply(rules)

    def _apply(self, rules: Rules) -> None:
        self.state = replace(self.state, rules=rules)
        self.world.configure(rules)
        self.trail.append(f"      {rules.yaml()}")

    def _keep_after_all(self, vm_id: str) -> None:
        """A disk that gc has marked as unneeded is needed again."""
        self._apply(self.state.rules.with_own(vm_id, "on_stop", self.rng.choice(("keep", "keep", "delete"))))
        if self.state.vms[vm_id].is_defined or self._chance(0.3):
            self._call("after_vm_destroy", vm_id)
            return
        self._call("define", vm_id)
        if self._chance(0.5):
            self._call("gc", True)
        self._begin_start(vm_id)

    def _property(self, vm_id: str) -> None:
        value = self.rng.choice(("lvm", "lvmthin", "on", "lvm", "lvmthin", "on", "off"))
        self.state = self.state.with_vm(vm_id, value=value)
        self._note(value)

    def _source_changes(self, image_id: str) -> None:
        self._change(image_id, "content")

    def _snapshot(self, image_id: str) -> None:
        self._change(image_id, "snapshot")

    def _merge(self, image_id: str) -> None:
        self._change(image_id, "merge")

    def _grow(self, image_id: str) -> None:
        self._change(image_id, "grow")

    def _template_changes(self, template: str) -> None:
        """A template becomes another, under all that stands on it, though nobody should do so."""
        state = self.state
        on_it = [image_id for image_id, source in state.sources.items() if source.base == template]
        flight = state.flight
        if flight and flight.image in on_it and not flight.is_filling:
            return  # it would be read while it changes
        changed = self.world.change_template(state.templates[template], self.rng)
        self.state = replace(state, templates={**state.templates, template: changed})
        self._note(f"{changed.version}, {changed.content}")
        for image_id in on_it:
            self._change(image_id, "template")

    def _prefetch(self, template: str) -> None:
        self._call("prefetch", template, self.rng.choice(("lvm", "lvmthin")))

    def _tamper(self, key: str) -> None:
        """Somebody does something to a template LV."""
        how = self.rng.choice(("spoil", "spoil", "make writable", "change a tag", "remove a tag"))
        self.world.tamper(key, how, f"w{self.rng.getrandbits(20)}")
        lv = self.state.cached[key]
        lv = replace(
            lv,
            is_sound=lv.is_sound and how == "spoil",
            is_odd=lv.is_odd or how in ("make writable", "remove a tag"),
            is_spoiled=lv.is_spoiled or how == "spoil",
        )
        self._note(how)
        self._look_at_all(self.state.with_cached(key, lv))

    def _change(self, image_id: str, how: str) -> None:
        base = self.state.templates.get(self.state.sources[image_id].base)
        changed = self.world.change(image_id, self.state.sources[image_id], how, self.rng, base)
        if changed:
            self.state = replace(self.state, sources={**self.state.sources, image_id: changed})
            self._note(f"{how}: volume {changed.volume[:8]}, {changed.version}, {changed.size} bytes")

    def _move_disk(self, image_id: str) -> None:
        """It is detached from its VM and attached to another."""
        state = self.state
        old, volume = state.owner(image_id), state.sources[image_id].volume
        busy = {v for v, vm in state.vms.items() if vm.is_active} | {*self.pending, old}
        busy |= {state.flight.vm} if state.flight else set()
        busy |= {v for v, vm in state.vms.items() if volume in (state.sources[i].volume for i in vm.images)}
        new = [v for v in state.vms if v not in busy]
        if new:
            vm_id = self.rng.choice(new)
            rest = tuple(i for i in state.vms[old].images if i != image_id)
            state = state.with_vm(old, images=rest)
            self.state = state.with_vm(vm_id, images=(*state.vms[vm_id].images, image_id))
            self._note(f"to VM {vm_id[:8]}")

    def _fill(self, _: None) -> None:
        """Others take up room, or give it back."""
        room = self.state.room
        free = self.state.free + room.filled
        leave = self.rng.choice((free, free, free // 2, 64 * MIB, 40 * MIB, 12 * MIB))
        size = max(0, free - leave) // room.extent * room.extent
        self.world.fill(size)
        self.state = replace(self.state, room=replace(room, filled=size))
        self._note(f"{size // MIB} MiB")

    def _hold(self, key: str) -> None:
        """Something opens a disk that no VM uses, or that the VM is just leaving."""
        if self.world.hold(key):
            state = replace(self.state, busy=self.state.busy | {key})
            lv = state.cached.get(key)
            self.state = state.with_cached(key, replace(lv, is_active=True)) if lv else state

    def _let_go(self, key: str) -> None:
        self.world.let_go(key)
        self.state = replace(self.state, busy=self.state.busy - {key})

    def _silence(self, is_silent: bool) -> None:
        """libvirt does not answer for a few steps."""
        self.world.silence(is_silent)
        self.state = replace(self.state, is_silent=is_silent)
        self.silent_for = self.rng.randint(2, 4) if is_silent else 0

    def _foreign_volume(self, image_id: str) -> None:
        """A volume that is not localdisk's gets a name that localdisk wants."""
        vm, image = f"VM_{self.state.owner(image_id)}", f"IU_{image_id}"
        kinds: tuple[set[str], ...] = (
            set(),
            {"localdisk"},
            {vm, "localdisk"},
            {image, "UPDATING"},
            {vm, f"VM_{self._id()}", image},
            {vm, f"VM_{self._id()}", image, "DELETING"},
        )
        name, tags = self.state.sources[image_id].volume, frozenset(self.rng.choice(kinds))
        if self._is_possible(name, 4 * MIB):
            self.world.add(name, tags, 4 * MIB)
            (self.judge.others[name],) = (seen for seen in self.world.look().volumes if seen.name == name)
            self.intruders.append(name)
            room = replace(self.state.room, thick=self.state.room.thick - 4 * MIB)
            self.state = replace(self.state, room=room, foreign=self.state.foreign | {name})

    def _remove_foreign(self, name: str) -> None:
        self.world.remove(name)
        self.intruders.remove(name)
        del self.judge.others[name]
        room = replace(self.state.room, thick=self.state.room.thick + 4 * MIB)
        self.state = replace(self.state, room=room, foreign=self.state.foreign - {name})

    def _older_volume(self, image_id: str) -> None:
        """What vdsm's older hook has left behind."""
        vm_id, source = self.state.owner(image_id), self.state.sources[image_id]
        size = -(-source.size // (4 * MIB)) * 4 * MIB
        if self._is_possible(source.volume, size):
            state = self.rng.choice((READY, READY, UNFINISHED))
            tags = {f"VM_{vm_id}", f"IU_{image_id}", OLDER} | ({"UPDATING"} if state == UNFINISHED else set())
            self.world.add(source.volume, frozenset(tags), size)
            (seen,) = (seen for seen in self.world.look().volumes if seen.name == source.volume)
            holds = seen.holds or ()
            disk = LocalDisk(
                source.volume, vm_id, image_id, state, "", holds, size, False, 0, is_older=True
            )  # fmt: skip
            self._look_at_all(self.state.with_disk(seen.uuid, disk))

    def _is_possible(self, name: str, size: int) -> bool:
        """Whether a volume of that name and size can be made."""
        state = self.state
        return not (state.named(name) or name in state.foreign) and state.free >= size

    def _remove(self, vm_id: str) -> None:
        """The operator gives up a VM's disks."""
        self._call("remove", vm_id)

    def _backup(self, key: str) -> None:
        """The administrator makes a snapshot of a local disk."""
        if self.state.free < 4 * MIB:
            return
        name = f"backup-{self.rng.getrandbits(40):010x}"
        self.world.snapshot(name, self.state.disks[key].name)
        (seen,) = (seen for seen in self.world.look().volumes if seen.name == name)
        self.judge.others[name] = seen
        room = replace(self.state.room, thick=self.state.room.thick - seen.size)
        self._look_at_all(replace(self.state, backups={**self.state.backups, key: name}, room=room))

    def _remove_backup(self, key: str) -> None:
        name = self.state.backups[key]
        size = self.judge.others.pop(name).size
        self.world.remove(name)
        room = replace(self.state.room, thick=self.state.room.thick + size)
        backups = {k: n for k, n in self.state.backups.items() if k != key}
        self._look_at_all(replace(self.state, backups=backups, room=room))

    # -- the end

    def _settle(self) -> None:
        """Everything stops, what is due is due, and nothing is left."""
        self.is_calm = True
        if self.state.is_silent:
            self._silence(False)
        if self.state.flight:
            self._call("give up")
        self.pending.clear()
        for vm_id, vm in self.state.vms.items():
            if vm.is_active:
                self._call("destroy", vm_id)
            if vm.drifted or self._chance(0.5):  # a domain that vdsm left behind holds nothing
                self._undefine(vm_id)
        for key in sorted(self.state.busy):
            self._let_go(key)
        for key in sorted(self.state.backups):
            self._remove_backup(key)
        for vm_id in sorted({disk.vm for disk in self.state.disks.values() if disk.state == DRIFTED}):
            self._undefine(vm_id)  # the operator has brought its data back
            self._call("remove", vm_id)
        self._apply(self.state.rules.deciding_about_older_disks())
        if self._chance(0.5):  # then they go at once
            self._apply(self.state.rules.without_templates())
            self._call("gc", True)
            assert not self.state.cached, f"left: {self.state.cached}"
        for _ in range(5):  # marked as unneeded, maybe anew, past grace, past keep_for, past grace once more
            self._call("gc", True)
            self._until_all_is_due()
        self._call("gc", True)
        assert not self.state.disks, f"left: {self.state.disks}"
        assert not self.state.cached, f"left: {self.state.cached}"

    def _until_all_is_due(self) -> None:
        if "clock" not in self.world.cannot:
            dues = [due for key in self.state.disks for _, due in self._dues(key)]
            dues += [disk.made or 0 for disk in self.state.disks.values()]
            dues += [due for _, due in self._dues_of_templates()]
            self._set_clock(max([self.state.now, *dues]) + max(self.plan.durations))
        else:
            self._apply(Rules(Policy(keep_for=0, grace=0, older_disks="as_ours")))

    # -- calls

    def _call(self, what: str, *arguments: object) -> bool:
        """Make it and compare; returns whether it was accepted."""
        call = Call(what, arguments)
        if self.branches:
            return self._call_during(call)
        trouble = self._trouble(call)
        if trouble and trouble.kind == "copying":
            call = Call("before copy", arguments)
        elif trouble and trouble.kind == "filling":
            call = Call("prefetch before fill" if what == "prefetch" else "before fill", arguments)
        ended = self._perform(call, trouble)
        if ended.other:  # it had to wait for the start in flight
            self._take_notice(Call("finish"), ended.other)
        if ended.result == "paused":
            return self._overlap(call)
        p = predict(self.state, call)
        if ended.trouble == "fail":
            p = self._in_spite(call, ended) if ended.is_good else replace(p, ways=self._ways(call))
        self.state = self.judge.after(self.state, call, ended, p)
        return ended.is_good

    def _in_spite(self, call: Call, ended: Ended) -> Prediction:
        """What the call does if it goes well though something fails.

        If that was the helper's virsh, an open disk is taken to be in use; if it was the hook's, the disk is
        left as it is; if it was about a template, that is not used.
        """
        ways = self._ways(call)
        good = [p for p in ways if not p.is_refused] or ways
        if call.vm_id and ended.paths is not None:
            good.sort(key=lambda p: p.state.vms[call.vm_id].paths != ended.paths)
        return replace(good[0], ways=good[1:])

    def _ways(self, call: Call) -> list[Prediction]:
        """What the call does, by what fails: nothing, libvirt's answers, the cache."""
        ways = []
        for is_flaky, is_mute, is_uncached in itertools.product((False, True), repeat=3):
            state = replace(self.state, is_flaky=is_flaky, is_mute=is_mute, is_uncached=is_uncached)
            p = predict(state, call)
            p.state = replace(p.state, is_flaky=False, is_mute=False, is_uncached=False)
            ways.append(p)
        return ways

    def _perform(self, call: Call, trouble: Trouble | None) -> Ended:
        ended = self.world.perform(self.state, call, trouble)
        befell = ""
        if trouble and ended.trouble:
            befell = f" ({ended.trouble} at {trouble.at}{' of its changes' * trouble.of_changes})"
        self.trail.append(f"      {call}{befell}: {ended.result} {ended.said}".rstrip())
        return ended

    def _take_notice(self, call: Call, ended: Ended) -> None:
        """This call has ended in between; nobody has looked then."""
        p = predict(self.state, call)
        expected = "refused" if p.is_refused else "done"
        assert ended.result == expected, f"{call} is {ended.result}, not {expected}: {ended.said}"
        self.state = p.state

    def _look_at_all(self, state: State) -> None:
        """Compare, after something that is no call."""
        options: dict[str, Stages] = {key: [disk] for key, disk in state.disks.items()}
        self.state = self.judge.check(self.judge.match(state, options, {}, state, is_exact=True))

    def _trouble(self, call: Call) -> Trouble | None:
        """What befalls it, mostly nothing."""
        kinds = [kind for kind in self._kinds(call) if kind in self.world.troubles]
        if self.is_calm or not kinds:
            return None
        if not (self.is_doomed or self._chance(0.5 if call.what == "gc" else 0.35)):
            return None
        kind, most = "all" if self.is_doomed else self.rng.choice(kinds), self.world.moments(call)
        if kind not in ("pause", "copying", "filling") and self._chance(0.6):
            return Trouble(kind, self.rng.randint(1, 6), of_changes=True)
        return Trouble(kind, self.rng.randint(1, most))

    def _kinds(self, call: Call) -> tuple[str, ...]:
        is_alone = self.state.flight is None
        pause = ("pause",) * 4 if is_alone and not self.state.is_silent else ()
        if call.what == "gc":  # before vdsm starts, no VM is started
            return ("all", "all", "fail", *(pause if call.arguments == (True,) else ()))
        filling = ("filling",) * 3 if is_alone else ()
        if call.what == "prefetch":
            return ("helper", "hook", "all", "term", "fail", *filling, *pause)
        if call.what not in HOOKS or self.state.vms[call.vm_id].using == "off":
            return ()
        is_start = call.what == "after_disk_prepare" and not self.state.vms[call.vm_id].is_active
        copying = ("copying",) * 3 if is_start and is_alone else ()
        left = copying + filling * bool(copying)
        return ("helper", "hook", "all", "term", "fail", *left, *pause)

    # -- two calls at once

    def _overlap(self, call: Call) -> bool:
        """Another step happens in the midst of `call`; what comes out is as if they had happened in turns."""
        before, self.paused_end = self.state, None
        self.branches = orders.begin(before, call)
        self.trail[-1] += " meanwhile"
        self._step_during(call.vm_id)
        ended = self.paused_end or self.world.resume()
        self.trail.append(f"      {call} goes on: {ended.result} {ended.said}".rstrip())
        finals, self.branches = orders.end(self.branches, ended), []
        assert finals, f"{call} is {ended.result} ({ended.said}), which no order explains"
        keys = {*before.disks, *(key for b in finals for key in b.state.disks)}
        options = {key: [b.state.disks.get(key) for b in finals] for key in keys}
        erased = {key: {b.erased[key] for b in finals if key in b.erased} for key in keys}
        state = replace(finals[0].state, disks=before.disks)
        after = self.judge.match(state, options, erased, before, is_exact=False)
        after = self.judge.check_marks([before, *(b.state for b in finals)], after, is_exact=False)
        self.state = self.judge.check(after, call, ended)
        return ended.is_good

    def _step_during(self, vm_id: str) -> None:
        """One step of VMs that the paused call is not about, by preference of those that gc deals with."""
        state = self.state
        others = [v for v in state.vms if v != vm_id and v not in self.pending]
        clean = [v for v in others if not state.vms[v].is_active and not state.vms[v].is_defined]
        clean += 2 * [disk.vm for disk in state.disks.values() if disk.vm in clean]
        active = [v for v in others if state.vms[v].is_active]
        steps: list[tuple[Step, Any]] = [(self._gc, None)]
        steps += 2 * [(self._start, v) for v in clean] + 2 * [(self._stop, v) for v in active]
        steps += 2 * [(self._vanish, vm_id), (self._end_paused, vm_id)] if vm_id in self.pending else []
        step, subject = self.rng.choice(steps)
        step(subject)

    def _call_during(self, call: Call) -> bool:
        ended = self._perform(call, None)
        self.paused_end = self.paused_end or ended.other
        self.branches = orders.go_on(self.branches, call, ended)
        assert self.branches, f"{call} is {ended.result} ({ended.said}), which no order explains"
        self.state = self.branches[0].state
        return ended.is_good
