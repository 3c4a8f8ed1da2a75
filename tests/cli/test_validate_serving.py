"""``meshwright validate`` and ``calibrate`` on serving runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[1] / "validation" / "serving_runs.csv"


@pytest.fixture
def table(folder):
    """Six runs of one model on H200, and one of separate pools."""
    with TABLE.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    picked = [row for row in rows if row["gpu"].startswith("H200") and row["model"].endswith("70B")]
    picked = [row for row in picked if row["engine"] == "vllm"][:4]
    picked.append(next(row for row in rows if row["mode"] == "disaggregated"))
    path = folder / "serving.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(picked)
    return path


def test_a_serving_table_is_recognised_and_summed_up(meshwright, table):
    outcome = meshwright("validate", table, "--out", "results.csv")
    assert outcome.code == 0, outcome.stderr
    for heading in ("quality", "engine", "system", "model", "concurrency"):
        assert f"Mean TPOT and TTFT by {heading}" in outcome.stdout
    assert "quality ok: 4 of 4 rows scored (100%), median error TPOT" in outcome.stdout
    with Path("results.csv").open(newline="") as stream:
        results = list(csv.DictReader(stream))
    assert list(results[0]) == [
        *("id", "status", "reason", "measured_ttft_s", "predicted_ttft_s"),
        *("measured_tpot_s", "predicted_tpot_s"),
    ]
    assert [row["status"] for row in results] == ["scored"] * 5
    assert all(float(row["predicted_tpot_s"]) > 0.0 for row in results)
    assert results[-1]["predicted_ttft_s"] == ""


def test_json_holds_the_same_groups(meshwright, table):
    outcome = meshwright("validate", table, "--json")
    mapping = json.loads(outcome.stdout)
    assert mapping["kind"] == "serving_validation"
    assert {group["name"] for group in mapping["quality"]} == {"ok", "disaggregated"}
    assert mapping["system"][0]["num_scored"] == 4


def test_a_few_runs_calibrate_an_engine(meshwright, table):
    outcome = meshwright(
        *("calibrate", "--from", "serving-runs", table, "--out", "mine.json", "--constant", "step_latency")
    )
    assert outcome.code == 0, outcome.stderr
    assert "Constants of vllm on h200-sxm-141" in " ".join(outcome.stdout.split())
    assert "Mean TPOT error" in outcome.stdout
    assert "step_latency 500 us" in " ".join(outcome.stdout.split())
    assert list(json.loads(Path("mine.json").read_text())["software"]) == ["serving-vllm"]
    again = meshwright("validate", table, "--calibration", "mine.json", "--quiet")
    assert again.code == 0, again.stderr
    assert "quality ok: 4 of 4 rows scored" in again.stdout
