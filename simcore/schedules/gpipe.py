"""GPipe: all forwards, then all backwards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.schedules.base import StageOperations, require_single_chunk, require_sizes
from meshwright.simcore.schedules.one_f_one_b import alternating_operations
from meshwright.simcore.schedules.placement import looping_placement

__all__ = ["GPipe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPipe:
    """Fill and drain [Huang 2019]: bubble ``(p - 1)(F + B)``; keeps every micro-batch's activations."""

    name: str = "gpipe"
    num_model_copies: int = 1

    def check(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> None:
        """Raise SpecError unless there is one chunk per stage."""
        require_sizes(num_stages, num_chunks, num_micro_batches)
        require_single_chunk(self.name, num_chunks)

    def placement(self, num_stages: int, num_chunks: int) -> NDArray[np.int32]:
        """Return the virtual stage of each chunk of each stage, ``(num_stages, num_chunks)``."""
        return looping_placement(num_stages, num_chunks)

    def operations(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> StageOperations:
        """Return the ordered operations of every stage; backwards run in the order of the forwards."""
        self.check(num_stages, num_chunks, num_micro_batches)
        chunk = np.zeros(num_micro_batches, dtype=np.int32)
        micro_batch = np.arange(num_micro_batches, dtype=np.int32)
        return alternating_operations(np.full(num_stages, num_micro_batches), micro_batch, chunk, chunk)

    def peak_in_flight(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> NDArray[np.int64]:
        """Return the number of micro-batches, on every stage."""
        self.check(num_stages, num_chunks, num_micro_batches)
        return np.full(num_stages, num_micro_batches, dtype=np.int64)
