"""The best ways to share out the layers of one pipeline stage among strategies, exactly.

Layers are alike, so an assignment is a count per strategy; its order only matters where neighbours hold their
activations differently, and then each way of holding them is best visited once (chains of re-layouts are priced
as such, so a detour never pays). What is not additive over layers is kept exactly too: the communication of a
group of ranks once per iteration (a table by number of layers), the working memory of the neediest layer (one
pass per threshold), the tour through the layouts (Pareto-optimal tours per set of layouts).

Labels, partial assignments that fill strategy after strategy, are dropped when a label with as many layers
placed is nowhere worse (a Pareto front of times and memory, not a grid of memory), or when the linear relaxation
of what is left cannot come in below a limit. The limit starts at the bound of the whole stage and is widened
until it holds a solution, which is then the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.search.non_dominated import non_dominated
from meshwright.planner.search.relayout_tours import RelayoutTours

__all__ = [
    "BACKWARD",
    "COSTS",
    "FORWARD",
    "GATHER",
    "OPTIMIZER",
    "REDUCE",
    "StageOptions",
    "StageProblem",
    "stage_weights",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

COSTS = ("forward", "backward", "reduce", "gather", "optimizer")
"""What an option costs: a micro-batch forward and backward, and three times once per iteration [s]."""
FORWARD, BACKWARD, REDUCE, GATHER, OPTIMIZER = range(len(COSTS))

# Bounds carry rounding of this relative size; pruning must not drop the optimum for it.
_ROUNDING = 1e-12


def stage_weights(num_micro_batches: float, reduce_overlap: float, gather_overlap: float) -> FloatArray:
    """Return what the first stage's costs count for in the iteration, if overlapped shares are hidden, ``(5,)``."""
    weights = np.ones(len(COSTS))
    weights[[FORWARD, BACKWARD]] = num_micro_batches
    weights[REDUCE], weights[GATHER] = 1.0 - reduce_overlap, 1.0 - gather_overlap
    return weights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageProblem:
    """One pipeline stage: how many layers, and what each strategy costs.

    Parameters
    ----------
    num_layers : int
        Layers of the stage.
    layer_time : FloatArray
        Forward and backward of one layer and micro-batch, shape ``(num_strategies, 2)`` [s].
    layer_memory : FloatArray
        What one layer keeps: states, and activations of all micro-batches in flight, ``(num_strategies,)`` [B].
    working_memory : FloatArray
        What a layer needs while it runs; the neediest layer of the stage counts, ``(num_strategies,)`` [B].
    layout : IntArray
        How the strategy holds activations, an index of ``tours``, ``(num_strategies,)``.
    group : IntArray
        The group of ranks it synchronises with, ``(num_strategies,)``.
    sync_time : FloatArray
        Gradient reduction, parameter gather and optimizer step of a group that holds so many layers, the
        embedding and head it may hold included, shape ``(num_groups, num_layers + 1, 3)`` [s].
    boundary_time : FloatArray
        Forward and backward of embedding and head on this stage, ``(2,)`` [s].
    boundary_working_memory : float
        What embedding or head need while they run [B].
    memory_budget : float
        What is left for layers: capacity less everything that does not depend on the assignment [B].
    tours : RelayoutTours
        Times of changing the layout, from and back to that of the stage's ends.
    """

    num_layers: int
    layer_time: FloatArray
    layer_memory: FloatArray
    working_memory: FloatArray
    layout: IntArray
    group: IntArray
    sync_time: FloatArray
    boundary_time: FloatArray
    boundary_working_memory: float
    memory_budget: float
    tours: RelayoutTours

    def lower_bound(self, weights: FloatArray) -> float:
        """Return a lower bound of the weighted cost of every assignment that fits, inf when none does."""
        floor = max(self.boundary_working_memory, float(self.working_memory.min(initial=np.inf)))
        if self.num_layers == 0:
            floor = self.boundary_working_memory
        budget = self.memory_budget - floor
        if budget < 0.0:
            return float("inf")
        prices = self._prices(weights)
        hull = _Hull.of(self.layer_memory, prices)
        rest = hull.least(np.array([self.num_layers]), np.array([budget]))
        return float(rest[0]) + self._constant(weights)

    def cost(self, counts: IntArray, weights: FloatArray) -> FloatArray:
        """Return the costs of an assignment by its best tour, shape ``(5,)`` [s]."""
        total = np.zeros(len(COSTS))
        total[:REDUCE] = self.boundary_time + counts @ self.layer_time
        in_group = np.bincount(self.group, weights=counts, minlength=len(self.sync_time)).astype(np.int64)
        total[REDUCE:] = self.sync_time[np.arange(len(self.sync_time)), in_group].sum(axis=0)
        times = self.tours.times(self._mask(counts))
        total[:REDUCE] += times[int((times @ weights[:REDUCE]).argmin())]
        return total

    def memory(self, counts: IntArray) -> float:
        """Return the bytes of an assignment, to be held against ``memory_budget`` [B]."""
        used = counts > 0
        working = self.working_memory[used].max(initial=self.boundary_working_memory)
        return float(counts @ self.layer_memory + working)

    def best(self, weights: FloatArray, limit: float, most_labels: int) -> StageOptions | None:
        """Return the one assignment of least weighted cost, none above ``limit``; None past ``most_labels``."""
        return self._widened(weights, limit, most_labels, np.reshape(weights, (len(COSTS), 1)))

    def options(self, weights: FloatArray, limit: float, most_labels: int) -> StageOptions | None:
        """Return all Pareto-optimal assignments of weighted cost at most ``limit``; None past ``most_labels``."""
        return self._search(weights, limit, most_labels, np.eye(len(COSTS)))

    def _widened(
        self, weights: FloatArray, limit: float, most_labels: int, projection: FloatArray
    ) -> StageOptions | None:
        bound = self.lower_bound(weights)
        gap = 1e-3 * abs(bound)
        while bound <= limit:
            reach = min(bound + gap, limit)
            found = self._search(weights, reach, most_labels, projection)
            if found is None:
                return None
            if len(found.counts):
                return found.cheapest(weights)
            if reach >= limit:
                break
            gap *= 4.0
        return StageOptions.none(len(self.layout))

    def _search(
        self, weights: FloatArray, limit: float, most_labels: int, projection: FloatArray
    ) -> StageOptions | None:
        """Run one pass per threshold of working memory and merge what they find."""
        found = []
        is_single = projection.shape[1] == 1
        floor = self.boundary_working_memory
        thresholds = np.unique(np.maximum(self.working_memory, floor)) if self.num_layers else [floor]
        for threshold in thresholds:
            part = _Pass(self, float(threshold), weights, projection)
            options = part.run(limit, most_labels)
            if options is None:
                return None
            found.append(options)
            if is_single and len(options.counts):
                # One best is asked for: later passes must beat it.
                limit = min(limit, float((options.costs @ weights).min()))
        merged = StageOptions(
            counts=np.concatenate([each.counts for each in found]),
            costs=np.concatenate([each.costs for each in found]),
        )
        return merged.pareto(projection)

    def _prices(self, weights: FloatArray) -> FloatArray:
        """Return a weighted cost per layer that, summed, is never above the true one."""
        prices: FloatArray = self.layer_time @ weights[:REDUCE] + self._slopes(weights)[self.group]
        return prices

    def _slopes(self, weights: FloatArray) -> FloatArray:
        """Return, per group, the least synchronisation cost per layer over every number of layers."""
        table = self.sync_time @ weights[REDUCE:]
        if self.num_layers == 0:
            return np.zeros(len(table))
        slopes: FloatArray = ((table[:, 1:] - table[:, :1]) / np.arange(1, self.num_layers + 1)).min(axis=1)
        return slopes

    def _constant(self, weights: FloatArray) -> float:
        """Return the weighted cost of embedding, head and empty groups."""
        return float(self.boundary_time @ weights[:REDUCE] + (self.sync_time[:, 0] @ weights[REDUCE:]).sum())

    def _mask(self, counts: IntArray) -> int:
        bits = self.tours.bits[self.layout[counts > 0]]
        return int(np.bitwise_or.reduce(bits, initial=0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageOptions:
    """Assignments: layers per strategy, ``(num_options, num_strategies)``, and costs, ``(num_options, 5)`` [s]."""

    counts: IntArray
    costs: FloatArray

    @classmethod
    def none(cls, num_strategies: int) -> StageOptions:
        """Return no option at all."""
        return cls(counts=np.zeros((0, num_strategies), dtype=np.int64), costs=np.zeros((0, len(COSTS))))

    def cheapest(self, weights: FloatArray) -> StageOptions:
        """Return the option of least weighted cost; of equal ones that with the least times once per iteration."""
        weighted = self.costs @ weights
        near = np.flatnonzero(weighted <= weighted.min() * (1.0 + _ROUNDING))
        chosen = near[[int(self.costs[near, REDUCE:].sum(axis=1).argmin())]]
        return StageOptions(counts=self.counts[chosen], costs=self.costs[chosen])

    def pareto(self, projection: FloatArray) -> StageOptions:
        """Return the options that no other beats in every projected cost."""
        keep = non_dominated(np.zeros(len(self.costs), dtype=np.int64), self.costs @ projection)
        return StageOptions(counts=self.counts[keep], costs=self.costs[keep])


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


class _Pass:
    """Fill the stage strategy by strategy under one threshold of working memory."""

    def __init__(
        self, problem: StageProblem, threshold: float, weights: FloatArray, projection: FloatArray
    ) -> None:
        self.problem, self.threshold = problem, threshold
        self.budget = problem.memory_budget - threshold
        self.projection = projection
        # What a projected cost weighs: 1 where the projection has weighed it already.
        self.scale = np.ones(1) if projection.shape[1] == 1 else weights
        self.weights = weights
        self.prices = problem._prices(weights)
        self.slopes = problem._slopes(weights)
        is_usable = problem.working_memory <= threshold if problem.num_layers else []
        self.usable = np.flatnonzero(is_usable)
        self.cost = problem.layer_time @ projection[:REDUCE]
        self.sync = problem.sync_time @ projection[REDUCE:]

    def _promising(self, limit: float) -> IntArray:
        """Return the strategies of which a solution below the limit may use a layer."""
        problem, usable = self.problem, self.usable
        if problem.num_layers == 0 or not len(usable):
            return usable
        memory, prices = problem.layer_memory[usable], self.prices[usable]
        others = np.full(len(usable), problem.num_layers - 1)
        rest = _Hull.of(memory, prices).least(others, self.budget - memory)
        tour = problem.tours.least(problem.tours.bits[problem.layout[usable]], self.weights[:REDUCE])
        return usable[problem._constant(self.weights) + prices + rest + tour <= limit]

    def _ordered(self, usable: IntArray) -> IntArray:
        """Return the strategies group by group, the least promising first: their labels die at once."""
        if not len(usable):
            return usable
        memory, prices = self.problem.layer_memory[usable], self.prices[usable]
        share = self.budget / max(self.problem.num_layers, 1)
        reduced = prices + _Hull.of(memory, prices).slope(share) * memory
        group = self.problem.group[usable]
        best = np.full(len(self.problem.sync_time), np.inf)
        np.minimum.at(best, group, reduced)
        return usable[np.lexsort((-reduced, group, -best[group]))]

    def run(self, limit: float, most_labels: int) -> StageOptions | None:
        """Return the options found, or None when there are too many labels."""
        problem = self.problem
        empty = StageOptions.none(len(problem.layout))
        if self.budget < 0.0:
            return empty
        limit = limit + _ROUNDING * abs(limit)
        promising = self._promising(limit)
        if self.threshold > problem.boundary_working_memory and not np.any(
            problem.working_memory[promising] == self.threshold
        ):
            # Without a layer that needs so much, a lower threshold leaves more memory to the same assignments.
            return empty
        order = self._ordered(promising)
        labels = self._start()
        for place, strategy in enumerate(order):
            rest = order[place + 1 :]
            labels = self._extended(labels, int(strategy), rest, limit)
            group = problem.group[strategy]
            if not len(rest) or problem.group[rest[0]] != group:
                labels = self._closed(labels, int(group))
            labels = self._pruned(labels)
            if len(labels.used) > most_labels:
                return None
            if not len(labels.used):
                return empty
        return self._finished(labels, limit)

    def _start(self) -> _Labels:
        problem = self.problem
        nothing = np.zeros(1, dtype=np.int64)
        fixed = problem.boundary_time @ self.projection[:REDUCE] + self.sync[:, 0].sum(axis=0)
        return _Labels(
            nothing,
            nothing,
            nothing,
            np.zeros(1),
            fixed[np.newaxis],
            np.zeros((1, len(problem.layout)), dtype=np.int64),
        )

    def _extended(self, labels: _Labels, strategy: int, rest: IntArray, limit: float) -> _Labels:
        """Give the strategy every number of layers that may still lead to a solution below the limit."""
        problem = self.problem
        hull = _Hull.of(problem.layer_memory[rest], self.prices[rest])
        room = problem.num_layers - labels.used + 1
        parent = np.repeat(np.arange(len(room)), room)
        count = np.arange(len(parent)) - np.repeat(np.cumsum(room) - room, room)
        memory = labels.memory[parent] + count * problem.layer_memory[strategy]
        cost = labels.cost[parent] + count[:, np.newaxis] * self.cost[strategy]
        in_group = labels.in_group[parent] + count
        mask = labels.mask[parent] | np.where(count > 0, problem.tours.bits[problem.layout[strategy]], 0)
        used = labels.used[parent] + count
        bound = cost @ self.scale + self.slopes[problem.group[strategy]] * in_group
        bound += hull.least(problem.num_layers - used, self.budget - memory)
        bound += problem.tours.least(mask, self.weights[:REDUCE])
        keep = np.flatnonzero(bound <= limit)
        counts = labels.counts[parent[keep]]
        counts[:, strategy] = count[keep]
        return _Labels(used[keep], in_group[keep], mask[keep], memory[keep], cost[keep], counts)

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

    def _finished(self, labels: _Labels, limit: float) -> StageOptions:
        problem = self.problem
        complete = labels.take((labels.used == problem.num_layers) & (labels.memory <= self.budget))
        # Memory is a limit, and met: it no longer distinguishes.
        complete = complete.take(non_dominated(complete.mask, complete.cost))
        counts, costs = [], []
        for row in range(len(complete.used)):
            if self.projection.shape[1] == 1:
                option = [problem.cost(complete.counts[row], self.weights)]
            else:
                option = []
                for forward, backward in problem.tours.times(int(complete.mask[row])):
                    total = complete.cost[row].copy()
                    total[:REDUCE] += (forward, backward)
                    option.append(total)
            for total in option:
                if total @ self.weights <= limit:
                    counts.append(complete.counts[row])
                    costs.append(total)
        if not counts:
            return StageOptions.none(len(problem.layout))
        return StageOptions(counts=np.stack(counts), costs=np.stack(costs))


class _Hull:
    """Lower convex hull of (memory, price) points: the least price per layer at a mean memory per layer."""

    def __init__(self, memory: FloatArray, price: FloatArray) -> None:
        self.memory, self.price = memory, price

    @classmethod
    def of(cls, memory: FloatArray, price: FloatArray) -> _Hull:
        """Return the falling part of the hull."""
        points: list[tuple[float, float]] = []
        for index in np.lexsort((price, memory)):
            point = (float(memory[index]), float(price[index]))
            if points and point[1] >= points[-1][1]:
                continue
            while len(points) > 1 and _is_above(points[-2], points[-1], point):
                points.pop()
            points.append(point)
        return cls(np.array([x for x, _ in points]), np.array([y for _, y in points]))

    def least(self, num_layers: IntArray, memory: FloatArray) -> FloatArray:
        """Return the least price of so many layers in so much memory, by linear relaxation; inf where none fits."""
        if not len(self.memory):
            return np.where((num_layers == 0) & (memory >= 0.0), 0.0, np.inf)
        layers = np.maximum(num_layers, 1)
        share = memory / layers * (1.0 + _ROUNDING)
        price = np.where(share < self.memory[0], np.inf, np.interp(share, self.memory, self.price))
        result: FloatArray = np.where(num_layers == 0, np.where(memory >= 0.0, 0.0, np.inf), price * layers)
        return result

    def slope(self, share: float) -> float:
        """Return what a byte more per layer saves at a mean memory per layer."""
        place = int(np.searchsorted(self.memory, share))
        if place in (0, len(self.memory)):
            return 0.0
        rise = self.price[place - 1] - self.price[place]
        return float(rise / (self.memory[place] - self.memory[place - 1]))


def _is_above(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    """Return whether the middle point lies on or above the line between its neighbours."""
    (x0, y0), (x1, y1), (x2, y2) = first, middle, last
    return (y1 - y0) * (x2 - x0) >= (y2 - y0) * (x1 - x0)
