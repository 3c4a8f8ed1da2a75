"""One calibrated operator on one device: a smooth roofline, its residual, its error and its intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.operators.base import DeviceRates, Operator, Shape, Work
from meshwright.costmodels.operators.residual import Residual
from meshwright.costmodels.plan_columns import FloatColumn

__all__ = [
    "REGIMES",
    "TAPER_OCTAVES",
    "OperatorError",
    "OperatorModel",
    "RooflineCurve",
    "roofline_time",
]

# Distance beyond the sampled box, in natural-log units of a dimension or of the FLOPs, at which a residual
# has faded to 1/e (extrapolation at ten times the FLOPs: 13.0 -> 5.9 %, interpolation unchanged).
TAPER_OCTAVES = 0.5 / np.log(2.0)
# Cases priced at once: what they need stays in the caches of a core, which halves the time of a million.
_CASES_AT_ONCE = 16384
# Which term of the roofline dominates; intervals are kept by regime, because launches and waves err differently.
REGIMES = ("launch", "memory", "compute")


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineCurve:
    """Smooth four-parameter roofline of an operator in one number format.

    ``time = launch_time + ((flops / (peak * compute_efficiency)) ** exponent
    + (bytes / (bandwidth * memory_efficiency)) ** exponent) ** (1 / exponent)``.
    """

    launch_time: float
    compute_efficiency: float
    memory_efficiency: float
    exponent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorError:
    """Cross-validated error of a model: shares, from ``num_points`` measured shapes.

    ``mean`` and ``p95`` are of ``|predicted / measured - 1|``; ``bias`` is the median signed error; ``roofline``
    the mean error without the residual.
    """

    mean: float
    p95: float
    bias: float
    roofline: float
    num_points: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorModel:
    """The time of one operator in one number format on one device.

    Parameters
    ----------
    operator : Operator
        Its shape, work and coordinates.
    precision : str
        Number format.
    rates : DeviceRates
        Data sheet of the device.
    curve : RooflineCurve
        Fitted roofline.
    parameters : Mapping[str, float]
        The operator's own constants.
    residual : Residual | None
        Correction of the roofline; None where too few shapes were measured.
    box : NDArray[np.float64] | None
        Sampled range, ``(2, num_dims + 1)``: coordinates and log2 of the FLOPs; beyond it the
        residual fades.
    intervals : Mapping[str, tuple[float, float]]
        P10 and P90 of ``log(measured / predicted)`` by regime, from cross-validation.
    error : OperatorError | None
        Cross-validated error; None for estimates.
    source : str
        Where the numbers come from.
    """

    operator: Operator
    precision: str
    rates: DeviceRates
    curve: RooflineCurve
    parameters: Mapping[str, float] = field(default_factory=dict)
    residual: Residual | None = None
    box: NDArray[np.float64] | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    error: OperatorError | None = None
    source: str = ""

    def work(self, shape: Shape) -> Work:
        """Return FLOPs and bytes of each case."""
        return self.operator.work(shape, self.precision, self.rates, self.parameters)

    def time(self, shape: Shape) -> FloatColumn:
        """Return the seconds of each case [s]."""
        count = min((len(column) for column in shape.values() if column.ndim == 1), default=0)
        if count <= _CASES_AT_ONCE:
            return self._time(shape)
        parts = (slice(start, start + _CASES_AT_ONCE) for start in range(0, count, _CASES_AT_ONCE))
        return np.concatenate(
            [self._time({name: column[part] for name, column in shape.items()}) for part in parts]
        )

    def _time(self, shape: Shape) -> FloatColumn:
        work = self.work(shape)
        return roofline_time(work, self.curve, self.rates) * np.exp(self.log_correction(shape, work))

    def log_correction(self, shape: Shape, work: Work | None = None) -> FloatColumn:
        """Return ``log(time / roofline)``, faded outside the sampled box."""
        work = work or self.work(shape)
        if self.residual is None or self.box is None:
            return np.zeros_like(work.flops)
        inside, excess = self._placed(shape, work)
        if self.residual.has_steps and self.operator.steps is not None:
            # As rows of the transposes: each coordinate stays in one piece.
            inside = np.concatenate([inside.T, self.operator.steps(shape, self.rates).T]).T
        correction: FloatColumn = self.residual.log_correction(inside) * np.exp(-excess / TAPER_OCTAVES)
        return correction

    def interval(self, shape: Shape) -> tuple[FloatColumn, FloatColumn]:
        """Return the 80 % interval of the time of each case [s]; wider outside the sampled box."""
        work = self.work(shape)
        seconds = roofline_time(work, self.curve, self.rates) * np.exp(self.log_correction(shape, work))
        if not self.intervals:
            return seconds, seconds
        regime = self.regime(work)
        low, high = (np.array([self.intervals[name][side] for name in REGIMES])[regime] for side in (0, 1))
        if self.box is not None:
            # At large sizes the roofline alone errs 1.3 to 1.6 times as much as with its residual.
            _, excess = self._placed(shape, work)
            widening = 1.0 + 0.3 * (1.0 - np.exp(-excess / TAPER_OCTAVES))
            low, high = low * widening, high * widening
        return seconds * np.exp(low), seconds * np.exp(high)

    def _placed(self, shape: Shape, work: Work) -> tuple[NDArray[np.float64], FloatColumn]:
        """Return coordinates, moved into the sampled box, and how far they and the FLOPs were beyond it [octaves]."""
        assert self.box is not None
        coordinates = self.operator.coordinates(shape, self.rates)
        flops = np.log2(np.maximum(work.flops, 1.0))
        low, high = self.box
        inside = np.clip(coordinates, low[:-1], high[:-1])
        outside = coordinates - inside
        squared = np.einsum("ij,ij->i", outside, outside) + (flops - np.clip(flops, low[-1], high[-1])) ** 2
        return inside, np.sqrt(squared)

    def regime(self, work: Work) -> NDArray[np.int64]:
        """Return the index into :data:`REGIMES` of each case."""
        compute, memory = _terms(work, self.curve, self.rates)
        is_launch = np.maximum(compute, memory) < self.curve.launch_time + work.latency
        regime: NDArray[np.int64] = np.where(is_launch, 0, np.where(memory > compute, 1, 2))
        return regime


def roofline_time(work: Work, curve: RooflineCurve, rates: DeviceRates) -> FloatColumn:
    """Return the smooth roofline [s]: the longer term, smoothed towards the other by a p-norm, plus latencies."""
    compute, memory = _terms(work, curve, rates)
    longer, shorter = np.maximum(compute, memory), np.minimum(compute, memory)
    # (c**p + b**p) ** (1/p), scaled by the larger term so that only one power of a ratio in [0, 1] is taken.
    ratio: FloatColumn = (shorter / np.maximum(longer, 1e-30)) ** curve.exponent
    return curve.launch_time + work.latency + longer * (1.0 + ratio) ** (1.0 / curve.exponent)


def _terms(work: Work, curve: RooflineCurve, rates: DeviceRates) -> tuple[FloatColumn, FloatColumn]:
    compute = work.flops / (rates.peak_flops_per_second * curve.compute_efficiency)
    memory = work.num_bytes / (rates.bandwidth_bytes_per_second * curve.memory_efficiency)
    return compute, memory
