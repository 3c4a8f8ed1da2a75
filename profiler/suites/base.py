"""What every suite of microbenchmarks yields: cases, each one operator in one shape, prepared when its turn comes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from meshwright.errors import SpecError, did_you_mean
from meshwright.profiler.device import Device
from meshwright.profiler.settings import ProfileSettings

__all__ = ["Case", "Prepare", "Suite", "constant", "load_suite"]

Prepare = Callable[[], Callable[[], object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to measure.

    Parameters
    ----------
    suite : str
        Name in :data:`meshwright.profiler.suites.SUITES`.
    operator : str
        An operator of the cost models, a collective, ``layer`` for the self-check, or ``constant``.
    precision : str
        Number format; empty for constants.
    shape : Mapping[str, float | str]
        The operator's fields; ``constant`` and ``layer`` have their name under ``name``.
    prepare : Prepare
        Allocates the operands and returns the function to time. May raise what torch raises: no memory, no such
        data type.
    value : Callable[[], float] | None
        For constants: measures and returns the number itself, in SI units; ``prepare`` is not called.
    is_capturable : bool
        Whether a CUDA graph can hold the function.
    expected_seconds : float
        About how long it takes, for what has to fit before the time limit [s].
    """

    suite: str
    operator: str
    precision: str
    shape: Mapping[str, float | str]
    prepare: Prepare
    value: Callable[[], float] | None = None
    is_capturable: bool = True
    expected_seconds: float = 0.0

    @property
    def label(self) -> str:
        """Short text for a progress line."""
        name = self.shape.get("name", self.operator)
        return f"{name}.{self.precision}" if self.precision else str(name)


class Suite(Protocol):
    """One file of this folder."""

    name: str

    def cases(self, device: Device, settings: ProfileSettings) -> Iterable[Case]:
        """Return what to measure on this device; cheap, nothing is allocated."""
        ...


def constant(suite: str, name: str, value: Callable[[], float], expected_seconds: float) -> Case:
    """Return the case of one number that a suite measures its own way."""

    def prepare() -> Callable[[], object]:
        raise AssertionError(f"{name} is a value, there is no function to time")

    return Case(
        suite=suite,
        operator="constant",
        precision="",
        shape={"name": name},
        prepare=prepare,
        value=value,
        expected_seconds=expected_seconds,
    )


def load_suite(name: str) -> Suite:
    """Return a suite by name, importing its module, and torch with it, only now.

    Raises
    ------
    SpecError
        If there is none; names the nearest.
    """
    from meshwright.profiler.suites import SUITES

    if name not in SUITES:
        raise SpecError(
            f"unknown suite '{name}'{did_you_mean(name, SUITES) or ';'} there are {', '.join(SUITES)}"
        )
    suite: Suite = importlib.import_module(SUITES[name]).SUITE
    return suite
