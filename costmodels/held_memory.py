"""What one rank holds, in two shares: what follows from the micro-batch, and what follows from the parameters.

Every use belongs to one of them, so the memory of many plans is a sum of two smaller tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.activations import activation_parts, stored_bytes
from meshwright.costmodels.layers.cases import CASE_FIELDS, cases_of
from meshwright.costmodels.layers.transients import backward_bytes
from meshwright.costmodels.parallelism.data import expert_shard_ranks, is_fsdp_per_micro_batch, shard_ranks
from meshwright.costmodels.parallelism.offload_memory import OffloadMemory, offload_memory
from meshwright.costmodels.parameters import (
    RankParameters,
    boundary_parameters,
    layer_parameters,
    mtp_parameters,
    no_parameters,
)
from meshwright.costmodels.plan_columns import (
    FloatColumn,
    IntColumn,
    Offloads,
    PlanColumns,
    Recomputes,
    Schedules,
    Shardings,
    VocabParallels,
)
from meshwright.costmodels.stage import leading_dense_layers, stacked_parameters

__all__ = [
    "HeldActivations",
    "HeldStates",
    "LayerActivations",
    "LayerKinds",
    "held_activations",
    "held_states",
    "is_away",
    "layer_activation_bytes",
    "layer_activations",
    "layer_kinds",
]


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
        Bytes that a layer's backward holds: its gradients, what it gathers, and with full recompute the whole layer.
    parameters : RankParameters
        The layer's parameters.
    leading : LayerActivations | None
        The same of the dense layers that lead a mixture-of-experts model; None where none do.
    """

    stored: FloatColumn
    whole: FloatColumn
    recomputed: FloatColumn
    parameters: RankParameters
    leading: LayerActivations | None = None

    def take(self, index: IntColumn) -> LayerActivations:
        """Return the selected rows."""
        return LayerActivations(
            stored=self.stored[index],
            whole=self.whole[index],
            recomputed=self.recomputed[index],
            parameters=self.parameters.take(index),
            leading=None if self.leading is None else self.leading.take(index),
        )

    @property
    def kinds(self) -> LayerKinds:
        """The parameters alone."""
        leading = None if self.leading is None else self.leading.parameters
        return LayerKinds(parameters=self.parameters, leading=leading)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerKinds:
    """Parameters of one layer on one rank, and of one of the leading dense ones of a mixture-of-experts model."""

    parameters: RankParameters
    leading: RankParameters | None


def layer_kinds(context: CostContext, columns: PlanColumns) -> LayerKinds:
    """Return the parameters of one layer; where dense and MoE layers alternate, their mean."""
    return LayerKinds(
        parameters=stacked_parameters(context, columns, np.ones(len(columns)), np.zeros(len(columns))),
        leading=layer_parameters(context, columns, is_moe=False) if leading_dense_layers(context) else None,
    )


def layer_activation_bytes(context: CostContext, columns: PlanColumns) -> FloatColumn:
    """Return the bytes one layer stores for backward per micro-batch on one rank, shape ``(num_plans,)``."""
    return layer_activations(context, columns).stored


def layer_activations(context: CostContext, columns: PlanColumns) -> LayerActivations:
    """Return the activations of one layer, costed once per distinct layer shape.

    In a model whose dense and MoE layers alternate that of the fuller kind, so that a stage is never thought too
    small.
    """
    names = (*CASE_FIELDS, "recompute", "recompute_modules")
    rows, inverse = columns.distinct(*names)
    kinds = [_kind_activations(context, rows, is_moe=False)]
    if context.model.moe is not None:
        kinds = [_kind_activations(context, rows, is_moe=True)]
        if context.model.moe.layer_frequency > 1:
            kinds.append(_kind_activations(context, rows, is_moe=False))
    parameters = layer_kinds(context, rows)
    leading = None
    if parameters.leading is not None:
        stored, whole, recomputed = _kind_activations(context, rows, is_moe=False)
        leading = LayerActivations(
            stored=stored,
            whole=whole,
            recomputed=recomputed,
            parameters=parameters.leading,
        )
    layer = LayerActivations(
        stored=np.maximum.reduce([kind[0] for kind in kinds]),
        whole=np.maximum.reduce([kind[1] for kind in kinds]),
        recomputed=np.maximum.reduce([kind[2] for kind in kinds]),
        parameters=parameters.parameters,
        leading=leading,
    )
    return layer.take(inverse)


