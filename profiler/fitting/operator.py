"""Fit one operator: its roofline, the residual that cross-validates best, its error and its intervals."""

from __future__ import annotations

from collections.abc import Sequence
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
    StackedResidual,
)
from meshwright.costmodels.operators.model import REGIMES, roofline_time
from meshwright.errors import CalibrationError
from meshwright.profiler.fitting.residual import fit_rbf, left_out_by_rbf, unbaked
from meshwright.profiler.fitting.roofline import fit_roofline
from meshwright.profiler.fitting.subset import spread_rows
from meshwright.profiler.fitting.trees import fit_trees
from meshwright.profiler.measurements import OperatorSamples

__all__ = ["FitSettings", "fit_operator", "num_samples_needed"]

Column = NDArray[np.float64]

_FOLDS = 5
# Shapes per fitted constant of a roofline, and the least for a residual with its cross-validation.
_SAMPLES_PER_CONSTANT = 3
_RESIDUAL_SAMPLES = 30
# Streaming kernels have one dimension: a few sizes draw the whole curve.
_RESIDUAL_SAMPLES_1D = 8
# With fewer, trees do not lower the error of shapes never seen (attention, experts and products at 50 points).
_TREE_SAMPLES = 100
# Shapes of a regime that count as much for the spread of its errors as those of all regimes together.
_SHARED_SAMPLES = 20
# Most shapes that judge a fit, and that sharpen a roofline.
_MAX_HOLD_OUT, _MAX_ROOFLINE = 4000, 2500
# The quicker residual stays unless another errs this share less.
_WORTH_THE_TIME = 0.06
# Shares of the trees in a sum with the smooth residual.
_TREE_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


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
        Fit a residual at all; try stepwise ones too.
    """

    max_points: int = 1000
    seed: int = 0
    with_residual: bool = True
    with_trees: bool = True


def num_samples_needed(operator: Operator) -> int:
    """Return how many shapes the roofline of an operator needs."""
    if operator.num_dims == 1:
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
    picked = spread_rows(operator.coordinates(samples.shape, rates), settings.max_points, settings.seed)
    training = samples.take(picked)
    # Folds are smaller than the whole; what they can fit is decided once.
    with_residual = settings.with_residual and len(picked) >= _samples_for_residual(operator)
    with_trees = (
        with_residual and settings.with_trees and len(picked) >= _TREE_SAMPLES and operator.num_dims > 1
    )

    rest = np.random.default_rng(settings.seed).permutation(
        np.setdiff1d(np.arange(len(samples.seconds)), picked)
    )
    # With shapes to spare, half of them judge the fit and the others sharpen the roofline: evenly spread shapes give
    # rare sizes more say than they have in a model, which on A100 tables moves training predictions by 1.5 points.
    spare = len(rest) >= len(picked)
    judging, others = np.split(rest, [min(_MAX_HOLD_OUT, len(rest) // 2) if spare else 0])
    for_roofline = np.concatenate([picked, others[:_MAX_ROOFLINE]]) if spare else picked
    plain = _fit_plain(samples.take(np.sort(for_roofline)), operator, rates)

    if not with_residual:
        left_out = _left_out_by_roofline(training, operator, rates, settings.seed)
        return _with_error(plain, training, left_out, len(picked))
    models = _with_residuals(plain, training, with_trees=with_trees)
    if not spare:
        by_residual = _left_out_by_residuals(plain, training, settings.seed, with_trees=with_trees)
        if with_trees and operator.is_bakeable:
            model, errors = _mixed(models, by_residual)
        else:
            best = _best(by_residual, operator)
            model, errors = models[best], by_residual[best]
        return _with_error(model, training, errors, len(picked))
    choosing, judging_samples = samples.take(judging[::2]), samples.take(judging[1::2])
    model = models[_best([_log_errors(each, choosing) for each in models], operator)]
    return _with_error(model, judging_samples, _log_errors(model, judging_samples), len(picked))


def _samples_for_residual(operator: Operator) -> int:
    return _RESIDUAL_SAMPLES_1D if operator.num_dims == 1 else _RESIDUAL_SAMPLES


def _log_errors(model: OperatorModel, samples: OperatorSamples) -> Column:
    """Return ``log(measured / predicted)`` of samples the model did not see, without the cost of baking a grid."""
    errors: Column = np.log(samples.seconds / unbaked(model).time(samples.shape))
    return errors


def _fit_plain(samples: OperatorSamples, operator: Operator, rates: DeviceRates) -> OperatorModel:
    curve, parameters = fit_roofline(samples, operator, rates)
    return OperatorModel(
        operator=operator,
        precision=samples.precision,
        rates=rates,
        curve=curve,
        parameters=parameters,
        source=samples.source,
    )


def _with_residuals(
    plain: OperatorModel, samples: OperatorSamples, *, with_trees: bool
) -> tuple[OperatorModel, ...]:
    """Return the roofline under a smooth residual, and under trees."""
    coordinates, log_errors = _left_by(plain, samples)
    residuals: list[Residual] = [fit_rbf(plain.operator, coordinates, log_errors)]
    if with_trees:
        residuals.append(fit_trees(coordinates, log_errors))
    log_flops = np.log2(np.maximum(plain.work(samples.shape).flops, 1.0))
    sampled = np.column_stack([coordinates[:, : plain.operator.num_dims], log_flops])
    box = np.stack([sampled.min(axis=0), sampled.max(axis=0)])
    return tuple(replace(plain, residual=residual, box=box) for residual in residuals)


def _left_by(plain: OperatorModel, samples: OperatorSamples) -> tuple[Column, Column]:
    """Return smooth and stepwise coordinates, and what the roofline leaves of each sample's log time."""
    operator = plain.operator
    parts = [each(samples.shape, plain.rates) for each in (operator.coordinates, operator.steps) if each]
    return np.column_stack(parts), _log_errors(plain, samples)


