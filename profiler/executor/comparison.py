"""Predicted against measured, term by term, on the pipeline stage that is predicted to be the busiest."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from meshwright.costmodels.breakdown import Breakdown
from meshwright.costmodels.prediction import Prediction
from meshwright.profiler.executor.expected import expected_traffic, tells_activations
from meshwright.profiler.executor.report import ExecutionReport, GroupTraffic, RankReport
from meshwright.simcore.domain.execution import Execution, ExecutionDevice
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = [
    "ComparedTerm",
    "ComparedTraffic",
    "Comparison",
    "compare",
    "compare_traffic",
    "comparison_mapping",
    "shared_cores",
]

# Axes whose collectives are called, and waited for, inside forward and backward.
_INSIDE: Mapping[str, tuple[str, ...]] = {
    "tensor parallel": ("tp",),
    "context parallel": ("cp",),
    "expert parallel": ("ep", "etp"),
}
_COMPUTING = ("forward", "backward", "weight_gradient")
# The gradient norm is taken where gradients are synchronised.
_UPDATING = ("optimizer", "gradient_sync")
_FULLY_SHARDED = ("zero2", "zero3", "hsdp")
_DATA_AXES = ("dp", "expert_dp")
_IN_CPU_TIME = " in CPU time"
# Wall over CPU time of compute that a rank with a core of its own does not reach.
_MOST_TIMES = 1.2
# What runs on the device; what is fixed per iteration is the host's, which a worker cannot tell apart.
_COMPUTE = ("compute", "recompute", "embedding and head", "offload", "fixed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedTerm:
    """One figure, predicted and measured; ``unit`` is that of both."""

    name: str
    predicted: float
    measured: float
    unit: Literal["s", "B"]

    @property
    def error(self) -> float | None:
        """``predicted / measured - 1``; None where nothing was measured."""
        return self.predicted / self.measured - 1.0 if self.measured else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was predicted of a run, and what it did.

    Parameters
    ----------
    stage : int
        The pipeline stage whose terms these are.
    terms : tuple[ComparedTerm, ...]
        ``iteration`` first: the slowest rank's; then the parts of the stage, and ``peak memory`` of the fullest rank.
    low, high : float
        80 % interval of the predicted iteration time [s].
    is_same_device : bool
        Whether the run was on the kind of device the prediction is for; else no error means anything.
    """

    stage: int
    terms: tuple[ComparedTerm, ...]
    low: float
    high: float
    is_same_device: bool

    def term(self, name: str) -> ComparedTerm:
        """Return a term by name."""
        return next(term for term in self.terms if term.name == name)

    @property
    def is_inside(self) -> bool:
        """Whether the measured iteration time lies in the predicted interval."""
        return self.low <= self.term("iteration").measured <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedTraffic:
    """Messages and bytes of one operation over one axis, of all ranks in a step.

    Parameters
    ----------
    axis, operation : str
        As in :class:`~meshwright.profiler.executor.report.GroupTraffic`.
    predicted_messages, measured_messages : int
        Calls.
    predicted_bytes, measured_bytes : int
        Of the buffers that ranks contribute [B].
    seconds : float
        Inside the calls, mean of the ranks [s].
    """

    axis: str
    operation: str
    predicted_messages: int
    measured_messages: int
    predicted_bytes: int
    measured_bytes: int
    seconds: float

    @property
    def is_exact(self) -> bool:
        """Whether what was sent is what the plan says."""
        return (self.predicted_messages, self.predicted_bytes) == (
            self.measured_messages,
            self.measured_bytes,
        )


def shared_cores(comparison: Comparison, num_ranks: int, num_cores: int) -> str | None:
    """Return why wall times on a CPU say little: its ranks did not have a core each; None where they did.

    Parameters
    ----------
    comparison : Comparison
        Of a run on a CPU, else there is nothing to tell.
    num_ranks, num_cores : int
        Of this machine.
    """
    in_cpu_time = [term.measured for term in comparison.terms if term.name == "compute" + _IN_CPU_TIME]
    if not in_cpu_time:
        return None
    if num_ranks > num_cores:
        return (
            f"{num_ranks} ranks shared {num_cores} cores, and the prediction gives each one of its own: compare the"
            " CPU time, not the wall time."
        )
    times = comparison.term("compute").measured / in_cpu_time[0]
    if times < _MOST_TIMES:
        return None
    return (
        f"Compute took {times:.1f} times its CPU time: something else ran on these cores. Compare the CPU time, not"
        " the wall time."
    )


def compare_traffic(execution: Execution, report: ExecutionReport) -> tuple[ComparedTraffic, ...]:
    """Return what all ranks sent in a step, beside what plan and model alone say; sorted by axis and operation.

    Activations on their way to and from the host stand there where plan and model say how many bytes they are.
    """
    predicted: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for rank in expected_traffic(execution):
        for key, each in rank.items():
            predicted.setdefault(key, []).append(each)
    measured: dict[tuple[str, str], list[GroupTraffic]] = {}
    is_told = not execution.plan.activation_offload or tells_activations(execution.plan)
    for reported in report.ranks:
        for sent in reported.traffic:
            if sent.axis == "activations" and not is_told:
                continue
            measured.setdefault((sent.axis, sent.operation), []).append(sent)
    compared = []
    for key in sorted({*predicted, *measured}):
        rows = measured.get(key, [])
        compared.append(
            ComparedTraffic(
                axis=key[0],
                operation=key[1],
                predicted_messages=sum(messages for messages, _ in predicted.get(key, [])),
                measured_messages=sum(each.num_messages for each in rows),
                predicted_bytes=sum(num_bytes for _, num_bytes in predicted.get(key, [])),
                measured_bytes=sum(each.num_bytes for each in rows),
                seconds=sum(each.seconds for each in rows) / len(report.ranks),
            )
        )
    return tuple(compared)


