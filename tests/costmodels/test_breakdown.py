"""Terms of an iteration: they add up, and each stands for what it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.breakdown import GROUPS, TERMS, iteration_breakdown
from meshwright.costmodels.iteration import iteration_costs
from meshwright.simcore.domain.layer_groups import LayerGroup
from meshwright.simcore.training.iteration import simulate_iteration

# Terms that are exposed communication, in the sense of the simulation's own figure.
COMMUNICATION = (
    "tensor_parallel",
    "layout_change",
    "context_parallel",
    "expert_parallel",
    "sharded_data_parallel",
    "offload_copies",
    "parameter_gather",
    "gradient_reduce",
    "pipeline_send",
)

# Job and plan of each case; the first names the context's keywords, the second the plan's.
CASES = {
    "plain": ({}, {"dp": 8}),
    "sharded": ({"cluster": "dgx-h100:2"}, {"dp": 16, "sharding": "zero1"}),
    "fsdp": ({"cluster": "dgx-h100:2"}, {"dp": 16, "sharding": "zero3", "recompute": "full"}),
    "hsdp": (
        {"cluster": "dgx-h100:2", "software": "torchtitan"},
        {"dp": 16, "sharding": "hsdp", "sharding_group": 8, "recompute": "selective"},
    ),
    "tensor parallel": ({}, {"tp": 8, "sequence_parallel": True, "recompute": "selective"}),
    "blocking sends": ({"software": "megatron-2021"}, {"tp": 2, "pp": 4, "recompute": "full"}),
    "some layers recomputed": ({}, {"pp": 4, "dp": 2, "recompute": "full", "recompute_layers": 3}),
    "interleaved": ({}, {"tp": 2, "pp": 4, "vpp": 2, "sequence_parallel": True}),
    "gpipe": ({}, {"pp": 4, "dp": 2, "schedule": "gpipe"}),
    "zero bubble": ({"software": "megatron-2023"}, {"pp": 8, "schedule": "zb_h1"}),
    "uneven": ({}, {"pp": 4, "dp": 2, "layers_per_stage": (7, 9, 9, 7)}),
    "vocabulary": ({"software": "megatron-2024"}, {"pp": 8, "vocab_parallel": "vocab_1"}),
    "tied": ({"model": "llama-3.2-1b"}, {"pp": 2, "dp": 4, "layers_per_stage": (8, 8)}),
    "context parallel": ({"length": 32768}, {"cp": 8, "cp_method": "ulysses"}),
    "experts": (
        {"model": "mixtral-8x7b"},
        {"dp": 8, "ep": 8, "sharding": "zero1", "recompute": "full"},
    ),
    "leading dense layers": (
        {"model": "deepseek-v2-lite", "software": "megatron-core"},
        {"pp": 3, "dp": 2, "ep": 2, "recompute": "full", "layers_per_stage": (9, 9, 9), "tp": 1},
    ),
    "modules": (
        {"model": "mixtral-8x7b"},
        {"dp": 8, "ep": 4, "recompute": "selective", "recompute_modules": ("moe", "core_attn")},
    ),
    "V-shaped": ({}, {"pp": 4, "vpp": 2, "dp": 2, "schedule": "zb_v"}),
    "bidirectional": (
        {"model": "mixtral-8x7b"},
        {"pp": 4, "dp": 2, "ep": 2, "schedule": "dualpipe"},
    ),
    "activations offloaded": ({}, {"pp": 2, "dp": 4, "activation_offload": True}),
    "weights offloaded": (
        {},
        {"dp": 8, "sharding": "zero3", "parameter_offload": "cpu", "optimizer_offload": "cpu"},
    ),
    "layer-wise": (
        {},
        {
            "dp": 4,
            "pp": 2,
            "layer_groups": (
                LayerGroup(num_layers=8, tp=2, sequence_parallel=True, sharding="zero1"),
                LayerGroup(num_layers=8, sharding="zero1", recompute="full"),
                LayerGroup(num_layers=16, sharding="zero1"),
            ),
            "micro_batch_size": 2,
            "sharding": "zero1",
        },
    ),
}


@pytest.fixture
def explained(make_context, make_plan):
    def build(name: str):
        job, fields = CASES[name]
        context = make_context(**({"batch": 48} | job))
        plan = make_plan(context.model.num_layers, **fields)
        result = simulate_iteration(iteration_costs(context, plan), plan.schedule)
        return plan, result, iteration_breakdown(context, plan, result)

    return build


@pytest.mark.parametrize("name", CASES)
def test_the_terms_of_every_stage_add_up_to_the_iteration_time(explained, name):
    _, result, breakdown = explained(name)
    assert set(breakdown.terms) == set(TERMS)
    total = np.sum(list(breakdown.terms.values()), axis=0)
    assert total == pytest.approx(np.full(result.costs.num_stages, result.iteration_time), rel=1e-9)
    for stage in range(breakdown.num_stages):
        assert sum(breakdown.grouped(stage).values()) == pytest.approx(result.iteration_time, rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_no_term_is_negative(explained, name):
    _, result, breakdown = explained(name)
    for values in breakdown.terms.values():
        assert values.min() >= -1e-12 * result.iteration_time


# Of joint operations the simulation credits a pair at a time, the breakdown a stage; of leading dense layers that are
# recomputed the simulation counts the exchange of the layers behind them.
@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in ("bidirectional", "leading dense layers")]
)
def test_communication_is_that_of_the_simulation(explained, name):
    _, result, breakdown = explained(name)
    communication = sum(breakdown.terms[term] for term in COMMUNICATION)
    assert communication == pytest.approx(result.stage_exposed_communication_time, rel=1e-9, abs=1e-12)


def test_groups_hold_every_term_once():
    members = [term for terms in GROUPS.values() for term in terms]
    assert sorted(members) == sorted(TERMS)
    assert len(set(members)) == len(members)


@pytest.mark.parametrize(
    ("name", "present", "absent"),
    [
        ("plain", ("gradient_reduce",), ("tensor_parallel", "recompute", "warm_up", "pipeline_send")),
        ("fsdp", ("sharded_data_parallel", "recompute"), ("tensor_parallel", "expert_parallel")),
        ("tensor parallel", ("tensor_parallel",), ("sharded_data_parallel", "gradient_reduce")),
        ("blocking sends", ("pipeline_send", "recompute", "warm_up", "cool_down"), ("context_parallel",)),
        ("interleaved", ("warm_up", "tensor_parallel"), ("pipeline_send", "recompute")),
        ("vocabulary", ("vocabulary_exchange",), ("recompute",)),
        ("context parallel", ("context_parallel",), ("tensor_parallel", "expert_parallel")),
        ("experts", ("expert_parallel", "recompute"), ("context_parallel", "warm_up")),
        ("activations offloaded", ("offload_copies",), ("tensor_parallel",)),
        ("layer-wise", ("layout_change", "tensor_parallel", "recompute"), ("expert_parallel",)),
    ],
)
def test_a_plan_pays_for_what_it_uses_and_for_nothing_else(explained, name, present, absent):
    _, _, breakdown = explained(name)
    for term in present:
        assert breakdown.terms[term].max() > 0.0, term
    for term in absent:
        assert not breakdown.terms[term].any(), term


def test_only_the_first_layers_of_a_stage_are_recomputed(make_context, make_plan):
    context = make_context(batch=48)

    def recompute(**fields):
        plan = make_plan(32, pp=4, dp=2, recompute="full", **fields)
        result = simulate_iteration(iteration_costs(context, plan), plan.schedule)
        return iteration_breakdown(context, plan, result).terms["recompute"]

    assert recompute(recompute_layers=2) == pytest.approx(recompute() / 4.0)


def test_joint_operations_hide_communication_before_compute(make_context, make_plan):
    context = make_context("mixtral-8x7b", batch=48)
    plan = make_plan(32, pp=4, dp=2, ep=2, schedule="dualpipe")
    costs = iteration_costs(context, plan)

    def terms(shares):
        result = simulate_iteration(shares, plan.schedule)
        return iteration_breakdown(context, plan, result).terms

    overlapped = terms(costs)
    apart = terms(replace(costs, overlapped_time=None))
    assert (overlapped["expert_parallel"] < apart["expert_parallel"]).all()
    assert overlapped["compute"] == pytest.approx(apart["compute"])


def test_the_busiest_stage_holds_the_head(explained):
    _, result, breakdown = explained("interleaved")
    assert breakdown.busiest_stage == int(result.busy_time.argmax()) == 3
    assert breakdown.stage(3)["embedding_and_head"] > breakdown.stage(1)["embedding_and_head"] == 0.0
