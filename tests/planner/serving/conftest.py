"""Small step tables and loads whose steady states can be worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from meshwright.planner.serving.candidates import ReplicaOption
from meshwright.planner.serving.job_file import ServingFlags, ServingRequest, read_serving_request
from meshwright.planner.serving.load_profile import load_profile
from meshwright.simcore.serving.step_table import StepTable


def linear_table(fixed=0.01, per_token=1e-5, per_context_token=1e-9, **changes):
    """Steps of ``fixed + per_token * tokens + per_context_token * decodes * context`` seconds; prompts' attention is 0."""
    tokens = np.array([1.0, 16384.0])
    times = fixed + per_token * tokens
    batches, contexts = np.array([1.0, 1024.0]), np.array([0.0, 131072.0])
    settings = {
        "token_counts": tokens,
        "graph_token_time": times,
        "eager_token_time": times,
        "decode_batch_sizes": batches,
        "decode_contexts": contexts,
        "decode_attention_time": per_context_token * batches[:, None] * contexts[None, :],
        "prompt_lengths": np.array([0.0, 131072.0]),
        "prefill_attention_time": np.array([0.0, 0.0]),
        "max_graph_tokens": 1024.0,
    }
    return StepTable(**(settings | changes))


def option(table=None, tokens=100_000, **degrees):
    return ReplicaOption(
        engine="vllm",
        policy="chunked_prefill",
        precision="bf16",
        kv_precision="bf16",
        degrees={"tp": 1, "pp": 1, "attention_dp": 1, "moe_tp": 1, "ep": 1} | degrees,
        kv_cache_tokens=tokens,
        table=linear_table() if table is None else table,
    )


class LinearCosts:
    """Replicas of one linear table whose fixed time shrinks with tp; every cache holds 50,000 tokens a GPU."""

    def __init__(self, tokens_per_gpu=50_000):
        self.tokens_per_gpu = tokens_per_gpu

    def kv_cache_tokens(self, plan, pool):
        return self.tokens_per_gpu * pool.gpus_per_replica

    def step_table(self, plan, pool):
        return linear_table(
            fixed=0.004 + 0.016 / pool.tp, per_token=2e-5 / pool.tp, stage_share=1.0 / pool.pp
        )


def request_of(**flags) -> ServingRequest:
    settings = {
        "model": "llama-3.1-8b",
        "cluster": "dgx-h100:1",
        "rate": "4 /s",
        "input_length": 1000,
        "output_length": 101,
        "engine": "vllm",
        "precision": "bf16",
        "slo": {"ttft_p99": "2 s", "tpot_p99": "40 ms"},
    }
    return read_serving_request(None, ServingFlags(**(settings | flags)))


@pytest.fixture(scope="session")
def fixed_load():
    """Prompts of 1,000 tokens and answers of 101."""
    return load_profile(np.full(10, 1000.0), np.full(10, 101.0))


@pytest.fixture(scope="session")
def cases():
    """Builders of the objects above."""
    return SimpleNamespace(table=linear_table, option=option, costs=LinearCosts, request=request_of)
