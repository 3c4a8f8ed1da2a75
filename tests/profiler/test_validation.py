from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from meshwright.profiler.measured_runs import COLUMNS, MeasuredRun
from meshwright.profiler.validation import (
    RESULT_COLUMNS,
    ScoredRun,
    score_run,
    score_runs,
    summarise,
)
from meshwright.simcore.domain.plan import ScheduleName

MakeRun = Callable[..., MeasuredRun]
GPUS = [
    *("V100-32GB-SXM2", "A100-40GB-SXM", "A100-80GB-SXM", "A100-80GB-PCIe", "A800-80GB", "H100-80GB-SXM"),
    *("H100-96GB-HBM2e-500W", "H800-80GB-SXM", "H200-141GB-SXM", "B200", "B300", "GB200", "GB300"),
    *("MI250X-GCD-64GB", "MI300X", "MI325X", "MI355X"),
]
PRECISIONS = ["fp32", "tf32", "fp16", "bf16", "fp8", "fp8_block", "mxfp8", "nvfp4", "int8", "int4_wo"]


def assert_scored_or_explained(row: ScoredRun) -> None:
    if row.status == "skipped":
        assert row.prediction is None
        assert row.setup is None
        assert row.reason
        assert "\n" not in row.reason
    else:
        assert row.prediction is not None
        assert 0.0 < row.prediction.low < row.prediction.iteration_time < row.prediction.high
        assert (row.status == "infeasible") == (row.prediction.memory_headroom < 0)


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_and_precision_scores_or_says_why_not(make_run: MakeRun, gpu: str) -> None:
    scored = {precision: score_run(make_run(gpu=gpu, precision=precision)) for precision in PRECISIONS}
    for row in scored.values():
        assert_scored_or_explained(row)
    assert scored["fp16"].prediction is not None
    skipped = [row.reason for row in scored.values() if row.status == "skipped"]
    assert all(re.search(r"has no \w+ units.* It offers .*fp16|does not train", reason) for reason in skipped)


@pytest.mark.parametrize("gpu", ["A100-80GB-PCIe", "B300", "MI325X", "MI355X", "GB200"])
@pytest.mark.parametrize("sharding", ["none", "zero1", "zero2", "zero3", "hsdp"])
def test_every_sharding_scores_on_every_vendor(make_run: MakeRun, gpu: str, sharding: str) -> None:
    group = 8 if sharding == "hsdp" else ""
    row = score_run(make_run(gpu=gpu, sharding=sharding, sharding_group=group, n_layers=4))
    assert_scored_or_explained(row)
    assert row.status == "scored"


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "2.5", "y", "none", "1;2", "\u00e9"])
def test_no_cell_makes_scoring_fail(make_run: MakeRun, text: str) -> None:
    for column in COLUMNS:
        if not column.startswith("measured"):
            assert_scored_or_explained(score_run(make_run(**{column: text})))


@pytest.mark.parametrize("schedule", get_args(ScheduleName))
@pytest.mark.parametrize("vpp", [1, 2, 3])
def test_every_schedule_scores_or_says_why_not(make_run: MakeRun, schedule: str, vpp: int) -> None:
    assert_scored_or_explained(score_run(make_run(pp=2, vpp=vpp, schedule=schedule)))


def test_an_unknown_schedule_is_a_reason(make_run: MakeRun) -> None:
    row = score_run(make_run(pp=2, vpp=2, schedule="1f1"))
    assert (row.status, row.prediction) == ("skipped", None)
    assert "unknown value '1f1'; did you mean '1f1b'?" in row.reason


def test_interleaving_with_a_partial_group_is_a_reason(make_run: MakeRun) -> None:
    # 16 GPUs in 4 stages: 4 replicas of 6 micro-batches, a group of 4 and one of 2.
    row = score_run(make_run(pp=4, vpp=2, global_batch=24, software="megatron-core"))
    assert row.status == "skipped"
    assert "cannot run 6 micro-batches in groups of 4" in row.reason


