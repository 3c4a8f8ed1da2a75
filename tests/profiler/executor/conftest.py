"""A small job on two processes of a CPU host, and reports as its workers would write them."""

from __future__ import annotations

import pytest

from meshwright.hardware_specs import cluster_from_section, parse_yaml
from meshwright.profiler.executor.report import GroupTraffic, RankReport
from meshwright.simcore.domain.execution import Execution
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.workload import TrainingWorkload

MODEL = ModelSpec(
    name="tiny",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=256,
    max_position_embeddings=64,
    is_gated_mlp=True,
    has_tied_embeddings=False,
)
PLAN = ParallelPlan(dp=2, micro_batch_size=1, schedule="none", layers_per_stage=(2,))
WORKLOAD = TrainingWorkload(global_batch_size=4, sequence_length=32, precision="fp32")
CLUSTER = "{node: {base: cpu-host-1, num_gpus: 2}, count: 1}"


@pytest.fixture
def job():
    return TrainingJob(
        model=MODEL,
        cluster=cluster_from_section(parse_yaml(CLUSTER, "test")),
        workload=WORKLOAD,
        software="torchtitan",
    )


@pytest.fixture
def plan():
    return PLAN


@pytest.fixture
def execution():
    return Execution(model=MODEL, plan=PLAN, workload=WORKLOAD, device="cpu", num_steps=3)


@pytest.fixture
def make_report():
    """Return the function that makes a rank's report; every step takes the given seconds."""

    def make(rank=0, stage=0, seconds=(0.1, 0.3, 0.2), **changes):
        fields = {
            "device": "a processor",
            "cpu_seconds": seconds,
            "phase_seconds": {
                "forward": tuple(0.25 * each for each in seconds),
                "backward": tuple(0.5 * each for each in seconds),
                "gradient_sync": tuple(0.125 * each for each in seconds),
                "optimizer": tuple(0.125 * each for each in seconds),
            },
            "traffic": (
                GroupTraffic(axis="dp", operation="all_reduce", num_messages=2, num_bytes=400, seconds=0.05),
            ),
            "peak_memory_bytes": 1000 + rank,
            "losses": (5.5, 5.4, 5.3) if rank == 0 else (),
        }
        return RankReport(rank=rank, stage=stage, step_seconds=seconds, **{**fields, **changes})

    return make
