"""Data parallel replicas of one iteration: pipelines of their own speed that meet where gradients are reduced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.batched_longest_path import critical_excess, finish_replicas
from meshwright.simcore.compiled import for_kernel, kernel_output
from meshwright.simcore.training.costs import IterationCosts
from meshwright.simcore.training.structure import IterationStructure, iteration_structure

__all__ = ["ReplicaGraph", "ReplicaTimes"]

# Operation factors asked for at a time: what stays in a core's cache.
_BLOCK = 2**16
# What rounding leaves of an operation's excess is far below this share of the iteration.
_NO_EXCESS = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaTimes:
    """One iteration of all replicas.

    Parameters
    ----------
    iteration_time : float
        End of the slowest stage of the slowest replica plus the costs' fixed time [s].
    replica_time : float
        Mean over replicas of the iteration each would have run alone, waiting for no other replica [s].
    critical_replica, critical_stage : int
        Replica the critical path begins in, and stage whose slow operations lengthen that path most; both
        -1 where nothing on the path was slow.
    """

    iteration_time: float
    replica_time: float
    critical_replica: int
    critical_stage: int


class ReplicaGraph:
    """The task graph of an iteration, evaluated for all replicas at once; its buffers serve every call.

    A reduction that takes time begins in all replicas when the last one is ready; one that takes none is no
    meeting. Memory is ``8 B * tasks * num_replicas``, with about one task per operation.

    Parameters
    ----------
    costs : IterationCosts
        Durations at full speed. What its communication arrays name, gathers, reductions and sends keep theirs.
    schedule : str
        A key of :data:`meshwright.simcore.schedules.SCHEDULES`.
    num_replicas : int
        Replicas, at least 1.
    """

    def __init__(self, costs: IterationCosts, schedule: str, num_replicas: int) -> None:
        structure = iteration_structure(schedule, costs.num_stages, costs.num_chunks, costs.num_micro_batches)
        graph = structure.graph
        durations = structure.durations(costs)
        computes = _compute_durations(structure, costs, durations)
        lags = structure.lags(costs)
        is_computing = computes[graph.task_class] > 0.0
        stage, is_last, meets = _task_roles(structure, costs)
        assert (stage[is_computing] >= 0).all(), "a task computes on no stage"
        self._fixed_time, self._num_stages, self._num_replicas = (
            costs.fixed_time,
            costs.num_stages,
            num_replicas,
        )
        self._first, self._second = for_kernel(graph.first_predecessor), for_kernel(graph.second_predecessor)
        self._class, self._stage = for_kernel(graph.task_class), for_kernel(stage)
        self._durations, self._computes = for_kernel(durations), for_kernel(computes)
        self._lags = for_kernel(np.zeros_like(durations) if lags is None else lags)
        self._meets, self._meets_nobody = for_kernel(meets), for_kernel(np.zeros_like(meets))
        self._blocks = _blocks(np.flatnonzero(~is_last), is_computing, max(1, _BLOCK // num_replicas))
        self._last_block = for_kernel(np.flatnonzero(is_last)), int(is_computing[is_last].sum())
        self._sinks = _sinks(graph.first_predecessor, graph.second_predecessor)
        self._end = kernel_output((graph.num_tasks + 1) * num_replicas, 0.0, np.float64)

    @property
    def max_rows(self) -> int:
        """The most operations that factors are asked for at a time."""
        return max(rows for _, rows in (*self._blocks, self._last_block))

    def run(self, slowness: NDArray[np.float64], draw: Callable[[int], NDArray[np.float64]]) -> ReplicaTimes:
        """Return the times of one iteration.

        Parameters
        ----------
        slowness : NDArray[np.float64]
            Factor of the computing part of all operations, shape ``(num_stages, num_replicas)``.
        draw : Callable[[int], NDArray[np.float64]]
            Called with a number of operations, returns the further factor of each in each replica, shape
            ``(number, num_replicas)``; the array may be reused by the next call.
        """
        flat = for_kernel(slowness.ravel())
        for tasks, rows in self._blocks:
            self._finish(tasks, self._meets_nobody, flat, draw(rows))
        tasks, rows = self._last_block
        noise = draw(rows)
        self._finish(tasks, self._meets_nobody, flat, noise)
        alone = self._sink_ends().max(axis=0)
        self._finish(tasks, self._meets, flat, noise)
        ends = self._sink_ends()
        makespan = float(ends.max())
        replica, stage = self._straggler(int(ends.argmax()), makespan)
        return ReplicaTimes(
            iteration_time=makespan + self._fixed_time,
            # Summed as differences, so that equal replicas have exactly their own time.
            replica_time=float(alone.min() + (alone - alone.min()).mean()) + self._fixed_time,
            critical_replica=replica,
            critical_stage=stage,
        )

    def _finish(
        self,
        tasks: NDArray[np.int64],
        meets: NDArray[np.bool_],
        slowness: NDArray[np.float64],
        noise: NDArray[np.float64],
    ) -> None:
        finish_replicas(
            tasks,
            self._first,
            self._second,
            self._class,
            self._stage,
            meets,
            self._durations,
            self._computes,
            self._lags,
            slowness,
            for_kernel(noise.ravel()),
            self._num_replicas,
            self._end,
        )

    def _sink_ends(self) -> NDArray[np.float64]:
        """Return the ends of the tasks that nothing follows, shape ``(num_sinks, num_replicas)`` [s]."""
        count = self._num_replicas
        return np.array([self._end[task * count : (task + 1) * count] for task in self._sinks.tolist()])

    def _straggler(self, entry: int, makespan: float) -> tuple[int, int]:
        """Return replica and stage to blame for the path that ends at an entry of :meth:`_sink_ends`."""
        sink, replica = divmod(entry, self._num_replicas)
        excess = np.zeros(self._num_stages)
        begin = critical_excess(
            int(self._sinks[sink]),
            replica,
            self._first,
            self._second,
            self._class,
            self._stage,
            self._meets,
            self._durations,
            self._computes,
            self._lags,
            self._num_replicas,
            self._end,
            excess,
        )
        if excess.max() <= _NO_EXCESS * makespan:
            return -1, -1
        return int(begin), int(excess.argmax())


def _compute_durations(
    structure: IterationStructure, costs: IterationCosts, durations: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the computing part of each class: what is left without communication [s]."""
    overlapped = costs.overlapped_time
    if overlapped is not None:
        # A joint forward and backward hide each other's communication first; what they cannot stays.
        inside = costs.backward_communication_time + costs.forward_communication_time[::-1]
        saved = costs.backward_time + costs.forward_time[::-1] - overlapped
        overlapped = inside - np.clip(saved, 0.0, inside)
    communication = replace(
        costs,
        forward_time=costs.forward_communication_time,
        backward_time=costs.backward_communication_time,
        weight_gradient_time=np.zeros_like(costs.weight_gradient_time),
        optimizer_time=np.zeros_like(costs.optimizer_time),
        overlapped_time=overlapped,
    )
    computes: NDArray[np.float64] = np.maximum(durations - structure.durations(communication), 0.0)
    return computes


