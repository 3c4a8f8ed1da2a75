"""Accelerate: its YAML says what the plan says, its launch script starts it, and it refuses what it lacks."""

from __future__ import annotations

import dataclasses
import subprocess

import pytest
import yaml
from export_cases import DEEPSEEK, LLAMA_8B, MIXTRAL, check_refusal, make_job, make_plan

from meshwright.planner.export import EXPORTERS, write_bundle

SP = {"sequence_parallel": True}
MIXED = make_plan(
    dp=4,
    tp=2,
    cp=2,
    sharding="hsdp",
    sharding_group=2,
    recompute="full",
    activation_offload=True,
    optimizer_offload="cpu",
    parameter_offload="cpu",
)
REFUSALS = {
    "a pipeline": (make_job(), make_plan(dp=8, pp=2, sharding="zero3"), ["pp 2", "torchtitan"]),
    "expert parallelism": (make_job(MIXTRAL), make_plan(dp=16, ep=8, sharding="zero3"), ["ep 8", "etp 1"]),
    "split experts": (make_job(MIXTRAL), make_plan(dp=16, etp=2, sharding="zero3"), ["ep 1 and etp 2"]),
    "experts with tp": (make_job(MIXTRAL), make_plan(dp=8, tp=2, sharding="zero3"), ["tp 2", "experts"]),
    "chunks of experts": (
        make_job(MIXTRAL),
        make_plan(dp=16, expert_overlap=2, sharding="zero3"),
        ["expert_overlap 2"],
    ),
    "a capacity": (
        make_job(MIXTRAL, expert_capacity_factor=1.5),
        make_plan(dp=16, sharding="zero3"),
        ["expert_capacity_factor 1.5"],
    ),
    "sharded optimizer states alone": (
        make_job(),
        make_plan(dp=16, sharding="zero1"),
        ["'zero1'", "'zero2'"],
    ),
    "a secondary group": (
        make_job(),
        make_plan(dp=16, sharding="zero3", secondary_group=8),
        ["secondary_group 8", "'hsdp'"],
    ),
    "replicas with tp": (make_job(), make_plan(dp=8, tp=2), ["'none'", "tp 2", "'zero3'"]),
    "nothing to shard over": (make_job(num_nodes=1), make_plan(dp=1, tp=8, sharding="zero3"), ["1 rank"]),
    "replicas of cp groups": (
        make_job(),
        make_plan(dp=8, cp=2, sharding="hsdp", sharding_group=1),
        ["sharding_group 1", "cp 2"],
    ),
    "sequence parallelism": (
        make_job(),
        make_plan(dp=8, tp=2, sharding="zero3", **SP),
        ["sequence_parallel"],
    ),
    "latent attention with tp": (
        make_job(dataclasses.replace(DEEPSEEK, moe=None), length=4096),
        make_plan(61, dp=8, tp=2, sharding="zero3"),
        ["tp 2", "latent"],
    ),
    "tp beyond the key/value heads": (
        make_job(),
        make_plan(dp=1, tp=16, sharding="zero3"),
        ["tp 16", "num_query_groups 8", "use tp 8"],
    ),
    "head exchange": (
        make_job(),
        make_plan(dp=8, cp=2, cp_method="ulysses", sharding="zero3"),
        ["'ulysses'", "'ring'", "deepspeed"],
    ),
    "a window with cp": (
        make_job(dataclasses.replace(LLAMA_8B, sliding_window=1024)),
        make_plan(dp=8, cp=2, sharding="zero3"),
        ["sliding_window 1024", "cp 2"],
    ),
    "latent attention with cp": (
        make_job(DEEPSEEK, length=4096),
        make_plan(61, dp=8, cp=2, sharding="zero3"),
        ["cp 2", "latent"],
    ),
    "a sequence that does not split": (
        make_job(length=8190),
        make_plan(dp=8, cp=2, sharding="zero3"),
        ["8190", "8188 or 8192"],
    ),
    "recompute of parts": (
        make_job(),
        make_plan(dp=16, sharding="zero3", recompute="selective"),
        ["'selective'", "'full'"],
    ),
    "recompute of some layers": (
        make_job(),
        make_plan(dp=16, sharding="zero3", recompute="full", recompute_layers=8),
        ["recompute_layers 8"],
    ),
    "recompute without FSDP": (make_job(), make_plan(dp=16, recompute="full"), ["'full'", "'zero2'"]),
    "drives": (
        make_job(),
        make_plan(dp=16, sharding="zero3", optimizer_offload="nvme", parameter_offload="nvme"),
        ["'nvme'", "deepspeed"],
    ),
    "states away and weights here": (
        make_job(),
        make_plan(dp=16, sharding="zero3", optimizer_offload="cpu"),
        ["optimizer_offload 'cpu'", "parameter_offload 'none'"],
    ),
    "activations without recompute": (
        make_job(),
        make_plan(dp=16, sharding="zero3", activation_offload=True),
        ["activation_offload", "'full'"],
    ),
    "fp8": (make_job(precision="fp8"), make_plan(dp=16, sharding="zero3"), ["'fp8'", "'bf16'"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_accelerate_refuses(case):
    check_refusal("accelerate", *REFUSALS[case])


def exported(job, plan, name="accelerate.yaml"):
    bundle = EXPORTERS["accelerate"].export(job, plan, "torchrun")
    return next(file.text for file in bundle.files if file.name == name)


def test_the_file_says_what_the_plan_says():
    config = yaml.safe_load(exported(make_job(), MIXED))
    assert config["distributed_type"] == "FSDP"
    assert (config["num_machines"], config["num_processes"]) == (2, 16)
    assert config["mixed_precision"] == "bf16"
    assert config["parallelism_config"] == {
        "parallelism_config_dp_replicate_size": 2,
        "parallelism_config_dp_shard_size": 2,
        "parallelism_config_tp_size": 2,
        "parallelism_config_cp_size": 2,
        "parallelism_config_cp_comm_strategy": "alltoall",
    }
    fsdp = config["fsdp_config"]
    assert fsdp["fsdp_version"] == 2
    assert fsdp["fsdp_reshard_after_forward"]
    assert fsdp["fsdp_offload_params"]
    assert fsdp["fsdp_activation_checkpointing"]
    assert fsdp["fsdp_activation_checkpointing_offload"]
    # 128 sequences over 4 replicas, one at a time.
    assert "export ACCELERATE_GRADIENT_ACCUMULATION_STEPS=32\n" in exported(make_job(), MIXED, "env.sh")


def test_weights_stay_gathered_under_zero2_and_replicas_need_no_fsdp():
    plan = make_plan(dp=16, sharding="zero2")
    fsdp = yaml.safe_load(exported(make_job(precision="fp32"), plan))
    assert fsdp["mixed_precision"] == "no"
    assert not fsdp["fsdp_config"]["fsdp_reshard_after_forward"]
    replicas = yaml.safe_load(exported(make_job(), make_plan(dp=16)))
    assert replicas["distributed_type"] == "MULTI_GPU"
    assert "fsdp_config" not in replicas
    assert "parallelism_config" not in replicas
    alone = yaml.safe_load(exported(make_job(), make_plan(dp=1)))
    assert alone["distributed_type"] == "NO"


def test_the_script_starts_accelerate_on_every_node(tmp_path):
    bundle = EXPORTERS["accelerate"].export(make_job(), MIXED, "torchrun")
    folder = tmp_path / "out dir"
    write_bundle(bundle, folder, force=False)
    stub = tmp_path / "accelerate"
    stub.write_text('#!/usr/bin/env bash\nprintf \'%s\\0\' "$@" "$ACCELERATE_GRADIENT_ACCUMULATION_STEPS"\n')
    stub.chmod(0o755)
    ran = subprocess.run(
        ["bash", str(folder / "launch.sh"), "--epochs", "1 2"],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "TRAIN_SCRIPT": "my train.py",
            "MASTER_ADDR": "node-0",
            "NODE_RANK": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split("\0")[:-1] == [
        *(
            "launch",
            "--config_file",
            f"{folder}/accelerate.yaml",
            "--num_machines",
            "2",
            "--num_processes",
            "16",
        ),
        *("--machine_rank", "1", "--main_process_ip", "node-0", "--main_process_port", "29500"),
        *("my train.py", "--epochs", "1 2", "32"),
    ]
