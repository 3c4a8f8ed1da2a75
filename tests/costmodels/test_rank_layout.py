"""Which links each group of ranks uses: against groups written out rank by rank."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from meshwright.costmodels.breakdown import iteration_breakdown
from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.prediction import predict
from meshwright.costmodels.rank_layout import ConsecutiveRanks, ring_bottleneck
from meshwright.costmodels.topology import host_ranks, host_slowdown, on_best_hosts
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.hardware_specs.topology import ClusterTopology, LinkMatrix, TierSpec
from meshwright.simcore.domain.device_mapping import RANK_ORDERS, DeviceMapping
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan, partition_layers
from meshwright.simcore.domain.workload import TrainingWorkload
from meshwright.simcore.training.iteration import simulate_iteration

HOSTS = 8


def context_on(topology: ClusterTopology | None, model: str = "llama-3-70b") -> CostContext:
    cluster = replace(resolve_cluster(f"dgx-h100:{HOSTS}"), topology=topology)
    job = TrainingJob(
        model=load_model(model),
        cluster=cluster,
        workload=TrainingWorkload(global_batch_size=64, sequence_length=4096),
        software="megatron-core",
    )
    return cost_context(job)


def matrix(seed: int, slow: float = 50e9) -> ClusterTopology:
    bandwidth = np.random.default_rng(seed).uniform(slow, 320e9, (HOSTS, HOSTS))
    return ClusterTopology(matrix=LinkMatrix(bandwidth=bandwidth, latency=np.full((HOSTS, HOSTS), 5e-6)))


def plan_of(**changes: object) -> ParallelPlan:
    fields: dict[str, object] = {"dp": 2, "pp": 4, "tp": 8, "sequence_parallel": True, "sharding": "zero1"}
    fields |= {"micro_batch_size": 1, "schedule": "1f1b"} | changes
    if fields["pp"] == 1:
        fields["schedule"] = "none"
    layers = 32 if changes.get("ep", 1) != 1 else 80
    return ParallelPlan(**(fields | {"layers_per_stage": partition_layers(layers, fields["pp"])}))  # type: ignore[arg-type]  # checked by the class


def member_hosts(plan: ParallelPlan, stage: int, size: int, stride: int) -> list[list[int]]:
    """Return the hosts of every group of a stage, from global rank numbers."""
    mapping = plan.device_mapping or DeviceMapping()
    inner = plan.tp * plan.cp
    hosts = []
    for index in range(plan.dp * inner):
        replica, rank = divmod(index, inner)
        turned = mapping.rank_order != RANK_ORDERS[0]
        number = (replica * plan.pp + stage if turned else stage * plan.dp + replica) * inner + rank
        hosts.append(mapping.host_of_node(number // 8))
    return [
        [hosts[start + offset + place * stride] for place in range(size)]
        for start in range(0, len(hosts), size * stride)
        for offset in range(stride)
    ]


@pytest.mark.parametrize("order", RANK_ORDERS)
@pytest.mark.parametrize(
    ("tp", "cp", "dp", "pp"),
    [(8, 1, 2, 4), (2, 1, 8, 4), (4, 2, 4, 2), (1, 1, 16, 4), (16, 1, 2, 2), (2, 2, 4, 4)],
)
def test_the_worst_group_of_a_stage_sets_its_slowdown(order: str, tp: int, cp: int, dp: int, pp: int) -> None:
    context = context_on(matrix(tp * dp))
    shuffled = tuple(np.random.default_rng(dp).permutation(HOSTS).tolist())
    mapping = DeviceMapping(host_order=shuffled, rank_order=order)  # type: ignore[arg-type]  # of the literal
    plan = plan_of(tp=tp, cp=cp, dp=dp, pp=pp, sequence_parallel=tp > 1, device_mapping=mapping)
    slowdown, ranks = host_slowdown(context), host_ranks(context, plan)
    for stage in range(pp):
        for size, stride in ((tp, 1), (cp, tp), (dp * cp, tp), (tp * cp * dp, 1)):
            groups = member_hosts(plan, stage, size, stride)
            ring = max(
                slowdown[one, two]
                for group in groups
                for one, two in zip(group, group[1:] + group[:1], strict=True)
            )
            exchange = max(
                np.mean([slowdown[one, two] for two in group if two != one])
                for group in groups
                for one in group
                if len(set(group)) > 1 or group == groups[-1]
            ) if any(len(set(group)) > 1 for group in groups) else 1.0  # fmt: skip
            fewest = min(group.count(host) for group in groups for host in group)
            placed = replace(ranks, stage=stage).place(np.array([float(size)]), np.array([float(stride)]))
            assert placed.ring.across[0] == pytest.approx(ring)  # type: ignore[index]  # an array
            assert placed.exchange.across[0] == pytest.approx(exchange)  # type: ignore[index]  # an array
            assert placed.ranks_per_node[0] == fewest


def test_on_equal_links_a_plan_costs_what_it_costs_on_the_flat_fabric() -> None:
    tiers = ClusterTopology(tiers=(TierSpec(name="leaf", nodes_per_group=4),))
    for plan in (
        plan_of(),
        plan_of(tp=2, dp=8),
        plan_of(tp=16, dp=1),
        plan_of(tp=4, cp=2),
        plan_of(tp=1, dp=64, pp=1, sequence_parallel=False, sharding="zero3"),
    ):
        flat, described = (iteration_costs(context_on(each), plan) for each in (None, tiers))
        for name in (
            "forward_time",
            "backward_time",
            "send_time",
            "gradient_reduce_time",
            "parameter_gather_time",
        ):
            assert np.array_equal(getattr(flat, name), getattr(described, name))


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        (plan_of(tp=16, dp=1), "forward_time"),
        (plan_of(tp=8, cp=2, dp=1), "forward_time"),
        (plan_of(tp=1, dp=64, pp=1, sequence_parallel=False, sharding="zero3"), "forward_time"),
        (plan_of(), "gradient_reduce_time"),
        (plan_of(), "send_time"),
    ],
    ids=["tensor", "context", "fsdp gathers", "gradients", "sends"],
)
def test_every_communication_that_crosses_nodes_takes_longer_on_slow_links(
    plan: ParallelPlan, what: str
) -> None:
    one_slow = np.full((HOSTS, HOSTS), 320e9)
    one_slow[0, 1] = 20e9
    links = ClusterTopology(matrix=LinkMatrix(bandwidth=one_slow, latency=np.full((HOSTS, HOSTS), 5e-6)))
    # Hosts 0 and 1 share the first stage, or are neighbours in the pipeline of one-node stages.
    plan = replace(
        plan,
        device_mapping=DeviceMapping(host_order=(0, 2, 1, 3, 4, 5, 6, 7)) if what == "send_time" else None,
    )
    flat = getattr(iteration_costs(context_on(None), plan), what)
    slow = getattr(iteration_costs(context_on(links), plan), what)
    assert slow[0] > flat[0] * 1.05
    assert np.all(slow >= flat)
    # Stages on other hosts are not slowed.
    assert plan.pp == 1 or what == "send_time" or slow[1] == flat[1]


def test_expert_exchanges_take_the_mean_of_their_links() -> None:
    plan = plan_of(tp=1, ep=16, dp=64, pp=1, sequence_parallel=False)
    slow = np.full((HOSTS, HOSTS), 320e9)
    slow[0, 1] = 320e9 / 3
    links = ClusterTopology(matrix=LinkMatrix(bandwidth=slow, latency=np.full((HOSTS, HOSTS), 5e-6)))
    context = context_on(links, "mixtral-8x7b")
    pair, all_hosts = (
        host_ranks(context, plan).place(np.array([size]), np.array([1.0])).exchange.across[0]  # type: ignore[index]  # an array
        for size in (16.0, 64.0)
    )
    assert pair == pytest.approx(3.0)
    assert all_hosts == pytest.approx((3.0 + 6.0) / 7.0)


def test_no_order_of_hosts_beats_the_best_hosts() -> None:
    random = np.random.default_rng(1)
    plans = (plan_of(), plan_of(tp=2, dp=8), plan_of(tp=16, dp=1), plan_of(tp=4, cp=2))
    for seed in range(3):
        context = context_on(matrix(seed, slow=10e9))
        for plan in plans:
            least = predict(on_best_hosts(context, may_turn=True), plan).iteration_time
            for order in RANK_ORDERS:
                hosts = tuple(random.permutation(HOSTS).tolist())
                mapping = DeviceMapping(host_order=hosts, rank_order=order)  # type: ignore[arg-type]  # of the literal
                mapped = predict(context, replace(plan, device_mapping=mapping)).iteration_time
                assert least <= mapped * (1.0 + 1e-9)


def test_the_other_order_of_ranks_keeps_pipelines_in_nodes_on_a_flat_fabric_too() -> None:
    plan = plan_of(tp=2, dp=8, pp=4)
    turned = replace(plan, device_mapping=DeviceMapping(rank_order=RANK_ORDERS[1]))  # type: ignore[arg-type]  # of the literal
    usual, other = (iteration_costs(context_on(None), each) for each in (plan, turned))
    # Sends over NVLink, and rings of eight replicas over eight nodes instead of two.
    assert np.all(other.send_time[:-1] < 0.5 * usual.send_time[:-1])
    assert np.all(other.gradient_reduce_time > 2.0 * usual.gradient_reduce_time)


def test_a_ring_inside_a_node_is_as_slow_as_the_best_order_at_least() -> None:
    random = np.random.default_rng(2)
    for size in (2, 3, 4, 5, 6):
        links = random.uniform(0.1, 3.0, (size, size))
        links = np.maximum(links, links.T)
        best = min(
            max(links[one, two] for one, two in zip(ring, (*ring[1:], ring[0]), strict=True))
            for ring in permutations(range(size))
        )
        assert ring_bottleneck(links) <= best + 1e-12
        # Two and three GPUs have one ring only.
        assert size > 3 or ring_bottleneck(links) == pytest.approx(best)


def test_consecutive_ranks_know_no_slow_links() -> None:
    placed = ConsecutiveRanks(gpus_per_node=8).place(np.array([16.0]), np.array([4.0]))
    assert (placed.ranks_per_node[0], placed.ring.across, placed.exchange.inside) == (2.0, 1.0, 1.0)


def test_the_terms_of_a_breakdown_on_unequal_links_add_up() -> None:
    context = context_on(matrix(4))
    for plan in (plan_of(tp=16, dp=1), plan_of(tp=8, cp=2, dp=1), plan_of(tp=2, dp=8)):
        result = simulate_iteration(iteration_costs(context, plan), plan.schedule)
        parts = iteration_breakdown(context, plan, result)
        total = np.sum(list(parts.terms.values()), axis=0)
        assert total == pytest.approx(np.full(plan.pp, result.iteration_time), rel=1e-9)
