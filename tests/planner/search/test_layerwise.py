from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from meshwright.costmodels.context import cost_context
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.memory import plan_memory
from meshwright.errors import InfeasiblePlanError, SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.reasons import winning_reason
from meshwright.planner.search import SEARCHES, SearchRequest, SearchResult, layerwise
from meshwright.planner.search.base import Progress
from meshwright.planner.search.exhaustive import ExhaustiveSearch
from meshwright.planner.search.layerwise_space import Configuration, PipelineSpace, pipeline_spaces
from meshwright.planner.search.pipeline_options import PipelineProblem
from meshwright.planner.space import SearchLimits
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.layer_groups import groups_by_stage
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.workload import TrainingWorkload
from meshwright.simcore.training.iteration import iteration_time

SOFTWARE = ("megatron-core", "megatron-2023", "torchtitan", "llm-foundry-fsdp1")


def make_request(
    model: str = "llama-2-7b",
    cluster: str = "dgx-a100-40:1",
    *,
    batch: int = 16,
    length: int = 2048,
    num_layers: int | None = None,
    gpus_per_node: int = 8,
    software: str = "megatron-core",
    limits: SearchLimits | None = None,
    objective: str = "throughput",
) -> SearchRequest:
    machines = resolve_cluster(cluster)
    machines = replace(machines, node=replace(machines.node, num_gpus=gpus_per_node))
    spec = load_model(model)
    job = TrainingJob(
        model=replace(spec, num_layers=num_layers or spec.num_layers),
        cluster=machines,
        workload=TrainingWorkload(global_batch_size=batch, sequence_length=length),
        software=software,
    )
    return SearchRequest(
        job=job,
        context=cost_context(job),
        limits=limits or SearchLimits(),
        objective=objective,  # type: ignore[arg-type]  # one of its words
    )


def run(request: SearchRequest, search: str = "layerwise") -> SearchResult:
    return SEARCHES[search].run(request, lambda doing, done, total: None)


def frame(request: SearchRequest) -> ParallelPlan:
    layers = (request.job.model.num_layers,)
    return ParallelPlan(dp=1, micro_batch_size=1, schedule="none", layers_per_stage=layers)


def spaces(request: SearchRequest) -> list[PipelineSpace]:
    num_gpus = request.job.cluster.num_gpus
    return list(pipeline_spaces(request.context, request.limits, frame(request), num_gpus))


def random_small_request(rng: np.random.Generator) -> SearchRequest:
    """Return a job of 3 to 6 layers on 2 or 4 GPUs with some memory, and some values of the strategies."""
    allowed: dict[str, tuple[int | str | bool, ...]] = {
        "recompute": ("none", "full"),
        "sharding": tuple(str(word) for word in rng.choice(["none", "zero1", "zero2", "zero3"], 2, False)),
        "sequence_parallel": (bool(rng.integers(2)), False),
        "tp": (1, 2),
    }
    return make_request(
        str(rng.choice(["llama-2-7b", "llama-3-8b", "gpt2-xl"])),
        str(rng.choice(["dgx-a100-40:1", "l40s-8:1", "dgx-h100:2"])),
        batch=int(rng.choice([4, 8])),
        length=int(rng.choice([1024, 4096])),
        num_layers=int(rng.integers(3, 7)),
        gpus_per_node=int(rng.choice([2, 4])),
        software=str(rng.choice(SOFTWARE)),
        limits=SearchLimits(allowed=allowed, memory_headroom=float(rng.uniform(0.3, 0.95))),
    )


def few_strategies(configuration: Configuration, rng: np.random.Generator) -> Configuration:
    """Return the configuration with two to four of its strategies, that of the ends among them."""
    others = configuration.rows[configuration.rows != configuration.ends]
    number = min(len(others), int(rng.integers(1, 4)))
    rows = np.sort([configuration.ends, *rng.choice(others, number, replace=False)])
    return Configuration(configuration.space, rows, configuration.ends)


def pipeline_problem(configuration: Configuration) -> PipelineProblem:
    return PipelineProblem(
        [configuration.problem(stage) for stage in range(configuration.plan.pp)],
        configuration.costs_without_layers(),
        configuration.plan.schedule,
    )


