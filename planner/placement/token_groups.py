"""Tokens grouped by the experts they are expected to need, so that these are near (Speculative-MoE, arXiv 2503.04398).

An engine whose attention is split over ranks may hand each token to any of them afterwards: its shuffled
reduce-scatter costs what the plain one does. Sent where its next experts are expected, a token needs fewer transfers.
What a token needs is foretold from the experts it had in the layer before, by tables learnt from other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.placement.evaluation import ReplicaChoice, imbalance
from meshwright.simcore.domain.expert_placement import ExpertPlacement

__all__ = ["SpeculativeGrouping", "TokenGroups", "speculative_grouping"]

# Of homes that leave as many nodes to reach, the one with most pairs is better inside the node.
_TIE = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenGroups:
    """What tokens reach from the homes they were given, mean over tokens, ``(num_layers,)`` each.

    Parameters
    ----------
    nodes, remote_nodes : NDArray[np.float64]
        Distinct homes that hold a token's experts, and those that are not its own.
    local_pairs : NDArray[np.float64]
        Share of the (token, expert) pairs at home.
    imbalance : NDArray[np.float64]
        Heaviest rank over the mean, tokens taking the copy at home.
    """

    nodes: NDArray[np.float64]
    remote_nodes: NDArray[np.float64]
    local_pairs: NDArray[np.float64]
    imbalance: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpeculativeGrouping:
    """Tokens grouped, beside what chance and what foreknowledge would give.

    Parameters
    ----------
    num_homes : int
        Groups of tokens: nodes, or ranks where all share one node.
    is_of_nodes : bool
        Which of both.
    by_chance, grouped, foreknown : TokenGroups
        Homes at random; homes foretold from the layer before; homes chosen knowing the experts, which no engine can.
    """

    num_homes: int
    is_of_nodes: bool
    by_chance: TokenGroups
    grouped: TokenGroups
    foreknown: TokenGroups


def speculative_grouping(
    placement: ExpertPlacement,
    learn_from: NDArray[np.int16],
    judge: NDArray[np.int16],
    *,
    batch: int = 4096,
    is_deduplicated: bool = True,
    choice: ReplicaChoice = "nearest",
    seed: int = 0,
) -> SpeculativeGrouping:
    """Return what grouping comes to on tokens the tables were not learnt from.

    Parameters
    ----------
    placement : ExpertPlacement
        Experts of every layer.
    learn_from, judge : NDArray[np.int16]
        Experts of each token, ``(num_layers, num_tokens, top_k)``: of those the tables are made from, and of those that
        are grouped.
    batch : int
        Tokens that are shared out together, as many to every home.
    is_deduplicated : bool
        A token travels once to each node: homes that leave few others to reach are best; else homes with most pairs.
    choice : ReplicaChoice
        Whether tokens take the copy at home; ``random`` spreads them over all.
    seed : int
        Of the copy that a home without one uses.

    Notes
    -----
    A table holds, for each expert of the layer before, the mean cost of every home over tokens that came from it; a
    token's costs are the means over its experts. The first layer has none before: its tokens stay where chance put them.
    """
    is_of_nodes = placement.num_ranks > placement.ranks_per_node
    home_of_slot = placement.rank_of_slot // (placement.ranks_per_node if is_of_nodes else 1)
    num_homes = int(home_of_slot[-1]) + 1
    generator = np.random.default_rng(seed)
    rows: dict[str, list[tuple[float, float, float, float]]] = {"chance": [], "grouped": [], "foreknown": []}
    for layer in range(placement.num_layers):
        serves = _serving_homes(placement, layer, home_of_slot, num_homes, generator)
        seen = _Reach.of(serves, judge[layer], num_homes)
        known = _share_out(seen.costs(is_deduplicated=is_deduplicated), batch)
        homes = np.arange(len(known)) % num_homes
        foretold = homes
        if layer:
            learnt = _Reach.of(serves, learn_from[layer], num_homes)
            table = _mean_costs(
                learn_from[layer - 1], learnt.costs(is_deduplicated=is_deduplicated), placement.num_experts
            )
            foretold = _share_out(table[judge[layer - 1]].mean(axis=1), batch)
        for name, given in (("chance", homes), ("grouped", foretold), ("foreknown", known)):
            load = _rank_imbalance(placement, layer, judge[layer], given, home_of_slot, choice)
            at = (np.arange(len(given)), given)
            rows[name].append(
                (
                    float(seen.nodes[at].mean()),
                    float(seen.remote[at].mean()),
                    float(seen.local[at].mean()),
                    load,
                )
            )
    chance, grouped, foreknown = (_groups(rows[name]) for name in ("chance", "grouped", "foreknown"))
    return SpeculativeGrouping(
        num_homes=num_homes, is_of_nodes=is_of_nodes, by_chance=chance, grouped=grouped, foreknown=foreknown
    )


def _groups(rows: list[tuple[float, float, float, float]]) -> TokenGroups:
    nodes, remote, local, load = np.asarray(rows).T
    return TokenGroups(nodes=nodes, remote_nodes=remote, local_pairs=local, imbalance=load)


@dataclass(frozen=True, slots=True, eq=False)
class _Reach:
    """What each token reaches from each home, ``(num_tokens, num_homes)`` each."""

    nodes: NDArray[np.float64]
    remote: NDArray[np.float64]
    local: NDArray[np.float64]

    @classmethod
    def of(cls, serves: NDArray[np.int64], tokens: NDArray[np.int16], num_homes: int) -> _Reach:
        nodes, remote, local = (np.empty((len(tokens), num_homes)) for _ in range(3))
        wide = tokens.astype(np.int64)
        for home in range(num_homes):
            reached = np.sort(serves[home][wide], axis=1)
            nodes[:, home] = 1.0 + (np.diff(reached, axis=1) != 0).sum(axis=1)
            here = reached == home
            remote[:, home] = nodes[:, home] - here.any(axis=1)
            local[:, home] = here.mean(axis=1)
        return cls(nodes, remote, local)

    def costs(self, *, is_deduplicated: bool) -> NDArray[np.float64]:
        """Return what a home costs: pairs elsewhere, after other nodes to reach where each is reached once."""
        return self.remote - _TIE * self.local if is_deduplicated else -self.local


def _serving_homes(
    placement: ExpertPlacement,
    layer: int,
    home_of_slot: NDArray[np.int64],
    num_homes: int,
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    """Return the home that serves each expert to tokens of each home: its own, else a fixed copy drawn."""
    slots, num_experts = placement.slots[layer], placement.num_experts
    order = generator.permutation(len(slots))
    serves = np.empty((num_homes, num_experts), dtype=np.int64)
    for home in range(num_homes):
        # Later entries win: a permutation of its own draws a copy for every home.
        turned = np.roll(order, home * len(slots) // num_homes)
        serves[home, slots[turned]] = home_of_slot[turned]
        own = slots[home_of_slot == home]
        serves[home, own] = home
    return serves


def _mean_costs(
    before: NDArray[np.int16], costs: NDArray[np.float64], num_experts: int
) -> NDArray[np.float64]:
    """Return the mean cost of every home over the tokens that had an expert, ``(num_experts, num_homes)``."""
    table = np.empty((num_experts, costs.shape[1]))
    flat = before.astype(np.int64).ravel()
    counts = np.bincount(flat, minlength=num_experts)
    for home in range(costs.shape[1]):
        weights = np.repeat(costs[:, home], before.shape[1])
        sums = np.bincount(flat, weights=weights, minlength=num_experts)
        table[:, home] = np.where(counts > 0, sums / np.maximum(counts, 1), costs[:, home].mean())
    return table


def _share_out(costs: NDArray[np.float64], batch: int) -> NDArray[np.int64]:
    """Return a home of low cost for each token, every home taking as many tokens of a batch.

    In rounds, tokens ask for their cheapest open home, and a home keeps those that lose most elsewhere.
    """
    num_tokens, num_homes = costs.shape
    homes = np.empty(num_tokens, dtype=np.int64)
    for start in range(0, num_tokens, batch):
        part = costs[start : start + batch]
        homes[start : start + batch] = _share_batch(part, -(-len(part) // num_homes))
    return homes


def _share_batch(costs: NDArray[np.float64], room: int) -> NDArray[np.int64]:
    homes = np.full(len(costs), -1, dtype=np.int64)
    left = np.full(costs.shape[1], room)
    while (waiting := np.flatnonzero(homes < 0)).size:
        is_open = np.flatnonzero(left > 0)
        asked = costs[np.ix_(waiting, is_open)]
        first = asked.argmin(axis=1)
        ordered = np.partition(asked, min(1, len(is_open) - 1), axis=1)
        regret = ordered[:, min(1, len(is_open) - 1)] - ordered[:, 0]
        for index, home in enumerate(is_open):
            mine = np.flatnonzero(first == index)
            kept = mine[np.argsort(-regret[mine], kind="stable")[: left[home]]]
            homes[waiting[kept]] = home
            left[home] -= len(kept)
    return homes


def _rank_imbalance(
    placement: ExpertPlacement,
    layer: int,
    tokens: NDArray[np.int16],
    homes: NDArray[np.int64],
    home_of_slot: NDArray[np.int64],
    choice: ReplicaChoice,
) -> float:
    """Return the heaviest rank over the mean: copies at home share its tokens evenly, else all copies do."""
    slots, num_experts = placement.slots[layer], placement.num_experts
    num_homes = int(home_of_slot[-1]) + 1
    pair = homes.repeat(tokens.shape[1]) * num_experts + tokens.astype(np.int64).ravel()
    asked = np.bincount(pair, minlength=num_homes * num_experts).reshape(num_homes, num_experts).astype(float)
    copies = np.zeros((num_homes, num_experts))
    np.add.at(copies, (home_of_slot, slots), 1.0)
    total = copies.sum(axis=0)
    if choice == "random":
        share = (asked.sum(axis=0) / total)[slots]
    else:
        near = asked / np.maximum(copies, 1.0)
        far = np.where(copies > 0.0, 0.0, asked).sum(axis=0) / total
        share = near[home_of_slot, slots] + far[slots]
    loads = np.bincount(placement.rank_of_slot, weights=share, minlength=placement.num_ranks).astype(float)
    return float(imbalance(loads))
