"""Rank correlation and regret: what they must be on orders made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.profiler.measured_runs import MeasuredRun
from meshwright.profiler.ranking import kendall_tau, plan_groups, ranking, regret
from meshwright.profiler.validation import ScoredRun, score_run

MakeRun = Callable[..., MeasuredRun]
TIMES = st.lists(st.floats(min_value=0.1, max_value=10.0), min_size=2, max_size=12)
PAIRS = st.lists(
    st.tuples(st.floats(min_value=0.1, max_value=10.0), st.floats(min_value=0.1, max_value=10.0)),
    min_size=1,
    max_size=12,
)
# Four plans of one job; the last keeps everything on every rank.
SHARDINGS = ("zero1", "zero2", "zero3", "none")


def test_tau_counts_concordant_pairs() -> None:
    # Of the six pairs of four rows one is swapped: (5 - 1) / 6.
    assert kendall_tau([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]) == pytest.approx(4 / 6)


def test_tau_corrects_for_ties() -> None:
    # Pairs: 5 concordant, 1 tied among the measured; (5 - 0) / sqrt(5 x 6).
    assert kendall_tau([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(5 / 30**0.5)


@pytest.mark.parametrize(("measured", "predicted"), [([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0])])
def test_tau_of_nothing_to_order_is_none(measured: list[float], predicted: list[float]) -> None:
    assert kendall_tau(measured, predicted) is None
    assert kendall_tau(predicted, measured) is None


@given(TIMES)
def test_tau_is_one_for_the_same_order_and_minus_one_for_the_reverse(times: list[float]) -> None:
    if len(set(times)) > 1:
        assert kendall_tau(times, [2.0 * time for time in times]) == pytest.approx(1.0)
        assert kendall_tau(times, [-time for time in times]) == pytest.approx(-1.0)


@given(PAIRS)
def test_regret_lies_between_none_and_that_of_the_worst_plan(pairs: list[tuple[float, float]]) -> None:
    measured, predicted = zip(*pairs, strict=True)
    found = regret(measured, predicted)
    assert 0.0 <= found + 1e-12 <= max(measured) / min(measured) - 1.0 + 2e-12
    # A common error of all predictions changes no choice.
    assert regret(measured, [3.0 * time for time in predicted]) == pytest.approx(found)
    assert regret(measured, measured) == pytest.approx(0.0, abs=1e-8)


def test_regret_is_what_the_chosen_plan_costs_more() -> None:
    assert regret([1.0, 1.25, 2.0], [1.3, 1.2, 2.0]) == pytest.approx(0.25)


def test_plans_predicted_alike_count_with_their_mean_in_any_order() -> None:
    assert regret([1.0, 1.5, 2.0], [1.0, 1.0, 3.0]) == pytest.approx(0.25)
    assert regret([1.5, 1.0, 2.0], [1.0, 1.0, 3.0]) == pytest.approx(0.25)


def rivals(make_run: MakeRun, seconds: tuple[float, ...], **cells: object) -> list[ScoredRun]:
    """Plans of one job that differ in their sharding, with the measured times given."""
    return [
        score_run(make_run(sharding=sharding, measured_seconds=each, n_layers=4, **cells))
        for sharding, each in zip(SHARDINGS, seconds, strict=True)
    ]


def predicted_order(rows: list[ScoredRun]) -> list[int]:
    times = [row.prediction.iteration_time for row in rows if row.prediction]
    return sorted(range(len(times)), key=times.__getitem__)


def test_a_group_ordered_as_measured_has_no_regret(make_run: MakeRun) -> None:
    rows = rivals(make_run, (10.0, 10.0, 10.0, 10.0))
    for place, index in enumerate(predicted_order(rows)):
        rows[index] = replace(rows[index], run=replace(rows[index].run, measured_seconds=10.0 + place))
    summary = ranking("a", rows)
    assert (summary.num_groups, summary.num_grouped) == (1, 4)
    assert summary.mean_regret == summary.max_regret == 0.0
    assert summary.tau == summary.group_tau
    assert summary.tau is not None
    assert summary.tau > 0.9


def test_a_group_ordered_against_the_measurement_has_the_regret_of_its_choice(make_run: MakeRun) -> None:
    rows = rivals(make_run, (10.0, 10.0, 10.0, 10.0))
    for place, index in enumerate(reversed(predicted_order(rows))):
        rows[index] = replace(rows[index], run=replace(rows[index].run, measured_seconds=10.0 + place))
    summary = ranking("a", rows)
    assert summary.tau is not None
    assert summary.tau < -0.9
    assert summary.max_regret is not None
    assert summary.max_regret >= 0.2


@pytest.mark.parametrize(
    "cells",
    [{"n_gpus": 32}, {"seq_len": 4096}, {"hidden": 5120}, {"gpu": "H200-141GB-SXM"}, {"source": "elsewhere"}],
)
def test_rivals_share_the_job_and_the_source(make_run: MakeRun, cells: dict[str, object]) -> None:
    rows = rivals(make_run, (10.0, 11.0, 12.0, 13.0))
    other = score_run(make_run(n_layers=4, sharding="zero3", **cells))
    assert [len(group) for group in plan_groups([*rows, other])] == [4]
    assert plan_groups([*rows[:3], other]) == ()


def test_a_model_is_its_shape_not_its_name(make_run: MakeRun) -> None:
    rows = rivals(make_run, (10.0, 11.0, 12.0, 13.0))
    renamed = score_run(make_run(n_layers=4, sharding="zero3", model="some-8b again"))
    assert [len(group) for group in plan_groups([*rows[:3], renamed])] == [4]


def test_rows_whose_batch_differs_form_one_group_compared_by_tokens(make_run: MakeRun) -> None:
    batches = (64, 128, 256, 512)
    rows = [score_run(make_run(n_layers=4, global_batch=batch)) for batch in batches]
    # Measured so that each token takes as long as predicted: the order by token is the predicted one.
    rows = [
        replace(row, run=replace(row.run, measured_seconds=row.prediction.iteration_time))
        for row in rows
        if row.prediction
    ]
    assert [len(group) for group in plan_groups(rows)] == [4]
    summary = ranking("a", rows)
    assert summary.max_regret == pytest.approx(0.0)
    assert summary.group_tau == pytest.approx(1.0)
    # By iteration the smallest batch is fastest, by token the largest: the best plan made slow is a regret.
    slow = replace(rows[-1], run=replace(rows[-1].run, measured_seconds=2.0 * rows[-1].run.measured_seconds))
    worse = ranking("a", [*rows[:-1], slow])
    assert worse.max_regret is not None
    assert worse.max_regret > 0.5


def test_a_batch_with_four_rows_is_a_group_of_its_own(make_run: MakeRun) -> None:
    rows = rivals(make_run, (10.0, 11.0, 12.0, 13.0))
    odd = [score_run(make_run(n_layers=4, global_batch=batch)) for batch in (128, 256, 512)]
    assert [len(group) for group in plan_groups([*rows, *odd])] == [4]
    more = [*odd, score_run(make_run(n_layers=4, global_batch=1024))]
    assert [len(group) for group in plan_groups([*rows, *more])] == [4, 4]


def test_reruns_of_one_plan_are_no_choice(make_run: MakeRun) -> None:
    rerun = [score_run(make_run(measured_seconds=seconds)) for seconds in (10.0, 10.2, 10.4, 10.6)]
    assert plan_groups(rerun) == ()
    assert ranking("a", rerun).mean_regret is None
    # Beside another plan they count once, with their mean: the better rerun is no better plan.
    other = score_run(make_run(sharding="zero2", measured_seconds=1000.0))
    summary = ranking("a", [*rerun, other])
    assert summary.num_groups == 1
    assert summary.max_regret in (pytest.approx(0.0), pytest.approx(1000.0 / 10.3 - 1.0))


def test_rows_without_a_prediction_are_in_no_order(make_run: MakeRun) -> None:
    rows = rivals(make_run, (10.0, 11.0, 12.0, 13.0))
    blank = score_run(make_run(n_layers=4, recompute=""))
    assert ranking("a", [*rows, blank]) == ranking("a", rows)
    empty = ranking("b", [blank])
    assert (empty.tau, empty.num_groups, empty.group_tau, empty.mean_regret) == (None, 0, None, None)
