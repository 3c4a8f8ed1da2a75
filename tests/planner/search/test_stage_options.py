from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from meshwright.planner.search.non_dominated import non_dominated
from meshwright.planner.search.relayout_tours import RelayoutTours
from meshwright.planner.search.stage_options import StageLimit, best_option, pareto_options
from meshwright.planner.search.stage_problem import COSTS, REDUCE, StageProblem

MOST_LABELS = 1_000_000


def random_tours(rng: np.random.Generator, num_layouts: int) -> RelayoutTours:
    """Return tours over random re-layout times, closed under chaining."""
    times = rng.uniform(0.0, 0.3, (num_layouts, num_layouts)) * rng.integers(0, 2, (num_layouts, num_layouts))
    np.fill_diagonal(times, 0.0)
    for via in range(num_layouts):
        times = np.minimum(times, times[:, [via]] + times[[via]])
    return RelayoutTours(times, ends=int(rng.integers(num_layouts)))


def random_problem(rng: np.random.Generator) -> StageProblem:
    num_strategies = int(rng.integers(2, 5))
    # At most 1,024 sequences.
    num_layers = int(rng.integers(3, 6 if num_strategies == 4 else 7))
    num_layouts, num_groups = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    layer_memory = rng.uniform(1.0, 4.0, num_strategies)
    working_memory = rng.uniform(0.0, 3.0, num_strategies) * rng.integers(0, 2, num_strategies)
    # Latency plus bandwidth: steps at the first layer, and curves either way.
    layers = np.arange(num_layers + 1)[np.newaxis, :, np.newaxis]
    sync = rng.uniform(0.0, 0.5, (num_groups, 1, 3)) * (layers > 0)
    sync = sync + rng.uniform(0.0, 1.0, (num_groups, 1, 3)) * layers ** rng.uniform(
        0.5, 1.5, (num_groups, 1, 3)
    )
    sync[0] += rng.uniform(0.0, 1.0, 3)
    least, most = layer_memory.min() * num_layers, layer_memory.max() * num_layers + 3.0
    return StageProblem(
        num_layers=num_layers,
        layer_time=rng.uniform(0.5, 2.0, (num_strategies, 2)),
        layer_memory=layer_memory,
        working_memory=working_memory,
        layout=rng.integers(0, num_layouts, num_strategies),
        group=rng.integers(0, num_groups, num_strategies),
        sync_time=sync,
        boundary_time=rng.uniform(0.0, 1.0, 2),
        boundary_working_memory=float(rng.choice([0.0, 1.5])),
        memory_budget=float(rng.uniform(least, most)),
        tours=random_tours(rng, num_layouts),
    )


def brute_force(problem: StageProblem) -> NDArray[np.float64]:
    """Return the costs of every sequence of strategies that fits, layer by layer, ``(num_sequences, 5)``."""
    times, ends = problem.tours._time, problem.tours._ends
    costs = []
    for sequence in itertools.product(range(len(problem.layout)), repeat=problem.num_layers):
        memory = sum(problem.layer_memory[s] for s in sequence)
        memory += max([problem.boundary_working_memory, *(problem.working_memory[s] for s in sequence)])
        if memory > problem.memory_budget:
            continue
        total = np.zeros(len(COSTS))
        total[:REDUCE] = problem.boundary_time
        place = ends
        for strategy in sequence:
            total[:REDUCE] += problem.layer_time[strategy]
            layout = problem.layout[strategy]
            total[:REDUCE] += (times[place, layout], times[layout, place])
            place = layout
        total[:REDUCE] += (times[place, ends], times[ends, place])
        for group in range(len(problem.sync_time)):
            held = sum(problem.group[s] == group for s in sequence)
            total[REDUCE:] += problem.sync_time[group, held]
        costs.append(total)
    return np.array(costs).reshape(-1, len(COSTS))


@pytest.mark.parametrize("seed", range(200))
def test_the_best_option_is_what_trying_every_sequence_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng)
    weights = np.array([8.0, 8.0, *rng.uniform(0.0, 1.0, 3)])
    costs = brute_force(problem)
    found = best_option(problem, weights, np.inf, MOST_LABELS)
    assert found is not None
    if not len(costs):
        assert not len(found.counts)
        return
    assert found.costs[0] @ weights == pytest.approx((costs @ weights).min(), rel=1e-12)
    assert found.counts[0].sum() == problem.num_layers
    assert problem.memory(found.counts[0]) <= problem.memory_budget
    assert problem.cost(found.counts[0], weights) == pytest.approx(found.costs[0])
    assert problem.lower_bound(weights) <= (costs @ weights).min() * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(100))
