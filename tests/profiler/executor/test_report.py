"""Reports of ranks: written and read back exactly, merged, and refused when they are cut or foreign."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from meshwright.errors import SpecError
from meshwright.profiler.executor.report import (
    merge_reports,
    rank_report_text,
    read_rank_report,
    read_reports,
    report_path,
    report_text,
)
from meshwright.simcore.domain.execution import execution_mapping


def test_a_report_is_read_back_as_it_was_written(tmp_path, make_report):
    report = make_report(rank=3, stage=1, gradient_norms=(1.5, 1.25, 1.0), software={"torch": "2.13.0"})
    path = report_path(tmp_path, 3)
    path.write_text(rank_report_text(report))
    assert read_rank_report(path) == report


def test_the_step_is_the_slowest_ranks_and_the_median_over_steps(make_report):
    merged = merge_reports([make_report(1, seconds=(0.5, 0.1, 0.1)), make_report(0, seconds=(0.1, 0.3, 0.2))])
    assert [rank.rank for rank in merged.ranks] == [0, 1]
    assert merged.step_seconds == 0.3
    assert merged.num_steps == 3
    assert merged.losses == (5.5, 5.4, 5.3)
    assert merged.peak_memory_bytes == 1001


def test_all_ranks_of_a_plan_must_be_there(tmp_path, make_report, execution):
    for rank in range(2):
        report_path(tmp_path, rank).write_text(rank_report_text(make_report(rank)))
    assert len(read_reports(tmp_path, execution.plan).ranks) == 2
    report_path(tmp_path, 1).unlink()
    with pytest.raises(SpecError, match=r"rank1\.json: cannot be read"):
        read_reports(tmp_path, execution.plan)


@pytest.mark.parametrize(
    "ranks", [(), (1,), (0, 0), (0, 2)], ids=["none", "no first", "one twice", "one missing"]
)
def test_ranks_that_are_not_one_run_are_refused(make_report, ranks):
    with pytest.raises(SpecError, match="not those of one run"):
        merge_reports([make_report(rank) for rank in ranks])


def test_different_numbers_of_steps_are_refused(make_report):
    with pytest.raises(SpecError, match=r"different numbers of steps: \[2, 3\]"):
        merge_reports([make_report(0), make_report(1, seconds=(0.1, 0.2))])


def broken(text, **changes):
    return json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "malformed JSON"),
        (lambda text: "[]", "expected an object"),
        (lambda text: broken(text, kind="profile"), "kind: 'profile'"),
        (lambda text: broken(text, schema_version=9), "schema_version"),
        (lambda text: broken(text, rank=-1), "rank must be a whole number"),
        (lambda text: broken(text, rank="0"), "rank: expected a number"),
        (lambda text: broken(text, step_seconds=[]), "step_seconds: expected 1 or more"),
        (lambda text: broken(text, step_seconds=[0.1, -0.1]), "step_seconds: expected 1 or more"),
        (lambda text: broken(text, step_seconds=0.1), "step_seconds: expected a list"),
        (lambda text: broken(text, step_seconds=["x"]), "step_seconds: expected finite numbers"),
        (lambda text: text.replace("[\n    0.1", "[\n    1e999"), "expected finite numbers"),
        (lambda text: broken(text, losses=[True]), "losses: expected finite numbers"),
        (lambda text: broken(text, traffic=[1]), "traffic: expected a list of objects"),
        (lambda text: broken(text, traffic=[{"axis": "tp"}]), r"traffic\[0\]: key 'operation' is missing"),
        (lambda text: broken(text, phase_seconds={"forward": 1}), "phase_seconds: forward: expected a list"),
    ],
)
def test_a_file_that_is_no_report_is_refused_with_its_place(tmp_path, make_report, change, message):
    path = report_path(tmp_path, 0)
    path.write_text(change(rank_report_text(make_report())))
    with pytest.raises(SpecError, match=message) as caught:
        read_rank_report(path)
    assert str(path) in str(caught.value)


def test_the_merged_report_holds_what_ran_and_every_rank(make_report, execution):
    merged = merge_reports([make_report(rank) for rank in range(2)])
    text = report_text(merged, execution_mapping(execution), {"terms": []})
    document = json.loads(text)
    assert document["schema_version"] == 1
    assert '"written_by": "meshwright"' in text[:400]
    assert document["execution"]["plan"]["dp"] == 2
    assert [rank["peak_memory_bytes"] for rank in document["ranks"]] == [1000, 1001]
    assert document["step_seconds"] == merged.step_seconds


def test_a_report_with_an_infinite_loss_is_not_written(make_report):
    with pytest.raises(ValueError, match="JSON compliant"):
        rank_report_text(replace(make_report(), losses=(float("nan"),)))
