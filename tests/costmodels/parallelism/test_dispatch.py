"""Traffic and time of a dispatch against DeepEP's published table, closed forms against drawn tokens."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.costmodels.parallelism.dispatch import (
    LOW_LATENCY_DISPATCH,
    LinkRates,
    capacity_rows,
    coherent_traffic,
    deduplicated_traffic,
    dropped_rows,
    exchange_time,
    expected_places,
    flow_shop_time,
    full_traffic,
    link_rates,
    overlapped_layer_time,
    tiled_rows,
)
from meshwright.hardware_specs.catalog import resolve_cluster

# DeepEP, README, low-latency kernels: ranks, bytes per element, latency [us], bandwidth [GB/s].
LOW_LATENCY = [
    (8, 1.03125, 77, 98), (8, 2.0, 114, 127), (16, 1.03125, 118, 63), (16, 2.0, 195, 74),
    (32, 1.03125, 155, 48), (32, 2.0, 273, 53), (64, 1.03125, 173, 43), (64, 2.0, 314, 46),
    (128, 1.03125, 192, 39), (128, 2.0, 369, 39), (256, 1.03125, 194, 39), (256, 2.0, 360, 40),
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "element", "latency", "bandwidth"), LOW_LATENCY)
def test_low_latency_table(ranks, element, latency, bandwidth):
    traffic = full_traffic(128, 7168, element, 8, ranks, 8)
    published = latency * 1e-6 * bandwidth * 1e9
    assert traffic.between_nodes + traffic.inside_node == pytest.approx(published, rel=0.03)
    assert exchange_time(traffic, LOW_LATENCY_DISPATCH) * 1e6 == pytest.approx(latency, rel=0.15)


@pytest.mark.parametrize(
    ("experts", "top_k", "places", "groups", "chosen"),
    [(256, 8, 4, 1, 1), (256, 8, 8, 8, 4), (256, 8, 4, 8, 4), (64, 6, 16, 8, 3), (8, 2, 2, 1, 1)],
)
def test_expected_places_are_those_of_drawn_tokens(experts, top_k, places, groups, chosen):
    generator = np.random.default_rng(3)
    scores = generator.random((20_000, experts))
    order = np.argsort(generator.random((20_000, groups)), axis=1)[:, chosen:]
    closed = np.zeros((20_000, groups), dtype=bool)
    np.put_along_axis(closed, order, True, axis=1)
    scores += np.repeat(closed, experts // groups, axis=1)
    drawn = np.argpartition(scores, top_k - 1, axis=1)[:, :top_k] * places // experts
    hits = np.zeros((20_000, places), dtype=bool)
    np.put_along_axis(hits, drawn, True, axis=1)
    assert expected_places(experts, top_k, places, groups, chosen) == pytest.approx(
        hits.sum(axis=1).mean(), rel=0.01
    )


def test_expected_places_at_the_ends():
    assert expected_places(256, 8, 1) == pytest.approx(1.0)
    assert expected_places(16, 16, 4) == pytest.approx(4.0)
    assert expected_places(16, 1, 4) == pytest.approx(1.0)
    assert expected_places(256, 8, 8, 8, 4) <= 4.0
    with pytest.raises(ValueError, match="more experts than its groups"):
        expected_places(8, 4, 2, 4, 1)


def test_deduplicated_dispatch_sends_a_token_once_to_each_node():
    traffic = deduplicated_traffic(10, 100, 2.0, 2.5, 6.0, 3.25)
    assert traffic.between_nodes == pytest.approx(10 * 100 * 2 * 2.5)
    assert traffic.inside_node == pytest.approx(10 * 100 * 2 * (6.0 - 3.25))


def test_coherent_dispatch_sends_what_leaves_its_rank():
    assert coherent_traffic(10, 100, 2.0, 2, 1.0, 16, 8).between_nodes == 0.0
    traffic = coherent_traffic(10, 100, 2.0, 2, 0.25, 16, 8)
    assert traffic.between_nodes + traffic.inside_node == pytest.approx(10 * 100 * 2 * 2 * 0.75)
    assert traffic.between_nodes / traffic.inside_node == pytest.approx(8 / 7)


def test_links_work_at_once_or_in_turn():
    rates = LinkRates(between_nodes=1.0, inside_node=2.0, latency=5.0)
    traffic = full_traffic(1, 8, 1.0, 2, 2, 1)
    assert exchange_time(traffic, rates) == pytest.approx(5.0 + 8.0)
    in_turn = LinkRates(between_nodes=1.0, inside_node=2.0, latency=5.0, is_parallel=False)
    assert exchange_time(traffic, in_turn, heat=1.5) == pytest.approx(5.0 + 12.0 + 6.0)


def test_rates_follow_the_cluster():
    rates = link_rates(resolve_cluster("dgx-h200:4"))
    assert 0.8 * 50e9 < rates.between_nodes < 50e9
    assert rates.inside_node > 5 * rates.between_nodes


def test_capacity_drops_what_does_not_fit_and_tiles_round_up():
    assert capacity_rows(100, 2, 8, 1.25) == 32
    loads = np.array([10.0, 50.0, 40.0])
    assert dropped_rows(loads, 40.0) == pytest.approx(0.1)
    assert dropped_rows(loads, 50.0) == 0.0
    assert tiled_rows(np.array([0.0, 1.0, 128.0, 129.0])).tolist() == [0.0, 128.0, 128.0, 256.0]


def simulated_flow_shop(stages, degree):
    free = [0.0] * len(stages)
    for _ in range(degree):
        ready = 0.0
        for index, seconds in enumerate(stages):
            free[index] = ready = max(free[index], ready) + seconds
    return free[-1]


@pytest.mark.parametrize("stages", [(1.0, 2.0, 3.0), (3.0, 1.0, 2.0), (2.0, 5.0, 2.0)])
@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_flow_shop_is_that_of_a_simulation(stages, degree):
    assert flow_shop_time(stages, degree) == pytest.approx(simulated_flow_shop(stages, degree))


def test_overlap_hides_the_shorter_side_and_pays_latency_per_chunk():
    assert overlapped_layer_time(2.0, 3.0, 1.0, 0.0, 1) == pytest.approx(6.0)
    assert overlapped_layer_time(2.0, 3.0, 1.0, 0.0, 4) == pytest.approx(max(3.0 + 0.75, 3.0 + 0.75))
    assert overlapped_layer_time(2.0, 3.0, 1.0, 0.0, 4, is_shared=False) == pytest.approx(
        0.5 + 0.75 + 0.25 + 3 * 0.75
    )
    slow = overlapped_layer_time(2.0, 1.0, 2.0, 1.0, 8)
    assert slow > overlapped_layer_time(2.0, 1.0, 2.0, 1.0, 1)
