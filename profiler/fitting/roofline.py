"""Fit the smooth roofline of one operator: four constants and the operator's own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from meshwright.costmodels.operators import DeviceRates, Operator, RooflineCurve, roofline_time
from meshwright.profiler.measurements import OperatorSamples

__all__ = ["fit_roofline"]

# Bounds of launch time [s], compute and memory efficiency, exponent. Nothing passes a data sheet; what is only nominal,
# as a CPU's peak, may be passed by far.
_LOW = np.array([1e-9, 1e-3, 1e-3, 0.4])
_HIGH = np.array([1.0, 1.0, 1.0, 12.0])
_HIGH_NOMINAL = np.array([1.0, 50.0, 50.0, 12.0])
_START = (0.7, 0.8, 2.0)
# Log errors beyond this count linearly: a few shapes fall to another kernel and must not bend the roofline.
_ROBUST_SCALE = 0.5


def fit_roofline(
    samples: OperatorSamples, operator: Operator, rates: DeviceRates
) -> tuple[RooflineCurve, dict[str, float]]:
    """Return the curve and the operator's parameters that fit the samples' log times best.

    Parameters
    ----------
    samples : OperatorSamples
        Measured shapes.
    operator : Operator
        What they measured.
    rates : DeviceRates
        Data sheet of the device.

    Returns
    -------
    tuple[RooflineCurve, dict[str, float]]
        Fitted roofline, fitted parameters by name.

    Notes
    -----
    Robust least squares (soft L1) on ``log(predicted / measured)``, all but the parameters in log space.
    """
    names = [parameter.name for parameter in operator.parameters]
    fastest = float(np.quantile(samples.seconds, 0.02))
    start = np.log([min(max(operator.launch_time, 1e-8), fastest), *_START])
    start = np.concatenate([start, [parameter.initial for parameter in operator.parameters]])
    low = np.concatenate([np.log(_LOW), [parameter.low for parameter in operator.parameters]])
    bounds = _HIGH_NOMINAL if rates.is_nominal else _HIGH
    high = np.concatenate([np.log(bounds), [parameter.high for parameter in operator.parameters]])
    log_measured = np.log(samples.seconds)

    def log_errors(point: NDArray[np.float64]) -> NDArray[np.float64]:
        parameters = dict(zip(names, point[4:].tolist(), strict=True))
        work = operator.work(samples.shape, samples.precision, rates, parameters)
        errors: NDArray[np.float64] = np.log(roofline_time(work, _curve(point), rates)) - log_measured
        return errors

    span = 1e-9 * (high - low)
    start = np.clip(start, low + span, high - span)
    # Kernels without FLOPs know neither compute efficiency nor exponent.
    is_free = np.ones(len(start), dtype=bool)
    is_free[[1, 3]] = operator.num_dims > 1

    def free_errors(free: NDArray[np.float64]) -> NDArray[np.float64]:
        point = start.copy()
        point[is_free] = free
        return log_errors(point)

    fitted = start.copy()
    fitted[is_free] = least_squares(
        free_errors,
        start[is_free],
        bounds=(low[is_free], high[is_free]),
        loss="soft_l1",
        f_scale=_ROBUST_SCALE,
        x_scale=np.concatenate([np.ones(4), np.maximum(0.1 * (high - low)[4:], 1e-6)])[is_free],
    ).x
    return _curve(fitted), dict(zip(names, fitted[4:].tolist(), strict=True))


def _curve(point: NDArray[np.float64]) -> RooflineCurve:
    launch_time, compute, memory, exponent = np.exp(point[:4]).tolist()
    return RooflineCurve(
        launch_time=launch_time, compute_efficiency=compute, memory_efficiency=memory, exponent=exponent
    )
