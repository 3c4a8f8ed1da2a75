"""From a plan to what its iteration costs: the arrays that are simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.micro_batch import (
    LayerCost,
    MicroBatchTimes,
    layers_backward,
    layers_forward,
    micro_batch_times,
)
from meshwright.costmodels.parallelism.data import sync_times
from meshwright.costmodels.parallelism.pipeline import blocks_on_send, stage_send_time
from meshwright.costmodels.parallelism.vocab import vocab_parallel_time
from meshwright.costmodels.parameters import RankParameters
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns
from meshwright.costmodels.rank_layout import Hops
from meshwright.costmodels.stage import (
    fixed_time,
    leading_per_stage,
    optimizer_time,
    overlaps,
    virtual_stage_parameters,
)
from meshwright.costmodels.topology import costs_on_hosts, lies_apart, on_hosts
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.schedules import SCHEDULES
from meshwright.simcore.training.costs import IterationCosts

__all__ = ["iteration_costs", "uniform_costs"]


def iteration_costs(context: CostContext, plan: ParallelPlan) -> IterationCosts:
    """Return what one iteration of a plan costs, per virtual stage, ready to be simulated.

    On a mixed cluster these are the costs of the slowest replica.

    Raises
    ------
    SpecError
        If the batch does not divide into the plan's micro-batches.
    """
    if context.kinds:
        # Plans on several kinds of node are made of plans on one: that module builds on this one.
        from meshwright.costmodels.mixed import mixed_costs

        return mixed_costs(context, [plan])[0]
    if plan.layer_groups:
        # Layer-wise plans are made of uniform ones: that module builds on this one.
        from meshwright.costmodels.layer_groups import layer_group_costs

        return layer_group_costs(on_hosts(context, plan), plan)
    return uniform_costs(context, [plan])[0]


def uniform_costs(context: CostContext, plans: Sequence[ParallelPlan]) -> list[IterationCosts]:
    """Return what one iteration of each of some plans without layer groups costs.

    Every formula is evaluated once, over the virtual stages of all plans one after the other.

    Raises
    ------
    SpecError
        If the batch does not divide into a plan's micro-batches.
    """
    if any(lies_apart(context, plan) for plan in plans):
        # Every stage has links of its own: each is priced with these.
        return costs_on_hosts(context, plans, uniform_costs)
    columns = PlanColumns.from_plans(plans, context.workload.global_batch_size)
    layouts = [_Layout(context, plan) for plan in plans]
    owner = np.repeat(np.arange(len(plans)), [layout.placement.size for layout in layouts])
    of_plans = micro_batch_times(context, columns)
    times, edges = _of_rows(of_plans, owner), columns.take(owner)
    layers, leading, is_first, is_last = (
        np.concatenate([getattr(layout, name) for layout in layouts])
        for name in ("layers", "leading", "is_first", "is_last")
    )
    recomputed = np.minimum(layers, edges.recompute_layers.astype(np.float64))
    behind = layers - leading
    extra_forward, extra_backward = vocab_parallel_time(
        context, columns, of_plans.boundary_forward, of_plans.boundary_backward
    )
    send = _send_times(context, layouts, edges)
    received = [_received(context, part) for part in _split(send, layouts)]
    received_forward, received_backward = (np.concatenate(parts) for parts in zip(*received, strict=True))
    forward = (
        layers_forward(times, layers, leading)
        + is_first * times.embedding_forward
        + is_last * times.head_forward
        + extra_forward[owner]
        + received_forward
    )
    backward = (
        layers_backward(times, layers, leading, recomputed)
        + is_first * times.embedding_backward
        + is_last * times.head_backward
        + extra_backward[owner]
        + received_backward
    )
    parameters = [
        virtual_stage_parameters(context, layout.plan, part)
        for layout, part in zip(layouts, _split_columns(edges, layouts), strict=True)
    ]
    whole = _joined(parameters)
    moved = _joined([layout.on_first_chunk(each) for layout, each in zip(layouts, parameters, strict=True)])
    overlap_reduce, overlap_gather = overlaps(context)
    stages = columns.take(np.repeat(np.arange(len(plans)), [plan.pp for plan in plans]))
    window = np.concatenate(
        [
            part[layout.placement].sum(axis=1)
            for layout, part in zip(layouts, _split(backward, layouts), strict=True)
        ]
    )
    steps = optimizer_time(
        context,
        stages,
        _joined([layout.stage_sums(each) for layout, each in zip(layouts, parameters, strict=True)]),
        window,
    )
    arrays = {
        "forward_time": forward,
        "backward_time": backward,
        "weight_gradient_time": behind * times.layer.weight_gradient
        + leading * times.dense_layer.weight_gradient
        + is_last * times.head_weight_gradient,
        "forward_communication_time": behind * times.layer.forward_communication
        + leading * times.dense_layer.forward_communication
        + is_first * times.embedding_communication
        + received_forward,
        "backward_communication_time": behind * times.layer.backward_communication
        + leading * times.dense_layer.backward_communication
        + recomputed * times.layer.recompute_communication
        + is_first * times.root_backward_communication
        + is_last * times.head_communication
        + received_backward,
        "send_time": send,
        "gradient_reduce_time": sync_times(
            context, edges, whole if overlap_reduce else moved
        ).gradient_reduce,
        "parameter_gather_time": sync_times(
            context, edges, whole if overlap_gather else moved
        ).parameter_gather,
    }
    parts = {name: _split(values, layouts) for name, values in arrays.items()}
    exchange = [of_plans.layer.forward_axes["ep"], of_plans.layer.backward_axes["ep"]]
    joint = [
        _joint_times(context, layout, (exchange[0][row], exchange[1][row]), *work)
        for row, (layout, *work) in enumerate(
            zip(layouts, parts["forward_time"], parts["backward_time"], _split(behind, layouts), strict=True)
        )
    ]
    blocks = blocks_on_send(context, columns.vpp)
    fixed = fixed_time(context, columns)
    of_stages = np.split(steps, np.cumsum([plan.pp for plan in plans])[:-1])
    return [
        IterationCosts(
            num_stages=layout.plan.pp,
            num_chunks=layout.placement.shape[1],
            num_micro_batches=int(columns.num_micro_batches[row]),
            **{name: values[row] for name, values in parts.items()},
            is_send_blocking=bool(blocks[row]),
            gradient_reduce_overlap=overlap_reduce,
            parameter_gather_overlap=overlap_gather,
            optimizer_time=of_stages[row],
            fixed_time=float(fixed[row]),
            overlapped_time=joint[row],
        )
        for row, layout in enumerate(layouts)
    ]


class _Layout:
    """Where the virtual stages of a plan sit and what they hold; arrays in model order, copy after copy."""

    def __init__(self, context: CostContext, plan: ParallelPlan) -> None:
        schedule = SCHEDULES[plan.schedule]
        # DualPipe's stages hold the model twice, without the plan splitting it any finer.
        self.plan, self.copies = plan, schedule.num_model_copies
        self.placement = schedule.placement(plan.pp, plan.vpp * self.copies)
        self.layers = np.array(plan.layers_per_stage * self.copies, dtype=np.float64)
        self.leading = np.tile(leading_per_stage(context, plan.layers_per_stage), self.copies)
        self.is_first, self.is_last = np.zeros(self.placement.size), np.zeros(self.placement.size)
        if plan.vocab_parallel in ("none", "redistributed"):
            self.is_first[:: len(plan.layers_per_stage)] = 1.0
            self.is_last[len(plan.layers_per_stage) - 1 :: len(plan.layers_per_stage)] = 1.0

    def stage_of(self) -> NDArray[np.int64]:
        """Return the physical stage of each virtual stage."""
        stage = np.empty(self.placement.size, dtype=np.int64)
        stage[self.placement] = np.arange(self.plan.pp)[:, np.newaxis]
        return stage

    def stage_sums(self, parameters: RankParameters) -> RankParameters:
        """Return each stage's parameters, all its chunks, shape ``(pp,)``."""
        return RankParameters(
            **{f.name: getattr(parameters, f.name)[self.placement].sum(axis=1) for f in fields(parameters)}
        )

    def on_first_chunk(self, parameters: RankParameters) -> RankParameters:
        """Put a stage's parameters on its first chunk, the last to finish backward and the first to run forward.

        Without overlap frameworks synchronise a stage once, after all its chunks.
        """

        def moved(values: FloatColumn) -> FloatColumn:
            result = np.zeros_like(values)
            result[self.placement[:, 0]] = values[self.placement].sum(axis=1)
            return result

        return RankParameters(**{f.name: moved(getattr(parameters, f.name)) for f in fields(parameters)})


