"""DualPipeV: DualPipe cut in half, on half the devices, every micro-batch going there and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.simcore.schedules.base import StageOperations, require_sizes, require_two_chunks
from meshwright.simcore.schedules.bidirectional import bidirectional_operations
from meshwright.simcore.schedules.placement import v_placement

__all__ = ["DualPipeV"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DualPipeV:
    """The V-shaped schedule of [DeepSeek 2025, README of DualPipe], peak ``2 p + 1`` chunks on every stage.

    The p stages hold ``2 p`` virtual stages. Bubble and peak are those of DualPipe on ``2 p`` stages: where
    forward and input gradient last equally long and the weight gradient no longer, each iteration idles
    ``(p - 1)(F&B + B - 3 W)`` on the stages that idle most.
    """

    name: str = "dualpipe_v"
    num_model_copies: int = 1

    def check(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> None:
        """Raise SpecError unless there are two chunks and at least two micro-batches per stage."""
        require_sizes(num_stages, num_chunks, num_micro_batches)
        require_two_chunks(self.name, num_stages, num_chunks)
        if num_micro_batches < 2 * num_stages:
            raise SpecError(
                f"schedule '{self.name}' needs at least twice as many micro-batches as the {num_stages} stages, "
                f"not {num_micro_batches}: use {2 * num_stages}"
            )

    def placement(self, num_stages: int, num_chunks: int) -> NDArray[np.int32]:
        """Return the virtual stage of each chunk of each stage, ``(num_stages, 2)``."""
        require_two_chunks(self.name, num_stages, num_chunks)
        return v_placement(num_stages)

    def operations(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> StageOperations:
        """Return the ordered operations of every stage."""
        self.check(num_stages, num_chunks, num_micro_batches)
        return bidirectional_operations(
            way_to_turn=num_stages - 1 - np.arange(num_stages),
            is_mirrored=np.zeros(num_stages, dtype=np.bool_),
            first_micro_batch=(0, 0),
            num_passes=num_micro_batches,
            num_model_copies=self.num_model_copies,
        )

    def peak_in_flight(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> NDArray[np.int64]:
        """Return ``2 p + 1``, on every stage."""
        self.check(num_stages, num_chunks, num_micro_batches)
        return np.full(num_stages, 2 * num_stages + 1, dtype=np.int64)
