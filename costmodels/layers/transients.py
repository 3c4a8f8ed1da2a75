"""What one layer holds while its backward runs, on top of what the forward stored."""

from __future__ import annotations

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.layers.experts import expert_load, routed_rows
from meshwright.costmodels.parallelism.context import head_exchange_degree
from meshwright.costmodels.plan_columns import CpMethods, FloatColumn

__all__ = ["attended_groups", "backward_bytes"]

# The block of keys and values in use and the one that arrives, each with its gradients.
_RING_BLOCKS = 4.0


def attended_groups(context: CostContext, cases: LayerCases) -> FloatColumn:
    """Return the key/value heads of one rank as attention takes them in, shape ``(num_cases,)``."""
    model = context.model
    # Latent attention expands its keys and values to every head.
    if model.mla is not None or context.software.repeats_key_value_heads:
        return model.num_attention_heads / cases.tp
    return cases.held_query_groups(model)


def backward_bytes(context: CostContext, cases: LayerCases, *, is_moe: bool) -> FloatColumn:
    """Return the bytes alive at once within one layer's backward, shape ``(num_cases,)``.

    The gradient of the residual stream and of the block's input, and of the larger block: the MLP's activation and
    pre-activations (of the routed rows, in and out, in a MoE layer), or attention's queries, keys and values, with
    unfused attention also of dropout and softmax, as wide as the scores. Sequence parallelism gathers the whole
    sequence for the dense blocks: the gradient of the block's output and of its input, and the input itself unless the
    forward kept it. Context parallel ranks hold what they exchange as well.
    """
    model = context.model
    width = context.element_bytes
    tokens = cases.num_tokens(context.workload.sequence_length)
    split = tokens / cases.tp
    residual = width * 2.0 * model.hidden_size * np.where(cases.sequence_parallel, split, tokens)
    gathered = np.where(cases.sequence_parallel, _gathered_bytes(context) * model.hidden_size * tokens, 0.0)
    inner = 3.0 if model.is_gated_mlp else 2.0
    if is_moe and model.moe is not None:
        rows = routed_rows(context, cases, model.moe) * cases.etp * expert_load(context, cases)
        mlp = width * rows * (2.0 * model.hidden_size + inner * model.moe.moe_ffn_hidden_size / cases.etp)
    else:
        mlp = width * inner * model.ffn_hidden_size * split + gathered
    heads = float(model.num_attention_heads) * split
    attention = width * model.head_dim * (heads + 2.0 * attended_groups(context, cases) * tokens)
    if context.attention_kernel == "unfused":
        attention = attention + width * 2.0 * heads * context.workload.sequence_length
    return residual + np.maximum(mlp, attention + gathered) + _exchanged_bytes(context, cases)


def _gathered_bytes(context: CostContext) -> float:
    """Return the bytes per token and hidden unit of what products hold of a whole sequence that is split elsewhere."""
    software = context.software
    # The gradient of the output, and the input where the forward did not keep it.
    num_gathered = 1.0 if software.keeps_gathered_inputs else 2.0
    # Products of their own have input gradients of their own, which are summed before they are scattered.
    num_partial = 2.0 if software.splits_projections else 1.0
    if software.copies_gathered_sequence and "async_tp" not in context.features:
        # Copied once more into the order in which it is scattered.
        num_partial += 1.0
    return context.gathered_bytes * num_gathered + context.element_bytes * num_partial


def _exchanged_bytes(context: CostContext, cases: LayerCases) -> FloatColumn:
    """Return the buffers of context parallelism: blocks of a ring, what is gathered, what swaps sequence for heads."""
    model = context.model
    tokens = cases.num_tokens(context.workload.sequence_length)
    value_dim = float(model.head_dim if model.mla is None else model.mla.v_head_dim)
    per_head = context.element_bytes * tokens * (model.head_dim + value_dim)
    swapping = head_exchange_degree(context, cases)
    groups = np.maximum(attended_groups(context, cases), swapping)
    ring = np.where(cases.cp > swapping, _RING_BLOCKS * per_head * groups, 0.0)
    # Queries and the output together are as wide as keys and values of every head.
    swapped = np.where(swapping > 1.0, per_head * (groups + model.num_attention_heads / cases.tp), 0.0)
    # Keys and values of the whole sequence, and their gradients.
    gathered = np.where(cases.cp > 1.0, 2.0 * cases.cp * per_head * groups, 0.0)
    return np.where(cases.cp_method == CpMethods.ALL_GATHER, gathered, ring + swapped)