def compositions(total: int, parts: int) -> list[NDArray[np.int64]]:
    """Return every way to write a number as a sum of so many."""
    if parts == 1:
        return [np.array([total])]
    return [
        np.array([first, *rest])
        for first in range(total + 1)
        for rest in compositions(total - first, parts - 1)
    ]


@functools.cache
def fitting_configurations(seed: int) -> tuple[SearchRequest, list[Configuration]]:
    """Return a job with the configurations of one or two stages that fit."""
    for attempt in itertools.count():
        request = random_small_request(np.random.default_rng([2, seed, attempt]))
        found = [
            configuration
            for space in spaces(request)
            if space.pp <= 2
            for configuration in space.configurations()
            if len(configuration.rows) > 1 and np.isfinite(configuration.quick_bound())
        ]
        if found:
            return request, found
    raise AssertionError("the counter does not end")


def random_configuration(seed: int) -> tuple[SearchRequest, Configuration]:
    """Return a configuration of one of 40 jobs, with two to four of its strategies."""
    rng = np.random.default_rng([3, seed])
    request, found = fitting_configurations(seed % 40)
    return request, few_strategies(found[int(rng.integers(len(found)))], rng)


def with_random_memory(problem: PipelineProblem, rng: np.random.Generator) -> PipelineProblem:
    """Return the same pipeline with memory between what the least and what the most assignment holds."""
    stages = []
    for stage in problem.stages:
        held = [stage.memory(counts) for counts in compositions(stage.num_layers, len(stage.layout))]
        stages.append(replace(stage, memory_budget=float(rng.uniform(0.98 * min(held), max(held)))))
    return PipelineProblem(stages, problem.costs, problem.schedule)


def fastest_assignment(problem: PipelineProblem) -> float:
    """Return the least simulated time of all assignments of layers to strategies that fit, inf without any."""
    per_stage = []
    for stage in problem.stages:
        options = compositions(stage.num_layers, len(stage.layout))
        per_stage.append(
            [
                stage.cost(counts, problem.weights)
                for counts in options
                if stage.memory(counts) <= stage.memory_budget
            ]
        )
    return min(
        (problem.simulated(np.stack(costs)) for costs in itertools.product(*per_stage)), default=np.inf
    )


@pytest.mark.parametrize("seed", range(200))
def test_assigned_layers_are_the_fastest_of_all_assignments_that_fit(seed: int) -> None:
    _, configuration = random_configuration(seed)
    problem = with_random_memory(pipeline_problem(configuration), np.random.default_rng([6, seed]))
    fastest = fastest_assignment(problem)
    choice = problem.best(np.inf)
    assert choice.is_optimal
    assert problem.lower_bound() <= fastest * (1 + 1e-12)
    if np.isinf(fastest):
        assert choice.counts is None
        return
    assert choice.counts is not None
    assert choice.iteration_time == pytest.approx(fastest, rel=1e-9)
    # No better plan than a given one is found exactly where there is none.
    assert problem.best(fastest * (1 - 1e-6)).counts is None
    assert problem.best(fastest * (1 + 1e-6)).counts is not None


@pytest.mark.parametrize("seed", range(60))
def test_tables_price_an_assignment_as_its_plan_is_priced(seed: int) -> None:
    request, configuration = random_configuration(seed)
    rng = np.random.default_rng([5, seed])
    problem = pipeline_problem(configuration)
    counts = []
    for stage in problem.stages:
        options = compositions(stage.num_layers, len(stage.layout))
        counts.append(options[int(rng.integers(len(options)))])
    plan = configuration.layered_plan(counts, problem.weights[:2])
    costs = np.stack([s.cost(c, problem.weights) for s, c in zip(problem.stages, counts, strict=True)])
    seconds = iteration_time(iteration_costs(request.context, plan), plan.schedule)
    assert problem.simulated(costs) == pytest.approx(seconds, rel=1e-9)
    total = plan_memory(request.context, plan).total
    for stage, (part, count) in enumerate(zip(problem.stages, counts, strict=True)):
        held = configuration.space.capacity - part.memory_budget + part.memory(count)
        assert held == pytest.approx(total[stage], rel=1e-9)


