"""Even load: published optima, never worse than EPLB, equal to integer programming where that closes."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.planner.placement.balance import (
    balance_grouped_layer,
    balance_layer,
    balance_slots,
    level_over_windows,
)
from meshwright.planner.placement.certificates import packing_bound
from meshwright.planner.placement.eplb import eplb_layer, eplb_slots, replica_counts
from meshwright.planner.placement.exact import exact_balance, exact_replicated_balance

# deepseek-ai/EPLB, README: weights and the placement it prints; optima by enumeration.
README = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    dtype=np.float64,
)
README_SLOTS = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def heaviest(loads, slots, num_ranks):
    counts = np.maximum(np.bincount(slots, minlength=len(loads)), 1)
    return (loads / counts)[slots].reshape(num_ranks, -1).sum(axis=1).max()


def test_the_baseline_is_the_published_algorithm():
    assert eplb_slots(README, 16, 4, 2, 8).tolist() == README_SLOTS
    assert heaviest(README[0], np.array(README_SLOTS[0]), 8) == 156.0


@pytest.mark.parametrize(("layer", "optimum", "grouped"), [(0, 136.0, 151.0), (1, 172.0, 179.5)])
def test_the_readme_instance_is_solved_to_its_optima(layer, optimum, grouped):
    loads = README[layer]
    assert heaviest(loads, balance_layer(loads, 16, 8), 8) == pytest.approx(optimum)
    assert heaviest(loads, balance_grouped_layer(loads, 16, 8, 4, 2), 8) == pytest.approx(grouped)


def test_groups_stay_on_one_node():
    slots = balance_grouped_layer(README[0], 16, 8, 4, 2)
    nodes = slots.reshape(2, 8) // 3
    assert not set(nodes[0]) & set(nodes[1])


@pytest.mark.parametrize(
    ("loads", "slots", "ranks"),
    [
        ([50.0] * 8, 8, 4),
        ([1000.0] + [1.0] * 7, 12, 4),
        ([10.0, 20.0, 30.0, 40.0], 4, 1),
        ([0.0, 0.0, 5.0, 1.0], 6, 2),
    ],
)
def test_every_expert_has_a_slot(loads, slots, ranks):
    placed = balance_layer(np.array(loads), slots, ranks)
    assert len(placed) == slots
    assert set(placed.tolist()) == set(range(len(loads)))


@pytest.mark.parametrize(("experts", "ranks", "slots"), [(256, 32, 288), (128, 32, 160), (128, 8, 136)])
def test_residual_imbalance_is_cut_by_nine_tenths_and_no_layer_is_worse(experts, ranks, slots):
    loads = np.random.default_rng(1).lognormal(0.0, 0.8, (3, experts))
    theirs, ours = eplb_slots(loads, slots, 1, 1, ranks), balance_slots(loads, slots, ranks)
    mean = loads.sum(axis=1) / ranks
    before, after = (
        np.array([heaviest(w, s, ranks) for w, s in zip(loads, each, strict=True)]) / mean
        for each in (theirs, ours)
    )
    assert (after <= before * (1 + 1e-12)).all()
    assert (after - 1.0).sum() <= 0.1 * (before - 1.0).sum()


def test_few_slots_per_rank_are_never_worse_than_the_baseline():
    loads = np.random.default_rng(2).lognormal(0.0, 0.8, (4, 48))
    for slots, ranks in ((54, 27), (60, 60), (48, 48)):
        for w, theirs, ours in zip(
            loads, eplb_slots(loads, slots, 1, 1, ranks), balance_slots(loads, slots, ranks), strict=True
        ):
            floor = packing_bound(w, slots, ranks)
            assert floor * (1 - 1e-9) <= heaviest(w, ours, ranks) <= heaviest(w, theirs, ranks) * (1 + 1e-12)


@pytest.mark.parametrize("index", range(8))
def test_without_copies_as_good_as_integer_programming(index):
    experts, ranks = ((8, 4), (9, 3), (10, 5), (6, 2))[index % 4]
    loads = np.random.default_rng(index).lognormal(0.0, 0.8, experts)
    exact = exact_balance(loads, ranks)
    assert exact.is_proven
    ours = heaviest(loads, balance_layer(loads, experts, ranks), ranks)
    assert ours == pytest.approx(exact.value, rel=1e-9)
    assert packing_bound(loads, experts, ranks) <= exact.value * (1 + 1e-9)


@pytest.mark.parametrize("index", range(8))
def test_with_copies_as_good_as_integer_programming(index):
    experts, ranks, slots = ((4, 3, 6), (5, 3, 9), (6, 4, 8), (5, 2, 6))[index % 4]
    loads = np.random.default_rng(100 + index).lognormal(0.0, 0.8, experts)
    exact = exact_replicated_balance(loads, slots, ranks)
    assert exact.is_proven
    assert heaviest(loads, balance_layer(loads, slots, ranks), ranks) == pytest.approx(exact.value, rel=1e-9)


def test_cbc_agrees_with_highs():
    loads = np.random.default_rng(5).lognormal(0.0, 0.8, 8)
    assert exact_balance(loads, 4, solver="cbc").value == pytest.approx(exact_balance(loads, 4).value)


def test_a_time_limit_is_not_taken_for_a_proof():
    loads = np.random.default_rng(0).lognormal(0.0, 0.8, 64)
    exact = exact_balance(loads, 16, time_limit=0.5)
    ours = heaviest(loads, balance_layer(loads, 64, 16), 16)
    assert not exact.is_proven or exact.value <= ours * (1 + 1e-9)
    assert exact.value == pytest.approx(heaviest(loads, exact.slots[0], 16))


def test_greedy_counts_make_the_heaviest_copy_lightest():
    loads = np.array([8.0, 4.0, 1.0])
    assert replica_counts(loads, 6).tolist() == [3, 2, 1]
    assert replica_counts(loads, 3).tolist() == [1, 1, 1]


def test_windows_are_levelled_on_average():
    generator = np.random.default_rng(4)
    windows = generator.lognormal(0.0, 1.0, (3, 10)) * 100
    start = eplb_layer(windows.sum(axis=0), 12, 1, 1, 4)
    robust = level_over_windows(windows, start, 4)

    def mean_peak(slots):
        return np.mean([heaviest(w, slots, 4) / w.sum() for w in windows])

    assert sorted(robust.tolist()) == sorted(start.tolist())
    assert mean_peak(robust) <= mean_peak(start)
    assert mean_peak(robust) < mean_peak(eplb_layer(windows[0], 12, 1, 1, 4))
