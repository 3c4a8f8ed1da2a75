"""Data parallelism: what gradient reduction, sharding (ZeRO, FSDP, HSDP) and gathering cost.

Two rhythms. Once per iteration: all-reduce (no sharding), reduce-scatter and gather (distributed optimizer).
On every micro-batch and layer: FSDP gathers weights and reduces gradients beside compute, of which the
overhang, a contention share of the hidden part and the ring latency stay exposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.collectives import Collective, GroupPlacement, collective_time, place_group
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn, PlanColumns, Shardings
from meshwright.simcore.domain.model import ModelSpec

__all__ = ["FsdpTimes", "SyncTimes", "fsdp_times", "is_fsdp_per_micro_batch", "shard_ranks", "sync_times"]

# Weights travel in 16 bits.
_WEIGHT_BYTES = 2.0
# Gather forward, gather backward, reduce backward: the ring latencies FSDP pays per layer.
_FSDP_COLLECTIVES = {"forward": 1.0, "backward": 2.0}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SyncTimes:
    """Once per iteration, for one stage's parameters; arrays of shape ``(num_plans,)`` [s]."""

    gradient_reduce: FloatColumn
    parameter_gather: FloatColumn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FsdpTimes:
    """Exposed communication of one layer and micro-batch; arrays of shape ``(num_plans,)`` [s]."""

    forward: FloatColumn
    backward: FloatColumn


def shard_ranks(columns: PlanColumns) -> FloatColumn:
    """Return the ranks that share one copy of the sharded states: sharding group times cp.

    Context parallel ranks hold the same weights, so they shard along with data parallel ones.
    """
    return (columns.sharding_group * columns.cp).astype(np.float64)


def is_fsdp_per_micro_batch(context: CostContext, columns: PlanColumns) -> NDArray[np.bool_]:
    """Return which plans gather and reduce on every micro-batch: ZeRO-2's gradients, ZeRO-3 and HSDP.

    Under pipeline parallelism frameworks that keep gathered weights between micro-batches sync once.
    """
    is_sharded: NDArray[np.bool_] = columns.sharding >= Shardings.ZERO2
    if context.software.fsdp_keeps_parameters:
        is_sharded &= columns.pp == 1
    return is_sharded


def sync_times(context: CostContext, columns: PlanColumns, num_parameters: FloatColumn) -> SyncTimes:
    """Return the once-per-iteration gradient reduction and weight gather of ``num_parameters`` per rank.

    Parameters
    ----------
    context : CostContext
        Job and software.
    columns : PlanColumns
        Plans.
    num_parameters : FloatColumn
        Parameters of the stage on one tensor parallel rank, shape ``(num_plans,)``.

    Returns
    -------
    SyncTimes
        Whole durations; the overlap is the software's and is applied by whoever schedules them.
    """
    software = context.software
    ranks = _replica_group(context, columns)
    shards = _shard_group(context, columns)
    gradients = context.gradient_bytes * num_parameters
    weights = _WEIGHT_BYTES * num_parameters
    is_grouped = columns.sharding_group < columns.dp
    per_micro_batch = is_fsdp_per_micro_batch(context, columns)

    def timed(collective: Collective, num_bytes: FloatColumn, group: GroupPlacement) -> FloatColumn:
        return collective_time(
            collective, num_bytes, group, context.cluster, context.calibration, software.inter_node_efficiency
        )

    all_reduce = timed("all_reduce", gradients, ranks)
    scatter = timed("reduce_scatter", gradients, ranks)
    across = _across_group(context, columns)
    replica_reduce = timed("all_reduce", gradients / shards.size, across)
    gather = timed("all_gather", weights, shards)
    if software.broadcast_step_latency > 0:
        gather = gather + np.where(shards.num_nodes > 1, shards.size * software.broadcast_step_latency, 0.0)
    is_unsharded = columns.sharding == Shardings.NONE
    # A sharding group smaller than dp still sums its gradients over all of dp.
    reduce = np.where(
        is_unsharded | (is_grouped & (columns.sharding == Shardings.ZERO1)), all_reduce, scatter
    )
    # HSDP sums a shard inside its group, then the shards' copies across groups.
    is_replicated = is_grouped & (columns.sharding >= Shardings.ZERO3)
    reduce = np.where(is_replicated, timed("reduce_scatter", gradients, shards) + replica_reduce, reduce)
    reduce = np.where(per_micro_batch, np.where(is_grouped, replica_reduce, 0.0), reduce)
    # ZeRO-2 reduces on every micro-batch but gathers its updated weights once.
    gathers_once = (
        (columns.sharding == Shardings.ZERO1)
        | (columns.sharding == Shardings.ZERO2)
        | ((columns.sharding >= Shardings.ZERO3) & ~per_micro_batch)
    )
    return SyncTimes(gradient_reduce=reduce, parameter_gather=np.where(gathers_once, gather, 0.0))


