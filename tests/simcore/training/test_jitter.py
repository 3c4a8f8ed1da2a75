from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp

import meshwright
from meshwright.errors import SpecError
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.schedules import BACKWARD, FORWARD, INPUT_GRADIENT, SCHEDULES, WEIGHT_GRADIENT
from meshwright.simcore.task_graph import build_task_graph
from meshwright.simcore.training import IterationCosts, iteration_time
from meshwright.simcore.training.jitter import (
    Jitter,
    JitterResult,
    RankGroups,
    gumbel_scale,
    rank_groups,
    simulate_jitter,
)
from meshwright.simcore.training.replicas import ReplicaGraph
from meshwright.simcore.training.structure import iteration_structure

MakeCosts = Callable[..., IterationCosts]
ALONE = RankGroups(num_replicas=1, num_ranks=1)
SOURCE = str(Path(meshwright.__file__).parents[1])


def small_shape(schedule: str) -> tuple[int, int, int]:
    """Return stages, chunks and micro-batches that a schedule accepts."""
    for shape in ((4, 1, 8), (4, 2, 8), (1, 1, 8)):
        try:
            SCHEDULES[schedule].check(*shape)
        except SpecError:
            continue
        return shape
    raise AssertionError(f"no small shape for {schedule}")


def uneven_costs(make_costs: MakeCosts, schedule: str, seed: int, *, is_blocking: bool) -> IterationCosts:
    rng = np.random.default_rng(seed)
    costs = make_costs(*small_shape(schedule), rng=rng, is_send_blocking=is_blocking)
    # A quarter of every operation is communication.
    communication = {
        f"{kind}_communication_time": 0.25 * (getattr(costs, f"{kind}_time") - weight)
        for kind, weight in (("forward", 0.0), ("backward", costs.weight_gradient_time))
    }
    costs = replace(costs, **communication)
    if schedule.startswith("dualpipe"):
        # Joint forwards and backwards hide half of their communication.
        apart = costs.backward_time + costs.forward_time[::-1]
        inside = costs.backward_communication_time + costs.forward_communication_time[::-1]
        costs = replace(costs, overlapped_time=apart - 0.5 * inside)
    return costs


def one_operation(make_costs: MakeCosts) -> IterationCosts:
    """Return an iteration that is one forward of one second and nothing else."""
    return make_costs(1, 1, 1, 1.0, 0.0, 0.0)


# --- against the plain simulation ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("is_blocking", [False, True])
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_without_jitter_it_is_the_plain_iteration_bit_for_bit(
    make_costs: MakeCosts, schedule: str, is_blocking: bool, num_replicas: int
) -> None:
    groups = RankGroups(num_replicas=num_replicas, num_ranks=8)
    for seed in range(5):
        costs = uneven_costs(make_costs, schedule, seed, is_blocking=is_blocking)
        # Times that are no short binary fractions: any other order of additions would show.
        thirds = {
            field.name: getattr(costs, field.name) / 3.0
            for field in fields(costs)
            if field.name.endswith("_time") and getattr(costs, field.name) is not None
        }
        costs = replace(costs, **thirds)
        result = simulate_jitter(costs, schedule, groups, Jitter(), num_seeds=2)
        expected = iteration_time(costs, schedule)
        assert result.iteration_time.tolist() == [expected] * 2
        assert result.replica_time.tolist() == [expected] * 2
        assert result.jitter_free_time == expected
        assert (result.slowdown, result.lost_share, result.lost_between_replicas) == (1.0, 0.0, 0.0)
        assert result.critical_stage.tolist() == result.critical_replica.tolist() == [-1, -1]


@pytest.mark.parametrize("schedule", ["none", "gpipe", "1f1b", "interleaved_1f1b"])
@pytest.mark.parametrize("is_blocking", [False, True])
def test_a_replica_with_slow_stages_is_the_plain_iteration_of_slower_costs(
    make_costs: MakeCosts, schedule: str, is_blocking: bool
) -> None:
    costs = uneven_costs(make_costs, schedule, 3, is_blocking=is_blocking)
    slowness = np.linspace(1.0, 2.0, costs.num_stages)
    factor = np.tile(slowness, costs.num_chunks)
    slower = replace(
        costs,
        forward_time=costs.forward_time
        + (factor - 1.0) * (costs.forward_time - costs.forward_communication_time),
        backward_time=costs.backward_time
        + (factor - 1.0) * (costs.backward_time - costs.backward_communication_time),
        optimizer_time=costs.optimizer_time * slowness,
    )
    slow_ranks = tuple((stage, float(value)) for stage, value in enumerate(slowness))
    result = simulate_jitter(costs, schedule, ALONE, Jitter(slow_ranks=slow_ranks), num_seeds=1)
    assert result.iteration_time[0] == pytest.approx(iteration_time(slower, schedule), rel=1e-13)


