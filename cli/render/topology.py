"""Topologies as text: tiers of switches, what crosses them, and the slowest pairs."""

from __future__ import annotations

import numpy as np

from meshwright.hardware_specs.importers import ImportedTopology
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.simcore.network.collectives import Algorithm, collective_flow_time
from meshwright.simcore.network.fabric import cluster_fabric
from meshwright.units import format_quantity

__all__ = ["import_text", "topology_lines", "topology_summary"]

# Large enough that bandwidth counts, as nccl-tests' usual largest sizes are.
_ALL_REDUCE_BYTES = 2.0**30
_ALGORITHMS: dict[Algorithm, str] = {
    "ring": "rings through all nodes",
    "pipelined_hierarchical": "inside nodes, then across",
}


def topology_summary(cluster: ClusterSpec) -> dict[str, object]:
    """Return bisection and bottlenecks as plain data, SI units in the key names."""
    num_nodes = cluster.num_nodes
    bandwidth = cluster.node.num_nics * cluster.node.nic.bandwidth_bytes_per_second
    summary: dict[str, object] = {"node_bandwidth_bytes_per_second": bandwidth}
    if cluster.topology is None:
        # A flat fabric needs no table of all pairs, which of ten thousand nodes would take gigabytes.
        if num_nodes > 1:
            summary["bisection_bytes_per_second"] = num_nodes // 2 * bandwidth
        return summary
    links = cluster.pair_links
    # Flows of collectives run between nodes of one kind.
    if cluster.num_gpus > 1 and not cluster.is_mixed:
        fabric, ranks = cluster_fabric(cluster), range(cluster.num_gpus)
        moved = 2.0 * (cluster.num_gpus - 1) / cluster.num_gpus * _ALL_REDUCE_BYTES
        summary["all_reduce_bus_bytes_per_second"] = {
            algorithm: moved / collective_flow_time(fabric, "all_reduce", algorithm, ranks, _ALL_REDUCE_BYTES)
            for algorithm in _ALGORITHMS
        }
    if num_nodes < 2:
        return summary
    pairs = links.bandwidth[~np.eye(num_nodes, dtype=bool)]
    half = num_nodes // 2
    # Every node of the smaller half sends to one of the other half at once.
    across = links.bandwidth[:half, half : 2 * half]
    summary |= {
        "bisection_bytes_per_second": float(np.minimum(bandwidth, across.diagonal()).sum()),
        "slowest_pair_bytes_per_second": float(pairs.min()),
        "median_pair_bytes_per_second": float(np.median(pairs)),
        "fastest_pair_bytes_per_second": float(pairs.max()),
    }
    return summary


def topology_lines(cluster: ClusterSpec) -> list[str]:
    """Return the lines that draw a cluster's tiers, lowest first, with bisection and bottlenecks."""
    summary = topology_summary(cluster)
    bandwidth = float(str(summary["node_bandwidth_bytes_per_second"]))
    topology = cluster.topology
    lines = [
        f"{count} x {kind.id}: {kind.num_gpus} GPUs{f' {kind.gpu.id}' if cluster.is_mixed else ''}, {kind.num_nics} NICs, "
        f"{_rate(kind.nic_bandwidth)} per node"
        for kind, count in zip(
            cluster.kinds, np.bincount(cluster.kind_of_node, minlength=len(cluster.kinds)), strict=True
        )
    ]
    passed = bandwidth
    for depth, tier in enumerate(topology.tiers if topology else (), 1):
        groups = -(-cluster.num_nodes // tier.nodes_per_group)
        passed /= tier.oversubscription
        lines.append(
            f"{'  ' * depth}{tier.name}: {groups} groups of {tier.nodes_per_group} nodes, oversubscription "
            f"{tier.oversubscription:g}: {_rate(passed)} per node beyond"
        )
    for island in topology.islands if topology else ():
        kind = island.node or cluster.node
        inside = _rate(kind.nic_bandwidth if island.bandwidth is None else island.bandwidth)
        of_kind = f" of {kind.id}" if cluster.is_mixed else ""
        lines.append(f"  island {island.name}: {island.num_nodes} nodes{of_kind}, {inside} per node inside")
    if topology and topology.island_bandwidth is not None:
        lines.append(f"  between islands: {_rate(topology.island_bandwidth)} per node")
    if topology and topology.matrix is not None:
        lines.append("  links of all pairs measured")
    by_algorithm = summary.get("all_reduce_bus_bytes_per_second")
    if isinstance(by_algorithm, dict):
        best = max(by_algorithm, key=by_algorithm.__getitem__)
        lines.append(
            f"all-reduce of 1 GiB over all GPUs: {_rate(by_algorithm[best])} bus bandwidth "
            f"({_ALGORITHMS[best]}; flows at the peaks of data sheets)"
        )
    if cluster.num_nodes > 1:
        lines.append(
            f"bisection (first half to second half): {_rate(float(str(summary['bisection_bytes_per_second'])))}"
        )
    if topology is not None and cluster.num_nodes > 1:
        slowest, median, fastest = (
            _rate(float(str(summary[f"{name}_pair_bytes_per_second"])))
            for name in ("slowest", "median", "fastest")
        )
        lines.append(f"pairs of nodes: slowest {slowest}, median {median}, fastest {fastest}")
        if slowest == fastest:
            return lines
        links = cluster.pair_links.bandwidth + np.diag(np.full(cluster.num_nodes, np.inf))
        sender, receiver = (int(each) for each in np.unravel_index(int(np.argmin(links)), links.shape))
        lines.append(f"bottleneck: {_host(cluster, sender)} to {_host(cluster, receiver)}")
    return lines


def import_text(imported: ImportedTopology, title: str, yaml_text: str, more: tuple[str, ...]) -> str:
    """Return a cluster file with what was guessed as comments at its top."""
    notes = "".join(f"# guessed: {sentence}\n" for sentence in (*imported.guesses, *more))
    return f"# written by meshwright from {title}\n{notes}{yaml_text}"


def _host(cluster: ClusterSpec, node: int) -> str:
    hosts = cluster.topology.hosts if cluster.topology else ()
    return hosts[node] if hosts else f"node {node}"


def _rate(bytes_per_second: float) -> str:
    return format_quantity(bytes_per_second, "bytes_per_second", 4)
