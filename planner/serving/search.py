"""The search for the best serving plan: bounds of everything, then simulation from the likeliest down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import InfeasiblePlanError
from meshwright.planner.serving.job_file import ServingRequest
from meshwright.planner.serving.load_search import LoadBracket, LoadPoint, highest_load, violated
from meshwright.planner.serving.ranking import Unit, UnitColumns, rank_units, unit_of_row
from meshwright.planner.serving.sizing import Sizing
from meshwright.planner.serving.space import CandidateSpace
from meshwright.planner.serving.target import without_refused
from meshwright.simcore.domain.serving import ServingPlan, ServingPool

__all__ = [
    "RankedUnit",
    "SearchOutcome",
    "UnitSimulator",
    "binding_names",
    "is_closed_loop",
    "load_runner",
    "most_load",
    "search_units",
    "unit_value",
    "whole_plan",
]

IntArray = NDArray[np.int64]
Progress = Callable[[str, int, int], None]
# Share of a load that may stay unknown: while candidates are sorted out, and between the last two.
_COARSE, _FINE = 0.06, 0.02
# Rounds in which the two best are measured again: they may change places with others.
_MAX_RECOUNTS = 3
# Shapes tried on fewer GPUs than the ranked ones need for the stated load.
_MAX_CHEAP = 8
# Configurations simulated before rivals whose bound is above the winner are left out.
_MAX_SIMULATED = 100
# Shapes ranked where none is simulated.
_NUM_BY_BOUND = 100


class UnitSimulator(Protocol):
    """Simulates one unit of a plan."""

    def run(self, plan: ServingPlan, load: float, clients: float, *, is_thorough: bool = False) -> LoadPoint:
        """Return what a load comes to; ``clients`` is how many requests are expected under way at once."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankedUnit:
    """A simulated configuration.

    Parameters
    ----------
    unit : Unit
        The configuration with its bound.
    bracket : LoadBracket
        Its highest load within the limits.
    value : float
        The objective at that load; -inf where no load keeps the limits.
    plan : ServingPlan
        All units of it that the objective deploys.
    """

    unit: Unit
    bracket: LoadBracket
    value: float
    plan: ServingPlan

    @property
    def point(self) -> LoadPoint:
        """The highest load that keeps the limits."""
        assert self.bracket.best is not None
        return self.bracket.best

    @property
    def num_units(self) -> int:
        """Units deployed."""
        return self.plan.num_gpus // self.unit.plan.num_gpus


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SearchOutcome:
    """What a search found.

    Parameters
    ----------
    ranked : tuple[RankedUnit, ...]
        Simulated configurations that keep the limits, best first, one a shape.
    units : UnitColumns
        All configurations by bound.
    space : CandidateSpace
        What was searched.
    num_simulated, num_runs : int
        Configurations and loads simulated.
    is_certified : bool
        No configuration that was not simulated may beat the winner's simulated value by its bound.
    highest_unsimulated : float
        The best bound of the objective among configurations that were not simulated; -inf where all were.
    is_separated : bool
        The winner's value is above the highest that the runner-up can still have.
    binding : Mapping[str, int]
        What stopped the simulated configurations, by name.
    missed : tuple[RankedUnit, ...]
        Simulated configurations that keep the limits at no load.
    cheapest : RankedUnit | None
        A plan that carries the stated load on the fewest GPUs; None where nothing does, or nothing was simulated.
    """

    ranked: tuple[RankedUnit, ...]
    units: UnitColumns
    space: CandidateSpace
    num_simulated: int
    num_runs: int
    is_certified: bool
    highest_unsimulated: float
    is_separated: bool
    binding: Mapping[str, int] = field(default_factory=dict)
    missed: tuple[RankedUnit, ...] = ()
    cheapest: RankedUnit | None = None


def is_closed_loop(request: ServingRequest) -> bool:
    """Return whether the load of a request counts clients."""
    return request.job.workload.arrival == "closed_loop"


def whole_plan(unit: ServingPlan, num_units: int) -> ServingPlan:
    """Return a plan of so many units."""
    pools: tuple[ServingPool, ...] = tuple(
        replace(pool, num_replicas=pool.num_replicas * num_units) for pool in unit.pools
    )
    return replace(unit, pools=pools)


def unit_gpus(unit: ServingPlan) -> tuple[IntArray, IntArray]:
    """Return the GPUs of a unit, and those of them in its prefill pool, as columns of one row."""
    first = unit.pools[0].num_gpus if unit.is_disaggregated else 0
    return np.array([unit.num_gpus]), np.array([first])


