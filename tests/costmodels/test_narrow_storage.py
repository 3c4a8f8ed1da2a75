"""Moments in 16 bits and activations in 8: what they free, and the published plan that counts on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.activations import ActivationParts, activation_parts
from meshwright.costmodels.layers.cases import cases_of
from meshwright.costmodels.memory import plan_memory
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.simcore.domain.plan import ParallelPlan, partition_layers

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]
LENGTH = 4096
# Llama 3 8B and DeepSeek-V3, as published.
FFN, HIDDEN, HEADS, VALUE_DIM, EXPERT_FFN, TOP_K = 14_336, 4096, 128, 128, 2048, 8


def parts(context: CostContext, plan: ParallelPlan, *, is_moe: bool) -> ActivationParts:
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    return activation_parts(context, cases_of(columns), is_moe=is_moe)


@pytest.mark.parametrize(("sharding", "ranks"), [("none", 1), ("zero1", 8), ("zero3", 8)])
def test_moments_in_16_bits_free_four_bytes_per_parameter(
    make_context: MakeContext, make_plan: MakePlan, sharding: str, ranks: int
) -> None:
    plan = make_plan(dp=8, sharding=sharding)
    wide, narrow = (plan_memory(make_context(features=given), plan) for given in ((), ("bf16_moments",)))
    freed = 4.0 * make_context().model.num_parameters / ranks
    assert wide.optimizer_states[0] - narrow.optimizer_states[0] == pytest.approx(freed, rel=1e-5)
    assert wide.total[0] - narrow.total[0] == pytest.approx(freed, rel=1e-5)


def test_activations_in_8_bits_halve_pre_activations_and_narrow_the_output_of_attention(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    dense, mixture = make_plan(), make_plan(61, dp=64, ep=64)
    narrow = ("fp8_activations",)
    wide, small = (parts(make_context(length=LENGTH, features=f), dense, is_moe=False) for f in ((), narrow))
    # Two halves of a gated MLP lose a byte each; attention's output, as wide as the model, half a byte (E5M6).
    assert wide.mlp[0] - small.mlp[0] == 2 * FFN * LENGTH
    assert wide.kept[0] - small.kept[0] == 0.5 * HIDDEN * LENGTH
    contexts = [make_context("deepseek-v3", "hgx-h800:8", length=LENGTH, features=f) for f in ((), narrow)]
    wide, small = (parts(context, mixture, is_moe=True) for context in contexts)
    # The shared expert is as wide as one routed.
    assert wide.moe[0] - small.moe[0] == pytest.approx((TOP_K + 1) * 2 * EXPERT_FFN * LENGTH)
    assert wide.kept[0] - small.kept[0] == 0.5 * HEADS * VALUE_DIM * LENGTH


def test_deepseek_v3_fits_its_own_plan_only_with_the_storage_it_reports(make_context: MakeContext) -> None:
    # Report (arXiv 2412.19437): 2,048 H800, 16 stages of DualPipe, 64 expert parallel ranks on 8 nodes, ZeRO-1 (3.1);
    # norms, MLA's up-projections and SwiGLU recomputed (3.2.3); moments in BF16, inputs of SwiGLU in FP8 (3.3.3).
    plan = ParallelPlan(
        dp=128,
        pp=16,
        ep=64,
        sharding="zero1",
        schedule="dualpipe",
        micro_batch_size=1,
        recompute="selective",
        recompute_modules=("layernorm", "mla_up_proj", "moe_act"),
        layers_per_stage=partition_layers(61, 16),
    )
    fullest = [
        plan_memory(
            make_context(
                "deepseek-v3",
                "hgx-h800:256",
                batch=15_360,
                length=LENGTH,
                precision="fp8_block",
                features=features,
            ),
            plan,
        ).total.max()
        for features in ((), ("bf16_moments", "fp8_activations"))
    ]
    usable = make_context("deepseek-v3", "hgx-h800:256").gpu.memory_bytes
    assert fullest[1] < 0.9 * usable < usable < fullest[0]