def test_the_options_are_the_pareto_front_of_every_sequence_within_the_limits(seed: int) -> None:
    rng = np.random.default_rng([1, seed])
    problem = random_problem(rng)
    limits = [
        StageLimit(np.array([*batches, *rng.uniform(0.0, 1.0, 3)]), np.inf)
        for batches in ((4.0, 4.0), (1.0, 3.0))
    ]
    costs = brute_force(problem)
    if len(costs):
        limits = [
            StageLimit(weights, (costs @ weights).min() * rng.uniform(1.0, 1.3)) for weights, _ in limits
        ]
        for weights, limit in limits:
            costs = costs[costs @ weights <= limit]
        # Sums in another order differ in their last digits, which are no trade-off.
        costs = costs[non_dominated(np.zeros(len(costs), dtype=np.int64), np.round(costs, 9))]
    found = pareto_options(problem, limits, MOST_LABELS)
    assert found is not None
    rounded = np.round(found.costs, 9)
    rounded = rounded[non_dominated(np.zeros(len(rounded), dtype=np.int64), rounded)]
    assert sorted(map(tuple, rounded)) == sorted(map(tuple, np.round(costs, 9)))


def test_a_stage_without_layers_costs_what_its_ends_cost() -> None:
    problem = random_problem(np.random.default_rng(5))
    empty = StageProblem(
        num_layers=0,
        layer_time=problem.layer_time,
        layer_memory=problem.layer_memory,
        working_memory=problem.working_memory,
        layout=problem.layout,
        group=problem.group,
        sync_time=problem.sync_time[:, :1],
        boundary_time=problem.boundary_time,
        boundary_working_memory=1.0,
        memory_budget=2.0,
        tours=problem.tours,
    )
    weights = np.ones(len(COSTS))
    found = best_option(empty, weights, np.inf, MOST_LABELS)
    assert found is not None
    assert found.counts.tolist() == [[0] * len(problem.layout)]
    expected = [*problem.boundary_time, *problem.sync_time[:, 0].sum(axis=0)]
    assert found.costs[0].tolist() == pytest.approx(expected)


def test_nothing_fits_into_no_memory_and_too_many_labels_are_told() -> None:
    problem = random_problem(np.random.default_rng(7))
    weights = np.ones(len(COSTS))
    arguments = {name: getattr(problem, name) for name in StageProblem.__slots__}
    tight = StageProblem(**arguments | {"memory_budget": 0.5})
    assert tight.lower_bound(weights) == np.inf
    found = best_option(tight, weights, np.inf, MOST_LABELS)
    assert found is not None
    assert not len(found.counts)
    assert pareto_options(problem, [StageLimit(weights, np.inf)], 1) is None


def test_fronts_are_kept_per_group_and_equal_rows_once() -> None:
    rng = np.random.default_rng(3)
    group = rng.integers(0, 3, 200)
    values = rng.integers(0, 6, (200, 3)).astype(np.float64)
    kept = non_dominated(group, values)
    for row in range(200):
        rivals = np.flatnonzero((group == group[row]) & (values <= values[row]).all(axis=1))
        is_beaten = any((values[rival] < values[row]).any() or rival < row for rival in rivals)
        assert (row in kept) == (not is_beaten)


def test_tours_are_the_cheapest_orders_of_visiting_a_set() -> None:
    rng = np.random.default_rng(11)
    weights = np.array([1.0, 1.0])
    for _ in range(20):
        tours = random_tours(rng, 4)
        times, ends = tours._time, tours._ends
        members = [layout for layout in range(4) if layout != ends]
        mask = int(sum(tours.bits[layout] for layout in members))
        totals = {}
        for order in itertools.permutations(members):
            path = [ends, *order, ends]
            pairs = list(itertools.pairwise(path))
            totals[order] = sum(times[a, b] + times[b, a] for a, b in pairs)
        assert tours.least(np.array([mask]), weights)[0] == pytest.approx(min(totals.values()))
        assert totals[tours.order(mask, weights)] == pytest.approx(min(totals.values()))
    assert tours.times(0).tolist() == [[0.0, 0.0]]
