"""The flows of localdisk; each has its preparation, and what must be true after it.

All flows are about one disk of one VM, in the volume group of the bed.  The preparation makes the disk with
LVM's own commands and the tags of `volumes/local_disk.py`, so that localdisk itself first runs in the
flow.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bed import host, libvirt, vdsm
from tests.bed.player import Call, Result, start_point, start_program
from tests.bed.shell import run
from tests.bed.storage import FileStorage, Image, Volume, digest, fill, guest_bytes, link, new_id
from tests.bed.vm import Disk, Vm, boot_sector, disk_json, domain_xml
from tests.kernel.steps import LOCKS, MIB, THICK, THIN, configure, copied, device, starting, tags, wait_for

SIZE = 24 * MIB
LONG_AGO = 5  # seconds since the epoch
KEEP = "retention: {on_stop: keep}\n"
RECOPY = "retention: {on_stop: keep, on_source_change: recopy}\n"
CACHE = "cache: {templates: on}\n"
ERASE = "retention: {erase: zero}\n"
DUE = "retention: {grace: 0s, keep_for: 0s}\n"
DUE_AND_ERASE = "retention: {grace: 0s, keep_for: 0s, erase: zero}\n"
BACKUP = "backup"  # an administrator's snapshot
SLOW = "copy: {bandwidth: 4MiB}\n"  # of one copy: 2 MiB/s, 6 s


@dataclass(frozen=True)
class Scene:
    """The VM and its disk.  It outlives the guest's kernel: everything of it is on the shared disk."""

    vm_id: str
    image: Image
    fingerprint: str  # of the source, as the disk's tags say
    source: str  # digest of what the guest sees of the source
    kept: str  # digest of KEPT, the source with what the guest has written since
    base: str  # digest of what the guest would see of the template
    cached: dict[str, list[str]]  # the tags of the template LV, by "thick" and "thin"; the name is the first

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), default=str))

    @classmethod
    def load(cls, path: Path) -> Scene:
        data = json.loads(path.read_text())
        volumes = tuple(
            Volume(**{**v, "path": Path(v["path"]), "lease_path": Path(v["lease_path"])})
            for v in data["image"]["volumes"]
        )
        image = Image(**{**data["image"], "volumes": volumes})
        folder = host.RUN_STORAGE / image.domain_id / image.id
        if not folder.is_symlink():  # /run is empty after a boot
            link(folder, host.STORAGE / image.domain_id / "images" / image.id)
        return cls(**{**data, "image": image})


KEPT = host.SCRATCH / "kept.raw"


def new_scene() -> Scene:
    storage = FileStorage()
    template = storage.template(SIZE, seed=1, boot=boot_sector("crash"))
    fill(template.leaf, SIZE // 2)
    image = storage.clone(template, seed=2)
    vm_id = starting(new_id())
    call = start_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), THICK)
    result = call.wait()
    assert result.rc == 0, result
    (fingerprint,) = (tag for tag in tags(image) if tag.startswith("SOURCE_"))
    run("qemu-io", "-f", "raw", "-c", f"write -P 7 {MIB} {2 * MIB}", str(device(image)))
    run("dd", f"if={device(image)}", f"of={KEPT}", "bs=1M", "conv=fsync")
    host.remove(image.leaf.id)
    cached = {
        name: make_template(vm_id, image, custom) for name, custom in (("thick", THICK), ("thin", THIN))
    }
    libvirt.undefine(vm_id)
    source, base = guest_bytes(image.leaf), guest_bytes(template.leaf)
    return Scene(vm_id, image, fingerprint, source, digest(KEPT, SIZE), base, cached)


def make_template(vm_id: str, image: Image, custom: Mapping[str, str]) -> list[str]:
    """The name of the template LV that a start makes, and its tags, as of an hour ago; it is removed."""
    configure(CACHE)
    result = start_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), custom).wait()
    assert result.rc == 0, result
    host.remove(image.leaf.id)
    ((name, its_tags),) = templates().items()
    host.remove(name)
    configure()
    used = int(time.time()) - 3600  # within a minute, a start would write down nothing
    return [name, f"USED_{used}", *sorted(tag for tag in its_tags if not tag.startswith("USED_"))]


def templates() -> dict[str, frozenset[str]]:
    """The tags of the template LVs, by their names."""
    volumes = host.logical_volumes().items()
    return {name: its for name, its in volumes if any(tag.startswith("TEMPLATE_") for tag in its)}


# -- what is there before


def nothing(scene: Scene) -> None:
    del scene


