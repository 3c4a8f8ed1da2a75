"""The best chain of a small layer, exactly: every partition of its experts into ranks, by dynamic programming.

Names of ranks can be given layer by layer along the chain, so that only which experts are together counts: between two
partitions the kept weight is a linear assignment of parts. Mixtral's 8 experts on 4 ranks have 105 partitions.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["best_partitions", "best_priced_partitions", "lightest_partitions", "num_partitions"]

_PRICE_STEPS = 30


def num_partitions(num_experts: int, num_ranks: int) -> int:
    """Return in how many ways the experts go to unnamed ranks, equally many on each; huge beyond a few ranks."""
    room = num_experts // num_ranks
    count = math.factorial(num_experts) // math.factorial(room) ** num_ranks // math.factorial(num_ranks)
    # Parts are matched by trying all their orders, unless there is one partition only.
    return count if count == 1 or num_ranks <= 6 else 10**9


def best_partitions(
    transitions: NDArray[np.float64],
    loads: NDArray[np.float64],
    num_ranks: int,
    caps: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Return the rank of each expert, ``(num_layers, num_experts)``, that keeps most transitions; optimal.

    Parameters
    ----------
    transitions : NDArray[np.float64]
        ``(num_layers - 1, num_experts, num_experts)``.
    loads : NDArray[np.float64]
        ``(num_layers, num_experts)``.
    num_ranks : int
        Ranks; see :func:`num_partitions` for how many are few enough.
    caps : NDArray[np.float64]
        Load a rank may have, ``(num_layers,)``. A layer that no partition fits takes its most even ones.
    """
    parts, holds = _all_partitions(loads.shape[1], num_ranks)
    heaviest = (holds @ loads.T).max(axis=1).T
    limits = np.maximum(caps, heaviest.min(axis=1)) * (1.0 + 1e-12)
    penalty = np.where(heaviest <= limits[:, None], 0.0, np.inf)
    path = _best_path(_kept_between(transitions, holds), penalty)
    return _name_ranks(path, parts, holds, transitions)


def best_priced_partitions(
    transitions: NDArray[np.float64],
    loads: NDArray[np.float64],
    num_ranks: int,
    mean_imbalance: float,
) -> NDArray[np.int64]:
    """Return the ranks that keep most transitions while imbalance, averaged over layers, stays below a limit.

    Imbalance gets a price, the same in all layers, which bisection raises until the limit holds: at that price the
    chain is optimal (Lagrangian relaxation).

    Parameters
    ----------
    transitions, loads, num_ranks : NDArray[np.float64], NDArray[np.float64], int
        As for :func:`best_partitions`.
    mean_imbalance : float
        Heaviest rank over the mean, mean over layers; the most even chain where none is that even.
    """
    parts, holds = _all_partitions(loads.shape[1], num_ranks)
    heaviest = (holds @ loads.T).max(axis=1).T * num_ranks / loads.sum(axis=1, keepdims=True)
    kept = _kept_between(transitions, holds)
    rows = np.arange(len(loads))
    best = heaviest.argmin(axis=1)
    low, high = np.log(1e-8 * transitions.sum()), np.log(10.0 * transitions.sum())
    for step in range(_PRICE_STEPS):
        middle = low if step == 0 else 0.5 * (low + high)
        path = _best_path(kept, np.exp(middle) * heaviest)
        if heaviest[rows, path].mean() <= mean_imbalance * (1.0 + 1e-12):
            best, high = path, middle
        else:
            low = middle
    return _name_ranks(best, parts, holds, transitions)


def _kept_between(transitions: NDArray[np.float64], holds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what every pair of partitions of neighbouring layers keeps, ``(L - 1, partitions, partitions)``."""
    from scipy.optimize import linear_sum_assignment

    num_parts, num_ranks = holds.shape[:2]
    result = np.full((len(transitions), num_parts, num_parts), -np.inf)
    for pair, weights in enumerate(transitions):
        between = np.einsum("pre,ef,qsf->pqrs", holds, weights, holds, optimize=True)
        if num_parts == 1:
            rows, columns = linear_sum_assignment(between[0, 0], maximize=True)
            result[pair] = between[0, 0][rows, columns].sum()
            continue
        for order in itertools.permutations(range(num_ranks)):
            np.maximum(result[pair], between[:, :, np.arange(num_ranks), order].sum(axis=2), out=result[pair])
    return result


def _best_path(kept: NDArray[np.float64], penalty: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the partition of each layer that maximises what is kept less the penalties, ``(L,)``."""
    num_layers, num_parts = penalty.shape
    choice = np.zeros((num_layers, num_parts), dtype=np.int64)
    value = -penalty[0]
    for layer in range(1, num_layers):
        total = value[:, None] + kept[layer - 1]
        choice[layer] = total.argmax(axis=0)
        value = total.max(axis=0) - penalty[layer]
    path = np.empty(num_layers, dtype=np.int64)
    path[-1] = value.argmax()
    for layer in range(num_layers - 1, 0, -1):
        path[layer - 1] = choice[layer, path[layer]]
    return path


def _name_ranks(
    path: NDArray[np.int64],
    parts: NDArray[np.int64],
    holds: NDArray[np.float64],
    transitions: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Return the rank of each expert of each layer, parts named after those of the layer before."""
    from scipy.optimize import linear_sum_assignment

    num_ranks, num_experts = holds.shape[1:]
    ranks = np.empty((len(path), num_experts), dtype=np.int64)
    names = np.arange(num_ranks)
    for layer, index in enumerate(path):
        if layer:
            between = holds[path[layer - 1]] @ transitions[layer - 1] @ holds[index].T
            rows, columns = linear_sum_assignment(between, maximize=True)
            mine = np.empty(num_ranks, dtype=np.int64)
            mine[columns] = names[rows]
            names = mine
        ranks[layer, parts[index].ravel()] = np.repeat(names, num_experts // num_ranks)
    return ranks


def lightest_partitions(loads: NDArray[np.float64], num_ranks: int) -> NDArray[np.float64]:
    """Return the least load the heaviest rank of each layer can have without copies, ``(num_layers,)``; exact."""
    _, holds = _all_partitions(loads.shape[1], num_ranks)
    result: NDArray[np.float64] = (holds @ loads.T).max(axis=1).min(axis=0)
    return result


def _all_partitions(num_experts: int, num_ranks: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the experts of each part of each partition, and which experts each part holds as zeros and ones."""
    parts = np.asarray(_partitions(tuple(range(num_experts)), num_experts // num_ranks), dtype=np.int64)
    holds = np.zeros((len(parts), num_ranks, num_experts))
    np.put_along_axis(holds, parts, 1.0, axis=2)
    return parts, holds


def _partitions(experts: tuple[int, ...], room: int) -> list[tuple[tuple[int, ...], ...]]:
    """Return every way to cut the experts into unnamed sets of ``room``."""
    if not experts:
        return [()]
    first, rest = experts[0], experts[1:]
    return [
        ((first, *others), *tail)
        for others in itertools.combinations(rest, room - 1)
        for tail in _partitions(tuple(each for each in rest if each not in others), room)
    ]
