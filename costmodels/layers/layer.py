"""Time of one transformer layer, of the embedding and of the LM head, for one micro-batch on one rank.

All functions take arrays over layer cases (tp, cp, micro-batch size, sequence parallel); the handful of
distinct cases of a search space is costed once and gathered per plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.parallelism.tensor import tensor_parallel_time
from meshwright.costmodels.plan_columns import FloatColumn
from meshwright.costmodels.roofline import gemm_time, stream_time

__all__ = ["BoundaryTimes", "LayerCases", "LayerTimes", "boundary_times", "layer_times"]

# Unfused attention moves, per score: softmax 4 B and dropout 5 B forward, 11 B backward (Korthikanti et al.
# 2022, section 4.1 counts the same tensors).
_UNFUSED_FORWARD_BYTES, _UNFUSED_BACKWARD_BYTES = 9.0, 11.0
# Fused attention backward recomputes the scores: 5 products against 2 (Dao 2023, section 3.2).
_FLASH_BACKWARD_FLOPS = 2.5
# Work per SM saturates once batch times heads fill the device: 8,000 token-equivalents on every device fitted.
_FLASH_PARALLELISM = 8000.0
# A ring of context parallel ranks loses this much to unequal causal blocks and to its exchange.
_RING_ATTENTION_FACTOR = 1.25
# Kernels besides matrix products that one layer launches, forward and backward.
_FORWARD_KERNELS, _BACKWARD_KERNELS = 9.0, 14.0
# Without torch.compile or fused modules a framework launches about this many kernels more.
_EAGER_KERNEL_FACTOR = 2.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerCases:
    """Distinct layer shapes; arrays of shape ``(num_cases,)``."""

    tp: FloatColumn
    cp: FloatColumn
    micro_batch_size: FloatColumn
    sequence_parallel: NDArray[np.bool_]

    def num_tokens(self, sequence_length: int) -> FloatColumn:
        """Tokens of one micro-batch on one rank."""
        return self.micro_batch_size * sequence_length / self.cp


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTimes:
    """Seconds of one layer and micro-batch; arrays of shape ``(num_cases,)``.

    ``backward`` excludes recompute; ``weight_gradient`` is the part of it that only makes weight gradients.
    Communication is the exposed share of tensor parallel collectives and is not in the compute figures.
    """

    forward: FloatColumn
    backward: FloatColumn
    weight_gradient: FloatColumn
    selective_recompute: FloatColumn
    selective_communication: FloatColumn
    forward_communication: FloatColumn
    backward_communication: FloatColumn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BoundaryTimes:
    """Seconds of embedding (first stage) and of final norm, LM head and loss (last stage)."""

    embedding_forward: FloatColumn
    embedding_backward: FloatColumn
    head_forward: FloatColumn
    head_backward: FloatColumn
    head_weight_gradient: FloatColumn
    embedding_communication: FloatColumn
    head_communication: FloatColumn


def layer_times(context: CostContext, cases: LayerCases) -> LayerTimes:
    """Return the times of one dense transformer layer.

    Notes
    -----
    Matrix products by the smooth roofline; norms, residuals, activations and rotary embedding by their memory
    traffic; attention fused or with its score matrix in memory; a layer never runs faster than the host
    launches its kernels.
    """
    gemms = _linear_times(context, cases)
    attention_forward, attention_backward = _attention_times(context, cases)
    elementwise_forward, elementwise_backward = _elementwise_times(context, cases)
    kernels = _EAGER_KERNEL_FACTOR if "eager" in context.features else 1.0
    launch = context.calibration.gemm_curve(context.compute_precision).launch_time
    host = context.software.host_launch_latency
    forward = gemms.forward + attention_forward + elementwise_forward + kernels * _FORWARD_KERNELS * launch
    backward = (
        gemms.input_gradient
        + gemms.weight_gradient
        + attention_backward
        + elementwise_backward
        + kernels * _BACKWARD_KERNELS * launch
    )
    # GEMM launches are in both figures, so the bound counts every kernel once: products and the others.
    forward = np.maximum(forward, host * (kernels * _FORWARD_KERNELS + len(_linear_shapes(context, cases))))
    backward = np.maximum(
        backward, host * (kernels * _BACKWARD_KERNELS + 2 * len(_linear_shapes(context, cases)))
    )
    communication = tensor_parallel_time(
        context,
        cases.tp,
        cases.num_tokens(context.workload.sequence_length),
        cases.sequence_parallel,
        gemms.forward,
    )
    selective, selective_communication = attention_forward, np.zeros_like(forward)
    if context.software.selective_recompute == "operators":
        # Operator-level selective recompute keeps attention, every second product and the scattered sums; it
        # gathers the sequence-parallel inputs again (torchtitan's policy), half of the forward exchange.
        selective = 0.5 * gemms.forward + elementwise_forward
        selective_communication = np.where(cases.sequence_parallel, 0.5 * communication, 0.0)
    return LayerTimes(
        forward=forward,
        backward=backward,
        weight_gradient=gemms.weight_gradient,
        selective_recompute=selective,
        selective_communication=selective_communication,
        forward_communication=communication,
        backward_communication=communication,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _LinearTimes:
    forward: FloatColumn
    input_gradient: FloatColumn
    weight_gradient: FloatColumn


def _linear_shapes(context: CostContext, cases: LayerCases) -> list[tuple[FloatColumn, FloatColumn]]:
    """Return (output width, input width) of a layer's projections on one tensor parallel rank."""
    model = context.model
    query = model.num_attention_heads * model.head_dim / cases.tp
    # With fewer key/value heads than ranks every rank keeps a copy of one (Megatron's KV replication).
    key_value = np.maximum(model.num_query_groups / cases.tp, 1.0) * model.head_dim
    hidden = np.full_like(cases.tp, float(model.hidden_size))
    ffn = model.ffn_hidden_size / cases.tp
    return [
        (query + 2.0 * key_value, hidden),
        (hidden, query),
        ((2.0 if model.is_gated_mlp else 1.0) * ffn, hidden),
        (hidden, ffn),
    ]


