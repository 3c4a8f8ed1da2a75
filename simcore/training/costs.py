"""What one training iteration costs, in plain seconds: the seam between cost models and simulation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import SpecError

__all__ = ["IterationCosts"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IterationCosts:
    """Durations of the operations of one iteration.

    Arrays named "virtual stage" have shape ``(num_stages * num_chunks,)`` in model order, copy after copy
    where the stages hold several; which stage and chunk a virtual stage is, the schedule's ``placement`` says.

    Parameters
    ----------
    num_stages, num_chunks, num_micro_batches : int
        Pipeline stages, chunks per stage, micro-batches per pipeline.
    forward_time, backward_time : NDArray[np.float64]
        One micro-batch through one virtual stage, exposed collectives and recompute included [s].
    weight_gradient_time : NDArray[np.float64]
        The part of ``backward_time`` that only produces weight gradients, which zero-bubble schedules
        run as an operation of its own [s].
    forward_communication_time, backward_communication_time : NDArray[np.float64]
        The part of forward and backward that is exposed communication, for attribution [s].
    send_time : NDArray[np.float64]
        Activation from virtual stage ``i`` to ``i + 1``; the gradient takes as long back. 0 in the last entry
        and between virtual stages of one stage [s].
    is_send_blocking : bool
        True: the sender's compute stream waits for its send (the operation lasts ``send_time`` longer).
        False: only the receiver waits.
    gradient_reduce_time : NDArray[np.float64]
        Reduction of one virtual stage's gradients over data parallel ranks, after its last backward [s].
    gradient_reduce_overlap : float
        Share of the reduction that may run beside the last micro-batch's backward, 0 to 1.
    parameter_gather_time : NDArray[np.float64]
        Gathering one virtual stage's updated weights (distributed optimizer) before its first forward [s].
    parameter_gather_overlap : float
        Share of the gather that may run beside the first micro-batch's forward, 0 to 1.
    optimizer_time : NDArray[np.float64]
        Optimizer step of each stage, shape ``(num_stages,)`` [s].
    fixed_time : float
        Once per iteration: gradient norm, step launch, data and logging [s].
    overlapped_time : NDArray[np.float64] | None
        Backward of virtual stage ``i`` run jointly with the forward of the other chunk of its stage, virtual
        stage ``num_stages * num_chunks - 1 - i``, where the schedule has such pairs (DualPipe's F&B), without
        blocking sends; "virtual stage" [s]. None: as long as both one after the other.
    """

    num_stages: int
    num_chunks: int
    num_micro_batches: int
    forward_time: NDArray[np.float64]
    backward_time: NDArray[np.float64]
    weight_gradient_time: NDArray[np.float64]
    forward_communication_time: NDArray[np.float64]
    backward_communication_time: NDArray[np.float64]
    send_time: NDArray[np.float64]
    is_send_blocking: bool
    gradient_reduce_time: NDArray[np.float64]
    gradient_reduce_overlap: float
    parameter_gather_time: NDArray[np.float64]
    parameter_gather_overlap: float
    optimizer_time: NDArray[np.float64]
    fixed_time: float
    overlapped_time: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        num_virtual_stages = self.num_stages * self.num_chunks
        for name in (
            "forward_time",
            "backward_time",
            "weight_gradient_time",
            "forward_communication_time",
            "backward_communication_time",
            "send_time",
            "gradient_reduce_time",
            "parameter_gather_time",
            "overlapped_time",
        ):
            values = getattr(self, name)
            if values is None:
                continue
            if values.shape != (num_virtual_stages,):
                raise SpecError(f"{name} has shape {values.shape}, expected ({num_virtual_stages},)")
            if not np.all(np.isfinite(values)) or np.any(values < 0):
                raise SpecError(f"{name} must be finite and not negative")
        if self.optimizer_time.shape != (self.num_stages,):
            raise SpecError(
                f"optimizer_time has shape {self.optimizer_time.shape}, expected ({self.num_stages},)"
            )
