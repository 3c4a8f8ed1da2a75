"""Embedding on the first stage, and final norm, LM head and loss on the last, for one micro-batch on one rank."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.parallelism.tensor import tensor_parallel_times
from meshwright.costmodels.plan_columns import FloatColumn, IntColumn
from meshwright.costmodels.roofline import gemm_time, stream_time

__all__ = ["BoundaryTimes", "boundary_times"]


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

    def take(self, index: IntColumn) -> BoundaryTimes:
        """Return the selected cases."""
        return BoundaryTimes(**{each.name: getattr(self, each.name)[index] for each in fields(self)})


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
    if context.is_lora:
        # The head is frozen; its input still has a gradient.
        weight_gradient = np.zeros_like(weight_gradient)
    elif not software.is_gradient_accumulation_fused:
        weight_gradient = weight_gradient + stream_time(
            context.gradient_accumulation_bytes * weights, bandwidth, stream
        )
    loss = stream_time(software.cross_entropy_bytes_per_logit * logits, bandwidth, stream)
    norm = stream_time(element * 2.0 * activations, bandwidth, stream)
    lookup = stream_time(element * 2.0 * activations, bandwidth, stream)
    # One collective over the hidden activations each: the embedding's sum forward, the head's backward.
    nothing = np.zeros_like(tokens)
    exchange = tensor_parallel_times(context, cases.tp, tokens, cases.sequence_parallel, nothing).both
    return BoundaryTimes(
        embedding_forward=lookup,
        embedding_backward=2.0 * lookup,
        head_forward=product + 0.5 * loss + norm,
        head_backward=input_gradient + weight_gradient + 0.5 * loss + 2.0 * norm,
        head_weight_gradient=weight_gradient,
        embedding_communication=exchange,
        head_communication=exchange,
    )
