"""Device memory of one rank, by what fills it: a breakdown per pipeline stage, for many plans at once.

Stored activations follow Korthikanti et al. 2022 (section 4) generalised to grouped queries and gated MLPs:
their 10 + 24/t + 5as/(ht), 34/t and 2 bytes per token and hidden unit come out for a GPT layer (tested).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.parallelism.data import is_fsdp_per_micro_batch, shard_ranks
from meshwright.costmodels.parameters import rank_boundary_parameters, rank_layer_parameters
from meshwright.costmodels.plan_columns import (
    FloatColumn,
    IntColumn,
    PlanColumns,
    Recomputes,
    Schedules,
    Shardings,
    VocabParallels,
)
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = [
    "LayerActivations",
    "MemoryColumns",
    "layer_activation_bytes",
    "layer_activations",
    "peak_memory",
    "plan_memory",
    "stage_memory",
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryColumns:
    """Bytes of one rank by use; arrays of one shape, ``(num_plans,)`` or ``(num_stages,)``.

    ``working_set`` is the layer being recomputed and what FSDP holds gathered.
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


def layer_activation_bytes(context: CostContext, columns: PlanColumns) -> FloatColumn:
    """Return the bytes one layer stores for backward per micro-batch on one rank, shape ``(num_plans,)``.

    Notes
    -----
    Per token, 2-byte elements: inputs of both norms and of both column-split products (8h), dropout masks (2h),
    split over tp: queries, keys, values and the projection's input, MLP pre-activations and its output; the
    score matrix (5 a s) only when attention is unfused and not recomputed. Sequence parallelism splits the
    first group too. Full recompute keeps the layer's input alone.
    """
    model = context.model
    tp = columns.tp.astype(np.float64)
    tokens = columns.micro_batch_size * context.workload.sequence_length / columns.cp
    shared = 8.0 * model.hidden_size
    if model.has_parallel_block or model.norms_per_layer == 1:
        shared = 4.0 * model.hidden_size
    if model.position_embedding == "learned":
        shared += 2.0 * model.hidden_size
    query = model.num_attention_heads * model.head_dim
    key_value = np.maximum(model.num_query_groups / tp, 1.0) * model.head_dim * tp
    split = 4.0 * query + 4.0 * key_value + (6.0 if model.is_gated_mlp else 4.0) * model.ffn_hidden_size
    scores = 0.0
    if context.attention_kernel == "unfused":
        scores = 5.0 * model.num_attention_heads * context.workload.sequence_length
    shared_divisor = np.where(columns.sequence_parallel, tp, 1.0)
    none = tokens * (shared / shared_divisor + (split + scores) / tp)
    selective = tokens * (shared / shared_divisor + split / tp)
    if context.software.selective_recompute == "operators":
        # The layer's input, attention's output and every second product stay (torchtitan's operator policy):
        # queries, values, the first MLP product and the MLP's output.
        kept = 2.0 * query + key_value + model.ffn_hidden_size
        selective = tokens * 2.0 * (2.0 * model.hidden_size / shared_divisor + kept / tp)
    full = tokens * 2.0 * model.hidden_size / shared_divisor
    return (
        context.element_bytes
        / 2.0
        * np.where(
            columns.recompute == Recomputes.FULL,
            full,
            np.where(columns.recompute == Recomputes.SELECTIVE, selective, none),
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerActivations:
    """One layer on one rank: activation bytes it stores per micro-batch, bytes its recomputation holds, parameters."""

    stored: FloatColumn
    recomputed: FloatColumn
    parameters: FloatColumn

    def take(self, index: IntColumn) -> LayerActivations:
        """Return the selected rows."""
        return LayerActivations(
            stored=self.stored[index], recomputed=self.recomputed[index], parameters=self.parameters[index]
        )


def layer_activations(context: CostContext, columns: PlanColumns) -> LayerActivations:
    """Return the activation bytes of one layer, costed once per distinct layer shape."""
    rows, inverse = columns.distinct("tp", "cp", "micro_batch_size", "sequence_parallel", "recompute")
    stored = layer_activation_bytes(context, rows)
    whole = layer_activation_bytes(context, rows.with_recompute(Recomputes.NONE))
    recomputed = np.where(rows.recompute == Recomputes.FULL, whole, 0.0)
    return LayerActivations(
        stored=stored[inverse],
        recomputed=recomputed[inverse],
        parameters=rank_layer_parameters(context.model, rows.tp)[inverse],
    )


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
    tied_extra = np.where((columns.pp == 1) & model.has_tied_embeddings, 0.0, head_parameters)
    boundary = has_embedding * model.num_embedding_parameters + has_head * tied_extra
    logits = has_head
    if is_vocab_parallel.any():
        spread = (model.num_embedding_parameters + head_parameters) / columns.pp
        boundary = np.where(is_vocab_parallel, spread, boundary)
        logits = np.where(is_vocab_parallel, 1.0 / columns.pp, has_head)
    parameters = layers * activations.parameters + boundary / tp
    states = _state_bytes(context, columns, parameters)
    tokens = columns.micro_batch_size * context.workload.sequence_length / columns.cp
    message = 2.0 * tokens * model.hidden_size / np.where(columns.sequence_parallel, tp, 1.0)
    return MemoryColumns(
        weights=states.weights,
        gradients=states.gradients,
        optimizer_states=states.optimizer_states,
        activations=activations.stored * layers * _in_flight_micro_batches(columns, stage),
        working_set=activations.recomputed
        + _unsharded_bytes(context, columns, activations.parameters, parameters),
        logits=software.logit_memory_bytes * tokens * model.vocab_size / tp * logits,
        communication=np.where(columns.pp > 1, 2.0 * message, 0.0)
        + np.where(columns.sequence_parallel, message * tp, 0.0),
        framework=np.full(len(columns), software.framework_bytes),
    )


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
    is_alone = (columns.pp == 1).astype(np.float64)

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
        total(zero, columns.layers_first, one, is_alone), total(last, columns.layers_last, is_alone, one)
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
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    stages = columns.take(np.zeros(plan.pp, dtype=np.int64))
    layers = np.array(
        [sum(plan.layers_per_stage[stage :: plan.pp]) for stage in range(plan.pp)], dtype=np.float64
    )
    index = np.arange(plan.pp, dtype=np.float64)
    has_embedding, has_head = (index == 0).astype(np.float64), (index == plan.pp - 1).astype(np.float64)
    activations = layer_activations(context, stages)
    return stage_memory(context, stages, activations, index, layers, has_embedding, has_head)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _StateBytes:
    weights: FloatColumn
    gradients: FloatColumn
    optimizer_states: FloatColumn


def _state_bytes(context: CostContext, columns: PlanColumns, parameters: FloatColumn) -> _StateBytes:
    """Return the bytes of weights, gradients and Adam states of a rank, each sharded or not.

    Mixed precision keeps a 16-bit working copy beside the fp32 master and moments (2 + gradient + 12 bytes);
    ZeRO-3 gathers it from the fp32 shard instead of storing it (4 + gradient + 8).
    """
    software = context.software
    is_wide = context.workload.precision in ("fp32", "tf32")
    ranks = shard_ranks(columns)
    is_zero3 = columns.sharding >= Shardings.ZERO3
    weight = np.where(is_zero3 | is_wide, 4.0, 2.0)
    gradient = 4.0 if is_wide else context.gradient_bytes
    optimizer = np.where(is_zero3 | is_wide, 8.0, 12.0) + software.extra_state_bytes
    return _StateBytes(
        weights=weight * parameters / np.where(is_zero3, ranks, 1.0),
        gradients=gradient * parameters / np.where(columns.sharding >= Shardings.ZERO2, ranks, 1.0),
        optimizer_states=optimizer * parameters / np.where(columns.sharding >= Shardings.ZERO1, ranks, 1.0),
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
    if columns.vocab_parallel.any():
        extra = np.where(columns.vocab_parallel == VocabParallels.VOCAB_1, 2.0, 0.0)
        extra = np.where(columns.vocab_parallel == VocabParallels.VOCAB_2, 1.0, extra)
        is_interlaced = columns.vocab_parallel == VocabParallels.INTERLACED
        in_flight = np.where(is_interlaced, 1.5 * in_flight, in_flight + extra)
    return np.where(columns.pp > 1, np.minimum(in_flight, batches), 1.0)


def _unsharded_bytes(
    context: CostContext, columns: PlanColumns, layer: FloatColumn, parameters: FloatColumn
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
    root = rank_boundary_parameters(model, columns.tp)
    head = (model.num_head_parameters or model.num_embedding_parameters) / columns.tp
    shards_weights = columns.sharding >= Shardings.ZERO3
    weights = np.where(shards_weights, 2.0 * (2.0 * layer + root), 0.0)
    per_micro_batch = weights + context.gradient_bytes * (layer + head)
    kept = np.where(shards_weights, 2.0, 0.0) * parameters + context.gradient_bytes * parameters
    held = np.where(is_fsdp_per_micro_batch(context, columns), per_micro_batch, kept)
    return np.where(shards_gradients, held, 0.0)
