"""The hook's side of the privileged helper: one `sudo … helper` for one hook run, JSON lines both ways.

`session.py` is the other side; what is asked here is checked there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from localdisk import run
from localdisk.errors import HelperRefused, HelperUnavailable, how_it_ended, sudo_fix
from localdisk.frozen import frozen, plain_values
from localdisk.hook.copy import Device, Target
from localdisk.vdsm.definition import Disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


@frozen
class Base:
    """A template's volume that a disk may start from; `domain` "" for a file, `size` in bytes."""

    volume: str
    domain: str
    fingerprint: str
    size: int


@frozen
class Looked:
    """What the helper sees of one disk; `path` is where it is or would be."""

    is_local: bool  # by the policy of this host, it must run from a local disk
    is_kept: bool  # the VM has a complete local disk of its image
    is_ready: bool
    state: str
    path: str


@frozen
class Claimed:
    """The answer to a claim; where the disk neither stays nor has a path, it is to be prepared."""

    stays: bool  # leave the disk where it is
    path: str  # the running VM's local disk, "" if there is none
    is_thin: bool  # a new local disk would be thin
    is_cached: bool  # it would start from a local copy of its template


@frozen
class Prepared:
    """The local disk's path, and what must be copied where; `session.py` says what `how` can be."""

    how: str
    path: str
    target: Target | None
    base: Device | None


@frozen
class Fetched:
    """Whether a template is in the cache, and if a new copy of it would be thin."""

    is_ready: bool
    is_thin: bool


class Helper:
    """A running helper; leaving the context ends it, and with it an unfinished disk.

    All methods raise HelperRefused (it says why not) and HelperUnavailable (it is not there, or is gone).
    """

    def __init__(self, vm_id: str = "", property_value: str = "") -> None:
        """Of one VM and its custom property; without them only to prefetch."""
        self._program = os.path.realpath(sys.argv[0])
        self._vm = {"vm": vm_id, "property": property_value}
        self._process = run.start_talking(["sudo", "-n", self._program, "helper"])

    def __enter__(self) -> Helper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        run.close_input(self._process)  # the helper removes what is unfinished, then ends
        self._process.wait()
        run.end(self._process)

    def look(self, disks: Iterable[Disk]) -> tuple[Looked, ...]:
        """How the local copies of `disks` are, in their order; locks and changes nothing."""
        asked = [_ids(disk) for disk in disks]
        answer = self._ask("look", **self._vm, disks=asked)
        with self._understood():
            looked = tuple(
                Looked(
                    is_local=bool(row["local"]),
                    is_kept=bool(row["kept"]),
                    is_ready=bool(row["ready"]),
                    state=str(row["state"]),
                    path=str(row["path"]),
                )
                for row in answer["disks"]
            )
            if len(looked) != len(asked):
                raise ValueError
        return looked

    def claim(self, disk: Disk) -> Claimed:
        """Hold this disk's lock until `commit`, the next claim or the end."""
        answer = self._ask("claim", **self._vm, **_ids(disk))
        with self._understood():
            stays, path = bool(answer["stays"]), str(answer["path"])
            return Claimed(stays, path, bool(answer["thin"]), bool(answer["cached"]))

    def prepare(self, virtual_size: int, fingerprint: str, writes: int, base: Base | None = None) -> Prepared:
        """Have the claimed disk made or taken back; waits for a turn to copy.

        `writes` are the bytes of data that will be written to it; `base` is what it may start from.
        """
        asked = plain_values(base) if base else None
        fields = {"size": virtual_size, "fingerprint": fingerprint, "writes": writes, "base": asked}
        return self._prepared(self._ask("prepare", **fields))

    def prefetch(self, backend: str, base: Base) -> Fetched:
        """Hold this template's lock until the end and see whether it is in the cache."""
        answer = self._ask("prefetch", backend=backend, base=plain_values(base))
        with self._understood():
            return Fetched(bool(answer["ready"]), bool(answer["thin"]))

    def fill(self, writes: int) -> Target | None:
        """Have the template LV made that is missing; None where the cache does not take it."""
        return self._prepared(self._ask("fill", writes=writes)).target

    def _prepared(self, answer: Any) -> Prepared:
        with self._understood():
            target, base = answer["target"], answer["base"]
            return Prepared(
                how=str(answer["how"]),
                path=str(answer["path"]),
                target=None if target is None else Target(**target),
                base=None if base is None else Device(**base),
            )

    def progress(self, done: int, written: int) -> None:
        """Tell how many bytes of the guest's view are done and how many the disk has got.

        It also notices that the helper is gone.
        """
        self._ask("progress", done=done, written=written)

    def commit(self) -> None:
        """The copy is complete and on the device: make the claimed disk ready."""
        self._ask("commit")

    def mark_stale(self, images: Sequence[str]) -> None:
        """The VM begins to run with these images, or `kept.EVERY`, on shared storage."""
        self._ask("stale", vm=self._vm["vm"], images=list(images))

    def cancel(self) -> None:
        """The VM is powered off while it starts: end what other hooks prepare for it."""
        self._ask("cancel", **self._vm)

    def drifted(self, ran_from: Iterable[tuple[str, str]]) -> None:
        """The VM has stopped; in the end it ran not from its local disks but from these: image id, path."""
        disks = [{"image": image_id, "path": path} for image_id, path in ran_from]
        self._ask("drifted", **self._vm, disks=disks)

    def release(self) -> None:
        """The VM has stopped: remove or keep its local disks by the policy of this host."""
        self._ask("release", **self._vm)

    def _ask(self, verb: str, **fields: Any) -> Any:
        try:
            answer = json.loads(run.ask(self._process, json.dumps({"verb": verb, **fields}).encode()))
        except (OSError, ValueError, RecursionError):
            problem = self._last_words()
            raise HelperUnavailable(problem=problem, fix=sudo_fix(problem, self._program)) from None
        with self._understood():
            refusal = answer.get("error")
        if refusal is not None:
            raise HelperRefused(str(refusal))
        return answer

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Whatever is not as `process.py` answers was not said by it."""
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError):
            problem = "its answer is not understood"
            raise HelperUnavailable(problem=problem, fix=sudo_fix(problem, self._program)) from None

    def _last_words(self) -> str:
        run.close_input(self._process)
        said = run.read_errors(self._process)
        return said or f"it ended without a word: {how_it_ended(self._process.returncode)}"


def _ids(disk: Disk) -> dict[str, str]:
    return {"image": disk.image_id, "volume": disk.volume_id}
