"""How many tasks per second the task graph evaluates, compiled and in plain Python.

    python benchmarks/task_graph.py

Interleaved 1F1B on 16 stages, 4 chunks each, 256 micro-batches: every operation is a chain of ``sub`` tasks
on the stage's compute stream and a send on its communication stream; 16 gradient buckets per stage end it.
Best of several repeats. The plain-Python figures come from a child process with NUMBA_DISABLE_JIT=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.compiled import for_kernel, has_compiler, kernel_output
from meshwright.simcore.longest_path import evaluate_tasks
from meshwright.simcore.schedules import SCHEDULES
from meshwright.simcore.task_graph import TaskGraph, build_task_graph

STAGES, CHUNKS, MICRO_BATCHES, BUCKETS = 16, 4, 256, 16
# (name, tasks per operation, data parallel replicas)
SIZES = (("S", 1, 1), ("M", 8, 1), ("L", 8, 4))


def workload(
    num_sub: int, num_replicas: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Return first and second predecessors and classes of the benchmark's tasks."""
    operations = SCHEDULES["interleaved_1f1b"].operations(STAGES, CHUNKS, MICRO_BATCHES)
    num_operations, num_virtual, width = operations.kind.size, STAGES * CHUNKS, num_sub + 1
    operation = np.arange(num_operations, dtype=np.int32).reshape(operations.kind.shape)
    virtual = operations.chunk * STAGES + np.arange(STAGES)[:, np.newaxis]
    task_of = np.full((2, num_virtual, MICRO_BATCHES), -1, dtype=np.int32)
    task_of[operations.kind, virtual, operations.micro_batch] = operation
    source = np.full(task_of.shape, -1, dtype=np.int32)
    source[0, 1:], source[1, :-1] = task_of[0, :-1], task_of[1, 1:]
    data = source[operations.kind, virtual, operations.micro_batch].ravel()

    # Task (operation, sub); the last sub is the send, chained to the stage's previous send.
    chain = (np.arange(num_operations * width, dtype=np.int32) - 1).reshape(num_operations, width)
    first, second = chain.copy(), np.full_like(chain, -1)
    before = np.where(operation % operations.num_operations > 0, operation - 1, -1).ravel()
    first[:, 0] = np.where(before >= 0, before * width + num_sub - 1, -1)
    second[:, 0] = np.where(data >= 0, data * width + num_sub, -1)
    second[:, num_sub] = np.where(before >= 0, before * width + num_sub, -1)
    kind = operations.kind.ravel()[:, np.newaxis]
    task_class = np.where(np.arange(width) < num_sub, kind, 2).astype(np.int32)

    bucket = num_operations * width + np.arange(STAGES * BUCKETS, dtype=np.int32).reshape(STAGES, BUCKETS) - 1
    bucket[:, 0] = (np.arange(1, STAGES + 1) * operations.num_operations - 1) * width + num_sub - 1
    first = np.concatenate([first.ravel(), bucket.ravel()])
    second = np.concatenate([second.ravel(), np.full(bucket.size, -1, dtype=np.int32)])
    task_class = np.concatenate([task_class.ravel(), np.full(bucket.size, 3, dtype=np.int32)])
    offset = (np.arange(num_replicas, dtype=np.int32) * len(first))[:, np.newaxis]
    return (
        np.where(first >= 0, first + offset, -1).astype(np.int32).ravel(),
        np.where(second >= 0, second + offset, -1).astype(np.int32).ravel(),
        np.tile(task_class, num_replicas),
    )


def best_times(graph: TaskGraph, durations: NDArray[np.float64], num_repeats: int) -> list[float]:
    """Return the best seconds of evaluate(), of makespan() and of the loop with start and end alone."""
    times = []
    arrays = (graph.first_predecessor, graph.second_predecessor, graph.task_class, durations)
    inputs = [for_kernel(array) for array in arrays]
    start = kernel_output(graph.num_tasks, 0.0, np.float64)
    end = kernel_output(graph.num_tasks + 1, 0.0, np.float64)
    for _ in range(num_repeats):
        marks = [time.perf_counter()]
        graph.evaluate(durations)
        marks.append(time.perf_counter())
        graph.makespan(durations)
        marks.append(time.perf_counter())
        evaluate_tasks(*inputs, start, end)
        marks.append(time.perf_counter())
        times.append(np.diff(marks))
    return [float(seconds) for seconds in np.min(times, axis=0)]


def report() -> None:
    mode = "compiled" if has_compiler() else "plain Python"
    for name, num_sub, num_replicas in SIZES:
        first, second, task_class = workload(num_sub, num_replicas)
        graph = build_task_graph(first, second, task_class)
        begin = time.perf_counter()
        build_task_graph(first, second, task_class)
        build = time.perf_counter() - begin
        durations = np.array([1.0 / num_sub, 2.0 / num_sub, 0.05, 0.1])
        seconds = [*best_times(graph, durations, 30 if has_compiler() else 7), build]
        whole, makespan, loop, building = (graph.num_tasks / each / 1e6 for each in seconds)
        print(
            f"{mode:12s} {name} {graph.num_tasks:9,d} tasks: million tasks/s  evaluate {whole:6.1f}"
            f"  makespan {makespan:6.1f}  loop alone {loop:6.1f}  build {building:5.1f}"
            f"   makespan {graph.makespan(durations)!r}",
            flush=True,
        )


if __name__ == "__main__":
    report()
    if has_compiler():
        subprocess.run([sys.executable, *sys.argv], env=os.environ | {"NUMBA_DISABLE_JIT": "1"}, check=True)
