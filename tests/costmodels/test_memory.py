from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.memory import layer_activation_bytes, peak_memory, plan_memory
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.costmodels.software import list_software
from meshwright.simcore.domain.plan import RECOMPUTES, ParallelPlan, partition_layers

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]
GIB = 2.0**30


@dataclass(frozen=True)
class Published:
    """A row of Korthikanti et al. 2022 (arXiv 2205.05198), tp 8, 2048 tokens: memory by its formulas.

    GiB of parameters and optimizer, of activations without recompute and with sequence parallelism and
    selective recompute; percent of the former with SP, selective, both, and full recompute.
    """

    model: str
    pp: int
    vpp: int
    micro_batch_size: int
    states: float
    none: float
    both: float
    percents: tuple[float, float, float, float]


PUBLISHED = [
    Published("gpt-22b", 1, 1, 4, 45.56, 59.25, 9.56, (66.84, 49.42, 16.18, 7.64)),
    Published("gpt3-175b", 8, 3, 1, 45.56, 66.84, 12.35, (62.04, 56.53, 18.49, 8.71)),
    Published("mt-nlg-530b", 35, 3, 1, 31.64, 114.02, 23.08, (58.31, 62.04, 20.27, 9.42)),
    Published("gpt-1t", 64, 1, 1, 32.96, 131.25, 26.56, (58.31, 62.04, 20.27, 9.42)),
]


@pytest.fixture(params=PUBLISHED, ids=lambda row: row.model)
def published(request: pytest.FixtureRequest) -> Published:
    row = request.param
    assert isinstance(row, Published)
    return row


def first_stage_activations(context: CostContext, row: Published, recompute: str, *, sp: bool) -> float:
    """Return the GiB a rank of the first stage stores."""
    num_layers = context.model.num_layers
    plan = ParallelPlan(
        dp=1,
        tp=8,
        pp=row.pp,
        vpp=row.vpp,
        sequence_parallel=sp,
        micro_batch_size=row.micro_batch_size,
        schedule="none" if row.pp == 1 else "interleaved_1f1b" if row.vpp > 1 else "1f1b",
        recompute=recompute,  # type: ignore[arg-type]  # a word of the tests below
        layers_per_stage=partition_layers(num_layers, row.pp * row.vpp),
    )
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    # All layers' activations are in flight on the first stage, 1 + (p - 1) / (p v) of them when interleaved.
    factor = 1 + (row.pp - 1) / (row.pp * row.vpp) if row.vpp > 1 else 1.0
    expected = float(layer_activation_bytes(context, columns)[0]) * num_layers * factor
    stored = float(plan_memory(context, plan).activations[0])
    assert stored == pytest.approx(expected)
    return stored / GIB


@pytest.fixture
def published_context(make_context: MakeContext, published: Published) -> CostContext:
    batch = 4 * published.pp * published.micro_batch_size
    return make_context(published.model, "dgx-a100:1", batch=batch, kernel="unfused", precision="fp16")


def test_transformer_layers_hold_18_bytes_per_parameter(
    published_context: CostContext, published: Published
) -> None:
    # Weights 2, gradients 4, Adam 12 bytes of 12 L h^2 parameters over t p; layers alone, no embeddings.
    model = published_context.model
    layers = model.num_layers * model.num_layer_parameters / (8 * published.pp)
    assert 18 * layers / GIB == pytest.approx(published.states, rel=0.005)
    plan = ParallelPlan(dp=1, tp=8, micro_batch_size=1, schedule="none", layers_per_stage=(model.num_layers,))
    memory = plan_memory(published_context, plan)
    states = memory.weights + memory.gradients + memory.optimizer_states
    boundary = model.num_embedding_parameters + model.num_head_parameters
    expected = 18 * (layers * published.pp + boundary / 8)
    assert states[0] == pytest.approx(expected)


def test_stored_activations_equal_the_published_ones(
    published_context: CostContext, published: Published
) -> None:
    none = first_stage_activations(published_context, published, "none", sp=False)
    both = first_stage_activations(published_context, published, "selective", sp=True)
    assert none == pytest.approx(published.none, rel=0.005)
    assert both == pytest.approx(published.both, rel=0.005)


def test_every_saving_equals_the_published_share(
    published_context: CostContext, published: Published
) -> None:
    none = first_stage_activations(published_context, published, "none", sp=False)
    modes = (("none", True), ("selective", False), ("selective", True), ("full", False))
    for (recompute, sp), percent in zip(modes, published.percents, strict=True):
        stored = first_stage_activations(published_context, published, recompute, sp=sp)
        # The published shares are read from a figure: within a seventh of a point.
        assert 100 * stored / none == pytest.approx(percent, abs=0.15), recompute


