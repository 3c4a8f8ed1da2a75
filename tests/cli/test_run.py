"""``meshwright run``: what it refuses, prints and writes; its workers are stand-ins but for one true run."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from pathlib import Path

import pytest

from meshwright.errors import CalibrationError
from meshwright.profiler.executor import launch

JOB = """\
schema_version: 1
kind: training
model:
  name: small
  num_layers: 2
  hidden_size: 64
  ffn_hidden_size: 128
  num_attention_heads: 4
  num_query_groups: 2
  head_dim: 16
  vocab_size: 256
  max_position_embeddings: 64
  is_gated_mlp: true
  has_tied_embeddings: false
cluster: {node: {base: cpu-host-1, num_gpus: 2}, count: 1}
workload: {global_batch_size: 4, sequence_length: 32, precision: fp32}
software: meshwright-executor
constraints: {dp: 2, tp: 1, pp: 1, cp: 1, sharding: none, recompute: none, micro_batch_size: 1}
"""
# A worker as the command sees it: reads the execution, reports steps of 10 ms; the second rank may fail.
WORKER = """
import json, os, pathlib, sys
execution = json.loads(open(sys.argv[1]).read())
folder, rank = pathlib.Path(sys.argv[2]), int(os.environ["RANK"])
(folder / f"rank{rank}.now").write_text("step 0: forward" + chr(10))
if rank == 1 and execution["seed"] == 13:
    sys.exit("no luck")
steps = [0.01 * (rank + 1)] * execution["num_steps"]
report = {
    "schema_version": 1, "kind": "rank_report", "written_by": "meshwright", "rank": rank, "stage": 0,
    "device": "x", "step_seconds": steps, "cpu_seconds": steps,
    "phase_seconds": {"forward": [0.4 * each for each in steps], "backward": [0.6 * each for each in steps]},
    "phase_cpu_seconds": {}, "peak_memory_bytes": 2**20, "losses": [5.5] * len(steps),
    "gradient_norms": [1.0] * len(steps), "software": {},
    "traffic": [{"axis": "dp", "operation": "all_reduce", "num_messages": 3, "num_bytes": 1234, "seconds": 0.001}],
}
(folder / f"rank{rank}.json").write_text(json.dumps(report))
"""


@pytest.fixture(scope="session")
def small_plan(tmp_path_factory, meshwright):
    """The plan of the small job, as text."""
    root = tmp_path_factory.mktemp("small")
    (root / "job.yaml").write_text(JOB)
    outcome = meshwright("plan", root / "job.yaml", "--out", root / "plans", "--top", 1)
    assert outcome.code == 0, outcome.stderr
    return (root / "plans" / "1.yaml").read_text()


@pytest.fixture
def plan(folder, small_plan):
    path = folder / "plan.yaml"
    path.write_text(small_plan)
    return path


@pytest.fixture
def stand_in(folder, monkeypatch):
    """Start stand-ins instead of workers."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    real = launch._worker_arguments
    monkeypatch.setattr(
        launch,
        "_worker_arguments",
        lambda directory: (sys.executable, "-S", str(script), *real(directory)[-2:]),
    )
    # They hold no weights.
    monkeypatch.setattr(launch, "check_host_memory", lambda execution, num_ranks: None)


