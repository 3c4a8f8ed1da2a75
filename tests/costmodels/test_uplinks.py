"""How full communications make the uplinks they share: counted by hand, and against routes over the fabric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.prediction import predict
from meshwright.costmodels.topology import host_ranks, host_slowdown, on_best_hosts, own_slowdown, uplinks
from meshwright.costmodels.traffic import plan_traffic
from meshwright.costmodels.uplinks import Uplinks
from meshwright.hardware_specs.topology import ClusterTopology, IslandSpec, LinkMatrix, TierSpec
from meshwright.simcore.domain.device_mapping import RANK_ORDERS, DeviceMapping
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.schedules import SCHEDULES

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]
HOSTS = 8
ALTERNATING = (0, 4, 1, 5, 2, 6, 3, 7)
TWO_TIERS = ClusterTopology(
    tiers=(
        TierSpec(name="leaf", nodes_per_group=2, oversubscription=2.0),
        TierSpec(name="spine", nodes_per_group=4, oversubscription=2.0),
    )
)


def leaves(nodes: int, oversubscription: float) -> ClusterTopology:
    return ClusterTopology(
        tiers=(TierSpec(name="leaf", nodes_per_group=nodes, oversubscription=oversubscription),)
    )


@pytest.fixture
def context_on(make_context: MakeContext) -> Callable[..., CostContext]:
    def context(topology: ClusterTopology | None, model: str = "llama-3-8b") -> CostContext:
        found = make_context(model, f"dgx-h100:{HOSTS}")
        return replace(found, cluster=replace(found.cluster, topology=topology))

    return context


def on_hosts(plan: ParallelPlan, order: tuple[int, ...]) -> ParallelPlan:
    return replace(plan, device_mapping=DeviceMapping(host_order=order))


def ring_of(context: CostContext, plan: ParallelPlan) -> float:
    """Return the slowdown of data parallel rings."""
    placed = host_ranks(context, plan).place(np.array([float(plan.dp * plan.cp)]), np.array([float(plan.tp)]))
    return float(placed.ring.across[0])  # type: ignore[index]  # an array


def test_a_ring_that_leaves_a_leaf_once_does_not_fill_its_uplinks(
    context_on: Callable[..., CostContext], make_plan: MakePlan
) -> None:
    # Leaves of 4 nodes, 2:1: uplinks carry 2 nodes' worth.
    context, plan = context_on(leaves(4, 2.0)), make_plan(tp=8, dp=8)
    assert ring_of(context, plan) == 1.0
    # Every one of the 4 nodes sends to the other leaf.
    assert ring_of(context, on_hosts(plan, ALTERNATING)) == 2.0
    # Three leave: 3 / 2.
    assert ring_of(context, on_hosts(plan, (0, 4, 1, 5, 2, 6, 7, 3))) == 1.5
    # Uplinks of one node's worth at 4:1, of half a node's at 8:1.
    assert ring_of(context_on(leaves(4, 4.0)), plan) == 1.0
    assert ring_of(context_on(leaves(4, 8.0)), plan) == 2.0
    assert ring_of(context_on(leaves(4, 1.0)), on_hosts(plan, ALTERNATING)) == 1.0


def test_sends_of_all_replicas_leave_at_once(
    context_on: Callable[..., CostContext], make_plan: MakePlan
) -> None:
    plan = make_plan(tp=8, pp=2, dp=4)
    context = context_on(leaves(4, 2.0))

    def hop(order: tuple[int, ...]) -> float:
        return float(
            host_ranks(context, on_hosts(plan, order))
            .hops(plan, np.array([0, 1], dtype=np.int64))
            .slowdown[0]
        )

    # Stages fill a leaf each; half of the replicas do; every replica keeps to a leaf.
    assert hop(tuple(range(8))) == 2.0
    assert hop((0, 1, 4, 5, 2, 6, 3, 7)) == 1.0
    assert hop((0, 1, 4, 5, 2, 3, 6, 7)) == 1.0


def test_an_all_to_all_leaves_with_what_is_for_others(context_on: Callable[..., CostContext]) -> None:
    shared = uplinks(context_on(leaves(4, 2.0)))
    assert shared is not None
    hosts = np.tile(np.arange(8), (8, 1))
    gpus = np.tile(np.arange(8)[:, None], 8)
    # 8 groups, one per rail, of 8 nodes: 4 of 7 parts of each node leave, from 4 nodes over 2 nodes' worth of uplinks.
    assert shared.exchange(hosts, gpus, 1.0) == pytest.approx(4.0 * 4.0 / 7.0 / 2.0)
    assert shared.exchange(hosts[:, :4], gpus[:, :4], 1.0) == 1.0
    # Only one rail is used: its plane is as full as before.
    assert shared.exchange(hosts[:1], gpus[:1], 1.0) == pytest.approx(8.0 / 7.0)
    one_plane = Uplinks(tiers=shared.tiers, gpus_per_node=8, num_planes=1)
    assert one_plane.exchange(hosts[:1], gpus[:1], 1.0) == 1.0


@pytest.mark.parametrize("topology", [leaves(2, 3.0), leaves(4, 2.0), leaves(3, 4.0), TWO_TIERS])
@pytest.mark.parametrize("degrees", [(8, 1, 8), (8, 2, 4), (4, 2, 8), (2, 1, 32)])
def test_static_factors_are_those_of_routes_over_the_fabric(
    context_on: Callable[..., CostContext],
    make_plan: MakePlan,
    topology: ClusterTopology,
    degrees: tuple[int, int, int],
) -> None:
    tp, pp, dp = degrees
    context, flat = context_on(topology), context_on(leaves(8, 1.0))
    for seed in range(3):
        order = tuple(np.random.default_rng(seed).permutation(HOSTS).tolist())
        plan = on_hosts(make_plan(tp=tp, pp=pp, dp=dp), order)
        ranks = host_ranks(context, plan)
        # A flow alone takes its GPU's NIC; the rate of a channel says how much of that its fullest link leaves.
        shared, whole = plan_traffic(context, plan), plan_traffic(flat, plan)
        loss = dict(
            zip(
                shared.names,
                whole.traffic.channels.full_rate / shared.traffic.channels.full_rate,
                strict=True,
            )
        )
        size, stride = np.array([float(dp)]), np.array([float(tp)])
        for stage in range(pp):
            found = replace(ranks, stage=stage).place(size, stride).ring.across[0]  # type: ignore[index]  # an array
            assert found == pytest.approx(loss[f"gradient reduction, stage {stage}"])
        if pp > 1:
            placement = SCHEDULES[plan.schedule].placement(pp, 1).ravel()
            hop = ranks.hops(plan, placement.astype(np.int64)).slowdown[0]
            assert hop == pytest.approx(loss["send from stage 0 to 1"])


def test_nothing_is_slower_than_when_all_hosts_send_at_once(
    context_on: Callable[..., CostContext], make_plan: MakePlan
) -> None:
    for topology in (leaves(4, 2.0), leaves(1, 2.0), TWO_TIERS):
        context = context_on(topology)
        assert (own_slowdown(context) <= host_slowdown(context)).all()
        for order in (tuple(range(8)), ALTERNATING):
            plan = on_hosts(make_plan(tp=8, dp=8), order)
            worst = replace(host_ranks(context, plan), slowdown=host_slowdown(context), uplinks=None)
            size, stride = np.array([8.0]), np.array([8.0])
            shared, alone = host_ranks(context, plan).place(size, stride), worst.place(size, stride)
            assert 1.0 <= shared.ring.across[0] <= alone.ring.across[0]  # type: ignore[index]  # arrays
            assert 1.0 <= shared.exchange.across[0] <= alone.exchange.across[0]  # type: ignore[index]  # arrays
    # A switch for each node: nobody leaves it more room.
    assert (own_slowdown(context_on(leaves(1, 2.0))) == host_slowdown(context_on(leaves(1, 2.0)))).all()


def test_no_order_of_hosts_below_switches_beats_the_best_hosts(
    context_on: Callable[..., CostContext], make_plan: MakePlan
) -> None:
    random = np.random.default_rng(1)
    plans = (
        make_plan(tp=2, pp=4, dp=8),
        make_plan(tp=8, dp=8),
        make_plan(dp=64, sharding="zero3"),
    )
    islands = ClusterTopology(
        tiers=leaves(2, 2.0).tiers,
        islands=(IslandSpec(name="a", num_nodes=4), IslandSpec(name="b", num_nodes=4, bandwidth=100e9)),
        island_bandwidth=50e9,
    )
    for topology in (TWO_TIERS, islands):
        context = context_on(topology)
        for plan in plans:
            least = predict(on_best_hosts(context, may_turn=True), plan).iteration_time
            for order in RANK_ORDERS:
                hosts = tuple(random.permutation(HOSTS).tolist())
                mapping = DeviceMapping(host_order=hosts, rank_order=order)  # type: ignore[arg-type]  # of the literal
                mapped = predict(context, replace(plan, device_mapping=mapping)).iteration_time
                assert least <= mapped * (1.0 + 1e-9)


def test_an_island_with_slower_nodes_has_narrower_uplinks(context_on: Callable[..., CostContext]) -> None:
    islands = (IslandSpec(name="a", num_nodes=4), IslandSpec(name="b", num_nodes=4, bandwidth=100e9))
    topology = replace(leaves(4, 2.0), islands=islands, island_bandwidth=50e9)
    shared = uplinks(context_on(topology))
    assert shared is not None
    # A DGX H100 sends 400 GB/s.
    assert shared.tiers[0].capacity.tolist() == [2.0, 0.5]


def test_measured_links_are_taken_as_they_are(context_on: Callable[..., CostContext]) -> None:
    matrix = LinkMatrix(bandwidth=np.full((HOSTS, HOSTS), 100e9), latency=np.full((HOSTS, HOSTS), 5e-6))
    context = context_on(replace(leaves(4, 2.0), matrix=matrix))
    assert uplinks(context) is None
    assert np.array_equal(own_slowdown(context), host_slowdown(context))
    assert uplinks(context_on(None)) is None
