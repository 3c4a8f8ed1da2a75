from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshwright
from meshwright.costmodels.operators import OPERATORS, RbfResidual, StackedResidual, TreeResidual
from meshwright.costmodels.operators.residual import GRID_STEP
from meshwright.costmodels.operators.trees import MAX_LEAVES
from meshwright.profiler.fitting.residual import fit_rbf

SOURCE = str(Path(meshwright.__file__).parents[1])
DIMENSIONS = pytest.mark.parametrize("num_dims", [1, 2, 3])
# One tree: left of 0.5 in the first coordinate 1, else left of 2 in the second 10, else 100.
STUMP = TreeResidual(
    roots=np.array([0]),
    feature=np.array([0, 0, 1, 0, 0]),
    threshold=np.array([0.5, 0.0, 2.0, 0.0, 0.0]),
    left=np.array([1, -1, 3, -1, -1]),
    right=np.array([2, -1, 4, -1, -1]),
    value=np.array([0.0, 1.0, 0.0, 10.0, 100.0]),
    offset=0.25,
)


def wavy(points: np.ndarray) -> np.ndarray:
    """A smooth function of log2 sizes, as large as residuals are."""
    return np.asarray(0.2 * np.sin(points / 3.0).sum(axis=1))


def smooth(num_dims: int, *, is_baked: bool, count: int = 200) -> RbfResidual:
    """A residual through a smooth function at scattered points; its weights sum to zero as fits make them."""
    rng = np.random.default_rng(1)
    centres = np.unique(np.round(rng.uniform(0.0, 14.0, (count, num_dims)), 1), axis=0)
    operator = next(operator for operator in OPERATORS.values() if operator.num_dims == 3)
    fitted = fit_rbf(operator, centres, wavy(centres))
    return RbfResidual(
        centres=fitted.centres, weights=fitted.weights, offset=fitted.offset, is_baked=is_baked
    )


def grid_nodes(residual: RbfResidual) -> np.ndarray:
    """Nodes of the regular grid inside the box of the centres."""
    low, high = residual.centres.min(axis=0), residual.centres.max(axis=0)
    axes = [np.arange(bottom, top, GRID_STEP) for bottom, top in zip(low, high, strict=True)]
    return np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)


def test_two_centres_weigh_their_distances() -> None:
    residual = RbfResidual(centres=np.array([[0.0], [3.0]]), weights=np.array([1.0, -1.0]), offset=0.5)
    # offset - |x| + |x - 3|
    np.testing.assert_allclose(residual.log_correction(np.array([[0.0], [1.0], [3.0]])), [3.5, 1.5, -2.5])


@DIMENSIONS
def test_a_baked_residual_is_exact_at_the_nodes_of_its_grid(num_dims: int) -> None:
    baked = smooth(num_dims, is_baked=True)
    nodes = grid_nodes(baked)
    np.testing.assert_allclose(baked.log_correction(nodes), baked.exact(nodes), atol=1e-9)


@DIMENSIONS
def test_between_the_nodes_baking_costs_a_small_part_of_the_residual(num_dims: int) -> None:
    baked = smooth(num_dims, is_baked=True)
    inside = np.random.default_rng(2).uniform(1.0, 13.0, (2000, num_dims))
    exact = baked.exact(inside)
    errors = np.abs(baked.log_correction(inside) - exact)
    # Kinks at centres are cut by the grid: fractions of a percent of a time, where residuals are tens.
    assert errors.mean() < 2e-3 < 0.05 * np.abs(exact).mean()
    assert errors.max() < 0.03


@DIMENSIONS
def test_beyond_the_box_of_its_centres_a_baked_residual_is_clamped(num_dims: int) -> None:
    baked = smooth(num_dims, is_baked=True)
    low = baked.centres.min(axis=0)
    far = baked.log_correction(np.stack([low - 100.0, low]))
    assert far[0] == far[1]


def test_a_dimension_without_extent_is_baked_too() -> None:
    centres = np.array([[1.0, 5.0, 2.0], [3.0, 5.0, 2.0], [7.0, 5.0, 2.0]])
    residual = RbfResidual(centres=centres, weights=np.array([0.1, -0.3, 0.2]), offset=0.1, is_baked=True)
    np.testing.assert_allclose(residual.log_correction(centres), residual.exact(centres), atol=1e-9)


def test_no_cases_take_no_corrections() -> None:
    for residual in (smooth(3, is_baked=True), smooth(3, is_baked=False), STUMP):
        assert residual.log_correction(np.zeros((0, 3))).shape == (0,)


def test_a_tree_goes_left_up_to_its_threshold_and_adds_its_leaf() -> None:
    cases = np.array([[0.5, 9.0], [0.6, 2.0], [0.6, 2.1]])
    np.testing.assert_allclose(STUMP.log_correction(cases), [1.25, 10.25, 100.25])


def test_a_stack_weighs_its_parts() -> None:
    cases = np.array([[0.4, 0.0], [0.6, 3.0]])
    stack = StackedResidual(parts=(STUMP, STUMP), weights=(0.25, 0.5))
    np.testing.assert_allclose(stack.log_correction(cases), 0.75 * STUMP.log_correction(cases))
    assert stack.has_steps
    assert not smooth(2, is_baked=False).has_steps


def walked(trees: TreeResidual, case: np.ndarray) -> float:
    """The definition: from each root down to a leaf, tree by tree."""
    total = trees.offset
    for root in trees.roots:
        node = root
        while trees.left[node] >= 0:
            is_left = case[trees.feature[node]] <= trees.threshold[node]
            node = trees.left[node] if is_left else trees.right[node]
        total += trees.value[node]
    return total


