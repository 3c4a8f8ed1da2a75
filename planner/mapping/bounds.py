"""What no host order can beat."""

from __future__ import annotations

import numpy as np

from meshwright.planner.mapping.problem import FloatArray, MappingProblem

__all__ = ["order_bound"]


def order_bound(problem: MappingProblem) -> float:
    """Return a lower bound of :func:`meshwright.planner.mapping.problem.order_cost` over all host orders [s].

    The slowest pipeline is at least the mean one, and the hops of all pipelines cost at least the cheapest set of
    as many hops in which every host sends and receives once at most (an assignment). Every host has two ring links
    (one where rings join two hosts), so the slowest ring is at least the second best link of its worst host.
    """
    return _pipeline_bound(problem) + _ring_bound(problem)


def _pipeline_bound(problem: MappingProblem) -> float:
    if problem.num_stages == 1 or problem.pipeline_bytes == 0.0:
        return 0.0
    # Imported late: few plans are mapped.
    from scipy.optimize import linear_sum_assignment

    num_hosts, columns = problem.num_hosts, problem.hosts_per_stage
    num_hops = (problem.num_stages - 1) * columns
    hop = problem.hop_time
    # Rows and columns that stand for "sends nothing" and "receives nothing" take the hosts that are left over.
    spare = num_hosts - num_hops
    forbidden = float(hop.max()) * (num_hosts + 1.0)
    cost: FloatArray = np.zeros((num_hosts + spare, num_hosts + spare))
    cost[:num_hosts, :num_hosts] = hop + np.diag(np.full(num_hosts, forbidden))
    cost[num_hosts:, num_hosts:] = forbidden
    rows, taken = linear_sum_assignment(cost)
    cheapest = float(cost[rows, taken].sum())
    shortest = float(hop[~np.eye(num_hosts, dtype=bool)].min())
    return max(cheapest / columns, (problem.num_stages - 1) * shortest)


def _ring_bound(problem: MappingProblem) -> float:
    if problem.hosts_per_stage == 1 or problem.ring_bytes == 0.0:
        return 0.0
    links = problem.ring_time + np.diag(np.full(problem.num_hosts, np.inf))
    num_links = 1 if problem.hosts_per_stage == 2 else 2
    each = np.sort(np.partition(links, num_links - 1, axis=1)[:, num_links - 1])
    # The worst hosts may stay idle where there are more than slots.
    return float(each[problem.num_slots - 1])
