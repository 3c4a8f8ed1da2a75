"""What a pipeline schedule is: stages and micro-batches in, ordered operations out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError
from meshwright.simcore.schedules.placement import looping_placement

__all__ = [
    "BACKWARD",
    "FORWARD",
    "INPUT_GRADIENT",
    "NO_OPERATION",
    "WEIGHT_GRADIENT",
    "PipelineSchedule",
    "StageOperations",
    "operations_from_positions",
    "require_single_chunk",
    "require_sizes",
    "require_two_chunks",
]

FORWARD: Final = 0
BACKWARD: Final = 1
INPUT_GRADIENT: Final = 2
WEIGHT_GRADIENT: Final = 3
NO_OPERATION: Final = 4

# What each kind adds to the activations that live on its stage.
_LIVE_CHANGE = np.array([1, -1, 0, -1, 0], dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageOperations:
    """The operations of every stage, in the order its compute stream runs them.

    Parameters
    ----------
    kind : NDArray[np.int8]
        ``FORWARD``, ``BACKWARD`` (whole), ``INPUT_GRADIENT`` or ``WEIGHT_GRADIENT``, shape
        ``(num_stages, num_operations)``; ``NO_OPERATION`` after the last one of stages that run fewer.
    micro_batch, chunk : NDArray[np.int32]
        What the operation works on, same shape.
    placement : NDArray[np.int32]
        The virtual stage that each chunk of each stage is, shape ``(num_stages, num_chunks)``.
    num_model_copies : int
        Copies of the model that the stages hold together. Each micro-batch passes the virtual stages of one
        copy; nothing is sent from the last virtual stage of a copy to the first of the next.
    is_overlapped : NDArray[np.bool_] | None
        Pairs of a forward and the backward right after it that run as one joint operation, both marked, same
        shape as ``kind``; never a virtual stage's first forward or last gradient. None: there are none.
    """

    kind: NDArray[np.int8]
    micro_batch: NDArray[np.int32]
    chunk: NDArray[np.int32]
    placement: NDArray[np.int32]
    num_model_copies: int = 1
    is_overlapped: NDArray[np.bool_] | None = None

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages."""
        return int(self.kind.shape[0])

    @property
    def num_operations(self) -> int:
        """Operations of the stage that runs most."""
        return int(self.kind.shape[1])

    def peak_in_flight(self) -> NDArray[np.int64]:
        """Return the most forwards of each stage whose activations live at once, ``(num_stages,)``.

        Counted in micro-batches on one chunk, from the start of the forward to the end of the operation
        that needs its activations last: the whole backward, or the weight gradient.
        """
        change = _LIVE_CHANGE[self.kind]
        live: NDArray[np.int32] = np.cumsum(change, axis=1, dtype=np.int32)
        peak: NDArray[np.int64] = live.max(axis=1).astype(np.int64)
        return peak


class PipelineSchedule(Protocol):
    """One way to order the operations of a pipeline."""

    @property
    def name(self) -> str:
        """The word that plan files use."""
        ...

    @property
    def num_model_copies(self) -> int:
        """Copies of the model that the stages hold together: micro-batches are dealt out to them evenly."""
        ...

    def placement(self, num_stages: int, num_chunks: int) -> NDArray[np.int32]:
        """Return the virtual stage of each chunk of each stage, ``(num_stages, num_chunks)``.

        Virtual stages are numbered in model order, copy after copy where there are several.
        """
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


def require_two_chunks(name: str, num_stages: int, num_chunks: int) -> None:
    """Raise SpecError unless a schedule that goes there and back has the stages and chunks to do so."""
    if num_stages < 2 or num_chunks != 2:
        raise SpecError(
            f"schedule '{name}' needs at least 2 stages and exactly 2 chunks per stage, not {num_stages} and "
            f"{num_chunks}: use pp >= 2 and vpp 2"
        )


def operations_from_positions(
    parts: list[tuple[int, NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]],
) -> StageOperations:
    """Return operations from the place of each in its stage's order, the model looping over the stages.

    Parameters
    ----------
    parts : list
        One ``(kind, position, micro_batch, chunk)`` per kind: ``position`` of shape
        ``(num_stages, count)``, the others of shape ``(count,)`` and equal on all stages.
    """
    num_stages = parts[0][1].shape[0]
    num_operations = sum(position.shape[1] for _, position, _, _ in parts)
    num_chunks = 1 + max(int(chunk.max()) for _, _, _, chunk in parts)
    kinds = np.empty((num_stages, num_operations), dtype=np.int8)
    micro_batches = np.empty((num_stages, num_operations), dtype=np.int32)
    chunks = np.empty((num_stages, num_operations), dtype=np.int32)
    for kind, position, micro_batch, chunk in parts:
        for stage in range(num_stages):
            place = position[stage]
            kinds[stage, place] = kind
            micro_batches[stage, place] = micro_batch
            chunks[stage, place] = chunk
    return StageOperations(
        kind=kinds,
        micro_batch=micro_batches,
        chunk=chunks,
        placement=looping_placement(num_stages, num_chunks),
    )