def make(scene: Scene, *more: str, active: bool = True, name: str = "", size: int = SIZE) -> None:
    """A complete local disk of the scene's, with what its guest has written; `name`: a smaller, other one."""
    words = ("localdisk", f"VM_{scene.vm_id}", f"IU_{scene.image.id}", scene.fingerprint, *more)
    if name:
        words = ("localdisk", f"VM_{new_id()}", f"IU_{new_id()}", *more)
    options = [word for tag in words for word in ("--addtag", tag)]
    lv = name or scene.image.leaf.id
    run("lvcreate", "-y", "-Wn", "-ky", "-K", "-n", lv, "-L", f"{size}b", *options, host.VOLUME_GROUP)
    if not name:
        run("dd", f"if={KEPT}", f"of={device(scene.image)}", "bs=1M", "oflag=direct")
    if not active:
        run("lvchange", "-an", f"{host.VOLUME_GROUP}/{lv}")


def ready(scene: Scene) -> None:
    make(scene)


def kept(scene: Scene) -> None:
    make(scene, active=False)  # and marked later, or the mark would be in doubt
    lv = f"{host.VOLUME_GROUP}/{scene.image.leaf.id}"
    run("lvchange", "--addtag", f"STOPPED_{int(time.time())}", lv)


def kept_under_another_name(scene: Scene) -> None:
    """A kept disk of what was the leaf before an empty layer came upon it."""
    kept(scene)
    run("lvrename", host.VOLUME_GROUP, scene.image.leaf.id, new_id())


def kept_and_another(scene: Scene) -> None:
    kept(scene)
    kept_of_another_leaf(scene)


def kept_and_noted(scene: Scene) -> None:
    """A kept disk, and the record of its VM that the stop has made (`kept.py`)."""
    kept(scene)
    noted(scene).parent.mkdir(parents=True, exist_ok=True)
    noted(scene).touch()


def noted(scene: Scene) -> Path:
    return LOCKS / "kept" / scene.vm_id


def kept_of_another_leaf(scene: Scene) -> None:
    """A kept disk of this VM and image, of what was its leaf before, and of other bytes."""
    stopped = f"STOPPED_{int(time.time()) - 60}"
    words = ("localdisk", f"VM_{scene.vm_id}", f"IU_{scene.image.id}", f"SOURCE_{'0' * 32}", stopped)
    options = [word for tag in words for word in ("--addtag", tag)]
    run("lvcreate", "-an", "-Wn", "-Zn", "-ky", "-n", new_id(), "-L", "4m", *options, host.VOLUME_GROUP)


def kept_and_changed(scene: Scene) -> None:
    """A kept disk of the leaf, and the leaf has changed since."""
    kept(scene)
    other = f"SOURCE_{'0' * 32}"
    lv = f"{host.VOLUME_GROUP}/{scene.image.leaf.id}"
    run("lvchange", "--deltag", scene.fingerprint, "--addtag", other, lv)


def garbage(scene: Scene) -> None:
    """One of each kind, of other VMs."""
    for tag in ("UPDATING", "DELETING", "STOPPED", "UNNEEDED"):
        name = new_id()
        make(scene, *(() if tag.endswith("ED") else (tag,)), name=name, size=4 * MIB)
        if tag.endswith("ED"):  # by now: after it was made
            run("lvchange", "--addtag", f"{tag}_{int(time.time())}", f"{host.VOLUME_GROUP}/{name}")


def older(scene: Scene) -> None:
    """A disk of vdsm's older hook, in which a guest has lived."""
    make(scene, "PU_00000000-0000-0000-0000-000000000000")
    lv = f"{host.VOLUME_GROUP}/{scene.image.leaf.id}"
    run("lvchange", "--deltag", "localdisk", "--deltag", scene.fingerprint, lv)


def backed_up(scene: Scene) -> None:
    """The administrator has made a snapshot of it."""
    make(scene)
    run("lvcreate", "-s", "-L", "4m", "-n", BACKUP, f"{host.VOLUME_GROUP}/{scene.image.leaf.id}")


def to_erase(scene: Scene) -> None:
    make(scene, "DELETING")


def cached_thick(scene: Scene) -> None:
    cache(scene, "thick", "-Wn", "-L", f"{SIZE}b", host.VOLUME_GROUP)


def cached_thin(scene: Scene) -> None:
    cache(scene, "thin", "-V", f"{SIZE}b", "--thinpool", f"{host.VOLUME_GROUP}/{host.THIN_POOL}")


