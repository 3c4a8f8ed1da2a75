"""Collectives as flows over a fabric: what each algorithm sends where, and how long the links take.

A collective is a row of phases; the flows of a phase run at once, as a pipelined algorithm's do once it is full, and
the steps of the algorithm add their latencies. Without contention the times are the closed forms: ring all-reduce
``2(n-1) a + 2(n-1)/n S/B``, direct all-to-all ``a + (n-1)/n S/B`` (Thakur, Rabenseifner, Gropp, IJHPCA 2005).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError, did_you_mean
from meshwright.simcore.network.fabric import Fabric
from meshwright.simcore.network.flows import simulate_flows
from meshwright.simcore.network.symmetry import folded_flows

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "CollectiveKind",
    "CollectivePhase",
    "collective_flow_time",
    "collective_phases",
    "concurrent_flow_times",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
Algorithm = Literal["ring", "tree", "direct", "hierarchical", "pipelined_hierarchical"]

# A direct exchange has a flow per pair: 2 million take about a gigabyte to route.
_MOST_FLOWS = 2_000_000
# How often the buffer passes: all-reduce is a reduce-scatter and an all-gather.
_PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CollectivePhase:
    """Flows that run at once.

    Parameters
    ----------
    sources, destinations : IntArray
        GPUs of each flow, ``(num_flows,)``.
    num_bytes : FloatArray
        Of each flow, ``(num_flows,)`` [B].
    latency : float
        Of all steps of the phase together [s].
    """

    sources: IntArray
    destinations: IntArray
    num_bytes: FloatArray
    latency: float


def collective_phases(
    fabric: Fabric, collective: CollectiveKind, algorithm: Algorithm, ranks: Sequence[int], num_bytes: float
) -> tuple[CollectivePhase, ...]:
    """Return what a collective sends.

    Parameters
    ----------
    fabric : Fabric
        Says which GPUs share a node, and gives latencies.
    collective : CollectiveKind
        What is computed.
    algorithm : Algorithm
        ``ring``: neighbours; where each node holds ``g`` consecutive ranks, ``g`` rings that enter and leave nodes
        at GPUs of their own, so that all NICs work, as NCCL's channels do. ``tree``: double binary tree (Sanders,
        Speck, Traeff, Parallel Computing 2009), all-reduce only, likewise ``g`` of them over nodes, each with a
        chain inside every node. ``direct``: every pair at once.
        ``hierarchical``: inside nodes, then across them on rails, then inside again; ``pipelined_hierarchical``
        the same with all three at once.
    ranks : Sequence[int]
        GPUs, in order.
    num_bytes : float
        Whole buffer of one rank, as nccl-tests counts [B].

    Returns
    -------
    tuple[CollectivePhase, ...]
        In order; empty for a single rank.

    Raises
    ------
    SpecError
        If the algorithm cannot do the collective on these ranks, or there would be too many flows.
    """
    if algorithm not in ALGORITHMS:
        raise SpecError(f"collective: no algorithm '{algorithm}'{did_you_mean(algorithm, ALGORITHMS) or '.'}")
    kinds, build = ALGORITHMS[algorithm]
    if collective not in kinds:
        raise SpecError(f"collective: {algorithm} does no {collective}; it does {', '.join(kinds)}")
    if len(set(ranks)) != len(ranks) or not len(ranks):
        raise SpecError("collective: the ranks must be different GPUs, at least one")
    if not (math.isfinite(num_bytes) and num_bytes >= 0.0):
        raise SpecError(f"collective: the buffer must not be negative, it has {num_bytes:g} B")
    if len(ranks) == 1:
        return ()
    return build(fabric, collective, np.array(ranks, dtype=np.int64), num_bytes)


def collective_flow_time(
    fabric: Fabric, collective: CollectiveKind, algorithm: Algorithm, ranks: Sequence[int], num_bytes: float
) -> float:
    """Return how long a collective takes alone on a fabric [s]; 0 for a single rank.

    Raises
    ------
    SpecError
        As :func:`collective_phases`.
    """
    phases = collective_phases(fabric, collective, algorithm, ranks, num_bytes)
    return math.fsum(float(_phase_times(fabric, [phase])[0]) for phase in phases)


def concurrent_flow_times(fabric: Fabric, collectives: Sequence[Sequence[CollectivePhase]]) -> FloatArray:
    """Return how long collectives that begin together take, sharing links, ``(num_collectives,)`` [s].

    Raises
    ------
    SpecError
        If one has several phases: when its later ones begin depends on the others.
    """
    if any(len(phases) > 1 for phases in collectives):
        raise SpecError("collectives: only those of one phase can share links; take pipelined_hierarchical")
    busy = [index for index, phases in enumerate(collectives) if phases]
    times = np.zeros(len(collectives))
    if busy:
        times[busy] = _phase_times(fabric, [collectives[index][0] for index in busy])
    return times


def _phase_times(fabric: Fabric, phases: Sequence[CollectivePhase]) -> FloatArray:
    sources = np.concatenate([phase.sources for phase in phases])
    destinations = np.concatenate([phase.destinations for phase in phases])
    num_bytes = np.concatenate([phase.num_bytes for phase in phases])
    phase_of = np.repeat(np.arange(len(phases)), [len(phase.sources) for phase in phases])
    folded = folded_flows(fabric, fabric.routes(sources, destinations, phase_of), num_bytes)
    finish = simulate_flows(folded.flows).finish[folded.class_of]
    times = np.array([phase.latency for phase in phases])
    slowest = np.zeros(len(phases))
    np.maximum.at(slowest, phase_of, finish)
    return times + slowest


def _ring(
    fabric: Fabric, collective: CollectiveKind, ranks: IntArray, num_bytes: float
) -> tuple[CollectivePhase, ...]:
    rings = [turned.ravel() for turned in _turned(fabric, ranks)]
    latency = _ring_latency(fabric, _PASSES[collective], np.stack(rings))
    sources = np.concatenate(rings)
    destinations = np.concatenate([np.roll(ring, -1) for ring in rings])
    share = _PASSES[collective] * (len(ranks) - 1) / len(ranks) * num_bytes / len(rings)
    return (_phase(sources, destinations, share, latency),)


def _turned(fabric: Fabric, ranks: IntArray) -> list[IntArray]:
    """Return the ranks as ``(num_nodes, g)`` with another GPU of every node first each time.

    Where the ranks are not the same number in every node, node after node, they come once, as ``(num_ranks, 1)``.
    """
    node = ranks // fabric.shape.gpus_per_node
    starts = np.flatnonzero(np.diff(node, prepend=-1))
    sizes = np.diff(np.append(starts, len(ranks)))
    is_even = len(set(node[starts].tolist())) == len(starts) and len(set(sizes.tolist())) == 1
    if len(starts) == 1 or not is_even:
        return [ranks[:, None]]
    by_node = ranks.reshape(len(starts), -1)
    return [np.roll(by_node, -turn, axis=1) for turn in range(by_node.shape[1])]


def _ring_latency(fabric: Fabric, passes: int, rings: IntArray) -> float:
    """Return the latency of the hops one chunk takes on the slowest of some rings, ``(num_rings, size)`` [s].

    Every edge is passed ``passes`` times, but for the last ``passes``.
    """
    following = np.roll(rings, -1, axis=1)
    hops = fabric.latencies(rings.ravel(), following.ravel()).reshape(rings.shape)
    skipped = hops if passes == 1 else hops + np.roll(hops, -1, axis=1)
    return float((passes * hops.sum(axis=1) - skipped.min(axis=1)).max())


def _tree(
    fabric: Fabric, collective: CollectiveKind, ranks: IntArray, num_bytes: float
) -> tuple[CollectivePhase, ...]:
    turned = _turned(fabric, ranks)
    share = num_bytes / len(turned)
    below, above, moved = [], [], []
    latency = 0.0
    for by_node in turned:
        children, parents, depth = _double_tree(fabric, by_node[:, 0])
        hops = fabric.latencies(by_node[:, 1:].ravel(), by_node[:, :-1].ravel())
        chain = hops.reshape(len(by_node), -1).sum(axis=1)
        latency = max(latency, 2.0 * (depth + float(chain.max())))
        below += [children, by_node[:, 1:].ravel()]
        above += [parents, by_node[:, :-1].ravel()]
        moved += [np.full(len(children), share / 2.0), np.full(len(hops), share)]
    up, down, each = np.concatenate(below), np.concatenate(above), np.concatenate(moved)
    # Reduced upwards while the chunks before are broadcast downwards.
    phase = CollectivePhase(
        sources=np.concatenate([up, down]),
        destinations=np.concatenate([down, up]),
        num_bytes=np.concatenate([each, each]),
        latency=latency,
    )
    return (phase,)


def _double_tree(fabric: Fabric, ranks: IntArray) -> tuple[IntArray, IntArray, float]:
    """Return children and parents of both trees' edges, and the latency from the deepest leaf to its root [s]."""
    size = len(ranks)
    parent = np.array([_binary_tree_parent(rank, size) for rank in range(size)], dtype=np.int64)
    number = np.arange(size)
    downwards = sorted(range(1, size), key=_lowest_bit, reverse=True)
    children, parents = [], []
    deepest = 0.0
    # The second tree is the first mirrored, or shifted by one for an odd number: leaves become inner (NCCL).
    for place in (ranks, ranks[size - 1 - number] if size % 2 == 0 else ranks[(number + 1) % size]):
        children.append(place[1:])
        parents.append(place[parent[1:]])
        hops = fabric.latencies(children[-1], parents[-1])
        depth = np.zeros(size)
        for rank in downwards:
            depth[rank] = depth[parent[rank]] + hops[rank - 1]
        deepest = max(deepest, float(depth.max()))
    return np.concatenate(children), np.concatenate(parents), deepest


