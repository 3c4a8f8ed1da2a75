"""ZB-V: two chunks per stage, there and back, no bubble inside a stage's span at the memory of 1F1B."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.schedules.base import StageOperations, require_sizes, require_two_chunks
from meshwright.simcore.schedules.placement import v_placement
from meshwright.simcore.schedules.v_shape import building_block, v_shaped_operations

__all__ = ["ZeroBubbleV"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroBubbleV:
    """The schedule of [Qi 2024], V-ZB of [Qi 2024b], peak ``2 p`` chunks: p micro-batches.

    With at least ``2 p`` micro-batches and forward, input gradient and weight gradient of equal length no
    stage idles between its first and its last operation.
    """

    name: str = "zb_v"
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
        # Steps whose lifespans add up to 12 p units per micro-batch on every stage: 2 p chunks of 6 units.
        block = building_block(num_stages, (4, 2, 4, 2))
        return v_shaped_operations(block, num_micro_batches, 2 * num_stages, draining_chunk=1)

    def peak_in_flight(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> NDArray[np.int64]:
        """Return ``min(2 m, 2 p)``, on every stage."""
        self.check(num_stages, num_chunks, num_micro_batches)
        return np.full(num_stages, 2 * min(num_micro_batches, num_stages), dtype=np.int64)
