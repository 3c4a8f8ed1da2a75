"""Data parallelism: what gradient reduction, sharding (ZeRO, FSDP, HSDP) and gathering cost.

Two rhythms. Once per iteration: all-reduce (no sharding), reduce-scatter and gather (distributed optimizer).
On every micro-batch and layer: FSDP gathers weights and reduces gradients beside compute, of which the
overhang, a contention share of the hidden part and the ring latency stay exposed.

Routed experts have groups of their own: expert parallel ranks hold different experts, so theirs are replicated
over ``tp * cp * dp / (ep * etp)`` ranks only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.collectives import Collective, GroupPlacement, collective_time
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.parameters import RankParameters
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns, Schedules, Shardings

__all__ = [
    "FsdpTimes",
    "SyncTimes",
    "expert_shard_ranks",
    "fsdp_times",
    "is_fsdp_per_micro_batch",
    "overlap_shares",
    "shard_ranks",
    "sync_times",
]

# Share of a bucketed reduction or gather that runs beside compute once a run switches the overlap on: all but
# the first or last of about ten buckets (Megatron-Core's default share as well).
_SWITCHED_ON = 0.9
# Gather forward, gather backward, reduce backward: the ring latencies FSDP pays per layer.
_FSDP_COLLECTIVES = {"forward": 1.0, "backward": 2.0}
# Operations around a collective of FSDP2: about eight views, allocations and copies for each of a layer's six tensors,
# and its hooks.
_FSDP_CALLS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SyncTimes:
    """Once per iteration, for one stage's parameters; arrays of shape ``(num_plans,)`` [s]."""

    gradient_reduce: FloatColumn
    parameter_gather: FloatColumn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FsdpTimes:
    """Exposed communication of one layer and micro-batch; arrays of shape ``(num_plans,)`` [s].

    ``forward_handling`` and ``backward_handling`` are what a processor that is its own device does around it.
    """

    forward: FloatColumn
    backward: FloatColumn
    forward_handling: FloatColumn
    backward_handling: FloatColumn


def shard_ranks(columns: PlanColumns) -> FloatColumn:
    """Return the ranks that share one copy of the sharded states: sharding group times cp.

    Context parallel ranks hold the same weights, so they shard along with data parallel ones.
    """
    return (columns.sharding_group * columns.cp).astype(np.float64)


def expert_shard_ranks(columns: PlanColumns) -> FloatColumn:
    """Return the ranks that share one copy of the routed experts' sharded states, at least 1."""
    ranks: FloatColumn = columns.tp * columns.cp * columns.sharding_group / (columns.ep * columns.etp)
    return np.maximum(1.0, np.floor(ranks))


def is_fsdp_per_micro_batch(context: CostContext, columns: PlanColumns) -> NDArray[np.bool_]:
    """Return which plans gather and reduce on every micro-batch: ZeRO-2's gradients, ZeRO-3 and HSDP.

    Under pipeline parallelism frameworks that keep gathered weights between micro-batches sync once.
    """
    is_sharded: NDArray[np.bool_] = columns.sharding >= Shardings.ZERO2
    if context.software.fsdp_keeps_parameters:
        is_sharded &= columns.pp == 1
    return is_sharded


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Groups:
    """Groups that hold the same weights, that share one copy, and that hold the same shard of different copies."""

    replicas: GroupPlacement
    shards: GroupPlacement
    across: GroupPlacement


def overlap_shares(context: CostContext) -> tuple[float, float]:
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


def sync_times(context: CostContext, columns: PlanColumns, parameters: RankParameters) -> SyncTimes:
    """Return the once-per-iteration gradient reduction and weight gather of a stage's parameters.

    Parameters
    ----------
    context : CostContext
        Job and software.
    columns : PlanColumns
        Plans.
    parameters : RankParameters
        Parameters of the stage on one rank, shape ``(num_plans,)``.

    Returns
    -------
    SyncTimes
        Whole durations, with what they slow the compute beside them; the overlap is applied by whoever schedules
        them.
    """
    reduce_share, gather_share = overlap_shares(context)
    contention = context.software.overlap_contention
    times = _unhindered_sync_times(context, columns, parameters)
    # The hidden share s takes c s of its own length from the compute beside it: exposed (1 - s) + c s.
    return SyncTimes(
        gradient_reduce=times.gradient_reduce * (1.0 + contention * reduce_share),
        parameter_gather=times.parameter_gather * (1.0 + contention * gather_share),
    )


