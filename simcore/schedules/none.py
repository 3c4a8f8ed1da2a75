"""No pipeline: one stage runs forward and backward of each micro-batch, accumulating gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.simcore.schedules.base import StageOperations, require_single_chunk, require_sizes
from meshwright.simcore.schedules.one_f_one_b import alternating_operations
from meshwright.simcore.schedules.placement import looping_placement

__all__ = ["NoPipeline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPipeline:
    """Gradient accumulation on a single stage: no bubble, one micro-batch in flight."""

    name: str = "none"
    num_model_copies: int = 1

    def check(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> None:
        """Raise SpecError unless there is one stage with one chunk."""
        require_sizes(num_stages, num_chunks, num_micro_batches)
        if num_stages != 1:
            raise SpecError(f"schedule 'none' has one stage, not {num_stages}: name a pipeline schedule")
        require_single_chunk(self.name, num_chunks)

    def placement(self, num_stages: int, num_chunks: int) -> NDArray[np.int32]:
        """Return the virtual stage of each chunk of each stage, ``(num_stages, num_chunks)``."""
        return looping_placement(num_stages, num_chunks)

    def operations(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> StageOperations:
        """Return the ordered operations of the stage."""
        self.check(num_stages, num_chunks, num_micro_batches)
        chunk = np.zeros(num_micro_batches, dtype=np.int32)
        micro_batch = np.arange(num_micro_batches, dtype=np.int32)
        return alternating_operations(np.zeros(1, dtype=np.int64), micro_batch, chunk, chunk)

    def peak_in_flight(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> NDArray[np.int64]:
        """Return 1."""
        self.check(num_stages, num_chunks, num_micro_batches)
        return np.ones(1, dtype=np.int64)