@pytest.mark.parametrize("count", [1, 5, 256, 257, 600])
def test_trees_end_where_a_walk_ends(count: int) -> None:
    rng = np.random.default_rng(count)
    parts = [grown(rng, num_leaves) for num_leaves in (1, 2, 7, MAX_LEAVES, MAX_LEAVES)]
    starts = np.cumsum([0, *(len(part[0]) for part in parts[:-1])])
    feature, threshold, left, right = (np.concatenate([part[index] for part in parts]) for index in range(4))
    shift = np.repeat(starts, [len(part[0]) for part in parts])
    trees = TreeResidual(
        roots=starts,
        feature=feature,
        threshold=threshold,
        left=np.where(left < 0, -1, left + shift),
        right=np.where(right < 0, -1, right + shift),
        value=rng.normal(size=len(feature)),
        offset=0.5,
    )
    cases = rng.uniform(-1.0, 11.0, (count, 5))
    # On a threshold, far beyond all of them, and beyond all numbers.
    cases[0, :3] = (threshold[feature == 0][:1].sum(), -1e300, np.inf)
    expected = [walked(trees, case) for case in cases]
    np.testing.assert_array_equal(trees.log_correction(cases), expected)
    np.testing.assert_array_equal(trees.log_correction(np.asfortranarray(cases)), expected)


def grown(rng: np.random.Generator, num_leaves: int) -> tuple[np.ndarray, ...]:
    """A random tree: feature, threshold, left and right child of each node."""
    feature, threshold, left, right, leaves = [0], [0.0], [-1], [-1], [0]
    while len(leaves) < num_leaves:
        node = leaves.pop(int(rng.integers(len(leaves))))
        # Coarse thresholds, so that some are equal.
        feature[node], threshold[node] = int(rng.integers(5)), float(rng.integers(40)) / 4.0
        left[node], right[node] = len(left), len(left) + 1
        leaves += [left[node], right[node]]
        feature, threshold = [*feature, 0, 0], [*threshold, 0.0, 0.0]
        left, right = [*left, -1, -1], [*right, -1, -1]
    return np.array(feature), np.array(threshold), np.array(left), np.array(right)


@given(shift=st.floats(-50.0, 50.0), num_dims=st.integers(1, 3))
def test_a_residual_of_zero_weight_sum_stays_bounded_far_away(shift: float, num_dims: int) -> None:
    residual = smooth(num_dims, is_baked=False, count=20)
    assert abs(residual.weights.sum()) < 1e-9
    # |sum w_i |x - c_i|| <= sum |w_i| |c_i - c_0| by the triangle inequality, as the weights sum to zero.
    reach = np.abs(residual.weights) @ np.linalg.norm(residual.centres - residual.centres[0], axis=1)
    value = residual.log_correction(np.full((1, num_dims), shift))
    assert abs(value[0] - residual.offset) <= reach + 1e-6


HASH_RESIDUALS = """
import hashlib
import numpy as np
from meshwright.costmodels.operators import RbfResidual, TreeResidual
from meshwright.profiler.fitting.trees import fit_trees
from meshwright.simcore.compiled import has_compiler

rng = np.random.default_rng(5)
digest = hashlib.sha256()
nodes, leaves = 31, 16
trees = TreeResidual(
    roots=np.array([0, nodes]),
    feature=rng.integers(0, 4, 2 * nodes),
    threshold=rng.uniform(0.0, 10.0, 2 * nodes),
    left=np.tile([2 * node + 1 if node < 15 else -1 for node in range(nodes)], 2) + np.repeat([0, nodes], nodes)
    * np.tile([node < 15 for node in range(nodes)], 2),
    right=np.tile([2 * node + 2 if node < 15 else -1 for node in range(nodes)], 2) + np.repeat([0, nodes], nodes)
    * np.tile([node < 15 for node in range(nodes)], 2),
    value=rng.normal(0.0, 0.1, 2 * nodes),
    offset=0.01,
)
digest.update(trees.log_correction(rng.uniform(0.0, 10.0, (500, 4))).tobytes())
for num_dims in (1, 2, 3):
    weights = rng.normal(0.0, 0.1, 40)
    residual = RbfResidual(
        centres=rng.uniform(0.0, 9.0, (40, num_dims)), weights=weights - weights.mean(), offset=0.02, is_baked=True
    )
    digest.update(residual.log_correction(rng.uniform(-1.0, 10.0, (500, num_dims))).tobytes())
grown = fit_trees(rng.uniform(0.0, 9.0, (30, 4)), rng.normal(0.0, 0.1, 30))
for column in (grown.roots, grown.feature, grown.threshold, grown.left, grown.right, grown.value):
    digest.update(column.tobytes())
print(has_compiler(), digest.hexdigest())
"""


def run_python(code: str, **environment: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    command = [sys.executable, "-P", "-c", code]
    child = subprocess.run(
        command, env=kept | {"PYTHONPATH": SOURCE} | environment, check=True, capture_output=True, text=True
    )
    return child.stdout.split()


def test_compiled_and_plain_python_agree_bit_for_bit() -> None:
    compiled = run_python(HASH_RESIDUALS)
    plain = run_python(HASH_RESIDUALS, NUMBA_DISABLE_JIT="1")
    assert (compiled[0], plain[0]) == ("True", "False")
    assert compiled[1] == plain[1]
