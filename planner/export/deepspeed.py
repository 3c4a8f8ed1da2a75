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
from meshwright.planner.export.deepspeed_config import NVME_PLACEHOLDER, deepspeed_config
from meshwright.planner.export.deepspeed_rules import DEEPSPEED_RULES
from meshwright.planner.export.launchers import launch_command, launch_files
from meshwright.planner.export.rules import broken_rules
from meshwright.planner.export.scripts import ArgumentGroup, args_file, label
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["DeepSpeedExporter"]

_CONFIG_OPTION = ArgumentGroup(
    name="DEEPSPEED_ARGS",
    comment="EDIT HERE if needed: options before the path of ds_config.json; for Hugging Face's Trainer: (--deepspeed)",
    options=(("--deepspeed",), ("--deepspeed_config",)),
)
_NVME_CHECK = f"""if grep -q '{NVME_PLACEHOLDER}' "$EXPORT_DIR/ds_config.json"; then
  echo "launch.sh: set nvme_path in ds_config.json to a folder on a local drive of every node" >&2
  exit 2
fi"""


class DeepSpeedExporter:
    """DeepSpeed's ZeRO, AutoTP, AutoEP and Ulysses, driven by a script that calls ``deepspeed.initialize``."""

    target = "deepspeed"
    target_version = "0.19"
    search_limits: Mapping[str, tuple[int | str | bool, ...]] = MappingProxyType(
        {
            "pp": (1,),
            "vpp": (1,),
            "cp_method": ("ring", "ulysses"),
            "etp": (1,),
            "expert_overlap": (1,),
            "sequence_parallel": (False,),
            "recompute": ("none", "full"),
            "sharding": ("none", "zero1", "zero2", "zero3"),
            "vocab_parallel": ("none",),
        }
    )
    expresses: Mapping[str, str] = MappingProxyType(
        {
            "parallel": "dp, tp (AutoTP, below zero3), cp, ep (AutoEP)",
            "schedule": "none: stages belong to the training script",
            "context": "ulysses",
            "sharding": "none, zero1, zero2, zero3, zero3 with a secondary group (ZeRO++ hpZ)",
            "recompute": "none, full",
            "offload": "optimizer to cpu (in part with zero3) or nvme (zero3); weights to cpu or nvme (zero3); "
            "recomputed layers' inputs to cpu",
            "precision": "fp32, bf16, fp16",
        }
    )

    def unsupported(self, job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
        """Return every reason why DeepSpeed cannot run the plan; empty when it can."""
        return broken_rules(DEEPSPEED_RULES, job, plan)

    def export(self, job: TrainingJob, plan: ParallelPlan, launcher: Launcher) -> ExportBundle:
        """Return ``ds_config.json``, ``args.sh``, ``launch.sh`` and what the launcher adds.

        Raises
        ------
        UnsupportedByTargetError
            If ``unsupported`` is not empty; the message lists every reason.
        """
        raise_if_unsupported(self, job, plan)
        title = (
            f"Meshwright: {label(job.model.name)} on {plan.num_gpus} GPUs, DeepSpeed {self.target_version}."
        )
        notes = _notes(job, plan)
        uses_nvme = "nvme" in (plan.optimizer_offload, plan.parameter_offload)
        files = (
            ExportFile("ds_config.json", json.dumps(deepspeed_config(job, plan), indent=2) + "\n"),
            ExportFile("args.sh", args_file(title, (_CONFIG_OPTION,), notes)),
        )
        scripts = launch_files(
            job,
            plan,
            launcher,
            title=title,
            sources=("args.sh",),
            required=(("TRAIN_SCRIPT", "your training script, which calls deepspeed.initialize"),),
            words=('"$TRAIN_SCRIPT"', '"${DEEPSPEED_ARGS[@]}"', '"$EXPORT_DIR/ds_config.json"'),
            checks=(_NVME_CHECK,) if uses_nvme else (),
            mounted=files,
        )
        return ExportBundle(
            target=self.target,
            target_version=self.target_version,
            files=(*files, *scripts),
            launch_command=launch_command(launcher, "TRAIN_SCRIPT", "/path/to/train.py"),
            notes=notes,
        )


def _notes(job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
    notes = [
        "TRAIN_SCRIPT builds the model, the data and the optimizer; this export sets batches, precision, sharding.",
        "The script must take the batch sizes from ds_config.json and train on sequences of "
        f"{job.workload.sequence_length} tokens, which no key of it sets.",
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
    if plan.cp > 1:
        notes.append(
            f"cp {plan.cp} is Ulysses: the script calls UlyssesSPAttentionHF.register_with_transformers and wraps its "
            "data loader in UlyssesSPDataLoaderAdapter (deepspeed.runtime.sequence_parallel.ulysses_sp)."
        )
    if plan.ep > 1:
        notes.append(
            f"ep {plan.ep} uses AutoEP (0.19.8 or later) on a Hugging Face model that it knows: Mixtral, Qwen3-MoE, "
            "DeepSeek-V2 or V3, or name its layers in expert_parallel."
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
    if plan.recompute == "full":
        notes.append(
            "Recompute happens in the script: call gradient_checkpointing_enable() or deepspeed.checkpointing."
        )
    if plan.activation_offload:
        notes.append(
            "Offload of recomputed layers' inputs needs deepspeed.checkpointing, not another checkpoint."
        )
    if plan.optimizer_offload != "none":
        notes.append(
            "The script passes deepspeed.ops.adam.DeepSpeedCPUAdam, which updates the offloaded states."
        )
    if "nvme" in (plan.optimizer_offload, plan.parameter_offload):
        notes.append("Set nvme_path in ds_config.json to a folder on a local drive; launch.sh waits for it.")
    return tuple(notes)
