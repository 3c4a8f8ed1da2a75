"""Fit one operator: its roofline, the residual that cross-validates best, its error and its intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.operators import (
    OPERATORS,
    DeviceRates,
    Operator,
    OperatorError,
    OperatorModel,
    Residual,
)
from meshwright.costmodels.operators.model import REGIMES, roofline_time
from meshwright.errors import CalibrationError
from meshwright.profiler.fitting.residual import fit_rbf, fit_trees, has_trees
from meshwright.profiler.fitting.roofline import fit_roofline
from meshwright.profiler.fitting.subset import spread_rows
from meshwright.profiler.measurements import OperatorSamples

__all__ = ["FitSettings", "fit_operator", "num_samples_needed"]

Column = NDArray[np.float64]
Rows = NDArray[np.int64]
_Fit = Callable[[OperatorSamples], OperatorModel]

_FOLDS = 5
# Shapes per fitted constant of a roofline, and the least for a residual with its cross-validation.
_SAMPLES_PER_CONSTANT = 3
_RESIDUAL_SAMPLES = 30
# Streaming kernels have one dimension: a few sizes draw the whole curve.
_RESIDUAL_SAMPLES_1D = 8
# Shapes a regime needs for quantiles of its own.
_REGIME_SAMPLES = 20
_MAX_HOLD_OUT = 6000
# A stepwise residual must cross-validate this much better than a smooth one, which is smaller and bakes to a grid.
_TREES_GAIN = 0.97


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """How a fit is made.

    Parameters
    ----------
    max_points : int
        Shapes that enter the residual; further ones judge it.
    seed : int
        Of the choice of shapes and of the folds.
    with_residual, with_trees : bool
        Fit a residual at all; try stepwise ones too, which needs scikit-learn.
    """

    max_points: int = 1000
    seed: int = 0
    with_residual: bool = True
    with_trees: bool = True


def num_samples_needed(operator: Operator) -> int:
    """Return how many shapes the roofline of an operator needs."""
    if operator.num_smooth_dims == 1:
        return 4
    return _SAMPLES_PER_CONSTANT * (4 + len(operator.parameters))


def fit_operator(
    samples: OperatorSamples, rates: DeviceRates, settings: FitSettings | None = None
) -> OperatorModel:
    """Return the calibrated model of one operator in one number format.

    Parameters
    ----------
    samples : OperatorSamples
        Measured shapes, each once.
    rates : DeviceRates
        Data sheet of the device.
    settings : FitSettings | None
        Defaults when None.

    Returns
    -------
    OperatorModel
        With cross-validated error and 80 % intervals by regime; with more shapes than ``max_points``, error and
        intervals are those on the shapes that were left out.

    Raises
    ------
    CalibrationError
        If there are too few shapes; says how many more are needed.
    """
    settings = settings or FitSettings()
    operator = OPERATORS[samples.operator]
    needed = num_samples_needed(operator)
    if len(samples.seconds) < needed:
        raise CalibrationError(
            f"{samples.name}: {len(samples.seconds)} measured shapes are too few; "
            f"measure at least {needed - len(samples.seconds)} more"
        )
    coordinates = operator.coordinates(samples.shape, rates)[:, : operator.num_smooth_dims]
    picked = spread_rows(coordinates, settings.max_points, settings.seed)
    training = samples.take(picked)
    fits = _candidates(operator, rates, len(picked), settings)
    rest = np.setdiff1d(np.arange(len(samples.seconds)), picked)
    if len(rest) < len(picked):
        folded = {name: _cross_validated(training, fit, settings.seed) for name, fit in fits.items()}
        best = _best(folded)
        return _with_error(fits[best](training), training, folded[best], len(picked))
    # Enough shapes are left over: half of them choose the residual, the other half judge it.
    rest = np.random.default_rng(settings.seed).permutation(rest)[:_MAX_HOLD_OUT]
    choosing, judging = samples.take(rest[::2]), samples.take(rest[1::2])
    models = {name: fit(training) for name, fit in fits.items()}
    best = _best({name: _log_errors(model, choosing) for name, model in models.items()})
    return _with_error(models[best], judging, _log_errors(models[best], judging), len(picked))


def _log_errors(model: OperatorModel, samples: OperatorSamples) -> Column:
    """Return ``log(measured / predicted)`` of samples the model did not see."""
    errors: Column = np.log(samples.seconds / model.time(samples.shape))
    return errors


def _candidates(
    operator: Operator, rates: DeviceRates, num_points: int, settings: FitSettings
) -> Mapping[str, _Fit]:
    """Return the ways of fitting that so many points support, simplest first."""
    enough = _RESIDUAL_SAMPLES_1D if operator.num_smooth_dims == 1 else _RESIDUAL_SAMPLES

    def plain(samples: OperatorSamples) -> OperatorModel:
        curve, parameters = fit_roofline(samples, operator, rates)
        return OperatorModel(
            operator=operator,
            precision=samples.precision,
            rates=rates,
            curve=curve,
            parameters=parameters,
            source=samples.source,
        )

    def with_residual(
        samples: OperatorSamples, fit: Callable[[Operator, Column, Column], Residual]
    ) -> OperatorModel:
        model = plain(samples)
        work = model.work(samples.shape)
        coordinates = operator.coordinates(samples.shape, rates)
        log_errors = np.log(samples.seconds / roofline_time(work, model.curve, rates))
        flops = np.log2(np.maximum(work.flops, 1.0))
        sampled = np.column_stack([coordinates[:, : operator.num_smooth_dims], flops])
        return replace(
            model,
            residual=fit(operator, coordinates, log_errors),
            box=np.stack([sampled.min(axis=0), sampled.max(axis=0)]),
        )

    if num_points < enough or not settings.with_residual:
        return {"roofline": plain}
    fits: dict[str, _Fit] = {"rbf": lambda samples: with_residual(samples, fit_rbf)}
    if settings.with_trees and operator.num_smooth_dims > 1 and has_trees():
        fits["trees"] = lambda samples: with_residual(samples, fit_trees)
    return fits


def _best(folded: Mapping[str, Column]) -> str:
    errors = {name: float(np.abs(np.exp(-log_errors) - 1.0).mean()) for name, log_errors in folded.items()}
    simplest = next(iter(errors))
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] < _TREES_GAIN * errors[simplest] else simplest


def _cross_validated(samples: OperatorSamples, fit: _Fit, seed: int) -> Column:
    """Return ``log(measured / predicted)`` of each sample by the fit that did not see it."""
    count = len(samples.seconds)
    order = np.random.default_rng(seed).permutation(count)
    log_errors = np.zeros(count)
    for fold in range(min(_FOLDS, count)):
        held = np.sort(order[fold::_FOLDS])
        model = fit(samples.take(np.setdiff1d(order, held)))
        log_errors[held] = _log_errors(model, samples.take(held))
    return log_errors


def _with_error(
    model: OperatorModel, samples: OperatorSamples, log_errors: Column, num_points: int
) -> OperatorModel:
    """Attach error and intervals from honest log errors ``log(measured / predicted)``."""
    signed = np.exp(-log_errors) - 1.0
    work = model.work(samples.shape)
    roofline = np.abs(roofline_time(work, model.curve, model.rates) / samples.seconds - 1.0)
    regime = model.regime(work)
    intervals = {}
    for index, name in enumerate(REGIMES):
        mine = log_errors[regime == index]
        band = np.quantile(mine if len(mine) >= _REGIME_SAMPLES else log_errors, (0.1, 0.9))
        intervals[name] = (float(min(band[0], 0.0)), float(max(band[1], 0.0)))
    return replace(
        model,
        intervals=intervals,
        error=OperatorError(
            mean=float(np.abs(signed).mean()),
            p95=float(np.quantile(np.abs(signed), 0.95)),
            bias=float(np.median(signed)),
            roofline=float(roofline.mean()),
            num_points=num_points,
        ),
    )
