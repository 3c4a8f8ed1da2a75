"""What every search takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.flops import FlopsConvention
from meshwright.costmodels.prediction import Prediction
from meshwright.errors import SpecError
from meshwright.planner.objectives import Objective
from meshwright.planner.space import SearchLimits
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["Progress", "RankedPlan", "Search", "SearchCut", "SearchRequest", "SearchResult"]

# Called with what is being done, how far it is and how far it goes (0 when unknown).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """What to search: a job, restrictions, and how many plans to return.

    Parameters
    ----------
    job : TrainingJob
        The job.
    context : CostContext
        What it costs.
    limits : SearchLimits
        The user's restrictions.
    objective : Objective
        What is best.
    num_plans : int
        Plans to rank.
    flops : FlopsConvention
        How MFU counts attention.
    max_seconds : float | None
        Stop after about this long with the best so far; None searches everything [s].
    resume : Path | None
        File that the state of the search is kept in, and taken from where it exists.
    wants_front : bool
        Also return the simulated plans that none beats in time, money and memory at once.

    Raises
    ------
    SpecError
        If there is no time at all.
    """

    job: TrainingJob
    context: CostContext
    limits: SearchLimits
    objective: Objective = "throughput"
    num_plans: int = 10
    flops: FlopsConvention = "causal"
    max_seconds: float | None = None
    resume: Path | None = None
    wants_front: bool = False

    def __post_init__(self) -> None:
        if self.max_seconds is not None and not self.max_seconds > 0.0:
            raise SpecError(
                f"the seconds of a search must be above 0, not {self.max_seconds:g}; leave them out to search all"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankedPlan:
    """A plan that was found.

    Parameters
    ----------
    plan : ParallelPlan
        The plan.
    prediction : Prediction
        Of the plan, without contention.
    bound : float
        The closed-form bound that brought it here [s].
    contended_time : float | None
        Iteration time once its communications share the links of the fabric; None where that was not simulated [s].
    """

    plan: ParallelPlan
    prediction: Prediction
    bound: float
    contended_time: float | None = None

    @property
    def seconds(self) -> float:
        """Iteration time by which the plan is ranked: with contention where it was simulated [s]."""
        return self.prediction.iteration_time if self.contended_time is None else self.contended_time


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchCut:
    """What a search left undone when its time was up.

    Parameters
    ----------
    num_unscored : int
        Plans of the space that were not even counted.
    gap : float
        How much better than the winner a plan may be that was not simulated, as a share of the winner's time.
    """

    num_unscored: int
    gap: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchResult:
    """What a search found.

    Parameters
    ----------
    ranked : tuple[RankedPlan, ...]
        The best plans, best first.
    rival : RankedPlan | None
        The best simulated plan with other degrees than the winner's; None when there is none.
    num_candidates, num_feasible, num_simulated : int
        Plans of the space, those that satisfy every constraint, those whose schedule was simulated. With an
        export target its finer rules are asked of the plans that come up for simulation only.
    rejections : Mapping[str, int]
        Plans each constraint rejected.
    is_certified : bool
        True when every plan that was not simulated has a bound above the winner's simulated time: the winner
        is the optimum of the space under the model.
    notes : tuple[str, ...]
        What else the search has to say, one sentence each.
    cut : SearchCut | None
        What was left undone for want of time; None where everything was searched.
    front : tuple[RankedPlan, ...]
        Simulated plans that none beats in iteration time, dollars and memory at once, fastest first; empty where
        they were not asked for.
    least_left : float | None
        Least that the objective of a plan that was not simulated may be: seconds, or GPU-seconds for cost and energy;
        None where the search knows only whether it is above the winner's.
    """

    ranked: tuple[RankedPlan, ...]
    rival: RankedPlan | None
    num_candidates: int
    num_feasible: int
    num_simulated: int
    rejections: Mapping[str, int]
    is_certified: bool
    notes: tuple[str, ...] = ()
    cut: SearchCut | None = None
    front: tuple[RankedPlan, ...] = ()
    least_left: float | None = None


class Search(Protocol):
    """A search algorithm."""

    name: str

    def run(self, request: SearchRequest, progress: Progress) -> SearchResult:
        """Return the best plans.

        Raises
        ------
        InfeasiblePlanError
            If no plan satisfies every constraint.
        """
        ...
