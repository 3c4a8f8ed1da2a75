"""One given serving plan at the highest load that keeps the limits, measured as the search measures its candidates."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from meshwright.planner.serving.answer import PricedRequest
from meshwright.planner.serving.candidates import (
    ReplicaOption,
    SchedulerChoices,
    prefill_columns,
    replica_columns,
)
from meshwright.planner.serving.costs import check_stated_cache
from meshwright.planner.serving.load_search import highest_load
from meshwright.planner.serving.ranking import Unit, cause_name
from meshwright.planner.serving.search import (
    RankedUnit,
    is_closed_loop,
    load_runner,
    most_load,
    unit_value,
)
from meshwright.simcore.domain.serving import ServingPlan, ServingPool

__all__ = ["measured_plan"]

_DEGREES = ("tp", "pp", "attention_dp", "moe_tp", "ep", "redundant_experts")
# Share of the highest load that stays unknown: less than the changes that are asked about.
_TOLERANCE = 0.005


def measured_plan(priced: PricedRequest, plan: ServingPlan) -> RankedUnit:
    """Return a plan at the highest load that keeps the limits; its ``bracket.best`` is None where none does.

    Parameters
    ----------
    priced : PricedRequest
        The load, the limits and the cost models.
    plan : ServingPlan
        The plan; its smallest repeated part is simulated.

    Raises
    ------
    InfeasiblePlanError
        If a pool's weights leave no room for its cache.
    """
    check_stated_cache(priced.costs, plan)
    request = priced.request
    unit = _unit(priced, plan)
    run = load_runner(request, priced.sizing, priced.simulator, unit, is_thorough=True)
    # Where the bound says that one request alone is late, the simulation of one says by how much.
    upper = most_load(request, unit) if unit.load > 0.0 else 1.0 / max(unit.ttft + unit.tpot, 1e-3)
    bracket = highest_load(
        run, request.job.slo, upper=upper, tolerance=_TOLERANCE, is_whole=is_closed_loop(request)
    )
    return RankedUnit(
        unit=unit, bracket=bracket, value=unit_value(priced.sizing, bracket.best, unit.plan), plan=plan
    )


def _unit(priced: PricedRequest, plan: ServingPlan) -> Unit:
    """Return the smallest part of a plan that it repeats, with its bound."""
    repeats = math.gcd(*(pool.num_replicas for pool in plan.pools))
    pools = tuple(replace(pool, num_replicas=pool.num_replicas // repeats) for pool in plan.pools)
    slo, profile = priced.request.job.slo, priced.profile
    decode = pools[-1]
    columns = replica_columns(0, _option(priced, plan, decode), profile, slo, _choices(decode), decode.role)
    rate = float(columns.rate[0]) * decode.num_replicas
    ttft, tpot = float(columns.ttft[0]), float(columns.tpot[0])
    if plan.is_disaggregated:
        first = pools[0]
        prompts = prefill_columns(0, _option(priced, plan, first), profile, slo, _choices(first))
        rate, ttft = min(rate, float(prompts.rate[0]) * first.num_replicas), float(prompts.ttft[0])
    seconds = ttft + (profile.mean_output - 1.0) * tpot
    return Unit(
        plan=replace(plan, pools=pools),
        shape=0,
        rate=rate,
        load=rate * seconds if is_closed_loop(priced.request) else rate,
        value=float(np.inf),
        tpot=tpot,
        ttft=ttft,
        cause=cause_name(int(columns.cause[0]), slo),
    )


def _option(priced: PricedRequest, plan: ServingPlan, pool: ServingPool) -> ReplicaOption:
    held = priced.costs.memory(plan, pool).kv_cache_tokens
    return ReplicaOption(
        engine=plan.engine,
        policy=pool.policy,
        precision=plan.precision,
        kv_precision=plan.kv_precision,
        degrees={name: getattr(pool, name) for name in _DEGREES},
        kv_cache_tokens=held if pool.kv_cache_tokens is None else pool.kv_cache_tokens,
        table=priced.costs.step_table(plan, pool),
        expert_imbalance=pool.expert_imbalance,
    )


def _choices(pool: ServingPool) -> SchedulerChoices:
    return SchedulerChoices(
        budgets=(pool.max_num_batched_tokens,),
        max_num_sequences=(pool.max_num_sequences,),
        num_speculative_tokens=(pool.num_speculative_tokens,),
        has_prefix_cache=(pool.has_prefix_cache,),
        acceptance=pool.acceptance,
    )
