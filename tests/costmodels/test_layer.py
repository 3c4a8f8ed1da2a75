from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.boundary import BoundaryTimes, boundary_times
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.layers.layer import LayerTimes, layer_times
from meshwright.costmodels.software import list_software

MakeContext = Callable[..., CostContext]


def case_columns(
    tp: NDArray[np.float64],
    cp: NDArray[np.float64],
    micro_batch_size: NDArray[np.float64],
    sequence_parallel: NDArray[np.bool_],
) -> LayerCases:
    """Cases without experts, context parallel by ring."""
    ones = np.ones_like(tp)
    return LayerCases(
        tp=tp,
        cp=cp,
        cp_method=np.zeros(len(tp), dtype=np.int64),
        ep=ones,
        etp=ones,
        expert_overlap=ones,
        micro_batch_size=micro_batch_size,
        sequence_parallel=sequence_parallel,
    )


def cases(tp: float = 1, cp: float = 1, micro_batch_size: float = 1, *, sp: bool = False) -> LayerCases:
    return case_columns(
        np.array([float(tp)]), np.array([float(cp)]), np.array([float(micro_batch_size)]), np.array([sp])
    )


def times(context: CostContext, **which: float) -> LayerTimes:
    return layer_times(context, cases(**which))  # type: ignore[arg-type]  # sp is a bool among numbers


def boundary(context: CostContext, **which: float) -> BoundaryTimes:
    return boundary_times(context, cases(**which))  # type: ignore[arg-type]  # as above


@settings(max_examples=30)
@given(
    software=st.sampled_from(list_software()),
    model=st.sampled_from(["llama-3-8b", "llama-3-70b", "gpt3-175b", "mistral-7b", "falcon-7b"]),
    length=st.sampled_from([128, 2048, 32_768]),
    kernel=st.sampled_from([None, "unfused"]),
    sp=st.booleans(),
)
def test_more_tensor_parallelism_never_makes_compute_slower(
    make_context: MakeContext, software: str, model: str, length: int, kernel: str | None, sp: bool
) -> None:
    context = make_context(model, length=length, software=software, kernel=kernel)
    all_cases = case_columns(
        np.array([1.0, 2.0, 4.0, 8.0]), np.ones(4), np.ones(4), np.array([False, sp, sp, sp])
    )
    result = layer_times(context, all_cases)
    for name in ("forward", "backward", "weight_gradient", "selective_recompute"):
        assert np.all(np.diff(getattr(result, name)) <= 1e-15), name


def test_a_wide_layer_runs_at_the_calibrated_share_of_the_peak(make_context: MakeContext) -> None:
    # 24 T h^2 FLOPs forward, twice that backward; at h = 65,536 all else (attention, norms, accumulating
    # gradients in fp32) adds a few percent.
    hidden, length = 65_536, 2048
    context = make_context(
        "gpt3-175b",
        length=length,
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=512,
        num_query_groups=512,
    )
    curve = context.calibration.gemm_curve("bf16")
    rate = context.gpu.peak("bf16") * context.calibration.clock("bf16") * curve.compute_efficiency
    ideal = 24.0 * length * hidden**2 / rate
    result = times(context)
    assert ideal < result.forward[0] < 1.03 * ideal
    assert 2 * ideal < result.backward[0] < 2 * 1.08 * ideal
    assert ideal < result.weight_gradient[0] < 1.08 * ideal


@pytest.mark.parametrize("model", ["llama-3-8b", "gpt3-175b"])
def test_attention_with_its_scores_in_memory_costs_more(make_context: MakeContext, model: str) -> None:
    fused = times(make_context(model, length=8192, kernel="flash_2"))
    unfused = times(make_context(model, length=8192, kernel="unfused"))
    assert unfused.forward[0] > fused.forward[0]
    assert unfused.backward[0] > fused.backward[0]
    assert unfused.selective_recompute[0] > fused.selective_recompute[0]


def test_unfused_attention_grows_with_the_square_of_the_sequence(make_context: MakeContext) -> None:
    short, long = (
        times(make_context(length=length, kernel="unfused")).selective_recompute[0]
        for length in (8192, 16_384)
    )
    assert long / short == pytest.approx(4.0, rel=0.02)


