"""JSON files through the same strict reader as YAML ones; long lists of numbers stay numbers.

Calibrations are JSON because they hold thousands of fitted numbers, which a YAML reader takes seconds for.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Final

from meshwright.errors import SpecError
from meshwright.hardware_specs.yaml_document import Section, parse_yaml, read_yaml
from meshwright.hardware_specs.yaml_nodes import (
    MAX_DEPTH,
    MappingNode,
    Node,
    NumbersNode,
    ScalarNode,
    SequenceNode,
)

__all__ = ["parse_document", "parse_json", "read_document"]

MAX_JSON_BYTES: Final = 50_000_000
_NUMBERS = frozenset((int, float))


def read_document(path: Path) -> Section:
    """Read a JSON file (by its name, ``.json``) or a YAML file.

    Raises
    ------
    SpecError
        If the file cannot be read or is malformed: where, what and how to fix it.
    """
    if path.suffix.lower() != ".json":
        return read_yaml(path)
    name = str(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise SpecError(f"{name}: is larger than {MAX_JSON_BYTES // 1_000_000} MB")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SpecError(f"{name}: no such file; check the path") from None
    except IsADirectoryError:
        raise SpecError(f"{name}: is a directory; give a .json file") from None
    except UnicodeDecodeError:
        raise SpecError(f"{name}: is not UTF-8 text; give a JSON file") from None
    except OSError as error:
        raise SpecError(f"{name}: cannot be read: {error.strerror or error}") from None
    return parse_json(text, name)


def parse_document(text: str, name: str) -> Section:
    """Parse JSON where the name ends in ``.json``, else YAML."""
    return parse_json(text, name) if name.endswith(".json") else parse_yaml(text, name)


def parse_json(text: str, name: str) -> Section:
    """Read JSON text; ``name`` stands for the file in messages.

    Raises
    ------
    SpecError
        If the text is not JSON, is truncated, repeats a key, holds NaN, or is no object.

    Examples
    --------
    >>> parse_json('{"gemm": {"exponent": 2.5}}', "a.json").section("gemm").number("exponent")
    2.5
    """

    def refuse(constant: str) -> float:
        raise SpecError(f"{name}: {constant} is not a finite number")

    try:
        root = json.loads(text, object_pairs_hook=lambda pairs: _mapping(pairs, name), parse_constant=refuse)
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(text.rstrip()) or (text.lstrip()[:1] == "{" and text.rstrip()[-1:] != "}")
        hint = "the file ends too early; it is truncated" if is_cut else error.msg
        raise SpecError(f"{name}:{error.lineno}: not valid JSON: {hint}") from None
    except SpecError:
        raise
    except (OverflowError, ValueError):  # an integer of thousands of digits
        raise SpecError(f"{name}: holds a number that is not finite") from None
    except RecursionError:
        raise SpecError(f"{name}: nested deeper than {MAX_DEPTH} levels; flatten the file") from None
    if not isinstance(root, MappingNode):
        raise SpecError(f"{name}: expected an object {{...}} at the top")
    return Section(name, "", root)


def _mapping(pairs: list[tuple[str, object]], name: str) -> MappingNode:
    node = MappingNode(0)
    for key, value in pairs:
        if key in node.entries:
            raise SpecError(f"{name}: key '{key[:60]}' is given twice; keep one")
        node.entries[key] = _node(value, name)
        node.key_lines[key] = 0
    return node


def _node(value: object, name: str) -> Node:
    if isinstance(value, MappingNode):
        return value
    if isinstance(value, list):
        if value and set(map(type, value)) <= _NUMBERS:
            return NumbersNode(0, _finite(value, name))
        return SequenceNode(0, [_node(item, name) for item in value])
    if isinstance(value, str):
        return ScalarNode(0, value, is_plain=False)
    if isinstance(value, bool):
        return ScalarNode(0, "true" if value else "false", is_plain=True)
    if isinstance(value, float) and not math.isfinite(value):
        raise SpecError(f"{name}: {value} is not a finite number")
    return ScalarNode(0, "null" if value is None else repr(value), is_plain=True)


def _finite(values: list[float], name: str) -> tuple[float, ...]:
    if not all(map(math.isfinite, values)):
        raise SpecError(f"{name}: holds a number that is not finite")
    return tuple(values)
