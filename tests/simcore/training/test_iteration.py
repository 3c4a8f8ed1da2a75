from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedule_shapes import DUAL, V_SHAPED, shapes

from meshwright.errors import SpecError
from meshwright.simcore.schedules import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    NO_OPERATION,
    SCHEDULES,
    WEIGHT_GRADIENT,
)
from meshwright.simcore.training import (
    IterationCosts,
    IterationResult,
    iteration_time,
    simulate_iteration,
    steady_state_period,
)

MakeCosts = Callable[..., IterationCosts]


seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 9), st.integers(0, 12))
# Dyadic times, so that closed forms hold exactly.
times = st.integers(1, 64).map(lambda number: number / 16.0)


@given(size=sizes, forward=times, backward=times, name=st.sampled_from(["gpipe", "1f1b"]))
def test_bubble_of_fill_and_drain_is_the_closed_form(
    make_costs: MakeCosts, size: tuple[int, int], forward: float, backward: float, name: str
) -> None:
    stages, more = size
    result = simulate_iteration(make_costs(stages, 1, stages + more, forward, backward, 0.0), name)
    bubble = (stages - 1) * (forward + backward)
    assert result.bubble_time == pytest.approx(bubble, rel=1e-12)
    assert result.iteration_time == (stages + more) * (forward + backward) + bubble
    assert result.bubble_fraction == pytest.approx(bubble / result.iteration_time, rel=1e-12)


@given(
    size=st.tuples(st.integers(2, 6), st.sampled_from([2, 4]), st.integers(1, 4)),
    forward=times,
    backward=times,
)
def test_bubble_of_interleaving_is_divided_by_the_chunks(
    make_costs: MakeCosts, size: tuple[int, int, int], forward: float, backward: float
) -> None:
    stages, chunks, groups = size
    costs = make_costs(stages, chunks, stages * groups, forward, backward, 0.0)
    result = simulate_iteration(costs, "interleaved_1f1b")
    bubble = (stages - 1) * (forward + backward) / chunks
    assert result.bubble_time == pytest.approx(bubble, rel=1e-12)
    assert result.iteration_time == stages * groups * (forward + backward) + bubble


# Makespans of an independent event simulation, F = 1 and B = 2 per stage.
@pytest.mark.parametrize(
    ("name", "stages", "chunks", "micro_batches", "makespan"),
    [
        ("1f1b", 4, 1, 8, 33.0),
        ("1f1b", 8, 1, 32, 117.0),
        ("1f1b", 16, 1, 64, 237.0),
        ("interleaved_1f1b", 4, 2, 8, 28.5),
        ("interleaved_1f1b", 8, 4, 32, 101.25),
        ("interleaved_1f1b", 16, 2, 64, 214.5),
    ],
)
def test_makespans_equal_the_measured_ones(
    make_costs: MakeCosts, name: str, stages: int, chunks: int, micro_batches: int, makespan: float
) -> None:
    assert simulate_iteration(make_costs(stages, chunks, micro_batches), name).iteration_time == makespan


@given(size=sizes, forward=times, input_gradient=times, share=st.integers(0, 16))
def test_zero_bubble_schedules_have_the_published_bubbles(
    make_costs: MakeCosts, size: tuple[int, int], forward: float, input_gradient: float, share: int
) -> None:
    stages, more = size
    weight = min(forward, input_gradient) * share / 16.0
    costs = make_costs(stages, 1, 2 * stages - 1 + more, forward, input_gradient + weight, weight)
    for name, saved in (("zb_h1", weight), ("zb_h2", 2 * weight)):
        result = simulate_iteration(costs, name)
        bubble = (stages - 1) * (forward + input_gradient - saved)
        assert result.bubble_time == pytest.approx(bubble, rel=1e-12, abs=1e-12)


def test_zb_h2_has_no_bubble_when_all_thirds_are_equal(make_costs: MakeCosts) -> None:
    costs = make_costs(8, 1, 32)
    assert simulate_iteration(costs, "zb_h2").bubble_fraction == 0.0
    # One synchronous iteration still pays the way to the last stage; consecutive ones do not.
    assert iteration_time(costs, "zb_h2") == 7 * 1.0 + 32 * 3.0
    assert steady_state_period(costs, "zb_h2") == 32 * 3.0
    assert steady_state_period(costs, "1f1b") == iteration_time(costs, "1f1b")


