"""Which links a plan's communications cross, and what the network as it is does to its iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.contention import simulate_contention
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.micro_batch import micro_batch_times
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.costmodels.traffic import NetworkConditions, PlanTraffic, described_fabric, plan_traffic
from meshwright.errors import SpecError
from meshwright.hardware_specs.topology import ClusterTopology, TierSpec
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.training.iteration import iteration_time

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]


def with_leaves(context: CostContext, nodes: int, oversubscription: float = 1.0) -> CostContext:
    """Return the same job below switches of so many nodes."""
    tier = TierSpec(name="leaf", nodes_per_group=nodes, oversubscription=oversubscription)
    cluster = replace(context.cluster, topology=ClusterTopology(tiers=(tier,)))
    return replace(context, cluster=cluster)


def loads(traffic: PlanTraffic) -> dict[str, dict[str, float]]:
    """Return the share of each contended link that each channel takes."""
    channels = traffic.traffic.channels
    return {
        traffic.fabric.link_name(int(link)): {
            traffic.names[channel]: round(float(channels.load[channel, place]), 9)
            for channel in np.flatnonzero(channels.load[:, place])
        }
        for place, link in enumerate(channels.links)
    }


def test_sends_and_reductions_of_a_stage_meet_at_its_nics(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    traffic = plan_traffic(make_context(cluster="dgx-h100:4"), make_plan(tp=8, pp=2, dp=2))
    assert loads(traffic) == {
        "rail up 0": {
            "send from stage 0 to 1": 1.0,
            "gradient reduction, stage 0": 1.0,
            "parameter gather, stage 0": 1.0,
        },
        "rail down 0": {
            "send from stage 1 to 0": 1.0,
            "gradient reduction, stage 0": 1.0,
            "parameter gather, stage 0": 1.0,
        },
        "rail up 16": {
            "send from stage 1 to 0": 1.0,
            "gradient reduction, stage 1": 1.0,
            "parameter gather, stage 1": 1.0,
        },
        "rail down 16": {
            "send from stage 0 to 1": 1.0,
            "gradient reduction, stage 1": 1.0,
            "parameter gather, stage 1": 1.0,
        },
    }
    assert traffic.traffic.channels.num_alike.tolist() == [16] * 4


def test_what_stays_inside_nodes_crosses_no_link(make_context: MakeContext, make_plan: MakePlan) -> None:
    context, plan = make_context(cluster="dgx-h100:1"), make_plan(tp=2, pp=2, dp=2)
    traffic = plan_traffic(context, plan)
    assert traffic.names == ()
    outcome = simulate_contention(context, plan)
    assert outcome.slowdown == pytest.approx(0.0, abs=1e-13)
    # With replicas further apart than stages, sends stay inside: only reductions leave.
    turned = replace(make_plan(tp=4, pp=2, dp=2), device_mapping=DeviceMapping(rank_order="tp-cp-ep-pp-dp"))
    assert all(
        "stage" in name and "send" not in name
        for name in plan_traffic(make_context(cluster="dgx-h100:2"), turned).names
    )


def test_data_parallelism_alone_has_nobody_to_meet(make_context: MakeContext, make_plan: MakePlan) -> None:
    context, plan = make_context(cluster="dgx-h100:4"), make_plan(tp=8, dp=4, sharding="zero1")
    outcome = simulate_contention(context, plan)
    static = iteration_time(iteration_costs(context, plan), plan.schedule)
    assert outcome.contended_time == pytest.approx(static, rel=1e-12)
    assert outcome.alone_time == static


def test_a_pipeline_meets_its_reductions(make_context: MakeContext, make_plan: MakePlan) -> None:
    context = make_context(cluster="dgx-h100:8", batch=16, length=8192)
    outcome = simulate_contention(context, make_plan(tp=8, pp=4, vpp=2, dp=2, sharding="zero1"))
    assert 0.0 < outcome.slowdown < 0.5
    iteration = outcome.iteration
    assert iteration.link_seconds.max() > 0.0
    assert (iteration.taken_time >= iteration.alone_time * (1.0 - 1e-9)).all()


def test_the_order_of_hosts_decides_which_switches_a_stage_spans(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    context = with_leaves(make_context(cluster="dgx-h100:4"), 2, 4.0)
    plan = make_plan(tp=8, pp=2, dp=2)

    def on_uplinks(order: tuple[int, ...]) -> set[str]:
        mapped = replace(plan, device_mapping=DeviceMapping(host_order=order))
        found = loads(plan_traffic(context, mapped))
        return {name for link, by in found.items() if link.startswith("leaf up") for name in by}

    assert on_uplinks((0, 1, 2, 3)) == set()  # A direction of sends fills an uplink alone, and just so.
    assert {"gradient reduction, stage 0", "gradient reduction, stage 1"} <= on_uplinks((0, 2, 1, 3))


def test_expert_exchanges_across_nodes_are_communication(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    context = make_context("mixtral-8x7b", "dgx-h100:2")
    plan = make_plan(dp=16, ep=8)
    assert not plan_traffic(context, plan).traffic.exchanges
    wide = make_plan(dp=8, tp=2, ep=8, etp=2)
    (exchange,) = plan_traffic(context, wide).traffic.exchanges
    times = micro_batch_times(context, PlanColumns.from_plans([wide], 64)).layer
    assert exchange.forward_time == pytest.approx(32 * times.forward_axes["ep"])
    assert exchange.backward_time == pytest.approx(32 * times.backward_axes["ep"])
    assert simulate_contention(context, wide).slowdown >= -1e-12


def test_weights_sharded_inside_nodes_do_not_leave_them(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    context = make_context(cluster="dgx-h100:4")
    whole, inside = (
        make_plan(dp=32, sharding=sharding, sharding_group=size)
        for sharding, size in (("zero3", None), ("hsdp", 8))
    )
    assert "sharded weights, stage 0" in plan_traffic(context, whole).names
    assert "sharded weights, stage 0" not in plan_traffic(context, inside).names
    assert simulate_contention(context, inside).slowdown == pytest.approx(0.0, abs=1e-9)


def test_slow_links_and_other_jobs_slow_what_crosses_them(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    context, plan = make_context(cluster="dgx-h100:4"), make_plan(tp=8, dp=4, sharding="zero1")
    fabric = described_fabric(context)
    reduce = iteration_costs(context, plan).gradient_reduce_time.sum()

    def taken(slow: NetworkConditions) -> float:
        outcome = simulate_contention(context, plan, slow)
        return float(outcome.iteration.taken_time[outcome.traffic.names.index("gradient reduction, stage 0")])

    half = fabric.with_capacity_factors({fabric.link_number("rail up 5"): 0.5})
    assert taken(NetworkConditions(fabric=half)) == pytest.approx(2.0 * reduce)
    busy = fabric.with_background("rail down", 0.75)
    assert taken(NetworkConditions(fabric=busy)) == pytest.approx(4.0 * reduce)
    down = fabric.with_capacity_factors({fabric.link_number("rail up 5"): 0.0})
    with pytest.raises(SpecError, match=r"cannot reach GPU \d+: link 'rail up 5' has failed"):
        simulate_contention(context, plan, NetworkConditions(fabric=down))


def test_hash_collisions_depend_on_the_seed_and_never_help(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    context = with_leaves(make_context(cluster="dgx-h100:8", batch=32), 2)
    plan = make_plan(tp=8, dp=8, sharding="zero1")
    spread = simulate_contention(context, plan)
    assert spread.slowdown == pytest.approx(0.0, abs=1e-12)
    times = {
        simulate_contention(
            context, plan, NetworkConditions(fabric=described_fabric(context, "ecmp", seed))
        ).contended_time
        for seed in range(4)
    }
    assert min(times) >= spread.contended_time * (1.0 - 1e-12)
    again = NetworkConditions(fabric=described_fabric(context, "ecmp", 3))
    assert simulate_contention(context, plan, again).contended_time in times


def test_a_checkpoint_is_written_beside_the_iteration(make_context: MakeContext, make_plan: MakePlan) -> None:
    context, plan = make_context(cluster="dgx-h100:2"), make_plan(tp=8, pp=2, dp=1)
    conditions = NetworkConditions(fabric=described_fabric(context), checkpoint_bandwidth=4e9)
    outcome = simulate_contention(context, plan, conditions)
    # Each node holds a stage; the stages share the parameters but for the embedding and the head, equally large.
    expected = 14.0 * context.model.num_parameters / 2.0 / 4e9
    assert outcome.iteration.beside_end[0] == pytest.approx(expected, rel=0.05)
    assert 0.0 <= outcome.slowdown < 0.02


def test_a_slow_rank_slows_its_stage(make_context: MakeContext, make_plan: MakePlan) -> None:
    context, plan = make_context(cluster="dgx-h100:2", batch=16), make_plan(tp=8, pp=2)
    plain = simulate_contention(context, plan)
    slow = simulate_contention(context, plan, slow_ranks=((9, 1.5),))
    assert 1.2 < slow.alone_time / plain.alone_time < 1.5
    assert simulate_contention(context, plan, slow_ranks=((9, 1.0),)).alone_time == pytest.approx(
        plain.alone_time
    )
