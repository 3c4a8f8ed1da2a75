"""Time of collectives and sends by algorithm and network tier.

Inside a node a collective follows its measured curve: a p-norm of a latency and a bandwidth term by group
size (5 to 6 % mean error against NCCL tables; plain alpha-beta is at 13 to 15 %), in which ring and in-switch
reduction (NVLS) are already NCCL's own choice. Across nodes the fastest of ring, double binary tree and
hierarchical all-reduce is taken; the slowest link is the share of the NICs that a group's ranks on a node own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from meshwright.costmodels.calibration import CollectiveCurve, DeviceCalibration
from meshwright.costmodels.plan_columns import FloatColumn
from meshwright.hardware_specs.specs import ClusterSpec

__all__ = [
    "Collective",
    "GroupPlacement",
    "LinkSlowdown",
    "all_to_all_time",
    "collective_time",
    "place_group",
    "send_time",
]

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]

# Bytes that cross each rank's link over the bytes of the whole buffer, per collective: 2(n-1)/n or (n-1)/n
# (nccl-tests, doc/PERFORMANCE.md).
_PASSES: dict[Collective, float] = {
    "all_reduce": 2.0,
    "all_gather": 1.0,
    "reduce_scatter": 1.0,
    "all_to_all": 1.0,
}
# Small inter-node messages and large ones blend like the measured intra-node curves.
_INTER_NODE_EXPONENT = 0.8
# An all-reduce this much above the ring's bus bandwidth was reduced in the switch.
_IN_SWITCH_GAIN = 1.15
# Launch of a collective between nodes that has no step inside one [s] (NCCL's base latency of small messages).
_LAUNCH = 10e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSlowdown:
    """How much longer the links of a group take than those of the flat model, between nodes and inside them.

    Arrays of shape ``(num_plans,)``, or one number for all.
    """

    across: FloatColumn | float = 1.0
    inside: FloatColumn | float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlacement:
    """Where the ranks of one group sit; arrays of shape ``(num_plans,)``.

    Parameters
    ----------
    size : FloatColumn
        Ranks of the group.
    ranks_per_node : FloatColumn
        Ranks of the group on one node.
    ring, exchange : LinkSlowdown
        Links of the group as a ring over it uses them, and as an all-to-all does.
    """

    size: FloatColumn
    ranks_per_node: FloatColumn
    ring: LinkSlowdown = field(default_factory=LinkSlowdown)
    exchange: LinkSlowdown = field(default_factory=LinkSlowdown)

    @property
    def num_nodes(self) -> FloatColumn:
        """Nodes the group spans."""
        return np.ceil(self.size / self.ranks_per_node)


def place_group(size: FloatColumn, stride: FloatColumn, gpus_per_node: int) -> GroupPlacement:
    """Return where a group of ``size`` ranks, ``stride`` apart in the global order, sits.

    Global ranks fill nodes in order and groups tile them, so a group spans ``size * stride`` ranks from a
    multiple of that. Where blocks and nodes are not multiples of each other some group straddles a node
    boundary, and the slowest group counts: its smallest part on a node is the greatest common divisor.
    """
    extent = np.gcd((size * stride).astype(np.int64), gpus_per_node)
    per_node = np.maximum(1.0, np.floor(extent / stride))
    return GroupPlacement(size=size, ranks_per_node=np.minimum(size, per_node))


def collective_time(
    collective: Collective,
    num_bytes: FloatColumn,
    group: GroupPlacement,
    cluster: ClusterSpec,
    calibration: DeviceCalibration,
    inter_node_efficiency: float,
) -> FloatColumn:
    """Return the seconds of a collective over a group, by the fastest algorithm as NCCL would choose.

    Parameters
    ----------
    collective : Collective
        Which one.
    num_bytes : FloatColumn
        Bytes of the whole buffer (nccl-tests convention) [B].
    group : GroupPlacement
        Ranks and how many of them share a node; one rank is free.
    cluster : ClusterSpec
        Links of the node and NICs.
    calibration : DeviceCalibration
        Measured curves inside a node.
    inter_node_efficiency : float
        Share of the NIC bandwidth reached.

    Returns
    -------
    FloatColumn
        Time [s]; 0 for groups of one rank.
    """
    network = _Network(cluster=cluster, calibration=calibration, efficiency=inter_node_efficiency)
    inside = _intra_node_time(collective, num_bytes, group.ranks_per_node, network, group.ring.inside)
    spans_nodes = group.num_nodes > 1.0
    if spans_nodes.any():
        across = _ring_time(collective, num_bytes, group, network)
        if collective == "all_reduce":
            across = np.minimum(across, _tree_all_reduce_time(num_bytes, group, network))
            across = np.minimum(across, _hierarchical_all_reduce_time(num_bytes, group, network))
        inside = np.where(spans_nodes, across, inside)
    return np.where(group.size <= 1.0, 0.0, inside)


def all_to_all_time(
    num_bytes: FloatColumn,
    group: GroupPlacement,
    cluster: ClusterSpec,
    calibration: DeviceCalibration,
    inter_node_efficiency: float,
    across_bytes: FloatColumn | None = None,
) -> FloatColumn:
    """Return the seconds of an all-to-all: every rank sends an equal part of its buffer to every other.

    The parts for the ranks of the own node go over the scale-up links while those for other nodes go through the
    rank's own NIC; the slower of the two counts.

    Parameters
    ----------
    num_bytes : FloatColumn
        Buffer of one rank, its own part included [B].
    group : GroupPlacement
        Ranks and how many of them share a node; one rank is free.
    cluster, calibration, inter_node_efficiency : ClusterSpec, DeviceCalibration, float
        As for :func:`collective_time`.
    across_bytes : FloatColumn | None
        What a rank sends to other nodes, when that is not their share of the buffer (deduplicated dispatch, which
        forwards inside the node what it received once) [B].

    Returns
    -------
    FloatColumn
        Time [s]; 0 for groups of one rank.
    """
    network = _Network(cluster=cluster, calibration=calibration, efficiency=inter_node_efficiency)
    size, local = group.size, group.ranks_per_node
    spans_nodes = group.num_nodes > 1.0
    is_forwarded = across_bytes is not None
    inside_bytes = num_bytes if is_forwarded else num_bytes * local / size
    inside = _intra_node_time("all_to_all", inside_bytes, local, network, group.exchange.inside)
    remote = num_bytes * (size - local) / size if across_bytes is None else across_bytes
    nic = network.nic_bandwidth(np.ones_like(size))
    # Messages to all nodes are in flight at once: one hop, and a launch.
    across = _LAUNCH + group.exchange.across * (network.hop + remote / nic)
    seconds = np.where(spans_nodes, np.maximum(np.where(local > 1.0, inside, 0.0), across), inside)
    return np.where(size <= 1.0, 0.0, seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Network:
    cluster: ClusterSpec
    calibration: DeviceCalibration
    efficiency: float

    @property
    def hop(self) -> float:
        """One step between nodes, NICs included [s]."""
        return self.cluster.fabric.latency

    def nic_bandwidth(self, ranks_per_node: FloatColumn) -> FloatColumn:
        """What the NICs of a group's ranks on one node carry together [B/s]."""
        share = (
            self.cluster.node.nic_bandwidth_per_gpu * self.efficiency / self.cluster.fabric.oversubscription
        )
        return ranks_per_node * share


