"""Fit the constants of a software stack, and the clocks it runs at, to a handful of its own iterations.

Every constant starts at its generation's value with a width of doubt; a few measured iterations move it
(maximum a posteriori). How many constants move is chosen by leave-one-out error, never more than one per two
rows. Time is linear in most constants or their inverses, so fits run on a linear model of the cost model,
renewed about each solution; what is reported is always predicted in full.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.calibration_document import CalibrationDocument, Provenance
from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.software import SoftwareGeneration, load_software, with_constants
from meshwright.errors import CalibrationError, MeshwrightError, SpecError, did_you_mean
from meshwright.profiler.fitting.fittable_constants import FITTABLE_CONSTANTS, FittableConstant
from meshwright.profiler.measured_runs import MeasuredRun
from meshwright.profiler.measured_setup import IncompleteRowError, measured_setup
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.training.iteration import iteration_time

__all__ = [
    "FitError",
    "FittedRun",
    "SoftwareFit",
    "fit_software",
    "software_documents",
]

Vector = NDArray[np.float64]
Rows = NDArray[np.int64]
Indices = tuple[int, ...]

_MIN_ROWS, _ROWS_PER_CONSTANT = 3, 2
# Scatter of measured over predicted time where the constants are right: reruns differ by 1 to 2 % (internevo-44
# and -50), unlike shapes by as much again. Errors beyond it lose weight (Cauchy): some row is always special.
_NOISE = 0.025
# A constant that moves no row by this share at one width is no candidate; nor one the rows leave this near its start.
_SENSITIVITY, _MOVED = 0.005, 0.1
# Two constants are told apart when this share of one's effect on the rows is unlike the other's.
_DISTINCT = 0.1
# One constant more must lower the left-out cost by this share.
_GAIN = 0.05
# Neutral constants are nobody's measurement: wider by this.
_NEUTRAL_DOUBT = 2.0
# Steps end, and a linear model holds, while no constant moves by more of its width.
_MAX_STEPS, _STEP_END = 20, 0.005
_MAX_ROUNDS, _MODEL_RADIUS = 3, 0.2
# Slopes are secants over this share of a width: long enough to see past the kinks of hidden communication.
_SECANT = 0.5
_CLOCK = "sustained_clock."


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedRun:
    """A row: measured, and predicted before the fit, after it, and by a fit without this row [s]."""

    id: str
    measured: float
    before: float
    after: float
    left_out: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FitError:
    """Mean and median of ``|predicted / measured - 1|`` over the rows."""

    mean: float
    median: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftwareFit:
    """The constants of a software stack, and how well they predict its iterations.

    Parameters
    ----------
    generation : str
        The software generation that was the start.
    constants : Mapping[str, float]
        Values by field that replace the generation's.
    sustained_clock : Mapping[str, Mapping[str, float]]
        Fitted clocks by GPU id and number format.
    prior, standard_errors : Mapping[str, float]
        Start and standard error of what was fitted, by name; clocks as ``GPU.sustained_clock.FORMAT``.
    skipped : Mapping[str, str]
        Rows that could not be used, by id, and why.
    gpus : tuple[str, ...]
        Ids of the devices of the rows.
    rows : tuple[FittedRun, ...]
        The rows of the fit.
    """

    generation: str
    constants: Mapping[str, float]
    sustained_clock: Mapping[str, Mapping[str, float]]
    prior: Mapping[str, float]
    standard_errors: Mapping[str, float]
    skipped: Mapping[str, str]
    gpus: tuple[str, ...]
    rows: tuple[FittedRun, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the fit."""
        return len(self.rows)

    @property
    def error_before(self) -> FitError:
        """Error with the constants of the start."""
        return self._error([row.before for row in self.rows])

    @property
    def error_after(self) -> FitError:
        """Error on the rows of the fit itself: optimistic."""
        return self._error([row.after for row in self.rows])

    @property
    def error_left_out(self) -> FitError:
        """Error on each row by a fit without it: what to expect of the next run."""
        return self._error([row.left_out for row in self.rows])

    def apply(self, context: CostContext) -> CostContext:
        """Return a job's context with the fitted constants."""
        return _changed(context, self.constants, self.sustained_clock.get(context.gpu.id, {}))

    def _error(self, predicted: Sequence[float]) -> FitError:
        errors = np.abs(np.array(predicted) / np.array([row.measured for row in self.rows]) - 1.0)
        return FitError(mean=float(errors.mean()), median=float(np.median(errors)))


