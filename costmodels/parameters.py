"""Parameters one rank holds, by how they are replicated: those of experts over fewer ranks than the others."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn, PlanColumns, VocabParallels
from meshwright.simcore.domain import model_parameters
from meshwright.simcore.domain.model import ModelSpec

__all__ = ["RankParameters", "boundary_parameters", "layer_parameters", "mtp_parameters", "no_parameters"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankParameters:
    """Parameters on one rank; arrays of one shape.

    Parameters
    ----------
    dense, expert : FloatColumn
        Weights replicated over dp x cp ranks, and routed experts' weights, replicated over
        ``tp * cp * dp / (ep * etp)`` ranks.
    dense_trained, expert_trained : FloatColumn
        Those with a gradient and optimizer states: all of them, or the adapters of LoRA.
    """

    dense: FloatColumn
    expert: FloatColumn
    dense_trained: FloatColumn
    expert_trained: FloatColumn

    @property
    def total(self) -> FloatColumn:
        """All weights."""
        return self.dense + self.expert

    def __add__(self, other: RankParameters) -> RankParameters:
        """Return both together."""
        return RankParameters(
            **{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)}
        )

    def scaled(self, factor: FloatColumn | float) -> RankParameters:
        """Return that many times the parameters."""
        return RankParameters(**{each.name: factor * getattr(self, each.name) for each in fields(self)})

    def take(self, index: IntColumn) -> RankParameters:
        """Return the selected rows."""
        return RankParameters(**{each.name: getattr(self, each.name)[index] for each in fields(self)})


def no_parameters(num_plans: int) -> RankParameters:
    """Return zeros."""
    nothing = np.zeros(num_plans)
    return RankParameters(dense=nothing, expert=nothing, dense_trained=nothing, expert_trained=nothing)


def layer_parameters(context: CostContext, columns: PlanColumns, *, is_moe: bool) -> RankParameters:
    """Return the parameters of one layer on one rank.

    An even split over tp, but for key and value projections: with fewer groups than ranks every rank keeps a copy
    of one group (Megatron's KV replication); MLA's down projections and the router are whole on every rank.
    """
    model = context.model
    tp = columns.tp.astype(np.float64)
    if is_moe and model.moe is not None:
        moe = model.moe
        routed = moe.num_experts * model.num_expert_parameters
        whole = float(model_parameters.router_parameters(model))
        split = float(model.num_moe_layer_parameters - routed) - whole
        expert = routed / (columns.ep * columns.etp)
    else:
        whole, split = 0.0, float(model.num_layer_parameters)
        expert = np.zeros(len(columns))
    if model.mla is None:
        held_groups = np.maximum(model.num_query_groups / tp, 1.0)
        extra_groups = held_groups - model.num_query_groups / tp
        dense = split / tp + whole + 2.0 * model.hidden_size * model.head_dim * extra_groups
    else:
        down = float(model.hidden_size * ((model.mla.q_lora_rank or 0) + _key_value_latent(model)))
        dense = (split - down) / tp + down + whole
    if not context.is_lora:
        return RankParameters(dense=dense, expert=expert, dense_trained=dense, expert_trained=expert)
    adapters = _adapter_parameters(context, is_moe) / tp
    return RankParameters(
        dense=dense + adapters,
        expert=expert,
        dense_trained=adapters,
        expert_trained=np.zeros(len(columns)),
    )


def _key_value_latent(model: ModelSpec) -> int:
    assert model.mla is not None
    return model.mla.kv_lora_rank + model.mla.qk_rope_head_dim


def _adapter_parameters(context: CostContext, is_moe: bool) -> float:
    """Return ``rank (in + out)`` summed over the matrices of one layer but the routed experts'."""
    model = context.model
    width = model.ffn_hidden_size
    if is_moe and model.moe is not None:
        width = model.moe.shared_ffn_hidden_size
    hidden, heads = model.hidden_size, model.num_attention_heads
    if model.mla is None:
        query = heads * model.head_dim
        sides = (hidden + query + 2 * model.num_query_groups * model.head_dim) + (query + hidden)
    else:
        mla = model.mla
        query, up = heads * model.head_dim, heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        latent = mla.q_lora_rank
        sides = hidden + query if latent is None else hidden + 2 * latent + query
        sides += hidden + _key_value_latent(model) + mla.kv_lora_rank + up + heads * mla.v_head_dim + hidden
    if width:
        sides += hidden + (2 if model.is_gated_mlp else 1) * width + width + hidden
    return float((context.workload.lora_rank or 0) * sides)


def boundary_parameters(context: CostContext, num_parameters: FloatColumn) -> RankParameters:
    """Return the parameters of embedding or LM head: dense, and frozen beside adapters."""
    nothing = np.zeros_like(num_parameters)
    trained = nothing if context.is_lora else num_parameters
    return RankParameters(dense=num_parameters, expert=nothing, dense_trained=trained, expert_trained=nothing)


def mtp_parameters(context: CostContext, columns: PlanColumns) -> RankParameters:
    """Return what the last stage holds for multi-token prediction: layers, and the projections of their two inputs.

    The modules look up the next tokens too: where the embedding sits on another stage, and is not spread over all, the
    last one keeps a copy of its table (Megatron-Core; DeepSeek-V3 puts both ends on one stage, arXiv 2412.19437,
    section 2.2).
    """
    model = context.model
    if not model.num_mtp_layers:
        return no_parameters(len(columns))
    layer = layer_parameters(context, columns, is_moe=model.moe is not None)
    projection = boundary_parameters(context, 2.0 * model.hidden_size**2 / columns.tp)
    # The copy of a tied head serves both.
    is_apart = ~columns.has_both_ends & (columns.vocab_parallel < VocabParallels.VOCAB_1)
    keeps_copy = is_apart & (not model.has_tied_embeddings)
    table = np.where(keeps_copy, model.num_embedding_parameters / columns.tp, 0.0)
    return (layer + projection).scaled(float(model.num_mtp_layers)) + boundary_parameters(context, table)