def _task_roles(
    structure: IterationStructure, costs: IterationCosts
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return each task's compute stage or -1, whether it follows all operations, and whether replicas meet."""
    graph, operations = structure.graph, structure.operations
    stage = np.full(graph.num_tasks, -1, dtype=np.int64)
    stage[: operations.kind.size] = np.repeat(np.arange(costs.num_stages), operations.num_operations)
    stage[structure.optimizer] = np.arange(costs.num_stages)
    reductions = np.stack([structure.reduce_overlapped, structure.reduce_exposed])
    is_last = np.zeros(graph.num_tasks, dtype=np.bool_)
    is_last[structure.optimizer] = True
    is_last[reductions] = True
    meets = np.zeros(graph.num_tasks, dtype=np.bool_)
    meets[reductions[:, costs.gradient_reduce_time > 0.0]] = True
    return stage[graph.order], is_last[graph.order], meets[graph.order]


def _blocks(
    tasks: NDArray[np.intp], is_computing: NDArray[np.bool_], num_rows: int
) -> list[tuple[NDArray[np.intp], int]]:
    """Cut tasks into runs of at most ``num_rows`` that compute; return each with how many do."""
    cuts = np.flatnonzero(is_computing[tasks])[num_rows::num_rows]
    return [(for_kernel(block), int(is_computing[block].sum())) for block in np.split(tasks, cuts)]


def _sinks(first: NDArray[np.int32], second: NDArray[np.int32]) -> NDArray[np.intp]:
    """Return the tasks that nothing follows: one of them ends last."""
    is_followed = np.zeros(len(first) + 1, dtype=np.bool_)
    is_followed[first] = True
    is_followed[second] = True
    return np.flatnonzero(~is_followed[:-1])
