"""``meshwright simulate``: figures, trace, picture and result of one plan."""

from __future__ import annotations

import gzip
import json
from xml.etree import ElementTree as ET

import pytest
import yaml

SVG = "{http://www.w3.org/2000/svg}svg"


def test_the_simulation_agrees_with_the_plan_file(meshwright, plans):
    plan = yaml.safe_load((plans / "1.yaml").read_text())
    outcome = meshwright("simulate", plans / "1.yaml", "--json")
    result = json.loads(outcome.stdout)
    assert result["schema_version"] == 1
    assert result["prediction"]["iteration_time_seconds"] == pytest.approx(
        plan["prediction"]["iteration_time_seconds"], rel=1e-9
    )


def test_the_tables_say_where_time_and_memory_go(meshwright, pipeline_plan):
    outcome = meshwright("simulate", pipeline_plan)
    assert outcome.code == 0, outcome.stderr
    for words in (
        "iteration time",
        "Where the time goes",
        "Memory of one rank",
        "optimizer states",
        "stage 1",
    ):
        assert words in outcome.stdout


def test_the_timeline_is_a_trace_with_a_slice_per_operation(meshwright, pipeline_plan, folder):
    outcome = meshwright("simulate", pipeline_plan, "--timeline", "step.json.gz")
    assert outcome.code == 0, outcome.stderr
    trace = json.loads(gzip.decompress((folder / "step.json.gz").read_bytes()))
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {event["pid"] for event in slices} == {0, 1}
    assert all(event["dur"] >= 0 for event in slices)


def test_the_timeline_is_plain_json_without_gz_and_its_folder_is_made(meshwright, pipeline_plan, folder):
    assert meshwright("simulate", pipeline_plan, "--timeline", "new/step.json").code == 0
    assert json.loads((folder / "new" / "step.json").read_text())["traceEvents"]


def test_the_picture_is_well_formed_xml(meshwright, pipeline_plan, folder):
    outcome = meshwright("simulate", pipeline_plan, "--picture", "step.svg")
    assert outcome.code == 0, outcome.stderr
    assert ET.fromstring((folder / "step.svg").read_text()).tag == SVG


def test_out_writes_the_result(meshwright, pipeline_plan, folder):
    assert meshwright("simulate", pipeline_plan, "--out", "result").code == 0
    result = json.loads((folder / "result" / "result.json").read_text())
    assert result["schema_version"] == 1
    assert result["iteration_time_seconds"] > 0


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--timeline", "step.json.gz"),
        ("--timeline", "step.json"),
        ("--picture", "step.svg"),
        ("--out", "result"),
    ],
)
def test_a_second_run_replaces_its_own_file(meshwright, plans, flag, name):
    assert meshwright("simulate", plans / "1.yaml", flag, name).code == 0
    again = meshwright("simulate", plans / "1.yaml", flag, name)
    assert again.code == 0, again.stderr


@pytest.mark.parametrize(
    ("flag", "name", "file"),
    [
        ("--timeline", "step.json", "step.json"),
        ("--timeline", "step.json.gz", "step.json.gz"),
        ("--picture", "step.svg", "step.svg"),
        ("--out", "result", "result/result.json"),
    ],
)
def test_a_file_of_somebody_else_is_refused_unless_forced(meshwright, plans, folder, flag, name, file):
    foreign = folder / file
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("{}\n")
    outcome = meshwright("simulate", plans / "1.yaml", flag, name)
    assert outcome.code == 2
    assert f"{file}: exists and was not written by Meshwright" in outcome.stderr
    assert foreign.read_text() == "{}\n"
    assert meshwright("simulate", plans / "1.yaml", flag, name, "--force").code == 0
    assert foreign.read_bytes() != b"{}\n"


def test_nothing_is_written_when_one_of_several_files_is_in_the_way(meshwright, plans, folder):
    (folder / "step.svg").write_text("mine")
    outcome = meshwright("simulate", plans / "1.yaml", "--timeline", "step.json", "--picture", "step.svg")
    assert outcome.code == 2
    assert [path.name for path in folder.iterdir()] == ["step.svg"]


def test_a_plan_that_does_not_fit_is_simulated_and_said_so(meshwright, plan_file):
    text = plan_file.read_text().replace("sequence_length: 1024", "sequence_length: 131072")
    plan_file.write_text(text)
    outcome = meshwright("simulate", plan_file)
    assert outcome.code == 0, outcome.stderr
    assert "DOES NOT FIT" in outcome.stdout


def test_another_schedule_can_be_written_into_a_plan(meshwright, plans, folder):
    plan = yaml.safe_load((plans / "1.yaml").read_text())
    plan["plan"] |= {
        "tp": 1,
        "pp": 4,
        "dp": 2,
        "vpp": 1,
        "sequence_parallel": False,
        "micro_batch_size": 1,
        "schedule": "zb_h1",
        "layers_per_stage": [4, 4, 4, 4],
        "sharding": "none",
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    outcome = meshwright("simulate", "plan.yaml", "--json")
    assert outcome.code == 0, outcome.stderr
    assert len(json.loads(outcome.stdout)["busy_seconds_per_stage"]) == 4


def test_a_given_calibration_is_used_and_named(meshwright, plans, folder):
    from importlib.resources import files

    text = (files("meshwright.hardware_specs") / "calibrations" / "l40s.yaml").read_text()
    (folder / "mine.yaml").write_text(text.replace("gpu: l40s", "gpu: l4"))
    outcome = meshwright("simulate", plans / "1.yaml", "--calibration", "mine.yaml", "--json")
    reason = json.loads(outcome.stdout)["calibration"]["reason"]
    assert reason.startswith("given as mine.yaml; what it lacks: ")
    assert "borrows that of l40s" in reason
