"""Plans of given choices on islands of different GPUs: who takes how many layers or micro-batches, and who can hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.iteration import uniform_costs
from meshwright.costmodels.memory import layer_activations, peak_memory, stage_memory
from meshwright.costmodels.mixed import mixed_costs, stages_of_virtual
from meshwright.costmodels.partition import balanced_shares, stage_work
from meshwright.costmodels.plan_columns import V_SHAPED, FloatColumn, IntColumn, PlanColumns, stage_layers
from meshwright.errors import SpecError
from meshwright.planner.axes import divisors
from meshwright.planner.constraints import allowed_memory
from meshwright.planner.search.island_ways import IslandWay
from meshwright.planner.space import SearchLimits, plan_of_row
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import SCHEDULES_KNOWN, ParallelPlan
from meshwright.simcore.schedules import SCHEDULES
from meshwright.simcore.training.costs import IterationCosts
from meshwright.simcore.training.iteration import iteration_time

__all__ = [
    "can_schedule",
    "device_work",
    "most_layers",
    "promised_time",
    "replicas_that_fit",
    "replicated_plans",
    "share_unit",
    "staged_plans",
]


def most_layers(
    context: CostContext, columns: PlanColumns, way: IslandWay, limits: SearchLimits
) -> IntColumn:
    """Return how many layers the GPU of each stage can hold, ``(num_plans, pp)``; all plans have as many stages.

    Memory grows evenly with the layers of a stage, so two points of it say where the GPU is full.
    """
    pp = len(way.kinds)
    ones = np.ones(len(columns))
    is_folded = np.isin(columns.schedule, [SCHEDULES_KNOWN.index(name) for name in V_SHAPED])
    most = np.zeros((len(columns), pp), dtype=np.int64)
    for kind in sorted(set(way.kinds)):
        own = context.kinds[kind]
        allowed = allowed_memory(own, limits) / (1.0 + own.software.fragmentation)
        activations = layer_activations(own, columns)
        for stage in (stage for stage, its in enumerate(way.kinds) if its == kind):
            has_embedding = ones if stage == 0 else 0.0 * ones
            has_head = np.where(is_folded, has_embedding, float(stage == pp - 1))
            one, two = (
                stage_memory(
                    own, columns, activations, stage * ones, layers * ones, has_embedding, has_head
                ).total
                for layers in (1.0, 2.0)
            )
            held = np.floor((allowed - one) / np.maximum(two - one, 1.0)) + 1.0
            most[:, stage] = np.clip(held, 0.0, context.model.num_layers)
    return most


def staged_plans(
    context: CostContext, job: TrainingJob, columns: PlanColumns, way: IslandWay, most: IntColumn
) -> list[ParallelPlan | None]:
    """Return plans with stages on islands, each stage with the layers that make the slowest stage fastest.

    Parameters
    ----------
    context, job : CostContext, TrainingJob
        Of the mixed cluster.
    columns : PlanColumns
        Choices; their own layers are not read.
    way : IslandWay
        Where the stages lie.
    most : IntColumn
        Layers that each stage can hold, ``(num_plans, pp)``.

    Returns
    -------
    list[ParallelPlan | None]
        None where the stages cannot hold the model.
    """
    work = {kind: stage_work(context.kinds[kind], columns) for kind in set(way.kinds)}
    seconds = np.stack([work[kind].layer for kind in way.kinds], axis=1)
    rows = [_Row(job, columns, row, most[row]) for row in range(len(columns))]
    first = {
        number: plan
        for number, row in enumerate(rows)
        if (plan := row.plan(way, seconds[number], np.zeros(len(way.kinds)))) is not None
    }
    plans: list[ParallelPlan | None] = [None] * len(columns)
    for (number, plan), costs in zip(first.items(), mixed_costs(context, list(first.values())), strict=True):
        # What stages do besides their layers (ends, sends they wait for) is known once there is a plan.
        layers = np.array(stage_layers(plan.layers_per_stage, plan.pp, plan.schedule))
        besides = device_work(plan, costs) - layers * seconds[number]
        plans[number] = rows[number].plan(way, seconds[number], besides)
    return plans


def device_work(plan: ParallelPlan, costs: IterationCosts) -> FloatColumn:
    """Return how long one micro-batch keeps the GPU of each stage busy, blocking sends included [s]."""
    stage_of = stages_of_virtual(plan, costs)
    each = costs.forward_time + costs.backward_time
    if costs.is_send_blocking:
        each = each + costs.send_time + np.concatenate([[0.0], costs.send_time[:-1]])
    # Several copies of the model share the micro-batches.
    result: FloatColumn = np.bincount(stage_of, each) / (stage_of.size // len(plan.layers_per_stage))
    return result


class _Row:
    """One row of the columns as a plan with stages on islands, whatever layers they hold."""

    def __init__(self, job: TrainingJob, columns: PlanColumns, row: int, most: IntColumn) -> None:
        self.num_layers, self.most = job.model.num_layers, most.tolist()
        self._plan = plan_of_row(job, columns, row)
        placement = SCHEDULES[self._plan.schedule].placement(self._plan.pp, self._plan.vpp)
        self._placement = placement.astype(np.int64)

    def plan(self, way: IslandWay, seconds: FloatColumn, besides: FloatColumn) -> ParallelPlan | None:
        """Return the plan whose slowest stage is fastest; None where the stages cannot hold the model."""
        layers = _layers_of_chunks(
            self.num_layers, self._placement, seconds.tolist(), besides.tolist(), self.most
        )
        if layers is None:
            return None
        return replace(self._plan, layers_per_stage=layers, device_mapping=way.device_mapping)


def _layers_of_chunks(
    num_layers: int,
    placement: NDArray[np.int64],
    seconds: Sequence[float],
    extra: Sequence[float],
    most: Sequence[int],
) -> tuple[int, ...] | None:
    """Return the layers of each virtual stage, at least one, those of a stage spread evenly over its chunks."""
    # One layer of each further chunk is given; the rest is shared out.
    given = placement.shape[1] - 1
    shares = balanced_shares(
        num_layers - given * len(placement),
        seconds,
        [own + given * each for own, each in zip(extra, seconds, strict=True)],
        [limit - given for limit in most],
    )
    if shares is None:
        return None
    layers = np.zeros(placement.size, dtype=np.int64)
    for stage, share in enumerate(shares):
        base, rest = divmod(share + given, placement.shape[1])
        # Later chunks of a stage hold fewer activations.
        layers[placement[stage]] = [
            base + (chunk >= placement.shape[1] - rest) for chunk in range(placement.shape[1])
        ]
    return tuple(int(count) for count in layers)


def replicas_that_fit(
    context: CostContext, columns: PlanColumns, way: IslandWay, limits: SearchLimits
) -> NDArray[np.bool_]:
    """Return which plans fit every kind of GPU that holds replicas of them, experts shared within a kind."""
    ranks, inner = columns.ep * columns.etp, columns.tp * columns.cp
    fits = np.isin(np.maximum(1, ranks // inner), _spans_within_kinds(way.kinds))
    for kind in set(way.kinds):
        own = context.kinds[kind]
        fits &= peak_memory(own, columns) <= allowed_memory(own, limits)
    return fits


def _spans_within_kinds(kinds: Sequence[int]) -> list[int]:
    """Return the numbers of neighbouring replicas that divide all replicas into groups of one kind each."""
    return [
        span
        for span in divisors(len(kinds))
        if all(len(set(kinds[first : first + span])) == 1 for first in range(0, len(kinds), span))
    ]


def replicated_plans(
    context: CostContext, job: TrainingJob, columns: PlanColumns, way: IslandWay
) -> list[ParallelPlan]:
    """Return plans with replicas on islands, each replica with the micro-batches that let all finish together.

    Replicas that exchange weights or tokens on every micro-batch run equally many.
    """
    plans = [
        replace(plan_of_row(job, columns, row), device_mapping=way.device_mapping)
        for row in range(len(columns))
    ]
    costs = {kind: uniform_costs(context.kinds[kind], plans) for kind in set(way.kinds)}
    for row, plan in enumerate(plans):
        if plan.sharding not in ("none", "zero1") or plan.ep * plan.etp > plan.tp * plan.cp:
            continue
        pace = {kind: _pace(plan, costs[kind][row]) for kind in costs}
        total, unit = job.workload.global_batch_size // plan.micro_batch_size, share_unit(plan)
        shares = balanced_shares(
            total // unit,
            [unit * pace[kind][0] for kind in way.kinds],
            [pace[kind][1] for kind in way.kinds],
        )
        if shares is not None and len(set(shares)) > 1:
            uneven = replace(plan, micro_batch_shares=tuple(unit * share for share in shares))
            plans[row] = uneven if can_schedule(uneven) else plan
    return plans


def share_unit(plan: ParallelPlan) -> int:
    """Return in what multiples a replica takes micro-batches: interleaved schedules run as many as stages at a time."""
    return plan.pp if plan.schedule == "interleaved_1f1b" else 1


def can_schedule(plan: ParallelPlan) -> bool:
    """Return whether the schedule can run every replica's share of the micro-batches."""
    schedule = SCHEDULES[plan.schedule]
    try:
        for share in set(plan.micro_batch_shares):
            schedule.check(plan.pp, plan.vpp * schedule.num_model_copies, share)
    except SpecError:
        return False
    return True


def _pace(plan: ParallelPlan, costs: IterationCosts) -> tuple[float, float]:
    """Return what one more micro-batch takes a replica, and what all of them take besides [s]."""
    each = float(device_work(plan, costs).max())
    whole = iteration_time(costs, plan.schedule)
    return each, max(0.0, whole - each * costs.num_micro_batches)


def promised_time(bounds: Sequence[FloatColumn], way: IslandWay) -> FloatColumn:
    """Return what plans would take if every stage or replica did as much as its kind can in the time [s].

    Parameters
    ----------
    bounds : Sequence[FloatColumn]
        Bounds of the plans if all GPUs were of one kind, for each kind.
    way : IslandWay
        Where they lie.
    """
    speed = np.sum([1.0 / bounds[kind] for kind in way.kinds], axis=0)
    result: FloatColumn = len(way.kinds) / speed
    return result
