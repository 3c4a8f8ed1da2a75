from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from meshwright.costmodels.serving.replica import engine_behaviour
from meshwright.costmodels.serving.step import TOKEN_COUNTS, ServedModel, step_breakdown, step_table
from meshwright.simcore.domain.serving import ServingPool

MakeServed = Callable[..., ServedModel]
POOLS = {
    "llama-3.1-8b": ServingPool(tp=1),
    "qwen3-32b": ServingPool(tp=2),
    "qwen3-235b-a22b": ServingPool(tp=4, ep=4),
    "gpt-oss-120b": ServingPool(tp=2, moe_tp=2),
    "minimax-m2.5": ServingPool(tp=4, moe_tp=4),
    "deepseek-v3": ServingPool(tp=8, moe_tp=8),
    "kimi-k2.5": ServingPool(tp=8, ep=8),
    "glm-5": ServingPool(tp=8, moe_tp=8),
    "qwen3.5-397b-a17b": ServingPool(tp=8, moe_tp=8),
}


@pytest.mark.parametrize("model", sorted(POOLS))
def test_every_family_has_growing_step_times(make_served: MakeServed, model: str) -> None:
    table = step_table(make_served(model, "fp8"), POOLS[model])
    for times in (table.graph_token_time, table.eager_token_time, table.prefill_attention_time):
        assert np.isfinite(times).all()
        assert times[-1] > times[0] >= 0.0
    assert (table.decode_attention_time > 0.0).all()
    assert table.prefill_attention_time[0] == 0.0
    assert (np.diff(table.prefill_attention_time) >= 0.0).all()


def test_a_decode_step_never_beats_reading_the_weights(make_served: MakeServed) -> None:
    served = make_served("llama-3.1-8b")
    parts = step_breakdown(served, ServingPool())
    table_bytes = 2.0 * (served.model.num_parameters - served.model.num_embedding_parameters)
    floor = table_bytes / served.cluster.gpu.memory_bandwidth_bytes_per_second
    assert floor < parts.products[0] + parts.head[0] < 2.0 * floor


def test_tensor_parallel_ranks_share_products_and_pay_all_reduces(make_served: MakeServed) -> None:
    served = make_served("qwen3-32b")
    one, eight = (step_breakdown(served, ServingPool(tp=tp)) for tp in (1, 8))
    at = int(np.searchsorted(TOKEN_COUNTS, 8192))
    assert one.products[at] / 9.0 < eight.products[at] < one.products[at] / 6.0
    assert not one.collectives.any()
    assert (eight.collectives > 0.0).all()


def test_prompts_sample_their_last_tokens_only(make_served: MakeServed) -> None:
    parts = step_breakdown(make_served("llama-3.1-8b"), ServingPool())
    small = TOKEN_COUNTS <= 256
    assert np.array_equal(parts.head[small], parts.prompt_head[small])
    assert parts.prompt_head[-1] < 0.1 * parts.head[-1]


def test_windowed_layers_stop_growing_at_their_window(make_served: MakeServed) -> None:
    windowed = step_table(make_served("gpt-oss-120b", "fp8"), POOLS["gpt-oss-120b"])
    full = step_table(make_served("qwen3-32b"), ServingPool(tp=2))

    def growth(table) -> float:
        at = [int(np.searchsorted(table.decode_contexts, length)) for length in (128, 32768)]
        row = int(np.searchsorted(table.decode_batch_sizes, 64))
        return float(table.decode_attention_time[row, at[1]] / table.decode_attention_time[row, at[0]])

    assert growth(windowed) < 0.75 * growth(full)


def test_eight_bit_caches_are_read_in_less_time(make_served: MakeServed) -> None:
    wide, narrow = (
        step_table(make_served("qwen3-32b", kv_precision=kv), ServingPool(tp=2)).decode_attention_time[-1, -1]
        for kv in ("bf16", "fp8")
    )
    assert 0.4 * wide < narrow < 0.75 * wide


def test_fused_norms_leave_fewer_kernels(make_served: MakeServed) -> None:
    plain, fused = (
        step_breakdown(
            make_served("qwen3-32b", fuses_all_reduce_norm=fuses, kernel_time=2e-6), ServingPool(tp=2)
        )
        for fuses in (False, True)
    )
    saved = plain.small_kernels - fused.small_kernels
    np.testing.assert_allclose(saved, 2 * 64 * 2e-6)