def evaluate_by_hand(
    costs: IterationCosts, schedule: str, slowness: np.ndarray, draws: list[np.ndarray]
) -> float:
    """Return the iteration time of a graph that holds every replica's tasks and their meetings one by one."""
    structure = iteration_structure(schedule, costs.num_stages, costs.num_chunks, costs.num_micro_batches)
    graph, num_replicas = structure.graph, slowness.shape[1]
    num_tasks, num_operations = graph.num_tasks, structure.operations.num_operations
    factors = iter(np.concatenate(draws))
    lags = structure.lags(costs)
    built = graph.order.tolist()
    reductions = {*structure.reduce_overlapped.tolist(), *structure.reduce_exposed.tolist()}
    late = reductions | set(structure.optimizer.tolist())
    meeting = {
        int(task)
        for tasks in (structure.reduce_overlapped, structure.reduce_exposed)
        for task in tasks[costs.gradient_reduce_time > 0.0]
    }
    send = np.zeros_like(costs.send_time)
    if costs.is_send_blocking:
        send[:-1] = structure.send_time(costs)[:-1]
    # Before virtual stage v comes the send of stage v - 1; a joint pair ends with both of its sends.
    before = np.concatenate([[0.0], send[:-1]])
    forward = costs.forward_communication_time + send
    backward = costs.backward_communication_time + before
    joint = costs.backward_communication_time + costs.forward_communication_time[::-1]
    joint = 0.5 * joint + before + np.concatenate([[0.0], send[:-1][::-1]])
    operations, is_joint = structure.operations, structure.operations.is_overlapped
    durations = np.tile(structure.durations(costs)[graph.task_class][:, np.newaxis], num_replicas)
    # Draws come in the graph's order, the optimizer steps last.
    for task in sorted(range(num_tasks), key=lambda task: (built[task] in late, task)):
        number = built[task]
        if number in structure.optimizer:
            stage = structure.optimizer.tolist().index(number)
            communication = 0.0
        elif number < operations.kind.size and durations[task, 0] > 0.0:
            stage, place = divmod(number, num_operations)
            virtual = operations.placement[stage, operations.chunk[stage, place]]
            by_kind = {
                FORWARD: forward,
                BACKWARD: backward,
                INPUT_GRADIENT: backward,
                WEIGHT_GRADIENT: 0.0 * forward,
            }
            communication = by_kind[int(operations.kind[stage, place])][virtual]
            if is_joint is not None and is_joint[stage, place]:
                communication = joint[virtual]
        else:
            continue
        compute = durations[task] - communication
        if compute[0] > 0.0:
            durations[task] += compute * (slowness[stage] * next(factors) - 1.0)
    assert next(factors, None) is None
    # Replica r's task t is t * R + r; a meeting is a chain of joins over the replicas' ready tasks.
    index = np.arange(num_tasks * num_replicas).reshape(num_tasks, num_replicas)
    first, second, length, lag = [], [], [], []
    for task in range(num_tasks):
        before, data = int(graph.first_predecessor[task]), int(graph.second_predecessor[task])
        for replica in range(num_replicas):
            first.append(index[before, replica] if before < num_tasks else -1)
            second.append(index[data, replica] if data < num_tasks else -1)
            length.append(durations[task, replica])
            lag.append(0.0 if lags is None else lags[graph.task_class[task]])
    for task in range(num_tasks):
        if built[task] not in meeting:
            continue
        join = -1
        for replica in range(num_replicas):
            own = index[task, replica]
            first += [first[own], len(first)]
            second += [second[own], join]
            length += [0.0, 0.0]
            lag += [lag[own], 0.0]
            join = len(first) - 1
        for replica in range(num_replicas):
            first[index[task, replica]], second[index[task, replica]], lag[index[task, replica]] = (
                join,
                -1,
                0.0,
            )
    whole = build_task_graph(np.array(first, np.int32), np.array(second, np.int32))
    return whole.makespan(np.array(length), np.array(lag)) + costs.fixed_time


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("is_blocking", [False, True])
@pytest.mark.parametrize("num_replicas", [1, 4])
def test_replicas_with_jitter_are_a_graph_built_by_hand(
    make_costs: MakeCosts, schedule: str, is_blocking: bool, num_replicas: int
) -> None:
    for seed in range(3):
        costs = uneven_costs(make_costs, schedule, seed, is_blocking=is_blocking)
        # Without a reduction the replicas do not meet at this stage.
        costs.gradient_reduce_time[0] *= seed % 2
        rng = np.random.default_rng(seed)
        slowness = rng.uniform(0.9, 1.3, (costs.num_stages, num_replicas))
        draws: list[np.ndarray] = []

        def draw(
            num_rows: int, rng: np.random.Generator = rng, draws: list[np.ndarray] = draws
        ) -> np.ndarray:
            draws.append(rng.uniform(0.8, 1.5, (num_rows, num_replicas)))
            return draws[-1]

        times = ReplicaGraph(costs, schedule, num_replicas).run(slowness, draw)
        expected = evaluate_by_hand(costs, schedule, slowness, draws)
        assert times.iteration_time == pytest.approx(expected, rel=1e-13)