def _lowest_bit(rank: int) -> int:
    """Return how far above the leaves a rank sits: a parent's lowest set bit is larger than its child's."""
    return rank & -rank


def _binary_tree_parent(rank: int, size: int) -> int:
    """Return the parent in NCCL's binary tree (``ncclGetBtree``), in which odd ranks are leaves; -1 for the root."""
    if rank == 0:
        return -1
    bit = _lowest_bit(rank)
    parent = (rank ^ bit) | (bit << 1)
    return parent if parent < size else rank ^ bit


def _direct(
    fabric: Fabric, collective: CollectiveKind, ranks: IntArray, num_bytes: float
) -> tuple[CollectivePhase, ...]:
    sources, destinations = _pairs(ranks[None, :])
    latency = float(fabric.latencies(sources, destinations).max())
    phase = _phase(sources, destinations, num_bytes / len(ranks), latency)
    return (phase,) * (2 if collective == "all_reduce" else 1)


def _pairs(groups: IntArray) -> tuple[IntArray, IntArray]:
    """Return all ordered pairs within each row of ranks."""
    num_groups, size = groups.shape
    num_flows = num_groups * size * (size - 1)
    if num_flows > _MOST_FLOWS:
        raise SpecError(
            f"collective: a direct exchange of {size} ranks has {num_flows:,} flows, more than the {_MOST_FLOWS:,} "
            "that are simulated; take ring or hierarchical, or fewer ranks"
        )
    sender, receiver = np.nonzero(~np.eye(size, dtype=bool))
    return groups[:, sender].ravel(), groups[:, receiver].ravel()


