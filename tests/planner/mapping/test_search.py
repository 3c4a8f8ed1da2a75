"""Host orders: costs by hand, brute force, bounds, and what a slow host must not touch."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from meshwright.errors import SpecError
from meshwright.planner.mapping import MappingProblem, order_cost, search_order
from meshwright.planner.mapping.annealing import anneal_order
from meshwright.planner.mapping.bounds import order_bound


def problem(
    bandwidth: np.ndarray, num_stages: int, hosts_per_stage: int, pipeline: float = 1.0, ring: float = 1.0
) -> MappingProblem:
    return MappingProblem(
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


def test_annealing_equals_brute_force_on_small_instances() -> None:
    random = np.random.default_rng(0)
    for case in range(200):
        stages, columns = ((2, 2), (1, 5), (5, 1), (2, 3), (3, 2))[case % 5]
        each = random_problem(random, stages * columns + (case % 3 == 0), stages, columns)
        exact = min(order_cost(each, np.array(order)) for order in permutations(range(each.num_hosts)))
        costs = []
        for seed in range(8):
            start = np.arange(each.num_hosts)
            order = start.copy()
            cost = anneal_order(
                each.hop_time, each.ring_time, stages, columns, start, order, np.zeros(columns), np.zeros(stages),
                2000, 0.2, 1e-4, seed,
            )  # fmt: skip
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
