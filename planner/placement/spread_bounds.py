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
    With copies: a node holds at most ``num_slots / num_nodes`` experts, so that at most the load of as many of the
    most popular is served at home; a remote node serves at most k pairs of a token.
    """
    num_tokens, top_k = tokens.shape
    if num_slots == num_experts and num_experts % num_nodes == 0:
        together = co_activation(tokens, num_experts)
        centred = together - together.mean(axis=0) - together.mean(axis=1, keepdims=True) + together.mean()
        spectrum = np.sort(np.linalg.eigvalsh(centred))[::-1][: num_nodes - 1]
        room = num_experts // num_nodes
        pairs = 0.5 * (together.sum() / num_nodes + room * np.maximum(spectrum, 0.0).sum())
        # Nor can an expert be together with more than the room - 1 others it is chosen with most often.
        best = np.sort(together, axis=1)[:, num_experts - room + 1 :].sum() * 0.5
        mean_pairs = min(pairs, best) / num_tokens
        nodes = max(1.0, top_k * top_k / (top_k + 2.0 * mean_pairs))
        return float(nodes * (1.0 - 1.0 / num_nodes))
    loads = np.bincount(tokens.ravel(), minlength=num_experts).astype(np.float64)
    home = np.sort(loads)[::-1][: num_slots // num_nodes].sum() / loads.sum()
    return float(max(0.0, 1.0 - home))
