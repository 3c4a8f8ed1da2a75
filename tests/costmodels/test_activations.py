"""What layers store for their backward, and what recomputing parts of them frees and costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.layers.activations import ActivationParts, activation_parts
from meshwright.costmodels.layers.cases import cases_of
from meshwright.costmodels.layers.layer import layer_times
from meshwright.costmodels.memory import layer_activation_bytes, plan_memory
from meshwright.costmodels.micro_batch import micro_batch_times
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import RECOMPUTE_MODULES, ParallelPlan

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]
GIB = 2.0**30
MIXTURES = ["mixtral-8x7b", "deepseek-v3", "qwen2-57b-a14b"]
# Modules that a layer of each kind has.
OF_MIXTURE = tuple(module for module in RECOMPUTE_MODULES if module != "mlp")


def columns_of(context: CostContext, plan: ParallelPlan) -> PlanColumns:
    return PlanColumns.from_plans([plan], context.workload.global_batch_size)


def parts_of(context: CostContext, plan: ParallelPlan, *, is_moe: bool) -> ActivationParts:
    return activation_parts(context, cases_of(columns_of(context, plan)), is_moe=is_moe)


def stored(context: CostContext, plan: ParallelPlan) -> float:
    return float(layer_activation_bytes(context, columns_of(context, plan))[0])


@dataclass(frozen=True)
class Measured:
    """GiB that torch allocated at most, by stage: SimuMax v1.2 (docs/b200/b200_release_v1.2_summary.json).

    Megatron-LM of April 2026 on 8 B200, sequences of 4,096, micro-batches of one, distributed optimizer, fp32
    gradients; the first layer is dense, buffers of experts are padded to a capacity of 1.
    """

    model: str
    num_layers: int
    degrees: dict[str, int]
    gib: tuple[float, ...]


MEASURED = [
    Measured("deepseek-v2", 4, {"ep": 8}, (45.63,)),
    Measured("deepseek-v2", 4, {"pp": 2, "ep": 4}, (31.58, 44.70)),
    Measured("deepseek-v3", 4, {"ep": 8}, (104.30,)),
    Measured("deepseek-v3", 4, {"pp": 2, "ep": 4}, (71.24, 114.00)),
    Measured("llama-3-70b", 12, {"pp": 2}, (66.55, 62.97)),
    Measured("llama-3-70b", 12, {"tp": 2}, (60.68,)),
    Measured("llama-3-70b", 12, {"tp": 8}, (28.29,)),
]


@pytest.mark.parametrize("run", MEASURED, ids=lambda run: f"{run.model}-{run.degrees}")
def test_stages_hold_what_was_measured(make_context: MakeContext, make_plan: MakePlan, run: Measured) -> None:
    moe = load_model(run.model).moe
    cut = None if moe is None else replace(moe, num_dense_layers=1)
    dp = 8 // (run.degrees.get("tp", 1) * run.degrees.get("pp", 1))
    context = make_context(
        run.model,
        "dgx-b200:1",
        batch=4 * dp,
        length=4096,
        num_layers=run.num_layers,
        num_mtp_layers=0,
        moe=cut,
    )
    if moe is not None:
        context = replace(context, workload=replace(context.workload, expert_capacity_factor=1.0))
    plan = make_plan(
        run.num_layers, dp=dp, sharding="zero1", sequence_parallel="tp" in run.degrees, **run.degrees
    )
    # Two errors of about 1 GiB nearly cancel: the measured loss was fused, with a third of the modelled logits, and
    # Transformer Engine kept a gradient of the largest matrix for itself.
    assert plan_memory(context, plan).total / GIB == pytest.approx(np.array(run.gib), rel=0.035)


@pytest.mark.parametrize("software", ["megatron-core", "megatron-2024", "torchtitan"])
def test_a_routed_row_stores_its_input_pre_activations_and_activation(
    make_context: MakeContext, make_plan: MakePlan, software: str
) -> None:
    context = make_context("mixtral-8x7b", length=4096, software=software)
    model, moe = context.model, context.model.moe
    assert moe is not None
    parts = parts_of(context, make_plan(), is_moe=True)
    # Two of eight experts: 8,192 rows of input, two pre-activations and their product. Megatron-Core applies the
    # router's weights within the activation since 0.12 (MoE README, "Memory Efficient token permutation"), so that the
    # experts' output is not kept; elsewhere it is.
    output = 0 if software == "megatron-core" else model.hidden_size
    row = 2.0 * (model.hidden_size + output + 3 * moe.moe_ffn_hidden_size)
    scores = 4.0 * 4096 * moe.num_experts
    assert parts.moe[0] == pytest.approx(8192 * row + scores)
    assert parts.moe_act[0] == pytest.approx(8192 * 2.0 * moe.moe_ffn_hidden_size)


@pytest.mark.parametrize("grid", [(1, 1, 1), (4, 4, 1), (8, 8, 8), (4, 2, 2)], ids=str)
def test_routed_rows_are_stored_once_over_all_ranks(
    make_context: MakeContext, make_plan: MakePlan, grid: tuple[int, int, int]
) -> None:
    tp, ep, etp = grid
    context = make_context("deepseek-v3", length=4096)
    moe = context.model.moe
    assert moe is not None
    plan = make_plan(61, dp=8, tp=tp, sequence_parallel=tp > 1, ep=ep, etp=etp)
    parts = parts_of(context, plan, is_moe=True)
    # Activations are split with the experts' width; the gathered inputs are on each of etp ranks.
    activations = tp * float(parts.moe_act[0])
    assert activations == pytest.approx(4096 * moe.top_k * 2.0 * moe.moe_ffn_hidden_size)
    routed = tp * float(parts.moe[0] - parts.shared_experts[0]) - 4.0 * 4096 * moe.num_experts
    inputs = routed - 3.0 * activations
    assert inputs == pytest.approx(etp * 4096 * moe.top_k * 2.0 * context.model.hidden_size)


def test_a_latent_attention_layer_stores_its_latents_and_heads(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    # DeepSeek-V3, widths per token in 16 bits: layer input, residual, outputs of two norms (4 x 7,168); both latents
    # before and after their norms and a rotary key; queries and keys of 128 heads x 192, values and output of 128 x 128.
    context = make_context("deepseek-v3", length=4096)
    parts = parts_of(context, make_plan(61), is_moe=False)
    width = 4 * 7168 + 2 * (1536 + 512) + 64 + 2 * 128 * 192 + 2 * 128 * 128 + 3 * 18_432
    assert parts.whole[0] == pytest.approx(2.0 * 4096 * width)
    assert parts.mla_up_proj[0] == pytest.approx(2.0 * 4096 * 128 * (192 + 192 + 128))
    # Over 8 ranks with sequence parallelism all of it is split.
    split = parts_of(context, make_plan(61, tp=8, sequence_parallel=True), is_moe=False)
    assert split.whole[0] == pytest.approx(parts.whole[0] / 8)


def test_imbalance_and_capacity_stretch_what_experts_store(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    context = make_context("mixtral-8x7b", length=4096)
    plan = make_plan(dp=8, ep=8)
    even = parts_of(context, plan, is_moe=True)
    for changes in ({"routing_imbalance": 1.5}, {"expert_capacity_factor": 1.5}):
        uneven = replace(context, workload=replace(context.workload, **changes))
        stretched = parts_of(uneven, plan, is_moe=True)
        assert stretched.moe_act[0] == pytest.approx(1.5 * even.moe_act[0])
        assert stretched.layernorm[0] == even.layernorm[0]


@settings(max_examples=60)
@given(
    name=st.sampled_from([*MIXTURES, "llama-3-8b", "gpt3-175b"]),
    modules=st.sets(st.sampled_from(RECOMPUTE_MODULES)),
    more=st.sets(st.sampled_from(RECOMPUTE_MODULES)),
    tp=st.sampled_from([1, 4]),
    kernel=st.sampled_from([None, "unfused"]),
    software=st.sampled_from(["megatron-core", "megatron-2021", "torchtitan"]),
)
def test_recomputing_more_never_stores_more_nor_takes_less_time(
    make_context: MakeContext,
    make_plan: MakePlan,
    name: str,
    modules: set[str],
    more: set[str],
    tp: int,
    kernel: str | None,
    software: str,
) -> None:
    context = make_context(name, "dgx-h100:8", kernel=kernel, software=software)
    is_moe = context.model.moe is not None
    base = {"dp": 8, "tp": tp, "sequence_parallel": tp > 1, "ep": 8 if is_moe else 1}

    def plan(recompute: str, chosen: set[str] = frozenset()) -> ParallelPlan:  # type: ignore[assignment]
        named = tuple(module for module in RECOMPUTE_MODULES if module in chosen)
        return make_plan(context.model.num_layers, recompute=recompute, recompute_modules=named, **base)

    few = plan("selective", modules or {"core_attn"})
    many = plan("selective", (modules or {"core_attn"}) | more)
    plans = [plan("none"), few, many, plan("full")]
    bytes_stored = [stored(context, each) for each in plans]
    assert bytes_stored == sorted(bytes_stored, reverse=True)
    seconds = [
        float(micro_batch_times(context, columns_of(context, each)).layer.recompute[0]) for each in plans
    ]
    assert seconds[0] == 0.0
    assert seconds[1] <= seconds[2] * (1 + 1e-12)
    assert seconds[2] <= seconds[3] * (1 + 1e-12)


@pytest.mark.parametrize("name", MIXTURES)
def test_naming_a_part_of_the_experts_block_beside_it_changes_nothing(
    make_context: MakeContext, make_plan: MakePlan, name: str
) -> None:
    context = make_context(name, "dgx-h100:8")
    base = {"dp": 8, "ep": 8, "recompute": "selective"}
    whole, both = (
        make_plan(context.model.num_layers, recompute_modules=modules, **base)
        for modules in (("moe",), ("moe", "moe_act", "shared_experts"))
    )
    assert stored(context, whole) == stored(context, both)
    times = [micro_batch_times(context, columns_of(context, plan)).layer for plan in (whole, both)]
    assert times[0].recompute[0] == times[1].recompute[0] > 0.0
    assert times[0].recompute_communication[0] == times[1].recompute_communication[0] > 0.0


def test_the_parts_of_a_layer_add_up(make_context: MakeContext, make_plan: MakePlan) -> None:
    context = make_context("deepseek-v3", kernel="unfused")
    parts = parts_of(context, make_plan(61), is_moe=True)
    assert parts.moe[0] > parts.moe_act[0] + parts.shared_experts[0]
    plans = [
        make_plan(61, recompute="selective", recompute_modules=modules)
        for size in (1, 2, 3)
        for modules in combinations(OF_MIXTURE, size)
    ]
    for plan in plans:
        named = set(plan.recompute_modules)
        if "moe" in named:
            named -= {"moe_act", "shared_experts"}
        freed = sum(float(getattr(parts, module)[0]) for module in named)
        assert stored(context, plan) == pytest.approx(float(parts.whole[0]) - freed)
        times = layer_times(context, cases_of(columns_of(context, plan)), is_moe=True)
        repeated = sum(float(times.module_forward[module][0]) for module in named)
        recompute = micro_batch_times(context, columns_of(context, plan)).layer
        exchanged = float(recompute.recompute_communication[0])
        assert float(recompute.recompute[0]) - exchanged == pytest.approx(repeated)


def test_modules_that_communicate_communicate_again(make_context: MakeContext, make_plan: MakePlan) -> None:
    context = make_context("deepseek-v3", "dgx-h100:8", length=8192)
    base = {"dp": 2, "tp": 4, "cp": 2, "cp_method": "ulysses", "sequence_parallel": True, "ep": 8}

    def repeated(*modules: str) -> dict[str, float]:
        plan = make_plan(61, recompute="selective", recompute_modules=modules, **base)
        axes = micro_batch_times(context, columns_of(context, plan)).layer.recompute_axes
        return {axis: float(seconds[0]) for axis, seconds in axes.items() if seconds[0] > 0.0}

    assert repeated("layernorm") == repeated("moe_act") == {}
    assert set(repeated("core_attn")) == {"cp"}
    assert set(repeated("mla_up_proj")) == set(repeated("shared_experts")) == {"tp"}
    assert set(repeated("moe")) == {"tp", "ep"}
    # The latents are narrower than the hidden state that the shared experts gather and scatter.
    assert repeated("mla_up_proj")["tp"] < repeated("shared_experts")["tp"] / 2
    full = micro_batch_times(context, columns_of(context, make_plan(61, recompute="full", **base))).layer
    for axis in ("tp", "cp", "ep"):
        assert full.recompute_axes[axis][0] == full.forward_axes[axis][0] > 0.0


@pytest.mark.parametrize("name", ["llama-3-8b", "mixtral-8x7b"])
@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (4, 1), (4, 2)])
def test_recomputing_some_layers_lies_on_the_line_between_none_and_all(
    make_context: MakeContext, make_plan: MakePlan, name: str, pp: int, vpp: int
) -> None:
    context = make_context(name, batch=64)
    per_stage = 32 // (pp * vpp)
    plans = [
        make_plan(pp=pp, vpp=vpp, recompute="full", recompute_layers=count)
        for count in range(1, per_stage + 1)
    ]
    plans = [make_plan(pp=pp, vpp=vpp), *plans]
    backward = np.array([iteration_costs(context, plan).backward_time for plan in plans])
    held = np.array([plan_memory(context, plan).activations for plan in plans])
    steps = np.arange(len(plans))[:, np.newaxis] / per_stage
    assert backward == pytest.approx(backward[0] + steps * (backward[-1] - backward[0]))
    assert held == pytest.approx(held[0] + steps * (held[-1] - held[0]))
    assert np.all(np.diff(backward, axis=0) > 0.0)
    assert np.all(np.diff(held, axis=0) < 0.0)
    everything = make_plan(pp=pp, vpp=vpp, recompute="full")
    assert iteration_costs(context, everything).backward_time == pytest.approx(backward[-1])
    assert plan_memory(context, everything).activations == pytest.approx(held[-1])
