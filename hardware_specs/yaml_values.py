"""What the scalars of a YAML file mean when a number, a text or a quantity is asked for.

Each converter raises a `SpecError` that says what was expected and what stood there; the caller adds where.
"""

from __future__ import annotations

import math

from meshwright.errors import SpecError
from meshwright.hardware_specs.yaml_nodes import (
    MappingNode,
    Node,
    NumbersNode,
    ScalarNode,
    SequenceNode,
    shown,
)
from meshwright.units import Kind, parse_quantity

__all__ = ["as_boolean", "as_integer", "as_number", "as_quantity", "as_text", "as_word", "described", "shown"]


def described(node: Node) -> str:
    """Return what a node is, for a message."""
    if isinstance(node, MappingNode):
        return "keys and values"
    if isinstance(node, SequenceNode | NumbersNode):
        return "a list"
    value = node.value()
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"the boolean {node.text}"
    if isinstance(value, int | float):
        return f"the number {node.text[:40]}"
    return f"the text {shown(node.text)}"


def as_text(node: ScalarNode) -> str:
    """Return text; a bare number, boolean or date is refused."""
    if not isinstance(node.value(), str):
        raise SpecError(
            f'expected text, got {described(node)}; write "{node.text[:40]}" in quotes if it is text'
        )
    if node.is_date:
        raise SpecError(f'expected text, got the date {node.text[:40]}; write "{node.text[:40]}" in quotes')
    return node.text


def as_word(node: ScalarNode) -> str:
    """Return the characters as they stand."""
    return node.text


def as_boolean(node: ScalarNode) -> bool:
    """Return ``true`` or ``false``."""
    value = node.value()
    if not isinstance(value, bool):
        raise SpecError(f"expected true or false, got {shown(node.text)}")
    return value


def as_integer(node: ScalarNode) -> int:
    """Return a whole number."""
    value = node.value()
    if isinstance(value, bool) or not isinstance(value, int):
        hint = ""
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            hint = f"; write {int(value)}"
        raise SpecError(f"expected a whole number, got {described(node)}{hint or _unquote_hint(node)}")
    return value


def as_number(node: ScalarNode) -> float:
    """Return a finite number."""
    value = node.value()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SpecError(f"expected a number, got {described(node)}{_unquote_hint(node)}")
    if not math.isfinite(value):
        raise SpecError(f"expected a finite number, got {shown(node.text)}")
    return float(value)


def as_quantity(node: ScalarNode, kind: Kind) -> float:
    """Return the SI value of a quantity with its unit."""
    if len(node.text) > 80 or not node.text.isprintable():
        raise SpecError(f"{shown(node.text)} is not a quantity; write a number and a unit")
    return parse_quantity(node.text, kind)


def _unquote_hint(node: ScalarNode) -> str:
    bare = ScalarNode(node.line, node.text, is_plain=True)
    return "; remove the quotes" if not node.is_plain and not isinstance(bare.value(), str | None) else ""