def test_a_scored_row_has_errors_of_time_and_memory(make_run: MakeRun) -> None:
    row = score_run(make_run(measured_seconds=10, measured_memory_gib=50))
    assert row.prediction is not None
    assert row.time_error == pytest.approx(row.prediction.iteration_time / 10 - 1)
    assert row.memory_error == pytest.approx(row.prediction.peak_memory_bytes / (50 * 2**30) - 1)
    assert (row.status, row.reason, row.is_scorable) == ("scored", "", True)


@pytest.mark.parametrize("kind", ["reserved", "driver", "allocated", "allocated_last_rank"])
def test_memory_is_compared_by_what_the_row_read(make_run: MakeRun, kind: str) -> None:
    run = make_run(pp=4, schedule="1f1b", recompute="none", measured_memory_gib=40, memory_kind=kind)
    row = score_run(run)
    assert row.prediction is not None
    assert row.predicted_memory_bytes is not None
    memory = row.prediction.memory
    # Torch's allocator counts tensors: neither the context nor what it keeps in reserve.
    tensors = [sum(memory.row(stage).values()) - memory.framework[stage] for stage in range(4)]
    expected = {"allocated": max(tensors), "allocated_last_rank": tensors[-1]}
    assert row.predicted_memory_bytes == pytest.approx(expected.get(kind, row.prediction.peak_memory_bytes))
    assert row.memory_error == pytest.approx(row.predicted_memory_bytes / (40 * 2**30) - 1)
    assert tensors[-1] < max(tensors) < row.prediction.peak_memory_bytes


def test_a_run_that_does_not_fit_keeps_its_prediction(make_run: MakeRun) -> None:
    row = score_run(make_run(sharding="none"))
    assert row.status == "infeasible"
    assert row.prediction is not None
    assert row.prediction.peak_memory_bytes > row.prediction.usable_memory_bytes
    assert row.time_error is not None
    used, usable = (row.prediction.peak_memory_bytes, row.prediction.usable_memory_bytes)
    assert row.reason.startswith(f"predicted {used / 2**30:.1f} GiB of {usable / 2**30:.1f} GiB usable")


@pytest.mark.parametrize(("sharding", "status"), [("none", "infeasible"), ("zero3", "scored")])
def test_an_out_of_memory_row_is_compared_by_whether_it_fits(
    make_run: MakeRun, sharding: str, status: str
) -> None:
    row = score_run(make_run(measured="oom", measured_seconds="", sharding=sharding))
    assert (row.status, row.is_scorable) == (status, True)
    assert row.time_error is row.memory_error is None


def test_a_memory_only_row_is_scored_on_memory(make_run: MakeRun) -> None:
    row = score_run(make_run(measured="memory", measured_seconds="", measured_memory_gib=40))
    assert row.is_scorable
    assert row.time_error is None
    assert row.memory_error is not None


def test_other_measurements_and_blanks_are_not_scorable(make_run: MakeRun) -> None:
    assert not score_run(make_run(measured="other")).is_scorable
    assert score_run(make_run(measured="other")).time_error is None
    assert not score_run(make_run(measured="time", measured_seconds="")).is_scorable
    assert not score_run(make_run(measured="memory", measured_memory_gib="")).is_scorable


def test_a_row_that_leaves_its_plan_blank_is_no_gap_in_the_coverage(make_run: MakeRun) -> None:
    blank = score_run(make_run(micro_batch=""))
    assert (blank.status, blank.is_scorable, blank.reason) == ("skipped", False, "micro_batch is not stated")
    wrong = score_run(make_run(gpu="H100-79GB"))
    assert (wrong.status, wrong.is_scorable) == ("skipped", True)


def test_assumptions_are_among_the_reasons(make_run: MakeRun) -> None:
    row = score_run(make_run(vocab="", software="", gpu="MI300X"))
    assert "vocab 50304 assumed" in row.reason
    assert "software 'blank' borrows the overheads of megatron-core" in row.reason
    assert "estimate" in row.reason


