"""Device memory of one rank, by what fills it: a breakdown per pipeline stage, for many plans at once.

Stored activations follow Korthikanti et al. 2022 (section 4) generalised to grouped queries and gated MLPs:
their 10 + 24/t + 5as/(ht), 34/t and 2 bytes per token and hidden unit come out for a GPT layer (tested).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.activations import activation_parts, stored_bytes
from meshwright.costmodels.layers.cases import CASE_FIELDS, cases_of
from meshwright.costmodels.layers.transients import backward_bytes
from meshwright.costmodels.parallelism.data import expert_shard_ranks, is_fsdp_per_micro_batch, shard_ranks
from meshwright.costmodels.parallelism.offload_memory import (
    HostDemand,
    OffloadMemory,
    host_demand,
    offload_memory,
)
from meshwright.costmodels.parameters import RankParameters, boundary_parameters, mtp_parameters
from meshwright.costmodels.plan_columns import (
    V_SHAPED,
    FloatColumn,
    IntColumn,
    Offloads,
    PlanColumns,
    Recomputes,
    Schedules,
    Shardings,
    VocabParallels,
    stage_layers,
)
from meshwright.costmodels.stage import stacked_parameters
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = [
    "LayerActivations",
    "MemoryColumns",
    "host_needs",
    "layer_activation_bytes",
    "layer_activations",
    "peak_memory",
    "plan_memory",
    "stage_memory",
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryColumns:
    """Bytes of one rank by use; arrays of one shape, ``(num_plans,)`` or ``(num_stages,)``.

    ``working_set`` is what the layer at work holds beyond its stored activations (gradients, what it recomputes) and
    what FSDP holds gathered.
    """

    weights: FloatColumn
    gradients: FloatColumn
    optimizer_states: FloatColumn
    activations: FloatColumn
    working_set: FloatColumn
    logits: FloatColumn
    communication: FloatColumn
    framework: FloatColumn

    @property
    def total(self) -> FloatColumn:
        """Sum of all uses [B]."""
        result = np.zeros_like(self.weights)
        for use in fields(self):
            result += getattr(self, use.name)
        return result

    def row(self, index: int) -> dict[str, float]:
        """Return one entry as a mapping of use to bytes."""
        return {f.name: float(getattr(self, f.name)[index]) for f in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerActivations:
    """One layer on one rank; arrays of shape ``(num_plans,)``.

    Parameters
    ----------
    stored : FloatColumn
        Bytes kept per micro-batch by a layer that is recomputed as the plan says.
    whole : FloatColumn
        Bytes kept by a layer that is not recomputed.
    recomputed : FloatColumn
        Bytes that a layer's backward holds: its gradients, and with full recompute the whole layer.
    parameters : RankParameters
        The layer's parameters.
    """

    stored: FloatColumn
    whole: FloatColumn
    recomputed: FloatColumn
    parameters: RankParameters

    def take(self, index: IntColumn) -> LayerActivations:
        """Return the selected rows."""
        return LayerActivations(
            stored=self.stored[index],
            whole=self.whole[index],
            recomputed=self.recomputed[index],
            parameters=self.parameters.take(index),
        )


def layer_activation_bytes(context: CostContext, columns: PlanColumns) -> FloatColumn:
    """Return the bytes one layer stores for backward per micro-batch on one rank, shape ``(num_plans,)``."""
    return layer_activations(context, columns).stored


def layer_activations(context: CostContext, columns: PlanColumns) -> LayerActivations:
    """Return the activations of one layer, costed once per distinct layer shape.

    In a model with dense and MoE layers that of the fuller kind, so that a stage is never thought too small.
    """
    names = (*CASE_FIELDS, "recompute", "recompute_modules")
    rows, inverse = columns.distinct(*names)
    kinds = [_kind_activations(context, rows, is_moe=False)]
    if context.model.moe is not None:
        # The few dense layers that lead such a model are never where it is fullest.
        kinds = [_kind_activations(context, rows, is_moe=True)]
        if context.model.moe.layer_frequency > 1:
            kinds.append(_kind_activations(context, rows, is_moe=False))
    parameters = stacked_parameters(context, rows, np.ones(len(rows)), np.zeros(len(rows)))
    return LayerActivations(
        stored=np.maximum.reduce([kind[0] for kind in kinds])[inverse],
        whole=np.maximum.reduce([kind[1] for kind in kinds])[inverse],
        recomputed=np.maximum.reduce([kind[2] for kind in kinds])[inverse],
        parameters=parameters.take(inverse),
    )


def _kind_activations(
    context: CostContext, rows: PlanColumns, *, is_moe: bool
) -> tuple[FloatColumn, FloatColumn, FloatColumn]:
    parts = activation_parts(context, cases_of(rows), is_moe=is_moe)
    recomputed = np.where(rows.recompute == Recomputes.FULL, parts.whole, 0.0)
    recomputed = recomputed + backward_bytes(context, cases_of(rows), is_moe=is_moe)
    return stored_bytes(context, parts, rows), parts.whole, recomputed


def stage_memory(
    context: CostContext,
    columns: PlanColumns,
    activations: LayerActivations,
    stage: FloatColumn,
    layers: FloatColumn,
    has_embedding: FloatColumn,
    has_head: FloatColumn,
) -> MemoryColumns:
    """Return the memory of one stage per plan.

    Parameters
    ----------
    context : CostContext
        Job and software.
    columns : PlanColumns
        Plans.
    activations : LayerActivations
        What one layer stores and needs while it is recomputed.
    stage : FloatColumn
        Physical stage of each entry, 0 is the first.
    layers : FloatColumn
        Layers of that stage, all chunks.
    has_embedding, has_head : FloatColumn
        1.0 where the stage holds the embedding, the LM head.
    """
    model, software = context.model, context.software
    tp = columns.tp.astype(np.float64)
    is_vocab_parallel = columns.vocab_parallel >= VocabParallels.VOCAB_1
    head_parameters = model.num_head_parameters
    if model.has_tied_embeddings:
        # One table on a single stage; a copy on the last of several.
        head_parameters = model.num_embedding_parameters
    tied_extra = np.where(columns.has_both_ends & model.has_tied_embeddings, 0.0, head_parameters)
    boundary = has_embedding * model.num_embedding_parameters + has_head * tied_extra
    logits = has_head
    if is_vocab_parallel.any():
        spread = (model.num_embedding_parameters + head_parameters) / columns.pp
        boundary = np.where(is_vocab_parallel, spread, boundary)
        logits = np.where(is_vocab_parallel, 1.0 / columns.pp, has_head)
    parameters = activations.parameters.scaled(layers) + boundary_parameters(context, boundary / tp)
    held_layers = layers
    if model.num_mtp_layers:
        # Prediction modules sit behind the last layer: a layer and another set of logits each.
        parameters = parameters + mtp_parameters(context, columns).scaled(has_head)
        held_layers = layers + has_head * model.num_mtp_layers
        logits = logits * (1.0 + model.num_mtp_layers)
    states = _state_bytes(context, columns, parameters)
    # Of every chunk the first layers are recomputed, all of them where the plan says no number.
    recomputed = np.minimum(held_layers, columns.recompute_layers.astype(np.float64) * columns.vpp)
    stored = recomputed * activations.stored + (held_layers - recomputed) * activations.whole
    tokens = columns.micro_batch_size * context.workload.sequence_length / columns.cp
    message = 2.0 * tokens * model.hidden_size / np.where(columns.sequence_parallel, tp, 1.0)
    in_flight = stored * _in_flight_micro_batches(columns, stage)
    staging = np.zeros(len(columns))
    away = _away(context, columns, parameters, states, in_flight, activations.stored)
    if away is not None:
        states = _StateBytes(
            weights=away.weights, gradients=away.gradients, optimizer_states=away.optimizer_states
        )
        in_flight, staging = away.activations, away.staging
    return MemoryColumns(
        weights=states.weights,
        gradients=states.gradients,
        optimizer_states=states.optimizer_states,
        activations=in_flight,
        working_set=activations.recomputed
        + staging
        + _unsharded_bytes(context, columns, activations.parameters, parameters),
        logits=software.logit_memory_bytes * tokens * model.vocab_size / tp * logits,
        communication=np.where(columns.pp > 1, 2.0 * message, 0.0)
        + np.where(columns.sequence_parallel, message * tp, 0.0),
        framework=np.full(len(columns), software.framework_bytes),
    )


def _away(
    context: CostContext,
    columns: PlanColumns,
    parameters: RankParameters,
    states: _StateBytes,
    in_flight: FloatColumn,
    layer: FloatColumn,
) -> OffloadMemory | None:
    """Return what stays on the device where plans offload; None where none does."""
    is_away = (columns.optimizer_offload != Offloads.NONE) | (columns.parameter_offload != Offloads.NONE)
    if not (is_away.any() or columns.activation_offload.any()):
        return None
    ranks, expert_ranks = shard_ranks(columns), expert_shard_ranks(columns)
    shards_weights = columns.sharding >= Shardings.ZERO3
    shards_states = columns.sharding >= Shardings.ZERO1

    def held(dense: FloatColumn, expert: FloatColumn, is_sharded: NDArray[np.bool_]) -> FloatColumn:
        return dense / np.where(is_sharded, ranks, 1.0) + expert / np.where(is_sharded, expert_ranks, 1.0)

    return offload_memory(
        context,
        columns,
        weights=states.weights,
        gradients=states.gradients,
        optimizer_states=states.optimizer_states,
        activations=in_flight,
        layer_activations=layer,
        num_weights=held(parameters.dense, parameters.expert, shards_weights),
        num_trained=held(parameters.dense_trained, parameters.expert_trained, shards_states),
    )


def host_needs(context: CostContext, columns: PlanColumns) -> HostDemand | None:
    """Return what offload asks of a node's memory and drives, by its first stage; None where nothing is offloaded.

    Raises
    ------
    SpecError
        If the node does not say what it has.
    """
    activations = layer_activations(context, columns)
    layers = columns.layers_first.astype(np.float64)
    parameters = activations.parameters.scaled(layers) + boundary_parameters(
        context, context.model.num_embedding_parameters / columns.tp
    )
    stage = np.zeros(len(columns))
    stored = activations.stored * layers * _in_flight_micro_batches(columns, stage)
    states = _state_bytes(context, columns, parameters)
    away = _away(context, columns, parameters, states, stored, activations.stored)
    return None if away is None else host_demand(context, away.host, away.nvme)


def peak_memory(context: CostContext, columns: PlanColumns) -> FloatColumn:
    """Return the bytes of the fullest rank of each plan, shape ``(num_plans,)``.

    The first stage holds the embedding and the most micro-batches, the second the most of those without it,
    the earliest of the fullest inner stages the most layers, the last one head and logits. Inner stages
    differ by at most one layer and hold fewer micro-batches the later they come, so one of the four is the
    fullest.
    """
    activations = layer_activations(context, columns)
    zero, one = np.zeros(len(columns)), np.ones(len(columns))
    last = (columns.pp - 1).astype(np.float64)
    both = columns.has_both_ends.astype(np.float64)
    # The last stage of DualPipe mirrors the first, that of a V is the turn.
    is_mirror = columns.schedule == Schedules.DUALPIPE
    last_embedding = np.where((columns.pp == 1) | is_mirror, 1.0, 0.0)
    last_head = np.where((both > 0.0) & (columns.pp > 1) & ~is_mirror, 0.0, 1.0)

    def total(
        stage: FloatColumn, layers: IntColumn, embedding: FloatColumn, head: FloatColumn
    ) -> FloatColumn:
        held = layers.astype(np.float64)
        return stage_memory(context, columns, activations, stage, held, embedding, head).total

    def inner_total(chosen: IntColumn, stage: IntColumn, layers: IntColumn) -> FloatColumn:
        none = np.zeros(len(chosen))
        few = columns.take(chosen)
        held, index = layers[chosen].astype(np.float64), stage[chosen].astype(np.float64)
        return stage_memory(context, few, activations.take(chosen), index, held, none, none).total

    peak = np.maximum(
        total(zero, columns.layers_first, one, both),
        total(last, columns.layers_last, last_embedding, last_head),
    )
    inner = np.flatnonzero(columns.pp > 2)
    middle = inner_total(inner, columns.middle_earliest, columns.layers_middle)
    peak[inner] = np.maximum(peak[inner], middle)
    uneven = np.flatnonzero((columns.layers_second != columns.layers_middle) & (columns.pp > 2))
    if len(uneven):
        second = inner_total(uneven, np.minimum(columns.pp - 1, 1), columns.layers_second)
        peak[uneven] = np.maximum(peak[uneven], second)
    return peak * (1.0 + context.software.fragmentation)


def plan_memory(context: CostContext, plan: ParallelPlan) -> MemoryColumns:
    """Return the memory breakdown of every physical stage of one plan, shape ``(pp,)``."""
    if plan.layer_groups:
        # Layer-wise plans are made of uniform ones: that module builds on this one.
        from meshwright.costmodels.layer_groups import layer_group_memory

        return layer_group_memory(context, plan)
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    stages = columns.take(np.zeros(plan.pp, dtype=np.int64))
    layers = np.array(stage_layers(plan.layers_per_stage, plan.pp, plan.schedule), dtype=np.float64)
    index = np.arange(plan.pp, dtype=np.float64)
    is_first, is_last = index == 0, index == plan.pp - 1
    has_embedding, has_head = is_first.astype(np.float64), is_last.astype(np.float64)
    if plan.schedule in V_SHAPED:
        has_head = has_embedding
    elif plan.schedule == "dualpipe":
        has_embedding = has_head = (is_first | is_last).astype(np.float64)
    activations = layer_activations(context, stages)
    return stage_memory(context, stages, activations, index, layers, has_embedding, has_head)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _StateBytes:
    weights: FloatColumn
    gradients: FloatColumn
    optimizer_states: FloatColumn


def _state_bytes(context: CostContext, columns: PlanColumns, parameters: RankParameters) -> _StateBytes:
    """Return the bytes of weights, gradients and Adam states of a rank, each sharded or not.

    Mixed precision keeps a 16-bit working copy beside the fp32 master and moments (2 + gradient + 12 bytes);
    ZeRO-3 gathers it from the fp32 shard instead of storing it (4 + gradient + 8).
    """
    software = context.software
    is_wide = context.workload.precision in ("fp32", "tf32")
    ranks, expert_ranks = shard_ranks(columns), expert_shard_ranks(columns)
    is_zero3 = columns.sharding >= Shardings.ZERO3

    def held(dense: FloatColumn, expert: FloatColumn, sharded_from: int) -> FloatColumn:
        is_sharded = columns.sharding >= sharded_from
        return dense / np.where(is_sharded, ranks, 1.0) + expert / np.where(is_sharded, expert_ranks, 1.0)

    dense_trained, expert_trained = parameters.dense_trained, parameters.expert_trained
    weights = held(parameters.dense, parameters.expert, Shardings.ZERO3)
    if context.is_lora:
        # Frozen weights have no fp32 master, whoever holds them.
        frozen = held(parameters.dense - dense_trained, parameters.expert - expert_trained, Shardings.ZERO3)
        weights = weights - 0.5 * np.where(is_zero3 & (not is_wide), frozen, 0.0)
    weight = np.where(is_zero3 | is_wide, 4.0, 2.0)
    gradient = 4.0 if is_wide else context.gradient_bytes
    optimizer = np.where(is_zero3 | is_wide, 8.0, 12.0) + software.extra_state_bytes
    return _StateBytes(
        weights=weight * weights,
        gradients=gradient * held(dense_trained, expert_trained, Shardings.ZERO2),
        optimizer_states=optimizer * held(dense_trained, expert_trained, Shardings.ZERO1),
    )


def _in_flight_micro_batches(columns: PlanColumns, stage: FloatColumn) -> FloatColumn:
    """Return how many micro-batches' activations a stage holds at its peak, in whole-stage units.

    The declared peaks of the schedules (training oracle of each; interleaving holds
    ``p v + p - 1 - 2 r`` chunks on stage ``r``).
    """
    pp, vpp = columns.pp.astype(np.float64), columns.vpp.astype(np.float64)
    batches = columns.num_micro_batches.astype(np.float64)
    one_f_one_b = np.minimum(batches, pp - stage)
    interleaved = np.minimum(batches * vpp, pp * vpp + pp - 1.0 - 2.0 * stage) / vpp
    in_flight = np.where(columns.schedule == Schedules.INTERLEAVED, interleaved, one_f_one_b)
    in_flight = np.where(columns.schedule == Schedules.GPIPE, batches, in_flight)
    if (columns.schedule > Schedules.INTERLEAVED).any():
        in_flight = np.where(columns.schedule == Schedules.ZB_H1, np.minimum(batches, pp), in_flight)
        # The hand-crafted ZB-H2 fills every stage with 2p - 1 micro-batches (Qi et al. 2024, table 2).
        filled = np.minimum(batches, 2.0 * pp - 1.0)
        in_flight = np.where(columns.schedule == Schedules.ZB_H2, filled, in_flight)
        # Both chunks of a V together; DualPipe's chunks are half of what its stages hold (meshwright.simcore.schedules).
        for code, peak in (
            (Schedules.ZB_V, pp),
            (Schedules.V_HALF, np.floor((pp + 2.0) / 2.0)),
            (Schedules.V_MIN, np.floor((pp + 4.0) / 3.0)),
            (Schedules.DUALPIPE, 0.5 * (pp + 1.0)),
            (Schedules.DUALPIPE_V, 0.5 * (2.0 * pp + 1.0)),
        ):
            in_flight = np.where(columns.schedule == code, np.minimum(batches, peak), in_flight)
    if columns.vocab_parallel.any():
        extra = np.where(columns.vocab_parallel == VocabParallels.VOCAB_1, 2.0, 0.0)
        extra = np.where(columns.vocab_parallel == VocabParallels.VOCAB_2, 1.0, extra)
        is_interlaced = columns.vocab_parallel == VocabParallels.INTERLACED
        in_flight = np.where(is_interlaced, 1.5 * in_flight, in_flight + extra)
    return np.where(columns.pp > 1, np.minimum(in_flight, batches), 1.0)


def _unsharded_bytes(
    context: CostContext, columns: PlanColumns, layer: RankParameters, parameters: RankParameters
) -> FloatColumn:
    """Return the weights and gradients that sharded data parallelism holds on top of its shard [B].

    While it syncs on every micro-batch: the gathered layer, its successor and the root unit (ZeRO-3), and the
    unreduced gradients of a layer and of the LM head. Where it keeps them between the micro-batches of a
    pipeline: those of the whole stage.
    """
    shards_gradients = (columns.sharding >= Shardings.ZERO2) & (shard_ranks(columns) > 1)
    if not shards_gradients.any():
        return np.zeros(len(columns))
    model = context.model
    root = (model.num_embedding_parameters + model.num_head_parameters) / columns.tp
    trained = layer.dense_trained + layer.expert_trained
    head = (model.num_head_parameters or model.num_embedding_parameters) / columns.tp
    shards_weights = columns.sharding >= Shardings.ZERO3
    weights = np.where(shards_weights, 2.0 * (2.0 * layer.total + root), 0.0)
    head = np.zeros_like(head) if context.is_lora else head
    per_micro_batch = weights + context.gradient_bytes * (trained + head)
    kept = np.where(shards_weights, 2.0, 0.0) * parameters.total + context.gradient_bytes * (
        parameters.dense_trained + parameters.expert_trained
    )
    held = np.where(is_fsdp_per_micro_batch(context, columns), per_micro_batch, kept)
    return np.where(shards_gradients, held, 0.0)
