"""What machines are: accelerators, nodes, fabrics and clusters, in SI units, each number with its source.

A GPU sits in a node; a node joins its GPUs by one scale-up domain (NVLink switch, xGMI mesh, PCIe) and
owns NICs; a fabric joins nodes; a cluster is a node type times a count. Bandwidths are per direction,
peaks are dense. What a kernel or a collective *achieves* is a calibration, never a spec.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal

from meshwright.errors import SpecError, did_you_mean

if TYPE_CHECKING:
    # It brings numpy, which no --help needs.
    from meshwright.hardware_specs.topology import ClusterTopology, LinkMatrix

__all__ = ["ClusterSpec", "FabricSpec", "GpuSpec", "HostSpec", "IntraNodeTopology", "LinkSpec", "NodeSpec"]

IntraNodeTopology = Literal["switch", "mesh", "hybrid_cube_mesh", "pcie"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """One device's attachment to a network tier.

    Parameters
    ----------
    kind : str
        ``nvlink3``, ``xgmi``, ``pcie4``, ``infiniband``, ...
    bandwidth_bytes_per_second : float
        Per direction, all lanes of the device together [B/s].
    latency : float
        One small message between two devices of the tier [s].
    """

    kind: str
    bandwidth_bytes_per_second: float
    latency: float

    def __post_init__(self) -> None:
        _require_positive("bandwidth", self.bandwidth_bytes_per_second)
        _require_positive("latency", self.latency, or_zero=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One accelerator as a process sees it (an MI250X GCD is a device of its own).

    Parameters
    ----------
    id, name, vendor, architecture : str
        Literal id (``h100-sxm-80``), printed name, maker, and the generation that calibrations fall back to.
    aliases : tuple[str, ...]
        Other spellings, the ids of measured-run tables among them.
    peak_flops_per_second : Mapping[str, float]
        Dense peak by number format (``bf16``, ``fp8``, ...), accumulating in fp32 [FLOP/s].
    memory_bytes : float
        Memory the driver reports, not the name's figure [B].
    memory_bandwidth_bytes_per_second : float
        Peak of the data sheet [B/s].
    num_sms : int
        Streaming multiprocessors, compute units or cores.
    l2_bytes : float
        Last-level cache shared by all of them [B].
    power_watts : float
        Board power limit as shipped [W].
    scale_up : LinkSpec | None
        GPU-to-GPU links inside a node; None when peers talk over ``host_link``.
    host_link : LinkSpec
        Link to the host (PCIe, NVLink-C2C).
    price_dollars_per_hour : float | None
        On-demand rent of one GPU, approximate; None when nobody rents it [$/h].
    sources : Mapping[str, str]
        Source of each number, by key of the file.
    """

    id: str
    name: str
    vendor: str
    architecture: str
    aliases: tuple[str, ...] = ()
    peak_flops_per_second: Mapping[str, float]
    memory_bytes: float
    memory_bandwidth_bytes_per_second: float
    num_sms: int
    l2_bytes: float
    power_watts: float
    scale_up: LinkSpec | None
    host_link: LinkSpec
    price_dollars_per_hour: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (
            "memory_bytes",
            "memory_bandwidth_bytes_per_second",
            "l2_bytes",
            "power_watts",
            "num_sms",
        ):
            _require_positive(name, getattr(self, name))
        for dtype, peak in self.peak_flops_per_second.items():
            _require_positive(f"peak.{dtype}", peak)

    def peak(self, precision: str) -> float:
        """Return the dense peak [FLOP/s] of a precision.

        Raises
        ------
        SpecError
            If the device has no such format; names those it has.
        """
        if precision not in self.peak_flops_per_second and precision == "fp8_block":
            # Block-scaled fp8 runs on the fp8 units.
            return self.peak("fp8")
        if precision not in self.peak_flops_per_second:
            known = ", ".join(self.peak_flops_per_second)
            raise SpecError(
                f"{self.id} has no {precision} units{did_you_mean(precision, self.peak_flops_per_second) or '.'}"
                f" It offers {known}."
            )
        return self.peak_flops_per_second[precision]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSpec:
    """The host side of a node, all its processors and drives together: what offload runs on; None where unknown.

    Parameters
    ----------
    num_sockets, num_cores : int | None
        Processors, and their physical cores together.
    memory_bandwidth_bytes_per_second : float | None
        Peak of all memory channels, reads and writes together [B/s].
    link_bandwidth_bytes_per_second : float | None
        Per direction, between a processor and the PCIe switch or root port that ``gpus_per_link`` GPUs hang
        on; None where it is as wide as a GPU's own link [B/s].
    gpus_per_link : int
        GPUs that share such a link.
    nvme_bytes : float | None
        Capacity of the local data drives [B].
    nvme_read_bytes_per_second, nvme_write_bytes_per_second : float | None
        Peak sequential bandwidth of all of them together [B/s].
    """

    num_sockets: int | None = None
    num_cores: int | None = None
    memory_bandwidth_bytes_per_second: float | None = None
    link_bandwidth_bytes_per_second: float | None = None
    gpus_per_link: int = 1
    nvme_bytes: float | None = None
    nvme_read_bytes_per_second: float | None = None
    nvme_write_bytes_per_second: float | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None:
                _require_positive(f"host.{each.name}", value)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """One scale-up domain: a server, or a rack that is one NVLink domain.

    Parameters
    ----------
    num_gpus : int
        GPUs of the domain.
    topology : IntraNodeTopology
        How they are joined: any-to-any ``switch``, direct ``mesh`` (a pair owns one link),
        ``hybrid_cube_mesh`` (DGX-1), or ``pcie``.
    nic : LinkSpec
        One NIC of the compute fabric (storage NICs are not counted).
    num_nics : int
        NICs of the compute fabric per node.
    power_watts : float
        Whole node at full load, GPUs included [W].
    price_dollars_per_hour : float | None
        On-demand rent of the whole node, approximate [$/h].
    host_memory_bytes : float | None
        CPU memory of the node, for offload; None when unknown [B].
    host : HostSpec | None
        Processors, drives and links of the host, for offload; None when unknown.
    default_fabric : str
        Id of the fabric such nodes are joined by when a cluster names none.
    """

    id: str
    name: str
    aliases: tuple[str, ...] = ()
    gpu: GpuSpec
    num_gpus: int
    topology: IntraNodeTopology
    nic: LinkSpec
    num_nics: int
    power_watts: float
    price_dollars_per_hour: float | None = None
    host_memory_bytes: float | None = None
    host: HostSpec | None = None
    default_fabric: str = "infiniband-ndr"
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_positive("num_gpus", self.num_gpus)
        _require_positive("num_nics", self.num_nics)
        _require_positive("power_watts", self.power_watts)

    @property
    def nic_bandwidth(self) -> float:
        """All NICs of the compute fabric together, per direction [B/s]."""
        return self.num_nics * self.nic.bandwidth_bytes_per_second

    @property
    def nic_bandwidth_per_gpu(self) -> float:
        """Compute-fabric bandwidth that each GPU owns when all send at once [B/s]."""
        return self.nic_bandwidth / self.num_gpus

    @property
    def host_link_bandwidth_per_gpu(self) -> float:
        """Bandwidth to the host, per direction, that each GPU owns when all copy at once [B/s]."""
        own = self.gpu.host_link.bandwidth_bytes_per_second
        if self.host is None:
            return own
        shared = self.host.link_bandwidth_bytes_per_second or own
        return min(own, shared / self.host.gpus_per_link)

    @property
    def intra_link(self) -> LinkSpec:
        """The link GPUs of this node talk to each other over."""
        return self.gpu.scale_up or self.gpu.host_link


