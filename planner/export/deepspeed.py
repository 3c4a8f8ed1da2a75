"""Export to DeepSpeed: ds_config.json, torchrun script, Slurm job. The training script is the user's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType

from meshwright.planner.export.base import (
    ExportBundle,
    ExportFile,
    Launcher,
    raise_if_unsupported,
)
from meshwright.planner.export.deepspeed_rules import DEEPSPEED_RULES
from meshwright.planner.export.launchers import launch_command, launch_files
from meshwright.planner.export.rules import broken_rules
from meshwright.planner.export.scripts import ArgumentGroup, args_file, label
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["DeepSpeedExporter", "deepspeed_config"]

JsonObject = dict[str, object]

_STAGE = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3}
# DeepSpeed's own defaults, in elements; written out so that a change of them cannot change the run.
_BUCKET, _PREFETCH, _PERSISTENT, _LIVE = 500_000_000, 50_000_000, 100_000, 1_000_000_000

_CONFIG_OPTION = ArgumentGroup(
    name="DEEPSPEED_ARGS",
    comment="EDIT HERE if needed: options before the path of ds_config.json; for Hugging Face's Trainer: (--deepspeed)",
    options=(("--deepspeed",), ("--deepspeed_config",)),
)


class DeepSpeedExporter:
    """DeepSpeed's ZeRO and AutoTP, driven by a training script that calls ``deepspeed.initialize``."""

    target = "deepspeed"
    target_version = "0.19"
    search_limits: Mapping[str, tuple[int | str | bool, ...]] = MappingProxyType(
        {
            "pp": (1,),
            "vpp": (1,),
            "sequence_parallel": (False,),
            "recompute": ("none", "full"),
            "sharding": ("none", "zero1", "zero2", "zero3"),
        }
    )

    def unsupported(self, job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
        """Return every reason why DeepSpeed cannot run the plan; empty when it can."""
        return broken_rules(DEEPSPEED_RULES, job, plan)

    def export(self, job: TrainingJob, plan: ParallelPlan, launcher: Launcher) -> ExportBundle:
        """Return ``ds_config.json``, ``args.sh``, ``launch.sh`` and, for Slurm, ``job.sbatch``.

        Raises
        ------
        UnsupportedByTargetError
            If ``unsupported`` is not empty; the message lists every reason.
        """
        raise_if_unsupported(self, job, plan)
        title = (
            f"Meshwright: {label(job.model.name)} on {plan.num_gpus} GPUs, DeepSpeed {self.target_version}."
        )
        notes = _notes(plan)
        scripts = launch_files(
            job,
            plan,
            launcher,
            title=title,
            sources=("args.sh",),
            required=("TRAIN_SCRIPT", "your training script, which calls deepspeed.initialize"),
            words=('"$TRAIN_SCRIPT"', '"${DEEPSPEED_ARGS[@]}"', '"$EXPORT_DIR/ds_config.json"'),
        )
        return ExportBundle(
            target=self.target,
            target_version=self.target_version,
            files=(
                ExportFile("ds_config.json", json.dumps(deepspeed_config(job, plan), indent=2) + "\n"),
                ExportFile("args.sh", args_file(title, (_CONFIG_OPTION,), notes)),
                *scripts,
            ),
            launch_command=launch_command(launcher, "TRAIN_SCRIPT", "/path/to/train.py"),
            notes=notes,
        )


def deepspeed_config(job: TrainingJob, plan: ParallelPlan) -> JsonObject:
    """Return the contents of ``ds_config.json``.

    Parameters
    ----------
    job, plan : TrainingJob, ParallelPlan
        A plan that breaks no rule of the target.
    """
    num_micro_batches = plan.num_micro_batches(job.workload.global_batch_size)
    config: JsonObject = {}
    if plan.tp == 1:
        # With AutoTP DeepSpeed may count every rank as data parallel when it checks this product,
        # unless the script hands it the tp groups; the two keys below say the same.
        config["train_batch_size"] = job.workload.global_batch_size
    config["train_micro_batch_size_per_gpu"] = plan.micro_batch_size
    config["gradient_accumulation_steps"] = num_micro_batches
    config["gradient_clipping"] = 1.0
    if job.workload.precision == "bf16":
        config["bf16"] = {"enabled": True}
    elif job.workload.precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    config["zero_optimization"] = _zero(plan)
    if plan.tp > 1:
        config["tensor_parallel"] = {"autotp_size": plan.tp}
    if plan.recompute == "full":
        config["activation_checkpointing"] = {
            "partition_activations": False,
            "contiguous_memory_optimization": False,
            "cpu_checkpointing": False,
        }
    config["steps_per_print"] = 1
    return config


def _zero(plan: ParallelPlan) -> JsonObject:
    stage = _STAGE[plan.sharding]
    if stage == 0:
        return {"stage": 0}
    section: JsonObject = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": _BUCKET,
    }
    if stage < 3:
        section["allgather_bucket_size"] = _BUCKET
        return section
    section["stage3_prefetch_bucket_size"] = _PREFETCH
    section["stage3_param_persistence_threshold"] = _PERSISTENT
    section["stage3_max_live_parameters"] = _LIVE
    section["stage3_max_reuse_distance"] = _LIVE
    return section


def _notes(plan: ParallelPlan) -> tuple[str, ...]:
    notes = [
        "TRAIN_SCRIPT builds the model, the data and the optimizer; this export sets batches, precision, sharding.",
        "The script must take the batch sizes from ds_config.json and set the sequence length of the job itself.",
    ]
    if plan.tp > 1:
        notes.append(
            f"tp {plan.tp} uses AutoTP: a Hugging Face model with a tp plan, or a preset_model or partition_config "
            "added to tensor_parallel."
        )
        notes.append(
            "train_batch_size is left to DeepSpeed because its check may count tp ranks as data parallel."
        )
        notes.append(
            "Every rank of a tp group must read the same batch; give the sampler dp, not world, replicas."
        )
    if plan.recompute == "full":
        notes.append(
            "Recompute happens in the script: call gradient_checkpointing_enable() or deepspeed.checkpointing."
        )
    return tuple(notes)
