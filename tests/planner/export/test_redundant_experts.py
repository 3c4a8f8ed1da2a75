"""Copies of experts in serving plans: the options every engine gets for them, and what none of them runs."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml
from export_cases import DEEPSEEK, MIXTRAL
from serving_cases import check_serving_refusal, make_serving_job, make_serving_plan

from meshwright.errors import SpecError, UnsupportedByTargetError
from meshwright.planner.export import SERVING_EXPORTERS
from meshwright.planner.export.sglang import sglang_arguments
from meshwright.planner.export.tensorrt_llm import tensorrt_llm_options
from meshwright.planner.export.vllm import vllm_arguments
from meshwright.planner.serving.deployment import check_engine_runs
from meshwright.planner.serving.plan_file import ServingPlanDocument, read_serving_plan, serving_plan_text
from meshwright.simcore.domain.serving import ServingPool, expert_slots_reason

COPIES = ServingPool(attention_dp=16, ep=16, redundant_experts=32, expert_imbalance=1.04)
JOB = make_serving_job(DEEPSEEK, num_nodes=2)


def words(groups):
    return [word for group in groups for option in group.options for word in option]


def test_every_engine_gets_its_own_words_for_copies():
    plan = make_serving_plan("vllm", COPIES, precision="fp8_block")
    (pool,) = plan.pools
    vllm = words(vllm_arguments(JOB, plan, pool))
    assert "--enable-eplb" in vllm
    assert json.loads(vllm[vllm.index("--eplb-config") + 1]) == {"num_redundant_experts": 32}
    sglang = words(sglang_arguments(JOB, plan, pool))
    assert sglang[sglang.index("--ep-num-redundant-experts") + 1] == "32"
    assert "--enable-eplb" in sglang
    options = yaml.safe_load(yaml.safe_dump(tensorrt_llm_options(JOB, plan, pool)))
    assert options["moe_config"]["load_balancer"]["num_slots"] == DEEPSEEK.moe.num_experts + 32


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_without_copies_no_engine_hears_of_them(engine):
    target = {"trtllm": "tensorrt-llm"}.get(engine, engine)
    job = dataclasses.replace(JOB, cluster=make_serving_job(num_nodes=2).cluster)
    pool = dataclasses.replace(COPIES, redundant_experts=0, expert_imbalance=None, block_size=32)
    if engine == "trtllm":
        pool = dataclasses.replace(pool, policy="inflight")
    bundle = SERVING_EXPORTERS[target].export(job, make_serving_plan(engine, pool, precision="fp8_block"))
    text = "\n".join(file.text for file in bundle.files)
    assert "eplb" not in text
    assert "redundant" not in text
    assert "load_balancer" not in text


def test_notes_say_who_places_the_copies_and_what_the_prediction_assumes():
    bundle = SERVING_EXPORTERS["sglang"].export(
        JOB, make_serving_plan("sglang", COPIES, precision="fp8_block")
    )
    notes = " ".join(bundle.notes)
    assert "32 redundant experts" in notes
    assert "1.04 times the mean" in notes


def test_slots_that_do_not_divide_are_refused_before_the_engine_does():
    odd = dataclasses.replace(COPIES, redundant_experts=30)
    plan = make_serving_plan("sglang", odd, precision="fp8_block")
    check_serving_refusal("sglang", JOB, plan, ["30 redundant", "redundant_experts 32"])


def test_tensorrt_llm_wants_attention_data_parallelism_for_copies():
    pool = ServingPool(tp=8, ep=8, redundant_experts=8, block_size=32)
    plan = make_serving_plan("trtllm", pool)
    check_serving_refusal("tensorrt-llm", make_serving_job(MIXTRAL), plan, ["WIDEEP", "attention_dp 1"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ep": 1, "moe_tp": 16}, "needs ep of at least 2"),
        ({"redundant_experts": -1}, "at least 0"),
        ({"expert_imbalance": 0.5}, "1 to ep 16"),
        ({"expert_imbalance": 17.0}, "1 to ep 16"),
    ],
)
def test_copies_that_mean_nothing_are_no_pool(fields, message):
    with pytest.raises(SpecError, match=message):
        dataclasses.replace(COPIES, **fields)


def test_slots_are_one_copy_of_each_expert_on_each_rank_at_most():
    pool = ServingPool(tp=4, ep=4, redundant_experts=24)
    assert expert_slots_reason(8, pool) is None
    assert "at most 24" in expert_slots_reason(8, dataclasses.replace(pool, redundant_experts=28))


def test_a_plan_file_keeps_copies_and_imbalance(tmp_path):
    document = ServingPlanDocument(job=JOB, plan=make_serving_plan("sglang", COPIES, precision="fp8_block"))
    path = tmp_path / "plan.yaml"
    path.write_text(serving_plan_text(document, {}, {}, ()))
    assert read_serving_plan(path).plan == document.plan
    path.write_text(path.read_text().replace("redundant_experts: 32", "redundant_experts: 30"))
    with pytest.raises(SpecError, match="use redundant_experts 32"):
        read_serving_plan(path)


def test_copies_can_make_experts_divide():
    """Six experts on four ranks: two copies fill them."""
    model = dataclasses.replace(MIXTRAL, moe=dataclasses.replace(MIXTRAL.moe, num_experts=6))
    job = make_serving_job(model)
    plans = [
        make_serving_plan("sglang", ServingPool(tp=4, ep=4, redundant_experts=copies)) for copies in (0, 2)
    ]
    assert any("divide" in reason for reason in SERVING_EXPORTERS["sglang"].unsupported(job, plans[0]))
    assert SERVING_EXPORTERS["sglang"].unsupported(job, plans[1]) == ()
    with pytest.raises(UnsupportedByTargetError, match="divide"):
        check_engine_runs(job, plans[0])
    check_engine_runs(job, plans[1])