def cache(scene: Scene, how: str, *place: str) -> None:
    """The template LV of the scene's template, as localdisk makes it."""
    name, *words = scene.cached[how]
    options = [word for tag in words for word in ("--addtag", tag)]
    run("lvcreate", "-y", "-ky", "-K", "-n", name, *options, *place)
    base, lv = scene.image.volumes[0].path, f"{host.VOLUME_GROUP}/{name}"
    run("dd", f"if={base}", f"of=/dev/{lv}", "bs=1M", "oflag=direct")
    run("lvchange", "-an", lv)
    run("lvchange", "-pr", lv)


def old_templates(scene: Scene) -> None:
    """Three template LVs: one unfinished, one past its time, one that was left active."""
    for more in (("UPDATING",), (f"USED_{LONG_AGO}",)):
        words = ("localdisk", f"TEMPLATE_{new_id()}", f"SOURCE_{'0' * 32}", *more)
        options = [word for tag in words for word in ("--addtag", tag)]
        run("lvcreate", "-y", "-Wn", "-n", new_id(), "-L", "4m", *options, host.VOLUME_GROUP)
    cached_thick(scene)
    run("lvchange", "-ay", "-K", f"{host.VOLUME_GROUP}/{scene.cached['thick'][0]}")


def running(scene: Scene) -> None:
    """The VM runs from its local disk."""
    if scene.vm_id in libvirt.active():
        return
    make(scene)
    libvirt.create(ran(scene))


def closed(scene: Scene) -> None:
    """The VM has run from its local disk; the host was booted since."""
    make(scene, active=False)


def ran(scene: Scene, path: str = "") -> str:
    """The domain XML of the VM with its disk at this path, by default the local disk."""
    return domain_xml(
        Vm(scene.vm_id, (vdsm.local(Disk("vda", scene.image), path or str(device(scene.image))),))
    )


def ran_elsewhere(scene: Scene) -> str:
    """The same after a live snapshot that went past us: it ran from another volume in the end."""
    layer = f'dev="/dev/{scene.image.domain_id}/{new_id()}" index="1"'
    return ran(scene).replace(f'dev="{device(scene.image)}"', layer)


def copying(scene: Scene) -> None:
    """A start copies; `power_off` finds it by its VM."""
    starts[scene.vm_id] = start_thick(scene)
    wait_for(lambda: copied(scene.image), "the copy")


starts: dict[str, Call] = {}  # by VM


# -- what is done


def start_thick(scene: Scene) -> Call:
    return start_point("after_disk_prepare", scene.vm_id, disk_json(Disk("vda", scene.image)), THICK)


def start_thin(scene: Scene) -> Call:
    return start_point("after_disk_prepare", scene.vm_id, disk_json(Disk("vda", scene.image)), THIN)


def start_with_older_vdsm(scene: Scene) -> Call:
    """vdsm has no hook point after_disk_prepare."""
    return start_point(
        "before_vm_start", scene.vm_id, domain_xml(Vm(scene.vm_id, (Disk("vda", scene.image),))), THICK
    )


def start_without(scene: Scene) -> Call:
    """The VM is started from shared storage, without the property."""
    return start_point(
        "before_vm_start", scene.vm_id, domain_xml(Vm(scene.vm_id, (Disk("vda", scene.image),))), {}
    )


def start_without_after_boot(scene: Scene) -> Call:
    """The same; vdsm has started before, if there was a boot."""
    if not noted(scene).exists():
        result = collect_before_vdsm(scene).wait()
        assert result.rc == 0, result
    return start_without(scene)


def recover(scene: Scene) -> Call:
    data = disk_json(Disk("vda", scene.image), format="raw", diskType="block")
    return start_point("after_disk_prepare", scene.vm_id, data, THICK)


def stop(scene: Scene) -> Call:
    xml = domain_xml(Vm(scene.vm_id, (Disk("vda", scene.image),)))
    return start_point("after_vm_destroy", scene.vm_id, xml, THICK)


def stop_elsewhere(scene: Scene) -> Call:
    return start_point("after_vm_destroy", scene.vm_id, ran_elsewhere(scene), THICK)


@dataclass
class PowerOff(Call):
    """before_vm_destroy of a VM that starts; it is over when the start is, too."""

    start: Call | None = None

    def wait(self, timeout: float = 900) -> Result:
        result = super().wait(timeout)
        if self.start:
            self.start.wait(timeout)
        return result


def power_off(scene: Scene) -> PowerOff:
    call = start_point("before_vm_destroy", scene.vm_id, "", THICK)
    return PowerOff(**vars(call), start=starts.pop(scene.vm_id))


def start_after_power_off(scene: Scene) -> Call:
    """What vdsm calls when it has powered off the VM, then a start."""
    result = stop(scene).wait()
    assert result.rc == 0, result
    return start_thick(scene)


