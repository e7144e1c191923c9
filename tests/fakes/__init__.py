"""A host at the door: a volume group and libvirt in memory, answering the argument lists that `run.run` gets.

The reports have the shape of those in `data/lvm/`, which come from the real LVM 2.03.16 (a test compares
them); messages and exit codes were read off the same.  An argument that lvm.py does not send is an error.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localdisk import clock, device_mapper, lock, run
from localdisk.clock import Moment
from localdisk.errors import CommandFailed, CommandTimeout, Error
from localdisk.helper import cache
from localdisk.volumes import gc, lvm, removal

if TYPE_CHECKING:
    import pytest

    from localdisk.helper.session import Session

REPORTS = Path(__file__).parents[1] / "data" / "lvm"
EXTENT = 4 << 20
REAL_RUN = run.run
REAL_OPEN, REAL_CLOSE = os.open, os.close
REAL_SAMPLE = cache._sample

VM = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"
OTHER_VM = "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb"
IMAGE = "cccccccc-1111-4ccc-8ccc-cccccccccccc"
OTHER_IMAGE = "cccccccc-2222-4ccc-8ccc-cccccccccccc"
VOLUME = "11111111-1111-4111-8111-111111111111"
OTHER_VOLUME = "22222222-2222-4222-8222-222222222222"
FINGERPRINT = "0123456789abcdef" * 2
OTHER_FINGERPRINT = "fedcba9876543210" * 2

TOOLS = ("lvm", "lvcreate", "lvextend", "lvchange", "lvremove", "lvrename", "lvs", "blkdiscard", "virsh")

# Exactly what lvm.VolumeGroup.read sends, before the name of the group.
FULLREPORT = (
    "lvm fullreport --reportformat json --units b --nosuffix"
    " --configreport vg -o vg_name,vg_uuid,vg_size,vg_free,vg_extent_size,vg_partial,vg_exported,"
    "vg_lock_type,vg_mda_size,vg_mda_free"
    " --configreport lv -o lv_name,lv_uuid,lv_size,lv_time,lv_tags,lv_device_open,lv_active,lv_permissions,"
    "lv_layout,lv_role,pool_lv,origin,data_percent,metadata_percent,kernel_discards"
    " --configreport seg -o lv_name,zero,chunk_size -S segtype=thin-pool"
    " --configreport pv -o pv_name,pv_free -S pv_allocatable=0"
    " --configreport pvseg -o pvseg_start -S pv_name=none"
)


def without_settings(argv: Sequence[str]) -> list[str]:
    """A command without the settings that each of LVM's must carry."""
    words = list(argv)
    if words[0].startswith(("lv", "vg", "pv")):
        assert words[2] == "--config", words
        more = (lvm.LOOKS_ONLY,) if words[1] == "fullreport" else ("", lvm.SEE_ALL)
        assert words[3] in [f"{lvm.SETTINGS} {each}".strip() for each in more], words
        del words[2:4]
    assert "--config" not in words
    return words


def report(name: str) -> str:
    """The captured output of `lvm fullreport` of that name."""
    return (REPORTS / f"{name}.json").read_text()


def tags(
    *more: str,
    ours: bool = True,
    vm: str = VM,
    image: str = IMAGE,
    fingerprint: str = FINGERPRINT,
) -> set[str]:
    """The tags of a local disk; `ours` False: as vdsm's older hook made them."""
    common = {f"VM_{vm}", f"IU_{image}"}
    own = {"localdisk", f"SOURCE_{fingerprint}"} if ours else {"PU_00000000-0000-0000-0000-000000000000"}
    return {*common, *own, *more}


def aside(erase: str, name: str) -> set[str]:
    """The tags of a disk that was set aside, to be erased so under that name."""
    return {"localdisk", "DELETING", f"ERASE_{erase}", f"ASIDE_{name}"}


class Killed(BaseException):
    """The process under test ends here."""


@dataclass
class Volume:
    """One logical volume, its fields in LVM's words."""

    lv_name: str
    lv_uuid: str
    lv_size: int
    lv_tags: set[str] = field(default_factory=set)
    lv_device_open: str = ""
    lv_active: str = "active"
    lv_permissions: str = "writeable"
    lv_layout: str = "linear"
    pool_lv: str = ""
    data_percent: str = ""
    metadata_percent: str = ""
    lv_time: str = "1750000000"
    lv_role: str = "public"
    origin: str = ""
    kernel_discards: str = ""

    @property
    def row(self) -> dict[str, str]:
        columns = {name: str(value) for name, value in vars(self).items()}
        is_open = self.lv_device_open if self.lv_active else "unknown"
        return {**columns, "lv_tags": ",".join(sorted(self.lv_tags)), "lv_device_open": is_open}


