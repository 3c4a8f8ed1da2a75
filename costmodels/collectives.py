"""Time of collectives and sends by algorithm and network tier.

Inside a node a collective follows its measured curve: a p-norm of a latency and a bandwidth term by group
size (5 to 6 % mean error against NCCL tables; plain alpha-beta is at 13 to 15 %). Across nodes a ring runs
over all ranks: its slowest link is the share of the NICs that the group's members on one node own, and small
messages take the tree's logarithmic number of hops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from meshwright.costmodels.calibration import DeviceCalibration
from meshwright.costmodels.plan_columns import FloatColumn
from meshwright.hardware_specs.specs import ClusterSpec

__all__ = ["Collective", "GroupPlacement", "collective_time", "place_group", "send_time"]

Collective = Literal["all_reduce", "all_gather", "reduce_scatter"]

# Bytes that cross each rank's link over the bytes of the whole buffer, per collective: 2(n-1)/n or (n-1)/n
# (nccl-tests, doc/PERFORMANCE.md).
_PASSES: dict[Collective, float] = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}
# Small inter-node messages and large ones blend like the measured intra-node curves.
_INTER_NODE_EXPONENT = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlacement:
    """Where the ranks of one group sit; arrays of shape ``(num_plans,)``.

    Parameters
    ----------
    size : FloatColumn
        Ranks of the group.
    ranks_per_node : FloatColumn
        Ranks of the group on one node.
    """

    size: FloatColumn
    ranks_per_node: FloatColumn

    @property
    def num_nodes(self) -> FloatColumn:
        """Nodes the group spans."""
        return np.ceil(self.size / self.ranks_per_node)


def place_group(size: FloatColumn, stride: FloatColumn, gpus_per_node: int) -> GroupPlacement:
    """Return where a group of ``size`` ranks, ``stride`` apart in the global order, sits.

    Global ranks fill nodes in order, so a group keeps ``gpus_per_node / stride`` ranks on a node, at least 1.
    """
    per_node = np.maximum(1.0, np.floor(gpus_per_node / stride))
    return GroupPlacement(size=size, ranks_per_node=np.minimum(size, per_node))


def collective_time(
    collective: Collective,
    num_bytes: FloatColumn,
    group: GroupPlacement,
    cluster: ClusterSpec,
    calibration: DeviceCalibration,
    inter_node_efficiency: float,
) -> FloatColumn:
    """Return the seconds of a collective over a group.

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
    traffic = _PASSES[collective] * (group.size - 1.0) / group.size * num_bytes
    curve = calibration.collectives[collective]
    link = cluster.node.intra_link.bandwidth_bytes_per_second
    log_ranks = np.log2(np.maximum(group.ranks_per_node, 2.0))
    known = np.log2(curve.ranks)
    latency = np.exp(np.interp(log_ranks, known, np.log(curve.latency)))
    # Rings inside larger domains (NVL72) add a hop per rank beyond the largest group that was measured.
    latency = latency * np.maximum(1.0, group.ranks_per_node / curve.ranks[-1])
    bandwidth = link * np.interp(log_ranks, known, curve.link_efficiency)
    exponent = np.interp(log_ranks, known, curve.exponent)
    inside = _p_norm(latency, traffic / bandwidth, exponent)

    nodes = group.num_nodes
    nic_share = group.ranks_per_node * cluster.node.nic_bandwidth_per_gpu * inter_node_efficiency
    ring_bandwidth = np.where(group.ranks_per_node > 1.0, np.minimum(bandwidth, nic_share), nic_share)
    ring_bandwidth = ring_bandwidth / np.where(nodes > 1.0, cluster.fabric.oversubscription, 1.0)
    # The fabric's latency is end to end, NICs included.
    hop = cluster.fabric.latency
    # NCCL takes the tree for small and the ring for large messages: the fewer of their steps is latency.
    hops = _PASSES[collective] * np.minimum(nodes - 1.0, 2.0 * np.log2(np.maximum(nodes, 2.0)))
    across_latency = hops * hop + np.where(group.ranks_per_node > 1.0, latency, curve.latency[0])
    across = _p_norm(across_latency, traffic / ring_bandwidth, np.full_like(exponent, _INTER_NODE_EXPONENT))
    return np.where(group.size <= 1.0, 0.0, np.where(nodes > 1.0, across, inside))


def send_time(
    num_bytes: FloatColumn,
    crosses_nodes: FloatColumn,
    cluster: ClusterSpec,
    inter_node_efficiency: float,
) -> FloatColumn:
    """Return the seconds of one point-to-point message.

    ``crosses_nodes`` is 1 where sender and receiver sit on different nodes, 0 inside a node [share of plans].
    Each rank of a stage sends its own part through its own NIC.
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
    return np.where(num_bytes <= 0.0, 0.0, np.where(crosses_nodes > 0.0, across, inside))


def _p_norm(latency: FloatColumn, transfer: FloatColumn, exponent: FloatColumn) -> FloatColumn:
    """Return ``(latency**p + transfer**p) ** (1/p)`` without overflow."""
    longer, shorter = np.maximum(latency, transfer), np.minimum(latency, transfer)
    ratio: FloatColumn = (shorter / np.maximum(longer, 1e-30)) ** exponent
    return longer * (1.0 + ratio) ** (1.0 / exponent)
