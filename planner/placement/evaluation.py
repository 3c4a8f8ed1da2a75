"""How good a placement is on given tokens: load, traffic between nodes and ranks, active experts, experts to move.

Nothing here knows how a placement was found; the tokens should be ones it was not solved with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.placement.routing import RoutingData, token_loads, token_transitions
from meshwright.planner.placement.traffic_kernels import count_places
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = [
    "Measures",
    "ReplicaChoice",
    "chain_locality",
    "fresh_imbalance",
    "imbalance",
    "layer_chain_weights",
    "measure",
    "moved_slots",
    "rank_loads",
    "remote_nodes",
]

ReplicaChoice = Literal["nearest", "random"]
"""Which copy of an expert a token takes: one on its own node where there is one, or any."""

_MAX_ACTIVE_BATCH = 512
_BOOTSTRAP_DRAWS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """A placement on some routing data; means over layers unless said otherwise.

    Parameters
    ----------
    imbalance, worst_imbalance : float
        Heaviest rank over the mean: mean over layers, and of the worst layer.
    node_imbalance : float
        The same of nodes.
    window_imbalance : float | None
        Heaviest rank over the mean inside single windows of time; None without windows.
    locality : float | None
        Share of a token's expert pairs in neighbouring layers that share a rank; None without transitions.
    nodes_per_token : float | None
        Distinct nodes that hold the experts of a token (lambda); None without a trace.
    remote_nodes_per_token : float | None
        Those of them that are not the token's own, its own being any with equal probability.
    active_experts : float | None
        Distinct experts with a token on the busiest rank, for batches of ``active_batch`` tokens.
    active_batch : int
        Tokens of such a batch.
    """

    imbalance: float
    worst_imbalance: float
    node_imbalance: float
    window_imbalance: float | None = None
    locality: float | None = None
    nodes_per_token: float | None = None
    remote_nodes_per_token: float | None = None
    active_experts: float | None = None
    active_batch: int = 0


def measure(
    placement: ExpertPlacement,
    routing: RoutingData,
    *,
    choice: ReplicaChoice = "nearest",
    active_batch: int = 128,
    with_chain: bool = True,
    seed: int = 0,
) -> Measures:
    """Return the measures of a placement on routing data.

    Parameters
    ----------
    placement : ExpertPlacement
        The placement.
    routing : RoutingData
        Tokens, or only loads or transitions: what cannot be computed from them is None.
    choice : ReplicaChoice
        How the engine chooses among copies.
    active_batch : int
        Tokens of a decode batch over all ranks.
    with_chain : bool
        Compute locality, which takes longest and means nothing where tokens return after every layer.
    seed : int
        Of the random choices among copies.
    """
    loads = rank_loads(placement, routing.loads, choice)
    nodes = loads.reshape(len(loads), -1, placement.ranks_per_node).sum(axis=2)
    layers = imbalance(loads)
    result = {
        "imbalance": float(layers.mean()),
        "worst_imbalance": float(layers.max()),
        "node_imbalance": float(imbalance(nodes).mean()),
        "active_batch": active_batch,
        "window_imbalance": None,
        "locality": None,
        "nodes_per_token": None,
        "remote_nodes_per_token": None,
        "active_experts": None,
    }
    if routing.windows is not None:
        busy = [window for window in routing.windows if (window.sum(axis=1) > 0.0).all()]
        values = [float(imbalance(rank_loads(placement, window, choice)).mean()) for window in busy]
        result["window_imbalance"] = float(np.mean(values)) if values else None
    transitions = routing.transitions
    if with_chain and transitions is None and routing.tokens is not None and routing.num_layers > 1:
        transitions = token_transitions(routing.tokens, routing.num_experts)
    if with_chain and transitions is not None:
        result["locality"] = chain_locality(placement, transitions)
    if routing.tokens is not None:
        together, remote = remote_nodes(placement, routing.tokens, choice, seed)
        result["nodes_per_token"] = float(together.mean())
        result["remote_nodes_per_token"] = float(remote.mean())
        result["active_experts"] = _active_experts(placement, routing.tokens, active_batch)
    return Measures(**result)  # type: ignore[arg-type]


def fresh_imbalance(
    placement: ExpertPlacement, routing: RoutingData, choice: ReplicaChoice = "random", seed: int = 0
) -> float:
    """Return the imbalance to expect on as many fresh tokens as the placement was solved with, mean over layers.

    A trace and the tokens to come both differ from their source by chance. Half as many tokens, drawn from the trace
    with repetition, differ from it as the two differ from one another (bootstrap). Without tokens, what the loads say.
    """
    if routing.tokens is None:
        return float(imbalance(rank_loads(placement, routing.loads, choice)).mean())
    generator = np.random.default_rng(seed)
    num_tokens = routing.num_tokens
    values = []
    for _ in range(_BOOTSTRAP_DRAWS):
        drawn = generator.integers(num_tokens, size=max(1, num_tokens // 2))
        loads = token_loads(routing.tokens[:, drawn], routing.num_experts)
        values.append(float(imbalance(rank_loads(placement, loads, choice)).mean()))
    return float(np.mean(values))


def rank_loads(
    placement: ExpertPlacement, loads: NDArray[np.float64], choice: ReplicaChoice = "random"
) -> NDArray[np.float64]:
    """Return the pairs each rank serves, ``(num_layers, num_ranks)``.

    Random choice shares an expert's load evenly over its copies. With the nearest copy, each node sends its equal
    part of the tokens to its own copies where it has some, else evenly to all.
    """
    num_layers, num_ranks = placement.num_layers, placement.num_ranks
    num_nodes = num_ranks // placement.ranks_per_node
    result = np.zeros((num_layers, num_ranks))
    rank_of_slot = placement.rank_of_slot
    for layer in range(num_layers):
        slots = placement.slots[layer]
        counts = np.bincount(slots, minlength=placement.num_experts).astype(np.float64)
        if choice == "random" or num_nodes == 1:
            share = (loads[layer] / counts)[slots]
        else:
            node_of_slot = rank_of_slot // placement.ranks_per_node
            on_node = np.zeros((placement.num_experts, num_nodes))
            np.add.at(on_node, (slots, node_of_slot), 1.0)
            has = (on_node > 0.0).sum(axis=1)
            elsewhere = (num_nodes - has) / num_nodes * loads[layer] / counts
            share = loads[layer][slots] / num_nodes / on_node[slots, node_of_slot] + elsewhere[slots]
        result[layer] = np.bincount(rank_of_slot, weights=share, minlength=num_ranks)
    return result


def imbalance(loads: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return heaviest over mean of each row."""
    result: NDArray[np.float64] = loads.max(axis=-1) / loads.mean(axis=-1)
    return result


