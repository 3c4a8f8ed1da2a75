"""Exact schedules, most promising plans first, until none of the plans left can be among the best."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from meshwright.costmodels.iteration import uniform_costs
from meshwright.costmodels.memory import peak_memory
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns, Schedules
from meshwright.planner.export import EXPORTERS
from meshwright.planner.feasibility import STATE_AXES
from meshwright.planner.objectives import objective_values
from meshwright.planner.search.base import SearchRequest
from meshwright.planner.search.funnel import Bounded
from meshwright.planner.space import plan_of_row
from meshwright.planner.space_block import SpaceBlock
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.training.costs import IterationCosts
from meshwright.simcore.training.iteration import iteration_time

__all__ = ["SimulatedPlan", "Simulation", "without_noise"]

# Schedules simulated at least where there are as many plans, and at most, relaxed ones included.
NUM_SIMULATED = 100
MOST_SIMULATED = 5_000
# Plans costed at once.
_BATCH = 32
# Values that agree to this many digits are a tie: rounding noise must not rank plans.
_TIE_DIGITS = 9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimulatedPlan:
    """A plan with its exact time, its place in the space, and what ranks it.

    Parameters
    ----------
    plan : ParallelPlan
        The plan.
    block, row : int
        Its place in the space.
    seconds, bound : float
        Simulated time of an iteration, and the closed-form bound that brought the plan here [s].
    value : float
        The objective.
    memory : float
        Bytes of the fullest rank.
    """

    plan: ParallelPlan
    block: int
    row: int
    seconds: float
    bound: float
    value: float
    memory: float


class Simulation:
    """Simulates plans in the order of their bounds.

    The bounds of schedules that split their backwards or go there and back are loose. Before such a plan is
    simulated, its schedule is, as if the plan sharded and offloaded nothing and synchronised in no time: all plans
    that differ in nothing else take at least as long, so they go to the back of the queue together.

    Parameters
    ----------
    request : SearchRequest
        The search.
    blocks : Sequence[SpaceBlock]
        The space.
    rejections : dict[str, int]
        Added to where the export target refuses a plan.
    known, relaxed : dict[tuple[int, int], float]
        Times of plans by block and row [s], and bounds of the objective by block and group, that were simulated
        before; added to in place.
    """

    def __init__(
        self,
        request: SearchRequest,
        blocks: Sequence[SpaceBlock],
        rejections: dict[str, int],
        known: dict[tuple[int, int], float],
        relaxed: dict[tuple[int, int], float],
    ) -> None:
        self.request, self.blocks, self.rejections = request, blocks, rejections
        self.known, self.relaxed = known, relaxed
        self.simulated: list[SimulatedPlan] = []
        self.num_refused = 0
        self.num_evaluated = 0
        self._values: list[float] = []
        self._is_relaxed: set[tuple[int, int]] = set()
        self._queue: _Queue | None = None

    @property
    def least_left(self) -> float:
        """Lower bound of the objective of the plans that were given and not simulated; infinite without any."""
        return np.inf if self._queue is None else self._queue.least

    def best(self, place: int = 1) -> float:
        """Return the objective of the plan at some place of the ranking so far, infinite where there is none."""
        return self._values[place - 1] if place <= len(self._values) else np.inf

    @property
    def is_settled(self) -> bool:
        """Whether enough was simulated and no plan that was given and left can be among those asked for."""
        return not self._num_missing and self.least_left >= self.best(self.request.num_plans)

    @property
    def is_exhausted(self) -> bool:
        """Whether as many schedules were simulated as ever are."""
        return self.num_evaluated >= MOST_SIMULATED

    def run(self, kept: Bounded, is_over: Callable[[], bool], progress: Callable[[int, int], None]) -> None:
        """Simulate the most promising of some plans.

        Parameters
        ----------
        kept : Bounded
            Plans, in the order of the space.
        is_over : Callable[[], bool]
            Whether time is up. As many plans as are asked for are simulated all the same.
        progress : Callable[[int, int], None]
            Told how many plans were simulated, and how many are at least.
        """
        self._queue = queue = _Queue(self.request, self.blocks, kept)
        while not self.is_settled:
            if self._must_stop or (self._has_enough and is_over()):
                break
            batch = queue.pop(max(_BATCH, self._num_missing))
            if not batch:
                break
            first_loose = next(
                (place for place, index in enumerate(batch) if self._is_loose(queue, index)), None
            )
            if first_loose is None:
                queue.push(self._simulate(queue, batch), self.relaxed)
            elif first_loose:
                queue.push([*self._simulate(queue, batch[:first_loose]), *batch[first_loose:]], self.relaxed)
            else:
                self._relax(queue, [index for index in batch[:_BATCH] if self._is_loose(queue, index)])
                queue.push(batch, self.relaxed)
            progress(len(self.simulated), self._num_wanted)

    @property
    def _has_enough(self) -> bool:
        """Whether there are as many plans to rank as were asked for."""
        return len(self.simulated) >= self.request.num_plans

    @property
    def _must_stop(self) -> bool:
        return self.is_exhausted and self._has_enough

    @property
    def _num_wanted(self) -> int:
        return max(NUM_SIMULATED, self.request.num_plans)

    @property
    def _num_missing(self) -> int:
        """Plans that are simulated in any case."""
        return max(0, self._num_wanted - len(self.simulated))

    def _is_loose(self, queue: _Queue, index: int) -> bool:
        """Return whether the schedule of a plan is to be simulated alone first."""
        is_relaxed = queue.group(index) in self._is_relaxed or self.is_exhausted
        return queue.is_loose(index) and not is_relaxed

    def _simulate(self, queue: _Queue, batch: Sequence[int]) -> list[int]:
        """Simulate plans in order until the rest is not worth it, and return the rest."""
        plans = {index: plan_of_row(self.request.job, queue.columns, index) for index in batch}
        target = self.request.limits.target
        if target is not None:
            exporter = EXPORTERS[target]
            refused = [index for index in batch if exporter.unsupported(self.request.job, plans[index])]
            batch = [index for index in batch if index not in refused]
            self.rejections["target"] += len(refused)
            self.num_refused += len(refused)
        unknown = [index for index in batch if queue.place(index) not in self.known]
        costs = dict(zip(unknown, self._costs([plans[index] for index in unknown]), strict=True))

        def timed(index: int) -> float:
            place = queue.place(index)
            if place not in self.known:
                self.known[place] = iteration_time(costs[index], plans[index].schedule)
            return self.known[place]

        # Plans of one schedule and size share its structure: those that are simulated in any case go together.
        certain = batch[: self._num_missing]
        for index in sorted(certain, key=lambda index: _size(plans[index], costs.get(index))):
            timed(index)
        for done, index in enumerate(batch):
            is_beaten = queue.values[index] >= self.best(self.request.num_plans)
            if (not self._num_missing and is_beaten) or self._must_stop:
                return list(batch[done:])
            self._add(queue, index, plans[index], timed(index))
            self.num_evaluated += 1
        return []

    def _add(self, queue: _Queue, index: int, plan: ParallelPlan, seconds: float) -> None:
        block, row = queue.place(index)
        value = seconds * float(queue.weights[index])
        bisect.insort(self._values, value)
        self.simulated.append(
            SimulatedPlan(
                plan=plan,
                block=block,
                row=row,
                seconds=seconds,
                bound=float(queue.bounds[index]),
                value=value,
                memory=float(queue.memory[index]),
            )
        )

    def _relax(self, queue: _Queue, indices: Sequence[int]) -> None:
        """Simulate the schedules alone of some plans."""
        first = {queue.group(index): index for index in reversed(indices)}
        self._is_relaxed.update(first)
        # What a resumed search knows counts all the same: it must not go further than one that was never cut.
        self.num_evaluated += len(first)
        first = {group: index for group, index in first.items() if group not in self.relaxed}
        plans = [
            replace(
                plan_of_row(self.request.job, queue.columns, index),
                sharding="none",
                sharding_group=None,
                optimizer_offload="none",
                optimizer_offload_fraction=1.0,
                parameter_offload="none",
                activation_offload=False,
            )
            for index in first.values()
        ]
        for (group, index), costs, plan in zip(first.items(), self._costs(plans), plans, strict=True):
            nothing = np.zeros_like(costs.forward_time)
            alone = replace(
                costs,
                gradient_reduce_time=nothing,
                parameter_gather_time=nothing,
                optimizer_time=np.zeros_like(costs.optimizer_time),
            )
            self.relaxed[group] = iteration_time(alone, plan.schedule) * float(queue.weights[index])

    def _costs(self, plans: list[ParallelPlan]) -> list[IterationCosts]:
        return uniform_costs(self.request.context, plans) if plans else []


class _Queue:
    """Plans that wait for simulation: the lowest bound first, then the least memory, then the order of the space."""

    def __init__(self, request: SearchRequest, blocks: Sequence[SpaceBlock], kept: Bounded) -> None:
        self.columns: PlanColumns = kept.columns(blocks)
        self.bounds, self.values = kept.bound, kept.value.copy()
        self.weights = objective_values(request.objective, self.columns, np.ones(len(kept)))
        self.memory = peak_memory(request.context, self.columns)
        self._block, self._row = kept.block, kept.row
        self._groups = _groups(blocks, kept)
        self._is_loose = (self.columns.schedule > Schedules.INTERLEAVED) & (self.columns.pp > 1)
        self._unit = tie_unit(self.values)
        self._heap = [self._key(index) for index in range(len(kept))]
        heapq.heapify(self._heap)

    def _key(self, index: int) -> tuple[float, float, int]:
        return round(float(self.values[index]) / self._unit), float(self.memory[index]), index

    @property
    def least(self) -> float:
        """The lowest bound of the objective among those that wait."""
        return float(self.values[self._heap[0][-1]]) if self._heap else np.inf

    def pop(self, count: int) -> list[int]:
        """Take the first plans from the queue."""
        return [heapq.heappop(self._heap)[-1] for _ in range(min(count, len(self._heap)))]

    def push(self, indices: Iterable[int], at_least: dict[tuple[int, int], float]) -> None:
        """Put plans back, with what their groups take at least."""
        for index in indices:
            self.values[index] = max(self.values[index], at_least.get(self.group(index), 0.0))
            heapq.heappush(self._heap, self._key(index))

    def place(self, index: int) -> tuple[int, int]:
        """Return block and row of a plan."""
        return int(self._block[index]), int(self._row[index])

    def group(self, index: int) -> tuple[int, int]:
        """Return what plans share that differ in sharding and offload only."""
        return int(self._block[index]), int(self._groups[index])

    def is_loose(self, index: int) -> bool:
        """Return whether the closed-form bound says little about the plan's schedule."""
        return bool(self._is_loose[index])


