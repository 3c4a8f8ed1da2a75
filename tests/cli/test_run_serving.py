"""``meshwright run`` of serving plans: one true run on processes of this machine, and what is refused."""

from __future__ import annotations

import json

import pytest

from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.serving.plan_file import ServingPlanDocument, serving_plan_text
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.serving import (
    LengthDistribution,
    ServingJob,
    ServingPlan,
    ServingPool,
    ServingWorkload,
)

MODEL = ModelSpec(
    name="small",
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


@pytest.fixture
def write_plan(folder):
    def write(*pools):
        job = ServingJob(
            model=MODEL,
            cluster=resolve_cluster("dgx-h100:1"),
            workload=ServingWorkload(
                arrival="closed_loop",
                concurrency=4,
                input_length=LengthDistribution(mean=16),
                output_length=LengthDistribution(mean=8),
            ),
        )
        plan = ServingPlan(engine="vllm", pools=pools)
        path = folder / "serving.yaml"
        path.write_text(serving_plan_text(ServingPlanDocument(job=job, plan=plan), {}, {}, ()))
        return path

    return write


def test_a_replica_really_serves(meshwright, write_plan, folder):
    plan = write_plan(ServingPool(tp=2, max_num_sequences=3))
    flags = ("--device", "cpu", "--steps", 2, "--warmup", 1, "--json", "--out", folder / "out")
    outcome = meshwright("run", plan, *flags)
    assert outcome.code == 0, outcome.stderr
    shown = json.loads(outcome.stdout)
    assert [(row["step"], row["batch"], row["prompt"]) for row in shown["steps"]] == [
        ("prefill", 3, 16),
        ("decode", 3, 16),
    ]
    for row in shown["steps"]:
        assert row["predicted_seconds"] > 0.0
        assert row["measured_seconds"] > 0.0
        # The prediction is of an H100.
        assert row["error"] is None
    report = json.loads((folder / "out" / "aggregated" / "report.json").read_text())
    assert len(report["ranks"]) == 2
    assert report["comparison"] == shown["steps"]


def test_a_dry_run_prints_each_pools_commands(meshwright, write_plan, folder):
    plan = write_plan(ServingPool(role="prefill", tp=1), ServingPool(role="decode", tp=2))
    outcome = meshwright("run", plan, "--dry-run", "--prompt", 8, "--batch", 2)
    assert outcome.code == 0, outcome.stderr
    commands = [line for line in outcome.stdout.splitlines() if not line.startswith("#")]
    assert len(commands) == 3
    assert all("meshwright.profiler.executor.serving_worker" in line for line in commands)
    assert sum("run/decode" in line for line in commands) == 2
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("pool", "flags", "code", "message"),
    [
        ({"num_speculative_tokens": 2}, ("--device", "cpu"), 2, "speculative decoding is not run"),
        ({}, ("--append", "runs.csv"), 2, "--append: tables of measured runs hold training runs"),
    ],
)
def test_what_cannot_run_is_refused(meshwright, write_plan, pool, flags, code, message):
    outcome = meshwright("run", write_plan(ServingPool(**pool)), *flags)
    assert outcome.code == code
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_under_torchrun_it_is_refused(meshwright, write_plan, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    outcome = meshwright("run", write_plan(ServingPool()), "--device", "cpu")
    assert outcome.code == 2
    assert "without torchrun" in outcome.stderr


def test_flags_of_serving_are_refused_for_training(meshwright, plan_file):
    outcome = meshwright("run", plan_file, "--prompt", 8)
    assert outcome.code == 2
    assert "--prompt is for serving plans" in outcome.stderr
