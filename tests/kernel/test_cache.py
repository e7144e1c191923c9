"""The template cache on real LVM: the base is read once, and what VMs get is right to the byte."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import string
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.bed import host
from tests.bed import libvirt as libvirt_daemon
from tests.bed.player import Call, run_point, start_point
from tests.bed.shell import attempt, run
from tests.bed.storage import (
    COW,
    RAW,
    BlockStorage,
    FileStorage,
    Image,
    Storage,
    digest,
    guest_bytes,
    meta_of,
    new_id,
    qemu_io,
)
from tests.bed.vm import Disk, Vm, disk_json, domain_xml
from tests.kernel.steps import (
    LOCKS,
    MIB,
    THICK,
    THIN,
    configure,
    copiers,
    device,
    equals_source,
    localdisk,
    seqno,
    start,
    starting,
    stop,
    syslog,
    wait_for,
)

LVM_LOCAL = Path("/etc/lvm/lvmlocal.conf")
ON = "cache: {templates: on}\n"
SIZE = 12 * MIB
CHAINS = int(os.environ.get("LOCALDISK_CHAINS", "12"))  # random ones, half of them in each backend
AT_ONCE = 12  # disks of one VM
BACKENDS = pytest.mark.parametrize("custom", [THICK, THIN], ids=["thick", "thin"])
KINDS = ("write -P 1", "write -P 2", "write -P 0", "write -z", "write -z -u", "discard")


@pytest.fixture(autouse=True)
def _cached(thin_pool: str, libvirt: None) -> Iterator[None]:
    """The cache is on, and empty; what tests leave in it is removed."""
    configure(ON)
    yield
    configure()
    host.remove(*templates())


def templates() -> dict[str, frozenset[str]]:
    """The tags of the template LVs, by their names."""
    volumes = host.logical_volumes().items()
    return {name: tags for name, tags in volumes if any(tag.startswith("TEMPLATE_") for tag in tags)}


def of(template: Image) -> str:
    """The name of the one template LV of a template."""
    (name,) = [name for name, tags in templates().items() if f"TEMPLATE_{template.leaf.id}" in tags]
    return name


def column(name: str, what: str) -> str:
    return run("lvs", "--noheadings", "-o", what, f"{host.VOLUME_GROUP}/{name}").strip()


def counted() -> tuple[int, int]:
    """Disks that found their template LV, and template LVs that were made, since boot."""
    try:
        counters = json.loads((LOCKS / "counters").read_text())
    except FileNotFoundError:
        return 0, 0
    return counters["template_hits"], counters["template_misses"]


def since(before: tuple[int, int]) -> tuple[int, int]:
    now = counted()
    return now[0] - before[0], now[1] - before[1]


def start_and_stop(image: Image, custom: Mapping[str, str] = THIN) -> None:
    """A VM gets what its guest would see."""
    vm_id = start(image, custom)
    assert equals_source(image), [str(volume.path) for volume in image.volumes]
    stop(vm_id, image, custom=custom)


# -- what VMs get


@pytest.mark.parametrize(("custom", "base_format"), [(THICK, COW), (THIN, RAW)], ids=["thick", "thin"])
def test_two_vms_of_one_template(
    file_storage: FileStorage, custom: Mapping[str, str], base_format: str
) -> None:
    """The second is larger and has one layer more; the template LV is read-only and at rest."""
    template = file_storage.template(SIZE, base_format, seed=1)
    images = [file_storage.clone(template, n + 1, seed=n + 2, size=SIZE + n * 5 * MIB) for n in range(2)]
    before = counted()
    vms = [start(image, custom) for image in images]
    for image in images:
        assert equals_source(image)
    assert since(before) == (2, 1)
    name = of(template)
    assert (column(name, "lv_permissions"), column(name, "lv_active")) == ("read-only", "")
    for vm_id, image in zip(vms, images):
        stop(vm_id, image, custom=custom)
    assert list(templates()) == [name]
    assert not list(LOCKS.glob("*.*"))


@BACKENDS
def test_random_chains(file_storage: FileStorage, custom: Mapping[str, str]) -> None:
    """Disks of one VM, on several templates, are what its guest sees.  LOCALDISK_CHAINS says how many."""
    for seed in range(CHAINS // 2 // AT_ONCE):
        rng = random.Random(seed)
        bases = [
            file_storage.template(rng.randrange(4, 20) * 512 * 1024 + 512, rng.choice((RAW, COW)), seed=seed)
            for _ in range(3)
        ]
        images = [random_chain(file_storage, rng.choice(bases), rng) for _ in range(AT_ONCE)]
        names = [f"vd{letter}" for letter in string.ascii_lowercase]
        vm = Vm(starting(new_id()), tuple(map(Disk, names, images)))
        result = run_point("before_vm_start", vm.id, domain_xml(vm), custom)
        assert result.rc == 0, result.stderr
        for image in images:
            assert equals_source(image), (seed, [str(volume.path) for volume in image.volumes])
        libvirt_daemon.undefine(vm.id)
        stop(vm.id, *images, custom=custom)
        host.remove(*templates())


def random_chain(storage: Storage, template: Image, rng: random.Random) -> Image:
    """Up to three layers on a template: data, zeros, discards; some are larger than what is below."""
    image_id, size = new_id(), template.leaf.size
    volumes = [storage.share(template.leaf, image_id)]
    for _ in range(rng.randrange(1, 4)):
        size += rng.choice((0, 0, 64 << 10, 3 * MIB + 512))
        volumes.append(storage.new_volume(image_id, COW, size, volumes[-1]))
        qemu_io(volumes[-1], [a_change(size, rng) for _ in range(rng.randrange(8))])
    return storage.image(image_id, *volumes)


def a_change(size: int, rng: random.Random) -> str:
    start_at = rng.randrange(size // 512)
    count = rng.randrange(1, min(4000, size // 512 - start_at) + 1)
    return f"{rng.choice(KINDS)} {start_at * 512} {count * 512}"


@pytest.mark.parametrize(
    ("custom", "options"),
    [
        (THICK, "compression_type=zstd"),
        (THIN, "compression_type=zstd"),
        (THIN, "extended_l2=on"),
        (THIN, "compat=0.10"),
    ],
)
def test_layers_of_every_kind(file_storage: FileStorage, custom: Mapping[str, str], options: str) -> None:
    """A compressed layer of that kind between the template and the leaf."""
    template = file_storage.template(SIZE, COW, seed=1)
    image = file_storage.clone(template, layers=2, seed=2)
    base, middle, _ = image.volumes
    flat = f"{middle.path}.flat"
    run(
        "qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(middle.path), flat, cwd=str(middle.path.parent)
    )
    words = ["-o", options] if options else []
    on = ["-B", base.id, "-F", "qcow2"]
    run(
        "qemu-img",
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        *words,
        *on,
        flat,
        str(middle.path),
        cwd=str(middle.path.parent),
    )
    Path(flat).unlink()
    for _ in range(2):
        start_and_stop(image, custom)


@BACKENDS
def test_a_disk_that_is_the_template(file_storage: FileStorage, custom: Mapping[str, str]) -> None:
    """Without any layer of the VM's own."""
    template = file_storage.template(SIZE, seed=1)
    before = counted()
    start_and_stop(template, custom)
    assert since(before) == (1, 1)