def _mixed(models: Sequence[OperatorModel], log_errors: Sequence[Column]) -> tuple[OperatorModel, Column]:
    """Return the model under the sum of the smooth residual and the trees that errs least, and its errors.

    Residuals are logarithms, as errors are: those of a sum are the sum of those. From a few hundred shapes sums err
    less than either part: most about half of each, where kernels run in whole waves of large tiles more of the trees.
    """
    mixed = [(1.0 - share) * log_errors[0] + share * log_errors[1] for share in _TREE_SHARES]
    best = int(np.argmin([_mean_error(each) for each in mixed]))
    share = _TREE_SHARES[best]
    parts = tuple(
        (model.residual, weight)
        for model, weight in zip(models, (1.0 - share, share), strict=True)
        if model.residual is not None and weight > 0.0
    )
    residuals, weights = zip(*parts, strict=True)
    residual = residuals[0] if len(residuals) == 1 else StackedResidual(parts=residuals, weights=weights)
    return replace(models[0], residual=residual), mixed[best]


def _best(log_errors: Sequence[Column], operator: Operator) -> int:
    """Return which residual to take by errors on shapes not seen: the smooth one (0) or trees (1).

    A smooth residual on a grid is quicker than trees, and without one slower; the quicker one stays unless another errs
    clearly less.
    """
    if len(log_errors) == 1:
        return 0
    errors = [_mean_error(each) for each in log_errors]
    quickest, least = 0 if operator.is_bakeable else 1, int(np.argmin(errors))
    return least if errors[least] < (1.0 - _WORTH_THE_TIME) * errors[quickest] else quickest


def _mean_error(log_errors: Column) -> float:
    """Return the mean of ``|predicted / measured - 1|``."""
    return float(np.abs(np.exp(-log_errors) - 1.0).mean())


def _folds(count: int, seed: int) -> list[NDArray[np.int64]]:
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(order[fold::_FOLDS]) for fold in range(min(_FOLDS, count))]


def _left_out_by_roofline(
    samples: OperatorSamples, operator: Operator, rates: DeviceRates, seed: int
) -> Column:
    """Return ``log(measured / predicted)`` of each sample by the roofline of the folds that it is not in."""
    every, left = np.arange(len(samples.seconds)), np.empty_like(samples.seconds)
    for held in _folds(len(every), seed):
        model = _fit_plain(samples.take(np.setdiff1d(every, held)), operator, rates)
        left[held] = _log_errors(model, samples.take(held))
    return left


def _left_out_by_residuals(
    plain: OperatorModel, samples: OperatorSamples, seed: int, *, with_trees: bool
) -> list[Column]:
    """Return ``log(measured / predicted)`` of each sample by the residuals of the folds that it is not in.

    The roofline, a handful of constants on thirty shapes or more, is that of all samples.
    """
    coordinates, log_errors = _left_by(plain, samples)
    folds = _folds(len(log_errors), seed)
    left = [left_out_by_rbf(plain.operator, coordinates, log_errors, folds)]
    if with_trees:
        left.append(log_errors.copy())
        for held in folds:
            rest = np.setdiff1d(np.arange(len(log_errors)), held)
            left[1][held] -= fit_trees(coordinates[rest], log_errors[rest]).log_correction(coordinates[held])
    return left


def _with_error(
    model: OperatorModel, samples: OperatorSamples, log_errors: Column, num_points: int
) -> OperatorModel:
    """Attach error and intervals from honest log errors ``log(measured / predicted)``."""
    signed = np.exp(-log_errors) - 1.0
    work = model.work(samples.shape)
    roofline = np.abs(roofline_time(work, model.curve, model.rates) / samples.seconds - 1.0)
    return replace(
        model,
        intervals=_intervals(log_errors, model.regime(work)),
        error=OperatorError(
            mean=float(np.abs(signed).mean()),
            p95=float(np.quantile(np.abs(signed), 0.95)),
            bias=float(np.median(signed)),
            roofline=float(roofline.mean()),
            num_points=num_points,
        ),
    )


def _intervals(log_errors: Column, regime: NDArray[np.int64]) -> dict[str, tuple[float, float]]:
    """Return P10 and P90 of ``log(measured / predicted)`` by regime.

    Notes
    -----
    Normalised conformal intervals (Lei et al. 2018, section 5.2): quantiles of all errors in units of their regime's
    spread. Quantiles of a regime alone, from the thirty shapes or so it may have, miss by half of themselves.
    """
    spreads = [_spread(log_errors, log_errors[regime == index]) for index in range(len(REGIMES))]
    low, high = np.quantile(log_errors / np.array(spreads)[regime], (0.1, 0.9))
    return {
        name: (float(min(low, 0.0)) * spread, float(max(high, 0.0)) * spread)
        for name, spread in zip(REGIMES, spreads, strict=True)
    }


def _spread(every: Column, mine: Column) -> float:
    """Return the median absolute error of a regime, drawn towards that of all where it has few shapes."""
    if not len(mine):
        return _median(every)
    weight = len(mine) / (len(mine) + _SHARED_SAMPLES)
    return float(_median(mine) ** weight * _median(every) ** (1.0 - weight))


def _median(log_errors: Column) -> float:
    return max(float(np.median(np.abs(log_errors))), 1e-9)
