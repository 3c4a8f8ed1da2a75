from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from search_cases import make_request, run

from meshwright.costmodels.bound import iteration_time_bound
from meshwright.costmodels.memory import peak_memory
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.planner.export import EXPORTERS
from meshwright.planner.objectives import Objective
from meshwright.planner.search import SEARCHES, exhaustive, funnel, simulation
from meshwright.planner.search.base import RankedPlan
from meshwright.planner.search.simulation import SimulatedPlan
from meshwright.planner.space import SearchLimits


def test_a_winner_is_not_certified_while_a_plan_not_simulated_may_beat_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A bound half as tight leaves room below the winner's time.
    monkeypatch.setattr(simulation, "NUM_SIMULATED", 1)
    monkeypatch.setattr(simulation, "MOST_SIMULATED", 1)
    monkeypatch.setattr(
        funnel, "iteration_time_bound", lambda context, columns: 0.5 * iteration_time_bound(context, columns)
    )
    result = run(make_request(num_plans=1))
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


def test_equally_fast_plans_are_ranked_by_their_memory_then_by_their_place() -> None:
    plan = run(make_request(num_plans=1)).ranked[0].plan
    facts = [(2.0, 5.0, 0, 0), (1.0, 9.0, 0, 1), (1.0 + 1e-12, 3.0, 1, 0), (1.0, 3.0, 0, 2), (1.0, 3.0, 0, 1)]
    simulated = [
        SimulatedPlan(plan=plan, block=block, row=row, seconds=value, bound=value, value=value, memory=memory)
        for value, memory, block, row in facts
    ]
    # Rounding noise is no reason to be first.
    order = [(entry.memory, entry.block, entry.row) for entry in exhaustive.by_rank(simulated)]
    assert order == [(3.0, 0, 1), (3.0, 0, 2), (3.0, 1, 0), (9.0, 0, 1), (5.0, 0, 0)]


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
    doing = list(dict.fromkeys(what for what, _, _ in told))
    assert doing == ["outlining the space", "scoring plans", "simulating schedules"]
    for what in doing[:2]:
        done = [(count, total) for name, count, total in told if name == what]
        assert done == sorted(done)
        assert done[-1] == (result.num_candidates, result.num_candidates)
    assert told[-1] == ("simulating schedules", result.num_simulated, 100)


def test_no_plan_beats_one_of_the_front_and_every_other_is_beaten() -> None:
    request = replace(make_request(cluster="dgx-h100:2", batch=32, objective="cost"), wants_front=True)
    front = run(request).front
    assert len(front) > 1

    def figures(entry: RankedPlan) -> tuple[float, float, float]:
        seconds = entry.prediction.iteration_time
        return seconds, seconds * entry.plan.num_gpus, entry.prediction.peak_memory_bytes

    for one in front:
        for other in front:
            if one is not other:
                assert any(
                    mine < theirs * (1 + 1e-9)
                    for mine, theirs in zip(figures(one), figures(other), strict=True)
                )
    assert [figures(entry)[0] for entry in front] == sorted(figures(entry)[0] for entry in front)
    # Memory and time are bought with each other.
    assert front[0].prediction.peak_memory_bytes > min(entry.prediction.peak_memory_bytes for entry in front)
