"""One pipeline stage whose layers may run under several strategies: what an assignment costs and holds."""

from __future__ import annotations

from dataclasses import dataclass

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
    "MemoryHull",
    "StageOptions",
    "StageProblem",
    "stage_weights",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

COSTS = ("forward", "backward", "reduce", "gather", "optimizer")
"""What an assignment costs: a micro-batch forward and backward, and three times once per iteration [s]."""
FORWARD, BACKWARD, REDUCE, GATHER, OPTIMIZER = range(len(COSTS))

# A share of memory that just suffices must not fall short by rounding.
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

    Layers are alike, so an assignment is a number of layers per strategy, ``counts`` of shape ``(num_strategies,)``.

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

    def cost(self, counts: IntArray, weights: FloatArray) -> FloatArray:
        """Return the costs of an assignment by its best tour, shape ``(5,)`` [s]."""
        total = np.zeros(len(COSTS))
        total[:REDUCE] = self.boundary_time + counts @ self.layer_time
        in_group = np.bincount(self.group, weights=counts, minlength=len(self.sync_time)).astype(np.int64)
        total[REDUCE:] = self.sync_time[np.arange(len(self.sync_time)), in_group].sum(axis=0)
        times = self.tours.times(self.mask(counts))
        total[:REDUCE] += times[int((times @ weights[:REDUCE]).argmin())]
        return total

    def memory(self, counts: IntArray) -> float:
        """Return the bytes of an assignment, to be held against ``memory_budget`` [B]."""
        used = counts > 0
        working = self.working_memory[used].max(initial=self.boundary_working_memory)
        return float(counts @ self.layer_memory + working)

    def mask(self, counts: IntArray) -> int:
        """Return the set of layouts an assignment visits, as bits."""
        bits = self.tours.bits[self.layout[counts > 0]]
        return int(np.bitwise_or.reduce(bits, initial=0))

    @property
    def is_feasible(self) -> bool:
        """Whether some assignment fits: all layers under the strategy that keeps least, of those that need so little."""
        if self.num_layers == 0:
            return self.boundary_working_memory <= self.memory_budget
        order = np.argsort(self.working_memory, kind="stable")
        working = np.maximum(self.working_memory[order], self.boundary_working_memory)
        kept = self.num_layers * np.minimum.accumulate(self.layer_memory[order])
        return bool(np.any(kept + working <= self.memory_budget))

    def lower_bound(self, weights: FloatArray) -> float:
        """Return a lower bound of the weighted cost of every assignment that fits, inf when none does.

        Fractions of layers may be assigned, and only the least of all working memories is counted.
        """
        if not self.is_feasible:
            return float("inf")
        working = self.boundary_working_memory
        if self.num_layers:
            working = max(working, float(self.working_memory.min()))
        hull = MemoryHull(self.layer_memory, self.prices(weights))
        rest = hull.least(np.array([self.num_layers]), np.array([self.memory_budget - working]))
        return float(rest[0]) + self.constant(weights)

    def prices(self, weights: FloatArray) -> FloatArray:
        """Return a weighted cost per layer that, summed, is never above the true one, ``(num_strategies,)``."""
        prices: FloatArray = self.layer_time @ weights[:REDUCE] + self.slopes(weights)[self.group]
        return prices

    def slopes(self, weights: FloatArray) -> FloatArray:
        """Return the least synchronisation cost per layer over every number of layers, ``(num_groups,)``."""
        table = self.sync_time @ weights[REDUCE:]
        if self.num_layers == 0:
            return np.zeros(len(table))
        slopes: FloatArray = ((table[:, 1:] - table[:, :1]) / np.arange(1, self.num_layers + 1)).min(axis=1)
        return slopes

    def constant(self, weights: FloatArray) -> float:
        """Return the weighted cost of embedding, head and groups without layers."""
        return float(self.boundary_time @ weights[:REDUCE] + (self.sync_time[:, 0] @ weights[REDUCE:]).sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageOptions:
    """Assignments: layers per strategy, ``(num_options, num_strategies)``, and costs, ``(num_options, 5)`` [s]."""

    counts: IntArray
    costs: FloatArray

    @classmethod
    def none(cls, num_strategies: int) -> StageOptions:
        """Return no option at all."""
        return cls(counts=np.zeros((0, num_strategies), dtype=np.int64), costs=np.zeros((0, len(COSTS))))

    def take(self, rows: IntArray) -> StageOptions:
        """Return some of the options."""
        return StageOptions(counts=self.counts[rows], costs=self.costs[rows])

    def cheapest(self, weights: FloatArray) -> StageOptions:
        """Return the option of least weighted cost; of equal ones that with the least times once per iteration."""
        weighted = self.costs @ weights
        near = np.flatnonzero(weighted <= weighted.min() * (1.0 + _ROUNDING))
        return self.take(near[[int(self.costs[near, REDUCE:].sum(axis=1).argmin())]])

    def pareto(self, projection: FloatArray) -> StageOptions:
        """Return the options that no other beats in every projected cost."""
        return self.take(non_dominated(np.zeros(len(self.costs), dtype=np.int64), self.costs @ projection))


class MemoryHull:
    """Lower convex hull of (memory, price) points: the least price per layer at a mean memory per layer.

    Parameters
    ----------
    memory, price : FloatArray
        Of one layer under each strategy, shape ``(num_strategies,)``.
    """

    def __init__(self, memory: FloatArray, price: FloatArray) -> None:
        points: list[tuple[float, float]] = []
        for index in np.lexsort((price, memory)):
            point = (float(memory[index]), float(price[index]))
            # Only the falling part: more memory is never needed where less costs no more.
            if points and point[1] >= points[-1][1]:
                continue
            while len(points) > 1 and _is_above(points[-2], points[-1], point):
                points.pop()
            points.append(point)
        self._memory = np.array([x for x, _ in points])
        self._price = np.array([y for _, y in points])

    def least(self, num_layers: IntArray, memory: FloatArray) -> FloatArray:
        """Return the least price of so many layers in so much memory, by linear relaxation; inf where none fits."""
        without = np.where(memory >= 0.0, 0.0, np.inf)
        if not len(self._memory):
            return np.where(num_layers == 0, without, np.inf)
        layers = np.maximum(num_layers, 1)
        share = memory / layers * (1.0 + _ROUNDING)
        price = np.where(share < self._memory[0], np.inf, np.interp(share, self._memory, self._price))
        return np.where(num_layers == 0, without, price * layers)

    def slope(self, share: float) -> float:
        """Return what a byte more per layer saves at a mean memory per layer."""
        place = int(np.searchsorted(self._memory, share))
        if place in (0, len(self._memory)):
            return 0.0
        rise = self._price[place - 1] - self._price[place]
        return float(rise / (self._memory[place] - self._memory[place - 1]))


def _is_above(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    """Return whether the middle point lies on or above the line between its neighbours."""
    (x0, y0), (x1, y1), (x2, y2) = first, middle, last
    return (y1 - y0) * (x2 - x0) >= (y2 - y0) * (x1 - x0)