def fit_software(
    runs: Sequence[MeasuredRun],
    software: str,
    *,
    constants: Sequence[str] | None = None,
    calibration_paths: Sequence[Path] = (),
    prior: Literal["generation", "neutral"] = "generation",
) -> SoftwareFit:
    """Return the constants of a software stack that its measured iterations support.

    Parameters
    ----------
    runs : Sequence[MeasuredRun]
        Measured iterations; 3 to 8 do, unlike in batch, sequence length and number of GPUs.
    software : str
        Generation to start from; wins over the rows' own.
    constants : Sequence[str] | None
        Constants to fit; None chooses them by leave-one-out error.
    calibration_paths : Sequence[Path]
        The user's calibration files; built-in calibrations without any.
    prior : {"generation", "neutral"}
        ``neutral`` starts software constants at the defaults of :class:`SoftwareGeneration`.

    Raises
    ------
    CalibrationError
        If the rows are too few, or cannot tell the wanted constants apart: says how many more it takes.
    SpecError
        If a constant or the software is unknown.
    """
    _require_known(constants or ())
    neutral = _neutral_constants() if prior == "neutral" else {}
    rows, skipped = _usable_rows(runs, software, calibration_paths)
    if len(rows) < _MIN_ROWS:
        reasons = "".join(f"; row {name}: {reason}" for name, reason in skipped.items())
        raise CalibrationError(
            f"fitting {software} takes {_MIN_ROWS} measured iterations or more: {len(rows)} usable, "
            f"{_MIN_ROWS - len(rows)} more needed{reasons}"
        )
    if any(row.context.software != rows[0].context.software for row in rows):
        raise CalibrationError(
            f"the calibrations give {software} other constants on some devices of these rows; a fit shares them: "
            "calibrate each device by itself, or leave those files out"
        )
    problem = _Problem(rows, neutral)
    asked = _supported(problem, constants) if constants else None
    model, chosen = _settled(problem, asked)
    everything = np.arange(len(rows))
    moves = problem.solve(model, chosen, everything)
    left_out = []
    for row in everything:
        others = everything[everything != row]
        without = _selected(problem, model, others) if asked is None else asked
        left_out.append(rows[row].seconds(problem, problem.solve(model, without, others)))
    start = np.zeros_like(moves)
    fitted_constants, clocks = problem.changes(moves)
    return SoftwareFit(
        generation=software,
        constants=fitted_constants,
        sustained_clock=clocks,
        prior={problem.names[index]: float(problem.values(start)[index]) for index in chosen},
        standard_errors=problem.standard_errors(model, chosen, moves),
        skipped=skipped,
        gpus=tuple(dict.fromkeys(row.context.gpu.id for row in rows)),
        rows=tuple(
            FittedRun(
                id=row.id,
                measured=row.measured,
                before=row.seconds(problem, start),
                after=row.seconds(problem, moves),
                left_out=without,
            )
            for row, without in zip(rows, left_out, strict=True)
        ),
    )


