"""Export to Megatron-LM: argument arrays, environment, launch scripts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from meshwright.planner.export.base import (
    ExportBundle,
    ExportFile,
    Launcher,
    raise_if_unsupported,
)
from meshwright.planner.export.launchers import launch_command, launch_files
from meshwright.planner.export.megatron_arguments import megatron_arguments
from meshwright.planner.export.megatron_model import vocabulary_multiple
from meshwright.planner.export.megatron_rules import MEGATRON_RULES, is_fully_sharded
from meshwright.planner.export.rules import broken_rules
from meshwright.planner.export.scripts import args_file, label
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["MegatronExporter", "megatron_environment"]

#: Generations on which compute and communication kernels no longer need one hardware queue to keep order.
_NEEDS_NO_SINGLE_QUEUE = ("blackwell", "rubin")


class MegatronExporter:
    """Megatron-LM's ``pretrain_gpt.py``; its default rank order is the plan's, unless a device mapping says otherwise."""

    target = "megatron"
    target_version = "core_r0.16"
    search_limits: Mapping[str, tuple[int | str | bool, ...]] = MappingProxyType(
        {
            "schedule": ("none", "1f1b", "interleaved_1f1b"),
            "vocab_parallel": ("none", "redistributed"),
            "expert_overlap": (1,),
            "secondary_group": (0,),
            "optimizer_offload": ("none", "cpu"),
            "parameter_offload": ("none",),
        }
    )
    expresses: Mapping[str, str] = MappingProxyType(
        {
            "parallel": "dp, tp with or without sequence parallelism, pp, vpp, cp, ep, etp",
            "schedule": "1f1b, interleaved_1f1b",
            "stages": "any number of layers each",
            "context": "ring (p2p), ulysses (a2a), all_gather, hierarchical (a2a+p2p)",
            "sharding": "none, zero1 (in groups too), zero2, zero3, hsdp; from zero2 on Megatron-FSDP, pp 1",
            "recompute": "none, selective by module, full for all or some layers",
            "offload": "optimizer to cpu in part or whole (zero1); activations (pp 1, no recompute)",
            "experts": "capacity, group-limited routing, shared experts, dense layers, multi-token prediction",
            "precision": "bf16, fp16, fp8, fp8_block, mxfp8",
        }
    )

    def unsupported(self, job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
        """Return every reason why Megatron-LM cannot run the plan; empty when it can."""
        return broken_rules(MEGATRON_RULES, job, plan)

    def export(self, job: TrainingJob, plan: ParallelPlan, launcher: Launcher) -> ExportBundle:
        """Return ``args.sh``, ``env.sh``, ``launch.sh`` and what the launcher adds.

        Raises
        ------
        UnsupportedByTargetError
            If ``unsupported`` is not empty; the message lists every reason.
        """
        raise_if_unsupported(self, job, plan)
        title = (
            f"Meshwright: {label(job.model.name)} on {plan.num_gpus} GPUs, Megatron-LM {self.target_version}."
        )
        groups = megatron_arguments(job, plan)
        notes = _notes(job, plan)
        files = (
            ExportFile("env.sh", megatron_environment(job, plan)),
            ExportFile("args.sh", args_file(title, groups, notes)),
        )
        scripts = launch_files(
            job,
            plan,
            launcher,
            title=title,
            sources=("env.sh", "args.sh"),
            required=(("MEGATRON_PATH", f"a Megatron-LM checkout ({self.target_version})"),),
            words=('"$MEGATRON_PATH/pretrain_gpt.py"', *(f'"${{{group.name}[@]}}"' for group in groups)),
            mounted=files,
        )
        return ExportBundle(
            target=self.target,
            target_version=self.target_version,
            files=(*files, *scripts),
            launch_command=launch_command(launcher, "MEGATRON_PATH", "/path/to/Megatron-LM"),
            notes=notes,
        )


def megatron_environment(job: TrainingJob, plan: ParallelPlan) -> str:
    """Return the environment of every rank, to be sourced."""
    lines = ["# shellcheck shell=bash", "# Environment of every rank."]
    if is_fully_sharded(plan):
        lines += [
            "# Megatron-FSDP overlaps its gathers with compute, which one hardware queue would serialize.",
            "unset CUDA_DEVICE_MAX_CONNECTIONS",
        ]
    elif (plan.tp > 1 or plan.cp > 1) and not all(
        gpu.architecture.lower().startswith(_NEEDS_NO_SINGLE_QUEUE) for gpu in job.cluster.gpus
    ):
        lines += [
            "# One hardware queue keeps communication ahead of the matrix multiply it overlaps; required here.",
            "export CUDA_DEVICE_MAX_CONNECTIONS=1",
        ]
    else:
        lines.append("# Nothing needs to be set for this plan.")
    return "\n".join(lines) + "\n"


def _expert_notes(job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
    """Return what the prediction assumes of the router, which training has to bring about."""
    workload, capacity = job.workload, job.workload.capacity_at(plan.ep)
    return (
        "The load-balancing loss and its coefficient are usual values; router scaling keeps Megatron's default.",
        "The prediction assumes that the busiest expert rank gets "
        f"{workload.imbalance_at(plan.ep):g} times the mean.",
        "Experts drop no tokens."
        if capacity is None
        else f"Experts drop tokens beyond {capacity:g} times their mean share.",
    )


def _notes(job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
    model = job.model
    notes = [
        "DATA_ARGS trains on random tokens with a null tokenizer; edit it for real data.",
        "Learning rate, warm-up and the 100 iterations of TRAINING_ARGS are placeholders; the plan does not set them.",
        "Rope base and scaling, norm epsilon and initialization keep Megatron's defaults; "
        "set them to continue from a checkpoint.",
    ]
    multiple = vocabulary_multiple(model.vocab_size, plan.tp) * plan.tp
    padded = -(-model.vocab_size // multiple) * multiple
    if padded != model.vocab_size:
        notes.append(
            f"The vocabulary of {model.vocab_size} is padded to {padded} rows so that tp {plan.tp} splits it."
        )
    notes.append(
        "The gated MLP is written as SwiGLU."
        if model.is_gated_mlp
        else "The MLP activation is Megatron's default GELU."
    )
    if model.moe is not None:
        notes += _expert_notes(job, plan)
    if model.num_mtp_layers:
        notes.append("The loss of multi-token prediction keeps Megatron's default weight.")
    if plan.vocab_parallel == "redistributed":
        notes.append("Vocabulary redistributed: layers make room for embedding and head by the layout alone.")
    if plan.recompute == "full" and plan.recompute_layers is not None and model.num_mtp_layers:
        notes.append("Recompute of some layers leaves out those of multi-token prediction.")
    if plan.optimizer_offload != "none":
        notes.append("The offloaded optimizer states need pinned host memory of the node.")
    if plan.activation_offload:
        notes.append("Activations of all layers but the last travel to host memory.")
    if model.num_reserved_positions:
        notes.append(f"The {model.num_reserved_positions} unused rows of the position table are left out.")
    if is_fully_sharded(plan) and (plan.tp > 1 or plan.cp > 1):
        notes.append(
            "Megatron-FSDP with tp or cp leaves some overlap of tp communication unused on older GPUs."
        )
    vendor = label(job.cluster.gpus[0].vendor)
    if vendor.lower() != "nvidia":
        notes.append(f"On {vendor} GPUs use the vendor's fork of Megatron-LM, whose options may lag behind.")
    return tuple(notes)
