"""What no host order can beat."""

from __future__ import annotations

import numpy as np

from meshwright.planner.mapping.problem import FloatArray, MappingProblem, Traffic

__all__ = ["order_bound"]


def order_bound(problem: MappingProblem) -> float:
    """Return a lower bound of :func:`meshwright.planner.mapping.problem.order_cost` over all host orders [s].

    Each traffic is bounded alone. The slowest pipeline is at least the mean one, and the hops of all pipelines cost at
    least the cheapest set of as many hops in which every host sends and receives once at most (an assignment). Every
    host of a ring has two of its links (one where two hosts form it), and every host of an exchange a link to all
    others, so the worst host counts with its best ones, in the lightest group it can be in.
    """
    return sum(_bound(problem, each) for each in problem.traffic)


def _bound(problem: MappingProblem, traffic: Traffic) -> float:
    num_hosts = problem.num_hosts
    if not traffic.time.any() or num_hosts < 2:
        return 0.0
    links = traffic.time + np.diag(np.full(num_hosts, np.inf))
    if traffic.kind == "path":
        slots = [slot for group in traffic.groups for slot in group]
        num_hops = len(slots) - len(traffic.groups)
        longest = max(len(group) for group in traffic.groups) - 1
        # Only where every slot is in one pipeline does every host send and receive once.
        is_apart = len(slots) == len(set(slots))
        mean = _cheapest_hops(traffic.time, num_hops) / len(traffic.groups) if is_apart else 0.0
        least = max(longest * float(links.min()), mean)
        return float(traffic.weighted(np.full(len(traffic.groups), least)).min())
    fewest = min(len(set(group)) for group in traffic.groups)
    nearest = np.sort(links, axis=1)
    own: FloatArray = (
        nearest[:, 0 if fewest == 2 else 1]
        if traffic.kind == "ring"
        else nearest[:, : fewest - 1].mean(axis=1)
    )
    sorted_links: FloatArray = np.sort(own)
    # However the hosts are given away, the heaviest groups together hold one that is no better than so many others.
    heaviest = np.argsort(-traffic.weighted(np.full(len(traffic.groups), sorted_links[-1])))
    bound, held = 0.0, set[int]()
    for count, group in enumerate(heaviest, 1):
        held.update(traffic.groups[group])
        values = traffic.weighted(np.full(len(traffic.groups), sorted_links[len(held) - 1]))
        bound = max(bound, float(values[heaviest[:count]].min()))
    return bound


def _cheapest_hops(hop: FloatArray, num_hops: int) -> float:
    # Imported late: few plans are mapped.
    from scipy.optimize import linear_sum_assignment

    num_hosts = len(hop)
    # Rows and columns that stand for "sends nothing" and "receives nothing" take the hosts that are left over.
    spare = num_hosts - num_hops
    forbidden = float(hop.max()) * (num_hosts + 1.0)
    cost: FloatArray = np.zeros((num_hosts + spare, num_hosts + spare))
    cost[:num_hosts, :num_hosts] = hop + np.diag(np.full(num_hosts, forbidden))
    cost[num_hosts:, num_hosts:] = forbidden
    rows, taken = linear_sum_assignment(cost)
    return float(cost[rows, taken].sum())
