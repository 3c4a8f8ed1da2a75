"""Pools of rows: which rows count, and what each source counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from meshwright.profiler.accuracy import POOLS, pooled, source_accuracies
from meshwright.profiler.measured_runs import MeasuredRun
from meshwright.profiler.validation import ScoredRun, score_run

MakeRun = Callable[..., MeasuredRun]


@pytest.fixture
def off(make_run: MakeRun) -> Callable[..., ScoredRun]:
    """Return a row measured so that its prediction is off by a share."""
    predicted = score_run(make_run()).prediction
    assert predicted is not None
    seconds = predicted.iteration_time

    def row(error: float, **cells: object) -> ScoredRun:
        return score_run(make_run(measured_seconds=seconds / (1.0 + error), **cells))

    return row


def test_every_source_counts_alike_in_the_macro_median(off: Callable[..., ScoredRun]) -> None:
    rows = [off(0.02, source="long") for _ in range(5)] + [off(0.10, source="short")]
    pool = pooled(rows, ("ok",))
    assert pool.macro_median == pytest.approx(0.06)
    assert pool.num_sources == 2
    assert pool.rows.time.median == pytest.approx(0.02)


def test_a_pool_holds_its_qualities_and_no_other(off: Callable[..., ScoredRun]) -> None:
    rows = [off(0.02), off(0.10, source="b", quality="recalled"), off(0.5, source="c", quality="noisy")]
    trusted, more = (pooled(rows, qualities) for qualities in POOLS)
    assert (trusted.rows.time.num_scored, trusted.macro_median) == (1, pytest.approx(0.02))
    assert (more.rows.time.num_scored, more.macro_median) == (2, pytest.approx(0.06))
    assert [(each.quality, each.name) for each in source_accuracies(rows)] == [
        ("ok", "a paper"),
        ("noisy", "c"),
        ("recalled", "b"),
    ]


@pytest.mark.parametrize(("num_skipped", "is_claimed"), [(1, True), (2, False)])
def test_a_headline_takes_95_percent_of_the_rows(
    off: Callable[..., ScoredRun], num_skipped: int, is_claimed: bool
) -> None:
    rows = [off(0.02) for _ in range(19)] + [off(0.02, gpu="H100-79GB") for _ in range(num_skipped)]
    assert pooled(rows, ("ok",)).is_claimed is is_claimed


def test_nothing_scored_claims_nothing(off: Callable[..., ScoredRun]) -> None:
    pool = pooled([off(0.02, recompute="")], ("ok",))
    assert (pool.macro_median, pool.num_sources, pool.is_claimed) == (None, 0, False)
