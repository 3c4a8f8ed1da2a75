"""The ``topology:`` section of a cluster, from plain data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.hardware_specs.specs import NodeSpec
from meshwright.hardware_specs.topology import ClusterTopology, IslandSpec, LinkMatrix, TierSpec
from meshwright.hardware_specs.yaml_document import Section

__all__ = ["GIGABYTE", "MAX_MATRIX_NODES", "MICROSECOND", "read_topology"]

# A matrix of more nodes would not fit a YAML file of the size we read.
MAX_MATRIX_NODES: Final = 512
# Matrices are written in these units, six digits each.
GIGABYTE, MICROSECOND = 1e9, 1e-6


def read_topology(
    section: Section, num_nodes: int, read_node: Callable[[Section], NodeSpec]
) -> ClusterTopology:
    """Return the topology a mapping describes.

    Parameters
    ----------
    section : Section
        ``tiers: [{name, nodes, oversubscription, latency}]``, ``islands: [{name, nodes, node, bandwidth,
        latency}]``, ``island_bandwidth``, ``island_latency``, ``matrix: {bandwidth_gigabytes_per_second: [ROW, ...],
        latency_microseconds: [ROW, ...]}`` with one text of numbers per node, ``hosts: [NAME, ...]``,
        ``gpu_links_gigabytes_per_second: [ROW, ...]`` with one text per GPU of a node; all optional.
    num_nodes : int
        Nodes of the cluster.
    read_node : Callable[[Section], NodeSpec]
        Returns the node under the key ``node`` of an island.

    Raises
    ------
    SpecError
        If a key or value is wrong, or the parts cover another number of nodes.
    """
    tiers = tuple(_read_tier(each) for each in section.sections("tiers")) if section.has("tiers") else ()
    islands = (
        tuple(_read_island(each, read_node) for each in section.sections("islands"))
        if section.has("islands")
        else ()
    )
    matrix = section.optional_section("matrix")
    links = None if matrix is None else _read_matrix(matrix)
    island_bandwidth = section.optional_quantity("island_bandwidth", "bytes_per_second")
    island_latency = section.optional_quantity("island_latency", "seconds")
    hosts, gpu_links = section.texts("hosts"), _read_gpu_links(section)
    section.close()
    try:
        topology = ClusterTopology(
            tiers=tiers,
            islands=islands,
            island_bandwidth=island_bandwidth,
            island_latency=island_latency,
            matrix=links,
            hosts=hosts,
            gpu_links=gpu_links,
        )
        topology.check_fits(num_nodes)
    except SpecError as error:
        raise section.error("", str(error).removeprefix("topology: ")) from None
    return topology


def _read_tier(section: Section) -> TierSpec:
    tier = TierSpec(
        name=section.text("name"),
        nodes_per_group=section.integer("nodes", minimum=1),
        oversubscription=section.number("oversubscription", default=1.0, minimum=1.0),
        latency=section.quantity("latency", "seconds", default=0.0),
    )
    section.close()
    return tier


def _read_island(section: Section, read_node: Callable[[Section], NodeSpec]) -> IslandSpec:
    island = IslandSpec(
        name=section.text("name"),
        num_nodes=section.integer("nodes", minimum=1),
        node=read_node(section) if section.has("node") else None,
        bandwidth=section.optional_quantity("bandwidth", "bytes_per_second"),
        latency=section.optional_quantity("latency", "seconds"),
    )
    section.close()
    return island


def _read_matrix(section: Section) -> LinkMatrix:
    matrix = LinkMatrix(
        bandwidth=_read_rows(section, "bandwidth_gigabytes_per_second", GIGABYTE),
        latency=_read_rows(section, "latency_microseconds", MICROSECOND),
    )
    section.close()
    return matrix


def _read_gpu_links(section: Section) -> tuple[tuple[float, ...], ...] | None:
    if not section.has("gpu_links_gigabytes_per_second"):
        return None
    rows = _read_rows(section, "gpu_links_gigabytes_per_second", GIGABYTE)
    return tuple(tuple(row) for row in rows.tolist())


def _read_rows(section: Section, key: str, unit: float) -> NDArray[np.float64]:
    rows = [text.split() for text in section.texts(key)]
    if any(len(row) != len(rows) for row in rows) or not rows:
        raise section.error(key, f"must hold one text of {len(rows)} numbers for each of {len(rows)} rows")
    try:
        return np.array(rows, dtype=np.float64) * unit
    except ValueError:
        raise section.error(key, "holds a word that is not a number") from None
