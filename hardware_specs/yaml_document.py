"""The one strict reader of the YAML files that users write.

A `Section` is a mapping that knows where it stands, hands out values by type, and remembers which keys
were asked for: `Section.close` then rejects the ones nobody understood. Every complaint is a `SpecError` of
one line, ``FILE:LINE: PATH.KEY: what is wrong and how to write it``.

Plain scalars mean what YAML 1.2 says: ``1e-6`` and ``1e3`` are numbers, ``010`` is ten, ``yes``, ``on`` and
``1:30`` are text, and only ``true`` and ``false`` are booleans. A key whose value is empty or ``null`` counts
as absent.
"""

from __future__ import annotations

import difflib
import stat
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Final, TypeVar

from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.yaml_nodes import (
    MAX_BYTES,
    MappingNode,
    Node,
    NumbersNode,
    ScalarNode,
    SequenceNode,
    compose,
)
from meshwright.hardware_specs.yaml_values import (
    as_boolean,
    as_integer,
    as_number,
    as_quantity,
    as_text,
    as_word,
    described,
    shown,
)
from meshwright.units import Kind

__all__ = ["Section", "parse_yaml", "read_yaml"]

_T = TypeVar("_T")


class _Required(Enum):
    REQUIRED = "required"


_REQUIRED: Final = _Required.REQUIRED


