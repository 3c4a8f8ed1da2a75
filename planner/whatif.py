"""What a change of machines, workload or software does: to the plan at hand, and to the best plan."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.flops import FlopsConvention
from meshwright.errors import InfeasiblePlanError
from meshwright.planner.explanation import Explanation, explain_plan
from meshwright.planner.objectives import Objective
from meshwright.planner.relaxation import nearest_relaxations
from meshwright.planner.scenario import Scenario, scenario_context
from meshwright.planner.search import SEARCHES, SearchRequest
from meshwright.planner.search.base import Progress
from meshwright.planner.space import SearchLimits
from meshwright.planner.violations import Violation, find_violation
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["Outcome", "Question", "answer", "best_plan", "given_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """How plans are searched and counted.

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
    """A plan under one context, or why there is none.

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


def given_plan(context: CostContext, plan: ParallelPlan, question: Question) -> Outcome:
    """Return what a plan does under a context, or the constraint it violates."""
    violation = find_violation(context, plan, question.limits, question.tolerated)
    if violation is not None:
        return Outcome(violation=violation)
    return Outcome(explanation=explain_plan(context, plan, question.flops))


def best_plan(scenario: Scenario, context: CostContext, question: Question, progress: Progress) -> Outcome:
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


def answer(
    scenario: Scenario, plan: ParallelPlan, question: Question, progress: Progress
) -> tuple[Outcome, Outcome]:
    """Return what the given plan does in a scenario, and the best plan of it."""
    context = scenario_context(scenario)
    return given_plan(context, plan, question), best_plan(scenario, context, question, progress)
