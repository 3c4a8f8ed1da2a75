from __future__ import annotations

from dataclasses import replace

import pytest
from search_cases import brute_force, random_request, run, winning_values

from meshwright.errors import InfeasiblePlanError
from meshwright.planner.search import exhaustive, simulation

# Random jobs; benchmarks/search.py runs more.
NUM_JOBS = 60


def test_the_search_finds_what_simulating_every_plan_finds() -> None:
    num_feasible = num_jobs = 0
    seen: set[str] = set()
    for seed in range(NUM_JOBS):
        request = random_request(seed)
        best, count, rejections = brute_force(seed)
        if not count:
            with pytest.raises(InfeasiblePlanError) as caught:
                run(request)
            assert caught.value.rejections == rejections
            continue
        result = run(request)
        assert result.num_feasible == count
        assert result.rejections == rejections
        assert result.is_certified
        # Not the winner alone: every place of the ranking.
        assert winning_values(request, result) == pytest.approx(best[: request.num_plans], rel=1e-9), seed
        num_feasible += count
        num_jobs += 1
        seen |= {entry.plan.schedule for entry in result.ranked}
    assert num_jobs > 0.6 * NUM_JOBS
    assert num_feasible > 50 * num_jobs
    assert len(seen) > 5


@pytest.mark.parametrize("seed", range(8))
def test_a_certified_winner_is_the_optimum_however_few_plans_were_simulated(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(random_request(seed), num_plans=1)
    best, count, _ = brute_force(seed)
    if not count:
        pytest.skip("nothing fits")
    for simulated in (1, 5, 20):
        monkeypatch.setattr(simulation, "NUM_SIMULATED", simulated)
        monkeypatch.setattr(simulation, "MOST_SIMULATED", simulated)
        result = run(request)
        assert result.num_simulated <= simulated
        (value,) = winning_values(request, result)
        assert value >= best[0] * (1 - 1e-12)
        assert not result.is_certified or value == pytest.approx(best[0], rel=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_few_plans_kept_at_a_time_lead_to_the_same_ranking(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = random_request(seed)
    best, count, _ = brute_force(seed)
    if not count:
        pytest.skip("nothing fits")
    monkeypatch.setattr(exhaustive, "NUM_KEPT", 3)
    result = run(request)
    assert result.is_certified
    assert winning_values(request, result) == pytest.approx(best[: request.num_plans], rel=1e-9)
