"""A small job, its plans, and an empty working folder for every test."""

from __future__ import annotations

import pytest

JOB = """\
schema_version: 1
kind: training
model: llama-3.2-1b
cluster: {node: l4-8, count: 1}
workload:
  global_batch_size: 16
  sequence_length: 1024
  precision: bf16
software: megatron-core
objective: throughput
constraints:
  memory_headroom: 5 %
  tp: [1, 2]
  pp: [1, 2]
  cp: 1
  recompute: none
  optimizer_offload: none
  activation_offload: false
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in an empty folder, with no colour asked for by the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def job_text():
    return JOB


@pytest.fixture
def job(folder, job_text):
    path = folder / "job.yaml"
    path.write_text(job_text)
    return path


@pytest.fixture(scope="session")
def plans(tmp_path_factory, job_text, meshwright):
    """The folder that ``plan`` wrote for the small job, once per session."""
    root = tmp_path_factory.mktemp("planned")
    (root / "job.yaml").write_text(job_text)
    outcome = meshwright("plan", root / "job.yaml", "--out", root / "plans", "--top", 6)
    assert outcome.code == 0, outcome.stderr
    return root / "plans"


@pytest.fixture(scope="session")
def flat_plan(tmp_path_factory, job_text, meshwright):
    """The best plan of the small job without a pipeline, as text."""
    root = tmp_path_factory.mktemp("flat")
    (root / "job.yaml").write_text(job_text.replace("pp: [1, 2]", "pp: 1").replace("tp: [1, 2]", "tp: 2"))
    outcome = meshwright("plan", root / "job.yaml", "--out", root / "plans", "--top", 1)
    assert outcome.code == 0, outcome.stderr
    return (root / "plans" / "1.yaml").read_text()


@pytest.fixture
def plan_file(flat_plan, folder):
    """A plan of one stage, free to be changed."""
    path = folder / "plan.yaml"
    path.write_text(flat_plan)
    return path


@pytest.fixture
def pipeline_plan(plans):
    """A plan with more than one stage."""
    return next(path for path in sorted(plans.glob("*.yaml")) if "pp: 2" in path.read_text())