def _kind_activations(
    context: CostContext, rows: PlanColumns, *, is_moe: bool
) -> tuple[FloatColumn, FloatColumn, FloatColumn]:
    parts = activation_parts(context, cases_of(rows), is_moe=is_moe)
    recomputed = np.where(rows.recompute == Recomputes.FULL, parts.whole, 0.0)
    recomputed = recomputed + backward_bytes(context, cases_of(rows), is_moe=is_moe)
    return stored_bytes(context, parts, rows), parts.whole, recomputed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldActivations:
    """Bytes of one rank; arrays of shape ``(num_plans,)``, or ``(num_stages, num_plans)``."""

    in_flight: FloatColumn
    recomputed: FloatColumn
    logits: FloatColumn
    communication: FloatColumn
    host: FloatColumn


def held_activations(
    context: CostContext,
    columns: PlanColumns,
    activations: LayerActivations,
    stage: FloatColumn,
    layers: FloatColumn,
    leading: FloatColumn,
    has_head: FloatColumn,
) -> HeldActivations:
    """Return what follows from the micro-batch: activations, what a layer's backward holds, logits and messages.

    Parameters
    ----------
    context : CostContext
        Job and software.
    columns : PlanColumns
        Plans.
    activations : LayerActivations
        Of one layer.
    stage, layers, leading, has_head : FloatColumn
        Stage, its layers, the leading dense ones of them, 1.0 where it holds the LM head; shape ``(num_plans,)`` or
        ``(num_stages, num_plans)``.
    """
    model, software = context.model, context.software
    tp = columns.tp.astype(np.float64)
    logits = has_head
    is_vocab_parallel = columns.vocab_parallel >= VocabParallels.VOCAB_1
    if is_vocab_parallel.any():
        logits = np.where(is_vocab_parallel, 1.0 / columns.pp, has_head)
    # Prediction modules sit behind the last layer: a layer and another set of logits each.
    held_layers = layers
    if model.num_mtp_layers:
        held_layers = layers + has_head * model.num_mtp_layers
        logits = logits * (1.0 + model.num_mtp_layers)
    # Of every chunk the first layers are recomputed, all of them where the plan says no number.
    per_chunk = columns.recompute_layers.astype(np.float64)
    recomputed = np.minimum(held_layers, per_chunk * columns.vpp)
    working = activations.recomputed
    kind = activations.leading
    if kind is None:
        stored = recomputed * activations.stored + (held_layers - recomputed) * activations.whole
    else:
        # The leading layers are the first of the first chunk.
        both = np.minimum(leading, per_chunk)
        recomputed = np.minimum(recomputed - both, held_layers - leading)
        stored = recomputed * activations.stored + (held_layers - leading - recomputed) * activations.whole
        stored = stored + both * kind.stored + (leading - both) * kind.whole
        largest = np.where(held_layers > leading, np.maximum(working, kind.recomputed), kind.recomputed)
        working = np.where(leading > 0.0, largest, working)
    tokens = columns.micro_batch_size * context.workload.sequence_length / columns.cp
    message = 2.0 * tokens * model.hidden_size / np.where(columns.sequence_parallel, tp, 1.0)
    in_flight = stored * _in_flight_micro_batches(columns, stage)
    host = np.zeros_like(in_flight)
    if columns.activation_offload.any():
        away = _away(context, columns, no_parameters(len(columns)), None, in_flight, activations.stored)
        in_flight, host = away.activations, away.host
    return HeldActivations(
        in_flight=in_flight,
        recomputed=working,
        logits=software.logit_memory_bytes * tokens * model.vocab_size / tp * logits,
        communication=np.where(columns.pp > 1, 2.0 * message, 0.0),
        host=host,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldStates:
    """Bytes of one rank; arrays of shape ``(num_plans,)``, or ``(num_stages, num_plans)``."""

    weights: FloatColumn
    gradients: FloatColumn
    optimizer_states: FloatColumn
    staging: FloatColumn
    unsharded: FloatColumn
    host: FloatColumn
    nvme: FloatColumn


def held_states(
    context: CostContext,
    columns: PlanColumns,
    layer: LayerKinds,
    layers: FloatColumn,
    leading: FloatColumn,
    has_embedding: FloatColumn,
    has_head: FloatColumn,
) -> HeldStates:
    """Return what follows from the parameters, sharded or not, wherever they rest.

    Parameters
    ----------
    context : CostContext
        Job and software.
    columns : PlanColumns
        Plans.
    layer : LayerKinds
        Parameters of one layer.
    layers, leading, has_embedding, has_head : FloatColumn
        Layers of the stage, the leading dense ones of them, 1.0 where it holds the embedding, the LM head; shape
        ``(num_plans,)`` or ``(num_stages, num_plans)``.
    """
    model = context.model
    is_vocab_parallel = columns.vocab_parallel >= VocabParallels.VOCAB_1
    head_parameters = model.num_head_parameters
    if model.has_tied_embeddings:
        # One table on a single stage; a copy on the last of several.
        head_parameters = model.num_embedding_parameters
    tied_extra = np.where(columns.has_both_ends & model.has_tied_embeddings, 0.0, head_parameters)
    boundary = has_embedding * model.num_embedding_parameters + has_head * tied_extra
    if is_vocab_parallel.any():
        spread = (model.num_embedding_parameters + head_parameters) / columns.pp
        boundary = np.where(is_vocab_parallel, spread, boundary)
    parameters = layer.parameters.scaled(layers - leading)
    if layer.leading is not None:
        parameters = parameters + layer.leading.scaled(leading)
    # Gathered weights are cast as they are used.
    copies = np.where(columns.sharding < Shardings.ZERO3, context.narrow_copy_bytes * parameters.total, 0.0)
    parameters = parameters + boundary_parameters(context, boundary / columns.tp)
    if model.num_mtp_layers:
        parameters = parameters + mtp_parameters(context, columns).scaled(has_head)
    states = _state_bytes(context, columns, parameters)
    states = replace(states, weights=states.weights + copies)
    nothing = np.zeros_like(parameters.dense)
    unsharded = _unsharded_bytes(context, columns, layer.parameters, parameters)
    if not is_away(columns).any():
        return HeldStates(
            weights=states.weights,
            gradients=states.gradients,
            optimizer_states=states.optimizer_states,
            staging=nothing,
            unsharded=unsharded,
            host=nothing,
            nvme=nothing,
        )
    away = _away(context, columns, parameters, states, nothing, np.zeros(len(columns)))
    return HeldStates(
        weights=away.weights,
        gradients=away.gradients,
        optimizer_states=away.optimizer_states,
        staging=away.staging,
        unsharded=unsharded,
        host=away.host,
        nvme=away.nvme,
    )


def is_away(columns: PlanColumns) -> NDArray[np.bool_]:
    """Return which plans keep optimizer states or weights off the device."""
    away: NDArray[np.bool_] = (columns.optimizer_offload != Offloads.NONE) | (
        columns.parameter_offload != Offloads.NONE
    )
    return away


def _away(
    context: CostContext,
    columns: PlanColumns,
    parameters: RankParameters,
    states: _StateBytes | None,
    in_flight: FloatColumn,
    layer: FloatColumn,
) -> OffloadMemory:
    """Return what stays on the device of states, or of activations where there are no states to ask about."""
    ranks, expert_ranks = shard_ranks(columns), expert_shard_ranks(columns)
    nothing = np.zeros(len(columns))

    def held(dense: FloatColumn, expert: FloatColumn, is_sharded: NDArray[np.bool_]) -> FloatColumn:
        return dense / np.where(is_sharded, ranks, 1.0) + expert / np.where(is_sharded, expert_ranks, 1.0)

    return offload_memory(
        context,
        columns,
        weights=nothing if states is None else states.weights,
        gradients=nothing if states is None else states.gradients,
        optimizer_states=nothing if states is None else states.optimizer_states,
        activations=in_flight,
        layer_activations=layer,
        num_weights=held(parameters.dense, parameters.expert, columns.sharding >= Shardings.ZERO3),
        num_trained=held(
            parameters.dense_trained, parameters.expert_trained, columns.sharding >= Shardings.ZERO1
        ),
    )


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
    # Where the weights are the master copy, the moments alone.
    adam = context.adam_state_bytes
    optimizer = np.where(is_zero3 | is_wide, adam - 4.0, adam) + software.extra_state_bytes
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
    # The layer at work has its gradient in 16 bits before it is added to the buffer.
    kept = np.where(shards_weights, 2.0, 0.0) * parameters.total + 2.0 * trained
    kept = kept + context.gradient_bytes * (parameters.dense_trained + parameters.expert_trained)
    held = np.where(is_fsdp_per_micro_batch(context, columns), per_micro_batch, kept)
    return np.where(shards_gradients, held, 0.0)
