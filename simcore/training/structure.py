"""The task graph of one iteration: its structure, which many plans share, and its durations, which they do not.

Each stage has a compute stream, which runs its operations in the schedule's order and then the optimizer,
and a communication stream, which gathers the parameters and reduces the gradients of its chunks, one after
the other. A task has two predecessors at most, so zero-length tasks stand where more meet:

- first forward of a virtual stage: ``ready`` (stream, activation) -> forward (also after the gather's
  exposed part) -> ``done`` (also after the gather's overlapped part);
- last backward of a virtual stage: ``ready`` (stream, gradient) -> backward; the overlapped part of the
  reduction starts with ``ready``, the rest after the backward.

A forward that runs jointly with the backward after it is a zero-length task too: it waits for the activation,
the backward for it and for the gradient, and both outputs exist when the backward, as long as the pair, ends.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError, did_you_mean
from meshwright.simcore.schedules import BACKWARD, SCHEDULES, WEIGHT_GRADIENT, StageOperations
from meshwright.simcore.task_graph import TaskGraph, build_task_graph
from meshwright.simcore.training.costs import IterationCosts
from meshwright.simcore.training.operation_links import linked_operations

__all__ = ["IterationStructure", "TaskBlock", "iteration_structure", "joint_time"]

# Structures kept: 128 of up to 2**15 operations, 4 of up to 2**20; about 35 bytes per operation each.
_SMALL, _LARGE = 2**15, 2**20


class TaskBlock(IntEnum):
    """Blocks of task classes, in units of the number of virtual stages; the first four are operation kinds."""

    FORWARD = 0
    BACKWARD = 1
    INPUT_GRADIENT = 2
    WEIGHT_GRADIENT = 3
    FIRST_FORWARD = 4
    LAST_BACKWARD = 5
    FORWARD_READY = 6
    BACKWARD_READY = 7
    GATHER_EXPOSED = 8
    GATHER_OVERLAPPED = 9
    REDUCE_OVERLAPPED = 10
    REDUCE_EXPOSED = 11
    JOINT_FORWARD = 12
    JOINT_BACKWARD = 13


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IterationStructure:
    """Everything about an iteration that does not depend on how long things take.

    Arrays of task numbers are in the numbering the graph was built with, where the operations come first,
    stage by stage. "Per virtual stage" is shape ``(num_stages * num_chunks,)``.

    Parameters
    ----------
    operations : StageOperations
        What each compute stream runs, in order.
    graph : TaskGraph
        The tasks; classes as :meth:`durations` and :meth:`lags` fill them.
    peak_in_flight : NDArray[np.int64]
        Most live activations of each stage, in micro-batches on one chunk, shape ``(num_stages,)``.
    has_split_backward : bool
        Weight gradients are operations of their own.
    ends_whole : NDArray[np.bool_] | None
        The last gradient operation is a whole backward although others are split, per virtual stage; None
        where that holds for none.
    num_joint : NDArray[np.int64] | None
        Backwards that run jointly with a forward, per virtual stage; None where no operations do.
    first_forward, last_backward : NDArray[np.int32]
        Task of the first forward and the last gradient operation, per virtual stage.
    forward_ready, forward_done, backward_ready : NDArray[np.int32]
        The zero-length tasks around them, per virtual stage.
    gather_exposed, gather_overlapped, reduce_overlapped, reduce_exposed : NDArray[np.int32]
        Communication tasks, per virtual stage.
    optimizer : NDArray[np.int32]
        Optimizer step, shape ``(num_stages,)``.
    """

    operations: StageOperations
    graph: TaskGraph
    peak_in_flight: NDArray[np.int64]
    has_split_backward: bool
    ends_whole: NDArray[np.bool_] | None
    num_joint: NDArray[np.int64] | None
    first_forward: NDArray[np.int32]
    last_backward: NDArray[np.int32]
    forward_ready: NDArray[np.int32]
    forward_done: NDArray[np.int32]
    backward_ready: NDArray[np.int32]
    gather_exposed: NDArray[np.int32]
    gather_overlapped: NDArray[np.int32]
    reduce_overlapped: NDArray[np.int32]
    reduce_exposed: NDArray[np.int32]
    optimizer: NDArray[np.int32]

    def durations(self, costs: IterationCosts) -> NDArray[np.float64]:
        """Return the duration of each task class [s].

        Raises
        ------
        SpecError
            If an overlap is no share, or a weight gradient longer than its backward is to be split off.
        """
        for name in ("gradient_reduce_overlap", "parameter_gather_overlap"):
            if not 0.0 <= getattr(costs, name) <= 1.0:
                raise SpecError(f"{name} must lie in 0..1, not {getattr(costs, name)}")
        forward = costs.forward_time.copy()
        whole = costs.backward_time - costs.weight_gradient_time
        # Schedules that do not split their backward leave this class unused.
        input_gradient = whole if self.has_split_backward else np.maximum(whole, 0.0)
        if self.has_split_backward and input_gradient.min() < 0:
            raise SpecError("weight_gradient_time exceeds backward_time, of which it is a part")
        backward = costs.backward_time.copy()
        if costs.is_send_blocking:
            send = self.send_time(costs)
            for sending in (backward, input_gradient):
                sending[1:] += send[:-1]
            forward[:-1] += send[:-1]
        last = costs.weight_gradient_time if self.has_split_backward else backward
        if self.ends_whole is not None:
            last = np.where(self.ends_whole, backward, last)
        zero = np.zeros_like(forward)
        gather, gather_share = costs.parameter_gather_time, costs.parameter_gather_overlap
        reduce, reduce_share = costs.gradient_reduce_time, costs.gradient_reduce_overlap
        blocks = [
            forward,
            backward,
            input_gradient,
            costs.weight_gradient_time,
            forward,
            last,
            zero,
            zero,
            gather * (1.0 - gather_share),
            gather * gather_share,
            reduce * reduce_share,
            reduce * (1.0 - reduce_share),
        ]
        if self.num_joint is not None:
            joint = joint_time(costs).copy()
            if costs.is_send_blocking:
                # The pair ends with both of its sends.
                joint[1:] += send[:-1]
                joint[1:] += send[:-1][::-1]
            blocks += [zero, joint]
        return np.concatenate([*blocks, np.zeros(costs.num_stages), costs.optimizer_time, np.zeros(1)])

    def send_time(self, costs: IterationCosts) -> NDArray[np.float64]:
        """Return the time of each send, zero from one copy of the model to the next, per virtual stage [s]."""
        copies = self.operations.num_model_copies
        if copies == 1:
            return costs.send_time
        send = costs.send_time.copy()
        send.reshape(copies, -1)[:, -1] = 0.0
        return send

    def lags(
        self, costs: IterationCosts, release: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64] | None:
        """Return the time from a producer's end to its consumer, per task class [s]; None where all are zero.

        ``release`` holds back the streams of each stage, shape ``(num_stages,)`` [s].
        """
        if release is None and (costs.is_send_blocking or not costs.send_time.any()):
            return None
        zero = np.zeros(len(costs.send_time))
        to_next, from_next = zero.copy(), zero.copy()
        if not costs.is_send_blocking:
            to_next[1:] = from_next[:-1] = self.send_time(costs)[:-1]
        last = zero if self.has_split_backward else from_next
        if self.ends_whole is not None:
            last = np.where(self.ends_whole, from_next, last)
        blocks = [to_next, from_next, from_next, zero, zero, zero, to_next, last, zero, zero, zero, zero]
        if self.num_joint is not None:
            blocks += [to_next, from_next]
        begin = np.zeros(costs.num_stages) if release is None else release
        return np.concatenate([*blocks, begin, np.zeros(costs.num_stages + 1)])


def joint_time(costs: IterationCosts) -> NDArray[np.float64]:
    """Return how long each backward and the forward it may run jointly with take, per virtual stage [s]."""
    if costs.overlapped_time is not None:
        return costs.overlapped_time
    return costs.backward_time + costs.forward_time[::-1]


def iteration_structure(
    schedule: str, num_stages: int, num_chunks: int, num_micro_batches: int
) -> IterationStructure:
    """Return the structure of an iteration; recently used ones are kept.

    Raises
    ------
    SpecError
        If the schedule is unknown or does not exist for these numbers.
    """
    if schedule not in SCHEDULES:
        raise SpecError(
            f"schedule '{schedule}' cannot be simulated{did_you_mean(schedule, SCHEDULES) or '.'} "
            f"Known: {', '.join(SCHEDULES)}."
        )
    size = 2 * num_stages * num_chunks * num_micro_batches
    build = _small if size <= _SMALL else _large if size <= _LARGE else _build
    return build(schedule, num_stages, num_chunks, num_micro_batches)


def _build(schedule: str, num_stages: int, num_chunks: int, num_micro_batches: int) -> IterationStructure:
    operations = SCHEDULES[schedule].operations(num_stages, num_chunks, num_micro_batches)
    placement, num_virtual = operations.placement, num_stages * num_chunks
    num_blocks = TaskBlock.JOINT_FORWARD if operations.is_overlapped is None else TaskBlock.JOINT_FORWARD + 2
    tail = int(num_blocks) * num_virtual
    num_operations = num_stages * operations.num_operations
    extra = num_operations + np.arange(2 * num_stages + 7 * num_virtual, dtype=np.int32)
    begin, optimizer = extra[:num_stages], extra[num_stages : 2 * num_stages]
    blocks = extra[2 * num_stages :].reshape(7, num_virtual)
    ready, done, backward_ready, exposed, overlapped, reduce_overlapped, reduce_exposed = blocks

    first, second, task_class, first_forward, last_backward = linked_operations(
        operations, done, len(extra), int(TaskBlock.JOINT_FORWARD), tail + 2 * num_stages
    )
    first[first_forward + 1] = done
    for block, task, guard in (
        (TaskBlock.FIRST_FORWARD, first_forward, ready),
        (TaskBlock.LAST_BACKWARD, last_backward, backward_ready),
    ):
        first[guard], second[guard] = first[task], second[task]
        first[task], second[task] = guard, -1
        task_class[task] = block * num_virtual + np.arange(num_virtual)
    second[first_forward] = exposed
    first[done], second[done] = first_forward, overlapped
    first[overlapped] = exposed
    second[reduce_overlapped] = backward_ready
    first[reduce_exposed], second[reduce_exposed] = reduce_overlapped, last_backward
    _link_communication(first, begin, first_forward, last_backward, blocks, placement)
    first[optimizer] = np.arange(1, num_stages + 1) * operations.num_operations - 1
    last_chunk = last_backward[placement].argmax(axis=1)
    second[optimizer] = reduce_exposed[placement[np.arange(num_stages), last_chunk]]

    _set_classes(task_class, tail, begin, optimizer, blocks)
    has_split_backward = bool((operations.kind == WEIGHT_GRADIENT).any())
    ends_whole = operations.kind.ravel()[last_backward] == BACKWARD
    return IterationStructure(
        operations=operations,
        graph=build_task_graph(first, second, task_class, tail + 2 * num_stages + 1),
        peak_in_flight=operations.peak_in_flight(),
        has_split_backward=has_split_backward,
        ends_whole=ends_whole if has_split_backward and ends_whole.any() else None,
        num_joint=_count_joint(operations),
        first_forward=first_forward,
        last_backward=last_backward,
        forward_ready=ready,
        forward_done=done,
        backward_ready=backward_ready,
        gather_exposed=exposed,
        gather_overlapped=overlapped,
        reduce_overlapped=reduce_overlapped,
        reduce_exposed=reduce_exposed,
        optimizer=optimizer,
    )


_small = functools.lru_cache(maxsize=128)(_build)
_large = functools.lru_cache(maxsize=4)(_build)


def _count_joint(operations: StageOperations) -> NDArray[np.int64] | None:
    if operations.is_overlapped is None:
        return None
    stage, place = np.nonzero(operations.is_overlapped & (operations.kind == BACKWARD))
    virtual = operations.placement[stage, operations.chunk[stage, place]]
    return np.bincount(virtual, minlength=operations.placement.size)


def _set_classes(
    task_class: NDArray[np.int32],
    tail: int,
    begin: NDArray[np.int32],
    optimizer: NDArray[np.int32],
    blocks: NDArray[np.int32],
) -> None:
    """Write the classes of the tasks that are no operations."""
    ready, done, backward_ready, exposed, overlapped, reduce_overlapped, reduce_exposed = blocks
    num_stages, num_virtual = len(begin), len(ready)
    task_class[begin] = tail + np.arange(num_stages)
    task_class[optimizer] = tail + num_stages + np.arange(num_stages)
    task_class[done] = tail + 2 * num_stages
    for block, tasks in (
        (TaskBlock.FORWARD_READY, ready),
        (TaskBlock.BACKWARD_READY, backward_ready),
        (TaskBlock.GATHER_EXPOSED, exposed),
        (TaskBlock.GATHER_OVERLAPPED, overlapped),
        (TaskBlock.REDUCE_OVERLAPPED, reduce_overlapped),
        (TaskBlock.REDUCE_EXPOSED, reduce_exposed),
    ):
        task_class[tasks] = block * num_virtual + np.arange(num_virtual)


def _link_communication(
    first: NDArray[np.int32],
    begin: NDArray[np.int32],
    first_forward: NDArray[np.int32],
    last_backward: NDArray[np.int32],
    blocks: NDArray[np.int32],
    placement: NDArray[np.int32],
) -> None:
    """Chain each stage's gathers, then its reductions, in the order in which its chunks need them."""
    _, _, _, exposed, overlapped, reduce_overlapped, reduce_exposed = blocks
    for stage, virtual in enumerate(placement):
        gathers = virtual[np.argsort(first_forward[virtual])]
        reductions = virtual[np.argsort(last_backward[virtual])]
        first[exposed[gathers[0]]] = begin[stage]
        first[exposed[gathers[1:]]] = overlapped[gathers[:-1]]
        first[reduce_overlapped[reductions[0]]] = overlapped[gathers[-1]]
        first[reduce_overlapped[reductions[1:]]] = reduce_exposed[reductions[:-1]]
