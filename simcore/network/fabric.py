"""A cluster's physical network: directed links with capacities, and the links between two GPUs.

Inside a node every GPU has one link into the switch and one out of it, or one to each peer of a mesh. NICs are
gathered into rails, one up and one down link each; a tier of switches has links up from and down to each of its
groups, per rail where the fabric is rail-optimized. Islands add one link per node towards the others, a measured
matrix one link per pair of nodes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError, did_you_mean
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.hardware_specs.topology import ClusterTopology, TierSpec

__all__ = ["Fabric", "FabricShape", "UplinkRouting", "cluster_fabric", "mixed_bits"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
WordArray = NDArray[np.uint64]
UplinkRouting = Literal["adaptive", "ecmp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricShape:
    """What the network is made of, in plain numbers.

    Parameters
    ----------
    num_nodes, gpus_per_node : int
        Nodes, and GPUs in each.
    gpu_bandwidth, gpu_latency : float
        Of one GPU to its peers in the node, per direction, and one way [B/s] [s].
    is_mesh : bool
        Whether a pair of GPUs owns ``gpu_bandwidth / (gpus_per_node - 1)`` instead of a switch joining all.
    node_bandwidth, network_latency : float
        Of all NICs of one node, per direction, and one way between two nodes [B/s] [s].
    num_rails : int
        NICs of a node that switches see apart; GPU ``g`` sends through rail ``g * num_rails // gpus_per_node``.
    cable_bandwidth : float
        One cable between two switches; how many an uplink has decides what a hash can collide on [B/s].
    is_rail_optimized : bool
        Whether rail ``i`` of every node shares switches; data changes rails inside the sending node then (PXN).
    topology : ClusterTopology
        Tiers, islands, measured links.
    """

    num_nodes: int
    gpus_per_node: int
    gpu_bandwidth: float
    gpu_latency: float
    is_mesh: bool = False
    node_bandwidth: float
    network_latency: float
    num_rails: int
    cable_bandwidth: float
    is_rail_optimized: bool = True
    topology: ClusterTopology = field(default_factory=ClusterTopology)

    def __post_init__(self) -> None:
        for name in ("gpu_bandwidth", "node_bandwidth", "cable_bandwidth"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0.0):
                raise SpecError(f"fabric: {name} must be above 0")
        if min(self.num_nodes, self.gpus_per_node) < 1 or not 1 <= self.num_rails <= self.gpus_per_node:
            raise SpecError("fabric: it needs nodes and GPUs, and 1 to gpus_per_node rails")
        self.topology.check_fits(self.num_nodes)

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.num_nodes * self.gpus_per_node


class Fabric:
    """The links of a shape, and routes over them.

    Parameters
    ----------
    shape : FabricShape
        What to build.
    routing : UplinkRouting
        ``adaptive`` spreads every flow over all cables of an uplink; ``ecmp`` hashes it onto one.
    seed : int
        Of the hash; flows collide differently for every seed.

    Attributes
    ----------
    capacity : FloatArray
        Of each directed link, ``(num_links,)`` [B/s].
    kind : IntArray
        Block each link belongs to, ``(num_links,)``; index into ``kinds``.
    kinds : tuple[str, ...]
        ``gpu up``, ``rail down``, ``leaf up``, ...

    Notes
    -----
    The uplinks of a group carry its nodes' bandwidth over the product of the oversubscriptions up to its tier,
    as :meth:`ClusterTopology.pair_links` has it.
    """

    def __init__(self, shape: FabricShape, *, routing: UplinkRouting = "adaptive", seed: int = 0) -> None:
        self.shape = shape
        self.routing: UplinkRouting = routing
        self.seed = seed
        self._start: dict[str, int] = {}
        self._blocks: list[FloatArray] = []
        self._cables: dict[str, IntArray] = {}
        self._add_node_links()
        self._add_tiers()
        self._add_pair_links()
        self.kinds = tuple(self._start)
        self.capacity: FloatArray = np.concatenate(self._blocks)
        sizes = [len(block) for block in self._blocks]
        self.kind: IntArray = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
        self._is_failed = np.zeros(len(self.capacity), dtype=bool)

    @property
    def num_links(self) -> int:
        """Directed links."""
        return len(self.capacity)

    def links_of(self, kind: str) -> IntArray:
        """Return the ids of the links of one kind, in order of node, then GPU, rail, group or cable.

        Raises
        ------
        SpecError
            If the fabric has no such links; names those it has.
        """
        if kind not in self._start:
            known = ", ".join(f"'{each}'" for each in self.kinds)
            raise SpecError(
                f"fabric: no links of kind '{kind}'{did_you_mean(kind, self.kinds) or '.'} The kinds of this cluster are {known}"
            )
        return np.flatnonzero(self.kind == self.kinds.index(kind)).astype(np.int64)

    def with_capacity_factors(self, factors: Mapping[int, float]) -> Fabric:
        """Return the same network with some links slower, or failed where the factor is 0.

        A hash avoids failed cables; any other route over a failed link is refused by :meth:`routes`.

        Raises
        ------
        SpecError
            If a link does not exist or a factor is not within 0 and 1.
        """
        changed = Fabric(self.shape, routing=self.routing, seed=self.seed)
        changed.capacity = self.capacity.copy()
        changed._is_failed = self._is_failed.copy()
        for link, factor in factors.items():
            if not 0 <= link < self.num_links:
                raise SpecError(f"fabric: no link {link}; links are 0 to {self.num_links - 1}")
            if not 0.0 <= factor <= 1.0:
                raise SpecError(
                    f"fabric: the capacity factor of link {link} must be within 0 and 1, not {factor:g}"
                )
            changed._is_failed[link] |= factor == 0.0
            changed.capacity[link] *= factor or 1.0
        return changed

    def with_background(self, kind: str, share: float) -> Fabric:
        """Return the same network with a share of every link of one kind taken by somebody else's traffic."""
        if not 0.0 <= share < 1.0:
            raise SpecError(f"fabric: background load must be at least 0 and below 1, not {share:g}")
        return self.with_capacity_factors({int(link): 1.0 - share for link in self.links_of(kind)})

    def route(self, source: int, destination: int, channel: int = 0) -> tuple[int, ...]:
        """Return the links from one GPU to another, in order; none to itself.

        ``channel`` tells flows of the same pair apart for the hash, as ports do.
        """
        row = self.routes(np.array([source]), np.array([destination]), np.array([channel]))[0]
        return tuple(int(link) for link in row if link >= 0)

    def routes(self, sources: IntArray, destinations: IntArray, channels: IntArray | None = None) -> IntArray:
        """Return the links of many flows, ``(num_flows, longest)``, unused places -1.

        Raises
        ------
        SpecError
            If a GPU does not exist or a flow cannot avoid a failed link.
        """
        shape = self.shape
        for name, gpus in (("source", sources), ("destination", destinations)):
            if len(gpus) and (int(gpus.min()) < 0 or int(gpus.max()) >= shape.num_gpus):
                raise SpecError(f"fabric: {name}s must be GPUs 0 to {shape.num_gpus - 1}")
        channels = np.zeros(len(sources), dtype=np.int64) if channels is None else channels
        from_node, to_node = sources // shape.gpus_per_node, destinations // shape.gpus_per_node
        from_gpu, to_gpu = sources % shape.gpus_per_node, destinations % shape.gpus_per_node
        from_rail = from_gpu * shape.num_rails // shape.gpus_per_node
        to_rail = to_gpu * shape.num_rails // shape.gpus_per_node
        crosses = from_node != to_node
        columns = []
        # Inside a node to the peer; across nodes to the local GPU on the receiver's rail, if rails must change.
        peer = np.where(crosses, -(-to_rail * shape.gpus_per_node // shape.num_rails), to_gpu)
        changes_rail = crosses & (from_rail != to_rail) & shape.is_rail_optimized
        is_local = changes_rail | (~crosses & (from_gpu != to_gpu))
        if shape.is_mesh:
            pair = (from_node * shape.gpus_per_node + from_gpu) * shape.gpus_per_node + peer
            columns.append(self._column("gpu pair", pair, is_local))
        else:
            columns.append(self._column("gpu up", sources, is_local))
            columns.append(self._column("gpu down", from_node * shape.gpus_per_node + peer, is_local))
        out_rail = to_rail if shape.is_rail_optimized else from_rail
        columns.append(self._column("rail up", from_node * shape.num_rails + out_rail, crosses))
        flow = mixed_bits(np.stack([sources, destinations, channels]).astype(np.uint64), self.seed)
        for tier in self._tiers:
            from_group, to_group = from_node // tier.nodes_per_group, to_node // tier.nodes_per_group
            leaves = from_group != to_group
            for direction, group in (("up", from_group), ("down", to_group)):
                columns.append(self._uplink(f"{tier.name} {direction}", group, out_rail, flow, leaves))
        if "island up" in self._start:
            island = shape.topology.island_of_node(shape.num_nodes)
            leaves = island[from_node] != island[to_node]
            columns.append(self._column("island up", from_node, leaves))
            columns.append(self._column("island down", to_node, leaves))
        if "node pair" in self._start:
            columns.append(self._column("node pair", from_node * shape.num_nodes + to_node, crosses))
        columns.append(self._column("rail down", to_node * shape.num_rails + to_rail, crosses))
        found = np.stack(columns, axis=1)
        broken = self._is_failed[np.maximum(found, 0)] & (found >= 0)
        if broken.any():
            flow_index, column = (int(each) for each in np.argwhere(broken)[0])
            link = int(found[flow_index, column])
            is_bundle = self.routing == "adaptive" and self.kinds[int(self.kind[link])] in self._cables
            raise SpecError(
                f"fabric: GPU {int(sources[flow_index])} cannot reach GPU {int(destinations[flow_index])}: "
                f"link '{self.link_name(link)}' has failed; "
                + (
                    "under adaptive routing that is a whole uplink: make it slower, or fail a cable under ecmp"
                    if is_bundle
                    else "leave out the GPUs behind it"
                )
            )
        return found

    def links_out(self, share: FloatArray) -> tuple[IntArray, FloatArray]:
        """Return the links from nodes to what sits above the fabric, storage for one, and the flows on each.

        ``share`` says how large the flow of each NIC of a node is, ``(num_nodes,)``; uplinks spread all alike.
        """
        shape = self.shape
        planes = shape.num_rails if shape.is_rail_optimized else 1
        links, flows = [self.links_of("rail up")], [np.repeat(share, shape.num_rails)]
        for tier in self._tiers:
            kind = f"{tier.name} up"
            group = np.arange(shape.num_nodes) // tier.nodes_per_group
            bundles = np.repeat(np.bincount(group, weights=share) * shape.num_rails / planes, planes)
            counts = np.diff(self._cables[kind])
            links.append(self.links_of(kind))
            flows.append(np.repeat(bundles / counts, counts))
        return np.concatenate(links), np.concatenate(flows)

    def link_name(self, link: int) -> str:
        """Return what users call a link: its kind and its number among those."""
        kind = self.kinds[int(self.kind[link])]
        return f"{kind} {link - self._start[kind]}"

    def link_number(self, name: str) -> int:
        """Return the id of a link by what :meth:`link_name` calls it.

        Raises
        ------
        SpecError
            If there is no such link.
        """
        kind, _, number = name.strip().rpartition(" ")
        if kind not in self._start:
            known = ", ".join(f"'{each}'" for each in self.kinds)
            raise SpecError(
                f"no link '{name}'{did_you_mean(kind, self.kinds) or '.'} Write its kind and number, 'rail up 3'; the "
                f"kinds are {known}"
            )
        links = self.links_of(kind)
        # Longer numbers than any link has are not even read.
        if not number.isdecimal() or len(number) > 9 or int(number) >= len(links):
            raise SpecError(f"no link '{name}': '{kind}' has links 0 to {len(links) - 1}")
        return int(links[int(number)])

    def latencies(self, sources: IntArray, destinations: IntArray) -> FloatArray:
        """Return the one-way latency between pairs of GPUs, 0 to itself [s]."""
        shape, topology = self.shape, self.shape.topology
        from_node, to_node = sources // shape.gpus_per_node, destinations // shape.gpus_per_node
        if topology.matrix is not None:
            across = topology.matrix.latency[from_node, to_node]
        else:
            across = np.full(len(sources), shape.network_latency)
            island = topology.island_of_node(shape.num_nodes)
            for number, each in enumerate(topology.islands):
                if each.latency is not None:
                    across[(island[from_node] == number) & (island[to_node] == number)] = each.latency
            for tier in self._tiers:
                across[from_node // tier.nodes_per_group != to_node // tier.nodes_per_group] += tier.latency
            if topology.island_latency is not None:
                leaves = island[from_node] != island[to_node]
                across[leaves] = np.maximum(across[leaves], topology.island_latency)
        inside = np.where(sources == destinations, 0.0, shape.gpu_latency)
        return np.where(from_node == to_node, inside, across)

    @property
    def _tiers(self) -> tuple[TierSpec, ...]:
        # A measured matrix replaces what tiers say of pairs.
        return () if self.shape.topology.matrix is not None else self.shape.topology.tiers

    def _column(self, kind: str, index: IntArray, is_crossed: NDArray[np.bool_]) -> IntArray:
        return np.where(is_crossed, self._start[kind] + index, -1).astype(np.int64)

    def _uplink(
        self, kind: str, group: IntArray, rail: IntArray, flow: WordArray, is_crossed: NDArray[np.bool_]
    ) -> IntArray:
        planes = self.shape.num_rails if self.shape.is_rail_optimized else 1
        bundle = group * planes + (rail if planes > 1 else 0)
        first = self._cables[kind]
        if self.routing == "adaptive":
            return self._column(kind, bundle, is_crossed)
        cables = np.arange(first[-1])
        is_alive = ~self._is_failed[self._start[kind] + cables]
        # A bundle of failed cables keeps them, for the route to be refused by name.
        has_alive = np.add.reduceat(is_alive, first[:-1]) > 0
        usable = cables[is_alive | ~np.repeat(has_alive, np.diff(first))]
        begin = np.searchsorted(usable, first)
        hashed = mixed_bits(np.stack([flow, bundle.astype(np.uint64)]), self._start[kind])
        choices = np.diff(begin)[bundle].astype(np.uint64)
        return self._column(kind, usable[begin[bundle] + (hashed % choices).astype(np.int64)], is_crossed)

    def _add(self, kind: str, capacity: FloatArray) -> None:
        if kind in self._start:
            raise SpecError(f"fabric: two kinds of links would be called '{kind}'; rename the tier")
        self._start[kind] = sum(len(block) for block in self._blocks)
        self._blocks.append(np.asarray(capacity, dtype=np.float64))

    def _node_bandwidth(self) -> FloatArray:
        shape = self.shape
        bandwidth = np.full(shape.num_nodes, shape.node_bandwidth)
        island = shape.topology.island_of_node(shape.num_nodes)
        for number, each in enumerate(shape.topology.islands):
            if each.bandwidth is not None:
                bandwidth[island == number] = each.bandwidth
        return bandwidth

    def _add_node_links(self) -> None:
        shape = self.shape
        if shape.is_mesh:
            pairs = shape.num_gpus * shape.gpus_per_node
            self._add("gpu pair", np.full(pairs, shape.gpu_bandwidth / max(1, shape.gpus_per_node - 1)))
        else:
            for kind in ("gpu up", "gpu down"):
                self._add(kind, np.full(shape.num_gpus, shape.gpu_bandwidth))
        for kind in ("rail up", "rail down"):
            self._add(kind, np.repeat(self._node_bandwidth() / shape.num_rails, shape.num_rails))

    def _add_tiers(self) -> None:
        shape = self.shape
        planes = shape.num_rails if shape.is_rail_optimized else 1
        passed = self._node_bandwidth()
        for tier in self._tiers:
            passed = passed / tier.oversubscription
            group = np.arange(shape.num_nodes) // tier.nodes_per_group
            bundles = np.repeat(np.bincount(group, weights=passed) / planes, planes)
            # Cables run at the speed of NICs, so a bundle has about as many as it carries NICs' worth.
            counts = np.maximum(1, np.rint(bundles / shape.cable_bandwidth)).astype(np.int64)
            if self.routing == "adaptive":
                counts = np.ones(len(bundles), dtype=np.int64)
            for direction in ("up", "down"):
                kind = f"{tier.name} {direction}"
                self._cables[kind] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
                self._add(kind, np.repeat(bundles / counts, counts))

    def _add_pair_links(self) -> None:
        topology = self.shape.topology
        if topology.matrix is not None:
            # The diagonal is never crossed; it only has to be a capacity.
            own = np.eye(self.shape.num_nodes, dtype=bool)
            self._add(
                "node pair", np.where(own, self.shape.node_bandwidth, topology.matrix.bandwidth).ravel()
            )
        elif topology.island_bandwidth is not None and topology.islands:
            for kind in ("island up", "island down"):
                self._add(kind, np.full(self.shape.num_nodes, topology.island_bandwidth))


def cluster_fabric(
    cluster: ClusterSpec,
    *,
    intra_efficiency: float = 1.0,
    inter_efficiency: float = 1.0,
    routing: UplinkRouting = "adaptive",
    seed: int = 0,
) -> Fabric:
    """Return the network of a cluster.

    Parameters
    ----------
    cluster : ClusterSpec
        Nodes, fabric and topology; peaks of data sheets.
    intra_efficiency, inter_efficiency : float
        Share of those peaks that transfers reach inside a node and through NICs; a calibration knows them.
    routing, seed
        As :class:`Fabric` takes them.

    Notes
    -----
    Without tiers nobody knows how many nodes share a leaf; a fabric's own oversubscription is then every node's.
    DGX-1's hybrid cube mesh counts as a switch, which its rings reach and its distant pairs do not.
    """
    for name, value in (("intra_efficiency", intra_efficiency), ("inter_efficiency", inter_efficiency)):
        if not 0.0 < value <= 1.0:
            raise SpecError(f"fabric: {name} must be above 0 and at most 1, not {value:g}")
    cluster.require_one_kind("a network of flows")
    node, fabric = cluster.node, cluster.fabric
    topology = cluster.topology or ClusterTopology()
    if not topology.tiers and topology.matrix is None and fabric.oversubscription > 1.0:
        tier = TierSpec(name="uplink", nodes_per_group=1, oversubscription=fabric.oversubscription)
        topology = ClusterTopology(
            tiers=(tier,),
            islands=topology.islands,
            island_bandwidth=topology.island_bandwidth,
            island_latency=topology.island_latency,
            hosts=topology.hosts,
        )
    nic = node.nic.bandwidth_bytes_per_second * inter_efficiency
    shape = FabricShape(
        num_nodes=cluster.num_nodes,
        gpus_per_node=node.num_gpus,
        gpu_bandwidth=node.intra_link.bandwidth_bytes_per_second * intra_efficiency,
        gpu_latency=node.intra_link.latency,
        is_mesh=node.topology == "mesh",
        node_bandwidth=node.num_nics * nic,
        network_latency=fabric.latency,
        num_rails=min(node.num_nics, node.num_gpus),
        cable_bandwidth=nic,
        is_rail_optimized=fabric.is_rail_optimized,
        topology=topology,
    )
    return Fabric(shape, routing=routing, seed=seed)


def mixed_bits(words: WordArray, seed: int) -> WordArray:
    """Return one well-mixed word per column of ``words``, ``(num_words, num_columns)``.

    The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), chained over the rows.
    """
    state = np.full(words.shape[1], np.uint64(seed % 2**64), dtype=np.uint64)
    for row in words:
        state = state + np.uint64(0x9E3779B97F4A7C15) + row
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