def _hierarchical(
    fabric: Fabric, collective: CollectiveKind, ranks: IntArray, num_bytes: float
) -> tuple[CollectivePhase, ...]:
    by_node = _by_node(fabric, ranks)
    per_node, num_nodes = by_node.shape[1], by_node.shape[0]
    scatter = _inside(fabric, by_node, num_bytes)
    across = _rings(fabric, by_node.T, num_bytes / per_node, _PASSES[collective]) if num_nodes > 1 else ()
    if collective == "all_reduce":
        return (*scatter, *across, *scatter)
    return (*across, *scatter) if collective == "all_gather" else (*scatter, *across)


def _pipelined_hierarchical(
    fabric: Fabric, collective: CollectiveKind, ranks: IntArray, num_bytes: float
) -> tuple[CollectivePhase, ...]:
    phases = _hierarchical(fabric, collective, ranks, num_bytes)
    return (
        CollectivePhase(
            sources=np.concatenate([phase.sources for phase in phases]),
            destinations=np.concatenate([phase.destinations for phase in phases]),
            num_bytes=np.concatenate([phase.num_bytes for phase in phases]),
            latency=math.fsum(phase.latency for phase in phases),
        ),
    )


def _by_node(fabric: Fabric, ranks: IntArray) -> IntArray:
    """Return the ranks as ``(num_nodes, ranks per node)``; columns are rails where nodes hold the same GPUs."""
    ordered = np.sort(ranks)
    counts = np.unique(np.bincount(ordered // fabric.shape.gpus_per_node))
    counts = counts[counts > 0]
    if len(counts) > 1:
        raise SpecError(
            "collective: a hierarchical one needs the same number of ranks in every node, they hold "
            f"{counts[0]} to {counts[-1]}; take ring"
        )
    return ordered.reshape(-1, int(counts[0]))


def _inside(fabric: Fabric, by_node: IntArray, num_bytes: float) -> tuple[CollectivePhase, ...]:
    """Return a reduce-scatter or all-gather inside every node: rings over switches, direct over meshes."""
    per_node = by_node.shape[1]
    if per_node == 1:
        return ()
    if not fabric.shape.is_mesh:
        return _rings(fabric, by_node, num_bytes, 1)
    sources, destinations = _pairs(by_node)
    return (_phase(sources, destinations, num_bytes / per_node, fabric.shape.gpu_latency),)


def _rings(fabric: Fabric, groups: IntArray, num_bytes: float, passes: int) -> tuple[CollectivePhase, ...]:
    size = groups.shape[1]
    latency = _ring_latency(fabric, passes, groups)
    share = passes * (size - 1) / size * num_bytes
    return (_phase(groups.ravel(), np.roll(groups, -1, axis=1).ravel(), share, latency),)


def _phase(sources: IntArray, destinations: IntArray, num_bytes: float, latency: float) -> CollectivePhase:
    return CollectivePhase(
        sources=sources,
        destinations=destinations,
        num_bytes=np.full(len(sources), num_bytes),
        latency=latency,
    )


_Builder = Callable[[Fabric, CollectiveKind, IntArray, float], tuple[CollectivePhase, ...]]
_REDUCIBLE: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter")
ALGORITHMS: dict[str, tuple[tuple[CollectiveKind, ...], _Builder]] = {
    "ring": (_REDUCIBLE, _ring),
    "tree": (("all_reduce",), _tree),
    "direct": ((*_REDUCIBLE, "all_to_all"), _direct),
    "hierarchical": (_REDUCIBLE, _hierarchical),
    "pipelined_hierarchical": (_REDUCIBLE, _pipelined_hierarchical),
}
