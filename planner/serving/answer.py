"""Everything ``plan`` says of a serving job: the search, the figures of each plan, and where its constants come from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np

from meshwright.errors import SpecError
from meshwright.planner.serving.costs import JobCosts
from meshwright.planner.serving.infeasible import infeasible_serving
from meshwright.planner.serving.job_file import ServingRequest
from meshwright.planner.serving.load_profile import LoadProfile
from meshwright.planner.serving.pareto import FrontPoint, interactivity_front
from meshwright.planner.serving.running_costs import (
    joules_per_token,
    plan_dollars_per_million_tokens,
    plan_phase_watts,
)
from meshwright.planner.serving.search import (
    RankedUnit,
    SearchOutcome,
    binding_names,
    is_closed_loop,
    search_units,
)
from meshwright.planner.serving.sizing import Sizing
from meshwright.planner.serving.space import candidate_space, scheduler_choices
from meshwright.planner.serving.unit_simulation import JobSimulator
from meshwright.simcore.serving.traces import load_requests

__all__ = ["PricedRequest", "ServingAnswer", "answer_request", "plan_figures", "priced_request"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PricedRequest:
    """A serving request with its load and its cost models.

    Parameters
    ----------
    request, profile, sizing :
        What was asked, its load, its objective.
    costs : JobCosts
        The cost models, for the certainty of each plan.
    simulator : JobSimulator
        Serves the load at any rate.
    num_failed : int
        Recorded requests that failed and were left out.
    """

    request: ServingRequest
    profile: LoadProfile
    sizing: Sizing
    costs: JobCosts
    simulator: JobSimulator
    num_failed: int = 0

    @property
    def load_unit(self) -> str:
        """What a load counts."""
        return "clients" if is_closed_loop(self.request) else "requests/s"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingAnswer(PricedRequest):
    """The answer to a serving request.

    Parameters
    ----------
    outcome : SearchOutcome
        What the search found.
    front : tuple[FrontPoint, ...]
        Interactivity against throughput per GPU, by steady state.
    bounds_seconds, seconds : float
        Wall time of the bounds, and of everything [s].
    """

    outcome: SearchOutcome
    front: tuple[FrontPoint, ...]
    bounds_seconds: float
    seconds: float


def priced_request(request: ServingRequest, costs: JobCosts | None = None, seed: int = 0) -> PricedRequest:
    """Return a request with its load and cost models; built-in calibrations without ``costs``.

    Raises
    ------
    SpecError
        If the trace is unusable, or no request decodes.
    """
    job = request.job
    trace = load_requests(job.workload, seed=seed) if job.workload.requests_file is not None else None
    costs = JobCosts(job) if costs is None else costs
    simulator = JobSimulator(job, costs, trace=trace, seed=seed)
    profile = simulator.profile()
    if profile.mean_output <= 1.0:
        raise SpecError(
            "requests: every answer is one token; there is nothing to decode and no plan to compare"
        )
    apart = job.prefill_cluster
    return PricedRequest(
        request=request,
        profile=profile,
        sizing=Sizing(
            objective=request.objective,
            max_gpus=min(job.cluster.num_gpus, request.limits.max_gpus or job.cluster.num_gpus),
            demand=simulator.demand(),
            mean_output=profile.mean_output,
            max_prefill_gpus=None if apart is None else apart.num_gpus,
        ),
        costs=costs,
        simulator=simulator,
        num_failed=0 if trace is None else trace.num_failed,
    )


def answer_request(
    request: ServingRequest,
    *,
    costs: JobCosts | None = None,
    seed: int = 0,
    num_shapes: int = 5,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> ServingAnswer:
    """Return the best plans of a request.

    Parameters
    ----------
    request : ServingRequest
        What to plan.
    costs : JobCosts | None
        Cost models of its job; those of the built-in calibrations without.
    seed : int
        Of the requests that are drawn.
    num_shapes : int
        Shapes to simulate at least; 0 ranks by the bounds alone.
    progress : Callable
        Told ``(phase, done, total)``.

    Raises
    ------
    InfeasiblePlanError
        If nothing fits or keeps the limits; says what comes closest and what binds.
    SpecError
        If the trace is unusable or nothing limits the load.
    """
    started = time.perf_counter()
    priced = priced_request(request, costs, seed)
    profile, sizing = priced.profile, priced.sizing
    progress("bounds", 0, 0)
    space = candidate_space(request, profile, priced.costs, sizing.max_gpus)
    if space.is_empty:
        raise infeasible_serving(request, profile, sizing, space, priced.costs)
    bounds_seconds = time.perf_counter() - started
    outcome = search_units(request, sizing, space, priced.simulator, progress, num_shapes=num_shapes)
    if not outcome.ranked:
        raise infeasible_serving(request, profile, sizing, space, priced.costs, outcome.units, outcome.missed)
    return ServingAnswer(
        **{each.name: getattr(priced, each.name) for each in fields(priced)},
        outcome=outcome,
        front=interactivity_front(space, profile, scheduler_choices(request, profile)),
        bounds_seconds=bounds_seconds,
        seconds=time.perf_counter() - started,
    )


def plan_figures(answer: PricedRequest, ranked: RankedUnit) -> Mapping[str, object]:
    """Return the figures of one plan at the highest load that keeps the limits, units in the key names."""
    point, plan, job = ranked.point, ranked.plan, answer.request.job
    units = ranked.num_units
    tokens = point.rate * answer.sizing.mean_output * units
    tpot = point.metrics["tpot_mean"]
    phases = plan_phase_watts(job, plan, _phase_shares(ranked))
    watts = sum(phases.values())
    closed = is_closed_loop(answer.request)
    figures: dict[str, object] = {
        "basis": "simulation" if ranked.bracket.num_runs else "steady-state bound",
        "load_kind": "clients" if closed else "requests_per_second",
        "load": point.load * units,
        "load_bound": ranked.unit.load * units,
        "requests_per_second": point.rate * units,
        "output_tokens_per_second": tokens,
        "output_tokens_per_second_per_gpu": tokens / plan.num_gpus,
        "tokens_per_second_per_user": 1.0 / tpot if tpot > 0.0 else 0.0,
        "num_gpus": plan.num_gpus,
        "num_gpus_for_stated_load": int(
            answer.sizing.units_needed(np.array([point.load]))[0] * ranked.unit.plan.num_gpus
        ),
        **{f"{name}_seconds": value for name, value in point.metrics.items()},
        "kv_cache_tokens_per_rank": [answer.costs.kv_cache_tokens(plan, pool) for pool in plan.pools],
        "requests_under_way": point.figures.get("requests_under_way", 0.0) * units,
        "preemptions_per_request": point.figures.get("preemptions_per_request", 0.0),
        "binding": list(binding_names(ranked, answer.request)),
        "watts_per_gpu": watts,
        "joules_per_output_token": joules_per_token(watts, plan.num_gpus, tokens),
        **{
            f"joules_per_output_token_{phase}": joules_per_token(part, plan.num_gpus, tokens)
            for phase, part in phases.items()
        },
        "dollars_per_million_output_tokens": plan_dollars_per_million_tokens(job, plan, tokens),
    }
    return {key: value for key, value in figures.items() if value is not None}


def _phase_shares(ranked: RankedUnit) -> tuple[tuple[float, float], ...]:
    """Return, by pool, the shares of its time in steps with prompt tokens, and in steps without."""
    figures, pools = ranked.point.figures, ranked.unit.plan.pools
    if f"prompt_step_share_{pools[0].role}" in figures:
        return tuple(
            (figures[f"prompt_step_share_{pool.role}"], figures[f"decode_step_share_{pool.role}"])
            for pool in pools
        )
    # By the bound replicas that decode never idle: what prompts leave of the time decodes.
    first = pools[0]
    prompts = min(1.0, ranked.point.rate * ranked.unit.ttft / (first.num_replicas * first.attention_dp))
    return ((prompts, 0.0), (0.0, 1.0)) if len(pools) > 1 else ((prompts, 1.0 - prompts),)
