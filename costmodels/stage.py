"""What a pipeline stage holds and does once per iteration: parameters, optimizer step, fixed costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meshwright.costmodels.collectives import send_time
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.parallelism.data import expert_shard_ranks, overlap_shares, shard_ranks
from meshwright.costmodels.parallelism.offload import optimizer_offload_time
from meshwright.costmodels.parameters import (
    RankParameters,
    boundary_parameters,
    layer_parameters,
    mtp_parameters,
)
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn, Offloads, PlanColumns, Shardings
from meshwright.costmodels.roofline import stream_time
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = [
    "first_stage_parameters",
    "fixed_time",
    "leading_dense_layers",
    "leading_per_stage",
    "optimizer_time",
    "overlaps",
    "stacked_parameters",
    "virtual_stage_parameters",
]

# Fused Adam: gradient 4 read, three fp32 states 12 read and 12 written.
_ADAM_BYTES = 28.0
# Weights in 16 bits are written beside the fp32 ones.
_NARROW_WEIGHT_BYTES = 2.0
# Gradient norm and clipping read the gradients once more.
_NORM_BYTES = 4.0


def first_stage_parameters(context: CostContext, columns: PlanColumns, layers: IntColumn) -> RankParameters:
    """Return the parameters of the first stage's ``layers`` and embedding on one rank; with one stage also the head."""
    model = context.model
    has_head = columns.has_both_ends
    boundary = model.num_embedding_parameters + np.where(has_head, model.num_head_parameters, 0.0)
    # The dense leading layers of a MoE model sit on the first chunk; further chunks start behind them.
    leading = np.minimum(leading_dense_layers(context), columns.chunk_first).astype(np.float64)
    parameters = stacked_parameters(context, columns, layers.astype(np.float64), leading)
    parameters = parameters + boundary_parameters(context, boundary / columns.tp)
    alone = mtp_parameters(context, columns).scaled(has_head.astype(np.float64))
    return parameters + alone if model.num_mtp_layers else parameters


def virtual_stage_parameters(
    context: CostContext, plan: ParallelPlan, columns: PlanColumns
) -> RankParameters:
    """Return the parameters of each virtual stage on one rank, shape ``(len(columns),)``.

    ``columns`` is the plan, one row per virtual stage.
    """
    model = context.model
    # As many rows as virtual stages, copy after copy where the stages hold the model twice.
    copies = len(columns) // len(plan.layers_per_stage)
    layers = np.tile(np.array(plan.layers_per_stage, dtype=np.float64), copies)
    leading = np.tile(leading_per_stage(context, plan.layers_per_stage), copies)
    parameters = stacked_parameters(context, columns, layers, leading)
    ends, is_last = np.zeros(len(plan.layers_per_stage)), np.zeros(len(plan.layers_per_stage))
    ends[0] += model.num_embedding_parameters / plan.tp
    # A tied head on another stage keeps a copy of the embedding.
    repeats = model.has_tied_embeddings and not columns.has_both_ends[0]
    ends[-1] += (model.num_embedding_parameters if repeats else model.num_head_parameters) / plan.tp
    is_last[-1] = 1.0
    parameters = parameters + boundary_parameters(context, np.tile(ends, copies))
    if not model.num_mtp_layers:
        return parameters
    return parameters + mtp_parameters(context, columns).scaled(np.tile(is_last, copies))


def stacked_parameters(
    context: CostContext, columns: PlanColumns, layers: FloatColumn, leading: FloatColumn
) -> RankParameters:
    """Return the parameters of some layers on one rank, ``leading`` of them a MoE model's dense ones."""
    moe = context.model.moe
    if moe is None:
        return layer_parameters(context, columns, is_moe=False).scaled(layers)
    behind = layers - leading
    share = context.model.num_moe_layers / max(1, context.model.num_layers - moe.num_dense_layers)
    experts = layer_parameters(context, columns, is_moe=True).scaled(behind * share)
    return experts + layer_parameters(context, columns, is_moe=False).scaled(leading + behind * (1.0 - share))


