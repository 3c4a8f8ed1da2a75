"""SimAI's ns-3 topology: every GPU, switch and cable by number.

Format: aliyun/SimAI, ``astra-sim-alibabacloud/inputs/topo/gen_Topo_Template.py``: first ``nodes gpus_per_server
nvswitches switches links gpu_type``, then the ids of all switches, NVSwitches first, then one ``source destination
bandwidth latency error_rate`` per cable, which carries that bandwidth each way.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.hardware_specs.topology import ClusterTopology, TierSpec

__all__ = ["topology_text", "unsupported"]

# SimAI picks NCCL's algorithm by these; another GPU of the architecture takes the first of it.
_GPU_TYPES = {"ampere": ("A100", "A800"), "hopper": ("H100", "H800", "H20")}


def unsupported(cluster: ClusterSpec) -> tuple[str, ...]:
    """Return every reason why servers with NVSwitches below a tree of switches are not this cluster."""
    node, topology = cluster.node, cluster.topology or ClusterTopology()
    reasons = []
    if node.topology in ("mesh", "hybrid_cube_mesh"):
        reasons.append("GPUs of a server meet in NVSwitches; direct links between them have no place")
    if node.num_nics < node.num_gpus:
        reasons.append(f"every GPU has a NIC of its own; {node.num_gpus} GPUs share {node.num_nics} here")
    if _gpu_type(cluster) is None:
        known = ", ".join(name for names in _GPU_TYPES.values() for name in names)
        reasons.append(f"it knows the GPUs {known}, and nothing like {cluster.gpu.id}")
    if topology.matrix is not None:
        reasons.append("links are cables between switches; a matrix of measured pairs does not show them")
    if topology.islands:
        reasons.append("islands name what a node gets of the links between them, not the cables")
    return tuple(reasons)


def topology_text(cluster: ClusterSpec) -> str:
    """Return the topology file.

    Notes
    -----
    The uplinks of a switch are one cable as wide as all of them, as adaptive routing would fill them. A latency between
    two ends is halved over the cables that meet in the middle. Rails meet in a switch of their own above all tiers.
    """
    node = cluster.node
    cables: list[str] = []
    num_nvswitches = cluster.num_nodes if node.num_gpus > 1 else 0
    if num_nvswitches:
        link = node.intra_link
        for gpu in range(cluster.num_gpus):
            nvswitch = cluster.num_gpus + gpu // node.num_gpus
            cables.append(_cable(gpu, nvswitch, link.bandwidth_bytes_per_second, link.latency / 2.0))
    first_switch = cluster.num_gpus + num_nvswitches
    num_switches = _add_tree(cluster, first_switch, cables) if cluster.num_nodes > 1 else 0
    num_all = first_switch + num_switches
    header = (num_all, node.num_gpus, num_nvswitches, num_switches, len(cables), _gpu_type(cluster))
    lines = [
        " ".join(str(field) for field in header),
        " ".join(str(switch) for switch in range(cluster.num_gpus, num_all)),
        *cables,
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """Something below a switch: its number, a node below it, its rail, and its cable upwards."""

    number: int
    node: int
    rail: int
    bandwidth: float
    latency: float


def _add_tree(cluster: ClusterSpec, first_switch: int, cables: list[str]) -> int:
    """Append the cables of all switches between nodes; return how many switches there are."""
    node, fabric = cluster.node, cluster.fabric
    tiers = cluster.topology.tiers if cluster.topology else ()
    nic = node.nic_bandwidth_per_gpu
    if not tiers:
        # Nobody knows how many nodes share a leaf: a rail is one switch, the fabric's oversubscription every node's.
        nic /= fabric.oversubscription
        tiers = (TierSpec(name="rail", nodes_per_group=cluster.num_nodes),)
    ends = [
        _End(
            number=gpu,
            node=gpu // node.num_gpus,
            rail=gpu % node.num_gpus if fabric.is_rail_optimized else 0,
            bandwidth=nic,
            latency=fabric.latency / 2.0,
        )
        for gpu in range(cluster.num_gpus)
    ]
    next_switch = first_switch
    for tier in (*tiers, None):
        if len(ends) == 1:
            break
        groups: dict[tuple[int, int], list[_End]] = {}
        for end in ends:
            key = (0, 0) if tier is None else (end.node // tier.nodes_per_group, end.rail)
            groups.setdefault(key, []).append(end)
        ends = []
        for members in groups.values():
            cables += [_cable(end.number, next_switch, end.bandwidth, end.latency) for end in members]
            ends.append(
                _End(
                    number=next_switch,
                    node=members[0].node,
                    rail=members[0].rail,
                    bandwidth=sum(end.bandwidth for end in members)
                    / (tier.oversubscription if tier else 1.0),
                    latency=tier.latency / 2.0 if tier else 0.0,
                )
            )
            next_switch += 1
    return next_switch - first_switch


def _gpu_type(cluster: ClusterSpec) -> str | None:
    names = _GPU_TYPES.get(cluster.gpu.architecture, ())
    own = cluster.gpu.id.split("-")[0].upper()
    return own if own in names else next(iter(names), None)


def _cable(source: int, destination: int, bandwidth: float, latency: float) -> str:
    # Twelve digits drop what scaling by powers of ten left.
    return f"{source} {destination} {bandwidth * 8e-9:.12g}Gbps {latency * 1e3:.12g}ms 0"