def _of_rows(times: MicroBatchTimes, rows: NDArray[np.int64]) -> MicroBatchTimes:
    """Return the times of some plans, one entry for each of their virtual stages."""

    def taken(cost: LayerCost) -> LayerCost:
        changes: dict[str, Any] = {}
        for each in fields(cost):
            value = getattr(cost, each.name)
            is_by_axis = isinstance(value, Mapping)
            changes[each.name] = (
                {axis: part[rows] for axis, part in value.items()} if is_by_axis else value[rows]
            )
        return replace(cost, **changes)

    layer = taken(times.layer)
    dense_layer = layer if times.dense_layer is times.layer else taken(times.dense_layer)
    others = {
        each.name: getattr(times, each.name)[rows]
        for each in fields(times)
        if each.name not in ("layer", "dense_layer")
    }
    return MicroBatchTimes(layer=layer, dense_layer=dense_layer, **others)


def _split(values: FloatColumn, layouts: Sequence[_Layout]) -> list[FloatColumn]:
    """Return the entries of each plan's virtual stages."""
    return np.split(values, np.cumsum([layout.placement.size for layout in layouts])[:-1])


def _split_columns(edges: PlanColumns, layouts: Sequence[_Layout]) -> list[PlanColumns]:
    ends = np.cumsum([layout.placement.size for layout in layouts])
    return [
        edges.take(slice(end - layout.placement.size, end)) for end, layout in zip(ends, layouts, strict=True)
    ]


