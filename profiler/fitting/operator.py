"""Fit one operator: its roofline, the residual that cross-validates best, its error and its intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from meshwright.profiler.fitting.residual import fit_rbf, fit_trees, has_trees, unbaked
from meshwright.profiler.fitting.roofline import fit_roofline
from meshwright.profiler.fitting.subset import spread_rows
from meshwright.profiler.measurements import OperatorSamples

__all__ = ["FitSettings", "fit_operator", "num_samples_needed"]

Column = NDArray[np.float64]

_FOLDS = 5
# Shapes per fitted constant of a roofline, and the least for a residual with its cross-validation.
_SAMPLES_PER_CONSTANT = 3
_RESIDUAL_SAMPLES = 30
# Streaming kernels have one dimension: a few sizes draw the whole curve.
_RESIDUAL_SAMPLES_1D = 8
# With fewer, trees do not lower the error of shapes never seen (attention, experts and products at 50 and 100 points).
_TREE_SAMPLES = 150
# Shapes a regime needs for quantiles of its own.
_REGIME_SAMPLES = 20
# Most shapes that judge a fit, and that sharpen a roofline.
_MAX_HOLD_OUT, _MAX_ROOFLINE = 4000, 2500
# Shares of trees in the mean with a smooth residual. Folds tell them apart poorly, so that equal shares have 5 % less to
# show than either alone; a smooth residual that bakes to a grid is ten times as fast, and gives way for 6 %.
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_EQUAL_SHARES_GAIN, _GRID_GAIN = 0.05, 0.06


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
    with_trees = with_trees and has_trees()

    rest = np.random.default_rng(settings.seed).permutation(
        np.setdiff1d(np.arange(len(samples.seconds)), picked)
    )
    # With shapes to spare, half of them judge the fit and the others sharpen the roofline: evenly spread shapes give
    # rare sizes more say than they have in a model, which on A100 tables moves training predictions by 1.5 points.
    spare = len(rest) >= len(picked)
    judging, others = np.split(rest, [min(_MAX_HOLD_OUT, len(rest) // 2) if spare else 0])
    for_roofline = np.concatenate([picked, others[:_MAX_ROOFLINE]]) if spare else picked
    plain = _fit_plain(samples.take(np.sort(for_roofline)), operator, rates)

    def fit(part: OperatorSamples) -> tuple[OperatorModel, ...]:
        # A handful of constants on thirty shapes or more: folds keep the roofline and refit what bends to samples.
        if with_residual:
            return _with_residuals(plain, part, with_trees=with_trees)
        return (_fit_plain(part, operator, rates),)

    models = fit(training)
    if not spare:
        folded = _cross_validated(training, fit, settings.seed)
        share = _share_of_trees(folded, operator)
        return _with_error(_mixed(models, share), training, _mixed_errors(folded, share), len(picked))
    choosing, judging_samples = samples.take(judging[::2]), samples.take(judging[1::2])
    best = _mixed(models, _share_of_trees([_log_errors(model, choosing) for model in models], operator))
    return _with_error(best, judging_samples, _log_errors(best, judging_samples), len(picked))


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
    operator, work = plain.operator, plain.work(samples.shape)
    coordinates = operator.coordinates(samples.shape, plain.rates)
    log_errors = np.log(samples.seconds / roofline_time(work, plain.curve, plain.rates))
    sampled = np.column_stack([coordinates, np.log2(np.maximum(work.flops, 1.0))])
    residuals: list[Residual] = [fit_rbf(operator, coordinates, log_errors)]
    if with_trees:
        if operator.steps is not None:
            coordinates = np.column_stack([coordinates, operator.steps(samples.shape, plain.rates)])
        residuals.append(fit_trees(coordinates, log_errors))
    box = np.stack([sampled.min(axis=0), sampled.max(axis=0)])
    return tuple(replace(plain, residual=residual, box=box) for residual in residuals)


def _mixed(models: Sequence[OperatorModel], share: float) -> OperatorModel:
    """Return the model whose residual is a share of trees and the rest smooth.

    The two err apart, trees between samples and the smooth one on steps, so that their mean is mostly better than either.
    """
    parts = tuple(model.residual for model in models if model.residual is not None)
    if share in (0.0, 1.0):
        return models[int(share)]
    return replace(models[0], residual=StackedResidual(parts=parts, weights=(1.0 - share, share)))


def _mixed_errors(log_errors: Sequence[Column], share: float) -> Column:
    """Return the log errors of :func:`_mixed`: residuals are logarithms, so these mix as they do."""
    smooth, *trees = log_errors
    return (1.0 - share) * smooth + share * trees[0] if trees else smooth


def _share_of_trees(log_errors: Sequence[Column], operator: Operator) -> float:
    """Return the share of trees with the least error on shapes not seen (Wolpert 1992), in doubt the simplest."""
    if len(log_errors) == 1:
        return 0.0

    def error(share: float) -> float:
        return float(np.abs(np.exp(-_mixed_errors(log_errors, share)) - 1.0).mean())

    best = min(_SHARES, key=lambda share: error(share) * (1.0 + _EQUAL_SHARES_GAIN * abs(2.0 * share - 1.0)))
    is_worth = not operator.is_bakeable or error(best) < (1.0 - _GRID_GAIN) * error(0.0)
    return best if is_worth else 0.0


def _cross_validated(
    samples: OperatorSamples, fit: Callable[[OperatorSamples], Sequence[OperatorModel]], seed: int
) -> Sequence[Column]:
    """Return, for each model, ``log(measured / predicted)`` of each sample by the fit that did not see it."""
    count = len(samples.seconds)
    order = np.random.default_rng(seed).permutation(count)
    folds = [np.sort(order[fold::_FOLDS]) for fold in range(min(_FOLDS, count))]
    errors = [
        [_log_errors(model, samples.take(held)) for model in fit(samples.take(np.setdiff1d(order, held)))]
        for held in folds
    ]
    in_order = np.argsort(np.concatenate(folds))
    return [np.concatenate(of_model)[in_order] for of_model in zip(*errors, strict=True)]


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