def compare(
    plan: ParallelPlan,
    prediction: Prediction,
    breakdown: Breakdown,
    report: ExecutionReport,
    *,
    device: ExecutionDevice,
    is_same_device: bool,
) -> Comparison:
    """Return predicted against measured.

    Parameters
    ----------
    plan, prediction, breakdown : ParallelPlan, Prediction, Breakdown
        What ran, and what was expected of it.
    report : ExecutionReport
        What its ranks measured.
    device : ExecutionDevice
        Where it ran; on a CPU compute and optimizer are compared in CPU time as well, which busy neighbours are not in.
    is_same_device : bool
        Whether it ran on the device of the prediction.

    Notes
    -----
    Times of a rank are medians over its measured steps, those of the stage means over its ranks. Compute is forward
    and backward without the collectives called in them. Gradients are synchronised beside the end of the backward:
    what is seen of it is the wait after it, together with the gradient norm, which counts as optimizer where there is
    nothing to synchronise. A stage that waits for a message cannot tell its way from the bubble before it.
    """
    stage = breakdown.busiest_stage
    ranks = report.of_stage(stage)
    predicted = breakdown.grouped(stage)

    def phase(name: str) -> float:
        return _mean([_median(rank.phase_seconds.get(name, ())) for rank in ranks])

    def called(axes: Collection[str]) -> float:
        return _mean([sum(each.seconds for each in rank.traffic if each.axis in axes) for rank in ranks])

    inside = {name: called(axes) for name, axes in _INSIDE.items()}
    sharded = called(_DATA_AXES) if plan.sharding in _FULLY_SHARDED else 0.0
    computing = sum(phase(name) for name in _COMPUTING)
    measured = {
        "compute": max(0.0, computing - sum(inside.values()) - sharded),
        **inside,
        "data parallel": sharded,
        "pipeline (sends and bubble)": phase("wait") + called(("pp", "vocab")),
        "optimizer": phase("optimizer"),
    }
    is_replicated = plan.dp * plan.cp > 1
    measured["data parallel" if is_replicated else "optimizer"] += phase("gradient_sync")
    expected = {
        "compute": sum(predicted[group] for group in _COMPUTE),
        **{name: predicted[name] for name in _INSIDE},
        "data parallel": predicted["data parallel"],
        "pipeline (sends and bubble)": predicted["pipeline sends"] + predicted["pipeline bubble"],
        "optimizer": predicted["optimizer"],
    }
    is_there = {
        "tensor parallel": plan.tp > 1,
        "context parallel": plan.cp > 1,
        "expert parallel": plan.ep * plan.etp > 1,
        "data parallel": is_replicated,
        "pipeline (sends and bubble)": plan.pp > 1,
    }
    in_cpu_time = {
        name: _mean([_cpu_seconds(rank, phases) for rank in ranks])
        for name, phases in (("compute", _COMPUTING), ("optimizer", _UPDATING))
        if device == "cpu"
    }
    terms = [
        _seconds("iteration", prediction.iteration_time, report.step_seconds),
        *(_seconds(name, expected[name], measured[name]) for name in measured if is_there.get(name, True)),
        *(
            _seconds(name + _IN_CPU_TIME, expected[name], seconds)
            for name, seconds in in_cpu_time.items()
            if seconds
        ),
        ComparedTerm(
            name="peak memory",
            predicted=prediction.peak_memory_bytes,
            measured=float(report.peak_memory_bytes),
            unit="B",
        ),
    ]
    return Comparison(
        stage=stage,
        terms=tuple(terms),
        low=prediction.low,
        high=prediction.high,
        is_same_device=is_same_device,
    )


def comparison_mapping(comparison: Comparison, traffic: Sequence[ComparedTraffic] = ()) -> dict[str, object]:
    """Return a comparison as plain data; errors are left out where they mean nothing."""
    terms = []
    for term in comparison.terms:
        error = term.error if comparison.is_same_device else None
        terms.append({**asdict(term), "error": error})
    return {
        "stage": comparison.stage,
        "is_same_device": comparison.is_same_device,
        "predicted_low_seconds": comparison.low,
        "predicted_high_seconds": comparison.high,
        "is_inside_interval": comparison.is_inside if comparison.is_same_device else None,
        "terms": terms,
        "traffic": [{**asdict(each), "is_exact": each.is_exact} for each in traffic],
    }


def _cpu_seconds(rank: RankReport, phases: Collection[str]) -> float:
    """Return the CPU seconds of some phases of a rank."""
    return sum(_median(rank.phase_cpu_seconds.get(name, ())) for name in phases)


def _seconds(name: str, predicted: float, measured: float) -> ComparedTerm:
    return ComparedTerm(name=name, predicted=predicted, measured=measured, unit="s")


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
