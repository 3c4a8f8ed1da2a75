"""JSON objects of single lines, read strictly: unknown, missing and repeated keys and odd numbers are errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from meshwright.errors import SpecError, did_you_mean

__all__ = ["JsonRow", "parse_object"]


def parse_object(line: bytes, where: str) -> JsonRow:
    """Return the JSON object a line holds.

    Raises
    ------
    SpecError
        If it is not JSON, no object, repeats a key, or holds NaN or an infinity.
    """

    def refuse(constant: str) -> float:
        raise SpecError(f"{where}: {constant} is not a finite number")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            raise SpecError(f"{where}: a key is given twice; keep one")
        return mapping

    try:
        parsed = json.loads(line.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except SpecError:
        raise
    except (ValueError, RecursionError):
        raise SpecError(f"{where}: not a line of a measurement file (malformed JSON)") from None
    if not isinstance(parsed, dict):
        raise SpecError(f"{where}: expected an object {{...}}")
    return JsonRow(parsed, where)


class JsonRow:
    """One object of a line: hands out its values by name and says which are missing or left over.

    Parameters
    ----------
    cells : Mapping[str, object]
        The object.
    where : str
        ``file:line``, for messages.
    """

    def __init__(self, cells: Mapping[str, object], where: str) -> None:
        self.where = where
        self._cells = dict(cells)
        self._read: set[str] = set()

    def error(self, text: str) -> SpecError:
        """Return the error that says where."""
        return SpecError(f"{self.where}: {text}")

    def close(self) -> None:
        """Reject keys that nobody asked for."""
        for name in self._cells.keys() - self._read:
            raise self.error(f"unknown key '{name[:60]}'{did_you_mean(name, self._read)}")

    def names(self) -> tuple[str, ...]:
        """Return the keys."""
        return tuple(self._cells)

    def shape_value(self, name: str) -> float | str:
        """Return a text or a finite number."""
        return self.text(name) if isinstance(self._cells.get(name), str) else self.number(name)

    def mapping(self, name: str) -> Mapping[str, object]:
        """Return an object."""
        value = self._value(name)
        if not isinstance(value, dict):
            raise self.error(f"{name}: expected an object {{...}}")
        return value

    def items(self, name: str) -> list[object]:
        """Return a list."""
        value = self._value(name)
        if not isinstance(value, list):
            raise self.error(f"{name}: expected a list [...]")
        return value

    def text(self, name: str) -> str:
        """Return a text."""
        value = self._value(name)
        if not isinstance(value, str):
            raise self.error(f"{name}: expected a text, not {json.dumps(value)[:60]}")
        return value

    def optional_text(self, name: str) -> str | None:
        """Return a text, None for ``null``."""
        return None if self._value(name) is None else self.text(name)

    def choice(self, name: str, allowed: Sequence[str]) -> str:
        """Return one of some texts."""
        value = self.text(name)
        if value not in allowed:
            raise self.error(
                f"{name}: '{value[:60]}' is not one of {', '.join(allowed)}{did_you_mean(value, allowed)}"
            )
        return value

    def number(self, name: str) -> float:
        """Return a finite number."""
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{name}: expected a number, not {json.dumps(value)[:60]}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.error(f"{name} is not a finite number")
        return number

    def positive(self, name: str) -> float:
        """Return a finite number above zero."""
        number = self.number(name)
        if number <= 0.0:
            raise self.error(f"{name} must be above zero, not {number:g}")
        return number

    def optional_number(self, name: str) -> float | None:
        """Return a finite number, None for ``null``."""
        return None if self._value(name) is None else self.number(name)

    def _value(self, name: str) -> object:
        if name not in self._cells:
            raise self.error(f"key '{name}' is missing")
        self._read.add(name)
        return self._cells[name]
