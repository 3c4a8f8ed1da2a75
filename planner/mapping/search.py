"""Find the host order under which a plan communicates least."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from meshwright.planner.mapping.annealing import anneal_order
from meshwright.planner.mapping.bounds import order_bound
from meshwright.planner.mapping.problem import KINDS, IntArray, MappingProblem, order_cost

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
    if problem.num_hosts <= _MOST_ENUMERATED or not problem.traffic:
        order, cost, count = _enumerated(problem) if problem.traffic else (identity, 0.0, 1)
        return MappingResult(
            order=order,
            cost=cost,
            identity_cost=identity_cost,
            bound=cost,
            num_evaluations=count,
            is_exact=True,
        )
    moves = int(min(_MOST_MOVES, effort * _WORK / _loads_per_move(problem)))
    best, best_cost = identity, identity_cost
    for restart in range(_RESTARTS):
        cost, found = _annealed(problem, identity, moves // _RESTARTS, seed * _RESTARTS + restart)
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


def _loads_per_move(problem: MappingProblem) -> float:
    """Return about how many numbers one priced swap reads: the members of the groups of two slots, and all groups."""
    flat = problem.flat
    lengths = np.diff(flat.group_start).astype(np.float64)
    squares = np.repeat(flat.kind == KINDS.index("exchange"), np.diff(flat.traffic_start))
    reads = np.where(squares, lengths**2, lengths)
    per_slot = float(reads[flat.slot_groups].sum()) / problem.num_hosts
    return 2.0 * (2.0 * per_slot + len(lengths))


def _annealed(problem: MappingProblem, order: IntArray, num_moves: int, seed: int) -> tuple[float, IntArray]:
    """Return the best order met from a start, and its cost; the start's own without moves."""
    flat = problem.flat
    found = order.copy()
    values = np.zeros((2, len(flat.group_start) - 1))
    cost = anneal_order(
        flat.time,
        flat.kind,
        flat.traffic_start,
        flat.group_start,
        flat.group_slots,
        flat.group_weight,
        flat.slot_start,
        flat.slot_groups,
        order.copy(),
        found,
        values[0],
        values[1],
        num_moves,
        _FIRST_TEMPERATURE,
        _LAST_TEMPERATURE,
        seed,
    )
    return float(cost), found


def _enumerated(problem: MappingProblem) -> tuple[IntArray, float, int]:
    """Return the best of all orders of the hosts on the slots; idle hosts stand last in their own order."""
    hosts = range(problem.num_hosts)
    best, best_cost, count = np.arange(problem.num_hosts), np.inf, 0
    for used in permutations(hosts, problem.num_slots):
        order = np.array([*used, *(host for host in hosts if host not in used)], dtype=np.int64)
        cost, _ = _annealed(problem, order, 0, 0)
        count += 1
        if cost < best_cost:
            best, best_cost = order, cost
    return best, float(best_cost), count
