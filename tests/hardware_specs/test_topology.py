"""Topologies: what pairs of nodes get, files that read back, and descriptions that cannot be."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import cluster_from_section
from meshwright.hardware_specs.spec_writing import cluster_to_mapping, dump_yaml
from meshwright.hardware_specs.topology import (
    ClusterTopology,
    IslandSpec,
    LinkMatrix,
    TierSpec,
    group_bottleneck,
)
from meshwright.hardware_specs.yaml_document import parse_yaml

TIERS = (
    TierSpec(name="leaf", nodes_per_group=2, oversubscription=2.0, latency=1e-6),
    TierSpec(name="spine", nodes_per_group=4, oversubscription=3.0, latency=2e-6),
)
CLUSTER = """
node: dgx-h100
count: 4
topology:
  tiers:
    - {name: leaf, nodes: 2, oversubscription: 2, latency: 1 us}
  islands:
    - {name: infiniband, nodes: 2}
    - {name: ethernet, nodes: 2, bandwidth: 100 GB/s, latency: 5 us}
  island_bandwidth: 25 Gbit/s
  island_latency: 30 us
  hosts: [a1, a2, b1, b2]
"""


def test_a_pair_pays_for_every_tier_it_leaves() -> None:
    links = ClusterTopology(tiers=TIERS).pair_links(8, 12.0, 5e-6)
    assert links.bandwidth[0, [1, 2, 4]].tolist() == [12.0, 6.0, 2.0]
    assert links.latency[0, [1, 2, 4]] == pytest.approx([5e-6, 6e-6, 8e-6])


def test_islands_have_links_of_their_own_and_a_slow_one_between_them() -> None:
    islands = (
        IslandSpec(name="a", num_nodes=2),
        IslandSpec(name="b", num_nodes=1, bandwidth=7.0, latency=1e-3),
    )
    topology = ClusterTopology(islands=islands, island_bandwidth=2.0, island_latency=1e-2)
    links = topology.pair_links(3, 10.0, 1e-5)
    assert links.bandwidth[0].tolist()[1:] == [10.0, 2.0]
    assert links.latency[0].tolist()[1:] == [1e-5, 1e-2]
    assert topology.island_of_node(3).tolist() == [0, 0, 1]


def test_a_measured_matrix_replaces_what_is_described() -> None:
    matrix = LinkMatrix(bandwidth=np.array([[0.0, 3.0], [4.0, 0.0]]), latency=np.zeros((2, 2)))
    assert ClusterTopology(tiers=TIERS[:1], matrix=matrix).pair_links(2, 12.0, 1.0) is matrix


def test_the_bottleneck_of_a_group_is_its_slowest_pair() -> None:
    links = ClusterTopology(tiers=TIERS).pair_links(8, 12.0, 0.0)
    assert [group_bottleneck(links, group) for group in ([0, 1], [0, 3], [1, 2, 7])] == [12.0, 6.0, 2.0]
    assert group_bottleneck(links, [3, 3]) == float("inf")


def test_a_described_cluster_reads_back_from_what_is_written() -> None:
    cluster = cluster_from_section(parse_yaml(CLUSTER, "cluster.yaml"))
    assert cluster.pair_links.bandwidth[0, 2] == 25e9 / 8.0
    assert cluster.pair_links.bandwidth[2, 3] == 100e9
    text = dump_yaml(cluster_to_mapping(cluster))
    assert cluster_from_section(parse_yaml(text, "written.yaml")) == cluster


def test_a_matrix_reads_back_to_six_digits() -> None:
    random = np.random.default_rng(0)
    rows = random.uniform(1.0, 50.0, (3, 3))
    text = (
        "node: dgx-h100\ncount: 3\ntopology:\n  matrix:\n    bandwidth_gigabytes_per_second:\n"
        + "".join(f"      - '{' '.join(map(str, row))}'\n" for row in rows)
        + "    latency_microseconds:\n"
        + "      - '0 5 5'\n      - '5 0 5'\n      - '5 5 0'\n"
    )
    cluster = cluster_from_section(parse_yaml(text, "cluster.yaml"))
    assert cluster.pair_links.bandwidth == pytest.approx(rows * 1e9)
    again = cluster_from_section(parse_yaml(dump_yaml(cluster_to_mapping(cluster)), "written.yaml"))
    assert again.pair_links.bandwidth == pytest.approx(rows * 1e9, rel=1e-5)
    assert again.pair_links.latency[0, 1] == pytest.approx(5e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("nodes: 2, oversubscription: 2", "nodes: 0, oversubscription: 2"), "at least 1"),
        (("oversubscription: 2", "oversubscription: 0.5"), "at least 1"),
        (("- {name: infiniband, nodes: 2}", "- {name: infiniband, nodes: 3}"), "islands hold 5 nodes"),
        (("  island_bandwidth: 25 Gbit/s\n", ""), "island_bandwidth"),
        (("a2, b1", "a1, b1"), "host 'a1' is named twice"),
        (("hosts: [a1, a2, b1, b2]", "hosts: [a1]"), "'hosts' names 1 nodes, the cluster has 4"),
        (("island_latency: 30 us", "island_latncy: 30 us"), "island_latency"),
        (
            (
                "  hosts:",
                "  matrix: {bandwidth_gigabytes_per_second: ['1 2'], latency_microseconds: ['1']}\n  hosts:",
            ),
            "one text of 1 numbers",
        ),
        (
            (
                "  hosts:",
                "  matrix: {bandwidth_gigabytes_per_second: ['0 0', '1 0'], latency_microseconds: ['0 1', '1 0']}\n  hosts:",
            ),
            "node 0 does not reach node 1",
        ),
    ],
)
def test_impossible_topologies_get_one_line(change: tuple[str, str], message: str) -> None:
    assert change[0] in CLUSTER
    with pytest.raises(SpecError, match=message) as caught:
        cluster_from_section(parse_yaml(CLUSTER.replace(*change), "cluster.yaml"))
    assert "\n" not in str(caught.value)


def test_tiers_must_nest() -> None:
    with pytest.raises(SpecError, match="no multiple of the 2"):
        ClusterTopology(tiers=(TIERS[0], TierSpec(name="spine", nodes_per_group=3)))
