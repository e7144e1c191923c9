"""Classes of named fields that are compared by value and never change, like frozen dataclasses.

A hook and a helper are started for every disk of every VM.  The import of `dataclasses` takes two thirds of
the time that a bare interpreter needs to start: it imports `inspect`, with Python's parser and disassembler.
It also compiles code for each class.  A type checker takes the classes of this module for dataclasses.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers know it; `typing` is slow to import, too
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from typing_extensions import dataclass_transform

    T = TypeVar("T")
else:

    def dataclass_transform(**_options):
        return lambda function: function


class _Options:
    """The options of a field; stands where the field's default would be."""

    def __init__(self, **options: Any) -> None:
        self.options = options


def field(**options: Any) -> Any:
    """A field with options, each optional.

    default           the value if none is given
    default_factory   a function that makes this value for each object
    compare=False     the field is ignored when objects are compared
    repr=False        the field is not shown
    """
    return _Options(**options)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T]) -> type[T]:
    """Make `cls` a frozen class: its fields are those of its frozen base class, then its own annotations.

    Values are given by position or by name.  A missing or unknown field raises TypeError; changing a field
    raises AttributeError.
    """
    options = {**getattr(cls, "_options", {}), **_own_options(cls)}
    members: dict[str, Any] = {
        "_options": options,
        "_names": tuple(options),
        "_defaults": {name: each["default"] for name, each in options.items() if "default" in each},
        "_makers": {
            name: each["default_factory"] for name, each in options.items() if "default_factory" in each
        },
        "_compared": tuple(name for name, each in options.items() if each.get("compare", True)),
        "__init__": _init,
        "__eq__": _equals,
        "__hash__": _hash,
        "__repr__": _repr,
        "__setattr__": _refuse,
        "__delattr__": _refuse,
    }
    for name, member in members.items():
        setattr(cls, name, member)
    return cls


def once(function: Callable[[Any], T]) -> Callable[[Any], T]:
    """Let `function` of one frozen object work once for each object, which keeps the result."""
    name = f"_once_{function.__module__}.{function.__qualname__}"

    def kept(found: Any) -> T:
        state = found.__dict__
        if name not in state:
            state[name] = function(found)
        result: T = state[name]
        return result

    kept.__doc__ = function.__doc__
    return kept


def replace(old: T, **changes: Any) -> T:
    """A copy of `old` with `changes`."""
    return type(old)(**{**values(old), **changes})


def values(found: object) -> dict[str, Any]:
    """The fields of an object, by name."""
    state = vars(found)
    return {name: state[name] for name in names(type(found))}


def names(kind: type) -> tuple[str, ...]:
    """The names of the fields of a class."""
    found: tuple[str, ...] = kind._names  # type: ignore[attr-defined]
    return found


def plain_values(found: Any) -> Any:
    """`found` for JSON: a dictionary for each frozen object in it, a list for each sequence."""
    if hasattr(type(found), "_names"):
        return {name: plain_values(value) for name, value in values(found).items()}
    if isinstance(found, dict):
        return {key: plain_values(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [plain_values(value) for value in found]
    return found


def _own_options(cls: type) -> dict[str, dict[str, Any]]:
    """The options of each field that the class itself annotates."""
    found = {}
    for name, annotation in cls.__dict__.get("__annotations__", {}).items():
        if annotation.startswith("ClassVar"):
            continue
        default = cls.__dict__.get(name, _Options())
        found[name] = default.options if isinstance(default, _Options) else {"default": default}
        if isinstance(cls.__dict__.get(name), _Options):
            delattr(cls, name)
    return found


def _init(self: Any, *by_position: Any, **by_name: Any) -> None:
    # `by_name` is ours alone, so it becomes the object's own dictionary: gc makes thousands of objects.
    count = len(by_position) + len(by_name)
    if by_position:
        by_name.update(zip(self._names, by_position))
    is_given_once = len(by_name) == count
    if count < len(self._names):
        by_name = {**self._defaults, **by_name}
        for name, make in self._makers.items():
            if name not in by_name:
                by_name[name] = make()
    if not is_given_once or by_name.keys() != self._options.keys():
        wrong = sorted(self._options.keys() ^ by_name.keys()) or "a field is given twice"
        raise TypeError(f"{type(self).__name__}: {wrong}")
    object.__setattr__(self, "__dict__", by_name)


def _key(self: Any) -> tuple[object, ...]:
    state = self.__dict__
    return tuple([state[name] for name in self._compared])


def _equals(self: Any, other: object) -> Any:
    return _key(self) == _key(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_key(self))


def _repr(self: Any) -> str:
    shown = (
        f"{name}={value!r}" for name, value in values(self).items() if self._options[name].get("repr", True)
    )
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _refuse(self: object, name: str, *_value: object) -> None:
    raise AttributeError(f"{type(self).__name__} does not change: {name}")
