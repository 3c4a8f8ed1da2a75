"""Fit the two-constant curve of fused causal attention that training predictions use."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from meshwright.costmodels.calibration import AttentionCurve
from meshwright.profiler.measurements import OperatorSamples

__all__ = ["fit_attention_curve"]

# As in costmodels/layer.py: 8,000 token-equivalents of batch x heads fill every device measured so far.
_PARALLELISM = 8000.0
_HEAD_DIM = 128.0
_SHORTEST = 512.0
_LEAST_SAMPLES = 12


def fit_attention_curve(samples: OperatorSamples) -> AttentionCurve | None:
    """Return the curve through prefill times of head width 128 and lengths from 512, None with too few of them.

    Parameters
    ----------
    samples : OperatorSamples
        Of ``attention_prefill`` in 16 bits.

    Notes
    -----
    ``FLOP/s = peak * s / (s + half_length + 8000 / (batch * heads))`` (fidelity of public operator tables).
    """
    shape = samples.shape
    usable = (shape["head_dim"] == _HEAD_DIM) & (shape["sequence_length"] >= _SHORTEST)
    if usable.sum() < _LEAST_SAMPLES:
        return None
    length = shape["sequence_length"][usable]
    heads = (shape["batch_size"] * shape["num_heads"])[usable]
    rate = 2.0 * heads * length * length * _HEAD_DIM / samples.seconds[usable]

    def log_errors(point: NDArray[np.float64]) -> NDArray[np.float64]:
        peak, half = np.exp(point)
        errors: NDArray[np.float64] = np.log(peak * length / (length + half + _PARALLELISM / heads) / rate)
        return errors

    fitted = least_squares(log_errors, np.log([float(rate.max()), 1500.0]), loss="soft_l1", f_scale=0.1)
    peak, half_length = np.exp(fitted.x).tolist()
    return AttentionCurve(peak_flops_per_second=peak, half_length=half_length)
