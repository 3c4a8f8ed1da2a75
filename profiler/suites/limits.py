"""How large an operator may be on a device, in bytes and work, whoever chose its shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.costmodels.operators.base import element_bytes
from meshwright.hardware_specs.catalog import load_gpu
from meshwright.profiler.device import Device

__all__ = ["Limits", "Shape", "fits_attention", "fits_gemm", "fits_moe", "limits_of"]

Shape = Mapping[str, float]
"""An operator's fields; all are whole numbers but ``skew``."""

_GPU_SECONDS = 0.02
_UNKNOWN_PEAK = 1e14
_MEMORY_SHARE = 0.25
# Work of about a millisecond on one thread of a CPU: what lasts less than a slice of the scheduler mostly escapes its
# neighbours. Without matrix units narrow formats run at a fraction of fp32.
_CPU_FLOPS = {"fp32": 1e8, "bf16": 2.5e7}
_CPU_NARROW_FLOPS = 8e6
_CPU_BYTES = 4e6
# A model's own shapes may take this many times as long as a sampled one; a CPU does not wait for those of a large one.
_PATIENCE = 10.0
_MLA_QK, _MLA_V, _MLA_LATENT = 192, 128, 576


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How large an operator may be on a device.

    Parameters
    ----------
    max_bytes, max_flops : float
        All operands together [B]; work in the number format that is sampled [FLOP].
    is_small : bool
        Whether the ranges are those of a CPU.
    """

    max_bytes: float
    max_flops: float
    is_small: bool = False

    def admit(self, num_bytes: float, flops: float, *, is_exact: bool) -> bool:
        """Return whether so much is within limits; ``is_exact`` marks a shape of the user's model."""
        patience = _PATIENCE if is_exact and not self.is_small else 1.0
        return num_bytes <= self.max_bytes and flops <= patience * self.max_flops


def limits_of(device: Device, precision: str) -> Limits:
    """Return how large an operator may be: a quarter of the memory, and about 20 ms (1 ms on a CPU)."""
    if not device.is_gpu:
        flops = _CPU_FLOPS.get(precision, _CPU_NARROW_FLOPS)
        return Limits(max_bytes=_CPU_BYTES, max_flops=flops, is_small=True)
    peak = _UNKNOWN_PEAK
    if device.gpu is not None:
        peaks = load_gpu(device.gpu).peak_flops_per_second
        peak = peaks.get(precision) or min(peaks.values())
    return Limits(max_bytes=_MEMORY_SHARE * device.memory_bytes, max_flops=_GPU_SECONDS * peak)


def fits_gemm(shape: Shape, limits: Limits, precision: str, *, is_exact: bool = False) -> bool:
    """Return whether a product is within limits; ``is_exact`` marks a shape of the user's model."""
    m, n, k = shape["m"], shape["n"], shape["k"]
    element = element_bytes(precision)
    num_bytes = element * (m * k + n * k) + max(2.0, element) * m * n
    return limits.admit(num_bytes, 2.0 * m * n * k, is_exact=is_exact)


def fits_attention(operator: str, shape: Shape, limits: Limits, *, is_exact: bool = False) -> bool:
    """Return whether attention is within limits, as :func:`fits_gemm` does for products."""
    batch, heads = shape["batch_size"], shape["num_heads"]
    length = shape.get("sequence_length", shape.get("context_length", 0.0))
    width, kv_heads = shape.get("head_dim", 0.0), shape.get("num_kv_heads", 0.0)
    if operator == "mla_prefill":
        num_bytes = 4.0 * batch * length * heads * (_MLA_QK + _MLA_V)
        flops = batch * heads * length * length * (_MLA_QK + _MLA_V)
    elif operator == "mla_decode":
        num_bytes = 2.0 * batch * length * _MLA_LATENT
        flops = 4.0 * batch * heads * length * _MLA_LATENT
    elif operator == "attention_decode":
        num_bytes = 4.0 * batch * length * kv_heads * width
        flops = 4.0 * batch * length * heads * width
    else:
        # Backward recomputes the scores: five products for two, and gradients beside their tensors. CPUs take longer.
        backward = 10.0 if limits.is_small else 2.5
        factor = backward if operator == "attention_backward" else 1.0
        num_bytes = 4.0 * factor * batch * length * width * (heads + kv_heads)
        flops = 2.0 * factor * batch * heads * length * length * width
    return limits.admit(num_bytes, flops, is_exact=is_exact)


def fits_moe(shape: Shape, limits: Limits, *, is_exact: bool = False) -> bool:
    """Return whether routed experts are within limits, as :func:`fits_gemm` does for products."""
    rows = max(1.0, shape["num_tokens"] * shape["top_k"] / shape["ep"])
    hidden, width = shape["hidden_size"], shape["moe_ffn_hidden_size"] / shape["tp"]
    local = shape["num_experts"] / shape["ep"]
    num_bytes = 6.0 * local * hidden * width + 6.0 * rows * (hidden + width)
    return limits.admit(num_bytes, 6.0 * rows * hidden * width, is_exact=is_exact)