@dataclass(frozen=True, slots=True, kw_only=True)
class FabricSpec:
    """The network between nodes.

    Parameters
    ----------
    kind : str
        ``infiniband``, ``roce``, ``ethernet``, ``efa``, ``slingshot``.
    latency : float
        One-way latency of a small message between two nodes [s].
    oversubscription : float
        Uplink shortage of the tree; 1 is non-blocking.
    is_rail_optimized : bool
        Whether NIC i of every node shares a leaf switch.
    """

    id: str
    name: str
    aliases: tuple[str, ...] = ()
    kind: str
    latency: float
    oversubscription: float = 1.0
    is_rail_optimized: bool = True
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_positive("latency", self.latency, or_zero=True)
        if not (math.isfinite(self.oversubscription) and self.oversubscription >= 1.0):
            raise SpecError(f"oversubscription must be 1 (non-blocking) or more, not {self.oversubscription}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """``num_nodes`` nodes joined by one fabric.

    Parameters
    ----------
    id : str
        Its name.
    node : NodeSpec
        What its nodes are; where islands of the topology name nodes of their own, what the first island is.
    num_nodes : int
        Nodes, of all islands.
    fabric : FabricSpec
        What joins them.
    topology : ClusterTopology | None
        What lies between them where the fabric is not flat; None where it is, or nobody knows.

    Raises
    ------
    SpecError
        If the topology is not one of so many nodes, or its islands hold nodes of unequally many GPUs.
    """

    id: str
    node: NodeSpec
    num_nodes: int
    fabric: FabricSpec
    topology: ClusterTopology | None = None

    def __post_init__(self) -> None:
        _require_positive("num_nodes", self.num_nodes)
        if self.topology is None:
            return
        self.topology.check_fits(self.num_nodes)
        links = self.topology.gpu_links
        if links is not None and len(links) != self.node.num_gpus:
            raise SpecError(
                f"topology: gpu_links has {len(links)} GPUs, but {self.node.id} has {self.node.num_gpus}; give one row "
                "for each GPU of a node"
            )
        for place, island in enumerate(self.topology.islands):
            if island.node is None:
                continue
            if place == 0 and island.node != self.node:
                raise SpecError(
                    f"topology: the first island '{island.name}' is made of the cluster's own node {self.node.id}; "
                    f"name {island.node.id} as the cluster's node, or list that island later"
                )
            if island.node.num_gpus != self.node.num_gpus:
                raise SpecError(
                    f"topology: island '{island.name}': {island.node.id} holds {island.node.num_gpus} GPUs and "
                    f"{self.node.id} {self.node.num_gpus}; nodes of a mixed cluster must hold equally many: describe "
                    f"the larger ones as several nodes of fewer GPUs and NICs (node: {{base: ID, num_gpus: ...}})"
                )

    @property
    def num_gpus(self) -> int:
        """GPUs of the whole cluster."""
        return self.num_nodes * self.node.num_gpus

    @property
    def kinds(self) -> tuple[NodeSpec, ...]:
        """The kinds of nodes, in the order in which they first occur; one unless the cluster is mixed."""
        islands = () if self.topology is None else self.topology.islands
        kinds = [self.node]
        for island in islands:
            if island.node is not None and island.node not in kinds:
                kinds.append(island.node)
        return tuple(kinds)

    @property
    def is_mixed(self) -> bool:
        """Whether its nodes are of several kinds."""
        return self.topology is not None and len(self.kinds) > 1

    @property
    def kind_of_node(self) -> tuple[int, ...]:
        """Place in :attr:`kinds` of what each node is, ``num_nodes`` long."""
        kinds = self.kinds
        if self.topology is None or len(kinds) == 1:
            return (0,) * self.num_nodes
        return tuple(
            kinds.index(island.node or self.node)
            for island in self.topology.islands
            for _ in range(island.num_nodes)
        )

    @property
    def gpu(self) -> GpuSpec:
        """The cluster's accelerator.

        Raises
        ------
        SpecError
            If the cluster has several: what asks for one would take all for the first.
        """
        self.require_one_kind("what asks for one GPU")
        return self.node.gpu

    @property
    def gpus(self) -> tuple[GpuSpec, ...]:
        """The accelerators, one for each of :attr:`kinds`."""
        return tuple(kind.gpu for kind in self.kinds)

    def require_one_kind(self, what: str) -> None:
        """Refuse a mixed cluster, on behalf of something that takes nodes of one kind only.

        Parameters
        ----------
        what : str
            What the user asked for, as the subject of the sentence.

        Raises
        ------
        SpecError
            If the cluster is mixed.
        """
        if self.is_mixed:
            one = f"{self.kinds[0].id}:{self.kind_of_node.count(0)}"
            raise SpecError(
                f"cluster {self.id} mixes {' and '.join(kind.id for kind in self.kinds)}, and {what} takes one kind of "
                f"node; name a cluster (or plan for one) of a single kind, e.g. {one}"
            )

    def seen_as(self, kind: NodeSpec) -> ClusterSpec:
        """Return the cluster as if every node were of one kind, each island joined by the links it has.

        Costs of ranks on that kind are those on this cluster; a cluster of one kind is returned as it is.
        """
        if not self.is_mixed:
            return self
        assert self.topology is not None
        islands = tuple(
            replace(
                island,
                node=None,
                bandwidth=(island.node or self.node).nic_bandwidth
                if island.bandwidth is None
                else island.bandwidth,
            )
            for island in self.topology.islands
        )
        return replace(self, node=kind, topology=replace(self.topology, islands=islands))

    @property
    def pair_links(self) -> LinkMatrix:
        """What every pair of nodes gets of the network when all nodes send at once."""
        from meshwright.hardware_specs.topology import ClusterTopology

        topology = self.topology or ClusterTopology()
        return topology.pair_links(self.num_nodes, self.node.nic_bandwidth, self.fabric.latency)


def _require_positive(name: str, value: float, *, or_zero: bool = False) -> None:
    if not math.isfinite(value) or value < 0 or (value == 0 and not or_zero):
        raise SpecError(f"{name} must be a finite number above zero, not {value}")
