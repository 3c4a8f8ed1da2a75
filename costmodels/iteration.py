"""From a plan to what its iteration costs: the arrays that are simulated."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.micro_batch import (
    MicroBatchTimes,
    layers_backward,
    layers_forward,
    micro_batch_times,
)
from meshwright.costmodels.parallelism.data import sync_times
from meshwright.costmodels.parallelism.pipeline import blocks_on_send, edge_crosses_nodes, stage_send_time
from meshwright.costmodels.parallelism.vocab import vocab_parallel_time
from meshwright.costmodels.parameters import RankParameters
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns
from meshwright.costmodels.stage import (
    fixed_time,
    leading_per_stage,
    optimizer_time,
    overlaps,
    virtual_stage_parameters,
)
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.schedules import SCHEDULES
from meshwright.simcore.training.costs import IterationCosts

__all__ = ["iteration_costs"]


def iteration_costs(context: CostContext, plan: ParallelPlan) -> IterationCosts:
    """Return what one iteration of a plan costs, per virtual stage, ready to be simulated.

    Raises
    ------
    SpecError
        If the batch does not divide into the plan's micro-batches.
    """
    if plan.layer_groups:
        # Layer-wise plans are made of uniform ones: that module builds on this one.
        from meshwright.costmodels.layer_groups import layer_group_costs

        return layer_group_costs(context, plan)
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    times = micro_batch_times(context, columns)
    # DualPipe's stages hold the model twice, without the plan splitting it any finer.
    copies = SCHEDULES[plan.schedule].num_model_copies
    num_chunks = plan.vpp * copies
    placement = SCHEDULES[plan.schedule].placement(plan.pp, num_chunks)
    num_nodes = plan.pp * num_chunks
    layers = np.array(plan.layers_per_stage * copies, dtype=np.float64)
    leading = np.tile(leading_per_stage(context, plan.layers_per_stage), copies)
    recomputed = np.minimum(layers, float(columns.recompute_layers[0]))
    behind = layers - leading
    is_first, is_last = np.zeros(num_nodes), np.zeros(num_nodes)
    if plan.vocab_parallel in ("none", "redistributed"):
        is_first[:: len(plan.layers_per_stage)] = 1.0
        is_last[len(plan.layers_per_stage) - 1 :: len(plan.layers_per_stage)] = 1.0
    extra_forward, extra_backward = vocab_parallel_time(
        context, columns, times.boundary_forward, times.boundary_backward
    )
    forward = (
        layers_forward(times, layers, leading)
        + is_first * times.embedding_forward[0]
        + is_last * times.head_forward[0]
        + extra_forward[0]
    )
    backward = (
        layers_backward(times, layers, leading, recomputed)
        + is_first * times.embedding_backward[0]
        + is_last * times.head_backward[0]
        + extra_backward[0]
    )
    edges = columns.take(np.zeros(num_nodes, dtype=np.int64))
    send = _send_times(context, plan, edges, placement, copies)
    received_forward, received_backward = _received(context, send)
    forward, backward = forward + received_forward, backward + received_backward
    parameters = virtual_stage_parameters(context, plan, edges)
    overlap_reduce, overlap_gather = overlaps(context)
    reduced, gathered = (
        parameters if overlap else _on_first_chunk(parameters, placement)
        for overlap in (overlap_reduce, overlap_gather)
    )
    stage_columns = columns.take(np.zeros(plan.pp, dtype=np.int64))
    return IterationCosts(
        num_stages=plan.pp,
        num_chunks=num_chunks,
        num_micro_batches=int(columns.num_micro_batches[0]),
        forward_time=forward,
        backward_time=backward,
        weight_gradient_time=behind * times.layer.weight_gradient
        + leading * times.dense_layer.weight_gradient
        + is_last * times.head_weight_gradient[0],
        forward_communication_time=behind * times.layer.forward_communication
        + leading * times.dense_layer.forward_communication
        + is_first * times.embedding_communication[0]
        + received_forward,
        backward_communication_time=behind * times.layer.backward_communication
        + leading * times.dense_layer.backward_communication
        + recomputed * times.layer.recompute_communication
        + is_first * times.root_backward_communication[0]
        + is_last * times.head_communication[0]
        + received_backward,
        send_time=send,
        is_send_blocking=bool(blocks_on_send(context, columns.vpp)[0]),
        gradient_reduce_time=sync_times(context, edges, reduced).gradient_reduce,
        gradient_reduce_overlap=overlap_reduce,
        parameter_gather_time=sync_times(context, edges, gathered).parameter_gather,
        parameter_gather_overlap=overlap_gather,
        optimizer_time=optimizer_time(
            context, stage_columns, _stage_sums(parameters, placement), backward[placement].sum(axis=1)
        ),
        fixed_time=float(fixed_time(context, columns)[0]),
        overlapped_time=_joint_times(context, plan, times, forward, backward, behind),
    )


def _send_times(
    context: CostContext,
    plan: ParallelPlan,
    edges: PlanColumns,
    placement: NDArray[np.int32],
    copies: int,
) -> FloatColumn:
    """Return the send from each virtual stage to the next: 0 within a stage, and behind the last of a copy."""
    stage_of = np.empty(placement.size, dtype=np.int64)
    stage_of[placement] = np.arange(plan.pp)[:, np.newaxis]
    stride = plan.tp * plan.cp * plan.dp
    crosses = edge_crosses_nodes(stage_of, stride, context.cluster.node.num_gpus)
    send = stage_send_time(context, edges, crosses)
    stays = stage_of == np.roll(stage_of, -1)
    ends_copy = (np.arange(placement.size) + 1) % (placement.size // copies) == 0
    return np.where(ends_copy | (stays & (plan.pp > 1)), 0.0, send)


def _received(context: CostContext, send: FloatColumn) -> tuple[FloatColumn, FloatColumn]:
    """Return how long receives hold the compute stream of each virtual stage, forward and backward [s]."""
    nothing = np.zeros_like(send)
    if not context.software.is_receive_blocking:
        return nothing, nothing
    return np.roll(send, 1), send


def _joint_times(
    context: CostContext,
    plan: ParallelPlan,
    times: MicroBatchTimes,
    forward: FloatColumn,
    backward: FloatColumn,
    behind: FloatColumn,
) -> FloatColumn | None:
    """Return each virtual stage's backward run jointly with the forward of its stage's other chunk; None elsewhere.

    DualPipe runs the expert exchange of either beside the compute of both (DeepSeek-V3, arXiv 2412.19437, section
    3.2.1); what is longer than that stays exposed, and the exchange's kernels hold a share of the SMs.
    """
    if plan.schedule not in ("dualpipe", "dualpipe_v"):
        return None
    exchange = behind[::-1] * times.layer.forward_axes["ep"] + behind * times.layer.backward_axes["ep"]
    compute = forward[::-1] + backward - exchange
    hidden = np.minimum(exchange, compute)
    return compute + exchange - hidden + context.software.expert_overlap_contention * hidden


def _stage_sums(parameters: RankParameters, placement: NDArray[np.int32]) -> RankParameters:
    """Return each stage's parameters, all its chunks, shape ``(pp,)``."""
    return RankParameters(
        **{f.name: getattr(parameters, f.name)[placement].sum(axis=1) for f in fields(parameters)}
    )


def _on_first_chunk(parameters: RankParameters, placement: NDArray[np.int32]) -> RankParameters:
    """Put a stage's parameters on its first chunk, the last to finish backward and the first to run forward.

    Without overlap frameworks synchronise a stage once, after all its chunks.
    """

    def moved(values: FloatColumn) -> FloatColumn:
        result = np.zeros_like(values)
        result[placement[:, 0]] = values[placement].sum(axis=1)
        return result

    return RankParameters(**{f.name: moved(getattr(parameters, f.name)) for f in fields(parameters)})
