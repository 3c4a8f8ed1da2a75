"""The event loop: tasks in order of time, their communications as flows whose rates follow who else is on the links."""

from __future__ import annotations

import math

from meshwright.simcore.compiled import compiled, kernel_part
from meshwright.simcore.network.flow_memory import (
    ENDS,
    ENTRIES_AT,
    KEY,
    LEVELS,
    OWNER,
    SIZE,
    SWEEP,
    Floats,
    Ints,
)
from meshwright.simcore.network.heap import put_record, take_record
from meshwright.simcore.network.max_min import begin_flow, end_flow, next_end, solve_rates
from meshwright.simcore.network.task_memory import (
    BEGIN,
    CHANNEL,
    CHANNEL_FLOW,
    END,
    FIRST_SUCCESSOR,
    FIXED,
    FOLLOWING,
    LAST_SUCCESSOR,
    LAST_WAITING,
    READY,
    RUNNING,
    START,
    TIMERS,
    VOLUME,
    WAITS_FOR,
)

__all__ = ["run_tasks"]


@compiled
def run_tasks(tasks: Ints, times: Floats, ints: Ints, floats: Floats) -> int:
    """Run all tasks; return how often rates were solved.

    ``tasks`` and ``times`` are a :func:`~meshwright.simcore.network.task_memory.task_memory`, the others the memory of
    the flows. What happens at one time happens before rates are solved.
    """
    now = 0.0
    while True:
        start_ready(tasks, times, ints, floats, now)
        if ints[LEVELS + SIZE] > 0:
            solve_rates(ints, floats, now)
        now = next_end(ints, floats)
        if tasks[TIMERS + SIZE] > 0:
            now = min(now, times[tasks[tasks[TIMERS + ENTRIES_AT]] + KEY])
        if now == math.inf:
            num_solves: int = ints[SWEEP]
            return num_solves
        while tasks[TIMERS + SIZE] > 0 and times[tasks[tasks[TIMERS + ENTRIES_AT]] + KEY] <= now:
            task = tasks[tasks[TIMERS + ENTRIES_AT]]
            take_record(tasks, times, TIMERS, task)
            communicate(tasks, times, ints, floats, task, now)
        while next_end(ints, floats) <= now:
            end_communication(tasks, times, ints, floats, ints[ints[ENDS + ENTRIES_AT]], now)


@kernel_part
def start_ready(tasks: Ints, times: Floats, ints: Ints, floats: Floats, now: float) -> None:
    """Start tasks whose predecessors have ended, and those that wait for such as take no time."""
    while tasks[READY] >= 0:
        task = tasks[READY]
        tasks[READY] = tasks[task + FOLLOWING]
        tasks[task + FOLLOWING] = -1
        times[task + START] = now
        if times[task + FIXED] > 0.0:
            put_record(tasks, times, TIMERS, task, now + times[task + FIXED])
        else:
            communicate(tasks, times, ints, floats, task, now)


@kernel_part
def communicate(tasks: Ints, times: Floats, ints: Ints, floats: Floats, task: int, now: float) -> None:
    """Let a task send what it has to, now or when its channel is free; one that sends nothing ends."""
    channel = tasks[task + CHANNEL]
    times[task + BEGIN] = now
    if channel < 0 or times[task + VOLUME] <= 0.0:
        finish_task(tasks, times, task, now)
    elif tasks[channel + RUNNING] < 0:
        tasks[channel + RUNNING] = task
        tasks[channel + LAST_WAITING] = task
        begin_flow(ints, floats, tasks[channel + CHANNEL_FLOW], times[task + VOLUME], now)
    else:
        tasks[tasks[channel + LAST_WAITING] + FOLLOWING] = task
        tasks[channel + LAST_WAITING] = task


@kernel_part
def end_communication(tasks: Ints, times: Floats, ints: Ints, floats: Floats, flow: int, now: float) -> None:
    """End a flow and its task; the next in line has the channel."""
    end_flow(ints, floats, flow)
    channel = ints[flow + OWNER]
    task = tasks[channel + RUNNING]
    following = tasks[task + FOLLOWING]
    tasks[task + FOLLOWING] = -1
    tasks[channel + RUNNING] = following
    if following >= 0:
        begin_flow(ints, floats, flow, times[following + VOLUME], now)
    finish_task(tasks, times, task, now)


@kernel_part
def finish_task(tasks: Ints, times: Floats, task: int, now: float) -> None:
    """End a task; successors that waited for it alone become ready."""
    times[task + END] = now
    for index in range(tasks[task + FIRST_SUCCESSOR], tasks[task + LAST_SUCCESSOR]):
        successor = tasks[index]
        tasks[successor + WAITS_FOR] -= 1
        if tasks[successor + WAITS_FOR] == 0:
            tasks[successor + FOLLOWING] = tasks[READY]
            tasks[READY] = successor
