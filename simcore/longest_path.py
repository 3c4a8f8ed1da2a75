"""The compiled loops under :mod:`meshwright.simcore.task_graph`.

Where ``-1`` means "no predecessor" at construction, ``num_tasks`` does from renumbering on: arrays of finish
times carry one more entry than there are tasks, so that an absent predecessor is a load like any other instead
of a branch. (Index -1 would do as well, but plain Python's fast path is for indices that are not negative.)
"""
# ruff: noqa: PLR1730 - a call of max() halves the speed of plain Python

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.compiled import compiled

__all__ = [
    "evaluate_lagged_tasks",
    "evaluate_tasks",
    "finish_lagged_tasks",
    "finish_tasks",
    "latest_ends",
    "renumber_predecessors",
    "sort_by_level",
]


@compiled
def sort_by_level(
    first: NDArray[np.int32],
    second: NDArray[np.int32],
    waiting: NDArray[np.int32],
    successor: NDArray[np.int32],
    following: NDArray[np.int32],
    order: NDArray[np.int32],
) -> int:
    """Kahn's algorithm with a first-in first-out queue; return how many tasks were ordered.

    A task joins the queue when its last predecessor leaves it, so the queue, which is ``order``, comes out
    sorted by level. ``waiting`` (zeros) counts open predecessors, ``successor`` (-1) heads each task's list
    of outgoing edges, ``following`` (two per task) links that list: edge ``2 t`` enters ``t`` from its first
    predecessor, edge ``2 t + 1`` from its second.
    """
    num_tasks = len(first)
    tail = 0
    for task in range(num_tasks - 1, -1, -1):
        predecessor = first[task]
        if predecessor >= 0:
            waiting[task] += 1
            following[2 * task] = successor[predecessor]
            successor[predecessor] = 2 * task
        predecessor = second[task]
        if predecessor >= 0:
            waiting[task] += 1
            following[2 * task + 1] = successor[predecessor]
            successor[predecessor] = 2 * task + 1
    for task in range(num_tasks):
        if waiting[task] == 0:
            order[tail] = task
            tail += 1
    head = 0
    while head < tail:
        edge = successor[order[head]]
        head += 1
        while edge >= 0:
            task = edge >> 1
            waiting[task] -= 1
            if waiting[task] == 0:
                order[tail] = task
                tail += 1
            edge = following[edge]
    return tail


@compiled
def renumber_predecessors(
    first: NDArray[np.int32],
    second: NDArray[np.int32],
    order: NDArray[np.int32],
    position: NDArray[np.int32],
    new_first: NDArray[np.int32],
    new_second: NDArray[np.int32],
) -> None:
    """Write the predecessors of the tasks in the numbering of ``order``; ``position`` is its inverse.

    ``position`` has one entry more than tasks; its last one is ``num_tasks``, what -1 becomes.
    """
    num_tasks = len(order)
    for index in range(num_tasks):
        position[order[index]] = index
    for index in range(num_tasks):
        task = order[index]
        new_first[index] = position[first[task]]
        new_second[index] = position[second[task]]


@compiled
def evaluate_tasks(
    first: NDArray[np.int32],
    second: NDArray[np.int32],
    task_class: NDArray[np.int32],
    durations: NDArray[np.float64],
    start: NDArray[np.float64],
    end: NDArray[np.float64],
) -> None:
    """Longest path: write start and end of every task, predecessors before successors.

    ``end`` has one entry more than tasks, and that entry is 0.0.
    """
    for task in range(len(first)):
        time = end[first[task]]
        data = end[second[task]]
        if data > time:
            time = data
        start[task] = time
        end[task] = time + durations[task_class[task]]


@compiled
def evaluate_lagged_tasks(
    first: NDArray[np.int32],
    second: NDArray[np.int32],
    task_class: NDArray[np.int32],
    durations: NDArray[np.float64],
    lags: NDArray[np.float64],
    start: NDArray[np.float64],
    end: NDArray[np.float64],
) -> None:
    """Do what :func:`evaluate_tasks` does, the second predecessor counting from its end plus a lag."""
    for task in range(len(first)):
        kind = task_class[task]
        time = end[first[task]]
        data = end[second[task]] + lags[kind]
        if data > time:
            time = data
        start[task] = time
        end[task] = time + durations[kind]


@compiled
def finish_tasks(
    first: NDArray[np.int32],
    second: NDArray[np.int32],
    task_class: NDArray[np.int32],
    durations: NDArray[np.float64],
    end: NDArray[np.float64],
) -> None:
    """Do what :func:`evaluate_tasks` does, without keeping starts: half the memory to touch."""
    for task in range(len(first)):
        time = end[first[task]]
        data = end[second[task]]
        if data > time:
            time = data
        end[task] = time + durations[task_class[task]]


@compiled
def finish_lagged_tasks(
    first: NDArray[np.int32],
    second: NDArray[np.int32],
    task_class: NDArray[np.int32],
    durations: NDArray[np.float64],
    lags: NDArray[np.float64],
    end: NDArray[np.float64],
) -> None:
    """Do what :func:`evaluate_lagged_tasks` does, without keeping starts."""
    for task in range(len(first)):
        kind = task_class[task]
        time = end[first[task]]
        data = end[second[task]] + lags[kind]
        if data > time:
            time = data
        end[task] = time + durations[kind]


@compiled
def latest_ends(
    first: NDArray[np.int32],
    second: NDArray[np.int32],
    task_class: NDArray[np.int32],
    durations: NDArray[np.float64],
    lags: NDArray[np.float64],
    latest: NDArray[np.float64],
) -> None:
    """Lower ``latest`` (makespan everywhere, one spare entry) to the latest end that delays nothing."""
    for task in range(len(first) - 1, -1, -1):
        kind = task_class[task]
        begin = latest[task] - durations[kind]
        latest[first[task]] = min(latest[first[task]], begin)
        begin -= lags[kind]
        latest[second[task]] = min(latest[second[task]], begin)
