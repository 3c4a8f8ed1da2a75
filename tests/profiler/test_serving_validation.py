from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshwright.errors import CalibrationError, SpecError
from meshwright.profiler.fitting.serving import fit_engine, search_constants, serving_document
from meshwright.profiler.serving_runs import ServingRun, read_serving_runs
from meshwright.profiler.serving_validation import (
    ScoredServingRun,
    ServingValidator,
    rank_correlations,
    summarise_serving,
)

TABLE = Path(__file__).parents[1] / "validation" / "serving_runs.csv"


def rows_of(engine: str, model: str, gpu: str, step: int = 1) -> list[ServingRun]:
    found = [
        run
        for run in read_serving_runs(TABLE)
        if run.quality == "ok"
        and not run.is_disaggregated
        and run.cell("engine") == engine
        and model in run.cell("model")
        and run.cell("gpu").startswith(gpu)
    ]
    return found[::step]


@pytest.fixture(scope="module")
def validator() -> ServingValidator:
    return ServingValidator()


@pytest.mark.parametrize(
    ("engine", "model", "gpu", "step", "tpot", "ttft"),
    [
        ("vllm", "Qwen3-32B", "H100", 6, 0.03, 0.15),
        ("trtllm", "DeepSeek-R1", "B200", 3, 0.1, 0.35),
        ("vllm", "gpt-oss", "H100", 6, 0.07, 0.12),
        ("trtllm", "Qwen3-32B", "H100", 16, 0.06, 0.25),
        ("sglang", "Qwen3-32B", "H100", 12, 0.04, 0.2),
        ("vllm", "MiniMax", "B200", 6, 0.14, 0.4),
        ("sglang", "DeepSeek-V3", "B200", 1, 0.06, 0.25),
        ("sglang", "DeepSeek-R1", "H200", 1, 0.12, 0.1),
    ],
)
def test_measured_runs_are_met(
    validator: ServingValidator, engine: str, model: str, gpu: str, step: int, tpot: float, ttft: float
) -> None:
    scored = [validator.score(run) for run in rows_of(engine, model, gpu, step)]
    errors = summarise_serving("rows", scored)
    assert errors.coverage == 1.0
    assert errors.tpot_median is not None
    assert errors.tpot_median < tpot
    assert errors.ttft_median is not None
    assert errors.ttft_median < ttft


def test_predictions_order_the_runs_of_one_model(validator: ServingValidator) -> None:
    scored = [validator.score(run) for run in rows_of("vllm", "70B", "H100", 5)]
    (rank,) = rank_correlations(scored)
    assert rank.num_rows == len(scored)
    assert rank.tpot > 0.97
    assert rank.ttft > 0.9


def test_rows_of_separate_pools_are_scored_on_decode_steps(validator: ServingValidator) -> None:
    run = next(run for run in read_serving_runs(TABLE) if run.is_disaggregated)
    row = validator.score(run)
    assert row.group == "disaggregated"
    assert row.ttft is None
    assert row.tpot is not None
    assert 0.2 < row.tpot / run.tpot_mean < 5.0


def test_a_row_that_does_not_fit_is_skipped_with_the_shortfall(validator: ServingValidator) -> None:
    run = rows_of("trtllm", "235B", "H100")[0]
    small = replace(run, cells={**run.cells, "tp": "1", "moe_tp": "1", "moe_ep": "1"})
    row = validator.score(small)
    assert row.status == "skipped"
    assert "GiB short of" in row.reason


def test_every_prediction_says_where_its_constants_come_from(validator: ServingValidator) -> None:
    row = validator.score(rows_of("vllm", "Qwen3-32B", "H100")[0])
    assert row.reason.startswith("engine constants: ")
    assert "fitted" in row.reason


def test_a_decode_batch_is_what_prefill_can_fill(validator: ServingValidator) -> None:
    run = next(run for run in read_serving_runs(TABLE) if run.id == "serve-00662")
    many = replace(run, cells={**run.cells, "prefill_workers": "50"})
    few, full = validator.score(run).tpot, validator.score(many).tpot
    assert few is not None
    assert full is not None
    assert few < full
    fewer_asked = validator.score(replace(many, cells={**many.cells, "decode_batch": "96"})).tpot
    assert fewer_asked is not None
    assert fewer_asked < full


def test_a_fit_finds_the_constant_that_made_the_runs() -> None:
    runs = rows_of("vllm", "70B", "H100", 16)[:3]
    hidden = ServingValidator(constants=lambda known: replace(known, step_latency=2.5e-3))
    made = [copied(hidden.score(run)) for run in runs]
    start = {"step_latency": 4e-4}
    found = search_constants(made, ["step_latency"], start, rounds=3)
    assert found["step_latency"] == pytest.approx(2.5e-3, rel=0.15)


def copied(row: ScoredServingRun) -> ServingRun:
    """The row as though it had been measured as predicted."""
    assert row.ttft is not None
    assert row.tpot is not None
    return replace(row.run, ttft_mean=row.ttft, tpot_mean=row.tpot)


def test_the_users_runs_make_a_calibration_or_are_too_few(tmp_path: Path) -> None:
    runs = rows_of("vllm", "70B", "H200")
    with pytest.raises(CalibrationError, match="2 usable runs, and a fit needs 3"):
        fit_engine(runs[:2])
    with pytest.raises(CalibrationError, match="3 runs do not support 4 constants; measure 1 more"):
        fit_engine(runs[:3], constants=("step_latency", "host_time", "kernel_time", "request_time"))
    with pytest.raises(SpecError, match="did you mean 'step_latency'"):
        fit_engine(runs[:3], constants=("step_latenci",))
    with pytest.raises(CalibrationError, match="calibrate each engine and device"):
        fit_engine([*runs[:2], rows_of("sglang", "Qwen3-32B", "H100")[0]])
    fit = fit_engine([runs[0], runs[1], runs[3]], constants=("step_latency",))
    assert (
        np.mean([abs(row.tpot_after) for row in fit.rows])
        <= np.mean([abs(row.tpot_before) for row in fit.rows]) + 0.02
    )
    document = serving_document(fit, TABLE, "mine")
    assert document.software == {"serving-vllm": dict(fit.constants)}
    assert document.gpu == "h200-sxm-141"