def test_a_reduction_waits_for_the_last_replica_and_none_does_not(make_costs: MakeCosts) -> None:
    # Forward 1 s and backward 2 s, twice as long in the first replica; optimizer 4 s, twice as long in the other.
    noise = {2: np.array([[2.0, 1.0], [2.0, 1.0]]), 1: np.array([[1.0, 2.0]])}
    for reduce, expected in ((0.0, max(6.0 + 4.0, 3.0 + 8.0)), (1.0, 6.0 + 1.0 + 8.0)):
        costs = make_costs(
            1, 1, 1, optimizer_time=np.array([4.0]), gradient_reduce_time=np.array([reduce]), fixed_time=0.5
        )
        times = ReplicaGraph(costs, "none", 2).run(np.ones((1, 2)), noise.__getitem__)
        assert times.iteration_time == expected + 0.5
        # Alone, the replicas take 6 + reduce + 4 and 3 + reduce + 8 seconds.
        assert times.replica_time == 10.5 + reduce + 0.5
        assert (times.critical_replica, times.critical_stage) == (1 if reduce == 0.0 else 0, 0)


# --- what is drawn ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spread", "tolerance"), [(1e-6, 1e-4), (9.9e-5, 2e-4), (0.02, 1e-4), (0.3, 5e-3)])
def test_the_gumbel_scale_gives_the_coefficient_of_variation(spread: float, tolerance: float) -> None:
    uniform = (np.arange(4_000_000) + 0.5) / 4_000_000
    factor = (-np.log(uniform)) ** -gumbel_scale(spread)
    assert factor.std() / factor.mean() == pytest.approx(spread, rel=tolerance)


@pytest.mark.parametrize(
    "jitter",
    [
        Jitter(operation_spread=0.05),
        Jitter(rank_spread=0.05),
        Jitter(operation_spread=0.05, rank_spread=0.05),
    ],
)
def test_one_rank_is_as_fast_as_without_jitter_on_average(make_costs: MakeCosts, jitter: Jitter) -> None:
    times = simulate_jitter(one_operation(make_costs), "none", ALONE, jitter, num_seeds=2000).iteration_time
    variation = np.sqrt((1 + jitter.operation_spread**2) * (1 + jitter.rank_spread**2) - 1)
    assert times.mean() == pytest.approx(1.0, abs=4 * variation / np.sqrt(2000))
    assert times.std() == pytest.approx(variation, rel=0.1)


