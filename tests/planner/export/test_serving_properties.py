"""Whatever the plan, an exporter gives every reason or whole files; what passes keeps the rules of its engine."""

from __future__ import annotations

import math

import pytest
import yaml
from export_cases import DEEPSEEK, LLAMA_8B, MIXTRAL
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import make_serving_job

from meshwright.errors import SpecError, UnsupportedByTargetError
from meshwright.planner.export import SERVING_EXPORTERS
from meshwright.simcore.domain.serving import POLICIES, ROUTERS, ServingPlan, ServingPool
from meshwright.simcore.domain.workload import PRECISIONS

SMALL = st.sampled_from([1, 1, 1, 2, 3, 4, 8, 16])
ENGINE = {"vllm": "vllm", "sglang": "sglang", "tensorrt-llm": "trtllm"}
USUAL = {"vllm": "chunked_prefill", "sglang": "prefill_first", "trtllm": "chunked_prefill"}
# Targets that some plan reached.
EXPORTED: set[str] = set()


@st.composite
def serving_plans(draw):
    """A plan of any engine, sizes and words; most words are usual ones, so that many plans pass."""
    engine = draw(st.sampled_from(sorted(USUAL)))

    def pool(role):
        tp, attention_dp = draw(SMALL), draw(SMALL)
        ep, moe_tp = draw(st.sampled_from([(1, 1), (tp * attention_dp, 1), (1, tp * attention_dp)]))
        return ServingPool(
            role=role,
            num_replicas=draw(st.integers(1, 3)),
            tp=tp,
            pp=draw(st.sampled_from([1, 1, 2, 3])),
            attention_dp=attention_dp,
            moe_tp=moe_tp,
            ep=ep,
            policy=draw(st.sampled_from([USUAL[engine]] * 18 + list(POLICIES))),
            max_num_sequences=draw(st.sampled_from([1, 64, 256, 4096])),
            max_num_batched_tokens=draw(st.sampled_from([512, 8192])),
            block_size=draw(st.sampled_from([16, 32, 64, 64, 24])),
            kv_cache_tokens=draw(st.sampled_from([None, 100_001])),
            has_prefix_cache=draw(st.booleans()),
            num_speculative_tokens=draw(st.sampled_from([0, 0, 0, 0, 2])),
        )

    try:
        return ServingPlan(
            engine=engine,
            pools=tuple(map(pool, draw(st.sampled_from([("aggregated",), ("prefill", "decode")])))),
            precision=draw(st.sampled_from(["bf16"] * 9 + list(PRECISIONS))),
            kv_precision=draw(st.sampled_from(["bf16", "bf16", "fp8", "fp16", "int8"])),
            router=draw(st.sampled_from(ROUTERS)),
        )
    except SpecError:  # sizes that no pool can have
        return ServingPlan(engine="vllm", pools=(ServingPool(),))


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    plan=serving_plans(),
    model=st.sampled_from([LLAMA_8B, MIXTRAL, DEEPSEEK]),
    num_nodes=st.sampled_from([1, 4, 16]),
)
def export_everywhere(plan, model, num_nodes):
    job = make_serving_job(model, num_nodes=num_nodes)
    for target, exporter in SERVING_EXPORTERS.items():
        reasons = exporter.unsupported(job, plan)
        if reasons:
            with pytest.raises(UnsupportedByTargetError):
                exporter.export(job, plan)
            assert all(reason.endswith(".") and "\n" not in reason for reason in reasons)
            continue
        bundle = exporter.export(job, plan)
        assert bundle.files
        assert bundle.launch_command
        for file in bundle.files:
            assert file.text.isascii()
            if file.name.endswith(".yaml"):
                assert list(yaml.safe_load_all(file.text))
        assert plan.engine == ENGINE.get(target, plan.engine)
        EXPORTED.add(target)
        assert plan.num_gpus <= job.cluster.num_gpus
        for pool in plan.pools:
            assert model.num_attention_heads % pool.tp == 0
            experts = math.inf if model.moe is None else model.moe.num_experts
            assert pool.ep == 1 or experts % pool.ep == 0
            assert pool.gpus_per_replica <= 8 or pool.gpus_per_replica % 8 == 0


def test_a_plan_is_exported_whole_or_refused_with_reasons():
    EXPORTED.clear()
    export_everywhere()
    assert set(SERVING_EXPORTERS) == EXPORTED
