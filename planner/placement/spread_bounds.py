"""Remote nodes per token that no placement goes below."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["co_activation", "remote_bound"]


def co_activation(tokens: NDArray[np.int16], num_experts: int) -> NDArray[np.float64]:
    """Return how many tokens chose both of each two experts, ``(num_experts, num_experts)``, diagonal 0."""
    result = np.zeros(num_experts * num_experts)
    wide = tokens.astype(np.int64)
    top_k = wide.shape[1]
    for slot in range(top_k - 1):
        pairs = wide[:, slot, None] * num_experts + wide[:, slot + 1 :]
        result += np.bincount(pairs.ravel(), minlength=num_experts * num_experts)
    square = result.reshape(num_experts, num_experts)
    square = square + square.T
    np.fill_diagonal(square, 0.0)
    return square


def remote_bound(tokens: NDArray[np.int16], num_experts: int, num_slots: int, num_nodes: int) -> float:
    """Return a lower bound of the mean remote nodes of a token, its own node being any with equal probability.

    Notes
    -----
    Without copies: a token whose k experts sit c_n to a node meets at least ``k^2 / sum(c_n^2)`` nodes (Cauchy), where
    ``sum(c_n^2) = k + 2 p`` with p its co-located pairs; the mean over tokens is at least ``k^2 / (k + 2 mean(p))``
    (Jensen), and the pairs that ``E / N`` experts per node can co-locate are bounded by the spectrum of the
    co-activation counts. ``1 / N`` of those nodes are a token's own.
    With copies the same holds, the pairs being those that any choice of copies can serve together: an expert with r
    copies meets at most ``r (num_slots / num_nodes - 1)`` others, so the extra copies go where their next most
    frequent others are worth most. A token meets its own node only where that holds one of its experts.
    Besides, a remote node is met unless the own one holds all k: its ``num_slots / num_nodes`` experts serve at
    most the load of as many of the most popular, and at most the pairs they can hold together.
    """
    num_tokens, top_k = tokens.shape
    together = co_activation(tokens, num_experts)
    if num_slots == num_experts and num_experts % num_nodes == 0:
        centred = together - together.mean(axis=0) - together.mean(axis=1, keepdims=True) + together.mean()
        spectrum = np.sort(np.linalg.eigvalsh(centred))[::-1][: num_nodes - 1]
        room = num_experts // num_nodes
        pairs = 0.5 * (together.sum() / num_nodes + room * np.maximum(spectrum, 0.0).sum())
        # Nor can an expert be together with more than the room - 1 others it is chosen with most often.
        best = np.sort(together, axis=1)[:, num_experts - room + 1 :].sum() * 0.5
        nodes = _least_nodes(top_k, min(pairs, best) / num_tokens)
        return float(nodes * (1.0 - 1.0 / num_nodes))
    loads = np.bincount(tokens.ravel(), minlength=num_experts).astype(np.float64)
    room, extra = -(-num_slots // num_nodes), num_slots - num_experts
    most_often = np.sort(together, axis=1)[:, ::-1]
    nodes = _least_nodes(top_k, _pairs_with_copies(most_often, room, extra, num_nodes) / num_tokens)
    # Each copy of an expert is on the own node of one in num_nodes of its tokens.
    hottest = np.repeat(np.sort(loads)[::-1], num_nodes - 1)[:extra].sum()
    own = min(1.0, (loads.sum() + hottest) / (num_nodes * num_tokens))
    served_at_home = np.sort(loads)[::-1][:room].sum() / (num_tokens * top_k)
    if top_k > 1:
        inside = 0.5 * np.sort(most_often[:, : room - 1].sum(axis=1))[::-1][:room].sum()
        served_at_home = min(served_at_home, inside / (num_tokens * 0.5 * top_k * (top_k - 1)))
    return float(max(0.0, 1.0 - served_at_home, nodes - own))


def _least_nodes(top_k: int, mean_pairs: float) -> float:
    """Return the mean nodes of a token at least, of whose pairs of experts so many sit together."""
    return max(1.0, top_k * top_k / (top_k + 2.0 * mean_pairs))


def _pairs_with_copies(most_often: NDArray[np.float64], room: int, extra: int, num_nodes: int) -> float:
    """Return the co-located pairs at most, of counts with the others in descending order, ``(E, E)``.

    What each further copy of an expert adds never grows, so that taking the best ones first is optimal.
    """
    size = room - 1
    ends = np.minimum(np.arange(num_nodes + 1) * size, most_often.shape[1])
    sums = np.pad(np.cumsum(most_often, axis=1), ((0, 0), (1, 0)))[:, ends]
    gains = np.diff(sums, axis=1)
    further = np.sort(gains[:, 1:].ravel())[::-1][:extra]
    return float(0.5 * (gains[:, 0].sum() + further.sum()))