def test_fused_all_reduces_take_the_quicker_kernel_up_to_its_largest_buffer(make_served: MakeServed) -> None:
    plain, fused = (
        step_breakdown(
            make_served("llama-3.1-70b", gpu="b200", fuses_all_reduce_norm=fuses), ServingPool(tp=8)
        ).collectives
        for fuses in (False, True)
    )
    fits = TOKEN_COUNTS * 8192 * 2 <= 2**20
    assert (fused[fits] < plain[fits]).all()
    np.testing.assert_array_equal(fused[~fits], plain[~fits])


@pytest.mark.parametrize(
    ("model", "pool", "per_layer"),
    [
        ("llama-3.1-8b", ServingPool(), 5 + 4 + 2),  # small kernels, attention and its products, MLP
        ("llama-3.1-8b", ServingPool(tp=2), 5 + 4 + 2 + 2),  # two all-reduces
        ("qwen3-235b-a22b", ServingPool(tp=4, ep=4), 6 + 4 + 7 + 2),  # norms of queries and keys; experts
        ("minimax-m2.5", ServingPool(tp=4, ep=4), 5 + 4 + 4 + 7 + 2),  # norms over heads that are split
    ],
)
def test_an_eager_step_costs_the_host_each_kernel_it_starts(
    make_served: MakeServed, model: str, pool: ServingPool, per_layer: int
) -> None:
    served = make_served(model, eager_kernel_time=1e-5)
    table = step_table(served, pool)
    assert table.eager_host_time == pytest.approx(per_layer * served.model.num_layers * 1e-5)


def test_latent_attention_starts_more_kernels_for_prompts(make_served: MakeServed) -> None:
    latent, plain = (
        step_table(make_served(model, eager_kernel_time=1e-5), ServingPool(tp=8, moe_tp=8)).eager_host_time
        / make_served(model).model.num_layers
        for model in ("deepseek-v3", "qwen3-235b-a22b")
    )
    assert latent > 2.0 * plain


def test_absorbed_prompts_grow_with_the_square_of_their_length(make_served: MakeServed) -> None:
    pool = ServingPool(tp=8, moe_tp=8)
    usual, absorbed = (
        step_table(make_served("deepseek-v3", gpu="b200", engine="sglang", absorbs_prompts=absorbs), pool)
        for absorbs in (False, True)
    )
    at = [int(np.searchsorted(usual.prompt_lengths, length)) for length in (4096, 8192)]
    first, second = absorbed.prefill_attention_time[at]
    assert second == pytest.approx(4.0 * first)
    assert second > 5.0 * usual.prefill_attention_time[at[1]]


def test_norms_over_split_heads_cost_what_a_release_takes_for_them(make_served: MakeServed) -> None:
    pools = ServingPool(tp=4, ep=4), ServingPool()
    split, whole = (
        [
            step_breakdown(make_served("minimax-m2.5", kernel_time=1e-6, split_norm_kernels=count), pool)
            for count in (4.0, 44.0)
        ]
        for pool in pools
    )
    np.testing.assert_allclose(split[1].small_kernels - split[0].small_kernels, 40 * 62 * 1e-6)
    np.testing.assert_array_equal(whole[1].small_kernels, whole[0].small_kernels)


def test_pipeline_stages_share_a_step(make_served: MakeServed) -> None:
    served = make_served("qwen3-32b")
    one, two = (step_table(served, ServingPool(pp=pp)) for pp in (1, 2))
    assert two.stage_share == 0.5
    assert (two.graph_token_time > one.graph_token_time).all()


def test_attention_ranks_meet_at_the_experts(make_served: MakeServed) -> None:
    served = make_served("qwen3-235b-a22b", "fp8")
    split = step_breakdown(served, ServingPool(tp=8, ep=8))
    apart = step_breakdown(served, ServingPool(attention_dp=8, ep=8))
    at = int(np.searchsorted(TOKEN_COUNTS, 64))
    assert apart.experts[at] > split.experts[at]
    assert apart.products[at] > split.products[at]


def test_drafted_tokens_are_further_queries_of_one_cache(make_served: MakeServed) -> None:
    served = make_served("llama-3.1-8b")
    plain, drafting = (
        step_table(served, ServingPool(num_speculative_tokens=count)).decode_attention_time[-1, -1]
        for count in (0, 3)
    )
    assert plain <= drafting < 2.0 * plain


@pytest.mark.parametrize(("engine", "version", "tokens"), [("sglang", "0.5.9", 4), ("vllm", "0.18.0", 1)])
def test_captured_batches_count_sequences_or_tokens(
    make_served: MakeServed, engine: str, version: str, tokens: int
) -> None:
    served = make_served(engine=engine, version=version)
    plain, drafting = (
        step_table(served, ServingPool(num_speculative_tokens=count)).max_graph_tokens for count in (0, 3)
    )
    assert drafting == tokens * plain


