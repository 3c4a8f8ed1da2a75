"""Export to Megatron-Bridge: a Python module that puts a plan into a recipe's configuration, and its launch script.

Field names from NVIDIA-NeMo/Megatron-Bridge 0.7 (training/config.py: ``ConfigContainer``; training/comm_overlap.py;
training/mixed_precision.py; scripts/translate_mlm_to_bridge.py). Bridge builds on Megatron-Core, whose rules hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from meshwright.planner.export.base import ExportBundle, ExportFile, Launcher, raise_if_unsupported
from meshwright.planner.export.launchers import launch_command, launch_files
from meshwright.planner.export.megatron import MegatronExporter, megatron_environment
from meshwright.planner.export.megatron_arguments import (
    CP_COMM_TYPE,
    FSDP_STRATEGY,
    counts_on_tp_overlap,
    pipeline_layout,
)
from meshwright.planner.export.megatron_rules import (
    head_exchange_ranks,
    is_fully_sharded,
    num_sharding_groups,
)
from meshwright.planner.export.scripts import label
from meshwright.simcore.domain.device_mapping import RANK_ORDERS
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["MegatronBridgeExporter", "bridge_settings"]

_MODULE = "meshwright_plan"
_PRECISION = {
    "bf16": "bf16_mixed",
    "fp16": "fp16_mixed",
    "fp8": "bf16_with_fp8_delayed_scaling_mixed",
    "fp8_block": "bf16_with_fp8_subchannel_scaling_mixed",
    "mxfp8": "bf16_with_mxfp8_mixed",
}
_MEGATRON = MegatronExporter()


class MegatronBridgeExporter:
    """Overrides of a Megatron-Bridge recipe; what Megatron-LM cannot run, Bridge cannot either."""

    target = "megatron-bridge"
    target_version = "0.7"
    search_limits: Mapping[str, tuple[int | str | bool, ...]] = _MEGATRON.search_limits
    expresses: Mapping[str, str] = MappingProxyType(
        {**_MEGATRON.expresses, "model": "that of the recipe, checked against the plan's shape"}
    )

    def unsupported(self, job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
        """Return every reason why Megatron-Bridge cannot run the plan; empty when it can."""
        reasons = _MEGATRON.unsupported(job, plan)
        mapping = plan.device_mapping
        if mapping is not None and mapping.rank_order != RANK_ORDERS[0] and is_fully_sharded(plan):
            reasons = (
                *reasons,
                f"rank_order '{mapping.rank_order}' does not go with Megatron-FSDP in Bridge.",
            )
        return reasons

    def export(self, job: TrainingJob, plan: ParallelPlan, launcher: Launcher) -> ExportBundle:
        """Return ``meshwright_plan.py``, ``env.sh``, ``launch.sh`` and what the launcher adds.

        Raises
        ------
        UnsupportedByTargetError
            If ``unsupported`` is not empty; the message lists every reason.
        """
        raise_if_unsupported(self, job, plan)
        title = f"Meshwright: {label(job.model.name)} on {plan.num_gpus} GPUs, Megatron-Bridge {self.target_version}."
        notes = _notes(job, plan)
        environment = megatron_environment(job, plan) + (
            "# Lets the training script import meshwright_plan.\n"
            'export PYTHONPATH="$EXPORT_DIR${PYTHONPATH:+:$PYTHONPATH}"\n'
        )
        files = (
            ExportFile(f"{_MODULE}.py", _module(job, plan, title, notes)),
            ExportFile("env.sh", environment),
        )
        scripts = launch_files(
            job,
            plan,
            launcher,
            title=title,
            sources=("env.sh",),
            required=(("TRAIN_SCRIPT", "your training script, which calls meshwright_plan.apply_plan"),),
            words=('"$TRAIN_SCRIPT"',),
            mounted=files,
        )
        return ExportBundle(
            target=self.target,
            target_version=self.target_version,
            files=(*files, *scripts),
            launch_command=launch_command(launcher, "TRAIN_SCRIPT", "/path/to/train.py"),
            notes=notes,
        )


def bridge_settings(job: TrainingJob, plan: ParallelPlan) -> dict[str, object]:
    """Return the fields of ``ConfigContainer`` that a plan sets, by dotted name.

    Parameters
    ----------
    job, plan : TrainingJob, ParallelPlan
        A plan that breaks no rule of Megatron-LM.
    """
    workload = job.workload
    uneven = len(set(plan.layers_per_stage)) > 1
    settings: dict[str, object] = {
        "model.tensor_model_parallel_size": plan.tp,
        "model.sequence_parallel": plan.sequence_parallel,
        "model.pipeline_model_parallel_size": plan.pp,
        "model.virtual_pipeline_model_parallel_size": plan.vpp if plan.vpp > 1 and not uneven else None,
        "model.pipeline_model_parallel_layout": (
            pipeline_layout(plan.layers_per_stage, job.model.num_mtp_layers) if uneven else None
        ),
        "model.context_parallel_size": plan.cp,
        "train.micro_batch_size": plan.micro_batch_size,
        "train.global_batch_size": workload.global_batch_size,
        "dataset.seq_length": workload.sequence_length,
        "model.seq_length": workload.sequence_length,
        "mixed_precision": _PRECISION[workload.precision],
    }
    if plan.cp > 1:
        settings["model.cp_comm_type"] = CP_COMM_TYPE[plan.cp_method]
    if plan.cp_method == "hierarchical":
        inner = head_exchange_ranks(job, plan)
        settings["model.hierarchical_context_parallel_sizes"] = [inner, plan.cp // inner]
    if job.model.moe is not None:
        settings |= {
            "model.expert_model_parallel_size": plan.ep,
            "model.expert_tensor_parallel_size": plan.etp,
            "model.moe_expert_capacity_factor": workload.capacity_at(plan.ep),
            "model.moe_pad_expert_input_to_capacity": workload.capacity_at(plan.ep) is not None,
        }
    if plan.device_mapping is not None and plan.device_mapping.rank_order != RANK_ORDERS[0]:
        settings["dist.use_tp_pp_dp_mapping"] = True
    return settings | _recompute(plan) | _sharding(plan) | _offload(plan)


def _recompute(plan: ParallelPlan) -> dict[str, object]:
    settings: dict[str, object] = {
        "model.recompute_granularity": None if plan.recompute == "none" else plan.recompute,
        "model.recompute_method": None,
        "model.recompute_num_layers": None,
    }
    if plan.recompute == "selective":
        settings["model.recompute_modules"] = list(dict.fromkeys(plan.recompute_modules)) or ["core_attn"]
    if plan.recompute == "full":
        settings["model.recompute_method"] = "uniform" if plan.recompute_layers is None else "block"
        settings["model.recompute_num_layers"] = plan.recompute_layers or 1
    return settings


def _sharding(plan: ParallelPlan) -> dict[str, object]:
    replicates = plan.dp * plan.cp > 1
    settings: dict[str, object] = {
        "ddp.use_distributed_optimizer": plan.sharding != "none",
        "optimizer.use_distributed_optimizer": plan.sharding != "none",
        "ddp.overlap_grad_reduce": replicates,
        "ddp.overlap_param_gather": replicates and plan.sharding != "none",
        "ddp.num_distributed_optimizer_instances": num_sharding_groups(plan),
    }
    if is_fully_sharded(plan):
        settings |= {
            "dist.use_megatron_fsdp": True,
            "ddp.use_megatron_fsdp": True,
            "ddp.data_parallel_sharding_strategy": FSDP_STRATEGY[plan.sharding],
            "model.gradient_accumulation_fusion": False,
            "checkpoint.ckpt_format": "fsdp_dtensor",
        }
    return settings


def _offload(plan: ParallelPlan) -> dict[str, object]:
    settings: dict[str, object] = {}
    if plan.optimizer_offload == "cpu":
        settings |= {
            "optimizer.optimizer_cpu_offload": True,
            "optimizer.optimizer_offload_fraction": plan.optimizer_offload_fraction,
            "optimizer.use_precision_aware_optimizer": True,
            "optimizer.overlap_cpu_optimizer_d2h_h2d": True,
        }
    if plan.activation_offload:
        settings |= {"model.cpu_offloading": True, "model.cpu_offloading_num_layers": plan.num_layers - 1}
    return settings


def _module(job: TrainingJob, plan: ParallelPlan, title: str, notes: tuple[str, ...]) -> str:
    model = job.model
    shape = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
    }
    if model.moe is not None:
        shape["num_moe_experts"] = model.moe.num_experts
    lines = [f"    config.{name} = {value!r}" for name, value in bridge_settings(job, plan).items()]
    if counts_on_tp_overlap(job, plan):
        lines.append("    config.comm_overlap = CommOverlapConfig(tp_comm_overlap=True)")
    checks = "\n".join(f'    "{name}": {value},' for name, value in shape.items())
    imported = (
        "\nfrom megatron.bridge.training.comm_overlap import CommOverlapConfig\n"
        if counts_on_tp_overlap(job, plan)
        else ""
    )
    comments = "\n".join(f"# Note: {note}" for note in notes)
    return f'''# {title}
{comments}
"""Puts the plan into the configuration of a Megatron-Bridge recipe.

    from megatron.bridge.recipes.llama import llama3_8b_pretrain_config  # a recipe of the plan's model
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from meshwright_plan import apply_plan

    config = llama3_8b_pretrain_config()
    apply_plan(config)
    pretrain(config, forward_step)
"""
{imported}
SHAPE = {{
{checks}
}}


def apply_plan(config):
    """Set what the plan decides; raise ValueError where the recipe's model is another one."""
    for name, wanted in SHAPE.items():
        found = getattr(config.model, name)
        if found != wanted:
            raise ValueError(f"the plan is for a model with {{name}} {{wanted}}, not {{found}}")
{chr(10).join(lines)}
'''


def _notes(job: TrainingJob, plan: ParallelPlan) -> tuple[str, ...]:
    notes = [
        "TRAIN_SCRIPT loads a recipe of the plan's model, calls meshwright_plan.apply_plan and trains; see its head.",
        "Data, optimizer, learning rate and the rest of the model are those of the recipe.",
    ]
    if plan.vocab_parallel == "redistributed":
        notes.append("Vocabulary redistributed: layers make room for embedding and head by the layout alone.")
    if job.model.moe is not None:
        notes.append(
            f"The prediction assumes that the busiest expert rank gets {job.workload.imbalance_at(plan.ep):g} times the mean."
        )
    return tuple(notes)
