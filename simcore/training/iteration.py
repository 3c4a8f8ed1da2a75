"""Simulate one training iteration: a schedule and its costs in, times and their causes out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.simcore.schedules import FORWARD, StageOperations
from meshwright.simcore.training.attribution import IdleTime, idle_time
from meshwright.simcore.training.costs import IterationCosts
from meshwright.simcore.training.structure import IterationStructure, iteration_structure, joint_time

__all__ = [
    "IterationResult",
    "iteration_result",
    "iteration_time",
    "simulate_iteration",
    "steady_state_period",
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IterationResult:
    """One simulated iteration.

    "Per stage" is shape ``(num_stages,)``, "per operation" ``(num_stages, num_operations)`` in the order of
    ``operations``, "per virtual stage" ``(num_stages * num_chunks,)``.

    Parameters
    ----------
    schedule : str
        Name of the pipeline schedule.
    costs : IterationCosts
        The durations that went in.
    iteration_time : float
        One optimizer step: end of the slowest stage plus ``fixed_time`` [s].
    pipeline_time : float
        End of the last backward of all stages [s].
    bubble_time, bubble_fraction : float
        Idle time [s] and idle share of the span from first to last operation, of the stage where that
        share is largest.
    stage_bubble_fraction : NDArray[np.float64]
        The same share, per stage.
    busy_time : NDArray[np.float64]
        Operations (blocking sends included) and optimizer step, per stage [s].
    idle_time : IdleTime
        Idle time by cause; ``busy_time + idle_time.per_stage`` is ``iteration_time``.
    exposed_communication_time : float
        That of the stage where it is largest [s].
    stage_exposed_communication_time : NDArray[np.float64]
        Exposed collectives inside operations, blocking sends, and idle time for gathers and reductions, per
        stage [s]. Waiting for sends that do not block is idle time, not counted here.
    peak_in_flight : NDArray[np.int64]
        Most live activations, in micro-batches on one chunk, per stage.
    operations : StageOperations
        What each stage ran.
    operation_start, operation_end : NDArray[np.float64]
        When it ran, per operation [s]. Of a joint forward and backward, the backward has the time of both and
        the forward none: it starts and ends where the pair starts.
    gather_start, gather_end : NDArray[np.float64]
        Parameter gathers on the communication stream, per virtual stage [s].
    reduce_start, reduce_end : NDArray[np.float64]
        Gradient reductions on the communication stream: the part beside the last backward, then the rest,
        shape ``(num_stages * num_chunks, 2)`` [s].
    optimizer_start, optimizer_end : NDArray[np.float64]
        Optimizer steps on the compute stream, per stage [s].
    """

    schedule: str
    costs: IterationCosts
    iteration_time: float
    pipeline_time: float
    bubble_time: float
    bubble_fraction: float
    stage_bubble_fraction: NDArray[np.float64]
    busy_time: NDArray[np.float64]
    idle_time: IdleTime
    exposed_communication_time: float
    stage_exposed_communication_time: NDArray[np.float64]
    peak_in_flight: NDArray[np.int64]
    operations: StageOperations
    operation_start: NDArray[np.float64]
    operation_end: NDArray[np.float64]
    gather_start: NDArray[np.float64]
    gather_end: NDArray[np.float64]
    reduce_start: NDArray[np.float64]
    reduce_end: NDArray[np.float64]
    optimizer_start: NDArray[np.float64]
    optimizer_end: NDArray[np.float64]

    @property
    def idle_fraction(self) -> NDArray[np.float64]:
        """Idle share of the iteration, per stage."""
        return self.idle_time.per_stage / self.iteration_time if self.iteration_time else 0.0 * self.busy_time


def iteration_time(costs: IterationCosts, schedule: str) -> float:
    """Return the seconds of one iteration and nothing else: the fast way to rank plans.

    Equal, bit for bit, to ``simulate_iteration(costs, schedule).iteration_time``.
    """
    structure = _structure(costs, schedule)
    return structure.graph.makespan(structure.durations(costs), structure.lags(costs)) + costs.fixed_time


def steady_state_period(costs: IterationCosts, schedule: str, num_iterations: int = 8) -> float:
    """Return the seconds from one iteration to the next when stages do not wait for each other's optimizer.

    Each stage starts its next iteration right after its own optimizer step and ``fixed_time``. The mean over
    the later half of ``num_iterations``; zero-bubble schedules that bypass the barrier gain here.
    """
    structure = _structure(costs, schedule)
    durations = structure.durations(costs)
    release = np.zeros(costs.num_stages)
    ends = [0.0]
    for _ in range(num_iterations):
        times = structure.graph.evaluate(durations, structure.lags(costs, release))
        release = structure.graph.in_built_order(times.end)[structure.optimizer] + costs.fixed_time
        ends.append(float(release.max()))
    half = num_iterations // 2
    return (ends[-1] - ends[half]) / (num_iterations - half)


def simulate_iteration(costs: IterationCosts, schedule: str) -> IterationResult:
    """Return the times of one iteration, operation by operation, and what its stages waited for.

    Forwards and backwards follow the schedule's order on each stage's compute stream and the data: the
    activation of the virtual stage before, the gradient of the one after. Parameters are gathered before the
    first forward of each virtual stage and gradients reduced after its last backward, on the stage's
    communication stream, one chunk after the other; the overlap shares say how much of either may run beside
    that forward or backward. The optimizer step follows the stage's reductions.

    Parameters
    ----------
    costs : IterationCosts
        Durations.
    schedule : str
        A key of :data:`meshwright.simcore.schedules.SCHEDULES`.

    Raises
    ------
    SpecError
        If the schedule is unknown or does not exist for these numbers, or a share is not in 0..1.
    """
    structure = _structure(costs, schedule)
    times = structure.graph.evaluate(structure.durations(costs), structure.lags(costs))
    start, end = structure.graph.in_built_order(times.start), structure.graph.in_built_order(times.end)
    return iteration_result(structure, costs, schedule, start, end)


def iteration_result(
    structure: IterationStructure,
    costs: IterationCosts,
    schedule: str,
    start: NDArray[np.float64],
    end: NDArray[np.float64],
) -> IterationResult:
    """Return what the times of an iteration's tasks say.

    Parameters
    ----------
    structure : IterationStructure
        The iteration's tasks.
    costs : IterationCosts
        Their durations when nothing slows them.
    schedule : str
        Name of the pipeline schedule.
    start, end : NDArray[np.float64]
        Of each task, in the numbering the graph was built with, ``(num_tasks,)`` [s].
    """
    shape = structure.operations.kind.shape
    operation_start = start[: structure.operations.kind.size].reshape(shape)
    operation_end = end[: structure.operations.kind.size].reshape(shape)
    operation_time = (operation_end - operation_start).sum(axis=1)
    span = operation_end[:, -1] - operation_start[:, 0]
    bubble = np.divide(span - operation_time, span, out=np.zeros_like(span), where=span > 0)
    # Sums of differences are off by rounding; a stage without gaps has no bubble at all.
    bubble[~(operation_start[:, 1:] > operation_end[:, :-1]).any(axis=1)] = 0.0
    worst = int(bubble.argmax())
    idle = idle_time(structure, start, end, costs.fixed_time)
    if structure.operations.is_overlapped is not None:
        _start_together(structure.operations, operation_start, operation_end)
    exposed = _communication_inside(structure, costs) + idle.parameter_gather + idle.gradient_reduce
    reduce_tasks = np.stack([structure.reduce_overlapped, structure.reduce_exposed], axis=1)
    return IterationResult(
        schedule=schedule,
        costs=costs,
        iteration_time=float(end.max(initial=0.0)) + costs.fixed_time,
        pipeline_time=float(operation_end[:, -1].max()),
        bubble_time=float(bubble[worst] * span[worst]),
        bubble_fraction=float(bubble[worst]),
        stage_bubble_fraction=bubble,
        busy_time=operation_time + (end - start)[structure.optimizer],
        idle_time=idle,
        exposed_communication_time=float(exposed.max()),
        stage_exposed_communication_time=exposed,
        peak_in_flight=structure.peak_in_flight.copy(),
        operations=structure.operations,
        operation_start=operation_start,
        operation_end=operation_end,
        gather_start=start[structure.gather_exposed],
        gather_end=end[structure.gather_overlapped],
        reduce_start=start[reduce_tasks],
        reduce_end=end[reduce_tasks],
        optimizer_start=start[structure.optimizer],
        optimizer_end=end[structure.optimizer],
    )


def _structure(costs: IterationCosts, schedule: str) -> IterationStructure:
    return iteration_structure(schedule, costs.num_stages, costs.num_chunks, costs.num_micro_batches)


def _start_together(
    operations: StageOperations, operation_start: NDArray[np.float64], operation_end: NDArray[np.float64]
) -> None:
    """Move forwards of joint pairs, which wait for their activation only, to where the pair starts."""
    stage, place = np.nonzero(operations.is_overlapped & (operations.kind == FORWARD))
    operation_start[stage, place] = operation_end[stage, place] = operation_start[stage, place + 1]


def _communication_inside(structure: IterationStructure, costs: IterationCosts) -> NDArray[np.float64]:
    """Return the exposed communication that operations contain, per stage [s].

    What a joint forward and backward save, they save by hiding each other's communication first.
    """
    per_micro_batch = costs.forward_communication_time + costs.backward_communication_time
    if costs.is_send_blocking:
        send = structure.send_time(costs)
        per_micro_batch[:-1] += send[:-1]
        per_micro_batch[1:] += send[:-1]
    num_passes = costs.num_micro_batches // structure.operations.num_model_copies
    # Chunks first: sums over them keep their order, and with it their last bit.
    virtual = np.ascontiguousarray(structure.operations.placement.T)
    per_stage: NDArray[np.float64] = per_micro_batch[virtual].sum(axis=0) * num_passes
    if structure.num_joint is not None:
        saved = np.maximum(costs.backward_time + costs.forward_time[::-1] - joint_time(costs), 0.0)
        inside = costs.backward_communication_time + costs.forward_communication_time[::-1]
        per_stage -= (structure.num_joint * np.minimum(saved, inside))[virtual].sum(axis=0)
    return per_stage
