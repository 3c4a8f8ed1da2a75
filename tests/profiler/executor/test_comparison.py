"""Predicted against measured: which terms stand beside each other, and what is left of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.costmodels.breakdown import iteration_breakdown
from meshwright.costmodels.context import cost_context
from meshwright.costmodels.prediction import predict
from meshwright.profiler.executor.comparison import (
    ComparedTerm,
    compare,
    compare_traffic,
    comparison_mapping,
    shared_cores,
)
from meshwright.profiler.executor.report import GroupTraffic, merge_reports
from meshwright.simcore.domain.plan import ParallelPlan


def compared(job, plan, report, *, is_same_device=True, device="cpu"):
    context = cost_context(job)
    prediction = predict(context, plan)
    breakdown = iteration_breakdown(context, plan, prediction.iteration)
    return (
        prediction,
        breakdown,
        compare(plan, prediction, breakdown, report, device=device, is_same_device=is_same_device),
    )


def test_the_terms_of_a_data_parallel_step_add_up(job, make_report, plan):
    report = merge_reports([make_report(rank) for rank in range(2)])
    prediction, breakdown, comparison = compared(job, plan, report)
    assert [term.name for term in comparison.terms] == [
        "iteration",
        "compute",
        "data parallel",
        "optimizer",
        "peak memory",
    ]
    parts = comparison.terms[1:4]
    assert sum(term.predicted for term in parts) == pytest.approx(prediction.iteration_time)
    assert sum(term.measured for term in parts) == pytest.approx(comparison.term("iteration").measured)
    assert comparison.term("compute").measured == pytest.approx(0.15)
    assert comparison.term("data parallel").measured == pytest.approx(0.025)
    assert comparison.term("optimizer").predicted == breakdown.grouped(0)["optimizer"]
    assert comparison.term("peak memory").measured == 1001


def test_on_a_processor_compute_and_optimizer_are_compared_in_cpu_time_too(job, make_report, plan):
    phases = {
        "forward": (0.01, 0.02, 0.03),
        "backward": (0.04, 0.05, 0.06),
        "gradient_sync": (0.25, 0.5, 0.75),
        "optimizer": (9.0, 9.0, 9.0),
    }
    report = merge_reports([make_report(rank, phase_cpu_seconds=phases) for rank in range(2)])
    *_, comparison = compared(job, plan, report)
    term = comparison.term("compute in CPU time")
    assert term.measured == pytest.approx(0.07)
    assert term.predicted == comparison.term("compute").predicted
    update = comparison.term("optimizer in CPU time")
    assert update.measured == pytest.approx(9.5)
    assert update.predicted == comparison.term("optimizer").predicted
    # 0.15 s of wall time.
    assert "2.1 times its CPU time" in (shared_cores(comparison, 2, 2) or "")
    assert "2 ranks shared 1 cores" in (shared_cores(comparison, 2, 1) or "")
    *_, on_gpus = compared(job, plan, report, device="cuda")
    assert not [term for term in on_gpus.terms if "CPU time" in term.name]
    assert shared_cores(on_gpus, 2, 1) is None


def test_collectives_called_inside_forward_and_backward_are_not_compute(job, make_report):
    plan = ParallelPlan(dp=1, tp=2, micro_batch_size=1, schedule="none", layers_per_stage=(2,))
    split = tuple(
        GroupTraffic(axis="tp", operation=operation, num_messages=2, num_bytes=8, seconds=0.03)
        for operation in ("all_gather", "reduce_scatter")
    )
    report = merge_reports([make_report(rank, traffic=split) for rank in range(2)])
    *_, comparison = compared(job, plan, report)
    assert comparison.term("tensor parallel").measured == pytest.approx(0.06)
    assert comparison.term("compute").measured == pytest.approx(0.09)
    # Nothing to synchronise: what is left after the backward is the gradient norm.
    assert comparison.term("optimizer").measured == pytest.approx(0.05)
    assert "data parallel" not in [term.name for term in comparison.terms]


def test_fully_sharded_weights_are_gathered_inside_forward_and_backward(job, make_report, plan):
    report = merge_reports([make_report(rank) for rank in range(2)])
    *_, comparison = compared(job, replace(plan, sharding="zero3"), report)
    assert comparison.term("data parallel").measured == pytest.approx(0.05 + 0.025)
    assert comparison.term("compute").measured == pytest.approx(0.15 - 0.05)


def test_a_pipeline_is_compared_on_its_busiest_stage(job, make_report):
    plan = ParallelPlan(dp=1, pp=2, micro_batch_size=1, schedule="1f1b", layers_per_stage=(1, 1))
    sends = (GroupTraffic(axis="pp", operation="send", num_messages=8, num_bytes=8, seconds=0.125),)
    phases = {"forward": (0.05,), "backward": (0.1,), "wait": (0.25,)}
    report = merge_reports(
        [
            make_report(rank, stage=rank, seconds=(0.5,), traffic=sends * rank, phase_seconds=phases)
            for rank in range(2)
        ]
    )
    _, breakdown, comparison = compared(job, plan, report)
    assert comparison.stage == breakdown.busiest_stage == 1
    waiting = comparison.term("pipeline (sends and bubble)")
    grouped = breakdown.grouped(1)
    assert waiting.measured == 0.375
    assert waiting.predicted == grouped["pipeline sends"] + grouped["pipeline bubble"] > 0.0


def test_traffic_is_summed_over_the_ranks_and_what_nobody_predicts_shows(execution, make_report):
    num_parameters = 2 * (64 * (64 + 64) + 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64 + 2 * 256 * 64
    num_bytes = 4 * num_parameters

    def report(size, *more):
        row = GroupTraffic(axis="dp", operation="all_reduce", num_messages=1, num_bytes=size, seconds=0.5)
        return merge_reports([make_report(rank, traffic=(row, *more)) for rank in range(2)])

    found = {each.axis: each for each in compare_traffic(execution, report(num_bytes))}
    assert found["dp"].is_exact
    assert found["dp"].measured_bytes == 2 * num_bytes
    assert found["dp"].seconds == 0.5
    # What a rank should have sent and did not, what it sent and should not have, and one byte too many.
    assert not found["world"].is_exact
    stray = GroupTraffic(axis="tp", operation="send", num_messages=1, num_bytes=1, seconds=0.0)
    found = {each.axis: each for each in compare_traffic(execution, report(num_bytes + 1, stray))}
    assert not found["dp"].is_exact
    assert (found["tp"].predicted_messages, found["tp"].measured_messages) == (0, 2)


def test_errors_are_relative_to_what_was_measured_and_absent_without_it():
    assert ComparedTerm(name="x", predicted=1.1, measured=1.0, unit="s").error == pytest.approx(0.1)
    assert ComparedTerm(name="x", predicted=1.1, measured=0.0, unit="s").error is None


def test_another_device_gives_no_errors(job, make_report, plan):
    report = merge_reports([make_report(rank) for rank in range(2)])
    *_, comparison = compared(job, plan, report, is_same_device=False)
    mapping = comparison_mapping(comparison)
    assert {term["error"] for term in mapping["terms"]} == {None}
    assert mapping["is_inside_interval"] is None
    *_, same = compared(job, plan, report)
    assert None not in {term["error"] for term in comparison_mapping(same)["terms"]}
    assert comparison_mapping(same)["is_inside_interval"] is (same.low <= 0.2 <= same.high)
