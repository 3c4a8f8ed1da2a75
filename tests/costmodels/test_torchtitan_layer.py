"""What torchtitan's layers cost besides Megatron's: products of their own, operator recompute, copies, narrow gathers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.flops import hardware_flops, model_flops
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.layers.elementwise import elementwise_times
from meshwright.costmodels.layers.layer import layer_times
from meshwright.costmodels.layers.projections import (
    linear_times,
    operator_recompute_time,
    product_times,
    projections,
)
from meshwright.costmodels.parallelism.tensor import ExchangeTimes, tensor_parallel_times
from meshwright.costmodels.roofline import stream_time
from meshwright.errors import SpecError

MakeContext = Callable[..., CostContext]

LENGTH, HIDDEN, FFN, KEYS = 8192, 4096, 14_336, 1024


def cases(tp: int = 1, *, sp: bool = False) -> LayerCases:
    one = np.ones(1)
    return LayerCases(
        tp=one * tp,
        cp=one,
        cp_method=np.zeros(1, dtype=np.int64),
        ep=one,
        etp=one,
        expert_overlap=one,
        micro_batch_size=one,
        sequence_parallel=np.array([sp]),
    )


@pytest.fixture
def context(make_context: MakeContext) -> CostContext:
    """Llama 3 8B: hidden 4096, 8 groups of 128, MLP 14336."""
    return make_context("llama-3-8b", software="torchtitan", length=LENGTH)


def with_flags(context: CostContext, **flags: bool) -> CostContext:
    return replace(context, software=replace(context.software, **flags))  # type: ignore[arg-type]  # flags only


def product_time(context: CostContext, out_width: float, in_width: float) -> float:
    rows, out, into = (np.array([float(each)]) for each in (LENGTH, out_width, in_width))
    return float(product_times(context, rows, out, into, out * into, is_trained=True).forward[0])


def test_every_second_product_is_repeated_but_the_last(context: CostContext) -> None:
    # In order: queries, KEYS, values, OUTPUT, gate, UP, down.
    parts = projections(context, cases(), is_moe=False)
    assert [float(part.out_width[0]) for part in parts] == [HIDDEN, KEYS, KEYS, HIDDEN, FFN, FFN, HIDDEN]
    expected = (
        product_time(context, KEYS, HIDDEN)
        + product_time(context, HIDDEN, HIDDEN)
        + product_time(context, FFN, HIDDEN)
    )
    assert operator_recompute_time(context, cases(), parts)[0] == pytest.approx(expected)
    times = layer_times(context, cases())
    elementwise = elementwise_times(context, cases(), float(FFN)).forward
    assert times.selective_recompute[0] == pytest.approx(expected + elementwise[0])


def test_scattered_sums_are_kept_and_inputs_gathered_again(context: CostContext) -> None:
    split = cases(8, sp=True)
    parts = projections(context, split, is_moe=False)
    expected = product_time(context, KEYS / 8, HIDDEN) + product_time(context, FFN / 8, HIDDEN)
    assert operator_recompute_time(context, split, parts)[0] == pytest.approx(expected)
    times = layer_times(context, split)
    assert 0.0 < times.selective_axes["tp"][0] < times.forward_axes["tp"][0]


def test_operator_recompute_quantises_everything_again(make_context: MakeContext) -> None:
    context = make_context("llama-3-8b", software="torchtitan", length=LENGTH, precision="fp8")
    free = replace(context, software=replace(context.software, fp8_cast_bytes=0.0))
    with_casts, without = (
        operator_recompute_time(each, cases(), projections(each, cases(), is_moe=False))[0]
        for each in (context, free)
    )
    # Inputs of attention, of its output, of the MLP and of its down product once each, and every weight.
    inputs = LENGTH * (3 * HIDDEN + FFN)
    weights = HIDDEN * (2 * HIDDEN + 2 * KEYS + 3 * FFN)
    casts = stream_time(
        np.array([context.software.fp8_cast_bytes * (inputs + weights)]),
        context.gpu.memory_bandwidth_bytes_per_second,
        context.calibration.memory_stream_efficiency,
    )
    assert with_casts - without == pytest.approx(casts[0])


def test_operator_recompute_counts_its_flops(context: CostContext) -> None:
    model = context.model
    again = hardware_flops(model, 1, LENGTH, "selective", recomputes_operators=True) - model_flops(
        model, 1, LENGTH
    )
    assert again == 2 * model.num_layers * HIDDEN * (KEYS + HIDDEN + FFN)
    share = (KEYS + HIDDEN + FFN) / (2 * HIDDEN + 2 * KEYS + 3 * FFN)
    assert share == pytest.approx(0.365, abs=1e-3)


def test_the_last_product_is_not_repeated_where_recompute_ends_early(context: CostContext) -> None:
    split = cases(8, sp=True)
    times = layer_times(context, split)
    down = product_time(context, HIDDEN, FFN / 8)
    assert times.forward[0] - times.full_recompute[0] == pytest.approx(down)
    assert times.full_axes["tp"][0] < times.forward_axes["tp"][0]
    megatron = layer_times(with_flags(context, recomputes_only_needed=False), split)
    assert megatron.full_recompute is megatron.forward
    assert megatron.full_axes is megatron.forward_axes


def test_input_gradients_of_products_of_the_same_input_are_summed(context: CostContext) -> None:
    parts = projections(context, cases(), is_moe=False)
    alone = sum(
        float(linear_times(context, cases(), [replace(part, num_before=0)]).input_gradient[0])
        for part in parts
    )
    together = float(linear_times(context, cases(), parts).input_gradient[0])
    # Three gradients read and one written before attention, two and one before the MLP.
    summed = stream_time(
        np.array([(4.0 + 3.0) * 2.0 * LENGTH * HIDDEN]),
        context.gpu.memory_bandwidth_bytes_per_second,
        context.calibration.memory_stream_efficiency,
    )
    assert together - alone == pytest.approx(float(summed[0]))
    fused = projections(with_flags(context, splits_projections=False), cases(), is_moe=False)
    assert len(fused) == 4
    weights = [sum(float((part.in_width * part.out_width)[0]) for part in each) for each in (parts, fused)]
    assert weights[0] == weights[1]


def exchange(context: CostContext, *, is_backward: bool = False) -> ExchangeTimes:
    return tensor_parallel_times(
        context,
        np.array([8.0]),
        np.array([float(LENGTH)]),
        np.array([True]),
        np.array([1.0]),
        gathered_width=context.gathered_bytes,
        is_backward=is_backward,
    )


def test_each_gather_and_scatter_copies_the_sequence_unless_pipelined(make_context: MakeContext) -> None:
    context = make_context("llama-3-8b", software="torchtitan", length=LENGTH)
    plain = exchange(with_flags(context, copies_gathered_sequence=False))
    copied, backward = exchange(context), exchange(context, is_backward=True)
    copy = stream_time(
        np.array([2.0 * 2.0 * LENGTH * HIDDEN]),
        context.gpu.memory_bandwidth_bytes_per_second,
        context.calibration.memory_stream_efficiency,
    )
    assert copied.gather[0] - plain.gather[0] == pytest.approx(copy[0])
    assert copied.reduce[0] - plain.reduce[0] == pytest.approx(copy[0])
    # The sum of the input gradients writes what is sent.
    assert backward.gather[0] == copied.gather[0]
    assert backward.reduce[0] == plain.reduce[0]
    pipelined = exchange(replace(context, features=frozenset({"async_tp"})))
    assert pipelined.both[0] == pytest.approx(0.75 * plain.both[0])


def test_fp8_inputs_are_gathered_in_fp8(make_context: MakeContext) -> None:
    wide, narrow = (
        exchange(make_context("llama-3-8b", software="torchtitan", length=LENGTH, precision=precision))
        for precision in ("bf16", "fp8")
    )
    # Half the bytes, the same latency.
    assert 0.5 * wide.gather[0] < narrow.gather[0] < 0.65 * wide.gather[0]
    assert narrow.reduce[0] == wide.reduce[0]
    megatron = make_context("llama-3-8b", software="megatron-core", precision="fp8")
    assert megatron.gathered_bytes == 2.0


@pytest.fixture
def by_tensor_and_row(make_context: MakeContext) -> tuple[CostContext, CostContext]:
    """Llama 3 8B in fp8, with one scale per tensor and one per row."""
    tensor = make_context("llama-3-8b", software="torchtitan", length=LENGTH, precision="fp8")
    return tensor, replace(tensor, features=frozenset({"float8_rowwise"}))


def test_scales_per_row_cost_casts_and_16_bit_gathers(
    context: CostContext, by_tensor_and_row: tuple[CostContext, CostContext]
) -> None:
    tensor, row = by_tensor_and_row
    rows, out, into = (np.array([float(each)]) for each in (LENGTH, FFN, HIDDEN))
    once, more = (product_times(each, rows, out, into, out * into, is_trained=True) for each in (tensor, row))
    casts = stream_time(
        np.array([(row.cast_bytes - tensor.cast_bytes) * (out * into + rows * into)[0]]),
        context.gpu.memory_bandwidth_bytes_per_second,
        context.calibration.memory_stream_efficiency,
    )
    assert row.cast_bytes == row.software.fp8_rowwise_cast_factor * tensor.cast_bytes
    assert more.forward[0] - once.forward[0] == pytest.approx(casts[0])
    assert more.input_gradient[0] > once.input_gradient[0]
    assert more.weight_gradient[0] == once.weight_gradient[0]
    assert exchange(row).gather[0] == exchange(context).gather[0] > exchange(tensor).gather[0]


def test_gathers_are_not_pipelined_with_products_of_scales_per_row(
    by_tensor_and_row: tuple[CostContext, CostContext],
) -> None:
    _, row = by_tensor_and_row
    apart, pipelined = (
        exchange(replace(row, features=row.features | more)) for more in (frozenset[str](), {"async_tp"})
    )
    assert pipelined.gather[0] == apart.gather[0]
    assert pipelined.reduce[0] < 0.75 * apart.reduce[0]


@pytest.mark.parametrize(
    ("software", "precision", "expected"),
    [("torchtitan", "bf16", "needs precision fp8"), ("megatron-core", "fp8", "software torchtitan")],
)
def test_scales_per_row_need_fp8_and_software_that_has_them(
    make_context: MakeContext, software: str, precision: str, expected: str
) -> None:
    with pytest.raises(SpecError, match=expected):
        make_context("llama-3-8b", software=software, precision=precision, features=("float8_rowwise",))


def test_repeated_heads_move_through_memory(context: CostContext) -> None:
    grouped = with_flags(context, repeats_key_value_heads=False)
    more = elementwise_times(context, cases(), 0.0).forward - elementwise_times(grouped, cases(), 0.0).forward
    factor = context.software.elementwise_factor
    expected = stream_time(
        np.array([factor * 2.0 * LENGTH * 2.0 * (HIDDEN - KEYS)]),
        context.gpu.memory_bandwidth_bytes_per_second,
        context.calibration.memory_stream_efficiency,
    )
    assert more[0] == pytest.approx(expected[0])
