"""Work and coordinates of every operator, against numbers counted by hand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.costmodels.operators import (
    OPERATORS,
    STREAMING,
    DeviceRates,
    Operator,
    RooflineCurve,
    Work,
    element_bytes,
    roofline_time,
)

RATES = DeviceRates(
    peak_flops_per_second=1e15, bandwidth_bytes_per_second=3e12, num_sms=132, l2_bytes=50 * 2**20
)
CURVE = RooflineCurve(launch_time=3e-6, compute_efficiency=0.7, memory_efficiency=0.8, exponent=2.0)
PREFILL = {"batch_size": 2, "sequence_length": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
DECODE = {"batch_size": 2, "context_length": 128, "num_heads": 64, "num_kv_heads": 2, "head_dim": 128}
MOE = {
    "num_tokens": 60,
    "hidden_size": 16,
    "moe_ffn_hidden_size": 32,
    "top_k": 2,
    "num_experts": 8,
    "tp": 1,
    "ep": 1,
    "skew": 0,
}
PLAIN_MOE = {"rank_heat": 0.0, "skewed_spread": 1.0}

operators = pytest.mark.parametrize("operator", OPERATORS.values(), ids=list(OPERATORS))
# Products share their functions, and so do streaming kernels: one of each will do.
KINDS = [name for name in OPERATORS if name not in ("gemm_dgrad", "gemm_wgrad", *STREAMING)] + ["copy"]
kinds = pytest.mark.parametrize("operator", [OPERATORS[name] for name in KINDS], ids=KINDS)


def columns(shape: Mapping[str, float]) -> dict[str, np.ndarray]:
    return {name: np.array([float(size)]) for name, size in shape.items()}


def initial(operator: Operator) -> dict[str, float]:
    return {parameter.name: parameter.initial for parameter in operator.parameters}


def work_of(
    name: str, shape: Mapping[str, float], precision: str = "bf16", **parameters: float
) -> tuple[float, float, float]:
    """FLOPs, bytes and latency of one case, with every parameter zero but those given."""
    known = dict.fromkeys(initial(OPERATORS[name]), 0.0) | parameters
    work = OPERATORS[name].work(columns(shape), precision, RATES, known)
    return float(work.flops[0]), float(work.num_bytes[0]), float(np.broadcast_to(work.latency, 1)[0])


def seconds(operator: Operator, shape: Mapping[str, float], precision: str = "bf16") -> float:
    work = operator.work(columns(shape), precision, RATES, initial(operator))
    return float(roofline_time(work, CURVE, RATES)[0])


@st.composite
def shapes(draw: st.DrawFn, operator: Operator) -> dict[str, int]:
    """Any legal shape: groups divide heads, and ranks divide experts and widths."""
    shape = {name: draw(st.integers(1, 2**17)) for name in operator.fields}
    if "num_kv_heads" in shape:
        shape["num_kv_heads"] = draw(st.integers(1, 128))
        shape["num_heads"] = shape["num_kv_heads"] * draw(st.integers(1, 64))
        shape["head_dim"] = draw(st.sampled_from([1, 64, 80, 128, 256]))
    elif "num_heads" in shape:
        shape["num_heads"] = draw(st.integers(1, 128))
    if "num_experts" in shape:
        shape["ep"], shape["tp"] = (draw(st.sampled_from([1, 2, 8, 64])) for _ in range(2))
        shape["num_experts"] = shape["ep"] * draw(st.integers(1, 64))
        shape["top_k"] = draw(st.integers(1, min(16, shape["num_experts"])))
        shape["moe_ffn_hidden_size"] = shape["tp"] * draw(st.integers(1, 8192))
        shape["skew"] = draw(st.sampled_from([0, 1]))
    return shape


@pytest.mark.parametrize(
    ("precision", "num_bytes"),
    # (2, 4) @ (4, 3): 8 + 12 elements in, 6 out, never narrower than 16 bits.
    [("fp32", 104.0), ("bf16", 52.0), ("fp8", 32.0), ("nvfp4", 20 * 0.5625 + 12), ("unheard_of", 52.0)],
)
@pytest.mark.parametrize("name", ["gemm", "gemm_dgrad", "gemm_wgrad"])
def test_a_product_multiplies_and_adds_once_per_element_and_moves_each_matrix_once(
    name: str, precision: str, num_bytes: float
) -> None:
    assert work_of(name, {"m": 2, "n": 3, "k": 4}, precision) == (2 * 2 * 3 * 4, num_bytes, 0.0)


def test_block_formats_carry_their_scales() -> None:
    # One scale byte per 32 (mxfp8) or 16 (nvfp4) values.
    assert element_bytes("mxfp8") == 1.0 + 1 / 32
    assert element_bytes("nvfp4") == 0.5 + 1 / 16


def test_prefill_computes_half_the_scores_and_moves_queries_outputs_keys_and_values() -> None:
    # Two products of length x length x width per head, 2 FLOPs each, half of them behind the causal mask.
    flops = 0.5 * 2 * (2 * 8 * 8 * 16) * 2 * 4
    moved = 2.0 * (2 * 2 * 8 * 4 * 16) + 2.0 * (2 * 2 * 8 * 2 * 16)
    assert work_of("attention_prefill", PREFILL) == (flops, moved, 0.0)
    narrow = 2.0 * (2 * 2 * 8 * 4 * 16) + 1.0 * (2 * 2 * 8 * 2 * 16)
    assert work_of("attention_prefill", PREFILL, "fp8_kv") == (flops, narrow, 0.0)


def test_backward_attention_does_five_products_for_two_and_moves_twice_the_bytes() -> None:
    flops, moved, _ = work_of("attention_prefill", PREFILL)
    assert work_of("attention_backward", PREFILL) == (5 / 2 * flops, 2 * moved, 0.0)


def test_few_heads_and_short_sequences_make_flops_dearer() -> None:
    # 2 x 4 heads of 8 tokens hold the 64 that fill this device by half: each FLOP costs two.
    flops = work_of("attention_prefill", PREFILL)[0]
    assert work_of("attention_prefill", PREFILL, parallelism=64.0)[0] == 2 * flops


def test_a_longer_sequence_pays_its_serial_depth_by_the_octave() -> None:
    shape = {**PREFILL, "sequence_length": 32 * 7}
    assert work_of("attention_prefill", shape, octave_latency=1.0)[2] == pytest.approx(3.0)  # log2(1 + 7)


def test_decode_reads_its_cache_and_pads_a_group_to_sixteen_queries() -> None:
    cache = 2 * 2.0 * (2 * 128 * 2 * 128)
    queries_and_outputs = 2 * 2.0 * (2 * 64 * 128)
    work = work_of("attention_decode", DECODE, cached_cost=1.0)
    assert work == (4 * 2 * 64 * 128 * 128, cache + queries_and_outputs, 0.0)
    # Four heads per group fill a quarter of the tile: as many FLOPs as sixteen.
    few = {**DECODE, "num_heads": 8}
    assert work_of("attention_decode", few)[0] == 4 * 2 * (2 * 16) * 128 * 128


@pytest.mark.parametrize("name", ["attention_decode", "mla_decode"])
def test_a_cache_that_stays_in_l2_counts_for_fewer_bytes(name: str) -> None:
    decode = {field: size for field, size in DECODE.items() if field in OPERATORS[name].fields}

    def saved(context_length: float) -> float:
        """Share of the bytes of a cache that a free L2 would save."""
        shape = {**decode, "context_length": context_length}
        cold, cached = (work_of(name, shape, cached_cost=cost)[1] for cost in (1.0, 0.0))
        fixed = work_of(name, {**shape, "context_length": 1e-9}, cached_cost=1.0)[1]
        assert work_of(name, shape, cached_cost=0.5)[1] == pytest.approx((cold + cached) / 2)
        return (cold - cached) / (cold - fixed)

    per_token = work_of(name, {**decode, "context_length": 2e9}, cached_cost=1.0)[1] / 2e9
    as_large = RATES.l2_bytes / per_token
    assert saved(as_large) == pytest.approx(0.5, abs=0.01)
    assert saved(as_large / 8) > 0.999
    assert saved(as_large * 8) < 0.001


def test_decode_waits_for_depth_for_a_cold_cache_and_for_waves() -> None:
    assert work_of("attention_decode", DECODE, octave_latency=1.0)[2] == pytest.approx(1.0)  # log2(1 + 1)
    # A cache of exactly the L2 is read from memory by half: 50 MiB of 2 x 2 x 2 bytes x 128 a token.
    as_large = {**DECODE, "context_length": 50 * 2**20 / (2 * 2 * 2 * 2 * 128)}
    assert work_of("attention_decode", as_large, spill_latency=1.0)[2] == pytest.approx(0.5)
    one_wave = {**DECODE, "batch_size": 66}  # x 2 KV heads on 132 SMs
    assert work_of("attention_decode", one_wave, wave_latency=1.0)[2] == pytest.approx(np.sqrt(2) - 1)


def test_latent_attention_has_wide_keys_in_prefill_and_one_cache_in_decode() -> None:
    prefill = {"batch_size": 2, "sequence_length": 8, "num_heads": 4}
    # Keys of 128 + 64 and values of 128 (DeepSeek-AI 2024); half of each product behind the mask.
    flops = 2 * 4 * 8 * 8 * (192 + 128)
    assert work_of("mla_prefill", prefill) == (flops, 2 * 2.0 * (2 * 8 * 4) * (192 + 128), 0.0)
    decode = {"batch_size": 2, "context_length": 100, "num_heads": 32}
    # All heads share one latent of 512 with 64 rotary; scores over 576, values over 512.
    flops = 2 * 2 * 32 * 100 * (576 + 512)
    num_bytes = 2.0 * 2 * 100 * 576 + 2.0 * 2 * 32 * (576 + 512)
    assert work_of("mla_decode", decode, cached_cost=1.0) == (flops, num_bytes, 0.0)
    assert work_of("mla_decode", {**decode, "num_heads": 4})[0] == flops / 2  # padded from 4 to 16 of 32


def test_experts_multiply_every_routed_row_three_times() -> None:
    # Gate, up and down projections of 60 x 2 rows; so many rows reach all 8 experts (8 exp(-15) short of it).
    flops, moved, _ = work_of("moe", MOE, **PLAIN_MOE)
    assert flops == 2 * 120 * 16 * 32 * 3
    assert moved == pytest.approx(2.0 * 8 * 16 * 32 * 3, rel=1e-6)
    # A pass moves hidden twice and the width four times a row, in 16 bits.
    passes = work_of("moe", MOE, row_passes=1.0, **PLAIN_MOE)[1] - moved
    assert passes == pytest.approx(120 * 2.0 * (2 * 16 + 4 * 32))


def test_ranks_share_rows_experts_and_widths() -> None:
    shape = {**MOE, "ep": 4, "tp": 2}
    assert work_of("moe", shape, **PLAIN_MOE)[0] == 2 * 30 * 16 * 16 * 3
    foreign = (
        work_of("moe", shape, foreign_passes=1.0, **PLAIN_MOE)[1] - work_of("moe", shape, **PLAIN_MOE)[1]
    )
    assert foreign == pytest.approx(90 * 2.0 * (2 * 16 + 4 * 16))


def test_skewed_routing_loads_one_rank_up_to_all_rows() -> None:
    shape = {**MOE, "ep": 4, "skew": 1}
    half = {"skewed_spread": 1.0, "rank_heat": 0.5}
    assert work_of("moe", shape, **half)[0] == pytest.approx(2 * work_of("moe", shape, **PLAIN_MOE)[0])
    most = work_of("moe", shape, skewed_spread=1.0, rank_heat=2.0)[0]
    assert most == work_of("moe", {**MOE, "skew": 1}, **PLAIN_MOE)[0]


def test_padding_rows_of_a_tile_cost_their_share() -> None:
    # 120 rows on 8 experts make 15 each, in tiles of 16: 8 rows of padding in all.
    padded = work_of("moe", MOE, padding=1.0, **PLAIN_MOE)[0]
    assert padded == pytest.approx(128 / 120 * work_of("moe", MOE, **PLAIN_MOE)[0], rel=1e-6)


def test_a_width_off_the_vector_grid_slows_the_second_product() -> None:
    odd = {**MOE, "moe_ffn_hidden_size": 24}
    plain = work_of("moe", odd, **PLAIN_MOE)[0]
    assert work_of("moe", odd, unaligned_factor=3.0, **PLAIN_MOE)[0] == pytest.approx((2 + 4) / 3 * plain)
    assert work_of("moe", MOE, unaligned_factor=3.0, **PLAIN_MOE)[0] == work_of("moe", MOE, **PLAIN_MOE)[0]


@pytest.mark.parametrize("name", STREAMING)
def test_streaming_kernels_only_move_bytes(name: str) -> None:
    assert work_of(name, {"num_bytes": 4096}) == (0.0, 4096.0, 0.0)


@operators
def test_operators_are_named_as_they_are_listed_and_their_bounds_hold_their_start(operator: Operator) -> None:
    assert OPERATORS[operator.name] is operator
    assert len(set(operator.fields)) == len(operator.fields)
    for parameter in operator.parameters:
        assert parameter.low <= parameter.initial <= parameter.high
        assert parameter.low < parameter.high
    assert operator.is_bakeable == (operator.num_dims <= 3)


def check_consistent(operator: Operator, shape: Mapping[str, float], precision: str) -> None:
    columns_of = columns(shape)
    coordinates = operator.coordinates(columns_of, RATES)
    assert coordinates.shape == (1, operator.num_dims)
    assert np.isfinite(coordinates).all()
    if operator.steps is not None:
        steps = operator.steps(columns_of, RATES)
        assert len(steps) == 1
        assert np.isfinite(steps).all()
    work = operator.work(columns_of, precision, RATES, initial(operator))
    assert work.flops[0] >= 0.0
    assert work.num_bytes[0] > 0.0
    assert np.all(np.asarray(work.latency) >= 0.0)
    assert np.isfinite([work.flops[0], work.num_bytes[0], np.broadcast_to(work.latency, 1)[0]]).all()


@operators
@pytest.mark.parametrize("size", [1, 2, 2**20])
def test_every_coordinate_is_finite_at_extreme_sizes(operator: Operator, size: int) -> None:
    for precision in ("bf16", "fp8_kv", "nvfp4"):
        check_consistent(operator, dict.fromkeys(operator.fields, size), precision)
    if "skew" in operator.fields:
        check_consistent(operator, {**dict.fromkeys(operator.fields, size), "skew": 0}, "bf16")


@kinds
@settings(max_examples=30)
@given(data=st.data())
def test_every_legal_shape_has_work_and_coordinates(operator: Operator, data: st.DataObject) -> None:
    check_consistent(operator, data.draw(shapes(operator)), data.draw(st.sampled_from(["bf16", "fp8"])))


# Sizes whose growth can only add work; ranks share it, and an odd width of experts is slower than the next even one.
GROWING = {
    "m", "n", "k", "num_bytes", "batch_size", "sequence_length", "context_length", "num_heads", "head_dim",
    "num_tokens", "hidden_size",
}  # fmt: skip


@kinds
@settings(max_examples=30)
@given(data=st.data())
def test_a_larger_case_never_takes_less_time(operator: Operator, data: st.DataObject) -> None:
    shape = data.draw(shapes(operator))
    name = data.draw(st.sampled_from([field for field in operator.fields if field in GROWING]))
    grown = {**shape, name: shape[name] + data.draw(st.integers(1, 2**17))}
    assert seconds(operator, grown) >= seconds(operator, shape) * (1.0 - 1e-12)


@given(
    flops=st.floats(0.0, 1e18),
    num_bytes=st.floats(0.0, 1e13),
    more=st.floats(0.0, 1e13),
    exponent=st.floats(0.4, 12.0),
)
def test_a_roofline_lies_above_both_roofs_and_rises(
    flops: float, num_bytes: float, more: float, exponent: float
) -> None:
    curve = RooflineCurve(launch_time=1e-6, compute_efficiency=0.5, memory_efficiency=0.5, exponent=exponent)

    def time(flops: float, num_bytes: float) -> float:
        work = Work(flops=np.array([flops]), num_bytes=np.array([num_bytes]))
        return float(roofline_time(work, curve, RATES)[0])

    roofs = max(flops / 5e14, num_bytes / 1.5e12)
    assert time(flops, num_bytes) >= 1e-6 + roofs * (1.0 - 1e-12)
    # The p-norm of two terms exceeds the larger by at most 2 ** (1 / p).
    assert time(flops, num_bytes) <= (1e-6 + roofs * 2.0 ** (1.0 / exponent)) * (1.0 + 1e-12)
    assert time(flops, num_bytes + more) >= time(flops, num_bytes) * (1.0 - 1e-12)
    assert time(flops + more, num_bytes) >= time(flops, num_bytes) * (1.0 - 1e-12)