def unit_value(sizing: Sizing, point: LoadPoint | None, unit: ServingPlan) -> float:
    """Return the objective of a unit at a load it keeps; -inf for none, or where its units cannot carry the demand."""
    if point is None:
        return -np.inf
    gpus, load = unit_gpus(unit), np.array([point.load])
    if not bool(sizing.carries_demand(load, *gpus)[0]):
        return -np.inf
    return float(sizing.values(np.array([point.rate]), load, *gpus)[0])


def most_load(request: ServingRequest, unit: Unit) -> float:
    """Return the highest load worth simulating: the bound, as whole clients where they are counted."""
    return max(1.0, float(np.ceil(unit.load))) if is_closed_loop(request) else unit.load


def load_runner(
    request: ServingRequest,
    sizing: Sizing,
    simulator: UnitSimulator,
    unit: Unit,
    *,
    is_thorough: bool = False,
) -> Callable[[float], LoadPoint]:
    """Return the function that simulates a unit at a load; a request too long for its cache breaks every limit."""
    seconds = unit.ttft + (sizing.mean_output - 1.0) * unit.tpot
    is_whole = is_closed_loop(request)

    def run(load: float) -> LoadPoint:
        clients = load if is_whole else load * seconds
        try:
            return simulator.run(unit.plan, load, clients, is_thorough=is_thorough)
        except InfeasiblePlanError:
            # Among more requests than the bounds looked at one may be too long for the cache.
            metrics = {limit.name: np.inf for limit in request.job.slo.limits}
            return LoadPoint(load=load, rate=0.0, metrics=metrics, figures={}, is_stable=False)

    return run


class _Search:
    """State of one search: what was simulated so far."""

    def __init__(
        self,
        request: ServingRequest,
        sizing: Sizing,
        space: CandidateSpace,
        units: UnitColumns,
        simulator: UnitSimulator,
    ) -> None:
        self.request, self.sizing, self.space, self.units = request, sizing, space, units
        self.simulator = simulator
        self.is_whole = is_closed_loop(request)
        self.found: dict[int, RankedUnit] = {}
        self.missed: list[RankedUnit] = []
        self.simulated: set[int] = set()
        self.measured: dict[ServingPlan, RankedUnit] = {}
        self.num_runs = 0

    def load_to_beat(self, unit: Unit, value: float) -> float:
        """Return a load below which a unit cannot reach a value; 0 where that cannot be said."""
        if not np.isfinite(value):
            return 0.0
        if self.sizing.objective == "cost":
            # As many units as the GPUs of that value hold must carry the demand.
            num_units = int(np.ceil(-value)) // unit.plan.num_gpus
            return 0.98 * self.sizing.demand / num_units if num_units else 0.0
        if unit.value <= 0.0 or value <= 0.0:
            return 0.0
        # Goodput and throughput are proportional to the rate, and nearly so to the load.
        return unit.load * min(0.98, value / unit.value) * 0.98

    def simulate(self, row: int, to_beat: float, *, is_thorough: bool = False) -> RankedUnit:
        unit = unit_of_row(self.request, self.space, self.units, row)
        self.simulated.add(row)
        bracket = highest_load(
            self.runner(unit, is_thorough=is_thorough),
            self.request.job.slo,
            upper=most_load(self.request, unit),
            to_beat=self.load_to_beat(unit, to_beat),
            tolerance=_FINE if is_thorough else _COARSE,
            is_whole=self.is_whole,
        )
        return self.ranked(unit, bracket)

    def runner(self, unit: Unit, *, is_thorough: bool = False) -> Callable[[float], LoadPoint]:
        run = load_runner(self.request, self.sizing, self.simulator, unit, is_thorough=is_thorough)

        def counted(load: float) -> LoadPoint:
            self.num_runs += 1
            return run(load)

        return counted

    def ranked(self, unit: Unit, bracket: LoadBracket) -> RankedUnit:
        value = unit_value(self.sizing, bracket.best, unit.plan)
        num_units = 1
        if bracket.best is not None and np.isfinite(value):
            load = np.array([bracket.best.load])
            num_units = int(self.sizing.num_units(load, *unit_gpus(unit.plan))[0])
        return RankedUnit(unit=unit, bracket=bracket, value=value, plan=whole_plan(unit.plan, num_units))

    def keep(self, ranked: RankedUnit) -> None:
        shape = ranked.unit.shape
        if not np.isfinite(ranked.value):
            if not ranked.bracket.is_beaten:
                self.missed.append(ranked)
        elif shape not in self.found or ranked.value > self.found[shape].value:
            self.found[shape] = ranked

    def best(self) -> list[RankedUnit]:
        return sorted(self.found.values(), key=lambda ranked: (-ranked.value, ranked.unit.plan.num_gpus))

    def highest_unsimulated(self) -> float:
        """Return the best bound among configurations that were not simulated; -inf where all were."""
        is_open = np.ones(len(self.units), dtype=np.bool_)
        is_open[list(self.simulated)] = False
        return float(self.units.value[is_open].max(initial=-np.inf))

    def highest_value(self, ranked: RankedUnit) -> float:
        """Return the value a configuration would have at the lowest load that was seen to fail."""
        failing, best = ranked.bracket.failing, ranked.bracket.best
        if failing is None or best is None or not np.isfinite(ranked.value):
            return ranked.value
        there = replace(best, load=failing.load, rate=best.rate * failing.load / best.load)
        return unit_value(self.sizing, there, ranked.unit.plan)


