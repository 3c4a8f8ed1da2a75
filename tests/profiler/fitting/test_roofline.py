"""Rooflines fitted to times made by a known roofline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.operators import OPERATORS, DeviceRates, RooflineCurve, roofline_time
from meshwright.profiler.fitting.roofline import fit_roofline
from meshwright.profiler.measurements import OperatorSamples

RATES = DeviceRates(
    peak_flops_per_second=1e15, bandwidth_bytes_per_second=4e12, num_sms=132, l2_bytes=50 * 2**20
)
TRUTH = RooflineCurve(launch_time=4e-6, compute_efficiency=0.65, memory_efficiency=0.8, exponent=1.8)


def random_shape(name: str, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Sizes spread over what models use."""
    rng = np.random.default_rng(seed)

    def power(low: float, high: float, step: float = 1.0) -> np.ndarray:
        return np.asarray(2.0 ** (step * rng.integers(round(low / step), round(high / step) + 1, count)))

    if name.startswith("gemm"):
        return {"m": power(0, 15), "n": power(8, 14, 0.5).round(), "k": power(8, 14, 0.5).round()}
    if name == "moe":
        ep = power(0, 3)
        sizes = {
            "num_tokens": power(0, 14),
            "hidden_size": power(10, 13),
            "moe_ffn_hidden_size": power(9, 13),
        }
        counts = {"top_k": power(1, 3), "num_experts": power(4, 8), "tp": power(0, 2), "ep": ep}
        return {**sizes, **counts, "skew": 1.2 * rng.integers(0, 2, count)}
    if name == "copy":
        return {"num_bytes": power(8, 32)}
    length = "context_length" if name.endswith("decode") else "sequence_length"
    shape = {"batch_size": power(0, 7), length: power(7, 15)}
    if name.startswith("mla"):
        return {**shape, "num_heads": power(3, 7)}
    heads = power(0, 3)
    return {**shape, "num_heads": heads * power(0, 3), "num_kv_heads": heads, "head_dim": power(6, 7)}


def made(name: str, count: int, *, noise: float = 0.0, curve: RooflineCurve = TRUTH) -> OperatorSamples:
    """Samples of the roofline with the operator's initial parameters, times lognormal noise."""
    operator, shape = OPERATORS[name], random_shape(name, count)
    parameters = {parameter.name: 0.8 * parameter.initial for parameter in operator.parameters}
    seconds = roofline_time(operator.work(shape, "bf16", RATES, parameters), curve, RATES)
    seconds = seconds * np.exp(noise * np.random.default_rng(1).normal(size=count))
    return OperatorSamples(operator=name, precision="bf16", shape=shape, seconds=seconds, source="made up")


def check_near(curve: RooflineCurve, tolerance: float) -> None:
    for name in ("launch_time", "compute_efficiency", "memory_efficiency", "exponent"):
        assert getattr(curve, name) == pytest.approx(getattr(TRUTH, name), rel=tolerance), name


def test_the_roofline_of_products_is_recovered() -> None:
    curve, parameters = fit_roofline(made("gemm", 200), OPERATORS["gemm"], RATES)
    check_near(curve, 0.001)
    assert parameters == {}


def test_the_roofline_is_recovered_from_noisy_times() -> None:
    # 5 % noise over a thousand shapes leaves 0.05 / sqrt(1000) = 0.2 % on what every shape tells.
    curve, _ = fit_roofline(made("gemm", 1000, noise=0.05), OPERATORS["gemm"], RATES)
    check_near(curve, 0.02)


def test_a_few_shapes_on_another_kernel_do_not_bend_the_roofline() -> None:
    samples, true = made("gemm", 400), made("gemm", 400).seconds
    samples.seconds[::20] *= 10.0
    curve, _ = fit_roofline(samples, OPERATORS["gemm"], RATES)
    predicted = roofline_time(OPERATORS["gemm"].work(samples.shape, "bf16", RATES, {}), curve, RATES)
    # Plain least squares would raise every time by about 10 ** (1 / 20), 12 %.
    assert np.abs(predicted / true - 1.0).mean() < 0.06


@pytest.mark.parametrize(
    "name",
    ["attention_prefill", "attention_backward", "attention_decode", "mla_prefill", "mla_decode", "moe"],
)
def test_operators_with_parameters_of_their_own_are_recovered(name: str) -> None:
    samples = made(name, 300)
    operator = OPERATORS[name]
    curve, parameters = fit_roofline(samples, operator, RATES)
    work = operator.work(samples.shape, "bf16", RATES, parameters)
    errors = roofline_time(work, curve, RATES) / samples.seconds - 1.0
    # Tiles of experts are steps, over which least squares does not climb.
    assert np.abs(errors).mean() < (0.06 if name == "moe" else 0.01)
    for parameter in operator.parameters:
        assert parameter.low <= parameters[parameter.name] <= parameter.high


def test_the_roofline_of_a_copy_is_its_latency_and_bandwidth() -> None:
    samples = made("copy", 60)
    curve, _ = fit_roofline(samples, OPERATORS["copy"], RATES)
    # Without FLOPs the exponent changes nothing.
    assert curve.launch_time == pytest.approx(TRUTH.launch_time, rel=0.001)
    assert curve.memory_efficiency == pytest.approx(TRUTH.memory_efficiency, rel=0.001)


def test_a_fit_stays_within_its_bounds_however_odd_the_times() -> None:
    samples = made("gemm", 60)
    samples.seconds[:] = 1e-12
    curve, _ = fit_roofline(samples, OPERATORS["gemm"], RATES)
    assert curve.launch_time > 0.0
    assert 0.0 < curve.compute_efficiency <= 1.0


@pytest.mark.parametrize("name", ["gemm", "attention_decode", "copy"])
def test_only_a_nominal_data_sheet_is_passed(name: str) -> None:
    twice = replace(TRUTH, compute_efficiency=1.4, memory_efficiency=1.6)
    samples, operator = made(name, 300, curve=twice), OPERATORS[name]
    curve, _ = fit_roofline(samples, operator, RATES)
    assert curve.compute_efficiency <= 1.0
    assert curve.memory_efficiency == pytest.approx(1.0, abs=1e-3)
    assert curve.memory_efficiency <= 1.0
    nominal, _ = fit_roofline(samples, operator, replace(RATES, is_nominal=True))
    assert nominal.memory_efficiency == pytest.approx(1.6, rel=0.01)
