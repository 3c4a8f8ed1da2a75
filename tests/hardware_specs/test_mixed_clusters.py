"""Clusters of several kinds of node: read, written, seen as one kind, refused where one kind is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from meshwright.errors import SpecError
from meshwright.hardware_specs import resolve_cluster
from meshwright.hardware_specs.catalog import cluster_from_section
from meshwright.hardware_specs.exporters import export_topology
from meshwright.hardware_specs.spec_writing import cluster_to_mapping, dump_yaml
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.hardware_specs.yaml_document import parse_yaml
from meshwright.simcore.network.fabric import cluster_fabric

MIXED = """
schema_version: 1
node: dgx-h100
count: 5
topology:
  islands:
    - {name: hopper, nodes: 2}
    - {name: ampere, nodes: 2, node: dgx-a100}
    - {name: few, nodes: 1, node: {base: dgx-h100, id: few-nics, num_nics: 2}, latency: 9 us}
  island_bandwidth: 25 Gbit/s
"""


def read(text: str) -> ClusterSpec:
    return cluster_from_section(parse_yaml(text, "cluster.yaml"))


def test_islands_name_nodes_of_their_own() -> None:
    cluster = read(MIXED)
    assert cluster.is_mixed
    assert [kind.id for kind in cluster.kinds] == ["dgx-h100", "dgx-a100", "few-nics"]
    assert cluster.kind_of_node == (0, 0, 1, 1, 2)
    assert [gpu.id for gpu in cluster.gpus] == ["h100-sxm-80", "a100-sxm-80", "h100-sxm-80"]
    assert cluster.id == "dgx-h100:2+dgx-a100:2+few-nics:1"
    assert cluster.num_gpus == 40


def test_links_inside_an_island_are_those_of_its_own_nics() -> None:
    links = read(MIXED).pair_links.bandwidth
    assert links[0, 1] == 400e9
    assert links[2, 3] == 200e9
    assert links[4, 4] == 100e9
    assert links[0, 2] == links[3, 4] == pytest.approx(25e9 / 8)


def test_a_mixed_cluster_reads_back_from_what_it_writes() -> None:
    cluster = read(MIXED)
    again = read(dump_yaml(cluster_to_mapping(cluster)))
    assert again == cluster
    assert again.kind_of_node == cluster.kind_of_node


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_seen_as_one_kind_a_cluster_keeps_its_links(kind: int) -> None:
    cluster = read(MIXED)
    seen = cluster.seen_as(cluster.kinds[kind])
    assert not seen.is_mixed
    assert seen.node == cluster.kinds[kind]
    assert np.array_equal(seen.pair_links.bandwidth, cluster.pair_links.bandwidth)
    assert np.array_equal(seen.pair_links.latency, cluster.pair_links.latency)


def test_islands_of_the_same_node_are_no_mixed_cluster() -> None:
    plain = read(
        MIXED.replace(", node: dgx-a100", "").split("    - {name: few")[0].replace("5", "4")
        + "  island_bandwidth: 25 Gbit/s\n"
    )
    named = read(
        MIXED.replace("dgx-a100", "dgx-h100").split("    - {name: few")[0].replace("5", "4")
        + "  island_bandwidth: 25 Gbit/s\n"
    )
    assert not named.is_mixed
    assert named.gpu == plain.gpu
    assert named.seen_as(named.node) is named
    assert np.array_equal(named.pair_links.bandwidth, plain.pair_links.bandwidth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("node: dgx-a100", "node: {base: dgx-a100, num_gpus: 4}"),
            "nodes of a mixed cluster must hold equally many",
        ),
        (
            ("{name: hopper, nodes: 2}", "{name: hopper, nodes: 2, node: dgx-a100}"),
            "the cluster's own node dgx-h100",
        ),
        (("name: hopper", "name: ampere"), r"\d+: topology: two islands are named 'ampere'"),
        (("node: dgx-a100", "node: dgx-a10"), "unknown node 'dgx-a10'"),
        (("node: dgx-a100", "nodde: dgx-a100"), "nodde"),
    ],
)
def test_bad_islands_are_refused_with_one_sentence(change: tuple[str, str], message: str) -> None:
    with pytest.raises(SpecError, match=message) as error:
        read(MIXED.replace(*change))
    assert "\n" not in str(error.value)


def test_what_takes_one_kind_refuses_a_mixed_cluster() -> None:
    cluster = read(MIXED)
    with pytest.raises(SpecError, match=r"mixes dgx-h100 and dgx-a100 and few-nics.*e\.g\. dgx-h100:2"):
        _ = cluster.gpu
    with pytest.raises(SpecError, match="takes one kind of node"):
        cluster_fabric(cluster)
    for target in ("astra-sim", "simai"):
        with pytest.raises(SpecError, match=r"mixes dgx-h100 and dgx-a100 .* specs export takes one kind"):
            export_topology(cluster, target)


def test_the_example_is_a_mixed_cluster() -> None:
    cluster = resolve_cluster(str(Path(__file__).parents[2] / "examples" / "mixed-cluster.yaml"))
    assert cluster.kind_of_node == (0, 0, 1, 1)
