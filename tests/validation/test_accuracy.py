"""Accuracy is a test: errors against published training runs, by source, may not grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshwright.profiler.accuracy import POOLS, pooled
from meshwright.profiler.measured_runs import read_measured_runs
from meshwright.profiler.ranking import ranking
from meshwright.profiler.validation import ErrorSummary, Quantity, ScoredRun, score_runs, summarise

pytestmark = pytest.mark.validation

TABLE = Path(__file__).with_name("training_runs.csv")
# Sources by the prefix of their rows' ids: mean |predicted / measured - 1| of the timed rows, in percent, as
# this release predicts them. Lower it when a model improves; raising it takes a reason in the change log.
TODAY = {
    "internevo": 4.0,
    "kort": 2.9,
    "llmf": 1.6,
    "mbridge": 6.5,
    "mtnlg": 20.1,
    "sc21": 2.9,
    "tt": 3.0,
    "v100": 3.8,
    "vocab": 2.5,
    "zb": 5.7,
}
# Sources with groups of rival plans: most that choosing by prediction costs over the best measured plan of a group,
# in percent, as this release does. The same rule as above.
REGRET_TODAY = {"internevo": 0.4, "tt": 0.0, "v100": 0.0, "vocab": 3.3, "zb": 0.0}
# An error may grow by this much (percentage points) before the test fails: rounding of the table above.
SLACK = 0.5


def prefix(row: ScoredRun) -> str:
    return row.run.id.rsplit("-", 1)[0]


@dataclass(frozen=True)
class Scores:
    """The scored table, read once."""

    rows: tuple[ScoredRun, ...]

    def chosen(self, keep: Callable[[ScoredRun], bool]) -> list[ScoredRun]:
        return [row for row in self.rows if keep(row)]

    def trusted(self, source: str) -> list[ScoredRun]:
        """Rows of a source that were read or recalled as they stand: not noisy, not duplicates."""
        return self.chosen(lambda row: prefix(row) == source and row.run.quality in ("ok", "recalled"))


@pytest.fixture(scope="module")
def scores() -> Scores:
    return Scores(score_runs(read_measured_runs(TABLE), (), lambda doing, done, total: None))


def percent(value: float | None) -> float:
    assert value is not None
    return 100.0 * value


def line(summary: ErrorSummary, quantity: Quantity) -> str:
    figures = (summary.mean, summary.median, summary.bias, summary.p90)
    shown = "".join(f"{'-' if value is None else f'{value:.1%}':>9}" for value in figures)
    return f"{quantity:<8}{summary.name:<12}{summary.num_scorable:>5}{summary.num_scored:>8}{shown}"


def test_the_error_table_is_printed(scores: Scores, capsys: pytest.CaptureFixture[str]) -> None:
    quantities: tuple[Quantity, ...] = ("time", "memory")
    lines = [
        line(summary, quantity)
        for quantity in quantities
        for source in sorted({prefix(row) for row in scores.rows})
        if (summary := summarise(source, scores.trusted(source), quantity)).num_scorable
    ]
    with capsys.disabled():
        print("\n\n        source       rows  scored     mean   median     bias      p90")
        print("\n".join(lines))
    assert len(lines) >= len(TODAY)


@pytest.mark.parametrize("source", sorted(TODAY))
def test_the_mean_error_of_a_source_does_not_grow(scores: Scores, source: str) -> None:
    summary = summarise(source, scores.trusted(source), "time")
    assert percent(summary.mean) <= TODAY[source] + SLACK


def test_every_source_with_a_scored_time_is_watched(scores: Scores) -> None:
    timed = scores.chosen(lambda row: row.time_error is not None and row.run.quality in ("ok", "recalled"))
    assert {prefix(row) for row in timed} == set(TODAY)


@pytest.mark.parametrize(("source", "gate"), [("kort", 5.0), ("sc21", 6.0)])
def test_the_megatron_papers_are_met(scores: Scores, source: str, gate: float) -> None:
    assert percent(summarise(source, scores.trusted(source), "time").mean) <= gate


@pytest.mark.parametrize("source", sorted(TODAY))
def test_the_median_error_of_a_source_is_below_six_percent(scores: Scores, source: str) -> None:
    summary = summarise(source, scores.trusted(source), "time")
    if summary.num_scored >= 5:
        assert percent(summary.median) <= 6.0
    else:
        assert source in ("mbridge", "mtnlg", "v100")


def test_asynchronous_tensor_parallelism_is_met(scores: Scores) -> None:
    # Four of the twelve rows quantise row by row, which no column says: they come out 26 to 35 % too fast.
    rows = scores.chosen(lambda row: "asyncTP" in row.run.source)
    assert len(rows) == 12
    assert percent(summarise("asyncTP", rows, "time").median) <= 6.0


def test_nearly_every_timed_dense_row_is_scored(scores: Scores) -> None:
    timed = scores.chosen(
        lambda row: (
            row.run.quality == "ok"
            and row.run.measured == "time"
            and row.run.cell("n_experts") in ("", "0", "1")
        )
    )
    assert len(timed) > 200
    assert summarise("ok", timed, "time").coverage >= 0.95


def test_rows_without_a_prediction_say_what_they_lack(scores: Scores) -> None:
    for row in scores.chosen(lambda row: row.status == "skipped"):
        assert "not stated" in row.reason or "not costed yet" in row.reason, row.run.id


@pytest.mark.parametrize(("source", "num_rows"), [("vocab", 39), ("zb", 36)])
def test_memory_of_the_pipeline_schedules_is_met(scores: Scores, source: str, num_rows: int) -> None:
    summary = summarise(source, scores.trusted(source), "memory")
    assert summary.num_scored == num_rows
    assert percent(summary.median) <= 3.0


@pytest.mark.parametrize(("model", "num_rows", "most"), [("8B", 12, 6.0), ("70B", 2, 8.0), ("405B", 5, 8.0)])
def test_memory_of_every_run_under_fsdp_is_met(
    scores: Scores, model: str, num_rows: int, most: float
) -> None:
    rows = scores.chosen(lambda row: row.run.id.startswith("tt-") and row.run.cell("model").endswith(model))
    errors = [abs(row.memory_error) for row in rows if row.memory_error is not None]
    assert len(errors) == num_rows
    assert 100.0 * max(errors) <= most


def test_four_rows_in_five_lie_in_the_predicted_interval(scores: Scores) -> None:
    inside = [
        row.prediction.low <= row.run.measured_seconds <= row.prediction.high
        for row in scores.rows
        if row.prediction
        and row.run.measured_seconds
        and row.run.quality == "ok"
        and row.time_error is not None
    ]
    assert len(inside) > 200
    assert sum(inside) / len(inside) >= 0.8


def test_the_sources_medians_are_met_on_average(scores: Scores) -> None:
    pool = pooled(scores.rows, POOLS[0])
    assert pool.is_claimed
    assert pool.num_sources >= 9
    assert percent(pool.macro_median) <= 4.5
    assert percent(pool.rows.time.p90) <= 11.0
    assert abs(percent(pool.rows.time.bias)) <= 3.0


def test_the_figures_hold_with_the_recalled_rows(scores: Scores) -> None:
    pool = pooled(scores.rows, POOLS[1])
    assert pool.rows.time.num_scored > 250
    assert percent(pool.rows.time.p90) <= 11.0
    assert percent(pool.macro_median) <= 4.5


@pytest.mark.parametrize("source", sorted(REGRET_TODAY))
def test_choosing_by_prediction_costs_no_more_than_today(scores: Scores, source: str) -> None:
    summary = ranking(source, scores.trusted(source))
    assert summary.num_groups > 0
    assert percent(summary.max_regret) <= REGRET_TODAY[source] + SLACK


def test_every_source_with_rival_plans_is_watched(scores: Scores) -> None:
    sources = {prefix(row) for row in scores.rows}
    assert {each for each in sources if ranking(each, scores.trusted(each)).num_groups} == set(REGRET_TODAY)


def test_fp8_with_one_scale_per_row_is_told_from_one_per_tensor(scores: Scores) -> None:
    """torchtitan 2025-06: four runs took up to 1.51 times as long as the same plans with the other recipe."""
    by_row = [row for row in scores.rows if "float8_rowwise" in row.run.cell("features")]
    assert [row.run.id for row in by_row] == ["tt-23", "tt-24", "tt-29", "tt-30"]
    assert all(row.time_error is not None and abs(row.time_error) <= 0.07 for row in by_row)


def test_plans_of_a_job_are_ordered_better_than_by_chance(scores: Scores) -> None:
    for source in sorted(REGRET_TODAY):
        tau = ranking(source, scores.trusted(source)).group_tau
        assert tau is not None
        assert tau >= 0.4, source
