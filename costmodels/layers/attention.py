"""The attention core: scores, softmax and weighted sum, whole or over context parallel ranks."""

from __future__ import annotations

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.plan_columns import CpMethods, FloatColumn
from meshwright.costmodels.roofline import gemm_time, stream_time

__all__ = ["attention_times"]

# Unfused attention moves, per score: softmax 4 B and dropout 5 B forward, 11 B backward (Korthikanti et al.
# 2022, section 4.1 counts the same tensors).
_UNFUSED_FORWARD_BYTES, _UNFUSED_BACKWARD_BYTES = 9.0, 11.0
# Fused attention backward recomputes the scores: 5 products against 2 (Dao 2023, section 3.2).
_FLASH_BACKWARD_FLOPS = 2.5
# Work per SM saturates once batch times heads fill the device: 8,000 token-equivalents on every device fitted.
_FLASH_PARALLELISM = 8000.0
# A ring works block by block: smaller kernels, unequal halves and sums of partial results. The best published kernels
# take 1.11 to 1.19 times whole attention (zhuzilin/ring-flash-attention, README, zigzag_ring on 8 H800 and A100);
# torchtitan's runs with cp 2 to 8 fit this (mean error 8 %, 12 % with 1.15).
_RING_ATTENTION_FACTOR = 1.25


def attention_times(context: CostContext, cases: LayerCases) -> tuple[FloatColumn, FloatColumn]:
    """Return forward and backward seconds of the attention core on one rank.

    Causal work is balanced over context parallel ranks (each takes an early and a late part of the sequence), so
    every rank has 1/cp of it; all-to-all swaps sequence for heads and leaves 1/cp as well.
    """
    model = context.model
    length = float(context.workload.sequence_length)
    heads = cases.micro_batch_size * model.num_attention_heads / cases.tp
    if context.attention_kernel == "unfused":
        return _unfused_attention_times(context, heads / cases.cp, length)
    curve = context.calibration.attention_curve(context.attention_kernel)
    share = 1.0
    if model.sliding_window is not None and model.sliding_window < length:
        # Causal pairs inside the window over all causal pairs.
        window = float(model.sliding_window)
        share = (window * length - window * window / 2.0) / (length * length / 2.0)
        if model.full_attention_interval is not None:
            # A layer of the mean cost: one in the interval attends to everything.
            share += (1.0 - share) / model.full_attention_interval
    # Half of the two products s x s x d, for the mean of the widths of keys and values.
    head_dim = float(model.head_dim)
    if model.mla is not None:
        head_dim = 0.5 * (head_dim + model.mla.v_head_dim)
    flops = 2.0 * heads * length * length * head_dim * share / cases.cp
    rate = curve.peak_flops_per_second * context.software.attention_efficiency
    rate *= np.sqrt(context.calibration.clock(context.compute_precision))
    if head_dim < 128:
        rate *= (head_dim / 128.0) ** 0.4
    efficiency = length / (length + curve.half_length + _FLASH_PARALLELISM / heads)
    launch = context.calibration.gemm_curve(context.compute_precision).launch_time
    is_ring = (cases.cp > 1.0) & (
        (cases.cp_method == CpMethods.RING) | (cases.cp_method == CpMethods.HIERARCHICAL)
    )
    ring = np.where(is_ring, _RING_ATTENTION_FACTOR, 1.0)
    forward = flops / (rate * efficiency) * ring + launch
    backward_rate = context.calibration.attention_backward_efficiency
    return forward, _FLASH_BACKWARD_FLOPS * (forward - launch) / backward_rate + 2.0 * launch


def _unfused_attention_times(
    context: CostContext, heads: FloatColumn, length: float
) -> tuple[FloatColumn, FloatColumn]:
    """Attention that materialises the score matrix: batched products over the whole square, no causal skip."""
    element = context.element_bytes
    head_dim = float(context.model.head_dim)
    if context.model.mla is not None:
        head_dim = 0.5 * (head_dim + context.model.mla.v_head_dim)
    precision = context.compute_precision
    model, clock = context.calibration.gemm(precision), context.calibration.clock(precision)
    bandwidth = context.gpu.memory_bandwidth_bytes_per_second
    ones = np.ones_like(heads)
    scores = heads * length * length
    num_bytes = element * (2.0 * heads * length * head_dim + scores)
    product = gemm_time(heads * length, ones * length, ones * head_dim, num_bytes, model, clock)
    stream = context.calibration.memory_stream_efficiency
    forward = 2.0 * product + stream_time(_UNFUSED_FORWARD_BYTES * scores, bandwidth, stream)
    backward = 4.0 * product + stream_time(_UNFUSED_BACKWARD_BYTES * scores, bandwidth, stream)
    return forward, backward
