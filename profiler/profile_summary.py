"""What a profile says of itself, while it runs and when it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ProfileSummary", "Progress"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a profile is.

    Parameters
    ----------
    done, total : int
        Measurements of this run.
    elapsed, seconds_left : float
        Since it began, and about to its end [s].
    label : str
        What was measured last.
    """

    done: int
    total: int
    elapsed: float
    seconds_left: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSummary:
    """What a run of a profile did.

    Parameters
    ----------
    path : Path
        The file.
    num_cases : int
        Different cases of all suites together, those of earlier runs included.
    counts : Mapping[str, int]
        Records of this run by status.
    missing : Mapping[str, int]
        Cases still without a result, by suite.
    unfinished_suites : tuple[str, ...]
        Suites with processes of their own that have not run to their end.
    drift : Mapping[str, float]
        Largest change of each sentinel against its first time in this run, as a share.
    max_drift : float
        From where on a change is flagged.
    throttle_reasons : tuple[str, ...]
        Why the device lowered its clocks during the run, as far as it tells.
    seconds : float
        The run took [s].
    """

    path: Path
    num_cases: int
    counts: Mapping[str, int]
    missing: Mapping[str, int]
    unfinished_suites: tuple[str, ...]
    drift: Mapping[str, float]
    max_drift: float
    throttle_reasons: tuple[str, ...]
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether every case has a result."""
        return not self.missing and not self.unfinished_suites

    @property
    def drifting(self) -> tuple[str, ...]:
        """Names of the sentinels that changed more than they should."""
        return tuple(name for name, share in self.drift.items() if share > self.max_drift)
