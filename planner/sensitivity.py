"""How much each property of machines and software matters to a plan: iteration time with it scaled down and up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from meshwright.errors import SpecError
from meshwright.planner.changes import CHANGES
from meshwright.planner.scenario import Scenario, scenario_context, with_peak
from meshwright.planner.search.base import Progress
from meshwright.planner.whatif import Outcome, Question, best_plan, given_plan
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["LEVERS", "Effect", "Lever", "Sensitivities", "sensitivities", "time_change"]

# Beyond it nothing of the data sheet is left that a model could hold on to.
_LARGEST_FACTOR = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lever:
    """One property that is scaled.

    Parameters
    ----------
    name : str
        What it is, for the user.
    keys : tuple[str, ...]
        Keys of :data:`meshwright.planner.changes.CHANGES` it moves, the first of which is shown.
    scale : Callable[[Scenario, float], Scenario]
        Returns the scenario with the property times a factor.
    moves_the_best : bool
        Whether it only shows in which plans fit, so that the best plan has to be searched anew.
    """

    name: str
    keys: tuple[str, ...]
    scale: Callable[[Scenario, float], Scenario]
    moves_the_best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Effect:
    """A lever moved down and up.

    Parameters
    ----------
    lever : Lever
        What was scaled.
    value : str
        Its present value.
    low, high : Outcome
        The given plan with the property divided and multiplied by the factor.
    best_low, best_high : Outcome | None
        The best plan then; None where it was not searched.
    largest : float
        Largest change of the iteration time of the given plan, as a share.
    """

    lever: Lever
    value: str
    low: Outcome
    high: Outcome
    best_low: Outcome | None
    best_high: Outcome | None
    largest: float


def _keys(*keys: str) -> Callable[[Scenario, float], Scenario]:
    """Return the function that multiplies the values of some keys."""

    def scale(scenario: Scenario, factor: float) -> Scenario:
        for key in keys:
            value = CHANGES[key].read(scenario)
            if not isinstance(value, str) and value:
                scenario = CHANGES[key].write(scenario, value * factor)
        return scenario

    return scale


def _all_peaks(scenario: Scenario, factor: float) -> Scenario:
    for precision, peak in scenario.gpu.peak_flops_per_second.items():
        scenario = with_peak(scenario, precision, peak * factor)
    return scenario


def _launch_time(scenario: Scenario, factor: float) -> Scenario:
    return replace(scenario, launch_time=scenario.launch_time * factor)


def _lever(name: str, *keys: str, moves_the_best: bool = False) -> Lever:
    return Lever(name=name, keys=keys, scale=_keys(*keys), moves_the_best=moves_the_best)


LEVERS: tuple[Lever, ...] = (
    Lever(name="peak FLOP/s", keys=("gpu.bf16", "gpu.fp16"), scale=_all_peaks),
    _lever("memory bandwidth", "gpu.memory_bandwidth"),
    _lever("GPU memory", "gpu.memory", moves_the_best=True),
    _lever("intra-node bandwidth", "node.link_bandwidth"),
    _lever("inter-node bandwidth", "fabric.bandwidth"),
    _lever("network latency", "node.link_latency", "fabric.latency"),
    _lever("host link bandwidth", "gpu.host_bandwidth"),
    _lever("host launch latency", "software.host_launch_latency"),
    Lever(name="kernel launch time", keys=(), scale=_launch_time),
    _lever("fixed time per iteration", "software.fixed_time"),
)
"""What the table of sensitivities moves."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sensitivities:
    """What every lever does to one plan.

    Parameters
    ----------
    today, best_today : Outcome
        The given plan and the best plan with nothing scaled.
    factor : float
        What properties are divided and multiplied by.
    effects : tuple[Effect, ...]
        The levers, the largest effect on the given plan first.
    """

    today: Outcome
    best_today: Outcome
    factor: float
    effects: tuple[Effect, ...]


def sensitivities(
    scenario: Scenario,
    plan: ParallelPlan,
    question: Question,
    progress: Progress,
    *,
    factor: float = 2.0,
    searches_all: bool = False,
) -> Sensitivities:
    """Return how a plan, and where asked the best plan, responds to each lever.

    Parameters
    ----------
    scenario, plan, question : Scenario, ParallelPlan, Question
        The job, the given plan and how to search.
    progress : Progress
        Told of every search.
    factor : float
        Above 1.
    searches_all : bool
        Search the best plan for every lever; otherwise only for those that move nothing else.

    Raises
    ------
    SpecError
        If the factor is not above 1.
    """
    if not 1.0 < factor <= _LARGEST_FACTOR:
        raise SpecError(f"the factor must lie above 1 and up to {_LARGEST_FACTOR:g}, not {factor:g}")
    context = scenario_context(scenario)
    today = given_plan(context, plan, question)
    best_today = best_plan(scenario, context, question, progress)
    effects = []
    for lever in LEVERS:
        if lever.keys == ("gpu.host_bandwidth",) and scenario.gpu.scale_up is None:
            # GPUs talk over the host link: it is the intra-node bandwidth already.
            continue
        is_searched = searches_all or lever.moves_the_best
        outcomes: list[Outcome] = []
        best: list[Outcome | None] = []
        for scale in (1.0 / factor, factor):
            scaled = lever.scale(scenario, scale)
            scaled_context = scenario_context(scaled)
            outcomes.append(given_plan(scaled_context, plan, question))
            best.append(best_plan(scaled, scaled_context, question, progress) if is_searched else None)
        effects.append(
            Effect(
                lever=lever,
                value=_present(scenario, lever),
                low=outcomes[0],
                high=outcomes[1],
                best_low=best[0],
                best_high=best[1],
                largest=max(abs(time_change(today, each) or 0.0) for each in outcomes),
            )
        )
    ordered = sorted(effects, key=lambda effect: -effect.largest)
    return Sensitivities(today=today, best_today=best_today, factor=factor, effects=tuple(ordered))


def time_change(before: Outcome, after: Outcome) -> float | None:
    """Return the change of the iteration time as a share; None where either plan cannot run."""
    if before.explanation is None or after.explanation is None:
        return None
    seconds = before.explanation.prediction.iteration_time
    return after.explanation.prediction.iteration_time / seconds - 1.0


def _present(scenario: Scenario, lever: Lever) -> str:
    for key in lever.keys:
        value = CHANGES[key].read(scenario)
        if value is not None:
            return CHANGES[key].format(value)
    return ""