def chain_locality(placement: ExpertPlacement, transitions: NDArray[np.float64]) -> float:
    """Return the share of transitions that stay on a rank, copies being chosen independently and evenly."""
    kept = layer_chain_weights(placement, transitions)
    return float(kept.sum() / transitions.sum())


def layer_chain_weights(placement: ExpertPlacement, transitions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the transition weight that stays on a rank, ``(num_layers - 1,)``."""
    shares = [_rank_shares(placement, layer) for layer in range(placement.num_layers)]
    kept = [
        float(((left.T @ between) * right.T).sum())
        for left, between, right in zip(shares, transitions, shares[1:], strict=False)
    ]
    return np.asarray(kept)


def _rank_shares(placement: ExpertPlacement, layer: int) -> NDArray[np.float64]:
    """Return the share of each expert's tokens that each rank serves, ``(num_experts, num_ranks)``."""
    shares = np.zeros((placement.num_experts, placement.num_ranks))
    np.add.at(shares, (placement.slots[layer], placement.rank_of_slot), 1.0)
    result: NDArray[np.float64] = shares / shares.sum(axis=1, keepdims=True)
    return result


def remote_nodes(
    placement: ExpertPlacement,
    tokens: NDArray[np.int16],
    choice: ReplicaChoice = "nearest",
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return distinct nodes per token, and those that are not its own, mean over tokens, ``(num_layers,)`` each.

    Every node is a token's own with equal probability. With the nearest copy an expert without one at home is
    fetched from a copy that each home node has fixed at random (SGLang's static dispatch); with random choice
    every token draws one.
    """
    num_nodes = placement.num_ranks // placement.ranks_per_node
    node_of_slot = placement.rank_of_slot // placement.ranks_per_node
    generator = np.random.default_rng(seed)
    together = np.empty(placement.num_layers)
    remote = np.empty(placement.num_layers)
    for layer in range(placement.num_layers):
        copies, counts = _copy_nodes(placement.slots[layer], node_of_slot, placement.num_experts)
        fixed = generator.integers(0, 1 << 30, size=(num_nodes, placement.num_experts)) % counts
        target = copies[np.arange(placement.num_experts), fixed]
        if choice == "nearest":
            home = np.arange(num_nodes)[:, None]
            has_home = np.zeros((placement.num_experts, num_nodes), dtype=bool)
            has_home[placement.slots[layer], node_of_slot] = True
            target = np.where(has_home.T, home, target)
            draws = np.zeros((0, 0), dtype=np.int64)
        else:
            draws = generator.integers(0, 1 << 30, size=tokens.shape[1:])
        together[layer], remote[layer] = count_places(
            np.ascontiguousarray(tokens[layer]).astype(np.int64),
            np.ascontiguousarray(target),
            copies,
            counts,
            draws,
        )
    return together, remote


def _copy_nodes(
    slots: NDArray[np.int64], node_of_slot: NDArray[np.int64], num_experts: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the node of each copy of each expert, ``(num_experts, most copies)``, and the copies."""
    counts = np.bincount(slots, minlength=num_experts)
    order = np.argsort(slots, kind="stable")
    starts = np.cumsum(counts) - counts
    copies = np.full((num_experts, int(counts.max())), -1, dtype=np.int64)
    copies[slots[order], np.arange(len(slots)) - starts[slots[order]]] = node_of_slot[order]
    return copies, counts


def _active_experts(placement: ExpertPlacement, tokens: NDArray[np.int16], batch: int) -> float:
    """Return the distinct experts with a token on the busiest rank, mean over batches and layers.

    A batch that reaches an expert is taken to reach each of its copies where it has as many tokens for it.
    """
    num_tokens = tokens.shape[1]
    batch = min(batch, num_tokens)
    num_batches = min(num_tokens // batch, _MAX_ACTIVE_BATCH)
    busiest = []
    for layer in range(placement.num_layers):
        slots = placement.slots[layer]
        rank_counts = np.bincount(slots, minlength=placement.num_experts)
        # The n-th copy of an expert is active from n tokens on.
        order = np.argsort(slots, kind="stable")
        place = np.empty(len(slots), dtype=np.int64)
        place[order] = np.arange(len(slots)) - (np.cumsum(rank_counts) - rank_counts)[slots[order]]
        chosen = tokens[layer, : num_batches * batch].reshape(num_batches, -1).astype(np.int64)
        chosen += np.arange(num_batches)[:, None] * placement.num_experts
        hits = np.bincount(chosen.ravel(), minlength=num_batches * placement.num_experts)
        hits = hits.reshape(num_batches, placement.num_experts)
        is_active = hits[:, slots] > place
        busiest.append(is_active.reshape(num_batches, placement.num_ranks, -1).sum(axis=2).max(axis=1).mean())
    return float(np.mean(busiest))


def moved_slots(before: ExpertPlacement, after: ExpertPlacement) -> int:
    """Return how many slots must be filled with an expert that their rank does not hold yet, over all layers."""
    moved = 0
    for layer in range(after.num_layers):
        old, new = (np.zeros((each.num_ranks, each.num_experts), dtype=np.int64) for each in (before, after))
        np.add.at(old, (before.rank_of_slot, before.slots[layer]), 1)
        np.add.at(new, (after.rank_of_slot, after.slots[layer]), 1)
        moved += int(np.maximum(new - np.minimum(old, 1) * new, 0).sum())
    return moved
