"""A static graph of tasks and its longest path: how in-order streams pass time without an event queue.

Every task has at most two predecessors; joins of more are chains of zero-length tasks. By convention the
first one is what ran before it on its stream and the second one is where its data come from. Tasks are
renumbered by level at construction: that keeps predecessors near and makes evaluation memory-bound.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.simcore.compiled import for_kernel, from_kernel, has_compiler, kernel_output
from meshwright.simcore.longest_path import (
    evaluate_lagged_tasks,
    evaluate_tasks,
    finish_lagged_tasks,
    finish_tasks,
    latest_ends,
    renumber_predecessors,
    sort_by_level,
)

__all__ = ["TaskGraph", "TaskTimes", "build_task_graph"]

ScalarT = TypeVar("ScalarT", bound=np.generic)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskTimes:
    """When each task runs, in the numbering of its graph.

    Parameters
    ----------
    start, end : NDArray[np.float64]
        Shape ``(num_tasks,)`` [s].
    """

    start: NDArray[np.float64]
    end: NDArray[np.float64]

    @property
    def makespan(self) -> float:
        """End of the last task [s]; 0.0 without tasks."""
        return float(self.end.max(initial=0.0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskGraph:
    """Tasks in level order; predecessors always have smaller numbers. Made by :func:`build_task_graph`.

    Parameters
    ----------
    first_predecessor, second_predecessor : NDArray[np.int32]
        Shape ``(num_tasks,)``; ``num_tasks`` for none.
    task_class : NDArray[np.int32]
        Class of each task, shape ``(num_tasks,)``: tasks of one class share duration and lag.
    order : NDArray[np.int32]
        The number each task had when the graph was built, shape ``(num_tasks,)``.
    num_classes : int
        Entries that durations and lags must have.
    """

    first_predecessor: NDArray[np.int32]
    second_predecessor: NDArray[np.int32]
    task_class: NDArray[np.int32]
    order: NDArray[np.int32]
    num_classes: int
    _structure: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]] = field(init=False, repr=False)
    _last_tasks: NDArray[np.intp] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Converted once: without a compiler, turning arrays into lists costs as much as the loop.
        arrays = (self.first_predecessor, self.second_predecessor, self.task_class)
        object.__setattr__(self, "_structure", tuple(for_kernel(array) for array in arrays))
        has_successor = np.zeros(self.num_tasks + 1, dtype=np.bool_)
        has_successor[self.first_predecessor] = True
        has_successor[self.second_predecessor] = True
        # No task ends after the last of these, so a makespan need not look at the others.
        object.__setattr__(self, "_last_tasks", np.flatnonzero(~has_successor[:-1]))

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return len(self.order)

    def evaluate(self, durations: NDArray[np.float64], lags: NDArray[np.float64] | None = None) -> TaskTimes:
        """Return start and end of every task when each starts as soon as its predecessors allow.

        Parameters
        ----------
        durations : NDArray[np.float64]
            Duration of each class, shape ``(num_classes,)`` [s]. Without classes, of each task in the
            numbering it was built with.
        lags : NDArray[np.float64] | None
            Time from the end of the second predecessor until its data are there, same shape [s]; for a
            task without one, the earliest start. None: all zero.

        Returns
        -------
        TaskTimes
            In the graph's own numbering; :meth:`in_built_order` restores the other.
        """
        self._check("durations", durations)
        if lags is not None:
            self._check("lags", lags)
        if not has_compiler():
            return self._evaluate_plain(durations, lags)
        start = kernel_output(self.num_tasks, 0.0, np.float64)
        end = kernel_output(self.num_tasks + 1, 0.0, np.float64)
        if lags is None:
            evaluate_tasks(*self._structure, durations, start, end)
        else:
            evaluate_lagged_tasks(*self._structure, durations, lags, start, end)
        return TaskTimes(start=start, end=end[:-1])

    def _evaluate_plain(self, durations: NDArray[np.float64], lags: NDArray[np.float64] | None) -> TaskTimes:
        """Loop over the ends alone and gather the starts from them: the same values, a third faster."""
        finished = from_kernel(self._finish(durations, lags), np.float64)
        data = finished[self.second_predecessor]
        if lags is not None:
            data += lags[self.task_class]
        start = np.maximum(finished[self.first_predecessor], data)
        return TaskTimes(start=start, end=finished[:-1])

    def _finish(
        self, durations: NDArray[np.float64], lags: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        """Return the end of every task and a last 0.0, as the kernel left them."""
        end = kernel_output(self.num_tasks + 1, 0.0, np.float64)
        if lags is None:
            finish_tasks(*self._structure, for_kernel(durations), end)
        else:
            finish_lagged_tasks(*self._structure, for_kernel(durations), for_kernel(lags), end)
        return end

    def makespan(self, durations: NDArray[np.float64], lags: NDArray[np.float64] | None = None) -> float:
        """Return the end of the last task [s], equal bit for bit to that of :meth:`evaluate` but faster."""
        self._check("durations", durations)
        if lags is not None:
            self._check("lags", lags)
        end = self._finish(durations, lags)
        if has_compiler():
            return float(end[self._last_tasks].max(initial=0.0))
        return max((float(end[task]) for task in self._last_tasks.tolist()), default=0.0)

    def slack(
        self, times: TaskTimes, durations: NDArray[np.float64], lags: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """Return how much later each task could end without delaying the makespan, ``(num_tasks,)`` [s]."""
        self._check("durations", durations)
        lags = np.zeros(self.num_classes) if lags is None else lags
        self._check("lags", lags)
        latest = kernel_output(self.num_tasks + 1, times.makespan, np.float64)
        latest_ends(*self._structure, for_kernel(durations), for_kernel(lags), latest)
        return from_kernel(latest, np.float64)[:-1] - times.end

    def critical_path(self, times: TaskTimes, lags: NDArray[np.float64] | None = None) -> NDArray[np.int32]:
        """Return the tasks whose chain makes the makespan, first to last; each has zero slack.

        Every task but the first starts exactly when its predecessor on the path ends, plus the lag where
        that is its second one. On a tie the first (stream) predecessor wins.
        """
        if self.num_tasks == 0:
            return np.empty(0, dtype=np.int32)
        path = [int(times.end.argmax())]
        while True:
            task = path[-1]
            first, second = int(self.first_predecessor[task]), int(self.second_predecessor[task])
            lag = 0.0 if lags is None else float(lags[self.task_class[task]])
            begin = times.start[task]
            if first < self.num_tasks and times.end[first] == begin:
                path.append(first)
            elif second < self.num_tasks and times.end[second] + lag == begin:
                path.append(second)
            else:
                return np.array(path[::-1], dtype=np.int32)

    def in_built_order(self, values: NDArray[ScalarT]) -> NDArray[ScalarT]:
        """Return values of the tasks (first axis) in the numbering the graph was built with."""
        restored = np.empty_like(values)
        restored[self.order] = values
        return restored

    def _check(self, name: str, values: NDArray[np.float64]) -> None:
        # Kernels check no bounds: a short table would be read past its end.
        if values.shape != (self.num_classes,):
            raise SpecError(f"{name} has shape {values.shape}, expected ({self.num_classes},)")
        if values.size and values.min() < 0.0:
            raise SpecError(f"{name} must not be negative")


def build_task_graph(
    first_predecessor: NDArray[np.int32],
    second_predecessor: NDArray[np.int32],
    task_class: NDArray[np.int32] | None = None,
    num_classes: int | None = None,
) -> TaskGraph:
    """Return the graph with its tasks renumbered by level.

    Parameters
    ----------
    first_predecessor, second_predecessor : NDArray[np.int32]
        Predecessors of each task, in any order of tasks, shape ``(num_tasks,)``; -1 for none.
    task_class : NDArray[np.int32] | None
        Class of each task, 0 to ``num_classes - 1``; None makes each task a class of its own.
    num_classes : int | None
        Number of classes; None: as many as ``task_class`` needs.

    Raises
    ------
    SpecError
        If a number is out of range or the tasks wait for each other in a circle.

    Examples
    --------
    >>> import numpy as np
    >>> graph = build_task_graph(np.array([-1, 0, 0], np.int32), np.array([-1, -1, 1], np.int32))
    >>> graph.evaluate(np.array([1.0, 2.0, 4.0])).makespan
    7.0
    """
    num_tasks = len(first_predecessor)
    if task_class is None:
        task_class, num_classes = np.arange(num_tasks, dtype=np.int32), num_tasks
    if num_classes is None:
        num_classes = int(task_class.max(initial=-1)) + 1
    _require_range("task_class", task_class, num_tasks, 0, num_classes)
    for name, values in (
        ("first_predecessor", first_predecessor),
        ("second_predecessor", second_predecessor),
    ):
        _require_range(name, values, num_tasks, -1, num_tasks)
    first, second = for_kernel(first_predecessor), for_kernel(second_predecessor)
    order = kernel_output(num_tasks, -1, np.int32)
    num_ordered = sort_by_level(
        first,
        second,
        kernel_output(num_tasks, 0, np.int32),
        kernel_output(num_tasks, -1, np.int32),
        kernel_output(2 * num_tasks, -1, np.int32),
        order,
    )
    if num_ordered < num_tasks:
        raise SpecError(f"{num_tasks - num_ordered} of {num_tasks} tasks wait for each other in a circle")
    new_first = kernel_output(num_tasks, -1, np.int32)
    new_second = kernel_output(num_tasks, -1, np.int32)
    position = kernel_output(num_tasks + 1, num_tasks, np.int32)
    renumber_predecessors(first, second, order, position, new_first, new_second)
    order = from_kernel(order, np.int32)
    return TaskGraph(
        first_predecessor=from_kernel(new_first, np.int32),
        second_predecessor=from_kernel(new_second, np.int32),
        task_class=task_class[order],
        order=order,
        num_classes=num_classes,
    )


def _require_range(name: str, values: NDArray[np.int32], size: int, low: int, high: int) -> None:
    if values.shape != (size,) or values.dtype != np.int32:
        raise SpecError(f"{name} must be int32 of shape ({size},), not {values.dtype} of {values.shape}")
    if size and not (low <= int(values.min()) and int(values.max()) < high):
        raise SpecError(f"{name} must lie in {low}..{high - 1}, not {values.min()}..{values.max()}")
