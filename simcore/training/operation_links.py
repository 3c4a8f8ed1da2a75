"""How the operations of a pipeline depend on each other, as predecessors in a task graph."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.compiled import compiled, for_kernel, from_kernel, kernel_output
from meshwright.simcore.schedules import NO_OPERATION, StageOperations

__all__ = ["link_operations", "linked_operations"]


def linked_operations(
    operations: StageOperations, done: NDArray[np.int32], num_extra: int, joint_block: int, zero_class: int
) -> tuple[NDArray[np.int32], ...]:
    """Return how the operations of an iteration depend on each other.

    Parameters
    ----------
    operations : StageOperations
        What each stage runs.
    done : NDArray[np.int32]
        The task that stands for the end of each virtual stage's first forward, shape ``(num_virtual,)``.
    num_extra : int
        Tasks besides the operations; the first of them, one per stage, begin the stages' streams.
    joint_block : int
        Block of classes of forwards that run jointly with the backward after them; the next is the backwards'.
    zero_class : int
        Class of what takes no time.

    Returns
    -------
    tuple[NDArray[np.int32], ...]
        First and second predecessor and class of each task, those of the extra tasks still empty; first
        forward and last gradient operation of each virtual stage.
    """
    num_virtual = operations.placement.size
    num_tasks = operations.kind.size + num_extra
    # A joint pair starts when both inputs are there and ends as one: its forward takes no time and its
    # backward takes that of the pair, after which both outputs exist.
    code = operations.kind
    if operations.is_overlapped is not None:
        code = np.where(operations.is_overlapped, code + np.int8(NO_OPERATION + 1), code)
    num_micro_batches = int(operations.micro_batch[0].max()) + 1
    first = kernel_output(num_tasks, -1, np.int32)
    second = kernel_output(num_tasks, -1, np.int32)
    task_class = kernel_output(num_tasks, 0, np.int32)
    first_forward = kernel_output(num_virtual, -1, np.int32)
    last_backward = kernel_output(num_virtual, -1, np.int32)
    link_operations(
        for_kernel(code.ravel()),
        for_kernel(operations.micro_batch.ravel()),
        for_kernel(operations.chunk.ravel()),
        for_kernel(operations.placement.ravel()),
        operations.num_stages,
        joint_block,
        zero_class,
        for_kernel(done),
        kernel_output(num_virtual * num_micro_batches, -1, np.int32),
        kernel_output(num_virtual * num_micro_batches, -1, np.int32),
        first,
        second,
        task_class,
        first_forward,
        last_backward,
    )
    return tuple(
        from_kernel(values, np.int32) for values in (first, second, task_class, first_forward, last_backward)
    )


@compiled
def link_operations(
    kind: NDArray[np.int8],
    micro_batch: NDArray[np.int32],
    chunk: NDArray[np.int32],
    placement: NDArray[np.int32],
    num_stages: int,
    joint_block: int,
    zero_class: int,
    done: NDArray[np.int32],
    forward_task: NDArray[np.int32],
    backward_task: NDArray[np.int32],
    first: NDArray[np.int32],
    second: NDArray[np.int32],
    task_class: NDArray[np.int32],
    first_forward: NDArray[np.int32],
    last_backward: NDArray[np.int32],
) -> None:
    """Write who precedes each operation, its class, and each virtual stage's first forward and last gradient.

    ``forward_task`` and ``backward_task`` (per virtual stage and micro-batch) are scratch: the task after
    which the activation and the gradient exist. Kinds are written out because kernels see only arguments; 5 and 6 are
    the forward and the backward of a joint pair.
    """
    num_operations = len(kind) // num_stages
    num_chunks = len(placement) // num_stages
    num_virtual = len(first_forward)
    num_micro_batches = len(forward_task) // num_virtual
    for stage in range(num_stages):
        for task in range(stage * num_operations, (stage + 1) * num_operations):
            what = kind[task]
            if what == 4:
                continue
            virtual = placement[stage * num_chunks + chunk[task]]
            place = virtual * num_micro_batches + micro_batch[task]
            if what == 0:
                forward_task[place] = task
                if first_forward[virtual] < 0:
                    first_forward[virtual] = task
                    forward_task[place] = done[virtual]
            elif what == 5:
                forward_task[place] = task + 1
            elif what != 3:
                backward_task[place] = task
            if what in (1, 3, 6):
                last_backward[virtual] = task
    for stage in range(num_stages):
        for task in range(stage * num_operations, (stage + 1) * num_operations):
            what = kind[task]
            first[task] = task - 1
            if what == 4:
                task_class[task] = zero_class
                continue
            virtual = placement[stage * num_chunks + chunk[task]]
            place = virtual * num_micro_batches + micro_batch[task]
            # The first virtual stage of another copy of the model finds -1 here: its micro-batches pass no
            # virtual stage before it.
            if what in (0, 5) and virtual > 0:
                second[task] = forward_task[place - num_micro_batches]
            elif what in (1, 2, 6) and virtual < num_virtual - 1:
                second[task] = backward_task[place + num_micro_batches]
            block = what if what < 4 else joint_block + what - 5
            task_class[task] = block * num_virtual + virtual
        first[stage * num_operations] = len(kind) + stage