def _unhindered_sync_times(
    context: CostContext, columns: PlanColumns, parameters: RankParameters
) -> SyncTimes:
    dense = _group_sync_times(
        context, columns, parameters.dense, parameters.dense_trained, _dense_groups(context, columns)
    )
    if (columns.schedule == Schedules.DUALPIPE).any():
        dense = replace(
            dense, gradient_reduce=dense.gradient_reduce + _mirror_reduce_time(context, columns, parameters)
        )
    if context.model.moe is None:
        return dense
    expert = _group_sync_times(
        context, columns, parameters.expert, parameters.expert_trained, _expert_groups(context, columns)
    )
    # A chunk without experts has no second collective, not one of zero bytes.
    holds = parameters.expert > 0.0
    return SyncTimes(
        gradient_reduce=dense.gradient_reduce + np.where(holds, expert.gradient_reduce, 0.0),
        parameter_gather=dense.parameter_gather + np.where(holds, expert.parameter_gather, 0.0),
    )


def _mirror_reduce_time(
    context: CostContext, columns: PlanColumns, parameters: RankParameters
) -> FloatColumn:
    """Return the seconds of summing gradients with the mirrored stage, which holds the same layers (DualPipe).

    Stages ``s`` and ``pp - 1 - s`` hold the same two chunks and each sees half of the micro-batches: an all-reduce of
    two between the shards that a reduction inside either stage leaves; nothing elsewhere.
    """
    dense_ranks = (columns.dp * columns.cp).astype(np.float64)
    expert_ranks = np.maximum(1.0, columns.tp * dense_ranks / (columns.ep * columns.etp))
    shard = parameters.dense_trained / dense_ranks + parameters.expert_trained / expert_ranks
    per_node = context.cluster.node.num_gpus
    is_one_node = columns.tp * columns.cp * columns.dp * columns.pp <= per_node
    pair = GroupPlacement(size=np.full(len(columns), 2.0), ranks_per_node=np.where(is_one_node, 2.0, 1.0))
    seconds = collective_time(
        "all_reduce",
        context.gradient_bytes * shard,
        pair,
        context.cluster,
        context.calibration,
        context.software.inter_node_efficiency,
    )
    return np.where((columns.schedule == Schedules.DUALPIPE) & (shard > 0.0), seconds, 0.0)


