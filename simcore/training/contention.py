"""One iteration whose communications share links: when they overlap there, they and all that waits for them take longer.

The task graph of :mod:`meshwright.simcore.training.structure` with every send, gather, reduction and exchange over
nodes as a communication on a channel. Ranks that do the same are one task; a channel stands for the flows of all of
them, and counts on every link those of its flows that cross it. Where no two channels ask for more of a link than it
has, the times are those of the longest path.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.network.channels import Channels
from meshwright.simcore.training.costs import IterationCosts
from meshwright.simcore.training.iteration import IterationResult, iteration_result
from meshwright.simcore.training.structure import IterationStructure, TaskBlock, iteration_structure

__all__ = ["ContendedIteration", "Exchange", "IterationTraffic", "contended_iteration", "slowed_costs"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_FORWARDS = (TaskBlock.FORWARD, TaskBlock.FIRST_FORWARD)
_BACKWARDS = (TaskBlock.BACKWARD, TaskBlock.INPUT_GRADIENT, TaskBlock.LAST_BACKWARD)
_AFTER_ACTIVATION = (TaskBlock.FORWARD, TaskBlock.FORWARD_READY, TaskBlock.JOINT_FORWARD)
_AFTER_GRADIENT = (*_BACKWARDS, TaskBlock.BACKWARD_READY, TaskBlock.JOINT_BACKWARD)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exchange:
    """Communication inside operations, after their compute; arrays of shape ``(num_virtual_stages,)``.

    Parameters
    ----------
    channel : IntArray
        What it goes over.
    forward_time, backward_time : FloatArray
        Part of one forward and one backward [s].
    """

    channel: IntArray
    forward_time: FloatArray
    backward_time: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IterationTraffic:
    """Which channels an iteration communicates over; -1 for none, which takes its time whatever happens elsewhere.

    Parameters
    ----------
    channels : Channels
        The channels and the links they share.
    activation, gradient : IntArray
        Of the send from virtual stage ``i`` to ``i + 1``, and of the gradient back, ``(num_virtual_stages,)``.
    gather, reduce : IntArray
        Of each virtual stage's parameter gather and gradient reduction, ``(num_virtual_stages,)``.
    exchanges : tuple[Exchange, ...]
        Inside operations; those that run jointly with another hide theirs and have none.
    beside : tuple[tuple[int, float], ...]
        Channel and seconds of what is sent from the start of the iteration without anyone waiting for it.
    """

    channels: Channels
    activation: IntArray
    gradient: IntArray
    gather: IntArray
    reduce: IntArray
    exchanges: tuple[Exchange, ...] = ()
    beside: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ContendedIteration:
    """An iteration with contention, and who suffered it.

    Parameters
    ----------
    result : IterationResult
        The iteration; its costs are those without contention, and what operations take longer counts as busy.
    alone_time, taken_time : FloatArray
        Of all communications of each channel: their durations without contention, and with it, the wait for the
        channel included, ``(num_channels,)`` [s].
    num_communications : IntArray
        How many they are, ``(num_channels,)``.
    link_seconds : FloatArray
        How long each class of links was asked for more than it carries, ``(num_classes,)`` [s].
    beside_end : tuple[float, ...]
        When what nobody waited for had been sent [s].
    """

    result: IterationResult
    alone_time: FloatArray
    taken_time: FloatArray
    num_communications: IntArray
    link_seconds: FloatArray
    beside_end: tuple[float, ...]


def contended_iteration(
    costs: IterationCosts, schedule: str, traffic: IterationTraffic
) -> ContendedIteration:
    """Return the times of one iteration whose communications share links.

    Raises
    ------
    SpecError
        As :func:`~meshwright.simcore.training.iteration.simulate_iteration` does.
    """
    structure = iteration_structure(schedule, costs.num_stages, costs.num_chunks, costs.num_micro_batches)
    tasks = _Tasks(structure, structure.durations(costs))
    for channel, seconds in _communications(structure, costs, traffic):
        tasks.split_off(channel, seconds)
    tasks.link(_lag_channels(structure, traffic), structure.lags(costs))
    beside = tasks.append(
        np.full(len(traffic.beside), -1, dtype=np.int64),
        np.array([channel for channel, _ in traffic.beside], dtype=np.int64),
        np.array([seconds for _, seconds in traffic.beside], dtype=np.float64),
    )
    start, begin, end = tasks.run(traffic.channels)
    graph = structure.graph
    result = iteration_result(
        structure,
        costs,
        schedule,
        graph.in_built_order(start[: graph.num_tasks]),
        graph.in_built_order(end[tasks.last]),
    )
    sends = np.flatnonzero(tasks.channel >= 0)
    owner, num_channels = tasks.channel[sends], len(traffic.channels.full_rate)
    alone, taken = np.zeros(num_channels), np.zeros(num_channels)
    np.add.at(alone, owner, tasks.seconds[sends])
    np.add.at(taken, owner, end[sends] - begin[sends])
    return ContendedIteration(
        result=result,
        alone_time=alone,
        taken_time=taken,
        num_communications=np.bincount(owner, minlength=num_channels),
        link_seconds=traffic.channels.contended_seconds(owner, begin[sends], end[sends]),
        beside_end=tuple(end[beside].tolist()),
    )


def slowed_costs(costs: IterationCosts, schedule: str, slowness: FloatArray) -> IterationCosts:
    """Return costs of stages whose compute, not their communication, takes ``slowness`` times as long, ``(num_stages,)``.

    A stage is as slow as its slowest rank.
    """
    structure = iteration_structure(schedule, costs.num_stages, costs.num_chunks, costs.num_micro_batches)
    factor = np.ones(costs.num_stages * costs.num_chunks)
    factor[structure.operations.placement] = slowness[:, np.newaxis]
    forward, backward = costs.forward_communication_time, costs.backward_communication_time
    together = costs.overlapped_time
    return replace(
        costs,
        forward_time=forward + factor * np.maximum(costs.forward_time - forward, 0.0),
        backward_time=backward + factor * np.maximum(costs.backward_time - backward, 0.0),
        weight_gradient_time=factor * costs.weight_gradient_time,
        optimizer_time=slowness * costs.optimizer_time,
        overlapped_time=None if together is None else factor * together,
    )


class _Tasks:
    """The tasks of an iteration and the communications that become tasks of their own."""

    def __init__(self, structure: IterationStructure, durations: FloatArray) -> None:
        graph = structure.graph
        self._graph, self._num_tasks = graph, graph.num_tasks
        self._predecessors = np.full((2, graph.num_tasks), -1, dtype=np.int64)
        self._fixed: FloatArray = durations[graph.task_class]
        self.channel: IntArray = np.full(graph.num_tasks, -1, dtype=np.int64)
        self.seconds: FloatArray = np.zeros(graph.num_tasks)
        # The task that each of the graph's ends with: itself, or the last of its communications.
        self.last: IntArray = np.arange(graph.num_tasks, dtype=np.int64)

    def append(self, before: IntArray, channel: IntArray, seconds: FloatArray) -> IntArray:
        """Add tasks that only communicate, or wait where they have no channel; return their numbers."""
        has_channel = channel >= 0
        numbers = len(self._fixed) + np.arange(len(channel), dtype=np.int64)
        links = np.stack([before, np.full(len(channel), -1, dtype=np.int64)])
        self._predecessors = np.concatenate([self._predecessors, links], axis=1)
        self._fixed = np.concatenate([self._fixed, np.where(has_channel, 0.0, seconds)])
        self.channel = np.concatenate([self.channel, channel])
        self.seconds = np.concatenate([self.seconds, np.where(has_channel, seconds, 0.0)])
        return numbers

    def split_off(self, channel: IntArray, seconds: FloatArray) -> None:
        """Make the end of tasks a communication, ``channel`` and ``seconds`` per class of tasks."""
        task_class = self._graph.task_class
        tasks = np.flatnonzero((channel[task_class] >= 0) & (seconds[task_class] > 0.0))
        length = np.minimum(seconds[task_class[tasks]], self._fixed[tasks])
        self._fixed[tasks] -= length
        is_first = self.channel[tasks] < 0
        own, chained = tasks[is_first], tasks[~is_first]
        self.channel[own], self.seconds[own] = channel[task_class[own]], length[is_first]
        self.last[chained] = self.append(self.last[chained], channel[task_class[chained]], length[~is_first])

    def link(self, channel: IntArray, lags: FloatArray | None) -> None:
        """Let tasks wait for what the graph says, and for data on their way; arguments per class of tasks."""
        graph, count = self._graph, self._num_tasks
        for place, before in enumerate((graph.first_predecessor, graph.second_predecessor)):
            known = np.flatnonzero(before < count)
            self._predecessors[place, known] = self.last[before[known]]
        if lags is None:
            return
        length, second = lags[graph.task_class], self._predecessors[1, :count]
        receiving = np.flatnonzero((length > 0.0) & (second >= 0))
        over = channel[graph.task_class[receiving]]
        self._predecessors[1, receiving] = self.append(second[receiving], over, length[receiving])

    def run(self, channels: Channels) -> FloatArray:
        """Return start, begin of communication and end of all tasks, ``(3, num_tasks)`` [s]."""
        return channels.run(self._predecessors, self._fixed, self.channel, self.seconds)


def _communications(
    structure: IterationStructure, costs: IterationCosts, traffic: IterationTraffic
) -> list[tuple[IntArray, FloatArray]]:
    """Return channel and length of each kind of communication inside tasks, per class of tasks."""
    durations = structure.durations(costs)
    parts = [
        _per_class(
            structure, traffic.gather, durations, (TaskBlock.GATHER_EXPOSED, TaskBlock.GATHER_OVERLAPPED)
        ),
        _per_class(
            structure, traffic.reduce, durations, (TaskBlock.REDUCE_OVERLAPPED, TaskBlock.REDUCE_EXPOSED)
        ),
    ]
    # The last gradient operation of a split backward is a weight gradient, which communicates nothing.
    is_whole = np.full(len(traffic.reduce), not structure.has_split_backward)
    if structure.ends_whole is not None:
        is_whole = structure.ends_whole
    for each in traffic.exchanges:
        parts.append(_per_class(structure, each.channel, each.forward_time, _FORWARDS))
        parts.append(_per_class(structure, each.channel, each.backward_time, _BACKWARDS[:2]))
        parts.append(_per_class(structure, each.channel, is_whole * each.backward_time, _BACKWARDS[2:]))
    if costs.is_send_blocking:
        send = structure.send_time(costs)
        back = np.concatenate([[0.0], send[:-1]])
        gradient = np.roll(traffic.gradient, 1)
        send = np.append(send[:-1], 0.0)
        parts.append(_per_class(structure, traffic.activation, send, _FORWARDS))
        parts.append(_per_class(structure, gradient, back, _BACKWARDS[:2]))
        parts.append(_per_class(structure, gradient, is_whole * back, _BACKWARDS[2:]))
    return parts


def _per_class(
    structure: IterationStructure, channel: IntArray, seconds: FloatArray, blocks: tuple[TaskBlock, ...]
) -> tuple[IntArray, FloatArray]:
    """Return channel and seconds per class of tasks; ``seconds`` is given per virtual stage, or per class already."""
    num_classes, num_virtual = structure.graph.num_classes, len(channel)
    channels, lengths = np.full(num_classes, -1, dtype=np.int64), np.zeros(num_classes)
    for block in blocks:
        if block >= TaskBlock.JOINT_FORWARD and structure.num_joint is None:
            continue
        classes = slice(block * num_virtual, (block + 1) * num_virtual)
        channels[classes] = channel
        lengths[classes] = seconds if len(seconds) == num_virtual else seconds[classes]
    return channels, lengths


def _lag_channels(structure: IterationStructure, traffic: IterationTraffic) -> IntArray:
    """Return what each class of tasks receives its data over."""
    unused = np.zeros(len(traffic.activation))
    activation, _ = _per_class(structure, np.roll(traffic.activation, 1), unused, _AFTER_ACTIVATION)
    gradient, _ = _per_class(structure, traffic.gradient, unused, _AFTER_GRADIENT)
    return np.maximum(activation, gradient)