def test_a_gpt_layer_stores_the_bytes_of_the_papers_formulas(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    # Korthikanti et al. 2022, table 2: s b h (10 + 24/t + 5 a s / (h t)), 34/t + 5as/(ht), 34/t, 2.
    context = make_context("gpt3-175b", kernel="unfused")
    s, h, a, t = 2048, 12_288, 96, 8
    scores = 5 * a * s / h
    for recompute, sp, factor in (
        ("none", False, 10 + 24 / t + scores / t),
        ("none", True, (34 + scores) / t),
        ("selective", True, 34 / t),
        ("full", False, 2.0),
    ):
        plan = make_plan(96, tp=t, sequence_parallel=sp, recompute=recompute)
        columns = PlanColumns.from_plans([plan], 64)
        assert layer_activation_bytes(context, columns)[0] == pytest.approx(s * h * factor)


def test_fused_attention_stores_no_scores(make_context: MakeContext, make_plan: MakePlan) -> None:
    columns = PlanColumns.from_plans([make_plan(96)], 64)
    fused = layer_activation_bytes(make_context("gpt3-175b", kernel="flash_2"), columns)
    unfused = layer_activation_bytes(make_context("gpt3-175b", kernel="unfused"), columns)
    assert unfused[0] - fused[0] == 5 * 96 * 2048 * 2048


@pytest.mark.parametrize("software", ["megatron-core", "megatron-2021", "torchtitan"])
@pytest.mark.parametrize("sharding", ["none", "zero1", "zero2", "zero3", "hsdp"])
def test_shards_of_all_ranks_add_up_to_the_model(
    make_context: MakeContext, make_plan: MakePlan, software: str, sharding: str
) -> None:
    context = make_context("llama-3-8b", "dgx-h100:4", software=software)
    group = 4 if sharding == "hsdp" else 16
    plan = make_plan(dp=16, tp=2, sharding=sharding, sharding_group=group)
    memory = plan_memory(context, plan)
    # Ranks that together hold one copy: all for what is sharded, one for what is not.
    copies = {
        "weights": group if sharding in ("zero3", "hsdp") else 1,
        "gradients": group if sharding in ("zero2", "zero3", "hsdp") else 1,
        "optimizer_states": group if sharding != "none" else 1,
    }
    # Adam's moments and fp32 master weights; ZeRO-3 gathers its 16-bit weights from the master shard.
    is_zero3 = sharding in ("zero3", "hsdp")
    widths = {
        "weights": 4.0 if is_zero3 else 2.0,
        "gradients": context.gradient_bytes,
        "optimizer_states": 8.0 if is_zero3 else 12.0,
    }
    # The final norm (4,096 of 8e9 parameters) belongs to no stage's count.
    whole = context.model.num_parameters
    for use, ranks in copies.items():
        held = float(getattr(memory, use)[0]) * ranks * plan.tp
        assert held == pytest.approx(widths[use] * whole, rel=1e-5), use


@pytest.mark.parametrize("model", ["llama-3-8b", "gpt3-175b"])
def test_stages_together_hold_the_model_and_a_copy_of_tied_embeddings(
    make_context: MakeContext, make_plan: MakePlan, model: str
) -> None:
    context = make_context(model, "dgx-h100:4")
    spec = context.model
    memory = plan_memory(context, make_plan(spec.num_layers, tp=8, pp=4))
    copy = spec.num_embedding_parameters if spec.has_tied_embeddings else 0
    assert memory.weights.sum() * 8 == pytest.approx(2.0 * (spec.num_parameters + copy), rel=1e-5)


@st.composite
def small_plans(draw: st.DrawFn, *, is_even: bool) -> tuple[int, int, ParallelPlan]:
    """Draw layers, global batch and a plan; ``is_even`` gives every stage the same layers."""
    pp = draw(st.sampled_from([1, 2, 3, 4, 8]))
    vpp = draw(st.sampled_from([1, 2, 3])) if pp > 1 else 1
    layers = pp * vpp * draw(st.integers(1, 3))
    if not is_even and vpp == 1:
        layers += draw(st.integers(0, 6))
    tp = draw(st.sampled_from([1, 2, 4, 8]))
    dp = draw(st.sampled_from([1, 2, 6, 16]))
    micro_batch_size = draw(st.sampled_from([1, 2, 4]))
    batches = pp * draw(st.integers(1, 4)) if vpp > 1 else draw(st.integers(1, 12))
    schedules = ["interleaved_1f1b"] if vpp > 1 else ["gpipe", "1f1b", "zb_h1", "zb_h2"]
    plan = ParallelPlan(
        dp=dp,
        tp=tp,
        pp=pp,
        vpp=vpp,
        sequence_parallel=tp > 1 and draw(st.booleans()),
        micro_batch_size=micro_batch_size,
        schedule="none" if pp == 1 else draw(st.sampled_from(schedules)),
        recompute=draw(st.sampled_from(RECOMPUTES)),
        sharding="none" if dp == 1 else draw(st.sampled_from(["none", "zero1", "zero2", "zero3"])),
        vocab_parallel=draw(st.sampled_from(["none", "vocab_1", "interlaced"])) if pp > 1 else "none",
        layers_per_stage=partition_layers(layers, pp * vpp),
    )
    return layers, dp * micro_batch_size * batches, plan


@settings(max_examples=60)
@given(case=small_plans(is_even=True), software=st.sampled_from(list_software()))
def test_peak_of_the_columns_is_the_fullest_stage_of_the_breakdown(
    make_context: MakeContext, case: tuple[int, int, ParallelPlan], software: str
) -> None:
    layers, batch, plan = case
    context = make_context(num_layers=layers, batch=batch, software=software)
    peak = peak_memory(context, PlanColumns.from_plans([plan], batch))[0]
    fullest = plan_memory(context, plan).total.max() * (1.0 + context.software.fragmentation)
    assert peak == pytest.approx(fullest, rel=1e-12)


@settings(max_examples=60)
@given(case=small_plans(is_even=False))
def test_peak_of_uneven_stages_is_never_below_their_fullest(
    make_context: MakeContext, case: tuple[int, int, ParallelPlan]
) -> None:
    layers, batch, plan = case
    context = make_context(num_layers=layers, batch=batch)
    peak = peak_memory(context, PlanColumns.from_plans([plan], batch))[0]
    assert peak >= plan_memory(context, plan).total.max() * (1 - 1e-12)


@settings(max_examples=40)
@given(case=small_plans(is_even=False))
def test_the_breakdown_adds_up_and_nothing_is_negative(
    make_context: MakeContext, case: tuple[int, int, ParallelPlan]
) -> None:
    layers, batch, plan = case
    memory = plan_memory(make_context(num_layers=layers, batch=batch), plan)
    uses = [getattr(memory, use.name) for use in fields(memory)]
    assert all(use.shape == (plan.pp,) and np.all(use >= 0) for use in uses)
    assert memory.total == pytest.approx(np.sum(uses, axis=0))
    assert sum(memory.row(plan.pp - 1).values()) == pytest.approx(memory.total[-1])


@settings(max_examples=40)
@given(case=small_plans(is_even=False))
def test_larger_micro_batches_never_need_less(
    make_context: MakeContext, case: tuple[int, int, ParallelPlan]
) -> None:
    layers, batch, plan = case
    twice = replace(plan, micro_batch_size=2 * plan.micro_batch_size)
    # The same number of micro-batches of twice the size.
    small = plan_memory(make_context(num_layers=layers, batch=batch), plan)
    large = plan_memory(make_context(num_layers=layers, batch=2 * batch), twice)
    assert np.all(large.total >= small.total)
    assert large.activations == pytest.approx(2 * small.activations)
    assert large.weights.tolist() == small.weights.tolist()


@pytest.mark.parametrize(
    ("schedule", "vpp", "in_flight"),
    [
        # 4 stages, 8 micro-batches: Narayanan et al. 2021 section 2.2, Qi et al. 2024 table 2.
        ("gpipe", 1, [8, 8, 8, 8]),
        ("1f1b", 1, [4, 3, 2, 1]),
        ("interleaved_1f1b", 2, [11 / 2, 9 / 2, 7 / 2, 5 / 2]),
        ("zb_h1", 1, [4, 4, 4, 4]),
        ("zb_h2", 1, [7, 7, 7, 7]),
    ],
)
def test_stages_hold_the_micro_batches_their_schedule_keeps_in_flight(
    make_context: MakeContext, make_plan: MakePlan, schedule: str, vpp: int, in_flight: list[float]
) -> None:
    plan = make_plan(pp=4, vpp=vpp, schedule=schedule)
    context = make_context(batch=8)
    layer = layer_activation_bytes(context, PlanColumns.from_plans([plan], 8))[0]
    held = plan_memory(context, plan).activations / (layer * 8)
    assert held == pytest.approx(np.array(in_flight))


def test_weaker_recompute_stores_more(make_context: MakeContext, make_plan: MakePlan) -> None:
    for software in ("megatron-2021", "torchtitan"):
        context = make_context(software=software)
        stored = [
            plan_memory(context, make_plan(recompute=recompute)).activations[0] for recompute in RECOMPUTES
        ]
        assert stored == sorted(stored, reverse=True)
        assert stored[0] > stored[1] > stored[2]
