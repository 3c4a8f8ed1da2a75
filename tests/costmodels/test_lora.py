"""Low-rank adapters beside frozen weights: what is left to train, to reduce and to compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.layers.activations import activation_parts
from meshwright.costmodels.layers.cases import cases_of
from meshwright.costmodels.layers.layer import layer_times
from meshwright.costmodels.memory import plan_memory
from meshwright.costmodels.micro_batch import micro_batch_times
from meshwright.costmodels.parameters import layer_parameters
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.costmodels.prediction import predict
from meshwright.simcore.domain.plan import ParallelPlan

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]


def with_adapters(context: CostContext, rank: int = 16) -> CostContext:
    return replace(context, workload=replace(context.workload, lora_rank=rank))


def columns_of(context: CostContext, plan: ParallelPlan) -> PlanColumns:
    return PlanColumns.from_plans([plan], context.workload.global_batch_size)


@pytest.mark.parametrize(
    ("name", "sides", "is_moe"),
    [
        # Query, key and value in one, output, gate and up in one, down: in + out of each (Hu et al. 2021, section 4.1).
        ("llama-3-8b", (4096 + 6144) + (4096 + 4096) + (4096 + 28_672) + (14_336 + 4096), False),
        # Only attention's of a mixture without shared experts: routed experts have no adapters.
        ("mixtral-8x7b", (4096 + 6144) + (4096 + 4096), True),
        # Two down and two up projections, output, shared expert.
        (
            "deepseek-v3",
            (7168 + 1536)
            + (1536 + 24_576)
            + (7168 + 576)
            + (512 + 32_768)
            + (16_384 + 7168)
            + (7168 + 4096)
            + (2048 + 7168),
            True,
        ),
    ],
)
def test_adapters_have_rank_times_both_sides_parameters(
    make_context: MakeContext, make_plan: MakePlan, name: str, sides: int, is_moe: bool
) -> None:
    context = make_context(name)
    columns = columns_of(context, make_plan(context.model.num_layers))
    frozen = layer_parameters(context, columns, is_moe=is_moe)
    for rank in (1, 16, 64):
        held = layer_parameters(with_adapters(context, rank), columns, is_moe=is_moe)
        assert held.dense_trained[0] == pytest.approx(rank * sides)
        assert held.expert_trained[0] == 0.0
        assert held.total[0] - frozen.total[0] == pytest.approx(rank * sides)
        assert frozen.dense_trained[0] == frozen.dense[0]


@pytest.mark.parametrize("sharding", ["none", "zero1", "zero3"])
@pytest.mark.parametrize("name", ["llama-3-8b", "mixtral-8x7b", "gemma-2-9b"])
def test_nothing_but_adapters_has_gradients_and_states(
    make_context: MakeContext, make_plan: MakePlan, name: str, sharding: str
) -> None:
    context = make_context(name, "dgx-h100:1")
    plan = make_plan(context.model.num_layers, dp=8, sharding=sharding)
    full, adapted = (plan_memory(each, plan) for each in (context, with_adapters(context)))
    # Rank 16 of matrices thousands wide: below 1 % of the parameters.
    assert adapted.gradients[0] < 0.01 * full.gradients[0]
    assert adapted.optimizer_states[0] < 0.01 * full.optimizer_states[0]
    assert adapted.total[0] < full.total[0]
    # Two bytes a weight wherever it is held; ZeRO-3 keeps fp32 masters of trained weights only.
    frozen = 2.0 * context.model.num_parameters / (8 if sharding == "zero3" else 1)
    assert adapted.weights[0] == pytest.approx(frozen, rel=0.02)


def test_gpt3_takes_its_weights_and_little_more(make_context: MakeContext, make_plan: MakePlan) -> None:
    # Hu et al. 2021 (arXiv 2106.09685, section 4.2): 350 GB of 16-bit weights; 1.2 TB to train all of them.
    context = with_adapters(make_context("gpt3-175b", "dgx-1v:12", precision="fp16"), 4)
    plan = make_plan(96, tp=8, pp=12)
    memory = plan_memory(context, plan)
    states = 8 * (memory.weights + memory.gradients + memory.optimizer_states).sum()
    assert states == pytest.approx(350e9, rel=0.01)


def test_gpt3_trains_faster_by_the_published_factor(make_context: MakeContext, make_plan: MakePlan) -> None:
    # Same section: 43.1 against 32.5 tokens/s per V100, the same shards of the model.
    context = make_context("gpt3-175b", "dgx-1v:12", precision="fp16", software="megatron-2021")
    plan = make_plan(96, tp=8, pp=12)
    full, adapted = (predict(each, plan).iteration_time for each in (context, with_adapters(context, 4)))
    assert full / adapted == pytest.approx(43.1 / 32.5, rel=0.05)


@pytest.mark.parametrize("name", ["llama-3-8b", "mixtral-8x7b", "deepseek-v3"])
def test_frozen_weights_have_no_gradient_of_their_own(
    make_context: MakeContext, make_plan: MakePlan, name: str
) -> None:
    context = make_context(name, length=8192)
    is_moe = context.model.moe is not None
    plan = make_plan(context.model.num_layers)
    case = cases_of(columns_of(context, plan))
    full, adapted = (layer_times(each, case, is_moe=is_moe) for each in (context, with_adapters(context)))
    # What is left makes the gradients of skinny matrices.
    assert adapted.weight_gradient[0] < 0.15 * full.weight_gradient[0]
    # Forward runs two skinny products more beside each matrix; backward misses one of two thick ones.
    assert full.forward[0] < adapted.forward[0] < 1.15 * full.forward[0]
    missing = full.weight_gradient[0]
    assert adapted.backward[0] == pytest.approx(full.backward[0] - missing, rel=0.15)


def test_backward_takes_about_as_long_as_forward(make_context: MakeContext, make_plan: MakePlan) -> None:
    # Attention's core alone takes longer, and the adapters' own gradients.
    context = with_adapters(make_context("llama-3-70b", length=4096))
    times = layer_times(context, cases_of(columns_of(context, make_plan(80))))
    assert 1.0 < times.backward[0] / times.forward[0] < 1.3


def test_adapters_cost_little_whatever_their_rank(make_context: MakeContext, make_plan: MakePlan) -> None:
    context = make_context("llama-3-70b", "dgx-h100:1")
    plan = make_plan(80, tp=8, sequence_parallel=True)
    times = [predict(with_adapters(context, rank), plan).iteration_time for rank in (4, 16, 64)]
    assert times == sorted(times)
    assert times[-1] < 1.05 * times[0]


def test_only_adapters_are_reduced_and_stepped(make_context: MakeContext, make_plan: MakePlan) -> None:
    context = make_context("llama-3-8b", "dgx-h100:4")
    plan = make_plan(dp=16, tp=2, sharding="zero1")
    full, adapted = (iteration_costs(each, plan) for each in (context, with_adapters(context)))
    for name in ("gradient_reduce_time", "parameter_gather_time", "optimizer_time"):
        assert np.all(getattr(adapted, name) < 0.1 * getattr(full, name)), name
    # ZeRO-3 gathers frozen weights all the same.
    sharded = make_plan(dp=16, tp=2, sharding="zero3")
    gathers = [
        float(micro_batch_times(each, columns_of(each, sharded)).layer.forward_axes["dp"][0])
        for each in (context, with_adapters(context))
    ]
    assert gathers[1] == pytest.approx(gathers[0], rel=0.1)


def test_a_tied_table_that_is_frozen_is_not_summed(make_context: MakeContext, make_plan: MakePlan) -> None:
    context = make_context("gemma-2-9b", "dgx-h100:1")
    plan = make_plan(42, pp=2)
    full, adapted = (iteration_costs(each, plan).fixed_time for each in (context, with_adapters(context)))
    assert full > adapted == context.software.fixed_time


def test_frozen_experts_keep_their_pre_activations_alone(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    context = make_context("mixtral-8x7b", length=4096)
    case = cases_of(columns_of(context, make_plan()))
    full, adapted = (activation_parts(each, case, is_moe=True) for each in (context, with_adapters(context)))
    # Without weight gradients neither the experts' input nor their activation is needed again.
    width = context.model.moe.moe_ffn_hidden_size if context.model.moe else 0
    scores = 4.0 * 4096 * 8
    assert adapted.moe[0] - scores == pytest.approx(8192 * 2.0 * 2 * width)
    assert adapted.moe_act[0] == 0.0
    # Adapters need the inputs of their matrices.
    assert adapted.layernorm[0] == full.layernorm[0]
    dense = activation_parts(with_adapters(make_context("llama-3-8b", length=4096)), case, is_moe=False)
    assert dense.mlp[0] == pytest.approx(2.0 * 4096 * 3 * 14_336)