def random_request(seed: int) -> SearchRequest:
    """Return a job on 2 to 8 GPUs whose uniform space has no levers but those of layer-wise plans and interleaving."""
    rng = np.random.default_rng([4, seed])
    allowed: dict[str, tuple[int | str | bool, ...]] = {
        "schedule": ("none", "1f1b", "interleaved_1f1b"),
        "cp": (1,),
        "optimizer_offload": ("none",),
        "activation_offload": (False,),
    }
    return make_request(
        str(rng.choice(["llama-2-7b", "llama-3-8b", "gpt2-xl", "qwen2.5-0.5b", "llama-2-13b"])),
        str(rng.choice(["dgx-a100-40:1", "l40s-8:1", "dgx-h100:2", "a10g-8:1"])),
        batch=int(rng.choice([4, 8])),
        length=int(rng.choice([1024, 4096, 8192])),
        num_layers=int(rng.integers(4, 13)),
        gpus_per_node=int(rng.choice([2, 4])),
        software=str(rng.choice(SOFTWARE)),
        objective=str(rng.choice(["throughput", "cost"])),
        limits=SearchLimits(allowed=allowed, memory_headroom=float(rng.choice([0.05, 0.3, 0.5]))),
    )


def value(request: SearchRequest, result: SearchResult) -> float:
    winner = result.ranked[0]
    weight = 1 if request.objective == "throughput" else winner.plan.num_gpus
    return winner.prediction.iteration_time * weight


