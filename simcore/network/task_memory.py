"""The records of tasks that compute for a fixed time and then communicate, beside those of the flows they become.

A channel carries the communications of its tasks one after the other, as a communicator does, as one flow at a time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.compiled import for_kernel, from_kernel
from meshwright.simcore.network.flow_memory import Floats, Ints

__all__ = [
    "BEGIN",
    "CHANNEL",
    "CHANNEL_FLOW",
    "END",
    "FIRST_SUCCESSOR",
    "FIXED",
    "FOLLOWING",
    "LAST_SUCCESSOR",
    "LAST_WAITING",
    "READY",
    "RUNNING",
    "START",
    "TIMERS",
    "VOLUME",
    "WAITS_FOR",
    "read_tasks",
    "task_memory",
]

# Header: a heap of tasks by the end of their fixed time; the first of a list of tasks that may start.
TIMERS, READY, _HEADER = 0, 2, 3
# Tasks, integers (place in the heap first): successors, predecessors still running, channel or -1, the next in a list.
FIRST_SUCCESSOR, LAST_SUCCESSOR, WAITS_FOR, CHANNEL, FOLLOWING, _TASK_STRIDE = 1, 2, 3, 4, 5, 6
# Tasks, floats (the heap's key first): fixed time, then what to send; start, begin of the communication, end.
FIXED, VOLUME, START, BEGIN, END = 1, 2, 3, 4, 5
# Channels: the record of their flow, the task whose flow that is or -1, the last task that waits for the channel.
CHANNEL_FLOW, RUNNING, LAST_WAITING, _CHANNEL_STRIDE = 0, 1, 2, 3


def task_memory(
    predecessors: Ints, fixed: Floats, channel: Ints, volume: Floats, flows: Ints
) -> tuple[Ints, Floats, Ints]:
    """Return integers and floats of tasks, and the address of each channel's record.

    Parameters
    ----------
    predecessors : Ints
        Of each task, -1 for none, ``(num_predecessors, num_tasks)``; they make no circle.
    fixed : Floats
        Time before the task communicates, ``(num_tasks,)`` [s].
    channel : Ints
        Channel it then uses, -1 for none, ``(num_tasks,)``.
    volume : Floats
        What it sends, in the unit of the channel's rate times seconds, ``(num_tasks,)``.
    flows : Ints
        Address of each channel's flow, ``(num_channels,)``.
    """
    num_tasks, num_channels = len(fixed), len(flows)
    channels_at = _HEADER + num_tasks * _TASK_STRIDE
    successors_at = channels_at + num_channels * _CHANNEL_STRIDE
    waits, tasks_of_edge = np.nonzero(predecessors >= 0)
    source = predecessors[waits, tasks_of_edge]
    entries_at = successors_at + len(source)
    ints = np.full(entries_at + num_tasks, -1, dtype=np.int64)
    floats = np.zeros(channels_at)
    tasks = _HEADER + np.arange(num_tasks, dtype=np.int64) * _TASK_STRIDE
    channels = channels_at + np.arange(num_channels, dtype=np.int64) * _CHANNEL_STRIDE
    # By source, then by task: successors start in the order of their numbers.
    by_source = np.argsort(source * np.int64(num_tasks) + tasks_of_edge)
    ints[successors_at:entries_at] = tasks[tasks_of_edge[by_source]]
    ends = successors_at + np.cumsum(np.bincount(source, minlength=num_tasks))
    ints[tasks + LAST_SUCCESSOR] = ends
    ints[tasks + FIRST_SUCCESSOR] = np.concatenate([[successors_at], ends[:-1]])
    waits_for = np.bincount(tasks_of_edge, minlength=num_tasks)
    ints[tasks + WAITS_FOR] = waits_for
    ints[tasks + CHANNEL] = np.where(channel >= 0, channels_at + channel * _CHANNEL_STRIDE, -1)
    ready = tasks[waits_for == 0]
    ints[ready[:-1] + FOLLOWING] = ready[1:]
    ints[:_HEADER] = [0, entries_at, ready[0] if len(ready) else -1]
    ints[channels + CHANNEL_FLOW] = flows
    floats[tasks + FIXED], floats[tasks + VOLUME] = fixed, volume
    return for_kernel(ints), for_kernel(floats), channels


def read_tasks(floats: Floats, num_tasks: int) -> NDArray[np.float64]:
    """Return start, begin of the communication and end of each task, ``(3, num_tasks)`` [s]."""
    records = from_kernel(floats, np.float64)[_HEADER : _HEADER + num_tasks * _TASK_STRIDE]
    return records.reshape(num_tasks, _TASK_STRIDE)[:, [START, BEGIN, END]].T.copy()
