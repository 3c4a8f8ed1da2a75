"""What the backward of one layer holds while it runs, on top of what the forward stored."""

from __future__ import annotations

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.layers.experts import expert_load, routed_rows
from meshwright.costmodels.plan_columns import FloatColumn

__all__ = ["backward_bytes"]


def backward_bytes(context: CostContext, cases: LayerCases, *, is_moe: bool) -> FloatColumn:
    """Return the bytes of gradients alive at once within one layer's backward, shape ``(num_cases,)``.

    The gradient of the residual stream and of the block's input, and of the larger block: the MLP's activation and
    pre-activations (of the routed rows, in and out, in a MoE layer), or attention's queries, keys and values, with
    unfused attention also of dropout and softmax, as wide as the scores.
    """
    model = context.model
    width = context.element_bytes
    tokens = cases.num_tokens(context.workload.sequence_length)
    split = tokens / cases.tp
    residual = width * 2.0 * model.hidden_size * np.where(cases.sequence_parallel, split, tokens)
    inner = 3.0 if model.is_gated_mlp else 2.0
    if is_moe and model.moe is not None:
        rows = routed_rows(context, cases, model.moe) * cases.etp * expert_load(context, cases)
        mlp = width * rows * (2.0 * model.hidden_size + inner * model.moe.moe_ffn_hidden_size / cases.etp)
    else:
        mlp = width * inner * model.ffn_hidden_size * split
    heads = float(model.num_attention_heads) * split
    groups = heads if model.mla is not None else cases.held_query_groups(model) * tokens
    attention = width * model.head_dim * (heads + 2.0 * groups)
    if context.attention_kernel == "unfused":
        attention = attention + width * 2.0 * heads * context.workload.sequence_length
    return residual + np.maximum(mlp, attention)