def _linear_times(context: CostContext, cases: LayerCases) -> _LinearTimes:
    """Return the times of the four projections, their gradients, casts and gradient accumulation."""
    precision = context.workload.precision
    is_narrow = precision not in ("fp32", "tf32", "fp16", "bf16")
    element = context.element_bytes
    width = 1.0 if is_narrow else element
    calibration = context.calibration
    clock = calibration.clock(precision)
    forward_model, dgrad_model, wgrad_model = (
        calibration.gemm(precision, layout) for layout in ("gemm", "gemm_dgrad", "gemm_wgrad")
    )
    bandwidth = context.gpu.memory_bandwidth_bytes_per_second
    tokens = cases.num_tokens(context.workload.sequence_length)
    software = context.software
    fused_bytes = context.gradient_accumulation_bytes if software.is_gradient_accumulation_fused else element
    forward = np.zeros_like(tokens)
    dgrad = np.zeros_like(tokens)
    weight = np.zeros_like(tokens)
    cast_elements = np.zeros_like(tokens)
    num_parameters = np.zeros_like(tokens)
    for out_width, in_width in _linear_shapes(context, cases):
        inputs, outputs, weights = tokens * in_width, tokens * out_width, in_width * out_width
        num_bytes = width * (inputs + weights) + element * outputs
        forward += gemm_time(tokens, out_width, in_width, num_bytes, forward_model, clock)
        # The input gradient has the forward product's shapes permuted: same FLOPs, same bytes.
        dgrad += gemm_time(tokens, in_width, out_width, num_bytes, dgrad_model, clock)
        num_bytes = width * (inputs + outputs) + fused_bytes * weights
        weight += gemm_time(out_width, in_width, tokens, num_bytes, wgrad_model, clock)
        cast_elements += inputs + outputs + 2.0 * weights
        num_parameters += weights
    stream = context.calibration.memory_stream_efficiency
    if not software.is_gradient_accumulation_fused:
        weight += stream_time(context.gradient_accumulation_bytes * num_parameters, bandwidth, stream)
    if is_narrow:
        # Every input, weight and output gradient is quantised once for each product it enters.
        cast = stream_time(software.fp8_cast_bytes * cast_elements, bandwidth, stream)
        forward = forward + 0.5 * cast
        dgrad = dgrad + 0.5 * cast
    return _LinearTimes(forward=forward, input_gradient=dgrad, weight_gradient=weight)


def _attention_times(context: CostContext, cases: LayerCases) -> tuple[FloatColumn, FloatColumn]:
    """Return forward and backward seconds of the attention core (scores, softmax, weighted sum)."""
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
    flops = 2.0 * heads * length * length * model.head_dim * share / cases.cp
    rate = curve.peak_flops_per_second * context.software.attention_efficiency
    rate *= np.sqrt(context.calibration.clock(context.compute_precision))
    if model.head_dim < 128:
        rate *= (model.head_dim / 128.0) ** 0.4
    efficiency = length / (length + curve.half_length + _FLASH_PARALLELISM / heads)
    launch = context.calibration.gemm_curve(context.compute_precision).launch_time
    ring = np.where(cases.cp > 1.0, _RING_ATTENTION_FACTOR, 1.0)
    forward = flops / (rate * efficiency) * ring + launch
    backward_rate = context.calibration.attention_backward_efficiency
    return forward, _FLASH_BACKWARD_FLOPS * (forward - launch) / backward_rate + 2.0 * launch


