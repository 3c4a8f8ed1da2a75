"""Export to Megatron-LM: argument arrays, environment, torchrun script, Slurm job."""

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
from meshwright.planner.export.megatron_arguments import megatron_arguments, vocabulary_multiple
from meshwright.planner.export.megatron_rules import MEGATRON_RULES, is_fully_sharded
from meshwright.planner.export.rules import broken_rules
from meshwright.planner.export.scripts import args_file, label
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["MegatronExporter"]

#: Generations on which compute and communication kernels no longer need one hardware queue to keep order.
_NEEDS_NO_SINGLE_QUEUE = ("blackwell", "rubin")


class MegatronExporter:
    """Megatron-LM's ``pretrain_gpt.py``; its default rank order is the plan's, so none is written."""

    target = "megatron"
    target_version = "core_r0.16"
    search_limits: Mapping[str, tuple[int | str | bool, ...]] = MappingProxyType(
        {"schedule": ("none", "1f1b", "interleaved_1f1b")}
    )

    def unsupported(self, job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
        """Return every reason why Megatron-LM cannot run the plan; empty when it can."""
        return broken_rules(MEGATRON_RULES, job, plan)

    def export(self, job: TrainingJob, plan: ParallelPlan, launcher: Launcher) -> ExportBundle:
        """Return ``args.sh``, ``env.sh``, ``launch.sh`` and, for Slurm, ``job.sbatch``.

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
        scripts = launch_files(
            job,
            plan,
            launcher,
            title=title,
            sources=("env.sh", "args.sh"),
            required=("MEGATRON_PATH", f"a Megatron-LM checkout ({self.target_version})"),
            words=('"$MEGATRON_PATH/pretrain_gpt.py"', *(f'"${{{group.name}[@]}}"' for group in groups)),
        )
        return ExportBundle(
            target=self.target,
            target_version=self.target_version,
            files=(
                ExportFile("env.sh", _environment(job, plan)),
                ExportFile("args.sh", args_file(title, groups, notes)),
                *scripts,
            ),
            launch_command=launch_command(launcher, "MEGATRON_PATH", "/path/to/Megatron-LM"),
            notes=notes,
        )


def _environment(job: TrainingJob, plan: ParallelPlan) -> str:
    lines = ["# shellcheck shell=bash", "# Environment of every rank."]
    if is_fully_sharded(plan):
        lines += [
            "# Megatron-FSDP overlaps its gathers with compute, which one hardware queue would serialize.",
            "unset CUDA_DEVICE_MAX_CONNECTIONS",
        ]
    elif (plan.tp > 1 or plan.cp > 1) and not job.cluster.gpu.architecture.lower().startswith(
        _NEEDS_NO_SINGLE_QUEUE
    ):
        lines += [
            "# One hardware queue keeps communication ahead of the matrix multiply it overlaps; required here.",
            "export CUDA_DEVICE_MAX_CONNECTIONS=1",
        ]
    else:
        lines.append("# Nothing needs to be set for this plan.")
    return "\n".join(lines) + "\n"


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
        notes.append("Router losses and scaling keep Megatron's defaults; expert tokens are not dropped.")
    if model.num_mtp_layers:
        notes.append(
            f"The {model.num_mtp_layers} multi-token-prediction layers of the checkpoint are not trained."
        )
    if model.num_reserved_positions:
        notes.append(f"The {model.num_reserved_positions} unused rows of the position table are left out.")
    if is_fully_sharded(plan) and (plan.tp > 1 or plan.cp > 1):
        notes.append(
            "Megatron-FSDP with tp or cp leaves some overlap of tp communication unused on older GPUs."
        )
    vendor = label(job.cluster.gpu.vendor)
    if vendor.lower() != "nvidia":
        notes.append(f"On {vendor} GPUs use the vendor's fork of Megatron-LM, whose options may lag behind.")
    return tuple(notes)
