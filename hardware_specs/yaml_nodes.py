"""Turn YAML text into nodes that know their line, refusing what a spec file never needs.

The tree is built from libyaml's event stream in a loop, so that no file can exhaust the stack, and
scalars keep their text: what ``1e3`` or ``yes`` means is decided by the reader that asks for a type.
Refused on sight: anchors and aliases (sharing, cycles, "billion laughs"), merge keys, tags, several
documents, duplicate keys, keys that are not text, infinities and NaN, and files beyond the limits below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

import yaml

from meshwright.errors import SpecError

__all__ = [
    "MAX_BYTES",
    "MAX_DEPTH",
    "MAX_NODES",
    "MappingNode",
    "Node",
    "NumbersNode",
    "ScalarNode",
    "SequenceNode",
    "compose",
    "shown",
]

MAX_BYTES: Final = 5_000_000
MAX_DEPTH: Final = 32
MAX_NODES: Final = 200_000
_MAX_KEY_LENGTH: Final = 200

_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt \t]+[0-9:.]+.*)?")
_BOOLEANS: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(slots=True)
class ScalarNode:
    """Text of the file; ``is_plain`` when it stood without quotes."""

    line: int
    text: str
    is_plain: bool

    def value(self) -> str | int | float | bool | None:
        """Return what the text means in YAML 1.2: dates, ``yes`` and ``1:30`` are text.

        An integer of more than 18 digits becomes a float.
        """
        text = self.text
        if not self.is_plain:
            return text
        if text in _NULLS:
            return None
        if text in _BOOLEANS:
            return _BOOLEANS[text]
        if _INTEGER.fullmatch(text) and len(text) <= 18:
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
        return text

    @property
    def is_date(self) -> bool:
        """Whether a YAML 1.1 reader would take this for a date."""
        return self.is_plain and _DATE.fullmatch(self.text) is not None


@dataclass(slots=True)
class SequenceNode:
    """A list."""

    line: int
    items: list[Node] = field(default_factory=list)


@dataclass(slots=True)
class MappingNode:
    """Keys with their lines and values, in the order of the file."""

    line: int
    entries: dict[str, Node] = field(default_factory=dict)
    key_lines: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class NumbersNode:
    """A list of numbers of a JSON file, kept as they are."""

    line: int
    values: tuple[float, ...]


Node = ScalarNode | SequenceNode | NumbersNode | MappingNode


def shown(text: str) -> str:
    """Return a value as a message shows it: quoted, on one line, shortened.

    Examples
    --------
    >>> shown("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...'"
    """
    return repr(text if len(text) <= 60 else text[:40] + "...")


def compose(text: str, name: str) -> Node:
    """Return the tree of the one document in ``text``.

    Parameters
    ----------
    text : str
        The YAML.
    name : str
        File name for messages.

    Raises
    ------
    SpecError
        ``FILE:LINE: what is wrong; how to fix it``.
    """
    if len(text) > MAX_BYTES:
        raise SpecError(f"{name}: larger than {MAX_BYTES // 1_000_000} MB; a spec file is a few kB")
    bad = _FORBIDDEN.search(text)
    if bad is not None:
        line = text.count("\n", 0, bad.start()) + 1
        raise SpecError(
            f"{name}:{line}: holds the control character {bad.group()!r}; this is not a YAML text file"
        )
    try:
        loader = _LOADER(text)
        try:
            root = _Composer(name).compose(loader)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise SpecError(_syntax_message(error, name)) from None
    if root is None or (isinstance(root, ScalarNode) and root.value() is None):
        raise SpecError(f"{name}: is empty; write at least one 'key: value' line")
    return root


@dataclass(slots=True)
class _Composer:
    """One pass over the events; ``open_nodes`` is the path from the root, ``keys`` their pending keys."""

    name: str
    root: Node | None = None
    open_nodes: list[MappingNode | SequenceNode] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    num_nodes: int = 0

    def compose(self, loader: yaml.SafeLoader) -> Node | None:
        num_documents = 0
        while loader.check_event():
            event = loader.get_event()  # type: ignore[no-untyped-call]  # the stubs leave it bare
            line = event.start_mark.line + 1
            if isinstance(event, yaml.ScalarEvent):
                self._refuse_extras(event, line)
                self._scalar(event, line)
            elif isinstance(event, yaml.MappingStartEvent):
                self._refuse_extras(event, line)
                self._open(MappingNode(line))
            elif isinstance(event, yaml.SequenceStartEvent):
                self._refuse_extras(event, line)
                self._open(SequenceNode(line))
            elif isinstance(event, yaml.CollectionEndEvent):
                self._close_node()
            elif isinstance(event, yaml.AliasEvent):
                raise self._error(line, f"alias '*{event.anchor}' is not supported; write the value out")
            elif isinstance(event, yaml.DocumentStartEvent):
                num_documents += 1
                if num_documents > 1:
                    raise self._error(line, "a second document starts ('---'); keep one document per file")
        return self.root

    def _error(self, line: int, message: str) -> SpecError:
        return SpecError(f"{self.name}:{line}: {message}")

    def _refuse_extras(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent, line: int) -> None:
        if event.anchor is not None:
            raise self._error(
                line, f"anchor '&{event.anchor}' is not supported; write the value out where it is used"
            )
        if event.tag is not None:
            raise self._error(line, f"tag {shown(str(event.tag))} is not supported; write a plain value")

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> None:
        node = ScalarNode(line, event.value, not event.style)
        parent = self.open_nodes[-1] if self.open_nodes else None
        if isinstance(parent, MappingNode) and self.keys[-1] is None:
            self._check_key(node, parent)
            self.keys[-1] = node.text
            parent.key_lines[node.text] = line
            return
        if node.is_plain and _NOT_FINITE.fullmatch(node.text):
            raise self._error(line, f"{self._prefix()}{node.text} is not a finite number")
        if not node.text.isprintable():
            bad = _FORBIDDEN.search(node.text)
            if bad is not None:
                raise self._error(line, f"{self._prefix()}holds the control character {bad.group()!r}")
        self._attach(node)

    def _check_key(self, node: ScalarNode, parent: MappingNode) -> None:
        key = node.text
        if node.is_plain and key == "<<":
            raise self._error(node.line, "merge key '<<' is not supported; write the keys out")
        if not isinstance(node.value(), str) or node.is_date:
            raise self._error(node.line, f'key {shown(key)} is not text; write it in quotes: "{key[:40]}":')
        if not key.strip() or len(key) > _MAX_KEY_LENGTH or not key.isprintable():
            raise self._error(node.line, f"key {shown(key)} is not a name; write a short word before the ':'")
        if key in parent.entries:
            first = parent.key_lines[key]
            where = f"{self._where()}.{key}".removeprefix(".")
            raise self._error(node.line, f"{where}: given twice (first on line {first}); keep one")

    def _open(self, node: MappingNode | SequenceNode) -> None:
        if self.open_nodes and isinstance(self.open_nodes[-1], MappingNode) and self.keys[-1] is None:
            raise self._error(node.line, "a key is itself a list or mapping; keys must be text")
        self._attach(node)
        if len(self.open_nodes) >= MAX_DEPTH:
            raise self._error(node.line, f"nested deeper than {MAX_DEPTH} levels; flatten the file")
        self.open_nodes.append(node)
        self.keys.append(None)

    def _attach(self, node: Node) -> None:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise self._error(node.line, f"more than {MAX_NODES} values; a spec file is far smaller")
        if not self.open_nodes:
            self.root = node
            return
        parent = self.open_nodes[-1]
        if isinstance(parent, SequenceNode):
            parent.items.append(node)
            return
        key = self.keys[-1]
        if key is not None:
            parent.entries[key] = node
            if isinstance(node, ScalarNode):
                self.keys[-1] = None

    def _close_node(self) -> None:
        self.open_nodes.pop()
        self.keys.pop()
        if self.keys:
            self.keys[-1] = None

    def _prefix(self) -> str:
        where = self._where()
        return f"{where}: " if where else ""

    def _where(self) -> str:
        path = ""
        for index, (node, key) in enumerate(zip(self.open_nodes, self.keys, strict=True)):
            if isinstance(node, SequenceNode):
                is_innermost = index == len(self.open_nodes) - 1
                path += f"[{len(node.items) - (0 if is_innermost else 1)}]"
            elif key is not None:
                path += f".{key}" if path else key
        return path


def _syntax_message(error: yaml.YAMLError, name: str) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{name}: not valid YAML: {' '.join(str(error).split())[:160]}"
    mark = error.problem_mark or error.context_mark
    line = f":{mark.line + 1}" if mark is not None else ""
    problem = " ".join((error.problem or error.context or "cannot be read").split())[:160]
    if "mapping values are not allowed" in problem or "did not find expected key" in problem:
        problem += "; check the indentation, and quote text that holds ': '"
    elif "cannot start any token" in problem:
        problem += "; indent with spaces, and quote text that starts with a special character"
    elif "did not find expected ',' or" in problem:
        problem += "; close the bracket and put a comma between values"
    elif "while scanning a quoted scalar" in (error.context or ""):
        problem += "; close the quote"
    return f"{name}{line}: not valid YAML: {problem}"