def test_a_calibration_for_another_device_skips_the_row(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("schema_version: 2\nkind: calibration\ngpu: a100-sxm-80\n", encoding="utf-8")
    row = score_run(make_run(), [path])
    assert row.status == "skipped"
    assert "no given calibration is for h100-sxm-80" in row.reason


def test_rows_are_scored_in_order_and_progress_is_told(make_run: MakeRun) -> None:
    runs = [make_run(id=f"row-{index}", n_layers=index) for index in range(1, 4)]
    told: list[tuple[str, int, int]] = []
    scored = score_runs(runs, (), lambda *state: told.append(state))
    assert [row.run.id for row in scored] == ["row-1", "row-2", "row-3"]
    assert told == [("predicting runs", done, 3) for done in (1, 2, 3)]
    seconds = [row.prediction.iteration_time for row in scored if row.prediction]
    assert seconds == sorted(seconds)


def test_a_summary_counts_and_averages(make_run: MakeRun) -> None:
    predicted = score_run(make_run()).prediction
    assert predicted is not None
    # Measured so that the prediction is 10 % below, 20 % above and 40 % above.
    measured = [predicted.iteration_time / factor for factor in (0.9, 1.2, 1.4)]
    rows = [score_run(make_run(measured_seconds=seconds)) for seconds in measured]
    rows += [score_run(make_run(gpu="H100-79GB")), score_run(make_run(measured="other"))]
    summary = summarise("a", rows, "time")
    assert (summary.num_scored, summary.num_scorable, summary.coverage) == (3, 4, 0.75)
    assert summary.mean == pytest.approx((0.1 + 0.2 + 0.4) / 3)
    assert summary.median == pytest.approx(0.2)
    assert summary.bias == pytest.approx(0.2)
    assert summary.p90 == pytest.approx(0.36)


def test_the_interval_holds_a_share_of_the_scored_rows(make_run: MakeRun) -> None:
    predicted = score_run(make_run()).prediction
    assert predicted is not None
    inside = [predicted.low, predicted.iteration_time, predicted.high]
    outside = [predicted.low * 0.999]
    rows = [score_run(make_run(measured_seconds=seconds)) for seconds in inside + outside]
    assert [row.is_in_interval for row in rows] == [True, True, True, False]
    unscored = [
        score_run(make_run(recompute="")),
        score_run(make_run(measured="memory", measured_memory_gib=40)),
    ]
    assert [row.is_in_interval for row in unscored] == [None, None]
    assert summarise("a", rows + unscored, "time").in_interval == 0.75
    assert summarise("a", rows, "memory").in_interval is None


def test_a_run_that_ran_and_is_predicted_not_to_fit_is_counted(make_run: MakeRun) -> None:
    ran = [score_run(make_run(sharding=sharding)) for sharding in ("none", "zero3")]
    failed = score_run(make_run(measured="oom", measured_seconds="", sharding="none"))
    assert [row.is_wrongly_infeasible for row in (*ran, failed)] == [True, False, False]
    assert summarise("a", [*ran, failed], "memory").num_wrongly_infeasible == 1
    assert summarise("a", [failed], "time").num_wrongly_infeasible == 0


def test_a_group_without_anything_to_score_has_no_errors(make_run: MakeRun) -> None:
    empty = summarise("a", [], "memory")
    assert (empty.num_scorable, empty.coverage, empty.mean, empty.p90) == (0, 1.0, None, None)
    assert summarise("a", [], "time").in_interval is None
    skipped = summarise("b", [score_run(make_run(gpu="H100-79GB"))], "time")
    assert (skipped.num_scored, skipped.num_scorable, skipped.coverage) == (0, 1, 0.0)
    assert skipped.median is None


def test_result_columns_are_the_documented_ones() -> None:
    assert ",".join(RESULT_COLUMNS) == (
        "id,source,status,reason,measured_seconds,predicted_seconds,predicted_low_seconds,"
        "predicted_high_seconds,measured_memory_gib,predicted_memory_gib"
    )
