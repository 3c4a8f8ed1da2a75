from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.bound import iteration_time_bound
from meshwright.costmodels.context import CostContext, cost_context
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.memory import peak_memory
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.errors import InfeasiblePlanError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.constraints import apply_constraints
from meshwright.planner.export import EXPORTERS
from meshwright.planner.objectives import Objective, objective_values, world_sizes
from meshwright.planner.relaxation import infeasible
from meshwright.planner.search import SEARCHES, SearchRequest, SearchResult, exhaustive
from meshwright.planner.space import SearchLimits, enumerate_space, plan_of_row
from meshwright.simcore.domain.job import TrainingJob
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import RECOMPUTES
from meshwright.simcore.domain.workload import TrainingWorkload
from meshwright.simcore.training.iteration import iteration_time


def make_request(
    model: str = "llama-3-8b",
    cluster: str = "dgx-h100:1",
    *,
    batch: int = 16,
    length: int = 4096,
    num_layers: int | None = None,
    gpus_per_node: int = 8,
    software: str = "megatron-core",
    objective: Objective = "throughput",
    num_plans: int = 10,
    limits: SearchLimits | None = None,
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
        objective=objective,
        num_plans=num_plans,
    )


def run(request: SearchRequest) -> SearchResult:
    return SEARCHES["exhaustive"].run(request, lambda doing, done, total: None)


@functools.cache
def brute_force(seed: int) -> tuple[float, int]:
    """Return the best objective value of a random job's feasible plans, each simulated, and their number."""
    request = random_request(seed)
    best, count = np.inf, 0
    for block in enumerate_space(request.job, world_sizes(request.objective, request.context)):
        feasible = apply_constraints(request.context, block, request.limits, {})
        seconds = np.array([_simulated(request, feasible, row) for row in range(len(feasible))])
        if len(seconds):
            best = min(best, objective_values(request.objective, feasible, seconds).min())
            count += len(seconds)
    return float(best), count


def _simulated(request: SearchRequest, columns: PlanColumns, row: int) -> float:
    plan = plan_of_row(request.job, columns, row)
    return iteration_time(iteration_costs(request.context, plan), plan.schedule)


def winning_value(request: SearchRequest, result: SearchResult) -> float:
    winner = result.ranked[0]
    columns = PlanColumns.from_plans([winner.plan], request.job.workload.global_batch_size)
    seconds = np.array([winner.prediction.iteration_time])
    return float(objective_values(request.objective, columns, seconds)[0])


