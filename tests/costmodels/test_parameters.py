"""What ranks hold adds up to the model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.memory import peak_memory, plan_memory
from meshwright.costmodels.parameters import RankParameters
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.costmodels.stage import virtual_stage_parameters
from meshwright.simcore.domain import model_parameters
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan, partition_layers
from meshwright.simcore.schedules import SCHEDULES

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]
# Dense; grouped queries; one group; tied; latent attention with leading dense layers, with and without a query latent;
# mixtures with shared experts, biases or neither.
MODELS = [
    "gpt3-175b",
    "llama-3-70b",
    "falcon-7b",
    "gemma-2-9b",
    "deepseek-v3",
    "deepseek-v2-lite",
    "kimi-k2",
    "qwen3-235b-a22b",
    "mixtral-8x7b",
    "qwen2-57b-a14b",
    "gpt-oss-120b",
]
GRIDS = [(1, 1, 1), (2, 2, 1), (4, 8, 1), (8, 4, 2), (8, 8, 8), (16, 2, 4)]


def expected_total(model: ModelSpec, plan: ParallelPlan) -> float:
    """Return what all ranks of one replica hold: the model once, and each copy that is kept on purpose."""
    tp, layers = plan.tp, model.num_layers + model.num_mtp_layers
    norm = model_parameters.norm_parameters(model, model.hidden_size)
    # The final norm, and three norms of each prediction module, belong to no stage's count.
    total = model.num_parameters - norm * (model.has_final_norm + 3 * model.num_mtp_layers)
    has_both_ends = plan.pp == 1 or plan.schedule in ("zb_v", "v_half", "v_min", "dualpipe", "dualpipe_v")
    if not has_both_ends and (model.has_tied_embeddings or model.num_mtp_layers):
        total += model.num_embedding_parameters
    if model.moe is not None:
        routers = model.num_moe_layers + model.num_mtp_layers
        total += (tp - 1) * routers * model_parameters.router_parameters(model)
    if model.mla is not None:
        down = (model.mla.q_lora_rank or 0) + model.mla.kv_lora_rank + model.mla.qk_rope_head_dim
        total += (tp - 1) * layers * model.hidden_size * down
    else:
        copies = max(0, tp - model.num_query_groups)
        total += layers * 2 * model.hidden_size * model.head_dim * copies
    return total


def held_by_all(context: CostContext, plan: ParallelPlan) -> float:
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    copies = SCHEDULES[plan.schedule].num_model_copies
    rows = columns.take(np.zeros(len(plan.layers_per_stage) * copies, dtype=np.int64))
    held = virtual_stage_parameters(context, plan, rows)
    return float((held.dense * plan.tp + held.expert * plan.ep * plan.etp).sum() / copies)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("schedule", "vpp"),
    [("none", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("zb_v", 2), ("dualpipe", 1), ("dualpipe_v", 2)],
)
def test_ranks_of_a_replica_hold_the_model_and_the_documented_copies(
    make_context: MakeContext, name: str, grid: tuple[int, int, int], schedule: str, vpp: int
) -> None:
    context = make_context(name, batch=64)
    model = context.model
    tp, ep, etp = grid if model.moe is not None else (grid[0], 1, 1)
    pp = 1 if schedule == "none" else 4
    plan = ParallelPlan(
        dp=16,
        tp=tp,
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=etp,
        sequence_parallel=tp > 1,
        micro_batch_size=1,
        schedule=schedule,  # type: ignore[arg-type]  # a word of the list above
        layers_per_stage=partition_layers(model.num_layers, pp * vpp),
    )
    expected = expected_total(model, plan)
    assert held_by_all(context, plan) == pytest.approx(expected, rel=1e-5)
    # Two bytes of weights each, on all stages together.
    weights = plan_memory(context, plan).weights / 2.0
    copies = SCHEDULES[schedule].num_model_copies
    dense_and_expert = rank_parameters(context, plan)
    assert weights.sum() == pytest.approx(float(dense_and_expert.total.sum()), rel=1e-9)
    assert copies in (1, 2)


def rank_parameters(context: CostContext, plan: ParallelPlan) -> RankParameters:
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    copies = SCHEDULES[plan.schedule].num_model_copies
    rows = columns.take(np.zeros(len(plan.layers_per_stage) * copies, dtype=np.int64))
    return virtual_stage_parameters(context, plan, rows)


def test_deepseek_v3_is_671_billion_and_its_prediction_module_14(make_context: MakeContext) -> None:
    # Model card: 671B of the main model, 14B of the module's weights (its table and head repeated, 11.6B of its own).
    context = make_context("deepseek-v3", batch=64)
    plan = ParallelPlan(dp=64, ep=64, micro_batch_size=1, schedule="none", layers_per_stage=(61,))
    assert held_by_all(context, plan) == pytest.approx(671.0e9 + 11.6e9, rel=1e-3)
    without = make_context("deepseek-v3", batch=64, num_mtp_layers=0)
    assert held_by_all(without, plan) == pytest.approx(671.0e9, rel=1e-3)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "interleaved_1f1b"])
def test_a_prediction_module_keeps_a_table_where_the_embedding_is_elsewhere(
    make_context: MakeContext, make_plan: MakePlan, schedule: str
) -> None:
    model = load_model("deepseek-v3")
    vpp = 2 if schedule == "interleaved_1f1b" else 1
    layers = partition_layers(61, 4 * vpp)
    apart = make_plan(61, pp=4, vpp=vpp, tp=4, schedule=schedule, layers_per_stage=layers)
    spread = make_plan(
        61, pp=4, vpp=vpp, tp=4, schedule=schedule, layers_per_stage=layers, vocab_parallel="vocab_1"
    )
    context = make_context("deepseek-v3", batch=64)
    without = make_context("deepseek-v3", batch=64, num_mtp_layers=0)
    added = plan_memory(context, apart).weights[-1] - plan_memory(without, apart).weights[-1]
    added_spread = plan_memory(context, spread).weights[-1] - plan_memory(without, spread).weights[-1]
    assert added - added_spread == pytest.approx(2.0 * model.num_embedding_parameters / 4)


def test_leading_dense_layers_are_counted_as_such(make_context: MakeContext, make_plan: MakePlan) -> None:
    # One of four layers is dense; with 64-way expert parallelism a dense layer of DeepSeek-V3 holds more than a rank's
    # part of a mixture: 3 x 7,168 x 18,432 against 4 + 1 experts of 3 x 7,168 x 2,048 and a router.
    model = load_model("deepseek-v3")
    assert model.moe is not None
    context = make_context("deepseek-v3", "dgx-h100:8", batch=64, num_layers=8, num_mtp_layers=0)
    plan = make_plan(8, dp=16, pp=4, ep=16, layers_per_stage=(2, 2, 2, 2))
    held = plan_memory(context, plan).weights / 2.0
    dense = 3 * model.hidden_size * model.ffn_hidden_size
    experts = (256 // 16 + 1) * 3 * model.hidden_size * 2048 + 256 * (model.hidden_size + 1)
    table = model.vocab_size * model.hidden_size
    # Three leading dense layers: both of stage 0, one of stage 1.
    assert held[0] - table - 2 * dense == pytest.approx(held[2] - 2 * experts, rel=1e-6)
    assert held[1] - dense - experts == pytest.approx(held[2] - 2 * experts, rel=1e-6)


@settings(max_examples=40)
@given(
    name=st.sampled_from(["deepseek-v3", "deepseek-v2-lite", "kimi-k2"]),
    ep=st.sampled_from([1, 8, 64]),
    pp=st.sampled_from([1, 2, 4, 8]),
    per_stage=st.integers(1, 3),
    vpp=st.sampled_from([1, 2]),
    schedule=st.sampled_from(["1f1b", "zb_h1", "v_half", "dualpipe", "dualpipe_v"]),
    recompute=st.sampled_from(["none", "selective", "full"]),
)
def test_the_peak_of_a_mixture_is_never_below_its_fullest_stage(
    make_context: MakeContext,
    name: str,
    ep: int,
    pp: int,
    per_stage: int,
    vpp: int,
    schedule: str,
    recompute: str,
) -> None:
    if pp == 1:
        schedule, vpp = "none", 1
    elif schedule in ("v_half", "dualpipe_v"):
        vpp = 2
    elif vpp == 2:
        schedule = "interleaved_1f1b"
    num_layers = pp * vpp * per_stage
    context = make_context(name, "dgx-h100:64", batch=64 * 2 * pp, num_layers=num_layers)
    plan = ParallelPlan(
        dp=64,
        pp=pp,
        vpp=vpp,
        ep=ep,
        micro_batch_size=1,
        schedule=schedule,  # type: ignore[arg-type]  # a word of the list above
        recompute=recompute,  # type: ignore[arg-type]  # a word of the list above
        sharding="zero1",
        layers_per_stage=(per_stage,) * (pp * vpp),
    )
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    fullest = plan_memory(context, plan).total.max() * (1.0 + context.software.fragmentation)
    assert peak_memory(context, columns)[0] >= fullest * (1 - 1e-12)
