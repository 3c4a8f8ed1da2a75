"""Searches of mixed clusters: as good as trying everything on small ones, both ways and all orders tried, refusals."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshwright.costmodels.context import cost_context
from meshwright.costmodels.mixed import mixed_costs, mixed_memory, replica_groups
from meshwright.errors import InfeasiblePlanError, SpecError
from meshwright.hardware_specs.catalog import load_node, resolve_cluster
from meshwright.hardware_specs.specs import ClusterSpec, NodeSpec
from meshwright.hardware_specs.topology import ClusterTopology, IslandSpec
from meshwright.planner.export import EXPORTERS
from meshwright.planner.kinds_text import machines_text, placement_sentence
from meshwright.planner.plan_file import PlanDocument, plan_document_text, read_plan
from meshwright.planner.search import SEARCHES, SearchRequest, SearchResult
from meshwright.planner.search.island_ways import island_orders, islands_of, ways_of_degrees
from meshwright.planner.space import SearchLimits
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.workload import TrainingWorkload
from meshwright.simcore.training.iteration import iteration_time

NUM_LAYERS = 12
NARROW = {
    "tp": (8,),
    "cp": (1,),
    "vpp": (1,),
    "micro_batch_size": (1,),
    "sequence_parallel": (True,),
    "recompute": ("none",),
    "sharding": ("none",),
    "optimizer_offload": ("none",),
    "activation_offload": (False,),
}


def slower(factor: float, memory: float = 1.0) -> NodeSpec:
    """Return a node whose GPUs compute and hold some share of an H100's."""
    node = load_node("dgx-h100")
    gpu = replace(
        node.gpu,
        peak_flops_per_second={name: peak * factor for name, peak in node.gpu.peak_flops_per_second.items()},
        memory_bandwidth_bytes_per_second=node.gpu.memory_bandwidth_bytes_per_second * factor,
        memory_bytes=node.gpu.memory_bytes * memory,
    )
    return replace(node, id="slower", gpu=gpu)


def cluster_of(second: NodeSpec, bandwidth: float = 50e9, num_nodes: int = 2) -> ClusterSpec:
    """Return DGX H100s and as many of another kind."""
    islands = (
        IslandSpec(name="fast", num_nodes=num_nodes),
        IslandSpec(name="slow", num_nodes=num_nodes, node=second),
    )
    topology = ClusterTopology(islands=islands, island_bandwidth=bandwidth)
    return replace(resolve_cluster(f"dgx-h100:{2 * num_nodes}"), topology=topology)


def job_of(cluster: ClusterSpec, batch: int = 16) -> TrainingJob:
    return TrainingJob(
        model=replace(load_model("llama-3-70b"), num_layers=NUM_LAYERS),
        cluster=cluster,
        workload=TrainingWorkload(global_batch_size=batch, sequence_length=4096, precision="bf16"),
        software="megatron-core",
    )


def search(job: TrainingJob, num_plans: int = 3, **limits: object) -> SearchResult:
    allowed = {**NARROW, **limits}
    request = SearchRequest(
        job=job,
        context=cost_context(job),
        limits=SearchLimits(allowed=allowed),  # type: ignore[arg-type]  # checked by the class
        num_plans=num_plans,
    )
    return SEARCHES["exhaustive"].run(request, lambda *_: None)


@pytest.mark.parametrize(
    ("factor", "memory", "bandwidth", "schedule"),
    [
        (0.5, 1.0, 200e9, "1f1b"),
        (0.3, 0.5, 50e9, "zb_h1"),
        (0.8, 0.4, 3e9, "1f1b"),
    ],
)
def test_stages_on_islands_equal_the_best_of_all_splits_and_orders(
    factor: float, memory: float, bandwidth: float, schedule: str
) -> None:
    job = job_of(cluster_of(slower(factor, memory), bandwidth))
    context = cost_context(job)
    plans = [
        ParallelPlan(
            dp=1,
            tp=8,
            pp=4,
            micro_batch_size=1,
            schedule=schedule,  # type: ignore[arg-type]  # a known word
            sequence_parallel=True,
            layers_per_stage=tuple(np.diff((0, *cuts, NUM_LAYERS)).tolist()),
            device_mapping=mapping,
        )
        for mapping in (None, DeviceMapping(host_order=(2, 3, 0, 1)))
        for cuts in itertools.combinations(range(1, NUM_LAYERS), 3)
    ]
    times = [iteration_time(costs, schedule) for costs in mixed_costs(context, plans)]
    fitting = (
        times[index]
        for index in np.argsort(times, kind="stable")
        if (memory := mixed_memory(context, plans[index])) and (memory.needed <= memory.usable).all()
    )
    found = search(job, pp=(4,), dp=(1,), schedule=(schedule,))
    assert found.ranked[0].prediction.iteration_time == pytest.approx(next(fitting), rel=1e-9)


