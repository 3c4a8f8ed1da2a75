"""Even load: how many copies each expert gets and on which rank each sits, so that the heaviest rank is lightest.

Copies of an expert share its load evenly. Greedy counts and longest-processing-time-first packing (what EPLB does)
are the start; exchanges between ranks and moves of a copy from one expert to another do the rest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.placement.balance_kernels import level_ranks, level_windows, pack_descending
from meshwright.planner.placement.certificates import packing_bound
from meshwright.planner.placement.eplb import eplb_layer, replica_counts

__all__ = ["balance_grouped_layer", "balance_layer", "balance_slots", "level_over_windows", "token_share"]

Share = Callable[[NDArray[np.float64], NDArray[np.int64]], NDArray[np.float64]]
"""Load of one copy of each expert, from the experts' loads and their counts."""

_NUM_KICKS = 150
_MAX_COUNT_MOVES = 24
_DONORS = 6
# Choices of counts that are all tried: up to 8 experts in 12 slots (330) or so.
_MAX_COUNTS = 500
# Below this the heaviest rank is even for every purpose.
_CLOSE_ENOUGH = 1e-5
# Pairings of groups with nodes that are tried: all up to 8 groups on 4 nodes (2,520 orders of 105 pairings).
_MAX_PAIRINGS = 20_000