def _joined(parts: Sequence[RankParameters]) -> RankParameters:
    """Return the parameters of some plans one after the other."""
    return RankParameters(
        **{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(RankParameters)}
    )


def _send_times(context: CostContext, layouts: Sequence[_Layout], edges: PlanColumns) -> FloatColumn:
    """Return the send from each virtual stage to the next: 0 within a stage, and behind the last of a copy."""
    hops, stays = [], []
    for layout in layouts:
        plan, stage_of = layout.plan, layout.stage_of()
        hops.append(context.ranks.hops(plan, stage_of))
        is_same = stage_of == np.roll(stage_of, -1)
        ends_copy = (np.arange(stage_of.size) + 1) % (stage_of.size // layout.copies) == 0
        stays.append(ends_copy | (is_same & (plan.pp > 1)))
    joined = Hops(
        crosses_nodes=np.concatenate([each.crosses_nodes for each in hops]),
        slowdown=np.concatenate([each.slowdown for each in hops]),
    )
    return np.where(np.concatenate(stays), 0.0, stage_send_time(context, edges, joined))


def _received(context: CostContext, send: FloatColumn) -> tuple[FloatColumn, FloatColumn]:
    """Return how long receives hold the compute stream of each virtual stage, forward and backward [s]."""
    nothing = np.zeros_like(send)
    if not context.software.is_receive_blocking:
        return nothing, nothing
    return np.roll(send, 1), send


def _joint_times(
    context: CostContext,
    layout: _Layout,
    exchange_time: tuple[float, float],
    forward: FloatColumn,
    backward: FloatColumn,
    behind: FloatColumn,
) -> FloatColumn | None:
    """Return each virtual stage's backward run jointly with the forward of its stage's other chunk; None elsewhere.

    DualPipe runs the expert exchange of either beside the compute of both (DeepSeek-V3, arXiv 2412.19437, section
    3.2.1); what is longer than that stays exposed, and the exchange's kernels hold a share of the SMs.
    ``exchange_time`` is that of one layer, forward and backward.
    """
    if layout.plan.schedule not in ("dualpipe", "dualpipe_v"):
        return None
    exchange = behind[::-1] * exchange_time[0] + behind * exchange_time[1]
    compute = forward[::-1] + backward - exchange
    hidden = np.minimum(exchange, compute)
    return compute + exchange - hidden + context.software.expert_overlap_contention * hidden
