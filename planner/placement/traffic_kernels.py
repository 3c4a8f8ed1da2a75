"""Compiled loops over tokens: on how many nodes their experts sit, and exchanges of experts that make it fewer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.compiled import compiled

__all__ = ["count_places", "gather_tokens", "lonely_counts"]


@compiled
def count_places(
    tokens: NDArray[np.int64],
    target: NDArray[np.int64],
    copies: NDArray[np.int64],
    counts: NDArray[np.int64],
    draws: NDArray[np.int64],
) -> tuple[float, float]:
    """Return the mean distinct nodes of a token, and the mean of those that are not its own.

    Parameters
    ----------
    tokens : NDArray[np.int64]
        Experts of each token, ``(num_tokens, top_k)``.
    target : NDArray[np.int64]
        Node that serves each expert to tokens of each home node, ``(num_nodes, num_experts)``.
    copies, counts : NDArray[np.int64]
        Node of each copy of each expert, and the number of copies.
    draws : NDArray[np.int64]
        A random number per token and expert when copies are drawn, else empty: ``target`` decides.
    """
    num_tokens, top_k = tokens.shape
    num_nodes = target.shape[0]
    seen = np.full(num_nodes, -1, dtype=np.int64)
    together = 0
    remote = 0
    mark = 0
    is_drawn = draws.shape[0] > 0
    for token in range(num_tokens):
        for home in range(num_nodes):
            for slot in range(top_k):
                expert = tokens[token, slot]
                if is_drawn:
                    node = copies[expert, draws[token, slot] % counts[expert]]
                else:
                    node = target[home, expert]
                if seen[node] != mark:
                    seen[node] = mark
                    together += 1
                    if node != home:
                        remote += 1
            mark += 1
    scale = float(num_tokens * num_nodes)
    return together / scale, remote / scale


@compiled
def lonely_counts(tokens: NDArray[np.int64], node_of: NDArray[np.int64], weight: NDArray[np.float64]) -> None:
    """Add to each expert's weight the tokens that reach its node for it alone; ``node_of`` is -1 where everywhere."""
    num_tokens, top_k = tokens.shape
    for token in range(num_tokens):
        for slot in range(top_k):
            node = node_of[tokens[token, slot]]
            if node < 0:
                continue
            alone = True
            for other in range(top_k):
                if other != slot and node_of[tokens[token, other]] == node:
                    alone = False
                    break
            if alone:
                weight[tokens[token, slot]] += 1.0


@compiled
def gather_tokens(
    tokens: NDArray[np.int64],
    start: NDArray[np.int64],
    tokens_of: NDArray[np.int64],
    node_of: NDArray[np.int64],
    load: NDArray[np.float64],
    node_load: NDArray[np.float64],
    cap: float,
    num_passes: int,
    order: NDArray[np.int64],
) -> int:
    """Exchange experts between nodes while tokens then reach fewer nodes and no node exceeds the cap; count exchanges.

    Parameters
    ----------
    tokens : NDArray[np.int64]
        Experts of each token, ``(num_tokens, top_k)``.
    start, tokens_of : NDArray[np.int64]
        Tokens of expert ``e`` are ``tokens_of[start[e]:start[e + 1]]``.
    node_of : NDArray[np.int64]
        Node of each expert, changed in place; -1 for one that has a copy everywhere.
    load, node_load : NDArray[np.float64]
        Of each expert, and of each node without the experts that are everywhere; the latter changes in place.
    cap : float
        Load a node may have, or keep having.
    num_passes : int
        Passes over all pairs of experts at most.
    order : NDArray[np.int64]
        Experts in the order they are tried.
    """
    num_tokens, top_k = tokens.shape
    num_nodes = len(node_load)
    held = np.zeros((num_tokens, num_nodes), dtype=np.int64)
    for token in range(num_tokens):
        for slot in range(top_k):
            node = node_of[tokens[token, slot]]
            if node >= 0:
                held[token, node] += 1
    stamp = np.full(num_tokens, -1, dtype=np.int64)
    num_experts = len(node_of)
    # Tokens saved by taking an expert from its node, and tokens added by putting it on another, alone.
    leave = np.zeros(num_experts)
    enter = np.zeros((num_experts, num_nodes))
    mark = 0
    exchanges = 0
    for _ in range(num_passes):
        before = exchanges
        for first_index in range(num_experts):
            first = order[first_index]
            if node_of[first] < 0:
                continue
            # Deltas of every expert against the present state, once per expert tried first.
            if first_index % 16 == 0:
                for expert in range(num_experts):
                    node = node_of[expert]
                    if node < 0:
                        continue
                    leave[expert] = 0.0
                    for other in range(num_nodes):
                        enter[expert, other] = 0.0
                    for place in range(start[expert], start[expert + 1]):
                        token = tokens_of[place]
                        if held[token, node] == 1:
                            leave[expert] += 1.0
                        for other in range(num_nodes):
                            if held[token, other] == 0:
                                enter[expert, other] += 1.0
            here = node_of[first]
            best = 0.5
            best_second = -1
            for second_index in range(num_experts):
                second = order[second_index]
                there = node_of[second]
                if there < 0 or there == here:
                    continue
                estimate = leave[first] - enter[first, there] + leave[second] - enter[second, here]
                # Shared tokens make the true saving differ from the sum of both, to either side.
                if estimate <= best:
                    continue
                shift = load[first] - load[second]
                if shift > 0.0 and node_load[there] + shift > cap:
                    continue
                if shift < 0.0 and node_load[here] - shift > cap:
                    continue
                saved = 0.0
                mark += 1
                for place in range(start[first], start[first + 1]):
                    token = tokens_of[place]
                    stamp[token] = mark
                    if held[token, here] == 1:
                        saved += 1.0
                    if held[token, there] == 0:
                        saved -= 1.0
                for place in range(start[second], start[second + 1]):
                    token = tokens_of[place]
                    if stamp[token] == mark:
                        # Has both: nothing changes for it; take back what the first loop counted.
                        if held[token, here] == 1:
                            saved -= 1.0
                        if held[token, there] == 0:
                            saved += 1.0
                        continue
                    if held[token, there] == 1:
                        saved += 1.0
                    if held[token, here] == 0:
                        saved -= 1.0
                if saved > best:
                    best = saved
                    best_second = second
            if best_second < 0:
                continue
            second = best_second
            there = node_of[second]
            for place in range(start[first], start[first + 1]):
                held[tokens_of[place], here] -= 1
                held[tokens_of[place], there] += 1
            for place in range(start[second], start[second + 1]):
                held[tokens_of[place], there] -= 1
                held[tokens_of[place], here] += 1
            node_load[here] += load[second] - load[first]
            node_load[there] += load[first] - load[second]
            node_of[first] = there
            node_of[second] = here
            exchanges += 1
        if exchanges == before:
            break
    return exchanges
