"""The highest load that keeps every limit, by simulation and bisection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshwright.simcore.domain.serving import Slo

__all__ = ["LoadBracket", "LoadPoint", "highest_load", "refine", "violated"]

# A load this share of the bound is as good as none: what fails there fails for a request alone.
_SMALLEST_SHARE = 1.0 / 64.0
# Where even the bound on clients keeps every limit, more are tried, this much apart and so often.
_GROWTH = 1.15
_MAX_GROWTHS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPoint:
    """One simulated load.

    Parameters
    ----------
    load : float
        Requests per second offered, or clients of a closed loop.
    rate : float
        Requests finished per second [1/s].
    metrics : Mapping[str, float]
        By name of a limit (``ttft_p99``): what it came out as [s].
    figures : Mapping[str, float]
        What else the simulation reports, units in the names.
    is_stable : bool
        Whether what comes in goes out: no queue that grows to the end.
    """

    load: float
    rate: float
    metrics: Mapping[str, float]
    figures: Mapping[str, float]
    is_stable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBracket:
    """What a search for the highest load knows.

    Parameters
    ----------
    best : LoadPoint | None
        Highest load that was seen to keep every limit; None for none.
    failing : LoadPoint | None
        Lowest load that was seen to break one; None where none did.
    num_runs : int
        Simulations.
    is_beaten : bool
        The search was given up because the load to beat was missed.
    """

    best: LoadPoint | None
    failing: LoadPoint | None
    num_runs: int
    is_beaten: bool = False

    @property
    def spread(self) -> float:
        """Share of the highest load that is still unknown."""
        if self.best is None or self.failing is None:
            return 0.0
        return max(0.0, 1.0 - self.best.load / self.failing.load)


def violated(point: LoadPoint, slo: Slo) -> tuple[str, ...]:
    """Return the limits a load breaks, worst first; ``load`` where more comes in than goes out."""
    excess = {
        limit.name: point.metrics[limit.name] / limit.seconds
        for limit in slo.limits
        if not point.metrics[limit.name] <= limit.seconds
    }
    names = tuple(sorted(excess, key=lambda name: -excess[name]))
    return names if names or point.is_stable else ("load",)


def highest_load(
    run: Callable[[float], LoadPoint],
    slo: Slo,
    *,
    upper: float,
    to_beat: float = 0.0,
    tolerance: float = 0.04,
    is_whole: bool = False,
) -> LoadBracket:
    """Return a bracket of the highest load that keeps every limit.

    Parameters
    ----------
    run : Callable[[float], LoadPoint]
        Simulates one load.
    slo : Slo
        The limits.
    upper : float
        A bound of the load; clients are tried beyond it where it holds.
    to_beat : float
        A load that must be kept for the candidate to matter; the search ends where it is not. 0 for any.
    tolerance : float
        Share of the load that may stay unknown.
    is_whole : bool
        Loads are whole numbers (clients).

    Notes
    -----
    Latencies are taken to grow with the load; with one seed of requests for all loads they nearly do.
    """
    num_runs = 0
    best: LoadPoint | None = None

    def tried(load: float) -> LoadPoint:
        nonlocal num_runs
        num_runs += 1
        return run(max(1.0, round(load)) if is_whole else load)

    if 0.0 < to_beat < upper:
        point = tried(to_beat)
        if violated(point, slo):
            return LoadBracket(best=None, failing=point, num_runs=num_runs, is_beaten=True)
        best = point
    failing: LoadPoint | None = tried(upper)
    if failing is not None and not violated(failing, slo):
        best, failing = failing, None
        # Requests per second above the bound cannot last, whatever a short run shows; clients also wait.
        for _ in range(_MAX_GROWTHS if is_whole else 0):
            point = tried(best.load * _GROWTH + 1.0)
            if violated(point, slo):
                failing = point
                break
            best = point
    if best is None:
        load = upper
        while best is None and load > upper * _SMALLEST_SHARE and not (is_whole and load <= 1.0):
            load /= 2.0
            point = tried(load)
            if violated(point, slo):
                failing = point
            else:
                best = point
    bracket = LoadBracket(best=best, failing=failing, num_runs=num_runs)
    return refine(run, slo, bracket, tolerance=tolerance, is_whole=is_whole)


def refine(
    run: Callable[[float], LoadPoint],
    slo: Slo,
    bracket: LoadBracket,
    *,
    tolerance: float,
    is_whole: bool = False,
) -> LoadBracket:
    """Return the bracket halved until its spread is within ``tolerance``; arguments as in :func:`highest_load`."""
    best, failing, num_runs = bracket.best, bracket.failing, bracket.num_runs
    while best is not None and failing is not None and 1.0 - best.load / failing.load > tolerance:
        middle = (best.load + failing.load) / 2.0
        if is_whole:
            middle = float(int(middle))
            if middle <= best.load:
                break
        point = run(middle)
        num_runs += 1
        if violated(point, slo):
            failing = point
        else:
            best = point
    return LoadBracket(best=best, failing=failing, num_runs=num_runs, is_beaten=bracket.is_beaten)