def test_an_engine_may_overlap_nothing_while_it_drafts(make_served: MakeServed) -> None:
    served = make_served(
        engine="sglang",
        version="0.5.9",
        serial_draft_time=2e-4,
        host_time_per_sequence=1e-5,
        overlaps_steps=True,
    )
    for count, is_hidden, host in ((0, True, 1e-5), (3, False, 2.1e-4)):
        pool = ServingPool(num_speculative_tokens=count)
        table = step_table(served, pool)
        assert (table.is_host_hidden, table.host_time_per_sequence) == (is_hidden, pytest.approx(host))
        assert engine_behaviour(served.constants, pool, 1024).overlaps_steps is is_hidden


def test_tables_are_the_same_when_asked_again(make_served: MakeServed) -> None:
    served, pool = make_served("gpt-oss-120b", "fp8"), POOLS["gpt-oss-120b"]
    first, again = step_table(served, pool), step_table(served, pool)
    assert np.array_equal(first.graph_token_time, again.graph_token_time)
    assert np.array_equal(first.decode_attention_time, again.decode_attention_time)


def test_a_recorded_imbalance_takes_the_place_of_the_measured_skew(make_served: MakeServed) -> None:
    served = make_served("qwen3-235b-a22b", engine="sglang", version="")
    even, uneven, copies, unknown = (
        step_breakdown(served, ServingPool(attention_dp=8, ep=8, **fields))
        for fields in (
            {"expert_imbalance": 1.0},
            {"expert_imbalance": 1.6},
            {"expert_imbalance": 1.0, "redundant_experts": 32},
            {},
        )
    )
    large = TOKEN_COUNTS >= 4096
    assert uneven.experts[large] == pytest.approx(1.6 * even.experts[large], rel=0.15)
    assert (even.experts[large] <= unknown.experts[large]).all()
    # Copies are more weights to read, not more rows.
    assert (copies.experts >= even.experts).all()
    assert copies.experts[large] == pytest.approx(even.experts[large], rel=0.05)
    assert even.products == pytest.approx(unknown.products)


def test_shared_experts_beside_routed_ones_cost_a_captured_step_nothing(make_served: MakeServed) -> None:
    pool = POOLS["deepseek-v3"]
    one, two = (
        step_table(make_served("deepseek-v3", "fp8", overlaps_shared_experts=flag), pool)
        for flag in (False, True)
    )
    hidden = one.graph_token_time - two.graph_token_time
    assert (hidden > 2e-4).all()
    assert (hidden < 0.5 * one.graph_token_time).all()
    np.testing.assert_array_equal(one.eager_token_time, two.eager_token_time)


@pytest.mark.parametrize(
    ("model", "ep", "is_fused"), [("deepseek-v3", 1, True), ("deepseek-v3", 8, False), ("glm-5", 1, False)]
)
def test_only_the_shared_expert_of_deepseek_v3_is_fused(
    make_served: MakeServed, model: str, ep: int, is_fused: bool
) -> None:
    pool = ServingPool(tp=8, moe_tp=8 // ep, ep=ep)
    apart, fused = (
        step_breakdown(make_served(model, "fp8", expert_factor=1.0, fused_expert_factor=factor), pool)
        for factor in (0.0, 1.0)
    )
    assert (apart.products > fused.products).all() == is_fused
    assert (apart.small_kernels > fused.small_kernels).all() == is_fused
    np.testing.assert_array_equal(apart.experts, fused.experts)


def test_prompts_may_run_slower_experts_of_eight_bits(make_served: MakeServed) -> None:
    pool = POOLS["deepseek-v3"]
    for precision, is_slower in (("fp8", True), ("nvfp4", False)):
        plain, slow = (
            step_table(make_served("deepseek-v3", precision, gpu="b200", prompt_expert_factor=factor), pool)
            for factor in (1.0, 3.0)
        )
        np.testing.assert_array_equal(plain.graph_token_time, slow.graph_token_time)
        assert (slow.eager_token_time > plain.eager_token_time).all() == is_slower


def test_projections_of_linear_attention_cost_more_one_by_one(make_served: MakeServed) -> None:
    pool = POOLS["qwen3.5-397b-a17b"]
    merged, split = (
        step_breakdown(make_served("qwen3.5-397b-a17b", "fp8", splits_linear_projections=flag), pool)
        for flag in (False, True)
    )
    assert (split.products > merged.products)[TOKEN_COUNTS <= 64].all()
    assert (split.small_kernels > merged.small_kernels).all()
