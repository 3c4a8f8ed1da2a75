"""The space of layer-wise plans: pipelines, micro-batches and ends, each with the cost of every layer strategy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.layer_strategies import (
    BoundaryMemory,
    StrategyMemory,
    StrategyTimes,
    boundary_memory,
    boundary_parameters_per_stage,
    group_sync_times,
    relayout_times,
    strategy_memory,
    strategy_times,
    without_layers,
)
from meshwright.costmodels.memory import layer_activations
from meshwright.costmodels.micro_batch import MicroBatchTimes, micro_batch_times
from meshwright.costmodels.parameters import RankParameters
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.costmodels.stage import fixed_time, overlaps
from meshwright.planner.search.pipeline_strategies import pipeline_strategies
from meshwright.planner.search.relayout_tours import RelayoutTours
from meshwright.planner.search.stage_problem import REDUCE, StageProblem, stage_weights
from meshwright.planner.space import SearchLimits
from meshwright.simcore.domain.layer_groups import LayerGroup
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.training.costs import IterationCosts

__all__ = ["Configuration", "PipelineSpace", "pipeline_spaces"]


@dataclass(frozen=True, slots=True, eq=False)
class _Ends:
    """What stages hold and run besides layers, by the strategy of embedding and head; one kind of stage."""

    memory: BoundaryMemory
    forward: NDArray[np.float64]
    backward: NDArray[np.float64]


class PipelineSpace:
    """Every layer strategy of one number of GPUs and stages, for every micro-batch.

    Parameters
    ----------
    context : CostContext
        Job and software.
    limits : SearchLimits
        Says how much memory stays free.
    plans : Sequence[ParallelPlan]
        The strategies, each as the uniform plan that uses it throughout.
    columns : PlanColumns
        The same.
    """

    def __init__(
        self,
        context: CostContext,
        limits: SearchLimits,
        plans: Sequence[ParallelPlan],
        columns: PlanColumns,
    ) -> None:
        self.context, self.plans, self.columns = context, plans, columns
        self.pp, self.layers_per_stage = plans[0].pp, plans[0].layers_per_stage
        capacity = context.gpu.memory_bytes * (1.0 - limits.memory_headroom)
        self.capacity = capacity / (1.0 + context.software.fragmentation)
        self.times: StrategyTimes = strategy_times(context, columns)
        self.memory: StrategyMemory = strategy_memory(context, columns, self.pp)
        pairs = list(dict.fromkeys((plan.tp, plan.sharding) for plan in plans))
        self.group = np.array([pairs.index((plan.tp, plan.sharding)) for plan in plans])
        self._members = [int(np.flatnonzero(self.group == index)[0]) for index in range(len(pairs))]
        self._kept = self.memory.kept
        self._fixed = fixed_time(context, columns)
        words = [(plan.tp, plan.sequence_parallel) for plan in plans]
        self._layouts = list(dict.fromkeys(words))
        self._layout = np.array([self._layouts.index(word) for word in words])
        self._relayouts: dict[int, NDArray[np.float64]] = {}
        self._tours: dict[tuple[int, int], RelayoutTours] = {}

    def configurations(self) -> Iterator[Configuration]:
        """Yield every micro-batch and every strategy of embedding and head."""
        sequences = np.array([plan.dp * plan.micro_batch_size for plan in self.plans])
        has_layers = bool(self.context.model.num_mtp_layers)
        for size in np.unique(sequences):
            rows = np.flatnonzero(sequences == size)
            ends: dict[tuple[object, ...], int] = {}
            for row in rows.tolist():
                plan = self.plans[row]
                # Embedding and head recompute nothing, but prediction modules are layers.
                recompute = plan.recompute if has_layers else ""
                if not (has_layers and plan.recompute_modules):
                    ends.setdefault((plan.tp, plan.sequence_parallel, plan.sharding, recompute), row)
            for own in ends.values():
                yield Configuration(self, rows, own)

    def kind(self, stage: int) -> str:
        """Return what a stage holds besides layers: ``alone``, ``first``, ``last`` or ``inner``."""
        if self.pp == 1:
            return "alone"
        return "first" if stage == 0 else "last" if stage == self.pp - 1 else "inner"

    def problem(self, rows: NDArray[np.int64], ends: int, stage: int) -> StageProblem:
        """Return the choice of strategies for one stage.

        Parameters
        ----------
        rows : NDArray[np.int64]
            Strategies to choose from, all of one micro-batch.
        ends : int
            Strategy of embedding and head.
        stage : int
            Pipeline stage.
        """
        kind = self.kind(stage)
        boundary = self._ends[kind]
        layers = self.layers_per_stage[stage]
        sync = self._sync["inner"][:, : layers + 1].copy()
        own = self.group[ends]
        sync[own] = self._sync[kind][own, : layers + 1]
        return StageProblem(
            num_layers=layers,
            layer_time=np.column_stack([self.times.forward[rows], self.times.backward[rows]]),
            layer_memory=self._kept[rows, stage],
            working_memory=self.memory.working[rows],
            layout=self._layout[rows],
            group=self.group[rows],
            sync_time=sync,
            boundary_time=np.array([boundary.forward[ends], boundary.backward[ends]]),
            boundary_working_memory=float(boundary.memory.working[ends]),
            memory_budget=self.capacity - float(boundary.memory.held.total[ends]),
            tours=self._tours_from(ends),
        )

    def fixed_time(self, ends: int) -> float:
        """Return what an iteration takes besides its stages [s]."""
        return float(self._fixed[ends])

    def _tours_from(self, ends: int) -> RelayoutTours:
        """Return the tours through the layouts at one micro-batch, from that of embedding and head."""
        plan, start = self.plans[ends], int(self._layout[ends])
        key = (plan.dp * plan.micro_batch_size, start)
        if key not in self._tours:
            if key[0] not in self._relayouts:
                self._relayouts[key[0]] = relayout_times(self.context, plan, self._layouts)
            self._tours[key] = RelayoutTours(self._relayouts[key[0]], start)
        return self._tours[key]

    @cached_property
    def _ends(self) -> dict[str, _Ends]:
        times: MicroBatchTimes = micro_batch_times(self.context, self.columns)
        first, last = (
            (times.embedding_forward, times.embedding_backward),
            (times.head_forward, times.head_backward),
        )
        none = (np.zeros_like(first[0]), np.zeros_like(first[0]))
        both = (first[0] + last[0], first[1] + last[1])
        return {
            kind: _Ends(self._boundary_memory(stage, embedding, head), *seconds)
            for kind, stage, embedding, head, seconds in (
                ("alone", 0, 1.0, 1.0, both),
                ("first", 0, 1.0, 0.0, first),
                ("inner", min(1, self.pp - 1), 0.0, 0.0, none),
                ("last", self.pp - 1, 0.0, 1.0, last),
            )
        }

    def _boundary_memory(self, stage: int, embedding: float, head: float) -> BoundaryMemory:
        one = np.ones(len(self.plans))
        return boundary_memory(self.context, self.columns, stage * one, embedding * one, head * one)

    @cached_property
    def _sync(self) -> dict[str, NDArray[np.float64]]:
        """Return the times once per iteration by kind of stage, ``(num_groups, num_layers + 1, 3)`` [s]."""
        depth = max(self.layers_per_stage) + 1
        columns = self.columns.take(np.array(self._members))
        layer = layer_activations(self.context, columns).parameters
        ends = [boundary_parameters_per_stage(self.context, self.plans[row]) for row in self._members]
        kinds = {"alone": 0} if self.pp == 1 else {"first": 0, "last": self.pp - 1}
        group = np.repeat(np.arange(len(self._members)), depth)
        count = np.tile(np.arange(depth, dtype=np.float64), len(self._members))
        held = layer.take(group).scaled(count)
        tables = {"inner": held}
        for kind, stage in kinds.items():
            tables[kind] = held + _joined([each.take(np.array([stage])) for each in ends]).take(group)
        rows = columns.take(np.tile(group, len(tables)))
        times = group_sync_times(self.context, rows, _joined(list(tables.values())))
        shaped = times.reshape(len(tables), len(self._members), depth, 3)
        return dict(zip(tables, shaped, strict=True))


def pipeline_spaces(
    context: CostContext, limits: SearchLimits, frame: ParallelPlan, num_gpus: int
) -> Iterator[PipelineSpace]:
    """Yield the layer-wise space of every number of stages and split of the layers over them.

    Parameters
    ----------
    context : CostContext
        Job and software.
    limits : SearchLimits
        The user's restrictions; they hold for every strategy as they do for the uniform plan that uses it.
    frame : ParallelPlan
        Degrees that all layers share: cp, ep, etp and how they communicate.
    num_gpus : int
        World size.
    """
    for plans, columns in pipeline_strategies(context, limits, frame, num_gpus):
        yield PipelineSpace(context, limits, plans, columns)


class Configuration:
    """One number of GPUs, stages and sequences per micro-batch, and one strategy of embedding and head."""

    def __init__(self, space: PipelineSpace, rows: NDArray[np.int64], ends: int) -> None:
        self.space, self.rows, self.ends = space, rows, ends

    @property
    def plan(self) -> ParallelPlan:
        """The uniform plan of embedding and head."""
        return self.space.plans[self.ends]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of an iteration."""
        return int(self.space.columns.num_micro_batches[self.ends])

    @property
    def overlaps(self) -> tuple[float, float]:
        """Shares of gradient reduction and parameter gather that may run beside compute."""
        return overlaps(self.space.context)

    @property
    def fixed_time(self) -> float:
        """What an iteration takes besides its stages [s]."""
        return self.space.fixed_time(self.ends)

    def quick_bound(self) -> float:
        """Return a lower bound of the iteration time from the first and the last stage alone, inf if none fits [s]."""
        weights = stage_weights(self.num_micro_batches, *self.overlaps)
        first = self.problem(0)
        bound = first.lower_bound(weights)
        if self.plan.pp > 1 and np.isfinite(bound):
            micro_batch = np.where(np.arange(len(weights)) < REDUCE, 1.0, 0.0)
            last = self.problem(self.plan.pp - 1).lower_bound(micro_batch)
            once = np.where(np.arange(len(weights)) < REDUCE, 1.0, weights)
            bound = max(bound, first.lower_bound(once) + self.num_micro_batches * last)
        return bound + self.fixed_time

    def problem(self, stage: int) -> StageProblem:
        """Return the choice of strategies for one stage."""
        return self.space.problem(self.rows, self.ends, stage)

    def costs_without_layers(self) -> IterationCosts:
        """Return the iteration of embedding and head alone, to be filled with stages."""
        return iteration_costs(self.space.context, without_layers(self.plan))

    def layered_plan(self, counts: Sequence[NDArray[np.int64]], weights: NDArray[np.float64]) -> ParallelPlan:
        """Return the plan with so many layers of each strategy on each stage; uniform when all are alike.

        Not where a stage holds no layers: a uniform plan is charged a running layer's memory there too.

        ``weights`` says which of several tours through the layouts a stage takes: the seconds forward and backward
        count for.
        """
        space, plan = self.space, self.plan
        groups: list[LayerGroup] = []
        for stage, count in enumerate(counts):
            groups += self._stage_groups(space.problem(self.rows, self.ends, stage), count, weights)
        alike = {replace(group, num_layers=1) for group in groups}
        if len(alike) == 1 and all(count.any() for count in counts):
            only = next(iter(alike))
            is_own = (only.tp, only.sequence_parallel, only.sharding) == (
                plan.tp,
                plan.sequence_parallel,
                plan.sharding,
            )
            if is_own:
                return replace(plan, recompute=only.recompute, recompute_modules=only.recompute_modules)
        own = plan.recompute if space.context.model.num_mtp_layers else "none"
        return replace(plan, recompute=own, recompute_modules=(), layer_groups=tuple(groups))

    def _stage_groups(
        self, problem: StageProblem, counts: NDArray[np.int64], weights: NDArray[np.float64]
    ) -> list[LayerGroup]:
        used = np.flatnonzero(counts)
        bits = problem.tours.bits[problem.layout[used]]
        tour = problem.tours.order(int(np.bitwise_or.reduce(bits, initial=0)), weights)
        # The ends' own layout comes first: that is where the activations are.
        place = {layout: index for index, layout in enumerate(tour)}
        order = sorted(used, key=lambda index: (place.get(int(problem.layout[index]), -1), index))
        return [
            LayerGroup(
                num_layers=int(counts[index]),
                tp=plan.tp,
                sequence_parallel=plan.sequence_parallel,
                sharding=plan.sharding,  # type: ignore[arg-type]  # strategies are built from its words
                recompute=plan.recompute,
                recompute_modules=plan.recompute_modules,
            )
            for index in order
            for plan in (self.space.plans[int(self.rows[index])],)
        ]


def _joined(parts: Sequence[RankParameters]) -> RankParameters:
    return RankParameters(
        **{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(RankParameters)}
    )