@BACKENDS
def test_block_storage(block_storage: BlockStorage, custom: Mapping[str, str]) -> None:
    """The template's volume has the tag of another image; a base of the image's own is not cached."""
    template = block_storage.template(SIZE, COW, seed=1)
    own = new_id()
    base = block_storage.new_volume(own, COW, SIZE)
    leaf = block_storage.new_volume(own, COW, SIZE, base)
    before = counted()
    start_and_stop(block_storage.clone(template, seed=2), custom)
    start_and_stop(block_storage.clone(template, seed=3), custom)
    assert since(before) == (2, 1)
    start_and_stop(block_storage.image(own, base, leaf), custom)
    assert since(before) == (2, 1)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("=SHARED", "=INTERNAL", "no_template"),
        ("EOF", "", "metadata_unclear"),
        ("IMAGE=", "IMAGE=x", "not_in_template"),
        ("LEGALITY=LEGAL", "LEGALITY=FAKE", "not_legal"),
    ],
)
def test_what_is_no_template(file_storage: FileStorage, old: str, new: str, reason: str) -> None:
    """What the storage does not surely say to be a template is copied in full; log and status say why."""
    template = file_storage.template(SIZE, seed=1)
    meta = meta_of(template.leaf)
    assert old in meta.read_text()
    meta.write_text(meta.read_text().replace(old, new))
    image, before = file_storage.clone(template, seed=2), uncached(reason)
    with syslog(" localdisk[") as lines:  # sudo logs, too
        start_and_stop(image)
    assert not templates()
    (line,) = (line for line in lines if "template not cached" in line)
    assert f"{image.leaf.id} reason={reason} " in line
    assert uncached(reason) == before + 1
    assert reason in localdisk("status")


