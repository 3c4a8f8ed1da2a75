"""One serving plan on its requests: what they go through, and what the deployment costs to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.planner.serving.costs import JobCosts, check_stated_cache
from meshwright.planner.serving.plan_file import ServingPlanDocument
from meshwright.planner.serving.running_costs import (
    joules_per_token,
    plan_dollars_per_million_tokens,
    plan_phase_watts,
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
    phase_shares : tuple[tuple[float, float], ...]
        By pool, the shares of its GPUs' time in steps with prompt tokens, and in steps of decoding alone.
    phase_watts : Mapping[str, float]
        Mean power of a GPU by phase, its share of the node included; they sum to its power [W].
    num_failed : int
        Recorded requests that failed and were left out.
    """

    document: ServingPlanDocument
    costs: JobCosts
    result: ServingResult
    metrics: ServingMetrics
    violations: tuple[tuple[SloLimit, float], ...]
    phase_shares: tuple[tuple[float, float], ...]
    phase_watts: Mapping[str, float]
    num_failed: int = 0

    @property
    def watts_per_gpu(self) -> float:
        """Mean power of a GPU [W]."""
        return sum(self.phase_watts.values())

    @property
    def prompt_share(self) -> float:
        """Share of all GPUs' time in steps with prompt tokens."""
        return self._mean_share(0)

    @property
    def decode_share(self) -> float:
        """Share of all GPUs' time in steps of decoding alone."""
        return self._mean_share(1)

    def _mean_share(self, index: int) -> float:
        plan = self.document.plan
        parts = zip(plan.pools, self.phase_shares, strict=True)
        return sum(pool.num_gpus * shares[index] for pool, shares in parts) / plan.num_gpus

    def phase_joules_per_output_token(self, phase: str) -> float | None:
        """Return the part of the energy per output token that a phase takes [J]."""
        rate = self.metrics.output_tokens_per_second
        return joules_per_token(self.phase_watts[phase], self.document.plan.num_gpus, rate)

    @property
    def joules_per_output_token(self) -> float | None:
        """Energy per output token [J]."""
        plan = self.document.plan
        return joules_per_token(self.watts_per_gpu, plan.num_gpus, self.metrics.output_tokens_per_second)

    @property
    def dollars_per_million_output_tokens(self) -> float | None:
        """Rent per million output tokens [$]; None without a price."""
        job, plan = self.document.job, self.document.plan
        return plan_dollars_per_million_tokens(job, plan, self.metrics.output_tokens_per_second)


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
        If the request file is unusable.
    InfeasiblePlanError
        If a pool's weights leave no room for a cache, or for a request.
    """
    job, plan = document.job, document.plan
    check_stated_cache(costs, plan)
    requests = load_requests(job.workload, seed=seed)
    limits_gaps = any(limit.metric == "itl" for limit in job.slo.limits)
    simulator = JobSimulator(job, costs, trace=requests, seed=seed)
    result = simulator.simulate(plan, requests, is_recording=is_recording or limits_gaps)
    metrics = summarize(result, num_gpus=plan.num_gpus, slo=job.slo)
    shares = phase_shares(result, plan)
    return ServingRun(
        document=document,
        costs=costs,
        result=result,
        metrics=metrics,
        violations=slo_violations(metrics, job.slo),
        phase_shares=shares,
        phase_watts=plan_phase_watts(job, plan, shares),
        num_failed=requests.num_failed,
    )
