"""The hook's end of the pipe to the helper: one `sudo … helper` for each hook run, JSON lines both ways.

`helper/session.py` is the other end; `protocol.py` has the requests and answers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from localdisk import protocol, run
from localdisk.errors import HelperRefused, HelperUnavailable, last_words, sudo_fix
from localdisk.protocol import (
    Base,
    Claimed,
    Device,
    DiskIds,
    Done,
    Fetched,
    Looked,
    Looks,
    Prepared,
    RanFrom,
    Target,
    Tried,
)
from localdisk.vdsm.disks import Disk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")


_OURS = "localdisk: "  # before each error that cli.py prints


class Helper:
    """A running helper; leaving the context ends it, and with it an unfinished disk.

    All methods raise HelperRefused (with the helper's reason) and HelperUnavailable (the helper could not be
    started, or has ended).
    """

    def __init__(self, vm_id: str = "", property_value: str = "") -> None:
        """Start the helper for one VM and its custom property; without them it can only prefetch."""
        self._program = os.path.realpath(sys.argv[0])
        self._vm = vm_id, property_value
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
        """The state of the local copies of `disks`, in their order; locks and changes nothing."""
        asked = tuple(DiskIds(disk.image_id, disk.volume_id) for disk in disks)
        looked = self._ask(protocol.Look(*self._vm, asked), Looks).looked
        with self._understood():
            if len(looked) != len(asked):
                raise ValueError
        return looked

    def claim(self, disk: Disk, seen_at: int) -> Claimed:
        """Hold this disk's lock until `commit`, the next claim or the end.

        `seen_at` is that of `protocol.Claim`; if it is too old, the helper asks libvirt itself.
        """
        return self._ask(protocol.Claim(*self._vm, disk.image_id, disk.volume_id, seen_at), Claimed)

    def reuse(self, virtual_size: int, fingerprint: str) -> Prepared:
        """Have the helper use a kept disk again for the claimed disk, if that is possible."""
        return self._ask(protocol.Reuse(virtual_size, fingerprint), Prepared)

    def prepare(self, virtual_size: int, fingerprint: str, writes: int, base: Base | None = None) -> Prepared:
        """Have the helper make the claimed disk or use a kept disk again; waits for a turn to copy.

        `writes` is the number of bytes that a copy will write; `base` is the template that the disk may
        start from.
        """
        return self._ask(protocol.Prepare(virtual_size, fingerprint, writes, base), Prepared)

    def prefetch(self, backend: str, template: Base) -> Fetched:
        """Hold this template's lock until the helper ends, and return whether the template is cached."""
        return self._ask(protocol.Prefetch(backend, template), Fetched)

    def fill(self, writes: int) -> Target | None:
        """Have the helper make the missing template LV; None if the cache has no room for it."""
        return self._ask(protocol.Fill(writes), Prepared).target

    def uncached(self, reason: str) -> None:
        """The claimed disk does not start from a template's local copy: a word of `uncached.REASONS`."""
        self._ask(protocol.Uncached(reason), Done)

    def progress(self, done: int, written: int) -> None:
        """Report how many bytes of the guest's view are done, and how many were written to the disk.

        Raises HelperUnavailable if the helper has ended, as all methods do.
        """
        self._ask(protocol.Progress(done, written), Done)

    def commit(self) -> None:
        """The copy is complete and on the device: make the claimed disk ready."""
        self._ask(protocol.Commit(), Done)

    def mark_stale(self, images: Sequence[str]) -> None:
        """Report that the VM begins to run with these images, or `kept.EVERY`, on shared storage."""
        self._ask(protocol.Stale(self._vm[0], tuple(images)), Done)

    def rehearse(self) -> Device | None:
        """Have the helper make a tiny volume as a start would; None if that would need an eviction."""
        return self._ask(protocol.Rehearse(*self._vm), Tried).device

    def rehearsed(self) -> None:
        """Have the helper remove the tiny volume."""
        self._ask(protocol.Rehearsed(), Done)

    def cancel(self) -> None:
        """The VM is powered off while it starts: end the preparation of its disks in other hooks."""
        self._ask(protocol.Cancel(*self._vm), Done)

    def drifted(self, ran_from: Iterable[tuple[str, str]]) -> None:
        """The VM has stopped on other volumes than its local disks: image id and path of each."""
        self._ask(protocol.Drifted(*self._vm, tuple(RanFrom(*disk) for disk in ran_from)), Done)

    def release(self) -> None:
        """The VM has stopped: remove or keep its local disks by the policy of this host."""
        self._ask(protocol.Release(*self._vm), Done)

    def _ask(self, request: object, kind: type[T]) -> T:
        try:
            answer = json.loads(run.ask(self._process, protocol.write_request(request)))
        except (OSError, ValueError, RecursionError):
            problem = self._last_words()
            if problem.startswith(_OURS):  # neither sudo nor its rule is to blame
                raise HelperRefused(problem[len(_OURS) :]) from None
            raise HelperUnavailable(problem=problem, fix=sudo_fix(problem, self._program)) from None
        with self._understood():
            refusal = answer.get("error")
            if refusal is None:
                return protocol.read_answer(kind, answer)
        raise HelperRefused(str(refusal))

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Raise HelperUnavailable for an answer that `process.py` cannot have written."""
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError):
            problem = "its answer is not understood"
            raise HelperUnavailable(problem=problem, fix=sudo_fix(problem, self._program)) from None

    def _last_words(self) -> str:
        run.close_input(self._process)
        said = run.read_errors(self._process)
        return last_words("it ended", said, self._process.returncode)
