"""A run becomes a row that reads back as the same run, or no row at all."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest

from meshwright.errors import SpecError
from meshwright.profiler.executor.evidence import append_row, check_appendable, measured_row
from meshwright.profiler.executor.report import merge_reports
from meshwright.profiler.measured_runs import COLUMNS, read_measured_runs
from meshwright.profiler.measured_setup import measured_setup


@pytest.fixture
def row(job, make_report, plan):
    report = merge_reports([make_report(rank) for rank in range(2)])
    return measured_row(job, plan, report, "tiny-2")


def test_a_row_reads_back_as_the_run(tmp_path, job, row, plan):
    path = tmp_path / "runs.csv"
    assert append_row(path, row) == "tiny-2"
    (run,) = read_measured_runs(path)
    setup = measured_setup(run)
    assert setup.plan == plan
    assert setup.job.workload == job.workload
    assert setup.job.cluster.node.num_gpus == 2
    assert setup.job.cluster.gpu == job.cluster.gpu
    assert run.measured_seconds == 0.2
    # The memory of a process on a host is not that of the model.
    assert run.measured_memory_bytes is None


def test_rows_are_added_under_names_of_their_own(tmp_path, row):
    path = tmp_path / "runs.csv"
    assert [append_row(path, row) for _ in range(3)] == ["tiny-2", "tiny-2-2", "tiny-2-3"]
    assert [run.id for run in read_measured_runs(path)] == ["tiny-2", "tiny-2-2", "tiny-2-3"]


@pytest.mark.parametrize("end", ["\n", "\r\n", ""], ids=["lf", "crlf", "no newline"])
def test_a_users_table_keeps_its_columns_and_rows(tmp_path, row, end):
    columns = ["notes", *COLUMNS[:-1]]
    with (tmp_path / "runs.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="", lineterminator=end or "\n")
        writer.writeheader()
        writer.writerow({**row, "id": "mine", "notes": "a, b"})
    path = tmp_path / "runs.csv"
    if not end:
        path.write_bytes(path.read_bytes().rstrip(b"\n"))
    before = path.read_bytes()
    append_row(path, row)
    assert path.read_bytes().startswith(before)
    mine, ours = read_measured_runs(path)
    assert (mine.cell("notes"), ours.id) == ("a, b", "tiny-2")


def test_a_table_without_a_column_the_row_needs_is_left_alone(tmp_path, row):
    path = tmp_path / "runs.csv"
    columns = [column for column in COLUMNS if column != "sharding"]
    path.write_text(",".join(columns) + "\n")
    with pytest.raises(SpecError, match="no column sharding"):
        append_row(path, row)
    assert path.read_text() == ",".join(columns) + "\n"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            {
                "layers_per_stage": (1, 1),
                "pp": 2,
                "schedule": "1f1b",
                "recompute": "full",
                "recompute_layers": 1,
            },
            "plan.recompute_layers",
        ),
        ({"activation_offload": True}, "plan.activation_offload"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_plan_the_columns_cannot_say_is_refused_before_the_run(tmp_path, job, change, what, plan):
    with pytest.raises(SpecError, match=what):
        check_appendable(tmp_path / "runs.csv", job, replace(plan, **change))


def test_files_that_are_no_tables_are_refused_before_the_run(tmp_path, job, plan):
    foreign = tmp_path / "notes.csv"
    foreign.write_text("a,b\n1,2\n")
    with pytest.raises(SpecError, match="unknown column"):
        check_appendable(foreign, job, plan)
    with pytest.raises(SpecError, match="there is no folder"):
        check_appendable(tmp_path / "no" / "runs.csv", job, plan)
    (tmp_path / "link.csv").symlink_to(tmp_path / "runs.csv")
    with pytest.raises(SpecError, match="symbolic link"):
        check_appendable(tmp_path / "link.csv", job, plan)
    check_appendable(tmp_path / "runs.csv", job, plan)
