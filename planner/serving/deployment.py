"""A serving plan as the simulator takes it: step tables, schedulers, front ends and the link between pools."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from meshwright.costmodels.serving.memory import kv_bytes_per_token
from meshwright.costmodels.serving.replica import engine_behaviour
from meshwright.errors import InfeasiblePlanError, SpecError, UnsupportedByTargetError, did_you_mean
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.planner.serving.costs import JobCosts
from meshwright.planner.serving.replica_shapes import has_units, rule_numbers, vendor_reason
from meshwright.simcore.domain.serving import (
    POLICIES,
    EngineName,
    PolicyName,
    ServingJob,
    ServingPlan,
    ServingPool,
)
from meshwright.simcore.serving.behaviour import TransferLink
from meshwright.simcore.serving.pool import ReplicaPool

__all__ = [
    "ENGINE_POLICIES",
    "check_engine_runs",
    "policy_note",
    "replica_pools",
    "transfer_link",
    "with_policy",
]

ENGINE_POLICIES: dict[EngineName, tuple[PolicyName, ...]] = {
    # --enable-chunked-prefill is vLLM v1's only scheduler.
    "vllm": ("chunked_prefill",),
    # --enable-mixed-chunk lets prompts share steps with decoding.
    "sglang": ("prefill_first", "chunked_prefill"),
    # --batching_type static; chunked context (enable_chunked_prefill).
    "trtllm": ("inflight", "chunked_prefill", "static"),
}
_DEGREES = ("tp", "pp", "attention_dp", "moe_tp", "ep", "redundant_experts")
# Message set-up of a KV transfer: a handful of RDMA requests (NIXL and UCX handshake once per connection).
_TRANSFER_LATENCY = 1e-3


def check_engine_runs(job: ServingJob, plan: ServingPlan) -> None:
    """Raise when the plan's engine cannot launch it.

    Raises
    ------
    UnsupportedByTargetError
        One line with every reason.
    """
    reasons = []
    for pool in plan.pools:
        known = ENGINE_POLICIES[plan.engine]
        if pool.policy not in known:
            reasons.append(
                f"{pool.role} pool: policy {pool.policy} (it has {', '.join(known)}; what another would do, "
                f"'meshwright simulate --policy {pool.policy}' tells)"
            )
        gpu = job.cluster_of(pool.role).gpu
        vendor = vendor_reason(plan.engine, gpu)
        if vendor is not None:
            reasons.append(f"{pool.role} pool: {vendor}")
        elif not has_units(job.model, gpu, plan.precision):
            offered = ", ".join(gpu.peak_flops_per_second)
            reasons.append(
                f"{pool.role} pool: {gpu.id} has no units for {plan.precision}; it offers {offered}"
            )
        degrees = {name: getattr(pool, name) for name in _DEGREES}
        if job.model.moe is not None and pool.moe_tp * pool.ep == 1:
            degrees["moe_tp"] = pool.tp * pool.attention_dp
        reasons += [
            f"{pool.role} pool: {text}"
            for text in rule_numbers(
                job.model, job.cluster_of(pool.role), plan.engine, plan.precision, degrees
            )
        ]
    if reasons:
        raise UnsupportedByTargetError(f"{plan.engine} cannot express this plan: {'; '.join(reasons)}")


def with_policy(plan: ServingPlan, word: str) -> ServingPlan:
    """Return a plan whose every pool forms its steps by another policy, one its engine need not have.

    Raises
    ------
    SpecError
        If there is no such policy, or it cannot hand requests from pool to pool.
    """
    if word not in POLICIES:
        raise SpecError(
            f"unknown policy '{word}'{did_you_mean(word, POLICIES) or ';'} known: {', '.join(POLICIES)}"
        )
    if word == "static" and plan.is_disaggregated:
        raise SpecError(
            "static batching ends a batch as a whole and cannot hand requests from a prefill to a decode pool; "
            "simulate an aggregated plan"
        )
    policy = cast("PolicyName", word)
    return replace(plan, pools=tuple(replace(pool, policy=policy) for pool in plan.pools))


def policy_note(plan: ServingPlan) -> str | None:
    """Return what to say of a plan whose policy is not one of its engine's; None where it is."""
    words = {pool.policy for pool in plan.pools} - set(ENGINE_POLICIES[plan.engine])
    if not words:
        return None
    return (
        f"policy {', '.join(sorted(words))} is not what {plan.engine} does; kernels, host time, front end and memory "
        f"stay those of {plan.engine}"
    )


def replica_pools(plan: ServingPlan, costs: JobCosts, prompt_length: float = 0.0) -> tuple[ReplicaPool, ...]:
    """Return the pools of a plan with their step tables and schedulers.

    Parameters
    ----------
    plan, costs : ServingPlan, JobCosts
        The plan and the job's cost models.
    prompt_length : float
        Typical prompt of the load, which bounds the tokens of a step where an engine's front end does [tokens].

    Raises
    ------
    InfeasiblePlanError
        If a pool's weights leave no room for a cache.
    """
    return tuple(_replica_pool(plan, pool, costs, prompt_length) for pool in plan.pools)


def transfer_link(job: ServingJob, plan: ServingPlan, costs: JobCosts) -> TransferLink | None:
    """Return the way of a KV cache from the prefill to the decode pool; None for aggregated plans.

    One copy of the cache leaves over the NICs of the prefill replica's GPUs and enters over those of the decode replica's,
    or goes over the scale-up links where the whole cluster is one node.
    """
    if not plan.is_disaggregated:
        return None
    pool = plan.pools[0]
    is_one_node = job.prefill_cluster is None and job.cluster.num_nodes == 1
    served = costs.served(plan, pool)
    whole = ServingPool()
    return TransferLink(
        bytes_per_token=kv_bytes_per_token(served.model, served.formats, whole),
        bandwidth=min(
            _bandwidth_per_gpu(job.cluster_of(each.role), is_one_node=is_one_node) * each.tp * each.pp
            for each in plan.pools
        ),
        latency=_TRANSFER_LATENCY,
    )


def _bandwidth_per_gpu(cluster: ClusterSpec, *, is_one_node: bool) -> float:
    node = cluster.node
    if is_one_node:
        return node.intra_link.bandwidth_bytes_per_second
    return node.nic_bandwidth_per_gpu / cluster.fabric.oversubscription


def _replica_pool(plan: ServingPlan, pool: ServingPool, costs: JobCosts, prompt_length: float) -> ReplicaPool:
    constants = costs.served(plan, pool).constants
    tokens = costs.memory(plan, pool).kv_cache_tokens
    if pool.kv_cache_tokens is not None:
        tokens = min(tokens, pool.kv_cache_tokens)
    if tokens // pool.block_size // pool.pp < 1:
        raise InfeasiblePlanError(
            f"{pool.role} pool: {tokens} tokens of KV cache are no block of {pool.block_size} for each of {pool.pp} stages",
            {"memory": 1},
        )
    behaviour = engine_behaviour(
        constants, replace(pool, kv_cache_tokens=None), tokens, prompt_length=prompt_length
    )
    # The micro-batches of a pipeline share the slots of their rank.
    behaviour = replace(behaviour, max_num_sequences=max(1, pool.max_num_sequences // pool.pp))
    if pool.role == "decode":
        # Requests passed the front end on their way into the prefill pool.
        behaviour = replace(behaviour, serial_time_per_request=0.0, fixed_time_per_request=0.0)
    return ReplicaPool(
        table=costs.step_table(plan, pool),
        behaviour=behaviour,
        num_replicas=pool.num_replicas,
        role=pool.role,
        router=plan.router,
    )
