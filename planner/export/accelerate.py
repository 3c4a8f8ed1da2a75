"""Export to Hugging Face Accelerate: its YAML file, environment, launch script, Slurm job. The script is the user's.

Rank order of its mesh is the plan's: dp_replicate slowest, then dp_shard, cp, and tp fastest
(``ParallelismConfig._get_mesh``, accelerate/parallelism_config.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import yaml

from meshwright.planner.export.accelerate_rules import ACCELERATE_RULES, replicas_and_shards
from meshwright.planner.export.base import (
    ExportBundle,
    ExportFile,
    Launcher,
    raise_if_unsupported,
)
from meshwright.planner.export.launchers import launch_command, launch_files
from meshwright.planner.export.rules import broken_rules, server_size
from meshwright.planner.export.scripts import label
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["AccelerateExporter", "accelerate_config"]

_STARTER = (
    "accelerate launch",
    '--config_file "$EXPORT_DIR/accelerate.yaml"',
    '--num_machines "$NNODES"',
    '--num_processes "$((NNODES * GPUS_PER_NODE))"',
    '--machine_rank "$NODE_RANK"',
    '--main_process_ip "$MASTER_ADDR"',
    '--main_process_port "$MASTER_PORT"',
)
_MIXED_PRECISION = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}
_COMM_STRATEGY = {"ring": "alltoall", "all_gather": "allgather"}


class AccelerateExporter:
    """Accelerate's FSDP2 with replicas, tensor and context parallelism, or DDP."""

    target = "accelerate"
    target_version = "1.15"
    search_limits: Mapping[str, tuple[int | str | bool, ...]] = MappingProxyType(
        {
            "pp": (1,),
            "vpp": (1,),
            "ep": (1,),
            "etp": (1,),
            "cp_method": ("ring", "all_gather"),
            "expert_overlap": (1,),
            "sequence_parallel": (False,),
            "recompute": ("none", "full"),
            "sharding": ("none", "zero2", "zero3", "hsdp"),
            "secondary_group": (0,),
            "optimizer_offload": ("none", "cpu"),
            "parameter_offload": ("none", "cpu"),
            "vocab_parallel": ("none",),
        }
    )
    expresses: Mapping[str, str] = MappingProxyType(
        {
            "parallel": "dp, tp without sequence parallelism (dense models), cp",
            "schedule": "none",
            "context": "ring (alltoall), all_gather",
            "sharding": "none (DDP; tp 1, cp 1), zero2, zero3, hsdp",
            "recompute": "none, full",
            "offload": "weights with optimizer states to cpu; recomputed layers' inputs to cpu",
            "precision": "fp32, bf16, fp16",
        }
    )

    def unsupported(self, job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
        """Return every reason why Accelerate cannot run the plan; empty when it can."""
        return broken_rules(ACCELERATE_RULES, job, plan)

    def export(self, job: TrainingJob, plan: ParallelPlan, launcher: Launcher) -> ExportBundle:
        """Return ``accelerate.yaml``, ``env.sh``, ``launch.sh`` and what the launcher adds.

        Raises
        ------
        UnsupportedByTargetError
            If ``unsupported`` is not empty; the message lists every reason.
        """
        raise_if_unsupported(self, job, plan)
        title = (
            f"Meshwright: {label(job.model.name)} on {plan.num_gpus} GPUs, Accelerate {self.target_version}."
        )
        notes = _notes(job, plan)
        head = "\n".join([f"# {title}", *(f"# Note: {note}" for note in notes)])
        document = yaml.safe_dump(accelerate_config(job, plan), sort_keys=False)
        files = (
            ExportFile("accelerate.yaml", f"{head}\n{document}"),
            ExportFile("env.sh", _environment(job, plan)),
        )
        files = (
            ExportFile("accelerate.yaml", f"{head}\n{document}"),
            ExportFile("env.sh", _environment(job, plan)),
        )
        scripts = launch_files(
            job,
            plan,
            launcher,
            title=title,
            sources=("env.sh",),
            required=(("TRAIN_SCRIPT", "your training script, which uses accelerate.Accelerator"),),
            words=('"$TRAIN_SCRIPT"',),
            starter=_STARTER,
            mounted=files,
        )
        return ExportBundle(
            target=self.target,
            target_version=self.target_version,
            files=(*files, *scripts),
            launch_command=launch_command(launcher, "TRAIN_SCRIPT", "/path/to/train.py"),
            notes=notes,
        )


def accelerate_config(job: TrainingJob, plan: ParallelPlan) -> dict[str, object]:
    """Return the contents of ``accelerate.yaml``.

    Parameters
    ----------
    job, plan : TrainingJob, ParallelPlan
        A plan that breaks no rule of the target.
    """
    gpus_per_node = min(server_size(job.cluster), plan.num_gpus)
    is_sharded = plan.sharding != "none"
    config: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP" if is_sharded else "MULTI_GPU" if plan.num_gpus > 1 else "NO",
        "mixed_precision": _MIXED_PRECISION[job.workload.precision],
        "num_machines": plan.num_gpus // gpus_per_node,
        "num_processes": plan.num_gpus,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }
    if not is_sharded:
        return config
    config["fsdp_config"] = {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": plan.sharding != "zero2",
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_offload_params": plan.parameter_offload == "cpu",
        "fsdp_activation_checkpointing": plan.recompute == "full",
        "fsdp_activation_checkpointing_offload": plan.activation_offload,
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    }
    replicas, shards = replicas_and_shards(plan)
    parallelism: dict[str, object] = {
        "parallelism_config_dp_replicate_size": replicas,
        "parallelism_config_dp_shard_size": shards,
        "parallelism_config_tp_size": plan.tp,
        "parallelism_config_cp_size": plan.cp,
    }
    if plan.cp > 1:
        parallelism["parallelism_config_cp_comm_strategy"] = _COMM_STRATEGY[plan.cp_method]
    config["parallelism_config"] = parallelism
    return config


