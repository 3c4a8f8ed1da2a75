"""Grow boosted regression trees: what fits corrections where kernels switch between implementations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.operators import TreeResidual
from meshwright.costmodels.operators.trees import MAX_LEAVES
from meshwright.simcore.compiled import compiled, for_kernel, from_kernel, kernel_output, kernel_part

__all__ = ["LEARNING_RATE", "NUM_TREES", "fit_trees"]

Matrix = NDArray[np.float64]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_TREES, LEARNING_RATE = 150, 0.1
# Leaves of one sample follow the draw of the thresholds: errors vary by a tenth with it, and are larger in the mean.
LEAF_SAMPLES = 2
# Thresholds drawn per feature of a node: with two a thousand samples fit 2 % better than with one, with four three
# hundred fit 2 % worse.
_DRAWS = 2
_MOST_NODES = 2 * MAX_LEAVES - 1
# A split must be better by this share than one found before: equal ones must not change places with the last bit.
_CLEARLY = 1.0 + 1e-9


def fit_trees(coordinates: Matrix, log_errors: Floats, seed: int = 0) -> TreeResidual:
    """Return boosted extremely randomised trees through ``log_errors``.

    Parameters
    ----------
    coordinates : NDArray[np.float64]
        ``(num_samples, num_dims)``, smooth and stepwise ones.
    log_errors : NDArray[np.float64]
        ``log(measured / roofline)``, ``(num_samples,)``.
    seed : int
        Of the thresholds.

    Notes
    -----
    Boosting (Friedman 2001) over trees whose thresholds are drawn at random within a node's range (Geurts et al. 2006)
    and whose leaves split best first: a hundred and fifty trees of sixteen leaves, 4,650 nodes, do what forests of a
    hundred thousand do.
    """
    num_samples, num_dims = coordinates.shape
    offset = float(log_errors.mean())
    draws = np.random.default_rng(seed).random(NUM_TREES * _MOST_NODES * num_dims * _DRAWS)
    most = NUM_TREES * _MOST_NODES
    roots, feature, left, right = (kernel_output(most, 0, np.int64) for _ in range(4))
    threshold, value = (kernel_output(most, 0.0, np.float64) for _ in range(2))
    num_nodes = _grow(
        for_kernel(np.ascontiguousarray(coordinates.T).ravel()),
        for_kernel(log_errors - offset),
        for_kernel(draws),
        for_kernel(np.arange(num_samples)),
        for_kernel(np.array([NUM_TREES, num_dims])),
        roots,
        feature,
        threshold,
        left,
        right,
        value,
    )
    return TreeResidual(
        roots=from_kernel(roots, np.int64)[:NUM_TREES].copy(),
        feature=from_kernel(feature, np.int64)[:num_nodes].copy(),
        threshold=from_kernel(threshold, np.float64)[:num_nodes].copy(),
        left=from_kernel(left, np.int64)[:num_nodes].copy(),
        right=from_kernel(right, np.int64)[:num_nodes].copy(),
        value=from_kernel(value, np.float64)[:num_nodes].copy(),
        offset=offset,
    )


@kernel_part
def _best_split(
    columns: Floats,
    target: Floats,
    rows: Ints,
    begin: int,
    end: int,
    total: float,
    draws: Floats,
    first_draw: int,
    num_dims: int,
    split: Floats,
) -> None:
    """Write the best of the drawn splits of ``rows[begin:end]``: its gain, feature and threshold; gain 0 if none."""
    num_samples, count = len(target), end - begin
    split[0] = 0.0
    for dim in range(num_dims):
        start = dim * num_samples
        low = high = columns[start + rows[begin]]
        for place in range(begin + 1, end):
            x = columns[start + rows[place]]
            low, high = min(low, x), max(high, x)
        if not low < high:
            continue
        for draw in range(_DRAWS):
            threshold = low + draws[first_draw + dim * _DRAWS + draw] * (high - low)
            below, sum_below = 0, 0.0
            for place in range(begin, end):
                # Without a branch, which would be mispredicted every other time.
                is_below = columns[start + rows[place]] <= threshold
                below += is_below
                sum_below += is_below * target[rows[place]]
            above = count - below
            if below < LEAF_SAMPLES or above < LEAF_SAMPLES:
                continue
            # Squares that the means of two halves explain beyond the mean of both.
            gain = (sum_below / below - (total - sum_below) / above) ** 2 * below * above / count
            if gain > split[0] * _CLEARLY:
                split[0], split[1], split[2] = gain, float(dim), threshold


@compiled
def _grow(
    columns: Floats,
    target: Floats,
    draws: Floats,
    rows: Ints,
    sizes: Ints,
    roots: Ints,
    feature: Ints,
    threshold: Floats,
    left: Ints,
    right: Ints,
    value: Floats,
) -> int:
    """Write the nodes of all trees one after the other and return how many there are.

    ``target`` becomes what the trees leave. ``columns`` holds one coordinate after the other, ``rows`` the numbers of
    the samples, ``sizes`` how many trees and coordinates there are.
    """
    num_trees, num_dims, num_samples = sizes[0], sizes[1], len(rows)
    begin, end = np.zeros(_MOST_NODES, np.int64), np.zeros(_MOST_NODES, np.int64)
    total, gain, split = np.zeros(_MOST_NODES), np.zeros(_MOST_NODES), np.zeros(3)
    moved = np.zeros(num_samples, np.int64)
    root = 0
    for tree in range(num_trees):
        roots[tree] = root
        begin[0], end[0], total[0] = 0, num_samples, 0.0
        for row in range(num_samples):
            total[0] += target[row]
        first_new, count = 0, 1
        while True:
            for new in range(first_new, count):
                left[root + new] = right[root + new] = -1
                first_draw = (tree * _MOST_NODES + new) * num_dims * _DRAWS
                _best_split(
                    columns,
                    target,
                    rows,
                    begin[new],
                    end[new],
                    total[new],
                    draws,
                    first_draw,
                    num_dims,
                    split,
                )
                gain[new], feature[root + new], threshold[root + new] = split[0], int(split[1]), split[2]
            best = 0
            for node in range(1, count):
                if gain[node] > gain[best] * _CLEARLY:
                    best = node
            if gain[best] <= 0.0 or count == _MOST_NODES:
                break
            # The rows of the best leaf, those below the threshold before the others, both in their order.
            start, cut = feature[root + best] * num_samples, begin[best]
            num_moved, sum_below = 0, 0.0
            for place in range(begin[best], end[best]):
                row = rows[place]
                if columns[start + row] <= threshold[root + best]:
                    rows[cut] = row
                    cut += 1
                    sum_below += target[row]
                else:
                    moved[num_moved] = row
                    num_moved += 1
            for place in range(num_moved):
                rows[cut + place] = moved[place]
            left[root + best], right[root + best] = root + count, root + count + 1
            begin[count], end[count], total[count] = begin[best], cut, sum_below
            begin[count + 1], end[count + 1], total[count + 1] = cut, end[best], total[best] - sum_below
            gain[best] = 0.0
            first_new, count = count, count + 2
        for node in range(count):
            if left[root + node] >= 0:
                continue
            feature[root + node], threshold[root + node] = 0, 0.0
            step = LEARNING_RATE * total[node] / (end[node] - begin[node])
            value[root + node] = step
            for place in range(begin[node], end[node]):
                target[rows[place]] -= step
        root += count
    return root
