"""``meshwright validate``: errors by source, and one line per run."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from unittest import mock

import pytest

TABLE = Path(__file__).parents[1] / "validation" / "training_runs.csv"


@pytest.fixture
def rows():
    """The header and six runs of the published table."""
    with TABLE.open(newline="") as stream:
        reader = csv.DictReader(stream)
        return [row for _, row in zip(range(6), reader, strict=False)]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_runs_are_scored_and_summed_up_by_source(meshwright, rows, folder):
    outcome = meshwright("validate", write(folder / "runs.csv", rows))
    assert outcome.code == 0, outcome.stderr
    assert "Iteration time: |predicted / measured - 1|" in outcome.stdout
    assert "quality ok: 6 of 6 timed rows scored (100%), mean error" in outcome.stdout


def test_results_hold_one_line_per_run(meshwright, rows, folder):
    assert meshwright("validate", write(folder / "runs.csv", rows), "--out", "results.csv").code == 0
    with (folder / "results.csv").open(newline="") as stream:
        results = list(csv.DictReader(stream))
    assert [result["id"] for result in results] == [row["id"] for row in rows]
    for result in results:
        low, seconds, high = (float(result[f"predicted_{name}seconds"]) for name in ("low_", "", "high_"))
        assert low < seconds < high


def test_json_gives_coverage_and_errors(meshwright, rows, folder):
    rows[0]["gpu"] = "H100-79GB"
    outcome = meshwright("validate", write(folder / "runs.csv", rows), "--json")
    report = json.loads(outcome.stdout)
    assert report["schema_version"] == 1
    assert report["time"][0]["num_scorable"] == 6
    assert report["time"][0]["num_scored"] == 5
    assert list(report["skipped"]) == [rows[0]["id"]]
    assert "unknown GPU 'H100-79GB'" in report["skipped"][rows[0]["id"]]


def test_json_has_order_interval_and_pools(meshwright, rows, folder):
    for row in rows[:2]:
        row["quality"] = "recalled"
    report = json.loads(meshwright("validate", write(folder / "runs.csv", rows), "--json").stdout)
    by_quality = {each["quality"]: each for each in report["time"]}
    assert list(by_quality) == ["ok", "recalled"]
    assert by_quality["ok"]["coverage"] == 1.0
    assert 0.0 <= by_quality["ok"]["in_interval"] <= 1.0
    order = {each["quality"]: each for each in report["ranking"]}["ok"]
    assert -1.0 <= order["tau"] <= 1.0
    assert (order["num_groups"], order["mean_regret"], order["max_regret"]) == (0, None, None)
    ok, more = report["pooled"]
    assert (ok["quality"], ok["time"]["num_scored"], ok["is_claimed"]) == ("ok", 4, True)
    assert ok["macro_median"] == pytest.approx(by_quality["ok"]["median"])
    assert (more["quality"], more["time"]["num_scored"]) == ("ok+recalled", 6)


def test_recalled_rows_are_pooled_beside_the_headline(meshwright, rows, folder):
    alone = meshwright("validate", write(folder / "runs.csv", rows)).stdout
    assert "recalled" not in alone
    for row in rows[:2]:
        row["quality"] = "recalled"
    both = meshwright("validate", write(folder / "runs.csv", rows)).stdout
    assert "quality ok: 4 of 4 timed rows scored (100%), mean error" in both
    assert "quality ok + recalled: 6 of 6 timed rows scored (100%), mean of the medians of 1 sources" in both
    assert [line.split()[1] for line in both.splitlines() if line.startswith(" all ")].count(
        "ok+recalled"
    ) == 2


def test_regret_of_a_group_is_shown(meshwright, rows, folder):
    # Four micro-batches of one job; where all run alike, no choice costs anything.
    for index, row in enumerate(rows[:4]):
        row |= {**rows[0], "id": row["id"], "micro_batch": str(2**index)}
    table = write(folder / "runs.csv", rows[:4])
    order = json.loads(meshwright("validate", table, "--json").stdout)["ranking"][0]
    assert (order["num_groups"], order["num_grouped"], order["max_regret"]) == (1, 4, 0.0)
    assert "Order of plans: Kendall's tau, and regret of the plan predicted best" in (
        meshwright("validate", table).stdout
    )


@pytest.mark.parametrize("width", [100, 160])
def test_tables_keep_every_figure_at_their_width(rows, width):
    from rich.console import Console

    from meshwright.cli.render import validation as render
    from meshwright.profiler.measured_runs import read_measured_runs
    from meshwright.profiler.validation import score_runs

    scored = score_runs(read_measured_runs(TABLE)[-40:], (), lambda *state: None)
    stream = io.StringIO()
    with mock.patch.object(render, "stdout_console", return_value=Console(file=stream, width=width)):
        render.print_validation(TABLE, scored, None)
    tables = stream.getvalue().split("quality ok")[0]
    assert max(map(len, tables.splitlines())) <= width
    # A cell that does not fit is cut with this sign.
    assert "\u2026" not in tables
    assert "in 80 %" in tables
    assert "regret" in tables
    assert "no fit" in tables


def test_no_headline_is_claimed_below_95_percent_coverage(meshwright, rows, folder):
    rows[0]["gpu"] = "H100-79GB"
    outcome = meshwright("validate", write(folder / "runs.csv", rows))
    assert "5 of 6 timed rows scored (83%), below 95 %: no headline error is claimed." in outcome.stdout


def test_an_unknown_feature_is_listed_once_as_ignored(meshwright, rows, folder):
    for row in rows:
        row["features"] = "warp_drive"
    outcome = meshwright("validate", write(folder / "runs.csv", rows))
    assert outcome.stdout.count("warp_drive") == 1


def test_a_results_file_is_replaced_and_a_foreign_one_is_not(meshwright, rows, folder):
    table = write(folder / "runs.csv", rows[:1])
    assert meshwright("validate", table, "--out", "results.csv").code == 0
    assert meshwright("validate", table, "--out", "results.csv").code == 0
    outcome = meshwright("validate", table, "--out", table)
    assert outcome.code == 2
    assert "was not written by Meshwright" in outcome.stderr


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("gpu", "H100-81GB", "unknown GPU 'H100-81GB'"),
        ("n_gpus", "7", "but the row says 7 GPUs"),
        ("n_gpus", "inf", "n_gpus: 'inf' is not a whole number"),
        ("n_gpus", "nan", "n_gpus: 'nan' is not a whole number"),
        ("seq_len", "1e30", "seq_len"),
        ("micro_batch", "", "micro_batch is not stated"),
        ("micro_batch", "2.5", "micro_batch: '2.5' is not a whole number"),
        ("global_batch", "4097", "global_batch_size 4097 is not a multiple"),
        ("precision", "bf17", "did you mean 'bf16'?"),
        ("sharding", "zero9", "plan.sharding: unknown value 'zero9'"),
        ("recompute", "some", "plan.recompute: unknown value 'some'"),
        ("tied_embeddings", "maybe", "tied_embeddings: 'maybe' is neither y nor n"),
        ("n_experts", "8", "topk is not stated"),
    ],
)
def test_a_row_that_cannot_be_predicted_is_skipped_with_its_reason(
    meshwright, rows, folder, column, value, reason
):
    rows[0][column] = value
    outcome = meshwright("validate", write(folder / "runs.csv", rows[:2]), "--json")
    assert outcome.code == 0, outcome.stderr
    skipped = json.loads(outcome.stdout)["skipped"]
    assert list(skipped) == [rows[0]["id"]]
    assert reason in skipped[rows[0]["id"]]


def test_a_run_that_ran_out_of_memory_is_counted_apart(meshwright, rows, folder):
    rows[0] |= {"measured": "oom", "measured_seconds": "", "micro_batch": "512", "global_batch": "262144"}
    outcome = meshwright("validate", write(folder / "runs.csv", rows[:1]))
    assert "Out of memory: 1 of 1 runs that did not fit are predicted not to fit." in outcome.stdout
