"""The best assignment of strategies to the layers of all stages of one pipeline.

A lower bound comes from paths through the schedule: forward to a stage, all its micro-batches, back to the first
stage and its synchronisation. Each of these is least when every stage is as fast as it can be; where the simulated
schedule of those stages meets the bound, it is the optimum. Elsewhere all Pareto-optimal assignments of each stage
that a better plan could use are combined depth first: stages not chosen yet count with the least of everything,
which the schedule, monotone in all its durations, turns into a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.search.stage_options import (
    BACKWARD,
    FORWARD,
    GATHER,
    OPTIMIZER,
    REDUCE,
    StageOptions,
    StageProblem,
    stage_weights,
)
from meshwright.simcore.training.costs import IterationCosts
from meshwright.simcore.training.iteration import iteration_time

__all__ = ["PipelineChoice", "PipelineProblem"]

FloatArray = NDArray[np.float64]

# Partial assignments of one stage kept at most, and schedules simulated for one pipeline: seconds of work each.
_MOST_LABELS = 50_000
_MOST_SIMULATED = 2_000
# Times that agree to this share are equal; simulation and bound add the same terms in another order.
_TOLERANCE = 1e-9
# First and following widenings of the gap above the bound in which optimal assignments are sought.
_FIRST_GAP, _WIDENING = 1e-3, 4.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PipelineChoice:
    """What was found for one pipeline.

    Parameters
    ----------
    counts : tuple[NDArray[np.int64], ...] | None
        Layers per strategy of each stage; None when nothing is faster than the limit.
    iteration_time : float
        Simulated; infinite when nothing was found [s].
    is_optimal : bool
        Whether no assignment is faster than what was found, or than the limit where nothing was.
    """

    counts: tuple[NDArray[np.int64], ...] | None
    iteration_time: float
    is_optimal: bool


class PipelineProblem:
    """One pipeline: a choice of strategies per stage.

    Parameters
    ----------
    stages : list[StageProblem]
        One per stage.
    costs : IterationCosts
        The iteration without layers; sends, overlaps and the fixed time are taken from it.
    schedule : str
        ``none`` or ``1f1b``.
    """

    def __init__(self, stages: list[StageProblem], costs: IterationCosts, schedule: str) -> None:
        self.stages, self.costs, self.schedule = stages, costs, schedule
        batches = float(costs.num_micro_batches)
        self.weights = stage_weights(batches, costs.gradient_reduce_overlap, costs.parameter_gather_overlap)
        # Stages behind the first: only the micro-batch is on every path.
        self.inner_weights = np.array([1.0, 1.0, 0.0, 0.0, 0.0])
        blocked = costs.send_time if costs.is_send_blocking else np.zeros_like(costs.send_time)
        before = np.concatenate([[0.0], blocked[:-1]])
        # Sends that hold the stage on every micro-batch, and those a micro-batch waits for on its way.
        self._held = batches * (blocked + before)
        self._way = 2.0 * np.concatenate([[0.0], np.cumsum(costs.send_time)[:-1]]) - before
        self._batches = batches

    def lower_bound(self) -> float:
        """Return a lower bound of the iteration time of every assignment, inf when a stage cannot fit [s]."""
        least = [stage.lower_bound(self.inner_weights) for stage in self.stages[1:]]
        first = self.stages[0].lower_bound(self.weights)
        once = self.stages[0].lower_bound(self._once_weights())
        return self._bound(first, once, np.array(least))

    def best(self, limit: float) -> PipelineChoice:
        """Return the fastest assignment if it is faster than ``limit`` [s]."""
        nothing = PipelineChoice(counts=None, iteration_time=np.inf, is_optimal=True)
        fastest: list[StageOptions] = []
        least = np.array([stage.lower_bound(self.inner_weights) for stage in self.stages[1:]])
        once = self.stages[0].lower_bound(self._once_weights())
        first = self.stages[0].lower_bound(self.weights)
        for index, stage in enumerate(self.stages):
            if self._bound(first, once, least) >= limit:
                return nothing
            weights = self.inner_weights if index else self.weights
            found = stage.best(weights, self._stage_limit(index, limit, once, least), _MOST_LABELS)
            if found is None:
                return PipelineChoice(counts=None, iteration_time=np.inf, is_optimal=False)
            if not len(found.counts):
                return nothing
            fastest.append(found)
            value = float(found.costs[0] @ weights)
            if index:
                least[index - 1] = value
            else:
                first = value
        bound = self._bound(first, once, least)
        if bound >= limit:
            return nothing
        seconds = self.simulated(np.stack([options.costs[0] for options in fastest]))
        choice = PipelineChoice(
            counts=tuple(options.counts[0] for options in fastest),
            iteration_time=seconds,
            is_optimal=seconds <= bound * (1.0 + _TOLERANCE),
        )
        if not choice.is_optimal:
            choice = self._widened(choice, bound, min(limit, seconds), once, least)
        if choice.iteration_time >= limit:
            return replace(nothing, is_optimal=choice.is_optimal)
        return choice

    def simulated(self, costs: FloatArray) -> float:
        """Return the iteration time of stages that cost so much, shape ``(num_stages, 5)`` [s]."""
        filled = replace(
            self.costs,
            forward_time=costs[:, FORWARD],
            backward_time=costs[:, BACKWARD],
            gradient_reduce_time=costs[:, REDUCE],
            parameter_gather_time=costs[:, GATHER],
            optimizer_time=costs[:, OPTIMIZER],
        )
        return iteration_time(filled, self.schedule)

    def _widened(
        self, choice: PipelineChoice, bound: float, limit: float, once: float, least: FloatArray
    ) -> PipelineChoice:
        """Combine Pareto-optimal assignments within a widening gap above the bound."""
        gap = _FIRST_GAP * bound
        while True:
            reach = min(bound + gap, limit)
            options = []
            for index, stage in enumerate(self.stages):
                weights = self.inner_weights if index else self.weights
                found = stage.options(weights, self._stage_limit(index, reach, once, least), _MOST_LABELS)
                if found is None:
                    return choice
                options.append(found)
            combined = _Combination(self.simulated, options, choice.iteration_time)
            is_complete = combined.run()
            if combined.counts is not None and combined.iteration_time < choice.iteration_time:
                choice = PipelineChoice(
                    counts=combined.counts, iteration_time=combined.iteration_time, is_optimal=False
                )
            if not is_complete:
                return choice
            # Whatever is faster than this uses none but the assignments that were combined.
            if choice.iteration_time <= reach or reach >= limit:
                return replace(choice, is_optimal=True)
            gap *= _WIDENING

    def _bound(self, first: float, once: float, least: FloatArray) -> float:
        """Return the longest path: ``first`` alone, or through the first stage (``once``) and another."""
        fixed = self.costs.fixed_time
        if not len(least):
            return first + self._held[0] + fixed
        ramps = np.concatenate([[0.0], np.cumsum(least)[:-1]])
        through = once + ramps + self._way[1:] + self._batches * least + self._held[1:]
        return float(max(first + self._held[0], through.max()) + fixed)

    def _stage_limit(self, index: int, limit: float, once: float, least: FloatArray) -> float:
        """Return the most a stage may cost, by its own weights, in an iteration below the limit."""
        if index == 0:
            return limit - self.costs.fixed_time - self._held[0]
        others = once + least[: index - 1].sum() + self._way[index] + self._held[index]
        return float((limit - self.costs.fixed_time - others) / self._batches)

    def _once_weights(self) -> FloatArray:
        """Return what the first stage counts on a path through another: one micro-batch and its synchronisation."""
        return np.concatenate([[1.0, 1.0], self.weights[REDUCE:]])


class _Combination:
    """Depth-first choice of one option per stage."""

    def __init__(
        self, simulated: Callable[[FloatArray], float], options: list[StageOptions], best: float
    ) -> None:
        self._simulated = simulated
        self._options = [each for each in options if len(each.counts)]
        self._is_possible = len(self._options) == len(options)
        self.iteration_time = best
        self.counts: tuple[NDArray[np.int64], ...] | None = None
        self._num_simulated = 0

    def run(self) -> bool:
        """Search; return whether the search ended before its limit."""
        if not self._is_possible:
            return True
        ideal = np.stack([options.costs.min(axis=0) for options in self._options])
        return self._descend(0, ideal, ())

    def _descend(self, stage: int, costs: FloatArray, chosen: tuple[int, ...]) -> bool:
        if self._num_simulated >= _MOST_SIMULATED:
            return False
        self._num_simulated += 1
        seconds = self._simulated(costs)
        if seconds >= self.iteration_time * (1.0 - _TOLERANCE):
            return True
        if stage == len(self._options):
            self.iteration_time = seconds
            self.counts = tuple(
                options.counts[row] for options, row in zip(self._options, chosen, strict=True)
            )
            return True
        options = self._options[stage]
        order = np.argsort(options.costs[:, FORWARD] + options.costs[:, BACKWARD], kind="stable")
        for row in order:
            tried = costs.copy()
            tried[stage] = options.costs[row]
            if not self._descend(stage + 1, tried, (*chosen, int(row))):
                return False
        return True