def _unfused_attention_times(
    context: CostContext, heads: FloatColumn, length: float
) -> tuple[FloatColumn, FloatColumn]:
    """Attention that materialises the score matrix: batched products over the whole square, no causal skip."""
    element = context.element_bytes
    head_dim = float(context.model.head_dim)
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


def _elementwise_times(context: CostContext, cases: LayerCases) -> tuple[FloatColumn, FloatColumn]:
    """Return forward and backward seconds of norms, residuals, activation, rotary and bias kernels."""
    element = context.element_bytes
    model = context.model
    tokens = cases.num_tokens(context.workload.sequence_length)
    full = element * tokens * model.hidden_size
    hidden = np.where(cases.sequence_parallel, full / cases.tp, full)
    key_value = np.maximum(model.num_query_groups / cases.tp, 1.0)
    heads = element * tokens * model.head_dim * (model.num_attention_heads / cases.tp + 2.0 * key_value)
    ffn = element * tokens * model.ffn_hidden_size / cases.tp
    num_norms = float(model.norms_per_layer)
    num_residuals = 1.0 if model.has_parallel_block else 2.0
    # Learned positions mark the GPT-2/3 recipe, which trains with dropout: half a tensor of masks each.
    dropout = 0.5 if model.position_embedding == "learned" else 0.0
    rotary = 2.0 if model.position_embedding == "rope" else 0.0
    forward_bytes = (
        num_norms * 2.0 * hidden
        + num_residuals * (3.0 + dropout) * hidden
        + (3.0 if model.is_gated_mlp else 2.0) * ffn
        + (2.0 + rotary) * heads
    )
    backward_bytes = (
        num_norms * 5.0 * hidden
        + num_residuals * (2.0 + dropout) * hidden
        + (5.0 if model.is_gated_mlp else 3.0) * ffn
        + (2.0 + rotary) * heads
    )
    if model.has_mlp_bias:
        backward_bytes = backward_bytes + 2.0 * hidden + heads + ffn
    factor = context.software.elementwise_factor
    if "eager" in context.features:
        factor = context.software.eager_elementwise_factor
    bandwidth = context.gpu.memory_bandwidth_bytes_per_second
    stream = context.calibration.memory_stream_efficiency
    return (
        stream_time(factor * forward_bytes, bandwidth, stream),
        stream_time(factor * backward_bytes, bandwidth, stream),
    )


def boundary_times(context: CostContext, cases: LayerCases) -> BoundaryTimes:
    """Return the times of the embedding, and of final norm, LM head and cross-entropy.

    The head runs in 16 bits whatever the linear layers use; its vocabulary is split over tensor parallel ranks.
    """
    element = context.element_bytes
    model, software = context.model, context.software
    precision = context.compute_precision
    calibration = context.calibration
    clock = calibration.clock(precision)
    bandwidth = context.gpu.memory_bandwidth_bytes_per_second
    stream = calibration.memory_stream_efficiency
    tokens = cases.num_tokens(context.workload.sequence_length)
    hidden = np.full_like(tokens, float(model.hidden_size))
    vocab = model.vocab_size / cases.tp
    activations, logits, weights = tokens * hidden, tokens * vocab, vocab * hidden
    num_bytes = element * (activations + weights + logits)
    head = calibration.gemm(precision)
    product = gemm_time(tokens, vocab, hidden, num_bytes, head, clock)
    input_gradient = gemm_time(
        tokens, hidden, vocab, num_bytes, calibration.gemm(precision, "gemm_dgrad"), clock
    )
    fused_bytes = context.gradient_accumulation_bytes if software.is_gradient_accumulation_fused else element
    weight_gradient = gemm_time(
        vocab,
        hidden,
        tokens,
        num_bytes + (fused_bytes - element) * weights,
        calibration.gemm(precision, "gemm_wgrad"),
        clock,
    )
    if not software.is_gradient_accumulation_fused:
        weight_gradient = weight_gradient + stream_time(
            context.gradient_accumulation_bytes * weights, bandwidth, stream
        )
    loss = stream_time(software.cross_entropy_bytes_per_logit * logits, bandwidth, stream)
    norm = stream_time(element * 2.0 * activations, bandwidth, stream)
    lookup = stream_time(element * 2.0 * activations, bandwidth, stream)
    # One collective over the hidden activations each: the embedding's sum forward, the head's backward.
    nothing = np.zeros_like(tokens)
    exchange = 0.5 * tensor_parallel_time(
        context, cases.tp, tokens, cases.sequence_parallel, nothing, num_pairs=1.0
    )
    return BoundaryTimes(
        embedding_forward=lookup,
        embedding_backward=2.0 * lookup,
        head_forward=product + 0.5 * loss + norm,
        head_backward=input_gradient + weight_gradient + 0.5 * loss + 2.0 * norm,
        head_weight_gradient=weight_gradient,
        embedding_communication=2.0 * exchange,
        head_communication=2.0 * exchange,
    )
