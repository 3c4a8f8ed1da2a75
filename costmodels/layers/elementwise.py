"""Norms, residuals, activation, rotary embedding and bias kernels: what moves through memory between products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.plan_columns import FloatColumn
from meshwright.costmodels.roofline import stream_time

__all__ = ["ElementwiseTimes", "elementwise_time", "elementwise_times"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ElementwiseTimes:
    """Seconds of one layer's element-wise kernels; ``norms`` and ``activation`` are parts of ``forward``."""

    forward: FloatColumn
    backward: FloatColumn
    norms: FloatColumn
    activation: FloatColumn


def elementwise_time(context: CostContext, num_bytes: FloatColumn) -> FloatColumn:
    """Return the seconds of element-wise kernels that move these bytes ideally, as the software fuses them."""
    factor = context.software.elementwise_factor
    if "eager" in context.features:
        factor = context.software.eager_elementwise_factor
    return stream_time(
        factor * num_bytes,
        context.gpu.memory_bandwidth_bytes_per_second,
        context.calibration.memory_stream_efficiency,
    )


def elementwise_times(context: CostContext, cases: LayerCases, mlp_width: float) -> ElementwiseTimes:
    """Return the times of a layer whose MLP is ``mlp_width`` wide (all shared experts together in a MoE layer)."""
    element = context.element_bytes
    model = context.model
    tokens = cases.num_tokens(context.workload.sequence_length)
    full = element * tokens * model.hidden_size
    hidden = np.where(cases.sequence_parallel, full / cases.tp, full)
    num_heads = model.num_attention_heads / cases.tp
    repeated = np.zeros_like(tokens)
    if model.mla is None:
        groups = cases.held_query_groups(model)
        heads = element * tokens * model.head_dim * (num_heads + 2.0 * groups)
        if context.software.repeats_key_value_heads:
            # Written once more for every query head, and their gradients read as often.
            repeated = element * tokens * model.head_dim * 2.0 * (num_heads - groups)
        latents = np.zeros_like(tokens)
    else:
        mla = model.mla
        heads = element * tokens * num_heads * (2.0 * model.head_dim + mla.v_head_dim)
        # The two latents are normalised like a hidden state, each rank its part of the sequence.
        latents = element * tokens * ((mla.q_lora_rank or 0) + mla.kv_lora_rank)
        latents = np.where(cases.sequence_parallel, latents / cases.tp, latents)
    ffn = element * tokens * mlp_width / cases.tp
    num_norms = float(model.norms_per_layer)
    num_residuals = 1.0 if model.has_parallel_block else 2.0
    # Learned positions mark the GPT-2/3 recipe, which trains with dropout: half a tensor of masks each.
    dropout = 0.5 if model.position_embedding == "learned" else 0.0
    rotary = 2.0 if model.position_embedding == "rope" else 0.0
    norms = num_norms * 2.0 * hidden + 2.0 * latents
    activation = (3.0 if model.is_gated_mlp else 2.0) * ffn
    forward_bytes = (
        norms + num_residuals * (3.0 + dropout) * hidden + activation + (2.0 + rotary) * heads + repeated
    )
    backward_bytes = (
        num_norms * 5.0 * hidden
        + 5.0 * latents
        + num_residuals * (2.0 + dropout) * hidden
        + (5.0 if model.is_gated_mlp else 3.0) * ffn
        + (2.0 + rotary) * heads
        + repeated
    )
    if model.has_mlp_bias:
        backward_bytes = backward_bytes + 2.0 * hidden + heads + ffn
    return ElementwiseTimes(
        forward=elementwise_time(context, forward_bytes),
        backward=elementwise_time(context, backward_bytes),
        norms=elementwise_time(context, norms),
        activation=elementwise_time(context, activation),
    )