class Begun:
    """A tool that was started and answers later: as it was then."""

    def __init__(self, host: FakeHost, argv: Sequence[str]) -> None:
        self._failure: Error | None = None
        try:
            self._out = host.run(argv)
        except (CommandFailed, CommandTimeout) as error:
            self._failure = error

    def output(self, deadline: float = 0) -> str:
        if self._failure:
            raise self._failure
        return self._out


class Conversation:
    """A helper in this process, in the place of the one behind sudo."""

    stdin = stdout = stderr = None
    returncode = 0

    def __init__(self, host: FakeHost, session: Session) -> None:
        self.host = host
        self.session = session
        self.requests: list[dict[str, Any]] = []

    @property
    def verbs(self) -> list[str]:
        return [request["verb"] for request in self.requests]

    def ask(self, line: bytes) -> bytes:
        self.requests.append(json.loads(line))
        return json.dumps(self.host.serve(self.session, line)).encode()

    def wait(self) -> int:
        return self.returncode


class FakeHost:
    """One volume group, made from a captured report, and the VMs of libvirt.

    `commands` is every command in order; `before[tool]` is called with a command before it is carried out
    and may change the group or raise, as `fail` does.  `removed` is what was removed, `erased` the lv_uuids
    of what was erased.  A volume that this process opens is open until it closes it; what is in one is its
    `content`, by its lv_uuid: a snapshot has that of its origin, until a test spoils it.
    """

    def __init__(self, text: str | None = None) -> None:
        content = json.loads(text or report("pool-only"))["report"][0]
        (self.vg,) = content["vg"]
        self.unallocatable: list[dict[str, str]] = []  # rows of physical volumes that LVM may not use
        self.pools = {row["lv_name"]: row for row in content["seg"]}
        self.volumes: dict[str, Volume] = {}
        for row in content["lv"]:
            words = {word for word in row["lv_tags"].split(",") if word}
            values = {**row, "lv_size": int(row["lv_size"]), "lv_tags": words}
            self.volumes[row["lv_name"]] = Volume(**values)
        self.active: set[str] = set()
        self.defined: set[str] = set()  # not running; without disks, as vdsm's placeholder is
        self.shut_off: set[str] = set()  # not running; with disks
        self.names: dict[str, str] = {}  # of VMs; without one it is vm-XXXXXXXX
        self.xmls: dict[str, str] = {}  # of VMs that run
        self.libvirt_is_silent = False
        self.is_silent = False  # LVM prints no messages
        self.starting: list[str] = []  # VMs whose hooks ask something just now
        self.has_undefined = False  # vdsm, those VMs
        self.cannot_discard: set[str] = set()  # device paths
        self.commands: list[str] = []
        self._is_full = False  # the last command failed because of the metadata area
        self.before: dict[str, Callable[[list[str]], None]] = {}
        self.removed: list[Volume] = []
        self.erased: set[str] = set()
        self.erased_to: dict[str, int] = {}  # bytes, by UUID
        self.content: dict[str, str] = {}
        self.opened: dict[int, Volume] = {}  # by file descriptor
        self.domain_tags: dict[str, set[str]] = {}  # of volumes on block storage, by DOMAIN/VOLUME

    # -- for tests

    def install(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHost:
        """Stand in for the host: its tools, its device nodes, and /run/localdisk."""
        monkeypatch.setattr(run, "run", self.run)
        monkeypatch.setattr(run, "begin", lambda argv: Begun(self, argv))
        monkeypatch.setattr(lvm.VolumeGroup, "dm_uuid", lambda _vg, lv_name: self.dm_uuid(lv_name))
        monkeypatch.setattr(device_mapper, "uuid_at", self.uuid_at)
        monkeypatch.setattr(lock, "RUN", str(tmp_path / "run"))
        monkeypatch.setattr(lock, "POLL", 0)
        monkeypatch.setattr(removal, "PAUSE", 0)
        monkeypatch.setattr(gc, "GAP", 0.001)
        monkeypatch.setattr(os, "open", self._open)
        monkeypatch.setattr(os, "close", self._close)
        monkeypatch.setattr(cache, "_sample", self._sample)
        monkeypatch.setattr(device_mapper, "can_discard", lambda path: path not in self.cannot_discard)
        monkeypatch.setattr(clock, "now", lambda: Moment(time.time()))
        return self

    def add(
        self, lv_name: str = VOLUME, lv_tags: Iterable[str] = (), size: int = 64 << 20, **fields: str
    ) -> Volume:
        volume = Volume(lv_name, self._new_uuid(), size, set(lv_tags), **fields)
        self.volumes[lv_name] = volume
        self.content[volume.lv_uuid] = volume.lv_uuid
        return volume

    def spoil(self, lv_name: str) -> None:
        """Let something overwrite a volume."""
        self.content[self.volumes[lv_name].lv_uuid] = "spoiled"

    def serve(self, session: Session, line: bytes) -> dict[str, Any]:
        """The answer to a request, while vdsm has the VM defined whose disk was claimed."""
        with self.having_defined(session):
            return session.serve(line)

    @contextmanager
    def having_defined(self, session: Session) -> Iterator[None]:
        self.starting.append("" if self.has_undefined else session._starting)
        try:
            yield
        finally:
            self.starting.pop()

    def fail(self, tool: str, stderr: str, times: int = 1, when: str = "") -> None:
        """Make the next `times` calls of `tool` whose arguments hold `when` fail with that message."""
        left = [times]

        def refuse(argv: list[str]) -> None:
            if left[0] and when in " ".join(argv):
                left[0] -= 1
                self._is_full = "exceeds maximum metadata size" in stderr
                raise CommandFailed(tuple(argv), 5, stderr)

        self.before[tool] = refuse

    def before_command(self, number: int, act: Callable[[], None]) -> None:
        """Call `act` once, before the command of that number, the first from now on being 0."""
        due = len(self.commands) + number + 1

        def count(_argv: list[str]) -> None:
            if len(self.commands) == due:
                self.before.clear()
                act()

        self.before = dict.fromkeys(TOOLS, count)

    def kill_before(self, number: int) -> None:
        """Let the process die before the command of that number; what it does in dying has no effect."""

        def die(_argv: object = None) -> None:
            self.before = dict.fromkeys(TOOLS, die)
            raise Killed

        self.before_command(number, die)

    def bury(self) -> None:
        """The killed process has ended, and its open files are closed; others can run again."""
        self.before = {}
        for fd in tuple(self.opened):
            self._close(fd)

    def dm_uuid(self, lv_name: str) -> str:
        uuids: str = self.vg["vg_uuid"] + self.volumes[lv_name].lv_uuid
        return "LVM-" + uuids.replace("-", "")

    def uuid_at(self, path: str) -> str:
        name = os.path.basename(path)
        volume = self.volumes.get(name)
        if path != f"/dev/{self.vg['vg_name']}/{name}" or not (volume and volume.lv_active):
            raise FileNotFoundError(path)
        return self.dm_uuid(name)

    @property
    def lvm_commands(self) -> list[str]:
        return [command for command in self.commands if command.startswith("lv")]

    @property
    def tools(self) -> list[str]:
        """The commands in short: the tool and, of an LVM command, its first word."""
        return ["fullreport" if c.startswith(FULLREPORT) else c.split()[0] for c in self.commands]

    # -- the door

    def _open(self, path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        place = f"/dev/{self.vg['vg_name']}/"
        if not str(path).startswith(place):
            return REAL_OPEN(path, flags, mode, **more)
        volume = self.volumes.get(str(path)[len(place) :])
        if volume is None or not volume.lv_active:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        fd = REAL_OPEN(os.devnull, flags, mode)
        self.opened[fd], volume.lv_device_open = volume, "open"
        return fd

    def _close(self, fd: int) -> None:
        REAL_CLOSE(fd)
        volume = self.opened.pop(fd, None)
        if volume and volume not in self.opened.values():
            volume.lv_device_open = ""

    def _sample(self, path: str, size: int) -> str:
        os.close(os.open(path, os.O_RDONLY))
        return self.digest(os.path.basename(path), size)

    def digest(self, lv_name: str, size: int) -> str:
        """What a sample of a volume is."""
        content = self.content[self.volumes[lv_name].lv_uuid]
        return hashlib.sha256(f"{content} {size}".encode()).hexdigest()[:32]

    def run(self, argv: Sequence[str], **options: Any) -> str:
        words = list(argv)
        if words[0] == "qemu-img":  # it is here
            return REAL_RUN(words, **options)
        is_again = self._is_full and " ".join(words) == self.commands[-1]
        self._is_full = False
        if not is_again:  # without the settings, if the metadata area has no room for them
            words = without_settings(words)
        self.commands.append(" ".join(words))
        if words[0] in self.before:
            self.before[words[0]](words)
        answer: str = getattr(self, f"_{words[0]}")(words)
        return answer

    def _lvm(self, argv: list[str]) -> str:
        if argv[1] == "pvs":
            rows = [{"pv_name": "/dev/sda", "vg_name": self.vg["vg_name"], "pv_duplicate": ""}]
            return json.dumps({"report": [{"pv": rows}]})
        if argv[1] == "lvs":  # of all groups
            ours = [name for name, volume in self.volumes.items() if "localdisk" in volume.lv_tags]
            rows = [{"vg_name": self.vg["vg_name"], "lv_name": name} for name in ours]
            return json.dumps({"report": [{"lv": rows}]})
        assert " ".join(argv[:-1]) == FULLREPORT
        if argv[-1] != self.vg["vg_name"]:
            missing = f'  Volume group "{argv[-1]}" not found\n  Cannot process volume group {argv[-1]}\n'
            raise CommandFailed(tuple(argv), 5, missing)
        return self.report()

    def report(self) -> str:
        lvs = [self.volumes[name].row for name in sorted(self.volumes)]
        seg = [
            self.pools.get(name, {"lv_name": name, "zero": "", "chunk_size": "65536"})
            for name, volume in sorted(self.volumes.items())
            if volume.lv_layout == "thin,pool"
        ]
        tables = {"vg": [self.vg], "pv": self.unallocatable, "lv": lvs, "pvseg": [], "seg": seg}
        return json.dumps({"report": [tables]})

    def _lvcreate(self, argv: list[str]) -> str:
        flags, options, rest = _parse(
            argv,
            flags="--quiet --yes --ignoreactivationskip --snapshot",
            options="--wipesignatures --name --setactivationskip --addtag --zero --size"
            " --virtualsize --thinpool --permission",
        )
        assert flags - {"--snapshot"} == {"--quiet", "--yes", "--ignoreactivationskip"}
        assert options.get("--wipesignatures") == (None if "--snapshot" in flags else ["n"])
        assert options["--setactivationskip"] == ["y"]
        (name,), content = options["--name"], ""
        if name in self.volumes:
            where = f'in volume group "{self.vg["vg_name"]}"'
            raise CommandFailed(tuple(argv), 5, f'  Logical Volume "{name}" already exists {where}\n')
        if "--thinpool" in options:
            assert not rest
            ((place,), (size,)) = options["--thinpool"], options["--virtualsize"]
            pool = place.split("/")[1]
            self._allocate(argv, size, from_vg=False)
            fields = {"lv_layout": "thin,sparse", "pool_lv": pool, "data_percent": "0.00"}
        elif "--snapshot" in flags:
            assert options["--permission"] == ["rw"]
            (origin,) = self._named(argv, rest)
            assert origin.pool_lv, "only thin volumes are cloned"
            size = f"{origin.lv_size}b"
            fields = {"lv_layout": "thin,sparse", "pool_lv": origin.pool_lv, "data_percent": "1.00"}
            fields |= {"lv_role": "public,snapshot,thinsnapshot", "origin": origin.lv_name}
            content = self.content[origin.lv_uuid]
        else:
            assert rest == [self.vg["vg_name"]]
            assert options["--zero"] == ["y"]
            ((size,), fields) = options["--size"], {}
            self._allocate(argv, size, from_vg=True)
        volume = self.add(name, options["--addtag"], _bytes(size), **fields)
        self.content[volume.lv_uuid] = content or volume.lv_uuid
        return ""

    def _allocate(self, argv: list[str], size: str, from_vg: bool) -> None:
        left = int(self.vg["vg_free"]) - _bytes(size)
        if not from_vg:
            return
        if left < 0:
            free, needed = int(self.vg["vg_free"]) // EXTENT, _bytes(size) // EXTENT
            said = f"insufficient free space ({free} extents): {needed} required."
            raise CommandFailed(tuple(argv), 5, f'  Volume group "{self.vg["vg_name"]}" has {said}\n')
        self.vg["vg_free"] = str(left)

    def _lvchange(self, argv: list[str]) -> str:
        flags, options, names = _parse(
            argv,
            flags="--quiet --yes --ignoreactivationskip",
            options="--addtag --deltag --activate --permission --select",
        )
        assert ("--quiet" in flags) is ("--select" not in options)
        assert names
        found = self._named(argv, names)
        if "--select" in options:
            (selection,) = options["--select"]
            found = [each for each in found if self._matches(each, selection)]
        for volume in found:
            volume.lv_tags -= set(options.get("--deltag", ()))
            volume.lv_tags |= set(options.get("--addtag", ()))
            if options.get("--activate") == ["n"] and volume.lv_device_open:
                self._in_use(argv, volume)
            if "--permission" in options:
                volume.lv_permissions = {"r": "read-only", "rw": "writeable"}[options["--permission"][0]]
            if "--activate" in options:
                assert options["--activate"] == ["n"] or "--ignoreactivationskip" in flags
                volume.lv_active = {"y": "active", "n": ""}[options["--activate"][0]]
        said = [f"  Logical volume {name} changed.\n" for name in names if found]
        return "" if "--quiet" in flags or self.is_silent else "".join(said)

    def _matches(self, volume: Volume, selection: str) -> bool:
        """Of one UUID, and with all of the tags, in quotes."""
        uuid, _, tags = selection.removesuffix(" && vg_partial=0 && vg_exported=0").partition(" && lv_tags=")
        assert uuid.startswith("lv_uuid=")
        if self.vg["vg_partial"] or self.vg["vg_exported"]:
            return False
        wanted = {tag.strip('"') for tag in tags.strip("{}").split(" && ")}
        return uuid == f"lv_uuid={volume.lv_uuid}" and wanted <= volume.lv_tags

    def _lvextend(self, argv: list[str]) -> str:
        _, options, names = _parse(argv, flags="--quiet", options="--size")
        (volume,), (size,) = self._named(argv, names), options["--size"]
        wanted = -(-int(size.removesuffix("b")) // EXTENT) * EXTENT
        if wanted <= volume.lv_size:
            raise CommandFailed(tuple(argv), 5, "  New size not larger than existing size.\n")
        volume.lv_size = wanted
        return ""

    def _lvs(self, argv: list[str]) -> str:
        """Of a storage domain's volume group."""
        assert argv[1:6] == ["--readonly", "--reportformat", "json", "-o", "lv_tags"]
        assert argv[6] == "--devices"
        if argv[-1] not in self.domain_tags:
            said = f'  Failed to find logical volume "{argv[-1]}"\n'
            raise CommandFailed(tuple(argv), 5, said)
        rows = [{"lv_tags": ",".join(sorted(self.domain_tags[argv[-1]]))}]
        return json.dumps({"report": [{"lv": rows}]})

    def _lvremove(self, argv: list[str]) -> str:
        """All or nothing; LVM deactivates the others even where one is in use."""
        flags, _, names = _parse(argv, flags="--quiet --yes", options="")
        assert flags == {"--quiet", "--yes"}
        volumes = self._named(argv, names)
        volumes += [each for volume in volumes for each in self.snapshots_of(volume)]
        for volume in volumes:
            if volume.lv_device_open:
                self._in_use(argv, volume)
        for volume in volumes:
            self.removed.append(self.volumes.pop(volume.lv_name))
            for each in self.volumes.values():
                each.origin = "" if each.origin == volume.lv_name else each.origin
            if not volume.pool_lv:
                self.vg["vg_free"] = str(int(self.vg["vg_free"]) + volume.lv_size)
            elif volume.pool_lv in self.volumes:
                pool = self.volumes[volume.pool_lv]
                given_back = volume.lv_size * float(volume.data_percent or 0) / pool.lv_size
                pool.data_percent = f"{max(0.0, float(pool.data_percent) - given_back):.2f}"
        return ""

    def snapshots_of(self, origin: Volume) -> list[Volume]:
        """The volumes that LVM removes with this one, without a question."""
        found = [each for each in self.volumes.values() if each.origin == origin.lv_name]
        return [each for each in found if not each.pool_lv or each.pool_lv != origin.pool_lv]

    def _lvrename(self, argv: list[str]) -> str:
        assert argv[1:3] == ["--quiet", self.vg["vg_name"]]
        old, new = argv[3:]
        if old == new:
            said = "Old and new logical volume names must differ"
            raise CommandFailed(tuple(argv), 3, f"  {said}\n  Run `lvrename --help' for more information.\n")
        (volume,) = self._named(argv, [f"{argv[2]}/{old}"])
        assert new not in self.volumes
        for each in self.volumes.values():
            each.origin = new if each.origin == old else each.origin
        del self.volumes[old]
        volume.lv_name = new
        self.volumes[new] = volume
        return ""

    def _named(self, argv: list[str], names: list[str]) -> list[Volume]:
        for name in names:
            if name.split("/")[1] not in self.volumes:
                raise CommandFailed(tuple(argv), 5, f'  Failed to find logical volume "{name}"\n')
        return [self.volumes[name.split("/")[1]] for name in names]

    def _in_use(self, argv: list[str], volume: Volume) -> None:
        name = f"{self.vg['vg_name']}/{volume.lv_name}"
        raise CommandFailed(tuple(argv), 5, f"  Logical volume {name} in use.\n")

    def _blkdiscard(self, argv: list[str]) -> str:
        volume = self.volumes[argv[-1].rpartition("/")[2]]
        assert volume.lv_active
        assert volume.lv_permissions == "writeable", "the kernel refuses this with EPERM"
        assert not volume.lv_device_open, "erased under whoever has it open"
        assert f"ASIDE_{volume.lv_name}" in volume.lv_tags, "erased under a name that a start may ask for"
        _, options, _ = _parse(argv, flags="--zeroout", options="--offset --length")
        ((start,), (length,)) = options["--offset"], options["--length"]
        assert int(start) == self.erased_to.get(volume.lv_uuid, 0) or int(start) == 0, "a step was left out"
        self.erased_to[volume.lv_uuid] = end = int(start) + int(length)
        assert int(length) > 0
        assert end <= volume.lv_size
        if end == volume.lv_size:
            self.erased.add(volume.lv_uuid)
        return ""

    def _virsh(self, argv: list[str]) -> str:
        assert argv[1:4] == ["--readonly", "--connect", "qemu:///system"]
        if self.libvirt_is_silent:
            said = "error: failed to connect to the hypervisor\nerror: Failed to connect socket"
            raise CommandFailed(tuple(argv), 1, said)
        script = " ".join(argv[4:]).split("; ")
        return "".join(self._virsh_command(words.split()) for words in script)

    def _virsh_command(self, words: list[str]) -> str:
        if words[0] == "echo":
            return " ".join(words[1:]) + "\n"
        if words[0] == "dumpxml":
            return self.xmls[words[1]] + "\n" if words[1] in self.xmls else ""
        if words[0] == "domblklist":
            return self._domblklist(words[1])
        options = {"list", "--uuid", "--all", "--name"}
        assert words[0] == "list"
        assert options.issuperset(words)
        every = self._known()
        shown = sorted(every if "--all" in words else self.active)
        if "--name" not in words:
            return "".join(f"{vm_id}\n" for vm_id in shown) + "\n"
        named = ((vm_id, self.names.get(vm_id, f"vm-{vm_id[:8]}")) for vm_id in shown)
        return "".join(f"{vm_id:<36} {name:<30}\n" for vm_id, name in named) + "\n"

    def _known(self) -> set[str]:
        return self.active | self.defined | self.shut_off | set(filter(None, self.starting))

    def _domblklist(self, vm_id: str) -> str:
        if vm_id not in self._known():
            return ""  # it says why on standard error, and virsh goes on
        disk = " vda      /dev/somewhere\n" if vm_id in self.active | self.shut_off else ""
        return f" Target   Source\n{'-' * 20}\n{disk}\n"

    def _new_uuid(self) -> str:
        self._count = getattr(self, "_count", 0) + 1
        return f"fakefa-kefa-kefa-kefa-kefa-kefa-{self._count:06d}"


def _parse(argv: list[str], flags: str, options: str) -> tuple[set[str], dict[str, list[str]], list[str]]:
    found_flags: set[str] = set()
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    words = iter(argv[1:])
    for word in words:
        if word in flags.split():
            found_flags.add(word)
        elif word in options.split():
            found.setdefault(word, []).append(next(words))
        else:
            assert not word.startswith("-"), f"{argv[0]} {word}"
            rest.append(word)
    return found_flags, found, rest


def _bytes(size: str) -> int:
    assert size.endswith("b")
    assert int(size[:-1]) % 512 == 0
    return -(-int(size[:-1]) // EXTENT) * EXTENT