class Section:
    """A YAML mapping that knows its position and which of its keys were read.

    Every reader takes ``default``; without one the key is required. The ``optional_`` readers return None for
    an absent key.

    Parameters
    ----------
    file : str
        Name of the file, for messages.
    path : str
        Dotted keys from the root, ``""`` at the root itself.
    node : MappingNode
        The mapping.

    Examples
    --------
    >>> section = parse_yaml("node: {gpus: 8}", "a.yaml").section("node")
    >>> section.integer("gpus"), section.path
    (8, 'node')
    >>> section.integer("nics", default=1)
    1
    """

    __slots__ = ("_asked", "_children", "_lists", "_node", "_read", "file", "path")

    def __init__(self, file: str, path: str, node: MappingNode) -> None:
        self.file: Final = file
        self.path: Final = path
        self._node = node
        self._asked: dict[str, None] = {}
        self._read: set[str] = set()
        self._children: dict[str, Section] = {}
        self._lists: dict[str, tuple[Section, ...]] = {}

    def __repr__(self) -> str:
        return (
            f"Section({self.file}:{self._node.line}: {self.path or '(top)'}: {', '.join(self._node.entries)})"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._node.entries)

    def __contains__(self, key: str) -> bool:
        return key in self._node.entries

    def has(self, key: str) -> bool:
        """Whether the key is there with a value; an empty or ``null`` one counts as absent."""
        self._asked[key] = None
        node = self._node.entries.get(key)
        return node is not None and not (isinstance(node, ScalarNode) and node.value() is None)

    def is_section(self, key: str) -> bool:
        """Whether the value of the key is a mapping."""
        self._asked[key] = None
        return isinstance(self._node.entries.get(key), MappingNode)

    def is_list(self, key: str) -> bool:
        """Whether the value of the key is a list."""
        self._asked[key] = None
        return isinstance(self._node.entries.get(key), SequenceNode | NumbersNode)

    def keys(self) -> tuple[str, ...]:
        """Return every key of the mapping, in the order of the file."""
        return tuple(self._node.entries)

    def line(self, key: str = "") -> int:
        """Return the line a key stands on, or that of the mapping itself."""
        return self._node.key_lines.get(key, self._node.line)

    def error(self, key: str, message: str) -> SpecError:
        """Return (not raise) a `SpecError` about a key: ``FILE:LINE: PATH.KEY: MESSAGE``."""
        where = ".".join(part for part in (self.path, key) if part)
        return self._error_at(self.line(key), where, message)

    def text(self, key: str, default: str | _Required = _REQUIRED) -> str:
        """Return text; a bare number, boolean or date has to be quoted to count as text."""
        return self._scalar(key, default, as_text)

    def integer(self, key: str, default: int | _Required = _REQUIRED, minimum: int | None = None) -> int:
        """Return a whole number of at least ``minimum``."""
        return self._at_least(key, self._scalar(key, default, as_integer), minimum)

    def number(self, key: str, default: float | _Required = _REQUIRED, minimum: float | None = None) -> float:
        """Return a finite number of at least ``minimum``."""
        return self._at_least(key, self._scalar(key, default, as_number), minimum)

    def boolean(self, key: str, default: bool | _Required = _REQUIRED) -> bool:
        """Return ``true`` or ``false``."""
        return self._scalar(key, default, as_boolean)

    def choice(self, key: str, known: Sequence[str], default: str | _Required = _REQUIRED) -> str:
        """Return text that is one of the known words."""
        word = self._scalar(key, default, as_word)
        if word not in known and word != default:
            guess = did_you_mean(word, known)
            raise self.error(key, f"unknown {key} {shown(word)}{guess or '.'} Known: {', '.join(known)}.")
        return word

    def quantity(self, key: str, kind: Kind, default: float | _Required = _REQUIRED) -> float:
        """Return the SI value of text with a unit, such as ``80 GiB``; a bare number is an error."""
        return self._scalar(key, default, lambda node: as_quantity(node, kind))

    def optional_text(self, key: str) -> str | None:
        """Return text, or None when absent."""
        return self.text(key) if self._present(key) else None

    def optional_integer(self, key: str, minimum: int | None = None) -> int | None:
        """Return a whole number, or None when absent."""
        return self.integer(key, minimum=minimum) if self._present(key) else None

    def optional_number(self, key: str, minimum: float | None = None) -> float | None:
        """Return a finite number, or None when absent."""
        return self.number(key, minimum=minimum) if self._present(key) else None

    def optional_quantity(self, key: str, kind: Kind) -> float | None:
        """Return a quantity in SI units, or None when absent."""
        return self.quantity(key, kind) if self._present(key) else None

    def texts(self, key: str, default: tuple[str, ...] | _Required = ()) -> tuple[str, ...]:
        """Return a list of texts."""
        return self._list(key, default, as_text)

    def integers(self, key: str, default: tuple[int, ...] | _Required = ()) -> tuple[int, ...]:
        """Return a list of whole numbers."""
        return self._list(key, default, as_integer)

    def numbers(self, key: str, default: tuple[float, ...] | _Required = ()) -> tuple[float, ...]:
        """Return a list of finite numbers."""
        node = self._value(key)
        if isinstance(node, NumbersNode):
            return tuple(map(float, node.values))
        return self._list(key, default, as_number)

    def section(self, key: str) -> Section:
        """Return the mapping below a key."""
        node = self._value(key)
        if node is None:
            raise self._missing(key)
        if not isinstance(node, MappingNode):
            raise self.error(key, f"expected keys and values below it, got {described(node)}")
        if key not in self._children:
            self._children[key] = Section(self.file, f"{self.path}.{key}" if self.path else key, node)
        return self._children[key]

    def optional_section(self, key: str) -> Section | None:
        """Return the mapping below a key, or None when absent."""
        return self.section(key) if self._present(key) else None

    def sections(self, key: str) -> tuple[Section, ...]:
        """Return a list of mappings; an absent key is an empty list."""
        if key not in self._lists:
            found: list[Section] = []
            for path, node in self._items(key):
                if not isinstance(node, MappingNode):
                    raise self._error_at(node.line, path, f"expected keys and values, got {described(node)}")
                found.append(Section(self.file, path, node))
            self._lists[key] = tuple(found)
        return self._lists[key]

    def close(self) -> None:
        """Reject the first key that nobody read.

        Raises
        ------
        SpecError
            Names the key and the nearest of those that were asked for.
        """
        for key in self._node.entries:
            if key not in self._read:
                known = [asked for asked in self._asked if asked not in self._node.entries]
                guess = did_you_mean(key, known)
                if not guess:
                    guess = f"; known keys: {', '.join(self._asked)}" if self._asked else "; remove it"
                raise self.error(key, f"unknown key{guess}")

    def _error_at(self, line: int, where: str, message: str) -> SpecError:
        # JSON nodes know no line.
        at = f"{self.file}:{line}" if line else self.file
        return SpecError(f"{at}: {where + ': ' if where else ''}{' '.join(message.split())}")

    def _missing(self, key: str) -> SpecError:
        if key in self._node.entries:
            return self.error(key, "is empty; give it a value")
        unread = [name for name in self._node.entries if name not in self._read]
        near = difflib.get_close_matches(key, unread, n=1, cutoff=0.75)
        return self.error(
            key, "is required but missing" + (f"; is '{near[0]}' meant to be it?" if near else "")
        )

    def _present(self, key: str) -> bool:
        self._read.add(key)
        return self.has(key)

    def _value(self, key: str) -> Node | None:
        return self._node.entries[key] if self._present(key) else None

    def _scalar(self, key: str, default: _T | _Required, convert: Callable[[ScalarNode], _T]) -> _T:
        node = self._value(key)
        if node is None:
            if isinstance(default, _Required):
                raise self._missing(key)
            return default
        if not isinstance(node, ScalarNode):
            raise self.error(key, f"expected a single value, got {described(node)}")
        try:
            return convert(node)
        except SpecError as error:
            raise self.error(key, str(error)) from None

    def _list(
        self, key: str, default: tuple[_T, ...] | _Required, convert: Callable[[ScalarNode], _T]
    ) -> tuple[_T, ...]:
        if not self._present(key):
            if isinstance(default, _Required):
                raise self._missing(key)
            return default
        values: list[_T] = []
        for path, node in self._items(key):
            if not isinstance(node, ScalarNode):
                raise self._error_at(node.line, path, f"expected a single value, got {described(node)}")
            try:
                values.append(convert(node))
            except SpecError as error:
                raise self._error_at(node.line, path, str(error)) from None
        return tuple(values)

    def _items(self, key: str) -> list[tuple[str, Node]]:
        node = self._value(key)
        if node is None:
            return []
        if isinstance(node, NumbersNode):
            node = SequenceNode(
                node.line, [ScalarNode(0, repr(value), is_plain=True) for value in node.values]
            )
        if not isinstance(node, SequenceNode):
            raise self.error(key, f"expected a list such as [a, b], got {described(node)}")
        where = f"{self.path}.{key}" if self.path else key
        return [(f"{where}[{index}]", item) for index, item in enumerate(node.items)]

    def _at_least(self, key: str, value: _T, minimum: float | None) -> _T:
        if minimum is not None and isinstance(value, int | float) and value < minimum:
            raise self.error(key, f"must be at least {minimum}, not {value}")
        return value