@pytest.mark.parametrize(
    "jitter",
    [
        Jitter(operation_spread=0.02),
        Jitter(rank_spread=0.02),
        Jitter(operation_spread=0.02, rank_spread=0.01),
        Jitter(operation_spread=0.02, rank_spread=0.03, slow_ranks=((3, 1.02), (5, 1.05), (5, 1.01))),
    ],
    ids=["operations", "ranks", "both", "slow ranks"],
)
def test_the_slowest_of_a_group_is_distributed_as_drawing_every_rank(
    make_costs: MakeCosts, jitter: Jitter
) -> None:
    groups, num_seeds = RankGroups(num_replicas=1, num_ranks=8), 2000
    times = simulate_jitter(
        one_operation(make_costs), "none", groups, jitter, num_seeds=num_seeds
    ).iteration_time
    rng = np.random.default_rng(11)
    sigma = np.sqrt(np.log1p(jitter.rank_spread**2))
    factor = np.exp(sigma * rng.standard_normal((num_seeds, 8)) - sigma**2 / 2)
    for rank, slower in jitter.slow_ranks:
        factor[:, rank] *= slower
    if jitter.operation_spread:
        drawn = np.exp(gumbel_scale(jitter.operation_spread) * rng.gumbel(size=(num_seeds, 8)))
        factor *= drawn / drawn.mean()
    every_rank = factor.max(axis=1)
    assert ks_2samp(times, every_rank).pvalue > 0.01
    assert times.mean() == pytest.approx(every_rank.mean(), abs=5 * times.std() / np.sqrt(num_seeds))


def test_communication_does_not_jitter(make_costs: MakeCosts) -> None:
    costs = make_costs(4, 1, 8, 1.0, 2.0, 0.0, send_time=np.array([0.1, 0.1, 0.1, 0.0]))
    costs = replace(
        costs,
        forward_communication_time=costs.forward_time,
        backward_communication_time=costs.backward_time,
        parameter_gather_time=np.full(4, 0.7),
        gradient_reduce_time=np.full(4, 0.9),
    )
    groups = RankGroups(num_replicas=4, num_ranks=8)
    jitter = Jitter(operation_spread=0.5, rank_spread=0.5, slow_ranks=((0, 2.0),))
    result = simulate_jitter(costs, "1f1b", groups, jitter, num_seeds=3)
    assert result.iteration_time.tolist() == [iteration_time(costs, "1f1b")] * 3


@pytest.mark.parametrize("name", ["operation_spread", "rank_spread"])
@pytest.mark.parametrize("other", [0.0, 0.03])
@pytest.mark.parametrize("groups", [ALONE, RankGroups(num_replicas=8, num_ranks=4)], ids=["alone", "groups"])
def test_more_jitter_is_never_faster_on_average(
    make_costs: MakeCosts, name: str, other: float, groups: RankGroups
) -> None:
    costs = uneven_costs(make_costs, "1f1b", 1, is_blocking=False)
    second = {"operation_spread": "rank_spread", "rank_spread": "operation_spread"}[name]
    times = [
        simulate_jitter(
            costs, "1f1b", groups, Jitter(**{name: spread, second: other}), num_seeds=150
        ).iteration_time
        for spread in (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0)
    ]
    # Seeds draw the same numbers at every spread. A rank alone is only as slow as the mean of its factors, so
    # there the error of the sampled mean remains.
    for less, more in pairwise(times):
        error = 0.0 if groups != ALONE else 3.0 * (more - less).std() / np.sqrt(len(less))
        assert (more - less).mean() > -error
    assert times[-1].mean() > 1.05 * times[0].mean()


def test_more_replicas_and_larger_groups_are_slower_on_average(make_costs: MakeCosts) -> None:
    costs = uneven_costs(make_costs, "1f1b", 1, is_blocking=False)
    jitter = Jitter(operation_spread=0.02, rank_spread=0.01)

    def mean(num_replicas: int, num_ranks: int) -> float:
        groups = RankGroups(num_replicas=num_replicas, num_ranks=num_ranks)
        return simulate_jitter(costs, "1f1b", groups, jitter, num_seeds=100).mean

    assert mean(1, 1) < mean(4, 1) < mean(32, 1) < mean(32, 4) < mean(32, 32)


# --- seeds --------------------------------------------------------------------------------------------------


def same(left: JitterResult, right: JitterResult) -> bool:
    names = ("iteration_time", "replica_time", "critical_replica", "critical_stage")
    return all(getattr(left, name).tobytes() == getattr(right, name).tobytes() for name in names)


def test_equal_seeds_are_equal_and_a_seed_alone_is_itself(make_costs: MakeCosts) -> None:
    costs = uneven_costs(make_costs, "interleaved_1f1b", 1, is_blocking=False)
    groups, jitter = RankGroups(num_replicas=4, num_ranks=2), Jitter(operation_spread=0.02, rank_spread=0.01)

    def run(first_seed: int, num_seeds: int) -> JitterResult:
        return simulate_jitter(
            costs, "interleaved_1f1b", groups, jitter, num_seeds=num_seeds, first_seed=first_seed
        )

    five = run(7, 5)
    assert same(five, run(7, 5))
    assert run(9, 1).iteration_time[0] == five.iteration_time[2]
    assert len(set(five.iteration_time.tolist())) == 5
    assert not same(five, run(8, 5))


