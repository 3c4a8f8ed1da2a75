"""What machines are: accelerators, nodes, fabrics and clusters, and the strict reader of the files that say so."""

from __future__ import annotations

from meshwright.hardware_specs.catalog import (
    SpecKind,
    cluster_from_section,
    list_specs,
    load_cluster,
    load_fabric,
    load_gpu,
    load_node,
    resolve_cluster,
)
from meshwright.hardware_specs.spec_writing import cluster_to_mapping, dump_yaml, exact_quantity
from meshwright.hardware_specs.specs import (
    ClusterSpec,
    FabricSpec,
    GpuSpec,
    HostSpec,
    IntraNodeTopology,
    LinkSpec,
    NodeSpec,
)
from meshwright.hardware_specs.yaml_document import Section, parse_yaml, read_yaml

__all__ = [
    "ClusterSpec",
    "FabricSpec",
    "GpuSpec",
    "HostSpec",
    "IntraNodeTopology",
    "LinkSpec",
    "NodeSpec",
    "Section",
    "SpecKind",
    "cluster_from_section",
    "cluster_to_mapping",
    "dump_yaml",
    "exact_quantity",
    "list_specs",
    "load_cluster",
    "load_fabric",
    "load_gpu",
    "load_node",
    "parse_yaml",
    "read_yaml",
    "resolve_cluster",
]
