"""Reads a YAML file as plain values, with line and column of each; features that we refuse become problems.

It reads the events of PyYAML's parser.  PyYAML's composer would follow aliases and recurse to any depth, and
its constructor would make a number of `1:30` and lose lines and columns.
"""

from __future__ import annotations

import re

from localdisk.frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Union

    Path = tuple[Union[str, int], ...]

FILE_LIMIT = 64 * 1024
DEPTH_LIMIT = 8
LIST_LIMIT = 256


@frozen
class Place:
    """Where a key or value begins, counted from 1, and its text in the file if it is a scalar."""

    line: int
    column: int
    text: str = ""


@frozen
class Problem:
    """What is wrong with the value at `path`; the empty path is the whole file."""

    line: int
    column: int
    path: Path
    what: str

    @classmethod
    def at(cls, place: Place, path: Path, what: str) -> Problem:
        return cls(place.line, place.column, path, what)


class Refused:
    """Replaces a value that has a problem already, so that the rest of the file can still be checked."""


@frozen
class Tree:
    """`value` is made of dict with text keys, list, str, int, bool, None and Refused.

    `keys` and `values` have the places by path; if a mapping has a key twice, that of the first.
    """

    value: Any
    keys: dict[Path, Place]
    values: dict[Path, Place]
    problems: tuple[Problem, ...]


def read_tree(data: bytes) -> Tree:
    """The tree of a YAML file; if the file is no YAML, or too large or deep, its value is Refused."""
    reader = _Reader()
    try:
        value = reader.read(data)
    except _UnreadableError:
        value = Refused()
    return Tree(value, reader.keys, reader.values, tuple(reader.problems))


def shorten(text: str) -> str:
    """At most 40 characters of `text`, for a message."""
    return text if len(text) <= 40 else text[:39] + "…"


class _UnreadableError(Exception):
    """The rest of the file is not worth reading; the problem has been noted."""