def collect(scene: Scene) -> Call:
    """gc, as cron runs it."""
    del scene
    return start_program("gc")


def collect_before_vdsm(scene: Scene) -> Call:
    """gc, as vdsm calls it when it starts."""
    del scene
    return start_point("before_vdsm_start")


def give_up_all(scene: Scene) -> Call:
    """The operator gives up all disks of the VM."""
    return start_program("remove", scene.vm_id)


def give_up(scene: Scene) -> Call:
    """The operator gives up the kept disk."""
    return start_program("remove", f"{host.VOLUME_GROUP}/{scene.image.leaf.id}")


def prefetch(scene: Scene) -> Call:
    return start_program("prefetch", str(scene.image.volumes[0].path))


@dataclass(frozen=True)
class Flow:
    """`config` holds while it runs and after; `content` is what the disk has after the next start."""

    name: str
    before: Callable[[Scene], None]
    do: Callable[[Scene], Call]
    config: str = ""
    content: str = "source"  # or kept, or either
    start_again: Callable[[Scene], Call] = start_thick
    tag: str = ""  # what a tag of the disk must begin with in the end
    domain: Callable[[Scene], str] | None = None  # as libvirt has the VM, which has run and does not run

    @property
    def has_hook(self) -> bool:
        """gc and remove are one process; a hook, and prefetch, have a helper."""
        return self.do not in (collect, collect_before_vdsm, give_up, give_up_all)

    @property
    def vm_runs(self) -> bool:
        return self.before is running

    @property
    def vm_starts(self) -> bool:
        """vdsm has defined the VM by then; where its disk is to be erased by gc, it has not."""
        return self.do in (*STARTS, power_off)

    @property
    def is_slow(self) -> bool:
        """It needs a copy that takes its time."""
        return self.before is copying

    @property
    def has_backup(self) -> bool:
        return self.before is backed_up


STARTS = (start_thick, start_thin, start_with_older_vdsm, start_without)
FLOWS = (
    Flow("first start thick", nothing, start_thick),
    Flow("first start thin", nothing, start_thin, start_again=start_thin),
    Flow("start of a kept disk", kept, start_thick, KEEP, "kept"),
    Flow("start of a kept disk of another name", kept_under_another_name, start_thick, KEEP, "kept"),
    Flow("start with older vdsm", nothing, start_with_older_vdsm, start_again=start_with_older_vdsm),
    Flow("start of an older hook's disk", older, start_thick, "", "kept"),
    Flow(
        "start without the property",
        kept_and_noted,
        start_without,
        KEEP,
        "kept",
        start_without_after_boot,
        "STALE",
    ),
    Flow("kept disk of another leaf is replaced", kept_of_another_leaf, start_thick, RECOPY),
    Flow("kept disk that has changed is replaced", kept_and_changed, start_thick, RECOPY),
    Flow("stop, delete", ready, stop),
    Flow("stop, keep", ready, stop, KEEP, "kept"),
    Flow("stop, older hook's disk", older, stop, "", "kept"),
    Flow("stop, with a backup", backed_up, stop),
    Flow("gc", garbage, collect, DUE),
    Flow("gc, erases", garbage, collect, DUE_AND_ERASE),
    Flow("gc before vdsm starts", garbage, collect_before_vdsm, DUE_AND_ERASE),
    Flow("gc of a VM that ran elsewhere", closed, collect, "", "kept", collect, "DRIFTED_", ran_elsewhere),
    Flow("erase", to_erase, collect, ERASE),
    Flow("remove", kept, give_up, KEEP, "either"),
    Flow("remove and erase", kept, give_up, "retention: {on_stop: keep, erase: zero}\n", "either"),
    Flow("remove all", kept_and_another, give_up_all, RECOPY, "either"),
    Flow("recovery", running, recover, "", "kept", recover),
    Flow("recovery of a VM that is shut off", closed, recover, "", "kept", recover, domain=ran),
    Flow("power-off while it copies", copying, power_off, start_again=start_after_power_off),
    Flow("stop on another volume", ready, stop_elsewhere, "", "kept", stop_elsewhere, "DRIFTED_"),
    Flow("first of a template thick", nothing, start_thick, CACHE),
    Flow("first of a template thin", nothing, start_thin, CACHE, start_again=start_thin),
    Flow("second of a template thick", cached_thick, start_thick, CACHE),
    Flow("second of a template thin", cached_thin, start_thin, CACHE, start_again=start_thin),
    Flow("gc of templates", old_templates, collect, CACHE),
    Flow("prefetch", nothing, prefetch, CACHE),
)