def uncached(reason: str) -> int:
    """Disks that were copied without a template LV for that reason, as the metrics count them."""
    name = f'localdisk_uncached_disks_total{{reason="{reason}"}}'
    values = dict(line.rsplit(" ", 1) for line in localdisk("status", "--prometheus").splitlines())
    return int(values[name])


# -- a template LV that may not be used


@BACKENDS
def test_a_template_that_has_changed(file_storage: FileStorage, custom: Mapping[str, str]) -> None:
    """It is another one; the old copy is gc's."""
    template = file_storage.template(SIZE, seed=1)
    start_and_stop(file_storage.clone(template, seed=2), custom)
    qemu_io(template.leaf, [f"write -P 9 {MIB} {MIB}"])
    start_and_stop(file_storage.clone(template, seed=3), custom)
    assert len(templates()) == 2


@pytest.mark.parametrize(
    ("custom", "how"),
    [(THICK, "written to"), (THIN, "written to"), (THIN, "unfinished"), (THICK, "small"), (THIN, "writable")],
)
def test_a_spoiled_template_lv(file_storage: FileStorage, custom: Mapping[str, str], how: str) -> None:
    """It is made again."""
    template = file_storage.template(SIZE, seed=1)
    start_and_stop(file_storage.clone(template, seed=2), custom)
    name, before = of(template), counted()
    uuid = column(name, "lv_uuid")
    spoil(name, how)
    start_and_stop(file_storage.clone(template, seed=3), custom)
    assert since(before) == (1, 1)
    assert of(template) == name
    assert column(name, "lv_uuid") != uuid


def spoil(name: str, how: str) -> None:
    lv = f"{host.VOLUME_GROUP}/{name}"
    if how == "unfinished":
        run("lvchange", "--addtag", "UPDATING", lv)
    else:
        run("lvchange", "-prw", lv)
        run("lvchange", "-ay", "-K", lv)
        if how == "written to":
            run("dd", "if=/dev/urandom", f"of=/dev/{lv}", "bs=1M", "count=8", "oflag=direct")
        if how == "small":
            run("lvreduce", "-y", "-L", "4m", lv)
        run("lvchange", "-an", lv)
        if how != "writable":
            run("lvchange", "-pr", lv)


# -- at once, and killed


@BACKENDS
def test_at_once(file_storage: FileStorage, custom: Mapping[str, str]) -> None:
    """Four VMs of one template: one copies the base, the others wait."""
    configure(f"{ON}copy: {{parallel: 1}}\n")
    template = file_storage.template(SIZE, seed=1)
    images = [file_storage.clone(template, seed=n + 2) for n in range(4)]
    before = counted()
    calls = [begin(image, custom) for image in images]
    for (vm_id, call), image in zip(calls, images):
        result = call.wait()
        assert result.rc == 0, result.stderr
        assert equals_source(image)
        libvirt_daemon.undefine(vm_id)
        stop(vm_id, image, custom=custom)
    assert since(before) == (4, 1)


def begin(image: Image, custom: Mapping[str, str]) -> tuple[str, Call]:
    vm_id = starting(new_id())
    return vm_id, start_point("after_disk_prepare", vm_id, disk_json(Disk("vda", image)), custom)


@BACKENDS
def test_the_next_goes_on(file_storage: FileStorage, custom: Mapping[str, str]) -> None:
    """The process that copies the base is killed; the process that waits for it copies the base."""
    configure(f"{ON}copy: {{bandwidth: 8MiB}}\n")  # of which each of two gets its half
    template = file_storage.template(SIZE, seed=1)
    run("qemu-io", "-f", "raw", "-c", f"write -P 5 0 {SIZE}", str(template.leaf.path))
    images = [file_storage.clone(template, seed=n) for n in (2, 3)]
    first, call = begin(images[0], custom)
    wait_for(copiers, "the copy")
    second, waiting = begin(images[1], custom)
    call.kill(signal.SIGKILL)
    call.wait()
    result = waiting.wait()
    assert result.rc == 0, result.stderr
    assert equals_source(images[1])
    for vm_id in (first, second):
        libvirt_daemon.undefine(vm_id)
    stop(second, images[1], custom=custom)
    assert len(templates()) == 1


