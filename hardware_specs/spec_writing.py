"""Write a cluster as a mapping that reads back to the very same one, and mappings as strict YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import yaml

from meshwright.hardware_specs.specs import ClusterSpec, FabricSpec, GpuSpec, HostSpec, LinkSpec, NodeSpec
from meshwright.hardware_specs.yaml_nodes import ScalarNode
from meshwright.units import Kind, format_quantity, parse_quantity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from meshwright.hardware_specs.topology import ClusterTopology, IslandSpec

__all__ = ["cluster_to_mapping", "dump_yaml", "exact_quantity"]

_BASE_UNITS: dict[Kind, str] = {
    "bytes": "B",
    "bytes_per_second": "B/s",
    "flops_per_second": "FLOP/s",
    "seconds": "s",
    "watts": "W",
    "hertz": "Hz",
    "dollars_per_hour": "$/h",
}


def exact_quantity(value: float, kind: Kind) -> str:
    """Return a quantity that `parse_quantity` reads back to the same float, in the tidiest unit that does.

    Examples
    --------
    >>> exact_quantity(3.35e12, "bytes_per_second")
    '3.35 TB/s'
    >>> exact_quantity(2e12, "bytes")
    '2 TB'
    >>> exact_quantity(0.1 + 0.2, "seconds")
    '0.30000000000000004 s'
    """
    for digits in (4, 6, 12):
        text = format_quantity(value, kind, digits)
        if parse_quantity(text, kind) == value:
            return text
    if kind == "fraction":
        raise ValueError("fractions have no exact unit; write a plain number")
    # Data sheets state bytes in decimal units, in which they are whole numbers.
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if kind.startswith("bytes") else ():
        text = f"{value / factor:.12g} {prefix}{_BASE_UNITS[kind]}"
        if value >= factor and parse_quantity(text, kind) == value:
            return text
    return f"{float(value)!r} {_BASE_UNITS[kind]}"


def cluster_to_mapping(cluster: ClusterSpec) -> dict[str, object]:
    """Return a self-contained mapping of a cluster, sources included.

    Parameters
    ----------
    cluster : ClusterSpec
        The cluster.

    Returns
    -------
    dict[str, object]
        Text, whole numbers, booleans, lists and mappings only; `cluster_from_section` reads it back to an
        equal `ClusterSpec` whatever the built-in catalog then says.
    """
    return {
        "id": cluster.id,
        "node": node_to_mapping(cluster.node),
        "count": cluster.num_nodes,
        "fabric": fabric_to_mapping(cluster.fabric),
        **({"topology": topology_to_mapping(cluster.topology)} if cluster.topology is not None else {}),
    }


def dump_yaml(mapping: Mapping[str, object]) -> str:
    """Return YAML that `parse_yaml` reads back: text that looks like a number is quoted, nothing is aliased.

    Examples
    --------
    >>> print(dump_yaml({"id": "1e3", "count": 8}), end="")
    id: '1e3'
    count: 8
    """
    return yaml.dump(mapping, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=110)


class _StrictDumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # C where libyaml is
    def ignore_aliases(self, data: object) -> bool:  # the base's signature
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    node = ScalarNode(0, text, is_plain=True)
    needs_quotes = not isinstance(node.value(), str) or node.is_date
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if needs_quotes else None)


def _represent_tuple(dumper: yaml.SafeDumper, items: tuple[object, ...]) -> yaml.SequenceNode:
    return dumper.represent_list(list(items))


_StrictDumper.add_representer(str, _represent_text)
_StrictDumper.add_representer(tuple, _represent_tuple)


def _number(value: float, kind: Kind, key: str, sources: Mapping[str, str]) -> object:
    text = exact_quantity(value, kind)
    return {"value": text, "source": sources[key]} if key in sources else text


def _count(value: int, key: str, sources: Mapping[str, str]) -> object:
    return {"value": value, "source": sources[key]} if key in sources else value


def _link(link: LinkSpec, key: str, sources: Mapping[str, str]) -> dict[str, object]:
    return {
        "kind": link.kind,
        "bandwidth": _number(
            link.bandwidth_bytes_per_second, "bytes_per_second", f"{key}.bandwidth", sources
        ),
        "latency": _number(link.latency, "seconds", f"{key}.latency", sources),
    }


def _host(host: HostSpec, sources: Mapping[str, str]) -> dict[str, object]:
    counts = {"num_sockets": host.num_sockets, "num_cores": host.num_cores}
    bandwidths = {
        "memory_bandwidth": host.memory_bandwidth_bytes_per_second,
        "link_bandwidth": host.link_bandwidth_bytes_per_second,
        "nvme_read": host.nvme_read_bytes_per_second,
        "nvme_write": host.nvme_write_bytes_per_second,
    }
    mapping: dict[str, object] = {
        key: _count(value, f"host.{key}", sources) for key, value in counts.items() if value is not None
    }
    mapping["gpus_per_link"] = _count(host.gpus_per_link, "host.gpus_per_link", sources)
    if host.nvme_bytes is not None:
        mapping["nvme"] = _number(host.nvme_bytes, "bytes", "host.nvme", sources)
    for key, value in bandwidths.items():
        if value is not None:
            mapping[key] = _number(value, "bytes_per_second", f"host.{key}", sources)
    return mapping


def gpu_to_mapping(gpu: GpuSpec) -> dict[str, object]:
    sources = gpu.sources
    mapping: dict[str, object] = {
        "id": gpu.id,
        "name": gpu.name,
        "vendor": gpu.vendor,
        "architecture": gpu.architecture,
        "aliases": list(gpu.aliases),
        "peak": {
            precision: _number(peak, "flops_per_second", f"peak.{precision}", sources)
            for precision, peak in gpu.peak_flops_per_second.items()
        },
        "memory": _number(gpu.memory_bytes, "bytes", "memory", sources),
        "memory_bandwidth": _number(
            gpu.memory_bandwidth_bytes_per_second, "bytes_per_second", "memory_bandwidth", sources
        ),
        "num_sms": _count(gpu.num_sms, "num_sms", sources),
        "l2": _number(gpu.l2_bytes, "bytes", "l2", sources),
        "power": _number(gpu.power_watts, "watts", "power", sources),
        "host_link": _link(gpu.host_link, "host_link", sources),
    }
    if gpu.scale_up is not None:
        mapping["scale_up"] = _link(gpu.scale_up, "scale_up", sources)
    if gpu.price_dollars_per_hour is not None:
        mapping["price"] = _number(gpu.price_dollars_per_hour, "dollars_per_hour", "price", sources)
    return mapping


def node_to_mapping(node: NodeSpec) -> dict[str, object]:
    sources = node.sources
    mapping: dict[str, object] = {
        "id": node.id,
        "name": node.name,
        "aliases": list(node.aliases),
        "gpu": gpu_to_mapping(node.gpu),
        "num_gpus": _count(node.num_gpus, "num_gpus", sources),
        "topology": node.topology,
        "nic": _link(node.nic, "nic", sources),
        "num_nics": _count(node.num_nics, "num_nics", sources),
        "power": _number(node.power_watts, "watts", "power", sources),
        "default_fabric": node.default_fabric,
    }
    if node.host_memory_bytes is not None:
        mapping["host_memory"] = _number(node.host_memory_bytes, "bytes", "host_memory", sources)
    if node.host is not None:
        mapping["host"] = _host(node.host, sources)
    if node.price_dollars_per_hour is not None:
        mapping["price"] = _number(node.price_dollars_per_hour, "dollars_per_hour", "price", sources)
    return mapping


def fabric_to_mapping(fabric: FabricSpec) -> dict[str, object]:
    sources = fabric.sources
    oversubscription: object = fabric.oversubscription
    if "oversubscription" in sources:
        oversubscription = {"value": fabric.oversubscription, "source": sources["oversubscription"]}
    return {
        "id": fabric.id,
        "name": fabric.name,
        "aliases": list(fabric.aliases),
        "kind": fabric.kind,
        "latency": _number(fabric.latency, "seconds", "latency", sources),
        "oversubscription": oversubscription,
        "rail_optimized": fabric.is_rail_optimized,
    }


def topology_to_mapping(topology: ClusterTopology) -> dict[str, object]:
    """Return plain data that :func:`meshwright.hardware_specs.topology_reading.read_topology` reads back; a matrix too large for a file is left out."""
    from meshwright.hardware_specs.topology_reading import GIGABYTE, MAX_MATRIX_NODES, MICROSECOND

    mapping: dict[str, object] = {}
    if topology.tiers:
        mapping["tiers"] = [
            {
                "name": tier.name,
                "nodes": tier.nodes_per_group,
                "oversubscription": tier.oversubscription,
                "latency": exact_quantity(tier.latency, "seconds"),
            }
            for tier in topology.tiers
        ]
    if topology.islands:
        mapping["islands"] = [_island_mapping(island) for island in topology.islands]
    if topology.island_bandwidth is not None:
        mapping["island_bandwidth"] = exact_quantity(topology.island_bandwidth, "bytes_per_second")
    if topology.island_latency is not None:
        mapping["island_latency"] = exact_quantity(topology.island_latency, "seconds")
    if topology.matrix is not None and len(topology.matrix.bandwidth) <= MAX_MATRIX_NODES:
        mapping["matrix"] = {
            "bandwidth_gigabytes_per_second": _rows(topology.matrix.bandwidth, GIGABYTE),
            "latency_microseconds": _rows(topology.matrix.latency, MICROSECOND),
        }
    if topology.hosts:
        mapping["hosts"] = list(topology.hosts)
    if topology.gpu_links is not None:
        mapping["gpu_links_gigabytes_per_second"] = _rows(topology.gpu_links, GIGABYTE)
    return mapping


def _island_mapping(island: IslandSpec) -> dict[str, object]:
    mapping: dict[str, object] = {"name": island.name, "nodes": island.num_nodes}
    if island.node is not None:
        mapping["node"] = node_to_mapping(island.node)
    if island.bandwidth is not None:
        mapping["bandwidth"] = exact_quantity(island.bandwidth, "bytes_per_second")
    if island.latency is not None:
        mapping["latency"] = exact_quantity(island.latency, "seconds")
    return mapping


def _rows(matrix: NDArray[np.float64] | tuple[tuple[float, ...], ...], unit: float) -> list[str]:
    return [" ".join(f"{value / unit:.6g}" for value in row) for row in matrix]
