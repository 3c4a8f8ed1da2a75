"""What each serving target refuses, with the values that would do; a plan that passes shows every field."""

from __future__ import annotations

import dataclasses

import pytest
from export_cases import DEEPSEEK, LLAMA_8B, MIXTRAL
from serving_cases import (
    DECODE,
    PREFILL,
    check_serving_refusal,
    make_serving_job,
    make_serving_plan,
)

from meshwright.planner.export import SERVING_EXPORTERS
from meshwright.planner.export.vllm import vllm_arguments
from meshwright.simcore.domain.serving import LengthDistribution, ServingPlan, ServingPool

ENGINE = {"vllm": "vllm", "sglang": "sglang", "tensorrt-llm": "trtllm"}
NO_DRAFTS = dataclasses.replace(DECODE, num_speculative_tokens=0)


def plan_of(target: str, pool: ServingPool, **fields: object) -> ServingPlan:
    return make_serving_plan(ENGINE[target], pool, **fields)


# Rules of every engine: model, pool, words.
COMMON = {
    "heads": (
        LLAMA_8B,
        ServingPool(tp=3),
        ["tp 3", "num_attention_heads 32", "2 or 4", "1, 2, 4, 8, 16, 32", "pp"],
    ),
    "key/value heads": (
        dataclasses.replace(LLAMA_8B, num_attention_heads=24, num_query_groups=8, ffn_hidden_size=24 * 512),
        ServingPool(tp=6),
        ["tp 6", "8 key/value heads", "tp 4 or 8"],
    ),
    "width": (
        dataclasses.replace(LLAMA_8B, ffn_hidden_size=14338),
        ServingPool(tp=4),
        ["ffn_hidden_size", "tp 2"],
    ),
    "experts of a dense model": (LLAMA_8B, ServingPool(tp=4, ep=4), ["ep 4", "mixture-of-experts"]),
    "replicas as attention ranks": (
        LLAMA_8B,
        ServingPool(attention_dp=4),
        ["num_replicas 4", "attention_dp 1"],
    ),
    "experts that do not divide": (
        MIXTRAL,
        ServingPool(tp=16, ep=16),
        ["ep 16", "num_experts 8", "use ep 8"],
    ),
    "experts on some ranks": (MIXTRAL, ServingPool(tp=4), ["moe_tp 1 x ep 1", "moe_tp 4 and ep 1"]),
    "expert width": (
        dataclasses.replace(MIXTRAL, moe=dataclasses.replace(MIXTRAL.moe, moe_ffn_hidden_size=14338)),
        ServingPool(tp=4, moe_tp=4),
        ["moe_tp 4", "moe_ffn_hidden_size 14338", "moe_tp 2"],
    ),
    "part of a second server": (LLAMA_8B, ServingPool(tp=4, pp=3), ["12 GPUs", "servers of 8", "8 or 16"]),
    "too many GPUs": (LLAMA_8B, ServingPool(tp=8, num_replicas=5), ["40 GPUs", "has 32"]),
    "more stages than layers": (LLAMA_8B, ServingPool(pp=40), ["pp 40", "32 layers"]),
    "a cache too small": (LLAMA_8B, ServingPool(kv_cache_tokens=1600), ["1600", "2304 tokens"]),
    "a step too small": (
        LLAMA_8B,
        ServingPool(max_num_sequences=9000, max_num_batched_tokens=8192),
        ["8192", "max_num_sequences 9000"],
    ),
    "drafts without a head": (
        LLAMA_8B,
        ServingPool(num_speculative_tokens=2),
        ["num_speculative_tokens 2", "use 0"],
    ),
}


@pytest.mark.parametrize("target", ENGINE)
@pytest.mark.parametrize("case", COMMON)
def test_every_engine_refuses(case, target):
    model, pool, words = COMMON[case]
    check_serving_refusal(target, make_serving_job(model, num_nodes=4), plan_of(target, pool), words)


def test_requests_longer_than_the_model_are_refused_by_all():
    job = make_serving_job(input_length=LengthDistribution(mean=8000), num_turns=2)
    for target in ENGINE:
        check_serving_refusal(target, job, plan_of(target, ServingPool()), ["16512 tokens", "8192"])


