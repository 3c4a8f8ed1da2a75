"""What ZB-H1 and ZB-H2 share: backwards split into input and weight gradients, the latter put off."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.schedules.base import (
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    StageOperations,
    operations_from_positions,
)

__all__ = ["split_backward_operations"]


def split_backward_operations(
    warm_up: NDArray[np.int64], delay: NDArray[np.int64], num_micro_batches: int
) -> StageOperations:
    """Return ``warm_up`` forwards, then rounds of input gradient, weight gradient and forward.

    The weight gradient of a round is that of the micro-batch ``delay`` rounds back; those left run last.
    A stage never keeps more than ``warm_up + delay`` micro-batches.

    Parameters
    ----------
    warm_up : NDArray[np.int64]
        Forwards before the first input gradient, at least 1, shape ``(num_stages,)``.
    delay : NDArray[np.int64]
        Rounds by which weight gradients are put off, same shape.
    num_micro_batches : int
        Micro-batches.
    """
    index = np.arange(num_micro_batches)
    before, late = warm_up[:, np.newaxis], delay[:, np.newaxis]
    # Operations of the two other kinds that precede the i-th of each kind.
    rounds_before_forward = np.maximum(index - before + 1, 0)
    forward = index + rounds_before_forward + np.maximum(rounds_before_forward - late, 0)
    input_gradient = index + np.minimum(index + before, num_micro_batches) + np.maximum(index - late, 0)
    weight_gradient = (
        index
        + np.minimum(index + late + 1, num_micro_batches)
        + np.minimum(index + late + before, num_micro_batches)
    )
    micro_batch = index.astype(np.int32)
    chunk = np.zeros(num_micro_batches, dtype=np.int32)
    return operations_from_positions(
        [
            (FORWARD, forward, micro_batch, chunk),
            (INPUT_GRADIENT, input_gradient, micro_batch, chunk),
            (WEIGHT_GRADIENT, weight_gradient, micro_batch, chunk),
        ]
    )
