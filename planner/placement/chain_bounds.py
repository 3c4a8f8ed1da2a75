"""Transition weight that no placement can keep on ranks: per pair of layers, two relaxations.

Experts of two layers that share a rank form a bipartite graph in which every expert has as many partners as a rank
has slots. The heaviest such graph (a b-matching) bounds the pair from above; so does the sum of the largest
singular values of the centred transitions; a split of the transitions between both bounds it better than either.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["chain_bound", "combined_bound", "matching_bound", "spectral_bound"]

_MAX_ROUNDS = 400
_CHECK_EVERY = 10
_PRECISION = 2e-5
# Pairs closer to their bound than this are left alone.
_CLOSED = 0.002
# Steps of the combined bound: share of the gap aimed at first, stalls before it is halved, weight of the past.
_FIRST_STEP, _PATIENCE, _MEMORY = 0.15, 4, 0.8


def chain_bound(
    transitions: NDArray[np.float64],
    num_ranks: int,
    kept: NDArray[np.float64] | None = None,
    num_rounds: int = 20,
) -> float:
    """Return an upper bound of the transition weight that stays on ranks, summed over the pairs of layers.

    Parameters
    ----------
    transitions : NDArray[np.float64]
        ``(num_layers - 1, num_experts, num_experts)``.
    num_ranks : int
        Ranks; divides the experts.
    kept : NDArray[np.float64] | None
        What a placement keeps of each pair: steers the steps of the combined bound, which is left out without it.
    num_rounds : int
        Steps of the combined bound per pair of layers.
    """
    total = 0.0
    for pair, weights in enumerate(transitions):
        bound = min(matching_bound(weights, num_ranks), spectral_bound(weights, num_ranks))
        is_open = kept is not None and kept[pair] < bound * (1.0 - _CLOSED)
        if kept is not None and is_open and 1 < num_ranks < len(weights):
            bound = min(bound, combined_bound(weights, num_ranks, float(kept[pair]), num_rounds))
        total += bound
    return total


def matching_bound(weights: NDArray[np.float64], num_ranks: int) -> float:
    """Return an upper bound of the heaviest graph with ``E / num_ranks`` partners for every expert of either side.

    With one partner it is a linear assignment, solved exactly. Otherwise the dual, ``S sum(u) + S sum(v) +
    sum(max(0, w - u - v))``, is lowered by exact steps in ``u`` and in ``v`` and by subgradient steps between them;
    any ``u`` and ``v`` give a valid bound, so that stopping early costs tightness only.
    """
    num_experts = len(weights)
    room = num_experts // num_ranks
    if room == num_experts:
        return float(weights.sum())
    if room == 1:
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(weights, maximize=True)
        return float(weights[rows, columns].sum())
    return _descend(weights, room)[0]


def _descend(
    weights: NDArray[np.float64], room: int
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Return the b-matching bound and the prices of rows and columns it ends with."""
    row = np.zeros(len(weights))
    column = np.zeros(len(weights))
    best = np.inf
    last = np.inf
    for step in range(_MAX_ROUNDS):
        row = _level(weights - column, room)
        column = _level((weights - row[:, None]).T, room)
        if step % _CHECK_EVERY == 0 or step == _MAX_ROUNDS - 1:
            excess = np.maximum(weights - row[:, None] - column, 0.0)
            value = float(room * (row.sum() + column.sum()) + excess.sum())
            best = min(best, value)
            if value > last * (1.0 - _PRECISION):
                break
            last = value
    return best, row, column


def combined_bound(weights: NDArray[np.float64], num_ranks: int, kept: float, num_rounds: int) -> float:
    """Return a bound at most that of :func:`matching_bound`: part of the weights is bounded by their spectrum.

    Experts together on ranks are a matrix y of blocks: entries 0 or 1, rows and columns that sum to S, and ``G - 1``
    singular values S beside the first. For any split of the centred weights into B and C,
    ``S (sum(u) + sum(v)) + sum(max(0, B - u - v)) + S (s_1(C) + ... + s_(G-1)(C))`` is a bound. Subgradient steps
    with memory towards a target between the best bound and ``kept`` lower it; every iterate is valid.
    """
    num_experts = len(weights)
    room = num_experts // num_ranks
    best, row, column = _descend(weights, room)
    part = np.zeros_like(weights)
    steps = [np.zeros_like(weights), np.zeros(num_experts), np.zeros(num_experts)]
    delta = _FIRST_STEP * max(best - kept, 0.0)
    stalled = 0
    for index in range(num_rounds):
        spectrum, direction = _leading(part, num_ranks - 1) if index else (0.0, part)
        excess = weights - part - row[:, None] - column
        is_over = excess > 0.0
        value = float(room * (row.sum() + column.sum() + spectrum) + excess[is_over].sum())
        stalled = 0 if value < best - 0.1 * delta else stalled + 1
        if stalled >= _PATIENCE:
            delta, stalled = 0.5 * delta, 0
        best = min(best, value)
        slopes = (
            _centred(room * direction - is_over),
            room - is_over.sum(axis=1),
            room - is_over.sum(axis=0),
        )
        steps = [slope + _MEMORY * step for slope, step in zip(slopes, steps, strict=True)]
        length = sum(float((step * step).sum()) for step in steps)
        if length == 0.0 or delta == 0.0:
            break
        scale = (value - best + delta) / length
        part = part - scale * steps[0]
        row = row - scale * steps[1]
        column = column - scale * steps[2]
    return best


def _leading(matrix: NDArray[np.float64], count: int) -> tuple[float, NDArray[np.float64]]:
    """Return the sum of the largest singular values, and the product of their vectors (its subgradient)."""
    squares, vectors = np.linalg.eigh(matrix.T @ matrix)
    singular = np.sqrt(np.maximum(squares[::-1][:count], 0.0))
    right = vectors[:, ::-1][:, :count]
    left = (matrix @ right) / np.maximum(singular, 1e-12)
    # Rounding may only raise the bound.
    return float(singular.sum()) * (1.0 + 1e-12), left @ right.T


def _centred(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = (
        matrix - matrix.mean(axis=0) - matrix.mean(axis=1, keepdims=True) + matrix.mean()
    )
    return result


def _level(weights: NDArray[np.float64], room: int) -> NDArray[np.float64]:
    """Return, per row, the middle between the ``room``-th and the next largest entry: every minimiser's middle."""
    top = np.partition(weights, (weights.shape[1] - room - 1, weights.shape[1] - room), axis=1)
    result: NDArray[np.float64] = 0.5 * (
        top[:, weights.shape[1] - room - 1] + top[:, weights.shape[1] - room]
    )
    return result


def spectral_bound(weights: NDArray[np.float64], num_ranks: int) -> float:
    """Return ``1'W1 / G + S (s_1 + ... + s_(G-1))`` with the singular values of the doubly centred weights."""
    num_experts = len(weights)
    singular = np.linalg.svd(_centred(weights), compute_uv=False)
    return float(weights.sum() / num_ranks + num_experts // num_ranks * singular[: num_ranks - 1].sum())
