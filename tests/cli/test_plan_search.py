"""``meshwright plan --pareto``, ``--max-seconds`` and ``--resume``."""

from __future__ import annotations

import json

import pytest


def without_times(report):
    return {key: value for key, value in report.items() if key != "search_seconds"}


def test_pareto_lists_plans_none_of_which_beats_another(meshwright, job, folder):
    outcome = meshwright("plan", job, "--top", 3, "--pareto")
    assert outcome.code == 0, outcome.stderr
    assert "Pareto front of the simulated plans" in outcome.stdout
    report = json.loads((folder / "plans" / "report.json").read_text())
    front = [entry["prediction"] for entry in report["pareto_front"]]
    assert len(front) > 1
    figures = [
        (one["iteration_time_seconds"], one["dollars_per_trillion_tokens"], one["peak_memory_bytes"])
        for one in front
    ]
    for one in figures:
        for other in figures:
            assert one is other or any(mine < theirs for mine, theirs in zip(one, other, strict=True))
    assert "pareto_front" not in json.loads(meshwright("plan", job, "--top", 3, "--json").stdout)


def test_a_search_without_time_left_returns_the_best_so_far(meshwright, job):
    outcome = meshwright("plan", job, "--top", 2, "--max-seconds", "1e-6", "--json")
    assert outcome.code == 0, outcome.stderr
    report = json.loads(outcome.stdout)
    assert len(report["plans"]) == 2
    assert report["cut"]["num_unscored"] > 0
    assert 0.0 <= report["cut"]["bound_gap"] < 1.0
    assert report["notes"][0].startswith("Cut after 1e-06 s: ")
    whole = json.loads(meshwright("plan", job, "--top", 2, "--json").stdout)
    assert "cut" not in whole
    assert whole["num_candidates"] == report["num_candidates"] + report["cut"]["num_unscored"]
    times = [each["plans"][0]["prediction"]["iteration_time_seconds"] for each in (whole, report)]
    assert times[1] * (1.0 - report["cut"]["bound_gap"]) <= times[0] * (1 + 1e-9) <= times[1] * (1 + 2e-9)


@pytest.mark.parametrize("seconds", ["0", "-3", "nan"])
def test_seconds_must_be_above_zero(meshwright, job, folder, seconds):
    outcome = meshwright("plan", job, "--max-seconds", seconds)
    assert outcome.code == 2
    assert outcome.stderr == (
        f"error: the seconds of a search must be above 0, not {float(seconds):g}; leave them out to search all\n"
    )
    assert not (folder / "plans").exists()


def test_a_search_continues_from_its_state(meshwright, job, folder):
    whole = json.loads(meshwright("plan", job, "--top", 3, "--json").stdout)
    for seconds in ("1e-6", "1e-6", "3600"):
        flags = ("--top", 3, "--max-seconds", seconds, "--resume", "state.json", "--json")
        report = json.loads(meshwright("plan", job, *flags).stdout)
    assert without_times(report) == without_times(whole)
    assert json.loads((folder / "state.json").read_text())["written_by"] == "meshwright"


def test_the_state_of_another_job_is_refused(meshwright, job, folder):
    assert meshwright("plan", job, "--top", 1, "--resume", "state.json").code == 0
    before = (folder / "state.json").read_bytes()
    outcome = meshwright("plan", job, "--top", 1, "--resume", "state.json", "--sequence-length", 2048)
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: state.json: is the state of another search")
    assert len(outcome.stderr.splitlines()) == 1
    assert (folder / "state.json").read_bytes() == before


def test_a_state_in_a_folder_that_does_not_exist_is_refused_before_the_search(meshwright, job, folder):
    outcome = meshwright("plan", job, "--resume", "nowhere/state.json")
    assert outcome.code == 2
    assert "--resume nowhere/state.json: there is no folder nowhere; make it" in outcome.stderr
    assert not (folder / "nowhere").exists()


@pytest.mark.parametrize("content", ["mine\n", '{"kind": "search_state"}', ""])
def test_a_file_that_is_no_state_is_refused(meshwright, job, folder, content):
    (folder / "mine").write_text(content)
    outcome = meshwright("plan", job, "--resume", "mine")
    assert outcome.code == 2
    assert outcome.stderr.startswith("error: mine: is not the state of a search")
    assert (folder / "mine").read_text() == content


@pytest.mark.parametrize("flags", [("--pareto",), ("--max-seconds", "5"), ("--resume", "state.json")])
def test_layer_wise_searches_are_neither_cut_nor_resumed(meshwright, job, folder, flags):
    outcome = meshwright("plan", job, "--search", "layerwise", *flags)
    assert outcome.code == 2
    assert "go with --search exhaustive, not layerwise" in outcome.stderr
    assert not (folder / "state.json").exists()
