"""Experts of neighbouring layers that follow one another on one rank: assignment layer by layer, in sweeps.

Where tokens stay on the rank of their last expert (context-coherent dispatch, ExFlow, arXiv 2401.08383), what counts
is the transition weight between layers that stays on a rank. With its neighbours fixed, the best placement of one
layer is a linear assignment; sweeps forward and backward repeat that to a fixed point. One expert per rank makes
the whole chain a product of independent assignments, which one pass solves exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.placement.chain_kernels import polish_layer, swap_gains

__all__ = [
    "alternate",
    "alternate_often",
    "chain_weight",
    "joint_chain",
    "ranks_of_slots",
    "relabel_chain",
    "slots_of_ranks",
]

_MAX_SWEEPS = 40
_ENOUGH = 1e-9


def chain_weight(transitions: NDArray[np.float64], ranks: NDArray[np.int64]) -> float:
    """Return the transition weight that stays on a rank; ``ranks`` is the rank of each expert, ``(L, E)``."""
    stays = ranks[:-1, :, None] == ranks[1:, None, :]
    return float((transitions * stays).sum())


def slots_of_ranks(ranks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the expert of each slot, ``(L, E)``, where each rank holds as many experts."""
    return np.argsort(ranks, axis=1, kind="stable")


def ranks_of_slots(slots: NDArray[np.int64], num_ranks: int) -> NDArray[np.int64]:
    """Return the rank of each expert, ``(L, E)``, of slots without copies."""
    result: NDArray[np.int64] = np.argsort(slots, axis=1, kind="stable") // (slots.shape[1] // num_ranks)
    return result


