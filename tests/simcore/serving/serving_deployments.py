"""Small engines and workloads that the serving tests share."""

from __future__ import annotations

import numpy as np

from meshwright.simcore.domain.serving import LengthDistribution, ServingWorkload
from meshwright.simcore.serving.behaviour import EngineBehaviour, TransferLink
from meshwright.simcore.serving.pool import ReplicaPool
from meshwright.simcore.serving.requests import RequestTable
from meshwright.simcore.serving.step_table import StepTable

LINK = TransferLink(bytes_per_token=1e5, bandwidth=1e10, latency=1e-4)
FIELDS = (
    "arrival_time",
    "scheduled_time",
    "prefill_end_time",
    "first_token_time",
    "finish_time",
    "transfer_time",
    "cached_tokens",
    "num_preemptions",
    "engine",
    "prefill_replica",
    "decode_step_time",
    "prompt_step_time",
    "num_steps",
)


def step_table(**changes: object) -> StepTable:
    """Return a table whose entries are all different, so that a wrong index shows."""
    tokens = np.array([1.0, 8, 64, 256, 1024, 4096])
    batches, contexts = np.array([1.0, 8, 32]), np.array([1.0, 256, 1024, 4096])
    prompts = np.array([0.0, 128, 512, 2048, 8192])
    fields: dict[str, object] = {
        "token_counts": tokens,
        "graph_token_time": 0.004 + 1.1e-5 * tokens,
        "eager_token_time": 0.005 + 1.3e-5 * tokens,
        "decode_batch_sizes": batches,
        "decode_contexts": contexts,
        "decode_attention_time": 1e-5 + 3e-9 * batches[:, np.newaxis] * contexts**1.1,
        "prompt_lengths": prompts,
        "prefill_attention_time": 2e-9 * prompts**2,
        "decode_skew": 0.2,
        "mixed_decode_factor": 1.4,
        "step_latency": 3e-4,
        "host_time": 0.003,
        "host_time_per_sequence": 2e-5,
        "host_time_per_prompt": 3e-4,
        "eager_host_time": 0.004,
        "max_graph_tokens": 16.0,
    }
    return StepTable(**(fields | changes))  # type: ignore[arg-type]  # fields of the right types by name


def behaviour(**changes: object) -> EngineBehaviour:
    """Return a small engine: 8 sequences, 256 tokens a step, 120 blocks."""
    fields: dict[str, object] = {
        "max_num_sequences": 8,
        "max_num_batched_tokens": 256,
        "num_kv_blocks": 120,
        "block_size": 16,
    }
    return EngineBehaviour(**(fields | changes))  # type: ignore[arg-type]  # fields of the right types by name


def workload(**changes: object) -> ServingWorkload:
    """Return 150 requests of log-normal lengths, too many for one small engine."""
    fields: dict[str, object] = {
        "arrival": "poisson",
        "rate": 8.0,
        "num_requests": 150,
        "input_length": LengthDistribution(mean=200, kind="lognormal", coefficient_of_variation=0.6),
        "output_length": LengthDistribution(mean=60, kind="lognormal", coefficient_of_variation=0.8),
    }
    return ServingWorkload(**(fields | changes))  # type: ignore[arg-type]  # fields of the right types by name


def table_of(*requests: tuple[float, int, int], **fields: object) -> RequestTable:
    """Return requests of (arrival time, input length, output length)."""
    times, inputs, outputs = zip(*requests, strict=True)
    return RequestTable(
        arrival_time=np.array(times, dtype=np.float64),
        input_length=np.array(inputs),
        output_length=np.array(outputs),
        **fields,  # type: ignore[arg-type]  # fields of the right types by name
    )


def split_pools(prefill: EngineBehaviour, decode: EngineBehaviour) -> tuple[ReplicaPool, ReplicaPool]:
    """Return two prefill replicas and one decode replica."""
    return (
        ReplicaPool(table=step_table(), behaviour=prefill, num_replicas=2, role="prefill"),
        ReplicaPool(table=step_table(step_latency=1e-4), behaviour=decode, role="decode"),
    )
