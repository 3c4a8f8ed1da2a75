"""Find the host order under which a plan communicates least."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from meshwright.planner.mapping.annealing import anneal_order
from meshwright.planner.mapping.bounds import order_bound
from meshwright.planner.mapping.problem import IntArray, MappingProblem, order_cost

__all__ = ["MappingResult", "search_order"]

# Host orders of this many hosts are all tried: 5,040 of seven.
_MOST_ENUMERATED = 7
# Loads of matrix entries one search may take, about ten seconds on one core; most restarts it is split into.
_WORK = 2e9
_RESTARTS = 8
_MOST_MOVES = 12_000_000
# Temperatures as shares of the cost: hotter starts find the optimum of small instances, colder ones do not.
_FIRST_TEMPERATURE, _LAST_TEMPERATURE = 0.2, 1e-4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MappingResult:
    """The best host order found.

    Parameters
    ----------
    order : IntArray
        Host of each slot, idle hosts last, ``(num_hosts,)``.
    cost, identity_cost, bound : float
        Exposed communication under this order, under the order as given, and what no order can beat [s].
    num_evaluations : int
        Orders priced.
    is_exact : bool
        All orders were tried.
    """

    order: IntArray
    cost: float
    identity_cost: float
    bound: float
    num_evaluations: int
    is_exact: bool

    @property
    def gap(self) -> float:
        """How far the cost may lie above the best one, as a share of the cost."""
        return 1.0 - self.bound / self.cost if self.cost > 0.0 else 0.0


def search_order(problem: MappingProblem, *, seed: int = 0, effort: float = 1.0) -> MappingResult:
    """Return the best host order of a fixed number of annealing runs; of all orders for up to seven hosts.

    Equal seeds and efforts give equal orders on every machine.

    Parameters
    ----------
    problem : MappingProblem
        Hosts and traffic.
    seed : int
        Of the swaps.
    effort : float
        Share of the usual work, about ten seconds at 1.
    """
    identity = np.arange(problem.num_hosts, dtype=np.int64)
    identity_cost = order_cost(problem, identity)
    if problem.num_hosts <= _MOST_ENUMERATED:
        order, cost, count = _enumerated(problem)
        return MappingResult(
            order=order,
            cost=cost,
            identity_cost=identity_cost,
            bound=cost,
            num_evaluations=count,
            is_exact=True,
        )
    per_move = 5.0 * (problem.num_stages + problem.hosts_per_stage)
    moves = int(min(_MOST_MOVES, effort * _WORK / per_move))
    hop, ring = problem.hop_time, problem.ring_time
    best, best_cost = identity, identity_cost
    for restart in range(_RESTARTS):
        order, found = identity.copy(), identity.copy()
        cost = anneal_order(
            hop,
            ring,
            problem.num_stages,
            problem.hosts_per_stage,
            order,
            found,
            np.zeros(problem.hosts_per_stage),
            np.zeros(problem.num_stages),
            moves // _RESTARTS,
            _FIRST_TEMPERATURE,
            _LAST_TEMPERATURE,
            seed * _RESTARTS + restart,
        )
        if cost < best_cost:
            best, best_cost = found, cost
    return MappingResult(
        order=best,
        cost=order_cost(problem, best),
        identity_cost=identity_cost,
        bound=order_bound(problem),
        num_evaluations=moves // _RESTARTS * _RESTARTS,
        is_exact=False,
    )


def _enumerated(problem: MappingProblem) -> tuple[IntArray, float, int]:
    best, best_cost, count = np.arange(problem.num_hosts), np.inf, 0
    for each in permutations(range(problem.num_hosts)):
        order = np.array(each, dtype=np.int64)
        cost = order_cost(problem, order)
        count += 1
        if cost < best_cost:
            best, best_cost = order, cost
    return best, float(best_cost), count