def alternate(
    transitions: NDArray[np.float64], num_ranks: int, start: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Return the rank of each expert, ``(num_layers, num_experts)``, by alternating assignment.

    Parameters
    ----------
    transitions : NDArray[np.float64]
        ``(num_layers - 1, num_experts, num_experts)``.
    num_ranks : int
        Ranks; divides the experts.
    start : NDArray[np.int64] | None
        Placement to start from; a forward pass from contiguous experts when None.
    """
    from scipy.optimize import linear_sum_assignment

    num_layers, num_experts = len(transitions) + 1, transitions.shape[1]
    room = num_experts // num_ranks
    columns = np.repeat(np.arange(num_ranks), room)

    def assign(gain: NDArray[np.float64]) -> NDArray[np.int64]:
        _, chosen = linear_sum_assignment(gain[:, columns], maximize=True)
        result: NDArray[np.int64] = columns[chosen]
        return result

    if start is None:
        ranks = np.empty((num_layers, num_experts), dtype=np.int64)
        ranks[0] = columns
        for layer in range(1, num_layers):
            ranks[layer] = assign(_onto_ranks(transitions[layer - 1].T, ranks[layer - 1], num_ranks))
        if room == 1:
            return ranks
    else:
        ranks = start.copy()
    is_stale = np.ones(num_layers, dtype=bool)
    for sweep in range(_MAX_SWEEPS):
        order = range(num_layers - 1, -1, -1) if sweep % 2 == 0 else range(num_layers)
        changed = False
        for layer in order:
            if not is_stale[layer]:
                continue
            is_stale[layer] = False
            gain = _neighbour_gain(transitions, ranks, layer, num_ranks)
            before = gain[np.arange(num_experts), ranks[layer]].sum()
            new = assign(gain)
            if gain[np.arange(num_experts), new].sum() > before * (1.0 + _ENOUGH):
                ranks[layer] = new
                changed = True
                is_stale[max(0, layer - 1)] = is_stale[min(num_layers - 1, layer + 1)] = True
                is_stale[layer] = False
        if not changed:
            break
    return ranks


def alternate_often(
    transitions: NDArray[np.float64], num_ranks: int, num_starts: int, seed: int = 0
) -> NDArray[np.int64]:
    """Return the best of :func:`alternate` from its own start and from random ones, each with exchanges of pairs.

    Random starts find better chains of few experts only: of 128 and more, all lead to the same one.
    """
    num_layers, num_experts = len(transitions) + 1, transitions.shape[1]
    generator = np.random.default_rng(seed)
    loads, caps = np.ones((num_layers, num_experts)), np.full(num_layers, np.inf)
    best_value, best = -np.inf, np.empty((0, 0), dtype=np.int64)
    columns = np.repeat(np.arange(num_ranks), num_experts // num_ranks)
    for start in range(num_starts + 1):
        random = np.asarray([generator.permutation(columns) for _ in range(num_layers)]) if start else None
        ranks = alternate(transitions, num_ranks, random)
        while True:
            value = chain_weight(transitions, ranks)
            if value > best_value:
                best_value, best = value, ranks
            polished = joint_chain(transitions, loads, num_ranks, caps, ranks)
            slots = relabel_chain(transitions, slots_of_ranks(polished), num_ranks)
            ranks = alternate(transitions, num_ranks, ranks_of_slots(slots, num_ranks))
            if chain_weight(transitions, ranks) <= value * (1.0 + _ENOUGH):
                break
    return best


def _neighbour_gain(
    transitions: NDArray[np.float64], ranks: NDArray[np.int64], layer: int, num_ranks: int
) -> NDArray[np.float64]:
    """Return the weight each expert of a layer keeps on each rank, its neighbours fixed, ``(E, num_ranks)``."""
    num_experts = ranks.shape[1]
    gain = np.zeros((num_experts, num_ranks))
    if layer > 0:
        gain += _onto_ranks(transitions[layer - 1].T, ranks[layer - 1], num_ranks)
    if layer < len(ranks) - 1:
        gain += _onto_ranks(transitions[layer], ranks[layer + 1], num_ranks)
    return gain


def _onto_ranks(
    weights: NDArray[np.float64], ranks: NDArray[np.int64], num_ranks: int
) -> NDArray[np.float64]:
    """Return the weight from each row to the experts of each rank, ``(rows, num_ranks)``."""
    order = np.argsort(ranks, kind="stable")
    grouped = weights[:, order].reshape(len(weights), num_ranks, -1)
    result: NDArray[np.float64] = grouped.sum(axis=2)
    return result


def relabel_chain(
    transitions: NDArray[np.float64], slots: NDArray[np.int64], num_ranks: int
) -> NDArray[np.int64]:
    """Return the same sets of experts on renamed ranks, so that most transitions stay: exact, layer after layer.

    With equal cost for every other rank, MoETuner's second stage (arXiv 2502.06643) is one linear assignment per
    layer. Balance does not change. ``slots`` may hold copies.
    """
    from scipy.optimize import linear_sum_assignment

    num_experts = transitions.shape[1]
    result = slots.copy()
    previous = _shares(result[0], num_ranks, num_experts)
    for layer in range(1, len(slots)):
        mine = _shares(slots[layer], num_ranks, num_experts)
        kept = previous.T @ transitions[layer - 1] @ mine
        _, chosen = linear_sum_assignment(kept, maximize=True)
        result[layer] = slots[layer].reshape(num_ranks, -1)[chosen].ravel()
        previous = mine[:, chosen]
    return result


def _shares(slots: NDArray[np.int64], num_ranks: int, num_experts: int) -> NDArray[np.float64]:
    shares = np.zeros((num_experts, num_ranks))
    np.add.at(shares, (slots, np.arange(len(slots)) * num_ranks // len(slots)), 1.0)
    result: NDArray[np.float64] = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1.0)
    return result


def joint_chain(
    transitions: NDArray[np.float64],
    loads: NDArray[np.float64],
    num_ranks: int,
    caps: NDArray[np.float64],
    start: NDArray[np.int64],
    num_sweeps: int = 12,
) -> NDArray[np.int64]:
    """Return ranks of experts that keep transitions together while no rank of a layer exceeds the layer's cap.

    Parameters
    ----------
    transitions : NDArray[np.float64]
        ``(num_layers - 1, num_experts, num_experts)``.
    loads : NDArray[np.float64]
        ``(num_layers, num_experts)``.
    num_ranks : int
        Ranks.
    caps : NDArray[np.float64]
        Load a rank may have, ``(num_layers,)``; a start above it is repaired as far as exchanges can.
    start : NDArray[np.int64]
        Rank of each expert, ``(num_layers, num_experts)``.
    num_sweeps : int
        Sweeps over the layers at most.

    Returns
    -------
    NDArray[np.int64]
        Rank of each expert.
    """
    ranks = start.copy()
    for sweep in range(num_sweeps):
        order = range(len(ranks)) if sweep % 2 == 0 else range(len(ranks) - 1, -1, -1)
        exchanges = 0
        for layer in order:
            gain = _neighbour_gain(transitions, ranks, layer, num_ranks)
            mine = np.ascontiguousarray(ranks[layer])
            exchanges += swap_gains(gain, loads[layer], mine, num_ranks, float(caps[layer]))
            exchanges += polish_layer(gain, loads[layer], mine, num_ranks, float(caps[layer]))
            ranks[layer] = mine
        if not exchanges:
            break
    return ranks