def random_request(seed: int) -> SearchRequest:
    """Return a small job whose every plan can be simulated: 4 GPUs or fewer, few layers and sequences."""
    rng = np.random.default_rng(seed)
    node = rng.choice(["dgx-h100", "dgx-a100", "l40s-8", "mi300x-8"])
    return make_request(
        rng.choice(["llama-3-8b", "gpt2-xl", "llama-2-7b"]),
        f"{node}:{2 if seed % 2 else 1}",
        batch=int(rng.choice([4, 8])),
        length=int(rng.choice([512, 4096])),
        num_layers=int(rng.choice([4, 6, 7, 8])),
        gpus_per_node=2 if seed % 2 else 4,
        software=str(rng.choice(["megatron-core", "megatron-2023", "torchtitan", "llm-foundry-fsdp1"])),
        objective="cost" if seed % 3 == 0 else "throughput",
        limits=SearchLimits(allowed={"recompute": ("none", str(rng.choice(RECOMPUTES[1:])))}),
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_search_finds_what_simulating_every_plan_finds(seed: int) -> None:
    request = random_request(seed)
    best, count = brute_force(seed)
    result = run(request)
    assert result.num_feasible == count
    assert winning_value(request, result) == best
    assert result.is_certified


@pytest.mark.parametrize("seed", range(8))
def test_a_certified_winner_is_the_optimum_however_few_plans_were_simulated(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(random_request(seed), num_plans=1)
    best, _ = brute_force(seed)
    for simulated in (1, 5, 20):
        monkeypatch.setattr(exhaustive, "_NUM_SIMULATED", simulated)
        monkeypatch.setattr(exhaustive, "_MOST_SIMULATED", simulated)
        result = run(request)
        assert result.num_simulated <= simulated
        assert winning_value(request, result) >= best
        assert not result.is_certified or winning_value(request, result) == best


def test_a_winner_is_not_certified_while_a_plan_not_simulated_may_beat_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A bound half as tight leaves room below the winner's time.
    monkeypatch.setattr(exhaustive, "_NUM_SIMULATED", 1)
    monkeypatch.setattr(exhaustive, "_MOST_SIMULATED", 1)
    monkeypatch.setattr(
        exhaustive,
        "iteration_time_bound",
        lambda context, columns: 0.5 * iteration_time_bound(context, columns),
    )
    result = run(replace(random_request(1), num_plans=1))
    assert result.num_simulated == 1
    assert not result.is_certified


@pytest.mark.parametrize("objective", ["throughput", "cost", "energy"])
def test_every_candidate_is_feasible_or_rejected_once(objective: Objective) -> None:
    result = run(make_request(cluster="dgx-h100:2", batch=48, objective=objective))
    assert sum(result.rejections.values()) + result.num_feasible == result.num_candidates
    assert result.num_simulated == min(100, result.num_feasible)
    assert min(result.rejections.values()) >= 0


def test_plans_are_ranked_by_their_simulated_time_and_no_bound_is_above_it() -> None:
    result = run(make_request(batch=32, num_plans=20))
    seconds = [entry.prediction.iteration_time for entry in result.ranked]
    assert len(seconds) == 20
    assert seconds == sorted(seconds)
    assert len({entry.plan for entry in result.ranked}) == 20
    assert all(entry.bound <= entry.prediction.iteration_time * (1 + 1e-9) for entry in result.ranked)


def test_equally_fast_plans_are_ranked_by_their_memory() -> None:
    # GPipe and 1F1B of equal stages take the same time; GPipe holds more micro-batches.
    limits = SearchLimits(allowed={"pp": (4,), "vpp": (1,)})
    result = run(make_request(length=2048, num_plans=40, limits=limits))
    by_time: dict[float, list[float]] = {}
    for entry in result.ranked:
        by_time.setdefault(entry.prediction.iteration_time, []).append(entry.prediction.peak_memory_bytes)
    ties = [memory for memory in by_time.values() if len(memory) > 1]
    assert ties
    assert all(memory == sorted(memory) for memory in ties)


def test_two_runs_give_equal_plans() -> None:
    first, second = (run(make_request("llama-3-70b", "dgx-h100:4", batch=64)) for _ in range(2))
    assert [entry.plan for entry in first.ranked] == [entry.plan for entry in second.ranked]
    for one, other in zip(first.ranked, second.ranked, strict=True):
        assert one.prediction.iteration_time == other.prediction.iteration_time
    assert first.rejections == second.rejections


def test_every_ranked_plan_fits_with_the_headroom_asked_for() -> None:
    request = make_request("llama-3-70b", "dgx-h100:4", limits=SearchLimits(memory_headroom=0.2), batch=64)
    result = run(request)
    plans = [entry.plan for entry in result.ranked]
    columns = PlanColumns.from_plans(plans, 64)
    assert np.all(peak_memory(request.context, columns) <= 0.8 * request.context.gpu.memory_bytes)
    assert all(entry.prediction.memory_headroom >= 0.2 for entry in result.ranked)


@pytest.mark.parametrize(
    "allowed",
    [
        {"tp": (2, 4)},
        {"pp": (2,), "schedule": ("gpipe",)},
        {"vpp": (2,), "recompute": ("full", "selective")},
        {"sharding": ("zero1",), "dp": (4,)},
        {"sequence_parallel": (True,)},
        {"micro_batch_size": (2, 4)},
    ],
)
def test_user_limits_are_respected(allowed: dict[str, tuple[int | str | bool, ...]]) -> None:
    result = run(make_request(batch=32, limits=SearchLimits(allowed=allowed)))
    assert result.rejections["user_limits"] > 0
    for entry in result.ranked:
        assert all(getattr(entry.plan, key) in values for key, values in allowed.items())


@pytest.mark.parametrize("target", sorted(EXPORTERS))
def test_every_ranked_plan_can_be_exported_to_the_target(target: str) -> None:
    request = make_request(batch=32, limits=SearchLimits(target=target))
    result = run(request)
    assert result.ranked
    for entry in result.ranked:
        assert not EXPORTERS[target].unsupported(request.job, entry.plan)


def test_a_target_without_interleaving_gets_none_and_the_refusals_are_counted() -> None:
    # Free to choose, this job's best plans are interleaved (megatron can, deepspeed cannot).
    limits = SearchLimits(allowed={"tp": (1, 2)})
    free = run(make_request("llama-3-8b", batch=16, limits=limits))
    bound = run(make_request("llama-3-8b", batch=16, limits=replace(limits, target="deepspeed")))
    assert free.rejections["target"] == 0
    assert bound.rejections["target"] > 0
    assert sum(bound.rejections.values()) + bound.num_feasible == bound.num_candidates
    assert {(entry.plan.vpp, entry.plan.pp) for entry in bound.ranked} == {(1, 1)}
    best, rest = bound.ranked[0].prediction, free.ranked[0].prediction
    assert best.iteration_time >= rest.iteration_time


@pytest.mark.parametrize("objective", ["cost", "energy"])
def test_the_cheapest_plan_uses_no_more_gpu_seconds_than_the_fastest(objective: Objective) -> None:
    fast = run(make_request(cluster="dgx-h100:4", batch=32)).ranked[0]
    cheap = run(make_request(cluster="dgx-h100:4", batch=32, objective=objective)).ranked[0]
    assert cheap.plan.num_gpus <= fast.plan.num_gpus
    gpu_seconds = [entry.plan.num_gpus * entry.prediction.iteration_time for entry in (cheap, fast)]
    assert gpu_seconds[0] <= gpu_seconds[1]
    assert cheap.prediction.joules_per_token <= fast.prediction.joules_per_token


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    result = SEARCHES["exhaustive"].run(make_request(), lambda *state: told.append(state))
    assert told[0] == ("scoring plans", result.num_candidates, 0)
    assert told[-1][:2] == ("simulating schedules", result.num_simulated)


def infeasible_error(request: SearchRequest) -> InfeasiblePlanError:
    with pytest.raises(InfeasiblePlanError) as caught:
        run(request)
    return infeasible(request.job, request.context, request.limits, caught.value.rejections)


def is_feasible(request: SearchRequest) -> bool:
    try:
        return bool(run(replace(request, num_plans=1)).ranked)
    except InfeasiblePlanError:
        return False


def with_nodes(request: SearchRequest, num_nodes: int) -> SearchRequest:
    job = replace(request.job, cluster=replace(request.job.cluster, num_nodes=num_nodes))
    return replace(request, job=job, context=cost_context(job))


def test_a_model_that_is_too_large_is_refused_with_counts_and_the_cluster_it_needs() -> None:
    # 175e9 parameters x 18 bytes are 3.1 TB; eight 80 GB devices hold 0.68 TB.
    request = make_request("gpt3-175b", batch=64, length=2048)
    error = infeasible_error(request)
    assert error.exit_code == 3
    assert error.rejections["memory"] > 0
    num_candidates = sum(len(block) for block in enumerate_space(request.job, (8,)))
    assert sum(error.rejections.values()) == num_candidates
    assert f"{error.rejections['memory']:,} rejected by memory (the fullest rank fits)" in str(error)
    assert "fits on 40 GPUs (5 x dgx-h100)" in str(error)
    assert is_feasible(with_nodes(request, 5))
    assert not is_feasible(with_nodes(request, 4))


def test_a_limit_in_the_way_is_named_and_lifting_it_helps() -> None:
    request = make_request(limits=SearchLimits(allowed={"tp": (5,), "recompute": ("full",)}))
    error = infeasible_error(request)
    assert "fits without 'constraints.tp: 5'" in str(error)
    assert "constraints.recompute" not in str(error)
    lifted = SearchLimits(allowed={"recompute": ("full",)})
    assert is_feasible(replace(request, limits=lifted))


def test_a_headroom_in_the_way_is_named_and_lowering_it_helps() -> None:
    request = make_request("llama-3-70b", "dgx-h100:2", limits=SearchLimits(memory_headroom=0.6))
    error = infeasible_error(request)
    assert "fits with less headroom than 60%" in str(error)
    assert is_feasible(replace(request, limits=SearchLimits()))


def test_a_sequence_in_the_way_is_shortened_to_one_that_fits() -> None:
    request = make_request("llama-3-8b", "a10g-8:1", length=131_072, batch=8)
    error = infeasible_error(request)
    shorter = [
        length for length in (65_536, 32_768, 16_384, 8192, 4096) if f"of {length} tokens" in str(error)
    ]
    assert len(shorter) == 1
    assert is_feasible(_with_length(request, shorter[0]))
    assert not is_feasible(_with_length(request, 2 * shorter[0]))


def _with_length(request: SearchRequest, length: int) -> SearchRequest:
    job = replace(request.job, workload=replace(request.job.workload, sequence_length=length))
    context: CostContext = cost_context(job)
    return replace(request, job=job, context=context)
