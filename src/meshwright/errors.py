"""The errors Meshwright raises on purpose; any other traceback is a bug.

::

    MeshwrightError                 exit code 1 (never raised itself)
    +-- SpecError (ValueError)      2  bad input: unknown name, malformed file, impossible degrees
    +-- InfeasiblePlanError         3  no plan fits; carries the rejections per constraint
    +-- CalibrationError            4  data or a device that is needed is missing
    +-- ExportError                 2  files could not be produced
    |   +-- UnsupportedByTargetError   the target cannot express the plan
    +-- ExecutionError              5  a run failed

Only ``cli`` catches them, prints one block on stderr and exits with ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

__all__ = [
    "CalibrationError",
    "ExecutionError",
    "ExportError",
    "InfeasiblePlanError",
    "MeshwrightError",
    "SpecError",
    "UnsupportedByTargetError",
    "did_you_mean",
]


class MeshwrightError(Exception):
    """Base of every expected failure; the message says what, where and how to fix it."""

    exit_code: int = 1


class SpecError(MeshwrightError, ValueError):
    """Bad input: an unknown name or key, a malformed file, a value that cannot be."""

    exit_code = 2


class InfeasiblePlanError(MeshwrightError):
    """No plan of the space satisfies every constraint.

    Parameters
    ----------
    message : str
        One block: what was asked, what stood in the way, the nearest relaxation.
    rejections : Mapping[str, int]
        Rejected plans per constraint name.
    """

    exit_code = 3

    def __init__(self, message: str, rejections: Mapping[str, int]) -> None:
        super().__init__(message)
        self.rejections = dict(rejections)


class CalibrationError(MeshwrightError):
    """A measurement, calibration or device that is needed is missing or unusable."""

    exit_code = 4


class ExportError(MeshwrightError):
    """The files of an export could not be produced."""

    exit_code = 2


class UnsupportedByTargetError(ExportError):
    """The target framework cannot express the plan; the message lists every reason."""


class ExecutionError(MeshwrightError):
    """A launched run failed."""

    exit_code = 5


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or ``""`` when none is near.

    Examples
    --------
    >>> did_you_mean("h10O", ["a100", "h100"])
    "; did you mean 'h100'?"
    >>> did_you_mean("zzz", ["a100"])
    ''
    """
    candidates = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), list(candidates), n=1, cutoff=0.6)
    return f"; did you mean '{candidates[matches[0]]}'?" if matches else ""
