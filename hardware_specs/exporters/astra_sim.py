"""ASTRA-sim's analytical network: one line per dimension of a symmetric hierarchy.

Format: astra-sim/astra-network-analytical, ``input/*.yml``; bandwidth in GB/s (1e9) per NPU, latency in ns per hop.
"""

from __future__ import annotations

from meshwright.hardware_specs.specs import ClusterSpec

__all__ = ["network_text", "unsupported"]


def unsupported(cluster: ClusterSpec) -> tuple[str, ...]:
    """Return every reason why two dimensions, nodes and GPUs inside, are not this cluster."""
    topology = cluster.topology
    reasons = []
    if cluster.num_gpus < 2:
        reasons.append("a single GPU has no network")
    if cluster.node.topology == "hybrid_cube_mesh":
        reasons.append(
            "a dimension is a ring, a switch or fully connected; a hybrid cube mesh is none of them"
        )
    if topology is None:
        return tuple(reasons)
    if topology.matrix is not None:
        reasons.append("all links of a dimension are equal; a matrix of measured links has no such form")
    if topology.islands:
        reasons.append("all groups of a dimension are equal; islands are not")
    shared = [tier.name for tier in topology.tiers if tier.oversubscription > 1.0]
    if shared:
        reasons.append(
            "every dimension has links of its own; an oversubscribed tier "
            f"({', '.join(shared)}) shares the NICs with the one below"
        )
    return tuple(reasons)


def network_text(cluster: ClusterSpec) -> str:
    """Return the YAML of the network.

    Notes
    -----
    A switch is two hops, so its latency is halved; a fully connected dimension states the bandwidth of one link.
    """
    node = cluster.node
    notes = [
        "written by meshwright for ASTRA-sim's analytical network",
        f"{cluster.id}: {cluster.num_nodes} x {node.id}; peaks of data sheets",
    ]
    dimensions: list[tuple[str, int, float, float]] = []
    if node.num_gpus > 1:
        link = node.intra_link
        if node.topology == "mesh":
            own = link.bandwidth_bytes_per_second / (node.num_gpus - 1)
            dimensions.append(("FullyConnected", node.num_gpus, own, link.latency))
        else:
            dimensions.append(("Switch", node.num_gpus, link.bandwidth_bytes_per_second, link.latency / 2.0))
    if cluster.num_nodes > 1:
        tiers = cluster.topology.tiers if cluster.topology else ()
        latency = cluster.fabric.latency
        if tiers:
            latency += sum(tier.latency for tier in tiers if tier.nodes_per_group < cluster.num_nodes)
            notes.append("non-blocking tiers are one switch here, with the latency of passing all of them")
        scarcity = 1.0 if tiers else cluster.fabric.oversubscription
        dimensions.append(("Switch", cluster.num_nodes, node.nic_bandwidth_per_gpu / scarcity, latency / 2.0))
    kinds, counts, bandwidths, latencies = zip(*dimensions, strict=True)
    lines = [f"# {note}" for note in notes]
    lines.append(f"topology: [ {', '.join(kinds)} ]")
    lines.append(f"npus_count: [ {', '.join(str(count) for count in counts)} ]")
    lines.append(f"bandwidth: [ {', '.join(_number(value / 1e9) for value in bandwidths)} ]  # GB/s")
    lines.append(f"latency: [ {', '.join(_number(value * 1e9) for value in latencies)} ]  # ns")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    # Twelve digits drop what scaling by powers of ten left; the reader wants a decimal point.
    return repr(float(f"{value:.12g}"))