def read_yaml(path: Path) -> Section:
    """Read a YAML file.

    Parameters
    ----------
    path : Path
        A UTF-8 file of at most 5 MB.

    Returns
    -------
    Section
        Its top-level mapping.

    Raises
    ------
    SpecError
        If the file cannot be read or is not strict YAML; one line that says where and how to fix it.
    """
    name = str(path)
    if not name.isprintable() or len(name) > 1000:
        raise SpecError(f"{shown(name)}: is not the path of a file")
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise SpecError(f"{name}: is a directory; give a .yaml file")
        if not stat.S_ISREG(status.st_mode):
            raise SpecError(f"{name}: is not a regular file; give a .yaml file")
        if status.st_size > MAX_BYTES:
            size = status.st_size / 1e6
            raise SpecError(
                f"{name}: is {size:.1f} MB; spec files may be {MAX_BYTES // 1_000_000} MB at most"
            )
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecError(f"{name}: no such file; check the path") from None
    except OSError as error:
        raise SpecError(f"{name}: cannot be read: {error.strerror or error}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in data[:8192] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise SpecError(f"{name}: is a binary file; give a YAML text file") from None
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecError(f"{name}:{line}: is not UTF-8 text; save the file as UTF-8") from None
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> Section:
    """Read YAML text; ``name`` stands for the file in messages.

    Raises
    ------
    SpecError
        If the text is not strict YAML with keys and values at the top.

    Examples
    --------
    >>> parse_yaml("rate: 1e-6", "a.yaml").number("rate")
    1e-06
    >>> parse_yaml("answer: yes", "a.yaml").boolean("answer")
    Traceback (most recent call last):
        ...
    meshwright.errors.SpecError: a.yaml:1: answer: expected true or false, got 'yes'
    """
    root = compose(text, name)
    if not isinstance(root, MappingNode):
        raise SpecError(f"{name}:{root.line}: expected 'key: value' lines at the top, got {described(root)}")
    return Section(name, "", root)
