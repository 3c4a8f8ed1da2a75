"""Answers: measures recomputed by hand, bounds kept, claims limited, and every request that cannot be served."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from meshwright.errors import SpecError
from meshwright.planner.placement.certificates import Certificate
from meshwright.planner.placement.evaluation import (
    chain_locality,
    fresh_imbalance,
    imbalance,
    measure,
    moved_slots,
    rank_loads,
    remote_nodes,
)
from meshwright.planner.placement.migration import keep_in_place
from meshwright.planner.placement.request import PlacementRequest
from meshwright.planner.placement.routing import routing_from_loads, routing_from_tokens, token_transitions
from meshwright.planner.placement.solving import solve_placement
from meshwright.planner.placement.spread import spread_layer
from meshwright.planner.placement.spread_bounds import remote_bound
from meshwright.planner.placement.synthetic import SyntheticRouting, draw_routing
from meshwright.simcore.domain.expert_placement import ExpertPlacement

STRONG = SyntheticRouting(topic_strength=3.0, persistence=0.9)


@pytest.fixture(scope="module")
def routing():
    return draw_routing(3, 32, 4, 8000, 0, STRONG)


def request_of(data, **changes):
    base = {"routing": data, "num_slots": 40, "num_ranks": 8, "ranks_per_node": 2, "top_k": 4}
    return PlacementRequest(**{**base, **changes})


def small_placement():
    slots = np.array([[0, 1, 2, 0, 3, 4, 5, 1]])
    return ExpertPlacement(slots=slots, num_experts=6, num_ranks=4, ranks_per_node=2)


def test_rank_loads_of_both_ways_to_choose_a_copy():
    loads = np.array([[8.0, 4.0, 1.0, 2.0, 3.0, 5.0]])
    placement = small_placement()
    assert rank_loads(placement, loads, "random")[0].tolist() == [6.0, 5.0, 5.0, 7.0]
    # Expert 0 has both copies on node 0: half each. Expert 1 has one on each node: each serves its own.
    assert rank_loads(placement, loads, "nearest")[0].tolist() == [6.0, 5.0, 5.0, 7.0]
    spread = ExpertPlacement(
        slots=np.array([[0, 1, 2, 3, 0, 4, 5, 0]]), num_experts=6, num_ranks=4, ranks_per_node=2
    )
    near = rank_loads(spread, loads, "nearest")[0]
    assert near.tolist() == [8.0, 3.0, 5.0, 7.0]
    assert near.sum() == loads.sum()


def test_remote_nodes_by_hand():
    placement = small_placement()
    tokens = np.array([[[0, 2], [3, 4], [1, 5], [0, 3]]], dtype=np.int16)
    together, remote = remote_nodes(placement, tokens, "nearest")
    # Per token and home node 0 / 1. [0,2]: 0/1 remote; [3,4]: 1/0; [1,5]: 1/0; [0,3]: 1/1.
    assert remote[0] == pytest.approx((0 + 1 + 1 + 0 + 1 + 0 + 1 + 1) / 8)
    assert together[0] == pytest.approx((1 + 1 + 1 + 1 + 2 + 1 + 2 + 2) / 8)


def test_chain_locality_by_hand_and_with_copies():
    slots = np.array([[0, 1, 2, 3], [1, 0, 2, 3]])
    placement = ExpertPlacement(slots=slots, num_experts=4, num_ranks=2, ranks_per_node=2)
    transitions = np.zeros((1, 4, 4))
    transitions[0, 0, 1], transitions[0, 0, 2], transitions[0, 3, 3] = 3.0, 1.0, 2.0
    assert chain_locality(placement, transitions) == pytest.approx(5.0 / 6.0)
    copied = ExpertPlacement(
        slots=np.array([[0, 1, 2, 3, 0, 1]] * 2), num_experts=4, num_ranks=2, ranks_per_node=2
    )
    uniform = np.ones((1, 4, 4))
    by_hand = sum(
        sum(share[e] * share[f] for share in ((0.5, 0.5, 1, 0), (0.5, 0.5, 0, 1)))
        for e, f in itertools.product(range(4), repeat=2)
    )
    assert chain_locality(copied, uniform) == pytest.approx(by_hand / 16)


def test_joint_placement_lowers_traffic_at_eplb_imbalance(routing):
    answer = solve_placement(request_of(routing, imbalance_slack=0.03))
    ours, theirs = answer.held_out, answer.baseline_held_out
    assert ours.remote_nodes_per_token < 0.7 * theirs.remote_nodes_per_token
    assert ours.remote_nodes_per_token < answer.baseline_nearest.remote_nodes_per_token
    assert ours.imbalance <= theirs.imbalance + 0.03
    assert all(each.is_sound for each in answer.certificates)
    assert any("synthetic" in warning for warning in answer.warnings)


@pytest.mark.parametrize("objective", ["balance", "traffic", "joint", "active"])
def test_every_objective_is_at_least_as_good_as_eplb_at_its_own_aim(routing, objective):
    answer = solve_placement(request_of(routing, objective=objective, active_batch=8))
    ours, theirs = answer.solved, answer.baseline_solved
    aim = {"balance": "imbalance", "active": "active_experts"}.get(objective, "remote_nodes_per_token")
    assert getattr(ours, aim) <= getattr(theirs, aim) * (1.0 + (0.02 if objective == "active" else 1e-9))


@pytest.mark.parametrize(("experts", "ranks"), [(32, 8), (8, 4)])
@pytest.mark.parametrize("objective", ["traffic", "joint"])
def test_coherent_dispatch_keeps_transitions(experts, ranks, objective):
    routing = draw_routing(4, experts, 2, 6000, 1, STRONG)
    answer = solve_placement(
        request_of(
            routing, num_slots=experts, num_ranks=ranks, ranks_per_node=ranks, top_k=2,
            objective=objective, dispatch="coherent",
        )
    )  # fmt: skip
    assert answer.solved.locality > 1.2 * answer.baseline_solved.locality
    assert all(each.is_sound for each in answer.certificates)
    if objective == "joint":
        assert answer.held_out.imbalance <= answer.baseline_held_out.imbalance + 0.03
    elif experts == 8:
        assert answer.certificates[1].gap == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_a_solver_may_be_insisted_on(solver):
    routing = routing_from_loads(np.random.default_rng(0).lognormal(0, 0.8, (1, 8)), "loads")
    request = request_of(
        routing, num_slots=8, num_ranks=4, objective="balance", dispatch="full", solver=solver
    )
    answer = solve_placement(request)
    assert "proven" in answer.method
    assert answer.certificates[0].gap == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(SpecError, match="too many"):
        solve_placement(replace(request, routing=routing_from_loads(np.ones((1, 512)), "x"), num_slots=512))


def test_windows_steer_a_balanced_placement():
    windows = np.random.default_rng(3).lognormal(0.0, 0.8, (6, 2, 16)) * 100
    routing = routing_from_loads(windows.sum(axis=0), "loads", windows=windows)
    answer = solve_placement(
        request_of(routing, num_slots=20, num_ranks=4, objective="balance", dispatch="full")
    )
    assert answer.solved.window_imbalance <= answer.baseline_solved.window_imbalance
    assert answer.held_out is not None


def test_fresh_tokens_are_expected_to_be_less_even(routing):
    answer = solve_placement(request_of(routing, objective="balance", dispatch="full"), certificates=False)
    expected = fresh_imbalance(answer.placement, replace(routing, tokens=routing.tokens[:, :4000]))
    assert expected > answer.solved.imbalance
    assert expected == pytest.approx(answer.held_out.imbalance, rel=0.03)


def test_small_traces_and_fitted_placements_are_warned_of():
    routing = draw_routing(2, 32, 4, 300, 2)
    real = routing_from_tokens(routing.tokens, 32, "trace.npz")
    answer = solve_placement(request_of(real))
    text = " ".join(answer.warnings)
    assert "300 tokens are few" in text
    assert "fitted to its trace" in text
    assert "synthetic" not in text


def test_migration_keeps_measures_and_moves_fewer(routing):
    answer = solve_placement(request_of(routing), certificates=False)
    generator = np.random.default_rng(0)
    shuffled = answer.placement.slots.reshape(3, 4, 2, 5)[:, generator.permutation(4)][:, :, ::-1].reshape(
        3, 40
    )
    current = ExpertPlacement(slots=shuffled, num_experts=32, num_ranks=8, ranks_per_node=2)
    kept = keep_in_place(answer.placement, current, is_chained=False)
    assert moved_slots(current, kept) == 0 < moved_slots(current, answer.placement)
    assert (kept.slots == current.slots).all()
    again = solve_placement(request_of(routing, current=answer.baseline), certificates=False)
    assert again.moved_slots <= moved_slots(answer.baseline, answer.placement)
    assert again.solved.imbalance == pytest.approx(answer.solved.imbalance)


def test_spread_fills_every_node_and_covers_every_expert():
    routing = draw_routing(1, 32, 4, 2000, 5, STRONG)
    for num_slots in (32, 40, 48, 64, 128, 192):
        slots = spread_layer(routing.tokens[0], routing.loads[0], num_slots, 8, 2)
        assert len(slots) == num_slots
        assert set(slots.tolist()) == set(range(32))


def test_the_bound_of_remote_nodes_holds_for_every_placement_of_a_small_layer():
    routing = draw_routing(1, 6, 2, 500, 1, SyntheticRouting(topic_strength=3.0, experts_per_topic=2))
    tokens = routing.tokens[0]
    least = min(
        remote_nodes(
            ExpertPlacement(slots=np.array([order]), num_experts=6, num_ranks=3, ranks_per_node=1),
            routing.tokens,
        )[1][0]
        for order in itertools.permutations(range(6))
    )
    assert remote_bound(tokens, 6, 6, 3) <= least
    copied = ExpertPlacement(
        slots=np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2]]), num_experts=6, num_ranks=3, ranks_per_node=1
    )
    assert remote_bound(tokens, 6, 9, 3) <= remote_nodes(copied, routing.tokens)[1][0]


def test_no_choice_of_copies_goes_below_the_bound_of_remote_nodes():
    rng = np.random.default_rng(0)
    for _ in range(15):
        num_experts, top_k, num_nodes = (int(rng.integers(*ends)) for ends in ((4, 8), (1, 4), (2, 4)))
        room = -(-(num_experts + 2) // num_nodes)
        weights = rng.dirichlet(np.full(num_experts, 0.7)) + 1e-3
        weights /= weights.sum()
        tokens = np.array([rng.choice(num_experts, top_k, replace=False, p=weights) for _ in range(40)])
        extra = rng.choice(num_experts, room * num_nodes - num_experts, p=weights)
        slots = rng.permutation(np.concatenate([np.arange(num_experts), extra]))
        held = [set(part.tolist()) for part in slots.reshape(num_nodes, room)]
        least = np.mean([_fewest_nodes(set(t.tolist()), held, n) for t in tokens for n in range(num_nodes)])
        assert remote_bound(tokens.astype(np.int16), num_experts, len(slots), num_nodes) <= least + 1e-12


def test_the_bound_of_remote_nodes_with_copies_says_something():
    tokens = (
        np.random.default_rng(0).permuted(np.tile(np.arange(32), (4000, 1)), axis=1)[:, :4].astype(np.int16)
    )
    # Uniform: 10 of 32 experts hold 9 % of the pairs, so no more tokens stay on their node; of the load they hold 31 %.
    assert 0.85 < remote_bound(tokens, 32, 40, 4) < 0.91


def _fewest_nodes(experts: set[int], held: list[set[int]], own: int) -> int:
    left, others = experts - held[own], [each for place, each in enumerate(held) if place != own]
    return next(
        count
        for count in range(len(held))
        if any(left <= set().union(*chosen) for chosen in itertools.combinations(others, count))
    )


def test_gaps_are_relative_and_never_negative():
    low = Certificate(quantity="load", value=1.1, bound=1.0, method="m")
    high = Certificate(quantity="kept", value=0.9, bound=1.0, method="m", is_maximum=True)
    assert (low.gap, high.gap) == (pytest.approx(0.1), pytest.approx(0.1))
    assert low.is_sound
    assert high.is_sound
    assert not Certificate(quantity="load", value=0.9, bound=1.0, method="m").is_sound


def test_what_data_cannot_serve_is_refused(routing):
    sums = routing_from_loads(routing.loads, "loads.csv")
    cases = [
        ({"routing": sums}, "needs a trace"),
        ({"dispatch": "full"}, "only their balance"),
        ({"routing": sums, "dispatch": "coherent", "num_slots": 32}, "trace or transition"),
        ({"dispatch": "coherent"}, "one copy of each"),
    ]
    for changes, match in cases:
        with pytest.raises(SpecError, match=match):
            solve_placement(request_of(routing, **changes))
    for changes, match in (
        ({"num_slots": 36}, "next redundant experts that do are 8"),
        ({"num_slots": 24}, "cannot hold 32 experts"),
        ({"ranks_per_node": 3}, "do not divide into nodes"),
        ({"num_slots": 264}, "more than one copy"),
        ({"held_out_share": 1.0}, "held-out share"),
    ):
        with pytest.raises(SpecError, match=match):
            request_of(routing, **changes)


def test_measures_without_tokens_leave_out_what_needs_them():
    routing = routing_from_loads(np.ones((1, 6)), "loads")
    measures = measure(small_placement(), routing)
    assert measures.nodes_per_token is None
    assert measures.locality is None
    assert measures.imbalance == pytest.approx(imbalance(np.array([[1.5, 1.5, 2.0, 1.5]]))[0], rel=0.2)


def test_transitions_alone_are_enough_for_a_chain(routing):
    from meshwright.planner.placement.routing import routing_from_transitions

    only = routing_from_transitions(token_transitions(routing.tokens, 32), "transitions.npz")
    answer = solve_placement(request_of(only, num_slots=32, objective="traffic", dispatch="coherent"))
    assert answer.solved.locality > answer.baseline_solved.locality
    assert answer.held_out is None
