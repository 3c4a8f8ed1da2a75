"""Score predictions against measured runs, row by row and source by source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from meshwright.costmodels.context import cost_context
from meshwright.costmodels.prediction import Prediction, predict
from meshwright.errors import MeshwrightError
from meshwright.profiler.measured_runs import MeasuredRun
from meshwright.profiler.measured_setup import (
    IncompleteRowError,
    MeasuredSetup,
    UnstatedError,
    measured_setup,
)

__all__ = [
    "RESULT_COLUMNS",
    "ErrorSummary",
    "Quantity",
    "ScoredRun",
    "Status",
    "score_run",
    "score_runs",
    "summarise",
]

Status = Literal["scored", "skipped", "infeasible"]
Quantity = Literal["time", "memory"]

RESULT_COLUMNS = (
    "id",
    "source",
    "status",
    "reason",
    "measured_seconds",
    "predicted_seconds",
    "predicted_low_seconds",
    "predicted_high_seconds",
    "measured_memory_gib",
    "predicted_memory_gib",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredRun:
    """One row with what it was taken to mean and its prediction, or the reason why there is none.

    ``is_complete`` is False where the row leaves blank what a prediction needs.
    """

    run: MeasuredRun
    status: Status
    reason: str
    setup: MeasuredSetup | None
    prediction: Prediction | None
    is_complete: bool = True

    @property
    def is_scorable(self) -> bool:
        """Whether the row states its plan, and a time, a memory or an out-of-memory to compare with."""
        run = self.run
        if not self.is_complete:
            return False
        if run.measured == "time":
            return run.measured_seconds is not None
        return run.measured == "oom" or (run.measured == "memory" and run.measured_memory_bytes is not None)

    @property
    def time_error(self) -> float | None:
        """Predicted over measured seconds minus 1; None without both."""
        if self.prediction is None or self.run.measured != "time" or self.run.measured_seconds is None:
            return None
        return self.prediction.iteration_time / self.run.measured_seconds - 1.0

    @property
    def is_in_interval(self) -> bool | None:
        """Whether the measured time lies in the predicted 80 % interval; None without both."""
        if self.prediction is None or self.run.measured != "time" or self.run.measured_seconds is None:
            return None
        return self.prediction.low <= self.run.measured_seconds <= self.prediction.high

    @property
    def is_wrongly_infeasible(self) -> bool:
        """Whether the run is predicted not to fit, though it ran."""
        return self.status == "infeasible" and self.run.measured != "oom"

    @property
    def predicted_memory_bytes(self) -> float | None:
        """Peak of the fullest rank as the row's ``memory_kind`` reads it; None without a prediction.

        What is allocated are tensors: neither context, communicators and workspaces nor what the allocator reserves.
        """
        if self.prediction is None:
            return None
        kind, memory = self.run.cell("memory_kind"), self.prediction.memory
        if not kind.startswith("allocated"):
            return self.prediction.peak_memory_bytes
        tensors = memory.total - memory.framework
        return float(tensors[-1] if kind == "allocated_last_rank" else tensors.max())

    @property
    def memory_error(self) -> float | None:
        """Predicted over measured memory minus 1; None without both."""
        if self.predicted_memory_bytes is None or self.run.measured_memory_bytes is None:
            return None
        return self.predicted_memory_bytes / self.run.measured_memory_bytes - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSummary:
    """Errors of a group of rows, as shares of the measured value.

    Parameters
    ----------
    num_scored, num_scorable : int
        Rows with a prediction, and rows that state something to compare with.
    num_wrongly_infeasible : int
        Rows that ran though they are predicted not to fit.
    mean, median, p90, bias : float | None
        Mean, median and 90th percentile of the absolute error, median signed error; None without a row.
    in_interval : float | None
        Share of the scored rows whose measured time lies in the predicted 80 % interval; None for memory,
        which is predicted without an interval.
    """

    name: str
    num_scored: int
    num_scorable: int
    num_wrongly_infeasible: int
    mean: float | None
    median: float | None
    p90: float | None
    bias: float | None
    in_interval: float | None

    @property
    def coverage(self) -> float:
        """Scored over scorable rows; 1 when nothing is scorable."""
        return self.num_scored / self.num_scorable if self.num_scorable else 1.0


def score_run(run: MeasuredRun, calibration_paths: Sequence[Path] = ()) -> ScoredRun:
    """Return the prediction of one row, or why it has none."""
    try:
        setup = measured_setup(run)
        context = cost_context(
            setup.job,
            features=setup.features,
            attention_kernel=setup.attention_kernel,
            calibration_paths=calibration_paths,
        )
        prediction = predict(context, setup.plan)
    except (IncompleteRowError, MeshwrightError) as error:
        return ScoredRun(
            run=run,
            status="skipped",
            reason=str(error),
            setup=None,
            prediction=None,
            is_complete=not isinstance(error, UnstatedError),
        )
    remarks = list(setup.remarks)
    if context.calibration.is_estimate:
        remarks.append(context.calibration.reason)
    status: Status = "scored"
    if prediction.memory_headroom < 0:
        status = "infeasible"
        remarks.insert(
            0,
            f"predicted {prediction.peak_memory_bytes / 2**30:.1f} GiB of "
            f"{prediction.usable_memory_bytes / 2**30:.1f} GiB usable",
        )
    return ScoredRun(run=run, status=status, reason="; ".join(remarks), setup=setup, prediction=prediction)


def score_runs(
    runs: Sequence[MeasuredRun], calibration_paths: Sequence[Path], progress: Callable[[str, int, int], None]
) -> tuple[ScoredRun, ...]:
    """Return every row scored, in order."""
    scored = []
    for index, run in enumerate(runs, start=1):
        scored.append(score_run(run, calibration_paths))
        progress("predicting runs", index, len(runs))
    return tuple(scored)


def summarise(name: str, rows: Sequence[ScoredRun], quantity: Quantity) -> ErrorSummary:
    """Return the errors of some rows; ``time`` counts timed rows, ``memory`` those with a measured memory."""
    if quantity == "time":
        scorable = [row for row in rows if row.run.measured == "time" and row.is_scorable]
        errors = [row.time_error for row in scorable]
    else:
        scorable = [row for row in rows if row.run.measured_memory_bytes is not None]
        errors = [row.memory_error for row in scorable]
    known = np.array([error for error in errors if error is not None])
    inside = [row.is_in_interval for row in scorable if row.is_in_interval is not None]
    size = np.abs(known)
    return ErrorSummary(
        name=name,
        num_scored=len(known),
        num_scorable=len(scorable),
        num_wrongly_infeasible=sum(row.is_wrongly_infeasible for row in rows),
        mean=float(size.mean()) if len(known) else None,
        median=float(np.median(size)) if len(known) else None,
        p90=float(np.percentile(size, 90)) if len(known) else None,
        bias=float(np.median(known)) if len(known) else None,
        in_interval=float(np.mean(inside)) if inside and quantity == "time" else None,
    )
