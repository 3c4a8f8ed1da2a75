"""What one layer stores for its backward, part by part, per micro-batch on one rank.

Follows Korthikanti et al. 2022 (section 4) generalised to grouped queries, gated MLPs, latent attention and routed
experts: their 10 + 24/t + 5as/(ht), 34/t and 2 bytes per token and hidden unit come out for a GPT layer (tested).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.layers.experts import expert_load, routed_rows
from meshwright.costmodels.layers.transients import attended_groups
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn, PlanColumns, Recomputes
from meshwright.simcore.domain.plan import RECOMPUTE_MODULES

__all__ = ["WITHIN_MOE", "ActivationParts", "activation_parts", "stored_bytes"]

WITHIN_MOE = ("moe_act", "shared_experts")
"""Recompute modules that are parts of another, ``moe``: naming both is naming that one."""

_MOE_BIT = RECOMPUTE_MODULES.index("moe")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActivationParts:
    """Bytes of one layer's stored activations by what would free them; arrays of shape ``(num_cases,)``.

    Parameters
    ----------
    layer_input : FloatColumn
        The layer's input, all that full recompute keeps.
    kept : FloatColumn
        The rest that no module of selective recompute frees.
    core_attn, layernorm, mla_up_proj, mlp, moe, moe_act, shared_experts : FloatColumn
        What recomputing each module frees; ``moe`` is the whole block and includes ``moe_act`` and
        ``shared_experts``.
    operators : FloatColumn
        All that torchtitan's operator policy keeps.
    """

    layer_input: FloatColumn
    kept: FloatColumn
    core_attn: FloatColumn
    layernorm: FloatColumn
    mla_up_proj: FloatColumn
    mlp: FloatColumn
    moe: FloatColumn
    moe_act: FloatColumn
    shared_experts: FloatColumn
    operators: FloatColumn

    @property
    def whole(self) -> FloatColumn:
        """Everything, without recompute [B]."""
        parts = (self.core_attn, self.layernorm, self.mla_up_proj, self.mlp, self.moe)
        return sum(parts, self.layer_input + self.kept)

    def take(self, index: IntColumn) -> ActivationParts:
        """Return the selected cases."""
        return ActivationParts(**{each.name: getattr(self, each.name)[index] for each in fields(self)})


def activation_parts(context: CostContext, cases: LayerCases, *, is_moe: bool) -> ActivationParts:
    """Return the stored activations of one layer.

    Notes
    -----
    Per token, 2-byte elements: inputs of both norms and of both column-split products (8h), dropout masks (2h),
    split over tp: queries, keys, values and the projection's input, MLP pre-activations and its output; the
    score matrix (5 a s) only when attention is unfused. Sequence parallelism splits the first group too, the inputs
    of products where software gathers them again for backward. MLA stores both latents besides.

    A routed row stores its input, pre-activations and activation, and the experts' output where the router's weights
    are applied to that (not in Megatron-Core since 0.12: they are applied within the activation, and neither the
    permutations nor the exchange save a tensor). Frozen experts, which have no adapters, need their pre-activations
    alone. Router scores are fp32. Where products in a narrow format keep their inputs in it, norms, activations and
    routed inputs are as wide as that; attention keeps its own output in 16 bits (Transformer Engine's documentation,
    "Low precision training: performance considerations").
    """
    model = context.model
    tp = cases.tp
    tokens = cases.num_tokens(context.workload.sequence_length)
    width, narrow = context.element_bytes, context.kept_input_bytes
    shared = np.where(cases.sequence_parallel, tokens / tp, tokens)
    split = tokens / tp
    hidden = float(model.hidden_size)
    nothing = np.zeros_like(tokens)
    layer_input = width * hidden * shared
    has_one_norm = model.has_parallel_block or model.norms_per_layer == 1
    # Outputs of the norms, which are inputs of products; with a second norm also the input of that one.
    norms = narrow * shared
    if context.software.keeps_gathered_inputs:
        norms = np.where(cases.sequence_parallel, context.gathered_bytes * tokens, norms)
    norms = norms * (1.0 if has_one_norm else 2.0) * hidden
    kept = nothing if has_one_norm else width * hidden * shared
    if model.position_embedding == "learned":
        kept = kept + width * hidden * shared
    mla_up = nothing
    if model.mla is None:
        key_value = attended_groups(context, cases) * model.head_dim * tp
        query = np.full_like(tp, float(model.num_attention_heads * model.head_dim))
        kept = kept + (width * (query + 2.0 * key_value) + context.kept_attention_bytes * query) * split
        operator_heads = 2.0 * query + cases.held_query_groups(model) * model.head_dim * tp
    else:
        mla = model.mla
        heads = float(model.num_attention_heads)
        query = np.full_like(tp, heads * model.head_dim)
        value = heads * mla.v_head_dim
        latents = (mla.q_lora_rank or 0) + mla.kv_lora_rank
        # Latents before and after their norms; the attention's output feeds the projection.
        kept = kept + (width * (latents + mla.qk_rope_head_dim) + narrow * latents) * shared
        kept = kept + context.kept_attention_bytes * value * split
        mla_up = width * (2.0 * query + value) * split
        operator_heads = query + 2.0 * value
    scores = nothing
    if context.attention_kernel == "unfused":
        scores = width / 2.0 * 5.0 * model.num_attention_heads * context.workload.sequence_length * split
    # Pre-activations, and what the second product takes in.
    per_unit = context.kept_pre_activation_bytes * (2.0 if model.is_gated_mlp else 1.0) + narrow
    mlp = moe = moe_act = shared_experts = routed = nothing
    operator_mlp = float(model.ffn_hidden_size)
    if is_moe and model.moe is not None:
        spec = model.moe
        rows = routed_rows(context, cases, spec) * cases.etp * expert_load(context, cases)
        expert_width = spec.moe_ffn_hidden_size / cases.etp
        router = 4.0 * tokens / tp * spec.num_experts
        is_trained = 0.0 if context.is_lora else 1.0
        output = 0.0 if context.software.applies_router_weights_early else hidden
        moe_act = narrow * rows * expert_width * is_trained
        pre_activations = rows * (per_unit - narrow) * expert_width
        routed = rows * (narrow * is_trained * hidden + width * output) + pre_activations + moe_act + router
        shared_experts = per_unit * spec.shared_ffn_hidden_size * split
        moe = routed + shared_experts
        operator_mlp = float(spec.shared_ffn_hidden_size)
    else:
        mlp = per_unit * model.ffn_hidden_size * split
    # The layer's input, attention's output and every second product stay (torchtitan's operator policy): queries,
    # values, the first MLP product and the MLP's output.
    operators = width * (2.0 * hidden * shared + (operator_heads + operator_mlp) * split) + routed
    return ActivationParts(
        layer_input=layer_input,
        kept=kept,
        core_attn=scores,
        layernorm=norms,
        mla_up_proj=mla_up,
        mlp=mlp,
        moe=moe,
        moe_act=moe_act,
        shared_experts=shared_experts,
        operators=operators,
    )


def stored_bytes(context: CostContext, parts: ActivationParts, columns: PlanColumns) -> FloatColumn:
    """Return what a layer that is recomputed as the plan says stores, shape ``(num_plans,)`` [B]."""
    whole = parts.whole
    selective = whole - parts.core_attn
    if context.software.selective_recompute == "operators":
        selective = parts.operators
    if columns.recompute_modules.any():
        freed = np.zeros(len(columns))
        for bit, module in enumerate(RECOMPUTE_MODULES):
            is_named = ((columns.recompute_modules >> bit) & 1).astype(np.float64)
            part = getattr(parts, module)
            if module in WITHIN_MOE:
                # Recomputing the whole block frees them already.
                is_named = is_named * (1 - ((columns.recompute_modules >> _MOE_BIT) & 1))
            freed = freed + is_named * part
        selective = np.where(columns.recompute_modules > 0, whole - freed, selective)
    is_full = columns.recompute == Recomputes.FULL
    is_selective = columns.recompute == Recomputes.SELECTIVE
    return np.where(is_full, parts.layer_input, np.where(is_selective, selective, whole))
