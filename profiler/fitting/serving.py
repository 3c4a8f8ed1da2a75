"""Fit the constants of a serving engine to measured runs: each candidate value is judged by simulating the runs.

A closed loop answers to its constants with jumps (a prompt more or less in a step), so the search is by coordinates:
steps of a constant's own size, grown and shrunk, never a derivative.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from meshwright.costmodels.calibration_document import CalibrationDocument, Provenance
from meshwright.costmodels.serving.constants import FITTABLE, EngineConstants
from meshwright.errors import CalibrationError, SpecError, did_you_mean
from meshwright.profiler.serving_runs import ServingRun, serving_setup
from meshwright.profiler.serving_validation import ScoredServingRun, ServingValidator

__all__ = [
    "DEFAULT_CONSTANTS",
    "FittedServingRun",
    "ServingFit",
    "fit_engine",
    "search_constants",
    "serving_document",
]

DEFAULT_CONSTANTS = (
    "step_latency",
    "host_time_per_sequence",
    "eager_kernel_time",
    "max_num_batched_tokens",
    "response_latency",
    "kernel_time",
)
"""In the order in which rows pay for them: a decode at low concurrency shows the first, one at 64 clients the second,
a prompt-heavy run the next two."""
_LEAST_ROWS = 3
# First step of each constant; token counts are tried as powers of two.
_STEPS: Mapping[str, float] = {
    "kernel_time": 1e-6,
    "elementwise_factor": 0.5,
    "step_latency": 3e-4,
    "logit_bytes": 8.0,
    "host_time": 1e-3,
    "host_time_per_sequence": 2e-5,
    "host_time_per_prompt": 5e-4,
    "serial_draft_time": 1e-4,
    "eager_kernel_time": 1e-5,
    "request_time": 1e-3,
    "token_time": 2e-5,
    "response_latency": 5e-3,
    "expert_factor": 0.05,
    "prefill_attention_factor": 0.1,
    "decode_skew": 0.1,
    "mixed_decode_factor": 0.2,
}
# A kernel replayed from a graph starts half a microsecond after the one before it and runs no shorter than that (Gray,
# "Getting Started with CUDA Graphs", NVIDIA 2019); a share of measured kernels is never near nothing.
_LOWEST: Mapping[str, float] = {"kernel_time": 1e-6, "expert_factor": 0.1, "prefill_attention_factor": 0.1}
_BUDGETS = (1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
_PROMPTS = (0.0, 1.0, 2.0, 4.0, 8.0)
# Time per token is what sizing rests on; the time to the first also holds the benchmark's own start-up.
_TTFT_WEIGHT = 0.25
_WORST_TPOT, _WORST_TTFT = 0.5, 1.0
# A row without a prediction costs as much as the worst error.
_MISSING = _WORST_TPOT + _TTFT_WEIGHT * _WORST_TTFT
_GAIN = 1e-4
# Steps that one constant may take in a round while they pay.
_STRIDES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedServingRun:
    """Signed errors of one row before and after the fit, as shares of the measured value."""

    id: str
    tpot_before: float
    tpot_after: float
    ttft_before: float
    ttft_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingFit:
    """Constants of an engine fitted to runs, and the errors they leave.

    Parameters
    ----------
    engine, gpu : str
        Engine of the rows, and the device's id.
    constants, prior : Mapping[str, float]
        Fitted values, and where they started.
    rows : tuple[FittedServingRun, ...]
        The rows of the fit.
    skipped : Mapping[str, str]
        Rows that could not be used, by id, and why.
    """

    engine: str
    gpu: str
    constants: Mapping[str, float]
    prior: Mapping[str, float]
    rows: tuple[FittedServingRun, ...]
    skipped: Mapping[str, str]


def fit_engine(
    runs: Sequence[ServingRun],
    *,
    constants: Sequence[str] = (),
    calibration_paths: Sequence[Path] = (),
    seed: int = 0,
) -> ServingFit:
    """Return the constants of an engine that explain a few of the user's own runs best.

    Parameters
    ----------
    runs : Sequence[ServingRun]
        Rows of one engine on one device, at least three: a decode at low concurrency, a decode-heavy run at 64
        clients and a prompt-heavy one tell most.
    constants : Sequence[str]
        What to fit; one constant per row at most. Empty takes the first of :data:`DEFAULT_CONSTANTS`.
    calibration_paths : Sequence[Path]
        The user's calibrations to start from.
    seed : int
        Of the lengths of requests.

    Raises
    ------
    CalibrationError
        If there are fewer rows than the fit needs, or they are of several engines or devices.
    SpecError
        If a constant is unknown.
    """
    for name in constants:
        if name not in FITTABLE:
            raise SpecError(f"unknown engine constant '{name}'{did_you_mean(name, FITTABLE)}")
    validator = ServingValidator(calibration_paths, seed=seed)
    before = [validator.score(run) for run in runs]
    usable = [row for row in before if row.ttft is not None and row.tpot is not None]
    skipped = {row.run.id: row.reason or "no prediction" for row in before if row not in usable}
    if len(usable) < _LEAST_ROWS:
        raise CalibrationError(
            f"{len(usable)} usable runs, and a fit needs {_LEAST_ROWS}: measure a decode at low concurrency, a "
            "decode-heavy run at 64 clients and a prompt-heavy one"
            + "".join(f"; {name}: {reason}" for name, reason in skipped.items())
        )
    if len(constants) > len(usable):
        raise CalibrationError(
            f"{len(usable)} runs do not support {len(constants)} constants; measure "
            f"{len(constants) - len(usable)} more, or fit fewer"
        )
    engine, gpu = _only(usable)
    names = tuple(constants) or DEFAULT_CONSTANTS[: len(usable)]
    rows = [row.run for row in usable]
    prior_of = validator.served(serving_setup(rows[0])).constants
    prior = {name: float(getattr(prior_of, name)) for name in names}
    fitted = search_constants(rows, names, prior, calibration_paths=calibration_paths, seed=seed)
    after = _score(rows, fitted, calibration_paths, seed)
    return ServingFit(
        engine=engine,
        gpu=gpu,
        constants=fitted,
        prior=prior,
        rows=tuple(_fitted_run(*pair) for pair in zip(usable, after, strict=True)),
        skipped=skipped,
    )


def search_constants(
    runs: Sequence[ServingRun],
    names: Sequence[str],
    start: Mapping[str, float],
    *,
    rounds: int = 3,
    calibration_paths: Sequence[Path] = (),
    seed: int = 0,
) -> dict[str, float]:
    """Return the values of constants under which simulated runs come closest to measured ones.

    Parameters
    ----------
    runs : Sequence[ServingRun]
        What was measured.
    names : Sequence[str]
        Constants that move; those in ``start`` beside them stay where they are.
    start : Mapping[str, float]
        First values.
    rounds : int
        Passes over all constants; later ones take smaller steps.
    calibration_paths, seed : Sequence[Path], int
        As for :func:`fit_engine`.
    """
    values = dict(start)
    trial = _Trial(runs, calibration_paths, seed)
    best = trial.cost(values)
    for index in range(rounds):
        for name in names:
            for _ in range(_STRIDES):
                before = best
                for candidate in _candidates(name, values[name], 2.0**-index):
                    cost = trial.cost({**values, name: candidate})
                    if cost < best - _GAIN:
                        best, values[name] = cost, candidate
                if best == before:
                    break
    return values


def serving_document(fit: ServingFit, table: Path, name: str) -> CalibrationDocument:
    """Return the fit as a calibration that ``--calibration`` takes."""
    content = table.read_bytes()
    return CalibrationDocument(
        name=name,
        gpu=fit.gpu,
        provenance=Provenance(
            created_by=f"meshwright {importlib.metadata.version('meshwright')}",
            inputs=((table.name, hashlib.sha256(content).hexdigest(), len(fit.rows)),),
        ),
        software={f"serving-{fit.engine}": dict(fit.constants)},
    )


class _Trial:
    """Scores sets of constants; kernels are loaded and products priced once."""

    def __init__(self, runs: Sequence[ServingRun], calibration_paths: Sequence[Path], seed: int) -> None:
        self._runs = runs
        self._values: Mapping[str, float] = {}
        self._validator = ServingValidator(calibration_paths, constants=self._changed, seed=seed)

    def cost(self, values: Mapping[str, float]) -> float:
        self._values = values
        self._validator.forget_tables()
        return float(np.mean([_cost(self._validator.score(run)) for run in self._runs]))

    def _changed(self, constants: EngineConstants) -> EngineConstants:
        return replace(constants, **self._values)  # type: ignore[arg-type]  # number fields only


def _score(
    runs: Sequence[ServingRun], values: Mapping[str, float], paths: Sequence[Path], seed: int
) -> list[ScoredServingRun]:
    def changed(constants: EngineConstants) -> EngineConstants:
        return replace(constants, **values)  # type: ignore[arg-type]  # number fields only

    validator = ServingValidator(paths, constants=changed, seed=seed)
    return [validator.score(run) for run in runs]


def _cost(row: ScoredServingRun) -> float:
    if row.tpot_error is None or row.ttft_error is None:
        return _MISSING
    return min(abs(row.tpot_error), _WORST_TPOT) + _TTFT_WEIGHT * min(abs(row.ttft_error), _WORST_TTFT)


def _candidates(name: str, value: float, shrink: float) -> list[float]:
    """Return values to try in place of one; none below zero."""
    if name == "max_num_batched_tokens":
        return [budget for budget in _BUDGETS if budget != value]
    if name == "prompts_per_step":
        return [count for count in _PROMPTS if count != value]
    step = _STEPS.get(name, 0.1 * max(abs(value), 1.0)) * shrink
    tried = [value - step, value + step, value - 0.3 * step, value + 0.3 * step, 0.6 * value, 2.0 * value]
    kept = {float(f"{candidate:.4g}") for candidate in (*tried, 0.0 if value > 0.0 else value)}
    lowest = _LOWEST.get(name, 0.0)
    return sorted(candidate for candidate in kept if candidate >= lowest and candidate != value)


def _only(rows: Sequence[ScoredServingRun]) -> tuple[str, str]:
    engines = sorted({row.run.cell("engine") for row in rows})
    gpus = sorted({serving_setup(row.run).cluster.gpu.id for row in rows})
    if len(engines) > 1 or len(gpus) > 1:
        raise CalibrationError(
            f"the runs are of {', '.join(engines)} on {', '.join(gpus)}; calibrate each engine and device with a "
            "table of its own"
        )
    return engines[0], gpus[0]


def _fitted_run(before: ScoredServingRun, after: ScoredServingRun) -> FittedServingRun:
    errors = [
        error if error is not None else float("nan")
        for error in (before.tpot_error, after.tpot_error, before.ttft_error, after.ttft_error)
    ]
    return FittedServingRun(
        id=before.run.id,
        tpot_before=errors[0],
        tpot_after=errors[1],
        ttft_before=errors[2],
        ttft_after=errors[3],
    )
