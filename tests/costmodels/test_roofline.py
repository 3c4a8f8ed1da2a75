from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.costmodels.calibration_choice import load_device_calibration
from meshwright.costmodels.operators import OPERATORS, DeviceRates, OperatorModel, RooflineCurve
from meshwright.costmodels.roofline import gemm_time, stream_time
from meshwright.hardware_specs.catalog import load_gpu

H100 = load_gpu("h100-sxm-80")
H100_CURVE = load_device_calibration(H100).gemm_curve("bf16")
PEAK = H100.peak("bf16")
BANDWIDTH = H100.memory_bandwidth_bytes_per_second
sizes = st.integers(1, 65_536)


def column(value: float) -> np.ndarray:
    return np.array([float(value)])


def roofline(curve: RooflineCurve, peak: float = PEAK, bandwidth: float = BANDWIDTH) -> OperatorModel:
    """A model without a residual."""
    rates = DeviceRates(peak_flops_per_second=peak, bandwidth_bytes_per_second=bandwidth, num_sms=132)
    return OperatorModel(operator=OPERATORS["gemm"], precision="bf16", rates=rates, curve=curve)


H100_MODEL = roofline(H100_CURVE)


def seconds(m: float, n: float, k: float, model: OperatorModel = H100_MODEL) -> float:
    """Time of a bf16 product that reads both inputs and writes its output once."""
    num_bytes = 2.0 * (m * k + k * n + m * n)
    return float(gemm_time(column(m), column(n), column(k), column(num_bytes), model, 1.0)[0])


def test_a_large_product_reaches_the_calibrated_share_of_the_peak() -> None:
    size = 16_384
    ideal = 2.0 * size**3 / (PEAK * H100_CURVE.compute_efficiency)
    assert seconds(size, size, size) == pytest.approx(ideal, rel=0.01)


def test_a_small_product_is_bound_by_its_launch() -> None:
    assert seconds(16, 16, 16) == pytest.approx(H100_CURVE.launch_time, rel=0.01)


def test_a_thin_product_is_bound_by_reading_its_weights() -> None:
    weights = 2.0 * 16_384 * 16_384
    ideal = H100_CURVE.launch_time + weights / (BANDWIDTH * H100_CURVE.memory_efficiency)
    assert seconds(1, 16_384, 16_384) == pytest.approx(ideal, rel=0.01)


@pytest.mark.parametrize(("exponent", "expected"), [(1.0, 5.0), (2.0, 13.0**0.5), (200.0, 3.0)])
def test_compute_and_memory_blend_as_a_p_norm(exponent: float, expected: float) -> None:
    # 2 s of compute and 3 s of traffic: their sum for exponent 1, the longer one for a large exponent.
    curve = RooflineCurve(launch_time=1.0, compute_efficiency=0.5, memory_efficiency=0.25, exponent=exponent)
    time = gemm_time(column(2), column(5), column(1), column(12), roofline(curve, 20.0, 16.0), 1.0)
    assert time[0] == pytest.approx(1.0 + expected)


@given(m=sizes, n=sizes, k=sizes, more=st.integers(1, 1000))
def test_time_grows_with_every_dimension(m: int, n: int, k: int, more: int) -> None:
    base = seconds(m, n, k)
    for grown in (seconds(m + more, n, k), seconds(m, n + more, k), seconds(m, n, k + more)):
        assert grown >= base * (1 - 1e-12)


@given(m=sizes, n=sizes, k=sizes)
def test_no_product_beats_its_compute_or_its_traffic(m: int, n: int, k: int) -> None:
    compute = 2.0 * m * n * k / (PEAK * H100_CURVE.compute_efficiency)
    memory = 2.0 * (m * k + k * n + m * n) / (BANDWIDTH * H100_CURVE.memory_efficiency)
    time = seconds(m, n, k)
    assert time >= H100_CURVE.launch_time + max(compute, memory) * (1 - 1e-12)
    # A p-norm with exponent >= 1 never exceeds the sum either.
    assert time <= H100_CURVE.launch_time + (compute + memory) * (1 + 1e-12)


def test_columns_are_scored_like_single_cases() -> None:
    m, n, k = (np.array(values, dtype=float) for values in ([8, 512], [4096, 64], [128, 9000]))
    num_bytes = 2.0 * (m * k + k * n + m * n)
    times = gemm_time(m, n, k, num_bytes, H100_MODEL, 1.0)
    assert times.tolist() == [seconds(8, 4096, 128), seconds(512, 64, 9000)]


def test_streams_take_their_bytes_over_the_achieved_bandwidth() -> None:
    assert stream_time(column(6e9), 3e12, 0.5)[0] == pytest.approx(6e9 / 1.5e12)
    assert stream_time(column(0.0), 3e12, 0.5)[0] == 0.0
