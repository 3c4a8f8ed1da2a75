"""``meshwright export`` of serving plans: the file's kind decides which targets take it."""

from __future__ import annotations

import json

import pytest

from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.export import EXPORTERS, SERVING_EXPORTERS
from meshwright.planner.serving.plan_file import ServingPlanDocument, serving_plan_text
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.serving import (
    LengthDistribution,
    ServingJob,
    ServingPlan,
    ServingPool,
    ServingWorkload,
)


@pytest.fixture(scope="module")
def serving_plan(tmp_path_factory):
    """The file of a plan of two replicas of vLLM."""
    workload = ServingWorkload(
        arrival="poisson",
        rate=4.0,
        input_length=LengthDistribution(mean=512),
        output_length=LengthDistribution(mean=128),
    )
    job = ServingJob(model=load_model("llama-3.2-1b"), cluster=resolve_cluster("l4-8:1"), workload=workload)
    plan = ServingPlan(engine="vllm", pools=(ServingPool(num_replicas=2, tp=2),))
    path = tmp_path_factory.mktemp("serving") / "1.yaml"
    path.write_text(serving_plan_text(ServingPlanDocument(job=job, plan=plan), {}, {}, ()))
    return path


@pytest.mark.parametrize(
    ("target", "files"),
    [
        ("vllm", {"serve_args.sh", "serve.sh", "router.sh"}),
        ("kubernetes", {"serve_args.sh", "serve.sh", "router.sh", "leaderworkerset.yaml", "apply.sh"}),
        ("dynamo", {"dynamo.yaml", "apply.sh"}),
    ],
)
def test_the_files_of_a_serving_target_are_written(meshwright, serving_plan, tmp_path, target, files):
    outcome = meshwright("export", serving_plan, "--to", target, "--out", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.stderr
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name[0] != "."} == files
    assert json.loads(outcome.stdout)["target"] == target


def test_a_release_of_a_target_can_be_chosen(meshwright, serving_plan, tmp_path):
    flags = ("--to", "dynamo", "--out", tmp_path / "out", "--target-version")
    assert meshwright("export", serving_plan, *flags, "v1beta1").code == 0
    assert "nvidia.com/v1beta1" in (tmp_path / "out" / "dynamo.yaml").read_text()
    outcome = meshwright("export", serving_plan, *flags, "v2")
    assert outcome.code == 2
    assert "known: v1alpha1, v1beta1" in outcome.stderr


@pytest.mark.parametrize("target", sorted(EXPORTERS))
def test_training_targets_take_no_serving_plan(meshwright, serving_plan, tmp_path, target):
    outcome = meshwright("export", serving_plan, "--to", target, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert f"'{target}' takes no serving plan; known: dynamo" in outcome.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", sorted(SERVING_EXPORTERS))
def test_serving_targets_take_no_training_plan(meshwright, plans, tmp_path, target):
    outcome = meshwright("export", plans / "1.yaml", "--to", target, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert f"'{target}' takes no training plan; known: accelerate" in outcome.stderr


@pytest.mark.parametrize("flags", [("--launcher", "slurm"), ("--placement",)])
def test_options_of_training_plans_are_refused(meshwright, serving_plan, tmp_path, flags):
    outcome = meshwright("export", serving_plan, "--to", "vllm", "--out", tmp_path / "out", *flags)
    assert outcome.code == 2
    assert f"{flags[0]} is for training plans" in outcome.stderr


def test_a_plan_the_engine_cannot_run_is_refused_with_every_reason(meshwright, serving_plan, tmp_path):
    broken = tmp_path / "broken.yaml"
    text = serving_plan.read_text().replace("block_size: 16", "block_size: 24")
    broken.write_text(text.replace("policy: chunked_prefill", "policy: static"))
    outcome = meshwright("export", broken, "--to", "vllm", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "vllm 0.33.0 cannot run this plan:" in outcome.stderr
    assert outcome.stderr.count("\n  - aggregated pool: ") == 2
    assert not (tmp_path / "out").exists()


def test_placement_files_come_on_request(meshwright, plans, tmp_path):
    flags = ("--to", "megatron", "--out", tmp_path / "out", "--placement")
    outcome = meshwright("export", plans / "1.yaml", *flags)
    assert outcome.code == 0, outcome.stderr
    assert {"placement.sh", "place.sh"} <= {path.name for path in (tmp_path / "out").iterdir()}
