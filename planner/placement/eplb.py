"""The baseline: the Expert Parallelism Load Balancer as published (deepseek-ai/EPLB, README), written anew.

Replicas go one by one to the expert whose copies are the heaviest; copies go, heaviest first, to the least loaded
rank that has a free slot. Where the expert groups divide by the nodes, groups are packed to nodes first and both
steps happen inside each node.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

__all__ = ["eplb_layer", "eplb_slots", "pack_equal", "replica_counts"]


def eplb_slots(
    loads: NDArray[np.float64], num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> NDArray[np.int64]:
    """Return the expert of each slot of each layer, ``(num_layers, num_slots)``; see :func:`eplb_layer`."""
    layers = [eplb_layer(each, num_slots, num_groups, num_nodes, num_ranks) for each in loads]
    return np.asarray(layers, dtype=np.int64)


def eplb_layer(
    loads: NDArray[np.float64], num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> NDArray[np.int64]:
    """Return the expert of each slot of one layer, ``(num_slots,)``.

    Parameters
    ----------
    loads : NDArray[np.float64]
        Load of each expert, ``(num_experts,)``.
    num_slots, num_groups, num_nodes, num_ranks : int
        Slots, expert groups, nodes and ranks; slots divide by ranks, ranks by nodes.
    """
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    num_experts = len(loads)
    group_size = num_experts // num_groups
    group_loads = loads[: num_groups * group_size].reshape(num_groups, group_size).sum(axis=1)
    node_of_group, place_in_node = pack_equal(group_loads, num_nodes)
    slots = []
    for node in range(num_nodes):
        groups = np.flatnonzero(node_of_group == node)
        groups = groups[np.argsort(place_in_node[groups])]
        experts = np.concatenate([np.arange(each * group_size, (each + 1) * group_size) for each in groups])
        if num_nodes == 1:
            experts = np.arange(num_experts)
        counts, order = _grow_copies(loads[experts], num_slots // num_nodes)
        copies = (loads[experts] / counts)[order]
        ranks, places = pack_equal(copies, num_ranks // num_nodes)
        per_rank = num_slots // num_ranks
        mine = np.empty(num_slots // num_nodes, dtype=np.int64)
        mine[ranks * per_rank + places] = experts[order]
        slots.append(mine)
    return np.concatenate(slots)


def replica_counts(loads: NDArray[np.float64], num_slots: int) -> NDArray[np.int64]:
    """Return how many copies each expert gets when each next one goes to the heaviest copies.

    It makes the heaviest copy as light as any choice of counts can.
    """
    return _grow_copies(loads, num_slots)[0]


def _grow_copies(loads: NDArray[np.float64], num_slots: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the copies of each expert and the expert of each copy in the order they were made."""
    counts = np.ones(len(loads), dtype=np.int64)
    order = list(range(len(loads)))
    heap = [(-float(load), expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    while len(order) < num_slots:
        _, expert = heapq.heappop(heap)
        order.append(expert)
        counts[expert] += 1
        heapq.heappush(heap, (-float(loads[expert]) / float(counts[expert]), expert))
    return counts, np.asarray(order, dtype=np.int64)


def pack_equal(weights: NDArray[np.float64], num_packs: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack items, heaviest first, to the lightest pack that has room, each pack with as many items.

    Returns
    -------
    tuple[NDArray[np.int64], NDArray[np.int64]]
        Pack of each item and its place in the pack.
    """
    room = len(weights) // num_packs
    if room == 1:
        return np.arange(len(weights)), np.zeros(len(weights), dtype=np.int64)
    pack = np.empty(len(weights), dtype=np.int64)
    place = np.empty(len(weights), dtype=np.int64)
    heap = [(0.0, index, 0) for index in range(num_packs)]
    for item in np.argsort(-weights, kind="stable"):
        total, index, used = heapq.heappop(heap)
        pack[item], place[item] = index, used
        if used + 1 < room:
            heapq.heappush(heap, (total + float(weights[item]), index, used + 1))
    return pack, place