def search_units(
    request: ServingRequest,
    sizing: Sizing,
    space: CandidateSpace,
    simulator: UnitSimulator,
    progress: Progress,
    *,
    num_shapes: int = 5,
    max_simulated: int = 10,
) -> SearchOutcome:
    """Return the best configurations of a space.

    Parameters
    ----------
    request, sizing, space :
        The job, what is best, and the candidates.
    simulator : UnitSimulator
        Runs one unit at one load.
    progress : Progress
        Told ``(phase, done, total)``.
    num_shapes : int
        Shapes that are simulated at least, where there are so many; 0 ranks by the bounds alone.
    max_simulated : int
        Shapes that are simulated at most, and other settings of the best two.
    """
    units = rank_units(space, sizing, is_closed_loop(request))
    units = without_refused(units, request, space)
    search = _Search(request, sizing, space, units, simulator)
    if num_shapes == 0:
        return _by_bound(search)
    _simulate_shapes(search, num_shapes, max_simulated, progress)
    _tune_best(search, max_simulated, progress)
    _separate(search)
    _rule_out(search, progress)
    is_separated = _separate(search)
    cheapest = _cheapest(search)
    best = search.best()
    highest = search.highest_unsimulated()
    binding: dict[str, int] = {}
    for ranked in [*best, *search.missed]:
        for name in binding_names(ranked, request):
            binding[name] = binding.get(name, 0) + 1
    return SearchOutcome(
        ranked=tuple(best),
        units=units,
        space=space,
        num_simulated=len(search.simulated),
        num_runs=search.num_runs,
        is_certified=bool(best) and not sizing.may_beat(highest, best[0].value),
        highest_unsimulated=highest,
        is_separated=is_separated,
        binding=binding,
        missed=tuple(search.missed),
        cheapest=cheapest,
    )


def _by_bound(search: _Search) -> SearchOutcome:
    """Return the best shapes by their bounds, unsimulated."""
    units = search.units
    _, first = np.unique(units.shape, return_index=True)
    first.sort()
    ranked = []
    for row in first[:_NUM_BY_BOUND]:
        unit = unit_of_row(search.request, search.space, units, int(row))
        point = LoadPoint(
            load=unit.load,
            rate=unit.rate,
            metrics={"ttft_mean": unit.ttft, "tpot_mean": unit.tpot},
            figures={"output_tokens_per_second": unit.rate * search.sizing.mean_output},
        )
        ranked.append(search.ranked(unit, LoadBracket(best=point, failing=None, num_runs=0)))
    return SearchOutcome(
        ranked=tuple(ranked),
        units=units,
        space=search.space,
        num_simulated=0,
        num_runs=0,
        is_certified=False,
        highest_unsimulated=search.highest_unsimulated(),
        is_separated=False,
    )


def binding_names(ranked: RankedUnit, request: ServingRequest) -> tuple[str, ...]:
    """Return the limits that the lowest failing load broke; what stops the bound where none failed."""
    failing = ranked.bracket.failing
    return (ranked.unit.cause,) if failing is None else violated(failing, request.job.slo)


def _simulate_shapes(search: _Search, num_shapes: int, max_simulated: int, progress: Progress) -> None:
    """Simulate the likeliest configuration of each shape whose bound is better.

    The first ``num_shapes`` differ in more than the prefill side, so that one decode pool fed in many ways does not fill
    the table, and the best of each mode is among them.
    """
    units = search.units
    first = _first_rows(units, num_shapes)
    best = -np.inf
    for row in first:
        progress("simulated", len(search.simulated), 0)
        ranked = search.simulate(row, -np.inf)
        search.keep(ranked)
        best = max(best, ranked.value)
    seen = {int(units.shape[row]) for row in first}
    for row in units.rows():
        shape = int(units.shape[row])
        if shape in seen or (search.found and not search.sizing.may_beat(units.value[row], best)):
            continue
        if len(search.simulated) >= max_simulated:
            return
        seen.add(shape)
        progress("simulated", len(search.simulated), 0)
        ranked = search.simulate(row, best)
        search.keep(ranked)
        best = max(best, ranked.value)


