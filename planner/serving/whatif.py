"""A serving plan under changed machines, load or limits, and the best plan there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from meshwright.errors import InfeasiblePlanError, UnsupportedByTargetError
from meshwright.planner.scenario import Scenario
from meshwright.planner.search.base import Progress
from meshwright.planner.serving.answer import PricedRequest, answer_request, plan_figures, priced_request
from meshwright.planner.serving.costs import Departure, JobCosts
from meshwright.planner.serving.deployment import check_engine_runs
from meshwright.planner.serving.given_plan import measured_plan
from meshwright.planner.serving.job_file import ServingObjective, ServingRequest
from meshwright.planner.serving.limits import ServingLimits
from meshwright.planner.serving.load_search import LoadPoint, violated
from meshwright.planner.serving.plan_file import ServingPlanDocument
from meshwright.planner.serving.run import ServingRun, serve_plan
from meshwright.planner.serving.search import RankedUnit
from meshwright.planner.violations import Violation
from meshwright.simcore.domain.serving import ServingJob, ServingPlan, Slo, pools_by_cluster
from meshwright.units import format_quantity

__all__ = ["ServingOutcome", "ServingSubject", "scenario_costs"]

# Shapes that a search for the best plan simulates at least.
_NUM_SHAPES = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServingOutcome:
    """A serving plan in one scenario at the highest load that keeps the limits, or why there is none.

    Parameters
    ----------
    plan : ServingPlan | None
        None when it cannot run.
    figures : Mapping[str, object]
        As :func:`meshwright.planner.serving.answer.plan_figures` says.
    value : float
        The objective.
    run : ServingRun | None
        The given plan on the stated load, where that was asked for.
    violation : Violation | None
        The constraint in the way of the given plan.
    advice : str
        What would make some plan fit, when none does.
    """

    plan: ServingPlan | None = None
    figures: Mapping[str, object]
    value: float = float("-inf")
    run: ServingRun | None = None
    violation: Violation | None = None
    advice: str = ""

    @property
    def binding(self) -> tuple[str, ...]:
        """What stops a higher load."""
        names = self.figures.get("binding")
        return tuple(str(name) for name in names) if isinstance(names, list) else ()

    @property
    def figure(self) -> float | None:
        """Output tokens per second and GPU within the limits [1/s]; None when it cannot run."""
        rate = self.figures.get("output_tokens_per_second_per_gpu")
        return rate if isinstance(rate, float) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSubject:
    """A serving plan, and how another is searched: on its engine and in its number formats.

    Parameters
    ----------
    plan : ServingPlan
        The given plan.
    objective : ServingObjective
        What "best" means.
    progress : Progress
        Told of every search.
    seed : int
        Of the requests that are drawn.
    serves_stated_load : bool
        Simulate the given plan on the load of the job as well.
    """

    plan: ServingPlan
    objective: ServingObjective
    progress: Progress
    seed: int = 0
    serves_stated_load: bool = False

    def given(self, scenario: Scenario[ServingJob]) -> ServingOutcome:
        """Return what the given plan does in a scenario."""
        job = scenario.job
        for pools, cluster in pools_by_cluster(job, self.plan):
            needed = sum(pool.num_gpus for pool in pools)
            if needed > cluster.num_gpus:
                numbers = f"the pools need {needed} GPUs and {cluster.id} has {cluster.num_gpus}"
                return _broken("cluster", "pools fit the cluster", numbers)
        try:
            check_engine_runs(job, self.plan)
            priced = priced_request(self._request(job), scenario_costs(scenario), self.seed)
            ranked = measured_plan(priced, self.plan)
            document = ServingPlanDocument(job=job, plan=self.plan)
            run = serve_plan(document, priced.costs, seed=self.seed) if self.serves_stated_load else None
        except UnsupportedByTargetError as error:
            return _broken("engine", "the engine can launch the plan", str(error))
        except InfeasiblePlanError as error:
            return _broken("memory", "weights and cache fit the GPUs", str(error))
        if ranked.bracket.best is None:
            assert ranked.bracket.failing is not None
            return _broken("slo", "some load keeps every limit", _missed(ranked.bracket.failing, job.slo))
        return replace(_outcome(priced, ranked), run=run)

    def best(self, scenario: Scenario[ServingJob]) -> ServingOutcome:
        """Return the best plan of a scenario: the search's, or the given one where that does better."""
        given, request = self.given(scenario), self._request(scenario.job)
        costs = scenario_costs(scenario)
        try:
            answer = answer_request(
                request, costs=costs, seed=self.seed, num_shapes=_NUM_SHAPES, progress=self.progress
            )
        except InfeasiblePlanError as error:
            # The last line says what comes closest; those before it count what was rejected.
            return ServingOutcome(figures={}, advice=str(error).rsplit("\n", maxsplit=1)[-1].strip())
        # Measured like the given plan, so that the same plan has the same figures.
        winner = answer.outcome.ranked[0]
        found = _outcome(answer, measured_plan(answer, winner.plan))
        return given if given.value > found.value else found

    def _request(self, job: ServingJob) -> ServingRequest:
        plan, decode = self.plan, self.plan.pools[-1]
        return ServingRequest(
            job=job,
            objective=self.objective,
            limits=ServingLimits(
                allowed={"precision": (plan.precision,), "kv_precision": (plan.kv_precision,)}
            ),
            engines=(plan.engine,),
            engine_version=plan.engine_version,
            acceptance=decode.acceptance if decode.num_speculative_tokens else None,
        )


def scenario_costs(scenario: Scenario[ServingJob]) -> JobCosts:
    """Return the cost models of a serving scenario."""
    departure = Departure(
        measured_gpu=scenario.measured_gpu,
        collective_latency=scenario.collective_latency,
        launch_time=scenario.launch_time,
        host_time=scenario.host_time,
    )
    return JobCosts(scenario.job, scenario.calibration_paths, departure)


def _outcome(priced: PricedRequest, ranked: RankedUnit) -> ServingOutcome:
    return ServingOutcome(plan=ranked.plan, figures=plan_figures(priced, ranked), value=ranked.value)


def _broken(constraint: str, sentence: str, numbers: str) -> ServingOutcome:
    return ServingOutcome(
        figures={}, violation=Violation(constraint=constraint, sentence=sentence, numbers=numbers)
    )


def _missed(point: LoadPoint, slo: Slo) -> str:
    names = violated(point, slo)
    seconds = {limit.name: limit.seconds for limit in slo.limits}
    return " and ".join(
        f"{name} {_time(point.metrics[name])} (limit {_time(seconds[name])})" if name in seconds else name
        for name in names
    )


def _time(seconds: float) -> str:
    return format_quantity(seconds, "seconds", 3) if seconds < float("inf") else "without end"
