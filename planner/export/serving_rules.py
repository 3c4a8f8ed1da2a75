"""Rules that hold for every serving target: pools that fit, sizes that must divide, requests that must fit.

Engines check some of these themselves, most of them after the weights are loaded: experts that do not divide end a
run of vLLM in the model's constructor (vllm-project/vllm issue 52435), heads that do not divide in its configuration
(issues 414, 596, 1705, 2652).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from meshwright.planner.export.rules import divisors, nearest, nearest_multiples, server_size
from meshwright.planner.serving.request_lengths import longest_request, max_model_length
from meshwright.simcore.domain.serving import (
    ServingJob,
    ServingPlan,
    ServingPool,
    expert_slots_reason,
    pools_by_cluster,
)

__all__ = [
    "COMMON_POOL_RULES",
    "PlanRule",
    "PoolRule",
    "broken_pool_rules",
    "plan_fits_cluster",
    "pool_name",
    "step_holds_a_prompt",
]

PlanRule = Callable[[ServingJob, ServingPlan], str | None]
PoolRule = Callable[[ServingJob, ServingPlan, ServingPool], str | None]


def pool_name(pool: ServingPool) -> str:
    """Return how messages call a pool."""
    return f"{pool.role} pool"


def broken_pool_rules(
    job: ServingJob, plan: ServingPlan, plan_rules: Iterable[PlanRule], pool_rules: Iterable[PoolRule]
) -> tuple[str, ...]:
    """Return the sentence of every rule that the plan breaks, those of its pools after the pool's name."""
    found = [reason for rule in plan_rules if (reason := rule(job, plan)) is not None]
    # Each rule over all pools in turn, so that one slip in both pools is read together.
    for rule in pool_rules:
        for pool in plan.pools:
            reason = rule(job, plan, pool)
            if reason is not None:
                found.append(f"{pool_name(pool)}: {reason}")
    return tuple(found)


def plan_fits_cluster(job: ServingJob, plan: ServingPlan) -> str | None:
    """The pools together must fit the cluster."""
    for pools, cluster in pools_by_cluster(job, plan):
        needed = sum(pool.num_gpus for pool in pools)
        if needed > cluster.num_gpus:
            what = "pools take" if len(pools) == len(plan.pools) else f"{pool_name(pools[0])} takes"
            return f"the {what} {needed} GPUs but the cluster has {cluster.num_gpus}; lower num_replicas or add nodes."
    return None


