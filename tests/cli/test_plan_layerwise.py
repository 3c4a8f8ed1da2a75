from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshwright.planner.plan_file import read_plan
from meshwright.simcore.domain.layer_groups import layer_groups_text

JOB = """schema_version: 1
kind: training
model: llama-2-7b
cluster: {node: dgx-a100-40, count: 1}
workload: {global_batch_size: 64, sequence_length: 4096}
constraints:
  memory_headroom: 35 %
  tp: [2, 4]
  pp: [1, 2]
  vpp: 1
  schedule: [none, 1f1b]
  optimizer_offload: none
  activation_offload: false
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    file = tmp_path / "job.yaml"
    file.write_text(JOB)
    return file


def test_layer_wise_plans_are_ranked_with_their_groups_and_written(meshwright, job, tmp_path):
    out = tmp_path / "plans"
    outcome = meshwright("plan", str(job), "--search", "layerwise", "--top", "3", "--out", str(out))
    assert outcome.code == 0, outcome.stderr
    document = read_plan(out / "1.yaml")
    text = layer_groups_text(document.plan)
    assert text
    assert f"Layers of 1: {text}." in outcome.stdout
    assert "better than the best uniform plan" in outcome.stdout
    report = json.loads((out / "report.json").read_text())
    assert report["plans"][0]["plan"]["layer_groups"] == text
    assert "better than the best uniform plan" in report["notes"][0]


def test_a_layer_wise_plan_file_is_simulated_to_its_own_prediction_and_not_exported(
    meshwright, job, tmp_path
):
    out = tmp_path / "plans"
    assert meshwright("plan", str(job), "--search", "layerwise", "--top", "1", "--out", str(out)).code == 0
    predicted = json.loads((out / "report.json").read_text())["plans"][0]["prediction"]
    simulated = meshwright("simulate", str(out / "1.yaml"), "--json")
    assert simulated.code == 0, simulated.stderr
    again = json.loads(simulated.stdout)["prediction"]
    for key in ("iteration_time_seconds", "peak_memory_bytes", "mfu", "hfu"):
        assert again[key] == pytest.approx(predicted[key])
    assert again["memory_bytes"] == pytest.approx(predicted["memory_bytes"])
    refused = meshwright("export", str(out / "1.yaml"), "--to", "megatron", "--out", str(tmp_path / "run"))
    assert refused.code != 0
    assert "layer_groups" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_target_and_layer_wise_plans_do_not_go_together(meshwright, job, tmp_path):
    outcome = meshwright(
        "plan", str(job), "--search", "layerwise", "--target", "megatron", "--out", str(tmp_path / "plans")
    )
    assert outcome.code != 0
    assert "cannot express layer-wise plans" in outcome.stderr
    assert "Traceback" not in outcome.stderr
