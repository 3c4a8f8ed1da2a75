"""Layer-wise search: groups of layers of one stage may differ in tp, sequence parallelism, sharding and recompute.

Minimised is the simulated iteration time, as everywhere, and memory is a limit on each stage. The uniform space is
searched first, so the result is never worse than its optimum. Then every number of stages (1F1B), every micro-batch
and every strategy of embedding and head is a configuration; a bound, in which memory is relaxed to fractions of
layers, decides whether its layers are assigned at all, and where they are, they are assigned exactly.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from meshwright.costmodels.layer_strategies import require_equal_layers
from meshwright.costmodels.prediction import predict
from meshwright.errors import InfeasiblePlanError, SpecError
from meshwright.planner.objectives import Objective, world_sizes
from meshwright.planner.search.base import Progress, RankedPlan, SearchCut, SearchRequest, SearchResult
from meshwright.planner.search.exhaustive import ExhaustiveSearch
from meshwright.planner.search.layerwise_space import Configuration, pipeline_spaces
from meshwright.planner.search.non_dominated import non_dominated
from meshwright.planner.search.pipeline_options import PipelineProblem
from meshwright.simcore.domain.plan import ParallelPlan

__all__ = ["LayerwiseSearch"]

# A layered plan must beat the best by more than rounding: uniform plans are the simpler ones.
_GAIN = 1e-9
# Degrees that all layers of a plan share, taken over from the best uniform plans.
_SHARED_FIELDS = ("cp", "cp_method", "ep", "etp", "expert_overlap")


class LayerwiseSearch:
    """Uniform plans first, then every configuration of layer-wise ones that may beat them, most promising first.

    Deterministic: configurations of equal bounds are taken in enumeration order.
    """

    name = "layerwise"

    def run(self, request: SearchRequest, progress: Progress) -> SearchResult:
        """Return the best plans; see :class:`meshwright.planner.search.base.Search`.

        Raises
        ------
        SpecError
            If an export target is asked for, which no layer-wise plan suits, the layers of the model differ, or the
            cluster is mixed.
        """
        if request.limits.target is not None:
            raise SpecError(
                f"constraints.target '{request.limits.target}' cannot express layer-wise plans, nor can any other "
                "target: leave out the target, or search uniform plans (--search exhaustive)"
            )
        request.context.cluster.require_one_kind("--search layerwise")
        require_equal_layers(request.context)
        started = time.monotonic()
        # Of limited time uniform plans get half.
        seconds = None if request.max_seconds is None else request.max_seconds * 0.5
        rejections: dict[str, int] = {}
        uniform = None
        try:
            uniform = ExhaustiveSearch().run(replace(request, max_seconds=seconds), progress)
        except InfeasiblePlanError as error:
            rejections = dict(error.rejections)
        best = np.inf if uniform is None else _value(request.objective, uniform.ranked[0])
        deadline = np.inf if request.max_seconds is None else started + request.max_seconds
        state = _State(request, best, deadline)
        state.search(_frames(request, uniform), progress)
        if uniform is None and not state.found:
            raise InfeasiblePlanError("no plan satisfies every constraint, uniform or layer-wise", rejections)
        return _merged(request, uniform, state, rejections)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Candidate:
    """A configuration, its bound of the iteration time [s], and what a second of it counts in the objective."""

    configuration: Configuration
    bound: float
    weight: float


class _State:
    """What a layer-wise search has found so far."""

    def __init__(self, request: SearchRequest, best: float, deadline: float) -> None:
        self.request, self.best, self.deadline = request, best, deadline
        self.found: list[RankedPlan] = []
        self.num_configurations = self.num_feasible = self.num_solved = 0
        self.is_certified = True
        # Least bound of what was left for want of time, 0 where not everything was bounded; None where nothing was.
        self.least_left: float | None = None

    def search(self, frames: list[ParallelPlan], progress: Progress) -> None:
        """Assign layers in every configuration that may beat what is known, in the order of their bounds."""
        candidates = self._candidates(frames, progress)
        candidates.sort(key=lambda each: each.bound * each.weight)
        for place, candidate in enumerate(candidates):
            value = candidate.bound * candidate.weight
            if value >= self.best * (1.0 - _GAIN):
                break
            if time.monotonic() >= self.deadline:
                self.least_left = value if self.least_left is None else self.least_left
                break
            progress("assigning layers", place + 1, len(candidates))
            self._solve(candidate)
        self.is_certified &= self.least_left is None

    def _candidates(self, frames: list[ParallelPlan], progress: Progress) -> list[_Candidate]:
        request = self.request
        candidates: list[_Candidate] = []
        for frame in frames:
            for num_gpus in world_sizes(request.objective, request.context):
                weight = 1.0 if request.objective == "throughput" else float(num_gpus)
                for space in pipeline_spaces(request.context, request.limits, frame, num_gpus):
                    if time.monotonic() >= self.deadline:
                        self.least_left = 0.0
                        return candidates
                    for configuration in space.configurations():
                        self.num_configurations += 1
                        bound = configuration.quick_bound()
                        self.num_feasible += bool(np.isfinite(bound))
                        if bound * weight < self.best:
                            candidates.append(
                                _Candidate(configuration=configuration, bound=bound, weight=weight)
                            )
                    progress("bounding layer-wise plans", self.num_configurations, 0)
        return candidates

    def _solve(self, candidate: _Candidate) -> None:
        configuration = candidate.configuration
        limit = self.best * (1.0 - _GAIN) / candidate.weight
        plan = configuration.plan
        problem = PipelineProblem(
            [configuration.problem(stage) for stage in range(plan.pp)],
            configuration.costs_without_layers(),
            plan.schedule,
        )
        bound = problem.lower_bound()
        if bound >= limit:
            return
        self.num_solved += 1
        choice = problem.best(limit)
        self.is_certified &= choice.is_optimal
        if choice.counts is None:
            return
        layered = configuration.layered_plan(choice.counts, problem.weights[:2])
        prediction = predict(self.request.context, layered, self.request.flops)
        self.best = prediction.iteration_time * candidate.weight
        self.found.append(RankedPlan(plan=layered, prediction=prediction, bound=bound))


def _frames(request: SearchRequest, uniform: SearchResult | None) -> list[ParallelPlan]:
    """Return the degrees all layers share: those of the best uniform plans, and none."""
    plain = ParallelPlan(
        dp=1, micro_batch_size=1, schedule="none", layers_per_stage=(request.job.model.num_layers,)
    )
    ranked = () if uniform is None else uniform.ranked
    shared = [{name: getattr(entry.plan, name) for name in _SHARED_FIELDS} for entry in ranked]
    frames = [replace(plain, **fields) for fields in shared]
    return list(dict.fromkeys([plain, *frames]))


def _merged(
    request: SearchRequest, uniform: SearchResult | None, state: _State, rejections: dict[str, int]
) -> SearchResult:
    """Return layered and uniform plans together, best first."""
    layered = sorted(state.found, key=lambda entry: _value(request.objective, entry))
    ranked = (*layered, *(uniform.ranked if uniform else ()))
    rival = uniform.rival if uniform else None
    if layered and uniform:
        rival = uniform.ranked[0]
    return SearchResult(
        ranked=ranked[: request.num_plans],
        rival=rival,
        num_candidates=(uniform.num_candidates if uniform else 0) + state.num_configurations,
        num_feasible=(uniform.num_feasible if uniform else 0) + state.num_feasible,
        num_simulated=(uniform.num_simulated if uniform else 0) + state.num_solved,
        rejections=uniform.rejections if uniform else rejections,
        is_certified=state.is_certified and (uniform is None or bool(uniform.is_certified)),
        notes=(_note(request.objective, uniform, state),),
        cut=_cut(uniform, state),
        front=_front([*layered, *uniform.front] if uniform else layered) if request.wants_front else (),
    )


def _cut(uniform: SearchResult | None, state: _State) -> SearchCut | None:
    """Return what the uniform or the layer-wise part left undone, by the larger gap; None where neither did."""
    cut = None if uniform is None else uniform.cut
    if state.least_left is None:
        return cut
    gap = 1.0 if np.isinf(state.best) else max(0.0, 1.0 - state.least_left / state.best)
    if cut is None:
        return SearchCut(num_unscored=0, gap=gap)
    return SearchCut(num_unscored=cut.num_unscored, gap=max(gap, cut.gap))


def _front(entries: list[RankedPlan]) -> tuple[RankedPlan, ...]:
    """Return the plans that none beats in iteration time, GPU-seconds and memory at once, fastest first."""
    values = np.array(
        [
            (seconds, seconds * entry.plan.num_gpus, entry.prediction.peak_memory_bytes)
            for entry in entries
            for seconds in (entry.prediction.iteration_time,)
        ]
    ).reshape(-1, 3)
    kept = non_dominated(np.zeros(len(entries), dtype=np.int64), values)
    return tuple(entries[row] for row in sorted(kept.tolist(), key=lambda row: values[row, 0]))


def _note(objective: Objective, uniform: SearchResult | None, state: _State) -> str:
    """Return what the layer-wise part did and what it gained."""
    done = (
        f"Layer-wise: {state.num_configurations:,} combinations of stages, micro-batch and strategy of embedding "
        f"and head; layers assigned in {state.num_solved:,}, the bounds of the others are above the winner"
    )
    if not state.found:
        return f"{done}; no plan beats the best uniform one."
    if uniform is None:
        return f"{done}; no uniform plan fits."
    gain = _value(objective, uniform.ranked[0]) / state.best - 1.0
    return f"{done}; {gain:.2%} better than the best uniform plan."


def _value(objective: Objective, entry: RankedPlan) -> float:
    weight = 1.0 if objective == "throughput" else float(entry.plan.num_gpus)
    return entry.prediction.iteration_time * weight
