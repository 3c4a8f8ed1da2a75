"""What one device achieves: constants measured on it, each with its source.

Data sheets say what a device could do (:mod:`meshwright.hardware_specs.specs`); a calibration says what
kernels and collectives reach. It is an overlay of documents (:mod:`meshwright.costmodels.calibration_document`):
the built-in ones of the device, or of the one that represents its architecture, below the user's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.operators import OperatorModel, RooflineCurve

__all__ = ["AttentionCurve", "CalibrationBasis", "CollectiveCurve", "CollectiveTable", "DeviceCalibration"]

CalibrationBasis = Literal["calibrated", "prior of the same generation", "data sheet only"]
"""What a calibration rests on: measurements of the device or its die; those of another device of its architecture;
neither, but shares of the data sheet that published figures suggest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCurve:
    """Fused attention: FLOP/s approach ``peak_flops_per_second`` as sequences pass ``half_length`` tokens."""

    peak_flops_per_second: float
    half_length: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CollectiveTable:
    """Measured times of one collective in one group size; between sizes read in log-log.

    Parameters
    ----------
    num_bytes : NDArray[np.float64]
        Bytes of the whole buffer (nccl-tests convention), ascending [B].
    seconds : NDArray[np.float64]
        Never decreasing [s].
    """

    num_bytes: NDArray[np.float64]
    seconds: NDArray[np.float64]

    def time(self, num_bytes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the seconds of each size: flat below the table, at its last bandwidth above [s]."""
        log_size = np.log(np.maximum(num_bytes, 1.0))
        inside = np.interp(log_size, np.log(self.num_bytes), np.log(self.seconds))
        beyond = np.maximum(0.0, log_size - np.log(self.num_bytes[-1]))
        seconds: NDArray[np.float64] = np.exp(inside + beyond)
        return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCurve:
    """One collective inside a node by group size: p-norm of a latency and a bandwidth term.

    Parameters
    ----------
    ranks, latency, link_efficiency, exponent : tuple[float, ...]
        One entry per measured group size, ascending; latency [s]; bus bandwidth over link bandwidth.
    tables : tuple[CollectiveTable | None, ...]
        Measured times by group size where there are any: within their sizes they replace the p-norm.
    link_bandwidth : float | None
        Bandwidth of the links the tables were measured on [B/s]; other links take the p-norm.
    error : float | None
        Mean error of tables of every second measured size, read at the sizes between.
    """

    ranks: tuple[float, ...]
    latency: tuple[float, ...]
    link_efficiency: tuple[float, ...]
    exponent: tuple[float, ...]
    tables: tuple[CollectiveTable | None, ...] = ()
    link_bandwidth: float | None = None
    error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCalibration:
    """Everything operator times need beyond the data sheet.

    Parameters
    ----------
    id : str
        Documents the constants come from, joined by ``+``.
    digest : str
        First 12 hexadecimal digits of the SHA-256 of those documents.
    reason : str
        Why this calibration was chosen, one sentence for the user.
    is_estimate : bool
        True when the constants were not measured on this device.
    basis : CalibrationBasis
        What they rest on instead.
    operators : Mapping[str, OperatorModel]
        By ``OPERATOR.PRECISION``; ``gemm.bf16`` is always there.
    sustained_clock : Mapping[str, float]
        Sustained over burst tensor throughput under hours of training, by format (bf16, fp8).
    memory_stream_efficiency : float
        Streaming bandwidth of element-wise kernels over the data sheet's.
    attention : Mapping[str, AttentionCurve]
        By kernel generation (``flash_2``, ``flash_3``).
    attention_backward_efficiency : float
        Backward FLOP/s of fused attention over forward.
    collectives : Mapping[str, CollectiveCurve]
        ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``all_to_all`` inside one node.
    software : Mapping[str, Mapping[str, float]]
        Measured constants of software generations by field, under a generation's id or ``all``.
    """

    id: str
    digest: str
    reason: str
    is_estimate: bool
    operators: Mapping[str, OperatorModel]
    sustained_clock: Mapping[str, float]
    memory_stream_efficiency: float
    attention: Mapping[str, AttentionCurve]
    attention_backward_efficiency: float
    collectives: Mapping[str, CollectiveCurve]
    software: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    basis: CalibrationBasis = "calibrated"

    @property
    def identity(self) -> Mapping[str, str]:
        """What plans and reports note: which documents, their hash, and why these."""
        return {"id": self.id, "sha256": self.digest, "reason": self.reason}

    def gemm(self, precision: str, layout: str = "gemm") -> OperatorModel:
        """Return the model of matrix products; layouts and formats without one borrow, in this order.

        The forward layout of the same format, then ``fp8`` for the 8-bit formats, then ``bf16``.
        """
        narrow = "fp8" if "fp8" in precision else "bf16"
        for name in (f"{layout}.{precision}", f"gemm.{precision}", f"gemm.{narrow}"):
            if name in self.operators:
                return self.operators[name]
        return self.operators["gemm.bf16"]

    def gemm_curve(self, precision: str) -> RooflineCurve:
        """Return the roofline of matrix products in a number format."""
        return self.gemm(precision).curve

    def clock(self, precision: str) -> float:
        """Return sustained over burst tensor throughput for a number format."""
        is_narrow = precision not in ("fp32", "tf32", "fp16", "bf16")
        return self.sustained_clock["fp8" if is_narrow and "fp8" in self.sustained_clock else "bf16"]

    def attention_curve(self, kernel: str) -> AttentionCurve:
        """Return the curve of a fused-attention generation, or of the best older one the device has."""
        return self.attention.get(kernel) or self.attention["flash_2"]
