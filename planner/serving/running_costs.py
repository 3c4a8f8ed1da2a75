"""What a deployment costs to run: dollars and joules per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.simcore.domain.serving import ServingJob, ServingPlan

__all__ = [
    "PHASES",
    "dollars_per_gpu_hour",
    "dollars_per_million_tokens",
    "joules_per_token",
    "plan_dollars_per_million_tokens",
    "plan_phase_watts",
    "watts_per_gpu",
]

PHASES: tuple[str, ...] = ("prompts", "decoding", "idle")
"""What the time of a GPU goes to: steps that hold prompt tokens, steps of decoding alone, the rest."""

# Shares of a GPU's power limit by phase. Prompts: measured peaks of 1.00 to 1.09 of Llama 2 70B on A100; decoding: 0.70
# to 0.74, what remains of the measured means once the prompt's share of the time is taken out (Splitwise, Patel et al.
# 2024, https://github.com/Mutinifni/splitwise-sim, data/perf_model.csv). Idle: an A100 SXM draws near 60 of 400 W.
_PROMPT_POWER = 1.0
_DECODE_POWER = 0.72
_IDLE_POWER = 0.15
_MILLION = 1e6


def dollars_per_gpu_hour(cluster: ClusterSpec) -> float | None:
    """Return the rent of a GPU with its share of the node [$/h]; None where nobody states a price."""
    node = cluster.node
    if node.price_dollars_per_hour is not None:
        return node.price_dollars_per_hour / node.num_gpus
    return cluster.gpu.price_dollars_per_hour


def dollars_per_million_tokens(cluster: ClusterSpec, num_gpus: int, tokens_per_second: float) -> float | None:
    """Return the rent per million tokens [$]; None without a price or without tokens.

    Parameters
    ----------
    cluster : ClusterSpec
        Where prices stand.
    num_gpus : int
        GPUs in use.
    tokens_per_second : float
        Output tokens of all of them [1/s].
    """
    price = dollars_per_gpu_hour(cluster)
    if price is None or tokens_per_second <= 0.0:
        return None
    return price / 3600.0 * num_gpus / tokens_per_second * _MILLION


def plan_dollars_per_million_tokens(
    job: ServingJob, plan: ServingPlan, tokens_per_second: float
) -> float | None:
    """Return the rent of all pools per million tokens [$]; None without tokens, or without a price for a pool."""
    parts = [
        dollars_per_million_tokens(job.cluster_of(pool.role), pool.num_gpus, tokens_per_second)
        for pool in plan.pools
    ]
    return None if None in parts else sum(part for part in parts if part is not None)


def watts_per_gpu(cluster: ClusterSpec, prompt_share: float, decode_share: float) -> float:
    """Return the mean power of a GPU with its share of the node [W].

    Parameters
    ----------
    cluster : ClusterSpec
        Power limit of the GPU and of the whole node; what a node draws beside its GPUs is drawn all the time.
    prompt_share, decode_share : float
        Shares of the time in steps with and without prompt tokens; the rest idles.
    """
    return sum(_phase_watts(cluster, prompt_share, decode_share))


def plan_phase_watts(
    job: ServingJob, plan: ServingPlan, shares: Sequence[tuple[float, float]]
) -> Mapping[str, float]:
    """Return the mean power of a plan's GPUs by phase, which sums to their power [W].

    Parameters
    ----------
    job, plan : ServingJob, ServingPlan
        Where each pool runs.
    shares : Sequence[tuple[float, float]]
        Of each pool's time, in steps with and without prompt tokens.
    """
    totals = [0.0] * len(PHASES)
    for pool, (prompt_share, decode_share) in zip(plan.pools, shares, strict=True):
        parts = _phase_watts(job.cluster_of(pool.role), prompt_share, decode_share)
        totals = [total + part * pool.num_gpus for total, part in zip(totals, parts, strict=True)]
    return {phase: total / plan.num_gpus for phase, total in zip(PHASES, totals, strict=True)}


def _phase_watts(cluster: ClusterSpec, prompt_share: float, decode_share: float) -> tuple[float, ...]:
    node, gpu = cluster.node, cluster.gpu
    idle_share = max(0.0, 1.0 - prompt_share - decode_share)
    beside = max(0.0, node.power_watts / node.num_gpus - gpu.power_watts)
    return tuple(
        share * (gpu.power_watts * power + beside)
        for share, power in (
            (prompt_share, _PROMPT_POWER),
            (decode_share, _DECODE_POWER),
            (idle_share, _IDLE_POWER),
        )
    )


def joules_per_token(watts: float, num_gpus: int, tokens_per_second: float) -> float | None:
    """Return the energy per output token [J]; None without tokens."""
    return watts * num_gpus / tokens_per_second if tokens_per_second > 0.0 else None