def _intra_node_time(
    collective: Collective,
    num_bytes: FloatColumn,
    ranks: FloatColumn,
    network: _Network,
    slowdown: FloatColumn | float,
) -> FloatColumn:
    """Return the measured curve of a group inside one node: NCCL's own choice of ring or in-switch reduction."""
    latency, bandwidth, exponent = _intra_node_curve(collective, ranks, network)
    traffic = _PASSES[collective] * (ranks - 1.0) / np.maximum(ranks, 1.0) * num_bytes
    seconds = _p_norm(latency, traffic / bandwidth * slowdown, exponent)
    return seconds * _measured_correction(collective, num_bytes, traffic, ranks, network)


def _measured_correction(
    collective: Collective,
    num_bytes: FloatColumn,
    traffic: FloatColumn,
    ranks: FloatColumn,
    network: _Network,
) -> FloatColumn:
    """Return measured time over the p-norm of the links it was measured on, by size; 1 where nothing was measured.

    NCCL switches protocols by size, which no p-norm follows (6 % mean error against 4 % for tables of every second
    size). As a ratio it carries over to faster or slower links. Between measured group sizes it is interpolated.
    """
    curve = _curve(collective, network)
    if curve.link_bandwidth is None:
        return np.ones_like(num_bytes)
    known = np.log2(curve.ranks)
    log_ranks = np.clip(np.log2(np.maximum(ranks, 1.0)), known[0], known[-1])
    # Share of each measured group size in the interpolation: a hat function around it.
    shares = [np.interp(log_ranks, known, hat) for hat in np.eye(len(known))]
    log_correction = np.zeros_like(num_bytes)
    for index, (share, table) in enumerate(zip(shares, curve.tables, strict=True)):
        if table is None or not share.any():
            continue
        size = curve.ranks[index]
        scale = (size - 1.0) / size / np.maximum((ranks - 1.0) / np.maximum(ranks, 1.0), 1e-9)
        transfer = traffic * scale / (curve.link_bandwidth * curve.link_efficiency[index])
        latency, exponent = (np.full_like(transfer, part[index]) for part in (curve.latency, curve.exponent))
        measured = table.time(num_bytes) / _p_norm(latency, transfer, exponent)
        log_correction = log_correction + share * np.log(measured)
    correction: FloatColumn = np.where(
        (ranks > curve.ranks[-1]) | (ranks <= 1.0), 1.0, np.exp(log_correction)
    )
    return correction