@pytest.mark.parametrize("stages", [2, 3, 4, 5, 6, 7, 8, 11, 16])
@pytest.mark.parametrize("more", [0, 1, 9])
def test_v_schedules_have_the_published_bubbles(make_costs: MakeCosts, stages: int, more: int) -> None:
    # One second per forward, input gradient and weight gradient of a chunk.
    costs = make_costs(stages, 2, 2 * stages + more, 2.0, 4.0, 2.0)
    result = {name: simulate_iteration(costs, name) for name in V_SHAPED}
    bubble = {name: round(result[name].bubble_time, 9) for name in V_SHAPED}
    # No bubble inside a span at the memory of 1F1B, whose bubble is 6 (p - 1) [Qi 2024].
    assert bubble["zb_v"] == 0.0
    assert result["zb_v"].iteration_time == 6 * (2 * stages + more) + stages - 1
    assert result["zb_v"].peak_in_flight.max() == 2 * stages
    # Half and two thirds of that at half and a third of the memory [Qi 2024b]: never more, and less by no more
    # than one operation of a chunk per stage. (Two stages are below the asymptote.)
    for name, stated, peak in (("v_half", 3, (stages + 2) // 2), ("v_min", 4, (stages + 4) // 3)):
        assert stated * (stages - 1) - max(stages, 3) <= bubble[name] <= stated * (stages - 1)
        assert result[name].peak_in_flight.max() == 2 * peak
    # What the authors' own generator of 2025 reaches.
    if stages > 2:
        assert bubble["v_half"] == 3 * stages - (4 if stages % 2 else 7)
        assert bubble["v_min"] == 4 * stages - (5 if stages % 3 else 7)


@given(
    size=st.tuples(st.integers(1, 5), st.integers(0, 12)),
    forward=times,
    share=st.integers(0, 16),
    joint_share=st.integers(0, 16),
)
def test_dual_pipes_have_the_published_bubble(
    make_costs: MakeCosts, size: tuple[int, int], forward: float, share: int, joint_share: int
) -> None:
    # README of DualPipe: (PP / 2 - 1)(F&B + B - 3 W), B the whole backward. It counts a device's idle time in
    # the whole iteration and takes the input gradient to last as long as the forward.
    half, more = size
    weight = forward * share / 16.0
    backward = forward + weight
    joint = backward + forward * joint_share / 16.0
    bubble = (half - 1) * (joint + backward - 3.0 * weight)
    costs = make_costs(2 * half, 2, 4 * half + 2 * more, 2 * forward, 2 * backward, 2 * weight)
    costs = replace(costs, overlapped_time=np.full(4 * half, joint))
    result = simulate_iteration(costs, "dualpipe")
    assert (result.iteration_time - result.busy_time).max() == bubble
    assert result.peak_in_flight.tolist() == [2 * half + 1] * (2 * half)
    if half > 1:
        costs = make_costs(half, 2, 2 * half + more, 2 * forward, 2 * backward, 2 * weight)
        costs = replace(costs, overlapped_time=np.full(2 * half, joint))
        result = simulate_iteration(costs, "dualpipe_v")
        assert (result.iteration_time - result.busy_time).max() == bubble
        assert result.peak_in_flight.tolist() == [2 * half + 1] * half


# Eight ranks and twenty micro-batches, the README's own picture: F = 1, B = 2, F&B = 3.
def test_dual_pipe_of_the_published_picture(make_costs: MakeCosts) -> None:
    result = simulate_iteration(make_costs(8, 2, 20, 2.0, 4.0, 2.0), "dualpipe")
    assert result.iteration_time == 20 * 3.0 + 6.0
    assert result.operation_start[:, 0].tolist() == [0, 1, 2, 3, 3, 2, 1, 0]


def test_joint_pairs_last_as_long_as_told(make_costs: MakeCosts) -> None:
    costs = make_costs(4, 2, 12, 2.0, 4.0, 2.0)
    plain = simulate_iteration(costs, "dualpipe")
    same = simulate_iteration(replace(costs, overlapped_time=np.full(8, 3.0)), "dualpipe")
    assert same.operation_end.tolist() == plain.operation_end.tolist()
    told = np.arange(8) / 8.0 + 2.0
    result = simulate_iteration(replace(costs, overlapped_time=told), "dualpipe")
    operations = result.operations
    assert operations.is_overlapped is not None
    stage, place = np.nonzero(operations.is_overlapped & (operations.kind == BACKWARD))
    lasted = (result.operation_end - result.operation_start)[stage, place]
    assert lasted.tolist() == told[operations.placement[stage, operations.chunk[stage, place]]].tolist()
    # The forward before it has no time of its own.
    assert np.all(result.operation_end[stage, place - 1] == result.operation_start[stage, place])
    assert np.all(result.operation_start[stage, place - 1] == result.operation_start[stage, place])


@pytest.mark.parametrize("name", DUAL)
def test_joint_pairs_hide_communication_before_computation(make_costs: MakeCosts, name: str) -> None:
    costs = make_costs(4, 2, 12, 2.0, 4.0, 2.0, forward_communication_time=np.full(8, 0.25))
    costs = replace(costs, backward_communication_time=np.full(8, 0.5))
    exposed = simulate_iteration(costs, name)
    passes = 12 * 2 // SCHEDULES[name].num_model_copies
    assert exposed.stage_exposed_communication_time.tolist() == [passes * 0.75] * 4
    is_overlapped = exposed.operations.is_overlapped
    assert is_overlapped is not None
    num_pairs = is_overlapped.sum(axis=1) // 2
    for joint, hidden in ((2.75, 0.25), (1.5, 0.75), (4.0, 0.0)):
        result = simulate_iteration(replace(costs, overlapped_time=np.full(8, joint)), name)
        assert (
            result.stage_exposed_communication_time.tolist() == (passes * 0.75 - hidden * num_pairs).tolist()
        )


@pytest.mark.parametrize("is_blocking", [False, True])
def test_nothing_is_sent_from_one_copy_of_the_model_to_the_next(
    make_costs: MakeCosts, is_blocking: bool
) -> None:
    rng = np.random.default_rng(5)
    costs = make_costs(4, 2, 10, rng=rng, is_send_blocking=is_blocking)
    cut = costs.send_time.copy()
    cut[3] = 1000.0
    one, other = (simulate_iteration(each, "dualpipe") for each in (costs, replace(costs, send_time=cut)))
    assert one.iteration_time == other.iteration_time
    assert one.stage_exposed_communication_time.tolist() == other.stage_exposed_communication_time.tolist()
    assert iteration_time(replace(costs, send_time=cut), "dualpipe_v") > one.iteration_time + 1000.0


@pytest.mark.parametrize("values", [np.full(4, 1.0), np.full(8, -1.0), np.full(8, np.inf)])
def test_joint_times_are_checked(make_costs: MakeCosts, values: np.ndarray) -> None:
    with pytest.raises(SpecError, match="overlapped_time"):
        make_costs(4, 2, 12, overlapped_time=values)


@given(shape=shapes(), seed=seeds, is_blocking=st.booleans(), has_joint=st.booleans())
def test_operations_start_as_soon_as_stream_and_data_allow(
    make_costs: MakeCosts, shape: tuple[str, int, int, int], seed: int, is_blocking: bool, has_joint: bool
) -> None:
    """An event simulation of its own: what it finds is what the task graph finds, bit for bit."""
    name, stages, chunks, _ = shape
    rng = np.random.default_rng(seed)
    num_virtual = stages * chunks
    nothing = dict.fromkeys(("gradient_reduce_time", "parameter_gather_time"), np.zeros(num_virtual))
    joint = rng.integers(1, 128, num_virtual) / 64.0 if has_joint else None
    costs = make_costs(*shape[1:], rng=rng, is_send_blocking=is_blocking, **nothing, overlapped_time=joint)
    result = simulate_iteration(costs, name)
    operations = result.operations
    length = num_virtual // operations.num_model_copies
    both = costs.forward_time[::-1] + costs.backward_time if joint is None else joint
    own = (
        costs.forward_time,
        costs.backward_time,
        costs.backward_time - costs.weight_gradient_time,
        costs.weight_gradient_time,
    )
    done: dict[tuple[bool, int, int], float] = {}
    free, place = np.zeros(stages), np.zeros(stages, dtype=int)

    def parts(stage: int) -> list[tuple[int, int, int]]:
        size = 1
        if operations.is_overlapped is not None and operations.is_overlapped[stage, place[stage]]:
            size = 2
        return [
            (
                int(operations.kind[stage, each]),
                int(operations.placement[stage, operations.chunk[stage, each]]),
                int(operations.micro_batch[stage, each]),
            )
            for each in range(place[stage], place[stage] + size)
        ]

    waiting = list(range(stages))
    while waiting:
        stage = waiting.pop(0)
        if place[stage] == operations.num_operations or operations.kind[stage, place[stage]] == NO_OPERATION:
            continue
        begin, lasts, now = float(free[stage]), 0.0, parts(stage)
        for kind, virtual, batch in now:
            lasts += float(own[kind][virtual])
            if kind == WEIGHT_GRADIENT:
                continue
            step = 1 if kind == FORWARD else -1
            if virtual // length == (virtual - step) // length and 0 <= virtual - step < num_virtual:
                lag = 0.0 if is_blocking else costs.send_time[min(virtual, virtual - step)]
                begin = max(begin, done.get((kind == FORWARD, virtual - step, batch), np.inf) + lag)
        if begin == np.inf:
            waiting.append(stage)
            continue
        if len(now) == 2:
            lasts = float(both[now[1][1]])
        for kind, virtual, _ in now:
            receiver = virtual + (1 if kind == FORWARD else -1)
            is_sent = kind != WEIGHT_GRADIENT and 0 <= receiver < num_virtual
            if is_blocking and is_sent and receiver // length == virtual // length:
                lasts += float(costs.send_time[min(virtual, receiver)])
        for kind, virtual, batch in now:
            if kind != WEIGHT_GRADIENT:
                done[kind == FORWARD, virtual, batch] = begin + lasts
        last = place[stage] + len(now) - 1
        assert (result.operation_start[stage, last], result.operation_end[stage, last]) == (
            begin,
            begin + lasts,
        )
        free[stage] = begin + lasts
        place[stage] = last + 1
        waiting.append(stage)
    assert result.pipeline_time == free.max()


@given(shape=shapes(), seed=seeds, is_blocking=st.booleans())
def test_dependencies_hold_in_the_executed_timeline(
    make_costs: MakeCosts, shape: tuple[str, int, int, int], seed: int, is_blocking: bool
) -> None:
    name, stages, chunks, micro_batches = shape
    costs = make_costs(
        stages, chunks, micro_batches, rng=np.random.default_rng(seed), is_send_blocking=is_blocking
    )
    result = simulate_iteration(costs, name)
    operations = result.operations
    is_joint = operations.is_overlapped
    begin, end = {}, {}
    for (stage, place), kind in np.ndenumerate(operations.kind):
        if kind == NO_OPERATION:
            continue
        virtual = int(operations.placement[stage, operations.chunk[stage, place]])
        what = BACKWARD if kind == INPUT_GRADIENT else int(kind)
        key = what, virtual, int(operations.micro_batch[stage, place])
        # The output of a joint forward exists when its pair ends.
        last = place + (is_joint is not None and kind == FORWARD and bool(is_joint[stage, place]))
        begin[key], end[key] = result.operation_start[stage, place], result.operation_end[stage, last]
    assert np.all(result.operation_start[:, 1:] >= result.operation_end[:, :-1])
    num_virtual = stages * chunks
    length = num_virtual // operations.num_model_copies
    for (what, virtual, batch), time in begin.items():
        if what == FORWARD and virtual % length > 0:
            lag = 0.0 if is_blocking else costs.send_time[virtual - 1]
            assert time >= end[FORWARD, virtual - 1, batch] + lag
        if what == BACKWARD:
            assert time >= end[FORWARD, virtual, batch]
            is_last = virtual % length == length - 1
            lag = 0.0 if is_blocking or is_last else costs.send_time[virtual]
            assert is_last or time >= end[BACKWARD, virtual + 1, batch] + lag
        if what == WEIGHT_GRADIENT:
            assert time >= end[BACKWARD, virtual, batch]
    gathered = np.array(
        [min(time for key, time in begin.items() if key[:2] == (FORWARD, v)) for v in range(num_virtual)]
    )
    exposed = costs.parameter_gather_time * (1.0 - costs.parameter_gather_overlap)
    assert np.all(gathered >= result.gather_start + exposed)
    reduced = np.array(
        [
            max(time for key, time in end.items() if key[0] != FORWARD and key[1] == v)
            for v in range(num_virtual)
        ]
    )
    assert np.all(result.reduce_start[:, 1] >= reduced)
    assert np.all(result.optimizer_start >= result.reduce_end[operations.placement, 1].max(axis=1))


@given(shape=shapes(), seed=seeds, is_blocking=st.booleans())
def test_busy_and_idle_time_fill_the_iteration_exactly(
    make_costs: MakeCosts, shape: tuple[str, int, int, int], seed: int, is_blocking: bool
) -> None:
    name, *size = shape
    costs = make_costs(*size, rng=np.random.default_rng(seed), is_send_blocking=is_blocking)
    result = simulate_iteration(costs, name)
    assert (result.busy_time + result.idle_time.per_stage).tolist() == [result.iteration_time] * size[0]
    for cause in fields(result.idle_time):
        assert np.all(getattr(result.idle_time, cause.name) >= 0.0), cause.name
    assert sum(result.idle_time.totals().values()) == result.idle_time.per_stage.sum()
    assert result.idle_time.fixed.tolist() == [costs.fixed_time] * size[0]


@given(shape=shapes(), seed=seeds)
def test_iteration_is_no_shorter_than_its_busiest_stage(
    make_costs: MakeCosts, shape: tuple[str, int, int, int], seed: int
) -> None:
    name, *size = shape
    result = simulate_iteration(make_costs(*size, rng=np.random.default_rng(seed)), name)
    assert result.iteration_time >= result.busy_time.max()
    assert result.iteration_time >= result.pipeline_time
    assert np.all(result.peak_in_flight <= SCHEDULES[name].peak_in_flight(*size))


@given(shape=shapes(), seed=seeds, is_blocking=st.booleans())
def test_ranking_and_simulating_agree_bit_for_bit(
    make_costs: MakeCosts, shape: tuple[str, int, int, int], seed: int, is_blocking: bool
) -> None:
    name, *size = shape
    costs = make_costs(*size, rng=np.random.default_rng(seed), is_send_blocking=is_blocking)
    assert iteration_time(costs, name) == simulate_iteration(costs, name).iteration_time


@given(shape=shapes(), seed=seeds)
def test_iteration_scales_with_its_times(
    make_costs: MakeCosts, shape: tuple[str, int, int, int], seed: int
) -> None:
    name, *size = shape
    costs = make_costs(*size, rng=np.random.default_rng(seed))
    scaled = {
        field.name: 4.0 * getattr(costs, field.name)
        for field in fields(costs)
        if field.name.endswith("_time") and getattr(costs, field.name) is not None
    }
    assert iteration_time(replace(costs, **scaled), name) == 4.0 * iteration_time(costs, name)


@given(shape=shapes(), seed=seeds)
def test_sends_that_do_not_block_are_never_slower(
    make_costs: MakeCosts, shape: tuple[str, int, int, int], seed: int
) -> None:
    name, *size = shape
    # Without overlap: an operation that blocks longer hides more communication beside it.
    overlaps = {"gradient_reduce_overlap": 0.0, "parameter_gather_overlap": 0.0}
    costs = make_costs(*size, rng=np.random.default_rng(seed), **overlaps)
    assert iteration_time(costs, name) <= iteration_time(replace(costs, is_send_blocking=True), name)


@pytest.mark.parametrize(("overlap", "expected"), [(0.0, 4.0), (0.25, 3.0), (0.5, 2.0), (1.0, 2.0)])
def test_reductions_hide_beside_the_last_backward(
    make_costs: MakeCosts, overlap: float, expected: float
) -> None:
    # Backward of 2 s; a reduction of 4 s of which at most the share runs beside it.
    costs = make_costs(1, 1, 3, gradient_reduce_time=np.array([4.0]), gradient_reduce_overlap=overlap)
    result = simulate_iteration(costs, "none")
    assert result.iteration_time == 9.0 + expected
    assert result.exposed_communication_time == expected
    assert result.idle_time.gradient_reduce.tolist() == [expected]


@pytest.mark.parametrize(("overlap", "expected"), [(0.0, 4.0), (0.25, 3.0), (1.0, 3.0)])
def test_gathers_hide_beside_the_first_forward(
    make_costs: MakeCosts, overlap: float, expected: float
) -> None:
    # Forward of 1 s; a gather of 4 s: what the forward cannot cover delays what follows it.
    costs = make_costs(1, 1, 3, parameter_gather_time=np.array([4.0]), parameter_gather_overlap=overlap)
    result = simulate_iteration(costs, "none")
    assert result.iteration_time == 9.0 + expected
    assert result.idle_time.parameter_gather.tolist() == [expected]


def test_gathers_of_a_stage_are_serial_and_run_beside_other_chunks(make_costs: MakeCosts) -> None:
    costs = make_costs(2, 2, 2, parameter_gather_time=np.full(4, 0.5))
    result = simulate_iteration(costs, "interleaved_1f1b")
    assert result.gather_start.tolist() == [0.0, 0.0, 0.5, 0.5]
    assert result.iteration_time == iteration_time(make_costs(2, 2, 2), "interleaved_1f1b") + 0.5


def test_sends_cost_the_receiver_or_both(make_costs: MakeCosts) -> None:
    costs = make_costs(2, 1, 1, send_time=np.array([0.5, 0.0]))
    waiting = simulate_iteration(costs, "1f1b")
    blocking = simulate_iteration(replace(costs, is_send_blocking=True), "1f1b")
    assert waiting.iteration_time == blocking.iteration_time == 2 * (1.0 + 2.0) + 2 * 0.5
    assert waiting.exposed_communication_time == 0.0
    assert blocking.exposed_communication_time == 0.5
    assert blocking.busy_time.tolist() == [3.5, 3.5]


def test_idle_time_is_told_apart_by_cause(make_costs: MakeCosts) -> None:
    idle = simulate_iteration(make_costs(4, 1, 8, optimizer_time=np.full(4, 1.0)), "1f1b").idle_time
    assert idle.warm_up.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert idle.activation_wait.tolist() == [0.0] * 4
    assert idle.gradient_wait.tolist() == [9.0, 6.0, 3.0, 0.0]
    assert idle.cool_down.tolist() == [0.0, 1.0, 3.0, 5.0]
    assert idle.optimizer_barrier.tolist() == [0.0, 1.0, 1.0, 1.0]


def test_first_stage_waits_for_its_optimizer_only_at_the_barrier(make_costs: MakeCosts) -> None:
    costs = make_costs(2, 1, 4, optimizer_time=np.array([0.0, 8.0]), fixed_time=1.0)
    result = simulate_iteration(costs, "1f1b")
    assert result.iteration_time == 1.0 + 4 * 3.0 + 8.0 + 1.0
    assert result.idle_time.optimizer_barrier.tolist() == [6.0, 0.0]


@pytest.mark.parametrize(
    ("schedule", "message"), [("1f1", "did you mean '1f1b'"), ("chimera", "cannot be simulated")]
)
def test_unknown_schedules_are_named(make_costs: MakeCosts, schedule: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        simulate_iteration(make_costs(2, 1, 2), schedule)


def test_a_weight_gradient_longer_than_its_backward_cannot_be_split_off(make_costs: MakeCosts) -> None:
    costs = make_costs(2, 1, 2, 1.0, 1.0, 2.0)
    assert isinstance(simulate_iteration(costs, "1f1b"), IterationResult)
    with pytest.raises(SpecError, match="weight_gradient_time exceeds backward_time"):
        simulate_iteration(costs, "zb_h1")


@pytest.mark.parametrize("name", ["gradient_reduce_overlap", "parameter_gather_overlap"])
def test_an_overlap_is_a_share(make_costs: MakeCosts, name: str) -> None:
    with pytest.raises(SpecError, match=f"{name} must lie in 0..1"):
        iteration_time(make_costs(2, 1, 2, **{name: 1.5}), "1f1b")
