"""Iterations whose communications share links: equal to the longest path without contention, by hand with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.simcore.network.channels import ChannelLinks, Channels
from meshwright.simcore.training.contention import (
    ContendedIteration,
    Exchange,
    IterationTraffic,
    contended_iteration,
    slowed_costs,
)
from meshwright.simcore.training.costs import IterationCosts
from meshwright.simcore.training.iteration import simulate_iteration


def some_costs(
    num_stages: int = 4, num_chunks: int = 1, num_micro_batches: int = 8, **changes: object
) -> IterationCosts:
    num_virtual = num_stages * num_chunks
    each = np.linspace(1.0, 1.3, num_virtual)
    fields: dict[str, object] = {
        "num_stages": num_stages,
        "num_chunks": num_chunks,
        "num_micro_batches": num_micro_batches,
        "forward_time": each,
        "backward_time": 2.1 * each,
        "weight_gradient_time": 0.9 * each,
        "forward_communication_time": 0.2 * each,
        "backward_communication_time": 0.4 * each,
        "send_time": np.append(np.full(num_virtual - 1, 0.07), 0.0),
        "is_send_blocking": False,
        "gradient_reduce_time": 1.7 * each,
        "gradient_reduce_overlap": 0.6,
        "parameter_gather_time": 0.8 * each,
        "parameter_gather_overlap": 0.5,
        "optimizer_time": np.full(num_stages, 0.3),
        "fixed_time": 0.11,
    }
    return IterationCosts(**(fields | changes))  # type: ignore[arg-type]  # checked by the class


def traffic_over(costs: IterationCosts, num_links: int) -> IterationTraffic:
    """Return five kinds of channels per virtual stage; with one link all share it, with 5 v all have their own."""
    num_virtual = costs.num_stages * costs.num_chunks
    channel = np.arange(5 * num_virtual)
    entries = ChannelLinks(channel=channel, link=channel % num_links, num_flows=np.full(len(channel), 2.0))
    exchange = Exchange(
        channel=channel[4 * num_virtual :],
        forward_time=costs.forward_communication_time,
        backward_time=costs.backward_communication_time,
    )
    activation, gradient, gather, reduce, _ = channel.reshape(5, num_virtual)
    return IterationTraffic(
        channels=Channels(len(channel), entries, np.full(num_links, 3e9)),
        activation=activation,
        gradient=gradient,
        gather=gather,
        reduce=reduce,
        exchanges=(exchange,),
    )


def run(costs: IterationCosts, schedule: str, num_links: int) -> ContendedIteration:
    return contended_iteration(costs, schedule, traffic_over(costs, num_links))


@pytest.mark.parametrize("is_send_blocking", [False, True])
@pytest.mark.parametrize(
    ("schedule", "num_chunks"),
    [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("zb_h1", 1), ("zb_v", 2), ("dualpipe_v", 2)],
)
def test_without_contention_all_times_are_those_of_the_longest_path(
    schedule: str, num_chunks: int, is_send_blocking: bool
) -> None:
    costs = some_costs(num_chunks=num_chunks, is_send_blocking=is_send_blocking)
    if schedule.startswith("dualpipe") and is_send_blocking:
        costs = replace(costs, overlapped_time=2.9 * costs.forward_time)
    static = simulate_iteration(costs, schedule)
    found = run(costs, schedule, 5 * 4 * num_chunks).result
    assert found.iteration_time == pytest.approx(static.iteration_time, rel=1e-13)
    for name in (
        "operation_start",
        "operation_end",
        "gather_end",
        "reduce_start",
        "optimizer_end",
        "busy_time",
    ):
        assert getattr(found, name) == pytest.approx(getattr(static, name), rel=1e-12, abs=1e-12)


def test_one_stage_without_pipeline_is_the_longest_path() -> None:
    costs = some_costs(num_stages=1, num_micro_batches=3)
    static = simulate_iteration(costs, "1f1b").iteration_time
    assert run(costs, "1f1b", 5).result.iteration_time == pytest.approx(static, rel=1e-13)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_channels_on_one_link_take_longer_and_no_longer_than_one_after_the_other(schedule: str) -> None:
    costs = some_costs()
    static = simulate_iteration(costs, schedule).iteration_time
    shared = run(costs, schedule, 1)
    assert static * (1.0 + 1e-6) < shared.result.iteration_time
    assert shared.result.iteration_time <= static + shared.alone_time.sum()
    assert 0.0 < shared.link_seconds[0] <= shared.result.iteration_time
    # A link asked for more than it carries is never idle: what was sent took as long as all of it at full rate.
    assert shared.alone_time.sum() <= shared.result.iteration_time


def two_stages_one_micro_batch() -> IterationCosts:
    """Both stages reduce at the end; the first is still waiting for its gradient when the second begins."""
    nothing = np.zeros(2)
    return some_costs(
        num_stages=2,
        num_micro_batches=1,
        forward_time=np.ones(2),
        backward_time=np.ones(2),
        weight_gradient_time=nothing,
        forward_communication_time=nothing,
        backward_communication_time=nothing,
        send_time=np.array([0.5, 0.0]),
        gradient_reduce_time=np.array([1.0, 2.0]),
        gradient_reduce_overlap=0.0,
        parameter_gather_time=nothing,
        optimizer_time=nothing,
        fixed_time=0.0,
    )


def test_a_gradient_and_a_reduction_on_one_link_halve_each_other() -> None:
    costs = two_stages_one_micro_batch()
    # Forwards end at 1 and 2.5, the backward of stage 1 at 3.5. Its gradient (0.5 s alone) and its reduction (2 s) then
    # share the link: the gradient arrives at 4.5, when 1.5 s of the reduction are left. Stage 0 runs backward until 5.5,
    # when 0.5 s are left; its own reduction (1 s) meets those until 6.5 and has 0.5 s left: it ends at 7.
    assert simulate_iteration(costs, "1f1b").iteration_time == 6.0
    shared = run(costs, "1f1b", 1)
    assert shared.result.iteration_time == pytest.approx(7.0, rel=1e-12)
    assert shared.result.optimizer_end == pytest.approx([7.0, 6.5], rel=1e-12)
    assert shared.link_seconds == pytest.approx([2.0], rel=1e-12)
    gradient, reduce = 2, 6
    assert shared.taken_time[gradient] == pytest.approx(1.0, rel=1e-12)
    assert shared.taken_time[reduce : reduce + 2] == pytest.approx([1.5, 3.0], rel=1e-12)


def test_what_nobody_waits_for_takes_its_share_of_a_link() -> None:
    costs = two_stages_one_micro_batch()
    traffic = traffic_over(costs, 1)
    beside = contended_iteration(costs, "1f1b", replace(traffic, beside=((4, 100.0),)))
    # Channel 4 gathers nothing here: as a third on the link it slows all sends to a half or a third.
    assert beside.result.iteration_time > 7.0
    assert beside.beside_end[0] > 100.0


def test_a_slower_link_stretches_what_crosses_it_alone() -> None:
    costs = two_stages_one_micro_batch()
    channel = np.arange(10)
    described = ChannelLinks(channel=channel, link=channel, num_flows=np.ones(10))
    capacity = np.full(10, 1e9)
    capacity[7] /= 4.0
    traffic = replace(
        traffic_over(costs, 10),
        channels=Channels(10, described, np.full(10, 1e9), described, capacity),
    )
    slow = contended_iteration(costs, "1f1b", traffic)
    # The reduction of stage 1 takes 8 s instead of 2 from 3.5 on.
    assert slow.result.iteration_time == pytest.approx(11.5, rel=1e-12)
    assert traffic.channels.links.tolist() == [7]


def test_a_slow_stage_computes_longer_and_sends_as_long() -> None:
    costs = some_costs(num_chunks=2)
    slowed = slowed_costs(costs, "interleaved_1f1b", np.array([1.0, 1.5, 1.0, 1.0]))
    expected = 0.2 * costs.forward_time + np.where(np.arange(8) % 4 == 1, 1.5, 1.0) * 0.8 * costs.forward_time
    assert slowed.forward_time == pytest.approx(expected)
    assert slowed.optimizer_time.tolist() == pytest.approx([0.3, 0.45, 0.3, 0.3])
    assert slowed.send_time is costs.send_time
