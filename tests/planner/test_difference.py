"""What differs between plans, and the sentences that say what it does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.costmodels.context import cost_context
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.difference import (
    field_differences,
    figure_differences,
    memory_differences,
    speed_sentence,
    term_differences,
)
from meshwright.planner.explanation import explain_plan, memory_reason, time_reason
from meshwright.planner.plan_file import read_plan
from meshwright.planner.variant import force_fields, parse_fields

PLAN = Path(__file__).resolve().parents[2] / "examples" / "llama-3-70b-interleaved.plan.yaml"


@pytest.fixture(scope="module")
def document():
    return read_plan(PLAN)


@pytest.fixture(scope="module")
def explained(document):
    return explain_plan(cost_context(document.job), document.plan)


def variant_of(document, text):
    return force_fields(document.job.model, document.job.cluster, document.plan, parse_fields(text))


@pytest.fixture(scope="module")
def variant(document):
    return explain_plan(cost_context(document.job), variant_of(document, "tp=4,pp=8"))


def test_equal_documents_do_not_differ(document):
    assert field_differences(document, read_plan(PLAN)) == ()


def test_every_part_of_a_document_is_compared(document):
    cluster = resolve_cluster("dgx-h200:8")
    workload = replace(document.job.workload, sequence_length=4096)
    model = replace(document.job.model, num_layers=40, name="half")
    job = replace(document.job, model=model, cluster=cluster, workload=workload, software="megatron-2024")
    plan = replace(document.plan, micro_batch_size=2, recompute="full")
    found = {
        (each.section, each.key): (each.first, each.second)
        for each in field_differences(document, replace(document, job=job, plan=plan))
    }
    assert found["plan", "micro_batch_size"] == (1, 2)
    assert found["plan", "recompute"] == ("none", "full")
    assert found["model", "num_layers"] == (80, 40)
    assert found["model", "name"] == ("llama-3-70b", "half")
    assert found["cluster", "node.gpu.id"] == ("h100-sxm-80", "h200-sxm-141")
    assert found["workload", "sequence_length"] == (8192, 4096)
    assert found["job", "software"] == ("megatron-core", "megatron-2024")
    assert not any("sources" in key or key.endswith("vendor") for _, key in found)


def test_what_one_cluster_lacks_is_a_difference(document):
    job = replace(document.job, cluster=resolve_cluster("l4-8:8"))
    found = {each.key: each for each in field_differences(document, replace(document, job=job))}
    assert found["node.gpu.scale_up.kind"].first == "nvlink4"
    assert found["node.gpu.scale_up.kind"].second is None


def test_terms_add_up_on_both_sides(explained, variant):
    *terms, total = term_differences(explained, variant)
    assert total.name == "iteration time"
    assert sum(each.first for each in terms) == pytest.approx(total.first, rel=1e-9)
    assert sum(each.second for each in terms) == pytest.approx(total.second, rel=1e-9)
    assert sum(each.change for each in terms) == pytest.approx(total.change, rel=1e-6)


def test_memory_ends_with_the_peak_and_the_capacity(explained, variant):
    rows = memory_differences(explained.prediction, variant.prediction)
    *uses, peak, usable = rows
    assert (peak.name, usable.name) == ("peak", "usable")
    assert sum(each.first for each in uses) == pytest.approx(peak.first)
    assert usable.change == 0.0


def test_figures_are_those_of_the_predictions(explained, variant):
    rows = {each.name: each for each in figure_differences(explained, variant)}
    assert rows["MFU"].second == variant.prediction.mfu
    assert rows["tokens/s"].first == pytest.approx(
        explained.context.workload.num_tokens / explained.prediction.iteration_time
    )
    assert rows["GPUs"].change == 0.0


def test_the_sentence_gives_the_verdict_and_the_terms_behind_it(explained, variant):
    text = speed_sentence(explained, variant, "the other")
    ratio = variant.prediction.iteration_time / explained.prediction.iteration_time
    word = f"{ratio - 1.0:.1%} longer" if ratio > 1.0 else f"{1.0 - ratio:.1%} less time"
    assert f"the other takes {word} per iteration: " in text
    assert "less tensor parallel" in text
    back = speed_sentence(variant, explained)
    assert "more tensor parallel" in back


def test_a_plan_takes_as_long_as_itself(explained):
    assert speed_sentence(explained, explained) == (
        "the second plan takes as long per iteration; every term is within 0.2%."
    )


def test_other_workloads_are_compared_per_token(document, explained):
    workload = replace(document.job.workload, global_batch_size=64)
    job = replace(document.job, workload=workload)
    other = explain_plan(cost_context(job), document.plan)
    assert "less time per token" in speed_sentence(explained, other)


def test_the_reason_names_work_and_the_largest_losses(explained):
    text = time_reason(explained)
    groups = explained.breakdown.grouped(explained.breakdown.busiest_stage)
    useful = (groups["compute"] + groups["embedding and head"]) / explained.breakdown.iteration_time
    assert f"computes the model for {useful:.1%} of" in text
    losses = {
        name: seconds for name, seconds in groups.items() if name not in ("compute", "embedding and head")
    }
    largest = max(losses, key=lambda name: losses[name])
    assert f"the largest losses are {largest} " in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("recompute=full", "recompute"),
        ("schedule=gpipe", "pipeline bubble"),
        ("tp=2,pp=1,sharding=zero3,recompute=full", "gathers weights and reduces gradients over 32 ranks"),
    ],
)
def test_a_loss_is_named_with_its_cause(document, text, says):
    plan = variant_of(document, text)
    assert says in time_reason(explain_plan(cost_context(document.job), plan))


def test_memory_says_how_full_the_fullest_stage_is(document, explained):
    text = memory_reason(explained)
    assert text.startswith(f"stage {explained.prediction.fullest_stage} is the fullest with 55.")
    assert f"{explained.prediction.memory_headroom:.1%} stay free" in text
    crowded = explain_plan(cost_context(document.job), variant_of(document, "tp=2,pp=4"))
    assert "DOES NOT FIT" in memory_reason(crowded)