OWN = {
    "another engine": (
        "vllm",
        LLAMA_8B,
        make_serving_plan("sglang", ServingPool()),
        ["'sglang'", "--to sglang"],
    ),
    "experts over some ranks": (
        "vllm",
        MIXTRAL,
        make_serving_plan("vllm", ServingPool(tp=8, ep=4, moe_tp=2)),
        ["moe_tp 2 with ep 4", "moe_tp 1 and ep 8"],
    ),
    "ranks across servers": (
        "vllm",
        DEEPSEEK,
        make_serving_plan("vllm", ServingPool(tp=4, pp=3, attention_dp=2, moe_tp=8)),
        ["tp 4 x pp 3", "servers of 8"],
    ),
    "prefill first": (
        "vllm",
        LLAMA_8B,
        make_serving_plan("vllm", ServingPool(policy="prefill_first")),
        ["policy 'prefill_first'", "chunked_prefill or orca"],
    ),
    "whole prompts in small steps": (
        "vllm",
        LLAMA_8B,
        make_serving_plan("vllm", ServingPool(policy="orca", max_num_batched_tokens=2048)),
        ["max_num_batched_tokens 2048", "2560"],
    ),
    "odd blocks": (
        "vllm",
        LLAMA_8B,
        make_serving_plan("vllm", ServingPool(block_size=24)),
        ["block_size 24"],
    ),
    "stages of decode": (
        "vllm",
        LLAMA_8B,
        make_serving_plan("vllm", ServingPool(role="prefill"), ServingPool(role="decode", pp=2)),
        ["decode pool: pp 2", "pp 1"],
    ),
    "a cache that does not exist": (
        "vllm",
        LLAMA_8B,
        make_serving_plan("vllm", ServingPool(), kv_precision="mxfp8"),
        ["kv_precision 'mxfp8'", "bf16 or fp16 or fp8"],
    ),
    "mixed chunks with drafts": (
        "sglang",
        DEEPSEEK,
        ServingPlan(engine="sglang", pools=(ServingPool(tp=8, ep=8, num_speculative_tokens=1),)),
        ["policy 'chunked_prefill'", "prefill_first"],
    ),
    "half a cache": (
        "sglang",
        LLAMA_8B,
        make_serving_plan("sglang", ServingPool(), kv_precision="fp16"),
        ["kv_precision 'fp16'", "'bf16'"],
    ),
    "odd pages": (
        "sglang",
        LLAMA_8B,
        make_serving_plan("sglang", ServingPool(block_size=24)),
        ["block_size 24"],
    ),
    "full precision": (
        "sglang",
        LLAMA_8B,
        make_serving_plan("sglang", ServingPool(), precision="fp32"),
        ["precision 'fp32'"],
    ),
    "static batches": (
        "sglang",
        LLAMA_8B,
        make_serving_plan("sglang", ServingPool(policy="static")),
        ["policy 'static'"],
    ),
    "some attention ranks": (
        "tensorrt-llm",
        MIXTRAL,
        make_serving_plan("trtllm", ServingPool(tp=2, attention_dp=4, ep=8)),
        ["attention_dp 4 with tp 2", "attention_dp 8 with tp 1"],
    ),
    "blocks of 48": (
        "tensorrt-llm",
        LLAMA_8B,
        make_serving_plan("trtllm", ServingPool(block_size=48)),
        ["block_size 48", "32 or 64"],
    ),
    "replicas without a router": (
        "tensorrt-llm",
        LLAMA_8B,
        make_serving_plan("trtllm", ServingPool(num_replicas=2)),
        ["num_replicas 2", "--to dynamo"],
    ),
    "a cache finer than the model": (
        "tensorrt-llm",
        LLAMA_8B,
        make_serving_plan("trtllm", ServingPool(), kv_precision="fp16"),
        ["kv_precision 'fp16'", "'bf16'"],
    ),
    "TensorRT-LLM on pods": (
        "kubernetes",
        LLAMA_8B,
        make_serving_plan("trtllm", ServingPool()),
        ["'trtllm'", "--to dynamo"],
    ),
    "prefixes without a cache": (
        "dynamo",
        LLAMA_8B,
        make_serving_plan("vllm", ServingPool(num_replicas=2), router="prefix_aware"),
        ["'prefix_aware'", "has_prefix_cache"],
    ),
}


@pytest.mark.parametrize("case", OWN)
def test_a_target_refuses(case):
    target, model, plan, words = OWN[case]
    check_serving_refusal(target, make_serving_job(model, num_nodes=4), plan, words)


def test_machines_of_others_are_refused_where_only_nvidia_runs():
    job = make_serving_job(vendor="google")
    for target, engine in (("tensorrt-llm", "trtllm"), ("kubernetes", "vllm"), ("dynamo", "sglang")):
        check_serving_refusal(target, job, make_serving_plan(engine, ServingPool()), ["google"])


def test_both_pools_are_checked_and_named():
    job = make_serving_job(DEEPSEEK, num_nodes=4)
    pools = (dataclasses.replace(PREFILL, block_size=24), dataclasses.replace(NO_DRAFTS, block_size=24))
    reasons = SERVING_EXPORTERS["vllm"].unsupported(job, make_serving_plan("vllm", *pools))
    about_blocks = [reason for reason in reasons if "none of vLLM's" in reason]
    assert [reason.split(":")[0] for reason in about_blocks] == ["prefill pool", "decode pool"]


def test_the_size_of_expert_parallelism_is_never_written_for_vllm():
    job = make_serving_job(MIXTRAL)
    for pool, wanted in (
        (ServingPool(tp=4, ep=4), True),
        (ServingPool(tp=4, moe_tp=4), False),
        (ServingPool(attention_dp=8, ep=8), True),
    ):
        words = [
            w for group in vllm_arguments(job, make_serving_plan("vllm", pool), pool) for w in group.argv
        ]
        assert ("--enable-expert-parallel" in words) == wanted
        assert not any("ep-size" in word or "expert-parallel-size" in word for word in words)
        assert ("--data-parallel-size" in words) == (pool.attention_dp > 1)


CHANGES: dict[str, object] = {
    "num_replicas": 3,
    "tp": 2,
    "pp": 2,
    "max_num_sequences": 17,
    "max_num_batched_tokens": 9000,
    "block_size": 64,
    "kv_cache_tokens": 8000,
    "has_prefix_cache": True,
}


@pytest.mark.parametrize("target", ["vllm", "sglang", "dynamo", "kubernetes"])
@pytest.mark.parametrize("field", CHANGES)
def test_every_field_of_a_pool_shows(target, field):
    """A plan that differs in a field gives other files: nothing is dropped."""
    job, engine = make_serving_job(), "sglang" if target == "sglang" else "vllm"
    base = ServingPool()
    other = dataclasses.replace(base, **{field: CHANGES[field]})
    texts = [
        [
            (file.name, file.text)
            for file in SERVING_EXPORTERS[target].export(job, make_serving_plan(engine, pool)).files
        ]
        for pool in (base, other)
    ]
    assert texts[0] != texts[1]
