"""Frozen classes do what frozen dataclasses do: each check is made with both."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any, ClassVar

import pytest

from localdisk import frozen


def classes(decorate: Any, field: Any) -> tuple[Any, Any]:
    @decorate
    class Base:
        name: str
        size: int = 3
        KIND: ClassVar[str] = "base"

        @property
        def double(self) -> int:
            return self.size * 2

    @decorate
    class More(Base):
        words: tuple[str, ...] = ("a",)
        found: dict[str, object] = field(default_factory=dict)
        seen: int = field(default=1, compare=False)
        secret: bytes = field(default=b"x", repr=False)

    return Base, More


BOTH = pytest.mark.parametrize(
    ("decorate", "module"),
    [(frozen.frozen, frozen), (dataclasses.dataclass(frozen=True), dataclasses)],
    ids=["ours", "dataclasses"],
)


@BOTH
def test_fields(decorate: Any, module: Any) -> None:
    base, more = classes(decorate, module.field)
    found = more("n", words=("b",))
    assert (found.name, found.size, found.words, found.found, found.seen) == ("n", 3, ("b",), {}, 1)
    assert (found.double, found.KIND) == (6, "base")
    assert more("n").found is not more("n").found
    assert (base("n", 4).size, base(size=5, name="m").size) == (4, 5)


@BOTH
def test_equality(decorate: Any, module: Any) -> None:
    base, more = classes(decorate, module.field)
    assert base("n") == base("n", 3)
    assert base("n") != base("m")
    assert more("n", seen=1) == more("n", seen=2)
    assert more("n") != base("n")
    assert hash(base("n")) == hash(base("n"))
    assert {base("n"), base("n"), base("m")} == {base("m"), base("n")}


@BOTH
def test_repr(decorate: Any, module: Any) -> None:
    _, more = classes(decorate, module.field)
    assert repr(more("n")).partition("(")[2] == "name='n', size=3, words=('a',), found={}, seen=1)"


@BOTH
@pytest.mark.parametrize("change", [lambda x: setattr(x, "name", "m"), lambda x: delattr(x, "name")])
def test_nothing_changes(decorate: Any, module: Any, change: Any) -> None:
    base, _ = classes(decorate, module.field)
    found = base("n")
    with pytest.raises(AttributeError):
        change(found)
    with pytest.raises(AttributeError):
        found.other = 1
    assert found == base("n")


@BOTH
@pytest.mark.parametrize(
    ("values", "named"),
    [((), {}), (("n", 1, 2), {}), (("n",), {"name": "m"}), (("n",), {"other": 1}), ((), {"size": 1})],
)
def test_wrong_fields(decorate: Any, module: Any, values: Any, named: Any) -> None:
    base, _ = classes(decorate, module.field)
    with pytest.raises(TypeError):
        base(*values, **named)


@BOTH
def test_replace(decorate: Any, module: Any) -> None:
    base, more = classes(decorate, module.field)
    assert module.replace(base("n"), size=9) == base("n", 9)
    changed = module.replace(more("n", secret=b"y"), words=())
    assert (type(changed), changed.words, changed.secret) == (more, (), b"y")
    with pytest.raises(TypeError):
        module.replace(base("n"), other=1)


def test_values_for_json() -> None:
    base, more = classes(frozen.frozen, frozen.field)
    inner = base("i")
    plain = {"name": "i", "size": 3}
    found = frozen.plain_values(more("n", words=(inner,), found={"x": [inner]}))
    assert (found["words"], found["found"], found["size"]) == ([plain], {"x": [plain]}, 3)
    assert frozen.names(more) == ("name", "size", "words", "found", "seen", "secret")
    assert frozen.values(inner) == plain


def test_what_a_hook_does_not_import() -> None:
    """Each of these would cost it a tenth of a bare interpreter's start or more."""
    slow = {"argparse", "ast", "dataclasses", "inspect", "jsonschema", "lxml", "typing", "uuid", "yaml"}
    script = "import sys, localdisk.cli, localdisk.hook, localdisk.helper, localdisk.log; print(*sys.modules)"
    argv = [sys.executable, "-S", "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env={"PYTHONPATH": "."})
    assert not slow & set(done.stdout.split())


def test_once() -> None:
    base, _ = classes(frozen.frozen, frozen.field)
    calls = []

    @frozen.once
    def size(found: Any) -> int:
        """Its size."""
        calls.append(found)
        return int(found.size)

    first, second = base("n", 4), base("n", 4)
    assert [size(first), size(first), size(second)] == [4, 4, 4]
    assert ([*map(id, calls)], size.__doc__) == ([id(first), id(second)], "Its size.")
    assert first == base("n", 4)
    assert size(frozen.replace(first, size=5)) == 5, "the copy is another object"
    assert frozen.plain_values(first) == {"name": "n", "size": 4}