def leading_dense_layers(context: CostContext) -> int:
    """Return the dense layers that precede a MoE model's first mixture of experts; 0 for other models."""
    return 0 if context.model.moe is None else context.model.moe.num_dense_layers


def leading_per_stage(context: CostContext, layers_per_stage: Sequence[int]) -> FloatColumn:
    """Return how many of each virtual stage's layers are leading dense ones."""
    before = np.concatenate([[0], np.cumsum(layers_per_stage)[:-1]])
    left = np.maximum(leading_dense_layers(context) - before, 0)
    leading: FloatColumn = np.minimum(left, layers_per_stage).astype(np.float64)
    return leading


def optimizer_time(
    context: CostContext, columns: PlanColumns, parameters: RankParameters, backward_window: FloatColumn
) -> FloatColumn:
    """Return the seconds of the Adam step on this rank's share of the states, on the device or off it.

    Parameters
    ----------
    context : CostContext
        Job and software.
    columns : PlanColumns
        Plans.
    parameters : RankParameters
        Parameters of the stage on one rank.
    backward_window : FloatColumn
        One micro-batch's backward of the stage, beside which gradients leave for host memory [s].
    """
    is_whole = columns.sharding == Shardings.NONE
    stepped = parameters.dense_trained / np.where(is_whole, 1.0, shard_ranks(columns))
    stepped = stepped + parameters.expert_trained / np.where(is_whole, 1.0, expert_shard_ranks(columns))
    seconds = _update_time(context, stepped) + _stream_time(context, _NORM_BYTES * stepped)
    is_away = (columns.optimizer_offload != Offloads.NONE) | (columns.parameter_offload != Offloads.NONE)
    if not is_away.any():
        return seconds
    away = optimizer_offload_time(
        context,
        stepped,
        columns.optimizer_offload,
        columns.optimizer_offload_fraction,
        backward_window,
        parameter_kind=columns.parameter_offload,
    )
    return np.where(is_away, away.update + away.exposed_gradient, seconds)


def _update_time(context: CostContext, num_parameters: FloatColumn) -> FloatColumn:
    """Return the seconds of a fused Adam step: as measured on the device where the calibration has it."""
    narrow = _NARROW_WEIGHT_BYTES if context.element_bytes < 4.0 else 0.0
    measured = context.calibration.operators.get("adam_fused.fp32")
    if measured is None:
        return _stream_time(context, (_ADAM_BYTES + narrow) * num_parameters)
    kernel = measured.time({"num_bytes": _ADAM_BYTES * num_parameters})
    return kernel + _stream_time(context, narrow * num_parameters)


def _stream_time(context: CostContext, num_bytes: FloatColumn) -> FloatColumn:
    return stream_time(
        num_bytes, context.gpu.memory_bandwidth_bytes_per_second, context.calibration.memory_stream_efficiency
    )


def fixed_time(context: CostContext, columns: PlanColumns) -> FloatColumn:
    """Fixed time of the software, and the sum of two embedding tables between first and last stage.

    A tied head holds the second one, or multi-token prediction does.
    """
    fixed = np.full(len(columns), context.software.fixed_time)
    if context.is_lora or not (context.model.has_tied_embeddings or context.model.num_mtp_layers):
        return fixed
    num_bytes = context.gradient_bytes * context.model.num_embedding_parameters / columns.tp
    spans = columns.tp * columns.cp * columns.dp * columns.pp > context.cluster.node.num_gpus
    exchange = send_time(
        num_bytes, spans.astype(np.float64), context.cluster, context.software.inter_node_efficiency
    )
    return fixed + np.where(columns.has_both_ends, 0.0, exchange)


def overlaps(context: CostContext) -> tuple[float, float]:
    """Return the shares of gradient reduction and weight gather, as :func:`sync_times` stretches them, that overlap."""
    contention = context.software.overlap_contention
    reduce, gather = overlap_shares(context)
    return reduce / (1.0 + contention * reduce), gather / (1.0 + contention * gather)
