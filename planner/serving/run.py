"""One serving plan on its requests: what they go through, and what the deployment costs to run."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.errors import InfeasiblePlanError
from meshwright.planner.serving.costs import JobCosts
from meshwright.planner.serving.plan_file import ServingPlanDocument
from meshwright.planner.serving.running_costs import (
    dollars_per_million_tokens,
    joules_per_token,
    watts_per_gpu,
)
from meshwright.planner.serving.unit_simulation import JobSimulator, phase_shares
from meshwright.simcore.domain.serving import SloLimit
from meshwright.simcore.serving.metrics import ServingMetrics, slo_violations, summarize
from meshwright.simcore.serving.simulate import ServingResult
from meshwright.simcore.serving.traces import load_requests

__all__ = ["ServingRun", "serve_plan"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingRun:
    """A simulated serving plan.

    Parameters
    ----------
    document : ServingPlanDocument
        Job and plan.
    costs : JobCosts
        The cost models it was simulated with.
    result : ServingResult
        What every request went through.
    metrics : ServingMetrics
        Over all requests, those that met an empty system included.
    violations : tuple[tuple[SloLimit, float], ...]
        Limits that do not hold, each with how many times over it is, worst first.
    prompt_share, decode_share : float
        Shares of the GPUs' time in steps with prompt tokens, and in steps of decoding alone.
    watts_per_gpu : float
        Mean power, the GPU's share of the node included [W].
    """

    document: ServingPlanDocument
    costs: JobCosts
    result: ServingResult
    metrics: ServingMetrics
    violations: tuple[tuple[SloLimit, float], ...]
    prompt_share: float
    decode_share: float
    watts_per_gpu: float

    @property
    def joules_per_output_token(self) -> float | None:
        """Energy per output token [J]."""
        plan = self.document.plan
        return joules_per_token(self.watts_per_gpu, plan.num_gpus, self.metrics.output_tokens_per_second)

    @property
    def dollars_per_million_output_tokens(self) -> float | None:
        """Rent per million output tokens [$]; None without a price."""
        plan, cluster = self.document.plan, self.document.job.cluster
        return dollars_per_million_tokens(cluster, plan.num_gpus, self.metrics.output_tokens_per_second)


def serve_plan(
    document: ServingPlanDocument, costs: JobCosts, *, seed: int = 0, is_recording: bool = False
) -> ServingRun:
    """Return the simulation of a plan on the requests of its job.

    Parameters
    ----------
    document : ServingPlanDocument
        Job and plan.
    costs : JobCosts
        Cost models of the job.
    seed : int
        Of whatever is drawn.
    is_recording : bool
        Keep every engine step.

    Raises
    ------
    SpecError
        If the request file is unusable, or a request does not fit the KV cache.
    InfeasiblePlanError
        If a pool's weights leave no room for a cache.
    """
    job, plan = document.job, document.plan
    for pool in plan.pools:
        stated, held = pool.kv_cache_tokens, costs.memory(plan, pool).kv_cache_tokens
        if stated is not None and stated > held:
            raise InfeasiblePlanError(
                f"{pool.role} pool: kv_cache_tokens {stated:,} do not fit; beside the weights a rank holds {held:,}; lower it "
                "or leave it out",
                {"memory": 1},
            )
    requests = load_requests(job.workload, seed=seed)
    limits_gaps = any(limit.metric == "itl" for limit in job.slo.limits)
    simulator = JobSimulator(job, costs, trace=requests, seed=seed)
    result = simulator.simulate(plan, requests, is_recording=is_recording or limits_gaps)
    metrics = summarize(result, num_gpus=plan.num_gpus, slo=job.slo)
    prompt_share, decode_share = phase_shares(result, plan)
    return ServingRun(
        document=document,
        costs=costs,
        result=result,
        metrics=metrics,
        violations=slo_violations(metrics, job.slo),
        prompt_share=prompt_share,
        decode_share=decode_share,
        watts_per_gpu=watts_per_gpu(job.cluster, prompt_share, decode_share),
    )