def _first_rows(units: UnitColumns, num_shapes: int) -> list[int]:
    """Return the best row of each of so many families, and of each mode."""
    family = units.decode_shape * 2 + (units.prefill >= 0)
    _, first = np.unique(family, return_index=True)
    first.sort()
    rows = [int(row) for row in first[:num_shapes]]
    for is_disaggregated in (False, True):
        of_mode = np.flatnonzero((units.prefill >= 0) == is_disaggregated)
        if len(of_mode) and not np.isin(of_mode, rows).any():
            rows.append(int(of_mode[0]))
    return rows


def _tune_best(search: _Search, max_simulated: int, progress: Progress) -> None:
    """Try the other scheduler settings of the two best shapes, best bound first."""
    limit = len(search.simulated) + max_simulated
    for ranked in search.best()[:2]:
        for row in np.flatnonzero(search.units.shape == ranked.unit.shape):
            best = search.best()[0].value
            if len(search.simulated) >= limit:
                break
            if int(row) not in search.simulated and search.units.value[row] > best:
                progress("simulated", len(search.simulated), 0)
                search.keep(search.simulate(int(row), best))


def _rule_out(search: _Search, progress: Progress) -> None:
    """Hold what was not simulated against the winner, best bound first, mostly with one run each."""
    values = search.units.value
    for row in np.argsort(-values, kind="stable"):
        best = search.best()
        if not best or len(search.simulated) >= _MAX_SIMULATED:
            return
        if not search.sizing.may_beat(values[row], best[0].value):
            return
        if int(row) not in search.simulated:
            progress("ruled out", len(search.simulated), 0)
            # Few requests would let too many seem better than the winner, which was measured on many.
            ranked = search.simulate(int(row), best[0].value, is_thorough=True)
            search.measured[ranked.unit.plan] = ranked
            search.keep(ranked)


def _cheapest(search: _Search) -> RankedUnit | None:
    """Return a configuration that carries the stated load on the fewest GPUs: by its bound first, then in simulation."""
    units, sizing = search.units, search.sizing
    if sizing.demand <= 0.0 or not len(units):
        return None
    needed = sizing.units_needed(units.load)
    gpus = needed * units.num_gpus
    best: RankedUnit | None = None
    fewest = np.inf
    for ranked in search.best():
        count = int(sizing.units_needed(np.array([ranked.point.load]))[0]) * ranked.unit.plan.num_gpus
        if count < fewest:
            best, fewest = ranked, float(count)
    # Of as many GPUs, the one with most room to spare is likeliest to hold.
    order = np.lexsort((-units.load * needed, gpus))
    seen: set[int] = set()
    for row in order:
        shape = int(units.shape[row])
        if len(seen) >= _MAX_CHEAP or gpus[row] >= fewest:
            break
        if shape in seen:
            continue
        seen.add(shape)
        unit = unit_of_row(search.request, search.space, units, int(row))
        load = sizing.demand / float(needed[row])
        point = search.runner(unit)(np.ceil(load) if search.is_whole else load)
        if not violated(point, search.request.job.slo):
            bracket = LoadBracket(best=point, failing=None, num_runs=1)
            return RankedUnit(
                unit=unit, bracket=bracket, value=0.0, plan=whole_plan(unit.plan, int(needed[row]))
            )
    if best is None:
        return None
    count = int(sizing.units_needed(np.array([best.point.load]))[0])
    return replace(best, plan=whole_plan(best.unit.plan, count))


def _separate(search: _Search) -> bool:
    """Measure the best few again on more requests and narrower brackets; whether the winner is then clear of the rest."""
    for _ in range(_MAX_RECOUNTS):
        pending = [ranked for ranked in search.best()[:2] if ranked.unit.plan not in search.measured]
        if not pending:
            break
        for ranked in pending:
            failing = ranked.bracket.failing
            # More than the bound lasts for the few requests of a simulation only.
            most = max(ranked.point.load, most_load(search.request, ranked.unit))
            upper = failing.load if failing is not None else min(ranked.point.load * (1.0 + _COARSE), most)
            bracket = highest_load(
                search.runner(ranked.unit, is_thorough=True),
                search.request.job.slo,
                upper=upper,
                to_beat=ranked.point.load * (1.0 - 2.0 * _COARSE),
                tolerance=_FINE,
                is_whole=search.is_whole,
            )
            if bracket.is_beaten:
                bracket = highest_load(
                    search.runner(ranked.unit, is_thorough=True),
                    search.request.job.slo,
                    upper=upper,
                    tolerance=_FINE,
                    is_whole=search.is_whole,
                )
            search.measured[ranked.unit.plan] = search.ranked(ranked.unit, bracket)
            search.found[ranked.unit.shape] = max(
                (each for each in search.measured.values() if each.unit.shape == ranked.unit.shape),
                key=lambda each: each.value,
            )
    best = search.best()
    return len(best) < 2 or best[0].value >= search.highest_value(best[1])
