"""``meshwright whatif``: the same plan and the best plan under a change, and the table of sensitivities."""

from __future__ import annotations

import json

import pytest

from meshwright.planner import sensitivity
from meshwright.planner.changes import CHANGES


def whatif(meshwright, *arguments):
    outcome = meshwright("whatif", *arguments, "--quiet")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr == ""
    return outcome.stdout


def test_the_same_and_the_best_plan_are_shown_before_and_after(meshwright, plan_file):
    text = whatif(meshwright, plan_file, "--set", "node.link_bandwidth=128GB/s", "--set", "gpu.memory=48GiB")
    for words in (
        "what if node.link_bandwidth 32 GB/s -> 128 GB/s, gpu.memory 22.05 GiB -> 48 GiB?",
        "this plan, today",
        "best plan, today",
        "this plan, changed",
        "best plan, changed",
        "Why: with the change this plan takes ",
        "80 % interval: ",
    ):
        assert words in text


def test_the_mapping_holds_all_four(meshwright, plan_file):
    result = json.loads(whatif(meshwright, plan_file, "--set", "gpu.memory_bandwidth=600 GB/s", "--json"))
    assert (result["schema_version"], result["kind"]) == (1, "training_whatif")
    assert result["changes"] == [{"key": "gpu.memory_bandwidth", "before": 3e11, "after": 6e11}]
    seconds = {
        when: {
            which: result[when][which]["prediction"]["iteration_time_seconds"]
            for which in ("this_plan", "best_plan")
        }
        for when in ("today", "changed")
    }
    assert seconds["changed"]["this_plan"] < seconds["today"]["this_plan"]
    for when in seconds.values():
        assert when["best_plan"] <= when["this_plan"]
    assert result["changed"]["this_plan"]["plan"] == result["today"]["this_plan"]["plan"]


def test_a_plan_the_change_breaks_is_told_by_its_constraint(meshwright, plan_file):
    text = whatif(meshwright, plan_file, "--set", "workload.global_batch_size=6")
    assert "cannot run: batch" in text
    assert "This plan cannot run, by constraint 'batch'" in text


def test_the_table_of_sensitivities_names_properties_and_the_winner(meshwright, plan_file):
    text = whatif(meshwright, plan_file, "--factor", "1.25")
    assert "/ 1.25" in text
    assert "intra-node bandwidth" in text
    assert "GPU memory divided by 1.25: the best plan " in text


def test_sensitivities_are_sorted_by_effect(meshwright, plan_file, monkeypatch):
    # Without GPU memory, which alone is planned again.
    levers = tuple(lever for lever in sensitivity.LEVERS if not lever.moves_the_best)
    monkeypatch.setattr(sensitivity, "LEVERS", levers)
    result = json.loads(whatif(meshwright, plan_file, "--json"))
    assert result["kind"] == "training_sensitivities"
    sizes = [
        max(abs(each[side] or 0.0) for side in ("change_divided", "change_multiplied"))
        for each in result["effects"]
    ]
    assert len(sizes) == len(levers) - 1
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 0.0


def test_the_keys_are_listed_with_their_values(meshwright, plan_file):
    text = whatif(meshwright, plan_file, "--list")
    assert all(key in text for key in CHANGES)
    assert "22.05 GiB" in text
    listed = json.loads(whatif(meshwright, plan_file, "--list", "--json"))
    assert [each["key"] for each in listed["keys"]] == list(CHANGES)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--set", "gpu.memroy=48GiB"),
            "unknown key 'gpu.memroy'; did you mean 'gpu.memory'? Known: cluster, ",
        ),
        (("--set", "gpu.memory=48"), "gpu.memory: '48' has no unit"),
        (("--set", "gpu.memory"), "write KEY=VALUE"),
        (("--set", "gpu.bf16=500GB/s"), "gpu.bf16: '500GB/s': unknown unit"),
        (("--set", "cluster.nodes=none"), "cluster.nodes: expected a whole number"),
        (("--set", "gpu.memory=1GiB", "--set", "gpu.memory=2GiB"), "gpu.memory is given twice"),
        (("--set", "software=megatron-3000"), "software: unknown software 'megatron-3000'"),
        (("--factor", "1"), "the factor must lie above 1"),
        (("--objective", "thruput"), "objective: unknown value 'thruput'; did you mean 'throughput'?"),
        (("--memory-headroom", "much"), "'much' is not a quantity"),
    ],
)
def test_a_mistake_ends_with_one_message(meshwright, plan_file, arguments, says):
    outcome = meshwright("whatif", plan_file, *arguments)
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("error: ")
    assert says in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_files_that_are_no_plans_are_refused(meshwright, job):
    assert meshwright("whatif", "nothing.yaml").code == 2
    outcome = meshwright("whatif", job, "--set", "gpu.memory=48GiB")
    assert outcome.code == 2
    assert "expected a plan file (kind: training_plan), not training" in outcome.stderr
