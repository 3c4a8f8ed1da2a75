"""From a plan to what its iteration costs: the arrays that are simulated."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.micro_batch import layers_backward, layers_forward, micro_batch_times
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
from meshwright.simcore.training.costs import IterationCosts

__all__ = ["iteration_costs"]


def iteration_costs(context: CostContext, plan: ParallelPlan) -> IterationCosts:
    """Return what one iteration of a plan costs, per virtual stage, ready to be simulated.

    Raises
    ------
    SpecError
        If the batch does not divide into the plan's micro-batches.
    """
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    times = micro_batch_times(context, columns)
    num_virtual = plan.pp * plan.vpp
    layers = np.array(plan.layers_per_stage, dtype=np.float64)
    is_first, is_last = np.zeros(num_virtual), np.zeros(num_virtual)
    is_first[0], is_last[-1] = 1.0, 1.0
    if plan.vocab_parallel in ("vocab_1", "vocab_2", "interlaced"):
        is_first[0], is_last[-1] = 0.0, 0.0
    extra_forward, extra_backward = vocab_parallel_time(
        context, columns, times.boundary_forward, times.boundary_backward
    )
    leading = leading_per_stage(context, plan.layers_per_stage)
    recomputed = np.minimum(layers, float(columns.recompute_layers[0]))
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
    stride = plan.tp * plan.cp * plan.dp
    crosses = edge_crosses_nodes(num_virtual, plan.pp, stride, context.cluster.node.num_gpus)
    edges = columns.take(np.zeros(num_virtual, dtype=np.int64))
    send = stage_send_time(context, edges, crosses)
    send[-1] = 0.0
    parameters = virtual_stage_parameters(context, plan, edges)
    overlap_reduce, overlap_gather = overlaps(context)
    reduced, gathered = (
        parameters if overlap else _on_first_chunk(parameters, plan.pp)
        for overlap in (overlap_reduce, overlap_gather)
    )
    behind = layers - leading
    stage_columns = columns.take(np.zeros(plan.pp, dtype=np.int64))
    return IterationCosts(
        num_stages=plan.pp,
        num_chunks=plan.vpp,
        num_micro_batches=int(columns.num_micro_batches[0]),
        forward_time=forward,
        backward_time=backward,
        weight_gradient_time=behind * times.layer.weight_gradient
        + leading * times.dense_layer.weight_gradient
        + is_last * times.head_weight_gradient[0],
        forward_communication_time=behind * times.layer.forward_communication
        + leading * times.dense_layer.forward_communication
        + is_first * times.embedding_communication[0],
        backward_communication_time=behind * times.layer.backward_communication
        + leading * times.dense_layer.backward_communication
        + recomputed * times.layer.recompute_communication
        + is_first * times.root_backward_communication[0]
        + is_last * times.head_communication[0],
        send_time=send,
        is_send_blocking=bool(blocks_on_send(context, columns.vpp)[0]),
        gradient_reduce_time=sync_times(context, edges, reduced).gradient_reduce,
        gradient_reduce_overlap=overlap_reduce,
        parameter_gather_time=sync_times(context, edges, gathered).parameter_gather,
        parameter_gather_overlap=overlap_gather,
        optimizer_time=optimizer_time(context, stage_columns, _stage_sums(parameters, plan.pp)),
        fixed_time=float(fixed_time(context, columns)[0]),
    )


def _stage_sums(parameters: RankParameters, pp: int) -> RankParameters:
    """Return each stage's parameters, all its chunks, shape ``(pp,)``."""
    return RankParameters(
        **{f.name: getattr(parameters, f.name).reshape(-1, pp).sum(axis=0) for f in fields(parameters)}
    )


def _on_first_chunk(parameters: RankParameters, pp: int) -> RankParameters:
    """Put a stage's parameters on its first chunk, the last to finish backward and the first to run forward.

    Without overlap frameworks synchronise a stage once, after all its chunks.
    """

    def moved(values: FloatColumn) -> FloatColumn:
        result = np.zeros_like(values)
        result[:pp] = values.reshape(-1, pp).sum(axis=0)
        return result

    return RankParameters(**{f.name: moved(getattr(parameters, f.name)) for f in fields(parameters)})
