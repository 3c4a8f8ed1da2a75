"""What a change of machines, workload or software does: to the plan at hand, and to the best plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.flops import FlopsConvention
from meshwright.errors import InfeasiblePlanError
from meshwright.planner.explanation import Explanation, explain_plan
from meshwright.planner.objectives import Objective
from meshwright.planner.relaxation import nearest_relaxations
from meshwright.planner.scenario import JobT, Scenario, scenario_context
from meshwright.planner.search import SEARCHES, SearchRequest
from meshwright.planner.search.base import Progress
from meshwright.planner.space import SearchLimits
from meshwright.planner.violations import Violation, find_violation
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = [
    "AnyOutcome",
    "Outcome",
    "OutcomeT",
    "Question",
    "Subject",
    "TrainingSubject",
    "answer",
    "best_plan",
    "figure_change",
    "given_plan",
]


class AnyOutcome(Protocol):
    """A plan of any kind under one scenario, or why there is none."""

    @property
    def plan(self) -> object | None:
        """The plan; None when it cannot run."""
        ...

    @property
    def figure(self) -> float | None:
        """What plans of the kind are compared by; None when it cannot run."""
        ...

    @property
    def violation(self) -> Violation | None:
        """The constraint in the way of the given plan."""
        ...

    @property
    def advice(self) -> str:
        """What would make some plan fit, when none does."""
        ...


OutcomeT = TypeVar("OutcomeT", bound=AnyOutcome)
OutcomeT_co = TypeVar("OutcomeT_co", bound=AnyOutcome, covariant=True)


class Subject(Protocol[JobT, OutcomeT_co]):
    """What is asked about: a given plan, and the search for a better one."""

    def given(self, scenario: Scenario[JobT]) -> OutcomeT_co:
        """Return what the given plan does in a scenario."""
        ...

    def best(self, scenario: Scenario[JobT]) -> OutcomeT_co:
        """Return the best plan of a scenario."""
        ...


def answer(scenario: Scenario[JobT], subject: Subject[JobT, OutcomeT]) -> tuple[OutcomeT, OutcomeT]:
    """Return what the given plan does in a scenario, and the best plan of it."""
    return subject.given(scenario), subject.best(scenario)


def figure_change(before: AnyOutcome, after: AnyOutcome) -> float | None:
    """Return the change of the figure as a share; None where either plan cannot run."""
    if before.figure is None or after.figure is None:
        return None
    return after.figure / before.figure - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """How training plans are searched and counted.

    Parameters
    ----------
    limits : SearchLimits
        Restrictions; of the given plan too.
    objective : Objective
        What "best" means.
    flops : FlopsConvention
        How MFU counts attention.
    tolerated : frozenset[str]
        Constraints that only steer the search and that the given plan violates already.
    """

    limits: SearchLimits
    objective: Objective = "throughput"
    flops: FlopsConvention = "causal"
    tolerated: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """A training plan under one context, or why there is none.

    Parameters
    ----------
    explanation : Explanation | None
        Prediction and terms; None when the plan cannot run.
    violation : Violation | None
        The constraint in the way of the given plan.
    advice : str
        What would make some plan fit, when none does.
    """

    explanation: Explanation | None = None
    violation: Violation | None = None
    advice: str = ""

    @property
    def plan(self) -> ParallelPlan | None:
        """The plan; None when it cannot run."""
        return None if self.explanation is None else self.explanation.plan

    @property
    def figure(self) -> float | None:
        """Time of an iteration [s]; None when it cannot run."""
        return None if self.explanation is None else self.explanation.prediction.iteration_time


def given_plan(context: CostContext, plan: ParallelPlan, question: Question) -> Outcome:
    """Return what a plan does under a context, or the constraint it violates."""
    violation = find_violation(context, plan, question.limits, question.tolerated)
    if violation is not None:
        return Outcome(violation=violation)
    return Outcome(explanation=explain_plan(context, plan, question.flops))


def best_plan(
    scenario: Scenario[TrainingJob], context: CostContext, question: Question, progress: Progress
) -> Outcome:
    """Return the best plan of a scenario, or what would make one fit."""
    request = SearchRequest(
        job=scenario.job,
        context=context,
        limits=question.limits,
        objective=question.objective,
        num_plans=1,
        flops=question.flops,
    )
    try:
        winner = SEARCHES["exhaustive"].run(request, progress).ranked[0]
    except InfeasiblePlanError:
        advice = "; ".join(nearest_relaxations(scenario.job, context, question.limits))
        return Outcome(advice=advice or "nothing tried helps")
    return Outcome(explanation=explain_plan(context, winner.plan, question.flops))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSubject:
    """A training plan, and how another is searched.

    Parameters
    ----------
    plan : ParallelPlan
        The given plan.
    question : Question
        How plans are searched and counted.
    progress : Progress
        Told of every search.
    """

    plan: ParallelPlan
    question: Question
    progress: Progress

    def given(self, scenario: Scenario[TrainingJob]) -> Outcome:
        """Return what the given plan does in a scenario."""
        return given_plan(scenario_context(scenario), self.plan, self.question)

    def best(self, scenario: Scenario[TrainingJob]) -> Outcome:
        """Return the best plan of a scenario."""
        return best_plan(scenario, scenario_context(scenario), self.question, self.progress)
