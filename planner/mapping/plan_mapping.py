"""Place the ranks of plans on hosts with unequal links, and rank the plans by what that makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.prediction import predict
from meshwright.costmodels.topology import flat_bandwidth
from meshwright.planner.mapping.problem import MappingProblem
from meshwright.planner.mapping.search import MappingResult, search_order
from meshwright.planner.search.base import RankedPlan, SearchRequest, SearchResult
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["MappedPlan", "map_plan", "with_mapped_plans"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MappedPlan:
    """A plan on the best hosts found for it.

    Parameters
    ----------
    plan : ParallelPlan
        With its device mapping; as given where no other order is faster or none was searched.
    search : MappingResult | None
        What was searched; None where the plan does not fill whole hosts stage by stage, or its hosts are all alike.
    """

    plan: ParallelPlan
    search: MappingResult | None


def map_plan(context: CostContext, plan: ParallelPlan, *, seed: int = 0, effort: float = 1.0) -> MappedPlan:
    """Return a plan with the host order under which its sends and gradient reductions take least.

    The traffic is what the cost models say of it over the flat fabric: sends that the schedule waits for, once forward
    and once back for every group of as many micro-batches as stages, and the part of gradient reduction and weight
    gather that nothing hides.

    Parameters
    ----------
    context : CostContext
        Job; its cluster has a topology, or nothing is to be chosen.
    plan : ParallelPlan
        Any plan.
    seed, effort : int, float
        As in :func:`meshwright.planner.mapping.search.search_order`.
    """
    cluster = context.cluster
    grid = _host_grid(plan, cluster.node.num_gpus)
    if cluster.topology is None or grid is None or cluster.num_nodes < 2:
        return MappedPlan(plan=plan, search=None)
    links = cluster.pair_links
    off_diagonal = ~np.eye(cluster.num_nodes, dtype=bool)
    if np.ptp(links.bandwidth[off_diagonal]) == 0.0:
        return MappedPlan(plan=plan, search=None)
    flat = replace(context, cluster=replace(cluster, topology=None))
    costs = iteration_costs(flat, plan)
    bandwidth = flat_bandwidth(context)
    num_waits = 2.0 * max(1, costs.num_micro_batches // costs.num_stages)
    exposed = (1.0 - costs.gradient_reduce_overlap) * costs.gradient_reduce_time.max(initial=0.0) + (
        1.0 - costs.parameter_gather_overlap
    ) * costs.parameter_gather_time.max(initial=0.0)
    problem = MappingProblem(
        # A plan is never faster than over the flat fabric, so faster links are worth nothing.
        bandwidth=np.minimum(np.where(off_diagonal, links.bandwidth, bandwidth), bandwidth),
        num_stages=grid[0],
        hosts_per_stage=grid[1],
        pipeline_bytes=num_waits * float(costs.send_time.max(initial=0.0)) * bandwidth,
        ring_bytes=float(exposed) * bandwidth,
    )
    found = search_order(problem, seed=seed, effort=effort)
    if found.cost >= found.identity_cost:
        return MappedPlan(plan=plan, search=found)
    num_nodes = grid[0] * grid[1]
    order = tuple(int(host) for host in found.order[:num_nodes])
    return MappedPlan(plan=replace(plan, device_mapping=DeviceMapping(host_order=order)), search=found)


def with_mapped_plans(
    request: SearchRequest, result: SearchResult, *, seed: int = 0, effort: float = 1.0
) -> SearchResult:
    """Return what a search found, its best plans mapped onto the hosts and ranked anew.

    Without a topology the result is returned as it is. ``effort`` is shared by the plans.
    """
    context = request.context
    if context.cluster.topology is None or not result.ranked:
        return result
    share = effort / len(result.ranked)
    mapped = [(ranked, map_plan(context, ranked.plan, seed=seed, effort=share)) for ranked in result.ranked]
    if all(each.search is None for _, each in mapped):
        note = "host order: every order of these hosts is as good"
        return replace(result, notes=(*result.notes, note))
    plans = [_ranked(request, ranked, each) for ranked, each in mapped]
    order = sorted(range(len(plans)), key=lambda place: plans[place].prediction.iteration_time)
    if request.objective != "throughput":
        # Dollars and joules of plans on equally many GPUs follow their time; others keep their place.
        order = list(range(len(plans)))
    best = order[0]
    search = mapped[best][1].search
    notes = result.notes
    if search is not None:
        before = result.ranked[best].prediction.iteration_time
        notes = (
            *notes,
            f"host order of the winner: {before:.4g} s in the order given, "
            f"{plans[best].prediction.iteration_time:.4g} s as mapped; exposed transfers within "
            f"{search.gap:.0%} of the bound of all orders",
        )
    return replace(result, ranked=tuple(plans[place] for place in order), notes=notes)


def _ranked(request: SearchRequest, ranked: RankedPlan, mapped: MappedPlan) -> RankedPlan:
    if mapped.plan is ranked.plan:
        return ranked
    prediction = predict(request.context, mapped.plan, request.flops)
    if prediction.iteration_time >= ranked.prediction.iteration_time:
        return ranked
    return replace(ranked, plan=mapped.plan, prediction=prediction)


def _host_grid(plan: ParallelPlan, gpus_per_node: int) -> tuple[int, int] | None:
    """Return stages and hosts of each as hosts see them; None where a host holds a part of a stage and more."""
    ranks = plan.tp * plan.cp * plan.dp
    if ranks % gpus_per_node == 0:
        return plan.pp, ranks // gpus_per_node
    if gpus_per_node % ranks == 0 and plan.num_gpus % gpus_per_node == 0:
        return plan.num_gpus // gpus_per_node, 1
    return None
