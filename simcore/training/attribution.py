"""Where the idle time of each stage's compute stream comes from."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.schedules import BACKWARD, FORWARD, INPUT_GRADIENT
from meshwright.simcore.training.structure import IterationStructure

__all__ = ["IdleTime", "idle_time"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IdleTime:
    """Idle time of each stage's compute stream by cause, arrays of shape ``(num_stages,)`` [s].

    Parameters
    ----------
    warm_up : NDArray[np.float64]
        Before the stage's first operation, until the first activation arrives.
    activation_wait, gradient_wait : NDArray[np.float64]
        Before a later forward, or before a backward: waiting for the stage upstream, or downstream.
    parameter_gather : NDArray[np.float64]
        Beyond these, until the chunk's parameters are gathered.
    cool_down : NDArray[np.float64]
        After the stage's last operation, while some stage still runs its pipeline.
    gradient_reduce : NDArray[np.float64]
        After the whole pipeline's last backward, until the stage's gradients are reduced.
    optimizer_barrier : NDArray[np.float64]
        After the stage's own optimizer step and the pipeline, until the slowest stage has ended.
    fixed : NDArray[np.float64]
        The iteration's fixed time.
    """

    warm_up: NDArray[np.float64]
    activation_wait: NDArray[np.float64]
    gradient_wait: NDArray[np.float64]
    parameter_gather: NDArray[np.float64]
    cool_down: NDArray[np.float64]
    gradient_reduce: NDArray[np.float64]
    optimizer_barrier: NDArray[np.float64]
    fixed: NDArray[np.float64]

    @property
    def per_stage(self) -> NDArray[np.float64]:
        """All idle time of each stage, shape ``(num_stages,)`` [s]."""
        causes = np.array([getattr(self, field.name) for field in fields(self)], dtype=np.float64)
        total: NDArray[np.float64] = causes.sum(axis=0)
        return total

    def totals(self) -> dict[str, float]:
        """Return the idle time of all stages together by cause [s]."""
        return {field.name: float(getattr(self, field.name).sum()) for field in fields(self)}


def idle_time(
    structure: IterationStructure, start: NDArray[np.float64], end: NDArray[np.float64], fixed_time: float
) -> IdleTime:
    """Return the idle time by cause of an evaluated iteration.

    Parameters
    ----------
    structure : IterationStructure
        The iteration.
    start, end : NDArray[np.float64]
        Start and end of its tasks, in the numbering the graph was built with [s].
    fixed_time : float
        Time after the slowest stage's end [s].
    """
    kind = structure.operations.kind
    num_stages = kind.shape[0]
    begins, ends = start[: kind.size].reshape(kind.shape), end[: kind.size].reshape(kind.shape)
    gap = begins.copy()
    gap[:, 1:] -= ends[:, :-1]
    waits = np.zeros(kind.size)
    waits[structure.first_forward] += start[structure.first_forward] - end[structure.forward_ready]
    waits[structure.first_forward + 1] += end[structure.forward_done] - end[structure.first_forward]
    gather = waits.reshape(kind.shape)
    wait = gap - gather
    later = wait[:, 1:]
    is_backward = (kind[:, 1:] == BACKWARD) | (kind[:, 1:] == INPUT_GRADIENT)

    last = ends[:, -1]
    optimizer_start, optimizer_end = start[structure.optimizer], end[structure.optimizer]
    pipeline_end, makespan = last.max(), optimizer_end.max()
    before = np.maximum(np.minimum(optimizer_start, pipeline_end) - last, 0.0)
    after = np.maximum(pipeline_end - optimizer_end, 0.0)
    return IdleTime(
        warm_up=wait[:, 0].copy(),
        activation_wait=np.where(kind[:, 1:] == FORWARD, later, 0.0).sum(axis=1),
        gradient_wait=np.where(is_backward, later, 0.0).sum(axis=1),
        parameter_gather=gather.sum(axis=1),
        cool_down=before + after,
        gradient_reduce=(optimizer_start - last) - before,
        optimizer_barrier=(makespan - optimizer_end) - after,
        fixed=np.full(num_stages, fixed_time),
    )
