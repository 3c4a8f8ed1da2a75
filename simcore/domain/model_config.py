"""Read a Hugging Face ``config.json`` strictly: every refusal says what, where and how to fix it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from meshwright.errors import SpecError

__all__ = ["ModelConfig", "read_json_object"]

_MAX_FILE_BYTES = 5_000_000  # configurations are a few kB; weights given by mistake are not
_MAX_INTEGER = 2**40  # beyond any dimension; keeps products of two inside 64 bits times a few
_HINT = "give the config.json of a Hugging Face model"


class ModelConfig:
    """Typed access to the keys of a ``config.json``; null counts as absent.

    Parameters
    ----------
    values : Mapping[str, object]
        The JSON object.
    where : str
        How errors call it: a path or a model's name.
    """

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self._values = values
        self.where = where

    @property
    def is_empty(self) -> bool:
        """Whether there is no key at all."""
        return not self._values

    def has(self, key: str) -> bool:
        """Return whether the key is present, even as null."""
        return key in self._values

    def integer(self, *keys: str, default: int | None = None, minimum: int = 1) -> int:
        """Return the first present of ``keys`` (spellings of one thing); required without a default."""
        value = self.optional_integer(*keys, minimum=minimum)
        if value is not None:
            return value
        if default is None:
            others = "".join(f" (or '{key}')" for key in keys[1:])
            raise SpecError(f"{self.where}: required key '{keys[0]}'{others} is missing; {_HINT}")
        return default

    def optional_integer(self, *keys: str, minimum: int = 1) -> int | None:
        """Return the first present of ``keys``, or None."""
        for key in keys:
            value = self._values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= _MAX_INTEGER:
                raise self.error(
                    key, f"must be an integer from {minimum} to {_MAX_INTEGER}, not {_shown(value)}"
                )
            return value
        return None

    def boolean(self, key: str, *, default: bool) -> bool:
        """Return a true-or-false key, or its default."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {_shown(value)}")
        return value

    def text(self, key: str, *, default: str) -> str:
        """Return a text key, or its default."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, f"must be text, not {_shown(value)}")
        return value

    def items(self, key: str) -> list[object]:
        """Return a list key; empty when absent."""
        value = self._values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(key, f"must be a list, not {_shown(value)}")
        return value

    def section(self, key: str) -> ModelConfig:
        """Return a nested object; empty when absent."""
        value = self._values.get(key)
        if value is None:
            return ModelConfig({}, f"{self.where}: {key}")
        if not isinstance(value, Mapping):
            raise self.error(key, f"must be an object, not {_shown(value)}")
        return ModelConfig(value, f"{self.where}: {key}")

    def with_default(self, key: str, source: ModelConfig) -> ModelConfig:
        """Return this configuration with ``key`` taken from ``source`` where only that one states it."""
        if key in self._values or key not in source._values:
            return self
        return ModelConfig({**self._values, key: source._values[key]}, self.where)

    def error(self, key: str, message: str) -> SpecError:
        """Return the error for a key: ``where: key message``."""
        return SpecError(f"{self.where}: {key} {message}")


def read_json_object(path: Path) -> dict[str, object]:
    """Return the JSON object of a file.

    Raises
    ------
    SpecError
        If the file is missing, not a regular file, empty, larger than 5 MB, not UTF-8 text, not one JSON
        object, states a key twice or holds a number that is not finite.
    """
    text = _read_text(path)
    try:
        document = json.loads(
            text, object_pairs_hook=_reject_duplicates, parse_constant=_reject_constant, parse_float=_finite
        )
    except json.JSONDecodeError as error:
        raise SpecError(
            f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}; {_HINT}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path}: not usable JSON: {error}; {_HINT}") from None
    if not isinstance(document, dict):
        raise SpecError(f"{path}: holds {_kind(document)}, not an object; {_HINT}")
    return document


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise SpecError(f"{path}: is not a regular file; {_HINT}")
        num_bytes = path.stat().st_size
        if num_bytes > _MAX_FILE_BYTES:
            raise SpecError(
                f"{path}: has {num_bytes} bytes, more than the {_MAX_FILE_BYTES} allowed; {_HINT}"
            )
        content = path.read_bytes()
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}; {_HINT}") from None
    if not content.strip():
        raise SpecError(f"{path}: is empty; {_HINT}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise SpecError(f"{path}: is binary, not UTF-8 text; {_HINT}")
    return text


def _reject_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key '{key}' appears twice in one object; keep one")
        values[key] = value
    return values


def _reject_constant(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _reject_constant(text)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(document: object) -> str:
    if document is None:
        return "null"
    return {list: "a list", str: "text", bool: "true or false"}.get(type(document), "a number")
