"""From plans to iterations under every schedule: work is conserved, closed forms hold, what is shared is summed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.collectives import GroupPlacement, collective_time
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.memory import plan_memory
from meshwright.costmodels.micro_batch import (
    MicroBatchTimes,
    layers_backward,
    layers_forward,
    micro_batch_times,
)
from meshwright.costmodels.parallelism.data import sync_times
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns
from meshwright.costmodels.stage import leading_dense_layers, virtual_stage_parameters
from meshwright.simcore.domain.plan import ParallelPlan, partition_layers
from meshwright.simcore.schedules import SCHEDULES
from meshwright.simcore.training.costs import IterationCosts
from meshwright.simcore.training.iteration import simulate_iteration

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]
# Chunks per stage a plan writes, by schedule.
CHUNKS = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved_1f1b": 2,
    "zb_h1": 1,
    "zb_h2": 1,
    "zb_v": 2,
    "v_half": 2,
    "v_min": 2,
    "dualpipe": 1,
    "dualpipe_v": 2,
}
BOTH_ENDS = ["zb_v", "v_half", "v_min", "dualpipe", "dualpipe_v"]
PP, BATCHES = 4, 16


def plan_of(make_plan: MakePlan, num_layers: int, schedule: str, **changes: object) -> ParallelPlan:
    vpp = CHUNKS[schedule]
    layers = partition_layers(num_layers, PP * vpp)
    return make_plan(num_layers, pp=PP, vpp=vpp, schedule=schedule, layers_per_stage=layers, **changes)


def times_of(context: CostContext, plan: ParallelPlan) -> MicroBatchTimes:
    return micro_batch_times(context, PlanColumns.from_plans([plan], context.workload.global_batch_size))


def work_of(context: CostContext, plan: ParallelPlan) -> tuple[float, float]:
    """Return forward and backward of the whole model for one micro-batch [s]."""
    times = times_of(context, plan)
    layers = np.array([float(context.model.num_layers)])
    leading = np.array([float(leading_dense_layers(context))])
    recomputed = layers if plan.recompute != "none" else 0.0 * layers
    forward = layers_forward(times, layers, leading) + times.boundary_forward
    backward = layers_backward(times, layers, leading, recomputed) + times.boundary_backward
    return float(forward[0]), float(backward[0])


def without_communication(costs: IterationCosts) -> IterationCosts:
    """Return the same work with nothing that is sent, gathered or reduced, and nothing once per iteration."""
    nothing = np.zeros_like(costs.send_time)
    return replace(
        costs,
        send_time=nothing,
        gradient_reduce_time=nothing,
        parameter_gather_time=nothing,
        optimizer_time=np.zeros(costs.num_stages),
        fixed_time=0.0,
        overlapped_time=None,
    )


@pytest.mark.parametrize("schedule", CHUNKS)
@pytest.mark.parametrize("name", ["llama-3-8b", "deepseek-v3", "mixtral-8x7b"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_stages_together_run_every_layer_of_every_micro_batch(
    make_context: MakeContext, make_plan: MakePlan, schedule: str, name: str, recompute: str
) -> None:
    context = make_context(name, batch=BATCHES, length=4096)
    plan = plan_of(make_plan, context.model.num_layers, schedule, recompute=recompute)
    costs = without_communication(iteration_costs(context, plan))
    forward, backward = work_of(context, plan)
    copies = SCHEDULES[schedule].num_model_copies
    assert costs.forward_time.sum() == pytest.approx(copies * forward)
    assert costs.backward_time.sum() == pytest.approx(copies * backward)
    result = simulate_iteration(costs, schedule)
    assert result.busy_time.sum() == pytest.approx(BATCHES * (forward + backward))
    # No device waits for less than its own work, none for more than all of it.
    assert result.busy_time.max() <= result.iteration_time <= BATCHES * (forward + backward)


@pytest.mark.parametrize("schedule", CHUNKS)
def test_equal_stages_take_the_closed_form(
    make_context: MakeContext, make_plan: MakePlan, schedule: str
) -> None:
    # A million layers per chunk beside a vocabulary of one token: embedding and head are nothing.
    num_layers = PP * CHUNKS[schedule] * 10**6
    context = make_context(batch=BATCHES, num_layers=num_layers, vocab_size=1)
    costs = without_communication(iteration_costs(context, plan_of(make_plan, num_layers, schedule)))
    stage = costs.num_chunks / SCHEDULES[schedule].num_model_copies
    forward, backward, weight = (
        float(part[1]) * stage
        for part in (costs.forward_time, costs.backward_time, costs.weight_gradient_time)
    )
    bubble = simulate_iteration(costs, schedule).iteration_time - BATCHES * (forward + backward)
    ramp = (PP - 1) * (forward + backward)
    # GPipe, 1F1B and interleaving: Narayanan et al. 2021, section 2.2. Zero bubble: Qi et al. 2024, table 2; its H2
    # variant fills every gap but the first stage's way to the last, which a barrier at the end makes all wait for.
    closed_forms = {
        "gpipe": ramp,
        "1f1b": ramp,
        "interleaved_1f1b": ramp / 2,
        "zb_h1": (PP - 1) * (forward + backward - 2 * weight),
        "zb_h2": (PP - 1) * forward,
    }
    if schedule in closed_forms:
        assert bubble == pytest.approx(closed_forms[schedule], rel=1e-5)
    elif schedule == "dualpipe":
        # Its README: (PP / 2 - 1) (F&B + B - 3 W), of a device's own span.
        assert 0.0 < bubble <= (PP / 2 - 1) * (forward + 2 * backward - 3 * weight)
    elif schedule != "v_min":
        # V schedules trade memory for a bubble below that of 1F1B; V-Min only asymptotically.
        assert 0.0 < bubble < ramp


@pytest.mark.parametrize("schedule", CHUNKS)
def test_activations_go_to_the_next_stage_and_nowhere_else(
    make_context: MakeContext, make_plan: MakePlan, schedule: str
) -> None:
    context = make_context(batch=BATCHES)
    plan = plan_of(make_plan, 32, schedule)
    send = iteration_costs(context, plan).send_time
    stages = np.zeros(len(send), dtype=int)
    placement = SCHEDULES[schedule].placement(PP, len(send) // PP)
    stages[placement] = np.arange(PP)[:, np.newaxis]
    copy = len(send) // SCHEDULES[schedule].num_model_copies
    for node in range(len(send)):
        ends = (node + 1) % copy == 0
        stays = not ends and stages[node] == stages[node + 1]
        assert (send[node] == 0.0) == (ends or stays), node
    # At the turn of a V both halves sit on one stage.
    is_bent = schedule in ("zb_v", "v_half", "v_min", "dualpipe_v")
    assert (send[len(send) // 2 - 1] == 0.0) == (is_bent or schedule == "dualpipe")


@pytest.mark.parametrize("schedule", CHUNKS)
def test_two_tables_are_summed_where_the_ends_are_apart(
    make_context: MakeContext, make_plan: MakePlan, schedule: str
) -> None:
    plan = plan_of(make_plan, 32, schedule)
    tied, untied = (
        iteration_costs(make_context(batch=BATCHES, has_tied_embeddings=is_tied), plan)
        for is_tied in (True, False)
    )
    assert (tied.fixed_time > untied.fixed_time) == (schedule not in BOTH_ENDS)
    predicted = plan_of(make_plan, 61, schedule)
    with_module, without = (
        iteration_costs(make_context("deepseek-v3", batch=BATCHES, num_mtp_layers=count), predicted)
        for count in (1, 0)
    )
    assert (with_module.fixed_time > without.fixed_time) == (schedule not in BOTH_ENDS)


@pytest.mark.parametrize("schedule", CHUNKS)
def test_prediction_modules_run_behind_the_last_layer(
    make_context: MakeContext, make_plan: MakePlan, schedule: str
) -> None:
    context = make_context("deepseek-v3", batch=BATCHES)
    without = replace(context, model=replace(context.model, num_mtp_layers=0))
    plan = plan_of(make_plan, 61, schedule)
    some, none = (iteration_costs(each, plan) for each in (context, without))
    copies = SCHEDULES[schedule].num_model_copies
    last = len(some.forward_time) // copies - 1
    added = some.forward_time - none.forward_time
    times, plain = times_of(context, plan), times_of(without, plan)
    # A layer, the head once more, and the projection of two inputs.
    at_least = times.layer.forward[0] + plain.head_forward[0]
    for node, extra in enumerate(added):
        if node % (last + 1) == last:
            assert at_least < extra < 1.2 * at_least
        else:
            assert extra == 0.0
    memory, lighter = plan_memory(context, plan), plan_memory(without, plan)
    grown = memory.weights > lighter.weights
    holders = {"dualpipe": [0, PP - 1]}.get(schedule, [0] if schedule in BOTH_ENDS else [PP - 1])
    assert np.flatnonzero(grown).tolist() == holders


def test_dualpipe_sums_the_gradients_of_its_two_copies(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    context = make_context(batch=BATCHES, cluster="dgx-h100:4")
    # One replica: nothing to reduce but with the mirrored stage.
    alone = iteration_costs(context, plan_of(make_plan, 32, "dualpipe"))
    assert np.all(alone.gradient_reduce_time > 0.0)
    assert np.all(iteration_costs(context, plan_of(make_plan, 32, "1f1b")).gradient_reduce_time == 0.0)


@pytest.mark.parametrize("dp", [1, 2, 8])
@pytest.mark.parametrize("sharding", ["none", "zero1"])
def test_the_mirrored_sum_is_an_all_reduce_of_two_shards(
    make_context: MakeContext, make_plan: MakePlan, dp: int, sharding: str
) -> None:
    context = make_context(batch=BATCHES * dp, cluster="dgx-h100:4", features=("no_overlap",))
    mirrored, single = (
        plan_of(make_plan, 32, schedule, dp=dp, sharding=sharding) for schedule in ("dualpipe", "1f1b")
    )

    def reduced(plan: ParallelPlan) -> tuple[FloatColumn, FloatColumn]:
        columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
        copies = SCHEDULES[plan.schedule].num_model_copies
        rows = columns.take(np.zeros(PP * copies, dtype=np.int64))
        held = virtual_stage_parameters(context, plan, rows)
        return sync_times(context, rows, held).gradient_reduce[:PP], held.dense_trained[:PP]

    twice, held = reduced(mirrored)
    once, _ = reduced(single)
    is_one_node = dp * PP <= 8
    pair = GroupPlacement(size=np.full(PP, 2.0), ranks_per_node=np.full(PP, 2.0 if is_one_node else 1.0))
    expected = collective_time(
        "all_reduce",
        context.gradient_bytes * held / dp,
        pair,
        context.cluster,
        context.calibration,
        context.software.inter_node_efficiency,
    )
    # The first stage of 1F1B keeps no head, DualPipe's chunk neither: the same parameters.
    assert twice - once == pytest.approx(expected)


def test_dualpipe_hides_the_expert_exchange(make_context: MakeContext, make_plan: MakePlan) -> None:
    context = make_context(
        "deepseek-v3", "dgx-h100:64", batch=BATCHES * 64, length=4096, features=("deepep",)
    )
    plan = plan_of(make_plan, 61, "dualpipe", dp=64, ep=64)
    costs = iteration_costs(context, plan)
    assert costs.overlapped_time is not None
    times = times_of(context, plan)
    layers = np.array(plan.layers_per_stage * 2, dtype=np.float64)
    layers[0] -= 3.0
    layers[PP] -= 3.0
    exchange = layers[::-1] * times.layer.forward_axes["ep"] + layers * times.layer.backward_axes["ep"]
    compute = costs.forward_time[::-1] + costs.backward_time - exchange
    # Shorter than the compute beside it, all of it is hidden, and slows that compute by the share of SMs it holds.
    assert np.all(exchange < compute)
    contention = context.software.expert_overlap_contention
    assert costs.overlapped_time == pytest.approx(compute + contention * exchange)
    hidden, shown = (
        simulate_iteration(each, "dualpipe") for each in (costs, replace(costs, overlapped_time=None))
    )
    assert hidden.iteration_time < shown.iteration_time
    assert hidden.exposed_communication_time < 0.5 * shown.exposed_communication_time
    # A dense model has nothing to hide.
    dense = make_context(batch=BATCHES)
    nothing = iteration_costs(dense, plan_of(make_plan, 32, "dualpipe"))
    assert nothing.overlapped_time == pytest.approx(nothing.forward_time[::-1] + nothing.backward_time)


@pytest.mark.parametrize("schedule", CHUNKS)
def test_communication_is_part_of_the_operations(
    make_context: MakeContext, make_plan: MakePlan, schedule: str
) -> None:
    context = make_context("deepseek-v3", "dgx-h100:64", batch=BATCHES * 8)
    plan = plan_of(
        make_plan,
        61,
        schedule,
        dp=8,
        tp=8,
        sequence_parallel=True,
        ep=8,
        recompute="selective",
        recompute_modules=("moe", "mla_up_proj"),
    )
    costs = iteration_costs(context, plan)
    assert np.all(costs.forward_communication_time > 0.0)
    assert np.all(costs.forward_communication_time < costs.forward_time)
    assert np.all(costs.backward_communication_time > costs.forward_communication_time)
    assert np.all(costs.backward_communication_time + costs.weight_gradient_time < costs.backward_time)
