"""Boosted regression trees as plain arrays: stepwise corrections where kernels switch between implementations."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.plan_columns import FloatColumn, IntColumn
from meshwright.simcore.compiled import compiled, has_compiler

__all__ = ["MAX_LEAVES", "TreeResidual"]

Matrix = NDArray[np.float64]
Masks = NDArray[np.uint16]

MAX_LEAVES = 16
"""Most leaves of one tree: those a case may still reach are the bits of one 16-bit word."""
# Equal cells between the lowest and the highest threshold of a feature; most hold no threshold or one.
_NUM_CELLS = 1024
# Up to this many rows NumPy is quicker than loading a compiled kernel would be.
_FEW_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeResidual:
    """A sum of regression trees as plain arrays: node ``i`` goes left where ``x[feature] <= threshold``.

    Parameters
    ----------
    roots : NDArray[np.int64]
        First node of each tree, which has at most :data:`MAX_LEAVES` leaves.
    feature, left, right : NDArray[np.int64]
        By node; ``left`` is -1 at a leaf.
    threshold, value : NDArray[np.float64]
        By node; ``value`` counts at leaves.
    offset : float
        Constant term.
    """

    roots: IntColumn
    feature: IntColumn
    threshold: FloatColumn
    left: IntColumn
    right: IntColumn
    value: FloatColumn
    offset: float
    _tables: list[_Tables] = field(default_factory=list, repr=False)

    @property
    def has_steps(self) -> bool:
        """Trees see everything."""
        return True

    @property
    def most_leaves(self) -> int:
        """Leaves of the largest tree."""
        return int(_leaf_ranges(self)[2][self.roots].max(initial=0))

    def log_correction(self, coordinates: Matrix) -> FloatColumn:
        """Return the sum over the trees."""
        if not self._tables:
            self._tables.append(_tables(self))
        tables = self._tables[0]
        if len(coordinates) <= _FEW_ROWS or not has_compiler():
            return _sum_columns(coordinates, tables, self.offset)
        total = np.full(len(coordinates), self.offset)
        _add_trees(
            np.ascontiguousarray(coordinates.T),
            tables.thresholds,
            tables.cell_low,
            tables.cells_per_unit,
            tables.cell_starts,
            tables.masks,
            _FIRST_BIT,
            tables.values,
            total,
        )
        return total


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tables:
    """Trees as QuickScorer reads them (Lucchese et al., SIGIR 2015), without a walk.

    A feature's value rules out, in every tree at once, the left leaves below each threshold under it: one row of
    ``masks`` per feature and number of thresholds passed. The leaves that no feature rules out begin with the one
    a walk would end at.

    Parameters
    ----------
    thresholds : FloatColumn
        Ascending, one feature after the other; an infinite one ends each.
    starts : IntColumn
        First threshold of each feature, and the number of all.
    cell_low, cells_per_unit : FloatColumn
        Lowest threshold of each feature, and cells per unit above it.
    cell_starts : NDArray[np.int32]
        First threshold in or after each cell of a feature, ``(num_features, _NUM_CELLS)``.
    masks : Masks
        Row of the first threshold that a value does not pass, ``(num_thresholds + 1, num_trees)``; the last row
        rules out nothing.
    values : Matrix
        By tree and leaf from left to right, ``(num_trees, MAX_LEAVES)``.
    """

    thresholds: FloatColumn
    starts: IntColumn
    cell_low: FloatColumn
    cells_per_unit: FloatColumn
    cell_starts: NDArray[np.int32]
    masks: Masks
    values: Matrix


def _first_bits() -> NDArray[np.uint8]:
    """Return the lowest bit set in each 16-bit word."""
    first = np.zeros(1 << MAX_LEAVES, dtype=np.uint8)
    for bit in range(MAX_LEAVES):
        first[1 << bit :: 2 << bit] = bit
    return first


_FIRST_BIT = _first_bits()


def _tables(trees: TreeResidual) -> _Tables:
    tree, first_leaf, num_leaves = _leaf_ranges(trees)
    is_inner = trees.left >= 0
    values = np.zeros((len(trees.roots), MAX_LEAVES))
    values[tree[~is_inner], first_leaf[~is_inner]] = trees.value[~is_inner]
    num_features = int(trees.feature[is_inner].max(initial=0)) + 1
    thresholds, masks, cell_starts = [], [], []
    cell_low, cells_per_unit = np.zeros(num_features), np.ones(num_features)
    for feature in range(num_features):
        nodes = np.flatnonzero(is_inner & (trees.feature == feature))
        mine, rank = np.unique(trees.threshold[nodes], return_inverse=True)
        left_leaves = ((1 << num_leaves[trees.left[nodes]]) - 1) << first_leaf[nodes]
        reachable = np.full((len(mine) + 1, len(trees.roots)), 0xFFFF, dtype=np.uint16)
        np.bitwise_and.at(reachable, (rank + 1, tree[nodes]), (0xFFFF ^ left_leaves).astype(np.uint16))
        masks.append(np.bitwise_and.accumulate(reachable, axis=0))
        thresholds.append(np.append(mine, np.inf))
        if len(mine):
            cell_low[feature] = mine[0]
            cells_per_unit[feature] = (_NUM_CELLS - 1) / max(mine[-1] - mine[0], 1e-9)
        cell = ((mine - cell_low[feature]) * cells_per_unit[feature]).astype(np.int64)
        cell_starts.append(np.cumsum(np.bincount(cell + 1, minlength=_NUM_CELLS + 1))[:-1])
    masks.append(np.full((1, len(trees.roots)), 0xFFFF, dtype=np.uint16))
    starts = np.cumsum([0, *(len(mine) for mine in thresholds)])
    return _Tables(
        thresholds=np.concatenate(thresholds),
        starts=starts,
        cell_low=cell_low,
        cells_per_unit=cells_per_unit,
        cell_starts=(np.stack(cell_starts) + starts[:-1, None]).astype(np.int32),
        masks=np.concatenate(masks),
        values=values,
    )


def _leaf_ranges(trees: TreeResidual) -> tuple[IntColumn, IntColumn, IntColumn]:
    """Return, by node, its tree, the first leaf below it counted from the left, and how many there are."""
    levels = [trees.roots]
    while len(inner := levels[-1][trees.left[levels[-1]] >= 0]):
        levels.append(np.concatenate([trees.left[inner], trees.right[inner]]))
    num_leaves = np.ones(len(trees.left), dtype=np.int64)
    tree, first_leaf = np.zeros_like(num_leaves), np.zeros_like(num_leaves)
    tree[trees.roots] = np.arange(len(trees.roots))
    above = [level[trees.left[level] >= 0] for level in levels]
    for inner in reversed(above):
        num_leaves[inner] = num_leaves[trees.left[inner]] + num_leaves[trees.right[inner]]
    for inner in above:
        left, right = trees.left[inner], trees.right[inner]
        tree[left] = tree[right] = tree[inner]
        first_leaf[left] = first_leaf[inner]
        first_leaf[right] = first_leaf[inner] + num_leaves[left]
    return tree, first_leaf, num_leaves


def _sum_columns(coordinates: Matrix, tables: _Tables, offset: float) -> FloatColumn:
    """Return what :func:`_add_trees` makes of the offset, bit for bit, without a compiler to load."""
    num_trees = len(tables.values)
    total = np.empty(len(coordinates))
    for start in range(0, len(coordinates), _FEW_ROWS):
        block = coordinates[start : start + _FEW_ROWS]
        reachable = np.full((len(block), num_trees), 0xFFFF, dtype=np.uint16)
        for feature in range(len(tables.cell_low)):
            low, end = tables.starts[feature : feature + 2]
            passed = np.searchsorted(tables.thresholds[low : end - 1], block[:, feature])
            reachable &= tables.masks[low + passed]
        terms = np.full((len(block), num_trees + 1), offset)
        terms[:, 1:] = tables.values[np.arange(num_trees), _FIRST_BIT[reachable]]
        # A running sum adds one tree after the other, as the kernel does.
        total[start : start + _FEW_ROWS] = np.cumsum(terms, axis=1)[:, -1]
    return total


@compiled
def _add_trees(
    columns: Matrix,
    thresholds: FloatColumn,
    cell_low: FloatColumn,
    cells_per_unit: FloatColumn,
    cell_starts: NDArray[np.int32],
    masks: Masks,
    first_bit: NDArray[np.uint8],
    values: Matrix,
    total: FloatColumn,
) -> None:
    """Add each tree's leaf value to ``total``, in place; four features and four cases at a time.

    ``columns`` are the coordinates, ``(num_features, num_cases)``.
    """
    num_cases, num_features, num_trees = len(total), len(cell_low), len(values)
    last_cell = float(cell_starts.shape[1] - 1)
    reachable = np.empty((4, num_trees), dtype=np.uint16)
    # Rows of masks by feature, in whole fours: the last row of all rules out nothing. A feature at a time, so that
    # its cells stay in the cache.
    rows = np.full((128, (num_features + 3) // 4 * 4), len(masks) - 1, dtype=np.int64)
    for first_case in range(0, num_cases, 128):
        count = min(128, num_cases - first_case)
        for feature in range(num_features):
            low, per_unit, cells = cell_low[feature], cells_per_unit[feature], cell_starts[feature]
            for case in range(count):
                x = columns[feature, first_case + case]
                above = (x - low) * per_unit
                passed = np.int64(cells[int(min(above, last_cell)) if above > 0.0 else 0])
                # Twice without a branch, which would be mispredicted; cells hold more than two thresholds seldom.
                passed += thresholds[passed] < x
                passed += thresholds[passed] < x
                while thresholds[passed] < x:
                    passed += 1
                rows[case, feature] = passed
        for first in range(0, count, 4):
            few = min(4, count - first)
            for case in range(few):
                row = rows[first + case]
                a, b, c, d = row[0], row[1], row[2], row[3]
                for tree in range(num_trees):
                    reachable[case, tree] = masks[a, tree] & masks[b, tree] & masks[c, tree] & masks[d, tree]
                for feature in range(4, len(row), 4):
                    a, b, c, d = row[feature], row[feature + 1], row[feature + 2], row[feature + 3]
                    for tree in range(num_trees):
                        reachable[case, tree] &= (
                            masks[a, tree] & masks[b, tree] & masks[c, tree] & masks[d, tree]
                        )
            at = first_case + first
            if few == 4:
                w, x, y, z = total[at : at + 4]
                for tree in range(num_trees):
                    w += values[tree, first_bit[reachable[0, tree]]]
                    x += values[tree, first_bit[reachable[1, tree]]]
                    y += values[tree, first_bit[reachable[2, tree]]]
                    z += values[tree, first_bit[reachable[3, tree]]]
                total[at], total[at + 1], total[at + 2], total[at + 3] = w, x, y, z
            else:
                for case in range(few):
                    for tree in range(num_trees):
                        total[at + case] += values[tree, first_bit[reachable[case, tree]]]
