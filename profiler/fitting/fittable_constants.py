"""Which constants of a software stack measured iterations can fix, and how far they may lie from their start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FITTABLE_CONSTANTS", "FittableConstant", "Kind"]

Kind = Literal["factor", "rate", "amount"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FittableConstant:
    """A constant that measured iterations can fix.

    Parameters
    ----------
    name : str
        Number field of a software generation, or ``sustained_clock.FORMAT`` of the device.
    width : float
        Standard deviation of the prior: of the logarithm, or in the constant's unit for an amount.
    low, high : float
        Bounds.
    kind : {"factor", "rate", "amount"}
        Time goes with a factor and with the inverse of a rate; an amount may be zero and varies by sums.
    """

    name: str
    width: float
    low: float
    high: float
    kind: Kind


# Widths: about half of how far the built-in generations lie apart, halved once more for the fixed time, which would
# otherwise soak up whatever is missing from short iterations.
_TABLE: tuple[tuple[str, Kind, float, float, float], ...] = (
    ("sustained_clock.bf16", "rate", 0.06, 0.3, 1.3),
    ("sustained_clock.fp8", "rate", 0.09, 0.3, 1.8),
    ("attention_efficiency", "rate", 0.25, 0.1, 1.6),
    ("inter_node_efficiency", "rate", 0.12, 0.1, 1.0),
    ("elementwise_factor", "factor", 0.15, 0.5, 6.0),
    ("eager_elementwise_factor", "factor", 0.2, 0.5, 12.0),
    ("cross_entropy_bytes_per_logit", "factor", 0.2, 2.0, 200.0),
    ("fp8_cast_bytes", "factor", 0.25, 0.2, 30.0),
    ("host_launch_latency", "factor", 0.3, 5e-7, 1e-4),
    ("gradient_accumulation_bytes", "amount", 2.5, 0.0, 40.0),
    ("fsdp_contention", "amount", 0.15, 0.0, 2.0),
    ("fsdp_step_latency", "amount", 0.6e-6, 0.0, 5e-5),
    ("broadcast_step_latency", "amount", 1.2e-3, 0.0, 5e-2),
    ("fixed_time", "amount", 0.06, 0.0, 60.0),
    ("tp_overlap", "amount", 0.12, 0.0, 0.95),
    ("async_tp_overlap", "amount", 0.12, 0.0, 0.95),
    ("gradient_reduce_overlap", "amount", 0.2, 0.0, 1.0),
    ("parameter_gather_overlap", "amount", 0.2, 0.0, 1.0),
)
FITTABLE_CONSTANTS = tuple(
    FittableConstant(name=name, kind=kind, width=width, low=low, high=high)
    for name, kind, width, low, high in _TABLE
)
"""Every constant a fit may move; what the fields stand for is in :class:`SoftwareGeneration`."""
