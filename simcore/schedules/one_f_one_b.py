"""1F1B: after a warm-up as long as the way to the last stage, forwards and backwards alternate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.schedules.base import (
    BACKWARD,
    FORWARD,
    StageOperations,
    operations_from_positions,
    require_single_chunk,
    require_sizes,
)
from meshwright.simcore.schedules.placement import looping_placement

__all__ = ["OneForwardOneBackward", "alternating_operations"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OneForwardOneBackward:
    """PipeDream-flush, Megatron's default [Narayanan 2021, section 2.2]: bubble ``(p - 1)(F + B)``."""

    name: str = "1f1b"
    num_model_copies: int = 1

    def check(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> None:
        """Raise SpecError unless there is one chunk per stage."""
        require_sizes(num_stages, num_chunks, num_micro_batches)
        require_single_chunk(self.name, num_chunks)

    def placement(self, num_stages: int, num_chunks: int) -> NDArray[np.int32]:
        """Return the virtual stage of each chunk of each stage, ``(num_stages, num_chunks)``."""
        return looping_placement(num_stages, num_chunks)

    def operations(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> StageOperations:
        """Return the ordered operations of every stage."""
        self.check(num_stages, num_chunks, num_micro_batches)
        micro_batch = np.arange(num_micro_batches, dtype=np.int32)
        chunk = np.zeros(num_micro_batches, dtype=np.int32)
        warm_up = num_stages - 1 - np.arange(num_stages)
        return alternating_operations(warm_up, micro_batch, chunk, chunk)

    def peak_in_flight(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> NDArray[np.int64]:
        """Return ``min(m, p - rank)`` per stage."""
        self.check(num_stages, num_chunks, num_micro_batches)
        return np.minimum(num_micro_batches, num_stages - np.arange(num_stages))


def alternating_operations(
    warm_up: NDArray[np.int64],
    micro_batch: NDArray[np.int32],
    forward_chunk: NDArray[np.int32],
    backward_chunk: NDArray[np.int32],
) -> StageOperations:
    """Return ``warm_up[stage]`` forwards, then one forward and one backward in turn, then the backwards left.

    Parameters
    ----------
    warm_up : NDArray[np.int64]
        Forwards before the first forward-backward pair, shape ``(num_stages,)``.
    micro_batch, forward_chunk, backward_chunk : NDArray[np.int32]
        What the i-th forward and the i-th backward work on, shape ``(count,)``.
    """
    index = np.arange(len(micro_batch))
    before = np.minimum(warm_up, len(micro_batch))[:, np.newaxis]
    forward = index + np.maximum(index - before, 0)
    backward = index + np.minimum(index + before + 1, len(micro_batch))
    return operations_from_positions(
        [(FORWARD, forward, micro_batch, forward_chunk), (BACKWARD, backward, micro_batch, backward_chunk)]
    )