def _curve(collective: Collective, network: _Network) -> CollectiveCurve:
    """Return the measured curve; an all-to-all that nobody measured moves as many bytes per link as an all-gather."""
    curves = network.calibration.collectives
    return curves.get(collective) or curves["all_gather"]


def _intra_node_curve(
    collective: Collective, ranks: FloatColumn, network: _Network
) -> tuple[FloatColumn, FloatColumn, FloatColumn]:
    """Return latency [s], bus bandwidth [B/s] and p-norm exponent of a group inside one node."""
    curve = _curve(collective, network)
    log_ranks = np.log2(np.maximum(ranks, 2.0))
    known = np.log2(curve.ranks)
    latency = np.exp(np.interp(log_ranks, known, np.log(curve.latency)))
    # Domains larger than the largest measured group (NVL72): a ring adds a step per rank; an all-to-all has all its
    # messages in flight at once.
    beyond = np.maximum(1.0, ranks / curve.ranks[-1])
    if collective == "all_to_all":
        beyond = np.ones_like(beyond)
    efficiency = np.interp(log_ranks, known, curve.link_efficiency)
    ring = network.calibration.collectives["all_gather"].link_efficiency[-1]
    if collective == "all_reduce" and curve.link_efficiency[-1] > _IN_SWITCH_GAIN * ring:
        # Reduced in the switch (NVLS): one step whatever the ranks, each GPU sends S and stores S/n, so the
        # bus bandwidth grows as 2(n-1)/(n+1); within 2.5 % of four published peaks.
        last = curve.ranks[-1]
        efficiency = efficiency * np.where(
            beyond > 1.0, (ranks - 1) / (ranks + 1) * (last + 1) / (last - 1), 1.0
        )
    else:
        latency = latency * beyond
    link = network.cluster.node.intra_link.bandwidth_bytes_per_second
    exponent = np.interp(log_ranks, known, curve.exponent)
    # Small groups blend latency and bandwidth over a wide range of sizes; long rings do as between nodes.
    exponent = np.where(beyond > 1.0, _INTER_NODE_EXPONENT, exponent)
    return latency, link * efficiency, exponent