# -- how much of it there is


def test_least_recently_used_first(file_storage: FileStorage) -> None:
    """gc removes what max_size has no room for, what is past keep_for, and all when the cache is off."""
    three = [file_storage.template(SIZE, seed=seed) for seed in (1, 2, 3)]
    for number, template in enumerate(three):
        start_and_stop(file_storage.clone(template, seed=9), THICK)
        use(template, f"USED_{1700000000 + number}")
    configure(f"{ON}  # two fit\n".replace("on}", f"on, max_size: {2 * SIZE}, keep_for: 36500d}}"))
    before, printed = seqno(), localdisk("gc", "--dry-run")
    assert seqno() == before
    assert f"{of(three[0])}  template {three[0].leaf.id}  12 MiB  would be removed: the cache" in printed
    localdisk("gc")
    assert set(templates()) == {of(three[1]), of(three[2])}
    use(three[1], "USED_5")
    configure(f"{ON}".replace("on}", "on, keep_for: 1h}"))
    use(three[2], f"USED_{int(run('date', '+%s'))}")
    localdisk("gc")
    assert list(templates()) == [of(three[2])]
    configure()
    localdisk("gc")
    assert not templates()


def use(template: Image, tag: str) -> None:
    name = of(template)
    old = [word for each in templates()[name] if each.startswith("USED_") for word in ("--deltag", each)]
    run("lvchange", *old, "--addtag", tag, f"{host.VOLUME_GROUP}/{name}")


def test_a_start_that_needs_room(file_storage: FileStorage) -> None:
    """It evicts the least recently used template LV; a template LV in use is kept, and so are the others."""
    two = [file_storage.template(SIZE, seed=seed) for seed in (1, 2)]
    for number, template in enumerate(two):
        start_and_stop(file_storage.clone(template, seed=9), THICK)
        use(template, f"USED_{1700000000 + number}")
    kept = of(two[1])
    free = int(run("vgs", "--noheadings", "--units", "b", "--nosuffix", "-o", "vg_free", host.VOLUME_GROUP))
    configure(f"{ON}margins: {{reserve: {free}}}\n")  # nothing is free but what templates have
    own = file_storage.new_volume(image_id := new_id(), RAW, SIZE)
    image = file_storage.image(image_id, own)
    vm_id = start(image, THICK)
    assert list(templates()) == [kept]
    stop(vm_id, image)


@pytest.mark.usefixtures("throwaway")
def test_a_pool_that_is_too_full_for_lvm(file_storage: FileStorage) -> None:
    """LVM's own threshold is lower than our margin: idle template LVs are evicted, and the VM starts."""
    before = LVM_LOCAL.read_text() if LVM_LOCAL.exists() else ""
    LVM_LOCAL.write_text("activation { monitoring=0 }\n")  # dmeventd would extend the pool within 10 s
    run("lvcreate", "-y", "--type", "thin-pool", "-L", "64m", "-n", "small", host.VOLUME_GROUP)
    configure(f"{ON}thin_pool: small\n".replace("on}", "on, max_size: 80%}"))
    template, other = file_storage.template(SIZE * 3, seed=1), file_storage.template(SIZE, seed=2)
    run("qemu-io", "-f", "raw", "-c", f"write -P 5 0 {SIZE * 3}", str(template.leaf.path))
    try:
        start_and_stop(file_storage.clone(template, seed=1))
        LVM_LOCAL.write_text("activation { monitoring=0 thin_pool_autoextend_threshold=50 }\n")
        refused = attempt(
            "lvcreate", "-y", "-V", "4m", "--thinpool", f"{host.VOLUME_GROUP}/small", "-n", "refused"
        )
        assert "reached threshold" in refused.stderr
        vm_id = start(image := file_storage.clone(other, seed=1), THIN)
        assert equals_source(image)
        assert list(templates()) == [of(other)]
        stop(vm_id, image, custom=THIN)
    finally:
        LVM_LOCAL.write_text(before)
        host.remove("small")


@BACKENDS
def test_without_room_for_the_template(file_storage: FileStorage, custom: Mapping[str, str]) -> None:
    """The disk is copied in full."""
    configure(ON.replace("on}", "on, max_size: 4MiB}"))
    template = file_storage.template(SIZE, seed=1)
    run("qemu-io", "-f", "raw", "-c", f"write -P 5 0 {SIZE}", str(template.leaf.path))
    start_and_stop(file_storage.clone(template, seed=2), custom)
    assert not templates()


