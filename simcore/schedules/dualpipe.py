"""DualPipe: half of the micro-batches enters at either end, and forwards run jointly with backwards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.simcore.schedules.base import StageOperations, require_sizes, require_two_chunks
from meshwright.simcore.schedules.bidirectional import bidirectional_operations
from meshwright.simcore.schedules.placement import v_placement

__all__ = ["DualPipe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DualPipe:
    """The bidirectional schedule of [DeepSeek 2024, section 3.2.1], peak ``p + 1`` on every stage.

    The p stages hold the model twice: virtual stages ``0`` to ``p - 1`` from the first stage to the last and
    the same layers again, ``p`` to ``2 p - 1``, from the last to the first. The first half of the micro-batches
    passes the former, the second half the latter. Where forward and input gradient last equally long and the
    weight gradient no longer, each iteration idles ``(p / 2 - 1)(F&B + B - 3 W)`` on the stages that idle most
    (F&B the joint forward and backward, B the whole backward, W the weight gradient).
    """

    name: str = "dualpipe"
    num_model_copies: int = 2

    def check(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> None:
        """Raise SpecError unless stages and micro-batches are even and there are two of these per stage."""
        require_sizes(num_stages, num_chunks, num_micro_batches)
        require_two_chunks(self.name, num_stages, num_chunks)
        if num_stages % 2:
            raise SpecError(
                f"schedule '{self.name}' needs an even number of stages, not {num_stages}: use {num_stages - 1} "
                f"or {num_stages + 1}"
            )
        if num_micro_batches % 2 or num_micro_batches < 2 * num_stages:
            near = max(num_micro_batches + num_micro_batches % 2, 2 * num_stages)
            raise SpecError(
                f"schedule '{self.name}' needs an even number of micro-batches, at least twice the {num_stages} "
                f"stages, not {num_micro_batches}: use {near}"
            )

    def placement(self, num_stages: int, num_chunks: int) -> NDArray[np.int32]:
        """Return the virtual stage of each chunk of each stage, ``(num_stages, 2)``."""
        require_two_chunks(self.name, num_stages, num_chunks)
        return v_placement(num_stages)

    def operations(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> StageOperations:
        """Return the ordered operations of every stage."""
        self.check(num_stages, num_chunks, num_micro_batches)
        stage = np.arange(num_stages)
        from_end = np.minimum(stage, num_stages - 1 - stage)
        half = num_micro_batches // 2
        return bidirectional_operations(
            way_to_turn=num_stages // 2 - 1 - from_end,
            is_mirrored=stage >= num_stages // 2,
            first_micro_batch=(0, half),
            num_passes=half,
            num_model_copies=self.num_model_copies,
        )

    def peak_in_flight(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> NDArray[np.int64]:
        """Return ``p + 1``, on every stage."""
        self.check(num_stages, num_chunks, num_micro_batches)
        return np.full(num_stages, num_stages + 1, dtype=np.int64)
