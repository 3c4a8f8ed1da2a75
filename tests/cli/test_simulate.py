"""``meshwright simulate``: figures, trace, picture and result of one plan."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
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


def test_a_picture_of_another_format_is_refused(meshwright, pipeline_plan, folder):
    outcome = meshwright("simulate", pipeline_plan, "--picture", "step.png")
    assert outcome.code == 2
    assert "name it step.svg" in outcome.stderr
    assert not (folder / "step.png").exists()


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


# --- jitter -------------------------------------------------------------------------------------------------


def jitter_of(meshwright, *arguments):
    """Return the jitter of a simulation as JSON, and its prediction."""
    outcome = meshwright("simulate", *arguments, "--json")
    assert outcome.code == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    return result["jitter"], result["prediction"]


def test_jitter_is_shown_as_a_distribution(meshwright, pipeline_plan):
    outcome = meshwright("simulate", pipeline_plan, "--jitter", "2%", "--rank-spread", "1%", "--seeds", 20)
    assert outcome.code == 0, outcome.stderr
    for words in (
        "Iteration time with jitter",
        "P5 ",
        "P50",
        "P95",
        "Lost to stragglers",
        "Drawn: 20 seeds from 0",
    ):
        assert words in outcome.stdout
    assert "Straggler of the critical path: most often stage " in outcome.stdout
    assert "seeds: 0 of 20" in outcome.stderr


def test_without_its_flags_there_is_no_jitter(meshwright, pipeline_plan):
    assert "jitter" not in meshwright("simulate", pipeline_plan).stdout
    assert "jitter" not in json.loads(meshwright("simulate", pipeline_plan, "--json").stdout)


def test_no_jitter_takes_the_predicted_time_exactly(meshwright, pipeline_plan):
    jitter, prediction = jitter_of(meshwright, pipeline_plan, "--jitter", "0%")
    assert jitter["iteration_time_seconds"] == [prediction["iteration_time_seconds"]]
    assert jitter["jitter_free_seconds"] == prediction["iteration_time_seconds"]
    assert jitter["straggler_stages"] == {}
    assert (
        "Nobody on the critical path is slow."
        in meshwright("simulate", pipeline_plan, "--jitter", "0%").stdout
    )


def test_the_figures_are_those_of_the_seeds(meshwright, pipeline_plan):
    jitter, prediction = jitter_of(meshwright, pipeline_plan, "--jitter", "2%", "--seeds", 21, "--seed", 5)
    times = sorted(jitter["iteration_time_seconds"])
    assert len(times) == 21
    assert jitter["first_seed"] == 5
    assert [jitter[f"iteration_time_p{percent}_seconds"] for percent in (5, 50, 95)] == [
        times[1],
        times[10],
        times[19],
    ]
    assert jitter["iteration_time_mean_seconds"] == pytest.approx(sum(times) / 21)
    assert jitter["slowdown"] == pytest.approx(sum(times) / 21 / prediction["iteration_time_seconds"])
    assert jitter["slowdown"] > 1.0
    assert sum(jitter["straggler_stages"].values()) == sum(jitter["straggler_replicas"].values()) == 21


def test_seeds_are_a_hundred_unless_said_otherwise_and_repeat(meshwright, pipeline_plan):
    first, _ = jitter_of(meshwright, pipeline_plan, "--jitter", "2%")
    again, _ = jitter_of(meshwright, pipeline_plan, "--jitter", "2%")
    other, _ = jitter_of(meshwright, pipeline_plan, "--jitter", "2%", "--seed", 50)
    assert first == again
    assert first["num_seeds"] == 100
    assert other["iteration_time_seconds"][:50] == first["iteration_time_seconds"][50:]


def test_a_slow_rank_is_named_and_a_slow_node_is_all_its_ranks(meshwright, pipeline_plan):
    plan = yaml.safe_load(pipeline_plan.read_text())["plan"]
    per_stage = plan["tp"] * plan["dp"]
    rank, _ = jitter_of(meshwright, pipeline_plan, "--slow-rank", f"{2 * per_stage - 1}=50%")
    assert rank["num_seeds"] == 1
    assert rank["slow_ranks"] == [{"rank": 2 * per_stage - 1, "factor": 1.5}]
    assert rank["straggler_stages"] == {"1": 1}
    assert rank["straggler_replicas"] == {str(plan["dp"] - 1): 1}
    # The cluster is one node of eight.
    node, _ = jitter_of(meshwright, pipeline_plan, "--slow-node", "0=50%")
    assert [each["rank"] for each in node["slow_ranks"]] == list(range(8))
    assert node["slowdown"] > rank["slowdown"] > 1.0


def test_ranks_that_fsdp_binds_in_every_micro_batch_are_in_lock_step(meshwright, plans, folder):
    plan = yaml.safe_load((plans / "1.yaml").read_text())
    plan["plan"] |= {"tp": 1, "pp": 1, "dp": 8, "vpp": 1, "sequence_parallel": False, "micro_batch_size": 1}
    plan["plan"] |= {"schedule": "none", "layers_per_stage": [16]}
    groups = {}
    for sharding in ("zero1", "zero3"):
        plan["plan"]["sharding"] = sharding
        (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
        jitter, _ = jitter_of(meshwright, "plan.yaml", "--jitter", "2%", "--seeds", 2)
        groups[sharding] = jitter["num_replicas"], jitter["ranks_in_lock_step"]
    assert groups == {"zero1": (8, 1), "zero3": (1, 8)}


def test_the_written_result_holds_the_jitter(meshwright, pipeline_plan, folder):
    assert meshwright("simulate", pipeline_plan, "--jitter", "2%", "--seeds", 3, "--out", "result").code == 0
    result = json.loads((folder / "result" / "result.json").read_text())
    assert len(result["jitter"]["iteration_time_seconds"]) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--jitter", "2"), "--jitter: '2' has no unit; write for example '5 %'"),
        (("--jitter", "-2%"), "--jitter: '-2%' must be a finite quantity, not negative"),
        (("--jitter", "100.1%"), "--jitter: '100.1%' is more than 100%"),
        (("--jitter", "nan%"), "--jitter: 'nan%' is not a quantity"),
        (("--jitter", ""), "--jitter: '' is not a quantity"),
        (("--rank-spread", "-1%"), "--rank-spread: '-1%' must be"),
        (("--rank-spread", "200%"), "--rank-spread: '200%' is more than 100%"),
        (("--jitter", "2%", "--seeds", "0"), "Invalid value for '--seeds': 0 is not in the range"),
        (("--jitter", "2%", "--seeds", "-5"), "Invalid value for '--seeds'"),
        (("--jitter", "2%", "--seeds", "9" * 30), "Invalid value for '--seeds'"),
        (("--jitter", "2%", "--seed", "-1"), "'-1' is no seed; give a whole number from 0 to 4294967295"),
        (("--seeds", "10"), "--seeds draws iterations with jitter: give --jitter"),
        (("--slow-rank", "3"), "--slow-rank: '3' is not RANK=EXTRA; write for example 3=20%"),
        (("--slow-rank", "-1=20%"), "--slow-rank: '-1=20%' is not RANK=EXTRA"),
        (("--slow-rank", "8=20%"), "--slow-rank: rank 8 does not exist; the plan uses ranks 0 to 7"),
        (("--slow-rank", f"{'9' * 5000}=20%"), "does not exist; the plan uses ranks 0 to 7"),
        (("--slow-rank", "3=-20%"), "--slow-rank: '-20%' must be"),
        (("--slow-rank", "3=1e9%"), "--slow-rank: '1e9%' is more than 99900%"),
        (("--slow-node", "1=20%"), "--slow-node: node 1 does not exist; the plan uses nodes 0 to 0"),
    ],
)
def test_a_mistake_in_a_jitter_flag(meshwright, pipeline_plan, folder, arguments, says):
    outcome = meshwright("simulate", pipeline_plan, *arguments, "--out", "out")
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("error:") == 1
    assert says in outcome.stderr
    assert list(folder.iterdir()) == []


INTERLEAVED = Path(__file__).parents[2] / "examples" / "llama-3-70b-interleaved.plan.yaml"


def test_contention_is_said_link_by_link(meshwright, folder):
    outcome = meshwright(
        "simulate", INTERLEAVED, "--contention", "--out", "result", "--timeline", "step.json"
    )
    assert outcome.code == 0, outcome.stderr
    for words in ("with contention", "Links asked for more", "rail up", "Communication slowed most"):
        assert words in outcome.stdout
    found = json.loads((folder / "result" / "result.json").read_text())
    contention = found["contention"]
    assert contention["iteration_time_without_contention_seconds"] == pytest.approx(
        found["iteration_time_seconds"]
    )
    assert 0.0 < contention["slowdown"] < 0.01
    assert contention["links"][0]["links_alike"] == 16
    assert all(
        each["contended_seconds"] >= each["alone_seconds"] * 0.999 for each in contention["communications"]
    )
    # The trace shows the iteration that was asked for.
    slices = [e for e in json.loads((folder / "step.json").read_text())["traceEvents"] if e["ph"] == "X"]
    end = max(event["ts"] + event["dur"] for event in slices) * 1e-6
    assert end > contention["iteration_time_without_contention_seconds"] - 0.1


def test_one_node_has_no_contention(meshwright, pipeline_plan):
    outcome = meshwright("simulate", pipeline_plan, "--contention")
    assert outcome.code == 0, outcome.stderr
    assert "No link is ever asked for more than it carries." in outcome.stdout


def test_faults_other_jobs_and_checkpoints_add_up(meshwright):
    def slowdown(*flags):
        outcome = meshwright("simulate", INTERLEAVED, "--json", *flags)
        assert outcome.code == 0, outcome.stderr
        return json.loads(outcome.stdout)["contention"]["slowdown"]

    plain = slowdown("--contention")
    slow = slowdown("--slow-link", "rail up 3=50%")
    busy = slowdown("--slow-link", "rail up 3=50%", "--background", "rail up=30%")
    written = slowdown(
        "--slow-link", "rail up 3=50%", "--background", "rail up=30%", "--checkpoint", "10 GB/s"
    )
    assert plain < slow < busy < written


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--slow-link", "rail upp 3=5%"), "did you mean 'rail up'?"),
        (("--slow-link", "rail up 99=5%"), "'rail up' has links 0 to 63"),
        (("--slow-link", "rail up 3"), "write for example 'rail up 3=50%'"),
        (("--slow-link", "rail up 3=100%"), "or --failed-link 'rail up 3'"),
        (("--failed-link", "spine"), "no link 'spine'"),
        (("--failed-link", "rail up 3"), "link 'rail up 3' has failed; leave out the GPUs behind it"),
        (("--background", "leaf up=30%"), "no links of kind 'leaf up'"),
        (("--background", "rail up=100%"), "leaves nothing"),
        (("--slow-link", "rail up 3=5%", "--failed-link", "rail up 3"), "give each link once"),
        (("--background", "rail up=5%", "--background", "rail up=6%"), "'rail up' is given twice"),
        (("--checkpoint", "5"), "'5' has no unit"),
        (("--checkpoint", "5 GB"), "did you mean 'GB/s'?"),
        (("--checkpoint", "0 GB/s"), "writes nothing"),
    ],
)
def test_networks_that_cannot_be_are_refused(meshwright, flags, says):
    outcome = meshwright("simulate", INTERLEAVED, *flags)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert says in outcome.stderr