def _group_sync_times(
    context: CostContext,
    columns: PlanColumns,
    num_parameters: FloatColumn,
    num_trained: FloatColumn,
    groups: _Groups,
) -> SyncTimes:
    software = context.software
    gradients = context.gradient_bytes * num_trained
    is_grouped = columns.sharding_group < columns.dp
    per_micro_batch = is_fsdp_per_micro_batch(context, columns)

    def timed(collective: Collective, num_bytes: FloatColumn, group: GroupPlacement) -> FloatColumn:
        return collective_time(
            collective, num_bytes, group, context.cluster, context.calibration, software.inter_node_efficiency
        )

    all_reduce = timed("all_reduce", gradients, groups.replicas)
    scatter = timed("reduce_scatter", gradients, groups.replicas)
    # ZeRO-1 and 2 gather what was updated, ZeRO-3 all weights.
    gathered = np.where(columns.sharding >= Shardings.ZERO3, num_parameters, num_trained)
    gather = timed("all_gather", context.element_bytes * gathered, groups.shards)
    if software.broadcast_step_latency > 0:
        shards = groups.shards
        gather = gather + np.where(shards.num_nodes > 1, shards.size * software.broadcast_step_latency, 0.0)
    is_unsharded = columns.sharding == Shardings.NONE
    # A sharding group smaller than dp still sums its gradients over all of dp.
    reduce = np.where(
        is_unsharded | (is_grouped & (columns.sharding == Shardings.ZERO1)), all_reduce, scatter
    )
    across = np.zeros(len(columns))
    if is_grouped.any():
        # HSDP sums a shard inside its group, then the shards' copies across groups.
        across = timed("all_reduce", gradients / groups.shards.size, groups.across)
        inside = timed("reduce_scatter", gradients, groups.shards)
        is_replicated = is_grouped & (columns.sharding >= Shardings.ZERO3)
        reduce = np.where(is_replicated, inside + across, reduce)
    reduce = np.where(per_micro_batch, np.where(is_grouped, across, 0.0), reduce)
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
    unit_parameters: Callable[[PlanColumns], RankParameters],
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
    unit_parameters : Callable[[PlanColumns], RankParameters]
        Parameters of the unit (a layer, or embedding and head) on one rank.
    forward_window, backward_window : FloatColumn
        Compute time the communication may hide behind [s]; 0 for the root unit, whose gather nothing precedes.

    Notes
    -----
    ``exposed = max(0, t - window) + contention * hidden + ring latency``. The contention is what separates
    small from large micro-batches at equal shapes; the ring latency is the loss from 128 to 512 GPUs. With a
    secondary group (ZeRO++ hpZ, arXiv 2306.10209, section 3.2) backward gathers inside it.
    """
    software = context.software
    applies = is_fsdp_per_micro_batch(context, columns) & (shard_ranks(columns) > 1)
    nothing = np.zeros(len(columns))
    if not applies.any():
        return FsdpTimes(
            forward=nothing, backward=nothing, forward_handling=nothing, backward_handling=nothing
        )
    rows, inverse = columns.distinct("tp", "cp", "dp", "sharding_group", "ep", "etp", "secondary_group")
    parameters = unit_parameters(rows)
    dense_group = _dense_groups(context, rows).shards
    has_experts = context.model.moe is not None and bool((parameters.expert > 0.0).any())

    def timed(collective: Collective, num_bytes: FloatColumn, group: GroupPlacement) -> FloatColumn:
        return collective_time(
            collective, num_bytes, group, context.cluster, context.calibration, software.inter_node_efficiency
        )

    gather_once = timed("all_gather", context.element_bytes * parameters.dense, dense_group)
    scatter_once = timed("reduce_scatter", context.gradient_bytes * parameters.dense_trained, dense_group)
    secondary = context.place_group(
        np.maximum(rows.secondary_group, 1).astype(np.float64) * rows.cp, rows.tp.astype(np.float64)
    )
    gather_again = np.where(
        rows.secondary_group > 0,
        timed("all_gather", context.element_bytes * parameters.dense, secondary),
        gather_once,
    )
    if has_experts:
        expert_group = _expert_groups(context, rows).shards
        expert_gather = timed("all_gather", context.element_bytes * parameters.expert, expert_group)
        gather_once, gather_again = gather_once + expert_gather, gather_again + expert_gather
        scatter_once = scatter_once + timed(
            "reduce_scatter", context.gradient_bytes * parameters.expert_trained, expert_group
        )
    is_gathered = columns.sharding >= Shardings.ZERO3
    gather = np.where(is_gathered, gather_once[inverse], 0.0)
    again = np.where(is_gathered, gather_again[inverse], 0.0)
    scatter = scatter_once[inverse]
    unpacking, packing = nothing, nothing
    if context.gpu.architecture == "cpu":
        # A processor that is its own device copies and sums itself, and computes nothing meanwhile.
        forward_window, backward_window = nothing, nothing
        unpacking, packing = (each[inverse] for each in _handling(context, rows, parameters))
        unpacking, packing = np.where(applies & is_gathered, unpacking, 0.0), np.where(applies, packing, 0.0)
    forward = _exposed(gather, forward_window, software.fsdp_contention)
    backward = _exposed(again + scatter, backward_window, software.fsdp_contention)
    step = (shard_ranks(columns) - 1.0) * software.fsdp_step_latency
    forward += np.where(is_gathered, _FSDP_COLLECTIVES["forward"] * step, 0.0)
    backward += np.where(is_gathered, _FSDP_COLLECTIVES["backward"], 1.0) * step
    return FsdpTimes(
        forward=np.where(applies, forward, 0.0),
        backward=np.where(applies, backward, 0.0),
        forward_handling=unpacking,
        backward_handling=unpacking + packing,
    )


def _handling(
    context: CostContext, columns: PlanColumns, parameters: RankParameters
) -> tuple[FloatColumn, FloatColumn]:
    """Return the seconds of a processor around one unit's gather, and around its reduction.

    Shards are copied into the buffer that is gathered, weights out of it, and gradients into the one that is reduced,
    each read and written (``torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py``).
    """
    share = 1.0 / shard_ranks(columns)
    gathered = 2.0 * context.element_bytes * parameters.total * (1.0 + share)
    reduced = 2.0 * context.gradient_bytes * (parameters.dense_trained + parameters.expert_trained)
    rate = context.gpu.memory_bandwidth_bytes_per_second * context.calibration.memory_stream_efficiency
    calls = _FSDP_CALLS * context.software.host_launch_latency
    return gathered / rate + calls, reduced / rate + calls


def _exposed(duration: FloatColumn, window: FloatColumn, contention: float) -> FloatColumn:
    overhang = np.maximum(duration - window, 0.0)
    return overhang + contention * (duration - overhang)


def _dense_groups(context: CostContext, columns: PlanColumns) -> _Groups:
    tp = columns.tp.astype(np.float64)
    return _Groups(
        replicas=context.place_group((columns.dp * columns.cp).astype(np.float64), tp),
        shards=context.place_group(shard_ranks(columns), tp),
        across=context.place_group(
            columns.dp / columns.sharding_group,
            (columns.tp * columns.cp * columns.sharding_group).astype(np.float64),
        ),
    )


def _expert_groups(context: CostContext, columns: PlanColumns) -> _Groups:
    """Return the same for routed experts: ranks ``ep * etp`` apart."""
    stride = (columns.ep * columns.etp).astype(np.float64)
    replicas = np.maximum(1.0, columns.tp * columns.cp * columns.dp / stride)
    shards = expert_shard_ranks(columns)
    return _Groups(
        replicas=context.place_group(replicas, stride),
        shards=context.place_group(shards, stride),
        across=context.place_group(np.maximum(1.0, replicas / shards), stride * shards),
    )
