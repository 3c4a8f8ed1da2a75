from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.simcore.task_graph import build_task_graph

Predecessors = tuple[NDArray[np.int32], NDArray[np.int32]]


def random_predecessors(rng: np.random.Generator, num_tasks: int) -> Predecessors:
    """A random graph whose tasks are numbered at random."""
    rank = rng.permutation(num_tasks)
    by_rank = np.argsort(rank)
    both = []
    for _ in range(2):
        earlier = rng.integers(-1, np.maximum(np.arange(num_tasks), 0))
        chosen = np.where(earlier >= 0, by_rank[earlier], -1)
        both.append(chosen[rank].astype(np.int32))
    return both[0], both[1]


def reference_times(
    predecessors: Predecessors, durations: NDArray[np.float64], lags: NDArray[np.float64]
) -> tuple[list[float], list[float]]:
    """Longest path by recursion over the definition."""
    start: list[float | None] = [None] * len(durations)

    def begin(task: int) -> float:
        known = start[task]
        if known is None:
            first, second = (int(side[task]) for side in predecessors)
            known = begin(first) + durations[first] if first >= 0 else 0.0
            data = (begin(second) + durations[second] if second >= 0 else 0.0) + lags[task]
            known = start[task] = max(known, data)
        return known

    begins = [begin(task) for task in range(len(durations))]
    return begins, [a + b for a, b in zip(begins, durations, strict=True)]


seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds, num_tasks=st.integers(1, 40))
def test_evaluation_is_the_longest_path_of_the_definition(seed: int, num_tasks: int) -> None:
    rng = np.random.default_rng(seed)
    predecessors = random_predecessors(rng, num_tasks)
    durations, lags = rng.random(num_tasks), rng.random(num_tasks)
    graph = build_task_graph(*predecessors)
    times = graph.evaluate(durations, lags)
    begins, ends = reference_times(predecessors, durations, lags)
    assert graph.in_built_order(times.start).tolist() == begins
    assert graph.in_built_order(times.end).tolist() == ends
    assert graph.makespan(durations, lags) == times.makespan == max(ends)


@given(seed=seeds, num_tasks=st.integers(1, 60))
def test_tasks_are_numbered_by_level(seed: int, num_tasks: int) -> None:
    graph = build_task_graph(*random_predecessors(np.random.default_rng(seed), num_tasks))
    level = np.zeros(num_tasks, dtype=int)
    for task in range(num_tasks):
        sides = (graph.first_predecessor[task], graph.second_predecessor[task])
        level[task] = max([level[side] + 1 for side in sides if side < num_tasks], default=0)
    assert np.all(np.diff(level) >= 0)


@given(seed=seeds, num_tasks=st.integers(1, 60), has_lags=st.booleans())
def test_critical_path_is_gapless_and_has_no_slack(seed: int, num_tasks: int, has_lags: bool) -> None:
    rng = np.random.default_rng(seed)
    graph = build_task_graph(*random_predecessors(rng, num_tasks))
    durations = rng.integers(0, 64, num_tasks) / 8.0
    # Only where there is a second predecessor: elsewhere a lag holds the task back on its own.
    is_joined = graph.in_built_order(graph.second_predecessor) < num_tasks
    lags = np.where(is_joined, rng.integers(0, 64, num_tasks) / 8.0, 0.0) if has_lags else None
    times = graph.evaluate(durations, lags)
    path = graph.critical_path(times, lags)
    assert times.start[path[0]] == 0.0
    assert times.end[path[-1]] == times.makespan
    assert np.all(times.end[path[:-1]] <= times.start[path[1:]])
    if not has_lags:
        assert times.end[path[:-1]].tolist() == times.start[path[1:]].tolist()
    slack = graph.slack(times, durations, lags)
    assert np.all(slack >= 0.0)
    assert np.all(slack[path] == 0.0)


@given(seed=seeds, num_tasks=st.integers(1, 60))
def test_removing_a_dependency_never_delays(seed: int, num_tasks: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = random_predecessors(rng, num_tasks)
    durations = rng.random(num_tasks)
    before = build_task_graph(first, second).makespan(durations)
    (first if rng.random() < 0.5 else second)[rng.integers(num_tasks)] = -1
    assert build_task_graph(first, second).makespan(durations) <= before


@given(seed=seeds, num_tasks=st.integers(1, 60))
def test_makespan_scales_with_its_durations(seed: int, num_tasks: int) -> None:
    rng = np.random.default_rng(seed)
    graph = build_task_graph(*random_predecessors(rng, num_tasks))
    durations, lags = rng.random(num_tasks), rng.random(num_tasks)
    assert graph.makespan(4.0 * durations, 4.0 * lags) == 4.0 * graph.makespan(durations, lags)


def test_tasks_of_a_class_share_duration_and_lag() -> None:
    chain = np.array([-1, 0, 1], np.int32)
    none = np.full(3, -1, np.int32)
    graph = build_task_graph(none, chain, np.array([0, 1, 1], np.int32))
    assert graph.evaluate(np.array([1.0, 2.0]), np.array([0.0, 0.5])).end.tolist() == [1.0, 3.5, 6.0]


def test_a_circle_is_refused() -> None:
    with pytest.raises(SpecError, match="2 of 3 tasks wait for each other"):
        build_task_graph(np.array([-1, 2, 1], np.int32), np.full(3, -1, np.int32))


def test_an_unknown_predecessor_is_refused() -> None:
    with pytest.raises(SpecError, match="second_predecessor"):
        build_task_graph(np.array([-1, 0], np.int32), np.array([-1, 2], np.int32))


def test_durations_of_another_length_are_refused() -> None:
    graph = build_task_graph(np.array([-1, 0], np.int32), np.full(2, -1, np.int32))
    with pytest.raises(SpecError, match="durations has shape"):
        graph.evaluate(np.ones(1))


def test_no_tasks_take_no_time() -> None:
    empty = np.empty(0, np.int32)
    graph = build_task_graph(empty, empty)
    times = graph.evaluate(np.empty(0))
    assert times.makespan == graph.makespan(np.empty(0)) == 0.0
    assert len(graph.critical_path(times)) == 0
