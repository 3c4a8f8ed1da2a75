"""Plans on hosts with unequal links: what slow links cost, and what a better order of hosts gains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.prediction import predict
from meshwright.costmodels.topology import link_factors
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.hardware_specs.topology import ClusterTopology, IslandSpec, LinkMatrix, TierSpec
from meshwright.planner.mapping.plan_mapping import map_plan
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan, partition_layers
from meshwright.simcore.domain.workload import TrainingWorkload


def context_on(topology: ClusterTopology | None, num_nodes: int = 8) -> CostContext:
    cluster = replace(resolve_cluster(f"dgx-h100:{num_nodes}"), topology=topology)
    workload = TrainingWorkload(global_batch_size=64, sequence_length=4096)
    return cost_context(
        TrainingJob(
            model=load_model("llama-3-70b"), cluster=cluster, workload=workload, software="megatron-core"
        )
    )


def plan_of(dp: int = 2, pp: int = 4, **changes: object) -> ParallelPlan:
    fields: dict[str, object] = {
        "dp": dp,
        "pp": pp,
        "tp": 8,
        "sequence_parallel": True,
        "micro_batch_size": 1,
        "schedule": "1f1b",
        "sharding": "zero1",
        "layers_per_stage": partition_layers(80, pp),
    }
    return ParallelPlan(**(fields | changes))  # type: ignore[arg-type]  # checked by the class


def random_matrix(seed: int, num_nodes: int = 8) -> ClusterTopology:
    bandwidth = np.random.default_rng(seed).uniform(50e9, 320e9, (num_nodes, num_nodes))
    # As importers leave it.
    np.fill_diagonal(bandwidth, 0.0)
    return ClusterTopology(
        matrix=LinkMatrix(bandwidth=bandwidth, latency=np.full((num_nodes, num_nodes), 5e-6))
    )


def test_a_non_blocking_topology_changes_nothing() -> None:
    tiers = (TierSpec(name="leaf", nodes_per_group=4),)
    flat, described = context_on(None), context_on(ClusterTopology(tiers=tiers))
    assert predict(described, plan_of()).iteration_time == predict(flat, plan_of()).iteration_time


def test_sends_and_rings_take_as_long_as_their_slowest_link_makes_them() -> None:
    # Two nodes per leaf, uplinks at a third: rings of two nodes stay in a leaf, every hop leaves it.
    context = context_on(
        ClusterTopology(tiers=(TierSpec(name="leaf", nodes_per_group=2, oversubscription=3.0),))
    )
    factors = link_factors(context, plan_of())
    assert factors is not None
    assert factors.ring.tolist() == [1.0] * 4
    assert factors.hop[0, 1] == pytest.approx(3.0)
    flat, slow = iteration_costs(context_on(None), plan_of()), iteration_costs(context, plan_of())
    assert slow.send_time == pytest.approx(3.0 * flat.send_time)
    assert slow.gradient_reduce_time == pytest.approx(flat.gradient_reduce_time)
    # The other rank order puts pipelines into the leaves and rings across them.
    turned = plan_of(pp=2, dp=4, device_mapping=DeviceMapping(rank_order="tp-cp-ep-pp-dp"))
    other = link_factors(context, turned)
    assert other is not None
    assert other.hop[0, 1] == 1.0
    assert other.ring.tolist() == pytest.approx([3.0, 3.0])


def test_a_measured_matrix_never_makes_a_plan_faster_than_the_flat_fabric() -> None:
    flat = predict(context_on(None), plan_of()).iteration_time
    for seed in range(3):
        assert predict(context_on(random_matrix(seed)), plan_of()).iteration_time >= flat


def test_mapping_gains_on_unequal_links_and_simulation_agrees() -> None:
    context = context_on(random_matrix(0))
    mapped = map_plan(context, plan_of(), effort=1e-3)
    assert mapped.search is not None
    assert mapped.search.bound <= mapped.search.cost < mapped.search.identity_cost
    mapping = mapped.plan.device_mapping
    assert mapping is not None
    assert sorted(mapping.host_order) == list(range(8))
    assert predict(context, mapped.plan).iteration_time < predict(context, plan_of()).iteration_time


def test_two_islands_hold_a_half_of_the_stages_each() -> None:
    # Nodes of the two islands alternate in the list; rings move more than pipelines, so they must not cross.
    bandwidth = np.where(np.arange(8)[:, None] % 2 == np.arange(8) % 2, 320e9, 10e9)
    topology = ClusterTopology(matrix=LinkMatrix(bandwidth=bandwidth, latency=np.full((8, 8), 5e-6)))
    mapped = map_plan(context_on(topology), plan_of(), effort=1e-3)
    assert mapped.plan.device_mapping is not None
    stages = np.array(mapped.plan.device_mapping.host_order).reshape(4, 2) % 2
    assert (stages[:, 0] == stages[:, 1]).all()


def test_equal_links_leave_nothing_to_choose() -> None:
    islands = (IslandSpec(name="a", num_nodes=4), IslandSpec(name="b", num_nodes=4))
    alike = ClusterTopology(islands=islands, island_bandwidth=400e9)
    assert map_plan(context_on(alike), plan_of()).search is None
    assert map_plan(context_on(None), plan_of()).search is None


def test_idle_hosts_are_not_named_and_a_larger_variant_takes_hosts_in_their_own_order() -> None:
    context = context_on(random_matrix(3))
    mapped = map_plan(context, plan_of(pp=3, dp=2, layers_per_stage=(27, 27, 26)), effort=1e-3)
    mapping = mapped.plan.device_mapping
    assert mapping is not None
    assert len(mapping.host_order) == 6
    mapping.check_fits(6, 8)
    larger = replace(plan_of(), device_mapping=mapping)
    assert predict(context, larger).iteration_time == predict(context, plan_of()).iteration_time
