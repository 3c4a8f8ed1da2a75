"""``meshwright export``: files of a target, or every reason why not."""

from __future__ import annotations

import json

import pytest

from meshwright.planner.export import EXPORTERS, SERVING_EXPORTERS


@pytest.fixture(scope="module")
def megatron_plan(tmp_path_factory, job_text, meshwright):
    """A plan that Megatron-LM can run."""
    root = tmp_path_factory.mktemp("megatron")
    (root / "job.yaml").write_text(job_text)
    flags = ("--out", root / "plans", "--top", 1, "--target", "megatron")
    outcome = meshwright("plan", root / "job.yaml", *flags)
    assert outcome.code == 0, outcome.stderr
    return root / "plans" / "1.yaml"


@pytest.mark.parametrize(
    ("target", "files"),
    [
        ("megatron", {"args.sh", "env.sh", "launch.sh"}),
        ("deepspeed", {"args.sh", "ds_config.json", "launch.sh"}),
        ("torchtitan", {"args.sh", "env.sh", "meshwright_model.py", "launch.sh"}),
        ("torchtitan-0.2", {"env.sh", "job.toml", "launch.sh"}),
    ],
)
def test_the_files_of_a_target_are_written(meshwright, job, folder, target, files):
    assert meshwright("plan", job, "--target", target, "--top", 1).code == 0
    outcome = meshwright("export", "plans/1.yaml", "--to", target, "--out", "launch", "--json")
    assert outcome.code == 0, outcome.stderr
    report = json.loads(outcome.stdout)
    assert report["schema_version"] == 1
    assert {path.name for path in (folder / "launch").iterdir() if path.name[0] != "."} == files
    assert len(report["files"]) == len(files)
    assert "launch.sh" in report["launch_command"]


def test_a_slurm_job_is_written_on_request(meshwright, megatron_plan, folder):
    flags = ("--to", "megatron", "--out", "launch", "--launcher", "slurm")
    outcome = meshwright("export", megatron_plan, *flags)
    assert outcome.code == 0, outcome.stderr
    assert (folder / "launch" / "job.sbatch").read_text().startswith("#!")
    assert "sbatch" in outcome.stdout


def test_a_plan_the_target_cannot_express_is_refused_with_every_reason(meshwright, pipeline_plan, folder):
    outcome = meshwright("export", pipeline_plan, "--to", "deepspeed", "--out", "launch")
    assert outcome.code == 2
    assert "cannot run this plan:\n  - pp 2" in outcome.stderr
    assert outcome.stderr.count("\n  - ") >= 2
    assert list(folder.iterdir()) == []


def test_the_list_shows_each_target_with_its_release_and_what_it_can_express(meshwright):
    outcome = meshwright("export", "--list", "--json")
    assert outcome.code == 0, outcome.stderr
    targets = {entry["target"]: entry for entry in json.loads(outcome.stdout)["targets"]}
    assert {name for name, entry in targets.items() if entry["plans"] == "training"} == set(EXPORTERS)
    assert {name for name, entry in targets.items() if entry["plans"] == "serving"} == set(SERVING_EXPORTERS)
    assert targets["megatron"]["target_version"] == "core_r0.16"
    assert "hierarchical" in targets["megatron"]["expresses"]["context"]
    text = meshwright("export", "--list").stdout
    for name, entry in targets.items():
        assert f"{name} {entry['target_version']}\n" in text
        assert all(words in text for words in entry["expresses"].values())


@pytest.mark.parametrize("missing", ["PLAN", "--to", "--out"])
def test_what_is_missing_is_named(meshwright, plans, missing):
    words = {"PLAN": [plans / "1.yaml"], "--to": ["--to", "megatron"], "--out": ["--out", "launch"]}
    given = [word for name, part in words.items() if name != missing for word in part]
    outcome = meshwright("export", *given)
    assert outcome.code == 2
    assert missing in outcome.stderr
    assert "--list" in outcome.stderr


def test_an_unknown_target_is_named_with_the_nearest(meshwright, plans):
    outcome = meshwright("export", plans / "1.yaml", "--to", "megatrn", "--out", "launch")
    assert outcome.code == 2
    assert "did you mean 'megatron'?" in outcome.stderr


def test_exporting_twice_replaces_own_files_and_protects_edited_ones(meshwright, megatron_plan, folder):
    command = ("export", megatron_plan, "--to", "megatron", "--out", "launch")
    assert meshwright(*command).code == 0
    assert meshwright(*command).code == 0
    (folder / "launch" / "args.sh").write_text("# mine\n")
    outcome = meshwright(*command)
    assert outcome.code == 2
    assert "args.sh was edited since Meshwright wrote it" in outcome.stderr
    assert (folder / "launch" / "args.sh").read_text() == "# mine\n"
    assert meshwright(*command, "--force").code == 0
