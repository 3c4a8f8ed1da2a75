"""Collectives over fabrics: closed forms without contention, hand sums with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from meshwright.errors import SpecError
from meshwright.hardware_specs import resolve_cluster
from meshwright.hardware_specs.topology import ClusterTopology, IslandSpec, LinkMatrix, TierSpec
from meshwright.simcore.network.collectives import (
    Algorithm,
    CollectiveKind,
    collective_flow_time,
    collective_phases,
    concurrent_flow_times,
)
from meshwright.simcore.network.fabric import Fabric, FabricShape, cluster_fabric
from meshwright.simcore.network.flows import FlowSet, simulate_flows
from meshwright.simcore.network.symmetry import folded_flows

GPU, NIC = 400.0, 50.0
INSIDE, ACROSS = 0.01, 0.5
SIZE = 2.0**20


def fabric(
    num_nodes: int = 1, gpus_per_node: int = 8, topology: ClusterTopology | None = None, **changes
) -> Fabric:
    fields = {
        "num_nodes": num_nodes,
        "gpus_per_node": gpus_per_node,
        "gpu_bandwidth": GPU,
        "gpu_latency": INSIDE,
        "node_bandwidth": NIC * gpus_per_node,
        "network_latency": ACROSS,
        "num_rails": gpus_per_node,
        "cable_bandwidth": NIC,
        "topology": topology or ClusterTopology(),
    }
    routing = {key: changes.pop(key) for key in ("routing", "seed") if key in changes}
    return Fabric(FabricShape(**(fields | changes)), **routing)


def leaf(nodes: int, oversubscription: float = 1.0) -> ClusterTopology:
    return ClusterTopology(
        tiers=(TierSpec(name="leaf", nodes_per_group=nodes, oversubscription=oversubscription, latency=0.25),)
    )


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize(
    ("collective", "passes"), [("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1)]
)
def test_a_ring_on_a_switch_is_its_closed_form(size: int, collective: CollectiveKind, passes: int) -> None:
    expected = passes * ((size - 1) * INSIDE + (size - 1) / size * SIZE / GPU)
    assert collective_flow_time(fabric(), collective, "ring", range(size), SIZE) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_direct_exchange_on_a_switch_is_its_closed_form(size: int) -> None:
    expected = INSIDE + (size - 1) / size * SIZE / GPU
    time = collective_flow_time(fabric(), "all_to_all", "direct", range(size), SIZE)
    assert time == pytest.approx(expected, rel=1e-12)
    twice = collective_flow_time(fabric(), "all_reduce", "direct", range(size), SIZE)
    assert twice == pytest.approx(2 * expected, rel=1e-12)


@pytest.mark.parametrize("size", [4, 7, 8, 16])
def test_a_double_binary_tree_moves_the_buffer_up_and_down_once(size: int) -> None:
    one_switch = fabric(gpus_per_node=16)
    (phase,) = collective_phases(one_switch, "all_reduce", "tree", range(size), SIZE)
    sent = np.bincount(phase.sources, weights=phase.num_bytes, minlength=size)
    received = np.bincount(phase.destinations, weights=phase.num_bytes, minlength=size)
    assert sent.max() <= 2 * SIZE
    # Two trees of n - 1 edges, half the buffer each way over each.
    assert sent.sum() == received.sum() == 2 * (size - 1) * SIZE
    time = collective_flow_time(one_switch, "all_reduce", "tree", range(size), SIZE)
    assert time - phase.latency == pytest.approx(2 * SIZE / GPU, rel=1e-12)
    assert phase.latency <= 2 * math.ceil(math.log2(size)) * INSIDE * (1 + 1e-12)


def test_every_rank_of_a_double_tree_is_inner_in_one_tree_at_most() -> None:
    (phase,) = collective_phases(fabric(gpus_per_node=16), "all_reduce", "tree", range(16), SIZE)
    half = len(phase.sources) // 2
    upward, parents = phase.sources[:half], phase.destinations[:half]
    assert sorted(np.bincount(upward, minlength=16).tolist()) == [1, 1] + [2] * 14
    first, second = set(parents[:15].tolist()), set(parents[15:].tolist())
    assert first.isdisjoint(second)


def test_rings_through_nodes_use_all_nics() -> None:
    # 2(n-1)/n S over 4 NICs of a node; the NVLinks, eight times as fast, are not what limits.
    cluster = fabric(4, 4)
    hops = 2 * (12 * INSIDE + 4 * ACROSS) - 2 * INSIDE
    expected = hops + 2 * 15 / 16 * SIZE / (4 * NIC)
    assert collective_flow_time(cluster, "all_reduce", "ring", range(16), SIZE) == pytest.approx(
        expected, rel=1e-12
    )


def test_trees_over_nodes_use_all_nics() -> None:
    cluster = fabric(8, 4)
    # Three levels between eight nodes and the root's one child, three hops of the chain inside each.
    expected = 2 * (3 * INSIDE + 3 * ACROSS) + 2 * (SIZE / 4) / NIC
    assert collective_flow_time(cluster, "all_reduce", "tree", range(32), SIZE) == pytest.approx(
        expected, rel=1e-12
    )


def test_a_hierarchical_all_reduce_is_its_closed_form() -> None:
    inside = 3 * INSIDE + 3 / 4 * SIZE / GPU
    across = 2 * (5 * ACROSS + 5 / 6 * (SIZE / 4) / NIC)
    cluster = fabric(6, 4)
    serial = collective_flow_time(cluster, "all_reduce", "hierarchical", range(24), SIZE)
    assert serial == pytest.approx(2 * inside + across, rel=1e-12)
    pipelined = collective_flow_time(cluster, "all_reduce", "pipelined_hierarchical", range(24), SIZE)
    latency = 6 * INSIDE + 10 * ACROSS
    assert pipelined == pytest.approx(latency + 2 * 5 / 6 * (SIZE / 4) / NIC, rel=1e-12)
    halves = [
        collective_flow_time(cluster, kind, "hierarchical", range(24), SIZE)
        for kind in ("all_gather", "reduce_scatter")
    ]
    assert sum(halves) == pytest.approx(serial, rel=1e-12)


def test_all_to_all_between_nodes_is_limited_by_the_nics() -> None:
    # (N-1)/N S per NIC: rails carry what is for others, whoever sends it (PXN).
    time = collective_flow_time(fabric(4, 4), "all_to_all", "direct", range(16), SIZE)
    assert time == pytest.approx(ACROSS + 3 / 4 * SIZE / NIC, rel=1e-12)


def test_a_mesh_is_full_only_where_all_pairs_talk() -> None:
    mesh = fabric(is_mesh=True)
    direct = collective_flow_time(mesh, "all_to_all", "direct", range(8), SIZE)
    assert direct == pytest.approx(INSIDE + 7 / 8 * SIZE / GPU, rel=1e-12)
    ring = collective_flow_time(mesh, "all_gather", "ring", range(8), SIZE)
    assert ring == pytest.approx(7 * INSIDE + 7 / 8 * SIZE / (GPU / 7), rel=1e-12)


def test_two_rings_over_one_oversubscribed_uplink_take_twice_as_long() -> None:
    # Two nodes with one NIC each below a leaf whose uplink carries just one of them.
    cluster = fabric(4, 1, leaf(2, oversubscription=2.0))
    rings = [collective_phases(cluster, "all_gather", "ring", ranks, SIZE) for ranks in ([0, 2], [1, 3])]
    alone = collective_flow_time(cluster, "all_gather", "ring", [0, 2], SIZE)
    latency = rings[0][0].latency
    assert latency == ACROSS + 0.25
    assert alone == pytest.approx(latency + SIZE / 2 / NIC, rel=1e-12)
    together = concurrent_flow_times(cluster, [*rings, ()])
    assert together == pytest.approx([latency + SIZE / NIC] * 2 + [0.0], rel=1e-12)


def test_a_hash_collision_halves_the_rate() -> None:
    ranks = ([0, 2], [1, 3])
    times = []
    for seed in range(40):
        cluster = fabric(4, 1, leaf(2), routing="ecmp", seed=seed)
        assert len(cluster.links_of("leaf up")) == 4
        rings = [collective_phases(cluster, "all_gather", "ring", pair, SIZE) for pair in ranks]
        times.append(float(concurrent_flow_times(cluster, rings).max()) - rings[0][0].latency)
        uplinks = [set(cluster.route(0, 2, 0)) & set(cluster.route(1, 3, 1))]
        uplinks.append(set(cluster.route(2, 0, 0)) & set(cluster.route(3, 1, 1)))
        expected = SIZE / 2 / NIC * (2 if any(uplinks) else 1)
        assert times[-1] == pytest.approx(expected, rel=1e-12)
    assert max(times) == pytest.approx(2 * min(times), rel=1e-12)
    adaptive = fabric(4, 1, leaf(2))
    rings = [collective_phases(adaptive, "all_gather", "ring", pair, SIZE) for pair in ranks]
    assert concurrent_flow_times(adaptive, rings).max() - rings[0][0].latency == pytest.approx(
        min(times), rel=1e-12
    )


def test_a_slow_link_and_background_load_slow_what_crosses_them() -> None:
    healthy = fabric(4, 4)
    time = collective_flow_time(healthy, "all_gather", "ring", range(16), SIZE)
    slow = healthy.with_capacity_factors({int(healthy.links_of("rail up")[5]): 0.5})
    latency = collective_phases(healthy, "all_gather", "ring", range(16), SIZE)[0].latency
    slowed = collective_flow_time(slow, "all_gather", "ring", range(16), SIZE)
    assert slowed - latency == pytest.approx(2 * (time - latency), rel=1e-12)
    busy = healthy.with_background("rail up", 0.75)
    assert collective_flow_time(busy, "all_gather", "ring", range(16), SIZE) - latency == pytest.approx(
        4 * (time - latency), rel=1e-12
    )


def test_a_hash_avoids_a_failed_cable_and_a_failed_nic_is_refused() -> None:
    cluster = fabric(4, 1, leaf(2), routing="ecmp")
    cable = next(link for link in cluster.route(0, 2) if link in cluster.links_of("leaf up"))
    around = cluster.with_capacity_factors({cable: 0.0}).route(0, 2)
    assert cable not in around
    assert len(around) == len(cluster.route(0, 2))
    all_failed = cluster.with_capacity_factors({int(link): 0.0 for link in cluster.links_of("leaf up")[:2]})
    with pytest.raises(SpecError, match=r"GPU 0 cannot reach GPU 2: link 'leaf up \d' has failed"):
        all_failed.route(0, 2)
    assert all_failed.route(0, 1) == cluster.route(0, 1)
    nic = int(cluster.links_of("rail up")[0])
    with pytest.raises(SpecError, match="GPU 0 cannot reach GPU 2: link 'rail up 0' has failed"):
        cluster.with_capacity_factors({nic: 0.0}).route(0, 2)


def test_routes_name_the_links_in_order() -> None:
    cluster = fabric(4, 2, leaf(2))
    kinds = [cluster.kinds[int(cluster.kind[link])] for link in cluster.route(0, 7)]
    # From rail 0 to rail 1: over to the neighbour inside the node first.
    assert kinds == ["gpu up", "gpu down", "rail up", "leaf up", "leaf down", "rail down"]
    assert cluster.route(0, 0) == ()
    assert [cluster.kinds[int(cluster.kind[link])] for link in cluster.route(0, 2)] == [
        "rail up",
        "rail down",
    ]
    direct = fabric(4, 2, leaf(2), is_rail_optimized=False)
    kinds = [direct.kinds[int(direct.kind[link])] for link in direct.route(0, 7)]
    assert kinds == ["rail up", "leaf up", "leaf down", "rail down"]


def test_islands_and_measured_links_limit_what_crosses_them() -> None:
    islands = ClusterTopology(
        islands=(IslandSpec(name="a", num_nodes=2), IslandSpec(name="b", num_nodes=2, bandwidth=25.0)),
        island_bandwidth=10.0,
        island_latency=3.0,
    )
    cluster = fabric(4, 1, islands)
    times = [
        collective_flow_time(cluster, "all_gather", "ring", pair, SIZE) for pair in ([0, 1], [2, 3], [0, 2])
    ]
    assert times == pytest.approx(
        [ACROSS + SIZE / 2 / NIC, ACROSS + SIZE / 2 / 25, 3.0 + SIZE / 2 / 10], rel=1e-12
    )
    bandwidth = np.full((4, 4), 40.0)
    bandwidth[0, 3] = 8.0
    measured = fabric(4, 1, ClusterTopology(matrix=LinkMatrix(bandwidth=bandwidth, latency=np.ones((4, 4)))))
    times = [collective_flow_time(measured, "all_gather", "ring", pair, SIZE) for pair in ([0, 1], [0, 3])]
    assert times == pytest.approx([1.0 + SIZE / 2 / 40, 1.0 + SIZE / 2 / 8], rel=1e-12)


def test_a_known_cluster_becomes_its_links() -> None:
    cluster = resolve_cluster("dgx-h100:1024")
    links = cluster_fabric(cluster, intra_efficiency=0.8, inter_efficiency=0.9)
    assert [links.kinds[kind] for kind in np.unique(links.kind)] == [
        "gpu up",
        "gpu down",
        "rail up",
        "rail down",
    ]
    (phase,) = collective_phases(links, "all_reduce", "ring", range(8192), 2.0**30)
    time = collective_flow_time(links, "all_reduce", "ring", range(8192), 2.0**30)
    # A node's 400 GB/s of NICs, less than 0.8 of 450 GB/s once 0.9 of it is reached.
    expected = phase.latency + 2 * 8191 / 8192 * 2.0**30 / 360e9
    assert time == pytest.approx(expected, rel=1e-12)
    scarce = replace(cluster, fabric=replace(cluster.fabric, oversubscription=2.0))
    halved = collective_flow_time(cluster_fabric(scarce), "all_reduce", "ring", range(8192), 2.0**30)
    assert halved - phase.latency == pytest.approx(2 * 8191 / 8192 * 2.0**30 / 200e9, rel=1e-12)


@pytest.mark.parametrize(
    "build",
    [
        lambda: cluster_fabric(resolve_cluster("eos"), intra_efficiency=1.5),
        lambda: fabric().with_capacity_factors({99: 0.5}),
        lambda: fabric().with_capacity_factors({0: 2.0}),
        lambda: fabric().with_background("gpu up", 1.0),
        lambda: fabric().links_of("leaf up"),
        lambda: fabric(num_rails=9),
        lambda: fabric(gpu_bandwidth=0.0),
    ],
)
def test_impossible_fabrics_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(SpecError, match=r"^fabric: "):
        build()


@pytest.mark.parametrize("seed", range(4))
def test_folding_changes_no_finish(seed: int) -> None:
    random = np.random.default_rng(seed)
    cluster = fabric(6, 4, leaf(2, 3.0), routing="ecmp" if seed % 2 else "adaptive", seed=seed)
    sources = random.integers(0, 24, 60)
    destinations = (sources + random.integers(1, 24, 60)) % 24
    if seed >= 2:
        sources, destinations = (grid.ravel() for grid in np.nonzero(~np.eye(24, dtype=bool)))
    num_bytes = random.choice([1.0e3, 2.0e3], len(sources)) if seed < 2 else np.full(len(sources), 1.0e3)
    routes = cluster.routes(sources, destinations)
    plain = FlowSet(
        capacity=cluster.capacity,
        route_starts=np.concatenate([[0], np.cumsum((routes >= 0).sum(axis=1))]).astype(np.int64),
        route_links=routes[routes >= 0],
        num_bytes=num_bytes,
        start=np.zeros(len(sources)),
    )
    folded = folded_flows(cluster, routes, num_bytes)
    finish = simulate_flows(folded.flows).finish[folded.class_of]
    assert finish == pytest.approx(simulate_flows(plain).finish, rel=1e-9)
    if seed == 2:
        assert folded.flows.num_flows <= 6


@pytest.mark.parametrize("algorithm", ["ring", "tree", "direct", "hierarchical", "pipelined_hierarchical"])
def test_a_single_rank_is_free(algorithm: Algorithm) -> None:
    assert collective_flow_time(fabric(2, 4), "all_reduce", algorithm, [3], SIZE) == 0.0


@pytest.mark.parametrize(
    ("collective", "algorithm", "ranks", "message"),
    [
        ("all_reduce", "rign", [0, 1], "did you mean 'ring'"),
        ("all_to_all", "ring", [0, 1], "ring does no all_to_all"),
        ("all_reduce", "ring", [0, 0], "must be different GPUs"),
        ("all_reduce", "ring", [0, 99], "GPUs 0 to 7"),
        ("all_reduce", "hierarchical", [0, 1, 2, 4], "same number of ranks"),
    ],
)
def test_impossible_collectives_are_refused(collective, algorithm, ranks, message) -> None:
    with pytest.raises(SpecError, match=message):
        collective_flow_time(fabric(2, 4), collective, algorithm, ranks, SIZE)


def test_collectives_of_several_phases_cannot_run_at_once() -> None:
    phases = collective_phases(fabric(2, 4), "all_reduce", "hierarchical", range(8), SIZE)
    with pytest.raises(SpecError, match="pipelined_hierarchical"):
        concurrent_flow_times(fabric(2, 4), [phases])
