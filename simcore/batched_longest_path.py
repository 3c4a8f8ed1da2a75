"""The compiled loops under :mod:`meshwright.simcore.training.jitter`: one task graph, many replicas at once.

Replicas run the same graph with durations of their own and meet at synchronised tasks. Values per task and
replica lie in one flat array, replica fastest: task ``t`` of replica ``r`` is entry ``t * num_replicas + r``.
"""
# ruff: noqa: PLR1730 - a call of max() halves the speed of plain Python

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.compiled import compiled

__all__ = ["critical_excess", "finish_replicas"]


@compiled
def finish_replicas(
    tasks: NDArray[np.int64],
    first: NDArray[np.int32],
    second: NDArray[np.int32],
    task_class: NDArray[np.int32],
    stage: NDArray[np.int64],
    is_synchronised: NDArray[np.bool_],
    durations: NDArray[np.float64],
    computes: NDArray[np.float64],
    lags: NDArray[np.float64],
    slowness: NDArray[np.float64],
    noise: NDArray[np.float64],
    num_replicas: int,
    end: NDArray[np.float64],
) -> None:
    """Longest path of all replicas: write the end of each of ``tasks``, predecessors before successors.

    A task whose class computes lasts its duration plus what jitter adds to the computing part; a synchronised
    task begins in all replicas when the last one is ready.

    Parameters
    ----------
    tasks : NDArray[np.int64]
        Tasks to evaluate, ascending.
    first, second, task_class : NDArray[np.int32]
        The graph, shape ``(num_tasks,)``; ``num_tasks`` stands for no predecessor.
    stage : NDArray[np.int64]
        Row of ``slowness`` of each task, shape ``(num_tasks,)``; read where the class computes.
    is_synchronised : NDArray[np.bool_]
        Whether the replicas meet there, shape ``(num_tasks,)``; such tasks do not compute.
    durations, computes, lags : NDArray[np.float64]
        Duration, its computing part, and lag of the second predecessor, per class [s].
    slowness : NDArray[np.float64]
        Factor per stage and replica, flat.
    noise : NDArray[np.float64]
        Factor per computing task of ``tasks``, in their order, and replica, flat.
    num_replicas : int
        Replicas.
    end : NDArray[np.float64]
        Flat ends of ``num_tasks + 1`` tasks; those of the last are 0.0 [s].
    """
    row = 0
    for index in range(len(tasks)):
        task = tasks[index]
        kind = task_class[task]
        duration = durations[kind]
        compute = computes[kind]
        lag = lags[kind]
        before = first[task] * num_replicas
        data_before = second[task] * num_replicas
        here = task * num_replicas
        if compute > 0.0:
            group = stage[task] * num_replicas
            for replica in range(num_replicas):
                time = end[before + replica]
                data = end[data_before + replica] + lag
                if data > time:
                    time = data
                factor = slowness[group + replica] * noise[row + replica]
                # In this form a factor of 1.0 leaves the duration as it is, bit for bit.
                end[here + replica] = time + (duration + compute * (factor - 1.0))
            row += num_replicas
        else:
            latest = 0.0
            for replica in range(num_replicas):
                time = end[before + replica]
                data = end[data_before + replica] + lag
                if data > time:
                    time = data
                if time > latest:
                    latest = time
                end[here + replica] = time + duration
            if is_synchronised[task]:
                for replica in range(num_replicas):
                    end[here + replica] = latest + duration


@compiled
def critical_excess(
    task: int,
    replica: int,
    first: NDArray[np.int32],
    second: NDArray[np.int32],
    task_class: NDArray[np.int32],
    stage: NDArray[np.int64],
    is_synchronised: NDArray[np.bool_],
    durations: NDArray[np.float64],
    computes: NDArray[np.float64],
    lags: NDArray[np.float64],
    num_replicas: int,
    end: NDArray[np.float64],
    excess: NDArray[np.float64],
) -> int:
    """Walk the critical path back from ``task`` of ``replica``; return the replica in which it begins.

    Adds to ``excess`` (per stage) what jitter added to the operations on the path [s]. At a synchronised task
    the path goes on in the replica that was ready last. On a tie the first (stream) predecessor wins, as in
    :meth:`meshwright.simcore.task_graph.TaskGraph.critical_path`. Arguments as in :func:`finish_replicas`.
    """
    num_tasks = len(first)
    while task != num_tasks:
        kind = task_class[task]
        before = first[task] * num_replicas
        data_before = second[task] * num_replicas
        if is_synchronised[task]:
            latest = -1.0
            for other in range(num_replicas):
                time = end[before + other]
                data = end[data_before + other] + lags[kind]
                if data > time:
                    time = data
                if time > latest:
                    latest = time
                    replica = other
        time = end[before + replica]
        data = end[data_before + replica] + lags[kind]
        previous = first[task]
        if data > time:
            time = data
            previous = second[task]
        if computes[kind] > 0.0:
            excess[stage[task]] += end[task * num_replicas + replica] - time - durations[kind]
        task = previous
    return replica
