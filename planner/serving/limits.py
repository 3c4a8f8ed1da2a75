"""What a user restricts the search for a serving plan to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.yaml_document import Section
from meshwright.simcore.domain.workload import PRECISIONS

__all__ = ["LIMIT_KEYS", "MODES", "AllowedValue", "ServingLimits", "limits_of_section"]

AllowedValue = int | str | bool
MODES: tuple[str, ...] = ("aggregated", "disaggregated")
_WORDS: Mapping[str, tuple[str, ...]] = {
    "kv_precision": PRECISIONS,
    "mode": MODES,
    "precision": PRECISIONS,
}
_BOOLEANS = ("has_prefix_cache",)
_NUMBERS = (
    "attention_dp",
    "ep",
    "max_num_batched_tokens",
    "max_num_sequences",
    "moe_tp",
    "num_speculative_tokens",
    "pp",
    "redundant_experts",
    "tp",
)
LIMIT_KEYS: tuple[str, ...] = (*_NUMBERS, *_WORDS, *_BOOLEANS)
# Speculation off and no copies are 0; every other number counts something from 1.
_SMALLEST = {"num_speculative_tokens": 0, "redundant_experts": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingLimits:
    """Restrictions of a search.

    Parameters
    ----------
    allowed : Mapping[str, tuple[AllowedValue, ...]]
        Values of a field of the plan that may be tried, by key of :data:`LIMIT_KEYS`; absent keys are free.
    max_gpus : int | None
        Most GPUs in use; None is the whole cluster.
    target : str | None
        Export target that must be able to express the plan; None is none.
    """

    allowed: Mapping[str, tuple[AllowedValue, ...]] = field(default_factory=dict)
    max_gpus: int | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        for key in self.allowed:
            if key not in LIMIT_KEYS:
                raise SpecError(
                    f"constraints.{key}: unknown key{did_you_mean(key, LIMIT_KEYS) or ';'} known: "
                    f"{', '.join(sorted(LIMIT_KEYS))}"
                )
        if self.max_gpus is not None and self.max_gpus < 1:
            raise SpecError(f"constraints.max_gpus must be at least 1, not {self.max_gpus}")

    def values(self, key: str, default: tuple[AllowedValue, ...]) -> tuple[AllowedValue, ...]:
        """Return what is to be tried of a field: the user's values, or else ``default``."""
        return self.allowed.get(key, default)

    def numbers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Return whole numbers to be tried of a field."""
        return tuple(int(value) for value in self.values(key, default))

    def words(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        """Return words to be tried of a field."""
        return tuple(str(value) for value in self.values(key, default))


def limits_of_section(section: Section | None) -> ServingLimits:
    """Return the restrictions of a ``constraints:`` section; none without a section.

    Raises
    ------
    SpecError
        If a key or word is unknown or a number too small: file, line and key.
    """
    if section is None:
        return ServingLimits()
    allowed: dict[str, tuple[AllowedValue, ...]] = {}
    for key in LIMIT_KEYS:
        if section.has(key):
            allowed[key] = _allowed(section, key)
    max_gpus = section.optional_integer("max_gpus", minimum=1)
    target = section.optional_text("target")
    section.close()
    return ServingLimits(allowed=allowed, max_gpus=max_gpus, target=target)


def _allowed(section: Section, key: str) -> tuple[AllowedValue, ...]:
    if key in _BOOLEANS:
        return (section.boolean(key),)
    if key in _WORDS:
        words = section.texts(key) if section.is_list(key) else (section.text(key),)
        if not words:
            raise section.error(key, "list at least one value, or leave the key out")
        for word in words:
            if word not in _WORDS[key]:
                known = _WORDS[key]
                raise section.error(
                    key, f"unknown value '{word}'{did_you_mean(word, known) or ';'} known: {', '.join(known)}"
                )
        return tuple(dict.fromkeys(words))
    smallest = _SMALLEST.get(key, 1)
    numbers = section.integers(key) if section.is_list(key) else (section.integer(key),)
    if not numbers or min(numbers) < smallest:
        raise section.error(key, f"list whole numbers of at least {smallest}")
    return tuple(sorted(set(numbers)))
