"""Plans on hosts with unequal links: what slow links cost, and what a better order of hosts gains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.contention import simulate_contention
from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.prediction import predict
from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.hardware_specs.topology import ClusterTopology, IslandSpec, LinkMatrix, TierSpec
from meshwright.planner.export import EXPORTERS
from meshwright.planner.mapping.plan_mapping import has_choice, map_plan, rank_orders, search_mapped
from meshwright.planner.search import SEARCHES, SearchRequest
from meshwright.planner.search.base import Progress, Search, SearchResult
from meshwright.planner.space import SearchLimits
from meshwright.simcore.domain.device_mapping import RANK_ORDERS
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan, partition_layers
from meshwright.simcore.domain.workload import TrainingWorkload


def context_on(
    topology: ClusterTopology | None, num_nodes: int = 8, node: str = "dgx-h100", model: str = "llama-3-70b"
) -> CostContext:
    cluster = replace(resolve_cluster(f"{node}:{num_nodes}"), topology=topology)
    workload = TrainingWorkload(global_batch_size=64, sequence_length=4096)
    return cost_context(
        TrainingJob(model=load_model(model), cluster=cluster, workload=workload, software="megatron-core")
    )


def job_of(context: CostContext) -> TrainingJob:
    return TrainingJob(
        model=context.model, cluster=context.cluster, workload=context.workload, software="megatron-core"
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
    assert not has_choice(described)


def test_a_measured_matrix_never_makes_a_plan_faster_than_the_flat_fabric() -> None:
    flat = predict(context_on(None), plan_of()).iteration_time
    for seed in range(3):
        assert predict(context_on(random_matrix(seed)), plan_of()).iteration_time >= flat


@pytest.mark.parametrize(
    "plan",
    [
        plan_of(),
        plan_of(tp=16, dp=1),
        plan_of(tp=4, cp=2),
        # Parts of stages on a host, and a stage over a host and a half.
        plan_of(tp=4, dp=1, pp=8),
        plan_of(tp=4, dp=2, pp=5, layers_per_stage=(16,) * 5),
        plan_of(tp=4, dp=4, pp=4, cp=1, micro_batch_size=2),
        plan_of(tp=2, dp=1, pp=10, cp=2, layers_per_stage=(8,) * 10),
    ],
)
def test_mapping_gains_on_unequal_links_and_simulation_agrees(plan: ParallelPlan) -> None:
    context = context_on(random_matrix(0))
    mapped = map_plan(context, plan, effort=1e-3)
    assert mapped.hosts is not None
    assert mapped.hosts.bound <= mapped.hosts.cost < mapped.hosts.identity_cost
    mapping = mapped.plan.device_mapping
    assert mapping is not None
    assert len(set(mapping.host_order)) == -(-plan.num_gpus // 8)
    assert predict(context, mapped.plan).iteration_time == mapped.seconds < mapped.given_seconds
    assert mapped.given_seconds == predict(context, plan).iteration_time


def test_two_islands_hold_a_half_of_the_stages_each() -> None:
    # Nodes of the two islands alternate in the list; rings move more than pipelines, so they must not cross.
    bandwidth = np.where(np.arange(8)[:, None] % 2 == np.arange(8) % 2, 320e9, 10e9)
    topology = ClusterTopology(matrix=LinkMatrix(bandwidth=bandwidth, latency=np.full((8, 8), 5e-6)))
    mapped = map_plan(context_on(topology), plan_of(), effort=1e-3)
    assert mapped.plan.device_mapping is not None
    stages = np.array(mapped.plan.device_mapping.host_order).reshape(4, 2) % 2
    assert (stages[:, 0] == stages[:, 1]).all()


def searched_below_leaves(topology: ClusterTopology) -> tuple[CostContext, SearchResult]:
    """Return the best plans with four replicas of two stages on eight nodes."""
    context = context_on(topology)
    allowed: dict[str, tuple[int | str | bool, ...]] = {
        "tp": (8,),
        "pp": (2,),
        "vpp": (5, 10),
        "schedule": ("interleaved_1f1b",),
        "micro_batch_size": (1,),
        "cp": (1,),
        "recompute": ("none",),
        "sequence_parallel": (True,),
        "vocab_parallel": ("none",),
        "optimizer_offload": ("none",),
        "activation_offload": (False,),
        "sharding": ("zero1",),
    }
    request = SearchRequest(
        job=job_of(context), context=context, limits=SearchLimits(allowed=allowed), num_plans=2
    )
    return context, search_mapped(SEARCHES["exhaustive"], request, lambda *_: None, effort=1e-2)


def test_hosts_that_contention_makes_slower_than_their_own_order_are_not_chosen() -> None:
    leaves = ClusterTopology(tiers=(TierSpec(name="leaf", nodes_per_group=2, oversubscription=2.0),))
    context, found = searched_below_leaves(leaves)

    def contended(plan: ParallelPlan) -> float:
        return simulate_contention(context, plan).contended_time

    # Alone, what the search finds is a little faster; together, sends and rings fill the uplinks.
    natural = replace(found.ranked[0].plan, device_mapping=None)
    lured = map_plan(context, natural, effort=1e-3)
    assert lured.seconds < lured.given_seconds
    assert contended(lured.plan) > 1.1 * contended(natural)
    times = [contended(each.plan) for each in found.ranked]
    assert times == sorted(times)
    for each, seconds in zip(found.ranked, times, strict=True):
        assert seconds <= contended(replace(each.plan, device_mapping=None))
        assert each.prediction.iteration_time <= seconds
    assert [each.contended_time for each in found.ranked] == times
    assert f"{times[0]:.4g} s with contention, by which plans are ranked" in found.notes[-1]
    # The bound holds for the time without contention, and so for that with it.
    assert found.ranked[0].bound <= found.ranked[0].prediction.iteration_time


def test_pipelines_side_by_side_keep_sends_below_switches() -> None:
    leaves = ClusterTopology(tiers=(TierSpec(name="leaf", nodes_per_group=4, oversubscription=2.0),))
    plan = plan_of(dp=4, pp=2)
    mapped = map_plan(context_on(leaves), plan, effort=1e-3)
    # Both rings leave each leaf once, over uplinks of two nodes' worth: nothing is slower than on a flat fabric.
    flat = predict(context_on(None), plan).iteration_time
    assert mapped.seconds == pytest.approx(flat, rel=1e-9)
    assert mapped.given_seconds > flat
    placements = {each.device_mapping and each.device_mapping.host_order for each, _ in mapped.tried}
    assert {None, (0, 2, 4, 6, 1, 3, 5, 7)} <= placements
    assert [seconds for _, seconds in mapped.tried] == sorted(seconds for _, seconds in mapped.tried)


def test_measured_links_are_ranked_without_contention(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nobody knows which links measured pairs share")

    monkeypatch.setattr("meshwright.planner.mapping.contended.simulate_contention", refuse)
    _, found = searched_below_leaves(random_matrix(0))
    assert "contention" not in found.notes[-1]


def test_equal_links_leave_nothing_to_choose() -> None:
    islands = (IslandSpec(name="a", num_nodes=4), IslandSpec(name="b", num_nodes=4))
    alike = ClusterTopology(islands=islands, island_bandwidth=400e9)
    for topology in (alike, None):
        mapped = map_plan(context_on(topology), plan_of())
        assert (mapped.hosts, mapped.gpus, mapped.plan) == (None, None, plan_of())


def test_idle_hosts_are_not_named_and_a_larger_variant_takes_hosts_in_their_own_order() -> None:
    context = context_on(random_matrix(3))
    mapped = map_plan(context, plan_of(pp=3, dp=2, layers_per_stage=(27, 27, 26)), effort=1e-3)
    mapping = mapped.plan.device_mapping
    assert mapping is not None
    assert len(mapping.host_order) == 6
    mapping.check_fits(6, 8)
    larger = replace(plan_of(), device_mapping=mapping)
    assert predict(context, larger).iteration_time == predict(context, plan_of()).iteration_time


def test_the_better_order_of_ranks_is_taken_where_the_target_has_both() -> None:
    # Pairs of nodes that are listed far apart share fast links: for pipelines or for rings.
    bandwidth = np.where(np.arange(8)[:, None] % 4 == np.arange(8) % 4, 320e9, 15e9)
    topology = ClusterTopology(matrix=LinkMatrix(bandwidth=bandwidth, latency=np.full((8, 8), 5e-6)))
    context = context_on(topology)
    plan = plan_of(tp=4, pp=4, dp=4, micro_batch_size=1)
    seconds = [map_plan(context, plan, orders=(order,), effort=1e-3).seconds for order in RANK_ORDERS]  # type: ignore[arg-type]  # of the literal
    both = map_plan(context, plan, orders=RANK_ORDERS, effort=1e-3)  # type: ignore[arg-type]  # of the literal
    assert both.seconds == min(seconds)
    assert seconds[0] != seconds[1]
    job = job_of(context)
    for target, count in ((None, 1), ("megatron", 2), ("deepspeed", 1), ("torchtitan", 1)):
        request = SearchRequest(job=job, context=context, limits=SearchLimits(target=target))
        assert len(rank_orders(request, plan)) == count
        assert len(rank_orders(request, plan_of(pp=1, dp=8, schedule="none", layers_per_stage=(80,)))) == 1


def bridged_pairs() -> ClusterTopology:
    """Return PCIe servers in which bridges join GPUs that are not neighbours in the numbering."""
    links = np.full((8, 8), 16e9)
    links[:4, :4] = links[4:, 4:] = 32e9
    for one, two in ((0, 5), (1, 4), (2, 7), (3, 6)):
        links[one, two] = links[two, one] = 300e9
    return ClusterTopology(gpu_links=tuple(map(tuple, links.tolist())))


def test_tensor_parallel_pairs_are_put_on_bridges_and_the_exporter_writes_it() -> None:
    context = context_on(bridged_pairs(), 2, "a100-pcie-8", "llama-3-8b")
    plan = plan_of(tp=2, dp=8, pp=1, schedule="none", layers_per_stage=(32,))
    mapped = map_plan(context, plan)
    assert mapped.gpus is not None
    assert mapped.gpus.is_exact
    assert mapped.gpus.cost == mapped.gpus.bound < mapped.gpus.identity_cost
    assert mapped.seconds < 0.8 * mapped.given_seconds
    mapping = mapped.plan.device_mapping
    assert mapping is not None
    (order,) = mapping.gpu_orders
    assert {frozenset(order[place : place + 2]) for place in range(0, 8, 2)} == {
        frozenset(pair) for pair in ((0, 5), (1, 4), (2, 7), (3, 6))
    }
    bundle = EXPORTERS["megatron"].export(job_of(context), mapped.plan, "torchrun")
    written = next(file.text for file in bundle.files if file.name == "placement.sh")
    assert f"'{','.join(map(str, order))}'" in written


def test_a_plan_on_a_part_of_a_node_takes_its_best_gpus() -> None:
    context = context_on(bridged_pairs(), 1, "a100-pcie-8", "llama-3-8b")
    mapped = map_plan(context, plan_of(tp=2, dp=2, pp=1, schedule="none", layers_per_stage=(32,)))
    assert mapped.plan.device_mapping is not None
    (order,) = mapped.plan.device_mapping.gpu_orders
    assert len(order) == 4
    mapped.plan.device_mapping.check_fits(1, 4)
    assert mapped.seconds < mapped.given_seconds


def test_gpu_links_must_be_a_square_of_positive_numbers() -> None:
    with pytest.raises(SpecError, match="gpu_links from GPU 0 to GPU 1 must be above 0"):
        ClusterTopology(gpu_links=((0.0, 0.0), (1.0, 0.0)))
    with pytest.raises(SpecError, match="must be square"):
        ClusterTopology(gpu_links=((0.0, 1.0),))
    four = replace(resolve_cluster("a100-pcie-8").node, id="half-a-server", num_gpus=4)
    cluster = replace(resolve_cluster("a100-pcie-8:2"), node=four)
    with pytest.raises(SpecError, match="gpu_links has 8 GPUs, but half-a-server has 4"):
        replace(cluster, topology=bridged_pairs())


class Settled:
    """The exhaustive search as if it had stopped with its winner settled, and plans left from some time on."""

    name = "settled"

    def __init__(self, least_left: float | None) -> None:
        self.least_left = least_left

    def run(self, request: SearchRequest, progress: Progress) -> SearchResult:
        found = SEARCHES["exhaustive"].run(request, progress)
        return replace(found, is_certified=True, least_left=self.least_left)


def searched(
    bandwidth: np.ndarray, order: list[int], search: Search = SEARCHES["exhaustive"]
) -> SearchResult:
    """Return the best plans on hosts that are listed in some order, over a small space."""
    links = bandwidth[np.ix_(order, order)]
    topology = ClusterTopology(matrix=LinkMatrix(bandwidth=links, latency=np.full_like(links, 5e-6)))
    context = context_on(topology, len(order), "dgx-a100", "llama-3-8b")
    allowed: dict[str, tuple[int | str | bool, ...]] = {
        "tp": (2, 4),
        "pp": (1, 2, 4),
        "schedule": ("1f1b",),
        "micro_batch_size": (1,),
        "cp": (1,),
        "recompute": ("none",),
        "sequence_parallel": (True,),
        "vocab_parallel": ("none",),
        "optimizer_offload": ("none",),
        "activation_offload": (False,),
        "sharding": ("zero1",),
    }
    request = SearchRequest(
        job=job_of(context), context=context, limits=SearchLimits(allowed=allowed), num_plans=3
    )
    return search_mapped(search, request, lambda *_: None, effort=1e-2)


def test_the_answer_does_not_depend_on_the_order_in_which_hosts_are_listed() -> None:
    random = np.random.default_rng(4)
    bandwidth = random.uniform(10e9, 160e9, (4, 4))
    bandwidth[:2, 2:] = bandwidth[2:, :2] = 4e9
    found = [searched(bandwidth, order) for order in ([0, 1, 2, 3], [2, 0, 3, 1])]
    times = [each.ranked[0].prediction.iteration_time for each in found]
    assert times == pytest.approx([times[0]] * 2, rel=1e-9)
    plans = {replace(each.ranked[0].plan, device_mapping=None) for each in found}
    assert len(plans) == 1
    assert all("as mapped" in each.notes[-1] for each in found)
    for each in found:
        assert each.ranked[0].bound <= each.ranked[0].prediction.iteration_time * (1.0 + 1e-9)


def test_a_winner_of_the_best_hosts_thinkable_is_no_winner_of_those_there_are() -> None:
    # The search settled its winner at the least any hosts allow; on these it is slower than what is left may be.
    bandwidth = np.random.default_rng(4).uniform(1e9, 4e9, (4, 4))
    order = [0, 1, 2, 3]
    plain = searched(bandwidth, order)
    seconds = plain.ranked[0].seconds
    certain = searched(bandwidth, order, Settled(2.0 * seconds))
    doubtful = searched(bandwidth, order, Settled(0.75 * seconds))
    assert certain.ranked[0].seconds == doubtful.ranked[0].seconds == seconds
    assert not doubtful.is_certified
    assert "a plan that was not mapped may be up to 25.0% better" in doubtful.notes[-1]
    assert certain.is_certified == plain.is_certified
    # A search that knows only of its own winner certifies nothing about other hosts.
    assert not searched(bandwidth, order, Settled(None)).is_certified
