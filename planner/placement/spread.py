"""Experts of one token on few nodes, and the experts that keep tokens apart with a copy on every node.

With a dispatch that sends a token once to each node (DeepEP, HybridEP) the traffic between nodes is the number of
distinct nodes that hold a token's experts, its own left out. Two means lower it: experts that are chosen together
share a node, and redundant slots hold what most tokens leave their node for, on every node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.planner.placement.balance_kernels import level_ranks, pack_descending
from meshwright.planner.placement.eplb import pack_equal
from meshwright.planner.placement.traffic_kernels import gather_tokens, lonely_counts

__all__ = ["spread_layer", "spread_slots"]

_NUM_ROUNDS = 2
_FIRST_PASSES = 3
_NUM_PASSES = 10
_NUM_KICKS = 60


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """Tokens of one layer and who has which expert."""

    tokens: NDArray[np.int64]
    start: NDArray[np.int64]
    tokens_of: NDArray[np.int64]
    load: NDArray[np.float64]


def spread_slots(
    tokens: NDArray[np.int16],
    loads: NDArray[np.float64],
    num_slots: int,
    num_ranks: int,
    ranks_per_node: int,
    *,
    slack: float | NDArray[np.float64] = 0.02,
    num_groups: int = 1,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> NDArray[np.int64]:
    """Return the expert of each slot of each layer, ``(num_layers, num_slots)``; see :func:`spread_layer`.

    ``slack`` may be one number per layer; ``progress`` is told of each layer done.
    """
    slacks = np.broadcast_to(np.asarray(slack, dtype=np.float64), len(loads))
    layers = []
    for layer, (each, load) in enumerate(zip(tokens, loads, strict=True)):
        layers.append(
            spread_layer(
                each,
                load,
                num_slots,
                num_ranks,
                ranks_per_node,
                slack=float(slacks[layer]),
                num_groups=num_groups,
                seed=seed + layer,
            )
        )
        progress(layer + 1)
    return np.asarray(layers, dtype=np.int64)


def spread_layer(
    tokens: NDArray[np.int16],
    loads: NDArray[np.float64],
    num_slots: int,
    num_ranks: int,
    ranks_per_node: int,
    *,
    slack: float = 0.02,
    num_groups: int = 1,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Return the expert of each slot of one layer, ``(num_slots,)``.

    Parameters
    ----------
    tokens : NDArray[np.int16]
        Experts of each token, ``(num_tokens, top_k)``.
    loads : NDArray[np.float64]
        Load of each expert, ``(num_experts,)``.
    num_slots, num_ranks, ranks_per_node : int
        Slots divide by ranks, ranks by nodes; at least as many slots as experts.
    slack : float
        How far a node may exceed the mean load while experts are exchanged between nodes.
    num_groups : int
        Expert groups of group-limited routing: where they divide by the nodes, experts start beside their group.
    seed : int
        Of the order in which exchanges are tried.

    Notes
    -----
    With R redundant slots on N nodes, R // (N - 1) experts get a copy on every node: first those too heavy for one
    rank, then those for which most tokens leave for a node they need for nothing else. What remains of R holds
    second copies of the heaviest other experts. Tokens take the copy on their own node.
    """
    num_nodes = num_ranks // ranks_per_node
    layer = _prepare(tokens, loads)
    num_experts = len(loads)
    redundant = num_slots - num_experts
    num_everywhere = min(num_experts, redundant // (num_nodes - 1)) if num_nodes > 1 else 0
    num_fillers = redundant - num_everywhere * (num_nodes - 1)
    per_node = num_slots // num_nodes
    room = np.full(num_nodes, per_node - num_everywhere - num_fillers // num_nodes, dtype=np.int64)
    room[num_nodes - num_fillers % num_nodes :] -= 1
    generator = np.random.default_rng(seed)
    # Without copies first: who is fetched alone shows which experts are worth a copy everywhere.
    node_of = _start(loads, num_nodes, num_groups)
    _search(layer, node_of, num_nodes, slack, generator, _FIRST_PASSES)
    everywhere = np.empty(0, dtype=np.int64)
    rounds = _NUM_ROUNDS if num_everywhere else 1
    for round_index in range(rounds):
        everywhere = _worth_copies(layer, node_of, everywhere, num_everywhere, num_ranks, num_slots)
        node_of = _fill_rooms(layer, node_of, everywhere, room, slack)
        passes = _NUM_PASSES if round_index == rounds - 1 else _FIRST_PASSES
        _search(layer, node_of, num_nodes, slack, generator, passes)
    return _pack_nodes(layer, node_of, num_slots, num_nodes, ranks_per_node, seed)


def _prepare(tokens: NDArray[np.int16], loads: NDArray[np.float64]) -> _Layer:
    wide = np.ascontiguousarray(tokens).astype(np.int64)
    flat = wide.ravel()
    order = np.argsort(flat, kind="stable")
    start = np.zeros(len(loads) + 1, dtype=np.int64)
    np.cumsum(np.bincount(flat, minlength=len(loads)), out=start[1:])
    return _Layer(tokens=wide, start=start, tokens_of=order // wide.shape[1], load=loads)


def _start(loads: NDArray[np.float64], num_nodes: int, num_groups: int) -> NDArray[np.int64]:
    """Return a node for each expert: groups together where there are any, else the heaviest to the lightest node."""
    num_experts = len(loads)
    if num_groups > 1 and num_groups % num_nodes == 0:
        size = num_experts // num_groups
        nodes, _ = pack_equal(loads.reshape(num_groups, size).sum(axis=1), num_nodes)
        return np.repeat(nodes, size)
    node_of = np.full(num_experts, num_nodes - 1, dtype=np.int64)
    order = np.argsort(-loads, kind="stable")[: num_experts // num_nodes * num_nodes]
    node_of[order] = pack_equal(loads[order], num_nodes)[0]
    return node_of


def _search(
    layer: _Layer,
    node_of: NDArray[np.int64],
    num_nodes: int,
    slack: float,
    generator: np.random.Generator,
    num_passes: int,
) -> None:
    """Exchange experts between nodes in place."""
    is_single = node_of >= 0
    node_load: NDArray[np.float64] = np.bincount(
        node_of[is_single], weights=layer.load[is_single], minlength=num_nodes
    ).astype(np.float64)
    shared = float(layer.load[~is_single].sum()) / num_nodes
    cap = (1.0 + slack) * float(layer.load.sum()) / num_nodes - shared
    gather_tokens(
        layer.tokens,
        layer.start,
        layer.tokens_of,
        node_of,
        layer.load,
        node_load,
        cap,
        num_passes,
        generator.permutation(len(node_of)),
    )


def _worth_copies(
    layer: _Layer,
    node_of: NDArray[np.int64],
    everywhere: NDArray[np.int64],
    num_everywhere: int,
    num_ranks: int,
    num_slots: int,
) -> NDArray[np.int64]:
    """Return the experts that get a copy on every node."""
    if not num_everywhere:
        return everywhere
    alone = np.zeros(len(node_of))
    lonely_counts(layer.tokens, node_of, alone)
    # Those that have copies already: what would leave for them if they sat on their best single node is not known;
    # their load keeps the same share of being alone as the others' has.
    usual = alone.sum() / max(float(layer.load[node_of >= 0].sum()), 1e-300)
    alone[everywhere] = layer.load[everywhere] * usual
    beside = np.sort(layer.load)[: max(num_slots // num_ranks - 1, 0)].sum()
    too_heavy = layer.load + beside > 1.02 * layer.load.sum() / num_ranks
    rank = np.lexsort((-alone, -np.where(too_heavy, layer.load, 0.0)))
    return rank[:num_everywhere]


def _fill_rooms(
    layer: _Layer,
    node_of: NDArray[np.int64],
    everywhere: NDArray[np.int64],
    room: NDArray[np.int64],
    slack: float,
) -> NDArray[np.int64]:
    """Return the nodes of the experts, -1 for those everywhere, with as many experts on each node as it has room."""
    num_nodes = len(room)
    result = node_of.copy()
    homeless = np.flatnonzero(result < 0).tolist()
    result[everywhere] = -1
    chosen = set(everywhere.tolist())
    homeless = [each for each in homeless if each not in chosen]
    used = np.bincount(result[result >= 0], minlength=num_nodes)
    total = np.bincount(result[result >= 0], weights=layer.load[result >= 0], minlength=num_nodes)
    for node in range(num_nodes):
        mine = np.flatnonzero(result == node)
        mine = mine[np.argsort(layer.load[mine])]
        for expert in mine[: max(0, used[node] - room[node])]:
            result[expert] = -1
            homeless.append(int(expert))
            used[node] -= 1
            total[node] -= layer.load[expert]
    for expert in sorted(homeless, key=lambda each: -layer.load[each]):
        open_nodes = np.flatnonzero(used < room)
        node = open_nodes[np.argmin(total[open_nodes])]
        result[expert] = node
        used[node] += 1
        total[node] += layer.load[expert]
    _level_nodes(layer, result, used, slack)
    return result


def _level_nodes(layer: _Layer, node_of: NDArray[np.int64], used: NDArray[np.int64], slack: float) -> None:
    """Exchange experts between nodes until none exceeds the mean by more than the slack, in place."""
    num_experts, num_nodes = len(node_of), len(used)
    width = int(used.max())
    expert = np.arange(num_experts + num_nodes * width)
    load = np.concatenate([layer.load, np.zeros(num_nodes * width)])
    members = np.empty((num_nodes, width), dtype=np.int64)
    for node in range(num_nodes):
        mine = np.flatnonzero(node_of == node)
        # Rooms that are missing on this node hold what weighs nothing.
        members[node] = np.concatenate([mine, num_experts + node * width + np.arange(width - len(mine))])
    single = float(layer.load[node_of >= 0].sum()) / num_nodes
    target = single + slack * float(layer.load.sum()) / num_nodes
    level_ranks(expert, load, members, target, 0, 0, False)
    counts = [int((row < num_experts).sum()) for row in members]
    if counts != used.tolist():
        return  # a light expert went where there is no room for it
    for node, row in enumerate(members):
        node_of[row[row < num_experts]] = node


def _fill_slots(layer: _Layer, held: list[list[int]], everywhere: NDArray[np.int64], per_node: int) -> None:
    """Put second copies into the slots left, each time the one that leaves the heaviest node lightest."""
    num_nodes = len(held)
    shared = set(everywhere.tolist())
    total = np.asarray([layer.load[mine].sum() for mine in held])
    total -= layer.load[everywhere].sum() * (1.0 - 1.0 / num_nodes)
    copied = set(shared)
    for node, mine in enumerate(held):
        while len(mine) < per_node:
            best: tuple[float, int, int] = (np.inf, -1, -1)
            for owner in range(num_nodes):
                for expert in held[owner] if owner != node else ():
                    if expert in copied:
                        continue
                    # Two copies share evenly: each serves its own node, and half of the others.
                    after = total.copy()
                    after[owner] -= 0.5 * layer.load[expert]
                    after[node] += 0.5 * layer.load[expert]
                    best = min(best, (float(after.max()), expert, owner))
            expert, owner = best[1:]
            if expert < 0:  # everything has its second copy: another of what is heaviest here
                held_here = np.bincount(mine, minlength=len(layer.load))
                mine.append(
                    int(np.argmax(np.where(held_here > 0, layer.load / np.maximum(held_here, 1), -1.0)))
                )
                continue
            total[owner] -= 0.5 * layer.load[expert]
            total[node] += 0.5 * layer.load[expert]
            mine.append(expert)
            copied.add(expert)


def _pack_nodes(
    layer: _Layer,
    node_of: NDArray[np.int64],
    num_slots: int,
    num_nodes: int,
    ranks_per_node: int,
    seed: int,
) -> NDArray[np.int64]:
    """Return the slots: each node's experts on its ranks, the heaviest rank as light as exchanges make it."""
    per_node = num_slots // num_nodes
    everywhere = np.flatnonzero(node_of < 0)
    held = [
        list(map(int, np.flatnonzero(node_of == node))) + list(map(int, everywhere))
        for node in range(num_nodes)
    ]
    _fill_slots(layer, held, everywhere, per_node)
    copies = np.bincount(np.concatenate(held), minlength=len(node_of))
    nodes_with = np.bincount(np.concatenate([np.unique(mine) for mine in held]), minlength=len(node_of))
    result = []
    for node, mine in enumerate(held):
        expert = np.asarray(mine, dtype=np.int64)
        # Tokens of this node take its copy; those of nodes without one spread over all copies.
        here = np.bincount(expert, minlength=len(node_of))[expert]
        elsewhere = (num_nodes - nodes_with[expert]) / num_nodes / copies[expert]
        load = layer.load[expert] * (1.0 / num_nodes / here + elsewhere)
        members = np.empty((ranks_per_node, per_node // ranks_per_node), dtype=np.int64)
        pack_descending(expert, load, np.argsort(-load, kind="stable"), ranks_per_node, members)
        level_ranks(
            expert,
            load,
            members,
            float(load.sum()) / ranks_per_node * (1.0 + 1e-5),
            _NUM_KICKS,
            seed + node,
            False,
        )
        result.append(expert[members].ravel())
    return np.concatenate(result)
