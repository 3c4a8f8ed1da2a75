"""The best assignment of strategies to the layers of all stages of one pipeline.

Every stage is assigned so that it is as fast as it can be, and so is the stage of the longest path by what it counts
there; where the simulated schedule meets the bound of the paths, it is the optimum. Elsewhere all Pareto-optimal
assignments of each stage that a better plan could use are combined depth first: stages not chosen yet count with
the least of everything, which the schedule, monotone in all its durations, turns into a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.search.pipeline_paths import PipelinePaths
from meshwright.planner.search.stage_options import StageLimit, best_option, pareto_options
from meshwright.planner.search.stage_problem import (
    BACKWARD,
    FORWARD,
    GATHER,
    OPTIMIZER,
    REDUCE,
    StageOptions,
    StageProblem,
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


_NOTHING = PipelineChoice(counts=None, iteration_time=np.inf, is_optimal=True)
_UNKNOWN = replace(_NOTHING, is_optimal=False)


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
        self.paths = PipelinePaths(costs)
        self.weights = self.paths.weights
        # Least costs of the stages, by linear relaxation until a stage is solved: on their own paths, and on others'.
        self._own = [
            [stage.lower_bound(path.weights) for path in paths]
            for stage, paths in zip(stages, self.paths.stages, strict=True)
        ]
        self._once = stages[0].lower_bound(self.paths.once_weights)
        self._way = np.array([stage.lower_bound(self.paths.way_weights) for stage in stages])

    def lower_bound(self) -> float:
        """Return a lower bound of the iteration time of every assignment, inf when a stage cannot fit [s]."""
        return self.paths.bound(self._own, self._once, self._way)

    def best(self, limit: float) -> PipelineChoice:
        """Return the fastest assignment if it is faster than ``limit`` [s]."""
        fastest: list[StageOptions] = []
        for index, stage in enumerate(self.stages):
            weights = self.paths.way_weights if index else self.weights
            if self.lower_bound() >= limit:
                return _NOTHING
            # The first path of a stage counts nothing but its micro-batches.
            scale = 1.0 if index == 0 else float(self.costs.num_micro_batches)
            found = best_option(stage, weights, self._limits(index, limit)[0].limit / scale, _MOST_LABELS)
            if found is None:
                return _UNKNOWN
            if not len(found.counts):
                return _NOTHING
            fastest.append(found)
            value = float(found.costs[0] @ weights)
            self._own[index][0] = value * scale
            if index:
                self._way[index] = value
        choice = self._simulated_choice(fastest)
        choice = self._tightened(choice, fastest, limit)
        if not choice.is_optimal and self.lower_bound() < limit:
            choice = self._widened(choice, min(limit, choice.iteration_time))
        if self.lower_bound() >= limit:
            return _NOTHING
        return (
            choice if choice.iteration_time < limit else replace(choice, counts=None, iteration_time=np.inf)
        )

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

    def _limits(self, index: int, limit: float) -> list[StageLimit]:
        """Return the most a stage may cost on each of its paths in an iteration within the limit."""
        return [
            StageLimit(path.weights, limit - self.paths.others(index, path, self._once, self._way))
            for path in self.paths.stages[index]
        ]

    def _simulated_choice(self, options: list[StageOptions]) -> PipelineChoice:
        """Return the first option of every stage with its simulated time."""
        seconds = self.simulated(np.stack([each.costs[0] for each in options]))
        return PipelineChoice(
            counts=tuple(each.counts[0] for each in options),
            iteration_time=seconds,
            is_optimal=seconds <= self.lower_bound() * (1.0 + _TOLERANCE),
        )

    def _tightened(self, choice: PipelineChoice, fastest: list[StageOptions], limit: float) -> PipelineChoice:
        """Solve the stage of the longest path by what it counts there, until the longest path is one of those."""
        solved = {(index, 0) for index in range(len(self.stages))}
        while not choice.is_optimal and self.lower_bound() < limit:
            index, number = self.paths.longest(self._own, self._once, self._way)
            if (index, number) in solved:
                break
            solved.add((index, number))
            weights = self.paths.stages[index][number].weights
            found = best_option(self.stages[index], weights, np.inf, _MOST_LABELS)
            if found is None:
                break
            self._own[index][number] = float(found.costs[0] @ weights)
            other = self._simulated_choice([*fastest[:index], found, *fastest[index + 1 :]])
            if other.iteration_time < choice.iteration_time:
                choice = other
            is_optimal = choice.iteration_time <= self.lower_bound() * (1.0 + _TOLERANCE)
            choice = replace(choice, is_optimal=is_optimal)
        return choice

    def _widened(self, choice: PipelineChoice, limit: float) -> PipelineChoice:
        """Combine Pareto-optimal assignments within a widening gap above the bound."""
        bound = self.lower_bound()
        gap = _FIRST_GAP * bound
        while True:
            reach = min(bound + gap, limit)
            options = []
            for index, stage in enumerate(self.stages):
                found = pareto_options(stage, self._limits(index, reach), _MOST_LABELS)
                if found is None:
                    return choice
                options.append(found)
            combined = _Combination(self.simulated, options, choice.iteration_time)
            is_complete = combined.run()
            if combined.counts is not None:
                choice = PipelineChoice(
                    counts=combined.counts, iteration_time=combined.iteration_time, is_optimal=False
                )
            if not is_complete:
                return choice
            # Whatever is faster than this uses none but the assignments that were combined.
            if choice.iteration_time <= reach or reach >= limit:
                return replace(choice, is_optimal=True)
            gap *= _WIDENING


class _Combination:
    """Depth-first choice of one option per stage."""

    def __init__(
        self, simulated: Callable[[FloatArray], float], options: list[StageOptions], best: float
    ) -> None:
        self._simulated = simulated
        self._options = options
        self.iteration_time = best
        self.counts: tuple[NDArray[np.int64], ...] | None = None
        self._num_simulated = 0

    def run(self) -> bool:
        """Search; return whether the search ended before its limit."""
        if not all(len(each.counts) for each in self._options):
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
