"""Interleaved 1F1B: each stage holds several chunks of the model and visits them in turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.simcore.schedules.base import StageOperations, require_sizes
from meshwright.simcore.schedules.one_f_one_b import alternating_operations
from meshwright.simcore.schedules.placement import looping_placement

__all__ = ["Interleaved"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interleaved:
    """Megatron's interleaved 1F1B [Narayanan 2021, section 2.2]: bubble ``(p - 1)(F + B) / v``.

    Micro-batches travel in groups: a stage runs one group through its first chunk, the same group through
    its second, and so on, then the next group.

    Parameters
    ----------
    micro_batch_group_size : int | None
        Micro-batches of a group, at least ``num_stages`` (Megatron-Core's
        ``microbatch_group_size_per_vp_stage``); None is ``num_stages``. Larger groups keep more
        activations. The last group may be smaller, but not smaller than ``num_stages``: its micro-batches
        would wait for themselves to come round the pipeline.
    """

    micro_batch_group_size: int | None = None
    name: str = "interleaved_1f1b"
    num_model_copies: int = 1

    def check(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> None:
        """Raise SpecError where Megatron-Core refuses the numbers."""
        require_sizes(num_stages, num_chunks, num_micro_batches)
        if num_stages < 2 or num_chunks < 2:
            raise SpecError(
                f"schedule '{self.name}' needs at least 2 stages and 2 chunks per stage, not {num_stages} and "
                f"{num_chunks}: use vpp >= 2, or 1f1b"
            )
        group_size = self._group_size(num_stages)
        if group_size < num_stages:
            raise SpecError(
                f"micro_batch_group_size {group_size} must be at least the {num_stages} pipeline stages"
            )
        rest = num_micro_batches % group_size
        if 0 < rest < num_stages:
            lower = num_micro_batches - rest
            near = f"{lower} or {lower + group_size}" if lower else str(group_size)
            raise SpecError(
                f"schedule '{self.name}' cannot run {num_micro_batches} micro-batches in groups of {group_size}: "
                f"the last group of {rest} is smaller than the {num_stages} stages; use {near} micro-batches"
            )

    def placement(self, num_stages: int, num_chunks: int) -> NDArray[np.int32]:
        """Return the virtual stage of each chunk of each stage, ``(num_stages, num_chunks)``."""
        return looping_placement(num_stages, num_chunks)

    def operations(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> StageOperations:
        """Return the ordered operations of every stage."""
        self.check(num_stages, num_chunks, num_micro_batches)
        group_size = self._group_size(num_stages)
        num_whole = num_micro_batches // group_size * group_size
        whole = np.arange(num_whole, dtype=np.int32).reshape(-1, 1, group_size)
        rest = np.arange(num_whole, num_micro_batches, dtype=np.int32)
        micro_batch = np.concatenate([whole.repeat(num_chunks, axis=1).ravel(), np.tile(rest, num_chunks)])
        chunks = np.arange(num_chunks, dtype=np.int32)
        chunk = np.concatenate(
            [np.tile(chunks.repeat(group_size), num_whole // group_size), chunks.repeat(len(rest))]
        )
        return alternating_operations(
            self._warm_up(num_stages, num_chunks), micro_batch, chunk, num_chunks - 1 - chunk
        )

    def peak_in_flight(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> NDArray[np.int64]:
        """Return ``min(m v, p v + p - 1 - 2 rank)`` per stage, for groups of p."""
        self.check(num_stages, num_chunks, num_micro_batches)
        return np.minimum(num_micro_batches * num_chunks, self._warm_up(num_stages, num_chunks) + 1)

    def _group_size(self, num_stages: int) -> int:
        return num_stages if self.micro_batch_group_size is None else self.micro_batch_group_size

    def _warm_up(self, num_stages: int, num_chunks: int) -> NDArray[np.int64]:
        way_to_last_stage = num_stages - 1 - np.arange(num_stages)
        return 2 * way_to_last_stage + (num_chunks - 1) * self._group_size(num_stages)
