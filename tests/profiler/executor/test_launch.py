"""Starting the ranks of a plan: their commands and environment, and what happens around them."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from dataclasses import replace

import pytest

from meshwright.errors import CalibrationError, ExecutionError, SpecError
from meshwright.profiler.executor import launch
from meshwright.profiler.executor.report import rank_report_text, report_path
from meshwright.profiler.executor.supervise import Patience
from meshwright.simcore.domain.execution import execution_text

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
PATIENCE = Patience(silence=2.0, start=5.0, goodbye=0.3)


@pytest.fixture
def fake_worker(tmp_path, monkeypatch, make_report):
    """Workers that write a prepared report when they have seen their environment."""
    for rank in range(2):
        (tmp_path / f"prepared{rank}.json").write_text(rank_report_text(make_report(rank)))
    script = tmp_path / "fake.py"
    script.write_text(
        "import json, os, pathlib, shutil, sys\n"
        f"prepared = pathlib.Path({str(tmp_path)!r})\n"
        "assert json.loads(open(sys.argv[1]).read())['kind'] == 'execution'\n"
        "folder, rank = pathlib.Path(sys.argv[2]), os.environ['RANK']\n"
        "print(json.dumps(dict(os.environ)))\n"
        "if not (folder / 'forget').exists():\n"
        "    shutil.copy(prepared / f'prepared{rank}.json', folder / f'rank{rank}.json')\n"
    )
    real = launch._worker_arguments

    def arguments(directory):
        return (sys.executable, "-S", str(script), *real(directory)[-2:])

    monkeypatch.setattr(launch, "_worker_arguments", arguments)


@pytest.fixture
def folder(tmp_path, execution):
    path = tmp_path / "run"
    path.mkdir()
    (path / launch.EXECUTION_FILE).write_text(execution_text(execution))
    return path


def test_every_rank_is_a_command_without_a_shell(tmp_path, execution):
    commands = launch.local_commands(execution, tmp_path, 29501)
    assert [command.rank for command in commands] == [0, 1]
    assert commands[1].arguments == (
        sys.executable,
        "-P",
        "-m",
        "meshwright.profiler.executor.worker",
        str(tmp_path / "execution.json"),
        str(tmp_path),
    )
    assert commands[1].environment == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29501",
        "OMP_NUM_THREADS": "1",
        **launch.KEEPS_PAGES,
    }
    on_gpus = launch.local_commands(replace(execution, device="cuda"), tmp_path, 29501)
    assert not launch.KEEPS_PAGES.keys() & on_gpus[0].environment.keys()


def test_a_line_for_a_shell_reads_back_as_the_command(tmp_path, execution):
    command = launch.local_commands(execution, tmp_path / "a b; rm $HOME", 1)[0]
    words = shlex.split(launch.shell_line(command))
    assert words[-len(command.arguments) :] == list(command.arguments)
    assert dict(word.split("=", 1) for word in words[: -len(command.arguments)]) == command.environment


def test_a_run_here_returns_what_all_ranks_measured(folder, execution, fake_worker):
    report = launch.run_here(execution, folder, patience=PATIENCE)
    assert len(report.ranks) == 2
    assert report.step_seconds == 0.2
    environments = [json.loads((folder / f"rank{rank}.log").read_text()) for rank in range(2)]
    assert environments[0]["MASTER_PORT"] == environments[1]["MASTER_PORT"] != "0"


def test_reports_of_an_earlier_run_do_not_count(folder, execution, fake_worker, make_report):
    for rank in range(2):
        report_path(folder, rank).write_text(rank_report_text(make_report(rank)))
    (folder / "forget").touch()
    with pytest.raises(ExecutionError, match="not all ranks reported"):
        launch.run_here(execution, folder, patience=PATIENCE)


def test_a_link_left_in_the_folder_is_not_written_through(folder, execution, fake_worker):
    kept = folder / "kept"
    kept.write_text("mine")
    (folder / "rank0.log").symlink_to(kept)
    launch.run_here(execution, folder, patience=PATIENCE)
    assert kept.read_text() == "mine"
    assert not (folder / "rank0.log").is_symlink()


def test_torchrun_says_which_rank_this_is():
    assert launch.launcher_rank({}) is None
    here = launch.launcher_rank(TORCHRUN)
    assert (here.rank, here.world_size, here.local_rank) == (3, 4, 1)


@pytest.mark.parametrize(
    "change",
    [{"RANK": "x"}, {"WORLD_SIZE": ""}, {"LOCAL_RANK": "-1"}, {"MASTER_ADDR": ""}, {"MASTER_PORT": "9" * 20}],
    ids=lambda change: next(iter(change)),
)
def test_half_an_environment_of_torchrun_is_refused(change):
    with pytest.raises(SpecError, match="start this under torchrun, or unset RANK"):
        launch.launcher_rank({**TORCHRUN, **change})


def test_under_torchrun_rank_0_returns_the_reports_and_the_others_nothing(
    folder, execution, fake_worker, monkeypatch
):
    monkeypatch.setattr(os, "environ", {**os.environ, **TORCHRUN, "RANK": "1", "WORLD_SIZE": "2"})
    assert launch.run_as_rank(execution, folder, launch.launcher_rank(), patience=PATIENCE) is None
    written = report_path(folder, 1).read_text()
    monkeypatch.setitem(os.environ, "RANK", "0")
    # Rank 0 removes the reports that lie there before it joins; a true rank 1 reports after that.
    monkeypatch.setattr(launch, "_remove", lambda paths: None)
    report = launch.run_as_rank(execution, folder, launch.launcher_rank(), patience=PATIENCE)
    assert len(report.ranks) == 2
    assert report_path(folder, 1).read_text() == written


def test_torchrun_must_start_as_many_ranks_as_the_plan_has(folder, execution):
    with pytest.raises(SpecError, match="needs 2 ranks, and torchrun started 4"):
        launch.run_as_rank(execution, folder, launch.launcher_rank(TORCHRUN))


def test_several_nodes_get_lines_for_both_launchers():
    lines = launch.multi_node_commands(["run", "my plan.yaml", "--out", "/shared/run"], 2, 8)
    assert lines["torchrun"] == (
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id meshwright"
        " --rdzv-endpoint \"$HEAD_NODE:29500\" -m meshwright run 'my plan.yaml' --out /shared/run"
    )
    assert lines["slurm"].startswith("srun --nodes 2 --ntasks-per-node 1 torchrun --nnodes 2")
    assert '"$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)":29500' in lines["slurm"]
    single = launch.multi_node_commands(["run", "plan.yaml"], 1, 2)
    assert single["torchrun"] == "torchrun --standalone --nproc-per-node 2 -m meshwright run plan.yaml"


def test_more_processes_than_a_machine_takes_are_refused():
    launch.check_devices("cpu", 8)
    with pytest.raises(CalibrationError, match="needs 65 processes, and one machine runs 64 at most"):
        launch.check_devices("cpu", 65)


def test_a_model_that_this_machine_cannot_hold_is_refused(execution):
    launch.check_host_memory(execution, 2)
    plan = dataclasses.replace(execution.plan, layers_per_stage=(80,))
    huge = dataclasses.replace(
        execution,
        plan=plan,
        model=dataclasses.replace(
            execution.model, num_layers=80, hidden_size=2**17, ffn_hidden_size=2**20, head_dim=2**15
        ),
    )
    with pytest.raises(CalibrationError, match=r"GiB of weights, gradients and optimizer states, and this"):
        launch.check_host_memory(huge, 2)
    with pytest.raises(CalibrationError, match=r"GiB of weights, and this machine has"):
        launch.check_host_memory(huge, 2, is_served=True)
    # Its GPUs tell for themselves.
    launch.check_host_memory(dataclasses.replace(huge, device="cuda"), 2)


def test_missing_gpus_are_said_before_anything_starts(monkeypatch):
    from meshwright.profiler import device

    found = device.Device(
        type="cuda", name="a GPU", gpu=None, num_devices=1, num_sms=1, memory_bytes=1.0, l2_bytes=1.0
    )
    monkeypatch.setattr(device, "discover_device", lambda kind: found)
    launch.check_devices("cuda", 1)
    with pytest.raises(CalibrationError, match=r"needs 8 GPUs and this machine has 1 \(a GPU\)"):
        launch.check_devices("cuda", 8)
    monkeypatch.setattr(device, "discover_device", lambda kind: _none())
    with pytest.raises(CalibrationError, match=r"no GPU.*--device cpu"):
        launch.check_devices("cuda", 1)


def _none():
    raise CalibrationError("no GPU found")