def test_the_shares_and_percentiles_are_those_of_the_seeds(make_costs: MakeCosts) -> None:
    costs = uneven_costs(make_costs, "1f1b", 1, is_blocking=False)
    groups = RankGroups(num_replicas=8, num_ranks=8)
    told: list[tuple[str, int, int]] = []
    result = simulate_jitter(
        costs,
        "1f1b",
        groups,
        Jitter(operation_spread=0.05),
        num_seeds=21,
        progress=lambda *each: told.append(each),
    )
    times = np.sort(result.iteration_time)
    assert (result.percentile(5), result.percentile(50), result.percentile(95)) == (
        times[1],
        times[10],
        times[19],
    )
    assert result.slowdown == pytest.approx(times.mean() / result.jitter_free_time)
    assert result.lost_share == pytest.approx(1.0 - 1.0 / result.slowdown)
    assert result.lost_share == pytest.approx(result.lost_inside_replicas + result.lost_between_replicas)
    assert result.lost_inside_replicas > 0.0
    assert result.lost_between_replicas > 0.0
    assert (result.replica_time < result.iteration_time).all()
    assert [each[1:] for each in told] == [(done, 21) for done in range(21)]


# --- slow ranks ---------------------------------------------------------------------------------------------


def test_a_slow_rank_is_found(make_costs: MakeCosts) -> None:
    costs = make_costs(4, 1, 16, gradient_reduce_time=np.full(4, 0.5))
    groups = RankGroups(num_replicas=8, num_ranks=4)
    for stage, replica in ((0, 0), (2, 5), (3, 7)):
        rank = (stage * 8 + replica) * 4 + 3
        # Alone, and in the noise of all others.
        for jitter in (
            Jitter(slow_ranks=((rank, 1.2),)),
            Jitter(slow_ranks=((rank, 1.2),), operation_spread=0.02, rank_spread=0.01),
        ):
            result = simulate_jitter(costs, "1f1b", groups, jitter, num_seeds=5)
            assert result.critical_stage.tolist() == [stage] * 5
            assert result.critical_replica.tolist() == [replica] * 5
            assert result.slowdown > 1.1


def test_one_slow_replica_costs_all_others_their_time(make_costs: MakeCosts) -> None:
    costs = make_costs(1, 1, 4, gradient_reduce_time=np.array([1.0]))
    result = simulate_jitter(
        costs, "none", RankGroups(num_replicas=4, num_ranks=1), Jitter(slow_ranks=((2, 1.5),)), num_seeds=1
    )
    # 12 s of compute and a reduction of 1 s; 18 s of compute on the slow replica.
    assert result.jitter_free_time == 13.0
    assert result.iteration_time.tolist() == pytest.approx([19.0])
    assert result.replica_time.tolist() == pytest.approx([(3 * 13.0 + 19.0) / 4])
    assert result.lost_share == pytest.approx(6.0 / 19.0)
    assert result.lost_between_replicas == pytest.approx(4.5 / 19.0)


# --- groups and mistakes ------------------------------------------------------------------------------------


def make_plan(**degrees: object) -> ParallelPlan:
    values = {"dp": 8, "tp": 4, "micro_batch_size": 1, "schedule": "none", "layers_per_stage": (4,)}
    return ParallelPlan(**(values | degrees))  # type: ignore[arg-type]  # names checked by the dataclass


@pytest.mark.parametrize(
    ("degrees", "syncs", "groups"),
    [
        ({}, False, (8, 4)),
        ({"cp": 2}, False, (8, 8)),
        ({"sharding": "zero3"}, True, (1, 32)),
        ({"sharding": "hsdp", "sharding_group": 2}, True, (4, 8)),
        ({"sharding": "zero1", "sharding_group": 2}, False, (8, 4)),
        ({"ep": 8}, False, (4, 8)),
        ({"ep": 2, "etp": 4}, False, (4, 8)),
    ],
)
def test_ranks_in_lock_step_are_those_that_meet_in_every_layer(
    degrees: dict[str, object], syncs: bool, groups: tuple[int, int]
) -> None:
    found = rank_groups(make_plan(**degrees), syncs_every_micro_batch=syncs)
    assert (found.num_replicas, found.num_ranks) == groups


