"""Chains: optimal where all partitions are tried, bounded from above, equal to integer programming."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.errors import SpecError
from meshwright.planner.placement.chain import (
    alternate,
    alternate_often,
    chain_weight,
    joint_chain,
    ranks_of_slots,
    relabel_chain,
    slots_of_ranks,
)
from meshwright.planner.placement.chain_bounds import (
    chain_bound,
    combined_bound,
    matching_bound,
    spectral_bound,
)
from meshwright.planner.placement.chain_partitions import (
    best_partitions,
    best_priced_partitions,
    lightest_partitions,
    num_partitions,
)
from meshwright.planner.placement.exact import exact_chain
from meshwright.planner.placement.routing import token_transitions
from meshwright.planner.placement.synthetic import SyntheticRouting, draw_routing

STRONG = SyntheticRouting(topic_strength=3.0, persistence=0.9)


def transitions_of(layers, experts, top_k, tokens, seed, spec=STRONG):
    routing = draw_routing(layers, experts, top_k, tokens, seed, spec)
    return routing, token_transitions(routing.tokens, experts)


def test_blocks_stay_together_and_uniform_transitions_stay_by_chance():
    blocks = np.kron(np.eye(4), np.ones((3, 3)))[None].repeat(3, axis=0)
    assert chain_weight(blocks, alternate(blocks, 4)) == blocks.sum()
    uniform = np.ones((2, 12, 12))
    assert chain_weight(uniform, alternate(uniform, 4)) / uniform.sum() == pytest.approx(0.25)
    assert chain_bound(uniform, 4) / uniform.sum() == pytest.approx(0.25)


def test_one_expert_per_rank_is_solved_exactly_with_gap_zero():
    _, transitions = transitions_of(8, 16, 2, 2000, 0)
    kept = chain_weight(transitions, alternate(transitions, 16))
    assert kept == pytest.approx(chain_bound(transitions, 16), rel=1e-9)


@pytest.mark.parametrize("index", range(4))
def test_as_good_as_integer_programming(index):
    layers, experts, ranks = ((3, 6, 3), (4, 6, 2))[index % 2]
    spec = SyntheticRouting(topic_strength=2.0, persistence=0.8, experts_per_topic=2)
    routing, transitions = transitions_of(layers, experts, 2, 1000, index, spec)
    exact = exact_chain(transitions, ranks)
    assert exact.is_proven
    every = best_partitions(transitions, routing.loads, ranks, np.full(layers, np.inf))
    assert chain_weight(transitions, every) == pytest.approx(exact.value)
    assert chain_weight(transitions, alternate_often(transitions, ranks, 40)) == pytest.approx(exact.value)
    assert chain_bound(transitions, ranks) >= exact.value * (1 - 1e-9)


def test_partitions_are_counted():
    assert num_partitions(8, 4) == 105
    assert num_partitions(8, 2) == 35
    assert num_partitions(8, 8) == num_partitions(8, 1) == 1
    assert num_partitions(256, 32) > 10**9 - 1


def test_partitions_hold_the_cap_and_the_price():
    routing, transitions = transitions_of(6, 8, 2, 4000, 1)
    loads, mean = routing.loads, routing.loads.sum(axis=1) / 4

    def peaks(ranks):
        return np.array(
            [np.bincount(r, weights=w, minlength=4).max() for r, w in zip(ranks, loads, strict=True)]
        )

    free = best_partitions(transitions, loads, 4, np.full(6, np.inf))
    floor = lightest_partitions(loads, 4)
    capped = best_partitions(transitions, loads, 4, floor)
    assert peaks(capped) == pytest.approx(floor)
    limit = 0.5 * ((peaks(free) / mean).mean() + (floor / mean).mean())
    priced = best_priced_partitions(transitions, loads, 4, limit)
    assert (peaks(priced) / mean).mean() <= limit + 1e-9
    weights = [chain_weight(transitions, each) for each in (capped, priced, free)]
    assert weights == sorted(weights)


def test_the_bounds_are_above_every_placement_and_tighten_one_another():
    _, transitions = transitions_of(2, 32, 4, 4000, 2)
    weights = transitions[0]
    kept = chain_weight(transitions, alternate(transitions, 4))
    matching, spectral = matching_bound(weights, 4), spectral_bound(weights, 4)
    combined = combined_bound(weights, 4, kept, 60)
    assert kept <= combined <= matching
    assert kept <= spectral
    generator = np.random.default_rng(0)
    for _ in range(50):
        ranks = np.array([generator.permutation(np.repeat(np.arange(4), 8)) for _ in range(2)])
        assert chain_weight(transitions, ranks) <= min(combined, spectral)


def test_the_matching_bound_is_the_optimum_of_its_linear_program():
    from scipy.optimize import linprog

    weights = np.random.default_rng(3).random((12, 12))
    rows, columns = np.kron(np.eye(12), np.ones((1, 12))), np.kron(np.ones((1, 12)), np.eye(12))
    exact = linprog(-weights.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.full(24, 3.0), bounds=(0, 1))
    assert matching_bound(weights, 4) == pytest.approx(-exact.fun, rel=5e-3)
    assert matching_bound(weights, 4) >= -exact.fun * (1 - 1e-9)


def test_certified_gap_of_a_large_instance():
    _, transitions = transitions_of(6, 64, 8, 8192, 0)
    ranks = alternate_often(transitions, 8, 0)
    pairs = np.array([chain_weight(transitions[i : i + 1], ranks[i : i + 2]) for i in range(5)])
    bound = chain_bound(transitions, 8, pairs)
    assert pairs.sum() <= bound
    assert 1.0 - pairs.sum() / bound <= 0.05


def test_renaming_ranks_keeps_sets_and_never_loses():
    _, transitions = transitions_of(5, 16, 2, 2000, 3)
    slots = np.array([np.random.default_rng(i).permutation(16) for i in range(5)])
    renamed = relabel_chain(transitions, slots, 4)
    for before, after in zip(slots.reshape(5, 4, 4), renamed.reshape(5, 4, 4), strict=True):
        assert {frozenset(row) for row in before.tolist()} == {frozenset(row) for row in after.tolist()}
    assert chain_weight(transitions, ranks_of_slots(renamed, 4)) >= chain_weight(
        transitions, ranks_of_slots(slots, 4)
    )


def test_a_joint_chain_keeps_the_cap():
    routing, transitions = transitions_of(4, 32, 4, 4000, 4)
    mean = routing.loads.sum(axis=1) / 4
    ranks = joint_chain(transitions, routing.loads, 4, 1.05 * mean, alternate(transitions, 4))
    for row, loads, limit in zip(ranks, routing.loads, 1.05 * mean, strict=True):
        assert np.bincount(row, weights=loads).max() <= limit * (1 + 1e-9)
        assert np.bincount(row).tolist() == [8] * 4
    assert slots_of_ranks(ranks).shape == (4, 32)


def test_a_chain_too_large_for_integer_programming_is_refused():
    with pytest.raises(SpecError, match="more than"):
        exact_chain(np.ones((3, 64, 64)), 8)
