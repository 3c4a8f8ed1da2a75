"""Whole shares for unequal workers: equal to brute force, and in proportion to speed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from meshwright.costmodels.partition import balanced_shares


def _slowest(shares: tuple[int, ...], seconds: list[float], extra: list[float]) -> float:
    return max(share * each + more for share, each, more in zip(shares, seconds, extra, strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_no_other_shares_end_before_the_balanced_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    workers, total = int(rng.integers(2, 5)), int(rng.integers(4, 14))
    seconds = rng.uniform(0.5, 3.0, workers).tolist()
    extra = rng.uniform(0.0, 4.0, workers).tolist()
    most = rng.integers(1, total + 1, workers).tolist()
    possible = [
        shares
        for shares in itertools.product(*(range(1, limit + 1) for limit in most))
        if sum(shares) == total
    ]
    found = balanced_shares(total, seconds, extra, most)
    if not possible:
        assert found is None
        return
    assert found in possible
    best = min(_slowest(shares, seconds, extra) for shares in possible)
    assert _slowest(found, seconds, extra) == pytest.approx(best, rel=1e-12)


def test_workers_of_twice_the_speed_take_twice_as_much() -> None:
    assert balanced_shares(48, [1.0, 1.0, 2.0, 2.0]) == (16, 16, 8, 8)


def test_equal_workers_take_equal_shares_and_later_ones_the_rest() -> None:
    assert balanced_shares(10, [1.0, 1.0, 1.0, 1.0]) == (2, 2, 3, 3)


def test_too_little_to_share_or_too_little_room_is_no_share() -> None:
    assert balanced_shares(2, [1.0, 1.0, 1.0]) is None
    assert balanced_shares(9, [1.0, 1.0], most=[4, 4]) is None
    assert balanced_shares(9, [1.0, 1.0], most=[0, 9]) is None
