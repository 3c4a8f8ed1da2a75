"""Operator models fitted to times of a known truth with known noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.operators import (
    OPERATORS,
    DeviceRates,
    Operator,
    OperatorModel,
    RbfResidual,
    RooflineCurve,
    roofline_time,
)
from meshwright.errors import CalibrationError
from meshwright.profiler.fitting import operator as fitting
from meshwright.profiler.fitting import residual as residuals
from meshwright.profiler.fitting.operator import FitSettings, fit_operator, num_samples_needed
from meshwright.profiler.fitting.residual import fit_rbf
from meshwright.profiler.measurements import OperatorSamples

RATES = DeviceRates(peak_flops_per_second=1e15, bandwidth_bytes_per_second=4e12, num_sms=132)
CURVE = RooflineCurve(launch_time=4e-6, compute_efficiency=0.65, memory_efficiency=0.8, exponent=1.8)
GEMM = OPERATORS["gemm"]
SMOOTH_ONLY = FitSettings(with_trees=False)
# Mean of |x| of a normal x, in standard deviations.
MEAN_OF_NORMAL = np.sqrt(2.0 / np.pi)


def made(
    count: int, *, seed: int = 0, noise: float = 0.02, wave: float = 0.0, step: float = 0.0
) -> OperatorSamples:
    """Products: a roofline, a smooth deviation, a step where the last wave is mostly empty, and noise."""
    rng = np.random.default_rng(seed)
    shape = {name: np.round(2.0 ** rng.uniform(6.0, 14.0, count)) for name in "mnk"}
    coordinates = GEMM.coordinates(shape, RATES)
    assert GEMM.steps is not None
    is_wasted = GEMM.steps(shape, RATES)[:, 0] > 0.5
    log_errors = (
        wave * np.sin(coordinates / 2.0).sum(axis=1) + step * is_wasted + noise * rng.normal(size=count)
    )
    seconds = roofline_time(GEMM.work(shape, "bf16", RATES, {}), CURVE, RATES) * np.exp(log_errors)
    return OperatorSamples(operator="gemm", precision="bf16", shape=shape, seconds=seconds, source="made up")


def mean_error(model: OperatorModel, samples: OperatorSamples) -> float:
    return float(np.abs(model.time(samples.shape) / samples.seconds - 1.0).mean())


@pytest.fixture(scope="module")
def wavy() -> OperatorModel:
    return fit_operator(made(400, wave=0.15), RATES, SMOOTH_ONLY)


def test_the_residual_takes_the_error_down_to_the_noise(wavy: OperatorModel) -> None:
    assert wavy.error is not None
    assert wavy.error.roofline > 0.06
    error = mean_error(wavy, made(2000, seed=1, wave=0.15))
    assert error < 1.7 * 0.02 * MEAN_OF_NORMAL
    assert error < 0.35 * wavy.error.roofline


def test_cross_validated_error_is_that_on_shapes_never_seen(wavy: OperatorModel) -> None:
    assert wavy.error is not None
    # Folds fit to four fifths of the shapes, which is a little worse than all of them.
    assert wavy.error.mean == pytest.approx(mean_error(wavy, made(2000, seed=1, wave=0.15)), rel=0.2)
    assert wavy.error.num_points == 400
    assert wavy.error.mean < wavy.error.p95 < wavy.error.roofline * 3
    assert abs(wavy.error.bias) < 0.01


@pytest.mark.parametrize(("noise", "wave"), [(0.1, 0.0), (0.05, 0.15)])
def test_eighty_percent_intervals_cover_about_as_many_unseen_shapes(noise: float, wave: float) -> None:
    model = fit_operator(made(400, noise=noise, wave=wave), RATES, SMOOTH_ONLY)
    unseen = made(4000, seed=1, noise=noise, wave=wave)
    low, high = model.interval(unseen.shape)
    covered = ((unseen.seconds >= low) & (unseen.seconds <= high)).mean()
    assert 0.72 <= covered <= 0.88


def test_shapes_beyond_the_most_points_judge_the_fit() -> None:
    model = fit_operator(made(1000, wave=0.15), RATES, replace(SMOOTH_ONLY, max_points=200))
    assert model.error is not None
    assert isinstance(model.residual, RbfResidual)
    assert model.error.num_points == len(model.residual.weights) == 200
    assert model.error.mean == pytest.approx(mean_error(model, made(2000, seed=1, wave=0.15)), rel=0.2)


def test_steps_take_trees() -> None:
    samples, unseen = made(300, step=0.4), made(1000, seed=1, step=0.4)
    model = fit_operator(samples, RATES)
    assert model.residual is not None
    assert model.residual.has_steps
    assert mean_error(model, unseen) < 0.6 * mean_error(fit_operator(samples, RATES, SMOOTH_ONLY), unseen)


def test_few_samples_grow_no_trees() -> None:
    model = fit_operator(made(99, step=0.4), RATES)
    assert isinstance(model.residual, RbfResidual)


def test_the_quicker_residual_stays_unless_the_other_errs_clearly_less() -> None:
    wide = 0.2 * np.random.default_rng(5).normal(size=500)
    attention = OPERATORS["attention_prefill"]

    def best(*log_errors: np.ndarray, operator: Operator = GEMM) -> int:
        return fitting._best(log_errors, operator)

    assert best(wide) == best(wide, operator=attention) == 0
    # On a grid the smooth one is quicker, elsewhere trees are.
    assert [best(wide, share * wide) for share in (1.1, 0.97, 0.8)] == [0, 0, 1]
    assert [best(wide, share * wide, operator=attention) for share in (1.3, 1.03, 0.9)] == [0, 1, 1]


def test_a_sum_takes_the_shares_that_err_least() -> None:
    samples, unseen = made(200, step=0.4), made(300, seed=1, step=0.4)
    models = fitting._with_residuals(fit_operator(samples, RATES, SMOOTH_ONLY), samples, with_trees=True)
    smooth, stepwise = (fitting._log_errors(model, unseen) for model in models)
    for share in (0.25, 0.5, 0.75):
        # Errors that cancel at this share and no other.
        noise = np.linspace(-0.2, 0.3, 300)
        mixed, left = fitting._mixed(models, (share * noise, (share - 1.0) * noise))
        np.testing.assert_allclose(left, 0.0, atol=1e-12)
        expected = (1.0 - share) * smooth + share * stepwise
        np.testing.assert_allclose(fitting._log_errors(mixed, unseen), expected, atol=1e-12)
    # A part of no weight is not kept.
    assert fitting._mixed(models, (0.1 * smooth, stepwise))[0].residual is models[0].residual
    assert fitting._mixed(models, (smooth, 0.1 * stepwise))[0].residual is models[1].residual


def test_errors_of_left_out_folds_are_those_of_fits_without_them() -> None:
    samples = made(60, wave=0.15)
    coordinates, log_errors = GEMM.coordinates(samples.shape, RATES), np.log(samples.seconds)
    folds = [np.arange(start, 60, 5) for start in range(5)]
    left_out = residuals.left_out_by_rbf(GEMM, coordinates, log_errors, folds)
    for held in folds:
        rest = np.setdiff1d(np.arange(60), held)
        residual = fit_rbf(GEMM, coordinates[rest], log_errors[rest])
        np.testing.assert_allclose(left_out[held], log_errors[held] - residual.exact(coordinates[held]))


def test_intervals_of_a_regime_with_few_shapes_lean_on_all() -> None:
    rng = np.random.default_rng(6)
    errors = np.concatenate(
        [0.05 * rng.normal(size=400), 0.2 * rng.normal(size=400), 0.05 * rng.normal(size=8)]
    )
    regime = np.repeat([0, 1, 2], [400, 400, 8])
    bands = fitting._intervals(errors, regime)
    for name, spread in (("launch", 0.05), ("memory", 0.2)):
        np.testing.assert_allclose(bands[name], (-1.28 * spread, 1.28 * spread), rtol=0.15)
    # Eight shapes say little of their tails: between their own spread and that of all.
    assert 0.05 * 1.28 < bands["compute"][1] < 0.2 * 1.28
    np.testing.assert_allclose(
        fitting._intervals(errors[:400], regime[:400])["compute"], bands["launch"], rtol=0.2
    )


def test_the_box_is_what_was_sampled(wavy: OperatorModel) -> None:
    samples = made(400, wave=0.15)
    assert wavy.box is not None
    flops = np.log2(2.0 * samples.shape["m"] * samples.shape["n"] * samples.shape["k"])
    sizes = [np.log2(samples.shape[name]) for name in "mnk"]
    np.testing.assert_allclose(wavy.box[0], [column.min() for column in (*sizes, flops)])
    np.testing.assert_allclose(wavy.box[1], [column.max() for column in (*sizes, flops)])
    np.testing.assert_array_less(0.0, np.diff(list(wavy.intervals.values()), axis=1))


@pytest.mark.parametrize("name", ["gemm", "attention_decode", "moe", "copy"])
def test_too_few_shapes_say_how_many_more(name: str) -> None:
    operator = OPERATORS[name]
    # Three shapes per constant of the roofline; a copy has two constants in one dimension.
    needed = 4 if name == "copy" else 3 * (4 + len(operator.parameters))
    assert num_samples_needed(operator) == needed
    few = needed - 3
    samples = OperatorSamples(
        operator=name,
        precision="bf16",
        shape={field: np.arange(1.0, few + 1.0) for field in operator.fields},
        seconds=np.full(few, 1e-5),
        source="made up",
    )
    with pytest.raises(CalibrationError) as caught:
        fit_operator(samples, RATES)
    assert str(caught.value) == f"{name}.bf16: {few} measured shapes are too few; measure at least 3 more"


def test_a_few_shapes_give_a_roofline_alone_with_its_error() -> None:
    model = fit_operator(made(20), RATES)
    assert model.residual is None
    assert model.error is not None
    assert model.error.num_points == 20
    assert set(model.intervals) == {"launch", "memory", "compute"}
    assert mean_error(model, made(1000, seed=1)) < 0.05


def test_eight_sizes_of_a_copy_draw_its_curve() -> None:
    num_bytes = 2.0 ** np.arange(10, 34, 3)
    # Bandwidth halves beyond 64 MiB, which no latency and bandwidth follow.
    seconds = 3e-6 + num_bytes / np.where(num_bytes < 2**26, 4e12, 2e12)
    samples = OperatorSamples(
        operator="copy", precision="bf16", shape={"num_bytes": num_bytes}, seconds=seconds, source="made up"
    )
    model = fit_operator(samples, RATES)
    assert isinstance(model.residual, RbfResidual)
    assert model.error is not None
    assert mean_error(model, samples) < model.error.roofline


def test_equal_seeds_give_equal_models_and_other_seeds_other_folds(wavy: OperatorModel) -> None:
    samples = made(400, wave=0.15)
    again = fit_operator(samples, RATES, SMOOTH_ONLY)
    other = fit_operator(samples, RATES, replace(SMOOTH_ONLY, seed=1))
    assert again.curve == wavy.curve == other.curve
    assert again.error == wavy.error != other.error
    assert again.intervals == wavy.intervals
