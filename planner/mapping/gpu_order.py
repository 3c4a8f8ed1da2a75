"""Which GPU of a node is which local rank, where the links between GPUs differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np

from meshwright.costmodels.rank_layout import ring_bottleneck
from meshwright.planner.mapping.plan_traffic import PlanTraffic
from meshwright.planner.mapping.problem import FloatArray, IntArray, TrafficKind

__all__ = ["GpuOrder", "search_gpu_order"]

# GPUs whose orders are all tried: 40,320 of eight.
_MOST_ENUMERATED = 8
# Sets of GPUs are numbered by their members' bits: more than this many GPUs in a group are not told apart.
_MOST_GPUS = 16
_RESTARTS = 20

_Costs = Callable[[IntArray], FloatArray]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GpuOrder:
    """The best order of GPUs found.

    Parameters
    ----------
    order : tuple[int, ...]
        GPU of each local rank.
    cost, identity_cost, bound : float
        Iteration time that links inside nodes cost beyond the node's usual link, under this order, as the GPUs are
        numbered, and what no order can beat [s].
    is_exact : bool
        All orders were tried.
    """

    order: tuple[int, ...]
    cost: float
    identity_cost: float
    bound: float
    is_exact: bool


def search_gpu_order(slowdown: FloatArray, traffic: Sequence[PlanTraffic], seed: int = 0) -> GpuOrder | None:
    """Return the order of GPUs, one for all nodes, under which groups inside nodes communicate least.

    Parameters
    ----------
    slowdown : FloatArray
        Time between two GPUs over that of the node's usual link, ``(num_gpus, num_gpus)``.
    traffic : Sequence[PlanTraffic]
        Of the plan; what crosses nodes is passed over.
    seed : int
        Of the swaps that are tried where there are too many orders to try all.

    Returns
    -------
    GpuOrder | None
        None where nothing depends on the order.
    """
    num_gpus = len(slowdown)
    inside = [each for each in traffic if each.where == "inside"]
    if not inside or num_gpus > _MOST_GPUS:
        return None
    tables = {
        (each.kind, size): _set_values(slowdown, each.kind, size)
        for each in inside
        for size in {len(group) for group in each.groups}
    }

    def costs(orders: IntArray) -> FloatArray:
        bits = np.left_shift(1, orders)
        total = np.zeros(len(orders))
        for each in inside:
            worst = np.full(len(orders), -np.inf)
            for group, seconds in zip(each.groups, each.seconds, strict=True):
                values = tables[each.kind, len(group)][bits[:, list(group)].sum(axis=1)]
                worst = np.maximum(worst, seconds * (values - 1.0))
            total += worst
        return total

    identity = np.arange(num_gpus)[np.newaxis]
    if num_gpus <= _MOST_ENUMERATED:
        orders = np.array(list(permutations(range(num_gpus))), dtype=np.int64)
        values = costs(orders)
        # Equal orders: the first, which is the natural one where it is among them.
        best = int(np.argmax(values <= values.min() * (1.0 + np.sign(values.min()) * 1e-12) + 1e-15))
        order, cost, bound = orders[best], float(values[best]), float(values[best])
    else:
        order, cost = _climbed(costs, num_gpus, seed)
        bound = sum(
            max(
                seconds * (tables[each.kind, len(group)].min() - 1.0)
                for group, seconds in zip(each.groups, each.seconds, strict=True)
            )
            for each in inside
        )
    return GpuOrder(
        order=tuple(int(gpu) for gpu in order),
        cost=cost,
        identity_cost=float(costs(identity)[0]),
        bound=float(bound),
        is_exact=num_gpus <= _MOST_ENUMERATED,
    )


def _climbed(costs: _Costs, num_gpus: int, seed: int) -> tuple[IntArray, float]:
    """Return the best end of some climbs by the best swap, the first from the natural order."""
    random = np.random.default_rng(seed)
    pairs = np.array(list(combinations(range(num_gpus), 2)))
    best, best_cost = np.arange(num_gpus), np.inf
    for restart in range(_RESTARTS):
        order = np.arange(num_gpus) if restart == 0 else random.permutation(num_gpus)
        cost = float(costs(order[np.newaxis])[0])
        while True:
            swapped = np.tile(order, (len(pairs), 1))
            rows = np.arange(len(pairs))
            swapped[rows, pairs[:, 0]], swapped[rows, pairs[:, 1]] = order[pairs[:, 1]], order[pairs[:, 0]]
            values = costs(swapped)
            step = int(np.argmin(values))
            if values[step] >= cost:
                break
            order, cost = swapped[step], float(values[step])
        if cost < best_cost:
            best, best_cost = order, cost
    return best, best_cost


def _set_values(slowdown: FloatArray, kind: TrafficKind, size: int) -> FloatArray:
    """Return the slowdown of every set of so many GPUs, by the sum of its members' bits; infinite for other sets."""
    values = np.full(1 << len(slowdown), np.inf)
    for members in combinations(range(len(slowdown)), size):
        part = slowdown[np.ix_(members, members)]
        if kind == "exchange":
            value = float(((part.sum(axis=1) - np.diag(part)) / (size - 1)).max())
        else:
            value = ring_bottleneck(part)
        values[sum(1 << gpu for gpu in members)] = value
    return values
