"""Exhaustive search through a funnel: bounds on every plan, exact schedules on the best."""

from __future__ import annotations

import numpy as np

from meshwright.costmodels.bound import iteration_time_bound
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.memory import peak_memory
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns
from meshwright.costmodels.prediction import predict
from meshwright.errors import InfeasiblePlanError
from meshwright.planner.constraints import apply_constraints
from meshwright.planner.export import EXPORTERS
from meshwright.planner.objectives import objective_values, world_sizes
from meshwright.planner.search.base import Progress, RankedPlan, SearchRequest, SearchResult
from meshwright.planner.space import enumerate_space, plan_of_row
from meshwright.planner.space_block import concatenate
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.training.iteration import iteration_time

__all__ = ["ExhaustiveSearch"]

# Plans whose schedule is simulated exactly at least, and at most while bounds leave the winner open.
_NUM_SIMULATED = 100
_MOST_SIMULATED = 1_000
# Plans kept after the bound where none of them can be refused later; far more than are simulated.
_NUM_KEPT = 20_000
# Values that agree to this many digits are a tie: rounding noise must not rank plans.
_TIE_DIGITS = 9


class ExhaustiveSearch:
    """Score the whole space by its closed-form bound and simulate the best exactly, at least a hundred.

    Simulation goes on in the order of the bounds until none of the plans left can win.

    Deterministic: ties go to the plan with less memory, then to enumeration order.
    """

    name = "exhaustive"

    def run(self, request: SearchRequest, progress: Progress) -> SearchResult:
        """Return the best plans; see :class:`meshwright.planner.search.base.Search`."""
        rejections: dict[str, int] = {}
        survivors, bounds, num_candidates, num_feasible = _bounded(request, rejections, progress)
        order = _order(request, survivors, bounds)
        simulated: list[tuple[float, int, ParallelPlan]] = []
        position = 0
        wanted = max(_NUM_SIMULATED, request.num_plans)
        values = objective_values(request.objective, survivors, bounds)
        best = np.inf
        while position < len(order) and len(simulated) < _MOST_SIMULATED:
            row = int(order[position])
            # Bounds ascend along the order: once they pass the best, no plan that is left can win.
            if len(simulated) >= wanted and values[row] >= best:
                break
            position += 1
            plan = plan_of_row(request.job, survivors, row)
            if request.limits.target and EXPORTERS[request.limits.target].unsupported(request.job, plan):
                rejections["target"] += 1
                num_feasible -= 1
                continue
            seconds = iteration_time(iteration_costs(request.context, plan), plan.schedule)
            simulated.append((seconds, row, plan))
            best = min(best, values[row] / bounds[row] * seconds)
            progress("simulating schedules", len(simulated), wanted)
        if not simulated:
            raise InfeasiblePlanError("no plan satisfies every constraint", rejections)
        return _ranked(
            request,
            survivors,
            bounds,
            simulated,
            order[position:],
            (num_candidates, num_feasible),
            rejections,
        )


def _bounded(
    request: SearchRequest, rejections: dict[str, int], progress: Progress
) -> tuple[PlanColumns, FloatColumn, int, int]:
    """Return the feasible plans with the best bounds, and how many plans were candidates and feasible."""
    kept: list[PlanColumns] = []
    bounds: list[FloatColumn] = []
    num_candidates = num_feasible = 0
    worlds = world_sizes(request.objective, request.context)
    for block in enumerate_space(request.context, request.limits, worlds):
        num_candidates += len(block)
        feasible = apply_constraints(request.context, block, request.limits, rejections)
        num_feasible += len(feasible)
        if len(feasible):
            bound = iteration_time_bound(request.context, feasible)
            best = np.argsort(objective_values(request.objective, feasible, bound), kind="stable")
            if request.limits.target is None:
                # An export target may refuse any plan, so with one all of them stay.
                best = best[:_NUM_KEPT]
            kept.append(feasible.take(best))
            bounds.append(bound[best])
        progress("scoring plans", num_candidates, 0)
    if not kept:
        raise InfeasiblePlanError("no plan satisfies every constraint", rejections)
    return concatenate(kept), np.concatenate(bounds), num_candidates, num_feasible


def _order(request: SearchRequest, survivors: PlanColumns, bounds: FloatColumn) -> np.ndarray:
    values = objective_values(request.objective, survivors, bounds)
    return np.lexsort((peak_memory(request.context, survivors), _without_noise(values)))


def _without_noise(values: FloatColumn) -> FloatColumn:
    """Round to the digits that carry meaning, so that equal plans tie and memory decides."""
    unit = 10.0 ** (np.floor(np.log10(values.min())) - _TIE_DIGITS)
    rounded: FloatColumn = np.round(values / unit) * unit
    return rounded


def _ranked(
    request: SearchRequest,
    survivors: PlanColumns,
    bounds: FloatColumn,
    simulated: list[tuple[float, int, ParallelPlan]],
    rest: np.ndarray,
    counts: tuple[int, int],
    rejections: dict[str, int],
) -> SearchResult:
    rows = np.array([row for _, row, _ in simulated])
    times = np.array([seconds for seconds, _, _ in simulated])
    chosen = survivors.take(rows)
    values = objective_values(request.objective, chosen, times)
    ranking = np.lexsort((rows, peak_memory(request.context, chosen), _without_noise(values)))

    def entry(index: int) -> RankedPlan:
        _, row, plan = simulated[index]
        prediction = predict(request.context, plan, request.flops)
        return RankedPlan(plan=plan, prediction=prediction, bound=float(bounds[row]))

    winner = simulated[int(ranking[0])][2]
    others = (int(i) for i in ranking if _degrees(simulated[int(i)][2]) != _degrees(winner))
    rival = next(others, None)
    next_value = np.inf
    if len(rest):
        # Bounds are ascending along the order, so the first unsimulated plan has the least.
        next_value = float(objective_values(request.objective, survivors.take(rest[:1]), bounds[rest[:1]])[0])
    return SearchResult(
        ranked=tuple(entry(int(index)) for index in ranking[: request.num_plans]),
        rival=None if rival is None else entry(rival),
        num_candidates=counts[0],
        num_feasible=counts[1],
        num_simulated=len(simulated),
        rejections=rejections,
        is_certified=bool(values[ranking[0]] <= next_value),
    )


def _degrees(plan: ParallelPlan) -> tuple[int, int, int]:
    return plan.tp, plan.pp, plan.dp
