"""What DeepSpeed (0.19) cannot run from a configuration file alone.

Its own parser accepts unknown sections, ZeRO-3 under a pipeline, tensor parallelism under ZeRO-3, weights offloaded
below ZeRO-3, and a secondary group that does not divide the ranks; the training then fails, or silently does
something else.
"""

from __future__ import annotations

from meshwright.planner.export.rules import (
    COMMON_RULES,
    Rule,
    divisors,
    nearest,
    nearest_multiples,
    ranks_in_natural_order,
    scales_have_settings,
)
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["DEEPSPEED_RULES"]


def no_pipeline(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The number of stages is an argument of the user's PipelineModule; no key of the file sets it."""
    if plan.pp == 1:
        return None
    return (
        f"pp {plan.pp} is set by a PipelineModule in the training script, which no key of ds_config.json can do; "
        "use pp 1 or target megatron."
    )


def no_interleaving(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """DeepSpeed's pipeline engine has one schedule."""
    if plan.vpp == 1 and plan.schedule in ("none", "1f1b"):
        return None
    return f"schedule '{plan.schedule}' with vpp {plan.vpp} does not exist in DeepSpeed, which has only 1f1b with vpp 1."


def no_gradient_sharding_in_pipeline(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Its pipeline accumulates whole gradients."""
    if plan.pp == 1 or plan.sharding in ("none", "zero1"):
        return None
    return f"sharding '{plan.sharding}' is incompatible with pp {plan.pp} in DeepSpeed; use 'zero1' or pp 1."


def tensor_parallel_fits(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """AutoTP gives every rank whole heads; an uneven share would contradict the plan's prediction."""
    heads, groups = job.model.num_attention_heads, job.model.num_query_groups
    fitting = divisors(heads, groups, job.model.ffn_hidden_size)
    if plan.tp in fitting:
        return None
    return (
        f"tp {plan.tp} does not evenly split num_attention_heads {heads}, num_query_groups {groups} and "
        f"ffn_hidden_size {job.model.ffn_hidden_size}; use tp {nearest(plan.tp, fitting)}."
    )


def tensor_parallel_without_weight_sharding(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """AutoTP is documented with ZeRO 0 to 2; only the last 0.19 releases claim ZeRO-3."""
    if plan.tp == 1 or plan.sharding != "zero3":
        return None
    return f"tp {plan.tp} (AutoTP) does not go with sharding 'zero3'; use 'zero2' or tp 1."


def no_sequence_parallel(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Megatron's sequence parallelism is not DeepSpeed's (Ulysses)."""
    if not plan.sequence_parallel:
        return None
    return "sequence_parallel (Megatron's) does not exist in DeepSpeed; turn it off."


def context_parallel_is_ulysses(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Ulysses swaps sequence for heads; it needs whole query heads and whole key/value heads or copies of them."""
    if plan.cp == 1:
        return None
    if plan.cp_method != "ulysses":
        return f"cp_method '{plan.cp_method}' does not exist in DeepSpeed; use 'ulysses', cp 1 or target megatron."
    if plan.tp > 1:
        return f"cp {plan.cp} (Ulysses) does not go with tp {plan.tp} (AutoTP); use tp 1 or cp 1."
    heads, groups, length = (
        job.model.num_attention_heads,
        job.model.num_query_groups,
        job.workload.sequence_length,
    )
    fitting = [d for d in divisors(heads) if groups % d == 0 or d % groups == 0]
    if plan.cp not in fitting:
        return (
            f"cp {plan.cp} (Ulysses) does not split num_attention_heads {heads} with num_query_groups {groups}; "
            f"use cp {nearest(plan.cp, fitting)}."
        )
    if length % plan.cp:
        return f"sequence_length {length} does not split over cp {plan.cp}; use {nearest_multiples(length, plan.cp)}."
    return None


def expert_parallel_is_autoep(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """AutoEP (module_inject/auto_ep_folding.py, runtime/engine.py) splits no expert, and goes with few other axes."""
    if job.model.moe is None:
        return None
    if plan.etp > 1:
        return f"etp {plan.etp} does not exist in DeepSpeed (AutoEP keeps experts whole); use etp 1."
    if plan.ep == 1:
        if plan.tp > 1:
            return (
                f"tp {plan.tp} with experts needs ep 2 or more (AutoEP with AutoTP); use a larger ep or tp 1."
            )
        return None
    stage = plan.num_gpus // plan.pp
    if stage % plan.ep:
        return f"ep {plan.ep} does not divide the {stage} ranks; use ep {nearest(plan.ep, divisors(stage))}."
    if plan.sharding == "zero3" and (plan.cp > 1 or plan.secondary_group is not None):
        return (
            f"ep {plan.ep} (AutoEP) with sharding 'zero3' goes with neither cp nor secondary_group; use cp 1 without "
            "secondary_group, or 'zero2'."
        )
    if plan.tp > 1 and plan.optimizer_offload != "none":
        return f"ep {plan.ep} with tp {plan.tp} does not go with optimizer_offload; use tp 1 or 'none'."
    return None


def experts_take_what_comes(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Capacities and chunks are of DeepSpeed's own MoE layer, which the training script builds."""
    if plan.expert_overlap > 1:
        return (
            f"expert_overlap {plan.expert_overlap} is of Tutel's layers, which the training script builds; no key of "
            "ds_config.json sets it; use expert_overlap 1."
        )
    factor = job.workload.capacity_at(plan.ep)
    if job.model.moe is None or factor is None:
        return None
    return (
        f"expert_capacity_factor {factor:g} is an argument of the training script's MoE layers, which no key of "
        "ds_config.json can set; leave it out."
    )


def sharding_group_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Sharded state spans all of dp. MiCS, which kept it in groups, is rejected by the parser since 0.19.8."""
    if plan.sharding == "hsdp":
        return (
            "sharding 'hsdp' needs MiCS (mics_shard_size), which DeepSpeed 0.19.8 removed; use 'zero3', with a "
            "secondary_group to gather near by, or target megatron."
        )
    if plan.sharding == "none" or plan.sharding_group in (None, plan.dp):
        return None
    return f"{plan.sharding} spans all of dp in DeepSpeed; use sharding_group {plan.dp}, not {plan.sharding_group}."


def secondary_group_is_contiguous(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Groups of hpZ are consecutive global ranks (utils/groups.py); a group of one, a whole copy, is "off"."""
    if plan.secondary_group is None:
        return None
    if plan.secondary_group == 1:
        return "secondary_group 1 (zero_hpz_partition_size) turns hpZ off in DeepSpeed; use 2 or more."
    if plan.cp > 1:
        return (
            f"secondary_group {plan.secondary_group} counts consecutive ranks in DeepSpeed, which with cp {plan.cp} are "
            "not those of dp; use cp 1 or no secondary_group."
        )
    return None


def optimizer_offload_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Offloaded states are shards; drives and parts are ZeRO-3's."""
    kind, fraction = plan.optimizer_offload, plan.optimizer_offload_fraction
    if kind == "none":
        return None
    if plan.sharding == "none":
        return (
            f"optimizer_offload '{kind}' needs sharding zero1 or above in DeepSpeed, not 'none'; use 'zero1'."
        )
    if kind == "nvme" and plan.sharding != "zero3":
        return f"optimizer_offload 'nvme' needs sharding 'zero3' in DeepSpeed, not '{plan.sharding}'."
    if fraction < 1.0 and (plan.sharding != "zero3" or kind == "nvme"):
        return (
            f"optimizer_offload_fraction {fraction:g} (ratio) needs sharding 'zero3' and 'cpu' in DeepSpeed, not "
            f"'{plan.sharding}' and '{kind}'; use fraction 1."
        )
    return None


def parameter_offload_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Weights are offloaded with the optimizer that updates them."""
    if plan.parameter_offload == "none" or plan.optimizer_offload != "none":
        return None
    return (
        f"parameter_offload '{plan.parameter_offload}' without optimizer_offload is not verified with DeepSpeed; "
        "use optimizer_offload 'cpu'."
    )


def activation_offload_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """What is offloaded is the input of checkpointed layers."""
    if not plan.activation_offload or plan.recompute == "full":
        return None
    return (
        "activation_offload (cpu_checkpointing) moves the inputs of recomputed layers in DeepSpeed; "
        "use recompute 'full' or turn it off."
    )


def recompute_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Checkpointing wraps whole layers; which ones is the script's choice."""
    if plan.recompute == "selective":
        return "recompute 'selective' does not exist in DeepSpeed, which recomputes whole layers; use 'full' or 'none'."
    if plan.recompute_layers is None or plan.recompute_layers >= max(plan.layers_per_stage):
        return None
    return (
        f"recompute_layers {plan.recompute_layers} is the training script's choice, which no key of ds_config.json "
        "makes; leave it out."
    )


def precision_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The file sets 16-bit formats or nothing."""
    precision = job.workload.precision
    if precision in ("fp32", "fp16", "bf16"):
        return None
    return f"precision '{precision}' cannot be set in ds_config.json; use 'bf16'."


DEEPSPEED_RULES: tuple[Rule, ...] = (
    *COMMON_RULES,
    scales_have_settings,
    ranks_in_natural_order,
    no_pipeline,
    no_interleaving,
    no_gradient_sharding_in_pipeline,
    tensor_parallel_fits,
    tensor_parallel_without_weight_sharding,
    no_sequence_parallel,
    context_parallel_is_ulysses,
    expert_parallel_is_autoep,
    experts_take_what_comes,
    sharding_group_exists,
    secondary_group_is_contiguous,
    optimizer_offload_exists,
    parameter_offload_exists,
    activation_offload_exists,
    recompute_exists,
    precision_exists,
)