def test_two_processes_really_train(meshwright, plan, folder):
    outcome = meshwright(
        "run", plan, "--steps", 2, "--warmup", 1, "--out", "run", "--append", "runs.csv", "--json"
    )
    assert outcome.code == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert result["num_steps"] == 2
    assert result["device"] == "cpu"
    terms = {term["name"]: term for term in result["comparison"]["terms"]}
    assert list(terms) == [
        "iteration",
        "compute",
        "data parallel",
        "optimizer",
        "compute in CPU time",
        "optimizer in CPU time",
        "peak memory",
    ]
    assert all(term["measured"] > 0.0 and term["predicted"] > 0.0 for term in terms.values())
    assert terms["compute"]["measured"] < terms["iteration"]["measured"] == result["step_seconds"]
    # Random tokens: about the loss of guessing among 256.
    assert result["losses"][0] == pytest.approx(5.545, abs=1.0)
    traffic = {(each["axis"], each["operation"]): each for each in result["comparison"]["traffic"]}
    num_parameters = 2 * (64 * (64 + 64) + 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64 + 2 * 256 * 64
    assert traffic["dp", "all_reduce"]["measured_bytes"] == 2 * 4 * num_parameters
    assert all(each["is_exact"] for each in traffic.values())
    assert {path.name for path in (folder / "run").iterdir()} >= {
        "execution.json",
        "report.json",
        "rank0.log",
        "rank1.json",
    }
    scored = meshwright("validate", "runs.csv", "--json")
    assert scored.code == 0, scored.stderr
    with open("runs.csv") as stream:
        (row,) = csv.DictReader(stream)
    assert (row["id"], row["gpu"], row["n_gpus"]) == ("small-cpu-host-dp2-mbs1", "cpu-host", "2")
    assert float(row["measured_seconds"]) == pytest.approx(result["step_seconds"], rel=1e-4)


def test_the_table_shows_terms_phases_traffic_and_memory(meshwright, plan, stand_in, folder):
    outcome = meshwright("run", plan, "--steps", 3)
    assert outcome.code == 0, outcome.stderr
    for text in (
        "small, 2 x cpu: dp 2",
        "iteration",
        "0.02 s",
        "data parallel",
        "2,468",
        "1 MiB",
        "Loss: 5.5",
    ):
        assert text in outcome.stdout, text
    assert "80 % interval" in outcome.stdout
    # The stand-ins send what the plan does not.
    assert "Messages and bytes differ in dp all_reduce" in outcome.stdout
    assert not (folder / "run").exists()


def test_a_failed_worker_ends_with_code_5_and_the_log_is_kept(meshwright, plan, stand_in):
    outcome = meshwright("run", plan, "--seed", 13)
    assert outcome.code == 5
    assert "rank 1 failed with exit code 1 in: step 0: forward" in outcome.stderr
    log = outcome.stderr.split("its output is in ")[1].split(" (")[0]
    assert "no luck" in Path(log).read_text()
    assert outcome.stdout == ""


def test_a_dry_run_prints_commands_and_starts_nothing(meshwright, plan, folder, monkeypatch):
    monkeypatch.setattr(launch, "supervise", None)
    outcome = meshwright("run", plan, "--dry-run", "--steps", 7, "--out", "my run")
    assert outcome.code == 0, outcome.stderr
    lines = [line for line in outcome.stdout.splitlines() if not line.startswith("#")]
    assert len(lines) == 4
    words = shlex.split(lines[1])
    assert words[-2:] == ["my run/execution.json", "my run"]
    assert {"RANK=1", "WORLD_SIZE=2", "OMP_NUM_THREADS=1"} <= set(words)
    assert lines[2].startswith("torchrun --standalone --nproc-per-node 2 -m meshwright run ")
    assert "--steps 7" in lines[2]
    assert lines[3].startswith("srun --nodes 1 ")
    # What the lines read is there, so that they can be pasted.
    assert json.loads((folder / "my run" / "execution.json").read_text())["num_steps"] == 7
    as_json = json.loads(meshwright("run", plan, "--dry-run", "--json").stdout)
    assert set(as_json["commands"]) == {"local", "torchrun", "slurm"}
    assert not (folder / "run").exists()


def test_a_plan_the_executor_cannot_run_is_refused_with_every_reason(meshwright, plan):
    text = plan.read_text()
    plan.write_text(
        text.replace("precision: fp32", "precision: bf16\n  lora_rank: 4").replace(
            "sharding: none", "sharding: zero1\n  sharding_group: 1"
        )
    )
    outcome = meshwright("run", plan, "--dry-run")
    assert outcome.code == 2
    assert "low-rank adapters" in outcome.stderr
    assert "sharding_group 1 is not run with zero1" in outcome.stderr


def test_missing_gpus_end_with_code_4_before_anything_starts(meshwright, plans, folder, monkeypatch):
    from meshwright.profiler import device

    def discover(kind):
        assert kind == "cuda"
        raise CalibrationError("no GPU found")

    monkeypatch.setattr(device, "discover_device", discover)
    outcome = meshwright("run", plans / "1.yaml", "--out", "run")
    assert outcome.code == 4
    assert "no GPU found; --device cpu runs the plan on the processor" in outcome.stderr
    assert not (folder / "run").exists()


def test_a_gpu_plan_on_the_processor_is_not_scored(meshwright, plans, stand_in):
    outcome = meshwright("run", plans / "1.yaml", "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.stderr
    comparison = json.loads(outcome.stdout)["comparison"]
    assert {term["error"] for term in comparison["terms"]} == {None}
    refused = meshwright("run", plans / "1.yaml", "--device", "cpu", "--append", "runs.csv")
    assert refused.code == 2
    assert "says nothing of the planned device" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--timeout", "soon"), "--timeout: "),
        (("--timeout", "5"), "--timeout: "),
        (("--timeout", "0.1s"), "from 1 s to a day"),
        (("--steps", "0"), "steps"),
        (("--seed", "-1"), "'-1' is no seed"),
        (("--append", "no/runs.csv"), "there is no folder"),
        (("--out", "file"), "cannot be used as a folder"),
        (("--out", "full"), "is not the folder of a run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_flags_are_refused_in_one_line(meshwright, plan, stand_in, folder, flags, message):
    (folder / "file").touch()
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("mine")
    outcome = meshwright("run", plan, *flags)
    assert outcome.code == 2
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert (folder / "full" / "thesis.txt").read_text() == "mine"


def test_a_folder_of_a_run_is_used_again_and_a_foreign_execution_is_not(meshwright, plan, stand_in, folder):
    for _ in range(2):
        assert meshwright("run", plan, "--out", "run", "--quiet").code == 0
    (folder / "run" / "execution.json").write_text("{}")
    outcome = meshwright("run", plan, "--out", "run")
    assert outcome.code == 2
    assert (folder / "run" / "execution.json").read_text() == "{}"


def test_under_torchrun_a_rank_needs_a_shared_folder(meshwright, plan, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "head")
    outcome = meshwright("run", plan)
    assert outcome.code == 2
    assert "--out" in outcome.stderr


def test_under_torchrun_only_rank_0_prints(meshwright, plan, stand_in, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "head"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "_remove", lambda paths: None)
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        outcome = meshwright("run", plan, "--out", "run", "--json")
        assert outcome.code == 0, outcome.stderr
        assert bool(outcome.stdout) == (rank == 0)
