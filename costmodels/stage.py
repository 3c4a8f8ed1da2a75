"""What a pipeline stage holds and does once per iteration: parameters, optimizer step, fixed costs."""

from __future__ import annotations

import numpy as np

from meshwright.costmodels.collectives import send_time
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.parallelism.data import shard_ranks
from meshwright.costmodels.parameters import rank_layer_parameters
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn, PlanColumns, Shardings
from meshwright.costmodels.roofline import stream_time
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["first_stage_parameters", "fixed_time", "optimizer_time", "overlaps", "virtual_stage_parameters"]

# Fused Adam on 16-bit weights: gradient 4 read, three fp32 states 12 read and 12 written, weight 2 written.
_OPTIMIZER_BYTES = 30.0
# Gradient norm and clipping read the gradients once more.
_NORM_BYTES = 4.0
# Share of a bucketed reduction or gather that runs beside compute once a run switches the overlap on: all but
# the first or last of about ten buckets (Megatron-Core's default share as well).
_SWITCHED_ON = 0.9


def first_stage_parameters(context: CostContext, columns: PlanColumns, layers: IntColumn) -> FloatColumn:
    """Return the parameters of the first stage's ``layers`` and embedding on one rank; with one stage also the head."""
    model = context.model
    boundary = model.num_embedding_parameters + np.where(columns.pp == 1, model.num_head_parameters, 0.0)
    return layers * rank_layer_parameters(model, columns.tp) + boundary / columns.tp


def virtual_stage_parameters(context: CostContext, plan: ParallelPlan) -> FloatColumn:
    """Return the parameters of each virtual stage on one rank, shape ``(pp * vpp,)``."""
    model = context.model
    layer = rank_layer_parameters(model, np.array([plan.tp]))[0]
    parameters: FloatColumn = np.array(plan.layers_per_stage, dtype=np.float64) * layer
    parameters[0] += model.num_embedding_parameters / plan.tp
    # A tied head on another stage keeps a copy of the embedding.
    copies = plan.pp > 1 and model.has_tied_embeddings
    parameters[-1] += (model.num_embedding_parameters if copies else model.num_head_parameters) / plan.tp
    return parameters


def optimizer_time(context: CostContext, columns: PlanColumns, num_parameters: FloatColumn) -> FloatColumn:
    """Seconds of the fused Adam step on this rank's share of the states."""
    shards = np.where(columns.sharding == Shardings.NONE, 1.0, shard_ranks(columns))
    num_bytes = (_OPTIMIZER_BYTES + _NORM_BYTES) * num_parameters / shards
    return stream_time(
        num_bytes, context.gpu.memory_bandwidth_bytes_per_second, context.calibration.memory_stream_efficiency
    )


def fixed_time(context: CostContext, columns: PlanColumns) -> FloatColumn:
    """Fixed time of the software, and the tied embedding's sum between first and last stage."""
    fixed = np.full(len(columns), context.software.fixed_time)
    if not context.model.has_tied_embeddings:
        return fixed
    num_bytes = context.gradient_bytes * context.model.num_embedding_parameters / columns.tp
    spans = columns.tp * columns.cp * columns.dp * columns.pp > context.cluster.node.num_gpus
    exchange = send_time(
        num_bytes, spans.astype(np.float64), context.cluster, context.software.inter_node_efficiency
    )
    return fixed + np.where(columns.pp > 1, exchange, 0.0)


def overlaps(context: CostContext) -> tuple[float, float]:
    """Return the shares of gradient reduction and weight gather that may run beside compute."""
    software, features = context.software, context.features
    if "no_overlap" in features:
        return 0.0, 0.0
    # A run that names the switch has it on, whatever its generation's default.
    reduce = max(software.gradient_reduce_overlap, _SWITCHED_ON if "overlap_grad_reduce" in features else 0.0)
    gather = max(
        software.parameter_gather_overlap, _SWITCHED_ON if "overlap_param_gather" in features else 0.0
    )
    return reduce, gather
