"""ZB-H2: twice the activations of 1F1B buy a span without bubble."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.schedules.base import StageOperations, require_single_chunk, require_sizes
from meshwright.simcore.schedules.placement import looping_placement
from meshwright.simcore.schedules.zero_bubble import split_backward_operations

__all__ = ["ZeroBubbleH2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroBubbleH2:
    """The hand-crafted schedule of [Qi 2024, section 2.2], peak ``2 p - 1`` on every stage.

    With at least ``2 p - 1`` micro-batches and ``W <= min(F, B)`` the bubble inside each stage's span is
    exactly ``(p - 1)(F + B - 2 W)``: none when all three last as long. One synchronous iteration still takes
    at least ``(p - 1) F + m (F + B + W)``; consecutive iterations gain where they bypass the optimizer barrier.
    """

    name: str = "zb_h2"
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
        rank = np.arange(num_stages)
        return split_backward_operations(2 * (num_stages - rank) - 1, 2 * rank, num_micro_batches)

    def peak_in_flight(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> NDArray[np.int64]:
        """Return ``min(m, 2 p - 1)``, on every stage."""
        self.check(num_stages, num_chunks, num_micro_batches)
        return np.full(num_stages, min(num_micro_batches, 2 * num_stages - 1), dtype=np.int64)
