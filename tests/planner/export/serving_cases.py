"""Serving jobs and plans the export tests share, and the golden cases."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from export_cases import DEEPSEEK, LLAMA_8B, MIXTRAL, make_cluster

from meshwright.errors import UnsupportedByTargetError
from meshwright.planner.export import SERVING_EXPORTERS, ExportBundle
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.serving import (
    LengthDistribution,
    ServingJob,
    ServingPlan,
    ServingPool,
    ServingWorkload,
)

GOLDEN_SERVING = Path(__file__).parent / "golden_serving"


def make_serving_job(
    model: ModelSpec = LLAMA_8B, *, num_nodes: int = 1, vendor: str = "nvidia", **workload: object
) -> ServingJob:
    """Return a serving job on made-up machines; further keywords are fields of the workload."""
    defaults: dict[str, object] = {
        "arrival": "poisson",
        "rate": 4.0,
        "input_length": LengthDistribution(mean=2048),
        "output_length": LengthDistribution(mean=256),
    }
    return ServingJob(
        model=model,
        cluster=make_cluster(num_nodes, vendor=vendor),
        workload=ServingWorkload(**(defaults | workload)),  # type: ignore[arg-type]  # checked by the class
    )


def make_serving_plan(engine: str = "vllm", *pools: ServingPool, **fields: object) -> ServingPlan:
    """Return a plan of the pools, each in the engine's usual policy unless it has another one."""
    usual = {"vllm": "chunked_prefill", "sglang": "prefill_first", "trtllm": "inflight"}[engine]
    fitted = tuple(
        dataclasses.replace(pool, policy=usual) if pool.policy == "chunked_prefill" else pool
        for pool in pools
    )
    return ServingPlan(engine=engine, pools=fitted, **fields)  # type: ignore[arg-type]  # checked by the class


AGGREGATED = ServingPool(num_replicas=4, tp=2, has_prefix_cache=True)
PREFILL = ServingPool(
    role="prefill", num_replicas=2, tp=8, ep=8, max_num_sequences=64, max_num_batched_tokens=16384
)
DECODE = ServingPool(
    role="decode",
    attention_dp=16,
    ep=16,
    block_size=64,
    num_speculative_tokens=1,
    kv_cache_tokens=1_000_000 // 64 * 64,
)
PAIR = {"precision": "fp8_block", "kv_precision": "fp8", "engine_version": "0.14.0"}
WIDE = ServingPool(tp=8, pp=2)

#: name -> target, job, plan. Each is one folder of tests/planner/export/golden_serving.
SERVING_CASES: dict[str, tuple[str, ServingJob, ServingPlan]] = {
    "vllm_replicas": (
        "vllm",
        make_serving_job(),
        make_serving_plan("vllm", AGGREGATED, router="prefix_aware", precision="fp8", kv_precision="fp8"),
    ),
    "vllm_two_servers": (
        "vllm",
        make_serving_job(num_nodes=2),
        make_serving_plan("vllm", dataclasses.replace(WIDE, policy="orca")),
    ),
    "vllm_pair": (
        "vllm",
        make_serving_job(DEEPSEEK, num_nodes=4),
        make_serving_plan("vllm", PREFILL, DECODE, **PAIR),
    ),
    "sglang_replicas": (
        "sglang",
        make_serving_job(MIXTRAL),
        ServingPlan(engine="sglang", pools=(dataclasses.replace(AGGREGATED, ep=2),), router="round_robin"),
    ),
    "sglang_pair": (
        "sglang",
        make_serving_job(DEEPSEEK, num_nodes=4),
        make_serving_plan("sglang", PREFILL, DECODE, **PAIR),
    ),
    "tensorrt_llm_one": (
        "tensorrt-llm",
        make_serving_job(),
        make_serving_plan("trtllm", dataclasses.replace(AGGREGATED, num_replicas=1, block_size=32)),
    ),
    "tensorrt_llm_pair": (
        "tensorrt-llm",
        make_serving_job(DEEPSEEK, num_nodes=4),
        make_serving_plan("trtllm", PREFILL, DECODE, **PAIR),
    ),
    "kubernetes_one": ("kubernetes", make_serving_job(num_nodes=2), make_serving_plan("vllm", WIDE)),
    "kubernetes_pair": (
        "kubernetes",
        make_serving_job(DEEPSEEK, num_nodes=4),
        make_serving_plan("sglang", PREFILL, DECODE, **PAIR),
    ),
    "dynamo_pair": (
        "dynamo",
        make_serving_job(DEEPSEEK, num_nodes=4),
        make_serving_plan("vllm", PREFILL, DECODE, **PAIR),
    ),
    "dynamo_prefix_aware": (
        "dynamo",
        make_serving_job(),
        make_serving_plan("sglang", AGGREGATED, router="prefix_aware"),
    ),
    "dynamo_v1beta1_pair": (
        "dynamo-v1beta1",
        make_serving_job(DEEPSEEK, num_nodes=4),
        make_serving_plan("trtllm", PREFILL, DECODE, **PAIR),
    ),
}


def export_serving_case(name: str) -> ExportBundle:
    """Return the bundle of a golden case."""
    target, job, plan = SERVING_CASES[name]
    return SERVING_EXPORTERS[target].export(job, plan)


def check_serving_refusal(target: str, job: ServingJob, plan: ServingPlan, words: list[str]) -> None:
    """Assert that exactly one reason holds all the words, and that an export raises with every reason."""
    exporter = SERVING_EXPORTERS[target]
    reasons = exporter.unsupported(job, plan)
    matching = [reason for reason in reasons if all(word in reason for word in words)]
    assert len(matching) == 1, reasons
    assert matching[0].endswith(".")
    assert "\n" not in matching[0]
    with pytest.raises(UnsupportedByTargetError) as error:
        exporter.export(job, plan)
    assert all(reason in str(error.value) for reason in reasons)
    assert exporter.target_version in str(error.value)