def replicas_fill_servers(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """A replica larger than a server fills whole servers."""
    size, gpus = server_size(job.cluster_of(pool.role)), pool.gpus_per_replica
    if gpus <= size or gpus % size == 0:
        return None
    return (
        f"a replica takes {gpus} GPUs (tp {pool.tp} x pp {pool.pp} x attention_dp {pool.attention_dp}), which does "
        f"not fill whole servers of {size}; use {nearest_multiples(gpus, size)}."
    )


def step_holds_a_prompt(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """Without chunks a prompt runs in one step."""
    longest = max_model_length(job)
    if pool.policy == "chunked_prefill" or pool.max_num_batched_tokens >= longest:
        return None
    return (
        f"max_num_batched_tokens {pool.max_num_batched_tokens} is less than the {longest} tokens of the longest "
        f"request, and policy '{pool.policy}' cuts no prompts; raise it or use policy 'chunked_prefill'."
    )


def heads_divide(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """Every tensor parallel rank gets whole attention heads."""
    heads = job.model.num_attention_heads
    if heads % pool.tp == 0:
        return None
    valid = divisors(heads)
    return (
        f"tp {pool.tp} does not divide num_attention_heads {heads}; use tp {nearest(pool.tp, valid)} "
        f"(valid: {', '.join(map(str, valid))}), or pp for the remaining factor."
    )


def key_value_heads_divide(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """Key/value heads are shared out, or copied to equally many ranks each."""
    groups = job.model.num_query_groups
    if job.model.mla is not None or groups % pool.tp == 0 or pool.tp % groups == 0:
        return None
    valid = [tp for tp in divisors(job.model.num_attention_heads) if groups % tp == 0 or tp % groups == 0]
    return (
        f"tp {pool.tp} neither divides the {groups} key/value heads nor is a multiple of them; "
        f"use tp {nearest(pool.tp, valid)}."
    )


def mlp_divides(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """Every rank gets an equal part of each MLP's width."""
    model = job.model
    moe = model.moe
    if moe is None:
        if model.ffn_hidden_size % pool.tp == 0:
            return None
        valid = divisors(model.ffn_hidden_size, model.num_attention_heads)
        return f"tp {pool.tp} does not divide ffn_hidden_size {model.ffn_hidden_size}; use tp {nearest(pool.tp, valid)}."
    if moe.moe_ffn_hidden_size % pool.moe_tp == 0:
        return None
    valid = divisors(moe.moe_ffn_hidden_size)
    return (
        f"moe_tp {pool.moe_tp} does not divide moe_ffn_hidden_size {moe.moe_ffn_hidden_size}; "
        f"use moe_tp {nearest(pool.moe_tp, valid)}."
    )


def expert_axes_fit(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """Expert axes need experts, take all ranks of a stage, and share the experts out evenly."""
    moe, ranks = job.model.moe, pool.tp * pool.attention_dp
    if moe is None:
        if pool.ep * pool.moe_tp > 1:
            return f"ep {pool.ep} and moe_tp {pool.moe_tp} need a mixture-of-experts model; use ep 1 and moe_tp 1."
        if pool.attention_dp > 1:
            return (
                f"attention_dp {pool.attention_dp} of a dense model is nothing but independent replicas; "
                f"use num_replicas {pool.num_replicas * pool.attention_dp} and attention_dp 1."
            )
        return None
    if pool.moe_tp * pool.ep != ranks:
        return (
            f"moe_tp {pool.moe_tp} x ep {pool.ep} must be the {ranks} ranks of tp {pool.tp} x attention_dp "
            f"{pool.attention_dp}; use moe_tp {ranks} and ep 1, or moe_tp 1 and ep {ranks}."
        )
    if pool.redundant_experts:
        reason = expert_slots_reason(moe.num_experts, pool)
        return None if reason is None else f"{reason}."
    if moe.num_experts % pool.ep:
        valid = [size for size in divisors(moe.num_experts) if ranks % size == 0]
        return (
            f"ep {pool.ep} does not divide num_experts {moe.num_experts}; use ep {nearest(pool.ep, valid)}."
        )
    return None


def stages_hold_layers(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """Every stage holds a layer."""
    if pool.pp <= job.model.num_layers:
        return None
    return (
        f"pp {pool.pp} is more than the {job.model.num_layers} layers; use pp {job.model.num_layers} or less."
    )


def requests_fit_model(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """The longest request must fit the model's positions."""
    longest, positions = longest_request(job), job.model.max_position_embeddings
    if longest is None or longest <= positions:
        return None
    return (
        f"the longest request of the workload has {longest} tokens but the model's max_position_embeddings is "
        f"{positions}; shorten input_length, output_length or num_turns."
    )


def cache_holds_a_request(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """The cache holds at least one request."""
    tokens, longest = pool.kv_cache_tokens, longest_request(job)
    if tokens is None or longest is None or tokens >= longest:
        return None
    return f"kv_cache_tokens {tokens} does not hold the longest request of {longest} tokens; raise it."


def step_holds_its_sequences(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """A step decodes one token of each sequence at least."""
    if pool.max_num_batched_tokens >= pool.max_num_sequences:
        return None
    return (
        f"max_num_batched_tokens {pool.max_num_batched_tokens} is less than max_num_sequences "
        f"{pool.max_num_sequences}; raise it to {pool.max_num_sequences} or lower max_num_sequences."
    )


def speculation_has_a_head(job: ServingJob, plan: ServingPlan, pool: ServingPool) -> str | None:
    """Drafts come from the model's own multi-token-prediction layers; a plan names no other draft model."""
    if pool.num_speculative_tokens == 0 or job.model.num_mtp_layers:
        return None
    return (
        f"num_speculative_tokens {pool.num_speculative_tokens} needs layers of multi-token prediction, which the model "
        "lacks, and a plan names no draft model; use 0 and add the engine's speculative options by hand."
    )


COMMON_POOL_RULES: tuple[PoolRule, ...] = (
    replicas_fill_servers,
    heads_divide,
    key_value_heads_divide,
    mlp_divides,
    expert_axes_fit,
    stages_hold_layers,
    requests_fit_model,
    cache_holds_a_request,
    step_holds_its_sequences,
    speculation_has_a_head,
)