def token_share(loads: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return an even part of the tokens for each copy."""
    result: NDArray[np.float64] = loads / counts
    return result


def balance_slots(
    loads: NDArray[np.float64],
    num_slots: int,
    num_ranks: int,
    *,
    num_groups: int = 1,
    num_nodes: int = 1,
    share: Share = token_share,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Return the expert of each slot of each layer, ``(num_layers, num_slots)``; see :func:`balance_layer`.

    With more than one node, every group of experts sits on one node (group-limited routing).
    """
    layers = []
    for layer, each in enumerate(loads):
        if num_nodes > 1 and num_groups > 1 and num_groups % num_nodes == 0:
            layers.append(
                balance_grouped_layer(each, num_slots, num_ranks, num_groups, num_nodes, seed + layer)
            )
        else:
            layers.append(balance_layer(each, num_slots, num_ranks, share=share, seed=seed + layer))
    return np.asarray(layers, dtype=np.int64)


def balance_layer(
    loads: NDArray[np.float64],
    num_slots: int,
    num_ranks: int,
    *,
    share: Share = token_share,
    seed: int = 0,
    num_kicks: int = _NUM_KICKS,
) -> NDArray[np.int64]:
    """Return the expert of each slot of one layer, never worse than EPLB.

    Parameters
    ----------
    loads : NDArray[np.float64]
        Load of each expert, ``(num_experts,)``.
    num_slots, num_ranks : int
        Slots divide by ranks; at least as many slots as experts.
    share : Share
        Load of a copy; an even part of the tokens, or the probability that the copy is active (decode).
    seed : int
        Of the random exchanges.
    num_kicks : int
        Random restarts of the exchanges.

    Returns
    -------
    NDArray[np.int64]
        ``(num_slots,)``; rank ``g`` owns the ``g``-th run of ``num_slots / num_ranks``.
    """
    counts = replica_counts(loads, num_slots)
    floor = packing_bound(loads, num_slots, num_ranks) if share is token_share else 0.0
    slots, value = _pack(loads, counts, num_ranks, share, floor, num_kicks, seed)
    if num_slots > len(loads) and math.comb(num_slots - 1, len(loads) - 1) <= _MAX_COUNTS:
        slots, value = _try_all_counts(loads, slots, value, num_slots, num_ranks, share, floor, seed)
    slots, value = _move_counts(loads, slots, value, num_ranks, share, floor, num_kicks, seed)
    baseline = eplb_layer(loads, num_slots, 1, 1, num_ranks)
    start = baseline.reshape(num_ranks, -1)
    if _heaviest(loads, start, share) < value:
        slots, _ = _improve(loads, start, share, floor, num_kicks, seed)
    return slots.ravel()


def _pack(
    loads: NDArray[np.float64],
    counts: NDArray[np.int64],
    num_ranks: int,
    share: Share,
    floor: float,
    num_kicks: int,
    seed: int,
) -> tuple[NDArray[np.int64], float]:
    """Return the experts of each rank, ``(num_ranks, slots)``, and the load of the heaviest."""
    expert = np.repeat(np.arange(len(loads)), counts)
    load = share(loads, counts)[expert]
    members = np.empty((num_ranks, len(expert) // num_ranks), dtype=np.int64)
    pack_descending(expert, load, np.argsort(-load, kind="stable"), num_ranks, members)
    value = level_ranks(expert, load, members, floor * (1.0 + _CLOSE_ENOUGH), num_kicks, seed, True)
    return expert[members], value


def _improve(
    loads: NDArray[np.float64],
    slots: NDArray[np.int64],
    share: Share,
    floor: float,
    num_kicks: int,
    seed: int,
) -> tuple[NDArray[np.int64], float]:
    """Return the same counts on better ranks."""
    expert = slots.ravel()
    counts = np.bincount(expert, minlength=len(loads))
    load = share(loads, np.maximum(counts, 1))[expert]
    members = np.arange(len(expert)).reshape(slots.shape)
    value = level_ranks(expert, load, members, floor * (1.0 + _CLOSE_ENOUGH), num_kicks, seed, True)
    return expert[members], value


def _move_counts(
    loads: NDArray[np.float64],
    slots: NDArray[np.int64],
    value: float,
    num_ranks: int,
    share: Share,
    floor: float,
    num_kicks: int,
    seed: int,
) -> tuple[NDArray[np.int64], float]:
    """Give an expert of the heaviest rank a copy of another expert's while that helps."""
    for _ in range(_MAX_COUNT_MOVES):
        counts = np.bincount(slots.ravel(), minlength=len(loads))
        if value <= floor * (1.0 + _CLOSE_ENOUGH) or counts.max() == 1:
            break
        best = None
        for given, taken in _count_moves(loads, slots, counts, share):
            moved = counts.copy()
            moved[given] += 1
            moved[taken] -= 1
            trial = _pack(loads, moved, num_ranks, share, floor, num_kicks // 5, seed)
            if trial[1] < (best[1] if best else value) * (1.0 - 1e-12):
                best = trial
        if best is None:
            break
        slots, value = best
        improved = _improve(loads, slots, share, floor, num_kicks, seed)
        if improved[1] < value:
            slots, value = improved
    return slots, value


def _try_all_counts(
    loads: NDArray[np.float64],
    slots: NDArray[np.int64],
    value: float,
    num_slots: int,
    num_ranks: int,
    share: Share,
    floor: float,
    seed: int,
) -> tuple[NDArray[np.int64], float]:
    """Pack every choice of counts whose heaviest copy could still beat the best; for small instances."""
    num_experts = len(loads)
    cuts = np.asarray(list(itertools.combinations(range(1, num_slots), num_experts - 1)), dtype=np.int64)
    edges = np.hstack([np.zeros((len(cuts), 1), np.int64), cuts, np.full((len(cuts), 1), num_slots)])
    choices = np.diff(edges, axis=1)
    heaviest = np.asarray([share(loads, each).max() for each in choices])
    for index in np.argsort(heaviest, kind="stable"):
        if heaviest[index] >= value or value <= floor * (1.0 + _CLOSE_ENOUGH):
            break
        trial = _pack(loads, choices[index], num_ranks, share, floor, _NUM_KICKS, seed)
        if trial[1] < value:
            slots, value = trial
    return slots, value


def _count_moves(
    loads: NDArray[np.float64], slots: NDArray[np.int64], counts: NDArray[np.int64], share: Share
) -> list[tuple[int, int]]:
    """Return (expert that gets a copy, expert that loses one), the cheapest losses first."""
    copy_load = share(loads, counts)
    totals = copy_load[slots].sum(axis=1)
    heavy = slots[int(np.argmax(totals))]
    receivers = sorted(set(heavy.tolist()), key=lambda each: -copy_load[each])[:_DONORS]
    spare = np.flatnonzero(counts > 1)
    lighter = share(loads, np.maximum(counts - 1, 1))
    donors = spare[np.argsort(lighter[spare])][:_DONORS]
    return [(given, int(taken)) for given in receivers for taken in donors if given != taken]


def _heaviest(loads: NDArray[np.float64], slots: NDArray[np.int64], share: Share) -> float:
    counts = np.maximum(np.bincount(slots.ravel(), minlength=len(loads)), 1)
    return float(share(loads, counts)[slots].sum(axis=1).max())


def balance_grouped_layer(
    loads: NDArray[np.float64],
    num_slots: int,
    num_ranks: int,
    num_groups: int,
    num_nodes: int,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Return the expert of each slot when all experts of a group sit on one node, ``(num_slots,)``.

    Every way to share the groups out over the nodes is tried in the order of its heaviest node, until even a
    perfectly level node could not beat the best found; each node is then balanced on its own.
    """
    per_node, group_size = num_groups // num_nodes, len(loads) // num_groups
    group_loads = loads.reshape(num_groups, group_size).sum(axis=1)
    solved: dict[tuple[int, ...], tuple[NDArray[np.int64], float]] = {}
    ranks_per_node = num_ranks // num_nodes

    def node_slots(groups: tuple[int, ...]) -> tuple[NDArray[np.int64], float]:
        if groups not in solved:
            experts = np.concatenate([np.arange(g * group_size, (g + 1) * group_size) for g in groups])
            local = balance_layer(
                loads[experts], num_slots // num_nodes, ranks_per_node, seed=seed, num_kicks=_NUM_KICKS // 3
            )
            heaviest = _heaviest(loads[experts], local.reshape(ranks_per_node, -1), token_share)
            solved[groups] = (experts[local], heaviest)
        return solved[groups]

    floors: list[tuple[float, tuple[tuple[int, ...], ...]]] = []
    for sharing in itertools.islice(_sharings(tuple(range(num_groups)), per_node), _MAX_PAIRINGS):
        heaviest = max(group_loads[list(part)].sum() for part in sharing)
        floors.append((float(heaviest) / ranks_per_node, sharing))
    floors.sort()
    best_value, best_slots = np.inf, np.empty(0, dtype=np.int64)
    for floor, sharing in floors:
        if floor >= best_value * (1.0 - _CLOSE_ENOUGH):
            break
        parts = [node_slots(part) for part in sharing]
        value = max(part[1] for part in parts)
        if value < best_value:
            best_value, best_slots = value, np.concatenate([part[0] for part in parts])
    baseline = eplb_layer(loads, num_slots, num_groups, num_nodes, num_ranks)
    if _heaviest(loads, baseline.reshape(num_ranks, -1), token_share) < best_value:
        return baseline
    return best_slots


def _sharings(groups: tuple[int, ...], per_node: int) -> itertools.chain[tuple[tuple[int, ...], ...]]:
    """Return every way to cut the groups into sets of ``per_node``; which node a set gets does not matter."""
    if not groups:
        return itertools.chain([()])
    first, rest = groups[0], groups[1:]
    return itertools.chain.from_iterable(
        (
            ((first, *others), *tail)
            for tail in _sharings(tuple(each for each in rest if each not in others), per_node)
        )
        for others in itertools.combinations(rest, per_node - 1)
    )


def level_over_windows(
    windows: NDArray[np.float64], slots: NDArray[np.int64], num_ranks: int, num_rounds: int = 200
) -> NDArray[np.int64]:
    """Return one layer's slots, exchanged so that the heaviest rank, averaged over windows of time, is lightest.

    Parameters
    ----------
    windows : NDArray[np.float64]
        Loads of the layer by window, ``(num_windows, num_experts)``; windows without any load count nothing.
    slots : NDArray[np.int64]
        Expert of each slot, ``(num_slots,)``.
    num_ranks : int
        Ranks.
    num_rounds : int
        Exchanges at most.
    """
    counts = np.bincount(slots, minlength=windows.shape[1])
    busy = windows[windows.sum(axis=1) > 0.0]
    load = (busy / np.maximum(counts, 1))[:, slots] * num_ranks / busy.sum(axis=1, keepdims=True)
    members = np.arange(len(slots)).reshape(num_ranks, -1)
    level_windows(slots, np.ascontiguousarray(load), members, num_rounds)
    return slots[members].ravel()
