"""The best ways to share out the layers of one pipeline stage among strategies, exactly.

Layers are alike, so an assignment is a count per strategy; its order only matters where neighbours hold their
activations differently, and then each way of holding them is best visited once (chains of re-layouts are priced
as such, so a detour never pays). What is not additive over layers is kept exactly too: the communication of a
group of ranks once per iteration (a table by number of layers), the working memory of the neediest layer (one
pass per threshold), the tour through the layouts (Pareto-optimal tours per set of layouts).

Labels, partial assignments that fill strategy after strategy, are dropped when a label with as many layers
placed is nowhere worse (a Pareto front of times and memory, not a grid of memory), or when the linear relaxation
of what is left cannot come in below a limit. For the one best assignment the limit starts at the bound of the
whole stage and is widened until it holds a solution, which is then the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.search.non_dominated import non_dominated
from meshwright.planner.search.stage_problem import COSTS, REDUCE, MemoryHull, StageOptions, StageProblem

__all__ = ["StageLimit", "best_option", "pareto_options"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Bounds carry rounding of this relative size; pruning must not drop the optimum for it.
_ROUNDING = 1e-12
# First gap above the bound in which the best assignment is sought, as a share of it, how it widens, and how far.
_FIRST_GAP, _WIDENING, _LARGEST_GAP = 1e-3, 4.0, 1.0


class StageLimit(NamedTuple):
    """A weighted cost of a stage, ``weights`` of shape ``(5,)``, and the most it may be."""

    weights: FloatArray
    limit: float


def best_option(
    problem: StageProblem, weights: FloatArray, limit: float, most_labels: int
) -> StageOptions | None:
    """Return the one assignment of least weighted cost, none above a limit.

    Parameters
    ----------
    problem : StageProblem
        The stage.
    weights : FloatArray
        What each cost counts, shape ``(5,)``.
    limit : float
        The most the weighted cost may be.
    most_labels : int
        Partial assignments kept at most; None is returned where they do not suffice.
    """
    bound = problem.lower_bound(weights)
    gap = _FIRST_GAP * abs(bound)
    while bound <= limit:
        # So far above the bound nothing is left to gain by a limit.
        reach = min(bound + gap, limit) if gap < _LARGEST_GAP * abs(bound) else limit
        found = _search(problem, [StageLimit(weights, reach)], most_labels, is_single=True)
        if found is None:
            return None
        if len(found.counts):
            return found.cheapest(weights)
        if reach >= limit:
            break
        gap *= _WIDENING
    return StageOptions.none(len(problem.layout))


def pareto_options(
    problem: StageProblem, limits: Sequence[StageLimit], most_labels: int
) -> StageOptions | None:
    """Return every assignment within some limits that no other beats in all five costs.

    None where ``most_labels`` partial assignments do not suffice.
    """
    return _search(problem, limits, most_labels, is_single=False)


def _search(
    problem: StageProblem, limits: Sequence[StageLimit], most_labels: int, *, is_single: bool
) -> StageOptions | None:
    """Run one pass per threshold of working memory and merge what they find."""
    found = []
    floor = problem.boundary_working_memory
    weights = limits[0].weights
    projection = weights.reshape(len(COSTS), 1) if is_single else np.eye(len(COSTS))
    thresholds = np.unique(np.maximum(problem.working_memory, floor)) if problem.num_layers else [floor]
    for threshold in thresholds:
        options = _Pass(problem, float(threshold), limits, projection).run(most_labels)
        if options is None:
            return None
        found.append(options)
        if is_single and len(options.counts):
            # One best is asked for: later passes must beat it.
            limits = [StageLimit(weights, min(limits[0].limit, float((options.costs @ weights).min())))]
    merged = StageOptions(
        counts=np.concatenate([each.counts for each in found]),
        costs=np.concatenate([each.costs for each in found]),
    )
    return merged.pareto(projection)


@dataclass(frozen=True, slots=True, eq=False)
class _Labels:
    """Partial assignments; arrays of shape ``(num_labels,)``, ``cost`` ``(num_labels, num_projected)``.

    ``in_group`` counts the layers of the group being filled, whose table is added when it is complete.
    """

    used: IntArray
    in_group: IntArray
    mask: IntArray
    memory: FloatArray
    cost: FloatArray
    counts: IntArray

    def take(self, index: IntArray | NDArray[np.bool_]) -> _Labels:
        return _Labels(
            self.used[index],
            self.in_group[index],
            self.mask[index],
            self.memory[index],
            self.cost[index],
            self.counts[index],
        )


class _Bound:
    """A limit with what its linear relaxation needs of a stage."""

    def __init__(self, problem: StageProblem, limit: StageLimit, *, is_single: bool) -> None:
        self.problem = problem
        self.weights = limit.weights
        self.limit = limit.limit + _ROUNDING * abs(limit.limit)
        # What a projected cost weighs: 1 where the projection has weighed it already.
        self.scale = np.ones(1) if is_single else limit.weights
        self.prices = problem.prices(limit.weights)
        self.slopes = problem.slopes(limit.weights)

    def allows(self, labels: _Labels, group: int, rest: IntArray, budget: float) -> NDArray[np.bool_]:
        """Return which labels, a group of theirs being filled, may lead to a solution within the limit."""
        problem = self.problem
        hull = MemoryHull(problem.layer_memory[rest], self.prices[rest])
        bound = labels.cost @ self.scale + self.slopes[group] * labels.in_group
        bound += hull.least(problem.num_layers - labels.used, budget - labels.memory)
        bound += problem.tours.least(labels.mask, self.weights[:REDUCE])
        result: NDArray[np.bool_] = bound <= self.limit
        return result

    def promising(self, usable: IntArray, budget: float) -> IntArray:
        """Return the strategies of which a solution within the limit may use a layer."""
        problem = self.problem
        memory, prices = problem.layer_memory[usable], self.prices[usable]
        others = np.full(len(usable), problem.num_layers - 1)
        rest = MemoryHull(memory, prices).least(others, budget - memory)
        tour = problem.tours.least(problem.tours.bits[problem.layout[usable]], self.weights[:REDUCE])
        return usable[problem.constant(self.weights) + prices + rest + tour <= self.limit]


class _Pass:
    """Fill the stage strategy by strategy under one threshold of working memory."""

    def __init__(
        self, problem: StageProblem, threshold: float, limits: Sequence[StageLimit], projection: FloatArray
    ) -> None:
        self.problem, self.threshold = problem, threshold
        self.budget = problem.memory_budget - threshold
        self.projection = projection
        self.is_single = projection.shape[1] == 1
        self.bounds = [_Bound(problem, limit, is_single=self.is_single) for limit in limits]
        self.cost = problem.layer_time @ projection[:REDUCE]
        self.sync = problem.sync_time @ projection[REDUCE:]

    def run(self, most_labels: int) -> StageOptions | None:
        """Return the options found, or None when there are too many labels."""
        problem = self.problem
        empty = StageOptions.none(len(problem.layout))
        if self.budget < 0.0:
            return empty
        usable = (
            np.flatnonzero(problem.working_memory <= self.threshold) if problem.num_layers else np.arange(0)
        )
        for bound in self.bounds:
            if len(usable):
                usable = bound.promising(usable, self.budget)
        if self.threshold > problem.boundary_working_memory and not np.any(
            problem.working_memory[usable] == self.threshold
        ):
            # Without a layer that needs so much, a lower threshold leaves more memory to the same assignments.
            return empty
        order = self._ordered(usable)
        labels = self._start()
        for place, strategy in enumerate(order):
            rest = order[place + 1 :]
            group = int(problem.group[strategy])
            labels = self._extended(labels, int(strategy))
            for bound in self.bounds:
                labels = labels.take(bound.allows(labels, group, rest, self.budget))
            if not len(rest) or problem.group[rest[0]] != group:
                labels = self._closed(labels, group)
            labels = self._pruned(labels)
            if len(labels.used) > most_labels:
                return None
            if not len(labels.used):
                return empty
        return self._finished(labels)

    def _ordered(self, usable: IntArray) -> IntArray:
        """Return the strategies group by group, the least promising first: their labels die at once."""
        if not len(usable):
            return usable
        memory, prices = self.problem.layer_memory[usable], self.bounds[0].prices[usable]
        share = self.budget / max(self.problem.num_layers, 1)
        reduced = prices + MemoryHull(memory, prices).slope(share) * memory
        group = self.problem.group[usable]
        best = np.full(len(self.problem.sync_time), np.inf)
        np.minimum.at(best, group, reduced)
        return usable[np.lexsort((-reduced, group, -best[group]))]

    def _start(self) -> _Labels:
        problem = self.problem
        nothing = np.zeros(1, dtype=np.int64)
        fixed = problem.boundary_time @ self.projection[:REDUCE] + self.sync[:, 0].sum(axis=0)
        counts = np.zeros((1, len(problem.layout)), dtype=np.int64)
        return _Labels(nothing, nothing, nothing, np.zeros(1), fixed[np.newaxis], counts)

    def _extended(self, labels: _Labels, strategy: int) -> _Labels:
        """Give the strategy every number of layers."""
        problem = self.problem
        room = problem.num_layers - labels.used + 1
        parent = np.repeat(np.arange(len(room)), room)
        count = np.arange(len(parent)) - np.repeat(np.cumsum(room) - room, room)
        wider = labels.take(parent)
        counts = wider.counts
        counts[:, strategy] = count
        return _Labels(
            wider.used + count,
            wider.in_group + count,
            wider.mask | np.where(count > 0, problem.tours.bits[problem.layout[strategy]], 0),
            wider.memory + count * problem.layer_memory[strategy],
            wider.cost + count[:, np.newaxis] * self.cost[strategy],
            counts,
        )

    def _closed(self, labels: _Labels, group: int) -> _Labels:
        """Replace the slope of a group that is complete by its table."""
        table = self.sync[group]
        return replace(
            labels,
            cost=labels.cost + table[labels.in_group] - table[0],
            in_group=np.zeros_like(labels.in_group),
        )

    def _pruned(self, labels: _Labels) -> _Labels:
        """Drop labels that another with as many layers placed beats in memory and every cost."""
        depth = self.problem.num_layers + 1
        state = (labels.mask * depth + labels.used) * depth + labels.in_group
        return labels.take(non_dominated(state, np.column_stack([labels.cost, labels.memory])))

    def _finished(self, labels: _Labels) -> StageOptions:
        """Add the tours to the labels that are complete, and keep what is within the limits."""
        problem = self.problem
        complete = labels.take((labels.used == problem.num_layers) & (labels.memory <= self.budget))
        # Memory is a limit, and met: it no longer distinguishes.
        complete = complete.take(non_dominated(complete.mask, complete.cost))
        counts, costs = [], []
        for row in range(len(complete.used)):
            for cost in self._costs(complete, row):
                if all(cost @ bound.weights <= bound.limit for bound in self.bounds):
                    counts.append(complete.counts[row])
                    costs.append(cost)
        if not counts:
            return StageOptions.none(len(problem.layout))
        return StageOptions(counts=np.stack(counts), costs=np.stack(costs))

    def _costs(self, complete: _Labels, row: int) -> list[FloatArray]:
        """Return the costs of one complete label, by every tour that may matter."""
        problem = self.problem
        if self.is_single:
            return [problem.cost(complete.counts[row], self.bounds[0].weights)]
        costs = []
        for times in problem.tours.times(int(complete.mask[row])):
            cost = complete.cost[row].copy()
            cost[:REDUCE] += times
            costs.append(cost)
        return costs
