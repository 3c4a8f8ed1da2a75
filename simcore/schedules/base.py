"""What a pipeline schedule is: stages and micro-batches in, ordered operations out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError

__all__ = [
    "BACKWARD",
    "FORWARD",
    "INPUT_GRADIENT",
    "WEIGHT_GRADIENT",
    "PipelineSchedule",
    "StageOperations",
    "operations_from_positions",
    "require_single_chunk",
    "require_sizes",
]

FORWARD: Final = 0
BACKWARD: Final = 1
INPUT_GRADIENT: Final = 2
WEIGHT_GRADIENT: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageOperations:
    """The operations of every stage, in the order its compute stream runs them.

    Parameters
    ----------
    kind : NDArray[np.int8]
        ``FORWARD``, ``BACKWARD`` (whole), ``INPUT_GRADIENT`` or ``WEIGHT_GRADIENT``, shape
        ``(num_stages, num_operations)``.
    micro_batch, chunk : NDArray[np.int32]
        What the operation works on, same shape. Chunk ``c`` of stage ``s`` is virtual stage
        ``c * num_stages + s``.
    """

    kind: NDArray[np.int8]
    micro_batch: NDArray[np.int32]
    chunk: NDArray[np.int32]

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages."""
        return int(self.kind.shape[0])

    @property
    def num_operations(self) -> int:
        """Operations of one stage."""
        return int(self.kind.shape[1])

    def peak_in_flight(self) -> NDArray[np.int64]:
        """Return the most forwards of each stage whose activations live at once, ``(num_stages,)``.

        Counted in micro-batches on one chunk, from the start of the forward to the end of the operation
        that needs its activations last: the whole backward, or the weight gradient.
        """
        change = np.array([1, -1, 0, -1], dtype=np.int32)[self.kind]
        live: NDArray[np.int32] = np.cumsum(change, axis=1, dtype=np.int32)
        peak: NDArray[np.int64] = live.max(axis=1).astype(np.int64)
        return peak


class PipelineSchedule(Protocol):
    """One way to order the operations of a pipeline."""

    @property
    def name(self) -> str:
        """The word that plan files use."""
        ...

    def check(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> None:
        """Raise SpecError where the schedule does not exist for these numbers."""
        ...

    def operations(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> StageOperations:
        """Return the ordered operations of every stage; checks its arguments."""
        ...

    def peak_in_flight(self, num_stages: int, num_chunks: int, num_micro_batches: int) -> NDArray[np.int64]:
        """Return the declared peak of live activations, in micro-batches on one chunk, ``(num_stages,)``."""
        ...


def require_sizes(num_stages: int, num_chunks: int, num_micro_batches: int) -> None:
    """Raise SpecError unless every number is at least 1."""
    sizes = {"num_stages": num_stages, "num_chunks": num_chunks, "num_micro_batches": num_micro_batches}
    for name, value in sizes.items():
        if value < 1:
            raise SpecError(f"{name} must be at least 1, not {value}")


def require_single_chunk(name: str, num_chunks: int) -> None:
    """Raise SpecError if a schedule without interleaving is asked to interleave."""
    if num_chunks != 1:
        raise SpecError(
            f"schedule '{name}' has one chunk per stage, not {num_chunks}: use vpp 1, or interleaved_1f1b"
        )


def operations_from_positions(
    parts: list[tuple[int, NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]],
) -> StageOperations:
    """Return operations from the place of each in its stage's order.

    Parameters
    ----------
    parts : list
        One ``(kind, position, micro_batch, chunk)`` per kind: ``position`` of shape
        ``(num_stages, count)``, the others of shape ``(count,)`` and equal on all stages.
    """
    num_stages = parts[0][1].shape[0]
    num_operations = sum(position.shape[1] for _, position, _, _ in parts)
    kinds = np.empty((num_stages, num_operations), dtype=np.int8)
    micro_batches = np.empty((num_stages, num_operations), dtype=np.int32)
    chunks = np.empty((num_stages, num_operations), dtype=np.int32)
    for kind, position, micro_batch, chunk in parts:
        for stage in range(num_stages):
            place = position[stage]
            kinds[stage, place] = kind
            micro_batches[stage, place] = micro_batch
            chunks[stage, place] = chunk
    return StageOperations(kind=kinds, micro_batch=micro_batches, chunk=chunks)
