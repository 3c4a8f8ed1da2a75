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
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn, PlanColumns, Recomputes
from meshwright.simcore.domain.plan import RECOMPUTE_MODULES

__all__ = ["ActivationParts", "activation_parts", "stored_bytes"]


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
        What recomputing each module frees; ``moe`` includes ``moe_act``.
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
        parts = (self.core_attn, self.layernorm, self.mla_up_proj, self.mlp, self.moe, self.shared_experts)
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
    score matrix (5 a s) only when attention is unfused. Sequence parallelism splits the first group too. MLA
    stores both latents besides. A routed row stores its input, its pre-activations and the activation; router
    scores are fp32.
    """
    model = context.model
    tp = cases.tp
    tokens = cases.num_tokens(context.workload.sequence_length)
    width = context.element_bytes
    shared = np.where(cases.sequence_parallel, tokens / tp, tokens)
    split = tokens / tp
    hidden = float(model.hidden_size)
    nothing = np.zeros_like(tokens)
    layer_input = width * hidden * shared
    has_one_norm = model.has_parallel_block or model.norms_per_layer == 1
    # Outputs of the norms, which are inputs of products; with a second norm also the input of that one.
    norms = width * (1.0 if has_one_norm else 2.0) * hidden * shared
    kept = nothing if has_one_norm else width * hidden * shared
    if model.position_embedding == "learned":
        kept = kept + width * hidden * shared
    mla_up = nothing
    if model.mla is None:
        key_value = cases.held_query_groups(model) * model.head_dim * tp
        query = np.full_like(tp, float(model.num_attention_heads * model.head_dim))
        kept = kept + width * (2.0 * query + 2.0 * key_value) * split
        operator_heads = 2.0 * query + key_value
    else:
        mla = model.mla
        heads = float(model.num_attention_heads)
        query = np.full_like(tp, heads * model.head_dim)
        value = heads * mla.v_head_dim
        latents = (mla.q_lora_rank or 0) + mla.kv_lora_rank
        # Latents before and after their norms; the attention's output feeds the projection.
        kept = kept + width * ((2.0 * latents + mla.qk_rope_head_dim) * shared + value * split)
        mla_up = width * (2.0 * query + value) * split
        operator_heads = query + 2.0 * value
    scores = nothing
    if context.attention_kernel == "unfused":
        scores = width / 2.0 * 5.0 * model.num_attention_heads * context.workload.sequence_length * split
    inner = 3.0 if model.is_gated_mlp else 2.0
    mlp = moe = moe_act = shared_experts = nothing
    operator_mlp = float(model.ffn_hidden_size)
    if is_moe and model.moe is not None:
        spec = model.moe
        rows = routed_rows(context, cases, spec) * cases.etp * expert_load(context, cases)
        expert_width = spec.moe_ffn_hidden_size / cases.etp
        moe_act = width * rows * expert_width
        router = 4.0 * tokens / tp * spec.num_experts
        # The permuted input, the combined output of every copy, pre-activations and the activation itself.
        moe = width * rows * (2.0 * hidden + inner * expert_width) + router
        shared_experts = width * inner * spec.shared_ffn_hidden_size * split
        operator_mlp = float(spec.shared_ffn_hidden_size)
    else:
        mlp = width * inner * model.ffn_hidden_size * split
    # The layer's input, attention's output and every second product stay (torchtitan's operator policy): queries,
    # values, the first MLP product and the MLP's output.
    operators = width * (2.0 * hidden * shared + (operator_heads + operator_mlp) * split) + moe
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
            if module == "moe_act":
                # Recomputing the whole block frees its activation already.
                is_named = is_named * (
                    1 - ((columns.recompute_modules >> RECOMPUTE_MODULES.index("moe")) & 1)
                )
            freed = freed + is_named * part
        selective = np.where(columns.recompute_modules > 0, whole - freed, selective)
    is_full = columns.recompute == Recomputes.FULL
    is_selective = columns.recompute == Recomputes.SELECTIVE
    return np.where(is_full, parts.layer_input, np.where(is_selective, selective, whole))
