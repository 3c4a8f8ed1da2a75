"""``meshwright explain``: terms that add up, why, and the forced plan."""

from __future__ import annotations

import json
import re

import pytest


def explain(meshwright, *arguments):
    outcome = meshwright("explain", *arguments)
    assert outcome.code == 0, outcome.stderr
    return outcome.stdout


def test_the_terms_of_every_stage_add_up(meshwright, pipeline_plan):
    result = json.loads(explain(meshwright, pipeline_plan, "--json"))
    assert result["kind"] == "training_explanation"
    assert result["schema_version"] == 1
    seconds = result["prediction"]["iteration_time_seconds"]
    assert len(result["seconds_per_stage"]) == 2
    for terms in result["seconds_per_stage"]:
        assert sum(terms.values()) == pytest.approx(seconds, rel=1e-9)
    assert result["prediction"]["basis"] == "prior of the same generation"
    assert result["interval_widths"]["prior of the same generation"] > 0.0
    assert "against" not in result


def test_tables_bars_and_reasons_are_shown(meshwright, pipeline_plan):
    text = explain(meshwright, pipeline_plan)
    for words in (
        "Where the time goes",
        "pipeline bubble",
        "share",
        "Why: stage ",
        "the largest losses are ",
        "Memory of one rank",
        "Memory: stage ",
        "80 % interval: ",
        "It rests on: prior of the same generation",
        "Calibration: ",
    ):
        assert words in text


def test_a_bar_is_as_long_for_every_stage_and_drawn_to_scale(meshwright, pipeline_plan):
    bars = re.findall(r"^stage \d \|(.*)\|$", explain(meshwright, pipeline_plan), re.MULTILINE)
    assert len(bars) == 2
    assert {len(bar) for bar in bars} == {100}
    result = json.loads(explain(meshwright, pipeline_plan, "--json"))
    seconds = result["prediction"]["iteration_time_seconds"]
    for bar, terms in zip(bars, result["seconds_per_stage"], strict=True):
        assert bar.count("#") == pytest.approx(100.0 * terms["compute"] / seconds, abs=1.0)


def test_the_memory_bar_ends_with_what_is_free(meshwright, plan_file):
    text = explain(meshwright, plan_file)
    bar = re.search(r"memory \|(.*)\|", text).group(1)
    result = json.loads(explain(meshwright, plan_file, "--json"))
    assert len(bar) == 100
    assert bar.count("_") == pytest.approx(100.0 * result["prediction"]["memory_headroom"], abs=1.0)


def test_a_forced_plan_is_compared_term_by_term(meshwright, plan_file):
    text = explain(meshwright, plan_file, "--against", "recompute=full")
    assert "Against " in text
    assert "recompute full" in text
    assert "forced plan" in text
    assert "more recompute" in text
    result = json.loads(explain(meshwright, plan_file, "--against", "recompute=full", "--json"))
    change = result["against"]["difference_seconds"]
    assert change.pop("iteration time") == pytest.approx(sum(change.values()), rel=1e-6)
    assert result["against"]["plan"]["recompute"] == "full"
    assert result["against"]["violation"] is None


def test_a_forced_plan_equal_to_the_plan_is_said_to_be_it(meshwright, plan_file):
    assert "That is this plan." in explain(meshwright, plan_file, "--against", "recompute=none")


@pytest.mark.parametrize(
    ("against", "says"),
    [
        ("micro_batch_size=3", "by constraint 'batch' (dp x micro-batch divides the global batch)"),
        ("ep=2", "by constraint 'expert_parallel'"),
    ],
)
def test_a_forced_plan_that_cannot_run_is_told_by_its_constraint(meshwright, plan_file, against, says):
    text = explain(meshwright, plan_file, "--against", against)
    assert "It cannot run, " in text
    assert says in text
    assert "forced plan" not in text.split("Against ")[1]
    result = json.loads(explain(meshwright, plan_file, "--against", against, "--json"))
    assert result["against"]["prediction"] is None
    assert result["against"]["violation"]["numbers"]


def test_memory_that_overflows_is_told_in_gib(meshwright, plan_file):
    text = explain(
        meshwright,
        plan_file,
        "--against",
        "tp=1,pp=1,sharding=none,micro_batch_size=2",
        "--memory-headroom",
        "50 %",
    )
    assert re.search(
        r"by constraint 'memory' .*needs \d+\.\d\d GiB, 22\.05 GiB are usable, 50% of them to stay free: "
        r"\d+\.\d\d GiB too much",
        text,
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--against", "tp=7"), "does not divide the plan's 8 GPUs"),
        (("--against", "dp=64"), "but the cluster has 8"),
        (("--against", "tpp=2"), "unknown plan field 'tpp'; did you mean 'tp'?"),
        (("--against", "tp"), "'tp': write field=value"),
        (("--against", "tp=1,sequence_parallel=yes"), "sequence_parallel needs tp > 1"),
        (("--memory-headroom", "5"), "'5' has no unit; write for example '5 %'"),
        (("--memory-headroom", "150 %"), "memory_headroom must be 0 % to below 100 %"),
    ],
)
def test_a_contradiction_ends_with_one_message(meshwright, plan_file, arguments, says):
    outcome = meshwright("explain", plan_file, *arguments)
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert says in outcome.stderr


def test_files_that_are_no_plans_are_refused(meshwright, job, folder):
    missing = meshwright("explain", "nothing.yaml")
    assert (missing.code, "nothing.yaml: no such file" in missing.stderr) == (2, True)
    other = meshwright("explain", job)
    assert other.code == 2
    assert "expected a plan file (kind: training_plan), not training" in other.stderr


def test_a_given_calibration_is_used_and_named(meshwright, plan_file, folder):
    from importlib.resources import files

    text = (files("meshwright.hardware_specs") / "calibrations" / "l40s.vllm.json").read_text()
    (folder / "mine.json").write_text(text.replace('"gpu": "l40s"', '"gpu": "l4"'))
    shown = explain(meshwright, plan_file, "--calibration", "mine.json")
    assert "It rests on: calibrated" in shown
    assert "given as mine.json" in shown