def test_layers_follow_the_speeds_two_to_one() -> None:
    job = replace(
        job_of(cluster_of(slower(0.5), 400e9), batch=256),
        model=replace(load_model("llama-3-70b"), num_layers=48, vocab_size=1024),
    )
    plan = search(job, num_plans=1, pp=(4,), dp=(1,), schedule=("1f1b",)).ranked[0].plan
    kinds = replica_groups(job.cluster, plan, 256)[0].kinds
    fast = sum(layers for layers, kind in zip(plan.layers_per_stage, kinds, strict=True) if kind == 0)
    # Communication inside nodes is as fast on both, so a little less than twice as many.
    assert 29 <= fast <= 32


def test_replicas_take_micro_batches_by_their_speed() -> None:
    result = search(job_of(cluster_of(slower(0.5), 400e9), batch=64), pp=(1,), dp=(4,))
    shares = result.ranked[0].plan.micro_batch_shares
    assert sum(shares) == 64
    assert len(set(shares[:2])) == len(set(shares[2:])) == 1
    assert 1.5 < shares[0] / shares[2] <= 2.0
    assert any(note.startswith("Mixed cluster, best of each way") for note in result.notes)
    assert not result.is_certified


def test_behind_a_slow_link_the_fast_island_is_left_alone() -> None:
    job = job_of(cluster_of(slower(0.2), 1e8))
    winner = search(job).ranked[0].plan
    assert winner.num_gpus == 16
    assert winner.device_mapping is None


def test_every_order_of_islands_that_differ_is_tried_once() -> None:
    cluster = cluster_of(slower(0.5))
    assert cluster.topology is not None
    three = (*cluster.topology.islands, IslandSpec(name="again", num_nodes=2, node=slower(0.5)))
    islands = islands_of(replace(cluster, num_nodes=6, topology=replace(cluster.topology, islands=three)))
    assert [tuple(island.name for island in order) for order in island_orders(islands)] == [
        ("fast", "slow", "again"),
        ("slow", "fast", "again"),
        ("slow", "again", "fast"),
    ]


def test_ways_keep_stages_and_replicas_on_one_island() -> None:
    cluster = cluster_of(slower(0.5))
    orders = island_orders(islands_of(cluster))
    ways = list(ways_of_degrees(cluster, orders, tp=8, cp=1, pp=2, dp=2))
    assert [(way.split, way.kinds) for way in ways] == [
        ("stages", (0, 1)),
        ("stages", (1, 0)),
        ("replicas", (0, 1)),
    ]
    assert ways[1].device_mapping == DeviceMapping(host_order=(2, 3, 0, 1))
    assert ways[2].device_mapping == DeviceMapping(rank_order="tp-cp-ep-pp-dp")
    assert not list(ways_of_degrees(cluster, orders, tp=32, cp=1, pp=1, dp=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "cost"}, "objective cost is not searched on mixed clusters"),
        ({"wants_front": True}, "--pareto is not searched on mixed clusters"),
        ({"resume": Path("state.json")}, "--resume is not searched on mixed clusters"),
    ],
)
def test_what_the_search_does_not_do_is_refused(changes: dict[str, object], message: str) -> None:
    job = job_of(cluster_of(slower(0.5)))
    request = SearchRequest(
        job=job,
        context=cost_context(job),
        limits=SearchLimits(),
        **changes,  # type: ignore[arg-type]  # one field each
    )
    with pytest.raises(SpecError, match=message):
        SEARCHES["exhaustive"].run(request, lambda *_: None)
    with pytest.raises(SpecError, match="takes one kind of node"):
        SEARCHES["layerwise"].run(request, lambda *_: None)


def test_a_model_that_fits_nowhere_is_infeasible() -> None:
    job = replace(job_of(cluster_of(slower(0.5), num_nodes=1)), model=load_model("llama-3.1-405b"))
    with pytest.raises(InfeasiblePlanError):
        search(job)


def test_plans_say_what_runs_where_read_back_and_export(tmp_path: Path) -> None:
    job = job_of(cluster_of(load_node("dgx-a100"), 200e9))
    context = cost_context(job)
    staged = search(job, num_plans=1, pp=(4,), dp=(1,), schedule=("1f1b",)).ranked[0]
    shared = search(job, num_plans=1, pp=(1,), dp=(4,)).ranked[0]
    assert machines_text(job.cluster) == "16 x h100-sxm-80 + 16 x a100-sxm-80"
    assert "layers) on dgx-a100" in placement_sentence(job, staged.plan)
    assert "replicas 0-1 on dgx-h100" in placement_sentence(job, shared.plan)
    for ranked in (staged, shared):
        path = tmp_path / "plan.yaml"
        path.write_text(
            plan_document_text(PlanDocument(job=job, plan=ranked.plan), context, ranked.prediction)
        )
        document = read_plan(path)
        assert document.plan == ranked.plan
        assert document.job.cluster == job.cluster
    assert not EXPORTERS["megatron"].unsupported(job, staged.plan)
    refusals = " ".join(EXPORTERS["megatron"].unsupported(job, shared.plan))
    assert "runs equally many on every replica" in refusals