def test_sequence_parallelism_splits_element_wise_work(make_context: MakeContext) -> None:
    context = make_context("gpt3-175b")
    whole, split = times(context, tp=8), times(context, tp=8, sp=True)
    # The norms and residuals of 2 + 2 and 3.5 + 3.5 tensors forward are 7/8 shorter on 8 ranks.
    tensor = 2.0 * 2048 * context.model.hidden_size
    streamed = context.gpu.memory_bandwidth_bytes_per_second * context.calibration.memory_stream_efficiency
    saved = 7 / 8 * (2 * 2 + 2 * 3.5) * tensor / streamed
    assert whole.forward[0] - split.forward[0] == pytest.approx(saved)
    assert split.backward[0] < whole.backward[0]
    assert split.weight_gradient[0] == whole.weight_gradient[0]


def test_a_sliding_window_is_cheaper_and_some_full_layers_cost_part_of_it(make_context: MakeContext) -> None:
    length = 32_768
    full = times(make_context(length=length))
    windowed = times(make_context(length=length, sliding_window=4096))
    mixed = times(make_context(length=length, sliding_window=4096, full_attention_interval=2))
    assert windowed.forward[0] < mixed.forward[0] < full.forward[0]
    wide = times(make_context(length=length, sliding_window=length))
    assert wide.forward[0] == full.forward[0]


@pytest.mark.parametrize("software", ["torchtitan", "megatron-core", "llm-foundry-fsdp1"])
def test_eager_runs_slower_than_compiled(make_context: MakeContext, software: str) -> None:
    compiled = times(make_context(software=software, features=("compile",)))
    eager = times(make_context(software=software, features=("eager",)))
    assert eager.forward[0] > compiled.forward[0]
    assert eager.backward[0] > compiled.backward[0]


def test_a_tiny_layer_is_bound_by_the_launches_of_its_kernels(make_context: MakeContext) -> None:
    sizes = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 1, "num_query_groups": 1}
    context = make_context(length=16, head_dim=64, **sizes)
    slow_host = replace(context, software=replace(context.software, host_launch_latency=100e-6))
    result = times(slow_host)
    # Four products and nine other kernels forward, eight and fourteen backward.
    assert result.forward[0] == pytest.approx((4 + 9) * 100e-6)
    assert result.backward[0] == pytest.approx((8 + 14) * 100e-6)


def test_a_large_layer_does_not_wait_for_its_host(make_context: MakeContext) -> None:
    context = make_context("llama-3-70b", length=8192)
    no_host = replace(context, software=replace(context.software, host_launch_latency=0.0))
    assert times(context).forward[0] == times(no_host).forward[0]


def test_two_micro_batches_in_one_never_cost_more_than_two_apart(make_context: MakeContext) -> None:
    context = make_context()
    one, two = times(context, micro_batch_size=1), times(context, micro_batch_size=2)
    assert one.forward[0] < two.forward[0] <= 2 * one.forward[0]
    assert one.backward[0] < two.backward[0] <= 2 * one.backward[0]


def test_one_tensor_parallel_rank_does_not_communicate(make_context: MakeContext) -> None:
    context = make_context()
    assert times(context).forward_communication[0] == 0.0
    assert times(context, tp=2).forward_communication[0] > 0.0
    assert boundary(context).embedding_communication[0] == 0.0


def test_a_parallel_block_has_half_the_collectives(make_context: MakeContext) -> None:
    serial = times(make_context(), tp=4).forward_communication[0]
    parallel = times(make_context(has_parallel_block=True), tp=4).forward_communication[0]
    assert parallel == pytest.approx(serial / 2)


def test_context_parallelism_splits_products_and_attention(make_context: MakeContext) -> None:
    context = make_context(length=131_072)
    whole, split = times(context), times(context, cp=8)
    # Attention on a ring pays a quarter more for its unequal causal blocks.
    assert whole.forward[0] / 8 < split.forward[0] < 1.25 * whole.forward[0] / 8
    assert split.weight_gradient[0] < whole.weight_gradient[0] / 7


def test_fp8_halves_large_products_but_not_the_head(make_context: MakeContext) -> None:
    bf16, fp8 = (make_context("llama-3.1-405b", length=8192, precision=p) for p in ("bf16", "fp8"))
    assert 0.5 * times(bf16).forward[0] < times(fp8).forward[0] < 0.8 * times(bf16).forward[0]
    assert boundary(fp8).head_forward[0] == boundary(bf16).head_forward[0]


def test_the_head_grows_with_the_vocabulary_and_shrinks_with_tensor_parallelism(
    make_context: MakeContext,
) -> None:
    small, large = make_context(vocab_size=32_000), make_context(vocab_size=128_000)
    assert boundary(large).head_forward[0] == pytest.approx(4 * boundary(small).head_forward[0], rel=0.1)
    assert boundary(large, tp=8).head_backward[0] < boundary(large).head_backward[0] / 6
    assert boundary(large).embedding_forward[0] == boundary(small).embedding_forward[0]
