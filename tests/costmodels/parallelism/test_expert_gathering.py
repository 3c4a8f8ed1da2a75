"""Experts gathered for an iteration: bytes by hand, and what computation hides."""

from __future__ import annotations

import pytest

from meshwright.costmodels.parallelism.dispatch import LinkRates
from meshwright.costmodels.parallelism.expert_gathering import gather_time, gathered_experts

RATES = LinkRates(between_nodes=40e9, inside_node=160e9, latency=10e-6)


def test_a_group_gathers_what_its_ranks_do_not_own():
    assert gathered_experts(256, 32, 32) == 0.0
    assert gathered_experts(256, 32, 8) == 24.0
    assert gathered_experts(256, 32, 1) == 248.0


def test_nothing_gathered_costs_nothing():
    for number, ranks in ((0.0, 16), (4.0, 1)):
        times = gather_time(number, 1e9, 1e9, RATES, ranks, 8)
        assert (times.forward, times.backward, times.exposed) == (0.0, 0.0, 0.0)


def test_bytes_of_the_other_nodes_bind():
    # 15 other ranks, 8 of them on the other node: 2 experts of 30 MB, 32 MB over the NIC.
    times = gather_time(2.0, 30e6, 30e6, RATES, 16, 8)
    assert times.forward == pytest.approx(10e-6 + 32e6 / 40e9)
    assert times.backward == times.forward
    assert times.exposed == pytest.approx(2.0 * times.forward)
    inside = gather_time(2.0, 30e6, 30e6, RATES, 8, 8)
    assert inside.forward == pytest.approx(10e-6 + 60e6 / 160e9)


def test_computation_hides_what_runs_beside_it():
    plain = gather_time(2.0, 30e6, 60e6, RATES, 16, 8)
    # Gradients are twice as wide and leave while weights arrive.
    assert plain.backward == pytest.approx(10e-6 + 64e6 / 40e9)
    half = gather_time(
        2.0, 30e6, 60e6, RATES, 16, 8, forward_window=plain.forward / 2, backward_window=plain.backward
    )
    assert half.exposed == pytest.approx(plain.forward / 2)
