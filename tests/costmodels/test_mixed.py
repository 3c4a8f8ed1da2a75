"""Plans on several kinds of node: equal kinds change nothing, each stage costs what its own GPU makes of it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from meshwright.costmodels.breakdown import iteration_breakdown
from meshwright.costmodels.calibration_choice import load_device_calibration
from meshwright.costmodels.calibration_document import CalibrationDocument
from meshwright.costmodels.calibration_writing import calibration_text
from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.memory import plan_memory
from meshwright.costmodels.mixed import gpus_of_kinds, mixed_memory, replica_groups, slowest_group
from meshwright.costmodels.prediction import predict
from meshwright.errors import CalibrationError, SpecError
from meshwright.hardware_specs.catalog import load_node, resolve_cluster
from meshwright.hardware_specs.specs import ClusterSpec, NodeSpec
from meshwright.hardware_specs.topology import ClusterTopology, IslandSpec
from meshwright.simcore.domain.device_mapping import DeviceMapping
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.workload import TrainingWorkload
from meshwright.simcore.training.iteration import iteration_time

BATCH = 64
PLAN = ParallelPlan(
    dp=2, tp=8, pp=2, micro_batch_size=1, schedule="1f1b", sequence_parallel=True, layers_per_stage=(16, 16)
)
TURNED = DeviceMapping(rank_order="tp-cp-ep-pp-dp")


def islands(second: NodeSpec | None, first: NodeSpec | None = None) -> ClusterSpec:
    """Return two nodes of one kind and two of another, joined by a slower link."""
    plain = resolve_cluster("dgx-h100:4")
    topology = ClusterTopology(
        islands=(IslandSpec(name="one", num_nodes=2), IslandSpec(name="two", num_nodes=2, node=second)),
        island_bandwidth=50e9,
    )
    return replace(plain, node=first or plain.node, topology=topology)


def context_of(cluster: ClusterSpec, model: str = "llama-3-8b") -> CostContext:
    workload = TrainingWorkload(global_batch_size=BATCH, sequence_length=4096, precision="bf16")
    return cost_context(
        TrainingJob(model=load_model(model), cluster=cluster, workload=workload, software="megatron-core")
    )


H100_A100 = islands(load_node("dgx-a100"))
TWIN = replace(load_node("dgx-h100"), id="dgx-h100-twin")


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        replace(PLAN, layers_per_stage=(20, 12), sharding="zero1"),
        replace(PLAN, device_mapping=TURNED),
        replace(PLAN, dp=4, tp=4, vpp=2, schedule="interleaved_1f1b", layers_per_stage=(8,) * 4),
        replace(PLAN, dp=4, pp=1, schedule="none", layers_per_stage=(32,), sharding="zero3"),
        replace(PLAN, vpp=2, schedule="zb_v", layers_per_stage=(8,) * 4),
        replace(PLAN, device_mapping=DeviceMapping(host_order=(2, 3, 0, 1))),
    ],
)
def test_two_kinds_that_are_equal_cost_what_one_kind_does_to_the_last_bit(plan: ParallelPlan) -> None:
    mixed, plain = context_of(islands(TWIN)), context_of(islands(None))
    assert mixed.kinds
    assert not plain.kinds
    ours, theirs = iteration_costs(mixed, plan), iteration_costs(plain, plan)
    for each in fields(theirs):
        assert np.array_equal(getattr(ours, each.name), getattr(theirs, each.name)), each.name
    one, other = predict(mixed, plan), predict(plain, plan)
    assert one.iteration_time == other.iteration_time
    assert one.mfu == pytest.approx(other.mfu, rel=1e-14)
    assert one.dollars_per_trillion_tokens == pytest.approx(other.dollars_per_trillion_tokens, rel=1e-14)
    assert np.array_equal(one.memory.total, other.memory.total)
    ours_terms = iteration_breakdown(mixed, plan, one.iteration).terms
    theirs_terms = iteration_breakdown(plain, plan, other.iteration).terms
    for term, values in theirs_terms.items():
        assert np.array_equal(ours_terms[term], values), term


def test_a_stage_costs_what_its_own_gpu_makes_of_it() -> None:
    context = context_of(H100_A100)
    costs = iteration_costs(context, PLAN)
    fast, slow = (iteration_costs(kind, PLAN) for kind in context.kinds)
    for name in ("forward_time", "backward_time", "weight_gradient_time", "optimizer_time"):
        assert getattr(costs, name)[0] == getattr(fast, name)[0]
        assert getattr(costs, name)[1] == getattr(slow, name)[1]
    assert costs.send_time[0] == max(fast.send_time[0], slow.send_time[0])


def test_the_order_of_hosts_says_which_stage_runs_on_what() -> None:
    turned = replace(PLAN, device_mapping=DeviceMapping(host_order=(2, 3, 0, 1)))
    groups = replica_groups(H100_A100, turned, BATCH)
    assert [group.kinds for group in groups] == [(1, 0)]
    assert gpus_of_kinds(H100_A100, turned) == (16, 16)
    one_kind = replace(PLAN, dp=1, device_mapping=DeviceMapping(host_order=(2, 3)))
    assert gpus_of_kinds(H100_A100, one_kind) == (0, 16)


def test_layers_in_proportion_to_speed_beat_an_even_split() -> None:
    context = context_of(H100_A100)
    times = {
        layers: predict(context, replace(PLAN, layers_per_stage=(layers, 32 - layers))).iteration_time
        for layers in range(8, 30)
    }
    best = min(times, key=lambda layers: times[layers])
    # An H100 does a layer about two and a half times as fast as an A100.
    assert 21 <= best <= 25
    assert times[best] < 0.75 * times[16]


def test_replicas_on_two_kinds_wait_for_the_slowest_share() -> None:
    context = context_of(H100_A100)
    even = replace(PLAN, device_mapping=TURNED)
    uneven = replace(even, micro_batch_shares=(46, 18))
    groups = replica_groups(H100_A100, uneven, BATCH)
    assert [(group.kinds, group.num_micro_batches) for group in groups] == [((0, 0), 46), ((1, 1), 18)]
    assert predict(context, uneven).iteration_time < predict(context, even).iteration_time
    assert slowest_group(context, even).kinds == (1, 1)
    extreme = replace(even, micro_batch_shares=(63, 1))
    assert slowest_group(context, extreme).kinds == (0, 0)
    # The slowest replica runs its own micro-batches, on its own kind throughout.
    costs = iteration_costs(context, extreme)
    alone = replace(context.kinds[0], workload=replace(context.workload, global_batch_size=126))
    own = iteration_costs(alone, even)
    assert costs.num_micro_batches == 63
    assert np.array_equal(costs.forward_time, own.forward_time)
    assert iteration_time(costs, "1f1b") >= iteration_time(own, "1f1b")


def test_every_stage_is_held_against_the_memory_of_its_own_gpu() -> None:
    small = replace(load_node("dgx-a100"), gpu=replace(load_node("dgx-a100").gpu, memory_bytes=24 * 2.0**30))
    context = context_of(islands(small))
    prediction = predict(context, PLAN)
    assert prediction.fullest_stage == 1
    assert prediction.usable_memory_bytes == 24 * 2.0**30
    memory = mixed_memory(context, PLAN)
    assert memory.usable.tolist() == [context.kinds[0].gpu.memory_bytes, 24 * 2.0**30]
    rows = [plan_memory(kind, PLAN).total[stage] for stage, kind in enumerate(context.kinds)]
    assert memory.memory.total.tolist() == rows


def test_money_and_power_are_those_of_the_nodes_in_use() -> None:
    context = context_of(H100_A100)
    prediction = predict(context, PLAN)
    fast, slow = context.cluster.kinds
    tokens_per_second = context.workload.num_tokens / prediction.iteration_time
    assert prediction.joules_per_token == pytest.approx(
        2 * (fast.power_watts + slow.power_watts) / tokens_per_second
    )


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            replace(PLAN, dp=1, tp=32, pp=1, schedule="none", layers_per_stage=(32,)),
            "lie on different kinds of node",
        ),
        (replace(PLAN, dp=4), "needs 64 GPUs"),
        (replace(PLAN, micro_batch_shares=(40, 40)), "add up to 80 x 1 = 80 sequences"),
        (replace(PLAN, device_mapping=DeviceMapping(host_order=(0, 1, 2, 9))), "names node 9, but cluster"),
    ],
)
def test_plans_that_cannot_lie_on_the_islands_are_refused(plan: ParallelPlan, message: str) -> None:
    with pytest.raises(SpecError, match=message) as error:
        predict(context_of(H100_A100), plan)
    assert "\n" not in str(error.value)


def test_experts_are_shared_by_replicas_of_one_kind_only() -> None:
    context = context_of(H100_A100, "mixtral-8x7b")
    plan = replace(PLAN, dp=4, pp=1, schedule="none", layers_per_stage=(32,), ep=8, tp=8)
    assert predict(context, plan).iteration_time > 0.0
    with pytest.raises(SpecError, match="share experts lie on replicas of different kinds"):
        predict(context, replace(plan, dp=16, tp=2, ep=8, etp=4))


def test_formulas_of_one_kind_refuse_the_context_of_several() -> None:
    context = context_of(H100_A100)
    with pytest.raises(SpecError, match="takes one kind of node"):
        _ = context.gpu
    assert "h100-sxm-80: " in context.calibration_text
    assert "; a100-sxm-80: " in context.calibration_text
    assert "a100" in context.calibration_identity["id"]


def test_a_users_calibration_is_for_the_kind_it_names(tmp_path: Path) -> None:
    gpu = H100_A100.kinds[1].gpu
    mine = CalibrationDocument(
        name="mine", gpu=gpu.id, operators={"gemm.bf16": load_device_calibration(gpu).gemm("bf16")}
    )
    path = tmp_path / "mine.json"
    path.write_text(calibration_text(mine))
    job = TrainingJob(
        model=load_model("llama-3-8b"),
        cluster=H100_A100,
        workload=TrainingWorkload(global_batch_size=BATCH, sequence_length=4096, precision="bf16"),
        software="megatron-core",
    )
    fast, slow = cost_context(job, calibration_paths=[path]).kinds
    assert slow.calibration.reason.startswith(f"given as {path}")
    assert fast.calibration.reason.startswith("built-in calibration")
    path.write_text(calibration_text(replace(mine, gpu="h200-sxm-141")))
    with pytest.raises(CalibrationError, match="no given calibration is for h100-sxm-80"):
        cost_context(job, calibration_paths=[path])
