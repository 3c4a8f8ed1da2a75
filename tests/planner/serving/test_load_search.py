"""The highest load that keeps a limit is found, with few runs, and given up early where it cannot win."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.planner.serving.load_search import LoadPoint, highest_load, violated
from meshwright.simcore.domain.serving import Slo, SloLimit

SLO = Slo(limits=(SloLimit(metric="tpot", statistic="p99", seconds=1.0),))


class Deployment:
    """Latency 1 exactly at ``capacity``."""

    def __init__(self, capacity):
        self.capacity, self.loads = capacity, []

    def __call__(self, load):
        self.loads.append(load)
        return LoadPoint(load=load, rate=load, metrics={"tpot_p99": load / self.capacity}, figures={})


@given(capacity=st.floats(0.1, 100.0), tolerance=st.sampled_from([0.1, 0.04, 0.01]))
def test_the_bracket_holds_the_capacity(capacity, tolerance):
    run = Deployment(capacity)
    found = highest_load(run, SLO, upper=100.0, tolerance=tolerance)
    if found.best is None:
        assert capacity < 100.0 / 32
        return
    assert found.best.load <= capacity * (1 + 1e-12)
    if found.failing is not None:
        assert found.failing.load > capacity
        assert found.spread <= tolerance
    assert found.num_runs == len(run.loads) <= 20


@given(capacity=st.integers(1, 64))
def test_clients_are_whole_numbers_and_the_answer_is_exact(capacity):
    run = Deployment(capacity)
    found = highest_load(run, SLO, upper=64.0, tolerance=0.001, is_whole=True)
    assert found.best is not None
    assert all(load == int(load) for load in run.loads)
    assert found.best.load == capacity


def test_a_load_to_beat_ends_the_search_at_once():
    run = Deployment(10.0)
    found = highest_load(run, SLO, upper=100.0, to_beat=50.0)
    assert (found.is_beaten, found.best, run.loads) == (True, None, [50.0])


def test_clients_are_tried_beyond_the_bound_requests_per_second_are_not():
    assert highest_load(Deployment(10.0), SLO, upper=5.0).best.load == 5.0
    assert highest_load(Deployment(8.0), SLO, upper=5.0, is_whole=True, tolerance=0.01).best.load == 8.0


def test_a_pile_of_requests_breaks_every_slo():
    steady, growing = (
        LoadPoint(load=1.0, rate=1.0, metrics={"tpot_p99": 0.5}, figures={}, is_stable=stable)
        for stable in (True, False)
    )
    assert violated(steady, SLO) == ()
    assert violated(growing, SLO) == ("load",)


def test_the_worst_limit_comes_first():
    slo = Slo(
        limits=(
            SloLimit(metric="tpot", statistic="p99", seconds=1.0),
            SloLimit(metric="ttft", statistic="p99", seconds=1.0),
        )
    )
    point = LoadPoint(load=1.0, rate=1.0, metrics={"tpot_p99": 2.0, "ttft_p99": 3.0}, figures={})
    assert violated(point, slo) == ("ttft_p99", "tpot_p99")


def test_not_a_number_is_never_within_a_limit():
    point = LoadPoint(load=1.0, rate=1.0, metrics={"tpot_p99": float("nan")}, figures={})
    assert violated(point, SLO) == ("tpot_p99",)


@pytest.mark.parametrize("upper", [1.0, 3.0])
def test_one_client_that_fails_is_the_end(upper):
    assert highest_load(Deployment(0.5), SLO, upper=upper, is_whole=True).best is None
