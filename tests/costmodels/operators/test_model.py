"""A calibrated operator: the residual acts inside what was sampled, and the roofline beyond it."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.costmodels.calibration_choice import built_in_documents
from meshwright.costmodels.operators import (
    OPERATORS,
    DeviceRates,
    OperatorModel,
    RbfResidual,
    RooflineCurve,
    TreeResidual,
    Work,
    roofline_time,
)
from meshwright.costmodels.operators.model import REGIMES, TAPER_OCTAVES
from meshwright.hardware_specs.catalog import load_gpu

RATES = DeviceRates(peak_flops_per_second=1e15, bandwidth_bytes_per_second=3e12, num_sms=132)
# log2 of m, n and k from 1 to 16,384, and of FLOPs from 2 to 2 x 16,384 cubed.
BOX = np.array([[0.0, 0.0, 0.0, 1.0], [14.0, 14.0, 14.0, 43.0]])
HALF_AGAIN = RbfResidual(centres=np.zeros((1, 3)), weights=np.zeros(1), offset=float(np.log(1.5)))
MODEL = OperatorModel(
    operator=OPERATORS["gemm"],
    precision="bf16",
    rates=RATES,
    curve=RooflineCurve(launch_time=3e-6, compute_efficiency=0.7, memory_efficiency=0.8, exponent=2.0),
    residual=HALF_AGAIN,
    box=BOX,
    intervals={"launch": (-0.1, 0.2), "memory": (-0.2, 0.3), "compute": (-0.3, 0.0)},
)
sizes = st.integers(1, 2**30)


def shape(*cases: tuple[float, float, float]) -> dict[str, np.ndarray]:
    return dict(zip("mnk", np.array(cases, dtype=float).T, strict=True))


def ratio(model: OperatorModel, *cases: tuple[float, float, float]) -> np.ndarray:
    """Time over the roofline's."""
    work = model.work(shape(*cases))
    return np.asarray(model.time(shape(*cases)) / roofline_time(work, model.curve, model.rates))


def real_model(name: str = "gemm.bf16") -> OperatorModel:
    """A shipped model with its residual."""
    gpu = load_gpu("h200-sxm-141")
    return built_in_documents(gpu.id, gpu, "vllm")[-1].operators[name]


def test_inside_the_sampled_box_the_residual_acts_fully() -> None:
    np.testing.assert_allclose(ratio(MODEL, (1, 1, 1), (100, 7, 3000), (2**14, 2**14, 2**14)), 1.5)


def test_far_outside_the_box_the_roofline_stands_alone() -> None:
    np.testing.assert_allclose(ratio(MODEL, (2**40, 1, 1), (2**30, 2**30, 2**30)), 1.0, atol=1e-9)


def test_the_residual_fades_to_a_part_in_e_over_the_taper() -> None:
    beyond = 2.0 ** (14.0 + TAPER_OCTAVES)
    np.testing.assert_allclose(np.log(ratio(MODEL, (beyond, 1, 1))), np.log(1.5) / np.e)


def test_more_flops_than_sampled_fade_it_too() -> None:
    small = replace(MODEL, box=np.array([[0.0, 0.0, 0.0, 1.0], [14.0, 14.0, 14.0, 31.0]]))
    # 2 x 1024 cubed is 2 ** 31 FLOPs, the last sampled; twice as many are an octave beyond.
    at, beyond = np.log(ratio(small, (1024, 1024, 1024), (2048, 1024, 1024)))
    assert at == pytest.approx(np.log(1.5))
    assert beyond == pytest.approx(np.log(1.5) * np.exp(-1.0 / TAPER_OCTAVES))


def test_beyond_the_box_the_residual_is_that_of_its_edge() -> None:
    slope = RbfResidual(
        centres=np.array([[0.0, 0, 0], [14.0, 0, 0]]), weights=np.array([0.01, -0.01]), offset=0.0
    )
    model = replace(MODEL, residual=slope)
    edge, beyond = np.log(ratio(model, (2**14, 1, 1), (2**15, 1, 1)))
    assert beyond == pytest.approx(edge * np.exp(-1.0 / TAPER_OCTAVES))


def test_a_model_without_a_residual_is_its_roofline() -> None:
    bare = replace(MODEL, residual=None, box=None)
    np.testing.assert_array_equal(ratio(bare, (1, 1, 1), (4096, 4096, 4096)), 1.0)