def _size(plan: ParallelPlan, costs: IterationCosts | None) -> tuple[str, int, int, int]:
    """Return what the structure of an iteration depends on."""
    return plan.schedule, plan.pp, plan.vpp, 0 if costs is None else costs.num_micro_batches


def _groups(blocks: Sequence[SpaceBlock], kept: Bounded) -> np.ndarray:
    """Return the number of each plan in its block's product of all axes but those of the states."""
    groups = np.zeros(len(kept), dtype=np.int64)
    for number in np.unique(kept.block):
        block, chosen = blocks[number], kept.block == number
        options = np.unravel_index(kept.row[chosen], block.shape)
        shared = [place for place, name in enumerate(block.axes) if name not in STATE_AXES]
        groups[chosen] = np.ravel_multi_index(
            [options[place] for place in shared], [block.shape[place] for place in shared]
        )
    return groups


def tie_unit(values: FloatColumn) -> float:
    """Return the difference below which values are equal."""
    return (
        float(10.0 ** (np.floor(np.log10(values.min(initial=np.inf))) - _TIE_DIGITS)) if len(values) else 1.0
    )


def without_noise(values: FloatColumn) -> FloatColumn:
    """Round to the digits that carry meaning, so that equal plans tie and memory decides."""
    unit = tie_unit(values)
    rounded: FloatColumn = np.round(values / unit) * unit
    return rounded
