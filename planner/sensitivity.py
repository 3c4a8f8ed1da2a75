"""How much each property of machines and software matters to a plan: its figure with the property scaled down and up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic

from meshwright.errors import SpecError
from meshwright.planner.changes import CHANGES
from meshwright.planner.scenario import JobT, Scenario, with_peak
from meshwright.planner.whatif import OutcomeT, Subject, figure_change
from meshwright.simcore.domain.serving import ServingJob

__all__ = ["LEVERS", "SERVING_LEVERS", "Effect", "Lever", "Sensitivities", "sensitivities"]

# Levers of both kinds: serving plans leave host memory alone and have engines in place of software.
_SERVING_KEYS = (
    "gpu.bf16",
    "gpu.fp16",
    "gpu.memory_bandwidth",
    "gpu.memory",
    "node.link_bandwidth",
    "fabric.bandwidth",
    "node.link_latency",
    "fabric.latency",
)
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
    scale : Callable[[Scenario[Any], float], Scenario[Any]]
        Returns the scenario with the property times a factor.
    moves_the_best : bool
        Whether it only shows in which plans fit, so that the best plan has to be searched anew.
    """

    name: str
    keys: tuple[str, ...]
    scale: Callable[[Scenario[Any], float], Scenario[Any]]
    moves_the_best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Effect(Generic[OutcomeT]):
    """A lever moved down and up.

    Parameters
    ----------
    lever : Lever
        What was scaled.
    value : str
        Its present value.
    low, high : OutcomeT
        The given plan with the property divided and multiplied by the factor.
    best_low, best_high : OutcomeT | None
        The best plan then; None where it was not searched.
    largest : float
        Largest change of the figure of the given plan, as a share.
    """

    lever: Lever
    value: str
    low: OutcomeT
    high: OutcomeT
    best_low: OutcomeT | None
    best_high: OutcomeT | None
    largest: float


def _keys(*keys: str) -> Callable[[Scenario[Any], float], Scenario[Any]]:
    """Return the function that multiplies the values of some keys."""

    def scale(scenario: Scenario[Any], factor: float) -> Scenario[Any]:
        for key in keys:
            value = CHANGES[key].read(scenario)
            if not isinstance(value, str) and value:
                scenario = CHANGES[key].write(scenario, value * factor)
        return scenario

    return scale


def _all_peaks(scenario: Scenario[Any], factor: float) -> Scenario[Any]:
    for precision, peak in scenario.gpu.peak_flops_per_second.items():
        scenario = with_peak(scenario, precision, peak * factor)
    return scenario


def _launch_time(scenario: Scenario[Any], factor: float) -> Scenario[Any]:
    return replace(scenario, launch_time=scenario.launch_time * factor)


def _host_time(scenario: Scenario[Any], factor: float) -> Scenario[Any]:
    return replace(scenario, host_time=scenario.host_time * factor)


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
"""What the table of sensitivities moves for a training plan."""

SERVING_LEVERS: tuple[Lever, ...] = (
    *(lever for lever in LEVERS if set(lever.keys) <= {*_SERVING_KEYS}),
    Lever(name="host time of a step", keys=(), scale=_host_time),
)
"""What it moves for a serving plan."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sensitivities(Generic[OutcomeT]):
    """What every lever does to one plan.

    Parameters
    ----------
    today, best_today : OutcomeT
        The given plan and the best plan with nothing scaled.
    factor : float
        What properties are divided and multiplied by.
    effects : tuple[Effect[OutcomeT], ...]
        The levers, the largest effect on the given plan first.
    """

    today: OutcomeT
    best_today: OutcomeT
    factor: float
    effects: tuple[Effect[OutcomeT], ...]


def sensitivities(
    scenario: Scenario[JobT],
    subject: Subject[JobT, OutcomeT],
    *,
    factor: float = 2.0,
    searches_all: bool = False,
) -> Sensitivities[OutcomeT]:
    """Return how a plan, and where asked the best plan, responds to each lever.

    Parameters
    ----------
    scenario, subject : Scenario, Subject
        The job, and the given plan with its search.
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
    today, best_today = subject.given(scenario), subject.best(scenario)
    effects: list[Effect[OutcomeT]] = []
    for lever in _levers(scenario):
        if lever.keys == ("gpu.host_bandwidth",) and scenario.gpu.scale_up is None:
            # GPUs talk over the host link: it is the intra-node bandwidth already.
            continue
        is_searched = searches_all or lever.moves_the_best
        scaled = [lever.scale(scenario, scale) for scale in (1.0 / factor, factor)]
        low, high = (subject.given(each) for each in scaled)
        best_low, best_high = (subject.best(each) if is_searched else None for each in scaled)
        effects.append(
            Effect(
                lever=lever,
                value=_present(scenario, lever),
                low=low,
                high=high,
                best_low=best_low,
                best_high=best_high,
                largest=max(abs(figure_change(today, each) or 0.0) for each in (low, high)),
            )
        )
    ordered = sorted(effects, key=lambda effect: -effect.largest)
    return Sensitivities(today=today, best_today=best_today, factor=factor, effects=tuple(ordered))


def _levers(scenario: Scenario[Any]) -> tuple[Lever, ...]:
    return SERVING_LEVERS if isinstance(scenario.job, ServingJob) else LEVERS


def _present(scenario: Scenario[Any], lever: Lever) -> str:
    for key in lever.keys:
        value = CHANGES[key].read(scenario)
        if value is not None:
            return CHANGES[key].format(value)
    return ""