@pytest.mark.parametrize("seed", range(36))
def test_the_result_is_never_worse_than_the_best_uniform_plan_and_fits(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = random_request(seed)
    uniform: list[SearchResult] = []

    class Recorded(ExhaustiveSearch):
        def run(self, request: SearchRequest, progress: Progress) -> SearchResult:
            uniform.append(super().run(request, progress))
            return uniform[-1]

    monkeypatch.setattr(layerwise, "ExhaustiveSearch", Recorded)
    try:
        layered = run(request)
    except InfeasiblePlanError:
        assert not uniform
        return
    if uniform:
        assert value(request, layered) <= value(request, uniform[0])
    times = np.array([entry.prediction.iteration_time for entry in layered.ranked])
    if request.objective == "throughput":
        assert np.all(times[1:] >= times[:-1] * (1 - 1e-9))
    usable = request.context.gpu.memory_bytes * (1.0 - request.limits.memory_headroom)
    for entry in layered.ranked:
        assert entry.prediction.peak_memory_bytes <= usable * (1 + 1e-9)
        assert entry.bound <= entry.prediction.iteration_time * (1 + 1e-9)


def test_the_uniform_optimum_of_one_pipeline_is_found_where_only_one_strategy_is_allowed() -> None:
    allowed: dict[str, tuple[int | str | bool, ...]] = {
        "tp": (2,),
        "sharding": ("zero1",),
        "recompute": ("none",),
        "sequence_parallel": (True,),
        "schedule": ("none", "1f1b"),
    }
    request = make_request(num_layers=8, limits=SearchLimits(allowed=allowed))
    uniform = run(request, "exhaustive").ranked[0].prediction.iteration_time
    best = min(
        pipeline_problem(configuration).best(np.inf).iteration_time
        for space in spaces(request)
        for configuration in space.configurations()
    )
    assert best == pytest.approx(uniform, rel=1e-12)


def memory_tight_request() -> SearchRequest:
    """Return a job whose best uniform plan wastes memory: all or none of a stage's layers are recomputed."""
    allowed: dict[str, tuple[int | str | bool, ...]] = {"tp": (2, 4), "vpp": (1,), "pp": (1, 2)}
    return make_request(
        batch=64, length=4096, num_layers=32, limits=SearchLimits(allowed=allowed, memory_headroom=0.35)
    )


def test_layers_that_may_differ_gain_where_memory_is_tight_and_the_reason_says_so() -> None:
    request = memory_tight_request()
    uniform, layered = run(request, "exhaustive"), run(request)
    winner = layered.ranked[0]
    assert winner.plan.layer_groups
    gain = uniform.ranked[0].prediction.iteration_time / winner.prediction.iteration_time - 1.0
    assert gain > 0.01
    assert layered.is_certified
    assert f"{gain:.2%} better than the best uniform plan" in layered.notes[0]
    reason = winning_reason(layered)
    assert "layer-wise" in reason
    assert "the best uniform plan" in reason
    assert uniform.ranked[0].plan in [entry.plan for entry in layered.ranked]


def test_layer_wise_plans_are_found_where_no_uniform_plan_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    class NothingFits(ExhaustiveSearch):
        def run(self, request: SearchRequest, progress: Progress) -> SearchResult:
            raise InfeasiblePlanError("no plan satisfies every constraint", {"memory": 7})

    monkeypatch.setattr(layerwise, "ExhaustiveSearch", NothingFits)
    request = random_request(1)
    result = run(request)
    assert "no uniform plan fits" in result.notes[0]
    assert result.rival is None
    assert result.rejections == {"memory": 7}
    full = replace(request, limits=replace(request.limits, memory_headroom=0.99))
    with pytest.raises(InfeasiblePlanError, match="uniform or layer-wise"):
        run(full)


def test_strategies_obey_the_users_limits() -> None:
    allowed: dict[str, tuple[int | str | bool, ...]] = {
        "tp": (2, 4),
        "pp": (1, 2),
        "micro_batch_size": (2, 4),
        "sharding": ("zero1", "zero3"),
    }
    request = make_request(limits=SearchLimits(allowed=allowed))
    plans = [plan for space in spaces(request) for plan in space.plans]
    for key, values in allowed.items():
        assert {getattr(plan, key) for plan in plans} <= set(values)
    # Sharding goes without a pipeline only; everything else is there.
    assert {(plan.tp, plan.pp, plan.sharding) for plan in plans} == {
        (tp, pp, sharding)
        for tp in (2, 4)
        for pp in (1, 2)
        for sharding in ("zero1", "zero3")
        if pp == 1 or sharding == "zero1"
    } - {(4, 2, "zero1")}


def test_two_runs_give_equal_plans() -> None:
    first, second = run(memory_tight_request()), run(memory_tight_request())
    assert [entry.plan for entry in first.ranked] == [entry.plan for entry in second.ranked]


def test_a_search_without_time_says_what_it_left_and_one_with_time_leaves_nothing() -> None:
    request = memory_tight_request()
    cut = run(replace(request, max_seconds=1e-6))
    assert cut.cut is not None
    assert cut.cut.gap > 0.0
    assert not cut.is_certified
    assert cut.ranked
    assert run(replace(request, max_seconds=1e6)).cut is None


def test_the_front_holds_layered_plans_that_nothing_beats() -> None:
    result = run(replace(memory_tight_request(), wants_front=True))
    assert result.front[0].plan == result.ranked[0].plan
    figures = [
        (entry.prediction.iteration_time, entry.prediction.peak_memory_bytes) for entry in result.front
    ]
    assert figures == sorted(figures)
    assert [memory for _, memory in figures] == sorted((memory for _, memory in figures), reverse=True)


def test_groups_follow_the_tour_through_the_layouts_from_the_ends_own() -> None:
    request = make_request(num_layers=6, gpus_per_node=4)
    space = next(space for space in spaces(request) if space.pp == 1)
    configuration = next(
        configuration
        for configuration in space.configurations()
        if len({(space.plans[row].tp, space.plans[row].sequence_parallel) for row in configuration.rows}) == 5
    )
    layout = configuration.problem(0).layout
    # Two layers of each of three layouts, in an order that begins anywhere.
    counts = np.zeros(len(layout), dtype=np.int64)
    ends = int(np.searchsorted(configuration.rows, configuration.ends))
    others = [index for index in range(len(layout)) if layout[index] != layout[ends]]
    second = next(index for index in others if layout[index] != layout[others[0]])
    counts[[others[0], ends, second]] = 2
    plan = configuration.layered_plan([counts], np.ones(2))
    (groups,) = groups_by_stage(plan)
    assert [group.num_layers for group in groups] == [2, 2, 2]
    assert (groups[0].tp, groups[0].sequence_parallel) == (plan.tp, plan.sequence_parallel)


def test_export_targets_and_models_with_unlike_layers_are_refused() -> None:
    with pytest.raises(SpecError, match="cannot express layer-wise plans"):
        run(make_request(limits=SearchLimits(target="megatron")))
    with pytest.raises(SpecError, match="layers that are all alike"):
        run(make_request("deepseek-v3", "dgx-h100:8"))