def fsdp_times(
    context: CostContext,
    columns: PlanColumns,
    unit_parameters: Callable[[ModelSpec, IntColumn], FloatColumn],
    forward_window: FloatColumn,
    backward_window: FloatColumn,
) -> FsdpTimes:
    """Return the exposed communication FSDP adds to one layer, forward and backward.

    Parameters
    ----------
    context : CostContext
        Job and software.
    columns : PlanColumns
        Plans; those that do not gather per micro-batch get 0.
    unit_parameters : Callable[[ModelSpec, IntColumn], FloatColumn]
        Parameters of the unit (a layer, or embedding and head) on one rank, by tensor parallel degree.
    forward_window, backward_window : FloatColumn
        Compute time the communication may hide behind [s]; 0 for the root unit, whose gather nothing precedes.

    Notes
    -----
    ``exposed = max(0, t - window) + contention * hidden + ring latency``. The contention is what separates
    small from large micro-batches at equal shapes; the ring latency is the loss from 128 to 512 GPUs.
    """
    software = context.software
    applies = is_fsdp_per_micro_batch(context, columns) & (shard_ranks(columns) > 1)
    if not applies.any():
        return FsdpTimes(forward=np.zeros(len(columns)), backward=np.zeros(len(columns)))
    rows, inverse = columns.distinct("tp", "cp", "dp", "sharding_group")
    group = _shard_group(context, rows)
    parameters = unit_parameters(context.model, rows.tp)

    def timed(collective: Collective, num_bytes: FloatColumn) -> FloatColumn:
        return collective_time(
            collective, num_bytes, group, context.cluster, context.calibration, software.inter_node_efficiency
        )[inverse]

    is_gathered = columns.sharding >= Shardings.ZERO3
    gather = np.where(is_gathered, timed("all_gather", _WEIGHT_BYTES * parameters), 0.0)
    scatter = timed("reduce_scatter", context.gradient_bytes * parameters)
    forward = _exposed(gather, forward_window, software.fsdp_contention)
    backward = _exposed(gather + scatter, backward_window, software.fsdp_contention)
    step = (shard_ranks(columns) - 1.0) * software.fsdp_step_latency
    forward += np.where(is_gathered, _FSDP_COLLECTIVES["forward"] * step, 0.0)
    backward += np.where(is_gathered, _FSDP_COLLECTIVES["backward"], 1.0) * step
    return FsdpTimes(forward=np.where(applies, forward, 0.0), backward=np.where(applies, backward, 0.0))


def _exposed(duration: FloatColumn, window: FloatColumn, contention: float) -> FloatColumn:
    overhang = np.maximum(duration - window, 0.0)
    return overhang + contention * (duration - overhang)


def _replica_group(context: CostContext, columns: PlanColumns) -> GroupPlacement:
    return place_group(
        (columns.dp * columns.cp).astype(np.float64),
        columns.tp.astype(np.float64),
        context.cluster.node.num_gpus,
    )


def _shard_group(context: CostContext, columns: PlanColumns) -> GroupPlacement:
    return place_group(shard_ranks(columns), columns.tp.astype(np.float64), context.cluster.node.num_gpus)


def _across_group(context: CostContext, columns: PlanColumns) -> GroupPlacement:
    """Ranks that hold the same shard in different sharding groups."""
    stride = (columns.tp * columns.cp * columns.sharding_group).astype(np.float64)
    return place_group(columns.dp / columns.sharding_group, stride, context.cluster.node.num_gpus)
