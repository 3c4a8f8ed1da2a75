"""``meshwright diff``: fields, terms, memory and cost of two plans."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def pair(plans):
    return plans / "1.yaml", plans / "4.yaml"


def test_fields_and_terms_stand_side_by_side(meshwright, pair):
    outcome = meshwright("diff", *pair)
    assert outcome.code == 0, outcome.stderr
    for words in (
        "What differs",
        "Time of the busiest stage",
        "Memory of the fullest stage",
        "Throughput and cost",
        "tokens/s/GPU",
        "Why: the second plan takes ",
        "It rests on: ",
    ):
        assert words in outcome.stdout


def test_the_mapping_holds_what_differs_and_terms_that_add_up(meshwright, pair):
    result = json.loads(meshwright("diff", *pair, "--json").stdout)
    assert (result["schema_version"], result["kind"]) == (1, "plan_difference")
    assert result["files"] == [str(path) for path in pair]
    assert {each["section"] for each in result["fields"]} == {"plan"}
    *terms, total = result["time_seconds"]
    for side, prediction in zip(("first", "second"), result["predictions"], strict=True):
        assert sum(each[side] for each in terms) == pytest.approx(total[side], rel=1e-9)
        assert total[side] == pytest.approx(prediction["iteration_time_seconds"])
    assert total["change"] >= 0.0


def test_equal_plans_are_said_to_be_the_same(meshwright, pair):
    outcome = meshwright("diff", pair[0], pair[0])
    assert "The plans and their jobs are the same." in outcome.stdout
    assert "takes as long per iteration" in outcome.stdout
    assert json.loads(meshwright("diff", pair[0], pair[0], "--json").stdout)["fields"] == []


def test_plans_of_other_machines_and_models_are_compared(meshwright, pair, folder):
    text = pair[0].read_text()
    (folder / "more.yaml").write_text(text.replace("sequence_length: 1024", "sequence_length: 2048"))
    outcome = meshwright("diff", pair[0], "more.yaml")
    assert outcome.code == 0, outcome.stderr
    assert "sequence_length" in outcome.stdout
    assert "per token" in outcome.stdout


def test_quantities_are_shown_with_their_units(meshwright, pair, folder):
    import yaml

    plan = yaml.safe_load(pair[0].read_text())
    plan["cluster"]["node"]["gpu"]["memory"]["value"] = "48 GiB"
    (folder / "more.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    line = next(
        line
        for line in meshwright("diff", pair[0], "more.yaml").stdout.splitlines()
        if "node.gpu.memory_bytes" in line
    )
    assert line.split()[-4:] == ["22.05", "GiB", "48", "GiB"]


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ("nothing.yaml", "nothing.yaml: no such file"),
        ("job.yaml", "expected a plan file (kind: training_plan)"),
    ],
)
def test_files_that_are_no_plans_are_refused(meshwright, pair, job, second, says):
    outcome = meshwright("diff", pair[0], second)
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert says in outcome.stderr


def test_one_file_is_one_too_few(meshwright, pair):
    outcome = meshwright("diff", pair[0])
    assert outcome.code == 2
    assert "Missing argument 'SECOND'" in outcome.stderr
