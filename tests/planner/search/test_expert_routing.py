"""The search stays exact where every ep has its own imbalance."""

from __future__ import annotations

from dataclasses import replace

import pytest
from search_cases import brute_force_of, make_request, run, winning_values

from meshwright.planner.search import SearchRequest
from meshwright.planner.space import SearchLimits
from meshwright.simcore.domain.workload import ExpertRouting

LIMITS = SearchLimits(
    allowed={
        "schedule": ("none", "1f1b"),
        "recompute": ("none", "full"),
        "sharding": ("zero1",),
        "cp_method": ("ring",),
        "micro_batch_size": (1,),
        "expert_overlap": (1, 4),
        "optimizer_offload": ("none",),
        "parameter_offload": ("none",),
        "activation_offload": (False,),
        "vocab_parallel": ("none",),
    }
)


def routed(*entries: tuple[int, float]) -> SearchRequest:
    request = make_request("mixtral-8x7b", "dgx-h100:1", batch=8, num_layers=4, num_plans=5, limits=LIMITS)
    table = tuple(ExpertRouting(ep=ep, imbalance=imbalance) for ep, imbalance in entries)
    workload = replace(request.job.workload, routing_by_ep=table)
    return replace(
        request,
        job=replace(request.job, workload=workload),
        context=replace(request.context, workload=workload),
    )


@pytest.mark.parametrize(
    "entries",
    [((2, 1.0), (4, 1.0), (8, 8.0)), ((2, 2.0), (4, 4.0), (8, 1.0)), ((2, 1.1), (4, 1.3), (8, 1.9))],
)
def test_no_plan_beats_the_certified_winner(entries: tuple[tuple[int, float], ...]) -> None:
    request = routed(*entries)
    result = run(request)
    assert result.is_certified
    values, count, _ = brute_force_of(request)
    assert result.num_feasible == count > 100
    assert winning_values(request, result) == pytest.approx(values[:5], rel=1e-9)


def test_the_winner_avoids_the_ep_that_balances_badly() -> None:
    even = run(routed((2, 1.0), (4, 1.0), (8, 1.0))).ranked[0].plan.ep
    assert even > 1
    bad = run(routed(*((ep, float(ep) if ep == even else 1.0) for ep in (2, 4, 8))))
    assert bad.ranked[0].plan.ep != even
