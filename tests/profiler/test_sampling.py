"""Sampled shapes: spread over the space, the same for the same seed, within what a device holds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="Sobol sequences are scipy's")

from meshwright.costmodels.operators import OPERATORS
from meshwright.errors import SpecError
from meshwright.profiler.device import Device
from meshwright.profiler.fitting.operator import num_samples_needed
from meshwright.profiler.sampling import (
    attention_shapes,
    byte_sizes,
    decode_shapes,
    expert_loads,
    gemm_shapes,
    mla_decode_shapes,
    mla_prefill_shapes,
    moe_shapes,
)
from meshwright.profiler.settings import ProfileSettings, quick_settings
from meshwright.profiler.suites.limits import (
    Limits,
    Shape,
    fits_attention,
    fits_gemm,
    limits_of,
)

H200 = Device(
    type="cuda",
    name="NVIDIA H200",
    gpu="h200-sxm-141",
    num_devices=8,
    num_sms=132,
    memory_bytes=150e9,
    l2_bytes=5e7,
    software={"compute_capability": "9.0"},
)
CPU = Device(
    type="cpu", name="host", gpu="cpu-host", num_devices=1, num_sms=1, memory_bytes=1e10, l2_bytes=3e7
)
BOTH = [limits_of(H200, "bf16"), limits_of(CPU, "bf16")]
SPACES: dict[str, Callable[[int, int, Limits], tuple[Shape, ...]]] = {
    "gemm": gemm_shapes,
    "attention_prefill": attention_shapes,
    "attention_decode": decode_shapes,
    "mla_prefill": mla_prefill_shapes,
    "mla_decode": mla_decode_shapes,
    "moe": moe_shapes,
}


@pytest.mark.parametrize("operator", SPACES)
@pytest.mark.parametrize("limits", BOTH, ids=["gpu", "cpu"])
def test_shapes_have_the_fields_of_their_operator_and_differ(operator: str, limits: Limits) -> None:
    shapes = SPACES[operator](100, 0, limits)
    assert len(shapes) == 100
    assert {tuple(shape) for shape in shapes} == {OPERATORS[operator].fields}
    assert len({tuple(shape.values()) for shape in shapes}) == 100


@pytest.mark.parametrize("operator", SPACES)
def test_equal_seeds_give_equal_shapes_and_fewer_are_the_first_of_more(operator: str) -> None:
    many = SPACES[operator](300, 7, BOTH[0])
    assert SPACES[operator](300, 7, BOTH[0]) == many
    assert SPACES[operator](100, 7, BOTH[0]) == many[:100]
    assert SPACES[operator](300, 8, BOTH[0]) != many


@pytest.mark.parametrize("operator", SPACES)
def test_no_shapes_are_wanted_no_shapes_come(operator: str) -> None:
    assert SPACES[operator](0, 0, BOTH[0]) == ()


def test_gemm_shapes_fill_every_octant_of_the_space() -> None:
    # The corner of three large sizes is cut by the limits, so the middle lies below the geometric mean.
    shapes = gemm_shapes(300, 0, Limits(max_bytes=1e12, max_flops=1e18))
    columns = np.log2([[shape[name] for name in "mnk"] for shape in shapes])
    middles = [7.5, 11.0, 11.0]  # of 1 .. 32768 and 64 .. 65536
    octants, counts = np.unique(columns > middles, axis=0, return_counts=True)
    assert len(octants) == 8
    # A random sample of 300 would have octants 30 % off; a Sobol sequence is within a few points of 37.5.
    assert np.abs(counts - 300 / 8).max() <= 6


def test_gemm_widths_are_multiples_that_every_number_format_takes() -> None:
    for shape in gemm_shapes(300, 0, BOTH[0]):
        assert shape["n"] % 16 == 0
        assert shape["k"] % 16 == 0
        assert 1 <= shape["m"] <= 32768


@pytest.mark.parametrize("limits", BOTH, ids=["gpu", "cpu"])
def test_shapes_stay_within_memory_and_work(limits: Limits) -> None:
    for shape in gemm_shapes(200, 1, limits):
        m, n, k = shape["m"], shape["n"], shape["k"]
        assert 2.0 * (m * k + n * k + m * n) <= limits.max_bytes
        assert 2.0 * m * n * k <= limits.max_flops
    for shape in decode_shapes(200, 1, limits):
        cache = (
            4.0 * shape["batch_size"] * shape["context_length"] * shape["num_kv_heads"] * shape["head_dim"]
        )
        assert cache <= limits.max_bytes
    for shape in moe_shapes(200, 1, limits):
        local = shape["num_experts"] / shape["ep"]
        width = shape["moe_ffn_hidden_size"] / shape["tp"]
        assert 6.0 * local * shape["hidden_size"] * width <= limits.max_bytes


def test_a_quarter_of_the_memory_is_used_and_slow_devices_get_less_work() -> None:
    assert limits_of(H200, "bf16").max_bytes == pytest.approx(150e9 / 4)
    assert limits_of(H200, "fp32").max_flops < limits_of(H200, "bf16").max_flops
    assert limits_of(CPU, "fp32").is_small
    # About a millisecond at the 150 GFLOP/s of a core.
    assert limits_of(CPU, "fp32").max_flops / 150e9 < 1e-3


def test_a_models_own_shapes_may_take_longer_but_no_more_memory() -> None:
    limits = Limits(max_bytes=1e10, max_flops=1e12)
    slow = {"m": 4096, "n": 16384, "k": 16384}
    assert not fits_gemm(slow, limits, "bf16")
    assert fits_gemm(slow, limits, "bf16", is_exact=True)
    assert not fits_gemm({"m": 1, "n": 10**5, "k": 10**5}, limits, "bf16", is_exact=True)


def test_backward_attention_repeats_shapes_of_prefill() -> None:
    forward = {tuple(shape.values()) for shape in attention_shapes(300, 0, BOTH[0])}
    backward = [tuple(shape.values()) for shape in attention_shapes(150, 0, BOTH[0], is_backward=True)]
    assert sum(shape in forward for shape in backward) >= 140
    shape = {
        "batch_size": 1,
        "sequence_length": 1000,
        "num_heads": 10,
        "num_kv_heads": 10,
        "head_dim": 100,
    }
    exactly_forward = Limits(max_bytes=1e12, max_flops=2.0 * 10 * 1000 * 1000 * 100)
    assert fits_attention("attention_prefill", shape, exactly_forward)
    assert not fits_attention("attention_backward", shape, exactly_forward)


def test_attention_covers_head_widths_groups_and_lengths() -> None:
    shapes = attention_shapes(300, 0, BOTH[0])
    assert {shape["head_dim"] for shape in shapes} == {64, 128, 192, 256}
    assert {shape["num_heads"] // shape["num_kv_heads"] for shape in shapes} == {1, 2, 4, 8, 16}
    assert all(shape["num_heads"] % shape["num_kv_heads"] == 0 for shape in shapes)
    assert min(shape["sequence_length"] for shape in shapes) < 64
    assert max(shape["sequence_length"] for shape in shapes) > 30_000


def test_experts_divide_over_their_ranks() -> None:
    shapes = moe_shapes(150, 0, BOTH[0])
    assert {shape["skew"] for shape in shapes} == {0.0, 1.2}
    for shape in shapes:
        assert shape["num_experts"] % shape["ep"] == 0
        assert shape["moe_ffn_hidden_size"] % (16 * shape["tp"]) == 0
        assert shape["top_k"] <= shape["num_experts"]


def test_byte_sizes_span_the_range_evenly_in_octaves() -> None:
    sizes = byte_sizes(9, 2**10, 2**26)
    assert sizes == tuple(2**exponent for exponent in range(10, 27, 2))
    assert byte_sizes(0, 1e3, 1e6) == ()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 300), st.sampled_from([0.0, 1.01, 1.2]), st.integers(0, 9))
def test_expert_loads_conserve_the_rows(num_rows: int, num_experts: int, skew: float, seed: int) -> None:
    loads = expert_loads(num_rows, num_experts, skew, np.random.default_rng(seed))
    assert loads.sum() == num_rows
    assert loads.min() >= 0
    if skew == 0.0:
        assert loads.max() - loads.min() <= 1


def test_a_power_law_loads_few_experts_with_much() -> None:
    loads = np.sort(expert_loads(100_000, 256, 1.2, np.random.default_rng(0)))
    assert loads[-26:].sum() > 0.5 * loads.sum()


def test_settings_refuse_names_they_do_not_know() -> None:
    with pytest.raises(SpecError, match=r"unknown precision 'bf61'; did you mean 'bf16'\?"):
        ProfileSettings(precisions=("bf61",))
    with pytest.raises(SpecError, match=r"unknown operator 'gem'; did you mean 'gemm'\?"):
        ProfileSettings(points={"gem": 3})
    with pytest.raises(SpecError, match="max_seconds must be above zero, not 0"):
        ProfileSettings(max_seconds=0)


def test_quick_settings_ask_for_a_hundred_shapes_and_less_than_a_minute() -> None:
    quick = quick_settings()
    assert quick.max_seconds < 60.0
    assert quick.num_points("gemm") == 100
    assert quick.num_points("nothing") == 0
    for name in set(quick.points) & set(OPERATORS):
        assert quick.num_points(name) >= num_samples_needed(OPERATORS[name])
    # Shapes of a quick profile are the first of the full one, which goes on from its file.
    assert set(quick.points) == set(ProfileSettings().points)
    assert quick.seed == ProfileSettings().seed


def test_a_pass_has_its_share_of_the_repeats() -> None:
    share = ProfileSettings(min_repeats=8, kernel_seconds=0.03).pass_of(3)
    assert share.min_repeats == 3
    assert share.kernel_seconds == pytest.approx(0.01)
