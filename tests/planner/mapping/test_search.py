"""Host orders: costs by hand, brute force, bounds, and what a slow host must not touch."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from meshwright.errors import SpecError
from meshwright.planner.mapping import MappingProblem, Traffic, grid_problem, order_cost, search_order
from meshwright.planner.mapping.annealing import anneal_order
from meshwright.planner.mapping.bounds import order_bound


def problem(
    bandwidth: np.ndarray, num_stages: int, hosts_per_stage: int, pipeline: float = 1.0, ring: float = 1.0
) -> MappingProblem:
    return grid_problem(
        bandwidth=np.asarray(bandwidth, dtype=float),
        num_stages=num_stages,
        hosts_per_stage=hosts_per_stage,
        pipeline_bytes=pipeline,
        ring_bytes=ring,
    )


def random_problem(random: np.random.Generator, num_hosts: int, stages: int, columns: int) -> MappingProblem:
    bandwidth = random.uniform(5.0, 25.0, (num_hosts, num_hosts))
    return problem(bandwidth, stages, columns, random.uniform(0.0, 5.0), random.uniform(0.0, 5.0))


def test_the_cost_is_the_slowest_pipeline_plus_the_slowest_ring() -> None:
    # Hosts 0 1 | 2 3: hops 0-2 at 2 B/s and 1-3 at 4, rings 0-1 at 5 and 2-3 at 10.
    bandwidth = np.full((4, 4), 100.0)
    for one, two, speed in ((0, 2, 2.0), (1, 3, 4.0), (0, 1, 5.0), (2, 3, 10.0)):
        bandwidth[one, two] = bandwidth[two, one] = speed
    each = problem(bandwidth, 2, 2, pipeline=8.0, ring=20.0)
    assert order_cost(each, np.array([0, 1, 2, 3])) == pytest.approx(8.0 / 2.0 + 20.0 / 5.0)
    # Transposed: stages 0 2 | 1 3, so that 0-1 and 2-3 are hops and the others rings.
    assert order_cost(each, np.array([0, 2, 1, 3])) == pytest.approx(8.0 / 5.0 + 20.0 / 2.0)


def test_the_slower_direction_of_a_link_counts() -> None:
    bandwidth = np.array([[0.0, 10.0], [2.0, 0.0]])
    assert order_cost(problem(bandwidth, 2, 1, pipeline=6.0), np.array([0, 1])) == 3.0


def annealed(
    each: MappingProblem, num_moves: int, seed: int, start: tuple[int, ...] = ()
) -> tuple[float, np.ndarray]:
    flat = each.flat
    order = np.array(start or range(each.num_hosts))
    values = np.zeros((2, len(flat.group_start) - 1))
    cost = anneal_order(
        flat.time, flat.kind, flat.traffic_start, flat.group_start, flat.group_slots, flat.group_weight,
        flat.slot_start, flat.slot_groups, order.copy(), order, values[0], values[1], num_moves, 0.2, 1e-4, seed,
    )  # fmt: skip
    return cost, order


def mixed_problem(random: np.random.Generator, num_hosts: int, num_slots: int) -> MappingProblem:
    """Return groups of every kind and size, overlapping, some of which only count beyond a knee."""
    traffic = []
    for kind in ("path", "ring", "exchange"):
        time = random.uniform(0.0, 5.0, (num_hosts, num_hosts))
        np.fill_diagonal(time, 0.0)
        groups = tuple(
            tuple(random.permutation(num_slots)[: random.integers(2, num_slots + 1)].tolist())
            for _ in range(random.integers(1, 4))
        )
        weights = tuple(random.uniform(0.0, 2.0, len(groups)).tolist())
        steeper = tuple(random.uniform(0.0, 2.0, len(groups)).tolist())
        traffic.append(
            Traffic(
                kind=kind,
                time=np.maximum(time, time.T),
                groups=groups,
                weights=weights,
                steeper=steeper,
                knee=1.0,
            )  # type: ignore[arg-type]  # of the literals
        )
    return MappingProblem(num_hosts=num_hosts, num_slots=num_slots, traffic=tuple(traffic))


def test_annealing_equals_brute_force_on_small_instances() -> None:
    random = np.random.default_rng(0)
    for case in range(200):
        stages, columns = ((2, 2), (1, 5), (5, 1), (2, 3), (3, 2))[case % 5]
        if case % 2:
            each = random_problem(random, stages * columns + (case % 3 == 0), stages, columns)
        else:
            each = mixed_problem(random, 5, 5 - (case % 3 == 0))
        priced = {order: annealed(each, 0, 0, order)[0] for order in permutations(range(each.num_hosts))}
        some = tuple(random.permutation(each.num_hosts).tolist())
        assert priced[some] == pytest.approx(order_cost(each, np.array(some)), rel=1e-12)
        exact = min(priced.values())
        costs = []
        for seed in range(8):
            cost, order = annealed(each, 1_200, seed)
            assert order_cost(each, order) == pytest.approx(cost, rel=1e-12)
            costs.append(cost)
        assert min(costs) == pytest.approx(exact, rel=1e-12)
        assert order_bound(each) <= exact * (1.0 + 1e-12)


def test_a_search_never_ends_worse_than_it_began_and_respects_its_bound() -> None:
    random = np.random.default_rng(1)
    for stages, columns in ((4, 3), (8, 2), (2, 8)):
        each = random_problem(random, stages * columns + 1, stages, columns)
        result = search_order(each, seed=3, effort=1e-3)
        assert result.bound <= result.cost <= result.identity_cost
        assert sorted(result.order) == list(range(each.num_hosts))
        assert result.cost == order_cost(each, result.order)
        assert np.array_equal(result.order, search_order(each, seed=3, effort=1e-3).order)


def test_a_few_hosts_are_tried_in_all_orders() -> None:
    result = search_order(random_problem(np.random.default_rng(2), 6, 2, 3))
    assert result.is_exact
    assert result.gap == 0.0
    assert result.num_evaluations == 720


def test_the_host_with_slow_links_stays_idle_when_there_is_one_to_spare() -> None:
    bandwidth = np.full((9, 9), 20.0)
    bandwidth[4, :] = bandwidth[:, 4] = 1.0
    result = search_order(problem(bandwidth, 2, 4), effort=1e-3)
    assert result.order[-1] == 4
    assert result.cost == pytest.approx(result.bound)


def test_pipelines_cross_the_slow_border_of_two_islands_and_rings_do_not() -> None:
    # Alternating islands: 20 B/s inside, 1 B/s across; rings move far more than pipelines.
    island = np.arange(12) % 2
    bandwidth = np.where(island[:, None] == island[None, :], 20.0, 1.0)
    result = search_order(problem(bandwidth, 2, 6, pipeline=1.0, ring=50.0), effort=1e-2)
    stages = island[result.order].reshape(2, 6)
    assert all(len(set(stage)) == 1 for stage in stages)


@pytest.mark.parametrize(
    ("bandwidth", "shape", "message"),
    [
        (np.ones((2, 3)), (2, 1), "square matrix"),
        (np.zeros((2, 2)), (2, 1), "must be above 0"),
        (np.ones((3, 3)), (2, 2), "fills 4 hosts, the matrix has 3"),
        (np.ones((3, 3)), (0, 2), "at least 1"),
    ],
)
def test_impossible_mappings_are_refused(bandwidth: np.ndarray, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        problem(bandwidth, *shape)
