"""Ranks, slots, capacity and overlap together; ways to train: the winner is the best of what is listed."""

from __future__ import annotations

import pytest

from meshwright.errors import InfeasiblePlanError, SpecError
from meshwright.planner.placement.job import PlacementFlags, read_placement_job, with_layout
from meshwright.planner.placement.joint_choice import ChoiceLimits, choose_layout, weight_bytes
from meshwright.planner.placement.layer_times import DEGREES, layer_times
from meshwright.planner.placement.layout import capacity_drop, sampled_routing
from meshwright.planner.placement.routing import split_held_out
from meshwright.planner.placement.simulation import job_calibration
from meshwright.planner.placement.solving import solve_placement
from meshwright.planner.placement.training import training_options


@pytest.fixture(scope="module")
def job():
    return read_placement_job(
        PlacementFlags(
            model="mixtral-8x7b",
            cluster="dgx-h100:2",
            synthetic="strong",
            synthetic_tokens=4096,
            is_choosing=True,
        )
    )


@pytest.fixture(scope="module")
def calibration(job):
    return job_calibration(job)


@pytest.fixture(scope="module")
def choice(job, calibration):
    return choose_layout(job, calibration, ChoiceLimits(tokens_per_gpu=1024))


def test_the_winner_is_the_lightest_of_the_fastest_allowed(job, choice):
    seconds = [each.layer_seconds for each in choice.candidates]
    assert seconds == sorted(seconds)
    allowed = [each for each in choice.candidates if not each.obstacle]
    near = [each for each in allowed if each.layer_seconds <= 1.01 * allowed[0].layer_seconds]
    assert choice.best in near
    assert choice.best.weight_bytes == min(each.weight_bytes for each in near)
    assert {each.ep for each in choice.candidates} == {2, 4, 8, 16}
    others = [each for each in allowed if each.ep != choice.best.ep]
    named = f"ep {others[0].ep} with {others[0].redundant_experts} redundant"
    assert any(named in reason for reason in choice.reasons)


def test_what_drops_tokens_or_does_not_fit_is_listed_with_its_obstacle(job, choice):
    room = 0.8 * job.cluster.node.gpu.memory_bytes
    for each in choice.candidates:
        assert (each.weight_bytes > room) == ("weights" in each.obstacle)
        if each.token_drop and each.weight_bytes <= room:
            assert "drops" in each.obstacle
    assert {each.capacity_factor for each in choice.candidates} == {None, 1.0, 1.25, 1.5, 2.0}


def test_a_candidate_is_what_its_parts_say(job, calibration, choice):
    """The price of the winner, rebuilt from placement, traffic and products of the same layers."""
    best = choice.best
    routing = sampled_routing(job.request.routing, 3, 32_768)
    same = with_layout(job, best.ep, best.redundant_experts, routing)
    answer = solve_placement(same.request, certificates=False)
    judge = split_held_out(routing)[1]
    times = layer_times(same, answer.placement, judge, same.request.choice, 1024, calibration)
    by_degree = {each.degree: float(each.layer.mean()) for each in times}
    assert set(by_degree) == set(DEGREES)
    assert best.layer_seconds == pytest.approx(min(by_degree.values()), rel=1e-9)
    assert best.overlap_degree == min(by_degree, key=by_degree.get)
    assert best.weight_bytes == weight_bytes(same)


def test_capacity_costs_its_factor_whatever_the_routing(job, calibration):
    routing = sampled_routing(job.request.routing, 2, 4096)
    same = with_layout(job, 8, 0, routing)
    placement = solve_placement(same.request, certificates=False).placement
    one, two = (
        layer_times(same, placement, routing, "random", 4096, calibration, capacity_factor=factor)[0]
        for factor in (1.0, 2.0)
    )
    assert two.experts == pytest.approx(2.0 * one.experts, rel=0.05)
    assert two.dispatch[0] - one.dispatch[0] == pytest.approx(one.dispatch[0] - 24.0e-6, rel=0.1)
    assert capacity_drop(routing, 2, 1.0, 4096, placement) > 0.05


def test_a_token_drop_that_is_allowed_lets_capacity_win(job, calibration):
    limits = ChoiceLimits(ep=8, redundant_experts=0, max_token_drop=1.0, tokens_per_gpu=1024)
    best = choose_layout(job, calibration, limits).best
    assert best.capacity_factor == 1.0
    assert best.token_drop > 0.0


def test_what_cannot_be_chosen_is_said(job, calibration):
    with pytest.raises(SpecError, match="no number of ranks"):
        choose_layout(job, calibration, ChoiceLimits(ep=5, redundant_experts=0))
    big = read_placement_job(
        PlacementFlags(
            model="deepseek-v3",
            cluster="dgx-h100:1",
            synthetic="weak",
            synthetic_tokens=256,
            is_choosing=True,
        )
    )
    with pytest.raises(InfeasiblePlanError, match=r"weights of .* GB exceed"):
        choose_layout(big, calibration, ChoiceLimits(ep=8, redundant_experts=0, capacity_factors=()))


def test_copies_and_groups_trade_gathers_for_balance_and_exchange(job, calibration):
    same = with_layout(job, 8, 0, job.request.routing)
    options = {each.name: each for each in training_options(same, calibration, 4096)}
    home, copied, alone = (
        options[name] for name in ("experts at home", "2 copied to each rank", "groups of 1")
    )
    assert copied.imbalance < home.imbalance
    assert copied.experts_seconds < home.experts_seconds
    assert home.gather_seconds == 0.0 < copied.gather_seconds < alone.gather_seconds
    assert alone.exchange_seconds == 0.0
    assert alone.imbalance == 1.0
    for each in options.values():
        total = each.experts_seconds + each.exchange_seconds + each.exposed_seconds
        assert each.layer_seconds == pytest.approx(total)
        assert 0.0 <= each.exposed_seconds <= each.gather_seconds
