"""Grown trees against what boosting says they are."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.costmodels.operators import TreeResidual
from meshwright.costmodels.operators.trees import MAX_LEAVES
from meshwright.profiler.fitting.trees import LEAF_SAMPLES, LEARNING_RATE, NUM_TREES, fit_trees


def points(count: int, num_dims: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.0, 14.0, (count, num_dims))


def stepped(at: np.ndarray) -> np.ndarray:
    """A wave, and a step where two sizes are both large."""
    return np.asarray(0.1 * np.sin(at[:, 0] / 3.0) + 0.4 * ((at[:, 1] > 7.0) & (at[:, 2] > 7.0)))


def leaf_of(trees: TreeResidual, root: int, point: np.ndarray) -> int:
    """Walk from a root down."""
    node = root
    while trees.left[node] >= 0:
        goes_left = point[trees.feature[node]] <= trees.threshold[node]
        node = trees.left[node] if goes_left else trees.right[node]
    return int(node)


@pytest.fixture(scope="module")
def grown() -> TreeResidual:
    return fit_trees(points(200), stepped(points(200)))


def test_every_leaf_takes_its_share_of_what_the_trees_before_leave(grown: TreeResidual) -> None:
    at, left_over = points(200), stepped(points(200)) - grown.offset
    assert grown.offset == pytest.approx(stepped(at).mean())
    for root in grown.roots[:40]:
        leaves = np.array([leaf_of(grown, root, point) for point in at])
        for leaf in np.unique(leaves):
            mine = leaves == leaf
            assert mine.sum() >= LEAF_SAMPLES
            assert grown.value[leaf] == pytest.approx(LEARNING_RATE * left_over[mine].mean(), abs=1e-12)
        left_over = left_over - grown.value[leaves]


def test_nodes_follow_their_parents_and_trees_each_other(grown: TreeResidual) -> None:
    assert len(grown.roots) == NUM_TREES
    assert grown.most_leaves == MAX_LEAVES
    inner = np.flatnonzero(grown.left >= 0)
    assert (grown.left[inner] > inner).all()
    assert (grown.right[inner] == grown.left[inner] + 1).all()
    everyone = np.concatenate([grown.roots, grown.left[inner], grown.right[inner]])
    np.testing.assert_array_equal(np.sort(everyone), np.arange(len(grown.left)))
    assert set(grown.feature) <= {0, 1, 2, 3}


def test_a_step_never_seen_is_predicted(grown: TreeResidual) -> None:
    unseen = points(2000, seed=1)
    left_over = stepped(unseen) - grown.log_correction(unseen)
    assert np.abs(left_over).mean() < 0.25 * np.abs(stepped(unseen) - stepped(unseen).mean()).mean()


def test_equal_errors_need_no_split() -> None:
    trees = fit_trees(points(16), np.full(16, 0.25))
    assert len(trees.left) == NUM_TREES
    np.testing.assert_allclose(trees.log_correction(points(5, seed=2)), 0.25)


def test_equal_coordinates_are_never_split() -> None:
    at = np.column_stack([np.full(20, 3.0), np.repeat([1.0, 2.0], 10)])
    trees = fit_trees(at, np.arange(20) / 20.0)
    assert set(trees.feature[trees.left >= 0]) == {1}


def test_the_last_bit_of_an_error_moves_no_split() -> None:
    # A coordinate and its mirror image cut alike; the first of equal cuts stays.
    at = points(60, num_dims=1)
    trees = fit_trees(np.column_stack([at, -at]), stepped(np.column_stack([at, at, at])))
    assert trees.left.max() > 0
    again = fit_trees(np.column_stack([at, -at]), stepped(np.column_stack([at, at, at])) * (1.0 + 1e-13))
    np.testing.assert_array_equal(trees.feature, again.feature)
    np.testing.assert_allclose(trees.threshold, again.threshold)


def test_seeds_draw_other_thresholds(grown: TreeResidual) -> None:
    again, other = (fit_trees(points(200), stepped(points(200)), seed) for seed in (0, 1))
    np.testing.assert_array_equal(again.threshold, grown.threshold)
    assert not np.array_equal(other.threshold[:5], grown.threshold[:5])
