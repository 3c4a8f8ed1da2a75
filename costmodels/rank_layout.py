"""Where the ranks of a plan sit, and how slow the links are that each of their groups really uses.

Every group of ranks (tensor, context, expert and data parallel, sharding) is placed here and nowhere else: how many of
its ranks share a node, and how much longer than over the flat fabric its traffic takes. A ring waits for its slowest hop;
in an all-to-all every rank sends to all others through its own NIC, so the mean of its links counts. Uplinks that nodes
share slow down what fills them: all groups of a stage, or all sends between two, at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.collectives import GroupPlacement, LinkSlowdown, place_group
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns
from meshwright.costmodels.uplinks import Uplinks
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = [
    "BestHosts",
    "ConsecutiveRanks",
    "Hops",
    "HostRanks",
    "RankLayout",
    "edge_crosses_nodes",
    "ring_bottleneck",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
# Ranks per node of a group, slowdowns of a ring across and inside nodes, and of an all-to-all.
_Placed = tuple[float, float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hops:
    """Sends from stage to stage: whether they leave a node (1.0), and how much longer than on a flat fabric they take."""

    crosses_nodes: FloatColumn
    slowdown: FloatColumn


class RankLayout(Protocol):
    """Where ranks sit."""

    def place(self, size: FloatColumn, stride: FloatColumn) -> GroupPlacement:
        """Return the worst placed of the groups of ``size`` ranks, ``stride`` apart, that tile the ranks."""
        ...

    def hops(self, plan: ParallelPlan, stage_of: IntArray) -> Hops:
        """Return the sends along virtual stages ``i -> i + 1``, the last back to the first; ``stage_of`` is their stage."""
        ...

    def least_hops(self, columns: PlanColumns) -> Hops:
        """Return what no send of each plan can beat."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsecutiveRanks:
    """Ranks fill equal nodes in their order, and all nodes are joined alike."""

    gpus_per_node: int

    def place(self, size: FloatColumn, stride: FloatColumn) -> GroupPlacement:
        """Return how many ranks of a group share a node; see :class:`RankLayout`."""
        return place_group(size, stride, self.gpus_per_node)

    def hops(self, plan: ParallelPlan, stage_of: IntArray) -> Hops:
        """Return which sends leave a node; see :class:`RankLayout`."""
        crosses = edge_crosses_nodes(stage_of, plan.tp * plan.cp * plan.dp, self.gpus_per_node)
        return Hops(crosses_nodes=crosses, slowdown=np.ones_like(crosses))

    def least_hops(self, columns: PlanColumns) -> Hops:
        """Return sends that leave their node only where stages are whole nodes: elsewhere not every edge does."""
        crosses = (columns.tp * columns.cp * columns.dp >= self.gpus_per_node).astype(np.float64)
        return Hops(crosses_nodes=crosses, slowdown=np.ones_like(crosses))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BestHosts:
    """What no order of hosts, of GPUs inside them and of ranks can beat: every group on links as good as any has.

    Parameters
    ----------
    gpus_per_node : int
        GPUs of a node.
    ring, exchange : FloatArray
        Least slowdown of a ring and of an all-to-all over some hosts, by their number from 0, ``(num_hosts + 1,)``.
    hop : float
        Least slowdown of a send between hosts.
    inside : float
        Least slowdown between two GPUs of a node.
    may_turn : bool
        Whether pipeline stages may be neighbours in the order of ranks, so that sends stay in nodes.
    """

    gpus_per_node: int
    ring: FloatArray
    exchange: FloatArray
    hop: float
    inside: float
    may_turn: bool

    def place(self, size: FloatColumn, stride: FloatColumn) -> GroupPlacement:
        """Return a placement as compact as any, on the best hosts; see :class:`RankLayout`."""
        flat = place_group(size, stride, self.gpus_per_node)
        # On as few hosts as can be, whatever part of a node groups that straddle nodes leave.
        fewest = np.ceil(flat.size / np.maximum(1.0, np.floor(self.gpus_per_node / stride)))
        hosts = np.clip(fewest.astype(np.int64), 0, len(self.ring) - 1)
        inside = np.full_like(flat.size, self.inside)
        return GroupPlacement(
            size=flat.size,
            ranks_per_node=flat.ranks_per_node,
            ring=LinkSlowdown(across=self.ring[hosts], inside=inside),
            exchange=LinkSlowdown(across=self.exchange[hosts], inside=inside),
        )

    def hops(self, plan: ParallelPlan, stage_of: IntArray) -> Hops:
        """Return sends over the best links; see :class:`RankLayout`."""
        stride = plan.tp * plan.cp * (1 if self.may_turn else plan.dp)
        crosses = np.full(stage_of.size, float(stride >= self.gpus_per_node))
        return Hops(crosses_nodes=crosses, slowdown=self._slowdown(crosses))

    def least_hops(self, columns: PlanColumns) -> Hops:
        """Return sends over the best links; see :class:`RankLayout`."""
        ranks = columns.tp * columns.cp * (1 if self.may_turn else columns.dp)
        crosses = (ranks >= self.gpus_per_node).astype(np.float64)
        return Hops(crosses_nodes=crosses, slowdown=self._slowdown(crosses))

    def _slowdown(self, crosses: FloatColumn) -> FloatColumn:
        return np.where(crosses > 0.0, self.hop, self.inside)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostRanks:
    """The ranks of one plan on its hosts, seen from one of its stages.

    Parameters
    ----------
    hosts, gpus : IntArray
        Host of each rank and its GPU there, ``(pp, ranks of a stage)``, ranks of a stage in Megatron's order.
    stage : int | None
        Whose groups are placed; None takes the worst of all stages.
    gpus_per_node : int
        GPUs of a node.
    replica_ranks, replica_stride : int
        Ranks of a stage that one replica numbers consecutively (tp x cp), and how far apart replicas start.
    slowdown : FloatArray
        Time from host to host over that of the flat fabric, 1 on the diagonal, ``(num_hosts, num_hosts)``; but for
        what hosts share.
    uplinks : Uplinks | None
        What they share; None where nothing holds them back.
    gpu_slowdown : FloatArray | None
        The same between GPUs of a host over the node's usual link, ``(gpus_per_node, gpus_per_node)``; None where alike.
    """

    hosts: IntArray
    gpus: IntArray
    stage: int | None
    gpus_per_node: int
    replica_ranks: int
    replica_stride: int
    slowdown: FloatArray
    uplinks: Uplinks | None = None
    gpu_slowdown: FloatArray | None = None
    _known: dict[tuple[int, int], _Placed] = field(init=False, default_factory=dict)

    def place(self, size: FloatColumn, stride: FloatColumn) -> GroupPlacement:
        """Return the worst placed group of each size and stride; see :class:`RankLayout`."""
        size, stride = np.broadcast_arrays(np.asarray(size, dtype=np.float64), stride)
        kinds, inverse = np.unique(np.stack([size, stride]), axis=1, return_inverse=True)
        found = np.array([self._placed(int(one), int(apart)) for one, apart in kinds.T]).T
        ranks, *slowdowns = found[:, np.asarray(inverse).reshape(-1)]
        ring_across, ring_inside, exchange_across, exchange_inside = slowdowns
        return GroupPlacement(
            size=size,
            ranks_per_node=ranks,
            ring=LinkSlowdown(across=ring_across, inside=ring_inside),
            exchange=LinkSlowdown(across=exchange_across, inside=exchange_inside),
        )

    def hops(self, plan: ParallelPlan, stage_of: IntArray) -> Hops:
        """Return the sends of the pipeline whose hops take longest together; see :class:`RankLayout`."""
        pairs = np.unique(np.concatenate([self.hosts, self.gpus]), axis=1)
        hosts, gpus = pairs[: plan.pp], pairs[plan.pp :]
        times = self._send_slowdown(hosts[:-1], gpus[:-1], hosts[1:], gpus[1:])
        # Inside a node a send is nothing beside one that leaves it.
        path = np.where(hosts[:-1] == hosts[1:], 1e-3 * times, times).sum(axis=0)
        worst = int(np.argmax(path))
        sender, receiver = stage_of, np.roll(stage_of, -1)
        leaves = (self.hosts[sender] != self.hosts[receiver]).any(axis=1)
        # Chunks of a stage send over the same links.
        (one, two), hop = np.unique(np.stack([sender, receiver]), axis=1, return_inverse=True)
        sends = self._send_slowdown(hosts[one], gpus[one], hosts[two], gpus[two])
        slowdown = sends[np.reshape(hop, -1), worst]
        host = hosts[:, worst]
        stays = host[sender] == host[receiver]
        return Hops(crosses_nodes=leaves.astype(np.float64), slowdown=np.where(stays & leaves, 1.0, slowdown))

    def least_hops(self, columns: PlanColumns) -> Hops:
        """Return nothing that a bound may count on; see :class:`RankLayout`."""
        nothing = np.zeros(len(columns))
        return Hops(crosses_nodes=nothing, slowdown=nothing)

    def _send_slowdown(self, host: IntArray, gpu: IntArray, other: IntArray, peer: IntArray) -> FloatArray:
        """Return the slowdown of sends, each row at once, ``(num_hops, num_pipelines)``."""
        between: FloatArray = self.slowdown[host, other]
        if self.gpu_slowdown is not None:
            between = np.where(host == other, self.gpu_slowdown[gpu, peer], between)
        if self.uplinks is None:
            return between
        # Activations go to the peer's rail, gradients come back on the sender's.
        shared = [
            np.maximum(self.uplinks.flows(*row[:3]), self.uplinks.flows(row[1], row[0], row[3]))
            for row in zip(host, other, peer, gpu, strict=True)
        ]
        slower: FloatArray = np.maximum(between, np.reshape(shared, between.shape))
        return slower

    def _placed(self, size: int, stride: int) -> _Placed:
        """Return the worst placed group."""
        if (size, stride) not in self._known:
            self._known[size, stride] = self._found(size, stride)
        return self._known[size, stride]

    def _found(self, size: int, stride: int) -> _Placed:
        ranks = self._ranks_per_node(size, stride)
        if size <= 1:
            return ranks, 1.0, 1.0, 1.0, 1.0
        hosts, gpus = self.members(self.hosts, size, stride), self.members(self.gpus, size, stride)
        ring = self.slowdown[hosts, np.roll(hosts, -1, axis=1)].max()
        exchange = max(_mean_of_others(self.slowdown, row) for row in np.unique(hosts, axis=0))
        if self.uplinks is not None:
            # Every node of a group sends on with as many rails as it has ranks there.
            onward, rail = (np.roll(each, -int(ranks), axis=1) for each in (hosts, gpus))
            ring = max(ring, self.uplinks.flows(hosts, onward, rail).max())
            exchange = max(exchange, self.uplinks.exchange(hosts, gpus, ranks))
        if self.gpu_slowdown is None or ranks <= 1.0:
            return ranks, float(ring), 1.0, exchange, 1.0
        held = {
            tuple(sorted(own[row == host].tolist()))
            for row, own in zip(hosts, gpus, strict=True)
            for host in np.unique(row)
        }
        parts = [self.gpu_slowdown[np.ix_(part, part)] for part in held if len(part) > 1]
        inside_ring = max((ring_bottleneck(part) for part in parts), default=1.0)
        inside = max((_mean_of_others(part, np.arange(len(part))) for part in parts), default=1.0)
        return ranks, float(ring), inside_ring, exchange, inside

    def members(self, of_ranks: IntArray, size: int, stride: int) -> IntArray:
        """Return the members of every group, ``(num_groups, size)``; one group of all where they do not tile the ranks."""
        ranks = of_ranks if self.stage is None else of_ranks[self.stage : self.stage + 1]
        if ranks.shape[1] % (size * stride):
            # Groups that pass through the stages.
            ranks = of_ranks.reshape(1, -1)
        if ranks.shape[1] % (size * stride):
            return ranks
        tiles = ranks.reshape(-1, size, stride)
        return np.swapaxes(tiles, 1, 2).reshape(-1, size)

    def _ranks_per_node(self, size: int, stride: int) -> float:
        """Return the ranks of a group on one node, the smallest part where groups straddle nodes."""

        def consecutive(count: int) -> float:
            flat = place_group(np.array([float(count)]), np.array([float(stride)]), self.gpus_per_node)
            return float(flat.ranks_per_node[0])

        own = max(1, min(size, self.replica_ranks // stride))
        if self.replica_stride == self.replica_ranks or own == size:
            return consecutive(size)
        # Replicas lie apart: as many of them on a node as start there, else a part of one.
        extent = int(np.gcd(size // own * self.replica_stride, self.gpus_per_node))
        replicas = extent // self.replica_stride
        return float(own * replicas) if replicas > 1 else consecutive(own)


def ring_bottleneck(slowdown: FloatArray) -> float:
    """Return what no ring over some GPUs can beat: the link that joins them all, and each one's second best.

    NCCL searches the order of a ring inside a node itself. Shape ``(num_gpus, num_gpus)``; the diagonal is not read.
    """
    size = len(slowdown)
    if size < 2:
        return 1.0
    if size == 2:
        return float(max(slowdown[0, 1], slowdown[1, 0]))
    links = np.maximum(slowdown, slowdown.T) + np.diag(np.full(size, np.inf))
    second = float(np.partition(links, 1, axis=1)[:, 1].max())
    # Prim's spanning tree of the best links: its worst joins all.
    reach, joined, worst = links[0].copy(), np.zeros(size, dtype=bool), 0.0
    joined[0] = True
    for _ in range(size - 1):
        nearest = int(np.argmin(np.where(joined, np.inf, reach)))
        worst = max(worst, float(reach[nearest]))
        joined[nearest] = True
        reach = np.minimum(reach, links[nearest])
    return max(second, worst)


def edge_crosses_nodes(stage_of: IntArray, stage_stride: int, gpus_per_node: int) -> FloatArray:
    """Return, per virtual-stage edge ``i -> i + 1``, 1.0 where some sender and receiver sit on different nodes.

    Stages are blocks of ``stage_stride`` global ranks, one after the other; ``stage_of`` names the stage of each
    virtual stage, and the last edge goes back to the first. A pipeline is as slow as its slowest replica, so one
    crossing pair counts.
    """
    sender, receiver = stage_of, np.roll(stage_of, -1)
    first = np.minimum(sender, receiver) * stage_stride
    last = (np.maximum(sender, receiver) + 1) * stage_stride - 1
    crosses: FloatArray = (first // gpus_per_node != last // gpus_per_node).astype(np.float64)
    return crosses


def _mean_of_others(slowdown: FloatArray, hosts: IntArray) -> float:
    """Return the slowdown of an all-to-all: of the busiest NIC, the mean over what it exchanges with other hosts."""
    names, counts = np.unique(hosts, return_counts=True)
    if len(names) < 2:
        return 1.0
    links = slowdown[np.ix_(names, names)] * counts
    total = links.sum(axis=1) - np.diag(links)
    return float((total / (counts.sum() - counts)).max())
