"""Collectives fitted to times of a known latency and bandwidth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import CalibrationError
from meshwright.profiler.fitting.collectives import BUS_FACTORS, fit_collectives, fit_p_norm, monotone_table
from meshwright.profiler.measurements import CollectiveSamples

SIZES = 2.0 ** np.arange(10, 33)
LINK = 450e9


def made(
    collective: str = "all_reduce",
    ranks: int = 8,
    *,
    latency: float = 2e-5,
    bandwidth: float = 0.8 * LINK,
    exponent: float = 1.5,
    sizes: np.ndarray = SIZES,
    noise: float = 0.0,
) -> CollectiveSamples:
    traffic = BUS_FACTORS.get(collective, 1.0) * (ranks - 1) / ranks * sizes
    seconds = (latency**exponent + (traffic / bandwidth) ** exponent) ** (1.0 / exponent)
    seconds = seconds * np.exp(noise * np.random.default_rng(0).normal(size=len(sizes)))
    return CollectiveSamples(
        collective=collective, ranks=ranks, num_bytes=sizes, seconds=seconds, source="made up"
    )


@pytest.mark.parametrize("collective", BUS_FACTORS)
@pytest.mark.parametrize("exponent", [0.6, 1.0, 3.0])
def test_latency_bus_bandwidth_and_exponent_are_recovered(collective: str, exponent: float) -> None:
    fitted = fit_p_norm(made(collective, exponent=exponent))
    assert fitted == pytest.approx((2e-5, 0.8 * LINK, exponent), rel=0.005)


def test_noise_of_three_percent_moves_latency_and_bandwidth_little() -> None:
    latency, bandwidth, _ = fit_p_norm(made(noise=0.03))
    assert (latency, bandwidth) == (pytest.approx(2e-5, rel=0.05), pytest.approx(0.8 * LINK, rel=0.05))


def test_curves_list_group_sizes_in_order_and_efficiency_of_the_link() -> None:
    samples = [made(ranks=8), made(ranks=2, latency=1e-5), made("all_gather", 4), made("broadcast", 4)]
    curves = fit_collectives(samples, LINK)
    assert list(curves) == ["all_gather", "all_reduce"]
    curve = curves["all_reduce"]
    assert curve.ranks == (2.0, 8.0)
    assert curve.latency == pytest.approx((1e-5, 2e-5), rel=0.005)
    assert curve.link_efficiency == pytest.approx((0.8, 0.8), rel=0.005)
    assert curve.exponent == pytest.approx((1.5, 1.5), rel=0.005)
    assert curve.link_bandwidth == LINK


def test_tables_of_a_curve_hold_the_measured_times() -> None:
    samples = made(noise=0.01)
    table = fit_collectives([samples], LINK)["all_reduce"].tables[0]
    assert table is not None
    np.testing.assert_array_equal(table.num_bytes, SIZES)
    # Times of doubling sizes rise by more than noise of 1 %, but for the latency-bound ones.
    np.testing.assert_allclose(table.seconds, samples.seconds, rtol=0.03)


def test_the_error_is_of_sizes_between_those_of_half_the_table() -> None:
    # Log-log lines through a pure power law miss nothing.
    power = made(latency=1e-12)
    assert fit_collectives([power], LINK)["all_reduce"].error == pytest.approx(0.0, abs=1e-5)
    # A bend between sizes four times apart is missed by a few percent at most.
    error = fit_collectives([made(exponent=3.0)], LINK)["all_reduce"].error
    assert error is not None
    assert 0.001 < error < 0.05


@pytest.mark.parametrize("count", [1, 5])
def test_too_few_sizes_say_how_many_more(count: int) -> None:
    expected = f"all_reduce of 8 ranks: {count} message sizes are too few; measure {6 - count} more"
    with pytest.raises(CalibrationError, match=expected):
        fit_collectives([made(sizes=SIZES[:count])], LINK)


def test_rising_times_make_a_table_of_themselves() -> None:
    samples = made()
    shuffled = np.random.default_rng(1).permutation(len(SIZES))
    table = monotone_table(
        CollectiveSamples(
            collective="all_reduce",
            ranks=8,
            num_bytes=SIZES[shuffled],
            seconds=samples.seconds[shuffled],
            source="made up",
        )
    )
    np.testing.assert_array_equal(table.num_bytes, SIZES)
    np.testing.assert_allclose(table.seconds, samples.seconds, rtol=1e-6)  # seven digits


def test_two_times_out_of_order_meet_at_their_geometric_mean() -> None:
    samples = CollectiveSamples(
        collective="all_reduce",
        ranks=8,
        num_bytes=np.array([1.0, 2.0, 4.0]),
        seconds=np.array([1.0, 8.0, 2.0]),
        source="made up",
    )
    np.testing.assert_allclose(monotone_table(samples).seconds, [1.0, 4.0, 4.0], rtol=1e-6)


def test_repeated_sizes_count_by_their_median() -> None:
    samples = CollectiveSamples(
        collective="all_reduce",
        ranks=8,
        num_bytes=np.array([1.0, 2.0, 1.0, 1.0]),
        seconds=np.array([1.0, 9.0, 3.0, 2.0]),
        source="made up",
    )
    table = monotone_table(samples)
    np.testing.assert_array_equal(table.num_bytes, [1.0, 2.0])
    np.testing.assert_allclose(table.seconds, [2.0, 9.0], rtol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(1, 40), st.floats(1e-7, 1e2)), min_size=1, max_size=60),
    sizes=st.lists(st.floats(1.0, 1e12), min_size=2, max_size=20),
)
def test_a_table_never_falls_whatever_was_measured(rows: list[tuple[int, float]], sizes: list[float]) -> None:
    samples = CollectiveSamples(
        collective="all_reduce",
        ranks=8,
        num_bytes=np.array([2.0**row for row, _ in rows]),
        seconds=np.array([seconds for _, seconds in rows]),
        source="made up",
    )
    table = monotone_table(samples)
    assert (np.diff(table.num_bytes) > 0.0).all()
    assert (np.diff(table.seconds) >= 0.0).all()
    # Evening stays within what was measured.
    assert samples.seconds.min() * (1 - 1e-6) <= table.seconds[0]
    assert table.seconds[-1] <= samples.seconds.max() * (1 + 1e-6)
    read = table.time(np.sort(np.array(sizes)))
    assert (np.diff(read) >= -1e-12 * read[:-1]).all()
