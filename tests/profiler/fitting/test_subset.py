from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.profiler.fitting.subset import spread_rows


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(1, 300),
    num_dims=st.integers(1, 12),
    count=st.integers(1, 400),
    levels=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_rows_are_distinct_ascending_and_as_many_as_wanted(
    num_rows: int, num_dims: int, count: int, levels: int, seed: int
) -> None:
    # Few levels make many rows equal, as tables of sizes are.
    table = np.random.default_rng(0).integers(0, levels, (num_rows, num_dims)).astype(float)
    rows = spread_rows(table, count, seed)
    assert len(rows) == min(count, num_rows)
    assert (np.diff(rows) > 0).all()
    assert rows[0] >= 0
    assert rows[-1] < num_rows
    np.testing.assert_array_equal(rows, spread_rows(table, count, seed))


@pytest.mark.parametrize("num_dims", [3, 6])
def test_another_seed_draws_other_rows(num_dims: int) -> None:
    table = np.random.default_rng(1).random((1000, num_dims))
    assert not np.array_equal(spread_rows(table, 50, 0), spread_rows(table, 50, 1))


@pytest.mark.parametrize("num_dims", [1, 3, 6])
def test_rows_leave_smaller_holes_than_rows_at_random(num_dims: int) -> None:
    rng = np.random.default_rng(2)
    # Nine tenths of the table crowd in one corner.
    table = np.concatenate([rng.random((1800, num_dims)) * 0.2, rng.random((200, num_dims))])

    def hole(rows: np.ndarray) -> float:
        """Mean distance of the thin rows to the nearest chosen one."""
        distances = np.linalg.norm(table[1800:, None, :] - table[None, rows, :], axis=2)
        return float(distances.min(axis=1).mean())

    at_random = np.mean([hole(rng.permutation(2000)[:64]) for _ in range(10)])
    assert hole(spread_rows(table, 64, 0)) < at_random


def test_every_corner_of_a_grid_is_near_a_chosen_row() -> None:
    axes = np.meshgrid(*[np.arange(8.0)] * 3, indexing="ij")
    table = np.stack([axis.ravel() for axis in axes], axis=1)
    chosen = table[spread_rows(table, 64, 0)]
    # Of 8 cubes of half the width none stays with less than half of its eighth of 64.
    cubes = (chosen >= 4).astype(int) @ [4, 2, 1]
    assert np.bincount(cubes, minlength=8).min() >= 4