def _environment(job: TrainingJob, plan: ParallelPlan) -> str:
    steps = plan.num_micro_batches(job.workload.global_batch_size)
    return (
        "# shellcheck shell=bash\n"
        "# Environment of every rank.\n"
        "# Accelerator() reads it; accelerate.yaml has no key for it.\n"
        f"export ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps}\n"
    )


def _notes(job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
    steps = plan.num_micro_batches(job.workload.global_batch_size)
    notes = [
        "TRAIN_SCRIPT builds the model, the data and the optimizer and calls Accelerator.prepare; this export sets "
        "precision, sharding, mesh and accumulation.",
        f"The script must load {plan.micro_batch_size} sequences of {job.workload.sequence_length} tokens per rank of dp "
        f"and train inside Accelerator.accumulate ({steps} micro-batches per step).",
    ]
    if plan.sharding != "none":
        notes.append("The layers that FSDP2 wraps are the model's _no_split_modules.")
    if plan.tp > 1:
        notes.append(
            "tp needs transformers: load the model with the tp mesh (device_mesh) and its own tp plan before prepare."
        )
    if plan.cp > 1:
        notes.append(
            "cp needs attn_implementation 'sdpa' without a mask, and each step inside Accelerator.maybe_context_parallel."
        )
    if job.model.moe is not None:
        notes.append(
            "The prediction assumes that the busiest expert rank gets "
            f"{job.workload.imbalance_at(plan.ep):g} times the mean."
        )
    if job.model.num_mtp_layers:
        notes.append(
            f"The prediction trains {job.model.num_mtp_layers} multi-token-prediction layers; the script must too."
        )
    if job.workload.lora_rank is not None:
        notes.append(f"The script freezes the weights and adds adapters of rank {job.workload.lora_rank}.")
    return tuple(notes)
