"""V-Min: two chunks per stage, there and back, at a third of the activation memory of 1F1B."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.schedules.base import StageOperations, require_sizes, require_two_chunks
from meshwright.simcore.schedules.placement import v_placement
from meshwright.simcore.schedules.v_shape import building_block, v_shaped_operations

__all__ = ["VMin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VMin:
    """The schedule of [Qi 2024b], peak ``(p + 4) // 3`` micro-batches on two chunks.

    With at least ``2 p`` micro-batches and forward, input gradient and weight gradient of equal length, the
    longest bubble inside a stage's span is ``4 p - 7`` of these on a chunk where 3 divides p and ``4 p - 5``
    elsewhere (p > 2): just below two thirds of 1F1B's ``6 (p - 1)``. With other lengths the tight pattern adds
    bubbles to every micro-batch.
    """

    name: str = "v_min"
    num_model_copies: int = 1

    def check(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> None:
        """Raise SpecError unless there are two chunks on each of at least two stages."""
        require_sizes(num_stages, num_chunks, num_micro_batches)
        require_two_chunks(self.name, num_stages, num_chunks)

    def placement(self, num_stages: int, num_chunks: int) -> NDArray[np.int32]:
        """Return the virtual stage of each chunk of each stage, ``(num_stages, 2)``."""
        require_two_chunks(self.name, num_stages, num_chunks)
        return v_placement(num_stages)

    def operations(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> StageOperations:
        """Return the ordered operations of every stage."""
        self.check(num_stages, num_chunks, num_micro_batches)
        # Without the pause a forward and a gradient of other micro-batches fall on the same unit.
        pauses = (2 if num_stages % 3 == 0 else 0, 0)
        block = building_block(num_stages, (1, 1, 1, 1), pauses)
        return v_shaped_operations(block, num_micro_batches, _limit(num_stages), draining_chunk=0)

    def peak_in_flight(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> NDArray[np.int64]:
        """Return ``min(2 m, 2 ((p + 4) // 3))``, on every stage: none keeps more, some one less."""
        self.check(num_stages, num_chunks, num_micro_batches)
        return np.full(num_stages, min(2 * num_micro_batches, _limit(num_stages)), dtype=np.int64)


def _limit(num_stages: int) -> int:
    return 2 * ((num_stages + 4) // 3)
