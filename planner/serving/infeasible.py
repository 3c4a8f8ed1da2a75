"""When no plan keeps the limits: the closest configuration, what binds, and which single change would help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from meshwright.errors import InfeasiblePlanError
from meshwright.planner.serving.candidates import ReplicaOption
from meshwright.planner.serving.job_file import ServingRequest
from meshwright.planner.serving.load_profile import LoadProfile
from meshwright.planner.serving.ranking import UnitColumns, rank_units
from meshwright.planner.serving.search import RankedUnit, binding_names, is_closed_loop
from meshwright.planner.serving.sizing import Sizing
from meshwright.planner.serving.space import CandidateSpace, CostSource, candidate_space, scheduler_choices
from meshwright.planner.serving.steady_state import gap_statistics, limited_value, replica_steady_state
from meshwright.planner.serving.target import target_sentence
from meshwright.simcore.domain.serving import Slo
from meshwright.units import format_quantity

__all__ = ["infeasible_serving", "option_text"]

# Clusters up to this many times the asked size are tried.
_MAX_GROWTH = 64


def infeasible_serving(
    request: ServingRequest,
    profile: LoadProfile,
    sizing: Sizing,
    space: CandidateSpace,
    costs: CostSource,
    units: UnitColumns | None = None,
    missed: tuple[RankedUnit, ...] = (),
) -> InfeasiblePlanError:
    """Return the error of a search that found nothing.

    Parameters
    ----------
    request, profile, sizing, space, costs :
        As searched.
    units : UnitColumns | None
        What keeps the limits by its bound; None when nothing fits at all.
    missed : tuple[RankedUnit, ...]
        Configurations that kept the limits by their bound but not in simulation.
    """
    job = request.job
    rejections = dict(space.rejections)
    if space.is_empty:
        advice = _fitting_advice(request, profile, costs)
    elif units is not None and units.refused and not len(units):
        rejections["target"] = sum(units.refused.values())
        advice = (
            f"nearest: without target '{request.limits.target}', which serves others of its engines' plans"
        )
    elif missed:
        advice = _missed_text(missed, request)
    elif units is not None and units.num_beyond_demand:
        rejections["demand"] = units.num_beyond_demand
        advice = _demand_text(request, space, sizing)
    else:
        rejections["slo"] = sizing.total_gpus if units is None else units.num_beyond_limits
        advice = _closest_text(request, profile, space)
    target = request.limits.target
    sentences = {
        **space.sentences,
        **(
            {"target": target_sentence(target, units.refused)}
            if target is not None and units is not None
            else {}
        ),
        "slo": "every limit holds for one request alone",
        "demand": f"the stated load fits {sizing.total_gpus} GPUs",
    }
    counts = "".join(
        f"  {count:>10,} rejected by {name}" + (f" ({sentences[name]})" if name in sentences else "") + "\n"
        for name, count in rejections.items()
        if count
    )
    return InfeasiblePlanError(
        f"no serving plan for {job.model.name} on {job.cluster.id} ({sizing.total_gpus} GPUs)\n{counts}  {advice}",
        rejections,
    )


def option_text(option: ReplicaOption) -> str:
    """Return a shape in a few words."""
    degrees = " x ".join(f"{name} {value}" for name, value in option.degrees.items() if value > 1)
    return f"{option.engine} {degrees or 'one GPU'}, {option.precision}"


def _fitting_advice(request: ServingRequest, profile: LoadProfile, costs: CostSource) -> str:
    """Return the smallest change that lets a shape of each role fit."""
    found = []
    allowed = dict(request.limits.allowed)
    for key in allowed:
        freed = {name: values for name, values in allowed.items() if name != key}
        if _fits(replace(request, limits=replace(request.limits, allowed=freed)), profile, costs):
            found.append(f"without constraint '{key}'")
    if request.limits.max_gpus is not None:
        freed_gpus = replace(request, limits=replace(request.limits, max_gpus=None))
        if _fits(freed_gpus, profile, costs):
            found.append("without constraint 'max_gpus'")
    if not found:
        cluster = request.job.cluster
        growth = 2
        while growth <= _MAX_GROWTH:
            larger = replace(cluster, num_nodes=cluster.num_nodes * growth)
            if _fits(replace(request, job=replace(request.job, cluster=larger)), profile, costs):
                # Prefill pools alone never keep a plan from fitting: without them the other cluster would do.
                of_which = " of cluster" if request.job.prefill_cluster is not None else ""
                found.append(f"{larger.num_nodes} nodes{of_which} instead of {cluster.num_nodes}")
                break
            growth *= 2
    return "nearest: " + (
        "; ".join(found) if found else f"nothing tried helps, nor {_MAX_GROWTH} times the nodes"
    )


def _fits(request: ServingRequest, profile: LoadProfile, costs: CostSource) -> bool:
    max_gpus = request.limits.max_gpus or request.job.cluster.num_gpus
    return not candidate_space(request, profile, costs, max_gpus).is_empty


def _closest_text(request: ServingRequest, profile: LoadProfile, space: CandidateSpace) -> str:
    """Return the shape that comes closest to the limits for a request alone, and by how much it misses which."""
    slo = request.job.slo
    best: tuple[float, ReplicaOption, dict[str, float]] | None = None
    budgets = np.array([max(scheduler_choices(request, profile).budgets)], dtype=np.float64)
    for option in space.options:
        if option.is_prefill_only:
            continue
        state = replica_steady_state(
            option.table,
            profile,
            num_decodes=np.ones(1),
            budgets=budgets,
            policy=option.policy,
            gap_statistics=gap_statistics(slo),
        )
        # What is said to miss a limit is what the search held against it.
        values = {limit.name: float(limited_value(state, limit, profile)[0, 0]) for limit in slo.limits}
        excess = max(values[limit.name] / limit.seconds for limit in slo.limits)
        if best is None or excess < best[0]:
            best = (excess, option, values)
    assert best is not None
    worst = max(slo.limits, key=lambda limit: best[2][limit.name] / limit.seconds)
    reached = _limits_text(slo, best[2])
    return (
        f"closest: {option_text(best[1])} reaches {reached} with one request alone; {worst.name} binds: ask for at least "
        f"{_time(best[2][worst.name])}"
    )


def _demand_text(request: ServingRequest, space: CandidateSpace, sizing: Sizing) -> str:
    """Return what the cluster can carry, and the GPUs the demand needs."""
    free = replace(sizing, objective="throughput", max_gpus=sizing.max_gpus)
    units = rank_units(space, free, is_closed_loop(request))
    if not len(units):
        return "nothing of the space fits the cluster"
    carried = float((units.load * sizing.room(units.num_gpus, units.prefill_gpus)).max())
    needed = int((sizing.units_needed(units.load) * units.num_gpus).min())
    what = "clients" if is_closed_loop(request) else "requests/s"
    return (
        f"closest: {carried:.4g} of {sizing.demand:.4g} {what} fit within the limits by the bound; the load needs about "
        f"{needed} GPUs"
    )


def _missed_text(missed: tuple[RankedUnit, ...], request: ServingRequest) -> str:
    slo = request.job.slo
    failing = [ranked for ranked in missed if ranked.bracket.failing is not None]
    if not failing:
        return "closest: the load does not fit the cluster in simulation"

    def excess(ranked: RankedUnit) -> float:
        point = ranked.bracket.failing
        assert point is not None
        return max((point.metrics[limit.name] / limit.seconds for limit in slo.limits), default=1.0)

    best = min(failing, key=excess)
    point = best.bracket.failing
    assert point is not None
    plan = best.unit.plan
    shape = " + ".join(
        f"{pool.num_replicas} x {pool.role} tp {pool.tp} pp {pool.pp} attention_dp {pool.attention_dp} ep {pool.ep}"
        for pool in plan.pools
    )
    what = "clients" if is_closed_loop(request) else "requests/s"
    return (
        f"closest: {plan.engine} {shape} reaches {_limits_text(slo, point.metrics)} at {point.load:.3g} {what}; "
        f"{', '.join(binding_names(best, request))} binds"
    )


def _limits_text(slo: Slo, values: Mapping[str, float]) -> str:
    return " and ".join(
        f"{limit.name} {_time(values[limit.name])} (limit {_time(limit.seconds)})" for limit in slo.limits
    )


def _time(seconds: float) -> str:
    return format_quantity(seconds, "seconds", 3)