def _ring_time(
    collective: Collective, num_bytes: FloatColumn, group: GroupPlacement, network: _Network
) -> FloatColumn:
    """Return the time of a ring over all ranks: its slowest link carries 2(n-1)/n or (n-1)/n of the buffer."""
    passes = _PASSES[collective]
    latency, slowest = _slowest_link(collective, group, network)
    steps = passes * (group.num_nodes - 1.0) * network.hop * group.ring.across + latency
    traffic = passes * (group.size - 1.0) / group.size * num_bytes
    return _p_norm(steps, traffic / slowest, np.full_like(steps, _INTER_NODE_EXPONENT))


def _slowest_link(
    collective: Collective, group: GroupPlacement, network: _Network
) -> tuple[FloatColumn, FloatColumn]:
    """Return what a group that spans nodes pays inside them to start [s], and the bandwidth of its slowest link [B/s]."""
    latency, bandwidth, _ = _intra_node_curve(collective, group.ranks_per_node, network)
    nic = network.nic_bandwidth(group.ranks_per_node) / group.ring.across
    is_local = group.ranks_per_node > 1.0
    slowest = np.where(is_local, np.minimum(bandwidth / group.ring.inside, nic), nic)
    return np.where(is_local, latency, _LAUNCH), slowest


def _tree_all_reduce_time(num_bytes: FloatColumn, group: GroupPlacement, network: _Network) -> FloatColumn:
    """Return the time of a double binary tree over nodes: logarithmic latency, the whole buffer up and down."""
    latency, slowest = _slowest_link("all_reduce", group, network)
    depth = np.log2(np.maximum(group.num_nodes, 2.0))
    steps = 2.0 * depth * network.hop * group.ring.across + latency
    return _p_norm(steps, 2.0 * num_bytes / slowest, np.full_like(steps, _INTER_NODE_EXPONENT))


def _hierarchical_all_reduce_time(
    num_bytes: FloatColumn, group: GroupPlacement, network: _Network
) -> FloatColumn:
    """Return reduce-scatter inside nodes, all-reduce of each rail across them, all-gather inside."""
    local = group.ranks_per_node
    rail = GroupPlacement(size=group.num_nodes, ranks_per_node=np.ones_like(local), ring=group.ring)
    return (
        _intra_node_time("reduce_scatter", num_bytes, local, network, group.ring.inside)
        + _ring_time("all_reduce", num_bytes / local, rail, network)
        + _intra_node_time("all_gather", num_bytes, local, network, group.ring.inside)
    )


def send_time(
    num_bytes: FloatColumn,
    crosses_nodes: FloatColumn,
    cluster: ClusterSpec,
    inter_node_efficiency: float,
    slowdown: FloatColumn | float = 1.0,
) -> FloatColumn:
    """Return the seconds of one point-to-point message.

    ``crosses_nodes`` is 1 where sender and receiver sit on different nodes, 0 inside a node [share of plans].
    Each rank of a stage sends its own part through its own NIC. ``slowdown`` is that of the link between them.
    """
    link = cluster.node.intra_link
    inside = link.latency + num_bytes / (link.bandwidth_bytes_per_second * inter_node_efficiency)
    if cluster.node.topology == "mesh":
        # A pair owns one of the direct links, not all of them.
        inside = link.latency + num_bytes * max(1, cluster.node.num_gpus - 1) / (
            link.bandwidth_bytes_per_second * inter_node_efficiency
        )
    nic = min(cluster.node.nic.bandwidth_bytes_per_second, cluster.node.nic_bandwidth_per_gpu)
    across = cluster.fabric.latency + num_bytes / (
        nic * inter_node_efficiency / cluster.fabric.oversubscription
    )
    return np.where(num_bytes <= 0.0, 0.0, np.where(crosses_nodes > 0.0, across, inside) * slowdown)


def _p_norm(latency: FloatColumn, transfer: FloatColumn, exponent: FloatColumn) -> FloatColumn:
    """Return ``(latency**p + transfer**p) ** (1/p)`` without overflow."""
    longer, shorter = np.maximum(latency, transfer), np.minimum(latency, transfer)
    ratio: FloatColumn = (shorter / np.maximum(longer, 1e-30)) ** exponent
    return longer * (1.0 + ratio) ** (1.0 / exponent)