@pytest.mark.parametrize("erase", ["zero", "discard"])
def test_erase_of_a_disk_leaves_its_template(file_storage: FileStorage, erase: str) -> None:
    """Zeros over what a thin disk shares with its template neither fill the pool nor reach the template."""
    configure(f"{ON}retention: {{erase: {erase}}}\n")
    template = file_storage.template(SIZE, seed=1)
    run("qemu-io", "-f", "raw", "-c", f"write -P 5 0 {SIZE}", str(template.leaf.path))
    start_and_stop(file_storage.clone(template, seed=2))
    with_disk = float(column(host.THIN_POOL, "data_percent"))
    if erase == "discard" and column(host.THIN_POOL, "kernel_discards") != "passdown":
        # User Mode Linux's disks take discards of 32 KiB at most, less than one block of the pool.
        refused = attempt(str(host.PROGRAM), "gc")
        assert refused.returncode == 1
        assert "passes no discards to its device" in refused.stdout
        configure(f"{ON}retention: {{erase: zero}}\n")
    localdisk("gc")
    assert float(column(host.THIN_POOL, "data_percent")) <= with_disk
    name = of(template)
    run("lvchange", "-ay", "-K", f"{host.VOLUME_GROUP}/{name}")
    assert digest(f"/dev/{host.VOLUME_GROUP}/{name}", SIZE) == guest_bytes(template.leaf)
    before = counted()
    start_and_stop(file_storage.clone(template, seed=3))
    assert since(before) == (1, 0)
    localdisk("gc")


@BACKENDS
def test_erase_of_a_template_lv(file_storage: FileStorage, custom: Mapping[str, str]) -> None:
    """When the cache is off by now: erased as a disk is, though it is read-only."""
    erase = "retention: {erase: zero}\n"
    configure(ON + erase)
    start_and_stop(file_storage.clone(file_storage.template(SIZE, seed=1), seed=2), custom)
    configure(erase)
    localdisk("gc")
    assert set(host.logical_volumes()) == {host.THIN_POOL}


# -- prefetch


@BACKENDS
def test_prefetch(file_storage: FileStorage, custom: Mapping[str, str]) -> None:
    """By path and by the volume's id; the second time there is nothing to do, and the first VM finds it.

    An administrator calls it in root's home, into which vdsm may not go.
    """
    template = file_storage.template(SIZE, COW, seed=1)
    words = ["prefetch", "--backend", custom["localdisk"]]
    path, before = template.leaf.path, counted()
    with tempfile.TemporaryDirectory() as home:  # of mode 0700
        done = attempt(str(host.PROGRAM), *words, str(path), cwd=home)
    assert (done.stdout, done.stderr) == (f"{path}: cached, 12 MiB\n", "")
    assert re.fullmatch(r"/rhev/.*: in the cache\n", localdisk(*words, template.leaf.id))
    start_and_stop(file_storage.clone(template, seed=2), custom)
    assert since(before) == (1, 1)


def test_what_is_not_fetched(file_storage: FileStorage, block_storage: BlockStorage) -> None:
    template = file_storage.template(SIZE, seed=1)
    own = file_storage.clone(template, seed=2)
    on_block = block_storage.template(SIZE, seed=1)
    for name, said in {
        str(own.leaf.path): "does not mark it as a template's",
        own.leaf.id: "does not mark it as a template's",
        new_id(): "no storage domain of files on this host has it",
        "nonsense": "neither a path nor the id of a volume",
        "/etc/shadow": "its name is no volume's id",
        f"/etc/{new_id()}": "no metadata of vdsm's",
        str(on_block.leaf.path): "the first VM caches it",
    }.items():
        done = attempt(str(host.PROGRAM), "prefetch", name)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
        assert said in done.stderr
        assert " : " in done.stderr
    configure()
    done = attempt(str(host.PROGRAM), "prefetch", str(template.leaf.path))
    assert "no template cache" in done.stderr
    assert not templates()


def test_device_of_a_cached_disk_is_vdsms(file_storage: FileStorage) -> None:
    """A clone belongs to vdsm, as every local disk does."""
    image = file_storage.clone(file_storage.template(SIZE, seed=1), seed=2)
    vm_id = start(image, THIN)
    assert device(image).owner() == "vdsm"
    stop(vm_id, image, custom=THIN)
