"""What DualPipe and DualPipeV share: every device runs one chunk towards a turn and one back from it.

At the turn the two halves of DualPipe's ring mirror each other, and DualPipeV folds; seen from one device both
are the same, so the order of operations depends only on how far the device is from the turn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.schedules.base import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    NO_OPERATION,
    WEIGHT_GRADIENT,
    StageOperations,
)
from meshwright.simcore.schedules.placement import v_placement

__all__ = ["bidirectional_operations"]


def bidirectional_operations(
    way_to_turn: NDArray[np.int64],
    is_mirrored: NDArray[np.bool_],
    first_micro_batch: tuple[int, int],
    num_passes: int,
    num_model_copies: int,
) -> StageOperations:
    """Return the operations of every stage in the order of DualPipe's steps 1 to 8 [DeepSeek 2025, dualpipe.py].

    Parameters
    ----------
    way_to_turn : NDArray[np.int64]
        Stages between each stage and the turn, shape ``(num_stages,)``.
    is_mirrored : NDArray[np.bool_]
        Stages whose chunk 1 is the one on the way to the turn, same shape.
    first_micro_batch : tuple[int, int]
        First micro-batch that passes chunk 0, and chunk 1.
    num_passes : int
        Micro-batches that pass each chunk.
    num_model_copies : int
        Copies of the model.
    """
    num_stages = len(way_to_turn)
    num_devices = int(way_to_turn.max()) + 1
    # The stage at the turn runs fewest weight gradients on their own.
    num_operations = 4 * num_passes + num_devices + int(way_to_turn.max())
    kind = np.full((num_stages, num_operations), NO_OPERATION, dtype=np.int8)
    micro_batch, chunk = (np.zeros(kind.shape, dtype=np.int32) for _ in range(2))
    is_overlapped = np.zeros(kind.shape, dtype=np.bool_)
    for stage in range(num_stages):
        way = int(way_to_turn[stage])
        order = np.array(_device_order(way, num_devices - way, num_passes), dtype=np.int64)
        kinds, chunks = order // 4, order // 2 % 2 ^ int(is_mirrored[stage])
        batches = np.zeros(len(order), dtype=np.int64)
        for each in (0, 1):
            passes = first_micro_batch[each] + np.arange(num_passes)
            batches[(kinds == FORWARD) & (chunks == each)] = passes
            batches[((kinds == BACKWARD) | (kinds == INPUT_GRADIENT)) & (chunks == each)] = passes
        put_off, made_up = kinds == INPUT_GRADIENT, kinds == WEIGHT_GRADIENT
        batches[made_up], chunks[made_up] = batches[put_off], chunks[put_off]
        row = stage, slice(len(order))
        kind[row], micro_batch[row], chunk[row], is_overlapped[row] = kinds, batches, chunks, order % 2
    return StageOperations(
        kind=kind,
        micro_batch=micro_batch,
        chunk=chunk,
        placement=v_placement(num_stages),
        num_model_copies=num_model_copies,
        is_overlapped=is_overlapped,
    )


def _code(kind: int, chunk: int, is_overlapped: bool = False) -> int:
    return 4 * kind + 2 * chunk + is_overlapped


def _device_order(way: int, rest: int, num_passes: int) -> list[int]:
    """Return the codes of one device's operations; chunk 0 is the one on the way to the turn.

    ``way`` devices lie between this one and the turn, ``rest`` on the other side, itself included.
    """
    towards, back = _code(FORWARD, 0), _code(FORWARD, 1)
    gradient_back, gradient_towards = _code(BACKWARD, 1), _code(BACKWARD, 0)
    split_back, split_towards = _code(INPUT_GRADIENT, 1), _code(INPUT_GRADIENT, 0)
    weight = _code(WEIGHT_GRADIENT, 0)
    joint = [_code(FORWARD, 0, True), _code(BACKWARD, 1, True)]
    returning_joint = [_code(FORWARD, 1, True), _code(BACKWARD, 0, True)]

    fill = [towards] * (2 * way) + [towards, back] * rest + [split_back, weight, back] * way
    steady = (joint + returning_joint) * (num_passes - 2 * way - rest)
    if way == 0:
        # At the turn the first pair is not run jointly: its gradient would wait for the forward.
        steady[:2] = [towards, gradient_back]
    drain = [gradient_back, *returning_joint] * way
    whole = ([gradient_back, gradient_towards] * rest)[:rest]
    split = ([split_back, split_towards] * rest)[rest:]
    return fill + steady + drain + whole + split + [weight, split_towards] * way + [weight] * rest
