"""How the nodes of a cluster are joined: tiers of switches, islands behind slower links, or a measured matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError

if TYPE_CHECKING:
    from meshwright.hardware_specs.specs import NodeSpec

__all__ = ["ClusterTopology", "IslandSpec", "LinkMatrix", "TierSpec", "group_bottleneck"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSpec:
    """One level of switches: nodes below the same switch (or block of switches) reach each other through it.

    Parameters
    ----------
    name : str
        ``leaf``, ``spine``, ``block``, ...
    nodes_per_group : int
        Consecutive nodes below one group of this level.
    oversubscription : float
        Bandwidth of a group's nodes over that of its links upwards; 1 is non-blocking.
    latency : float
        Added one way by passing up through this level and down again [s].
    """

    name: str
    nodes_per_group: int
    oversubscription: float = 1.0
    latency: float = 0.0

    def __post_init__(self) -> None:
        if self.nodes_per_group < 1:
            raise SpecError(
                f"topology: tier '{self.name}' must hold at least 1 node, not {self.nodes_per_group}"
            )
        if not (math.isfinite(self.oversubscription) and self.oversubscription >= 1.0):
            raise SpecError(
                f"topology: tier '{self.name}': oversubscription must be 1 (non-blocking) or more, "
                f"not {self.oversubscription:g}"
            )
        if not (math.isfinite(self.latency) and self.latency >= 0.0):
            raise SpecError(f"topology: tier '{self.name}': latency must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class IslandSpec:
    """Nodes with a fabric of their own.

    Parameters
    ----------
    name : str
        What its owners call it.
    num_nodes : int
        Consecutive nodes.
    node : NodeSpec | None
        What its nodes are; None is the cluster's node.
    bandwidth : float | None
        Of one node into this fabric, per direction; None is the NICs of its node [B/s].
    latency : float | None
        One way between two of its nodes; None is the cluster's fabric's [s].
    """

    name: str
    num_nodes: int
    node: NodeSpec | None = field(default=None, hash=False)
    bandwidth: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        if self.num_nodes < 1:
            raise SpecError(f"topology: island '{self.name}' must hold at least 1 node, not {self.num_nodes}")
        for name in ("bandwidth", "latency"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise SpecError(f"topology: island '{self.name}': {name} must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinkMatrix:
    """Bandwidth and latency from every node to every other, as pairwise send and receive measured them.

    Parameters
    ----------
    bandwidth : FloatArray
        Per direction, ``(num_nodes, num_nodes)``; the diagonal is not read [B/s].
    latency : FloatArray
        One way, same shape [s].
    """

    bandwidth: FloatArray
    latency: FloatArray

    def __post_init__(self) -> None:
        num_nodes = len(self.bandwidth)
        off_diagonal = ~np.eye(num_nodes, dtype=bool)
        for name, matrix in (("bandwidth", self.bandwidth), ("latency", self.latency)):
            if matrix.shape != (num_nodes, num_nodes):
                raise SpecError(f"topology: the {name} matrix must be square, not {matrix.shape}")
            if not np.all(np.isfinite(matrix[off_diagonal])) or np.any(matrix[off_diagonal] < 0.0):
                raise SpecError(f"topology: every {name} must be finite and not negative")
        silent = np.argwhere((self.bandwidth <= 0.0) & off_diagonal)
        if len(silent):
            sender, receiver = (int(each) for each in silent[0])
            raise SpecError(
                f"topology: node {sender} does not reach node {receiver} (bandwidth 0); a cluster must be connected: "
                "leave out nodes that are down"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LinkMatrix):
            return NotImplemented
        return np.array_equal(self.bandwidth, other.bandwidth) and np.array_equal(self.latency, other.latency)

    def __hash__(self) -> int:
        return hash((self.bandwidth.tobytes(), self.latency.tobytes()))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterTopology:
    """What lies between the nodes of a cluster, beyond one flat fabric.

    Parameters
    ----------
    tiers : tuple[TierSpec, ...]
        Levels of switches, lowest first, each a multiple of the one below.
    islands : tuple[IslandSpec, ...]
        Parts with fabrics of their own, in the order of the nodes; empty or together all nodes.
    island_bandwidth, island_latency : float | None
        Of one node to another island, per direction and one way [B/s] [s].
    matrix : LinkMatrix | None
        Measured links; where given, they replace what tiers and islands say of pairs.
    hosts : tuple[str, ...]
        Names of the nodes, in order; empty where unknown.
    gpu_links : tuple[tuple[float, ...], ...] | None
        Between the GPUs of every node where pairs differ, per direction, one row per GPU; the diagonal is not read
        [B/s].
    """

    tiers: tuple[TierSpec, ...] = ()
    islands: tuple[IslandSpec, ...] = ()
    island_bandwidth: float | None = None
    island_latency: float | None = None
    matrix: LinkMatrix | None = None
    hosts: tuple[str, ...] = ()
    gpu_links: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        for below, above in zip(self.tiers, self.tiers[1:], strict=False):
            if (
                above.nodes_per_group % below.nodes_per_group
                or above.nodes_per_group == below.nodes_per_group
            ):
                raise SpecError(
                    f"topology: tier '{above.name}' holds {above.nodes_per_group} nodes, which is no multiple of the "
                    f"{below.nodes_per_group} of tier '{below.name}'; list tiers from the lowest up"
                )
        if len(self.islands) == 1:
            raise SpecError("topology: one island is the whole cluster; leave 'islands' out")
        if self.islands and self.island_bandwidth is None:
            raise SpecError("topology: islands need 'island_bandwidth', a node's bandwidth to other islands")
        names = [island.name for island in self.islands]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise SpecError(f"topology: two islands are named '{min(twice)}'; give each a name of its own")
        for name in ("island_bandwidth", "island_latency"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise SpecError(f"topology: {name} must be above 0")
        _check_gpu_links(self.gpu_links or ())
        repeated = {host for host in self.hosts if self.hosts.count(host) > 1}
        if repeated:
            raise SpecError(f"topology: host '{min(repeated)}' is named twice")

    def check_fits(self, num_nodes: int) -> None:
        """Raise where the topology is not one of so many nodes.

        Raises
        ------
        SpecError
            If islands, matrix or host names cover another number of nodes.
        """
        covered = {
            "the islands hold": sum(island.num_nodes for island in self.islands) or num_nodes,
            "the matrix has": num_nodes if self.matrix is None else len(self.matrix.bandwidth),
            "'hosts' names": len(self.hosts) or num_nodes,
        }
        for what, count in covered.items():
            if count != num_nodes:
                raise SpecError(f"topology: {what} {count} nodes, the cluster has {num_nodes}")

    def island_of_node(self, num_nodes: int) -> NDArray[np.int64]:
        """Return the island of each node, ``(num_nodes,)``; 0 for all without islands."""
        if not self.islands:
            return np.zeros(num_nodes, dtype=np.int64)
        return np.repeat(np.arange(len(self.islands)), [island.num_nodes for island in self.islands])

    def pair_links(self, num_nodes: int, node_bandwidth: float, fabric_latency: float) -> LinkMatrix:
        """Return what every pair of nodes gets of the network when all nodes send at once.

        Parameters
        ----------
        num_nodes : int
            Nodes of the cluster.
        node_bandwidth : float
            All NICs of one node of the cluster's kind, per direction [B/s].
        fabric_latency : float
            One way between two nodes [s].

        Notes
        -----
        A pair that meets in tier ``t`` shares the uplinks of every tier below with its whole group, so it is
        left with the node's bandwidth over the product of their oversubscriptions.
        """
        if self.matrix is not None:
            return self.matrix
        islands = self.island_of_node(num_nodes)
        own = [node_bandwidth if each.node is None else each.node.nic_bandwidth for each in self.islands]
        of_node = np.array(own or [node_bandwidth])[islands]
        bandwidth = np.minimum.outer(of_node, of_node)
        latency = np.full((num_nodes, num_nodes), fabric_latency)
        for number, island in enumerate(self.islands):
            inside = np.ix_(islands == number, islands == number)
            if island.bandwidth is not None:
                bandwidth[inside] = island.bandwidth
            if island.latency is not None:
                latency[inside] = island.latency
        node = np.arange(num_nodes)
        for tier in self.tiers:
            group = node // tier.nodes_per_group
            leaves = group[:, None] != group[None, :]
            bandwidth[leaves] /= tier.oversubscription
            latency[leaves] += tier.latency
        if self.islands:
            across = islands[:, None] != islands[None, :]
            assert self.island_bandwidth is not None
            bandwidth[across] = np.minimum(bandwidth[across], self.island_bandwidth)
            if self.island_latency is not None:
                latency[across] = np.maximum(latency[across], self.island_latency)
        return LinkMatrix(bandwidth=bandwidth, latency=latency)


def _check_gpu_links(links: tuple[tuple[float, ...], ...]) -> None:
    for gpu, row in enumerate(links):
        if len(row) != len(links):
            raise SpecError(
                f"topology: gpu_links must be square: GPU {gpu} has {len(row)} links of {len(links)}"
            )
        for peer, value in enumerate(row):
            if peer != gpu and not (math.isfinite(value) and value > 0.0):
                raise SpecError(f"topology: gpu_links from GPU {gpu} to GPU {peer} must be above 0")


def group_bottleneck(links: LinkMatrix, nodes: Sequence[int]) -> float:
    """Return the least bandwidth between two of some nodes [B/s]; infinite for fewer than two."""
    chosen = np.array(sorted(set(nodes)), dtype=np.int64)
    if len(chosen) < 2:
        return math.inf
    part = links.bandwidth[np.ix_(chosen, chosen)]
    return float(part[~np.eye(len(chosen), dtype=bool)].min())