class _Reader:
    """Reads the events of one file, and notes places and problems."""

    def __init__(self) -> None:
        self.keys: dict[Path, Place] = {}
        self.values: dict[Path, Place] = {}
        self.problems: list[Problem] = []

    def read(self, data: bytes) -> Any:
        if len(data) > FILE_LIMIT:
            raise self._unreadable("", f"is larger than {FILE_LIMIT} bytes")
        try:
            return self._read_text(data.decode())
        except UnicodeDecodeError as error:
            raise self._unreadable(data[: error.start].decode(), "is not UTF-8 text") from error

    def _read_text(self, text: str) -> Any:
        import yaml
        from yaml.reader import ReaderError

        self._loader: Any = None
        try:
            self._loader = yaml.SafeLoader(text)
            return self._read_stream()
        except ReaderError as error:
            raise self._unreadable(text[: error.position], "holds a control character") from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            before = text[: mark.index] if mark else ""
            raise self._unreadable(before, f"is not YAML: {error.problem or error.context}") from error
        except (ValueError, OverflowError) as error:
            # PyYAML 6.0.3 lets these through: "\UFFFFFFFF", a %YAML directive of 5,000 digits
            before = text[: self._loader.get_mark().index]
            raise self._unreadable(before, "is not YAML: a number is out of range") from error

    def _read_stream(self) -> Any:
        import yaml

        self._loader.get_event()  # the start of the stream
        if self._loader.check_event(yaml.StreamEndEvent):
            return {}
        self._loader.get_event()  # the start of the document
        value = self._read_value(())
        self._loader.get_event()  # the end of the document
        following = self._loader.get_event()
        if not isinstance(following, yaml.StreamEndEvent):
            self._refuse(following, (), "a second document begins here; the file must have only one")
        is_empty = value is None and not self.values[()].text
        return {} if is_empty else value

    def _read_value(self, path: Path) -> Any:
        import yaml

        event = self._loader.get_event()
        self.values.setdefault(path, _place(event))
        if len(path) > DEPTH_LIMIT:
            self._refuse(event, path[:1], f"is nested more than {DEPTH_LIMIT} levels deep")
            raise _UnreadableError
        plain = self._is_plain(event, path)
        value: Any = Refused()
        if isinstance(event, yaml.MappingStartEvent):
            value = self._read_mapping(path)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._read_sequence(path)
        elif isinstance(event, yaml.ScalarEvent):
            value = self._read_scalar(event, path)
        return value if plain else Refused()

    def _read_mapping(self, path: Path) -> dict[str, Any]:
        import yaml

        values: dict[str, Any] = {}
        while not self._loader.check_event(yaml.MappingEndEvent):
            event = self._loader.peek_event()
            key = self._read_key(path)
            value = self._read_value((*path, key))
            if key in values:
                first = self.keys[(*path, key)].line
                self._refuse(event, (*path, key), f"is a duplicate: the key stands in line {first} already")
            elif key:
                self.keys[(*path, key)] = _place(event)
                values[key] = value
        self._loader.get_event()
        return values

    def _read_key(self, path: Path) -> str:
        """The next key as the file has it, even if YAML would read it as a switch or number; "": refused."""
        import yaml

        event = self._loader.peek_event()
        if not isinstance(event, yaml.ScalarEvent):
            self._refuse(event, path, "has a key that is not plain text")
            self._read_value((*path, ""))
            return ""
        self._loader.get_event()
        key = str(event.value)
        if event.implicit[0] and key == "<<":
            self._refuse(event, (*path, key), "merge keys are refused, write the keys out")
        elif not key:
            self._refuse(event, path, "has an empty key")
        elif self._is_plain(event, (*path, key)) and self._is_printable(event, (*path, key)):
            return key
        return ""

    def _read_sequence(self, path: Path) -> list[Any]:
        """The list, cut one item after LIST_LIMIT: comparing thousands of items would take minutes."""
        import yaml

        values: list[Any] = []
        while not self._loader.check_event(yaml.SequenceEndEvent):
            values.append(self._read_value((*path, len(values))))
        self._loader.get_event()
        return values[: LIST_LIMIT + 1]

    def _read_scalar(self, event: Any, path: Path) -> Any:
        import yaml

        kind = self._loader.resolve(yaml.ScalarNode, event.value, event.implicit).rpartition(":")[2]
        if not self._is_printable(event, path):
            return Refused()
        if kind == "null":
            return None
        if kind == "bool":
            return event.value.lower() in ("on", "yes", "true")
        if kind in ("int", "float"):
            return self._read_number(event, path, kind)
        return event.value

    def _read_number(self, event: Any, path: Path, kind: str) -> int | Refused:
        if re.fullmatch("-?(?:0|[1-9][0-9]{0,18})", event.value):
            return int(event.value)
        form = _number_form(event.value, kind)
        fix = "write plain digits with a unit (90s, 10GiB), or quote it"
        self._refuse(event, path, f"{shorten(event.value)} is {form} to YAML: {fix}")
        return Refused()

    def _is_plain(self, event: Any, path: Path) -> bool:
        """Whether the value has no alias, anchor or tag."""
        import yaml

        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, path, "aliases are refused, write the value out")
        elif event.anchor is not None:
            self._refuse(event, path, "anchors are refused, write the value out")
        elif event.tag is not None:
            self._refuse(event, path, "tags are refused, write the value alone")
        else:
            return True
        return False

    def _is_printable(self, event: Any, path: Path) -> bool:
        if event.value.isprintable():
            return True
        self._refuse(event, path, "holds a line break, control or other character that cannot be shown")
        return False

    def _refuse(self, event: Any, path: Path, what: str) -> None:
        self.problems.append(Problem.at(_place(event), path, what))

    def _unreadable(self, before: str, what: str) -> _UnreadableError:
        """Note a problem of the whole file that was found after the text `before`."""
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        self.problems.append(Problem(line, column, (), what))
        return _UnreadableError()


def _place(event: Any) -> Place:
    return Place(event.start_mark.line + 1, event.start_mark.column + 1, getattr(event, "value", ""))


def _number_form(text: str, kind: str) -> str:
    digits = text.lstrip("+-").lower()
    if ":" in text:
        return "a number in base 60"
    if kind == "float":
        return "a floating-point number"
    if digits[0] == "0":
        return "a number in base " + {"x": "16", "b": "2"}.get(digits[1:2], "8")
    return "a number with signs or too many digits"
