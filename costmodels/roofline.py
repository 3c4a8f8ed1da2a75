"""Time of one operator in a training job: calibrated matrix products at the sustained clock, memory-bound kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from meshwright.costmodels.operators import OperatorModel, Work, roofline_time
from meshwright.costmodels.plan_columns import FloatColumn

__all__ = ["gemm_time", "stream_time"]


def gemm_time(
    m: FloatColumn,
    n: FloatColumn,
    k: FloatColumn,
    num_bytes: FloatColumn,
    model: OperatorModel,
    sustained_clock: float,
) -> FloatColumn:
    """Return the seconds of ``(m, k) @ (k, n)``.

    Parameters
    ----------
    m, n, k : FloatColumn
        Shape of the product, one entry per case.
    num_bytes : FloatColumn
        Bytes read and written, which fused accumulation makes more than those of the bare product [B].
    model : OperatorModel
        Roofline and residual of the device for this number format.
    sustained_clock : float
        Sustained over burst tensor throughput, on the compute term only.

    Returns
    -------
    FloatColumn
        Time [s], launch included.

    Notes
    -----
    Four-parameter smooth roofline: 5 to 12 % mean error over tens of thousands of measured shapes, half of that
    with its residual; the shape error averages out over the twenty products of a layer.
    """
    rates = replace(model.rates, peak_flops_per_second=model.rates.peak_flops_per_second * sustained_clock)
    seconds = roofline_time(Work(flops=2.0 * m * n * k, num_bytes=num_bytes), model.curve, rates)
    if model.residual is None:
        return seconds
    correction: FloatColumn = np.exp(model.log_correction({"m": m, "n": n, "k": k}))
    return seconds * correction


def stream_time(num_bytes: FloatColumn, bandwidth_bytes_per_second: float, efficiency: float) -> FloatColumn:
    """Return the seconds of a memory-bound kernel chain, launches not included."""
    return num_bytes / (bandwidth_bytes_per_second * efficiency)