def test_trees_see_the_steps_of_the_operator() -> None:
    # The first step of a product is the fill of its last wave of 128 x 128 tiles: 133 tiles fill 132 SMs badly.
    trees = TreeResidual(
        roots=np.array([0]),
        feature=np.array([3, 0, 0]),
        threshold=np.array([0.5, 0.0, 0.0]),
        left=np.array([1, -1, -1]),
        right=np.array([2, -1, -1]),
        value=np.array([0.0, 0.0, 0.3]),
        offset=0.0,
    )
    full, over = np.log(
        ratio(replace(MODEL, residual=trees), (11 * 128, 12 * 128, 64), (7 * 128, 19 * 128, 64))
    )
    assert (full, over) == (pytest.approx(0.0), pytest.approx(0.3))


def test_the_longest_term_names_the_regime() -> None:
    work = Work(flops=np.array([1.0, 1e15, 1.0]), num_bytes=np.array([1.0, 1.0, 1e12]))
    assert [REGIMES[index] for index in MODEL.regime(work)] == ["launch", "compute", "memory"]


def test_inside_the_box_intervals_are_those_of_the_regime() -> None:
    # Launch of one element; compute of 16,384 cubed; memory of a product of depth one.
    cases = shape((1, 1, 1), (2**14, 2**14, 2**14), (2**14, 2**14, 1))
    low, high = MODEL.interval(cases)
    np.testing.assert_allclose(np.log(low / MODEL.time(cases)), [-0.1, -0.3, -0.2], atol=1e-12)
    np.testing.assert_allclose(np.log(high / MODEL.time(cases)), [0.2, 0.0, 0.3], atol=1e-12)


def test_far_outside_the_box_intervals_are_a_third_wider() -> None:
    cases = shape((2**40, 2**20, 2**20))
    low, _ = MODEL.interval(cases)
    assert np.log(low / MODEL.time(cases))[0] == pytest.approx(1.3 * -0.3)


def test_a_model_without_intervals_gives_its_time_twice() -> None:
    low, high = replace(MODEL, intervals={}).interval(shape((8, 8, 8)))
    assert low[0] == high[0] == MODEL.time(shape((8, 8, 8)))[0]


@given(m=sizes, n=sizes, k=sizes)
def test_an_interval_holds_the_prediction_and_only_widens_outside(m: int, n: int, k: int) -> None:
    for model in (MODEL, real_model()):
        cases = shape((m, n, k))
        low, high = model.interval(cases)
        seconds = model.time(cases)
        assert 0.0 < low[0] <= seconds[0] <= high[0] < np.inf
        band = model.intervals[REGIMES[model.regime(model.work(cases))[0]]]
        width = np.log(high[0] / low[0])
        assert band[1] - band[0] - 1e-9 <= width <= 2.0 * (band[1] - band[0]) + 1e-9


@pytest.mark.parametrize("name", ["gemm.bf16", "attention_prefill.bf16", "attention_decode.bf16", "moe.bf16"])
def test_a_case_alone_takes_the_time_it_takes_among_many(name: str) -> None:
    model = real_model(name)
    rng = np.random.default_rng(6)
    count = 1_000_000 if name == "gemm.bf16" else 20_000
    many = {field: 2.0 ** rng.integers(0, 8, count) for field in model.operator.fields}
    if "num_kv_heads" in many:
        many["num_heads"] = many["num_kv_heads"] * 4.0
    together = model.time(many)
    for row in (0, 12_345, count - 1):
        alone = model.time({field: column[row : row + 1] for field, column in many.items()})
        # Matrix products sum in another order: distances near zero keep half their digits.
        assert alone[0] == pytest.approx(together[row], rel=1e-7)


def test_no_cases_take_no_time() -> None:
    assert real_model().time(dict.fromkeys("mnk", np.zeros(0))).shape == (0,)


def test_hundreds_of_thousands_of_products_are_predicted_in_a_second() -> None:
    model, rng = real_model(), np.random.default_rng(7)
    many = {field: 2.0 ** rng.uniform(0.0, 14.0, 100_000) for field in "mnk"}
    model.time(many)  # bakes the grid, compiles
    best = np.inf
    for _ in range(5):
        start = time.perf_counter()
        model.time(many)
        best = min(best, time.perf_counter() - start)
    assert 100_000 / best > 200_000
