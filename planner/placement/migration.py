"""Names of ranks that keep most experts where they are: which rank has which set of experts is free, moving is not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = ["keep_in_place"]


def keep_in_place(
    placement: ExpertPlacement, current: ExpertPlacement, *, is_chained: bool
) -> ExpertPlacement:
    """Return the placement with its ranks renamed, so that fewest slots must be filled anew.

    Parameters
    ----------
    placement : ExpertPlacement
        Its balance and its traffic stay the same.
    current : ExpertPlacement
        Placement in use, of the same ranks; may have other slots.
    is_chained : bool
        Ranks are renamed alike in all layers, because transitions between layers were kept on ranks.

    Notes
    -----
    Nodes are matched to nodes by the experts they share, then ranks inside each node: linear assignments. On a rank,
    an expert stays in its slot.
    """
    if current.num_ranks != placement.num_ranks or current.ranks_per_node != placement.ranks_per_node:
        return placement
    overlaps = [_overlap(placement, current, layer) for layer in range(placement.num_layers)]
    if is_chained:
        overlaps = [np.sum(overlaps, axis=0)] * placement.num_layers
    slots = np.empty_like(placement.slots)
    for layer, overlap in enumerate(overlaps):
        order = _best_order(overlap, placement.ranks_per_node)
        rows = placement.slots[layer].reshape(placement.num_ranks, -1)[order]
        old = current.slots[layer].reshape(current.num_ranks, -1)
        slots[layer] = np.concatenate([_in_place(new, held) for new, held in zip(rows, old, strict=True)])
    return ExpertPlacement(
        slots=slots,
        num_experts=placement.num_experts,
        num_ranks=placement.num_ranks,
        ranks_per_node=placement.ranks_per_node,
    )


def _overlap(placement: ExpertPlacement, current: ExpertPlacement, layer: int) -> NDArray[np.float64]:
    """Return the experts that each new rank (row) shares with each old one (column)."""
    held = []
    for each in (placement, current):
        table = np.zeros((each.num_ranks, each.num_experts))
        table[each.rank_of_slot, each.slots[layer]] = 1.0
        held.append(table)
    result: NDArray[np.float64] = held[0] @ held[1].T
    return result


def _best_order(overlap: NDArray[np.float64], ranks_per_node: int) -> NDArray[np.int64]:
    """Return, for every old rank, the new rank that takes its name."""
    from scipy.optimize import linear_sum_assignment

    num_ranks = len(overlap)
    num_nodes = num_ranks // ranks_per_node
    value = np.zeros((num_nodes, num_nodes))
    inside: dict[tuple[int, int], NDArray[np.int64]] = {}
    for new in range(num_nodes):
        for old in range(num_nodes):
            block = overlap[
                new * ranks_per_node : (new + 1) * ranks_per_node,
                old * ranks_per_node : (old + 1) * ranks_per_node,
            ]
            rows, columns = linear_sum_assignment(block, maximize=True)
            value[new, old] = block[rows, columns].sum()
            inside[new, old] = rows[np.argsort(columns)]
    order = np.empty(num_ranks, dtype=np.int64)
    for new, old in zip(*linear_sum_assignment(value, maximize=True), strict=True):
        start = old * ranks_per_node
        order[start : start + ranks_per_node] = new * ranks_per_node + inside[new, old]
    return order


def _in_place(new: NDArray[np.int64], held: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the experts of a rank, those it already holds in their old slots."""
    result = np.full(len(new), -1, dtype=np.int64)
    left = new.tolist()
    for place, expert in enumerate(held.tolist()[: len(new)]):
        if expert in left:
            result[place] = expert
            left.remove(expert)
    result[result < 0] = left
    return result
