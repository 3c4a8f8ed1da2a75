"""What Hugging Face Accelerate (1.15) cannot run from a configuration file: FSDP2 with replicas, tp and cp, or DDP.

Its loader checks names of keys and of values, not whether axes go together with the model; the rest of these rules is
what ``Accelerator.prepare``, torch's context parallelism and the tensor parallel plans of transformers ask.
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
    window_bites,
)
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["ACCELERATE_RULES", "replicas_and_shards"]


def replicas_and_shards(plan: ParallelPlan) -> tuple[int, int]:
    """Return how many replicas of the weights there are and over how many dp ranks each is sharded."""
    if plan.sharding == "none":
        return plan.dp, 1
    group = plan.sharding_group or plan.dp
    return plan.dp // group, group


def no_pipeline(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """ParallelismConfig has no pipeline axis."""
    if plan.pp == 1:
        return None
    return f"pp {plan.pp} does not exist in Accelerate's parallelism_config; use pp 1 or target torchtitan."


def no_expert_axes(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """ParallelismConfig has no expert axis; expert layers under tp depend on the model's own plan."""
    if job.model.moe is None:
        return None
    if plan.ep > 1 or plan.etp > 1:
        return (
            f"ep {plan.ep} and etp {plan.etp} do not exist in Accelerate's parallelism_config; use ep 1 and etp 1 or "
            "target torchtitan."
        )
    if plan.tp > 1:
        return f"tp {plan.tp} with experts is not verified with Accelerate; use tp 1 or target torchtitan."
    return None


def experts_take_what_comes(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Capacities and chunks belong to the model's code."""
    if plan.expert_overlap > 1:
        return f"expert_overlap {plan.expert_overlap} does not exist in Accelerate; use expert_overlap 1."
    factor = job.workload.capacity_at(plan.ep)
    if job.model.moe is None or factor is None:
        return None
    return f"expert_capacity_factor {factor:g} does not exist in Accelerate; leave it out."


def sharding_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """FSDP2 shards gradients at least, over dp_shard x cp; other axes go with it alone (``_validate_accelerator``)."""
    if plan.sharding == "zero1":
        return "sharding 'zero1' does not exist in Accelerate (FSDP2); use 'zero2' or 'none'."
    if plan.secondary_group is not None:
        return f"secondary_group {plan.secondary_group} (ZeRO++ hpZ) does not exist in Accelerate; use sharding 'hsdp'."
    if plan.sharding == "none":
        if plan.tp == plan.cp == 1:
            return None
        return f"sharding 'none' (DDP) goes with neither tp {plan.tp} nor cp {plan.cp} in Accelerate; use 'zero3'."
    replicas, shards = replicas_and_shards(plan)
    if shards * plan.cp == 1:
        return (
            f"sharding '{plan.sharding}' has 1 rank to shard over in Accelerate; use a larger dp or 'none'."
        )
    if shards == 1 and replicas > 1:
        return (
            f"sharding_group 1 with cp {plan.cp} and {replicas} replicas is refused by Accelerate (dp_replicate needs "
            "dp_shard); use a larger sharding_group."
        )
    return None


def tensor_parallel_fits(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The plans of transformers give every rank whole heads and split the MLP; activations stay whole."""
    if plan.sequence_parallel:
        return "sequence_parallel (Megatron's) does not exist in Accelerate; turn it off."
    if plan.tp == 1:
        return None
    model = job.model
    if model.mla is not None:
        return f"tp {plan.tp} with multi-latent attention is not verified with Accelerate; use tp 1."
    fitting = divisors(model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size)
    if plan.tp in fitting:
        return None
    return (
        f"tp {plan.tp} does not evenly split num_attention_heads {model.num_attention_heads}, num_query_groups "
        f"{model.num_query_groups} and ffn_hidden_size {model.ffn_hidden_size}; use tp {nearest(plan.tp, fitting)}."
    )


def context_parallel_fits(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The context parallelism of torch replaces plain causal SDPA and cuts 2 cp chunks for balance."""
    if plan.cp == 1:
        return None
    if plan.cp_method not in ("ring", "all_gather"):
        return (
            f"cp_method '{plan.cp_method}' does not exist for FSDP2 in Accelerate; use 'ring', 'all_gather' or target "
            "deepspeed (Ulysses)."
        )
    if window_bites(job):
        return (
            f"sliding_window {job.model.sliding_window} does not go with cp {plan.cp} in Accelerate, which only knows "
            "causal masks; use cp 1."
        )
    if job.model.mla is not None:
        return f"cp {plan.cp} with multi-latent attention is not verified with Accelerate; use cp 1."
    length = job.workload.sequence_length
    if length % (2 * plan.cp):
        near = nearest_multiples(length, 2 * plan.cp)
        return f"sequence_length {length} does not split over 2 x cp {plan.cp} chunks; use {near}."
    return None


def recompute_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """One switch checkpoints every wrapped layer."""
    if plan.recompute == "selective":
        return "recompute 'selective' does not exist in Accelerate, which recomputes whole layers; use 'full' or 'none'."
    if plan.recompute_layers is not None and plan.recompute_layers < max(plan.layers_per_stage):
        return f"recompute_layers {plan.recompute_layers}: Accelerate recomputes all layers or none; leave it out."
    if plan.recompute == "full" and plan.sharding == "none":
        return "recompute 'full' is a switch of FSDP in Accelerate; use sharding 'zero2' or recompute 'none'."
    return None


def offload_is_all_or_nothing(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """One switch moves weights, gradients and optimizer states; another the inputs of recomputed layers."""
    kinds = (plan.optimizer_offload, plan.parameter_offload)
    if "nvme" in kinds:
        return "offload to 'nvme' does not exist in Accelerate's FSDP; use 'cpu' or target deepspeed."
    if kinds not in (("none", "none"), ("cpu", "cpu")) or plan.optimizer_offload_fraction != 1.0:
        return (
            f"optimizer_offload '{kinds[0]}' (fraction {plan.optimizer_offload_fraction:g}) with parameter_offload "
            f"'{kinds[1]}': Accelerate offloads both whole or neither (fsdp_offload_params); use 'cpu' for both."
        )
    if plan.activation_offload and plan.recompute != "full":
        return "activation_offload moves the inputs of recomputed layers in Accelerate; use recompute 'full' or turn it off."
    return None


def precision_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Values of ``mixed_precision`` that need no backend of their own."""
    precision = job.workload.precision
    if precision in ("fp32", "fp16", "bf16"):
        return None
    return f"precision '{precision}' is not mapped to Accelerate's mixed_precision; use 'bf16'."


ACCELERATE_RULES: tuple[Rule, ...] = (
    *COMMON_RULES,
    scales_have_settings,
    ranks_in_natural_order,
    no_pipeline,
    no_expert_axes,
    experts_take_what_comes,
    sharding_exists,
    tensor_parallel_fits,
    context_parallel_fits,
    recompute_exists,
    offload_is_all_or_nothing,
    precision_exists,
)