def software_documents(fit: SoftwareFit, table: Path, name: str) -> tuple[CalibrationDocument, ...]:
    """Return the fit as calibration documents, one for each device of its rows.

    Parameters
    ----------
    fit : SoftwareFit
        The fit.
    table : Path
        Table of measured runs it was made from.
    name : str
        Name of the documents.
    """
    provenance = Provenance(
        created_by=f"meshwright {importlib.metadata.version('meshwright')}",
        kernels=fit.generation,
        inputs=((table.name, hashlib.sha256(table.read_bytes()).hexdigest(), fit.num_rows),),
    )
    error = fit.error_left_out
    source = f"fit to {fit.num_rows} measured iterations, left-out error {error.mean:.1%} mean"
    return tuple(
        CalibrationDocument(
            name=name,
            gpu=gpu,
            provenance=provenance,
            sustained_clock=fit.sustained_clock.get(gpu, {}),
            software={fit.generation: fit.constants} if fit.constants else {},
            sources={"software": source, "sustained_clock": source},
        )
        for gpu in fit.gpus
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Row:
    id: str
    context: CostContext
    plan: ParallelPlan
    measured: float

    def seconds(self, problem: _Problem, moves: Vector) -> float:
        """Return the predicted iteration after the constants' moves [s]."""
        values = problem.values(moves)
        constants = {
            constant.name: values[i] for i, (constant, gpu) in enumerate(problem.levers) if gpu is None
        }
        clocks = {
            constant.name.removeprefix(_CLOCK): values[i]
            for i, (constant, gpu) in enumerate(problem.levers)
            if gpu == self.context.gpu.id
        }
        context = _changed(self.context, constants, clocks)
        return iteration_time(iteration_costs(context, self.plan), self.plan.schedule)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _LinearModel:
    """Seconds of every row, linear in the natural variables about a centre; slopes are (rows, levers)."""

    seconds: Vector
    centre: Vector
    slopes: Vector


class _Problem:
    """Rows and levers (a constant, and the GPU whose clock it is); moves are counted in prior widths."""

    def __init__(self, rows: Sequence[_Row], neutral: Mapping[str, float]) -> None:
        software = rows[0].context.software
        clocks = {row.context.gpu.id: row.context.calibration.sustained_clock for row in rows}
        known: list[tuple[FittableConstant, str | None, float]] = []
        for constant in FITTABLE_CONSTANTS:
            precision = constant.name.removeprefix(_CLOCK)
            if precision == constant.name:
                known.append((constant, None, neutral.get(precision, getattr(software, precision))))
            known += [(constant, gpu, held[precision]) for gpu, held in clocks.items() if precision in held]
        # Nothing grows from zero by factors.
        known = [each for each in known if each[0].kind == "amount" or each[2] > 0.0]
        self.rows, self.levers = rows, [(constant, gpu) for constant, gpu, _ in known]
        constants = [constant for constant, _ in self.levers]
        self.names = [f"{gpu}.{constant.name}" if gpu else constant.name for constant, gpu in self.levers]
        self.is_amount = np.array([constant.kind == "amount" for constant in constants])
        self.is_rate = np.array([constant.kind == "rate" for constant in constants])
        doubt = _NEUTRAL_DOUBT if neutral else 1.0
        self.width = np.array([each.width * (1.0 if gpu else doubt) for each, gpu in self.levers])
        self.start_values = np.array([start for *_, start in known])
        self.start = self._coordinates(self.start_values)
        # A start outside the bounds is somebody's measurement and widens them.
        low, high = (
            self._coordinates(np.array([getattr(each, end) for each in constants])) for end in ("low", "high")
        )
        self.low = np.minimum((low - self.start) / self.width, 0.0)
        self.high = np.maximum((high - self.start) / self.width, 0.0)
        self.log_measured = np.log([row.measured for row in rows])

    def _coordinates(self, values: Vector) -> Vector:
        coordinates: Vector = np.where(self.is_amount, values, np.log(np.where(self.is_amount, 1.0, values)))
        return coordinates

    def values(self, moves: Vector) -> Vector:
        """Return every constant after its move."""
        shift = self.width * moves
        grown = self.start_values * np.exp(np.where(self.is_amount, 0.0, shift))
        values: Vector = np.where(self.is_amount, self.start + shift, grown)
        return values

    def value_slopes(self, values: Vector) -> Vector:
        """Return how fast constants grow with their moves."""
        slopes: Vector = np.where(self.is_amount, 1.0, values) * self.width
        return slopes

    def linear_model(self, moves: Vector, active: Indices) -> _LinearModel:
        """Return the model about some moves, by one prediction of every row and active lever."""
        seconds = np.array([row.seconds(self, moves) for row in self.rows])
        centre = self._natural(self.values(moves))
        slopes = np.zeros((len(self.rows), len(self.levers)))
        for index in active:
            beside = moves.copy()
            beside[index] += _SECANT if moves[index] + _SECANT <= self.high[index] else -_SECANT
            step = self._natural(self.values(beside))[index] - centre[index]
            for number, row in enumerate(self.rows):
                if self.levers[index][1] in (None, row.context.gpu.id):
                    slopes[number, index] = (row.seconds(self, beside) - seconds[number]) / step
        return _LinearModel(seconds=seconds, centre=centre, slopes=slopes)

    def _natural(self, values: Vector) -> Vector:
        natural: Vector = np.where(self.is_rate, 1.0 / np.where(self.is_rate, values, 1.0), values)
        return natural

    def log_errors(self, model: _LinearModel, moves: Vector) -> tuple[Vector, Vector]:
        """Return ``log(predicted / measured)`` of every row, and its slopes over the moves."""
        values = self.values(moves)
        # Far from its centre a linear model may cross zero.
        seconds = np.maximum(
            model.seconds + model.slopes @ (self._natural(values) - model.centre), 0.05 * model.seconds
        )
        inverse = np.where(self.is_rate, -1.0 / np.where(self.is_rate, values, 1.0) ** 2, 1.0)
        return np.log(seconds) - self.log_measured, (
            model.slopes * (inverse * self.value_slopes(values)) / seconds[:, None]
        )

    def solve(self, model: _LinearModel, chosen: Indices, rows: Rows, near: Vector | None = None) -> Vector:
        """Return the moves of all levers, the chosen ones at their maximum a posteriori (that ``near`` some moves)."""
        start = np.zeros(len(self.levers))
        levers = np.array(chosen, dtype=np.int64)
        if near is not None:
            start[levers] = near[levers]
            return self._descend(model, levers, rows, start, 1.0)
        # Cauchy's loss has several valleys: one is sought from the start, one from where a convex loss ends.
        convex = self._descend(model, levers, rows, start, 0.5)
        ends = [self._descend(model, levers, rows, at, 1.0) for at in (start, convex)]
        return min(ends, key=lambda end: self.cost(model, end, rows))

    def _descend(
        self, model: _LinearModel, levers: NDArray[np.int64], rows: Rows, start: Vector, power: float
    ) -> Vector:
        """Take reweighted Gauss-Newton steps; errors weigh ``(1 + (error / noise)**2) ** -power``."""
        moves, low, high = start.copy(), self.low[levers], self.high[levers]
        for _ in range(_MAX_STEPS):
            errors, slopes = self.log_errors(model, moves)
            scaled, effects, at = errors[rows] / _NOISE, slopes[rows][:, levers] / _NOISE, moves[levers]
            weighted = effects.T * (1.0 + scaled**2) ** -power
            downhill = -(weighted @ scaled + at)
            is_held = ((at <= low) & (downhill < 0.0)) | ((at >= high) & (downhill > 0.0))
            # A lever held at its bound keeps a row of its own, so that it does not move.
            curvature = np.eye(len(levers)) + np.where(is_held[:, None] | is_held, 0.0, weighted @ effects)
            step = np.linalg.solve(curvature, np.where(is_held, 0.0, downhill))
            moves[levers] = np.clip(at + step, low, high)
            if not len(levers) or np.abs(moves[levers] - at).max() < _STEP_END:
                break
        return moves

    def cost(self, model: _LinearModel, moves: Vector, rows: Rows) -> float:
        """Return twice the negative logarithm of the posterior, up to a constant."""
        errors, _ = self.log_errors(model, moves)
        return float(np.log1p((errors[rows] / _NOISE) ** 2).sum() + (moves**2).sum())

    def left_out_cost(self, model: _LinearModel, chosen: Indices, rows: Rows, near: Vector) -> float:
        """Return the mean cost of each row under a fit without it."""
        ends = [self.solve(model, chosen, rows[rows != row], near) for row in rows]
        errors = [self.log_errors(model, end)[0][row] for end, row in zip(ends, rows, strict=True)]
        return float(np.log1p((np.array(errors) / _NOISE) ** 2).mean())

    def sensitive(self, model: _LinearModel) -> Indices:
        """Return the levers that move some row."""
        effects = np.abs(self.log_errors(model, np.zeros(len(self.levers)))[1]).max(axis=0)
        return tuple(np.flatnonzero(effects > _SENSITIVITY).tolist())

    def standard_errors(self, model: _LinearModel, chosen: Indices, moves: Vector) -> dict[str, float]:
        """Return the standard errors of chosen constants: curvature of the posterior at its maximum."""
        errors, slopes = self.log_errors(model, moves)
        effects = slopes[:, chosen] / max(_NOISE, 1.48 * float(np.median(np.abs(errors))))
        spread = np.sqrt(np.diag(np.linalg.inv(effects.T @ effects + np.eye(len(chosen)))))
        scale = self.value_slopes(self.values(moves))[list(chosen)]
        return {self.names[index]: float(each) for index, each in zip(chosen, spread * scale, strict=True)}

    def changes(self, moves: Vector) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Return the software constants that differ from the generation's, and the clocks that moved by GPU."""
        constants: dict[str, float] = {}
        clocks: dict[str, dict[str, float]] = {}
        for (constant, gpu), value, move in zip(self.levers, self.values(moves).tolist(), moves, strict=True):
            if gpu is None and value != getattr(self.rows[0].context.software, constant.name):
                constants[constant.name] = value
            elif gpu is not None and move:
                clocks.setdefault(gpu, {})[constant.name.removeprefix(_CLOCK)] = value
        return constants, clocks


def _settled(problem: _Problem, asked: Indices | None) -> tuple[_LinearModel, Indices]:
    """Return the linear model about the solution, and the levers chosen on it."""
    centre = np.zeros(len(problem.levers))
    model = problem.linear_model(centre, asked or tuple(range(len(problem.levers))))
    active = asked or problem.sensitive(model)
    rows = np.arange(len(problem.rows))
    for _ in range(_MAX_ROUNDS):
        chosen = asked or _selected(problem, model, rows)
        moves = problem.solve(model, chosen, rows)
        if np.abs(moves - centre).max() < _MODEL_RADIUS:
            return model, chosen
        centre, model = moves, problem.linear_model(moves, active)
    return model, asked or _selected(problem, model, rows)


def _selected(problem: _Problem, model: _LinearModel, rows: Rows) -> Indices:
    """Return the levers worth fitting: dropped one by one, as many kept as predict left-out rows best."""
    kept = problem.sensitive(model)
    moves = problem.solve(model, kept, rows)
    kept = tuple(index for index in kept if abs(moves[index]) > _MOVED)
    moves = problem.solve(model, kept, rows, moves)
    path = [(kept, moves)]
    while kept:
        fewer = [tuple(other for other in kept if other != index) for index in kept]
        ends = [problem.solve(model, some, rows, moves) for some in fewer]
        best = min(range(len(fewer)), key=lambda number: problem.cost(model, ends[number], rows))
        kept, moves = fewer[best], ends[best]
        path.append((kept, moves))
    chosen: Indices = ()
    least = np.inf
    for some, near in reversed(path):
        if len(some) <= len(rows) // _ROWS_PER_CONSTANT and not _alike(problem, model, some, rows):
            cost = problem.left_out_cost(model, some, rows, near)
            if cost < (1.0 - _GAIN) * least:
                chosen, least = some, cost
    return chosen


def _supported(problem: _Problem, constants: Sequence[str]) -> Indices:
    """Return the levers of the wanted constants; refuse what the rows cannot tell."""
    num_rows = len(problem.rows)
    asked = tuple(index for index, (constant, _) in enumerate(problem.levers) if constant.name in constants)
    held = {problem.levers[index][0].name for index in asked}
    idle = [name for name in dict.fromkeys(constants) if name not in held]
    missing = _ROWS_PER_CONSTANT * len(asked) - num_rows
    if missing > 0:
        raise CalibrationError(
            f"{len(asked)} constants take {num_rows + missing} measured iterations, two each: {missing} more needed"
        )
    model = problem.linear_model(np.zeros(len(problem.levers)), asked)
    idle += [problem.names[index] for index in asked if index not in problem.sensitive(model)]
    if idle:
        raise CalibrationError(
            f"no measured iteration depends on {', '.join(idle)}: leave it out, or add 2 rows that do"
        )
    alike = _alike(problem, model, asked, np.arange(num_rows))
    if alike:
        raise CalibrationError(
            f"{' and '.join(alike)} change all {num_rows} measured iterations alike and cannot be told apart: fit "
            "one of them, or add 1 row that one changes far more (another batch, sequence length, number of GPUs)"
        )
    return asked


def _alike(problem: _Problem, model: _LinearModel, some: Indices, rows: Rows) -> tuple[str, ...]:
    """Return two of the levers that change the rows alike, or nothing when all can be told apart."""
    effects = problem.log_errors(model, np.zeros(len(problem.levers)))[1][rows][:, some]
    norms = np.linalg.norm(effects, axis=0)
    if len(some) < 2 or not norms.all():
        return ()
    _, strengths, directions = np.linalg.svd(effects / norms)
    alike = np.argsort(-np.abs(directions[-1]))[:2] if strengths[-1] < _DISTINCT else ()
    return tuple(problem.names[some[index]] for index in alike)


def _changed(context: CostContext, constants: Mapping[str, float], clock: Mapping[str, float]) -> CostContext:
    calibration = context.calibration
    return replace(
        context,
        software=with_constants(context.software, {"all": constants}),
        calibration=replace(calibration, sustained_clock={**calibration.sustained_clock, **clock}),
    )


def _require_known(constants: Sequence[str]) -> None:
    names = [constant.name for constant in FITTABLE_CONSTANTS]
    for name in constants:
        if name not in names:
            raise SpecError(
                f"constants: '{name}' cannot be fitted{did_you_mean(name, names) or '.'} Known: {', '.join(names)}"
            )


def _neutral_constants() -> dict[str, float]:
    return {each.name: each.default for each in fields(SoftwareGeneration) if isinstance(each.default, float)}


def _usable_rows(
    runs: Sequence[MeasuredRun], software: str, calibration_paths: Sequence[Path]
) -> tuple[tuple[_Row, ...], dict[str, str]]:
    """Return the rows that state a time and a whole setup, and why the others do not serve."""
    load_software(software)
    rows, skipped = [], {}
    for run in runs:
        if run.measured != "time" or run.measured_seconds is None:
            skipped[run.id] = "states no measured time"
            continue
        try:
            setup = measured_setup(replace(run, cells={**run.cells, "software": software}))
            context = cost_context(
                setup.job,
                features=setup.features,
                attention_kernel=setup.attention_kernel,
                calibration_paths=calibration_paths,
            )
        except (IncompleteRowError, MeshwrightError) as error:
            skipped[run.id] = str(error)
            continue
        rows.append(_Row(id=run.id, context=context, plan=setup.plan, measured=run.measured_seconds))
    return tuple(rows), skipped