def test_experts_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(SpecError, match="groups of 12 ranks do not divide the 32 ranks of a stage"):
        rank_groups(make_plan(ep=3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"operation_spread": -0.01}, "operation_spread must be 0 to 1"),
        ({"operation_spread": 1.01}, "operation_spread must be 0 to 1"),
        ({"rank_spread": float("nan")}, "rank_spread must be 0 to 1"),
        ({"slow_ranks": ((3, 0.9),)}, "slow rank 3 must be 1 to 1000, not 0.9"),
        ({"slow_ranks": ((3, float("inf")),)}, "slow rank 3 must be 1 to 1000"),
        ({"slow_ranks": ((8, 1.5),)}, "slow rank 8 does not exist: the plan has ranks 0 to 7"),
        ({"slow_ranks": ((-1, 1.5),)}, "slow rank -1 does not exist"),
        ({"num_seeds": 0}, "the number of seeds must be at least 1, not 0"),
        ({"first_seed": -1}, "seeds start at 0, not at -1"),
        ({"num_replicas": 0}, "num_replicas must be at least 1"),
    ],
)
def test_a_mistake_is_named(make_costs: MakeCosts, wrong: dict[str, object], message: str) -> None:
    seeds = {name: wrong.pop(name) for name in ("num_seeds", "first_seed") if name in wrong}
    replicas = wrong.pop("num_replicas", 2)
    with pytest.raises(SpecError, match=message):
        simulate_jitter(
            make_costs(2, 1, 2),
            "1f1b",
            RankGroups(num_replicas=replicas, num_ranks=2),  # type: ignore[arg-type]  # the mistake
            Jitter(**wrong),  # type: ignore[arg-type]  # the mistake
            **seeds,  # type: ignore[arg-type]  # the mistake
        )


@pytest.mark.parametrize("spread", [1e-300, 1e-9, 1.0])
def test_extreme_spreads_stay_finite(make_costs: MakeCosts, spread: float) -> None:
    costs = uneven_costs(make_costs, "1f1b", 1, is_blocking=False)
    jitter = Jitter(operation_spread=spread, rank_spread=spread, slow_ranks=((1, 1000.0),))
    result = simulate_jitter(costs, "1f1b", RankGroups(num_replicas=3, num_ranks=4), jitter, num_seeds=20)
    assert np.isfinite(result.iteration_time).all()


# --- compiled or not ----------------------------------------------------------------------------------------

PRINT_RESULT = """
import numpy as np
from meshwright.simcore.compiled import has_compiler
from meshwright.simcore.training import IterationCosts
from meshwright.simcore.training.jitter import Jitter, RankGroups, simulate_jitter

each, zero = np.linspace(0.1, 0.3, 8), np.zeros(8)
costs = IterationCosts(
    num_stages=4, num_chunks=2, num_micro_batches=8, forward_time=each, backward_time=2 * each,
    weight_gradient_time=0.5 * each, forward_communication_time=0.1 * each, backward_communication_time=0.1 * each,
    send_time=0.01 * each, is_send_blocking=False, gradient_reduce_time=each, gradient_reduce_overlap=0.5,
    parameter_gather_time=each, parameter_gather_overlap=0.5, optimizer_time=each[:4], fixed_time=0.1)
jitter = Jitter(operation_spread=0.02, rank_spread=0.01, slow_ranks=((5, 1.01),))
result = simulate_jitter(costs, "interleaved_1f1b", RankGroups(num_replicas=3, num_ranks=2), jitter, num_seeds=6)
print(has_compiler())
for name in ("iteration_time", "replica_time", "critical_replica", "critical_stage"):
    print(getattr(result, name).tolist())
"""


def test_compiled_and_plain_python_agree_bit_for_bit() -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    outputs = [
        subprocess.run(
            [sys.executable, "-P", "-c", PRINT_RESULT],
            env=kept | {"PYTHONPATH": SOURCE} | extra,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        for extra in ({}, {"NUMBA_DISABLE_JIT": "1"})
    ]
    assert [lines[0] for lines in outputs] == ["True", "False"]
    assert outputs[0][1:] == outputs[1][1:]
    assert len(outputs[0]) == 5
