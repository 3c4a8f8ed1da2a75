"""What DeepSpeed (0.19) cannot run from a configuration file alone.

Its own parser accepts unknown sections, ZeRO-3 under a pipeline, and tensor parallelism under ZeRO-3; the
training then fails, or silently does something else.
"""

from __future__ import annotations

from meshwright.planner.export.rules import COMMON_RULES, Rule, divisors, nearest
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


def no_context_parallel(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """DeepSpeed cuts sequences only through changes of the model (Ulysses)."""
    if plan.cp == 1:
        return None
    return (
        f"cp {plan.cp} needs attention code of the training script in DeepSpeed; use cp 1 or target megatron."
    )


def no_expert_parallel(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Expert parallelism depends on the script's MoE layers."""
    if job.model.moe is None or plan.ep == plan.etp == 1:
        return None
    return f"ep {plan.ep} and etp {plan.etp} depend on the training script's MoE layers; use ep 1 and etp 1."


def sharding_group_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Sharded state spans all of dp. MiCS, which kept it in groups, is rejected by the parser since 0.19.8."""
    if plan.sharding == "hsdp":
        return "sharding 'hsdp' needs MiCS, which DeepSpeed 0.19.8 removed; use 'zero3' or target megatron."
    if plan.sharding == "none" or plan.sharding_group in (None, plan.dp):
        return None
    return f"{plan.sharding} spans all of dp in DeepSpeed; use sharding_group {plan.dp}, not {plan.sharding_group}."


def recompute_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """Checkpointing wraps whole layers."""
    if plan.recompute != "selective":
        return None
    return "recompute 'selective' does not exist in DeepSpeed, which recomputes whole layers; use 'full' or 'none'."


def precision_exists(job: TrainingJob, plan: ParallelPlan) -> str | None:
    """The file sets 16-bit formats or nothing."""
    precision = job.workload.precision
    if precision in ("fp32", "fp16", "bf16"):
        return None
    return f"precision '{precision}' cannot be set in ds_config.json; use 'bf16'."


DEEPSPEED_RULES: tuple[Rule, ...] = (
    *COMMON_RULES,
    no_pipeline,
    no_interleaving,
    no_gradient_sharding_in_pipeline,
    tensor_parallel_fits,
    tensor_parallel_without_weight_sharding,
    no_sequence_parallel,
    no_context_parallel,
    no_expert_parallel,
    sharding_group_exists,
    recompute_exists,
    precision_exists,
)
